"""Stable Diffusion 3.5, medium and large, as trainers spell it: read, judged sound, converted every way and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from checks import same, sound
from safetensors.torch import load_file
from trainers import DOWN_UP, Shape, ai_toolkit, clip, lokr, pairs, some, write

import adapterops as ao
from adapterops.errors import UsageError

MEDIUM, LARGE = 1536, 2432
"""The widths."""
LAST = {MEDIUM: 23, LARGE: 37}
BLOCKS = {MEDIUM: (0, 12, 13, 23), LARGE: (0, 36, 37)}
"""Of the medium model, blocks with a second attention and without; the last one has half of a text stream."""
NAMES = {MEDIUM: "sd35_medium", LARGE: "sd35_large"}
ATTENTION = ("to_k", "to_q", "to_v", "to_out.0")


def authors(width: int, embedders: bool = False) -> dict[str, Shape]:
    """The layers of some blocks by the authors' names; each is trained where nothing else is asked for.

    Source: kohya-ss/sd-scripts `library/sd3_models.py` (`SingleDiTBlock`, `MMDiT`), `networks/lora_sd3.py`.
    """
    out: dict[str, Shape] = {}
    for i in BLOCKS[width]:
        dual = width == MEDIUM and i <= 12
        for stream in ("x_block", "context_block"):
            part = f"joint_blocks.{i}.{stream}"
            half = stream == "context_block" and i == LAST[width]
            rows = 2 if half else 9 if dual and stream == "x_block" else 6
            out[f"{part}.adaLN_modulation.1"] = (rows * width, width)
            out[f"{part}.attn.qkv"] = (3 * width, width)
            if half:
                continue
            out[f"{part}.attn.proj"] = (width, width)
            if dual and stream == "x_block":
                out |= {f"{part}.attn2.qkv": (3 * width, width), f"{part}.attn2.proj": (width, width)}
            out |= {f"{part}.mlp.fc1": (4 * width, width), f"{part}.mlp.fc2": (width, 4 * width)}
    if embedders:
        out |= {"context_embedder": (width, 4096), "t_embedder.mlp.0": (width, 256), "t_embedder.mlp.2": (width, width)}
        out |= {"y_embedder.mlp.0": (width, 2048), "y_embedder.mlp.2": (width, width)}
        out |= {"final_layer.adaLN_modulation.1": (2 * width, width), "final_layer.linear": (64, width)}
    return out


def diffusers(width: int, second: bool = True, norms: bool = False) -> dict[str, Shape]:
    """Every attention's projections by diffusers' names, as SimpleTuner and diffusers' example train them."""
    out: dict[str, Shape] = {}
    for i in BLOCKS[width]:
        for name in ("attn", *(("attn2",) if second and width == MEDIUM and i <= 12 else ())):
            out |= {f"transformer_blocks.{i}.{name}.{part}": (width, width) for part in ATTENTION}
        out |= {f"transformer_blocks.{i}.attn.add_{part}_proj": (width, width) for part in "qkv"}
        if i != LAST[width]:
            out[f"transformer_blocks.{i}.attn.to_add_out"] = (width, width)
        if norms:
            out[f"transformer_blocks.{i}.norm1.linear"] = ((9 if width == MEDIUM and i <= 12 else 6) * width, width)
    return out


def distinct(width: int) -> dict[str, Shape]:
    """Modules of three shapes, whose factors are no copies of each other."""
    own = {f"transformer_blocks.{LAST[width]}.norm1_context.linear": (2 * width, width)}
    own[f"transformer_blocks.0.{'attn2' if width == MEDIUM else 'attn'}.to_out.0"] = (width, width)
    return own | {"transformer_blocks.0.ff_context.net.2": (width, 4 * width)}


def sd_scripts(path: Path, width: int) -> Path:
    """kohya-ss/sd-scripts `networks/lora_sd3.py`, with `emb_dims` and both CLIPs; the header of `train_network.py`."""
    kind = "5-medium" if width == MEDIUM else "5-large"
    tensors = pairs(authors(width, embedders=True), "lora_unet_", DOWN_UP, 2.0, flat=True)
    tensors |= pairs(clip(""), "lora_te1_", DOWN_UP, 2.0, flat=True)
    tensors |= pairs({"text_model.encoder.layers.31.mlp.fc2": (1280, 5120)}, "lora_te2_", DOWN_UP, 2.0, flat=True)
    said = {"ss_base_model_version": kind, "modelspec.architecture": f"stable-diffusion-3-{kind}/lora"}
    return write(path, tensors, ss_network_module="networks.lora_sd3", ss_network_alpha="2.0", **said)


