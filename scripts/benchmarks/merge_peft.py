"""The peer: `python merge_peft.py TASKS.json` merges with PEFT's `add_weighted_adapter`, and prints seconds as JSON.

The base model is a tree of modules of the right shapes over one number each, so that nothing is read, held or built
that merging does not need; PEFT reads of a base's weights only where they are and of which type.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import safe_open

Task = dict[str, Any]
"""method, sources, and output (a folder) or repeat; perhaps density and full_matrices."""


def base(source: str) -> torch.nn.Module:
    """The modules that an adapter changes."""
    root = torch.nn.Module()
    with safe_open(Path(source) / "adapter_model.safetensors", framework="pt") as file:
        keys = [key for key in file.keys() if key.endswith(".lora_A.weight")]  # noqa: SIM118  (no mapping)
        for key in keys:
            inner = file.get_slice(key).get_shape()[1]
            out = file.get_slice(key.replace("lora_A", "lora_B")).get_shape()[0]
            *parents, name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight").split(".")
            place = root
            for parent in parents:
                if not hasattr(place, parent):
                    place.add_module(parent, torch.nn.Module())
                place = getattr(place, parent)
            linear = torch.nn.Linear(1, 1, bias=False)
            linear.in_features, linear.out_features = inner, out
            weight = torch.zeros(1, dtype=torch.bfloat16).expand(out, inner)
            linear.weight = torch.nn.Parameter(weight, requires_grad=False)
            place.add_module(name, linear)
    return root


def load(model: torch.nn.Module, sources: list[str]) -> Any:
    """The adapters, in the model, as `a0`, `a1` …"""
    found = PeftModel.from_pretrained(model, sources[0], adapter_name="a0")
    for number, source in enumerate(sources[1:], 1):
        found.load_adapter(source, adapter_name=f"a{number}")
    return found


def merge(model: Any, task: Task, name: str = "merged") -> None:
    """What is compared."""
    options: dict[str, Any] = {"combination_type": task["method"], "density": task.get("density")}
    if "full_matrices" in task:
        options["svd_full_matrices"] = task["full_matrices"]
    count = len(task["sources"])
    model.add_weighted_adapter([f"a{k}" for k in range(count)], [1.0] * count, name, **options)


def run(task: Task) -> dict[str, Any]:
    """Load, merge, save; or `repeat` merges of what is loaded."""
    model = base(task["sources"][0])
    os.sync()  # what others wrote is not to be waited for
    started = time.perf_counter()
    found = load(model, task["sources"])
    loaded = time.perf_counter()
    if "repeat" in task:
        seconds = []
        for number in range(task["repeat"]):
            before = time.perf_counter()
            merge(found, task, f"merged{number}")
            seconds.append(time.perf_counter() - before)
        return {"each": seconds}
    merge(found, task)
    merged = time.perf_counter()
    found.save_pretrained(task["output"], selected_adapters=["merged"])
    saved = time.perf_counter()
    return {"read": loaded - started, "compute": merged - loaded, "write": saved - merged}


if __name__ == "__main__":
    print(json.dumps([run(task) for task in json.loads(Path(sys.argv[1]).read_text())]))
