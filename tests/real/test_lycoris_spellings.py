"""LoKr and LoHa of each base model, as trainers for Comfy and for diffusers write them, come back from everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
from base_rows import Base
from checks import comes_back, sound
from image_bases import (
    ANIMA,
    AURAFLOW,
    COGVIEW4,
    ERNIE,
    HIDREAM,
    IDEOGRAM,
    KLEIN_4B,
    KREA,
    LUMINA,
    PIXART,
    SANA,
    SANA_600M,
)
from trainers import Modules, loha, lokr, write
from video_bases import (
    COGVIDEOX_1_5_I2V,
    COGVIDEOX_2B,
    HUNYUAN,
    HUNYUANS_AND_KANDINSKYS,
    LTX_2_3,
    MOCHI,
    WAN_1_3B,
)

import adapterops as ao
from adapterops.errors import CannotRepresent

FROM_COMFY = ("kohya", "lycoris", "diffusers-lycoris", "peft")
FROM_DIFFUSERS = ("comfy", "kohya", "lycoris", "peft")


class Case(NamedTuple):
    """Modules of a base, and the ways that they come back."""

    base: Base
    modules: Modules
    ways: tuple[str, ...]
    factor: int = 8
    dialect: str = "comfy"

    @property
    def prefix(self) -> str:
        """What stands before the names."""
        return "diffusion_model." if self.dialect == "comfy" else "transformer."


def unfused(base: Base) -> Case:
    """Of what is no part of a fused module, where a Kronecker product could not be taken apart."""
    halves = ("norm_out.linear", "ff_context.net.0.proj")
    own = {n: s for n, s in base.diffusers.items() if len(base.rows.get(n, ("",))) == 1 and not n.endswith(halves)}
    return Case(base, own, FROM_DIFFUSERS, dialect="diffusers-lycoris")


CASES = [
    *(Case(base, base.authors, FROM_COMFY) for base in (ANIMA, ERNIE, HIDREAM, KREA, LTX_2_3)),
    *(Case(base, base.authors, FROM_COMFY, 16) for base in (WAN_1_3B, KLEIN_4B)),
    Case(HUNYUAN, HUNYUAN.authors, ("kohya", "diffusion-pipe", "comfy-hunyuan"), 16),
    *(Case(base, base.authors, ("kohya",), 16) for base in HUNYUANS_AND_KANDINSKYS),
    *map(unfused, (AURAFLOW, COGVIDEOX_2B, COGVIDEOX_1_5_I2V, COGVIEW4, MOCHI, SANA, SANA_600M, PIXART)),
]


@pytest.mark.parametrize("method", ["lokr", "loha"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.base.name)
def test_it_comes_back(case: Case, method: str, tmp_path: Path) -> None:
    """ostris/ai-toolkit `toolkit/lora_special.py`, `toolkit/network_mixins.py`; Nerogar/OneTrainer."""
    own, prefix = case.modules, case.prefix
    made = lokr(own, prefix, case.factor, 4, 2.0) if method == "lokr" else loha(own, prefix, 1.0)
    path = write(tmp_path / "a.safetensors", made)
    found = ao.inspect(path)
    assert (found.dialect, found.architecture.value) == (case.dialect, case.base.name)
    sound(path)
    comes_back(path, case.dialect, tmp_path, case.ways)


@pytest.mark.parametrize("base", [IDEOGRAM, LUMINA], ids=lambda base: base.name)
def test_lokr_on_a_fused_projection_stays_there(base: Base, tmp_path: Path) -> None:
    """Eight blocks of rows do not end with its parts."""
    path = write(tmp_path / "a.safetensors", lokr(base.authors, "diffusion_model.", 8, 4, 2.0))
    assert ao.inspect(path).architecture.value == base.name
    comes_back(path, "comfy", tmp_path, ("kohya",))
    with pytest.raises(CannotRepresent, match="cannot be cut inside a block"):
        ao.convert(path, "diffusers-lycoris", tmp_path / "b.safetensors")


@pytest.mark.parametrize("base", [IDEOGRAM, LUMINA], ids=lambda base: base.name)
def test_loha_on_a_fused_projection_comes_back(base: Base, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", loha(base.authors, "diffusion_model.", 1.0))
    assert ao.inspect(path).architecture.value == base.name
    comes_back(path, "comfy", tmp_path, FROM_COMFY)
