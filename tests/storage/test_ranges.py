"""Parts of files on the Hub, against a server on this machine that counts what it sends."""

from __future__ import annotations

import os
import pickle
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import storage_files as files
from hub_server import COMMIT, Served, serving
from huggingface_hub import constants

from adapterops.errors import AdapterOpsError, InvalidHeader, UnreadableFile
from adapterops.storage import Source, hub, ranges
from adapterops.storage.source import open_in

NAME = "adapter_model.safetensors"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setattr(ranges, "PAUSES", (0.0, 0.0))
    monkeypatch.setattr(ranges, "TIMEOUT", 1.0)
    with serving(monkeypatch, tmp_path / "cache") as held:
        yield held


def file_of(sizes: dict[str, int]) -> bytes:
    """Tensors of bytes, each of its own content."""
    header, parts, position = {}, list[bytes](), 0
    for n, (key, size) in enumerate(sizes.items()):
        header[key] = files.entry("U8", [size], position)
        parts.append((bytes((n * 7 + i) % 251 for i in range(min(size, 251))) * (size // 251 + 1))[:size])
        position += size
    text = files.dump(header)
    return len(text).to_bytes(8, "little") + text + b"".join(parts)


def opened(url: str = "hf://me/style") -> Source:
    folder, name = hub.locate(url, ranges=True)
    return open_in(folder, name)


def read_all() -> dict[str, bytes]:
    return {key: bytes(tensor.read()) for key, tensor in opened().tensors.items()}


def refused(*words: str) -> AdapterOpsError:
    with pytest.raises(UnreadableFile) as caught:
        read_all()
    assert str(caught.value).startswith(f"hf://me/style/{NAME}: "), caught.value
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value), caught.value
    assert caught.value.fault == "not-fetched"
    return caught.value


def contents(raw: bytes) -> dict[str, bytes]:
    """What a local copy of the file holds."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / NAME
        path.write_bytes(raw)
        from adapterops.storage import open_source

        return {key: bytes(t.read()) for key, t in open_source(path).tensors.items()}


@pytest.mark.parametrize("redirect", [True, False])
def test_a_header_costs_its_own_bytes(redirect: bool, server: Served) -> None:
    server.redirect = redirect
    server.files = {NAME: file_of({f"t{i}": 25_000 for i in range(2000)}), "adapter_config.json": b'{"r": 4}'}
    source = opened()
    assert len(source.tensors) == 2000
    assert source.config == {"r": 4}
    assert source.path == "hf://me/style"
    assert f"revision {COMMIT}" in source.notes[0]
    # 64 KiB, and the rest of a header of some 130 kB.
    assert ranges.FIRST < server.sent[NAME] < 200_000
    assert len(server.ranges) == (3 if redirect else 2)  # the content network's address is used again
    assert source.tensors["t1"].source.path == f"hf://me/style/{NAME}"


@pytest.mark.parametrize("behave", ["", "cut-once", "capped", "whole"])
def test_every_byte_is_served_once(behave: str, server: Served) -> None:
    raw = file_of({"a": 3_000_000, "b": 1_000_001, "c": 20, "d": 300_000, "e": 0, "f": 7})
    server.files, server.behave = {NAME: raw}, behave
    source = opened()
    for _ in range(3):
        assert {key: bytes(t.read()) for key, t in source.tensors.items()} == contents(raw)
    limit = {"": 1.0, "cut-once": 1.05, "capped": 1.05, "whole": 2.3}[behave]
    assert server.sent[NAME] <= len(raw) * limit


def test_reading_on_takes_few_requests_and_reading_here_and_there_few_bytes(server: Served) -> None:
    raw = file_of({f"t{i}": 20_000 for i in range(500)})
    server.files = {NAME: raw}
    source = opened()
    for tensor in source.tensors.values():
        tensor.read()
    assert server.sent[NAME] <= len(raw)
    assert len(server.ranges) < 16
    server.sent.clear()
    source = opened()
    for n in (50, 450, 250):
        source.tensors[f"t{n}"].read()
    assert server.sent[NAME] <= 5 * ranges.FIRST


def test_single_numbers_are_fetched_together(server: Served) -> None:
    sizes = {f"{i}.{part}": size for i in range(120) for part, size in (("alpha", 2), ("up", 40_000), ("down", 40_000))}
    raw = file_of(sizes)
    server.files = {NAME: raw}
    source = opened()
    served, expected = server.sent[NAME], contents(raw)
    for i in range(120):
        assert bytes(source.tensors[f"{i}.alpha"].read()) == expected[f"{i}.alpha"]
    assert server.sent[NAME] - served <= 240
    assert len(set(server.ranges)) <= 121


def test_threads_share_what_was_read(server: Served) -> None:
    raw = file_of({f"t{i}": 100_000 for i in range(30)})
    server.files = {NAME: raw}
    source, expected, wrong = opened(), contents(raw), list[str]()

    def work(step: int) -> None:
        wrong.extend(k for k in list(source.tensors)[::step] if bytes(source.tensors[k].read()) != expected[k])

    threads = [threading.Thread(target=work, args=(step,)) for step in (1, -1, 2, -3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert server.sent[NAME] <= len(raw)


def test_what_the_cache_holds_is_not_asked_for(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    server.files = {NAME: file_of({"a": 100}), "adapter_config.json": b"{}"}
    folder, _ = hub.locate("hf://me/style")
    folder.fetch(NAME)
    folder.fetch("adapter_config.json")
    server.asked.clear()
    source = opened()
    assert bytes(source.tensors["a"].read()) == contents(server.files[NAME])["a"]
    assert [method for method, _, _ in server.asked] == ["GET"]  # the list of files
    assert server.ranges == []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    server.asked.clear()
    source = opened()
    assert bytes(source.tensors["a"].read()) == contents(server.files[NAME])["a"]
    assert "HF_HUB_OFFLINE is set" in source.notes[0]
    assert server.asked == []


def test_offline_without_a_copy(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UnreadableFile, match="HF_HUB_OFFLINE is set and the cache"):
        opened()


def test_a_server_without_ranges(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    server.behave = "whole"
    server.files = {NAME: file_of({"a": 40_000_000})}
    source = opened()  # the header is the beginning of what is sent; the rest is cut off
    assert list(source.tensors) == ["a"]
    with pytest.raises(UnreadableFile, match=r"sends whole files only.*hf download"):
        source.tensors["a"].read()
    assert server.sent[NAME] < 30_000_000


@pytest.mark.parametrize(
    ("behave", "words"),
    [
        ("cut", "cannot be had from"),
        ("stall", "cannot be had from"),
        ("drip", "too slow"),
        ("range", "asked for bytes 0 to 65535, and the server sends 'bytes 1-"),
        ("gzip", "compresses"),
        ("grow", "changed while it was read"),
        ("500", "the server answered 500"),
        ("429", "too many requests"),
        ("418", "answered 418"),
        ("403", "refuses access (403)"),
        ("401", "refuses access (401)"),
        ("404", "does not have it (404)"),
    ],
)
def test_refusals_and_failures(behave: str, words: str, server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "SLOWEST", 1 << 17)
    server.behave, server.files = behave, {NAME: file_of({"a": 200_000, "b": 10})}
    started = time.monotonic()
    refused(words)
    assert time.monotonic() - started < 15


def test_a_gated_repository(server: Served) -> None:
    server.files, server.behave, server.error_code = {NAME: file_of({"a": 1})}, "403", "GatedRepo"
    refused("gated", f"accept its terms at {server.url}/me/style", "hf auth login")


def test_after_a_failure_nobody_waits_again(server: Served) -> None:
    server.files = {NAME: file_of({"a": 200_000, "b": 200_000})}
    source = opened()
    server.behave, server.redirect = "cut", False
    for key in ("b", "a", "b"):
        with pytest.raises(UnreadableFile, match="cannot be had from"):
            source.tensors[key].read()
    asked = len(server.asked)
    with pytest.raises(UnreadableFile):
        source.tensors["b"].read()
    assert len(server.asked) == asked


def test_the_file_changes_while_it_is_read(server: Served) -> None:
    server.files = {NAME: file_of({"a": 200_000, "b": 200_000})}
    source = opened()
    server.tags[NAME] = "f" * 64
    with pytest.raises(UnreadableFile, match=r"changed while it was read \(its ETag differs\); run the command again"):
        source.tensors["b"].read()
    server.tags.clear()
    server.redirect = False
    source = opened()
    server.commit = "b" * 40
    with pytest.raises(UnreadableFile, match="changed while it was read"):
        source.tensors["b"].read()


def test_an_address_that_expires_is_asked_for_again(server: Served) -> None:
    raw = file_of({"a": 200_000, "b": 200_000})
    server.files = {NAME: raw}
    source = opened()
    server.expired = 1
    assert bytes(source.tensors["b"].read()) == contents(raw)["b"]
    server.expired = 1000
    with pytest.raises(UnreadableFile, match="answered 403"):
        source.tensors["a"].read()


def test_an_address_that_is_good_for_one_part(server: Served) -> None:
    raw = file_of({f"t{i}": 200_000 for i in range(40)})
    server.files, server.bound = {NAME: raw}, True
    assert {key: bytes(t.read()) for key, t in opened().tensors.items()} == contents(raw)
    assert server.sent[NAME] <= len(raw) + ranges.FIRST


def test_the_token_goes_to_the_hub_and_nowhere_else(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    server.files = {NAME: file_of({"a": 200_000, "b": 200_000})}
    with serving(monkeypatch, constants.HF_HUB_CACHE) as other:
        other.files = server.files
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        server.network = other.network  # where the Hub's redirects lead
        opened().tensors["b"].read()
    assert server.tokens == {("resolve", "Bearer hf_test")}
    assert other.tokens == {("cdn", "")}


def test_empty_and_damaged_files(server: Served) -> None:
    sound = file_of({"a": 100})
    for content, kind, words in (
        (b"", UnreadableFile, "the file is empty"),
        (sound[:-1], InvalidHeader, "bytes"),
        (b"version https://git-lfs.github.com/spec/v1\n", UnreadableFile, "Git LFS pointer"),
        (b"\xff" * 7 + b"\x00" + b"{}", InvalidHeader, "header"),
    ):
        server.files = {NAME: content}
        with pytest.raises(UnreadableFile, match=words) as caught:
            opened()
        assert type(caught.value) is kind
        assert caught.value.fault != "not-fetched"
        assert "cached as" not in str(caught.value)


def test_a_pickle_is_downloaded_within_a_limit(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    import torch

    buffer = io.BytesIO()
    torch.save({"a": torch.ones(3)}, buffer)
    server.files = {"adapter_model.bin": buffer.getvalue()}
    assert list(opened().tensors) == ["a"]
    for sizes in (True, False):
        server.sizes = sizes
        server.files = {f"{sizes}.bin": buffer.getvalue()}
        with monkeypatch.context() as patch:
            patch.setattr(hub, "MAX_FETCHED", 100)
            with pytest.raises(UnreadableFile, match=r"only up to 100 are downloaded.*hf download"):
                opened(f"hf://me/style/{sizes}.bin")


def test_a_config_has_a_limit_too(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    server.files = {NAME: file_of({"a": 1}), "adapter_config.json": b" " * 5000 + b"{}"}
    monkeypatch.setattr(hub, "MAX_TEXT", 4000)
    with pytest.raises(UnreadableFile, match=r"adapter_config.json: has 5002 bytes, and only up to 4000"):
        opened()


def test_shards_are_read_in_parts(server: Served) -> None:
    one, two = "adapter_model-00001-of-00002.safetensors", "adapter_model-00002-of-00002.safetensors"
    index = files.dump({"weight_map": {"a": one, "b": two}})
    server.files = {one: file_of({"a": 900_000}), two: file_of({"b": 900_000}), f"{NAME}.index.json": index}
    assert list(opened().tensors) == ["a", "b"]
    assert server.sent[one] == server.sent[two] == ranges.FIRST


def test_no_room_for_what_is_read(server: Served, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    server.files = {NAME: file_of({"a": 1})}
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    refused("cannot write to", "TMPDIR")


def test_nothing_is_left_behind(server: Served, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "t"))
    server.files = {NAME: file_of({"a": 1000})}
    opened().tensors["a"].read()
    assert os.listdir(tmp_path / "t") == []


def test_the_folder_can_go_to_another_process(server: Served) -> None:
    server.files = {NAME: file_of({"a": 1000})}
    folder, name = hub.locate("hf://me/style", ranges=True)
    copy = pickle.loads(pickle.dumps(folder))
    assert list(open_in(copy, name).tensors) == ["a"]
    assert server.sent[NAME] > 0
