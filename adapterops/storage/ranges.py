"""A file on the Hub, read in parts by HTTP range requests.

The requests go through huggingface_hub's own session (its proxies, certificates and hooks), with its headers and token, to
the address of one commit; redirects to a content network are followed, and the address found there is used again until it
expires.  What was read is kept in a nameless temporary file: no byte is asked for twice.

Everything is bounded: a request that stalls, drips or breaks off ends in `UnreadableFile`, and so does a server that sends
other bytes than were asked for.  RFC 9110, section 14, says what answers to a range request mean.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import tempfile
import threading
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import IO, Any, NamedTuple
from urllib.parse import urlsplit

from adapterops.errors import AdapterOpsError, UnreadableFile
from adapterops.storage.folder import NOT_FETCHED

FIRST = 1 << 16
"""Bytes of the first request: most headers are shorter."""
PIECE = 4 << 20
"""Bytes of the largest request."""
WHOLE = 8 << 20
"""How far into a file is read from a server that knows no ranges, and always begins at the file's start."""
TIMEOUT = 10.0
"""Seconds without a byte before a request is given up, as in huggingface_hub."""
SLOWEST = 1 << 15
"""Bytes a second that a server must send on average, beyond `TIMEOUT`."""
PAUSES = (0.5, 2.0)
"""Seconds before each new attempt."""
_LONGEST_PAUSE = 20.0
"""Seconds; a server that asks for more patience (Retry-After) is not waited for."""
_SMALL = 64
"""Bytes of a tensor that is one number or a few: these are fetched together, when the first of them is asked for."""
_NEAR = 2048
"""Bytes between small tensors that are rather fetched than asked for around."""
_AT_ONCE = 8
_AGAIN = frozenset({408, 429, 500, 502, 503, 504})
_EXPIRED = frozenset({400, 401, 403, 404, 410, 416})
_CONTENT_RANGE = re.compile(r"bytes\s+(?:(\d{1,18})-(\d{1,18})|\*)/(\d{1,18})")
_MAX_WORDS = 100_000
"""Bytes of a refusal's body that are read."""


class _Answer(NamedTuple):
    """What of a range has come, and what broke it off."""

    data: bytearray
    broke: Exception | None = None


class _Passing(Exception):
    """A failure that another attempt may not meet."""

    def __init__(self, reason: str, pause: float = 0.0) -> None:
        super().__init__(reason)
        self.pause = pause


class _Expired(Exception):
    """The address in the content network that the Hub gave does not serve, or no longer; a new one may."""


