"""Layouts: the same base model under the names of its published checkpoints, or of the installed library's class.

`from_config` names modules as the installed class does; where transformers renamed a class, `Component.renamed` and
`optional_prefix` say what the published checkpoints, and the adapters made on them, call the same modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from adapterops.architectures.spec import ModuleSpec
from adapterops.architectures.table import Architecture, Component

LAYOUTS = ("installed", "published")
"""What `--layout` may say."""


def published(architecture: Architecture) -> Architecture:
    """The base model under its published names; the class's own are accepted as other names of the same modules."""
    components = {name: _published(component) for name, component in architecture.components.items()}
    return architecture._replace(components=components)


def _published(component: Component) -> Component:
    lost = component.optional_prefix
    names = {own: name for name, own in component.renamed.items()}
    if lost and not any(name.startswith(lost) for name in component.modules):
        names |= {name: lost + name for name in component.modules if name not in names}
    if not names:
        return component
    return replace(
        component,
        modules={names.get(name, name): _renamed(spec, names) for name, spec in component.modules.items()},
        fused={name: _renamed(spec, names) for name, spec in component.fused.items()},
        # The containers' names have changed, too, and no mapping tells how; only what owns parameters is listed.
        bare=frozenset(name for name in component.bare if not any(own.startswith(f"{name}.") for own in names)),
        renamed={own: name for own, name in names.items() if own != name},
    )


def _renamed(spec: ModuleSpec, names: Mapping[str, str]) -> ModuleSpec:
    name = names.get(spec.name, spec.name)
    return spec._replace(
        name=name,
        original=name if spec.original == spec.name else spec.original,
        tied_to=names.get(spec.tied_to, spec.tied_to) if spec.tied_to is not None else None,
        joins=tuple((names.get(part, part), start, stop) for part, start, stop in spec.joins),
    )
