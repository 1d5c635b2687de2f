"""Kohya: what sd-scripts writes and nearly everything reads.

One file; module names with dots written as underscores, after a prefix for the component; `lora_down`/`lora_up`
factors, `alpha` as a scalar tensor (missing: readers take the rank, so scale 1).  Sources: kohya-ss/sd-scripts
`networks/lora.py` (`LoRANetwork`, `create_network_from_weights`), KohakuBlueleaf/LyCORIS
`lycoris/modules/locon.py` (`lora_mid`, `dora_scale`).

sd-scripts spells SD 1.x and 2.x by diffusers' block names and SDXL by those of the original repository; tools
that train SDXL on a diffusers UNet write diffusers' names there too, which is the second dialect.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import isfinite, sqrt
from typing import ClassVar

from adapterops_formats.hunyuan_names import flat, may_be_flat
from adapterops_formats.lycoris_names import DOWN_UP, EMBEDDINGS, IA3, LYCORIS, OFT, RENAMED, SCALE, UNREAD, unnamed
from adapterops_formats.peft_config import refuse_scale
from adapterops_formats.sd_scripts_oft import SD_SCRIPTS_OFT_FLUX, lists, parts_of

from adapterops.plugin import (
    METHODS,
    ONE_ENCODER,
    TWO_ENCODERS,
    Adapter,
    AlphaIn,
    Certainty,
    Dialect,
    Format,
    Output,
    OutputFile,
    Place,
    Reading,
    Request,
    Source,
    Suffix,
    Target,
    Update,
    errors,
    header,
    no_config,
    read_by_table,
)

SUFFIXES = (*DOWN_UP, *LYCORIS, *IA3)
ENCODERS = (
    Place("text_encoder", "lora_te_", SUFFIXES, flat=True, only=frozenset({ONE_ENCODER})),
    # diffusers' own export calls the encoder of SD 1.x so, too; it is read, and written only where there are two.
    # Chroma's one encoder is T5, which OneTrainer and Comfy call so, and sd-scripts as Flux.1's.
    Place("text_encoder", "lora_te1_", SUFFIXES, flat=True, usual=frozenset({TWO_ENCODERS, "chroma"})),
    # T5 is the third encoder of SD3 and the second of Flux.1; sd-scripts gives it one name, OneTrainer another.
    Place(
        "text_encoder_3",
        "lora_te3_",
        SUFFIXES,
        instead=("text_encoder_2", "text_encoder"),
        flat=True,
        only=frozenset({"flux", "sd3"}),
    ),
    Place("text_encoder_2", "lora_te2_", SUFFIXES, flat=True),
    EMBEDDINGS,
)
_ACE = frozenset({"ace_step_1_5"})
# sd-scripts names a denoiser's modules as the authors do, but those of SD 1 and 2, Qwen-Image's being the same anyway.
_AS_DIFFUSERS = {"sd1": "canonical", "sd2": "canonical"}
KOHYA = Dialect(
    name="kohya",
    format="kohya",
    title="Kohya",
    places=(
        # Anima's conditioner is a part of its authors' transformer.
        Place("text_conditioner", "lora_unet_llm_adapter_", SUFFIXES, flat=True),
        # ACE-Step's transformer is a part of its authors' model.
        Place("transformer", "lora_unet_decoder_", SUFFIXES, names="original", flat=True, only=_ACE, usual=_ACE),
        Place(
            "unet",
            "lora_unet_",
            SUFFIXES,
            ("transformer", "prior"),
            names="original",
            names_in=_AS_DIFFUSERS,
            flat=True,
        ),
        *ENCODERS,
    ),
    alpha=AlphaIn.TENSOR,
    convention="rank",
    unread=UNREAD,
    example="lora_unet_input_blocks_4_1_proj_in.lora_down.weight",
)
KOHYA_DIFFUSERS = Dialect(
    name="kohya-diffusers",
    format="kohya",
    title="Kohya with diffusers' block names",
    places=(Place("unet", "lora_unet_", SUFFIXES, ("transformer", "prior"), flat=True), *ENCODERS),
    alpha=AlphaIn.TENSOR,
    convention="rank",
    unread=UNREAD,
    example="lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight",
)
_CASCADE = frozenset({"stable_cascade"})
ONETRAINER = Dialect(
    name="onetrainer",
    format="kohya",
    title="OneTrainer (legacy)",
    places=(
        Place("transformer", "lora_transformer_", SUFFIXES, flat=True),
        # Stable Cascade's, whose attention is called so by OneTrainer and Comfy (`comfy/lora.py`, model_lora_keys_unet).
        Place("prior", "lora_prior_unet_", SUFFIXES, names="original", flat=True),
        Place("text_encoder", "lora_prior_te_", SUFFIXES, flat=True, only=_CASCADE, usual=_CASCADE),
        Place("text_encoder", "lora_te1_", SUFFIXES, flat=True),
        # So only where it saves Chroma, whose one encoder has no number.
        Place("text_encoder", "lora_te_", SUFFIXES, flat=True, usual=frozenset({"chroma"})),
        Place("text_encoder_2", "lora_te2_", SUFFIXES, flat=True),
        Place("text_encoder_3", "lora_te3_", SUFFIXES, flat=True),
        EMBEDDINGS,
    ),
    alpha=AlphaIn.TENSOR,
    convention="rank",
    unread=UNREAD,
    example="lora_transformer_transformer_blocks_0_attn_to_q.lora_down.weight",
)
# Tencent-Hunyuan/HunyuanVideo-I2V `train_image2video_lora.py` (`get_module_kohya_state_dict`).
TENCENT = Dialect(
    name="tencent",
    format="kohya",
    title="Tencent's trainer of HunyuanVideo-I2V",
    places=(
        Place(
            "transformer",
            "Hunyuan_video_I2V_lora_",
            SUFFIXES,
            names="original",
            flat=True,
            only=frozenset({"hunyuan_video"}),
        ),
    ),
    alpha=AlphaIn.TENSOR,
    convention="rank",
    example="Hunyuan_video_I2V_lora_double_blocks_0_img_attn_qkv.lora_down.weight",
)
LYCORIS_FILE = Dialect(
    name="lycoris",
    format="kohya",
    title="LyCORIS (lycoris_…)",
    places=(Place("unet", "lycoris_", SUFFIXES, ("transformer", "model", "text_encoder"), flat=True),),
    alpha=AlphaIn.TENSOR,
    convention="rank",
    unread=UNREAD,
    example="lycoris_transformer_blocks_0_attn_to_q.lokr_w1",
)
# LyCORIS names what it wraps as the model does; a model of the authors' own code has their names.
LYCORIS_ORIGINAL = Dialect(
    name="lycoris-original",
    format="kohya",
    title="LyCORIS (lycoris_…) around the authors' own model",
    places=(
        Place("transformer", "lycoris_", SUFFIXES, ("prior",), names="original", flat=True, only=frozenset(RENAMED)),
    ),
    alpha=AlphaIn.TENSOR,
    convention="rank",
    unread=UNREAD,
    example="lycoris_double_blocks_0_img_attn_qkv.lokr_w1",
)
_A_B = (Suffix(".lora_A{adapter}.weight", "lora", "A"), Suffix(".lora_B{adapter}.weight", "lora", "B"))


_A_ENDS = (".lora_A.weight", ".lora_A.default.weight")


def _with_pefts_factors(usual: Dialect) -> Dialect:
    """The dialect with peft's names for LoRA's factors, which ComfyUI (`comfy/weight_adapter/lora.py`) tries after any name."""
    suffixes = {SUFFIXES: (*_A_B, *LYCORIS)}
    return replace(
        usual,
        name=f"{usual.name}-peft",
        title=f"{usual.title}, with peft's factors",
        places=tuple(replace(p, suffixes=suffixes.get(p.suffixes, p.suffixes)) for p in usual.places),
        example=usual.example.replace(".lora_down.", ".lora_A."),
    )


HUNYUAN = flat(SUFFIXES)
# kohya-ss/sd-scripts `networks/oft.py` (`OFTNetwork`), which turns the UNet of Stable Diffusion alone.
SD_SCRIPTS_OFT = Dialect(
    name="sd-scripts-oft",
    format="kohya",
    title="OFT of sd-scripts",
    places=(
        Place(
            "unet",
            "oft_unet_",
            (OFT[0], SCALE[0]),
            names="original",
            names_in=_AS_DIFFUSERS,
            flat=True,
            only=frozenset({"sd1", "sd2", "sdxl"}),
        ),
    ),
    alpha=AlphaIn.TENSOR,
    convention="rank",
    example="oft_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.oft_blocks",
)
_SD_SCRIPTS = (SD_SCRIPTS_OFT, SD_SCRIPTS_OFT_FLUX)
PEFTS = tuple(map(_with_pefts_factors, (KOHYA, KOHYA_DIFFUSERS)))

_LATER = "this version does not convert it"


class Kohya(Format):
    """The Kohya file format."""

    name = "kohya"
    title = "Kohya (sd-scripts, A1111, Comfy)"
    limits = (
        "Modules of a base that is neither built in nor given by `--base CONFIG`, but under names that are Kohya's or Comfy's "
        "already: what others call them takes its list.",
        "Modules saved whole, and soft prompts.",
    )
    dialects = (
        KOHYA,
        KOHYA_DIFFUSERS,
        ONETRAINER,
        LYCORIS_FILE,
        LYCORIS_ORIGINAL,
        TENCENT,
        HUNYUAN,
        SD_SCRIPTS_OFT,
        SD_SCRIPTS_OFT_FLUX,
        *PEFTS,
    )
    file_name = "lora.safetensors"
    foreign = {
        r"\.oft_diag$": (
            "is the rotation itself that LyCORIS 2.0.0 saved of its OFT, from which no later version and no other reader takes "
            f"it up; {_LATER}"
        ),
        r"\.bm\.weight$": f"is a Tucker core of GLoRA (LyCORIS); {_LATER}",
        # What a module of LyCORIS saved as it stood has and its own `state_dict` folds into w1, w1_a or lora_up.
        r"\.scalar$": (
            "is a learnt factor on its module's update (LyCORIS, use_scalar), which no reader applies, LyCORIS 4.1.3 "
            "included; multiply it into the module's lora_up, hada_w1_a, lokr_w1 or lokr_w1_a and take it out, or take it "
            "out with --allow-drop, and its module with it"
        ),
    }

    # VideoX-Fun puts the name of the whole model, which is empty, before every module's, and ComfyUI reads it so:
    # aigc-apps/VideoX-Fun `videox_fun/utils/lora_utils.py` (`LoRANetwork`), Comfy-Org/ComfyUI `comfy/lora_convert.py`.
    variants: ClassVar = {"lora_unet_": ("lora_unet__",)}

    # Conversions by hand that replaced every dot, or put the prefix before a name that had its component already.
    botched = {
        r"^lora_unet_unet_": "lora_unet_",
        r"^lora_te_text_encoder_(?!2_)": "lora_te_",
        r"^(lora_(?:unet|te\d?)_.+)_lora_(down|up)\.weight$": r"\1.lora_\2.weight",
        r"^(lora_(?:unet|te\d?)_.+)_alpha$": r"\1.alpha",
    }

    def recognise(self, source: Source, dialects: Sequence[Dialect]) -> list[Reading]:
        """As for any format; what ends as peft's factors do is none of LyCORIS' (IA)³, whose tensor is called `weight`, too."""
        if len(dialects) > 1:
            usual, pefts = (sum(key.endswith(end) for key in source.tensors) for end in (".lora_down.weight", _A_ENDS))
            shown = pefts > usual  # a stray key is no spelling
            dialects = [dialect for dialect in dialects if (dialect in PEFTS) == shown]
            if not may_be_flat(source.tensors):
                dialects = [dialect for dialect in dialects if dialect is not HUNYUAN]
        return super().recognise(source, dialects)

    def read(self, source: Source, reading: Reading, request: Request) -> Adapter:
        refuse_scale(request.fields, "a Kohya file")
        apart = partial(parts_of, request=request) if reading.dialect is SD_SCRIPTS_OFT_FLUX else None
        adapter = read_by_table(reading, source, request, no_config, None, apart)
        if reading.dialect in _SD_SCRIPTS:
            for fault in sd_scripts_faults(adapter):
                request.wrong(errors.BrokenAdapter(fault))
        read = [u for u in adapter if u.alpha is not None and u.alpha.certainty is Certainty.READ]
        other = _contradicted(adapter.with_updates(read), source.metadata)
        if other is not None and not isinstance(request.alpha, (str, float)):
            request.wrong(
                errors.Conflict(
                    f"{source.path}: two alphas: the header's ss_network_alpha is {source.metadata['ss_network_alpha'][:40]}, "
                    f"but no module has it ({other.name}: {other.alpha}); sd-scripts, Comfy and diffusers take the tensors and "
                    "do not look at the header: --alpha tensors does as they do",
                    fault="header-alpha",
                )
            )
        return adapter

    def write(self, adapter: Adapter, target: Target) -> Output:
        if target.dialect in _SD_SCRIPTS:
            other = next((update for update in adapter if update.method != "lycoris_oft"), None)
            if other is not None and not target.allow_drop:
                raise errors.CannotRepresent(
                    f"{other.name}: a file of sd-scripts' OFT has no place for {METHODS[other.method].title}; --to kohya holds it"
                )
            for fault in sd_scripts_faults(adapter):
                raise errors.CannotRepresent(f"{fault}; --to kohya holds it as LyCORIS has it")
        listed, lists_of_them = lists(adapter, target) if target.dialect is SD_SCRIPTS_OFT_FLUX else ([], {})
        listed_keys = {update.key for update in listed}
        spelled = self.spell(adapter.with_updates(u for u in adapter if u.key not in listed_keys), target)
        metadata, notes = header(spelled.adapter), [*spelled.notes, *unnamed(target)]
        if _contradicted(spelled.adapter, metadata) is not None:
            notes.append(
                f"the header's ss_network_alpha, {metadata.pop('ss_network_alpha')[:40]}, is no module's: left out"
            )
        file = OutputFile("", {**spelled.tensors, **lists_of_them}, metadata)
        return Output((file,), (*spelled.kept, *listed), tuple(spelled.dropped), tuple(notes))


def _contradicted(adapter: Adapter, metadata: Mapping[str, str]) -> Update | None:
    """A module whose alpha is not `ss_network_alpha`, where that is the alpha of no module at all.

    Readers use the tensors, but a header that no tensor agrees with means that one of the two was edited.
    Convolutions and block-wise ranks have alphas of their own, so one agreeing module is enough.
    """
    try:
        stated = float(metadata.get("ss_network_alpha", ""))
    except ValueError:
        return None
    # Zero says "as the rank" to trainers; some write None or Dynamic.
    if not isfinite(stated) or stated == 0:
        return None
    # LoKr of two whole factors has no rank: LyCORIS writes any number beside it.
    ranked = [(u, METHODS[u.method].rank(u)) for u in adapter if u.alpha is not None and u.alpha.value is not None]
    for update, rank in ranked:
        value = update.alpha.value if update.alpha is not None else None
        # 16-bit alphas are rounded: within bfloat16's spacing they say the same.  LyCORIS stores rsLoRA's scale as
        # alpha·√rank (`lycoris/modules/locon.py`).
        if rank and any(abs((value or 0.0) - said) <= abs(said) * 2**-7 for said in (stated, stated * sqrt(rank))):
            return None
    return next((update for update, rank in ranked if rank), None)


def sd_scripts_faults(adapter: Adapter) -> Iterator[str]:
    """Why sd-scripts would compute something else of these updates than LyCORIS does.

    Its OFT is LyCORIS' without `rescale`, bounded by alpha · out_features even where that is zero, which leaves nothing of the
    blocks; and it makes all modules with the first alpha and the first number of blocks in the file
    (`create_network_from_weights`).
    """
    updates = [update for update in adapter if update.method == "lycoris_oft"]
    for update in updates:
        blocks, bound = update.tensors["blocks"], update.tensors.get("constraint")
        if len(blocks.shape) != 3 or "rescale" in update.tensors:
            yield f"{blocks.where}: sd-scripts has neither BOFT nor factors on the outputs ({update.name})"
        elif bound is None or not bound.item() > 0:
            yield (
                f"{blocks.where}: without an alpha above zero, which bounds the blocks, sd-scripts' OFT does nothing "
                f"({update.name})"
            )
        else:
            first = next(other for other in updates if "constraint" in other.tensors)
            own = first.tensors["constraint"].item(), first.tensors["blocks"].shape[0]
            if (bound.item(), blocks.shape[0]) != own:
                yield (
                    f"{blocks.where}: alpha {bound.item():g} and {blocks.shape[0]} blocks, beside {own[0]:g} and {own[1]} of "
                    f"{first.name}: sd-scripts takes one of each for the whole file"
                )


FORMAT = Kohya()
