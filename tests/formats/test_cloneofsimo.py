"""cloneofsimo's numbered modules, held against a walk over diffusers' and transformers' own models, as the trainer does
it.

The walk, the saving and the reading are stated again here from `lora_diffusion/lora.py` (`_find_modules_v2`,
`save_safeloras_with_embeds`, `monkeypatch_or_replace_lora_extended`).  Published files are of diffusers before 0.15,
whose transformer blocks had another order; `early` gives it to today's class."""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from raw import dotted_deltas, probe
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

import adapterops as ao
from adapterops import errors

LINEAR, EVERY = (nn.Linear,), (nn.Linear, nn.Conv2d)
UNET, TEXT = ("CrossAttention", "Attention", "GEGLU"), ("CLIPAttention",)
FILES = (
    "cloneofsimo-disney/lora_disney.safetensors",
    "cloneofsimo-analog-svd-rank4/analog_svd_rank4.safetensors",
)
Deltas = dict[tuple[str, str], Tensor]


@functools.cache
def unet(early: bool, inputs: int = 4, cross: int = 768) -> nn.Module:
    with torch.device("meta"):
        model = UNet2DConditionModel(in_channels=inputs, cross_attention_dim=cross)
    for block in model.modules() if early else ():
        if type(block).__name__ == "BasicTransformerBlock":
            children = dict(block.named_children())
            block._modules.clear()
            block._modules.update(
                {name: children[name] for name in ("attn1", "ff", "attn2", "norm1", "norm2", "norm3")}
            )
    return model


@functools.cache
def encoder() -> nn.Module:
    with torch.device("meta"):
        return CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12))


def met(
    model: nn.Module, classes: Collection[str], kinds: tuple[type[nn.Module], ...]
) -> Iterator[tuple[str, nn.Module]]:
    """The modules that the trainer finds, in its order."""
    names = {id(module): name for name, module in model.named_modules()}
    for ancestor in model.modules():
        if type(ancestor).__name__ in classes:
            for _, module in ancestor.named_modules():
                if isinstance(module, kinds):
                    yield names[id(module)], module


def published(component: str, name: str) -> tuple[str, str]:
    return component, name if component == "unet" else f"text_model.{name}"


def on_columns(up: Tensor, down: Tensor) -> Tensor:
    flat = down.double().flatten(1)
    return up.double().flatten(1) @ (flat @ probe(flat.shape[1]))


def trained(
    models: dict[str, nn.Module], classes: dict[str, Collection[str]], kinds: tuple[type[nn.Module], ...], rank: int = 2
) -> tuple[dict[str, Tensor], dict[str, str], Deltas]:
    """A file's tensors and header as the trainer writes them, and what they do to which module."""
    tensors: dict[str, Tensor] = {}
    header: dict[str, str] = {}
    deltas: Deltas = {}
    for component, model in models.items():
        header[component] = json.dumps(list(classes[component]))
        for number, (name, module) in enumerate(met(model, classes[component], kinds)):
            shape: Any = module.weight.shape
            dice = torch.Generator().manual_seed(number)
            up = torch.randn(shape[0], rank, *(1,) * (len(shape) - 2), generator=dice).half()
            down = torch.randn(rank, *shape[1:], generator=dice).half()
            at = f"{component}:{number}"
            tensors |= {f"{at}:up": up, f"{at}:down": down}
            header[f"{at}:rank"] = str(rank)
            deltas[published(component, name)] = on_columns(up, down)
    return tensors, header, deltas


def loaded(path: Path, models: dict[str, nn.Module]) -> Deltas:
    """What the trainer's own reader makes of a file: each module takes the next pair, where that has its dimensions."""
    with safe_open(path, "pt") as file:
        header = file.metadata()
    tensors, out = load_file(path), {}
    for component, model in models.items():
        count = sum(key.startswith(component + ":") for key in tensors) // 2
        pairs = [(tensors[f"{component}:{n}:up"], tensors[f"{component}:{n}:down"]) for n in range(count)]
        assert [int(header[f"{component}:{n}:rank"]) for n in range(count)] == [len(down) for _, down in pairs]
        for name, module in met(model, json.loads(header[component]), EVERY):
            # It looks at the next pair before it asks what the module is: one that is not there stops it.
            if pairs[0][0].dim() == module.weight.dim():
                up, down = pairs.pop(0)
                assert (up.shape[0], *down.shape[1:]) == tuple(module.weight.shape)
                out[published(component, name)] = on_columns(up, down)
        assert not pairs
    return out


