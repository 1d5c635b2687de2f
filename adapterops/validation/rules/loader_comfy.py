"""What ComfyUI makes of adapters.  Read in its code; it logs what it leaves out and goes on."""

from __future__ import annotations

import re

from adapterops.adapter import Update
from adapterops.methods.difference import SPARSE
from adapterops.validation.rules.loader_facts import (
    Effect,
    Fact,
    architecture,
    ending,
    fact,
    in_files,
    of_role,
    spelled,
)
from adapterops.validation.rules.scale import scaled_by_header
from adapterops.validation.subject import Subject

_SD = ("sd1", "sd2", "sdxl")
_SD_SCRIPTS_OFT = ("sd-scripts-oft", "sd-scripts-oft-flux")
_KEYS = "comfy/lora.py (model_lora_keys_unet)"
_UNET_ATTENTION = re.compile(r"unet\..*\.(to_[qkv]|to_out\.0)\.(lora_[AB]\.weight|lora\.(down|up)\.weight)$")
_HUNYUAN_APART = re.compile(r".*double_blocks[._]\d+[._](img|txt)_attn_[qkv]\.")
_USO = ("single_blocks.37.processor.qkv_lora.up.weight", "double_blocks.18.processor.qkv_lora2.up.weight")
_CONTROL = ("img_in.lora_A.weight", "single_blocks.0.norm.key_norm.scale")


def _unet_attention(subject: Subject) -> list[str]:
    if architecture(subject) not in _SD or not subject.dialect.startswith("diffusers"):
        return []
    return [key for key in subject.tensors if _UNET_ATTENTION.match(key)]


def _flux_names(subject: Subject) -> list[str]:
    if subject.dialect == "bfl-peft" or (subject.dialect == "onetrainer-original" and architecture(subject) == "flux"):
        return list(subject.tensors)
    needed = {"xlabs": _USO, "bfl": _CONTROL}.get(subject.dialect, ())
    return [] if all(key in subject.tensors for key in needed) else list(subject.tensors)


def _flat_magnitudes(subject: Subject) -> list[str]:
    if subject.recognised is None:
        return []
    return [key for key in ending(subject, ".dora_scale") if len(subject.tensors[key].shape) == 1]


def _output_magnitudes(subject: Subject) -> list[str]:
    keys = [u.tensors["magnitude"].key for u in subject.updates if u.options.get("dora_axis") == "out"]
    return [k for k in keys if k.endswith(".dora_scale") and len(subject.tensors[k].shape) > 1]


def _turned(subject: Subject, dimensions: int) -> list[Update]:
    """LyCORIS' OFT (three dimensions) or BOFT (four)."""
    own = (u for u in subject.updates if u.method == "lycoris_oft" and "blocks" in u.tensors)
    return [update for update in own if len(update.tensors["blocks"].shape) == dimensions]


def _bounded(subject: Subject) -> list[str]:
    if subject.dialect in _SD_SCRIPTS_OFT:
        return []
    bounds = (u.tensors.get("constraint") for d in (3, 4) for u in _turned(subject, d))
    return [tensor.key for tensor in bounds if tensor is not None and tensor.item() > 0]


def _overwritten(subject: Subject) -> list[str]:
    """The factors of modules whose weight has a difference, or is replaced, too."""
    if subject.dialect in ("peft", "miss", "loralib"):
        return []
    both = {(u.component, u.module) for u in subject.updates if u.method in _WHOLE and "weight" in u.tensors}
    factors = (u for u in subject.updates if u.method not in _WHOLE and (u.component, u.module) in both)
    return [tensor.key for update in factors for tensor in update.tensors.values()]


_WHOLE = ("diff", "saved")

