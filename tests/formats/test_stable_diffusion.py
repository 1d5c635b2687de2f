"""SD 1.x, 2.x and SDXL files: every delta against an independent computation, every target loaded by its library."""

from __future__ import annotations

import contextlib
import importlib.util
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from meta_models import adapted, adapted_by_diffusers, build, module_names
from peft import PeftModel
from raw import Deltas, dotted_deltas, flat_names, kohya_deltas, load_tensors, peft_deltas, probe, sgm

import adapterops as ao
from adapterops.methods import METHODS

FILES = {
    "timohavdk-sd-lora/pytorch_lora_weights.safetensors": "sd1",
    "timohavdk-sd-lora/2100-lora.safetensors": "sd1",
    "rafidreezwan-brain-mri-sd/pytorch_lora_weights.safetensors": "sd1",
    "catundchat-sd15/pytorch_lora_weights.safetensors": "sd1",
    "catundchat-sd15/pytorch_lora_weights.bin": "sd1",
    "thehydrowave-naruto/teacher_lora_weights.bin": "sd1",
    "dyfuzja-filip-base/pytorch_lora_weights.safetensors": "sd1",
    "dyfuzja-filip-dreambooth/pytorch_lora_weights.safetensors": "sd1",
    "diffusers-pr-pokemon/pytorch_lora_weights.safetensors": "sd1",
    "vfph55-my-lora/pytorch_lora_weights.safetensors": "sd2",
    "difusor-susana": "sd1",
}
DENSE = ("timohavdk-sd-lora/2100-lora.safetensors", "vfph55-my-lora/pytorch_lora_weights.safetensors", "difusor-susana")
"""Files of which adapterops' own dense deltas are computed too, one a spelling and base."""
PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te"}
XL_PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}


def assert_same(found: Deltas, wanted: Deltas) -> None:
    """Every module once, and its delta equal: the factors are the same numbers, so only float64 rounding is left."""
    assert found.keys() == wanted.keys()
    for key, delta in wanted.items():
        assert found[key].shape == delta.shape
        assert (found[key] - delta).abs().max() <= 1e-12 * max(1.0, float(delta.abs().max())), key


def library_deltas(path: Path | str) -> Deltas:
    """What adapterops itself says the deltas are, in float32."""
    deltas = {(u.component, u.module): METHODS["lora"].delta(u).double().flatten(1) for u in ao.load(path)}
    return {key: delta @ probe(delta.shape[1]) for key, delta in deltas.items()}


def sd_source(path: Path) -> Deltas:
    return peft_deltas(path) if path.is_dir() else dotted_deltas(path)


@pytest.mark.parametrize("name", FILES)
def test_every_delta_survives_every_target(name: str, corpus: Path, tmp_path: Path) -> None:
    path, arch = corpus / "files" / name, FILES[name]
    wanted = sd_source(path)
    names = flat_names(module_names(arch), PREFIXES)
    kohya, diffusers, folder = tmp_path / "k.safetensors", tmp_path / "d.safetensors", tmp_path / "peft"
    result = ao.convert(path, "kohya", kohya)
    assert result.architecture.value == arch
    assert result.proof is not None
    assert result.proof.exact
    ao.convert(kohya, "diffusers", diffusers)
    ao.convert(diffusers, "peft", folder)
    assert_same(kohya_deltas(kohya, names), wanted)
    assert_same(dotted_deltas(diffusers), wanted)
    assert_same(peft_deltas(folder), wanted)
    if name not in DENSE:
        return
    found = library_deltas(path)
    assert found.keys() == wanted.keys()
    for key, delta in wanted.items():
        assert (found[key] - delta).abs().max() <= 1e-5 * max(1e-6, float(delta.abs().max())), key


@pytest.mark.parametrize(
    ("name", "target"),
    [(name, "diffusers") for name in FILES] + [(name, target) for name in DENSE for target in ("kohya", "peft")],
)
def test_libraries_adapt_exactly_the_modules_of_the_file(name: str, target: str, corpus: Path, tmp_path: Path) -> None:
    path, arch = corpus / "files" / name, FILES[name]
    wanted = set(sd_source(path))
    scales = {u.alpha.value / u.tensors["B"].shape[1] for u in ao.load(path)}  # type: ignore[union-attr,operator]
    if target == "peft":
        ao.convert(path, target, tmp_path / "peft")
        model = PeftModel.from_pretrained(build(arch)["unet"], tmp_path / "peft", low_cpu_mem_usage=True)
        layers = adapted("unet", model.base_model.model)
        assert layers.keys() == wanted
        assert {layer.scaling["default"] for layer in layers.values()} == scales
        return
    ao.convert(path, target, tmp_path / "x.safetensors")
    found = adapted_by_diffusers(arch, str(tmp_path / "x.safetensors"))
    assert found.keys() == wanted
    assert set(found.values()) == scales


