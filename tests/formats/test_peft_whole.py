"""Whole models in which peft's layers still hold an adapter, and files whose keys an earlier peft mangled, against peft."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

import adapterops as ao
from adapterops.errors import UnsupportedFormat

Tensors = dict[str, torch.Tensor]


class Layer(nn.Module):
    """Two projections, a norm that nothing adapts, and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.o_proj, self.norm = nn.Linear(12, 12), nn.Linear(12, 12, bias=False), nn.LayerNorm(12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.o_proj(torch.tanh(self.q_proj(self.norm(x))))


class Model(nn.Module):
    """Layers between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.model = nn.ModuleDict({"embed": nn.Embedding(9, 12), "layers": nn.ModuleList(Layer() for _ in range(2))})
        self.lm_head = nn.Linear(12, 9, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.model["embed"](ids)
        for layer in self.model["layers"]:  # type: ignore[union-attr]
            x = layer(x)
        out: torch.Tensor = self.lm_head(x)
        return out


IDS = torch.arange(9).reshape(1, 9)
CONFIG = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "o_proj"]}


def trained() -> PeftModel:
    model = get_peft_model(Model(), LoraConfig(**CONFIG))  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    return model.eval()


def whole(model: PeftModel, old: bool = False) -> Tensors:
    """The state dict of the model inside; before peft 0.6 adapted layers kept their weights under their own names."""
    state: Tensors = model.base_model.model.state_dict()
    return {key.replace(".base_layer.", ".") if old else key: tensor.clone() for key, tensor in state.items()}


OTHERS = {
    "lm_head.weight",
    "model.embed.weight",
    *(f"model.layers.{n}.norm.{p}" for n in (0, 1) for p in ("weight", "bias")),
}


@pytest.mark.parametrize("old", [False, True])
def test_the_adapter_is_taken_out_of_a_whole_model(old: bool, tmp_path: Path) -> None:
    model = trained()
    path = tmp_path / "model.safetensors"
    save_file(whole(model, old), path)
    with pytest.raises(
        UnsupportedFormat, match=r"a whole model's.*8 tensors of an adapter.*other 6 .*--allow-drop"
    ) as error:
        ao.load(path)
    assert set(error.value.keys) == OTHERS
    done = ao.convert(path, "peft", tmp_path / "peft", alpha=6, allow_drop=True)
    assert set(done.dropped) == OTHERS
    assert any("6 are the base model's own" in note or "5 more are the base model's own" in note for note in done.notes)
    again = PeftModel.from_pretrained(Model(), str(tmp_path / "peft")).eval()
    assert torch.equal(again(IDS), model(IDS))
    assert not torch.equal(model(IDS), Model()(IDS))


def test_an_adapter_beside_the_weights_of_its_layers_alone_needs_no_leave(tmp_path: Path) -> None:
    tensors = {key: t for key, t in whole(trained()).items() if key not in OTHERS}
    save_file(tensors, tmp_path / "a.safetensors")
    adapter = ao.load(tmp_path / "a.safetensors", alpha=6)
    assert {u.method for u in adapter} == {"lora"}
    assert any("are the base model's own" in note for note in adapter.provenance.notes)


def test_weights_without_those_of_adapted_layers_are_no_such_model(tmp_path: Path) -> None:
    """They may be saved modules, or anybody's: without a config and a prefix nothing tells."""
    tensors = {key: t for key, t in whole(trained()).items() if ".base_layer." not in key}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ao.AdapterOpsError) as error:
        ao.load(tmp_path / "a.safetensors", alpha=6)
    assert "whole model" not in str(error.value)


def test_a_name_that_peft_took_out_of_the_keys_is_put_back(tmp_path: Path) -> None:
    """huggingface/peft v0.17.1 `get_peft_model_state_dict`: `k.replace(f".{adapter_name}", "")`, of an adapter called lora."""
    model = trained()
    model.save_pretrained(str(tmp_path / "a"))
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({key.replace(".weight", ".lora.weight").replace(".lora", ""): t for key, t in tensors.items()}, file)
    with pytest.raises(UnsupportedFormat, match=r"called lora") as error:
        ao.load(tmp_path / "a")
    rule = str(error.value).partition("--rename '")[2].partition("'")[0]
    done = ao.convert(tmp_path / "a", "peft", tmp_path / "b", rename=[rule])
    assert load_file(Path(done.path) / "adapter_model.safetensors").keys() == tensors.keys()
    again = PeftModel.from_pretrained(Model(), str(tmp_path / "b")).eval()
    assert torch.equal(again(IDS), model(IDS))
