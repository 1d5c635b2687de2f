"""From an adapter to a dialect's keys, by the same table that reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from adapterops.adapter import Adapter, Update
from adapterops.architectures import Architecture
from adapterops.dialects.arrange import Arranger
from adapterops.dialects.names import book, needs_table, spelled
from adapterops.dialects.placing import Placing
from adapterops.dialects.shapes import shaped, spec_of
from adapterops.dialects.table import ANY, FLAG_DTYPE, AlphaIn, Dialect, Place, Suffix
from adapterops.errors import CannotRepresent, UnknownArchitectureOfFile, UnknownFact
from adapterops.methods import METHODS
from adapterops.storage import LazyTensor, dtypes, scalar


@dataclass(frozen=True, slots=True)
class Spelled:
    """The tensors of an output file by key, and what the user should know about them."""

    adapter: Adapter
    """The adapter as it stands in the output: fused projections split or joined as the dialect has them."""
    tensors: dict[str, LazyTensor] = field(default_factory=dict)
    kept: list[Update] = field(default_factory=list)
    """The updates of the source that are in the output."""
    notes: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    """What could not be spelled and was left out under `--allow-drop`, with the reason."""


def write(
    dialect: Dialect,
    adapter: Adapter,
    architecture: Architecture | None,
    spelling: Mapping[str, Any] | None = None,
    allow_drop: bool = False,
) -> Spelled:
    """Spell every update of `adapter`.

    `spelling` holds the choices that keys leave open, as `read` records them.  With `allow_drop`, updates that the
    dialect cannot hold are left out whole and listed.

    Raises `CannotRepresent` where the dialect has no way to say something, `UnknownFact` where it needs an alpha
    that nobody knows, `UnknownArchitectureOfFile` where names need a table and there is none.
    """
    spelling = dict(spelling or {})
    if isinstance(spelling.get("alpha_absent"), list):
        spelling["alpha_absent"] = frozenset(spelling["alpha_absent"])  # asked for every module
    if "idle_alpha" in spelling:
        # What the source's own tensor says goes before what its header recalls of another file.
        stored = {f"{component}.{module}" for component, module, _ in adapter.provenance.folded}
        spelling["idle_alpha"] = {at: value for at, value in spelling["idle_alpha"].items() if at not in stored}
    tensors: dict[str, LazyTensor] = {}
    written: list[Update] = []
    kept: list[Update] = []
    dropped: list[str] = []
    verbatim = adapter.verbatim if architecture is None else None
    placing = Placing(dialect, architecture, spelling, verbatim)
    if verbatim is not None:
        # `named_for` has made them what they are in the file.
        spelling["names"] = {f"{u.component}.{u.module}": u.module for u in adapter}
    arranger = Arranger(dialect, adapter, architecture, placing)
    for sources in arranger.groups():
        try:
            updates = arranger.arrange(sources)
            spelled: dict[str, LazyTensor] = {}
            for update in updates:
                spelled |= _spell(dialect, placing.of(update), update, architecture, spelling)
        except CannotRepresent as error:
            if all(update.method == "diff" and METHODS["diff"].is_nothing(update) for update in sources):
                dropped.append(f"{sources[0].name}: zeros, which change nothing (left out: {_keys(sources, adapter)})")
                continue
            if not allow_drop:
                raise
            dropped.append(f"{error} (left out: {_keys(sources, adapter)})")
            continue
        for key, tensor in spelled.items():
            if key in tensors:
                raise _clash(updates[0], written, key, dialect)
            tensors[key] = tensor
        written += updates
        kept += sources
    warnings = [sentence for role, sentence in dialect.unread if any(role in u.tensors for u in written)]
    return Spelled(arranger.result(written), tensors, kept, [*arranger.notes(), *warnings], dropped)


def _keys(updates: list[Update], adapter: Adapter) -> str:
    """Every key of the source that `updates` are made of."""
    alphas = [adapter.provenance.folded.get(update.key) for update in updates]
    return ", ".join([*(t.key for update in updates for t in update.tensors.values()), *(a for a in alphas if a)])


def _spell(
    dialect: Dialect, place: Place, update: Update, architecture: Architecture | None, spelling: Mapping[str, Any]
) -> dict[str, LazyTensor]:
    """The keys and tensors of one update."""
    if place.whole:
        return _spell_whole(place, update, _adapter_slot(spelling))
    _insist_on_width(dialect, update, architecture)
    name = spelling.get("names", {}).get(f"{update.component}.{update.module}") or _name(
        dialect, place, update, architecture
    )
    swapped = place.saved or spelling.get("prefix_for") == place.prefix
    prefix = spelling.get("prefix", place.prefix) if swapped else place.prefix
    stem = prefix + _tail(dialect, place, name, update)
    out = {}
    for role, tensor in update.tensors.items():
        row = _suffix(dialect, place, update, role)
        text = row.text.replace("{adapter}", _adapter_slot(spelling))
        tensor = _as_it_was(shaped(dialect, update, role, tensor, architecture), update, role, spelling)
        out[stem + text] = tensor.transposed() if row.transposed and len(tensor.shape) == 2 else tensor
    for role in METHODS[update.method].flags:
        suffix = next((s for s in place.suffixes if (s.method, s.role) == (update.method, role)), None)
        if suffix is not None and role in update.options:
            dtype = spelling.get("flag_as", FLAG_DTYPE)
            out[stem + suffix.text] = scalar(stem + suffix.text, dtype, update.options[role])
    if METHODS[update.method].scaled:
        out |= _alpha(dialect, place, stem, update, spelling)
    return out


def _spell_whole(place: Place, update: Update, slot: str) -> dict[str, LazyTensor]:
    """The keys and tensors of what a component has once."""
    texts = {s.role: s.text.replace("{adapter}", slot) for s in place.suffixes if s.method == update.method}
    out = {}
    for role, tensor in update.tensors.items():
        first, dot, name = role.partition(".")
        out[place.prefix + (texts[role] if role in texts else texts[first] + (name if dot else ""))] = tensor
    return out


def _insist_on_width(dialect: Dialect, update: Update, architecture: Architecture | None) -> None:
    spec = spec_of(update, architecture)
    if spec is None or not spec.widens or dialect.widens or METHODS[update.method].fits(update, spec.shape):
        return
    raise CannotRepresent(
        f"{update.name}: gives the module more inputs than the base has (a control adapter: tensor "
        f"{next(iter(update.tensors.values())).key!r}), and readers of {dialect.title} cannot widen it; --to diffusers "
        "holds it"
    )


def _adapter_slot(spelling: Mapping[str, Any]) -> str:
    name = spelling.get("adapter_name")
    return f".{name}" if name else ""


def _name(dialect: Dialect, place: Place, update: Update, architecture: Architecture | None) -> str:
    if place.free:
        return update.module
    if architecture is None and needs_table(place):
        raise UnknownArchitectureOfFile(
            f"{update.name}: {dialect.title} needs to know the base model to spell module names, and this adapter's "
            "fits none of the known ones; give --arch NAME or --base CONFIG"
        )
    if place.component == "*":
        return update.module
    name = spelled(architecture, place, update.module)
    if name is None:
        if not needs_table(place):
            return update.module
        if place.tails:
            raise _no_tail(dialect, place, update)
        raise CannotRepresent(
            f"{update.name}: {dialect.title} has no name for this module of {architecture.name if architecture else 'the base'}"
            f" (tensor {next(iter(update.tensors.values())).key!r})"
        )
    if architecture is not None:
        clash = book(architecture, place).clashes.get(name)
        if clash:
            raise CannotRepresent(f"{update.name}: {dialect.title} would spell {clash[0]} and {clash[1]} alike")
    return name


def _tail(dialect: Dialect, place: Place, name: str, update: Update) -> str:
    if not place.tails:
        return name
    for canonical, written in place.tails:
        if name.endswith(canonical):
            return name[: len(name) - len(canonical)] + written
    raise _no_tail(dialect, place, update)


def _clash(update: Update, written: list[Update], key: str, dialect: Dialect) -> CannotRepresent:
    other = next((u for u in written if (u.component, u.module) == (update.component, update.module)), None)
    if other is None:
        return CannotRepresent(f"{update.name}: its key {key!r} stands in the output already: names clash")
    return CannotRepresent(
        f"{update.name}: {METHODS[other.method].title} and {METHODS[update.method].title} act on parts of this module, "
        f"which {dialect.title} keeps in one, and would share the key {key!r}; --to kohya-diffusers keeps the parts apart"
    )


def _no_tail(dialect: Dialect, place: Place, update: Update) -> CannotRepresent:
    endings = ", ".join(dict.fromkeys(c.lstrip(".") for c, _ in place.tails))
    return CannotRepresent(
        f"{update.name}: {dialect.title} can hold only modules that end in {endings}; --allow-drop leaves the others out"
    )


EXCHANGED = frozenset({"lora", "loha", "lokr", "ia3", "diff", "saved", "trainable_tokens", "bundled"})
"""Methods that more than one library's files have."""


