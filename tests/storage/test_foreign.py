"""Containers that are known and not read: each refused by its name, with what to do; and checkpoints around a state dict."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from adapterops.errors import NotAnAdapter, UnsupportedFormat
from adapterops.storage import open_source


def ggla(path: Path) -> None:
    """The header of llama.cpp's convert-lora-to-ggml.py (`write_file_header`): magic, version, rank, alpha."""
    path.write_bytes(b"ggla"[::-1] + struct.pack("<iii", 1, 8, 16) + bytes(64))


def keras(path: Path) -> None:
    """The beginning of every HDF5 file (its format's specification, III.A)."""
    path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(64))


def array(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.zeros((1, 2, 8), "f2"))


def nothing(path: Path) -> None:
    path.write_bytes(b"PK\x03\x04" + bytes(64))


MADE = {
    "ggml-adapter-model.bin": (ggla, "GGML"),
    "model.lora.h5": (keras, "Keras"),
    "model.lora_weights.npy": (array, "TensorRT-LLM"),
    "model.nemo": (nothing, "NeMo 1"),
    "__0_0.distcp": (nothing, "dcp_to_torch"),
    "a.onnx_adapter": (nothing, "ONNX Runtime"),
}


@pytest.mark.parametrize("name", sorted(MADE))
def test_a_known_container_is_named(name: str, tmp_path: Path) -> None:
    make, word = MADE[name]
    make(tmp_path / name)
    with pytest.raises(UnsupportedFormat, match=word) as told:
        open_source(tmp_path / name)
    assert name in str(told.value)
    with pytest.raises(UnsupportedFormat, match=word):
        open_source(tmp_path)


def test_apple_s_folder(tmp_path: Path) -> None:
    (tmp_path / "a.fmadapter").mkdir()
    (tmp_path / "a.fmadapter" / "adapter_weights.bin").write_bytes(bytes(64))
    with pytest.raises(UnsupportedFormat, match="Apple"):
        open_source(tmp_path / "a.fmadapter")


def test_other_files_beside_an_adapter_do_not_matter(tmp_path: Path) -> None:
    keras(tmp_path / "model.h5")
    torch.save({"a.lora_A.weight": torch.ones(2, 2)}, tmp_path / "adapter_model.bin")
    assert list(open_source(tmp_path).tensors) == ["a.lora_A.weight"]


@pytest.mark.parametrize("name", ["state_dict", "model", "module"])
def test_the_state_dict_of_a_checkpoint_is_read(name: str, tmp_path: Path) -> None:
    rest = {"epoch": 3, "hyper_parameters": {"lr": 1e-4, "betas": [0.9, 0.99]}, "optimizer": None, "lr_schedulers": []}
    torch.save({name: {"a.lora_A": torch.arange(4.0), "a.lora_B": torch.ones(1)}, **rest}, tmp_path / "a.ckpt")
    tensors = open_source(tmp_path / "a.ckpt").tensors
    assert tensors["a.lora_A"].torch().tolist() == [0.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    "more",
    [
        {"model": {"b": torch.ones(2), "c": torch.ones(2)}},
        {"optim_head": {"b": torch.ones(2), "c": torch.ones(2)}},
        {"heads": [torch.ones(2)]},
        {"loss": torch.ones(())},
    ],
)
def test_a_checkpoint_with_other_tensors_is_none(more: dict[str, object], tmp_path: Path) -> None:
    """What the others are is not known: nothing is left out in silence."""
    state = {"a.lora_A": torch.ones(2), "a.lora_B": torch.ones(2)}
    torch.save({"state_dict": state, **more}, tmp_path / "a.ckpt")
    with pytest.raises(NotAnAdapter, match="training checkpoint"):
        open_source(tmp_path / "a.ckpt")
