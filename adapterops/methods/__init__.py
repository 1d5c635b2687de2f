"""The methods that updates are instances of."""

from adapterops.methods.base import Method
from adapterops.methods.bundled import Bundled
from adapterops.methods.difference import Difference
from adapterops.methods.ia3 import Ia3
from adapterops.methods.loha import Loha
from adapterops.methods.lokr import Lokr
from adapterops.methods.lora import Lora
from adapterops.methods.saved import Saved, TrainableTokens

METHODS: dict[str, Method] = {
    method.name: method
    for method in (Lora(), Loha(), Lokr(), Ia3(), Difference(), Saved(), TrainableTokens(), Bundled())
}
"""Every method by name."""

__all__ = ["METHODS", "Method"]
