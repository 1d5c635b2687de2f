"""Variants of Stable Diffusion: other first layers, and Kolors' words; told by what only they have, or by what a header says."""

from __future__ import annotations

from pathlib import Path

import pytest
from checks import comes_back, same, sound
from safetensors.torch import load_file
from trainers import DOWN_UP, Modules, Tensors, number, pairs, some, write

import adapterops as ao
from adapterops.adapter import Certainty
from adapterops.architectures import load, names
from adapterops.errors import AdapterOpsError, UsageError

VARIANTS = [name for name in names() if load(name).variant]
INPUTS = {
    "sd1_inpainting": 9,
    "sd1_instruct_pix2pix": 8,
    "sd2_inpainting": 9,
    "sd2_depth": 5,
    "sdxl_inpainting": 9,
}
"""How many the first layer has."""
HEADERS = {
    "sd1_inpainting": "stable-diffusion-v1-inpainting/lora",
    "sd2_inpainting": "stable-diffusion-v2-inpainting/lora",
    "sd2_depth": "stable-diffusion-v2-depth/lora",
    "sdxl_inpainting": "stable-diffusion-xl-v1-base-inpainting/lora",
    "kolors": "kolors-1.0/lora",
}
"""Nerogar/OneTrainer `resources/sd_model_spec/*-lora.json`, bghira/SimpleTuner."""


def attention(name: str) -> Modules:
    """Of the first block with attention."""
    modules = load(name).components["unet"].modules
    begin = "down_blocks.1.attentions.0.transformer_blocks.0.attn"
    found = {own: spec.shape for own, spec in modules.items() if own.startswith(begin) and len(spec.shape) == 2}
    return {own: (shape[0], shape[1]) for own, shape in found.items()}


def first(inputs: int, prefix: str, ends: tuple[str, str], alpha: float | None = None) -> Tensors:
    """A LoRA of the first layer, which is a convolution."""
    out = {prefix + ends[0]: some(4, inputs, 3, 3), prefix + ends[1]: some(320, 4, 1, 1)}
    return out | ({f"{prefix}.alpha": number(alpha)} if alpha is not None else {})


AB = (".lora_A.weight", ".lora_B.weight")
MOTION: Modules = {
    "down_blocks.0.motion_modules.0.transformer_blocks.0.attn1.to_q": (320, 320),
    "mid_block.motion_modules.0.transformer_blocks.0.attn2.to_out.0": (1280, 1280),
    "up_blocks.3.motion_modules.2.transformer_blocks.0.attn2.to_v": (320, 320),
}


def own(name: str) -> Tensors:
    """What only the variant has, as diffusers spells it."""
    if name in INPUTS:
        return first(INPUTS[name], "unet.conv_in", AB)
    if name == "animatediff":
        return pairs(MOTION, "unet.")
    return pairs({"encoder_hid_proj": (2048, 4096), "add_embedding.linear_1": (1280, 5632)}, "unet.")


