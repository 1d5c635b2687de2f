"""BOFT against peft."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from method_updates import update
from peft import BOFTConfig
from torch import nn
from turned_layers import outputs_agree, own_of, randomise, update_of, wrapped

from adapterops.errors import BrokenAdapter, CannotRepresent
from adapterops.methods.boft import Boft, butterfly

BOFT = Boft()
BASES: dict[str, Any] = {
    "linear": lambda: nn.Linear(16, 8),
    "no bias": lambda: nn.Linear(16, 8, bias=False),
    "conv1": lambda: nn.Conv2d(16, 8, 1),
    "conv3": lambda: nn.Conv2d(16, 6, 3, padding=1, stride=2),
}


class BlockDiagonals:
    """What peft's CUDA extension computes, without it: (N, D, b, b) to (N, D·b, D·b)."""

    @staticmethod
    def forward(blocks: torch.Tensor) -> list[torch.Tensor]:
        return [torch.stack([torch.block_diag(*one) for one in blocks])]  # type: ignore[no-untyped-call]


def made(base: nn.Module, monkeypatch: pytest.MonkeyPatch, factors: int = 1, **options: Any) -> Any:
    """A layer of peft; with more factors than one by a stand-in for its extension."""
    extension = BlockDiagonals() if factors > 1 else None
    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: extension)
    model = wrapped(base, BOFTConfig(boft_n_butterfly_factor=factors, **options))
    randomise(model, "boft_s", 0.3, centre=1)
    return model


@pytest.mark.parametrize("factors", [1, 2, 3])
@pytest.mark.parametrize("options", [{"boft_block_size": 4}, {"boft_block_num": 8, "boft_block_size": 0}])
@pytest.mark.parametrize("kind", BASES)
def test_outputs_are_pefts(kind: str, options: dict[str, Any], factors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    base = BASES[kind]()
    model = made(base, monkeypatch, factors, **options)
    one = update_of(model, "boft", "boft_")
    assert one.tensors["R"].shape[0] == factors
    outputs_agree(BOFT, one, base, model)


def test_pieces_with_even_numbers_come_first() -> None:
    assert butterfly(8, 2, 0).tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert butterfly(8, 2, 1).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert butterfly(8, 2, 2).tolist() == [0, 2, 4, 6, 1, 3, 5, 7]


def test_errors_are_those_of_the_effect() -> None:
    generator = torch.Generator().manual_seed(0)
    r, s = torch.randn(1, 2, 4, 4, generator=generator) / 10, 1 + torch.randn(6, 1, generator=generator)
    one = update("boft", {"R": r, "s": s})
    assert BOFT.error(one, one) == 0.0
    symmetric = r + torch.ones(1, 2, 4, 4)
    assert BOFT.error(one, update("boft", {"R": symmetric, "s": s})) == pytest.approx(0, abs=1e-5)
    assert BOFT.error(one, update("boft", {"R": r * 1.001, "s": s})) == pytest.approx(1e-3, rel=0.2)
    assert BOFT.error(one, update("boft", {"R": r, "s": 1 + (s - 1) * 1.01})) == pytest.approx(1e-2, rel=1e-3)
    assert BOFT.error(one, update("boft", {"R": r, "s": s[:5]})) == float("inf")
    assert BOFT.error(one, update("boft", {"R": r.reshape(1, 2, 16, 1)[:, :1].reshape(1, 1, 4, 4), "s": s})) == float(
        "inf"
    )
    assert BOFT.error(one, update("boft", {"R": r})) == float("inf")


def test_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    for base in (nn.Linear(16, 8), nn.Conv2d(16, 8, 1)):
        model = made(base, monkeypatch)
        one = update_of(model, "boft", "boft_")
        pieces = [(5, 8), (1, 2)]
        part = replace(one, tensors=BOFT.take_rows(one, pieces))
        BOFT.check(part)
        assert len(part.tensors["s"].shape) == 2
        own = own_of(base)
        cut = torch.cat([own.weight[5:8], own.weight[1:2]])
        whole, some = BOFT.change(one, own).weight, BOFT.change(part, own._replace(weight=cut)).weight
        assert whole is not None
        assert some is not None
        torch.testing.assert_close(some, torch.cat([whole[5:8], whole[1:2]]))


def test_nothing() -> None:
    still = torch.ones(1, 2, 4, 4)
    assert BOFT.is_nothing(update("boft", {"R": still, "s": torch.ones(6, 1)}))
    assert not BOFT.is_nothing(update("boft", {"R": still, "s": torch.zeros(6, 1)}))
    assert not BOFT.is_nothing(update("boft", {"R": still.triu(), "s": torch.ones(6, 1)}))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"R": torch.ones(2, 4, 4), "s": torch.ones(6, 1)}, "square blocks"),
        ({"R": torch.ones(1, 2, 4, 5), "s": torch.ones(6, 1)}, "square blocks"),
        ({"R": torch.ones(0, 2, 4, 4), "s": torch.ones(6, 1)}, "square blocks"),
        ({"R": torch.ones(2, 2, 3, 3), "s": torch.ones(6, 1)}, "even size"),
        ({"R": torch.ones(3, 2, 4, 4), "s": torch.ones(6, 1)}, "divisible by 4"),
        ({"R": torch.ones(1, 2, 4, 4), "s": torch.ones(6, 2)}, "one factor an output"),
        ({"R": torch.ones(1, 2, 4, 4)}, "s is missing"),
    ],
)
def test_tensors_that_are_no_boft(tensors: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(BrokenAdapter, match=message):
        BOFT.check(update("boft", tensors))


@pytest.mark.parametrize(
    ("shape", "fits"),
    [((6, 8), True), ((6, 2, 2, 2), True), ((8, 6), False), ((6, 9), False), ((6,), False)],
)
def test_what_it_fits(shape: tuple[int, ...], fits: bool) -> None:
    one = update("boft", {"R": torch.ones(1, 2, 4, 4), "s": torch.ones(6, 1)})
    assert BOFT.fits(one, shape) is fits


def test_the_base_is_needed() -> None:
    one = update("boft", {"R": torch.ones(1, 2, 4, 4), "s": torch.ones(6, 1)})
    for act in (BOFT.change, BOFT.delta):
        with pytest.raises(CannotRepresent, match=r"(?s)mid.to_q.*--base-weights"):
            act(one)
    with pytest.raises(BrokenAdapter, match="another model"):
        BOFT.change(one, own_of(nn.Linear(9, 6)))
