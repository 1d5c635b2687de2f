"""`--base CONFIG`: the architecture of any diffusers or transformers model, from its config alone.

The model is built on torch's meta device: no weights, no network, no code but the installed libraries'.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from adapterops.architectures.authors import with_originals
from adapterops.architectures.errors import BadBaseConfig
from adapterops.architectures.listing import list_modules, list_parameters
from adapterops.architectures.table import Architecture, Component

LOST_BEGINNINGS = {"CLIPTextModel": "text_model."}
"""Classes of which one version names its modules with a beginning that another has lost (transformers 4 and 5)."""

_LIBRARIES = {"diffusers": "ModelMixin", "transformers": "PreTrainedModel"}
"""The libraries whose models can be listed, and the base class that their models have in common."""

_RUNTIME_OPTIONS = (
    # Kernels and dtypes that need not be installed here, and do not change a module's name or shape.
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_internal",
    "dtype",
    "torch_dtype",
    # Would only make transformers look for code in the repository.
    "auto_map",
)


def from_config(path: str | os.PathLike[str]) -> Architecture:
    """The architecture that `path` describes.

    `path` is a config.json, a folder that holds one, a diffusers pipeline folder (model_index.json), or a
    folder whose subfolders hold a config.json each; every model among those becomes a component with its
    folder's name (schedulers, tokenizers and components of other libraries do not). A single model's
    component is `unet` or `transformer` where its diffusers class says so, otherwise `model`.

    Names are those of the installed library's class.  `original` repeats them, but where a built-in table for the
    class, written out for this config, is the model: then it is the authors' name, and fused modules come with it.

    Raises BadBaseConfig, which lists the causes.
    """
    path = Path(path)
    if path.is_dir():
        if (path / "model_index.json").is_file():
            return _pipeline(path)
        if (path / "config.json").is_file():
            return _single(path / "config.json")
        return _folders(path)
    if path.is_file():
        return _pipeline(path.parent) if path.name == "model_index.json" else _single(path)
    raise BadBaseConfig(f"{path}: no such file or folder; give a config.json, or a model's or pipeline's folder")


def _single(path: Path) -> Architecture:
    component = _component("model", path)
    class_name = component.class_name.rpartition(".")[2]
    if component.class_name.startswith("diffusers."):
        name = "model"
        if class_name.startswith("UNet"):
            name = "unet"
        elif "Transformer" in class_name and class_name.endswith("Model"):
            name = "transformer"
        component = replace(component, name=name)
    return _architecture(class_name, component.class_name, [component])


def _pipeline(folder: Path) -> Architecture:
    index_path = folder / "model_index.json"
    index = _read(index_path)
    components: list[Component] = []
    # Over the folders that are there, so that a name in the index cannot lead out of this one.
    for config_path in _component_configs(folder):
        match index.get(config_path.parent.name):
            case [("diffusers" | "transformers") as library, str(class_name)]:
                if _model_class(library, class_name, index_path) is not None:
                    components.append(_component(config_path.parent.name, config_path, class_name))
    if not components:
        raise BadBaseConfig(
            f"{index_path}: none of its diffusers or transformers models has a config.json in its subfolder; "
            "download those too"
        )
    pipeline = index.get("_class_name")
    return _architecture(pipeline if isinstance(pipeline, str) else folder.resolve().name, str(folder), components)


def _folders(folder: Path) -> Architecture:
    components = [_component(path.parent.name, path) for path in _component_configs(folder)]
    if not components:
        raise BadBaseConfig(
            f"{folder}: holds neither config.json nor model_index.json, nor subfolders with a config.json; "
            "give a model's or pipeline's folder"
        )
    return _architecture(folder.resolve().name, str(folder), components)


def _component_configs(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*/config.json") if path.is_file())


def _architecture(name: str, title: str, components: list[Component]) -> Architecture:
    by_name = {component.name: component for component in components}
    return Architecture(name=name, title=title, components=by_name, builtin=False)


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    # ValueError: not JSON, or not text; RecursionError: nested beyond what the parser takes.
    except (OSError, ValueError, RecursionError) as error:
        raise BadBaseConfig(f"{path}: not a readable JSON file ({error}); give a model's config.json") from error
    if not isinstance(document, dict):
        raise BadBaseConfig(f"{path}: holds no JSON object; give a model's config.json")
    return document


def _component(name: str, path: Path, class_name: str | None = None) -> Component:
    """Builds the model of one config; `class_name`, a pipeline's choice, goes before the config's own."""
    config = _read(path)
    library = "diffusers" if isinstance(config.get("_class_name"), str) else "transformers"
    if library == "transformers" and not {"architectures", "model_type"} & config.keys():
        raise BadBaseConfig(
            f"{path}: not the config of a diffusers or transformers model: it has none of `_class_name`, "
            "`architectures` and `model_type`; give a model's config.json"
        )
    build = _build_diffusers if library == "diffusers" else _build_transformers
    model = build(path, config, class_name)
    class_name = type(model).__name__
    modules = list_modules(model)
    bare = frozenset(path for path, _ in model.named_modules() if path and path not in modules)
    lost = LOST_BEGINNINGS.get(class_name, "")
    renamed = renamings(model, modules)
    component = Component(name, modules, f"{library}.{class_name}", config, bare, renamed, lost)
    component = replace(component, parameters=list_parameters(model))
    # Of a diffusers model a read-only dictionary, of a transformers one an object: both with the defaults filled in.
    complete = model.config if library == "diffusers" else model.config.to_dict()
    owners = {key.rpartition(".")[0] for key, _ in model.named_parameters(remove_duplicate=False)}
    return with_originals(component, complete, owners)


def renamings(model: Any, modules: Iterable[str]) -> dict[str, str]:
    """Published name to class name, by transformers' own mapping for the checkpoints of a class that was renamed.

    Source: transformers 5 `conversion_mapping.py`, `core_model_loading.py`.  Only plain renamings count: what splits or
    joins weights is no layout, and a lost beginning is told by the names themselves.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:  # before transformers 5 nothing was renamed
        return {}
    if not hasattr(model, "config") or not hasattr(model.config, "model_type"):
        return {}
    forward = get_model_conversion_mapping(model, add_legacy=False)
    back = [t.reverse_transform() for t in reversed(forward) if type(t) is WeightRenaming]
    out: dict[str, str] = {}
    for name in modules:
        published = f"{name}.weight"
        for renaming in back:
            published, _ = renaming.rename_source_key(published)
        if published != f"{name}.weight" and published.endswith(".weight"):
            out[published.removesuffix(".weight")] = name
    return out


