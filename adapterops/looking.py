"""What can be told of an adapter that no conversion takes: `inspect` of files that `load` refuses for what it knows not.

A base model without a table, or a text encoder of one, makes names unknown that mean nothing by themselves; a header that
contradicts the tensors makes the scale a choice.  Neither keeps modules, ranks, alphas and dtypes from being reported.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from adapterops.adapter import Adapter, Update
from adapterops.dialects.given import Given
from adapterops.dialects.read import Request
from adapterops.errors import AdapterOpsError, NotAnAdapter
from adapterops.loading import PathLike, read_source, renamed_source
from adapterops.registry import find

DENOISER = "denoiser"
"""The component of keys whose prefix means a U-Net in one base model and a transformer in another."""


def _harmless(error: BaseException | None) -> bool:
    """Whether the reason of a refusal leaves the tensors' own story whole."""
    return isinstance(error, AdapterOpsError) and error.fault in ("unknown-architecture", "header-alpha")


def look(
    refusal: AdapterOpsError,
    path: PathLike,
    *,
    format: str | None = None,
    alpha: float | str | None = None,
    fields: Mapping[str, Any] | None = None,
    allow_drop: bool = False,
    rename: Iterable[str] = (),
    **_: Any,
) -> Adapter:
    """The adapter that `load` refused for `refusal`, with the options that it was given, as far as it tells of itself.

    Its modules are called as the file calls them where no table knows them, and a note says why it was refused: it is to be
    looked at, not to be converted.

    Raises `refusal` where more than the base model or the header's alpha is in doubt, or no update is left to look at.
    """
    # A format that knows such files by name says so instead of the search that failed.
    if not _harmless(refusal) and not _harmless(refusal.__context__):
        raise refusal
    told: list[AdapterOpsError] = []
    said = Given(fields)
    request = Request(None, alpha, said, allow_drop, tell=told.append)
    try:
        adapter = read_source(renamed_source(path, tuple(rename)), format, request)
    except NotAnAdapter:
        raise refusal from None
    if not told or not all(map(_harmless, told)):
        raise refusal
    if adapter.base is None:
        adapter = neither(adapter)
    notes = (*adapter.provenance.notes, f"not to be converted as it stands: {refusal}")
    return replace(adapter, provenance=replace(adapter.provenance, notes=notes, given=said.taken))


def neither(adapter: Adapter) -> Adapter:
    """The adapter of a base model that is not known, with components that may be one or another called so."""
    places = find(adapter.provenance.dialect)[1].places
    either = {place.component for place in places if place.instead}
    return adapter.with_updates(_called(update, either) for update in adapter)


def _called(update: Update, either: set[str]) -> Update:
    return replace(update, component=DENOISER) if update.component in either else update
