"""What the rules say of rotations in ComfyUI, by its own arithmetic beside LyCORIS' modules."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from torch import Tensor, nn

logging.getLogger("LyCORIS").setLevel(logging.ERROR)


def turned_by_comfy(weight: Tensor, blocks: Tensor, rescale: Tensor | None, alpha: float | None) -> Tensor | None:
    """W' of Comfy-Org/ComfyUI `comfy/weight_adapter/oft.py` or `boft.py` (`calculate_weight`) at strength 1.

    None where its code raises, which it logs.
    """
    staged = blocks.dim() == 4
    bound = alpha if staged else alpha or 0
    skew = blocks - blocks.transpose(-1, -2)
    try:
        if bound > 0:  # type: ignore[operator]
            norm = skew.norm() + 1e-8
            skew = skew * bound / norm if norm > bound else skew  # type: ignore[operator]
    except TypeError:
        return None
    eye = torch.eye(blocks.shape[-1])
    turn = (eye + skew) @ (eye - skew).inverse()
    if not staged:
        rows = weight.reshape(len(turn), turn.shape[1], -1)
        return torch.einsum("knm,knp->kmp", turn, rows).reshape(weight.shape)
    made, size = weight, blocks.shape[-1]
    for stage, own in enumerate(turn):
        step = 2**stage * (size // 2)
        mixed = made.unflatten(0, (-1, 2, step)).transpose(1, 2).flatten(0, 2).unflatten(0, (-1, size))
        back = torch.einsum("bij,bj...->bi...", own, mixed).flatten(0, 1)
        made = back.unflatten(0, (-1, step, 2)).transpose(1, 2).flatten(0, 2)
    return made if rescale is None else made * rescale


def both(kind: Any, **options: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What LyCORIS adds to a weight, what ComfyUI adds of its file, and what it adds of the file without an alpha."""
    layer = nn.Linear(24, 32)
    module = kind("x", layer, 1.0, lora_dim=4, **options)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in module.named_parameters():
        if "oft_blocks" in name or "rescale" in name:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    state = {key: value.detach() for key, value in module.state_dict().items()}
    weight = layer.weight.detach()
    found = [
        turned_by_comfy(weight, state["oft_blocks"], state.get("rescale"), alpha)
        for alpha in (float(state["alpha"]), None)
    ]
    one, two = (None if made is None else made - weight for made in found)
    return module.get_diff_weight(1)[0].detach(), one, two


def off(wanted: Tensor, made: Tensor | None) -> float:
    assert made is not None
    return float((made - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("kind", [DiagOFTModule, ButterflyOFTModule])
def test_without_a_bound_it_turns_as_lycoris_does(kind: Any) -> None:
    wanted, made, _ = both(kind)
    assert off(wanted, made) < 1e-5


@pytest.mark.parametrize("kind", [DiagOFTModule, ButterflyOFTModule])
def test_its_bound_is_another(kind: Any) -> None:
    """L540: of a module of 32 outputs next to nothing is left."""
    wanted, made, _ = both(kind, constraint=0.02)
    assert off(wanted, made) > 0.9


def test_it_multiplies_a_boft_and_not_an_oft() -> None:
    """L541."""
    wanted, made, _ = both(ButterflyOFTModule, rescaled=True)
    assert off(wanted, made) < 1e-5
    wanted, made, _ = both(DiagOFTModule, rescaled=True)
    assert off(wanted, made) > 0.1


def test_a_boft_needs_an_alpha() -> None:
    """L542."""
    assert both(ButterflyOFTModule)[2] is None
    wanted, _, made = both(DiagOFTModule)
    assert off(wanted, made) < 1e-5
