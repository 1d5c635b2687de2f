"""Work in several threads: the same results, the same failure, and an end when it is interrupted."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from adapterops.threads import MOST, cores, each


@pytest.mark.parametrize("threads", [0, 1, 2, 5, 100])
@pytest.mark.parametrize("count", [0, 1, 3, 200])
def test_results_stand_in_the_order_of_the_items(count: int, threads: int) -> None:
    assert each(range(count), lambda: lambda n: n * n, threads) == [n * n for n in range(count)]


def test_every_thread_has_a_worker_of_its_own() -> None:
    meeting = threading.Barrier(3, timeout=60)
    made: list[list[int]] = []

    def worker() -> Callable[[int], None]:
        mine: list[int] = []
        made.append(mine)

        def do(item: int) -> None:
            if not mine:
                meeting.wait()
            mine.append(item)

        return do

    each(range(30), worker, 3)
    assert len(made) == 3
    assert sorted(item for mine in made for item in mine) == list(range(30))


def test_no_more_threads_than_items_or_the_most() -> None:
    seen: set[int] = set()
    lock = threading.Lock()

    def note(item: int) -> None:
        with lock:
            seen.add(threading.get_ident())

    each(range(500), lambda: note, 1000)
    assert len(seen) <= MOST
    seen.clear()
    each([1], lambda: note, 4)
    assert seen == {threading.get_ident()}


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_the_first_failure_in_order_is_raised(threads: int) -> None:
    def fail(item: int) -> int:
        if item in (11, 12, 40):
            raise KeyError(item)
        return item

    with pytest.raises(KeyError) as caught:
        each(range(100), lambda: fail, threads)
    assert caught.value.args == (11,)


def test_a_worker_that_cannot_be_made() -> None:
    def worker() -> Callable[[int], int]:
        raise MemoryError("no room")

    with pytest.raises(MemoryError):
        each(range(4), worker, 1)


def test_cores() -> None:
    assert cores() >= 1