class RangeSource:
    """The bytes of a file on the Hub; a `ByteSource`.  `size` is the file's, once `open` has asked for its first bytes.

    `path` is what messages name; `url` belongs to `commit`, and the file's ETag must stay what it was in the first answer.
    `explain` makes an error of ours out of one of huggingface_hub's.
    """

    def __init__(
        self,
        path: str,
        url: str,
        headers: Mapping[str, str],
        commit: str,
        explain: Callable[[Exception], AdapterOpsError],
    ) -> None:
        self.path = path
        self.size = -1
        self._url, self._headers, self._commit, self._explain = url, dict(headers), commit, explain
        self._address = url
        self._keeps = True
        """Whether an address in the content network is used again for other parts."""
        self._tags: dict[bool, str] = {}
        self._held: list[tuple[int, int]] = []
        self._small: list[tuple[int, int]] = []
        self._window = 0
        self._broken: AdapterOpsError | None = None
        self._lock = threading.RLock()
        self._file: IO[bytes] | None = None

    def open(self) -> RangeSource:
        """Ask for the first bytes.  Raises `UnreadableFile` where they cannot be had."""
        with self._lock:
            if self.size < 0:
                self._fetch(0, FIRST)
        return self

    def readinto(self, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes from `start` on; those behind them are fetched too while one reads on."""
        with self._lock:
            self.open()
            if any(low <= start and start + len(buffer) <= high for low, high in self._small_at(start)):
                self._fetch_small()
            self._read(start, buffer, ahead=True)

    def reader(self) -> io.RawIOBase:
        """The file from its start, for reading a header; nothing is read ahead."""
        return _Reader(self.open())

    def expect(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Say where tensors begin and end: the small ones are fetched together, instead of one by one."""
        self._small = sorted((start, stop) for start, stop in ranges if 0 < stop - start <= _SMALL)

    def _read(self, start: int, buffer: memoryview, ahead: bool) -> None:
        stop = start + len(buffer)
        if stop > self.size:
            raise UnreadableFile(f"{self.path}: ends at byte {self.size}, before {stop}")
        for low, high in self._missing(start, stop):
            if ahead:
                high = self._further(low, high)
            for at in range(low, high, PIECE):
                self._fetch(at, min(at + PIECE, high))
        done = 0
        while done < len(buffer):
            got = os.preadv(self._spool().fileno(), [buffer[done:]], start + done)
            if not got:
                raise UnreadableFile(f"{self.path}: the temporary file ends at byte {start + done}")
            done += got

    def _further(self, low: int, high: int) -> int:
        """Where a request that begins at `low` and must reach `high` best ends: further the longer one reads on."""
        on = bool(self._held_before(low, self._window))
        self._window = min(self._window * 2, PIECE) if on and self._window else FIRST
        reach = max(high, min(low + self._window, self.size))
        return next((start for start, _ in self._held if high <= start < reach), reach)

    def _held_before(self, at: int, near: int) -> list[tuple[int, int]]:
        place = bisect_right(self._held, (at, 1 << 63))
        return [span for span in self._held[max(0, place - 1) : place] if at - span[1] <= near]

    def _small_at(self, start: int) -> list[tuple[int, int]]:
        place = bisect_right(self._small, (start, 1 << 63))
        return self._small[max(0, place - 1) : place]

    def _fetch_small(self) -> None:
        """Fetch all small tensors, near ones by one request, several requests at a time."""
        wanted: list[tuple[int, int]] = []
        for start, stop in self._small:
            for low, high in self._missing(start, min(stop, self.size)):
                if wanted and low - wanted[-1][1] <= _NEAR and high - wanted[-1][0] <= PIECE:
                    wanted[-1] = (wanted[-1][0], high)
                else:
                    wanted.append((low, high))
        queue, failed = iter(wanted), list[BaseException]()
        turn = threading.Lock()

        def work() -> None:
            while not failed:
                with turn:
                    span = next(queue, None)
                if span is None:
                    return
                try:
                    data = self._attempts(*span)
                    with turn:
                        self._keep(span[0], data)
                except BaseException as error:  # noqa: BLE001  (raised again below, in the thread that asked)
                    failed.append(error)

        threads = [threading.Thread(target=work, daemon=True) for _ in range(min(_AT_ONCE, len(wanted)))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failed:
            raise failed[0]

    def _missing(self, start: int, stop: int) -> list[tuple[int, int]]:
        """The parts of a range that are not held yet."""
        out, at = [], start
        place = max(0, bisect_left(self._held, (start, start)) - 1)
        for low, high in self._held[place:]:
            if low >= stop:
                break
            if high > at:
                if low > at:
                    out.append((at, low))
                at = high
        if at < stop:
            out.append((at, stop))
        return out

    def _keep(self, start: int, data: bytes | bytearray) -> None:
        view, at = memoryview(data), start
        try:
            while view:
                written = os.pwrite(self._spool().fileno(), view, at)
                view, at = view[written:], at + written
        except OSError as error:
            raise self._fail(
                UnreadableFile(
                    f"{self.path}: cannot keep what was read in {tempfile.gettempdir()}: {error.strerror}; free some "
                    "space, or set TMPDIR",
                    fault=NOT_FETCHED,
                )
            ) from error
        low, high = start, start + len(data)
        first = bisect_left(self._held, (low, low))
        if first and self._held[first - 1][1] >= low:
            first -= 1
        last = first
        while last < len(self._held) and self._held[last][0] <= high:
            low, high = min(low, self._held[last][0]), max(high, self._held[last][1])
            last += 1
        self._held[first:last] = [(low, high)]

    def _spool(self) -> IO[bytes]:
        if self._file is None:
            try:
                # Open as long as the tensors are.
                self._file = tempfile.TemporaryFile(prefix=".adapterops-", buffering=0)  # noqa: SIM115
            except OSError as error:
                raise UnreadableFile(
                    f"{self.path}: cannot write to {tempfile.gettempdir()}: {error.strerror}; set TMPDIR",
                    fault=NOT_FETCHED,
                ) from error
        return self._file

    def _fetch(self, start: int, stop: int) -> None:
        data = self._attempts(start, stop)
        self._keep(start, data)

    def _fail(self, error: AdapterOpsError) -> AdapterOpsError:
        """Remember that the file cannot be had, so that nobody waits for it again."""
        error.fault = NOT_FETCHED
        self._broken = error
        return error

    def _attempts(self, start: int, stop: int) -> bytearray:
        """The bytes of a range; what an attempt that broke off has brought is kept.  Raises `UnreadableFile`."""
        data = bytearray()
        pauses = iter(PAUSES)
        expired = False
        passing: tuple[type[Exception], ...] = (_Passing, *_network())
        while True:
            if self._broken is not None:
                raise type(self._broken)(str(self._broken), fault=NOT_FETCHED)
            try:
                got, broke = self._bounded(start + len(data), stop)
                data += got
                if start + len(data) >= min(stop, self.size):
                    return data
                if len(got) >= FIRST:  # far enough to go on where it ended, at once
                    continue
                reason: Exception = broke or _Passing("the server ended in the middle of what it announced")
            except AdapterOpsError as error:
                raise self._fail(error) from error.__cause__
            except _Expired as error:
                self._address, self._keeps = self._url, False
                if expired:
                    raise self._fail(self._unreadable(str(error))) from error
                expired = True
                continue
            except passing as error:
                reason = error
            pause = next(pauses, None)
            asked = reason.pause if isinstance(reason, _Passing) else 0.0
            if pause is None or asked > _LONGEST_PAUSE:
                said = self._unreadable(str(reason)) if isinstance(reason, _Passing) else self._explain(reason)
                raise self._fail(said) from reason
            time.sleep(max(pause, asked))

    def _unreadable(self, reason: str) -> UnreadableFile:
        return UnreadableFile(f"{self.path}: {reason}", fault=NOT_FETCHED)

    def _bounded(self, start: int, stop: int) -> _Answer:
        """One request, in a thread of its own, so that not even an answer that drips can hold us."""
        seconds = TIMEOUT + (stop - start) / SLOWEST
        deadline = time.monotonic() + seconds
        out: list[_Answer] = []
        failed: list[BaseException] = []
        done = threading.Event()

        def work() -> None:
            try:
                out.append(self._request(start, stop, deadline))
            except BaseException as error:  # noqa: BLE001  (raised again in the thread that waits)
                failed.append(error)
            done.set()

        threading.Thread(target=work, daemon=True).start()
        if not done.wait(seconds + 1):
            raise self._slow(seconds)
        if failed:
            raise failed[0]
        return out[0]

    def _slow(self, seconds: float) -> UnreadableFile:
        return self._unreadable(f"the server is too slow: given up after {seconds:.0f} s; try again later")

    def _request(self, start: int, stop: int, deadline: float) -> _Answer:
        """The bytes asked for; fewer where the server or the network broke off, and then why."""
        address = self._address
        headers = self._headers | {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        if self._elsewhere(address):  # a token is for the Hub alone
            headers = {k: v for k, v in headers.items() if k.lower() != "authorization"}
        with _streamed(address, headers) as (answer, chunks):
            wanted, skipped = self._checked(answer, start, stop)
            data = bytearray()
            try:
                for chunk in chunks:
                    take = memoryview(chunk)[min(skipped, len(chunk)) :]
                    skipped -= len(chunk) - len(take)
                    data += take[: wanted - len(data)]
                    if len(data) >= wanted:
                        break
                    if time.monotonic() > deadline:
                        raise self._slow(TIMEOUT + (stop - start) / SLOWEST)
            except _network() as error:
                return _Answer(data, error)
            return _Answer(data)

    def _elsewhere(self, address: str) -> bool:
        return urlsplit(address)[:2] != urlsplit(self._url)[:2]

    def _checked(self, answer: Any, start: int, stop: int) -> tuple[int, int]:
        """How many bytes of the answer's body are wanted, and how many come before them."""
        status, headers = int(answer.status_code), answer.headers
        said = headers.get("Content-Range", "")
        found = _CONTENT_RANGE.fullmatch(said.strip())
        if status == 416 and start == 0 and found is not None and int(found[3]) == 0:
            self._pin(answer, 0)
            return 0, 0
        if status not in (200, 206):
            self._refused(answer)
        if headers.get("Content-Encoding", "identity").lower() != "identity":
            raise self._unreadable("the server compresses what was asked for as it is; check HF_ENDPOINT and the proxy")
        if status == 200:
            return self._from_the_start(answer, start, stop)
        if found is None or found[1] is None:
            raise self._unreadable(f"the server does not say which part it sends (Content-Range {said[:80]!r})")
        first, last, size = int(found[1]), int(found[2]), int(found[3])
        if first != start or not first <= last < stop or last >= size:
            reason = f"asked for bytes {start} to {stop - 1}, and the server sends {said[:80]!r}"
            # An address may have been signed for one range only.
            raise _Expired(reason) if self._elsewhere(str(answer.url)) else self._unreadable(reason)
        self._pin(answer, size)
        return last + 1 - first, 0

    def _from_the_start(self, answer: Any, start: int, stop: int) -> tuple[int, int]:
        """A server that ignores the range sends everything: near the start that is cut off, further in refused."""
        length = answer.headers.get("Content-Length", "")
        if not length.isdecimal() or len(length) > 18:
            raise self._unreadable("the server sends no parts of files, and does not say how long this one is")
        size = int(length)
        if size and min(stop, size) > WHOLE:
            raise self._unreadable(
                "the server sends whole files only, not the part that is needed; download it (`hf download`) and "
                "validate it from the disk"
            )
        self._pin(answer, size)
        # Whoever needs more than the beginning will need the rest, and would be sent all of it again.
        return (size if start and size <= WHOLE else min(stop, size)) - start, start

    def _pin(self, answer: Any, size: int) -> None:
        """Insist that this answer is about the same file as those before it; the first one says which that is."""
        hops = [*answer.history, answer]
        commits = {hop.headers.get("X-Repo-Commit") for hop in hops} - {None}
        if commits - {self._commit} or self.size not in (-1, size):
            raise self._unreadable("it was changed while it was read; run the command again")
        # The Hub's name for the contents, and the content network's own.
        linked = next((tag for hop in hops if (tag := hop.headers.get("X-Linked-Etag"))), None)
        for ours, tag in ((True, linked), (False, answer.headers.get("ETag"))):
            tag = tag.removeprefix("W/").strip('"') if tag else ""
            if tag and self._tags.setdefault(ours, tag) != tag:
                raise self._unreadable("it was changed while it was read (its ETag differs); run the command again")
        self.size = size
        if answer.history and self._keeps:
            self._address = str(answer.url)

    def _refused(self, answer: Any) -> None:
        """Raise what a status other than success means."""
        status = int(answer.status_code)
        if status in _EXPIRED and self._elsewhere(str(answer.url)):
            raise _Expired(f"the content network that the Hub refers to answered {status}; try again later")
        if status in _AGAIN:
            pause = answer.headers.get("Retry-After", "")
            words = "too many requests (429)" if status == 429 else f"the server answered {status}"
            raise _Passing(f"{words}; try again later", float(pause) if pause.isdecimal() and len(pause) < 9 else 0.0)
        length = answer.headers.get("Content-Length", "")
        if length.isdecimal() and int(length) <= _MAX_WORDS and "Content-Encoding" not in answer.headers:
            from huggingface_hub import utils
            from huggingface_hub.errors import HfHubHTTPError

            tools: Any = utils
            try:
                tools.hf_raise_for_status(answer)
            except HfHubHTTPError as error:
                raise self._explain(error) from error
        raise self._unreadable(f"the server answered {status}; try again later")


class _Reader(io.RawIOBase):
    """A file on the Hub as something to read from its start."""

    def __init__(self, source: RangeSource) -> None:
        self._source, self._at = source, 0

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self._source.size - self._at)]
        with self._source._lock:
            self._source._read(self._at, view, ahead=False)
        self._at += len(view)
        return len(view)


def _network() -> tuple[type[Exception], ...]:
    """What a network, and a server that breaks off, make of a request."""
    from huggingface_hub.errors import HfHubHTTPError

    # The errors of requests (huggingface_hub 0.x) are OSErrors; those of httpx have a base that HfHubHTTPError shares.
    return (OSError, HfHubHTTPError.__bases__[0])


@contextlib.contextmanager
def _streamed(url: str, headers: Mapping[str, str]) -> Iterator[tuple[Any, Iterator[bytes]]]:
    """The answer to a GET, and its body as it comes."""
    from huggingface_hub import utils

    tools: Any = utils
    session: Any = tools.get_session()
    if callable(getattr(session, "stream", None)):  # httpx
        with session.stream("GET", url, headers=headers, timeout=TIMEOUT, follow_redirects=True) as answer:
            yield answer, answer.iter_raw()
    else:  # requests, in huggingface_hub 0.x
        with session.get(url, headers=headers, timeout=TIMEOUT, stream=True, allow_redirects=True) as answer:
            yield answer, answer.iter_content(FIRST)
