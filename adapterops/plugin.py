"""The public interface for format plugins.

A plugin package declares an entry point in the group `adapterops.formats`; it names a `Format` instance.  All
that a format needs is exported here; nothing else of adapterops is promised to stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from adapterops import errors
from adapterops.adapter import Adapter, Certainty, Fact, Provenance, Update
from adapterops.architectures import Architecture, Component, ModuleSpec
from adapterops.carried import HEADER_CONFIG, Carried, is_number
from adapterops.carried import KEY as CARRIED_KEY
from adapterops.dialects.fitting import component_by_names, fit
from adapterops.dialects.match import PARAMETERS, Claim, Group, Reading, read_keys
from adapterops.dialects.read import Request, ScaleOf, ScaleRule, no_config
from adapterops.dialects.read import read as read_by_table
from adapterops.dialects.table import (
    ANY,
    CUSTOM,
    ONE_ENCODER,
    TWO_ENCODERS,
    AlphaIn,
    Dialect,
    Place,
    Suffix,
)
from adapterops.methods import METHODS
from adapterops.storage import LazyTensor, Source, scalar
from adapterops.storage.source import read_json
from adapterops.storage.tensor import NAMELESS, columns, is_zero, same_bytes, stack, zeros

if TYPE_CHECKING:
    from adapterops.dialects.write import Spelled
    from adapterops.operations.uniform import Uniform

API_VERSION = 1


def write_by_table(
    dialect: Dialect,
    adapter: Adapter,
    architecture: Architecture | None,
    spelling: Mapping[str, Any],
    allow_drop: bool = False,
) -> Spelled:
    """The tensors of `adapter` under the keys of `dialect` (see `dialects.write`)."""
    from adapterops.dialects.write import write  # what only reads has no use for it

    return write(dialect, adapter, architecture, spelling, allow_drop)


def built_in() -> list[Architecture]:
    """The built-in base models, in the order in which they are taken where several fit."""
    from adapterops import architectures

    return sorted(map(architectures.load, architectures.names()), key=lambda known: known.turn)


def built_in_named(name: str) -> Architecture:
    """The built-in base model of that name."""
    from adapterops import architectures

    return architectures.load(name)


def maths(module: str) -> Any:
    """The module of `adapterops.methods` that has this name, for functions on updates that only it knows."""
    return import_module(f"adapterops.methods.{module}")


class Target(NamedTuple):
    """What a format is asked to write: the dialect, the base model if it is known, and what the user says.

    `faithful` asks for the source's own spelling where it was this dialect (prefixes, an adapter's name), `repair` for a
    config that says what the tensors are and nothing more, each change of it a note.  `reader` is the one of the format's
    `readers` that must understand what is written.
    """

    dialect: Dialect
    architecture: Architecture | None = None
    fields: Mapping[str, Any] = {}
    faithful: bool = False
    allow_drop: bool = False
    repair: bool = False
    reader: str = ""


class Rounding(NamedTuple):
    """What a conversion asks of every number: the float type that it is rounded to, and scales baked into the factors."""

    dtype: str | None = None
    fold_alpha: bool = False


class Fitted(NamedTuple):
    """An adapter as one reader of a format takes it.

    `source` is what of the adapter is left, all but `dropped`; `adapter` does the same, in tensors that the reader
    understands.  `rounded` says whether numbers were rounded on the way.
    """

    source: Adapter
    adapter: Adapter
    rounded: bool = False
    dropped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


class OutputFile(NamedTuple):
    """One file of an output: safetensors (`tensors`, `metadata`) or text.

    `path` is relative to the output folder; "" where the output is a single file.  Of another container, `write` makes the
    file of `tensors` at the path that it is given, and calls its second argument with the number of bytes done.
    """

    path: str
    tensors: Mapping[str, LazyTensor] = {}
    metadata: Mapping[str, str] = {}
    text: str | None = None
    write: Callable[[str, Callable[[int], None]], None] | None = None


class Output(NamedTuple):
    """The files that hold an adapter, and what the user should know about them."""

    files: tuple[OutputFile, ...]
    kept: tuple[Update, ...] = ()
    dropped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    rounded: bool = False
    """Whether the format itself changed tensors within rounding (a scale that it folded): the proof allows for that."""


class TypeRow(NamedTuple):
    """One type of adapter that a format names, and what its files say: a row of `adapterops methods`.

    `recognised` are the ends of its keys.  Fields of its config: `read` where one is there, without effect on what the
    tensors do; `derived` from the tensors; `assumed` where no config says them, with the default; `unknowable` from the
    tensors, with the reason; `refused` ones change what the tensors mean, and are not converted.
    """

    name: str
    title: str
    methods: tuple[str, ...]
    recognised: tuple[str, ...]
    read: tuple[str, ...] = ()
    derived: tuple[str, ...] = ()
    assumed: tuple[tuple[str, Any], ...] = ()
    unknowable: tuple[tuple[str, str], ...] = ()
    refused: tuple[tuple[str, str], ...] = ()
    needs: str = ""
    lost: tuple[str, ...] = ()


class Format:
    """One file format: its dialects, and how they are read and written.

    The defaults serve a single file whose dialects' tables say everything; a format overrides what differs.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    dialects: ClassVar[Sequence[Dialect]]
    """The first is what `--to NAME` writes."""
    file_name: ClassVar[str] = ""
    """The usual file name inside a folder; "" for formats that are folders themselves."""
    suffixes: ClassVar[tuple[str, ...]] = (".safetensors", ".sft")
    """How the names of a single file may end; the first is the usual one."""
    is_folder: ClassVar[bool] = False
    for_lora: ClassVar[str] = ""
    """The dialect that a LoRA made of one of its files is written in, where few read it in this one."""
    tells_init: ClassVar[bool] = False
    """Whether the format can say that the base weights were changed at initialisation (`Adapter.mutated_init`)."""
    readers: ClassVar[Mapping[str, str]] = {}
    """Programs that read less of the format than it can say, by name, and what people call them (`convert --for NAME`)."""
    own_fields: ClassVar[frozenset[str]] = frozenset()
    """Fields of `--set` that only its reading takes: facts of its own that no other format's config has."""
    takes_fields: ClassVar[bool] = False
    """Whether it writes a config that takes the fields of `--set`."""
    variants: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    """Prefixes that may stand for a place's own (wrappers left in keys)."""
    foreign: ClassVar[Mapping[str, str]] = {}
    """Regular expressions of keys that this format's writers also write and that are not converted: to what they are."""

    botched: ClassVar[Mapping[str, str]] = {}
    """Regular expressions of keys that broken scripts wrote for this format's, and what stands in their place (`re.sub`):
    `adapterops validate` tells of them and mends them."""

    limits: ClassVar[Sequence[str]] = ()
    """What its writers cannot say, beyond what its tables lack: sentences for docs/formats.md."""
    rules: ClassVar[str] = ""
    """The module that has this format's own rules of `adapterops validate` (RULES and CHECKERS)."""

    def types(self) -> Sequence[TypeRow]:
        """The types of adapters that the format's files name, for formats that do."""
        return ()

    def completed(self, adapter: Adapter) -> Adapter:
        """The adapter with what follows from its modules' shapes, once these are in the options of its updates."""
        return adapter

    def recognise(self, source: Source, dialects: Sequence[Dialect]) -> list[Reading]:
        """The readings, by some of this format's dialects, in which at least one key is part of an update."""
        readings: list[Reading] = []
        keys = tuple(source.tensors)
        for dialect in dialects:
            same = next((found for r in readings if (found := r.under(dialect)) is not None), None)
            readings.append(same or read_keys(dialect, keys, self.variants))
        return [reading for reading in readings if reading.updates_claimed]

    def read(self, source: Source, reading: Reading, request: Request) -> Adapter:
        """The adapter in `source`."""
        return read_by_table(reading, source, request)

    def prepared(self, adapter: Adapter) -> Adapter:
        """The adapter with updates of a method that the format has not as the same of one that it has.

        Raises `CannotRepresent` where a fact is missing that this needs.
        """
        return adapter

    def fitted(self, adapter: Adapter, target: Target, rounding: Rounding) -> Fitted:
        """The adapter as the target's reader takes it, where it names one of `readers`.

        Raises `CannotRepresent` for what that reader cannot be told.
        """
        raise errors.UsageError(f"{self.title} knows no reader {target.reader!r}")

    def write(self, adapter: Adapter, target: Target) -> Output:
        """The files that hold `adapter`."""
        spelled = self.spell(adapter, target)
        file = OutputFile("", spelled.tensors, header(spelled.adapter))
        return Output((file,), tuple(spelled.kept), tuple(spelled.dropped), tuple(spelled.notes))

    def spell(self, adapter: Adapter, target: Target) -> Spelled:
        """The tensors of `adapter` under the keys of the target's dialect."""
        spelling = self.spelling(adapter, target)
        return write_by_table(target.dialect, adapter, target.architecture, spelling, target.allow_drop)

    def spelling(self, adapter: Adapter, target: Target) -> dict[str, Any]:
        """The recorded choices of spelling that apply to `target`.

        How alphas and unusual shapes were stored is kept for every dialect of the format; prefixes and an adapter's
        name only where the same dialect is to be written faithfully.
        """
        recorded = adapter.provenance.carried.spelling
        own = recorded.get(target.dialect.name)
        if own is not None and target.faithful:
            return dict(own)
        near = own or next((recorded[d.name] for d in self.dialects if d.name in recorded), {})
        return {k: v for k, v in near.items() if k in ("alpha_absent", "alpha_as", "flag_as", "idle_alpha", "shapes")}


