"""What a model of diffusers saves of itself (`save_lora_adapter`): its own module names, and peft's config in the header."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

import adapterops as ao
from adapterops.errors import UnknownFact

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

FLUX = {
    "num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 8,
    "joint_attention_dim": 16, "pooled_projection_dim": 16, "axes_dims_rope": (4, 6, 6),
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "alpha": {"lora_alpha": 8},
    "rank-stabilised": {"lora_alpha": 8, "use_rslora": True},
    "patterns": {"lora_alpha": 3, "rank_pattern": {"to_k": 2}, "alpha_pattern": {"to_k": 5}},
    "DoRA": {"lora_alpha": 8, "use_dora": True},
    "bias": {"lora_alpha": 8, "lora_bias": True},
}


def base() -> Any:
    torch.manual_seed(3)
    return diffusers.FluxTransformer2DModel(**FLUX).float()


def saved(folder: Path, **options: Any) -> tuple[Path, dict[str, torch.Tensor]]:
    """The model's own file, and what the adapter adds to its weights."""
    model = base()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = peft.LoraConfig(r=4, target_modules=["to_q", "to_k", "proj_out"], init_lora_weights=False, **options)
    model.add_adapter(config, adapter_name="style")
    model.save_lora_adapter(folder, adapter_name="style")
    model.fuse_lora()
    model.unload_lora()
    after = model.state_dict()
    return folder / "pytorch_lora_weights.safetensors", {name: after[name] - value for name, value in before.items()}


def added(model: Any, folder: Path) -> dict[str, torch.Tensor]:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    merged = peft.PeftModel.from_pretrained(model, folder).merge_and_unload()
    return {name: value - before[name] for name, value in merged.state_dict().items()}


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("known", [False, True], ids=["alone", "with its base"])
def test_the_headers_config_is_the_adapters(options: dict[str, Any], known: bool, tmp_path: Path) -> None:
    path, wanted = saved(tmp_path / "own", **options)
    base().save_config(tmp_path / "base")
    found = ao.inspect(path)
    assert found.dialect == "peft"
    ao.convert(path, "peft", tmp_path / "folder", **({"base": tmp_path / "base"} if known else {}))
    made = added(base(), tmp_path / "folder")
    assert [n for n, delta in wanted.items() if not torch.allclose(made[n], delta, atol=1e-6)] == []
    assert sum(bool(delta.any()) for delta in wanted.values()) >= 5


@pytest.mark.parametrize("options", [CONFIGS[name] for name in ("alpha", "rank-stabilised", "patterns")])
def test_as_a_pipelines_file(options: dict[str, Any], tmp_path: Path) -> None:
    path, wanted = saved(tmp_path / "own", **options)
    base().save_config(tmp_path / "base")
    ao.convert(path, "diffusers", tmp_path / "a.safetensors", base=tmp_path / "base")
    model = base()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_lora_adapter(tmp_path / "a.safetensors", prefix="transformer", use_safetensors=True)
    model.fuse_lora()
    model.unload_lora()
    made = {name: value - before[name] for name, value in model.state_dict().items()}
    assert [n for n, delta in wanted.items() if not torch.allclose(made[n], delta, atol=1e-6)] == []


def test_the_names_of_a_base_that_is_built_in(tmp_path: Path) -> None:
    """They are those of DiffSynth's files, too, whose readers apply scale 1."""
    stem = "transformer_blocks.0.attn.to_q"
    tensors = {f"{stem}.lora_A.weight": torch.ones(4, 3072), f"{stem}.lora_B.weight": torch.ones(3072, 4)}
    path = tmp_path / "a.safetensors"
    header = json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["to_q"]})
    save = importlib.import_module("safetensors.torch").save_file
    save(tensors, path, {"format": "pt", "lora_adapter_metadata": header})
    (update,) = ao.load(path)
    assert (update.component, update.alpha.value) == ("transformer", 8)
    ao.convert(path, "comfy", tmp_path / "b.safetensors")
    (update,) = ao.load(tmp_path / "b.safetensors")
    assert update.alpha is not None
    assert update.alpha.value == 8
    save(tensors, path, {"format": "pt"})
    assert ao.inspect(path).dialect == "diffsynth"


@pytest.mark.parametrize("header", ["{", "[]", "null", '{"r": 4}', '{"peft_type": 7}'])
def test_a_header_without_such_a_config_says_nothing(header: str, tmp_path: Path) -> None:
    tensors = {"a.b.lora_A.weight": torch.ones(4, 8), "a.b.lora_B.weight": torch.ones(8, 4)}
    importlib.import_module("safetensors.torch").save_file(
        tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": header}
    )
    with pytest.raises(UnknownFact, match="--alpha X"):
        ao.convert(tmp_path / "a.safetensors", "peft", tmp_path / "folder")


