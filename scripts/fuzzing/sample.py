"""A small adapter in memory, and the containers it can be written in; none of it by adapterops' own writers."""

from __future__ import annotations

import io
import json
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import numpy as np

from adapterops.storage.dtypes import BITS
from adapterops.storage.tensor import TORCH_NAMES

Files = dict[str, bytes]
"""Path below the input's folder to contents."""


class Tensor(NamedTuple):
    """dtype (a name of `adapterops.storage.dtypes.BITS`), shape, and bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


@dataclass(frozen=True, slots=True)
class Sample:
    """An adapter: tensors, header strings, and the PEFT config that stands beside them, if any."""

    name: str
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None


def numbers(dtype: str, shape: tuple[int, ...], generator: np.random.Generator) -> Tensor:
    """A tensor of small numbers; dtype F32, F16 or BF16."""
    values = (generator.standard_normal(prod(shape)) * 0.1).astype("<f4")
    if dtype == "F16":
        return Tensor(dtype, shape, values.astype("<f2").tobytes())
    if dtype == "BF16":
        return Tensor(dtype, shape, (values.view("<u4") >> 16).astype("<u2").tobytes())
    return Tensor("F32", shape, values.tobytes())


def size_of(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor."""
    return prod(shape) * BITS.get(dtype, 8) // 8


def layout(sample: Sample) -> tuple[dict[str, Any], bytes]:
    """The JSON header of a safetensors file, and the bytes after it."""
    header: dict[str, Any] = {"__metadata__": dict(sample.metadata)} if sample.metadata else {}
    at = 0
    for key, tensor in sample.tensors.items():
        header[key] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [at, at + len(tensor.data)],
        }
        at += len(tensor.data)
    return header, b"".join(t.data for t in sample.tensors.values())


def safetensors_bytes(sample: Sample) -> bytes:
    """The sample as a safetensors file."""
    header, data = layout(sample)
    return with_header(json.dumps(header, separators=(",", ":")).encode("utf-8", "surrogatepass"), data)


def with_header(text: bytes, data: bytes) -> bytes:
    """A safetensors file with this header, whatever it says."""
    return len(text).to_bytes(8, "little") + text + data


def state_dict(sample: Sample) -> dict[str, Any]:
    """The tensors as torch's."""
    import torch

    out = {}
    for key, tensor in sample.tensors.items():
        name = TORCH_NAMES.get(tensor.dtype)
        if name is None or len(tensor.data) != size_of(tensor.dtype, tensor.shape):
            continue
        kind = getattr(torch, name)
        flat = torch.frombuffer(bytearray(tensor.data), dtype=kind) if tensor.data else torch.empty(0, dtype=kind)
        out[key] = flat.reshape(tensor.shape)
    return out


def pickle_bytes(value: object, zipped: bool = True) -> bytes:
    """What `torch.save` makes of a value, in today's container or in the one before it."""
    import torch

    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if not zipped:
            return _legacy(value)
        torch.save(value, buffer)
    return buffer.getvalue()


def _legacy(value: object) -> bytes:
    """The container before zip files: five pickles and the storages (torch `serialization.py`, `_legacy_save`).

    torch names storages by their addresses, which are others each time; here they are numbered.
    """
    import torch

    storages: dict[int, tuple[str, Any]] = {}

    class Pickler(pickle.Pickler):
        def persistent_id(self, item: Any) -> Any:
            if not isinstance(item, torch.TypedStorage):
                return None
            storage: Any = item
            untyped = storage.untyped()
            name = storages.setdefault(untyped._cdata, (str(len(storages)), storage))[0]
            kind = getattr(torch, storage._pickle_storage_type())
            return "storage", kind, name, str(untyped.device), len(storage), None

    buffer = io.BytesIO()
    sizes = {"short": 2, "int": 4, "long": 4}
    info = {"protocol_version": 1001, "little_endian": True, "type_sizes": sizes}
    for head in (0x1950A86A20F9469CFC6C, 1001, info):
        pickle.dump(head, buffer, 2)
    Pickler(buffer, 2).dump(value)
    pickle.dump([name for name, _ in storages.values()], buffer, 2)
    for _, item in storages.values():
        if item.untyped().device.type == "cpu":
            raw = torch.empty(0, dtype=torch.uint8).set_(item.untyped())
            buffer.write(len(item).to_bytes(8, "little") + raw.numpy().tobytes())
    return buffer.getvalue()


def npz_bytes(sample: Sample, compressed: bool = False) -> bytes:
    """The sample as a numpy archive; bfloat16 as two raw bytes."""
    buffer = io.BytesIO()
    method = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for key, tensor in sample.tensors.items():
            # A zip cannot name what UTF-8 cannot say.
            name = key.encode("utf-8", "replace").decode()
            archive.writestr(plain_entry(name + ".npy", method), npy_bytes(tensor))
    return buffer.getvalue()


def npy_bytes(tensor: Tensor, fortran: bool = False, version: int = 1) -> bytes:
    """One member of a numpy archive (the .npy format, https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html)."""
    kinds = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "BF16": "|V2", "I64": "<i8", "I32": "<i4", "U8": "|u1"}
    text = repr(
        {"descr": kinds.get(tensor.dtype, "|u1"), "fortran_order": fortran, "shape": tuple(tensor.shape)}
    ).encode()
    return npy_with(text, tensor.data, version)


def npy_with(text: bytes, data: bytes, version: int = 1) -> bytes:
    """A member with this header, whatever it says."""
    width = 2 if version == 1 else 4
    text += b" " * (-(len(text) + 7 + width + 1) % 64) + b"\n"
    return b"\x93NUMPY" + bytes([version, 0]) + len(text).to_bytes(width, "little") + text + data


def plain_entry(name: str, method: int = zipfile.ZIP_STORED) -> zipfile.ZipInfo:
    """An archive entry that says the same whenever it is made."""
    entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
    entry.compress_type = method
    return entry


def shards(sample: Sample, count: int) -> tuple[dict[str, Any], Files]:
    """The index of a sharded adapter and its shards, by file name."""
    keys = list(sample.tensors)
    stem = "adapter_model" if sample.config is not None else "model"
    files: Files = {}
    weight_map: dict[str, Any] = {}
    for number in range(count):
        name = f"{stem}-{number + 1:05d}-of-{count:05d}.safetensors"
        own = keys[number::count]
        files[name] = safetensors_bytes(Sample(name, {k: sample.tensors[k] for k in own}, sample.metadata))
        weight_map |= dict.fromkeys(own, name)
    total = sum(len(t.data) for t in sample.tensors.values())
    return {"metadata": {"total_size": total}, "weight_map": weight_map}, files


def read_safetensors(name: str, raw: bytes, config: Mapping[str, Any] | None = None) -> Sample:
    """The sample in a sound file."""
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    metadata = header.pop("__metadata__", None) or {}
    tensors = {
        key: Tensor(e["dtype"], tuple(e["shape"]), raw[start + e["data_offsets"][0] : start + e["data_offsets"][1]])
        for key, e in sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    }
    return Sample(name, tensors, metadata, config)


def read_pickle(name: str, raw: bytes, config: Mapping[str, Any] | None = None) -> Sample:
    """The sample in a sound file of `torch.save`."""
    import torch

    dtypes = {value: key for key, value in TORCH_NAMES.items()}
    loaded = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    tensors = {
        key: Tensor(
            dtypes[str(value.dtype).removeprefix("torch.")],
            tuple(value.shape),
            value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(),
        )
        for key, value in loaded.items()
    }
    return Sample(name, tensors, {}, config)
