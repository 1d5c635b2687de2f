"""A pipeline whose weights are offloaded, with every weight in its place for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def suspended(pipe: Any) -> Iterator[None]:
    """Take the hooks of `enable_model_cpu_offload` and its kin off, and put them on again at the end.

    Modules that are replaced under a hook would be left out of it, and a weight that stands elsewhere has neither device
    nor dtype.  Source: huggingface/diffusers 0.42.1 `loaders/lora_base.py` (`_func_optionally_disable_offloading`).
    """
    import diffusers.loaders.lora_base

    base: Any = diffusers.loaders.lora_base
    whole, sequential, *grouped = base._func_optionally_disable_offloading(pipe)
    try:
        yield
    finally:
        # The device that the user chose; without one diffusers looks for an accelerator.
        device = {"device": pipe._offload_device} if getattr(pipe, "_offload_device", None) is not None else {}
        if whole:
            pipe.enable_model_cpu_offload(**device)
        elif sequential:
            pipe.enable_sequential_cpu_offload(**device)
        elif any(grouped):
            _regroup(pipe)


def _regroup(pipe: Any) -> None:
    from diffusers.hooks.group_offloading import _maybe_remove_and_reapply_group_offloading
    from torch import nn

    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            _maybe_remove_and_reapply_group_offloading(component)
