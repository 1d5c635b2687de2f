"""Adapters of base models without a table, worked on in their own spelling: what needs no other names works."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from trainers import CLIP, FLUX, Tensors, comfy, loha, lokr, musubi, pairs, some, write

import adapterops as ao
from adapterops.errors import CannotRepresent, UnknownArchitectureOfFile, UsageError

MODULES = {f"trunk.{n}.mixing.{name}": (48, 32) for n in range(4) for name in ("wq", "wk", "w_out")}
"""Modules of an invented base, with an underscore where dots may become one."""
FLAT = {name.replace(".", "_"): shape for name, shape in MODULES.items()}
PREFIX = {"comfy": "diffusion_model.", "kohya": "lora_unet_"}
Deltas = dict[str, torch.Tensor]


def convolutions(prefix: str) -> Tensors:
    """A 3×3 kernel's factors, and those of a 1×1 one."""
    out: Tensors = {}
    for size in (3, 1):
        stem = f"{prefix}trunk_conv{size}"
        out[f"{stem}.lora_down.weight"], out[f"{stem}.lora_up.weight"] = some(4, 8, size, size), some(12, 4, 1, 1)
        out[f"{stem}.alpha"] = torch.tensor(2.0)
    return out


def dora(prefix: str) -> Tensors:
    tensors = pairs(MODULES, prefix, alpha=2.0)
    return tensors | {f"{prefix}{name}.dora_scale": some(48, 1, of=name) for name in MODULES}


def encoder() -> Tensors:
    """CLIP's modules, which other base models have too, by the name that a second encoder brings with it."""
    flat = {f"text_model.{name}": shape for name, shape in CLIP.items()}
    return pairs(flat, "lora_te1_", (".lora_down.weight", ".lora_up.weight"), 1.0, flat=True)


FILES: dict[str, Tensors] = {
    "LoRA, Comfy": comfy(MODULES),
    "LoRA, Comfy with lora_down": pairs(MODULES, PREFIX["comfy"], (".lora_down.weight", ".lora_up.weight"), 2.0),
    "LoRA, musubi-tuner": musubi(MODULES),
    "LoHa": loha(FLAT, PREFIX["kohya"], 2.0),
    "LoKr": lokr(MODULES, PREFIX["comfy"], 4, None, 1.0),
    "LoKr with a low-rank factor": lokr(FLAT, PREFIX["kohya"], 4, 2, 1.0),
    "DoRA": dora(PREFIX["comfy"]),
    "convolutions": convolutions(PREFIX["kohya"]),
    "with an encoder": musubi(MODULES) | encoder(),
    "a checkpoint's prefix": pairs(MODULES, "model.diffusion_model."),
}


def deltas(path: Path) -> Deltas:
    """The weight deltas of a file of LoRA by its keys, whatever stands before the modules' names."""
    tensors = {key: tensor.double() for key, tensor in load_file(path).items()}
    out: Deltas = {}
    for key, down in tensors.items():
        stem, dot, end = key.rpartition(".lora_")
        if dot and end in ("down.weight", "A.weight"):
            up = tensors[f"{stem}.lora_{'up' if end[0] == 'd' else 'B'}.weight"]
            alpha = tensors.get(f"{stem}.alpha")
            scale = 1.0 if alpha is None else float(alpha) / down.shape[0]
            name = next(stem.removeprefix(p) for p in (*PREFIX.values(), "") if stem.startswith(p))
            out[name.replace(".", "_")] = scale * (up.flatten(1) @ down.flatten(1))
    return out


