"""Modules of base models that make images, with their shapes: by the authors', diffusers' and Comfy's names."""

from __future__ import annotations

from base_rows import Base
from trainers import Modules

ANIMA = Base(
    "anima",
    authors={
        **{f"blocks.0.self_attn.{p}_proj": (2048, 2048) for p in ("q", "k", "v", "output")},
        **{f"blocks.27.cross_attn.{p}_proj": (2048, 1024) for p in ("k", "v")},
        "blocks.27.mlp.layer1": (8192, 2048),
        "blocks.27.mlp.layer2": (2048, 8192),
        **{f"blocks.1.adaln_modulation_{p}.2": (6144, 256) for p in ("self_attn", "cross_attn", "mlp")},
    },
    around={
        "x_embedder.proj.1": (2048, 68),
        "t_embedder.1.linear_1": (2048, 2048),
        "t_embedder.1.linear_2": (6144, 2048),
        "final_layer.adaln_modulation.1": (256, 2048),
        "final_layer.linear": (64, 2048),
    },
    diffusers={
        "transformer_blocks.0.attn1.to_q": (2048, 2048),
        "transformer_blocks.27.attn2.to_k": (2048, 1024),
        "transformer_blocks.27.attn2.to_out.0": (2048, 2048),
        "transformer_blocks.27.ff.net.0.proj": (8192, 2048),
        "transformer_blocks.1.norm3.linear_2": (6144, 256),
    },
)
COSMOS_14B = Base(
    "cosmos_predict2_14b",
    authors={
        **{f"blocks.0.self_attn.{p}_proj": (5120, 5120) for p in ("q", "k", "v", "output")},
        **{f"blocks.35.cross_attn.{p}_proj": (5120, 1024) for p in ("k", "v")},
        "blocks.35.mlp.layer1": (20480, 5120),
    },
    diffusers={
        "transformer_blocks.0.attn1.to_q": (5120, 5120),
        "transformer_blocks.35.attn2.to_k": (5120, 1024),
        "transformer_blocks.35.ff.net.2": (5120, 20480),
    },
)
ANIMAS_CONDITIONER: Modules = {
    "blocks.0.cross_attn.q_proj": (1024, 1024),
    "blocks.5.self_attn.o_proj": (1024, 1024),
    "blocks.5.mlp.2": (1024, 4096),
    "out_proj": (1024, 1024),
}
QWEN3: Modules = {
    "layers.0.self_attn.q_proj": (2048, 1024),
    "layers.27.self_attn.k_proj": (1024, 1024),
    "layers.27.mlp.down_proj": (1024, 3072),
}
"""Anima's text encoder."""
AURAFLOW = Base(
    "auraflow",
    diffusers={
        "joint_transformer_blocks.0.attn.to_q": (3072, 3072),
        "joint_transformer_blocks.3.attn.add_k_proj": (3072, 3072),
        "joint_transformer_blocks.3.ff_context.linear_2": (8192, 3072),
        "single_transformer_blocks.31.attn.to_out.0": (3072, 3072),
        "single_transformer_blocks.0.ff.out_projection": (3072, 8192),
        "single_transformer_blocks.0.norm1.linear": (18432, 3072),
        "norm_out.linear": (6144, 3072),
    },
    comfys={
        "double_layers.0.attn.w2q": (3072, 3072),
        "double_layers.3.attn.w1k": (3072, 3072),
        "double_layers.3.mlpC.c_fc2": (8192, 3072),
        "single_layers.31.attn.w1o": (3072, 3072),
        "single_layers.0.mlp.c_proj": (3072, 8192),
        "single_layers.0.modCX.1": (18432, 3072),
        "modF.1": (6144, 3072),
    },
)
ERNIE = Base(
    "ernie_image",
    authors={
        "layers.0.self_attention.to_q": (4096, 4096),
        "layers.35.self_attention.to_out.0": (4096, 4096),
        "layers.35.mlp.gate_proj": (12288, 4096),
        "layers.7.mlp.linear_fc2": (4096, 12288),
        "text_proj": (4096, 3072),
        "adaLN_modulation.1": (24576, 4096),
        "final_linear": (128, 4096),
    },
)
HIDREAM = Base(
    "hidream",
    authors={
        "double_stream_blocks.0.block.attn1.to_q": (2560, 2560),
        "double_stream_blocks.15.block.attn1.to_out_t": (2560, 2560),
        "double_stream_blocks.15.block.adaLN_modulation.1": (30720, 2560),
        "double_stream_blocks.3.block.ff_t.w1": (6912, 2560),
        "single_stream_blocks.31.block.ff_i.experts.3.w2": (2560, 6912),
        "single_stream_blocks.31.block.ff_i.shared_experts.w3": (3584, 2560),
        "caption_projection.48.linear": (2560, 4096),
    },
)
IDEOGRAM = Base(
    "ideogram4",
    authors={
        "layers.0.attention.qkv": (13824, 4608),
        "layers.0.attention.o": (4608, 4608),
        "layers.33.feed_forward.w1": (12288, 4608),
        "layers.33.feed_forward.w2": (4608, 12288),
        "layers.5.adaln_modulation": (18432, 512),
    },
    around={
        "input_proj": (4608, 128),
        "llm_cond_proj": (4608, 53248),
        "t_embedding.mlp_in": (4608, 4608),
        "adaln_proj": (512, 4608),
        "final_layer.linear": (128, 4608),
    },
    diffusers={
        "layers.0.attention.to_q": (4608, 4608),
        "layers.33.attention.to_out.0": (4608, 4608),
        "layers.33.feed_forward.w3": (12288, 4608),
    },
)
KREA = Base(
    "krea2",
    authors={
        **{f"blocks.0.attn.{p}": (6144, 6144) for p in ("wq", "wo", "gate")},
        **{f"blocks.27.attn.{p}": (1536, 6144) for p in ("wk", "wv")},
        "blocks.27.mlp.gate": (16384, 6144),
        "blocks.27.mlp.down": (6144, 16384),
    },
    around={
        "first": (6144, 64),
        "last.linear": (64, 6144),
        "tmlp.0": (6144, 256),
        "tmlp.2": (6144, 6144),
        "tproj.1": (36864, 6144),
        "txtmlp.1": (6144, 2560),
        "txtmlp.3": (6144, 6144),
        "txtfusion.layerwise_blocks.1.attn.wk": (2560, 2560),
        "txtfusion.refiner_blocks.0.mlp.up": (6912, 2560),
    },
    diffusers={
        "transformer_blocks.0.attn.to_q": (6144, 6144),
        "transformer_blocks.27.attn.to_k": (1536, 6144),
        "transformer_blocks.27.attn.to_out.0": (6144, 6144),
        "transformer_blocks.3.ff.up": (16384, 6144),
        "text_fusion.layerwise_blocks.0.attn.to_gate": (2560, 2560),
    },
)
KREAS_PROJECTOR: Modules = {"txtfusion.projector": (1, 12)}
"""Of which `validate` tells that no rank above 1 is of use; trainers of all linear layers take it along."""


