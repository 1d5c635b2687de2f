"""A textual inversion that travels inside an adapter's file: learnt vectors for a new token of a text encoder.

Roles are the entries of the embedding's own file (`string_to_param.*`, `emb_params`, `clip_l`, `clip_g` …); the update's
module is the token.  Source: KohakuBlueleaf/LyCORIS `tools/pack_bundle.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapterops.adapter import Update
from adapterops.errors import CannotRepresent
from adapterops.methods.base import Method

if TYPE_CHECKING:
    import torch


class Bundled(Method):
    """Embeddings bundled into an adapter's file."""

    name = "bundled"
    title = "bundled textual inversions"
    source = "LyCORIS tools/pack_bundle.py"

    def delta(self, update: Update) -> torch.Tensor:
        raise CannotRepresent(f"{update.name}: a bundled embedding is a token of its own and changes no weight")
