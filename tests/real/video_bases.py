"""Modules of base models that make videos, and of their kin, with their shapes: by the authors', diffusers' and Comfy's names."""

from __future__ import annotations

from base_rows import Base
from trainers import Modules, Shape

LTX_2_AND_3: Modules = {
    "transformer_blocks.0.attn1.to_q": (4096, 4096),
    "transformer_blocks.47.ff.net.2": (4096, 16384),
    "transformer_blocks.47.audio_to_video_attn.to_q": (2048, 4096),
    "transformer_blocks.0.audio_attn2.to_out.0": (2048, 2048),
}
"""What LTX-2 and 2.3 have alike."""
LTX_2_3 = Base(
    "ltx_2_3",
    authors={
        **LTX_2_AND_3,
        "transformer_blocks.0.attn1.to_gate_logits": (32, 4096),
        "transformer_blocks.1.audio_attn2.to_gate_logits": (32, 2048),
        "transformer_blocks.47.video_to_audio_attn.to_gate_logits": (32, 2048),
    },
    around={
        "patchify_proj": (4096, 128),
        "adaln_single.linear": (36864, 4096),
        "audio_adaln_single.linear": (18432, 2048),
        "prompt_adaln_single.linear": (8192, 4096),
        "audio_prompt_adaln_single.emb.timestep_embedder.linear_1": (2048, 256),
        "av_ca_v2a_gate_adaln_single.linear": (2048, 2048),
    },
)
LTX_2 = Base(
    "ltx_2",
    authors={
        "transformer_blocks.0.attn1.to_q": (4096, 4096),
        "transformer_blocks.47.ff.net.2": (4096, 16384),
        "transformer_blocks.0.audio_attn2.to_out.0": (2048, 2048),
        "transformer_blocks.47.audio_to_video_attn.to_q": (2048, 4096),
        "transformer_blocks.47.video_to_audio_attn.to_k": (2048, 4096),
        "transformer_blocks.1.audio_ff.net.0.proj": (8192, 2048),
        "audio_caption_projection.linear_1": (2048, 3840),
    },
    around={
        "patchify_proj": (4096, 128),
        "audio_patchify_proj": (2048, 128),
        "adaln_single.linear": (24576, 4096),
        "audio_adaln_single.emb.timestep_embedder.linear_1": (2048, 256),
        "av_ca_a2v_gate_adaln_single.linear": (4096, 4096),
        "av_ca_audio_scale_shift_adaln_single.linear": (8192, 2048),
    },
)


def ltx(width: int, last: int, context: int) -> Modules:
    """Modules of an LTX-Video that its authors and diffusers call alike."""
    return {
        "transformer_blocks.0.attn1.to_q": (width, width),
        "transformer_blocks.0.attn1.to_out.0": (width, width),
        f"transformer_blocks.{last}.attn2.to_k": (width, context),
        f"transformer_blocks.{last}.ff.net.0.proj": (4 * width, width),
        f"transformer_blocks.{last}.ff.net.2": (width, 4 * width),
        "caption_projection.linear_1": (width, 4096),
        "proj_out": (128, width),
    }


LTX_2B = Base(
    "ltx_2b", ltx(2048, 27, 2048), around={"patchify_proj": (2048, 128), "adaln_single.linear": (12288, 2048)}
)
LTX_13B = Base("ltx_13b", ltx(4096, 47, 4096))


def hunyuan_double(block: int) -> Modules:
    """A double block of HunyuanVideo by its authors' names."""
    out = {}
    for stream in ("img", "txt"):
        stem = f"double_blocks.{block}.{stream}_"
        out |= {f"{stem}attn_qkv": (9216, 3072), f"{stem}attn_proj": (3072, 3072), f"{stem}mod.linear": (18432, 3072)}
        out |= {f"{stem}mlp.fc1": (12288, 3072), f"{stem}mlp.fc2": (3072, 12288)}
    return out


def hunyuan_single(block: int) -> Modules:
    """A single block of it."""
    stem = f"single_blocks.{block}."
    return {f"{stem}linear1": (21504, 3072), f"{stem}linear2": (3072, 15360), f"{stem}modulation.linear": (9216, 3072)}


