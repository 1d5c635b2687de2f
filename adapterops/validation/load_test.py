"""Adapters loaded for proof: by peft into a model without weights, by diffusers into the parts of a pipeline without weights.

What the libraries really did is compared with what the adapter is understood to be: the modules that have an adapter
afterwards, and the scale with which they apply it.  Models are built on torch's meta device, so that only the adapter's own
tensors take memory; nothing is fetched, and no code of the adapter's repository is run.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from math import isnan, nan
from typing import Any

from adapterops.adapter import Update
from adapterops.architectures import Architecture, Component
from adapterops.errors import AdapterOpsError
from adapterops.storage.source import CONFIG_NAME, FOLDER_WEIGHTS
from adapterops.validation.rule import several
from adapterops.validation.skeleton import NoSkeleton, skeleton
from adapterops.validation.subject import Subject

_NAME = "default"
_INPUTS = 4
"""So many random inputs are sent through a module's factors."""
_ROUNDING = 2**-5
"""How far what a module adds may be from what it should, as a part of the largest number: scales are multiplied into factors of
16 bits."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What loading showed: why it was not tried, what the library raised, or the keys that came to nothing."""

    not_tried: str = ""
    refused: str = ""
    left_out: tuple[str, ...] = ()
    empty: tuple[str, ...] = ()
    """Modules of the model that got an adapter for which there are no tensors."""
    scales: tuple[str, ...] = ()
    first_scale: str = ""
    others: tuple[str, ...] = ()
    """Keys of modules that add something else than the adapter says."""

    @property
    def said_left_out(self) -> str:
        """In words what was left out."""
        said = []
        if self.left_out:
            said.append(f"tensors that reached no module: {several(self.left_out)}")
        if self.empty:
            said.append(f"modules that got an adapter without tensors: {several(self.empty)}")
        return "; ".join(said)

    @property
    def said_scales(self) -> str:
        """In words what scales differ."""
        return f"modules that have another scale than the file says: {len(self.scales)} (first {self.first_scale})"

    @property
    def said_others(self) -> str:
        """In words what computes something else."""
        return f"modules that add something else than the file says: {len(self.others)} ({several(self.others)})"


def run(subject: Subject) -> Iterator[tuple[str, Outcome]]:
    """Load the adapter with the libraries that `--targets` names, or else with the one that its format is for."""
    named = [name for name in ("peft", "diffusers") if name in subject.options.targets]
    for library in named or ["peft" if subject.dialect in ("peft", "miss") else "diffusers"]:
        yield library, _tried(library, subject)


def _tried(library: str, subject: Subject) -> Outcome:
    with _quiet():
        try:
            for name in ("torch", "peft", *(["diffusers", "transformers"] if library == "diffusers" else [])):
                import_module(name)
        except ImportError as error:
            missing = error.name or library
            return Outcome(not_tried=f"needs {missing}, which cannot be imported; pip install adapterops[diffusers]")
        try:
            return _peft(subject) if library == "peft" else _diffusers(subject)
        except (NoSkeleton, AdapterOpsError) as error:
            return Outcome(not_tried=str(error))


