"""Alpha and the scale that loaders compute from it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from fractions import Fraction
from math import sqrt

from adapterops.adapter import Certainty, Update
from adapterops.dialects.table import AlphaIn
from adapterops.errors import AdapterOpsError
from adapterops.methods import METHODS
from adapterops.storage.dtypes import decode_scalar, encode_scalar
from adapterops.storage.source import FOLDER_WEIGHTS
from adapterops.validation.registry import Checker, checker
from adapterops.validation.rule import Finding, Needs, Rule, Severity
from adapterops.validation.subject import Subject

TWO_ALPHAS = Rule(
    "S401",
    "two-alphas",
    Severity.ERROR,
    why="A tensor, the header or the config say different alphas, and each loader reads another of them.",
    remedy="Find out which alpha was trained with; take the other out, or say which to believe: adapterops "
    "convert FILE --to FORMAT --alpha tensors (or header, config).",
    fires="x.alpha is 4, and lora_alpha of the header's lora_adapter_metadata is 8",
    passes="x.alpha is 4, and so is lora_alpha",
    faults=("two-alphas",),
)
CONFLICT = Rule(
    "S402",
    "conflicting-facts",
    Severity.ERROR,
    why="Two places of the adapter state one fact differently, so what it computes depends on which of them is read.",
    remedy="Correct the one that is wrong; the message shows both.",
    fires="lora_adapter_metadata in the header says r 8, and the tensors have rank 4",
    passes="r 4 and rank 4",
    faults=("conflict",),
)
UNKNOWN_FACT = Rule(
    "S403",
    "unknown-fact",
    Severity.ERROR,
    why="Something that the weights mean nothing without, alpha above all, stands nowhere, so a loader refuses or guesses.",
    remedy="Name the file adapter_model.safetensors beside its adapter_config.json, or "
    "`adapterops convert --to peft --alpha X` with the trainer's lora_alpha.",
    fires="mine.safetensors with base_model.model.… keys, which no config goes with",
    passes="adapter_model.safetensors beside an adapter_config.json that has r and lora_alpha",
    faults=("unknown-fact",),
)
ZERO_ALPHA = Rule(
    "S404",
    "zero-alpha",
    Severity.ERROR,
    why="ComfyUI and peft multiply the update by alpha / rank, which is nothing, while sd-scripts takes 0 to mean the rank.",
    remedy="Write the alpha that was trained with: verl's model_merger leaves 0 where it does not know it; where sd-scripts was "
    "told 0, it is the rank.",
    fires="x.alpha holds 0, or lora_alpha is 0",
    passes="x.alpha holds 4",
    source="kohya-ss/sd-scripts networks/lora.py (LoRAModule); ComfyUI comfy/weight_adapter/lora.py; "
    "peft 0.21 tuners/lora/layer.py; volcengine/verl verl/model_merger/base_model_merger.py (save_lora_adapter)",
)
NEGATIVE_ALPHA = Rule(
    "S405",
    "negative-alpha",
    Severity.WARNING,
    why="A negative alpha turns the update round: the adapter takes away what it was trained to add.",
    remedy="Write it without the sign; an adapter is reversed by a negative strength when it is applied.",
    fires="x.alpha holds -4",
    passes="x.alpha holds 4",
)
ALPHA_SHAPE = Rule(
    "S406",
    "alpha-not-scalar",
    Severity.ERROR,
    why="Loaders take alpha for one number, and raise where the tensor holds several or none.",
    remedy="Store one number a module, a tensor without axes.",
    fires="x.alpha with shape [4]",
    passes="x.alpha with shape []",
    faults=("alpha-shape",),
    source="diffusers 0.42 loaders/lora_conversion_utils.py (`.item()`)",
)
ROUNDED_ALPHA = Rule(
    "S407",
    "rounded-alpha",
    Severity.INFO,
    why="The file's 16-bit type cannot hold this alpha, so loaders apply a slightly different strength than was trained.",
    remedy="Store alpha tensors as float32, or train with an alpha that the type holds (a power of two).",
    fires="x.alpha in bfloat16 holds 0.10009765625, which was 0.1",
    passes="x.alpha in bfloat16 holds 0.125",
)
HEADER_ALPHA_UNREAD = Rule(
    "S408",
    "alpha-only-in-header",
    Severity.INFO,
    why="ComfyUI and others that go by alpha tensors ignore the header's config and apply scale 1.",
    remedy="Run adapterops convert FILE --to diffusers --fold-alpha, which puts the scale into the factors for every reader.",
    fires="header lora_adapter_metadata with lora_alpha 8 and r 4, and no .alpha tensors",
    passes="lora_alpha 4 and r 4, so that scale 1 is right",
    source="diffusers 0.42 loaders/lora_base.py (LORA_ADAPTER_METADATA_KEY); ComfyUI #12191",
)
HEADER_DISAGREES = Rule(
    "S409",
    "header-alpha-or-dim",
    Severity.WARNING,
    why="The trainer's own header names an alpha or a rank that no module has, so the weights or the header were changed since.",
    remedy="Loaders go by the tensors; set ss_network_dim and ss_network_alpha right, or take them out.",
    fires="ss_network_dim 32, and every module has rank 4",
    passes="ss_network_dim 4, rank 4 (other ranks in some blocks are no matter)",
    faults=("header-alpha",),
)
NO_ALPHA_STORED = Rule(
    "S410",
    "format-without-alpha",
    Severity.WARNING,
    why="The format keeps no alpha, so whoever loads the adapter must know with which strength it was trained.",
    remedy="Run adapterops convert FILE --to peft --alpha X with the trainer's alpha, which writes it down.",
    fires="a loralib checkpoint: x.lora_A, x.lora_B and nothing else",
    passes="a PEFT folder, whose config has lora_alpha",
    source="microsoft/LoRA loralib/utils.py (lora_state_dict)",
)
PART_WITHOUT_ALPHA = Rule(
    "S411",
    "alpha-missing-in-part",
    Severity.WARNING,
    why="Some modules have an alpha and others have none and get scale 1, which is hardly what was trained.",
    remedy="Store the alpha of every module; the trainer's header may have it (ss_network_alpha).",
    fires="one.alpha beside one.lora_up.weight, and two.lora_up.weight without an alpha",
    passes="an alpha for every module, or for none",
)
SPLIT_QKV = Rule(
    "S412",
    "split-qkv-scale",
    Severity.WARNING,
    why="sd-scripts trains split_qkv's parts at alpha / r and saves them as one of rank 3·r with alpha unchanged, so that every "
    "loader applies a third of the trained strength.",
    remedy="Run adapterops convert FILE --to kohya --alpha trained, which restores it; or load it at three times the strength.",
    fires="a block-diagonal lora_unet_joint_blocks_0_x_block_attn_qkv.lora_up.weight [4608, 12], alpha 4",
    passes="the same projection trained whole",
    needs=Needs.TENSORS,
    source="kohya-ss/sd-scripts networks/lora_flux.py (state_dict), lora_sd3.py",
)
LOKR_ALPHA = Rule(
    "S413",
    "lokr-idle-alpha",
    Severity.WARNING,
    why="With two whole factors ComfyUI and LyCORIS ignore alpha, and peft, which trained this, does not.",
    remedy="Run adapterops convert FOLDER --to peft --fold-alpha, which makes the scale 1; all of them apply that.",
    fires="--targets comfy, peft_type LOKR, r 4, alpha 8, lokr_w1 and lokr_w2 both whole",
    passes="the same with alpha 4, or with lokr_w2_a and lokr_w2_b",
    source="LyCORIS lycoris/modules/lokr.py; ComfyUI comfy/weight_adapter/lokr.py; peft 0.21 tuners/lokr/layer.py",
)
RSLORA = Rule(
    "S414",
    "rslora-ignored",
    Severity.WARNING,
    why="llama.cpp's converter writes lora_alpha as it stands and ignores use_rslora, so the adapter is √r times too weak there.",
    remedy="Run adapterops convert FOLDER --to peft --fold-alpha first, which leaves scale 1 and no use_rslora.",
    fires="--targets gguf and use_rslora true",
    passes="--targets gguf and use_rslora false",
    source="llama.cpp convert_lora_to_gguf.py (set_gguf_parameters)",
)
HUGE_SCALE = Rule(
    "S415",
    "huge-scale",
    Severity.WARNING,
    why="A scale above 100 is far from what any trainer uses, and usually means that alpha and rank were mixed up.",
    remedy="Compare r and lora_alpha (or the alpha tensors) with the training's settings.",
    fires="r 1, lora_alpha 256",
    passes="r 1, lora_alpha 32",
)

_SCALE_TOO_LARGE = 100


@checker(UNKNOWN_FACT, NO_ALPHA_STORED)
def unknown(subject: Subject) -> Iterator[Finding]:
    """Updates whose alpha no source holds."""
    if subject.adapter is None or subject.recognised is None:
        return
    lost = [u for u in subject.updates if u.alpha is not None and u.alpha.certainty is Certainty.UNKNOWN]
    if not lost:
        return
    title = subject.recognised[1].dialect.title
    if not subject.recognised[0].is_folder:
        yield NO_ALPHA_STORED.found(
            subject.weights, f"{title} stores no alpha: the strength of {_count(lost)} is not in the file", _keys(lost)
        )
    elif os.path.basename(subject.weights) not in FOLDER_WEIGHTS and not subject.faults:
        # (Beside those a config belongs, and where that is lost or broken it is told of by itself.)
        yield UNKNOWN_FACT.found(
            subject.weights,
            f"no tensor, header or config holds the alpha of {_count(lost)}; their strength would be a guess",
            _keys(lost),
        )


@checker(ZERO_ALPHA, NEGATIVE_ALPHA, HUGE_SCALE)
def odd(subject: Subject) -> Iterator[Finding]:
    """Alphas that no training uses."""
    known = [u for u in subject.updates if u.alpha is not None and u.alpha.value is not None]
    ranked = [u for u in known if METHODS[u.method].rank(u)]  # without a rank alpha does nothing
    zero = [u for u in ranked if u.alpha and u.alpha.value == 0 and scale_of(u) == 0]
    if zero:
        yield _about_alpha(subject, ZERO_ALPHA, zero, "alpha is 0", "it adds nothing in peft and ComfyUI")
    negative = [u for u in ranked if u.alpha and (u.alpha.value or 0) < 0]
    if negative:
        value = negative[0].alpha.value if negative[0].alpha else 0
        yield _about_alpha(subject, NEGATIVE_ALPHA, negative, f"alpha is {value:g}", "the update is reversed")
    huge = [u for u in ranked if u.method == "lora" and (scale_of(u) or 0) > _SCALE_TOO_LARGE]
    if huge:
        scale = scale_of(huge[0]) or 0
        yield _about_alpha(
            subject, HUGE_SCALE, huge, f"{huge[0].alpha.value if huge[0].alpha else 0:g} is its alpha",
            f"at rank {METHODS['lora'].rank(huge[0])} the scale is {scale:g}",
        )  # fmt: skip


@checker(ROUNDED_ALPHA)
def rounded(subject: Subject) -> Iterator[Finding]:
    """Alpha tensors of 16 bits that hold what a rounded decimal gives."""
    if subject.adapter is None:
        return
    alphas = subject.adapter.provenance.folded
    meant: dict[tuple[str, float], float | None] = {}
    found: list[tuple[Update, str, float, float, str]] = []
    for update in subject.updates:
        tensor = subject.tensors.get(alphas.get(update.key, ""))
        value = update.alpha.value if update.alpha is not None else None
        if tensor is None or value is None or tensor.dtype not in _PRECISION:
            continue
        at = (tensor.dtype, value)
        if at not in meant:
            meant[at] = before_rounding(tensor.dtype, value)
        decimal = meant[at]
        if decimal is not None:
            found.append((update, tensor.key, value, decimal, tensor.dtype))
    if found:
        _, key, value, decimal, dtype = found[0]
        more = f" ({len(found) - 1} more like it)" if len(found) > 1 else ""
        off = abs(value - decimal) / decimal
        yield ROUNDED_ALPHA.found(
            subject.weights,
            f"{key!r} holds {value!r}, probably {decimal:g} rounded to {dtype}: {off * 100:.2g}% off{more}",
            [entry[1] for entry in found],
        )


_PRECISION = {"F16": 11, "BF16": 8}
"""Significant bits."""


def before_rounding(dtype: str, value: float) -> float | None:
    """The short decimal number that `value` of a 16-bit type probably was, None where it is itself one, or a small fraction.

    Halves, quarters and so on are meant: only numbers that use nearly all of the type's bits were probably rounded.
    """
    bits = Fraction(value).numerator.bit_length()
    if value <= 0 or Fraction(value).denominator == 1 or bits < _PRECISION[dtype] - 2:
        return None
    for digits in range(1, 6):
        decimal = float(f"{value:.{digits}g}")
        if decimal == value:
            return None
        if _nearest(dtype, decimal) == value:
            return decimal
    return None


def _nearest(dtype: str, number: float) -> float:
    """The number of a 16-bit type next to `number`."""
    from adapterops.storage.dtypes import from_numpy

    exact = encode_scalar(dtype, number)
    if exact is None:
        import numpy as np

        exact = from_numpy(dtype, np.array([number], "f8"))
    return decode_scalar(dtype, exact)


def scaled_by_header(subject: Subject) -> list[Update]:
    """The updates whose scale stands in a header's config alone, and is not 1."""
    if subject.config is not None or subject.recognised is None:
        return []
    if subject.recognised[1].dialect.alpha is not AlphaIn.CONFIG:
        return []
    return [
        u
        for u in subject.updates
        if u.component != "model"  # a language model, which ComfyUI does not load
        and u.alpha is not None
        and u.alpha.certainty is Certainty.READ
        and not u.alpha.source.startswith("tensor ")
        and scale_of(u) not in (None, 1.0)
    ]


