"""GGUF LoRA: what is written does in llama.cpp what it does in peft, and what is read is what was written."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import gguf_peer as peer
import numpy as np
import peft_models as pm
import pytest
import torch
from hub_server import Served, serving
from safetensors.torch import load_file, save_file

import adapterops as ao
from adapterops import errors
from adapterops.api import default_output
from adapterops.plugin import Target
from adapterops.registry import find
from adapterops.storage import hub
from adapterops.storage.source import open_in

FIXTURES = Path(__file__).parents[2] / "fixtures"
SHAPES = ("llama", "qwen2", "gemma", "gpt2")


def made(name: str, folder: Path, **options: Any) -> tuple[Any, Path, Path]:
    """An adapter by peft, its folder, and the config of its base."""
    case = peer.CASES[name]
    model = case.tuned(folder / "peft", **{**peer.options_of(name), **options})
    return model, _without_own(folder / "peft"), case.base(folder)


def _without_own(folder: Path) -> Path:
    """The folder without the base's own weights, which peft saves beside adapted embeddings."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({k: v for k, v in tensors.items() if ".base_layer.weight" not in k}, path, {"format": "pt"})
    return folder


def close(path: Path, wanted: dict[str, torch.Tensor], tolerance: float) -> None:
    """That llama.cpp adds what is wanted, of each tensor relative to its size, and nothing else."""
    found = peer.applied(path)
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        other = wanted[name].numpy()
        assert value.shape == other.shape, name
        assert np.linalg.norm(value - other) <= tolerance * np.linalg.norm(other), name


@pytest.mark.parametrize("name", peer.CASES)
def test_llama_cpp_adds_what_peft_adds(name: str, tmp_path: Path) -> None:
    model, source, base = made(name, tmp_path)
    result = ao.convert(source, "gguf", tmp_path / "x.gguf", base=base)
    assert result.proof is not None
    assert result.proof.exact
    case = peer.CASES[name]
    wanted = peer.as_llama(case.config(), peer.deltas_of(model, case.model()))
    assert len(wanted) == result.tensors // 2
    close(tmp_path / "x.gguf", wanted, 1e-6)
    said = peer.entries(tmp_path / "x.gguf")
    assert (said["general.type"], said["adapter.type"], said["adapter.lora.alpha"]) == ("adapter", "lora", 8.0)
    assert said["general.architecture"] == case.architecture
    # There and back, with the base and by what the header says of the heads.
    before = pm.weights_of(source)
    for options in ({"base": base}, {} if not peer.options_of(name) else {"base": base}):
        back = ao.convert(tmp_path / "x.gguf", "peft", tmp_path / "back", overwrite=True, **options)
        assert back.proof is not None
        assert back.proof.exact
        if options or name != "llama-headless":
            pm.same_tensors(before, pm.weights_of(tmp_path / "back"))
        config = pm.config_of(tmp_path / "back")
        assert (config["r"], config["lora_alpha"]) == (4, 8)


def test_a_language_model_in_a_larger_one(tmp_path: Path) -> None:
    case = peer.SEEING
    model = case.tuned(tmp_path / "peft", target_modules=r".*language_model.*\.(q_proj|down_proj)")
    result = ao.convert(tmp_path / "peft", "gguf", tmp_path / "x.gguf", base=case.base(tmp_path))
    close(tmp_path / "x.gguf", peer.as_llama(case.config(), peer.deltas_of(model, case.model())), 1e-6)
    assert result.tensors == 8
    ao.convert(tmp_path / "x.gguf", "peft", tmp_path / "back", base=case.base(tmp_path))
    pm.same_tensors(pm.weights_of(tmp_path / "peft"), pm.weights_of(tmp_path / "back"))
    case.tuned(tmp_path / "eyes", target_modules=["q_proj"])
    with pytest.raises(errors.CannotRepresent, match=r"vision.*applies no adapter there"):
        ao.convert(tmp_path / "eyes", "gguf", tmp_path / "y.gguf", base=case.base(tmp_path))


