"""Expands the rows of an architecture's TOML file into modules.

A row describes one module, or a family of them:

    for        loop variables: a list of values, or an expression (a list's name, or a count n for 0 … n-1)
    canonical  name relative to the template's place, with `{expression}` fields; "" is the place itself
    original   the same for the authors' own repository; left out where it equals `canonical`
    and either
    use, with  the name of another template, and the integers that it takes
    or one kind, whose value is the shape of `weight`, integers or expressions:
    linear     (out, in)
    conv       (out, in, kernel height, kernel width)
    embedding  (num_embeddings, dim)
    norm       (channels,)
    bias       whether the module has a bias; by default all but embeddings have

A template sees its loop variables, its `with` arguments and the component's globals, not its caller's scope.
A projection that the authors fused (one original module, several canonical ones) needs one more column beside
`original`: the rows that the module takes in the fused weight. `Leaf` and `ModuleSpec` would carry it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from adapterops.architectures.expression import Scope, Value, evaluate, evaluate_integer, fill

KINDS = ("linear", "conv", "embedding", "norm")
_COLUMNS = frozenset({"for", "canonical", "original", "use", "with", "bias", *KINDS})

Row = Mapping[str, Any]


class Leaf(NamedTuple):
    """A module relative to the place where its template is used."""

    canonical: str
    original: str
    kind: str
    shape: tuple[int, ...]
    bias: bool


class Expander:
    """Expands templates against the globals of one component.

    Each template is expanded once for each set of arguments: an SDXL UNet has 70 transformer blocks, but
    only two different ones.
    """

    def __init__(self, templates: Mapping[str, list[Row]], scope: Scope) -> None:
        self._templates = templates
        self._globals = scope
        self._expanded: dict[tuple[str, tuple[tuple[str, int], ...]], list[Leaf]] = {}

    def expand(self, rows: list[Row], arguments: Mapping[str, int] | None = None) -> list[Leaf]:
        """The modules that `rows` describe. Raises ValueError, quoting the row, where one is wrong."""
        leaves: list[Leaf] = []
        for row in rows:
            try:
                for scope in _scopes(row.get("for", {}), {**self._globals, **(arguments or {})}):
                    self._expand_row(row, scope, leaves)
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"row {dict(row)!r}: {error}") from error
        return leaves

    def _expand_row(self, row: Row, scope: Scope, leaves: list[Leaf]) -> None:
        if not _COLUMNS.issuperset(row):
            raise ValueError(f"unknown columns {sorted(set(row) - _COLUMNS)}")
        canonical = fill(row["canonical"], scope)
        original = fill(row["original"], scope) if "original" in row else canonical
        kinds = [kind for kind in KINDS if kind in row]
        if len(kinds) + ("use" in row) != 1:
            raise ValueError(f"needs exactly one of use, {', '.join(KINDS)}")
        if kinds:
            if not canonical or not original:
                raise ValueError("a module needs a name")
            kind = kinds[0]
            shape = tuple(evaluate_integer(size, scope) for size in row[kind])
            leaves.append(Leaf(canonical, original, kind, shape, row.get("bias", kind != "embedding")))
            return
        arguments = {key: evaluate_integer(value, scope) for key, value in row.get("with", {}).items()}
        place = f"{canonical}." if canonical else ""
        original_place = f"{original}." if original else ""
        leaves.extend(
            Leaf(place + name, original_place + original_name, kind, shape, bias)
            for name, original_name, kind, shape, bias in self._template(row["use"], arguments)
        )

    def _template(self, name: str, arguments: dict[str, int]) -> list[Leaf]:
        key = (name, tuple(sorted(arguments.items())))
        if key not in self._expanded:
            if name not in self._templates:
                raise ValueError(f"unknown template {name!r}")
            self._expanded[key] = self.expand(self._templates[name], arguments)
        return self._expanded[key]


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
