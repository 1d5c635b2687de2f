"""The load test: peft and diffusers really load, and what they did is compared with what the file is."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loader_files import converted, diffusers_lora, with_method
from sound import Tensors, codes, edit, found, kohya_file, peft_folder, set_config

pytest.importorskip("diffusers")
pytest.importorskip("peft")

_OUT = "lora_te_text_model_encoder_layers_0_self_attn_out_proj"
_STEM = "base_model.model.model.layers.0.self_attn"


def loaded(path: Path, **options: Any) -> list[str]:
    return codes(path, load_test=True, select=["L59"], **options)


def _kohya(tmp_path: Path) -> Path:
    return with_method(kohya_file(tmp_path), _OUT, {".lora_down.weight": (4, 768), ".lora_up.weight": (768, 4)}, 2.0)


def _unlisted(tmp_path: Path) -> Path:
    """q_proj alone is targeted; the tensors of v_proj reach nothing."""
    return set_config(peft_folder(tmp_path), target_modules=["q_proj"])


def _other_alpha(tmp_path: Path) -> Path:
    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.alpha"
    return edit(_kohya(tmp_path), lambda tensors: tensors.update({key: torch.tensor(1.0, dtype=torch.float16)}))


def _other_rank(tmp_path: Path) -> Path:
    def grow(tensors: Tensors) -> None:
        generator = torch.Generator().manual_seed(3)
        tensors[f"{_STEM}.q_proj.lora_A.weight"] = torch.randn(6, 64, generator=generator)
        tensors[f"{_STEM}.q_proj.lora_B.weight"] = torch.randn(64, 6, generator=generator)

    return edit(peft_folder(tmp_path), grow)


BROKEN: dict[str, Callable[[Path], Path]] = {
    "L590": _unlisted,
    "L591": _other_alpha,
    "L592": _other_rank,
    "L593": lambda p: set_config(peft_folder(p), target_modules="all-linear"),
    "L594": lambda p: converted(p, "flux2_klein_4b", "bfl-peft", "norm_out.linear"),
}


@pytest.mark.parametrize("code", BROKEN)
def test_what_loading_shows_is_found(tmp_path: Path, code: str) -> None:
    path = BROKEN[code](tmp_path)
    assert loaded(path) == [code]
    assert not [c for c in codes(path) if c.startswith("L59")]  # only where it is asked for


def test_what_was_left_out_is_named(tmp_path: Path) -> None:
    (finding,) = found(_unlisted(tmp_path), load_test=True, select=["L59"])
    assert set(finding.where) == {
        f"base_model.model.model.layers.{layer}.self_attn.v_proj.lora_{factor}.weight"
        for layer in (0, 1)
        for factor in "AB"
    }


def test_the_scale_that_is_applied_is_told(tmp_path: Path) -> None:
    (finding,) = found(_other_alpha(tmp_path), load_test=True, select=["L59"])
    assert "0.5 in the model, 0.25 in the file" in finding.message


def test_a_scale_that_is_multiplied_into_the_factors_is_seen(tmp_path: Path) -> None:
    """Of lora_down behind transformer. diffusers' loader of Flux.1 forgets the alphas."""
    (finding,) = found(converted(tmp_path, "flux", "diffusers-lycoris", alpha=2.0), load_test=True, select=["L59"])
    assert finding.code == "L591"
    assert "1 in the model, 0.5 in the file" in finding.message


def _embedding(tmp_path: Path) -> Path:
    def add(tensors: Tensors) -> None:
        generator = torch.Generator().manual_seed(4)
        stem = "base_model.model.model.embed_tokens"
        tensors[f"{stem}.lora_embedding_A"] = torch.randn(4, 100, generator=generator)
        tensors[f"{stem}.lora_embedding_B"] = torch.randn(64, 4, generator=generator)

    return set_config(edit(peft_folder(tmp_path), add), target_modules=["q_proj", "v_proj", "embed_tokens"])


def _dora(tmp_path: Path) -> Path:
    def add(tensors: Tensors) -> None:
        for key in [k for k in tensors if k.endswith("lora_B.weight")]:
            stem = key.removesuffix(".lora_B.weight")
            tensors[f"{stem}.lora_magnitude_vector"] = torch.linspace(0.9, 1.1, tensors[key].shape[0])

    return set_config(edit(peft_folder(tmp_path), add), use_dora=True)


