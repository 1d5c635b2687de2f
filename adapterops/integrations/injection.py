"""Adapters in torch models: what peft is given, and the way back where it fails."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from adapterops import registry
from adapterops.adapter import Adapter, Certainty, Fact, Update
from adapterops.errors import BrokenAdapter, CannotRepresent
from adapterops.methods import METHODS
from adapterops.plugin import Target
from adapterops.storage.tensor import LazyTensor, MemorySource

if TYPE_CHECKING:
    import torch

_PREFIX = "base_model.model."
"""What peft's files put before the names of modules, and its models do not have."""

_LAYERS = ("lora", "loha", "lokr")
"""The methods whose layers in peft can be weighted, fused and disabled as pipelines do."""

_REASONS = {
    "ia3": "peft's (IA)³ layers have no weight, so pipe.set_adapters would break on them",
    "saved": "a saved parameter takes the base's place, and pipelines have no weight for it",
    "diff": "a full difference (weights, norms, biases) has no layer in peft",
}


@dataclass(frozen=True, slots=True)
class Part:
    """One component of an adapter as peft takes it."""

    component: str
    modules: tuple[str, ...]
    config: Mapping[str, Any]
    """An `adapter_config.json`."""
    tensors: Mapping[str, torch.Tensor]
    """By the keys of an `adapter_model.safetensors` without their prefix."""


def prepare(adapter: Adapter, allow_drop: bool = False) -> tuple[list[Part], tuple[str, ...], tuple[str, ...]]:
    """The parts of an adapter whose modules are named as in `adapter.base`, what was dropped, and notes.

    Raises `CannotRepresent` for what peft's layers cannot do; with `allow_drop` that is left out.
    """
    kept, dropped = _insist_on_layers(adapter, allow_drop)
    notes = list(adapter.provenance.notes)
    form, dialect = registry.find("peft")
    parts: list[Part] = []
    for component in kept.components:
        own = kept.with_updates(_without_core(_plain(u)) for u in kept.of(component))
        out = form.write(own, Target(dialect, kept.base, allow_drop=allow_drop))
        dropped += out.dropped
        notes += out.notes
        weights = {k.removeprefix(_PREFIX): t for file in out.files for k, t in file.tensors.items()}
        config = next((json.loads(file.text) for file in out.files if file.text is not None), None)
        if config is not None:
            modules = _modules(weights, kept.base.components[component].modules if kept.base else {})
            parts.append(Part(component, modules, config, {k: t.torch() for k, t in weights.items()}))
    if not parts:
        raise CannotRepresent(f"{adapter.provenance.path}: nothing of it is left to load")
    return parts, tuple(dropped), tuple(dict.fromkeys(notes))


def _insist_on_layers(adapter: Adapter, allow_drop: bool) -> tuple[Adapter, list[str]]:
    odd = [u for u in adapter if u.method not in _LAYERS]
    if not odd:
        return adapter, []
    if allow_drop:
        kept = adapter.with_updates(u for u in adapter if u.method in _LAYERS)
        return kept, [t.key for u in odd for t in u.tensors.values()]
    first = odd[0]
    reason = _REASONS.get(first.method, f"{METHODS[first.method].title} has no layer in peft that pipelines can weight")
    listed = ", ".join(u.name for u in odd[:3]) + (f" and {len(odd) - 3} more" if len(odd) > 3 else "")
    raise CannotRepresent(
        f"{next(iter(first.tensors.values())).where}: {reason} ({listed}); fuse it into the base's weights instead, or "
        "leave it out with allow_drop=True"
    )


def _plain(update: Update) -> Update:
    """The update with an alpha that means alpha over rank.

    A config has one rule for all modules, and peft's layers of other methods than LoRA know that one only.
    """
    method = METHODS[update.method]
    scale, rank = method.scale(update), method.rank(update)
    if not update.rslora or scale is None or not rank:
        return update
    return replace(update, alpha=Fact(scale * rank, Certainty.DERIVED, "alpha/√rank"), rslora=False)


def _without_core(update: Update) -> Update:
    """A LoRA whose Tucker core, which peft's layers have no place for, is multiplied into its first factor.

    The product is the same one, of the same rank; it is rounded to float32.
    """
    if update.method != "lora" or "mid" not in update.tensors:
        return update
    import numpy as np

    first, core = update.tensors["A"], update.tensors["mid"]
    values = first.numpy().astype(np.float64).reshape(first.shape[:2])
    values = np.ascontiguousarray(np.einsum("rs...,si->ri...", core.numpy().astype(np.float64), values), dtype="<f4")
    factor = LazyTensor(first.key, "F32", values.shape, MemorySource(values.tobytes(), first.source.path), 0)
    return replace(update, tensors={"A": factor, "B": update.tensors["B"], **_rest(update)})


def _rest(update: Update) -> dict[str, LazyTensor]:
    return {role: tensor for role, tensor in update.tensors.items() if role not in ("A", "B", "mid")}