def ai_toolkits_differences(path: Path, width: int) -> Path:
    """ostris/ai-toolkit `toolkit/lora_special.py` (`FullModule`): norms are saved as differences."""
    tensors = pairs(diffusers(width, norms=True), "transformer.")
    for i in BLOCKS[width]:
        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            tensors[f"transformer.transformer_blocks.{i}.attn.{name}.diff"] = some(64, of=f"{i}.{name}")
    if width == MEDIUM:
        tensors["transformer.transformer_blocks.12.attn2.norm_k.diff"] = some(64)
    return ai_toolkit(path, tensors)


WRITERS: dict[str, tuple[str, Callable[[Path, int], Path]]] = {
    "sd-scripts": ("kohya", sd_scripts),
    "ai-toolkit": ("diffusers", lambda p, w: ai_toolkit(p, pairs(diffusers(w), "transformer."))),
    "ai-toolkit, LoKr": (
        "diffusers-lycoris",
        lambda p, w: ai_toolkit(p, lokr(distinct(w), "transformer.", 16, 4, 2.0)),
    ),
    "ai-toolkit, differences": ("ai-toolkit", ai_toolkits_differences),
    "SimpleTuner": ("diffusers", lambda p, w: write(p, pairs(diffusers(w, norms=True), "transformer."), format="pt")),
    "SimpleTuner for Comfy": (
        "comfy-diffusers",
        lambda p, w: write(p, pairs(diffusers(w), "diffusion_model.", alpha=2.0)),
    ),
    "Comfy": ("comfy", lambda p, w: write(p, pairs(authors(w, embedders=True), "diffusion_model."))),
    "OneTrainer": ("comfy-down", lambda p, w: write(p, pairs(authors(w), "diffusion_model.", DOWN_UP, 1.0))),
    "OneTrainer, legacy": (
        "onetrainer",
        lambda p, w: write(p, pairs(diffusers(w), "lora_transformer_", DOWN_UP, 1.0, flat=True)),
    ),
    "LyCORIS": ("lycoris", lambda p, w: write(p, pairs(diffusers(w), "lycoris_", DOWN_UP, 1.0, flat=True))),
}


@pytest.mark.parametrize("width", [MEDIUM, LARGE])
@pytest.mark.parametrize("writer", WRITERS)
def test_what_trainers_write(writer: str, width: int, tmp_path: Path) -> None:
    dialect, make = WRITERS[writer]
    path = make(tmp_path / "a.safetensors", width)
    found = ao.inspect(path)
    assert (found.dialect, found.architecture.value) == (dialect, NAMES[width])
    assert found.architecture.certainty is ao.Certainty.DERIVED
    sound(path)


WAYS = ("kohya", "kohya-diffusers", "comfy", "comfy-diffusers", "diffusers", "diffusers-lycoris", "onetrainer", "peft")
HOLDS = {"ai-toolkit, LoKr": {"diffusers"}, "ai-toolkit, differences": {"diffusers", "peft"}}
"""The ways that a file cannot go: nothing there spells its tensors."""


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("writer", "width"), [(w, MEDIUM) for w in WRITERS] + [("sd-scripts", LARGE), ("ai-toolkit", LARGE)]
)
def test_every_way_and_back(writer: str, width: int, way: str, tmp_path: Path) -> None:
    dialect, make = WRITERS[writer]
    path = make(tmp_path / "a.safetensors", width)
    there = tmp_path / ("there" if way == "peft" else "there.safetensors")
    if way in HOLDS.get(writer, ()):
        with pytest.raises(ao.errors.CannotRepresent, match="--to kohya"):
            ao.convert(path, way, there)
        return
    assert ao.convert(path, way, there).architecture.value == NAMES[width]
    # ai-toolkit's own dialect is read only; the differences come back under Comfy's prefix.
    back = ao.convert(there, dialect if dialect != "ai-toolkit" else "comfy-diffusers", tmp_path / "back.safetensors")
    assert back.architecture.value == NAMES[width]
    wanted = load_file(path)
    got = load_file(tmp_path / "back.safetensors")
    if dialect == "ai-toolkit":
        wanted = {key.replace("transformer.", "diffusion_model.", 1): t for key, t in wanted.items()}
        assert {float(got.pop(key)) for key in set(got) - set(wanted)} == {4.0}, "alphas, which are the ranks"
    same(got, wanted)