def test_a_header_of_another_rank_is_refused(tmp_path: Path) -> None:
    path, _ = saved(tmp_path / "own", lora_alpha=8)
    safetensors = importlib.import_module("safetensors.torch")
    tensors = safetensors.load_file(path)
    header = json.dumps({"peft_type": "LORA", "r": 16, "lora_alpha": 8, "target_modules": ["to_q", "to_k", "proj_out"]})
    safetensors.save_file(tensors, path, {"lora_adapter_metadata": header})
    with pytest.raises(ao.errors.Conflict, match="header lora_adapter_metadata"):
        ao.load(path)


def in_comfys_names(path: Path, **header: str) -> Path:
    stem = "diffusion_model.double_blocks.0.img_attn.proj"
    tensors = {f"{stem}.lora_A.weight": torch.eye(4, 3072), f"{stem}.lora_B.weight": torch.ones(3072, 4)}
    importlib.import_module("safetensors.torch").save_file(tensors, path, header)
    return path


@pytest.mark.parametrize("key", ["lora_alpha", "transformer.lora_alpha"])
def test_an_alpha_that_its_readers_do_not_look_for_is_told_of(key: str, tmp_path: Path) -> None:
    path = in_comfys_names(tmp_path / "a.safetensors", lora_adapter_metadata=json.dumps({key: 8, "r": 4}))
    found = ao.inspect(path)
    told = [note for note in found.notes if "lora_alpha 8" in note and "--alpha 8" in note]
    assert len(told) == 1
    done = ao.convert(path, "kohya", tmp_path / "b.safetensors")
    assert [note for note in done.notes if note == told[0]] == told
    (update,) = ao.load(tmp_path / "b.safetensors")
    assert update.alpha is not None
    assert update.alpha.value == 4
    done = ao.convert(path, "kohya", tmp_path / "b.safetensors", alpha=8.0, overwrite=True)
    assert [note for note in done.notes if "lora_alpha" in note] == []


@pytest.mark.parametrize(
    "more", [{"use_rslora": True}, {"alpha_pattern": {"proj": 2}}, {"text_encoder.lora_alpha": 16}]
)
def test_no_alpha_is_offered_that_would_not_do_what_the_header_says(more: dict[str, Any], tmp_path: Path) -> None:
    path = in_comfys_names(tmp_path / "a.safetensors", lora_adapter_metadata=json.dumps({"lora_alpha": 8, **more}))
    (told,) = [note for note in ao.inspect(path).notes if "lora_alpha 8" in note]
    assert told.endswith("--alpha X makes the scale X / rank")


def test_a_header_of_an_unknown_type_is_no_matter_to_other_names(tmp_path: Path) -> None:
    path = in_comfys_names(tmp_path / "a.safetensors", lora_adapter_metadata=json.dumps({"peft_type": "LYCORIS"}))
    assert ao.inspect(path).dialect == "comfy"


@pytest.mark.parametrize(
    "header", [{"lora_alpha": 4}, {"r": 4}, ["lora_alpha"], {"lora_alpha": "8"}, {"a.lora_alpha.b": 8}]
)
def test_nothing_is_said_of_a_header_that_says_no_other_alpha(header: object, tmp_path: Path) -> None:
    path = in_comfys_names(tmp_path / "a.safetensors", lora_adapter_metadata=json.dumps(header))
    assert [note for note in ao.inspect(path).notes if "lora_alpha" in note] == []


def test_nothing_is_said_of_a_pipelines_header_that_is_read(tmp_path: Path) -> None:
    pair = {"lora_A.weight": torch.eye(4, 768), "lora_B.weight": torch.ones(768, 4)}
    stem = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    tensors = {f"{stem}.{end}": tensor for end, tensor in pair.items()}
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors |= {f"{name}.lora_A.weight": torch.eye(4, 320), f"{name}.lora_B.weight": torch.ones(320, 4)}
    header = {"unet.lora_alpha": 8, "unet.r": 4, "unet.target_modules": ["to_q"]}
    path = tmp_path / "a.safetensors"
    importlib.import_module("safetensors.torch").save_file(tensors, path, {"lora_adapter_metadata": json.dumps(header)})
    notes = ao.inspect(path).notes
    assert [note for note in notes if "lora_alpha" in note] == []
    assert [note for note in notes if "says nothing of text_encoder" in note] != []
