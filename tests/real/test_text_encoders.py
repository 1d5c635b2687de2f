"""Adapters of a transformer and its text encoders as trainers write them, of bases whose encoders have tables and of others.

Sources: Nerogar/OneTrainer `modules/modelSaver/chroma/ChromaLoRASaver.py`, `modules/modelSaver/hunyuanVideo/
HunyuanVideoLoRASaver.py`, `modules/model/{Chroma,HunyuanVideo,Qwen}Model.py` (`lora_text_encoders`),
`modules/util/convert_lora_util.py`; kohya-ss/sd-scripts `networks/lora_flux.py` (`LORA_PREFIX_TEXT_ENCODER_T5`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from checks import comes_back, sound
from safetensors.torch import load_file
from trainers import DOWN_UP, QWEN, Modules, Tensors, clip, comfy, musubi, pairs, some, write

import adapterops as ao
from adapterops import errors
from adapterops.adapter import Certainty

T5: Modules = {
    "encoder.block.0.layer.0.SelfAttention.q": (4096, 4096),
    "encoder.block.23.layer.1.DenseReluDense.wi_0": (10240, 4096),
}
LLAMA: Modules = {
    "layers.0.self_attn.q_proj": (4096, 4096),
    "layers.31.self_attn.k_proj": (1024, 4096),
    "layers.31.mlp.gate_proj": (14336, 4096),
}
CHROMA: Modules = {
    "transformer_blocks.0.attn.to_q": (3072, 3072),
    "single_transformer_blocks.37.proj_mlp": (12288, 3072),
}
CHROMAS_OWN: Modules = {"double_blocks.0.img_attn.qkv": (9216, 3072), "single_blocks.37.linear2": (3072, 15360)}
HUNYUAN: Modules = {
    "transformer_blocks.0.attn.to_q": (3072, 3072),
    "single_transformer_blocks.0.proj_mlp": (12288, 3072),
}
HUNYUANS_OWN: Modules = {"double_blocks.0.img_attn_qkv": (9216, 3072), "single_blocks.0.linear1": (21504, 3072)}
CHROMA_SAYS = {"modelspec.architecture": "Chroma1/lora"}
HUNYUAN_SAYS = {"modelspec.architecture": "hunyuan-video/lora"}


def flat(modules: Modules, prefix: str) -> Tensors:
    """OneTrainer's and sd-scripts' flattened names, with alphas."""
    return pairs(modules, prefix, DOWN_UP, 1.0, flat=True, rank=2)


def peft(modules: Modules, prefix: str) -> Tensors:
    """peft's factors."""
    return pairs(modules, prefix, rank=2)


