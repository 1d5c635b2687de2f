"""Tensors by themselves: halves, ranks, shapes, types and names, as headers have them.  Values: `values.py`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from math import prod

from adapterops.adapter import Update
from adapterops.dialects.match import Claim, Reading
from adapterops.dialects.table import AlphaIn
from adapterops.methods import METHODS
from adapterops.storage import LazyTensor
from adapterops.storage.dtypes import FLOATS, NUMBERS
from adapterops.validation.names import is_wrapped
from adapterops.validation.registry import Checker, checker
from adapterops.validation.rule import Change, Finding, Rule, Severity, several
from adapterops.validation.rules import values
from adapterops.validation.subject import Subject

MISSING_HALF = Rule(
    "T101",
    "missing-half",
    Severity.ERROR,
    why="Half of an update does nothing: loaders raise, or leave the module as it was.",
    remedy="Save the adapter again; if the training no longer exists, take the other half out of the file as well.",
    fires="q_proj.lora_A.weight without q_proj.lora_B.weight",
    passes="both of them",
    faults=("missing-half",),
)
RANKS = Rule(
    "T102",
    "ranks-disagree",
    Severity.ERROR,
    why="Factors of different ranks cannot be multiplied, so loading fails.",
    remedy="Save the adapter again; factors of two trainings, or of two ranks, were mixed.",
    fires="lora_A.weight [8, 64] beside lora_B.weight [64, 4]",
    passes="lora_A.weight [8, 64] beside lora_B.weight [64, 8]",
    faults=("ranks",),
)
SHAPE = Rule(
    "T103",
    "impossible-shape",
    Severity.ERROR,
    why="No module can have an update of this shape by the method that the key names, so loading fails.",
    remedy="Look whether a tool flattened, transposed or renamed the tensor; then save the adapter again.",
    fires="q_proj.lora_A.weight [256]",
    passes="q_proj.lora_A.weight [4, 64]",
    faults=("impossible-shape",),
)
TWICE = Rule(
    "T104",
    "module-twice",
    Severity.ERROR,
    why="One module has two updates under two spellings, and which of them counts depends on the loader.",
    remedy="Take one of the two out.",
    fires="unet.x.to_q.lora.down.weight and unet.x.processor.to_q_lora.down.weight",
    passes="one of them",
    faults=("twice",),
)
EMPTY = Rule(
    "T105",
    "empty-tensor",
    Severity.ERROR,
    why="A factor without numbers was saved by one process of a sharded training (DeepSpeed ZeRO-3, FSDP), which held none.",
    remedy="Gather the weights before saving: zero_to_fp32.py, stage3_gather_16bit_weights_on_model_save, "
    "or FSDP's full state dict.",
    fires="q_proj.lora_A.weight [0]",
    passes="q_proj.lora_A.weight [4, 64]",
    faults=("empty",),
    source="peft docs, DeepSpeed; peft #1430",
)
MIXED_FACTORS = Rule(
    "T120",
    "mixed-dtypes",
    Severity.WARNING,
    why="The factors of one update have different types, which nobody saves: half the file went through another tool.",
    remedy="Save all factors in one type: adapterops convert FILE --to FORMAT --dtype bfloat16.",
    fires="lora_A.weight F32 beside lora_B.weight F16",
    passes="both F16 (an alpha or a DoRA magnitude may differ)",
)
MIXED_MODULES = Rule(
    "T121",
    "modules-of-two-dtypes",
    Severity.INFO,
    why="Some modules of a component are in another type than the rest, as merges of two trainings are.",
    remedy="Run adapterops convert FILE --to FORMAT --dtype bfloat16, which gives all of them one type.",
    fires="layers.0's factors F32, those of all other layers BF16",
    passes="one type a component",
)
DOUBLE = Rule(
    "T122",
    "float64",
    Severity.WARNING,
    why="Nothing is trained in float64: it doubles the download, and Apple's GPUs cannot load it.",
    remedy="Run adapterops convert FILE --to FORMAT --dtype float32.",
    fires="lora_A.weight F64",
    passes="lora_A.weight F32",
)
INTEGERS = Rule(
    "T123",
    "integer-factors",
    Severity.ERROR,
    why="Factors are real numbers: as integers they lost everything behind the point, or are quantised without a scale.",
    remedy="Save them as floats from the training's checkpoint.",
    fires="lora_A.weight I8",
    passes="lora_A.weight F16 (indices of SHiRA are integers rightly)",
)
FLOAT8 = Rule(
    "T124",
    "float8-factors",
    Severity.WARNING,
    why="Eight bits keep two or three digits of a factor, and torch has no arithmetic for them, so some loaders raise.",
    remedy="Publish the 16-bit factors; adapters are small.",
    fires="lora_A.weight F8_E4M3",
    passes="lora_A.weight BF16",
)
ADAPTER_NAME = Rule(
    "T130",
    "adapter-name-in-keys",
    Severity.ERROR,
    why="peft loads such keys only into an adapter of the same name; under any other, diffusers' own included, "
    "nothing is loaded and nothing is raised.",
    remedy="`adapterops validate --fix` takes the name out of the keys; save with save_pretrained next time.",
    fires="q_proj.lora_A.default.weight",
    passes="q_proj.lora_A.weight",
    fixable=True,
    source="peft 0.21 utils/save_and_load.py (_insert_adapter_name_into_state_dict)",
)
WRAPPED = Rule(
    "T131",
    "wrong-prefix",
    Severity.ERROR,
    why="A wrapper's name stands in the keys (torch.compile, FSDP, DDP, a second PeftModel) or peft's own does not, so that "
    "loaders find none of them and say little or nothing.",
    remedy="`adapterops validate --fix` sets the keys right; save the unwrapped model with save_pretrained next time.",
    fires="base_model.model._orig_mod.model.layers.0.self_attn.q_proj.lora_A.weight",
    passes="base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
    fixable=True,
    source="peft 0.21 peft_model.py (load_adapter); torch _dynamo/eval_frame.py (OptimizedModule)",
)
BOTCHED = Rule(
    "T132",
    "botched-keys",
    Severity.ERROR,
    why="A conversion by hand misspelled the keys, so that no loader recognises them.",
    remedy="`adapterops validate --fix` spells them as the format has them.",
    fires="lora_unet_unet_mid_block_…_to_k_lora_down.weight",
    passes="lora_unet_mid_block_…_to_k.lora_down.weight",
    fixable=True,
)
OPTIMIZER = Rule(
    "T133",
    "optimizer-state",
    Severity.WARNING,
    why="The optimizer's state was saved among the weights: nobody can use it, and it is twice their size.",
    remedy="`adapterops validate --fix` leaves it out.",
    fires="optimizer.state.0.exp_avg",
    passes="the factors alone",
    fixable=True,
)
BASE_WEIGHTS = Rule(
    "T134",
    "base-weights",
    Severity.WARNING,
    why="The base model's own weight was saved beside the update: peft loads it over the user's base, quantised or not.",
    remedy="Save with save_pretrained, which leaves it out; or take these keys out and save the rest with safetensors.",
    fires="q_proj.base_layer.weight beside q_proj.lora_A.weight",
    passes="embed_tokens.base_layer.weight or lm_head.base_layer.weight, which peft saves beside factors on these",
)
TIED = Rule(
    "T140",
    "tied-tensors",
    Severity.INFO,
    why="Several keys share one storage, which safetensors refuses to save, and whoever changes one changes the others.",
    remedy="Clone the tensors before saving; adapterops convert FILE --to FORMAT writes each by itself.",
    fires="a .bin whose q_proj.lora_A.weight and k_proj.lora_A.weight are one tensor",
    passes="the same numbers stored twice",
    source="safetensors bindings/python/py_src/safetensors/torch.py (_remove_duplicate_names)",
)
RANK_TOO_HIGH = Rule(
    "T142",
    "rank-above-size",
    Severity.INFO,
    why="A rank beyond the module's smaller side adds parameters and no freedom: a smaller one gives the same updates.",
    remedy="Leave it, or train with a lower rank for this module (rank_pattern).",
    fires="lora_B.weight [1, 8]: rank 8 on a module of one output",
    passes="lora_B.weight [64, 8] and lora_A.weight [8, 64]",
)

_USUAL = frozenset({"F32", "F16", "BF16"})
_FACTORS = frozenset({"lora", "loha", "lokr", "adalora", "kasa", "alora", "arrow", "lora_parameters", "lora_merged"})
"""Methods whose roles are all floating-point factors, but for those below."""
_OTHER_ROLES = frozenset({"magnitude", "bias", "ranknum"})


def factors(update: Update) -> dict[str, LazyTensor]:
    """The tensors of an update that are factors of its product, by role; none for methods that have no product."""
    if update.method not in _FACTORS:
        return {}
    return {r: t for r, t in update.tensors.items() if r not in _OTHER_ROLES and not r.startswith("monteclora")}


@checker(MIXED_FACTORS, MIXED_MODULES, DOUBLE, INTEGERS, FLOAT8)
def dtypes(subject: Subject) -> Iterator[Finding]:
    """The types of factors."""
    mixed: list[Update] = []
    each: dict[str, dict[str, list[str]]] = {}
    by_dtype: dict[str, list[str]] = {}
    for update in subject.updates:
        own = factors(update)
        for tensor in own.values():
            by_dtype.setdefault(tensor.dtype, []).append(tensor.key)
        types = {tensor.dtype for tensor in own.values()}
        # Types that no factor should have are told of by themselves.
        if len(types & _USUAL) > 1:
            mixed.append(update)
        for dtype in types if len(types) == 1 else ():
            each.setdefault(update.component, {}).setdefault(dtype, []).append(update.name)
    if mixed:
        shown = ", ".join(f"{t.key.rsplit('.', 2)[-2]} {t.dtype}" for t in factors(mixed[0]).values())
        yield MIXED_FACTORS.found(
            subject.weights,
            f"{mixed[0].name}: {shown}{_more(mixed)}",
            _keys(t for u in mixed for t in factors(u).values()),
        )
    for component, types_of in each.items():
        if len(types_of) > 1:
            counts = Counter({dtype: len(names) for dtype, names in types_of.items()}).most_common()
            rare = types_of[counts[-1][0]]
            yield MIXED_MODULES.found(
                subject.weights,
                f"{component}: " + ", ".join(f"{n} modules {dtype}" for dtype, n in counts) + f" ({rare[0]})",
            )
    for rule, wrong in (
        (DOUBLE, [d for d in by_dtype if d == "F64"]),
        (FLOAT8, [d for d in by_dtype if d in NUMBERS and d not in FLOATS]),
        (INTEGERS, [d for d in by_dtype if d not in NUMBERS]),
    ):
        keys = [key for dtype in wrong for key in by_dtype[dtype]]
        if keys:
            yield rule.found(subject.weights, f"{keys[0]!r} is {wrong[0]}{_more(keys)}", keys)


@checker(RANK_TOO_HIGH)
def rank_against_size(subject: Subject) -> Iterator[Finding]:
    """Ranks that no weight of the module's shape can have."""
    found = []
    for update in subject.updates:
        if update.method == "lora" and {"A", "B"} <= update.tensors.keys() and "mid" not in update.tensors:
            a, b = update.tensors["A"], update.tensors["B"]
            if a.shape[0] > min(b.shape[0], prod(a.shape[1:])):
                found.append(update)
    if found:
        a, b = found[0].tensors["A"], found[0].tensors["B"]
        yield RANK_TOO_HIGH.found(
            subject.weights,
            f"{found[0].name}: rank {a.shape[0]}, and the weight is {[b.shape[0], prod(a.shape[1:])]}{_more(found)}",
            _keys(t for u in found for t in (u.tensors["A"], u.tensors["B"])),
        )


