"""LoRA on bare parameters against peft's ParamWrapper."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from method_updates import perturbed, relative, update
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn

from adapterops.adapter import Update
from adapterops.errors import AmbiguousFormat, BrokenAdapter, CannotRepresent
from adapterops.methods.base import Own
from adapterops.methods.lora_parameters import LORA_PARAMETERS, which


class Experts(nn.Module):
    """Stacked experts: (E, out, in), or (E, in, out) where `is_transposed`; and a matrix of its own."""

    def __init__(self, hidden: int = 6, inner: int = 10, count: int = 3, is_transposed: bool = False) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        up, down = (hidden, 2 * inner), (inner, hidden)
        self.gate_up_proj = nn.Parameter(torch.randn(count, *(up if is_transposed else up[::-1])))
        self.down_proj = nn.Parameter(torch.randn(count, *(down if is_transposed else down[::-1])))
        self.gate = nn.Parameter(torch.randn(count, hidden))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Every expert on every token, weighed by the gate."""
        order = "ti,eio->eto" if self.is_transposed else "ti,eoi->eto"
        hidden = torch.einsum(order, x, self.gate_up_proj)
        hidden = hidden[..., ::2].tanh() * hidden[..., 1::2]
        out = torch.einsum(order.replace("ti", "eti"), hidden, self.down_proj)
        return torch.einsum("eto,te->to", out, x @ self.gate.T)


class Toy(nn.Module):
    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.experts(x)
        return out


ALL = ["gate_up_proj", "down_proj", "gate"]


def tuned(experts: Experts, names: list[str], **config: Any) -> tuple[Any, list[Update], dict[str, tuple[int, ...]]]:
    """A peft model, the updates of its file from the innermost key outwards, and the shapes of all parameters."""
    shapes = {name: tuple(p.shape) for name, p in experts.named_parameters()}
    targets = [f"experts.{name}" for name in names]
    settings = LoraConfig(r=2, lora_alpha=5, target_modules=[], target_parameters=targets, **config)
    model = get_peft_model(Toy(experts), settings).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape))
    levels: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in get_peft_model_state_dict(model).items():
        module, _, role = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".lora_")
        steps = module.count(".base_layer")
        name = module.removesuffix(".base_layer" * steps)
        assert name == "experts"
        levels.setdefault(steps, {})[role] = tensor.clone()
    rslora = bool(config.get("use_rslora"))
    updates = [update("lora_parameters", levels[steps], 5.0, rslora=rslora) for steps in sorted(levels, reverse=True)]
    return model, updates, shapes


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("names", [["gate_up_proj"], ["down_proj"], ["gate"], ALL[:2], ALL, ALL[::-1]], ids="+".join)
def test_deltas_and_names_are_pefts(names: list[str], is_transposed: bool, rslora: bool) -> None:
    torch.manual_seed(0)
    experts = Experts(is_transposed=is_transposed)
    before = {name: p.detach().clone() for name, p in experts.named_parameters()}
    model, updates, shapes = tuned(experts, names, use_rslora=rslora)
    assert len(updates) == len(names)
    # Nothing but the shapes says which parameter is whose, in the order of their definition.
    found = which(updates, shapes)
    assert found == [name for name in ALL if name in names]
    after = Experts(is_transposed=is_transposed)
    with torch.no_grad():
        for name, parameter in after.named_parameters():
            parameter.copy_(before[name])
        for name, one in zip(found, updates, strict=True):
            told = replace(one, options={"shape": shapes[name]})
            LORA_PARAMETERS.check(told)
            assert LORA_PARAMETERS.rank(told) == 2
            change = LORA_PARAMETERS.change(told, Own(before[name])).weight
            assert change is not None
            assert change.shape == shapes[name]
            after.get_parameter(name).add_(change)
            bare = (
                {"num_experts": shapes[name][0], "is_transposed": is_transposed}
                if name != "gate"
                else {"num_experts": 1}
            )
            assert torch.equal(LORA_PARAMETERS.delta(replace(one, options=bare)), change)
            ranked = {**bare, "num_experts": None, "r": 2}
            assert LORA_PARAMETERS.error(told, replace(one, options=ranked)) == 0
    x = torch.randn(5, 6)
    assert relative(model(x), after(x)) < 1e-5
    # ΔW of the outermost, as peft itself gives it.
    wanted = model.base_model.model.experts.get_delta_weight("default").detach()
    outer = replace(updates[-1], options={"shape": shapes[found[-1]]})
    assert relative(wanted, LORA_PARAMETERS.delta(outer)) < 1e-6


def test_square_experts_need_a_word_on_their_layout() -> None:
    torch.manual_seed(0)
    experts = Experts(hidden=10, inner=10)
    model, [one], shapes = tuned(experts, ["down_proj"])
    told = replace(one, options={"shape": shapes["down_proj"]})
    assert LORA_PARAMETERS.fits(one, (3, 10, 10))
    with pytest.raises(CannotRepresent, match=r"kept transposed.*--base CONFIG"):
        LORA_PARAMETERS.delta(told)
    wanted = model.base_model.model.experts.get_delta_weight("default").detach()
    plain = replace(told, options={**told.options, "is_transposed": False})
    assert relative(wanted, LORA_PARAMETERS.delta(plain)) < 1e-6
    flipped = replace(told, options={**told.options, "is_transposed": True})
    assert relative(wanted.transpose(1, 2), LORA_PARAMETERS.delta(flipped)) < 1e-6


