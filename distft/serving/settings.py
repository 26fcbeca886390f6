"""What is served, and how; which models share a deployment. Nothing here imports torch or Ray."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from distft.certificate.shared import base_of

_OVER = "base+"  # no model can be called so

#: Answers that a replica writes at the same time, by whether vLLM writes them and whether it has a GPU.
_PLACES = {(False, False): 16, (False, True): 64, (True, False): 64, (True, True): 256}


class Settings(BaseModel):
    """What is served, and how."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    models: dict[str, str] = Field(min_length=1)
    """The folder of an export by the name that requests call it; every node must see it."""
    bases: dict[str, str] = {}
    """The folder of a model beneath adapters by the word that exports have for it
    (:func:`distft.certificate.shared.base_of`): its weights are held once for all of them. Every node must see it."""
    engine: Literal["auto", "transformers", "vllm"] = "auto"
    """What writes tokens; vllm is an extra, and tells no labels. auto is transformers."""
    min_replicas: int = Field(default=1, ge=0)
    """Copies of each model that there are at least; 0 lets it go while nobody asks."""
    max_replicas: int = Field(default=1, ge=1)
    """Copies of each model that there are at most."""
    idle_seconds: float = Field(default=600.0, gt=0)
    """A copy beyond the least goes when it has not been needed for so long."""
    resources: dict[str, float] = {"CPU": 1.0}
    """What each replica takes of the cluster; where there is room for a second one, updates lose no request."""
    threads: int = Field(default=1, ge=1)
    """Threads that each replica computes with on a CPU."""
    max_new_tokens: int = Field(default=512, ge=1)
    """The most tokens in one answer."""
    concurrent: int | None = Field(default=None, ge=1)
    """Answers that a replica writes at the same time; None is what its engine and its device are good for."""
    waiting: int = Field(default=64, ge=0)
    """Requests that may wait for a place; those beyond are told to come back later."""
    seconds: float = Field(default=300.0, gt=0)
    """The longest that one request may take."""
    keys: tuple[str, ...] = ()
    """Hashes of API keys: see :meth:`distft.serving.keys.Keys.hashes`."""
    key_file: str | None = None
    """A file of API keys on the gateway's node, read again when it changes."""
    insecure: bool = False
    """Whether no key is asked for."""
    loopback: bool = False
    """Whether only this machine may ask, so that names other than localhost are refused (DNS rebinding)."""

    def deployments(self) -> dict[str, tuple[str, ...]]:
        """The models that each deployment holds, by its name."""
        return deployments(self.models, {} if self.engine == "vllm" else self.bases)

    def places(self) -> int:
        """Answers that a replica writes at the same time."""
        return self.concurrent or _PLACES[self.engine == "vllm", self.resources.get("GPU", 0) > 0]

    @staticmethod
    def base(deployment: str) -> str:
        """The word for the base of a deployment; empty where it holds one model with weights of its own."""
        return deployment.removeprefix(_OVER) if deployment.startswith(_OVER) else ""


def deployments(models: Mapping[str, str], bases: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """The models that each deployment holds: those over one base together, as ``base+WORD``; the others alone.

    Args:
        models: As :attr:`Settings.models`.
        bases: As :attr:`Settings.bases`.
    """
    found: dict[str, tuple[str, ...]] = {}
    for name, folder in models.items():
        word = base_of(Path(folder)) if bases else None
        home = f"{_OVER}{word}" if word in bases else name
        found[home] = (*found.get(home, ()), name)
    return found
