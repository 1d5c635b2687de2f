"""Every base that is built in, in every spelling that is written: what diffusers makes of it, and what the rules say it does.

The truth is the installed diffusers: a LoRA is loaded into a shallow model of the base's own widths on the meta device, and
what each module then adds to some inputs is compared with what the adapter says.
"""

from __future__ import annotations

import importlib
import json
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from sound import found

import adapterops as ao
from adapterops import architectures, errors, registry
from adapterops.adapter import Adapter
from adapterops.architectures import Architecture, Component, ModuleSpec
from adapterops.plugin import AlphaIn
from adapterops.validation.rules.diffusers_reads import LOADERS, LOKR, LORA

pytest.importorskip("diffusers")
pytest.importorskip("peft")

FORMATS = ("kohya", "comfy", "diffusers", "flux", "peft")
DIALECTS = {
    d.name: d.alpha
    for name in FORMATS
    for d in registry.formats()[name].dialects
    if d.written and not d.name.endswith("bundled")
}
"""The spellings that image models' adapters are written in, and where the alpha of each stands."""
SHOWN_BY_ALPHA = ("onetrainer-original",)
"""Spellings that are nobody's without an alpha."""
HEADS = [n for n in architectures.names() if (LORA.get(n) and n != "sd2") or n == "wan_14b_i2v"]
"""One base of each row and, where modules differ, another; Stable Diffusion 2 has 1's but for widths."""
RANK = 3
DEPTH: Mapping[str, int | list[int]] = {
    **dict.fromkeys(("num_layers", "num_single_layers", "n_layers", "num_hidden_layers"), 2),
    "transformer_layers_per_block": [1, 1, 1],
}
"""How deep the models are: the last block of some differs from the others."""
_NUMBERED = re.compile(r"(?:blocks|layers)\.(?:image\.|image_cond\.)?(\d+)\.")
_ATTENTION = re.compile(r"(attn\d?|attention)\.(to_|add_)")


class Variant(NamedTuple):
    """Which modules have a LoRA (`all`, those in `blocks`, the `attention` in blocks), and where its alpha stands."""

    modules: str
    alpha: float | None
    tensors: bool
    """Whether alphas are left in a file whose spelling has them as tensors."""


VARIANTS = (Variant("all", RANK / 2, True), Variant("attention", None, False))
WHOLE = Variant("blocks", None, True)
"""For bases of which some spelling is read only where every module of the blocks is there."""


@pytest.fixture(autouse=True)
def _kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Factors stay where they are, although the model has no weights; and nothing is said."""
    layer = importlib.import_module("peft.tuners.tuners_utils").BaseTunerLayer
    monkeypatch.setattr(layer, "_move_adapter_to_device_of_base_layer", lambda *_, **__: None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_every_base_has_its_loader() -> None:
    """And the loaders' components are diffusers' own."""
    mixins = importlib.import_module("diffusers.loaders.lora_pipeline")
    for name in architectures.names():
        base = architectures.load(name)
        assert base.family in LOADERS, name
        assert {base.name, base.family} & LORA.keys(), name
    for name, loader in LOADERS.items():
        if not loader.mixin:
            assert not LORA[name]
            continue
        mixin = getattr(mixins, f"{loader.mixin}LoraLoaderMixin")
        own = tuple(n for n in mixin._lora_loadable_modules if (name, n) != ("chroma", "text_encoder"))
        assert own == loader.components, name
    known = {d.name for form in registry.formats().values() for d in form.dialects}
    for table in (*LORA.values(), *LOKR.values()):
        assert table.keys() <= known


def test_pipelines_without_a_loader_have_none() -> None:
    """PixArt's, HunyuanDiT's and Stable Cascade's, nor the classes of their models; HunyuanVideo 1.5's and HunyuanImage's."""
    diffusers: Any = importlib.import_module("diffusers")
    for pipelines in ("HunyuanVideo15Pipeline", "HunyuanVideo15ImageToVideoPipeline", "HunyuanImagePipeline"):
        assert not hasattr(getattr(diffusers, pipelines), "load_lora_weights")
    assert not hasattr(diffusers.PixArtSigmaPipeline, "load_lora_weights")
    assert not hasattr(diffusers.PixArtAlphaPipeline, "load_lora_weights")
    assert not hasattr(diffusers.PixArtTransformer2DModel, "load_lora_adapter")
    for pipelines in ("HunyuanDiTPipeline", "StableCascadePriorPipeline", "StableCascadeCombinedPipeline"):
        assert not hasattr(getattr(diffusers, pipelines), "load_lora_weights")
    assert not hasattr(diffusers.HunyuanDiT2DModel, "load_lora_adapter")
    assert not hasattr(diffusers.StableCascadeUNet, "load_lora_adapter")


