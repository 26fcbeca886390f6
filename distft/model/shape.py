"""A model's sizes, read from its configuration and the headers of its files: what its cost follows from.

No weight is read, and neither torch nor transformers is imported: planning has to answer at once, also for models that
this machine could not hold.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distft import source
from distft.errors import DataError
from distft.model.files import is_hub_id
from distft.model.gguf_header import read_header

if TYPE_CHECKING:
    from distft.config.sections import AdapterSection, ModelSection

Tensors = Mapping[str, tuple[int, ...]]

_EMBEDDINGS = ("embed", "wte", "wpe", "token_embd", "position_embd")
_HEADS = ("lm_head", "embed_out", "output", "score")
#: The name of a classifier's head.
SCORE = "score.weight"
_STORED_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "I8": 1, "U8": 1}
#: Settings that change logits after the head, so that the loss cannot take head and loss in one step.
_AFTER_HEAD = ("final_logit_softcapping", "logit_scale", "logits_scaling")


@dataclass(frozen=True)
class Shape:
    """The sizes of a GPT.

    Attributes:
        kind: Its architecture: ``model_type`` in config.json.
        layers: Blocks.
        hidden: Width D of the residual stream.
        heads: Attention heads.
        kv_heads: Heads of keys and values.
        head_size: Width of a head.
        intermediate: Width of the feed-forward part, in one expert where there are several.
        vocabulary: Tokens V that it knows.
        tensors: Shapes of all its weights by name; tied ones once.
        stored_bytes: Bytes of its weights as they are loaded from the disk.
        experts: Feed-forward parts of a layer, 1 where there are no experts.
        experts_used: How many of them a token passes through.
        gated: Whether the feed-forward part has a gate beside it (SwiGLU, arXiv 2002.05202).
        plain_head: Whether its logits are its head's matrix product and nothing more.
    """

    kind: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    vocabulary: int
    tensors: Tensors
    stored_bytes: int
    experts: int = 1
    experts_used: int = 1
    gated: bool = True
    plain_head: bool = True

    @property
    def parameters(self) -> int:
        """All of them, tied ones once."""
        return sum(map(math.prod, self.tensors.values()))

    @property
    def tied(self) -> bool:
        """Whether the input embedding is the output layer too."""
        return not any(_is_head(name) for name in self.tensors)

    @property
    def outputs(self) -> int:
        """What the head scores: tokens, or a classifier's labels."""
        return next((shape[0] for name, shape in self.tensors.items() if _is_head(name)), self.vocabulary)

    @property
    def looked_up(self) -> int:
        """Parameters that a token picks a row of, and multiplies nothing with."""
        embeddings = sum(math.prod(shape) for name, shape in self.tensors.items() if _is_embedding(name))
        return max(0, embeddings - (self.vocabulary * self.hidden if self.tied else 0))

    @property
    def multiplied(self) -> int:
        """Parameters that take part in a token's multiplications."""
        experts = sum(math.prod(shape) for name, shape in self.tensors.items() if "exp" in name and len(shape) > 1)
        return self.parameters - self.looked_up - experts * (self.experts - self.experts_used) // self.experts

    @property
    def matrices(self) -> dict[str, tuple[int, ...]]:
        """The linear layers between embedding and head: what an adapter adapts and quantising packs."""
        return {
            name: shape
            for name, shape in self.tensors.items()
            if len(shape) == 2 and not _is_embedding(name) and not _is_head(name)
        }

    def heads_divide(self, ranks: int) -> bool:
        """Whether so many ranks can have equally many heads; those of keys may be repeated for them."""
        return self.heads % ranks == 0 and (self.kv_heads % ranks == 0 or ranks % self.kv_heads == 0)

    def trained(self, adapter: AdapterSection | None) -> int:
        """Parameters that are trained: all, or those of a low-rank adapter, ``rank (in + out)`` for each matrix.

        Source: LoRA, arXiv 2106.09685, section 4.1; a magnitude per output beside it for DoRA, arXiv 2402.09353.
        """
        if adapter is None:
            return self.parameters
        targets = [adapter.targets] if isinstance(adapter.targets, str) else adapter.targets
        chosen = [
            shape
            for name, shape in self.matrices.items()
            if targets == ["all-linear"] or any(name.removesuffix(".weight").endswith(one) for one in targets)
        ]
        adapted = sum(adapter.rank * sum(shape) + (shape[0] if adapter.dora else 0) for shape in chosen)
        return adapted + math.prod(self.tensors.get(SCORE, (0,)))

    def as_classifier(self, labels: int) -> Shape:
        """The same model with a head that scores labels in place of tokens; it is trained whole beside an adapter."""
        body = {name: shape for name, shape in self.tensors.items() if not _is_head(name)}
        return replace(self, tensors={**body, SCORE: (labels, self.hidden)}, plain_head=True)


