"""PEFT's config against the tensors: each rule on an adapter broken in just that way, and what peft itself does with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sound import Tensors, codes, edit, found, peft_folder, set_config

from adapterops.validation import registry
from adapterops.validation.rule import Finding

Broken = Callable[[Path], Path | tuple[Path, dict[str, Any]]]
FIXTURES = Path(__file__).parents[2] / "fixtures"
Q = "base_model.model.model.layers.0.self_attn.q_proj"
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "tie_word_embeddings": False,
}


def with_config(*remove: str, **fields: Any) -> Broken:
    """A sound folder with other fields."""
    return lambda path: set_config(peft_folder(path), remove=remove, **fields)


def with_tensors(change: Callable[[Tensors], Tensors], **fields: Any) -> Broken:
    """A sound folder with other tensors, and fields."""
    return lambda path: set_config(edit(peft_folder(path), change), **fields)


def saved(**more: tuple[int, ...]) -> Callable[[Tensors], Tensors]:
    """Further tensors of ones; `__` stands for a dot in their names."""
    return lambda tensors: {
        **tensors,
        **{f"base_model.model.{k.replace('__', '.')}": torch.ones(s) for k, s in more.items()},
    }


TWICE = {
    "score__base_layer__weight": (2, 64),
    **{f"score__{part}lora_A__weight": (4, 64) for part in ("", "modules_to_save__", "original_module__")},
    **{f"score__{part}lora_B__weight": (2, 4) for part in ("", "modules_to_save__", "original_module__")},
}
"""A head as peft 0.10 saves it where target_modules names it; 0.6 calls its weight score.weight."""


def magnitudes(tensors: Tensors) -> Tensors:
    """A magnitude for every module."""
    more = {k.replace("lora_B.weight", "lora_magnitude_vector"): t for k, t in tensors.items() if "lora_B" in k}
    return tensors | {key: torch.linspace(1, 2, t.shape[0]) for key, t in more.items()}


def biased(tensors: Tensors) -> Tensors:
    """A bias of lora_B for every module."""
    more = {k.replace("weight", "bias"): t for k, t in tensors.items() if "lora_B" in k}
    return tensors | {key: torch.linspace(0.1, 0.2, t.shape[0]) for key, t in more.items()}


def only(part: str) -> Callable[[Tensors], Tensors]:
    """The tensors that have `part` in their names."""
    return lambda tensors: {key: t for key, t in tensors.items() if part in key}


def base_config(path: Path, **fields: Any) -> Path:
    """A config.json of a Llama of the sound adapter's size."""
    file = path / "config.json"
    file.write_text(json.dumps(LLAMA | fields))
    return file


def with_base(broken: Broken, **fields: Any) -> Broken:
    """The same with the base model known."""

    def make(path: Path) -> tuple[Path, dict[str, Any]]:
        folder = broken(path)
        assert isinstance(folder, Path)
        return folder, {"base": base_config(path, **fields)}

    return make


def text(content: str) -> Broken:
    """A sound folder with another text for a config."""

    def make(path: Path) -> Path:
        folder = peft_folder(path)
        (folder / "adapter_config.json").write_text(content)
        return folder

    return make


def no_config(path: Path) -> Path:
    """(IA)³, which has no alpha that could be lost, without a config."""
    folder = edit(peft_folder(path), lambda _: {f"{Q}.ia3_l": torch.linspace(0.5, 1.5, 64).reshape(64, 1)})
    (folder / "adapter_config.json").unlink()
    return folder


def another_format(path: Path) -> Path:
    """A config of peft beside tensors that are named as sd-scripts names them."""
    folder = peft_folder(path)
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {
        f"{stem}.lora_down.weight": torch.linspace(-1, 1, 1280).reshape(4, 320),
        f"{stem}.lora_up.weight": torch.linspace(1, 3, 1280).reshape(320, 4),
        f"{stem}.alpha": torch.tensor(4.0),
    }
    return edit(folder, lambda _: tensors)


def second_config(path: Path) -> Path:
    folder = peft_folder(path)
    (folder / "other__adapter_config.json").write_text((folder / "adapter_config.json").read_text())
    return folder


def prompt(path: Path) -> Path:
    """A soft prompt of 8 tokens; the config says 20."""
    folder = edit(peft_folder(path), lambda _: {"prompt_embeddings": torch.randn(8, 64)})
    fields = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 20, "token_dim": 64}
    fields |= {"base_model_name_or_path": "meta-llama/Llama-3.2-1B", "inference_mode": True}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