def test_permuted_rows_give_the_same_attention(tmp_path: Path) -> None:
    """llama.cpp rotates neighbours, transformers halves: scores of the adapted heads agree only in the right order."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    model, source, base = made("llama", tmp_path)
    ao.convert(source, "gguf", tmp_path / "x.gguf", base=base)
    added = peer.applied(tmp_path / "x.gguf")
    fresh, config = peer.CASES["llama"].model().double(), peer.CASES["llama"].config()
    x = torch.randn(1, 5, config.hidden_size, generator=torch.Generator().manual_seed(1)).double()
    positions = torch.arange(5)[None]
    cos, sin = fresh.model.rotary_emb(x, positions)
    layer = model.double().merge_and_unload().model.layers[1].self_attn
    count, groups, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim

    def heads(values: torch.Tensor, number: int) -> torch.Tensor:
        return values.reshape(1, 5, number, size).transpose(1, 2)

    q, k = apply_rotary_pos_emb(heads(layer.q_proj(x), count), heads(layer.k_proj(x), groups), cos, sin)
    wanted = q @ k.repeat_interleave(count // groups, dim=1).transpose(2, 3)
    own = fresh.model.layers[1].self_attn
    rotated = []
    for weight, number, name in ((own.q_proj.weight, count, "q"), (own.k_proj.weight, groups, "k")):
        whole = peer.pairwise(weight.detach(), number) + torch.from_numpy(added[f"blk.1.attn_{name}.weight"])
        pairs = heads(x @ whole.T, number).reshape(1, number, 5, size // 2, 2)
        c, s = (t[:, None, :, : size // 2] for t in (cos, sin))
        turned = (pairs[..., 0] * c - pairs[..., 1] * s, pairs[..., 0] * s + pairs[..., 1] * c)
        rotated.append(torch.stack(turned, dim=-1).reshape(1, number, 5, size))
    scores = rotated[0] @ rotated[1].repeat_interleave(count // groups, dim=1).transpose(2, 3)
    torch.testing.assert_close(scores, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(
    ("options", "alpha", "folded"),
    [
        ({"rank_pattern": {"c_proj": 2, "v_proj": 2}}, 8.0, False),
        ({"use_rslora": True}, 16.0, False),
        ({"use_rslora": True, "r": 2}, float(np.float32(8 * 2**0.5)), False),
        ({"alpha_pattern": {"c_proj": 3, "v_proj": 3}}, 8.0, True),
        ({"rank_pattern": {"c_proj": 2, "v_proj": 2}, "use_rslora": True}, 16.0, True),
    ],
    ids=["ranks", "rslora", "rslora, no exact alpha", "alphas", "rslora and ranks"],
)
def test_one_alpha_for_all(name: str, options: dict[str, Any], alpha: float, folded: bool, tmp_path: Path) -> None:
    model, source, base = made(name, tmp_path, **options)
    result = ao.convert(source, "gguf", tmp_path / "x.gguf", base=base)
    assert peer.entries(tmp_path / "x.gguf")["adapter.lora.alpha"] == alpha
    assert any("multiplied into lora_b" in note for note in result.notes) == folded
    assert any("rounded to float32" in note for note in result.notes) == (alpha != round(alpha))
    assert result.proof is not None
    assert (result.proof.identical == result.proof.tensors) == (not folded)
    case = peer.CASES[name]
    close(tmp_path / "x.gguf", peer.as_llama(case.config(), peer.deltas_of(model, case.model())), 1e-6)
    back = ao.convert(tmp_path / "x.gguf", "peft", tmp_path / "back", base=base)
    assert back.proof is not None
    assert back.proof.exact


@pytest.mark.parametrize(
    ("dtype", "kind", "tolerance"), [("float16", 1, 2e-3), ("bfloat16", 30, 2e-2), ("float32", 0, 1e-6)]
)
def test_dtypes(dtype: str, kind: int, tolerance: float, tmp_path: Path) -> None:
    model, source, base = made("llama", tmp_path, alpha_pattern={"v_proj": 3})
    ao.convert(source, "gguf", tmp_path / "x.gguf", base=base, dtype=dtype)
    assert {int(t.tensor_type) for t in gguf.GGUFReader(tmp_path / "x.gguf").tensors} == {kind}
    case = peer.CASES["llama"]
    close(tmp_path / "x.gguf", peer.as_llama(case.config(), peer.deltas_of(model, case.model())), tolerance)
    back = ao.load(tmp_path / "x.gguf", base=base)
    assert {t.dtype for u in back for t in u.tensors.values()} == {{1: "F16", 30: "BF16", 0: "F32"}[kind]}


def test_equal_bytes_every_time(tmp_path: Path) -> None:
    _, source, base = made("llama", tmp_path)
    for name in "ab":
        ao.convert(source, "gguf", tmp_path / f"{name}.gguf", base=base)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()
    # Written as it was read, it is the same file.
    ao.save(ao.load(tmp_path / "a.gguf", base=base), tmp_path / "c.gguf")
    assert peer.entries(tmp_path / "c.gguf") == peer.entries(tmp_path / "a.gguf")
    one, two = (gguf.GGUFReader(tmp_path / f"{name}.gguf").tensors for name in "ac")
    assert {t.name: t.data.tobytes() for t in one} == {t.name: t.data.tobytes() for t in two}


@pytest.mark.parametrize("name", SHAPES)
def test_files_of_others(name: str, tmp_path: Path) -> None:
    """The fixtures' files were not written by this project (scripts/gguf_fixtures.py)."""
    folder = FIXTURES / f"gguf-{name}"
    base = folder / "base" / "config.json"
    result = ao.convert(folder / "adapter.gguf", "peft", tmp_path / "peft", base=base)
    assert result.proof is not None
    assert result.proof.exact
    pm.same_tensors(pm.weights_of(folder / "peft"), pm.weights_of(tmp_path / "peft"))
    ao.convert(folder / "peft", "gguf", tmp_path / "x.gguf", base=base)
    one, two = peer.applied(folder / "adapter.gguf"), peer.applied(tmp_path / "x.gguf")
    assert one.keys() == two.keys()
    assert all(np.array_equal(one[key], two[key]) for key in one)


