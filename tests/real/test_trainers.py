"""What popular trainers write by default is read, judged sound and converted, tensor for tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import same, sound
from safetensors.torch import load_file
from trainers import (
    CLIP,
    DEFAULT,
    DOWN_UP,
    FLUX,
    QWEN,
    WAN,
    Tensors,
    ai_toolkit,
    clip,
    loha,
    lokr,
    pairs,
    some,
    write,
)

import adapterops as ao

UNET = {"down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": (640, 640)}
"""A module of SDXL's U-Net, of a size that SD 1 has, too."""
DEEP = {"mid_block.attentions.0.transformer_blocks.9.attn2.to_k": (1280, 2048)}
"""One that SDXL alone has."""


def as_peft(path: Path, folder: Path) -> tuple[Tensors, dict[str, Any]]:
    """The tensors and the config of the PEFT folder that the file is converted to."""
    ao.convert(path, "peft", folder)
    config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return load_file(folder / "adapter_model.safetensors"), config


@pytest.mark.parametrize(("rank", "alpha"), [(None, 1e10), (4, 2.0)])
def test_ai_toolkits_lokr(rank: int | None, alpha: float, tmp_path: Path) -> None:
    """`toolkit/network_mixins.py` (`get_state_dict`): peft's form of names keeps LoKr's tensors and alpha."""
    tensors = lokr(FLUX, "transformer.", 16, rank, alpha)
    path = ai_toolkit(tmp_path / "a.safetensors", tensors)
    found = ao.inspect(path)
    assert (found.dialect, found.architecture.value, found.modules) == ("diffusers-lycoris", "flux", len(FLUX))
    sound(path)
    got, config = as_peft(path, tmp_path / "peft")
    stored = {key: t for key, t in tensors.items() if not key.endswith(".alpha")}
    same(got, {key.replace("transformer.", "base_model.model.", 1): t for key, t in stored.items()})
    # Two whole factors have no rank, and readers no scale: ai-toolkit sets alpha to the rank then.
    assert config["alpha"] / config["r"] == (1.0 if rank is None else alpha / rank)
    ao.convert(path, "lycoris", tmp_path / "flat.safetensors")
    flat = load_file(tmp_path / "flat.safetensors")
    assert {key.rsplit(".", 1)[0] for key in flat} == {"lycoris_" + name.replace(".", "_") for name in FLUX}


def test_ai_toolkits_whole_differences(tmp_path: Path) -> None:
    """`toolkit/lora_special.py` (`FullModule`): with `all_layers`, norms are saved as differences beside the factors."""
    norm = "transformer_blocks.0.attn.norm_q"
    tensors = {**pairs(FLUX, "transformer."), f"transformer.{norm}.diff": some(128)}
    path = ai_toolkit(tmp_path / "a.safetensors", tensors)
    assert ao.inspect(path).dialect == "ai-toolkit"
    sound(path)
    ao.convert(path, "comfy", tmp_path / "comfy.safetensors")
    authors = {
        "transformer_blocks.0.attn.to_out.0": "double_blocks.0.img_attn.proj",
        "transformer_blocks.18.ff.net.0.proj": "double_blocks.18.img_mlp.0",
        "single_transformer_blocks.37.proj_out": "single_blocks.37.linear2",
        norm: "double_blocks.0.img_attn.norm.query_norm",
    }
    got = {key: t for key, t in load_file(tmp_path / "comfy.safetensors").items() if not key.endswith(".alpha")}
    wanted = {}
    for key, tensor in tensors.items():
        name = next(n for n in authors if key.startswith(f"transformer.{n}."))
        wanted[key.replace(f"transformer.{name}", f"diffusion_model.{authors[name]}")] = tensor
    same(got, wanted)


def test_ai_toolkits_dora(tmp_path: Path) -> None:
    """`toolkit/models/DoRA.py`: a flat magnitude per output, called `magnitude`."""
    tensors = pairs(FLUX, "transformer.")
    tensors |= {f"transformer.{name}.magnitude": some(rows).abs() + 1 for name, (rows, _) in FLUX.items()}
    path = ai_toolkit(tmp_path / "a.safetensors", tensors)
    sound(path)
    got, config = as_peft(path, tmp_path / "peft")
    assert config["use_dora"]
    renamed = {key.replace(".magnitude", ".lora_magnitude_vector"): t for key, t in tensors.items()}
    same(got, {key.replace("transformer.", "base_model.model.", 1): t for key, t in renamed.items()})


