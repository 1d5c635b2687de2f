"""hf:// names, against a server on this machine that answers as the Hub does."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import storage_files as files
from huggingface_hub import constants

from adapterops import api
from adapterops.errors import AdapterOpsError, AmbiguousFormat, NotAnAdapter, UnreadableFile, UsageError
from adapterops.storage import hub, open_source
from adapterops.storage.source import read_json, stem

MAIN, PULL, BRANCH = "a" * 40, "b" * 40, "c" * 40
REVISIONS = {"main": MAIN, "refs/pr/1": PULL, "feature/x": BRANCH, MAIN: MAIN}


def weights(keys: str = "a") -> bytes:
    header = files.dump({k: files.entry("U8", [1], i) for i, k in enumerate(keys)})
    return len(header).to_bytes(8, "little") + header + keys.encode()


@dataclass
class Hub:
    """What the server holds, how it refuses, and what was asked of it."""

    url: str = ""
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    status: int = 0
    body: bytes | None = None
    asked: list[str] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)

    @property
    def downloaded(self) -> list[str]:
        return [
            a.partition("/resolve/")[2].partition("/")[2]
            for a in self.asked
            if a.startswith("GET") and "/resolve/" in a
        ]


class Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_HEAD(self) -> None:
        self.answer(False)

    def do_GET(self) -> None:
        self.answer(True)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def answer(self, body: bool) -> None:
        path = urlsplit(self.path).path
        self.hub.asked.append(f"{self.command} {path}")
        self.hub.tokens.add(self.headers.get("authorization", ""))
        if self.hub.status:
            return self.send(self.hub.status, b"", {}, body)
        if self.hub.body is not None:
            return self.send(200, self.hub.body, {"Content-Type": "text/html"}, body)
        parts = path.strip("/").split("/")
        if parts[:2] != ["api", "models"] and parts[2:3] != ["resolve"]:  # what huggingface_hub asks besides
            return self.send(404, b"", {}, body)
        if parts[0] == "api":
            repo, revision = "/".join(parts[2:4]), unquote(parts[5]) if len(parts) > 5 else "main"
        else:
            repo, revision = "/".join(parts[:2]), unquote(parts[3])
        if repo not in self.hub.repos:
            return self.send(401, b"", {"X-Error-Code": "RepoNotFound"}, body)
        if revision not in REVISIONS:
            return self.send(404, b"", {"X-Error-Code": "RevisionNotFound"}, body)
        commit, held = REVISIONS[revision], self.hub.repos[repo]
        if parts[0] == "api":
            said = {"id": repo, "sha": commit, "siblings": [{"rfilename": name} for name in held]}
            return self.send(200, json.dumps(said).encode(), {"Content-Type": "application/json"}, body)
        if repo in self.hub.gated:
            return self.send(403, b"", {"X-Error-Code": "GatedRepo"}, body)
        content = held.get(unquote("/".join(parts[4:])))
        if content is None:
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, body)
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        return self.send(200, content, {"ETag": etag, "X-Repo-Commit": commit}, body)

    def send(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    held = Hub()
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": held}))
    held.url = f"http://127.0.0.1:{httpd.server_port}"
    threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", held.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield held
    httpd.shutdown()
    httpd.server_close()


PEFT = {"README.md": b"# hi", "adapter_config.json": b'{"r": 4}', "adapter_model.safetensors": weights("ab")}


def refuse(url: str, kind: type[AdapterOpsError], *words: str) -> None:
    with pytest.raises(AdapterOpsError) as caught:
        open_source(url)
    assert type(caught.value) is kind, caught.value
    assert "\n" not in str(caught.value)
    for word in ("hf://", *words):
        assert word in str(caught.value), caught.value


def test_a_repository_that_holds_one_adapter(server: Hub, tmp_path: Path) -> None:
    server.repos["me/style"] = {**PEFT, "adapter_model.bin": b"x", "optimizer.pt": b"x", "checkpoint-1/x.pt": b"x"}
    source = open_source("hf://me/style")
    assert source.path == "hf://me/style"
    assert source.config == {"r": 4}
    assert source.config_path == "hf://me/style/adapter_config.json"
    assert {k: bytes(t.read()) for k, t in source.tensors.items()} == {"a": b"a", "b": b"b"}
    assert source.tensors["a"].source.path.startswith(str(tmp_path / "cache"))
    assert f"revision {MAIN} of hf://me/style" in source.notes
    assert any("adapter_model.bin is not" in note for note in source.notes)
    assert sorted(server.downloaded) == ["adapter_config.json", "adapter_model.safetensors"]
    # The second time nothing is downloaded.
    assert open_source("hf://models/me/style").path == "hf://me/style"
    assert len(server.downloaded) == 2


@pytest.mark.parametrize("name", ["hf://me/style", "hf://me/style/lora.safetensors"])
def test_a_trainers_settings_are_fetched_when_they_are_asked_for(server: Hub, name: str) -> None:
    server.repos["me/style"] = {"lora.safetensors": weights("a"), "params.json": b"{", "notes.json": b"{}"}
    source = open_source(name)
    assert server.downloaded == ["lora.safetensors"]
    with source.settings("hyperparameters.yaml") as found:
        assert found is None
    with source.settings("params.json") as found:
        assert found is not None
        assert Path(found[0]).read_bytes() == b"{"
        assert found[1] == "hf://me/style/params.json"
    assert sorted(server.downloaded) == ["lora.safetensors", "params.json"]
    with (
        pytest.raises(UnreadableFile, match=r"hf://me/style/params\.json: is not JSON"),
        source.settings("params.json") as found,
    ):
        read_json(found[0] if found else "")


def test_a_file_or_folder_of_a_repository(server: Hub) -> None:
    server.repos["me/styles"] = {"one.safetensors": weights(), "two.safetensors": weights("b"), "sub/deep/x.npz": b"x"}
    server.repos["me/styles"].update({f"sub/peft/{name}": content for name, content in PEFT.items()})
    assert list(open_source("hf://me/styles/two.safetensors").tensors) == ["b"]
    assert server.downloaded == ["two.safetensors"]
    for url in ("hf://me/styles/sub/peft", "hf://me/styles/sub/peft/adapter_model.safetensors"):
        source = open_source(url)
        assert source.path == url
        assert source.config == {"r": 4}


@pytest.mark.parametrize(
    ("revision", "commit"),
    [("main", MAIN), ("refs/pr/1", PULL), ("refs%2Fpr%2F1", PULL), ("feature%2Fx", BRANCH), (MAIN, MAIN)],
)
def test_revisions(revision: str, commit: str, server: Hub) -> None:
    server.repos["me/style"] = PEFT
    for path in ("", "/adapter_model.safetensors"):
        source = open_source(f"hf://me/style@{revision}{path}")
        assert source.path == f"hf://me/style@{revision}{path}"
        assert commit in source.notes[0]
        assert f"/snapshots/{commit}/" in source.tensors["a"].source.path


def test_shards(server: Hub) -> None:
    one, two = "adapter_model-00001-of-00002.safetensors", "adapter_model-00002-of-00002.safetensors"
    index = json.dumps({"weight_map": {"a": one, "b": two}}).encode()
    held = {one: weights("a"), two: weights("b"), "adapter_model.safetensors.index.json": index, "other.txt": b""}
    server.repos["me/big"] = held
    assert list(open_source("hf://me/big").tensors) == ["a", "b"]
    refuse(f"hf://me/big/{one}", UnreadableFile, "one shard of several", "index.json")
    del held[two]
    refuse("hf://me/big", UnreadableFile, f"shard {two} is not beside it")


def test_components_in_subfolders(server: Hub) -> None:
    server.repos["me/parts"] = {f"{part}/{name}": c for part in ("unet", "text_encoder") for name, c in PEFT.items()}
    source = open_source("hf://me/parts")
    assert list(source.parts) == ["text_encoder", "unet"]
    assert server.downloaded == []
    assert source.key_count == 4
    assert source.parts["unet"].path == "hf://me/parts/unet"
    assert MAIN in source.parts["unet"].notes[0]


def test_several_checkpoints_are_not_downloaded(server: Hub) -> None:
    server.repos["me/run"] = {f"checkpoint-{i}/{name}": c for i in (1, 2) for name, c in PEFT.items()}
    with pytest.raises(AmbiguousFormat, match=r"hf://me/run: .*\(checkpoint-1, checkpoint-2\); name one"):
        api.load("hf://me/run")
    assert server.downloaded == []


def test_no_single_adapter(server: Hub) -> None:
    server.repos["me/many"] = {"b.safetensors": weights(), "a.bin": b"x"}
    refuse("hf://me/many", NotAnAdapter, "(a.bin, b.safetensors); name one of them, as hf://me/many/a.bin")
    server.repos["me/below"] = {f"v{i}/style.safetensors": weights() for i in range(10)}
    refuse("hf://me/below", NotAnAdapter, "holds no weights", "v0/style.safetensors, ", "2 more", "hf://me/below/v0")
    server.repos["me/none"] = {"README.md": b""}
    refuse("hf://me/none", NotAnAdapter, "holds no weights")
    assert server.downloaded == []


def test_what_is_not_there(server: Hub) -> None:
    server.repos["me/style"] = PEFT
    refuse("hf://me/other", UnreadableFile, "no model repository me/other", "private", "hf auth login", "HF_TOKEN")
    refuse("hf://me/style@v9", UnreadableFile, "no revision 'v9'", f"{server.url}/me/style/refs")
    refuse("hf://me/style/adapter_modl.safetensors", UnreadableFile, "no file or folder", "adapter_model.safetensors")
    refuse("hf://me/style/zzz", UnreadableFile, "no file or folder 'zzz'", "the nearest: adapter_model.safetensors")


def test_a_gated_repository(server: Hub) -> None:
    server.repos["me/gated"] = PEFT
    server.gated.add("me/gated")
    refuse("hf://me/gated", UnreadableFile, "gated", f"accept its terms at {server.url}/me/gated", "hf auth login")


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (403, "refuses access (403)"),
        (429, "too many requests"),
        (500, "answered 500"),
        (503, "answered 503"),
        (418, "418"),
    ],
)
def test_other_refusals(status: int, words: str, server: Hub) -> None:
    server.status = status
    refuse("hf://me/style", UnreadableFile, words)


def test_a_server_that_is_not_the_hub(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    for body in (b"<html>log in</html>", b"[]", b"{}", b'{"id": "me/style"}', b'{"id": "x", "siblings": [1]}'):
        server.body = body
        refuse("hf://me/style", UnreadableFile, "HF_ENDPOINT")
    for endpoint in ("hub.example", "ftp://x"):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        refuse("hf://me/style", UnreadableFile, endpoint, "HF_ENDPOINT")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    refuse(
        "hf://me/style", UnreadableFile, "http://127.0.0.1:1", "not in the cache; check the connection", "HF_ENDPOINT"
    )


def test_names_that_lead_out_of_the_repository_are_refused(server: Hub) -> None:
    server.repos["me/evil"] = {"../../x.safetensors": weights()}
    refuse("hf://me/evil", UnreadableFile, "does not answer as the Hub does")


def test_the_token_is_sent(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    server.repos["me/style"] = PEFT
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    open_source("hf://me/style")
    assert server.tokens == {"Bearer hf_test"}


def test_from_the_cache(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    server.repos["me/style"] = PEFT
    open_source("hf://me/style")
    open_source("hf://me/style@refs/pr/1")
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        for url, commit in (
            ("hf://me/style", MAIN),
            ("hf://me/style@refs/pr/1", PULL),
            (f"hf://me/style@{PULL}", PULL),
        ):
            source = open_source(url)
            assert list(source.tensors) == ["a", "b"]
            assert source.config == {"r": 4}
            assert f"revision {commit}" in source.notes[0]
            assert "HF_HUB_OFFLINE is set" in source.notes[0]
        refuse(
            "hf://me/style/README.md", UnreadableFile, "no file or folder", "in the cache, and HF_HUB_OFFLINE is set"
        )
        refuse("hf://me/style@v2", UnreadableFile, "HF_HUB_OFFLINE is set", "unset it")
        refuse("hf://me/other", UnreadableFile, "HF_HUB_OFFLINE is set", "unset it")
    server.status = 503
    assert "503" in open_source("hf://me/style").notes[0]
    # A refusal is an answer: what is in the cache is then not what was asked for.
    server.status = 404
    refuse("hf://me/style", UnreadableFile, "404")
    server.status = 0
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    assert "cannot be asked" in open_source("hf://me/style").notes[0]


def test_a_damaged_file_is_named_by_its_hub_name(server: Hub, tmp_path: Path) -> None:
    server.repos["me/style"] = {**PEFT, "adapter_model.safetensors": weights()[:-1], "adapter_config.json": b"{"}
    with pytest.raises(UnreadableFile) as caught:
        open_source("hf://me/style")
    said = str(caught.value)
    assert said.startswith("hf://me/style/adapter_config.json: is not JSON")
    assert f"(cached as {tmp_path}" in said


def test_the_revision_moves_while_it_is_read(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    server.repos["me/style"] = PEFT
    place, _ = hub.locate("hf://me/style")
    monkeypatch.setitem(REVISIONS, "main", PULL)
    with pytest.raises(UnreadableFile, match="was changed while it was read"):
        place.fetch("README.md")


NAMES = {
    "hf://o/r": ("o/r", None, ""),
    "hf://o/r/": ("o/r", None, ""),
    "hf://models/o/r/x.safetensors": ("o/r", None, "x.safetensors"),
    "hf://o/r.v1/a/b@c.bin": ("o/r.v1", None, "a/b@c.bin"),
    "hf://o/r@v1.0": ("o/r", "v1.0", ""),
    "hf://o/r@main/a/b": ("o/r", "main", "a/b"),
    "hf://o/r@refs/pr/12": ("o/r", "refs/pr/12", ""),
    "hf://o/r@refs/pr/12/a/b": ("o/r", "refs/pr/12", "a/b"),
    "hf://o/r@refs/convert/parquet/a": ("o/r", "refs/convert/parquet", "a"),
    "hf://o/r@refs%2Fpr%2F1/a": ("o/r", "refs/pr/1", "a"),
    "hf://o/r@feature%2Fx/a": ("o/r", "feature/x", "a"),
    "hf://o/r/a%20b.bin": ("o/r", None, "a%20b.bin"),
}


@pytest.mark.parametrize("url", NAMES)
def test_names_are_those_of_huggingface_hub(url: str) -> None:
    name = hub.parse(url)
    assert (name.repo, name.revision, name.path) == NAMES[url]
    uris = pytest.importorskip("huggingface_hub.utils._hf_uris", reason="an older huggingface_hub")
    theirs = uris.parse_hf_uri(url)
    assert (theirs.type, theirs.id, theirs.revision, theirs.path_in_repo) == ("model", *NAMES[url])


@pytest.mark.parametrize(
    "url",
    [
        "hf://", "hf://o", "hf:///", "hf://o/", "hf://o//x", "hf://o/r@", "hf://o/r@/x", "hf://o@v/r", "hf://../r",
        "hf://o/..", "hf://o/r/../x", "hf://o/r//x", "hf://o/r/a\\b", "hf://o/r@../../x", "hf://o/r@a%2F..%2Fb",
        "hf://o/r@a b", "hf://o/r@a\0b", "hf://o r/x", "hf://o/r?x=1", "hf://datasets/o/r", "hf://spaces/o/r",
        "hf://buckets/o/r/x", "hf://model/o/r", "hf://models", "hf://models/o", "hf://o/r/x\0",
    ],
)  # fmt: skip
def test_malformed_names(url: str) -> None:
    with pytest.raises(UsageError, match=r"write hf://owner/repo"):
        hub.parse(url)


def test_stems(tmp_path: Path) -> None:
    (tmp_path / "my.lora-v1.5").mkdir()
    for path, name in {
        "hf://o/my.lora-v1.5": "my.lora-v1.5",
        "hf://o/r@v1.0": "r",
        "hf://o/r@refs/pr/1/sub/style.v2.safetensors": "style.v2",
        "hf://o/r/sub/peft": "peft",
        "hf://o/r/model.safetensors.index.json": "model",
        "style.v2.safetensors": "style.v2",
        "a/x.npz": "x",
        "a/model.safetensors.index.json": "model",
        "x.unknown": "x",
        str(tmp_path / "my.lora-v1.5"): "my.lora-v1.5",
        str(tmp_path / "my.lora-v1.5") + "/": "my.lora-v1.5",
    }.items():
        assert stem(path) == name, path


def test_a_path_object_has_lost_a_slash() -> None:
    with pytest.raises(UnreadableFile, match="give a string"):
        open_source(Path("hf://o/r"))


def test_the_command(server: Hub, tmp_path: Path) -> None:
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    header = files.dump(
        {key.format("A"): files.entry("F32", [2, 8], 0), key.format("B"): files.entry("F32", [8, 2], 64)}
    )
    server.repos["me/style"] = {
        "adapter_config.json": b'{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}',
        "adapter_model.safetensors": len(header).to_bytes(8, "little") + header + bytes(128),
    }
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": server.url}
    environment.pop("HF_HUB_CACHE", None)

    def run(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "adapterops.cli.main", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={**environment, **more})

    done = run("convert", "hf://me/style", "--to", "peft", "-o", "out", "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    said = json.loads(done.stdout)
    assert said["source"] == "hf://me/style"
    assert any(MAIN in note for note in said["notes"])
    assert (tmp_path / "home" / "hub").is_dir()
    offline = {"HF_HUB_OFFLINE": "1"}
    assert run("inspect", "hf://me/style", **offline).returncode == 0
    for url, more, word in (
        ("hf://me/none", {}, "no model repository"),
        ("hf://me/none", offline, "HF_HUB_OFFLINE"),
        ("hf://me", {}, "write hf://owner/repo"),
    ):
        done = run("inspect", url, **more)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: hf://")
        assert word in done.stderr
        assert "Traceback" not in done.stderr
