"""Damage as it really happens: each piece of it has one code, and what only follows from it has none."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapterops_formats.peft import PEFT
from broken_files import join
from safetensors.torch import save_file
from sound import Tensors, codes, diffusers_file, edit, found, kohya_file, load, peft_folder, set_config

from adapterops.dialects.match import read_keys
from adapterops.validation.discover import discover
from adapterops.validation.fix import mend

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
Make = Callable[[Path], Path]


def peft(change: Callable[[Tensors], Tensors] | None = None, **fields: Any) -> Make:
    return lambda path: set_config(edit(peft_folder(path), change), **fields)


def kohya(change: Callable[[Tensors], Tensors]) -> Make:
    return lambda path: edit(kohya_file(path), change)


def renamed(old: str, new: str, count: int = -1) -> Callable[[Tensors], Tensors]:
    """`old` becomes `new` in all keys, or in the first so many that have it."""

    def change(tensors: Tensors) -> Tensors:
        left = [key for key in tensors if old in key]
        left = left if count < 0 else left[:count]
        return {key.replace(old, new) if key in left else key: t for key, t in tensors.items()}

    return change


def typed(dtype: torch.dtype) -> Callable[[Tensors], Tensors]:
    return lambda t: {**t, f"{Q0}.lora_A.weight": (t[f"{Q0}.lora_A.weight"] * 100).to(dtype)}


def spoilt(ending: str) -> Callable[[Tensors], Tensors]:
    """One key that nobody can read any more."""

    def change(tensors: Tensors) -> Tensors:
        key = next(key for key in tensors if key.endswith(ending))
        return {(f"{k}.x" if k == key else k): t for k, t in tensors.items()}

    return change


def without_config(folder: Path) -> Path:
    (folder / "adapter_config.json").unlink()
    return folder


DAMAGE: dict[str, tuple[Make, list[str]]] = {
    "a half under a misspelled module": (peft(renamed("0.self_attn.q_proj.lora_A", "0.self_attn.qproj.lora_A")), ["T101"]),
    "a target that ends in the midst of a name": (peft(target_modules=["attn.q_proj", "v_proj"]), ["C242"]),
    "one factor of integers": (peft(typed(torch.int8)), ["T123"]),
    "one factor of zeros once they are integers": (peft(lambda t: typed(torch.int8)(
        {**t, f"{Q0}.lora_A.weight": t[f"{Q0}.lora_A.weight"] / 1000})), ["T123"]),
    "one factor of doubles": (peft(typed(torch.float64)), ["T122"]),
    "one factor of halves": (peft(typed(torch.float16)), ["T120"]),
    "a key that nobody knows, of a LoRA": (peft(spoilt("q_proj.lora_A.weight")), ["F023"]),
    "a key that nobody knows, in capitals": (
        peft(lambda t: {(k.upper() if k == f"{Q0}.lora_B.weight" else k): v for k, v in t.items()}), ["F023"]),
    "a key that nobody knows, of Kohya's": (kohya(spoilt("attn2_to_k.lora_up.weight")), ["F023"]),
    "an alpha that nobody knows": (kohya(spoilt("attn2_to_k.alpha")), ["F023"]),
    "a stray parameter without peft's prefix": (peft(lambda t: {**t, "zzz.weight": torch.ones(3, 3)}), ["C253"]),
    "no config": (lambda p: without_config(peft_folder(p)), ["C202"]),
    "tokens listed, none of them": (peft(trainable_token_indices=[]), ["C256"]),
    "a dropout that is no probability": (peft(lora_dropout=2), ["C203"]),
    "a start that only training could make": (peft(init_lora_weights="corda"), ["C218"]),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_has_one_code(name: str, tmp_path: Path) -> None:
    make, expected = DAMAGE[name]
    assert codes(make(tmp_path)) == expected


SOUND: dict[str, Make] = {
    "no tokens of no embedding": peft(trainable_token_indices={}),
    "a dropout of everything": peft(lora_dropout=1),
}


@pytest.mark.parametrize("name", SOUND)
def test_what_peft_takes_is_sound(name: str, tmp_path: Path) -> None:
    assert codes(SOUND[name](tmp_path)) == []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"trainable_token_indices": []}, "KeyError"),
        ({"lora_dropout": 2}, "ValueError"),
        ({"init_lora_weights": "corda"}, "ValueError"),
        ({"trainable_token_indices": {}}, ""),
        ({"lora_dropout": 1}, ""),
    ],
)
def test_what_peft_makes_of_it(fields: dict[str, Any], error: str, tmp_path: Path) -> None:
    library = pytest.importorskip("peft")
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=64,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    raised = ""
    try:
        library.PeftModel.from_pretrained(model, str(peft(**fields)(tmp_path)))
    except (KeyError, ValueError) as told:
        raised = type(told).__name__
    assert raised == error


def test_two_faults_have_two_codes(tmp_path: Path) -> None:
    path = peft(lambda t: {k: v for k, v in t.items() if k != f"{Q0}.lora_A.weight"}, inference_mode=False)(tmp_path)
    assert codes(path) == ["C212", "T101"]
    path = edit(
        kohya_file(tmp_path), lambda t: {**spoilt("attn1_to_v.lora_up.weight")(t), "optimizer.x": torch.ones(2)}
    )
    assert codes(path) == ["F023", "T133"]


def test_a_prefix_before_pefts_own(tmp_path: Path) -> None:
    folder = peft(renamed("base_model.model.model", "policy.base_model.model.model"))(tmp_path)
    (finding,) = found(folder)
    assert finding.code == "T131"
    assert finding.change is not None
    assert set(finding.change.keys.values()) == set(load(peft_folder(tmp_path, name="as it was") / WEIGHTS)[0])
    mend(found(folder).adapters[0])
    assert codes(folder) == []


WEIGHTS = "adapter_model.safetensors"


def test_the_dead_are_told_of_once(tmp_path: Path) -> None:
    folder = peft(target_modules=["q_proj", "v_proj", "k_proj"], alpha_pattern={"k_proj": 4})(tmp_path)
    assert codes(folder) == ["C243"]


def test_what_deepspeed_keeps_is_no_adapter(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path)
    step = folder / "global_step10"
    step.mkdir()
    for name in ("mp_rank_00_model_states.pt", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"):
        torch.save({"module": {"a": torch.ones(2)}, "optimizer": None}, step / name)
    assert codes(folder) == []


def test_a_folder_is_listed_once_for_all_that_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [diffusers_file(tmp_path, f"{n}.safetensors") for n in range(12)]
    listed: list[str] = []
    listdir = os.listdir

    def counted(path: str) -> list[str]:
        listed.append(os.path.realpath(path))
        return listdir(path)

    monkeypatch.setattr(os, "listdir", counted)
    assert codes(tmp_path) == []
    assert listed.count(str(tmp_path.resolve())) == 1
    listed.clear()
    assert [place.path for place in discover(map(str, paths))] == [str(path) for path in paths]
    assert found(paths[0]).findings == ()
    assert listed.count(str(tmp_path.resolve())) <= 1


def test_a_file_that_comes_later_is_seen(tmp_path: Path) -> None:
    assert codes(diffusers_file(tmp_path, "one.safetensors")) == []
    diffusers_file(tmp_path, "two.safetensors")
    assert len(found(tmp_path).adapters) == 2


def test_thousands_of_adapters_names_are_not_all_tried(tmp_path: Path) -> None:
    """As many names as a header may have, whose every one might be an adapter's."""
    entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    keys = [f"base_model.model.{n}.lora_A.n{n}.weight" for n in range(9000)]
    path = join(tmp_path / "lora.safetensors", "{" + ",".join(f'"{key}":{entry}' for key in keys) + "}", b"")
    reading = read_keys(PEFT, keys)
    assert len(reading.claims) == 1
    assert "F023" in codes(path)


def test_of_several_names_the_one_that_is_meant(tmp_path: Path) -> None:
    """The name of an adapter is found wherever it may stand, once or twice."""
    tensors = {f"base_model.model.{n}.lora_{h}.mine.weight": torch.ones(2, 2) for n in range(3) for h in "AB"}
    save_file(tensors | {"base_model.model.0.lora_embedding_A.mine": torch.ones(2, 2)}, tmp_path / "x.safetensors")
    reading = read_keys(PEFT, load(tmp_path / "x.safetensors")[0])
    assert reading.adapter_name == "mine"
    assert not reading.unclaimed
