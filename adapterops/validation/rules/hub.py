"""The Hub: what it, or the network on the way to it, keeps from being read."""

from __future__ import annotations

from adapterops.storage.folder import NOT_FETCHED as FAULT
from adapterops.validation.registry import Checker
from adapterops.validation.rule import Rule, Severity

NOT_FETCHED = Rule(
    "F090",
    "not-fetched",
    Severity.ERROR,
    why="What the Hub lists and does not hand over could not be checked, and nobody who asks for it now can load it either.",
    remedy="Run the command again; if it stays, log in with `hf auth login` (or set HF_TOKEN), or download the repository "
    "with `hf download` and validate the folder.",
    fires="adapter_model.safetensors of a gated repository, asked for without a token",
    passes="adapter_model.safetensors of a public repository",
    faults=(FAULT,),
    source="RFC 9110 section 14 (range requests); huggingface_hub: X-Repo-Commit, X-Linked-Etag, X-Error-Code",
)

RULES: tuple[Rule, ...] = (NOT_FETCHED,)
CHECKERS: tuple[Checker, ...] = ()