def experts(tensors: Tensors) -> Tensors:
    """Factors on two parameters of an expert layer beside the rest."""
    stem = "base_model.model.model.layers.0.mlp.experts"
    more = {f"{stem}.base_layer.lora_A.weight": (8, 64), f"{stem}.base_layer.lora_B.weight": (96, 8)}
    more |= {f"{stem}.lora_A.weight": (8, 48), f"{stem}.lora_B.weight": (64, 8)}
    seed = torch.Generator().manual_seed(7)
    return tensors | {key: torch.randn(*shape, generator=seed) * 0.1 for key, shape in more.items()}


BROKEN: dict[str, Broken] = {
    "C201": text('{"peft_type": "LORA",}'),
    "C202": no_config,
    "C203": with_config(use_rslora="false"),
    "C204": with_config(alpha_pattern={"(q_proj": 8}),
    "C205": with_config(target_modules="(.*a)*_proj|.*_proj"),
    "C206": with_config("peft_type"),
    "C207": with_config(peft_type="FINEGATES"),
    "C208": with_config(peft_type="IA3"),
    "C209": with_config(shiny_scale=3),
    "C210": with_config(task_type="CHAT"),
    "C211": with_config(task_type=None),
    "C212": with_config(inference_mode=False),
    "C213": with_config(base_model_name_or_path=None),
    "C214": with_config(base_model_name_or_path="/home/ann/models/llama"),
    "C215": with_config(auto_mapping={"base_model_class": "Net", "parent_library": "modeling_finetune"}),
    "C216": with_config(target_modules=["q_proj", "v_proj", "q_proj"]),
    "C217": with_config(init_lora_weights="pissa_niter_4"),
    "C218": with_config(init_lora_weights="kaiming"),
    "C219": second_config,
    "C220": another_format,
    "C230": with_config(r=8),
    "C231": with_config(r=None),
    "C232": with_config("lora_alpha"),
    "C233": with_config(use_dora=True),
    "C234": with_tensors(biased),
    "C235": prompt,
    "C236": with_tensors(experts, target_parameters=["experts.gate_up_proj", "experts.down_proj"]),
    "C237": with_base(with_config(fan_in_fan_out=True)),
    "C238": with_tensors(
        lambda tensors: {k.replace("layers.0.self_attn.v_proj", "unembed_tokens"): t for k, t in tensors.items()},
        target_modules=["q_proj", "v_proj", "unembed_tokens"],
    ),
    "C240": with_config(target_modules=None),
    "C241": with_config(target_modules=["query"]),
    "C242": with_config(target_modules=["q_proj"]),
    "C243": with_config(target_modules=["q_proj", "v_proj", "V"]),
    "C244": with_base(with_config(target_modules=["q_proj", "v_proj", "k_proj"])),
    "C245": with_config(layers_pattern="layers"),
    "C246": with_config(layers_to_transform=[0, 1, 2]),
    "C247": with_config(rank_pattern={"k_proj": 8}),
    "C250": with_config(modules_to_save=["lm_head"]),
    "C251": with_tensors(
        saved(classifier__weight=(2, 64)), task_type="SEQ_CLS", modules_to_save=["classifier", "score"]
    ),
    "C252": with_base(with_config(modules_to_save=["lm_head"])),
    "C253": with_tensors(saved(model__norm__weight=(64,))),
    "C254": with_tensors(saved(score__weight=(2, 64)), task_type="SEQ_CLS"),
    "C255": with_tensors(saved(model__layers__0__self_attn__q_proj__bias=(64,))),
    "C256": with_config(trainable_token_indices=[1, 2]),
    "C257": with_config(bias="some"),
    "C258": with_base(with_config(bias="lora_only"), attention_bias=True),
    "C259": with_tensors(saved(**TWICE), task_type="SEQ_CLS", target_modules=["q_proj", "v_proj", "score"]),
}
"""By code: an adapter that is broken in just that way, and the options with which it is seen."""

