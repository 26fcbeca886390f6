"""Ray Train's trainer, less what only delays the next group of workers. Imported where Ray is there already.

Both classes can go when Ray Train has settings for them; neither changes what is trained.
"""

from __future__ import annotations

from typing import Any

from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback


class _Backend(_TorchBackend):  # type: ignore[misc]  # Ray's types are not read
    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        """Leaves the process group as it is: its processes are ended next.

        Ray 2.60 would wait up to 30 s for ranks that wait in a collective for one that is gone.
        """


class Torch(TorchConfig):  # type: ignore[misc]
    """Sets the process group up, and lets the end of its processes take it down."""

    @property
    def backend_cls(self) -> type[_Backend]:
        """Who does so."""
        return _Backend


#: What starts a process for each group of workers that we have no use for: we pass no Ray datasets, and should Ray
#: Train's controller die, :mod:`.places` removes the placement group (Ray's cleaner asks the state API for that, which
#: a cluster without a dashboard does not have, each time for seconds).
_UNUSED = (DatasetsCallback, PlacementGroupCleanerCallback)


class Trainer(TorchTrainer):  # type: ignore[misc]
    """Without the processes beside the workers that can be spared: each takes a second of a core to start."""

    def _create_default_callbacks(self) -> list[Any]:
        return [one for one in super()._create_default_callbacks() if not isinstance(one, _UNUSED)]
