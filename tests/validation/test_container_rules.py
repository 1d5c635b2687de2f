"""Containers: each rule finds what is broken in just its way, and the loaders refuse it."""

from __future__ import annotations

import base64
import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from broken_files import Evil, entries, join, pickled, repacked, split, with_content, with_header
from click.testing import CliRunner
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from sound import codes, diffusers_file, found, kohya_file, load, peft_folder

import adapterops as ao
from adapterops.cli.main import main
from adapterops.storage.safetensors import MAX_HEADER
from adapterops.validation.rules import container

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 1493200\n"


def _shift(header: dict[str, Any], at: int, by: int) -> None:
    entry = entries(header)[at]
    entry["data_offsets"] = [position + by for position in entry["data_offsets"]]


def _twice(tmp_path: Path) -> Path:
    path = diffusers_file(tmp_path)
    header, data = split(path)
    text = json.dumps(header)
    name = next(key for key in header if key != "__metadata__")
    return join(path, f"{text[:-1]},{json.dumps({name: header[name]})[1:]}", data)


def _link(tmp_path: Path) -> Path:
    path = tmp_path / "lora.safetensors"
    path.symlink_to("gone.safetensors")
    return path


def _cut(tmp_path: Path) -> Path:
    path = diffusers_file(tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    return path


def _torchscript(tmp_path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(2)).save(str(tmp_path / "lora.pt"))
    return tmp_path / "lora.pt"


def _renamed(tmp_path: Path, new: str) -> Path:
    return diffusers_file(tmp_path).rename(tmp_path / new)


def _saved(tmp_path: Path, tensors: dict[str, torch.Tensor], name: str = "lora.safetensors") -> Path:
    save_file(tensors, tmp_path / name, {"format": "pt"})
    return tmp_path / name


def _two_dialects(tmp_path: Path) -> Path:
    one, _ = load(diffusers_file(tmp_path))
    two, _ = load(kohya_file(tmp_path))
    return _saved(tmp_path, one | two)


def _encoded(tmp_path: Path, value: Any) -> Path:
    text = base64.b64encode(pickle.dumps(value)).decode()
    path = tmp_path / "soft_prompt.json"
    path.write_text(json.dumps({"metadata": {"epoch": 3}, "tensor": text}))
    return path


BROKEN: dict[str, Callable[[Path], Path]] = {
    "F001": _link,
    "F002": lambda p: with_header(p, lambda h: entries(h)[0].pop("data_offsets")),
    "F003": lambda p: with_content(p, b""),
    "F004": _cut,
    "F005": lambda p: with_content(p, LFS),
    "F006": lambda p: with_content(p, b"<!DOCTYPE html><html><title>Sign in</title></html>"),
    "F007": lambda p: with_header(p, lambda h: h.update(__metadata__={"log": "x" * MAX_HEADER})),
    "F008": _twice,
    "F009": lambda p: _renamed(p, "pytorch_lora_weights.bin"),
    "F010": lambda p: pickled(p, extra=Evil()),
    "F011": pickled,
    "F012": _torchscript,
    "F013": lambda p: repacked(pickled(p)),
    "F014": lambda p: pickled(p, extra=torch.ones(1).expand(10**12)),
    "F015": lambda p: _encoded(p, torch.ones(10, 64)),
    "F020": lambda p: _saved(p, {"<style>": torch.ones(1, 768)}, "learned_embeds.safetensors"),
    "F021": lambda p: _saved(p, {f"base_model.model.q_proj.finegates_{n}": torch.randn(64) for n in "ab"}),
    "F022": _two_dialects,
    "F023": lambda p: _saved(p, load(diffusers_file(p))[0] | {"step_count": torch.ones(3)}),
    "F030": lambda p: with_header(p, lambda h: entries(h)[0].update(dtype="F128")),
    "F031": lambda p: with_header(p, lambda h: entries(h)[0].update(shape=[1_000_000_000])),
    "F032": lambda p: with_header(p, lambda h: entries(h)[0].update(data_offsets=[-4, 5116])),
    "F033": lambda p: with_header(p, lambda h: _shift(h, -1, -4)),
    "F034": lambda p: with_header(p, lambda h: _shift(h, -1, 4), bytes(4)),
    "F035": lambda p: with_header(p, lambda h: None, bytes(12)),
    "F036": lambda p: with_header(p, lambda h: h.update(__metadata__=None)),
    "F037": lambda p: with_header(p, lambda h: h.update(__metadata__={"epoch": 3})),
    "F038": lambda p: with_header(p, lambda h: h.update(__metadata__={"title": "half a \ud83d"})),
    "F039": lambda p: pickled(p, extra=torch.eye(3).to_sparse()),
}
REFUSED = [code for code in BROKEN if "F002" <= code <= "F008" or "F030" <= code <= "F035"] + ["F037", "F038"]


@pytest.mark.parametrize("code", BROKEN)
def test_what_is_broken_is_found_and_nothing_else(code: str, tmp_path: Path) -> None:
    assert codes(BROKEN[code](tmp_path)) == [code]


def test_every_rule_is_broken_once() -> None:
    assert list(BROKEN) == sorted(rule.code for rule in container.RULES)


@pytest.mark.parametrize("code", sorted(set(REFUSED) - {"F007", "F008"}))
def test_safetensors_refuses_them_too(code: str, tmp_path: Path) -> None:
    with pytest.raises((SafetensorError, OSError)):
        load_file(BROKEN[code](tmp_path))


def test_safetensors_drops_one_of_two_equal_keys(tmp_path: Path) -> None:
    path = BROKEN["F008"](tmp_path)
    with safe_open(path, "pt") as file:
        assert len(file.keys()) == path.read_bytes().count(b'"data_offsets"') - 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("code", ["F010", "F012", "F039"])
def test_what_torch_refuses_or_cannot_use(code: str, tmp_path: Path) -> None:
    path = BROKEN[code](tmp_path)
    if code == "F039":
        assert not torch.load(path, weights_only=True)["extra"].is_mkldnn
        with pytest.raises((ValueError, RuntimeError)):
            save_file(torch.load(path, weights_only=True), tmp_path / "x.safetensors")
    else:
        with pytest.raises((pickle.UnpicklingError, RuntimeError)):
            torch.load(path, weights_only=True)


def test_peft_reads_neither_kind_under_the_others_name(tmp_path: Path) -> None:
    from peft.utils.save_and_load import load_peft_weights

    folder = peft_folder(tmp_path)
    weights = folder / "adapter_model.safetensors"
    tensors, _ = load(weights)
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises((pickle.UnpicklingError, RuntimeError)):
        load_peft_weights(str(folder), device="cpu")
    [finding] = found(folder)
    assert (finding.code, finding.change and finding.change.rename) == ("F009", "adapter_model.safetensors")
    (folder / "adapter_model.bin").unlink()
    torch.save(tensors, weights)
    with pytest.raises(SafetensorError):
        load_peft_weights(str(folder), device="cpu")
    [finding] = found(folder)
    assert (finding.code, finding.change) == ("F009", None)


def test_what_an_unsafe_pickle_would_have_run_is_told(tmp_path: Path) -> None:
    [finding] = found(BROKEN["F010"](tmp_path))
    assert "call os.system('echo pwned')" in finding.message
    path = pickled(tmp_path, "old.pt")
    torch.save({"a": Evil()}, path, _use_new_zipfile_serialization=False)
    [finding] = found(path)
    assert finding.code == "F010"
    assert "call os.system('echo pwned')" in finding.message
    [finding] = found(_encoded(tmp_path, {"tensor": torch.ones(3), "hook": Evil()}))
    assert finding.code == "F010"
    assert "call os.system('echo pwned')" in finding.message


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_objects_in_a_numpy_archive(save: Callable[..., None], tmp_path: Path) -> None:
    save(tmp_path / "lora.npz", a=np.array([Evil(), None], dtype=object))
    [finding] = found(tmp_path / "lora.npz")
    assert finding.code == "F010"
    assert "it would call os.system('echo pwned')" in finding.message


@pytest.mark.parametrize(
    ("content", "name", "code"),
    [
        (b"fake weights\n", "adapter_model.safetensors", "F006"),
        (b"<html><body>404</body></html>", "lora.bin", "F006"),
        (LFS, "lora.bin", "F005"),
        (b"", "lora.npz", "F003"),
        (b"\x01\0", "lora.safetensors", "F004"),
        (b"\x80\x02}q\0X\x05\0\0\0ab", "lora.pt", "F004"),
        (b"PK\x03\x04" + bytes(60), "lora.pt", "F004"),
        ((2**60).to_bytes(8, "little") + b"{}", "lora.safetensors", "F002"),
        (b"\x02\0\0\0\0\0\0\0[]", "lora.safetensors", "F002"),
        (pickle.dumps({"epoch": 3}, 2), "lora.safetensors", "F009"),
    ],
)
def test_files_of_another_kind(content: bytes, name: str, code: str, tmp_path: Path) -> None:
    assert codes(with_content(tmp_path, content, name)) == [code]


@pytest.mark.parametrize("cut", range(1, 9))
def test_the_text_of_a_pickle_that_is_cut_short(cut: int, tmp_path: Path) -> None:
    path = _encoded(tmp_path, torch.ones(10, 64))
    path.write_text(path.read_text()[: -2 - cut] + '"}')
    assert codes(path) in ([["F020"]] if cut > 3 else [["F015"], ["F020"]])  # the last characters may be padding


def _deep(header: dict[str, Any]) -> None:
    header["__metadata__"] = {}
    inner = header["__metadata__"]
    for _ in range(500):
        inner["a"] = inner = {}


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (_deep, "F037"),
        (lambda h: h.update(__metadata__=[]), "F037"),
        (lambda h: entries(h)[0].update(shape=[-1]), "F031"),
        (lambda h: entries(h)[0].update(shape=[2**32, 2**32]), "F031"),
        (lambda h: entries(h)[0].update(shape=[2**62, 0]), "F031"),
        (lambda h: entries(h)[0].update(data_offsets=[5120, 0]), "F032"),
        (lambda h: entries(h)[0].update(data_offsets=[0.0, 5120.0]), "F032"),
        (lambda h: entries(h)[0].update(dtype=None), "F030"),
        (lambda h: h.update({"a\udc00": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}), "F038"),
        (lambda h: h.update(a=[]), "F002"),
    ],
)
def test_headers(change: Callable[[dict[str, Any]], None], code: str, tmp_path: Path) -> None:
    assert codes(with_header(tmp_path, change)) == [code]