def _is_embedding(name: str) -> bool:
    return any(part in name for part in _EMBEDDINGS) and not _is_head(name)


def _is_head(name: str) -> bool:
    """GGUF calls it ``output.weight``, and a layer's own ``blk.0.attn_output.weight``."""
    return name.removesuffix(".weight") in _HEADS


def read_shape(section: ModelSection, folder: Path) -> Shape:
    """The sizes of the model that a job names.

    Of a model on the hub only config.json and the headers of its files are fetched.

    Args:
        section: The job file's ``model`` section.
        folder: What relative paths are relative to: the job file's folder.

    Raises:
        DataError: There is no such model, or its configuration lacks a size.
    """
    address = section.source
    local = address.startswith("pypi://") or (folder / Path(address).expanduser()).exists()
    if not local and is_hub_id(address):
        return _of_hub(address, section.revision)
    path = source.file(address, folder, None, ["config.json", "*.safetensors", "*.gguf"])
    return of_folder(path) if path.is_dir() else _of_gguf(path)


def of_folder(folder: Path) -> Shape:
    """The sizes of a Hugging Face folder.

    Raises:
        DataError: config.json lacks a size, or there are no weights.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"config.json cannot be read ({error})", where=str(folder)) from None
    tensors: dict[str, tuple[int, ...]] = {}
    stored = 0
    for path in sorted(folder.glob("*.safetensors")):
        for name, entry in _safetensors_header(path).items():
            tensors[name] = tuple(entry["shape"])
            stored += math.prod(entry["shape"]) * _STORED_BYTES.get(entry["dtype"], 4)
    if not tensors:
        raise DataError("the model has no weights", where=str(folder), fix="it needs model.safetensors")
    return of_config(config, tensors, stored, str(folder))


def _safetensors_header(path: Path) -> dict[str, dict[str, Any]]:
    """Names, shapes and types of a file's tensors (https://huggingface.co/docs/safetensors/index#format)."""
    with path.open("rb") as file:
        try:
            (length,) = struct.unpack("<Q", file.read(8))
            header: dict[str, dict[str, Any]] = json.loads(file.read(length))
        except (struct.error, ValueError, MemoryError):
            raise DataError("the file is damaged or cut short", where=str(path), fix="fetch it again") from None
    header.pop("__metadata__", None)
    return header


def _of_hub(repository: str, revision: str | None) -> Shape:
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        path = hf_hub_download(repository, "config.json", revision=revision)
        config = json.loads(Path(path).read_text(encoding="utf-8"))
        if sorted(Path(path).parent.glob("*.safetensors")):
            return of_folder(Path(path).parent)
        files = HfApi().get_safetensors_metadata(repository, revision=revision).files_metadata.values()
    except (HfHubHTTPError, OSError, ValueError) as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(
            f"the model's configuration cannot be had: {said[0]}",
            where=repository,
            fix="check name and revision; without a hub: set HF_ENDPOINT to a mirror, or name a folder",
        ) from error
    entries = {name: entry for file in files for name, entry in file.tensors.items()}
    tensors = {name: tuple(entry.shape) for name, entry in entries.items()}
    stored = sum(math.prod(entry.shape) * _STORED_BYTES.get(entry.dtype, 4) for entry in entries.values())
    return of_config(config, tensors, stored, repository)


