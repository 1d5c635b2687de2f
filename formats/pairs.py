"""Which way round the two factors of a LoRA stand, where a format's keys alone do not tell: by their shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from adapterops.plugin import Reading, Source

AROUND = (".lora", ".lora_layer", ".parametrizations.weight.0")
"""What a pair stands in where somebody put it around a layer: it is no part of the layer's name."""


class Stand(NamedTuple):
    """Which ways round a file's pairs can be read, and whether their shapes alone tell."""

    straight: bool
    turned: bool
    square: bool = False


def stand(pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> Stand:
    """How the pairs of factors (shapes of A, of B) stand: straight A (r, in) and B (out, r), turned A (in, r) and B (r, out).

    Where all pairs share both dimensions, the one is the rank that is smaller.
    """
    if not pairs or any(len(a) != 2 or len(b) != 2 for a, b in pairs):
        return Stand(bool(pairs), False)
    straight, turned = all(a[0] == b[1] for a, b in pairs), all(a[1] == b[0] for a, b in pairs)
    if straight and turned:
        wide, tall = any(a[0] < a[1] for a, _ in pairs), any(a[0] > a[1] for a, _ in pairs)
        return Stand(not tall or wide, not wide or tall, True)
    return Stand(straight, turned)


def shapes(reading: Reading, source: Source) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The shapes of A and B of each pair of a reading, as they stand in the file."""
    halves: dict[str, dict[str, tuple[int, ...]]] = {}
    for claim in reading.claims:
        if claim.suffix.role in ("A", "B"):
            halves.setdefault(claim.name, {})[claim.suffix.role] = source.tensors[claim.key].shape
    return [(h["A"], h["B"]) for h in halves.values() if len(h) == 2]


def is_handmade(reading: Reading, source: Source, *, turned: bool = False) -> bool:
    """Whether what another format reads by its endings is somebody's own: in a segment of its own, or the other way round
    than the format has its factors (`turned`: A is (in, r) there)."""
    names = {claim.name for claim in reading.claims if claim.suffix.role in ("A", "B")}
    if names and all(name.endswith(AROUND) for name in names):
        return True
    how = stand(shapes(reading, source))
    if any(claim.suffix.text.endswith(".weight") for claim in reading.claims if claim.suffix.role in ("A", "B")):
        return False  # a layer's own weight stands one way
    return how.straight != how.turned and how.turned != turned
