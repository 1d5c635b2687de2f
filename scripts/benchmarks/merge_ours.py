"""Merging inside a process: `python merge_ours.py TASKS.json` does what `merge_peft.py` does, with adapterops."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch  # noqa: F401  (its import is not to be measured)

import adapterops as ao

Task = dict[str, Any]
"""method, sources, and output or repeat; options: further ones of the merge."""


def run(task: Task) -> dict[str, Any]:
    """Read, merge, write; or `repeat` merges of adapters that are read."""
    options = task.get("options", {})
    os.sync()  # what others wrote is not to be waited for
    if "repeat" not in task:
        return dict(ao.merge(task["sources"], task["output"], task["method"], **options, overwrite=True).seconds)
    adapters = [ao.load(source) for source in task["sources"]]
    seconds = []
    for _ in range(task["repeat"]):
        before = time.perf_counter()
        ao.combine(adapters, task["method"], **options)
        seconds.append(time.perf_counter() - before)
    return {"each": seconds}


if __name__ == "__main__":
    print(json.dumps([run(task) for task in json.loads(Path(sys.argv[1]).read_text())]))
