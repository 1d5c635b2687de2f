"""From a file's keys to an adapter, by a dialect's table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Any, NamedTuple

from adapterops.adapter import Adapter, Certainty, Fact, Provenance, Update
from adapterops.architectures import Architecture
from adapterops.carried import Carried
from adapterops.dialects.aligning import adopt, align, rename
from adapterops.dialects.match import Group, Reading, group
from adapterops.dialects.names import NameBook, book, canonical
from adapterops.dialects.placing import writing_place
from adapterops.dialects.resolve import Identified, identify
from adapterops.dialects.shapes import as_usual, shaped
from adapterops.dialects.table import FLAG_DTYPE, AlphaIn, Dialect, Place
from adapterops.dialects.verbatim import verbatim
from adapterops.errors import AdapterOpsError, BrokenAdapter, CannotRepresent, Conflict, UnsupportedFormat, UsageError
from adapterops.methods import METHODS
from adapterops.storage import LazyTensor, Source


@dataclass(frozen=True, slots=True)
class Request:
    """What the user says about an input: options of the commands that read one.

    `architecture` comes from `--arch` or `--base`; `alpha` is a number, or the name of the source to believe
    ("tensors", "header", "config") where two disagree; `fields` come from `--set`.  With `repair` a config that
    contradicts the tensors is no error: they are believed.  With `tell`, what is wrong with one module or with a config is
    told to it instead of raised, and the module is left out: what can be understood of a broken file.
    """

    architecture: Architecture | None = None
    alpha: float | str | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    allow_drop: bool = False
    repair: bool = False
    tell: Callable[[AdapterOpsError], None] | None = None

    def wrong(self, error: AdapterOpsError, keys: Iterable[str] = ()) -> None:
        """Tell of an error, of these tensors where it does not name its own; or raise it, where nobody listens."""
        if self.tell is None:
            raise error
        error.keys = error.keys or tuple(keys)
        self.tell(error)


class ScaleRule(NamedTuple):
    """What a config says of one module's scale.  `alpha` is None where it says nothing; `absent` says then what would."""

    alpha: float | None = None
    rslora: bool = False
    certainty: Certainty = Certainty.READ
    source: str = ""
    absent: str = ""


_NO_RULE = ScaleRule()
ScaleOf = Callable[[str, str, int], ScaleRule]
"""(component, module, rank) to what the config beside the tensors says."""


def no_config(component: str, module: str, rank: int) -> ScaleRule:
    """The rule of a file that has no config."""
    return _NO_RULE


def read(
    reading: Reading,
    source: Source,
    request: Request,
    scale_of: ScaleOf = no_config,
    refine: Callable[[list[Update]], list[Update]] | None = None,
    component_of: Callable[[list[Group]], list[Group]] | None = None,
) -> Adapter:
    """The adapter that `reading` makes of `source`.

    `component_of` may move groups to another place (a PEFT folder does not say which component it is for);
    `refine` may change updates before they are checked (token indices from a config).

    Raises the errors of `identify`, `BrokenAdapter` for tensors that contradict each other, `Conflict`
    for alphas that do, and `UnsupportedFormat` for keys that the dialect does not know.
    """
    _refuse_leftover(reading, source, request)
    groups = group(reading, source.tensors, request.tell)
    groups, dropped = _without_owners(groups, reading)
    if component_of is not None:
        groups = component_of(groups)
    if request.tell is not None:
        # Broken halves fit no base model's modules, which would be told of them too.
        groups = [entry for entry in groups if _is_sound(entry, reading.dialect, request)]
    notes = list(source.notes)
    given = request.architecture
    if given is not None:
        given = adopt(groups, given)
        groups, said = _align(groups, given)
        notes += said
    carried = Carried.parse(source.metadata)
    found = identify(
        groups,
        source.path,
        given,
        carried.architecture,
        request.allow_drop,
        request.tell,
        source,
        reading.declared,
        reading.rivals,
    )
    notes += found.notes
    if found.unknown:
        dropped += [t.key for entry in found.unknown for t in entry.tensors.values()]
        lost = {id(entry) for entry in found.unknown}
        groups = [entry for entry in groups if id(entry) not in lost]
    notes += _shared_components(groups, found.architecture)
    if found.refusal is None:
        return _adapter(reading, source, request, scale_of, refine, groups, found, carried, notes, dropped)
    kept = verbatim(groups, str(found.refusal))
    if kept is None:
        raise found.refusal
    try:
        adapter = _adapter(reading, source, request, scale_of, refine, groups, found, carried, notes, dropped)
    except AdapterOpsError as error:
        # Of names that nobody knows what else is wrong may follow from their being botched.
        raise found.refusal from error
    return replace(adapter, verbatim=kept)


