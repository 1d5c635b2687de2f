"""Adapters of HunyuanVideo, FramePack and LTX-Video as their trainers write them, and as their readers take them."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_trainers import same, sound
from test_wan_z_image import Modules, comes_back, comfy, deltas, musubi
from trainers import DOWN_UP, FLUX, Tensors, loha, lokr, pairs, write

import adapterops as ao
from adapterops import errors
from adapterops.adapter import Certainty


def double(block: int) -> Modules:
    """A double block of HunyuanVideo by its authors' names."""
    out = {}
    for stream in ("img", "txt"):
        stem = f"double_blocks.{block}.{stream}_"
        out |= {f"{stem}attn_qkv": (9216, 3072), f"{stem}attn_proj": (3072, 3072), f"{stem}mod.linear": (18432, 3072)}
        out |= {f"{stem}mlp.fc1": (12288, 3072), f"{stem}mlp.fc2": (3072, 12288)}
    return out


def single(block: int) -> Modules:
    """A single block."""
    stem = f"single_blocks.{block}."
    return {f"{stem}linear1": (21504, 3072), f"{stem}linear2": (3072, 15360), f"{stem}modulation.linear": (9216, 3072)}


BLOCKS: Modules = {**double(19), **single(39)}
SOME: Modules = {
    "double_blocks.19.img_attn_qkv": (9216, 3072),
    "double_blocks.19.txt_mlp.fc1": (12288, 3072),
    "single_blocks.39.linear1": (21504, 3072),
    "single_blocks.0.linear2": (3072, 15360),
}
AS_DIFFUSERS: Modules = {
    "transformer_blocks.19.attn.to_q": (3072, 3072),
    "transformer_blocks.19.attn.add_k_proj": (3072, 3072),
    "transformer_blocks.0.ff.net.0.proj": (12288, 3072),
    "single_transformer_blocks.39.attn.to_v": (3072, 3072),
    "single_transformer_blocks.39.proj_mlp": (12288, 3072),
}
COMFYS: Modules = {
    "double_blocks.19.img_attn.qkv": (9216, 3072),
    "double_blocks.19.txt_attn.proj": (3072, 3072),
    "double_blocks.0.img_mlp.0": (12288, 3072),
    "double_blocks.0.txt_mlp.2": (3072, 12288),
    "double_blocks.18.img_mod.lin": (18432, 3072),
    "single_blocks.38.modulation.lin": (9216, 3072),
    "single_blocks.0.linear1": (21504, 3072),
    "txt_in.individual_token_refiner.blocks.1.self_attn.qkv": (9216, 3072),
    "txt_in.individual_token_refiner.blocks.1.mlp.0": (12288, 3072),
    "txt_in.c_embedder.out_layer": (3072, 3072),
    "time_in.in_layer": (3072, 256),
    "vector_in.in_layer": (3072, 768),
    "final_layer.linear": (64, 3072),
}
"""Comfy-Org/ComfyUI `comfy/ldm/hunyuan_video/model.py`, `comfy/ldm/flux/layers.py`."""
SMALL_PARTS: Modules = {
    "txt_in.individual_token_refiner.blocks.0.self_attn_proj": (3072, 3072),
    "txt_in.individual_token_refiner.blocks.1.mlp.fc1": (12288, 3072),
    "txt_in.individual_token_refiner.blocks.1.adaLN_modulation.1": (6144, 3072),
    "txt_in.t_embedder.mlp.0": (3072, 256),
    "txt_in.c_embedder.linear_2": (3072, 3072),
    "txt_in.input_embedder": (3072, 4096),
    "time_in.mlp.2": (3072, 3072),
    "guidance_in.mlp.0": (3072, 256),
    "vector_in.in_layer": (3072, 768),
    "final_layer.linear": (64, 3072),
}


def diffusion_pipe(modules: Modules) -> Tensors:
    """tdrussell/diffusion-pipe `models/hunyuan_video.py` (`save_adapter`): peft's names behind `transformer.`."""
    return pairs(modules, "transformer.")