MORE_BROKEN: list[tuple[str, Broken]] = [
    ("C203", with_config(r="4")),
    ("C203", with_config(r=0)),
    ("C203", with_config(lora_alpha="8")),
    ("C203", with_config(lora_alpha=None)),
    ("C203", with_config(rank_pattern=None)),
    ("C203", with_config(alpha_pattern=[])),
    ("C203", with_config(use_dora="false")),
    ("C203", with_config(modules_to_save="lm_head")),
    ("C203", with_config(layers_to_transform="0")),
    ("C203", with_config(target_modules=7)),
    ("C203", with_config(lora_dropout=None)),
    ("C203", with_config(auto_mapping="timm")),
    ("C203", with_config(inference_mode="true")),
    ("C201", text('{"peft_type": "LORA", "peft_type": "LORA"}')),
    ("C201", text("\ufeff{}")),
    ("C201", text("[]")),
    ("C204", with_config(target_modules="(")),
    ("C204", with_config(rank_pattern={"[": 4})),
    ("C204", with_config(r=8, rank_pattern={"(x": 2, "[qv]_proj": 4})),
    ("C203", with_tensors(saved(model__norm__weight=(64,)), modules_to_save="norm")),
    ("C206", with_config(peft_type=None)),
    ("C207", with_config(peft_type="lora")),
    ("C208", with_config(peft_type="LOHA")),
    ("C214", with_config(base_model_name_or_path="/data/llama")),
    ("C214", with_config(base_model_name_or_path="~/llama")),
    ("C214", with_config(base_model_name_or_path="C:\\models\\llama")),
    ("C214", with_config(base_model_name_or_path="models/meta/llama")),
    ("C214", with_config(base_model_name_or_path="gemma3-270m-it")),
    ("C216", with_tensors(saved(lm_head__weight=(32, 64)), modules_to_save=["lm_head", "lm_head"])),
    ("C217", with_config(init_lora_weights="olora")),
    ("C218", with_config(init_lora_weights="loftq")),
    ("C230", with_config(rank_pattern={"q_proj": 8})),
    ("C230", with_config(use_rslora=True, r=8)),
    ("C231", with_config("r")),
    ("C233", with_tensors(magnitudes)),
    (
        "C233",
        with_tensors(lambda t: {k: v for k, v in magnitudes(t).items() if f"{Q}.lora_mag" not in k}, use_dora=True),
    ),
    ("C234", with_config(lora_bias=True)),
    ("C241", with_config(target_modules=[])),
    ("C241", with_config(target_modules=".*query")),
    ("C241", with_config(layers_to_transform=[7])),
    ("C242", with_config(exclude_modules=["q_proj"])),
    ("C242", with_config(layers_to_transform=[0])),
    ("C242", with_config(modules_to_save=["v_proj"])),
    ("C244", with_base(with_config(target_modules="all-linear"))),
    ("C245", with_config(target_modules=".*(q|v)_proj", layers_to_transform=[0, 1])),
    ("C247", with_config(alpha_pattern={"layers.9.self_attn.q_proj": 8, "v_proj": 8})),
    ("C250", with_config(task_type="SEQ_CLS")),
    ("C256", with_tensors(saved(model__embed_tokens__token_adapter__trainable_tokens_delta=(2, 64)))),
]

SOUND: dict[str, Broken] = {
    "as peft writes it": with_config(),
    "list of whole names": with_config(
        target_modules=[f"model.layers.{n}.self_attn.{m}_proj" for n in (0, 1) for m in ("q", "v")]
    ),
    "pattern": with_config(target_modules=r".*\.self_attn\.(q|v)_proj"),
    "pattern as unsloth writes it": with_config(
        target_modules=r"(?:.*?(?:language|text|model).*?(?:self_attn|attention|mlp).*?(?:q_proj|k_proj|v_proj).*?)"
        r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|v_proj)))"
    ),
    "all-linear": with_config(target_modules="all-linear"),
    "layers": with_config(layers_to_transform=[0, 1], layers_pattern="layers"),
    "no layers": with_config(layers_to_transform=[], layers_pattern=[]),
    "ranks by pattern": with_config(r=8, rank_pattern={"[qv]_proj": 4}),
    "alphas by pattern": with_config(alpha_pattern={"model.layers.1.self_attn.v_proj": 16}),
    "old config": with_config(
        "peft_version", "use_dora", "rank_pattern", "alpha_pattern", "lora_bias", "inference_mode"
    ),
    "null flags": with_config(use_dora=None, use_rslora=None),
    "later field that says nothing": with_config(shiny_scale=None, shiny_list=[]),
    "gaussian": with_config(init_lora_weights="gaussian"),
    "eva": with_config(init_lora_weights="eva"),
    "name without an owner": with_config(base_model_name_or_path="gpt2"),
    "class of timm": with_config(
        auto_mapping={"base_model_class": "ConvNeXt", "parent_library": "timm.models.convnext"}
    ),
    "saved and listed": with_tensors(saved(lm_head__weight=(32, 64)), modules_to_save=["lm_head"]),
    "listed by its ending": with_tensors(
        saved(pre_classifier__weight=(4, 64), classifier__weight=(2, 64)),
        task_type="SEQ_CLS",
        modules_to_save=["classifier"],
    ),
    "part of a listed module": with_tensors(
        saved(classifier__dense__weight=(64, 64), classifier__out_proj__weight=(2, 64)),
        task_type="SEQ_CLS",
        modules_to_save=["classifier"],
    ),
    "DoRA": with_tensors(magnitudes, use_dora=True),
    "bias of lora_B": with_tensors(biased, lora_bias=True),
    "base layer's bias": with_tensors(saved(model__layers__0__self_attn__q_proj__base_layer__bias=(64,)), bias="all"),
    "biases": with_tensors(saved(model__norm__bias=(64,)), bias="all"),
    "tokens": with_tensors(
        saved(model__embed_tokens__token_adapter__trainable_tokens_delta=(2, 64)), trainable_token_indices=[3, 5]
    ),
    "base known": with_base(with_config()),
    "biases the base lacks": with_base(with_config(bias="lora_only")),
    "pissa converted": with_config(init_lora_weights=True),
}
"""What looks like a fault and is none."""


