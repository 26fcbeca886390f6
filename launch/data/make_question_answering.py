"""Questions of fact of the ChatterBot corpus, and their answers; JSON lines on standard output."""

from __future__ import annotations

import json

from make_chat import conversations

TOPICS = {"ai", "computers", "history", "literature", "movies", "science", "sports", "trivia"}


def main() -> None:
    """Prints {"question", "answer", "topic"} for each question, with its first answer."""
    seen = set()
    for topic, turns in conversations():
        if topic in TOPICS and len(turns) == 2 and all(turns) and turns[0] not in seen:
            seen.add(turns[0])
            print(json.dumps({"question": turns[0], "answer": turns[1], "topic": topic}, ensure_ascii=False))


if __name__ == "__main__":
    main()
