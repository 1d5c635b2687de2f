"""Damage to bytes that nobody looked into: flips, cuts, splices."""

from __future__ import annotations

from random import Random

KINDS = ("flip bits", "set bytes", "insert", "delete", "truncate", "extend", "splice", "zero", "copy", "rotate")
_LITTLE = (
    b"\0",
    b"\xff",
    b"{",
    b"}",
    b'"',
    b"\n",
    b"\x80",
    b"\xff" * 8,
    b"\0" * 8,
    b"\xff\xff\xff\x7f",
    b"\x89",
    b"\xc0\xaf",
)


def damaged(raw: bytes, rng: Random, other: bytes = b"") -> tuple[str, bytes]:
    """(what was done, the bytes); `other` is what a splice takes its second half from."""
    kind = rng.choice(KINDS)
    data = bytearray(raw)
    size = len(data)
    if not size:
        return "extend", rng.randbytes(rng.randrange(1, 64))
    at = _place(size, rng)
    length = min(size - at, rng.choice((1, 2, 4, 8, 16, 100, 1000, size)))
    match kind:
        case "flip bits":
            for _ in range(rng.choice((1, 1, 2, 8, 64))):
                data[_place(size, rng)] ^= 1 << rng.randrange(8)
        case "set bytes":
            for _ in range(rng.choice((1, 1, 3, 20))):
                piece = rng.choice(_LITTLE)
                where = _place(size, rng)
                data[where : where + len(piece)] = piece
        case "insert":
            data[at:at] = rng.choice((rng.choice(_LITTLE), rng.randbytes(length % 500), bytes(data[at : at + length])))
        case "delete":
            del data[at : at + length]
        case "truncate":
            del data[at:]
        case "extend":
            data += rng.choice((b"\0", b"\0" * 4096, rng.randbytes(rng.randrange(1, 300)), bytes(data[-200:])))
        case "splice":
            cut = _place(len(other), rng) if other else 0
            data = data[:at] + other[cut:]
        case "zero":
            data[at : at + length] = bytes(length)
        case "copy":
            to = _place(size, rng)
            data[to : to + length] = data[at : at + length]
        case _:
            data = data[at:] + data[:at]
    return kind, bytes(data)


def _place(size: int, rng: Random) -> int:
    """A position: anywhere, or near the beginning or the end, where the containers keep their tables."""
    near = min(size, 300)
    return rng.choice(
        (rng.randrange(size), rng.randrange(near), rng.randrange(min(size, 16)), size - 1 - rng.randrange(near))
    )
