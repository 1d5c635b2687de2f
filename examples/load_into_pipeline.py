"""Put an adapter into a diffusers pipeline, weigh it, and take it out again.

The pipeline has SD 1.5's shape at toy size, random weights and no tokenizer, so that nothing is downloaded; the adapter
is a Kohya file made on the spot.  With a real pipeline the three lines that matter are the same:

    pipe = StableDiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
    ao.integrations.diffusers.load_into(pipe, "style.safetensors", "style")
    pipe.set_adapters(["style"], [0.8])
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

from adapterops.integrations.diffusers import load_into


def toy_pipeline() -> Any:
    """Stable Diffusion's UNet and text encoder, tiny."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        norm_num_groups=2,
        attention_head_dim=4,
    )
    size = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    encoder = CLIPTextModel(CLIPTextConfig(vocab_size=100, bos_token_id=0, eos_token_id=2, **size))
    return StableDiffusionPipeline(
        unet=unet.eval(),
        text_encoder=encoder.eval(),
        vae=None,
        tokenizer=None,
        scheduler=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def toy_adapter(pipe: Any, path: Path, rank: int = 4, alpha: float = 2.0) -> Path:
    """A Kohya file for the attention of both models."""
    tensors = {}
    for prefix, model in (("lora_unet", pipe.unet), ("lora_te_text_model", pipe.text_encoder)):
        for name, module in model.named_modules():
            if name.endswith(("to_q", "to_v", "q_proj", "v_proj")):
                stem = f"{prefix}_{name.replace('.', '_')}"
                tensors[f"{stem}.lora_down.weight"] = torch.randn(rank, module.in_features)
                tensors[f"{stem}.lora_up.weight"] = torch.randn(module.out_features, rank)
                tensors[f"{stem}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path)
    return path


@torch.no_grad()
def predict(pipe: Any) -> torch.Tensor:
    """The noise that the UNet sees for one prompt."""
    prompt = pipe.text_encoder(torch.tensor([[0, 5, 9, 2]])).last_hidden_state
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    prediction: torch.Tensor = pipe.unet(noise, 500, prompt).sample
    return prediction


def main() -> None:
    """Print how far the output moves at several weights."""
    pipe = toy_pipeline()
    base = predict(pipe)
    with tempfile.TemporaryDirectory() as folder:
        loaded = load_into(pipe, toy_adapter(pipe, Path(folder) / "style.safetensors"), "style")
    counts = ", ".join(f"{len(modules)} modules of {component}" for component, modules in loaded.modules.items())
    print(f"{loaded.name}: {counts}")
    for weight in (0.0, 0.5, 1.0):
        pipe.set_adapters(["style"], [weight])
        change = (predict(pipe) - base).norm() / base.norm()
        print(f"weight {weight}: the output changes by {change:.4f} of its size")
    pipe.unload_lora_weights()
    assert torch.equal(predict(pipe), base)
    print("unloaded: the outputs are those of the base again")


if __name__ == "__main__":
    main()
