"""How sound files are damaged: byte by byte, header by header."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sound import diffusers_file, load

Header = dict[str, Any]


class Evil:
    """A pickle of it runs a command when it is loaded."""

    def __reduce__(self) -> Any:
        return os.system, ("echo pwned",)


def split(path: Path) -> tuple[Header, bytes]:
    """The header and the bytes behind it of a safetensors file."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def join(path: Path, header: Header | str, data: bytes) -> Path:
    """Write a header, whatever it says, and bytes behind it."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def with_header(tmp_path: Path, change: Callable[[Header], Any], more: bytes = b"") -> Path:
    """A diffusers file whose header was changed by a function, and bytes added at its end."""
    path = diffusers_file(tmp_path)
    header, data = split(path)
    change(header)
    return join(path, header, data + more)


def entries(header: Header) -> list[Header]:
    """The header's entries in the order of their bytes."""
    return sorted((e for k, e in header.items() if k != "__metadata__"), key=lambda e: e["data_offsets"])


def with_content(tmp_path: Path, content: bytes, name: str = "pytorch_lora_weights.safetensors") -> Path:
    """A file of these bytes."""
    (tmp_path / name).write_bytes(content)
    return tmp_path / name


def pickled(tmp_path: Path, name: str = "pytorch_lora_weights.bin", **more: Any) -> Path:
    """The tensors of a sound diffusers file as torch.save writes them, and more entries."""
    sound = diffusers_file(tmp_path)
    tensors, _ = load(sound)
    sound.unlink()
    torch.save({**tensors, **more}, tmp_path / name)
    return tmp_path / name


def repacked(path: Path) -> Path:
    """The same zip with its entries deflated."""
    with zipfile.ZipFile(path) as old:
        held = {info.filename: old.read(info) for info in old.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name, data in held.items():
            new.writestr(name, data)
    return path
