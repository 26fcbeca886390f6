"""Functions of the standard library, and the first line of what they say of themselves; JSON lines on standard output.

Which functions there are depends on the Python that runs this.
"""

from __future__ import annotations

import ast
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

LIBRARY = Path(sysconfig.get_path("stdlib"))  # PSF-2.0
LETTERS = range(80, 601)
SUMMARY_LETTERS = range(15, 101)


def functions(source: str) -> Iterator[tuple[str, str]]:
    """The code of each documented function, without its docstring and comments, and the docstring's first line."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and (docstring := ast.get_docstring(node)):
            node.body = node.body[1:] or [ast.Pass()]
            yield ast.unparse(node), docstring.splitlines()[0].strip()


def main() -> None:
    """Prints {"text", "summary", "module"} for each function of a middling length."""
    for path in sorted(LIBRARY.glob("*.py")):
        for code, summary in functions(path.read_text(encoding="utf-8")):
            if len(code) in LETTERS and len(summary) in SUMMARY_LETTERS and summary[0].isupper():
                print(json.dumps({"text": code, "summary": summary, "module": path.stem}, ensure_ascii=False))


if __name__ == "__main__":
    main()
