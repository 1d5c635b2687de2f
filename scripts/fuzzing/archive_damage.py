"""Damage to zip archives (`.bin`, `.npz`) and to sharded adapters: what their tables of contents say."""

from __future__ import annotations

import io
import struct
import warnings
import zipfile
from random import Random
from typing import Any

from fuzzing import byte_damage, json_damage
from fuzzing.sample import Files, Sample, Tensor, npy_bytes, npy_with, npz_bytes, plain_entry, shards

ZIP = (
    "rename",
    "drop",
    "double",
    "deflate",
    "bomb",
    "local header",
    "central directory",
    "end record",
    "comment",
    "empty",
    "encrypted",
    "nested",
)
NPY = ("member header", "member bytes", "fortran", "version", "objects", "big-endian", "archive", "plain", "deflated")
_DESCRS = (
    "<f4",
    ">f4",
    "|O",
    "|O8",
    "<f2",
    "|V2",
    "<U4",
    "|S3",
    "<M8[s]",
    "<c8",
    "|b1",
    "[('a', '<f4')]",
    "<f16",
    "",
    "f4",
    None,
    4,
    "<f4" * 99,
)
_NPY_SHAPES = (
    "()",
    "(0,)",
    "(-1,)",
    "(2, 2",
    "(1e3,)",
    "(True,)",
    "('a',)",
    "[2, 2]",
    "(9223372036854775808,)",
    "(99999999999, 99999999999)",
    "(1,) * 9",
    "None",
    "((((",
    "(" * 5000,
)
_INDEX_NAMES = (
    "../a.safetensors",
    "/etc/passwd",
    "",
    ".",
    "adapter_model.safetensors",
    "missing.safetensors",
    "a\0b",
    "x" * 5000,
    "..",
    "\ud800",
    "sub/../a",
)


def zip_damage(raw: bytes, rng: Random) -> tuple[str, bytes]:
    """(what was done, a file), for a sound archive."""
    kind = rng.choice(ZIP)
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        entries = [(name, archive.read(name)) for name in archive.namelist()]
    at = rng.randrange(len(entries))
    name, data = entries[at]
    method = zipfile.ZIP_STORED
    match kind:
        case "rename":
            entries[at] = (
                rng.choice(
                    (
                        "../x",
                        "/x",
                        "",
                        "a/b/c",
                        name.upper(),
                        name + "\0x",
                        "archive/code/x",
                        "constants.pkl",
                        "é",
                        name.replace("/", "\\"),
                    )
                ),
                data,
            )
        case "drop":
            del entries[at]
        case "double":
            entries.insert(rng.randrange(len(entries)), (name, rng.choice((data, b"", data[::-1]))))
        case "deflate":
            method = rng.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
        case "bomb":
            entries[at], method = (name, data + bytes(40_000_000)), zipfile.ZIP_DEFLATED
        case "empty":
            entries = rng.choice(([], [(name, b"")], [(n, b"") for n, _ in entries]))
        case "nested":
            entries[at] = (name, raw)
        case "local header" | "central directory" | "end record":
            return kind, _field(raw, kind, rng)
        case "encrypted":
            return kind, _encrypted(raw)
        case _:
            return kind, raw[:-2] + struct.pack("<H", 9) + b"a comment"[: rng.choice((0, 5, 9))]
    return kind, _zip(entries, method)


def _zip(entries: list[tuple[str, bytes]], method: int) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a name that stands there twice
        with zipfile.ZipFile(buffer, "w", method, compresslevel=1) as archive:
            for name, data in entries:
                archive.writestr(plain_entry(name, method), data)
    return buffer.getvalue()


