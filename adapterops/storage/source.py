"""What a path holds: tensors, header metadata, and the JSON config that stands beside them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from adapterops.errors import AdapterOpsError, NotAnAdapter, UnreadableFile, UnsupportedFormat
from adapterops.storage import safetensors
from adapterops.storage.folder import Folder, LocalFolder, named
from adapterops.storage.regular import open_regular
from adapterops.storage.tensor import LazyTensor

CONFIG_NAME = "adapter_config.json"
FOLDER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
HUB = "hf://"
INDEX_SUFFIX = ".safetensors.index.json"
FOLDER_INDEX = "adapter_model" + INDEX_SUFFIX
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_MAX_CONFIG = 10_000_000
"""Bytes.  A config that lists a pattern for each of 10,000 modules has two."""
WEIGHTS_SUFFIXES = (".safetensors", *_PICKLES, ".npz")


@dataclass(frozen=True, slots=True)
class Source:
    """An opened input.  `parts` holds one source a subfolder where a folder keeps its components apart.

    `path` is what the user named, on this disk or on the Hub; the tensors' own sources name the files that are read.
    """

    path: str
    tensors: Mapping[str, LazyTensor] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None
    config_path: str = ""
    parts: Mapping[str, Source] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    component: str = ""
    """The subfolder's name, for a part."""

    @property
    def size(self) -> int:
        """Bytes of tensors, parts included."""
        return sum(t.nbytes for t in self.tensors.values()) + sum(p.size for p in self.parts.values())

    @property
    def key_count(self) -> int:
        """The number of tensors, parts included."""
        return len(self.tensors) + sum(p.key_count for p in self.parts.values())


