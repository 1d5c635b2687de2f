"""Adapters in, one adapter out: the plan, the work on several modules at a time, the result on disk.

Every module is a piece of work of its own, with torch on one thread in it, so that the bytes that come out do not depend on
how many are at work.  Results go to a nameless file whose layout is known beforehand.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from adapterops.adapter import Adapter, Certainty, Fact, Provenance, Update
from adapterops.architectures import Architecture
from adapterops.errors import AdapterOpsError, CannotRepresent, UsageError
from adapterops.loading import KEPT_FIELDS
from adapterops.merging import bases, carried, dora, experts, light, matrices, vectors
from adapterops.merging.finite import data_of
from adapterops.merging.matrices import MatrixPlan
from adapterops.merging.modules import CARRIED, Module, WeightOf, gather
from adapterops.merging.settings import Choose, ModuleReport, Settings
from adapterops.merging.vectors import VectorPlan
from adapterops.storage import dtypes
from adapterops.storage.base_weights import open_base
from adapterops.storage.spool import Spool
from adapterops.storage.tensor import CHUNK, TORCH_NAMES, LazyTensor
from adapterops.threads import cores

if TYPE_CHECKING:
    import torch

Progress = Callable[[int, int], None]
"""Called with the modules done and all of them."""

_MOST_WORKERS = 8
TOGETHER = 1 << 21
"""Numbers of the factors that a worker decomposes together, in float64."""
_SHARES = 4
"""Into how many pieces of work modules of one size are divided at least, whatever the number of workers."""
_BYTES = 16
"""Bytes that a worker needs for each number of the largest delta: it, the result, and what decomposing takes."""


def nothing(done: int, total: int) -> None:
    """The progress of a caller who does not ask for any."""


@dataclass(frozen=True, slots=True)
class Merged:
    """One adapter made of several, what became of each module, and what the user should know."""

    adapter: Adapter = field(repr=False)
    modules: tuple[ModuleReport, ...] = field(repr=False)
    notes: tuple[str, ...] = ()
    shared: int = 0
    """Modules to which more than one adapter adds something; stacked experts are one."""
    base_hash: str = ""
    """Of the base weights that DoRA was folded against."""


@dataclass(slots=True)
class _Work:
    """One module: what is planned, where its results go."""

    module: Module
    matrix: MatrixPlan | None = None
    vectors: list[VectorPlan] = field(default_factory=list)
    places: dict[tuple[str, str], LazyTensor] = field(default_factory=dict)
    """(method, role) to the room for the result."""
    report: ModuleReport | None = None

    @property
    def size(self) -> int:
        """The numbers of its weight."""
        return self.matrix.shape.rows * self.matrix.shape.columns if self.matrix is not None else 0


def combine(
    adapters: Sequence[Adapter],
    weights: Sequence[WeightOf],
    choose: Choose,
    settings: Settings,
    *,
    folder: str = "",
    base_weights: str = "",
    metadata: Mapping[str, str] | None = None,
    check: Callable[[list[tuple[str, str]]], None] | None = None,
    ready: Callable[[Adapter], None] | None = None,
    progress: Progress = nothing,
) -> Merged:
    """Merge the adapters, each with its weights, module by module as `choose` says.

    `check` is shown the modules before the work begins, and `ready` what will come out, with zeros in it.  The result's
    tensors stand in a nameless file in `folder`.  DoRA magnitudes are folded against `base_weights`, if given.

    Raises `UsageError` for adapters that cannot be merged so, `CannotRepresent` for what could only be lost,
    `BrokenAdapter` for numbers that are none.
    """
    adapters, stacks = experts.apart(adapters)
    bases.insist(adapters)
    fact, base = bases.common_base(adapters)
    verbatim = bases.common_names(adapters)
    weights, choose = [stacks.asked(weight) for weight in weights], stacks.asked(choose)
    modules = gather(adapters, weights, base)
    if not modules:
        raise UsageError("nothing is left to merge: every weight is 0")
    if check is not None:
        check(list(dict.fromkeys((m.component, stacks.whole(m.component, m.name)) for m in modules)))
    # What they have in common is asked of the adapters, not of what their weights leave.
    every = gather(adapters, [lambda component, module: 1.0] * len(adapters), base)
    bases.insist_on_overlap(adapters, [m.adapters for m in every], settings.allow_disjoint)
    shared = len({(m.component, stacks.whole(m.component, m.name)) for m in every if len(m.adding) > 1})
    notes, base_hash = bases.notes(adapters), ""
    if base_weights:
        opened = open_base(base_weights, {m.component for m in modules})
        folded, base_hash = dora.fold(modules, adapters, opened, base)
        what = f"in {folded} modules: the output is plain LoRA there" if folded else "nowhere: no adapter has any"
        notes += [f"DoRA was folded against {base_weights} {what}"]
    dtype = settings.dtype or widest(adapters)
    spool = Spool("the merged adapter", folder)
    work = [_planned(module, choose, spool, dtype, base) for module in modules]
    _complete_biases(work, spool, dtype)
    notes += _magnitude_note(work)
    updates: list[Update] = []
    # What may be refused goes before what takes long.
    for piece in work:
        updates += _updates(piece, settings.dtype)
        for method in piece.module.carried:
            update, told = carried.merge(piece.module, method, settings, _keeper(spool))
            updates.append(_rounded(update, settings.dtype))
            notes += told
    notes += _lone_notes(work, adapters)
    updates = stacks.together(updates, base)
    empty = Adapter(
        {}, fact, _provenance(adapters, fact), dict(metadata or {}), _config(adapters), base, verbatim=verbatim
    )
    merged = empty.with_updates(updates)
    if ready is not None and not all(_is_light(piece, dtype) for piece in work):
        spool.fill()
        ready(merged)
    _perform(work, spool, settings, dtype, progress)
    reports = tuple(piece.report for piece in work if piece.report is not None)
    return Merged(merged, reports, tuple(dict.fromkeys(notes)), shared, base_hash)


def _lone_notes(work: Sequence[_Work], adapters: Sequence[Adapter]) -> list[str]:
    """What is kept whole because only one adapter has it."""
    lone: dict[int, list[str]] = {}
    for piece in work:
        for entries in piece.module.carried.values():
            if len(entries) == 1 and len(adapters) > 1:
                lone.setdefault(entries[0][0], []).append(piece.module.name)
    return [
        f"{adapters[number].provenance.path}: kept whole, since no other adapter has it: {names[0]}"
        + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        for number, names in lone.items()
    ]


def _magnitude_note(work: Sequence[_Work]) -> list[str]:
    kept = [piece for piece in work if piece.matrix is not None and piece.matrix.magnitude is not None]
    if all(term.weight == 1 for piece in kept for term in piece.module.terms):
        return []
    return [
        f"DoRA magnitudes are kept in {len(kept)} modules, where the adapters have the same: weights scale the deltas under "
        "them, as peft's do, and not the magnitudes; --base-weights BASE folds them into the deltas"
    ]


def widest(adapters: Sequence[Adapter]) -> str:
    """The narrowest float type that holds every number of every input (what is carried whole keeps its own)."""
    changed = [u for a in adapters for u in a if u.method not in CARRIED] or [u for a in adapters for u in a]
    found = {t.dtype for u in changed for t in u.tensors.values() if t.dtype in dtypes.NUMBERS}
    return carried.wide(sorted(found))


def _planned(module: Module, choose: Choose, spool: Spool, dtype: str, base: Architecture | None) -> _Work:
    choice = choose(module.component, module.name)
    work = _Work(module)
    key = f"{module.component}.{module.name}"
    if module.terms and "trainable_tokens" in module.carried:
        rows = next(iter(module.carried["trainable_tokens"][0][2].tensors.values()))
        raise CannotRepresent(
            f"{rows.where}: are rows that replace those of {module.title}, which {module.terms[0].where} changes as a whole; no "
            "reader does both to one layer: a weights file with 0 there leaves one of them out"
        )
    if module.terms:
        work.matrix = matrices.plan(module, choice, base)
        method = "lora" if work.matrix.rank is not None else "diff"
        for role, shape in work.matrix.outputs.items():
            work.places[method, role] = spool.reserve(f"{key}.{role}", dtype, shape)
    for method, role in module.vectors:
        plan = vectors.plan(module, method, role, choice)
        work.vectors.append(plan)
        work.places[method, role] = spool.reserve(f"{key}.{role}", dtype, plan.shape)
    if ("lora", "bias") in work.places and ("lora", "B") not in work.places:
        raise CannotRepresent(f"{module.title}: a LoRA bias without its factors")
    return work


def _complete_biases(work: Sequence[_Work], spool: Spool, dtype: str) -> None:
    """Give every LoRA of a component a bias, zero where there was none, if any has one: peft knows all or none."""
    for component in {piece.module.component for piece in work if ("lora", "bias") in piece.places}:
        for piece in work:
            if piece.module.component == component and ("lora", "B") in piece.places:
                rows = piece.places["lora", "B"].shape[0]
                key = f"{component}.{piece.module.name}.bias"
                if ("lora", "bias") not in piece.places:
                    piece.places["lora", "bias"] = spool.reserve(key, dtype, (rows,))


def _perform(work: Sequence[_Work], spool: Spool, settings: Settings, dtype: str, progress: Progress) -> None:
    """Compute every piece of work: what numpy can do at once, the rest several at a time."""
    if settings.workers < 0:
        raise UsageError(f"--workers {settings.workers}: give a number of modules at a time, or 0 for as many as fit")
    few: list[_Work] = []
    heavy: list[_Work] = []
    for piece in work:
        (few if settings.device in ("auto", "cpu") and _is_light(piece, dtype) else heavy).append(piece)
    if few:
        # One after the other: numpy's calls are too short for several threads to do anything but wait for each other.
        desk = light.Desk()
        for done, piece in enumerate(few, 1):
            _compute_light(piece, spool, dtype, desk)
            progress(done, len(work))
    if heavy:
        _share_out(heavy, spool, settings, dtype, lambda done, total: progress(done + len(few), len(work)))


def _is_light(piece: _Work, dtype: str) -> bool:
    return piece.matrix is not None and not piece.vectors and light.serves(piece.matrix, dtype)


def _compute_light(piece: _Work, spool: Spool, dtype: str, desk: light.Desk) -> None:
    assert piece.matrix is not None

    def write(role: str, at: int, data: memoryview) -> None:
        spool.write_part(piece.places["lora", role], at, data)

    try:
        piece.report = light.compute(piece.matrix, dtype, desk, write)
    except OverflowError as error:
        raise _too_large(piece.places["lora", str(error)]) from error
    for (_, role), place in piece.places.items():
        if role not in ("A", "B"):
            spool.write(place, memoryview(bytes(place.nbytes)))


def _share_out(work: Sequence[_Work], spool: Spool, settings: Settings, dtype: str, progress: Progress) -> None:
    import torch

    devices = devices_of(settings.device)
    kind = getattr(torch, TORCH_NAMES[dtype])
    largest = max((piece.size for piece in work), default=0)
    count = min(len(work), settings.workers or _workers(devices, largest))
    # The large ones first, so that none is left alone at the end.
    waiting: queue.SimpleQueue[list[_Work]] = queue.SimpleQueue()
    for bundle in sorted(_bundles(work), key=lambda bundle: -bundle[0].size):
        waiting.put(bundle)
    stop = threading.Event()
    done, lock = 0, threading.Lock()

    def labour(device: torch.device) -> None:
        nonlocal done
        with _on(device):
            while not stop.is_set():
                try:
                    bundle = waiting.get_nowait()
                except queue.Empty:
                    return
                try:
                    _compute(bundle, spool, settings, device, kind)
                except AdapterOpsError as error:
                    told = any(piece.module.name in str(error) for piece in bundle)
                    raise (error if told else type(error)(f"{bundle[0].module.title}: {error}")) from error
                with lock:
                    for _ in bundle:
                        done += 1
                        progress(done, len(work))

    with _one_thread(), ThreadPoolExecutor(count, thread_name_prefix="adapterops-merge") as pool:
        try:
            futures = [pool.submit(labour, devices[n % len(devices)]) for n in range(count)]
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()
        for future in futures:
            future.result()


def _bundles(work: Sequence[_Work]) -> list[list[_Work]]:
    """The pieces, those that are computed together in one list: few enough for little memory, and for several workers."""
    out: list[list[_Work]] = []
    alike: dict[matrices.Likeness, list[_Work]] = {}
    for piece in work:
        likeness = matrices.likeness(piece.matrix) if piece.matrix is not None else None
        if likeness is None:
            out.append([piece])
        else:
            alike.setdefault(likeness, []).append(piece)
    for likeness, pieces in alike.items():
        step = max(1, min(TOGETHER // likeness.numbers, -(-len(pieces) // _SHARES)))
        out += [pieces[start : start + step] for start in range(0, len(pieces), step)]
    return out


def devices_of(name: str) -> list[torch.device]:
    """The devices that a `--device` means.  Raises `UsageError` for one that is not there."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name!r} is none of auto, cpu, cuda, cuda:N, mps") from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if device.index is None and count:
            return [torch.device("cuda", n) for n in range(count)]
        if device.index is None or device.index >= count:
            raise UsageError(
                f"--device {name}: this machine has {count} CUDA devices that torch can use; --device cpu works"
            )
    elif device.type == "mps":
        if not torch.backends.mps.is_available():
            raise UsageError("--device mps: torch finds none on this machine; --device cpu works")
    elif device.type != "cpu":
        raise UsageError(f"--device {name!r} is none of auto, cpu, cuda, cuda:N, mps")
    return [device]


