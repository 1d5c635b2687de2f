"""What a rule is, what it finds, and how that can be mended."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum, IntEnum, StrEnum
from typing import Any


class Severity(StrEnum):
    """How bad a finding is."""

    ERROR = "error"
    """A loader fails, or computes something other than what was trained."""
    WARNING = "warning"
    """It loads, but is probably not meant."""
    INFO = "info"
    """Cards and licences, and what the usual tools do by default."""


class Needs(IntEnum):
    """What must be read for a rule; each includes what stands before it."""

    HEADER = 0
    """Headers, configs and the names of files."""
    FILES = 1
    """Other files of the folder as well: a model card, say."""
    TENSORS = 2
    """The bytes of the tensors as well."""


class _Remove(Enum):
    REMOVE = "remove"


REMOVE: Any = _Remove.REMOVE
"""In a `Change`, the value of a field or header entry that goes.  (A field whose value is None becomes null.)"""


@dataclass(frozen=True, slots=True)
class Change:
    """What mends a finding without touching what the adapter computes.

    Several changes of one adapter are applied together; they must not contradict each other.
    """

    about: str
    """In a line, in the imperative: "strip the adapter's name from 48 keys"."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """Old to new names of tensors."""
    drop: tuple[str, ...] = ()
    """Tensors that are left out; such as no reader of the adapter reads."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the config beside the weights and their new values; REMOVE takes one out."""
    metadata: Mapping[str, str | None] = field(default_factory=dict)
    """Entries of the header and their new values; REMOVE takes one out."""
    rewrite: bool = False
    """The weights are written anew as safetensors (a pickle, which goes; a header whose spelling is at fault)."""
    rename: str = ""
    """The new name, in its folder, of the finding's file."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that a rule found in one adapter.

    `where` names tensors (their keys), `field` an entry of the config or the header; `file` is the file that is at fault,
    as the user would name it.
    """

    rule: Rule
    file: str
    message: str
    where: tuple[str, ...] = ()
    field: str = ""
    remedy: str = ""
    """What to do, where the finding knows better than the rule."""
    change: Change | None = None
    adapter: str = ""
    """The adapter that was looked at, as the user named it or as it was found in a folder."""

    def __str__(self) -> str:
        return f"{self.file}: {self.rule.severity} {self.rule.code} {self.message}"

    @property
    def code(self) -> str:
        """The rule's code."""
        return self.rule.code

    @property
    def severity(self) -> Severity:
        """The rule's severity."""
        return self.rule.severity

    @property
    def fixable(self) -> bool:
        """Whether `--fix` mends it."""
        return self.change is not None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "code": self.rule.code,
            "name": self.rule.name,
            "severity": str(self.rule.severity),
            "adapter": self.adapter,
            "file": self.file,
            "message": self.message,
            "remedy": self.remedy or self.rule.remedy,
            "where": list(self.where),
            "field": self.field or None,
            "fix": self.change.about if self.change is not None else None,
        }


@dataclass(frozen=True, slots=True, repr=False)
class Rule:
    """One thing that may be wrong with an adapter.

    `why`, `remedy`, `fires` and `passes` make the rule's page (`adapterops rule CODE`, docs/rules.md): one sentence on what
    goes wrong where it is broken, what to do, an example that breaks it and one that does not.
    `faults` are the words (`AdapterOpsError.fault`) by which reading an adapter tells of it, for rules that the reader itself
    finds.  `source` says where the fact stands, for rules about what other tools do.
    """

    code: str
    name: str
    severity: Severity
    why: str
    remedy: str
    fires: str
    passes: str
    needs: Needs = Needs.HEADER
    fixable: bool = False
    faults: tuple[str, ...] = ()
    source: str = ""

    def __repr__(self) -> str:
        return f"<Rule {self.code} {self.name}>"

    @property
    def group(self) -> str:
        """The letter that the codes of related rules begin with."""
        return self.code[0]

    def found(
        self,
        file: str,
        message: str,
        where: Iterable[str] = (),
        *,
        field: str = "",
        remedy: str = "",
        change: Change | None = None,
    ) -> Finding:
        """A finding of this rule."""
        return Finding(self, file, message, tuple(where), field, remedy, change)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {
            "code": self.code,
            "name": self.name,
            "severity": str(self.severity),
            "group": GROUPS[self.group],
            "why": self.why,
            "remedy": self.remedy,
            "fires": self.fires,
            "passes": self.passes,
            "fixable": self.fixable,
            "needs": self.needs.name.lower(),
            "source": self.source or None,
        }


GROUPS = {
    "F": "files and containers",
    "T": "tensors",
    "C": "config against tensors",
    "B": "base model",
    "S": "scale",
    "L": "loaders",
    "D": "card and licence",
    "X": "adapterops itself",
}
"""The letters of codes."""


def several(names: Iterable[str], shown: int = 3) -> str:
    """Names for a message: the first few, and how many more there are."""
    names = list(names)
    rest = len(names) - shown
    return ", ".join(repr(n[:120]) for n in names[:shown]) + (f" and {rest} more" if rest > 0 else "")