def _adapter(
    reading: Reading,
    source: Source,
    request: Request,
    scale_of: ScaleOf,
    refine: Callable[[list[Update]], list[Update]] | None,
    groups: list[Group],
    found: Identified,
    carried: Carried,
    notes: list[str],
    dropped: list[str],
) -> Adapter:
    """The adapter that a file's modules make, once it is known whose they are."""
    architecture = found.architecture
    made = _updates(groups, architecture, reading.dialect, request, scale_of)
    notes += [f"{name} and modules like it: {said}" for said, name in made.earlier.items() if said]
    updates, groups = made.updates if refine is None else refine(made.updates), made.groups
    if any(not METHODS[update.method].scaled for update in updates):
        whole = [_whole(update, request) for update in updates]
        groups = [entry for entry, sure in zip(groups, whole, strict=True) if sure]
        updates = [update for update, sure in zip(updates, whole, strict=True) if sure]
    _no_twins(updates, request)
    _refuse_idle_alpha(updates, request)
    spelling = _spelling(reading, updates, made.alphas, groups, architecture, carried)
    provenance = Provenance(
        path=source.path,
        format=reading.dialect.format,
        dialect=reading.dialect.name,
        spelling=spelling,
        notes=tuple(notes),
        folded=made.folded,
        stated=made.stated,
        dropped=tuple(dropped),
        size=source.size,
        carried=carried._replace(spelling={**carried.spelling, reading.dialect.name: spelling}),
    )
    return Adapter(
        {u.key: u for u in updates},
        found.fact,
        provenance,
        dict(source.metadata),
        dict(carried.config),
        architecture,
    )


@dataclass(slots=True)
class _Made:
    """The updates of a file, the groups that they were made of, and what else was read of them."""

    updates: list[Update] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)
    alphas: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    """The dtype and shape of each module's alpha."""
    folded: dict[tuple[str, str, str], str] = field(default_factory=dict)
    """The key of each update's alpha."""
    stated: dict[tuple[str, str, str], str] = field(default_factory=dict)
    """What the file calls the modules that have another name here."""
    earlier: dict[str, str] = field(default_factory=dict)
    """What was said of tensors of an earlier version of their method, and the first module of which."""


def _updates(
    groups: list[Group], architecture: Architecture | None, dialect: Dialect, request: Request, scale_of: ScaleOf
) -> _Made:
    """The groups under canonical names, with their scales; without those that cannot be updates, where that is only told."""
    made = _Made()
    components: dict[Place, str | None] = {}
    books: dict[Place, NameBook] = {}
    for entry in groups:
        stored = entry.tensors.get("alpha")
        if architecture is not None and entry.place not in books:
            books[entry.place] = book(architecture, entry.place)
            components[entry.place] = entry.place.among(architecture.components)
        try:
            module = canonical(architecture, entry, books.get(entry.place))
            component = components.get(entry.place) or entry.place.component
            update = _sized(_checked(entry, component, module, dialect), architecture)
            update, said = METHODS[entry.method].today(update)
            made.earlier.setdefault(said, update.name)
            if METHODS[entry.method].scaled:
                update = _settle(update, stored, dialect, request, scale_of, entry.stated or module)
        except AdapterOpsError as error:
            request.wrong(error, _keys(entry.tensors))
            continue
        if entry.stated and entry.stated != module:
            made.stated[update.key] = entry.stated
        if stored is not None:
            made.alphas[f"{update.component}.{module}"] = (stored.dtype, stored.shape)
            made.folded[update.key] = stored.key
        made.updates.append(update)
        made.groups.append(entry)
    return made


def _keys(tensors: Mapping[str, LazyTensor]) -> tuple[str, ...]:
    return tuple(tensor.key for tensor in tensors.values())


def _checked(entry: Group, component: str, module: str, dialect: Dialect) -> Update:
    """A group as an update, without its alpha.  Raises `BrokenAdapter` for one of a scaled method that cannot be one."""
    tensors = {role: tensor for role, tensor in entry.tensors.items() if role != "alpha"}
    update = Update(component, module, entry.method, tensors, options=entry.options)
    if not tensors:
        stored = entry.tensors["alpha"]
        raise BrokenAdapter(f"{stored.where}: an alpha without factors ({update.name})", fault="missing-half")
    update = _magnitude(_flags(update), dialect)
    if METHODS[entry.method].scaled:
        METHODS[entry.method].check(update)
    return update