@checker(HEADER_ALPHA_UNREAD)
def header_only(subject: Subject) -> Iterator[Finding]:
    """A scale that stands in a header's config alone; of ComfyUI by name the loaders' rules speak."""
    scaled = scaled_by_header(subject) if "comfy" not in subject.options.targets else []
    if scaled:
        yield HEADER_ALPHA_UNREAD.found(
            subject.weights,
            f"the scale of {_count(scaled)} stands in the header's config alone: {scaled[0].name} has "
            f"{scale_of(scaled[0]):.4g} there, and ComfyUI applies 1",
            _keys(scaled),
            field="lora_adapter_metadata" if "lora_adapter_metadata" in subject.metadata else "",
        )


@checker(HEADER_DISAGREES)
def header_rank(subject: Subject) -> Iterator[Finding]:
    """The header's rank, where no module has it.  (Its alpha is compared when the file is read.)"""
    stated = subject.metadata.get("ss_network_dim", "")
    ranks = {METHODS["lora"].rank(u) for u in subject.updates if u.method == "lora"}
    others = any(u.method not in ("lora", "diff", "saved", "bundled") for u in subject.updates)
    if not stated.isdecimal() or not ranks or others:
        return
    rank = int(stated[:9])
    # sd-scripts stores the parts of a split projection as one, of as many times the rank.
    if not any(own in (rank, 2 * rank, 3 * rank, 4 * rank) for own in ranks):
        yield HEADER_DISAGREES.found(
            subject.weights,
            f"ss_network_dim is {rank}, and the modules have rank {several_numbers(r for r in ranks if r)}",
            field="ss_network_dim",
        )


