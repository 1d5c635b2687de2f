"""What a path holds: tensors, header metadata, and the JSON config that stands beside them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from adapterops.errors import NotAnAdapter, UnreadableFile, UnsupportedFormat
from adapterops.storage import safetensors
from adapterops.storage.regular import open_regular
from adapterops.storage.tensor import LazyTensor

CONFIG_NAME = "adapter_config.json"
FOLDER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_MAX_CONFIG = 10_000_000
"""Bytes.  A config that lists a pattern for each of 10,000 modules has two."""
_WEIGHTS = (".safetensors", *_PICKLES)


@dataclass(frozen=True, slots=True)
class Source:
    """An opened input.  `parts` holds one source a subfolder where a folder keeps its components apart."""

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


def open_source(path: str | os.PathLike[str]) -> Source:
    """Open a file or folder.  Reads headers only (a pickle is memory-mapped).

    Raises `UnreadableFile` and its kin for what cannot be read, `NotAnAdapter` for a folder without weights.
    """
    path = os.fspath(path)
    if path.startswith("hf://"):
        raise UnsupportedFormat(f"{path}: hf:// sources are not supported yet; download the file and name it")
    if os.path.isdir(path):
        return _open_folder(path)
    if not os.path.lexists(path):
        raise UnreadableFile(f"{path}: no such file or folder")
    tensors, metadata = _read_weights(path)
    config_path = os.path.join(os.path.dirname(path), CONFIG_NAME)
    # peft writes the two side by side under fixed names; any other file does not own the config next to it.
    if os.path.basename(path) in FOLDER_WEIGHTS and os.path.isfile(config_path):
        return Source(path, tensors, metadata, read_json(config_path), config_path)
    return Source(path, tensors, metadata)


def _read_weights(path: str) -> tuple[dict[str, LazyTensor], dict[str, str]]:
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
        raise UnsupportedFormat(f"{path}: is a numpy archive (older MLX adapters); this version does not convert MLX")
    if suffix == ".json" and head.lstrip()[:1] in (b"{", b"["):
        raise NotAnAdapter(f"{path}: is a JSON file, not weights; name the weights or their folder")
    if suffix in _PICKLES or (suffix != ".safetensors" and (head[:2] == b"PK" or head[:1] == b"\x80")):
        from adapterops.storage import pickle  # with it come zip archives, and torch when it reads

        return pickle.read(path), {}
    return safetensors.read_header(path)


def _open_folder(path: str) -> Source:
    names = _listing(path)
    config_path = os.path.join(path, CONFIG_NAME)
    config = read_json(config_path) if CONFIG_NAME in names else None
    present = [name for name in FOLDER_WEIGHTS if name in names]
    notes: tuple[str, ...] = ()
    if len(present) == 2:
        notes = (f"{present[0]} is read and {present[1]} is not, as peft does",)
    if not present:
        # Names with a dot in front are other programs' (macOS keeps `._NAME` beside NAME on foreign disks).
        present = [n for n in names if os.path.splitext(n)[1].lower() in _WEIGHTS and not n.startswith(".")]
        if len(present) > 1:
            raise NotAnAdapter(f"{path}: holds several weight files ({', '.join(present)}); name one of them")
    if present:
        tensors, metadata = _read_weights(os.path.join(path, present[0]))
        return Source(path, tensors, metadata, config, config_path if config is not None else "", notes=notes)
    parts = {
        name: replace(_open_folder(os.path.join(path, name)), component=name)
        for name in names
        if not name.startswith(".")
        and os.path.isdir(os.path.join(path, name))
        and _holds_weights(os.path.join(path, name))
    }
    if parts:
        return Source(path, parts=parts)
    what = f"has {CONFIG_NAME} but no weights ({' or '.join(FOLDER_WEIGHTS)})" if config else "holds no weights"
    raise NotAnAdapter(f"{path}: {what}")


def _holds_weights(path: str) -> bool:
    return any(name in FOLDER_WEIGHTS for name in _listing(path))


def _listing(path: str) -> list[str]:
    try:
        return sorted(os.listdir(path))
    except OSError as error:
        raise UnreadableFile(f"{path}: the folder cannot be listed: {error.strerror}") from error


def read_json(path: str) -> dict[str, Any]:
    """A JSON object from `path`.  Raises `UnreadableFile` where it is not one, or names a field twice."""
    descriptor, (_, _, size, _) = open_regular(path)
    with open(descriptor, "rb") as file:
        if size > _MAX_CONFIG:
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