def examined(broken: Broken, path: Path) -> list[Finding]:
    made = broken(path)
    folder, options = made if isinstance(made, tuple) else (made, {})
    return list(found(folder, **options))


def own() -> list[str]:
    return [rule.code for rule in registry.rules() if rule.group == "C"]


def test_every_rule_is_broken() -> None:
    assert sorted(BROKEN) == own()


@pytest.mark.parametrize("code", sorted(BROKEN))
def test_broken(code: str, tmp_path: Path) -> None:
    findings = examined(BROKEN[code], tmp_path)
    assert [f.code for f in findings] == [code], [(f.code, f.message) for f in findings]
    rule = findings[0].rule
    assert all((findings[0].message, rule.why, rule.remedy, rule.fires, rule.passes))


@pytest.mark.parametrize("number", range(len(MORE_BROKEN)))
def test_more_broken(number: int, tmp_path: Path) -> None:
    code, broken = MORE_BROKEN[number]
    findings = examined(broken, tmp_path)
    assert [f.code for f in findings] == [code], [(f.code, f.message) for f in findings]


@pytest.mark.parametrize("name", sorted(SOUND))
def test_sound(name: str, tmp_path: Path) -> None:
    findings = examined(SOUND[name], tmp_path)
    assert not findings, [(f.code, f.message) for f in findings]


@pytest.mark.parametrize("folder", sorted((FIXTURES / "peft-types").iterdir()), ids=lambda folder: folder.name)
def test_every_type_is_sound(folder: Path) -> None:
    """They were made by peft itself, on models of tests, which have neither a name nor a package."""
    wrong = [f for f in found(folder) if f.rule.group in "BC" and f.code not in ("C213", "C215")]
    assert not wrong, [(f.code, f.message) for f in wrong]


def test_one_fault_hides_no_other(tmp_path: Path) -> None:
    folder = set_config(peft_folder(tmp_path), r="4", task_type="CHAT", target_modules=["q_proj"], inference_mode=False)
    assert codes(folder) == ["C203", "C210", "C212", "C242"]


def test_a_config_beside_damaged_weights_is_read(tmp_path: Path) -> None:
    folder = set_config(peft_folder(tmp_path), base_model_name_or_path="/granite/step_75000", r="4")
    (folder / "adapter_model.safetensors").write_bytes(b"fake weights\n")
    found_codes = codes(folder)
    assert {"C203", "C214"} <= set(found_codes)
    assert len(found_codes) == 3  # and the weights


def test_keys_are_named(tmp_path: Path) -> None:
    folder = set_config(peft_folder(tmp_path), target_modules=["q_proj"])
    (finding,) = found(folder)
    assert [key.split(".")[-3] for key in finding.where] == ["v_proj"] * 4
    assert (finding.field, finding.file) == ("target_modules", str(folder / "adapter_config.json"))


