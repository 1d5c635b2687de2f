"""`hf://owner/repo[@revision][/path]`: adapters on the Hugging Face Hub.

huggingface_hub downloads, and its own cache, token and environment (HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE …)
are used.  The spelling is that of its `HfFileSystem`: a revision with slashes is `refs/pr/1`, `refs/convert/NAME`, or
has them as `%2F`.  https://huggingface.co/docs/huggingface_hub/guides/hf_file_system
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from adapterops.errors import AdapterOpsError, UnreadableFile, UsageError
from adapterops.storage.folder import NOT_FETCHED

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from adapterops.storage.ranges import RangeSource

PREFIX = "hf://"
_TYPES = ("datasets", "spaces", "kernels", "buckets", "model", "dataset", "space", "kernel", "bucket")
_SPECIAL = re.compile(r"refs/(?:convert/[\w.-]+|pr/\d+)(?=/|$)")
_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TIMEOUT = 30.0
"""Seconds to wait for the list of a repository's files."""
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".npz", ".gguf", ".safetensors.index.json")
MAX_FETCHED = 2_000_000_000
"""Bytes of weights without a header of their own (pickles, numpy archives) that are downloaded for a look at them."""
MAX_TEXT = 64_000_000
"""Bytes of any other file."""
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


@dataclass(frozen=True, slots=True)
class Name:
    """What an hf:// name says.  `revision` is decoded, and None where the default branch is meant."""

    repo: str
    revision: str | None = None
    path: str = ""
    spelled: str = ""
    """Everything before the path, as messages show it."""


def parse(url: str) -> Name:
    """The parts of an hf:// name.  Raises `UsageError` for one that is malformed, or names no model repository."""

    def wrong(reason: str) -> UsageError:
        return UsageError(f"{url}: {reason}; write hf://owner/repo[@revision][/path]")

    body = url.removeprefix(PREFIX).strip("/")
    kind, _, rest = body.partition("/")
    if kind == "models":
        body = rest.strip("/")
    elif kind in _TYPES:
        raise wrong(f"names one of the Hub's {kind.rstrip('s')}s, and only its model repositories hold adapters")
    owner, _, rest = body.partition("/")
    # An @ further back belongs to a file's name.
    at = rest.partition("/")[0].find("@")
    revision: str | None = None
    spelled = ""
    if at < 0:
        name, _, path = rest.partition("/")
    else:
        name, behind = rest[:at], rest[at + 1 :]
        special = _SPECIAL.match(behind)
        spelled = special[0] if special else behind.partition("/")[0]
        revision, path = unquote(spelled), behind[len(spelled) :].removeprefix("/")
        if not _is_ref(revision):
            raise wrong(f"{spelled!r} is no revision")
        spelled = "@" + spelled
    if not (_ID.fullmatch(owner) and _ID.fullmatch(name)):
        raise wrong(f"{owner + '/' + name if rest else owner!r} is no owner/repo")
    if path and not _is_path(path):
        raise wrong(f"{path!r} is no path in a repository")
    return Name(f"{owner}/{name}", revision, path, f"{PREFIX}{owner}/{name}{spelled}")


def _is_ref(text: str) -> bool:
    return _is_path(text) and not re.search(r"\.\.|[\s~^:?*\[\x00-\x1f\x7f]", text)


def _is_path(text: str) -> bool:
    return "\\" not in text and "\0" not in text and not {"", ".", ".."} & set(text.split("/"))


