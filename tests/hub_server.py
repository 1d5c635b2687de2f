"""A server on this machine that answers as the Hub does, parts of files included, and counts what it serves."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "a" * 40
REPO = "me/style"


@dataclass
class Served:
    """The files of one repository, how they are served, and what was asked and sent.

    `behave` says how weights (and they alone) are served: "" as ranges; "whole" ignores ranges; "stall" and "drip" send
    too little, too slowly; "cut" ends after half of what it announced, "cut-once" only the first time; "range" announces
    other bytes than were asked for; "gzip" compresses; "grow" claims a larger size each time; "capped" sends parts of at
    most 100 kB; a number is the status of a refusal.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    sizes: bool = True
    redirect: bool = True
    behave: str = ""
    error_code: str = ""
    bound: bool = False
    """Whether a redirect leads to the one part that was asked for, whatever is asked for there later."""
    commit: str = COMMIT
    url: str = ""
    network: str = ""
    """Where the Hub's redirects lead: the same server under another name, as a content network is another one."""
    tags: dict[str, str] = field(default_factory=dict)
    asked: list[tuple[str, str, str]] = field(default_factory=list)
    """Method, path, and the Range of each request."""
    sent: dict[str, int] = field(default_factory=dict)
    tokens: set[tuple[str, str]] = field(default_factory=set)
    """What kind of address was asked ("resolve" or "cdn"), and with which Authorization."""
    expired: int = 0
    """Requests to the content network that are still to be refused."""

    @property
    def ranges(self) -> list[str]:
        return [asked for method, path, asked in self.asked if method == "GET" and asked]

    @property
    def total(self) -> int:
        return sum(self.sent.values())


class Handler(BaseHTTPRequestHandler):
    served: Served

    def do_HEAD(self) -> None:
        self.answer(False)

    def do_GET(self) -> None:
        self.answer(True)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def answer(self, body: bool) -> None:
        held, path = self.served, urlsplit(self.path).path
        held.asked.append((self.command, path, self.headers.get("Range", "")))
        parts = path.strip("/").split("/")
        held.tokens.add((parts[0] if parts[0] == "cdn" else "resolve", self.headers.get("Authorization", "")))
        if parts[:2] == ["api", "models"] and len(parts) > 3:
            files = [{"rfilename": n} | ({"size": len(c)} if held.sizes else {}) for n, c in held.files.items()]
            said = {"id": REPO, "sha": held.commit, "siblings": files}
            return self.send(200, json.dumps(said).encode(), {"Content-Type": "application/json"}, body)
        if parts[0] == "cdn":
            if held.expired:
                held.expired -= 1
                return self.send(403, b"<Error>expired</Error>", {}, body)
            return self.content(unquote("/".join(parts[1:])), {}, body)
        if parts[2:3] != ["resolve"]:
            return self.send(404, b"", {}, body)
        name = unquote("/".join(parts[4:]))
        if name not in held.files:
            return self.send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": held.commit}, body)
        about = {"X-Repo-Commit": held.commit, "X-Linked-Etag": f'"{self.tag(name)}"'}
        if held.behave.isdecimal() and name.endswith(".safetensors"):
            return self.send(int(held.behave), b"{}", {"X-Error-Code": held.error_code}, body)
        if held.redirect and name.endswith((".safetensors", ".bin", ".npz")):
            about["X-Linked-Size"] = str(len(held.files[name]))
            query = f"?{self.headers.get('Range', '')}" if held.bound else ""
            return self.send(302, b"", about | {"Location": f"{held.network}/cdn/{name}{query}"}, body)
        return self.content(name, about, body)

    def tag(self, name: str) -> str:
        return self.served.tags.get(name) or hashlib.sha256(self.served.files[name]).hexdigest()

    def content(self, name: str, headers: dict[str, str], body: bool) -> None:
        held, content = self.served, self.served.files[name]
        behave = held.behave if name.endswith(".safetensors") else ""
        headers = headers | {"ETag": f'"{self.tag(name)}"'}
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", urlsplit(self.path).query or self.headers.get("Range", ""))
        if found is None or behave == "whole":
            return self.send(200, content, headers, body, name)
        first, last, size = int(found[1]), min(int(found[2]), len(content) - 1), len(content)
        if first >= size:
            return self.send(416, b"", headers | {"Content-Range": f"bytes */{size}"}, body)
        if behave == "capped":
            last = min(last, first + 100_000 - 1)
        part = content[first : last + 1]
        if behave == "grow":
            size += held.sent.get(name, 0)
        if behave == "range":
            first += 1
        headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        if behave == "gzip":
            headers["Content-Encoding"] = "gzip"
        return self.send(206, part, headers, body, name, behave)

    def send(
        self, status: int, content: bytes, headers: dict[str, str], body: bool, name: str = "", behave: str = ""
    ) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if behave.startswith("cut"):
            content = content[: len(content) // 2]
            self.close_connection = True
            self.served.behave = "" if behave == "cut-once" else behave
        with suppress(OSError):
            for at in range(0, len(content) if body else 0, 1 << 14):
                if behave == "stall":
                    time.sleep(3)
                if behave == "drip":
                    for one in range(100):
                        self.wfile.write(content[at + one : at + one + 1])
                        time.sleep(0.05)
                piece = content[at : at + (1 << 14)]
                if name:  # counted first: whoever has received it may look at once
                    self.served.sent[name] = self.served.sent.get(name, 0) + len(piece)
                self.wfile.write(piece)
        if behave.startswith("cut"):
            with suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def serving(monkeypatch: Any, cache: Any) -> Iterator[Served]:
    """A Hub that serves one repository, and huggingface_hub set up to ask it, with an empty cache."""
    from huggingface_hub import constants

    held = Served()
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"served": held}))
    httpd.daemon_threads = True
    held.url = f"http://127.0.0.1:{httpd.server_port}"
    held.network = f"http://localhost:{httpd.server_port}"
    threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", held.url)
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))  # for other processes; this one has read it
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    try:
        yield held
    finally:
        httpd.shutdown()
        httpd.server_close()
