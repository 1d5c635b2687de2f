"""Many adapters, examined in several processes; the results stand in the order of the adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from adapterops.validation.options import Options
from adapterops.validation.report import Checked
from adapterops.validation.rule import Rule
from adapterops.validation.subject import Place

Examine = Callable[[Place, Options, Sequence[Rule]], Checked]


def run_all(
    examine: Examine,
    places: Sequence[Place],
    options: Options,
    rules: Sequence[Rule],
    jobs: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Checked]:
    """`examine` of every place, in order."""
    for at, place in enumerate(places):
        if progress is not None:
            progress(at, len(places))
        yield examine(place, options, rules)
    if progress is not None:
        progress(len(places), len(places))
