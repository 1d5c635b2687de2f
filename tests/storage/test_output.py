"""Output appears whole or not at all, whatever happens while it is written."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import storage_files as files

from adapterops import api
from adapterops.errors import OutputExists, OutputFailed, ProofFailed, UsageError
from adapterops.storage import LazyTensor, open_source, output
from adapterops.storage.output import Staged
from adapterops.storage.tensor import CHUNK, MemorySource

BIG = LazyTensor("a", "U8", (3 * CHUNK,), MemorySource(bytes(3 * CHUNK)), 0)


def write_file(target: Path, overwrite: bool = False, text: bytes = b"new") -> None:
    with Staged(str(target), False, overwrite) as staged:
        staged.write_tensors("", {"a": LazyTensor("a", "U8", (3,), MemorySource(text), 0)}, {})
        staged.commit()


def write_folder(target: Path, overwrite: bool = False, names: tuple[str, ...] = ("one", "two", "three")) -> None:
    with Staged(str(target), True, overwrite) as staged:
        for name in names:
            staged.write_text(name, f"new {name}")
        staged.commit()


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every path below, with its content: None for a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_a_file_and_a_folder_appear(tmp_path: Path) -> None:
    write_file(tmp_path / "sub" / "deep" / "x.safetensors")
    assert open_source(tmp_path / "sub/deep/x.safetensors").tensors["a"].read() == b"new"
    write_folder(tmp_path / "out", names=("one", "unet/two"))
    assert tree(tmp_path / "out") == {"one": b"new one", "unet": None, "unet/two": b"new unet/two"}
    assert sorted(os.listdir(tmp_path)) == ["out", "sub"]
    assert os.listdir(tmp_path / "sub/deep") == ["x.safetensors"]


def test_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_file(Path("x.safetensors"))
    write_folder(Path("out"))
    write_folder(Path("."))
    assert sorted(os.listdir(tmp_path)) == ["one", "out", "three", "two", "x.safetensors"]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_are_those_of_any_new_file(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        write_file(tmp_path / "new" / "x.safetensors")
        write_folder(tmp_path / "out", names=("one", "unet/two"))
        (tmp_path / "plain").write_text("")
        (tmp_path / "folder").mkdir()
    finally:
        os.umask(before)

    def mode(name: str) -> int:
        return stat.S_IMODE((tmp_path / name).stat().st_mode)

    assert mode("new/x.safetensors") == mode("out/one") == mode("out/unet/two") == mode("plain")
    assert mode("out") == mode("out/unet") == mode("new") == mode("folder")


def test_an_existing_file_needs_overwrite(tmp_path: Path) -> None:
    target = tmp_path / "x.safetensors"
    target.write_text("old")
    with pytest.raises(OutputExists, match="--overwrite"):
        write_file(target)
    assert tree(tmp_path) == {"x.safetensors": b"old"}
    write_file(target, overwrite=True)
    assert open_source(target).tensors["a"].read() == b"new"


def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "x.safetensors"
    monkeypatch.setattr(output, "check_target", lambda *a: target.write_text("theirs"))
    with pytest.raises(OutputExists):
        write_file(target)
    assert tree(tmp_path) == {"x.safetensors": b"theirs"}


def test_without_hard_links_a_rename_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", lambda *a: (_ for _ in ()).throw(OSError(errno.EPERM, "no links")))
    write_file(tmp_path / "x.safetensors")
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_links_at_the_target_are_replaced_not_followed(tmp_path: Path) -> None:
    (tmp_path / "theirs").write_text("theirs")
    for name in ("theirs", "nowhere"):
        link = tmp_path / "x.safetensors"
        link.symlink_to(name)
        with pytest.raises(OutputExists):
            write_file(link)
        write_file(link, overwrite=True)
        assert not link.is_symlink()
        link.unlink()
    assert (tmp_path / "theirs").read_text() == "theirs"


def test_what_is_no_file_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("old")
    (tmp_path / "out" / "one").mkdir(parents=True)
    (tmp_path / "out2").mkdir()
    (tmp_path / "out2" / "unet").write_text("old")
    before = tree(tmp_path)
    for attempt in (
        lambda: write_file(tmp_path / "folder", overwrite=True),
        lambda: write_file(tmp_path / "pipe", overwrite=True),
        lambda: write_folder(tmp_path / "file", overwrite=True),
        lambda: write_folder(tmp_path / "out", overwrite=True),
        lambda: write_folder(tmp_path / "out2", overwrite=True, names=("unet/one",)),
    ):
        with pytest.raises(OutputExists):
            attempt()
    assert tree(tmp_path) == before


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    for target in (tmp_path / "file" / "x.safetensors", tmp_path / "file" / "deep" / "x.safetensors"):
        with pytest.raises(OutputFailed, match="cannot write there"):
            write_file(target)
    assert tree(tmp_path) == {"file": b"old"}


def test_a_folder_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "mkdir", refuse)  # as root, no mode bits refuse
    with pytest.raises(OutputFailed, match="Read-only file system; name a folder that may be written"):
        write_file(tmp_path / "x.safetensors")
    with pytest.raises(OutputFailed, match="Read-only file system"):
        write_file(tmp_path / "deep" / "x.safetensors")
    assert tree(tmp_path) == {}


def test_overwriting_a_folder_keeps_what_is_not_ours(tmp_path: Path) -> None:
    for name in ("one", "README.md", "unet/notes"):
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text(f"old {name}")
    with pytest.raises(OutputExists):
        write_folder(tmp_path / "out")
    write_folder(tmp_path / "out", overwrite=True, names=("one", "two", "unet/three"))
    assert tree(tmp_path / "out") == {
        "README.md": b"old README.md",
        "one": b"new one",
        "two": b"new two",
        "unet": None,
        "unet/notes": b"old unet/notes",
        "unet/three": b"new unet/three",
    }
    assert os.listdir(tmp_path) == ["out"]


def test_files_join_a_folder_without_overwrite_where_none_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_text("old")
    write_folder(tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == ["README.md", "one", "three", "two"]


@pytest.mark.parametrize("other", ["adapter_model.safetensors", "text_encoder/adapter_model.bin"])
def test_no_output_joins_another_adapter(other: str, tmp_path: Path) -> None:
    path = tmp_path / "out" / other
    path.parent.mkdir(parents=True)
    path.write_text("old")
    before = tree(tmp_path)
    with pytest.raises(OutputExists, match="another adapter"):
        write_folder(tmp_path / "out", overwrite=True, names=("unet/adapter_model.safetensors",))
    assert tree(tmp_path) == before


@pytest.mark.parametrize("failing", range(6))
@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_a_failure_among_the_renames_is_undone(
    failing: int, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    for name in ("one", "three", "README.md"):
        (tmp_path / "out" / name).write_text(f"old {name}")
    before = tree(tmp_path)
    rename, calls = os.rename, [0]

    def flaky(one: str, two: str) -> None:
        calls[0] += 1
        if calls[0] == failing + 1:
            raise error
        rename(one, two)

    monkeypatch.setattr(os, "rename", flaky)
    if failing == 5:  # one and three are moved away first, so there are five renames
        write_folder(tmp_path / "out", overwrite=True, names=("one", "deep/two", "three"))
        return
    with pytest.raises((OutputFailed, KeyboardInterrupt)):
        write_folder(tmp_path / "out", overwrite=True, names=("one", "deep/two", "three"))
    assert tree(tmp_path) == before


def test_where_undoing_fails_too_the_old_files_are_kept_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "one").write_text("old one")
    rename, calls = os.rename, [0]

    def flaky(one: str, two: str) -> None:
        calls[0] += 1
        if calls[0] > 1:
            raise OSError(errno.EIO, "Input/output error")
        rename(one, two)

    monkeypatch.setattr(os, "rename", flaky)
    monkeypatch.setattr(os, "replace", flaky)
    with pytest.raises(OutputFailed, match="putting the old files back failed too") as caught:
        write_folder(tmp_path / "out", overwrite=True)
    kept = str(caught.value).rpartition("they are in ")[2]
    assert (Path(kept) / "one").read_text() == "old one"


def test_a_crash_among_the_renames_leaves_every_file_somewhere(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / name).write_text(f"old {name}")
    done = run(
        f"""
        import os
        from adapterops.storage.output import Staged
        rename, calls = os.rename, []
        def dying(one, two):
            calls.append(one)
            if len(calls) == 3:
                os._exit(9)  # as a power failure would: nothing is unwound
            rename(one, two)
        os.rename = dying
        with Staged({str(tmp_path / "out")!r}, True, True) as staged:
            staged.write_text("one", "new one")
            staged.write_text("two", "new two")
            staged.commit()
        """
    )
    assert done.wait() == 9
    assert {"new one", "old one", "new two", "old two"} <= {p.read_text() for p in tmp_path.rglob("*") if p.is_file()}


def test_a_full_disk_midway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, written = os.write, [0]

    def filling(descriptor: int, data: memoryview) -> int:
        if written[0] > CHUNK:
            raise OSError(errno.ENOSPC, "No space left on device")
        written[0] += (count := write(descriptor, data[: CHUNK // 2]))
        return count

    monkeypatch.setattr(os, "write", filling)
    with (
        pytest.raises(OutputFailed, match=r"No space left on device; free some space.*nothing was written"),
        Staged(str(tmp_path / "new" / "x.safetensors"), False) as staged,
    ):
        staged.write_tensors("", {"a": BIG}, {})
    assert tree(tmp_path) == {}


def test_a_file_size_limit_in_a_process_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_text("old")
    done = run(
        f"""
        import resource, signal
        from adapterops.errors import OutputFailed
        from adapterops.storage import LazyTensor
        from adapterops.storage.output import Staged
        from adapterops.storage.tensor import MemorySource
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        big = LazyTensor("a", "U8", (3_000_000,), MemorySource(bytes(3_000_000)), 0)
        try:
            with Staged({str(tmp_path / "x.safetensors")!r}, False, True) as staged:
                staged.write_tensors("", {{"a": big}}, {{}})
                staged.commit()
        except OutputFailed as error:
            print(error)
        """
    )
    assert "File too large; nothing was written" in done.communicate()[0]
    assert tree(tmp_path) == {"x.safetensors": b"old"}


def run(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_midway_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip("ignored, as under nohup; children inherit that")
    child = run(
        f"""
        import time
        from adapterops.storage.output import Staged
        try:
            with Staged({str(tmp_path / "new" / "out")!r}, True) as staged:
                staged.write_text("one", "half")
                print("ready", flush=True)
                for _ in range(6000):  # a signal just before a long sleep would not be seen in it
                    time.sleep(0.01)
                staged.commit()
        except KeyboardInterrupt:
            print("unwound")
        """
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    assert len(list(tmp_path.rglob("one"))) == 1
    child.send_signal(number)
    assert "unwound" in child.communicate(timeout=20)[0]
    assert tree(tmp_path) == {}


def test_a_signal_among_the_renames_waits_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "one").write_text("old")
    rename = os.rename

    def interrupted(one: str, two: str) -> None:
        rename(one, two)
        signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "out", overwrite=True)
    assert tree(tmp_path / "out") == {name: f"new {name}".encode() for name in ("one", "two", "three")}
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_second_signal_does_not_stop_the_cleaning_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rmtree = output.shutil.rmtree

    def interrupted(*args: object, **more: object) -> None:
        signal.raise_signal(signal.SIGINT)
        rmtree(*args, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(output.shutil, "rmtree", interrupted)
    staged = Staged(str(tmp_path / "out"), True).__enter__()
    staged.write_text("one", "half")
    with pytest.raises(KeyboardInterrupt):
        staged.__exit__(None, None, None)
    assert tree(tmp_path) == {}


def test_ignored_signals_stay_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with output.unwinding():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_in_another_thread(tmp_path: Path) -> None:
    from threading import Thread

    thread = Thread(target=write_folder, args=(tmp_path / "out",))
    thread.start()
    thread.join()
    assert sorted(os.listdir(tmp_path / "out")) == ["one", "three", "two"]


def test_a_failing_check_leaves_no_output_and_keeps_its_own_error(tmp_path: Path) -> None:
    def write() -> None:
        with Staged(str(tmp_path / "a" / "b" / "x.safetensors"), False) as staged:
            staged.write_tensors("", {"a": BIG}, {})
            raise ProofFailed("not the same")

    with pytest.raises(ProofFailed, match="not the same"):
        write()
    assert tree(tmp_path) == {}


@pytest.fixture(scope="module")
def kohya(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kohya") / "style.safetensors"
    files.write_kohya_sd1(path, 2)
    return path


@pytest.mark.parametrize("to", ["diffusers", "peft", "kohya"])
def test_same_input_same_bytes_wherever_it_lies(
    to: str, kohya: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(kohya.parent)
    for name, source in (("one", kohya), ("two", Path(kohya.name)), ("three", kohya)):
        api.convert(source, to, tmp_path / name)
    assert tree(tmp_path / "one") == tree(tmp_path / "two") == tree(tmp_path / "three") != {}


def test_the_source_is_never_the_target(kohya: Path, tmp_path: Path) -> None:
    (tmp_path / "link.safetensors").symlink_to(kohya)
    before = kohya.read_bytes()
    for target in (kohya, tmp_path / "link.safetensors", kohya.parent / "." / kohya.name):
        with pytest.raises(UsageError, match="is the source itself"):
            api.convert(kohya, "diffusers", target, overwrite=True)
    assert kohya.read_bytes() == before
    api.convert(kohya, "peft", tmp_path / "out")
    with pytest.raises(UsageError, match="is the source itself"):
        api.convert(tmp_path / "out", "peft", tmp_path / "out", overwrite=True)


def test_a_conversion_reports_its_bytes(kohya: Path, tmp_path: Path) -> None:
    seen: list[int] = []
    count: Callable[[int], None] = seen.append
    result = api.convert(kohya, "diffusers", tmp_path / "x.safetensors", progress=count)
    assert sum(seen) == 2 * result.bytes
