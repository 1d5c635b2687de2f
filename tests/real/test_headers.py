"""What a trainer's header calls the base, where few modules tell nothing; and files that mix spellings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checks import same, sound
from safetensors.torch import load_file
from trainers import AB, DOWN_UP, FLUX, Modules, Tensors, comfy, pairs, some, write

import adapterops as ao
from adapterops import errors
from adapterops.adapter import Certainty

FEW: Modules = {"double_blocks.3.img_attn.qkv": (9216, 3072), "double_blocks.3.img_mlp.0": (12288, 3072)}
"""By Comfy's own names of HunyuanVideo, which are Flux.1's and Chroma's."""
MODULATION: Modules = {"double_blocks.3.img_mod.lin": (18432, 3072)}
"""Of the same, which Chroma has not."""


@pytest.mark.parametrize("said", ["hunyuan-video/lora", "framepack/lora"])
@pytest.mark.parametrize("modules", [FEW, MODULATION], ids=["few", "modulation"])
@pytest.mark.parametrize("ends", [(".lora_A.weight", ".lora_B.weight"), DOWN_UP], ids=["A", "down"])
def test_few_blocks_by_comfys_names_of_hunyuan_video(
    said: str, modules: Modules, ends: tuple[str, str], tmp_path: Path
) -> None:
    tensors = pairs(modules, "diffusion_model.", ends, 2.0)
    path = write(tmp_path / "a.safetensors", tensors, **{"modelspec.architecture": said})
    found = ao.inspect(path)
    dialect = "comfy-hunyuan" if ends != DOWN_UP else "comfy-down-hunyuan"
    assert (found.dialect, found.architecture.value, found.notes) == (dialect, "hunyuan_video", ())
    assert found.architecture.certainty is Certainty.READ
    assert "header" in found.architecture.source
    sound(path)
    done = ao.convert(path, "kohya", tmp_path / "b.safetensors")
    assert all("_attn_qkv" in key or "fc1" in key or "mod_linear" in key for key in load_file(done.path))
    ao.convert(done.path, dialect, tmp_path / "c.safetensors")
    same(load_file(tmp_path / "c.safetensors"), tensors)


@pytest.mark.parametrize(
    ("said", "base"),
    [
        ("Flux.1-dev/lora", "flux"),
        ("Chroma1/lora", "chroma"),
        ("hunyuan-video/lora", "hunyuan_video"),
        ("flux_2_klein_4b/lora", "flux2_klein_4b"),
    ],
)
def test_whichever_it_names(said: str, base: str, tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.safetensors",
        comfy({"double_blocks.0.img_attn.proj": (3072, 3072)}),
        **{"modelspec.architecture": said},
    )
    found = ao.inspect(path)
    assert (found.architecture.value, found.architecture.certainty, found.notes) == (base, Certainty.READ, ())
    sound(path)


def test_one_that_may_be_several_rules_out_the_others(tmp_path: Path) -> None:
    """The two of Wan that image-to-video models of 2.2 may be; and what each header leaves of three."""
    wan: Modules = {"blocks.0.self_attn.q": (5120, 5120), "blocks.39.ffn.2": (5120, 13824)}
    found = ao.inspect(write(tmp_path / "a.safetensors", comfy(wan), ss_base_model_version="wan_2.2_14b"))
    assert (found.architecture.value, found.architecture.certainty, found.notes) == ("wan_14b", Certainty.READ, ())
    one: Modules = {"double_blocks.0.img_attn.proj": (3072, 3072)}
    header = {"ss_base_model_version": "chroma", "modelspec.architecture": "Flux.2/lora"}
    found = ao.inspect(write(tmp_path / "b.safetensors", comfy(one), **header))
    assert (found.architecture.value, found.architecture.others) == ("chroma", ("flux2_klein_4b",))
    assert found.notes == (
        "architecture: its modules fit chroma and flux2_klein_4b alike; chroma is taken (--arch decides)",
    )


def test_modules_go_before_the_header(tmp_path: Path) -> None:
    """HunyuanVideo has no `txt_in` of its own, but a refiner there."""
    modules = {**FEW, "txt_in": (3072, 4096)}
    path = write(tmp_path / "a.safetensors", comfy(modules), **{"modelspec.architecture": "hunyuan-video/lora"})
    found = ao.inspect(path)
    assert (found.dialect, found.architecture.value) == ("comfy", "flux")
    path = write(tmp_path / "b.safetensors", comfy({**modules, **MODULATION}), **found.metadata)
    assert {f.rule.name for f in ao.validate(path, ignore=["D601"])} == {"other-base"}