def _peft(subject: Subject) -> Outcome:
    if subject.config is None or "peft_type" not in subject.config:
        return Outcome(not_tried=f"reads folders with an {CONFIG_NAME} only")
    weights = next((name for name in FOLDER_WEIGHTS if name in subject.files), None)
    if weights is None:
        return Outcome(not_tried=f"the folder has no {FOLDER_WEIGHTS[0]}")
    folder = os.path.dirname(subject.place.folder.fetch(CONFIG_NAME))
    subject.place.folder.fetch(weights)
    model = _base_model(subject)

    from peft import PeftConfig, PeftModel
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

    def load() -> tuple[Any, Any]:
        config = PeftConfig.from_pretrained(folder or os.curdir)
        if config.peft_type not in PEFT_TYPE_TO_TUNER_MAPPING:
            raise NoSkeleton(f"{subject.config['peft_type']} works on a running model only" if subject.config else "")
        _harmless(config)
        if subject.options.architecture is None and hasattr(config, "layer_replication"):
            config.layer_replication = None  # a skeleton has the layers that the file speaks of
        made = PeftModel(model, config, _NAME, autocast_adapter_dtype=False, low_cpu_mem_usage=True)
        return made, made.load_adapter(folder or os.curdir, _NAME, torch_device="cpu", low_cpu_mem_usage=True)

    try:
        made, result = load()
    except NoSkeleton:
        raise
    except Exception as error:  # noqa: BLE001 - whatever the library raises is what is to be told
        return Outcome(refused=_told(error))
    lost = {key.replace(f".{_NAME}.", ".", 1).removesuffix(f".{_NAME}") for key in result.unexpected_keys}
    left = [key for key in subject.tensors if key in lost]
    layers = {name.removeprefix("base_model.model."): layer for name, layer in _layers(made)}
    return _compared(subject, list(subject.updates), layers, left)


def _harmless(config: Any) -> None:
    """Without what loading does beside taking the tensors: other modules imported, weights decomposed for a start."""
    config.task_type = None
    for name, value in (("megatron_config", None), ("init_lora_weights", True), ("loftq_config", {})):
        if hasattr(config, name):
            setattr(config, name, value)


def _base_model(subject: Subject) -> Any:
    """The model that the adapter is for: that of `--base` or `--arch`, else one made of the adapter's own modules."""
    architecture = subject.options.architecture
    components = subject.adapter.components if subject.adapter is not None else ()
    if architecture is not None and len(components) == 1 and components[0] in architecture.components:
        return _built(architecture.components[components[0]])
    return skeleton(subject)


def _diffusers(subject: Subject) -> Outcome:
    from adapterops.validation.rules.diffusers_reads import loader_of

    base = subject.options.architecture or (subject.adapter.base if subject.adapter is not None else None)
    loader = loader_of(subject)
    if base is None or loader is None:
        return Outcome(not_tried="the base model is not known; give --arch or --base")
    if subject.is_folder:
        return Outcome(not_tried="loads files, not PEFT folders; name the file, or --targets peft")
    if not loader.mixin:
        return Outcome(not_tried="diffusers has no loader of LoRAs for this base")
    mixin = getattr(import_module("diffusers.loaders.lora_pipeline"), f"{loader.mixin}LoraLoaderMixin", None)
    if mixin is None:
        return Outcome(not_tried=f"the installed diffusers has no {loader.mixin}LoraLoaderMixin")
    pipe = _pipeline(mixin, base)
    path = subject.place.folder.fetch(subject.place.name)
    try:
        with _factors_kept():
            pipe.load_lora_weights(path, adapter_name=_NAME)
    except Exception as error:  # noqa: BLE001 - whatever the library raises is what is to be told
        return Outcome(refused=_told(error))
    layers: dict[str, Any] = {}
    for name, model in pipe.components.items():
        own = base.components[name]
        for module, layer in _layers(model):
            layers[f"{name}: {_plain(module, own)}"] = layer
    return _compared(subject, list(subject.updates), layers, [], base=base)


@contextmanager
def _factors_kept() -> Iterator[None]:
    """While an adapter is loaded into a model without weights, peft leaves its tensors as they are: it would move them to where
    the model's are, which is nowhere."""
    layer: Any = import_module("peft.tuners.tuners_utils").BaseTunerLayer
    moves = layer._move_adapter_to_device_of_base_layer
    try:
        layer._move_adapter_to_device_of_base_layer = lambda self, adapter_name, device=None: None
        yield
    finally:
        layer._move_adapter_to_device_of_base_layer = moves


def _pipeline(mixin: Any, base: Architecture) -> Any:
    """What a pipeline's loader needs of it: its models, without weights."""
    loadable = [name for name in mixin._lora_loadable_modules if name in base.components]
    models = {name: _built(base.components[name]) for name in loadable}
    models = {name: _as_loaded(model) if name.startswith("transformer") else model for name, model in models.items()}
    absent = dict.fromkeys((n for n in mixin._lora_loadable_modules if n not in models), None)
    kind = type("Pipeline", (mixin,), {"hf_device_map": None, "components": models, **absent, **models})
    return kind()