def _is_sound(entry: Group, dialect: Dialect, request: Request) -> bool:
    """Whether a group can be an update, where that follows from its tensors alone; told of, where not."""
    try:
        _checked(entry, entry.place.component, entry.name, dialect)
    except AdapterOpsError as error:
        request.wrong(error, _keys(entry.tensors))
        return False
    return True


def _whole(update: Update, request: Request) -> bool:
    """Whether an update of a method without a scale is sound; told of, where not."""
    try:
        if not METHODS[update.method].scaled:
            METHODS[update.method].check(update)
    except AdapterOpsError as error:
        request.wrong(error, _keys(update.tensors))
        return False
    return True


def _shared_components(groups: list[Group], architecture: Architecture | None) -> list[str]:
    """A note for each component that stands under several prefixes: it is written under one."""
    prefixes: dict[str, dict[str, None]] = {}
    for place in dict.fromkeys(g.place for g in groups):
        component = (place.among(architecture.components) if architecture is not None else None) or place.component
        prefixes.setdefault(component, {})[place.prefix] = None
    return [
        f"modules of {component} stand under {' and '.join(own)}; they are written under one prefix"
        for component, own in prefixes.items()
        if len(own) > 1
    ]


def _without_owners(groups: list[Group], reading: Reading) -> tuple[list[Group], list[str]]:
    """The groups that can be kept when the unclaimed keys are dropped, and every key that goes.

    A key that nobody understands may change what its module's other tensors mean (another scale, a core), so they go
    with it.
    """
    if not reading.unclaimed:
        return groups, []
    stems = {g.stem for g in groups}
    owners: set[str] = set()
    for key in reading.unclaimed:
        parts = key.split(".")
        owners |= {".".join(parts[:n]) for n in range(1, len(parts))} & stems
    lost = [t.key for g in groups if g.stem in owners for t in g.tensors.values()]
    return [g for g in groups if g.stem not in owners], [*reading.unclaimed, *lost]


def _refuse_idle_alpha(updates: list[Update], request: Request) -> None:
    """Raise `Conflict` where `--alpha X` had nothing to say, since the file holds every alpha, and says otherwise."""
    given = request.alpha
    scaled = [u for u in updates if u.alpha is not None]
    if not isinstance(given, float) or any(u.alpha.certainty is Certainty.GIVEN for u in scaled if u.alpha):
        return
    other = next((u for u in scaled if u.alpha is not None and u.alpha.value != given), None)
    if other is not None:
        raise Conflict(
            f"{next(iter(other.tensors.values())).where}: --alpha {given:g}, but the file says {other.alpha} for "
            f"{other.name}; leave --alpha out"
        )


def _refuse_leftover(reading: Reading, source: Source, request: Request) -> None:
    if not reading.unclaimed or (request.allow_drop and request.tell is None):
        return
    shown = ", ".join(repr(k) for k in reading.unclaimed[:3])
    more = f" and {len(reading.unclaimed) - 3} more" if len(reading.unclaimed) > 3 else ""
    request.wrong(
        UnsupportedFormat(
            f"{source.path}: {reading.dialect.title} does not know {shown}{more}; nothing is dropped in silence "
            "(--allow-drop leaves them out and lists them)",
            fault="unclaimed",
            keys=reading.unclaimed,
        )
    )


def _align(groups: list[Group], architecture: Architecture) -> tuple[list[Group], list[str]]:
    """The groups under the base's own names, each component by itself, and what was changed."""
    parts: dict[str | None, list[Group]] = {}
    for entry in groups:
        parts.setdefault(entry.place.among(architecture.components), []).append(entry)
    aligned = {name: _align_part(part, architecture) for name, part in parts.items()}
    renamed = {id(old): new for name, part in parts.items() for old, new in zip(part, aligned[name][0], strict=True)}
    return [renamed[id(entry)] for entry in groups], list(
        dict.fromkeys(n for _, said in aligned.values() for n in said)
    )