@checker(ADAPTER_NAME, WRAPPED, BOTCHED)
def spelling(subject: Subject) -> Iterator[Finding]:
    """Keys that loaders do not find, though it is clear what is meant."""
    clean = _clean(subject)
    wrapped = {old: new for old, new in subject.renamed.items() if is_wrapped(old, new)}
    botched = {old: new for old, new in subject.renamed.items() if old not in wrapped}
    reading = subject.recognised[1] if subject.recognised is not None else None
    back = {new: old for old, new in subject.renamed.items()}
    for key in _prefixed(subject, reading):
        wrapped[back.get(key, key)] = clean.get(back.get(key, key), key)
    if wrapped:
        old, new = next(iter(wrapped.items()))
        lacks = len(clean.get(old, new)) > len(old)
        what = "lacks the name of peft's own wrapper" if lacks else "stands under a wrapper's name"
        yield _renaming(
            subject,
            WRAPPED,
            wrapped,
            clean,
            what,
            "give peft's prefix to" if lacks else "strip the wrapper's name from",
        )
    if botched:
        yield _renaming(subject, BOTCHED, botched, clean, "is misspelled", "respell")
    if reading is not None and _names_adapter(reading):
        name = reading.adapter_name
        named = [back.get(c.key, c.key) for c in reading.claims if _is_named(c, name)]
        own = {key: clean[key] for key in named if key in clean}
        if own:
            yield _renaming(
                subject,
                ADAPTER_NAME,
                own,
                clean,
                f"holds the adapter's name {name!r}",
                f"strip the adapter's name {name!r} from",
            )


