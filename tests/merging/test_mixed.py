"""Updates of different methods, shapes, formats and types on one module, merged through their deltas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
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
    delta,
    deltas,
    file,
    lora,
    pair,
    peft,
    read,
    weights_of,
)

import adapterops as ao
from adapterops.errors import CannotRepresent, UsageError

WEIGHTS = (0.75, -0.5, 1.25)


def loha(seed: int, rank: int = 2) -> Tensors:
    n = Numbers(seed)
    shapes = {"w1_a": (320, rank), "w1_b": (rank, 320), "w2_a": (320, rank), "w2_b": (rank, 320)}
    return {**{f"{Q}.hada_{role}": n(*shape) for role, shape in shapes.items()}, f"{Q}.alpha": torch.tensor(1.0)}


def lokr(seed: int, whole: bool = False) -> Tensors:
    n = Numbers(seed)
    if whole:
        return {f"{Q}.lokr_w1": n(8, 8), f"{Q}.lokr_w2": n(40, 40), f"{Q}.alpha": torch.tensor(1.0)}
    return {
        f"{Q}.lokr_w1": n(4, 4), f"{Q}.lokr_w2_a": n(80, 2), f"{Q}.lokr_w2_b": n(2, 80), f"{Q}.alpha": torch.tensor(3.0),
    }  # fmt: skip


def diff(seed: int, stem: str = Q, *shape: int) -> Tensors:
    return {f"{stem}.diff": Numbers(seed)(*(shape or (320, 320)))}


def files(folder: Path, *contents: Tensors) -> list[Path]:
    return [file(folder / f"{'abc'[n]}.safetensors", tensors) for n, tensors in enumerate(contents)]


def weighted_sum(sources: list[Path], module: str = Q) -> Array:
    return added(w * deltas(s)[module] for w, s in zip(WEIGHTS, sources, strict=False))


def merged(sources: list[Path], method: str, folder: Path, **more: Any) -> Path:
    out = folder / "out.safetensors"
    ao.merge(sources, out, method, **{"weights": WEIGHTS[: len(sources)], **more})
    return out


# Whole differences.


@pytest.mark.parametrize("method", ["svd", "cat"])
def test_whole_differences_are_added_whole(method: str, tmp_path: Path) -> None:
    sources = files(tmp_path, diff(1), diff(2))
    out = merged(sources, method, tmp_path)
    assert close(read(out)[Q]["diff"], weighted_sum(sources), 1e-6)


def test_whole_differences_of_a_convolution_keep_their_shape(tmp_path: Path) -> None:
    sources = files(tmp_path, diff(1, CONV, 320, 4, 3, 3), diff(2, CONV, 320, 4, 3, 3))
    out = merged(sources, "svd", tmp_path)
    assert read(out)[CONV]["diff"].shape == (320, 4, 3, 3)
    assert close(deltas(out)[CONV], weighted_sum(sources, CONV), 1e-6)


def test_whole_differences_under_ties(tmp_path: Path) -> None:
    sources = files(tmp_path, diff(1), diff(2))
    out = merged(sources, "ties_svd", tmp_path, density=0.3)
    parts = []
    for w, source in zip(WEIGHTS, sources, strict=False):
        values = deltas(source)[Q]
        cut = np.sort(np.abs(values).ravel())[::-1][int(0.3 * values.size) - 1]
        parts.append(w * values * (np.abs(values) >= cut))
    stacked = np.stack(parts)
    agree = (np.sign(stacked) == np.where(stacked.sum(0) >= 0, 1, -1)) & (stacked != 0)
    wanted = (stacked * agree).sum(0) / np.maximum(agree.sum(0), 1)
    assert close(read(out)[Q]["diff"], wanted, 1e-5)


def test_a_whole_difference_beside_lora_needs_a_rank(tmp_path: Path) -> None:
    sources = files(tmp_path, lora(1), diff(2))
    with pytest.raises(UsageError, match=r"b\.safetensors.*attn1\.to_q has no rank.*--rank R"):
        merged(sources, "svd", tmp_path)
    out = merged(sources, "svd", tmp_path, rank=320)
    assert close(deltas(out)[Q], weighted_sum(sources))
    out = merged(sources, "svd", tmp_path, rank=16, svd="exact", overwrite=True)
    assert close(deltas(out)[Q], best(weighted_sum(sources), 16))


def test_a_sparse_part_beside_a_lora_is_one_delta(tmp_path: Path) -> None:
    sparse: Tensors = {
        f"{Q}.bias_indices": torch.tensor([[0, 7, 319, 7], [5, 8, 0, 8]]),
        f"{Q}.bias_values": Numbers(9)(4) * 100,
        f"{Q}.bias_size": torch.tensor([320, 320]),
    }
    sources = files(tmp_path, {**lora(1), **sparse}, lora(2))
    out = merged(sources, "svd", tmp_path, rank=320)
    assert close(deltas(out)[Q], weighted_sum(sources))
    out = merged(sources, "magnitude_prune_svd", tmp_path, density=0.01, rank=320, overwrite=True)
    wanted = np.zeros((320, 320))
    for w, source in zip(WEIGHTS, sources, strict=False):
        values = deltas(source)[Q]
        cut = np.sort(np.abs(values).ravel())[::-1][int(0.01 * values.size) - 1]
        wanted += w * values * (np.abs(values) >= cut)
    assert close(deltas(out)[Q], wanted, 1e-4)
    with pytest.raises(UsageError, match=r"attn1"):
        merged(sources, "linear", tmp_path, overwrite=True)


# LoRA, LoHa, LoKr.


@pytest.mark.parametrize("method", ["svd", "cat"])
def test_three_methods_on_one_module(method: str, tmp_path: Path) -> None:
    sources = files(tmp_path, lora(1), loha(2), lokr(3))
    rank = {} if method == "cat" else {"rank": 16}  # 4 of LoRA, 2² of LoHa, 4 · 2 of LoKr
    out = merged(sources, method, tmp_path, **rank)
    assert read(out)[Q]["down"].shape == (16, 320)
    assert close(deltas(out)[Q], weighted_sum(sources), 1e-5)


def test_three_methods_below_the_exact_rank(tmp_path: Path) -> None:
    sources = files(tmp_path, lora(1), loha(2), lokr(3))
    out = merged(sources, "svd", tmp_path, rank=6)
    assert close(deltas(out)[Q], best(weighted_sum(sources), 6), 1e-5)


def test_three_methods_under_ties(tmp_path: Path) -> None:
    sources = files(tmp_path, lora(1), loha(2), lokr(3, whole=True))
    out = merged(sources, "ties_svd", tmp_path, density=1.0, rank=320, weights=(1, 1, 1))
    stacked = np.stack([deltas(s)[Q] for s in sources])
    agree = np.sign(stacked) == np.where(stacked.sum(0) >= 0, 1, -1)
    assert close(deltas(out)[Q], (stacked * agree).sum(0) / np.maximum(agree.sum(0), 1), 1e-5)


def test_a_loha_is_exact_at_the_square_of_its_rank(tmp_path: Path) -> None:
    sources = files(tmp_path, loha(1, rank=3), loha(2, rank=2))
    out = merged(sources, "cat", tmp_path)
    assert read(out)[Q]["down"].shape == (13, 320)
    assert close(deltas(out)[Q], weighted_sum(sources))
    out = merged(sources, "svd", tmp_path, rank=13, overwrite=True)
    assert close(deltas(out)[Q], weighted_sum(sources))


def test_a_lokr_of_whole_factors_needs_a_rank(tmp_path: Path) -> None:
    sources = files(tmp_path, lora(1), lokr(2, whole=True))
    with pytest.raises(UsageError, match=r"b\.safetensors.*--rank R"):
        merged(sources, "svd", tmp_path)
    out = merged(sources, "svd", tmp_path, rank=68)  # a Kronecker product of rank 8 · 40 has all 320
    assert close(deltas(out)[Q], best(weighted_sum(sources), 68), 1e-4)


# Convolutions and embeddings.


def conv(seed: int, flat: bool = False, tucker: bool = False) -> Tensors:
    n = Numbers(seed)
    if tucker:
        return {
            f"{CONV}.lora_down.weight": n(4, 4, 1, 1), f"{CONV}.lora_up.weight": n(320, 4, 1, 1),
            f"{CONV}.lora_mid.weight": n(4, 4, 3, 3), f"{CONV}.alpha": torch.tensor(2.0),
        }  # fmt: skip
    down, up = n(4, 4, 3, 3), n(320, 4, 1, 1)
    return {
        f"{CONV}.lora_down.weight": down.flatten(1) if flat else down,
        f"{CONV}.lora_up.weight": up.flatten(1) if flat else up,
        f"{CONV}.alpha": torch.tensor(2.0),
    }


@pytest.mark.parametrize(
    ("method", "more"), [("svd", {"rank": 8}), ("cat", {}), ("dare_linear_svd", {"rank": 36, "density": 1})]
)
def test_convolutions(method: str, more: dict[str, Any], tmp_path: Path) -> None:
    sources = files(tmp_path, conv(1), conv(2))
    out = merged(sources, method, tmp_path, **more)
    assert read(out)[CONV]["down"].shape[1:] == (4, 3, 3)
    assert read(out)[CONV]["up"].shape[2:] == (1, 1)
    assert close(deltas(out)[CONV], weighted_sum(sources, CONV))


@pytest.mark.parametrize("order", [(False, True), (True, False)])
def test_a_kernel_that_one_file_keeps_flat(order: tuple[bool, bool], tmp_path: Path) -> None:
    sources = files(tmp_path, conv(1, flat=order[0]), conv(2, flat=order[1]))
    out = merged(sources, "svd", tmp_path, rank=8)
    assert read(out)[CONV]["down"].shape == (8, 4, 3, 3)
    assert close(deltas(out)[CONV], weighted_sum(sources, CONV))


def test_a_tucker_core(tmp_path: Path) -> None:
    sources = files(tmp_path, conv(1, tucker=True), conv(2))
    out = merged(sources, "svd", tmp_path, rank=20)
    assert close(deltas(out)[CONV], weighted_sum(sources, CONV))
    with pytest.raises(UsageError, match=r"a\.safetensors.*--method svd"):
        merged(sources, "linear", tmp_path, overwrite=True)


@pytest.mark.parametrize("method", ["svd", "cat"])
def test_embeddings(method: str, tmp_path: Path) -> None:
    sources = []
    for seed, alpha in ((1, 8.0), (2, 3.0)):
        n = Numbers(seed)
        tensors = {"emb.lora_embedding_A": n(4, 30), "emb.lora_embedding_B": n(12, 4)}
        sources.append(peft(tmp_path / str(seed), tensors, alpha))
    more: dict[str, Any] = {"rank": 8} if method == "svd" else {}
    ao.merge(sources, tmp_path / "out", method, weights=WEIGHTS[:2], **more)
    assert "base_model.model.emb.lora_embedding_A" in load_file(weights_of(tmp_path / "out"))
    assert close(deltas(tmp_path / "out")["emb"], weighted_sum(sources, "emb"))


def test_an_embedding_and_a_matrix_are_not_mixed(tmp_path: Path) -> None:
    n = Numbers(1)
    one = peft(tmp_path / "a", {"emb.lora_embedding_A": n(4, 30), "emb.lora_embedding_B": n(12, 4)})
    two = peft(tmp_path / "b", pair(2, "emb", sizes=(12, 30)))
    with pytest.raises(CannotRepresent, match=r"emb.*embedding"):
        ao.merge([one, two], tmp_path / "out", "svd")


# Scales, formats, types.


def test_scales_of_every_kind_are_one_delta(tmp_path: Path) -> None:
    """rsLoRA, patterns of rank and alpha, and a plain alpha: the output's config and tensors say the sum."""
    one = peft(tmp_path / "a", {**pair(1), **pair(2, "l.1.q", rank=2)}, 8, use_rslora=True, rank_pattern={"l.1.q": 2})
    two = peft(tmp_path / "b", {**pair(3), **pair(4, "l.1.q")}, 3, alpha_pattern={"l.1.q": 5})
    ao.merge([one, two], tmp_path / "out", "svd", weights=WEIGHTS[:2], rank=8)
    for module in ("l.0.q", "l.1.q"):
        assert close(deltas(tmp_path / "out")[module], weighted_sum([one, two], module))


