"""Any adapter that adapterops reads, in a diffusers pipeline, with the scale that it was trained with.

    import adapterops as ao

    ao.integrations.diffusers.load_into(pipe, "style.safetensors", "style")
    pipe.set_adapters(["style"], [0.8])

What is loaded is what `--to peft` would write for the pipeline's own models, and peft puts it in: so the pipeline's
`set_adapters`, `fuse_lora`, `delete_adapters` … work as for an adapter that diffusers loaded.  Source: huggingface/
diffusers 0.42.1 `loaders/peft.py` (`load_lora_adapter`), `loaders/lora_base.py`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from adapterops.adapter import Adapter
from adapterops.errors import UsageError
from adapterops.integrations.injection import State, inject, prepare
from adapterops.integrations.offloading import suspended
from adapterops.integrations.pipeline import architecture_of
from adapterops.integrations.resolving import for_pipeline

__all__ = ["Loaded", "architecture_of", "load_into"]


@dataclass(frozen=True, slots=True)
class Loaded:
    """What `load_into` put into a pipeline.

    `modules` are the adapted modules of each component, by the names that they have there; `dropped` is what was left
    out under `allow_drop`.
    """

    name: str
    modules: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...] = field(default=())
    dropped: tuple[str, ...] = field(default=())


def load_into(
    pipe: Any,
    adapter: Adapter | str | os.PathLike[str],
    name: str = "default",
    *,
    components: Iterable[str] | None = None,
    alpha: float | str | None = None,
    format: str | None = None,
    allow_drop: bool = False,
) -> Loaded:
    """Put an adapter into `pipe` under `name`, as its only active one, with weight 1.

    `adapter` is what `load` takes or returns: with a path, `alpha`, `format` and `allow_drop` are as there.
    `components` limits what is loaded (`["unet"]`); without it the pipeline must have every component of the adapter.
    Other adapters stay loaded: `pipe.set_adapters([…], […])` makes several active.  An adapter goes in whole or not at
    all: after an error the pipeline is as it was.

    Raises the errors of `load`; `UsageError` for a name that is taken, or a pipeline that no adapter can be put into
    now; `UnknownModule` and `BrokenAdapter` for what its models lack; `CannotRepresent` for what peft has no place for.
    """
    loadable = _check(pipe, name)
    adapted = for_pipeline(pipe, adapter, loadable, components, alpha=alpha, format=format, allow_drop=allow_drop)
    parts, dropped, notes = prepare(adapted, allow_drop)
    models = {component: found for component in loadable if (found := getattr(pipe, component, None)) is not None}
    with suspended(pipe):
        before = [State(model, name) for model in models.values()]
        disabled = any(state.disabled for state in before)
        try:
            for part in parts:
                inject(models[part.component], part, name)
            pipe.set_adapters([name], [1.0])
            if disabled:
                pipe.disable_lora()
        except BaseException:
            for state in before:
                state.restore()
            raise
    if disabled:
        notes = (*notes, "the pipeline's adapters are disabled, and so is this one until pipe.enable_lora()")
    modules = {part.component: part.modules for part in parts}
    return Loaded(name, modules, notes, (*adapted.provenance.dropped, *dropped))


def _check(pipe: Any, name: str) -> tuple[str, ...]:
    """The components that the pipeline manages adapters of.  Raises `UsageError` where none can be put in now."""
    kind = type(pipe).__name__
    loadable = tuple(getattr(pipe, "_lora_loadable_modules", ()))
    if not loadable or not hasattr(pipe, "components"):
        raise UsageError(f"{kind} is no diffusers pipeline that takes adapters (it has no load_lora_weights)")
    if not isinstance(name, str) or not name or "." in name:
        raise UsageError(f"adapter name {name!r}: torch needs one without a dot, and not empty")
    try:
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError as error:
        raise UsageError(f"adapters in pipelines need peft ({error}); pip install adapterops[diffusers]") from error
    for component in loadable:
        found = getattr(pipe, component, None)
        if found is None:
            continue
        if hasattr(found, "_orig_mod"):
            raise UsageError(
                f"{component}: torch.compile has wrapped it, and pipe.set_adapters and pipe.unload_lora_weights pass over "
                f"what is wrapped; compile it in place: pipe.{component}.compile()"
            )
        layers = [(n, m) for n, m in found.named_modules() if isinstance(m, BaseTunerLayer)]
        if name in getattr(found, "peft_config", {}):
            raise UsageError(
                f"{component}: the pipeline has an adapter {name!r}; choose another name, or remove it with "
                f"pipe.delete_adapters({name!r})"
            )
        merged = next((n for n, layer in layers if layer.merged), None)
        if merged is not None:
            raise UsageError(
                f"{component}: adapters are fused into {merged}, which would hide another one; call pipe.unfuse_lora() "
                "first, or pipe.unload_lora_weights() to keep the fused weights"
            )
    return loadable