def _renaming(
    subject: Subject, rule: Rule, keys: dict[str, str], clean: dict[str, str], what: str, about: str
) -> Finding:
    first = next(iter(keys))
    # All of a key's faults are mended at once, whichever rule is asked: two changes of one key must agree.
    mended = {old: clean.get(old, new) for old, new in keys.items()}
    taken = (set(subject.tensors) - set(subject.renamed.values()) - set(mended)) | set(mended.values())
    unique = len(set(mended.values())) == len(mended) and len(taken) >= len(mended)
    change = Change(f"{about} {len(mended)} keys", keys=mended) if unique else None
    return rule.found(
        subject.weights, f"{first!r} {what}; it should be {mended[first]!r}{_more(keys)}", keys, change=change
    )


def _clean(subject: Subject) -> dict[str, str]:
    """The keys that are not spelled as their format has them, with the names that it would give them."""
    out = dict(subject.renamed)
    reading = subject.recognised[1] if subject.recognised is not None else None
    if reading is None:
        return out
    back = {new: old for old, new in subject.renamed.items()}
    prefixed, named = set(_prefixed(subject, reading)), _names_adapter(reading)
    for claim in reading.claims:
        if claim.place.tails or not (claim.key in prefixed or (named and _is_named(claim, reading.adapter_name))):
            continue
        text = claim.suffix.text.replace(_SLOT, "")
        if claim.place.whole and claim.suffix.text.endswith("."):
            continue
        own = claim.place.prefix  # which may stand behind another
        name = claim.name.partition(own)[2] if own and own in claim.name else claim.name
        out[back.get(claim.key, claim.key)] = own + name + text
    return out


