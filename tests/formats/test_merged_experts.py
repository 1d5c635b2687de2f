"""LoRA on stacked experts, merged an expert at a time: what peft computes with the output is what it should be."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from expert_models import BOTH, base_of, loaded, model, qwen, tuned
from torch import nn

import adapterops as ao
from adapterops.errors import CannotRepresent, UsageError

WEIGHTS = (0.5, -1.5)
GATE, DOWN = ({"target_parameters": [name]} for name in BOTH)
ALL = {"target_parameters": BOTH}


def effect(base: nn.Module, folder: Path) -> Mapping[str, torch.Tensor]:
    """What peft adds to each parameter."""
    before = {name: value.detach().clone().double() for name, value in base.named_parameters()}
    after: Any = loaded(base, folder)
    return {n: p.detach().double() - before[n] for n, p in after.merge_and_unload().named_parameters()}


def merged(
    base: nn.Module, folders: Sequence[Path], out: Path, method: str, known: bool = True, **options: Any
) -> Path:
    adapters = [ao.load(folder, base=base_of(base) if known else None) for folder in folders]
    ao.save(ao.combine(adapters, method, weights=WEIGHTS, **options).adapter, out)
    return out


def check_sum(
    found: Mapping[str, torch.Tensor], one: Mapping[str, torch.Tensor], two: Mapping[str, torch.Tensor]
) -> None:
    assert found.keys() == one.keys() == two.keys()
    for name, value in found.items():
        wanted = WEIGHTS[0] * one[name] + WEIGHTS[1] * two[name]
        torch.testing.assert_close(value, wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max()) + 1e-7)


SETS = {
    "one parameter": (GATE, GATE),
    "both": (ALL, ALL),
    "one has one of them": (ALL, DOWN),
    "each has another": (DOWN, GATE),
    "beside modules": (
        {**ALL, "target_modules": ["q_proj"]},
        {**GATE, "target_modules": ["q_proj"], "use_rslora": True},
    ),
    "other ranks": ({**ALL, "r": 3}, {**ALL, "r": 1, "lora_alpha": 7}),
    "one layer": (ALL, {"target_parameters": ["layers.1.experts.gate_up_proj"]}),
}


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize(("method", "options"), [("cat", {}), ("svd", {"rank": 6})])
@pytest.mark.parametrize("name", SETS)
def test_a_sum(name: str, method: str, options: dict[str, Any], is_transposed: bool, tmp_path: Path) -> None:
    def made() -> nn.Module:
        return model(is_transposed=is_transposed)

    folders = [tuned(made(), tmp_path / f"a{n}", **targets)[1] for n, targets in enumerate(SETS[name])]
    apart = {"allow_disjoint": True} if name == "each has another" else {}
    out = merged(made(), folders, tmp_path / "out", method, **options, **apart)
    check_sum(effect(made(), out), *(effect(made(), folder) for folder in folders))


def test_a_language_model(tmp_path: Path) -> None:
    folders = [tuned(qwen(), tmp_path / f"a{n}", r=n + 2, **ALL)[1] for n in range(2)]
    out = merged(qwen(), folders, tmp_path / "out", "svd", rank=6)
    check_sum(effect(qwen(), out), *(effect(qwen(), folder) for folder in folders))


@pytest.mark.parametrize("targets", [GATE, ALL])
def test_without_a_base(targets: dict[str, Any], tmp_path: Path) -> None:
    folders = [tuned(model(), tmp_path / f"a{n}", **targets)[1] for n in range(2)]
    out = merged(model(), folders, tmp_path / "out", "cat", known=False)
    check_sum(effect(model(), out), *(effect(model(), folder) for folder in folders))
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["target_parameters"] == targets["target_parameters"]
    assert config["r"] == 4


def test_without_a_base_nothing_tells_how_other_parameters_nest(tmp_path: Path) -> None:
    folders = [tuned(model(), tmp_path / f"a{n}", **targets)[1] for n, targets in enumerate((DOWN, GATE))]
    with pytest.raises(CannotRepresent, match=r"different parameters of layers\.0\.experts.*--base"):
        merged(model(), folders, tmp_path / "out", "svd", known=False, allow_disjoint=True)


@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties", "ties_svd", "knots", "tsv", "della"])
def test_every_expert_as_a_module_of_its_own(method: str, tmp_path: Path) -> None:
    """The same as merging plain LoRAs, one an expert, but for the random numbers, which hang on the name."""
    folders = [tuned(model(), tmp_path / f"a{n}", **ALL)[1] for n in range(2)]
    density = {} if method in ("linear", "tsv") else {"density": 0.7}
    whole = merged(model(), folders, tmp_path / "out", method, **density)
    adapters = [ao.load(folder, base=base_of(model())) for folder in folders]
    reports = ao.combine(adapters, method, weights=WEIGHTS, **density).modules
    assert {report.module for report in reports} == {
        f"layers.{layer}.{name}[{expert}]" for layer in range(2) for name in BOTH for expert in range(3)
    }
    if method in ("linear", "ties"):
        parts = [factors(folder) for folder in folders]
        found = factors(whole)
        for place in found:
            for role in "AB":
                one, two = (part[place][role] for part in parts)
                if method == "linear":
                    roots = [(abs(w) * 2.5) ** 0.5 for w in WEIGHTS]
                    sign = -1.0 if role == "A" else 1.0
                    wanted = roots[0] * one + sign * roots[1] * two
                    torch.testing.assert_close(found[place][role], wanted, rtol=1e-5, atol=1e-6)
    assert all(bool(value.any()) for name, value in effect(model(), whole).items() if "experts" in name)


def factors(folder: Path) -> dict[tuple[str, int], dict[str, torch.Tensor]]:
    """A (r, in) and B (out, r) of each expert, by hand from peft's layout: three experts."""
    from safetensors.torch import load_file

    out: dict[tuple[str, int], dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        stem, role = key.removesuffix(".weight").rsplit(".lora_", 1)
        for expert in range(3):
            rank = (tensor.shape[0] if role == "A" else tensor.shape[1]) // 3
            own = tensor[expert * rank : (expert + 1) * rank] if role == "A" else tensor[:, expert::3]
            out.setdefault((stem, expert), {})[role] = own
    return out


def test_weights_and_patterns_speak_of_the_stack(tmp_path: Path) -> None:
    folders = [tuned(model(), tmp_path / f"a{n}", **ALL)[1] for n in range(2)]
    adapters = [ao.load(folder, base=base_of(model())) for folder in folders]
    weights = [1, {"default": 1, "patterns": [["*.experts.down_proj", 0]]}]
    result = ao.combine(adapters, "cat", weights=weights)
    ranks = {report.module: report.rank for report in result.modules}
    assert ranks["layers.0.experts.gate_up_proj[2]"] == 4
    assert ranks["layers.0.experts.down_proj[2]"] == 2


def test_stacks_that_no_other_adapter_has_are_counted_as_its_file_counts_them(tmp_path: Path) -> None:
    folders = [tuned(model(), tmp_path / f"a{n}", **targets)[1] for n, targets in enumerate((DOWN, GATE))]
    with pytest.raises(UsageError, match=r"none of its 2 modules is in any other adapter"):
        merged(model(), folders, tmp_path / "out", "svd")


def test_another_number_of_experts(tmp_path: Path) -> None:
    folders = [tuned(made(), tmp_path / f"a{n}", **GATE)[1] for n, made in enumerate((model, qwen))]
    with pytest.raises(UsageError, match="base"):
        merged(model(), folders, tmp_path / "out", "svd", known=False)


def test_other_sizes(tmp_path: Path) -> None:
    folders = [tuned(model(hidden=hidden), tmp_path / f"a{hidden}", **GATE)[1] for hidden in (6, 8)]
    with pytest.raises(
        UsageError, match=r"3 experts of \[20, 8\] here and 3 experts of \[20, 6\] in .*different base models"
    ):
        merged(model(), folders, tmp_path / "out", "svd", known=False)