def test_old_files_of_untransposed_experts() -> None:
    """Before peft looked at `is_transposed`, A had shape[1] columns whatever the layout; the shape shows it."""
    one = update("lora_parameters", {"A": torch.randn(6, 20), "B": torch.randn(6, 6)}, 2.0)
    told = replace(one, options={"shape": (3, 20, 6)})
    a, b = one.tensors["A"].torch().reshape(3, 2, 20), one.tensors["B"].torch().reshape(6, 2, 3)
    assert relative(torch.einsum("ore,eri->eio", b, a), LORA_PARAMETERS.delta(told)) < 1e-6


def test_one_expert_is_never_transposed() -> None:
    torch.manual_seed(0)
    model, [one], shapes = tuned(Experts(count=1), ["down_proj"])
    told = replace(one, options={"shape": shapes["down_proj"]})
    wanted = model.base_model.model.experts.get_delta_weight("default").detach()
    assert LORA_PARAMETERS.delta(told).shape == (1, 6, 10)
    assert relative(wanted, LORA_PARAMETERS.delta(told)[0]) < 1e-6
    assert not LORA_PARAMETERS.fits(one, (1, 10, 6))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(3, 8, 12), (3, 12, 8), (8, 12)])
def test_norms_rows_and_errors_agree(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensors = {"A": torch.randn(6, 12).to(dtype), "B": torch.randn(8, 6).to(dtype)}
    one = update("lora_parameters", tensors, 5.0, options={"shape": shape})
    LORA_PARAMETERS.check(one)
    delta = LORA_PARAMETERS.delta(one)
    assert abs(LORA_PARAMETERS.norm(one) - float(delta.norm())) < 1e-5 * float(delta.norm())
    rows = LORA_PARAMETERS.matrix(one)
    assert rows.shape == (shape[0], delta[0].numel())
    assert relative(delta[1:3].reshape(2, -1), torch.from_numpy(rows.at(1, 3))) < 1e-6
    assert LORA_PARAMETERS.error(one, one) == 0
    worse = LORA_PARAMETERS.delta(perturbed(one, "B", 0.1))
    assert abs(LORA_PARAMETERS.error(one, perturbed(one, "B", 0.1)) - relative(delta, worse)) < 1e-5
    folded = replace(
        one, tensors=LORA_PARAMETERS.folded(one, "F32"), alpha=replace(one.alpha, value=LORA_PARAMETERS.rank(one) * 1.0)
    )  # type: ignore[type-var]
    assert LORA_PARAMETERS.error(one, folded) < 1e-6
    pair = LORA_PARAMETERS.low_rank(one)
    assert (pair is None) == (len(shape) == 3)
    if pair is not None:
        assert relative(delta, pair[0].double() @ pair[1].double() * 5 / 6) < 1e-6
        assert LORA_PARAMETERS.exact_rank(one) == 6
    with pytest.raises(CannotRepresent, match="cannot be split"):
        LORA_PARAMETERS.take_rows(one, [(0, 1)])


def test_nothing_says_how_many_experts() -> None:
    one = update("lora_parameters", {"A": torch.randn(6, 12), "B": torch.randn(8, 6)}, 5.0)
    LORA_PARAMETERS.check(one)
    with pytest.raises(CannotRepresent, match=r"how many experts.*--base CONFIG"):
        LORA_PARAMETERS.scale(one)


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        ({"A": (6, 12)}, {}, "counterpart B"),
        ({"A": (6, 12), "B": (8, 4)}, {}, r"4 columns.*6 rows"),
        ({"A": (6, 12, 1), "B": (8, 6)}, {}, "stacked experts"),
        ({"A": (6, 12), "B": (8, 6)}, {"num_experts": 4}, "each of 4 experts"),
        ({"A": (6, 12), "B": (8, 6)}, {"shape": (3, 8, 13)}, r"\[8, 12\], and the parameter is \[3, 8, 13\]"),
        ({"A": (6, 12), "B": (8, 6)}, {"shape": (4, 8, 12)}, "each of 4 experts"),
    ],
)
def test_shapes_that_cannot_belong_together(
    shapes: dict[str, tuple[int, ...]], options: dict[str, Any], message: str
) -> None:
    tensors = {role: torch.zeros(shape) for role, shape in shapes.items()}
    with pytest.raises(BrokenAdapter, match=message):
        LORA_PARAMETERS.check(update("lora_parameters", tensors, 1.0, options=options))


def test_which_parameter() -> None:
    one = update("lora_parameters", {"A": torch.randn(6, 12), "B": torch.randn(8, 6)}, 5.0)
    alike = {"w1": (3, 8, 12), "w2": (3, 12, 8), "w3": (3, 8, 12), "norm": (8,)}
    with pytest.raises(AmbiguousFormat, match=r"w1 or w2 or w3; say which with --set target_parameters"):
        which([one], alike)
    assert which([one], alike, ["w3"]) == ["w3"]
    assert which([one, one, one], alike) == ["w1", "w2", "w3"]
    with pytest.raises(BrokenAdapter, match=r"no parameters of the base's module fit.*norm \[8\]"):
        which([one], {"norm": (8,), "w": (3, 8, 13)})
    ranked = replace(one, options={"r": 3})
    assert which([ranked], {"w1": (3, 8, 12), "w2": (2, 8, 12)}) == ["w2"]