def agree(one: Deltas, two: Deltas, rounding: float = 1e-9) -> None:
    assert one.keys() == two.keys()
    for at, delta in one.items():
        torch.testing.assert_close(delta, two[at], rtol=rounding, atol=rounding)


def stored(path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> Path:
    save_file(tensors, path, metadata=header)
    return path


def header_of(path: Path | str) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return {key: value for key, value in (file.metadata() or {}).items() if key != "adapterops"}


CASES = {
    "inpainting": (True, 9, UNET, LINEAR),
    "later diffusers": (False, 4, UNET, LINEAR),
    "convolutions": (True, 4, ("ResnetBlock2D", *UNET), EVERY),
    "attention alone": (False, 4, ("Attention",), LINEAR),
}


@pytest.mark.parametrize("case", CASES)
def test_every_number_means_the_module_that_the_trainer_met(case: str, tmp_path: Path) -> None:
    early, inputs, classes, kinds = CASES[case]
    models = {"unet": unet(early, inputs), "text_encoder": encoder()}
    if not early:
        del models["text_encoder"]
    # Today's class is called Attention; before 0.15 the same stood under CrossAttention.
    tensors, header, expected = trained(models, {"unet": classes, "text_encoder": TEXT}, kinds)
    path = stored(tmp_path / "x.safetensors", tensors, header)
    result = ao.convert(path, "diffusers", tmp_path / "d.safetensors")
    assert result.proof is not None
    assert result.proof.exact
    assert result.modules == len(expected)
    agree(dotted_deltas(tmp_path / "d.safetensors"), expected)
    assert all(update.alpha is not None and update.alpha.certainty == "assumed" for update in ao.load(path))
    # Back in its own form, directly and by way of another format: the same bytes under the same keys, and the same header.
    same = ao.load(path).provenance.dialect
    assert same == ("cloneofsimo" if early or case == "attention alone" else "cloneofsimo-0.15")
    for number, source in enumerate((path, tmp_path / "d.safetensors")):
        back = tmp_path / f"back{number}.safetensors"
        ao.convert(source, same, back)
        assert header_of(back) == header | ({"format": "pt"} if number else {})
        again = load_file(back)
        assert again.keys() == tensors.keys()
        assert all(
            torch.equal(again[key], tensor) and again[key].dtype == tensor.dtype for key, tensor in tensors.items()
        )


@pytest.mark.parametrize("name", FILES)
def test_published_files(name: str, corpus: Path, tmp_path: Path) -> None:
    path = corpus / "files" / name
    models = {"unet": unet(True), "text_encoder": encoder()}
    expected = loaded(path, models)
    assert len(expected) == 192
    drop = "disney" in name
    result = ao.convert(path, "diffusers", tmp_path / "d.safetensors", allow_drop=drop)
    assert result.proof is not None
    assert result.proof.exact
    agree(dotted_deltas(tmp_path / "d.safetensors"), expected)
    assert [entry.split(":")[1].strip() for entry in result.dropped] == (["<s1>", "<s2>"] if drop else [])
    for target in ("kohya", "peft"):
        place = tmp_path / target / ("x.safetensors" if target == "kohya" else "folder")
        assert ao.convert(path, target, place, allow_drop=drop).modules == len(expected) + 2 * (
            drop and target == "kohya"
        )
    tensors = load_file(path)
    for number, source in enumerate((path, tmp_path / "kohya" / "x.safetensors")):
        back = tmp_path / f"back{number}.safetensors"
        ao.convert(source, "cloneofsimo", back)
        again = load_file(back)
        assert again.keys() == tensors.keys()
        assert all(
            torch.equal(again[key], tensor) and again[key].dtype == tensor.dtype for key, tensor in tensors.items()
        )
        assert {k: v for k, v in header_of(back).items() if k != "format"} == header_of(path)


def kohya_file(path: Path, early: bool, classes: Collection[str], text: Collection[str], alpha: float) -> Deltas:
    """A Kohya file of rank 2 on those modules."""
    models = {"unet": unet(early), "text_encoder": encoder()}
    tensors, _, deltas = trained(models, {"unet": classes, "text_encoder": text}, EVERY)
    out: dict[str, Tensor] = {}
    names = [
        (component, name)
        for component, own in (("unet", classes), ("text_encoder", text))
        for name, _ in met(models[component], own, EVERY)
    ]
    counts = dict.fromkeys(models, 0)
    for component, name in names:
        stem = ("lora_unet_" if component == "unet" else "lora_te_text_model_") + name.replace(".", "_")
        number = counts[component]
        counts[component] += 1
        out[f"{stem}.lora_up.weight"] = tensors[f"{component}:{number}:up"]
        out[f"{stem}.lora_down.weight"] = tensors[f"{component}:{number}:down"]
        out[f"{stem}.alpha"] = torch.tensor(alpha)
    save_file(out, path)
    return {at: delta * alpha / 2 for at, delta in deltas.items()}


@pytest.mark.parametrize("early", [True, False])
def test_the_trainer_reads_what_is_written(early: bool, tmp_path: Path) -> None:
    path, out = tmp_path / "k.safetensors", tmp_path / "c.safetensors"
    expected = kohya_file(path, early, ("Transformer2DModel",), ("CLIPEncoderLayer",), 1.0)
    to = "cloneofsimo" if early else "cloneofsimo-0.15"
    with pytest.raises(errors.CannotRepresent, match=r"scale is 0\.5.*--fold-alpha"):
        ao.convert(path, to, out)
    result = ao.convert(path, to, out, fold_alpha=True)
    assert any("0.14" in note for note in result.notes) == early
    agree(loaded(out, {"unet": unet(early), "text_encoder": encoder()}), expected, 1e-5)
    assert ao.load(out).provenance.dialect == to


def test_what_no_walk_leads_to_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "k.safetensors"
    kohya_file(path, True, UNET, ("CLIPAttention", "CLIPMLP"), 2.0)
    assert ao.convert(path, "cloneofsimo", tmp_path / "whole.safetensors").modules == 216
    assert json.loads(header_of(tmp_path / "whole.safetensors")["unet"]) == ["CrossAttention", "Attention", "GEGLU"]
    assert json.loads(header_of(tmp_path / "whole.safetensors")["text_encoder"]) == ["CLIPEncoderLayer"]
    tensors = load_file(path)
    left = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    save_file({key: tensor for key, tensor in tensors.items() if not key.startswith(left)}, path)
    with pytest.raises(
        errors.CannotRepresent, match=r"no mid_block\S+attn2\.to_k beside other layers.*Attention.*--to kohya"
    ):
        ao.convert(path, "cloneofsimo", tmp_path / "c.safetensors")
    stem = "lora_unet_conv_in"
    save_file(
        tensors
        | {f"{stem}.lora_up.weight": torch.ones(320, 2, 1, 1), f"{stem}.lora_down.weight": torch.ones(2, 4, 3, 3)},
        path,
    )
    with pytest.raises(errors.CannotRepresent, match=r"conv_in.*none of them.*--to kohya"):
        ao.convert(path, "cloneofsimo", tmp_path / "c.safetensors")
    save_file(tensors | {f"{left}.dora_scale": torch.ones(1280, 1)}, path)
    with pytest.raises(errors.CannotRepresent, match=r"attn2\.to_k.*plain LoRA only.*--to kohya"):
        ao.convert(path, "cloneofsimo", tmp_path / "c.safetensors")
    assert not (tmp_path / "c.safetensors").exists()


def test_tokens_are_bundled_embeddings(tmp_path: Path) -> None:
    tensors, header, _ = trained({"text_encoder": encoder()}, {"text_encoder": TEXT}, LINEAR)
    token = torch.randn(768)
    path = stored(tmp_path / "x.safetensors", tensors | {"<s1>": token}, header | {"<s1>": "<embed>"})
    ao.convert(path, "kohya", tmp_path / "k.safetensors")
    assert torch.equal(load_file(tmp_path / "k.safetensors")["bundle_emb.<s1>.emb_params"], token.reshape(1, 768))
    with pytest.raises(errors.CannotRepresent, match="allow-drop"):
        ao.convert(path, "peft", tmp_path / "p")
    bundle = load_file(tmp_path / "k.safetensors")
    vector = bundle.pop("bundle_emb.<s1>.emb_params")
    save_file(bundle | {"bundle_emb.<s1>.string_to_param.*": vector}, tmp_path / "a.safetensors")
    ao.convert(tmp_path / "a.safetensors", "cloneofsimo", tmp_path / "back.safetensors")
    assert torch.equal(load_file(tmp_path / "back.safetensors")["<s1>"], token)
    assert header_of(tmp_path / "back.safetensors")["<s1>"] == "<embed>"
    save_file(bundle | {"bundle_emb.<s1>.emb_params": torch.ones(2, 768)}, tmp_path / "two.safetensors")
    with pytest.raises(errors.CannotRepresent, match=r"one vector a token.*\[2, 768\]"):
        ao.convert(tmp_path / "two.safetensors", "cloneofsimo", tmp_path / "c.safetensors")


@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_lists_are_read_where_the_user_says_what_they_are(component: str, tmp_path: Path) -> None:
    models = {"unet": unet(True)} if component == "unet" else {"text_encoder": encoder()}
    tensors, _, expected = trained(models, {"unet": UNET, "text_encoder": TEXT}, LINEAR)
    pairs = [tensors[f"{component}:{n}:{half}"] for n in range(len(tensors) // 2) for half in ("up", "down")]
    torch.save(pairs, tmp_path / "lora.pt")
    with pytest.raises(errors.NotAnAdapter, match=r"bare list of .* say --from cloneofsimo-list"):
        ao.load(tmp_path / "lora.pt")
    for name in ("cloneofsimo", "cloneofsimo-list"):
        adapter = ao.load(tmp_path / "lora.pt", format=name, arch="sd1")
        assert any("are in no header" in note for note in adapter.provenance.notes)
    ao.convert(tmp_path / "lora.pt", "diffusers", tmp_path / "d.safetensors", format="cloneofsimo", arch="sd1")
    agree(dotted_deltas(tmp_path / "d.safetensors"), expected)
    ao.convert(tmp_path / "lora.pt", "cloneofsimo", tmp_path / "c.safetensors", format="cloneofsimo")
    assert load_file(tmp_path / "c.safetensors").keys() == tensors.keys()
    with pytest.raises(errors.CannotRepresent, match="never written"):
        ao.convert(tmp_path / "c.safetensors", "cloneofsimo-list", tmp_path / "l.safetensors")
    torch.save(pairs[:-2], tmp_path / "short.pt")
    with pytest.raises(errors.UnknownArchitectureOfFile, match="no walk"):
        ao.load(tmp_path / "short.pt", format="cloneofsimo")
    torch.save(pairs[:-1], tmp_path / "odd.pt")
    with pytest.raises(errors.BrokenAdapter):
        ao.load(tmp_path / "odd.pt", format="cloneofsimo")


@pytest.mark.parametrize("cross", [768, 1024])
def test_lists_of_the_first_versions_have_attention_alone(cross: int, tmp_path: Path) -> None:
    """`inject_trainable_lora` up to 0.0.6: `target_replace_module=["CrossAttention", "Attention"]`."""
    tensors, _, expected = trained({"unet": unet(True, cross=cross)}, {"unet": ("Attention",)}, LINEAR)
    pairs = [tensors[f"unet:{n}:{half}"] for n in range(len(tensors) // 2) for half in ("up", "down")]
    assert len(pairs) == 256
    torch.save(pairs, tmp_path / "lora.pt")
    adapter = ao.load(tmp_path / "lora.pt", format="cloneofsimo-list")
    assert adapter.architecture.value == ("sd1" if cross == 768 else "sd2")
    ao.convert(tmp_path / "lora.pt", "diffusers", tmp_path / "d.safetensors", format="cloneofsimo-list")
    agree(dotted_deltas(tmp_path / "d.safetensors"), expected)


@pytest.mark.parametrize("name", ["CLIPSdpaAttention", "CLIPFlashAttention2"])
def test_other_classes_of_clips_attention(name: str, tmp_path: Path) -> None:
    """transformers 4.4x calls CLIP's attention by how it computes it, and the trainer is given that name."""
    with torch.device("meta"):
        model = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12))
    for module in model.modules():
        if type(module).__name__ == "CLIPAttention":
            module.__class__ = type(name, (type(module),), {})
    models: dict[str, nn.Module] = {"unet": unet(False), "text_encoder": model}
    tensors, header, expected = trained(models, {"unet": UNET, "text_encoder": (name,)}, LINEAR)
    assert len(expected) == 192
    path = stored(tmp_path / "x.safetensors", tensors, header)
    ao.convert(path, "diffusers", tmp_path / "d.safetensors")
    agree(dotted_deltas(tmp_path / "d.safetensors"), expected)
    ao.convert(tmp_path / "d.safetensors", "cloneofsimo-0.15", tmp_path / "back.safetensors")
    assert {k: v for k, v in header_of(tmp_path / "back.safetensors").items() if k != "format"} == header
    # What comes from elsewhere is found by the trainer's reader whatever the class is called.
    kohya_file(tmp_path / "k.safetensors", False, UNET, TEXT, 2.0)
    ao.convert(tmp_path / "k.safetensors", "cloneofsimo-0.15", tmp_path / "c.safetensors")
    deltas = loaded(tmp_path / "c.safetensors", models)
    assert deltas.keys() == expected.keys()
    agree(deltas, loaded(tmp_path / "c.safetensors", {"unet": unet(False), "text_encoder": encoder()}))


def test_a_header_without_classes(tmp_path: Path) -> None:
    tensors, header, expected = trained({"unet": unet(True)}, {"unet": UNET}, LINEAR)
    del header["unet"], header["unet:3:rank"]
    header["unet:4:rank"] = "8"
    path = stored(tmp_path / "x.safetensors", tensors, header)
    adapter = ao.load(path)
    assert {(u.component, u.module) for u in adapter} == set(expected)
    assert any("are in no header" in note for note in adapter.provenance.notes)
    assert any("header's ranks" in note and "unet:4" in note for note in adapter.provenance.notes)


def test_files_that_are_no_walk(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensors, header, _ = trained({"unet": unet(True)}, {"unet": UNET}, LINEAR)

    def refused(error: type[Exception], words: str, change: dict[str, Tensor] | None = None, **entries: str) -> None:
        stored(path, {k: t for k, t in (tensors | (change or {})).items() if t.numel()}, header | entries)
        with pytest.raises(error, match=words):
            ao.load(path)

    none = torch.ones(0)
    refused(errors.BrokenAdapter, "no position 5", {"unet:5:up": none, "unet:5:down": none})
    refused(errors.BrokenAdapter, "unet:5:up", {"unet:5:down": none})
    # Two neighbours exchanged: their shapes tell, and the message names the first that is wrong.
    swapped = {f"unet:{a}:{half}": tensors[f"unet:{b}:{half}"] for a, b in ((5, 6), (6, 5)) for half in ("up", "down")}
    refused(errors.UnknownArchitectureOfFile, r"'unet:5:up'.*'unet:5:down' \[2, 768\].*attn2\.to_q", swapped)
    last = len(tensors) // 2 - 1
    refused(
        errors.UnknownArchitectureOfFile,
        "has 143 pairs, and 144 modules could",
        {f"unet:{last}:up": none, f"unet:{last}:down": none},
    )
    with pytest.raises(errors.UnknownArchitectureOfFile, match="has 143 pairs"):
        ao.inspect(path)
    refused(errors.InvalidHeader, "no JSON list", unet="CrossAttention")
    refused(errors.UnknownArchitectureOfFile, "Mystery is none of the classes", unet='["Mystery"]')
    refused(errors.UnsupportedFormat, "vae:0:up", {"vae:0:up": torch.ones(2, 2)})
    nested = ("FeedForward", "GEGLU")
    doubled, said, _ = trained({"unet": unet(True)}, {"unet": nested}, LINEAR)
    stored(path, doubled, said)
    with pytest.raises(errors.UnsupportedFormat, match="twice"):
        ao.load(path)
    other, said, _ = trained({"unet": unet(True, cross=1024)}, {"unet": UNET}, LINEAR)
    stored(path, other, said)
    assert ao.load(path).architecture.value == "sd2"
    with pytest.raises(errors.UnknownArchitectureOfFile, match=r"on sd1.*attn2\.to_k"):
        ao.load(path, arch="sd1")
    with pytest.raises(errors.UnknownArchitectureOfFile, match="has none of unet"):
        ao.load(path, arch="flux")
