"""Published PEFT adapters: the config thrown away and made again, with peft itself as the judge."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import peft
import peft_models as pm
import pytest
import torch
import transformers
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

import adapterops as ao
from adapterops import errors

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = torch.tensor([[5, 6, 7, 8, 9]])
SMALL = {"vocab_size": 32, "max_position_embeddings": 16}


def _call(**inputs: Any) -> pm.Run:
    def run(model: nn.Module) -> pm.Outputs:
        with torch.no_grad():
            return [model(**inputs)[0]]

    return run


@dataclass(frozen=True)
class Base:
    """A base model as wide and as deep as an adapter needs it, and no larger."""

    make: Callable[[], nn.Module]
    run: pm.Run = field(default_factory=lambda: _call(input_ids=TOKENS))

    def write_config(self, model: Any, folder: Path) -> Path:
        if isinstance(model, diffusers.ModelMixin):
            model.save_config(folder)
        else:
            model.config.architectures = [type(model).__name__]
            model.config.save_pretrained(folder)
        return folder


def _transformers(class_name: str, run: pm.Run = _call(input_ids=TOKENS), **config: Any) -> Base:  # noqa: B008
    def make() -> nn.Module:
        model_class = getattr(transformers, class_name)
        return model_class(model_class.config_class(**config))  # type: ignore[no-any-return]

    return Base(make, run)


def _bert_like(class_name: str, labels: int) -> Base:
    return _transformers(class_name, intermediate_size=8, num_labels=labels, **SMALL)


def _distilbert(labels: int) -> Base:
    return _transformers("DistilBertForSequenceClassification", hidden_dim=8, num_labels=labels, **SMALL)


def _gpt2(class_name: str, **config: Any) -> Base:
    small = {"vocab_size": 32, "n_positions": 16, "n_inner": 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return _transformers(class_name, **small, **config)


def _gemma() -> Base:
    return _transformers(
        "Gemma3ForCausalLM",
        hidden_size=640, intermediate_size=8, num_hidden_layers=18, num_attention_heads=4,
        num_key_value_heads=1, head_dim=256, **SMALL,
    )  # fmt: skip


def _opt() -> Base:
    return _transformers(
        "OPTForCausalLM",
        hidden_size=1024, ffn_dim=8, num_hidden_layers=24, num_attention_heads=16, word_embed_proj_dim=8, **SMALL,
    )  # fmt: skip


def _unet() -> nn.Module:
    with torch.device("meta"):
        model = diffusers.UNet2DConditionModel(cross_attention_dim=768)
    return pm.cut_from_one_block(model)


class Mlp(nn.Module):
    """The model of peft's own regression tests, for which `lora_mlp*` were written."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0, self.lin1 = nn.Linear(10, 20), nn.Linear(20, 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.lin1(self.lin0(x).relu()),)


