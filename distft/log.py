"""Logging: one logger for the package, and the one place that sorts what other libraries say."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import warnings
from pathlib import Path
from typing import Any, Self, TextIO

logger = logging.getLogger("distft")

#: What libraries warn of at each start though nothing is wrong: no GPU, a quicker kernel for inference.
_CHATTER = re.compile(r"Setting accelerator to CPU|from kernels-community")
#: Warnings for those who write programs.
_FOR_PROGRAMMERS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning, ImportWarning, ResourceWarning)
#: More kinds of warnings than these are not told of, and more letters of each: all are in the logs.
_MOST_WARNINGS, _MOST_LETTERS = 20, 300


def quieten_libraries() -> None:
    """Keeps what libraries say on import, and their progress bars, from a person's terminal; errors still show.

    To be called before they are imported. Workers do not call it: what they print goes to the run's logs.
    """
    # transformers imports DeepSpeed where it is installed, which tells that it found no GPU.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    # peft imports bitsandbytes where it is installed, which misses faster kernels for inference on a CPU.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


class Warned:
    """What libraries warn of in this process while it is open: each kind once, however often and with what numbers.

    Log records are seen as they are made (``logging.setLogRecordFactory``), since some libraries keep their loggers
    from passing anything on; they, and what ``warnings`` shows, go their way as before.
    """

    def __init__(self) -> None:
        self._seen: set[str] = set()
        self._new: list[str] = []

    def new(self) -> list[str]:
        """What has come since it was asked last: ``library: text``, a line each."""
        found, self._new = self._new, []
        return found

    def __enter__(self) -> Self:
        self._factory, self._show = logging.getLogRecordFactory(), warnings.showwarning
        logging.setLogRecordFactory(self._record)
        warnings.showwarning = self._warning
        return self

    def __exit__(self, *_: object) -> None:
        logging.setLogRecordFactory(self._factory)
        warnings.showwarning = self._show

    def _record(self, *words: Any, **named: Any) -> logging.LogRecord:
        record: logging.LogRecord = self._factory(*words, **named)
        if record.levelno >= logging.WARNING and not record.name.startswith(logger.name):
            with contextlib.suppress(TypeError, ValueError):  # a library's mistake, of which its handlers tell
                self._take(record.name.partition(".")[0], record.getMessage())
        return record

    def _warning(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if not issubclass(category, _FOR_PROGRAMMERS):
            *_, inside = Path(filename).as_posix().rpartition("site-packages/")
            library = Path(filename).stem if inside == filename else inside.partition("/")[0]
            self._take(library, str(message))
        self._show(message, category, filename, lineno, file, line)

    def _take(self, library: str, text: str) -> None:
        line = f"{library}: {' '.join(text.split())}"[:_MOST_LETTERS]
        kind = re.sub(r"\d+", "0", line)
        if kind not in self._seen and len(self._seen) < _MOST_WARNINGS and not _CHATTER.search(line):
            self._seen.add(kind)
            self._new.append(line)
