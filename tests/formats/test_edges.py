"""Cases that real files bring and that a plain reading gets wrong."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import adapterops as ao
from adapterops.adapter import Certainty
from adapterops.errors import BrokenAdapter, CannotRepresent, Conflict, UsageError
from adapterops.methods import METHODS

FIXTURES = Path(__file__).parents[2] / "fixtures"
Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
K = Q.replace("to_q", "to_k")
FLAT = "lora_unet_" + Q.replace(".", "_")
FLAT_K = "lora_unet_" + K.replace(".", "_")
TE = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
Tensors = dict[str, torch.Tensor]


def kohya(stem: str, size: int = 320, rank: int = 4, alpha: float | None = None) -> Tensors:
    generator = torch.Generator().manual_seed(len(stem) + rank)
    out = {
        f"{stem}.lora_down.weight": torch.randn(rank, size, generator=generator),
        f"{stem}.lora_up.weight": torch.randn(size, rank, generator=generator),
    }
    return out if alpha is None else {**out, f"{stem}.alpha": torch.tensor(alpha)}


def peft_folder(folder: Path, modules: dict[str, tuple[int, float]], **config: Any) -> Path:
    """A PEFT folder of a lone model; module to (rank, alpha) must suit r=4, lora_alpha=8 or the config given."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, (rank, _) in modules.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, 320, generator=generator)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.randn(320, rank, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": [m.split(".")[-1] for m in modules]}
    (folder / "adapter_config.json").write_text(json.dumps({**fields, **config}))
    return folder


def write(tensors: Tensors, path: Path, **metadata: str) -> Path:
    save_file(tensors, path, metadata or None)
    return path


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora", "corda", "lora_ga"])
def test_an_adapter_of_a_changed_base_goes_nowhere_that_cannot_say_so(init: str, tmp_path: Path) -> None:
    source = peft_folder(tmp_path / "a", {Q: (4, 8)}, init_lora_weights=init)
    with pytest.raises(CannotRepresent, match="changed the base weights"):
        ao.convert(source, "kohya", tmp_path / "k.safetensors")
    result = ao.convert(source, "peft", tmp_path / "b")
    assert any(init in note for note in result.notes)
    assert json.loads((tmp_path / "b" / "adapter_config.json").read_text())["init_lora_weights"] == init


def test_a_dropped_key_takes_its_module_along(tmp_path: Path) -> None:
    """A `.scalar` changes what the factors mean, so keeping them without it would change the strength."""
    tensors = {**kohya(FLAT), **kohya(FLAT_K), f"{FLAT}.scalar": torch.tensor(0.5)}
    source = write(tensors, tmp_path / "k.safetensors")
    result = ao.convert(source, "diffusers", tmp_path / "d.safetensors", allow_drop=True)
    assert set(result.dropped) == {k for k in tensors if k.startswith(FLAT + ".")}
    assert {u.module for u in ao.load(result.path)} == {K}


def test_unknown_modules_can_be_dropped_by_name(tmp_path: Path) -> None:
    tensors = {**kohya(FLAT), **kohya(FLAT_K), **kohya("lora_unet_tower_0_query")}
    source = write(tensors, tmp_path / "k.safetensors")
    result = ao.convert(source, "diffusers", tmp_path / "d.safetensors", allow_drop=True)
    assert set(result.dropped) == {k for k in tensors if "tower" in k}


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CannotRepresent, match="nothing of it is left"):
        ao.convert(FIXTURES / "kohya-dora-input-sd15.safetensors", "peft", tmp_path / "out", allow_drop=True)
    assert not (tmp_path / "out").exists()


def test_copies_of_an_adapter_read_their_own_files(tmp_path: Path) -> None:
    source = write(kohya(FLAT), tmp_path / "k.safetensors")
    adapter = ao.load(source)
    tensor = next(iter(adapter)).tensors["A"]
    first = bytes(tensor.read())
    other = copy.deepcopy(adapter)
    assert bytes(next(iter(other)).tensors["A"].read()) == first
    del other
    with (tmp_path / "zeros").open("wb") as decoy:
        decoy.write(bytes(1 << 16))
        decoy.flush()
        assert bytes(tensor.read()) == first


