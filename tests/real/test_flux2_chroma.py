"""Adapters of Flux.2 (dev, klein 4B and 9B) and of Chroma as their trainers write them, and as their readers take them."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_trainers import same, sound
from trainers import DOWN_UP, FLUX, Shape, Tensors, ai_toolkit, loha, lokr, pairs, write

import adapterops as ao
from adapterops.errors import CannotRepresent, UnknownArchitectureOfFile, UnknownModule

Modules = Mapping[str, Shape]


def flux2(width: int, double: int, single: int) -> dict[str, Shape]:
    """Modules of a Flux.2 by its authors' names."""
    return {
        "double_blocks.0.img_attn.proj": (width, width),
        f"double_blocks.{double - 1}.txt_mlp.0": (6 * width, width),
        f"double_blocks.{double - 1}.img_mlp.2": (width, 3 * width),
        "single_blocks.0.linear1": (9 * width, width),
        f"single_blocks.{single - 1}.linear2": (width, 4 * width),
    }


BASES: dict[str, Modules] = {
    "flux2_dev": flux2(6144, 8, 48),
    "flux2_klein_4b": flux2(3072, 5, 20),
    "flux2_klein_9b": flux2(4096, 8, 24),
}
SMALL = BASES["flux2_klein_4b"]
AS_DIFFUSERS = {
    "double_blocks.0.img_attn.proj": "transformer_blocks.0.attn.to_out.0",
    "double_blocks.4.txt_mlp.0": "transformer_blocks.4.ff_context.linear_in",
    "double_blocks.4.img_mlp.2": "transformer_blocks.4.ff.linear_out",
    "single_blocks.0.linear1": "single_transformer_blocks.0.attn.to_qkv_mlp_proj",
    "single_blocks.19.linear2": "single_transformer_blocks.19.attn.to_out",
}
DIFFUSERS: Modules = {AS_DIFFUSERS[name]: shape for name, shape in SMALL.items()}
QKV: Modules = {f"double_blocks.1.{stream}_attn.qkv": (9216, 3072) for stream in ("img", "txt")}
AROUND: Modules = {
    "img_in": (3072, 128),
    "txt_in": (3072, 7680),
    "time_in.in_layer": (3072, 256),
    "time_in.out_layer": (3072, 3072),
    "double_stream_modulation_img.lin": (18432, 3072),
    "double_stream_modulation_txt.lin": (18432, 3072),
    "single_stream_modulation.lin": (9216, 3072),
    "final_layer.linear": (128, 3072),
}
ELSEWHERE = (
    *("comfy", "comfy-down", "comfy-diffusers", "kohya", "kohya-diffusers", "onetrainer", "lycoris"),
    *("diffusers", "diffusers-alpha", "diffusers-lycoris", "diffusers-down", "diffsynth", "peft"),
)


def comfy(modules: Modules) -> Tensors:
    """ostris/ai-toolkit `diffusion_models/flux2/flux2_model.py` (`convert_lora_weights_before_save`), tdrussell/diffusion-pipe
    `models/base.py` (`ComfyPipeline.save_adapter`)."""
    return pairs(modules, "diffusion_model.")


def musubi(modules: Modules) -> Tensors:
    """kohya-ss/musubi-tuner `networks/lora_flux_2.py`, `networks/lora.py`."""
    return pairs(modules, "lora_unet_", DOWN_UP, 1.0, flat=True)


def comes_back(path: Path, dialect: str, tmp_path: Path, elsewhere: tuple[str, ...] = ELSEWHERE, **fold: Any) -> None:
    """The file is the same after a way through every other dialect."""
    before = load_file(path)
    for name in elsewhere:
        there = tmp_path / name.replace("peft", "folder")
        done = ao.convert(path, name, there if name == "peft" else there.with_suffix(".safetensors"), **fold)
        assert done.proof is not None
        ao.convert(done.path, dialect, tmp_path / "back.safetensors", overwrite=True)
        same(load_file(tmp_path / "back.safetensors"), before)


