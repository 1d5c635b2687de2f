"""The built-in tables against the classes of diffusers and transformers, and their SD key conversion."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from typing import Any

import pytest

from adapterops import architectures
from adapterops.architectures import Component, UnknownArchitecture, load, names
from adapterops.architectures.expression import Scope, evaluate, fill
from adapterops.architectures.listing import list_modules
from adapterops.architectures.table import _component, _read, likes
from adapterops.architectures.template import Expander

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

COMPONENTS = [(name, key) for name in names() for key, own in load(name).components.items() if own.class_name]
"""Those of which a library has the class."""
UNETS = [name for name, component in COMPONENTS if component == "unet"]


@cache
def build(name: str, component_name: str) -> Any:
    """The component's model on the meta device, built by the library that defines it."""
    component = load(name).components[component_name]
    library, _, class_name = component.class_name.partition(".")
    model_class = getattr(importlib.import_module(library), class_name)
    config = dict(component.config)
    with torch.device("meta"):
        if library == "diffusers":
            return model_class.from_config(config)
        return model_class(model_class.config_class(**config))


def published_parameters(name: str, component_name: str) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(module, parameter, shape) under the names of the published checkpoints."""
    model = build(name, component_name)
    # transformers 5 dropped this prefix from the class; the checkpoints, and the adapters, have it.
    prefix = "text_model." if type(model).__name__ == "CLIPTextModel" else ""
    for key, parameter in model.named_parameters(remove_duplicate=False):
        module, _, own_name = (prefix + key.removeprefix(prefix)).rpartition(".")
        yield module, own_name, tuple(parameter.shape)


def owned_parameters(component: Component) -> dict[str, tuple[str, ...]]:
    owned = {spec.name: spec.params for spec in component.modules.values()}
    for path in component.parameters:
        module, _, own = path.rpartition(".")
        owned[module] = (*owned.get(module, ()), own)
    return owned


@pytest.mark.parametrize(("name", "component_name"), COMPONENTS)
def test_modules_are_exactly_those_of_the_class(name: str, component_name: str) -> None:
    component = load(name).components[component_name]
    shapes: dict[str, tuple[int, ...]] = {}
    bare: dict[str, tuple[int, ...]] = {}
    params: dict[str, set[str]] = {}
    for module, parameter, shape in published_parameters(name, component_name):
        params.setdefault(module, set()).add(parameter)
        if parameter == "weight":
            shapes[module] = shape
        elif parameter != "bias" or f"{module}.bias" in component.parameters:
            bare[f"{module}.{parameter}".lstrip(".")] = shape
    assert {key: set(value) for key, value in owned_parameters(component).items()} == params
    assert {key: spec.shape for key, spec in component.modules.items()} == shapes
    assert {key: spec.shape for key, spec in component.parameters.items()} == bare
    assert {key for key, spec in component.modules.items() if spec.bias} == {
        key for key, value in params.items() if {"weight", "bias"} <= value
    }


@pytest.mark.parametrize(("name", "component_name"), COMPONENTS)
def test_kinds_are_those_of_the_classes_modules(name: str, component_name: str) -> None:
    wan_animate = importlib.import_module("diffusers.models.transformers.transformer_wan_animate")
    kinds = {
        torch.nn.Linear: "linear",
        torch.nn.Conv2d: "conv",
        torch.nn.Conv3d: "conv",
        torch.nn.Conv1d: "conv",
        torch.nn.ConvTranspose1d: "other",
        wan_animate.MotionConv2d: "conv",
        wan_animate.MotionLinear: "linear",
        torch.nn.Embedding: "embedding",
        torch.nn.LayerNorm: "norm",
        torch.nn.GroupNorm: "norm",
        torch.nn.RMSNorm: "norm",
        importlib.import_module("diffusers.models.normalization").RMSNorm: "norm",
        importlib.import_module("diffusers.models.normalization").MochiRMSNorm: "norm",
        **{
            getattr(importlib.import_module(f"transformers.models.{model}.modeling_{model}"), norm): "norm"
            for model, norm in (
                ("t5", "T5LayerNorm"),
                ("qwen3", "Qwen3RMSNorm"),
                ("gemma2", "Gemma2RMSNorm"),
                ("llama", "LlamaRMSNorm"),
            )
        },
        importlib.import_module("diffusers.models.transformers.transformer_krea2").Krea2RMSNorm: "norm",
        importlib.import_module(
            "diffusers.models.transformers.transformer_qwenimage21"
        ).QwenImage21ZeroCenterRMSNorm: "norm",
        # The gate of a mixture of experts: a weight of its own, by which it multiplies.
        importlib.import_module("diffusers.models.transformers.transformer_hidream_image").MoEGate: "linear",
    }
    modules = dict(build(name, component_name).named_modules())
    for spec in load(name).components[component_name].modules.values():
        module = modules.get(spec.name) or modules[spec.name.removeprefix("text_model.")]
        expected = next(kind for module_type, kind in kinds.items() if isinstance(module, module_type))
        assert spec.kind == expected, spec


@pytest.mark.parametrize(("name", "component_name"), COMPONENTS)
def test_specs_are_consistent(name: str, component_name: str) -> None:
    component = load(name).components[component_name]
    every = {**component.modules, **component.fused, **component.parameters}
    originals = [spec.original for spec in every.values() if spec.original]
    assert len(set(originals)) == len(originals)
    assert len({name.replace(".", "_") for name in originals}) == len(originals), "two have one flattened Kohya name"
    assert all(key == spec.name for key, spec in every.items())
    assert all(type(spec.bias) is bool for spec in every.values())
    flattened = {key.replace(".", "_") for key in every}
    assert len(flattened) == len(every), "two modules have one flattened Kohya name"


@pytest.mark.parametrize(("name", "component_name"), COMPONENTS)
def test_ties_are_those_of_the_class(name: str, component_name: str) -> None:
    expected = {spec.name: spec.tied_to for spec in list_modules(build(name, component_name)).values() if spec.tied_to}
    modules = load(name).components[component_name].modules
    assert {spec.name: spec.tied_to for spec in modules.values() if spec.tied_to} == expected


@pytest.mark.parametrize(("name", "component_name"), COMPONENTS)
def test_what_has_no_original_is_part_of_exactly_one_fused_module(name: str, component_name: str) -> None:
    component = load(name).components[component_name]
    pieces: dict[str, list[tuple[int, int]]] = {}
    for whole in component.fused.values():
        if whole.partial:
            continue
        assert whole.kind == "linear"
        for part, start, stop in whole.joins:
            pieces.setdefault(part, []).append((start, stop))
            assert component.modules[part].bias == whole.bias
            assert whole.name in component.whole[part]
    assert set(pieces) == {key for key, spec in component.modules.items() if not spec.original}
    for part, ranges in pieces.items():
        starts, stops = zip(*sorted(ranges), strict=True)
        assert (0, *stops) == (*starts, component.modules[part].shape[0]), part


@pytest.mark.parametrize("name", UNETS)
def test_diffusers_converts_original_unet_names_to_ours(name: str) -> None:
    """diffusers' own single-file conversion takes our original names to our canonical ones."""
    component = load(name).components["unet"]
    # The conversion only renames; the tensor itself shows where it came from.
    tags: dict[int, str] = {}
    checkpoint: dict[str, Any] = {}
    for spec in component.modules.values():
        # Of what variants have besides no checkpoint in the authors' names tells.
        besides = spec.name == "encoder_hid_proj" or ".motion_modules." in spec.name
        for parameter in () if besides else spec.params:
            tensor = torch.empty(0)
            tags[id(tensor)] = f"{spec.name}.{parameter}"
            checkpoint[f"model.diffusion_model.{spec.original}.{parameter}"] = tensor
    conversion: Any = importlib.import_module("diffusers.loaders.single_file_utils")
    converted = conversion.convert_ldm_unet_checkpoint(checkpoint, build(name, "unet").config)
    assert {key: tags[id(tensor)] for key, tensor in converted.items()} == {tag: tag for tag in tags.values()}