@cache
def shallow(name: str) -> Architecture:
    """The base, of its denoiser alone and few blocks."""
    base = architectures.load(name)
    own = denoiser(base)
    component = base.components[own]
    config = {key: DEPTH.get(key, value) for key, value in component.config.items()}
    return base._replace(components={own: replace(component, config=config)})


def denoiser(base: Architecture) -> str:
    return "unet" if "unet" in base.components else "transformer"


def pipeline(name: str) -> Any:
    """What a loader needs of a pipeline."""
    base = shallow(name)
    own = denoiser(base)
    library, _, class_name = base.components[own].class_name.partition(".")
    with torch.device("meta"):
        model = getattr(importlib.import_module(library), class_name).from_config(dict(base.components[own].config))
    mixins = importlib.import_module("diffusers.loaders.lora_pipeline")
    mixin = getattr(mixins, f"{LOADERS[base.family].mixin}LoraLoaderMixin")
    absent = dict.fromkeys(mixin._lora_loadable_modules, None)
    kind = type("Pipeline", (mixin,), {"hf_device_map": None, "components": {own: model}, **absent, own: model})
    return kind()


def modules(component: Component, which: str) -> dict[str, ModuleSpec]:
    """The modules outside the blocks, and those of the first block of each kind."""
    out = {}
    for name, spec in component.modules.items():
        if spec.kind not in ("linear", "conv") or (component.name == "unet" and not name.startswith("mid_block")):
            continue
        number = _NUMBERED.search(name)
        inside = number is not None and "distilled" not in name and "refiner" not in name
        wanted = which == "all" or (inside and (which == "blocks" or _ATTENTION.search(name)))
        if wanted and (number is None or int(number[1]) == 0):
            out[name] = spec
    return out


def written(path: Path, base: Architecture, variant: Variant) -> dict[str, torch.Tensor]:
    """A LoRA as diffusers saves it; what each module makes of some inputs."""
    own = denoiser(base)
    specs = modules(base.components[own], variant.modules)
    tensors, wanted = {}, {}
    generator = torch.Generator().manual_seed(0)
    for name, spec in specs.items():
        out, inputs, *kernel = spec.shape
        a = torch.randn(RANK, inputs, *kernel, generator=generator).bfloat16()
        b = torch.randn(out, RANK, *(1 for _ in kernel), generator=generator).bfloat16()
        tensors[f"{own}.{name}.lora_A.weight"], tensors[f"{own}.{name}.lora_B.weight"] = a, b
        wanted[name] = applied(a, b) * (1.0 if variant.alpha is None else variant.alpha / RANK)
    header = {"format": "pt"}
    if variant.alpha is not None:
        fields = {"r": RANK, "lora_alpha": variant.alpha, "target_modules": list(specs), "peft_type": "LORA"}
        header["lora_adapter_metadata"] = json.dumps({f"{own}.{k}": v for k, v in fields.items()})
    save_file(tensors, path, header)
    return wanted


