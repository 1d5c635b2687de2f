"""The authors' own names of fused and reordered weights, against diffusers' conversion of their checkpoints."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from adapterops import architectures
from adapterops.architectures import Component, load
from adapterops.architectures.table import ModuleSpec, _component, _read, _templates

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

_SUFFIX = re.compile(r"\.(lora_(?:A|B|down|up)\.weight|lora_B\.bias|alpha|lokr_w[12]|scale)$")
_PREFIX = re.compile(r"^(transformer|diffusion_model|base_model\.model)\.")


def small(name: str, **numbers: int | list[int]) -> Component:
    """The transformer's rows written out for fewer layers, as `--base` writes them."""
    document = _read(str(files(architectures) / f"{name}.toml"))
    table = document["components"]["transformer"]
    return _component("transformer", table, _templates(document), {**table["config"], **numbers})


def numbered(component: Component) -> tuple[dict[str, Any], dict[str, Any]]:
    """A checkpoint under the authors' names, every row a number of its own, and what `joins` makes of it.

    Weights have shape (out, 1): no conversion touches the inputs.
    """
    checkpoint: dict[str, Any] = {}
    expected: dict[str, Any] = {}
    count = 0
    for spec in (*component.modules.values(), *(s for s in component.fused.values() if not s.partial)):
        if not spec.original:
            continue
        for parameter in spec.params:
            rows = torch.arange(count, count + spec.shape[0])
            count += spec.shape[0]
            tensor = rows[:, None] if parameter == "weight" and len(spec.shape) > 1 else rows
            checkpoint[f"{spec.original}.{parameter}"] = tensor
            at = 0
            for part, start, stop in spec.joins or ((spec.name, 0, spec.shape[0]),):
                whole = torch.full((component.modules[part].shape[0], *tensor.shape[1:]), -1)
                target = expected.setdefault(f"{part}.{parameter}", whole)
                target[start:stop] = tensor[at : at + stop - start]
                at += stop - start
    return checkpoint, expected


def convert(name: str, checkpoint: dict[str, Any]) -> dict[str, Any]:
    conversion: Any = importlib.import_module("diffusers.loaders.single_file_utils")
    converted: dict[str, Any] = getattr(conversion, f"convert_{name}_transformer_checkpoint_to_diffusers")(checkpoint)
    return converted


def differences(converted: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """The keys that only one has, and those whose rows differ."""
    wrong = set(converted) ^ set(expected)
    wrong |= {key for key in set(converted) & set(expected) if not torch.equal(converted[key], expected[key])}
    return sorted(wrong)


def flux() -> tuple[Component, dict[str, Any], dict[str, Any]]:
    # The width stays: diffusers' conversion splits `linear1` at 3072.
    component = small("flux", num_layers=2, num_single_layers=3)
    checkpoint, expected = numbered(component)
    norms = [key for key in checkpoint if key.endswith("_norm.weight")]
    renamed = {key.removesuffix("weight") + "scale": checkpoint.pop(key) for key in norms}
    return component, checkpoint | renamed, expected


def test_diffusers_converts_flux_as_the_rows_say() -> None:
    component, checkpoint, expected = flux()
    converted = convert("flux", checkpoint)
    assert not checkpoint, "diffusers does not know these names"
    assert differences(converted, expected) == []
    assert {key.rpartition(".")[0] for key in converted} == set(component.modules)


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("sd3", {}),
        ("sd35_large", {}),
        ("sd35_medium", {"dual_attention_layers": [0]}),
        ("sd35_medium", {"dual_attention_layers": [0, 1, 2]}),
    ],
)
def test_diffusers_converts_sd3_as_the_rows_say(name: str, numbers: dict[str, list[int]]) -> None:
    component = small(name, num_layers=3, **numbers)
    checkpoint, expected = numbered(component)
    # A buffer, which is no module of its own.
    checkpoint["pos_embed"] = torch.arange(4)
    expected["pos_embed.pos_embed"] = torch.arange(4)
    converted = convert("sd3", checkpoint)
    assert not checkpoint, "diffusers does not know these names"
    assert differences(converted, expected) == []


@pytest.mark.parametrize("name", ["wan_14b", "wan_14b_i2v"])
def test_diffusers_converts_wan_as_the_rows_say(name: str) -> None:
    component = small(name, num_layers=2)
    checkpoint, expected = numbered(component)
    for spec in component.parameters.values():
        checkpoint[spec.original] = expected[spec.name] = torch.tensor([len(expected)])
    conversion: Any = importlib.import_module("diffusers.loaders.single_file_utils")
    assert differences(conversion.convert_wan_transformer_to_diffusers(checkpoint), expected) == []
    assert not checkpoint


