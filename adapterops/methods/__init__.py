"""The methods that updates are instances of."""

from adapterops.methods.base import Method
from adapterops.methods.lora import Lora
from adapterops.methods.saved import Saved, TrainableTokens

METHODS: dict[str, Method] = {method.name: method for method in (Lora(), Saved(), TrainableTokens())}
"""Every method by name."""

__all__ = ["METHODS", "Method"]
