"""Write `docs/formats.md` from the formats' own tables: `.venv/bin/python scripts/formats.py`."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from adapterops import registry
from adapterops.dialects.table import ANY, AlphaIn, Dialect, Place, Suffix
from adapterops.methods import METHODS
from adapterops.plugin import Format

TARGET = Path(__file__).parent.parent / "docs" / "formats.md"
HEAD = """# Formats

Written by `scripts/formats.py` from the tables that the code reads and writes by; `adapterops formats` lists them in short.

A key is a prefix, a module's name and a suffix. *Prefix* says which component it stands for, *names* whose names follow:
canonical (diffusers', transformers') or the authors' own, with dots or, flat, with underscores. Every suffix is a tensor's
role in a method of [methods.md](methods.md); *turned* ones are stored as the transpose. Shapes are those of PEFT: A
(rank, in_features), B (out_features, rank), a kernel behind them.

What a format has no suffix for it cannot hold, and a conversion that needs it is refused with the way that works
(`adapterops to-lora`, `--fold-alpha`, another target); nothing is left out in silence.
"""
_ALPHA = {
    AlphaIn.TENSOR: "a scalar tensor beside the factors; where it is missing, readers apply scale 1",
    AlphaIn.CONFIG: "a config: beside the weights, or in the header",
    AlphaIn.NOWHERE: "nowhere: readers apply scale 1, so another scale is folded into the factors (`--fold-alpha`)",
}
_ASPECTS: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    ("LoRA", (("lora", "A"),)),
    ("DoRA", (("lora", "magnitude"), (ANY, "magnitude"))),
    ("bias", (("lora", "bias"),)),
    ("Tucker core", (("lora", "mid"),)),
    *((title, ((method, ANY),)) for title, method in (("LoHa", "loha"), ("LoKr", "lokr"), ("(IA)³", "ia3"))),
    ("differences", (("diff", ANY),)),
)
"""A column of the overview, and the methods and roles of which a dialect spells one (ANY: any role)."""


def page() -> str:
    """The page's text."""
    forms = list(registry.formats().values())
    out = [HEAD, *_overview(forms)]
    for form in forms:
        out += ["", f"## {form.name}: {form.title}", "", *_about(form)]
        if form.limits:
            out += ["", "Cannot say:", "", *(f"- {sentence}" for sentence in form.limits)]
        for dialect in form.dialects:
            out += ["", *_dialect(dialect)]
    return "\n".join(out) + "\n"


def _overview(forms: Iterable[Format]) -> Iterator[str]:
    """A row for every dialect: what its suffixes can spell."""
    rows = [
        ["dialect", "read", "written", "alpha in", *(name for name, _ in _ASPECTS), "saved modules", "other methods"]
    ]
    for form in forms:
        for dialect in form.dialects:
            spelled = {(s.method, s.role) for place in dialect.places for s in place.suffixes}
            has = spelled | {(method, ANY) for method, _ in spelled}
            methods = {method for method, _ in has if method in METHODS} - {
                "lora",
                "loha",
                "lokr",
                "ia3",
                "diff",
                "saved",
            }
            rows.append(
                [
                    f"`{dialect.name}`",
                    "with `--from`" if dialect.asked else "yes",
                    "yes" if dialect.written else "no",
                    dialect.alpha.value,
                    *("yes" if has & set(wanted) else "" for _, wanted in _ASPECTS),
                    "yes" if any(p.saved for p in dialect.places) or any(m == "saved" for m, _ in has) else "",
                    str(len(methods)) if methods else "",
                ]
            )
    return _table(rows)


def _about(form: Format) -> list[str]:
    """What the plugin's module says of the format."""
    text = inspect.getdoc(sys.modules[type(form).__module__]) or ""
    return text.rstrip().splitlines()


def _dialect(dialect: Dialect) -> Iterator[str]:
    yield f"### `{dialect.name}`: {dialect.title}"
    yield ""
    if dialect.alpha is AlphaIn.NOWHERE and dialect.convention == "unknown":
        yield "Alpha stands nowhere, and no reader assumes one: it is asked for."
    elif dialect.alpha is AlphaIn.NOWHERE:
        yield f"Alpha stands {_ALPHA[dialect.alpha]}."
    else:
        yield f"Alpha stands in {_ALPHA[dialect.alpha]}."
    if dialect.example:
        yield ""
        yield f"    {dialect.example}"
    yield ""
    yield from _table([["prefix", "component", "names", "for"], *dict.fromkeys(map(_place, dialect.places))])
    yield ""
    suffixes = {(s.text, s.method, s.role, s.transposed): s for place in dialect.places for s in place.suffixes}
    yield from _table([["suffix", "method", "role"], *map(_suffix, suffixes.values())])


def _place(place: Place) -> tuple[str, ...]:
    names = "none: the component has them once" if place.whole else place.names + (", flat" if place.flat else "")
    others = "".join(f"; {column} for {family}" for family, column in sorted(place.names_in.items()))
    component = "any" if place.component == "*" else place.component
    return (
        f"`{place.prefix}`" if place.prefix else "none",
        component + "".join(f", else {name}" for name in place.instead),
        names + others,
        ", ".join(sorted(place.only)) or "all",
    )


def _suffix(suffix: Suffix) -> list[str]:
    method = "any scaled" if suffix.method == ANY else METHODS[suffix.method].title
    options = "".join(f", {name}: {value}" for name, value in suffix.options.items())
    return [f"`{suffix.text}`", method, suffix.role + (", turned" if suffix.transposed else "") + options]


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    for number, row in enumerate(rows):
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
        if not number:
            yield "|" + " --- |" * len(row)


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