_SLOT = "{adapter}"


def _names_adapter(reading: Reading) -> bool:
    """Whether an adapter's name stands in keys where loaders expect none (DiffSynth's own spelling has one)."""
    usual = reading.dialect.alpha is AlphaIn.CONFIG and not any(claim.place.bare for claim in reading.claims)
    return bool(reading.adapter_name) and usual


def _is_named(claim: Claim, name: str) -> bool:
    return _SLOT in claim.suffix.text and claim.key.endswith(claim.suffix.text.replace(_SLOT, f".{name}"))


def _prefixed(subject: Subject, reading: Reading | None) -> list[str]:
    """The keys under another prefix than their place's own."""
    if reading is None or reading.prefix is None or subject.recognised is None:
        return []
    form = subject.recognised[0]
    own = next((prefix for prefix, others in form.variants.items() if reading.prefix in others), None)
    if own is None:
        return []
    # Shorter prefixes are those of models that were never wrapped by a PeftModel; a config says that this one was.
    if len(reading.prefix) < len(own) and subject.config is None:
        return []
    claims = [c for c in reading.claims if c.place.prefix == own and not c.place.whole]
    moved = [c.key for c in claims if c.key.startswith(reading.prefix) and _is_moved(c, reading.prefix)]
    # Where other factors stand as they should, and of saved parameters alone, nobody knows that a prefix is wrong.
    factors = {claim.key for claim in claims if claim.suffix.method != "saved"}
    return moved if factors and factors.issubset(moved) else []


