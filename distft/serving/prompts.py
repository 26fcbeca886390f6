"""Prompts as the token ids that training would have made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from distft.errors import DataError
from distft.model import end_of_text_id, stop_ids
from distft.serving.protocol import ApiError
from distft.task.encoder import Encoder, fast_tokenizer
from distft.task.template import ChatTemplate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Prompts:
    """What a model that writes text reads.

    Args:
        tokenizer: The model's.

    Raises:
        DataError: It is of the slow kind, or has no end of text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._encoder = Encoder(fast_tokenizer(tokenizer))
        self._end_of_text = end_of_text_id(tokenizer)
        self._template: ChatTemplate | None = None
        self._why_none = "it has no chat template"
        try:
            self._template = ChatTemplate.of(tokenizer, stop_ids(tokenizer))
        except DataError as error:
            self._why_none = error.what

    def of_text(self, text: str) -> tuple[int, ...]:
        """The ids of a text to go on with: what begins a text with it, without what ends one.

        An empty one is the beginning of a document.
        """
        ids = self._ids(text, special=True, param="prompt")
        return (ids[:-1] if ids[-1:] == (self._end_of_text,) else ids) or (self._end_of_text,)

    def of_chat(self, messages: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
        """The ids of a conversation up to where the model's answer begins.

        Raises:
            ApiError: 400 where there is no template, or it refuses the conversation.
        """
        if self._template is None:
            raise ApiError(
                400, f"the model does not chat: {self._why_none}; ask /v1/completions", code="no_chat_template"
            )
        try:
            text = self._template.opening(
                [{**message, "content": message.get("content") or ""} for message in messages]
            )
        except DataError as error:
            raise ApiError(400, error.what, param="messages") from error
        return self._ids(text, special=False, param="messages")  # a template writes them itself

    def _ids(self, text: str, *, special: bool, param: str) -> tuple[int, ...]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ApiError(400, "the text has half of a surrogate pair, which is no character", param=param) from error
        ((ids, _),) = self._encoder.encode([text], special=special)
        return tuple(ids)