@dataclass(frozen=True, slots=True)
class _Repo:
    """One commit of a repository, and the names of its files.

    `snapshot` is the cached copy that is used where the Hub cannot be asked, and `why`; "" where it can.
    With `ranges`, weights are read in parts, and what must be downloaded whole has a limit; `sizes` are those that the
    Hub told.
    """

    name: Name
    api: HfApi
    commit: str
    files: tuple[str, ...]
    note: str
    snapshot: str = ""
    why: str = ""
    ranges: bool = False
    sizes: Mapping[str, int] = field(default_factory=dict)

    def cached(self, path: str) -> str | None:
        """The file in huggingface_hub's cache, where it is there as it is in this commit."""
        from huggingface_hub import constants, try_to_load_from_cache

        found = try_to_load_from_cache(self.name.repo, path, cache_dir=constants.HF_HUB_CACHE, revision=self.commit)
        return found if isinstance(found, str) else None

    def part(self, path: str) -> RangeSource | None:
        """The file, to be read in parts; None where that is not asked for, or not needed."""
        if not self.ranges or self.snapshot or self.cached(path) is not None:
            return None
        from huggingface_hub import hf_hub_url, utils

        from adapterops.storage.ranges import RangeSource

        tools: Any = utils
        url, api = f"{self.name.spelled}/{path}", self.api
        address = hf_hub_url(self.name.repo, path, revision=self.commit, endpoint=api.endpoint)
        headers = tools.build_hf_headers(library_name=api.library_name, library_version=api.library_version)
        return RangeSource(
            url, address, headers, self.commit, lambda error: _explained(error, url, self.name, api.endpoint)
        )

    def _limit(self, path: str) -> None:
        """Raise `UnreadableFile` for a file that is too long to be downloaded for a look at it."""
        limit = MAX_FETCHED if path.endswith(_SUFFIXES[:-1]) else MAX_TEXT
        size = self.sizes.get(path)
        if size is None:
            part = self.part(path)
            size = part.open().size if part is not None else 0
        if size > limit:
            raise UnreadableFile(
                f"{self.name.spelled}/{path}: has {size} bytes, and only up to {limit} are downloaded to be validated; "
                "download it yourself (`hf download`) and validate it from the disk",
                fault=NOT_FETCHED,
            )

    def fetch(self, path: str) -> str:
        """The file in huggingface_hub's cache, downloaded unless it is there."""
        if self.snapshot:
            return os.path.join(self.snapshot, *path.split("/"))
        if self.ranges:
            held = self.cached(path)
            if held is not None:
                return held
            self._limit(path)
        url = f"{self.name.spelled}/{path}"
        try:
            with _bars_on_terminals_only():
                local = self.api.hf_hub_download(self.name.repo, path, revision=self.name.revision)
        except Exception as error:
            explained = _explained(error, url, self.name, self.api.endpoint)
            if isinstance(explained, UnreadableFile):
                explained.fault = NOT_FETCHED
            raise explained from error
        if f"/snapshots/{self.commit}/" not in str(local).replace(os.sep, "/"):
            raise UnreadableFile(
                f"{url}: the revision was changed while it was read; run the command again", fault=NOT_FETCHED
            )
        return str(local)


