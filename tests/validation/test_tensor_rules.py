"""T rules: each is broken in one way and found exactly; near misses are not; what the texts say of peft is so."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sound import Tensors, codes, diffusers_file, edit, found, kohya_file, load, peft_folder, rehash, set_config

import adapterops as ao
from adapterops.validation import registry

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
V0 = "base_model.model.model.layers.0.self_attn.v_proj"
Q1 = "base_model.model.model.layers.1.self_attn.q_proj"
UNET = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


def _renamed(pattern: str, replacement: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {re.sub(pattern, replacement, key): t for key, t in tensors.items()}


def _changed(**changes: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Tensors]:
    """Tensors whose keys end so, changed."""

    def change(tensors: Tensors) -> Tensors:
        out = dict(tensors)
        for key in tensors:
            for end, how in changes.items():
                if key.endswith(end.replace("__", ".")):
                    out[key] = how(out[key])
        return out

    return change


def _with(key: str, how: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, key: how(tensors[key])}


def _without(key: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {k: t for k, t in tensors.items() if k != key}


def _set(tensor: torch.Tensor, at: Any, value: Any) -> torch.Tensor:
    out = tensor.clone()
    out[at] = value
    return out


def _twice(path: Path) -> Path:
    file = diffusers_file(path)

    def both(tensors: Tensors) -> Tensors:
        stem = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
        return {
            **{key.replace(".lora_A", ".lora.down").replace(".lora_B", ".lora.up"): t for key, t in tensors.items()},
            f"{stem}.lora_A.weight": tensors[f"{stem}.lora_A.weight"] * 2,
            f"{stem}.lora_B.weight": tensors[f"{stem}.lora_B.weight"] * 2,
        }

    return edit(file, both)


def _huge(path: Path) -> Path:
    return edit(peft_folder(path, layers=5), _with(f"{Q1}.lora_B.weight", lambda t: t * 2e4))


def _pickled(path: Path) -> Path:
    folder = peft_folder(path)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[f"{Q1}.lora_A.weight"] = tensors[f"{Q0}.lora_A.weight"]
    torch.save(tensors, folder / "adapter_model.bin")
    file.unlink()
    return folder


def _part_of(path: Path) -> Path:
    return edit(peft_folder(path), _with(f"{Q1}.lora_A.weight", lambda t: _set(t, 1, t[0])))


def _botched(tensors: Tensors) -> Tensors:
    return {re.sub(r"^lora_unet_", "lora_unet_unet_", k).replace(".lora_", "_lora_"): t for k, t in tensors.items()}


BROKEN: dict[str, Callable[[Path], Path]] = {
    "T101": lambda p: edit(peft_folder(p), _without(f"{Q0}.lora_B.weight")),
    "T102": lambda p: edit(kohya_file(p), _with(f"{UNET}.lora_up.weight", lambda t: t[:, :3])),
    "T103": lambda p: edit(kohya_file(p), _with(f"{UNET}.lora_down.weight", lambda t: t.reshape(-1))),
    "T104": _twice,
    "T105": lambda p: edit(peft_folder(p), _with(f"{Q0}.lora_A.weight", lambda t: t[:0].reshape(0))),
    "T110": lambda p: edit(peft_folder(p), _with(f"{Q0}.lora_B.weight", lambda t: _set(t, (3, 1), float("nan")))),
    "T111": lambda p: edit(peft_folder(p), _changed(lora_B__weight=torch.zeros_like)),
    "T112": lambda p: edit(peft_folder(p), _with(f"{V0}.lora_B.weight", torch.zeros_like)),
    "T113": lambda p: edit(peft_folder(p), _with(f"{V0}.lora_A.weight", torch.zeros_like)),
    "T114": lambda p: edit(peft_folder(p), _with(f"{V0}.lora_B.weight", lambda t: _set(t, (slice(None), 2), 0))),
    "T115": _part_of,
    "T116": _huge,
    "T120": lambda p: edit(peft_folder(p), _changed(lora_A__weight=lambda t: t.half())),
    "T121": lambda p: edit(peft_folder(p), lambda t: {k: v.half() if "layers.0" in k else v for k, v in t.items()}),
    "T122": lambda p: edit(diffusers_file(p), lambda t: {k: v.double() for k, v in t.items()}),
    "T123": lambda p: edit(peft_folder(p), lambda t: {k: (v * 99).to(torch.int8) for k, v in t.items()}),
    "T124": lambda p: edit(peft_folder(p), lambda t: {k: v.to(torch.float8_e4m3fn) for k, v in t.items()}),
    "T130": lambda p: edit(peft_folder(p), _renamed(r"\.weight$", ".default.weight")),
    "T131": lambda p: edit(peft_folder(p), _renamed(r"^base_model\.model", "base_model.model._orig_mod")),
    "T132": lambda p: rehash(edit(kohya_file(p), _botched)),
    "T133": lambda p: edit(
        peft_folder(p),
        lambda t: {**t, "optimizer.state.0.exp_avg": torch.ones(4), "optimizer.state.0.step": torch.ones(1)},
    ),
    "T134": lambda p: edit(peft_folder(p), lambda t: {**t, f"{Q0}.base_layer.weight": torch.ones(64, 64)}),
    "T140": _pickled,
    "T141": lambda p: edit(
        peft_folder(p),
        lambda t: {**t, **{k.replace("layers.0", "layers.1"): v.clone() for k, v in t.items() if "layers.0" in k}},
    ),
    "T142": lambda p: edit(diffusers_file(p), lambda t: {k: v[:2] if "lora_B" in k else v for k, v in t.items()}),
}

BESIDES = {"T140": {"F011"}}
"""What cannot but be found too: a pickle is one."""


@pytest.mark.parametrize("code", BROKEN)
def test_what_is_broken_is_found_and_nothing_else(tmp_path: Path, code: str) -> None:
    assert set(codes(BROKEN[code](tmp_path))) - BESIDES.get(code, set()) == {code}


def test_every_rule_of_tensors_is_broken_here() -> None:
    assert {rule.code for rule in registry.rules() if rule.code[0] == "T"} == BROKEN.keys()


NEAR: dict[str, Callable[[Path], Path]] = {
    "one trained number is enough": lambda p: edit(
        peft_folder(p), _with(f"{V0}.lora_B.weight", lambda t: _set(torch.zeros_like(t), (0, slice(None)), 1e-30))
    ),
    "minus zero beside numbers": lambda p: edit(
        peft_folder(p), _with(f"{V0}.lora_B.weight", lambda t: _set(t, (0, 0), -0.0))
    ),
    "the largest numbers": lambda p: edit(
        kohya_file(p), _with(f"{UNET}.lora_up.weight", lambda t: _set(t, (0, 0), 65504.0))
    ),
    "shared first factors": lambda p: edit(
        peft_folder(p), lambda t: {**t, f"{V0}.lora_A.weight": t[f"{Q0}.lora_A.weight"].clone()}
    ),
    "a hundred times the others": lambda p: edit(
        peft_folder(p, layers=5), _with(f"{Q1}.lora_B.weight", lambda t: t * 100)
    ),
    "rows that begin alike": lambda p: edit(
        peft_folder(p), _with(f"{Q0}.lora_A.weight", lambda t: _set(t, (slice(None), slice(40)), t[:1, :40]))
    ),
    "all in one other type": lambda p: edit(peft_folder(p), lambda t: {k: v.bfloat16() for k, v in t.items()}),
    "components of two types": lambda p: rehash(
        edit(kohya_file(p), lambda t: {k: v.float() if k.startswith("lora_te") else v for k, v in t.items()})
    ),
}


@pytest.mark.parametrize("name", NEAR)
def test_near_misses_are_not_found(tmp_path: Path, name: str) -> None:
    assert codes(NEAR[name](tmp_path), select=["T"]) == []


@pytest.mark.parametrize(
    "spelled",
    [
        _renamed("^", "base_model.model."),
        _renamed("^", "module."),
        _renamed(r"^base_model\.model\.", ""),
        _renamed(r"self_attn\.", "self_attn._fsdp_wrapped_module."),
    ],
)
def test_prefixes_that_peft_does_not_read(tmp_path: Path, spelled: Callable[[Tensors], Tensors]) -> None:
    folder = edit(peft_folder(tmp_path), spelled)
    assert codes(folder) == ["T131"]
    assert _loaded(folder) == 0


def test_a_peft_models_state_dict_is_no_pipelines(tmp_path: Path) -> None:
    """What diffusers' LCM distillation saves; its own loader finds nothing there (`test_diffusers_reads_no_adapters_name`)."""
    path = edit(diffusers_file(tmp_path), _renamed(r"^unet\.", "unet.base_model.model."))
    (finding,) = found(path, select=["T"])
    assert finding.code == "T131"
    assert finding.change is not None
    whole, _ = load(diffusers_file(tmp_path, "whole.safetensors"))
    assert set(finding.change.keys.values()) == whole.keys()


