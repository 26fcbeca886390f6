"""From ``model.source`` to a Hugging Face folder on this machine that is safe to load."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from distft import source
from distft.errors import DataError
from distft.log import logger
from distft.source.hub import known_token
from distft.world import cache_folder

if TYPE_CHECKING:
    from distft.config.sections import ModelSection

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", re.ASCII)
_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer*", "*.model"]
_SETTINGS = ("config.json", "generation_config.json", "tokenizer_config.json")
GGUF_FORMAT = "gguf1"
"""Names what :mod:`distft.model.gguf_file` makes, in the cache: raise the number when it makes something else."""
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tekken.json")


def is_hub_id(address: str) -> bool:
    """Whether an address that is no path on this machine names a model on the hub."""
    return bool(_HUB_ID.fullmatch(address)) and not address.endswith(".gguf")


def materialise(section: ModelSection, folder: Path) -> Path:
    """The model's files as a Hugging Face folder.

    A local folder is checked and returned as it is; a hub id is fetched into the hub's own cache, a folder in a bucket
    into ours; a ``.gguf`` file, wherever it is, is dequantised into the cache once (:mod:`distft.model.gguf_file`).

    Args:
        section: The job file's ``model`` section.
        folder: What relative paths are relative to: the job file's folder.

    Raises:
        DataError: There is no such model, files are missing or damaged, its sha256 is another, or it wants to run
            code of its own.
        CapacityError: The disk is too small for the dequantised model.
    """
    address = section.source
    is_local = address.startswith("pypi://") or (folder / Path(address).expanduser()).exists()
    if not is_local and is_hub_id(address):
        if section.sha256 is not None:
            raise DataError("a hub id has no sha256", where=address, fix="name the commit instead: model.revision")
        path = _from_hub(address, section.revision)
    else:
        path = source.file(address, folder, section.sha256, _PATTERNS)
    if path.is_file():
        path = _dequantised(path, address)
    check_folder(path, trust_remote_code=section.trust_remote_code)
    return path


def cached(section: ModelSection, folder: Path) -> Path | None:
    """The folder that :func:`materialise` would give, where it is on this machine already; nothing is fetched or made.

    Raises:
        DataError: A local path names nothing.
    """
    address = section.source
    if not (folder / Path(address).expanduser()).exists() and is_hub_id(address):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            return Path(
                snapshot_download(address, revision=section.revision, allow_patterns=_PATTERNS, local_files_only=True)
            )
        except LocalEntryNotFoundError:
            return None
    path = source.file(address, folder, None, _PATTERNS)
    place = path if path.is_dir() else _place(path)
    return place if place.is_dir() else None


def _place(path: Path) -> Path:
    """Where a GGUF file's model is dequantised to."""
    return cache_folder() / "models" / f"{path.stem}-{source.sha256_of(path)[:16]}-{GGUF_FORMAT}"


def _dequantised(path: Path, address: str) -> Path:
    """The cached folder of a GGUF file, made on first use."""
    if path.suffix != ".gguf":
        raise DataError(
            f"{path.name} is no model",
            where=address,
            fix="model.source is a hub id, a folder with config.json and model.safetensors, or a .gguf file",
        )
    place = _place(path)
    models = place.parent
    models.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{place}.lock"):
        if not place.is_dir():
            from distft.model.gguf_file import convert

            logger.info("dequantising %s (first time)", path.name)
            with tempfile.TemporaryDirectory(dir=models) as temporary:
                made = Path(temporary) / "model"
                convert(path, made)
                made.replace(place)
    return place


def _from_hub(repository: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=_PATTERNS))
    except LocalEntryNotFoundError as error:
        raise DataError(
            "the model is not in the cache, and the hub cannot be reached",
            where=repository,
            fix="set HF_ENDPOINT to a mirror, copy the model's folder here and name its path, or use pypi://",
        ) from error
    except RepositoryNotFoundError as error:  # gated ones too
        raise DataError(
            f"the hub has no such model, or it is private or gated, and {known_token()}",
            where=repository,
            fix="check the name; for a private or gated model: HF_TOKEN where it runs, or hf auth login",
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"the hub refused: {said[0]}", where=repository, fix="check model.revision") from error


def check_folder(folder: Path, *, trust_remote_code: bool = False) -> None:
    """Refuses a Hugging Face folder that lacks something, is damaged, or would run code of its own.

    Raises:
        DataError: It does.
    """
    config = _json(folder / "config.json")
    for path in (folder / name for name in _SETTINGS):
        if path.exists():
            _refuse_code(path, trust_remote_code=trust_remote_code)
    if not any((folder / name).exists() for name in _TOKENIZER_FILES):
        raise DataError("the model has no tokenizer", where=str(folder), fix=f"it needs {_TOKENIZER_FILES[0]}")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
        raise DataError(
            "the weights are pickles, which run code when they are read" if pickled else "the model has no weights",
            where=str(folder),
            fix="convert them where you trust them: from_pretrained(...).save_pretrained(...) writes model.safetensors"
            if pickled
            else "it needs model.safetensors",
        )
    index = folder / "model.safetensors.index.json"
    if index.exists():
        listed = {folder / name for name in _json(index).get("weight_map", {}).values()}
        if absent := sorted(path.name for path in listed if not path.exists()):
            raise DataError(f"weights are missing: {', '.join(absent[:3])}", where=str(folder))
    for path in weights:
        _check_weights(path)
    if not config.get("model_type"):
        raise DataError("config.json does not say its model_type", where=str(folder))


def _check_weights(path: Path) -> None:
    """Refuses a weights file that is cut short or none at all; reads only its header."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):
            pass
    except SafetensorError as error:
        raise DataError(f"the file is damaged or cut short ({error})", where=str(path), fix="fetch it again") from error


def _refuse_code(path: Path, *, trust_remote_code: bool) -> None:
    keys = set(_keys(_json(path)))
    # CVE-2026-4372: older transformers took `_attn_implementation_internal` from a config and ran code from the hub.
    if internal := sorted(key for key in keys if key.endswith("_internal")):
        raise DataError(
            f"{internal[0]!r} is not a setting a model may bring",
            where=str(path),
            fix="it makes some versions of transformers run foreign code; do not use this model",
        )
    if "auto_map" in keys and not trust_remote_code:
        raise DataError(
            "the model brings Python code of its own (auto_map)",
            where=str(path),
            fix="if you have read that code and trust it: model.trust_remote_code: true",
        )


def _keys(value: Any) -> Iterator[str]:
    """Every key of a JSON document, at any depth."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _keys(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _keys(inner)


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise DataError(
            f"there is no {path.name}", where=str(path.parent), fix="a model's folder has config.json in it"
        )
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"the file is not JSON: {error}", where=str(path), fix="fetch it again") from error
    if not isinstance(value, dict):
        raise DataError("the file is not a JSON object", where=str(path))
    return value
