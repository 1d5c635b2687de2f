"""Which keys of an adapter diffusers' loaders stumble over, as `diffusers_reads` has it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator

from adapterops.adapter import Update
from adapterops.architectures import Component
from adapterops.validation.rules.diffusers_reads import (
    LOKR,
    Alphas,
    Reads,
    loader_of,
    matches,
    row,
    spellings,
)
from adapterops.validation.rules.loader_facts import architecture, first_key, in_files, same, scale
from adapterops.validation.subject import Subject

_FACTORS = ("lora", "lokr")
_ALPHA = ".alpha"
_T5 = ("lora_te2_", "lora_te3_", "text_encoders.t5xxl.")
_OLD_PAIR = re.compile(r"\.lora\.(down|up)\.weight$")


def reading(subject: Subject) -> Reads | None:
    """What diffusers makes of the file: of its LoKr, where it has any and the loader takes LoKr, else of its LoRA.  Of PEFT's
    files it never takes anything but LoRA."""
    methods = {update.method for update in subject.updates}
    if subject.dialect == "peft" and methods != {"lora"}:
        return None
    lokr = row(subject, LOKR)
    return lokr if lokr is not None and "lokr" in methods else row(subject)


def unread(*dialects: str, anywhere: bool = False) -> Callable[[Subject], list[str]]:
    """All keys, of files in one of the dialects that diffusers does not read for their base; or (`anywhere`) whatever their
    base."""

    def meets(subject: Subject) -> list[str]:
        if subject.dialect not in dialects or reading(subject) is not None:
            return []
        return list(subject.tensors) if anywhere or spellings(subject) else []

    return meets


def pairs_behind_a_component(subject: Subject) -> list[str]:
    """The factors of LoRAs in LyCORIS' spelling behind a component's name, where diffusers does not read that."""
    if subject.dialect != "diffusers-lycoris" or not spellings(subject) or row(subject) is not None:
        return []
    return [key for update in subject.updates if update.method == "lora" for key in _keys(update)]


def signless(subject: Subject) -> list[str]:
    """All keys, of files that lack the key by which diffusers knows their spelling."""
    read = reading(subject)
    if read is None or not read.sign or any(matches(read.sign, key) for key in subject.tensors):
        return []
    return list(subject.tensors)


def of_modules(column: str, *but: str) -> Callable[[Subject], list[str]]:
    """The keys of the factors on modules that a column's pattern fits, of all families of bases `but` some."""

    def meets(subject: Subject) -> list[str]:
        read = reading(subject)
        if read is None or architecture(subject) in but:
            return []
        pattern = getattr(read, column)
        return [
            key
            for update in subject.updates
            if update.method in _FACTORS and _denoises(update) and matches(pattern, update.module)
            for key in _keys(update)
        ]

    return meets


def refused_alphas(subject: Subject) -> list[str]:
    """The alpha tensors that diffusers takes for no part of a LoRA."""
    read = reading(subject)
    if read is None or read.alphas is not Alphas.REFUSED:
        return []
    alphas = [key for key in subject.tensors if key.endswith(_ALPHA)]
    if not read.alphas_of or not alphas:
        return alphas
    own = [key for u in subject.updates if matches(read.alphas_of, u.module) for key in _keys(u)]
    stems = {key[: found.start()] for key in own for found in re.finditer(r"\.", key)}
    return [key for key in alphas if key.removesuffix(_ALPHA) in stems]


def ignored_alphas(subject: Subject) -> list[str]:
    """The modules with another scale than 1, of files whose alphas diffusers does not look at."""
    read = reading(subject)
    if read is None or read.alphas is not Alphas.IGNORED:
        return []
    scales = ((first_key(update), scale(update)) for update in subject.updates if update.method == "lora")
    return [key for key, value in scales if value is not None and not same(value, 1.0)]


