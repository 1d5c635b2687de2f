"""What loaders drop, misread or refuse: every rule on an adapter that meets it, and on adapters that do not.

Facts about diffusers and peft are tried on the libraries themselves: what a rule says of a file, loading it shows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from loader_files import MODULES, converted, diffusers_lora, mlx_folder, renamed, with_method
from safetensors.torch import load_file
from sound import CONFIG, Tensors, codes, edit, found, kohya_file, peft_folder, set_config

from adapterops.validation import registry
from adapterops.validation.options import TARGETS

Made = tuple[Path, str]
"""An adapter, and the loader that stumbles over it."""

_Q = "lora_unet_down_blocks_2_attentions_0_transformer_blocks_0_attn1_to_q"
_TO_Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
_TO_K = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
_CONV = "lora_unet_down_blocks_1_resnets_0_conv2"
_LLAMA = "base_model.model.model.layers.0.self_attn.q_proj"
_LOHA = dict.fromkeys((".hada_w1_a", ".hada_w2_a"), (1280, 4)) | dict.fromkeys((".hada_w1_b", ".hada_w2_b"), (4, 1280))
_LOKR = {".lokr_w1": (16, 16), ".lokr_w2_a": (80, 4), ".lokr_w2_b": (4, 80)}
_TUCKER = {".lora_down.weight": (4, 640, 1, 1), ".lora_mid.weight": (4, 4, 3, 3), ".lora_up.weight": (640, 4, 1, 1)}
_EMBEDDING = {"bundle_emb.ohwx.clip_l": (2, 768)}
_OFT = {".oft_blocks": (4, 320, 320)}


def _only_turned(tmp_path: Path) -> Path:
    """OFT of sd-scripts."""
    path = with_method(_kohya(tmp_path), "oft_unet_mid_block_attentions_0_proj_in", _OFT, 0.5)
    return edit(path, lambda t: {key: value for key, value in t.items() if key.startswith("oft_unet_")})


def _sparse(tmp_path: Path) -> Path:
    """What LyCORIS extracts with use_sparse_bias."""
    sparse = {
        "bias_indices": torch.tensor([[0, 7], [5, 8]]),
        "bias_values": torch.tensor([0.5, -0.25], dtype=torch.float16),
        "bias_size": torch.tensor([320, 320]),
    }
    return edit(_kohya(tmp_path), lambda t: t.update({f"{_TO_Q}.{role}": tensor for role, tensor in sparse.items()}))


def _kohya(tmp_path: Path) -> Path:
    """With the module by which diffusers knows how a text encoder's attention is spelled."""
    stem = "lora_te_text_model_encoder_layers_0_self_attn_out_proj"
    suffixes = {".lora_down.weight": (4, 768), ".lora_up.weight": (768, 4)}
    return with_method(kohya_file(tmp_path), stem, suffixes, 2.0)


def _with_loha(tmp_path: Path) -> Path:
    return with_method(_kohya(tmp_path), _Q, _LOHA, 2.0)


def _ia3(tmp_path: Path) -> Path:
    def add(tensors: Tensors) -> None:
        tensors[f"{_Q}.weight"] = torch.full((1280,), 0.25, dtype=torch.float16)
        tensors[f"{_Q}.on_input"] = torch.tensor(0.0, dtype=torch.float16)

    return edit(_kohya(tmp_path), add)


def _magnitude(*shape: int, stem: str = _TO_K) -> Callable[[Path], Path]:
    def make(tmp_path: Path) -> Path:
        def add(tensors: Tensors) -> None:
            tensors[f"{stem}.dora_scale"] = torch.linspace(0.9, 1.1, max(shape)).reshape(shape).to(torch.float16)

        return edit(_kohya(tmp_path), add)

    return make


def _other_alpha(tmp_path: Path) -> Path:
    return edit(_kohya(tmp_path), lambda t: t.update({f"{_TO_Q}.alpha": torch.tensor(1.0, dtype=torch.float16)}))


def _flux_extra(end: str, *shape: int) -> Callable[[Path], Path]:
    def make(tmp_path: Path) -> Path:
        path = diffusers_lora(tmp_path / "flux.safetensors", "flux")
        key = f"transformer.{MODULES['flux'][1]}{end}"
        return edit(path, lambda t: t.update({key: torch.linspace(0.9, 1.1, shape[0])}))

    return make


