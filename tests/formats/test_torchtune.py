"""torchtune's adapters, held to what attention computes with them.

torchtune's formulas (interleaved rotary embedding, `x @ W.T` with its own rows) and transformers' (rotated halves) must give
the same scores with the adapter on, whichever way its rows are ordered.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GemmaConfig, LlamaConfig, MistralConfig, Phi3Config, Qwen2Config, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

import adapterops as ao
from adapterops.errors import BrokenAdapter, CannotRepresent, UnknownFact, UnsupportedFormat

HIDDEN, HEADS, KEYS, SIZE, INNER, RANK, ALPHA = 24, 6, 2, 8, 20, 3, 5.0
SHAPE: dict[str, Any] = {
    "hidden_size": HIDDEN, "num_attention_heads": HEADS, "num_key_value_heads": KEYS, "head_dim": SIZE,
    "intermediate_size": INNER,
    "num_hidden_layers": 2, "vocab_size": 11, "max_position_embeddings": 32,
}  # fmt: skip
WIDE = {"q_proj": HEADS * SIZE, "k_proj": KEYS * SIZE, "v_proj": KEYS * SIZE, "output_proj": HIDDEN}
NAMES = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "output_proj": "o_proj"}
MLP = {"w1": ("gate_proj", INNER, HIDDEN), "w3": ("up_proj", INNER, HIDDEN), "w2": ("down_proj", HIDDEN, INNER)}


def base(tmp_path: Path, config: type = LlamaConfig, **more: Any) -> Path:
    name = config.__name__.removesuffix("Config") + "ForCausalLM"
    config(**SHAPE, architectures=[name], **more).save_pretrained(tmp_path / "base")
    return tmp_path / "base" / "config.json"


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def native(layers: int = 2, magnitudes: bool = False) -> dict[str, Tensor]:
    """A state dict of torchtune's, every tensor noise."""
    out: dict[str, Tensor] = {}
    for layer in range(layers):
        shapes = {f"attn.{n}": (w, HIDDEN if n != "output_proj" else HEADS * SIZE) for n, w in WIDE.items()}
        shapes |= {f"mlp.{n}": (wide, deep) for n, (_, wide, deep) in MLP.items()}
        for at, (name, (wide, deep)) in enumerate(shapes.items()):
            stem = f"layers.{layer}.{name}"
            out[f"{stem}.lora_a.weight"] = noise(RANK, deep, seed=100 * layer + at)
            out[f"{stem}.lora_b.weight"] = noise(wide, RANK, seed=100 * layer + at + 50)
            if magnitudes:
                out[f"{stem}.magnitude"] = noise(wide, seed=100 * layer + at + 80).abs()
    return out


def delta(tensors: dict[str, Tensor], stem: str, up: str = "lora_b", down: str = "lora_a") -> Tensor:
    return ALPHA / RANK * tensors[f"{stem}.{up}.weight"] @ tensors[f"{stem}.{down}.weight"]


def converted(path: Path, tmp_path: Path, **options: Any) -> dict[str, Tensor]:
    result = ao.convert(path, "peft", tmp_path / "out", **{"alpha": ALPHA, **options})
    assert result.source_dialect == "torchtune"
    assert result.proof is not None
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    return {key.removeprefix("base_model.model."): value for key, value in tensors.items()}