HUNYUANS_BLOCKS: Modules = {**hunyuan_double(19), **hunyuan_single(39)}
HUNYUAN = Base(
    "hunyuan_video",
    authors={
        "double_blocks.19.img_attn_qkv": (9216, 3072),
        "double_blocks.19.txt_mlp.fc1": (12288, 3072),
        "single_blocks.39.linear1": (21504, 3072),
        "single_blocks.0.linear2": (3072, 15360),
    },
    around={
        "txt_in.individual_token_refiner.blocks.0.self_attn_proj": (3072, 3072),
        "txt_in.individual_token_refiner.blocks.1.mlp.fc1": (12288, 3072),
        "txt_in.individual_token_refiner.blocks.1.adaLN_modulation.1": (6144, 3072),
        "txt_in.t_embedder.mlp.0": (3072, 256),
        "txt_in.c_embedder.linear_2": (3072, 3072),
        "txt_in.input_embedder": (3072, 4096),
        "time_in.mlp.2": (3072, 3072),
        "guidance_in.mlp.0": (3072, 256),
        "vector_in.in_layer": (3072, 768),
        "final_layer.linear": (64, 3072),
    },
    diffusers={
        "transformer_blocks.19.attn.to_q": (3072, 3072),
        "transformer_blocks.19.attn.add_k_proj": (3072, 3072),
        "transformer_blocks.0.ff.net.0.proj": (12288, 3072),
        "single_transformer_blocks.39.attn.to_v": (3072, 3072),
        "single_transformer_blocks.39.proj_mlp": (12288, 3072),
    },
    comfys={
        "double_blocks.19.img_attn.qkv": (9216, 3072),
        "double_blocks.19.txt_attn.proj": (3072, 3072),
        "double_blocks.0.img_mlp.0": (12288, 3072),
        "double_blocks.0.txt_mlp.2": (3072, 12288),
        "double_blocks.18.img_mod.lin": (18432, 3072),
        "single_blocks.38.modulation.lin": (9216, 3072),
        "single_blocks.0.linear1": (21504, 3072),
        "txt_in.individual_token_refiner.blocks.1.self_attn.qkv": (9216, 3072),
        "txt_in.individual_token_refiner.blocks.1.mlp.0": (12288, 3072),
        "txt_in.c_embedder.out_layer": (3072, 3072),
        "time_in.in_layer": (3072, 256),
        "vector_in.in_layer": (3072, 768),
        "final_layer.linear": (64, 3072),
    },
)
"""Comfy's names: Comfy-Org/ComfyUI `comfy/ldm/hunyuan_video/model.py`, `comfy/ldm/flux/layers.py`."""


def hunyuan_stream(block: int, width: int, apart: bool, side: str = "img") -> dict[str, Shape]:
    """One stream of a double block by the authors' names, with q, k and v apart or in one."""
    stem = f"double_blocks.{block}.{side}_"
    inputs = {f"{stem}attn_{p}": (width, width) for p in "qkv"} if apart else {f"{stem}attn_qkv": (3 * width, width)}
    ends = {f"{stem}attn_proj": (width, width), f"{stem}mod.linear": (6 * width, width)}
    return inputs | ends | {f"{stem}mlp.fc1": (4 * width, width), f"{stem}mlp.fc2": (width, 4 * width)}


def hunyuan_1_5(block: int) -> Modules:
    """Modules of HunyuanVideo 1.5, which kohya-ss/musubi-tuner trains (`networks/lora_hv_1_5.py`)."""
    return hunyuan_stream(block, 2048, apart=True) | {
        f"double_blocks.{block}.txt_attn_{p}": (2048, 2048) for p in "qkv"
    }


def hunyuan_image(block: int) -> Modules:
    """Modules of HunyuanImage 2.1, which kohya-ss/sd-scripts trains (`networks/lora_hunyuan_image.py`)."""
    single = f"single_blocks.{block}."
    own = {
        f"{single}linear1": (25088, 3584),
        f"{single}linear2": (3584, 17920),
        f"{single}modulation.linear": (10752, 3584),
    }
    return hunyuan_stream(block, 3584, apart=False, side="txt") | own


def kandinsky(width: int, hidden: int, last: int) -> Modules:
    """Modules of a Kandinsky 5, which kohya-ss/musubi-tuner trains (`networks/lora_kandinsky.py`)."""
    stem = f"visual_transformer_blocks.{last}."
    names = [f"{stem}{a}_attention.{p}" for a in ("self", "cross") for p in ("to_query", "to_value", "out_layer")]
    names.append("text_transformer_blocks.0.self_attention.to_key")
    feed = {f"{stem}feed_forward.in_layer": (hidden, width), f"{stem}feed_forward.out_layer": (width, hidden)}
    return dict.fromkeys(names, (width, width)) | feed