def _as_loaded(model: Any) -> Any:
    """The model as one that says it has values: the zeros that loaders make for modules which a file lacks (those for images
    of Wan's, in a file for text alone) are then made, too."""
    import torch

    kind = type(model)
    model.__class__ = type(kind.__name__, (kind,), {"__module__": kind.__module__, "device": torch.device("cpu")})
    return model


def _built(component: Component) -> Any:
    """The component's model on the meta device."""
    import torch

    if not component.class_name:
        raise NoSkeleton("no library has the base's class")
    library, _, name = component.class_name.partition(".")
    found: Any = getattr(import_module(library), name, None)
    if found is None:
        raise NoSkeleton(f"the installed {library} has no {name}")
    try:
        with torch.device("meta"):
            if library == "diffusers":
                return found.from_config(dict(component.config))
            values = dict(component.config)
            nested = values.get(getattr(found.config_class, "base_config_key", ""))
            return found(found.config_class.from_dict(nested if isinstance(nested, dict) else values))
    except Exception as error:
        raise NoSkeleton(f"{component.class_name} cannot be built without weights: {_told(error)}") from error


def _layers(model: Any) -> Iterator[tuple[str, Any]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer) and any(_NAME in getattr(layer, n, ()) for n in layer.adapter_layer_names):
            yield name, layer


def _plain(name: str, component: Component | None) -> str:
    """A module's name without what one version of the class has before it and another has not."""
    if component is None:
        return name
    return component.renamed.get(name, name).removeprefix(component.optional_prefix)


def _compared(
    subject: Subject,
    updates: list[Update],
    layers: dict[str, Any],
    left: list[str],
    *,
    base: Architecture | None = None,
) -> Outcome:
    """What the adapter says of its modules against the layers that the library made."""
    stated = {u.key: u for u in subject.adapter.as_stated()} if subject.adapter is not None else {}
    wrong: list[str] = []
    others: list[str] = []
    first = ""
    reached: set[str] = set()
    for update in updates:
        pieces = _pieces(update if base is not None else stated.get(update.key, update), base)
        names = list(dict.fromkeys(name for name, _ in pieces))
        if update.method in ("saved", "diff", "trainable_tokens"):
            if base is not None and not (len(names) == 1 and _difference_taken(update, layers.get(names[0]))):
                left += [t.key for t in update.tensors.values()]
            reached.update(name for name in names if name in layers)
            continue
        reached.update(name for name in names if name in layers)
        if any(name not in layers for name in names):
            left += [t.key for t in update.tensors.values()]
            continue
        found = [layers[name] for name in names]
        magnitude = update.tensors.get("magnitude")
        if magnitude is not None and not all(getattr(layer, "use_dora", {}).get(_NAME) for layer in found):
            left.append(magnitude.key)
        key = next(iter(update.tensors.values())).key
        said, applied = _scale(update), _applied(update, [(layers[name], rows) for name, rows in pieces])
        if said is None or applied is None:
            continue
        if isnan(applied):
            others.append(key)
        elif abs(said - applied) > 2**-7 * max(said, applied):
            first = first or f"{key}: {applied:.4g} in the model, {said:.4g} in the file"
            wrong.append(key)
    empty = [name for name, layer in layers.items() if name not in reached and _on_meta(layer)]
    return Outcome(
        left_out=tuple(dict.fromkeys(left)),
        empty=tuple(empty),
        scales=tuple(wrong),
        first_scale=first,
        others=tuple(others),
    )


