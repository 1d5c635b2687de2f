"""Errors of this room: an architecture that does not exist, a base config that cannot be used."""

from __future__ import annotations

from adapterops.errors import AdapterOpsError


class UnknownArchitecture(AdapterOpsError):
    """Raised by `load` for a name that no built-in table has; the message lists the known names."""


class BadBaseConfig(AdapterOpsError):
    """Raised by `from_config` when a base model cannot be listed from the given config.

    The causes: the path holds no config, the file is not JSON, its class is unknown to the installed
    libraries, it needs code from the repository, the library that owns the class is not installed, or the
    class refuses the config's values. The message names the path and the remedy.
    """
