"""Expands the rows of an architecture's TOML file into modules.

A row describes one module, or a family of them:

    for        loop variables: a list of values, or an expression (a list's name, or a count n for 0 … n-1)
    canonical  name relative to the template's place, with `{expression}` fields; "" is the place itself
    original   the same for the authors' own repository; left out where it equals `canonical`, "" where the authors
               have no such module (its weight is part of a fused one)
    and either
    use, with  the name of another template, and the integers that it takes
    or one kind, whose value is the shape of `weight`, integers or expressions:
    linear     (out, in)
    conv       (out, in, kernel height, kernel width)
    embedding  (num_embeddings, dim)
    norm       (channels,)
    other      of what is none of these, as torch stores it (a transposed convolution)
    parameter  of a bare parameter, which has no `weight`: `canonical` and `original` end with its own name
    bias       whether the module has a bias; by default all but embeddings have
    joins      for a module that only the authors have: the canonical modules whose rows make up its own, in order; a
               name stands for all rows of that module, [name, start, stop] for some of them
    partial    true for rows of a module of the authors' that some dialect names by themselves; only a dialect with a
               name of its own for them (a tail) has such a module
    widens     true where adapters may give the module more inputs than the base has (control adapters)
    tied_to    the module that owns the weight, where it is shared

The component's globals are the numbers of its config, its `vars`, and four tables for what a config leaves out:

    defaults   what a number stands for that the config lacks or leaves null: { out_channels = "in_channels" }
    products   names for products, which expressions have not: { inner = ["num_attention_heads", "attention_head_dim"] }
    counts     names for the lengths of lists: { vace_blocks = "vace_layers" }
    others     names for the numbers below a count that a list leaves out: { single = ["num_layers", "dual_layers"] }

A component that another architecture has, too, has only `of`, the name of that architecture, and in `config` the numbers of
its own that differ from that one's.

A template sees its loop variables, its `with` arguments and the component's globals, not its caller's scope.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from adapterops.architectures.expression import Scope, Value, evaluate, evaluate_integer, fill
from adapterops.architectures.spec import ModuleSpec, Piece

KINDS = ("linear", "conv", "embedding", "norm", "other", "parameter")
_COLUMNS = frozenset(
    {"for", "canonical", "original", "use", "with", "bias", "joins", "partial", "widens", "tied_to", *KINDS}
)
ALL = -1
"""As the end of a piece: all rows of the module."""

Row = Mapping[str, Any]


def placed(spec: ModuleSpec, canonical: str, original: str) -> ModuleSpec:
    """A module of a template that is used at these places."""
    name, own, shape, kind, bias, transposed, tied_to, params, joins, partial, widens = spec
    joins = joins and tuple((canonical + part, start, stop) for part, start, stop in joins)
    tied_to = tied_to and canonical + tied_to
    own = own and original + own
    return ModuleSpec(canonical + name, own, shape, kind, bias, transposed, tied_to, params, joins, partial, widens)


def stems(rows: list[Row], templates: Mapping[str, list[Row]], column: str) -> frozenset[str]:
    """What the names in a column ("canonical" or "original") begin with, told without writing them out; "" is anything."""
    found: set[str] = set()
    for row in rows:
        name = row.get(column, row["canonical"])
        if name:
            found.add(name.partition("{")[0].partition(".")[0])
        elif "use" in row:
            found |= stems(templates[row["use"]], templates, column)
    return frozenset(found)


class Expander:
    """Expands templates against the globals of one component.

    Each template is expanded once for each set of arguments: an SDXL UNet has 70 transformer blocks, but
    only two different ones.
    """

    def __init__(self, templates: Mapping[str, list[Row]], scope: Scope) -> None:
        self._templates = templates
        self._globals = scope
        self._expanded: dict[tuple[str, tuple[tuple[str, int], ...]], list[ModuleSpec]] = {}

    def expand(self, rows: list[Row], arguments: Mapping[str, int] | None = None) -> list[ModuleSpec]:
        """The modules that `rows` describe. Raises ValueError, quoting the row, where one is wrong."""
        leaves: list[ModuleSpec] = []
        for row in rows:
            try:
                for scope in _scopes(row.get("for", {}), {**self._globals, **(arguments or {})}):
                    self._expand_row(row, scope, leaves)
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"row {dict(row)!r}: {error}") from error
        return leaves

    def _expand_row(self, row: Row, scope: Scope, leaves: list[ModuleSpec]) -> None:
        if not _COLUMNS.issuperset(row):
            raise ValueError(f"unknown columns {sorted(set(row) - _COLUMNS)}")
        canonical = fill(row["canonical"], scope)
        original = fill(row["original"], scope) if "original" in row else canonical
        kinds = [kind for kind in KINDS if kind in row]
        if len(kinds) + ("use" in row) != 1:
            raise ValueError(f"needs exactly one of use, {', '.join(KINDS)}")
        if kinds:
            if not canonical:
                raise ValueError("a module needs a name")
            kind = kinds[0]
            shape = tuple(evaluate_integer(size, scope) for size in row[kind])
            joins = tuple(_piece(piece, scope) for piece in row.get("joins", ()))
            bias = row.get("bias", kind not in ("embedding", "parameter"))
            tied_to = fill(row.get("tied_to", ""), scope) or None
            params = ("weight", "bias") if bias else ("weight",)
            if kind == "parameter":
                params = (canonical.rpartition(".")[2],)
            partial, widens = row.get("partial", False), row.get("widens", False)
            leaves.append(
                ModuleSpec(canonical, original, shape, kind, bias, False, tied_to, params, joins, partial, widens)
            )
            return
        arguments = {key: evaluate_integer(value, scope) for key, value in row.get("with", {}).items()}
        place = f"{canonical}." if canonical else ""
        original_place = f"{original}." if original else ""
        leaves += [placed(leaf, place, original_place) for leaf in self._template(row["use"], arguments)]

    def _template(self, name: str, arguments: dict[str, int]) -> list[ModuleSpec]:
        key = (name, tuple(sorted(arguments.items())))
        if key not in self._expanded:
            if name not in self._templates:
                raise ValueError(f"unknown template {name!r}")
            self._expanded[key] = self.expand(self._templates[name], arguments)
        return self._expanded[key]


def _piece(piece: Any, scope: Scope) -> Piece:
    if isinstance(piece, str):
        return fill(piece, scope), 0, ALL
    name, start, stop = piece
    return fill(name, scope), evaluate_integer(start, scope), evaluate_integer(stop, scope)


def _scopes(loops: Mapping[str, Value], scope: dict[str, Value]) -> Iterator[Scope]:
    """One scope for each combination of the loop variables; the later ones may use the earlier ones."""
    if not loops:
        yield scope
        return
    (name, values), *rest = loops.items()
    if isinstance(values, str):
        values = evaluate(values, scope)
    for value in range(values) if isinstance(values, int) else values:
        yield from _scopes(dict(rest), {**scope, name: value})