def tencent(modules: Modules) -> Tensors:
    """Tencent-Hunyuan/HunyuanVideo-I2V `train_image2video_lora.py` (`get_module_kohya_state_dict`)."""
    return pairs(modules, "Hunyuan_video_I2V_lora_", DOWN_UP, 8.0, flat=True)


FILES: dict[str, tuple[str, Callable[[], Tensors]]] = {
    "musubi-tuner": ("kohya", lambda: musubi(SOME)),
    "musubi-tuner, converted": ("comfy", lambda: comfy(SOME)),
    "musubi-tuner, FramePack": ("kohya-diffusers", lambda: musubi(AS_DIFFUSERS)),
    "diffusion-pipe": ("diffusion-pipe", lambda: diffusion_pipe(SOME)),
    "Tencent": ("tencent", lambda: tencent(SOME)),
    "finetrainers": ("diffusers", lambda: pairs(AS_DIFFUSERS, "transformer.")),
    "OneTrainer": ("onetrainer", lambda: pairs(AS_DIFFUSERS, "lora_transformer_", DOWN_UP, 1.0, flat=True)),
    "Comfy": ("comfy-down-hunyuan", lambda: pairs(COMFYS, "diffusion_model.", DOWN_UP, 2.0)),
    "Comfy's names, peft's factors": ("comfy-hunyuan", lambda: comfy(COMFYS)),
}
ELSEWHERE = ("comfy", "kohya", "kohya-diffusers", "diffusion-pipe", "tencent", "comfy-hunyuan", "peft", "diffusers")


@pytest.mark.parametrize("writer", FILES)
def test_files_of_hunyuan_video_come_back(writer: str, tmp_path: Path) -> None:
    dialect, make = FILES[writer]
    path = write(tmp_path / "a.safetensors", make())
    found = ao.inspect(path)
    assert (found.dialect, found.architecture.value) == (dialect, "hunyuan_video")
    assert found.architecture.certainty is Certainty.DERIVED
    sound(path)
    comes_back(path, dialect, tmp_path, ELSEWHERE)


def test_comfys_names_are_what_comfy_maps_the_authors_to(tmp_path: Path) -> None:
    """Comfy-Org/ComfyUI `comfy/lora.py` (`model_lora_keys_unet`) says so by replacing parts of the names."""
    ao.convert(write(tmp_path / "a.safetensors", comfy(BLOCKS)), "comfy-hunyuan", tmp_path / "b.safetensors")
    renamed = {}
    for key, tensor in load_file(tmp_path / "b.safetensors").items():
        for one, other in (
            ("_mod.lin.", "_mod.linear."),
            ("_attn.qkv.", "_attn_qkv."),
            ("_attn.proj.", "_attn_proj."),
            ("mlp.0.", "mlp.fc1."),
            ("mlp.2.", "mlp.fc2."),
            (".modulation.lin.", ".modulation.linear."),
        ):
            key = key.replace(one, other)
        renamed[key] = tensor
    same(renamed, comfy(BLOCKS))


def test_a_whole_file_by_comfys_names(tmp_path: Path) -> None:
    """Most of it is Flux.1's by name and size, and so is what a look at some of many keys finds."""
    modules = {f"double_blocks.{i}.img_attn.proj": (3072, 3072) for i in range(20)}
    modules |= {f"double_blocks.{i}.{s}_mod.lin": (18432, 3072) for i in range(20) for s in ("img", "txt")}
    modules |= {f"double_blocks.{i}.txt_attn.qkv": (9216, 3072) for i in range(20)}
    for ends, dialect in ((DOWN_UP, "comfy-down-hunyuan"), ((".lora_A.weight", ".lora_B.weight"), "comfy-hunyuan")):
        path = write(tmp_path / f"{dialect}.safetensors", pairs(modules, "diffusion_model.", ends, 1.0, rank=1))
        found = ao.inspect(path)
        assert (found.dialect, found.architecture.value, found.modules) == (dialect, "hunyuan_video", len(modules))


