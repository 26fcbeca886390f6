"""``hf://OWNER/NAME[@REVISION][/PATH]``: files of a data set on the Hugging Face hub, through its own cache.

``hf://datasets/OWNER/NAME``, as fsspec spells it, is the same.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distft.config.addresses import is_data
from distft.errors import DataError, JobError
from distft.log import logger
from distft.source.matching import GLOB, advice, glob_matches
from distft.source.splits import named_after

_ADDRESS = re.compile(
    r"hf://(datasets/)?(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[^/]+))?(/(?P<path>.*))?", re.ASCII
)
_UNREACHABLE = "the data set is not in the cache, and the hub cannot be reached"
_MIRROR = "set HF_ENDPOINT to a mirror, or copy the files here and name their paths"
_HTTP_CLIENTS = {"httpx", "httpx2"}


def in_hub(address: str) -> list[tuple[Path, str]]:
    """The files that an address names, each with its name on the hub, sorted by it; fetched where the cache lacks them.

    Args:
        address: A file, a glob, or a folder or a whole data set: the data files in it. Where some of a folder's files
            or folders are named after the training split, only those.

    Raises:
        DataError: There is no such data set or file, or the hub cannot be reached.
        JobError: It is no such address.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None:
        fix = "write hf://OWNER/NAME, hf://OWNER/NAME/path-or-glob or hf://OWNER/NAME@REVISION/path"
        raise JobError(f"{address!r} is no address of a data set on the hub", fix=fix)
    repository, revision, path = match["repository"], match["revision"], (match["path"] or "").strip("/")
    names = _names(repository, revision, address)
    found = _chosen(names, path, address)
    folder = _snapshot(repository, revision, found, address)
    return [(folder / name, f"hf://{repository}/{name}") for name in found]


def known_token() -> str:
    """Whether the hub was asked with a token, for people."""
    from huggingface_hub import get_token

    return "the HF_TOKEN here may not read it" if get_token() else "no HF_TOKEN is here"


def _chosen(names: list[str], path: str, address: str) -> list[str]:
    if path in names:
        return [path]
    if GLOB.search(path):
        found = [name for name in names if glob_matches(path, name)]
    else:
        start = f"{path}/" if path else ""
        found = [name for name in names if name.startswith(start) and is_data(name)]
        inside = named_after("train", [name.removeprefix(start) for name in found])
        train = [start + name for name in inside]
        if train and len(train) < len(found):
            logger.info("%s: the %d files of its training split, of %d", address, len(train), len(found))
            found = train
    if not found:
        raise DataError("no data file there matches", where=address, fix=advice(path, names, "the data set"))
    return found


def _names(repository: str, revision: str | None, address: str) -> list[str]:
    """Every file of a data set, sorted: of the hub's copy, or of the cached one where the hub cannot be reached."""
    from huggingface_hub import HfApi

    with _explained(address):
        try:
            info = HfApi().dataset_info(repository, revision=revision)
            return sorted(sibling.rfilename for sibling in info.siblings or [])
        except Exception as error:
            if not _is_unreachable(error):
                raise
        folder = _snapshot(repository, revision, [], address)
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _is_unreachable(error: Exception) -> bool:
    """Whether no hub answered. Which HTTP client says so depends on the version of huggingface_hub."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    client = type(error).__module__.partition(".")[0]
    return isinstance(error, OfflineModeIsEnabled) or (
        client in _HTTP_CLIENTS and not isinstance(error, HfHubHTTPError)
    )


def _snapshot(repository: str, revision: str | None, names: list[str], address: str) -> Path:
    """The data set's folder in the hub's cache, with the named files in it; without names, as it is."""
    from huggingface_hub import snapshot_download

    with _explained(address):
        return Path(
            snapshot_download(
                repository,
                repo_type="dataset",
                revision=revision,
                allow_patterns=[glob.escape(name) for name in names],
                local_files_only=not names,
            )
        )


@contextmanager
def _explained(address: str) -> Iterator[None]:
    """Turns what the hub says into what a person can do.

    Raises:
        DataError: It refused, or cannot be reached.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except LocalEntryNotFoundError as error:
        raise DataError(_UNREACHABLE, address, _MIRROR) from error
    except GatedRepoError as error:
        fix = "ask for access on its page, then: HF_TOKEN where it runs, or hf auth login"
        raise DataError(f"the data set is gated, and {known_token()}", address, fix) from error
    except RepositoryNotFoundError as error:
        fix = "check the name; for a private or gated one: HF_TOKEN where it runs, or hf auth login"
        raise DataError(f"the hub has no such data set, or it is private, and {known_token()}", address, fix) from error
    except RevisionNotFoundError as error:
        raise DataError("the data set has no such revision", address, "check the name after @") from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"the hub refused: {said[0]}", address, "try again, or check the address") from error
    except Exception as error:
        if not _is_unreachable(error):
            raise
        raise DataError(_UNREACHABLE, address, _MIRROR) from error