def incomplete(subject: Subject) -> list[str]:
    """All keys, of files that lack a module on which diffusers' converter insists."""
    read, component = reading(subject), _transformer(subject)
    if read is None or not read.whole or component is None:
        return []
    has = {name for u in subject.updates if u.method == "lora" for name in _parts(u, component)}
    wanted = dict(_wanted(read, component))
    blocks = Counter(kind for kind, _ in {wanted[name] for name in has & wanted.keys()})
    together = any(matches(read.optional, name) for name in has)
    missing = (
        name
        for name, (kind, number) in wanted.items()
        if name not in has
        and (together or not matches(read.optional, name))
        and not (read.counted and number >= blocks[kind])
    )
    return list(subject.tensors) if next(missing, None) is not None else []


def _wanted(read: Reads, component: Component) -> Iterator[tuple[str, tuple[str, int]]]:
    """The modules of the base that must be there, each with what stands before its block's number, and the number."""
    for name, spec in component.modules.items():
        found = re.search(read.whole, name) if spec.kind == "linear" else None
        if found is not None:
            at = found.start(1) if found[1] is not None else len(name)
            yield name, (name[:at], int(found[1] or 0))


def flux_t5(subject: Subject) -> list[str]:
    """The tensors of Flux.1's T5 in the spellings that the converter of Kohya's files reads."""
    if architecture(subject) != "flux" or subject.dialect not in ("kohya", "comfy-down"):
        return []
    return [key for key in subject.tensors if key.startswith(_T5)]


def other_components(subject: Subject) -> list[str]:
    """The keys of components that the pipeline's loader gives no adapters, but for Flux.1's T5, which has a rule of its own."""
    loader, read = loader_of(subject), reading(subject)
    if loader is None or read is None:
        return []
    taken = loader.components[:1] if read.alone else loader.components
    own = [u for u in subject.updates if u.component not in (*taken, "embeddings")]
    keys = [key for update in own for key in _keys(update)]
    if subject.dialect == "ai-toolkit":
        keys += [key for key in subject.tensors if key.startswith("lora_te")]
    told = set(flux_t5(subject))
    return [key for key in keys if key not in told]


def loaderless(subject: Subject) -> list[str]:
    """All keys, of files for bases whose pipelines load no LoRA."""
    loader = loader_of(subject)
    return [] if loader is None or loader.mixin else list(subject.tensors)


def differences(subject: Subject) -> list[str]:
    """The keys of whole differences; but for what the converter of Comfy's Wan files makes factors and their bias of."""
    read = in_files(subject, "diff")
    if not read or architecture(subject) != "wan_14b" or subject.dialect not in ("comfy", "comfy-down"):
        return read
    factored = {(u.component, u.module) for u in subject.updates if u.method == "lora"}
    taken = {
        key
        for u in subject.updates
        if u.method == "diff"
        and (
            (u.tensors.keys() == {"bias"} and (u.component, u.module) in factored)
            or (u.tensors.keys() == {"weight", "bias"} and u.module == "proj_out")
        )
        for key in _keys(u)
    }
    return [key for key in read if key not in taken]


def after_todays(subject: Subject) -> list[str]:
    """The pairs of the older spelling, in files whose first key of the denoiser is in today's."""
    if subject.dialect != "diffusers-mixed":
        return []
    keys = [key for update in subject.updates if _denoises(update) for key in _keys(update)]
    first = next((key for key in subject.tensors if key in set(keys)), "")
    return [key for key in keys if _OLD_PAIR.search(key)] if ".lora_A." in first else []


def _denoises(update: Update) -> bool:
    return update.component in ("unet", "transformer")


def _keys(update: Update) -> list[str]:
    return [tensor.key for tensor in update.tensors.values()]


def _transformer(subject: Subject) -> Component | None:
    base = subject.adapter.base if subject.adapter is not None else None
    return base.components.get("transformer") if base is not None else None


def _parts(update: Update, component: Component) -> list[str]:
    """The canonical modules that an update acts on."""
    fused = component.fused.get(update.module)
    return [update.module] if fused is None else [name for name, _, _ in fused.joins]
