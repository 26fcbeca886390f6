"""What a client may ask: OpenAI's fields, those that are not done here refused by name, each within its limits.

Fields and their defaults: https://platform.openai.com/docs/api-reference/completions/create and .../chat/create;
``return_token_ids`` is vLLM's.
"""

from __future__ import annotations

import difflib
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    GetJsonSchemaHandler,
    Tag,
    ValidationError,
    create_model,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, from_json

from distft.serving.limits import Limits
from distft.serving.protocol import ApiError, Question, Sampling

# Fields of OpenAI's that are not done here, with the values that mean the same as leaving them out; None always does.
_UNDONE: dict[str, tuple[Any, ...]] = {"logit_bias": ({},)}
_UNDONE_COMPLETION: dict[str, tuple[Any, ...]] = {**_UNDONE, "best_of": (1,), "suffix": ("",)}
_UNDONE_CHAT: dict[str, tuple[Any, ...]] = {
    **_UNDONE,
    "audio": (),
    "function_call": ("none",),
    "functions": ([],),
    "metadata": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "prompt_cache_options": (),
    "prompt_cache_retention": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": (),
    "web_search_options": (),
}
_UNDONE_MESSAGE: dict[str, tuple[Any, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "name": (),
    "refusal": (),
    "tool_calls": ([],),
}
_SHOWN = 60


def _plain(text: str) -> str:
    if "\x00" in text:
        raise PydanticCustomError("invalid_value", "must not hold the character NUL")
    return text


def _is_whole(value: Any) -> bool:
    return isinstance(value, float) and value.is_integer()


def _kind(value: Any) -> str:
    """Which arm of a union a value means, so that an error speaks of that arm alone."""
    if not isinstance(value, list):
        return "one text"
    first = value[0] if value else ""
    if isinstance(first, str):
        return "list of texts"
    return "lists of ids" if isinstance(first, list) else "list of parts" if isinstance(first, dict) else "list of ids"


# The parser lets no lone surrogate through.
Text = Annotated[str, AfterValidator(_plain), Field(json_schema_extra={"pattern": "^[^\\u0000]*$"})]
Name = Annotated[Text, Field(min_length=1, max_length=256)]
_WHOLE = BeforeValidator(lambda value: int(value) if _is_whole(value) else value)  # to JSON, 8.0 is a whole number too
TokenId = Annotated[int, Field(ge=0, lt=2**31), _WHOLE]
OneText = Annotated[Text, Tag("one text")]


B = TypeVar("B", bound=BaseModel)


class Body(BaseModel):
    """What all bodies share: exact types, no unknown field, no number that is none."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
    undone: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _only_what_is_done(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        for name, value in data.items():
            if name in cls.undone:
                if value is not None and not any(type(one) is type(value) and one == value for one in cls.undone[name]):
                    raise PydanticCustomError("unsupported_parameter", "is not supported here", {"field": name})
            elif name not in cls.model_fields:
                near = difflib.get_close_matches(name[:_SHOWN], cls.model_fields, 1)
                hint = f"; did you mean {near[0]}?" if near else ""
                told = {"field": name[:_SHOWN], "hint": hint}
                raise PydanticCustomError("unknown_parameter", "is no field of this request{hint}", told)
        return {name: value for name, value in data.items() if name not in cls.undone}

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema = handler.resolve_ref_schema(handler(core))
        for name, values in cls.undone.items():
            schema["properties"][name] = {"enum": [None, *values], "description": "Not supported."}
        return schema


class Part(Body):
    """A piece of a message; only text is read."""

    type: Literal["text"]
    text: Text

    @model_validator(mode="before")
    @classmethod
    def _only_text(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("type"), str) and data["type"] != "text":
            raise PydanticCustomError("unsupported_parameter", "is not supported here: only text is", {"field": "type"})
        return data


class Message(Body):
    """One turn of a conversation."""

    undone = _UNDONE_MESSAGE

    role: Literal["system", "developer", "user", "assistant"]
    """Models know no ``developer``: it is told to them as ``system``, whose place it takes."""
    content: Annotated[
        OneText | Annotated[list[Part], Field(min_length=1, max_length=256), Tag("list of parts")], Discriminator(_kind)
    ]

    def plain(self) -> dict[str, str]:
        """As the model's template takes it."""
        role = "system" if self.role == "developer" else self.role
        parts = self.content if isinstance(self.content, list) else []
        return {"role": role, "content": "".join(each.text for each in parts) if parts else str(self.content)}


class StreamOptions(Body):
    """What a stream tells beside the text."""

    undone: ClassVar = {"include_obfuscation": (False,)}

    include_usage: bool | None = None
    """Whether a last chunk tells how many tokens it was."""


class Generation(Body):
    """What completions and chats share."""

    model: Name
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    max_tokens: int | None = None
    n: int | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    return_token_ids: bool | None = None
    """vLLM's: whether ``prompt_token_ids`` and ``token_ids`` are told with each choice."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63), _WHOLE] | None = None
    """The same seed gives the same answer; without one, each request has its own."""
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    user: Text | None = None
    """Not used."""

    @property
    def include_usage(self) -> bool:
        """Whether a stream's last chunk tells how many tokens it was."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def _sampling(self, new_tokens: int, top_logprobs: int | None) -> Sampling:
        if self.stream_options and not self.stream:
            raise refused("stream_options", "is only for streams; set stream to true")
        return Sampling(
            max_new_tokens=new_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            # Engines take 63 bits, and add the number of the answer.
            seed=secrets.randbits(62) if self.seed is None else self.seed % 2**62,
            top_logprobs=top_logprobs,
        )

    def _stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class Completion(Generation):
    """A text to continue, or several."""

    undone = _UNDONE_COMPLETION

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool | None = None
    """Whether the answer begins with the prompt."""
    logprobs: int | None = None
    """How many of the likeliest tokens are told at each place, beside the one that was chosen."""

    def question(self, limits: Limits) -> Question:
        """What the models are asked.

        Raises:
            ApiError: 400, where fields do not go together.
        """
        many = isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
        prompts: list[Any] = list(self.prompt) if many else [self.prompt]
        if len(prompts) * (self.n or 1) > limits.answers:
            raise refused(
                "n", f"makes {len(prompts) * (self.n or 1)} answers with these prompts; {limits.answers} at most"
            )
        if self.echo and self.logprobs is not None:
            raise refused("logprobs", "does not go with echo: those of a prompt are not told", "unsupported_parameter")
        return Question(
            model=self.model,
            prompts=tuple(each if isinstance(each, str) else tuple(each) for each in prompts),
            sampling=self._sampling(16 if self.max_tokens is None else self.max_tokens, self.logprobs),
            n=self.n or 1,
            stop=self._stops(),
            ids=bool(self.return_token_ids),
            echo=bool(self.echo),
            stream=bool(self.stream),
        )


class Chat(Generation):
    """A conversation to answer."""

    undone = _UNDONE_CHAT

    messages: list[Message]
    logprobs: bool | None = None
    max_completion_tokens: int | None = None
    """As ``max_tokens``, its older name. Without either: as many as the server and the context allow."""
    prompt_cache_key: Text | None = None
    """Not used."""
    safety_identifier: Text | None = None
    """Not used."""
    top_logprobs: int | None = None

    def question(self, limits: Limits) -> Question:
        """What the models are asked.

        Raises:
            ApiError: 400, where fields do not go together.
        """
        if self.top_logprobs and not self.logprobs:
            raise refused("top_logprobs", "is told only with logprobs; set logprobs to true")
        most = self.max_completion_tokens or self.max_tokens or 0
        if self.max_tokens not in (None, most):
            raise refused("max_tokens", f"is {self.max_tokens}, but max_completion_tokens is {most}; leave one out")
        return Question(
            model=self.model,
            messages=tuple(each.plain() for each in self.messages),
            sampling=self._sampling(most, (self.top_logprobs or 0) if self.logprobs else None),
            n=self.n or 1,
            stop=self._stops(),
            ids=bool(self.return_token_ids),
            stream=bool(self.stream),
        )


class Classification(Body):
    """A text to classify, or several."""

    model: Name
    input: str | list[str]

    @property
    def texts(self) -> list[str]:
        """All of them."""
        return [self.input] if isinstance(self.input, str) else self.input


@dataclass(frozen=True)
class Bodies:
    """The three kinds of body, within the limits of one server."""

    completion: type[Completion]
    chat: type[Chat]
    classification: type[Classification]

    @classmethod
    def within(cls, limits: Limits) -> Bodies:
        """The limits become part of the types, so that what is checked and what the document says are one."""

        def number(least: int, most: int) -> Any:
            return Annotated[int, Field(ge=least, le=most), _WHOLE] | None, None

        def several(each: Any, most: int, least: int = 1) -> Any:
            return Annotated[list[each], Field(min_length=least, max_length=most, fail_fast=True)]

        def one_of(*arms: Any) -> Any:
            return Annotated[Union[arms], Discriminator(_kind)]  # noqa: UP007

        tokens = number(1, limits.new_tokens)
        end = Annotated[Text, Field(min_length=1, max_length=limits.stop_characters)]
        ends: Any = Annotated[several(end, limits.stop, 0), Tag("list of texts")]
        shared = {
            "max_tokens": tokens,
            "n": number(1, min(limits.n, limits.answers)),
            "stop": (one_of(Annotated[end, Tag("one text")], ends) | None, None),
        }
        ids = several(TokenId, limits.prompt_tokens)
        prompt = one_of(
            OneText,
            Annotated[several(Text, limits.prompts), Tag("list of texts")],
            Annotated[ids, Tag("list of ids")],
            Annotated[several(ids, limits.prompts), Tag("lists of ids")],
        )
        top = number(0, limits.top_logprobs)
        texts = one_of(OneText, Annotated[several(Text, limits.texts), Tag("list of texts")])
        return cls(
            create_model("CompletionRequest", __base__=Completion, **shared, prompt=(prompt, ...), logprobs=top),
            create_model(
                "ChatRequest",
                __base__=Chat,
                **shared,
                messages=(several(Message, limits.messages), ...),
                max_completion_tokens=tokens,
                top_logprobs=top,
            ),
            create_model("ClassifyRequest", __base__=Classification, input=(texts, ...)),
        )


def parsed(kind: type[B], body: bytes) -> B:
    """A body, checked.

    Raises:
        ApiError: 400, with the field that is wrong.
    """
    try:
        # The parser gives up beyond 200 levels, on NaN, bad UTF-8 and numbers of thousands of digits; it keeps nothing.
        data = from_json(body, allow_inf_nan=False, cache_strings="none")
    except ValueError as error:
        raise ApiError(400, f"the body is no JSON: {error}", code="invalid_json") from None
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise _explained(error) from None


def refused(param: str, why: str, code: str = "invalid_value") -> ApiError:
    """A field whose value cannot be taken."""
    return ApiError(400, f"{param} {why}", code=code, param=param)


def _explained(error: ValidationError) -> ApiError:
    """The first thing that is wrong, as OpenAI would say it."""
    first = error.errors(include_url=False)[0]
    kind, told = first["type"], first.get("ctx", {})
    place = [*first["loc"], *([told["field"]] if "field" in told else [])]
    param = ""
    for part in place:
        if isinstance(part, int):
            param += f"[{part}]"
        elif " " not in part:  # else it is an arm of a union, not a field
            param += f".{part}" if param else part
    if kind in ("unsupported_parameter", "unknown_parameter"):
        return refused(param, first["msg"], kind)
    if kind == "missing":
        return refused(param, "is missing", "missing_required_parameter")
    value = first["input"]
    shown = f", not {value!r:.{_SHOWN}}" if isinstance(value, int | float | str) or value is None else ""
    said = re.sub(r"^(Input|Value|List|String) | after validation.*", "", first["msg"])
    return refused(param or "the body", f"{said}{shown}")
