"""A process's place in the world: the only reader of RANK and of the DISTFT_* variables."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class World:
    """Which process this is among those that train together.

    Attributes:
        rank: 0 .. size - 1 over the whole cluster.
        size: Number of ranks (world size).
        local_rank: 0 .. local_size - 1 on this node.
        local_size: Ranks on this node.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this rank writes what only one may write."""
        return self.rank == 0

    @classmethod
    def from_environment(cls) -> World:
        """Reads the variables that torchrun and Ray Train set; a bare process is a world of one."""
        return cls(
            rank=int(os.environ.get("RANK", 0)),
            size=int(os.environ.get("WORLD_SIZE", 1)),
            local_rank=int(os.environ.get("LOCAL_RANK", 0)),
            local_size=int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", 1))),
        )


def cache_folder() -> Path:
    """Where fetched models and prepared data are kept: DISTFT_CACHE, else ``~/.cache/distft``."""
    return Path(os.environ.get("DISTFT_CACHE") or Path.home() / ".cache" / "distft").expanduser()


def api_key() -> str | None:
    """The key with which servers are asked: OPENAI_API_KEY, as OpenAI's clients take it."""
    return os.environ.get("OPENAI_API_KEY")


def runs_folder() -> Path:
    """Where runs are kept when no ``--runs`` is given: DISTFT_RUNS, else ``runs`` in the current folder."""
    return Path(os.environ.get("DISTFT_RUNS") or "runs").expanduser()