def test_the_first_encoder_of_sdxl_alone_keeps_its_prefix(tmp_path: Path) -> None:
    source = write(kohya(TE, 768), tmp_path / "k.safetensors")
    adapter = ao.load(source)
    assert adapter.architecture.value == "sdxl"
    again = ao.save(adapter, tmp_path / "same.safetensors")
    assert load_file(again.path).keys() == load_file(source).keys()
    ao.save(adapter, tmp_path / "te", format="peft")
    back = ao.convert(tmp_path / "te", "kohya", tmp_path / "back.safetensors")
    assert {k.split(".")[0] for k in load_file(back.path)} == {TE}


@pytest.mark.parametrize("alpha", ["0", "nan", "None", "Dynamic", ""])
def test_header_alphas_that_say_nothing(alpha: str, tmp_path: Path) -> None:
    source = write(kohya(FLAT, alpha=2.0), tmp_path / "k.safetensors", ss_network_alpha=alpha)
    assert ao.convert(source, "peft", tmp_path / "out").proof is not None


def test_lycoris_rslora_is_no_conflict(tmp_path: Path) -> None:
    source = write(kohya(FLAT, alpha=4.0), tmp_path / "k.safetensors", ss_network_alpha="2")  # 2·√4
    assert ao.load(source).architecture.value == "sd1"


def test_alpha_speaks_for_modules_that_have_none(tmp_path: Path) -> None:
    source = write({**kohya(FLAT, alpha=2.0), **kohya(FLAT_K)}, tmp_path / "k.safetensors")
    found = {u.module: u.alpha for u in ao.load(source, alpha=8)}
    assert found[Q] is not None
    assert found[K] is not None
    assert (found[Q].value, found[Q].certainty) == (2.0, Certainty.READ)
    assert (found[K].value, found[K].certainty) == (8.0, Certainty.GIVEN)


@pytest.mark.parametrize("which", ["header", "config"])
def test_a_source_of_alpha_that_is_not_there(which: str, tmp_path: Path) -> None:
    source = write(kohya(FLAT, alpha=2.0), tmp_path / "k.safetensors")
    with pytest.raises(UsageError, match="no alpha"):
        ao.load(source, alpha=which)


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_an_alpha_that_is_no_number(alpha: float, tmp_path: Path) -> None:
    with pytest.raises(BrokenAdapter, match=r"alpha.*damaged"):
        ao.load(write(kohya(FLAT, alpha=alpha), tmp_path / "k.safetensors"))


@pytest.mark.parametrize("name", ["peft-rslora-bias", "peft-llama", "peft-dora"])
def test_folding_carries_every_part_of_an_update(name: str, tmp_path: Path) -> None:
    result = ao.convert(FIXTURES / name, "peft", tmp_path / "out", fold_alpha=True)
    assert result.proof is not None
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert not config["use_rslora"]
    for update in ao.load(tmp_path / "out"):
        assert update.alpha is None or update.alpha.value == update.tensors["B"].shape[1]


def test_folding_where_one_modules_scale_is_one_already(tmp_path: Path) -> None:
    """rsLoRA: α = 4 is scale 1 at rank 16 and √2 at rank 8; folded, no rule of scale may differ."""
    modules = {Q: (8, 4.0), K: (16, 4.0)}
    source = peft_folder(tmp_path / "a", modules, r=8, lora_alpha=4, rank_pattern={"to_k": 16}, use_rslora=True)
    assert ao.convert(source, "peft", tmp_path / "b", fold_alpha=True).proof is not None


def test_folding_alpha_zero(tmp_path: Path) -> None:
    source = write(kohya(FLAT, alpha=0.0), tmp_path / "k.safetensors")
    result = ao.convert(source, "diffusers-lora", tmp_path / "d.safetensors", fold_alpha=True)
    assert not load_file(result.path)[f"unet.{Q}.lora.up.weight"].any()


