"""AdaMSS against peft's layer, which needs scikit-learn; the clusters against scikit-learn's own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from method_updates import lazy, update
from odd_layers import base_of, factors_agree, made, outputs_agree, tuned
from torch import nn

from adapterops.adapter import Update
from adapterops.errors import BrokenAdapter, CannotRepresent
from adapterops.methods.adamss import Adamss
from adapterops.methods.base import Own
from adapterops.methods.clusters import Undecided, clusters

ADAMSS = Adamss()


def adamss(
    biased: bool = True, dtype: torch.dtype = torch.float32, layer: nn.Linear | None = None, **fields: Any
) -> tuple[Update, Any]:
    pytest.importorskip("sklearn")
    from peft import AdamssConfig

    config = AdamssConfig(**{"r": 6, "num_subspaces": 3, "subspace_rank": 2, **fields})
    model = tuned(layer or nn.Linear(20, 24, bias=biased), config, "adamss_", dtype)
    return made("adamss", model, "adamss_", random_seed=config.random_seed), model


@pytest.mark.parametrize(
    "fields",
    [{}, {"r": 99}, {"random_seed": 5}, {"use_dynamic_rank": True, "subspace_rank": 4}, {"num_subspaces": 1}],
    ids=str,
)
@pytest.mark.parametrize("biased", [True, False])
def test_the_change_is_pefts(biased: bool, fields: dict[str, Any]) -> None:
    one, model = adamss(biased, **fields)
    own = base_of(model)
    outputs_agree(one, model, own)
    if biased:
        assert ADAMSS.low_rank_of(one, own) is None
    else:
        factors_agree(one, own)
    change, layer = ADAMSS.change(one, own), model.base_model.model.layer
    assert change.weight is not None
    assert (change.bias is not None) is biased
    assert int(torch.linalg.matrix_rank(change.weight, rtol=1e-4)) <= ADAMSS.rank(one)
    layer.merge()
    torch.testing.assert_close(change.weight, base_of(model).weight - own.weight, rtol=1e-4, atol=1e-4)
    if change.bias is not None:
        torch.testing.assert_close(change.bias, base_of(model).bias - own.bias, rtol=1e-4, atol=1e-4)


def test_a_narrow_base() -> None:
    one, model = adamss(dtype=torch.bfloat16)
    own, layer = base_of(model), model.base_model.model.layer
    assert one.tensors["newB"].dtype == "BF16"
    change = ADAMSS.change(one, own).weight
    assert change is not None
    with torch.no_grad():
        wanted = layer.get_delta_weight("default").float()
    assert float((change - wanted).norm() / wanted.norm()) < 1e-2  # peft's is rounded


@pytest.mark.parametrize("count", [1, 2, 5, 16])
def test_clusters_are_those_of_scikit_learn(count: int) -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    compared = 0
    for seed in range(6):
        rows = np.random.default_rng(seed).standard_normal((64, 5)).astype(np.float32) * (seed + 1)
        try:
            found = clusters(rows, count)
        except Undecided:
            continue
        means = cluster.KMeans(n_clusters=count, init="random", n_init=1, max_iter=10, random_state=123456789)
        assert found.tolist() == means.fit_predict(rows).tolist()
        compared += 1
    assert compared > 3


def test_clusters_that_are_plain() -> None:
    rows = np.array([[0, 0], [9, 9], [0, 1], [9, 8], [1, 0]], dtype=np.float32)
    found = clusters(rows, 2)
    assert found[0] == found[2] == found[4] != found[1] == found[3]
    with pytest.raises(Undecided):
        clusters(np.zeros((4, 2), dtype=np.float32), 2)


def test_rows_that_are_as_near_to_one_group_as_to_another_are_not_guessed() -> None:
    """All the left singular vectors of a square matrix: its rows stand at right angles, so which is nearer is rounding."""
    rows = np.linalg.qr(np.random.default_rng(1).standard_normal((32, 32)))[0].astype(np.float32)
    with pytest.raises(Undecided, match="rows are equally near"):
        clusters(rows, 2)
    square = nn.Linear(24, 24, bias=False)
    one, model = adamss(layer=square, r=24)
    with pytest.raises(CannotRepresent, match=r"equally near.*fuse the adapter with peft"):
        ADAMSS.change(one, base_of(model))


def by_hand() -> tuple[Update, Own]:
    """An update made from the formula: rows in clusters by hand, without a bias."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(8, 5, generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        left, _, right = torch.svd_lowrank(weight, q=4, niter=2)
    labels = clusters(left.numpy(), 2)
    sizes = np.bincount(labels).tolist()
    tensors = {"newB": right.T.contiguous()}
    for i in range(2):
        tensors[f"A.{i}"] = torch.randn(i + 1, 4, generator=generator)
        tensors[f"B.{i}"] = torch.randn(sizes[i], i + 1, generator=generator)
    return update("adamss", tensors), Own(weight)


