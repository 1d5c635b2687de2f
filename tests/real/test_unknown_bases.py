"""Adapters of base models without a table, and with headers out of date: looked at, and refused with the reason."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
from trainers import DOWN_UP, FLUX, comfy, musubi, pairs, write

import adapterops as ao
from adapterops.cli.main import run
from adapterops.errors import AdapterOpsError, Conflict, UnknownArchitectureOfFile

LARGER = {
    **{f"double_blocks.{i}.img_attn_qkv": (9216, 3072) for i in range(24)},
    **{f"double_blocks.{i}.img_attn_proj": (3072, 3072) for i in range(24)},
    **{f"double_blocks.{i}.img_mlp.up": (12288, 3072) for i in range(24)},
    **{f"double_blocks.{i}.img_mlp.down": (3072, 12288) for i in range(24)},
    **{f"single_blocks.{i}.linear1": (21504, 3072) for i in range(48)},
}
"""Modules of an invented base: many of Flux.1's and HunyuanVideo's names, flattened, in their sizes."""
OWN_NAMES = {"trunk.0.mixing.wq": (2304, 2304), "trunk.27.widening.up": (9216, 2304)}
"""Modules of an invented base whose names no other has."""
ANOTHER_COSMOS = {"blocks.0.self_attn.q_proj": (3072, 3072), "blocks.35.mlp.layer2": (3072, 12288)}
FLUX_OF_ANOTHER_SIZE = {"double_blocks.0.img_attn.proj": (5120, 5120), "single_blocks.47.linear2": (5120, 20480)}


OWN = {"Comfy": comfy, "musubi-tuner": partial(musubi, rank=1)}
CASES = {
    "a Cosmos of no known size, Comfy": (comfy, ANOTHER_COSMOS, "fits none of the known base models"),
    "a larger one, musubi-tuner": (partial(musubi, rank=1), LARGER, "in none of the known base models"),
    "a Flux of no known size, Comfy": (comfy, FLUX_OF_ANOTHER_SIZE, "fits none of the known base models"),
}


@pytest.mark.parametrize("name", CASES)
def test_they_are_looked_at_and_refused(name: str, tmp_path: Path) -> None:
    writer, modules, said = CASES[name]
    path = write(tmp_path / "a.safetensors", writer(modules))
    found = ao.inspect(path)
    assert (found.architecture.value, found.modules) == (None, len(modules))
    assert [c.name for c in found.components] == ["denoiser"]
    assert list(found.components[0].scales) == [1.0]
    assert any(said in note and "not to be converted" in note for note in found.notes)
    with pytest.raises(AdapterOpsError, match=said):
        ao.convert(path, "peft", tmp_path / "peft")
    report = ao.validate(path, ignore=["D601"])
    assert {f.rule.code for f in report} == {"B303"}


@pytest.mark.parametrize("writer", OWN)
def test_own_names_are_kept_and_not_spelled_otherwise(writer: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", OWN[writer](OWN_NAMES))
    found = ao.inspect(path)
    assert (found.architecture.value, found.modules) == (None, len(OWN_NAMES))
    assert [c.name for c in found.components] == ["denoiser"]
    assert any("the base model is not known" in note and "--base CONFIG" in note for note in found.notes)
    for target in ("peft", "diffusers", "onetrainer", "lycoris", "xlabs", "kohya-diffusers"):
        with pytest.raises(UnknownArchitectureOfFile, match="in none of the known base models"):
            ao.convert(path, target, tmp_path / target)
        assert not (tmp_path / target).exists()
    assert {f.rule.code for f in ao.validate(path, ignore=["D601"])} == {"B303"}


def test_the_command_looks_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "a.safetensors", comfy(OWN_NAMES))
    run(["inspect", str(path), "--json"])
    assert json.loads(capsys.readouterr().out)["modules"] == len(OWN_NAMES)
    with pytest.raises(SystemExit) as stop:
        run(["inspect", str(path), "--config"])
    assert stop.value.code == 2
    assert "in none of the known base models" in capsys.readouterr().err


def test_a_broken_file_of_an_unknown_base_is_still_refused(tmp_path: Path) -> None:
    tensors = comfy(OWN_NAMES)
    del tensors["diffusion_model.trunk.0.mixing.wq.lora_A.weight"]
    path = write(tmp_path / "a.safetensors", tensors)
    with pytest.raises(AdapterOpsError):
        ao.inspect(path)


def test_a_header_out_of_date_does_not_hide_the_file(tmp_path: Path) -> None:
    """A merged or resized file that keeps its source's header: readers go by the tensors."""
    tensors = pairs(FLUX, "lora_transformer_", DOWN_UP, 4.0, flat=True)
    path = write(tmp_path / "a.safetensors", tensors, ss_network_alpha="8.0", ss_network_dim="16")
    found = ao.inspect(path)
    assert list(found.components[0].alphas) == [4.0]
    assert any("ss_network_alpha" in note for note in found.notes)
    with pytest.raises(Conflict, match="ss_network_alpha"):
        ao.convert(path, "peft", tmp_path / "peft")


@pytest.mark.parametrize(("target", "told"), [("comfy", True), ("kohya", True), ("peft", False), ("diffusers", False)])
def test_names_that_only_diffusers_uses_are_told_of(target: str, told: bool, tmp_path: Path) -> None:
    """The authors of DiT call `attn1.to_q` otherwise: Comfy would pass over it without a word."""
    config = {
        "_class_name": "DiTTransformer2DModel",
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 1,
    }
    base = tmp_path / "config.json"
    base.write_text(json.dumps({**config, "in_channels": 4, "out_channels": 4, "sample_size": 8}))
    path = write(tmp_path / "a.safetensors", pairs({"transformer_blocks.0.attn1.to_q": (16, 16)}, "transformer."))
    done = ao.convert(path, target, tmp_path / "out", base=base)
    assert any("no table has the authors' names" in note for note in done.notes) is told


@pytest.mark.parametrize("target", ["comfy", "kohya"])
def test_names_that_a_table_has_are_not(target: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", pairs(FLUX, "transformer."))
    done = ao.convert(path, target, tmp_path / "out", arch="flux")
    assert not any("authors" in note for note in done.notes)
