"""S rules: each is broken in one way and found exactly; near misses are not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from sound import Tensors, codes, diffusers_file, edit, found, kohya_file, peft_folder, rehash, set_config

from adapterops.validation import registry
from adapterops.validation.rules.scale import before_rounding

UNET = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
Broken = Path | tuple[Path, dict[str, Any]]


def _alphas(value: float | torch.Tensor, dtype: torch.dtype = torch.float16) -> Callable[[Tensors], Tensors]:
    new = value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=dtype)
    return lambda tensors: {k: new.clone() if k.endswith(".alpha") else t for k, t in tensors.items()}


def _kohya(
    path: Path, value: float | torch.Tensor, stated: str | None = None, dtype: torch.dtype = torch.float16
) -> Path:
    """A Kohya file with another alpha in all modules, and in its header."""
    return edit(kohya_file(path), _alphas(value, dtype), {"ss_network_alpha": stated})


def _metadata(**fields: Any) -> dict[str, str | None]:
    return {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in fields.items()})}


def _diffusers(path: Path, alphas: float | None = None, **fields: Any) -> Path:
    file = diffusers_file(path)
    targets = ["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"]
    targets.append(targets[0].replace("down_blocks.0", "down_blocks.1"))

    def with_alphas(tensors: Tensors) -> Tensors:
        if alphas is None:
            return tensors
        stems = {key.partition(".lora_")[0] for key in tensors}
        return {**tensors, **{f"{stem}.alpha": torch.tensor(alphas) for stem in stems}}

    return edit(file, with_alphas, _metadata(r=4, target_modules=targets, **fields))


def _without_config(path: Path) -> Path:
    folder = peft_folder(path)
    (folder / "adapter_config.json").unlink()
    (folder / "README.md").unlink()
    return (folder / "adapter_model.safetensors").rename(folder / "mine.safetensors")


def _loralib(path: Path) -> Path:
    file = path / "lora.safetensors"
    generator = torch.Generator().manual_seed(0)
    names = [f"bert.encoder.layer.{n}.attention.self.query" for n in range(2)]
    tensors = {}
    for name in names:
        tensors[f"{name}.lora_A"] = torch.randn(4, 768, generator=generator)
        tensors[f"{name}.lora_B"] = torch.randn(768, 4, generator=generator)
    save_file(tensors, file, {"format": "pt"})
    return file


def split_qkv(path: Path, alpha: float = 4.0, blocks: bool = True) -> Path:
    """A Flux.1 LoRA in sd-scripts' spelling, its fused projection trained apart (`split_qkv`), the rest whole."""
    generator = torch.Generator().manual_seed(0)
    qkv, other = "lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_double_blocks_0_img_attn_proj"
    up = torch.randn(9216, 12, generator=generator).half()
    if blocks:
        for part in range(3):
            rows = slice(3072 * part, 3072 * (part + 1))
            up[rows, : 4 * part] = 0
            up[rows, 4 * part + 4 :] = 0
    tensors = {
        f"{qkv}.lora_down.weight": torch.randn(12, 3072, generator=generator).half(),
        f"{qkv}.lora_up.weight": up,
        f"{qkv}.alpha": torch.tensor(alpha).half(),
        f"{other}.lora_down.weight": torch.randn(4, 3072, generator=generator).half(),
        f"{other}.lora_up.weight": torch.randn(3072, 4, generator=generator).half(),
        f"{other}.alpha": torch.tensor(4.0).half(),
    }
    file = path / "flux.safetensors"
    metadata = {
        "ss_base_model_version": "flux1", "ss_network_dim": "4", "ss_network_alpha": "4.0", "ss_output_name": "flux",
        "ss_network_module": "networks.lora_flux", "ss_network_args": '{"split_qkv": "True"}',
        "modelspec.architecture": "flux-1-dev/lora", "modelspec.title": "flux",
    }  # fmt: skip
    save_file(tensors, file, metadata)
    return rehash(file)


def _lokr(path: Path, alpha: int = 8) -> tuple[Path, dict[str, Any]]:
    """What peft saves of a LoKr whose factors are both whole."""
    from peft import LoKrConfig, get_peft_model

    model = torch.nn.Sequential()
    model.add_module("one", torch.nn.Linear(16, 16))
    torch.manual_seed(0)
    config = LoKrConfig(target_modules=["one"], r=4, alpha=alpha, init_weights=False, decompose_factor=4)
    get_peft_model(model, config).save_pretrained(path / "lokr")
    return path / "lokr", {"targets": ["comfy"], "select": ["S"]}


