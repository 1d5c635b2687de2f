"""sd-scripts' OFT of Flux.1: a list of blocks a module, with one entry for each part of a fused projection.

    oft_unet_double_blocks_0_img_attn_qkv.oft_blocks.0 … .2    q, k and v: (k, n/k, n/k) for the n outputs of each
    oft_unet_single_blocks_0_linear1.oft_blocks.0 … .3         q, k, v and the MLP's, which has more outputs
    oft_unet_double_blocks_0_img_attn_proj.oft_blocks.0        everything else

Each part is turned and bounded by itself, alpha times its own outputs, so it is LyCORIS' OFT of that part: files are read as
updates of the parts.  What sd-scripts merges of its own files fails ("list has no attribute to"); its forward is what is meant.

Source: kohya-ss/sd-scripts `networks/oft_flux.py` (`OFTModule.get_weight`, `forward`, `create_modules`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from adapterops_formats.lycoris_names import SCALE

from adapterops.plugin import (
    Adapter,
    AlphaIn,
    Architecture,
    Component,
    Dialect,
    Group,
    LazyTensor,
    ModuleSpec,
    Place,
    Request,
    Suffix,
    Target,
    Update,
    built_in_named,
    errors,
)

_PREFIX = "oft_unet_"
_ENTRIES = 4
_SUFFIXES = (
    Suffix(".oft_blocks.0", "lycoris_oft", "blocks"),
    *(Suffix(f".oft_blocks.{at}", "lycoris_oft", f"blocks.{at}") for at in range(1, _ENTRIES)),
    SCALE[0],
)
_ONLY = frozenset({"flux"})
SD_SCRIPTS_OFT_FLUX = Dialect(
    name="sd-scripts-oft-flux",
    format="kohya",
    title="OFT of sd-scripts for Flux.1",
    places=(Place("transformer", _PREFIX, _SUFFIXES, names="original", flat=True, only=_ONLY),),
    alpha=AlphaIn.TENSOR,
    convention="rank",
    example="oft_unet_double_blocks_0_img_attn_proj.oft_blocks.0",
)
_APART = Place("transformer", _PREFIX, _SUFFIXES, only=_ONLY)
"""Where the parts of a fused projection are put, which have diffusers' names."""


def parts_of(groups: Iterable[Group], request: Request) -> list[Group]:
    """The groups with those of fused projections taken apart.

    What is wrong with a list is told to `request`, and its module is left out.
    """
    wholes = _wholes(request.architecture)
    out: list[Group] = []
    for group in groups:
        try:
            out += _apart(group, wholes.get(group.name))
        except errors.BrokenAdapter as error:
            request.wrong(error, (tensor.key for tensor in group.tensors.values()))
    return out


def _apart(group: Group, whole: ModuleSpec | None) -> Iterator[Group]:
    """A group for each entry of a list.  Raises `BrokenAdapter` for a list that has not one for each part."""
    entries = {role: t for role, t in group.tensors.items() if role.partition(".")[0] == "blocks"}
    rest = {role: t for role, t in group.tensors.items() if role not in entries}
    parts = _names(whole) if whole is not None else [group.name]
    roles = [f"blocks.{at}" if at else "blocks" for at in range(len(parts))]
    if entries and set(roles) != entries.keys():
        stray = next(iter(entries.values()))
        raise errors.BrokenAdapter(
            f"{stray.where}: {len(entries)} entries of {group.name}, whose weight has {len(parts)} parts in sd-scripts' OFT of "
            "Flux.1; some are missing, or it is another module's",
            fault="missing-half",
        )
    for part, role in zip(parts, roles, strict=True):
        tensors = {**({"blocks": entries[role]} if entries else {}), **rest}
        yield group._replace(name=part, place=_APART if whole is not None else group.place, tensors=tensors)


def lists(adapter: Adapter, target: Target) -> tuple[list[Update], dict[str, LazyTensor]]:
    """The updates that stand in a list beside others, and the tensors of those lists.

    Raises `CannotRepresent` for a fused projection as a whole, and where a part has no update.
    """
    wholes = _wholes(target.architecture)
    for update in adapter:
        if update.module in {spec.name for spec in wholes.values()}:
            raise errors.CannotRepresent(
                f"{update.name}: sd-scripts' OFT of Flux.1 turns the parts of this projection one by one, and this turns it as "
                "a whole; --to kohya holds it as LyCORIS has it"
            )
    own: list[Update] = []
    tensors: dict[str, LazyTensor] = {}
    modules = {update.module: update for update in adapter}
    for name, spec in wholes.items():
        parts = _names(spec)
        found = [modules[part] for part in parts if part in modules]
        if not found:
            continue
        if len(found) < len(parts):
            lacking = next(part for part in parts if part not in modules)
            raise errors.CannotRepresent(
                f"{found[0].name}: {lacking} has no update, and sd-scripts' OFT of Flux.1 has one list for both; --to kohya "
                "holds it as LyCORIS has it"
            )
        stem = _PREFIX + name
        own += found
        tensors |= {f"{stem}.oft_blocks.{at}": update.tensors["blocks"] for at, update in enumerate(found)}
        tensors[f"{stem}.alpha"] = found[0].tensors["constraint"]
    return own, tensors


def _wholes(given: Architecture | None) -> Mapping[str, ModuleSpec]:
    """The fused projections of several parts by their flat names: those of the base, or else of Flux.1 as it is built in."""
    base = given or built_in_named("flux")
    transformer: Component | None = base.components.get("transformer")
    fused = transformer.fused.values() if transformer is not None else ()
    return {s.original.replace(".", "_"): s for s in fused if not s.partial and len(_names(s)) > 1}


def _names(spec: ModuleSpec) -> list[str]:
    """The parts of a fused projection, in the order of its rows."""
    return list(dict.fromkeys(name for name, _, _ in spec.joins))
