"""Faults that a review found: what was lost, guessed, refused or advised wrongly."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import adapterops as ao
from adapterops.errors import CannotRepresent, Conflict, UnknownModule

INNER = 3072
TO = "transformer_blocks.0.attn.to_"
ONE = "lora_transformer_transformer_blocks_0_attn_to_"
T5 = "encoder_block_{}_layer_0_SelfAttention_q"
Tensors = dict[str, torch.Tensor]


def random(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).half()


def lora(
    stem: str, out: int, inputs: int, alpha: float | None = None, names: tuple[str, str] = ("lora_down", "lora_up")
) -> Tensors:
    """A LoRA of rank 2 under Kohya's names or others."""
    made = {f"{stem}.{names[0]}.weight": random(2, inputs), f"{stem}.{names[1]}.weight": random(out, 2)}
    return made if alpha is None else {**made, f"{stem}.alpha": torch.tensor(alpha)}


def write(tensors: Tensors, path: Path, **metadata: str) -> Path:
    save_file(tensors, path, metadata or None)
    return path


def assert_same(path: str | Path, tensors: Mapping[str, torch.Tensor]) -> None:
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize("via", ["kohya", "comfy", "bfl-peft", "diffusers", "onetrainer"])
def test_xlabs_single_blocks_come_back(via: str, tmp_path: Path) -> None:
    """The authors' linear1 is not what XLabs names, but its first rows are."""
    tensors = {
        **lora("single_blocks.0.processor.qkv_lora", 3 * INNER, INNER, names=("down", "up")),
        **lora("single_blocks.0.processor.proj_lora", INNER, 5 * INNER, names=("down", "up")),
    }
    there = ao.convert(write(tensors, tmp_path / "x.safetensors"), via, tmp_path / "there.safetensors")
    back = ao.convert(there.path, "xlabs", tmp_path / "back.safetensors")
    assert_same(back.path, tensors)


@pytest.mark.parametrize("verify", [True, False])
def test_xlabs_does_not_lose_the_mlp_of_a_single_block(verify: bool, tmp_path: Path) -> None:
    source = write(lora("lora_unet_single_blocks_0_linear1", 7 * INNER, INNER, 2.0), tmp_path / "k.safetensors")
    with pytest.raises(CannotRepresent, match="proj_mlp: XLabs can hold only modules that end in"):
        ao.convert(source, "xlabs", tmp_path / "x.safetensors", verify=verify)


@pytest.mark.parametrize("verify", [True, False])
def test_a_sparse_part_is_not_moved_to_the_rows_of_another_projection(verify: bool, tmp_path: Path) -> None:
    stem = f"{ONE}k"
    tensors = {
        f"{stem}.diff": random(INNER, INNER),
        f"{stem}.bias_indices": torch.tensor([[0], [1]]),
        f"{stem}.bias_values": torch.tensor([2.0]),
        f"{stem}.bias_size": torch.tensor([INNER, INNER]),
    }
    source = write(tensors, tmp_path / "o.safetensors")
    with pytest.raises(CannotRepresent, match=r"not one such update on the whole.*\(--to kohya-diffusers\)"):
        ao.convert(source, "kohya", tmp_path / "k.safetensors", arch="flux", verify=verify)
    ao.convert(source, "kohya-diffusers", tmp_path / "d.safetensors", arch="flux")


def test_a_magnitude_per_input_does_not_mind_the_order_of_rows(tmp_path: Path) -> None:
    """norm_out.linear has its authors' rows in another order: a norm over all rows is the same."""
    tensors = lora("lora_transformer_norm_out_linear", 2 * INNER, INNER, 2.0)
    tensors["lora_transformer_norm_out_linear.dora_scale"] = random(1, INNER)
    source = write(tensors, tmp_path / "o.safetensors")
    there = ao.convert(source, "kohya", tmp_path / "k.safetensors", arch="flux")
    written, stem = load_file(there.path), "lora_unet_final_layer_adaLN_modulation_1"
    up = tensors["lora_transformer_norm_out_linear.lora_up.weight"]
    assert torch.equal(written[f"{stem}.lora_up.weight"], torch.cat([up[INNER:], up[:INNER]]))
    assert torch.equal(written[f"{stem}.dora_scale"], tensors["lora_transformer_norm_out_linear.dora_scale"])
    assert_same(ao.convert(there.path, "onetrainer", tmp_path / "b.safetensors").path, tensors)