def test_a_message_names_the_tensor(tmp_path: Path) -> None:
    [finding] = found(BROKEN["F031"](tmp_path))
    assert len(finding.where) == 1
    assert finding.where[0].endswith(".weight")
    [finding] = found(_cut(tmp_path))
    assert len(finding.where) == 1


@pytest.mark.parametrize("code", ["F011", "F036"])
def test_what_is_mended_by_writing_it_anew(code: str, tmp_path: Path) -> None:
    [finding] = found(BROKEN[code](tmp_path))
    assert finding.change is not None
    assert finding.change.rewrite


def test_metadata_null_is_what_mlx_writes(tmp_path: Path) -> None:
    tensors, _ = load(diffusers_file(tmp_path))
    assert load_file(BROKEN["F036"](tmp_path)).keys() == tensors.keys()  # the reference reader takes it
    assert ao.validate(tmp_path).exit_code(strict=True) == 0


SOUND: dict[str, Callable[[Path], Path]] = {
    "no metadata": lambda p: with_header(p, lambda h: h.pop("__metadata__")),
    "empty metadata": lambda p: with_header(p, lambda h: h.update(__metadata__={"format": "pt", "": ""})),
    "characters beyond the first plane": lambda p: with_header(p, lambda h: h.update(__metadata__={"title": "😀"})),
    "a long list of tags": lambda p: with_header(p, lambda h: h.update(__metadata__={"tags": "x" * 5_000_000})),
}


