"""What diffusers makes of whole spellings, and of the modules that its converters treat otherwise than the rest.

The tables of `diffusers_reads` say which; the tests try them on diffusers 0.42.1.
"""

from __future__ import annotations

from adapterops.validation.rules.diffusers_meets import (
    after_todays,
    ignored_alphas,
    incomplete,
    loaderless,
    of_modules,
    other_components,
    pairs_behind_a_component,
    signless,
    unread,
)
from adapterops.validation.rules.loader_facts import Effect, Fact, fact

_LORA = "loaders/lora_pipeline.py"
_CONVERSION = "loaders/lora_conversion_utils.py"

FACTS: tuple[Fact, ...] = (
    fact(
        "L509",
        "diffusers",
        "no-loader",
        Effect.DROPS,
        loaderless,
        "diffusers' pipelines of this base have no load_lora_weights, so that none of the {n tensor} ({keys}) is loaded",
        why="The pipelines of PixArt, HunyuanVideo 1.5, HunyuanImage, HunyuanDiT and Stable Cascade have no loader of LoRAs; nor "
        "have the classes of PixArt's, HunyuanDiT's and Stable Cascade's models.",
        remedy="Run adapterops convert FILE --to peft, and load the folder into the transformer with peft's PeftModel.",
        fires="transformer.transformer_blocks.0.attn2.to_q.lora_A.weight (PixArt)",
        passes="transformer.transformer_blocks.0.attn2.to_q.lora_A.weight (Sana)",
        source="diffusers 0.42 pipelines/pixart_alpha/pipeline_pixart_sigma.py (PixArtSigmaPipeline), "
        "models/transformers/pixart_transformer_2d.py",
    ),
    fact(
        "L580",
        "diffusers",
        "authors-names",
        Effect.DROPS,
        unread("onetrainer-original", "original-down", "bfl", "bfl-peft", "xlabs", "genmo"),
        "of this base diffusers has no converter for the authors' names without diffusion_model. before them: it leaves out all "
        "{n tensor} ({keys}), or fails on them",
        why="Bare names of the authors' own code diffusers reads of few bases only, and loads nothing of the rest.",
        remedy="Run adapterops convert FILE --to diffusers.",
        fires="double_blocks.0.img_attn.proj.lora_A.weight and ….alpha (OneTrainer's ORIGINAL)",
        passes="base_model.model.double_blocks.0.img_attn.proj.lora_A.weight (Flux.2, fal)",
        source=f"diffusers 0.42 {_LORA} (lora_state_dict)",
    ),
    fact(
        "L581",
        "diffusers",
        "lost-modules",
        Effect.DROPS,
        of_modules("loses", "flux"),
        "diffusers' converter has no place for {n tensor} ({keys}) and leaves them out, at most with a log line",
        why="The converters of some bases know the blocks only, or rename too little outside them, and the rest reaches no "
        "module.",
        remedy="Run adapterops convert FILE --to diffusers.",
        fires="lora_unet_double_stream_modulation_img_lin.lora_down.weight (Flux.2), "
        "diffusion_model.adaln_single.linear.lora_A.weight (LTX-Video)",
        passes="lora_unet_double_blocks_0_img_attn_proj.lora_down.weight (Flux.2)",
        source=f"diffusers 0.42 {_CONVERSION} (_convert_kohya_flux2_lora_to_diffusers, "
        "_convert_non_diffusers_ltxv_lora_to_diffusers, _convert_non_diffusers_z_image_lora_to_diffusers)",
    ),
    fact(
        "L582",
        "diffusers",
        "turned-rows",
        Effect.MISREADS,
        of_modules("turns"),
        "diffusers' converter puts the rows of {n tensor} ({keys}) where they do not belong, or fails on them",
        why="The last modulation's rows are shift and scale in the authors' code, scale and shift in diffusers'. Its converter "
        "of Flux.2 leaves them as they are; those of HunyuanVideo and of BFL's control adapters turn the shared factor round, "
        "too. HunyuanVideo's refiner loses two thirds of the factor that its queries, keys and values share.",
        remedy="Run adapterops convert FILE --to diffusers, which turns the one factor that has these rows.",
        fires="diffusion_model.final_layer.adaLN_modulation.1.lora_A.weight (Flux.2, HunyuanVideo)",
        passes="transformer.norm_out.linear.lora_A.weight",
        source=f"diffusers 0.42 {_CONVERSION} (_convert_non_diffusers_flux2_lora_to_diffusers, "
        "_convert_hunyuan_video_lora_to_diffusers, _convert_bfl_flux_control_lora_to_diffusers); the checkpoints' own: "
        "scripts/convert_flux2_to_diffusers.py, convert_hunyuan_video_to_diffusers.py (swap_scale_shift)",
    ),
    fact(
        "L583",
        "diffusers",
        "refused-modules",
        Effect.REFUSES,
        of_modules("refuses"),
        "diffusers' converter has no place for {n tensor} ({keys}) and refuses the whole file with an error",
        why="The converters of some bases insist that nothing is left over, and do not know every module.",
        remedy="Run adapterops convert FILE --to diffusers.",
        fires="diffusion_model.patch_embedding.lora_A.weight (Wan), lora_unet_distilled_guidance_layer_in_proj.lora_down.weight "
        "(Chroma)",
        passes="diffusion_model.blocks.0.self_attn.q.lora_A.weight (Wan)",
        source=f"diffusers 0.42 {_CONVERSION} (_convert_non_diffusers_wan_lora_to_diffusers, "
        "_convert_kohya_flux_lora_to_diffusers)",
    ),
    fact(
        "L584",
        "diffusers",
        "whole-blocks",
        Effect.REFUSES,
        incomplete,
        "diffusers' converter of this spelling insists on every module of every block from the first on, and fails with a "
        "KeyError on a file that lacks one ({n tensor}, {keys})",
        why="musubi-tuner's Wan and fal's Flux.1 diffusers reads only where all modules of the blocks were trained; an adapter "
        "of the attention alone, or of later blocks, fails.",
        remedy="Run adapterops convert FILE --to diffusers.",
        fires="lora_unet_blocks_0_self_attn_q.lora_down.weight without …_ffn_0 (Wan)",
        passes="all of lora_unet_blocks_0_self_attn_*, …_cross_attn_*, …_ffn_0 and …_ffn_2 (Wan)",
        source=f"diffusers 0.42 {_CONVERSION} (_convert_musubi_wan_lora_to_diffusers, _convert_fal_kontext_lora_to_diffusers, "
        "_convert_bfl_flux_control_lora_to_diffusers)",
    ),
    fact(
        "L585",
        "diffusers",
        "lora-down-behind-component",
        Effect.REFUSES,
        pairs_behind_a_component,
        "diffusers knows no lora_down and lora_up behind a component's name ({keys}): an IndexError, or the alphas are refused",
        why="Behind unet. or transformer. diffusers looks for lora_A and lora_B, or the older .lora.down.",
        remedy="Run adapterops convert FILE --to diffusers.",
        fires="transformer.transformer_blocks.0.attn.to_q.lora_down.weight",
        passes="transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
        source="diffusers 0.42 loaders/peft.py (load_lora_adapter), utils/state_dict_utils.py (convert_unet_state_dict_to_peft)",
    ),
    fact(
        "L586",
        "diffusers",
        "ignored-alphas",
        Effect.MISREADS,
        ignored_alphas,
        "diffusers does not look at the alphas of this spelling and applies {n module} ({keys}) with scale 1",
        why="Of lora_down behind transformer. the loader of Flux.1 takes the factors and drops the alphas; of a PEFT folder "
        "that of Flux.2 reads no config.",
        remedy="Run adapterops convert FILE --to diffusers, which says the scale in the header.",
        fires="transformer.transformer_blocks.0.attn.to_q.alpha = 2 beside lora_down of rank 4 (Flux.1)",
        passes="transformer.transformer_blocks.0.attn.to_q.alpha = 2 beside lora_A of rank 4 (Flux.1)",
        source=f"diffusers 0.42 {_CONVERSION} (_convert_kohya_flux_lora_to_diffusers, has_peft_state_dict)",
    ),
    fact(
        "L587",
        "diffusers",
        "sign-missing",
        Effect.DROPS,
        signless,
        "diffusers knows this spelling by a key that is not among these {n tensor} ({keys}), and leaves all out or fails",
        why="The converters are chosen by one sign: an alpha tensor or .default. (Qwen-Image, Z-Image), img_attn_qkv "
        "(HunyuanVideo), a block (Wan), a norm's scale (BFL's control adapters). A file without it is not converted.",
        remedy="Run adapterops convert FILE --to diffusers.",
        fires="transformer.single_blocks.0.linear2.lora_A.weight without any img_attn_qkv (HunyuanVideo)",
        passes="transformer.single_blocks.0.linear2.lora_A.weight beside ….img_attn_qkv.lora_A.weight (HunyuanVideo)",
        source=f"diffusers 0.42 {_LORA} (lora_state_dict)",
    ),
    fact(
        "L588",
        "diffusers",
        "components",
        Effect.DROPS,
        other_components,
        "the loader of this pipeline gives adapters to other components only, and leaves out {n tensor} ({keys}), or fails on "
        "them",
        why="Each pipeline's loader names the components that it loads: the transformer alone for most newer bases. The T5 of "
        "Chroma it takes for CLIP and fails.",
        remedy="Tell readers that this part is for ComfyUI, or load it with adapterops.integrations.diffusers.",
        fires="text_encoder_3.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight (Stable Diffusion 3)",
        passes="text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight (Stable Diffusion 3)",
        source=f"diffusers 0.42 {_LORA} (_lora_loadable_modules)",
    ),
    fact(
        "L589",
        "diffusers",
        "mixed-spellings",
        Effect.DROPS,
        after_todays,
        "the first key of the file decides how diffusers reads all: behind lora_A it leaves out {n tensor} spelled .lora.down "
        "and .lora.up ({keys})",
        why="A file of diffusers' training scripts may hold both spellings; diffusers turns the older into today's only where a "
        "key of the older stands first.",
        remedy="Run adapterops convert FILE --to diffusers.",
        fires="unet.down_blocks.0.attentions.0.proj_in.lora_A.weight before ….attn1.to_q.lora.down.weight",
        passes="….attn1.to_q.lora.down.weight first",
        source="diffusers 0.42 loaders/peft.py (load_lora_adapter, first_key)",
    ),
)
