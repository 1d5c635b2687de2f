"""PVeRA: VeRA whose inner vector is a distribution; inference takes its mean.

ΔW = diag(lambda_b) · B[:out] · diag(lambda_d[:r]) · A[:r, :in], exactly of rank r.  Roles as in `vera`, but `lambda_d` is
(2r,) and `A` (2r, largest in_features): the second halves give the logarithm of the variance, which only training
uses.  With `sample_at_inference` the noise is drawn at every forward, too, which no weight does: such an update has a
delta only where `options["sample_at_inference"]` is false (peft's default; peft's own merge takes the mean).

Sources: https://arxiv.org/abs/2512.07703; peft `tuners/pvera/layer.py`, `tuners/pvera/model.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adapterops.adapter import Update
from adapterops.errors import CannotRepresent
from adapterops.methods.vera import Vera

if TYPE_CHECKING:
    import numpy.typing

    Array = numpy.typing.NDArray[Any]


class Pvera(Vera):
    """PVeRA on linear modules."""

    name = "pvera"
    title = "PVeRA (probabilistic VeRA)"
    formula = "as VeRA, with the mean of its distribution"
    form = "rank r"
    source = "https://arxiv.org/abs/2512.07703"
    parts = 2

    def factors(self, update: Update) -> tuple[Array, Array]:
        if update.options.get("sample_at_inference", False):
            raise CannotRepresent(
                f"{update.name}: sample_at_inference draws noise at every forward, which no weight does; "
                "--set sample_at_inference=false takes the mean, as peft's merge does"
            )
        return super().factors(update)
