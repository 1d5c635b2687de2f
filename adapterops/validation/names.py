"""Keys that a wrapper or a broken script spelled wrongly, and how they should be."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache

from adapterops import registry

WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Names under which torch.compile, FSDP and activation checkpointing keep the module that they wrap.

Sources: torch `_dynamo/eval_frame.py` (`OptimizedModule`), `distributed/fsdp/_common_utils.py` (`FSDP_WRAPPED_MODULE`),
`distributed/algorithms/_checkpoint/checkpoint_wrapper.py`.
"""
_PEFTS = ".base_model.model."
"""Where peft's own model stands in a key, if it stands behind something."""
_PARALLEL = "module"
"""The same of DataParallel and DDP; modules may be called so as well, so it counts where all keys have it near the front."""
_FRONT = 4
_STATE = tuple(f"{word}." for word in ("optimizer", "optimizers", "optimizer_state", "optimizer_states", "optim",
               "lr_scheduler", "lr_schedulers", "grad_scaler"))  # fmt: skip
_MOMENTS = tuple(f".{word}" for word in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_avg_diff", "momentum_buffer",
                 "exp_inf"))  # fmt: skip
"""How the state of torch's optimizers is called (`torch/optim/adam.py`, `sgd.py`, `adamax.py`)."""


def mended(keys: Iterable[str]) -> dict[str, str]:
    """The keys that should be spelled otherwise, with their right names; none where two would become one."""
    keys = list(keys)
    skipped = _parallel(keys)
    out = {}
    for key in keys if skipped >= 0 else _suspects(keys):
        parts = key.split(".")
        new = ".".join(p for at, p in enumerate(parts) if at != skipped and p not in WRAPPERS)
        for pattern, replacement in _botched():
            new = pattern.sub(replacement, new)
        if new and new != key:
            out[key] = new
    if not out:
        return out
    taken = {out.get(key, key) for key in keys}
    return out if len(taken) == len(keys) else {}


@cache
def _botched() -> tuple[tuple[re.Pattern[str], str], ...]:
    """What scripts are known to misspell, and how it is spelled."""
    return tuple((re.compile(p), r) for form in registry.formats().values() for p, r in form.botched.items())


def _suspects(keys: list[str]) -> list[str]:
    """The keys that may have to be mended, in order: each pattern looks at all, which costs less than all at each key."""
    found = {key for name in WRAPPERS for key in keys if name in key}
    for pattern, _ in _botched():
        found.update(filter(pattern.search, keys))
    return [key for key in keys if key in found] if found else []


def training_state(keys: Iterable[str]) -> tuple[str, ...]:
    """The keys that are an optimizer's or a scheduler's state; none where there are no others."""
    keys = list(keys)
    found = tuple(key for key in keys if key.startswith(_STATE) or key.endswith(_MOMENTS))
    return found if len(found) < len(keys) else ()


def is_wrapped(key: str, new: str) -> bool:
    """Whether a wrapper's name is all that `new` lacks of `key`."""
    if _PEFTS in key and new == key.replace(_PEFTS, ".", 1):
        return True
    rest = [part for part in key.split(".") if part not in WRAPPERS]
    return new == ".".join(rest) or any(
        part == _PARALLEL and new == ".".join(rest[:at] + rest[at + 1 :]) for at, part in enumerate(rest[:_FRONT])
    )


def _parallel(keys: list[str]) -> int:
    """Where in every key DataParallel's name stands; -1 where it does not."""
    if len(keys) < 2:
        return -1
    first = keys[0].split(".", _FRONT)
    at = next((n for n, part in enumerate(first[:_FRONT]) if part == _PARALLEL), -1)
    if at < 0:
        return -1
    start = ".".join(first[: at + 1]) + "."
    return at if all(key.startswith(start) for key in keys) else -1