def test_a_folder_that_is_no_component(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    peft_folder(tmp_path / "train" / "checkpoint-10", {Q: (4, 8)})
    assert ao.load(tmp_path / "train").components == ("unet",)


def test_missing_alphas_stay_missing_there_and_back(tmp_path: Path) -> None:
    tensors = {**kohya(FLAT, alpha=2.0), **kohya(FLAT_K)}
    source = write(tensors, tmp_path / "k.safetensors")
    ao.convert(source, "peft", tmp_path / "there")
    back = ao.convert(tmp_path / "there", "kohya", tmp_path / "back.safetensors")
    assert load_file(back.path).keys() == tensors.keys()


def test_unusual_shapes_come_back(tmp_path: Path) -> None:
    """Factors without a convolution's kernel, and a magnitude without its column."""
    stem = "lora_unet_down_blocks_0_attentions_0_proj_in"
    tensors = {**kohya(stem), f"{stem}.dora_scale": torch.rand(320), f"{stem}.alpha": torch.ones(1, 1)}
    source = write(tensors, tmp_path / "k.safetensors")
    there = ao.convert(source, "diffusers", tmp_path / "d.safetensors")
    assert load_file(there.path)["unet.down_blocks.0.attentions.0.proj_in.lora_A.weight"].shape == (4, 320, 1, 1)
    back = load_file(ao.convert(there.path, "kohya", tmp_path / "back.safetensors").path)
    assert {k: t.shape for k, t in back.items()} == {k: t.shape for k, t in tensors.items()}
    assert all(torch.equal(t, back[k]) for k, t in tensors.items())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"lora_alpah": 16}, "did you mean lora_alpha"),
        ({"bias": "some"}, "must be one of none"),
        ({"task_type": "PAINTING"}, "must be one of"),
    ],
)
def test_fields_that_peft_does_not_have(fields: dict[str, Any], words: str, tmp_path: Path) -> None:
    source = peft_folder(tmp_path / "a", {Q: (4, 8)})
    with pytest.raises(UsageError, match=words):
        ao.convert(source, "peft", tmp_path / "b", fields=fields)


def test_fields_that_contradict_the_tensors(tmp_path: Path) -> None:
    source = write(kohya(FLAT, alpha=2.0), tmp_path / "k.safetensors")
    with pytest.raises(UsageError, match="--alpha"):
        ao.convert(source, "peft", tmp_path / "out", fields={"lora_alpha": 16})
    with pytest.raises(Conflict, match="would adapt modules of the base"):
        ao.convert(source, "peft", tmp_path / "out", fields={"target_modules": ["to_q"]})
    with pytest.raises(Conflict, match="no tensor"):
        ao.convert(source, "peft", tmp_path / "out", fields={"modules_to_save": ["conv_out"]})
    with pytest.raises(UsageError, match="neither kohya nor diffusers-lora"):
        ao.convert(source, "diffusers-lora", tmp_path / "out", fields={"task_type": "CAUSAL_LM"})
    assert not (tmp_path / "out").exists()


def test_a_hostile_entry_in_the_header_is_only_ignored(tmp_path: Path) -> None:
    for number, text in enumerate(
        ["[" * 100_000, "7", '{"config": {"unet": {"peft_type": "LOHA", "use_qalora": true}}}']
    ):
        source = write(kohya(FLAT, alpha=2.0), tmp_path / f"{number}.safetensors", adapterops=text)
        ao.convert(source, "peft", tmp_path / str(number))
        config = json.loads((tmp_path / str(number) / "adapter_config.json").read_text())
        assert config["peft_type"] == "LORA"
        assert "use_qalora" not in config


def test_a_pattern_that_would_take_for_ever_is_refused(tmp_path: Path) -> None:
    source = peft_folder(tmp_path / "a", {"a" * 60 + "!": (4, 8)}, target_modules="(a+)+")
    with pytest.raises(ao.AdapterOpsError, match="bounded time"):
        ao.load(source)


