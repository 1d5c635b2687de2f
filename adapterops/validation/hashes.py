"""The hash by which trainers and user interfaces know a safetensors file: SHA-256 of everything behind its header.

Source: kohya-ss/sd-scripts `library/train_util.py` (`addnet_hash_safetensors`, `precalculate_safetensors_hashes`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping

from adapterops.storage import LazyTensor
from adapterops.storage.tensor import CHUNK

KEY = "sshs_model_hash"
"""The header's entry."""
_PLAIN = re.compile(r"[0-9a-f]{64}")


def recorded(metadata: Mapping[str, str]) -> str | None:
    """The hash that a header holds, where it is one that the file's bytes decide.

    LyCORIS writes another, `0x…`, of the tensors in the order in which the network had them, which no file keeps.
    """
    value = metadata.get(KEY, "").strip().lower()
    return value if _PLAIN.fullmatch(value) else None


def model_hash(tensors: Mapping[str, LazyTensor]) -> str | None:
    """SHA-256 of the bytes of all tensors as they stand behind each other in their one file.

    None where they are in several files, or do not follow each other without a gap.  Raises `UnreadableFile`.
    """
    ordered = sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.nbytes))
    if len({tensor.source.path for tensor in ordered}) != 1:
        return None
    digest, buffer = hashlib.sha256(), bytearray(CHUNK)
    at = ordered[0].start
    for tensor in ordered:
        if tensor.start != at:
            return None
        for length in tensor.chunks(buffer):
            digest.update(memoryview(buffer)[:length])
        at += tensor.nbytes
    return digest.hexdigest()
