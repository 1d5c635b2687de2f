"""The hash of what an adapter does, which recipes hold of their inputs."""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from adapterops.adapter import Adapter
from adapterops.methods import METHODS
from adapterops.storage.tensor import CHUNK, ByteSource, MemorySource, fill


@contextlib.contextmanager
def hashing() -> Iterator[Callable[[Adapter], Future[str]]]:
    """Hashes in a thread beside the work, which reads the same; given up at once where that fails."""
    stop = threading.Event()
    with ThreadPoolExecutor(1, thread_name_prefix="adapterops-hash") as pool:
        try:
            yield lambda adapter: pool.submit(content_hash, adapter, stop)
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def content_hash(adapter: Adapter, stop: threading.Event | None = None) -> str:
    """SHA-256 of what an adapter does: every update's name, method, scale, options and tensors, in the order of names.

    Neither the order of the keys in a file nor the header's words change it.  `stop` ends it early, with no sense in it.
    """
    digest = hashlib.sha256()
    # Many small tensors in one call: each one waits for the work beside it to let Python go.
    room, filled = memoryview(bytearray(CHUNK)), 0
    pieces: list[tuple[ByteSource, int, memoryview]] = []
    for source, start, length in _content(adapter):
        end = start + length
        while start < end:
            take = min(end - start, CHUNK - filled)
            pieces.append((source, start, room[filled : filled + take]))
            start, filled = start + take, filled + take
            if filled == CHUNK:
                if stop is not None and stop.is_set():
                    return ""
                fill(pieces)
                digest.update(room)
                filled = 0
                pieces.clear()
    fill(pieces)
    digest.update(room[:filled])
    return digest.hexdigest()


def _content(adapter: Adapter) -> Iterator[tuple[ByteSource, int, int]]:
    """What is hashed, in order: the sources of bytes, where to begin, and how many."""
    for key in sorted(adapter.updates):
        update = adapter.updates[key]
        scale = METHODS[update.method].scale(update)
        text = repr((key, scale, sorted(update.options.items(), key=lambda item: item[0])))
        for role in sorted(update.tensors):
            tensor = update.tensors[role]
            text += repr((role, tensor.dtype, tensor.shape))
            yield MemorySource(text.encode()), 0, len(text.encode())
            yield tensor.source, tensor.start, tensor.nbytes
            text = ""
        if text:
            yield MemorySource(text.encode()), 0, len(text.encode())
