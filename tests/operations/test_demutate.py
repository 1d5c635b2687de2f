"""PiSSA, OLoRA, CorDA and LoRA-GA, trained by peft a few steps on small models, made relative to the published base."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import adapterops as ao
from adapterops import errors
from adapterops.methods import METHODS

pytestmark = pytest.mark.usefixtures("one_thread", "quiet")

TOKENS = torch.arange(24).reshape(2, 12) % 32


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, tie_word_embeddings=False, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=32, n_positions=32, n_embd=16, n_layer=2, n_head=2, initializer_range=0.2,
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


LLAMA = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
GPT2 = {"target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 12},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "patterns": {
        "r": 4, "lora_alpha": 8, "rank_pattern": {"q_proj": 2, "c_attn": 3}, "alpha_pattern": {"down_proj": 4, "mlp.c_proj": 5},
    },
    "rslora with patterns": {
        "r": 4, "lora_alpha": 8, "use_rslora": True, "rank_pattern": {"q_proj": 2, "c_attn": 3},
        "alpha_pattern": {"v_proj": 3, "mlp.c_proj": 5},
    },
    "dora": {"r": 4, "lora_alpha": 8, "use_dora": True},
    "saved module": {"r": 4, "lora_alpha": 8, "modules_to_save": ["lm_head"]},
}  # fmt: skip
INITS = ("pissa", "pissa_niter_4", "olora", "corda", "lora_ga")


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def trained(base: nn.Module, init: str, options: Mapping[str, Any], folder: Path, steps: int = 4) -> PeftModel:
    """The model after some steps; its adapter before (`initial`) and after (`trained`) is in `folder`."""
    config = LoraConfig(init_lora_weights=init, **options)
    save_file({k: v.clone() for k, v in base.state_dict().items()}, folder / "base.safetensors")

    def run() -> None:
        for _ in range(3):
            base(TOKENS[:1])  # peft's statistics are of one sequence at a time

    if init == "corda":
        config.corda_config = CordaConfig(corda_method="kpm")
        preprocess_corda(base, config, run_model=run)
    if init == "lora_ga":
        config.lora_ga_config = LoraGAConfig()
        preprocess_loraga(base, config, lambda: base(TOKENS, labels=TOKENS).loss.backward())
    torch.manual_seed(1)
    model = get_peft_model(base, config)
    model.save_pretrained(folder / "initial")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
    model.eval()
    model.save_pretrained(folder / "trained")
    return model


def make(base: Callable[[], nn.Module], init: str, options: str, folder: Path) -> torch.Tensor:
    """The outputs of the trained model, whose files are in `folder`."""
    targets = LLAMA if base is llama else GPT2
    folder.mkdir(exist_ok=True)
    return outputs(trained(base(), init, {**OPTIONS[options], **targets}, folder))


def loaded(base: Callable[[], nn.Module], folder: Path) -> torch.Tensor:
    return outputs(PeftModel.from_pretrained(base(), str(folder)).eval())


def near(one: torch.Tensor, two: torch.Tensor, tolerance: float) -> bool:
    return bool(torch.allclose(one, two, rtol=tolerance, atol=tolerance * float(two.abs().max())))


def runs(base: Callable[[], nn.Module], init: str, options: str) -> bool:
    """Whether peft can train it: OLoRA's factors fit a Conv1D only where it is square, LoRA-GA's runs without DoRA."""
    return not (base is gpt2 and init == "olora")


CASES = [
    pytest.param(base, init, options, id=f"{base.__name__} {init} {options}")
    for base in (llama, gpt2)
    for init in INITS
    for options in OPTIONS
    if runs(base, init, options)
]


@pytest.mark.parametrize(("base", "init", "options"), CASES)
def test_with_the_initial_adapter(base: Callable[[], nn.Module], init: str, options: str, tmp_path: Path) -> None:
    expected = make(base, init, options, tmp_path)
    assert not near(outputs(base()), expected, 1e-2), "nothing was learnt, so nothing is shown"
    result = ao.to_lora(tmp_path / "trained", tmp_path / "lora", initial=tmp_path / "initial")
    assert near(loaded(base, tmp_path / "lora"), expected, 1e-5)
    config = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    before = json.loads((tmp_path / "trained/adapter_config.json").read_text())
    assert config["init_lora_weights"] is True
    for name in ("task_type", "lora_dropout", "modules_to_save", "use_dora", "base_model_name_or_path", "bias"):
        assert config.get(name) == before.get(name) or not (config.get(name) or before.get(name))
    ranks = {m.module: m.rank for m in result.modules if m.rank is not None}
    assert set(ranks.values()) <= {4, 6, 8}
    if options == "dora":
        old, new = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("trained", "lora"))
        magnitudes = [key for key in old if "magnitude" in key]
        assert magnitudes
        assert all(torch.equal(old[key], new[key]) for key in magnitudes)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("base", "init"), [(llama, "pissa"), (llama, "olora"), (gpt2, "pissa")])
def test_from_the_base_alone(base: Callable[[], nn.Module], init: str, options: str, tmp_path: Path) -> None:
    expected = make(base, init, options, tmp_path)
    ao.to_lora(tmp_path / "trained", tmp_path / "lora", base_weights=tmp_path / "base.safetensors")
    assert near(loaded(base, tmp_path / "lora"), expected, 1e-4)


@pytest.mark.parametrize("init", INITS)
def test_from_the_base_and_the_changed_base(init: str, tmp_path: Path) -> None:
    folder = tmp_path / "made"
    folder.mkdir()
    model = trained(llama(), init, {**OPTIONS["rslora"], **LLAMA}, folder)
    expected = outputs(model)
    residual = {
        key.replace(".base_layer", ""): value.clone()
        for key, value in model.base_model.model.state_dict().items()
        if "lora_" not in key
    }
    save_file(residual, tmp_path / "residual.safetensors")
    ao.to_lora(
        folder / "trained", tmp_path / "lora", base_weights=folder / "base.safetensors",
        residual_base=tmp_path / "residual.safetensors",
    )  # fmt: skip
    assert near(loaded(llama, tmp_path / "lora"), expected, 1e-4)


def test_olora_of_a_square_conv1d_is_transposed(tmp_path: Path) -> None:
    """peft's QR is of the weight as GPT-2 keeps it, (in, out), so its factors are the other way round."""
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["attn.c_proj"], "fan_in_fan_out": True}
    expected = outputs(trained(gpt2(), "olora", options, tmp_path))
    ao.to_lora(tmp_path / "trained", tmp_path / "one", initial=tmp_path / "initial")
    ao.to_lora(tmp_path / "trained", tmp_path / "two", base_weights=tmp_path / "base.safetensors")
    assert near(loaded(gpt2, tmp_path / "one"), expected, 1e-5)
    assert near(loaded(gpt2, tmp_path / "two"), expected, 1e-4)


