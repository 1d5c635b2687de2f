"""A copy of a base model's weights with some tensors replaced: the same files, and everything else as it was."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from adapterops.errors import OutputExists, ProofFailed, UsageError
from adapterops.storage.base_weights import BaseWeights
from adapterops.storage.output import Progress, Staged, check_target, nothing
from adapterops.storage.sharded import INDEX_SUFFIX
from adapterops.storage.source import Source, open_source
from adapterops.storage.tensor import LazyTensor, same_bytes

_NUMBERED = re.compile(r"(.+)-\d+-of-\d+\.safetensors$")
_BESIDE = (".json", ".txt", ".jinja")
"""What a model's folder holds besides its weights, and is text: config, tokenizer, chat template."""
_MOST = 64 << 20
"""Bytes of such a file."""


@dataclass(slots=True)
class BaseCopy:
    """What is to be written: `weights` into the folder `place`, with the tensors in `changed` replaced."""

    weights: BaseWeights
    place: str
    changed: dict[tuple[str, str], LazyTensor] = field(default_factory=dict)
    """By part of the base and key."""

    def change(self, old: LazyTensor, new: LazyTensor) -> None:
        """Write `new` in the place of `old`, a tensor of the base of the same type and shape.

        Raises `UsageError` where that has been replaced already.
        """
        name = next(name for name, part in self.weights.parts.items() if part.tensors.get(old.key) is old)
        if (name, old.key) in self.changed:
            raise UsageError(f"{old.where}: is the weight of more than one module; their own would need one each")
        self.changed[name, old.key] = new

    def check(self, overwrite: bool) -> None:
        """Look whether the folder can be written.  Raises `OutputExists`, and `UsageError` where the base itself is there."""
        written = {os.path.realpath(os.path.join(self.place, name)) for name in self._names()}
        for part in self.weights.parts.values():
            if any(os.path.realpath(tensor.source.path) in written for tensor in part.tensors.values()):
                raise UsageError(f"{self.place}: holds the base itself, which is never changed; name another folder")
        check_target(self.place, True, self._names(), overwrite)
        if os.path.isdir(self.place):
            own = set(self._names())
            for name in self.weights.parts:
                folder = os.path.join(self.place, name)
                for other in os.listdir(folder) if os.path.isdir(folder) else ():
                    weights = other.endswith((".safetensors", INDEX_SUFFIX, ".bin"))
                    if weights and os.path.join(name, other) not in own:
                        raise OutputExists(
                            f"{os.path.join(folder, other)}: whoever reads this folder would take it for part of the base "
                            "that is to be written there; name another folder, or remove it"
                        )

    def _names(self) -> list[str]:
        names = []
        for name, part in self.weights.parts.items():
            files = _files(part)
            names += [os.path.join(name, file) for file in (*files, *_texts(part))]
            if len(files) > 1:
                names.append(os.path.join(name, _index_name(files)))
        return names

    def write(self, staged: Staged, verify: bool = True, progress: Progress = nothing) -> None:
        """Write everything into `staged`, and compare it with what was to be written."""
        for name, part in self.weights.parts.items():
            files = _files(part)
            for file, tensors in files.items():
                planned = {key: self.changed.get((name, key), tensor) for key, tensor in tensors.items()}
                metadata = {"format": "pt", **part.metadata}
                staged.write_tensors(os.path.join(name, file), planned, metadata, progress)
                if verify:
                    _prove(os.path.join(staged.folder, name, file), planned, os.path.join(self.place, name, file))
            if len(files) > 1:
                size = sum(tensor.nbytes for tensor in part.tensors.values())
                where = {key: file for file, tensors in files.items() for key in tensors}
                index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}
                staged.write_text(os.path.join(name, _index_name(files)), json.dumps(index, indent=2) + "\n")
            for text in _texts(part):
                with open(os.path.join(part.path, text), encoding="utf-8") as source:
                    staged.write_text(os.path.join(name, text), source.read())

    def left_out(self) -> Iterator[str]:
        """Files beside the weights that are not copied."""
        for part in self.weights.parts.values():
            if os.path.isdir(part.path):
                own = {*_texts(part), *(os.path.basename(t.source.path) for t in part.tensors.values())}
                for name in sorted(os.listdir(part.path)):
                    hidden = name.startswith(".") or name.endswith(INDEX_SUFFIX)
                    if not hidden and name not in own and os.path.isfile(os.path.join(part.path, name)):
                        yield name


def _files(part: Source) -> dict[str, dict[str, LazyTensor]]:
    """The tensors of each file that is to be written, named as the base's own are."""
    out: dict[str, dict[str, LazyTensor]] = {}
    for key, tensor in part.tensors.items():
        stem = os.path.splitext(os.path.basename(tensor.source.path))[0]
        out.setdefault(f"{stem}.safetensors", {})[key] = tensor
    return out


def _index_name(files: Mapping[str, object]) -> str:
    number = _NUMBERED.match(next(iter(files)))
    return (number[1] if number else "model") + INDEX_SUFFIX


def _texts(part: Source) -> list[str]:
    """The text files beside the weights in a local folder."""
    if not os.path.isdir(part.path):
        return []
    out = []
    for name in sorted(os.listdir(part.path)):
        path = os.path.join(part.path, name)
        if name.startswith(".") or name.endswith(INDEX_SUFFIX) or os.path.splitext(name)[1] not in _BESIDE:
            continue
        if os.path.isfile(path) and os.path.getsize(path) <= _MOST and _is_text(path):
            out.append(name)
    return out


def _is_text(path: str) -> bool:
    with open(path, "rb") as file:
        try:
            file.read().decode()
        except UnicodeDecodeError:
            return False
    return True


def _prove(path: str, planned: Mapping[str, LazyTensor], place: str) -> None:
    written = open_source(os.path.join(os.path.dirname(path), os.path.basename(path))).tensors
    wrong = next((k for k, t in planned.items() if k not in written or not same_bytes(t, written[k])), None)
    if wrong is not None or len(written) != len(planned):
        raise ProofFailed(f"{place}: tensor {wrong!r}, read back, is not what was to be written; nothing was written")
