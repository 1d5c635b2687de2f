"""Adapters of NewBie image, whose blocks are Lumina-Image 2.0's by its authors' names, and ten more of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checks import comes_back, same, sound
from image_bases import LUMINA, LUMINAS_BLOCKS, lumina_block
from safetensors.torch import load_file, save_file
from trainers import DOWN_UP, Modules, Tensors, comfy, lokr, musubi, pairs, some, write

import adapterops as ao
from adapterops.adapter import Certainty
from adapterops.architectures import Component, load
from adapterops.architectures.declared import named

LAYERS = 36
TARGETS = ("attention.qkv", "attention.out", "feed_forward.w2")
AROUND: Modules = {"time_text_embed.1": (1024, 2048), "clip_text_pooled_proj.1": (1024, 1024)}


def trained() -> Modules:
    """What the authors' trainer changes by default: NewBieAI-Lab/NewbieLoraTrainer `lora.toml`."""
    stems = [f"layers.{n}" for n in range(LAYERS)] + [
        f"{part}_refiner.{n}" for part in ("noise", "context") for n in (0, 1)
    ]
    every = {name: shape for stem in stems for name, shape in lumina_block(stem).items()}
    return {name: shape for name, shape in every.items() if name.endswith(TARGETS)} | dict(AROUND)


FILES: dict[str, Tensors] = {
    "comfy": comfy(trained()),
    "comfy-down": pairs(trained(), "diffusion_model.", DOWN_UP, 2.0),
    "kohya": musubi(trained()),
    "lycoris": pairs(trained(), "lycoris_", DOWN_UP, 1.0, flat=True),
    "diffusers": pairs(trained(), "transformer."),
    "diffsynth": pairs(trained()),
}
"""Every beginning that ComfyUI, and NewBie's own node for it, take."""
ELSEWHERE = ("comfy", "kohya", "lycoris", "peft", "diffusers")