CHANGES: dict[str, tuple[Broken, dict[str, Any]]] = {
    "patterns": (with_config(rank_pattern=None), {"rank_pattern": {}}),
    "type": (with_config("peft_type"), {"peft_type": "LORA"}),
    "small letters": (with_config(peft_type="lora"), {"peft_type": "LORA"}),
    "inference": (with_config(inference_mode=False), {"inference_mode": True}),
    "twice": (with_config(target_modules=["q_proj", "q_proj", "v_proj"]), {"target_modules": ["q_proj", "v_proj"]}),
    "init": (with_config(init_lora_weights="kaiming"), {"init_lora_weights": True}),
    "rank": (with_config(r=None), {"r": 4}),
    "no rank": (with_config("r"), {"r": 4}),
    "dora": (with_tensors(magnitudes), {"use_dora": True}),
    "lora bias": (with_tensors(biased), {"lora_bias": True}),
    "dead target": (with_config(target_modules=["q_proj", "V", "v_proj"]), {"target_modules": ["q_proj", "v_proj"]}),
    "dead pattern": (with_config(rank_pattern={"k_proj": 8}), {"rank_pattern": {}}),
    "layers pattern": (with_config(layers_pattern="layers"), {"layers_pattern": None}),
    "dead layer": (with_config(layers_to_transform=[0, 1, 9]), {"layers_to_transform": [0, 1]}),
    "unlisted": (with_tensors(saved(model__norm__weight=(64,))), {"modules_to_save": ["model.norm"]}),
    "head": (with_tensors(saved(score__weight=(2, 64)), task_type="SEQ_CLS"), {"modules_to_save": ["score"]}),
    "uncovered": (
        with_config(target_modules=["q_proj"], exclude_modules=["k_proj"]),
        {"target_modules": r"model\.layers\.(?:0|1)\.self_attn\.(?:q_proj|v_proj)", "exclude_modules": None},
    ),
}


@pytest.mark.parametrize("name", sorted(CHANGES))
def test_changes_are_what_the_tensors_prove(name: str, tmp_path: Path) -> None:
    broken, wanted = CHANGES[name]
    (finding,) = examined(broken, tmp_path)
    assert finding.change is not None
    assert finding.rule.fixable
    assert finding.change.config == wanted
    folder = set_config(tmp_path / "sound", **wanted)
    assert codes(folder) == []


@pytest.mark.parametrize(
    "broken", [with_config(r=8), with_config(use_dora=True), with_config(modules_to_save=["lm_head"])]
)
def test_what_is_not_proven_is_not_mended(broken: Broken, tmp_path: Path) -> None:
    (finding,) = examined(broken, tmp_path)
    assert finding.change is None


# ---- what peft does -----------------------------------------------------------------------------------------