def _build_diffusers(path: Path, config: Mapping[str, Any], class_name: str | None) -> Any:
    class_name = class_name or config["_class_name"]
    model_class = _model_class("diffusers", class_name, path)
    if model_class is None:
        raise BadBaseConfig(f"{path}: {class_name} is not a model; give the config of a model")
    with _on_meta(path, class_name):
        return model_class.from_config(dict(config))


def _build_transformers(path: Path, config: Mapping[str, Any], class_name: str | None) -> Any:
    transformers = _library("transformers", path)
    architectures = config.get("architectures")
    if class_name is None and isinstance(architectures, list) and architectures:
        class_name = str(architectures[0])
    model_type = config.get("model_type")
    values = {key: value for key, value in config.items() if key not in _RUNTIME_OPTIONS}
    model_class: Any = _attribute(transformers, class_name, path) if class_name else None
    if _is_model(model_class, transformers):
        config_class = model_class.config_class
        # A CLIPTextModel may come with the config of the whole CLIP, which holds its own.
        nested = values.get(config_class.base_config_key)
        with _on_meta(path, str(class_name)):
            return model_class(config_class.from_dict(nested if isinstance(nested, dict) else values))
    if isinstance(model_type, str) and model_type in transformers.CONFIG_MAPPING:
        with _on_meta(path, f"model type {model_type!r}"):
            config_object = transformers.CONFIG_MAPPING[model_type].from_dict(values)
            return transformers.AutoModel.from_config(config_object)
    if "auto_map" in config:
        raise BadBaseConfig(
            f"{path}: {class_name or model_type} is defined by code in the model's repository (`auto_map`), "
            "which adapterops does not run; use a version of the model that transformers implements"
        )
    raise BadBaseConfig(
        f"{path}: the installed transformers {transformers.__version__} knows neither the class "
        f"{class_name!r} nor the model type {model_type!r}; install a version that does"
    )


def _model_class(library: str, name: str, path: Path) -> Any:
    """The class `name` of `library`, None where it is not a model's. BadBaseConfig for an unknown name."""
    module = _library(library, path)
    found = _attribute(module, name, path)
    if not isinstance(found, type):
        raise BadBaseConfig(
            f"{path}: the installed {library} {module.__version__} has no class {name!r}; install a version that has it"
        )
    return found if _is_model(found, module) else None


def _is_model(found: object, library: ModuleType) -> bool:
    return isinstance(found, type) and issubclass(found, getattr(library, _LIBRARIES[library.__name__]))


def _attribute(module: ModuleType, name: str, path: Path) -> object:
    """What a library exports as `name`, None without such a name; both libraries import on access."""
    try:
        return getattr(module, name, None)
    except (ImportError, RuntimeError) as error:
        raise BadBaseConfig(
            f"{path}: {module.__name__}.{name} cannot be imported ({error}); install what it needs"
        ) from error


def _library(name: str, path: Path) -> ModuleType:
    try:
        importlib.import_module("torch")
        return importlib.import_module(name)
    except ImportError as error:
        raise BadBaseConfig(
            f"{path}: listing this model's modules needs {name}, which cannot be imported ({error}); "
            f"pip install adapterops[{name}]"
        ) from error


@contextmanager
def _on_meta(path: Path, what: str) -> Iterator[None]:
    """Builds without memory or network; whatever a model's constructor raises becomes BadBaseConfig."""
    import torch
    from huggingface_hub import constants

    # Some models fetch a backbone's weights while they are built; this flag is read at each request.
    offline, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        with torch.device("meta"):
            yield
    # A config comes from outside, and what it makes of a constructor is without bound.
    except Exception as error:
        raise BadBaseConfig(
            f"{path}: {what} cannot be built from this config ({type(error).__name__}: {error}); "
            "check that the config belongs to this class and that the library is not older than the model"
        ) from error
    finally:
        constants.HF_HUB_OFFLINE = offline