def test_diffusers_converts_z_image_as_the_rows_say() -> None:
    component = small("z_image", n_layers=2)
    checkpoint, expected = numbered(component)
    for spec in component.parameters.values():
        checkpoint[spec.original] = expected[spec.name] = torch.tensor([len(expected)])
    assert differences(convert("z_image", checkpoint), expected) == []
    assert not checkpoint


@pytest.mark.parametrize("name", ["flux2_dev", "flux2_klein_4b"])
def test_diffusers_converts_flux_2_as_the_rows_say(name: str) -> None:
    component = small(name, num_layers=2, num_single_layers=2)
    checkpoint, expected = numbered(component)
    assert differences(convert("flux2", checkpoint), expected) == []
    assert not checkpoint
    assert {key.rpartition(".")[0] for key in expected} == set(component.modules)


@pytest.mark.parametrize("name", ["hunyuan_video", "ltx_2b", "ltx_13b", "ltx_2"])
def test_diffusers_converts_hunyuan_video_and_ltx_as_the_rows_say(name: str) -> None:
    # HunyuanVideo's width stays: diffusers' conversion splits `linear1` at 3072.
    more = {"num_single_layers": 2} if name == "hunyuan_video" else {}
    component = small(name, num_layers=2, **more)
    checkpoint, expected = numbered(component)
    for spec in component.parameters.values():
        checkpoint[spec.original] = expected[spec.name] = torch.tensor([len(expected)])
    conversion: Any = importlib.import_module("diffusers.loaders.single_file_utils")
    convert_checkpoint = {
        "hunyuan_video": conversion.convert_hunyuan_video_transformer_to_diffusers,
        "ltx_2": conversion.convert_ltx2_transformer_to_diffusers,
    }.get(name, conversion.convert_ltx_transformer_checkpoint_to_diffusers)
    assert differences(convert_checkpoint(checkpoint), expected) == []


def test_diffusers_converts_anima_as_the_rows_say() -> None:
    component = small("anima", num_layers=2)
    checkpoint, expected = numbered(component)
    assert differences(convert("cosmos", {f"net.{key}": rows for key, rows in checkpoint.items()}), expected) == []


def test_diffusers_converts_ltx_2_3_as_the_rows_say() -> None:
    """By its conversion of adapters: that of checkpoints leaves what 2.3 has besides as it is."""
    component = small("ltx_2_3", num_layers=2)
    checkpoint, expected = numbered(component)
    for spec in component.parameters.values():
        checkpoint[spec.original] = expected[spec.name] = torch.tensor([len(expected)])
    conversion: Any = importlib.import_module("diffusers.loaders.lora_conversion_utils")
    converted = conversion._convert_non_diffusers_ltx2_lora_to_diffusers(
        {f"diffusion_model.{key}": rows for key, rows in checkpoint.items()}
    )
    assert differences(converted, {f"transformer.{key}": rows for key, rows in expected.items()}) == []


def test_diffusers_converts_krea_2_as_the_rows_say() -> None:
    component = small("krea2", num_layers=2)
    checkpoint, expected = numbered(component)
    norms = [key for key in checkpoint if "norm" in key or key.startswith("txtmlp.0.")]
    checkpoint |= {key.removesuffix("weight") + "scale": checkpoint.pop(key) for key in norms}
    for spec in component.parameters.values():
        # A block's table is flattened in the checkpoint.
        checkpoint[spec.original] = torch.arange(12)
        expected[spec.name] = torch.arange(12).reshape(6, 2) if spec.shape[0] == 6 else torch.arange(12)
    assert differences(convert("krea2", checkpoint), expected) == []
    assert not checkpoint


def test_diffusers_converts_ideogram_4_as_the_rows_say() -> None:
    """By its conversion of adapters, which knows the linear layers of blocks; it has none of checkpoints."""

    def linear(rows: dict[str, Any]) -> dict[str, Any]:
        every = {key.removesuffix(".weight"): own for key, own in rows.items() if key.endswith(".weight")}
        return {key: own for key, own in every.items() if key.startswith("layers.") and "norm" not in key}

    checkpoint, expected = (linear(rows) for rows in numbered(small("ideogram4", num_layers=2)))
    adapter = {f"diffusion_model.{key}.lora_B.weight": rows for key, rows in checkpoint.items()}
    adapter |= {f"diffusion_model.{key}.lora_A.weight": torch.ones(1, 1) for key in checkpoint}
    conversion: Any = importlib.import_module("diffusers.loaders.lora_conversion_utils")
    converted = conversion._convert_non_diffusers_ideogram4_lora_to_diffusers(adapter)
    made = {key.removesuffix(".lora_B.weight"): rows.long() for key, rows in converted.items() if ".lora_B." in key}
    assert len(expected) == 2 * 8
    assert differences(made, {f"transformer.{key}": rows for key, rows in expected.items()}) == []


