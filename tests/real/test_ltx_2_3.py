"""Adapters of LTX-2.3 as their trainers write them, and as their readers take them."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file
from test_hunyuan_ltx import agrees
from test_trainers import same, sound
from test_wan_z_image import Modules, comes_back, comfy, musubi
from trainers import Tensors, ai_toolkit, loha, lokr, pairs, write

import adapterops as ao
from adapterops.adapter import Certainty

BOTH: Modules = {
    "transformer_blocks.0.attn1.to_q": (4096, 4096),
    "transformer_blocks.47.ff.net.2": (4096, 16384),
    "transformer_blocks.47.audio_to_video_attn.to_q": (2048, 4096),
    "transformer_blocks.0.audio_attn2.to_out.0": (2048, 2048),
}
"""What LTX-2 has, too."""
OWN: Modules = {
    "transformer_blocks.0.attn1.to_gate_logits": (32, 4096),
    "transformer_blocks.1.audio_attn2.to_gate_logits": (32, 2048),
    "transformer_blocks.47.video_to_audio_attn.to_gate_logits": (32, 2048),
}
AROUND: Modules = {
    "patchify_proj": (4096, 128),
    "adaln_single.linear": (36864, 4096),
    "audio_adaln_single.linear": (18432, 2048),
    "prompt_adaln_single.linear": (8192, 4096),
    "audio_prompt_adaln_single.emb.timestep_embedder.linear_1": (2048, 256),
    "av_ca_v2a_gate_adaln_single.linear": (2048, 2048),
}
ALL: Modules = {**BOTH, **OWN}
ELSEWHERE = ("comfy", "comfy-down", "kohya", "lycoris", "peft", "diffusers")


@pytest.mark.parametrize(
    ("tensors", "dialect"),
    [
        (comfy({**ALL, **AROUND}), "comfy"),
        (musubi({**ALL, **AROUND}), "kohya"),
        (pairs(ALL, "transformer."), "diffusers"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_files_of_ltx_2_3_come_back(tensors: Tensors, dialect: str, tmp_path: Path) -> None:
    """ostris/ai-toolkit `extensions_built_in/diffusion_models/ltx2/ltx2.py` trains every linear layer: Comfy's names."""
    path = ai_toolkit(tmp_path / "a.safetensors", tensors)
    found = ao.inspect(path)
    assert (found.dialect, found.architecture.value) == (dialect, "ltx_2_3")
    assert found.architecture.certainty is Certainty.DERIVED
    sound(path)
    comes_back(path, dialect, tmp_path, ELSEWHERE)


def test_diffusers_converts_ltx_2_3_as_we_do(tmp_path: Path) -> None:
    agrees("LTX2LoraLoaderMixin", write(tmp_path / "a.safetensors", comfy({**ALL, **AROUND})), tmp_path)


def test_what_it_shares_with_ltx_2_is_told(tmp_path: Path) -> None:
    """Lightricks' own trainer takes attention alone: names and sizes are those of both, and the older one is taken."""
    path = write(tmp_path / "a.safetensors", comfy(BOTH))
    found = ao.inspect(path)
    assert (found.architecture.value, found.architecture.certainty) == ("ltx_2", Certainty.ASSUMED)
    assert any("fit ltx_2 and ltx_2_3 alike" in note for note in found.notes)
    for base in ("ltx_2", "ltx_2_3"):
        ao.convert(path, "diffusers", tmp_path / f"{base}.safetensors", arch=base)
    same(load_file(tmp_path / "ltx_2.safetensors"), load_file(tmp_path / "ltx_2_3.safetensors"))


@pytest.mark.parametrize(
    ("said", "base"),
    [("Lightricks/LTX-2", "ltx_2"), ("Lightricks/LTX-2.3", "ltx_2_3"), ("ltx2.3", "ltx_2_3"), ("ltx2.5", "ltx_2_3")],
)
def test_what_a_header_says_decides(said: str, base: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", comfy(BOTH), ss_base_model_version=said)
    found = ao.inspect(path).architecture
    assert (found.value, found.certainty) == (base, Certainty.READ)


@pytest.mark.parametrize("modules", [ALL, BOTH], ids=["all", "both have"])
def test_ai_toolkits_header_is_not_held_against_the_file(modules: Modules, tmp_path: Path) -> None:
    """It calls every LTX-2 `ltx2`."""
    path = write(tmp_path / "a.safetensors", comfy(modules), ss_base_model_version="ltx2")
    assert ao.inspect(path).architecture.value == ("ltx_2_3" if modules is ALL else "ltx_2")
    sound(path)


@pytest.mark.parametrize("method", ["lokr", "loha"])
def test_lycoris_methods_of_ltx_2_3(method: str, tmp_path: Path) -> None:
    made = lokr(ALL, "diffusion_model.", 8, 4, 2.0) if method == "lokr" else loha(ALL, "diffusion_model.", 1.0)
    path = write(tmp_path / "a.safetensors", made)
    assert ao.inspect(path).architecture.value == "ltx_2_3"
    comes_back(path, "comfy", tmp_path, ("kohya", "lycoris", "diffusers-lycoris", "peft"))
