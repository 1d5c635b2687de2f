"""Files and folders that hold adapters in containers that are not read: told by their first bytes or names, each with what to do.

Sources: keras-team/keras-hub `keras_hub/src/models/backbone.py` (`save_lora_weights`: HDF5, factors by number);
NVIDIA/TensorRT-LLM `examples/hf_lora_convert.py` (`model.lora_weights.npy`, `model.lora_config.npy`); llama.cpp before
September 2024, `convert-lora-to-ggml.py` (`write_file_header`: the magic `ggla`, as a little-endian number); torch
`torch/distributed/checkpoint/filesystem.py` (`__0_0.distcp`, `.metadata`), `format_utils.py` (`dcp_to_torch_save`);
NVIDIA/NeMo `nemo/core/connectors/save_restore_connector.py` (a tar archive); microsoft/onnxruntime
`onnxruntime/lora/adapter_format_utils.h` (the suffix `.onnx_adapter`); Apple's adapter training toolkit `export/`
(`.fmadapter`)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from adapterops.errors import UnsupportedFormat

_ORIGINAL = "convert the PEFT folder that it was made from"
_GATHER = (
    "gather it first: python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER adapter.pt, or export it with "
    "the trainer's own command"
)

_HDF5 = (
    "is an HDF5 file (Keras saves LoRA so, *.lora.h5), whose factors are numbered and not named; merge it into its model in "
    "Keras, or train with a program that saves names"
)
_NUMPY = (
    "is one numpy array without names (TensorRT-LLM keeps LoRA so, model.lora_weights.npy with model.lora_config.npy); "
    f"{_ORIGINAL}"
)

BEGINNINGS: Mapping[bytes, str] = {
    b"\x89HDF\r\n\x1a\n": _HDF5,
    b"\x93NUMPY": _NUMPY,
    b"algg": "is an adapter in GGML (ggla), which llama.cpp wrote and read until August 2024; "
    f"{_ORIGINAL}: --to gguf is what llama.cpp reads today",
}
ENDINGS: Mapping[str, str] = {
    ".onnx_adapter": f"is an adapter of ONNX Runtime, for one exported graph and its names of nodes; {_ORIGINAL}",
    ".nemo": "is an archive of NeMo 1; unpack it (tar -xf) and name the weights in it, or export it with NeMo",
    ".distcp": f"is a piece of a distributed checkpoint (FSDP, torchtitan, Megatron); {_GATHER}",
    ".h5": _HDF5,
    ".npy": _NUMPY,
    ".fmadapter": "is an adapter of Apple's on-device model, for that model alone",
}


def refuse(path: str, head: bytes = b"") -> None:
    """Raise `UnsupportedFormat` for a file (or folder) of a container that is known and not read."""
    said = next((what for begin, what in BEGINNINGS.items() if head.startswith(begin)), None)
    said = said or ENDINGS.get(os.path.splitext(path.rstrip("/\\"))[1].lower())
    if said is not None:
        raise UnsupportedFormat(f"{path}: {said}")


def refuse_any(path: str, names: Iterable[str]) -> None:
    """The same for the first such file of a folder in which nothing can be read."""
    for name in names:
        refuse(os.path.join(path, name))
