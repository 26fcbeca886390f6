"""Ray Train's trainer, less what only delays the next group of workers. Imported where Ray is there already.

All of it can go when Ray Train has settings for it; none of it changes what is trained.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import Any

import ray
from ray.train import Result
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2._internal.execution.worker_group.placement_group_handle import DefaultPlacementGroupHandle
from ray.util.placement_group import get_current_placement_group, placement_group

from distft.orchestrate.nodes.facts import interface_of


def _meet_at_node() -> None:
    """Has ranks meet at the address that Ray knows this node by, unless the node's environment says otherwise.

    Left alone, gloo takes the address that the host's name stands for there: on many hosts 127.0.0.1 or 127.0.1.1,
    where other hosts cannot reach it; NCCL takes the first interface that is neither a loopback nor Docker's.
    """
    interface = interface_of(ray.util.get_node_ip_address())
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")  # without "=" also those whose names begin so


class _Backend(_TorchBackend):  # type: ignore[misc]  # Ray's types are not read
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Sets the process group up, between nodes."""
        worker_group.execute(_meet_at_node)
        super().on_start(worker_group, backend_config)

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


class _Lent(DefaultPlacementGroupHandle):  # type: ignore[misc]
    """A placement group that somebody else holds."""

    def shutdown(self) -> None:
        """Leaves it as it is."""


class _WorkerGroup(WorkerGroup):  # type: ignore[misc]
    """Workers whose environment is no other than we say, so that Ray gives them processes that it has started."""

    @staticmethod
    def _get_worker_runtime_env(custom_runtime_env: Any) -> Any:
        return custom_runtime_env

    def _create_placement_group(self, scaling_config: Any, worker_group_context: Any) -> DefaultPlacementGroupHandle:
        """As in Ray Train, but with a name, by which :func:`.places.clear` finds it however far the start came.

        A trial of a search has a group already, which Ray Tune made and takes back.
        """
        if (lent := get_current_placement_group()) is not None:
            return _Lent(lent)
        return DefaultPlacementGroupHandle(
            placement_group(
                bundles=[worker_group_context.resources_per_worker] * worker_group_context.num_workers,
                strategy=worker_group_context.placement_strategy,
                bundle_label_selector=worker_group_context.label_selector,
                name=self._train_run_context.run_config.name,
            )
        )

    def _init_train_context_on_workers(self, workers: list[Any], sync_actor: Any, train_context_args: Any) -> None:
        """As in Ray Train, but for ``controller_actor``: there is none, and only reports would ask it."""
        ray.get(
            [
                worker.actor.init_train_context.remote(
                    train_run_context=self._train_run_context,
                    distributed_context=worker.distributed_context,
                    synchronization_actor=sync_actor,
                    storage_context=self._storage_context,
                    worker_callbacks=self._worker_callbacks_to_propagate,
                    controller_actor=None,
                    **{name: values[rank] for name, values in train_context_args.items()},
                )
                for rank, worker in enumerate(workers)
            ]
        )


class _Controller(TrainController):  # type: ignore[misc]
    """Ray Train's, with the workers above."""

    worker_group_cls = _WorkerGroup

    def _shutdown_worker_group(self) -> None:
        """As in Ray Train, but a head that is gone makes no failure of training that is done.

        What is held then is given back by :func:`.places.clear`.
        """
        with contextlib.suppress(ray.exceptions.GetTimeoutError):
            super()._shutdown_worker_group()


#: What starts a process for each group of workers that we have no use for: we pass no Ray datasets, and when the driver
#: dies, its placement groups go with it.
_UNUSED = (DatasetsCallback, PlacementGroupCleanerCallback)


class Trainer(TorchTrainer):  # type: ignore[misc]
    """Without the processes beside the workers that can be spared: each takes a second of a core to start."""

    def _create_default_callbacks(self) -> list[Any]:
        return [one for one in super()._create_default_callbacks() if not isinstance(one, _UNUSED)]

    def _initialize_and_run_controller(self, **arguments: Any) -> Result:
        """Runs Ray Train's controller here, in the driver: as an actor it is one more process that imports torch."""
        controller = _Controller(**arguments)
        asyncio.run(controller.run())
        return controller.get_result()