@pytest.mark.parametrize("dialect", FILES)
def test_files_come_back(dialect: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", FILES[dialect])
    found = ao.inspect(path)
    assert (found.dialect, found.architecture.value, found.architecture.others) == (dialect, "newbie", ())
    assert found.architecture.certainty is Certainty.DERIVED
    sound(path)
    comes_back(path, dialect, tmp_path, ELSEWHERE)


def test_the_trainers_lora_is_a_peft_folder(tmp_path: Path) -> None:
    """`train_newbie_lora.py`, `save_lora_model`: peft's `save_pretrained`."""
    folder = tmp_path / "lora"
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 2, "target_modules": [*TARGETS, *AROUND], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(pairs(trained(), "base_model.model."), folder / "adapter_model.safetensors", {"format": "pt"})
    assert ao.inspect(folder).architecture.value == "newbie"
    ao.convert(folder, "comfy", tmp_path / "a.safetensors")
    made = load_file(tmp_path / "a.safetensors")
    assert made["diffusion_model.clip_text_pooled_proj.1.alpha"].item() == 2
    factors = {key: tensor for key, tensor in made.items() if not key.endswith(".alpha")}
    same(factors, comfy(trained()))


def lokr_folder(folder: Path) -> Path:
    """`train_newbie_lora.py`, `save_lora_model`, as `lokr.toml` has it: LyCORIS' file by peft's name, with a config."""
    folder.mkdir()
    config = {"adapter_type": "lyco_lokr", "peft_type": "LYCORIS", "lycoris_type": "lokr"}
    config |= {"r": 114514, "network_dim": 114514, "lora_alpha": 114514.0, "network_alpha": 114514.0}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    flat = {name.replace(".", "_"): shape for name, shape in trained().items()}
    tensors = lokr(flat, "lycoris_", 8, None, 114514.0)
    for n in range(LAYERS):
        tensors[f"lycoris_layers_{n}_attention_norm1.w_norm"] = some(2304, of="attention_norm1")
        tensors[f"lycoris_layers_{n}_attention_q_norm.w_norm"] = some(96, of="q_norm")
    header = {"adapter_type": "lyco_lokr", "lora_rank": "114514", "lora_alpha": "114514"}
    save_file(tensors, folder / "adapter_model.safetensors", header)
    return folder


def test_the_trainers_lokr_is_lycoris_file(tmp_path: Path) -> None:
    folder = lokr_folder(tmp_path / "lokr")
    found = ao.inspect(folder)
    assert (found.dialect, found.architecture.value) == ("lycoris", "newbie")
    adapter = ao.load(folder)
    assert {u.method for u in adapter} == {"lokr", "diff"}
    ao.convert(folder, "kohya", tmp_path / "a.safetensors")
    before, made = (load_file(p) for p in (folder / "adapter_model.safetensors", tmp_path / "a.safetensors"))
    same(made, {key.replace("lycoris_", "lora_unet_"): tensor for key, tensor in before.items()})


def test_another_file_with_that_config_is_refused(tmp_path: Path) -> None:
    """What a fork of peft calls LYCORIS is not known."""
    folder = tmp_path / "fork"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LYCORIS", "r": 4}))
    save_file(pairs(trained(), "base_model.model."), folder / "adapter_model.safetensors")
    with pytest.raises(ao.errors.UnsupportedFormat, match="peft_type is LYCORIS"):
        ao.load(folder)


def test_luminas_files_stay_luminas(tmp_path: Path) -> None:
    """All of its blocks are NewBie's, too."""
    blocks = {name: shape for n in range(26) for name, shape in lumina_block(f"layers.{n}").items()}
    for number, tensors in enumerate(
        (comfy({**blocks, **LUMINAS_BLOCKS}), musubi(blocks), pairs(LUMINA.diffusers, "transformer."))
    ):
        found = ao.inspect(write(tmp_path / f"{number}.safetensors", tensors))
        assert (found.architecture.value, found.architecture.others) == ("lumina2", ())


def test_some_of_the_blocks_fit_both(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", comfy(lumina_block("layers.3")))
    found = ao.inspect(path).architecture
    assert (found.value, found.others) == ("lumina2", ("newbie",))
    path = write(tmp_path / "b.safetensors", comfy(lumina_block("layers.3")), **{"modelspec.architecture": "newbie"})
    assert ao.inspect(path).architecture.value == "newbie"


def test_the_hubs_name() -> None:
    assert set(named("NewBie-AI/NewBie-image-Exp0.1")) == {"newbie"}


def test_no_library_has_its_class(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", FILES["diffusers"])
    assert {f.rule.code for f in ao.validate(path, targets=["diffusers"], select=["L5"])} == {"L509"}
    folder = tmp_path / "folder"
    ao.convert(path, "peft", folder)
    told = [finding.message for finding in ao.validate(path, targets=["diffusers"], load_test=True, select=["L593"])]
    assert told == ["diffusers: diffusers has no loader of LoRAs for this base"]
    assert [f.rule.code for f in ao.validate(folder, targets=["peft"], load_test=True, select=["L"])] == []


def originals(component: Component) -> dict[str, tuple[tuple[int, ...], str, bool]]:
    """The modules by their authors' names; what is cut into parts elsewhere is whole."""
    specs = [*component.modules.values(), *component.fused.values()]
    return {spec.original: (spec.shape, spec.kind, spec.bias) for spec in specs if spec.original}


def test_the_modules_are_luminas() -> None:
    """Which are held against diffusers' class and its conversion of the authors' checkpoint."""
    lumina, own = (originals(load(name).components["transformer"]) for name in ("lumina2", "newbie"))
    # Lumina takes the states of Gemma 2 2B, NewBie those of Gemma 3 4B.
    states = {"cap_embedder.0": ((2560,), "norm", False), "cap_embedder.1": ((2304, 2560), "linear", True)}
    further = {
        "clip_text_pooled_proj.0": ((1024,), "norm", False),
        "clip_text_pooled_proj.1": ((1024, 1024), "linear", True),
        "time_text_embed.1": ((1024, 2048), "linear", True),
        "norm_final": ((2304,), "norm", False),
    }
    last = {name: spec for name, spec in lumina.items() if name.startswith("layers.25.")}
    layers = {name.replace(".25.", f".{n}.", 1): spec for n in range(26, LAYERS) for name, spec in last.items()}
    assert own == {**lumina, **states, **further, **layers}
    assert len(layers) == 10 * len(last) == 120