def _field(raw: bytes, kind: str, rng: Random) -> bytes:
    """One field of a record of the zip format (https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT) set anew."""
    records: dict[str, tuple[bytes, tuple[tuple[int, int], ...]]] = {
        "local header": (b"PK\x03\x04", ((4, 2), (6, 2), (8, 2), (14, 4), (18, 4), (22, 4), (26, 2), (28, 2))),
        "central directory": (
            b"PK\x01\x02",
            ((6, 2), (8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (30, 2), (32, 2), (42, 4)),
        ),
        "end record": (b"PK\x05\x06", ((4, 2), (6, 2), (8, 2), (10, 2), (12, 4), (16, 4), (20, 2))),
    }
    mark, fields = records[kind]
    places = []
    at = raw.find(mark)
    while at >= 0:
        places.append(at)
        at = raw.find(mark, at + 4)
    if not places:
        return raw
    offset, width = rng.choice(fields)
    start = rng.choice(places) + offset
    old = int.from_bytes(raw[start : start + width], "little")
    value: int = rng.choice(
        (0, 1, 8, 99, old + 1, max(0, old - 1), old * 2, 2 ** (8 * width) - 1, 2 ** (8 * width - 1))
    ) % 2 ** (8 * width)
    return raw[:start] + value.to_bytes(width, "little") + raw[start + width :]


def _encrypted(raw: bytes) -> bytes:
    data = bytearray(raw)
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = raw.find(mark)
        while at >= 0:
            data[at + offset] |= 1
            at = raw.find(mark, at + 4)
    return bytes(data)


def npz_damage(sample: Sample, rng: Random) -> tuple[str, bytes]:
    """(what was done, a numpy archive)."""
    kind = rng.choice(NPY)
    members = {key: npy_bytes(tensor) for key, tensor in sample.tensors.items()}
    key = rng.choice(list(members)) if members else "a"
    tensor = sample.tensors.get(key, Tensor("F32", (), bytes(4)))
    names = [f"{name}.npy" for name in members]
    match kind:
        case "member header":
            descr = rng.choice(_DESCRS) if rng.random() < 0.5 else "<f2"
            shape = rng.choice(_NPY_SHAPES) if rng.random() < 0.6 else repr(tensor.shape)
            order = rng.choice(("False", "True", "0", "None", "'x'", "__import__('os').mkdir('executed')"))
            text = f"{{'descr': {descr!r}, 'fortran_order': {order}, 'shape': {shape}, }}"
            text = rng.choice(
                (
                    text,
                    text,
                    text.replace("'shape'", "'extra'"),
                    text[:-1],
                    text * 2,
                    text + " " * 20_000,
                    "[" * 3000,
                    "\0" + text,
                )
            )
            members[key] = npy_with(text.encode("latin-1", "replace"), tensor.data, rng.choice((1, 1, 2, 3)))
        case "member bytes":
            members[key] = byte_damage.damaged(members.get(key, b"x"), rng, members.get(key, b"x"))[1]
        case "fortran":
            members = {k: npy_bytes(t, fortran=True) for k, t in sample.tensors.items()}
        case "version":
            members[key] = npy_bytes(tensor, version=rng.choice((0, 2, 3, 4, 255)))
        case "objects":
            payload = b"\x80\x02cposix\nmkdir\n" + b"X\x08\0\0\0executed\x85R."
            members[key] = npy_with(b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", payload)
        case "big-endian":
            text = f"{{'descr': '>f2', 'fortran_order': False, 'shape': {tensor.shape!r}, }}"
            members[key] = npy_with(text.encode(), tensor.data)
        case "archive":
            what, damaged = (
                zip_damage(npz_bytes(sample, rng.random() < 0.5), rng) if members else ("empty", _zip([], 0))
            )
            return f"archive, {what}", damaged
        case "plain":
            return kind, rng.choice((npz_bytes(sample), npy_bytes(tensor)))
        case _:
            names = [name + rng.choice(("", "", ".npy", "x")) for name in members]
    method = zipfile.ZIP_DEFLATED if kind == "deflated" or rng.random() < 0.3 else zipfile.ZIP_STORED
    return kind, _zip(list(zip(names or ["a.npy"], members.values(), strict=False)), method)


def shard_damage(sample: Sample, rng: Random) -> tuple[str, str, Files]:
    """(what was done, the path to open, files): an index that does not say what its shards hold."""
    index, files = shards(sample, rng.choice((1, 2, 3)))
    stem = "adapter_model" if sample.config is not None else "model"
    weight_map: dict[str, Any] = index["weight_map"]
    kind = rng.choice(("index", "name", "missing", "moved", "unlisted", "shard bytes", "none", "text"))
    name = rng.choice(list(files))
    key = rng.choice(list(weight_map)) if weight_map else "a"
    raw: bytes | None = None
    match kind:
        case "index":
            for _ in range(rng.choice((1, 1, 3))):
                index = json_damage.damaged(index, rng)
                if not isinstance(index, dict):
                    break
        case "name":
            weight_map[key] = rng.choice(_INDEX_NAMES)
        case "missing":
            del files[name]
        case "moved":
            weight_map[key] = rng.choice(list(files))
        case "unlisted":
            weight_map.pop(key, None)
        case "shard bytes":
            files[name] = byte_damage.damaged(files[name], rng, files[name])[1]
        case "text":
            raw = byte_damage.damaged(json_damage.dump(index), rng, files[name])[1]
    index_name = f"{stem}.safetensors.index.json"
    files[index_name] = json_damage.dump(index) if raw is None else raw
    path = rng.choice(("", "", index_name, index_name, name))
    return kind, path, files