def test_joined_as_the_authors_have_it(tmp_path: Path) -> None:
    """The rows of q, k and v, in that order; a last norm's halves change places."""
    width, block = MEDIUM, "transformer_blocks.12.attn2"
    last = f"transformer_blocks.{LAST[width]}.norm1_context.linear"
    tensors = pairs({f"{block}.to_{p}": (width, width) for p in "qkv"} | {last: (2 * width, width)}, "transformer.")
    path = write(tmp_path / "a.safetensors", tensors)
    ao.convert(path, "kohya", tmp_path / "b.safetensors")
    got = load_file(tmp_path / "b.safetensors")

    def product(stem: str, ends: tuple[str, str], of: Mapping[str, torch.Tensor]) -> torch.Tensor:
        down, up = (of[stem + end].double() for end in ends)
        return up @ down

    a_b = (".lora_A.weight", ".lora_B.weight")
    joined = torch.cat([product(f"transformer.{block}.to_{p}", a_b, tensors) for p in "qkv"])
    assert torch.equal(product("lora_unet_joint_blocks_12_x_block_attn2_qkv", DOWN_UP, got), joined)
    scale, shift = product(f"transformer.{last}", a_b, tensors).chunk(2)
    turned = product("lora_unet_joint_blocks_23_context_block_adaLN_modulation_1", DOWN_UP, got)
    assert torch.equal(turned, torch.cat([shift, scale]))


@pytest.mark.parametrize("arch", [None, "sd35_medium"])
def test_a_file_that_3_fits_alike(arch: str | None, tmp_path: Path) -> None:
    """diffusers' example without `attn2`: the older model is taken, and said to be; either way the file comes back."""
    tensors = pairs(diffusers(MEDIUM, second=False), "transformer.")
    path = write(tmp_path / "a.safetensors", tensors, format="pt")
    found = ao.inspect(path)
    assert (found.architecture.value, found.architecture.certainty) == ("sd3", ao.Certainty.ASSUMED)
    assert found.architecture.source == "its modules fit sd3 and sd35_medium alike; sd3 is taken (--arch decides)"
    sound(path)
    there = ao.convert(path, "kohya", tmp_path / "b.safetensors", arch=arch)
    again = ao.convert(there.path, "diffusers", tmp_path / "c.safetensors")
    assert (there.architecture.value, again.architecture.value) == (arch or "sd3", arch or "sd3")
    same(load_file(tmp_path / "c.safetensors"), tensors)


@pytest.mark.parametrize(
    ("module", "arch"),
    [
        ({"transformer_blocks.12.norm1.linear": (9216, 1536)}, "sd3"),
        ({"transformer_blocks.12.norm1.linear": (13824, 1536)}, "sd35_medium"),
        ({"transformer_blocks.0.attn2.to_out.0": (1536, 1536)}, "sd35_medium"),
        ({"transformer_blocks.0.attn.to_out.0": (2432, 2432)}, "sd35_large"),
        ({"context_embedder": (2432, 4096)}, "sd35_large"),
    ],
)
def test_one_module_decides(module: dict[str, Shape], arch: str, tmp_path: Path) -> None:
    both = {} if arch == "sd35_large" else {"transformer_blocks.0.attn.to_q": (1536, 1536)}
    path = write(tmp_path / "a.safetensors", pairs(module | both, "transformer."))
    found = ao.inspect(path).architecture
    assert (found.value, found.certainty) == (arch, ao.Certainty.DERIVED)


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ("stable-diffusion-3-5-medium/lora", []),
        ("stabilityai/stable-diffusion-3.5-medium", []),
        ("stable-diffusion-3/lora", []),
        ("sd3", []),
        ("stable-diffusion-3-medium/lora", ["B304"]),
        ("stabilityai/stable-diffusion-3-medium-diffusers", ["B304"]),
        ("stabilityai/stable-diffusion-3.5-large-turbo", ["B304"]),
        ("5-large", ["B304"]),
        ("flux-1-dev/lora", ["B304"]),
    ],
)
def test_what_a_header_calls_it(said: str, code: list[str], tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", pairs(distinct(MEDIUM), "transformer."), ss_base_model_version=said)
    assert [f.rule.code for f in ao.validate(path, ignore=["D601"])] == code


def test_one_that_fits_two_releases_merges_with_one_that_tells(tmp_path: Path) -> None:
    """An adapter without a second attention is taken for SD3's; beside one of 3.5 medium it is for that, in any order."""
    plain = write(tmp_path / "plain.safetensors", pairs(diffusers(MEDIUM, second=False), "transformer."))
    tells = write(tmp_path / "tells.safetensors", pairs(diffusers(MEDIUM), "transformer."))
    large = write(tmp_path / "large.safetensors", pairs(diffusers(LARGE), "transformer."))
    assert (ao.load(plain).architecture.value, ao.load(tells).architecture.value) == ("sd3", "sd35_medium")
    for number, sources in enumerate(([plain, tells], [tells, plain])):
        out = tmp_path / f"out{number}.safetensors"
        ao.merge(sources, out, "linear", weights=(1, 1))
        assert ao.load(out).architecture.value == "sd35_medium"
    with pytest.raises(UsageError, match="different base models"):
        ao.merge([plain, large], tmp_path / "none.safetensors", "linear", weights=(1, 1))
    assert not (tmp_path / "none.safetensors").exists()
