"""Flux.1's fused projections (q, k and v in one weight) merged with adapters on their parts.

Which rows are whose: huggingface/diffusers `scripts/convert_flux_to_diffusers.py`, black-forest-labs/flux
`src/flux/model.py`, and kohya-ss/sd-scripts `networks/lora_flux.py` for `split_qkv`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_adapters import Array, Numbers, Tensors, close, deltas, file, read

import adapterops as ao
from adapterops.errors import CannotRepresent, UsageError

WEIGHTS = (0.75, -0.5)
INNER = 16
CONFIG = {
    "_class_name": "FluxTransformer2DModel", "in_channels": 8, "num_layers": 1, "num_single_layers": 1,
    "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 24, "pooled_projection_dim": 12,
    "axes_dims_rope": [2, 2, 4], "guidance_embeds": True,
}  # fmt: skip
ATTENTION, SINGLE = "double_blocks_0_img_attn_qkv", "single_blocks_0_linear1"
LAST, OUT = "final_layer_adaLN_modulation_1", "double_blocks_0_img_attn_proj"
PARTS = {
    ATTENTION: {f"transformer_blocks.0.attn.to_{p}": INNER for p in "qkv"},
    SINGLE: {
        **{f"single_transformer_blocks.0.attn.to_{p}": INNER for p in "qkv"},
        "single_transformer_blocks.0.proj_mlp": 4 * INNER,
    },
    LAST: {"norm_out.linear": 2 * INNER},
    OUT: {"transformer_blocks.0.attn.to_out.0": INNER},
}
"""Kohya's name of a projection to the parts whose rows it has, in order, and their numbers."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("base") / "tiny-flux.json"
    path.write_text(json.dumps(CONFIG))
    return str(path)


def rows(module: str) -> int:
    return sum(PARTS[module].values())


def kohya(path: Path, seed: int, modules: tuple[str, ...] = (ATTENTION, SINGLE, LAST, OUT), rank: int = 4) -> Path:
    n, tensors = Numbers(seed), {}
    for module in modules:
        tensors[f"lora_unet_{module}.lora_down.weight"] = n(rank, INNER)
        tensors[f"lora_unet_{module}.lora_up.weight"] = n(rows(module), rank)
        tensors[f"lora_unet_{module}.alpha"] = torch.tensor(3.0)
    return file(path, tensors)


def diffusers(path: Path, seed: int, only: str = "", rank: int = 4) -> Path:
    n, tensors = Numbers(seed), {}
    for parts in PARTS.values():
        for name, size in parts.items():
            if re.search(only, name):
                tensors[f"transformer.{name}.lora_A.weight"] = n(rank, INNER)
                tensors[f"transformer.{name}.lora_B.weight"] = n(size, rank)
    return file(path, tensors)


def by_part(path: Path) -> dict[str, Array]:
    """ΔW of every part, from a Kohya or a diffusers file."""
    out: dict[str, Array] = {}
    for module, change in deltas(path).items():
        if not module.startswith("lora_unet_"):
            out[module.removeprefix("transformer.")] = change
            continue
        parts, at = PARTS[module.removeprefix("lora_unet_")], 0
        for name, size in parts.items():
            own = change[at : at + size]
            # The authors' adaLN gives shift and scale, diffusers' scale and shift.
            out[name] = np.concatenate([own[INNER:], own[:INNER]]) if name == "norm_out.linear" else own
            at += size
    return out


def diagonal(blocks: list[torch.Tensor]) -> torch.Tensor:
    """The blocks in a matrix of zeros, each one right of and below the one before."""
    made: torch.Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return made


def total(*paths: Path) -> dict[str, Array]:
    out: dict[str, Array] = {}
    for weight, path in zip(WEIGHTS, paths, strict=False):
        for name, change in by_part(path).items():
            out[name] = out.get(name, np.zeros(change.shape)) + weight * change
    return out


def assert_total(out: Path, *sources: Path, tolerance: float = 1e-5) -> None:
    wanted, found = total(*sources), by_part(out)
    assert found.keys() == wanted.keys()
    for name, change in wanted.items():
        assert close(found[name], change, tolerance), name


