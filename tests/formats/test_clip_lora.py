"""CLIP-LoRA's checkpoints against transformers' CLIPModel with the deltas added to its weights, as the program adds them."""

from __future__ import annotations

from math import sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import CLIPConfig, CLIPModel

import adapterops as ao
from adapterops.errors import BrokenAdapter, CannotRepresent, Conflict, UnknownFact, UnreadableFile, UnsupportedFormat

WIDTHS = {"text": 16, "vision": 24}
UP = [8, 9, 10, 11]
LAYERS = {"up": UP, "all": list(range(12)), "half-bottom": list(range(6)), "top3": [9, 10, 11]}
MODULES = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "proj"}
TOWERS = {"text": ["text"], "vision": ["vision"], "both": ["text", "vision"]}


@pytest.fixture(scope="module")
def base() -> CLIPModel:
    torch.manual_seed(0)
    common = {"num_hidden_layers": 12, "num_attention_heads": 2, "intermediate_size": 8}
    text = {**common, "hidden_size": WIDTHS["text"], "vocab_size": 40, "max_position_embeddings": 8}
    vision = {**common, "hidden_size": WIDTHS["vision"], "image_size": 8, "patch_size": 4}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()


def checkpoint(encoder: str, position: str, params: list[str], r: int = 2, alpha: float = 3) -> dict[str, Any]:
    """What `save_lora` makes of a run with these settings."""
    generator = torch.Generator().manual_seed(1)
    weights: dict[str, Any] = {}
    for tower in TOWERS[encoder]:
        for _ in LAYERS[position]:
            weights[f"layer_{len(weights)}"] = {
                MODULES[param]: {
                    "w_lora_A": 0.3 * torch.randn(r, WIDTHS[tower], generator=generator),
                    "w_lora_B": 0.3 * torch.randn(WIDTHS[tower], r, generator=generator),
                }
                for param in params
            }
    metadata = {"r": r, "alpha": alpha, "encoder": encoder, "params": params, "position": position}
    return {"weights": weights, "metadata": metadata}


def outputs(model: Any) -> torch.Tensor:
    torch.manual_seed(2)
    with torch.no_grad():
        found = model(input_ids=torch.randint(0, 40, (2, 8)), pixel_values=torch.randn(2, 3, 8, 8))
    return torch.cat([found.text_embeds, found.image_embeds])


def merged(base: CLIPModel, saved: dict[str, Any]) -> CLIPModel:
    """The base with the program's deltas, layer by layer in its order: `load_lora`, then `add_lora_data`."""
    model = CLIPModel(base.config).eval()
    model.load_state_dict(base.state_dict())
    said, number = saved["metadata"], 0
    for tower in TOWERS[said["encoder"]]:
        layers = getattr(model, f"{tower}_model").encoder.layers
        for at in LAYERS[said["position"]]:
            for name, pair in saved["weights"][f"layer_{number}"].items():
                linear = getattr(layers[at].self_attn, "out_proj" if name == "proj" else name)
                linear.weight.data += pair["w_lora_B"] @ pair["w_lora_A"] * said["alpha"] / sqrt(said["r"])
            number += 1
    return model


@pytest.mark.parametrize(
    ("encoder", "position", "params"),
    [("both", "all", "qkv"), ("both", "up", "qo"), ("text", "half-bottom", "qkvo"), ("vision", "top3", "v")],
)
def test_peft_computes_what_the_program_does(
    encoder: str, position: str, params: str, base: CLIPModel, tmp_path: Path
) -> None:
    saved = checkpoint(encoder, position, list(params))
    torch.save(saved, tmp_path / "lora_weights.pt")
    ao.convert(tmp_path / "lora_weights.pt", "peft", tmp_path / "out")
    found = PeftModel.from_pretrained(CLIPModel(base.config), tmp_path / "out").eval()
    found.get_base_model().load_state_dict(base.state_dict(), strict=False)
    plain = {name.replace(".base_layer.", "."): p for name, p in found.get_base_model().named_parameters()}
    for name, parameter in base.named_parameters():
        plain[name].data.copy_(parameter)
    wanted = outputs(merged(base, saved))
    assert (wanted - outputs(base)).abs().max() > 1e-3
    torch.testing.assert_close(outputs(found), wanted, atol=1e-5, rtol=1e-5)


def test_what_inspect_tells(tmp_path: Path) -> None:
    torch.save(checkpoint("both", "up", ["q", "v"]), tmp_path / "a.pt")
    found = ao.inspect(tmp_path / "a.pt")
    assert (found.dialect, found.modules) == ("clip-lora", 16)
    (update, *_) = ao.load(tmp_path / "a.pt")
    assert (update.module, update.alpha.value, update.rslora) == (
        "text_model.encoder.layers.8.self_attn.q_proj",
        3.0,
        True,
    )


def large(position: str, texts: int, images: int) -> dict[str, Any]:
    """A checkpoint of ViT-L/14, whose encoder of images is 1024 wide, and that of texts 768."""
    saved = checkpoint("text", "half-bottom", ["q"])
    saved["weights"] = {
        f"layer_{n}": {"q_proj": {"w_lora_A": torch.ones(2, size), "w_lora_B": torch.ones(size, 2)}}
        for n, size in enumerate([768] * texts + [1024] * images)
    }
    saved["metadata"] |= {"encoder": "both", "position": position}
    return saved


