"""The jobs of `bench validate`, each a process of its own: `python validate_jobs.py JOB PATH…` prints seconds as JSON.

What is timed is the work behind the imports; the peak memory is the whole process's.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path


def weights(paths: list[str]) -> list[str]:
    """The files that hold weights."""
    return [str(Path(p) / "adapter_model.safetensors") if Path(p).is_dir() else p for p in paths]


def _validate(paths: list[str], **options: object) -> Callable[[], int]:
    import adapterops as ao
    from adapterops.validation import registry

    registry.checkers()
    validate = ao.validate  # which imports it
    return lambda: len(validate(*paths, **options).adapters)  # type: ignore[arg-type]


def headers(paths: list[str]) -> Callable[[], int]:
    """The rules that need headers alone, on two processes."""
    return _validate(paths, header_only=True, jobs=2)


def tensors(paths: list[str]) -> Callable[[], int]:
    """The rules about tensors and scales, their values included, on as many cores as the command takes unasked."""
    return _values(paths, jobs=0)


def alone(paths: list[str]) -> Callable[[], int]:
    """The same on one core."""
    return _values(paths, jobs=1)


def _values(paths: list[str], jobs: int) -> Callable[[], int]:
    import numpy as np  # noqa: F401  (its import is not to be measured)

    return _validate(paths, select=["T", "S"], jobs=jobs)


def loading(paths: list[str]) -> Callable[[], int]:
    """`safetensors.torch.load_file` on every file."""
    from safetensors.torch import load_file

    files = weights(paths)
    return lambda: sum(1 for file in files if load_file(file))


def touching(paths: list[str]) -> Callable[[], int]:
    """`safetensors.torch.load_file`, which maps the file, and a copy of each tensor, which reads it."""
    from safetensors.torch import load_file

    files = weights(paths)

    def work() -> int:
        for file in files:
            for tensor in load_file(file).values():
                tensor.clone()
        return len(files)

    return work


def reading(paths: list[str]) -> Callable[[], int]:
    """All bytes, into one buffer of a MiB."""
    files = weights(paths)

    def work() -> int:
        buffer = bytearray(1 << 20)
        for file in files:
            with open(file, "rb", buffering=0) as opened:
                while opened.readinto(buffer):
                    pass
        return len(files)

    return work


JOBS: dict[str, Callable[[list[str]], Callable[[], int]]] = {
    "headers": headers,
    "tensors": tensors,
    "alone": alone,
    "loading": loading,
    "touching": touching,
    "reading": reading,
}


def main(job: str, paths: list[str]) -> None:
    """Do the job once."""
    if len(paths) == 1 and paths[0].startswith("@"):
        paths = json.loads(Path(paths[0][1:]).read_text())
    work = JOBS[job](paths)
    started = time.perf_counter()
    done = work()
    print(json.dumps({"seconds": time.perf_counter() - started, "adapters": done}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
