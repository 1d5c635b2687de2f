"""CLIP-LoRA: the few-shot adapters of OpenAI's CLIP, a checkpoint `{"weights": …, "metadata": …}`.

    layer_0.q_proj.w_lora_A      (r, width)
    layer_0.q_proj.w_lora_B      (width, r)
    layer_0.proj.w_lora_A        the attention's output

Layers are numbered in the order in which the program wraps them: those of the text encoder first, then those of the image
encoder; which these are, `metadata` says by words (`encoder`: text, vision or both; `position`: all, up, half-up …).  The
scale is alpha/√r, as it is for rsLoRA.  The program takes CLIP's fused `in_proj` apart before it trains, so a file's modules
are transformers' of CLIPModel, and `--to peft` writes it for that.  Where `metadata` is missing (weights saved again), `--alpha`,
`--set encoder=…` and `--set position=…` say it.

Source: MaxZanella/CLIP-LoRA `loralib/utils.py` (`apply_lora`, `save_lora`, `load_lora`, `INDEX_POSITIONS_TEXT`,
`INDEX_POSITIONS_VISION`), `loralib/layers.py` (`LoRALayer`, `PlainMultiheadAttentionLoRA`).
CLIP-MoLE: qinyong123456/CLIP-LoRA, the same files (`save_lora`, `MultiLinearLoRA`, `Router`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from adapterops_formats.torch_native import ReadOnly

from adapterops.plugin import (
    Adapter,
    AlphaIn,
    Certainty,
    Dialect,
    Group,
    Place,
    Reading,
    Request,
    ScaleRule,
    Source,
    Suffix,
    errors,
    is_number,
    read_by_table,
)

_METADATA = "metadata"
_LARGE = 1024
"""The width of ViT-L's image encoder."""
_THIRDS: Mapping[str, range] = {"bottom": range(4), "mid": range(4, 8), "up": range(8, 12)}
_HALVES: Mapping[str, range] = {"half-up": range(6, 12), "half-bottom": range(6)}
_OF_TWELVE: Mapping[str, range] = {
    "all": range(12),
    **_HALVES,
    "top": range(11, 12),
    "top1": range(11, 12),
    "top2": range(10, 12),
    "top3": range(9, 12),
    **_THIRDS,
}
"""The layers that a word means: of every text encoder, and of the image encoders of ViT-B."""
_OF_VIT_L: tuple[Mapping[str, range], ...] = (
    {"all": range(24), "half-up": range(12, 24), "half-bottom": range(12)},
    {"all": range(21), **_HALVES, **_THIRDS},
)
"""Of ViT-L's image encoder, today and before commit e6bf706 (2024-09-12).  No word means as many in both: the number of
layers tells which."""
_ENCODERS: Mapping[str, tuple[str, ...]] = {"text": ("text",), "vision": ("vision",), "both": ("text", "vision")}
CLIP_LORA = Dialect(
    name="clip-lora",
    format="clip-lora",
    title="CLIP-LoRA",
    places=(
        Place(
            "model",
            "layer_",
            tuple(Suffix(f".w_lora_{role}", "lora", role) for role in "AB"),
            tails=(
                *((f".self_attn.{part}_proj", f".{part}_proj") for part in "qkv"),
                (".self_attn.out_proj", ".proj"),
            ),
            sure=True,
        ),
    ),
    alpha=AlphaIn.CONFIG,
    convention="unknown",
    exact_shapes=True,
    written=False,
    example="layer_0.q_proj.w_lora_A",
)


class ClipLora(ReadOnly):
    """CLIP-LoRA's checkpoints."""

    name = "clip-lora"
    title = "CLIP-LoRA (lora_weights.pt)"
    limits = ("It is read and not written: the program loads pickles.",)
    dialects = (CLIP_LORA,)
    file_name = "lora_weights.safetensors"
    own_fields: ClassVar[frozenset[str]] = frozenset({"encoder", "position"})
    foreign: ClassVar = {
        r"^layer_\d+\.(?:[qkv]_)?proj\.expert_\d+\.w_lora_[AB]$": "is an expert of CLIP-MoLE, whose experts a router mixes "
        "anew for every token; its checkpoints leave the router out, so that no update follows from them"
    }
    why_not_written = "the program loads adapters from its own checkpoints, which are pickles; --to peft holds it"

    def read(self, source: Source, reading: Reading, request: Request) -> Adapter:
        said = _said(source)
        where = f"{source.path}: its {_METADATA}"

        def rule(component: str, module: str, rank: int) -> ScaleRule:
            stated = said.get("r")
            if stated is not None and stated != rank:
                request.wrong(
                    errors.Conflict(f"{where} says r {stated!r:.40}, and the factors of {module} have rank {rank}")
                )
            return ScaleRule(_alpha(said, where), True, Certainty.READ, f"{_METADATA} of {source.path}")

        def named(groups: list[Group]) -> list[Group]:
            heads = {entry.name.partition(".")[0] for entry in groups}
            layers = _layers(groups, said | {k: v for k, v in request.fields.items() if k in self.own_fields}, where)
            if set(layers) != heads:
                raise errors.BrokenAdapter(
                    f"{source.path}: its layers are {_listed(heads)}, and by encoder and position they should be 0 to "
                    f"{len(layers) - 1}; some are missing, or the settings are another file's",
                    fault="other-shape",
                )
            return [
                entry._replace(name=f"{layers[head]}.{rest}")
                for entry in groups
                for head, _, rest in [entry.name.partition(".")]
            ]

        return read_by_table(reading, source, request, rule, component_of=named)


