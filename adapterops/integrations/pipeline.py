"""The architecture of a live pipeline: its models' own modules, whatever their widths and depths."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from adapterops.adapter import COMPONENTS
from adapterops.architectures import Architecture, Component, ModuleSpec
from adapterops.architectures.authors import with_originals
from adapterops.architectures.base import LOST_BEGINNINGS, renamings
from adapterops.architectures.listing import list_modules

_known: list[Architecture] = []
"""The architectures that were made, so that equal pipelines share one: what is looked up in it is kept with it."""


def architecture_of(pipe: Any) -> Architecture:
    """The architecture of `pipe`'s models, named after its class.

    Names are those of the installed libraries' classes; the authors' own ones, too, where a built-in table describes
    the model.  Adapters that are loaded already are looked through.
    """
    from torch import nn

    components = {
        name: component_of(name, model)
        for name, model in pipe.components.items()
        if isinstance(model, nn.Module) and (name in COMPONENTS or name in getattr(pipe, "_lora_loadable_modules", ()))
    }
    made = Architecture(type(pipe).__name__, type(pipe).__name__, components, builtin=False)
    known = next((architecture for architecture in _known if architecture == made), None)
    if known is None:
        _known.append(made)
    return known or made


def component_of(name: str, model: Any) -> Component:
    """One model as a component of that name."""
    wrappers = _wrappers(model)
    modules = {}
    for path, spec in list_modules(model).items():
        own = _unwrapped(path, wrappers)
        if own is not None:
            tied = _unwrapped(spec.tied_to, wrappers) if spec.tied_to else None
            modules[own] = _whole(spec._replace(name=own, original=own, tied_to=tied), model.get_submodule(path))
    paths = {own for path, _ in model.named_modules() if path and (own := _unwrapped(path, wrappers)) is not None}
    config = model.config.to_dict() if hasattr(model.config, "to_dict") else dict(model.config)
    kind = type(model).__name__
    component = Component(
        name,
        modules,
        f"{type(model).__module__.partition('.')[0]}.{kind}",
        config,
        bare=frozenset(paths - modules.keys()),
        renamed=renamings(model, modules),
        optional_prefix=LOST_BEGINNINGS.get(kind, ""),
    )
    owners = {key.rpartition(".")[0] for key, _ in model.named_parameters(remove_duplicate=False)}
    return with_originals(component, config, {own for o in owners if (own := _unwrapped(o, wrappers)) is not None})


def _wrappers(model: Any) -> dict[str, str]:
    """The path of every layer that peft wraps around a module, with the name under which it keeps that module."""
    return dict(_walk(model))


def _walk(model: Any) -> Iterator[tuple[str, str]]:
    import sys

    if "peft" not in sys.modules:  # nothing can be wrapped by what nobody has imported
        return
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield path, "base_layer"
        elif isinstance(module, AuxiliaryTrainingWrapper):
            yield path, "original_module"


def _unwrapped(path: str, wrappers: dict[str, str]) -> str | None:
    """The name that a module has without peft's wrappers; None for what only a wrapper has."""
    if not wrappers:
        return path
    parts: list[str] = []
    at = ""
    inside: str | None = None
    for part in path.split("."):
        at = f"{at}.{part}" if at else part
        if inside is None:
            parts.append(part)
        elif part != inside:
            return None
        inside = wrappers.get(at)
    # The wrapper stands for its module, which comes by itself.
    return None if inside is not None else ".".join(parts)


def _whole(spec: ModuleSpec, module: Any) -> ModuleSpec:
    """The module with the shape that its layer says: quantised weights are packed in another."""
    from torch import nn

    if isinstance(module, nn.Linear) and not spec.transposed:
        return spec._replace(shape=(module.out_features, module.in_features))
    return spec
