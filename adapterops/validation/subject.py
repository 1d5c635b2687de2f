"""The adapter that is examined: what of it can be read, and what reading it told."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from adapterops import registry
from adapterops.adapter import COMPONENTS, Adapter, Update
from adapterops.dialects.match import Reading
from adapterops.dialects.read import Request
from adapterops.errors import AdapterOpsError, UnreadableFile
from adapterops.plugin import Format
from adapterops.storage import LazyTensor, Source
from adapterops.storage.folder import NOT_FETCHED, Folder
from adapterops.storage.source import CONFIG_NAME, FOLDER_INDEX, FOLDER_WEIGHTS, open_in, read_json
from adapterops.validation.names import mended, training_state
from adapterops.validation.options import Options
from adapterops.validation.rule import Finding

if TYPE_CHECKING:
    from adapterops.validation.scan import Statistics

_MAX_TEXT = 4_000_000
"""Bytes of a model card that are read."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where an adapter stands: a file of a folder, or the folder itself (`name` is empty), on this disk or on the Hub."""

    folder: Folder
    name: str = ""

    @property
    def path(self) -> str:
        """How the user would name it."""
        return os.path.join(self.folder.path, self.name) if self.name else self.folder.path or os.curdir


class Faults(list[AdapterOpsError]):
    """What was told, without the frames that it was raised in, which hold what they worked on."""

    def append(self, error: AdapterOpsError) -> None:
        error.__traceback__ = error.__context__ = None
        super().append(error)


class Subject:
    """One adapter under examination.  What cannot be read is None, and `faults` say why; nothing here raises.

    Read what is needed through the properties: each is computed once, when it is first asked for.
    """

    def __init__(self, place: Place, options: Options) -> None:
        self.place = place
        self.options = options
        self.faults: list[AdapterOpsError] = Faults()
        """What opening and reading told, in order."""
        self.renamed: dict[str, str] = {}
        """The keys that a wrapper or a broken script spelled wrongly, with the names under which `tensors` has them."""
        self.leftover: tuple[str, ...] = ()
        """The keys of an optimizer's state, which `tensors` has not."""
        self.source: Source | None = self._open()

    @property
    def path(self) -> str:
        """The adapter as the user would name it."""
        return self.place.path

    @property
    def is_folder(self) -> bool:
        """Whether a folder was examined as one adapter (a PEFT folder), not a file in it."""
        return not self.place.name

    @cached_property
    def files(self) -> tuple[str, ...]:
        """The names of what stands in the same folder."""
        try:
            return tuple(self.place.folder.names())
        except AdapterOpsError:
            return ()

    @cached_property
    def weights(self) -> str:
        """The path of the file that holds the weights, as the user would name it: for findings about it."""
        if self.place.name:
            return self.path
        present = [name for name in (*FOLDER_WEIGHTS, FOLDER_INDEX) if name in self.files]
        return os.path.join(self.path, present[0]) if present else self.path

    @property
    def tensors(self) -> Mapping[str, LazyTensor]:
        """Every tensor by its key; none where the file could not be read."""
        return self.source.tensors if self.source is not None else {}

    @property
    def metadata(self) -> Mapping[str, str]:
        """The header's strings."""
        return self.source.metadata if self.source is not None else {}

    @property
    def config(self) -> Mapping[str, Any] | None:
        """The config beside the weights, as it stands in the file."""
        return self.source.config if self.source is not None else None

    @property
    def config_path(self) -> str:
        """The config's path, as the user would name it."""
        return os.path.join(self.place.folder.path, CONFIG_NAME)

    @cached_property
    def recognised(self) -> tuple[Format, Reading] | None:
        """The format and what its table reads of the keys; None where no format knows them."""
        if self.source is None or (self.leftover and not self.source.tensors):
            return None  # an optimizer's state alone is told of as such
        try:
            found = registry.recognise(self.source, None, self.options.architecture, allow_drop=True)
            if {claim.suffix.method for claim in found[1].claims} <= {"*", "ia3"}:
                # Alphas alone, or names that end like (IA)³'s: perhaps a method that is known by name only.
                registry.explain(self.source, self.source.tensors)
            return found
        except AdapterOpsError as error:
            self.faults.append(error)
            return None

    @cached_property
    def adapter(self) -> Adapter | None:
        """What can be understood of the adapter: broken modules are left out, and told of in `faults`."""
        if self.recognised is None or self.source is None:
            return None
        form, reading = self.recognised
        request = Request(self.options.architecture, allow_drop=True, repair=True, tell=self.faults.append)
        try:
            return form.read(self.source, reading, request)
        except AdapterOpsError as error:
            self.faults.append(error)
            return None

    @property
    def updates(self) -> tuple[Update, ...]:
        """The updates that could be understood."""
        return tuple(self.adapter) if self.adapter is not None else ()

    @property
    def dialect(self) -> str:
        """The name of the dialect; "" where none was recognised."""
        return self.recognised[1].dialect.name if self.recognised is not None else ""

    @cached_property
    def statistics(self) -> Mapping[str, Statistics]:
        """What one pass over the bytes of every tensor tells, by key (rules that ask for it need TENSORS)."""
        from adapterops.validation.scan import scan

        return scan(self.tensors, self.options.threads)

    def text(self, name: str) -> str | None:
        """A text file of the same folder; None where there is none, or none that can be read."""
        if name not in self.files:
            return None
        try:
            with open(self.place.folder.fetch(name), "rb") as file:
                return file.read(_MAX_TEXT).decode("utf-8", errors="replace")
        except AdapterOpsError as error:
            if error.fault == NOT_FETCHED and str(error) not in map(str, self.faults):
                self.faults.append(error)
            return None
        except OSError:
            return None

    def _open(self) -> Source | None:
        try:
            source = open_in(self.place.folder, self.place.name, self.faults.append)
        except AdapterOpsError as error:
            self.faults.append(error)
            return None
        self.leftover = training_state(source.tensors)
        self.renamed = mended(key for key in source.tensors if key not in self.leftover)
        if self.renamed or self.leftover:
            kept = {key: t for key, t in source.tensors.items() if key not in self.leftover}
            source = replace(source, tensors={self.renamed.get(key, key): t for key, t in kept.items()})
        source = self._with_config(source)
        own = os.path.basename(os.path.abspath(self.place.folder.path))
        return replace(source, component=own) if self.is_folder and own in COMPONENTS else source

    def _with_config(self, source: Source) -> Source:
        """Weights whose name peft does not look for have the PEFT config beside them all the same."""
        if not self.place.name or source.config is not None or CONFIG_NAME not in self.files:
            return source
        if any(name in self.files for name in FOLDER_WEIGHTS):
            return source
        try:
            config = read_json(self.place.folder.fetch(CONFIG_NAME))
        except AdapterOpsError as error:
            error.fault = "config-unreadable"
            self.faults.append(error)
            return source
        return replace(source, config=config, config_path=self.config_path) if "peft_type" in config else source


Findings = Iterable[Finding]


def in_words(error: AdapterOpsError, *paths: str) -> str:
    """An error's message without the paths that the finding names anyway."""
    text = str(error)
    for path in paths:
        text = text.removeprefix(f"{path}: ") if path else text
    return text


__all__ = ["Findings", "Place", "Subject", "UnreadableFile", "in_words"]
