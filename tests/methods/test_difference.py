"""Full, norm, bias and sparse differences against lycoris-lora."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from lycoris.modules.full import FullModule
from lycoris.modules.norms import NormModule
from lycoris.utils import extract_diff
from method_updates import doubled, lazy, perturbed, randomise, relative, update
from torch import nn

from adapterops.adapter import Update
from adapterops.errors import BrokenAdapter, CannotRepresent
from adapterops.methods.difference import Difference
from adapterops.methods.lora import Lora

DIFF = Difference()
ROLES = {"diff": "weight", "diff_b": "bias", "w_norm": "weight", "b_norm": "bias"}


def of_lycoris(module: nn.Module) -> Update:
    return update("diff", {ROLES[key]: t for key, t in module.state_dict().items()})


@pytest.mark.parametrize("kind", ["linear", "conv", "without bias"])
def test_full_differences_are_what_lycoris_trained(kind: str) -> None:
    base: Any = nn.Conv2d(10, 12, 3) if kind == "conv" else nn.Linear(20, 12, bias=kind == "linear")
    before = {name: t.detach().clone() for name, t in base.named_parameters()}
    module = FullModule("x", base)
    module.apply_to()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    one = of_lycoris(module)
    DIFF.check(one)
    assert DIFF.fits(one, tuple(before["weight"].shape))
    torch.testing.assert_close(DIFF.delta(one), module.weight.detach() - before["weight"])
    bias = DIFF.bias_delta(one)
    assert (bias is None) == (kind == "without bias")
    if bias is not None:
        torch.testing.assert_close(bias, module.bias.detach() - before["bias"])


@pytest.mark.parametrize("base", [nn.LayerNorm(8), nn.GroupNorm(2, 8)])
def test_norms_are_lycoris_own(base: nn.Module) -> None:
    module = NormModule("x", base)
    randomise(module)
    one = replace(of_lycoris(module), options={"kind": "norm"})
    DIFF.check(one)
    assert DIFF.fits(one, (8,))
    weight, bias = module.get_diff_weight()
    torch.testing.assert_close(DIFF.delta(one), weight.detach().float())
    torch.testing.assert_close(DIFF.bias_delta(one), bias.detach().float())


class Attention(nn.Module):
    """One linear layer and one convolution under names that LyCORIS looks for."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.conv = nn.Linear(40, 32, bias=False), nn.Conv2d(16, 24, 3)


