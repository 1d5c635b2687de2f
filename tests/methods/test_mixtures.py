"""Lily, Poly, X-LoRA and ShadowPEFT as peft saves them: read whole, and refused where a weight delta is asked for."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from method_updates import lazy, update
from odd_models import adapted, llama, saved_by_peft
from peft import LilyConfig, LoraConfig, PeftConfig, PolyConfig, ShadowConfig, XLoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict

from adapterops.adapter import Update
from adapterops.errors import BrokenAdapter, CannotRepresent
from adapterops.methods import METHODS

BLOCK = "base_model.model.model.layers.0."
CONFIGS: dict[str, PeftConfig] = {
    "lily": LilyConfig(target_modules=["v_proj"], r=3, num_B=2, stride_A=2, scaling=1.5),
    "poly": PolyConfig(target_modules=["v_proj"], r=3, n_tasks=4, n_skills=3, n_splits=2),
    "shadow": ShadowConfig(r=3, update_hidden_size=5, shadow_hidden_size=16, shadow_intermediate_size=24),
}
STARTS = {
    "lily": f"{BLOCK}self_attn.v_proj.lily_",
    "poly": f"{BLOCK}self_attn.v_proj.poly_",
    "shadow": f"{BLOCK}shadow_",
}


@cache
def state(method: str) -> Mapping[str, torch.Tensor]:
    return saved_by_peft(CONFIGS[method])


def saved(method: str) -> Update:
    """The first module's update."""
    start = STARTS[method]
    found = {key.removeprefix(start): t for key, t in state(method).items() if key.startswith(start)}
    if method == "shadow":
        once = "base_model.shadow_"
        shared = {key.removeprefix(once): t for key, t in state(method).items() if key.startswith(once)}
        return update(method, {role.replace(".default.", "."): t for role, t in found.items()} | shared)
    return update(method, {role.removesuffix(".weight"): t for role, t in found.items()})


