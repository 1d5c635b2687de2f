"""What the commands print and write on sound input."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from outcome import Outcome
from safetensors import safe_open
from safetensors.torch import load_file

FIXTURES = Path(__file__).parents[2] / "fixtures"
KOHYA = FIXTURES / "kohya-sd15.safetensors"
Command = Callable[..., Outcome]


def test_the_readme_example(command: Command, tmp_path: Path) -> None:
    readme = (FIXTURES.parent / "README.md").read_text().splitlines()
    line = next(line for line in readme if line.startswith("./scripts/adapterops convert fixtures/"))
    arguments = line.split()[1:]
    assert arguments[1] == "fixtures/kohya-sd15.safetensors"
    outcome = command(arguments[0], KOHYA, *arguments[2:-1], tmp_path / "out")
    assert outcome.code == 0, outcome
    assert "proved" in outcome.out
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"unet", "text_encoder"}


def test_inspect_says_what_the_file_is(command: Command) -> None:
    outcome = command("inspect", KOHYA)
    assert outcome.code == 0
    for words in ("Kohya", "sd1 (derived", "unet", "text_encoder", "F16", "read", "metadata"):
        assert words in outcome.out


def test_inspect_json_agrees_with_the_tensors(command: Command) -> None:
    found = json.loads(command("inspect", KOHYA, "--json", "--norms", "--hash").out)
    tensors = load_file(KOHYA)
    downs = {k: t for k, t in tensors.items() if k.endswith(".lora_down.weight")}
    assert found["modules"] == len(downs)
    assert found["tensors"] == len(tensors)
    assert found["size"] == sum(t.nbytes for t in tensors.values())
    ranks: dict[str, int] = {}
    for component in found["components"]:
        for rank, count in component["ranks"].items():
            ranks[rank] = ranks.get(rank, 0) + count
    wanted: dict[str, int] = {}
    for tensor in downs.values():
        wanted[str(tensor.shape[0])] = wanted.get(str(tensor.shape[0]), 0) + 1
    assert ranks == wanted
    squares = 0.0
    for key, down in downs.items():
        stem = key.removesuffix(".lora_down.weight")
        up, alpha = tensors[f"{stem}.lora_up.weight"], float(tensors[f"{stem}.alpha"])
        delta = up.double().flatten(1) @ down.double().flatten(1) * alpha / down.shape[0]
        squares += float(delta.square().sum())
    assert sum(block["norm"] ** 2 for block in found["norms"].values()) == pytest.approx(squares)
    data = KOHYA.read_bytes()
    digest = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    assert found["hashes"][str(KOHYA)]["computed"] == digest


def test_inspect_config_is_what_convert_writes(command: Command, tmp_path: Path) -> None:
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes((FIXTURES / "peft-llama" / "adapter_model.safetensors").read_bytes())
    shown = json.loads(command("inspect", weights, "--config", "--alpha", 6).out)
    assert command("convert", weights, "--to", "peft", "--alpha", 6, "-o", tmp_path / "out").code == 0
    assert shown == json.loads((tmp_path / "out" / "adapter_config.json").read_text())


def test_inspect_needs_neither_torch_nor_numpy() -> None:
    code = (
        "import sys; from adapterops.cli.main import run\n"
        f"run(['inspect', {str(KOHYA)!r}])\n"
        "assert not {'torch', 'numpy', 'rich', 'diffusers'} & set(sys.modules), sorted(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_output_is_named_after_source_and_target(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command("convert", KOHYA, "--to", "peft").code == 0
    assert command("convert", KOHYA, "--to", "diffusers").code == 0
    assert command("convert", KOHYA, "--to", "diffusers", "-o", "folder").code == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "folder",
        "kohya-sd15-diffusers.safetensors",
        "kohya-sd15-peft",
    ]
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["pytorch_lora_weights.safetensors"]


def test_convert_json_accounts_for_every_key(command: Command, tmp_path: Path) -> None:
    outcome = command("convert", KOHYA, "--to", "diffusers", "-o", tmp_path / "d.safetensors", "--json")
    assert outcome.err == ""
    found = json.loads(outcome.out)
    assert found["proof"]["exact"]
    assert found["dropped"] == []
    assert len(load_file(tmp_path / "d.safetensors")) + len(found["folded"]) == len(load_file(KOHYA))
    assert set(found["folded"]) == {k for k in load_file(KOHYA) if k.endswith(".alpha")}


def test_the_same_input_gives_the_same_bytes(command: Command, tmp_path: Path) -> None:
    for name in ("a", "b"):
        command("convert", KOHYA, "--to", "diffusers", "-o", tmp_path / f"{name}.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_rounds_as_torch_does(dtype: torch.dtype, command: Command, tmp_path: Path) -> None:
    name = str(dtype).removeprefix("torch.")
    outcome = command("convert", KOHYA, "--to", "kohya", "--dtype", name, "-o", tmp_path / "x.safetensors", "--json")
    assert outcome.code == 0, outcome
    source, found = load_file(KOHYA), load_file(tmp_path / "x.safetensors")
    for key, tensor in source.items():
        if not key.endswith(".alpha"):
            assert torch.equal(found[key], tensor.to(dtype)), key
        assert float(found[key].flatten()[0]) == pytest.approx(float(tensor.to(dtype).flatten()[0]))


def test_fold_alpha_leaves_scale_one(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "d.safetensors"
    assert command("convert", KOHYA, "--to", "diffusers-lora", "-o", path).code == 2
    assert command("convert", KOHYA, "--to", "diffusers-lora", "--fold-alpha", "-o", path).code == 0
    with safe_open(path, "pt") as file:
        assert "lora_adapter_metadata" not in (file.metadata() or {})
    source, found = load_file(KOHYA), load_file(path)
    stem = "lora_unet_down_blocks_0_attentions_0_proj_in"
    wanted = source[f"{stem}.lora_up.weight"].float() * float(source[f"{stem}.alpha"]) / 4
    up = found["unet.down_blocks.0.attentions.0.proj_in.lora.up.weight"]
    assert torch.equal(up, wanted.to(up.dtype))


def test_a_debug_traceback_only_when_asked(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    for flags, traceback in (([], False), (["--debug"], True)):
        done = subprocess.run(
            [sys.executable, "-m", "adapterops.cli.main", *flags, "inspect", str(tmp_path / "x.safetensors")],
            capture_output=True,
            text=True,
            check=False,
        )
        assert ("Traceback" in done.stderr) is traceback


@pytest.mark.parametrize("name", ["formats", "architectures", "methods"])
def test_lists(name: str, command: Command) -> None:
    assert len(command(name).out.splitlines()) > 2
    assert len(json.loads(command(name, "--json").out)) > 2


def test_a_misspelt_command_is_guessed_at(command: Command) -> None:
    outcome = command("inspct")
    assert outcome.code == 2
    assert "Did you mean 'inspect'?" in outcome.err


@pytest.mark.parametrize("arguments", [["--help"], ["convert", "--help"], ["inspect", "--help"]])
def test_help_has_examples(arguments: list[str], command: Command) -> None:
    outcome = command(*arguments)
    assert outcome.code == 0
    assert "Examples:" in outcome.out


def test_help_keeps_its_examples_apart(command: Command) -> None:
    for name in ("convert", "inspect"):
        text = command(name, "--help").out
        assert "\\b" not in text
        assert f"\n    adapterops {name} style.safetensors" in text.replace("      ", "    ")


def test_norms_of_every_method(command: Command, tmp_path: Path) -> None:
    """Norms against those of the dense deltas; what has none is said."""
    import adapterops as ao
    from adapterops.methods import METHODS

    for name in ("lycoris-loha", "lycoris-lokr", "lycoris-full", "lycoris-ia3"):
        path, base = FIXTURES / "lycoris-sd15" / f"{name}.safetensors", FIXTURES / "lycoris-sd15"
        found = json.loads(command("inspect", path, "--base", base, "--norms", "--json").out)
        adapter = ao.load(path, base=base)
        if name == "lycoris-ia3":
            assert found["norms"] == {}
            assert any("leave out" in note and "(IA)³" in note for note in found["notes"])
            continue
        wanted: dict[str, float] = {}
        for update in adapter:
            if name == "lycoris-full":
                size = sum(float(t.torch().double().norm()) ** 2 for t in update.tensors.values())
            else:
                size = float(METHODS[update.method].delta(update).double().norm()) ** 2
            block = next(b for b in found["norms"] if f"{update.component}: {update.module}".startswith(b))
            wanted[block] = wanted.get(block, 0.0) + size
        assert found["norms"].keys() == wanted.keys()
        for block, square in wanted.items():
            assert abs(found["norms"][block]["norm"] - square**0.5) < 1e-5 * square**0.5


def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch, command: Command) -> None:
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in command("convert", "nothing.safetensors", "--to", "peft").err
    assert "\x1b" not in command("inspect", FIXTURES / "kohya-sd15.safetensors").out
