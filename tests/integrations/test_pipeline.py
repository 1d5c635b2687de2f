"""The architecture of a live pipeline, and adapters under names that only built-in tables know."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import tiny
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from adapterops import architectures
from adapterops.integrations.diffusers import architecture_of, load_into
from adapterops.integrations.pipeline import component_of

FIXTURES = Path(__file__).parents[2] / "fixtures"
SDXL = architectures.load("sdxl")


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_live_model_is_listed_as_its_config_is(kind: str, tmp_path: Path) -> None:
    pipe = tiny.pipeline(kind)
    found = architecture_of(pipe)
    assert found.name == type(pipe).__name__
    index: dict[str, Any] = {"_class_name": found.name}
    for name, component in found.components.items():
        pipe.components[name].config.save_pretrained(tmp_path / name) if hasattr(
            pipe.components[name].config, "save_pretrained"
        ) else pipe.components[name].save_config(tmp_path / name)
        index[name] = component.class_name.split(".")
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    wanted = architectures.from_config(tmp_path)
    assert found.components.keys() == wanted.components.keys()
    for name, component in found.components.items():
        other = wanted.components[name]
        assert component.modules == other.modules
        assert component.fused == other.fused
        assert (component.bare, component.optional_prefix, component.like) == (
            other.bare, other.optional_prefix, other.like
        )  # fmt: skip


def test_loaded_adapters_are_looked_through(tmp_path: Path) -> None:
    pipe = tiny.pipeline("sd1")
    before = architecture_of(pipe)
    for n in (1, 2):
        raw = tiny.adapter(pipe, n, dora=True)
        load_into(pipe, tiny.write_peft(raw, tmp_path / str(n)), f"a{n}")
        assert architecture_of(pipe) is before


def test_a_packed_weight_has_its_layers_shape() -> None:
    class Packed(nn.Linear):
        pass

    model = UNet2DConditionModel.from_config(tiny.unet().config)
    layer = Packed(8, 32)
    layer.weight = nn.Parameter(torch.zeros(128, 1, dtype=torch.uint8), requires_grad=False)
    model.time_embedding.linear_1 = layer
    assert component_of("unet", model).modules["time_embedding.linear_1"].shape == (32, 8)


def sdxl() -> Any:
    """The published model's shape, without storage."""
    built = {name: SDXL.components[name] for name in ("unet", "text_encoder", "text_encoder_2")}
    none: dict[str, Any] = dict.fromkeys(("vae", "tokenizer", "tokenizer_2", "scheduler"))
    with torch.device("meta"):
        return StableDiffusionXLPipeline(
            unet=UNet2DConditionModel.from_config(dict(built["unet"].config)),
            text_encoder=CLIPTextModel(CLIPTextConfig(**built["text_encoder"].config)),
            text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**built["text_encoder_2"].config)),
            add_watermarker=False,
            **none,
        )


def test_sdxl_under_its_authors_names() -> None:
    """The modules that the file names, also where something in the UNet keeps it from equalling the table."""
    import adapterops as ao

    path = FIXTURES / "kohya-sdxl.safetensors"
    adapter = ao.load(path)
    wanted = {
        (u.component, u.module.removeprefix("text_model.") if u.component == "text_encoder" else u.module)
        for u in adapter
    }
    pipe = sdxl()
    assert architecture_of(pipe).components["unet"].like == "sdxl"
    for source in (path, adapter):
        loaded = load_into(pipe, source)
        assert {(c, m) for c, names in loaded.modules.items() for m in names} == wanted
        pipe.unload_lora_weights()
    pipe.unet.encoder_hid_proj = nn.Linear(4, 4, device="meta")
    assert architecture_of(pipe).components["unet"].like == ""
    loaded = load_into(pipe, path)
    assert {(c, m) for c, names in loaded.modules.items() for m in names} == wanted
    scales = {layer.scaling["default"] for layer in pipe.unet.modules() if hasattr(layer, "lora_A")}
    assert scales == {u.alpha.value / u.tensors["B"].shape[1] for u in adapter.of("unet") if u.alpha and u.alpha.value}


def test_importing_it_imports_neither_torch_nor_diffusers() -> None:
    code = (
        "import sys, adapterops.integrations.diffusers as d; d.load_into; d.architecture_of; "
        "print([m for m in ('torch', 'numpy', 'diffusers', 'peft', 'huggingface_hub') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_example_runs() -> None:
    example = Path(__file__).parents[2] / "examples" / "load_into_pipeline.py"
    done = subprocess.run([sys.executable, str(example)], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert any("unet" in line and "text_encoder" in line for line in lines)
    assert any(line.startswith("weight 0.5") for line in lines)
    assert lines[-1] == "unloaded: the outputs are those of the base again"
