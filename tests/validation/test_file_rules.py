"""Names of files, shards and what stands beside an adapter."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from broken_files import Evil
from safetensors.torch import save_file
from sound import codes, diffusers_file, edit, found, kohya_file, load, peft_folder

from adapterops.validation.rules import files

A, B = "lora-00001-of-00002.safetensors", "lora-00002-of-00002.safetensors"
INDEX = "lora.safetensors.index.json"


def _other_name(tmp_path: Path, name: str = "model.safetensors") -> Path:
    folder = peft_folder(tmp_path)
    (folder / "adapter_model.safetensors").rename(folder / name)
    return folder


def sharded(tmp_path: Path, change: Callable[[dict[str, str]], Any] | None = None) -> Path:
    """A diffusers adapter in two shards; the index's table is changed by a function."""
    file = diffusers_file(tmp_path)
    tensors, _ = load(file)
    file.unlink()
    where = {key: A if "down_blocks.0" in key else B for key in tensors}
    for shard in (A, B):
        save_file({key: t for key, t in tensors.items() if where[key] == shard}, tmp_path / shard, {"format": "pt"})
    if change is not None:
        change(where)
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    return tmp_path / INDEX


def _lone(tmp_path: Path) -> Path:
    return diffusers_file(tmp_path).rename(tmp_path / A)


def _missing(tmp_path: Path) -> Path:
    path = sharded(tmp_path)
    (tmp_path / B).unlink()
    return path


def _outside(where: dict[str, str]) -> None:
    where[next(iter(where))] = "../../.ssh/id_rsa"


def _moved(where: dict[str, str]) -> None:
    where["unet.mid_block.to_q.lora_A.weight"] = A


def _linked(tmp_path: Path) -> Path:
    folder = peft_folder(tmp_path)
    weights = folder / "adapter_model.safetensors"
    weights.rename(tmp_path / "elsewhere.safetensors")
    weights.symlink_to(tmp_path / "elsewhere.safetensors")
    return folder


def _two(tmp_path: Path, factor: float = 2.0) -> Path:
    folder = peft_folder(tmp_path)
    tensors, _ = load(folder / "adapter_model.safetensors")
    torch.save({key: t * factor for key, t in tensors.items()}, folder / "adapter_model.bin")
    return folder


def _with(name: str, content: Callable[[Path], Any] = Path.touch) -> Callable[[Path], Path]:
    def make(tmp_path: Path) -> Path:
        folder = peft_folder(tmp_path)
        content(folder / name)
        return folder

    return make


def _without(name: str) -> Callable[[Path], Path]:
    def make(tmp_path: Path) -> Path:
        folder = peft_folder(tmp_path)
        (folder / name).unlink()
        return folder

    return make


def _empty(tmp_path: Path) -> Path:
    (tmp_path / "train.py").write_text("print()")
    return tmp_path


def _epochs(tmp_path: Path) -> Path:
    kohya_file(tmp_path)
    return kohya_file(tmp_path, "sound-000002.safetensors")


BROKEN: dict[str, Callable[[Path], Path]] = {
    "F040": _other_name,
    "F041": _without("adapter_model.safetensors"),
    "F042": _empty,
    "F043": _lone,
    "F044": _missing,
    "F045": lambda p: sharded(p, _outside),
    "F046": lambda p: sharded(p, _moved),
    "F047": _linked,
    "F048": _two,
    "F049": _with("classifier.pt", lambda p: torch.save({"0.weight": torch.ones(3, 8)}, p)),
    "F050": _with("optimizer.pt", lambda p: torch.save({"state": {}, "param_groups": []}, p)),
    "F051": _epochs,
}


@pytest.mark.parametrize("code", BROKEN)
def test_what_is_broken_is_found_and_nothing_else(code: str, tmp_path: Path) -> None:
    assert codes(BROKEN[code](tmp_path)) == [code]


def test_every_rule_is_broken_once() -> None:
    assert list(BROKEN) == sorted(rule.code for rule in files.RULES)


@pytest.mark.parametrize("name", ["model.safetensors", "Adapter_Model.safetensors", "lora.safetensors"])
def test_peft_finds_no_weights_of_another_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from peft.utils.save_and_load import load_peft_weights

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    folder = _other_name(tmp_path, name)
    with pytest.raises((OSError, ValueError)):
        load_peft_weights(str(folder), device="cpu")
    [finding] = found(folder)
    assert finding.code == "F040"
    assert finding.change is not None
    (folder / name).rename(folder / finding.change.rename)
    assert load_peft_weights(str(folder), device="cpu")
    assert codes(folder) == []


