"""Files made to do harm: each is examined in a process of its own, whose peak memory is measured.

`VmHWM` is what the kernel says of the process's own memory (Linux); it includes Python itself, and torch (some 220 MiB)
where a pickle passed the static scan, so that torch may open it.
"""

from __future__ import annotations

import io
import json
import os
import selectors
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from broken_files import join
from sound import peft_folder

from adapterops.storage.safetensors import MAX_HEADER, MAX_VALUES

PEAK = 300
"""MiB."""
SECONDS = 60
"""After which a process is taken to hang; on an idle machine each takes less than five."""

_SERVER = """
import json, os, sys, traceback
from adapterops.validation import registry
from adapterops.validation.run import validate
registry.rules()
for line in sys.stdin:
    child = os.fork()
    if not child:
        try:
            report = validate(json.loads(line))
            peak = next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")) / 1024
            print(json.dumps({"codes": [f.code for f in report], "peak": peak, "torch": "torch" in sys.modules}), flush=True)
        except BaseException:
            print(json.dumps({"failed": traceback.format_exc()[-2000:]}), flush=True)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    if status:
        print(json.dumps({"failed": f"killed: {status}"}), flush=True)
"""
"""Examines each file in a fork, which begins with what Python and adapterops themselves take."""

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the kernel does not tell the peak")


@pytest.fixture(scope="module", name="server")
def _server() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.kill()


def examined(server: subprocess.Popen[str], path: Path) -> dict[str, Any]:
    """The codes that are found, the peak memory in MiB, and whether torch was needed."""
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(json.dumps(str(path)) + "\n")
    server.stdin.flush()
    with (
        selectors.DefaultSelector() as waiting
    ):  # `select` knows no descriptor above 1023, and earlier tests keep files open
        waiting.register(server.stdout, selectors.EVENT_READ)
        assert waiting.select(SECONDS), "it hangs"
    result = dict(json.loads(server.stdout.readline()))
    assert "failed" not in result, result["failed"]
    return result


def _written(tmp_path: Path, content: bytes, name: str) -> Path:
    (tmp_path / name).write_bytes(content)
    return tmp_path / name


def _claimed(tmp_path: Path, length: int) -> Path:
    """A header of this length, all of it zeros that take no space on the disk."""
    path = tmp_path / "lora.safetensors"
    with path.open("wb") as file:
        file.write(length.to_bytes(8, "little") + b'{"a":')
        file.truncate(length + 8)
    return path


def _tensors(tmp_path: Path, name: str, count: int) -> Path:
    """As many empty tensors as a header may hold."""
    entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return join(tmp_path / "lora.safetensors", "{" + ",".join(f'"{name % n}":{entry}' for n in range(count)) + "}", b"")


def _metadata(tmp_path: Path, value: str) -> Path:
    entry = '"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return join(tmp_path / "lora.safetensors", f'{{"__metadata__":{{"k":{value}}},{entry}}}', b"")


def _tensor(tmp_path: Path, **fields: Any) -> Path:
    return join(
        tmp_path / "lora.safetensors",
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **fields}},
        bytes(4),
    )


