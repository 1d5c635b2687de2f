"""mistral-finetune's adapters, held to what attention computes with them and to llama.cpp's order of rows.

Mistral's code rotates neighbouring numbers as complex ones; llama.cpp keeps the weights of this family in the same order, which
its converter makes of transformers' (`LlamaModel.permute`).  So a GGUF of a converted adapter has the rows that it began with.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, MistralConfig, MistralForCausalLM, Qwen2Config
from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding, apply_rotary_pos_emb

import adapterops as ao
from adapterops.errors import BrokenAdapter, CannotRepresent, Conflict, UnknownFact, UnreadableFile, UnsupportedFormat

HIDDEN, HEADS, KEYS, SIZE, INNER, RANK, SCALING = 24, 6, 2, 8, 20, 3, 1.5
SHAPES = {
    "attention.wq": (HEADS * SIZE, HIDDEN),
    "attention.wk": (KEYS * SIZE, HIDDEN),
    "attention.wv": (KEYS * SIZE, HIDDEN),
    "attention.wo": (HIDDEN, HEADS * SIZE),
    "feed_forward.w1": (INNER, HIDDEN),
    "feed_forward.w2": (HIDDEN, INNER),
    "feed_forward.w3": (INNER, HIDDEN),
}
NAMES = dict(
    zip(
        SHAPES,
        (*(f"self_attn.{p}_proj" for p in "qkvo"), "mlp.gate_proj", "mlp.down_proj", "mlp.up_proj"),
        strict=True,
    )
)
PARAMS: dict[str, Any] = {
    "dim": HIDDEN, "n_layers": 2, "head_dim": SIZE, "hidden_dim": INNER, "n_heads": HEADS, "n_kv_heads": KEYS,
    "norm_eps": 1e-5, "vocab_size": 11, "rope_theta": 10000.0,
    "lora": {"enable": True, "rank": RANK, "dropout": 0.0, "scaling": SCALING}, "moe": None,
}  # fmt: skip
CONFIG: dict[str, Any] = {
    "hidden_size": HIDDEN, "num_attention_heads": HEADS, "num_key_value_heads": KEYS, "head_dim": SIZE,
    "intermediate_size": INNER, "num_hidden_layers": 2, "vocab_size": 11, "max_position_embeddings": 32,
    "rope_theta": 10000.0, "sliding_window": None,
}  # fmt: skip


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pairs(stems: dict[str, tuple[int, int]]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for at, (stem, (wide, deep)) in enumerate(stems.items()):
        out[f"{stem}.lora_A.weight"] = noise(RANK, deep, seed=at)
        out[f"{stem}.lora_B.weight"] = noise(wide, RANK, seed=at + 500)
    return out


def native(tmp_path: Path, params: dict[str, Any] | None = PARAMS) -> tuple[Path, dict[str, Tensor]]:
    """A checkpoint's folder, and its tensors."""
    tensors = pairs({f"layers.{layer}.{name}": shape for layer in range(2) for name, shape in SHAPES.items()})
    save_file(tensors, tmp_path / "lora.safetensors")
    if params is not None:
        (tmp_path / "params.json").write_text(json.dumps(params))
    return tmp_path / "lora.safetensors", tensors


def base(tmp_path: Path, config: type = MistralConfig, **more: Any) -> Path:
    name = config.__name__.removesuffix("Config") + "ForCausalLM"
    config(**{**CONFIG, **more}, architectures=[name]).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def converted(path: Path, tmp_path: Path, **options: Any) -> dict[str, Tensor]:
    result = ao.convert(path, "peft", tmp_path / "out", **options)
    assert (result.source_dialect, result.proof is not None) == ("mistral", True)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    return {key.removeprefix("base_model.model."): value for key, value in tensors.items()}


def delta(tensors: dict[str, Tensor], stem: str) -> Tensor:
    return SCALING * tensors[f"{stem}.lora_B.weight"] @ tensors[f"{stem}.lora_A.weight"]