def test_recompressed_to_its_own_rank(tmp_path: Path) -> None:
    make(llama, "pissa", "plain", tmp_path)
    result = ao.to_lora(tmp_path / "trained", tmp_path / "lora", initial=tmp_path / "initial", rank=4)
    assert {m.rank for m in result.modules} == {4}
    whole = ao.load(tmp_path / "trained")
    initial = ao.load(tmp_path / "initial")
    for report in result.modules:
        one, two = (a.updates["model", report.module, "lora"] for a in (whole, initial))
        b, a, b0, a0 = (u.tensors[role].torch().double() for u in (one, two) for role in "BA")
        s = torch.linalg.svdvals(b @ a - b0 @ a0)
        assert report.error == pytest.approx(float(s[4:].norm() / s.norm()), rel=0.01)


def test_random_start_is_estimated_only_if_that_is_accepted(tmp_path: Path) -> None:
    make(llama, "pissa_niter_4", "plain", tmp_path)
    base = tmp_path / "base.safetensors"
    with pytest.raises(errors.CannotRepresent, match=r"pissa_niter_4.*random.*--accept-approximate.*--initial INIT"):
        ao.to_lora(tmp_path / "trained", tmp_path / "estimate", base_weights=base)
    result = ao.to_lora(tmp_path / "trained", tmp_path / "estimate", base_weights=base, accept_approximate=True)
    ao.to_lora(tmp_path / "trained", tmp_path / "exact", initial=tmp_path / "initial")
    note = next(note for note in result.written.notes if note.startswith("approximate: pissa_niter_4"))
    told = float(note.partition("by up to ")[2].split()[0])
    exact, estimate = (ao.load(tmp_path / name) for name in ("exact", "estimate"))
    off = []
    for key, update in exact.updates.items():
        one, two = (METHODS["lora"].delta(u) for u in (update, estimate.updates[key]))
        off.append(float((one - two).norm() / two.norm()))
    assert told / 3 < max(off) < told * 3


@pytest.mark.parametrize("init", ["corda", "lora_ga"])
def test_start_from_data_needs_the_initial_adapter(init: str, tmp_path: Path) -> None:
    make(llama, init, "plain", tmp_path)
    for options in ({}, {"base_weights": tmp_path / "base.safetensors"}):
        with pytest.raises(errors.UsageError, match=rf"{init}.*--initial INIT.*--residual-base DIR"):
            ao.to_lora(tmp_path / "trained", tmp_path / "lora", **options)
    assert not (tmp_path / "lora").exists()