def _is_moved(claim: Claim, prefix: str) -> bool:
    """Whether the module's name begins behind that prefix."""
    if len(prefix) < len(claim.place.prefix) and claim.place.prefix in claim.key:
        return not claim.key.startswith(claim.place.prefix)  # else it has its own prefix, and others lack theirs
    return claim.key[len(prefix) :].startswith(claim.name) and not claim.key.startswith(claim.place.prefix + claim.name)


@checker(OPTIMIZER)
def leftovers(subject: Subject) -> Iterator[Finding]:
    """What training alone needs."""
    keys = subject.leftover
    if keys:
        yield OPTIMIZER.found(
            subject.weights,
            f"{several(keys)}: the state of an optimizer or scheduler",
            keys,
            change=Change(f"leave {len(keys)} tensors of training state out", drop=keys),
        )


_HEAD = "lm_head"
"""The head whose own weight peft saves beside factors on it (huggingface/peft `src/peft/utils/constants.py`:
`EMBEDDING_LAYER_NAMES`; `save_and_load.py`: `save_embedding_layers="auto"`)."""


@checker(BASE_WEIGHTS)
def base_weights(subject: Subject) -> Iterator[Finding]:
    """Weights of the base beside an update of the same module."""
    updated = {
        (u.component, u.module): u
        for u in subject.updates
        if u.method not in ("saved", "diff", "trainable_tokens", "bundled")
    }
    found = []
    for update in subject.updates:
        weight = update.tensors.get("weight") if update.method == "saved" else None
        other = updated.get((update.component, update.module))
        if (
            weight is None
            or other is None
            or other.options.get("kind") == "embedding"
            or update.module.rpartition(".")[2] == _HEAD
            or not METHODS[other.method].rows
        ):
            continue
        # What peft wraps stands below the module's own name; a weight under that name itself peft drops.
        if weight.key.removesuffix(".weight").endswith(update.module.rpartition(".")[2]):
            continue
        found.append(weight.key)
    if found:
        yield BASE_WEIGHTS.found(
            subject.weights,
            f"{several(found)}: the base model's own weight beside the update of the same module",
            found,
        )


@checker(TIED)
def tied(subject: Subject) -> Iterator[Finding]:
    """Keys of a pickle that share memory."""
    places = []
    for key, tensor in subject.tensors.items():
        held = getattr(tensor.source, "tensor", None)
        if held is not None and tensor.numel > 1:
            storage = held.untyped_storage().data_ptr()
            start = held.data_ptr()
            places.append((storage, start, start + tensor.nbytes, key))
    places.sort()
    shared: dict[str, None] = {}
    for (storage, _, end, one), (other, start, _, two) in pairwise(places):
        if storage == other and start < end:
            shared |= {one: None, two: None}
    if shared:
        yield TIED.found(subject.weights, f"{several(shared)} share one storage", shared)


def _more(things: list[Update] | list[str] | dict[str, str]) -> str:
    return f" ({len(things) - 1} more like it)" if len(things) > 1 else ""


def _keys(tensors: Iterator[LazyTensor]) -> list[str]:
    return [tensor.key for tensor in tensors]


RULES: tuple[Rule, ...] = (
    MISSING_HALF,
    RANKS,
    SHAPE,
    TWICE,
    EMPTY,
    *values.RULES,
    MIXED_FACTORS,
    MIXED_MODULES,
    DOUBLE,
    INTEGERS,
    FLOAT8,
    ADAPTER_NAME,
    WRAPPED,
    BOTCHED,
    OPTIMIZER,
    BASE_WEIGHTS,
    TIED,
    RANK_TOO_HIGH,
)
CHECKERS: tuple[Checker, ...] = (
    *values.CHECKERS,
    dtypes,
    rank_against_size,
    spelling,
    leftovers,
    base_weights,
    tied,
)