def _means(suffix: Suffix, method: str) -> bool:
    own = METHODS[method]
    return suffix.method == method or (
        suffix.method == ANY and (own.scaled or (bool(own.alpha_role) and suffix.role == "alpha"))
    )


def _follows(suffix: Suffix, module: str) -> bool:
    return not suffix.after or module.endswith(suffix.after)


def _suffix(dialect: Dialect, place: Place, update: Update, role: str) -> Suffix:
    kind, alpha = update.options.get("kind"), METHODS[update.method].alpha_role
    fallback = None
    for suffix in place.suffixes:
        if (
            suffix.role == ("alpha" if role == alpha else role)
            and _means(suffix, update.method)
            and _follows(suffix, update.module)
        ):
            if any(update.options.get(k) != v for k, v in suffix.options.items() if k != "kind"):
                continue
            if suffix.options.get("kind") == kind:
                return suffix
            # An embedding's factors have names of their own; its magnitude is called as any other.
            own_name = kind == "embedding" and role in ("A", "B")
            fallback = fallback or (suffix if not suffix.options and not own_name else None)
    if fallback is not None:
        return fallback
    saved = place.saved
    if update.method == "saved" and (update.module.endswith(saved) if isinstance(saved, tuple) else saved):
        return Suffix("." + role, "saved", role)
    what = f"{METHODS[update.method].title}: {role}" + (f" of an {kind}" if kind == "embedding" else "")
    if update.method not in EXCHANGED:
        way = (
            "adapterops to-lora makes the plain LoRA of it"
            if METHODS[update.method].linear
            else "only --to peft holds it"
        )
        raise CannotRepresent(
            f"{update.name}: {dialect.title} has no place for {METHODS[update.method].title} (tensor "
            f"{update.tensors[role].key!r}); {way}, or --allow-drop leaves it out"
        )
    # What a whole module or an embedding is given only peft writes, and its (IA)³, which starts at one; every other method
    # and part stands in Kohya files, and Comfy sets a weight.
    only_peft = (
        update.method in ("saved", "trainable_tokens") or kind == "embedding" or bool(update.options.get("initial"))
    )
    other = "peft" if only_peft or (update.method, role) == ("lora", "bias") else "kohya"
    if update.component != "model" and (update.method, role) in (("saved", "weight"), ("lora", "bias")):
        # What Flux.1's control adapters have, and other whole weights of a denoiser.
        norm = update.method == "saved" and len(update.tensors[role].shape) == 1
        other = "diffusers" if norm or update.method == "lora" else "comfy"
    way = f"write it as --to {other}, or leave" if other != dialect.format else "leave"
    raise CannotRepresent(
        f"{update.name}: {dialect.title} has no place for it ({what}, tensor {update.tensors[role].key!r}); {way} it out "
        "with --allow-drop"
    )


