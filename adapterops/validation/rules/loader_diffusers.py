"""What diffusers makes of adapters.  Every row has been tried with diffusers 0.42.1."""

from __future__ import annotations

import re
from collections import Counter

from adapterops.adapter import Certainty, Update
from adapterops.validation.rules import diffusers_facts
from adapterops.validation.rules.diffusers_meets import (
    differences,
    flux_t5,
    refused_alphas,
    unread,
)
from adapterops.validation.rules.diffusers_reads import LOKR, base_names, row
from adapterops.validation.rules.loader_facts import (
    Effect,
    Fact,
    architecture,
    fact,
    first_key,
    in_files,
    of_role,
    spelled,
)
from adapterops.validation.subject import Subject

_SD = ("sd1", "sd2", "sdxl")
_LORA = "loaders/lora_pipeline.py"
_CONVERSION = "loaders/lora_conversion_utils.py"
_EMBEDDERS = re.compile(r"(lora_unet_|diffusion_model\.)(img_in|txt_in|time_in|guidance_in|vector_in|final_layer)[._]")
_ANIMA = re.compile(r"lora_unet_(llm_adapter_)?blocks_\d+_(self|cross)_attn_(q|k|v|o|output)_proj\.")
_ONETRAINER_ATTENTION = re.compile(r"_attn_(to_[qkv]|to_out_0|to_add_out|add_[qkv]_proj)$")
_ATTENTION = re.compile(r"\.(to_[qkv]|to_out\.0)$")


def _anima(subject: Subject) -> list[str]:
    """Kohya's keys of Anima in a file that is not known to be of it, which L510 tells of."""
    return [] if "anima" in base_names(subject) else [key for key in subject.tensors if _ANIMA.match(key)]


def _flux_embedders(subject: Subject) -> list[str]:
    if architecture(subject) != "flux" or subject.dialect not in ("kohya", "comfy-down"):
        return []
    return [key for key in subject.tensors if _EMBEDDERS.match(key)]


def _encoder_attention(subject: Subject) -> list[str]:
    """The attention's tensors of text encoders that lack what diffusers knows their spelling by: an out_proj."""
    if architecture(subject) not in (*_SD, "flux") or subject.dialect not in ("kohya", "kohya-diffusers", "comfy-down"):
        return []
    lost: list[str] = []
    for component in ("text_encoder", "text_encoder_2"):
        own = [
            u for u in subject.updates if u.component == component and u.method == "lora" and ".self_attn." in u.module
        ]
        if own and not any(u.module.endswith(".out_proj") for u in own):
            lost += [t.key for u in own for t in u.tensors.values()]
    return lost


def _onetrainer_flux(subject: Subject) -> list[str]:
    """What the converter of OneTrainer's Flux.1 files has no name for: in the blocks all but the attention; no alpha."""
    if subject.dialect != "onetrainer" or architecture(subject) != "flux":
        return []
    stems = {key.partition(".")[0] for key in subject.tensors if key.startswith("lora_transformer_")}
    unknown = {stem for stem in stems if "transformer_blocks_" in stem and not _ONETRAINER_ATTENTION.search(stem)}
    unknown |= {stem for stem in stems if f"{stem}.alpha" not in subject.tensors}
    return [key for key in subject.tensors if key.partition(".")[0] in unknown]


def _alphas(subject: Subject) -> list[str]:
    """The modules that diffusers gives the alpha of the others.

    `get_peft_kwargs` takes the commonest alpha of a component for all of it, and writes the others under names that the
    attention's projections do not have, nor, since transformers 5 dropped text_model. from CLIP's names, any module of a
    text encoder; a module without an alpha gets that of the others too.
    """
    if subject.adapter is None or architecture(subject) not in _SD or not subject.dialect.startswith("kohya"):
        return []
    wrong: list[str] = []
    for component in subject.adapter.components:
        updates = [u for u in subject.adapter.of(component) if u.method == "lora"]
        stated = {u.key: float(u.alpha.value) for u in updates if _stated(u) and u.alpha and u.alpha.value is not None}
        if not stated:
            continue
        common = Counter(stated.values()).most_common(1)[0][0]
        for update in updates:
            own = stated.get(update.key, float(update.tensors["A"].shape[0]))
            encoder = component.startswith("text_encoder")
            lost = update.key not in stated or encoder or _ATTENTION.search(f".{update.module}")
            if own != common and lost:
                wrong.append(first_key(update))
    return wrong