class Convolution(nn.Module):
    """Likewise, for `lora_conv2d`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv2d, self.lin0 = nn.Conv2d(5, 10, 3), nn.Linear(10, 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.lin0(self.conv2d(x).relu().flatten(1).mean(1, keepdim=True).expand(-1, 10)),)


BASES: dict[str, Base] = {
    "agnews-krish-ckpt6750": _bert_like("RobertaForSequenceClassification", 4),
    "agnews-subro-2400": _bert_like("RobertaForSequenceClassification", 4),
    "agnews-subro-500": _bert_like("RobertaForSequenceClassification", 4),
    "be-great-yoonyerin": _gpt2("GPT2LMHeadModel"),
    "bert-rank1-trungmac": _bert_like("BertForSequenceClassification", 2),
    "bloom-560m-vuong": _transformers("BloomForCausalLM", vocab_size=32, hidden_size=1024, n_layer=24, n_head=16),
    "difusor-susana": Base(
        _unet,
        _call(
            sample=torch.linspace(-1, 1, 256).view(1, 4, 8, 8),
            timestep=torch.tensor(3),
            encoder_hidden_states=torch.linspace(-1, 1, 4 * 768).view(1, 4, 768),
        ),
    ),
    "distilbert-emotion-dayanidhi": _distilbert(6),
    "distilbert-imdb-tashu": _distilbert(2),
    "flan-t5-medicalqna": _transformers(
        "T5ForConditionalGeneration",
        _call(input_ids=TOKENS, decoder_input_ids=TOKENS),
        vocab_size=32, d_model=768, d_kv=64, d_ff=8, num_layers=12, num_heads=12,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    ),
    "gemma3-270m-svg-adapter": _gemma(),
    "gemma3-270m-svg-adapter_curriculum_stage1": _gemma(),
    "gpt-lora-bin-thesotti": _gpt2("GPT2ForSequenceClassification", num_labels=3),
    "gpt2-anirudh": _gpt2("GPT2ForSequenceClassification", num_labels=6),
    "gpt2-stathopoan": _gpt2("GPT2ForSequenceClassification", num_labels=6),
    "multitask-haresh": _bert_like("BertForSequenceClassification", 2),
    "peft-bin-sidkris": _distilbert(2),
    "peft-regression-0.6.1-lora_conv2d": Base(
        Convolution, _call(x=torch.linspace(-1, 1, 405).view(1, 5, 9, 9))
    ),
    "peft-regression-0.6.1-lora_mlp": Base(Mlp, _call(x=torch.linspace(-1, 1, 30).view(3, 10))),
    "peft-regression-0.6.1-lora_mlp_modules_to_save": Base(Mlp, _call(x=torch.linspace(-1, 1, 30).view(3, 10))),
    "peft-regression-0.6.1-lora_opt-350m": _opt(),
    "peft-regression-0.6.1-lora_opt-350m_bnb_4bit": _opt(),
    "speech-erika": _transformers(
        "WhisperForConditionalGeneration",
        _call(input_features=torch.linspace(-1, 1, 80 * 16).view(1, 80, 16), decoder_input_ids=TOKENS),
        vocab_size=32, d_model=768, encoder_layers=12, decoder_layers=12, encoder_attention_heads=12,
        decoder_attention_heads=12, encoder_ffn_dim=8, decoder_ffn_dim=8, max_source_positions=8,
        max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        suppress_tokens=None, begin_suppress_tokens=None,
    ),
}  # fmt: skip
NO_CLASS = (
    "convnext-mountain-tommyroar",
    "neurodx-eeg-letitbe",
    # ViT's modules have other names since transformers 5 (`vit.layers.0.attention.q_proj`): what to do about such
    # layouts is a later matter, so here the names of the file alone are looked at.
    "age-prediction-whyiswmm",
)


def _alone(corpus: Path, slug: str, folder: Path) -> Path:
    """The weights of a published adapter without their config."""
    source = corpus / "files" / slug
    name = next(n for n in ("adapter_model.safetensors", "adapter_model.bin") if (source / n).exists())
    folder.mkdir()
    return Path(shutil.copy(source / name, folder))


@pytest.mark.parametrize("slug", [*BASES, *NO_CLASS])
def test_unknown_alpha_is_refused(corpus: Path, slug: str, tmp_path: Path) -> None:
    weights = _alone(corpus, slug, tmp_path / "alone")
    with pytest.raises(errors.UnknownFact, match=r"PEFT stores no alpha among the tensors.*--alpha") as refusal:
        ao.convert(weights, to="peft", output=tmp_path / "out")
    assert str(weights) in str(refusal.value)
    assert list(tmp_path.iterdir()) == [tmp_path / "alone"]


def _parameters(model: nn.Module) -> list[tuple[str, int, int]]:
    """What a model is made of, told by names, places in memory and numbers of changes."""
    return [(name, p.data_ptr(), p._version) for name, p in model.named_parameters()]


@pytest.mark.parametrize("slug", BASES)
def test_config_made_again_does_what_the_published_one_does(corpus: Path, slug: str, tmp_path: Path) -> None:
    source = corpus / "files" / slug
    published = pm.config_of(source)
    alpha = published["lora_alpha"]
    base = BASES[slug]
    torch.manual_seed(0)
    untouched: Any = base.make().eval()
    plain = base.run(untouched)
    model, parameters = untouched, _parameters(untouched)

    weights = _alone(corpus, slug, tmp_path / "alone")
    folders = {"published": source, "made again": tmp_path / "again"}
    ao.convert(weights, to="peft", output=folders["made again"], alpha=alpha)
    if hasattr(model, "config"):
        folders["with base"] = tmp_path / "with base"
        config = base.write_config(model, tmp_path / "base")
        ao.convert(weights, to="peft", output=folders["with base"], alpha=alpha, base=config)
        assert isinstance(pm.config_of(folders["with base"])["target_modules"], list)

    tensors = pm.weights_of(source)
    expected = pm.modules_in(tensors)
    outputs: dict[str, pm.Outputs] = {}
    for name, folder in folders.items():
        loaded = pm.load(copy.deepcopy(untouched) if expected[1] else model, folder)
        assert (pm.adapted(loaded), pm.wrapped(loaded)) == expected, name
        pm.same_tensors(pm.loaded_tensors(loaded), tensors)
        outputs[name] = base.run(loaded)
        # `unload` leaves saved modules in the base, so one that gets any must be a copy.
        model = loaded.unload() if not expected[1] else untouched
        assert _parameters(model) == parameters, "the next adapter would meet another base"
    assert pm.apart(outputs["published"], plain) > 1e-4, "the adapter does nothing here, so nothing is shown"
    assert {name: pm.apart(out, outputs["published"]) for name, out in outputs.items()} == pytest.approx(
        dict.fromkeys(outputs, 0.0), abs=1e-6
    )


@pytest.mark.parametrize("slug", [*BASES, *NO_CLASS])
def test_config_that_came_along_is_kept(corpus: Path, slug: str, tmp_path: Path) -> None:
    """Also where it lists a module twice (bert-rank1), one that no model has (`V`), or a head that is not there."""
    source = corpus / "files" / slug
    published = pm.config_of(source)
    ao.convert(source, to="peft", output=tmp_path / "kept")
    written = pm.config_of(tmp_path / "kept")
    assert {name: written[name] for name in published} == published
    pm.same_tensors(pm.weights_of(tmp_path / "kept"), pm.weights_of(source))


@pytest.mark.parametrize("slug", [*NO_CLASS, "bloom-560m-vuong", "gpt-lora-bin-thesotti"])
def test_targets_are_exactly_the_modules_of_the_file(corpus: Path, slug: str, tmp_path: Path) -> None:
    """Where no class is at hand, peft's own matching is asked, with neighbours that a looser pattern would take."""
    alpha = pm.config_of(corpus / "files" / slug)["lora_alpha"]
    weights = _alone(corpus, slug, tmp_path / "alone")
    ao.convert(weights, to="peft", output=tmp_path / "again", alpha=alpha)
    expected, _ = pm.modules_in(pm.weights_of(corpus / "files" / slug))
    walk = set(expected)
    for name in expected:
        parts = name.split(".")
        walk |= {".".join(parts[:n]) for n in range(1, len(parts))}
        walk |= {f"x.{name}", f"x{name}", f"{name}x", f"{name}.x", name.replace(".", "_"), name.partition(".")[2]}
        walk |= {".".join([*parts[:-1], "x" + parts[-1]]), name.replace(".0.", ".99.").replace(".1.", ".98.")}
    config = peft.LoraConfig.from_pretrained(str(tmp_path / "again"))
    found = {name for name in walk if name and check_target_module_exists(config, name)}
    assert {name for name in found if not isinstance(check_target_module_exists(config, name), _Excluded)} == expected


_Excluded = type(check_target_module_exists(peft.LoraConfig(exclude_modules=["x"], target_modules=["x"]), "x"))


def test_every_published_lora_is_tried(corpus: Path) -> None:
    """A file added to the corpus belongs into one of the tables above, or into this list with its reason."""
    elsewhere = {"granite-3b-broken-tgis": "truncated", "monteclora-roberta-mrpc": "MonteCLoRA's own tensors"}
    lora = {
        folder.name
        for folder in (corpus / "files").iterdir()
        if (folder / "adapter_config.json").exists() and pm.config_of(folder).get("peft_type") == "LORA"
    }
    assert lora == {*BASES, *NO_CLASS, *elsewhere}