FACTS: tuple[Fact, ...] = (
    fact(
        "L530",
        "comfy",
        "header-alpha",
        Effect.MISREADS,
        lambda s: [tensor.key for update in scaled_by_header(s) for tensor in update.tensors.values()],
        "ComfyUI ignores the alpha in the header and applies scale 1 to {n tensor} ({keys})",
        why="ComfyUI takes alpha from tensors only, so an adapter whose alpha is in the header works with another strength.",
        remedy="Run adapterops convert FILE --to diffusers --fold-alpha, which puts the scale into the factors for every reader.",
        fires="header lora_adapter_metadata with lora_alpha 8 and r 4, and no .alpha tensors",
        passes="lora_alpha 4 and r 4, so that scale 1 is right",
        source="ComfyUI comfy/lora.py (load_lora); ComfyUI#12191, #15830",
        field="lora_adapter_metadata",
    ),
    fact(
        "L531",
        "comfy",
        "magnitude-vector",
        Effect.DROPS,
        lambda s: (
            ending(s, ".lora_magnitude_vector", ".lora_magnitude_vector.weight")
            if s.recognised is not None and s.dialect != "peft"
            else []
        ),
        "ComfyUI leaves out {n DoRA magnitude} ({keys}) and applies the rest as plain LoRA",
        why="ComfyUI reads magnitudes as dora_scale only.",
        remedy="Run adapterops convert FILE --to kohya, whose dora_scale ComfyUI applies, if not quite as trained (L533).",
        fires="unet.….lora_magnitude_vector",
        passes="lora_unet_….dora_scale",
        source="ComfyUI comfy/lora.py (load_lora); ComfyUI#4259",
    ),
    fact(
        "L532",
        "comfy",
        "flat-dora-scale",
        Effect.MISREADS,
        _flat_magnitudes,
        "ComfyUI divides {n magnitude} of one dimension ({keys}) by a column of norms: an outer product, which spoils square "
        "weights and fails on others",
        why="ComfyUI takes a DoRA magnitude as it stands; without a second dimension it is broadcast to a matrix.",
        remedy="Save it as a matrix: (1, in) for magnitudes per input, (out, 1) for those per output.",
        fires="lora_unet_….dora_scale (320,)",
        passes="lora_unet_….dora_scale (1, 320)",
        source="ComfyUI comfy/weight_adapter/base.py (weight_decompose); ComfyUI#12938",
    ),
    fact(
        "L533",
        "comfy",
        "dora-per-output",
        Effect.MISREADS,
        _output_magnitudes,
        "ComfyUI normalises {n module} ({keys}) by the base weight's norms, not by those of the sum",
        why="For magnitudes per output ComfyUI divides by ‖W‖ instead of ‖W+ΔW‖.",
        remedy="Train with magnitudes per input (LyCORIS: wd_on_output=False), or tell readers to load it with LyCORIS.",
        fires="lora_unet_….dora_scale (320, 1)",
        passes="lora_unet_….dora_scale (1, 320)",
        source="ComfyUI comfy/weight_adapter/base.py (weight_decompose); ComfyUI#15458",
    ),
    fact(
        "L534",
        "comfy",
        "peft-names",
        Effect.DROPS,
        lambda s: (
            spelled(s, ("loralib", "miss"))
            or ([] if architecture(s) in ("sd3", "pixart_alpha") else spelled(s, ("peft",)))
        ),
        "ComfyUI knows no base_model.model. of this base and leaves out all {n tensor} ({keys})",
        why="ComfyUI reads peft's own names for few bases only (SD3, PixArt, HunyuanDiT, ACE-Step).",
        remedy="Run adapterops convert FOLDER --to kohya (or comfy).",
        fires="base_model.model.down_blocks.0.attentions.0.proj_in.lora_A.weight",
        passes="lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight",
        source=f"ComfyUI {_KEYS}",
    ),
    fact(
        "L535",
        "comfy",
        "unet-attention",
        Effect.DROPS,
        _unet_attention,
        "ComfyUI looks for processor.to_q and the like and leaves out {n tensor} of the attention ({keys})",
        why="In diffusers' names for a UNet ComfyUI knows the attention only as its old processors spelled it.",
        remedy="Run adapterops convert FILE --to kohya.",
        fires="unet.….attn1.to_q.lora_A.weight",
        passes="lora_unet_…_attn1_to_q.lora_down.weight, unet.….attn1.processor.to_q_lora.down.weight",
        source=f"ComfyUI {_KEYS}; diffusers#10860, ComfyUI#12452",
    ),
    fact(
        "L536",
        "comfy",
        "flux-names",
        Effect.DROPS,
        _flux_names,
        "ComfyUI knows none of these names of Flux.1 and leaves out all {n tensor} ({keys})",
        why="Of Flux.1's other spellings ComfyUI reads control LoRAs and USO only.",
        remedy="Run adapterops convert FILE --to comfy.",
        fires="double_blocks.0.processor.qkv_lora1.down.weight",
        passes="diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight",
        source="ComfyUI comfy/lora_convert.py (convert_lora)",
    ),
    fact(
        "L537",
        "comfy",
        "ia3",
        Effect.DROPS,
        lambda s: in_files(s, "ia3"),
        "ComfyUI has no (IA)³ and leaves out {n tensor} ({keys})",
        why="Among ComfyUI's weight adapters there is no (IA)³.",
        remedy="Publish it for LyCORIS' own loader, or train a LoRA.",
        fires="lora_unet_….on_input",
        passes="lora_unet_….lora_down.weight",
        source="ComfyUI comfy/weight_adapter/__init__.py; ComfyUI#1071",
    ),
    fact(
        "L538",
        "comfy",
        "bundled-embeddings",
        Effect.DROPS,
        lambda s: in_files(s, "bundled"),
        "ComfyUI loads no embeddings from a LoRA's file and leaves out {n tensor} ({keys})",
        why="The prompt's own word means nothing to ComfyUI while its embedding is inside the LoRA.",
        remedy="Publish the embeddings as a file of their own, for models/embeddings.",
        fires="bundle_emb.ohwx.clip_l",
        passes="ohwx.safetensors beside the LoRA",
        source="ComfyUI comfy/lora.py (load_lora)",
    ),
    fact(
        "L539",
        "comfy",
        "lora-bias",
        Effect.DROPS,
        lambda s: [] if s.dialect in ("bfl", "bfl-peft", "peft") else of_role(s, "bias", "lora"),
        "ComfyUI leaves out the factors' biases ({keys})",
        why="ComfyUI reads lora_B.bias in control LoRAs of Flux.1 only.",
        remedy="Train with lora_bias=False; no other tensor of ComfyUI's says the same of every module.",
        fires="transformer.….lora_B.bias",
        passes="transformer.….lora_B.weight alone",
        source="ComfyUI comfy/weight_adapter/lora.py (LoRAAdapter.load)",
    ),
    fact(
        "L540",
        "comfy",
        "oft-bound",
        Effect.MISREADS,
        _bounded,
        "ComfyUI shortens the rotations of {n module} ({keys}) to their alpha, not to alpha times their outputs",
        why="The alpha of LyCORIS' OFT and BOFT bounds all blocks of a module together, at alpha times its outputs; ComfyUI's "
        "bound is the alpha alone, which leaves next to nothing of them.",
        remedy="Run adapterops to-lora FILE --base-weights BASE, which makes a LoRA of it, or train without a constraint.",
        fires="lora_unet_….oft_blocks with alpha 0.01",
        passes="lora_unet_….oft_blocks with alpha 0, which is no bound",
        source="ComfyUI comfy/weight_adapter/oft.py, boft.py (calculate_weight); LyCORIS lycoris/modules/diag_oft.py (get_r)",
    ),
    fact(
        "L541",
        "comfy",
        "oft-rescale",
        Effect.MISREADS,
        lambda s: [u.tensors["rescale"].key for u in _turned(s, 3) if "rescale" in u.tensors],
        "ComfyUI turns the outputs of {n module} and does not multiply them ({keys})",
        why="ComfyUI loads the factors beside an OFT, so that it warns of nothing, and uses them beside a BOFT only.",
        remedy="Run adapterops to-lora FILE --base-weights BASE, which makes a LoRA of it, or train with rescaled=False.",
        fires="lora_unet_….oft_blocks (4, 320, 320), lora_unet_….rescale (1280, 1)",
        passes="lora_unet_….oft_blocks (4, 320, 320)",
        source="ComfyUI comfy/weight_adapter/oft.py (OFTAdapter.calculate_weight)",
    ),
    fact(
        "L542",
        "comfy",
        "boft-alpha",
        Effect.DROPS,
        lambda s: [u.tensors["blocks"].key for u in _turned(s, 4) if "constraint" not in u.tensors],
        "ComfyUI fails on {n BOFT} without an alpha ({keys}), logs it and goes on without",
        why="ComfyUI compares the alpha of a BOFT with zero, and None cannot be; of an OFT it takes 0.",
        remedy="Add a tensor alpha of 0 beside the blocks, as LyCORIS saves it.",
        fires="lora_unet_….oft_blocks (2, 4, 320, 320) alone",
        passes="lora_unet_….oft_blocks (2, 4, 320, 320), lora_unet_….alpha 0",
        source="ComfyUI comfy/weight_adapter/boft.py (BOFTAdapter.calculate_weight)",
    ),
    fact(
        "L543",
        "comfy",
        "onetrainer-oft",
        Effect.DROPS,
        lambda s: in_files(s, "onetrainer_oft"),
        "ComfyUI has no rotations of the inputs and leaves out {n tensor} ({keys})",
        why="ComfyUI's OFT is LyCORIS', which turns outputs and has other tensors; OneTrainer's needs an extension of it.",
        remedy="Run adapterops to-lora FILE --base-weights BASE, which makes a LoRA of it.",
        fires="lora_unet_….oft_R.weight",
        passes="lora_unet_….oft_blocks",
        source="ComfyUI comfy/weight_adapter/__init__.py (adapters)",
    ),
    fact(
        "L544",
        "comfy",
        "sd-scripts-oft",
        Effect.DROPS,
        lambda s: spelled(s, _SD_SCRIPTS_OFT),
        "ComfyUI knows no oft_unet_ and leaves out all {n tensor} ({keys})",
        why="ComfyUI reads the OFT that LyCORIS writes, behind lora_unet_; that of sd-scripts is called otherwise.",
        remedy="Run adapterops to-lora FILE --base-weights BASE: under another name ComfyUI would read it, and bound it "
        "otherwise (L540).",
        fires="oft_unet_….oft_blocks",
        passes="lora_unet_….oft_blocks",
        source=f"ComfyUI {_KEYS}; ComfyUI#5230",
    ),
    fact(
        "L555",
        "comfy",
        "overwritten",
        Effect.DROPS,
        _overwritten,
        "ComfyUI takes the whole weights of modules that have factors, too, and leaves out {n tensor} ({keys})",
        why="ComfyUI keeps one patch for a weight: a difference (.diff) or a new weight (.set_weight) takes the place of the "
        "LoRA that it has read before.",
        remedy="Add the LoRA's product to the difference, or split the two into two files and load both.",
        fires="lora_unet_….lora_up.weight and lora_unet_….diff of one module",
        passes="lora_unet_….lora_up.weight and lora_unet_….diff_b",
        source="ComfyUI comfy/lora.py (load_lora)",
    ),
    fact(
        "L556",
        "comfy",
        "hunyuan-apart",
        Effect.DROPS,
        lambda s: [key for key in s.tensors if _HUNYUAN_APART.match(key)],
        "ComfyUI has q, k and v of HunyuanVideo in one and leaves out {n tensor} ({keys})",
        why="The authors of HunyuanVideo 1.5 keep q, k and v apart; ComfyUI's model has them in one weight, under other names.",
        remedy="Run adapterops convert FILE --to comfy-hunyuan.",
        fires="diffusion_model.double_blocks.0.img_attn_q.lora_A.weight",
        passes="diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight",
        source="ComfyUI comfy/lora.py (model_lora_keys_unet), comfy/ldm/hunyuan_video/model.py",
    ),
    fact(
        "L557",
        "comfy",
        "sparse-part",
        Effect.DROPS,
        lambda s: [key for role in SPARSE for key in of_role(s, role, "diff")],
        "ComfyUI leaves out the sparse part of weights ({keys})",
        why="What a LoRA extracted by LyCORIS lacks, it can keep as indices and values (bias_indices …), which ComfyUI does not "
        "read.",
        remedy="Extract it anew without use_sparse_bias, at a higher rank.",
        fires="lora_unet_….bias_indices, bias_values, bias_size",
        passes="lora_unet_….lora_up.weight at a higher rank",
        source="ComfyUI comfy/lora.py (load_lora); LyCORIS lycoris/utils/__init__.py (extract_diff)",
    ),
)
