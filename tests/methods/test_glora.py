"""GLoRA against peft."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from method_updates import update
from peft import GloraConfig
from torch import nn
from turned_layers import outputs_agree, own_of, update_of, wrapped

from adapterops.adapter import Update
from adapterops.errors import BrokenAdapter, CannotRepresent
from adapterops.methods.base import Own
from adapterops.methods.glora import Glora

GLORA = Glora()
CASES = list(
    product(["lora", "vector", "constant", "none"], ["lora", "vector", "none"], ["vector", "constant", "none"])
)


def made(base: nn.Module, ab: Any, c: Any, de: Any, r: int = 2) -> tuple[Update, Any]:
    model = wrapped(base, GloraConfig(r=r, config_A_B=ab, config_C=c, config_D_E=de))
    return update_of(model, "glora", "glora_"), model


@pytest.mark.parametrize(("ab", "c", "de"), CASES)
def test_outputs_are_pefts(ab: str, c: str, de: str) -> None:
    base = nn.Linear(7, 5)
    one, model = (
        made(base, ab, c, de)
        if (ab, c, de) != ("none",) * 3
        else (update_of(_untouched(base), "glora", "glora_"), _untouched(base))
    )
    if (ab, c, de) == ("none",) * 3:
        GLORA.check(one)
        assert GLORA.is_nothing(one)
        assert GLORA.change(one, own_of(base)) == (None, None)
        return
    assert not GLORA.is_nothing(one)
    outputs_agree(GLORA, one, base, model)


def _untouched(base: nn.Module) -> Any:
    from peft import get_peft_model

    config = GloraConfig(config_A_B="none", config_C="none", config_D_E="none", target_modules=["0"])
    return get_peft_model(nn.Sequential(base), config)


@pytest.mark.parametrize("ab", ["lora", "vector", "constant"])
def test_without_a_bias(ab: str) -> None:
    base = nn.Linear(7, 5, bias=False)
    one, model = made(base, ab, "lora", "vector")
    assert {role for role in one.tensors if role[0] in "CDE"} == {"C.zeros", "D.zeros", "E.zeros"}
    outputs_agree(GLORA, one, base, model)
    assert GLORA.change(one, own_of(base)).bias is None


@pytest.mark.parametrize(("ab", "c", "de"), [case for case in CASES if case != ("none",) * 3])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 5), (7, 1), (1, 1), (2, 2)])
def test_small_modules(ab: str, c: str, de: str, inputs: int, outputs: int) -> None:
    base = nn.Linear(inputs, outputs)
    one, model = made(base, ab, c, de)
    GLORA.check(one)
    outputs_agree(GLORA, one, base, model)


@pytest.mark.parametrize(("ab", "c", "de"), CASES[:-1])
def test_rows(ab: str, c: str, de: str) -> None:
    base = nn.Linear(7, 5)
    one, _ = made(base, ab, c, de)
    part = replace(one, tensors=GLORA.take_rows(one, [(3, 5), (0, 1)]))
    GLORA.check(part)
    own = own_of(base)
    assert own.bias is not None
    at = [3, 4, 0]
    whole, some = GLORA.change(one, own), GLORA.change(part, Own(own.weight[at], own.bias[at]))
    for before, after in zip(whole, some, strict=True):
        assert (before is None) is (after is None)
        if before is not None and after is not None:
            torch.testing.assert_close(after, before[at])


def test_errors_are_those_of_the_letters() -> None:
    one, _ = made(nn.Linear(7, 5), "lora", "lora", "vector")
    assert GLORA.error(one, one) == 0.0
    for role in ("A.Xd", "C.Xu", "E.X"):
        off = replace(one, tensors={**one.tensors, role: one.tensors[role].mapped("F64", 1.01)})
        assert GLORA.error(one, off) == pytest.approx(0.01, rel=1e-6)
    balanced = {"B.Xd": one.tensors["B.Xd"].mapped("F64", 4.0), "B.Xu": one.tensors["B.Xu"].mapped("F64", 0.25)}
    assert GLORA.error(one, replace(one, tensors={**one.tensors, **balanced})) == pytest.approx(0, abs=1e-7)
    assert GLORA.error(one, made(nn.Linear(7, 5), "vector", "lora", "vector")[0]) == float("inf")
    assert GLORA.error(one, made(nn.Linear(6, 5), "lora", "lora", "vector")[0]) == float("inf")
    assert GLORA.rank(one) == 2
    assert GLORA.rank(made(nn.Linear(7, 5), "vector", "vector", "vector")[0]) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"A.Xu": None}, "A.Xu is missing"),
        ({"A.Xu": torch.ones(3, 7)}, r"x.A.Xd.*A.Xu.*cannot be multiplied"),
        ({"A.Xd": torch.ones(5, 2, 1)}, "cannot be multiplied"),
        ({"C.Xu": torch.ones(2, 3)}, "no form that GLoRA has for C"),
        ({"B.Xd": torch.ones(6, 2)}, r"\[5, 7\] by the other tensors"),
        ({"C.Xd": torch.ones(6, 2)}, r"\[5, 7\] by the other tensors"),
        ({"D.X": torch.ones(4)}, r"\[5, 7\] by the other tensors"),
        ({"D.X": torch.ones(5, 1)}, "no form that GLoRA has for D"),
        ({"B.Xd": None, "B.Xu": None, "B.X": torch.ones(5, 2)}, "no form that GLoRA has for B"),
        ({"F.X": torch.ones(5)}, "letters A to E"),
        ({"E.X": None, "E.Y": torch.ones(5)}, "no form that GLoRA has for E"),
    ],
)
def test_tensors_that_contradict_each_other(changes: dict[str, Any], message: str) -> None:
    one, _ = made(nn.Linear(7, 5), "lora", "lora", "vector")
    tensors: dict[str, Any] = {role: t.torch() for role, t in one.tensors.items()} | changes
    broken = update("glora", {role: t for role, t in tensors.items() if t is not None})
    with pytest.raises(BrokenAdapter, match=message):
        GLORA.check(broken)


def test_no_tensor_is_no_glora() -> None:
    with pytest.raises(BrokenAdapter, match="without any tensor"):
        GLORA.check(update("glora", {}))


def test_another_base() -> None:
    one, _ = made(nn.Linear(7, 5), "constant", "vector", "vector")
    assert [GLORA.fits(one, shape) for shape in [(5, 7), (7, 5), (5, 7, 1, 1), (5,)]] == [True, False, False, False]
    with pytest.raises(BrokenAdapter, match="another model"):
        GLORA.change(one, own_of(nn.Linear(7, 6)))
    with pytest.raises(BrokenAdapter, match=r"(?s)bias of unet: mid.to_q.*another model"):
        GLORA.change(one, own_of(nn.Linear(7, 5, bias=False)))
    for act in (GLORA.change, GLORA.delta):
        with pytest.raises(CannotRepresent, match="--base-weights"):
            act(one)
