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
from typing import Any

from adapterops.adapter import Update
from adapterops.architectures import Architecture, Component
from adapterops.errors import AdapterOpsError
from adapterops.storage.source import CONFIG_NAME, FOLDER_WEIGHTS
from adapterops.validation.rule import several
from adapterops.validation.skeleton import NoSkeleton, skeleton
from adapterops.validation.subject import Subject

_NAME = "default"
_MIXINS = {
    "sd1": "StableDiffusionLoraLoaderMixin",
    "sd2": "StableDiffusionLoraLoaderMixin",
    "sdxl": "StableDiffusionXLLoraLoaderMixin",
    "sd3": "SD3LoraLoaderMixin",
    "flux": "FluxLoraLoaderMixin",
    "qwen_image": "QwenImageLoraLoaderMixin",
}
"""The classes of diffusers' `loaders/lora_pipeline.py` that load adapters for each base model."""
_UNBAKED = ("sd1", "sd2", "sdxl")
"""Where the scale stays beside the factors; elsewhere diffusers multiplies it into them."""


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
    return _compared(subject, list(subject.updates), layers, left, scales=True)


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
    from adapterops.validation.rules.loader_facts import architecture as family_of

    base = subject.options.architecture or (subject.adapter.base if subject.adapter is not None else None)
    family = family_of(subject)
    if base is None or family not in _MIXINS:
        return Outcome(not_tried="the base model is not known; give --arch or --base")
    if subject.is_folder:
        return Outcome(not_tried="loads files, not PEFT folders; name the file, or --targets peft")
    pipe = _pipeline(getattr(import_module("diffusers.loaders.lora_pipeline"), _MIXINS[family]), base)
    path = subject.place.folder.fetch(subject.place.name)
    try:
        pipe.load_lora_weights(path, adapter_name=_NAME)
    except Exception as error:  # noqa: BLE001 - whatever the library raises is what is to be told
        return Outcome(refused=_told(error))
    layers: dict[str, Any] = {}
    for name, model in pipe.components.items():
        own = base.components[name]
        for module, layer in _layers(model):
            layers[f"{name}: {_plain(module, own)}"] = layer
    updates = list(subject.updates)
    return _compared(subject, updates, layers, [], scales=family in _UNBAKED, base=base)


def _pipeline(mixin: Any, base: Architecture) -> Any:
    """What a pipeline's loader needs of it: its models, without weights."""
    models = {name: _built(base.components[name]) for name in mixin._lora_loadable_modules if name in base.components}
    absent = dict.fromkeys((n for n in mixin._lora_loadable_modules if n not in models), None)
    kind = type("Pipeline", (mixin,), {"hf_device_map": None, "components": models, **absent, **models})
    return kind()


def _built(component: Component) -> Any:
    """The component's model on the meta device."""
    import torch

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
    scales: bool,
    base: Architecture | None = None,
) -> Outcome:
    """What the adapter says of its modules against the layers that the library made."""
    stated = {u.key: u for u in subject.adapter.as_stated()} if subject.adapter is not None else {}
    wrong: list[str] = []
    first = ""
    reached: set[str] = set()
    for update in updates:
        names = _names(update if base is not None else stated.get(update.key, update), base)
        if update.method in ("saved", "diff", "trainable_tokens"):
            if base is not None:
                left += [t.key for t in update.tensors.values()]
            continue
        found = [layers[name] for name in names if name in layers]
        reached.update(name for name in names if name in layers)
        if len(found) < len(names):
            left += [t.key for t in update.tensors.values()]
            continue
        magnitude = update.tensors.get("magnitude")
        if magnitude is not None and not all(getattr(layer, "use_dora", {}).get(_NAME) for layer in found):
            left.append(magnitude.key)
        said = _scale(update) if scales else None
        applied = getattr(found[0], "scaling", {}).get(_NAME)
        if said is not None and isinstance(applied, float | int) and abs(said - applied) > 2**-7 * max(said, applied):
            key = next(iter(update.tensors.values())).key
            first = first or f"{key}: {applied:g} in the model, {said:g} in the file"
            wrong.append(key)
    empty = [name for name, layer in layers.items() if name not in reached and _on_meta(layer)]
    return Outcome(left_out=tuple(dict.fromkeys(left)), empty=tuple(empty), scales=tuple(wrong), first_scale=first)


def _names(update: Update, base: Architecture | None) -> list[str]:
    """The names under which the model has the update's module: several, where the file's is a fused one."""
    if base is None:
        return [update.module]
    component = base.components.get(update.component)
    fused = component.fused.get(update.module) if component is not None else None
    modules = list(dict.fromkeys(name for name, _, _ in fused.joins)) if fused is not None else [update.module]
    return [f"{update.component}: {_plain(module, component)}" for module in modules]


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
