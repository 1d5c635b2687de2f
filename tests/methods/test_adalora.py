"""AdaLoRA against peft and the authors' forward, and its budget given out anew."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from method_updates import lazy, perturbed, relative, update
from peft import AdaLoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from transformers.pytorch_utils import Conv1D

from adapterops.adapter import Certainty, Fact, Update
from adapterops.errors import BrokenAdapter, CannotRepresent, UsageError
from adapterops.methods import METHODS
from adapterops.methods.adalora import AdaLora
from adapterops.methods.base import Own
from adapterops.operations.triplets import reallocate

ADALORA = AdaLora()
LAYERS: dict[str, Any] = {
    "linear": lambda: nn.Linear(12, 8),
    "conv2d": lambda: nn.Conv2d(6, 8, (3, 2)),
    "Conv1D": lambda: Conv1D(8, 12),
}


class Toy(nn.Module):
    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)


def tuned(layers: dict[str, nn.Module], alpha: float = 6, pattern: dict[str, list[bool]] | None = None) -> Any:
    """A peft model with random triplets, of which `pattern` (by module) keeps some."""
    fan = any(isinstance(layer, Conv1D) for layer in layers.values())
    ranks = {f"{name}.lora_E": mask for name, mask in (pattern or {}).items()} or None
    config = AdaLoraConfig(
        init_r=4, lora_alpha=alpha, target_modules=list(layers), total_step=10, fan_in_fan_out=fan, rank_pattern=ranks
    )  # type: ignore[arg-type]
    model = get_peft_model(Toy(**layers), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape))
    return model


def read(model: Any, name: str, state: dict[str, torch.Tensor] | None = None, **rest: Any) -> Update:
    state = get_peft_model_state_dict(model) if state is None else state
    start = f"base_model.model.{name}.lora_"
    tensors = {key.removeprefix(start): t.clone() for key, t in state.items() if key.startswith(start)}
    config = model.peft_config["default"]
    one = update("adalora", tensors, float(config.lora_alpha), options={"init_r": config.init_r}, **rest)
    return replace(one, module=name)


def own(layer: Any) -> Own:
    weight = layer.weight.detach().clone()
    return Own(weight.T if isinstance(layer, Conv1D) else weight)


def of_layer(tuner: Any) -> torch.Tensor:
    delta: torch.Tensor = tuner.get_delta_weight("default").detach()
    return delta.T if tuner.__class__.__name__ == "SVDLinear" and tuner.fan_in_fan_out else delta


@pytest.mark.parametrize("alpha", [6, 0, -1])
@pytest.mark.parametrize("kind", LAYERS)
def test_the_delta_is_pefts(kind: str, alpha: float) -> None:
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    model = tuned({"proj": layer}, alpha)
    one = read(model, "proj")
    ADALORA.check(one)
    before = own(layer)
    assert ADALORA.fits(one, tuple(before.weight.shape))
    assert not ADALORA.fits(one, (8, 13))
    wanted = of_layer(model.base_model.model.proj)
    change = ADALORA.change(one, before).weight
    assert change is not None
    assert relative(wanted, change) < 1e-6
    assert change.shape == before.weight.shape
    told = replace(one, options={**one.options, "shape": tuple(before.weight.shape)})
    assert ADALORA.delta(told).shape == before.weight.shape
    x = {"conv2d": torch.randn(2, 6, 7, 5)}.get(kind, torch.randn(5, 12))
    forward = model.base_model.model.proj(x)
    with torch.no_grad():
        layer = model.base_model.model.proj.base_layer
        layer.weight += change.T if kind == "Conv1D" else change
        assert relative(forward, layer(x)) < 1e-5


@pytest.mark.parametrize("alpha", [6, 0])
def test_a_rank_pattern_leaves_the_scale_as_it_was(alpha: float) -> None:
    """What peft computes after loading, with ranks of 4, 2 and 0 that began at 4."""
    torch.manual_seed(0)
    masks = {"a": [True] * 4, "b": [False, True, True, False], "c": [False] * 4}
    trained = tuned({name: nn.Linear(12, 8) for name in masks}, alpha, masks)
    # What training leaves in the model: the masked values are zero, and nothing is resized yet.
    with torch.no_grad():
        for name, mask in masks.items():
            getattr(trained.base_model.model, name).lora_E["default"][~torch.tensor(mask)] = 0
    state = get_peft_model_state_dict(trained)
    loaded = tuned({name: nn.Linear(12, 8) for name in masks}, alpha, masks)
    set_peft_model_state_dict(loaded, state)
    for name, mask in masks.items():
        one = read(loaded, name, state)
        ADALORA.check(one)
        assert ADALORA.rank(one) == sum(mask) == ADALORA.exact_rank(one)
        tuner = getattr(loaded.base_model.model, name)
        wanted = of_layer(tuner)
        assert torch.allclose(ADALORA.delta(one), wanted, rtol=1e-5, atol=1e-6)
        assert float(tuner.ranknum["default"]) == (4 if any(mask) else 0)
        if alpha:
            # The same as in training; with an alpha of 0 peft scales by what is left, and the loaded model differs.
            assert torch.allclose(of_layer(getattr(trained.base_model.model, name)), wanted, rtol=1e-5, atol=1e-6)


def test_rslora_has_no_effect() -> None:
    config = AdaLoraConfig(init_r=4, lora_alpha=6, target_modules=["proj"], total_step=10, use_rslora=True)
    model = get_peft_model(Toy(proj=nn.Linear(12, 8)), config)
    assert model.base_model.model.proj.scaling["default"] == 6
    one = read(model, "proj", rslora=True)
    assert ADALORA.scale(one) == 6 / (4 + 1e-5)


def test_the_authors_scale_is_in_the_file() -> None:
    """The forward of the original loralib, from its definition: x·(A ∘ E)ᵀ·Bᵀ · alpha / (ranknum + 1e-5)."""
    torch.manual_seed(0)
    tensors = {"A": torch.randn(4, 12), "B": torch.randn(8, 4), "E": torch.randn(4, 1), "ranknum": torch.tensor([3.0])}
    one = update("adalora", tensors, 16.0)
    ADALORA.check(one)
    x = torch.randn(5, 12)
    wanted = x @ (tensors["A"] * tensors["E"]).T @ tensors["B"].T * 16 / (3 + 1e-5)
    assert relative(wanted, x @ ADALORA.delta(one).T) < 1e-6
    scalar = replace(one, tensors={**one.tensors, "ranknum": lazy(torch.tensor(3.0))})
    assert ADALORA.error(one, scalar) == 0
    other = replace(one, tensors={**one.tensors, "ranknum": lazy(torch.tensor(4.0))})
    assert ADALORA.error(one, other) == float("inf")
    with pytest.raises(CannotRepresent, match="--set init_r"):
        ADALORA.delta(replace(one, tensors={role: one.tensors[role] for role in "ABE"}))
    with pytest.raises(CannotRepresent, match="--alpha"):
        ADALORA.delta(replace(one, alpha=None))


def random(r: int = 4, out: int = 8, inputs: int = 12, dtype: torch.dtype = torch.float32, seed: int = 0) -> Update:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"A": (r, inputs), "B": (out, r), "E": (r, 1)}
    tensors = {role: torch.randn(shape, generator=generator).to(dtype) for role, shape in shapes.items()}
    return replace(update("adalora", tensors, 6.0, options={"init_r": 4}), module=f"m{seed}")


def masked(one: Update, *at: int) -> Update:
    e = one.tensors["E"].torch().clone()
    e[list(at)] = 0
    return replace(one, tensors={**one.tensors, "E": lazy(e)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_masked_triplets_are_no_part_of_the_low_rank_form(dtype: torch.dtype) -> None:
    whole = random(dtype=dtype)
    one = masked(whole, 1, 3)
    pair, delta, scale = ADALORA.low_rank(one), ADALORA.delta(one), ADALORA.scale(one)
    assert scale is not None
    assert pair[0].shape == (8, 2)
    assert pair[1].shape == (2, 12)
    assert ADALORA.exact_rank(one) == 2
    assert relative(delta, pair[0] @ pair[1] * scale) < 1e-6
    b, e, a = (whole.tensors[role].torch().double() for role in "BEA")
    e[[1, 3]] = 0
    assert relative(b @ (a * e) * 6 / (4 + 1e-5), delta) < 1e-6
    assert abs(ADALORA.norm(one) - float(delta.norm())) < 1e-5 * float(delta.norm())
    assert relative(delta[2:5], torch.from_numpy(ADALORA.matrix(one).at(2, 5))) < 1e-6
    assert ADALORA.error(one, one) == 0
    for role in "ABE":
        assert 0.001 < ADALORA.error(one, perturbed(one, role, 0.1)) < 1


def test_every_triplet_masked() -> None:
    one = masked(random(), 0, 1, 2, 3)
    b, a = ADALORA.low_rank(one)
    assert b.shape == (8, 0)
    assert a.shape == (0, 12)
    assert ADALORA.exact_rank(one) == 0
    assert not ADALORA.delta(one).any()
    assert ADALORA.norm(one) == 0 == ADALORA.error(one, one)


def test_rows_of_a_fused_projection() -> None:
    one = random()
    part = replace(one, tensors=ADALORA.take_rows(one, [(2, 5)]))
    assert torch.equal(ADALORA.delta(part), ADALORA.delta(one)[2:5])


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        ({"A": (4, 12), "B": (8, 4)}, {}, "counterpart E"),
        ({"A": (4, 12), "B": (8, 3), "E": (4, 1)}, {}, r"\[4, 1\] between 'x\.B' \[8, 3\]"),
        ({"A": (4, 12), "B": (8, 4), "E": (5, 1)}, {}, r"\[5, 1\] between"),
        ({"A": (4, 6, 3, 2), "B": (8, 4), "E": (4, 1)}, {}, "kernel is flattened"),
        ({"A": (4, 0), "B": (8, 4), "E": (4, 1)}, {}, "no factor of AdaLoRA"),
        ({"A": (4, 12), "B": (8, 4), "E": (4, 1), "ranknum": (2,)}, {}, "one number"),
        ({"A": (4, 12), "B": (8, 4), "E": (4, 1)}, {"init_r": 3}, "began with 3"),
    ],
)
def test_shapes_that_cannot_belong_together(
    shapes: dict[str, tuple[int, ...]], options: dict[str, Any], message: str
) -> None:
    one = update("adalora", {role: torch.zeros(shape) for role, shape in shapes.items()}, 1.0, options=options)
    with pytest.raises(BrokenAdapter, match=message):
        ADALORA.check(one)


def test_a_base_of_another_size() -> None:
    with pytest.raises(BrokenAdapter, match="another base model"):
        ADALORA.change(random(), Own(torch.zeros(8, 13)))


def parts(updates: list[Update]) -> list[tuple[float, str, int]]:
    """The norm of every triplet's own delta, the long way round."""
    out = []
    for one in updates:
        for i in range(ADALORA.rank(one)):
            alone = masked(one, *(j for j in range(ADALORA.rank(one)) if j != i))
            out.append((float(ADALORA.delta(alone).double().norm()), one.module, i))
    return sorted(out, reverse=True)


