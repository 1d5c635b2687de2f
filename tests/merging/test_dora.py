"""DoRA: merged where its magnitudes are the same, or folded against the base; never dropped.

W' = m · (W + ΔW) / ‖W + ΔW‖ (https://arxiv.org/abs/2402.09353), the norm of each output, or of each input.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_adapters import (
    CONV,
    DOTTED,
    Array,
    Numbers,
    Q,
    Tensors,
    added,
    best,
    close,
    deltas,
    file,
    lora,
    pair,
    peft,
    read,
    weights_of,
)

import adapterops as ao
from adapterops.errors import AdapterOpsError, CannotRepresent, UnreadableFile, UsageError

WEIGHTS = (0.75, -0.5)
FIXTURES = Path(__file__).parents[2] / "fixtures"


def dora(folder: Path, seed: int, magnitude: torch.Tensor | None, module: str = "l.0.q", **config: object) -> Path:
    tensors = pair(seed, module, sizes=(len(magnitude) if magnitude is not None else 12, 10))
    if magnitude is not None:
        tensors[f"{module}.lora_magnitude_vector"] = magnitude
    return peft(folder, tensors, use_dora=magnitude is not None, **config)  # type: ignore[arg-type]


def some(seed: int, size: int = 12) -> torch.Tensor:
    return Numbers(seed)(size).abs() + 0.5


def base(path: Path, **weights: torch.Tensor) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key.replace("__", "."): t.contiguous() for key, t in weights.items()}, path)
    return path


def changed(weight: torch.Tensor, source: Path, module: str, axis: int = 0) -> Array:
    """W' − W as a matrix, by hand; `axis` is the one that the magnitudes go along."""
    w = weight.double().numpy()
    new = w + deltas(source)[module].reshape(w.shape)
    others = tuple(n for n in range(w.ndim) if n != axis)
    m = read(source)[module]["magnitude"].reshape([-1 if n == axis else 1 for n in range(w.ndim)])
    out: Array = (m * new / np.sqrt((new**2).sum(axis=others, keepdims=True)) - w).reshape(len(w), -1)
    return out


def test_equal_magnitudes_are_kept(tmp_path: Path) -> None:
    sources = [dora(tmp_path / name, seed, some(7)) for name, seed in (("a", 1), ("b", 2))]
    ao.merge(sources, tmp_path / "out", "svd", weights=WEIGHTS, rank=8)
    key = "base_model.model.l.0.q.lora_magnitude_vector"
    assert torch.equal(load_file(weights_of(tmp_path / "out"))[key].float(), some(7))
    assert close(
        deltas(tmp_path / "out")["l.0.q"], added(w * deltas(s)["l.0.q"] for w, s in zip(WEIGHTS, sources, strict=True))
    )
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["use_dora"]


@pytest.mark.parametrize("method", ["linear", "cat", "ties_svd", "svd"])
@pytest.mark.parametrize(("other", "reason"), [(some(8), "magnitudes differ"), (None, "not all adapters have one")])
def test_other_magnitudes_are_refused(other: torch.Tensor | None, reason: str, method: str, tmp_path: Path) -> None:
    sources = [dora(tmp_path / "a", 1, some(7)), dora(tmp_path / "b", 2, other)]
    density: dict[str, Any] = {"density": 0.5} if method == "ties_svd" else {}
    with pytest.raises(CannotRepresent, match=rf"l\.0\.q.*{reason}.*--base-weights"):
        ao.merge(sources, tmp_path / "out", method, **density)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("other", [some(8), None])
def test_folded_against_the_base(other: torch.Tensor | None, tmp_path: Path) -> None:
    sources = [dora(tmp_path / "a", 1, some(7)), dora(tmp_path / "b", 2, other)]
    weight = Numbers(3)(12, 10)
    folder = base(tmp_path / "base" / "model.safetensors", model__l__0__q__weight=weight).parent
    done = ao.merge(sources, tmp_path / "out", "svd", weights=WEIGHTS, rank=10, base_weights=str(folder))
    first = changed(weight, sources[0], "l.0.q")
    second = changed(weight, sources[1], "l.0.q") if other is not None else deltas(sources[1])["l.0.q"]
    wanted = WEIGHTS[0] * first + WEIGHTS[1] * second
    assert close(deltas(tmp_path / "out")["l.0.q"], wanted)
    assert "magnitude" not in read(tmp_path / "out")["l.0.q"]
    assert any("folded" in note for note in done.notes)
    ao.merge(sources, tmp_path / "low", "svd", weights=WEIGHTS, rank=5, svd="exact", base_weights=str(folder))
    assert close(deltas(tmp_path / "low")["l.0.q"], best(wanted, 5))


