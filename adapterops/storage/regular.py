"""Opening input files: ordinary files only, and never waiting for one."""

from __future__ import annotations

import os
import stat

from adapterops.errors import UnreadableFile

Identity = tuple[int, int, int, int]
"""Device, inode, size in bytes, time of last change: what tells that a file is still the one that was looked at."""


def open_regular(path: str) -> tuple[int, Identity]:
    """A descriptor for reading `path`, and the file's identity.

    Raises `UnreadableFile` for what cannot be opened and for what is no file: a pipe without a writer would be
    waited for without end, and a device has no size that a header could be checked against.
    """
    try:
        # Not blocking, so that a pipe is opened at once and can be refused.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise UnreadableFile(f"{path}: {_why(path, error)}") from error
    found = os.fstat(descriptor)
    if stat.S_ISREG(found.st_mode):
        return descriptor, (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
    os.close(descriptor)
    what = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe, socket or device"
    raise UnreadableFile(f"{path}: is {what}; an ordinary file is needed")


def _why(path: str, error: OSError) -> str:
    if isinstance(error, FileNotFoundError) and os.path.islink(path):
        return f"is a link to {os.readlink(path)}, which is not there"
    if isinstance(error, PermissionError):
        return "permission denied; make it readable for this user"
    return error.strerror or str(error)
