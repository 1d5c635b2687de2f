"""Tensors spread over several safetensors files, and the index that says which file holds which.

Source: `save_torch_state_dict` of huggingface_hub (`serialization/_torch.py`), which transformers and diffusers
follow: `NAME.safetensors.index.json` holds `weight_map`, from tensor names to files beside it, and `metadata`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from adapterops.errors import InvalidHeader, UnreadableFile, UnsupportedFormat
from adapterops.storage.folder import Folder, named
from adapterops.storage.safetensors import insist_on_unicode
from adapterops.storage.tensor import LazyTensor

INDEX_SUFFIX = ".safetensors.index.json"
MAX_INDEX = 25_000_000
"""Bytes.  The index of a base model of 100,000 tensors has about ten million."""
MAX_SHARDS = 500
"""Files that are open at one time.  The largest base models have about 200."""
_NUMBERED = re.compile(r"-(\d+)-of-(\d+)\.safetensors$")
Read = Callable[[str], tuple[Mapping[str, LazyTensor], Mapping[str, str]]]
"""Opens one file of the folder."""


def read(
    folder: Folder, name: str, index: Mapping[str, Any], open_shard: Read
) -> tuple[dict[str, LazyTensor], dict[str, str], tuple[str, ...]]:
    """The tensors of all shards (shard after shard, by name), their headers' metadata in one, and notes.

    Raises `InvalidHeader` where index and shards disagree, `UnreadableFile` for a shard that is not there.
    """
    here = os.path.join(folder.path, name)
    weight_map = files_of(here, index)
    present = set(folder.names())
    tensors: dict[str, LazyTensor] = {}
    metadata: dict[str, str] = {}
    notes: list[str] = []
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if shard not in present]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        example = next(key for key, shard in weight_map.items() if shard == missing[0])
        raise UnreadableFile(
            f"{here}: the shard {missing[0]}{more} is not beside it (it holds {example[:200]!r}); download it too",
            fault="missing-shard",
        )
    for shard in shards:
        held, header = open_shard(shard)
        at = os.path.join(folder.path, shard)
        for key in held:
            listed = weight_map.get(key)
            if listed != shard:
                what = "does not list" if listed is None else f"places in {listed}"
                raise InvalidHeader(
                    f"{at}: tensor {key[:200]!r}: {name} {what}: index and shards are not of one adapter, or it is in "
                    "two of them; download all of them again",
                    fault="index",
                    keys=(key,),
                )
        tensors.update(held)
        _merge(metadata, header, shard, notes)
    for key, shard in weight_map.items():
        if key not in tensors:
            raise InvalidHeader(
                f"{os.path.join(folder.path, shard)}: has no tensor {key[:200]!r}, which {name} places in it: index and "
                "shards are not of one adapter; download all of them again",
                fault="index",
                keys=(key,),
            )
    # The sizes in an index (total_size …) are numbers and say nothing that the tensors do not.
    said = index.get("metadata")
    strings = {k: v for k, v in said.items() if isinstance(v, str)} if isinstance(said, dict) else {}
    insist_on_unicode(here, [*strings, *strings.values()])
    _merge(metadata, strings, name, notes)
    return tensors, metadata, tuple(notes)


def _merge(metadata: dict[str, str], more: Mapping[str, str], source: str, notes: list[str]) -> None:
    for field, value in more.items():
        if metadata.setdefault(field, value) != value:
            notes.append(f"header field {field[:80]!r} differs in {source}; the first shard's is used")


def files_of(path: str, index: Mapping[str, Any]) -> dict[str, str]:
    """The checked `weight_map` of an index: each tensor's file, a plain name in the index's own folder.

    Raises `UnreadableFile` where there is none, or for names that lead elsewhere.
    """
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UnreadableFile(
            f"{path}: is no index of shards: it must have a `weight_map` from tensor names to files", fault="index"
        )
    for key, shard in weight_map.items():
        if not isinstance(shard, str) or not _plain(shard):
            raise UnreadableFile(
                f"{path}: tensor {key[:200]!r}: the shard {str(shard)[:200]!r} is not the plain name of a file beside it",
                fault="outside",
                keys=(key,),
            )
        if not shard.endswith(".safetensors"):
            raise UnsupportedFormat(
                f"{path}: the shard {shard[:200]!r} is no .safetensors file; only these are read", fault="index"
            )
    if len(set(weight_map.values())) > MAX_SHARDS:
        raise UnreadableFile(f"{path}: names more than {MAX_SHARDS} shards; no adapter has so many", fault="index")
    return weight_map


def _plain(name: str) -> bool:
    return name not in ("", ".", "..") and not set(name) & set("/\\\0") and len(name) < 256


def covering(folder: Folder, name: str, read_index: Callable[[str], Mapping[str, Any]]) -> str | None:
    """The index beside the file `name` that says it is one of several shards, if there is one.

    An index that cannot be read says nothing about a file that the user named.
    """
    try:
        indexes = [n for n in folder.names() if n.endswith(INDEX_SUFFIX) and not n.startswith(".")]
    except UnreadableFile:  # a folder may be entered and not listed
        return None
    for index in indexes:
        try:
            with named(folder, index):
                shards = set(files_of(index, read_index(index)).values())
        except (UnreadableFile, UnsupportedFormat):
            continue
        if name in shards and len(shards) > 1:
            return index
    return None


def number_note(name: str) -> tuple[str, ...]:
    """A note for a file whose own name says that it is one of several."""
    number = _NUMBERED.search(name)
    if number is None or int(number[2]) < 2:
        return ()
    return (f"by its name it is part {int(number[1])} of {int(number[2])}; without their index it is read alone",)