@pytest.mark.parametrize("prefix", ["lora_te1.", "lora_te."])
def test_ai_toolkits_text_encoders(prefix: str, tmp_path: Path) -> None:
    """`toolkit/lora_special.py` (`create_modules`): peft's form of names has Kohya's beginning for text encoders."""
    tensors = pairs(FLUX, "transformer.") | pairs(clip(prefix))
    path = ai_toolkit(tmp_path / "a.safetensors", tensors)
    found = ao.inspect(path)
    assert (found.dialect, found.architecture.value) == ("ai-toolkit", "flux")
    assert {c.name: dict(c.scales) for c in found.components} == {
        "text_encoder": {1.0: len(CLIP)},
        "transformer": {1.0: len(FLUX)},
    }
    sound(path)
    ao.convert(path, "diffusers", tmp_path / "b.safetensors")
    wanted = {key.replace(prefix, "text_encoder.", 1): t for key, t in tensors.items()}
    same(load_file(tmp_path / "b.safetensors"), wanted)


def test_the_plain_file_stays_diffusers(tmp_path: Path) -> None:
    """Without a difference or a magnitude nothing tells ai-toolkit's files from diffusers' own, and nothing need."""
    path = ai_toolkit(tmp_path / "a.safetensors", pairs(FLUX, "transformer."))
    assert ao.inspect(path).dialect == "diffusers"
    sound(path)


def test_a_backup_of_onetrainer(tmp_path: Path) -> None:
    """`modules/modelSaver/mixin/LoRASaverMixin.py` (`_save_internal`): dotted names, Kohya's tensors."""
    tensors = pairs(FLUX, "transformer.", DOWN_UP, 1.0) | pairs(clip("text_encoder."), "", DOWN_UP, 1.0)
    path = write(tmp_path / "lora.safetensors", tensors, ot_branch="master", ot_revision="x")
    found = ao.inspect(path)
    assert (found.architecture.value, found.modules) == ("flux", len(FLUX) + len(CLIP))
    sound(path)
    ao.convert(path, "onetrainer", tmp_path / "legacy.safetensors")
    wanted = {}
    for key, tensor in tensors.items():
        end = next(e for e in (*DOWN_UP, ".alpha") if key.endswith(e))
        stem = key.removesuffix(end).replace("text_encoder.", "te1.", 1).replace(".", "_")
        wanted[f"lora_{stem}{end}"] = tensor
    same(load_file(tmp_path / "legacy.safetensors"), wanted)


def test_onetrainers_loha_for_diffusers(tmp_path: Path) -> None:
    """`modules/util/convert_lora_util.py` (`convert_to_diffusers`): factors of other methods keep their alphas."""
    tensors = loha(FLUX, "transformer.", 1.0)
    path = write(tmp_path / "a.safetensors", tensors)
    sound(path)
    got, config = as_peft(path, tmp_path / "peft")
    assert (config["peft_type"], config["r"], config["alpha"]) == ("LOHA", 4, 1)
    stored = {key: t for key, t in tensors.items() if not key.endswith(".alpha")}
    same(got, {key.replace("transformer.", "base_model.model.", 1): t for key, t in stored.items()})


@pytest.mark.parametrize("ends", [DEFAULT, (".lora_A.weight", ".lora_B.weight")])
def test_diffsynths_qwen_image(ends: tuple[str, str], tmp_path: Path) -> None:
    """modelscope/DiffSynth-Studio `diffsynth/diffusion/training_module.py`: no component, alpha is the rank."""
    tensors = pairs(QWEN, "", ends)
    path = write(tmp_path / "a.safetensors", tensors)
    found = ao.inspect(path)
    assert (found.dialect, found.architecture.value) == ("diffsynth", "qwen_image")
    assert found.components[0].scales == {1.0: len(QWEN)}
    sound(path)
    got, config = as_peft(path, tmp_path / "peft")
    assert config["lora_alpha"] == config["r"]
    same(got, {f"base_model.model.{key.replace('.default', '')}": t for key, t in tensors.items()})


def test_diffsynths_wan(tmp_path: Path) -> None:
    """`diffsynth/utils/lora/wan.py`: the authors' names behind nothing, scale 1."""
    tensors = pairs(WAN, "", DEFAULT)
    path = write(tmp_path / "a.safetensors", tensors)
    found = ao.inspect(path)
    assert (found.dialect, found.components[0].scales) == ("diffsynth", {1.0: len(WAN)})
    ao.save(ao.load(path), tmp_path / "b.safetensors")
    same(load_file(tmp_path / "b.safetensors"), tensors)
    ao.convert(path, "diffusers", tmp_path / "c.safetensors")
    wanted = {
        "transformer."
        + key.replace("self_attn.q", "attn1.to_q").replace("ffn.2", "ffn.net.2").replace(".default", ""): t
        for key, t in tensors.items()
    }
    same(load_file(tmp_path / "c.safetensors"), wanted)


