"""Several files and their index: one adapter, or a refusal that names index, shard and tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import storage_files as files
import torch
from huggingface_hub import save_torch_state_dict

from adapterops.errors import AdapterOpsError, InvalidHeader, NotAnAdapter, UnreadableFile, UnsupportedFormat
from adapterops.storage import open_source

ONE, TWO = "x-00001-of-00002.safetensors", "x-00002-of-00002.safetensors"
INDEX = "x.safetensors.index.json"
MAP = {"a": ONE, "b": ONE, "c": TWO}


def shard(path: Path, keys: str, **metadata: str) -> None:
    header: dict[str, Any] = {k: files.entry("U8", [1], i) for i, k in enumerate(keys)}
    files.write_raw(path, {"__metadata__": metadata, **header} if metadata else header, keys.encode())


def index(path: Path, weight_map: object = MAP, **more: object) -> Path:
    path.write_text(json.dumps({"metadata": {"total_size": 3}, "weight_map": weight_map, **more}))
    return path


def sound(folder: Path, name: str = INDEX) -> Path:
    shard(folder / ONE, "ab")
    shard(folder / TWO, "c")
    return index(folder / name)


def test_what_huggingface_hub_writes(tmp_path: Path) -> None:
    tensors = {f"layer.{i}.lora_A.weight": torch.randn(8, 8) for i in range(10)}
    save_torch_state_dict(
        tensors, tmp_path, filename_pattern="adapter_model{suffix}.safetensors", max_shard_size=1000,
        metadata={"format": "pt"},
    )  # fmt: skip
    assert not (tmp_path / "adapter_model.safetensors").exists()
    (tmp_path / "adapter_config.json").write_text('{"r": 8}')
    for path in (tmp_path, tmp_path / "adapter_model.safetensors.index.json"):
        source = open_source(path)
        assert source.path == str(path)
        assert source.config == {"r": 8}
        assert source.metadata == {"format": "pt"}
        assert not source.notes
        assert set(source.tensors) == set(tensors)
        for key, tensor in source.tensors.items():
            assert torch.equal(tensor.torch(), tensors[key])


def test_an_index_of_any_name(tmp_path: Path) -> None:
    path = sound(tmp_path)
    for named in (path, tmp_path):
        assert {k: bytes(t.read()) for k, t in open_source(named).tensors.items()} == {"a": b"a", "b": b"b", "c": b"c"}


def test_a_folder_with_something_else_beside(tmp_path: Path) -> None:
    sound(tmp_path)
    shard(tmp_path / "other.safetensors", "d")
    with pytest.raises(NotAnAdapter, match=r"several weight files \(other.safetensors, x.safetensors.index.json\)"):
        open_source(tmp_path)
    shard(tmp_path / "adapter_model.safetensors", "e")
    assert list(open_source(tmp_path).tensors) == ["e"]
    index(tmp_path / "adapter_model.safetensors.index.json")
    source = open_source(tmp_path)
    assert list(source.tensors) == ["e"]
    assert "adapter_model.safetensors.index.json is not" in source.notes[0]


def test_the_usual_name_as_a_shard(tmp_path: Path) -> None:
    shard(tmp_path / "adapter_model.safetensors", "ab")
    shard(tmp_path / "more.safetensors", "c")
    weight_map = {"a": "adapter_model.safetensors", "b": "adapter_model.safetensors", "c": "more.safetensors"}
    index(tmp_path / "adapter_model.safetensors.index.json", weight_map)
    assert list(open_source(tmp_path).tensors) == ["a", "b", "c"]


def test_in_a_subfolder(tmp_path: Path) -> None:
    for name in ("unet", "text_encoder"):
        (tmp_path / name).mkdir()
        sound(tmp_path / name, "adapter_model.safetensors.index.json")
    source = open_source(tmp_path)
    assert list(source.parts) == ["text_encoder", "unet"]
    assert source.key_count == 6


def test_a_shard_by_itself_is_refused(tmp_path: Path) -> None:
    sound(tmp_path)
    for name in (ONE, TWO):
        with pytest.raises(UnreadableFile) as caught:
            open_source(tmp_path / name)
        for word in (str(tmp_path / name), "one shard of several", INDEX):
            assert word in str(caught.value)
    # Files that the index does not speak of are their own; so is one whose index cannot be read, but it says so.
    shard(tmp_path / "other.safetensors", "d")
    assert open_source(tmp_path / "other.safetensors").notes == ()
    (tmp_path / INDEX).write_text("{")
    assert "part 1 of 2" in open_source(tmp_path / ONE).notes[0]


def test_an_index_of_one_file_is_no_shard(tmp_path: Path) -> None:
    shard(tmp_path / "x.safetensors", "ab")
    index(tmp_path / INDEX, {"a": "x.safetensors", "b": "x.safetensors"})
    assert list(open_source(tmp_path / "x.safetensors").tensors) == ["a", "b"]
    assert list(open_source(tmp_path).tensors) == ["a", "b"]


def test_metadata_of_shards_that_differ(tmp_path: Path) -> None:
    shard(tmp_path / ONE, "ab", format="pt", rank="4")
    shard(tmp_path / TWO, "c", format="pt", rank="8", more="yes")
    path = index(tmp_path / INDEX, metadata={"total_size": 3, "format": "np", "said": "here"})
    source = open_source(path)
    assert source.metadata == {"format": "pt", "rank": "4", "more": "yes", "said": "here"}
    assert len(source.notes) == 2
    assert "'rank'" in source.notes[0]
    assert TWO in source.notes[0]
    assert "'format'" in source.notes[1]


def test_links_are_followed(tmp_path: Path) -> None:
    # The cache of huggingface_hub is made of them.
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    sound(tmp_path / "blobs")
    for name in (ONE, TWO, INDEX):
        (tmp_path / "snapshot" / name).symlink_to(f"../blobs/{name}")
    assert len(open_source(tmp_path / "snapshot" / INDEX).tensors) == 3


Spoil = Callable[[Path], object]
CASES: dict[str, tuple[Spoil, type[AdapterOpsError], list[str]]] = {
    "a missing shard": (
        lambda f: (f / TWO).unlink(),
        UnreadableFile,
        [INDEX, TWO, "'c'", "download it too"],
    ),
    "a cut shard": (
        lambda f: (f / TWO).write_bytes((f / TWO).read_bytes()[:-1]),
        InvalidHeader,
        [TWO, "'c'", "cut short"],
    ),
    "an empty shard": (lambda f: (f / TWO).write_bytes(b""), UnreadableFile, [TWO, "empty"]),
    "a key that its shard has not": (
        lambda f: index(f / INDEX, {**MAP, "d": TWO}),
        InvalidHeader,
        [INDEX, TWO, "has no tensor 'd'", "download"],
    ),
    "a key that is not listed": (
        lambda f: shard(f / TWO, "cd"),
        InvalidHeader,
        [INDEX, TWO, "'d'", "does not list"],
    ),
    "a key in two shards": (
        lambda f: shard(f / TWO, "ca"),
        InvalidHeader,
        [TWO, "'a'", f"places in {ONE}"],
    ),
    "the wrong shard": (
        lambda f: index(f / INDEX, {**MAP, "b": TWO}),
        InvalidHeader,
        [ONE, "'b'", f"places in {TWO}"],
    ),
    "a shard elsewhere": (
        lambda f: index(f / INDEX, {**MAP, "c": f"../{TWO}"}),
        UnreadableFile,
        [INDEX, "'c'", f"'../{TWO}'", "not the plain name"],
    ),
    "an absolute shard": (
        lambda f: index(f / INDEX, {**MAP, "c": str(f / TWO)}),
        UnreadableFile,
        [INDEX, "not the plain name"],
    ),
    "a folder's name": (lambda f: index(f / INDEX, {"c": ".."}), UnreadableFile, ["'..'", "not the plain name"]),
    "no name": (lambda f: index(f / INDEX, {"c": ""}), UnreadableFile, ["not the plain name"]),
    "NUL in a name": (lambda f: index(f / INDEX, {"c": "a\0.safetensors"}), UnreadableFile, ["not the plain name"]),
    "a number": (lambda f: index(f / INDEX, {"c": 1}), UnreadableFile, ["'c'", "not the plain name"]),
    "pickled shards": (lambda f: index(f / INDEX, {"c": "x.bin"}), UnsupportedFormat, ["x.bin", ".safetensors"]),
    "no map": (lambda f: index(f / INDEX, None), UnreadableFile, ["weight_map"]),
    "an empty map": (lambda f: index(f / INDEX, {}), UnreadableFile, ["weight_map"]),
    "a list": (lambda f: (f / INDEX).write_text("[]"), UnreadableFile, [INDEX, "JSON object"]),
    "no JSON": (lambda f: (f / INDEX).write_text("{"), UnreadableFile, [INDEX, "not JSON"]),
    "a key twice": (
        lambda f: (f / INDEX).write_text('{"weight_map": {"a": "x", "a": "x"}}'),
        UnreadableFile,
        [INDEX, "'a' twice"],
    ),
    "too many shards": (
        lambda f: index(f / INDEX, {str(i): f"{i}.safetensors" for i in range(501)}),
        UnreadableFile,
        [INDEX, "500 shards"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_refused(case: str, tmp_path: Path) -> None:
    spoil, kind, words = CASES[case]
    sound(tmp_path)
    spoil(tmp_path)
    for path in (tmp_path, tmp_path / INDEX):
        with pytest.raises(kind) as caught:
            open_source(path)
        assert type(caught.value) is kind
        for word in [str(tmp_path), *words]:
            assert word in str(caught.value)