def _said(source: Source) -> dict[str, Any]:
    """What the checkpoint says of itself.  Raises `UnreadableFile` for metadata that are no table."""
    value = source.beside.get(_METADATA, {})
    if not isinstance(value, Mapping):
        raise errors.UnreadableFile(
            f"{source.path}: its {_METADATA} must be a table, not a {type(value).__name__}", fault="config-type"
        )
    return dict(value)


def _alpha(said: Mapping[str, Any], where: str) -> float | None:
    """Alpha; None where nothing says it.  Raises `UnreadableFile` for one that is no number."""
    value = said.get("alpha")
    if value is None:
        return None
    if not is_number(value):
        raise errors.UnreadableFile(f"{where} says alpha {value!r:.40}, which is no number", fault="config-type")
    return float(value)


def _layers(groups: Sequence[Group], said: Mapping[str, Any], where: str) -> dict[str, str]:
    """The number of each layer that is in the file, and its name in transformers' CLIPModel.

    Raises `UnknownFact` where encoder or position are not said and do not follow, `UnreadableFile` for values that the program
    has not.
    """
    widths: dict[str, int] = {}
    for entry in groups:
        shape = next(iter(entry.tensors.values())).shape
        a = entry.tensors.get("A")
        widths.setdefault(
            entry.name.partition(".")[0], a.shape[-1] if a is not None and a.shape else max(shape, default=0)
        )
    largest = max(widths.values(), default=0)
    encoder, position = said.get("encoder"), said.get("position")
    if encoder is None or position is None:
        encoder, position = _everything(list(widths.values()), encoder, position, groups)
    if not isinstance(encoder, str) or encoder not in _ENCODERS:
        raise errors.UnreadableFile(
            f"{where} (or --set) says encoder {encoder!r:.40}, which is none of {', '.join(_ENCODERS)}",
            fault="config-type",
        )
    known = _orders(_ENCODERS[encoder], position, largest == _LARGE, where)
    names = next((names for names in known if len(names) == len(widths)), known[0])
    return {str(number): name for number, name in enumerate(names)}


def _everything(widths: Sequence[int], encoder: object, position: object, groups: Sequence[Group]) -> tuple[Any, str]:
    """Encoder and position of a file that has as many layers as there are.  Raises `UnknownFact` for any other."""
    if position in (None, "all"):
        large = max(widths, default=0) == _LARGE
        depths = [len(table["all"]) for table in (_OF_VIT_L if large else (_OF_TWELVE,))]
        if encoder in (None, "both") and len(widths) - len(_OF_TWELVE["all"]) in depths:
            return "both", "all"
        if large and len(widths) in depths and encoder in (None, "vision") and set(widths) == {_LARGE}:
            return "vision", "all"
    where = next(iter(groups[0].tensors.values())).where
    raise errors.UnknownFact(
        f"{where}: nothing says of which layers of CLIP the file's {len(widths)} are (its {_METADATA} are missing); say it with "
        f"--set encoder=… ({', '.join(_ENCODERS)}) and --set position=… ({', '.join(_OF_TWELVE)})"
    )


def _orders(towers: Sequence[str], position: object, large: bool, where: str) -> list[list[str]]:
    """The modules that a word means, in the program's order, today's first.  Raises `UnreadableFile` for a word that it has
    not."""
    tables = [{"text": _OF_TWELVE, "vision": vision} for vision in (_OF_VIT_L if large else (_OF_TWELVE,))]
    word = position if isinstance(position, str) else ""
    fitting = [table for table in tables if all(word in table[tower] for tower in towers)]
    if not fitting:
        known = dict.fromkeys(word for table in tables for word in table[towers[-1]])
        raise errors.UnreadableFile(
            f"{where} (or --set) says position {position!r:.40}, which the {towers[-1]} encoder has not; it has "
            f"{', '.join(known)}",
            fault="config-type",
        )
    return [
        [f"{tower}_model.encoder.layers.{number}" for tower in towers for number in table[tower][word]]
        for table in fitting
    ]


def _listed(heads: set[str]) -> str:
    numbers = sorted(heads, key=lambda head: (not head.isdecimal(), int(head) if head.isdecimal() else 0, head))
    return ", ".join(numbers[:6]) + (f" and {len(numbers) - 6} more" if len(numbers) > 6 else "")


FORMAT = ClipLora()
