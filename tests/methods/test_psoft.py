"""PSOFT against peft."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from method_updates import update
from peft import PsoftConfig
from torch import nn
from turned_layers import outputs_agree, own_of, update_of, wrapped

from adapterops.errors import BrokenAdapter, CannotRepresent
from adapterops.methods.psoft import Psoft

PSOFT = Psoft()
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "pissa": {"ab_svd_init": "pissa_init"},
    "sketch": {"psoft_svd": "lowrank"},
    "another sketch": {"psoft_svd": "lowrank", "random_seed": 3, "psoft_svd_lowrank_niter": 1},
    "free": {"psoft_orth": False},
    "series": {"use_cayley_neumann": True},
    "longer": {"use_cayley_neumann": True, "num_cayley_neumann_terms": 7},
    "shortened": {"use_cayley_neumann": True, "cayley_neumann_eps": 0.5},
    "no vectors": {"psoft_mag_a": False, "psoft_mag_b": False},
    "vector a": {"psoft_mag_b": False},
    "vector b": {"psoft_mag_a": False},
    "alpha": {"psoft_alpha": 5},
}
TOLD = (
    "ab_svd_init",
    "psoft_svd",
    "random_seed",
    "psoft_svd_lowrank_niter",
    "use_cayley_neumann",
    "num_cayley_neumann_terms",
    "cayley_neumann_eps",
)


@pytest.mark.parametrize("rank", [1, 5, 9])
@pytest.mark.parametrize("variant", OPTIONS)
def test_outputs_are_pefts(variant: str, rank: int) -> None:
    base = nn.Linear(11, 9)
    model = wrapped(base, PsoftConfig(r=rank, **OPTIONS[variant]), spread=0.4)
    told = {name: value for name, value in OPTIONS[variant].items() if name in TOLD}
    one = update_of(model, "psoft", "psoft_", **told)
    if rank == 1 and variant == "no vectors":
        assert PSOFT.is_nothing(one)
        return
    assert PSOFT.rank(one) == rank
    outputs_agree(PSOFT, one, base, model, tolerance=2e-5)
    change = PSOFT.change(one, own_of(base)).weight
    assert change is not None
    left, right = PSOFT.low_rank_of(one, own_of(base))
    assert (left.shape, right.shape) == ((9, rank), (rank, 11))
    torch.testing.assert_close((left @ right).float(), change)


@pytest.mark.parametrize("options", [{}, {"psoft_orth": False}])
def test_nothing(options: dict[str, Any]) -> None:
    still = PsoftConfig(r=3, target_modules=["0"], **options)
    from peft import get_peft_model

    one = update_of(get_peft_model(nn.Sequential(nn.Linear(6, 5)), still), "psoft", "psoft_")
    assert PSOFT.is_nothing(one)
    change = PSOFT.change(one, own_of(nn.Linear(6, 5))).weight
    assert change is not None
    assert not change.any()
    louder = replace(one, tensors={**one.tensors, "vector_a": one.tensors["vector_a"].mapped("F32", 2.0)})
    assert not PSOFT.is_nothing(louder)
    model = wrapped(nn.Linear(6, 5), PsoftConfig(r=3, **options))
    assert not PSOFT.is_nothing(update_of(model, "psoft", "psoft_"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ab_svd_init": "random"}, "none of psoft_init, pissa_init"),
        ({"psoft_svd": "half"}, "neither full nor lowrank"),
        ({"use_cayley_neumann": True, "num_cayley_neumann_terms": -1}, "above zero"),
    ],
)
def test_settings_that_mean_nothing(options: dict[str, Any], message: str) -> None:
    with pytest.raises(CannotRepresent, match=message):
        PSOFT.change(update("psoft", {"R": torch.ones(3)}, options=options), own_of(nn.Linear(6, 5)))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"R": torch.ones(4)}, "upper entries"),
        ({"R": torch.ones(3, 4)}, "square matrix"),
        ({"R": torch.ones(0, 0)}, "square matrix"),
        ({"R": torch.ones(3), "vector_a": torch.ones(4)}, "rank 3"),
        ({"R": torch.ones(3, 3), "vector_b": torch.ones(3, 1)}, "rank 3"),
        ({"vector_a": torch.ones(4)}, "R is missing"),
    ],
)
def test_tensors_that_are_no_psoft(tensors: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(BrokenAdapter, match=message):
        PSOFT.check(update("psoft", tensors))


def test_what_it_fits() -> None:
    one = update("psoft", {"R": torch.ones(3)})
    shapes = [(3, 9), (9, 3), (2, 9), (9, 2), (9,), (9, 9, 1, 1)]
    assert [PSOFT.fits(one, shape) for shape in shapes] == [True, True, False, False, False, False]
    with pytest.raises(BrokenAdapter, match="another model"):
        PSOFT.change(one, own_of(nn.Linear(9, 2)))
    with pytest.raises(CannotRepresent, match="--base-weights"):
        PSOFT.change(one)
    with pytest.raises(CannotRepresent, match="fused"):
        PSOFT.take_rows(one, [(0, 1)])


def test_errors_are_those_of_the_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    r, a = torch.randn(6, generator=generator) / 10, torch.randn(4, generator=generator)
    one = update("psoft", {"R": r, "vector_a": a})
    assert PSOFT.error(one, one) == 0.0
    assert PSOFT.error(one, update("psoft", {"R": r})) > 0.1
    assert 1e-5 < PSOFT.error(one, update("psoft", {"R": r * 1.001, "vector_a": a})) < 1e-3
    assert PSOFT.error(one, update("psoft", {"R": r[:3], "vector_a": a[:3]})) == float("inf")
    whole = PSOFT.matrix_of(one).float()
    assert PSOFT.error(one, update("psoft", {"R": whole})) < 1e-6


def test_a_base_without_numbers_has_no_singular_vectors() -> None:
    base = nn.Linear(6, 5)
    with torch.no_grad():
        base.weight[0, 0] = torch.nan
    with pytest.raises(BrokenAdapter, match=r"mid.to_q.*NaN"):
        PSOFT.change(update("psoft", {"R": torch.ones(3)}), own_of(base))
