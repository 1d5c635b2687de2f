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


class ReadOnly(Format):
    """A format that is read, and that its own program alone writes in a way that it reads again."""

    why_not_written = ""

    def write(self, adapter: Adapter, target: Target) -> Output:
        first = next((f"{tensor.where} ({u.name}): " for u in adapter for tensor in u.tensors.values()), "")
        raise errors.CannotRepresent(f"{first}{self.title} is read and never written: {self.why_not_written}")