def test_every_key_of_a_group_that_is_left_out_is_listed(tmp_path: Path) -> None:
    lost = {
        k: t
        for part, alpha in (("q", 2.0), ("k", 4.0), ("v", 2.0))
        for k, t in lora(f"{ONE}{part}", INNER, INNER, alpha).items()
    }
    kept = lora("lora_transformer_transformer_blocks_0_attn_to_out_0", INNER, INNER, 2.0)
    source = write({**lost, **kept}, tmp_path / "o.safetensors")
    result = ao.convert(source, "kohya", tmp_path / "k.safetensors", arch="flux", allow_drop=True)
    assert len(result.dropped) == 1
    assert "different scales" in result.dropped[0]
    for key in lost:
        assert key in result.dropped[0]
    for key in kept:
        assert key not in result.dropped[0]


def test_the_way_named_for_peft_ia3_is_one_that_works(tmp_path: Path) -> None:
    folder = tmp_path / "peft"
    folder.mkdir()
    save_file({f"base_model.model.{TO}k.ia3_l": random(INNER, 1)}, folder / "adapter_model.safetensors")
    config = {"peft_type": "IA3", "target_modules": ["to_k"], "feedforward_modules": []}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    for to in ("diffusers", "kohya", "comfy", "kohya-diffusers"):
        with pytest.raises(CannotRepresent, match="--to peft"):
            ao.convert(folder, to, tmp_path / "out.safetensors", arch="flux")
    ao.convert(folder, "peft", tmp_path / "again", arch="flux")


def test_the_way_named_for_whole_weights_is_one_that_works(tmp_path: Path) -> None:
    tensors = {
        **lora("diffusion_model.double_blocks.0.img_attn.proj", INNER, INNER, names=("lora_A", "lora_B")),
        "diffusion_model.double_blocks.0.img_mod.lin.set_weight": random(6 * INNER, INNER),
    }
    source = write(tensors, tmp_path / "c.safetensors")
    with pytest.raises(CannotRepresent, match="--to comfy"):
        ao.convert(source, "kohya", tmp_path / "k.safetensors")
    assert_same(ao.convert(source, "comfy", tmp_path / "again.safetensors").path, tensors)


def test_the_way_named_for_control_adapters_is_one_that_works(tmp_path: Path) -> None:
    tensors = {
        **lora("double_blocks.0.img_attn.proj", INNER, INNER, names=("lora_A", "lora_B")),
        "double_blocks.0.img_attn.proj.lora_B.bias": random(INNER),
        "double_blocks.0.img_attn.norm.query_norm.scale": random(128),
    }
    source = write(tensors, tmp_path / "b.safetensors")
    for to in ("kohya", "bfl-peft"):
        with pytest.raises(CannotRepresent, match="--to diffusers"):
            ao.convert(source, to, tmp_path / "out.safetensors")
    ao.convert(source, "diffusers", tmp_path / "d.safetensors")
    # Comfy-Org/ComfyUI `comfy/lora_convert.py` (`convert_lora_bfl_control`) calls them so, too.
    ao.convert(source, "comfy", tmp_path / "e.safetensors")
    made, stem = load_file(tmp_path / "e.safetensors"), "diffusion_model.double_blocks.0.img_attn"
    assert torch.equal(made[f"{stem}.proj.diff_b"], tensors["double_blocks.0.img_attn.proj.lora_B.bias"])
    assert torch.equal(
        made[f"{stem}.norm.query_norm.set_weight"], tensors["double_blocks.0.img_attn.norm.query_norm.scale"]
    )


def alphas(path: Path, **metadata: str) -> tuple[Path, Tensors]:
    tensors = {
        **lora(f"transformer.{TO}q", INNER, INNER, 1.0, ("lora_A", "lora_B")),
        **lora("transformer.single_transformer_blocks.0.attn.to_q", INNER, INNER, 4.0, ("lora_A", "lora_B")),
    }
    return write(tensors, path, **metadata), tensors


