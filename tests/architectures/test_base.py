"""`--base`: architectures from tiny configs, and every way in which a config can be bad."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from adapterops.architectures import Architecture, BadBaseConfig, from_config, load

pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

UNET = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "block_out_channels": [32, 64],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "cross_attention_dim": 32,
    "attention_head_dim": 8,
    "layers_per_block": 1,
    "sample_size": 8,
}
CLIP = {
    "architectures": ["CLIPTextModel"],
    "model_type": "clip_text_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "torch_dtype": "float16",
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "tie_word_embeddings": True,
}
GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "n_embd": 32,
    "n_layer": 1,
    "n_head": 4,
    "vocab_size": 100,
}


def write(path: Path, config: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config))
    return path


def from_values(folder: Path, config: dict[str, Any]) -> Architecture:
    return from_config(write(folder / "config.json", config))


def test_unet(tmp_path: Path) -> None:
    architecture = from_values(tmp_path, UNET)
    assert architecture.name == "UNet2DConditionModel"
    assert not architecture.builtin
    assert list(architecture.components) == ["unet"]
    unet = architecture.components["unet"]
    assert unet.name == "unet"
    assert unet.class_name == "diffusers.UNet2DConditionModel"
    assert unet.config["cross_attention_dim"] == 32
    to_k = unet.modules["down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"]
    assert (to_k.shape, to_k.kind, to_k.bias, to_k.params) == ((64, 32), "linear", False, ("weight",))
    conv = unet.modules["conv_in"]
    assert (conv.shape, conv.kind, conv.bias, conv.original) == ((32, 4, 3, 3), "conv", True, "conv_in")
    norm = unet.modules["conv_norm_out"]
    assert (norm.shape, norm.kind) == ((32,), "norm")
    assert "down_blocks.0" not in unet.modules


def test_diffusers_transformer_with_raw_parameters(tmp_path: Path) -> None:
    config = {
        "_class_name": "PixArtTransformer2DModel",
        "num_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "cross_attention_dim": 16,
        "caption_channels": 12,
        "sample_size": 8,
    }
    modules = from_values(tmp_path, config).components["transformer"].modules
    block = modules["transformer_blocks.0"]
    assert (block.kind, block.shape, block.params) == ("other", (), ("scale_shift_table",))
    assert modules[""].params == ("scale_shift_table",)
    assert "pos_embed" in modules["pos_embed"].params


def test_clip_from_a_folder(tmp_path: Path) -> None:
    write(tmp_path / "config.json", CLIP)
    model = from_config(tmp_path).components["model"]
    assert model.class_name == "transformers.CLIPTextModel"
    q_proj = next(spec for name, spec in model.modules.items() if name.endswith("layers.1.self_attn.q_proj"))
    assert (q_proj.shape, q_proj.kind, q_proj.bias) == ((32, 32), "linear", True)
    embedding = next(spec for name, spec in model.modules.items() if name.endswith("token_embedding"))
    assert (embedding.shape, embedding.kind, embedding.bias) == ((100, 32), "embedding", False)
    assert any("position_ids" in spec.params for spec in model.modules.values()), "buffers are listed"


def test_nested_config_of_a_text_model(tmp_path: Path) -> None:
    nested = {"architectures": ["CLIPTextModel"], "model_type": "clip", "text_config": CLIP}
    modules = from_values(tmp_path, nested).components["model"].modules
    assert next(spec for name, spec in modules.items() if name.endswith("token_embedding")).shape == (100, 32)


@pytest.mark.parametrize("tied", [True, False])
def test_llama_ties(tmp_path: Path, tied: bool) -> None:
    model = from_values(tmp_path, LLAMA | {"tie_word_embeddings": tied}).components["model"]
    head = model.modules["lm_head"]
    assert head.tied_to == ("model.embed_tokens" if tied else None)
    assert (head.shape, head.kind) == ((100, 32), "linear")
    assert model.modules["model.embed_tokens"].tied_to is None
    assert model.modules["model.layers.0.self_attn.k_proj"].shape == (16, 32)
    assert model.modules["model.norm"].kind == "norm"


def test_gpt2_conv1d_is_a_transposed_linear(tmp_path: Path) -> None:
    modules = from_values(tmp_path, GPT2).components["model"].modules
    c_attn = modules["transformer.h.0.attn.c_attn"]
    assert (c_attn.shape, c_attn.kind, c_attn.transposed, c_attn.bias) == ((96, 32), "linear", True, True)
    c_fc = modules["transformer.h.0.mlp.c_fc"]
    assert (c_fc.shape, c_fc.transposed) == ((128, 32), True)
    assert not modules["lm_head"].transposed
    assert modules["lm_head"].tied_to == "transformer.wte"


def test_multihead_attention_is_listed_by_its_parameters(tmp_path: Path) -> None:
    config = {
        "architectures": ["SiglipVisionModel"],
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 8,
    }
    modules = from_values(tmp_path, config).components["model"].modules
    fused = next(spec for spec in modules.values() if "in_proj_weight" in spec.params)
    assert (fused.kind, fused.shape, fused.bias) == ("other", (), False)
    assert modules[f"{fused.name}.out_proj"].kind == "linear"


def test_class_falls_back_to_the_model_type(tmp_path: Path) -> None:
    for number, architectures in enumerate([None, [], ["SomebodysLlama"]]):
        config = LLAMA | {"architectures": architectures}
        assert from_values(tmp_path / str(number), config).components["model"].class_name == "transformers.LlamaModel"


def test_native_class_is_used_and_auto_map_is_not(tmp_path: Path) -> None:
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    config = LLAMA | {"auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}}
    assert from_values(tmp_path, config).name == "LlamaForCausalLM"


def make_pipeline(folder: Path, index: dict[str, Any] | None) -> None:
    write(folder / "unet" / "config.json", UNET)
    write(folder / "text_encoder" / "config.json", CLIP)
    if index is not None:
        write(folder / "model_index.json", index)
    write(folder / "scheduler" / "scheduler_config.json", {"_class_name": "DDIMScheduler"})
    write(folder / "tokenizer" / "tokenizer_config.json", {})


def test_pipeline_folder(tmp_path: Path) -> None:
    index = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_2": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "requires_safety_checker": True,
        "../outside": ["transformers", "LlamaForCausalLM"],
    }
    folder = tmp_path / "pipeline"
    make_pipeline(folder, index)
    write(folder / "safety_checker" / "config.json", {"model_type": "clip"})
    # A tokenizer with a config.json is still no model.
    write(folder / "tokenizer" / "config.json", CLIP)
    write(tmp_path / "outside" / "config.json", LLAMA)
    for source in (folder, folder / "model_index.json"):
        architecture = from_config(source)
        assert architecture.name == "StableDiffusionPipeline"
        assert set(architecture.components) == {"unet", "text_encoder"}
        assert all(key == component.name for key, component in architecture.components.items())
        # The pipeline's choice of class goes before the config's.
        assert "text_projection" in architecture.components["text_encoder"].modules


def test_folder_of_components_without_an_index(tmp_path: Path) -> None:
    make_pipeline(tmp_path, None)
    assert set(from_config(tmp_path).components) == {"unet", "text_encoder"}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ("[1, 2]", "no JSON object"),
        ("{not json", "not a readable JSON file"),
        ("\udcff", "not a readable JSON file"),
        ("[" * 100_000, "not a readable JSON file"),
        ('{"hidden_size": 3}', "not the config of a diffusers or transformers model"),
        ('{"_class_name": "UNetOfTomorrow"}', "no class 'UNetOfTomorrow'"),
        ('{"_class_name": "DDIMScheduler"}', "not a model"),
        ('{"architectures": ["Nope"], "model_type": "nope"}', "neither the class 'Nope'"),
        ('{"architectures": [3], "model_type": ["nope"]}', "knows neither"),
        ('{"model_type": "nope", "auto_map": {"AutoModel": "evil.Model"}}', "does not run"),
        ('{"_class_name": "UNet2DConditionModel", "down_block_types": ["X"]}', "cannot be built"),
        ('{"architectures": ["LlamaForCausalLM"], "hidden_size": "many"}', "cannot be built"),
    ],
)
def test_bad_configs(tmp_path: Path, config: str, reason: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(config.encode(errors="surrogateescape"))
    with pytest.raises(BadBaseConfig, match=reason) as caught:
        from_config(path)
    assert str(path) in str(caught.value)


def test_missing_paths(tmp_path: Path) -> None:
    with pytest.raises(BadBaseConfig, match="no such file or folder"):
        from_config(tmp_path / "nothing")
    with pytest.raises(BadBaseConfig, match=r"neither config\.json nor model_index\.json"):
        from_config(tmp_path)
    write(tmp_path / "model_index.json", {"_class_name": "P", "unet": ["diffusers", "UNet2DConditionModel"]})
    with pytest.raises(BadBaseConfig, match="download those too"):
        from_config(tmp_path)


@pytest.mark.parametrize(("config", "library"), [(UNET, "diffusers"), (LLAMA, "transformers")])
@pytest.mark.parametrize("missing", ["torch", None])
def test_missing_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], library: str, missing: str | None
) -> None:
    monkeypatch.setitem(sys.modules, missing or library, None)
    with pytest.raises(BadBaseConfig, match=rf"pip install adapterops\[{library}\]"):
        from_values(tmp_path, config)


def test_building_is_offline_and_the_setting_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    seen: list[bool] = []
    build = LlamaForCausalLM.__init__

    def observe(self: LlamaForCausalLM, *arguments: Any) -> None:
        seen.append(constants.is_offline_mode())
        build(self, *arguments)

    monkeypatch.setattr(LlamaForCausalLM, "__init__", observe)
    from_values(tmp_path, LLAMA)
    assert seen == [True]
    assert not constants.is_offline_mode()


FLUX = {
    "_class_name": "FluxTransformer2DModel",
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 20,
    "in_channels": 12,
    "axes_dims_rope": [4, 6, 6],
}
SD3 = {
    "_class_name": "SD3Transformer2DModel",
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 20,
    "in_channels": 4,
    "out_channels": None,
    "sample_size": 8,
}
T5 = {
    "architectures": ["T5EncoderModel"],
    "model_type": "t5",
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "vocab_size": 50,
    "feed_forward_proj": "gated-gelu",
}


@pytest.mark.parametrize("guidance", [True, False])
@pytest.mark.parametrize("more", [{}, {"out_channels": 5}, {"patch_size": 2}])
def test_a_small_flux_has_the_authors_names(tmp_path: Path, guidance: bool, more: dict[str, Any]) -> None:
    transformer = from_values(tmp_path, FLUX | {"guidance_embeds": guidance} | more).components["transformer"]
    assert transformer.like == "flux"
    table = load("flux").components["transformer"]
    for name, spec in transformer.modules.items():
        assert (spec.original, spec.widens) == (table.modules[name].original, table.modules[name].widens)
    assert ("time_text_embed.guidance_embedder.linear_1" in transformer.modules) == guidance
    linear1 = transformer.fused["single_transformer_blocks.1.attn.to_qkv_mlp"]
    assert (linear1.original, linear1.shape) == ("single_blocks.1.linear1", (7 * 32, 32))
    assert linear1.joins[-1] == ("single_transformer_blocks.1.proj_mlp", 0, 128)
    swapped = transformer.fused["norm_out.linear_swapped"]
    assert swapped.joins == (("norm_out.linear", 32, 64), ("norm_out.linear", 0, 32))
    assert sum(not spec.partial for spec in transformer.fused.values()) == 2 * 1 + 2 + 1


def test_a_small_sd3_has_the_authors_names_and_its_buffer_does_not_matter(tmp_path: Path) -> None:
    transformer = from_values(tmp_path, SD3).components["transformer"]
    assert transformer.like == "sd3"
    assert transformer.modules["pos_embed"].params == ("pos_embed",)
    assert transformer.modules["pos_embed.proj"].original == "x_embedder.proj"
    last = transformer.fused["transformer_blocks.1.norm1_context.linear_swapped"]
    assert last.original == "joint_blocks.1.context_block.adaLN_modulation.1"


@pytest.mark.parametrize("norm", [{}, {"qk_norm": "rms_norm"}])
@pytest.mark.parametrize("dual", [{}, {"dual_attention_layers": [0]}, {"dual_attention_layers": [0, 1]}])
def test_a_small_sd35_has_the_authors_names(tmp_path: Path, norm: dict[str, Any], dual: dict[str, Any]) -> None:
    """The rows of 3.5 hold for any layers with a second attention, and with norms or without."""
    transformer = from_values(tmp_path, SD3 | norm | dual).components["transformer"]
    layers = dual.get("dual_attention_layers", [])
    assert transformer.like == "sd3"
    widths = [9 if i in layers else 6 for i in range(2)]
    assert [transformer.modules[f"transformer_blocks.{i}.norm1.linear"].shape[0] // 16 for i in range(2)] == widths
    assert {s.original for s in transformer.fused.values() if "attn2" in s.name} == {
        f"joint_blocks.{i}.x_block.attn2.qkv" for i in layers
    }
    originals = {spec.original for spec in transformer.modules.values()}
    assert ("joint_blocks.1.context_block.attn.ln_q" in originals) == bool(norm)
    assert ("joint_blocks.0.x_block.attn2.ln_k" in originals) == bool(norm and layers)


def test_a_model_with_other_modules_than_the_tables_has_no_originals(tmp_path: Path) -> None:
    # Norms with a bias, which neither 3.0 nor 3.5 has.
    transformer = from_values(tmp_path, SD3 | {"qk_norm": "layer_norm"}).components["transformer"]
    assert (transformer.like, transformer.fused) == ("", {})
    assert all(spec.original == name for name, spec in transformer.modules.items())


def test_a_unet_of_another_size_has_no_originals(tmp_path: Path) -> None:
    unet = from_values(tmp_path, UNET).components["unet"]
    assert unet.like == ""
    assert all(spec.original == name for name, spec in unet.modules.items())


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_a_builtin_models_own_config_gives_its_names(tmp_path: Path, name: str) -> None:
    table = load(name).components["unet"]
    unet = from_values(tmp_path, {"_class_name": "UNet2DConditionModel", **table.config}).components["unet"]
    assert unet.like == name
    assert {key: spec.original for key, spec in unet.modules.items()} == {
        key: spec.original for key, spec in table.modules.items()
    }


@pytest.mark.parametrize("config", [CLIP, T5])
def test_text_encoders_are_like_no_single_architecture(tmp_path: Path, config: dict[str, Any]) -> None:
    model = from_values(tmp_path, config).components["model"]
    assert model.like == ""
    assert all(spec.original == name for name, spec in model.modules.items())


def test_a_pipeline_is_of_the_family_of_its_transformer(tmp_path: Path) -> None:
    write(tmp_path / "transformer" / "config.json", FLUX)
    write(tmp_path / "text_encoder" / "config.json", CLIP)
    write(tmp_path / "text_encoder_2" / "config.json", T5)
    assert from_config(tmp_path).family == "flux"
    make_pipeline(tmp_path / "other", None)
    other = from_config(tmp_path / "other")
    assert other.family == other.name
