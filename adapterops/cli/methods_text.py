"""The table of methods, in words: what `adapterops methods` prints, and a page of the documentation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from adapterops.methods import METHODS

if TYPE_CHECKING:
    from adapterops.plugin import TypeRow


def low_rank(name: str) -> str:
    """How a method becomes a LoRA."""
    method = METHODS[name]
    if not method.linear:
        return "none"
    if method.form.startswith("none"):
        return method.form
    if method.form:
        return f"exact: {method.form}"
    return "by singular values"


def needs(row: TypeRow) -> str:
    """What is needed beside the tensors to know what an adapter does."""
    if row.needs:
        return row.needs
    own = [METHODS[name] for name in row.methods]
    said = []
    if any(m.needs_weight for m in own):
        said.append("the base's weight (--base-weights)")
    if any(m.needs_shape for m in own):
        said.append("the module's shape (--arch, --base)")
    said += [f"{name} (--set)" for name, _ in row.unknowable]
    return "; ".join(said) or "nothing"


def lines(row: TypeRow) -> Iterator[tuple[str, str]]:
    """What is said of a type, by heading."""
    yield "recognised by", ", ".join(row.recognised)
    for name in row.methods:
        if METHODS[name].formula:
            yield "delta" if len(row.methods) == 1 else f"delta ({name})", METHODS[name].formula
    for name in row.methods:
        why = getattr(METHODS[name], "why", "")
        if why and not METHODS[name].linear:
            yield "does" if len(row.methods) == 1 else f"does ({name})", why
    forms = {name: low_rank(name) for name in row.methods}
    for name in row.methods if len(set(forms.values())) > 1 else row.methods[:1]:
        yield "as LoRA" if len(set(forms.values())) == 1 else f"as LoRA ({name})", forms[name]
    yield "needs", needs(row)
    yield "derived", ", ".join(row.derived)
    yield "assumed", ", ".join(f"{name} = {_value(value)}" for name, value in row.assumed)
    yield "unknowable", "; ".join(f"{name} ({why})" if why else name for name, why in row.unknowable)
    yield "lost", "; ".join(row.lost)
    reasons: dict[str, list[str]] = {}
    for name, why in row.refused:
        reasons.setdefault(why, []).append(name)
    yield "refused", "; ".join(f"{', '.join(names)} ({why})" for why, names in reasons.items())
    yield "read", ", ".join(row.read)
    yield "source", ", ".join(dict.fromkeys(METHODS[name].source for name in row.methods))


def _value(value: Any) -> str:
    return {"True": "true", "False": "false", "None": "null"}.get(str(value), str(value))


def text(rows: Sequence[TypeRow], verbose: bool) -> Iterator[str]:
    """The table for a terminal; all fields of the configs where `verbose`."""
    for row in rows:
        yield click.style(row.name, bold=True) + f"  {row.title}"
        for head, said in lines(row):
            if said and (verbose or head not in ("read", "derived")):
                yield f"    {head:<13} {said}"


def others(rows: Sequence[TypeRow]) -> list[str]:
    """The methods that no type is for: other formats have them."""
    named = {name for row in rows for name in row.methods}
    return [name for name in METHODS if name not in named]


def meant(row: TypeRow, name: str) -> bool:
    """Whether a user who says `name` (in lower case) may mean a type: by its name, a method, its title, a field."""
    words = name.replace("_", " ").replace("-", " ")
    names = {row.name.lower(), *row.methods}
    titles = [row.title, *(METHODS[own].title for own in row.methods)]
    fields = {*row.derived, *(field for field, _ in row.assumed)}
    return (
        name in names
        or words in {known.replace("_", " ") for known in names}
        or any(words in title.lower().replace("-", " ") for title in titles if len(words) > 2)
        or any(f"use_{name}" == field or f"{name}_config" == field for field in fields)
    )


def no_such(name: str, rows: Sequence[TypeRow]) -> str:
    """What to say to a name that no method has."""
    import difflib

    import adapterops.merging.methods  # noqa: F401  (fills the table)
    from adapterops.merging.registry import ALIASES
    from adapterops.merging.registry import METHODS as MERGES

    if name in MERGES or name in ALIASES:
        return f"{name!r} is a way to merge: adapterops methods --merge"
    near = difflib.get_close_matches(name, [*(row.name.lower() for row in rows), *METHODS], n=1)
    hint = f"did you mean {near[0]}?" if near else "adapterops methods lists them"
    return f"no method is called {name!r}; {hint}"
