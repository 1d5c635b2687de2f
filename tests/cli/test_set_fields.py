"""`--set`: what no reading takes and no config holds is refused by name, by every command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from outcome import Outcome
from safetensors.torch import save_file

import adapterops as ao
from adapterops.dialects.given import Given
from adapterops.errors import UsageError

KOHYA = Path(__file__).parents[2] / "fixtures" / "kohya-sd15.safetensors"
Command = Callable[..., Outcome]
STEM = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Path]:
    """A file without a config, one of diffusers without a header, and a PEFT folder."""
    plain = tmp_path / "plain.safetensors"
    stem = "transformer.transformer_blocks.0.attn.to_out.0"
    save_file({f"{stem}.lora_A.weight": torch.ones(2, 3072), f"{stem}.lora_B.weight": torch.ones(3072, 2)}, plain)
    folder = tmp_path / "folder"
    folder.mkdir()
    factors = {f"{STEM}.lora_A.weight": torch.ones(2, 8), f"{STEM}.lora_B.weight": torch.ones(8, 2)}
    save_file(factors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return {"kohya": KOHYA, "diffusers": plain, "peft": folder}


@pytest.mark.parametrize("field", ["nonsense=1", "task_type=CAUSAL_LM", "target_modules=null"])
@pytest.mark.parametrize("name", ["kohya", "diffusers"])
def test_inspect_refuses_what_reading_does_not_take(
    field: str, name: str, command: Command, sources: dict[str, Path]
) -> None:
    outcome = command("inspect", sources[name], "--set", field)
    assert outcome.code == 2
    assert f"--set {field.partition('=')[0]}" in outcome.err
    with pytest.raises(UsageError, match="--set"):
        ao.inspect(sources[name], fields={field.partition("=")[0]: None})


def test_inspect_takes_what_reading_takes(command: Command, sources: dict[str, Path]) -> None:
    assert command("inspect", sources["peft"], "--set", "lora_alpha=1").code == 0
    assert command("inspect", sources["peft"], "--set", "task_type=CAUSAL_LM").code == 0
    refused = command("inspect", sources["peft"], "--set", "lora_alfa=1")
    assert refused.code == 2
    assert "did you mean lora_alpha" in refused.err
    assert "it has alora_invocation_tokens, " in refused.err
    # The config that would be written takes them, whatever the file is.
    shown = command("inspect", KOHYA, "--config", "--set", "task_type=CAUSAL_LM")
    assert json.loads(shown.out)["unet"]["task_type"] == "CAUSAL_LM"


@pytest.mark.parametrize(
    ("name", "target", "field"),
    [
        ("kohya", "kohya", "nonsense=1"),
        ("kohya", "kohya", "task_type=CAUSAL_LM"),
        ("kohya", "diffusers", "nonsense=1"),
        ("kohya", "diffusers", "task_type=CAUSAL_LM"),
        ("diffusers", "kohya", "task_type=CAUSAL_LM"),
        ("kohya", "peft", "nonsense=1"),
    ],
)
@pytest.mark.parametrize("name_of", ["convert", "to-lora", "merge"])
def test_what_writes_refuses_what_does_nothing(
    name: str, target: str, field: str, name_of: str, command: Command, sources: dict[str, Path], tmp_path: Path
) -> None:
    inputs = [sources[name]] * (2 if name_of == "merge" else 1)
    more = ["--method", "cat"] if name_of == "merge" else []
    out = tmp_path / ("out" if target == "peft" else "out.safetensors")
    outcome = command(name_of, *inputs, *more, "--to", target, "-o", out, "--set", field, "--arch", _BASE[name])
    assert outcome.code == 2, outcome
    assert f"--set {field.partition('=')[0]}" in outcome.err
    assert not out.exists()


_BASE = {"kohya": "sd1", "diffusers": "flux"}


def test_a_lora_is_made_with_what_any_config_says(command: Command, tmp_path: Path) -> None:
    arguments = ("to-lora", KOHYA, "--to", "peft")
    kept = command(*arguments, "-o", tmp_path / "a", "--set", "task_type=FEATURE_EXTRACTION")
    assert kept.code == 0, kept
    assert (
        json.loads((tmp_path / "a" / "unet" / "adapter_config.json").read_text())["task_type"] == "FEATURE_EXTRACTION"
    )
    refused = command(*arguments, "-o", tmp_path / "b", "--set", "lora_dropout=0.1")
    assert refused.code == 2
    assert "it takes auto_mapping, base_model_name_or_path, inference_mode, revision, task_type" in refused.err


@pytest.mark.parametrize("target", ["peft", "loralib"])
def test_a_merge_is_read_with_fields_as_a_conversion_is(
    target: str, command: Command, sources: dict[str, Path], tmp_path: Path
) -> None:
    """Each source's alpha is 1 instead of 4; what came of both is not said to be."""
    out = tmp_path / ("merged" if target == "peft" else "merged.safetensors")
    folder = sources["peft"]
    outcome = command("merge", folder, folder, "--method", "cat", "--to", target, "-o", out, "--set", "lora_alpha=1")
    assert outcome.code == 0, outcome
    (update,) = ao.load(out)
    made = update.tensors["B"].torch() @ update.tensors["A"].torch()
    assert update.alpha is not None
    assert update.alpha.value is not None
    scale = update.alpha.value / update.tensors["A"].shape[0]
    assert torch.allclose(made * scale, torch.full((8, 8), 2 * 2 * 1 / 2))


