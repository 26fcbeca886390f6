"""Conversations of the ChatterBot corpus; JSON lines on standard output."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from ruamel.yaml import YAML

from distft.source import files

CORPUS = "pypi://chatterbot-corpus==1.3.3/chatterbot_corpus/data/english/*.yml"  # BSD-3-Clause
TOPICS = {
    "ai", "coding", "computers", "conversations", "emotion", "food", "greetings", "history", "humor", "literature",
    "movies", "science", "sports", "trivia",
}  # fmt: skip


def conversations() -> Iterator[tuple[str, list[str]]]:
    """The topic and the turns of each conversation."""
    for file in files(CORPUS, Path()):
        if file.path.stem in TOPICS:
            for turns in YAML(typ="safe").load(file.path)["conversations"]:
                yield file.path.stem, [" ".join(str(turn).split()) for turn in turns]


def main() -> None:
    """Prints {"messages", "opening", "topic"} for each conversation, up to its last answer."""
    for topic, turns in conversations():
        turns = turns[: len(turns) // 2 * 2]
        if turns and all(turns):
            messages = [
                {"role": "assistant" if number % 2 else "user", "content": turn} for number, turn in enumerate(turns)
            ]
            print(json.dumps({"messages": messages, "opening": turns[0], "topic": topic}, ensure_ascii=False))


if __name__ == "__main__":
    main()
