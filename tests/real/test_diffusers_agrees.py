"""diffusers' own conversion of trainers' files makes the same names and updates as ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from base_rows import Base
from checks import agrees
from image_bases import (
    ANIMA,
    ANIMAS_CONDITIONER,
    AURAFLOW,
    COGVIEW4,
    ERNIE,
    HIDREAM,
    IDEOGRAM,
    KLEIN_4B,
    KLEINS_QKV,
    KREA,
    KREAS_PROJECTOR,
    SANA,
    SANA_600M,
    Z_IMAGE,
    lumina_block,
)
from spellings import WRITERS
from trainers import Modules, Tensors, comfy, musubi, write
from video_bases import (
    AROUND_WAN,
    COGVIDEOX_1_5_I2V,
    COGVIDEOX_2B,
    HUNYUAN,
    HUNYUANS_BLOCKS,
    LTX_2,
    LTX_2_3,
    LTX_2B,
    MOCHI,
    WANS_BLOCK,
)

import adapterops as ao


class Case(NamedTuple):
    """A file, as what it is read, and which of diffusers' loaders takes it."""

    mixin: str
    dialect: str
    modules: Modules
    rtol: float = 0.05
    atol: float = 0.1

    @property
    def tensors(self) -> Tensors:
        """The file's tensors."""
        return WRITERS[self.dialect](self.modules)


def smaller(modules: Modules, than: int = 1 << 24) -> Modules:
    """Those with fewer numbers."""
    return {name: shape for name, shape in modules.items() if shape[0] * shape[1] < than}


def exact(mixin: str, dialect: str, modules: Modules) -> Case:
    """Where nothing is rounded by either."""
    return Case(mixin, dialect, modules, 1e-3, 1e-3)


KLEINS = {**KLEIN_4B.authors, **KLEINS_QKV}
FEW_OF_IDEOGRAM = {name: shape for name, shape in IDEOGRAM.authors.items() if ".w" not in name}
HUNYUANS = {**HUNYUANS_BLOCKS, **HUNYUAN.around}
CASES = [
    Case(
        "AnimaLoraLoaderMixin",
        "comfy",
        {**ANIMA.whole, **{f"llm_adapter.{name}": shape for name, shape in ANIMAS_CONDITIONER.items()}},
    ),
    Case("AuraFlowLoraLoaderMixin", "diffusers", smaller(AURAFLOW.diffusers, 3072 * 3072 + 1)),
    Case("ErnieImageLoraLoaderMixin", "comfy", smaller(ERNIE.authors, (1 << 24) + 1)),
    Case("HiDreamImageLoraLoaderMixin", "comfy", smaller(HIDREAM.authors)),
    # It knows the linear layers of blocks alone.
    Case("Ideogram4LoraLoaderMixin", "comfy", FEW_OF_IDEOGRAM),
    Case("Ideogram4LoraLoaderMixin", "comfy-down", {n: s for n, s in FEW_OF_IDEOGRAM.items() if ".o" in n}),
    Case("Krea2LoraLoaderMixin", "comfy", smaller({**KREA.whole, **KREAS_PROJECTOR})),
    Case("Lumina2LoraLoaderMixin", "comfy", lumina_block("layers.0")),
    Case("WanLoraLoaderMixin", "comfy", {**WANS_BLOCK, **AROUND_WAN}),
    Case("WanLoraLoaderMixin", "comfy-down", WANS_BLOCK),
    Case("WanLoraLoaderMixin", "kohya", WANS_BLOCK),
    Case("ZImageLoraLoaderMixin", "comfy-diffusers", Z_IMAGE.diffusers),
    Case("ZImageLoraLoaderMixin", "kohya-diffusers", {n: s for n, s in Z_IMAGE.diffusers.items() if "out" not in n}),
    Case("ZImageLoraLoaderMixin", "kohya", {"layers.0.attention.qkv": (11520, 3840)}),
    Case("Flux2LoraLoaderMixin", "comfy", {**KLEINS, **KLEIN_4B.around}),
    # Of the modules around the blocks it knows some by Kohya's names; musubi-tuner trains none of them.
    Case("Flux2LoraLoaderMixin", "kohya", KLEINS),
    Case("Flux2LoraLoaderMixin", "bfl-peft", KLEINS),
    Case("Flux2LoraLoaderMixin", "comfy-diffusers", KLEIN_4B.diffusers),
    exact("LTX2LoraLoaderMixin", "comfy", LTX_2_3.whole),
    exact("LTX2LoraLoaderMixin", "comfy", LTX_2.whole),
    # It puts its prefix in Comfy's place and renames nothing, which is right for the blocks.
    exact("LTXVideoLoraLoaderMixin", "comfy", LTX_2B.authors),
    exact("LTXVideoLoraLoaderMixin", "diffusers", LTX_2B.authors),
    exact("HunyuanVideoLoraLoaderMixin", "comfy", HUNYUANS),
    exact("HunyuanVideoLoraLoaderMixin", "diffusion-pipe", HUNYUANS),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.mixin.removesuffix('LoraLoaderMixin')}-{case.dialect}")
def test_diffusers_converts_it_as_we_do(case: Case, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", case.tensors)
    assert ao.inspect(path).dialect == case.dialect
    agrees(case.mixin, path, tmp_path, case.rtol, case.atol)


MIXINS = {
    "CogVideoXLoraLoaderMixin": (COGVIDEOX_2B, COGVIDEOX_1_5_I2V),
    "CogView4LoraLoaderMixin": (COGVIEW4,),
    "Mochi1LoraLoaderMixin": (MOCHI,),
    "SanaLoraLoaderMixin": (SANA, SANA_600M),
}


@pytest.mark.parametrize("writer", [comfy, musubi])
@pytest.mark.parametrize(
    ("mixin", "base"), [(m, b) for m, bases in MIXINS.items() for b in bases], ids=lambda v: getattr(v, "name", "")
)
def test_diffusers_takes_what_we_write(
    mixin: str, base: Base, writer: Callable[[Modules], Tensors], tmp_path: Path
) -> None:
    """Where it has no conversion: what came from the authors' names, as its loader reads it."""
    path = write(tmp_path / "a.safetensors", writer(base.authors or base.diffusers))
    ao.convert(path, "diffusers", tmp_path / "b.safetensors", arch=base.name, fold_alpha=True)
    agrees(mixin, tmp_path / "b.safetensors", tmp_path)
