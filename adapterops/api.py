"""The library's front door: load, save, convert.  The command line is a thin skin over these."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from adapterops import registry
from adapterops.adapter import COMPONENTS, Adapter, Certainty, Fact, Update
from adapterops.architectures import Architecture
from adapterops.dialects.read import Request
from adapterops.dialects.table import AlphaIn, Dialect
from adapterops.dialects.verbatim import named_for
from adapterops.errors import (
    AdapterOpsError,
    CannotRepresent,
    OutputExists,
    ProofFailed,
    UsageError,
)
from adapterops.loading import PathLike, load, read_source
from adapterops.methods import METHODS
from adapterops.operations.biases import spoken
from adapterops.plugin import Fitted, Format, Output, Rounding, Target
from adapterops.proof import Proof, check_finite, prove
from adapterops.storage import open_source
from adapterops.storage.output import Progress, Staged, Timings, check_target, nothing
from adapterops.storage.source import FOLDER_WEIGHTS, stem
from adapterops.strength import insist_on_alphas, notes_on_alphas

_DTYPE_NAMES = {
    "float64": "F64", "f64": "F64", "fp64": "F64",
    "float32": "F32", "f32": "F32", "fp32": "F32", "float": "F32",
    "float16": "F16", "f16": "F16", "fp16": "F16", "half": "F16",
    "bfloat16": "BF16", "bf16": "BF16",
}  # fmt: skip
_SAFETENSORS = (".safetensors", ".sft")
_OTHERS = (".gguf",)
"""How files of other containers end, which a single format writes."""
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True, slots=True)
class Result:
    """What a conversion did.

    `folded` are source keys that became facts (an alpha that now stands in a config), `dropped` what was left out
    under `allow_drop`; every other key was converted.
    """

    source: str
    path: str
    source_dialect: str
    dialect: str
    architecture: Fact[str | None]
    modules: int
    tensors: int
    bytes: int
    proof: Proof | None
    folded: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    timings: Timings = field(default_factory=Timings)
    reader: str = ""


def save(
    adapter: Adapter,
    path: PathLike,
    *,
    format: str | None = None,
    dtype: str | None = None,
    fold_alpha: bool = False,
    fields: Mapping[str, Any] | None = None,
    allow_drop: bool = False,
    repair: bool = False,
    reader: str | None = None,
    overwrite: bool = False,
    verify: bool = True,
    progress: Progress = nothing,
) -> Result:
    """Write an adapter, prove the output against it, and only then let it appear at `path`.

    `format` names a format or dialect; without it the adapter is written as it was read, in its own dialect and
    spelling.  `dtype` rounds the tensors, `fold_alpha` bakes the scale into the second factor,
    `repair` writes a config that says what the tensors are and nothing more (the changes are notes), `reader` what one of the
    format's `readers` understands.

    Raises `CannotRepresent` where the format cannot hold something, `ProofFailed` where the output differs from
    the source by more than rounding explains, `OutputExists`, `OutputFailed` …; nothing is left behind then.
    """
    form, dialect = registry.find(format or adapter.provenance.dialect)
    insist_on_reader(form, reader)
    faithful = format is None and not reader  # a reader knows the usual spelling alone
    target = Target(dialect, adapter.base, dict(fields or {}), faithful, allow_drop, repair, reader or "")
    adapter, out = planned(adapter, target, Rounding(dtype_named(dtype), fold_alpha))
    if not any(u.method != "saved" for u in out.kept):
        raise CannotRepresent(f"{adapter.provenance.path}: nothing of it is left to write as {dialect.title}")
    place = place_of(os.fspath(path), form)
    timings = Timings()
    if out.rounded:
        import numpy as np  # noqa: F401  (what computes values while they are copied is not to be loaded meanwhile)
    names = [file.path or os.path.basename(place) for file in out.files]
    check_target(place, form.is_folder, names, overwrite)
    _spare_sources(adapter, place, form, names)
    with Staged(place, form.is_folder, overwrite, timings) as staged:
        for file in out.files:
            if file.text is not None:
                staged.write_text(file.path, file.text)
            elif file.write is not None:
                staged.write_with(file.path, file.write, progress)
            else:
                staged.write_tensors(file.path, file.tensors, file.metadata, progress)
        started = time.perf_counter()
        kept = adapter.with_updates(adapter.updates[u.key] for u in out.kept)
        proof = None
        if verify:
            proof = _prove(kept, staged.staged, place, dialect, out.rounded, progress)
        else:
            check_finite(kept, progress)
        timings.proof = time.perf_counter() - started
        staged.commit()
    return replace(_result(adapter, out, place, form, dialect, proof, timings), reader=reader or "")


def planned(adapter: Adapter, target: Target, rounding: Rounding) -> tuple[Adapter, Output]:
    """What of the adapter a target takes, and the files that would hold it; nothing is written.

    Raises `CannotRepresent` where the target's format cannot hold something, `UsageError` for a field that nobody takes.
    """
    form, path = registry.formats()[target.dialect.format], adapter.provenance.path
    _insist_on_use(adapter, target.dialect, target.fields)
    target = target._replace(fields=_not_taken(adapter, form, target.fields))
    insist_on_alphas(adapter)
    adapter = named_for(adapter, target.dialect)
    adapter = spoken(form.prepared(adapter), target.dialect, rounding.fold_alpha)
    _insist_on_init(adapter, form)
    try:
        fit = _fitted(adapter, form, target, rounding)
        adapter, rounded = fit.source, bool(rounding.dtype or rounding.fold_alpha or fit.rounded)
        out = form.write(fit.adapter, target)
    except CannotRepresent as error:
        raise (error if path in str(error) else CannotRepresent(f"{path}: {error}")) from error
    out = out._replace(
        kept=tuple(u for u in out.kept if u.key in adapter.updates),
        dropped=(*fit.dropped, *out.dropped),
        notes=(*fit.notes, *out.notes),
        rounded=rounded or out.rounded,
    )
    return adapter, out


def insist_on_reader(form: Format, reader: str | None) -> None:
    """Raise `UsageError` for a reader that the format does not name."""
    if reader is None or reader in form.readers:
        return
    having = {f.name: f.readers for f in registry.formats().values() if f.readers}
    known = [f"--to {name} --for {own}" for name, readers in having.items() for own in readers]
    raise UsageError(f"--for {reader}: not known for --to {form.name}; there is {', '.join(known)}")


def _fitted(adapter: Adapter, form: Format, target: Target, rounding: Rounding) -> Fitted:
    """What is left of the adapter, and the same in the tensors that are written."""
    if target.reader:
        return form.fitted(adapter, target, rounding)
    return Fitted(adapter, adapter.with_updates(_map(u, rounding.dtype, rounding.fold_alpha) for u in adapter))


def _prove(adapter: Adapter, staged: str, place: str, dialect: Dialect, rounded: bool, progress: Progress) -> Proof:
    # What the source was read with, where it has every module; saved heads need not be in a table.
    own = [u for u in adapter if u.component in COMPONENTS]
    known = adapter.base is not None and all(_in_base(u, adapter.base) for u in own)
    given = adapter.base if known else None
    try:
        back = read_source(open_source(staged), dialect, Request(given))
    except AdapterOpsError as error:
        what = str(error).replace(staged, place)
        raise ProofFailed(f"{place}: what was written cannot be read back ({what}); nothing was written") from error
    return prove(adapter, back, place, rounded, progress)


def _in_base(update: Update, base: Architecture) -> bool:
    component = base.components.get(update.component)
    return component is not None and component.spec(update.module) is not None


def _insist_on_use(adapter: Adapter, dialect: Dialect, fields: Mapping[str, Any]) -> None:
    """Raise `UsageError` for a field that reading the source did not take, where the target writes no config."""
    if registry.formats()[dialect.format].takes_fields:
        return
    known, taken = adapter.provenance.dialect, adapter.provenance.given
    own = registry.find(known)[0].own_fields if known else frozenset[str]()
    unused = next((name for name in fields if name not in taken and name not in own), None)
    if unused is not None:
        said = f"; of {known} only {', '.join(sorted(own))} can be said" if own else ""
        neither = f"neither {known} nor {dialect.name} has a" if known != dialect.name else f"{known} has no"
        raise UsageError(f"--set {unused}: {neither} PEFT config to set it in{said}")


def _not_taken(adapter: Adapter, form: Format, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `--set` that the source's format has not taken for facts of its own."""
    source = registry.formats().get(adapter.provenance.format)
    taken = source.own_fields - form.own_fields if source is not None else frozenset()
    return {name: value for name, value in fields.items() if name not in taken}