@contextlib.contextmanager
def _bars_on_terminals_only() -> Iterator[None]:
    """huggingface_hub draws its progress bars into log files too, unless HF_HUB_DISABLE_PROGRESS_BARS decides."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    decided = "HF_HUB_DISABLE_PROGRESS_BARS" in os.environ or are_progress_bars_disabled()
    if decided or (sys.stderr is not None and sys.stderr.isatty()):
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@dataclass(frozen=True, slots=True)
class HubFolder:
    """A folder of a repository, or its root (`inside` is empty)."""

    repo: _Repo
    inside: str = ""

    @property
    def path(self) -> str:
        """How messages name it."""
        return f"{self.repo.name.spelled}/{self.inside}".rstrip("/")

    @property
    def notes(self) -> tuple[str, ...]:
        """The commit that is read."""
        return (self.repo.note,)

    def _in_repo(self, name: str) -> str:
        return f"{self.inside}/{name}" if self.inside else name

    def names(self) -> list[str]:
        start = self._in_repo("")
        return sorted({f[len(start) :].partition("/")[0] for f in self.repo.files if f.startswith(start)})

    def is_folder(self, name: str) -> bool:
        return any(f.startswith(self._in_repo(name) + "/") for f in self.repo.files)

    def fetch(self, name: str) -> str:
        return self.repo.fetch(self._in_repo(name))

    def folder(self, name: str) -> HubFolder:
        return HubFolder(self.repo, self._in_repo(name))

    def ranges(self, name: str) -> RangeSource | None:
        return self.repo.part(self._in_repo(name))

    def candidates(self) -> str:
        """What to name instead, for the message that the folder holds no single adapter."""
        start = self._in_repo("")
        weights = [f for f in self.repo.files if f.startswith(start) and f.endswith(_SUFFIXES)]
        if not weights:
            return ""
        example = f"as {self.repo.name.spelled}/{weights[0]}"
        if any("/" not in f[len(start) :] for f in weights):  # the message has listed them
            return f", {example}"
        more = f" and {len(weights) - 8} more" if len(weights) > 8 else ""
        return f"; below it are {', '.join(weights[:8])}{more}; name one, {example}"


def locate(url: str, ranges: bool = False) -> tuple[HubFolder, str]:
    """The folder that an hf:// name means, and the file in it ("" where the folder itself is named).

    With `ranges`, weights are read in parts, as far as they are asked for, and are not downloaded whole.
    Asks the Hub for the list of files, or the cache where the Hub cannot be reached.  Raises `UsageError` for a
    malformed name, and `UnreadableFile` for a repository, revision or file that is not there or not accessible.
    """
    name = parse(url)
    repo = replace(_list(name, sizes=ranges), ranges=ranges)
    if not name.path or any(f.startswith(name.path + "/") for f in repo.files):
        return HubFolder(repo, name.path), ""
    if name.path in repo.files:
        folder, _, file = name.path.rpartition("/")
        return HubFolder(repo, folder), file
    where = f" in the cache, and {repo.why}" if repo.snapshot else ""
    near = _nearest(name.path, repo.files)
    held = f"; the nearest: {', '.join(near)}" if near else ""
    raise UnreadableFile(f"{url}: {name.spelled} has no file or folder {name.path!r}{where}{held}")


def _nearest(path: str, files: tuple[str, ...]) -> list[str]:
    near = difflib.get_close_matches(path, files, n=3, cutoff=0.5)
    return near or [f for f in files if f.endswith(_SUFFIXES)][:3]


def _list(name: Name, sizes: bool = False) -> _Repo:
    from huggingface_hub import HfApi, constants

    from adapterops import __version__

    # huggingface_hub reads the variable once, when it is imported.
    endpoint = os.environ.get("HF_ENDPOINT") or constants.ENDPOINT
    api = HfApi(endpoint=endpoint.rstrip("/"), library_name="adapterops", library_version=__version__)
    if not constants.HF_HUB_OFFLINE:
        try:
            info = api.model_info(name.repo, revision=name.revision, timeout=_TIMEOUT, files_metadata=sizes)
            files, commit = tuple(sorted(s.rfilename for s in info.siblings or ())), info.sha
            told = {s.rfilename: s.size for s in info.siblings or () if isinstance(s.size, int)}
        except _failures() as error:
            found = None if _is_answer(error) else _cached(name, api, f"the Hub cannot be asked ({_short(error)})")
            if found is None:
                raise _explained(error, name.spelled, name, api.endpoint) from error
            return found
        if not commit or not _COMMIT.fullmatch(commit) or not all(map(_is_path, files)):
            raise _not_the_hub(name.spelled, api.endpoint)
        return _Repo(name, api, commit, files, f"revision {commit} of {name.spelled}", sizes=told)
    found = _cached(name, api, "HF_HUB_OFFLINE is set")
    if found is None:
        raise UnreadableFile(
            f"{name.spelled}: HF_HUB_OFFLINE is set and the cache ({constants.HF_HUB_CACHE}) does not hold this "
            "repository and revision; unset it, or download the file first"
        )
    return found


def _cached(name: Name, api: HfApi, why: str) -> _Repo | None:
    """What the cache holds of a revision.

    Its layout: https://huggingface.co/docs/huggingface_hub/guides/manage-cache
    """
    from huggingface_hub import constants

    cache = os.path.join(constants.HF_HUB_CACHE, "models--" + name.repo.replace("/", "--"))
    commit = name.revision or constants.DEFAULT_REVISION
    if not _COMMIT.fullmatch(commit):
        try:
            with open(os.path.join(cache, "refs", *commit.split("/")), encoding="ascii") as file:
                commit = file.read(64).strip()
        except (OSError, ValueError):
            return None
    snapshot = os.path.join(cache, "snapshots", commit)
    if not _COMMIT.fullmatch(commit) or not os.path.isdir(snapshot):
        return None
    files = [
        os.path.relpath(os.path.join(folder, file), snapshot).replace(os.sep, "/")
        for folder, _, inside in os.walk(snapshot)
        for file in inside
    ]
    note = f"revision {commit} of {name.spelled}, from the cache and what it holds of it: {why}"
    return _Repo(name, api, commit, tuple(sorted(files)), note, snapshot, why)


def _failures() -> tuple[type[Exception], ...]:
    """What asking the Hub may raise: refusals, and a network or a server that is not what it should be."""
    from huggingface_hub.errors import HfHubHTTPError

    # The errors of requests (huggingface_hub 0.x) are OSErrors; those of httpx have a base that HfHubHTTPError shares.
    return (OSError, ValueError, KeyError, TypeError, HfHubHTTPError.__bases__[0])


def _is_answer(error: Exception) -> bool:
    """Whether the Hub itself said no: then a cached copy is not what was asked for."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if isinstance(error, HFValidationError):
        return True
    return isinstance(error, HfHubHTTPError) and _status(error) in range(400, 500) and _status(error) not in (408, 429)