def _align_part(groups: list[Group], architecture: Architecture) -> tuple[list[Group], list[str]]:
    change = align(groups, architecture)
    if change == ("", ""):
        return groups, []
    if change is None:
        renamed = rename(groups, architecture)
        note = f"modules are renamed to be those of {architecture.name}"
        unnamed = all(g.place.free for g in groups)
        return (groups, []) if renamed is None or unnamed else (renamed, [note])
    strip, add = change
    said = f"stripped of {strip!r}" if strip else f"given {add!r} in front"
    return (
        [g if g.place.free else g._replace(name=add + g.name[len(strip) :], stated=g.name) for g in groups],
        [f"module names are {said} to be those of {architecture.name}"],
    )


def _settle(
    update: Update, stored: LazyTensor | None, dialect: Dialect, request: Request, scale_of: ScaleOf, name: str
) -> Update:
    """Alpha from every source that holds it; they must agree.  `name` is the module's in the file and its config."""
    rank = METHODS[update.method].rank(update) or 0
    rule = scale_of(update.component, name, rank)
    given = request.alpha
    alpha: Fact[float | None] | None = None
    if stored is not None:
        try:
            alpha = Fact(stored.item(), Certainty.READ, f"tensor {stored.key}")
        except ValueError as error:
            raise BrokenAdapter(
                f"{stored.where}: shape {list(stored.shape)}; alpha must be one number",
                fault="alpha-shape",
                keys=(stored.key,),
            ) from error
        if not isfinite(alpha.value or 0.0):
            raise BrokenAdapter(
                f"{stored.where}: the alpha of {update.name} is {alpha.value}; the file is damaged: use an earlier "
                "checkpoint",
                fault="not-finite",
                keys=(stored.key,),
            )
    if isinstance(given, str) and (stored if given == "tensors" else rule.alpha) is None:
        raise UsageError(
            f"{next(iter(update.tensors.values())).where}: --alpha {given}, but the file has no alpha of {update.name} there"
        )
    if rule.alpha is not None:
        stated: Fact[float | None] = Fact(rule.alpha, rule.certainty, rule.source)
        if alpha is None or given in ("config", "header"):
            alpha = stated
        elif alpha.value != stated.value and given != "tensors":
            request.wrong(
                Conflict(
                    f"{next(iter(update.tensors.values())).where}: two alphas for {update.name}: {alpha} and {stated}; "
                    "--alpha tensors or --alpha config says which to believe",
                    fault="two-alphas",
                ),
                _keys(update.tensors),
            )
    if alpha is not None and (alpha.value or not isinstance(given, float)):
        pass  # `--alpha X` speaks for modules whose alpha the file lacks or says to be 0; see `_refuse_idle_alpha`.
    elif isinstance(given, float):
        alpha = Fact(given, Certainty.GIVEN, "--alpha")
    elif dialect.convention == "rank":
        alpha = Fact(float(rank), Certainty.ASSUMED, f"none stored: readers of {dialect.title} apply scale 1")
    else:
        alpha = Fact(None, Certainty.UNKNOWN, rule.absent or "no tensor, header or config holds it")
    return Update(update.component, update.module, update.method, update.tensors, alpha, rule.rslora, update.options)


def _flags(update: Update) -> Update:
    """The update with the flags that its file keeps as one-element tensors."""
    flags = {role: update.tensors[role] for role in METHODS[update.method].flags if role in update.tensors}
    if not flags:
        return update
    options = dict(update.options)
    for role, tensor in flags.items():
        try:
            options[role] = bool(tensor.item())
        except ValueError as error:
            raise BrokenAdapter(f"{tensor.where}: shape {list(tensor.shape)}; {role} must be one value") from error
    return replace(update, tensors={r: t for r, t in update.tensors.items() if r not in flags}, options=options)


def _magnitude(update: Update, dialect: Dialect) -> Update:
    """A DoRA magnitude as a flat vector with its axis stated.

    As columns and rows: (out, 1, …) is per output, (1, in, …) per input.  As vectors (peft): always per output.
    """
    tensor = update.tensors.get("magnitude")
    if tensor is None:
        return update
    axis = "out"
    if not dialect.vectors and len(tensor.shape) > 1 and tensor.shape[0] == 1 and tensor.numel > 1:
        axis = "in"
    flat = tensor.reshape((tensor.numel,))
    return replace(update, tensors={**update.tensors, "magnitude": flat}, options={**update.options, "dora_axis": axis})


def _sized(update: Update, architecture: Architecture | None) -> Update:
    """The update with the shape of its module, where its tensors do not hold that and the base is known."""
    if not METHODS[update.method].needs_shape or architecture is None:
        return update
    component = architecture.components.get(update.component)
    spec = component.spec(update.module) if component is not None else None
    if spec is None or not spec.shape:
        return update
    return replace(update, options={**update.options, "shape": spec.shape})