@pytest.mark.parametrize("name", VARIANTS)
def test_what_only_it_has_tells_a_variant(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", pairs(attention(name), "unet.") | own(name))
    found = ao.inspect(path)
    assert (found.architecture.value, found.architecture.certainty) == (name, Certainty.DERIVED)
    assert (found.architecture.others, found.notes) == ((), ())
    sound(path)
    comes_back(path, "diffusers", tmp_path, ("kohya", "kohya-diffusers", "diffusers-lycoris", "peft"))


@pytest.mark.parametrize("name", INPUTS)
def test_kohyas_spelling(name: str, tmp_path: Path) -> None:
    """Nerogar/OneTrainer, all layers; sd-scripts calls the first layer of SDXL as its authors do."""
    sdxl = load(name).family == "sdxl"
    begin = "lora_unet_input_blocks_0_0" if sdxl else "lora_unet_conv_in"
    modules = load(name).components["unet"].modules
    spelled = {(modules[m].original if sdxl else m): shape for m, shape in attention(name).items()}
    tensors = pairs(spelled, "lora_unet_", DOWN_UP, 2.0, flat=True) | first(INPUTS[name], begin, DOWN_UP, 2.0)
    path = write(tmp_path / "a.safetensors", tensors)
    assert ao.inspect(path).architecture.value == name
    ao.convert(path, "diffusers", tmp_path / "b.safetensors")
    ao.convert(tmp_path / "b.safetensors", "kohya", tmp_path / "back.safetensors")
    same(load_file(tmp_path / "back.safetensors"), tensors)


@pytest.mark.parametrize("name", VARIANTS)
def test_without_that_a_file_is_the_base_s(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", pairs(attention(name), "unet."))
    found = ao.inspect(path)
    assert (found.architecture.value, found.architecture.certainty) == (load(name).family, Certainty.DERIVED)
    assert (found.architecture.others, found.notes) == ((), ())


@pytest.mark.parametrize(("name", "said"), HEADERS.items())
def test_unless_its_header_calls_it_so(name: str, said: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", pairs(attention(name), "unet."), **{"modelspec.architecture": said})
    found = ao.inspect(path)
    assert (found.architecture.value, found.architecture.certainty) == (name, Certainty.READ)
    assert found.notes == ()
    # What is not the variant's own is not made its own by a header.
    odd = write(tmp_path / "b.safetensors", pairs({"conv_out": (4, 320)}, "unet."), **{"modelspec.architecture": said})
    assert ao.inspect(odd).architecture.value != name


PROCESSOR = (".down.weight", ".up.weight")


def processors(modules: Modules) -> Tensors:
    """Attention processors' layers, whose names end otherwise."""
    out: dict[str, tuple[int, int]] = {}
    for name, shape in modules.items():
        stem, _, end = name.replace("to_out.0", "to_out").rpartition(".")
        out[f"{stem}.processor.{end}_lora"] = shape
    return pairs(out, "", PROCESSOR)


AUTHORS = (
    (".transformer_blocks", ".temporal_transformer.transformer_blocks"),
    (".attn1", ".attention_blocks.0"),
    (".attn2", ".attention_blocks.1"),
)
"""huggingface/diffusers `scripts/convert_animatediff_motion_lora_to_diffusers.py` (`convert_motion_module`), turned round."""


def test_motion_loras(tmp_path: Path) -> None:
    """guoyww/AnimateDiff's, and what diffusers' script makes of them, which stands at guoyww/animatediff-motion-lora-zoom-in."""
    renamed = processors(MOTION)
    made = write(tmp_path / "b.safetensors", {f"unet.{key}": value for key, value in renamed.items()})
    for old, new in AUTHORS:
        renamed = {key.replace(old, new): value for key, value in renamed.items()}
    theirs = write(tmp_path / "a.safetensors", renamed)
    for path, dialect in ((theirs, "animatediff"), (made, "diffusers-attn")):
        found = ao.inspect(path)
        assert (found.dialect, found.architecture.value, found.notes) == (dialect, "animatediff", ())
        (tmp_path / dialect).mkdir()
        comes_back(path, dialect, tmp_path / dialect, ("diffusers", "diffusers-lora", "peft", "kohya-diffusers"))
    ao.convert(theirs, "diffusers-attn", tmp_path / "c.safetensors")
    same(load_file(tmp_path / "c.safetensors"), load_file(made))
    checked = ao.validate(tmp_path / "c.safetensors", targets=["diffusers"], load_test=True, select=["L"])
    assert [finding.rule.code for finding in checked] == []


@pytest.mark.parametrize("name", ["sd1_inpainting", "sdxl_inpainting", "kolors", "animatediff"])
def test_diffusers_loads_it_into_its_own_model(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", pairs(attention(name), "unet.") | own(name))
    checked = ao.validate(path, targets=["diffusers"], load_test=True, select=["L"])
    assert [finding.rule.code for finding in checked] == []


def test_a_variant_is_merged_with_its_base(tmp_path: Path) -> None:
    """The result is the variant's, whichever comes first; but not where the first layers differ."""
    base = write(tmp_path / "a.safetensors", pairs(attention("sd1"), "unet."))
    variant = write(tmp_path / "b.safetensors", pairs(attention("sd1"), "unet.") | own("sd1_inpainting"))
    for number_, sources in enumerate(([base, variant], [variant, base])):
        out = tmp_path / f"{number_}.safetensors"
        ao.merge(sources, method="cat", output=out)
        assert ao.inspect(out).architecture.value == "sd1_inpainting"
        assert load_file(out)["unet.conv_in.lora_A.weight"].shape[1] == 9
    plain = write(tmp_path / "c.safetensors", pairs(attention("sd1"), "unet.") | first(4, "unet.conv_in", AB))
    with pytest.raises(UsageError, match="different base models"):
        ao.merge([plain, variant], method="cat", output=tmp_path / "d.safetensors")


@pytest.mark.parametrize("inputs", [3, 6, 12])
def test_other_first_layers_are_refused(inputs: int, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", pairs(attention("sd1"), "unet.") | first(inputs, "unet.conv_in", AB))
    with pytest.raises(AdapterOpsError, match="conv_in"):
        ao.load(path)


def test_the_tables_differ_in_their_own_numbers_only() -> None:
    for name, inputs in INPUTS.items():
        own_, theirs = load(name).components["unet"], load(load(name).family).components["unet"]
        assert own_.modules["conv_in"].shape == (320, inputs, 3, 3)
        differing = [m for m, spec in own_.modules.items() if spec != theirs.modules[m]]
        assert (differing, own_.modules.keys()) == (["conv_in"], theirs.modules.keys())
        assert {**own_.config, "in_channels": 4} == dict(theirs.config)
