"""Every error that adapterops raises on purpose.

One family, so that callers can catch `AdapterOpsError` and the command line can turn each case into one
clear message and exit status 2.  A message names the file, the tensor and the remedy.
"""

from __future__ import annotations

from collections.abc import Iterable

_LONGEST = 2500
"""Characters of a message."""


class AdapterOpsError(Exception):
    """Base class: an input, an option or an output that cannot be used.  Exit status 2.

    Messages quote what files say: what cannot be printed is escaped, and what a stranger made too long is cut.
    `fault` says in a word what is wrong, for the rules of `adapterops.validation`; `keys` are the tensors it is about, where
    that is known.
    """

    exit_code = 2
    fault = "unreadable"
    keys: tuple[str, ...] = ()

    def __init__(self, message: str = "", *, fault: str = "", keys: Iterable[str] = ()) -> None:
        text = message if len(message) <= _LONGEST else f"{message[: _LONGEST - 900]} … {message[-600:]}"
        if not text.isprintable():
            text = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
        super().__init__(text)
        if fault:
            self.fault = fault
        if keys:
            self.keys = tuple(keys)


class UnreadableFile(AdapterOpsError):
    """A file is missing, empty, truncated, or not what its container says it is."""


class InvalidHeader(UnreadableFile):
    """A safetensors header that breaks the format's rules (length, overlap, gaps, dtype, shape, duplicate keys)."""

    fault = "header"


class UnsafePickle(UnreadableFile):
    """A `.bin`/`.pt` file that `torch.load(weights_only=True)` refuses: it holds more than tensors."""

    fault = "unsafe-pickle"


class NotAnAdapter(AdapterOpsError):
    """The file is sound but holds no adapter: a full checkpoint, a textual inversion, optimizer state …"""

    fault = "not-an-adapter"


class UnsupportedFormat(AdapterOpsError):
    """The file is an adapter in a format or method that this version does not convert.  The message names it."""

    fault = "unsupported"


class AmbiguousFormat(AdapterOpsError):
    """The keys mix two dialects, or fit several: `--from` decides."""

    fault = "mixture"


class UnknownFormat(AdapterOpsError):
    """`--to` or `--from` names a format or dialect that no installed plugin offers."""


class UnknownModule(AdapterOpsError):
    """A module name that the architecture does not have; the message names the nearest ones."""

    fault = "unknown-module"


class UnknownArchitectureOfFile(AdapterOpsError):
    """No known architecture has the modules of this file and the target needs one: `--arch` or `--base`."""

    fault = "unknown-architecture"


class BrokenAdapter(AdapterOpsError):
    """Tensors that contradict each other or the method: A without B, ranks or shapes that disagree, NaN."""

    fault = "impossible-shape"


class UnknownFact(AdapterOpsError):
    """A fact that no source holds (alpha without a config, say); the message names the option that supplies it."""

    fault = "unknown-fact"


class Conflict(AdapterOpsError):
    """Two sources of one fact disagree; the message shows both."""

    fault = "conflict"


class CannotRepresent(AdapterOpsError):
    """The target format cannot hold something that the adapter has; the message says what, why, and what works."""

    fault = "unsupported"


class OutputExists(AdapterOpsError):
    """The output is there already and `--overwrite` was not given."""


class OutputFailed(AdapterOpsError):
    """Writing failed (disk full, read-only folder …); nothing was left behind."""


class UsageError(AdapterOpsError):
    """Options that contradict each other or cannot be parsed."""


class ProofFailed(AdapterOpsError):
    """The output, read back from disk, does not do what the source does.  Nothing was left behind.  Exit status 1."""

    exit_code = 1