def several_numbers(numbers: Iterator[int]) -> str:
    """A few numbers, in order."""
    ordered = sorted(numbers)
    return ", ".join(map(str, ordered[:4])) + (" …" if len(ordered) > 4 else "")


@checker(PART_WITHOUT_ALPHA)
def in_part(subject: Subject) -> Iterator[Finding]:
    """Modules without an alpha beside others that have one."""
    if subject.adapter is None or subject.recognised is None or subject.recognised[1].unclaimed:
        return  # a key that nobody knows, which is told of, may be an alpha
    folded = subject.adapter.provenance.folded
    scaled = [u for u in subject.updates if u.alpha is not None]
    without = [u for u in scaled if u.key not in folded and u.alpha and u.alpha.certainty is Certainty.ASSUMED]
    if without and len(without) < len(scaled) and folded:
        other = next(u for u in scaled if u.key in folded)
        # Whatever the others have: where their scale is 1 too, nothing is lost.
        if all(scale_of(u) in (1.0, None) for u in scaled if u.key in folded):
            return
        yield PART_WITHOUT_ALPHA.found(
            subject.weights,
            f"{_count(without)} of {len(scaled)} without an alpha, so at scale 1 ({without[0].name}), while {other.name} has "
            f"scale {scale_of(other):.4g}",
            _keys(without),
        )


