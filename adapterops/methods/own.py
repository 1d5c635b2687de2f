"""The base's own parameters, held against the update that is to change them."""

from __future__ import annotations

from adapterops.adapter import Update
from adapterops.errors import BrokenAdapter
from adapterops.methods.base import Method, Own, need_own


def fitting(method: Method, update: Update, own: Own | None) -> Own:
    """The base's parameters.

    Raises `CannotRepresent` where they are not there, `BrokenAdapter` where the update cannot act on a weight of that shape.
    """
    found = need_own(update, own)
    shape = tuple(found.weight.shape)
    if not method.fits(update, shape):
        tensor = next(iter(update.tensors.values()))
        raise BrokenAdapter(
            f"{tensor.where}: shape {list(tensor.shape)} of {update.method} does not belong to {update.name}, whose weight "
            f"in these base weights is {list(shape)}; they are another model's"
        )
    return found