def test_original_names_seen_in_published_files() -> None:
    """Spot checks against names in CompVis' and Stability's own checkpoints, independent of diffusers."""
    sd1 = load("sd1").components["unet"].modules
    assert sd1["down_blocks.1.attentions.0.proj_in"].original == "input_blocks.4.1.proj_in"
    assert sd1["up_blocks.0.upsamplers.0.conv"].original == "output_blocks.2.1.conv"
    assert sd1["up_blocks.1.upsamplers.0.conv"].original == "output_blocks.5.2.conv"
    assert sd1["mid_block.resnets.1.time_emb_proj"].original == "middle_block.2.emb_layers.1"
    sdxl = load("sdxl").components["unet"].modules
    assert sdxl["add_embedding.linear_1"].original == "label_emb.0.0"
    key = "up_blocks.0.attentions.2.transformer_blocks.9.ff.net.0.proj"
    assert sdxl[key].original == "output_blocks.2.1.transformer_blocks.9.ff.net.0.proj"


def test_load_returns_the_same_object_and_names_are_sorted() -> None:
    assert names() == tuple(sorted(names()))
    assert {"flux", "qwen_image", "sd1", "sd2", "sd3", "sd35_large", "sd35_medium", "sdxl"} <= set(names())
    assert load("sd1") is load("sd1")
    assert load("sd1").builtin


