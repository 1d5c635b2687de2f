"""`.bin` and `.pt` files: read by `torch.load(weights_only=True)` or not at all."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from adapterops.errors import NotAnAdapter, UnreadableFile, UnsafePickle
from adapterops.storage.tensor import TORCH_NAMES, LazyTensor

if TYPE_CHECKING:
    import torch

_DTYPES = {name: dtype for dtype, name in TORCH_NAMES.items()}
_MAX_RATIO = 64
"""A torch zip stores its tensors uncompressed; an entry that expands more than this is a bomb."""


@dataclass(slots=True)
class TensorSource:
    """The bytes of one tensor that torch holds (usually a memory map of the file)."""

    path: str
    tensor: torch.Tensor
    _bytes: Any = field(default=None, repr=False)

    def readinto(self, start: int, buffer: memoryview) -> None:
        if self._bytes is None:
            import torch

            flat = self.tensor.contiguous().reshape(-1).view(torch.uint8)
            self._bytes = memoryview(flat.numpy())
        buffer[:] = self._bytes[start : start + len(buffer)]


def read(path: str) -> dict[str, LazyTensor]:
    """The tensors of a pickled state dict.

    Raises `UnsafePickle` where the file holds more than tensors, `UnreadableFile` where it is damaged, and
    `NotAnAdapter` where it is sound but is not a mapping from names to tensors.
    """
    import pickle

    import torch

    _refuse_bombs(path)
    try:
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else "not a pickle of tensors"
        if "weights_only" in str(error).lower() or "unsupported" in str(error).lower():
            raise UnsafePickle(
                f"{path}: refused: it holds more than tensors, and loading it could run code. "
                f"Save the plain state dict, best as .safetensors. (torch: {first[:160]})"
            ) from error
        raise UnreadableFile(f"{path}: not a file that torch.load can read: {first[:160]}") from error
    except OSError as error:
        raise UnreadableFile(f"{path}: {error.strerror or error}") from error
    except (EOFError, RuntimeError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        first = (str(error).strip().splitlines() or ["damaged"])[0]
        raise UnreadableFile(f"{path}: not a file that torch.load can read: {first[:160]}") from error
    return _flatten(path, loaded)


def _refuse_bombs(path: str) -> None:
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if info.file_size > _MAX_RATIO * max(info.compress_size, 1024):
                    raise UnreadableFile(
                        f"{path}: entry {info.filename!r} expands from {info.compress_size} to {info.file_size} bytes; "
                        "no torch file does that"
                    )
    except (OSError, zipfile.BadZipFile) as error:
        raise UnreadableFile(f"{path}: {error}") from error


def _flatten(path: str, loaded: object) -> dict[str, LazyTensor]:
    import torch

    if isinstance(loaded, Mapping) and set(loaded) == {"state_dict"} and isinstance(loaded["state_dict"], Mapping):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, Mapping):
        raise NotAnAdapter(
            f"{path}: holds a bare {type(loaded).__name__}, not a state dict (names to tensors): "
            "perhaps a soft prompt or an embedding"
        )
    tensors: dict[str, LazyTensor] = {}
    for key, value in loaded.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise NotAnAdapter(
                f"{path}: entry {str(key)[:80]!r} is a {type(value).__name__}, not a tensor: "
                "a training checkpoint or optimizer state rather than an adapter's state dict"
            )
        name = _DTYPES.get(str(value.dtype).removeprefix("torch."))
        if name is None or value.layout != torch.strided:
            raise UnreadableFile(f"{path}: tensor {key!r} has dtype {value.dtype}, layout {value.layout}: cannot be used")
        tensors[key] = LazyTensor(key, name, tuple(value.shape), TensorSource(path, value), 0)
    return tensors
