"""`to-lora` on files of LyCORIS and PEFT: exact where it says so, the best of its budget, nothing lost in silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import adapterops as ao
from adapterops import architectures, errors
from adapterops.methods import METHODS
from adapterops.operations.lora_factors import Budget, of_factors, of_matrix

FIXTURES = Path(__file__).parents[2] / "fixtures"
SD15 = FIXTURES / "lycoris-sd15"
BASE = architectures.from_config(SD15)
"""The tiny models that the files are for."""
READING = {"base": BASE}


def load(path: Path) -> ao.Adapter:
    return ao.load(path, base=BASE)


def to_lora(name: str, target: Path, **options: Any) -> ao.ToLoraResult:
    return ao.to_lora(SD15 / f"{name}.safetensors", target, reading=READING, **options)


def deltas(adapter: ao.Adapter) -> dict[tuple[str, str], torch.Tensor]:
    return {
        (u.component, u.module): METHODS[u.method].delta(u).double().reshape(METHODS[u.method].delta(u).shape[0], -1)
        for u in adapter
    }


def apart(one: torch.Tensor, two: torch.Tensor) -> float:
    return float((one - two).norm() / one.norm())


@pytest.mark.parametrize("name", ["kohya-locon", "kohya-lokr-both", "kohya-locon-tucker"])
def test_methods_of_low_rank_need_no_budget(name: str, tmp_path: Path) -> None:
    source = load(SD15 / f"{name}.safetensors")
    result = to_lora(name, tmp_path / "lora.safetensors")
    made = load(tmp_path / "lora.safetensors")
    assert {u.method for u in made} == {"lora"}
    assert not any("mid" in u.tensors for u in made)
    ours = deltas(made)
    for key, delta in deltas(source).items():
        assert apart(delta, ours[key]) < 1e-6
    assert max(m.error for m in result.modules) < 1e-6


@pytest.mark.parametrize("name", ["kohya-lokr-full", "kohya-full"])
def test_what_is_of_full_rank_needs_one(name: str, tmp_path: Path) -> None:
    with pytest.raises(errors.CannotRepresent, match=r"not of low rank: .*--rank R, --energy E or --error T"):
        to_lora(name, tmp_path / "lora.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("budget", [{"rank": 3}, {"energy": 0.8}, {"error": 0.4}])
@pytest.mark.parametrize("name", ["kohya-lokr-full", "kohya-loha", "kohya-lokr-factor"])
def test_budget_is_kept_by_the_least_rank(name: str, budget: dict[str, float], tmp_path: Path) -> None:
    result = to_lora(name, tmp_path / "lora.safetensors", **budget)
    source, made = deltas(load(SD15 / f"{name}.safetensors")), deltas(load(tmp_path / "lora.safetensors"))
    for report in result.modules:
        delta = source[report.component, report.module]
        tails = torch.linalg.svdvals(delta).square().flip(0).cumsum(0).flip(0)
        lost = torch.cat([tails, tails.new_zeros(1)]) / tails[0]
        assert report.rank is not None
        error = apart(delta, made[report.component, report.module])
        assert error == pytest.approx(report.error, rel=1e-3, abs=1e-6)
        assert error == pytest.approx(float(lost[report.rank].sqrt()), rel=0.01, abs=1e-6)
        allowed = {"rank": 1.0, "energy": 0.2, "error": 0.16}[next(iter(budget))]
        if "rank" in budget:
            assert report.rank <= 3
        else:
            assert float(lost[report.rank]) <= allowed * 1.0001
            assert float(lost[report.rank - 1]) > allowed * 0.9999


def test_dora_keeps_its_magnitude_without_a_budget(tmp_path: Path) -> None:
    to_lora("kohya-lokr-dora", tmp_path / "lora.safetensors", allow_drop=True)
    source, made = load(SD15 / "kohya-lokr-dora.safetensors"), load(tmp_path / "lora.safetensors")
    assert len(made)
    for update in made:
        before = source.updates[update.component, update.module, "lokr"]
        assert update.options["dora_axis"] == "out"
        assert torch.equal(update.tensors["magnitude"].torch(), before.tensors["magnitude"].torch())
        delta = METHODS["lokr"].delta(before).double()
        assert apart(delta, METHODS["lora"].delta(update).double().reshape(delta.shape)) < 1e-6


def test_dora_with_a_budget_needs_the_base(tmp_path: Path) -> None:
    with pytest.raises(errors.CannotRepresent, match=r"dora_scale.*--base-weights BASE.*keeps the magnitude"):
        to_lora("kohya-loha-dora", tmp_path / "lora.safetensors", rank=2)


def test_dora_with_its_base_becomes_plain(tmp_path: Path) -> None:
    source = load(SD15 / "kohya-loha-dora.safetensors")
    generator = torch.Generator().manual_seed(0)
    base = {}
    for update in source:
        shape = METHODS[update.method].weight_shape(update)
        assert shape is not None
        spec = source.base.components[update.component].modules[update.module] if source.base else None
        assert spec is not None
        base[f"{update.module}.weight"] = torch.randn(spec.shape, generator=generator)
    save_file(base, tmp_path / "base.safetensors")
    to_lora("kohya-loha-dora", tmp_path / "lora.safetensors", rank=100_000,
        base_weights=tmp_path / "base.safetensors",
    )  # fmt: skip
    made = deltas(load(tmp_path / "lora.safetensors"))
    for update in source:
        weight = base[f"{update.module}.weight"].double().reshape(len(base[f"{update.module}.weight"]), -1)
        changed = weight + METHODS[update.method].delta(update).double().reshape(weight.shape)
        magnitude = update.tensors["magnitude"].torch().double().reshape(-1, 1)
        expected = magnitude * changed / changed.norm(dim=1, keepdim=True) - weight
        assert apart(expected, made[update.component, update.module]) < 1e-4


def test_saved_modules_stand_beside_it(tmp_path: Path) -> None:
    result = ao.to_lora(FIXTURES / "peft-bert-classifier", tmp_path / "lora", rank=1)
    source, made = (
        load_file(FIXTURES / "peft-bert-classifier/adapter_model.safetensors"),
        load_file(tmp_path / "lora/adapter_model.safetensors"),
    )
    whole = {key for key in source if ".lora_" not in key}
    assert whole
    assert all(torch.equal(source[key], made[key]) for key in whole)
    assert {m.rank for m in result.modules} == {1, None}


def test_norms_are_refused_or_dropped_by_name(tmp_path: Path) -> None:
    path = SD15 / "kohya-locon-norm.safetensors"
    with pytest.raises(errors.CannotRepresent, match=r"norm.*--allow-drop"):
        to_lora(path.stem, tmp_path / "lora.safetensors")
    result = to_lora(path.stem, tmp_path / "lora.safetensors", allow_drop=True)
    assert len(result.dropped) == sum(u.method == "diff" for u in load(path))
    assert all("norm" in line for line in result.dropped)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 2, "energy": 0.5}, "one of them"),
        ({"rank": 0}, "--rank 0"),
        ({"energy": 1.5}, "--energy 1.5"),
        ({"error": 1.0}, "--error 1.0"),
        ({"target_rank": 2}, "AdaLoRA, and this is none"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, float], message: str, tmp_path: Path) -> None:
    with pytest.raises(errors.UsageError, match=message):
        to_lora("kohya-loha", tmp_path / "lora.safetensors", **options)


def test_base_of_another_model_is_refused(tmp_path: Path) -> None:
    save_file({"other.weight": torch.ones(4, 4)}, tmp_path / "base.safetensors")
    with pytest.raises(errors.UsageError, match=r"base.safetensors: has no tensor .*is it the base model"):
        to_lora("kohya-loha-dora", tmp_path / "lora.safetensors", rank=2,
            base_weights=tmp_path / "base.safetensors",
        )  # fmt: skip
    assert not (tmp_path / "lora.safetensors").exists()


def test_rounding_is_part_of_the_error(tmp_path: Path) -> None:
    result = to_lora("kohya-lokr-both", tmp_path / "lora.safetensors", dtype="bfloat16")
    assert 1e-4 < max(m.error for m in result.modules) < 1e-2
    assert {t.dtype for t in load_file(tmp_path / "lora.safetensors").values()} <= {torch.bfloat16, torch.float32}


def test_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        to_lora("kohya-lokr-full", tmp_path / f"{name}.safetensors", rank=2)
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (600, 500)])
def test_factors_of_a_budget_are_the_best(shape: tuple[int, int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    b, a = torch.randn(shape[0], 20, generator=generator), torch.randn(20, shape[1], generator=generator)
    made = of_factors(b, a, 0.5, Budget(energy=0.7), None)
    dense = of_matrix(b @ a * 0.5, Budget(energy=0.7), None)
    assert made.rank == dense.rank < 20
    assert made.error == pytest.approx(dense.error, rel=1e-3)
    s = torch.linalg.svdvals(b.double() @ a.double())
    assert made.error == pytest.approx(float(s[made.rank :].norm() / s.norm()), rel=1e-4)


def test_no_delta_at_all_is_a_lora_of_zeros() -> None:
    made = of_matrix(torch.zeros(8, 6), Budget(rank=2), None)
    assert made.error == 0
    assert not (made.b @ made.a).any()
    assert of_factors(torch.zeros(8, 2), torch.zeros(2, 6), 1.0, Budget(energy=0.5), None).error == 0
