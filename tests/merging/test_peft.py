"""Every combination type of peft's `LoraModel.add_weighted_adapter`, the same adapters merged from their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft_merges as pm
import pytest
import torch
from peft.utils import merge_utils

import adapterops as ao
from adapterops.errors import UsageError
from adapterops.linalg.random import Draw

pytestmark = pytest.mark.usefixtures("one_thread")

FACTORS = ["linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
DELTAS = ["svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd"]
TYPES = [*FACTORS, "cat", *DELTAS]
WEIGHTS: dict[str, list[float]] = {
    "two": [0.7, 0.4],
    "negative": [0.9, -0.6],
    "three": [-1.0, 0.5, 0.7],
}


def options(kind: str, density: float = 0.6, majority: str = "total") -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of a combination type, for peft and for us."""
    theirs: dict[str, Any] = {}
    ours: dict[str, Any] = {}
    if kind not in ("linear", "cat", "svd"):
        theirs["density"] = ours["density"] = density
    if "ties" in kind:
        theirs["majority_sign_method"] = ours["majority_sign"] = majority
        if kind.endswith("svd"):  # on factors it is what we do unasked
            ours["sign_election"] = "peft"
    if kind.endswith("svd"):
        theirs["svd_full_matrices"] = False
    return theirs, ours


def configs(count: int, ranks: tuple[int, ...] = (4, 4, 4)) -> list[Any]:
    """Alphas that are not the rank; the second adapter changes a layer that no other one does."""
    targets = [pm.COMMON, [*pm.COMMON, "lonely"], pm.COMMON]
    return [pm.config(ranks[n], (3.0, 8.0, 5.0)[n], targets[n]) for n in range(count)]


def compare(model: Any, kind: str, weights: list[float], folder: Path, theirs: Any, ours: Any) -> ao.MergeResult:
    sources = pm.saved(model, folder / "in")
    pm.by_peft(model, kind, weights, **theirs)
    result = ao.merge(sources, folder / "out", kind, weights=weights, **ours)
    found = pm.loaded(folder / "out")
    if kind != "cat":  # which keeps the bytes of factors that have one strength
        assert {layer.scaling["default"] for layer in pm.layers(found).values()} == {1.0}
    pm.assert_close(pm.deltas(found), pm.deltas(model, "merged"))
    return result


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("kind", TYPES)
def test_equal_ranks(kind: str, weights: str, tmp_path: Path) -> None:
    model = pm.adapted(configs(len(WEIGHTS[weights])))
    compare(model, kind, WEIGHTS[weights], tmp_path, *options(kind))
    if kind in FACTORS:
        (folder,) = pm.saved(model, tmp_path / "theirs", ["merged"])
        found, wanted = pm.weights_of(tmp_path / "out"), pm.weights_of(folder)
        assert {key: t.dtype for key, t in found.items()} == {key: t.dtype for key, t in wanted.items()}
        pm.assert_close(found, wanted, 1e-6)


@pytest.mark.parametrize(("density", "majority"), [(0.3, "frequency"), (1.0, "frequency")])
@pytest.mark.parametrize("kind", [kind for kind in TYPES if "ties" in kind])
def test_sign_elections(kind: str, density: float, majority: str, tmp_path: Path) -> None:
    model = pm.adapted(configs(3))
    compare(model, kind, [0.5, 1.0, -0.8], tmp_path, *options(kind, density, majority))


@pytest.mark.parametrize("density", [0.2, 1.0])
@pytest.mark.parametrize("kind", [k for k in TYPES if k not in ("linear", "cat", "svd") and "ties" not in k])
def test_densities(kind: str, density: float, tmp_path: Path) -> None:
    compare(pm.adapted(configs(2)), kind, [0.5, 1.0], tmp_path, *options(kind, density))


@pytest.mark.parametrize(("kind", "rank"), [*((kind, 3) for kind in DELTAS), ("svd", None), ("ties_svd", None)])
def test_mixed_ranks(kind: str, rank: int | None, tmp_path: Path) -> None:
    # Without a rank peft takes the largest of any adapter everywhere and we the largest at each module, so that of the
    # layer which one adapter changes alone is the largest, too.
    model = pm.adapted(configs(3, (3, 5, 2)))
    theirs, ours = options(kind)
    compare(model, kind, [0.7, 1.0, -0.4], tmp_path, {**theirs, "svd_rank": rank}, {**ours, "rank": rank})


def test_mixed_ranks_side_by_side(tmp_path: Path) -> None:
    model = pm.adapted(configs(3, (3, 5, 2)))
    compare(model, "cat", [0.7, 1.0, -0.4], tmp_path, {}, {})
    pm.assert_close(pm.deltas(model, "merged"), pm.exact(model, [0.7, 1.0, -0.4]))


@pytest.mark.parametrize("kind", FACTORS)
def test_factors_of_mixed_ranks_are_refused_by_both(kind: str, tmp_path: Path) -> None:
    model = pm.adapted(configs(2, (3, 5)))
    sources = pm.saved(model, tmp_path / "in")
    theirs, ours = options(kind)
    with pytest.raises(ValueError, match="must have the same r value"):
        pm.by_peft(model, kind, [1.0, 1.0], **theirs)
    remedy = "--method svd .* and cat" if kind == "linear" else "--space delta"
    with pytest.raises(UsageError, match=rf"needs equal ranks, and they are 3 .*5 .*{remedy}"):
        ao.merge(sources, tmp_path / "out", kind, **ours)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", [kind for kind in DELTAS if kind != "svd"])