def own_scores(x: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Attention scores by Mistral's formula: pairs of neighbours as complex numbers, turned."""
    angles = torch.outer(torch.arange(len(x)).float(), 10000.0 ** -(torch.arange(0, SIZE, 2) / SIZE))
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]

    def turned(weight: Tensor) -> Tensor:
        heads = (x @ weight.T).unflatten(-1, (-1, SIZE))
        return torch.view_as_real(torch.view_as_complex(heads.unflatten(-1, (-1, 2))) * turn).flatten(-2)

    return torch.einsum("ihd,jhd->hij", turned(q), turned(k).repeat_interleave(HEADS // KEYS, 1))


def transformers_scores(x: Tensor, q: Tensor, k: Tensor) -> Tensor:
    cos, sin = MistralRotaryEmbedding(MistralConfig(**CONFIG))(x[None], torch.arange(len(x))[None])
    shaped = ((x @ w.T).unflatten(-1, (-1, SIZE)).transpose(0, 1)[None] for w in (q, k))
    queries, keys = apply_rotary_pos_emb(*shaped, cos, sin)
    return queries[0] @ keys[0].repeat_interleave(HEADS // KEYS, 0).mT


@pytest.mark.parametrize("said_by", ["params.json", "--base"])
def test_attention_computes_the_same_with_the_adapter(tmp_path: Path, said_by: str) -> None:
    if said_by == "--base":
        path, tensors = native(tmp_path, {"lora": PARAMS["lora"]})
        out = converted(path, tmp_path, base=base(tmp_path))
    else:
        path, tensors = native(tmp_path)
        out = converted(path, tmp_path)
    x = noise(5, HIDDEN, seed=7)
    for layer in range(2):
        own = [delta(tensors, f"layers.{layer}.attention.w{n}") for n in "qk"]
        new = [delta(out, f"model.layers.{layer}.self_attn.{n}_proj") for n in "qk"]
        torch.testing.assert_close(transformers_scores(x, *new), own_scores(x, *own), rtol=1e-4, atol=1e-3)
        for name in list(SHAPES)[2:]:
            assert torch.equal(
                delta(out, f"model.layers.{layer}.{NAMES[name]}"), delta(tensors, f"layers.{layer}.{name}")
            )
    assert len(out) == len(tensors)


def test_llama_cpp_s_rows_are_the_ones_that_it_began_with(tmp_path: Path) -> None:
    path, tensors = native(tmp_path)
    ao.convert(path, "gguf", tmp_path / "a.gguf", base=base(tmp_path))
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    found = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    for layer in range(2):
        for part in "qkv":
            wanted = tensors[f"layers.{layer}.attention.w{part}.lora_B.weight"]
            assert torch.equal(found[f"blk.{layer}.attn_{part}.weight.lora_b"], wanted)


def test_peft_adds_the_scale_of_the_file(tmp_path: Path) -> None:
    path, tensors = native(tmp_path)
    converted(path, tmp_path, base=base(tmp_path))
    model = MistralForCausalLM(MistralConfig(**CONFIG))
    before = model.model.layers[1].mlp.up_proj.weight.detach().clone()
    merged = PeftModel.from_pretrained(model, tmp_path / "out").merge_and_unload()
    added = merged.model.layers[1].mlp.up_proj.weight.detach() - before
    torch.testing.assert_close(added, delta(tensors, "layers.1.feed_forward.w3"), rtol=1e-5, atol=1e-5)


def test_experts_have_mixtrals_names(tmp_path: Path) -> None:
    stems = {
        f"layers.0.feed_forward.experts.{e}.{w}": SHAPES[f"feed_forward.{w}"]
        for e in (0, 1)
        for w in ("w1", "w2", "w3")
    }
    tensors = pairs({**stems, "layers.0.attention.wv": SHAPES["attention.wv"]})
    save_file(tensors, tmp_path / "lora.safetensors")
    (tmp_path / "params.json").write_text(json.dumps(PARAMS))
    out = converted(tmp_path / "lora.safetensors", tmp_path)
    for stem in stems:
        name = f"model.{stem}".replace("feed_forward", "block_sparse_moe")
        assert torch.equal(delta(out, name), delta(tensors, stem))


def test_what_no_file_says_is_asked_for(tmp_path: Path) -> None:
    path, _ = native(tmp_path, None)
    assert len(ao.load(path)) == 14  # to be looked at
    with pytest.raises(
        UnknownFact, match=r"params\.json beside would say it, and mistral-inference applies 2 · rank.*--alpha"
    ):
        ao.convert(path, "peft", tmp_path / "out", base=base(tmp_path))
    with pytest.raises(UnknownFact, match=r"params\.json beside would say; .*--base CONFIG"):
        ao.convert(path, "peft", tmp_path / "out", alpha=6.0)
    assert not (tmp_path / "out").exists()
    out = converted(path, tmp_path, alpha=6.0, base=tmp_path / "base")
    assert len(out) == 28
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["lora_alpha"] == 6


def test_heads_that_params_json_leaves_out_are_asked_for(tmp_path: Path) -> None:
    """As Meta's own `params.json` does, whose code has the same names."""
    path, _ = native(tmp_path, {**PARAMS, "head_dim": None})
    with pytest.raises(UnknownFact, match="--base CONFIG"):
        ao.convert(path, "peft", tmp_path / "out")


def test_a_base_of_other_heads_is_refused(tmp_path: Path) -> None:
    path, _ = native(tmp_path)
    with pytest.raises(Conflict, match=r"6 heads of 8 and 2 of keys, but --base has 3 of 16 and 1"):
        ao.load(path, base=base(tmp_path, num_attention_heads=3, num_key_value_heads=1, head_dim=16))


def test_rows_that_are_not_the_heads_are_refused(tmp_path: Path) -> None:
    path, _ = native(tmp_path, {**PARAMS, "n_heads": 5})
    with pytest.raises(BrokenAdapter, match=r"48 rows are not the 5 heads of 8, .*is it the right .*params\.json"):
        ao.load(path)


@pytest.mark.parametrize("config", [LlamaConfig, Qwen2Config])
def test_other_families_are_refused(tmp_path: Path, config: type) -> None:
    path, _ = native(tmp_path)
    with pytest.raises(UnsupportedFormat, match="mistral, mixtral"):
        ao.load(path, base=base(tmp_path, config))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "params.json"),
        ("[1]", "must be a JSON object"),
        ('{"lora": {}, "lora": {"scaling": 2.0}}', "'lora' twice"),
        (json.dumps({**PARAMS, "n_heads": "six"}), "not three counts"),
        (json.dumps({**PARAMS, "lora": {"scaling": "2.0"}}), "lora.scaling is '2.0', not a number"),
        (json.dumps({**PARAMS, "lora": {"scaling": 10**400}}), "not a number"),
    ],
)
def test_a_broken_params_json_is_an_error(tmp_path: Path, text: str, said: str) -> None:
    path, _ = native(tmp_path)
    (tmp_path / "params.json").write_text(text)
    with pytest.raises(UnreadableFile, match=said):
        ao.load(path)


def test_a_peft_folder_of_such_names_stays_one(tmp_path: Path) -> None:
    _, tensors = native(tmp_path, None)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "lora.safetensors").unlink()
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 6,
        "target_modules": sorted({s.split(".")[-1] for s in SHAPES}),
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert ao.inspect(tmp_path).dialect == "peft"


def test_an_image_model_s_feed_forward_is_not_mistral_s(tmp_path: Path) -> None:
    """Z-Image's layers have the same names, and no `attention.wq`."""
    wide, deep = 10240, 3840
    shapes = {"w1": (wide, deep), "w2": (deep, wide), "w3": (wide, deep)}
    save_file(pairs({f"layers.0.feed_forward.{w}": shape for w, shape in shapes.items()}), tmp_path / "z.safetensors")
    assert ao.inspect(tmp_path / "z.safetensors").architecture.value == "z_image"


def test_it_is_never_written(tmp_path: Path) -> None:
    path, _ = native(tmp_path)
    with pytest.raises(CannotRepresent, match="--to peft"):
        ao.convert(path, "mistral", tmp_path / "o.safetensors")