def test_three_formats_of_the_same_modules(tmp_path: Path) -> None:
    kohya = file(tmp_path / "a.safetensors", lora(1), conv(2))
    n = Numbers(3)
    dotted = {
        "unet." + DOTTED[Q] + ".lora_A.weight": n(4, 320), "unet." + DOTTED[Q] + ".lora_B.weight": n(320, 4),
        "unet." + DOTTED[CONV] + ".lora_A.weight": n(4, 4, 3, 3), "unet." + DOTTED[CONV] + ".lora_B.weight": n(320, 4, 1, 1),
    }  # fmt: skip
    diffusers = file(tmp_path / "b.safetensors", dotted)
    bare = {key.removeprefix("unet."): n(*t.shape) for key, t in dotted.items()}
    folder = peft(tmp_path / "c", bare, 3, auto_mapping={"base_model_class": "UNet2DConditionModel"})
    sources = [kohya, diffusers, folder]
    names = [{m: m for m in DOTTED}, {m: f"unet.{d}" for m, d in DOTTED.items()}, DOTTED]
    for to, spelled in (("kohya", names[0]), ("diffusers", names[1]), ("peft", names[2])):
        out = tmp_path / ("out" if to == "peft" else f"out-{to}.safetensors")
        ao.merge(sources, out, "cat", weights=WEIGHTS, to=to, reading={"arch": "sd1"})
        for module in (Q, CONV):
            wanted = added(
                w * deltas(source)[own[module]] for w, source, own in zip(WEIGHTS, sources, names, strict=True)
            )
            assert close(deltas(out)[spelled[module]], wanted), (to, module)