@pytest.mark.parametrize("budget", [0, 1, 2, 2.5, 4, 9])
def test_the_most_important_triplets_stay(budget: float) -> None:
    updates = [
        random(seed=1),
        masked(random(seed=2, out=20), 0),
        replace(random(seed=3), alpha=Fact(24.0, Certainty.READ)),
    ]
    plain = replace(update("lora", {"A": torch.randn(2, 3), "B": torch.randn(3, 2)}, 1.0), module="other")
    got = reallocate([*updates, plain], budget)
    wanted = {(name, i) for size, name, i in parts(updates)[: int(budget * 3)] if size}
    assert got[3] is plain
    left = 0
    for before, after in zip(updates, got, strict=False):
        ADALORA.check(after)
        kept = [i for i in range(4) if (before.module, i) in wanted]
        assert ADALORA.rank(after) == len(kept) == ADALORA.exact_rank(after)
        left += len(kept)
        for role, axis in (("A", 0), ("B", 1), ("E", 0)):
            assert torch.equal(
                after.tensors[role].torch(), before.tensors[role].torch().index_select(axis, torch.tensor(kept).int())
            )
        dropped = masked(before, *(i for i in range(4) if i not in kept))
        assert torch.allclose(ADALORA.delta(after), ADALORA.delta(dropped), rtol=1e-6, atol=1e-6)
    assert left == min(int(budget * 3), 11)