@pytest.mark.parametrize(
    ("position", "texts", "images"),
    [
        ("half-up", range(6, 12), range(12, 24)),
        ("half-bottom", range(6), range(12)),
        ("all", range(12), range(24)),
        # Before the program's commit e6bf706:
        ("half-up", range(6, 12), range(6, 12)),
        ("half-bottom", range(6), range(6)),
        ("all", range(12), range(21)),
        ("mid", range(4, 8), range(4, 8)),
    ],
)
def test_the_layers_of_a_large_image_encoder(position: str, texts: range, images: range, tmp_path: Path) -> None:
    saved = large(position, len(texts), len(images))
    torch.save(saved, tmp_path / "a.pt")
    wanted = [
        *(f"text_model.encoder.layers.{n}.self_attn.q_proj" for n in texts),
        *(f"vision_model.encoder.layers.{n}.self_attn.q_proj" for n in images),
    ]
    assert [update.module for update in ao.load(tmp_path / "a.pt")] == wanted
    del saved["metadata"]
    torch.save(saved, tmp_path / "a.pt")
    if position == "all":
        assert [update.module for update in ao.load(tmp_path / "a.pt")] == wanted
    else:
        with pytest.raises(UnknownFact, match="--set encoder"):
            ao.load(tmp_path / "a.pt")


def test_a_large_image_encoder_without_so_many_layers(tmp_path: Path) -> None:
    torch.save(large("half-up", 6, 9), tmp_path / "a.pt")
    with pytest.raises(BrokenAdapter, match="0 to 17"):
        ao.load(tmp_path / "a.pt")
    torch.save(large("top", 1, 1), tmp_path / "a.pt")
    with pytest.raises(
        UnreadableFile, match="which the vision encoder has not; it has all, half-up, half-bottom, bottom"
    ):
        ao.load(tmp_path / "a.pt")


def test_experts_without_their_router(tmp_path: Path) -> None:
    """What CLIP-MoLE saves."""
    saved = checkpoint("text", "up", ["q"])
    saved["weights"] = {
        layer: {
            name: {f"expert_{n}": {k: v.clone() for k, v in pair.items()} for n in range(2)}
            for name, pair in modules.items()
        }
        for layer, modules in saved["weights"].items()
    }
    torch.save(saved, tmp_path / "a.pt")
    with pytest.raises(UnsupportedFormat, match=r"layer_0.q_proj.expert_0.w_lora_A.*CLIP-MoLE.*leave the router out"):
        ao.load(tmp_path / "a.pt")


def test_weights_that_were_saved_again_without_metadata(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save(checkpoint("both", "all", ["q"])["weights"] | {"epoch": 1}, path)
    with pytest.raises(ao.errors.NotAnAdapter):
        ao.load(path)
    torch.save({"weights": checkpoint("both", "all", ["q"])["weights"]}, path)
    assert len(ao.load(path)) == 24
    with pytest.raises(ao.errors.UnknownFact, match="--alpha"):
        ao.convert(path, "peft", tmp_path / "out")
    torch.save({"weights": checkpoint("text", "up", ["q"])["weights"]}, path)
    with pytest.raises(UnknownFact, match="--set encoder"):
        ao.load(path)
    found = ao.load(path, alpha=3.0, fields={"encoder": "text", "position": "up"})
    assert next((u.module, u.rslora) for u in found) == ("text_model.encoder.layers.8.self_attn.q_proj", True)


@pytest.mark.parametrize(
    ("said", "error", "words"),
    [
        ({"position": "half-up"}, BrokenAdapter, "0 to 5"),
        ({"position": "sideways"}, UnreadableFile, "position 'sideways'.*half-bottom"),
        ({"encoder": "audio"}, UnreadableFile, "encoder 'audio'.*vision"),
        ({"r": 5}, Conflict, "says r 5.*rank 2"),
        ({"alpha": "one"}, UnreadableFile, "alpha 'one'"),
    ],
)
def test_settings_that_are_not_the_files(
    said: dict[str, Any], error: type[Exception], words: str, tmp_path: Path
) -> None:
    saved = checkpoint("text", "up", ["q"])
    saved["metadata"] |= said
    torch.save(saved, tmp_path / "a.pt")
    with pytest.raises(error, match=words):
        ao.load(tmp_path / "a.pt")
    saved["metadata"] = [1]
    torch.save(saved, tmp_path / "a.pt")
    with pytest.raises(UnreadableFile, match="must be a table, not a list"):
        ao.load(tmp_path / "a.pt")


def test_it_is_not_written(tmp_path: Path) -> None:
    torch.save(checkpoint("text", "up", ["q"]), tmp_path / "a.pt")
    with pytest.raises(CannotRepresent, match="read and never written"):
        ao.save(ao.load(tmp_path / "a.pt"), tmp_path / "b.safetensors")
