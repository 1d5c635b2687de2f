"""The same inputs give the same bytes: again, by any number of workers, and whatever the order of keys in a file."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from small_adapters import Numbers, Tensors, file, peft, read, weights_of

import adapterops as ao
import adapterops.merging.methods
from adapterops.merging.registry import METHODS

SHAPES = {"l.0.q": (400, 600), "l.1.q": (40, 30), "l.2.q": (40, 30), "l.10.q": (64, 48), "l.2.k": (300, 500)}
"""Some have more numbers than one block of a delta, and so several."""
RANDOM = ("dare_linear", "dare_ties", "della", "della_linear", "knots")
USUAL = {"density": 0.5, "inner": "dare_ties"}


def arguments(name: str) -> dict[str, Any]:
    known = {parameter.name for parameter in METHODS[name].parameters}
    return {key: value for key, value in USUAL.items() if key in known}


CASES = [(name, space.value) for name, method in METHODS.items() for space in method.spaces]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `a`, `b` and `c`, and under `shuffled` the same with their keys in other orders."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate("abc"):
        n, tensors = Numbers(seed), {}
        for module, (out, inputs) in SHAPES.items():
            tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = n(6, inputs), n(out, 6)
            tensors[f"{module}.lora_B.bias"] = n(out)
        for place in (folder, folder / "shuffled"):
            peft(place / name, tensors, 3 + seed, lora_bias=True)
        shuffle(weights_of(folder / "shuffled" / name), seed)
    return folder


def shuffle(path: Path, seed: int) -> None:
    """The same tensors, their names and their bytes in another order: safetensors says where each one stands."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    old, body = json.loads(data[8 : 8 + size]), data[8 + size :]
    names = [name for name in old if name != "__metadata__"]
    random.Random(seed).shuffle(names)
    entries, parts, at = {}, [], 0
    for name in names:
        start, stop = old[name]["data_offsets"]
        entries[name] = {**old[name], "data_offsets": [at, at + stop - start]}
        parts.append(body[start:stop])
        at += stop - start
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(parts))


def digest(folder: Path, out: Path, name: str, monkeypatch: pytest.MonkeyPatch, **more: Any) -> str:
    """Of the merge of the adapters in a folder, called by the same names everywhere."""
    monkeypatch.chdir(folder)
    sources = ["a", "b", "c"][: METHODS[name].adapters or 3]
    weights = (0.5, 0.25, 1.25)[: len(sources)]
    ao.merge(sources, out, name, **{"weights": weights, **arguments(name), "overwrite": True, **more})
    return hashlib.sha256(weights_of(out).read_bytes()).hexdigest()


@pytest.mark.parametrize(("name", "space"), CASES)
def test_the_same_bytes(name: str, space: str, adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def made(folder: Path, workers: int) -> str:
        more = {"space": space, "workers": workers, "seed": 7}
        return digest(folder, tmp_path / "out", name, monkeypatch, **more)

    first = made(adapters, 1)
    assert made(adapters, 2) == first
    assert made(adapters / "shuffled", 3) == first


def test_again_in_one_process_and_with_other_threads(
    adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torch is set to outside neither changes the result nor is changed."""
    before = torch.get_num_threads()
    found = set()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found |= {digest(adapters, tmp_path / f"{n}", "dare_ties", monkeypatch, space="delta") for n in range(2)}
        assert torch.get_num_threads() == threads
    torch.set_num_threads(before)
    assert len(found) == 1


@pytest.mark.parametrize(("name", "space"), [case for case in CASES if case[0] in RANDOM])
def test_another_seed_is_another_mask(
    name: str, space: str, adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = set()
    for seed in (0, 1):
        digest(adapters, tmp_path / "out", name, monkeypatch, space=space, seed=seed)
        texts.add(body(tmp_path / "out"))
    assert len(texts) == 2
    digest(adapters, tmp_path / "out", name, monkeypatch, space=space)  # 0 where nothing is said
    assert body(tmp_path / "out") in texts


def body(folder: Path) -> bytes:
    """The numbers alone: the header holds the seed."""
    data = weights_of(folder).read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]


def test_a_mask_belongs_to_its_module(adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Taking a module out of the inputs changes nothing in the others, and no two modules have one mask."""
    digest(adapters, tmp_path / "out", "dare_linear", monkeypatch, space="factors")
    whole = read(tmp_path / "out")
    for name in "abc":
        tensors = {
            f"{module}.{role}": torch.from_numpy(values).float()
            for module, got in read(adapters / name).items() if module != "l.1.q"
            for role, values in (("lora_A.weight", got["down"]), ("lora_B.weight", got["up"]), ("lora_B.bias", got["lora_bias"]))
        }  # fmt: skip
        peft(tmp_path / "less" / name, tensors, 3 + "abc".index(name), lora_bias=True)
    digest(tmp_path / "less", tmp_path / "fewer", "dare_linear", monkeypatch, space="factors")
    less = read(tmp_path / "fewer")
    assert whole.keys() - less.keys() == {"l.1.q"}
    assert all((whole[module]["down"] == got["down"]).all() for module, got in less.items())
    # Two modules of one shape: where one keeps an entry of every adapter, the other does not.
    assert ((whole["l.1.q"]["down"] == 0) != (whole["l.2.q"]["down"] == 0)).any()


def test_the_order_of_keys_decides_no_module(tmp_path: Path) -> None:
    """Kohya's: several components, numbers above nine, a module that only one file has."""
    stems = [f"lora_te_text_model_encoder_layers_{n}_mlp_fc1" for n in (10, 2)]
    tensors: Tensors = {}
    for number, stem in enumerate([*stems, "lora_unet_time_embedding_linear_1"]):
        n, sizes = Numbers(number), (3072, 768) if number < 2 else (1280, 320)
        tensors |= {f"{stem}.lora_down.weight": n(2, sizes[1]), f"{stem}.lora_up.weight": n(sizes[0], 2)}
    found = set()
    for order in (0, 1, 2):
        one = file(tmp_path / "a.safetensors", tensors)
        two = file(tmp_path / "b.safetensors", {k: t for k, t in tensors.items() if "_10_" not in k})
        if order:
            shuffle(one, order)
            shuffle(two, order + 5)
        out = tmp_path / "out.safetensors"
        ao.merge([one, two], out, "svd", overwrite=True)
        found.add(hashlib.sha256(out.read_bytes()).hexdigest())
    assert len(found) == 1