def test_an_alpha_that_stands_for_the_rank_is_written_out() -> None:
    one = replace(random(), alpha=Fact(0.0, Certainty.READ, "config"))
    before = np.sort(ADALORA.importance(one))
    [after] = reallocate([one], 2)
    assert after.alpha is not None
    assert after.alpha.value == 4
    assert np.allclose(np.sort(ADALORA.importance(after)), before[2:])


def test_equal_triplets_go_by_order() -> None:
    tensors = {"A": torch.ones(4, 12), "B": torch.ones(8, 4), "E": torch.ones(4, 1)}
    updates = [replace(update("adalora", tensors, 1.0, options={"init_r": 4}), module=name) for name in "ab"]
    assert [ADALORA.rank(u) for u in reallocate(updates, 3)] == [4, 2]


def test_a_budget_that_cannot_be() -> None:
    with pytest.raises(UsageError, match="negative"):
        reallocate([random()], -1)
    with pytest.raises(UsageError, match="has none"):
        reallocate([], 2)
    with pytest.raises(CannotRepresent, match="NaN"):
        reallocate([replace(random(), tensors={**random().tensors, "A": lazy(torch.full((4, 12), torch.nan))})], 2)


def test_it_is_registered() -> None:
    assert isinstance(METHODS["adalora"], AdaLora)
