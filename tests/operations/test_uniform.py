"""One rank and one scale for all LoRAs: whatever they were, each still does what it did."""

from __future__ import annotations

from math import sqrt
from random import Random
from typing import Any

import numpy as np
import pytest

from adapterops.adapter import Certainty, Fact, Update
from adapterops.errors import UnknownFact
from adapterops.methods import METHODS
from adapterops.operations.uniform import nothing, uniform
from adapterops.storage.tensor import LazyTensor, MemorySource


def tensor(key: str, values: Any) -> LazyTensor:
    array = np.asarray(values, dtype=np.float32)
    return LazyTensor(key, "F32", array.shape, MemorySource(array.tobytes()), 0)


def lora(number: int, rank: int, alpha: float | None, rslora: bool = False) -> Update:
    random = np.random.default_rng(number)
    tensors = {
        "A": tensor(f"{number}.A", random.normal(size=(rank, 7))),
        "B": tensor(f"{number}.B", random.normal(size=(5, rank))),
    }
    return Update("model", f"layers.{number}", "lora", tensors, Fact(alpha, Certainty.READ, "config"), rslora)


def delta(update: Update) -> Any:
    method: Any = METHODS["lora"]
    b, a = method.factors(update)
    return b @ a


@pytest.mark.parametrize("seed", range(20))
def test_every_delta_stays_what_it_was(seed: int) -> None:
    random = Random(seed)
    rslora = random.random() < 0.5
    updates = [
        lora(n, random.randint(1, 9), random.choice([0.0, 1.0, 8.0, -3.0, 16.5]), rslora and random.random() < 0.9)
        for n in range(6)
    ]
    even = uniform(updates, "why", rslora=random.random() < 0.5)
    root = sqrt(even.rank) if even.rslora else even.rank
    for before, after in zip(updates, even.updates, strict=True):
        assert (after.tensors["A"].shape[0], after.tensors["B"].shape[1]) == (even.rank, even.rank)
        assert after.rslora == even.rslora
        assert after.alpha is not None
        assert after.alpha.value == pytest.approx(even.scale * root)
        np.testing.assert_allclose(delta(after), delta(before), rtol=1e-6, atol=1e-6)


def test_what_is_even_already_stays_as_it_is() -> None:
    updates = [lora(n, 4, 8.0, True) for n in range(3)]
    assert uniform(updates, "why").updates == updates


def test_the_commonest_scale_is_kept_and_its_tensors_with_it() -> None:
    updates = [lora(0, 4, 8.0), lora(1, 4, 4.0), lora(2, 2, 4.0), lora(3, 4, 4.0), lora(4, 4, 4.0)]
    even = uniform(updates, "why")
    assert even.scale == 1.0
    assert even.scaled == ("model: layers.0", "model: layers.2")
    assert even.filled == ("model: layers.2",)
    assert [even.updates[at] for at in (1, 3, 4)] == [updates[at] for at in (1, 3, 4)]


def test_the_scale_may_be_said() -> None:
    even = uniform([lora(0, 4, 8.0), lora(1, 4, 4.0)], "why", scale=1.0)
    assert [u.alpha.value for u in even.updates if u.alpha is not None] == [4.0, 4.0]
    assert even.scaled == ("model: layers.0",)


def test_an_unknown_alpha_is_asked_for() -> None:
    with pytest.raises(UnknownFact, match="--alpha X"):
        uniform([lora(0, 4, 8.0), lora(1, 4, None)], "why")


def test_nothing_is_zeros_of_another_size() -> None:
    update = nothing(lora(0, 4, 8.0), "layers.9", 3)
    assert (update.module, update.tensors["B"].shape) == ("layers.9", (3, 4))
    assert not delta(update).any()