HUNYUAN_1_5 = Base(
    "hunyuan_video_1_5",
    authors=hunyuan_1_5(53),
    diffusers={
        **{f"transformer_blocks.53.attn.to_{p}": (2048, 2048) for p in ("q", "k", "v", "out.0")},
        "transformer_blocks.0.attn.add_k_proj": (2048, 2048),
        "transformer_blocks.0.ff.net.0.proj": (8192, 2048),
        "context_embedder_2.linear_3": (2048, 2048),
    },
    comfys={
        "double_blocks.53.img_attn.qkv": (6144, 2048),
        "double_blocks.0.txt_attn.proj": (2048, 2048),
        "double_blocks.0.img_mlp.0": (8192, 2048),
        "double_blocks.0.txt_mod.lin": (12288, 2048),
        "txt_in.individual_token_refiner.blocks.1.self_attn.qkv": (6144, 2048),
        "byt5_in.fc2": (2048, 2048),
        "vision_in.proj.1": (1152, 1152),
    },
    few={"double_blocks.0.img_attn_q": (2048, 2048)},
)
HUNYUAN_IMAGE = Base(
    "hunyuan_image",
    authors=hunyuan_image(19),
    diffusers={
        **{f"transformer_blocks.19.attn.to_{p}": (3584, 3584) for p in ("q", "k", "v", "out.0")},
        "single_transformer_blocks.39.proj_mlp": (14336, 3584),
        "transformer_blocks.0.ff_context.net.2": (3584, 14336),
    },
    comfys={
        "double_blocks.0.img_attn.qkv": (10752, 3584),
        "double_blocks.0.txt_mlp.2": (3584, 14336),
        "single_blocks.39.modulation.lin": (10752, 3584),
        "single_blocks.0.linear1": (25088, 3584),
        "byt5_in.fc3": (3584, 2048),
    },
    few={"double_blocks.0.img_attn_qkv": (10752, 3584)},
)
"""Comfy's names, which tdrussell/diffusion-pipe trains for HunyuanVideo 1.5: Comfy-Org/ComfyUI
`comfy/ldm/hunyuan_video/model.py`."""
KANDINSKY_LITE = Base(
    "kandinsky5_lite",
    authors=kandinsky(1792, 7168, 31),
    few={"visual_transformer_blocks.0.self_attention.to_query": (1792, 1792)},
)
KANDINSKY_IMAGE = Base(
    "kandinsky5_image",
    authors=kandinsky(2560, 10240, 49),
    few={"visual_transformer_blocks.0.cross_attention.to_key": (2560, 2560)},
)
KANDINSKY_PRO = Base(
    "kandinsky5_pro",
    authors=kandinsky(4096, 16384, 59),
    few={"text_transformer_blocks.0.feed_forward.in_layer": (16384, 4096)},
)
HUNYUANS_AND_KANDINSKYS = (HUNYUAN_1_5, HUNYUAN_IMAGE, KANDINSKY_LITE, KANDINSKY_IMAGE, KANDINSKY_PRO)


def wan(width: int, hidden: int, last: int, image: bool = False) -> Modules:
    """Modules of a Wan by its authors' names."""
    own = {f"blocks.0.self_attn.{p}": (width, width) for p in ("q", "o")}
    own |= {"blocks.1.cross_attn.k_img": (width, width)} if image else {}
    return own | {f"blocks.{last}.ffn.0": (hidden, width), f"blocks.{last}.ffn.2": (width, hidden)}


