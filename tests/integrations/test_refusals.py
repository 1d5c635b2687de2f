"""What `load_into` refuses, and that a pipeline is as it was after it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import peft
import tiny
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file

import adapterops as ao
from adapterops import errors
from adapterops.integrations.diffusers import load_into


def state(pipe: Any) -> dict[str, Any]:
    """All that an adapter changes in a pipeline's models."""
    out: dict[str, Any] = {}
    for name, model in tiny.models(pipe).items():
        out[f"{name}: weights"] = {k: (t.dtype, t.sum().item()) for k, t in model.state_dict().items()}
        out[f"{name}: modules"] = [(path, id(module)) for path, module in model.named_modules()]
        out[f"{name}: trained"] = {k: p.requires_grad for k, p in model.named_parameters()}
        out[f"{name}: configs"] = list(getattr(model, "peft_config", {}))
        out[f"{name}: flag"] = bool(getattr(model, "_hf_peft_config_loaded", None))
        layers: list[tuple[str, Any]] = [(n, m) for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
        out[f"{name}: layers"] = [(n, m.active_adapters, m.disable_adapters, dict(m.scaling)) for n, m in layers]
    return out


@pytest.fixture
def pipe() -> Any:
    """A pipeline of SD 1's shape."""
    return tiny.pipeline("sd1")


def refused(pipe: Any, path: Any, error: type[Exception], *words: str, **options: Any) -> None:
    """`load_into` raises `error` with all of `words`, and changes nothing."""
    before, outputs = state(pipe), tiny.outputs(pipe)
    with pytest.raises(error) as caught:
        load_into(pipe, path, **options)
    for word in words:
        assert word in str(caught.value)
    assert state(pipe) == before
    assert tiny.equal(tiny.outputs(pipe), outputs)


def kohya(pipe: Any, folder: Path, change: Callable[[dict[str, torch.Tensor]], None] | None = None) -> Path:
    """A Kohya file of the pipeline, its tensors changed."""
    path = tiny.write_kohya(tiny.adapter(pipe), folder / "kohya.safetensors", two_encoders=False)
    if change is not None:
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)
    return path


def test_unknown_modules_are_named_with_the_nearest(pipe: Any, tmp_path: Path) -> None:
    def misspell(tensors: dict[str, torch.Tensor]) -> None:
        stem = "lora_unet_mid_block_attentions_0_proj_in"
        for suffix in ("lora_down.weight", "lora_up.weight", "alpha"):
            tensors[f"{stem}x.{suffix}"] = tensors.pop(f"{stem}.{suffix}")

    path = kohya(pipe, tmp_path, misspell)
    refused(pipe, path, errors.UnknownModule, "proj_inx", "nearest", "mid_block_attentions_0_proj_in")


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
def test_what_may_be_dropped_is_listed(form: str, pipe: Any, tmp_path: Path) -> None:
    raw = tiny.adapter(pipe)
    wanted = tiny.fused(pipe, (raw, 1.0))
    nowhere = {("unet", "mid_block.nowhere"): tiny.Raw(torch.ones(2, 4), torch.ones(4, 2), 1.0)}
    path = tiny.WRITERS[form]({**raw, **nowhere}, tmp_path, pipe)
    lost = {key for key in load_file(path) if "nowhere" in key}
    refused(pipe, path, errors.UnknownModule, "nowhere")
    loaded = load_into(pipe, path, allow_drop=True)
    assert set(loaded.dropped) | {k for k in lost if k.endswith("alpha")} == lost
    assert {(c, m) for c, names in loaded.modules.items() for m in names} == raw.keys()
    tiny.assert_close(tiny.outputs(pipe), wanted)


def test_shapes_of_another_base_are_refused(pipe: Any, tmp_path: Path) -> None:
    other = tiny.pipeline("sdxl")
    path = tiny.write_diffusers(tiny.adapter(other, only=["unet"]), tmp_path / "x.safetensors")
    refused(pipe, path, errors.AdapterOpsError, "x.safetensors", "unet")