def _header_scale(tmp_path: Path) -> Path:
    path = diffusers_lora(tmp_path / "flux.safetensors", "flux")
    config = {"transformer.r": 4, "transformer.lora_alpha": 8, "transformer.target_modules": list(MODULES["flux"])}
    return edit(path, metadata={"lora_adapter_metadata": json.dumps(config)})


def _loha_folder(tmp_path: Path) -> Path:
    folder = peft_folder(tmp_path)

    def change(tensors: Tensors) -> Tensors:
        stem, out = _LLAMA, {}
        for at, end in enumerate(("w1_a", "w1_b", "w2_a", "w2_b")):
            shape = (64, 4) if end.endswith("a") else (4, 64)
            out[f"{stem}.hada_{end}"] = torch.randn(shape, generator=torch.Generator().manual_seed(at)) * 0.1
        return out

    edit(folder, change)
    config = {
        "peft_type": "LOHA", "r": 4, "alpha": 8, "rank_dropout": 0.0, "module_dropout": 0.0,
        "use_effective_conv2d": False, "target_modules": ["q_proj"], "layers_to_transform": [0], "init_weights": True,
        "alpha_pattern": {}, "rank_pattern": {},
    }  # fmt: skip
    kept = (
        "auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode", "layers_pattern",
        "modules_to_save", "peft_version", "revision", "task_type",
    )  # fmt: skip
    document = {name: CONFIG[name] for name in kept} | config
    (folder / "adapter_config.json").write_text(json.dumps(document, indent=2, sort_keys=True))
    return folder


