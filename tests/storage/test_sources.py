"""Paths of all kinds: what is opened, what is refused, and that nothing hangs."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import storage_files as files

from adapterops.errors import NotAnAdapter, UnreadableFile, UnsupportedFormat
from adapterops.storage import open_source
from adapterops.storage import tensor as lazy
from adapterops.storage.source import read_json

HEADER = {"a": files.entry("U8", [4], 0)}


def sound(path: Path) -> Path:
    return files.write_raw(path, HEADER, b"abcd")


@pytest.mark.parametrize("name", ["x.safetensors", "x.bin"])
def test_a_pipe_is_refused_and_not_waited_for(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(UnreadableFile, match="pipe"):
        open_source(tmp_path / name)


def test_devices_sockets_and_folders_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(UnreadableFile, match="device"):
        open_source(os.devnull)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        with pytest.raises(UnreadableFile):
            open_source(tmp_path / "s")
    (tmp_path / "folder" / "adapter_model.safetensors").mkdir(parents=True)
    with pytest.raises(UnreadableFile, match="is a folder"):
        open_source(tmp_path / "folder")


def test_a_config_that_is_a_pipe_is_refused(tmp_path: Path) -> None:
    sound(tmp_path / "adapter_model.safetensors")
    os.mkfifo(tmp_path / "adapter_config.json")
    with pytest.raises(UnreadableFile, match="pipe"):
        open_source(tmp_path)


def test_links_are_followed_and_broken_ones_named(tmp_path: Path) -> None:
    (tmp_path / "good.safetensors").symlink_to(sound(tmp_path / "x.safetensors"))
    assert list(open_source(tmp_path / "good.safetensors").tensors) == ["a"]
    (tmp_path / "bad.safetensors").symlink_to("nowhere")
    with pytest.raises(UnreadableFile, match=r"link to nowhere"):
        open_source(tmp_path / "bad.safetensors")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UnreadableFile):
        open_source(tmp_path / "loop")
    with pytest.raises(UnreadableFile, match="no such file"):
        open_source(tmp_path / "absent")


def test_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = sound(tmp_path / "x.safetensors")

    def refuse(*args: object, **more: object) -> int:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:  # as root, no mode bits refuse
        patch.setattr(os, "open", refuse)
        with pytest.raises(UnreadableFile, match="permission denied; make it readable"):
            open_source(path)
    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(UnreadableFile, match="cannot be listed"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.safetensors", b"", "empty"),
        ("x.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        ("x.bin", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
        ("x.safetensors", b"<!DOCTYPE html><html>log in</html>", "web page"),
        ("x.pt", b"\n<HTML><body>404</body></HTML>", "web page"),
        ("x.safetensors", b"PK\x03\x04" + bytes(40), "rename it to .bin"),
        ("x.safetensors", b"\x80\x02}q\x00X\x01" + bytes(40), "rename it to .bin"),
        ("x.safetensors", b"abc", "too few"),
        ("x.npz", b"PK\x03\x04" + bytes(20), "not a numpy archive"),
    ],
)
def test_files_of_another_kind(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UnreadableFile, match=said):
        open_source(tmp_path / name)


def test_formats_known_by_name(tmp_path: Path) -> None:
    for name, content, kind in [
        ("x.gguf", b"GGUF" + bytes(20), UnsupportedFormat),
        ("x.json", b' {"a": 1}', NotAnAdapter),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(kind):
            open_source(tmp_path / name)


def test_cut_short_between_header_and_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = sound(tmp_path / "x.safetensors")
    tensor = open_source(path).tensors["a"]
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(UnreadableFile, match="changed while being read"):
        tensor.read()
    sound(path)
    tensor = open_source(path).tensors["a"]
    assert tensor.read() == b"abcd"  # now it is open
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(UnreadableFile, match=r"ends at byte \d+"):
        tensor.read()
    monkeypatch.setattr(lazy.os, "preadv", lambda *a: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    with pytest.raises(UnreadableFile, match="Input/output error"):
        tensor.read()


def test_another_file_under_the_same_name_is_noticed(tmp_path: Path) -> None:
    path = sound(tmp_path / "x.safetensors")
    tensor = open_source(path).tensors["a"]
    sound(tmp_path / "y.safetensors").replace(path)
    with pytest.raises(UnreadableFile, match="changed while being read"):
        tensor.read()


def test_folders(tmp_path: Path) -> None:
    with pytest.raises(NotAnAdapter, match="no weights"):
        open_source(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(NotAnAdapter, match="no weights"):
        open_source(tmp_path)
    sound(tmp_path / "one.safetensors")
    (tmp_path / "._one.safetensors").write_bytes(b"a resource fork")
    assert list(open_source(tmp_path).tensors) == ["a"]
    sound(tmp_path / "two.safetensors")
    with pytest.raises(NotAnAdapter, match="several"):
        open_source(tmp_path)
    sound(tmp_path / "adapter_model.safetensors")
    source = open_source(tmp_path)
    assert source.config == {}
    beside = "one.safetensors, two.safetensors stand beside adapter_model.safetensors"
    assert [note.startswith(beside) for note in source.notes] == [True]
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    assert "adapter_model.bin is not" in open_source(tmp_path).notes[0]


def test_components_in_subfolders(tmp_path: Path) -> None:
    for name in ("unet", "text_encoder", ".adapterops-left-behind"):
        (tmp_path / name).mkdir()
        sound(tmp_path / name / "adapter_model.safetensors")
    (tmp_path / "logs").mkdir()
    source = open_source(tmp_path)
    assert list(source.parts) == ["text_encoder", "unet"]
    assert (source.size, source.key_count) == (8, 2)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"[]", "JSON object"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b'{"r": 1, "r": 2}', "'r' twice"),
        (b'{"a": {"r": 1, "r": 2}}', "'r' twice"),
        (b'{"r": "\\ud800"}', "not JSON"),
        (b'{"r": ' + b"9" * 5000 + b"}", "not JSON"),
        (b"[" * 100_000 + b"]" * 100_000, "deep"),
        (b" " * 10_000_001, "too many"),
    ],
)
def test_configs_that_cannot_be_used(text: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_bytes(text)
    with pytest.raises(UnreadableFile, match=said):
        read_json(str(tmp_path / "c.json"))