def test_few_blocks_by_comfys_names(tmp_path: Path) -> None:
    """They are Flux.1's by every sign, unless the user, or a header, says otherwise."""
    modules: Modules = {"double_blocks.3.img_attn.qkv": (9216, 3072), "double_blocks.3.img_mlp.0": (12288, 3072)}
    path = write(tmp_path / "a.safetensors", comfy(modules))
    assert ao.inspect(path).architecture.value == "flux"
    done = ao.convert(path, "diffusion-pipe", tmp_path / "b.safetensors", arch="hunyuan_video")
    names = {key.partition(".lora_")[0] for key in load_file(done.path)}
    assert names == {"transformer.double_blocks.3.img_attn_qkv", "transformer.double_blocks.3.img_mlp.fc1"}
    ao.convert(done.path, "comfy-hunyuan", tmp_path / "c.safetensors", arch="hunyuan_video")
    found = ao.inspect(tmp_path / "c.safetensors")
    assert (found.dialect, found.architecture.value) == ("comfy-hunyuan", "hunyuan_video")


@pytest.mark.parametrize("method", ["lokr", "loha"])
def test_lycoris_methods_of_hunyuan_video(method: str, tmp_path: Path) -> None:
    made = lokr(SOME, "diffusion_model.", 16, 4, 2.0) if method == "lokr" else loha(SOME, "diffusion_model.", 1.0)
    path = write(tmp_path / "a.safetensors", made)
    assert ao.inspect(path).architecture.value == "hunyuan_video"
    comes_back(path, "comfy", tmp_path, ("kohya", "diffusion-pipe", "comfy-hunyuan"))


def applied(tensors: Tensors) -> dict[str, torch.Tensor]:
    """What each module's change makes of the same few inputs, in a file whose scales are 1: no large matrix is built."""
    down, up = ".lora_A.weight", ".lora_B.weight"
    stems = {key.removesuffix(end) for key in tensors for end in (down, up) if key.endswith(end)}
    out = {}
    for stem in stems:
        first = tensors[stem + down].float()
        inputs = torch.randn(first.shape[1], 6, generator=torch.Generator().manual_seed(1))
        out[stem] = tensors[stem + up].float() @ (first @ inputs)
    return out


def agrees(mixin: str, path: Path, tmp_path: Path) -> None:
    """diffusers' own conversion makes the same names and updates of the file as ours."""
    loaders: Any = importlib.import_module("diffusers.loaders.lora_pipeline")
    theirs = applied(getattr(loaders, mixin).lora_state_dict(load_file(path)))
    ao.convert(path, "diffusers", tmp_path / "ours.safetensors")
    ours = applied(load_file(tmp_path / "ours.safetensors"))
    assert set(ours) == set(theirs)
    assert [n for n, made in ours.items() if not torch.allclose(made, theirs[n], rtol=1e-3, atol=1e-3)] == []