@pytest.mark.parametrize("name", SOUND)
def test_sound_files(name: str, tmp_path: Path) -> None:
    assert not [code for code in codes(SOUND[name](tmp_path)) if code.startswith("F")]


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_of_tensors_are_safe(zipped: bool, tmp_path: Path) -> None:
    tensors, _ = load(diffusers_file(tmp_path))
    path = tmp_path / "lora.bin"
    parameters = {key: torch.nn.Parameter(value) for key, value in tensors.items()}
    torch.save(parameters, path, _use_new_zipfile_serialization=zipped)
    assert codes(path) == ["F011"]


def test_a_method_that_is_known_by_name_only(tmp_path: Path) -> None:
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {f"{stem}.oft_diag": torch.randn(4, 80, 80), f"{stem}.alpha": torch.tensor(4.0)}
    assert codes(_saved(tmp_path, tensors)) == ["F021"]


def test_a_checkpoint_is_not_taken_away(tmp_path: Path) -> None:
    """What stands beside the adapter in it would be lost."""
    pair = {
        f"base_model.model.x.q_proj.lora_{n}.weight": torch.randn(*shape) for n, shape in (("A", (2, 4)), ("B", (4, 2)))
    }
    torch.save({"state_dict": pair, "alpha": 4, "optimizer": {"m": torch.randn(3)}}, tmp_path / "last.pt")
    before = (tmp_path / "last.pt").read_bytes()
    told = list(ao.validate(tmp_path, select=["F011"]))
    assert [(finding.code, finding.change) for finding in told] == [("F011", None)]
    assert "holds more than the adapter" in told[0].remedy
    assert CliRunner().invoke(main, ["validate", str(tmp_path), "--select", "F011", "--fix"]).exit_code == 0
    assert (tmp_path / "last.pt").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]