def test_a_component_that_the_pipeline_lacks_is_named(tmp_path: Path) -> None:
    pipe = tiny.pipeline("sdxl")
    raw = tiny.adapter(pipe)
    paths = [tiny.WRITERS[form](raw, tmp_path, pipe) for form in tiny.WRITERS]
    pipe.text_encoder_2 = None
    wanted = tiny.fused(pipe, ({k: r for k, r in raw.items() if k[0] != "text_encoder_2"}, 1.0))
    for n, source in enumerate([*paths, ao.load(paths[1])]):
        refused(pipe, source, errors.CannotRepresent, "text_encoder_2", "components=['", "has none")
        loaded = load_into(pipe, source, f"a{n}", components=["unet", "text_encoder"])
        assert loaded.modules.keys() == {"unet", "text_encoder"}
        tiny.assert_close(tiny.outputs(pipe), wanted)
        pipe.delete_adapters(f"a{n}")
    refused(pipe, paths[0], errors.CannotRepresent, "text_encoder_2", components=["text_encoder_2"])
    refused(pipe, paths[0], errors.UsageError, "components", components="unet")
    refused(pipe, paths[0], errors.UsageError, "components", components=[])


def test_a_folder_that_fits_two_components_is_refused(tmp_path: Path) -> None:
    pipe = tiny.pipeline("sdxl")
    raw = tiny.adapter(pipe, only=["text_encoder"])
    pipe.text_encoder_2 = tiny.pipeline("sdxl", seed=1).text_encoder
    adapter = ao.load(tiny.write_peft(raw, tmp_path / "peft") / "text_encoder")
    refused(pipe, adapter, errors.AmbiguousFormat, "text_encoder and of text_encoder_2", "subfolder")
    assert load_into(pipe, tmp_path / "peft").modules.keys() == {"text_encoder"}


def test_an_encoder_that_the_pipeline_does_not_manage_is_refused(tmp_path: Path) -> None:
    pipe = tiny.pipeline("flux")
    name = "encoder.block.0.layer.0.SelfAttention.q"
    raw = {("text_encoder_2", name): tiny.Raw(torch.randn(2, 8), torch.randn(8, 2), 1.0), **tiny.adapter(pipe)}
    path = tiny.write_diffusers(raw, tmp_path / "x.safetensors")
    refused(pipe, path, errors.CannotRepresent, "text_encoder_2", "manages no adapters", "FluxPipeline")
    assert load_into(pipe, path, components=["transformer"]).modules.keys() == {"transformer"}


def test_a_taken_name_is_refused(pipe: Any, tmp_path: Path) -> None:
    path = tiny.write_diffusers(tiny.adapter(pipe, only=["unet"]), tmp_path / "x.safetensors")
    load_into(pipe, path, "style")
    refused(pipe, path, errors.UsageError, "'style'", "delete_adapters", name="style")
    refused(pipe, path, errors.UsageError, "without a dot", name="a.b")
    pipe.delete_adapters("style")
    load_into(pipe, path, "style")


def test_an_unknown_alpha_is_refused_unless_given(pipe: Any, tmp_path: Path) -> None:
    raw = tiny.adapter(pipe, only=["unet"])
    for update in raw.values():
        update.alpha = 3.0
    folder = tiny.write_peft(raw, tmp_path / "peft") / "unet"
    (folder / "adapter_config.json").unlink()
    wanted = tiny.fused(pipe, (raw, 1.0))
    refused(pipe, folder, errors.UnknownFact, "alpha")
    refused(pipe, ao.load(folder), errors.UnknownFact, "alpha")
    refused(pipe, folder, errors.UsageError, "alpha", alpha="whatever")
    refused(pipe, folder, errors.UsageError, "alpha", alpha=float("nan"))
    load_into(pipe, folder, alpha=3)
    tiny.assert_close(tiny.outputs(pipe), wanted)


def test_what_has_no_layer_is_listed(pipe: Any, tmp_path: Path) -> None:
    raw = tiny.adapter(pipe, only=["unet"])
    folder = tiny.write_peft(raw, tmp_path / "peft") / "unet"
    weights = folder / "adapter_model.safetensors"
    save_file({**load_file(weights), "base_model.model.conv_out.weight": torch.randn(4, 8, 3, 3)}, weights)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "modules_to_save": ["conv_out"]}))
    refused(pipe, folder, errors.CannotRepresent, "conv_out", "saved", "allow_drop")
    wanted = tiny.fused(pipe, (raw, 1.0))
    loaded = load_into(pipe, folder, allow_drop=True)
    assert loaded.dropped == ("base_model.model.conv_out.weight",)
    tiny.assert_close(tiny.outputs(pipe), wanted)


