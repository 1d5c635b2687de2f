"""What cannot be used gets one message (file, tensor, remedy), exit status 2, no traceback and no output."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from outcome import Outcome
from safetensors.torch import save_file

Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
FLAT = "lora_unet_" + Q.replace(".", "_")
Tensors = dict[str, torch.Tensor]


def pair(down: str, up: str, rank: int = 4, inputs: int = 320, outputs: int = 320) -> Tensors:
    return {down: torch.ones(rank, inputs), up: torch.ones(outputs, rank)}


def kohya(stem: str = FLAT, **shape: int) -> Tensors:
    return pair(f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", **shape)


def peft(module: str = "model.layers.0.self_attn.q_proj", **shape: int) -> Tensors:
    stem = f"base_model.model.{module}"
    return pair(f"{stem}.lora_A.weight", f"{stem}.lora_B.weight", **shape)


def without(tensors: Tensors, key: str) -> Tensors:
    return {k: v for k, v in tensors.items() if k != key}


def nan(tensors: Tensors) -> Tensors:
    key = next(iter(tensors))
    tensors[key] = tensors[key].clone()
    tensors[key][0, 0] = float("nan")
    return tensors


CASES: dict[str, tuple[Tensors, list[str]]] = {
    "textual inversion": ({"<cat>": torch.ones(1, 768)}, ["is an embedding", "'<cat>'"]),
    "sdxl textual inversion": (
        {"clip_l": torch.ones(4, 768), "clip_g": torch.ones(4, 1280)},
        ["is an embedding", "'clip_g'"],
    ),
    "full checkpoint": (
        {f"model.diffusion_model.input_blocks.{i}.0.weight": torch.ones(4, 4) for i in range(9)},
        ["looks like a model's own weights", "model.diffusion_model.input_blocks.0.0.weight"],
    ),
    "nothing known": ({"foo": torch.ones(2, 2, 2), "bar": torch.ones(3)}, ["no installed format knows its keys"]),
    "no tensors": ({}, ["holds no tensors"]),
    "A without B": (
        without(kohya(), f"{FLAT}.lora_up.weight"),
        [f"{FLAT}.lora_down.weight", "counterpart B is missing"],
    ),
    "B without A": (
        without(kohya(), f"{FLAT}.lora_down.weight"),
        [f"{FLAT}.lora_up.weight", "counterpart A is missing"],
    ),
    "alpha alone": (
        {**kohya(), "lora_unet_mid_block_attentions_0_proj_in.alpha": torch.tensor(4.0)},
        ["lora_unet_mid_block_attentions_0_proj_in.alpha", "an alpha without factors"],
    ),
    "rank mismatch": (
        {f"{FLAT}.lora_down.weight": torch.ones(4, 320), f"{FLAT}.lora_up.weight": torch.ones(320, 8)},
        [f"{FLAT}.lora_up.weight", "rank 8", "rank 4"],
    ),
    "alpha is a vector": ({**kohya(), f"{FLAT}.alpha": torch.ones(3)}, [f"{FLAT}.alpha", "one number"]),
    "NaN": (nan(kohya()), [f"{FLAT}.lora_down.weight", "NaN or infinity", "earlier checkpoint"]),
    "unknown module": (
        {**kohya(), **kohya(FLAT + "uery")},
        [
            f"{FLAT}uery.lora_down.weight",
            "sd1 has no module",
            "the nearest known",
            FLAT.removeprefix("lora_unet_"),
            "--base",
        ],
    ),
    "wrong shape": (
        {**kohya(), **kohya(FLAT.replace("to_q", "to_k"), inputs=333)},
        ["to_k.lora_down.weight", "[320, 320]", "--base CONFIG"],
    ),
    "another base": (
        kohya("lora_unet_towers_0_attend_query"),
        ["'towers_0_attend_query'", "adapterops architectures lists all", "--base CONFIG"],
    ),
    "two dialects": (
        {**kohya(), **pair(f"unet.{Q}.lora_A.weight", f"unet.{Q}.lora_B.weight")},
        ["holds two dialects", f"{FLAT}.lora_down.weight", f"unet.{Q}.lora_A.weight", "split"],
    ),
    "sgm and diffusers block names": (
        {
            **kohya("lora_unet_input_blocks_4_1_proj_in", inputs=640, outputs=640),
            **kohya("lora_unet_down_blocks_1_attentions_0_proj_in", inputs=640, outputs=640),
        },
        ["has no module", "proj_in"],
    ),
    "unknown alpha": (peft(), ["alpha of model: model.layers.0.self_attn.q_proj is unknown", "--alpha X"]),
    "unknown key": (
        {**kohya(), "mystery.tensor": torch.ones(2)},
        ["does not know 'mystery.tensor'", "--allow-drop"],
    ),
    "OFT of another width": (
        {f"{FLAT}.oft_R.weight": torch.ones(4, 6), f"{FLAT}.oft_R.scaled_oft": torch.tensor(1.0)},
        ["fits none of the known base models", f"{FLAT}.oft_R", "--base CONFIG"],
    ),
    "LoKr factor without its other half": (
        {f"{FLAT}.lokr_w1": torch.ones(4, 4), f"{FLAT}.alpha": torch.tensor(1.0)},
        [f"{FLAT}.lokr_w1", "w2"],
    ),
    "factors of two methods": (
        {**kohya(), f"{FLAT}.lokr_w1": torch.ones(4, 4), f"{FLAT}.lokr_w2": torch.ones(80, 80)},
        ["two methods", "split them into two files"],
    ),
    "Comfy's spelling of nothing known": (
        pair("diffusion_model.x.lora_A.weight", "diffusion_model.x.lora_B.weight"),
        ["'x'", "none of the known base models", "--base CONFIG"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_refused(case: str, command: Callable[..., Outcome], tmp_path: Path) -> None:
    tensors, words = CASES[case]
    source = tmp_path / "source.safetensors"
    save_file(tensors, source)
    outcome = command("convert", source, "--to", "peft", "-o", tmp_path / "out")
    assert outcome.code == 2, outcome
    assert outcome.out == ""
    assert outcome.err.startswith("error: ")
    assert "Traceback" not in outcome.err
    assert "fault of adapterops" not in outcome.err
    for word in [str(source), *words] if case != "two dialects" else words:
        assert word in outcome.err, (word, outcome.err)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source.safetensors"]


def test_missing_file(command: Callable[..., Outcome], tmp_path: Path) -> None:
    outcome = command("convert", tmp_path / "no.safetensors", "--to", "peft")
    assert (outcome.code, outcome.out) == (2, "")
    assert "no such file" in outcome.err


def test_folder_without_weights(command: Callable[..., Outcome], tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    outcome = command("inspect", tmp_path)
    assert outcome.code == 2
    assert "no weights" in outcome.err


def test_folder_of_checkpoints(command: Callable[..., Outcome], tmp_path: Path) -> None:
    for step in ("checkpoint-1", "checkpoint-2"):
        (tmp_path / step).mkdir()
        save_file(peft(), tmp_path / step / "adapter_model.safetensors")
    outcome = command("inspect", tmp_path)
    assert outcome.code == 2
    assert "several adapters (checkpoint-1, checkpoint-2)" in outcome.err


def test_config_that_is_no_json(command: Callable[..., Outcome], tmp_path: Path) -> None:
    save_file(peft(), tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{'r': 4}")
    outcome = command("inspect", tmp_path)
    assert outcome.code == 2
    assert "adapter_config.json: is not JSON" in outcome.err


def test_header_alpha_that_no_tensor_has(command: Callable[..., Outcome], tmp_path: Path) -> None:
    source = tmp_path / "k.safetensors"
    save_file({**kohya(), f"{FLAT}.alpha": torch.tensor(2.0)}, source, {"ss_network_alpha": "16"})
    outcome = command("convert", source, "--to", "diffusers", "-o", tmp_path / "d.safetensors")
    assert outcome.code == 2
    assert "ss_network_alpha is 16" in outcome.err
    assert "2.0 (read: tensor" in outcome.err
    arguments = ("convert", source, "--to", "diffusers", "-o", tmp_path / "d.safetensors", "--alpha")
    assert command(*arguments, "tensors").code == 0


def test_alpha_in_two_places(command: Callable[..., Outcome], tmp_path: Path) -> None:
    source = tmp_path / "k.safetensors"
    save_file({**kohya(), f"{FLAT}.alpha": torch.tensor(2.0)}, source)
    outcome = command("convert", source, "--to", "peft", "-o", tmp_path / "out", "--alpha", "8")
    assert outcome.code == 2
    assert "--alpha 8" in outcome.err
    assert "2" in outcome.err


def test_target_exists(command: Callable[..., Outcome], tmp_path: Path) -> None:
    source = tmp_path / "k.safetensors"
    save_file(kohya(), source)
    (tmp_path / "d.safetensors").write_text("mine")
    outcome = command("convert", source, "--to", "diffusers", "-o", tmp_path / "d.safetensors")
    assert outcome.code == 2
    assert "--overwrite" in outcome.err
    assert (tmp_path / "d.safetensors").read_text() == "mine"
    assert command("convert", source, "--to", "diffusers", "-o", tmp_path / "d.safetensors", "--overwrite").code == 0


def test_source_is_never_the_target(command: Callable[..., Outcome], tmp_path: Path) -> None:
    source = tmp_path / "k.safetensors"
    save_file(kohya(), source)
    before = source.read_bytes()
    outcome = command("convert", source, "--to", "kohya", "-o", source, "--overwrite")
    assert outcome.code == 2
    assert "is the source itself" in outcome.err
    assert source.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--to", "kohja"], ["unknown format 'kohja'", "known: adapterhub, clip-lora, cloneofsimo, "]),
        (["--to", "peft", "--from", "ggml"], ["unknown format 'ggml'"]),
        (["--to", "peft", "--from", "diffusers"], ["no key reads as diffusers"]),
        (["--to", "peft", "--arch", "sd9"], ["sd9", "did you mean", "adapterops architectures"]),
        (["--to", "peft", "--arch", "sd1", "--base", "x"], ["give one of them"]),
        (["--to", "peft", "--alpha", "much"], ["neither a number"]),
        (["--to", "peft", "--set", "r"], ["not FIELD=VALUE"]),
        (["--to", "peft", "--dtype", "int4"], ["unknown dtype 'int4'"]),
        (["--to", "kohya", "-o", "x.bin"], ["only safetensors are written"]),
        (["--to", "peft", "-o", "x.safetensors"], ["is a folder"]),
        ([], ["--to"]),
    ],
)
def test_wrong_usage(
    arguments: list[str],
    words: list[str],
    command: Callable[..., Outcome],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    save_file(kohya(), "k.safetensors")
    outcome = command("convert", "k.safetensors", *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    for word in words:
        assert word in outcome.err, outcome.err
    assert [p.name for p in tmp_path.iterdir()] == ["k.safetensors"]


def test_json_error_is_one_document(command: Callable[..., Outcome], tmp_path: Path) -> None:
    save_file(peft(), tmp_path / "adapter_model.safetensors")
    outcome = command("convert", tmp_path / "adapter_model.safetensors", "--to", "peft", "--json")
    assert outcome.code == 2
    assert json.loads(outcome.out)["error"]["kind"] == "UnknownFact"


def test_allow_drop_lists_what_it_loses(command: Callable[..., Outcome], tmp_path: Path) -> None:
    save_file({**kohya(), "mystery.tensor": torch.ones(2)}, tmp_path / "k.safetensors")
    outcome = command("convert", tmp_path / "k.safetensors", "--to", "peft", "-o", tmp_path / "out", "--allow-drop")
    assert outcome.code == 0, outcome
    assert "dropped: mystery.tensor" in outcome.out