def _odd_shapes(
    updates: list[Update], groups: list[Group], dialect: Dialect, architecture: Architecture | None
) -> dict[str, dict[str, list[int]]]:
    """The shapes that writing the update in its dialect would not give again: kernels left out, or flattened."""
    out: dict[str, dict[str, list[int]]] = {}
    dialect = replace(dialect, exact_shapes=True)
    for update, entry in zip(updates, groups, strict=True):
        if as_usual(update, architecture):
            continue
        for role, tensor in entry.tensors.items():
            if role not in update.tensors:
                continue
            try:
                written = shaped(dialect, update, role, update.tensors[role], architecture)
            except CannotRepresent:
                continue
            if written.shape != tensor.shape:
                out.setdefault(f"{update.component}.{update.module}", {})[role] = list(tensor.shape)
    return out


def _joined(carried: Carried, dialect: Dialect, updates: list[Update]) -> dict[str, list[list[Any]]]:
    """What the conversion that wrote the file says of fused modules that it joined."""
    recorded = carried.spelling.get(dialect.name, {}).get("joined", {})
    present = {f"{u.component}.{u.module}" for u in updates}
    return {at: blocks for at, blocks in recorded.items() if at in present}


def _no_twins(updates: list[Update], request: Request) -> None:
    seen: dict[tuple[str, str, str], Update] = {}
    for update in updates:
        first = seen.setdefault(update.key, update)
        if first is not update:
            one, two = (next(iter(u.tensors.values())) for u in (first, update))
            request.wrong(
                BrokenAdapter(
                    f"{one.where} and {two.key!r} both belong to {update.name}: the file holds this module twice, "
                    "under two spellings",
                    fault="twice",
                    keys=(one.key, two.key),
                )
            )


def _spelling(
    reading: Reading,
    updates: list[Update],
    alphas: Mapping[str, tuple[str, tuple[int, ...]]],
    groups: list[Group],
    architecture: Architecture | None,
    carried: Carried,
) -> dict[str, Any]:
    """What the keys leave open: enough to write the same file again."""
    spelling: dict[str, Any] = {}
    if reading.adapter_name:
        spelling["adapter_name"] = reading.adapter_name
    if reading.prefix is not None:
        spelling["prefix"] = reading.prefix
        if not all(g.place.saved for g in groups if g.place.prefix == reading.stands_for):
            spelling["prefix_for"] = reading.stands_for
    for place in {g.place for g in groups}:
        component = (place.among(architecture.components) if architecture is not None else None) or place.component
        usual = writing_place(reading.dialect, component, architecture)
        if usual is not None and usual.component != "*" and usual.prefix != place.prefix:
            spelling.setdefault("prefixes", {})[component] = place.prefix
    flags = {entry.tensors[f].dtype for entry in groups for f in METHODS[entry.method].flags if f in entry.tensors}
    if flags - {FLAG_DTYPE}:
        spelling["flag_as"] = min(flags)
    joined = _joined(carried, reading.dialect, updates)
    if joined:
        spelling["joined"] = joined
    shapes = _odd_shapes(updates, groups, reading.dialect, architecture)
    if shapes:
        spelling["shapes"] = shapes
    if reading.dialect.alpha is not AlphaIn.TENSOR:
        return spelling
    scaled = [u for u in updates if u.alpha is not None]
    absent = [f"{u.component}.{u.module}" for u in scaled if f"{u.component}.{u.module}" not in alphas]
    if absent:
        spelling["alpha_absent"] = "all" if len(absent) == len(scaled) else absent
    idle = {
        f"{u.component}.{u.module}": u.alpha.value
        for u in scaled
        if u.alpha is not None and METHODS[u.method].rank(u) is None and f"{u.component}.{u.module}" in alphas
    }
    if idle:
        spelling["idle_alpha"] = idle
    unusual = {}
    for update in scaled:
        at = f"{update.component}.{update.module}"
        if at in alphas and alphas[at] != (next(iter(update.tensors.values())).dtype, ()):
            unusual[at] = [alphas[at][0], list(alphas[at][1])]
    if unusual and len({str(v) for v in unusual.values()}) == 1 and len(unusual) == len(scaled):
        spelling["alpha_as"] = next(iter(unusual.values()))
    elif unusual:
        spelling["alpha_as"] = unusual
    return spelling