def test_folded_the_strength_is_on_the_change(tmp_path: Path) -> None:
    """Half of a DoRA is half of what it changes, not the change of half its factors."""
    source, weight = dora(tmp_path / "a", 1, some(7)), Numbers(3)(12, 10)
    path = base(tmp_path / "base.safetensors", l__0__q__weight=weight)
    ao.merge([source], tmp_path / "out", "svd", weights=[0.5], rank=10, base_weights=str(path))
    assert close(deltas(tmp_path / "out")["l.0.q"], 0.5 * changed(weight, source, "l.0.q"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_folded_against_a_base_of_sixteen_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    source, weight = dora(tmp_path / "a", 1, some(7)), Numbers(3, dtype)(12, 10)
    path = base(tmp_path / "base.safetensors", l__0__q__weight=weight)
    ao.merge([source], tmp_path / "out", "svd", rank=10, base_weights=str(path))
    assert close(deltas(tmp_path / "out")["l.0.q"], changed(weight, source, "l.0.q"))


@pytest.mark.parametrize("axis", [0, 1])
def test_kohya_linear_and_convolution(axis: int, tmp_path: Path) -> None:
    """Kohya's magnitudes are (out, 1, …) or, per input, (1, in, …)."""
    n = Numbers(9)
    weights = {Q: n(320, 320), CONV: n(320, 4, 3, 3)}
    sources = []
    for seed in (1, 2):
        m = Numbers(seed + 20)
        tensors: Tensors = {
            **lora(seed),
            f"{CONV}.lora_down.weight": m(4, 4, 3, 3), f"{CONV}.lora_up.weight": m(320, 4, 1, 1),
            f"{CONV}.alpha": torch.tensor(2.0),
            f"{Q}.dora_scale": m(*((320, 1), (1, 320))[axis]).abs() + 0.5,
            f"{CONV}.dora_scale": m(*((320, 1, 1, 1), (1, 4, 1, 1))[axis]).abs() + 0.5,
        }  # fmt: skip
        sources.append(file(tmp_path / f"{seed}.safetensors", tensors))
    unet = tmp_path / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    base(unet, **{f"{DOTTED[module]}.weight".replace(".", "__"): w for module, w in weights.items()})
    base(tmp_path / "pipeline" / "text_encoder" / "model.safetensors", text_model__x__weight=n(3, 3))
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    out = tmp_path / "out.safetensors"
    # A magnitude per input changes W by more than a low rank; 320 holds all.
    ao.merge(sources, out, "svd", weights=WEIGHTS, rank=320, base_weights=str(tmp_path / "pipeline"))
    for module, weight in weights.items():
        wanted = added(w * changed(weight, s, module, axis) for w, s in zip(WEIGHTS, sources, strict=True))
        assert close(deltas(out)[module], wanted), module


def test_an_authors_checkpoint_is_a_base(tmp_path: Path) -> None:
    """`--base-weights` also takes the one file of a checkpoint, whose names are the authors'."""
    weight = Numbers(9)(320, 320)
    name = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    save_file({name: weight}, tmp_path / "sd.safetensors")
    source = file(tmp_path / "a.safetensors", lora(1), {f"{Q}.dora_scale": some(5, 320).reshape(320, 1)})
    out = tmp_path / "out.safetensors"
    ao.merge([source], out, "svd", rank=320, base_weights=str(tmp_path / "sd.safetensors"))
    assert close(deltas(out)[Q], changed(weight, source, Q))


def test_loha_with_magnitudes(tmp_path: Path) -> None:
    n = Numbers(4)
    tensors: Tensors = {f"{Q}.hada_{role}": n(*shape) for role, shape in {
        "w1_a": (320, 2), "w1_b": (2, 320), "w2_a": (320, 2), "w2_b": (2, 320)}.items()}  # fmt: skip
    tensors |= {f"{Q}.alpha": torch.tensor(1.0), f"{Q}.dora_scale": n(320, 1).abs() + 0.5}
    source, weight = file(tmp_path / "a.safetensors", tensors), n(320, 320)
    path = base(tmp_path / "base.safetensors", **{f"{DOTTED[Q]}.weight".replace(".", "__"): weight})
    out = tmp_path / "out.safetensors"
    ao.merge([source], out, "svd", rank=320, base_weights=str(path))
    assert close(deltas(out)[Q], changed(weight, source, Q))


@pytest.mark.parametrize("stated", ["--base", "fan_in_fan_out"])
def test_a_base_that_keeps_its_weights_transposed(stated: str, tmp_path: Path) -> None:
    """GPT-2's Conv1D holds (in, out), and `attn.c_proj` is square: its shape does not tell."""
    module, n = "transformer.h.0.attn.c_proj", Numbers(6)
    size = json.loads((FIXTURES / "bases" / "gpt2" / "config.json").read_text())["n_embd"]
    tensors = pair(1, module, sizes=(size, size))
    tensors[f"{module}.lora_magnitude_vector"] = some(7, size)
    source = peft(tmp_path / "a", tensors, use_dora=True, fan_in_fan_out=True)
    weight = n(size, size)
    # GPT-2's class on the meta device, or nothing but the adapter's own config.
    reading = {"base": str(FIXTURES / "bases" / "gpt2")} if stated == "--base" else {}
    path = base(tmp_path / "base.safetensors", transformer__h__0__attn__c_proj__weight=weight.T)
    ao.merge([source], tmp_path / "out", "svd", rank=size, base_weights=str(path), reading=reading)
    assert close(deltas(tmp_path / "out")[module], changed(weight, source, module))


def test_another_base_is_refused(tmp_path: Path) -> None:
    source = dora(tmp_path / "a", 1, some(7))
    other = base(tmp_path / "other.safetensors", l__0__q__weight=torch.ones(24, 10))
    with pytest.raises(UsageError, match=r"other\.safetensors.*\[24, 10\].*\[12, 10\].*another base model"):
        ao.merge([source], tmp_path / "out", "svd", base_weights=str(other))
    without = base(tmp_path / "without.safetensors", l__1__q__weight=torch.ones(12, 10))
    with pytest.raises(UsageError, match=r"without\.safetensors.*l\.0\.q\.weight"):
        ao.merge([source], tmp_path / "out", "svd", base_weights=str(without))
    assert not (tmp_path / "out").exists()


def test_a_base_that_is_an_adapter_is_refused(tmp_path: Path) -> None:
    source = dora(tmp_path / "a", 1, some(7))
    with pytest.raises(AdapterOpsError, match=r"l\.0\.q\.weight|adapter"):
        ao.merge([source], tmp_path / "out", "svd", base_weights=str(source))


def test_a_base_that_is_not_there(tmp_path: Path) -> None:
    source = dora(tmp_path / "a", 1, some(7))
    with pytest.raises(UnreadableFile, match=r"nowhere"):
        ao.merge([source], tmp_path / "out", "svd", base_weights=str(tmp_path / "nowhere"))


def test_a_base_that_holds_no_number(tmp_path: Path) -> None:
    weight = Numbers(3)(12, 10)
    weight[1, 1] = float("nan")
    path = base(tmp_path / "broken.safetensors", l__0__q__weight=weight)
    with pytest.raises(AdapterOpsError, match=r"broken\.safetensors.*l\.0\.q\.weight.*NaN"):
        ao.merge([dora(tmp_path / "a", 1, some(7))], tmp_path / "out", "svd", base_weights=str(path))


def test_another_base_under_the_recipes_name_is_noticed(tmp_path: Path) -> None:
    source, path = dora(tmp_path / "a", 1, some(7)), tmp_path / "base.safetensors"
    base(path, l__0__q__weight=Numbers(3)(12, 10))
    ao.merge([source], tmp_path / "out", "svd", base_weights=str(path))
    base(path, l__0__q__weight=Numbers(4)(12, 10))
    with pytest.raises(UsageError, match=r"base\.safetensors is not the base that"):
        ao.merge(recipe=tmp_path / "out", output=tmp_path / "again")


def test_a_magnitude_on_an_embedding_is_not_folded(tmp_path: Path) -> None:
    n = Numbers(1)
    tensors = {
        "emb.lora_embedding_A": n(4, 30), "emb.lora_embedding_B": n(12, 4), "emb.lora_magnitude_vector": some(2),
    }  # fmt: skip
    source = peft(tmp_path / "a", tensors, use_dora=True)
    path = base(tmp_path / "base.safetensors", emb__weight=n(30, 12))
    with pytest.raises(CannotRepresent, match=r"emb.*embedding"):
        ao.merge([source], tmp_path / "out", "svd", base_weights=str(path))


@pytest.mark.parametrize("weight", [0.5, -1.0, 2.0])
def test_a_strength_on_a_kept_magnitude(weight: float, tmp_path: Path) -> None:
    """One DoRA at another strength: the output must say what it is, ΔW scaled under the same magnitude, or refuse."""
    source = dora(tmp_path / "a", 1, some(7))
    ao.merge([source], tmp_path / "out", "svd", weights=[weight])
    assert close(deltas(tmp_path / "out")["l.0.q"], weight * deltas(source)["l.0.q"])
    assert np.array_equal(read(tmp_path / "out")["l.0.q"]["magnitude"], read(source)["l.0.q"]["magnitude"])