SOUND: dict[str, Callable[[Path], Path]] = {
    "peft": peft_folder,
    "peft, rsLoRA": lambda p: set_config(peft_folder(p), use_rslora=True),
    "peft, DoRA": _dora,
    "peft, embedding": _embedding,
    "peft, another start": lambda p: set_config(peft_folder(p), init_lora_weights="pissa"),
    "kohya sd1": _kohya,
    "kohya sdxl": lambda p: converted(p, "sdxl", "kohya"),
    "kohya flux": lambda p: converted(p, "flux", "kohya"),
    "comfy-down flux, half": lambda p: converted(p, "flux", "comfy-down", alpha=2.0),
    "kohya flux2": lambda p: converted(p, "flux2_klein_4b", "kohya", alpha=2.0),
    "comfy wan": lambda p: converted(p, "wan_1_3b", "comfy", alpha=2.0),
    "kohya z": lambda p: converted(p, "z_image", "kohya", alpha=2.0),
    "diffusers hunyuan": lambda p: diffusers_lora(p / "a.safetensors", "hunyuan_video", alpha=8.0),
    "diffusers sd3": lambda p: diffusers_lora(p / "a.safetensors", "sd3"),
    "diffusers sd35": lambda p: diffusers_lora(p / "a.safetensors", "sd35_medium"),
    "diffusers header": lambda p: diffusers_lora(p / "a.safetensors", "sd1", alpha=8.0),
}


@pytest.mark.parametrize("name", SOUND)
def test_sound_adapters_load(tmp_path: Path, name: str) -> None:
    assert loaded(SOUND[name](tmp_path)) == []


def test_a_base_models_config_shows_modules_without_tensors(tmp_path: Path) -> None:
    """The base has three layers, the adapter two: peft makes layers for the third as well."""
    pytest.importorskip("transformers")
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 64,
        "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2, "vocab_size": 100,
    }  # fmt: skip
    folder, base = peft_folder(tmp_path), tmp_path / "config.json"
    base.write_text(json.dumps(config))
    assert loaded(folder, base=base) == []
    base.write_text(json.dumps({**config, "num_hidden_layers": 3}))
    (finding,) = found(folder, base=base, load_test=True, select=["L59"])
    assert finding.code == "L590"
    assert "model.layers.2.self_attn.q_proj" in finding.message


def test_the_libraries_that_targets_name_are_tried(tmp_path: Path) -> None:
    assert loaded(peft_folder(tmp_path), targets=["peft", "diffusers"]) == ["L593"]  # diffusers loads no folders
    (finding,) = found(_kohya(tmp_path), targets=["peft"], load_test=True, select=["L59"])
    assert finding.code == "L593"
    assert "peft" in finding.message


def test_nothing_is_loaded_unless_asked(tmp_path: Path) -> None:
    """Validation without a load test imports neither library."""
    script = (
        "import sys, adapterops as ao\n"
        f"ao.validate({str(peft_folder(tmp_path))!r}, targets=['peft', 'diffusers'])\n"
        "print([name for name in ('peft', 'diffusers', 'transformers') if name in sys.modules])\n"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"


def test_a_missing_library_is_told_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    (finding,) = found(peft_folder(tmp_path), load_test=True, select=["L59"])
    assert finding.code == "L593"
    assert "pip install adapterops[diffusers]" in finding.message


def test_the_libraries_say_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    loaded(_kohya(tmp_path))
    loaded(_unlisted(tmp_path / "folder"))
    assert capfd.readouterr() == ("", "")


def test_a_config_makes_peft_import_nothing(tmp_path: Path) -> None:
    """megatron_core names a module that peft imports where megatron_config is set."""
    (tmp_path / "evil_module.py").write_text("raise SystemExit('imported')")
    folder = set_config(peft_folder(tmp_path), megatron_config={"x": 1}, megatron_core="evil_module")
    sys.path.insert(0, str(tmp_path))
    try:
        assert loaded(folder) == []
    finally:
        sys.path.remove(str(tmp_path))


def test_a_name_that_no_module_can_have_is_no_traceback(tmp_path: Path) -> None:
    def rename(tensors: Tensors) -> Tensors:
        return {key.replace("model.layers.0.self_attn", "forward.training"): value for key, value in tensors.items()}

    folder = edit(peft_folder(tmp_path), rename)
    assert set(loaded(folder)) <= {"L590", "L592", "L593"}


def test_published_peft_adapters_load(corpus: Path) -> None:
    """Those of the corpus whose modules the tensors tell are loaded by peft, every tensor of them."""
    folders = [path.parent for path in sorted(corpus.glob("files/*/adapter_config.json"))]
    shown = {path.name: loaded(path) for path in folders if (path / "adapter_model.safetensors").is_file()}
    assert len(shown) > 15
    assert not {name: found for name, found in shown.items() if set(found) - {"L593"}}


def test_subjects_without_a_known_format_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "empty.safetensors"
    path.write_bytes(b"")
    assert loaded(path) == []
