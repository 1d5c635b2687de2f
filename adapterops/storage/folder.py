"""A folder of files, on this disk or on the Hub: the same rules choose an adapter in both."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from adapterops.errors import AdapterOpsError, UnreadableFile

if TYPE_CHECKING:
    from adapterops.storage.ranges import RangeSource


NOT_FETCHED = "not-fetched"
"""The word (`AdapterOpsError.fault`) for what a network, or the server behind it, kept from being read."""


class Folder(Protocol):
    """Names, and their files once they are asked for."""

    @property
    def path(self) -> str:
        """How messages name the folder."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know of where its files came from."""

    def names(self) -> list[str]:
        """What the folder holds, sorted.  Raises `UnreadableFile` where that cannot be told."""

    def is_folder(self, name: str) -> bool:
        """Whether `name` is a folder in it."""

    def fetch(self, name: str) -> str:
        """The file's path on this disk; it is downloaded where it has to be."""

    def folder(self, name: str) -> Folder:
        """The folder `name` in it."""

    def ranges(self, name: str) -> RangeSource | None:
        """The file's bytes, to be read in parts from elsewhere; None where `fetch` is the way to them."""


@dataclass(frozen=True, slots=True)
class LocalFolder:
    """A folder of this disk."""

    path: str
    notes: tuple[str, ...] = ()

    def names(self) -> list[str]:
        try:
            return sorted(os.listdir(self.path or os.curdir))
        except OSError as error:
            raise UnreadableFile(f"{self.path}: the folder cannot be listed: {error.strerror}") from error

    def is_folder(self, name: str) -> bool:
        return os.path.isdir(os.path.join(self.path, name))

    def fetch(self, name: str) -> str:
        return os.path.join(self.path, name)

    def folder(self, name: str) -> LocalFolder:
        return LocalFolder(os.path.join(self.path, name))

    def ranges(self, name: str) -> None:
        return None


@contextlib.contextmanager
def named(folder: Folder, name: str) -> Iterator[str]:
    """The path on this disk of a file; errors that name it name the folder's own name for it first."""
    path, shown = folder.fetch(name), os.path.join(folder.path, name)
    try:
        yield path
    except AdapterOpsError as error:
        if path == shown or path not in str(error):
            raise
        # huggingface_hub takes what is in its cache for sound.
        anew = f" (cached as {path}; remove that to download it anew)" if isinstance(error, UnreadableFile) else ""
        raise type(error)(f"{str(error).replace(path, shown)}{anew}", fault=error.fault, keys=error.keys) from error
