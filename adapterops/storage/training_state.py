"""The names of what trainers keep in a folder to go on with: none of it is the adapter that stands beside it.

Sources: transformers 5.23 `trainer.py` (OPTIMIZER_NAME, OPTIMIZER_NAME_BIN, SCHEDULER_NAME, SCALER_NAME, TRAINING_ARGS_NAME,
`_save_rng_state`); accelerate 1.15 `utils/constants.py`, `checkpointing.py` (`save_accelerator_state`),
`utils/fsdp_utils.py`; DeepSpeed `runtime/engine.py` (`_get_ckpt_name`, `_get_zero_ckpt_name`).  diffusers' training scripts
save by accelerate.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_STATE = re.compile(
    r"(?:optimizer|scheduler|scaler|sampler|dl_state_dict|rng_state|random_states|custom_checkpoint|training_args"
    r"|pytorch_model_fsdp)(?:_(?:rank)?\d+)*\.(?:bin|pt|pth|pkl|safetensors)"
    r"|(?:(?:bf16_|fp16_)?zero_pp_rank_\d+_)?mp_rank_\d+\w*\.pt"
)
_WHOLE = re.compile(r"pytorch_model(?:_\d+)?\.bin|model(?:_\d+)?\.safetensors")
"""The models themselves, as accelerate saves all that it has prepared (WEIGHTS_NAME, SAFE_WEIGHTS_NAME)."""


def is_training_state(name: str) -> bool:
    """Whether a file is called as a trainer calls the state of its optimizer, scheduler, random numbers and the like."""
    return _STATE.fullmatch(name) is not None


def without_state(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """A folder's files of weights: those that may be its adapter, and those that a trainer keeps to go on with.

    A whole model is of the latter where the state of a trainer stands beside it, and one other file only is left.
    """
    kept = [name for name in names if not is_training_state(name)]
    own = [name for name in kept if not _WHOLE.fullmatch(name)]
    if len(kept) < len(names) and len(own) == 1:
        kept = own
    return kept, [name for name in names if name not in kept]