def test_bare_names_of_a_language_model_stay_pefts(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", pairs({"model.layers.0.self_attn.q_proj": (64, 64)}))
    assert ao.inspect(path).dialect == "peft"


def test_simpletuners_comfy_file(tmp_path: Path) -> None:
    """bghira/SimpleTuner `simpletuner/helpers/training/lora_format.py`: Comfy's prefix before diffusers' names."""
    tensors = pairs(FLUX, "diffusion_model.", alpha=4.0)
    path = write(tmp_path / "a.safetensors", tensors)
    assert ao.inspect(path).dialect == "comfy-diffusers"
    sound(path)
    ao.convert(path, "diffusers", tmp_path / "b.safetensors")
    same(load_file(tmp_path / "b.safetensors"), pairs(FLUX, "transformer."))
    ao.convert(path, "comfy-diffusers", tmp_path / "c.safetensors")
    same(load_file(tmp_path / "c.safetensors"), tensors)


def test_comfy_files_of_qwen_image_are_comfys(tmp_path: Path) -> None:
    """There the authors' names are diffusers' own."""
    path = ai_toolkit(tmp_path / "a.safetensors", pairs(QWEN, "diffusion_model."))
    assert ao.inspect(path).dialect == "comfy"


@pytest.mark.parametrize("header", [False, True])
def test_a_text_encoder_trained_on_transformers_5(header: bool, tmp_path: Path) -> None:
    """huggingface/diffusers `examples/dreambooth`: names are the installed class's, which lost `text_model.`.

    Source: huggingface/transformers 5 `models/clip/modeling_clip.py`; diffusers' `loaders/lora_base.py` takes either.
    """
    tensors = pairs(UNET | DEEP, "unet.") | pairs(clip("text_encoder.", ""))
    said = {}
    if header:
        fields = {"r": 4, "lora_alpha": 8, "target_modules": ["encoder.layers.0.self_attn.q_proj", "mlp.fc1"]}
        own = {"r": 4, "lora_alpha": 4, "target_modules": ["to_q", "to_k"]}
        both = {f"text_encoder.{k}": v for k, v in fields.items()} | {f"unet.{k}": v for k, v in own.items()}
        said = {"lora_adapter_metadata": json.dumps(both)}
    path = write(tmp_path / "a.safetensors", tensors, **said)
    found = ao.inspect(path)
    assert found.architecture.value == "sdxl"
    assert any("transformers 5" in note for note in found.notes)
    scales = {c.name: list(c.scales) for c in found.components}
    assert scales == {"unet": [1.0], "text_encoder": [2.0 if header else 1.0]}
    if not header:  # a scale in a header is told of: Comfy does not read it
        sound(path)
    ao.convert(path, "kohya", tmp_path / "k.safetensors")
    got = {key: t for key, t in load_file(tmp_path / "k.safetensors").items() if "_te1_" in key}
    wanted = pairs(clip(""), "lora_te1_", DOWN_UP, 8.0 if header else 4.0, flat=True)
    assert set(got) == set(wanted)
    assert all(torch.equal(got[key].to(t.dtype), t) for key, t in wanted.items())


def test_a_text_encoder_alone_keeps_its_classes_names(tmp_path: Path) -> None:
    tensors = pairs(clip("text_encoder.", ""))
    path = write(tmp_path / "a.safetensors", tensors)
    ao.convert(path, "diffusers", tmp_path / "b.safetensors")
    same(load_file(tmp_path / "b.safetensors"), tensors)


@pytest.mark.parametrize("name", ["diffusers-lycoris", "diffsynth", "comfy-diffusers"])
def test_new_dialects_write_what_they_read(name: str, tmp_path: Path) -> None:
    tensors = {
        "diffusers-lycoris": lambda: (
            pairs(FLUX, "transformer.", DOWN_UP, 2.0)
            | lokr({"transformer_blocks.1.attn.to_out.0": (3072, 3072)}, "transformer.", 16, 4, 2.0)
        ),
        "diffsynth": lambda: pairs(QWEN, "", DEFAULT),
        "comfy-diffusers": lambda: pairs(FLUX, "diffusion_model.", alpha=2.0),
    }[name]()
    path = write(tmp_path / "a.safetensors", tensors)
    assert ao.inspect(path).dialect == name
    ao.save(ao.load(path), tmp_path / "b.safetensors")
    same(load_file(tmp_path / "b.safetensors"), tensors)