def as_lora(update: Update) -> Update:
    """Plain LoRA for what loralib and PEFT 0.2 keep in groups (`lora_merged`).

    Raises `CannotRepresent` where nothing says which parts of the module are adapted.
    """
    from adapterops.methods.merged import as_lora as written_out

    return written_out(update)


def uniform(
    updates: Sequence[Update], why: str, rslora: bool = True, scale: float | None = None, dtype: str | None = None
) -> Uniform:
    """The same LoRAs at one rank and one scale (see `operations.uniform`)."""
    from adapterops.operations.uniform import uniform as made

    return made(updates, why, rslora, scale, dtype)


def nothing(like: Update, module: str, outputs: int) -> Update:
    """A LoRA of zeros on another module with the same inputs (see `operations.uniform`)."""
    from adapterops.operations.uniform import nothing as made

    return made(like, module, outputs)


def which_parameters(
    levels: Sequence[Update], parameters: Mapping[str, tuple[int, ...]], named: Sequence[str] | None = None
) -> list[str]:
    """The parameters that the nested LoRAs of one module act on, by their shapes (see `lora_parameters.which`)."""
    from adapterops.methods.lora_parameters import which

    return which(levels, parameters, named)


def gguf_package() -> Any:
    """The `gguf` package, for its tables of names.  Raises `UnsupportedFormat` where it is not installed."""
    from adapterops.storage.gguf_file import package

    return package()