def _applied(update: Update, pieces: list[tuple[Any, slice]]) -> float | None:
    """The scale with which the layers apply a LoRA; NaN where what they add is no multiple of it, None where that is not known.

    Where the model has the factors themselves, what they make of a few inputs decides, since libraries multiply scales into
    them; else what the first layer says.
    """
    import torch

    a, b = update.tensors.get("A"), update.tensors.get("B")
    made = [_made(layer) for layer, _ in pieces]
    if a is None or b is None or "mid" in update.tensors or any(one is None for one in made):
        scaling = getattr(pieces[0][0], "scaling", {}).get(_NAME)
        return float(scaling) if isinstance(scaling, float | int) else None
    wanted = _product(a.torch(), b.torch())
    got = torch.cat([one[rows] for one, (_, rows) in zip(made, pieces, strict=True) if one is not None])
    if got.shape != wanted.shape:
        return nan
    norm, most = float((wanted * wanted).sum()), float(got.abs().max())
    if not norm:
        return nan if most else None
    factor = float((got * wanted).sum()) / norm
    return factor if float((got - factor * wanted).abs().max()) <= _ROUNDING * most else nan


def _difference_taken(update: Update, layer: Any) -> bool:
    """Whether a layer's factors are a whole difference of its weight, and the factors' bias that of its bias."""
    import torch

    parts = update.tensors
    made = _made(layer) if update.method == "diff" and parts.keys() <= {"weight", "bias"} else None
    if made is None:
        return False
    bias = layer.lora_B[_NAME].bias
    same = (
        [torch.allclose(bias.detach().float(), parts["bias"].torch().float())]
        if "bias" in parts and bias is not None
        else []
    )
    if "weight" in parts:
        weight = parts["weight"].torch()
        same.append(torch.allclose(made, _product(weight, torch.eye(len(weight)))))
    return len(same) == len(parts) and all(same)


def _made(layer: Any) -> Any:
    """What a LoRA layer adds for a few inputs, (out, inputs); None where it has no factors, or none with values."""
    a, b = (getattr(layer, name, {}) for name in ("lora_A", "lora_B"))
    if _NAME not in a or _NAME not in b or a[_NAME].weight.is_meta or b[_NAME].weight.is_meta:
        return None
    return _product(a[_NAME].weight.detach(), b[_NAME].weight.detach()) * layer.scaling[_NAME]


def _product(a: Any, b: Any) -> Any:
    """B·A of a few random inputs, the same for the same width."""
    import torch

    a, b = a.float().flatten(1), b.float().flatten(1)
    return b @ (a @ torch.randn(a.shape[1], _INPUTS, generator=torch.Generator().manual_seed(a.shape[1])))


def _pieces(update: Update, base: Architecture | None) -> list[tuple[str, slice]]:
    """The names under which the model has the update's module, with rows: several, where the file's is a fused one."""
    if base is None:
        return [(update.module, slice(None))]
    component = base.components.get(update.component)
    fused = component.fused.get(update.module) if component is not None else None
    joins = [(name, slice(start, stop)) for name, start, stop in fused.joins] if fused is not None else []
    own = joins or [(update.module, slice(None))]
    return [(f"{update.component}: {_plain(name, component)}", rows) for name, rows in own]


def _on_meta(layer: Any) -> bool:
    return any(p.is_meta for name, p in layer.named_parameters() if f".{_NAME}" in name)


def _scale(update: Update) -> float | None:
    from adapterops.methods import METHODS

    return METHODS[update.method].scale(update) if update.method == "lora" else None


def _told(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' log lines, warnings and bars, which say less than the findings do; and without the network."""
    from huggingface_hub import constants

    offline, disabled, bars = constants.HF_HUB_OFFLINE, logging.root.manager.disable, _bars()
    shown = bars is not None and bars.is_progress_bar_enabled()
    try:
        constants.HF_HUB_OFFLINE = True
        logging.disable(logging.CRITICAL)
        if bars is not None:
            bars.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        constants.HF_HUB_OFFLINE = offline
        logging.disable(disabled)
        if bars is not None and shown:
            bars.enable_progress_bar()


def _bars() -> Any:
    """What transformers' progress bars are turned off with; None where they cannot be."""
    try:
        return import_module("transformers.utils.logging")
    except ImportError:
        return None