def applied(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    a, b = a.detach().float().flatten(1), b.detach().float().flatten(1)
    return b @ (a @ _inputs(a.shape[1]))


@cache
def _inputs(width: int) -> torch.Tensor:
    return torch.randn(width, 2, generator=torch.Generator().manual_seed(1))


def spelled(adapter: Adapter, dialect: str, tensors: bool, folder: Path) -> tuple[Path, Path] | None:
    """The adapter in a dialect, and the file of its weights; None where the dialect cannot say it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    out = folder / ("a" if dialect in ("peft", "loralib") else "a.safetensors")
    try:
        ao.save(adapter, out, format=dialect, verify=False)
    except errors.AdapterOpsError:
        return None
    file = out if out.is_file() else out / "adapter_model.safetensors"
    if not file.is_file():
        return None
    values = load_file(file)
    alphas = [key for key in values if key.endswith(".alpha")]
    if alphas and not tensors:
        save_file({key: value for key, value in values.items() if key not in alphas}, file, {"format": "pt"})
    return out, file


class Shown(NamedTuple):
    """What loading a file showed: whether it failed, and which modules got nothing or something else."""

    failed: bool
    wrong: frozenset[str]


class Tried:
    """A pipeline that files are loaded into, one after the other."""

    def __init__(self, name: str) -> None:
        self.name, self.pipe = name, pipeline(name)

    def __call__(self, file: Path, wanted: Mapping[str, torch.Tensor]) -> Shown:
        try:
            self.pipe.load_lora_weights(str(file), adapter_name="default")
            got = dict(self._made())
            self.pipe.unload_lora_weights()
        except Exception:  # noqa: BLE001 - whatever the library raises, the file did not load
            if any("lora_" in name or "lokr_" in name for name, _ in self._model.named_modules()):
                self.pipe = pipeline(self.name)
            return Shown(True, frozenset(wanted))
        return Shown(False, frozenset(_differing(got, wanted)))

    @property
    def _model(self) -> Any:
        return next(iter(self.pipe.components.values()))

    def _made(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, layer in self._model.named_modules():
            if "default" in getattr(layer, "lora_A", ()):
                a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
                if not (a.is_meta or b.is_meta):
                    yield name, applied(a, b) * layer.scaling["default"]
            elif "default" in getattr(layer, "lokr_w2", ()) or "default" in getattr(layer, "lokr_w2_a", ()):
                delta = layer.get_delta_weight("default").detach().float()
                yield name, delta @ _inputs(delta.shape[1])


def _differing(got: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """The modules that got nothing, or something else; none of no use (zeros, where a fused module's part has no update)."""
    for name in {**got, **wanted}:
        one, other = got.get(name), wanted.get(name)
        if one is None or other is None:
            if other is not None or (one is not None and bool((one != 0).any())):
                yield name
        elif one.shape != other.shape or not torch.allclose(one, other, rtol=0, atol=0.03 * float(other.abs().max())):
            yield name


def named(path: Path, base: Architecture) -> tuple[list[str], set[str]]:
    """The codes of what is found for diffusers, and the modules whose tensors are named."""
    told = list(found(path, targets=["diffusers"], select=["L5"], arch=base.name))
    keys = {key for finding in told for key in finding.where}
    component = base.components[denoiser(base)]
    out = set()
    for update in ao.load(path, arch=base.name) if told else ():
        if any(tensor.key in keys for tensor in update.tensors.values()):
            fused = component.fused.get(update.module)
            out.update([update.module] if fused is None else [name for name, _, _ in fused.joins])
    return [finding.code for finding in told], out


def disagreement(shown: Shown, codes: list[str], told: set[str], wanted: Mapping[str, Any]) -> str:
    """How the rules and diffusers differ; "" where they do not."""
    if bool(codes) != bool(shown.wrong):
        return f"diffusers {'fails' if shown.failed else sorted(shown.wrong)[:3]}, the rules say {codes}"
    if not shown.failed and told & wanted.keys() != shown.wrong & wanted.keys():
        vain = sorted((told & wanted.keys()) - shown.wrong)
        return f"{codes}: not told {sorted(shown.wrong - told)[:3]}, told in vain {vain[:3]}"
    return ""


@pytest.mark.parametrize("name", HEADS)
def test_the_rules_say_what_diffusers_does(name: str, tmp_path: Path) -> None:
    base, tried = architectures.load(name), Tried(name)
    wrong, read = {}, set()
    whole = [WHOLE] if any(row.whole for row in LORA.get(name, LORA[base.family]).values()) else []
    for variant in (*VARIANTS, *whole):
        source = tmp_path / "source.safetensors"
        wanted = written(source, base, variant)
        adapter = ao.load(source, arch=name)
        for dialect in DIALECTS:
            if not variant.tensors and (dialect in SHOWN_BY_ALPHA or DIALECTS[dialect] is AlphaIn.CONFIG):
                continue
            made = spelled(adapter, dialect, variant.tensors, tmp_path / "out")
            if made is None:
                continue
            shown = tried(made[1], wanted)
            read |= set() if shown.wrong else {dialect}
            wrong[variant.modules, dialect] = disagreement(shown, *named(made[0], base), wanted)
    assert {at: told for at, told in wrong.items() if told} == {}
    assert "diffusers-alpha" in read


def test_later_blocks_of_wan(tmp_path: Path) -> None:
    """Kohya's names are read from the first block on only; Comfy's of any."""
    base, tried = architectures.load("wan_14b"), Tried("wan_14b")
    source = tmp_path / "source.safetensors"
    wanted = written(source, base, WHOLE)
    save_file({key.replace("blocks.0.", "blocks.1."): value for key, value in load_file(source).items()}, source)
    wanted = {name.replace("blocks.0.", "blocks.1."): value for name, value in wanted.items()}
    adapter = ao.load(source, arch="wan_14b")
    for dialect, codes in (("kohya", ["L584"]), ("comfy", []), ("comfy-down", [])):
        path, file = spelled(adapter, dialect, True, tmp_path / "out") or pytest.fail(dialect)
        assert named(path, base)[0] == codes
        assert bool(tried(file, wanted).wrong) == bool(codes)


@pytest.mark.parametrize(
    ("name", "key", "codes"),
    [
        ("hunyuan_video", "single_blocks.0.linear2", ["L587"]),
        ("hunyuan_video", "double_blocks.0.img_attn_qkv", []),
        ("wan_14b", "head.head", ["L587"]),
        ("wan_14b", "blocks.0.ffn.0", []),
    ],
)
def test_the_key_that_spellings_are_known_by(name: str, key: str, codes: list[str], tmp_path: Path) -> None:
    base = architectures.load(name)
    component = base.components["transformer"]
    spec = next(s for s in (*component.modules.values(), *component.fused.values()) if s.original == key)
    file = tmp_path / "a.safetensors"
    a, b = torch.randn(RANK, spec.shape[1]), torch.randn(spec.shape[0], RANK)
    stem = f"diffusion_model.{key}"
    save_file({f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}, file)
    assert named(file, base)[0] == codes
    names = [spec.name] if not spec.joins else [part for part, _, _ in spec.joins]
    parts = [b] if not spec.joins else [b[start:stop] for start, stop in _rows(spec, component)]
    wanted = {module: applied(a, part) for module, part in zip(names, parts, strict=True)}
    assert bool(Tried(name)(file, wanted).wrong) == bool(codes)


def _rows(spec: ModuleSpec, component: Component) -> Iterator[tuple[int, int]]:
    """Where a fused module's parts stand in it, one after the other."""
    at = 0
    for part, start, stop in spec.joins:
        assert (start, stop) == (0, component.modules[part].shape[0])
        yield at, at + stop
        at += stop


LOKR_OF = {
    "flux2_klein_4b": ("ff.linear_in", "attn.to_out.0"),
    "z_image": ("feed_forward.w1", "attention.to_out.0"),
    "flux": ("ff.net.2",),
}


@pytest.mark.parametrize("name", LOKR_OF)
def test_lokr(name: str, tmp_path: Path) -> None:
    """LoKr of a few modules in every spelling that says it: with alphas, and without."""
    base, tried = architectures.load(name), Tried(name)
    specs = base.components["transformer"].modules
    block = "layers.0." if name == "z_image" else "transformer_blocks.0."
    tensors, wanted = {}, {}
    for at, module in enumerate(f"{block}{end}" for end in LOKR_OF[name]):
        out, inputs = specs[module].shape
        generator = torch.Generator().manual_seed(at)
        stem = f"lycoris_{module.replace('.', '_')}"
        w1, w2 = torch.randn(64, 64, generator=generator), torch.randn(out // 64, inputs // 64, generator=generator)
        tensors[f"{stem}.lokr_w1"], tensors[f"{stem}.lokr_w2"], tensors[f"{stem}.alpha"] = w1, w2, torch.tensor(1.0)
        wanted[module] = torch.kron(w1, w2) @ _inputs(inputs)
    source = tmp_path / "source.safetensors"
    save_file(tensors, source)
    adapter = ao.load(source, arch=name)
    wrong, read = {}, set()
    for dialect in DIALECTS:
        for alphas in (True, False):
            if not alphas and (dialect in SHOWN_BY_ALPHA or DIALECTS[dialect] is not AlphaIn.TENSOR):
                continue
            made = spelled(adapter, dialect, alphas, tmp_path / "out")
            if made is None:
                continue
            shown = tried(made[1], wanted)
            read |= set() if shown.wrong else {dialect}
            wrong[dialect, alphas] = disagreement(shown, *named(made[0], base), wanted)
    assert {at: told for at, told in wrong.items() if told} == {}
    assert bool(read) == (name != "flux")


def test_components_that_a_loader_has_not(tmp_path: Path) -> None:
    """Stable Diffusion 3's loader gives its third text encoder nothing."""
    file = tmp_path / "a.safetensors"
    source = architectures.load("sd3")
    tensors = {}
    for component in ("text_encoder_2", "text_encoder_3"):
        name, spec = next((n, s) for n, s in source.components[component].modules.items() if s.kind == "linear")
        tensors[f"{component}.{name}.lora_A.weight"] = torch.randn(RANK, spec.shape[1])
        tensors[f"{component}.{name}.lora_B.weight"] = torch.randn(spec.shape[0], RANK)
    save_file(tensors, file)
    (finding,) = found(file, targets=["diffusers"], select=["L5"], arch="sd3")
    assert finding.code == "L588"
    assert {key.partition(".")[0] for key in finding.where} == {"text_encoder_3"}
