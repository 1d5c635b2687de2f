"""OSF against peft's layer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from method_updates import lazy
from odd_layers import base_of, factors_agree, made, outputs_agree, tuned
from peft import OSFConfig
from torch import nn

from adapterops.adapter import Update
from adapterops.errors import BrokenAdapter, CannotRepresent
from adapterops.methods.base import Own
from adapterops.methods.osf import Osf

OSF = Osf()


def osf(shape: tuple[int, int] = (12, 20), dtype: torch.dtype = torch.float64, **fields: Any) -> tuple[Update, Any]:
    model = tuned(nn.Linear(shape[1], shape[0]), OSFConfig(**fields), "osf_", dtype)
    return made("osf", model, "osf_svd_params."), model


@pytest.mark.parametrize("fields", [{}, {"effective_rank": 9}, {"effective_rank": 0.25}], ids=str)
@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (12, 12)], ids=str)
def test_the_change_is_pefts(shape: tuple[int, int], fields: dict[str, Any]) -> None:
    one, model = osf(shape, **fields)
    own = base_of(model)
    outputs_agree(one, model, own)
    factors_agree(one, own)
    kept = model.base_model.model.layer.effective_rank["default"]
    assert OSF.effective_rank(one) == kept
    assert OSF.rank(one) == 12 - kept
    change = OSF.change(one, own).weight
    assert change is not None
    assert int(torch.linalg.matrix_rank(change, rtol=1e-5)) <= 2 * OSF.rank(one)
    model.base_model.model.layer.merge()
    torch.testing.assert_close(change.double(), base_of(model).weight - own.weight, rtol=1e-5, atol=1e-5)


def test_singular_vectors_of_a_narrow_base_are_rounded_as_peft_rounds_them() -> None:
    """So an adapter that was not trained changes nothing, where the unrounded parts would leave the rounding behind."""
    one, model = osf(dtype=torch.bfloat16)
    layer, own = model.base_model.model.layer, base_of(model)
    before = {"U_low": layer._osf_U_low_init, "S_low": layer._osf_S_low_init, "V_low": layer._osf_V_low_init}
    untrained = replace(one, tensors={role: lazy(t["default"]) for role, t in before.items()})
    assert own.weight.dtype == torch.bfloat16
    change = OSF.change(untrained, own).weight
    assert change is not None
    assert float(change.norm() / own.weight.float().norm()) < 1e-3
    wide = OSF.change(untrained, Own(own.weight.float())).weight
    assert wide is not None
    assert float(wide.norm() / own.weight.float().norm()) > 1e-3


def test_a_module_too_small_for_its_rank_is_left_alone() -> None:
    one, model = osf(effective_rank=16)
    assert one.tensors["U_low"].shape == (12, 0)
    assert OSF.is_nothing(one)
    change = OSF.change(one, base_of(model)).weight
    assert change is not None
    assert not change.any()
    other, _ = osf()
    assert not OSF.is_nothing(other)


def test_what_is_missing_is_named() -> None:
    one, _ = osf()
    with pytest.raises(CannotRepresent, match="--base-weights"):
        OSF.delta(one)
    with pytest.raises(CannotRepresent, match="--base-weights"):
        OSF.change(one)
    with pytest.raises(BrokenAdapter, match="another model's"):
        OSF.change(one, Own(torch.zeros(13, 20)))
    assert [OSF.fits(one, s) for s in ((12, 20), (20, 12), (12, 20, 1))] == [True, False, False]


def test_shapes_that_cannot_be() -> None:
    one, _ = osf()
    u, s, v = torch.ones(12, 4), torch.ones(4), torch.ones(4, 20)
    for tensors, said in (
        ({"U_low": u, "V_low": v}, "counterpart S_low is missing"),
        ({"U_low": torch.ones(12), "S_low": s, "V_low": v}, "OSF keeps"),
        ({"U_low": u, "S_low": torch.ones(5), "V_low": v}, "rank 5"),
        ({"U_low": u, "S_low": s, "V_low": torch.ones(3, 20)}, "rank 3"),
        ({"U_low": torch.ones(12, 12), "S_low": torch.ones(12), "V_low": torch.ones(12, 20)}, "at least one"),
    ):
        with pytest.raises(BrokenAdapter, match=said):
            OSF.check(replace(one, tensors={role: lazy(t, role) for role, t in tensors.items()}))
