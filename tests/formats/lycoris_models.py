"""The tiny base models of the lycoris fixtures, and what lycoris-lora itself makes of a file on them.

Nothing here imports adapterops.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import logging
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
import toml
import torch
import transformers
from lycoris import create_lycoris
from lycoris.kohya import LycorisNetworkKohya, create_network
from lycoris.modules.dylora import DyLoraModule
from lycoris.wrapper import LycorisNetwork
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

logging.getLogger("LyCORIS").setLevel(logging.ERROR)

FIXTURES = Path(__file__).parents[2] / "fixtures"
FILES = sorted(FIXTURES.glob("lycoris-*/*.safetensors"))
AUTHORS = [path for path in FILES if path.name.startswith("authors-")]
"""Flux.1 by its authors' names: fused projections, which no model of diffusers has."""
RUNNABLE = [path for path in FILES if path not in AUTHORS]
Models = dict[str, nn.Module]


def label(path: Path) -> str:
    return f"{path.parent.name.removeprefix('lycoris-')}/{path.stem}"


def base_of(path: Path) -> Path:
    """What `--base` is for a file: its folder, or the text encoder's where the file is for that alone."""
    return path.parent / "text_encoder" if path.name.startswith("encoder-") else path.parent


def values(shape: torch.Size, name: str) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())), dtype=torch.double)


def build(config: Path) -> nn.Module:
    """The model of a config in float64, a fresh copy."""
    return copy.deepcopy(_built(config))


@functools.cache
def _built(config: Path) -> nn.Module:
    """Its weights are drawn by name, as in scripts/lycoris_fixtures.py."""
    said = json.loads(config.read_text())
    if "_class_name" in said:
        model = getattr(diffusers, said["_class_name"]).from_config(said)
    else:
        kind = getattr(transformers, said["architectures"][0])
        model = kind(kind.config_class.from_dict(said))
    for name, parameter in model.named_parameters():
        norm = "norm" in name and name.endswith("weight") and parameter.dim() == 1
        parameter.data.copy_(values(parameter.shape, name) * 0.2 + (1 if norm else 0))
    return model.double().eval()


def configs_of(path: Path) -> dict[str, Path]:
    """The configs of the models that a file is for, by component."""
    if path.name.startswith("encoder-"):
        return {"model": path.parent / "text_encoder" / "config.json"}
    configs = {config.parent.name: config for config in sorted(path.parent.glob("*/config.json"))}
    if path.name.startswith("lycoris-"):
        return {name: config for name, config in configs.items() if not name.startswith("text")}
    return configs


def models_of(path: Path) -> Models:
    """The models that a file is for, fresh: lycoris leaves its hooks in those that it has adapted."""
    return {name: build(config) for name, config in configs_of(path).items()}


def outputs(models: Mapping[str, nn.Module]) -> list[Tensor]:
    """What the models make of fixed inputs."""
    out: list[Tensor] = []
    for name, model in models.items():
        weight = next(parameter for parameter in model.parameters() if parameter.dim() > 1)

        def given(*shape: int, kind: torch.dtype = weight.dtype) -> Tensor:
            return values(torch.Size(shape), f"input {shape}").to(kind)

        with torch.no_grad():
            if name == "unet":
                extra = {}
                if model.config.addition_embed_type:
                    extra = {"added_cond_kwargs": {"text_embeds": given(2, 20), "time_ids": given(2, 6)}}
                hidden = given(2, 3, model.config.cross_attention_dim)
                out.append(model(given(2, 4, 8, 8), torch.tensor([3, 700]), hidden, **extra).sample)
            elif name == "transformer":
                out += model(
                    hidden_states=given(1, 4, 4), encoder_hidden_states=given(1, 3, 12), timestep=given(1) * 0 + 0.5,
                    pooled_projections=given(1, 8), img_ids=given(4, 3), txt_ids=given(3, 3), return_dict=False,
                )  # fmt: skip
            else:
                out += [t for t in model(torch.tensor([[0, 7, 9, 63]])).to_tuple() if isinstance(t, Tensor)]
    return [t.double() for t in out]


class Published(nn.Module):
    """A text encoder under the names of its checkpoints: transformers 5 dropped `text_model.` from some classes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.text_model = model


def published(model: nn.Module) -> nn.Module:
    return model if "text_model" in dict(model.named_children()) else Published(model)


def config_of(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        config: dict[str, Any] = json.loads(file.metadata()["lycoris_config"])
    return config


@contextlib.contextmanager
def _preset(config: dict[str, Any]) -> Iterator[str]:
    for network in (LycorisNetwork, LycorisNetworkKohya):  # or the map of the last network stays
        network.apply_preset({"name_algo_map": {}})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "preset.toml"
        path.write_text(toml.dumps(config.pop("apply_preset")))
        yield str(path)


def network_of(path: Path, models: Models, denoiser: nn.Module | None = None) -> list[Any]:
    """The modules of lycoris' network for a file, made with the options that it was trained with, its tensors loaded."""
    config = config_of(path)
    dim, alpha = config.pop("linear_dim"), config.pop("linear_alpha")
    encoders = [published(model) for name, model in models.items() if name.startswith("text")]
    main = denoiser or next((model for name, model in models.items() if name in ("unet", "transformer")), None)
    with _preset(config) as preset:
        options = {**config, "preset": preset, "warn_on_unmatched": False}
        if path.name.startswith(("kohya-", "authors-")):
            text: Any = encoders if len(encoders) > 1 else (encoders or [None])[0]
            network = create_network(1.0, dim, alpha, None, text, main, **options)
        else:
            network = create_lycoris(main or published(models["model"]), 1.0, dim, alpha, **options)
    tensors = load_file(path)
    for lora in network.loras:
        start = f"{lora.lora_name}."
        own = {key.removeprefix(start): tensors.pop(key) for key in list(tensors) if key.startswith(start)}
        _load(lora.double().eval(), own)
    assert not tensors, "lycoris made no module for these"
    return list(network.loras)


def _load(lora: Any, own: dict[str, Tensor]) -> None:
    alpha = own.get("alpha")
    if isinstance(lora, DyLoraModule):
        # Its own loading does nothing, and it trains a rank drawn anew each time; a file is the whole rank.
        down = own["lora_down.weight"].flatten(1).split(lora.block_size)
        for part, given in zip(lora.down_list, down, strict=True):
            part.data.copy_(given)
        for part, given in zip(lora.up_list, own["lora_up.weight"].split(lora.block_size, dim=1), strict=True):
            part.data.copy_(given)
        lora.get_random_rank_weight = lambda: lora.get_weight(lora.lora_dim - lora.block_size)
        return
    missing, unexpected = lora.load_state_dict(own, strict=False)
    assert not unexpected
    assert [key for key in missing if key not in ("scalar", "weight", "bias")] == []
    if alpha is not None:  # stored in 16 bits, which for an rsLoRA is not the number that it was trained with
        scale = float(alpha) / lora.lora_dim
        assert abs(scale - lora.scale) <= 1e-3 * lora.scale
        lora.scale = scale
