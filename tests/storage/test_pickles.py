"""`.bin` and `.pt` files: tensors as torch has them, and a clear refusal for everything else."""

from __future__ import annotations

import collections
import io
import os
import pickle
import random
import tarfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from adapterops.errors import AdapterOpsError, InvalidHeader, NotAnAdapter, UnreadableFile, UnsafePickle
from adapterops.storage import open_source
from adapterops.storage.tensor import TORCH_NAMES

X = torch.arange(12.0).reshape(3, 4)


def saved(obj: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(obj, buffer, **options)
    return buffer.getvalue()


def refuse(path: Path, content: bytes, kind: type[AdapterOpsError], said: str) -> None:
    path.write_bytes(content)
    with warnings.catch_warnings(action="error"), pytest.raises(kind, match=said) as caught:
        open_source(path)
    assert str(path) in str(caught.value)
    assert "weights_only` set to `False" not in str(caught.value)
    assert "\n" not in str(caught.value)


TENSORS = {
    "plain": X,
    "parameter": torch.nn.Parameter(X),
    "transposed": X.T,
    "strided": X[:, ::2],
    "offset": X[1:, 1:],
    "expanded": torch.ones(1).expand(4, 3),
    "scalar": torch.tensor(3.0),
    "empty": torch.empty(0, 3),
    "conjugate": torch.tensor([1 + 2j]).conj(),
    "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_of_every_layout(zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    torch.save({**TENSORS, "alias": X}, path, _use_new_zipfile_serialization=zipped)
    read = open_source(path).tensors
    assert list(read) == [*TENSORS, "alias"]
    for name, tensor in {**TENSORS, "alias": X}.items():
        assert torch.equal(read[name].torch(), tensor.detach()), name
        assert read[name].torch().dtype == tensor.dtype


@pytest.mark.parametrize("name", TORCH_NAMES)
def test_every_dtype(name: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    kind = getattr(torch, TORCH_NAMES[name])
    torch.save({"a": torch.arange(8, dtype=torch.uint8).to(kind)}, path)
    tensor = open_source(path).tensors["a"]
    assert tensor.dtype == name
    expected = torch.load(path, weights_only=True)["a"]
    assert tensor.torch().dtype == kind
    assert bytes(tensor.read()) == expected.view(torch.uint8).numpy().tobytes()


def test_a_strided_tensor_is_not_kept_after_reading(tmp_path: Path) -> None:
    torch.save({"a": X.T}, tmp_path / "x.bin")
    tensor = open_source(tmp_path / "x.bin").tensors["a"]
    buffer = bytearray(20)
    parts = [bytes(buffer[:n]) for n in tensor.chunks(buffer)]
    assert b"".join(parts) == X.T.contiguous().numpy().tobytes()
    assert tensor.source._bytes is None  # type: ignore[attr-defined]


def test_cuda_tensors_come_to_the_cpu(tmp_path: Path) -> None:
    # No GPU is needed: the location is only a tag in the pickle, of the same length here.
    content = saved({"a": X}, _use_new_zipfile_serialization=False).replace(
        b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0"
    )
    assert b"cuda:0" in content
    (tmp_path / "x.bin").write_bytes(content)
    assert torch.equal(open_source(tmp_path / "x.bin").tensors["a"].torch(), X)


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("exit 1",)


class Sly:
    def __reduce__(self) -> Any:
        return eval, ("1",)


def test_code_is_refused_and_named(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    for zipped in (True, False):
        options = {"_use_new_zipfile_serialization": zipped}
        refuse(path, saved({"a": Evil()}, **options), UnsafePickle, r"call os\.system\('exit 1'\)")
        refuse(path, saved({"a": Sly()}, **options), UnsafePickle, r"call builtins\.eval\('1'\)")
        refuse(path, saved(torch.nn.Linear(2, 2), **options), UnsafePickle, r"call torch\.nn\.modules\.linear\.Linear")
    refuse(path, pickle.dumps({"a": Evil()}, 2), UnsafePickle, "system")
    program = torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(2))
    program.save(str(path))
    refuse(path, path.read_bytes(), UnsafePickle, "TorchScript")


@pytest.mark.parametrize(
    ("obj", "said"),
    [
        ([X, 1], "bare list"),
        ([], "bare list"),
        ({"a": {"b": X}, "c": {"d": X}}, "'a' is a dict"),
        ({"string_to_param": {"*": X}, "name": "cat"}, "'string_to_param' is a dict"),
        ({"a": None}, "'a' is a NoneType"),
        ({"state_dict": {"a": X, "b": X}, "ema": {"a": X, "b": X}}, "training checkpoint"),
        ({"state_dict": {"a": X, "b": X}, "head": [X]}, "training checkpoint"),
        ({"weights": {"a": {"b": X}, "a.b": X}}, "'weights' is a dict"),
        ({"weights": {"a": {"b": X}, "c": {"d": 1}}}, "'weights' is a dict"),
        ({"state_dict": {"a": X, "b": X}, "optim_head": {"b": X}}, "training checkpoint"),
        ({1: X}, "name is a int"),
        ({"a": collections.Counter()}, "'a' is a Counter"),
    ],
)
def test_sound_but_no_state_dict(obj: object, said: str, tmp_path: Path) -> None:
    refuse(tmp_path / "x.bin", saved(obj), NotAnAdapter, said)


def test_tensors_without_names_are_called_by_their_place(tmp_path: Path) -> None:
    torch.save(X, tmp_path / "x.pt")
    assert list(open_source(tmp_path / "x.pt").tensors) == ["[]"]
    torch.save([X, X + 1], tmp_path / "x.pt")
    assert {key: tensor.numpy().tolist() for key, tensor in open_source(tmp_path / "x.pt").tensors.items()} == {
        "[0]": X.tolist(),
        "[1]": (X + 1).tolist(),
    }


@pytest.mark.parametrize("name", ["state_dict", "model_state_dict", "lora"])
def test_the_one_state_dict_of_a_checkpoint_is_read(name: str, tmp_path: Path) -> None:
    torch.save({name: {"a": X}}, tmp_path / "x.ckpt")
    assert list(open_source(tmp_path / "x.ckpt").tensors) == ["a"]
    assert not open_source(tmp_path / "x.ckpt").notes
    beside = {"epoch": 3, "alpha": 16, "optimizer": {"state": {0: {"exp_avg": X}}, "param_groups": []}, "none": None}
    torch.save({**beside, name: {"a": X, "b": X}}, tmp_path / "x.ckpt")
    source = open_source(tmp_path / "x.ckpt")
    assert list(source.tensors) == ["a", "b"]
    assert source.notes == (
        f"is a checkpoint: {name!r} is read, and of what stands beside it a format's own settings at most: epoch 3, alpha 16, "
        "optimizer, none",
    )
    assert source.beside == {"epoch": 3, "alpha": 16, "none": None}


def test_a_state_dict_of_mappings_has_dotted_names(tmp_path: Path) -> None:
    settings = {"r": 2, "params": ["q", "v"], "deep": {"a": None}}
    torch.save({"weights": {"one": {"a": X, "b": X + 1}, "two": X + 2}, "metadata": settings}, tmp_path / "x.pt")
    source = open_source(tmp_path / "x.pt")
    assert {key: t.numpy().tolist() for key, t in source.tensors.items()} == {
        "one.a": X.tolist(),
        "one.b": (X + 1).tolist(),
        "two": (X + 2).tolist(),
    }
    assert source.beside == {"metadata": settings}


def test_small_files_that_name_one_thing_many_times(tmp_path: Path) -> None:
    """Twenty names for each of a mapping that has twenty names for another …: a thousand million, in two thousand bytes."""
    state: dict[str, object] = {"a": X, "b": X}
    settings: list[object] = [1]
    deep: dict[str, object] = {"a": X, "b": X}
    for _ in range(7):
        state, settings = {f"k{n}": state for n in range(20)}, [settings] * 20
    for _ in range(50):
        deep = {"deeper": deep}
    refuse(tmp_path / "x.pt", saved({"weights": state, "epoch": 1}), NotAnAdapter, "'weights' is a dict")
    refuse(tmp_path / "x.pt", saved({"weights": deep, "epoch": 1}), NotAnAdapter, "'weights' is a dict")
    torch.save({"weights": {"a": X, "b": X}, "many": settings, "odd": {1: 2}, "few": [None]}, tmp_path / "x.pt")
    source = open_source(tmp_path / "x.pt")
    assert (list(source.tensors), source.beside) == (["a", "b"], {"few": [None]})


def test_tensors_that_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    refuse(path, saved({"a": X.to_sparse()}), UnreadableFile, "sparse_coo")
    refuse(path, saved({"a": X.to("meta")}), UnreadableFile, "device meta")
    refuse(path, saved({"a": torch.ones(2, dtype=torch.complex128)}), UnreadableFile, "complex128")
    refuse(path, saved({"\ud800": X}), InvalidHeader, "not valid Unicode")
    refuse(path, saved({"__metadata__": X}), UnreadableFile, "reserves")


def test_bombs(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    refuse(path, saved({"a": torch.ones(1).expand(10**12)}), UnreadableFile, "bomb")
    refuse(path, saved(same(1000)), UnreadableFile, "bomb")
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(50_000_000))
    refuse(path, packed.getvalue(), UnreadableFile, "compressed")


def same(count: int) -> dict[str, torch.Tensor]:
    shared = torch.ones(100_000)
    return {f"same{n}": shared for n in range(count)}


def test_a_repacked_zip_is_refused_and_not_misread(tmp_path: Path) -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved({"a": X}))) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    refuse(tmp_path / "x.bin", packed.getvalue(), UnreadableFile, "compressed")


def test_other_archives(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    refuse(path, path.read_bytes(), UnreadableFile, "download it again")
    with tarfile.open(path, "w") as tar:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            tar.addfile(tarfile.TarInfo(name))
    refuse(path, path.read_bytes(), UnreadableFile, "tar")


def test_messages_hold_no_control_characters(tmp_path: Path) -> None:
    raw = saved({"a": X})
    damaged = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(damaged, "w") as new:
        for name in old.namelist():
            new.writestr(name, b"\x1b[2J" if name.endswith("/version") else old.read(name))
    path = tmp_path / "a.bin"
    path.write_bytes(damaged.getvalue())
    with pytest.raises(UnreadableFile, match="version") as caught:
        open_source(path)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("zipped", [True, False])
def test_cut_short_anywhere(zipped: bool, tmp_path: Path) -> None:
    content = saved({"a": torch.ones(1000)}, _use_new_zipfile_serialization=zipped)
    for length in (1, 3, 4, 30, 200, len(content) // 2, len(content) - 30, len(content) - 1):
        refuse(tmp_path / "x.bin", content[:length], UnreadableFile, ".")


def test_damage_gives_a_named_error_or_tensors(tmp_path: Path) -> None:
    dice = random.Random(0)
    path = tmp_path / "x.bin"
    kinds = collections.Counter[str]()
    for turn in range(300):
        content = bytearray(saved({"a": X}, _use_new_zipfile_serialization=bool(turn % 2)))
        for _ in range(3):
            content[dice.randrange(min(len(content), 900))] = dice.randrange(256)
        path.write_bytes(content)
        try:
            for tensor in open_source(path).tensors.values():
                tensor.read()
            kinds["read"] += 1
        except AdapterOpsError as error:
            kinds[type(error).__name__] += 1
    assert kinds["UnreadableFile"] > 50


def test_an_element_with_a_stride_of_two(tmp_path: Path) -> None:
    torch.save({"x.lora_A.weight": torch.tensor([1.0, 2.0]).as_strided((1,), (2,), 1)}, tmp_path / "a.bin")
    assert open_source(tmp_path / "a.bin").tensors["x.lora_A.weight"].item() == 2.0