def test_rows_of_unknown_order_are_asked_for(tmp_path: Path) -> None:
    source = FIXTURES / "gguf-llama" / "adapter.gguf"
    seen = ao.inspect(source)
    assert (seen.format, seen.modules, dict(seen.components[0].ranks)) == ("gguf", 14, {4: 14})
    with pytest.raises(errors.UnknownFact, match=r"blk\.0\.attn_[qk]\.weight\.lora_b.*--base CONFIG"):
        ao.convert(source, "peft", tmp_path / "peft")
    assert not (tmp_path / "peft").exists()
    base = peer.CASES["qwen2"].base(tmp_path)
    with pytest.raises(errors.Conflict, match=r"'llama'.*'qwen2'"):
        ao.load(source, base=base)


def file(path: Path, tensors: dict[str, np.ndarray], architecture: str = "qwen2", **said: Any) -> Path:
    """A file by gguf's own writer."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    for key, value in said.items():
        name = key.replace("__", ".")
        if isinstance(value, list):
            writer.add_key_value(name, value, gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_float32(name, value)
    for name, tensor in tensors.items():
        raw = gguf.GGMLQuantizationType.Q8_0 if tensor.dtype == np.uint8 else None
        writer.add_tensor(name, tensor, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def pair(out: int = 16, rank: int = 4, inputs: int = 32, name: str = "blk.0.attn_q") -> dict[str, np.ndarray]:
    noise = np.random.default_rng(3)
    shapes = {"a": (rank, inputs), "b": (out, rank)}
    return {f"{name}.weight.lora_{k}": noise.standard_normal(s, dtype=np.float32) for k, s in shapes.items()}


@pytest.mark.parametrize("alpha", [None, 0.0])
def test_no_alpha_is_scale_one(alpha: float | None, tmp_path: Path) -> None:
    said = {} if alpha is None else {"adapter__lora__alpha": alpha}
    adapter = ao.load(file(tmp_path / "x.gguf", pair(), **said))
    update = next(iter(adapter))
    assert update.alpha is not None
    assert (update.module, update.alpha.value) == ("model.layers.0.self_attn.q_proj", 4.0)
    assert any("scale 1" in note for note in adapter.provenance.notes)
    ao.convert(tmp_path / "x.gguf", "peft", tmp_path / "peft")
    assert pm.config_of(tmp_path / "peft")["lora_alpha"] == 4


def test_quantised_factors(tmp_path: Path) -> None:
    tensors = pair(rank=32)
    held = {key: gguf.quantize(value, gguf.GGMLQuantizationType.Q8_0) for key, value in tensors.items()}
    adapter = ao.load(file(tmp_path / "x.gguf", held, adapter__lora__alpha=32.0))
    assert any("Q8_0" in note for note in adapter.provenance.notes)
    ao.convert(tmp_path / "x.gguf", "peft", tmp_path / "peft")
    found = pm.weights_of(tmp_path / "peft")
    for key, value in held.items():
        wanted = gguf.dequantize(value, gguf.GGMLQuantizationType.Q8_0)
        role = "lora_A" if key.endswith("a") else "lora_B"
        (tensor,) = [t for k, t in found.items() if role in k]
        assert np.array_equal(tensor.numpy(), wanted)


def test_other_entries_are_kept_with_their_types(tmp_path: Path) -> None:
    said = {"adapter__lora__alpha": 4.0, "adapter__lora__task_name": "7", "mine__numbers": [1, 2], "mine__share": 0.5}
    source = file(tmp_path / "x.gguf", pair(), **said)
    values = {**peer.VALUES, "hidden_size": 32, "num_attention_heads": 2, "head_dim": 8}
    config = peer.Case("Qwen2ForCausalLM", "qwen2", (), values).base(tmp_path)
    ao.convert(source, "peft", tmp_path / "peft", base=config)
    ao.convert(tmp_path / "peft", "gguf", tmp_path / "y.gguf", base=config)
    reader = gguf.GGUFReader(tmp_path / "y.gguf")
    types = {key: [t.name for t in reader.fields[key].types] for key in ("mine.numbers", "mine.share")}
    assert types == {"mine.numbers": ["ARRAY", "UINT32"], "mine.share": ["FLOAT32"]}
    found = peer.entries(tmp_path / "y.gguf")
    assert (found["adapter.lora.task_name"], found["mine.numbers"], found["mine.share"]) == ("7", [1, 2], 0.5)


def test_alora_keeps_its_tokens(tmp_path: Path) -> None:
    _, source, base = made("llama", tmp_path, alora_invocation_tokens=[5, 7], target_modules=["q_proj", "v_proj"])
    ao.convert(source, "gguf", tmp_path / "x.gguf", base=base)
    assert peer.entries(tmp_path / "x.gguf")["adapter.alora.invocation_tokens"] == [5, 7]
    ao.convert(tmp_path / "x.gguf", "peft", tmp_path / "back", base=base)
    assert pm.config_of(tmp_path / "back")["alora_invocation_tokens"] == [5, 7]
    pm.same_tensors(pm.weights_of(source), pm.weights_of(tmp_path / "back"))


def experts(path: Path, ranks: tuple[int, int] = (2, 2)) -> Path:
    """Stacks as llama.cpp's converter makes them of experts that were adapted one by one: each with an A of its own."""
    noise, tensors = np.random.default_rng(5), {}
    for name, rank in zip(("gate", "up"), ranks, strict=True):
        tensors[f"blk.0.ffn_{name}_exps.weight.lora_a"] = noise.standard_normal((3, rank, 16), dtype=np.float32)
        tensors[f"blk.0.ffn_{name}_exps.weight.lora_b"] = noise.standard_normal((3, 6, rank), dtype=np.float32)
    return file(path, tensors, "qwen3moe", adapter__lora__alpha=4.0)


