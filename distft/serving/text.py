"""From the tokens of an answer to the text that a person sees."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from distft.model.decoding import TextStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class StopStrings:
    """Ends a text that comes in pieces before the stop string that is complete first.

    What may be the beginning of a stop string is held back. How the text is cut into pieces changes nothing.

    Args:
        stops: The stop strings, none of them empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.found = False

    def add(self, text: str) -> str:
        """What of the text is certain to be shown; after a stop string was found, nothing."""
        if self.found:
            return ""
        text = self._held + text
        ends = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if ends:
            self.found, self._held = True, ""
            return text[: min(ends)[1]]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def end(self) -> str:
        """What was held back, where no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of a text that a stop string begins with."""
    return next((length for length in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:length])), 0)


class AnswerText:
    """The text of one answer, from its tokens.

    Args:
        tokenizer: The model's.
        stop_ids: The ids that end an answer; they are not shown, special or not.
        stops: The stop strings.
        before: The prompt, where the answer's text goes on after it.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: Collection[int],
        stops: Sequence[str] = (),
        before: Sequence[int] = (),
    ) -> None:
        self._stream, self._stops, self._stop_ids = TextStream(tokenizer, before), StopStrings(stops), stop_ids
        self._step = 1 if stops else None
        self.stopped = False
        """Whether the model or a stop string ended the answer."""

    def add(self, ids: Sequence[int]) -> tuple[str, int]:
        """The text that can be shown now, and how many of the ids are part of the answer.

        Those after the one that completes a stop string are not.
        """
        self.stopped = bool(ids) and ids[-1] in self._stop_ids
        shown = ids[:-1] if self.stopped else ids
        text, step = "", self._step or max(1, len(shown))
        for place in range(0, len(shown), step):
            text += self._stops.add(self._stream.add(shown[place : place + step]))
            if self._stops.found:
                self.stopped = True
                return text, place + step
        return text, len(ids)

    def end(self) -> str:
        """What was held back, where the model or a limit ended the answer."""
        if self._stops.found:
            return ""
        text = self._stops.add(self._stream.end())
        self.stopped |= self._stops.found
        return text + self._stops.end()