def _bone(tmp_path: Path) -> Path:
    folder = peft_folder(tmp_path)
    edit(folder, lambda t: {f"{_LLAMA}.bone_block": torch.randn(4, 64, generator=torch.Generator().manual_seed(1))})
    kept = ("base_model_name_or_path", "exclude_modules", "inference_mode", "layers_pattern", "modules_to_save")
    config = {name: CONFIG[name] for name in (*kept, "auto_mapping", "revision", "task_type")}
    config |= {
        "peft_type": "BONE",
        "r": 4,
        "init_weights": True,
        "target_modules": ["q_proj"],
        "layers_to_transform": [0],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def _dora_folder(tmp_path: Path) -> Path:
    def add(tensors: Tensors) -> None:
        for key in [k for k in tensors if k.endswith("lora_B.weight")]:
            stem = key.removesuffix(".lora_B.weight")
            tensors[f"{stem}.lora_magnitude_vector"] = torch.linspace(0.9, 1.1, tensors[key].shape[0])

    return set_config(edit(peft_folder(tmp_path), add), use_dora=True)


def _saved_head(listed: bool) -> Callable[[Path], Path]:
    def make(tmp_path: Path) -> Path:
        folder = peft_folder(tmp_path)
        head = torch.randn(128, 64, generator=torch.Generator().manual_seed(8)) * 0.1
        edit(folder, lambda t: t.update({"base_model.model.lm_head.weight": head}))
        return set_config(folder, modules_to_save=["lm_head"] if listed else None)

    return make


def _patterns(tmp_path: Path) -> Path:
    return set_config(peft_folder(tmp_path), alpha_pattern={"q_proj": 4})


def _without(tmp_path: Path, part: str) -> Path:
    """A folder whose adapter leaves some modules alone."""
    folder = peft_folder(tmp_path)
    edit(folder, lambda t: {key: value for key, value in t.items() if part not in key})
    targets = sorted(
        {key.split(".lora_")[0].rpartition(".")[2] for key in load_file(folder / "adapter_model.safetensors")}
    )
    return set_config(folder, target_modules=targets)


def _with_head(tmp_path: Path) -> Path:
    """With a LoRA on the head."""
    generator = torch.Generator().manual_seed(9)
    pair = {
        f"base_model.model.lm_head.lora_{role}.weight": torch.randn(shape, generator=generator) * 0.1
        for role, shape in (("A", (4, 64)), ("B", (128, 4)))
    }
    folder = edit(peft_folder(tmp_path), lambda t: t.update(pair))
    return set_config(folder, target_modules=["q_proj", "v_proj", "lm_head"])


def _tied_head(tmp_path: Path) -> Path:
    """As peft saves factors on a head: with the base's own weight beside them."""
    weight = torch.randn((128, 64), generator=torch.Generator().manual_seed(10)) * 0.1
    return edit(_with_head(tmp_path), lambda t: t.update({"base_model.model.lm_head.base_layer.weight": weight}))


def _with_norm(tmp_path: Path) -> Path:
    """As mergekit's extraction saves the norms' differences: whole, and listed nowhere."""
    norm = {"base_model.model.model.layers.0.input_layernorm.weight": torch.linspace(0.9, 1.1, 64)}
    return edit(peft_folder(tmp_path), lambda t: t.update(norm))


def _rank_pattern(tmp_path: Path) -> Path:
    """q_proj with half the rank of v_proj, and one alpha."""

    def shrink(tensors: Tensors) -> Tensors:
        return {k: (v[:2] if "lora_A" in k else v[:, :2]) if "q_proj" in k else v for k, v in tensors.items()}

    return set_config(edit(peft_folder(tmp_path), shrink), rank_pattern={"q_proj": 2})


def _rank(rank: int) -> Callable[[Path], Path]:
    def make(tmp_path: Path) -> Path:
        def grow(tensors: Tensors) -> Tensors:
            out, width = {}, max(64, 2 * rank)
            for at, key in enumerate(tensors):
                shape = (rank, width) if "lora_A" in key else (width, rank)
                out[key] = torch.randn(shape, generator=torch.Generator().manual_seed(at)) * 0.05
            return out

        return set_config(edit(peft_folder(tmp_path), grow), r=rank, lora_alpha=2 * rank)

    return make


def _experts(tmp_path: Path) -> Path:
    """A LoRA on one parameter of a layer's experts, as peft saves it: 2 experts, 64 wide."""
    folder = peft_folder(tmp_path)
    stem = "base_model.model.model.layers.0.mlp.experts"

    def add(tensors: Tensors) -> None:
        tensors[f"{stem}.lora_A.weight"] = torch.randn(8, 64, generator=torch.Generator().manual_seed(5)) * 0.1
        tensors[f"{stem}.lora_B.weight"] = torch.randn(64, 8, generator=torch.Generator().manual_seed(6)) * 0.1

    return set_config(edit(folder, add), target_parameters=["mlp.experts.down_proj"], lora_dropout=0.0)


BROKEN: dict[str, Callable[[Path], Made]] = {
    "L501": lambda p: (_kohya(p), "peft"),
    "L502": lambda p: (_bone(p), "peft"),
    "L509": lambda p: (diffusers_lora(p / "pixart.safetensors", "pixart_sigma"), "diffusers"),
    "L510": lambda p: (converted(p, "sd3", "kohya"), "diffusers"),
    "L511": lambda p: (converted(p, "flux", "comfy"), "diffusers"),
    "L512": lambda p: (peft_folder(p), "diffusers"),
    "L513": lambda p: (converted(p, "flux", "lycoris"), "diffusers"),
    "L514": lambda p: (converted(p, "sd1", "diffusers-alpha", alpha=2.0), "diffusers"),
    "L516": lambda p: (converted(p, "flux", "kohya", "x_embedder"), "diffusers"),
    "L517": lambda p: (with_method(
        converted(p, "flux", "kohya"), "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
        {".lora_down.weight": (4, 4096), ".lora_up.weight": (4096, 4)}, 4.0,
    ), "diffusers"),
    "L518": lambda p: (renamed(converted(p, "sd1", "diffusers-attn"), "unet.", ""), "diffusers"),
    "L519": lambda p: (converted(p, "flux", "diffusers-down"), "diffusers"),
    "L520": lambda p: (_magnitude(1, 768)(p), "diffusers"),
    "L521": lambda p: (_other_alpha(p), "diffusers"),
    "L522": lambda p: (_with_loha(p), "diffusers"),
    "L523": lambda p: (with_method(_kohya(p), _Q, _LOKR, 2.0), "diffusers"),
    "L524": lambda p: (with_method(_kohya(p), _CONV, _TUCKER, 2.0), "diffusers"),
    "L525": lambda p: (_ia3(p), "diffusers"),
    "L526": lambda p: (with_method(_kohya(p), _Q, {".diff": (1280, 1280)}), "diffusers"),
    "L527": lambda p: (with_method(_kohya(p), "", _EMBEDDING), "diffusers"),
    "L528": lambda p: (kohya_file(p), "diffusers"),
    "L529": lambda p: (converted(p, "flux", "onetrainer"), "diffusers"),
    "L580": lambda p: (converted(p, "flux", "onetrainer-original", alpha=2.0), "diffusers"),
    "L581": lambda p: (converted(p, "z_image", "kohya", "all_x_embedder.2-1"), "diffusers"),
    "L582": lambda p: (converted(p, "flux2_klein_4b", "bfl-peft", "norm_out.linear"), "diffusers"),
    "L583": lambda p: (converted(p, "chroma", "kohya", "distilled_guidance_layer.in_proj"), "diffusers"),
    "L584": lambda p: (converted(p, "wan_1_3b", "kohya"), "diffusers"),
    "L585": lambda p: (converted(p, "sd1", "diffusers-lycoris"), "diffusers"),
    "L586": lambda p: (converted(p, "flux", "diffusers-lycoris", alpha=2.0), "diffusers"),
    "L587": lambda p: (converted(p, "qwen_image", "diffsynth"), "diffusers"),
    "L588": lambda p: (with_method(
        diffusers_lora(p / "sd3.safetensors", "sd3"), "text_encoder_3.encoder.block.0.layer.0.SelfAttention.q",
        {".lora_A.weight": (4, 4096), ".lora_B.weight": (4096, 4)},
    ), "diffusers"),
    "L589": lambda p: (converted(p, "sd1", "diffusers-mixed", "down_blocks.0.attentions.0.proj_in"), "diffusers"),
    "L531": lambda p: (_flux_extra(".lora_magnitude_vector", 3072)(p), "comfy"),
    "L532": lambda p: (_magnitude(320)(p), "comfy"),
    "L533": lambda p: (_magnitude(320, 1)(p), "comfy"),
    "L534": lambda p: (peft_folder(p), "comfy"),
    "L535": lambda p: (diffusers_lora(p / "sd1.safetensors", "sd1"), "comfy"),
    "L536": lambda p: (converted(p, "flux", "bfl-peft"), "comfy"),
    "L537": lambda p: (_ia3(p), "comfy"),
    "L538": lambda p: (with_method(_kohya(p), "", _EMBEDDING), "comfy"),
    "L539": lambda p: (_flux_extra(".lora_B.bias", 3072)(p), "comfy"),
    "L540": lambda p: (with_method(_kohya(p), _Q, _OFT, 0.5), "comfy"),
    "L541": lambda p: (with_method(_kohya(p), _Q, {**_OFT, ".rescale": (1280, 1)}, 0.0), "comfy"),
    "L542": lambda p: (with_method(_kohya(p), _Q, {".oft_blocks": (2, 4, 320, 320)}), "comfy"),
    "L543": lambda p: (with_method(_kohya(p), _Q, {".oft_R.weight": (40, 496)}), "comfy"),
    "L544": lambda p: (_only_turned(p), "comfy"),
    "L555": lambda p: (with_method(_kohya(p), _TO_Q, {".diff": (320, 320)}), "comfy"),
    "L556": lambda p: (converted(p, "hunyuan_video_1_5", "comfy"), "comfy"),
    "L557": lambda p: (_sparse(p), "comfy"),
    "L545": lambda p: (_kohya(p), "vllm"),
    "L547": lambda p: (_loha_folder(p), "vllm"),
    "L548": lambda p: (_dora_folder(p), "vllm"),
    "L549": lambda p: (_saved_head(True)(p), "vllm"),
    "L551": lambda p: (_patterns(p), "vllm"),
    "L552": lambda p: (_rank(32)(p), "vllm"),
    "L553": lambda p: (_rank(640)(p), "vllm"),
    "L558": lambda p: (_kohya(p), "sglang"),
    "L559": lambda p: (_loha_folder(p), "sglang"),
    "L564": lambda p: (_dora_folder(p), "sglang"),
    "L565": lambda p: (set_config(peft_folder(p), target_modules=".*(q_proj|v_proj)"), "sglang"),
    "L566": lambda p: (set_config(peft_folder(p), use_rslora=True), "sglang"),
    "L568": lambda p: (_without(p, ".v_proj."), "sglang"),
    "L569": lambda p: (_saved_head(True)(p), "sglang"),
    "L560": lambda p: (peft_folder(p), "mlx"),
    "L570": lambda p: (_kohya(p), "gguf"),
    "L572": lambda p: (_loha_folder(p), "gguf"),
    "L574": lambda p: (_patterns(p), "gguf"),
    "L575": lambda p: (_dora_folder(p), "gguf"),
    "L576": lambda p: (_saved_head(True)(p), "gguf"),
    "L578": lambda p: (_with_head(p), "gguf"),
}  # fmt: skip

# What other rules speak of, too, whoever loads it: an adapter that this package does not convert, a head that is saved and
# not listed, parameters that are not told apart by their keys.
WITH_OTHERS: dict[str, Callable[[Path], Made]] = {
    "L515": lambda p: (renamed(_kohya(p), _TO_Q, "lora_unet_blocks_0_self_attn_q_proj"), "diffusers"),
    "L530": lambda p: (_header_scale(p), "comfy"),
    "L550": lambda p: (_saved_head(False)(p), "vllm"),
    "L554": lambda p: (_experts(p), "vllm"),
    "L567": lambda p: (set_config(_rank_pattern(p), alpha_pattern={"q_proj": 4}), "sglang"),
    "L577": lambda p: (_with_norm(p), "gguf"),
    "L561": lambda p: (_only(mlx_folder(p), "0000100_adapters.safetensors"), "mlx"),
    "L562": lambda p: (mlx_folder(p, lora_parameters={"rank": 4}), "mlx"),
    "L563": lambda p: (mlx_folder(p, layers=(0, 1, 2, 3)), "mlx"),
}


def _only(path: Path, name: str) -> Path:
    return path.rename(path.with_name(name))


@pytest.mark.parametrize("code", BROKEN)
def test_a_broken_adapter_is_found_exactly(tmp_path: Path, code: str) -> None:
    path, target = BROKEN[code](tmp_path)
    assert codes(path, targets=[target]) == [code]
    assert codes(path) == []  # nobody asked for the loader


@pytest.mark.parametrize(("target", "code"), [("vllm", "L548"), ("sglang", "L564")])
def test_magnitudes_are_found_where_the_config_says_nothing_of_them(tmp_path: Path, target: str, code: str) -> None:
    """peft itself speaks of them, too (C233)."""
    path = set_config(_dora_folder(tmp_path), use_dora=False)
    assert codes(path, targets=[target]) == ["C233", code]


def test_llama_cpp_skips_the_norms_of_its_own_files(tmp_path: Path) -> None:
    """As its converter writes what mergekit extracted."""
    path = tmp_path / "adapter.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 8.0)
    for name, shape in (
        ("attn_q.weight.lora_a", (4, 64)),
        ("attn_q.weight.lora_b", (64, 4)),
        ("attn_norm.weight", (64,)),
    ):
        writer.add_tensor(f"blk.0.{name}", np.linspace(0.1, 1.1, math.prod(shape), dtype=np.float32).reshape(shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (finding,) = found(path, targets=["gguf"], select=["L"])
    assert (finding.code, finding.where) == ("L577", ("blk.0.attn_norm.weight",))


def test_sglang_leaves_out_both_factors_of_a_module_that_it_does_not_look_for(tmp_path: Path) -> None:
    """Of GPT-2's blocks, as an example, which are numbered under `h`."""
    folder = peft_folder(tmp_path)
    edit(folder, lambda t: {key.replace(".model.layers.", ".transformer.h."): value for key, value in t.items()})
    (finding,) = found(folder, targets=["sglang"], select=["L569"])
    assert set(finding.where) == set(load_file(folder / "adapter_model.safetensors"))


@pytest.mark.parametrize("code", WITH_OTHERS)
def test_a_broken_adapter_is_found_among_what_other_rules_say(tmp_path: Path, code: str) -> None:
    path, target = WITH_OTHERS[code](tmp_path)
    assert [c for c in codes(path, targets=[target]) if c.startswith("L")] == [code]
    assert not [c for c in codes(path) if c.startswith("L")]


def test_every_rule_has_its_broken_adapter() -> None:
    own = {rule.code for rule in registry.rules() if rule.code.startswith("L") and not rule.code.startswith("L59")}
    assert own == BROKEN.keys() | WITH_OTHERS.keys()


def test_every_rule_says_where_its_fact_stands() -> None:
    for rule in registry.rules():
        if rule.code.startswith("L") and not rule.code.startswith("L59"):
            assert rule.source, rule.code
            assert rule.name.split("-")[0] in TARGETS, rule.name


def _wan_biases(tmp_path: Path) -> Path:
    """As distillations of Wan are published: a difference of the bias beside the factors, and the head's weight whole."""
    path = converted(tmp_path, "wan_1_3b", "comfy")
    path = edit(path, lambda t: {key: value for key, value in t.items() if not key.endswith(".alpha")})
    path = with_method(path, "diffusion_model.blocks.0.self_attn.q", {".diff_b": (1536,)})
    return with_method(path, "diffusion_model.head.head", {".diff": (64, 1536), ".diff_b": (64,)})


def _attention_only(path: Path) -> Path:
    return edit(path, lambda tensors: {key: value for key, value in tensors.items() if "_attn_" in key})


SOUND: dict[str, Callable[[Path], tuple[Path, tuple[str, ...]]]] = {
    "kohya sd1": lambda p: (_kohya(p), ("diffusers", "comfy")),
    "kohya sdxl": lambda p: (converted(p, "sdxl", "kohya"), ("diffusers", "comfy")),
    "kohya-diffusers sdxl": lambda p: (converted(p, "sdxl", "kohya-diffusers"), ("diffusers", "comfy")),
    "kohya flux": lambda p: (converted(p, "flux", "kohya"), ("diffusers", "comfy")),
    "kohya qwen": lambda p: (converted(p, "qwen_image", "kohya"), ("diffusers", "comfy")),
    "kohya sd3": lambda p: (converted(p, "sd3", "kohya"), ("comfy",)),
    "kohya sd35": lambda p: (converted(p, "sd35_medium", "kohya"), ("comfy",)),
    "comfy-down flux": lambda p: (converted(p, "flux", "comfy-down"), ("diffusers", "comfy")),
    "comfy qwen": lambda p: (converted(p, "qwen_image", "comfy"), ("diffusers", "comfy")),
    "kohya flux2": lambda p: (converted(p, "flux2_klein_4b", "kohya"), ("diffusers", "comfy")),
    "fal flux2": lambda p: (converted(p, "flux2_klein_4b", "bfl-peft"), ("diffusers",)),
    "diffusers flux2": lambda p: (diffusers_lora(p / "a.safetensors", "flux2_klein_4b"), ("diffusers",)),
    "diffusers hunyuan": lambda p: (diffusers_lora(p / "a.safetensors", "hunyuan_video", alpha=4.0), ("diffusers",)),
    "diffusers ltx": lambda p: (diffusers_lora(p / "a.safetensors", "ltx_2b"), ("diffusers",)),
    "comfy wan": lambda p: (converted(p, "wan_1_3b", "comfy", alpha=2.0), ("diffusers", "comfy")),
    "comfy wan, biases": lambda p: (_wan_biases(p), ("diffusers", "comfy")),
    "comfy-diffusers z": lambda p: (converted(p, "z_image", "comfy-diffusers", alpha=2.0), ("diffusers",)),
    "onetrainer flux": lambda p: (_attention_only(converted(p, "flux", "onetrainer")), ("diffusers", "comfy")),
    "diffusers flux": lambda p: (diffusers_lora(p / "a.safetensors", "flux"), ("diffusers", "comfy")),
    "diffusers flux alpha": lambda p: (converted(p, "flux", "diffusers-alpha", alpha=2.0), ("diffusers", "comfy")),
    "diffusers sd1": lambda p: (diffusers_lora(p / "a.safetensors", "sd1"), ("diffusers",)),
    "diffusers sd1 header": lambda p: (diffusers_lora(p / "a.safetensors", "sd1", alpha=4.0), ("diffusers",)),
    "diffusers sd3": lambda p: (diffusers_lora(p / "a.safetensors", "sd3"), ("diffusers", "comfy")),
    "diffusers sd35": lambda p: (diffusers_lora(p / "a.safetensors", "sd35_medium"), ("diffusers", "comfy")),
    "processors sd1": lambda p: (converted(p, "sd1", "diffusers-attn"), ("diffusers", "comfy")),
    "loha": lambda p: (_with_loha(p), ("comfy",)),
    "dora per input": lambda p: (_magnitude(1, 768)(p), ("comfy",)),
    "oft": lambda p: (with_method(_kohya(p), _Q, _OFT, 0.0), ("comfy",)),
    "boft": lambda p: (with_method(_kohya(p), _Q, {".oft_blocks": (2, 4, 320, 320)}, 0.0), ("comfy",)),
    "comfy's hunyuan 1.5": lambda p: (converted(p, "hunyuan_video_1_5", "comfy-hunyuan"), ("comfy",)),
    "tucker": lambda p: (with_method(_kohya(p), _CONV, _TUCKER, 2.0), ("comfy",)),
    "peft": lambda p: (peft_folder(p), ("peft", "vllm", "sglang", "gguf")),
    "k_proj absent": lambda p: (_without(p, ".k_proj."), ("sglang",)),
    "tied head": lambda p: (_tied_head(p), ("vllm", "sglang")),
    "rslora": lambda p: (set_config(peft_folder(p), use_rslora=True), ("peft", "vllm")),
    "rank pattern": lambda p: (_rank_pattern(p), ("peft", "gguf")),
    "rank 16": lambda p: (_rank(16)(p), ("vllm",)),
    "dora": lambda p: (_dora_folder(p), ("peft",)),
    "head": lambda p: (_saved_head(True)(p), ("peft",)),
}


@pytest.mark.parametrize("name", SOUND)
def test_what_a_loader_reads_is_not_found(tmp_path: Path, name: str) -> None:
    path, targets = SOUND[name](tmp_path)
    assert codes(path, targets=targets) == []


def test_an_mlx_adapter_is_sound_for_mlx(tmp_path: Path) -> None:
    assert not [c for c in codes(mlx_folder(tmp_path), targets=["mlx"]) if c.startswith("L")]
    assert not [c for c in codes(mlx_folder(tmp_path / "..", num_layers=-1), targets=["mlx"]) if c.startswith("L")]


def test_a_convolutions_own_alpha_is_read_by_diffusers(tmp_path: Path) -> None:
    """Only the attention's projections lose their own alpha."""
    suffixes = {".lora_down.weight": (2, 640, 3, 3), ".lora_up.weight": (640, 2, 1, 1)}
    path = with_method(_kohya(tmp_path), _CONV, suffixes, 1.0)
    assert codes(path, targets=["diffusers"]) == []
    assert _loaded(path) == set()


def test_a_finding_names_the_tensors(tmp_path: Path) -> None:
    path, target = BROKEN["L521"](tmp_path)
    (finding,) = found(path, targets=[target])
    assert finding.where == (f"{_TO_Q}.lora_down.weight",)
    assert finding.file == str(path)


DIFFUSERS = [code for code in BROKEN if ("L510" <= code <= "L529" and code != "L512") or "L580" <= code <= "L589"]


@pytest.mark.parametrize("code", DIFFUSERS)
def test_diffusers_does_what_the_rule_says(tmp_path: Path, code: str) -> None:
    """Loading the file shows tensors that come to nothing, another scale, or an error."""
    pytest.importorskip("diffusers")
    path = BROKEN[code](tmp_path)[0]
    if path.is_dir():
        path = path / "adapter_model.safetensors"
    shown = _loaded(path)
    assert shown & {"L590", "L591", "L592", "L594"}, shown
    if code in ("L521", "L586"):
        assert shown == {"L591"}
    if code == "L582":
        assert shown == {"L594"}


@pytest.mark.parametrize("name", [name for name, make in SOUND.items() if "peft" not in name])
def test_diffusers_reads_what_no_rule_finds(tmp_path: Path, name: str) -> None:
    pytest.importorskip("diffusers")
    path, targets = SOUND[name](tmp_path)
    if "diffusers" in targets:
        assert _loaded(path) == set()


def test_diffusers_leaves_out_pefts_names(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    path = renamed(diffusers_lora(tmp_path / "a.safetensors", "sd1"), "unet.", "base_model.model.")
    assert "L512" in codes(path, targets=["diffusers"])
    assert _loaded(path) == {"L590"}


def _loaded(path: Path, **options: Any) -> set[str]:
    return set(codes(path, targets=["diffusers"], load_test=True, select=["L59"], **options))


def test_peft_refuses_bone(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    with pytest.raises(KeyError):
        peft.PeftConfig.from_pretrained(str(_bone(tmp_path)))
