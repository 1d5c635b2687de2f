"""Write fixtures/gguf-*: small adapters of peft, each beside the GGUF file that llama.cpp applies to the same effect.

    .venv/bin/python scripts/gguf_fixtures.py

Each folder holds the base's config (`base/config.json`), the adapter as peft saves it (`peft/`) and `adapter.gguf`, which gguf's
own writer makes of peft's tensors; no code of adapterops has a part in it.  The order of the rows of llama's queries and keys
follows from what llama.cpp's rotation expects: in each head, number i of the one half stands beside number i of the other.
There is nothing in the header but what llama.cpp asks for.  The numbers are noise.
"""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "formats"))
peer: Any = import_module("gguf_peer")

TARGETS = {"llama": peer.ALL, "qwen2": peer.ALL, "gemma": peer.ALL, "gpt2": peer.CASES["gpt2"].targets}


def main() -> None:
    """Write them all anew."""
    warnings.simplefilter("ignore")
    for name, targets in TARGETS.items():
        case, folder = peer.CASES[name], ROOT / "fixtures" / f"gguf-{name}"
        shutil.rmtree(folder, ignore_errors=True)
        base = case.base(folder / "base")
        base.write_text(json.dumps(json.loads(base.read_text()), indent=2, sort_keys=True) + "\n", encoding="utf-8")
        case.tuned(folder / "peft", target_modules=sorted(targets))
        (folder / "peft" / "README.md").unlink(missing_ok=True)
        config = folder / "peft" / "adapter_config.json"
        fields = json.loads(config.read_text(encoding="utf-8"))
        fields["target_modules"].sort()  # peft writes sets, in a new order every time
        config.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        path = folder / "peft" / "adapter_model.safetensors"
        tensors = load_file(path)
        save_file(tensors, path, {"format": "pt"})
        path.chmod(0o644)
        _write(folder / "adapter.gguf", case, tensors, float(fields["lora_alpha"]))


def _write(path: Path, case: Any, tensors: dict[str, torch.Tensor], alpha: float) -> None:
    config = case.config()
    writer = gguf.GGUFWriter(path, case.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        module, _, half = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".lora_")
        pairs.setdefault(module, {})[half] = tensor
    for module, pair in pairs.items():
        # The rows of B are the rows of the weight.
        ((name, b),) = peer.as_llama(config, {module: pair["B"]}).items()
        writer.add_tensor(f"{name}.lora_a", pair["A"].contiguous().numpy())
        writer.add_tensor(f"{name}.lora_b", b.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