@pytest.mark.parametrize("writer", [comfy, musubi])
@pytest.mark.parametrize("name", BASES)
def test_each_release_is_told_by_its_modules(name: str, writer: Any, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", writer(BASES[name]))
    found = ao.inspect(path)
    assert (found.dialect, found.architecture.value) == ("comfy" if writer is comfy else "kohya", name)
    assert str(found.architecture.certainty) == "derived"
    assert found.notes == ()
    sound(path)


@pytest.mark.parametrize(
    ("tensors", "dialect"),
    [
        (comfy(SMALL), "comfy"),
        (pairs(SMALL, "diffusion_model.", DOWN_UP, 2.0), "comfy-down"),
        (comfy(DIFFUSERS), "comfy-diffusers"),
        (musubi(SMALL), "kohya"),
        (pairs(SMALL, alpha=2.0), "onetrainer-original"),
        (pairs(DIFFUSERS, "lora_transformer_", DOWN_UP, 1.0, flat=True), "onetrainer"),
        (pairs(DIFFUSERS, "transformer.", DOWN_UP, 1.0), "diffusers-lycoris"),
        (pairs(DIFFUSERS, "transformer."), "diffusers"),
        (pairs(DIFFUSERS), "diffsynth"),
        (pairs(DIFFUSERS, "lycoris_", DOWN_UP, 1.0, flat=True), "lycoris"),
        (pairs(SMALL, "base_model.model."), "bfl-peft"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_spellings_come_back(tensors: Tensors, dialect: str, tmp_path: Path) -> None:
    path = ai_toolkit(tmp_path / "a.safetensors", tensors)
    found = ao.inspect(path)
    assert (found.dialect, found.architecture.value) == (dialect, "flux2_klein_4b")
    sound(path)
    plain = not any(key.endswith(".alpha") for key in tensors)
    no_scale = ("diffsynth",)
    comes_back(path, dialect, tmp_path, tuple(n for n in ELSEWHERE if n != dialect and (plain or n not in no_scale)))


def test_names_are_those_of_each_reader(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", comfy(SMALL))
    ao.convert(path, "diffusers", tmp_path / "b.safetensors")
    wanted = {}
    for key, tensor in comfy(SMALL).items():
        name = next(n for n in SMALL if f".{n}." in key)
        wanted[key.replace(f"diffusion_model.{name}", f"transformer.{AS_DIFFUSERS[name]}")] = tensor
    same(load_file(tmp_path / "b.safetensors"), wanted)
    ao.convert(path, "kohya", tmp_path / "c.safetensors")
    same(load_file(tmp_path / "c.safetensors"), pairs(SMALL, "lora_unet_", DOWN_UP, 4.0, flat=True))


def test_fused_projections_are_split_and_joined(tmp_path: Path) -> None:
    """The queries, keys and values of the double blocks are three modules of diffusers; those of the single blocks are one."""
    path = write(tmp_path / "a.safetensors", musubi({**QKV, "single_blocks.0.linear1": (27648, 3072)}))
    ao.convert(path, "diffusers", tmp_path / "b.safetensors", fold_alpha=True)
    keys = {key.removeprefix("transformer.").partition(".lora_")[0] for key in load_file(tmp_path / "b.safetensors")}
    attention = "transformer_blocks.1.attn."
    assert keys == {
        *(f"{attention}to_{p}" for p in "qkv"),
        *(f"{attention}add_{p}_proj" for p in "qkv"),
        "single_transformer_blocks.0.attn.to_qkv_mlp_proj",
    }
    comes_back(path, "kohya", tmp_path, ("diffusers-alpha", "diffusers-lycoris", "lycoris", "comfy", "peft"))


@pytest.mark.parametrize("method", ["lokr", "loha"])
def test_lycoris_methods(method: str, tmp_path: Path) -> None:
    """`toolkit/lora_special.py` of ai-toolkit writes LoKr behind `diffusion_model.`; of Flux.2 it is widely published."""
    made = lokr(SMALL, "diffusion_model.", 16, 4, 2.0) if method == "lokr" else loha(SMALL, "diffusion_model.", 1.0)
    path = write(tmp_path / "a.safetensors", made)
    found = ao.inspect(path)
    assert (found.dialect, found.architecture.value) == ("comfy", "flux2_klein_4b")
    sound(path)
    comes_back(path, "comfy", tmp_path, ("kohya", "lycoris", "diffusers-lycoris", "peft"))


def test_lokr_of_a_fused_projection_is_not_split(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", lokr({**QKV, **SMALL}, "diffusion_model.", 16, None, 1.0))
    comes_back(path, "comfy", tmp_path, ("kohya",))
    with pytest.raises(CannotRepresent, match=r"to_qkv.*cannot be cut.*--to comfy"):
        ao.convert(path, "diffusers-lycoris", tmp_path / "b.safetensors")


def test_lokr_that_diffusers_reads_is_not_reported(tmp_path: Path) -> None:
    """`Flux2LoraLoaderMixin` has a converter for each of these spellings; that of Flux.1 has none."""
    path = write(tmp_path / "a.safetensors", lokr(SMALL, "diffusion_model.", 16, None, 1.0))
    assert [
        f for f in ao.validate(path, targets=["diffusers"], ignore=["D601"]) if f.rule.name == "diffusers-lokr"
    ] == []
    path = write(tmp_path / "b.safetensors", lokr(FLUX, "transformer.", 16, None, 1.0))
    assert [f.rule.name for f in ao.validate(path, targets=["diffusers"]) if f.rule.code == "L523"] == [
        "diffusers-lokr"
    ]


def deltas(tensors: Tensors, inputs: int = 0) -> dict[str, torch.Tensor]:
    """What each module is changed by, in a file whose scales are 1: all of it, or what some random inputs become."""
    found = {}
    for key, down in tensors.items():
        stem = key.removesuffix(".lora_A.weight")
        if stem != key:
            numbers = torch.Generator().manual_seed(down.shape[1])
            seen = torch.randn(down.shape[1], inputs, generator=numbers) if inputs else torch.eye(down.shape[1])
            found[stem] = tensors[f"{stem}.lora_B.weight"].float() @ (down.float() @ seen)
    return found


def both(mixin: str, path: Path, tmp_path: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What our conversion, and diffusers' own, make of a file: the change of each module."""
    loaders: Any = importlib.import_module("diffusers.loaders.lora_pipeline")
    theirs = deltas(getattr(loaders, mixin).lora_state_dict(load_file(path)), 3)
    ao.convert(path, "diffusers", tmp_path / "ours.safetensors", fold_alpha=True, dtype="float32")
    return deltas(load_file(tmp_path / "ours.safetensors"), 3), theirs


@pytest.mark.parametrize("name", ["comfy", "kohya", "bfl-peft", "comfy-diffusers"])
def test_diffusers_converts_flux_2_as_we_do(name: str, tmp_path: Path) -> None:
    made = {
        "comfy": lambda: comfy({**SMALL, **QKV, **AROUND}),
        # Of the modules around the blocks it knows some by Kohya's names; musubi-tuner trains none of them.
        "kohya": lambda: musubi({**SMALL, **QKV}),
        "bfl-peft": lambda: pairs({**SMALL, **QKV}, "base_model.model."),
        "comfy-diffusers": lambda: comfy(DIFFUSERS),
    }[name]()
    path = write(tmp_path / "a.safetensors", made)
    assert ao.inspect(path).dialect == name
    ours, theirs = both("Flux2LoraLoaderMixin", path, tmp_path)
    assert set(ours) == set(theirs)
    assert [n for n, delta in ours.items() if not torch.allclose(delta, theirs[n], rtol=0.05, atol=0.1)] == []


def test_the_last_modulation_is_swapped(tmp_path: Path) -> None:
    """The authors' rows are shift and scale, diffusers' are scale and shift: its conversion of checkpoints turns them
    (`swap_scale_shift` in `loaders/single_file_utils.py`), its conversion of LoRAs, 0.42.1, forgets to."""
    last: Modules = {**SMALL, "final_layer.adaLN_modulation.1": (6144, 3072)}
    path = write(tmp_path / "a.safetensors", comfy(last))
    ours, theirs = both("Flux2LoraLoaderMixin", path, tmp_path)
    one, other = ours["transformer.norm_out.linear"], theirs["transformer.norm_out.linear"]
    assert torch.allclose(one, torch.cat([other[3072:], other[:3072]]), atol=0.1)
    assert not torch.allclose(one, other, atol=0.1)
    comes_back(path, "comfy", tmp_path, ("diffusers", "kohya", "peft", "lycoris"))


CONFIG = {
    "_class_name": "Flux2Transformer2DModel",
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "joint_attention_dim": 24,
    "timestep_guidance_channels": 16,
    "in_channels": 8,
    "axes_dims_rope": [4, 4, 4, 4],
}


def test_the_class_of_diffusers_takes_what_we_write(tmp_path: Path) -> None:
    """A small Flux.2, built from its config: the authors' names are known for it, too, and every update reaches its module."""
    model_class: Any = importlib.import_module("diffusers").Flux2Transformer2DModel
    model = model_class.from_config(CONFIG)
    base = tmp_path / "config.json"
    base.write_text(json.dumps(CONFIG))
    modules: Modules = {
        "double_blocks.0.txt_attn.proj": (32, 32),
        "double_blocks.0.img_mlp.0": (192, 32),
        "single_blocks.0.linear1": (288, 32),
        "guidance_in.in_layer": (32, 16),
        "final_layer.linear": (8, 32),
    }
    names = dict(
        zip(
            modules,
            (
                "transformer_blocks.0.attn.to_add_out",
                "transformer_blocks.0.ff.linear_in",
                "single_transformer_blocks.0.attn.to_qkv_mlp_proj",
                "time_guidance_embed.guidance_embedder.linear_1",
                "proj_out",
            ),
            strict=True,
        )
    )
    path = write(tmp_path / "a.safetensors", {key: t.float() for key, t in comfy(modules).items()})
    ao.convert(path, "diffusers", tmp_path / "b.safetensors", base=base)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_lora_adapter(load_file(tmp_path / "b.safetensors"), prefix="transformer")
    model.fuse_lora()
    model.unload_lora()
    after = model.state_dict()
    wanted = deltas(load_file(path))
    for name in modules:
        key = names[name] + ".weight"
        assert torch.allclose(after[key] - before.pop(key), wanted[f"diffusion_model.{name}"], atol=1e-5)
    assert [key for key, value in before.items() if not torch.equal(after[key], value)] == []


AUTHORS = {
    "transformer_blocks.0.attn.to_out.0": "double_blocks.0.img_attn.proj",
    "transformer_blocks.18.ff.net.0.proj": "double_blocks.18.img_mlp.0",
    "single_transformer_blocks.37.proj_out": "single_blocks.37.linear2",
}


@pytest.mark.parametrize("writer", [comfy, musubi])
def test_flux_1_stays_flux_1(writer: Any, tmp_path: Path) -> None:
    """klein 4B has the width of Flux.1 and its names: the MLPs, the single blocks and the number of blocks tell them apart."""
    path = write(tmp_path / "a.safetensors", writer({AUTHORS[name]: shape for name, shape in FLUX.items()}))
    assert ao.inspect(path).architecture.value == "flux"
    path = write(tmp_path / "b.safetensors", writer({"single_blocks.0.linear1": (21504, 3072)}))
    assert ao.inspect(path).architecture.value == "flux"
    path = write(tmp_path / "c.safetensors", writer({"double_blocks.0.img_mlp.0": (18432, 3072)}))
    assert ao.inspect(path).architecture.value == "flux2_klein_4b"


def test_what_fits_both_is_the_older_ones_with_a_note(tmp_path: Path) -> None:
    """A few attention modules alone are the same in both; so is what becomes of them, and `--arch` decides."""
    path = write(tmp_path / "a.safetensors", comfy({"double_blocks.0.img_attn.proj": (3072, 3072), **QKV}))
    found = ao.inspect(path)
    assert found.architecture.value == "flux"
    assert any("flux2_klein_4b alike" in note for note in found.notes)
    asked = ao.inspect(path, arch="flux2_klein_4b")
    assert (asked.architecture.value, asked.notes) == ("flux2_klein_4b", ())
    for arch in ("flux", "flux2_klein_4b"):
        ao.convert(path, "diffusers", tmp_path / f"{arch}.safetensors", arch=arch)
    same(*(load_file(tmp_path / f"{arch}.safetensors") for arch in ("flux", "flux2_klein_4b")))


@pytest.mark.parametrize("dialect", ["xlabs", "bfl"])
def test_what_only_flux_1_has_is_not_written_for_flux_2(dialect: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", comfy({"double_blocks.0.img_attn.proj": (6144, 6144)}))
    with pytest.raises(CannotRepresent):
        ao.convert(path, dialect, tmp_path / "b.safetensors")


def test_a_flux_2_of_no_known_size_is_not_taken_for_one(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", comfy(flux2(2048, 6, 30)))
    assert ao.inspect(path).architecture.value is None
    with pytest.raises(UnknownArchitectureOfFile, match="none of the known base models"):
        ao.load(path)


BLOCKS: Modules = {
    "double_blocks.0.img_attn.qkv": (9216, 3072),
    "double_blocks.18.txt_attn.proj": (3072, 3072),
    "double_blocks.18.img_mlp.0": (12288, 3072),
    "single_blocks.0.linear1": (21504, 3072),
    "single_blocks.37.linear2": (3072, 15360),
}
"""What Flux.1 and Chroma have alike."""
CHROMA: Modules = {
    **BLOCKS,
    "img_in": (3072, 64),
    "distilled_guidance_layer.in_proj": (5120, 64),
    "distilled_guidance_layer.layers.4.in_layer": (5120, 5120),
    "distilled_guidance_layer.layers.4.out_layer": (5120, 5120),
    "distilled_guidance_layer.out_proj": (3072, 5120),
    "final_layer.linear": (64, 3072),
}
MODULATED: Modules = {**BLOCKS, "double_blocks.3.img_mod.lin": (18432, 3072)}


def test_ai_toolkits_chroma_is_told_by_its_modules(tmp_path: Path) -> None:
    """`diffusion_models/chroma/chroma_model.py`: every linear layer, those of the network that makes modulations, too."""
    path = ai_toolkit(tmp_path / "a.safetensors", comfy(CHROMA))
    found = ao.inspect(path)
    assert (found.dialect, found.architecture.value, found.notes) == ("comfy", "chroma", ())
    sound(path)
    comes_back(path, "comfy", tmp_path, ("kohya", "kohya-diffusers", "lycoris", "diffusers", "comfy-diffusers", "peft"))
    ao.convert(path, "diffusers", tmp_path / "b.safetensors")
    layers = "transformer.distilled_guidance_layer.layers.4."
    keys = {key for key in load_file(tmp_path / "b.safetensors") if key.startswith(layers)}
    assert keys == {f"{layers}linear_{n}.lora_{f}.weight" for n in (1, 2) for f in "AB"}


@pytest.mark.parametrize(
    ("header", "base"),
    [
        # kohya-ss/sd-scripts `flux_train_network.py`, `library/sai_model_spec.py`, for either model type.
        ({"ss_base_model_version": "chroma", "modelspec.architecture": "chroma/lora"}, "chroma"),
        ({"ss_base_model_version": "flux1", "modelspec.architecture": "flux-1-dev/lora"}, "flux"),
        # Nerogar/OneTrainer `resources/sd_model_spec`.
        ({"modelspec.architecture": "Chroma1/lora"}, "chroma"),
        ({"modelspec.architecture": "Flux.1-dev/lora"}, "flux"),
        # ostris/ai-toolkit `toolkit/stable_diffusion_model.py` (`get_base_model_version`).
        ({"ss_base_model_version": "flux.1"}, "flux"),
    ],
)
def test_where_modules_fit_both_the_header_decides(header: dict[str, str], base: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", musubi(BLOCKS), **header)
    found = ao.inspect(path)
    assert (found.architecture.value, str(found.architecture.certainty), found.notes) == (base, "read", ())
    sound(path)
    ao.convert(path, "diffusers", tmp_path / "b.safetensors", fold_alpha=True)
    assert ao.inspect(tmp_path / "b.safetensors").architecture.value == base


@pytest.mark.parametrize(
    "header",
    [
        {},
        {"ss_base_model_version": "sdxl_base_v1-0"},
        {"modelspec.architecture": "chroma_radiance"},
        {"ss_base_model_version": "flux1", "modelspec.architecture": "chroma/lora"},
    ],
)
def test_without_a_telling_header_it_is_the_older_ones_with_a_note(header: dict[str, str], tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", musubi(BLOCKS), **header)
    found = ao.inspect(path)
    assert (found.architecture.value, str(found.architecture.certainty)) == ("flux", "assumed")
    assert any("flux and chroma alike" in note for note in found.notes)
    asked = ao.inspect(path, arch="chroma")
    assert (asked.architecture.value, asked.notes) == ("chroma", ())
    # Nothing depends on it: what becomes of the file is the same.
    for arch in ("flux", "chroma"):
        ao.convert(path, "diffusers", tmp_path / f"{arch}.safetensors", arch=arch, fold_alpha=True)
    same(*(load_file(tmp_path / f"{arch}.safetensors") for arch in ("flux", "chroma")))


def test_modules_go_before_the_header(tmp_path: Path) -> None:
    """Chroma has no modulation in its blocks; a header that says so is another's, and `validate` tells."""
    path = write(tmp_path / "a.safetensors", musubi(MODULATED), **{"modelspec.architecture": "chroma/lora"})
    found = ao.inspect(path)
    assert (found.architecture.value, str(found.architecture.certainty)) == ("flux", "derived")
    assert {f.rule.name for f in ao.validate(path, ignore=["D601"])} == {"other-base"}


def test_onetrainers_chroma_comes_back(tmp_path: Path) -> None:
    """`modelSaver/chroma/ChromaLoRASaver.py` (`_convert_legacy`), and what it bundles beside."""
    own: Modules = {
        "transformer_blocks.0.attn.to_q": (3072, 3072),
        "single_transformer_blocks.37.proj_mlp": (12288, 3072),
        "distilled_guidance_layer.layers.0.linear_1": (5120, 5120),
    }
    tensors = pairs(own, "lora_transformer_", DOWN_UP, 1.0, flat=True)
    path = write(tmp_path / "a.safetensors", tensors, **{"modelspec.architecture": "Chroma1/lora"})
    found = ao.inspect(path)
    assert (found.dialect, found.architecture.value) == ("onetrainer", "chroma")
    sound(path)
    comes_back(path, "onetrainer", tmp_path, ("kohya", "comfy", "diffusers-alpha", "lycoris", "diffusers", "peft"))


def test_diffusers_converts_chroma_as_we_do(tmp_path: Path) -> None:
    """ChromaPipeline is loaded by `FluxLoraLoaderMixin`."""
    path = write(tmp_path / "a.safetensors", musubi(BLOCKS), ss_base_model_version="chroma")
    ours, theirs = both("FluxLoraLoaderMixin", path, tmp_path)
    assert set(ours) == set(theirs)
    assert [n for n, delta in ours.items() if not torch.allclose(delta, theirs[n], rtol=0.05, atol=0.1)] == []


def test_chroma_radiance_is_not_taken_for_chroma(tmp_path: Path) -> None:
    """Its pixels go through blocks of their own (ai-toolkit `chroma/src/radiance.py`)."""
    radiance: Modules = {**CHROMA, "nerf_blocks.0.param_generator": (49152, 3072)}
    path = write(tmp_path / "a.safetensors", comfy(radiance))
    with pytest.raises(UnknownModule, match=r"chroma has no module 'nerf_blocks"):
        ao.load(path)