def test_peft_reads_no_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from peft.utils.save_and_load import load_peft_weights

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    folder = peft_folder(tmp_path)
    shard = "adapter_model-00001-of-00001.safetensors"
    (folder / "adapter_model.safetensors").rename(folder / shard)
    where = dict.fromkeys(load(folder / shard)[0], shard)
    (folder / "adapter_model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    assert codes(folder) == ["F040"]
    with pytest.raises((OSError, ValueError)):
        load_peft_weights(str(folder), device="cpu")


def test_one_shard_of_a_peft_adapter(tmp_path: Path) -> None:
    folder = _other_name(tmp_path, "adapter_model-00001-of-00002.safetensors")
    assert codes(folder) == ["F043"]


def test_a_shard_that_is_named_by_itself(tmp_path: Path) -> None:
    sharded(tmp_path)
    assert codes(tmp_path / A) == ["F043"]


@pytest.mark.parametrize("name", ["/etc/passwd", "..", "a/b.safetensors", "..\\x.safetensors", "", "a\0b"])
def test_paths_in_an_index(name: str, tmp_path: Path) -> None:
    path = sharded(tmp_path, lambda where: where.update(dict.fromkeys(where, name)))
    assert codes(path) == ["F045"]


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": "x.bin"}}']
)
def test_an_index_that_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(text)
    assert codes(tmp_path / INDEX) == ["F046"]


def test_links_that_stay_and_those_of_huggingface_hubs_cache(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path)
    weights = folder / "adapter_model.safetensors"
    weights.rename(folder / "real")
    weights.symlink_to("real")
    assert codes(folder) == []
    cached = tmp_path / "models--a--b" / "snapshots" / ("0" * 40)
    blobs = tmp_path / "models--a--b" / "blobs"
    cached.mkdir(parents=True)
    blobs.mkdir()
    for name in os.listdir(folder):
        shutil.copy(folder / name, blobs / name)
        (cached / name).symlink_to(f"../../blobs/{name}")
    (cached / "real").unlink()
    assert codes(cached) == []


def test_what_differs_between_two_files_of_one_name(tmp_path: Path) -> None:
    assert codes(_two(tmp_path / "same", 1.0)) == []
    [finding] = found(_two(tmp_path / "other"))
    assert finding.file.endswith("adapter_model.bin")
    assert "8 of 8 tensors have other values" in finding.message
    folder = _two(tmp_path / "fewer")
    edit(folder, lambda tensors: dict(list(tensors.items())[:4]))
    assert any("4 tensors stand only in it" in f.message for f in found(folder))


def test_header_only_compares_nothing(tmp_path: Path) -> None:
    assert codes(_two(tmp_path), header_only=True) == []


def test_an_unsafe_pickle_that_peft_would_not_read(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path)
    torch.save({"a": Evil()}, folder / "adapter_model.bin")
    [finding] = found(folder)
    assert (finding.code, finding.file) == ("F010", str(folder / "adapter_model.bin"))


def test_an_adapter_of_two_files_is_told_of_by_the_pickle(tmp_path: Path) -> None:
    tensors, _ = load(diffusers_file(tmp_path))
    path = tmp_path / "pytorch_lora_weights.bin"
    torch.save(tensors, path)
    assert codes(tmp_path) == ["F011"]
    torch.save({key: t + 1 for key, t in tensors.items()}, path)
    assert codes(tmp_path) == ["F011", "F048"]


SOUND: dict[str, Callable[[Path], Path]] = {
    "shards and their index": sharded,
    "an index with numbers": lambda p: sharded(p).parent,
    "an empty folder for the scheduler": _with("scheduler", Path.mkdir),
    "a script": _with("optimizer.py"),
    "hidden files of macOS": _with("._adapter_model.safetensors", lambda p: p.write_bytes(b"\0\5\x16\7")),
    "a number that is no epoch": lambda p: kohya_file(p, "style-2024.safetensors"),
    "a lone epoch": lambda p: kohya_file(p, "style-000002.safetensors"),
    "a config that is not PEFT's": lambda p: (
        (p / "adapter_config.json").write_text(json.dumps({"lora_parameters": {"rank": 8}})),
        kohya_file(p),
    )[1],
}


@pytest.mark.parametrize("name", SOUND)
def test_sound(name: str, tmp_path: Path) -> None:
    assert codes(SOUND[name](tmp_path)) == []


def test_checkpoints_of_a_trainer(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path)
    peft_folder(folder, name="checkpoint-500")
    assert codes(folder) == ["F051"]
    assert codes(peft_folder(tmp_path, name="checkpoint-500")) == []


def test_the_state_of_a_trainer_without_its_adapter(tmp_path: Path) -> None:
    torch.save({"state": {}, "param_groups": []}, tmp_path / "optimizer.pt")
    (finding,) = found(tmp_path / "optimizer.pt")
    assert finding.code == "F020"
    assert "optimizer state" in finding.message


def test_messages_name_the_file(tmp_path: Path) -> None:
    for code, make in BROKEN.items():
        (tmp_path / code).mkdir()
        [finding] = found(make(tmp_path / code))
        assert str(tmp_path) in finding.file, code
        assert not re.search(r"\bNone\b", finding.message)
