"""C3A against peft's layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from block_layers import DTYPES, TOLERANCE, adapted, check_forward, check_narrow, made, merged_change
from method_updates import perturbed, update
from peft import C3AConfig
from torch import nn

from adapterops.errors import BrokenAdapter
from adapterops.methods.c3a import C3a

C3A = C3a()


def c3a(block: int, inputs: int = 12, out: int = 18) -> Any:
    return adapted(nn.Linear(inputs, out), C3AConfig(block_size=block))


@pytest.mark.parametrize("block", [1, 2, 3, 6])
def test_it_does_what_pefts_layer_does(block: int) -> None:
    model = c3a(block)
    one = made("c3a", model, "c3a_")
    assert C3A.block_size(one) == block
    change = check_forward(one, model, torch.randn(4, 5, 12, dtype=torch.double))
    assert C3A.weight_shape(one) == (18, 12)
    torch.testing.assert_close(merged_change(model), change.double(), **TOLERANCE)
    torch.testing.assert_close(C3A.matrix(one).dense(), change)
    torch.testing.assert_close(torch.tensor(C3A.norm(one)), change.norm())


def test_rows_are_made_when_they_are_asked_for() -> None:
    one = made("c3a", c3a(6), "c3a_")
    rows, whole = C3A.matrix(one), C3A.delta(one)
    torch.testing.assert_close(torch.from_numpy(rows.at(4, 9)).float(), whole[4:9])


def test_it_has_no_low_rank() -> None:
    one = made("c3a", c3a(6), "c3a_")
    assert C3A.exact_rank(one) is C3A.low_rank(one) is None
    assert torch.linalg.matrix_rank(C3A.delta(one)) == 12


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_narrow_types(dtype: torch.dtype) -> None:
    check_narrow(made("c3a", c3a(3), "c3a_"), dtype)


@pytest.mark.parametrize("size", [1e-2, 1e-10])
def test_the_error_is_that_of_the_delta(size: float) -> None:
    one = made("c3a", c3a(3), "c3a_")
    assert C3A.error(one, perturbed(one, "kernel", size)) == pytest.approx(size, rel=1e-4)


def test_a_smaller_block_size_can_say_the_same() -> None:
    """A constant kernel is the same matrix however it is cut."""
    one, two = (update("c3a", {"kernel": torch.ones(6 // b, 12 // b, b)}) for b in (2, 3))
    assert C3A.error(one, two) == 0.0
    assert C3A.error(one, update("c3a", {"kernel": torch.ones(2, 3, 3)})) == float("inf")


def test_nothing_is_a_kernel_of_zeros() -> None:
    assert C3A.is_nothing(update("c3a", {"kernel": torch.zeros(1, 2, 3)}))
    assert not C3A.is_nothing(update("c3a", {"kernel": torch.ones(1, 2, 3)}))


@pytest.mark.parametrize("shape", [(3, 4), (2, 0, 3), (1, 2, 3, 4)], ids=str)
def test_shapes_that_no_c3a_has(shape: tuple[int, ...]) -> None:
    with pytest.raises(BrokenAdapter, match=r"'x.kernel'.*no kernel of C3A"):
        C3A.check(update("c3a", {"kernel": torch.ones(shape)}))
    with pytest.raises(BrokenAdapter, match="kernel is missing"):
        C3A.check(update("c3a", {"other": torch.ones(shape)}))


def test_what_it_fits() -> None:
    one = update("c3a", {"kernel": torch.ones(3, 2, 6)})
    assert [C3A.fits(one, s) for s in [(18, 12), (12, 18), (18, 12, 1, 1)]] == [True, False, False]