@pytest.mark.parametrize(
    ("types", "asked", "wanted"),
    [
        ((torch.float16, torch.float16), None, torch.float16),
        ((torch.float16, torch.float32), None, torch.float32),
        ((torch.bfloat16, torch.float16), None, torch.float32),
        ((torch.float32, torch.float64), None, torch.float64),
        ((torch.float32, torch.float32), "bfloat16", torch.bfloat16),
    ],
)
def test_the_widest_type_is_kept(
    types: tuple[torch.dtype, torch.dtype], asked: str | None, wanted: torch.dtype, tmp_path: Path
) -> None:
    sources = [
        file(tmp_path / f"{n}.safetensors", {k: t for k, t in lora(n).items() if "alpha" not in k}, dtype=dtype)
        for n, dtype in enumerate(types)
    ]
    out = tmp_path / "out.safetensors"
    ao.merge(sources, out, "svd", weights=WEIGHTS[:2], rank=8, dtype=asked)
    assert {t.dtype for key, t in load_file(out).items() if "alpha" not in key} == {wanted}
    rounding = {torch.float16: 1e-3, torch.bfloat16: 1e-2}.get(wanted, 1e-6)
    assert close(deltas(out)[Q], weighted_sum(sources), rounding)


def test_double_precision_is_kept(tmp_path: Path) -> None:
    sources = [file(tmp_path / f"{n}.safetensors", lora(n), dtype=torch.float64) for n in (1, 2)]
    for method in ("svd", "cat"):
        out = tmp_path / f"{method}.safetensors"
        ao.merge(sources, out, method, weights=WEIGHTS[:2], rank=8)  # which cat gives by itself
        assert close(deltas(out)[Q], weighted_sum(sources), 1e-12), method


# What every merge must keep.


def test_one_adapter_alone_is_scaled(tmp_path: Path) -> None:
    source = file(tmp_path / "a.safetensors", lora(1))
    for method in ("svd", "cat", "linear"):
        out = tmp_path / f"{method}.safetensors"
        ao.merge([source], out, method, weights=[-0.5])
        assert close(deltas(out)[Q], -0.5 * deltas(source)[Q])


def test_nobodys_delta_stays_as_it_is(tmp_path: Path) -> None:
    """Modules that one adapter has alone come through every exact method scaled by its weight."""
    one, two = files(tmp_path, {**lora(1), **conv(3)}, lora(2))
    out = merged([one, two], "svd", tmp_path, rank=8)
    assert close(deltas(out)[CONV], WEIGHTS[0] * deltas(one)[CONV])
    assert delta(read(out)[Q]).shape == (320, 320)