def test_peft_reads_an_adapters_name_under_that_name_alone(tmp_path: Path) -> None:
    folder = BROKEN["T130"](tmp_path)
    assert _loaded(peft_folder(tmp_path, name="whole")) == 4
    assert _loaded(folder, "default") == 4
    assert _loaded(folder, "other") == 0


@pytest.mark.parametrize(
    ("before", "ending", "loaded"),
    [("", ".weight", 1), ("", ".default.weight", 0), ("base_model.model.", ".weight", 0)],
)
def test_diffusers_reads_no_adapters_name(before: str, ending: str, loaded: int) -> None:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 8), layers_per_block=1, cross_attention_dim=8, norm_num_groups=4,
        attention_head_dim=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    stem = f"unet.{before}down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    state = {f"{stem}.lora_A{ending}": torch.ones(2, 8), f"{stem}.lora_B{ending}": torch.ones(8, 2)}
    with _quiet(), contextlib.suppress(ValueError):  # of target modules that the UNet has not
        unet.load_lora_adapter(state, prefix="unet")
    factors = [t for key, t in unet.state_dict().items() if "lora_B" in key]
    assert sum(bool(t.abs().sum() > 0) for t in factors) == loaded


def _loaded(folder: Path, name: str = "default") -> int:
    """How many modules peft gives what the folder holds."""
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
    with _quiet():
        model = PeftModel.from_pretrained(LlamaForCausalLM(config), str(folder), adapter_name=name)
    return sum(int(t.abs().sum() > 0) for key, t in model.state_dict().items() if "lora_B" in key)


