"""Damage to `.bin` files: pickles that are cut, rewritten opcode by opcode, or written to run code.

The payload of the hostile ones would make the file `EXECUTED` in the current folder; nothing else.
"""

from __future__ import annotations

import contextlib
import io
import pickletools
import struct
import zipfile
from random import Random
from typing import Any

from fuzzing import byte_damage
from fuzzing.sample import Sample, pickle_bytes, plain_entry, state_dict

EXECUTED = "executed"
"""The file that appears where a payload ran."""
KINDS = ("opcodes", "pickle bytes", "code", "odd object", "rebuild", "legacy", "wrapped")
_CALLS: tuple[tuple[str, str, tuple[Any, ...]], ...] = (
    ("os", "mkdir", (EXECUTED,)),
    ("posix", "mkdir", (EXECUTED,)),
    ("os", "system", (f"touch {EXECUTED}",)),
    ("posix", "system", (f"touch {EXECUTED}",)),
    ("subprocess", "check_call", (["touch", EXECUTED],)),
    ("builtins", "open", (EXECUTED, "w")),
    ("io", "open", (EXECUTED, "w")),
    ("__builtin__", "eval", (f"open('{EXECUTED}', 'w')",)),
    ("builtins", "exec", (f"open('{EXECUTED}', 'w')",)),
    ("torch", "save", ([1], EXECUTED)),
    ("torch.serialization", "load", (EXECUTED,)),
    ("numpy", "memmap", (EXECUTED, "uint8", "w+", 0, [8])),
    ("torch.storage", "UntypedStorage.from_file", (EXECUTED, True, 8)),
    ("torch", "UntypedStorage.from_file", (EXECUTED, True, 8)),
    ("torch", "FloatStorage.from_file", (EXECUTED, True, 8)),
    ("pathlib", "Path.touch", (EXECUTED,)),
    ("functools", "partial", ("print",)),
    ("_codecs", "encode", ("a" * 9, "hex")),
)


