"""`convert --to peft --for vllm|sglang`: what the servers read computes what peft computes with the source.

`served` reads a folder as the servers' loaders do (vllm `lora/peft_helper.py`, `lora/utils.py`; sglang `srt/lora/lora.py`):
one scale for all, from r and lora_alpha alone, and an error for whatever they stop at.  peft itself says what is right.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from math import sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel
from peft_models import PREFIX, fill, saved, trained, weights_of
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import adapterops as ao
from adapterops.cli.main import run
from adapterops.errors import CannotRepresent, UsageError

LLAMA: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "tie_word_embeddings": False,
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


def llama() -> nn.Module:
    return fill(LlamaForCausalLM(LlamaConfig(**LLAMA)))


def folder(tmp_path: Path, model: Callable[[], nn.Module] = llama, **fields: Any) -> Path:
    """A LoRA as peft trains and saves it."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "task_type": "CAUSAL_LM", **fields})
    return saved(trained(model(), config), tmp_path / "source")


def config_file(tmp_path: Path) -> Path:
    """The base's config.json."""
    LlamaConfig(**LLAMA, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / "base")
    return tmp_path / "base" / "config.json"


def pefts_deltas(source: Path, model: Callable[[], nn.Module] = llama) -> dict[str, Tensor]:
    """What peft adds to each module's weight."""
    loaded = PeftModel.from_pretrained(model(), str(source))
    layers = {n: m for n, m in loaded.named_modules() if hasattr(m, "get_delta_weight") and hasattr(m, "lora_A")}
    return {name.removeprefix(PREFIX): layer.get_delta_weight("default").detach() for name, layer in layers.items()}


def fields_of(out: Path) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads((out / "adapter_config.json").read_text())
    return fields


def served(out: Path, server: str) -> dict[str, Tensor]:
    """The deltas as the server makes them; fails where it does."""
    config, tensors = fields_of(out), load_file(out / "adapter_model.safetensors")
    assert config["peft_type"] == "LORA"
    assert not config.get("modules_to_save")
    assert not config.get("use_dora")
    assert config.get("bias", "none") == "none"
    assert isinstance(config["target_modules"], list)
    rank, scale = config["r"], config["lora_alpha"] / config["r"]
    if server == "vllm" and config.get("use_rslora"):
        scale = config["lora_alpha"] / sqrt(config["r"])
    factors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.endswith((".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")):
            continue  # the base's own
        match = re.fullmatch(r"base_model\.model\.(.*)\.(?:lora_(?:embedding_)?([AB]))(?:\.weight)?", key)
        assert match, f"{key} is unsupported LoRA weight"
        factors.setdefault(match[1], {})[match[2]] = tensor
    if server == "sglang":
        named = {name.rpartition(".")[2] for name in config["target_modules"]}
        for name, pair in factors.items():
            assert (pair["A"].shape[0], pair["B"].shape[1]) == (rank, rank)
            assert name.rpartition(".")[2] in named
            parent, _, own = name.rpartition(".")
            if own in ("q_proj", "k_proj", "v_proj"):
                assert {f"{parent}.q_proj", f"{parent}.v_proj"} <= factors.keys()
            if own == "up_proj":
                assert f"{parent}.gate_proj" in factors
    return {name: scale * pair["B"] @ pair["A"] for name, pair in factors.items()}


def insist_on_same(out: Path, source: Path, server: str, model: Callable[[], nn.Module] = llama) -> None:
    """The server and peft make of the output what peft makes of the source."""
    wanted = pefts_deltas(source, model)
    for deltas in (served(out, server), pefts_deltas(out, model)):
        assert wanted.keys() <= deltas.keys()
        for name, delta in deltas.items():
            torch.testing.assert_close(delta, wanted.get(name, torch.zeros_like(delta)), rtol=1e-6, atol=1e-7)


def no_errors(out: Path, server: str) -> None:
    report = ao.validate(out, targets=[server])
    wrong = [f.rule.code for f in report.findings if f.rule.code.startswith("L") or f.severity == "error"]
    assert set(wrong) <= {"L552"}  # what to start vLLM with


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "regex": {"target_modules": r".*layers\.0\.self_attn\.(q_proj|v_proj)"},
    "all-linear": {"target_modules": "all-linear"},
    "alphas": {"alpha_pattern": {"q_proj": 16, "layers.1.self_attn.v_proj": 3}},
    "ranks": {"rank_pattern": {"q_proj": 8, "layers.1.self_attn.k_proj": 2}},
    "ranks and alphas": {"target_modules": ALL, "rank_pattern": {"up_proj": 2}, "alpha_pattern": {"up_proj": 5}},
    "rslora": {"use_rslora": True},
    "rslora, ranks": {"use_rslora": True, "rank_pattern": {"q_proj": 9, "k_proj": 2}, "alpha_pattern": {"q_proj": 6}},
    "layers": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "embeddings": {"target_modules": ["q_proj", "v_proj", "lm_head"]},
}