def _of_gguf(path: Path) -> Shape:
    """The sizes in a GGUF file; it is dequantised to fp32 before it is loaded."""
    said, tensors = read_header(path)
    kind = said.get("general.architecture", "")
    heads = said.get(f"{kind}.attention.head_count")
    config = {
        "model_type": kind,
        "num_hidden_layers": said.get(f"{kind}.block_count"),
        "hidden_size": said.get(f"{kind}.embedding_length"),
        "intermediate_size": said.get(f"{kind}.feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": said.get(f"{kind}.attention.head_count_kv", heads),
        "head_dim": said.get(f"{kind}.attention.key_length"),
        "vocab_size": tensors.get("token_embd.weight", (None,))[0],
        "num_experts": said.get(f"{kind}.expert_count"),
        "num_experts_per_tok": said.get(f"{kind}.expert_used_count"),
        "final_logit_softcapping": said.get(f"{kind}.final_logit_softcapping"),
    }
    return of_config(config, tensors, 4 * sum(map(math.prod, tensors.values())), str(path))


#: Names of each size in configurations, as architectures call it.
_NAMES = {
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "heads": ("num_attention_heads", "n_head", "n_heads"),
    "vocabulary": ("vocab_size",),
}


def of_config(config: Mapping[str, Any], tensors: Tensors, stored_bytes: int, where: str) -> Shape:
    """The sizes of a configuration.

    Args:
        config: config.json's content.
        tensors: The shapes of the weights.
        stored_bytes: Their bytes on the disk.
        where: What to call it in an error.

    Raises:
        DataError: A size is missing.
    """
    text: Mapping[str, Any] = {**config, **(config.get("text_config") or {})}

    def first(*names: str) -> Any:
        return next((text[name] for name in names if text.get(name)), None)

    sizes = {name: first(*names) for name, names in _NAMES.items()}
    if missing := [_NAMES[name][0] for name, size in sizes.items() if not isinstance(size, int)]:
        raise DataError(f"the model's configuration does not say {', '.join(missing)}", where=where)
    experts = first("num_experts", "num_local_experts", "n_routed_experts") or 1
    used = first("num_experts_per_tok") or 1
    return Shape(
        kind=str(config.get("model_type", "")),
        **sizes,
        kv_heads=first("num_key_value_heads") or sizes["heads"],
        head_size=first("head_dim") or sizes["hidden"] // sizes["heads"],
        intermediate=first("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size") or 4 * sizes["hidden"],
        tensors=tensors,
        stored_bytes=stored_bytes,
        experts=experts,
        experts_used=min(used, experts),
        gated=any("gate" in name for name in tensors),
        plain_head=all(first(name) in (None, 1, 1.0) for name in _AFTER_HEAD),
    )


def llama_tensors(
    *, layers: int, hidden: int, heads: int, kv_heads: int, intermediate: int, vocabulary: int, tied: bool = False
) -> dict[str, tuple[int, ...]]:
    """The weights of a Llama of these sizes (arXiv 2302.13971), for plans of models that are nowhere yet."""
    head_size = hidden // heads
    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        at = f"model.layers.{layer}"
        tensors |= {
            f"{at}.self_attn.q_proj.weight": (heads * head_size, hidden),
            f"{at}.self_attn.k_proj.weight": (kv_heads * head_size, hidden),
            f"{at}.self_attn.v_proj.weight": (kv_heads * head_size, hidden),
            f"{at}.self_attn.o_proj.weight": (hidden, heads * head_size),
            f"{at}.mlp.gate_proj.weight": (intermediate, hidden),
            f"{at}.mlp.up_proj.weight": (intermediate, hidden),
            f"{at}.mlp.down_proj.weight": (hidden, intermediate),
            f"{at}.input_layernorm.weight": (hidden,),
            f"{at}.post_attention_layernorm.weight": (hidden,),
        }
    tensors["model.norm.weight"] = (hidden,)
    return tensors if tied else {**tensors, "lm_head.weight": (vocabulary, hidden)}