def test_stacks_with_factors_of_their_own_are_joined(tmp_path: Path) -> None:
    base, case = peer.CASES["qwen3moe"].base(tmp_path), peer.CASES["qwen3moe"]
    source = experts(tmp_path / "x.gguf")
    ao.convert(source, "peft", tmp_path / "peft", base=base)
    loaded = pm.load(case.model(), tmp_path / "peft")
    found = peer.as_llama(case.config(), peer.deltas_of(loaded, case.model()))
    close(source, found, 1e-5)
    # And back: the stacks have the joined rank, and the same deltas.
    ao.convert(tmp_path / "peft", "gguf", tmp_path / "y.gguf", base=base)
    close(tmp_path / "y.gguf", {k: torch.from_numpy(v) for k, v in peer.applied(source).items()}, 1e-6)
    with pytest.raises(errors.UnsupportedFormat, match=r"ranks \[2, 3\]"):
        ao.load(experts(tmp_path / "z.gguf", (2, 3)), base=base)
    with pytest.raises(errors.UnknownFact, match="--base CONFIG"):
        ao.convert(source, "peft", tmp_path / "without")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("llama", {"use_dora": True}, "DoRA magnitude.*merge SRC --method svd"),
        ("llama", {"lora_bias": True, "target_modules": ["q_proj"]}, "a bias beside"),
        ("llama", {"modules_to_save": ["o_proj"], "target_modules": ["q_proj"]}, "low-rank pairs only"),
        ("gpt2", {"target_modules": ["c_attn", "wte"]}, "transformer.wte and lm_head are one weight"),
        ("gemma", {"target_modules": ["lm_head"]}, "applies no adapter there"),
        ("gpt2", {"target_modules": ["wpe"]}, "applies no adapter there in gpt2"),
    ],
    ids=["dora", "bias", "saved", "tied embedding", "no head", "positions"],
)  # fmt: skip
def test_what_llama_cpp_would_not_apply(name: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    _, source, base = made(name, tmp_path, **options)
    with pytest.raises(errors.CannotRepresent, match=message):
        ao.convert(source, "gguf", tmp_path / "x.gguf", base=base)
    assert not (tmp_path / "x.gguf").exists()


def test_the_rest_under_allow_drop(tmp_path: Path) -> None:
    _, source, base = made("gpt2", tmp_path, target_modules=["c_attn", "wte"])
    result = ao.convert(source, "gguf", tmp_path / "x.gguf", base=base, allow_drop=True)
    assert len(result.dropped) == 1
    assert "lora_embedding_A" in result.dropped[0]
    assert sorted(peer.applied(tmp_path / "x.gguf")) == ["blk.0.attn_qkv.weight", "blk.1.attn_qkv.weight"]


def test_other_methods_and_bases(tmp_path: Path) -> None:
    kinds = FIXTURES / "peft-types"
    with pytest.raises(errors.UnknownArchitectureOfFile, match="--base CONFIG"):
        ao.convert(FIXTURES / "gguf-llama" / "peft", "gguf", tmp_path / "x.gguf")
    bert = FIXTURES / "bases" / "bert" / "config.json"
    with pytest.raises(
        errors.CannotRepresent, match=r"BertForSequenceClassification is not known here .*; known: Llama"
    ):
        ao.convert(FIXTURES / "peft-bert-classifier", "gguf", tmp_path / "x.gguf", base=bert, allow_drop=True)
    with pytest.raises(errors.CannotRepresent, match="part of another pipeline"):
        ao.convert(FIXTURES / "kohya-sd15.safetensors", "gguf", tmp_path / "x.gguf")
    adapter = ao.load(kinds / "loha")
    case = peer.CASES["llama"]
    base = ao.load(FIXTURES / "gguf-llama" / "peft", base=case.base(tmp_path)).base
    with pytest.raises(errors.CannotRepresent, match="to-lora"):
        find("gguf")[0].write(adapter, Target(find("gguf")[1], base))


def test_reading_what_is_not_right(tmp_path: Path) -> None:
    with pytest.raises(errors.UnsupportedFormat, match=r"architecture 'rwkv7'.*llama"):
        ao.load(file(tmp_path / "a.gguf", pair(), "rwkv7"))
    with pytest.raises(errors.UnknownModule, match=r"'blk\.0\.attn_sinks'"):
        ao.load(file(tmp_path / "b.gguf", pair(name="blk.0.attn_sinks")))
    half = dict(list(pair().items())[:1])
    with pytest.raises(errors.BrokenAdapter, match="counterpart B"):
        ao.load(file(tmp_path / "c.gguf", half))
    norm = {**pair(), "blk.0.attn_norm.weight": np.zeros(4, dtype=np.float32)}
    with pytest.raises(errors.UnsupportedFormat, match="norm's weight"):
        ao.load(file(tmp_path / "d.gguf", norm))
    assert len(ao.load(tmp_path / "d.gguf", allow_drop=True)) == 1
    heads = {"llama__attention__head_count": 3.0}
    with pytest.raises(errors.UnknownFact, match="--base"):
        ao.convert(file(tmp_path / "e.gguf", pair(), "llama", **heads), "peft", tmp_path / "peft")
    with pytest.raises(errors.InvalidHeader, match="not a number"):
        ao.load(file(tmp_path / "f.gguf", pair(), adapter__lora__alpha="much"))


def test_a_base_with_other_heads(tmp_path: Path) -> None:
    _, source, base = made("llama", tmp_path)
    ao.convert(source, "gguf", tmp_path / "x.gguf", base=base)
    other = peer.Case(
        "LlamaForCausalLM", "llama", (), {**peer.VALUES, "num_attention_heads": 2, "num_key_value_heads": 1}
    )
    with pytest.raises(errors.Conflict, match="says 4 heads and 2 of keys, and the base has 2 and 1"):
        ao.load(tmp_path / "x.gguf", base=other.base(tmp_path / "other"))


# Headers from strangers


def header(tensors: int = 0, entries: int = 0, body: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, entries) + body


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


TYPE = text("general.type") + struct.pack("<I", 8) + text("adapter")


def info(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + sizes + struct.pack("<IQ", kind, offset)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (header(tensors=1 << 60), errors.InvalidHeader, "announces 1152921504606846976 tensors"),
        (header(entries=1 << 60), errors.InvalidHeader, "announces 1152921504606846976 entries"),
        (header(entries=1, body=struct.pack("<Q", 1 << 62) + bytes(64)), errors.InvalidHeader, "cut short"),
        (header(entries=1, body=text("x") + struct.pack("<IIQ", 9, 4, 1 << 40) + bytes(64)), errors.NotAnAdapter, "array"),
        (header(entries=1, body=text("x") + struct.pack("<IIQ", 9, 9, 2) + bytes(64)), errors.InvalidHeader, "type 9"),
        (header(entries=1, body=text("x") + struct.pack("<I", 77) + bytes(64)), errors.InvalidHeader, "type 77"),
        (header(entries=2, body=TYPE * 2), errors.InvalidHeader, "twice"),
        (header(entries=1, body=text("general.type") + struct.pack("<I", 8) + text("model")), errors.NotAnAdapter, "model"),
        (header(version=1), errors.UnsupportedFormat, "version 1;"),
        (header(version=3 << 24), errors.UnsupportedFormat, "highest byte first"),
        (header(tensors=1, body=info("x", (1 << 40, 1 << 40)) + bytes(64)), errors.InvalidHeader, "more elements"),
        (header(tensors=1, body=info("x", (4,) * 5) + bytes(64)), errors.InvalidHeader, "5 dimensions"),
        (header(tensors=1, body=info("x", (4,), 99) + bytes(64)), errors.UnsupportedFormat, "unknown type 99"),
        (header(tensors=1, body=info("x", (33,), 8) + bytes(64)), errors.InvalidHeader, "whole blocks of 32"),
        (header(tensors=1, body=info("x", (4,), 0, 64) + bytes(256)), errors.InvalidHeader, "begin at 64"),
        (header(tensors=2, body=info("x", (64,)) + info("y", (4,)) + bytes(512)), errors.InvalidHeader, "begin at 0"),
        (header(tensors=2, body=(info("x", (1,)) + info("x", (1,), 0, 32)) + bytes(512)), errors.InvalidHeader, "twice"),
        (header(tensors=1, body=info("x", (4000,)) + bytes(64)), errors.InvalidHeader, "cut short.*16000 bytes"),
        (header(tensors=1, body=info("x", (4,)) + bytes(4096)), errors.InvalidHeader, "follow it"),
        (header(entries=1, body=text("x") + struct.pack("<I", 8) + struct.pack("<Q", 2) + b"\xff\xfe"), errors.InvalidHeader,
         "Unicode"),
    ],
)  # fmt: skip
def test_hostile_headers(data: bytes, error: type[errors.AdapterOpsError], message: str, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    with pytest.raises(error, match=message):
        ao.load(path)


def test_damaged_files_end_in_our_errors(tmp_path: Path) -> None:
    whole = (FIXTURES / "gguf-qwen2" / "adapter.gguf").read_bytes()
    path, wrong = tmp_path / "x.gguf", 0
    noise = np.random.default_rng(0)
    spots = [*range(0, 2500, 41), len(whole) - 33]
    damaged = [whole[:at] for at in spots]
    for _ in range(300):
        data = bytearray(whole)
        for at in noise.integers(0, 2500, 3):
            data[at] = noise.integers(0, 256)
        damaged.append(bytes(data))
    for data in damaged:
        path.write_bytes(data)
        told = None
        try:
            ao.load(path)
        except errors.AdapterOpsError as error:
            told = str(error)
        wrong += told is not None
        assert told is None or str(path) in told
    assert wrong > len(spots)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    with serving(monkeypatch, tmp_path / "cache") as held:
        yield held


def test_a_model_on_the_hub_is_not_downloaded(server: Served) -> None:
    server.files = {"x.gguf": (FIXTURES / "gguf-qwen2" / "adapter.gguf").read_bytes()}
    assert len(ao.load("hf://me/style/x.gguf")) == 14
    model = header(entries=1, body=text("general.type") + struct.pack("<I", 8) + text("model")) + bytes(8_000_000)
    server.files, server.sent = {"model.gguf": model}, {}
    folder, name = hub.locate("hf://me/style/model.gguf", ranges=True)
    with pytest.raises(errors.NotAnAdapter, match="of a model, not of an adapter"):
        open_in(folder, name)
    assert server.total < 1_000_000


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(errors.UnsupportedFormat, match=r"pip install adapterops\[gguf\]"):
        ao.load(FIXTURES / "gguf-qwen2" / "adapter.gguf")


def test_names_of_outputs(tmp_path: Path) -> None:
    form, dialect = find("gguf")
    assert default_output("a/b.safetensors", form, dialect) == "b-gguf.gguf"
    source, base = FIXTURES / "gguf-qwen2" / "peft", FIXTURES / "gguf-qwen2" / "base" / "config.json"
    result = ao.convert(source, "gguf", tmp_path / "folder", base=base)
    assert Path(result.path) == tmp_path / "folder" / "adapter.gguf"
    with pytest.raises(errors.UsageError, match=r"a \.gguf file"):
        ao.convert(source, "gguf", tmp_path / "x.safetensors", base=base)
    with pytest.raises(errors.UsageError, match="name a folder"):
        ao.convert(source, "peft", tmp_path / "x.gguf", base=base)


def test_commands(tmp_path: Path) -> None:
    source = FIXTURES / "gguf-gemma" / "adapter.gguf"
    run = [sys.executable, "-m", "adapterops"]
    seen = subprocess.run([*run, "inspect", source, "--json", "--norms"], capture_output=True, text=True, check=True)
    found = json.loads(seen.stdout)
    assert (found["format"], found["modules"], found["components"][0]["alphas"]) == ("gguf", 14, {"8.0": 14})
    asked = [*run, "validate", source, "--targets", "gguf"]
    checked = subprocess.run(asked, capture_output=True, text=True, check=False)
    assert (checked.returncode, "All checks passed" in checked.stdout) == (0, True), checked.stdout


@pytest.mark.parametrize(("queries", "keys", "fits"), [(4, 2, True), (4, 4, False), (8, 2, False)])
def test_heads_in_a_header_that_do_not_fit_the_rows(queries: int, keys: int, fits: bool, tmp_path: Path) -> None:
    """A wrong number puts rows in a wrong order, with nothing else to tell it."""
    tensors = {**pair(16), **pair(8, name="blk.0.attn_k")}
    path = file(tmp_path / "x.gguf", tensors, "llama", adapter__lora__alpha=4.0)
    said = {"llama.attention.head_count": queries, "llama.attention.head_count_kv": keys}
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(tmp_path / "y.gguf", "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 4.0)
    for key, count in said.items():
        writer.add_uint32(key, count)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if fits:
        adapter = ao.load(tmp_path / "y.gguf")
        assert any("by the header's word: 4 heads, 2 of keys" in note for note in adapter.provenance.notes)
        return
    with pytest.raises(errors.BrokenAdapter, match=r"attn_k.*not of one size.*--base CONFIG"):
        ao.convert(tmp_path / "y.gguf", "peft", tmp_path / "peft")
    assert not (tmp_path / "peft").exists()


@pytest.mark.parametrize("alpha", ["8", "1" * 400, "x"])
def test_an_alpha_that_is_a_string_is_none(alpha: str, tmp_path: Path) -> None:
    path = file(tmp_path / "x.gguf", pair(), adapter__lora__alpha=alpha)
    with pytest.raises(errors.InvalidHeader, match=r"adapter\.lora\.alpha is .* not a number"):
        ao.load(path)


@pytest.mark.parametrize(
    ("text", "kind"),
    [("1e300", "FLOAT32"), ("[1e300]", "ARRAY:FLOAT32"), ('["\\ud800"]', "ARRAY:STRING"), ("7", "UINT16")],
)
def test_types_that_a_stranger_recorded(text: str, kind: str, tmp_path: Path) -> None:
    """What no longer fits its recorded type is kept as the text it is."""
    case = peer.CASES["qwen2"]
    case.tuned(tmp_path / "peft", target_modules=["q_proj"])
    path = tmp_path / "peft" / "adapter_model.safetensors"
    carried = json.dumps({"spelling": {"gguf": {"types": {"x": kind}}}})
    save_file(load_file(path), path, {"format": "pt", "x": text, "adapterops": carried})
    ao.convert(tmp_path / "peft", "gguf", tmp_path / "x.gguf", base=case.base(tmp_path))
    assert peer.entries(tmp_path / "x.gguf")["x"] == (7 if kind == "UINT16" else text)


def test_fields_that_neither_side_takes(tmp_path: Path) -> None:
    path = file(tmp_path / "x.gguf", pair(), adapter__lora__alpha=8.0)
    for name in ("scale", "task_type"):
        with pytest.raises(errors.UsageError, match=f"--set {name}: neither gguf nor mlx"):
            ao.convert(path, "mlx", tmp_path / "mlx", fields={name: 3})
    ao.convert(path, "peft", tmp_path / "peft", fields={"task_type": "CAUSAL_LM"})
    assert pm.config_of(tmp_path / "peft")["task_type"] == "CAUSAL_LM"


def test_alpha_zero_is_said(tmp_path: Path) -> None:
    _, source, base = made("qwen2", tmp_path, alpha_pattern={"v_proj": 0})
    result = ao.convert(source, "gguf", tmp_path / "x.gguf", base=base)
    assert any("of alpha 0" in note and "lora_b is zeros" in note for note in result.notes)