@pytest.mark.parametrize("server", ["vllm", "sglang"])
@pytest.mark.parametrize("case", CASES)
def test_a_server_computes_what_peft_does(tmp_path: Path, case: str, server: str) -> None:
    source = folder(tmp_path, **CASES[case])
    base = config_file(tmp_path) if case in ("alphas", "layers") else None
    result = ao.convert(source, "peft", tmp_path / "out", reader=server, base=base)
    assert result.proof is not None
    insist_on_same(tmp_path / "out", source, server)
    no_errors(tmp_path / "out", server)


def test_what_is_served_already_stays_as_it_is(tmp_path: Path) -> None:
    source = folder(tmp_path, use_rslora=True)
    result = ao.convert(source, "peft", tmp_path / "out", reader="vllm")
    assert result.proof is not None
    assert result.proof.exact
    assert result.notes == ()
    assert fields_of(tmp_path / "out") == fields_of(source)


def test_only_the_exceptions_are_folded(tmp_path: Path) -> None:
    source = folder(tmp_path, alpha_pattern={"layers.1.self_attn.v_proj": 3})
    result = ao.convert(source, "peft", tmp_path / "out", reader="vllm")
    before, after = (weights_of(path) for path in (source, tmp_path / "out"))
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    assert changed == [f"{PREFIX}model.layers.1.self_attn.v_proj.lora_B.weight"]
    assert fields_of(tmp_path / "out")["alpha_pattern"] == {}
    assert any("model.layers.1.self_attn.v_proj have another scale than 2" in note for note in result.notes)


def test_ranks_are_filled_up_with_zeros_exactly(tmp_path: Path) -> None:
    source = folder(tmp_path, rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 4})
    result = ao.convert(source, "peft", tmp_path / "out", reader="vllm")
    assert result.proof is not None
    assert result.proof.largest_error == 0.0
    before, after = (weights_of(path) for path in (source, tmp_path / "out"))
    stem = f"{PREFIX}model.layers.0.self_attn.q_proj"
    wide = after[f"{stem}.lora_B.weight"]
    assert torch.equal(wide[:, :2], before[f"{stem}.lora_B.weight"])
    assert not wide[:, 2:].any()
    assert not after[f"{stem}.lora_A.weight"][2:].any()
    assert any("filled up with zeros to rank 4" in note for note in result.notes)


def test_a_module_that_learnt_nothing_is_filled_up_too(tmp_path: Path) -> None:
    source = folder(tmp_path, rank_pattern={"q_proj": 2})
    tensors = weights_of(source)
    tensors = {key: tensor * ("q_proj.lora_B" not in key) for key, tensor in tensors.items()}
    save_file(tensors, source / "adapter_model.safetensors")
    ao.convert(source, "peft", tmp_path / "out", reader="sglang")
    insist_on_same(tmp_path / "out", source, "sglang")


def test_halves_are_rounded_once(tmp_path: Path) -> None:
    """A folded scale and a narrower type: one rounding, not two."""
    source = folder(tmp_path, alpha_pattern={"q_proj": 5})
    ao.convert(source, "peft", tmp_path / "out", reader="vllm", dtype="bfloat16")
    before, after = (weights_of(path) for path in (source, tmp_path / "out"))
    for key, tensor in before.items():
        factor = 5 / 8 if "q_proj.lora_B" in key else 1.0
        assert torch.equal(after[key], (tensor.double() * factor).bfloat16())


def test_all_of_the_scale_can_be_folded(tmp_path: Path) -> None:
    source = folder(tmp_path, alpha_pattern={"q_proj": 16})
    ao.convert(source, "peft", tmp_path / "out", reader="sglang", fold_alpha=True)
    insist_on_same(tmp_path / "out", source, "sglang")
    assert fields_of(tmp_path / "out")["lora_alpha"] == fields_of(tmp_path / "out")["r"]


@pytest.mark.parametrize("targets", [["q_proj", "o_proj"], ["k_proj", "v_proj"], ["up_proj", "down_proj"]])
def test_packed_parts_stand_as_zeros_for_sglang(tmp_path: Path, targets: list[str]) -> None:
    source = folder(tmp_path, target_modules=targets)
    with pytest.raises(CannotRepresent, match="--base CONFIG"):
        ao.convert(source, "peft", tmp_path / "out", reader="sglang")
    result = ao.convert(source, "peft", tmp_path / "out", reader="sglang", base=config_file(tmp_path))
    insist_on_same(tmp_path / "out", source, "sglang")
    assert any("stand as zeros" in note for note in result.notes)
    ao.convert(source, "peft", tmp_path / "vllm", reader="vllm")  # which takes any part alone
    assert served(tmp_path / "vllm", "vllm").keys() == pefts_deltas(source).keys()