def test_full_names_are_a_method_and_a_space(kind: str, tmp_path: Path) -> None:
    sources = pm.saved(pm.adapted(configs(2)), tmp_path / "in")
    _, ours = options(kind)
    ao.merge(sources, tmp_path / "alias", kind, **ours)
    ao.merge(sources, tmp_path / "space", kind.removesuffix("_svd"), space="delta", **ours)
    one, two = pm.weights_of(tmp_path / "alias"), pm.weights_of(tmp_path / "space")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    with pytest.raises(UsageError, match=f"{kind} acts on delta, not on factors"):
        ao.merge(sources, tmp_path / "out", kind, space="factors", **ours)


@pytest.mark.parametrize(("kind", "space"), [("linear", "delta"), ("cat", "factors"), ("svd", "factors")])
def test_spaces_that_a_method_does_not_have(kind: str, space: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"{kind} acts on"):
        ao.merge(["a", "b"], tmp_path / "out", kind, space=space)


@pytest.mark.parametrize("weight", [0.8, -0.5])
@pytest.mark.parametrize("kind", ["linear", "cat", "svd"])
def test_one_adapter(kind: str, weight: float, tmp_path: Path) -> None:
    model = pm.adapted(configs(1))
    compare(model, kind, [weight], tmp_path, {}, {})
    pm.assert_close(pm.deltas(model, "merged"), pm.exact(model, [weight]))


@pytest.mark.parametrize("kind", [k for k in TYPES if k not in ("linear", "cat", "svd")])
def test_one_adapter_is_pruned(kind: str, tmp_path: Path) -> None:
    """peft takes `linear` whatever it is asked for where there is one adapter; we do what the method says."""
    model = pm.adapted(configs(1))
    sources = pm.saved(model, tmp_path / "in")
    theirs, ours = options(kind)
    pm.by_peft(model, kind, [0.8], **theirs)
    pm.assert_close(pm.deltas(model, "merged"), pm.exact(model, [0.8]))
    ao.merge(sources, tmp_path / "out", kind, weights=[0.8], **ours, **pm.ranked(kind, 8))
    found = pm.loaded(tmp_path / "out")
    for name, layer in pm.layers(model).items():
        factors = pm.pair(layer, "a0")
        assert factors is not None
        b, a = factors
        strength = 0.8 * layer.scaling["a0"]
        if kind in FACTORS:
            wanted = pruned(b, kind, name, "B") @ pruned(a, kind, name, "A") * strength
        else:
            u, s, vh = torch.linalg.svd(pruned(b @ a, kind, name, "delta") * strength, full_matrices=False)
            wanted = u[:, :8] * s[:8] @ vh[:8]
        pm.assert_close({name: pm.deltas(found)[name]}, {name: pm.shaped(wanted, layer)})


def pruned(tensor: torch.Tensor, kind: str, module: str, role: str) -> torch.Tensor:
    if "dare" not in kind:
        return merge_utils.magnitude_based_pruning(tensor, 0.6)
    kept = Draw(0, "model", module, role, 0).keep(0, tensor.numel(), 0.6)
    return tensor * torch.from_numpy(kept).reshape(tensor.shape) / 0.6


@pytest.mark.parametrize(("kind", "split"), [("svd", "b"), ("svd", "even"), ("svd", "a"), ("ties_svd", "b")])
def test_where_the_singular_values_go(kind: str, split: str, tmp_path: Path) -> None:
    """peft puts all of them into B; so do we where asked, up to the signs of the singular vectors."""
    model = pm.adapted(configs(2))
    theirs, ours = options(kind)
    compare(model, kind, [0.7, 0.4], tmp_path, theirs, {**ours, "split": split})
    (folder,) = pm.saved(model, tmp_path / "theirs", ["merged"])
    found, wanted = pm.weights_of(tmp_path / "out"), pm.weights_of(folder)
    for key in (key for key in wanted if "_B" in key):
        down = key.replace("_B", "_A")
        b, a, theirs_b, theirs_a = (t.flatten(1) for t in (found[key], found[down], wanted[key], wanted[down]))
        values = theirs_b.norm(dim=0)
        power = {"b": 1.0, "even": 0.5, "a": 0.0}[split]
        torch.testing.assert_close(b.norm(dim=0), values**power, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a.norm(dim=1), values ** (1 - power), rtol=1e-4, atol=1e-5)
        if split == "b":
            torch.testing.assert_close((a * theirs_a).sum(dim=1).abs(), torch.ones(len(a)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [k for k in TYPES if "dare" in k])
def test_masks_are_the_seeds(kind: str, tmp_path: Path) -> None:
    model = pm.adapted(configs(2))
    theirs, ours = options(kind)
    sources = pm.saved(model, tmp_path / "in")
    pm.by_peft(model, kind, [0.7, 0.4], seed=5, **theirs)
    for seed in (5, 6):
        ao.merge(sources, tmp_path / str(seed), kind, weights=[0.7, 0.4], seed=seed, **ours)
    same, other = (pm.deltas(pm.loaded(tmp_path / str(seed))) for seed in (5, 6))
    pm.assert_close(same, pm.deltas(model, "merged"))
    assert all((same[name] - other[name]).norm() > 0.05 * same[name].norm() for name in same)


def test_order_of_the_adapters_is_that_of_the_weights(tmp_path: Path) -> None:
    model = pm.adapted(configs(2))
    one, two = pm.saved(model, tmp_path / "in")
    ao.merge([one, two], tmp_path / "ab", "svd", weights=[0.7, -0.2])
    ao.merge([two, one], tmp_path / "ba", "svd", weights=[-0.2, 0.7])
    pm.assert_close(pm.deltas(pm.loaded(tmp_path / "ab")), pm.deltas(pm.loaded(tmp_path / "ba")))