def test_diffusers_converts_flux_3_as_the_rows_say() -> None:
    component = small("flux3_klein", num_layers=2, num_single_layers=2)
    checkpoint, expected = numbered(component)
    norms = [key for key in checkpoint if "_norm." in key]
    checkpoint |= {key.removesuffix("weight") + "scale": checkpoint.pop(key) for key in norms}
    assert differences(convert("flux3", checkpoint), expected) == []
    assert not checkpoint
    assert {key.rpartition(".")[0] for key in expected} == set(component.modules)


def test_diffusers_converts_qwen_image_2_1_as_the_rows_say() -> None:
    component = small("qwen_image_2_1", num_layers=2)
    checkpoint, expected = numbered(component)
    assert differences(convert("qwen_image21", checkpoint), expected) == []
    assert not checkpoint
    assert {key.rpartition(".")[0] for key in expected} == set(component.modules)


def test_diffusers_converts_minimax_h3_as_the_rows_say() -> None:
    component = small("minimax_h3", num_layers=2)
    checkpoint, expected = numbered(component)
    conversion: Any = importlib.import_module("diffusers.loaders.single_file_utils")
    converted = conversion.convert_minimax_h3_transformer_checkpoint_to_diffusers(checkpoint, component.config)
    assert differences(converted, expected) == []
    assert not checkpoint
    assert {key.rpartition(".")[0] for key in expected} == set(component.modules)


def test_hunyuan_dits_rows_are_those_of_diffusers_script() -> None:
    """Spot checks against huggingface/diffusers `scripts/convert_hunyuandit_to_diffusers.py`, which no package has."""
    component = load("hunyuan_dit").components["transformer"]
    originals = {spec.original: spec for spec in (*component.modules.values(), *component.fused.values())}
    assert originals["blocks.0.attn1.Wqkv"].joins == tuple((f"blocks.0.attn1.to_{p}", 0, 1408) for p in "qkv")
    assert originals["blocks.39.attn2.kv_proj"].joins == tuple((f"blocks.39.attn2.to_{p}", 0, 1408) for p in "kv")
    assert originals["blocks.7.norm2"].name == "blocks.7.norm3"
    assert originals["blocks.7.norm3"].name == "blocks.7.norm2"
    assert originals["blocks.7.default_modulation.1"].name == "blocks.7.norm1.linear"
    assert originals["final_layer.adaLN_modulation.1"].joins == (
        ("norm_out.linear", 1408, 2816),
        ("norm_out.linear", 0, 1408),
    )
    assert {"blocks.21.skip_linear", "blocks.39.skip_linear"} <= originals.keys()
    assert "blocks.20.skip_linear" not in originals


def test_diffusers_converts_auraflow_as_the_rows_say() -> None:
    component = small("auraflow", num_mmdit_layers=2, num_single_dit_layers=2)
    checkpoint, expected = numbered(component)
    for spec in component.parameters.values():
        checkpoint[spec.original] = expected[spec.name] = torch.tensor([len(expected)])
    assert differences(convert("auraflow", checkpoint), expected) == []
    assert not checkpoint


def test_diffusers_converts_mochi_as_the_rows_say() -> None:
    # Its conversion knows the published number of blocks only.
    component = load("mochi").components["transformer"]
    checkpoint, expected = numbered(component)
    for spec in component.parameters.values():
        checkpoint[spec.original] = expected[spec.name] = torch.tensor([len(expected)])
    assert differences(convert("mochi", checkpoint), expected) == []
    assert not checkpoint
    assert {key.rpartition(".")[0] for key in expected} - {""} == set(component.modules)


def test_diffusers_converts_lumina_2_as_the_rows_say() -> None:
    component = small("lumina2", num_layers=2)
    checkpoint, expected = numbered(component)
    conversion: Any = importlib.import_module("diffusers.loaders.single_file_utils")
    assert differences(conversion.convert_lumina2_to_diffusers(checkpoint), expected) == []
    assert not checkpoint
    assert {key.rpartition(".")[0] for key in expected} == set(component.modules)


def test_diffusers_converts_chroma_as_the_rows_say() -> None:
    component = small("chroma", num_layers=2, num_single_layers=2, approximator_layers=2)
    checkpoint, expected = numbered(component)
    norms = [key for key in checkpoint if ".norm" in key]
    checkpoint |= {key.removesuffix("weight") + "scale": checkpoint.pop(key) for key in norms}
    assert differences(convert("chroma", checkpoint), expected) == []
    assert not checkpoint
    assert {key.rpartition(".")[0] for key in expected} == set(component.modules)


