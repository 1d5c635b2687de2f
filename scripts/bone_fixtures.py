#!/usr/bin/env python3
r"""Writes fixtures/bone/: adapters of Bone, and what peft's Bone layers make of an input.

peft had Bone from 0.14 to 0.18 and has MiSS since; 0.17.1 writes these, and it needs transformers 4.  Both go into a
folder of their own, never into the project's environment, which lends torch and safetensors:

    .venv/bin/pip install --no-deps --target /tmp/bone \
        peft==0.17.1 transformers==4.57.1 huggingface_hub==0.36.2 tokenizers==0.22.1
    PYTHONPATH=/tmp/bone .venv/bin/python scripts/bone_fixtures.py [FOLDER]

Values are drawn by name, nothing is downloaded, and a second run writes the same bytes.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import torch
from fixture_tools import fill, settle, values
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

VERSION = "0.17.1"
INPUTS = 10
CASES: dict[str, dict[str, Any]] = {
    "bone": {"r": 4, "init_weights": True, "modules_to_save": ["head"]},
    "bat": {"r": 2, "init_weights": "bat", "modules_to_save": ["head"]},
    "bin": {"r": 3, "init_weights": True},
}
"""The fields of each config.  4 and 3 do not divide the inputs of `encoder.up`, which Bone's layer then pads."""


class Tiny(nn.Module):
    """Three linear layers; none of their sizes is another's."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"up": nn.Linear(INPUTS, 12), "down": nn.Linear(12, 8, bias=False)})
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.encoder["up"](x))
        out: torch.Tensor = self.head(torch.tanh(self.encoder["down"](hidden)))
        return out


def base() -> Tiny:
    model = Tiny()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(values(parameter.shape, f"base.{name}", 0.5))
    return model.eval()


def adapter(fields: dict[str, Any]) -> Any:
    """The base under a Bone adapter whose every tensor is drawn."""
    config = peft.BoneConfig(target_modules=["up", "down"], **fields)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base(), config).eval()
    fill(model, "bone_block")
    fill(model, "modules_to_save")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bone_block" in name or "modules_to_save" in name:
                parameter *= 20
    return model


def write(folder: Path, fields: dict[str, Any], pickled: bool) -> None:
    """A PEFT folder, and beside it the base (`base.…`), an input and the adapted model's output."""
    model = adapter(fields)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, safe_serialization=not pickled)
    (folder / "README.md").unlink()
    config = folder / "adapter_config.json"
    stated = json.loads(config.read_text())
    stated["target_modules"].sort()  # peft writes a set, in any order
    config.write_text(json.dumps(stated, indent=2, sort_keys=True))
    x = values((4, INPUTS), "input", 1.0)
    with torch.no_grad():
        found = {"input": x, "output": model(x), **{f"base.{k}": v for k, v in base().state_dict().items()}}
    save_file(found, folder / "outputs.safetensors")
    for path in folder.glob("*.safetensors"):
        settle(path)


def main(folder: Path) -> None:
    if peft.__version__ != VERSION:
        raise SystemExit(
            f"this is peft {peft.__version__}; Bone's fixtures are made by {VERSION} (see the head of this file)"
        )
    shutil.rmtree(folder, ignore_errors=True)
    for name, fields in CASES.items():
        write(folder / name, fields, pickled=name == "bin")
    # What is left when somebody passes on the weights alone.
    bare = folder / "bare.safetensors"
    save_file(get_peft_model_state_dict(adapter(CASES["bat"])), bare, {"format": "pt"})
    settle(bare)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "fixtures" / "bone")