@pytest.mark.parametrize("writer", [comfy, diffusion_pipe])
def test_diffusers_converts_hunyuan_video_as_we_do(writer: Callable[[Modules], Tensors], tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", writer({**BLOCKS, **SMALL_PARTS}))
    agrees("HunyuanVideoLoraLoaderMixin", path, tmp_path)


def test_where_diffusers_is_wrong(tmp_path: Path) -> None:
    """Of the refiner's attention it cuts the factor that the three parts share as it cuts the other; of the last norm it turns
    both round."""
    modules = {
        "txt_in.individual_token_refiner.blocks.0.self_attn_qkv": (9216, 3072),
        "final_layer.adaLN_modulation.1": (6144, 3072),
        "double_blocks.0.img_attn_qkv": (9216, 3072),
    }
    path = write(tmp_path / "a.safetensors", pairs(modules, "diffusion_model.", rank=3))
    loaders: Any = importlib.import_module("diffusers.loaders.lora_pipeline")
    theirs = loaders.HunyuanVideoLoraLoaderMixin.lora_state_dict(load_file(path))
    ao.convert(path, "diffusers", tmp_path / "b.safetensors")
    ours, wanted = load_file(tmp_path / "b.safetensors"), applied(load_file(path))
    stem = "transformer.context_embedder.token_refiner.refiner_blocks.0.attn.to_"
    assert [made[f"{stem}q.lora_A.weight"].shape[0] for made in (ours, theirs)] == [3, 1]
    made = applied(ours)
    parts = torch.cat([made[stem + part] for part in "qkv"])
    assert torch.allclose(parts, wanted[f"diffusion_model.{next(iter(modules))}"])
    shift, scale = wanted["diffusion_model.final_layer.adaLN_modulation.1"].chunk(2)
    turned, name = torch.cat([scale, shift]), "transformer.norm_out.linear"
    assert torch.allclose(made[name], turned)
    assert not torch.allclose(applied({k: t for k, t in theirs.items() if name in k})[name], turned)


def every(blocks: int, singles: int) -> Modules:
    """The attention of each block of a Flux.1, or of a HunyuanVideo, by diffusers' names."""
    out = {f"transformer_blocks.{i}.attn.to_{p}": (3072, 3072) for i in range(blocks) for p in ("q", "out.0")}
    return out | {f"single_transformer_blocks.{i}.attn.to_k": (3072, 3072) for i in range(singles)}


FLAT: Modules = {f"double_blocks.{i}.img_attn_qkv": (9216, 3072) for i in range(19)}


@pytest.mark.parametrize(
    ("tensors", "base", "alike"),
    [
        (pairs(every(19, 38), "transformer.", rank=1), "flux", False),
        (pairs(every(20, 40), "transformer.", rank=1), "hunyuan_video", False),
        (pairs(every(2, 2), "transformer.", rank=1), "flux", True),
        (pairs(every(19, 37), "transformer.", rank=1), "flux", True),
        (pairs(FLUX, "transformer."), "flux", True),
        (pairs(FLAT, "lora_unet_", DOWN_UP, 1.0, flat=True, rank=1), "flux", False),
        (musubi({"double_blocks.3.img_attn_qkv": (9216, 3072)}), "flux", True),
        (musubi({"double_blocks.18.img_attn_qkv": (9216, 3072)}), "flux", True),
        (musubi({"double_blocks.3.img_mlp.fc1": (12288, 3072)}), "hunyuan_video", False),
        (musubi({"double_blocks.3.img_mlp.0": (12288, 3072)}), "flux", False),
    ],
    ids=[
        "flux",
        "hunyuan",
        "two blocks",
        "all blocks but one",
        "first and last",
        "flat",
        "a flat one",
        "last",
        "fc1",
        "mlp.0",
    ],
)
def test_flux_and_hunyuan_video_are_told_apart(tensors: Tensors, base: str, alike: bool, tmp_path: Path) -> None:
    """By names, sizes and the number of blocks; where both fit alike, that is told."""
    found = ao.inspect(write(tmp_path / "a.safetensors", tensors))
    assert found.architecture.value == base
    told = [note for note in found.notes if "alike" in note and "hunyuan_video" in note]
    assert len(told) == alike
    assert not alike or found.architecture.certainty is Certainty.ASSUMED


@pytest.mark.parametrize("said", ["hunyuan-video/lora", "framepack/lora", "Flux.1-dev/lora", "anything"])
def test_what_a_header_says_of_modules_that_both_have(said: str, tmp_path: Path) -> None:
    """kohya-ss/musubi-tuner `utils/sai_model_spec.py` (`build_metadata`)."""
    tensors = pairs(every(2, 2), "lora_unet_", DOWN_UP, 1.0, flat=True, rank=1)
    found = ao.inspect(write(tmp_path / "a.safetensors", tensors, **{"modelspec.architecture": said}))
    assert found.dialect == "kohya-diffusers"
    named = said.startswith(("hunyuan", "framepack"))
    assert found.architecture.value == ("hunyuan_video" if named else "flux")
    assert (found.architecture.certainty is Certainty.ASSUMED) == (said == "anything")


CONFIG = {
    "_class_name": "HunyuanVideoTransformer3DModel",
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "text_embed_dim": 16,
    "pooled_projection_dim": 8,
    "rope_axes_dim": [4, 4, 4],
}


def test_the_class_of_diffusers_takes_what_we_write(tmp_path: Path) -> None:
    """A small one, built from its config: the authors' names are known for it, too, and every update reaches its module."""
    model_class: Any = importlib.import_module("diffusers").HunyuanVideoTransformer3DModel
    model = model_class.from_config(CONFIG)
    base = tmp_path / "config.json"
    base.write_text(json.dumps(CONFIG))
    modules: Modules = {"double_blocks.0.img_attn_proj": (24, 24), "single_blocks.0.linear1": (168, 24)}
    modules = {**modules, "final_layer.adaLN_modulation.1": (48, 24)}
    path = write(tmp_path / "a.safetensors", {key: t.float() for key, t in comfy(modules).items()})
    ao.convert(path, "diffusers", tmp_path / "b.safetensors", base=base)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_lora_adapter(load_file(tmp_path / "b.safetensors"), prefix="transformer")
    model.fuse_lora()
    model.unload_lora()
    change = {name: value - before[name] for name, value in model.state_dict().items()}
    wanted = {name.removeprefix("diffusion_model."): delta for name, delta in deltas(load_file(path)).items()}
    stem = "single_transformer_blocks.0."
    own = (f"{stem}attn.to_q.weight", f"{stem}attn.to_k.weight", f"{stem}attn.to_v.weight", f"{stem}proj_mlp.weight")
    made = torch.cat([change.pop(key) for key in own])
    assert torch.allclose(made, wanted["single_blocks.0.linear1"], atol=1e-5)
    made = change.pop("transformer_blocks.0.attn.to_out.0.weight")
    assert torch.allclose(made, wanted["double_blocks.0.img_attn_proj"], atol=1e-5)
    shift, scale = wanted["final_layer.adaLN_modulation.1"].chunk(2)
    assert torch.allclose(change.pop("norm_out.linear.weight"), torch.cat([scale, shift]), atol=1e-5)
    assert [key for key, value in change.items() if torch.any(value != 0)] == []


def test_diffusion_pipes_folder(tmp_path: Path) -> None:
    """Its keys in peft's file, beside peft's config, which names no module of the file."""
    folder = tmp_path / "a"
    folder.mkdir()
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 4,
        "target_modules": ["img_attn_qkv", "linear1", "linear2", "fc1"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    write(folder / "adapter_model.safetensors", diffusion_pipe(SOME), format="pt")
    found = ao.inspect(folder)
    assert (found.dialect, found.architecture.value) == ("diffusion-pipe", "hunyuan_video")
    ao.convert(folder, "comfy", tmp_path / "b.safetensors")
    same(load_file(tmp_path / "b.safetensors"), comfy(SOME))


def ltx(width: int, last: int, context: int) -> Modules:
    """Modules of an LTX-Video that its authors and diffusers call alike."""
    return {
        "transformer_blocks.0.attn1.to_q": (width, width),
        "transformer_blocks.0.attn1.to_out.0": (width, width),
        f"transformer_blocks.{last}.attn2.to_k": (width, context),
        f"transformer_blocks.{last}.ff.net.0.proj": (4 * width, width),
        f"transformer_blocks.{last}.ff.net.2": (width, 4 * width),
        "caption_projection.linear_1": (width, 4096),
        "proj_out": (128, width),
    }


LTX = {"ltx_2b": ltx(2048, 27, 2048), "ltx_13b": ltx(4096, 47, 4096)}
LTX_AROUND: Modules = {"patchify_proj": (2048, 128), "adaln_single.linear": (12288, 2048)}
LTX_FILES: dict[str, Callable[[Modules], Tensors]] = {
    # tdrussell/diffusion-pipe `models/ltx_video.py`; Lightricks/LTX-Video-Trainer `scripts/convert_checkpoint.py` (to Comfy).
    "comfy": comfy,
    # a-r-r-o-w/finetrainers, Lightricks/LTX-Video-Trainer `src/ltxv_trainer/trainer.py`.
    "diffusers": lambda modules: pairs(modules, "transformer."),
    "diffsynth": pairs,
    "kohya": musubi,
}


@pytest.mark.parametrize("base", LTX)
@pytest.mark.parametrize("dialect", LTX_FILES)
def test_files_of_ltx_video_come_back(base: str, dialect: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", LTX_FILES[dialect](LTX[base]))
    found = ao.inspect(path)
    assert (found.dialect, found.architecture.value) == (dialect, base)
    assert found.architecture.certainty is Certainty.DERIVED
    sound(path)
    comes_back(path, dialect, tmp_path, ("comfy", "kohya", "kohya-diffusers", "lycoris", "peft", "diffusers"))


def test_names_of_ltx_video_that_differ(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", comfy({**LTX["ltx_2b"], **LTX_AROUND}))
    assert ao.inspect(path).architecture.value == "ltx_2b"
    ao.convert(path, "diffusers", tmp_path / "b.safetensors")
    names = {key.partition(".lora_")[0] for key in load_file(tmp_path / "b.safetensors")}
    assert {"transformer.proj_in", "transformer.time_embed.linear"} <= names
    comes_back(path, "comfy", tmp_path, ("diffusers", "peft", "kohya"))


@pytest.mark.parametrize("dialect", ["comfy", "diffusers"])
def test_diffusers_converts_ltx_video_as_we_do(dialect: str, tmp_path: Path) -> None:
    """It puts its prefix in Comfy's place and renames nothing, which is right for the blocks."""
    agrees("LTXVideoLoraLoaderMixin", write(tmp_path / "a.safetensors", LTX_FILES[dialect](LTX["ltx_2b"])), tmp_path)


LTX_2: Modules = {
    "transformer_blocks.0.attn1.to_q": (4096, 4096),
    "transformer_blocks.47.ff.net.2": (4096, 16384),
    "transformer_blocks.0.audio_attn2.to_out.0": (2048, 2048),
    "transformer_blocks.47.audio_to_video_attn.to_q": (2048, 4096),
    "transformer_blocks.47.video_to_audio_attn.to_k": (2048, 4096),
    "transformer_blocks.1.audio_ff.net.0.proj": (8192, 2048),
    "audio_caption_projection.linear_1": (2048, 3840),
}
LTX_2_AROUND: Modules = {
    "patchify_proj": (4096, 128),
    "audio_patchify_proj": (2048, 128),
    "adaln_single.linear": (24576, 4096),
    "audio_adaln_single.emb.timestep_embedder.linear_1": (2048, 256),
    "av_ca_a2v_gate_adaln_single.linear": (4096, 4096),
    "av_ca_audio_scale_shift_adaln_single.linear": (8192, 2048),
}


@pytest.mark.parametrize("dialect", ["comfy", "diffusers"])
def test_files_of_ltx_2_come_back(dialect: str, tmp_path: Path) -> None:
    """ostris/ai-toolkit `extensions_built_in/diffusion_models/ltx2/ltx2.py` (`convert_lora_weights_before_save`): Comfy's."""
    path = write(tmp_path / "a.safetensors", LTX_FILES[dialect](LTX_2))
    found = ao.inspect(path)
    assert (found.dialect, found.architecture.value) == (dialect, "ltx_2")
    assert found.architecture.certainty is Certainty.DERIVED
    sound(path)
    comes_back(path, dialect, tmp_path, ("comfy", "kohya", "lycoris", "peft", "diffusers"))


def test_diffusers_converts_ltx_2_as_we_do(tmp_path: Path) -> None:
    agrees("LTX2LoraLoaderMixin", write(tmp_path / "a.safetensors", comfy({**LTX_2, **LTX_2_AROUND})), tmp_path)


def test_what_ltx_2_and_the_13b_share_is_told(tmp_path: Path) -> None:
    """An adapter of the video alone has the same names and sizes in both, and is converted alike."""
    modules = {name: shape for name, shape in LTX_2.items() if "audio" not in name}
    path = write(tmp_path / "a.safetensors", comfy(modules))
    found = ao.inspect(path)
    assert (found.architecture.value, found.architecture.certainty) == ("ltx_13b", Certainty.ASSUMED)
    assert any("fit ltx_13b and ltx_2, ltx_2_3 alike" in note for note in found.notes)
    said = ao.inspect(write(tmp_path / "b.safetensors", comfy(modules), ss_base_model_version="Lightricks/LTX-2"))
    assert (said.architecture.value, said.architecture.certainty) == ("ltx_2", Certainty.READ)
    for base in ("ltx_13b", "ltx_2"):
        ao.convert(path, "diffusers", tmp_path / f"{base}.safetensors", arch=base)
    same(load_file(tmp_path / "ltx_13b.safetensors"), load_file(tmp_path / "ltx_2.safetensors"))


OTHERS: dict[str, Modules] = {
    "another width": {f"double_blocks.{i}.img_attn_qkv": (9600, 3200) for i in range(20)},
    "Allegro": {f"transformer_blocks.{i}.attn1.to_q": (2304, 2304) for i in range(32)},
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("writer", [comfy, musubi])
def test_others_are_not_taken_for_them(name: str, writer: Callable[[Modules], Tensors], tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", writer(OTHERS[name]))
    assert ao.inspect(path).architecture.value is None
    with pytest.raises(ao.AdapterOpsError, match="none of the known base models"):
        ao.load(path)


def test_a_table_is_asked_for_by_its_name(tmp_path: Path) -> None:
    """Where the modules fit Flux.1 as well."""
    path = write(tmp_path / "a.safetensors", pairs(every(2, 2), "transformer.", rank=1))
    ao.convert(path, "comfy", tmp_path / "b.safetensors", arch="hunyuan_video")
    assert any("single_blocks.0.linear1" in key for key in load_file(tmp_path / "b.safetensors"))
    assert any("double_blocks.0.img_attn_proj" in key for key in load_file(tmp_path / "b.safetensors"))


def test_a_file_of_flux_is_not_merged_with_one_of_hunyuan_video(tmp_path: Path) -> None:
    """Names in diffusers' spelling are the same, and sizes: the authors' own, and the number of blocks, tell them apart."""
    blocks = {f"double_blocks.{i}.img_attn.qkv": (9216, 3072) for i in range(19)}
    blocks |= {f"single_blocks.{i}.linear1": (21504, 3072) for i in range(38)}
    flux = write(tmp_path / "flux.safetensors", pairs(blocks, "diffusion_model.", rank=1))
    other = {name.replace(".img_attn.qkv", ".img_attn_qkv"): shape for name, shape in blocks.items()}
    other |= {"double_blocks.19.img_attn_qkv": (9216, 3072), "single_blocks.39.linear1": (21504, 3072)}
    hunyuan = write(tmp_path / "hunyuan.safetensors", pairs(other, "diffusion_model.", rank=1))
    assert ao.inspect(flux).architecture.certainty is Certainty.ASSUMED  # Chroma has the same
    for sources in ([flux, hunyuan], [hunyuan, flux]):
        with pytest.raises(errors.UsageError, match="different base models"):
            ao.merge(sources, tmp_path / "out.safetensors", "cat")
    assert not (tmp_path / "out.safetensors").exists()


EMBEDDERS: Modules = {
    "txt_in.c_embedder.linear_2": (3072, 3072),
    "txt_in.t_embedder.mlp.2": (3072, 3072),
    "time_in.mlp.2": (3072, 3072),
}


@pytest.mark.parametrize("dialect", ["diffusion-pipe", "comfy-hunyuan", "comfy-down-hunyuan"])
def test_embedders_alone_are_found_again(dialect: str, tmp_path: Path) -> None:
    source = write(tmp_path / "a.safetensors", pairs(EMBEDDERS, "diffusion_model."))
    made = ao.convert(source, dialect, tmp_path / "b.safetensors")
    found = ao.inspect(made.path)
    assert (found.dialect, found.architecture.value) == (dialect, "hunyuan_video")
    back = ao.convert(made.path, "comfy", tmp_path / "c.safetensors")
    assert load_file(back.path).keys() == load_file(source).keys()
