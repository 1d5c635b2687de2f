"""Validation of what stands on the Hub: the same findings as on the disk, for a few of its bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hub_server import Served, serving
from safetensors.torch import save_file
from sound import CONFIG, codes, diffusers_file, edit, found, kohya_file, load, peft_folder, set_config

import adapterops as ao
from adapterops.errors import UnreadableFile, UsageError
from adapterops.storage import hub, ranges
from adapterops.validation.fix import mend

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setattr(ranges, "PAUSES", (0.0, 0.0))
    monkeypatch.setattr(ranges, "TIMEOUT", 1.0)
    with serving(monkeypatch, tmp_path / "cache") as held:
        yield held


def files_of(path: Path) -> dict[str, bytes]:
    if path.is_file():
        return {path.name: path.read_bytes()}
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def large_folder(tmp_path: Path) -> Path:
    """50 MB of a LoRA on 32 layers."""
    folder = peft_folder(tmp_path, name="large")
    tensors = {}
    for layer in range(32):
        for module in ("q_proj", "v_proj"):
            stem = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(96, 1024) * 0.1
            tensors[f"{stem}.lora_B.weight"] = torch.randn(1024, 96) * 0.1
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | {"r": 96}))
    return folder


def test_a_header_is_enough_for_the_rules_that_need_no_more(server: Served, tmp_path: Path) -> None:
    folder = large_folder(tmp_path)
    server.files = files_of(folder)
    size = len(server.files[WEIGHTS])
    assert size > 50_000_000
    assert codes("hf://me/style", header_only=True) == codes(folder, header_only=True)
    assert server.total < 200_000
    server.sent.clear()
    report = ao.validate("hf://me/style")
    assert [f.code for f in report] == codes(folder)
    assert report.adapters[0].modules == 64
    assert server.sent[WEIGHTS] <= size * 1.01


@pytest.mark.parametrize("make", [peft_folder, kohya_file, diffusers_file])
def test_sound_adapters_are_sound_there_too(make: object, server: Served, tmp_path: Path) -> None:
    path = make(tmp_path)  # type: ignore[operator]
    server.files = files_of(path)
    assert codes("hf://me/style") == []
    size = sum(len(content) for name, content in server.files.items() if name.endswith(".safetensors"))
    assert sum(n for name, n in server.sent.items() if name.endswith(".safetensors")) <= size


def test_findings_name_the_file_there(server: Served, tmp_path: Path) -> None:
    folder = set_config(peft_folder(tmp_path), inference_mode=False)
    edit(folder, lambda t: {k: torch.full_like(v, torch.nan) if "layers.0" in k else v for k, v in t.items()})
    (folder / "README.md").unlink()
    server.files = files_of(folder)
    here, there = found(folder), found("hf://me/style")
    assert [(f.code, f.message) for f in there] == [(f.code, f.message) for f in here]
    for one, two in zip(here, there, strict=True):
        assert two.file == one.file.replace(str(folder), "hf://me/style")


def test_a_damaged_file_is_a_finding_and_not_cached(server: Served, tmp_path: Path) -> None:
    folder = peft_folder(tmp_path)
    server.files = files_of(folder)
    server.files[WEIGHTS] = server.files[WEIGHTS][:-10]
    (folder / WEIGHTS).write_bytes(server.files[WEIGHTS])
    here, there = found(folder), found("hf://me/style")
    assert [(f.code, f.message) for f in there] == [(f.code, f.message) for f in here]
    assert not list((tmp_path / "cache").rglob(WEIGHTS))


def test_several_adapters_of_one_repository(server: Served, tmp_path: Path) -> None:
    folder = peft_folder(tmp_path / "a")
    server.files = {f"checkpoint-{n}/{name}": content for n in (1, 2) for name, content in files_of(folder).items()}
    server.files |= files_of(kohya_file(tmp_path))
    report = ao.validate("hf://me/style", jobs=2)
    assert [a.path for a in report.adapters] == [
        "hf://me/style/sound.safetensors",
        "hf://me/style/checkpoint-1",
        "hf://me/style/checkpoint-2",
    ]
    assert report.findings == ()


@pytest.mark.parametrize("behave", ["403", "500", "cut", "stall", "range", "gzip"])
def test_what_is_not_handed_over_is_one_finding(behave: str, server: Served, tmp_path: Path) -> None:
    server.files = files_of(peft_folder(tmp_path))
    server.behave = behave
    (finding,) = found("hf://me/style")
    assert (finding.code, finding.file) == ("F090", f"hf://me/style/{WEIGHTS}")
    assert not finding.message.startswith("hf://")
    assert ao.validate("hf://me/style", ignore=["F"]).findings == ()


def test_the_connection_goes_after_the_header(server: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rules about values cannot be asked: that is said once, and what the header tells is told all the same."""
    folder = set_config(large_folder(tmp_path), inference_mode=False)
    server.files = files_of(folder)
    at, real = [0], ranges.RangeSource._request

    def request(self: ranges.RangeSource, start: int, stop: int, deadline: float) -> object:
        at[0] += 1
        if at[0] == 3:
            server.behave, server.redirect = "500", False
            self._address = self._url
        return real(self, start, stop, deadline)

    monkeypatch.setattr(ranges.RangeSource, "_request", request)
    report = found("hf://me/style")
    assert sorted(f.code for f in report) == ["C212", "F090"]


def test_a_config_that_is_not_handed_over(server: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.files = files_of(peft_folder(tmp_path))
    server.files["adapter_config.json"] += b" " * 10_000
    monkeypatch.setattr(hub, "MAX_TEXT", 5000)
    report = found("hf://me/style")
    assert [f.code for f in report] == ["F090"]
    assert any("only up to 5000" in f.message for f in report)


def test_a_card_that_is_not_handed_over(server: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.files = files_of(peft_folder(tmp_path))
    server.files["README.md"] += b" " * 10_000
    monkeypatch.setattr(hub, "MAX_TEXT", 5000)
    (finding,) = found("hf://me/style")
    assert finding.code == "F090"
    assert "hf://me/style/README.md: has" in finding.message


def test_a_pickle_too_long_to_be_downloaded(server: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = peft_folder(tmp_path)
    torch.save(load(folder / WEIGHTS)[0], folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    server.files = files_of(folder)
    assert codes("hf://me/style") == codes(folder)
    monkeypatch.setattr(hub, "MAX_FETCHED", 1000)
    server.files["adapter_model.bin"] += b"\0"
    server.commit = "b" * 40
    (finding,) = found("hf://me/style")
    assert finding.code == "F090"
    assert "hf download" in finding.message


def test_nothing_is_mended_there(server: Served, tmp_path: Path) -> None:
    server.files = files_of(set_config(peft_folder(tmp_path), inference_mode=False))
    (adapter,) = ao.validate("hf://me/style").adapters
    mended = mend(adapter)
    assert mended.done == ()
    assert "on the Hub, where nothing is changed" in mended.why[0]


def test_what_does_not_exist_is_wrong_usage_or_unreadable(server: Served, tmp_path: Path) -> None:
    server.files = files_of(peft_folder(tmp_path))
    with pytest.raises(UsageError, match="write hf://owner/repo"):
        ao.validate("hf://me")
    with pytest.raises(UnreadableFile, match="no file or folder"):
        ao.validate("hf://me/style/none.safetensors")