@pytest.mark.parametrize("name", ["sd9", "", "shared/clip", "../architectures/sd1"])
def test_unknown_architecture_names_the_known_ones(name: str) -> None:
    with pytest.raises(UnknownArchitecture, match=r"adapterops architectures lists the known ones.*--base"):
        load(name)


def test_loading_imports_nothing_heavy() -> None:
    code = (
        "import sys; from adapterops.architectures import load, names; [load(name) for name in names()];"
        "print([m for m in ('torch', 'numpy', 'diffusers', 'transformers') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("name", names())
def test_what_is_told_without_parsing_a_file_is_what_it_says(name: str) -> None:
    known = load(name)
    document = _read(str(files(architectures) / f"{name}.toml"))
    assert (known.title, known.released) == (document["title"], document["released"])
    assert known.family == document.get("family", name)
    assert list(known.components) == list(document["components"])


def test_a_file_is_parsed_when_its_modules_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[Any] = []
    monkeypatch.setattr(tomllib, "load", lambda file: parsed.append(file) or {"components": {}})
    _read.cache_clear()
    try:
        lazy = load.__wrapped__("sd3").components
        assert (len(lazy), "text_encoder_3" in lazy, "unet" in lazy) == (4, True, False)
        assert not parsed
        with pytest.raises(KeyError):
            lazy["transformer"]
        assert parsed
    finally:
        _read.cache_clear()


def test_rows_are_written_out_when_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Expander] = []
    expand = Expander.expand

    def observe(self: Expander, *arguments: Any) -> Any:
        asked.append(self)
        return expand(self, *arguments)

    monkeypatch.setattr(Expander, "expand", observe)
    component = load.__wrapped__("flux").components["transformer"]
    assert not asked
    assert "x_embedder" in component.modules
    assert asked


def test_defaults_and_products_come_from_the_config() -> None:
    """Null and missing are one; a number of the config goes before a default."""
    built_in = load("flux").components["transformer"]
    sizes = []
    for more in ({}, {"out_channels": None}, {"out_channels": 3, "patch_size": 2}):
        (component,) = likes(built_in.class_name, {**built_in.config, "num_layers": 1, "num_single_layers": 1, **more})
        sizes.append(component.modules["proj_out"].shape)
    assert sizes == [(64, 3072), (64, 3072), (12, 3072)]


def test_numbers_that_a_list_leaves_out() -> None:
    """`others`, and what it says of a list that the config lacks, or of something else."""
    row = {"for": {"i": "rest"}, "canonical": "{i}", "linear": [1, 1]}
    table = {"class": "library.Class", "rows": [row], "others": {"rest": ["layers", "some"]}}
    assert list(_component("part", table, {}, {"layers": 4, "some": (0, 2)}).modules) == ["1", "3"]
    assert list(_component("part", table, {}, {"layers": 2, "some": []}).modules) == ["0", "1"]
    for config, reason in (
        ({"layers": 2}, "unknown name 'some'"),
        ({"layers": 2, "some": 1}, "'some' needs a list, not 1"),
    ):
        with pytest.raises(ValueError, match=f"component part: {reason}"):
            len(_component("part", table, {}, config).modules)


