"""DyLoRA saves plain LoRA: its files are read as every reader reads them, at alpha / rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lycoris.modules.dylora import DyLoraModule
from lycoris.modules.locon import LoConModule
from method_updates import randomise, update
from torch import nn

from adapterops.methods.lora import Lora

ROLES = {"lora_down.weight": "A", "lora_up.weight": "B"}


@pytest.mark.parametrize("base", [nn.Linear(20, 12), nn.Conv2d(10, 12, 3), nn.Conv2d(10, 12, 1)])
def test_files_of_dylora_rebuild(base: Any) -> None:
    module = DyLoraModule("x", base, lora_dim=6, alpha=3, block_size=2)
    randomise(module)
    state = dict(module.state_dict())
    alpha = state.pop("alpha")
    one = update("lora", {ROLES[key]: t for key, t in state.items()}, float(alpha))
    Lora().check(one)
    assert Lora().fits(one, tuple(base.weight.shape))
    delta = Lora().delta(one)
    # It trains all three blocks at alpha / 3, the number of blocks; as a file, alpha / 6 is what counts.
    trained, _ = module.get_diff_weight(rank=4)
    torch.testing.assert_close(delta * 2, trained.detach().float(), rtol=1e-6, atol=1e-6)


def test_lycoris_itself_reads_them_as_lora() -> None:
    base = nn.Linear(20, 12)
    module = DyLoraModule("x", base, lora_dim=6, alpha=3, block_size=2)
    randomise(module)
    state = module.state_dict()
    up, down, alpha = (state[key] for key in ("lora_up.weight", "lora_down.weight", "alpha"))
    with torch.no_grad():
        rebuilt = LoConModule.make_module_from_state_dict("x", base, up, down, None, alpha, None)
        wanted, _ = rebuilt.get_diff_weight()
    one = update("lora", {"A": down, "B": up}, float(alpha))
    torch.testing.assert_close(Lora().delta(one), wanted, rtol=1e-5, atol=1e-6)
