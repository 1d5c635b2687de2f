"""Where peft's `add_weighted_adapter` (0.21) is wrong, or gives up: what it does, and what we do, by hand.

The numbers are those of issues of https://github.com/huggingface/peft.
"""

from __future__ import annotations

from math import sqrt
from pathlib import Path
from typing import Any

import peft_merges as pm
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import adapterops as ao
from adapterops.errors import CannotRepresent, UsageError

pytestmark = pytest.mark.usefixtures("one_thread")

LINE = ["line"]


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wave, self.cube = nn.Conv1d(5, 8, 3), nn.Conv3d(4, 7, (2, 1, 3))


def change(model: Any, plain: Tensor, x: Tensor) -> Tensor:
    """What the adapter does to the output of a `Line`'s first layer."""
    with torch.no_grad():
        return model.base_model.model.line(x) - plain  # type: ignore[no-any-return]


def run(line: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return line(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["svd", "cat", "linear"])
def test_rank_stabilised_scales_are_applied_once(kind: str, tmp_path: Path) -> None:
    """peft (#3449) multiplies by √r once more: its alpha becomes the new rank, and the scale alpha / √r stays."""
    weights = [0.7, -0.4]
    model = pm.adapted([pm.config(4, 6.0, use_rslora=True), pm.config(4, 2.0, use_rslora=True)])
    assert pm.layers(model)["first"].scaling["a0"] == 3.0
    wanted = pm.linear_by_hand(model, weights) if kind == "linear" else pm.exact(model, weights)
    rank = 8 if kind != "linear" else 4
    pm.by_peft(model, kind, weights, **pm.ranked(kind, 8, "svd_rank"))
    sources = pm.saved(model, tmp_path / "in", ["a0", "a1"])
    pm.assert_close(pm.deltas(model, "merged"), {name: sqrt(rank) * delta for name, delta in wanted.items()})

    ao.merge(sources, tmp_path / "out", kind, weights=weights, **pm.ranked(kind, 8))
    pm.assert_close(pm.deltas(pm.loaded(tmp_path / "out")), wanted)


def test_signs_are_elected_after_weighting(tmp_path: Path) -> None:
    """a = [1, −1], b = [2, 2] with weights 1, −1 disagree in the first entry only before weighting."""
    a, b = torch.tensor([[1.0, -1.0]]), torch.tensor([[2.0, 2.0]])

    def make() -> nn.Module:
        return pm.Line(2, 1)

    model = pm.adapted([pm.config(1, 1, LINE), pm.config(1, 1, LINE)], make)
    for name, values in (("a0", a), ("a1", b)):
        pm.layers(model)["line"].lora_A[name].weight.data.copy_(values)
        pm.layers(model)["line"].lora_B[name].weight.data.fill_(1.0)
    sources = pm.saved(model, tmp_path / "in")
    pm.by_peft(model, "ties_svd", [1.0, -1.0], density=1.0)
    theirs = pm.deltas(model, "merged")["line"]
    torch.testing.assert_close(theirs, torch.tensor([[-0.5, -2.0]]).double())

    found = {}
    for election in (None, "weighted", "peft"):
        more: dict[str, Any] = {"sign_election": election} if election else {}
        ao.merge(sources, tmp_path / str(election), "ties_svd", weights=[1.0, -1.0], density=1.0, **more)
        found[election] = pm.deltas(pm.loaded(tmp_path / str(election), make))["line"]
    torch.testing.assert_close(found["peft"], theirs)
    for election in (None, "weighted"):
        torch.testing.assert_close(found[election], torch.tensor([[-2.0, -1.5]]).double())


@pytest.mark.parametrize("kind", ["ties", "ties_svd"])
def test_a_weight_of_zero_leaves_an_adapter_out(kind: str, tmp_path: Path) -> None:
    """In peft it still votes on signs and is counted in the mean: a = 1, b = 2 with weights 1, 0 give ½."""

    def make() -> nn.Module:
        return pm.Line(1, 1)

    model = pm.adapted([pm.config(1, 1, LINE), pm.config(1, 1, LINE)], make)
    for name, value in (("a0", 1.0), ("a1", 2.0)):
        pm.layers(model)["line"].lora_A[name].weight.data.fill_(value)
        pm.layers(model)["line"].lora_B[name].weight.data.fill_(1.0)
    sources = pm.saved(model, tmp_path / "in")
    pm.by_peft(model, kind, [1.0, 0.0], density=1.0)
    ao.merge(sources, tmp_path / "out", kind, weights=[1.0, 0.0], density=1.0, allow_disjoint=True)
    halved = 0.5 if kind == "ties_svd" else 0.25
    torch.testing.assert_close(pm.deltas(model, "merged")["line"].item(), halved)
    torch.testing.assert_close(pm.deltas(pm.loaded(tmp_path / "out", make))["line"].item(), 1.0)


def test_adapters_of_weight_zero_still_have_modules_in_common(tmp_path: Path) -> None:
    model = pm.adapted([pm.config(2, 2.0), pm.config(2, 1.0)])
    ao.merge(pm.saved(model, tmp_path / "in"), tmp_path / "out", "svd", weights=[0.5, 0.0])
    pm.assert_close(pm.deltas(pm.loaded(tmp_path / "out")), pm.exact(model, [0.5]))


@pytest.mark.parametrize("kind", ["svd", "cat"])
def test_biases_of_factors_are_added_up(kind: str, tmp_path: Path) -> None:
    """peft (#3761) merges the factors alone, and its merged bias is 0."""
    weights = [0.7, -0.4]
    more = {"lora_bias": True}
    model = pm.adapted([pm.config(4, 6.0, LINE, **more), pm.config(2, 5.0, LINE, **more)], pm.Line)
    layer = pm.layers(model)["line"]
    sources = pm.saved(model, tmp_path / "in")
    pm.by_peft(model, kind, weights, **pm.ranked(kind, 6, "svd_rank"))
    assert not layer.lora_B["merged"].bias.any()
    bias = sum(w * layer.scaling[n] * layer.lora_B[n].bias.data for w, n in zip(weights, ("a0", "a1"), strict=True))

    ao.merge(sources, tmp_path / "out", kind, weights=weights, **pm.ranked(kind, 6))
    merged = pm.loaded(tmp_path / "out", pm.Line)
    x = torch.randn(20, 12, generator=torch.Generator().manual_seed(2))
    found = change(merged, run(pm.made(pm.Line).line, x), x)
    wanted = x @ pm.exact(model, weights)["line"].float().T + bias
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def doras(folder: Path, equal: bool) -> tuple[Any, list[Path]]:
    """Two DoRA adapters of one layer, with one magnitude or with two."""
    model = pm.adapted([pm.config(2, 3.0, LINE, use_dora=True), pm.config(2, 1.0, LINE, use_dora=True)], pm.Line)
    magnitudes = pm.layers(model)["line"].lora_magnitude_vector
    generator = torch.Generator().manual_seed(3)
    for name in ("a0", "a1"):
        magnitudes[name].weight.data.copy_(0.5 + torch.rand(10, generator=generator))
    if equal:
        magnitudes["a1"].weight.data.copy_(magnitudes["a0"].weight.data)
    return model, pm.saved(model, folder)


def test_magnitudes_that_differ_are_refused(tmp_path: Path) -> None:
    """peft drops them: the merged adapter starts with the norms of the base's rows."""
    model, sources = doras(tmp_path / "in", equal=False)
    pm.by_peft(model, "svd", [1.0, 1.0])
    layer = pm.layers(model)["line"]
    base = layer.get_base_layer().weight.data
    torch.testing.assert_close(layer.lora_magnitude_vector["merged"].weight.data, base.norm(dim=1))
    with pytest.raises(CannotRepresent, match=r"lora_magnitude_vector.*magnitudes differ.*--base-weights"):
        ao.merge(sources, tmp_path / "out", "svd")
    assert not (tmp_path / "out").exists()


def test_a_magnitude_beside_a_plain_lora_is_refused(tmp_path: Path) -> None:
    _, sources = doras(tmp_path / "in", equal=False)
    (plain,) = pm.saved(pm.adapted([pm.config(2, 3.0, LINE)], pm.Line), tmp_path / "plain")
    with pytest.raises(CannotRepresent, match=r"not all adapters have one.*--base-weights"):
        ao.merge([sources[0], plain], tmp_path / "out", "svd")


def test_equal_magnitudes_are_kept(tmp_path: Path) -> None:
    """W' = m · (W + Σ wₖΔWₖ) / ‖W + Σ wₖΔWₖ‖."""
    model, sources = doras(tmp_path / "in", equal=True)
    ao.merge(sources, tmp_path / "out", "svd", weights=[0.7, -0.4], rank=4)
    changed = pm.made(pm.Line).line.weight.data + pm.exact(model, [0.7, -0.4])["line"].float()
    magnitude = pm.layers(model)["line"].lora_magnitude_vector["a0"].weight.data
    wanted = changed * (magnitude / changed.norm(dim=1))[:, None]
    found = pm.loaded(tmp_path / "out", pm.Line).merge_and_unload().line.weight.data
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_magnitudes_are_folded_against_the_base(tmp_path: Path) -> None:
    """Σ wₖ(W'ₖ − W), exact at full rank, as a plain LoRA."""
    model, sources = doras(tmp_path / "in", equal=False)
    base = pm.made(pm.Line)
    save_file(base.state_dict(), tmp_path / "base.safetensors")
    weights = [0.7, -0.4]
    ao.merge(
        sources, tmp_path / "out", "svd", weights=weights, rank=10, base_weights=str(tmp_path / "base.safetensors")
    )
    plain = base.line.weight.data
    wanted = torch.zeros_like(plain)
    for name, weight in zip(("a0", "a1"), weights, strict=True):
        b, a = pm.pair(pm.layers(model)["line"], name) or (plain, plain)
        changed = plain + pm.layers(model)["line"].scaling[name] * b @ a
        magnitude = pm.layers(model)["line"].lora_magnitude_vector[name].weight.data
        wanted += weight * (changed * (magnitude / changed.norm(dim=1))[:, None] - plain)
    merged = pm.loaded(tmp_path / "out", pm.Line)
    assert not merged.peft_config["default"].use_dora
    pm.assert_close(pm.deltas(merged), {"line": wanted.double()}, 1e-5)


def test_rank_patterns_can_be_loaded_again(tmp_path: Path) -> None:
    """peft (#3744) keeps the factors' ranks and forgets the pattern: its own file does not load."""
    weights = [0.7, 0.4]
    pattern = {"first": 6, "square": 2}
    both = [pm.config(4, alpha, rank_pattern=pattern) for alpha in (8.0, 3.0)]
    model = pm.adapted(both)
    sources = pm.saved(model, tmp_path / "in")
    pm.by_peft(model, "linear", weights)
    (theirs,) = pm.saved(model, tmp_path / "theirs", ["merged"])
    with pytest.raises(RuntimeError, match="size mismatch"):
        pm.loaded(theirs)
    ao.merge(sources, tmp_path / "out", "linear", weights=weights)
    found = pm.loaded(tmp_path / "out")
    pm.assert_close(pm.deltas(found), pm.linear_by_hand(model, weights))
    ranks = {name: layer.r["default"] for name, layer in pm.layers(found).items()}
    assert ranks == {name: pattern.get(name, 4) for name in pm.COMMON}


def test_modules_saved_by_two_adapters(tmp_path: Path) -> None:
    """Both refuse; we say what would work, and do it."""
    model = pm.adapted([pm.config(2, 3.0, LINE, modules_to_save=["head"]) for _ in range(2)], pm.Line)
    sources = pm.saved(model, tmp_path / "in")
    with pytest.raises(ValueError, match="modules_to_save"):
        pm.by_peft(model, "svd", [1.0, 3.0])
    with pytest.raises(CannotRepresent, match=r"head.*--saved mean .*--saved first"):
        ao.merge(sources, tmp_path / "out", "svd", weights=[1.0, 3.0])
    heads = [load_file(source / "adapter_model.safetensors") for source in sources]
    for how, share in (("mean", (0.25, 0.75)), ("first", (1.0, 0.0))):
        ao.merge(sources, tmp_path / how, "svd", weights=[1.0, 3.0], saved=how)
        head = pm.loaded(tmp_path / how, pm.Line).base_model.model.head.modules_to_save["default"]
        for key, found in head.state_dict().items():
            one, two = (tensors[f"{pm.PREFIX}head.{key}"] for tensors in heads)
            torch.testing.assert_close(found, share[0] * one + share[1] * two)


def test_convolutions_of_one_and_three_dimensions(tmp_path: Path) -> None:
    """peft (#3769) decomposes the wrong matrices."""
    weights = [0.7, -0.4]
    model = pm.adapted([pm.config(2, 3.0, ["wave", "cube"]), pm.config(3, 5.0, ["wave", "cube"])], Convolutions)
    sources = pm.saved(model, tmp_path / "in")
    wanted = pm.exact(model, weights)
    try:
        pm.by_peft(model, "svd", weights, svd_rank=5)
        theirs = pm.deltas(model, "merged")
        right = all(theirs[n].shape == wanted[n].shape and torch.allclose(theirs[n], wanted[n], 1e-4) for n in wanted)
    except (RuntimeError, ValueError):
        right = False
    assert not right, "peft can do it now: compare with it"
    for kind in ("svd", "cat", "ties_svd"):
        more: dict[str, Any] = {"rank": 8, "density": 1.0} if kind == "ties_svd" else pm.ranked(kind, 5)
        ao.merge(sources, tmp_path / kind, kind, weights=weights, **more)
        found = pm.deltas(pm.loaded(tmp_path / kind, Convolutions))
        if kind != "ties_svd":
            pm.assert_close(found, wanted)
            continue
        one, two = (pm.exact(model, part) for part in ([0.7, 0.0], [0.0, -0.4]))
        elected = {name: (one[name] + two[name]).sign() for name in one}
        kept = {n: torch.stack([d[n] * (d[n].sign() == elected[n]) for d in (one, two)]) for n in one}
        mean = {n: parts.sum(dim=0) / parts.count_nonzero(dim=0).clamp_min(1) for n, parts in kept.items()}
        pm.assert_close(found, mean)


def test_the_sum_of_factors_is_not_the_sum_of_deltas(tmp_path: Path) -> None:
    """`linear` (#3004) has cross terms: ours has the same, and says so; a B of zeros still changes the other's part."""
    model = pm.adapted([pm.config(4, 4.0), pm.config(4, 4.0)])
    for layer in pm.layers(model).values():
        (layer.lora_embedding_B["a1"] if "a1" in layer.lora_embedding_B else layer.lora_B["a1"].weight).data.zero_()
    sources = pm.saved(model, tmp_path / "in")
    pm.by_peft(model, "linear", [0.5, 0.5])
    result = ao.merge(sources, tmp_path / "linear", "linear", weights=[0.5, 0.5])
    pm.assert_close(pm.deltas(pm.loaded(tmp_path / "linear")), pm.deltas(model, "merged"))
    wanted = pm.exact(model, [0.5, 0.5])
    crossed = {name: float((pm.deltas(model, "merged")[name] - wanted[name]).norm()) for name in wanted}
    assert all(error > 0.5 * float(wanted[name].norm()) for name, error in crossed.items())
    assert any("not the sum of the adapters' effects" in note for note in result.notes)
    for kind in ("svd", "cat"):
        result = ao.merge(sources, tmp_path / kind, kind, weights=[0.5, 0.5])
        pm.assert_close(pm.deltas(pm.loaded(tmp_path / kind)), wanted)
        assert not any("not the sum" in note for note in result.notes)


@pytest.mark.parametrize("kind", ["svd", "ties_svd", "cat", "linear", "dare_ties"])
def test_half_precision_stays(kind: str, tmp_path: Path) -> None:
    """peft's svd on a bfloat16 model leaves float32 factors in it."""
    weights = [0.7, 0.4]
    model = pm.adapted([pm.config(4, 3.0), pm.config(4, 8.0)]).to(torch.bfloat16)
    more: dict[str, Any] = {} if kind in ("svd", "cat", "linear") else {"density": 0.9}
    sources = pm.saved(model, tmp_path / "in")
    assert pm.dtypes_of(sources[0] / "adapter_model.safetensors") == {"BF16"}
    if kind == "svd":
        pm.by_peft(model, kind, weights)
        assert pm.layers(model)["first"].lora_A["merged"].weight.dtype == torch.float32
    for dtype in (None, "float32"):
        ao.merge(sources, tmp_path / str(dtype), kind, weights=weights, dtype=dtype, **more, **pm.ranked(kind, 8))
    files = [tmp_path / str(dtype) / "adapter_model.safetensors" for dtype in (None, "float32")]
    assert [pm.dtypes_of(file) for file in files] == [{"BF16"}, {"F32"}]
    narrow, wide = (pm.deltas(pm.loaded(tmp_path / str(dtype))) for dtype in (None, "float32"))
    pm.assert_close(narrow, wide, 0.01)
    if kind in ("svd", "cat", "linear"):
        wanted = pm.linear_by_hand(model, weights) if kind == "linear" else pm.exact(model, weights)
        pm.assert_close(wide, wanted)


@pytest.mark.parametrize(("density", "theirs"), [(None, TypeError), (0.0, None), (-0.5, ValueError)])
def test_densities_that_are_none(density: float | None, theirs: type[Exception] | None, tmp_path: Path) -> None:
    """peft divides by a density of 0 and gives NaN, and compares None with 1."""
    model = pm.adapted([pm.config(2, 2.0, LINE), pm.config(2, 2.0, LINE)], pm.Line)
    sources = pm.saved(model, tmp_path / "in")
    names = ["a0", "a1"]
    if theirs is not None:
        with pytest.raises(theirs):
            model.base_model.add_weighted_adapter(names, [1.0, 1.0], "merged", "dare_linear", density=density)
    else:
        model.base_model.add_weighted_adapter(names, [1.0, 1.0], "merged", "dare_linear", density=density)
        assert pm.deltas(model, "merged")["line"].isnan().any()
    with pytest.raises(UsageError, match="density"):
        ao.merge(sources, tmp_path / "out", "dare_linear", density=density)
    assert not (tmp_path / "out").exists()