def _quiet() -> Any:
    import warnings

    return warnings.catch_warnings(action="ignore")


def test_peft_loads_a_base_weight_over_the_base(tmp_path: Path) -> None:
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
    with _quiet():
        model = PeftModel.from_pretrained(LlamaForCausalLM(config), str(BROKEN["T134"](tmp_path)))
    assert torch.equal(model.state_dict()[f"{Q0}.base_layer.weight"], torch.ones(64, 64))


def test_safetensors_refuses_tied_tensors(tmp_path: Path) -> None:
    tensors = torch.load(_pickled(tmp_path) / "adapter_model.bin", weights_only=True)
    with pytest.raises(RuntimeError, match="share memory"):
        save_file(tensors, tmp_path / "out.safetensors")


@pytest.mark.parametrize("code", ["T130", "T131", "T132", "T133"])
def test_the_change_names_every_key_as_the_file_has_it(tmp_path: Path, code: str) -> None:
    path = BROKEN[code](tmp_path)
    (finding,) = found(path, select=["T"])
    assert finding.change is not None
    file = path / "adapter_model.safetensors" if path.is_dir() else path
    tensors, _ = load(file)
    assert finding.change.keys.keys() | set(finding.change.drop) <= tensors.keys()

    def mend(tensors: Tensors) -> Tensors:
        assert finding.change is not None
        return {finding.change.keys.get(k, k): t for k, t in tensors.items() if k not in finding.change.drop}

    assert codes(edit(path, mend), select=["T"]) == []


def test_two_faults_of_one_key_are_mended_by_one_change(tmp_path: Path) -> None:
    folder = edit(peft_folder(tmp_path), _renamed(r"^(.*)\.weight$", r"_orig_mod.\1.default.weight"))
    findings = list(found(folder, select=["T"]))
    assert [f.code for f in findings] == ["T130", "T131"]
    changes = [f.change.keys for f in findings if f.change is not None]
    assert changes[0] == changes[1]
    assert sorted(changes[0].values()) == sorted(
        load_file(peft_folder(tmp_path, name="other") / "adapter_model.safetensors")
    )


def test_where_a_number_is_none_is_told(tmp_path: Path) -> None:
    (finding,) = found(BROKEN["T110"](tmp_path))
    assert "1 NaN among 256 numbers, the first at [3, 1]" in finding.message
    assert finding.where == (f"{Q0}.lora_B.weight",)


def test_a_nan_in_a_file_of_no_known_format_is_found(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"w": torch.tensor([1.0, float("inf")])}, path)
    assert "T110" in codes(path)


def test_an_untrained_head_beside_it_is_said(tmp_path: Path) -> None:
    folder = edit(
        set_config(peft_folder(tmp_path), modules_to_save=["lm_head"]),
        lambda t: {
            **_changed(lora_B__weight=torch.zeros_like)(t),
            "base_model.model.lm_head.weight": torch.ones(32, 64),
        },
    )
    (finding,) = found(folder, select=["T"])
    assert finding.code == "T111"
    assert "only the 1 parameters that are saved whole" in finding.message


def test_methods_begin_with_nothing_in_their_own_way(tmp_path: Path) -> None:
    """An (IA)³ of ones and an OFT without rotation do nothing; zeros in an (IA)³ do much."""
    import torch.nn as nn
    from peft import IA3Config, OFTConfig, get_peft_model

    def made(config: Any, name: str) -> Path:
        model = nn.Sequential()
        model.add_module("one", nn.Linear(8, 8))
        get_peft_model(model, config).save_pretrained(tmp_path / name)
        return tmp_path / name

    ia3 = made(IA3Config(target_modules=["one"], feedforward_modules=[]), "ia3")
    oft = made(OFTConfig(target_modules=["one"], oft_block_size=4, r=0), "oft")
    assert codes(ia3, select=["T"]) == ["T111"]
    assert codes(oft, select=["T"]) == ["T111"]
    edit(ia3, lambda t: {k: torch.zeros_like(v) for k, v in t.items()})
    assert codes(ia3, select=["T"]) == []


def test_nothing_is_read_of_tensors_where_only_headers_are_asked(tmp_path: Path) -> None:
    assert codes(BROKEN["T110"](tmp_path), header_only=True) == []
    assert ao.validate(BROKEN["T110"](tmp_path / "again"), select=["T101"]).findings == ()