def opcode(value: Any) -> bytes:
    """The opcodes that push a plain value (protocol 2)."""
    if value is None:
        return b"N"
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, int):
        if -(2**31) <= value < 2**31:
            return b"J" + struct.pack("<i", value)
        raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        return b"\x8a" + bytes([len(raw)]) + raw
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, str):
        raw = value.encode("utf-8", "surrogatepass")
        return b"X" + struct.pack("<I", len(raw)) + raw
    if isinstance(value, tuple):
        return b"(" + b"".join(map(opcode, value)) + b"t"
    if isinstance(value, list):
        return b"](" + b"".join(map(opcode, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(opcode(k) + opcode(v) for k, v in value.items()) + b"u"
    assert isinstance(value, bytes)
    return value  # opcodes already


def call(module: str, name: str, arguments: tuple[Any, ...], rng: Random) -> bytes:
    """Opcodes that call `module.name` in one of the ways that a pickle has."""
    named = f"c{module}\n{name}\n".encode()
    match rng.randrange(6):
        case 0:
            return b"(" + b"".join(map(opcode, arguments)) + f"i{module}\n{name}\n".encode()
        case 1:
            return b"(" + named + b"".join(map(opcode, arguments)) + b"o"
        case 2:
            return named + opcode(arguments) + b"\x81"
        case 3:
            return opcode(module) + opcode(name) + b"\x93" + opcode(arguments) + b"R"
        case 4:
            return named + opcode(arguments) + b"R" + opcode({"a": 1}) + b"b"
        case _:
            return named + opcode(arguments) + b"R"


def zipped(pickle: bytes, storages: dict[str, bytes] | None = None, folder: str = "archive") -> bytes:
    """A file of `torch.save` around a pickle."""
    entries = {"data.pkl": pickle, "byteorder": b"little", "version": b"3\n"}
    entries |= {f"data/{name}": data for name, data in (storages or {"0": bytes(64)}).items()}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, data in entries.items():
            archive.writestr(plain_entry(f"{folder}/{name}"), data)
    return buffer.getvalue()


def damaged(sample: Sample, rng: Random, other: bytes) -> tuple[str, bytes]:
    """(what was done, a file)."""
    kind = rng.choice(KINDS)
    match kind:
        case "code":
            return kind, _code(rng)
        case "rebuild":
            return kind, _rebuilt(rng)
        case "odd object":
            return kind, pickle_bytes(_odd(rng, sample), rng.random() < 0.8)
        case "legacy":
            return kind, byte_damage.damaged(pickle_bytes(state_dict(sample), False), rng, other)[1]
        case "wrapped":
            inner: object = state_dict(sample)
            for _ in range(rng.choice((1, 1, 2, 40))):
                inner = {rng.choice(("state_dict", "module", "model", "")): inner}
            return kind, pickle_bytes(inner)
    pickle, storages = taken_apart(pickle_bytes(state_dict(sample)))
    for _ in range(rng.choice((1, 1, 2, 6))):
        pickle = _rewritten(pickle, rng) if kind == "opcodes" else byte_damage.damaged(pickle, rng, pickle)[1]
    return kind, zipped(pickle, storages)


def taken_apart(raw: bytes) -> tuple[bytes, dict[str, bytes]]:
    """The pickle and the storages of a file of `torch.save`."""
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        names = archive.namelist()
        pickle = next(archive.read(n) for n in names if n.endswith("/data.pkl"))
        storages = {n.rpartition("/")[2]: archive.read(n) for n in names if "/data/" in n}
    return pickle, storages


def _pieces(pickle: bytes) -> list[bytes]:
    """A pickle's opcodes with their arguments; what cannot be read is one last piece."""
    starts: list[int] = []
    with contextlib.suppress(ValueError):  # damaged already: the pieces up to there
        starts += (at or 0 for _, _, at in pickletools.genops(pickle))
    return [pickle[a:b] for a, b in zip(starts, [*starts[1:], len(pickle)], strict=False)] or [pickle]


def _rewritten(pickle: bytes, rng: Random) -> bytes:
    pieces = _pieces(pickle)
    at, to = rng.randrange(len(pieces)), rng.randrange(len(pieces))
    match rng.randrange(7):
        case 0:
            del pieces[at]
        case 1:
            pieces.insert(at, pieces[to])
        case 2:
            pieces[at], pieces[to] = pieces[to], pieces[at]
        case 3:
            pieces.insert(
                at,
                bytes(
                    [rng.choice(b"(.0123NRQPabcdeghijlopqrstuBCGIJKLMSTUVX\x81\x85\x86\x87\x88\x89\x8a\x93\x94\x95}])")]
                ),
            )
        case 4:
            pieces.insert(
                at, opcode(rng.choice((0, -1, 2**31 - 1, 2**62, 1e308, "x", None, (), [], {}, (1, 2), "a" * 5000)))
            )
        case 5:
            module, name, arguments = rng.choice(_CALLS)
            pieces.insert(at, call(module, name, arguments, rng))
        case _:
            numbers = [n for n, p in enumerate(pieces) if p[:1] in b"KMJ\x8a"] or [at]
            pieces[rng.choice(numbers)] = opcode(
                rng.choice((0, 1, -1, 255, 2**31 - 1, -(2**31), 2**63, 10**40, 1.5, True, "1"))
            )
    return b"".join(pieces)


def _code(rng: Random) -> bytes:
    module, name, arguments = rng.choice(_CALLS)
    bad = call(module, name, arguments, rng)
    start, stop = b"\x80\x02", b"."
    storage = _storage("FloatStorage", "0", 16)
    good = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + opcode(0) + opcode((4, 4)) + opcode((4, 1)) + b"\x89}tR"
    key = opcode("base_model.model.a.lora_A.weight")
    pickle = rng.choice((
        start + bad + stop,
        start + bad + b"0}" + stop,
        start + b"}" + key + bad + b"s" + stop,
        start + b"}(" + key + good + opcode("x") + bad + b"u" + stop,
        start + b"}(" + bad + good + b"u" + stop,
        start + good + bad + b"b" + stop,
        start + b"(" + bad + b"Q" + stop,
        b"\x80\x04\x95" + struct.pack("<Q", len(bad) + 1) + bad + stop,
        start + b"ccollections\nOrderedDict\n)R" + bad + b"b" + stop,
    ))  # fmt: skip
    return zipped(pickle) if rng.random() < 0.7 else pickle


def _storage(kind: str, name: Any, count: Any, device: Any = "cpu") -> bytes:
    return (
        b"(" + opcode("storage") + f"ctorch\n{kind}\n".encode() + opcode(name) + opcode(device) + opcode(count) + b"tQ"
    )


def _rebuilt(rng: Random) -> bytes:
    """Tensors rebuilt from sizes, strides and offsets that their storage does not have."""
    numbers = (0, 1, 2, 4, -1, 2**31, 2**40, 2**62, 2**63 - 1, 2**63, -(2**63), 1.5, None, "4", True)

    def some() -> Any:
        return rng.choice(numbers) if rng.random() < 0.4 else rng.choice((0, 1, 4))

    kind = rng.choice(
        (
            "FloatStorage",
            "HalfStorage",
            "BFloat16Storage",
            "ByteStorage",
            "QInt8Storage",
            "ComplexFloatStorage",
            "UntypedStorage",
            "Nothing",
        )
    )
    storage = _storage(
        kind,
        rng.choice(("0", "0", "1", "../version", "", 0)),
        some() if rng.random() < 0.5 else 16,
        rng.choice(("cpu", "cpu", "cuda:0", "meta", "x", None)),
    )
    size, stride = tuple(some() for _ in range(rng.randrange(4))), tuple(some() for _ in range(rng.randrange(4)))
    if rng.random() < 0.6:
        stride = tuple(some() for _ in size)
    function = rng.choice((
        "_rebuild_tensor_v2", "_rebuild_tensor_v2", "_rebuild_tensor", "_rebuild_parameter", "_rebuild_sparse_tensor",
        "_rebuild_qtensor", "_rebuild_meta_tensor_no_storage", "_rebuild_device_tensor_from_numpy", "_rebuild_tensor_v3",
        "_rebuild_wrapper_subclass",
    ))  # fmt: skip
    arguments = (
        b"(" + storage + opcode(some()) + opcode(size) + opcode(stride) + b"\x89" + b"ccollections\nOrderedDict\n)Rt"
    )
    tensor = f"ctorch._utils\n{function}\n".encode() + arguments + b"R"
    keys = (
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight",
    )
    pickle = b"\x80\x02}(" + b"".join(opcode(k) + tensor for k in keys) + b"u."
    return zipped(pickle, {"0": bytes(rng.choice((64, 64, 0, 3)))})


def _odd(rng: Random, sample: Sample) -> object:
    """Objects that `weights_only` lets through but no state dict is."""
    import torch

    some = torch.arange(6, dtype=torch.float32)
    tensors = state_dict(sample)
    key = next(iter(tensors), "a")
    choices: tuple[Any, ...] = (
        some, [some], (some,), None, 1, "text", {}, {1: some}, {None: some}, {("a", "b"): some}, {key: 1}, {key: None},
        {key: [some]}, {key: {"weight": some}}, {"__metadata__": some}, {"state_dict": some}, {"state_dict": 1}, set(),
        {key: some.to_sparse()}, {key: torch.complex(some, some).conj()}, {key: some.reshape(2, 3).t()}, {key: some[::2]},
        {key: torch.zeros(1).expand(1 << 40)}, {key: torch.zeros(1, 1).expand(1 << 20, 1 << 20)},
        {key: torch.empty(4, device="meta")},
        {key: torch.nn.Parameter(some)}, {key: some.requires_grad_(True)}, {key: torch.zeros(2, 0)},
        {key: torch.tensor(float("nan"))},
        {key: torch.zeros(1).expand(70_000_000)}, {f"{key}{n}": some for n in range(2000)}, {"a\ud800": some}, {"": some},
        {"k" * 100_000: some}, {key: torch.zeros((1,) * 64)}, {key: torch._neg_view(some)},
        {key: torch.zeros(3, dtype=torch.complex128)},
        {key: torch.zeros(4, dtype=torch.int32).view(torch.uint8)}, tensors | {"step": 3},
        tensors | {key: tensors.get(key, some).double()},
    )  # fmt: skip
    return rng.choice(choices)
