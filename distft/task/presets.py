"""How a row is worded as a prompt and a response: the job's own words, or a preset's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from distft.config import TaskSection
from distft.config.placeholders import columns, fill

_PARAGRAPH = "\n\n"


@dataclass(frozen=True)
class Wording:
    """A prompt and a response, with columns in braces.

    Attributes:
        prompt: What the model is given.
        response: What it learns to answer.
        optional: Columns that a row may lack; a paragraph that holds nothing else goes with them.
    """

    prompt: str
    response: str
    optional: frozenset[str] = frozenset()

    @property
    def prompt_columns(self) -> tuple[str, ...]:
        """The columns in the prompt, each once, in order."""
        return columns(self.prompt)

    @property
    def response_columns(self) -> tuple[str, ...]:
        """The columns in the response, each once, in order."""
        return columns(self.response)

    def worded(self, values: Mapping[str, str]) -> tuple[str, str]:
        """The prompt and the response of a row."""
        return self._filled(self.prompt, values), self._filled(self.response, values)

    def _filled(self, template: str, values: Mapping[str, str]) -> str:
        kept = []
        for paragraph in template.split(_PARAGRAPH):
            named = columns(paragraph)
            if not named or any(column not in self.optional or values[column].strip() for column in named):
                kept.append(fill(paragraph, values))
        return _PARAGRAPH.join(kept)


PRESETS = {
    "instruction": Wording("{instruction}\n\n{input}", "{output}", frozenset({"input"})),
    "translation": Wording("Translate: {source}", "{target}"),
    "summarization": Wording("Summarize:\n\n{text}", "{summary}"),
    "question_answering": Wording("{context}\n\n{question}", "{answer}", frozenset({"context"})),
}
"""The wording of each preset but ``chat``, whose rows are conversations."""

MESSAGES = "messages"
"""The column of conversations, where the job names none."""


def wording_of(task: TaskSection, *, plain: bool) -> Wording | None:
    """The wording of a job's rows; None where they are conversations.

    Args:
        task: The task section, of kind generation.
        plain: Whether prompt and response stand end to end, as no chat template sets them apart. A preset then ends
            its prompt with a blank line; words of the job's own are taken as they are.
    """
    if task.messages is not None or task.preset == "chat":
        return None
    preset = PRESETS[task.preset] if task.preset else Wording("", "")
    if plain and preset.prompt:
        preset = replace(preset, prompt=preset.prompt + _PARAGRAPH)
    return replace(preset, prompt=task.prompt or preset.prompt, response=task.response or preset.response)