def _magnitudes(subject: Subject) -> list[str]:
    """DoRA magnitudes in spellings that are not peft's."""
    if subject.recognised is None:
        return []
    own = ".magnitude" if subject.dialect == "ai-toolkit" else "dora_scale"
    return [key for key in subject.tensors if own in key]


def _stated(update: Update) -> bool:
    return update.alpha is not None and update.alpha.certainty is Certainty.READ


FACTS: tuple[Fact, ...] = (
    fact(
        "L510",
        "diffusers",
        "kohya-names",
        Effect.DROPS,
        unread(
            "kohya", "kohya-diffusers", "kohya-peft", "kohya-diffusers-peft", "onetrainer", "tencent", "kohya-hunyuan"
        ),
        "diffusers has no converter for these names of this base: it leaves out all {n tensor} ({keys}) with a log line, or "
        "fails on them",
        why="diffusers has no converter for sd-scripts', musubi-tuner's and OneTrainer's names of some bases, and loads such a "
        "file as if it were empty, or fails.",
        remedy="Run adapterops convert FILE --to diffusers.",
        fires="lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight (Stable Diffusion 3); the like of HunyuanVideo, LTX",
        passes="lora_unet_input_blocks_4_1_proj_in.lora_down.weight (SDXL)",
        source=f"diffusers 0.42 {_LORA} (SD3LoraLoaderMixin.lora_state_dict)",
    ),
    fact(
        "L511",
        "diffusers",
        "comfy-names",
        Effect.DROPS,
        unread("comfy", "comfy-down", "comfy-diffusers", "comfy-hunyuan", "comfy-down-hunyuan", "diffusion-pipe"),
        "of this base diffusers has no converter for these names behind diffusion_model.: it leaves out all {n tensor} ({keys}), "
        "or fails on them",
        why="Of a base diffusers knows none of the names behind diffusion_model., or some of their spellings only, and puts "
        "nothing into the model.",
        remedy="Run adapterops convert FILE --to diffusers.",
        fires="diffusion_model.double_blocks.0.img_attn.proj.lora_A.weight",
        passes="transformer.transformer_blocks.0.attn.to_out.0.lora_A.weight",
        source=f"diffusers 0.42 {_LORA} (lora_state_dict), loaders/peft.py (load_lora_adapter)",
    ),
    fact(
        "L512",
        "diffusers",
        "peft-names",
        Effect.DROPS,
        unread("peft", "miss", "loralib", anywhere=True),
        "diffusers' load_lora_weights finds none of its components before {keys}: it leaves out all {n tensor}, or fails "
        "with a KeyError (Flux.1)",
        why="load_lora_weights reads what stands behind unet., transformer. or text_encoder., not a PEFT folder's names.",
        remedy="Run adapterops convert FOLDER --to diffusers, or load the folder with peft.",
        fires="base_model.model.down_blocks.0.attentions.0.proj_in.lora_A.weight",
        passes="unet.down_blocks.0.attentions.0.proj_in.lora_A.weight",
        source="diffusers 0.42 loaders/peft.py (load_lora_adapter)",
    ),
    fact(
        "L513",
        "diffusers",
        "lycoris-names",
        Effect.REFUSES,
        unread("lycoris", "lycoris-original"),
        'diffusers knows no names that begin with lycoris_ ({keys}): "Invalid LoRA checkpoint", or nothing is loaded',
        why="For this base diffusers has no converter for the names that LyCORIS itself writes.",
        remedy="Run adapterops convert FILE --to diffusers (to-lora first, where the method is not LoRA).",
        fires="lycoris_transformer_blocks_0_attn_to_q.lora_down.weight (Flux.1)",
        passes="lora_unet_double_blocks_0_img_attn_proj.lora_down.weight",
        source=f"diffusers 0.42 {_CONVERSION}",
    ),
    fact(
        "L514",
        "diffusers",
        "alpha-keys",
        Effect.REFUSES,
        refused_alphas,
        "diffusers takes {n alpha tensor} ({keys}) for no part of a LoRA: it refuses the file, or finds none of its modules",
        why="Beside diffusers' own names only the loader of Flux.1 takes alpha tensors, and behind diffusion_model. those of "
        "few bases do (Qwen-Image, Z-Image; Wan's blocks).",
        remedy="Run adapterops convert FILE --to diffusers, which says the scale in the header.",
        fires="unet.mid_block.attentions.0.proj_in.alpha",
        passes="transformer.transformer_blocks.0.attn.to_q.alpha (Flux.1)",
        source=f"diffusers 0.42 {_LORA} (load_lora_weights)",
    ),
    fact(
        "L515",
        "diffusers",
        "anima",
        Effect.DROPS,
        _anima,
        "diffusers has no converter for Kohya's names of Anima and leaves out {n tensor} ({keys}) with a log line",
        why="diffusers loads a Kohya file for Anima as if it were empty.",
        remedy="Run adapterops convert FILE --to diffusers --arch anima.",
        fires="lora_unet_blocks_0_self_attn_q_proj.lora_down.weight",
        passes="lora_unet_blocks_0_self_attn_q.lora_down.weight (Wan)",
        source=f"diffusers 0.42 {_LORA} (AnimaLoraLoaderMixin.lora_state_dict)",
    ),
    fact(
        "L516",
        "diffusers",
        "flux-embedders",
        Effect.DROPS,
        _flux_embedders,
        "diffusers renames {n tensor} ({keys}) to modules without transformer. before them and leaves them out in silence",
        why="The converter of Kohya's Flux.1 files loses the embedders and the last layer, without a word.",
        remedy="Run adapterops convert FILE --to diffusers, or load it with adapterops.integrations.diffusers.",
        fires="lora_unet_img_in.lora_down.weight",
        passes="transformer.x_embedder.lora_A.weight",
        source=f"diffusers 0.42 {_CONVERSION} (_convert_kohya_flux_lora_to_diffusers)",
    ),
    fact(
        "L517",
        "diffusers",
        "flux-t5",
        Effect.DROPS,
        flux_t5,
        "diffusers leaves out {n tensor} of the T5 encoder ({keys}) with a log line",
        why="diffusers has no adapters on the T5 encoder of Flux.1.",
        remedy="Tell readers that the encoder's part is for ComfyUI, or load it with adapterops.integrations.diffusers.",
        fires="lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight",
        passes="lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight",
        source=f"diffusers 0.42 {_CONVERSION} (_convert_kohya_flux_lora_to_diffusers)",
    ),
    fact(
        "L518",
        "diffusers",
        "bare-processors",
        Effect.DROPS,
        lambda s: spelled(s, ("diffusers-attn-bare",)),
        "load_lora_weights looks for names behind unet. and leaves out all {n tensor} ({keys}) with a log line",
        why="Files of the first attention processors have no component before their names, and only load_attn_procs reads "
        "those.",
        remedy="Run adapterops convert FILE --to diffusers, or tell readers to load it with pipe.unet.load_attn_procs.",
        fires="mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight",
        passes="unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight",
        source="diffusers 0.42 loaders/peft.py (load_lora_adapter), loaders/unet.py (load_attn_procs)",
    ),
    fact(
        "L519",
        "diffusers",
        "no-component",
        Effect.REFUSES,
        unread("diffusers-down", "diffsynth"),
        "diffusers looks for unet. or transformer. before {keys}: it leaves out all {n tensor}, or refuses their alphas",
        why="Without a component before the names diffusers reads the files of few bases (Qwen-Image, Z-Image).",
        remedy="Run adapterops convert FILE --to diffusers.",
        fires="transformer_blocks.0.attn.to_q.lora_down.weight (Flux.1)",
        passes="transformer_blocks.0.attn.to_q.lora_down.weight (Qwen-Image)",
        source=f"diffusers 0.42 {_LORA} (lora_state_dict)",
    ),
    fact(
        "L520",
        "diffusers",
        "dora-scale",
        Effect.DROPS,
        _magnitudes,
        "diffusers takes out {n DoRA magnitude} ({keys}) with a log line and applies the rest as plain LoRA, or refuses the file",
        why="diffusers drops every dora_scale and computes something other than was trained.",
        remedy="Run adapterops convert FILE --to diffusers, which spells magnitudes per output as diffusers reads them; it has "
        "no place for those per input, (1, in).",
        fires="lora_unet_….dora_scale (320, 1)",
        passes="unet.….lora_magnitude_vector (320,)",
        source=f'diffusers 0.42 {_LORA} (lora_state_dict, "dora_scale")',
    ),
    fact(
        "L521",
        "diffusers",
        "mixed-alphas",
        Effect.MISREADS,
        _alphas,
        "diffusers gives {n module} ({keys}) the commonest alpha of the component instead of their own",
        why="diffusers applies a UNet's attention, and a text encoder, with the alpha that most modules have, not with each own.",
        remedy="Run adapterops convert FILE --to diffusers, with --fold-alpha to have scale 1 everywhere.",
        fires="…attn1_to_q.alpha = 1 where most modules have alpha = 4",
        passes="one alpha in the whole UNet",
        source="diffusers 0.42 utils/peft_utils.py (get_peft_kwargs), lora_conversion_utils.py (_get_alpha_name)",
    ),
    fact(
        "L522",
        "diffusers",
        "loha",
        Effect.REFUSES,
        lambda s: in_files(s, "loha"),
        'diffusers reads no LoHa ({keys}): "keys have not been correctly renamed", or it leaves them out (Flux.1)',
        why="diffusers has LoRA and, for few bases, LoKr; LoHa it has not.",
        remedy="Run adapterops to-lora FILE --to diffusers --energy 0.99, which makes a plain LoRA of it.",
        fires="lora_unet_….hada_w1_a",
        passes="lora_unet_….lora_down.weight",
        source=f"diffusers 0.42 {_CONVERSION} (_convert_non_diffusers_lora_to_diffusers)",
    ),
    fact(
        "L523",
        "diffusers",
        "lokr",
        Effect.REFUSES,
        lambda s: [] if row(s, LOKR) is not None else in_files(s, "lokr"),
        "diffusers reads no LoKr of this base in this spelling ({keys}): an error, or it leaves them out",
        why="Among diffusers' loaders only those of Flux.2 and Z-Image read LoKr, and that in few spellings.",
        remedy="Run adapterops to-lora FILE --to diffusers --energy 0.99, which makes a plain LoRA of it.",
        fires="lora_unet_….lokr_w1",
        passes="lora_unet_….lora_down.weight",
        source=f"diffusers 0.42 {_CONVERSION}, utils/peft_utils.py (_create_lokr_config)",
    ),
    fact(
        "L524",
        "diffusers",
        "tucker",
        Effect.REFUSES,
        lambda s: of_role(s, "mid", "lora"),
        'diffusers knows no lora_mid ({keys}): "keys have not been correctly renamed"',
        why="diffusers refuses a file with Tucker cores.",
        remedy="Run adapterops to-lora FILE --to diffusers, which multiplies the cores in.",
        fires="lora_unet_….lora_mid.weight (4, 4, 3, 3)",
        passes="lora_unet_….lora_down.weight (4, 320, 3, 3)",
        source=f"diffusers 0.42 {_CONVERSION} (_convert_non_diffusers_lora_to_diffusers)",
    ),
    fact(
        "L525",
        "diffusers",
        "ia3",
        Effect.REFUSES,
        lambda s: in_files(s, "ia3"),
        "diffusers reads no (IA)³ ({keys})",
        why="diffusers has no (IA)³ and refuses the file, or loads nothing of it.",
        remedy="Publish it for LyCORIS' own loader, or train a LoRA.",
        fires="lora_unet_….on_input",
        passes="lora_unet_….lora_down.weight",
        source=f"diffusers 0.42 {_CONVERSION} (_convert_non_diffusers_lora_to_diffusers)",
    ),
    fact(
        "L526",
        "diffusers",
        "differences",
        Effect.REFUSES,
        differences,
        "diffusers reads no whole differences ({keys}): a ValueError, or they are left out (biases of Flux.1, norms of Wan)",
        why="diffusers takes factors only, not differences of whole weights, norms and biases; but biases beside the factors of "
        "Wan's modules it does.",
        remedy="Run adapterops to-lora FILE --to diffusers --energy 0.99 for weights; norms and biases need ComfyUI or LyCORIS.",
        fires="lora_unet_….diff",
        passes="diffusion_model.blocks.0.self_attn.q.diff_b beside its lora_A and lora_B (Wan)",
        source=f"diffusers 0.42 {_CONVERSION}",
    ),
    fact(
        "L527",
        "diffusers",
        "bundled-embeddings",
        Effect.REFUSES,
        lambda s: in_files(s, "bundled"),
        'diffusers refuses a LoRA with embeddings in its file ({keys}): "all LoRA param names contain lora"',
        why="With a textual inversion inside, diffusers takes the file for no LoRA.",
        remedy="Publish the embeddings as a file of their own, for load_textual_inversion.",
        fires="bundle_emb.ohwx.clip_l",
        passes="ohwx.safetensors beside the LoRA",
        source=f"diffusers 0.42 {_LORA} (load_lora_weights)",
    ),
    fact(
        "L528",
        "diffusers",
        "encoder-without-out-proj",
        Effect.DROPS,
        _encoder_attention,
        "diffusers knows an attention's spelling by its out_proj, which no module here is: it leaves out {n tensor} ({keys}), "
        "or cannot infer the type of the file",
        why="Of a text encoder in Kohya's spelling diffusers loads q, k and v only where some out_proj is there too.",
        remedy="Run adapterops convert FILE --to diffusers.",
        fires="lora_te_…_self_attn_q_proj and lora_te_…_mlp_fc1, and no lora_te_…_self_attn_out_proj",
        passes="all of lora_te_…_self_attn_q_proj, k_proj, v_proj and out_proj",
        source="diffusers 0.42 utils/state_dict_utils.py (convert_state_dict_to_diffusers)",
    ),
    fact(
        "L529",
        "diffusers",
        "onetrainer-modules",
        Effect.REFUSES,
        _onetrainer_flux,
        "diffusers' converter of OneTrainer's Flux.1 files fails on {n tensor} ({keys}) with a KeyError",
        why="In the blocks the converter knows the attention only, and it insists on an alpha for every module.",
        remedy="Run adapterops convert FILE --to diffusers.",
        fires="lora_transformer_single_transformer_blocks_0_proj_out.lora_down.weight",
        passes="lora_transformer_transformer_blocks_0_attn_to_out_0.lora_down.weight with its alpha",
        source=f"diffusers 0.42 {_CONVERSION} (_convert_mixture_state_dict_to_diffusers)",
    ),
    *diffusers_facts.FACTS,
)