def test_a_component_of_another_architecture_is_the_same() -> None:
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        assert load("sd35_large").components[name] is load("sd3").components[name]


def test_bare_parameters_are_listed_by_their_own_names() -> None:
    component = load("wan_14b").components["transformer"]
    of_block, of_root = component.spec("blocks.39.scale_shift_table"), component.spec("scale_shift_table")
    assert of_block is not None
    assert of_root is not None
    assert (of_block.original, of_block.shape, of_block.params) == (
        "blocks.39.modulation",
        (1, 6, 5120),
        ("scale_shift_table",),
    )
    assert (of_root.original, of_root.shape, of_root.bias) == ("head.modulation", (1, 2, 5120), False)
    assert not {"scale_shift_table", "blocks.39", ""} & set(component.modules)


def test_a_config_without_a_needed_number_is_told() -> None:
    (component,) = likes("diffusers.FluxTransformer2DModel", {"num_layers": 1})
    with pytest.raises(ValueError, match=r"component transformer: unknown name 'in_channels'"):
        len(component.modules)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("7", 7), ("3b+l+1", 8), ("8c", 40), ("w[b-1]", 20), ("2w[0] - 3", 17), ("m[1][l]", 4)],
)
def test_expressions(text: str, expected: int) -> None:
    scope: Scope = {"b": 2, "l": 1, "c": 5, "w": [10, 20, 30], "m": [[1, 2], [3, 4]]}
    assert evaluate(text, scope) == expected


@pytest.mark.parametrize(
    "text", ["", "-w[0]", "a*b", "a.b", "f(1)", "w[0", "w]", "1 2", "a", "w[-1]", "w[3]", "w+1", "__import__"]
)
def test_bad_expressions_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"malformed|unknown name|out of range|needs an integer"):
        evaluate(text, {"w": [1, 2, 3]})


def test_fill_replaces_each_field() -> None:
    assert fill("blocks.{2i+1}.{p}", {"i": 3, "p": "to_q"}) == "blocks.7.to_q"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"canonical": "x"}, "exactly one of"),
        ({"canonical": "x", "linear": [1, 2], "norm": [1]}, "exactly one of"),
        ({"canonical": "x", "linear": [1, 2], "orignal": "y"}, "orignal"),
        ({"linear": [1, 2]}, "canonical"),
        ({"canonical": "", "linear": [1, 2]}, "needs a name"),
        ({"canonical": "x", "linear": [1, 2], "parameter": [1, 2]}, "exactly one of"),
        ({"canonical": "x", "use": "nothing"}, "unknown template 'nothing'"),
        ({"canonical": "x", "norm": [1.5]}, "neither an integer"),
        ({"canonical": "x", "linear": [1, 1], "joins": [["y", 0]]}, "not enough values"),
        ({"canonical": "x", "linear": [1, 1], "joins": [["y", 0, "n"]]}, "unknown name 'n'"),
    ],
)
def test_bad_rows_are_refused(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Expander({}, {}).expand([row])


@pytest.mark.parametrize(
    ("joins", "reason"),
    [
        (["a", "c"], "joins 'c', which is not listed"),
        (["a"], "is not that of the 2 rows"),
        ([["a", 0, 2], ["b", 0, 1]], "is not that of the 3 rows"),
        (["a", "wide"], "is not that of the 4 rows"),
    ],
)
def test_fused_modules_that_do_not_fit_their_pieces_are_refused(joins: list[Any], reason: str) -> None:
    rows = [{"canonical": name, "linear": [2, 3]} for name in ("a", "b")]
    rows += [{"canonical": "wide", "linear": [2, 4]}, {"canonical": "ab", "linear": [4, 3], "joins": joins}]
    component = _component("part", {"class": "library.Class", "rows": rows}, {}, {})
    with pytest.raises(ValueError, match=f"component part: ab: .*{reason}"):
        len(component.fused)