@checker(SPLIT_QKV)
def split_qkv(subject: Subject) -> Iterator[Finding]:
    """Fused projections whose factor is block-diagonal, as sd-scripts saves what it trained apart."""
    base = subject.adapter.base if subject.adapter is not None else None
    if base is None or subject.recognised is None or subject.recognised[1].dialect.alpha is not AlphaIn.TENSOR:
        return
    from adapterops.operations.fused import block_ranks

    found: list[tuple[Update, int]] = []
    for update in subject.updates:
        component = base.components.get(update.component)
        spec = component.fused.get(update.module) if component is not None else None
        if spec is None or update.alpha is None or update.alpha.certainty is not Certainty.READ:
            continue
        ranks = block_ranks(update, spec)
        # What was converted with the strength that readers apply says so by an alpha for the whole rank.
        if ranks is not None and not _is_adapted(subject, update, len(ranks)):
            found.append((update, len(ranks)))
    if found:
        update, parts = found[0]
        share = {2: "half", 3: "a third", 4: "a quarter"}.get(parts, f"1/{parts}")
        yield SPLIT_QKV.found(
            subject.weights,
            f"{_count([u for u, _ in found])} of sd-scripts' split_qkv, stored block-diagonal ({update.name}, "
            f"{parts} parts): loaders apply {share} of the strength that was trained",
            _keys(u for u, _ in found),
        )