def test_fields_remember_what_took_them() -> None:
    given = Given({"a": 1, "b": 2})
    assert "a" in given
    assert list(given.items()) == [("a", 1), ("b", 2)]
    assert (len(given), list(given), given.taken) == (2, ["a", "b"], ())
    assert given.get("c") is None
    assert given["b"] == 2
    assert given.taken == ("b",)
    assert {**given} == {"a": 1, "b": 2}
    assert set(given.taken) == {"a", "b"}


def test_what_reading_took_is_recorded(sources: dict[str, Path]) -> None:
    assert ao.load(sources["peft"], fields={"lora_alpha": 1}).provenance.given == ("lora_alpha",)
    assert ao.load(KOHYA, fields={"task_type": "CAUSAL_LM"}).provenance.given == ()


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ("lora_dropout=hello", 'lora_dropout is "hello", not a number'),
        ("lora_dropout=null", "lora_dropout is null, not a number"),
        ("inference_mode=maybe", 'inference_mode is "maybe", not true or false'),
        ("base_model_name_or_path=5", "base_model_name_or_path is 5, not a name"),
        ("auto_mapping=3", "auto_mapping is 3, not a table"),
        ("revision=1", "revision is 1, not a name"),
        ("trainable_token_indices=[1]", "the file holds no trained rows"),
        ("layers_to_transform=[0]", "a target_modules that is a pattern, which peft refuses"),
    ],
)
def test_a_config_that_peft_would_refuse_is_not_written(
    field: str, said: str, command: Command, sources: dict[str, Path], tmp_path: Path
) -> None:
    """What `validate` calls an error (C203, C245, C256) is not what `convert` makes."""
    out = tmp_path / "out"
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes((sources["peft"] / weights.name).read_bytes())
    outcome = command("convert", weights, "--to", "peft", "--alpha", "4", "--set", field, "-o", out)
    assert outcome.code == 2
    assert said in outcome.err
    assert not out.exists()


def test_a_config_with_a_list_of_layers_is_written_and_loads(
    command: Command, sources: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    fields = ["--set", "layers_to_transform=[0]", "--set", 'target_modules=["q_proj"]', "--set", "lora_dropout=0.1"]
    outcome = command("convert", sources["peft"], "--to", "peft", "-o", out, *fields)
    assert outcome.code == 0
    assert "derived anew" not in outcome.err + outcome.out
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["layers_to_transform"], config["target_modules"], config["lora_dropout"]) == ([0], ["q_proj"], 0.1)
    peft = pytest.importorskip("peft")
    assert peft.PeftConfig.from_pretrained(out).layers_to_transform == [0]


def test_two_alphas_that_differ_are_refused(command: Command, sources: dict[str, Path], tmp_path: Path) -> None:
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes((sources["peft"] / weights.name).read_bytes())
    options = ["--to", "peft", "-o", tmp_path / "out", "--set", "lora_alpha=16"]
    for source in (weights, sources["peft"]):
        outcome = command("convert", source, *options, "--alpha", "8")
        assert outcome.code == 2
        assert "--alpha 8 and --set lora_alpha=16" in outcome.err
    assert not (tmp_path / "out").exists()
    assert command("convert", weights, *options, "--alpha", "16").code == 0