@pytest.mark.parametrize("server", ["vllm", "sglang"])
@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"use_dora": True}, "merge SRC --method svd"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias none only"),
        ({"lora_bias": True}, "lora_bias"),
        ({"trainable_token_indices": {"embed_tokens": [1, 5]}}, "trained rows"),
        ({"init_lora_weights": "pissa"}, "to-lora SRC --initial"),
        ({"alora_invocation_tokens": [1, 2]}, "LoRA only"),
    ],
)
def test_what_cannot_be_served_is_refused(tmp_path: Path, fields: dict[str, Any], told: str, server: str) -> None:
    biased = lambda: fill(LlamaForCausalLM(LlamaConfig(**LLAMA, attention_bias=True)))  # noqa: E731
    source = folder(tmp_path, biased if "bias" in fields or "lora_bias" in fields else llama, **fields)
    with pytest.raises(CannotRepresent, match=told):
        ao.convert(source, "peft", tmp_path / "out", reader=server)
    assert not (tmp_path / "out").exists()


def test_the_way_around_dora_works(tmp_path: Path) -> None:
    """A DoRA folded by `merge --method svd`, as the refusal says, is served and computes what peft computes."""
    source = folder(tmp_path, use_dora=True)
    llama().save_pretrained(tmp_path / "weights")
    run_quietly("merge", source, "--method", "svd", "--rank", "64", "--base-weights", tmp_path / "weights",
                "--to", "peft", "-o", tmp_path / "folded")  # fmt: skip
    ao.convert(tmp_path / "folded", "peft", tmp_path / "out", reader="vllm")
    tokens = torch.arange(12).reshape(2, 6)
    wanted, got = (PeftModel.from_pretrained(llama(), str(p)).eval()(tokens).logits for p in (source, tmp_path / "out"))
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)
    no_errors(tmp_path / "out", "vllm")


@pytest.mark.parametrize("server", ["vllm", "sglang"])
@pytest.mark.parametrize(
    ("fields", "lost"),
    [
        ({"modules_to_save": ["lm_head"], "alpha_pattern": {"q_proj": 16}}, "lm_head"),
        ({"bias": "all"}, "bias"),
        ({"lora_bias": True}, "lora_B.bias"),
        ({"trainable_token_indices": {"embed_tokens": [1, 5]}}, "embed_tokens"),
    ],
)
def test_what_stands_beside_the_factors_can_be_left_out(
    tmp_path: Path, fields: dict[str, Any], lost: str, server: str
) -> None:
    biased = lambda: fill(LlamaForCausalLM(LlamaConfig(**LLAMA, attention_bias=True)))  # noqa: E731
    model = biased if "bias" in fields or "lora_bias" in fields else llama
    source = folder(tmp_path, model, **fields)
    result = ao.convert(source, "peft", tmp_path / "out", reader=server, allow_drop=True)
    assert any(lost in line for line in result.dropped)
    wanted = pefts_deltas(source, model)
    for deltas in (served(tmp_path / "out", server), pefts_deltas(tmp_path / "out", model)):
        assert deltas.keys() == wanted.keys()
        for name, delta in deltas.items():
            torch.testing.assert_close(delta, wanted[name], rtol=1e-6, atol=1e-7)
    no_errors(tmp_path / "out", server)


def test_a_changed_base_may_be_the_one_that_is_served(tmp_path: Path) -> None:
    source = folder(tmp_path, init_lora_weights="pissa")
    ao.convert(source, "peft", tmp_path / "out", reader="vllm", fields={"init_lora_weights": True})
    assert fields_of(tmp_path / "out")["init_lora_weights"] is True
    assert all(torch.equal(tensor, weights_of(source)[key]) for key, tensor in weights_of(tmp_path / "out").items())


def test_the_usual_keys_whatever_the_file_had(tmp_path: Path) -> None:
    """A wrapper's prefix and an adapter's name, which a server would take for parts of modules' names."""
    source = folder(tmp_path)
    tensors = {f"module.{key.replace('.weight', '.default.weight')}": t for key, t in weights_of(source).items()}
    save_file(tensors, source / "adapter_model.safetensors")
    ao.save(ao.load(source), tmp_path / "out", reader="vllm")
    assert served(tmp_path / "out", "vllm").keys() == {
        f"model.layers.{layer}.self_attn.{name}" for layer in range(2) for name in ATTENTION
    }