def _insist_on_init(adapter: Adapter, form: Format) -> None:
    """Raise `CannotRepresent` where the deltas are relative to a base that the target cannot tell of."""
    if adapter.mutated_init and not form.tells_init:
        raise CannotRepresent(
            f"{adapter.provenance.path}: was trained from {adapter.mutated_init}, which changed the base weights: on the "
            f"published base its deltas are wrong, and {form.title} cannot say so. Make a plain LoRA of it first "
            "(peft: save_pretrained with path_initial_model_for_weight_conversion)"
        )


def dtype_named(name: str | None) -> str | None:
    """A dtype as people and torch call it, by its safetensors name.  Raises `UsageError`."""
    if name is None:
        return None
    known = _DTYPE_NAMES.get(name.lower().removeprefix("torch."))
    if known is None:
        raise UsageError(f"unknown dtype {name!r}; known: float32, float16, bfloat16, float64")
    return known


def _map(update: Update, dtype: str | None, fold: bool) -> Update:
    """The update in another dtype, or with its scale multiplied into B (and B's bias)."""
    scale = METHODS[update.method].scale(update)
    folded = fold and scale is not None
    if dtype is None and not folded:
        return update
    if not folded:
        return replace(update, tensors={role: t.mapped(dtype) for role, t in update.tensors.items()})
    tensors = METHODS[update.method].folded(update, dtype)
    rank = float(METHODS[update.method].rank(update) or 1)
    return replace(update, tensors=tensors, alpha=Fact(rank, Certainty.DERIVED, "--fold-alpha"), rslora=False)


