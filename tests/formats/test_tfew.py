"""T-Few's (IA)³: its layer stated again (`src/models/lora.py`, `LoRALinear`), and what peft makes of the converted
file."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

import adapterops as ao
from adapterops import errors

LAYERS = re.compile(r".*(SelfAttention|EncDecAttention)\.[kv]|.*DenseReluDense\.wi_1")
"""`lora_modules` and `lora_layers` of configs/ia3.json."""


class Layer(nn.Module):
    """What the trainer puts in a linear layer's place, for `lora_scaling_rank` 1 and `lora_rank` 0."""

    def __init__(self, layer: nn.Linear, vector: Tensor) -> None:
        super().__init__()
        self.weight, self.bias, self.multi_lora_b = layer.weight, layer.bias, nn.Parameter(vector)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias) * self.multi_lora_b.flatten()


def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=40,
        d_model=16,
        d_kv=4,
        d_ff=24,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config).eval()


def trained(model: T5ForConditionalGeneration) -> dict[str, Tensor]:
    """Puts the trainer's layers into the model; the state dict of what is trained."""
    out = {}
    for name, module in list(model.named_modules()):
        if LAYERS.fullmatch(name):
            assert isinstance(module, nn.Linear)
            vector = 1 + torch.randn(module.out_features, 1)
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, Layer(module, vector))
            out[f"{name}.multi_lora_b"] = vector
    return out


def answer(model: nn.Module) -> Tensor:
    words = torch.arange(1, 13).reshape(2, 6)
    with torch.no_grad():
        logits: Tensor = model(input_ids=words, decoder_input_ids=words[:, :4]).logits
    return logits


@pytest.mark.parametrize("base", [False, True])
def test_peft_computes_what_the_trainer_did(base: bool, tmp_path: Path) -> None:
    plain, model = t5(), t5()
    tensors = trained(model)
    torch.save(tensors, tmp_path / "finish.pt")
    plain.config.save_pretrained(tmp_path / "config")
    result = ao.convert(tmp_path / "finish.pt", "peft", tmp_path / "p", base=tmp_path / "config" if base else None)
    assert result.proof is not None
    assert result.proof.exact
    assert result.modules == len(tensors) == 16
    config = json.loads((tmp_path / "p" / "adapter_config.json").read_text())
    assert config["feedforward_modules"] == []
    if base:
        assert config["target_modules"] == ["k", "v", "wi_1"]
    expected = answer(model)
    assert (expected - answer(plain)).abs().max() > 0.01
    torch.testing.assert_close(answer(PeftModel.from_pretrained(plain, tmp_path / "p").eval()), expected)
    ao.convert(tmp_path / "p", "tfew", tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in tensors.items())


def test_the_published_file(corpus: Path, tmp_path: Path) -> None:
    path = corpus / "files" / "tfew-t03b-ia3" / "t03b_ia3_finish.pt"
    tensors = torch.load(path, weights_only=True)
    result = ao.convert(path, "peft", tmp_path / "p")
    assert result.proof is not None
    assert result.proof.exact
    assert result.modules == len(tensors) == 192
    written = load_file(tmp_path / "p" / "adapter_model.safetensors")
    assert all(
        torch.equal(written.pop(f"base_model.model.{key.removesuffix('.multi_lora_b')}.ia3_l"), tensor)
        for key, tensor in tensors.items()
    )
    assert not written
    targets = json.loads((tmp_path / "p" / "adapter_config.json").read_text())["target_modules"]
    assert all(re.fullmatch(targets, key.removesuffix(".multi_lora_b")) for key in tensors)
    assert not re.fullmatch(targets, "encoder.block.0.layer.1.DenseReluDense.wo")


def test_what_no_single_vector_says_is_refused(tmp_path: Path) -> None:
    name = "encoder.block.0.layer.0.SelfAttention.k"
    path = tmp_path / "x.safetensors"
    both = {f"{name}.multi_lora_b": torch.ones(8, 1), f"{name}.multi_lora_a": torch.ones(1, 4)}
    save_file(both, path)
    with pytest.raises(errors.UnsupportedFormat, match=r"multi_lora_a.*inputs beside its outputs"):
        ao.load(path)
    save_file({f"{name}.multi_lora_b": torch.ones(8, 2)}, path)
    with pytest.raises(errors.UnsupportedFormat, match=r"\[8, 2\] is of lora_scaling_rank 2"):
        ao.load(path)
    save_file(
        {f"{name}.multi_lora_b": torch.ones(8, 1), "encoder.block.0.layer.0.layer_norm.weight": torch.ones(4)}, path
    )
    with pytest.raises(errors.UnsupportedFormat, match=r"layer_norm"):
        ao.load(path)


def test_other_ia3_is_not_written_as_what_it_is_not(tmp_path: Path) -> None:
    folder = tmp_path / "p"
    folder.mkdir()
    config = {"peft_type": "IA3", "target_modules": ["k", "wo"], "feedforward_modules": ["wo"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    stem = "base_model.model.encoder.block.0.layer"
    outputs = {f"{stem}.0.SelfAttention.k.ia3_l": torch.rand(8, 1)}
    save_file(outputs | {f"{stem}.1.DenseReluDense.wo.ia3_l": torch.rand(1, 6)}, folder / "adapter_model.safetensors")
    with pytest.raises(errors.CannotRepresent, match=r"wo.*--to peft"):
        ao.convert(folder, "tfew", tmp_path / "t.safetensors")
    assert ao.convert(folder, "tfew", tmp_path / "t.safetensors", allow_drop=True).modules == 1
    assert list(load_file(tmp_path / "t.safetensors")) == ["encoder.block.0.layer.0.SelfAttention.k.multi_lora_b"]
    kohya = {"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_k.weight": torch.rand(1280)}
    kohya |= {"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_k.on_input": torch.tensor(False)}
    save_file(kohya, tmp_path / "k.safetensors")
    with pytest.raises(errors.CannotRepresent, match="attn1"):
        ao.convert(tmp_path / "k.safetensors", "tfew", tmp_path / "u.safetensors")


def test_a_row_is_no_vector_of_outputs(tmp_path: Path) -> None:
    save_file({"encoder.block.0.layer.0.SelfAttention.k.multi_lora_b": torch.ones(1, 16)}, tmp_path / "x.safetensors")
    with pytest.raises(errors.UnsupportedFormat, match=r"multi_lora_b.*\[1, 16\].*\(out_features, 1\)"):
        ao.convert(tmp_path / "x.safetensors", "peft", tmp_path / "peft")
    assert not (tmp_path / "peft").exists()