BROKEN: dict[str, Callable[[Path], Broken]] = {
    "S401": lambda p: _diffusers(p, alphas=2.0, lora_alpha=4),
    "S402": lambda p: edit(diffusers_file(p), metadata=_metadata(r=8, lora_alpha=4)),
    "S403": _without_config,
    "S404": lambda p: _kohya(p, 0.0),
    "S405": lambda p: _kohya(p, -2.0),
    "S406": lambda p: _kohya(p, torch.ones(4, dtype=torch.float16)),
    "S407": lambda p: _kohya(p, 0.1, "0.1", torch.bfloat16),
    "S408": lambda p: _diffusers(p, lora_alpha=8),
    "S409": lambda p: edit(kohya_file(p), metadata={"ss_network_dim": "32"}),
    "S410": _loralib,
    "S411": lambda p: edit(kohya_file(p), lambda t: {k: v for k, v in t.items() if k != f"{UNET}.alpha"}),
    "S412": split_qkv,
    "S413": _lokr,
    "S414": lambda p: (set_config(peft_folder(p), use_rslora=True), {"targets": ["gguf"], "select": ["S"]}),
    "S415": lambda p: set_config(peft_folder(p), lora_alpha=1024),
}


@pytest.mark.parametrize("code", BROKEN)
def test_what_is_broken_is_found_and_nothing_else(tmp_path: Path, code: str) -> None:
    broken = BROKEN[code](tmp_path)
    path, options = broken if isinstance(broken, tuple) else (broken, {})
    assert codes(path, **options) == [code]


def test_every_rule_of_scale_is_broken_here() -> None:
    assert {rule.code for rule in registry.rules() if rule.code[0] == "S"} == BROKEN.keys()


NEAR: dict[str, Callable[[Path], Broken]] = {
    "two alphas that agree": lambda p: _diffusers(p, alphas=4.0, lora_alpha=4),
    "a header's alpha that is the rank": lambda p: _diffusers(p, lora_alpha=4),
    "an alpha with one axis": lambda p: _kohya(p, torch.tensor([2.0])),
    "a sixteenth": lambda p: _kohya(p, 0.0625, "0.0625", torch.bfloat16),
    "a header that rounds": lambda p: _kohya(p, 0.1, "0.1", torch.float32),
    "no alpha at all": lambda p: edit(
        kohya_file(p), lambda t: {k: v for k, v in t.items() if not k.endswith(".alpha")}, {"ss_network_alpha": None}
    ),
    "a fused projection trained whole": lambda p: split_qkv(p, blocks=False),
    "parts converted at the trained strength": lambda p: split_qkv(p, alpha=12.0),
    "an alpha that is LoKr's rank": lambda p: _lokr(p, alpha=4),
    "alpha and rsLoRA in peft": lambda p: set_config(peft_folder(p), use_rslora=True, lora_alpha=64),
    "no rsLoRA for llama.cpp": lambda p: (peft_folder(p), {"targets": ["gguf"], "select": ["S"]}),
}


@pytest.mark.parametrize("name", NEAR)
def test_near_misses_are_not_found(tmp_path: Path, name: str) -> None:
    near = NEAR[name](tmp_path)
    path, options = near if isinstance(near, tuple) else (near, {})
    assert codes(path, **{"select": ["S"], **options}) == []


def test_a_header_that_no_alpha_agrees_with(tmp_path: Path) -> None:
    path = edit(kohya_file(tmp_path), metadata={"ss_network_alpha": "16"})
    assert codes(path) == ["S409"]


def test_lost_alpha_names_the_way_out(tmp_path: Path) -> None:
    (finding,) = found(_without_config(tmp_path))
    assert "4 modules" in finding.message
    assert "--alpha" in finding.rule.remedy


def test_zero_alpha_in_a_config_is_told_of_the_config(tmp_path: Path) -> None:
    folder = set_config(peft_folder(tmp_path), lora_alpha=0)
    (finding,) = found(folder)
    assert (finding.code, finding.field) == ("S404", "lora_alpha")
    assert finding.file.endswith("adapter_config.json")


def test_peft_multiplies_by_a_zero_alpha(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=32,
    )
    folder = set_config(peft_folder(tmp_path), lora_alpha=0)
    model = PeftModel.from_pretrained(LlamaForCausalLM(config), str(folder))
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    assert layer.get_delta_weight("default").abs().max() == 0


def test_diffusers_takes_alpha_for_one_number() -> None:
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers

    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    state = {f"{stem}.lora_down.weight": torch.ones(4, 320), f"{stem}.lora_up.weight": torch.ones(320, 4)}
    with pytest.raises(RuntimeError):
        _convert_non_diffusers_lora_to_diffusers({**state, f"{stem}.alpha": torch.ones(4)})


@pytest.mark.parametrize(
    ("dtype", "stored", "meant"),
    [
        ("BF16", 0.10009765625, 0.1),
        ("F16", 0.0999755859375, 0.1),
        ("BF16", 0.125, None),
        ("BF16", 0.03125, None),
        ("BF16", 1.5, None),
        ("BF16", 181.0, None),
        ("F16", 22.625, None),
        ("BF16", 22.625, 22.6),
        ("F16", 0.0, None),
        ("F16", -1.3330078125, None),
    ],
)
def test_what_a_rounded_number_was(dtype: str, stored: float, meant: float | None) -> None:
    assert before_rounding(dtype, stored) == meant
