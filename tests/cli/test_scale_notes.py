"""Scales that no file holds are told of wherever they are written down."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from outcome import Outcome
from safetensors.torch import load_file, save_file

Command = Callable[..., Outcome]

FIXTURES = Path(__file__).parents[2] / "fixtures"
ASSUMED = "none stored: readers of diffusers apply scale 1"


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """diffusers' file without the header that holds its alphas."""
    path = tmp_path / "bare.safetensors"
    save_file(load_file(FIXTURES / "diffusers-sd15.safetensors"), path)
    return path


def notes(outcome: Outcome) -> list[str]:
    assert outcome.code == 0, outcome.err
    return list(json.loads(outcome.out)["notes"])


def test_an_assumed_alpha_is_told_of_where_it_is_written(command: Command, bare: Path, tmp_path: Path) -> None:
    out = tmp_path / "kohya.safetensors"
    told = notes(command("convert", bare, "--to", "kohya", "-o", out, "--json"))
    assert sum(ASSUMED in note and "--alpha X" in note for note in told) == 1
    written = load_file(out)
    ranks = {key: len(written[key.replace(".alpha", ".lora_down.weight")]) for key in written if key.endswith(".alpha")}
    assert ranks == {key: float(written[key]) for key in ranks}


def test_nothing_is_told_where_none_is_assumed(command: Command, bare: Path, tmp_path: Path) -> None:
    whole = FIXTURES / "diffusers-sd15.safetensors"
    for name, arguments in {
        "stated": (whole, "--to", "kohya"),
        "said": (bare, "--to", "kohya", "--alpha", "2"),
        "as it was": (bare, "--to", "diffusers"),
    }.items():
        told = notes(command("convert", *arguments, "-o", tmp_path / f"{name}.safetensors", "--json"))
        assert not [note for note in told if "alpha" in note], name


def test_a_config_says_what_was_assumed_for_it(command: Command, bare: Path) -> None:
    shown = command("inspect", bare, "--config")
    assert shown.code == 0
    assert ASSUMED in shown.out + shown.err


def test_a_merge_names_the_file(command: Command, bare: Path, tmp_path: Path) -> None:
    other = FIXTURES / "kohya-sd15.safetensors"
    arguments = ("--method", "svd", "--rank", "4", "-o", tmp_path / "m.safetensors", "--json")
    told = [note for note in notes(command("merge", other, bare, *arguments)) if "alpha" in note]
    assert [note.startswith(f"{bare}: ") and ASSUMED in note for note in told] == [True]


@pytest.mark.parametrize(
    ("alpha", "words"), [("0", "the adapter changes nothing"), ("-4", "--alpha -4 turns the adapter's effect around")]
)
def test_odd_alphas_are_told_of(command: Command, bare: Path, tmp_path: Path, alpha: str, words: str) -> None:
    out = tmp_path / "out.safetensors"
    told = notes(command("convert", bare, "--to", "kohya", f"--alpha={alpha}", "-o", out, "--json"))
    assert any(words in note for note in told)
    assert {float(value) for key, value in load_file(out).items() if key.endswith(".alpha")} == {float(alpha)}


def test_an_alpha_of_0_in_a_config_is_told_of(command: Command, tmp_path: Path) -> None:
    """As verl's merger writes it where it does not know the training's; today's peft loads it and adds nothing."""
    folder = tmp_path / "verl"
    shutil.copytree(FIXTURES / "peft-llama", folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 0, "alpha_pattern": {}}))
    said = "alpha is 0 (" + str(path)
    for arguments in (("inspect", folder), ("convert", folder, "--to", "peft", "-o", tmp_path / "out")):
        (note,) = [note for note in notes(command(*arguments, "--json")) if "alpha" in note]
        assert note.startswith(said)
        assert "--alpha X" in note
    for at, said in enumerate((("--set", "lora_alpha=16"), ("--alpha", "16"))):
        out = tmp_path / str(at)
        assert not [
            n for n in notes(command("convert", folder, "--to", "peft", *said, "-o", out, "--json")) if "alpha" in n
        ]
        assert json.loads((out / "adapter_config.json").read_text())["lora_alpha"] == 16


def test_an_alpha_of_0_in_a_tensor_may_be_said(command: Command, tmp_path: Path) -> None:
    tensors = load_file(FIXTURES / "kohya-sd15.safetensors")
    silent = next(key for key in tensors if key.endswith(".alpha"))
    tensors[silent] = torch.zeros_like(tensors[silent])
    save_file(tensors, tmp_path / "a.safetensors")
    plain, said = (tmp_path / name for name in ("plain.safetensors", "said.safetensors"))
    (note,) = [
        n
        for n in notes(command("convert", tmp_path / "a.safetensors", "-o", plain, "--to", "kohya", "--json"))
        if "0" in n
    ]
    assert silent in note
    notes(command("convert", tmp_path / "a.safetensors", "-o", said, "--to", "kohya", "--alpha", "3", "--json"))
    tensors[silent] += 3
    found = load_file(said)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)
