"""Experts: transformers keeps those of a layer in one parameter, GGUF in a stack for each projection.

peft's LoRA on such a parameter (E, out, in) has A (E·r, in), B (out, r·E), experts and ranks in B the other way round
(`lora_parameters`).  In GGUF a stack's `lora_a` is (E, r, in), its `lora_b` (E, out, r).  The gate and the up projection,
rows of one parameter here, are stacks of their own there, and A goes to both.  The way back joins them: where both have one
A, the rows of their B's are stacked, else the ranks add up (A of both, a block diagonal of the B's), which needs equal
ranks, since a stack's scale is alpha over its own.

Sources: https://github.com/ggml-org/llama.cpp `conversion/qwen.py` (`Qwen2MoeModel.modify_tensors`), `src/llama-graph.cpp`
(`build_lora_mm_id`); peft `tuners/lora/layer.py` (`ParamWrapper`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from adapterops_formats.gguf_rows import exchanged

from adapterops.plugin import LazyTensor, Update, columns, errors, maths, same_bytes, stack, zeros


def taken_apart(update: Update, parts: Sequence[str]) -> list[Update]:
    """The stacks that an update of a parameter becomes, by the ends of their names in transformers.

    Raises `CannotRepresent` where the parameter stands the other way round, or its rows are no such parts.
    """
    method = maths("lora_parameters").LORA_PARAMETERS
    a, b = update.tensors["A"], update.tensors["B"]
    if method.transposed(update):
        raise errors.CannotRepresent(
            f"{a.where}: {update.module} is (experts, in, out) in this base; the experts of a GGUF file are (experts, out, in)"
        )
    count, rank, rows = method.experts(update), method.rank(update), b.shape[0]
    if rows % len(parts):
        raise errors.CannotRepresent(f"{b.where}: {rows} rows are not those of {' and '.join(parts)}")
    size = rows // len(parts)
    out = []
    for at, part in enumerate(parts):
        own = b.rows([(at * size, (at + 1) * size)]) if len(parts) > 1 else b
        tensors = {
            "A": a.reshape((count, rank, a.shape[1])),
            "B": exchanged(own, (size, rank, count), (2, 0, 1), (count, size, rank)),
        }
        options = {**update.options, "shape": (count, size, a.shape[1]), "r": rank}
        out.append(replace(update, module=part, tensors=tensors, options=options))
    return out


def joined(parts: Sequence[dict[str, LazyTensor] | None], name: str) -> dict[str, LazyTensor]:
    """The factors of the parameter of which these stacks are parts; None for one that the file has not.

    Raises `UnsupportedFormat` where no single update does what they do, `BrokenAdapter` for stacks that are none.
    """
    present = [part for part in parts if part is not None]
    for part in present:
        _insist_on_stacks(part)
    first = present[0]
    count, rank, inputs = first["A"].shape
    size = first["B"].shape[1]
    for part in present[1:]:
        if (part["A"].shape[0], part["A"].shape[2], part["B"].shape[1]) != (count, inputs, size):
            raise errors.BrokenAdapter(
                f"{part['B'].where}: {list(part['B'].shape)} and {first['B'].key!r} {list(first['B'].shape)} are not parts of "
                f"one weight ({name})",
                keys=(part["B"].key, first["B"].key),
            )
    if all(same_bytes(first["A"], part["A"]) for part in present[1:]):
        bs = [
            _side_by_side(part["B"]) if part is not None else zeros(first["B"], (size, rank * count)) for part in parts
        ]
        return {"A": first["A"].reshape((count * rank, inputs)), "B": _stacked(bs, name)}
    ranks = {part["A"].shape[1] for part in present}
    if len(ranks) > 1:
        raise errors.UnsupportedFormat(
            f"{first['A'].where}: the parts of {name} have ranks {sorted(ranks)}, and so two scales; transformers keeps them in "
            "one weight, whose adapter has one"
        )
    # A stack of matrices is one of their rows: of each expert the rows of the first part's A, then of the next one's.
    flat = [part["A"].reshape((count * rank, inputs)) for part in present]
    a = _stacked([f.rows([(e * rank, (e + 1) * rank)]) for e in range(count) for f in flat], name)
    width = rank * count * len(present)
    bs = [columns(_side_by_side(part["B"]), at * rank * count, width) for at, part in enumerate(present)]
    return {"A": a, "B": _stacked(bs, name)}


def _side_by_side(b: LazyTensor) -> LazyTensor:
    """(E, out, r) as (out, r · E)."""
    count, size, rank = b.shape
    return exchanged(b, (count, size, rank), (1, 2, 0), (size, rank * count))


def _insist_on_stacks(part: dict[str, LazyTensor]) -> None:
    if part.keys() != {"A", "B"}:
        tensor = next(iter(part.values()))
        raise errors.BrokenAdapter(f"{tensor.where}: its counterpart is missing from the file", fault="missing-half")
    a, b = part["A"], part["B"]
    if len(a.shape) != 3 or len(b.shape) != 3 or a.shape[0] != b.shape[0] or 0 in (*a.shape, *b.shape):
        raise errors.BrokenAdapter(
            f"{b.where}: shape {list(b.shape)} and {a.key!r} {list(a.shape)} are no factors of a stack of experts",
            keys=(a.key, b.key),
        )
    if a.shape[1] != b.shape[2]:
        raise errors.BrokenAdapter(
            f"{b.where}: shape {list(b.shape)} has rank {b.shape[2]}, but {a.key!r} {list(a.shape)} has rank {a.shape[1]}; they "
            "are not halves of one update",
            fault="ranks",
            keys=(a.key, b.key),
        )


def _stacked(tensors: Sequence[LazyTensor], name: str) -> LazyTensor:
    try:
        return stack(tensors)
    except ValueError as error:
        raise errors.UnsupportedFormat(f"{error}: they are parts of {name}, which transformers keeps in one") from error
