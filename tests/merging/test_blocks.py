"""Blocks of base models, held to diffusers' own modules and to a second statement of sd-scripts' rules."""

from __future__ import annotations

import functools
import json
import re

import pytest
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel

from adapterops.architectures import Architecture, from_config, load
from adapterops.errors import UsageError
from adapterops.merging import blocks

_UNETS: dict[str, dict[str, object]] = {
    "sd1": {"cross_attention_dim": 768},
    "sd2": {"cross_attention_dim": 1024, "use_linear_projection": True, "attention_head_dim": (5, 10, 20, 20)},
    "sdxl": {
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
# As the lists stand in sd-scripts' networks/svd_merge_lora.py (LAYER17, LAYER26, LAYER12, LAYER20).
_LISTS = {
    ("sd1", 17): "BASE IN01 IN02 IN04 IN05 IN07 IN08 MID OUT03 OUT04 OUT05 OUT06 OUT07 OUT08 OUT09 OUT10 OUT11",
    ("sd1", 26): "BASE IN00 IN01 IN02 IN03 IN04 IN05 IN06 IN07 IN08 IN09 IN10 IN11 MID "
    "OUT00 OUT01 OUT02 OUT03 OUT04 OUT05 OUT06 OUT07 OUT08 OUT09 OUT10 OUT11",
    ("sdxl", 12): "BASE IN04 IN05 IN07 IN08 MID OUT00 OUT01 OUT02 OUT03 OUT04 OUT05",
    ("sdxl", 20): "BASE IN00 IN01 IN02 IN03 IN04 IN05 IN06 IN07 IN08 MID "
    "OUT00 OUT01 OUT02 OUT03 OUT04 OUT05 OUT06 OUT07 OUT08",
}


@functools.cache
def modules(name: str) -> tuple[str, ...]:
    """The parameter-owning modules of diffusers' own model."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True) if name == "flux" else UNet2DConditionModel(**_UNETS[name])
    return tuple(sorted({key.rpartition(".")[0] for key, _ in model.named_parameters()}))


def by_position(name: str, module: str) -> str | None:
    """The block by arithmetic on diffusers' name: every down and up block of the UNet has three slots."""
    slots = {"resnets": 0, "attentions": 0, "downsamplers": 2, "upsamplers": 2}
    if found := re.match(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)", module):
        side, block, kind, item = found.groups()
        position = 3 * int(block) + slots[kind] + int(item)
        return f"IN{position + 1:02d}" if side == "down" else f"OUT{position:02d}"
    if module.startswith("mid_block."):
        return "MID"
    if module == "conv_in" or (name == "sdxl" and module.startswith(("time_embedding.", "add_embedding."))):
        return "IN00"
    return None


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_every_module_of_a_unet_is_in_the_block_of_its_position(name: str) -> None:
    architecture = load(name)
    found = {module: blocks.block("unet", module, architecture, "w") for module in modules(name)}
    assert found == {module: by_position(name, module) for module in modules(name)}
    outside = {module for module, block in found.items() if block is None}
    time = set() if name == "sdxl" else {"time_embedding.linear_1", "time_embedding.linear_2"}
    assert outside == {"conv_norm_out", "conv_out"} | time


@pytest.mark.parametrize(("name", "count"), _LISTS)
def test_lists_are_those_of_sd_scripts(name: str, count: int) -> None:
    table = blocks.table(load(name), "w")
    assert table.preset(count, "w") == tuple(_LISTS[name, count].split())
    assert len(_LISTS[name, count].split()) == count


@pytest.mark.parametrize(("name", "count"), [("sd1", 17), ("sd2", 17), ("sdxl", 12)])
def test_the_short_lists_have_every_attention(name: str, count: int) -> None:
    architecture = load(name)
    preset = blocks.table(architecture, "w").preset(count, "w")
    attention = {blocks.block("unet", m, architecture, "w") for m in modules(name) if ".attentions." in m}
    assert attention == set(preset) - {"BASE"}


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl", "flux"])
def test_text_encoders_are_the_base(name: str) -> None:
    architecture = load(name)
    encoders = [component for component in architecture.components if component.startswith("text_encoder")]
    assert encoders
    for component in encoders:
        for module in architecture.components[component].modules:
            assert blocks.block(component, module, architecture, "w") == "BASE"


def test_flux_modules_are_in_the_block_of_their_number() -> None:
    architecture = load("flux")
    for module in modules("flux"):
        found = re.match(r"(single_)?transformer_blocks\.(\d+)\.", module)
        kind = "single" if found and found[1] else "double"
        expected = f"{kind}.{int(found[2]):02d}" if found else "BASE"
        assert blocks.block("transformer", module, architecture, "w") == expected, module
    table = blocks.table(architecture, "w")
    assert (table.stack("double", architecture, "w"), table.stack("single", architecture, "w")) == (19, 38)


def test_a_fused_module_and_its_parts_are_in_one_block() -> None:
    architecture = load("flux")
    transformer = architecture.components["transformer"]
    assert len(transformer.fused) == 19 * 2 + 38 * 2 + 1
    for name, spec in transformer.fused.items():
        parts = {blocks.block("transformer", part, architecture, "w") for part, _, _ in spec.joins}
        assert parts == {blocks.block("transformer", name, architecture, "w")}


def test_what_the_root_owns_is_in_no_block() -> None:
    assert blocks.block("unet", "", load("sd1"), "w") is None
    assert blocks.block("transformer", "", load("flux"), "w") == "BASE"


def test_a_model_from_a_config_has_the_blocks_that_it_has(tmp_path_factory: pytest.TempPathFactory) -> None:
    config = {
        "_class_name": "FluxTransformer2DModel", "num_layers": 2, "num_single_layers": 3, "num_attention_heads": 2,
        "attention_head_dim": 16, "joint_attention_dim": 32, "pooled_projection_dim": 32, "guidance_embeds": True,
        "in_channels": 4, "axes_dims_rope": [4, 4, 8],
    }  # fmt: skip
    path = tmp_path_factory.mktemp("flux") / "config.json"
    path.write_text(json.dumps(config))
    architecture = from_config(path)
    table = blocks.table(architecture, "w")
    assert (table.stack("double", architecture, "w"), table.stack("single", architecture, "w")) == (2, 3)
    assert blocks.block("transformer", "transformer_blocks.1.attn.to_q", architecture, "w") == "double.01"


@pytest.mark.parametrize(
    ("name", "count", "fits"),
    [
        ("sd1", 12, "17 values (BASE IN01-02 IN04-05 IN07-08 MID OUT03-11) or 26 values (BASE IN00-11 MID OUT00-11)"),
        ("sdxl", 17, "12 values (BASE IN04-05 IN07-08 MID OUT00-05) or 20 values (BASE IN00-08 MID OUT00-08)"),
        ("flux", 19, "it takes double, single and base"),
    ],
)
def test_a_list_of_another_length_is_refused(name: str, count: int, fits: str) -> None:
    with pytest.raises(UsageError, match=r"w\.yaml: entry 1: \d+ values fit no list") as caught:
        blocks.table(load(name), "w").preset(count, "w.yaml: entry 1")
    assert fits in str(caught.value)


def test_blocks_that_a_model_does_not_have_are_refused() -> None:
    sdxl = load("sdxl")
    with pytest.raises(UsageError, match=r"sdxl has no double blocks; it takes blocks with 12 values .* or 20 values"):
        blocks.table(sdxl, "w").stack("double", sdxl, "w")


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        (None, r"w: .*base model, which is not known here.*--arch NAME or --base CONFIG"),
        (load("sd3"), r"w: no blocks are known for sd3, only for sd1, sd2, sdxl, flux; .*patterns"),
    ],
)
def test_a_model_without_known_blocks_is_refused(architecture: Architecture | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        blocks.table(architecture, "w")


def test_a_module_that_the_model_does_not_have_is_refused() -> None:
    with pytest.raises(UsageError, match=r"w: unet has no module 'down_blocks\.9\.x'.*pattern"):
        blocks.block("unet", "down_blocks.9.x", load("sd1"), "w")
    with pytest.raises(UsageError, match=r"w: sd1 has no blocks in prior; .*pattern"):
        blocks.block("prior", "x", load("sd1"), "w")
