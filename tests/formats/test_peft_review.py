"""What a user of PEFT's formats met: the same bytes from every run, remedies that work, notes that are true."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import peft_models as pm
import pytest
import torch
from click.testing import CliRunner
from peft_zoo import LINE, Case, llama
from test_peft_methods import architecture_of

import adapterops as ao
from adapterops import errors
from adapterops.cli.main import main

TARGETS = ["wide", "square"]
LORA = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS)


def _folder(tmp_path: Path, config: Any, **changes: Any) -> Path:
    _, folder = Case(LINE, config).adapter(tmp_path / "original")
    return pm.folder_with(tmp_path / "source", pm.weights_of(folder), {**pm.config_of(folder), **changes})


def _alone(tmp_path: Path, config: Any, base: Any = LINE) -> Path:
    """The weights without their config."""
    _, folder = Case(base, config).adapter(tmp_path / "original")
    return pm.folder_with(tmp_path / "alone", pm.weights_of(folder)) / "adapter_model.safetensors"


# ---- the same bytes from every run --------------------------------------------------------------------------


def _in_a_process(seed: int, script: str, arguments: Sequence[str]) -> str:
    environment = {**os.environ, "PYTHONHASHSEED": str(seed)}
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], env=environment, capture_output=True, text=True, check=True
    ).stdout


_CONFIGS = """
import sys
from pathlib import Path
import adapterops as ao
from adapterops.cli.inspect import _configs
for source, arch in ((sys.argv[1], None), (sys.argv[2], "sd1")):
    adapter = ao.load(source, arch=arch, alpha=8)
    print(_configs(adapter, {})[0])
    place = Path(sys.argv[3]) / str(arch)
    ao.save(adapter, place, format="peft")
    print((place / "adapter_config.json").read_text())
