"""Faults that a review of PEFT's methods found: each stands here until it is mended."""

from __future__ import annotations

import json
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import peft_models as pm
import pytest
import torch
from peft_zoo import LINE, TOKENS, Case, llama, own
from safetensors.torch import save_file
from test_peft_methods import architecture_of
from torch import Tensor, nn

import adapterops as ao
from adapterops import errors
from adapterops.methods import METHODS
from adapterops.operations.lora_factors import Budget

_LINE = ["wide", "tall", "square"]


def _base_file(base: nn.Module, folder: Path, change: Callable[[str, Tensor], Tensor] = lambda _, t: t) -> Path:
    tensors = {name: change(name, tensor).clone().contiguous() for name, tensor in base.state_dict().items()}
    save_file(tensors, folder / "base.safetensors")
    return folder / "base.safetensors"


def _changed(folder: Path, **fields: Any) -> Path:
    config = {**pm.config_of(folder), **fields}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def _with(folder: Path, key: str, tensor: Tensor) -> Path:
    return pm.folder_with(folder, {**pm.weights_of(folder), key: tensor})


@contextmanager
def _seconds(limit: float) -> Iterator[None]:
    """Fail instead of waiting for ever."""

    def late(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# ---- wrong results without a word ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [peft.OFTConfig, peft.HiraConfig])
def test_lora_of_an_embedding_that_is_saved_too(kind: Any, tmp_path: Path) -> None:
    block = {"oft_block_size": 4} if kind is peft.OFTConfig else {"r": 2}
    model = peft.get_peft_model(llama(), kind(target_modules=["embed_tokens"], task_type="CAUSAL_LM", **block))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "embed_tokens" in name:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    folder = pm.saved(model.eval(), tmp_path / "original", save_embedding_layers=True)
    ao.to_lora(
        folder, tmp_path / "lora", to="peft", rank=100, base_weights=_base_file(llama(), tmp_path),
        reading={"base": architecture_of(llama())},
    )  # fmt: skip
    with torch.no_grad():
        expected, found = model(TOKENS)[0], pm.load(llama(), tmp_path / "lora")(TOKENS)[0]
    assert pm.apart([expected], [found]) < 1e-4


def test_lora_of_a_method_that_multiplies_a_saved_bias(tmp_path: Path) -> None:
    config = peft.GloraConfig(r=3, config_D_E="vector", target_modules=["wide", "square"], bias="glora_only")
    case = Case(LINE, config, shape=_trained_biases)
    model, folder = case.adapter(tmp_path / "original")
    ao.to_lora(folder, tmp_path / "lora", to="peft", rank=100, base_weights=_base_file(LINE(), tmp_path))
    assert pm.apart(case.outputs(model), case.outputs(pm.load(LINE(), tmp_path / "lora"))) < 1e-4


def _trained_biases(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("base_layer.bias"):
            parameter.data.add_(1)


_TOGETHER = {
    "vera": peft.VeraConfig(r=4, target_modules=_LINE, save_projection=False),
    "pvera": peft.PveraConfig(r=4, target_modules=_LINE, save_projection=False),
    "randlora": peft.RandLoraConfig(r=3, randlora_alpha=6, target_modules=_LINE, save_projection=False),
    "tinylora": peft.TinyLoraConfig(r=3, u=6, target_modules=_LINE, weight_tying=0.4),
}


@pytest.mark.parametrize("kind", _TOGETHER)
def test_modules_that_depend_on_a_dropped_one(kind: str, tmp_path: Path) -> None:
    """The largest module (of TinyLoRA the first) is taken away by a key that nobody knows."""
    lost = "wide" if kind == "tinylora" else "square"
    _, folder = Case(LINE, _TOGETHER[kind]).adapter(tmp_path / "original")
    base = architecture_of(LINE())
    fields = {"weight_tying": None} if kind == "tinylora" else {}
    whole = {u.module: u for u in ao.load(folder, base=base)}
    tensors = {**pm.weights_of(folder), f"base_model.model.{lost}.strange_thing": torch.zeros(3)}
    strange = pm.folder_with(tmp_path / "strange", tensors, pm.config_of(folder))
    try:
        rest = list(ao.load(strange, base=base, allow_drop=True, fields=fields))
    except errors.CannotRepresent:
        return
    layers = LINE()
    for update in rest:
        parameters = own(layers.get_submodule(update.module))
        one, two = (METHODS[update.method].change(u, parameters).weight for u in (update, whole[update.module]))
        assert one is not None
        assert two is not None
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_frod_of_a_rounded_basis_is_right_or_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    from peft_zoo import gpt2

    config = peft.FrodConfig(target_modules=["mlp.c_proj"], progressbar=False, fan_in_fan_out=True)
    case = Case(gpt2, config)
    _, folder = case.adapter(tmp_path / "original")
    rounded = {k: v.to(dtype) if v.is_floating_point() else v for k, v in pm.weights_of(folder).items()}
    pm.folder_with(folder, rounded)
    expected = case.outputs(pm.load(gpt2(), folder))
    try:
        ao.to_lora(
            folder, tmp_path / "lora", to="peft", rank=100, base_weights=_base_file(gpt2(), tmp_path),
            reading={"base": architecture_of(gpt2())},
        )  # fmt: skip
    except errors.CannotRepresent:
        return
    assert pm.apart(expected, case.outputs(pm.load(gpt2(), tmp_path / "lora"))) < 1e-3


@pytest.mark.parametrize("field", [{"eps": 0.1}, {"task_type": "FEATURE_EXTRACTION"}])
def test_shared_blocks_of_oft_with_a_field_set(field: dict[str, Any], tmp_path: Path) -> None:
    config = peft.OFTConfig(r=0, oft_block_size=4, block_share=True, target_modules=_LINE)
    _, folder = Case(LINE, config).adapter(tmp_path / "original")
    weights = pm.folder_with(tmp_path / "alone", pm.weights_of(folder)) / "adapter_model.safetensors"
    ao.convert(weights, to="peft", output=tmp_path / "converted", fields=field)
    assert pm.config_of(tmp_path / "converted").get("oft_block_size") == 4
    pm.load(LINE(), tmp_path / "converted")


def test_dropped_module_is_no_target(tmp_path: Path) -> None:
    config = peft.VBLoRAConfig(r=3, target_modules=_LINE, num_vectors=12, vector_length=8)
    _, folder = Case(LINE, config).adapter(tmp_path / "original")
    _with(folder, "base_model.model.square.strange_thing", torch.zeros(3))
    ao.convert(folder, to="peft", output=tmp_path / "converted", allow_drop=True)
    assert pm.adapted(pm.load(LINE(), tmp_path / "converted")) == {"wide", "tall"}


@pytest.mark.parametrize("known", [False, True])
def test_repaired_config_of_some_layers(known: bool, tmp_path: Path) -> None:
    config = peft.VeraConfig(r=3, target_modules=["q_proj"], layers_to_transform=[1])
    original, folder = Case(llama, config).adapter(tmp_path / "original")
    _changed(folder, r=4)
    base = architecture_of(llama()) if known else None
    ao.save(ao.load(folder, base=base, repair=True), tmp_path / "repaired", format="peft", repair=True)
    assert pm.adapted(pm.load(llama(), tmp_path / "repaired")) == pm.adapted(original)


def test_repaired_config_of_proportional_numbers(tmp_path: Path) -> None:
    config = peft.WaveFTConfig(n_frequency=20, target_modules=_LINE, proportional_parameters=True)
    case = Case(LINE, config)
    original, folder = case.adapter(tmp_path / "original")
    _changed(folder, target_modules=["nothing"])
    ao.save(ao.load(folder, repair=True), tmp_path / "repaired", format="peft", repair=True)
    assert pm.apart(case.outputs(original), case.outputs(pm.load(LINE(), tmp_path / "repaired"))) < 1e-6


@pytest.mark.parametrize("known", [False, True])
def test_repaired_config_of_one_vector(known: bool, tmp_path: Path) -> None:
    case = Case(LINE, peft.UniLoraConfig(r=3, target_modules=_LINE, theta_d_length=40))
    original, folder = case.adapter(tmp_path / "original")
    _changed(folder, theta_d_length=41)
    base = architecture_of(LINE()) if known else None
    ao.save(ao.load(folder, base=base, repair=True), tmp_path / "repaired", format="peft", repair=True)
    assert pm.apart(case.outputs(original), case.outputs(pm.load(LINE(), tmp_path / "repaired"))) < 1e-6


# ---- refused, though peft wrote it --------------------------------------------------------------------------


@pytest.mark.parametrize("known", [False, True])
def test_shared_blocks_of_an_adjusted_size(known: bool, tmp_path: Path) -> None:
    config = peft.OFTConfig(r=0, oft_block_size=7, block_share=True, target_modules=["tall"])
    _, folder = Case(LINE, config).adapter(tmp_path / "original")
    base = architecture_of(LINE()) if known else None
    ao.save(ao.load(folder, base=base), tmp_path / "converted", format="peft")


@pytest.mark.parametrize("drop", [False, True])
def test_all_biases_and_a_saved_module(drop: bool, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["wide"], bias="all", modules_to_save=["other"])
    case = Case(LINE, config)
    model, folder = case.adapter(tmp_path / "original")
    ao.convert(folder, to="peft", output=tmp_path / "converted", allow_drop=drop)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = peft.PeftModel.from_pretrained(LINE(), str(tmp_path / "converted")).eval()
    assert pm.apart(case.outputs(model), case.outputs(loaded)) < 1e-6


def test_alpha_and_its_pattern_where_most_modules_have_another(tmp_path: Path) -> None:
    patterns = {"tall": 5, "square": 5}
    case = Case(LINE, peft.LoraConfig(r=2, lora_alpha=16, target_modules=_LINE, alpha_pattern=patterns))
    model, folder = case.adapter(tmp_path / "original")
    weights = pm.folder_with(tmp_path / "alone", pm.weights_of(folder)) / "adapter_model.safetensors"
    ao.convert(weights, to="peft", output=tmp_path / "converted", alpha=16, fields={"alpha_pattern": patterns})
    assert pm.apart(case.outputs(model), case.outputs(pm.load(LINE(), tmp_path / "converted"))) < 1e-6


def test_base_weights_say_how_large_the_projections_are(tmp_path: Path) -> None:
    _, folder = Case(LINE, _TOGETHER["vera"]).adapter(tmp_path / "original")
    said = ""
    try:
        ao.to_lora(folder, tmp_path / "lora", to="peft", rank=4, base_weights=_base_file(LINE(), tmp_path))
    except errors.CannotRepresent as error:
        said = str(error)
    assert "--base-weights" not in said


# ---- faults instead of messages -----------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [{}, {"rank": 2}, {"energy": 0.9}, {"error": 0.1}, {"target_rank": 2}])
def test_adalora_module_without_a_triplet_left(budget: dict[str, Any], tmp_path: Path) -> None:
    _, folder = Case(LINE, peft.AdaLoraConfig(init_r=4, total_step=10, target_modules=_LINE)).adapter(tmp_path / "o")
    _with(folder, "base_model.model.wide.lora_E", torch.zeros(4, 1))
    ao.to_lora(folder, tmp_path / "lora", to="peft", **budget)


_WRONG_BASE = {
    "c3a": peft.C3AConfig(block_size=8, target_modules=["square"]),
    "loha": peft.LoHaConfig(r=6, target_modules=["square"]),
    "fourierft": peft.FourierFTConfig(n_frequency=20, target_modules=["square"]),
    "waveft": peft.WaveFTConfig(n_frequency=20, target_modules=["square"]),
    "randlora": peft.RandLoraConfig(r=3, target_modules=["square"]),
}


@pytest.mark.parametrize(
    "kind",
    [
        "c3a",
        "loha",
        "randlora",
        "fourierft",
        "waveft",
    ],
)
def test_base_weights_of_another_model(kind: str, tmp_path: Path) -> None:
    _, folder = Case(LINE, _WRONG_BASE[kind]).adapter(tmp_path / "original")
    base = _base_file(LINE(), tmp_path, lambda _, t: t[:-1])
    with pytest.raises(errors.AdapterOpsError, match="square"):
        ao.as_lora(ao.load(folder, base=architecture_of(LINE())), Budget(rank=1), base)


@pytest.mark.parametrize("kind", ["miss", "vera", "waveft"])
@pytest.mark.parametrize(
    "shape",
    ["scalar", "flat"],
)
def test_base_weights_of_no_matrix(kind: str, shape: str, tmp_path: Path) -> None:
    configs = {
        "miss": peft.MissConfig(r=4, target_modules=["square"]),
        "vera": peft.VeraConfig(r=4, target_modules=["square"]),
        "waveft": _WRONG_BASE["waveft"],
    }
    _, folder = Case(LINE, configs[kind]).adapter(tmp_path / "original")
    base = _base_file(LINE(), tmp_path, lambda _, t: t.reshape(-1)[0] if shape == "scalar" else t.reshape(-1))
    with pytest.raises(errors.AdapterOpsError, match="square"):
        ao.as_lora(ao.load(folder), Budget(rank=2), base)


@pytest.mark.parametrize("kind", ["ia3", "adamss"])
def test_bias_of_another_model(kind: str, tmp_path: Path) -> None:
    if kind == "adamss":
        pytest.importorskip("sklearn")
        config: Any = peft.AdamssConfig(r=10, num_subspaces=3, subspace_rank=2, target_modules=["square"])
    else:
        config = peft.IA3Config(target_modules=["square"], feedforward_modules=[])
    _, folder = Case(LINE, config).adapter(tmp_path / "original")
    base = _base_file(LINE(), tmp_path, lambda name, t: t[:-1] if name.endswith("bias") else t)
    with pytest.raises(errors.AdapterOpsError, match="bias"):
        ao.as_lora(ao.load(folder), Budget(rank=2), base)


def test_unilora_of_one_vector_with_base_weights_alone(tmp_path: Path) -> None:
    config = peft.UniLoraConfig(r=3, target_modules=_LINE, theta_d_length=40)
    _, folder = Case(LINE, config).adapter(tmp_path / "original")
    with pytest.raises(errors.AdapterOpsError, match="--base CONFIG"):
        ao.to_lora(folder, tmp_path / "lora", to="peft", rank=2, base_weights=_base_file(LINE(), tmp_path))


_HUGE = 10**9
_NONSENSE: dict[str, tuple[Any, dict[str, Any]]] = {
    "deft, infinite": (peft.DeftConfig(r=3, target_modules=_LINE), {"alpha": float("inf")}),
    "peanut, infinite": (peft.PeanutConfig(r=4, target_modules=_LINE), {"scaling": float("inf")}),
    "osf, infinite": (peft.OSFConfig(target_modules=_LINE), {"effective_rank": float("inf")}),
    "osf, no number": (peft.OSFConfig(target_modules=_LINE), {"effective_rank": float("nan")}),
    "supertuning, infinite": (peft.SupertuningConfig(target_modules=_LINE, sparsity=0.9), {"sparsity": float("inf")}),
    "supertuning, no number": (peft.SupertuningConfig(target_modules=_LINE, sparsity=0.9), {"sparsity": float("nan")}),
    "oft, endless": (peft.OFTConfig(oft_block_size=4, target_modules=_LINE), {"num_cayley_neumann_terms": _HUGE}),
    "psoft, endless": (
        peft.PsoftConfig(r=4, target_modules=_LINE, psoft_svd="lowrank"),
        {"psoft_svd_lowrank_niter": _HUGE},
    ),
    "psoft, seed": (peft.PsoftConfig(r=4, target_modules=_LINE, psoft_svd="lowrank"), {"random_seed": 1 << 70}),
}


@pytest.mark.parametrize("name", _NONSENSE)
def test_nonsense_in_a_config(name: str, tmp_path: Path) -> None:
    config, fields = _NONSENSE[name]
    _, folder = Case(LINE, config).adapter(tmp_path / "original")
    _changed(folder, **fields)
    with _seconds(3), pytest.raises(errors.AdapterOpsError, match=next(iter(fields))):
        ao.as_lora(ao.load(folder, base=architecture_of(LINE())), Budget(rank=2), _base_file(LINE(), tmp_path))


def test_pattern_that_is_none(tmp_path: Path) -> None:
    _, folder = Case(LINE, peft.HiraConfig(r=3, target_modules=_LINE)).adapter(tmp_path / "original")
    _changed(folder, rank_pattern={"a(": 1})
    with pytest.raises(errors.AdapterOpsError, match="rank_pattern"):
        ao.load(folder)


@pytest.mark.parametrize("mask", [[{}], [[True]], "TF", [1, 2], [0.0], 3, [None]])
def test_triplets_that_are_neither_left_nor_gone(mask: Any, tmp_path: Path) -> None:
    config = peft.AdaLoraConfig(init_r=4, target_modules=_LINE, total_step=10)
    _, folder = Case(LINE, config).adapter(tmp_path / "original")
    _changed(folder, rank_pattern={"layer.lora_E": mask})
    with pytest.raises(errors.UnreadableFile, match="whether it is left"):
        ao.load(folder)


def test_seed_that_no_generator_takes(tmp_path: Path) -> None:
    config = peft.TinyLoraConfig(r=3, u=6, target_modules=_LINE)
    _, folder = Case(LINE, config).adapter(tmp_path / "original")
    _changed(folder, projection_seed=1 << 64)
    with pytest.raises(errors.AdapterOpsError, match="projection_seed"):
        ao.convert(folder, to="peft", output=tmp_path / "converted")


@pytest.mark.parametrize(
    ("config", "role"),
    [
        (peft.MissConfig(r=4, target_modules=["square"]), "miss_block"),
        (peft.MissConfig(r=4, init_weights="mini", mini_r=8, target_modules=["square"]), "miss_block"),
        (peft.AdaLoraConfig(init_r=4, total_step=10, target_modules=["square"]), "lora_A"),
        (peft.AdaLoraConfig(init_r=4, total_step=10, target_modules=["square"]), "lora_B"),
    ],
)
def test_tensor_without_an_axis(config: Any, role: str, tmp_path: Path) -> None:
    _, folder = Case(LINE, config).adapter(tmp_path / "original")
    _with(folder, f"base_model.model.square.{role}", torch.tensor(1.0))
    with pytest.raises(errors.AdapterOpsError, match=role):
        ao.load(folder, base=architecture_of(LINE()))


# ---- messages -----------------------------------------------------------------------------------------------


def test_two_types_in_one_file(tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {}
    for config in (peft.OFTConfig(oft_block_size=4, target_modules=["wide"]), peft.VeraConfig(target_modules=["tall"])):
        tensors |= pm.weights_of(Case(LINE, config).adapter(tmp_path / config.peft_type)[1])
    with pytest.raises(errors.UnsupportedFormat, match=r"two types of adapter \((OFT|VeRA) and (OFT|VeRA)\).*split it"):
        ao.load(pm.folder_with(tmp_path / "both", tensors))


def test_whole_lokr_module_of_another_rank(tmp_path: Path) -> None:
    config = peft.LoKrConfig(
        r=3, alpha=5, decompose_factor=4, rank_pattern={"k_proj": 4}, target_modules=["k_proj", "q_proj"]
    )
    case = Case(llama, config)
    model, folder = case.adapter(tmp_path / "original")
    weights = pm.folder_with(tmp_path / "alone", pm.weights_of(folder)) / "adapter_model.safetensors"
    with pytest.raises(errors.UnknownFact, match=r"""--set rank_pattern='\{"k_proj": 4\}'"""):
        ao.convert(weights, to="peft", output=tmp_path / "no", alpha=5, fields={"r": 3})
    fields = {"r": 3, "rank_pattern": {"k_proj": 4}}
    ao.convert(weights, to="peft", output=tmp_path / "converted", alpha=5, fields=fields)
    assert pm.apart(case.outputs(model), case.outputs(pm.load(llama(), tmp_path / "converted"))) < 1e-6


@pytest.mark.parametrize("fields", [{"config_C": "x"}, {"config_D_E": "lora"}])
def test_form_that_glora_has_not(fields: dict[str, str], tmp_path: Path) -> None:
    config = peft.GloraConfig(r=3, config_C="none", config_D_E="none", target_modules=["wide", "tall"])
    _, folder = Case(LINE, config).adapter(tmp_path / "original")
    _changed(folder, **fields)
    with pytest.raises(errors.Conflict, match=f"{next(iter(fields))} is .*peft has"):
        ao.convert(folder, to="peft", output=tmp_path / "converted")


def test_saved_bias_that_stands_twice_and_differs(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["wide"], bias="all", modules_to_save=["other"])
    _, folder = Case(LINE, config).adapter(tmp_path / "original")
    trained = torch.arange(16.0)
    _with(folder, "base_model.model.other.modules_to_save.bias", trained)
    result = ao.convert(folder, to="peft", output=tmp_path / "converted")
    assert any("differs" in note and "modules_to_save.bias" in note for note in result.notes)
    assert torch.equal(pm.weights_of(tmp_path / "converted")["base_model.model.other.bias"], trained)


def test_loralib_says_no_linear_layer_of_an_embedding(tmp_path: Path) -> None:
    """Both are spelled alike there, so it would come back as another update."""
    factors = {"A": torch.randn(2, 64), "B": torch.randn(32, 2)}
    keys = {f"base_model.model.model.embed_tokens.lora_{role}.weight": t for role, t in factors.items()}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["embed_tokens"]}
    folder = pm.folder_with(tmp_path / "original", keys, config)
    adapter = replace(ao.load(folder), base=architecture_of(llama()))
    with pytest.raises(errors.CannotRepresent, match="is an embedding of the base"):
        ao.save(adapter, tmp_path / "lora.safetensors", format="loralib")