def _modules(keys: Mapping[str, Any], known: Mapping[str, Any]) -> tuple[str, ...]:
    """The modules that keys belong to: the longest known beginning of each."""
    out: dict[str, None] = {}
    for key in keys:
        parts = key.split(".")
        out |= {m: None for n in range(len(parts), 0, -1) if (m := ".".join(parts[:n])) in known}
    return tuple(out)


def inject(model: Any, part: Part, name: str) -> None:
    """Put one part into a model as adapter `name`.

    Raises `CannotRepresent` where peft refuses it, or finds other modules or tensors than the part has; the model may
    then hold some of it (see `State`).
    """
    from peft import get_peft_config, inject_adapter_in_model, set_peft_model_state_dict

    try:
        with _quiet():
            config = get_peft_config(dict(part.config))
            inject_adapter_in_model(config, model, adapter_name=name, low_cpu_mem_usage=True)
            result: Any = set_peft_model_state_dict(model, dict(part.tensors), name, low_cpu_mem_usage=True)
            _prepare_hotswap(model, config)
    # Whatever peft and torch raise, the user is told for which component.
    except Exception as error:
        raise CannotRepresent(
            f"{part.component}: peft cannot put the adapter into {type(model).__name__} ({type(error).__name__}: {error})"
        ) from error
    model._hf_peft_config_loaded = True
    own = dict(_parameters(model, name))
    missing = [key for key in result.missing_keys if key in own]
    if missing or result.unexpected_keys:
        what = (
            f"has no place for {result.unexpected_keys[0]}" if result.unexpected_keys else f"expects {missing[0]} too"
        )
        raise CannotRepresent(
            f"{part.component}: {type(model).__name__} {what}; this version of peft builds other layers"
        )
    for key, parameter in own.items():
        # peft casts to the dtype of the model's weights.
        if not parameter.is_meta and not bool(parameter.isfinite().all()):
            raise BrokenAdapter(
                f"{part.component}: {key} has values beyond {parameter.dtype}, the dtype of the pipeline's weights; load "
                "the pipeline in bfloat16 or float32"
            )


def _parameters(model: Any, name: str) -> Iterator[tuple[str, Any]]:
    """The parameters of one adapter in a model."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for path, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer):
            for kind in (*layer.adapter_layer_names, *layer.other_param_names):
                held: Any = getattr(layer, kind, None)
                if hasattr(held, "named_parameters"):
                    for key, parameter in held.named_parameters():
                        if key == name or key.startswith(name + "."):
                            yield f"{path}.{kind}.{key}", parameter


def _prepare_hotswap(model: Any, config: Any) -> None:
    """What `enable_lora_hotswap` asked for: room for adapters of other ranks, made when the first one is in."""
    wanted = getattr(model, "_prepare_lora_hotswap_kwargs", None)
    if wanted is None or config.peft_type != "LORA":
        return
    from peft.utils.hotswap import prepare_model_for_compiled_hotswap

    prepare_model_for_compiled_hotswap(model, config=config, **wanted)
    model._prepare_lora_hotswap_kwargs = None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without peft's warning that a model holds several adapters, which is what is asked for here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        yield


class State:
    """A model as it was before an adapter `name` was put into it."""

    def __init__(self, model: Any, name: str) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        self._model, self._name = model, name
        self._children = [(m, key, child) for m in model.modules() for key, child in m._modules.items()]
        self._layers = [
            (m, list(m.active_adapters), m.disable_adapters, dict(getattr(m, "scaling", {})))
            for m in model.modules()
            if isinstance(m, BaseTunerLayer)
        ]
        self._trained = [(p, p.requires_grad) for p in model.parameters()]
        self._attributes = {key: model.__dict__[key] for key in _ATTRIBUTES if key in model.__dict__}
        self._configs = dict(getattr(model, "peft_config", {}))

    @property
    def disabled(self) -> bool:
        """Whether adapters were there and disabled."""
        return any(disabled for _, _, disabled, _ in self._layers)

    def restore(self) -> None:
        """Take the adapter out again: layers, configs, which adapters are active, what can be trained."""
        for parent, key, child in self._children:
            if parent._modules.get(key) is not child:
                parent._modules[key] = child
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of adapters that were active and are deleted
            for layer, active, disabled, scaling in self._layers:
                layer.delete_adapter(self._name)
                layer.set_adapter(active)
                layer._disable_adapters = disabled
                if hasattr(layer, "scaling"):
                    layer.scaling.clear()
                    layer.scaling.update(scaling)
        for parameter, trained in self._trained:
            parameter.requires_grad_(trained)
        for key in _ATTRIBUTES:
            self._model.__dict__.pop(key, None)
        self._model.__dict__.update(self._attributes)
        if "peft_config" in self._attributes:
            # The same dictionary, which peft has added to.
            configs = self._attributes["peft_config"]
            configs.clear()
            configs.update(self._configs)


_ATTRIBUTES = ("peft_config", "_hf_peft_config_loaded", "_prepare_lora_hotswap_kwargs")
"""What an adapter leaves on a model beside its layers."""

__all__ = ["Part", "State", "inject", "prepare"]
