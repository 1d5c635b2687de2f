"""The proof of `--fix`: what was written, read back, is what was there but for what was to be changed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from adapterops.adapter import Update
from adapterops.errors import AdapterOpsError, ProofFailed
from adapterops.methods import METHODS
from adapterops.storage import LazyTensor
from adapterops.storage.folder import Folder
from adapterops.storage.source import open_in, read_json
from adapterops.storage.tensor import same_bytes
from adapterops.validation.fix_plan import Plan
from adapterops.validation.options import Options
from adapterops.validation.rule import REMOVE
from adapterops.validation.subject import Place, Subject

_SCALE = 1e-9
"""The largest relative difference of two scales that are the same number, computed by two ways."""


@dataclass(frozen=True, slots=True)
class Overlay:
    """A folder as it will be once files of another one are put into it, and some of its own taken away."""

    own: Folder
    above: str
    files: tuple[str, ...]
    removed: tuple[str, ...]

    @property
    def path(self) -> str:
        """How messages name it: as the folder that it will be."""
        return self.own.path

    @property
    def notes(self) -> tuple[str, ...]:
        """Those of the folder."""
        return self.own.notes

    def names(self) -> list[str]:
        return sorted({*self.own.names(), *self.files} - set(self.removed))

    def is_folder(self, name: str) -> bool:
        return name not in self.files and self.own.is_folder(name)

    def fetch(self, name: str) -> str:
        return os.path.join(self.above, name) if name in self.files else self.own.fetch(name)

    def folder(self, name: str) -> Folder:
        return self.own.folder(name)

    def ranges(self, name: str) -> None:
        return None


def prove_same(
    before: Subject,
    above: str,
    files: Iterable[str],
    removed: Iterable[str],
    plan: Plan,
    metadata: Mapping[str, str] | None,
) -> None:
    """Compare an adapter with what it will be once `files` of the folder `above` are put beside or over its own.

    Every tensor that stays must be there under its new name, bit by bit, and no other; header (`metadata`, None where it
    stays) and config must say what was planned and nothing else; and every module that could be understood must be
    computed as before.  Raises `ProofFailed`.
    """
    gone, name = set(removed), before.place.name
    after = Overlay(before.place.folder, above, tuple(files), tuple(gone - set(files)))
    if name in gone:  # a single file under a new name
        name = next(iter(sorted(set(files) - set(before.files))), name)
    written = Subject(Place(after, name), Options())
    if plan.config:
        _same_config(before, after, plan)
    if before.source is None:
        return
    held = open_in(before.place.folder, before.place.name, _ignored)
    try:
        now = open_in(after, name, _ignored)
    except AdapterOpsError as error:
        raise ProofFailed(
            f"{before.path}: what was written cannot be read back ({error}); nothing was changed"
        ) from error
    _same_tensors(before.path, held.tensors, now.tensors, plan)
    if metadata is not None and dict(now.metadata) != dict(metadata):
        raise ProofFailed(f"{before.path}: the header that was written says something else; nothing was changed")
    _same_updates(before, written, plan)


def _same_config(before: Subject, after: Overlay, plan: Plan) -> None:
    name = os.path.basename(before.config_path)
    expected = read_json(before.place.folder.fetch(name))
    for field, value in plan.config.items():
        if value is REMOVE:
            expected.pop(field, None)
        else:
            expected[field] = value
    if read_json(after.fetch(name)) != expected:
        raise ProofFailed(f"{before.config_path}: cannot be edited in place; change it by hand; nothing was changed")


def _ignored(error: AdapterOpsError) -> None:
    """A fault of the config: it is compared as it is."""


def _same_tensors(path: str, held: Mapping[str, LazyTensor], now: Mapping[str, LazyTensor], plan: Plan) -> None:
    left = set(now)
    for key, tensor in held.items():
        if key in plan.drop:
            continue
        name = plan.keys.get(key, key)
        twin = now.get(name) if name in left else None
        if twin is None or not same_bytes(tensor, twin):
            what = "is not among what was written" if twin is None else "was written with other contents"
            raise ProofFailed(f"{path}: {key[:120]!r} {what}; nothing was changed")
        left.discard(name)
    if left:
        raise ProofFailed(f"{path}: {min(left)[:120]!r} would be there unasked; nothing was changed")


def _same_updates(before: Subject, written: Subject, plan: Plan) -> None:
    """Insist that each update is still read from the same tensors, as the same method with the same scale and options.

    Modules may have other names (a wrapper's prefix is gone); the bytes have been compared.
    """
    updates: dict[tuple[tuple[str, str], ...], list[Update]] = {}
    for update in written.updates:
        updates.setdefault(_tensors(update, {}), []).append(update)
    for update in before.updates:
        lost = [t.key for t in update.tensors.values() if t.key in plan.drop]
        if lost:
            raise ProofFailed(
                f"{before.path}: {update.name} uses {lost[0][:120]!r}, which was to go; nothing was changed"
            )
        if update.method == "saved" and all(t.key in plan.keys for t in update.tensors.values()):
            continue  # a name that said nothing: what it is, its new name says
        twins = updates.get(_tensors(update, plan.keys), [])
        if not any(_same(update, twin) for twin in twins):
            raise ProofFailed(
                f"{before.path}: {update.method} of {update.name} would compute something else; nothing was changed"
            )


def _tensors(update: Update, renamed: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((role, renamed.get(t.key, t.key)) for role, t in update.tensors.items()))


def _same(one: Update, two: Update) -> bool:
    method = METHODS[one.method]
    if one.method != two.method:
        return False
    first, second = method.scale(one), method.scale(two)
    if first is not None and (second is None or not abs(first - second) <= _SCALE * abs(first)):
        return first != first and second != second  # NaN is as broken as it was
    ignored = method.compared | {"shape"}
    options = {name for name in (*one.options, *two.options) if name not in ignored}
    return all(one.options.get(name) == two.options.get(name) for name in options)