def _is_adapted(subject: Subject, update: Update, parts: int) -> bool:
    """Whether the alpha is as many times the others' as the projection has parts: then the strength is right."""
    usual = {
        u.alpha.value
        for u in subject.updates
        if u.alpha is not None and u.alpha.value and u is not update and METHODS[u.method].rank(u)
    }
    value = update.alpha.value if update.alpha is not None else None
    return value is not None and value not in usual - {value} and any(v * parts == value for v in usual if v)


@checker(LOKR_ALPHA)
def lokr_alpha(subject: Subject) -> Iterator[Finding]:
    """LoKrs of peft with two whole factors and an alpha, for ComfyUI."""
    if "comfy" not in subject.options.targets:
        return
    whole = [u for u in subject.updates if u.method == "lokr" and {"w1", "w2"} <= u.tensors.keys()]
    scaled = [u for u in whole if scale_of(u) not in (1.0, None)]
    if scaled:
        yield LOKR_ALPHA.found(
            subject.weights,
            f"{_count(scaled)} with two whole factors: scale {METHODS['lokr'].scale(scaled[0]):.4g} in peft, and ComfyUI "
            f"applies 1 ({scaled[0].name})",
            _keys(scaled),
        )


@checker(RSLORA)
def rslora(subject: Subject) -> Iterator[Finding]:
    """use_rslora, for llama.cpp."""
    if "gguf" not in subject.options.targets:
        return
    stabilised = [u for u in subject.updates if u.rslora and (METHODS[u.method].rank(u) or 0) > 1]
    if stabilised:
        rank = METHODS[stabilised[0].method].rank(stabilised[0]) or 1
        yield RSLORA.found(
            subject.config_path if subject.config is not None else subject.weights,
            f"use_rslora is true: llama.cpp would apply alpha / {rank} where alpha / {sqrt(rank):.3g} was trained",
            field="use_rslora",
        )


def _about_alpha(subject: Subject, rule: Rule, updates: list[Update], what: str, effect: str) -> Finding:
    """A finding about the alphas of some updates, in the file where these stand."""
    first = updates[0]
    folded = subject.adapter.provenance.folded if subject.adapter is not None else {}
    keys = [folded[u.key] for u in updates if u.key in folded]
    more = f" ({len(updates) - 1} more like it)" if len(updates) > 1 else ""
    in_config = not keys and subject.config is not None
    return rule.found(
        subject.config_path if in_config else subject.weights,
        f"{first.name}: {what}; {effect}{more}",
        keys or _keys(updates),
        field="lora_alpha" if in_config else "",
    )


def scale_of(update: Update) -> float | None:
    """The factor on the update's product; None where it has none, and where a fact that it needs is missing."""
    try:
        return METHODS[update.method].scale(update)
    except AdapterOpsError:
        return None


def _count(updates: list[Update]) -> str:
    return "1 module" if len(updates) == 1 else f"{len(updates)} modules"


def _keys(updates: Iterator[Update] | list[Update]) -> list[str]:
    return [tensor.key for update in updates for tensor in update.tensors.values()]


RULES: tuple[Rule, ...] = (
    TWO_ALPHAS,
    CONFLICT,
    UNKNOWN_FACT,
    ZERO_ALPHA,
    NEGATIVE_ALPHA,
    ALPHA_SHAPE,
    ROUNDED_ALPHA,
    HEADER_ALPHA_UNREAD,
    HEADER_DISAGREES,
    NO_ALPHA_STORED,
    PART_WITHOUT_ALPHA,
    SPLIT_QKV,
    LOKR_ALPHA,
    RSLORA,
    HUGE_SCALE,
)
CHECKERS: tuple[Checker, ...] = (
    unknown,
    odd,
    rounded,
    header_only,
    header_rank,
    in_part,
    split_qkv,
    lokr_alpha,
    rslora,
)