def test_without_a_source_it_says_which_there_are(tmp_path: Path) -> None:
    make(llama, "pissa", "plain", tmp_path)
    with pytest.raises(errors.UsageError, match=r"pissa.*--initial INIT.*--base-weights BASE"):
        ao.to_lora(tmp_path / "trained", tmp_path / "lora")
    with pytest.raises(errors.UsageError, match=r"--residual-base is the changed base; .*give both"):
        ao.to_lora(tmp_path / "trained", tmp_path / "lora", residual_base=tmp_path / "base.safetensors")


def test_another_adapters_start_is_refused(tmp_path: Path) -> None:
    make(llama, "pissa", "plain", tmp_path)
    make(llama, "pissa", "dora", tmp_path / "other")
    with pytest.raises(errors.Conflict, match=r"scale of .* another adapter's start"):
        ao.to_lora(tmp_path / "trained", tmp_path / "lora", initial=tmp_path / "other/initial")
    options = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj"]}
    (tmp_path / "third").mkdir()
    trained(llama(), "pissa", options, tmp_path / "third", steps=1)
    with pytest.raises(errors.Conflict, match=r"has nothing for .*another adapter's start"):
        ao.to_lora(tmp_path / "trained", tmp_path / "lora", initial=tmp_path / "third/initial")
    with pytest.raises(errors.Conflict, match=r"was taken out of the base.*another adapter's start"):
        ao.to_lora(tmp_path / "third/trained", tmp_path / "lora", initial=tmp_path / "initial")
    assert not (tmp_path / "lora").exists()


def test_as_peft_converts_where_it_can(tmp_path: Path) -> None:
    """peft's own conversion needs the live model; the deltas are the same."""
    base = llama()
    model = trained(base, "pissa", {**OPTIONS["plain"], **LLAMA}, tmp_path)
    copied = copy.deepcopy(model)
    copied.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "theirs", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    ao.to_lora(tmp_path / "trained", tmp_path / "ours", initial=tmp_path / "initial")
    assert near(loaded(llama, tmp_path / "ours"), loaded(llama, tmp_path / "theirs"), 1e-6)


class Large(nn.Module):
    """One weight that is too large to be decomposed in full, with singular values that fall as a trained one's do."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.proj = nn.Linear(1100, 1400, bias=False)
        left, right = torch.randn(1400, 64, generator=generator), torch.randn(64, 1100, generator=generator)
        falling = 0.06 * (torch.arange(1, 65) / 64) ** -0.25
        with torch.no_grad():
            self.proj.weight.copy_(torch.randn(1400, 1100, generator=generator) + (left * falling) @ right)


def _dropped(a: torch.Tensor) -> torch.Tensor:
    """A whose first, most important row training has put to nothing, and whose second is as the third."""
    out = a.clone()
    out[0], out[1] = 0.0, a[2]
    return out


BECOME: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "near": lambda a: a + 0.03 * a.norm(dim=1, keepdim=True) * torch.randn(a.shape) / a.shape[1] ** 0.5,
    "far": lambda a: torch.randn(a.shape),
    "dropped": _dropped,
    "nothing": torch.zeros_like,
}
"""What training may have made of A₀."""


@pytest.mark.parametrize("become", BECOME)
@pytest.mark.parametrize("rank", [8, 64])
def test_large_weights_whatever_became_of_the_factors(rank: int, become: str, tmp_path: Path) -> None:
    base = Large()
    weight = base.proj.weight.detach().double()
    save_file({k: v.clone() for k, v in base.state_dict().items()}, tmp_path / "base.safetensors")
    config = LoraConfig(init_lora_weights="pissa", r=rank, lora_alpha=rank, target_modules=["proj"])
    model = get_peft_model(base, config)
    layer: Any = model.base_model.model.proj
    torch.manual_seed(1)
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(BECOME[become](layer.lora_A["default"].weight))
        mutated = layer.base_layer.weight.double()
        changed = layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
    model.save_pretrained(tmp_path / "trained")
    ao.to_lora(tmp_path / "trained", tmp_path / "lora", base_weights=tmp_path / "base.safetensors")
    made = load_file(tmp_path / "lora/adapter_model.safetensors")
    b, a = (made[f"base_model.model.proj.lora_{role}.weight"].double() for role in "BA")
    # In what the weight itself is rounded to: peft's own start is no nearer.
    assert float((weight + b @ a - mutated - changed).norm() / weight.norm()) < 3e-6


def test_numbers_that_are_none_are_named_before_anything_is_searched(tmp_path: Path) -> None:
    make(llama, "pissa", "plain", tmp_path)
    path = tmp_path / "trained/adapter_model.safetensors"
    tensors = load_file(path)
    name = next(key for key in tensors if "lora_A" in key)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(errors.BrokenAdapter, match=r"lora_A.*NaN"):
        ao.to_lora(tmp_path / "trained", tmp_path / "lora", base_weights=tmp_path / "base.safetensors")