"""


def _lora(folder: Path, shapes: dict[str, tuple[int, int]]) -> str:
    tensors = {}
    for name, (out, inputs) in shapes.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.ones(2, inputs)
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.ones(out, 2)
    return str(pm.folder_with(folder, tensors) / "adapter_model.safetensors")


def test_a_config_does_not_depend_on_the_order_of_sets(tmp_path: Path) -> None:
    names = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    unknown = {f"model.layers.{n}.{name}": (8, 8) for n in (2, 10, 11) for name in names}
    stem = "down_blocks.{}.attentions.{}.transformer_blocks.0.attn1.to_{}"
    known = {
        stem.format(block, at, x): (size, size)
        for block, size in enumerate((320, 640)) for at in (0, 1) for x in "qkv" if (block, at, x) != (0, 1, "k")
    }  # fmt: skip
    sources = [_lora(tmp_path / "unknown", unknown), _lora(tmp_path / "known", known)]
    told = [_in_a_process(seed, _CONFIGS, [*sources, str(tmp_path / f"out-{seed}")]) for seed in (1, 2, 3)]
    assert told[0] == told[1] == told[2]
    assert "(?:2|10|11)" in told[0]


# ---- remedies that work -------------------------------------------------------------------------------------


def test_hints_name_fields_that_the_config_has(tmp_path: Path) -> None:
    folder = _folder(tmp_path, peft.MissConfig(r=4, target_modules=TARGETS), r=8)
    with pytest.raises(errors.Conflict, match="--set r=4; convert") as refusal:
        ao.convert(folder, to="peft", output=tmp_path / "out")
    assert "rank_pattern" not in str(refusal.value)


@pytest.mark.parametrize(
    "config",
    [LORA, peft.MissConfig(r=4, target_modules=TARGETS), peft.LoKrConfig(r=2, alpha=4, target_modules=TARGETS)],
    ids=["lora", "miss", "lokr"],
)
def test_null_derives_r_anew(config: Any, tmp_path: Path) -> None:
    case = Case(LINE, config)
    model, folder = case.adapter(tmp_path / "original")
    r = pm.config_of(folder)["r"]
    source = pm.folder_with(tmp_path / "source", pm.weights_of(folder), {**pm.config_of(folder), "r": r + 1})
    with pytest.raises(errors.Conflict, match=f"--set r={r}"):
        ao.convert(source, to="peft", output=tmp_path / "out")
    ao.convert(source, to="peft", output=tmp_path / "out", fields={"r": None})
    assert pm.config_of(tmp_path / "out")["r"] == r
    assert pm.apart(case.outputs(model), case.outputs(pm.load(LINE(), tmp_path / "out"))) < 1e-6


def test_another_type_leaves_foreign_fields_out(tmp_path: Path) -> None:
    _, folder = Case(LINE, peft.DeloraConfig(r=4, target_modules=TARGETS)).adapter(tmp_path / "original")
    wrong = {**pm.config_of(folder), "peft_type": "LORA", "lora_alpha": 64, "megatron_core": "megatron.core"}
    source = pm.folder_with(tmp_path / "source", pm.weights_of(folder), wrong)
    with pytest.raises(errors.Conflict, match="--set peft_type=DELORA overrides it"):
        ao.convert(source, to="peft", output=tmp_path / "out")
    notes = ao.convert(source, to="peft", output=tmp_path / "out", fields={"peft_type": "DELORA"}).notes
    assert any("ignored: lora_alpha, megatron_core" in note for note in notes)
    written = pm.config_of(tmp_path / "out")
    assert written["peft_type"] == "DELORA"
    assert not {"lora_alpha", "megatron_core"} & written.keys()
    pm.load(LINE(), tmp_path / "out")


def test_an_unknown_type_is_named_by_its_tensors(tmp_path: Path) -> None:
    folder = _folder(tmp_path, LORA, peft_type="SUPERTUNINGS")
    with pytest.raises(errors.UnsupportedFormat, match="--set peft_type=LORA") as refusal:
        ao.convert(folder, to="peft", output=tmp_path / "out")
    assert "SUPERTUNING;" not in str(refusal.value)
    assert "mean SUPERTUNING" not in str(refusal.value)
    ao.convert(folder, to="peft", output=tmp_path / "out", fields={"peft_type": "LORA"})
    assert pm.config_of(tmp_path / "out")["peft_type"] == "LORA"


@pytest.mark.parametrize(("kind", "near"), [("VERRA", "VERA"), ("MAGIC", None), ("SUPERLORA", None)])
def test_an_unknown_type_of_unknown_tensors(kind: str, near: str | None, tmp_path: Path) -> None:
    tensors = {"base_model.model.wide.magic_wand": torch.ones(3)}
    source = pm.folder_with(tmp_path / "source", tensors, {"peft_type": kind})
    with pytest.raises(errors.UnsupportedFormat, match=f"peft_type is {kind}") as refusal:
        ao.load(source)
    assert ("did its writer mean" in str(refusal.value)) is (near is not None)
    assert near is None or f"--set peft_type={near}" in str(refusal.value)


def test_null_takes_an_unknown_field_out(tmp_path: Path) -> None:
    folder = _folder(tmp_path, LORA, quantum_mode=True)
    with pytest.raises(errors.UnsupportedFormat, match="--set quantum_mode=null takes it out"):
        ao.convert(folder, to="peft", output=tmp_path / "out")
    ao.convert(folder, to="peft", output=tmp_path / "out", fields={"quantum_mode": None})
    assert "quantum_mode" not in pm.config_of(tmp_path / "out")
    with pytest.raises(errors.UsageError, match="no such field"):
        ao.convert(folder, to="peft", output=tmp_path / "again", fields={"quantum_mood": None, "quantum_mode": None})


def test_a_group_size_that_does_not_divide(tmp_path: Path) -> None:
    folder = _folder(tmp_path, peft.RoadConfig(variant="road_2", group_size=4, target_modules=TARGETS), group_size=64)
    with pytest.raises(errors.BrokenAdapter, match=r"groups of 64.*--set group_size=N.*cannot tell which"):
        ao.convert(folder, to="peft", output=tmp_path / "out")
    ao.convert(folder, to="peft", output=tmp_path / "out", fields={"group_size": 4})
    pm.load(LINE(), tmp_path / "out")


# ---- mini or standard ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("r", [2, 4])
def test_blocks_of_one_width_may_be_mini(r: int, tmp_path: Path) -> None:
    config = peft.MissConfig(r=r, mini_r=2, init_weights="mini", target_modules=TARGETS)
    weights = _alone(tmp_path, config)
    adapter = ao.load(weights)
    assert any(note.startswith("unknown: init_weights") for note in adapter.provenance.notes)
    with pytest.raises(errors.UnknownFact, match=rf"\[{r}, 2\]: either every module has 2 outputs, or it is mini"):
        ao.save(adapter, tmp_path / "out", format="peft")
    for place, said in (("a", {"fields": {"init_weights": "mini"}}), ("b", {"base": architecture_of(LINE())})):
        notes = ao.convert(weights, to="peft", output=tmp_path / place, **said).notes
        assert not [note for note in notes if "MiSS" in note]
        written = pm.config_of(tmp_path / place)
        assert (written["init_weights"], written["mini_r"]) == ("mini", 2)
        pm.load(LINE(), tmp_path / place)


def test_blocks_of_several_widths_are_standard(tmp_path: Path) -> None:
    weights = _alone(tmp_path, peft.MissConfig(r=4, target_modules=["wide", "tall", "square"]))
    notes = ao.convert(weights, to="peft", output=tmp_path / "out").notes
    assert any("taken for standard MiSS" in note for note in notes)
    assert pm.config_of(tmp_path / "out")["init_weights"] is True
    notes = ao.convert(weights, to="peft", output=tmp_path / "known", base=architecture_of(LINE())).notes
    assert not [note for note in notes if "taken for" in note]


# ---- notes that are true ------------------------------------------------------------------------------------


def test_fields_of_the_user_are_no_config(tmp_path: Path) -> None:
    weights = _alone(tmp_path, peft.HRAConfig(r=4, target_modules=TARGETS))
    notes = ao.convert(weights, to="peft", output=tmp_path / "out", fields={"apply_GS": True}).notes
    assert not [note for note in notes if "derived anew" in note]


def test_what_is_assumed_is_written_as_in_a_config(tmp_path: Path) -> None:
    weights = _alone(tmp_path, peft.HRAConfig(r=4, target_modules=TARGETS))
    assert any("apply_GS false" in note for note in ao.load(weights).provenance.notes)


@pytest.mark.parametrize(
    ("stated", "told"), [({}, "no peft_version in the config: if it is"), ({"peft_version": "0.17.1"}, "peft 0.17.1")]
)
def test_of_which_peft_an_oft_is(stated: dict[str, str], told: str, tmp_path: Path) -> None:
    config = peft.OFTConfig(r=0, oft_block_size=4, target_modules=TARGETS)
    _, folder = Case(LINE, config).adapter(tmp_path / "original")
    fields = {k: v for k, v in pm.config_of(folder).items() if k != "peft_version"} | stated
    source = pm.folder_with(tmp_path / "source", pm.weights_of(folder), fields)
    assert any(told in note and "term twice as large" in note for note in ao.load(source).provenance.notes)


@pytest.mark.parametrize(
    ("config", "base", "told"),
    [
        (LORA, LINE, "unknown: lora_alpha of LoRA.*--alpha X"),
        (peft.GraloraConfig(r=4, gralora_k=2, target_modules=TARGETS), LINE, "unknown: alpha of GraLoRA.*--alpha X"),
        (
            peft.TrainableTokensConfig(token_indices=[1, 2, 3], target_modules=["embed_tokens"]), llama,
            "unknown: token_indices, the 3 tokens",
        ),
    ],
    ids=["lora", "gralora", "tokens"],
)  # fmt: skip
def test_what_only_the_user_knows_is_listed(config: Any, base: Any, told: str, tmp_path: Path) -> None:
    weights = _alone(tmp_path, config, base)
    assert any(re.match(told, note) for note in ao.load(weights).provenance.notes)
    known = {"fields": {"token_indices": [1, 2, 3]}} if base is llama else {"alpha": 8}
    assert not [note for note in ao.load(weights, **known).provenance.notes if note.startswith("unknown")]


def test_a_wrong_block_size_of_boft_names_one_remedy(tmp_path: Path) -> None:
    folder = _folder(tmp_path, peft.BOFTConfig(boft_block_size=4, target_modules=TARGETS), boft_block_size=2)
    with pytest.raises(errors.Conflict, match="--set boft_block_size=4;") as refusal:
        ao.convert(folder, to="peft", output=tmp_path / "out")
    assert str(refusal.value).count("--set") == 1
    ao.convert(folder, to="peft", output=tmp_path / "out", fields={"boft_block_size": 4})
    pm.load(LINE(), tmp_path / "out")


def test_a_printed_config_says_what_it_assumes(tmp_path: Path) -> None:
    weights = _alone(tmp_path, peft.HRAConfig(r=4, target_modules=TARGETS))
    result = CliRunner().invoke(main, ["inspect", str(weights), "--config"])
    assert result.exit_code == 0
    assert "note: no config is beside the tensors: assumed" in result.stderr
    assert result.stdout.startswith("{")
    assert "note" not in result.stdout


# ---- loralib ------------------------------------------------------------------------------------------------


def test_parts_of_a_projection_are_asked_for_by_their_shapes(tmp_path: Path) -> None:
    path = tmp_path / "lora.pt"
    torch.save({"h.0.c_attn.lora_A": torch.ones(8, 32), "h.0.c_attn.lora_B": torch.ones(64, 4)}, path)
    told = r"tensor 'h.0.c_attn.lora_B'.*\[64, 4\] beside lora_A \[8, 32\]: 2 parts of 32 outputs each.*--set enable_lora='\["
    assert any(re.match(f"unknown: enable_lora: {told}", note) for note in ao.load(path).provenance.notes)
    with pytest.raises(errors.CannotRepresent, match=told) as refusal:
        ao.convert(path, to="peft", output=tmp_path / "out", alpha=8)
    assert str(refusal.value).startswith(str(path))
    given = {"enable_lora": [True, False, True]}
    ao.convert(path, to="peft", output=tmp_path / "out", alpha=8, fields=given)
    assert pm.config_of(tmp_path / "out")["r"] == 8


def test_triplets_scaled_by_several_numbers(tmp_path: Path) -> None:
    path, tensors = tmp_path / "lora.pt", {}
    for name, number in (("query", 3.0), ("value", 4.0)):
        tensors |= {f"bert.{name}.lora_A": torch.ones(3, 8), f"bert.{name}.lora_B": torch.ones(8, 3)}
        tensors |= {f"bert.{name}.lora_E": torch.ones(3, 1), f"bert.{name}.ranknum": torch.tensor(number)}
    torch.save(tensors, path)
    with pytest.raises(
        errors.CannotRepresent, match=r"divided by ranknum 3, and .* by 4; PEFT has one init_r"
    ) as refusal:
        ao.convert(path, to="peft", output=tmp_path / "out", alpha=8)
    assert "began" not in str(refusal.value)
