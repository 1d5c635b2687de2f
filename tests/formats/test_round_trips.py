"""There and back: through every other dialect that can hold it, a file comes back bit for bit, alphas included."""

from __future__ import annotations

from math import prod
from pathlib import Path

import pytest
from raw import load_tensors

import adapterops as ao
from adapterops import registry
from adapterops.adapter import Adapter
from adapterops.errors import CannotRepresent, UnknownArchitectureOfFile

DIALECTS = [d.name for form in registry.formats().values() for d in form.dialects]
FIXTURES = Path(__file__).parents[2] / "fixtures"
OURS = sorted(
    [
        *FIXTURES.glob("*.safetensors"),
        *FIXTURES.glob("*.bin"),
        *(config.parent for config in FIXTURES.glob("*/adapter_config.json")),
    ]
)
FILES = (
    "timohavdk-sd-lora/pytorch_lora_weights.safetensors",
    "timohavdk-sd-lora/2100-lora.safetensors",
    "vfph55-my-lora/pytorch_lora_weights.safetensors",
    "rafidreezwan-brain-mri-sd/pytorch_lora_weights.safetensors",
    "catundchat-sd15/pytorch_lora_weights.bin",
    "catundchat-sd15/pytorch_lora_weights.safetensors",
    "thehydrowave-naruto/teacher_lora_weights.bin",
    "dyfuzja-filip-base/pytorch_lora_weights.safetensors",
    "dyfuzja-filip-dreambooth/pytorch_lora_weights.safetensors",
    "diffusers-pr-pokemon/pytorch_lora_weights.safetensors",
    "age-prediction-whyiswmm",
    "agnews-krish-ckpt6750",
    "agnews-subro-2400",
    "agnews-subro-500",
    "be-great-yoonyerin",
    "bert-rank1-trungmac",
    "bloom-560m-vuong",
    "convnext-mountain-tommyroar",
    "difusor-susana",
    "distilbert-emotion-dayanidhi",
    "distilbert-imdb-tashu",
    "flan-t5-medicalqna",
    "gemma3-270m-svg-adapter",
    "gemma3-270m-svg-adapter_curriculum_stage1",
    "gpt-lora-bin-thesotti",
    "gpt2-anirudh",
    "gpt2-stathopoan",
    "monteclora-roberta-mrpc",
    "multitask-haresh",
    "neurodx-eeg-letitbe",
    "peft-bin-sidkris",
    "peft-regression-0.6.1-lora_conv2d",
    "peft-regression-0.6.1-lora_mlp",
    "peft-regression-0.6.1-lora_mlp_modules_to_save",
    "peft-regression-0.6.1-lora_opt-350m",
    "peft-regression-0.6.1-lora_opt-350m_bnb_4bit",
    "speech-erika",
)
"""Every LoRA of the corpus in the formats that are read and written."""


def holders(adapter: Adapter) -> set[str]:
    """The dialects that can hold an adapter, by what each of them can say (not by trying)."""
    out = {"peft"}
    parts = set(adapter.components)
    flat = {"kohya", "kohya-diffusers", "comfy-down"}
    if parts == {"unet"}:
        flat.add("lycoris")
    if parts <= {"text_encoder", "text_encoder_2"}:
        flat.add("onetrainer")
    if any(u.options.get("dora_axis") == "in" for u in adapter):
        return {*flat, "comfy"}
    kernels = any(prod(t.shape[2:]) != 1 for u in adapter if u.method == "lora" for t in u.tensors.values())
    beside = {"saved": {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}, "lora": {"A", "B"}}
    if len(parts) == 1 and not kernels and all(set(u.tensors) <= beside.get(u.method, set()) for u in adapter):
        out.add("loralib")
    if any(u.method != "lora" for u in adapter):
        return out
    plain = all(set(u.tensors) == {"A", "B"} and not u.options.get("kind") for u in adapter)
    known = {"unet", "text_encoder", "text_encoder_2", "transformer"}
    if parts <= known and not any("mid" in u.tensors for u in adapter):
        out |= {"diffusers", "diffusers-alpha"}
        if "transformer" not in parts:
            out.add("diffusers-mixed")
    if adapter.base is not None:
        out |= flat
        if not any("mid" in u.tensors for u in adapter):
            out.add("comfy")
    unit = all(u.alpha is not None and u.alpha.value == u.tensors["B"].shape[1] and not u.rslora for u in adapter)
    if parts <= {"unet", "text_encoder", "text_encoder_2"} and plain and unit:
        out.add("diffusers-lora")
        tails = (".to_q", ".to_k", ".to_v", ".to_out.0")
        if all(u.component != "unet" or u.module.endswith(tails) for u in adapter):
            out.add("diffusers-attn")
            if parts == {"unet"}:
                out.add("diffusers-attn-bare")
    return out


def raw(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of a file or folder: dtype, shape and bytes, read by the reference libraries."""
    import torch

    weights = ("**/adapter_model.safetensors", "adapter_model.bin")
    files = [path] if path.is_file() else sorted(f for pattern in weights for f in path.glob(pattern))
    return {
        f"{file.parent.relative_to(path) if path.is_dir() else '.'}/{key}": (
            str(t.dtype),
            tuple(t.shape),
            t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b"",
        )
        for file in files
        for key, t in load_tensors(file).items()
    }


def there_and_back(path: Path, tmp_path: Path) -> None:
    source = ao.load(path)
    home = source.provenance.dialect
    wanted = raw(path)
    able = holders(source)
    assert home in able
    for target in DIALECTS:
        there = tmp_path / f"there-{target}"
        if target not in able:
            with pytest.raises((CannotRepresent, UnknownArchitectureOfFile)):
                ao.save(source, there, format=target)
            assert not there.exists() or not any(there.iterdir())
            continue
        result = ao.save(source, there, format=target)
        assert result.proof is not None
        assert result.proof.exact, (target, result.proof)
        back = tmp_path / f"back-{target}"
        again = ao.convert(result.path, home, back)
        assert again.proof is not None
        assert again.proof.exact
        # The one spelling that is read and not kept: SD 1.x's encoder under SDXL's prefix, diffusers' own export.
        found = {k if k in wanted else k.replace("lora_te_", "lora_te1_"): v for k, v in raw(Path(again.path)).items()}
        assert found == wanted, target


@pytest.mark.parametrize("name", FILES)
def test_published_files_come_back(name: str, corpus: Path, tmp_path: Path) -> None:
    there_and_back(corpus / "files" / name, tmp_path)


@pytest.mark.parametrize("path", OURS, ids=lambda p: p.name)
def test_fixtures_come_back(path: Path, tmp_path: Path) -> None:
    there_and_back(path, tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_writing_what_was_read_gives_the_same_file(name: str, corpus: Path, tmp_path: Path) -> None:
    path = corpus / "files" / name
    result = ao.save(ao.load(path), tmp_path / "same")
    assert raw(Path(result.path)) == raw(path)