WAN_1_3B = Base(
    "wan_1_3b",
    wan(1536, 8960, 29),
    diffusers={
        "blocks.0.attn1.to_q": (1536, 1536),
        "blocks.0.attn1.to_out.0": (1536, 1536),
        "blocks.29.ffn.net.0.proj": (8960, 1536),
        "blocks.29.ffn.net.2": (1536, 8960),
    },
    others=("wan_1_3b_i2v", "wan_vace_1_3b"),
)
WAN_14B = Base(
    "wan_14b", wan(5120, 13824, 39), others=("wan_14b_i2v", "wan_14b_flf2v", "wan_vace_14b", "wan_animate_14b")
)
WAN_14B_I2V = Base("wan_14b_i2v", wan(5120, 13824, 39, image=True), others=("wan_14b_flf2v", "wan_animate_14b"))
WAN_5B = Base("wan_5b", wan(3072, 14336, 29))
WANS_BLOCK: Modules = {
    **{f"blocks.0.{a}.{p}": (1536, 1536) for a in ("self_attn", "cross_attn") for p in "qkvo"},
    "blocks.0.ffn.0": (8960, 1536),
    "blocks.0.ffn.2": (1536, 8960),
}
"""All that the converter of diffusers insists on."""
AROUND_WAN: Modules = {
    "time_embedding.0": (1536, 256),
    "time_embedding.2": (1536, 1536),
    "text_embedding.0": (1536, 4096),
    "text_embedding.2": (1536, 1536),
    "time_projection.1": (9216, 1536),
    "head.head": (64, 1536),
}
COGVIDEOX_2B = Base(
    "cogvideox_2b",
    authors={
        "blocks.0.q": (1920, 1920),
        "blocks.29.attn_out": (1920, 1920),
        "blocks.29.ff_proj": (7680, 1920),
        "blocks.3.norm1.linear": (11520, 512),
        "time_embedding_linear_1": (512, 1920),
    },
    diffusers={
        "transformer_blocks.0.attn1.to_q": (1920, 1920),
        "transformer_blocks.29.attn1.to_out.0": (1920, 1920),
        "transformer_blocks.29.ff.net.0.proj": (7680, 1920),
        "transformer_blocks.3.norm1.linear": (11520, 512),
        "time_embedding.linear_1": (512, 1920),
    },
    rows={
        "transformer_blocks.0.attn1.to_q": ("blocks.0.q",),
        "transformer_blocks.29.attn1.to_out.0": ("blocks.29.attn_out",),
        "transformer_blocks.29.ff.net.0.proj": ("blocks.29.ff_proj",),
        "transformer_blocks.3.norm1.linear": ("blocks.3.norm1.linear",),
        "time_embedding.linear_1": ("time_embedding_linear_1",),
    },
)
COGVIDEOX_1_5_I2V = Base(
    "cogvideox_1_5_5b_i2v",
    authors={
        "blocks.41.ff_out": (3072, 12288),
        "ofs_embedding_linear_2": (512, 512),
        "patch_embed.proj": (3072, 256),
    },
    diffusers={
        "transformer_blocks.41.ff.net.2": (3072, 12288),
        "ofs_embedding.linear_2": (512, 512),
        "patch_embed.proj": (3072, 256),
    },
    rows={
        "transformer_blocks.41.ff.net.2": ("blocks.41.ff_out",),
        "ofs_embedding.linear_2": ("ofs_embedding_linear_2",),
        "patch_embed.proj": ("patch_embed.proj",),
    },
)
MOCHI = Base(
    "mochi",
    authors={
        "blocks.0.attn.qkv_x": (9216, 3072),
        "blocks.47.attn.qkv_y": (9216, 1536),
        "blocks.46.attn.proj_y": (1536, 3072),
        "blocks.47.mlp_x.w2": (3072, 8192),
        "blocks.0.mlp_y.w1": (8192, 1536),
        "blocks.47.mod_y": (1536, 3072),
        "final_layer.mod": (6144, 3072),
    },
    diffusers={
        "transformer_blocks.0.attn1.to_k": (3072, 3072),
        "transformer_blocks.47.attn1.add_v_proj": (3072, 1536),
        "transformer_blocks.46.attn1.to_add_out": (1536, 3072),
        "transformer_blocks.47.ff.net.2": (3072, 8192),
        "transformer_blocks.0.ff_context.net.0.proj": (8192, 1536),
        "transformer_blocks.47.norm1_context.linear_1": (1536, 3072),
        "norm_out.linear": (6144, 3072),
    },
    rows={
        "transformer_blocks.0.attn1.to_k": ("blocks.0.attn.qkv_x", 3072, 6144),
        "transformer_blocks.47.attn1.add_v_proj": ("blocks.47.attn.qkv_y", 6144, 9216),
        "transformer_blocks.46.attn1.to_add_out": ("blocks.46.attn.proj_y",),
        "transformer_blocks.47.ff.net.2": ("blocks.47.mlp_x.w2",),
        "transformer_blocks.47.norm1_context.linear_1": ("blocks.47.mod_y",),
    },
)