@pytest.mark.parametrize("swap", ["norm_out.linear_swapped", "single_transformer_blocks.1.attn.to_qkv_mlp"])
def test_another_order_of_the_pieces_is_told(swap: str) -> None:
    """The comparison above sees a table that joins the right pieces in the wrong order."""
    component, _, _ = flux()
    first, second, *rest = component.fused[swap].joins
    turned = component.fused[swap]._replace(joins=(second, first, *rest))
    wrong = replace(component, fused={**component.fused, swap: turned})
    checkpoint, expected = numbered(wrong)
    checkpoint = {k.replace("_norm.weight", "_norm.scale"): v for k, v in checkpoint.items()}
    parts = {part for part, _, _ in turned.joins[:2]}
    told = {f"{part}.{parameter}" for part in parts for parameter in ("weight", "bias")}
    assert set(differences(convert("flux", checkpoint), expected)) == told


def test_original_names_seen_in_published_files() -> None:
    """Spot checks against names in black-forest-labs/flux and Stability-AI/sd3-ref, independent of diffusers."""
    component = load("flux").components["transformer"]
    originals = {spec.original: spec for spec in (*component.modules.values(), *component.fused.values())}
    assert originals["double_blocks.18.img_attn.qkv"].name == "transformer_blocks.18.attn.to_qkv"
    assert originals["single_blocks.37.linear1"].shape == (21504, 3072)
    assert originals["single_blocks.37.linear2"].shape == (3072, 15360)
    assert originals["final_layer.linear"].shape == (64, 3072)
    assert originals["img_in"].widens
    assert not any(spec.widens for name, spec in originals.items() if name != "img_in")
    last = load("sd3").components["transformer"].spec("transformer_blocks.23.norm1_context.linear_swapped")
    assert last is not None
    assert last.original == "joint_blocks.23.context_block.adaLN_modulation.1"
    large = load("sd35_large").components["transformer"].spec("transformer_blocks.37.attn.to_added_qkv")
    assert large is not None
    assert (large.original, large.shape) == ("joint_blocks.37.context_block.attn.qkv", (7296, 2432))
    component = load("sd35_medium").components["transformer"]
    originals = {spec.original: spec for spec in (*component.modules.values(), *component.fused.values())}
    assert originals["joint_blocks.12.x_block.attn2.qkv"].name == "transformer_blocks.12.attn2.to_qkv"
    assert originals["joint_blocks.12.x_block.adaLN_modulation.1"].shape == (13824, 1536)
    assert originals["joint_blocks.13.x_block.adaLN_modulation.1"].shape == (9216, 1536)
    assert originals["joint_blocks.23.context_block.attn.ln_k"].shape == (64,)
    assert "joint_blocks.13.x_block.attn2.qkv" not in originals


SKELETONS = {
    "invokeai-flux_control_lora_format": "flux",
    "invokeai-flux_lokr_bfl_format": "flux",
    "invokeai-flux_lora_aitoolkit_format": "flux",
    "invokeai-flux_lora_diffusers_base_model_format": "flux",
    "invokeai-flux_lora_diffusers_format": "flux",
    "invokeai-flux_lora_kohya_format": "flux",
    "invokeai-qwen_image_lora_diffusers_format": "qwen_image",
    "invokeai-qwen_image_lora_kohya_format": "qwen_image",
}


@pytest.mark.parametrize(("skeleton", "name"), SKELETONS.items())
def test_published_adapters_name_our_modules_and_have_their_sizes(skeleton: str, name: str, corpus: Path) -> None:
    path = corpus / "skeletons" / f"{skeleton}.json"
    if not path.is_file():
        pytest.skip(f"{skeleton} is not in this copy of the corpus")
    spellings = _spellings(load(name).components)
    sized = 0
    for key, tensor in json.loads(path.read_text())["tensors"].items():
        match = _SUFFIX.search(key)
        assert match, key
        spec = spellings[_PREFIX.sub("", key[: match.start()])]
        shape = tensor["shape"]
        if match[1] in ("lora_B.weight", "lora_up.weight"):
            assert shape[0] == spec.shape[0], key
        elif match[1] in ("lora_A.weight", "lora_down.weight"):
            assert shape[1] == spec.shape[1] or (spec.widens and shape[1] > spec.shape[1]), key
        else:
            continue
        sized += 1
    assert sized or "lokr" in path.read_text()


def _spellings(components: Mapping[str, Component]) -> dict[str, ModuleSpec]:
    """Every module by its canonical name, the authors', and Kohya's flat spelling of the latter."""
    transformer = components["transformer"]
    every = [*transformer.modules.values(), *transformer.fused.values()]
    out = {name: spec for spec in every for name in (spec.name, spec.original)}
    out |= {"lora_unet_" + spec.original.replace(".", "_"): spec for spec in every if spec.original}
    encoder = components.get("text_encoder")
    for spec in encoder.modules.values() if encoder else ():
        out["lora_te1_" + spec.name.replace(".", "_")] = spec
    return out
