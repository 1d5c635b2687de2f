"""The pass over the bytes in several threads: it tells the same, fails the same, and ends when it is interrupted."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from adapterops import threads as module
from adapterops.errors import UnreadableFile
from adapterops.storage import LazyTensor
from adapterops.storage.folder import LocalFolder
from adapterops.storage.source import open_source
from adapterops.storage.tensor import FileSource
from adapterops.validation.options import Options
from adapterops.validation.report import Checked
from adapterops.validation.rule import Rule
from adapterops.validation.scan import scan, statistics
from adapterops.validation.subject import Place
from adapterops.validation.workers import MANY, _handfuls, run_all


def _large(path: Path) -> dict[str, LazyTensor]:
    values = {
        f"{n}": torch.randn(shape, generator=torch.Generator().manual_seed(n)).to(torch.float16)
        for n, shape in enumerate(
            [(8, 1 << 18), (1 << 16, 16), (9 << 20,), (64, 9000), (), (3, 3), (1 << 16, 4), (200,)]
        )
    }
    values["2"][5 << 20] = float("nan")
    values |= {f"small{n}": torch.full((4, 4), float(n)) for n in range(50)}
    save_file(values, path)
    return dict(open_source(path).tensors)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_tells_the_same(tmp_path: Path, threads: int) -> None:
    lazy = _large(tmp_path / "large.safetensors")
    assert sum(t.nbytes for t in lazy.values()) > 1 << 24
    found = scan(lazy, threads)
    assert found["2"].first == 5 << 20
    assert list(found) == list(lazy)
    assert {key: str(s) for key, s in found.items()} == {key: str(statistics(t, 1 << 14)) for key, t in lazy.items()}


def test_threads_take_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lazy = _large(tmp_path / "large.safetensors")
    two, readinto = threading.Barrier(2, timeout=60), FileSource.readinto
    met = set()

    def meeting(self: FileSource, start: int, buffer: memoryview) -> None:
        if threading.get_ident() not in met:
            met.add(threading.get_ident())
            two.wait()
        readinto(self, start, buffer)

    monkeypatch.setattr(FileSource, "readinto", meeting)
    scan(lazy, 2)
    assert len(met) == 2


def test_what_is_small_is_read_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({f"{n}": torch.ones(600, 600) for n in range(8)}, tmp_path / "small.safetensors")
    seen, readinto = set(), FileSource.readinto

    def noting(self: FileSource, start: int, buffer: memoryview) -> None:
        seen.add(threading.get_ident())
        readinto(self, start, buffer)

    monkeypatch.setattr(FileSource, "readinto", noting)
    scan(open_source(tmp_path / "small.safetensors").tensors, 4)
    assert seen == {threading.get_ident()}


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_a_file_that_ends_while_it_is_read(tmp_path: Path, threads: int) -> None:
    path = tmp_path / "large.safetensors"
    save_file({f"{n:02}": torch.ones(1 << 18) for n in range(40)}, path)
    lazy = open_source(path).tensors
    lazy["00"].source.readinto(0, memoryview(bytearray(8)))
    cut = lazy["30"].start + 1000
    os.truncate(path, cut)
    with pytest.raises(UnreadableFile, match=f"ends at byte {cut};"):
        scan(lazy, threads)


def test_others_end_when_one_is_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lazy = _large(tmp_path / "large.safetensors")
    here, begun, cleared = threading.get_ident(), threading.Event(), threading.Event()
    reads = []

    class Watched(deque[Any]):
        def clear(self) -> None:
            super().clear()
            cleared.set()

    def interrupted(self: FileSource, start: int, buffer: memoryview) -> None:
        reads.append(start)
        if threading.get_ident() == here:
            assert begun.wait(60)
            raise KeyboardInterrupt
        begun.set()
        assert cleared.wait(60)

    monkeypatch.setattr(FileSource, "readinto", interrupted)
    monkeypatch.setattr(module, "deque", Watched)
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        scan(lazy, 2)
    assert threading.active_count() == before
    assert len(reads) == 2


def _told_threads(place: Place, options: Options, rules: Sequence[Rule]) -> Checked:
    return Checked(place.path, bytes=options.threads)


@pytest.mark.parametrize(("jobs", "adapters", "threads"), [(1, 1, 1), (4, 1, 4), (1, 5, 1), (0, 3, 0), (0, 1, 0)])
def test_cores_without_an_adapter_of_their_own_look_at_its_bytes(jobs: int, adapters: int, threads: int) -> None:
    places = [Place(LocalFolder("zoo"), f"{n}") for n in range(adapters)]
    found = [checked.bytes for checked in run_all(_told_threads, places, Options(), (), jobs)]
    assert found == [threads or len(os.sched_getaffinity(0))] * adapters


def test_handfuls_become_smaller() -> None:
    for count, processes in ((2, 2), (MANY + 1, 2), (1000, 2), (500, 16)):
        handfuls = list(_handfuls(range(count), processes))
        assert [at for one in handfuls for at in one] == list(range(count))
        sizes = [len(one) for one in handfuls]
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[-processes:] == [1] * processes