def _status(error: Any) -> int:
    return int(getattr(error.response, "status_code", 0) or 0)


def _short(error: BaseException) -> str:
    """The first line of what a library says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0][:160]


def _explained(error: Exception, url: str, name: Name, endpoint: str) -> AdapterOpsError:
    """An error of huggingface_hub, or of the library it asks with, as one of ours."""
    from huggingface_hub import errors

    page = f"{endpoint}/{name.repo}"
    if isinstance(error, errors.HFValidationError):
        return UsageError(f"{url}: {_short(error)}")
    if isinstance(error, errors.GatedRepoError):
        return UnreadableFile(f"{url}: the repository is gated: accept its terms at {page}, then {_LOG_IN}")
    if isinstance(error, errors.RepositoryNotFoundError):
        return UnreadableFile(
            f"{url}: {endpoint} has no model repository {name.repo}, or it is private; check the name, or {_LOG_IN}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return UnreadableFile(
            f"{url}: the repository has no revision {name.revision or 'main'!r}; its branches and tags: {page}/refs"
        )
    if isinstance(error, errors.HfHubHTTPError):
        return UnreadableFile(f"{url}: {_refusal(_status(error), endpoint)}{_server_words(error)}")
    if isinstance(error, errors.EntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__ if isinstance(error.__cause__, Exception) else error
        if isinstance(error, errors.HfHubHTTPError):
            return _explained(error, url, name, endpoint)
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return UnreadableFile(f"{url}: the download failed: {error.filename}: {error.strerror}")
    if isinstance(error, ValueError | TypeError | KeyError):  # what came back is not what the API gives
        return _not_the_hub(url, endpoint)
    # Whatever the HTTP library raises: its errors have no common name across the versions of huggingface_hub.
    return UnreadableFile(
        f"{url}: cannot be had from {endpoint} ({type(error).__name__}: {_short(error)}) and is not in the cache; check "
        "the connection, the proxy and HF_ENDPOINT"
    )


def _not_the_hub(url: str, endpoint: str) -> UnreadableFile:
    return UnreadableFile(
        f"{url}: {endpoint} does not answer as the Hub does (a log-in page, a proxy?); check HF_ENDPOINT"
    )


def _refusal(status: int, endpoint: str) -> str:
    if status == 401:
        return f"{endpoint} refuses access (401): there is no token, or one that it does not accept; {_LOG_IN}"
    if status == 403:
        return f"{endpoint} refuses access (403): the account or its token may not read this; {_LOG_IN} of one that may"
    if status == 404:
        return "the Hub lists this file and does not have it (404)"
    if status == 429:
        return f"too many requests to {endpoint} (429); wait, or {_LOG_IN}"
    return f"{endpoint} answered {status}; try again later"


def _server_words(error: Any) -> str:
    said = getattr(error, "server_message", None)
    return f" ({' '.join(said.split())[:200]})" if isinstance(said, str) and said.strip() else ""
