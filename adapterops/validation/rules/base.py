"""Modules against the base model, and the base model against what the file says of it."""

from __future__ import annotations

import re
from collections.abc import Iterator

from adapterops.adapter import Certainty
from adapterops.validation.registry import Checker, checker
from adapterops.validation.rule import Finding, Needs, Rule, Severity
from adapterops.validation.subject import Subject

UNKNOWN_MODULE = Rule(
    "B301",
    "unknown-module",
    Severity.ERROR,
    why="The base model has no module of that name, so a loader drops the tensors or refuses the file.",
    remedy="If the base is another model, name it with --arch or --base; if the keys are botched, adapterops convert --rename "
    "PATTERN=REPLACEMENT repairs them.",
    fires="lora_unet_down_blocks_7_attentions_0_…_to_q beside modules of Stable Diffusion 1.5, which has 4 down blocks",
    passes="lora_unet_down_blocks_0_attentions_0_…_to_q",
    faults=("unknown-module",),
)
OTHER_SHAPE = Rule(
    "B302",
    "other-shape",
    Severity.ERROR,
    why="The factors make a change of another shape than the module's weight has, so a loader fails or skips the module.",
    remedy="If the base is another model (another size of the same family, say), name it with --arch or --base.",
    fires="…attn2_to_k with lora_down [4, 1024] (Stable Diffusion 2) beside modules of Stable Diffusion 1.5, where it takes 768",
    passes="…attn2_to_k with lora_down [4, 768]",
    faults=("other-shape",),
)
UNKNOWN_BASE = Rule(
    "B303",
    "unknown-base",
    Severity.INFO,
    why="The names belong to some base model, and to none that adapterops knows, so neither names nor shapes could be checked.",
    remedy="Name the base: --arch NAME (adapterops architectures lists them), or --base with its config.json or its weights.",
    fires="lora_unet_some_block_q.lora_down.weight",
    passes="lora_unet_down_blocks_0_attentions_0_…_to_q.lora_down.weight",
    faults=("unknown-architecture",),
)
OTHER_BASE = Rule(
    "B304",
    "other-base",
    Severity.ERROR,
    why="The config, header or card declares one base model and the modules are another's, so whoever follows the declaration "
    "loads the adapter into a model that it does not fit.",
    remedy="Correct the declaration, or put the file where it belongs.",
    fires='"modelspec.architecture": "stable-diffusion-xl-v1-base/lora" beside modules of Stable Diffusion 1.5',
    passes='"modelspec.architecture": "stable-diffusion-v1/lora" beside the same',
    needs=Needs.FILES,
)

_DECLARED = (
    # `ss_base_model_version` and `modelspec.architecture` of sd-scripts (library/sai_model_spec.py, train_util.py), and the
    # names on the Hub of the models themselves: what was made from them has names that tell nothing.
    (r"sd_v1\w*|stable-diffusion-v1(/.*)?", "sd1"),
    (r"sd_v2\w*|stable-diffusion-v2-(512|768-v)(/.*)?", "sd2"),
    (r"sdxl_base_\S*|stable-diffusion-xl-v1-base(/.*)?", "sdxl"),
    *((r"sd3\w*|stable-diffusion-3(/.*)?", either) for either in ("sd3", "sd35_medium", "sd35_large")),
    (r"stable-diffusion-3-m(edium)?(/.*)?", "sd3"),
    (r"(stable-diffusion-3[-.])?5-medium(/.*)?", "sd35_medium"),
    (r"(stable-diffusion-3[-.])?5-large(/.*)?", "sd35_large"),
    (r"flux1|flux-1-(dev|schnell)(/.*)?", "flux"),
    (r"(runwayml|CompVis|sd-legacy|stable-diffusion-v1-5|benjamin-paine)/stable-diffusion-v1-\d", "sd1"),
    (r"(stabilityai|sd2-community)/stable-diffusion-2(-1)?(-base)?", "sd2"),
    (r"stabilityai/stable-diffusion-xl-base-\S+", "sdxl"),
    (r"stabilityai/stable-diffusion-3-\S+", "sd3"),
    (r"stabilityai/stable-diffusion-3\.5-medium\S*", "sd35_medium"),
    (r"stabilityai/stable-diffusion-3\.5-large\S*", "sd35_large"),
    (r"black-forest-labs/FLUX\.1-\S+", "flux"),
    (r"Qwen/Qwen-Image\S*", "qwen_image"),
    (r"Wan-AI/Wan2\.1-T2V-1\.3B\S*", "wan_1_3b"),
    (r"Wan-AI/Wan2\.\d-T2V-A?14B\S*", "wan_14b"),
    (r"Wan-AI/Wan2\.1-I2V-14B\S*", "wan_14b_i2v"),
    (r"Wan-AI/Wan2\.2-TI2V-5B\S*", "wan_5b"),
    (r"Tongyi-MAI/Z-Image\S*", "z_image"),
)
"""What files call base models, as whole words, and the built-in architecture that it is; one of several where it has more
than one row."""
_CARD_BASE = re.compile(r"^base_model:[ \t]*(?:\n[ \t]*-[ \t]*)?[\"']?([^\s\"'#]+)", re.MULTILINE)


@checker(OTHER_BASE)
def declared(subject: Subject) -> Iterator[Finding]:
    """The identified base model against every declaration."""
    adapter = subject.adapter
    if adapter is None or adapter.architecture.certainty is not Certainty.DERIVED or not adapter.architecture.value:
        return  # the user's word, or one of several that fit
    found = adapter.architecture.value
    for place, file, value in _declarations(subject):
        said = [arch for pattern, arch in _DECLARED if re.fullmatch(pattern, value, re.IGNORECASE)]
        if said and found not in said:
            yield OTHER_BASE.found(
                file,
                f"{place} is {value[:80]!r} ({said[0]}), but the modules and their shapes are those of {found}",
                field=place,
            )
            return


def _declarations(subject: Subject) -> Iterator[tuple[str, str, str]]:
    """What the config, the header and the card call the base: the field, the file, the name."""
    base = (subject.config or {}).get("base_model_name_or_path")
    if isinstance(base, str):
        yield "base_model_name_or_path", subject.config_path, base
    for field in ("modelspec.architecture", "ss_base_model_version"):
        if field in subject.metadata:
            yield field, subject.weights, subject.metadata[field]
    card = subject.text("README.md") if subject.is_folder else None
    if card is not None and card.startswith("---"):
        match = _CARD_BASE.search(card.partition("\n---")[0])
        if match:
            yield "base_model", f"{subject.place.folder.path}/README.md", match[1]


RULES: tuple[Rule, ...] = (UNKNOWN_MODULE, OTHER_SHAPE, UNKNOWN_BASE, OTHER_BASE)
CHECKERS: tuple[Checker, ...] = (declared,)
