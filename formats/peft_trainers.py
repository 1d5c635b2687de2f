"""PEFT folders in which a trainer left names of its own, read under the base model's.

- wrappers that torch puts around modules: `_orig_mod` (torch.compile), `_fsdp_wrapped_module`, `_checkpoint_wrapped_module`;
  what stands before a second `base_model.model.` (xtuner's `llm.`) is the trainer's class
- Tinker (Thinking Machines): the head is `model.unembed_tokens`, `.attn` stands for `.self_attn`, and the experts of a layer are
  stacked, (experts, r, in) and (experts, out, r), as `mlp.experts.w1` (gate), `w3` (up), `w2` (down); a factor that all experts
  share has one expert.  Where `w3` is empty, `w1` is up.  Each expert gets its own pair, as servers read them

Tinker trains on q, k and v, or on two halves, of some projections that the published model has in one (Qwen3.5's `in_proj_qkv`,
Nemotron's `in_proj`); those are refused.

Sources: thinking-machines-lab/tinker-cookbook `tinker_cookbook/weights/_adapter.py` (`_expand_expert_weights`),
`_merge_utils.py` (`build_name_remaps`), `_merge.py` (`expert_key_remaps`, `expand_expert_lora_tensors`), `_merge_nemotron.py`,
`_merge_gpt_oss.py`, `_merge_qwen3_5.py`; torch `torch/_dynamo/eval_frame.py` (`OptimizedModule`),
`torch/distributed/fsdp/_common_utils.py` (`FSDP_WRAPPED_MODULE`),
`torch/distributed/algorithms/_checkpoint/checkpoint_wrapper.py`; InternLM/xtuner `xtuner/model/sft.py` (`self.llm`)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from adapterops.plugin import Group, LazyTensor, Reading, Request, errors

_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_INNER = "base_model.model."
"""What peft's own class puts in front of names; nothing of a base model is called so."""
_HEAD = re.compile(r"(?:.*\.)?unembed_tokens")
_STACKED = re.compile(r"(.*\.experts)\.(w[123])")
_ATTENTION = re.compile(r"(.*\blayers\.\d+)\.attn(\..*)")
_PARTS = re.compile(r".*\.linear_attn\.in_proj_[qkv]|.*\.mixer\.x_proj")
_EXPERT = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def without_wrappers(reading: Reading) -> Reading:
    """The reading with modules under their own names."""
    if not any(_is_wrapped(claim.key) for claim in reading.claims):
        return reading
    before = {c.name.rpartition(_INNER)[0] for c in reading.claims}
    alone = len(before) == 1  # two models in one file keep their beginnings
    claims = tuple(c._replace(name=_plain(c.name.rpartition(_INNER)[2] if alone else c.name)) for c in reading.claims)
    return reading._replace(claims=claims)


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def wrapped_note(reading: Reading) -> list[str]:
    """A note on names that `without_wrappers` changed."""
    lead = reading.prefix if reading.prefix is not None else _INNER
    changed = next((c for c in reading.claims if _is_wrapped(c.key) and not _stands(c.key, lead + c.name)), None)
    return [f"tensor {changed.key!r} and others are read as of {changed.name} and the like"] if changed else []


def _stands(key: str, name: str) -> bool:
    return key.startswith(name) and _WRAPPERS.isdisjoint(key[len(name) :].split("."))


def _is_wrapped(key: str) -> bool:
    if key.find(_INNER, 1) > 0:
        return True
    # Most keys have nothing of the kind, which is told without taking them apart.
    return ("_orig_mod" in key or "_wrapped_module" in key) and not _WRAPPERS.isdisjoint(key.split("."))


def names_of_tinker(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The keys of a file, of these shapes, whose modules only Tinker calls so."""
    out = []
    for key, shape in shapes.items():
        name = key.removeprefix(_INNER).rpartition(".lora_")[0]
        if _HEAD.fullmatch(name) or (_STACKED.fullmatch(name) and len(shape) == 3):
            out.append(key)
    return out


def of_tinker(groups: Sequence[Group]) -> bool:
    """Whether Tinker wrote the file."""
    return any(
        _HEAD.fullmatch(entry.name)
        or (_STACKED.fullmatch(entry.name) and any(len(t.shape) == 3 for t in entry.tensors.values()))
        for entry in groups
    )


def as_published(groups: list[Group], request: Request, said: list[str]) -> list[Group]:
    """Tinker's groups under the published model's names, a group for each expert; others as they are."""
    if not of_tinker(groups):
        return groups
    said.append(
        "names are Tinker's: unembed_tokens is lm_head, experts.w1, w3 and w2 are gate_proj, up_proj and down_proj"
    )
    empty = {entry.name for entry in groups if all(t.numel == 0 for t in entry.tensors.values())}
    out: list[Group] = []
    for entry in groups:
        try:
            out += _settled(entry, empty) if entry.name not in empty else ()
        except errors.AdapterOpsError as error:
            request.wrong(error, (tensor.key for tensor in entry.tensors.values()))
    return out


def _settled(entry: Group, empty: set[str]) -> Iterator[Group]:
    stacked = _STACKED.fullmatch(entry.name)
    attention = _ATTENTION.fullmatch(entry.name)
    if _PARTS.fullmatch(entry.name):
        first = next(iter(entry.tensors.values()))
        raise errors.UnsupportedFormat(
            f"{first.where}: is for a part of a projection that the published model has in one; this version does not join them: "
            "build_lora_adapter of tinker-cookbook does"
        )
    if stacked is not None:
        stem, which = stacked[1], stacked[2]
        name = "up_proj" if which == "w1" and f"{stem}.w3" in empty else _EXPERT[which]
        yield from _experts(entry, stem, name)
    elif _HEAD.fullmatch(entry.name):
        yield entry._replace(name="lm_head", stated=entry.name)
    elif attention is not None:
        yield entry._replace(name=f"{attention[1]}.self_attn{attention[2]}", stated=entry.name)
    else:
        yield entry


def _experts(entry: Group, stem: str, name: str) -> Iterator[Group]:
    """A group for each expert.  Raises `BrokenAdapter` for factors of different numbers of them."""
    counts = {role: tensor.shape[0] for role, tensor in entry.tensors.items() if len(tensor.shape) == 3}
    many = max(counts.values(), default=0)
    odd = next((t for r, t in entry.tensors.items() if counts.get(r) not in (1, many)), None)
    if odd is not None:
        raise errors.BrokenAdapter(
            f"{odd.where}: shape {list(odd.shape)} is no stack of {many} experts' factors, nor one that they share",
            fault="other-shape",
        )
    for expert in range(many):
        tensors = {role: _of(tensor, expert if counts[role] > 1 else 0) for role, tensor in entry.tensors.items()}
        yield entry._replace(name=f"{stem}.{expert}.{name}", tensors=tensors)


def _of(tensor: LazyTensor, expert: int) -> LazyTensor:
    """One expert's matrix of (experts, rows, columns)."""
    experts, rows, columns = tensor.shape
    return tensor.reshape((experts * rows, columns)).rows([(expert * rows, (expert + 1) * rows)])