def test_a_conversions_record_goes_before_the_header(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", comfy(FEW), **{"modelspec.architecture": "hunyuan-video/lora"})
    ao.convert(path, "comfy", tmp_path / "b.safetensors", arch="flux")
    assert ao.inspect(tmp_path / "b.safetensors").architecture.value == "flux"


@pytest.mark.parametrize(
    ("said", "wrong"),
    [
        ("hunyuanvideo-community/HunyuanVideo", False),
        ("black-forest-labs/FLUX.1-dev", False),
        ("lodestones/Chroma", True),
        ("stabilityai/stable-diffusion-xl-base-1.0", True),
    ],
)
def test_a_card_that_names_what_the_keys_may_be_is_not_wrong(said: str, wrong: bool, tmp_path: Path) -> None:
    """It does not decide how they are read."""
    write(tmp_path / "adapter_model.safetensors", comfy(MODULATION))
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["lin"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "README.md").write_text(f"---\nbase_model: {said}\n---\n")
    assert ao.inspect(tmp_path).architecture.value == "flux"
    assert ("B304" in {f.rule.code for f in ao.validate(tmp_path)}) is wrong


@pytest.mark.parametrize(
    ("said", "base"), [("black-forest-labs/FLUX.1-dev", "flux"), ("lodestones/Chroma1-HD", "chroma"), ("other", "flux")]
)
def test_a_pefts_config_decides_as_a_header_does(said: str, base: str, tmp_path: Path) -> None:
    tensors = pairs({"transformer_blocks.0.attn.to_q": (3072, 3072)}, "base_model.model.")
    write(tmp_path / "adapter_model.safetensors", tensors)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["to_q"], "base_model_name_or_path": said}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    found = ao.inspect(tmp_path)
    certainty = Certainty.ASSUMED if said == "other" else Certainty.READ
    assert (found.architecture.value, found.architecture.certainty) == (base, certainty)
    assert "B304" not in {f.rule.code for f in ao.validate(tmp_path)}


