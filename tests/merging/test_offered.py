"""What a merge offers where the first source's format, which is written for want of another word, cannot hold the result."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from small_adapters import Numbers, Tensors, file

import adapterops as ao
from adapterops.errors import CannotRepresent

ENCODER = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"
PROCESSOR = "double_blocks.{}.processor.qkv_lora1"
FUSED = "lora_unet_double_blocks_{}_img_attn_qkv"


def xlabs(path: Path) -> Path:
    """A LoRA of Flux.1's denoiser as x-flux writes it, without places for scales or text encoders."""
    numbers, tensors = Numbers(1), Tensors()
    for block in range(4):
        name = PROCESSOR.format(block)
        tensors[f"{name}.down.weight"], tensors[f"{name}.up.weight"] = numbers(2, 3072), numbers(9216, 2)
    return file(path, tensors)


def kohya(path: Path) -> Path:
    """A LoRA of Flux.1's denoiser and of CLIP, as sd-scripts writes it."""
    numbers, tensors = Numbers(2), Tensors()
    shapes = {FUSED.format(block): (9216, 3072) for block in range(4)} | {ENCODER: (768, 768)}
    for name, (rows, columns) in shapes.items():
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = numbers(2, columns), numbers(rows, 2)
        tensors[f"{name}.alpha"] = numbers(1)[0].abs()
    return file(path, tensors)


def merged(sources: list[Path], output: Path, method: str, to: str | None = None) -> list[int]:
    """The numbers of modules done, as the progress told of them."""
    done: list[int] = []
    ao.merge(sources, output, method, to=to, progress=lambda count, total: done.append(count))
    return done


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_formats_that_hold_the_result_are_offered_and_do(method: str, tmp_path: Path) -> None:
    sources, output = (
        [xlabs(tmp_path / "x.safetensors"), kohya(tmp_path / "k.safetensors")],
        tmp_path / "out.safetensors",
    )
    with pytest.raises(CannotRepresent, match=r"XLabs has no such component.*first source's format") as caught:
        merged(sources, output, method)
    assert not output.exists()
    offered = re.search(r"--to ([a-z0-9 _-]+) holds all", str(caught.value))
    assert offered is not None
    names = offered[1].split(" or ")
    # The other source's own format goes first.
    assert names[0] == "kohya"
    for name in names:
        assert merged(sources, tmp_path / f"{name}.safetensors", method, to=name)
        found = [(update.component, update.module) for update in ao.load(tmp_path / f"{name}.safetensors")]
        assert ("text_encoder", "text_model.encoder.layers.0.self_attn.q_proj") in found


def test_what_takes_long_is_not_begun(tmp_path: Path) -> None:
    done: list[int] = []
    sources = [xlabs(tmp_path / "x.safetensors"), kohya(tmp_path / "k.safetensors")]
    with pytest.raises(CannotRepresent):
        ao.merge(sources, tmp_path / "out.safetensors", "svd", progress=lambda count, total: done.append(count))
    assert not done


def test_a_format_that_was_asked_for_is_left_to_who_asked(tmp_path: Path) -> None:
    sources = [kohya(tmp_path / "k.safetensors"), xlabs(tmp_path / "x.safetensors")]
    with pytest.raises(CannotRepresent, match="XLabs has no such component") as caught:
        merged(sources, tmp_path / "out.safetensors", "cat", to="xlabs")
    assert "first source" not in str(caught.value)
