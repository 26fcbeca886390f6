"""Several adapters over one model: its weights are held once, and each token is adapted by its own request's adapter.

The requests of a batch lie behind one another in one row. An adapter's low-rank product is made of its own tokens alone
and added to what the shared matrix gives (S-LoRA, arXiv 2311.03285; Punica, arXiv 2310.18547). peft mixes adapters in a
batch too, but by row of the batch (``adapter_names``), and it loads one by replacing modules that another thread may be
computing with: here modules stay, and an adapter is a value, which is there as long as somebody holds it.

T: tokens of a batch. H: columns of a matrix, K: its rows. R: rank of an adapter.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import linear

from distft.errors import DataError
from distft.model.nf4 import matrices

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PREFIX, _SUFFIXES = "base_model.model.", (".lora_A.weight", ".lora_B.weight")


@dataclass(frozen=True, eq=False)
class Adapter:
    """What is added to the matrices of a model.

    Attributes:
        products: By the name of a matrix: A (R, H) and B (K, R).
        scaling: What their product is multiplied by.
    """

    products: Mapping[str, tuple[Tensor, Tensor]]
    scaling: float


def read_adapter(folder: Path, model: PreTrainedModel) -> Adapter:
    """An adapter of a model, from the folder that an export keeps beside its merged weights.

    Args:
        folder: With ``adapter_config.json`` and ``adapter_model.safetensors``, as peft names them.
        model: What it is for; it gets the model's dtype and device.

    Raises:
        DataError: It is no plain LoRA of the model's matrices: a head is beside it, magnitudes (DoRA), or other shapes.
    """
    try:
        config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "adapter_model.safetensors")
        root = math.sqrt(config["r"]) if config.get("use_rslora") else config["r"]
        scaling = config["lora_alpha"] / root
    except Exception as error:  # safetensors has errors of its own
        raise DataError(f"the adapter cannot be read: {error}", where=str(folder)) from error
    known = matrices(model)
    halves: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
    for key, tensor in tensors.items():
        place = next((number for number, suffix in enumerate(_SUFFIXES) if key.endswith(suffix)), None)
        name = key.removeprefix(_PREFIX).removesuffix(_SUFFIXES[place or 0])
        if place is None or name not in known:
            raise DataError(f"{key} of the adapter belongs to no matrix of the model", where=str(folder))
        halves[place][name] = tensor.to(model.device, model.dtype)
    for name, (columns, rows) in ((name, _shape(known[name])) for name in halves[0].keys() | halves[1].keys()):
        found = [tuple(half[name].shape) if name in half else None for half in halves]
        if found != [(config["r"], columns), (rows, config["r"])]:
            raise DataError(f"the adapter of {name} has shapes that do not fit the matrix: {found}", where=str(folder))
    return Adapter({name: (low, halves[1][name]) for name, low in halves[0].items()}, scaling)


def _shape(matrix: Any) -> tuple[int, int]:
    """H and K; GPT-2's matrices are transposed."""
    rows, columns = matrix.weight.shape
    return (columns, rows) if isinstance(matrix, nn.Linear) else (rows, columns)


class MixedAdapters:
    """Adds to what the matrices of a model give, for each token of a batch, the product of its adapter.

    Args:
        model: Its matrices get a hook that does nothing where no token has an adapter.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._device = model.device
        self._tokens = 0
        self._parts: tuple[tuple[Adapter, Tensor | None], ...] = ()
        for name, matrix in matrices(model).items():
            matrix.register_forward_hook(partial(self._add, name))

    def route(self, spans: Sequence[tuple[Adapter | None, int]]) -> None:
        """Says whose the T tokens of the next forward pass are: an adapter and how many, one behind the other."""
        places: dict[Adapter, list[int]] = {}
        start = 0
        for adapter, count in spans:
            if adapter is not None:
                places.setdefault(adapter, []).extend(range(start, start + count))
            start += count
        self._tokens = start
        self._parts = tuple(
            (adapter, None if len(mine) == start else torch.tensor(mine, device=self._device))  # None: all of them
            for adapter, mine in places.items()
        )

    def _add(self, name: str, _: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        if not self._parts:
            return
        given, sums = inputs[0].flatten(0, -2), output.view(-1, output.shape[-1])
        if len(given) != self._tokens:  # a matrix that sees some of the tokens alone, as an expert does
            raise RuntimeError(f"{name} sees {len(given)} of {self._tokens} tokens: whose they are is not known")
        for adapter, mine in self._parts:
            if name in adapter.products:
                low, high = adapter.products[name]
                if mine is None:
                    sums += linear(linear(given, low), high) * adapter.scaling
                else:
                    sums.index_add_(0, mine, linear(linear(given[mine], low), high) * adapter.scaling)
