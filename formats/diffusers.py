"""diffusers: one file for a pipeline, in several generations of spelling.

- today's: peft's names under the component's (`unet.<module>.lora_A.weight`), scale in the header as a JSON
  config a component (`lora_adapter_metadata`), else alpha = rank; finetrainers says rank and alpha in another entry
  (`lora_config`), which diffusers does not read and `--alpha header` takes;
- what its training scripts have written since peft came (`convert_state_dict_to_diffusers`): attention in the older
  spelling below, everything else in today's, in one file;
- the same names with Kohya's alpha tensors beside the factors, as some trainers of Flux.1 save them and diffusers reads
  them (`loaders/lora_pipeline.py`, `FluxLoraLoaderMixin.lora_state_dict`);
- before peft: `unet.<module>.lora.down.weight`, text encoders `….lora_linear_layer.down.weight`; no alpha;
- without a component, with Kohya's factors and alphas (`transformer_blocks.0.attn.to_q.lora_down.weight`): not
  diffusers' own writing but read by it; Qwen-Image's published distillations are spelled so;
- without a component, with peft's factors (`transformer_blocks.0.attn.to_q.lora_A.default.weight`), as DiffSynth-Studio
  saves what it trains; diffusers reads it;
- under the component's name, with LyCORIS' tensors and alphas (`transformer.<module>.lokr_w1`): ai-toolkit's LoKr, the
  LoHa and LoKr that OneTrainer saves for diffusers, and its backups; no reading of diffusers' but these trainers';
- under the component's name, whole differences and DoRA magnitudes of ai-toolkit's beside peft's factors
  (`transformer.<module>.diff`, `.magnitude`), and text encoders as `lora_te1.<module>`, all of which ai-toolkit alone reads;
- with textual inversions bundled into the file (`bundle_emb.<token>.clip_l`), as OneTrainer saves for diffusers, which
  refuses such a file whole;
- attention processors: `unet.<attention>.processor.to_q_lora.down.weight`, at first without `unet.`; no alpha.

Sources: huggingface/diffusers 0.42.1 `loaders/lora_base.py` (`_save_lora_weights`, `LORA_ADAPTER_METADATA_KEY`),
`utils/state_dict_utils.py`, `utils/peft_utils.py` (`get_peft_kwargs`); ostris/ai-toolkit `toolkit/network_mixins.py`
(`get_state_dict`), `toolkit/lora_special.py` (`FullModule`, `create_modules`), `toolkit/models/DoRA.py`; Nerogar/OneTrainer
`modules/util/convert_lora_util.py` (`convert_to_diffusers`), `modules/modelSaver/mixin/LoRASaverMixin.py`
(`_save_internal`); modelscope/DiffSynth-Studio `diffsynth/diffusion/training_module.py`, `diffsynth/utils/lora/general.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from adapterops_formats.lycoris_names import (
    DIFFERENCES,
    DOWN_UP,
    EMBEDDINGS,
    LYCORIS,
    embeddings_told,
    insist_on_modules,
    of_adapters,
)
from adapterops_formats.peft_config import PeftConfig, check_given, describes, from_updates, refuse_scale
from adapterops_formats.peft_header import with_own_config
from adapterops_formats.peft_names import LORA
from adapterops_formats.peft_trainers import without_wrappers

from adapterops.plugin import (
    ANY,
    HEADER_CONFIG,
    METHODS,
    Adapter,
    AlphaIn,
    Certainty,
    Dialect,
    Format,
    Group,
    Output,
    OutputFile,
    Place,
    Reading,
    Request,
    ScaleRule,
    Source,
    Suffix,
    Target,
    errors,
    header,
    is_number,
    read_by_table,
)

FINETRAINERS = "lora_config"
"""The header's entry in which finetrainers says rank and alpha.  Its own loader reads it, diffusers does not.

