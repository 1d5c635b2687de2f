"""The adapters that a path means: a file, a folder that is one adapter, or a tree of both."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from adapterops.errors import AdapterOpsError, UsageError
from adapterops.storage.folder import Folder, LocalFolder
from adapterops.storage.source import (
    CONFIG_NAME,
    FOLDER_INDEX,
    FOLDER_WEIGHTS,
    HUB,
    INDEX_SUFFIX,
    WEIGHTS_SUFFIXES,
    shards_beside,
)
from adapterops.storage.training_state import is_training_state
from adapterops.validation.subject import Place

_ENCODED = re.compile(rb'"gA[I-X][A-Za-z0-9+/]{200}')
"""Base64 of the first bytes of a pickle."""
_SMALLEST_TENSOR = 1000
_MAX_LOOK = 1 << 16
_MAX_DEPTH = 24
"""Folders within folders."""


@dataclass(frozen=True, slots=True)
class Listed(LocalFolder):
    """A folder of this disk that is listed once, for all the adapters that are found in it together."""

    held: list[list[str]] = field(default_factory=list, compare=False, repr=False)
    """The names, once they are known."""

    def names(self) -> list[str]:
        if not self.held:
            self.held.append(LocalFolder.names(self))
        return self.held[0]

    def folder(self, name: str) -> Listed:
        return Listed(os.path.join(self.path, name))

    def __reduce__(self) -> tuple[type[Listed], tuple[str, tuple[str, ...]]]:
        return Listed, (self.path, self.notes)


def discover(paths: Iterable[str]) -> list[Place]:
    """The adapters that the paths mean, in their order; what two of them mean stands once.

    Raises `UsageError` for a path that does not exist, and what asking the Hub raises.
    """
    found: dict[str, Place] = {}
    folders: dict[str, Listed] = {}
    for path in paths:
        for place in _places(path, folders):
            found.setdefault(place.path, place)
    return list(found.values())


def _places(path: str, folders: dict[str, Listed]) -> Iterator[Place]:
    if path.startswith(HUB):
        from adapterops.storage import hub

        repository, file = hub.locate(path, ranges=True)
        yield from [Place(repository, file)] if file else _of(repository)
    elif os.path.isdir(path):
        yield from _of(Listed(os.path.normpath(path)))
    elif os.path.lexists(path):
        parent, name = os.path.split(path)
        folder = folders.setdefault(parent, Listed(parent))
        yield Place(Listed(os.path.normpath(parent))) if _is_part(folder, name) else Place(folder, name)
    else:
        raise UsageError(f"{path}: no such file or folder")


def _is_part(folder: Folder, name: str) -> bool:
    """Whether a file is that of an adapter's folder: its config, or the weights that are taken of those beside the config."""
    if name == CONFIG_NAME:
        return True
    names = folder.names() if name in (*FOLDER_WEIGHTS, FOLDER_INDEX) else []
    taken = [own for own in (*FOLDER_WEIGHTS, FOLDER_INDEX) if own in names]
    return CONFIG_NAME in names and taken[:1] == [name]


def _of(folder: Folder) -> list[Place]:
    """The adapters below a folder; the folder itself, about which that is to be said, where there are none."""
    return list(_walk(folder, _MAX_DEPTH, set())) or [Place(folder)]


def _walk(folder: Folder, depth: int, seen: set[str]) -> Iterator[Place]:
    try:
        names = folder.names()
    except AdapterOpsError:
        yield Place(folder)
        return
    if isinstance(folder, LocalFolder):  # links may lead back
        real = os.path.realpath(folder.path)
        if real in seen:
            return
        seen.add(real)
    visible = [name for name in names if not name.startswith(".")]
    folders = {name for name in visible if folder.is_folder(name)}
    own = {FOLDER_INDEX, *FOLDER_WEIGHTS}
    skipped = own | folders | shards_beside(folder, visible)
    others = [
        name
        for name in visible
        if name not in skipped
        and (
            name.endswith(INDEX_SUFFIX)
            or (is_weights(name) and not is_training_state(name))
            or _holds_a_pickle(folder, name)
        )
    ]
    # A config without weights of its name is told of with the folder, unless it may be that of another file.
    if own & (set(visible) - folders) or (CONFIG_NAME in visible and not others):
        yield Place(folder)
    for name in others:
        yield Place(folder, name)
    for name in visible:
        if name in folders and depth:
            yield from _walk(folder.folder(name), depth - 1, seen)


def _holds_a_pickle(folder: Folder, name: str) -> bool:
    """Whether a JSON file of this disk has the text of a pickle in it: a soft prompt, as mkultra and KoboldAI write them."""
    if not name.endswith(".json") or not isinstance(folder, LocalFolder):
        return False
    path = folder.fetch(name)
    try:
        if not os.path.isfile(path) or os.path.getsize(path) < _SMALLEST_TENSOR:
            return False
        with open(path, "rb") as file:
            return _ENCODED.search(file.read(_MAX_LOOK)) is not None
    except OSError:
        return False


def is_weights(name: str) -> bool:
    """Whether a file's name is one that weights have."""
    return os.path.splitext(name)[1].lower() in WEIGHTS_SUFFIXES