def test_a_method_without_weights_is_refused(pipe: Any, tmp_path: Path) -> None:
    twin = tiny.unet()
    targets = {"target_modules": ["to_k", "to_v", "ff.net.2"], "feedforward_modules": ["ff.net.2"]}
    peft.get_peft_model(twin, peft.IA3Config(**targets)).save_pretrained(tmp_path / "ia3")
    refused(pipe, tmp_path / "ia3", errors.CannotRepresent, "(IA)³", "set_adapters")


def test_a_difference_of_weights_is_refused(pipe: Any, tmp_path: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lora_unet_conv_out.diff"] = torch.zeros(4, 8, 3, 3)

    refused(
        pipe, kohya(pipe, tmp_path, add), errors.CannotRepresent, "conv_out.diff", "full difference", "unet: conv_out"
    )


def test_two_methods_in_one_component_are_refused(pipe: Any, tmp_path: Path) -> None:
    def add(tensors: dict[str, torch.Tensor]) -> None:
        stem = "lora_unet_conv_out"
        tensors |= {f"{stem}.lokr_w1": torch.ones(2, 2), f"{stem}.lokr_w2": torch.ones(2, 4, 3, 3)}

    refused(pipe, kohya(pipe, tmp_path, add), errors.AdapterOpsError, "LoKr")


def test_a_model_wrapped_by_the_compiler_is_refused(pipe: Any, tmp_path: Path) -> None:
    path = kohya(pipe, tmp_path)
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    with pytest.raises(errors.UsageError, match=r"pipe\.unet\.compile\(\)"):
        load_into(pipe, path)


def test_numbers_that_are_none_are_refused(pipe: Any, tmp_path: Path) -> None:
    def poison(tensors: dict[str, torch.Tensor]) -> None:
        next(t for k, t in tensors.items() if k.endswith("lora_up.weight")).view(-1)[0] = torch.nan

    refused(pipe, kohya(pipe, tmp_path, poison), errors.BrokenAdapter, "NaN", "lora_up")


def test_values_beyond_the_dtype_of_the_pipeline_are_refused(pipe: Any, tmp_path: Path) -> None:
    def enlarge(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lora_unet_mid_block_attentions_0_proj_in.lora_up.weight"] *= 1e6

    path = kohya(pipe, tmp_path, enlarge)
    for model in tiny.models(pipe).values():
        model.half()
    refused(pipe, path, errors.BrokenAdapter, "mid_block.attentions.0.proj_in", "float16", "bfloat16")


@pytest.mark.parametrize("loaded_before", [False, True])
def test_a_component_that_fails_takes_the_others_out_again(
    loaded_before: bool, pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if loaded_before:
        first = tiny.adapter(pipe, 4, only=["unet"])
        load_into(pipe, tiny.write_diffusers(first, tmp_path / "first.safetensors"), "first")
        pipe.set_adapters(["first"], [0.25])
    right = peft.set_peft_model_state_dict
    seen: list[Any] = []

    def second_fails(model: Any, *args: Any, **options: Any) -> Any:
        seen.append(model)
        if len(seen) == 2:
            raise RuntimeError("out of memory")
        return right(model, *args, **options)

    monkeypatch.setattr(peft, "set_peft_model_state_dict", second_fails)
    path = kohya(pipe, tmp_path)
    refused(pipe, path, errors.CannotRepresent, "out of memory", type(pipe.unet).__name__, name="second")
    assert len(seen) == 2
    wanted = tiny.fused(tiny.pipeline("sd1"), (tiny.adapter(tiny.pipeline("sd1")), 1.0))
    load_into(pipe, path, "second")
    tiny.assert_close(tiny.outputs(pipe), wanted)


def test_a_base_that_was_changed_for_the_training_is_refused(pipe: Any, tmp_path: Path) -> None:
    folder = tiny.write_peft(tiny.adapter(pipe, only=["unet"]), tmp_path / "peft") / "unet"
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": "pissa"}))
    refused(pipe, folder, errors.CannotRepresent, "pissa")


def test_what_is_no_pipeline_is_refused(pipe: Any, tmp_path: Path) -> None:
    with pytest.raises(errors.UsageError, match="UNet2DConditionModel is no diffusers pipeline"):
        load_into(pipe.unet, kohya(pipe, tmp_path))
    refused(
        pipe, ao.load(tiny.write_diffusers(tiny.adapter(pipe), tmp_path / "d.safetensors")), errors.UsageError, alpha=1
    )
