"""A base model's checkpoint as an architecture: the names and shapes in its header, and no byte of its tensors.

Checkpoints of diffusers and transformers name modules as their classes do, so no library need be installed to read one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from adapterops.adapter import COMPONENTS
from adapterops.architectures.errors import BadBaseConfig
from adapterops.architectures.spec import ModuleSpec
from adapterops.architectures.table import Architecture, Component
from adapterops.storage.folder import Folder, LocalFolder
from adapterops.storage.source import HUB, Source, open_in, open_source
from adapterops.storage.tensor import LazyTensor

_FILES = tuple(
    f"{stem}.{kind}{index}"
    for kind, stems in (
        ("safetensors", ("model", "diffusion_pytorch_model")),
        ("bin", ("pytorch_model", "diffusion_pytorch_model")),
    )
    for stem in stems
    for index in (".index.json", "")
)
"""What transformers and diffusers call a model's weights, in the order in which they look for them."""
_FLOATS = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})
_ORIGINAL = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "conditioner.embedders.")
"""How keys of the authors' own files of Stable Diffusion begin."""
_ADAPTER = re.compile(r"[._](lora_(A|B|down|up)|hada_w[12]|lokr_w[12]|ia3_l|oft_)")
_EMBEDDINGS = frozenset(
    {"embed_tokens", "wte", "wpe", "shared", "word_embeddings", "position_embeddings", "token_type_embeddings"}
    | {"token_embedding", "position_embedding", "embed_in", "embed_positions"}
)
_HEADLESS = ("model.embed_tokens", "transformer.wte", "wte", "transformer.word_embeddings", "word_embeddings")
"""Embeddings that causal models share with their `lm_head`, which checkpoints then leave out."""
_COMPONENT = ((r"^(down_blocks|up_blocks|mid_block)\.", "unet"), (r"^(\w*transformer_blocks)\.\d+\.", "transformer"))
_CONV1D = frozenset({"c_attn", "c_fc", "c_proj", "q_attn"})


def from_weights(path: str | os.PathLike[str]) -> Architecture:
    """The architecture that a checkpoint's keys and shapes tell: a file, a folder (shards and all), a pipeline's folder, or
    `hf://owner/repo`.

    A module is what has a `weight`, a `bias` or another parameter under its name; what it computes is guessed from the shape
    (two dimensions: linear; more: a convolution), and from GPT-2's names for the layers that store (in, out).

    Raises `BadBaseConfig` for a checkpoint whose names or shapes are not those of the library's modules (an authors' own file,
    quantised weights), and what opening a file raises.
    """
    path = os.fspath(path)
    components: dict[str, Component] = {}
    for name, source in _sources(path):
        component = _component(name, source.tensors, source.path)
        components[component.name] = component
    return Architecture(Path(path).name or path, path, components, builtin=False)


def _sources(path: str) -> Iterator[tuple[str, Source]]:
    """The weights of each component; "" for a lone model's.  Of the Hub's files only the headers are asked for."""
    folder: Folder
    if path.startswith(HUB):
        from adapterops.storage import hub

        folder, file = hub.locate(path, ranges=True)
    elif os.path.isdir(path):
        folder, file = LocalFolder(path), ""
    else:
        yield "", open_source(path)
        return
    inside = [name for name in COMPONENTS if folder.is_folder(name)] if not file else []
    for name in inside:
        part = folder.folder(name)
        yield name, open_in(part, _usual(part))
    if not inside:
        yield "", open_in(folder, file or _usual(folder))


def _usual(folder: Folder) -> str:
    """The file that the libraries would read; "" where none is called so."""
    names = set(folder.names())
    return next((name for name in _FILES if name in names), "")


def _component(name: str, tensors: Mapping[str, LazyTensor], path: str) -> Component:
    first = next((key for key in tensors if key.startswith(_ORIGINAL)), None)
    if first is not None:
        raise BadBaseConfig(
            f"{path}: is its authors' own checkpoint ({first!r}), whose modules have other names than diffusers' classes; give "
            "--arch, or the folder of the diffusers model"
        )
    adapters = next((key for key in tensors if _ADAPTER.search(key)), None)
    if adapters is not None:
        raise BadBaseConfig(f"{path}: {adapters!r} is part of an adapter; give the weights of the base model")
    quantised = next(
        (k for k, t in tensors.items() if k.endswith(("weight", "qweight")) and t.dtype not in _FLOATS), None
    )
    if quantised is not None:
        raise BadBaseConfig(
            f"{path}: {quantised!r} is {tensors[quantised].dtype}: quantised weights do not have their module's shape; give the "
            "config.json of the model, or its unquantised weights"
        )
    if not name:
        name = next((c for pattern, c in _COMPONENT if any(re.match(pattern, key) for key in tensors)), "model")
    modules, parameters = _modules(tensors)
    return Component(name, modules, "", {}, parameters=parameters)


def _modules(tensors: Mapping[str, LazyTensor]) -> tuple[dict[str, ModuleSpec], dict[str, ModuleSpec]]:
    owned: dict[str, list[str]] = {}
    parameters: dict[str, ModuleSpec] = {}
    for key, tensor in tensors.items():
        module, _, own = key.rpartition(".")
        owned.setdefault(module, []).append(own)
        if own not in ("weight", "bias") and len(tensor.shape) in (2, 3) and module:
            parameters[key] = ModuleSpec(key, key, tensor.shape, "parameter", False, params=(own,))
    transposes = _is_gpt2(tensors)
    modules = {name: _spec(name, own, tensors, transposes) for name, own in owned.items()}
    tied = next((name for name in _HEADLESS if name in modules), None)
    if tied is not None and not any(name.endswith("lm_head") for name in modules):
        modules["lm_head"] = ModuleSpec("lm_head", "lm_head", modules[tied].shape, "linear", False, tied_to=tied)
    return modules, parameters


def _spec(name: str, own: list[str], tensors: Mapping[str, LazyTensor], transposes: bool) -> ModuleSpec:
    weight = tensors.get(f"{name}.weight" if name else "weight")
    shape = weight.shape if weight is not None else ()
    last = name.rpartition(".")[2]
    transposed = transposes and last in _CONV1D and len(shape) == 2
    kind = {0: "other", 1: "norm", 2: "embedding" if last in _EMBEDDINGS else "linear"}.get(len(shape), "conv")
    return ModuleSpec(
        name,
        name,
        shape[::-1] if transposed else shape,
        kind,
        "bias" in own,
        transposed,
        params=tuple(own),
    )


def _is_gpt2(tensors: Mapping[str, LazyTensor]) -> bool:
    """Whether the layers of GPT-2's names store (in, out), as GPT-2's own do: c_attn makes three of its inputs."""
    shapes = [t.shape for key, t in tensors.items() if key.endswith(".c_attn.weight")]
    return any(len(shape) == 2 and shape[1] == 3 * shape[0] for shape in shapes)