def classifier(depth: int, folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The classifier of an X-LoRA of two LoRAs: all its tensors, and those that peft saves."""
    experts = {}
    for name in ("a", "b"):
        experts[name] = str(folder / name)
        adapted(LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(experts[name])
    config = XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, adapters=experts, xlora_depth=depth, xlora_size=6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(llama(), config)
        written = get_peft_model_state_dict(model)
    start = "base_model.internal_xlora_"
    whole = {key.removeprefix(start): t for key, t in model.state_dict().items() if key.startswith(start)}
    return whole, {key.removeprefix(start): t for key, t in written.items()}


def xlora(tensors: Mapping[str, torch.Tensor]) -> Update:
    return replace(update("xlora", tensors), module="")


@pytest.mark.parametrize(
    ("method", "shapes", "fits"),
    [
        ("lily", {"A": (3, 32), "B": (6, 16), "router": (2, 3)}, True),
        ("poly", {"lora_A": (2, 3, 16, 3), "lora_B": (2, 3, 3, 8), "router.module_logits": (4, 6)}, True),
        ("shadow", {"down.weight": (3, 32), "up.weight": (32, 3), "update_gate.0.weight": (5, 32)}, False),
    ],
)
def test_what_peft_saves_is_whole(method: str, shapes: dict[str, tuple[int, ...]], fits: bool) -> None:
    one, kind = saved(method), METHODS[method]
    kind.check(one)
    assert shapes.items() <= {role: t.shape for role, t in one.tensors.items()}.items()
    assert kind.rank(one) == 3
    assert kind.error(one, one) == 0.0
    if fits:
        assert [kind.fits(one, s) for s in ((16, 32), (32, 16), (16, 32, 1, 1), (16,))] == [True, False, False, False]


def test_the_shadow_itself_belongs_to_every_block() -> None:
    one, kind = saved("shadow"), METHODS["shadow"]
    assert one.tensors["projection.default.weight"].shape == (32, 16)
    backbone = {role for role in one.tensors if role.startswith("backbone.")}
    assert backbone
    with pytest.raises(BrokenAdapter, match=r"shadow_backbone.*missing"):
        kind.check(replace(one, tensors={role: t for role, t in one.tensors.items() if role not in backbone}))


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_classifier_without_its_first_layer_is_refused(depth: int, tmp_path: Path) -> None:
    """peft's own filter for adapters named 0 and 1 takes `layers.0.weight` for one of theirs."""
    whole, written = classifier(depth, tmp_path)
    kind = METHODS["xlora"]
    kind.check(xlora(whole))
    assert {"classifier.layers.0.weight", "classifier.layers.0.bias"} == whole.keys() - written.keys()
    if written:
        with pytest.raises(BrokenAdapter, match=r"layers.0, is missing.*peft 0.21"):
            kind.check(xlora(written))
    else:
        with pytest.raises(BrokenAdapter, match="without any layer"):
            kind.check(xlora(written))


def test_layers_of_a_classifier_follow_each_other(tmp_path: Path) -> None:
    whole, _ = classifier(3, tmp_path)
    kind, middle = METHODS["xlora"], sorted(role for role in whole if role.endswith(".weight"))[1]
    number = middle.split(".")[2]
    for change, said in (
        ({middle: torch.ones(6, 5)}, "the layer before"),
        ({f"classifier.layers.{number}.bias": torch.ones(5)}, r"\(out, in\) and \(out,\)"),
        ({f"classifier.layers.{number}.bias": None}, "bias is missing"),
        ({"other.weight": torch.ones(5)}, "no part of X-LoRA"),
    ):
        broken = {role: t for role, t in (whole | change).items() if t is not None}
        with pytest.raises(BrokenAdapter, match=said):
            kind.check(xlora(broken))


@pytest.mark.parametrize("method", ["lily", "poly", "shadow", "xlora"])
def test_every_use_but_carrying_is_refused(method: str) -> None:
    layers = {"classifier.layers.0.weight": torch.ones(2, 32), "classifier.layers.0.bias": torch.ones(2)}
    one, kind = xlora(layers) if method == "xlora" else saved(method), METHODS[method]
    kind.check(one)
    assert not kind.linear
    assert kind.norm(one) is None
    uses: list[Any] = [kind.delta, kind.change, kind.matrix]
    for use in uses:
        with pytest.raises(CannotRepresent, match=r"no weight delta: (a|its) .*--to peft"):
            use(one)
    assert kind.is_nothing(one) == (method in ("lily", "poly"))  # as they begin


@pytest.mark.parametrize(
    ("method", "change", "said"),
    [
        ("lily", {"router": (2, 4)}, "Lily's are"),
        ("lily", {"router": (1, 3), "B": (3, 16)}, "at least 2"),
        ("lily", {"B": (7, 16)}, "Lily's are"),
        ("lily", {"A": (3,)}, "two axes"),
        ("poly", {"lora_A": (2, 3, 48)}, "four axes"),
        ("poly", {"lora_B": (2, 3, 4, 8)}, "not halves"),
        ("poly", {"router.module_logits": (4, 5)}, "6 columns"),
        ("shadow", {"up.weight": (3, 32)}, r"\(hidden_size, r\)"),
        ("shadow", {"update_gate.2.weight": (32, 4)}, "and back"),
        ("shadow", {"update_transform.0.bias": (4,)}, "gives 5 numbers"),
    ],
)
def test_shapes_that_cannot_be(method: str, change: dict[str, tuple[int, ...]], said: str) -> None:
    one = saved(method)
    tensors = {**one.tensors, **{role: lazy(torch.ones(shape), role) for role, shape in change.items()}}
    with pytest.raises(BrokenAdapter, match=said):
        METHODS[method].check(replace(one, tensors=tensors))


@pytest.mark.parametrize("method", ["lily", "poly", "shadow"])
def test_every_part_is_needed(method: str) -> None:
    one = saved(method)
    for role in (role for role in one.tensors if not role.startswith(("backbone.", "projection."))):
        with pytest.raises(BrokenAdapter, match="missing from the file"):
            METHODS[method].check(replace(one, tensors={r: t for r, t in one.tensors.items() if r != role}))
