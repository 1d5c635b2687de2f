"""Adapters of a base whose modules transformers has renamed since."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from transformers import ViTConfig, ViTForImageClassification

import adapterops as ao


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of the adapter's base, nateraw/vit-age-classifier: ViT-B/16 with ten classes."""
    folder = tmp_path_factory.mktemp("vit")
    found = ViTConfig(num_labels=10)
    found.architectures = ["ViTForImageClassification"]
    found.save_pretrained(folder)
    return folder


def base(config: Path) -> ViTForImageClassification:
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig.from_pretrained(config)).eval()


def test_a_renamed_vit_loads_after_conversion(corpus: Path, config: Path, tmp_path: Path) -> None:
    source = corpus / "files" / "age-prediction-whyiswmm"
    with pytest.raises(ValueError, match="No modules were targeted"):
        PeftModel.from_pretrained(base(config), source)
    result = ao.convert(source, "peft", tmp_path / "out", base=config)
    assert result.proof is not None
    assert result.proof.exact
    assert any("renamed" in note for note in result.notes)
    model = PeftModel.from_pretrained(base(config), tmp_path / "out").eval()
    adapted = {n for n, m in model.base_model.model.named_modules() if isinstance(m, BaseTunerLayer)}
    assert adapted == {f"vit.layers.{i}.attention.{p}_proj" for i in range(12) for p in ("q", "v")}

    # The same by hand: alpha 16 at rank 16 is scale 1.
    by_hand = base(config)
    tensors = {
        k.removeprefix("base_model.model."): t for k, t in load_file(source / "adapter_model.safetensors").items()
    }
    layer = model.base_model.model.vit.layers[0].attention.q_proj
    scale = layer.scaling["default"]
    with torch.no_grad():
        for i in range(12):
            for old, new in (("query", "q_proj"), ("value", "v_proj")):
                stem = f"vit.encoder.layer.{i}.attention.attention.{old}"
                a, b = tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"]
                getattr(by_hand.vit.layers[i].attention, new).weight += scale * b @ a
        by_hand.classifier.weight.copy_(tensors["classifier.weight"])
        by_hand.classifier.bias.copy_(tensors["classifier.bias"])
        pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(model(pixels).logits, by_hand(pixels).logits, rtol=1e-4, atol=1e-5)


def test_patterns_follow_their_modules(config: Path, tmp_path: Path) -> None:
    """Ranks and alphas that the config gives by the old names stay those modules' own."""
    import json

    from safetensors.torch import save_file

    names = [f"vit.encoder.layer.{i}.attention.attention.query" for i in range(2)]
    tensors = {}
    for name, rank in zip(names, (4, 8), strict=True):
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, 768)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(768, rank)
    (tmp_path / "in").mkdir()
    save_file(tensors, tmp_path / "in" / "adapter_model.safetensors")
    fields = {"r": 4, "lora_alpha": 4, "target_modules": names}
    patterns = {"rank_pattern": {names[1]: 8}, "alpha_pattern": {names[1]: 32}}
    (tmp_path / "in" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **fields, **patterns}))
    ao.convert(tmp_path / "in", "peft", tmp_path / "out", base=config)
    model = PeftModel.from_pretrained(base(config), tmp_path / "out")
    layers = {n: m for n, m in model.base_model.model.named_modules() if isinstance(m, BaseTunerLayer)}
    assert {n: m.scaling["default"] for n, m in layers.items()} == {
        "vit.layers.0.attention.q_proj": 1.0,
        "vit.layers.1.attention.q_proj": 4.0,
    }


def published_and_back(source: Path, config: Path, folder: Path) -> None:
    """To the installed class's names and to the published ones again, bit for bit; each way says so."""
    there = ao.convert(source, "peft", folder / "installed", base=config)
    assert any("to be those of" in note for note in there.notes)
    back = ao.convert(folder / "installed", "peft", folder / "published", base=config, layout="published")
    assert any("to be those of" in note for note in back.notes)
    wanted = load_file(source / "adapter_model.safetensors")
    assert load_file(folder / "installed" / "adapter_model.safetensors").keys() != wanted.keys()
    found = load_file(folder / "published" / "adapter_model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())
    for result in (there, back):
        assert result.proof is not None
        assert result.proof.exact
    # What has the published names already stays as it is.
    ao.convert(source, "peft", folder / "again", base=config, layout="published")
    assert load_file(folder / "again" / "adapter_model.safetensors").keys() == wanted.keys()


def test_a_renamed_vit_comes_back(corpus: Path, config: Path, tmp_path: Path) -> None:
    published_and_back(corpus / "files" / "age-prediction-whyiswmm", config, tmp_path)


def adapter(names: dict[str, tuple[int, int]], folder: Path) -> Path:
    from json import dumps

    from safetensors.torch import save_file

    tensors = {}
    for name, (outputs, inputs) in names.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(2, inputs)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(outputs, 2)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": list(names)}
    (folder / "adapter_config.json").write_text(dumps(fields))
    return folder


def test_a_text_encoder_that_lost_its_beginning(tmp_path: Path) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    found = CLIPTextConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=9
    )
    found.architectures = ["CLIPTextModel"]
    found.save_pretrained(tmp_path / "clip")
    names = {f"text_model.encoder.layers.{i}.self_attn.{p}_proj": (8, 8) for i in range(2) for p in "qv"}
    published_and_back(adapter(names, tmp_path / "in"), tmp_path / "clip", tmp_path)
    model = PeftModel.from_pretrained(CLIPTextModel(found), tmp_path / "installed")
    adapted = {n for n, m in model.base_model.model.named_modules() if isinstance(m, BaseTunerLayer)}
    assert adapted == {name.removeprefix("text_model.") for name in names}


def test_a_vision_language_model(tmp_path: Path) -> None:
    """LLaVA: published with the language model outermost, now inside `model`."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = LlamaConfig(
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=9,
    )
    found = LlavaConfig(vision_config=vision, text_config=text)
    found.architectures = ["LlavaForConditionalGeneration"]
    found.save_pretrained(tmp_path / "llava")
    names = {f"language_model.model.layers.{i}.self_attn.{p}_proj": (8, 8) for i in range(2) for p in "qv"}
    published_and_back(adapter(names, tmp_path / "in"), tmp_path / "llava", tmp_path)
    model = PeftModel.from_pretrained(LlavaForConditionalGeneration(found), tmp_path / "installed")
    adapted = {n for n, m in model.base_model.model.named_modules() if isinstance(m, BaseTunerLayer)}
    assert adapted == {name.replace("language_model.model.", "model.language_model.") for name in names}


@pytest.mark.parametrize(("layout", "words"), [("published", "--base CONFIG"), ("old", "installed, published")])
def test_layouts_need_a_base(layout: str, words: str, corpus: Path) -> None:
    with pytest.raises(ao.errors.UsageError, match=words):
        ao.load(corpus / "files" / "age-prediction-whyiswmm", layout=layout)
