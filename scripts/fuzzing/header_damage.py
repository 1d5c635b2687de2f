"""Damage to the header of a safetensors file, written as JSON that says what it should not."""

from __future__ import annotations

from random import Random
from typing import Any

from adapterops.storage.dtypes import BITS
from fuzzing import json_damage
from fuzzing.json_damage import Pairs, Raw
from fuzzing.sample import Sample, layout, with_header

_SIZES: tuple[Any, ...] = (
    -1, 0, 1, 2**31, 2**32, 2**53, 2**53 + 1, 2**63, 2**64, 10**30, 1.0, 2.5, True, "4", None, [1], Raw("1e3"), Raw("-0"),
    Raw("1" + "0" * 500), Raw("1" + "0" * 5000), Raw("NaN"), Raw("Infinity"), Raw("0.0"), Raw("01"),
)  # fmt: skip
_DTYPES: tuple[Any, ...] = (
    "f32",
    "F31",
    "",
    "float32",
    "BF16 ",
    None,
    4,
    ["F32"],
    {"F32": 1},
    "F" * 9000,
    "F32\0",
    *BITS,
)
_SHAPES: tuple[Any, ...] = (
    [], [0], [-1], [-1, -1], [[2, 2]], [1] * 64, [1] * 65, [2**32, 2**32], [2**62, 4, 0], [0] * 10_000, None, "2", 4, {}, [1.0],
    [True], [None], [2**53, 2**53, 2**53, 0], [1] * 100_000,
)  # fmt: skip
KEYS = (
    "", "__metadata__", "a\nb", "\0", "k" * 100_000, "\ud800", "é" * 300, "lora_unet_" * 2000, ".lora_A.weight", ".alpha",
    "base_model.model.", "base_model.model..lora_A.weight", "." * 5000, "lora_unet_.lora_down.weight", "\x1b[2J", "\u202eabc",
    "../../x.lora_A.weight", "unet." * 3000 + "lora_A.weight", "{adapter}", "a" + "_" * 3000 + "b.lora_up.weight", "__class__",
)  # fmt: skip
KINDS = (
    "length", "offsets", "dtype", "shape", "duplicate key", "key", "metadata", "nesting", "entry", "structure", "encoding",
    "order", "spaces", "reshape", "many",
)  # fmt: skip


def damaged(sample: Sample, rng: Random) -> tuple[str, bytes]:
    """(what was done, a file)."""
    header: Any
    header, data = layout(sample)
    kind = rng.choice(KINDS)
    keys = [k for k in header if k != "__metadata__"]
    if not keys:
        return "structure", with_header(json_damage.dump(json_damage.damaged(header, rng)), data)
    key = rng.choice(keys)
    entry = header[key]
    match kind:
        case "length":
            return kind, _length(json_damage.dump(header), data, rng)
        case "encoding":
            return kind, with_header(_encoded(json_damage.dump(header), rng), data)
        case "spaces":
            text = json_damage.dump(header)
            pad = rng.choice((b" ", b"\0", b"\n", b"\t", b"\xef\xbb\xbf", b"{}", b"//x"))
            text = rng.choice((pad + text, text + pad * rng.choice((1, 7, 5000)), text.replace(b",", b", " + pad)))
            return kind, with_header(text, data)
        case "structure":
            for _ in range(rng.choice((1, 1, 2, 5))):
                header = json_damage.damaged(header, rng)
                if not isinstance(header, dict):
                    break
        case "offsets":
            _offsets(entry, len(data), rng)
        case "dtype":
            entry["dtype"] = rng.choice(_DTYPES)
        case "shape":
            shape = list(entry["shape"])
            if shape and rng.random() < 0.6:
                shape[rng.randrange(len(shape))] = rng.choice(_SIZES)
                entry["shape"] = shape
            else:
                entry["shape"] = rng.choice(_SHAPES)
        case "reshape":
            entry["shape"] = rng.choice(
                (entry["shape"][::-1], [1, *entry["shape"]], [*entry["shape"], 1], entry["shape"][1:])
            )
        case "duplicate key":
            again = rng.choice((dict(entry), header[rng.choice(keys)], json_damage.hostile(rng)))
            header = Pairs([*header.items(), (rng.choice((key, "__metadata__")), again)])
        case "key":
            renamed = rng.choice(
                (rng.choice(KEYS), key + rng.choice(("\0", "\n", " ", ".x", "é")), key[1:], key[:-1], key * 40)
            )
            header = {renamed if k == key else k: v for k, v in header.items()}
        case "metadata":
            header["__metadata__"] = rng.choice(
                (json_damage.hostile(rng), {"a": json_damage.hostile(rng)}, {"x": "y" * 300_000})
            )
        case "nesting":
            deep = rng.choice((200, 2000, 200_000))
            opener, closer = rng.choice((("[", "]"), ('{"a":', "}")))
            target = rng.choice((entry, header))
            target[rng.choice(list(target))] = Raw(opener * deep + rng.choice(("1", "")) + closer * deep)
        case "entry":
            header[key] = json_damage.damaged(entry, rng)
        case "order":
            rng.shuffle(keys)
            header = {k: header[k] for k in keys}
        case _:
            count = rng.choice((300, 3000))
            header |= {
                f"{key[:200]}{n}": {"dtype": "F16", "shape": [0], "data_offsets": [len(data)] * 2} for n in range(count)
            }
    return kind, with_header(json_damage.dump(header), data)


def _length(text: bytes, data: bytes, rng: Random) -> bytes:
    size = len(text)
    said = rng.choice(
        (
            0,
            1,
            2,
            7,
            8,
            size - 1,
            size + 1,
            size + len(data),
            size + len(data) + 1,
            10**8,
            10**8 + 1,
            2**31,
            2**63,
            2**64 - 1,
        )
    )
    return int(said).to_bytes(8, rng.choice(("little", "little", "big"))) + text + data


def _offsets(entry: dict[str, Any], available: int, rng: Random) -> None:
    begin, end = entry["data_offsets"]
    step = rng.choice((1, 2, end - begin, available, 2**40))
    entry["data_offsets"] = rng.choice((
        [begin - step, end], [begin, end + step], [begin + step, end + step], [begin - step, end - step], [end, begin],
        [begin], [begin, end, end], [], None, "0", [rng.choice(_SIZES), end], [begin, rng.choice(_SIZES)],
        [float(begin), float(end)], {"0": begin, "1": end}, [0, available], [str(begin), str(end)],
    ))  # fmt: skip


def _encoded(text: bytes, rng: Random) -> bytes:
    at = rng.randrange(len(text))
    broken = rng.choice(
        (b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"\xe2\x82", b"\\ud800", b"\\u0000", b"\0")
    )
    return rng.choice((
        text[:at] + broken + text[at:],
        text.decode("utf-8", "replace").encode("utf-16"),
        text.decode("utf-8", "replace").encode("utf-32"),
        b"\xef\xbb\xbf" + text,
        text.replace(b"lora", b"lor\\u0061"),
    ))  # fmt: skip
