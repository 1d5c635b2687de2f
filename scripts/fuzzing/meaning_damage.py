"""Damage to what an adapter says, in a file that is sound as a file."""

from __future__ import annotations

import json
from dataclasses import replace
from random import Random
from typing import Any

from adapterops.storage.dtypes import BITS
from fuzzing import header_damage, json_damage
from fuzzing.sample import Sample, Tensor, size_of

TENSORS = (
    "swap two", "drop one", "double one", "change rank", "alpha", "reinterpret", "not a number", "empty", "mix dialects",
    "rename", "transpose", "flatten", "zero", "extreme", "rename half", "join",
)  # fmt: skip
_NAN, _INF = b"\x00\x7e", b"\x00\x7c"
_CHOICES: dict[str, Any] = {
    "adapter_name": "default", "prefix": "base_model.model.", "component": "unet", "prefixes": {"unet": "unet."},
    "alpha_absent": "all", "alpha_as": ["F32", []], "shapes": {"a.b": {"A": [2, 4]}},
}  # fmt: skip


def damaged(sample: Sample, rng: Random, other: Sample) -> tuple[str, Sample]:
    """(what was done, the sample); `other` is one that keys are mixed in from."""
    kind = rng.choice(TENSORS)
    tensors = dict(sample.tensors)
    if not tensors:
        return "mix dialects", replace(sample, tensors=dict(other.tensors))
    key = rng.choice(list(tensors))
    tensor = tensors[key]
    twin = rng.choice(list(tensors))
    match kind:
        case "swap two":
            tensors[key], tensors[twin] = tensors[twin], tensors[key]
        case "drop one":
            for name in rng.sample(
                list(tensors), k=min(len(tensors) - 1, rng.choice((1, 1, 2, len(tensors) // 2))) or 1
            ):
                del tensors[name]
        case "double one":
            tensors[key + rng.choice((".1", ".default", "_", " ", ".weight"))] = tensor
        case "change rank":
            tensors[key] = _resized(tensor, rng)
        case "alpha":
            _alpha(tensors, key, rng)
        case "reinterpret":
            for name in rng.choice(([key], list(tensors))):
                tensors[name] = _reinterpreted(tensors[name], rng)
        case "not a number":
            for name in rng.choice(([key], list(tensors))):
                tensors[name] = _poisoned(tensors[name], rng.choice((_NAN, _INF, b"\xff\xff", b"\x80\x7f")), rng)
        case "empty":
            shape = list(tensor.shape) or [1]
            shape[rng.randrange(len(shape))] = 0
            tensors[key] = Tensor(tensor.dtype, tuple(shape), b"")
        case "mix dialects":
            own = list(other.tensors.items())
            tensors |= dict(own[: rng.choice((1, 2, len(own)))])
        case "rename":
            new = rng.choice((rng.choice(header_damage.KEYS), _altered(key, rng), twin + "x"))
            tensors = {new if k == key and new != "__metadata__" else k: v for k, v in tensors.items()}
        case "rename half":
            part, new = (
                rng.choice(key.replace("_", ".").split(".")) or "a",
                rng.choice(("q", "0", "999999999", "", "to_q", "é", "-1")),
            )
            tensors = {k.replace(part, new): v for k, v in tensors.items()}
        case "transpose":
            tensors[key] = tensor._replace(shape=tensor.shape[::-1])
        case "flatten":
            count = size_of("U8", tensor.shape)
            tensors[key] = tensor._replace(
                shape=rng.choice(((count,), (1, count), (count, 1), (1, 1, *tensor.shape), (*tensor.shape, 1, 1)))
            )
        case "zero":
            for name in rng.choice(([key], list(tensors))):
                tensors[name] = tensors[name]._replace(data=bytes(len(tensors[name].data)))
        case "extreme":
            for name in rng.choice(([key], list(tensors))):
                tensors[name] = _poisoned(
                    tensors[name], rng.choice((b"\xff\x7b", b"\x01\x00", b"\x7f\x7f", b"\xff\xfb")), rng
                )
        case _:
            tensors = {k if rng.random() < 0.5 else _altered(k, rng): v for k, v in tensors.items()}
    return kind, replace(sample, tensors=tensors)


def damaged_metadata(sample: Sample, rng: Random) -> tuple[str, Sample]:
    """(what was done, the sample): header entries that are JSON or numbers in strings."""
    metadata = dict(sample.metadata)
    name = rng.choice(
        (
            *metadata,
            "adapterops",
            "lora_adapter_metadata",
            "ss_network_alpha",
            "ss_network_dim",
            "ss_network_args",
            "format",
        )
    )
    if rng.random() < 0.15:
        metadata[name] = rng.choice(json_damage.STRINGS)
        return "string", replace(sample, metadata=metadata)
    try:
        value = json.loads(metadata[name])
    except (KeyError, ValueError):
        value = _usual(name, sample)
    for _ in range(rng.choice((1, 1, 2, 4))):
        value = json_damage.damaged(value, rng) if isinstance(value, dict | list) else json_damage.hostile(rng)
    metadata[name] = json_damage.dump(value).decode("utf-8", "surrogatepass")
    return name if name in ("adapterops", "lora_adapter_metadata") else "other", replace(sample, metadata=metadata)


def _usual(name: str, sample: Sample) -> Any:
    """What stands in a header entry of this name."""
    if name == "adapterops":
        formats = ("peft", "kohya", "diffusers", "diffusers-mixed")
        return {
            "spelling": {f: dict(_CHOICES) for f in formats},
            "config": {"unet": {"task_type": None, "r": 2}, "model": dict(sample.config or {})},
            "architecture": "sd1",
        }
    if name == "lora_adapter_metadata":
        fields = {"r": 2, "lora_alpha": 4, "target_modules": ["to_q"], "alpha_pattern": {"to_q": 2}, "rank_pattern": {}}
        components = ("unet", "text_encoder", "transformer")
        if not any(tensor.startswith(components) for tensor in sample.tensors):
            return {"peft_type": "LORA", **fields}  # a model's own file
        return {f"{part}.{k}": v for part in components for k, v in fields.items()}
    return {"conv_dim": 4, "algo": "lora"}


def _altered(key: str, rng: Random) -> str:
    at = rng.randrange(len(key) + 1)
    return rng.choice(
        (
            key[:at] + rng.choice("._x0") + key[at:],
            key[:at] + key[at + 1 :],
            key.upper(),
            key.replace(".", "_"),
            key.replace("_", "."),
        )
    )


def _resized(tensor: Tensor, rng: Random) -> Tensor:
    if not tensor.shape:
        return tensor._replace(shape=(2,), data=tensor.data * 2)
    axis = rng.randrange(len(tensor.shape))
    size = max(0, rng.choice((1, tensor.shape[axis] - 1, tensor.shape[axis] + 1, tensor.shape[axis] * 2)))
    shape = (*tensor.shape[:axis], size, *tensor.shape[axis + 1 :])
    wanted = size_of(tensor.dtype, shape)
    return Tensor(tensor.dtype, shape, (tensor.data * 3 + bytes(wanted))[:wanted])


def _alpha(tensors: dict[str, Tensor], key: str, rng: Random) -> None:
    alphas = [k for k in tensors if k.endswith(".alpha")]
    name = rng.choice(alphas) if alphas else key.partition(".lora")[0] + ".alpha"
    word = rng.choice(
        (_NAN, _INF, b"\x00\xfc", b"\x00\xc4", b"\xff\x7b", b"\x01\x00", b"\0\0", b"\x00\x80", b"\x00\x3c")
    )
    wide = rng.choice(
        (b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\xff\xff\x7f\x7f", b"\x01\0\0\0", b"\0\0\x80\xbf", b"\0\0\x80\x3f")
    )
    tensors[name] = rng.choice((
        Tensor("F16", (), word), Tensor("F32", (), wide), Tensor("F16", (3,), word * 3), Tensor("F16", (1, 1), word),
        Tensor("F16", (0,), b""), Tensor("I64", (), b"\xff" * 8), Tensor("BOOL", (), b"\x02"), Tensor("U8", (), b"\0"),
        Tensor("C64", (), wide * 2), Tensor("F8_E4M3", (), b"\x7f"), Tensor("F8_E8M0", (), b"\xff"),
        Tensor("F64", (), b"\xff" * 7 + b"\x7f"),
        Tensor("U64", (), b"\xff" * 8), Tensor("F4", (2,), b"\x11"), Tensor("BF16", (), word),
    ))  # fmt: skip


def _reinterpreted(tensor: Tensor, rng: Random) -> Tensor:
    """The same bytes in another type: the same shape where it is as wide, else the last size changed."""
    dtype = rng.choice(list(BITS))
    ratio = BITS.get(tensor.dtype, 8) / BITS[dtype]
    if ratio == 1 or not tensor.shape:
        return Tensor(dtype, tensor.shape, tensor.data if ratio == 1 else (tensor.data * 4)[: BITS[dtype] // 8])
    shape = (*tensor.shape[:-1], max(0, int(tensor.shape[-1] * ratio)))
    wanted = size_of(dtype, shape)
    return Tensor(dtype, shape, (tensor.data * 2 + bytes(wanted))[:wanted])


def _poisoned(tensor: Tensor, word: bytes, rng: Random) -> Tensor:
    """The tensor with a 16-bit pattern at one element or at all of them."""
    width = max(2, BITS.get(tensor.dtype, 16) // 8)
    if len(tensor.data) < width:
        return tensor
    piece = (bytes(width - 2) + word)[-width:]
    if rng.random() < 0.3:
        return tensor._replace(data=(piece * (len(tensor.data) // width + 1))[: len(tensor.data)])
    at = rng.randrange(len(tensor.data) // width) * width
    return tensor._replace(data=tensor.data[:at] + piece + tensor.data[at + width :])