def lumina_block(stem: str, modulated: bool = True) -> Modules:
    """All that is trained of a block, by its authors' names."""
    own: Modules = {
        f"{stem}.attention.qkv": (3840, 2304),
        f"{stem}.attention.out": (2304, 2304),
        **{f"{stem}.feed_forward.w{n}": (9216, 2304) for n in (1, 3)},
        f"{stem}.feed_forward.w2": (2304, 9216),
    }
    return {**own, f"{stem}.adaLN_modulation.1": (9216, 1024)} if modulated else own


LUMINA = Base(
    "lumina2",
    authors={
        "layers.25.attention.qkv": (3840, 2304),
        "layers.25.attention.out": (2304, 2304),
        "context_refiner.1.feed_forward.w2": (2304, 9216),
        "noise_refiner.0.adaLN_modulation.1": (9216, 1024),
        "final_layer.adaLN_modulation.1": (2304, 1024),
        "cap_embedder.1": (2304, 2304),  # NewBie's has more inputs
    },
    diffusers={
        "layers.0.attn.to_q": (2304, 2304),
        "layers.0.attn.to_k": (768, 2304),
        "layers.25.attn.to_out.0": (2304, 2304),
        "noise_refiner.1.feed_forward.linear_1": (9216, 2304),
        "layers.3.norm1.linear": (9216, 1024),
    },
)
LUMINAS_BLOCKS: Modules = {
    **lumina_block("layers.0"),
    **lumina_block("noise_refiner.0"),
    **lumina_block("noise_refiner.1"),
    **lumina_block("context_refiner.0", modulated=False),
    **lumina_block("context_refiner.1", modulated=False),
}
GEMMA: Modules = {
    "layers.0.self_attn.q_proj": (2048, 2304),
    "layers.25.self_attn.v_proj": (1024, 2304),
    "layers.25.mlp.down_proj": (2304, 9216),
}
"""Lumina's text encoder."""
Z_IMAGE = Base(
    "z_image",
    authors={
        "layers.0.attention.qkv": (11520, 3840),
        "layers.0.attention.out": (3840, 3840),
        "context_refiner.1.feed_forward.w2": (3840, 10240),
    },
    diffusers={
        **{f"layers.0.attention.to_{p}": (3840, 3840) for p in ("q", "k", "v", "out.0")},
        "noise_refiner.1.feed_forward.w1": (10240, 3840),
        "layers.29.adaLN_modulation.0": (15360, 256),
    },
)


def flux2(width: int, double: int, single: int) -> Modules:
    """Modules of a Flux.2 by its authors' names."""
    return {
        "double_blocks.0.img_attn.proj": (width, width),
        f"double_blocks.{double - 1}.txt_mlp.0": (6 * width, width),
        f"double_blocks.{double - 1}.img_mlp.2": (width, 3 * width),
        "single_blocks.0.linear1": (9 * width, width),
        f"single_blocks.{single - 1}.linear2": (width, 4 * width),
    }