@pytest.mark.parametrize("via", ["kohya", "diffusers", "onetrainer", "comfy", "xlabs"])
def test_diffusers_names_with_alpha_tensors(via: str, tmp_path: Path) -> None:
    """diffusers' loader of Flux.1 takes alphas out of such files (`FluxLoraLoaderMixin.lora_state_dict`)."""
    source, tensors = alphas(tmp_path / "s.safetensors")
    assert {u.alpha.value for u in ao.load(source) if u.alpha is not None} == {1.0, 4.0}
    options = {"fold_alpha": True} if via == "xlabs" else {}
    there = ao.convert(source, via, tmp_path / "t.safetensors", **options)  # type: ignore[arg-type]
    if via != "xlabs":
        assert_same(ao.convert(there.path, "diffusers-alpha", tmp_path / "b.safetensors").path, tensors)


def test_alpha_tensors_and_a_header_that_disagree(tmp_path: Path) -> None:
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ["to_q"]}
    header = json.dumps({f"transformer.{name}": value for name, value in fields.items()})
    source, _ = alphas(tmp_path / "s.safetensors", lora_adapter_metadata=header)
    with pytest.raises(Conflict, match="two alphas"):
        ao.load(source)
    assert {u.alpha.value for u in ao.load(source, alpha="header") if u.alpha is not None} == {8.0}
    assert {u.alpha.value for u in ao.load(source, alpha="tensors") if u.alpha is not None} == {1.0, 4.0}


def test_one_encoder_under_two_prefixes_is_told(tmp_path: Path) -> None:
    tensors = {f"lora_te{n}_{k}": t for n in (2, 3) for k, t in lora(T5.format(n), 4096, 4096, 2.0).items()}
    result = ao.convert(write(tensors, tmp_path / "k.safetensors"), "kohya", tmp_path / "o.safetensors", arch="flux")
    assert any("lora_te2_ and lora_te3_" in note for note in result.notes)
    assert result.modules == 2


def test_a_header_cannot_change_what_a_matrix_is(tmp_path: Path) -> None:
    """A recorded shape of as many numbers may be another matrix; it is not taken, and the conversion goes on."""
    module = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    record = {"spelling": {"diffusers": {"shapes": {f"unet.{module}": {"A": [320, 2], "B": [2, 320]}}}}}
    tensors = lora("lora_unet_" + module.replace(".", "_"), 320, 320, 2.0)
    source = write(tensors, tmp_path / "k.safetensors", adapterops=json.dumps(record))
    result = ao.convert(source, "diffusers", tmp_path / "d.safetensors", arch="sd1")
    assert load_file(result.path)[f"unet.{module}.lora_A.weight"].shape == (2, 320)


def test_two_spellings_in_one_file_are_called_so(tmp_path: Path) -> None:
    tensors = {
        **lora("lora_unet_input_blocks_4_1_proj_in", 640, 640, 2.0),
        **lora("lora_unet_down_blocks_1_attentions_1_proj_in", 640, 640, 2.0),
    }
    source = write(tensors, tmp_path / "k.safetensors")
    with pytest.raises(UnknownModule, match=r"names down_blocks.1.attentions.0.proj_in of sd1: the file mixes two"):
        ao.convert(source, "diffusers", tmp_path / "d.safetensors")


def test_a_prefix_of_another_base_is_called_so(tmp_path: Path) -> None:
    tensors = {
        **lora("lora_unet_input_blocks_4_1_proj_in", 640, 640, 2.0),
        **lora("lora_te_text_model_encoder_layers_0_self_attn_q_proj", 768, 768, 2.0),
    }
    source = write(tensors, tmp_path / "k.safetensors")
    with pytest.raises(UnknownModule, match="files for sdxl do not begin the keys of its text_encoder with 'lora_te_'"):
        ao.load(source, arch="sdxl")


