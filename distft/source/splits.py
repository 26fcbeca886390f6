"""Folders whose files are named after splits: training must not read the test rows among them."""

from __future__ import annotations

import re
from collections.abc import Iterable

from distft.config.addresses import ARCHIVE, compression, file_type
from distft.errors import DataError

_WORDS = {"train": "train(ing)?", "validation": "val(id(ation)?)?|dev|eval", "test": "test"}
_NAMED = {split: re.compile(rf"(^|[^a-z0-9])({words})([^a-z0-9]|$)", re.IGNORECASE) for split, words in _WORDS.items()}


def named_after(split: str, names: Iterable[str]) -> list[str]:
    """Those of some ``/``-separated names that are named after a split, or lie in a folder that is."""
    return [name for name in names if _NAMED[split].search(name)]


def refuse_several(names: Iterable[str], address: str) -> None:
    """Makes sure that a folder's files, read as one source, are not those of several splits.

    Args:
        names: Their ``/``-separated names within the folder.
        address: The folder's, or the archive's.

    Raises:
        DataError: Some are named after the training split, and others after the validation or the test split.
    """
    left, found = list(names), {}
    for split in _NAMED:
        found[split] = named_after(split, left)
        left = [name for name in left if name not in found[split]]
    if not found["train"] or not (found["validation"] or found["test"]):
        return
    shown = ", ".join(names[0] for names in found.values() if names)
    folder = address.rstrip("/")
    unpacked = folder.lower().endswith(ARCHIVE)
    folder = folder[: -len(ARCHIVE)] if unpacked else folder
    three = ", ".join(f"{split}: {_address(folder, split, names)}" for split, names in found.items())
    raise DataError(
        f"files of several splits lie in it: {shown}",
        where=address,
        fix=f"{'unpack it; ' if unpacked else ''}data.source: {{{three}}} takes the splits as they are; "
        f"data.source: {_address(folder, 'train', found['train'])} draws them from the training rows; "
        f"a glob, {folder}/**/*{_ending(found['train'][0])}, takes all files as one source",
    )


def _address(folder: str, split: str, names: list[str]) -> str:
    """What names a split's files: their folder, the one file, or a glob; an ellipsis where there are none."""
    if not names:
        return "..."
    *folders, last = names[0].split("/")
    named = next((place for place, part in enumerate(folders) if _NAMED[split].search(part)), None)
    if named is not None:
        inside = "/".join(folders[: named + 1])
        if all(name.startswith(f"{inside}/") for name in names):
            return f"{folder}/{inside}"
        return f"{folder}/**/{folders[named]}/**/*{_ending(last)}"
    if len(names) == 1:
        return f"{folder}/{names[0]}"
    word = _NAMED[split].search(last)
    within = "/".join(folders) if all(name.split("/")[:-1] == folders for name in names) else "**"
    return "/".join(filter(None, (folder, within, f"*{word[2] if word else split}*{_ending(last)}")))


def _ending(name: str) -> str:
    return file_type(name) + compression(name)
