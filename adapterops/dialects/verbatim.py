"""Names that no known base model has: kept as their file spells them, and written where they are spelled alike.

A LoRA of a base model without a table is still a LoRA: merging two of one spelling, rounding one, or making a plain LoRA of one
asks nothing of the base.  Only other names do, which a table would have to tell.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from adapterops.adapter import Adapter, Update, Verbatim, VerbatimRow
from adapterops.dialects.match import Group
from adapterops.dialects.table import Dialect, Place
from adapterops.errors import CannotRepresent, UnknownArchitectureOfFile


def verbatim(groups: Iterable[Group], why: str) -> Verbatim | None:
    """How the modules' names are spelled, `why` being what is said where they would have to be known.

    None for names behind no prefix, with endings of their own, or of one component under two prefixes: nothing then tells that
    they are names, or where each belongs.
    """
    rows: dict[str, VerbatimRow] = {}
    for place in {entry.place for entry in groups if not entry.place.free}:
        row = VerbatimRow(place.prefix, place.names, place.flat)
        if not place.prefix or place.tails or rows.setdefault(place.component, row) != row:
            return None
    return Verbatim(rows, why)


def place_of(dialect: Dialect, component: str, kept: Verbatim) -> Place:
    """The row by which `dialect` spells a component whose names were kept.

    Raises `UnknownArchitectureOfFile` where it has other names for it.
    """
    row = kept.rows.get(component)
    # As it is read again: without a base model a row means its first component.
    own = [p for p in dialect.places if row is not None and component == p.component and _holds(p, row)]
    same = [place for place in own if row is not None and place.prefix == row.prefix]
    # A row for some base models alone, or one of several, would have to know which one this is.
    others = [place for place in own if not place.only]
    if not same and len(others) != 1:
        raise UnknownArchitectureOfFile(kept.why)
    return (same or others)[0]


def _holds(place: Place, row: VerbatimRow) -> bool:
    """Whether names of the source's row can stand in a row: dots can become underscores, but not the other way round."""
    named = place.prefix and not place.tails and not place.free
    return bool(named) and place.names == row.column and (place.flat or not row.flat)


def named_for(adapter: Adapter, dialect: Dialect) -> Adapter:
    """The adapter with the names that were kept as `dialect` has them, its dots underscores where those are.

    Raises `UnknownArchitectureOfFile` where `dialect` has other names, `CannotRepresent` where two would be one.
    """
    kept = adapter.verbatim
    if kept is None:
        return adapter
    places = {component: place_of(dialect, component, kept) for component in kept.rows if adapter.of(component)}
    flat = {component for component, place in places.items() if place.flat and not kept.rows[component].flat}
    if not flat:
        return adapter
    seen: dict[tuple[str, str, str], Update] = {}
    for update in adapter:
        module = update.module.replace(".", "_") if update.component in flat else update.module
        other = seen.setdefault((update.component, module, update.method), update)
        if other is not update:
            raise CannotRepresent(f"{other.name} and {update.module}: {dialect.title} would spell them alike")
    rows = {component: row._replace(flat=row.flat or component in flat) for component, row in kept.rows.items()}
    renamed = (replace(update, module=key[1]) for key, update in seen.items())
    return replace(adapter, verbatim=replace(kept, rows=rows)).with_updates(renamed)
