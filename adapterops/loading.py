"""Reading an adapter: the half of the library's front door that writes nothing."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from math import isfinite
from typing import Any

from adapterops import architectures, registry
from adapterops.adapter import COMPONENTS, Adapter
from adapterops.architectures import LAYOUTS, Architecture, published
from adapterops.dialects.given import Given
from adapterops.dialects.read import Request
from adapterops.dialects.table import Dialect
from adapterops.errors import AmbiguousFormat, NotAnAdapter, UnknownArchitectureOfFile, UsageError
from adapterops.storage import Source, open_source

PathLike = str | os.PathLike[str]

ALPHA_WORDS = ("tensors", "header", "config", "trained")
"""What `--alpha` may say instead of a number."""


KEPT_FIELDS = ("task_type", "base_model_name_or_path", "revision", "auto_mapping", "inference_mode")
"""What a PEFT config says of an adapter whatever its method and its scale."""


def load(
    path: PathLike,
    *,
    format: str | None = None,
    arch: str | None = None,
    base: PathLike | Architecture | None = None,
    layout: str | None = None,
    alpha: float | str | None = None,
    fields: Mapping[str, Any] | None = None,
    allow_drop: bool = False,
    repair: bool = False,
    rename: Iterable[str] = (),
) -> Adapter:
    """Read an adapter.  Tensors stay on disk until they are needed.

    - `format` names the format or dialect where it is not to be recognised;
    - `arch` names a built-in base model, `base` is the config of any other (or its table), whose modules are called as
      the installed library's class has them (`layout` "installed") or as the published checkpoints do ("published");
    - `alpha` is the alpha where the file holds none, or 0, or "tensors", "header" or "config" to say which of two to believe,
      or "trained" for the scale that a block-diagonal fused projection was trained with;
    - `fields` are PEFT config fields that no source holds; those that reading took are in `provenance.given`;
    - `allow_drop` leaves unknown keys out (they are listed in `provenance.dropped`);
    - `repair` believes the tensors where a config contradicts them (else that is an error);
    - `rename` repairs keys before they are read, each entry a PATTERN=REPLACEMENT.

    Raises the errors of `adapterops.errors`, each naming the file, the tensor and what to do.
    """
    if isinstance(alpha, str) and alpha not in ALPHA_WORDS:
        raise UsageError(f"--alpha {alpha!r} is neither a number nor one of {', '.join(ALPHA_WORDS)}")
    if isinstance(alpha, float) and not isfinite(alpha):
        raise UsageError(f"--alpha {alpha} is no number that a scale can have")
    if arch is not None and base is not None:
        raise UsageError("--arch and --base both name the base model; give one of them")
    given: Architecture | None = None
    if arch is not None:
        given = architectures.load(arch)
    elif base is not None:
        given = base if isinstance(base, Architecture) else architectures.from_config(base)
    if layout is not None and layout not in LAYOUTS:
        raise UsageError(f"--layout {layout!r} is none of {', '.join(LAYOUTS)}")
    if layout is not None and base is None:
        raise UsageError("--layout chooses between the names of a base model's versions; give it with --base CONFIG")
    if layout == "published" and given is not None:
        given = published(given)
    if isinstance(alpha, int):
        alpha = float(alpha)
    source = renamed_source(path, tuple(rename))
    trained = alpha == "trained"
    said = Given(fields)
    request = Request(given, None if trained else alpha, said, allow_drop, repair)
    adapter = read_source(source, format, request)
    if said.taken:
        adapter = replace(adapter, provenance=replace(adapter.provenance, given=said.taken))
    if not trained:
        return adapter
    from adapterops.operations.fused import with_trained_scale

    return with_trained_scale(adapter)


def insist_on_use(adapter: Adapter, fields: Iterable[str], others: Collection[str] = ()) -> None:
    """Raise `UsageError` for a field of `--set` that reading had no use for, and that is none of the `others`.

    A source with a PEFT config takes every field that its config may hold.
    """
    idle = next((name for name in fields if name not in adapter.provenance.given and name not in others), None)
    if idle is None:
        return
    form, dialect = registry.find(adapter.provenance.dialect)
    known = sorted({*form.own_fields, *others})
    said = f"; it takes {', '.join(known)}" if known else ""
    raise UsageError(f"--set {idle}: reading {dialect.title} has no use for it{said}")


def renamed_source(path: PathLike, texts: tuple[str, ...]) -> Source:
    """The source, its keys repaired by the rules of `--rename`.  Raises `UsageError` for one that is none."""
    if not texts:
        return open_source(path)
    from adapterops.renaming import parse, rename

    try:
        rules = [parse(text) for text in texts]
    except ValueError as error:
        raise UsageError(f"--rename {error}") from error
    return rename(open_source(path), rules)


def read_source(source: Source, format: str | Dialect | None, request: Request) -> Adapter:
    """The adapter in an opened source, whose components may stand in subfolders; `format` is as `recognise` takes it.

    Raises what `load` raises.
    """
    if not source.parts:
        form, reading = registry.recognise(source, format, request.architecture, request.allow_drop)
        try:
            adapter = form.read(source, reading, request)
        except UnknownArchitectureOfFile:
            registry.explain(source, source.tensors)
            raise
        if not any(u.method != "saved" for u in adapter):
            raise NotAnAdapter(f"{source.path}: holds saved modules only and no update of any method")
        return adapter
    if len(source.parts) == 1:
        name, part = next(iter(source.parts.items()))
        return read_source(part if name in COMPONENTS else replace(part, component=""), format, request)
    unknown = [name for name in source.parts if name not in COMPONENTS]
    if unknown:
        raise AmbiguousFormat(f"{source.path}: holds several adapters ({', '.join(source.parts)}); name one of them")
    from adapterops.parts import join

    return join(source, [read_source(part, format, request) for part in source.parts.values()])
