"""Rules of `adapterops validate` about MLX-LM's adapters: what their config says of the base model.

mlx-lm writes the `--model` of the training into adapter_config.json (`mlx_lm/lora.py`, save_config).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from adapterops_formats.peft_rules_fields import LOCAL_BASE

from adapterops.validation.registry import Checker, checker
from adapterops.validation.rule import Finding, Rule
from adapterops.validation.subject import Subject

_FINAL = "adapters.safetensors"
_LOCAL = re.compile(r"^(?:[/~.\\]|[A-Za-z]:[\\/])|\\")
"""A path rather than a name on the Hub; what has no more than a name may be either."""


@checker(LOCAL_BASE)
def base_model(subject: Subject) -> Iterator[Finding]:
    """A base that nobody else has; told once of a folder with checkpoints beside the final weights."""
    if subject.dialect != "mlx" or subject.config is None or "peft_type" in subject.config:
        return
    if subject.place.name not in ("", _FINAL) and _FINAL in subject.files:
        return
    base = subject.config.get("model")
    if isinstance(base, str) and _LOCAL.search(base):
        yield LOCAL_BASE.found(
            subject.config_path,
            f"model is {json.dumps(base)[:120]}, a path on one disk",
            field="model",
            remedy='Write the base\'s name on the Hub: "model": "owner/name".',
        )


RULES: tuple[Rule, ...] = ()
CHECKERS: tuple[Checker, ...] = (base_model,)