def test_flat_names_of_a_base_whose_class_lost_their_beginning(tmp_path: Path) -> None:
    from transformers import CLIPTextConfig

    config = CLIPTextConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=99
    )
    config.architectures = ["CLIPTextModel"]
    config.save_pretrained(tmp_path / "clip")
    stem = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    source = write(kohya(stem, 32, alpha=2.0), tmp_path / "k.safetensors")
    adapter = ao.load(source, base=tmp_path / "clip")
    assert next(iter(adapter)).module == "encoder.layers.0.self_attn.q_proj"
    assert load_file(ao.save(adapter, tmp_path / "same.safetensors").path).keys() == load_file(source).keys()


def test_a_changed_base_is_told_of_a_folder_of_components_too(tmp_path: Path) -> None:
    ao.convert(FIXTURES / "kohya-sd15.safetensors", "peft", tmp_path / "p")
    config = tmp_path / "p" / "unet" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "init_lora_weights": "olora"}))
    with pytest.raises(CannotRepresent, match="trained from olora"):
        ao.convert(tmp_path / "p", "kohya", tmp_path / "k.safetensors")


def test_a_lost_alpha_pattern_can_be_said(tmp_path: Path) -> None:
    source = FIXTURES / "peft-llama"
    config = json.loads((source / "adapter_config.json").read_text())
    assert config["alpha_pattern"]
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes((source / "adapter_model.safetensors").read_bytes())
    fields = {"alpha_pattern": config["alpha_pattern"]}
    ao.convert(weights, "peft", tmp_path / "out", alpha=config["lora_alpha"], fields=fields)

    def scales(path: Path) -> dict[str, float | None]:
        return {u.module: METHODS["lora"].scale(u) for u in ao.load(path)}

    assert scales(tmp_path / "out") == scales(source)
    assert len(set(scales(source).values())) > 1


def test_rslora_can_be_said(tmp_path: Path) -> None:
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes((FIXTURES / "peft-llama" / "adapter_model.safetensors").read_bytes())
    ao.convert(weights, "peft", tmp_path / "out", alpha=4, fields={"use_rslora": True})
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["lora_alpha"], config["use_rslora"]) == (4, True)
    assert all(
        METHODS["lora"].scale(u) == pytest.approx(4 / u.tensors["B"].shape[1] ** 0.5) for u in ao.load(tmp_path / "out")
    )


@pytest.mark.parametrize(
    "field", ["alpha_as", "alpha_absent", "shapes", "prefixes", "prefix", "adapter_name", "component"]
)
@pytest.mark.parametrize(
    "value", [3, "a", [1], None, True, {"x": 7}, {"x": {"A": "b"}}, ["F16", 3], ["F16", [1]]], ids=str
)
def test_what_a_stranger_says_was_carried_is_checked(field: str, value: Any, tmp_path: Path) -> None:
    carried = {"spelling": {d: {field: value} for d in ("kohya", "diffusers", "peft")}}
    source = FIXTURES / "diffusers-sd15.safetensors"
    with safe_open(source, "pt") as file:
        metadata = {**file.metadata(), "adapterops": json.dumps(carried)}
    save_file(load_file(source), tmp_path / "d.safetensors", metadata)
    adapter = ao.load(tmp_path / "d.safetensors")
    for target in ("kohya", "peft", None):
        result = ao.save(adapter, tmp_path / str(target), format=target)
        assert result.proof is not None
        assert result.proof.exact


def test_other_fields_of_a_diffusers_header_travel(tmp_path: Path) -> None:
    source = FIXTURES / "diffusers-sd15.safetensors"
    with safe_open(source, "pt") as file:
        metadata = file.metadata()
    fields = {**json.loads(metadata["lora_adapter_metadata"]), "unet.lora_dropout": 0.25}
    metadata["lora_adapter_metadata"] = json.dumps(fields)
    save_file(load_file(source), tmp_path / "d.safetensors", metadata)
    ao.convert(tmp_path / "d.safetensors", "kohya", tmp_path / "k.safetensors")
    ao.convert(tmp_path / "k.safetensors", "peft", tmp_path / "p")
    assert json.loads((tmp_path / "p" / "unet" / "adapter_config.json").read_text())["lora_dropout"] == 0.25
