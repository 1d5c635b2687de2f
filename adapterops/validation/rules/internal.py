"""What adapterops does wrong itself, told as a finding so that the other adapters' results are not lost."""

from __future__ import annotations

from adapterops.validation.rule import Rule, Severity

INTERNAL_FAILURE = Rule(
    "X001",
    "internal-failure",
    Severity.ERROR,
    why="adapterops itself failed on the adapter, so that nothing is known of it; this is never the adapter's fault.",
    remedy="Please report it with the message, and with the file or its header; `--ignore` does not silence it.",
    fires="any file over which `adapterops validate` would print a traceback, or would be killed for its memory",
    passes="every file of which it can say what is wrong, however broken",
)
RULES = (INTERNAL_FAILURE,)
CHECKERS = ()