HEADERS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "100 MB claimed": (lambda p: _claimed(p, 100_000_000), "F007"),
    "100 MB of tensors": (lambda p: _tensors(p, "t%d" + "x" * 300, 280_000), "F007"),
    "100 MB of a string": (lambda p: _metadata(p, '"' + "x" * 100_000_000 + '"'), "F007"),
    "100 MB of numbers": (lambda p: _metadata(p, "[" + "0," * 50_000_000 + "0]"), "F007"),
    "100 MB of brackets": (lambda p: _metadata(p, "[" * 50_000_000 + "]" * 50_000_000), "F007"),
    "as many tensors as are read": (lambda p: _tensors(p, "t%06d", MAX_VALUES // 7 - 10), "F020"),
    "a string as long as is read": (lambda p: _metadata(p, '"\U0001f600' + "x" * (MAX_HEADER - 1000) + '"'), "F020"),
    "as many numbers as are read": (lambda p: _metadata(p, "[" + "0," * (MAX_VALUES - 20) + "0]"), "F037"),
    "as many objects as are read": (lambda p: _metadata(p, "[" + '{"a":0},' * (MAX_VALUES // 2 - 20) + "0]"), "F037"),
    "nested": (lambda p: _metadata(p, "[" * 400_000 + "]" * 400_000), "F002"),
    "a billion elements": (lambda p: _tensor(p, shape=[1_000_000_000]), "F031"),
    "2^64 elements of no bytes": (lambda p: _tensor(p, shape=[2**32, 2**32, 0], data_offsets=[0, 0]), "F031"),
    "negative positions": (lambda p: _tensor(p, data_offsets=[-4, 0]), "F032"),
    "a number of a million digits": (
        lambda p: join(
            p / "lora.safetensors", '{"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,4]}}' % ("9" * 1_000_000), b""
        ),
        "F031",
    ),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers(name: str, tmp_path: Path, server: subprocess.Popen[str]) -> None:
    make, code = HEADERS[name]
    result = examined(server, make(tmp_path))
    assert code in result["codes"]
    assert result["peak"] < PEAK


def _raw(tmp_path: Path, program: bytes) -> Path:
    return _written(tmp_path, b"\x80\x02" + program, "lora.bin")


def _zipped(tmp_path: Path, program: bytes) -> Path:
    """The same in a zip as torch.save writes it."""
    with zipfile.ZipFile(tmp_path / "lora.pt", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + program)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/data/0", bytes(64))
    return tmp_path / "lora.pt"


def _laughs() -> bytes:
    """Lists of ten of the list before, fifty deep: 10^50 elements for whoever follows them all."""
    return b"]q\0" + b"".join(b"](" + b"h%c" % n * 10 + b"eq%c" % (n + 1) for n in range(50)) + b"."


PICKLES: dict[str, tuple[Callable[[Path], Path], set[str]]] = {
    "nested tuples": (lambda p: _raw(p, b")" + b"\x85" * 500_000 + b"."), {"F014"}),
    "a nested tuple as a key": (lambda p: _raw(p, b"})" + b"\x85" * 100_000 + b"Ns."), {"F014"}),
    "a key of 2^60 tuples": (lambda p: _zipped(p, b"})" + b"2\x86" * 60 + b"Ns."), {"F014"}),
    "nested lists": (lambda p: _zipped(p, b"(" * 500_000 + b"l" * 500_000 + b"."), {"F004", "F014"}),
    "lists of lists of lists": (lambda p: _zipped(p, _laughs()), {"F020"}),
    "a million values": (lambda p: _raw(p, b"N" * 10_000_000 + b"."), {"F014"}),
    "a million kept values": (
        lambda p: _raw(p, b"N" + b"".join(b"r" + struct.pack("<I", n) for n in range(400_000)) + b"."),
        {"F014"},
    ),
    "a million objects": (
        lambda p: _raw(p, b"ccollections\nOrderedDict\nq\0" + b"h\0)R" * 500_000 + b"."),
        {"F014"},
    ),
    "as many objects as are made": (
        lambda p: _zipped(p, b"ccollections\nOrderedDict\nq\0(" + b"h\0)R" * 59_000 + b"t."),
        {"F020"},
    ),
    "as many empty dicts as are made": (lambda p: _zipped(p, b"(" + b"}" * 590_000 + b"t."), {"F020"}),
    "a byte array of 100 GB": (
        lambda p: _zipped(p, b"c__builtin__\nbytearray\n\x8a\x05\x00\xe8\x76\x48\x17\x85R."),
        {"F014"},
    ),
    "a byte array of a tensor's size": (
        lambda p: _zipped(p, b"c__builtin__\nbytearray\nctorch._utils\n_rebuild_tensor_v2\n(NtR\x85R."),
        {"F014"},
    ),
    "a number of 2 GB": (lambda p: _raw(p, b"\x8b\xff\xff\xff\x7f" + bytes(1000)), {"F004"}),
    "a number of a negative length": (lambda p: _raw(p, b"\x8b\xff\xff\xff\xff" + bytes(1000)), {"F004"}),
    "a string of 4 GB": (lambda p: _raw(p, b"X\xff\xff\xff\xff" + bytes(1000)), {"F004"}),
    "a string of 2^63 bytes": (lambda p: _raw(p, b"\x8d" + b"\xff" * 7 + b"\x7f" + bytes(1000)), {"F004"}),
    "bytes of 2^63": (lambda p: _zipped(p, b"\x8e" + b"\xff" * 7 + b"\x7f" + bytes(1000)), {"F004"}),
    "a line of 50 MB": (lambda p: _raw(p, b"c" + b"x" * 50_000_000 + b"\ny\n)R."), {"F010"}),
    "a string of 50 MB": (lambda p: _raw(p, b"V" + b"x" * 50_000_000 + b"\n."), {"F004", "F020"}),
    "a storage of 10^18 elements": (
        lambda p: _zipped(
            p,
            b"ctorch._utils\n_rebuild_tensor_v2\n((X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000X\3\0\0\0cpu"
            b"\x8a\x08\x00\x00\x64\xa7\xb3\xb6\xe0\x0dtQK\0)),)\x89ccollections\nOrderedDict\n)RtR.",
        ),
        {"F004"},
    ),
}
"""What the file is, and one of the codes that are found: torch says of some what they are, and it changes its mind."""


@pytest.mark.parametrize("name", PICKLES)
def test_pickles(name: str, tmp_path: Path, server: subprocess.Popen[str]) -> None:
    make, expected = PICKLES[name]
    result = examined(server, make(tmp_path))
    assert expected & set(result["codes"])
    assert result["peak"] < PEAK


def _npz(tmp_path: Path, arrays: dict[str, Any]) -> Path:
    np.savez_compressed(tmp_path / "lora.npz", **arrays)
    return tmp_path / "lora.npz"


def _deflated(tmp_path: Path) -> Path:
    with (
        zipfile.ZipFile(tmp_path / "lora.pt", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("archive/data.pkl", "w") as entry,
    ):
        for _ in range(400):
            entry.write(bytes(1 << 20))
    return tmp_path / "lora.pt"


def _entries(tmp_path: Path, count: int, name: str) -> Path:
    """A list of entries that all are one and the same."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a.npy", b"x")
    raw = file.getvalue()
    start, end = raw.index(b"PK\1\2"), raw.index(b"PK\5\6")
    one = raw[start:end]
    tail = raw[end : end + 8] + struct.pack("<HHIIH", 0xFFFF, 0xFFFF, len(one) * count, start, 0)
    return _written(tmp_path, raw[:start] + one * count + tail, name)


ARCHIVES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "zeros in a numpy archive": (lambda p: _npz(p, {"a": np.zeros(1 << 28, dtype=np.uint8)}), "F014"),
    "zeros in a torch archive": (_deflated, "F013"),
    "a million entries in a numpy archive": (lambda p: _entries(p, 1_000_000, "lora.npz"), "F014"),
    "a million entries in a torch archive": (lambda p: _entries(p, 1_000_000, "lora.pt"), "F014"),
    "as many entries as are read": (lambda p: _entries(p, 150_000, "lora.npz"), "F014"),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_archives(name: str, tmp_path: Path, server: subprocess.Popen[str]) -> None:
    make, code = ARCHIVES[name]
    result = examined(server, make(tmp_path))
    assert result["codes"] == [code]
    assert result["peak"] < PEAK
    assert not result["torch"]


def _config(tmp_path: Path, text: str, size: int = 0) -> Path:
    folder = peft_folder(tmp_path)
    with (folder / "adapter_config.json").open("w") as file:
        file.write(text)
        if size:
            file.truncate(size)
    return folder


def _readme(tmp_path: Path) -> Path:
    folder = peft_folder(tmp_path)
    with (folder / "README.md").open("a") as file:
        file.truncate(2_000_000_000)
    return folder


def _index(tmp_path: Path, weight_map: str) -> Path:
    return _written(tmp_path, b'{"weight_map":%s}' % weight_map.encode(), "lora.safetensors.index.json")


def _loop(tmp_path: Path) -> Path:
    (tmp_path / "lora.safetensors").symlink_to("lora.safetensors")
    (tmp_path / "again").symlink_to(tmp_path)
    return tmp_path


def _pipe(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "lora-00001-of-00002.safetensors")
    return _index(tmp_path, '{"a":"lora-00001-of-00002.safetensors"}')


def _device(tmp_path: Path) -> Path:
    (tmp_path / "x.safetensors").symlink_to("/dev/zero")
    return _index(tmp_path, '{"a":"x.safetensors"}')


FOLDERS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a config of 1 GB": (lambda p: _config(p, "{", 1_000_000_000), ""),
    "a config of numbers": (lambda p: _config(p, '{"r":[' + "0," * 4_900_000 + "0]}"), ""),
    "a config of objects": (lambda p: _config(p, '{"r":[' + '{"a":0},' * 240_000 + "0]}"), ""),
    "a config of one string": (lambda p: _config(p, '{"r":"\U0001f600' + "x" * 9_000_000 + '"}'), ""),
    "a nested config": (lambda p: _config(p, '{"r":' + "[" * 200_000 + "]" * 200_000 + "}"), ""),
    "a model card of 2 GB": (_readme, ""),
    "an index of paths": (lambda p: _index(p, '{"a":"../../../etc/passwd"}'), "F045"),
    "an index of a million files": (
        lambda p: _index(p, "{" + ",".join(f'"t{n}":"s{n}.safetensors"' for n in range(400_000)) + "}"),
        "F046",
    ),
    "an index of 100 MB": (lambda p: _index(p, '{"a":"' + "x" * 100_000_000 + '"}'), "F007"),
    "links that lead back": (_loop, "F001"),
    "a pipe in an index": (_pipe, "F001"),
    "a device in an index": (_device, "F001"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folders(name: str, tmp_path: Path, server: subprocess.Popen[str]) -> None:
    make, code = FOLDERS[name]
    result = examined(server, make(tmp_path))
    assert not code or code in result["codes"]
    assert result["peak"] < PEAK
