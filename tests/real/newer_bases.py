"""Modules of Flux.3, Qwen-Image 2.1, MiniMax-H3, HunyuanDiT, Stable Cascade and ACE-Step 1.5, by two names each."""

from __future__ import annotations

from base_rows import Base

FLUX_3 = Base(
    "flux3_klein",
    authors={
        "content_mode_blocks.image.0.q_proj": (3072, 3072),
        "content_mode_blocks.image_cond.4.mlp_out": (3072, 9216),
        "txt_mode_blocks.4.attn_out": (3072, 3072),
        "single_blocks.0.k_proj": (3072, 3072),
        "single_blocks.27.mlp_in": (18432, 3072),
    },
    around={
        "emb_in.image_cond": (3072, 128),
        "txt_in": (3072, 20480),
        "time_in.in_layer": (3072, 256),
        "ref_time_in.out_layer": (3072, 3072),
        "early_stream_modulations.txt.lin": (9216, 3072),
        "final_layer.image.linear": (128, 3072),
    },
    diffusers={
        "mode_blocks.image.0.attn.to_q": (3072, 3072),
        "mode_blocks.image_cond.4.ff.linear_out": (3072, 9216),
        "txt_mode_blocks.4.attn.to_out.0": (3072, 3072),
        "single_transformer_blocks.27.ff.linear_in": (18432, 3072),
        "x_embedders.image": (3072, 128),
        "norm_out.linear": (6144, 3072),
    },
    few={"single_blocks.3.q_proj": (3072, 3072)},
    rows={
        "mode_blocks.image.0.attn.to_q": ("content_mode_blocks.image.0.q_proj",),
        "mode_blocks.image_cond.4.ff.linear_out": ("content_mode_blocks.image_cond.4.mlp_out",),
        "txt_mode_blocks.4.attn.to_out.0": ("txt_mode_blocks.4.attn_out",),
        "single_transformer_blocks.27.ff.linear_in": ("single_blocks.27.mlp_in",),
    },
)
QWEN_IMAGE_2_1 = Base(
    "qwen_image_2_1",
    authors={
        "transformer_blocks.0.attn.to_q": (4096, 4096),
        "transformer_blocks.31.attn.to_out.0": (4096, 4096),
        "transformer_blocks.31.img_mlp.gate_up": (24576, 4096),
        "transformer_blocks.5.img_mlp.out": (4096, 12288),
    },
    around={
        "img_in": (4096, 64),
        "txt_in.in_layer": (4096, 4096),
        "modulation.1": (16384, 4096),
        "norm_out.linear": (4096, 4096),
        "time_text_embed.timestep_embedder.linear_1": (4096, 256),
    },
    diffusers={
        "transformer_blocks.0.attn.to_q": (4096, 4096),
        "transformer_blocks.31.img_mlp.gate_layer": (12288, 4096),
        "transformer_blocks.5.img_mlp.proj": (12288, 4096),
        "transformer_blocks.5.img_mlp.out": (4096, 12288),
        "proj_out": (64, 4096),
    },
    few={"transformer_blocks.3.img_mlp.out": (4096, 12288)},
    rows={
        "transformer_blocks.0.attn.to_q": ("transformer_blocks.0.attn.to_q",),
        "transformer_blocks.31.img_mlp.gate_layer": ("transformer_blocks.31.img_mlp.gate_up", 0, 12288),
        "transformer_blocks.5.img_mlp.proj": ("transformer_blocks.5.img_mlp.gate_up", 12288, 24576),
    },
)
MINIMAX_H3 = Base(
    "minimax_h3",
    authors={
        "blocks.0.attn.qkv_proj": (21504, 5376),
        "blocks.49.attn.out_proj": (5376, 7168),
        "blocks.49.mlp.fc2": (5376, 14336),
        "blocks.7.adaln_proj.linear": (96768, 2688),
        "token_refiner.blocks.1.attn.out_proj": (5376, 7168),
    },
    around={
        "video_patch_proj": (5376, 96),
        "audio_patch_proj": (5376, 32),
        "condition_proj": (5376, 5120),
        "time_embedder.proj_out": (2688, 5376),
        "final_layer.adaln_proj.linear": (10752, 2688),
        "final_layer.audio_out": (32, 5376),
    },
    diffusers={
        "transformer_blocks.0.attn.to_k": (7168, 5376),
        "transformer_blocks.49.attn.to_out.0": (5376, 7168),
        "transformer_blocks.49.ff.net.2": (5376, 14336),
        "token_refiner.refiner_blocks.1.attn.to_v": (7168, 5376),
        "audio_proj_in": (5376, 32),
    },
    few={"blocks.2.mlp.fc1": (28672, 5376)},
    rows={
        "transformer_blocks.0.attn.to_k": ("blocks.0.attn.qkv_proj", 7168, 14336),
        "transformer_blocks.49.attn.to_out.0": ("blocks.49.attn.out_proj",),
        "token_refiner.refiner_blocks.1.attn.to_v": ("token_refiner.blocks.1.attn.qkv_proj", 14336, 21504),
    },
)
HUNYUAN_DIT = Base(
    "hunyuan_dit",
    authors={
        "blocks.0.attn1.Wqkv": (4224, 1408),
        "blocks.39.attn2.q_proj": (1408, 1408),
        "blocks.39.attn2.kv_proj": (2816, 1024),
        "blocks.20.attn1.out_proj": (1408, 1408),
        "blocks.5.mlp.fc1": (6144, 1408),
        "blocks.5.default_modulation.1": (1408, 1408),
        "blocks.21.skip_linear": (1408, 2816),
    },
    around={
        "mlp_t5.0": (8192, 2048),
        "t_embedder.mlp.0": (1408, 256),
        "extra_embedder.2": (1408, 5632),
        "pooler.c_proj": (1024, 2048),
        "final_layer.linear": (32, 1408),
    },
    diffusers={
        "blocks.0.attn1.to_v": (1408, 1408),
        "blocks.39.attn2.to_k": (1408, 1024),
        "blocks.39.attn2.to_out.0": (1408, 1408),
        "blocks.5.ff.net.2": (1408, 6144),
        "time_extra_emb.pooler.q_proj": (2048, 2048),
    },
    few={"blocks.2.attn1.Wqkv": (4224, 1408)},
    rows={
        "blocks.0.attn1.to_v": ("blocks.0.attn1.Wqkv", 2816, 4224),
        "blocks.39.attn2.to_k": ("blocks.39.attn2.kv_proj", 0, 1408),
        "blocks.39.attn2.to_out.0": ("blocks.39.attn2.out_proj",),
        "blocks.5.ff.net.2": ("blocks.5.mlp.fc2",),
    },
)
STABLE_CASCADE = Base(
    "stable_cascade",
    authors={
        "down_blocks.0.2.attention.attn.to_q": (2048, 2048),
        "down_blocks.1.71.attention.attn.out_proj": (2048, 2048),
        "up_blocks.0.2.attention.attn.to_k": (2048, 2048),
        "up_blocks.1.0.channelwise.0": (8192, 4096),
        "up_blocks.1.1.mapper_crp": (4096, 64),
        "up_blocks.1.23.kv_mapper.1": (2048, 2048),
    },
    around={"clip_txt_mapper": (2048, 1280), "clip_img_mapper": (8192, 768)},
    diffusers={
        "down_blocks.0.2.attention.to_q": (2048, 2048),
        "down_blocks.1.71.attention.to_out.0": (2048, 2048),
        "up_blocks.1.3.channelwise.4": (2048, 8192),
    },
    few={"down_blocks.1.5.attention.attn.to_q": (2048, 2048)},
    rows={
        "down_blocks.0.2.attention.to_q": ("down_blocks.0.2.attention.attn.to_q",),
        "down_blocks.1.71.attention.to_out.0": ("down_blocks.1.71.attention.attn.out_proj",),
    },
)
ACE_STEP = Base(
    "ace_step_1_5",
    authors={
        "layers.0.self_attn.q_proj": (2048, 2048),
        "layers.23.cross_attn.k_proj": (1024, 2048),
        "layers.23.cross_attn.o_proj": (2048, 2048),
        "layers.5.mlp.gate_proj": (6144, 2048),
    },
    around={"time_embed_r.time_proj": (12288, 2048), "condition_embedder": (2048, 2048)},
    diffusers={
        "layers.0.self_attn.to_q": (2048, 2048),
        "layers.23.cross_attn.to_k": (1024, 2048),
        "layers.5.mlp.down_proj": (2048, 6144),
        "time_embed.linear_1": (2048, 256),
    },
    few={"layers.2.cross_attn.v_proj": (1024, 2048)},
    rows={
        "layers.0.self_attn.to_q": ("layers.0.self_attn.q_proj",),
        "layers.23.cross_attn.to_k": ("layers.23.cross_attn.k_proj",),
    },
)
ACE_STEP_XL = Base(
    "ace_step_1_5_xl",
    authors={
        "layers.0.self_attn.q_proj": (4096, 2560),
        "layers.31.cross_attn.v_proj": (1024, 2560),
        "layers.31.mlp.down_proj": (2560, 9728),
    },
    around={"condition_embedder": (2560, 2048)},
    diffusers={"layers.0.self_attn.to_q": (4096, 2560), "layers.31.cross_attn.to_out.0": (2560, 4096)},
    few={"layers.2.self_attn.o_proj": (2560, 4096)},
    rows={"layers.0.self_attn.to_q": ("layers.0.self_attn.q_proj",)},
)