def write_gguf(
    path: str,
    architecture: str,
    entries: Mapping[str, tuple[str, Any]],
    tensors: Mapping[str, LazyTensor],
    progress: Callable[[int], None],
) -> None:
    """Write a GGUF file (see `storage.gguf_file.write`)."""
    from adapterops.storage.gguf_file import write

    write(path, architecture, entries, tensors, progress)


def header(adapter: Adapter) -> dict[str, str]:
    """The header's strings for a converted file: the source's own, and what is carried for the way back."""
    known = adapter.base.name if adapter.base is not None and adapter.base.builtin else None
    carried = Carried(adapter.provenance.carried.spelling, adapter.config, known).dump()
    out = {"format": "pt", **dict(sorted(Carried.strip(adapter.metadata).items()))}
    return {**out, CARRIED_KEY: carried} if carried else out


__all__ = [
    "ANY",
    "API_VERSION",
    "CUSTOM",
    "HEADER_CONFIG",
    "METHODS",
    "NAMELESS",
    "ONE_ENCODER",
    "PARAMETERS",
    "TWO_ENCODERS",
    "Adapter",
    "AlphaIn",
    "Architecture",
    "Callable",
    "Carried",
    "Certainty",
    "Claim",
    "Component",
    "Dialect",
    "Fact",
    "Fitted",
    "Format",
    "Group",
    "LazyTensor",
    "ModuleSpec",
    "Output",
    "OutputFile",
    "Place",
    "Provenance",
    "Reading",
    "Request",
    "Rounding",
    "ScaleOf",
    "ScaleRule",
    "Source",
    "Suffix",
    "Target",
    "TypeRow",
    "Update",
    "as_lora",
    "built_in",
    "built_in_named",
    "columns",
    "component_by_names",
    "errors",
    "fit",
    "gguf_package",
    "header",
    "is_number",
    "is_zero",
    "maths",
    "no_config",
    "nothing",
    "read_by_table",
    "read_json",
    "read_keys",
    "same_bytes",
    "scalar",
    "stack",
    "uniform",
    "which_parameters",
    "write_by_table",
    "write_gguf",
    "zeros",
]
