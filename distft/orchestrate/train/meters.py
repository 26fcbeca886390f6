"""What Prometheus reads of a training, at the metrics endpoint that Ray has on each node; names begin with ray_ there.

It is the driver that tells (of a search the process that each trial runs in), from the lines of ``metrics.jsonl``, so
that training itself knows nothing of it. ``cluster/README.md`` says how to read them, and
``cluster/grafana-dashboard.json`` shows them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from distft.runs import Run, is_restart, read_lines
from distft.train.trackers import title

#: By kind of line: the field, its gauge, and what that is.
GAUGES = {
    "train": {
        "step": ("distft_train_step", "Steps made"),
        "steps": ("distft_train_steps", "Steps that the run is to make"),
        "epoch": ("distft_train_epoch", "Passes over the training split"),
        "loss": ("distft_train_loss", "Loss of a step's whole batch, in nats per supervised token"),
        "learning_rate": ("distft_train_learning_rate", "Learning rate of the step"),
        "grad_norm": ("distft_train_grad_norm", "Norm of the gradient before it is clipped"),
        "step_seconds": ("distft_train_step_seconds", "What the step took"),
        "tokens_per_second": ("distft_train_tokens_per_second", "Tokens of the step by its seconds, of all workers"),
        "mfu": ("distft_train_mfu", "Share of the devices' peak that the model's arithmetic used, 0 to 1"),
        "peak_memory_bytes": ("distft_train_peak_memory_bytes", "Most memory that a worker has held"),
        "world_size": ("distft_train_world_size", "Workers"),
    },
    "validation": {
        "loss": ("distft_validation_loss", "Loss on the validation split, in nats per supervised token"),
        "accuracy": ("distft_validation_accuracy", "Accuracy on the validation split, of classification"),
    },
}
#: The field of a step, its counter, and what that is. Steps that are done again count again: it is work.
COUNTERS = {
    "tokens": ("distft_train_tokens_total", "Tokens trained on"),
    "rows": ("distft_train_rows_total", "Rows trained on"),
}
#: A gauge, not a counter, which Ray would not show before the first one.
RESTARTS = ("distft_train_restarts", "How often workers were started again, or became more or fewer")
#: The label that says which run it is.
LABEL = "run"


class Meters:
    """Sets one run's metrics. Whatever goes wrong with them is told once, and is not training's.

    Args:
        run: The run; what it did before counts for its restarts.
        note: Is told what went wrong.
    """

    def __init__(self, run: Run, note: Callable[[str], None]) -> None:
        self._note = note
        self._failed = False
        self._restarts = sum(map(is_restart, read_lines(run.metrics)))
        # Ray 2.60 takes labels in ASCII alone.
        self._labels = {LABEL: title(run).encode("ascii", "backslashreplace").decode()}
        self._made: dict[str, Any] = {}

    def record(self, record: dict[str, Any]) -> None:
        """Takes a line of ``metrics.jsonl``."""
        if self._failed:
            return
        try:
            self._take(record)
        except Exception as error:
            self._failed = True
            told = " ".join(str(error).split()) or type(error).__name__
            self._note(f"  no metrics for Prometheus: {told}; training goes on without them")

    def _take(self, record: dict[str, Any]) -> None:
        for field, (name, about) in GAUGES.get(record["kind"], {}).items():
            if record.get(field) is not None:
                self._meter("Gauge", name, about).set(record[field], self._labels)
        if record["kind"] == "train":
            for field, (name, about) in COUNTERS.items():
                if record[field]:
                    self._meter("Counter", name, about).inc(record[field], self._labels)
        self._restarts += is_restart(record)
        self._meter("Gauge", *RESTARTS).set(self._restarts, self._labels)

    def _meter(self, kind: str, name: str, about: str) -> Any:
        from ray.util import metrics

        if name not in self._made:
            self._made[name] = getattr(metrics, kind)(name, about, (LABEL,))
        return self._made[name]
