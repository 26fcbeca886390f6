"""What a person sees while a run goes: stages with ticks and one live line on a terminal, plain lines elsewhere.

A search has a live table of its trials in place of the line.
"""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.text import Text

from distft.cli.trials import ended_line, failure_lines, progress_line, shown, trial_table
from distft.report.words import duration
from distft.tuning.progress import SearchProgress
from distft.tuning.trials import best_trial

PLAIN_INTERVAL_SECONDS = 30
#: Lines of a terminal that a table of trials leaves to its head, to what stands below it, and to the shell.
LINES_AROUND_TRIALS = 12


class View:
    """Shows the stages of a run and its training as it goes; a context, so that the live line is always taken down."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._stage: str | None = None
        self._stage_began = 0.0
        self._live: Live | None = None
        self._last_plain = 0.0
        self._ended: set[str] = set()

    def __enter__(self) -> View:
        return self

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        self._close(ok=failed is None)

    def stage(self, name: str) -> None:
        """Ticks the stage before off and begins this one."""
        self._close(ok=True)
        self._stage, self._stage_began, self._last_plain = name, time.monotonic(), time.monotonic()
        if self.console.is_terminal:
            self._live = Live(self._line(), console=self.console, refresh_per_second=4, transient=True)
            self._live.start()

    def note(self, text: str) -> None:
        """Prints a few lines for good."""
        self.console.print(escape(text), soft_wrap=True)

    def record(self, record: dict[str, Any]) -> None:
        """Shows a line of ``metrics.jsonl``: steps on the live line, the rest for good."""
        if record["kind"] == "train":
            self._now(describe_step(record))
        elif record["kind"] == "validation":
            accuracy = f"  accuracy {record['accuracy']:.3f}" if "accuracy" in record else ""
            self.note(f"  step {record['step']:,}  validation loss {record['loss']:.4f}{accuracy}")
        elif record["event"] not in QUIET_EVENTS:
            self.note(f"  step {record['step']:,}  {record['event']}: {record['reason']}")

    def progress(self, done: int, of: int) -> None:
        """Shows how many parts of the stage are done."""
        self._now(f"{done:,} of {of:,}")

    def trials(self, progress: SearchProgress) -> None:
        """Shows the trials of a search: a table that moves, or a line for each that ended."""
        if self._live:
            self._live.update(Group(self._line(), self._table(progress)))
            return
        ended = [trial for trial in progress.trials if trial.status != "running"]
        for trial in ended:
            if trial.id not in self._ended:
                self.note(f"  {ended_line(trial, progress.metric)}")
        self._ended = {trial.id for trial in ended}  # one that is taken up again ends again
        self._now(progress_line(progress))

    def _table(self, progress: SearchProgress) -> Group:
        best = best_trial(progress.trials, progress.mode)
        lines = shown(progress.trials, progress.mode, max(1, self.console.height - LINES_AROUND_TRIALS))
        more = len(progress.trials) - len(lines)
        return Group(
            trial_table(lines, progress.metric, best),
            *([Text(f"and {more:,} more", "dim")] if more else []),
            *(Text(line, "red", no_wrap=True, overflow="ellipsis") for line in failure_lines(progress.trials)[-2:]),
            Text(progress_line(progress), "bold"),
        )

    def _now(self, text: str) -> None:
        now = time.monotonic()
        if self._live:
            self._live.update(self._line(text))
        elif now - self._last_plain >= PLAIN_INTERVAL_SECONDS:
            self._last_plain = now
            self.note(f"  {text}")

    def _line(self, detail: str = "") -> Text:
        return Text.assemble((f"{self._stage} … ", "bold"), detail, no_wrap=True, overflow="ellipsis")

    def _close(self, ok: bool) -> None:
        if self._live:
            self._live.stop()
            self._live = None
        if self._stage:
            mark = "[green]✓[/]" if ok else "[red]✗[/]"
            self.console.print(f"{mark} {self._stage} [dim]{duration(time.monotonic() - self._stage_began)}[/]")
            self._stage = None


#: Events that say nothing to a person who watches: they are in metrics.jsonl.
QUIET_EVENTS = frozenset({"start", "checkpoint", "best", "finished"})


def describe_step(record: dict[str, Any]) -> str:
    """One training step for a person: step, loss, tokens/s, MFU, memory, time left."""
    loss = "left out" if record["loss"] is None else f"loss {record['loss']:.4f}"
    parts = [f"step {record['step']:,}/{record['steps']:,}", loss]
    parts.append(f"{record['tokens_per_second']:,.0f} tokens/s")
    if record.get("mfu") is not None:
        parts.append(f"MFU {record['mfu']:.0%}")
    parts.append(f"{record['peak_memory_bytes'] / 1e9:.1f} GB")
    parts.append(f"{duration((record['steps'] - record['step']) * record['step_seconds'])} left")
    return "  ".join(parts)
