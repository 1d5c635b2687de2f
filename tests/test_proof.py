"""A proof fails when it should: outputs that are wrong in every way that a writer can be wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from adapterops import api, registry
from adapterops.adapter import Adapter, Certainty, Fact, Update
from adapterops.errors import BrokenAdapter, ProofFailed
from adapterops.plugin import Format, Output, OutputFile, Target
from adapterops.proof import check_finite, prove
from adapterops.storage import LazyTensor
from adapterops.storage.tensor import CHUNK, MemorySource

BLOCK = "lora_unet_mid_block_attentions_0_transformer_blocks_0_"
WIDE = 1280
SHAPES = {
    f"{BLOCK}attn1_to_q": (WIDE, WIDE),
    f"{BLOCK}attn1_to_k": (WIDE, WIDE),
    f"{BLOCK}ff_net_2": (WIDE, 4 * WIDE),
    "lora_te_text_model_encoder_layers_0_self_attn_q_proj": (768, 768),
}
RANK = 4
Tensors = dict[str, LazyTensor]


def state(dtype: torch.dtype = torch.float32, size: float = 0.05) -> dict[str, torch.Tensor]:
    dice = torch.Generator().manual_seed(0)
    out = {}
    for name, (rows, columns) in SHAPES.items():
        out[f"{name}.lora_down.weight"] = (torch.randn(RANK, columns, generator=dice, dtype=torch.float64) * size).to(
            dtype
        )
        out[f"{name}.lora_up.weight"] = (torch.randn(rows, RANK, generator=dice, dtype=torch.float64) * size).to(dtype)
        out[f"{name}.alpha"] = torch.tensor(2.0, dtype=dtype)
    return out


def stored(path: Path, **options: Any) -> Path:
    save_file(state(**options), path)
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return stored(tmp_path / "source.safetensors")


class Tampering(Format):
    """Kohya's format, but for what `change` does to the tensors on their way to the file."""

    change: Callable[[Tensors], Tensors]

    def write(self, adapter: Adapter, target: Target) -> Output:
        out = super().write(adapter, target)
        (file,) = out.files
        return out._replace(files=(OutputFile(file.path, self.change(dict(file.tensors)), file.metadata),))


@pytest.fixture
def tamper(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Tensors], Tensors]], None]:
    kohya = type(registry.formats()["kohya"])

    def install(change: Callable[[Tensors], Tensors]) -> None:
        wrong = type("Wrong", (Tampering, kohya), {"change": staticmethod(change)})()
        monkeypatch.setattr(registry, "formats", lambda: {"kohya": wrong})

    return install


def remade(tensor: LazyTensor, change: Callable[[torch.Tensor], torch.Tensor]) -> LazyTensor:
    values = change(tensor.torch()).contiguous()
    data = values.reshape(-1).view(torch.uint8).numpy().tobytes()
    return LazyTensor(tensor.key, tensor.dtype, tuple(values.shape), MemorySource(data), 0)


Q, K, FF = (f"{BLOCK}{name}" for name in ("attn1_to_q", "attn1_to_k", "ff_net_2"))


def swap(one: str, two: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, one: tensors[two], two: tensors[one]}


def edit(key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, key: remade(tensors[key], change)}