def test_the_sparse_bias_is_what_a_low_rank_leaves_of_the_weight(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    before, after = Attention(), Attention()
    # A sparsity of 0 keeps everything: low rank and rest are the whole difference.
    state = extract_diff([], [], before, after, "fixed", 4, 4, "cpu", True, 0.0, small_conv=False)
    capsys.readouterr()
    for name in ("to_q", "conv"):
        keys = {k.partition(".")[2]: t for k, t in state.items() if k.startswith(f"lora_unet_{name}.")}
        assert set(keys) == {"lora_down.weight", "lora_up.weight", "alpha", "bias_indices", "bias_values", "bias_size"}
        sparse = update("diff", {k: t for k, t in keys.items() if k.startswith("bias")})
        DIFF.check(sparse)
        low = update("lora", {"A": keys["lora_down.weight"], "B": keys["lora_up.weight"]}, float(keys["alpha"]))
        assert Lora().scale(low) == 1.0
        wanted = (getattr(after, name).weight - getattr(before, name).weight).detach()
        rest = wanted - Lora().delta(low)
        assert DIFF.bias_delta(sparse) is None
        torch.testing.assert_close(DIFF.delta(sparse), wanted.sub(Lora().delta(low)).flatten(1), rtol=0, atol=2e-3)
        assert rest.norm() > 0.1 * wanted.norm()


def sparse(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    indices = torch.tensor([[0, 2, 2], [1, 0, 0]], dtype=torch.int16)
    size = torch.tensor([3, 2], dtype=torch.int16)
    return {"bias_indices": indices, "bias_values": torch.tensor([1.0, 2, 4]), "bias_size": size, **changes}


def test_sparse_parts_add_to_whole_ones() -> None:
    assert DIFF.delta(update("diff", sparse())).tolist() == [[0, 1], [0, 0], [6, 0]]
    both = update("diff", {"weight": torch.ones(3, 2, 1, 1), **sparse()})
    DIFF.check(both)
    assert DIFF.delta(both).tolist() == [[[[1]], [[2]]], [[[1]], [[1]]], [[[7]], [[1]]]]
    with pytest.raises(BrokenAdapter, match="outside of the sparse matrix"):
        DIFF.delta(update("diff", {"weight": torch.ones(3, 3), **sparse()}))


@pytest.mark.parametrize(
    "changes",
    [
        {"bias_indices": torch.tensor([[0, 2, 3], [1, 0, 0]])},
        {"bias_indices": torch.tensor([[0, 2, 2], [1, 0, -1]])},
        {"bias_size": torch.tensor([3, -2])},
    ],
)
def test_positions_that_overflowed(changes: dict[str, torch.Tensor]) -> None:
    one = update("diff", sparse(**changes))
    DIFF.check(one)
    for act in (DIFF.delta, lambda u: DIFF.error(u, u)):
        with pytest.raises(BrokenAdapter, match=r"(?s)x.bias_indices.*16 bits"):
            act(one)


@pytest.mark.parametrize("size", [1e-1, 1e-6, 1e-12])
@pytest.mark.parametrize("role", ["weight", "bias", "bias_values"])
def test_errors(role: str, size: float) -> None:
    torch.manual_seed(0)
    one = update("diff", {"weight": torch.randn(3, 2), "bias": torch.randn(3), **sparse()})
    one = replace(
        one, tensors={**one.tensors, **{r: doubled(one).tensors[r] for r in ("weight", "bias", "bias_values")}}
    )
    other = perturbed(one, role, size)
    assert DIFF.error(one, one) == 0.0
    parts = [
        torch.from_numpy(DIFF._sparse(u)) if role == "bias_values" else u.tensors[role].torch() for u in (one, other)
    ]
    wanted = relative(*parts)
    assert DIFF.error(one, other) == pytest.approx(wanted, rel=1e-3)
    assert DIFF.error(one, other) > 0.1 * size


def test_errors_of_other_tensors() -> None:
    one = update("diff", {"weight": torch.ones(3, 2), "bias": torch.ones(3)})
    flat = update("diff", {"weight": torch.ones(3, 2, 1, 1), "bias": torch.ones(3)})
    assert DIFF.error(one, flat) == 0.0
    assert DIFF.error(one, replace(one, tensors={"weight": one.tensors["weight"]})) == float("inf")
    assert DIFF.error(update("diff", sparse()), update("diff", sparse(bias_size=torch.tensor([3, 3])))) == float("inf")


def test_a_bias_alone_has_no_weight_delta() -> None:
    one = update("diff", {"bias": torch.tensor([[1.0], [2.0]])})
    DIFF.check(one)
    assert DIFF.fits(one, (2, 7))
    assert not DIFF.fits(one, (7, 2))
    with pytest.raises(CannotRepresent, match="only its bias"):
        DIFF.delta(one)
    bias = DIFF.bias_delta(one)
    assert bias is not None
    assert bias.tolist() == [1, 2]


def test_rows_are_rows_of_the_delta() -> None:
    weight, bias = torch.randn(6, 4, 3), torch.randn(6, 1)
    one = update("diff", {"weight": weight, "bias": bias})
    part = replace(one, tensors=DIFF.take_rows(one, [(4, 6), (0, 1)]))
    DIFF.check(part)
    assert torch.equal(DIFF.delta(part), torch.cat([weight[4:6], weight[:1]]))
    taken = DIFF.bias_delta(part)
    assert taken is not None
    assert torch.equal(taken, torch.cat([bias[4:6], bias[:1]]).reshape(-1))
    with pytest.raises(CannotRepresent, match=r"(?s)sparse.*x.bias_indices.*--to kohya"):
        DIFF.take_rows(update("diff", sparse()), [(0, 1)])


def test_nothing() -> None:
    assert DIFF.is_nothing(update("diff", {"weight": torch.zeros(3, 2), "bias": torch.zeros(3)}))
    assert not DIFF.is_nothing(update("diff", {"weight": torch.zeros(3, 2), "bias": torch.ones(3)}))
    assert not DIFF.is_nothing(update("diff", sparse()))
    assert DIFF.is_nothing(update("diff", sparse(bias_values=torch.zeros(3))))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "without any tensor"),
        ({"weight": torch.ones(0, 2)}, "holds no weight"),
        ({"bias": torch.ones(2, 2)}, "no bias"),
        ({"weight": torch.ones(3, 2), "bias": torch.ones(2)}, r"(?s)2 numbers.*x.weight.*2 outputs"),
        ({k: t for k, t in sparse().items() if k != "bias_size"}, "bias_size is missing"),
        (sparse(bias_indices=torch.ones(2, 3)), "positions are integers"),
        (sparse(bias_values=torch.ones(4)), r"positions \[2, 4\]"),
        (sparse(bias_size=torch.tensor([3, 2, 1])), "a size of 2"),
    ],
)
def test_tensors_that_contradict_each_other(tensors: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(BrokenAdapter, match=message):
        DIFF.check(update("diff", tensors))


@pytest.mark.parametrize(
    ("held", "shape", "fits"),
    [
        ((12, 20), (12, 20), True),
        ((12, 20, 1, 1), (12, 20), True),
        ((12, 90), (12, 10, 3, 3), True),
        ((12, 10, 3, 3), (12, 10, 3, 3), True),
        ((12, 10, 3, 3), (12, 90), False),
        ((20, 12), (12, 20), False),
        ((8,), (8,), True),
        ((8,), (9,), False),
        ((), (), True),
    ],
)
def test_what_it_fits(held: tuple[int, ...], shape: tuple[int, ...], fits: bool) -> None:
    assert DIFF.fits(replace(update("diff", {}), tensors={"weight": lazy(torch.ones(held))}), shape) is fits