KLEIN_4B = Base(
    "flux2_klein_4b",
    flux2(3072, 5, 20),
    {
        "img_in": (3072, 128),
        "txt_in": (3072, 7680),
        "time_in.in_layer": (3072, 256),
        "time_in.out_layer": (3072, 3072),
        "double_stream_modulation_img.lin": (18432, 3072),
        "double_stream_modulation_txt.lin": (18432, 3072),
        "single_stream_modulation.lin": (9216, 3072),
        "final_layer.linear": (128, 3072),
    },
    {
        "transformer_blocks.0.attn.to_out.0": (3072, 3072),
        "transformer_blocks.4.ff_context.linear_in": (18432, 3072),
        "transformer_blocks.4.ff.linear_out": (3072, 9216),
        "single_transformer_blocks.0.attn.to_qkv_mlp_proj": (27648, 3072),
        "single_transformer_blocks.19.attn.to_out": (3072, 12288),
    },
)
KLEIN_9B = Base("flux2_klein_9b", flux2(4096, 8, 24))
FLUX_2_DEV = Base("flux2_dev", flux2(6144, 8, 48))
KLEINS_QKV: Modules = {f"double_blocks.1.{stream}_attn.qkv": (9216, 3072) for stream in ("img", "txt")}
FLUX_AND_CHROMA: Modules = {
    "double_blocks.0.img_attn.qkv": (9216, 3072),
    "double_blocks.18.txt_attn.proj": (3072, 3072),
    "double_blocks.18.img_mlp.0": (12288, 3072),
    "single_blocks.0.linear1": (21504, 3072),
    "single_blocks.37.linear2": (3072, 15360),
}
"""What Flux.1 and Chroma have alike."""
CHROMA = Base(
    "chroma",
    {
        **FLUX_AND_CHROMA,
        "img_in": (3072, 64),
        "distilled_guidance_layer.in_proj": (5120, 64),
        "distilled_guidance_layer.layers.4.in_layer": (5120, 5120),
        "distilled_guidance_layer.layers.4.out_layer": (5120, 5120),
        "distilled_guidance_layer.out_proj": (3072, 5120),
        "final_layer.linear": (64, 3072),
    },
)
COGVIEW4 = Base(
    "cogview4",
    diffusers={
        "transformer_blocks.0.attn1.to_q": (4096, 4096),
        "transformer_blocks.27.ff.net.2": (4096, 16384),
        "transformer_blocks.27.norm1.linear": (49152, 512),
        "time_condition_embed.condition_embedder.linear_1": (512, 1536),
    },
)
SANA = Base(
    "sana_1600m",
    diffusers={
        "transformer_blocks.0.attn1.to_q": (2240, 2240),
        "transformer_blocks.19.attn2.to_out.0": (2240, 2240),
        "caption_projection.linear_1": (2240, 2304),
    },
    others=("sana_1_5_1600m",),
)
SANA_600M = Base(
    "sana_600m",
    diffusers={
        "transformer_blocks.0.attn1.to_q": (1152, 1152),
        "transformer_blocks.27.attn2.to_k": (1152, 1152),
        "caption_projection.linear_1": (1152, 2304),
        "time_embed.linear": (6912, 1152),
    },
)
PIXART = Base(
    "pixart_alpha",
    authors={
        "blocks.0.attn.qkv": (3456, 1152),
        "blocks.27.cross_attn.kv_linear": (2304, 1152),
        "blocks.27.cross_attn.q_linear": (1152, 1152),
        "blocks.5.mlp.fc1": (4608, 1152),
        "csize_embedder.mlp.2": (384, 384),
        "final_layer.linear": (32, 1152),
    },
    diffusers={
        "transformer_blocks.0.attn1.to_k": (1152, 1152),
        "transformer_blocks.27.attn2.to_v": (1152, 1152),
        "transformer_blocks.27.attn2.to_q": (1152, 1152),
        "transformer_blocks.5.ff.net.0.proj": (4608, 1152),
        "adaln_single.emb.resolution_embedder.linear_2": (384, 384),
        "proj_out": (32, 1152),
    },
    rows={
        "transformer_blocks.0.attn1.to_k": ("blocks.0.attn.qkv", 1152, 2304),
        "transformer_blocks.27.attn2.to_v": ("blocks.27.cross_attn.kv_linear", 1152, 2304),
        "transformer_blocks.27.attn2.to_q": ("blocks.27.cross_attn.q_linear",),
        "transformer_blocks.5.ff.net.0.proj": ("blocks.5.mlp.fc1",),
        "adaln_single.emb.resolution_embedder.linear_2": ("csize_embedder.mlp.2",),
        "proj_out": ("final_layer.linear",),
    },
)
