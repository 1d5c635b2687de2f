"""Which block of a base model a module is in, and the lists of weights that people write for the blocks.

Source of the lists (17 and 26 values for SD 1 and 2, 12 and 20 for SDXL) and of what is in a block: kohya-ss/sd-scripts,
`networks/svd_merge_lora.py`: `LAYER12`, `LAYER17`, `LAYER20`, `LAYER26`, `get_lbw_block_index`.  As there, a module of
a block for which the list has no value keeps the adapter's own weight (it is not left out), and so does one in no block
(`out`; SD 1's `time_embed`); SDXL's `time_embed` and `label_emb` count as IN00.  Two things differ: a block is looked up
by the authors' name in the architecture's table, so that `conv_in` is IN00 (`input_blocks.0`) for SD 1 too, and BASE is
every module of a text encoder, its embeddings and its projection included.

Flux.1 has no such list.  Its blocks are the authors' double_blocks and single_blocks; BASE is everything else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from adapterops.architectures import Architecture
from adapterops.architectures.table import Component
from adapterops.errors import UsageError

BASE = "BASE"
_TEXT_ENCODER = "text_encoder"


@dataclass(frozen=True, slots=True)
class BlockTable:
    """The blocks of a family of base models."""

    architectures: tuple[str, ...]
    component: str
    blocks: Mapping[str, str]
    """What an original name begins with, to its block's name; {} is the number that follows."""
    presets: tuple[tuple[str, ...], ...] = ()
    """The blocks that the values of a list are for, in order; lists are told apart by their length."""
    stacks: tuple[str, ...] = ()
    """Kinds of blocks whose weights have a key of their own; a block is called `key.number`."""
    also: Mapping[str, str] = field(default_factory=dict)
    """What else an original name may begin with, and the block which that counts as."""
    rest: str | None = None
    """The block of the component's other modules; None: they are in no block."""

    def preset(self, count: int, where: str) -> tuple[str, ...]:
        """The blocks that a list of `count` values is for.  Raises `UsageError` where there is no such list."""
        for preset in self.presets:
            if len(preset) == count:
                return preset
        raise UsageError(f"{where}: {count} values fit no list of blocks of {self._title}; {self.takes}")

    def stack(self, key: str, architecture: Architecture, where: str) -> int:
        """How many blocks of the kind `key` (`double`, `single`) there are.  Raises `UsageError` for an unknown kind."""
        if key not in self.stacks:
            raise UsageError(f"{where}: {self._title} has no {key} blocks; {self.takes}")
        component = architecture.components[self.component]
        found = {self.of(spec.original) for table in (component.modules, component.fused) for spec in table.values()}
        return sum(name is not None and name.startswith(f"{key}.") for name in found)

    def of(self, original: str) -> str | None:
        """The block of the module that the authors call `original`; None: in none."""
        first, _, rest = original.partition(".")
        if first in self.blocks:
            return self.blocks[first].format(rest.partition(".")[0].zfill(2))
        return self.also.get(first, self.rest)

    @property
    def takes(self) -> str:
        """What a weights file may give for the family, in words."""
        lists = [f"{len(preset)} values ({_words(preset)})" for preset in self.presets]
        return "it takes " + (f"blocks with {' or '.join(lists)}" if lists else f"{', '.join(self.stacks)} and base")

    @property
    def _title(self) -> str:
        return "/".join(self.architectures)


def table(architecture: Architecture | None, where: str) -> BlockTable:
    """The blocks of a base model.  Raises `UsageError` where it is not known, or its blocks are not."""
    if architecture is None:
        raise UsageError(
            f"{where}: weights of blocks need the base model, which is not known here; say which: --arch NAME or "
            "--base CONFIG"
        )
    for candidate in _TABLES:
        if architecture.family in candidate.architectures:
            return candidate
    known = ", ".join(name for candidate in _TABLES for name in candidate.architectures)
    raise UsageError(
        f"{where}: no blocks are known for {architecture.name}, only for {known}; give weights by patterns instead"
    )


def block(component: str, module: str, architecture: Architecture, where: str) -> str | None:
    """The block that a module is in; None where it is in none.

    Raises `UsageError` where the base model's blocks are not known, or it has no such module.
    """
    blocks = table(architecture, where)
    if component.startswith(_TEXT_ENCODER):
        return BASE
    known = architecture.components.get(component)
    if component != blocks.component or known is None:
        raise UsageError(f"{where}: {architecture.name} has no blocks in {component}; give it a weight by a pattern")
    if not module:  # what the root owns
        return blocks.rest
    return blocks.of(_original(known, module, where))


def _original(component: Component, module: str, where: str) -> str:
    """The authors' name of a module, or of the fused one that it is part of."""
    spec = component.spec(module)
    if spec is None:
        raise UsageError(
            f"{where}: {component.name} has no module {module!r}, so the block it is in is not known; give it a weight by "
            "a pattern"
        )
    if spec.original:
        return spec.original
    return next((component.fused[name].original for name in component.whole.get(module, ())), module)


def _span(text: str) -> tuple[str, ...]:
    """`IN04-05 MID` written out: IN04, IN05, MID."""
    out = []
    for word in text.split():
        start, dash, last = word.partition("-")
        stem, first = start[:-2], start[-2:]
        out += [f"{stem}{n:02d}" for n in range(int(first), int(last) + 1)] if dash else [start]
    return tuple(out)


def _words(preset: tuple[str, ...]) -> str:
    """A list of blocks for a message, neighbours joined: IN04-05."""
    out: list[str] = []
    for name in preset:
        if out and name[-2:].isdigit() and out[-1].partition("-")[0][:-2] == name[:-2]:
            start, _, last = out[-1].partition("-")
            if int(last or start[-2:]) + 1 == int(name[-2:]):
                out[-1] = f"{start}-{name[-2:]}"
                continue
        out.append(name)
    return " ".join(out)


_UNET = {"input_blocks": "IN{}", "middle_block": "MID", "output_blocks": "OUT{}"}
_TABLES = (
    BlockTable(
        ("sd1", "sd2"),
        "unet",
        _UNET,
        presets=(
            _span("BASE IN01-02 IN04-05 IN07-08 MID OUT03-11"),
            _span("BASE IN00-11 MID OUT00-11"),
        ),
    ),
    BlockTable(
        ("sdxl",),
        "unet",
        _UNET,
        presets=(_span("BASE IN04-05 IN07-08 MID OUT00-05"), _span("BASE IN00-08 MID OUT00-08")),
        also={"time_embed": "IN00", "label_emb": "IN00"},
    ),
    BlockTable(
        ("flux",),
        "transformer",
        {"double_blocks": "double.{}", "single_blocks": "single.{}"},
        stacks=("double", "single"),
        rest=BASE,
    ),
)
