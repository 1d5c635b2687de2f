"""The hash of an adapter's content: what recipes hold must mean the same in every version."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from small_adapters import Numbers, peft, weights_of

import adapterops as ao
from adapterops.merging.content import content_hash
from adapterops.storage.tensor import CHUNK


def test_names_scales_options_and_bytes_in_the_order_of_names(tmp_path: Path) -> None:
    n = Numbers(0)
    tensors = {}
    for layer in (0, 1, 10):
        tensors[f"l.{layer}.q.lora_A.weight"] = n(8, 600)
        # One is larger than what is read at a time, none ends where a reading does.
        tensors[f"l.{layer}.q.lora_B.weight"] = n(50_001 if layer == 1 else 333, 8)
    adapter = ao.load(peft(tmp_path / "a", tensors, alpha=4.0))
    assert any(t.nbytes > CHUNK for u in adapter for t in u.tensors.values())
    digest = hashlib.sha256()
    for layer in (0, 1, 10):  # as text: "l.1." < "l.10"
        digest.update(f"(('model', 'l.{layer}.q', 'lora'), 0.5, [])".encode())
        for role in "AB":
            tensor = tensors[f"l.{layer}.q.lora_{role}.weight"]
            digest.update(repr((role, "F32", tuple(tensor.shape))).encode())
            digest.update(tensor.numpy().tobytes())
    assert content_hash(adapter) == digest.hexdigest()
    shuffled = load_file(weights_of(tmp_path / "a"))
    save_file(shuffled, weights_of(tmp_path / "a"), {"said": "otherwise"})
    assert content_hash(ao.load(tmp_path / "a")) == digest.hexdigest()
    shuffled["base_model.model.l.1.q.lora_B.weight"][-1, -1] += 1
    save_file(shuffled, weights_of(tmp_path / "a"))
    assert content_hash(ao.load(tmp_path / "a")) != digest.hexdigest()


def test_given_up(tmp_path: Path) -> None:
    adapter = ao.load(
        peft(tmp_path / "a", {"q.lora_A.weight": torch.ones(4, 1 << 17), "q.lora_B.weight": torch.ones(4, 4)})
    )
    stop = threading.Event()
    assert content_hash(adapter, stop)
    stop.set()
    assert not content_hash(adapter, stop)
