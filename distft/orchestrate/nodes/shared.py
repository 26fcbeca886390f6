"""Whether nodes see the same files: each writes one, and looks for those of the others."""

from __future__ import annotations

import os
import time
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from distft.errors import DistftError

#: Seconds after which a file of another node must be seen: network file systems look again after a while.
PATIENCE_SECONDS = 5.0

DRIVER = "driver"


@dataclass(frozen=True)
class Shared:
    """A place that every node must see; it crosses the cluster by pickling.

    Attributes:
        address: A folder, whole, or ``s3://`` or ``gs://``.
        setting: What says that it is there, for people: ``DISTFT_CACHE``.
        token: Names the files of this look at it, and is what they contain.
    """

    address: str
    setting: str
    token: str

    def write(self, who: str) -> None:
        """Writes a node's file.

        Raises:
            OSError: It cannot be written.
            DistftError: The bucket does not answer.
        """
        files, folder = self._files
        with self._explained():
            if not self.in_bucket:
                files.create_dir(folder, recursive=True)
            with files.open_output_stream(f"{folder}/{who}") as stream:
                stream.write(self.token.encode())

    def sees(self, who: str) -> bool:
        """Whether this node sees another one's file, at once or soon.

        Raises:
            OSError: It is there and cannot be read.
            DistftError: The bucket does not answer.
        """
        end = time.monotonic() + PATIENCE_SECONDS
        while not self._reads(who):
            if time.monotonic() > end:
                return False
            time.sleep(0.1)
        return True

    def clear(self) -> None:
        """Removes every file of this look that this node sees, as far as that can be done."""
        with suppress(OSError, DistftError):
            files, folder = self._files
            files.delete_dir(folder)

    @property
    def in_bucket(self) -> bool:
        """Whether it is no folder."""
        return "://" in self.address

    def _reads(self, who: str) -> bool:
        files, folder = self._files
        with self._explained():
            try:
                with files.open_input_file(f"{folder}/{who}") as stream:
                    return bool(stream.read() == self.token.encode())
            except FileNotFoundError:
                return False

    @cached_property
    def _files(self) -> tuple[Any, str]:
        """Pyarrow's file system, and the folder in it that is this look's own."""
        name = f".distft-nodes-{self.token[:16]}"
        if not self.in_bucket:
            from pyarrow import fs

            return fs.LocalFileSystem(), str(Path(self.address) / name)
        from distft.source.bucket import connected

        files, _, inside = connected(self.address)
        return files, f"{inside}/{name}"

    def _explained(self) -> AbstractContextManager[None]:
        if not self.in_bucket:
            return nullcontext()
        from distft.source.bucket import explained

        return explained(self.address)

    def __reduce__(self) -> tuple[Any, ...]:
        return Shared, (self.address, self.setting, self.token)  # each node connects with its own credentials


def trouble_of(place: Shared, who: str) -> str | None:
    """What is wrong with a place as this node sees it, after the driver has written its file; None where nothing is."""
    try:
        if not place.sees(DRIVER):
            there = place.in_bucket or Path(place.address).is_dir()
            return "does not see what the driver writes there" if there else "has no such folder"
        place.write(who)
    except DistftError as error:
        return error.what
    except OSError as error:
        return f"may not read or write there: {reason_of(error)}"
    return None


def reason_of(error: OSError) -> str:
    """The system's own word for it, without the path that pyarrow puts before it."""
    return os.strerror(error.errno) if error.errno else str(error)