def merge(base: str, out: Path, *sources: Path, **more: Any) -> ao.MergeResult:
    usual = {"method": "cat", "weights": WEIGHTS[: len(sources)], "reading": {"base": base}}
    return ao.merge(sources, out, **{**usual, **more})


@pytest.mark.parametrize("only", ["", r"to_q$", r"proj_mlp|norm_out"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("method", "to"), [("cat", "diffusers"), ("svd", "diffusers"), ("svd", "kohya"), ("cat", "kohya")]
)
def test_a_fused_file_and_one_of_parts(
    only: str, reverse: bool, method: str, to: str, base: str, tmp_path: Path
) -> None:
    sources = [kohya(tmp_path / "k.safetensors", 1), diffusers(tmp_path / "d.safetensors", 2, only)]
    if reverse:
        sources.reverse()
    out = tmp_path / "out.safetensors"
    merge(base, out, *sources, method=method, to=to, rank=8 if method == "svd" else None)
    assert_total(out, *sources)


def test_the_parts_under_another_method(base: str, tmp_path: Path) -> None:
    """Trimming is by part, as if the fused file had come in parts."""
    fused, parts = kohya(tmp_path / "k.safetensors", 1), diffusers(tmp_path / "d.safetensors", 2)
    apart = tmp_path / "apart.safetensors"
    ao.convert(fused, "diffusers", apart, base=base)
    for method, more in (
        ("ties_svd", {"density": 0.3}),
        ("dare_ties_svd", {"density": 0.6}),
        ("tsv", {}),
        ("linear", {}),
    ):
        outs = []
        for one in (fused, apart):
            out = tmp_path / f"{method}-{one.name}"
            merge(base, out, one, parts, method=method, to="diffusers", **more)
            outs.append(by_part(out))
        assert outs[0].keys() == outs[1].keys()
        assert all(close(outs[0][name], outs[1][name]) for name in outs[0]), method


def test_two_fused_files_stay_fused(base: str, tmp_path: Path) -> None:
    sources = [kohya(tmp_path / "a.safetensors", 1), kohya(tmp_path / "b.safetensors", 2)]
    out = tmp_path / "out.safetensors"
    done = merge(base, out, *sources)
    assert read(out).keys() == {f"lora_unet_{module}" for module in PARTS}
    assert {m.rank for m in done.modules} == {8}
    assert_total(out, *sources)


def test_a_block_diagonal(base: str, tmp_path: Path) -> None:
    """sd-scripts' `split_qkv`: each part's down stacked, the ups in a block diagonal; readers apply alpha over all ranks."""
    n, tensors = Numbers(5), {}
    for module in (ATTENTION, SINGLE):
        sizes = list(PARTS[module].values())
        tensors[f"lora_unet_{module}.lora_down.weight"] = torch.cat([n(2, INNER) for _ in sizes])
        tensors[f"lora_unet_{module}.lora_up.weight"] = diagonal([n(size, 2) for size in sizes])
        tensors[f"lora_unet_{module}.alpha"] = torch.tensor(1.0)
    split = file(tmp_path / "split.safetensors", tensors)
    for other in (
        diffusers(tmp_path / "d.safetensors", 2, "attn|mlp"),
        kohya(tmp_path / "k.safetensors", 2, (ATTENTION,)),
    ):
        for method, more in (("cat", {}), ("svd", {"rank": 16})):
            out = tmp_path / f"{method}-{other.name}"
            merge(base, out, split, other, method=method, to="diffusers", **more)
            assert_total(out, split, other)


@pytest.mark.parametrize("block", [16, 24])
def test_a_lokr_on_a_fused_projection(block: int, base: str, tmp_path: Path) -> None:
    """Its rows are merged whether or not the blocks of the Kronecker product end with the parts."""
    n, stem = Numbers(6), f"lora_unet_{ATTENTION}"
    tensors: Tensors = {
        f"{stem}.lokr_w1": n(48 // block, 4), f"{stem}.lokr_w2": n(block, 4), f"{stem}.alpha": torch.tensor(1.0),
    }  # fmt: skip
    sources = [
        file(tmp_path / "k.safetensors", tensors),
        diffusers(tmp_path / "d.safetensors", 2, r"s\.0\.attn\.to_[qkv]"),
    ]
    out = tmp_path / "out.safetensors"
    merge(base, out, *sources, method="svd", rank=16, to="diffusers", allow_disjoint=True)
    assert_total(out, *sources)


def test_a_whole_difference_on_a_fused_projection(base: str, tmp_path: Path) -> None:
    tensors = {f"lora_unet_{ATTENTION}.diff": Numbers(6)(48, INNER), f"lora_unet_{ATTENTION}.diff_b": Numbers(7)(48)}
    sources = [file(tmp_path / "k.safetensors", tensors), diffusers(tmp_path / "d.safetensors", 2, r"to_q$")]
    out = tmp_path / "out.safetensors"
    merge(base, out, *sources, method="svd", rank=16, to="kohya-diffusers", allow_disjoint=True)
    found = {
        re.sub(r"lora_unet_transformer_blocks_0_attn_", "transformer_blocks.0.attn.", m): got
        for m, got in read(out).items()
    }
    whole = deltas(sources[0])[f"lora_unet_{ATTENTION}"]
    bias = read(sources[0])[f"lora_unet_{ATTENTION}"]["diff_b"]
    second = by_part(sources[1])
    flat = {name.replace(".", "_").replace("lora_unet_", ""): change for name, change in deltas(out).items()}
    for number, part in enumerate(PARTS[ATTENTION]):
        at = slice(number * INNER, (number + 1) * INNER)
        wanted = WEIGHTS[0] * whole[at] + (WEIGHTS[1] * second[part] if part in second else 0)
        assert close(flat[part.replace(".", "_")], wanted), part
        assert close(found[part]["diff_b"], WEIGHTS[0] * bias[at], 1e-6), part


@pytest.mark.parametrize("shape", [(48, 1), (48,)])
def test_ia3_of_a_fused_projection(shape: tuple[int, ...], base: str, tmp_path: Path) -> None:
    """Rows of the vector, in the form that the file has: LyCORIS keeps a column (`lycoris/modules/ia3.py`)."""
    fused, part = f"lora_unet_{ATTENTION}", "lycoris_transformer_blocks_0_attn_to_q"
    own = tuple(INNER if n == 48 else n for n in shape)
    sources = [
        file(
            tmp_path / "k.safetensors",
            {f"{fused}.weight": Numbers(1)(*shape), f"{fused}.on_input": torch.tensor(False)},
        ),
        file(tmp_path / "l.safetensors", {f"{part}.weight": Numbers(2)(*own), f"{part}.on_input": torch.tensor(False)}),
    ]
    out = tmp_path / "out.safetensors"
    merge(base, out, *sources, method="svd", to="lycoris")
    whole, other = read(sources[0])[fused]["weight"], read(sources[1])[part]["weight"]
    found = read(out)
    assert close(found[part]["weight"].ravel(), (WEIGHTS[0] * whole[:INNER] + WEIGHTS[1] * other).ravel())
    for number, name in enumerate(PARTS[ATTENTION]):
        values = found["lycoris_" + name.replace(".", "_")]["weight"]
        assert values.shape == own
        if number:
            assert close(values, WEIGHTS[0] * whole[number * INNER : (number + 1) * INNER])


def test_a_sparse_part_on_a_fused_projection(base: str, tmp_path: Path) -> None:
    stem, source = f"lora_unet_{ATTENTION}", kohya(tmp_path / "k.safetensors", 1, (ATTENTION,))
    sparse = {
        f"{stem}.bias_indices": torch.tensor([[0, 40], [3, 5]]),
        f"{stem}.bias_values": torch.tensor([5.0, 6.0]),
        f"{stem}.bias_size": torch.tensor([48, INNER]),
    }
    file(source, load_file(source), sparse)
    sources = [source, diffusers(tmp_path / "d.safetensors", 2, r"s\.0\.attn\.to_[qkv]")]
    out = tmp_path / "out.safetensors"
    merge(base, out, *sources, method="svd", rank=16, to="diffusers", allow_disjoint=True)
    assert_total(out, *sources)


def with_magnitudes(path: Path) -> Path:
    tensors = load_file(kohya(path, 1, (ATTENTION,)))
    tensors[f"lora_unet_{ATTENTION}.dora_scale"] = Numbers(8)(48, 1).abs() + 0.5
    return file(path, tensors)


def test_magnitudes_of_a_fused_projection(base: str, tmp_path: Path) -> None:
    sources = [
        with_magnitudes(tmp_path / "k.safetensors"),
        diffusers(tmp_path / "d.safetensors", 2, r"s\.0\.attn\.to_[qkv]"),
    ]
    out = tmp_path / "out.safetensors"
    with pytest.raises(CannotRepresent, match=r"attn\.to_[qkv].*DoRA magnitude.*--base-weights"):
        merge(base, out, *sources, to="diffusers", allow_disjoint=True)
    assert not out.exists()


@pytest.mark.parametrize("names", ["authors", "diffusers"])
def test_folded_magnitudes_of_a_fused_projection(names: str, base: str, tmp_path: Path) -> None:
    """Norms go along each output's row, so the base may be whole or in parts."""
    sources = [
        with_magnitudes(tmp_path / "k.safetensors"),
        diffusers(tmp_path / "d.safetensors", 2, r"s\.0\.attn\.to_[qkv]"),
    ]
    weight = Numbers(9)(48, INNER)
    weights = {"double_blocks.0.img_attn.qkv.weight": weight}
    if names == "diffusers":
        weights = {
            f"{part}.weight": weight[n * INNER : (n + 1) * INNER].clone() for n, part in enumerate(PARTS[ATTENTION])
        }
    save_file(weights, tmp_path / "flux.safetensors")
    out = tmp_path / "out.safetensors"
    more = {"method": "svd", "rank": 16, "to": "diffusers", "base_weights": str(tmp_path / "flux.safetensors")}
    merge(base, out, *sources, **more)
    got = read(sources[0])[f"lora_unet_{ATTENTION}"]
    new = weight.double().numpy() + deltas(sources[0])[f"lora_unet_{ATTENTION}"]
    change = got["magnitude"] * new / np.linalg.norm(new, axis=1, keepdims=True) - weight.double().numpy()
    for number, part in enumerate(PARTS[ATTENTION]):
        wanted = WEIGHTS[0] * change[number * INNER : (number + 1) * INNER] + WEIGHTS[1] * by_part(sources[1])[part]
        assert close(by_part(out)[part], wanted), part


def test_a_weight_of_a_part(base: str, tmp_path: Path) -> None:
    """A weights file speaks of each adapter's own modules: the fused one's name for the first, the parts' for the second."""
    fused, parts = kohya(tmp_path / "k.safetensors", 1, (ATTENTION,)), diffusers(tmp_path / "d.safetensors", 2, "attn")
    rules = tmp_path / "weights.yaml"
    rules.write_text('- {default: 1, patterns: {"*to_qkv": 0.25}}\n- {default: 1, patterns: {"*attn.to_k": 0}}\n')
    out = tmp_path / "out.safetensors"
    merge(base, out, fused, parts, weights=str(rules), to="diffusers")
    for name, own in by_part(fused).items():
        other = 0 if name.endswith("to_k") else by_part(parts)[name]
        assert close(by_part(out)[name], 0.25 * own + other), name


def test_what_cannot_be_written_is_refused_and_leaves_nothing(base: str, tmp_path: Path) -> None:
    """A whole difference has no place in a diffusers file: said with the format that has one, and nothing is left."""
    sources = [
        file(tmp_path / f"{n}.safetensors", {f"lora_unet_{ATTENTION}.diff": Numbers(n)(48, INNER)}) for n in (1, 2)
    ]
    with pytest.raises((CannotRepresent, UsageError), match=r"--to kohya"):
        merge(base, tmp_path / "out.safetensors", *sources, method="svd", to="diffusers")
    assert {p.name for p in tmp_path.iterdir()} == {"1.safetensors", "2.safetensors"}