@pytest.mark.parametrize("name", FILES)
def test_a_file_in_its_own_spelling_stays_what_it_is(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", FILES[name])
    adapter = ao.load(path)
    assert adapter.architecture.value is None
    done = ao.save(adapter, tmp_path / "b.safetensors")
    before, after = FILES[name], load_file(done.path)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert {key: t.shape for key, t in before.items()} == {key: t.shape for key, t in after.items()}


@pytest.mark.parametrize("target", ["comfy-down", "kohya", "kohya-peft"])
@pytest.mark.parametrize("name", ["LoRA, Comfy", "LoRA, Comfy with lora_down", "LoRA, musubi-tuner"])
def test_dialects_that_spell_names_alike_can_be_written(name: str, target: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", FILES[name])
    if name == "LoRA, musubi-tuner" and target == "comfy-down":
        with pytest.raises(UnknownArchitectureOfFile, match="in none of the known base models"):
            ao.convert(path, target, tmp_path / "b.safetensors")  # where underscores were dots is lost
        return
    done = ao.convert(path, target, tmp_path / "b.safetensors")
    assert done.dialect == target
    assert any("the base model is not known" in note for note in done.notes)
    want, got = deltas(path), deltas(Path(done.path))
    assert want.keys() == got.keys()
    assert all(torch.equal(want[key], got[key]) for key in want)
    assert {u.key for u in ao.load(done.path)} == {u.key for u in ao.load(done.path, format=target)}


def test_a_prefix_that_means_another_component_is_refused(tmp_path: Path) -> None:
    """Behind `lora_transformer_` stands a transformer, behind `lycoris_` this or a U-Net: read again it would be another."""
    path = write(
        tmp_path / "a.safetensors",
        pairs(MODULES, "lora_transformer_", (".lora_down.weight", ".lora_up.weight"), 2.0, True),
    )
    assert ao.load(path).components == ("transformer",)
    with pytest.raises(UnknownArchitectureOfFile, match="in none of the known base models"):
        ao.convert(path, "lycoris", tmp_path / "b.safetensors")
    done = ao.convert(path, "onetrainer", tmp_path / "b.safetensors")
    assert load_file(done.path).keys() == load_file(path).keys()


def test_names_that_underscores_would_make_one_are_refused(tmp_path: Path) -> None:
    twins = {"trunk.0.a_b": (48, 32), "trunk.0.a.b": (48, 32)}
    path = write(tmp_path / "a.safetensors", comfy(twins))
    with pytest.raises(CannotRepresent, match=r"trunk\.0\.a_b.*alike|trunk\.0\.a\.b.*alike"):
        ao.convert(path, "kohya", tmp_path / "b.safetensors")
    assert len(load_file(ao.convert(path, "comfy-down", tmp_path / "b.safetensors").path)) == 4


def two(writer: Callable[[dict[str, tuple[int, int]]], Tensors], folder: Path) -> tuple[Path, Path]:
    """Two adapters of the same modules, the second's numbers others than the first's."""
    first = write(folder / "a.safetensors", writer(MODULES))
    second = {key: tensor if tensor.dim() == 0 else tensor.flip(0) * 0.5 for key, tensor in writer(MODULES).items()}
    return first, write(folder / "b.safetensors", second)


@pytest.mark.parametrize("method", ["cat", "svd"])
@pytest.mark.parametrize("writer", [comfy, musubi])
def test_two_of_one_spelling_are_merged(
    writer: Callable[[dict[str, tuple[int, int]]], Tensors], method: str, tmp_path: Path
) -> None:
    """Exactly: at the rank of both together nothing is lost."""
    one, other = two(writer, tmp_path)
    rank = {} if method == "cat" else {"rank": 8}
    options = {"weights": [0.75, -1.25], "dtype": "float32", **rank}
    done = ao.merge([one, other], tmp_path / "c.safetensors", method, **options)
    assert any("the base model is not known" in note for note in done.written.notes)
    first, second, got = deltas(one), deltas(other), deltas(tmp_path / "c.safetensors")
    assert got.keys() == first.keys()
    for key, delta in got.items():
        want = 0.75 * first[key] - 1.25 * second[key]
        assert torch.allclose(delta, want, rtol=0, atol=1e-6 * float(want.norm()))
    alphas = {key.replace(".lora_A.weight", ".alpha") for key in load_file(one) if "lora_A" in key}
    assert load_file(tmp_path / "c.safetensors").keys() <= load_file(one).keys() | alphas


def test_two_spellings_are_merged_once_they_are_one(tmp_path: Path) -> None:
    one, _ = two(comfy, tmp_path)
    other = write(tmp_path / "m.safetensors", musubi(MODULES))
    with pytest.raises(UsageError, match=r"a\.safetensors.*not known.*m\.safetensors spells names as Kohya"):
        ao.merge([one, other], tmp_path / "c.safetensors", "cat")
    flat = ao.convert(one, "kohya", tmp_path / "flat.safetensors").path
    ao.merge([flat, other], tmp_path / "c.safetensors", "cat", dtype="float32")
    got, first, second = deltas(tmp_path / "c.safetensors"), deltas(one), deltas(other)
    assert all(torch.allclose(got[key], first[key] + second[key], atol=1e-6) for key in got)
    assert len(got) == len(MODULES)


@pytest.mark.parametrize("others", ["a known base", "diffusers' spelling"])
def test_others_are_not_mixed_with_it(others: str, tmp_path: Path) -> None:
    one, _ = two(comfy, tmp_path)
    modules = FLUX if others == "a known base" else MODULES
    other = write(tmp_path / "m.safetensors", pairs(modules, "transformer."))
    says = "is for flux" if others == "a known base" else "spells names as diffusers"
    for sources in ([one, other], [other, one]):
        with pytest.raises(UsageError, match=rf"not known.*m\.safetensors {says}"):
            ao.merge(sources, tmp_path / "c.safetensors", "cat", allow_disjoint=True)
    assert not (tmp_path / "c.safetensors").exists()


def test_other_methods_become_plain_lora(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", lokr(MODULES, PREFIX["comfy"], 4, None, 1.0))
    ao.to_lora(path, tmp_path / "b.safetensors", rank=32)
    tensors, got = load_file(path), deltas(tmp_path / "b.safetensors")
    for name in MODULES:
        stem = PREFIX["comfy"] + name
        want = torch.kron(tensors[f"{stem}.lokr_w1"].double(), tensors[f"{stem}.lokr_w2"].double())
        # In bfloat16, as the source.
        assert float((got[name.replace(".", "_")] - want).norm() / want.norm()) < 0.02