def test_a_header_does_not_change_an_alpha_that_a_tensor_holds(tmp_path: Path) -> None:
    """The alpha of two whole LoKr factors has no effect, so a proof cannot see that another was written."""
    stem, at = "lycoris_transformer_blocks_0_attn_to_out_0", "transformer.transformer_blocks.0.attn.to_out.0"
    tensors = {
        f"{stem}.lokr_w1": random(8, 8),
        f"{stem}.lokr_w2": random(384, 384),
        f"{stem}.alpha": torch.tensor(16.0),
    }
    record = {"spelling": {"kohya": {"idle_alpha": {at: 1e300}}}}
    source = write(tensors, tmp_path / "l.safetensors", adapterops=json.dumps(record))
    result = ao.convert(source, "kohya", tmp_path / "k.safetensors", arch="flux")
    (alpha,) = (t for key, t in load_file(result.path).items() if key.endswith(".alpha"))
    assert float(alpha) == 16.0


def test_a_wrapper_left_in_the_keys_is_no_part_of_the_names(tmp_path: Path) -> None:
    """SimpleTuner#779: `transformer.base_model.model.…`."""
    stem = "transformer.base_model.model.transformer_blocks.0.attn.to_q"
    tensors = {f"{stem}.lora_A.weight": torch.randn(4, 3072), f"{stem}.lora_B.weight": torch.randn(3072, 4)}
    path = tmp_path / "wrapped.safetensors"
    save_file(tensors, path)
    adapter = ao.load(path)
    assert [u.module for u in adapter] == ["transformer_blocks.0.attn.to_q"]
    assert load_file(ao.save(adapter, tmp_path / "same.safetensors").path).keys() == tensors.keys()
    plain = ao.convert(path, "kohya-diffusers", tmp_path / "k.safetensors")
    back = ao.convert(plain.path, "diffusers", tmp_path / "d.safetensors")
    assert load_file(back.path).keys() == {key.replace("base_model.model.", "") for key in tensors}


def test_a_header_cannot_make_peft_change_the_base(tmp_path: Path) -> None:
    """`init_lora_weights: pissa` in the header of a Kohya file, which no such training can have written."""
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {f"{stem}.lora_down.weight": torch.randn(4, 320), f"{stem}.lora_up.weight": torch.randn(320, 4)}
    path = tmp_path / "hostile.safetensors"
    save_file(tensors, path, {"adapterops": json.dumps({"config": {"unet": {"init_lora_weights": "PiSSA_niter_4"}}})})
    ao.convert(path, "peft", tmp_path / "peft")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True


def test_a_header_alpha_that_no_module_has_is_not_carried_into_a_kohya_file(tmp_path: Path) -> None:
    """sd-scripts' `ss_network_alpha` beside Comfy's names, or beside alphas that were folded."""
    stem = "diffusion_model.double_blocks.0.img_attn.proj"
    tensors = {
        f"{stem}.lora_A.weight": torch.randn(4, 3072),
        f"{stem}.lora_B.weight": torch.randn(3072, 4),
        f"{stem}.alpha": torch.tensor(3.0),
    }
    path = tmp_path / "comfy.safetensors"
    save_file(tensors, path, {"ss_network_alpha": "16"})
    result = ao.convert(path, "kohya", tmp_path / "k.safetensors")
    assert any("ss_network_alpha, 16, is no module's" in note for note in result.notes)
    assert "ss_network_alpha" not in ao.load(result.path).metadata
    save_file(tensors, path, {"ss_network_alpha": "3"})
    kept = ao.convert(path, "kohya", tmp_path / "kept.safetensors")
    assert ao.load(kept.path).metadata["ss_network_alpha"] == "3"
    folded = ao.convert(kept.path, "kohya", tmp_path / "folded.safetensors", fold_alpha=True)
    assert "ss_network_alpha" not in ao.load(folded.path).metadata


def test_folders_that_are_no_components_are_not_one_adapter(tmp_path: Path) -> None:
    """A whole Kohya file in a folder called after a component, beside a real one."""
    unet = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    pairs = {f"{unet}.lora_A.weight": torch.randn(4, 320), f"{unet}.lora_B.weight": torch.randn(320, 4)}
    for name in ("prior", "unet"):
        (tmp_path / "in" / name).mkdir(parents=True)
        save_file(pairs, tmp_path / "in" / name / "adapter_model.safetensors")
    with pytest.raises(ao.AdapterOpsError, match="folder prior holds updates of unet"):
        ao.load(tmp_path / "in")