AUTHORS: Modules = {"double_blocks.19.img_attn_qkv": (9216, 3072)}
COMFYS: Modules = {"double_blocks.0.img_attn.qkv": (9216, 3072)}
COMFYS_LAST: Modules = {"double_blocks.19.txt_attn.qkv": (9216, 3072)}
MIXTURES: dict[str, tuple[Tensors, type[errors.AdapterOpsError], str]] = {
    "two prefixes": (
        pairs(AUTHORS, "transformer.") | comfy(COMFYS),
        errors.AmbiguousFormat,
        r"2 keys of Comfy .*and 2 of HunyuanVideo's authors' names behind transformer",
    ),
    "two prefixes, the last block": (
        pairs(AUTHORS, "transformer.") | comfy(COMFYS_LAST),
        errors.AmbiguousFormat,
        r"HunyuanVideo's authors' names behind transformer.*Comfy's own names of HunyuanVideo",
    ),
    "two prefixes, the authors' names": (
        pairs(AUTHORS, "transformer.") | comfy({"double_blocks.0.img_attn_qkv": (9216, 3072)}),
        errors.AmbiguousFormat,
        r"holds two dialects",
    ),
    "diffusers' names": (
        comfy(AUTHORS) | pairs({"transformer_blocks.0.attn.to_q": (3072, 3072)}, "transformer."),
        errors.AmbiguousFormat,
        r"2 keys of Comfy .*and 2 of diffusers",
    ),
    "one prefix": (
        comfy(AUTHORS) | comfy(COMFYS),
        errors.UnknownModule,
        r"hunyuan_(video|image): the file mixes two spellings",
    ),
    "one prefix, the last block": (
        comfy(AUTHORS) | comfy(COMFYS_LAST),
        errors.UnknownModule,
        r"hunyuan_video has no module 'double_blocks.19.txt_attn.qkv'",
    ),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_mixed_spellings_are_told_of(name: str, tmp_path: Path) -> None:
    """No one of them is PEFT's, whose keys may begin in any way."""
    tensors, error, said = MIXTURES[name]
    path = write(tmp_path / "a.safetensors", tensors)
    for look in (ao.inspect, ao.load):
        with pytest.raises(error, match=said):
            look(path)
    assert any(f.severity.name == "ERROR" for f in ao.validate(path, ignore=["D601"]))


def test_a_language_model_with_such_prefixes_is_pefts(tmp_path: Path) -> None:
    """Two beginnings that dialects know, before names that no table has."""
    modules = {"transformer.h.0.attn.c_attn": (96, 32), "diffusion_model.h.0.proj": (32, 32)}
    found = ao.inspect(write(tmp_path / "a.safetensors", pairs(modules)), alpha=4.0)
    assert (found.dialect, found.modules) == ("peft", 2)


BIAS = "diffusion_model.double_blocks.0.img_mlp.0.diff_b"


def test_a_bias_that_the_base_has_not(tmp_path: Path) -> None:
    """No layer of Flux.2 has one: readers would pass over it (Comfy-Org/ComfyUI `comfy/lora.py`)."""
    tensors = comfy({"double_blocks.0.img_mlp.0": (18432, 3072)})
    path = write(tmp_path / "a.safetensors", tensors | {BIAS: some(18432)})
    with pytest.raises(errors.UnknownModule, match=r"img_mlp.0.diff_b.*linear_in of flux2_klein_4b has no bias"):
        ao.load(path)
    assert {f.rule.name for f in ao.validate(path, ignore=["D601"])} == {"unknown-module"}
    done = ao.convert(path, "comfy", tmp_path / "b.safetensors", allow_drop=True)
    assert done.dropped == (BIAS,)
    assert load_file(done.path).keys() == tensors.keys()


def test_a_bias_that_the_base_has(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", comfy({"double_blocks.0.img_mlp.0": (12288, 3072)}) | {BIAS: some(12288)})
    assert ao.load(path).architecture.value == "flux"


@pytest.mark.parametrize(
    "name", ["layers.{}.attention.qkv", "blocks.{}.self_attn.q_proj", "blocks.{}.attn.wq", "layers.{}.feed_forward.w1"]
)
def test_bare_names_that_a_base_has_in_another_size_are_peft_s(name: str, tmp_path: Path) -> None:
    modules = {name.format(n): (64, 64) for n in range(3)}
    path = write(tmp_path / "a.safetensors", pairs(modules, "", (".lora_A.weight", ".lora_B.weight")))
    done = ao.convert(path, "peft", tmp_path / "out", alpha=4)
    assert done.source_dialect == "peft"
    assert done.proof is not None
    assert done.proof.modules == 3


@pytest.mark.parametrize("ends", [(".lora_A.weight", ".lora_B.weight"), DOWN_UP], ids=["A", "down"])
@pytest.mark.parametrize(
    ("modules", "others"),
    [(FEW, ("chroma", "longcat_image", "hunyuan_video")), (MODULATION, ("longcat_image", "hunyuan_video"))],
    ids=["few", "modulation"],
)
def test_few_blocks_without_a_header_may_be_either(
    modules: Modules, others: tuple[str, ...], ends: tuple[str, str], tmp_path: Path
) -> None:
    path = write(tmp_path / "a.safetensors", pairs(modules, "diffusion_model.", ends, 2.0))
    found = ao.inspect(path)
    assert (found.architecture.value, found.architecture.certainty) == ("flux", Certainty.ASSUMED)
    assert found.architecture.others == others
    (note,) = found.notes
    assert f"fit flux and {', '.join(others)} alike" in note
    assert "--arch decides" in note
    for base in ("flux", "hunyuan_video"):
        ao.convert(path, "diffusers", tmp_path / f"{base}.safetensors", arch=base)
    same(load_file(tmp_path / "flux.safetensors"), load_file(tmp_path / "hunyuan_video.safetensors"))


def test_a_file_that_ends_where_flux_does_is_of_flux(tmp_path: Path) -> None:
    blocks: Modules = {f"double_blocks.{at}.img_mod.lin": (18432, 3072) for at in range(19)}
    found = ao.inspect(write(tmp_path / "a.safetensors", pairs(blocks, "diffusion_model.", rank=1)))
    assert (found.architecture.value, found.architecture.certainty, found.notes) == ("flux", Certainty.DERIVED, ())


@pytest.mark.parametrize("alpha", [2, 4])
def test_the_training_of_finetrainers(alpha: int, tmp_path: Path) -> None:
    """Its own loader applies alpha/r of the header's `lora_config`, diffusers scale 1: the latter is kept, and told of."""
    said = json.dumps({"r": 4, "lora_alpha": alpha, "init_lora_weights": True, "target_modules": ["to_q"]})
    path = write(tmp_path / "a.safetensors", pairs(FLUX, "transformer.", AB), lora_config=said)
    found = ao.inspect(path)
    assert found.components[0].scales == {1.0: len(FLUX)}
    assert any("--alpha header takes the training's" in note for note in found.notes) is (alpha != 4)
    ao.convert(path, "kohya", tmp_path / "b.safetensors", alpha="header")
    alphas = {float(t) for key, t in load_file(tmp_path / "b.safetensors").items() if key.endswith(".alpha")}
    assert alphas == {alpha}


@pytest.mark.parametrize("entry", ["not json", "[]", '{"lora_alpha": "two"}', '{"lora_alpha": true}'])
def test_another_programs_lora_config(entry: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", pairs(FLUX, "transformer.", AB), lora_config=entry)
    assert not any("finetrainers" in note for note in ao.inspect(path).notes)
    with pytest.raises(errors.UsageError, match="--alpha header, but the file has no alpha"):
        ao.load(path, alpha="header")