def flip_bit(at: int, bit: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(values: torch.Tensor) -> torch.Tensor:
        data = bytearray(values.numpy().tobytes())
        data[at] ^= 1 << bit
        return torch.frombuffer(data, dtype=values.dtype).reshape(values.shape)

    return change


WRONG: dict[str, Callable[[Tensors], Tensors]] = {
    "two modules exchanged": lambda t: swap(f"{Q}.lora_up.weight", f"{K}.lora_up.weight")(
        swap(f"{Q}.lora_down.weight", f"{K}.lora_down.weight")(t)
    ),
    "the second factors exchanged": swap(f"{Q}.lora_up.weight", f"{K}.lora_up.weight"),
    "another alpha": edit(f"{Q}.alpha", lambda a: a * 2),
    "alpha a thousandth off": edit(f"{Q}.alpha", lambda a: a * 1.001),
    "alpha lost": lambda t: {key: v for key, v in t.items() if key != f"{Q}.alpha"},
    "a module dropped": lambda t: {key: v for key, v in t.items() if not key.startswith(Q)},
    "a module doubled": lambda t: {**t, **{k.replace("to_k", "to_v"): v for k, v in t.items() if "to_k" in k}},
    "the sign of one number": edit(f"{FF}.lora_down.weight", flip_bit(4 * 5000 + 3, 7)),
    "the middle of one number": edit(f"{FF}.lora_down.weight", flip_bit(4 * 5000 + 2, 0)),
    "the last number": edit(f"{FF}.lora_up.weight", flip_bit(4 * WIDE * RANK - 1, 0)),
    "other columns": edit(f"{Q}.lora_down.weight", lambda a: a.flip(1)),
    "other ranks": edit(f"{Q}.lora_down.weight", lambda a: a.flip(0)),
    "a transposed buffer": edit(f"{Q}.lora_down.weight", lambda a: a.T.reshape(a.shape)),
    "one factor scaled": edit(f"{Q}.lora_up.weight", lambda b: b * 1.01),
    "zeros": edit(f"{Q}.lora_up.weight", torch.zeros_like),
    "a rounding that was not asked for": lambda t: {
        **t, f"{Q}.lora_up.weight": t[f"{Q}.lora_up.weight"].mapped("F16")
    },
    "a number that became NaN": edit(f"{Q}.lora_up.weight", lambda b: b.where(b != b.max(), torch.nan)),
}  # fmt: skip


TOO_SMALL = ("the last number", "alpha a thousandth off")
"""Less than rounding to float16 changes."""


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_output_is_found_and_removed(
    case: str, source: Path, tmp_path: Path, tamper: Callable[..., None]
) -> None:
    adapter = api.load(source)
    tamper(WRONG[case])
    with pytest.raises(ProofFailed) as caught:
        api.save(adapter, tmp_path / "out.safetensors", format="kohya")
    assert str(tmp_path / "out.safetensors") in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source.safetensors"]


@pytest.mark.parametrize("case", [case for case in WRONG if "not asked for" not in case and case not in TOO_SMALL])
def test_nor_does_a_rounding_that_was_asked_for_hide_it(
    case: str, source: Path, tmp_path: Path, tamper: Callable[..., None]
) -> None:
    adapter = api.load(source)
    tamper(WRONG[case])
    with pytest.raises(ProofFailed):
        api.save(adapter, tmp_path / "out.safetensors", format="kohya", dtype="float16")


def test_a_right_output_passes(source: Path, tmp_path: Path, tamper: Callable[..., None]) -> None:
    adapter = api.load(source)
    tamper(lambda tensors: tensors)
    proof = api.save(adapter, tmp_path / "out.safetensors", format="kohya").proof
    assert proof is not None
    assert proof.exact
    assert (proof.modules, proof.tensors, proof.identical) == (4, 8, 8)
    assert "bit-identical" in str(proof)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("verify", [True, False])
def test_nan_in_the_source_is_named(value: float, dtype: torch.dtype, verify: bool, tmp_path: Path) -> None:
    tensors = state(dtype)
    tensors[f"{FF}.lora_down.weight"][3, -1] = value
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(
        BrokenAdapter, match=rf"x\.safetensors: tensor '{FF}\.lora_down\.weight': holds NaN or infinity"
    ):
        api.convert(tmp_path / "x.safetensors", "diffusers", tmp_path / "out.safetensors", verify=verify)
    assert not (tmp_path / "out.safetensors").exists()


def test_an_alpha_that_is_no_number_is_named(tmp_path: Path) -> None:
    update = one_update(torch.ones(2, 3), torch.ones(4, 2))
    for value in (float("nan"), float("inf")):
        broken = replace(update, alpha=Fact(value, Certainty.READ, "tensor m.alpha"))
        with pytest.raises(BrokenAdapter, match=r"alpha of unet: m is (nan|inf) \(tensor m.alpha\)"):
            prove(adapter_of(broken), adapter_of(broken), "out")
        with pytest.raises(BrokenAdapter, match="alpha of unet: m"):
            check_finite([broken])


@pytest.mark.parametrize(("given", "wanted"), [("F32", "bfloat16"), ("F32", "float16"), ("F64", "float32")])
@pytest.mark.parametrize("fold", [False, True])
def test_roundings_that_were_asked_for_are_allowed(given: str, wanted: str, fold: bool, tmp_path: Path) -> None:
    source = stored(tmp_path / "x.safetensors", dtype={"F32": torch.float32, "F64": torch.float64}[given])
    proof = api.convert(source, "diffusers", tmp_path / "y.safetensors", dtype=wanted, fold_alpha=fold).proof
    assert proof is not None
    spacing = {"bfloat16": 2.0**-7, "float16": 2.0**-10, "float32": 2.0**-23}[wanted]
    assert 0 < proof.largest_error < spacing
    assert proof.tolerance == 2 * spacing
    assert not proof.exact
    assert "largest relative error" in str(proof)


def test_widening_is_exact(tmp_path: Path) -> None:
    source = stored(tmp_path / "x.safetensors", dtype=torch.float16)
    proof = api.convert(source, "diffusers", tmp_path / "y.safetensors", dtype="float32").proof
    assert proof is not None
    assert proof.largest_error == 0.0


def test_folding_a_power_of_two_is_exact(tmp_path: Path) -> None:
    source = stored(tmp_path / "x.safetensors", dtype=torch.float32)
    proof = api.convert(source, "diffusers", tmp_path / "y.safetensors", fold_alpha=True).proof
    assert proof is not None
    assert proof.largest_error == 0.0
    assert api.load(tmp_path / "y.safetensors").updates.keys() == api.load(source).updates.keys()


def test_overflow_to_infinity_fails(tmp_path: Path) -> None:
    tensors = state()
    tensors[f"{Q}.lora_up.weight"][0, 0] = 70000.0
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ProofFailed, match=r"attn1.to_q.*F16 cannot.*--dtype bfloat16"):
        api.convert(tmp_path / "x.safetensors", "diffusers", tmp_path / "y.safetensors", dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
    assert api.convert(tmp_path / "x.safetensors", "diffusers", tmp_path / "y.safetensors", dtype="bfloat16").proof


def test_underflow_fails(tmp_path: Path) -> None:
    source = stored(tmp_path / "x.safetensors", size=1e-8)
    with pytest.raises(ProofFailed, match=r"do not fit the dtype: --dtype bfloat16"):
        api.convert(source, "diffusers", tmp_path / "y.safetensors", dtype="float16")


def lazy(values: torch.Tensor, key: str = "t") -> LazyTensor:
    data = values.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    name = {torch.float32: "F32", torch.float16: "F16", torch.float64: "F64"}[values.dtype]
    return LazyTensor(key, name, tuple(values.shape), MemorySource(data), 0)


def one_update(a: torch.Tensor, b: torch.Tensor, **more: torch.Tensor) -> Update:
    tensors = {role: lazy(values, f"m.{role}") for role, values in {"A": a, "B": b, **more}.items()}
    return Update("unet", "m", "lora", tensors, Fact(2.0, Certainty.READ, "m.alpha"))


def adapter_of(*updates: Update) -> Adapter:
    return Adapter({u.key: u for u in updates}, Fact(None, Certainty.UNKNOWN))


A, B = torch.randn(4, 6), torch.randn(8, 4)


def test_the_same_bytes_in_another_shape_are_another_matrix() -> None:
    saved = Update("unet", "m", "saved", {"weight": lazy(torch.randn(4, 6))})
    turned = replace(saved, tensors={"weight": saved.tensors["weight"].reshape((6, 4))})
    with pytest.raises(ProofFailed, match=r"shape \[6, 4\].*\[4, 6\]"):
        prove(adapter_of(saved), adapter_of(turned), "out")


def test_a_kernel_may_be_flattened_and_ones_added() -> None:
    one = one_update(torch.randn(1, 2, 3, 3), torch.randn(8, 1))
    two = replace(one, tensors={"A": one.tensors["A"].reshape((1, 18)), "B": one.tensors["B"].reshape((8, 1, 1, 1))})
    assert prove(adapter_of(one), adapter_of(two), "out").exact
    assert prove(adapter_of(two), adapter_of(one), "out").exact


def test_a_tensor_that_only_the_output_has() -> None:
    one = one_update(A, B)
    for extra in ({"magnitude": torch.ones(8)}, {"bias": torch.ones(8)}):
        two = one_update(A, B, **extra)
        with pytest.raises(ProofFailed):
            prove(adapter_of(one), adapter_of(two), "out")
        with pytest.raises(ProofFailed):
            prove(adapter_of(two), adapter_of(one), "out")


def test_options_must_agree_whatever_the_bytes() -> None:
    one = one_update(A, B)
    for two in (one, one_update(A.double(), B.double())):
        with pytest.raises(ProofFailed, match="kind is None, but 'embedding'"):
            prove(adapter_of(one), adapter_of(replace(two, options={"kind": "embedding"})), "out", rounded=True)


def test_a_nan_beside_the_factors_is_found() -> None:
    one = replace(one_update(A, B, magnitude=torch.ones(8)), options={"dora_axis": "out"})
    broken = torch.ones(8, dtype=torch.float16)
    broken[3] = torch.nan
    two = replace(one_update(A, B, magnitude=broken), options={"dora_axis": "out"})
    with pytest.raises(ProofFailed, match=r"m\.magnitude.*NaN or infinity"):
        prove(adapter_of(one), adapter_of(two), "out", rounded=True)


@pytest.mark.parametrize("position", [0, CHUNK // 4 - 1, CHUNK // 4, CHUNK // 2 + 5, -1])
def test_a_difference_in_any_chunk_is_found(position: int) -> None:
    values = torch.randn(3, CHUNK // 4)
    other = values.clone()
    other.view(-1)[position] += 1.0
    one = Update("unet", "m", "saved", {"weight": lazy(values)})
    two = Update("unet", "m", "saved", {"weight": lazy(other)})
    assert prove(adapter_of(one), adapter_of(one), "out").exact
    with pytest.raises(ProofFailed, match="unet: m"):
        prove(adapter_of(one), adapter_of(two), "out")


def test_progress_counts_the_sources_bytes() -> None:
    update = one_update(torch.randn(4, CHUNK // 3), B)
    seen: list[int] = []
    prove(adapter_of(update), adapter_of(update), "out", progress=seen.append)
    assert sum(seen) == sum(t.nbytes for t in update.tensors.values())


def test_a_short_read_leaves_no_stale_bytes_behind() -> None:
    """The buffers are used again: a small tensor after a large one is compared over its own bytes only."""
    large = Update("unet", "a", "saved", {"weight": lazy(torch.full((CHUNK // 4,), 3.0))})
    small = Update("unet", "b", "saved", {"weight": lazy(torch.ones(3))})
    wrong = Update("unet", "b", "saved", {"weight": lazy(torch.tensor([1.0, 1.0, 2.0]))})
    assert prove(adapter_of(large, small), adapter_of(large, small), "out").exact
    with pytest.raises(ProofFailed, match="unet: b"):
        prove(adapter_of(large, small), adapter_of(large, wrong), "out")