Source: a-r-r-o-w/finetrainers `finetrainers/trainer/sft_trainer/trainer.py`,
`finetrainers/patches/dependencies/diffusers/peft.py` (`load_lora_weights`).
"""
COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "prior", "text_conditioner")

_PAIR = (Suffix(".lora.down.weight", "lora", "A"), Suffix(".lora.up.weight", "lora", "B"))
_ENCODER_PAIR = (
    Suffix(".lora_linear_layer.down.weight", "lora", "A"),
    Suffix(".lora_linear_layer.up.weight", "lora", "B"),
)
_PROCESSOR_PAIR = (Suffix(".down.weight", "lora", "A"), Suffix(".up.weight", "lora", "B"))


def _only_after(suffixes: tuple[Suffix, ...], *endings: str) -> tuple[Suffix, ...]:
    return tuple(replace(suffix, after=endings) for suffix in suffixes)


_PROCESSOR_TAILS = (
    (".to_q", ".processor.to_q_lora"),
    (".to_k", ".processor.to_k_lora"),
    (".to_v", ".processor.to_v_lora"),
    (".to_out.0", ".processor.to_out_lora"),
)
_OLD_ENCODERS = tuple(
    Place(component, f"{component}.", _ENCODER_PAIR) for component in ("text_encoder", "text_encoder_2")
)

# Control adapters of Flux.1 replace these norms' weights; diffusers loads them as `_load_norm_into_transformer` does.
_NORMS = (".norm_q", ".norm_k", ".norm_added_q", ".norm_added_k")

DIFFUSERS = Dialect(
    name="diffusers",
    format="diffusers",
    title="diffusers",
    places=tuple(
        Place(component, f"{component}.", LORA, saved=_NORMS if component == "transformer" else False)
        for component in COMPONENTS
    ),
    alpha=AlphaIn.CONFIG,
    convention="rank",
    vectors=True,
    exact_shapes=True,
    widens=True,
    example="unet.down_blocks.1.attentions.0.proj_in.lora_A.weight",
)
BEFORE_PEFT = Dialect(
    name="diffusers-lora",
    format="diffusers",
    title="diffusers before peft (.lora.down)",
    places=(Place("unet", "unet.", _PAIR), *_OLD_ENCODERS),
    alpha=AlphaIn.NOWHERE,
    convention="rank",
    exact_shapes=True,
    example="unet.down_blocks.1.attentions.0.proj_in.lora.down.weight",
)
MIXED = Dialect(
    name="diffusers-mixed",
    format="diffusers",
    title="diffusers with two spellings (attention as .lora.down, the rest as .lora_A)",
    places=(
        Place("unet", "unet.", (*_only_after(_PAIR, ".to_q", ".to_k", ".to_v", ".to_out.0"), *LORA)),
        *(
            Place(
                component,
                f"{component}.",
                (*_only_after(_ENCODER_PAIR, ".q_proj", ".k_proj", ".v_proj", ".out_proj"), *LORA),
            )
            for component in ("text_encoder", "text_encoder_2")
        ),
    ),
    alpha=AlphaIn.CONFIG,
    convention="rank",
    vectors=True,
    exact_shapes=True,
    example="unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora.down.weight",
)
PROCESSORS = Dialect(
    name="diffusers-attn",
    format="diffusers",
    title="diffusers attention processors",
    places=(Place("unet", "unet.", _PROCESSOR_PAIR, tails=_PROCESSOR_TAILS), *_OLD_ENCODERS),
    alpha=AlphaIn.NOWHERE,
    convention="rank",
    exact_shapes=True,
    example="unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight",
)
BARE_PROCESSORS = Dialect(
    name="diffusers-attn-bare",
    format="diffusers",
    title="diffusers attention processors without a component",
    places=(Place("unet", "", _PROCESSOR_PAIR, tails=_PROCESSOR_TAILS),),
    alpha=AlphaIn.NOWHERE,
    convention="rank",
    exact_shapes=True,
    example="mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.down.weight",
)

# guoyww/AnimateDiff (`animatediff/utils/convert_lora_safetensor_to_diffusers.py`, load_diffusers_lora), the same by its
# authors' names; kosinkadink/ComfyUI-AnimateDiff-Evolved reads it.
MOTION = replace(
    BARE_PROCESSORS,
    name="animatediff",
    title="AnimateDiff (motion LoRA)",
    places=(
        Place("unet", "", _PROCESSOR_PAIR, names="original", tails=_PROCESSOR_TAILS, only=frozenset({"animatediff"})),
    ),
    example="down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.0.processor.to_q_lora."
    "down.weight",
)

WITHOUT_PREFIX = Dialect(
    name="diffusers-down",
    format="diffusers",
    title="diffusers' names without a component, Kohya's factors",
    places=(Place("transformer", "", (*DOWN_UP, *LYCORIS)),),
    alpha=AlphaIn.TENSOR,
    convention="rank",
    example="transformer_blocks.0.attn.to_q.lora_down.weight",
)

WITH_ALPHA = replace(
    DIFFUSERS,
    name="diffusers-alpha",
    title="diffusers with alpha tensors",
    places=tuple(replace(p, suffixes=(*p.suffixes, Suffix(".alpha", ANY, "alpha"))) for p in DIFFUSERS.places),
    alpha=AlphaIn.TENSOR,
    example="transformer.transformer_blocks.0.attn.to_q.alpha",
)

DIFFSYNTH = Dialect(
    name="diffsynth",
    format="diffusers",
    title="diffusers' names without a component, peft's factors (DiffSynth)",
    # DiffSynth has its own classes: of these they have the authors' names, of Qwen-Image and others diffusers'.
    places=(
        Place(
            "transformer",
            "",
            LORA,
            names_in=dict.fromkeys(("wan_14b", "wan_animate_2_14b", "anima", "krea2", "ideogram4"), "original"),
        ),
    ),
    alpha=AlphaIn.NOWHERE,
    convention="rank",
    vectors=True,
    example="transformer_blocks.0.attn.to_q.lora_A.default.weight",
)

WITH_LYCORIS = Dialect(
    name="diffusers-lycoris",
    format="diffusers",
    title="diffusers' names with LyCORIS' tensors (ai-toolkit, OneTrainer)",
    places=(*(Place(component, f"{component}.", (*DOWN_UP, *LYCORIS)) for component in COMPONENTS), EMBEDDINGS),
    alpha=AlphaIn.TENSOR,
    convention="rank",
    example="transformer.transformer_blocks.0.attn.to_q.lokr_w1",
)

BUNDLED = replace(
    DIFFUSERS,
    name="diffusers-bundled",
    title="diffusers with bundled embeddings (OneTrainer)",
    places=(*DIFFUSERS.places, EMBEDDINGS),
    example="bundle_emb.ohwx.clip_l",
)

AI_TOOLKIT = Dialect(
    name="ai-toolkit",
    format="diffusers",
    title="ai-toolkit (differences, magnitudes and text encoders of its own spelling)",
    places=(
        *(
            Place(component, f"{component}.", (*LORA[:2], Suffix(".magnitude", "lora", "magnitude"), *DIFFERENCES[:2]))
            for component in ("unet", "transformer")
        ),
        *(
            Place(component, prefix, (*LORA[:2], Suffix(".magnitude", "lora", "magnitude")))
            for component, prefix in (
                ("text_encoder", "lora_te."),
                ("text_encoder", "lora_te1."),
                ("text_encoder_2", "lora_te2."),
            )
        ),
    ),
    alpha=AlphaIn.NOWHERE,
    convention="rank",
    vectors=True,
    written=False,
    example="transformer.transformer_blocks.0.attn.norm_q.diff",
)

# PixArt-alpha/PixArt-sigma `train_scripts/train_pixart_lora_hf.py` hands a PEFT model's state dict to Stable Diffusion's
# pipeline to save; Comfy reads it.
PIXART = Dialect(
    name="pixart-unet",
    format="diffusers",
    title="peft's names behind unet. (PixArt's own trainer)",
    places=(Place("transformer", "unet.base_model.model.", LORA, only=frozenset({"pixart_alpha"})),),
    alpha=AlphaIn.NOWHERE,
    convention="rank",
    vectors=True,
    written=False,
    example="unet.base_model.model.transformer_blocks.0.attn1.to_q.lora_A.weight",
)

# Without these, the dialect reads a file as the usual one does, and would only tie with it.
_MARKS: Mapping[Dialect, tuple[tuple[str, ...], tuple[str, ...]]] = {
    WITH_ALPHA: ((), (".alpha",)),
    BUNDLED: ((EMBEDDINGS.prefix,), ()),
    AI_TOOLKIT: (("lora_te.", "lora_te1.", "lora_te2."), (".diff", ".diff_b", ".magnitude")),
}
"""How keys begin, or end, of which a file has one at least that is to be read so."""

_LATER = "this version does not convert it"


class Diffusers(Format):
    """The diffusers file format."""

    name = "diffusers"
    title = "diffusers (pytorch_lora_weights.safetensors)"
    limits = (
        "A DoRA magnitude per input, and methods other than LoRA; `diffusers-down` has LyCORIS' too, as far as "
        "diffusers reads them, and `diffusers-lycoris` for the trainers that do.",
        "A scale that is not 1, in the spellings without alpha: `--fold-alpha` multiplies it in.",
    )
    dialects = (
        DIFFUSERS,
        BEFORE_PEFT,
        MIXED,
        PROCESSORS,
        BARE_PROCESSORS,
        MOTION,
        WITHOUT_PREFIX,
        WITH_ALPHA,
        DIFFSYNTH,
        WITH_LYCORIS,
        BUNDLED,
        AI_TOOLKIT,
        PIXART,
    )
    file_name = "pytorch_lora_weights.safetensors"
    # peft's wrapper, left in: https://github.com/bghira/SimpleTuner/issues/779.
    # DiffSynth-Studio's models stand in a pipeline as `dit`, whose name its trainer takes off only where it is told to
    # (`--remove_prefix_in_ckpt`, modelscope/DiffSynth-Studio `diffsynth/diffusion/training_module.py`).
    variants: ClassVar = {
        "transformer.": ("transformer.base_model.model.", "transformer_2."),
        "": ("pipe.dit.", "pipe.dit2.", "pipe.vace.", "pipe.vace2.", "dit.", "dit2.", "vace."),
    }
    # A PEFT model's state dict handed to `save_lora_weights`.  PixArt's trainer does so too, of what is no UNet.
    botched = {
        r"^unet\.base_model\.model\.(?=(down|mid|up)_blocks?\.|conv_|time_)": "unet.",
        r"^(text_encoder(_2)?|transformer)\.base_model\.model\.": r"\1.",
    }
    foreign = {
        r"^(controlnet|vae|image_encoder|image_proj)\.": "belongs to a component that no format here converts",
        r"^transformer_2\.": "belongs to the second expert of a pair (Wan 2.2's, for low noise), beside keys of the first, and "
        "readers take a file an expert: --rename '^transformer\\.(.*)\\.lora_=first.\\1.' --allow-drop leaves the second's, and "
        "--rename '^transformer_2\\.(.*)\\.lora_=second.\\1.' --allow-drop the first's",
        r"^lora_controlnet$": f"is a Stability control-LoRA; {_LATER}",
    }

    def recognise(self, source: Source, dialects: Sequence[Dialect]) -> list[Reading]:
        if len(dialects) > 1:
            idle = [
                dialect
                for dialect, (heads, ends) in _MARKS.items()
                if not any(key.startswith(heads) or key.endswith(ends) for key in source.tensors)
            ]
            # What has a PEFT config beside it, or in its header, is PEFT's, whatever its keys lack.
            idle += [DIFFSYNTH] if with_own_config(source).config is not None else []
            dialects = [d for d in dialects if d not in idle]
        readings = list(map(_unwrapped, of_adapters(super().recognise(source, dialects))))
        # A header that says scales is read by those dialects that have one, where they read every key too.
        telling = [r for r in readings if r.dialect.alpha is AlphaIn.CONFIG and not r.unclaimed]
        return telling if telling and HEADER_CONFIG in source.metadata else readings

    def read(self, source: Source, reading: Reading, request: Request) -> Adapter:
        adapter = self._read(source, reading, request)
        told = _unwrapping_told(reading)
        if not told:
            return adapter
        provenance = replace(adapter.provenance, notes=(*adapter.provenance.notes, *told))
        return replace(adapter, provenance=provenance)

    def _read(self, source: Source, reading: Reading, request: Request) -> Adapter:
        check_given(request.fields)
        told = reading.dialect.alpha is AlphaIn.CONFIG or reading.dialect is WITH_ALPHA
        if not told or HEADER_CONFIG not in source.metadata:
            refuse_scale(request.fields, f"{reading.dialect.title} without a header")
            trained = _trained_alpha(source)
            wanted = trained if request.alpha == "header" else None

            def trained_rule(component: str, module: str, rank: int) -> ScaleRule:
                return ScaleRule(wanted, source=f"header {FINETRAINERS}")

            read = read_by_table(reading, source, request, trained_rule, component_of=_naming(request))
            return _training_told(_renaming_told(_expert_told(read, reading)), trained)
        configs = _header_configs(source, request)

        def rule(component: str, module: str, rank: int) -> ScaleRule:
            config = configs.get(component)
            return config.rule(module) if config is not None else ScaleRule()

        adapter = read_by_table(reading, source, request, rule, component_of=_naming(request))
        adapter = _renaming_told(_expert_told(adapter, reading))
        for component, config in configs.items():
            own = [u for u in adapter.as_stated() if u.component == component]
            describes(config.fields, config.where, own, lambda sentence: request.wrong(errors.Conflict(sentence)))
        silent = [c for c in adapter.components if c not in configs]
        notes = [f"the header's {HEADER_CONFIG} says nothing of {c}: scale 1 is assumed" for c in silent]
        notes += [
            f"the header's {HEADER_CONFIG} speaks of {c}, of which the file has nothing"
            for c in configs
            if c not in adapter.components
        ]
        mutated = next((config.mutated_init for config in configs.values() if config.mutated_init), None)
        provenance = replace(adapter.provenance, notes=(*adapter.provenance.notes, *notes))
        # The header's other fields (dropout, base model …) travel on, as those of a PEFT folder do.
        own_fields = {c: dict(config.fields) for c, config in configs.items() if c in adapter.components}
        return replace(adapter, config={**adapter.config, **own_fields}, provenance=provenance, mutated_init=mutated)

    def write(self, adapter: Adapter, target: Target) -> Output:
        insist_on_modules(adapter, target)
        spelled = self.spell(adapter, target)
        kept = spelled.adapter
        metadata = header(kept)
        notes = [
            *spelled.notes,
            *embeddings_told(kept, "diffusers refuses a LoRA's file that has any; OneTrainer reads it"),
        ]
        if target.dialect.alpha is AlphaIn.CONFIG and not _plain(kept):
            metadata[HEADER_CONFIG] = _write_header(kept, target)
            notes.append(
                "the scale stands in the header (lora_adapter_metadata): diffusers reads it there, Comfy does not and "
                "would apply scale 1; --fold-alpha bakes it in for both, --to comfy keeps it in tensors"
            )
        file = OutputFile("", spelled.tensors, metadata)
        return Output((file,), tuple(spelled.kept), tuple(spelled.dropped), tuple(notes))


_DDP = "module."


def _unwrapped(reading: Reading) -> Reading:
    """The reading without what peft, `torch.compile` and distributed training put around a pipeline's model.

    diffusers' own LCM distillation saves a PEFT model's state dict so
    (`examples/consistency_distillation/train_lcm_distill_lora_sd_wds.py`).
    """
    reading = without_wrappers(reading)
    named = [claim for claim in reading.claims if claim.name]
    if not named or not all(claim.name.startswith(_DDP) for claim in named):
        return reading
    return reading._replace(claims=tuple(c._replace(name=c.name.removeprefix(_DDP)) for c in reading.claims))


def _unwrapping_told(reading: Reading) -> list[str]:
    """A note on names that `_unwrapped` changed."""
    usual = {reading.prefix, *(place.prefix for place in reading.dialect.places)}
    named = (c for c in reading.claims if c.name and c.name in c.key)
    changed = next((c for c in named if c.key.rpartition(c.name)[0] not in usual), None)
    if changed is None:
        return []
    return [f"tensor {changed.key!r} and others are read as of {changed.name} and the like"]


_INSTALLED, _PUBLISHED = "encoder.layers.", "text_model."
"""How the modules of CLIPTextModel begin in transformers 5, and what stood before that until then and in checkpoints."""


def _published(groups: list[Group]) -> list[Group]:
    """The groups of a pipeline's file with the first text encoder's modules under their published names.

    A file for the text encoder alone is left as it is: its names are those of the class that it was trained on.
    """
    own = {id(g) for g in groups if g.place.component == "text_encoder" and g.name.startswith(_INSTALLED)}
    if not own or all(g.place.component == "text_encoder" for g in groups):
        return groups
    return [g._replace(name=_PUBLISHED + g.name, stated=g.name) if id(g) in own else g for g in groups]


def _naming(request: Request) -> Callable[[list[Group]], list[Group]] | None:
    """Names are those of the base that the user gave, if one was given."""
    return _published if request.architecture is None else None


_SECOND = ("transformer_2.", "pipe.dit2.", "dit2.", "pipe.vace2.")
"""How keys begin that are for the second of two experts."""


def _expert_told(adapter: Adapter, reading: Reading) -> Adapter:
    if reading.prefix not in _SECOND:
        return adapter
    note = (
        f"{reading.prefix}…: for the second expert of a pair (Wan 2.2's, for low noise); readers take a file an expert, and "
        "diffusers this one with load_into_transformer_2=True"
    )
    return replace(adapter, provenance=replace(adapter.provenance, notes=(*adapter.provenance.notes, note)))


def _renaming_told(adapter: Adapter) -> Adapter:
    if not any(name.startswith(_INSTALLED) for name in adapter.provenance.stated.values()):
        return adapter
    note = "text_encoder: its modules are named as in transformers 5; they go by their published names (text_model.…)"
    return replace(adapter, provenance=replace(adapter.provenance, notes=(*adapter.provenance.notes, note)))


def _plain(adapter: Adapter) -> bool:
    """Whether every scale is 1, so that readers need no header."""
    return all(
        u.alpha is not None and u.alpha.value == u.tensors["B"].shape[1] and not u.rslora
        for u in adapter
        if u.method == "lora"
    )


def _header_configs(source: Source, request: Request) -> dict[str, PeftConfig]:
    text = source.metadata.get(HEADER_CONFIG)
    if text is None:
        return {}
    where = f"{source.path}: header {HEADER_CONFIG}"
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise errors.UnreadableFile(f"{where} is not JSON: {error}") from error
    if not isinstance(value, Mapping):
        raise errors.UnreadableFile(f"{where} must be a JSON object")
    split: dict[str, dict[str, Any]] = {}
    for key, field_value in value.items():
        component, _, name = str(key).partition(".")
        split.setdefault(component, {})[name] = field_value
    return {
        component: PeftConfig.parse({**fields, **request.fields}, where)
        for component, fields in split.items()
        if component in COMPONENTS
    }


def _trained_alpha(source: Source) -> float | None:
    """The alpha that finetrainers trained with, where the header says it."""
    try:
        value = json.loads(source.metadata.get(FINETRAINERS, "null"))
    except (ValueError, RecursionError):
        return None  # another program's entry of that name
    alpha = value.get("lora_alpha") if isinstance(value, Mapping) else None
    return float(alpha) if is_number(alpha) else None


def _training_told(adapter: Adapter, trained: float | None) -> Adapter:
    """With a note, where the training's scale is another than the one that readers apply."""
    ranks = {rank for update in adapter if (rank := METHODS[update.method].rank(update)) and update.method == "lora"}
    taken = any(update.alpha is not None and update.alpha.certainty is Certainty.READ for update in adapter)
    if trained is None or taken or ranks <= {trained}:
        return adapter
    note = (
        f"the header's {FINETRAINERS} says that finetrainers trained with alpha {trained:g} (rank "
        f"{', '.join(map(str, sorted(ranks)))}), which diffusers does not read: it applies scale 1, and that is kept; "
        "--alpha header takes the training's"
    )
    return replace(adapter, provenance=replace(adapter.provenance, notes=(*adapter.provenance.notes, note)))


def _write_header(adapter: Adapter, target: Target) -> str:
    value: dict[str, Any] = {}
    for component in adapter.components:
        base = target.architecture.components.get(component) if target.architecture else None
        fields = from_updates(
            adapter.of(component),
            set(base.modules) | base.bare if base else None,
            base.optional_prefix if base else "",
        )
        value.update({f"{component}.{name}": v for name, v in fields.items()})
    return json.dumps(value, sort_keys=True, indent=2)


FORMAT = Diffusers()
