"""`--fix`: what findings offer to change, applied together, proven, and only then put in place.

An adapter is mended as a whole or not at all.  The new files are written beside the old ones; before they take their
place, every tensor that stays is compared with the source's, bit by bit, and what every module computes with what it
computed.  Tensors keep the order of their bytes, so that a hash of them stays true.

A pickle that was written anew as safetensors is taken away once the new file stands: all that it held is in there bit by
bit, and left beside it it would go on being the danger that it was, and become another adapter with the next change.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from adapterops.errors import AdapterOpsError, OutputExists, OutputFailed, UnreadableFile
from adapterops.storage import LazyTensor, Source, safetensors
from adapterops.storage.folder import LocalFolder
from adapterops.storage.output import Staged
from adapterops.storage.source import HUB, open_in, read_json
from adapterops.storage.tensor import CHUNK
from adapterops.validation import hashes
from adapterops.validation.fix_plan import Plan, plan_of
from adapterops.validation.fix_proof import prove_same
from adapterops.validation.fix_text import difference, edited, header_lines
from adapterops.validation.options import Options
from adapterops.validation.report import Checked
from adapterops.validation.rule import REMOVE, Finding
from adapterops.validation.subject import Place, Subject

_LEGACY = "sshs_legacy_hash"
"""A hash of bytes at a fixed place in the file: another header moves others there (sd-scripts `library/train_util.py`)."""


@dataclass(frozen=True, slots=True)
class Mended:
    """What was done to one adapter, a line each; `diff` shows it.

    `left` are the findings that could be mended and were not, and `why`, one reason each.  `path` is where the adapter stands
    now: a pickle becomes a file of another name.
    """

    path: str
    done: tuple[str, ...] = ()
    diff: str = ""
    left: tuple[Finding, ...] = ()
    why: tuple[str, ...] = ()


def mend(checked: Checked, dry_run: bool = False) -> Mended:
    """Apply what the findings of one adapter offer to change; with `dry_run`, only say what that would be.

    Raises nothing that has to do with the adapter or its folder: what cannot be done is in `left`.
    """
    wanted = [finding for finding in checked.findings if finding.change is not None]
    if not wanted:
        return Mended(checked.path)
    try:
        if checked.path.startswith(HUB):
            raise OutputFailed("it is on the Hub, where nothing is changed; download it (`hf download`) and mend that")
        return _Mending(checked.path).mend(wanted, dry_run)
    except AdapterOpsError as error:
        why = str(error).removeprefix(f"{checked.path}: ").partition("; name a folder that may be written")[0]
    except OSError as error:
        why = f"{error.filename or checked.path}: {error.strerror}"
    return Mended(checked.path, left=tuple(wanted), why=(why,) * len(wanted))


@dataclass(slots=True)
class _Weights:
    """The new weights: their name, tensors in the order of their bytes, and header."""

    name: str
    tensors: dict[str, LazyTensor]
    metadata: dict[str, str]


@dataclass(slots=True)
class _Mending:
    """The adapter that is mended, as it stands."""

    path: str
    subject: Subject = field(init=False)
    source: Source | None = field(init=False, default=None)
    """Its tensors under the names that the file has for them."""
    folder: str = field(init=False)
    weights: str = field(init=False)
    """The name of the file with the weights; "" where there is none, or where there are several."""
    held: tuple[Mapping[str, LazyTensor], Mapping[str, str]] | None = field(init=False, default=None)
    """Its header, where it is a safetensors file that can be read."""

    def __post_init__(self) -> None:
        whole = os.path.isdir(self.path)
        parent, name = (self.path, "") if whole else os.path.split(self.path)
        self.subject = Subject(Place(LocalFolder(parent), name), Options())
        with contextlib.suppress(AdapterOpsError):
            self.source = open_in(LocalFolder(parent), name, self.subject.faults.append)
        self.folder = parent or os.curdir
        files = {tensor.source.path for tensor in self.tensors.values()} or {self.subject.weights}
        file = files.pop()
        self.weights = os.path.basename(file) if not files and os.path.isfile(file) else ""
        if self.weights and self.source is not None:
            with contextlib.suppress(UnreadableFile):
                self.held = safetensors.read_header(self._at(self.weights))

    @property
    def tensors(self) -> Mapping[str, LazyTensor]:
        return self.source.tensors if self.source is not None else {}

    @property
    def config(self) -> Mapping[str, Any]:
        return (self.source.config if self.source is not None else None) or {}

    def _at(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def mend(self, findings: list[Finding], dry_run: bool) -> Mended:
        """The work itself.  Raises an `AdapterOpsError`, or an `OSError`, where nothing can be done at all."""
        rewritten = any(f.change is not None and f.change.rewrite for f in findings)
        plan = plan_of(findings, lambda finding: self._unable(finding, rewritten), self.config)
        twice = self._twice(plan)
        if twice:
            plan = plan_of(
                findings,
                lambda f: self._unable(f, rewritten) or (twice if f.change is not None and f.change.keys else ""),
                self.config,
            )
        if not plan.findings:
            return Mended(self.path, left=tuple(plan.left), why=tuple(plan.why))
        weights = self._weights(plan)
        config = os.path.basename(self.subject.config_path)
        text = self._config_text(config) if plan.config else ""
        changed = edited(text, plan.config)
        if changed == text:
            changed = ""
        moved = {old: new for old, new in plan.rename.items() if weights is None or old != self.weights}
        removed = [*moved, *([self.weights] if weights is not None and weights.name != self.weights else [])]
        outputs = {*([weights.name] if weights else []), *([config] if changed else []), *moved.values()}
        self._insist_on_room(plan, outputs, removed, config if changed else "")
        diff = self._diff(weights, (config, text, changed) if changed else None, moved)
        now = self._now(weights, moved)
        if outputs and not dry_run:
            self._write(plan, weights, (config, changed) if changed else None, moved, removed)
        done = tuple(plan.done) if outputs else ()
        return Mended(now, done, diff, tuple(plan.left), tuple(plan.why))

    def _now(self, weights: _Weights | None, moved: Mapping[str, str]) -> str:
        """What the adapter is called afterwards."""
        own = os.path.basename(self.path)
        if os.path.isdir(self.path) or (weights is None and own not in moved):
            return self.path
        return os.path.join(os.path.dirname(self.path), weights.name if weights is not None else moved[own])

    def _twice(self, plan: Plan) -> str:
        """That two tensors would get one name; "" where none would."""
        seen: dict[str, str] = {}
        for key in (key for key in self.tensors if key not in plan.drop):
            name = plan.keys.get(key, key)
            if name in seen:
                return f"{key[:120]!r} and {seen[name][:120]!r} would both be called {name[:120]!r}"
            seen[name] = key
        return ""

    def _unable(self, finding: Finding, rewritten: bool) -> str:
        """Why the change of one finding cannot be made by itself; "" where it can."""
        change = finding.change
        if change is None:
            return ""
        missing = [key for key in (*change.keys, *change.drop) if key not in self.tensors]
        if missing:
            return f"{missing[0][:120]!r} is not in the file any more; validate it again"
        if change.keys or change.drop or change.metadata or change.rewrite:
            if self.source is None:
                return "the weights cannot be read"
            if not self.weights:
                return "the weights are spread over several files; save them as one first"
            if self.held is None and not rewritten:
                return f"{self.weights} is no safetensors file; it must become one first (its own finding does that)"
        if change.config and not os.path.isfile(self.subject.config_path):
            return f"there is no {os.path.basename(self.subject.config_path)}"
        if change.rename and (not self._renamed(finding) or os.path.basename(change.rename) != change.rename):
            return f"{finding.file} is no file of this folder"
        return ""

    def _renamed(self, finding: Finding) -> str:
        """The name of the file that a finding would have renamed."""
        own = os.path.realpath(os.path.dirname(finding.file) or os.curdir) == os.path.realpath(self.folder)
        name = os.path.basename(finding.file)
        return name if own and name and os.path.isfile(self._at(name)) else self.weights

    def _weights(self, plan: Plan) -> _Weights | None:
        """The new weights; None where they stay as they are."""
        for finding in plan.findings:
            if finding.change is not None and finding.change.rename:
                plan.rename[self._renamed(finding)] = finding.change.rename
        metadata = dict(self.held[1] if self.held is not None else {})
        entries = {k: None if v is REMOVE else v for k, v in plan.metadata.items()}
        if not (plan.keys or plan.drop or plan.rewrite or any(metadata.get(k) != v for k, v in entries.items())):
            return None
        name = plan.rename.get(self.weights, self.weights)
        if self.held is None:
            metadata.setdefault(
                "format", "pt"
            )  # as safetensors.torch.save_file is called by peft; transformers insists
            name = os.path.splitext(name)[0] + ".safetensors"
        tensors = self.held[0] if self.held is not None else dict(safetensors.in_file_order(self.tensors))
        right = hashes.KEY in entries or (
            bool(plan.drop) and (said := hashes.recorded(metadata)) is not None and said == hashes.model_hash(tensors)
        )
        kept = {plan.keys.get(key, key): tensor for key, tensor in tensors.items() if key not in plan.drop}
        for entry, value in entries.items():
            if value is None:
                metadata.pop(entry, None)
            else:
                metadata[entry] = value
        if right and hashes.KEY in metadata:
            metadata[hashes.KEY] = _hash(kept.values())
        trained = any(entry.startswith("ss_") for entry in entries)
        if _LEGACY in metadata and _LEGACY not in entries and (plan.keys or plan.drop or trained):
            del metadata[_LEGACY]
            plan.done.append(f"leave {_LEGACY} out, which no longer holds")
        return _Weights(name, kept, metadata)

    def _config_text(self, name: str) -> str:
        read_json(self._at(name))  # which refuses what cannot be edited
        with open(self._at(name), encoding="utf-8", newline="") as file:
            return file.read()

    def _insist_on_room(self, plan: Plan, outputs: set[str], removed: list[str], config: str) -> None:
        """Raise where something else stands, or a link that would be written through."""
        if len(set(plan.rename.values())) != len(plan.rename):
            raise OutputExists(f"{self.path}: two files would get one name")
        for name in sorted({*outputs, *removed, config} - {""}):
            path = self._at(name)
            if os.path.islink(path):
                raise OutputFailed(
                    f"{path}: is a link (to {os.readlink(path)}), and what it leads to may be others' too; copy the folder "
                    "with `cp -rL` and mend the copy"
                )
            if name in outputs and name not in {self.weights, config, *removed} and os.path.lexists(path):
                raise OutputExists(f"{path}: exists already; remove the one that is not wanted")

    def _diff(self, weights: _Weights | None, config: tuple[str, str, str] | None, moved: Mapping[str, str]) -> str:
        parts = []
        if config is not None:
            name, old, new = config
            parts.append(difference(old.splitlines(), new.splitlines(), self._at(name), self._at(name)))
        if weights is not None:
            tensors, metadata = self.held or (self.tensors, {})
            parts.append(
                difference(
                    header_lines(tensors, metadata),
                    header_lines(weights.tensors, weights.metadata),
                    self._at(self.weights),
                    self._at(weights.name),
                )
            )
        parts += [difference([], [], self._at(old), self._at(new)) for old, new in moved.items()]
        return "".join(parts)

    def _write(
        self,
        plan: Plan,
        weights: _Weights | None,
        config: tuple[str, str] | None,
        moved: Mapping[str, str],
        removed: list[str],
    ) -> None:
        touched = {self.weights, config[0] if config is not None else "", *moved} - {""}
        before = {name: os.stat(self._at(name)) for name in touched}
        with Staged(self.folder, is_folder=True, overwrite=True) as staged:
            if weights is not None:
                staged.write_tensors(weights.name, weights.tensors, weights.metadata, as_ordered=True)
                self._same_rights(before[self.weights], os.path.join(staged.folder, weights.name))
            if config is not None:
                staged.write_text(config[0], config[1])
                self._same_rights(before[config[0]], os.path.join(staged.folder, config[0]))
            for old, new in moved.items():
                self._link(old, staged, new)
            prove_same(self.subject, staged.folder, staged.files, removed, plan, weights.metadata if weights else None)
            for name, found in before.items():
                if _identity(os.stat(self._at(name))) != _identity(found):
                    raise OutputFailed(f"{self._at(name)}: was changed meanwhile; validate it again")
            staged.replace(removed)

    def _link(self, old: str, staged: Staged, new: str) -> None:
        """The same file under its new name, among what is to be put in place."""
        target = os.path.join(staged.folder, new)
        try:
            os.link(self._at(old), target)
        except OSError:  # no hard links on this file system
            shutil.copy2(self._at(old), target)
        staged.files.append(new)

    @staticmethod
    def _same_rights(old: os.stat_result, path: str) -> None:
        with contextlib.suppress(OSError):
            os.chmod(path, stat.S_IMODE(old.st_mode))


def _hash(tensors: Iterable[LazyTensor]) -> str:
    """`sshs_model_hash` of a file that holds these tensors, in this order."""
    digest, buffer = hashlib.sha256(), bytearray(CHUNK)
    for tensor in tensors:
        for length in tensor.chunks(buffer):
            digest.update(memoryview(buffer)[:length])
    return digest.hexdigest()


def _identity(found: os.stat_result) -> tuple[Any, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