def _as_it_was(tensor: LazyTensor, update: Update, role: str, spelling: Mapping[str, Any]) -> LazyTensor:
    """The tensor in the unusual shape that its file recorded, where that still fits."""
    recorded = spelling.get("shapes", {}).get(f"{update.component}.{update.module}", {}).get(role)
    if not isinstance(recorded, list) or not all(type(n) is int for n in recorded) or prod(recorded) != tensor.numel:
        return tensor
    # A header is a stranger's: only what leaves the matrix as it is, ones and a flattened kernel, is taken from it.
    ones_aside = [n for n in recorded if n != 1] == [n for n in tensor.shape if n != 1]
    flattened = recorded[:1] == list(tensor.shape[:1]) and 2 in (len(recorded), len(tensor.shape))
    return tensor.reshape(tuple(recorded)) if ones_aside or flattened else tensor


def _alpha(
    dialect: Dialect, place: Place, stem: str, update: Update, spelling: Mapping[str, Any]
) -> dict[str, LazyTensor]:
    """The alpha tensor of an update, where the dialect keeps one; a check that the scale survives, where not."""
    method = METHODS[update.method]
    scale = method.scale(update)
    if scale is None or update.alpha is None:
        raise UnknownFact(
            f"{update.name}: its alpha is unknown ({update.alpha.source if update.alpha else ''}), so its scale is too; "
            "say it with --alpha X"
        )
    rank = method.rank(update) or 1
    told = {name: value for name, value in update.options.items() if name not in method.compared}
    if dialect.alpha is AlphaIn.TENSOR and method.scale(replace(update, options=told)) != scale:
        raise CannotRepresent(
            f"{update.name}: its scale is {scale:g} (alpha {update.alpha.value:g}), but readers of {dialect.title} apply "
            f"none to {method.title} of such factors; --fold-alpha bakes it into them"
        )
    if dialect.alpha is AlphaIn.NOWHERE:
        if scale != 1.0:
            raise CannotRepresent(
                f"{update.name}: its scale is {scale:g} (alpha {update.alpha.value:g}, rank {rank}), and {dialect.title} "
                "has no place for it: readers apply 1; --fold-alpha bakes it into the factors"
            )
        return {}
    if dialect.alpha is not AlphaIn.TENSOR:
        return {}
    at = f"{update.component}.{update.module}"
    absent = spelling.get("alpha_absent", ())
    if (absent == "all" or at in absent) and scale == 1.0:
        return {}
    value = scale * rank if update.rslora else update.alpha.value
    if method.rank(update) is None:
        # It has no effect, and formats that keep a rank beside it may have changed it.
        value = spelling.get("idle_alpha", {}).get(at, value)
    assert value is not None
    suffix = next(s for s in place.suffixes if s.role == "alpha" and _means(s, update.method))
    return {stem + suffix.text: _alpha_tensor(stem + suffix.text, value, at, update, spelling)}


def _alpha_tensor(key: str, value: float, at: str, update: Update, spelling: Mapping[str, Any]) -> LazyTensor:
    """Alpha in the dtype it had, else in the factors' (as trainers cast it), else wide enough to be exact."""
    recorded = spelling.get("alpha_as")
    recorded = recorded.get(at) if isinstance(recorded, dict) else recorded
    candidates: list[tuple[str, tuple[int, ...]]] = []
    if isinstance(recorded, list) and len(recorded) == 2 and recorded[0] in dtypes.BITS and set(recorded[1]) <= {1}:
        candidates.append((recorded[0], tuple(recorded[1])))
    candidates += [(next(iter(update.tensors.values())).dtype, ()), ("F32", ()), ("F64", ())]
    for dtype, shape in candidates:
        if dtypes.encode_scalar(dtype, value) is not None:
            return scalar(key, dtype, value, shape)
    raise CannotRepresent(f"{update.name}: alpha {value!r} has no exact form in any float type")