CLIP = clip("")
BUNDLE = {"bundle_emb.tok.llama": some(2, 4096), "bundle_emb.tok.clip_l": some(2, 768)}
FILES: dict[str, tuple[str, str, dict[str, str], Callable[[], Tensors]]] = {
    "Chroma, LEGACY": (
        *("chroma", "onetrainer", CHROMA_SAYS),
        lambda: flat(CHROMA, "lora_transformer_") | flat(T5, "lora_te_"),
    ),
    "Chroma, KOHYA": ("chroma", "kohya", {}, lambda: flat(CHROMAS_OWN, "lora_unet_") | flat(T5, "lora_te1_")),
    "Chroma, COMFY": (
        *("chroma", "comfy", CHROMA_SAYS),
        lambda: peft(CHROMAS_OWN, "diffusion_model.") | peft(T5, "text_encoders.t5xxl.transformer."),
    ),
    "Chroma, DIFFUSERS": ("chroma", "diffusers", {}, lambda: peft(CHROMA, "transformer.") | peft(T5, "text_encoder.")),
    "HunyuanVideo, LEGACY": (
        *("hunyuan_video", "onetrainer", HUNYUAN_SAYS),
        lambda: flat(HUNYUAN, "lora_transformer_") | flat(LLAMA, "lora_te1_") | flat(CLIP, "lora_te2_") | BUNDLE,
    ),
    "HunyuanVideo, one encoder": (
        *("hunyuan_video", "onetrainer", {}),
        lambda: flat(HUNYUAN, "lora_transformer_") | flat(LLAMA, "lora_te1_"),
    ),
    "HunyuanVideo, KOHYA": (
        *("hunyuan_video", "kohya", {}),
        lambda: flat(HUNYUANS_OWN, "lora_unet_") | flat(LLAMA, "lora_te1_") | flat(CLIP, "lora_te2_"),
    ),
    "HunyuanVideo, DIFFUSERS": (
        *("hunyuan_video", "diffusers", {}),
        lambda: peft(HUNYUAN, "transformer.") | peft(LLAMA, "text_encoder.") | peft(CLIP, "text_encoder_2."),
    ),
    "HunyuanVideo, as Comfy calls its Llama": (
        *("hunyuan_video", "comfy", {}),
        lambda: peft(HUNYUANS_OWN, "diffusion_model.") | peft(LLAMA, "text_encoders.llama.transformer.model."),
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_encoders_are_read_with_their_transformer(name: str, tmp_path: Path) -> None:
    base, dialect, header, make = FILES[name]
    tensors = make()
    path = write(tmp_path / "a.safetensors", tensors, **header)
    found = ao.inspect(path)
    assert (found.dialect, found.architecture.value, found.notes) == (dialect, base, ())
    assert found.architecture.certainty in (Certainty.DERIVED, Certainty.READ)
    sound(path)
    ao.save(ao.load(path), tmp_path / "same.safetensors")
    assert load_file(tmp_path / "same.safetensors").keys() == tensors.keys()
    elsewhere = ["kohya", "kohya-diffusers", "onetrainer"]
    elsewhere += [] if BUNDLE.keys() & tensors.keys() else ["diffusers-alpha", "diffusers", "peft"]
    elsewhere += ["comfy"] if base == "chroma" or not any("te2_" in k or "encoder_2" in k for k in tensors) else []
    comes_back(path, dialect, tmp_path, tuple(elsewhere))


@pytest.mark.parametrize(
    ("target", "prefix"),
    [
        ("kohya", "lora_te1_"),
        ("onetrainer", "lora_te_"),
        ("comfy", "text_encoders.t5xxl."),
        ("diffusers", "text_encoder."),
    ],
)
def test_chromas_encoder_is_called_as_its_readers_call_it(target: str, prefix: str, tmp_path: Path) -> None:
    """Comfy-Org/ComfyUI `comfy/lora.py` (`model_lora_keys_clip`): T5 without CLIP beside it is the first encoder."""
    path = write(tmp_path / "a.safetensors", flat(CHROMA, "lora_transformer_") | flat(T5, "lora_te_"))
    ao.convert(path, target, tmp_path / "b.safetensors", fold_alpha=True)
    assert sum(key.startswith(prefix) for key in load_file(tmp_path / "b.safetensors")) >= 2 * len(T5)


@pytest.mark.parametrize(("said", "base"), [("chroma/lora", "chroma"), ("flux-1-dev/lora", "flux")])
def test_sd_scripts_calls_either_t5_alike(said: str, base: str, tmp_path: Path) -> None:
    tensors = flat(CHROMAS_OWN, "lora_unet_") | flat(T5, "lora_te3_")
    path = write(tmp_path / "a.safetensors", tensors, **{"modelspec.architecture": said})
    found = ao.inspect(path)
    assert (found.architecture.value, found.architecture.certainty, found.notes) == (base, Certainty.READ, ())
    sound(path)
    ao.convert(path, "peft", tmp_path / "folder")
    encoder = "text_encoder" if base == "chroma" else "text_encoder_2"
    assert (tmp_path / "folder" / encoder / "adapter_model.safetensors").exists()


QWENS: Modules = {f"model.language_model.layers.{i}.self_attn.q_proj": (3584, 3584) for i in range(28)}
"""More modules than the transformer has in the file."""


@pytest.mark.parametrize("header", [{}, {"modelspec.architecture": "Qwen/Qwen-Image"}])
@pytest.mark.parametrize("written", ["dotted", "flat", "Comfy's"])
def test_an_encoder_without_a_table_does_not_hide_the_base(
    written: str, header: dict[str, str], tmp_path: Path
) -> None:
    """Two of the three modules of the transformer are Flux.1's, which has an encoder of that name."""
    parts = {
        "dotted": lambda: (peft(QWEN, "transformer."), peft(QWENS, "text_encoder.")),
        "flat": lambda: (flat(QWEN, "lora_transformer_"), flat(QWENS, "lora_te_")),
        "Comfy's": lambda: (peft(QWEN, "diffusion_model."), peft(QWENS, "text_encoders.qwen25_7b.transformer.")),
    }
    own, encoder = parts[written]()
    path = write(tmp_path / "a.safetensors", own | encoder, **header)
    with pytest.raises(errors.UnknownModule, match=r"qwen_image has no table of its text_encoder.*28.*--allow-drop"):
        ao.load(path)
    found = ao.inspect(path)
    assert (found.architecture.value, found.modules) == ("qwen_image", len(QWEN))
    assert any("not to be converted" in note and "text_encoder" in note for note in found.notes)
    assert {(f.rule.code, str(f.severity)) for f in ao.validate(path, ignore=["D601"])} == {("B303", "info")}
    left = ao.load(path, allow_drop=True)
    assert (left.architecture.value, set(left.provenance.dropped)) == ("qwen_image", encoder.keys())
    done = ao.convert(path, "kohya", tmp_path / "b.safetensors", allow_drop=True)
    assert set(done.dropped) == encoder.keys()
    assert ao.inspect(done.path).architecture.value == "qwen_image"


LTX: Modules = {"transformer_blocks.0.attn1.to_q": (4096, 4096), "transformer_blocks.47.ff.net.2": (4096, 16384)}
GEMMA: Modules = {"model.language_model.layers.0.self_attn.q_proj": (4096, 3840)}


def test_the_header_decides_between_bases_that_lack_the_encoder(tmp_path: Path) -> None:
    tensors = peft(LTX, "transformer.") | peft(GEMMA, "text_encoder.")
    header = {"modelspec.architecture": "ltxvideo2-dev/lora"}
    said = ao.load(write(tmp_path / "a.safetensors", tensors, **header), allow_drop=True)
    assert (said.architecture.value, said.architecture.certainty) == ("ltx_2", Certainty.READ)
    assert len(said.provenance.dropped) == 2
    either = ao.load(write(tmp_path / "c.safetensors", tensors, ss_base_model_version="ltx2"), allow_drop=True)
    assert (either.architecture.value, either.architecture.others) == ("ltx_2", ("ltx_2_3",))
    silent = ao.load(write(tmp_path / "b.safetensors", tensors), allow_drop=True)
    assert (silent.architecture.value, silent.architecture.certainty) == ("ltx_13b", Certainty.ASSUMED)
    assert any("ltx_2" in note and "alike" in note for note in silent.provenance.notes)
    assert len(silent.provenance.dropped) == 2


def test_the_encoders_modules_do_not_count_for_a_stranger(tmp_path: Path) -> None:
    """A transformer that nobody knows beside CLIP: no base is known by its encoder alone."""
    strange = {f"blocks.{i}.mixer.in_proj": (640, 320) for i in range(12)}
    path = write(tmp_path / "a.safetensors", flat(strange, "lora_unet_") | flat(CLIP, "lora_te1_"))
    assert ao.load(path).architecture.value is None
    for allow in (False, True):
        with pytest.raises(errors.UnknownArchitectureOfFile):
            ao.convert(path, "diffusers", tmp_path / "diffusers", allow_drop=allow)


def test_other_encoders_modules_are_not_t5s(tmp_path: Path) -> None:
    """Chroma has no CLIP: a file with both is Flux.1's, and one that says Chroma is told so."""
    tensors = flat(CHROMAS_OWN, "lora_unet_") | flat(CLIP, "lora_te1_")
    path = write(tmp_path / "a.safetensors", tensors, **CHROMA_SAYS)
    assert ao.inspect(path).architecture.value == "flux"
    assert {f.rule.name for f in ao.validate(path, ignore=["D601"])} == {"other-base"}


def test_a_broken_encoder_is_still_its_bases(tmp_path: Path) -> None:
    """The smallest Flux.2 has the same modules of the transformer, and no table of an encoder."""
    tensors = flat({f"double_blocks.{i}.img_attn.proj": (3072, 3072) for i in range(3)}, "lora_unet_")
    tensors |= flat({**CLIP, "text_model.encoder.layers.0.self_attn.x_proj": (768, 768)}, "lora_te1_")
    with pytest.raises(errors.UnknownModule, match=r"flux has no module '.*x_proj' in text_encoder"):
        ao.load(write(tmp_path / "a.safetensors", tensors))
    with pytest.raises(errors.UnknownModule, match="flux2_klein_4b has no table of its text_encoder"):
        ao.load(write(tmp_path / "b.safetensors", tensors, ss_base_model_version="flux2_klein_4b"))


@pytest.mark.parametrize("writer", [comfy, musubi])
def test_without_encoders_nothing_has_changed(writer: Callable[[Modules], Tensors], tmp_path: Path) -> None:
    found = ao.inspect(write(tmp_path / "a.safetensors", writer(CHROMAS_OWN)))
    assert (found.architecture.value, found.architecture.certainty) == ("flux", Certainty.ASSUMED)
