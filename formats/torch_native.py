"""What the trainers' own state dicts share: a decoder's layers under names of theirs, rows of heads in another order.

The tables' `tails` say which module of transformers' a name ends with; the beginning is `model.` there.  Which rows stand
where follows from the numbers of heads, which the base's config says (`--base CONFIG`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from adapterops.plugin import Adapter, Component, Format, Group, LazyTensor, Output, Request, Target, errors


class Heads(NamedTuple):
    """The heads of a decoder's attention: of the queries, of the keys (and values), and the rows of each."""

    queries: int
    keys: int
    size: int


def decoder(request: Request) -> Component | None:
    """The language model that the user gave; None where none was given."""
    base = request.architecture
    return base.components.get("model") if base is not None else None


def family(component: Component, known: Sequence[str], title: str) -> str:
    """The base's model type.  Raises `UnsupportedFormat` where the trainer's names for it are not known here."""
    kind = str(component.config.get("model_type", ""))
    if kind not in known:
        raise errors.UnsupportedFormat(
            f"how {title} lays out a {kind or component.class_name} is not known here; known: {', '.join(sorted(known))}"
        )
    return kind


def heads(component: Component) -> Heads:
    """The heads of a base model, by its config and its shapes.  Raises `UnknownFact` where the config does not say them.

    A config may leave out what its class's default is, which differs between classes (num_key_value_heads, head_dim): so the
    rest is told by the rows of the queries and the keys.
    """
    count = _count(component.config, "num_attention_heads")
    size, odd = divmod(rows_of(component, ".self_attn.q_proj"), count) if count else (0, 0)
    keys, left = divmod(rows_of(component, ".self_attn.k_proj"), size) if size else (0, 0)
    if not keys or odd or left or count % keys:
        raise errors.UnknownFact(
            f"the config of the base ({component.class_name}) does not say how many heads its attention has "
            "(num_attention_heads), or another number than its queries and keys have; add it to the config of --base"
        )
    return Heads(count, keys, size)


def rows_of(component: Component, end: str) -> int:
    """The rows of the first of the base's modules whose names end so; 0 where there is none."""
    return next((spec.shape[0] for name, spec in component.modules.items() if name.endswith(end)), 0)


def _count(config: Mapping[str, Any], name: str) -> int:
    """A field that is a positive number; 0 where it is not there, or something else."""
    value = config.get(name)
    return value if type(value) is int and value > 0 else 0


def of_transformers(entry: Group) -> Group:
    """The group under transformers' name: its layers stand in `model`."""
    inside = entry.name.startswith("layers.")
    return entry._replace(name=f"model.{entry.name}") if inside else entry


def taken(tensor: LazyTensor, pieces: Sequence[tuple[int, int]], rows: int, what: str) -> LazyTensor:
    """Rows of a tensor, which has `rows` of them as the base has it.

    Raises `BrokenAdapter` where it has others (a shard of tensor parallelism, another base).
    """
    if not tensor.shape or tensor.shape[0] != rows:
        raise errors.BrokenAdapter(
            f"{tensor.where}: shape {list(tensor.shape)}; {what} has {rows} rows in this base: is it the right --base, and the "
            "whole tensor, not the part of one device?",
            fault="other-shape",
        )
    return tensor.rows(pieces)


def rotated(size: int, head: int) -> list[int]:
    """For each row of a program that rotates neighbours, the row of transformers': (heads, 2, d/2) turned into (heads, d/2, 2).

    Raises `ValueError` for rows that are no heads of that size.
    """
    if head <= 0 or head % 2 or size % head:
        raise ValueError(f"{size} rows are no heads of {head}")
    half = head // 2
    return [start + pair * half + at for start in range(0, size, head) for at in range(half) for pair in range(2)]


def halved(tensor: LazyTensor, head: int, name: str, count: int | None = None, said_by: str = "--base") -> LazyTensor:
    """The rows (out_features, …) of queries or keys whose rotary embedding rotates neighbours, in transformers' order.

    `count` is the number of heads, where it is known, and `said_by` what says both.  Raises `BrokenAdapter` for rows that are no
    such heads.
    """
    from adapterops_formats.gguf_rows import with_rows

    rows = tensor.shape[0] if tensor.shape else 0
    try:
        order = rotated(rows, head)
        if count is not None and rows != count * head:
            raise ValueError(f"{rows} rows are not the {count} heads of {head}")
    except ValueError as error:
        raise errors.BrokenAdapter(
            f"{tensor.where}: {error}, as {name} has them by {said_by}; is it the right {said_by}?", fault="other-shape"
        ) from error
    return with_rows(tensor, order, back=True)


def of_unknown_order(tensor: LazyTensor, why: str) -> LazyTensor:
    """The tensor, which can be looked at and not read until the base says how its rows stand."""
    from adapterops_formats.gguf_rows import of_unknown_rows

    return of_unknown_rows(tensor, f"{tensor.where}: {why}; give the base's config with --base CONFIG")


class ReadOnly(Format):
    """A format that is read, and that its own program alone writes in a way that it reads again."""

    why_not_written = ""

    def write(self, adapter: Adapter, target: Target) -> Output:
        first = next((f"{tensor.where} ({u.name}): " for u in adapter for tensor in u.tensors.values()), "")
        raise errors.CannotRepresent(f"{first}{self.title} is read and never written: {self.why_not_written}")