def test_rows_go_where_the_clusters_are() -> None:
    one, own = by_hand()
    ADAMSS.check(one)
    assert ADAMSS.rank(one) == 3
    factors_agree(one, own)
    change = ADAMSS.change(one, own)
    assert change.bias is None
    assert change.weight is not None
    t = {role: tensor.torch().double() for role, tensor in one.tensors.items()}
    for i, rows in enumerate(ADAMSS.groups(one, own)):
        wanted = t[f"B.{i}"] @ t[f"A.{i}"] @ t["newB"]
        torch.testing.assert_close(change.weight[rows], wanted.float())
    assert not ADAMSS.is_nothing(one)
    zero = {role: lazy(torch.zeros(v.shape)) if role[0] == "B" else v for role, v in one.tensors.items()}
    assert ADAMSS.is_nothing(replace(one, tensors=zero))


def test_another_base_is_refused_and_not_scrambled() -> None:
    one, own = by_hand()
    with pytest.raises(CannotRepresent, match=r"x.newB.*--set random_seed"):
        ADAMSS.change(one, Own(torch.randn(8, 5, generator=torch.Generator().manual_seed(4))))
    swapped = {**one.tensors, "B.0": one.tensors["B.1"], "B.1": one.tensors["B.0"]}
    swapped |= {"A.0": one.tensors["A.1"], "A.1": one.tensors["A.0"]}
    if one.tensors["B.0"].shape[0] != one.tensors["B.1"].shape[0]:
        with pytest.raises(CannotRepresent, match="rows, those of the file"):
            ADAMSS.change(replace(one, tensors=swapped), own)
    with pytest.raises(BrokenAdapter, match="another model's"):
        ADAMSS.change(one, Own(torch.zeros(9, 5)))
    with pytest.raises(BrokenAdapter, match="5 inputs and a bias"):
        ADAMSS.change(one, own._replace(bias=torch.zeros(8)))
    with pytest.raises(CannotRepresent, match="--base-weights"):
        ADAMSS.change(one)
    with pytest.raises(CannotRepresent, match="--base-weights"):
        ADAMSS.delta(one)


def test_another_seed_is_refused() -> None:
    one, own = by_hand()
    with pytest.raises(CannotRepresent, match=r"random_seed than 7"):
        ADAMSS.change(replace(one, options={"random_seed": 7}), own)


def test_shapes_that_cannot_be() -> None:
    one, _ = by_hand()
    t = dict(one.tensors)
    for change, said in (
        ({"newB": None}, "counterpart newB is missing"),
        ({"A.0": None}, "counterpart A.0 is missing"),
        ({"A.1": None}, "other half"),
        ({"B.3": t["B.0"], "A.3": t["A.0"]}, "earlier pair"),
        ({"A.0": lazy(torch.ones(1, 3))}, "directions"),
        ({"B.0": lazy(torch.ones(4, 3))}, "not halves"),
        ({"newB": lazy(torch.ones(4))}, "no factor"),
    ):
        broken = {role: v for role, v in (t | change).items() if v is not None}
        with pytest.raises(BrokenAdapter, match=said):
            ADAMSS.check(replace(one, tensors=broken))
    assert [ADAMSS.fits(one, s) for s in ((8, 5), (8, 4), (8, 3), (7, 5), (8,))] == [True, True, False, False, False]
