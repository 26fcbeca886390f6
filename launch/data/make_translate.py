"""Django's messages in English and German; JSON lines on standard output."""

from __future__ import annotations

import ast
import json
from pathlib import Path

from distft.source import files

MESSAGES = "pypi://django==5.2.19/django/**/locale/de/LC_MESSAGES/*.po"  # BSD-3-Clause
LETTERS = range(12, 161)


def entries(text: str) -> list[dict[str, str]]:
    """The entries of a .po file: a keyword such as msgid, and what it says.

    Comments are left out, and with them entries that are obsolete (#~); one that is marked as a guess keeps "fuzzy".
    """
    found = []
    for block in text.split("\n\n"):
        entry: dict[str, str] = {}
        keyword = ""
        for line in block.splitlines():
            if line.startswith("#,") and "fuzzy" in line:
                entry["fuzzy"] = ""
            elif line.startswith("msg"):
                keyword, _, quoted = line.partition(" ")
                entry[keyword] = ast.literal_eval(quoted)
            elif line.startswith('"'):
                entry[keyword] += ast.literal_eval(line)
        found.append(entry)
    return found


def main() -> None:
    """Prints {"en", "de"} for each message of a middling length, once; plural forms are left out."""
    seen = set()
    for file in files(MESSAGES, Path()):
        for entry in entries(file.path.read_text(encoding="utf-8")):
            english, german = entry.get("msgid", ""), entry.get("msgstr", "")
            if "fuzzy" in entry or not german or len(english) not in LETTERS or english in seen:
                continue
            seen.add(english)
            print(json.dumps({"en": english, "de": german}, ensure_ascii=False))


if __name__ == "__main__":
    main()
