"""What a merge says of results that are nothing or have lost digits, and what it refuses to mix."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest
import torch
from small_adapters import CONV, Numbers, Q, Tensors, deltas, file, pair, peft

import adapterops as ao
from adapterops.cli.merge_text import lines
from adapterops.errors import CannotRepresent, UsageError
from adapterops.merging.merge import MergeResult


def told(done: MergeResult) -> str:
    return click.unstyle("\n".join(lines(done, verbose=False)))


@pytest.mark.parametrize("density", [1e-5, 0.5])
def test_aligned_deltas_of_which_a_density_keeps_nothing(density: float, tmp_path: Path) -> None:
    sources = [peft(tmp_path / name, pair(seed)) for seed, name in enumerate("ab")]
    done = ao.merge(sources, tmp_path / "out", "knots", density=density)
    empty = density < 0.5
    assert bool(deltas(tmp_path / "out")["l.0.q"].any()) is not empty
    assert [module.empty for module in done.modules] == [empty]
    assert ("nothing left: knots makes nothing of 1 module (first: l.0.q)" in told(done)) is empty


def test_aligned_deltas_that_were_nothing_before(tmp_path: Path) -> None:
    zero = {key: tensor * ("lora_A" in key) for key, tensor in pair(1).items()}
    sources = [peft(tmp_path / name, zero) for name in "ab"]
    assert not ao.merge(sources, tmp_path / "out", "knots", density=0.5).modules[0].empty


@pytest.mark.parametrize("density", [1e-9, 0.1])
def test_whole_differences_of_which_a_density_keeps_nothing(density: float, tmp_path: Path) -> None:
    sources = [file(tmp_path / f"{n}.safetensors", {f"{Q}.diff": Numbers(n)(320, 320)}) for n in (1, 2)]
    done = ao.merge(sources, tmp_path / "out.safetensors", "ties", space="delta", density=density)
    assert [module.empty for module in done.modules] == [density < 0.1]
    assert bool(deltas(tmp_path / "out.safetensors")[Q].any()) is (density == 0.1)


def test_a_loss_of_digits_is_not_laid_to_the_rank(tmp_path: Path) -> None:
    small: list[Tensors] = [{key: t * 1e-3 for key, t in pair(seed).items()} for seed in (1, 2)]
    sources = [peft(tmp_path / str(n), t, 1e-6, torch.float16) for n, t in enumerate(small)]
    coarse = ao.merge(sources, tmp_path / "coarse", "svd", rank=8)
    assert (coarse.modules[0].error or 0) > 0.01
    assert "a wider --dtype keeps them" in told(coarse)
    assert "--rank" not in told(coarse)
    fine = ao.merge(sources, tmp_path / "fine", "svd", rank=8, dtype="float32")
    assert "exact up to rounding" in told(fine)
    short = ao.merge(sources, tmp_path / "short", "svd", rank=2, dtype="float32")
    assert "a larger --rank keeps more" in told(short)


def repeated(folder: Path, seed: int, layers: list[list[int]] | None) -> Path:
    return peft(folder, pair(seed), target_modules=["q"], layer_replication=layers)


@pytest.mark.parametrize("method", ["svd", "cat", "linear", "knots"])
def test_layers_that_all_adapters_repeat_alike(method: str, tmp_path: Path) -> None:
    layers = [[0, 2], [1, 2]]
    sources = [repeated(tmp_path / name, seed, layers) for seed, name in enumerate("ab")]
    ao.merge(sources, tmp_path / "out", method, **({"density": 0.5} if method == "knots" else {}))
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["layer_replication"] == layers


@pytest.mark.parametrize("other", [None, [[0, 1], [0, 2]]])
def test_layers_that_adapters_repeat_otherwise(other: list[list[int]] | None, tmp_path: Path) -> None:
    sources = [repeated(tmp_path / "a", 1, [[0, 2], [1, 2]]), repeated(tmp_path / "b", 2, other)]
    for order in (sources, sources[::-1]):
        with pytest.raises(UsageError, match=r"repeated in different ways \(layer_replication\)"):
            ao.merge(order, tmp_path / "out", "svd")


def test_a_method_that_needs_its_shape_is_told_of_the_base(tmp_path: Path) -> None:
    block = {"l.0.q.miss_block": Numbers(2)(4, 12)}
    other = peft(tmp_path / "b", block, r=4, peft_type="MISS", lora_alpha=None, target_modules=["q"])
    with pytest.raises(CannotRepresent, match=r"MiSS.*needs the shape of its weight.*--base CONFIG"):
        ao.merge([peft(tmp_path / "a", pair(1)), other], tmp_path / "out", "svd")


def test_a_tucker_core_is_named(tmp_path: Path) -> None:
    numbers = Numbers(3)
    core = {
        f"{CONV}.lora_down.weight": numbers(4, 4, 1, 1), f"{CONV}.lora_up.weight": numbers(320, 4, 1, 1),
        f"{CONV}.lora_mid.weight": numbers(4, 4, 3, 3), f"{CONV}.alpha": torch.tensor(2.0),
    }  # fmt: skip
    sources = [file(tmp_path / f"{name}.safetensors", core) for name in "ab"]
    with pytest.raises(UsageError, match="conv_in is lora with a Tucker core here"):
        ao.merge(sources, tmp_path / "out.safetensors", "linear")


def test_fields_that_are_made_anew_are_named(tmp_path: Path) -> None:
    sources = [peft(tmp_path / name, pair(seed), target_modules=["q"]) for seed, name in enumerate("ab")]
    done = ao.merge(sources, tmp_path / "out", "cat")
    before, after = (json.loads((path / "adapter_config.json").read_text()) for path in (sources[0], tmp_path / "out"))
    changed = [name for name, value in before.items() if after[name] != value]
    note = next(note for note in done.written.notes if "derived anew" in note)
    assert changed == ["r", "lora_alpha", "target_modules"]
    assert note.endswith(f"derived anew: {', '.join(changed)}")


def test_a_saved_head_says_nothing_of_repeated_layers(tmp_path: Path) -> None:
    made = []
    for n in range(2):
        tensors = {**pair(n), **({"head.weight": Numbers(n)(3, 12)} if n else {})}
        saved = ["head"] if n else None
        made.append(
            peft(
                tmp_path / f"a{n}",
                tensors,
                target_modules=["q"],
                layer_replication=[[0, 2], [0, 2]],
                modules_to_save=saved,
            )
        )
    ao.merge(made, tmp_path / "out", "svd")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["layer_replication"] == [[0, 2], [0, 2]]
    assert config["modules_to_save"] == ["head"]


def test_what_subtract_takes_away_is_told_with_its_sign(tmp_path: Path) -> None:
    sources = [peft(tmp_path / name, pair(seed)) for seed, name in enumerate("ab")]
    said = told(ao.merge(sources, tmp_path / "out", "subtract", rank=3, weights=[1.0, 0.5]))
    assert f"× 1     {sources[0]}" in said
    assert f"× -0.5  {sources[1]}" in said
    assert "--rank 8 keeps all" in said
    assert "cat" not in said  # it adds


def test_a_lone_module_is_one(tmp_path: Path) -> None:
    sources = [peft(tmp_path / name, pair(seed)) for seed, name in enumerate("ab")]
    assert "add up in the one module that several have" in told(ao.merge(sources, tmp_path / "out", "svd"))


@pytest.mark.parametrize("method", ["iso_c", "tsv"])
def test_methods_on_singular_vectors_tell_of_adapters_that_cancel(method: str, tmp_path: Path) -> None:
    sources = [peft(tmp_path / name, pair(1)) for name in "ab"]
    done = ao.merge(sources, tmp_path / "out", method, weights=[1.0, -1.0], rank=8)
    assert [module.cancels for module in done.modules] == [True]
    assert "cancels: in 1 module" in told(done)
    apart = [peft(tmp_path / name, pair(seed)) for seed, name in enumerate("cd")]
    assert not ao.merge(apart, tmp_path / "other", method, weights=[1.0, -1.0], rank=8).modules[0].cancels
