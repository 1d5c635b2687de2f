"""What the trainers' own state dicts share: a decoder's layers under names of theirs, rows of heads in another order.

The tables' `tails` say which module of transformers' a name ends with; the beginning is `model.` there.  Which rows stand
where follows from the numbers of heads, which the base's config says (`--base CONFIG`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
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
    """The numbers of heads in the base's config.  Raises `UnknownFact` where it does not say them."""
    config: Mapping[str, Any] = component.config
    queries = _count(config, "num_attention_heads")
    keys = _count(config, "num_key_value_heads") or queries
    # Where none is stated, as transformers takes it.
    size = _count(config, "head_dim") or (_count(config, "hidden_size") // queries if queries else 0)
    if not queries or not keys or not size or queries % keys:
        raise errors.UnknownFact(
            f"the config of the base ({component.class_name}) does not say its heads: num_attention_heads, "
            "num_key_value_heads, hidden_size"
        )
    return Heads(queries, keys, size)


def _count(config: Mapping[str, Any], name: str) -> int:
    """A field that is a positive number; 0 where it is not there, or something else."""
    value = config.get(name)
    return value if type(value) is int and value > 0 else 0


def of_transformers(entry: Group) -> Group:
    """The group under transformers' name: its layers stand in `model`."""
    inside = entry.name.startswith("layers.")
    return replace(entry, name=f"model.{entry.name}") if inside else entry


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
