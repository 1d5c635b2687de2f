"""HRA against peft."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from method_updates import update
from peft import HRAConfig
from torch import nn
from turned_layers import outputs_agree, own_of, update_of, wrapped

from adapterops.errors import BrokenAdapter, CannotRepresent
from adapterops.methods.hra import Hra

HRA = Hra()
BASES: dict[str, Any] = {
    "linear": lambda: nn.Linear(12, 8),
    "no bias": lambda: nn.Linear(12, 8, bias=False),
    "conv1": lambda: nn.Conv2d(12, 8, 1),
    "conv3": lambda: nn.Conv2d(4, 6, 3, padding=1, stride=2),
}


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("r", [1, 4, 5])
@pytest.mark.parametrize("kind", BASES)
def test_outputs_are_pefts(kind: str, r: int, together: bool) -> None:
    base = BASES[kind]()
    model = wrapped(base, HRAConfig(r=r, apply_GS=together))
    one = update_of(model, "hra", "hra_", apply_GS=together)
    outputs_agree(HRA, one, base, model)
    assert HRA.rank(one) == r


@pytest.mark.parametrize("together", [False, True])
def test_the_change_has_the_rank_of_the_reflections(together: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    one = update("hra", {"u": torch.randn(12, 3, generator=generator)}, options={"apply_GS": together})
    b, a = HRA.factors(one)
    assert (b.shape, a.shape) == ((12, 3), (3, 12))
    whole = torch.eye(12).double() + b @ a
    torch.testing.assert_close(whole @ whole.T, torch.eye(12).double())
    base = nn.Linear(12, 9)
    change = HRA.change(one, own_of(base)).weight
    assert change is not None
    assert int(torch.linalg.matrix_rank(change)) == 3
    torch.testing.assert_close(change, (base.weight.detach().double() @ b @ a).float())
    left, right = HRA.low_rank_of(one, own_of(base))
    assert (left.shape, right.shape) == ((9, 3), (3, 12))
    torch.testing.assert_close((left @ right).float(), change)


def test_errors_are_those_of_the_reflections() -> None:
    u = torch.randn(12, 4, generator=torch.Generator().manual_seed(0)).double()
    one = update("hra", {"u": u})
    assert HRA.error(one, one) == 0.0
    assert HRA.error(one, update("hra", {"u": u * torch.tensor([2.0, -1, 3, 0.5])})) == pytest.approx(0, abs=1e-7)
    assert 1e-4 < HRA.error(one, update("hra", {"u": u + 1e-3})) < 1e-2
    assert HRA.error(one, replace(one, options={"apply_GS": True})) > 0.1
    assert HRA.error(one, update("hra", {"u": u[:11]})) == float("inf")
    still = update("hra", {"u": u.repeat_interleave(2, dim=1)})
    assert HRA.error(still, update("hra", {"u": (3 * u).repeat_interleave(2, dim=1)})) == 0.0


def test_nothing_is_every_reflection_twice() -> None:
    u = torch.randn(12, 2, generator=torch.Generator().manual_seed(0))
    twice = u.repeat_interleave(2, dim=1)
    assert HRA.is_nothing(update("hra", {"u": twice}))
    change = HRA.change(update("hra", {"u": twice}), own_of(nn.Linear(12, 8))).weight
    assert change is not None
    assert float(change.abs().max()) < 1e-6
    assert not HRA.is_nothing(update("hra", {"u": u}))
    assert not HRA.is_nothing(update("hra", {"u": twice[:, :3]}))


def test_rows_are_reflected_alike() -> None:
    one = update("hra", {"u": torch.randn(12, 4, generator=torch.Generator().manual_seed(0))})
    assert HRA.take_rows(one, [(3, 5)]) == dict(one.tensors)


@pytest.mark.parametrize(
    ("u", "options", "message"),
    [
        (torch.ones(12), {}, "a column a reflection"),
        (torch.ones(12, 0), {}, "a column a reflection"),
        (torch.ones(3, 4), {"apply_GS": True}, "no more reflections than inputs"),
    ],
)
def test_tensors_that_are_no_hra(u: torch.Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BrokenAdapter, match=message):
        HRA.check(update("hra", {"u": u}, options=options))


def test_what_is_missing() -> None:
    with pytest.raises(BrokenAdapter, match="u is missing"):
        HRA.check(update("hra", {"v": torch.ones(3, 3)}))
    one = update("hra", {"u": torch.ones(12, 2)})
    for act in (HRA.change, HRA.delta):
        with pytest.raises(CannotRepresent, match=r"(?s)mid.to_q.*--base-weights"):
            act(one)
    with pytest.raises(BrokenAdapter, match="another model"):
        HRA.change(one, own_of(nn.Linear(11, 6)))


@pytest.mark.parametrize("together", [False, True])
def test_a_column_of_zeros_has_no_direction(together: bool) -> None:
    u = torch.ones(12, 2)
    u[:, 1] = 0
    with pytest.raises(BrokenAdapter, match=r"x.u.*without a direction"):
        HRA.change(update("hra", {"u": u}, options={"apply_GS": together}), own_of(nn.Linear(12, 6)))


def test_what_it_fits() -> None:
    one = update("hra", {"u": torch.ones(12, 2)})
    shapes = [(8, 12), (8, 3, 2, 2), (12, 8), (12,)]
    assert [HRA.fits(one, shape) for shape in shapes] == [True, True, False, False]