def test_another_method_is_refused_with_the_way(tmp_path: Path) -> None:
    source = saved(trained(llama(), IA3Config(target_modules=["k_proj"], feedforward_modules=[])), tmp_path / "source")
    with pytest.raises(CannotRepresent, match=r"adapterops to-lora"):
        ao.convert(source, "peft", tmp_path / "out", reader="vllm")


def test_experts_parameters_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    stem = f"{PREFIX}model.layers.0.mlp.experts"
    save_file({f"{stem}.lora_A.weight": torch.ones(8, 64), f"{stem}.lora_B.weight": torch.ones(64, 8)},
              source / "adapter_model.safetensors")  # fmt: skip
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": [], "lora_dropout": 0.0}
    fields["target_parameters"] = ["mlp.experts.down_proj"]
    (source / "adapter_config.json").write_text(json.dumps(fields))
    with pytest.raises(CannotRepresent, match="target_parameters"):
        ao.convert(source, "peft", tmp_path / "out", reader="vllm")


def test_experts_lose_the_root_rule_for_vllm(tmp_path: Path) -> None:
    """vLLM scales an expert's factors by alpha/r whatever the config's rule."""
    source = tmp_path / "source"
    source.mkdir()
    tensors = {}
    for expert in range(2):
        stem = f"{PREFIX}model.layers.0.mlp.experts.{expert}.down_proj"
        tensors |= {f"{stem}.lora_A.weight": torch.randn(4, 8), f"{stem}.lora_B.weight": torch.randn(6, 4)}
    save_file(tensors, source / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["down_proj"], "use_rslora": True}
    (source / "adapter_config.json").write_text(json.dumps(fields))
    ao.convert(source, "peft", tmp_path / "out", reader="vllm")
    config = fields_of(tmp_path / "out")
    assert (config["use_rslora"], config["lora_alpha"], config["r"]) == (False, 16, 4)
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in weights_of(tmp_path / "out").items())


def test_ranks_that_vllm_cannot_be_started_for(tmp_path: Path) -> None:
    source = folder(tmp_path, rank_pattern={"q_proj": 600})
    with pytest.raises(CannotRepresent, match="--rank 512"):
        ao.convert(source, "peft", tmp_path / "out", reader="vllm")
    (tmp_path / "more").mkdir()
    source = folder(tmp_path / "more", r=32)
    result = ao.convert(source, "peft", tmp_path / "out", reader="vllm")
    assert any("--max-lora-rank" in note for note in result.notes)


def test_sglang_finds_layers_by_one_name_only(tmp_path: Path) -> None:
    model = lambda: fill(GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=16)))  # noqa: E731
    source = folder(tmp_path, model, target_modules=["c_attn"], fan_in_fan_out=True)
    with pytest.raises(CannotRepresent, match=r"layers\.N"):
        ao.convert(source, "peft", tmp_path / "out", reader="sglang")
    ao.convert(source, "peft", tmp_path / "out", reader="vllm")
    assert fields_of(tmp_path / "out")["fan_in_fan_out"] is True


def test_a_file_of_another_format_is_served_too(tmp_path: Path) -> None:
    """Nothing but factors and an alpha: everything that a server reads is made."""
    source = folder(tmp_path)
    (source / "adapter_config.json").unlink()
    ao.convert(source / "adapter_model.safetensors", "peft", tmp_path / "out", reader="sglang", alpha=8.0,
               base=config_file(tmp_path))  # fmt: skip
    assert fields_of(tmp_path / "out")["target_modules"] == sorted(ATTENTION)
    served(tmp_path / "out", "sglang")


def run_quietly(*arguments: object) -> None:
    run([str(a) for a in arguments])  # leaves with SystemExit where it fails


def test_the_command_says_what_was_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = folder(tmp_path, alpha_pattern={"q_proj": 16})
    run_quietly("convert", source, "--to", "peft", "--for", "vllm", "-o", tmp_path / "out", "--json")
    told = json.loads(capsys.readouterr().out)
    assert told["for"] == "vllm"
    assert any("B holds the difference" in note for note in told["notes"])
    assert told["proof"]["largest_error"] <= told["proof"]["tolerance"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--to", "kohya", "--for", "vllm"), "--to peft --for vllm"),
        (("--to", "peft", "--for", "ollama"), "--to peft --for sglang"),
        (("--to", "miss", "--for", "vllm"), "--to peft --for vllm"),
    ],
)
def test_unknown_readers_are_usage_errors(
    tmp_path: Path, arguments: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run(["convert", str(tmp_path / "absent"), *arguments])
    assert stop.value.code == 2
    assert told in capsys.readouterr().err
    with pytest.raises(UsageError):
        ao.convert(tmp_path / "absent", arguments[1], reader=arguments[3])
