"""Super-Tuning and Supra against peft's layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from method_updates import lazy
from odd_layers import base_of, made, outputs_agree, tuned
from peft import SupertuningConfig
from torch import nn

from adapterops.adapter import Update
from adapterops.errors import BrokenAdapter, CannotRepresent
from adapterops.methods.base import Own
from adapterops.methods.supertuning import Supertuning

SUPER = Supertuning()
SUPRA = {"r": 3, "lora_alpha": 5}


def supertuning(**fields: Any) -> tuple[Update, Any]:
    config = SupertuningConfig(**{"sparsity": 0.9, **fields})
    model = tuned(nn.Linear(20, 12), config, "supertuning_")
    kept = {"lora_alpha": config.lora_alpha, "select_top": config.select_top}
    return made("supertuning", model, "supertuning_", **kept), model


@pytest.mark.parametrize("indices", [True, False])
@pytest.mark.parametrize("fields", [{}, SUPRA, {"select_top": False}], ids=str)
def test_the_change_is_pefts(fields: dict[str, Any], indices: bool) -> None:
    one, model = supertuning(save_precomputed_indices=indices, **fields)
    assert ("indices" in one.tensors) is indices
    own = base_of(model)
    outputs_agree(one, model, own)
    change = SUPER.change(one, own).weight
    assert change is not None
    with torch.no_grad():
        wanted = model.base_model.model.layer.get_delta_weight("default")
    torch.testing.assert_close(change.double(), wanted, rtol=1e-5, atol=1e-6)
    assert not SUPER.is_nothing(one)
    if not indices:
        with pytest.raises(CannotRepresent, match=r"save_precomputed_indices=False.*--base-weights"):
            SUPER.delta(one)
        with pytest.raises(CannotRepresent, match="--base-weights"):
            SUPER.change(one)


def test_the_shape_comes_from_the_lora_or_from_the_base() -> None:
    supra, model = supertuning(**SUPRA)
    assert SUPER.weight_shape(supra) == (12, 20)
    assert SUPER.rank(supra) == 3
    alone, model = supertuning()
    own = base_of(model)
    assert SUPER.weight_shape(alone) is None
    assert SUPER.rank(alone) is None
    with pytest.raises(CannotRepresent, match="--arch NAME"):
        SUPER.delta(alone)
    sized = replace(alone, options={**alone.options, "shape": (12, 20)})
    assert SUPER.weight_shape(sized) == (12, 20)
    torch.testing.assert_close(SUPER.delta(sized), SUPER.change(alone, own).weight)
    torch.testing.assert_close(SUPER.change(sized).weight, SUPER.change(alone, own).weight)


def test_options_that_change_the_result_must_be_said() -> None:
    supra, model = supertuning(**SUPRA)
    with pytest.raises(CannotRepresent, match="--set lora_alpha"):
        SUPER.delta(replace(supra, options={}))
    bare, model = supertuning(save_precomputed_indices=False)
    with pytest.raises(CannotRepresent, match="--set select_top"):
        SUPER.change(replace(bare, options={}), base_of(model))


def test_another_models_base() -> None:
    one, _ = supertuning(**SUPRA)
    with pytest.raises(BrokenAdapter, match="another model's"):
        SUPER.change(one, Own(torch.zeros(13, 20)))
    alone, _ = supertuning()
    with pytest.raises(BrokenAdapter, match=r"x.indices.*outside"):
        SUPER.change(alone, Own(torch.zeros(5, 6)))
    assert [SUPER.fits(one, s) for s in ((12, 20), (20, 12), (12,))] == [True, False, False]
    assert [SUPER.fits(alone, s) for s in ((12, 20), (4, 5), (240,))] == [True, False, False]


def test_shapes_that_cannot_be() -> None:
    one, _ = supertuning()
    n, at, a, b = torch.ones(6), torch.arange(6).int(), torch.ones(3, 20), torch.ones(12, 3)
    for tensors, said in (
        ({"indices": at}, "counterpart values is missing"),
        ({"values": torch.ones(2, 3), "indices": at}, "one row"),
        ({"values": n, "indices": torch.ones(6)}, "positions are integers"),
        ({"values": n, "indices": at[:5]}, "5 positions"),
        ({"values": n, "lora_A": a}, "counterpart lora_B is missing"),
        ({"values": n, "lora_A": a, "lora_B": torch.ones(12, 4)}, "not halves"),
        ({"values": n, "lora_A": torch.ones(3), "lora_B": b}, "no low-rank factor"),
    ):
        with pytest.raises(BrokenAdapter, match=said):
            SUPER.check(replace(one, tensors={role: lazy(t, role) for role, t in tensors.items()}))


def test_nothing() -> None:
    one, _ = supertuning()
    zero = replace(one, tensors={**one.tensors, "values": lazy(torch.zeros(24))})
    assert SUPER.is_nothing(zero)
    some = {"lora_A": lazy(torch.ones(3, 20)), "lora_B": lazy(torch.ones(12, 3))}
    assert not SUPER.is_nothing(replace(zero, tensors={**zero.tensors, **some}))