def place_of(path: str, form: Format) -> str:
    """The file or folder that `-o` means for this format."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix in _PICKLE_SUFFIXES:
        raise UsageError(f"{path}: only safetensors are written; name a .safetensors file or a folder")
    if form.is_folder:
        if suffix in (*_SAFETENSORS, *_OTHERS):
            raise UsageError(f"{path}: {form.title} is a folder; name a folder")
        return os.path.normpath(path)
    if suffix not in form.suffixes and suffix in (*_SAFETENSORS, *_OTHERS) and not os.path.isdir(path):
        raise UsageError(f"{path}: {form.title} is a {form.suffixes[0]} file; name such a one, or a folder")
    if suffix not in form.suffixes or os.path.isdir(path):
        return os.path.join(path, form.file_name)
    return os.path.normpath(path)


def insist_on_place(path: PathLike, form: Format, adapters: Iterable[Adapter], overwrite: bool) -> None:
    """Look before long work whether its output can be put where it should go; `save` looks again.

    Raises `OutputExists` and `UsageError` as `save` does.
    """
    place = place_of(os.fspath(path), form)
    paths = {t.source.path for a in adapters for u in a for t in u.tensors.values()}
    sources = {os.path.realpath(path) for path in paths}
    if not form.is_folder:
        check_target(place, False, [""], overwrite)
        if os.path.realpath(place) in sources:
            raise UsageError(f"{place}: is one of the sources, which are never changed; name another output")
        return
    if any(source.startswith(os.path.realpath(place) + os.sep) for source in sources):
        raise UsageError(f"{place}: holds one of the sources, which are never changed; name another output")
    names = [os.path.join(folder, name) for folder in ("", *COMPONENTS) for name in FOLDER_WEIGHTS]
    check_target(place, True, names, True)
    for standing in (os.path.join(place, name) for name in names):
        if not overwrite and os.path.lexists(standing):
            raise OutputExists(f"{standing}: exists already; --overwrite replaces it")


def _spare_sources(adapter: Adapter, place: str, form: Format, names: list[str]) -> None:
    """Raise `UsageError` where the output would replace a file that the adapter is still read from."""
    paths = {t.source.path for u in adapter for t in u.tensors.values()}
    sources = {os.path.realpath(path) for path in paths}
    targets = [os.path.join(place, n) for n in names] if form.is_folder else [place]
    for target in targets:
        if os.path.realpath(target) in sources:
            raise UsageError(f"{target}: is the source itself, which is never changed; name another output")


def _result(
    adapter: Adapter, out: Output, place: str, form: Format, dialect: Dialect, proof: Proof | None, timings: Timings
) -> Result:
    files = tuple(os.path.join(place, f.path) if form.is_folder else place for f in out.files)
    scales = notes_on_alphas(adapter, assumed=dialect.name != adapter.provenance.dialect)
    notes = (*adapter.provenance.notes, *scales, *out.notes)
    # Where the target keeps alphas as tensors too, they were converted and not folded.
    written = set(adapter.provenance.folded.values()) if dialect.alpha is AlphaIn.TENSOR else set()
    return Result(
        source=adapter.provenance.path,
        path=place,
        source_dialect=adapter.provenance.dialect,
        dialect=dialect.name,
        architecture=adapter.architecture,
        modules=len({(u.component, u.module) for u in out.kept}),
        tensors=sum(len(f.tensors) for f in out.files),
        bytes=sum(t.nbytes for f in out.files for t in f.tensors.values()),
        proof=proof,
        folded=tuple(k for u in out.kept if (k := adapter.provenance.folded.get(u.key)) and k not in written),
        dropped=(*adapter.provenance.dropped, *out.dropped),
        notes=tuple(dict.fromkeys(notes)),
        files=files,
        timings=timings,
    )


def convert(
    source: PathLike,
    to: str,
    output: PathLike | None = None,
    *,
    format: str | None = None,
    arch: str | None = None,
    base: PathLike | None = None,
    layout: str | None = None,
    alpha: float | str | None = None,
    fields: Mapping[str, Any] | None = None,
    allow_drop: bool = False,
    repair: bool = False,
    dtype: str | None = None,
    fold_alpha: bool = False,
    reader: str | None = None,
    overwrite: bool = False,
    verify: bool = True,
    rename: Iterable[str] = (),
    progress: Progress = nothing,
) -> Result:
    """Convert a file or folder to the format or dialect `to`; `load` and `save` in one, with their options.

    Without `output`, the result stands in the current folder, named after the source and the target.
    """
    form, dialect = registry.find(to)
    insist_on_reader(form, reader)
    place = os.fspath(output) if output is not None else default_output(source, form, dialect)
    adapter = load(
        source,
        format=format,
        arch=arch,
        base=base,
        layout=layout,
        alpha=alpha,
        fields=fields,
        allow_drop=allow_drop,
        repair=repair,
        rename=rename,
    )
    return save(
        adapter,
        place,
        format=to,
        dtype=dtype,
        fold_alpha=fold_alpha,
        fields=fields,
        allow_drop=allow_drop,
        repair=repair,
        reader=reader,
        overwrite=overwrite,
        verify=verify,
        progress=progress,
    )


def default_output(source: PathLike, form: Format, dialect: Dialect, ending: str = "") -> str:
    """`NAME-DIALECT` (a folder format) or `NAME-DIALECT.safetensors` in the current folder; `ending` for the dialect."""
    return f"{stem(os.fspath(source))}-{ending or dialect.name}" + ("" if form.is_folder else form.suffixes[0])


__all__ = ["Result", "convert", "default_output", "load", "save"]
