"""Small models of diffusers' classes, and modules of theirs by the authors' names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from trainers import Shape


class Place(NamedTuple):
    """A module of the authors', and diffusers' ones that hold its rows, in order."""

    shape: Shape
    own: tuple[str, ...]
    turned: bool = False
    """The halves of the rows stand the other way round."""


class Small(NamedTuple):
    """A model, and the places of some of its modules; of none, where everyone has diffusers' names: every linear layer."""

    config: Mapping[str, Any]
    places: Mapping[str, Place] = {}


def alone(shape: Shape, own: str) -> Place:
    """A module that diffusers has in one, too."""
    return Place(shape, (own,))


SMALL: dict[str, Small] = {
    "CosmosTransformer3DModel": Small(
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 1,
            "text_embed_dim": 16,
            "adaln_lora_dim": 8,
            "extra_pos_embed_type": None,
        },
        {
            "blocks.0.cross_attn.k_proj": alone((24, 16), "transformer_blocks.0.attn2.to_k"),
            "blocks.0.adaln_modulation_mlp.2": alone((72, 8), "transformer_blocks.0.norm3.linear_2"),
            "final_layer.linear": alone((16, 24), "proj_out"),
        },
    ),
    "Krea2Transformer2DModel": Small(
        {
            "in_channels": 4,
            "num_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 16,
            "timestep_embed_dim": 16,
            "text_hidden_dim": 16,
            "num_text_layers": 3,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 2,
            "text_intermediate_size": 24,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
            "axes_dims_rope": [4, 2, 2],
        },
        {
            "blocks.0.attn.wk": alone((16, 32), "transformer_blocks.0.attn.to_k"),
            "blocks.0.mlp.down": alone((32, 16), "transformer_blocks.0.ff.down"),
            "txtfusion.projector": alone((1, 3), "text_fusion.projector"),
            "last.linear": alone((4, 32), "final_layer.linear"),
        },
    ),
    "Flux2Transformer2DModel": Small(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "joint_attention_dim": 24,
            "timestep_guidance_channels": 16,
            "in_channels": 8,
            "axes_dims_rope": [4, 4, 4, 4],
        },
        {
            "double_blocks.0.txt_attn.proj": alone((32, 32), "transformer_blocks.0.attn.to_add_out"),
            "double_blocks.0.img_mlp.0": alone((192, 32), "transformer_blocks.0.ff.linear_in"),
            "single_blocks.0.linear1": alone((288, 32), "single_transformer_blocks.0.attn.to_qkv_mlp_proj"),
            "guidance_in.in_layer": alone((32, 16), "time_guidance_embed.guidance_embedder.linear_1"),
            "final_layer.linear": alone((8, 32), "proj_out"),
        },
    ),
    "WanTransformer3DModel": Small(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 1,
            "ffn_dim": 32,
            "text_dim": 16,
            "freq_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
        },
        {
            "blocks.0.self_attn.q": alone((24, 24), "blocks.0.attn1.to_q"),
            "blocks.0.cross_attn.o": alone((24, 24), "blocks.0.attn2.to_out.0"),
            "head.head": alone((16, 24), "proj_out"),
        },
    ),
    "WanVACETransformer3DModel": Small(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 2,
            "ffn_dim": 32,
            "text_dim": 16,
            "freq_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "vace_layers": [0, 1],
            "vace_in_channels": 6,
        },
        {
            "blocks.1.self_attn.q": alone((24, 24), "blocks.1.attn1.to_q"),
            "vace_blocks.0.before_proj": alone((24, 24), "vace_blocks.0.proj_in"),
            "vace_blocks.1.after_proj": alone((24, 24), "vace_blocks.1.proj_out"),
            "vace_blocks.1.cross_attn.o": alone((24, 24), "vace_blocks.1.attn2.to_out.0"),
        },
    ),
    "WanAnimateTransformer3DModel": Small(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 2,
            "ffn_dim": 32,
            "text_dim": 16,
            "freq_dim": 16,
            "image_dim": 16,
            "added_kv_proj_dim": 24,
            "face_encoder_hidden_dim": 16,
            "inject_face_latents_blocks": 1,
        },
        {
            "face_adapter.fuser_blocks.1.linear1_kv": Place((48, 24), ("face_adapter.1.to_k", "face_adapter.1.to_v")),
            "face_adapter.fuser_blocks.0.linear1_q": alone((24, 24), "face_adapter.0.to_q"),
            "face_encoder.out_proj": alone((24, 16), "face_encoder.out_proj"),
        },
    ),
    "HunyuanVideoTransformer3DModel": Small(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "text_embed_dim": 16,
            "pooled_projection_dim": 8,
            "rope_axes_dim": [4, 4, 4],
        },
        {
            "double_blocks.0.img_attn_proj": alone((24, 24), "transformer_blocks.0.attn.to_out.0"),
            "single_blocks.0.linear1": Place(
                (168, 24),
                (
                    "single_transformer_blocks.0.attn.to_q",
                    "single_transformer_blocks.0.attn.to_k",
                    "single_transformer_blocks.0.attn.to_v",
                    "single_transformer_blocks.0.proj_mlp",
                ),
            ),
            "final_layer.adaLN_modulation.1": Place((48, 24), ("norm_out.linear",), turned=True),
        },
    ),
    "HunyuanVideo15Transformer3DModel": Small(
        {
            "in_channels": 9,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 1,
            "num_refiner_layers": 1,
            "text_embed_dim": 16,
            "text_embed_2_dim": 8,
            "image_embed_dim": 8,
            "rope_axes_dim": [4, 6, 6],
        },
        {
            "double_blocks.0.img_attn_k": alone((32, 32), "transformer_blocks.0.attn.to_k"),
            "double_blocks.0.txt_attn_v": alone((32, 32), "transformer_blocks.0.attn.add_v_proj"),
            "double_blocks.0.txt_mlp.fc1": alone((128, 32), "transformer_blocks.0.ff_context.net.0.proj"),
            "byt5_in.fc3": alone((32, 2048), "context_embedder_2.linear_3"),
            "vision_in.proj.3": alone((32, 8), "image_embedder.linear_2"),
            "txt_in.individual_token_refiner.blocks.0.self_attn_qkv": Place(
                (96, 32),
                (
                    "context_embedder.token_refiner.refiner_blocks.0.attn.to_q",
                    "context_embedder.token_refiner.refiner_blocks.0.attn.to_k",
                    "context_embedder.token_refiner.refiner_blocks.0.attn.to_v",
                ),
            ),
        },
    ),
    "HunyuanImageTransformer2DModel": Small(
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "text_embed_dim": 16,
            "text_embed_2_dim": 8,
            "rope_axes_dim": [8, 8],
        },
        {
            "double_blocks.0.img_attn_qkv": Place(
                (96, 32),
                ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k", "transformer_blocks.0.attn.to_v"),
            ),
            "double_blocks.0.img_mod.linear": alone((192, 32), "transformer_blocks.0.norm1.linear"),
            "single_blocks.0.linear1": Place(
                (224, 32),
                (
                    "single_transformer_blocks.0.attn.to_q",
                    "single_transformer_blocks.0.attn.to_k",
                    "single_transformer_blocks.0.attn.to_v",
                    "single_transformer_blocks.0.proj_mlp",
                ),
            ),
            "single_blocks.0.linear2": alone((32, 160), "single_transformer_blocks.0.proj_out"),
            "time_in.mlp.2": alone((32, 32), "time_guidance_embed.timestep_embedder.linear_2"),
        },
    ),
    "Kandinsky5Transformer3DModel": Small(
        {
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "in_text_dim": 16,
            "in_text_dim2": 8,
            "time_dim": 8,
            "model_dim": 32,
            "ff_dim": 48,
            "num_text_blocks": 1,
            "num_visual_blocks": 1,
            "axes_dims": [4, 6, 6],
            "visual_cond": True,
        },
        {
            "visual_transformer_blocks.0.cross_attention.to_value": alone(
                (32, 32), "visual_transformer_blocks.0.cross_attention.to_value"
            ),
            "text_transformer_blocks.0.feed_forward.out_layer": alone(
                (32, 48), "text_transformer_blocks.0.feed_forward.out_layer"
            ),
            "visual_embeddings.in_layer": alone((32, 36), "visual_embeddings.in_layer"),
            "out_layer.modulation.out_layer": alone((64, 8), "out_layer.modulation.out_layer"),
        },
    ),
    "CogVideoXTransformer3DModel": Small(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 8,
            "text_embed_dim": 16,
            "num_layers": 2,
            "attention_bias": True,
            "use_rotary_positional_embeddings": True,
            "sample_width": 8,
            "sample_height": 8,
            "sample_frames": 9,
        },
        {
            "blocks.0.q": alone((32, 32), "transformer_blocks.0.attn1.to_q"),
            "blocks.1.ff_out": alone((32, 128), "transformer_blocks.1.ff.net.2"),
            "time_embedding_linear_2": alone((8, 8), "time_embedding.linear_2"),
        },
    ),
    "CogView4Transformer2DModel": Small(
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "text_embed_dim": 16,
            "time_embed_dim": 8,
            "condition_dim": 4,
        }
    ),
    "MochiTransformer3DModel": Small(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 2,
            "pooled_projection_dim": 12,
            "in_channels": 4,
            "text_embed_dim": 16,
            "time_embed_dim": 8,
        }
    ),
    "SanaTransformer2DModel": Small(
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 1,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 8,
            "cross_attention_dim": 16,
            "caption_channels": 12,
            "sample_size": 8,
        }
    ),
    "PixArtTransformer2DModel": Small(
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 2,
            "cross_attention_dim": 16,
            "caption_channels": 12,
            "sample_size": 16,
            "use_additional_conditions": False,
        },
        {
            "blocks.1.cross_attn.q_linear": alone((16, 16), "transformer_blocks.1.attn2.to_q"),
            "blocks.0.mlp.fc2": alone((16, 64), "transformer_blocks.0.ff.net.2"),
            "t_block.1": alone((96, 16), "adaln_single.linear"),
        },
    ),
}
"""By class.  The authors' names: huggingface/diffusers `scripts/convert_*_to_diffusers.py`, `loaders/single_file_utils.py`."""
