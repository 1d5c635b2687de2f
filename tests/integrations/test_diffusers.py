"""Adapters in diffusers pipelines, against the same change fused into the weights by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import tiny
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

import adapterops as ao
from adapterops.integrations.diffusers import load_into

FORMATS = [(kind, form) for kind in tiny.KINDS for form in tiny.WRITERS if (kind, form) != ("flux", "kohya")]


@pytest.mark.parametrize(("kind", "form"), FORMATS)
def test_outputs_are_those_of_fused_weights(kind: str, form: str, tmp_path: Path) -> None:
    pipe = tiny.pipeline(kind)
    raw = tiny.adapter(pipe)
    base, wanted = tiny.outputs(pipe), tiny.fused(pipe, (raw, 1.0))
    loaded = load_into(pipe, tiny.WRITERS[form](raw, tmp_path, pipe), "style")
    assert loaded.name == "style"
    assert {(c, m) for c, names in loaded.modules.items() for m in names} == raw.keys()
    assert loaded.dropped == ()
    tiny.assert_close(tiny.outputs(pipe), wanted)
    tiny.assert_differ(wanted, base, loaded.modules)
    assert pipe.get_list_adapters() == {c: ["style"] for c in loaded.modules}
    assert pipe.get_active_adapters() == ["style"]


@pytest.mark.parametrize("form", tiny.WRITERS)
def test_dora_normalises_as_its_formula_says(form: str, tmp_path: Path) -> None:
    pipe = tiny.pipeline("sd1")
    raw = tiny.adapter(pipe, dora=True)
    wanted = tiny.fused(pipe, (raw, 1.0))
    load_into(pipe, tiny.WRITERS[form](raw, tmp_path, pipe))
    tiny.assert_close(tiny.outputs(pipe), wanted)


@pytest.mark.parametrize("kinds", [{"root": True}, {"bias": True}], ids=str)
def test_rslora_and_bias_keep_their_scale_under_weights(kinds: dict[str, bool], tmp_path: Path) -> None:
    pipe = tiny.pipeline("sd1")
    raw = tiny.adapter(pipe, only=["text_encoder"], **kinds)
    wanted = {w: tiny.fused(pipe, (raw, w)) for w in (1.0, -0.5)}
    load_into(pipe, tiny.write_peft(raw, tmp_path / "peft"), "a")
    tiny.assert_close(tiny.outputs(pipe), wanted[1.0])
    pipe.set_adapters(["a"], [-0.5])
    tiny.assert_close(tiny.outputs(pipe), wanted[-0.5])


def test_older_generations_of_diffusers_have_scale_one(tmp_path: Path) -> None:
    pipe = tiny.pipeline("sd1")
    attention = {k: raw for k, raw in tiny.adapter(pipe).items() if k[1].endswith(("to_q", "to_v", "to_out.0"))}
    for raw in attention.values():
        raw.alpha = float(raw.rank)
    tensors = {}
    for (component, name), raw in attention.items():
        stem = f"{component}.{name.replace('.to_', '.processor.to_').replace('to_out.0', 'to_out')}_lora"
        tensors |= {f"{stem}.down.weight": raw.a, f"{stem}.up.weight": raw.b}
    tiny.save_file(tensors, tmp_path / "old.safetensors")
    wanted = tiny.fused(pipe, (attention, 1.0))
    load_into(pipe, tmp_path / "old.safetensors")
    tiny.assert_close(tiny.outputs(pipe), wanted)


def test_a_tucker_core_is_part_of_the_product(tmp_path: Path) -> None:
    pipe = tiny.pipeline("sd1")
    generator = torch.Generator().manual_seed(4)
    down, core, up = (torch.randn(s, generator=generator) for s in ((2, 8, 1, 1), (2, 2, 3, 3), (8, 2, 1, 1)))
    stem, name = "lora_unet_down_blocks_0_resnets_0_conv1", "down_blocks.0.resnets.0.conv1"
    tensors = {"lora_down.weight": down, "lora_mid.weight": core, "lora_up.weight": up, "alpha": torch.tensor(1.0)}
    tiny.save_file({f"{stem}.{key}": t for key, t in tensors.items()}, tmp_path / "x.safetensors")
    first = torch.einsum("rsxy,si->rixy", core.double(), down[:, :, 0, 0].double())
    wanted = tiny.fused(pipe, ({("unet", name): tiny.Raw(first, up, 1.0)}, 1.0))
    assert load_into(pipe, tmp_path / "x.safetensors").modules == {"unet": (name,)}
    tiny.assert_close(tiny.outputs(pipe), wanted)


def test_flux_under_its_authors_names_is_split(tmp_path: Path) -> None:
    pipe = tiny.pipeline("flux")
    generator = torch.Generator().manual_seed(3)
    a, b = torch.randn(4, 16, generator=generator), torch.randn(48, 4, generator=generator)
    single, up = torch.randn(2, 16, generator=generator), torch.randn(112, 2, generator=generator)
    stems = {"lora_unet_double_blocks_0_img_attn_qkv": (a, b), "lora_unet_single_blocks_1_linear1": (single, up)}
    tensors = {}
    for stem, (down, over) in stems.items():
        tensors |= {
            f"{stem}.lora_down.weight": down,
            f"{stem}.lora_up.weight": over,
            f"{stem}.alpha": torch.tensor(3.0),
        }
    tiny.save_file(tensors, tmp_path / "flux.safetensors")
    parts = {f"transformer_blocks.0.attn.to_{p}": (a, b[16 * i : 16 * (i + 1)]) for i, p in enumerate("qkv")}
    block = "single_transformer_blocks.1"
    parts |= {f"{block}.attn.to_{p}": (single, up[16 * i : 16 * (i + 1)]) for i, p in enumerate("qkv")}
    parts[f"{block}.proj_mlp"] = (single, up[48:])
    raw = {("transformer", name): tiny.Raw(down, over, 3.0) for name, (down, over) in parts.items()}
    wanted = tiny.fused(pipe, (raw, 1.0))
    loaded = load_into(pipe, tmp_path / "flux.safetensors")
    assert set(loaded.modules["transformer"]) == parts.keys()
    tiny.assert_close(tiny.outputs(pipe), wanted)


def test_an_adapter_object_is_renamed_for_the_pipeline(tmp_path: Path) -> None:
    pipe = tiny.pipeline("sd1")
    raw = tiny.adapter(pipe)
    wanted = tiny.fused(pipe, (raw, 1.0))
    adapter = ao.load(tiny.write_diffusers(raw, tmp_path / "x.safetensors"))
    assert any(u.module.startswith("text_model.") for u in adapter)
    loaded = load_into(pipe, adapter)
    assert {(c, m) for c, names in loaded.modules.items() for m in names} == raw.keys()
    tiny.assert_close(tiny.outputs(pipe), wanted)


def test_a_folder_that_names_no_component_goes_where_its_modules_fit(tmp_path: Path) -> None:
    """Both text encoders have modules of these names; the widths tell them apart."""
    pipe = tiny.pipeline("sdxl")
    for component in tiny.models(pipe):
        raw = tiny.adapter(pipe, only=[component])
        wanted = tiny.fused(pipe, (raw, 1.0))
        folder = tiny.write_peft(raw, tmp_path / component) / component
        for source in (folder, ao.load(folder)):
            loaded = load_into(pipe, source)
            assert loaded.modules.keys() == {component}
            tiny.assert_close(tiny.outputs(pipe), wanted)
            pipe.unload_lora_weights()


def test_two_adapters_weighted_disabled_and_unloaded(tmp_path: Path) -> None:
    pipe = tiny.pipeline("sdxl")
    one, two = tiny.adapter(pipe, 1), tiny.adapter(pipe, 2, only=["unet", "text_encoder_2"])
    base = tiny.outputs(pipe)
    first, both, second = (
        tiny.fused(pipe, (one, 1.0)), tiny.fused(pipe, (one, 0.5), (two, -1.0)), tiny.fused(pipe, (two, 1.0))
    )  # fmt: skip
    load_into(pipe, tiny.write_diffusers(one, tmp_path / "one.safetensors"), "one")
    load_into(pipe, tiny.write_peft(two, tmp_path / "two"), "two")
    tiny.assert_close(tiny.outputs(pipe), second)
    assert pipe.get_active_adapters() == ["two"]
    pipe.set_adapters(["one", "two"], [0.5, -1.0])
    tiny.assert_close(tiny.outputs(pipe), both)
    pipe.disable_lora()
    assert tiny.equal(tiny.outputs(pipe), base)
    pipe.enable_lora()
    tiny.assert_close(tiny.outputs(pipe), both)
    pipe.delete_adapters("two")
    pipe.set_adapters("one")
    tiny.assert_close(tiny.outputs(pipe), first)
    pipe.unload_lora_weights()
    assert tiny.equal(tiny.outputs(pipe), base)
    assert not any(isinstance(m, BaseTunerLayer) for model in tiny.models(pipe).values() for m in model.modules())
    load_into(pipe, tmp_path / "two", "two")
    tiny.assert_close(tiny.outputs(pipe), second)


def test_fused_and_unfused_by_diffusers(tmp_path: Path) -> None:
    pipe = tiny.pipeline("sd1")
    raw = tiny.adapter(pipe)
    base, wanted = tiny.outputs(pipe), tiny.fused(pipe, (raw, 0.7))
    path = tiny.write_kohya(raw, tmp_path / "x.safetensors", two_encoders=False)
    load_into(pipe, path, "x")
    pipe.fuse_lora(components=["unet", "text_encoder"], lora_scale=0.7)
    assert pipe.num_fused_loras == 1
    tiny.assert_close(tiny.outputs(pipe), wanted)
    with pytest.raises(ao.AdapterOpsError, match=r"unfuse_lora"):
        load_into(pipe, path, "y")
    pipe.unfuse_lora(components=["unet", "text_encoder"])
    pipe.disable_lora()
    tiny.assert_close(tiny.outputs(pipe), base)


def test_beside_an_adapter_that_diffusers_loaded(tmp_path: Path) -> None:
    pipe = tiny.pipeline("sd1")
    # diffusers does not align a header's names with a text encoder that has lost `text_model.`.
    theirs = tiny.adapter(pipe, 5, only=["unet"])
    ours = tiny.adapter(pipe, 6)
    both = tiny.fused(pipe, (theirs, 0.5), (ours, -1.0))
    pipe.load_lora_weights(str(tiny.write_diffusers(theirs, tmp_path / "theirs.safetensors")), adapter_name="theirs")
    load_into(pipe, tiny.write_kohya(ours, tmp_path / "ours.safetensors", two_encoders=False), "ours")
    assert pipe.get_list_adapters() == {"unet": ["theirs", "ours"], "text_encoder": ["ours"]}
    pipe.set_adapters(["theirs", "ours"], [0.5, -1.0])
    tiny.assert_close(tiny.outputs(pipe), both)
    pipe.load_lora_weights(str(tmp_path / "theirs.safetensors"), adapter_name="again")
    pipe.set_adapters(["again", "ours"], [0.5, -1.0])
    tiny.assert_close(tiny.outputs(pipe), both)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    pipe = tiny.pipeline("sd1")
    raw = tiny.adapter(pipe)
    for model in tiny.models(pipe).values():
        model.to(dtype)
    base, wanted = tiny.outputs(pipe), tiny.fused(pipe, (raw, 1.0))
    load_into(pipe, tiny.write_diffusers(raw, tmp_path / "x.safetensors"))
    dtypes = {p.dtype for model in tiny.models(pipe).values() for p in model.parameters()}
    assert dtypes == {dtype}
    found = tiny.outputs(pipe)
    tiny.assert_close(found, wanted, tolerance=0.02 if dtype is torch.float16 else 0.1)
    pipe.unload_lora_weights()
    assert tiny.equal(tiny.outputs(pipe), base)


@pytest.mark.parametrize("way", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloaded_models_get_their_hooks_back(way: str, tmp_path: Path) -> None:
    """With the CPU as the device that computes: the hooks are those of a GPU, the transfers are not."""
    pytest.importorskip("accelerate")
    pipe = tiny.pipeline("sd1")
    raw = tiny.adapter(pipe)
    wanted = tiny.fused(pipe, (raw, 1.0))
    getattr(pipe, way)(device="cpu")
    hooks = {name: type(model._hf_hook) for name, model in tiny.models(pipe).items()}
    load_into(pipe, tiny.write_diffusers(raw, tmp_path / "x.safetensors"))
    assert {name: type(model._hf_hook) for name, model in tiny.models(pipe).items()} == hooks
    layers = [m for model in tiny.models(pipe).values() for m in model.modules() if isinstance(m, BaseTunerLayer)]
    factors: list[Any] = [layer.lora_A["default"] for layer in layers]
    if way == "enable_sequential_cpu_offload":
        assert all(factor.weight.is_meta and factor._hf_hook.offload for factor in factors)
        # accelerate cannot run these hooks where the device is the CPU; without them the weights are back.
        pipe.remove_all_hooks()
    tiny.assert_close(tiny.outputs(pipe), wanted)


def test_grouped_offloading(tmp_path: Path) -> None:
    pipe = tiny.pipeline("sd1")
    raw = tiny.adapter(pipe)
    wanted = tiny.fused(pipe, (raw, 1.0))
    pipe.unet.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    load_into(pipe, tiny.write_diffusers(raw, tmp_path / "x.safetensors"))
    tiny.assert_close(tiny.outputs(pipe), wanted)
    layer: Any = next(m for m in pipe.unet.modules() if isinstance(m, BaseTunerLayer))
    assert hasattr(layer.lora_A["default"], "_diffusers_hook")


def test_room_for_hotswapping(tmp_path: Path) -> None:
    pipe = tiny.pipeline("sd1")
    raw = tiny.adapter(pipe, only=["unet"])
    wanted = tiny.fused(pipe, (raw, 1.0))
    pipe.unet.enable_lora_hotswap(target_rank=8)
    load_into(pipe, tiny.write_diffusers(raw, tmp_path / "x.safetensors"), "x")
    tiny.assert_close(tiny.outputs(pipe), wanted)
    assert {m.lora_A["x"].weight.shape[0] for m in pipe.unet.modules() if hasattr(m, "lora_A")} == {8}


def test_a_model_compiled_in_place(tmp_path: Path) -> None:
    pipe = tiny.pipeline("sd1")
    raw = tiny.adapter(pipe)
    wanted = tiny.fused(pipe, (raw, 1.0))
    pipe.unet.compile(backend="eager")
    load_into(pipe, tiny.write_diffusers(raw, tmp_path / "x.safetensors"))
    tiny.assert_close(tiny.outputs(pipe), wanted)


def test_adapters_that_are_disabled_stay_so(tmp_path: Path) -> None:
    pipe = tiny.pipeline("sd1")
    base = tiny.outputs(pipe)
    one, two = tiny.adapter(pipe, 1, only=["unet"]), tiny.adapter(pipe, 2)
    wanted = tiny.fused(pipe, (two, 1.0))
    load_into(pipe, tiny.write_peft(one, tmp_path / "one"), "one")
    pipe.disable_lora()
    loaded = load_into(pipe, tiny.write_peft(two, tmp_path / "two"), "two")
    assert any("enable_lora" in note for note in loaded.notes)
    assert tiny.equal(tiny.outputs(pipe), base)
    pipe.enable_lora()
    tiny.assert_close(tiny.outputs(pipe), wanted)