def tunes_scores(x: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Attention scores as torchtune has them: neighbouring numbers are a pair, which rotates."""
    angles = torch.arange(len(x))[:, None] / 10000.0 ** (torch.arange(0, SIZE, 2) / SIZE)

    def rotated(values: Tensor) -> Tensor:
        one, two = values.unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        return torch.stack((one * cos - two * sin, two * cos + one * sin), -1).flatten(-2)

    queries, keys = rotated((x @ q.T).unflatten(-1, (-1, SIZE))), rotated((x @ k.T).unflatten(-1, (-1, SIZE)))
    return torch.einsum("ihd,jhd->hij", queries, keys.repeat_interleave(HEADS // KEYS, 1))


def transformers_scores(x: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """The same by transformers."""
    cos, sin = LlamaRotaryEmbedding(LlamaConfig(**SHAPE))(x[None], torch.arange(len(x))[None])
    shaped = ((x @ w.T).unflatten(-1, (-1, SIZE)).transpose(0, 1)[None] for w in (q, k))
    queries, keys = apply_rotary_pos_emb(*shaped, cos, sin)
    return queries[0] @ keys[0].repeat_interleave(HEADS // KEYS, 0).mT


@pytest.mark.parametrize("config", [LlamaConfig, MistralConfig, GemmaConfig])
def test_attention_computes_the_same_with_the_adapter(tmp_path: Path, config: type) -> None:
    tensors = native()
    torch.save(tensors, tmp_path / "adapter_model.pt")
    out = converted(tmp_path / "adapter_model.pt", tmp_path, base=base(tmp_path, config))
    x = noise(5, HIDDEN, seed=7)
    for layer in range(2):
        stem = f"model.layers.{layer}.self_attn"
        own = [delta(tensors, f"layers.{layer}.attn.{n}") for n in ("q_proj", "k_proj")]
        new = [delta(out, f"{stem}.{n}", "lora_B", "lora_A") for n in ("q_proj", "k_proj")]
        torch.testing.assert_close(transformers_scores(x, *new), tunes_scores(x, *own), rtol=1e-4, atol=1e-3)


def test_the_size_of_heads_that_a_config_leaves_out_is_its_class_s(tmp_path: Path) -> None:
    """Gemma's is 256 where none is stated, not hidden_size / num_attention_heads."""
    config = {**SHAPE, "hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "model_type": "gemma"}
    del config["head_dim"]
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["GemmaForCausalLM"]}))
    stem = "layers.0.attn.q_proj"
    tensors = {f"{stem}.lora_a.weight": noise(3, 128, seed=1), f"{stem}.lora_b.weight": noise(512, 3, seed=2)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    out = converted(tmp_path / "adapter_model.safetensors", tmp_path, base=tmp_path / "config.json")
    pairs = tensors[f"{stem}.lora_b.weight"].unflatten(0, (2, 128, 2))
    wanted = pairs.transpose(1, 2).flatten(0, 2)
    assert torch.equal(out["model.layers.0.self_attn.q_proj.lora_B.weight"], wanted)


def test_what_has_no_heads_stays_as_it_is(tmp_path: Path) -> None:
    tensors = native()
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    out = converted(tmp_path / "adapter_model.safetensors", tmp_path, base=base(tmp_path))
    for layer in range(2):
        pairs = {f"attn.{n}": f"self_attn.{NAMES[n]}" for n in ("v_proj", "output_proj")}
        pairs |= {f"mlp.{n}": f"mlp.{own}" for n, (own, _, _) in MLP.items()}
        for native_name, name in pairs.items():
            for here, there in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
                one = tensors[f"layers.{layer}.{native_name}.{here}.weight"]
                assert torch.equal(out[f"model.layers.{layer}.{name}.{there}.weight"], one)
    assert len(out) == len(tensors)


@pytest.mark.parametrize("config", [Qwen2Config, Qwen3Config])
def test_qwens_rows_are_where_they_were(tmp_path: Path, config: type) -> None:
    """torchtune does not reorder Qwen's weights, so neither may its adapters be (its own PEFT folders are)."""
    tensors = native()
    save_file(tensors, tmp_path / "adapter.safetensors")
    out = converted(tmp_path / "adapter.safetensors", tmp_path, base=base(tmp_path, config))
    for name in ("q_proj", "k_proj"):
        one = tensors[f"layers.1.attn.{name}.lora_b.weight"]
        assert torch.equal(out[f"model.layers.1.self_attn.{name}.lora_B.weight"], one)


def test_magnitudes_are_reordered_with_their_rows(tmp_path: Path) -> None:
    tensors = native(magnitudes=True)
    save_file(tensors, tmp_path / "adapter.safetensors")
    out = converted(tmp_path / "adapter.safetensors", tmp_path, base=base(tmp_path))
    for native_name, name in (("q_proj", "q_proj"), ("k_proj", "k_proj"), ("v_proj", "v_proj")):
        b, m = (tensors[f"layers.0.attn.{native_name}.{end}"] for end in ("lora_b.weight", "magnitude"))
        stem = f"model.layers.0.self_attn.{name}"
        new = torch.cat((out[f"{stem}.lora_B.weight"], out[f"{stem}.lora_magnitude_vector"][:, None]), 1)
        old = torch.cat((b, m[:, None]), 1)
        assert sorted(map(tuple, new.tolist())) == sorted(map(tuple, old.tolist()))
        assert torch.equal(new, old) == (name == "v_proj")


def test_the_output_projection(tmp_path: Path) -> None:
    tensors = {"output.lora_a.weight": noise(RANK, HIDDEN, seed=1), "output.lora_b.weight": noise(11, RANK, seed=2)}
    save_file(tensors | native(), tmp_path / "adapter.safetensors")
    out = converted(tmp_path / "adapter.safetensors", tmp_path, base=base(tmp_path, tie_word_embeddings=False))
    assert torch.equal(out["lm_head.lora_B.weight"], tensors["output.lora_b.weight"])


def test_what_only_the_user_knows_is_asked_for(tmp_path: Path) -> None:
    save_file(native(), tmp_path / "adapter.safetensors")
    with pytest.raises(UnknownFact, match="--alpha"):
        ao.convert(tmp_path / "adapter.safetensors", "peft", tmp_path / "out", base=base(tmp_path))
    with pytest.raises(UnknownFact, match="--base CONFIG"):
        ao.convert(tmp_path / "adapter.safetensors", "peft", tmp_path / "out", alpha=ALPHA)
    assert not (tmp_path / "out").exists()
    assert len(ao.load(tmp_path / "adapter.safetensors")) == 14  # to be looked at


def test_a_base_of_other_heads_is_refused(tmp_path: Path) -> None:
    save_file(native(), tmp_path / "adapter.safetensors")
    SHAPES = {**SHAPE, "head_dim": 10, "num_attention_heads": 4}
    LlamaConfig(**SHAPES, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / "base")
    with pytest.raises(BrokenAdapter, match="right --base"):
        ao.convert(tmp_path / "adapter.safetensors", "peft", tmp_path / "out", alpha=ALPHA, base=tmp_path / "base")


def test_models_that_torchtune_spells_otherwise_are_refused(tmp_path: Path) -> None:
    save_file(native(), tmp_path / "adapter.safetensors")
    with pytest.raises(UnsupportedFormat, match="phi3"):
        ao.convert(
            tmp_path / "adapter.safetensors", "peft", tmp_path / "out", alpha=ALPHA,
            base=base(tmp_path, Phi3Config, pad_token_id=0),
        )  # fmt: skip


def test_it_is_never_written(tmp_path: Path) -> None:
    save_file(native(), tmp_path / "adapter.safetensors")
    with pytest.raises(CannotRepresent, match="--to peft"):
        ao.convert(tmp_path / "adapter.safetensors", "torchtune", tmp_path / "o.safetensors", alpha=ALPHA,
                   base=base(tmp_path))  # fmt: skip
