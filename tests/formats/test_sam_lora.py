"""Sam_LoRA: its layer stated again (`src/lora.py`, `LoRA_qkv`), in transformers' SAM, and what peft makes of the
converted file."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from raw import probe
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import SamConfig, SamModel, SamVisionConfig

import adapterops as ao
from adapterops import errors
from adapterops.methods import METHODS


class Layer(nn.Module):
    """What the trainer puts in the place of a block's `qkv`."""

    def __init__(self, qkv: nn.Linear, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.qkv, self.pairs = qkv, pairs

    def forward(self, x: Tensor) -> Tensor:
        out = self.qkv(x)
        width = self.qkv.in_features
        (a_q, b_q), (a_v, b_v) = self.pairs
        out[:, :, :, :width] += x @ a_q.T @ b_q.T
        out[:, :, :, -width:] += x @ a_v.T @ b_v.T
        return out


def sam(blocks: int = 3, width: int = 16) -> SamModel:
    torch.manual_seed(0)
    vision = SamVisionConfig(
        hidden_size=width, output_channels=8, num_hidden_layers=blocks, num_attention_heads=2, image_size=32, patch_size=8,
        mlp_dim=24, window_size=2, global_attn_indexes=[1],
    )  # fmt: skip
    prompts = {"hidden_size": 8, "image_size": 32, "patch_size": 8, "image_embedding_size": 4, "mask_input_channels": 4}
    decoder = {"hidden_size": 8, "mlp_dim": 16, "num_attention_heads": 2, "iou_head_hidden_dim": 8}
    model = SamModel(SamConfig(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder)).eval()
    for parameter in model.vision_encoder.parameters():
        nn.init.normal_(parameter, std=0.2)  # as SAM is initialised, hardly anything would come through
    return model


def trained(model: SamModel, blocks: Sequence[int], rank: int = 2) -> dict[str, Tensor]:
    """Puts the trainer's layers into the model; its file."""
    out: dict[str, Tensor] = {}
    for number, block in enumerate(blocks):
        attention = model.vision_encoder.layers[block].attn
        width = attention.qkv.in_features
        pairs = [(torch.randn(rank, width), torch.randn(width, rank)) for _ in "qv"]
        attention.qkv = Layer(attention.qkv, pairs)
        for part, (a, b) in enumerate(pairs):
            out |= {f"w_a_{2 * number + part:03d}": a, f"w_b_{2 * number + part:03d}": b}
    return out


def answer(model: nn.Module) -> Tensor:
    picture = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        out: Tensor = model.vision_encoder(picture).last_hidden_state
    return out


def expected(tensors: dict[str, Tensor], number: int) -> Tensor:
    """ΔW of a block, (3 · width, width)."""
    queries, values = (
        tensors[f"w_b_{2 * number + part:03d}"].double() @ tensors[f"w_a_{2 * number + part:03d}"].double()
        for part in range(2)
    )
    return torch.cat([queries, torch.zeros_like(queries), values])


def same(path: Path, tensors: dict[str, Tensor]) -> bool:
    back = load_file(path)
    return back.keys() == tensors.keys() and all(torch.equal(back[key], tensor) for key, tensor in tensors.items())


@pytest.mark.parametrize("blocks", [[0, 1, 2], [0, 2]])
def test_peft_computes_what_the_trainer_did(blocks: list[int], tmp_path: Path) -> None:
    plain, model = sam(), sam()
    tensors = trained(model, blocks)
    save_file(tensors, tmp_path / "x.safetensors")
    plain.config.save_pretrained(tmp_path / "config")
    some = {"lora_layer": blocks} if len(blocks) < 3 else {}
    if some:
        with pytest.raises(errors.UnknownFact, match=r"adapts 2 blocks, and the base has 3.*--set lora_layer"):
            ao.convert(tmp_path / "x.safetensors", "peft", tmp_path / "p", base=tmp_path / "config")
    result = ao.convert(tmp_path / "x.safetensors", "peft", tmp_path / "p", base=tmp_path / "config", fields=some)
    assert result.proof is not None
    assert result.proof.exact
    assert result.modules == len(blocks)
    wanted = answer(model)
    assert (wanted - answer(plain)).abs().max() > 0.01
    torch.testing.assert_close(answer(PeftModel.from_pretrained(plain, tmp_path / "p").eval().base_model.model), wanted)
    # Queries and values get their own ranks back, from peft's one update for both.
    said = ao.convert(tmp_path / "p", "sam-lora", tmp_path / "back.safetensors", base=tmp_path / "config")
    assert same(tmp_path / "back.safetensors", tensors)
    assert any(f"lora_layer={blocks}" in note for note in said.notes)
    again = ao.load(tmp_path / "back.safetensors", base=tmp_path / "config")
    assert [u.module for u in again] == [f"vision_encoder.layers.{block}.attn.qkv" for block in blocks]


@pytest.mark.parametrize("rank", [2, 16])
def test_published_files(rank: int, corpus: Path, tmp_path: Path) -> None:
    path = corpus / "files" / "sam-lora" / f"lora_rank{rank}.safetensors"
    tensors = load_file(path)
    base = tmp_path / "config" if rank == 2 else None
    if base is not None:
        SamConfig().save_pretrained(base)
    adapter = ao.load(path, base=base)
    assert any("assumed: the modules of transformers' SamModel" in n for n in adapter.provenance.notes) == (
        base is None
    )
    assert [u.module for u in adapter] == list(_names())
    for number, update in enumerate(adapter):
        b, a = METHODS[update.method].low_rank(update)
        torch.testing.assert_close(b @ (a @ probe(768)), expected(tensors, number) @ probe(768))
    result = ao.save(adapter, tmp_path / "p", format="peft")
    assert result.proof is not None
    assert result.proof.exact
    assert result.modules == 12
    written = load_file(tmp_path / "p" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "p" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] == 2 * rank
    for number, name in enumerate(_names()):
        a, b = (written[f"base_model.model.{name}.lora_{role}.weight"].double() for role in "AB")
        torch.testing.assert_close(b @ (a @ probe(768)), expected(tensors, number) @ probe(768))
    ao.convert(tmp_path / "p", "sam-lora", tmp_path / "back.safetensors")
    assert same(tmp_path / "back.safetensors", tensors)
    ao.convert(path, "sam-lora", tmp_path / "again.safetensors")
    assert same(tmp_path / "again.safetensors", tensors)
    with safe_open(tmp_path / "again.safetensors", "pt") as file:
        assert "sam_lora_layer" not in file.metadata()


@functools.cache
def _names() -> tuple[str, ...]:
    with torch.device("meta"):
        model = SamModel(SamConfig())
    return tuple(
        name for name, _ in model.named_modules() if name.startswith("vision_encoder.") and name.endswith(".attn.qkv")
    )


def test_a_lora_on_the_whole_projection(tmp_path: Path) -> None:
    """Any LoRA that leaves the keys alone can be said, at its whole rank for queries and for values; any other
    cannot."""
    a, b = torch.randn(3, 16), torch.randn(48, 3)
    b[16:32] = 0

    def folder(b: Tensor, alpha: float, name: str = "attn.qkv") -> Path:
        config = {"peft_type": "LORA", "r": 3, "lora_alpha": alpha, "target_modules": [name]}
        (tmp_path / "p").mkdir(exist_ok=True)
        (tmp_path / "p" / "adapter_config.json").write_text(json.dumps(config))
        stem = f"base_model.model.vision_encoder.layers.1.{name}"
        save_file(
            {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}, tmp_path / "p" / "adapter_model.safetensors"
        )
        return tmp_path / "p"

    out = tmp_path / "s.safetensors"
    ao.convert(folder(b, 3), "sam-lora", out)
    tensors = load_file(out)
    torch.testing.assert_close(expected(tensors, 0), b.double() @ a.double())
    assert next(iter(ao.load(out))).module == "vision_encoder.layers.1.attn.qkv"
    with pytest.raises(errors.CannotRepresent, match=r"scale is 2.*--fold-alpha"):
        ao.convert(folder(b, 6), "sam-lora", tmp_path / "t.safetensors")
    ao.convert(folder(b, 6), "sam-lora", tmp_path / "t.safetensors", fold_alpha=True)
    torch.testing.assert_close(expected(load_file(tmp_path / "t.safetensors"), 0), 2 * b.double() @ a.double())
    with pytest.raises(errors.CannotRepresent, match="leaves the keys alone"):
        ao.convert(folder(torch.randn(48, 3), 3), "sam-lora", tmp_path / "u.safetensors")
    with pytest.raises(errors.CannotRepresent, match="no qkv of SAM's image encoder"):
        ao.convert(folder(b, 3, "mlp.lin1"), "sam-lora", tmp_path / "u.safetensors")


def test_files_that_are_not_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors = {
        f"w_{half}_{number:03d}": torch.ones(2, 8) if half == "a" else torch.ones(8, 2)
        for number in range(6)
        for half in "ab"
    }

    def refused(error: type[Exception], words: str, change: dict[str, Tensor | None], **options: object) -> None:
        save_file({k: t for k, t in (tensors | change).items() if t is not None}, path)
        with pytest.raises(error, match=words):
            ao.load(path, **options)  # type: ignore[arg-type]

    refused(errors.UnknownFact, r"adapts 3 blocks.*width 8", {})
    refused(errors.BrokenAdapter, "no w_b_003", {"w_b_003": None})
    refused(errors.BrokenAdapter, "no w_a_000", {"w_a_000": None, "w_b_000": None, "w_a_001": None, "w_b_001": None})
    refused(errors.BrokenAdapter, "one width and one rank", {"w_a_001": torch.ones(3, 8), "w_b_001": torch.ones(8, 3)})
    refused(errors.BrokenAdapter, "w_b_002", {"w_b_002": torch.ones(8, 3)})
    refused(errors.UnsupportedFormat, "classifier", {"fc_768in_10out": torch.ones(10, 8)})
    refused(errors.UnsupportedFormat, "mask_decoder", {"mask_decoder.iou_token.weight": torch.ones(1, 8)})
    for layers in ([0, 1], [0, 0, 1], [0, 1, -2], "all"):
        refused(errors.UsageError, "3 different numbers of blocks", {}, fields={"lora_layer": layers})
    save_file(tensors, path)
    assert [u.module for u in ao.load(path, fields={"lora_layer": [7, 2, 3]})] == [
        f"vision_encoder.layers.{block}.attn.qkv" for block in (2, 3, 7)
    ]


def test_factors_of_two_types(tmp_path: Path) -> None:
    tensors = trained(sam(), range(3))
    tensors["w_b_003"] = tensors["w_b_003"].half()
    save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / "x.safetensors")
    with pytest.raises(errors.BrokenAdapter, match=r"w_b_003.*is F16 beside 'w_a_002'"):
        ao.load(tmp_path / "x.safetensors", fields={"lora_layer": [0, 1, 2]})