def loaded(folder: Path, **model: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """peft's own model of a folder, and its parameters."""
    from peft import PeftModel
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    torch.manual_seed(0)
    config = folder / "adapter_config.json"
    is_classifier = config.exists() and '"SEQ_CLS"' in config.read_text()
    kind = LlamaForSequenceClassification if is_classifier else LlamaForCausalLM
    base = kind(LlamaConfig(**{k: v for k, v in (LLAMA | model).items() if k not in ("architectures", "model_type")}))
    made = PeftModel.from_pretrained(base, str(folder))
    return made, dict(made.named_parameters())


FAILS = {
    "C201": "JSON|double quotes",
    "C202": "adapter_config.json",
    "C204": "unterminated|missing",
    "C206": "peft_type",
    "C207": "FINEGATES",
    "C210": "Invalid task type",
    "C218": "Unknown initialization",
    "C230": "size mismatch",
    "C231": "NoneType",
    "C241": "not found in the base model",
    "C245": "layers_pattern",
    "C252": "lm_head",
    "C256": "trainable_tokens_delta",
    "C257": "not implemented",
}
"""Rules of which peft itself fails on the broken adapter, and what its error says."""


@pytest.mark.parametrize("code", sorted(FAILS))
@pytest.mark.filterwarnings("ignore")
def test_peft_fails(code: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    made = BROKEN[code](tmp_path)
    folder = made[0] if isinstance(made, tuple) else made
    with pytest.raises(Exception, match=FAILS[code]):
        loaded(folder)


@pytest.mark.parametrize("field", [{"rank_pattern": None}, {"alpha_pattern": []}, {"r": "4"}, {"lora_alpha": None}])
@pytest.mark.filterwarnings("ignore")
def test_peft_fails_for_types(field: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("peft")
    with pytest.raises((TypeError, AttributeError)):
        loaded(set_config(peft_folder(tmp_path), **field))


@pytest.mark.filterwarnings("ignore")
def test_peft_takes_the_text_false_for_true(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model, _ = loaded(set_config(peft_folder(tmp_path), use_rslora="false"))
    assert model.base_model.model.model.layers[0].self_attn.q_proj.scaling == {"default": 4.0}


@pytest.mark.filterwarnings("ignore")
def test_peft_drops_what_is_not_targeted(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    _, parameters = loaded(set_config(peft_folder(tmp_path), target_modules=["q_proj"]))
    assert any("q_proj.lora_A" in name for name in parameters)
    assert not any("v_proj.lora_A" in name for name in parameters)


@pytest.mark.filterwarnings("ignore")
def test_peft_starts_magnitudes_anew_and_drops_them(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    name = f"{Q}.lora_magnitude_vector.default.weight"
    _, anew = loaded(set_config(peft_folder(tmp_path, name="flag"), use_dora=True))
    folder = edit(peft_folder(tmp_path, name="file"), magnitudes)
    _, without = loaded(folder)
    _, right = loaded(set_config(folder, use_dora=True))
    assert name not in without
    assert torch.equal(right[name], torch.linspace(1, 2, 64))
    assert not torch.equal(anew[name], right[name])


@pytest.mark.filterwarnings("ignore")
def test_peft_drops_the_biases_of_lora_b(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    folder = edit(peft_folder(tmp_path), biased)
    assert f"{Q}.lora_B.default.bias" not in loaded(folder)[1]
    assert torch.equal(
        loaded(set_config(folder, lora_bias=True))[1][f"{Q}.lora_B.default.bias"], torch.linspace(0.1, 0.2, 64)
    )


@pytest.mark.filterwarnings("ignore")
def test_peft_leaves_another_methods_tensors(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    _, parameters = loaded(set_config(peft_folder(tmp_path), peft_type="IA3"))
    assert not any("lora" in name for name in parameters)
    assert bool((parameters[f"{Q}.ia3_l.default"] == 1).all())


@pytest.mark.filterwarnings("ignore")
def test_peft_takes_its_own_alpha(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model, _ = loaded(set_config(peft_folder(tmp_path), remove=("lora_alpha",)))
    assert model.base_model.model.model.layers[0].self_attn.q_proj.scaling == {"default": 8 / 4}


@pytest.mark.filterwarnings("ignore")
def test_peft_writes_unlisted_modules_over_the_base(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    _, parameters = loaded(edit(peft_folder(tmp_path), saved(model__norm__weight=(64,))))
    assert bool((parameters["base_model.model.model.norm.weight"] == 1).all())
    # A head is wrapped, as one that is listed.
    folder = set_config(edit(peft_folder(tmp_path, name="head"), saved(score__weight=(2, 64))), task_type="SEQ_CLS")
    _, parameters = loaded(folder)
    assert bool((parameters["base_model.model.score.modules_to_save.default.weight"] == 1).all())


@pytest.mark.filterwarnings("ignore")
def test_peft_fails_without_a_head(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    with pytest.raises(KeyError, match="score"):
        loaded(set_config(peft_folder(tmp_path), task_type="SEQ_CLS"))


@pytest.mark.filterwarnings("ignore")
def test_peft_drops_the_adapted_layers_own_names(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    plain = edit(peft_folder(tmp_path, name="plain"), saved(model__layers__0__self_attn__q_proj__bias=(64,)))
    wrapped = edit(
        peft_folder(tmp_path, name="wrapped"), saved(model__layers__0__self_attn__q_proj__base_layer__bias=(64,))
    )
    name = f"{Q}.base_layer.bias"
    assert bool((loaded(plain, attention_bias=True)[1][name] == 0).all())
    assert bool((loaded(wrapped, attention_bias=True)[1][name] == 1).all())


@pytest.mark.parametrize("code", ["C209", "C244", "C247"])
def test_peft_warns(code: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    made = BROKEN[code](tmp_path)
    with pytest.warns(Warning, match=r"shiny_scale|missing adapter keys|did not match any"):
        loaded(made[0] if isinstance(made, tuple) else made)


def test_a_rank_beyond_every_float_is_another_rank(tmp_path: Path) -> None:
    assert codes(set_config(peft_folder(tmp_path), r=10**400)) == ["C230"]