def _workers(devices: Sequence[torch.device], largest: int) -> int:
    """How many modules to work on at a time."""
    if devices[0].type != "cpu":
        return 2 * len(devices)  # one computes while the other's tensors are on their way
    if "SC_AVPHYS_PAGES" not in getattr(os, "sysconf_names", ()):  # macOS does not say
        return min(cores(), _MOST_WORKERS)
    room = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return max(1, min(cores(), _MOST_WORKERS, room // max(1, largest * _BYTES)))


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Torch on one thread a worker: sums over several would depend on how many there are."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _on(device: torch.device) -> Iterator[None]:
    """A stream of its own on a CUDA device, so that workers' copies and computations overlap."""
    import torch

    torch.set_num_threads(1)
    if device.type != "cuda":
        with torch.inference_mode():
            yield
        return
    with torch.inference_mode(), torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):  # type: ignore[no-untyped-call]
        yield


def _compute(
    bundle: Sequence[_Work], spool: Spool, settings: Settings, device: torch.device, dtype: torch.dtype
) -> None:
    import torch

    plans = [piece.matrix for piece in bundle if piece.matrix is not None]
    if len(bundle) > 1:
        computed = iter(matrices.compute_alike(plans, settings, device, dtype))
    else:
        computed = (matrices.compute(plan, settings, device, dtype) for plan in plans)
    for piece in bundle:
        out: dict[tuple[str, str], torch.Tensor] = {}
        if piece.matrix is not None:
            method = "lora" if piece.matrix.rank is not None else "diff"
            tensors, piece.report = next(computed)
            out |= {(method, role): tensor for role, tensor in tensors.items()}
        for plan in piece.vectors:
            out[plan.method, plan.role] = vectors.compute(plan, settings, dtype)
        for key in piece.places.keys() - out.keys():
            out[key] = torch.zeros(piece.places[key].shape, dtype=dtype)
        for key, tensor in out.items():
            _keep(tensor, piece.places[key], spool)
        # What was folded against the base is as large as the base.
        piece.module.terms.clear()
        piece.matrix, piece.vectors = None, []


def _keep(tensor: torch.Tensor, place: LazyTensor, spool: Spool) -> None:
    """Write a CPU tensor of the place's type.  Raises `CannotRepresent` for numbers that this cannot hold."""
    data = data_of(tensor)
    if dtypes.has_non_finite(place.dtype, data):
        raise _too_large(place)
    spool.write(place, data)


def _too_large(tensor: LazyTensor) -> CannotRepresent:
    other = "--dtype float64, or smaller --weights" if tensor.dtype in ("F32", "F64") else "--dtype float32"
    return CannotRepresent(
        f"{tensor.key}: the merged adapter has numbers here that {tensor.dtype} cannot hold; choose {other}"
    )


def _keeper(spool: Spool) -> carried.Keep:
    import torch

    def keep(name: str, values: torch.Tensor, dtype: str) -> LazyTensor:
        place = spool.reserve(name, dtype, tuple(values.shape))
        _keep(values.to(getattr(torch, TORCH_NAMES[dtype])), place, spool)
        return place

    return keep


def _rounded(update: Update, dtype: str | None) -> Update:
    """The update in another dtype.  Raises `CannotRepresent` where that cannot hold its numbers."""
    tensors = {role: t.mapped(dtype) for role, t in update.tensors.items()}
    buffer = bytearray(CHUNK)
    for role, tensor in tensors.items():
        for length in tensor.chunks(buffer) if tensor is not update.tensors[role] else ():
            if dtypes.has_non_finite(tensor.dtype, buffer, length):
                raise _too_large(tensor)
    return replace(update, tensors=tensors)


def _updates(piece: _Work, dtype: str | None) -> list[Update]:
    """The updates that the computed tensors are; what is carried along is rounded to `dtype`, if that was asked for."""
    module, tensors = piece.module, piece.places
    out: list[Update] = []
    for method in dict.fromkeys(method for method, _ in tensors):
        own = {role: tensor for (owner, role), tensor in tensors.items() if owner == method}
        options: dict[str, Any] = {}
        alpha: Fact[float | None] | None = None
        if method == "lora":
            assert piece.matrix is not None
            rank = piece.matrix.rank or 1
            alpha = Fact(piece.matrix.alpha or float(rank), Certainty.DERIVED, "merged")
            options = matrices.update_options(piece.matrix)
            if piece.matrix.magnitude is not None:
                own["magnitude"] = piece.matrix.magnitude.mapped(dtype)
        else:
            source = next((v.update for p in piece.vectors if p.method == method for v in p.vectors), None)
            options = dict((source or module.terms[0].update).options)
        out.append(Update(module.component, module.name, method, own, alpha, False, options))
    return out


def _provenance(adapters: Sequence[Adapter], base: Fact[str | None]) -> Provenance:
    first = adapters[0].provenance
    paths = ", ".join(a.provenance.path for a in adapters)
    return Provenance(
        path=f"merge of {paths}",
        format=first.format,
        dialect=first.dialect,
        notes=bases.carried_notes(adapters, base),
        dropped=tuple(f"{a.provenance.path}: {k}" for a in adapters for k in a.provenance.dropped),
        size=sum(a.provenance.size for a in adapters),
        given=tuple(n for n in first.given if all(n in a.provenance.given for a in adapters)),
    )


def _config(adapters: Sequence[Adapter]) -> dict[str, dict[str, Any]]:
    """What the first adapter's config says that no tensor decides, with what only others of its methods say; of configs of
    other methods, what configs of all methods say."""
    out: dict[str, dict[str, Any]] = {}
    methods: dict[str, set[str]] = {}
    for adapter in adapters:
        for component, config in adapter.config.items():
            own = {u.method for u in adapter if u.component == component} - CARRIED
            if not own & methods.setdefault(component, own) and own != methods[component]:
                config = {name: value for name, value in config.items() if name in KEPT_FIELDS}
            said = out.get(component, {})
            out[component] = {**config, **{n: v for n, v in said.items() if v is not None or n not in KEPT_FIELDS}}
    return out