class _Parts(Mapping[str, Source]):
    """The sources of subfolders, each opened (and downloaded) when it is asked for, not when it is counted."""

    def __init__(self, folder: Folder, names: list[str]) -> None:
        self._folder, self._names = folder, names
        self._opened: dict[str, Source] = {}

    def __getitem__(self, name: str) -> Source:
        if name not in self._opened:
            if name not in self._names:
                raise KeyError(name)
            self._opened[name] = replace(_open_folder(self._folder.folder(name)), component=name)
        return self._opened[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class _Weights(NamedTuple):
    """What one file, or one set of shards, holds."""

    tensors: Mapping[str, LazyTensor]
    metadata: Mapping[str, str]
    notes: tuple[str, ...] = ()


def open_source(path: str | os.PathLike[str]) -> Source:
    """Open a file, a folder, or what stands at `hf://owner/repo[@revision][/path]`.

    Reads headers only (a pickle is memory-mapped); from the Hub the chosen files are downloaded whole.

    Raises `UnreadableFile` and its kin for what cannot be read, `NotAnAdapter` for a folder without weights,
    `UsageError` for an hf:// name that is none.
    """
    path = os.fspath(path)
    if path.startswith(HUB):
        from adapterops.storage import hub

        place, file = hub.locate(path)
        if file:
            return _open_file(place, file)
        try:
            return _open_folder(place)
        except NotAnAdapter as error:
            raise NotAnAdapter(f"{error}{place.candidates()}") from error
    if os.path.isdir(path):
        return _open_folder(LocalFolder(path))
    if not os.path.lexists(path):
        lost = f"; to name the Hub give a string, a Path turns {HUB} into hf:/" if path.startswith("hf:/") else ""
        raise UnreadableFile(f"{path}: no such file or folder{lost}")
    return _open_file(LocalFolder(os.path.dirname(path)), os.path.basename(path))


def open_in(folder: Folder, name: str = "", tell: Callable[[AdapterOpsError], None] | None = None) -> Source:
    """Open a file of a folder, or the one adapter that the folder is.

    With `tell`, what is wrong with the config beside the weights is told to it, and the weights are opened without one.

    Raises what `open_source` raises.
    """
    return _open_file(folder, name, tell) if name else _open_folder(folder, tell)


def shards_beside(folder: Folder, names: Iterable[str]) -> set[str]:
    """Those of a folder's names that are shards of an index beside them."""
    indexes = [n for n in names if n.endswith(INDEX_SUFFIX)]
    shards: set[str] = set()
    for name in indexes:
        from adapterops.storage.sharded import files_of

        try:
            shards.update(files_of(os.path.join(folder.path, name), _read_index_json(folder, name)).values())
        except AdapterOpsError:
            continue  # told of when the index itself is opened
    return shards


def stem(path: str) -> str:
    """The name of a source without its weights' suffix: what a file made from it is called after."""
    if path.startswith(HUB):
        from adapterops.storage import hub

        name = hub.parse(path)
        last = os.path.basename(name.path) or name.repo.partition("/")[2]
    else:
        path = os.path.abspath(path)
        last = os.path.basename(path)
        if os.path.isdir(path):
            return last
        if not last.endswith(INDEX_SUFFIX):
            return os.path.splitext(last)[0]
    for suffix in (INDEX_SUFFIX, *WEIGHTS_SUFFIXES):
        if last.lower().endswith(suffix) and last.lower() != suffix:
            return last[: -len(suffix)]
    return last


def _open_file(folder: Folder, name: str, tell: Callable[[AdapterOpsError], None] | None = None) -> Source:
    path = os.path.join(folder.path, name)
    if name.endswith(INDEX_SUFFIX):
        weights = _read_index(folder, name)
    else:
        weights = _read_file(folder, name)
        if name.endswith(".safetensors"):
            weights = weights._replace(notes=(*weights.notes, *_alone(folder, name)))
    source = Source(path, weights.tensors, weights.metadata, notes=(*folder.notes, *weights.notes))
    # peft writes the two side by side under fixed names; any other file does not own the config next to it.
    if name in (*FOLDER_WEIGHTS, FOLDER_INDEX) and _has_file(folder, CONFIG_NAME):
        config = _read_config(folder, tell)
        config_path = os.path.join(folder.path, CONFIG_NAME) if config is not None else ""
        return replace(source, config=config, config_path=config_path)
    return source


def _has_file(folder: Folder, name: str) -> bool:
    if isinstance(folder, LocalFolder):  # which may be entered though it cannot be listed
        return os.path.isfile(folder.fetch(name))
    return name in folder.names() and not folder.is_folder(name)


def _alone(folder: Folder, name: str) -> tuple[str, ...]:
    """Notes on a file that was named by itself.  Raises `UnreadableFile` where an index says it is a part."""
    from adapterops.storage import sharded

    index = _covering(folder, name)
    if index is not None:
        raise UnreadableFile(
            f"{os.path.join(folder.path, name)}: is one shard of several, as {index} beside it says; name that index, "
            "or the folder"
        )
    return sharded.number_note(name)


def _covering(folder: Folder, name: str) -> str | None:
    from adapterops.storage import sharded

    return sharded.covering(folder, name, lambda index: _read_index_json(folder, index))


def _read_config(folder: Folder, tell: Callable[[AdapterOpsError], None] | None = None) -> dict[str, Any] | None:
    try:
        with named(folder, CONFIG_NAME) as path:
            return read_json(path)
    except AdapterOpsError as error:
        if tell is None:
            raise
        error.fault = "config-unreadable"
        tell(error)
        return None


def _read_index_json(folder: Folder, name: str) -> dict[str, Any]:
    from adapterops.storage.sharded import MAX_INDEX

    with named(folder, name) as path:
        return read_json(path, MAX_INDEX)


def _read_index(folder: Folder, name: str) -> _Weights:
    from adapterops.storage import sharded

    def shard(name: str) -> tuple[Mapping[str, LazyTensor], Mapping[str, str]]:
        return _read_file(folder, name)[:2]

    return _Weights(*sharded.read(folder, name, _read_index_json(folder, name), shard))


def _read_file(folder: Folder, name: str) -> _Weights:
    with named(folder, name) as path:
        return _read_weights(path)


def _read_weights(path: str) -> _Weights:
    suffix = os.path.splitext(path)[1].lower()
    descriptor, _ = open_regular(path)
    try:
        with open(descriptor, "rb", buffering=0) as file:
            head = file.read(16)
    except OSError as error:
        raise UnreadableFile(f"{path}: {error.strerror}") from error
    if not head:
        raise UnreadableFile(f"{path}: the file is empty; download it again")
    if head.startswith(b"version https:/"):
        raise UnreadableFile(f"{path}: is a Git LFS pointer, not the weights; run `git lfs pull`")
    if head.lstrip()[:5].lower() in (b"<!doc", b"<html", b"<?xml"):
        raise UnreadableFile(f"{path}: is a web page (a log-in page or an error?); download the file again")
    if head.startswith(b"GGUF"):
        raise UnsupportedFormat(f"{path}: is a GGUF file; this version does not convert GGUF adapters")
    if suffix == ".npz":
        from adapterops.storage import npz

        return _Weights(*npz.read(path))
    if suffix == ".json" and head.lstrip()[:1] in (b"{", b"["):
        raise NotAnAdapter(f"{path}: is a JSON file, not weights; name the weights or their folder")
    if suffix in _PICKLES or (suffix != ".safetensors" and (head[:2] == b"PK" or head[:1] == b"\x80")):
        from adapterops.storage import pickle  # with it come zip archives, and torch when it reads

        return _Weights(pickle.read(path), {})
    return _Weights(*safetensors.read_header(path))


def _open_folder(folder: Folder, tell: Callable[[AdapterOpsError], None] | None = None) -> Source:
    names = folder.names()
    # Names with a dot in front are other programs' (macOS keeps `._NAME` beside NAME on foreign disks).
    visible = [n for n in names if not n.startswith(".")]
    chosen, notes = _choose(folder, names, visible)
    if chosen:
        config = _read_config(folder, tell) if CONFIG_NAME in names else None
        config_path = os.path.join(folder.path, CONFIG_NAME) if config is not None else ""
        weights = _read_index(folder, chosen) if chosen.endswith(INDEX_SUFFIX) else _read_file(folder, chosen)
        notes = (*folder.notes, *notes, *weights.notes)
        return Source(folder.path, weights.tensors, weights.metadata, config, config_path, notes=notes)
    parts = [n for n in visible if folder.is_folder(n) and _holds_weights(folder.folder(n))]
    if parts:
        return Source(folder.path, parts=_Parts(folder, parts))
    lone = CONFIG_NAME in names
    what = f"has {CONFIG_NAME} but no weights ({' or '.join(FOLDER_WEIGHTS)})" if lone else "holds no weights"
    raise NotAnAdapter(f"{folder.path}: {what}")


def _choose(folder: Folder, names: list[str], visible: list[str]) -> tuple[str, tuple[str, ...]]:
    """The one file or index of a folder that is its adapter ("" where there is none), and notes."""
    present = [name for name in (*FOLDER_WEIGHTS, FOLDER_INDEX) if name in names]
    if len(present) > 1:
        if FOLDER_INDEX in present and _covering(folder, present[0]) == FOLDER_INDEX:
            return FOLDER_INDEX, ()
        return present[0], tuple(f"{present[0]} is read and {name} is not, as peft does" for name in present[1:])
    if present:
        return present[0], ()
    indexes = [n for n in visible if n.endswith(INDEX_SUFFIX)]
    shards: set[str] = set()
    if indexes:
        from adapterops.storage.sharded import files_of

        for name in indexes:
            shards.update(files_of(os.path.join(folder.path, name), _read_index_json(folder, name)).values())
    weights = [n for n in visible if os.path.splitext(n)[1].lower() in WEIGHTS_SUFFIXES and n not in shards] + indexes
    if len(weights) > 1:
        raise NotAnAdapter(f"{folder.path}: holds several weight files ({', '.join(weights)}); name one of them")
    return (weights[0] if weights else ""), ()


def _holds_weights(folder: Folder) -> bool:
    names = folder.names()
    return any(name in names for name in (*FOLDER_WEIGHTS, FOLDER_INDEX))


def read_json(path: str, limit: int = _MAX_CONFIG) -> dict[str, Any]:
    """A JSON object from `path`.  Raises `UnreadableFile` where it is not one, names a field twice, or is too long."""
    descriptor, (_, _, size, _) = open_regular(path)
    with open(descriptor, "rb") as file:
        if size > limit:
            raise UnreadableFile(f"{path}: {size} bytes are too many for a config; is it one?")
        try:
            text = file.read()
        except OSError as error:
            raise UnreadableFile(f"{path}: {error.strerror}") from error
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=safetensors.no_duplicates)
        # What was read must be writable again; JSON can spell half a character, no file can hold it.
        json.dumps(value, ensure_ascii=False).encode()
    except safetensors.Duplicate as error:
        raise UnreadableFile(f"{path}: names the field {error.args[0][:200]!r} twice; remove one") from error
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise UnreadableFile(f"{path}: is not JSON: {reason[:200]}") from error
    if not isinstance(value, dict):
        raise UnreadableFile(f"{path}: must be a JSON object, not a {type(value).__name__}")
    return value