@pytest.fixture(scope="module")
def workload(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The SDXL workload of the benchmarks at rank 4: sgm names (k0, k1) and diffusers names (d0)."""
    spec = importlib.util.spec_from_file_location("make_workloads", corpus.parent / "bench" / "make_workloads.py")
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("W2")
    module.w2(str(folder), r=4, alpha=2.0)
    return folder


def xl_names(original: bool) -> dict[str, tuple[str, str]]:
    if not original:
        return flat_names(module_names("sdxl"), XL_PREFIXES)
    inside = [(c, n) for c, n in module_names("sdxl") if c != "unet" or ".attentions." in n]
    return {f"{XL_PREFIXES[c]}_{(sgm(n) if c == 'unet' else n).replace('.', '_')}": (c, n) for c, n in inside}


@pytest.mark.parametrize(("file", "original"), [("k0", True), ("d0", False)])
def test_sdxl_deltas_survive_every_target(file: str, original: bool, workload: Path, tmp_path: Path) -> None:
    path = workload / f"{file}.safetensors"
    wanted = kohya_deltas(path, xl_names(original))
    assert len(wanted) == 986
    result = ao.convert(path, "diffusers", tmp_path / "d.safetensors")
    assert result.architecture.value == "sdxl"
    assert result.source_dialect == ("kohya" if original else "kohya-diffusers")
    ao.convert(tmp_path / "d.safetensors", "peft", tmp_path / "peft")
    ao.convert(tmp_path / "peft", "kohya", tmp_path / "k.safetensors")
    assert_same(dotted_deltas(tmp_path / "d.safetensors"), wanted)
    assert_same(peft_deltas(tmp_path / "peft"), wanted)
    assert_same(kohya_deltas(tmp_path / "k.safetensors", xl_names(True)), wanted)
    home = ao.convert(tmp_path / "peft", result.source_dialect, tmp_path / "home.safetensors")
    there, back = load_tensors(path), load_tensors(Path(home.path))
    assert there.keys() == back.keys()
    assert all(t.dtype == back[k].dtype and torch.equal(t, back[k]) for k, t in there.items())


@pytest.mark.parametrize(("file", "target"), [("k0", "diffusers"), ("d0", "kohya"), ("k0", "kohya-diffusers")])
def test_diffusers_adapts_exactly_the_sdxl_modules(file: str, target: str, workload: Path, tmp_path: Path) -> None:
    wanted = set(kohya_deltas(workload / f"{file}.safetensors", xl_names(file == "k0")))
    ao.convert(workload / f"{file}.safetensors", target, tmp_path / "x.safetensors")
    found = adapted_by_diffusers("sdxl", str(tmp_path / "x.safetensors"))
    assert found.keys() == wanted
    assert set(found.values()) == {0.5}


def test_peft_adapts_exactly_the_sdxl_modules(workload: Path, tmp_path: Path) -> None:
    wanted = set(kohya_deltas(workload / "k0.safetensors", xl_names(True)))
    result = ao.convert(workload / "k0.safetensors", "peft", tmp_path / "peft")
    # transformers 5's CLIPTextModel lost `text_model.`: the note says so, and --base of that class writes its names.
    assert any("text_encoder:" in note and "--base" in note for note in result.notes)
    models = build("sdxl")
    models["text_encoder"].config.save_pretrained(tmp_path / "clip")  # type: ignore[operator,union-attr]
    config = tmp_path / "clip" / "config.json"
    config.write_text(config.read_text().replace('"architectures": null', '"architectures": ["CLIPTextModel"]'))
    again = ao.convert(tmp_path / "peft" / "text_encoder", "peft", tmp_path / "te", base=config)
    assert any("text_model." in note for note in again.notes)
    folders = {c: tmp_path / "peft" / c for c in models} | {"text_encoder": tmp_path / "te"}
    found: dict[tuple[str, str], Any] = {}
    for component, model in models.items():
        with _no_missing_keys():
            loaded = PeftModel.from_pretrained(model, folders[component], low_cpu_mem_usage=True)
        found |= adapted(component, loaded.base_model.model)
    assert found.keys() == wanted
    assert {layer.scaling["default"] for layer in found.values()} == {0.5}


@contextlib.contextmanager
def _no_missing_keys() -> Iterator[None]:
    """Turn peft's warning about adapter keys that the file lacks into a failure."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        yield


@pytest.mark.parametrize(
    ("name", "arch"),
    [("kohya-sd15", "sd1"), ("diffusers-sd15", "sd1"), ("kohya-dora-output-sd15", "sd1"), ("kohya-sdxl", "sdxl")],
)
def test_diffusers_applies_each_modules_own_scale(name: str, arch: str, tmp_path: Path) -> None:
    """Ranks and alphas that differ by module: the header's patterns say to diffusers what the tensors said."""
    source = Path(__file__).parents[2] / "fixtures" / f"{name}.safetensors"
    result = ao.convert(source, "diffusers", tmp_path / "x.safetensors")
    wanted = {(u.component, u.module): METHODS["lora"].scale(u) for u in ao.load(source)}
    assert len(set(wanted.values())) > 1 or name != "kohya-sd15"
    assert adapted_by_diffusers(arch, result.path) == wanted


@pytest.mark.parametrize("name", ["kohya-sd15", "diffusers-sd15", "kohya-dora-output-sd15"])
def test_peft_applies_each_modules_own_scale(name: str, tmp_path: Path) -> None:
    source = Path(__file__).parents[2] / "fixtures" / f"{name}.safetensors"
    ao.convert(source, "peft", tmp_path / "peft")
    wanted = {u.module: METHODS["lora"].scale(u) for u in ao.load(source).of("unet")}
    folder = tmp_path / "peft" / "unet" if (tmp_path / "peft" / "unet").is_dir() else tmp_path / "peft"
    with _no_missing_keys():
        model = PeftModel.from_pretrained(build("sd1")["unet"], folder, low_cpu_mem_usage=True)
    found = {module: layer.scaling["default"] for (_, module), layer in adapted("unet", model.base_model.model).items()}
    assert found == wanted
