"""`.bin` and `.pt` files: read by `torch.load(weights_only=True)` or not at all.

What a file would do is read from its instructions first (`pickle_scan`): torch is asked, and imported, only for files of
tensors and nothing else.
"""

from __future__ import annotations

import contextlib
import re
import warnings
import zipfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any

from adapterops.errors import NotAnAdapter, UnreadableFile, UnsafePickle
from adapterops.storage import pickle_scan
from adapterops.storage.archive import begin_of, entries_of
from adapterops.storage.regular import open_regular
from adapterops.storage.safetensors import insist_on_unicode
from adapterops.storage.tensor import NAMELESS, TORCH_NAMES, LazyTensor, numbered

if TYPE_CHECKING:
    import torch

_DTYPES = {name: dtype for dtype, name in TORCH_NAMES.items()}
_MAX_RATIO = 64
"""Bytes of tensors to bytes of file.  Keys may share a tensor (tied weights); many more than that is a bomb."""
_UNSAFE = re.compile(r"(?:GLOBAL|class|function) ([\w.]*\w)")
"""How torch names, in its refusal, what a pickle wants to call."""


@dataclass(slots=True)
class TensorSource:
    """The bytes of one tensor that torch holds (usually a memory map of the file)."""

    path: str
    tensor: torch.Tensor
    _bytes: memoryview | None = field(default=None, repr=False)

    def readinto(self, start: int, buffer: memoryview) -> None:
        # Held by this call, too: another thread may be at the end of the tensor.
        held = self._bytes
        if held is None:
            import torch

            flat = self.tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
            # One element counts as contiguous whatever its stride is said to be.
            flat = flat.as_strided(flat.shape, (1,)).view(torch.uint8)
            held = self._bytes = flat.numpy().data
        part = held[start : start + len(buffer)]
        buffer[:] = part
        if start + len(part) == len(held):
            # A strided view was copied; its bytes are not kept, so that memory follows the largest tensor.
            self._bytes = None


def read(path: str) -> tuple[dict[str, LazyTensor], dict[str, str], tuple[str, ...], bool, dict[str, Any]]:
    """The tensors of a pickled state dict, no metadata, notes, whether that is all of the file, and the plain data beside it.

    Raises `UnsafePickle` where the file holds more than tensors, `UnreadableFile` where it is damaged, and
    `NotAnAdapter` where it is sound but holds no tensors by name.  A bare tensor is called `NAMELESS`, those of a list
    `numbered`.
    """
    descriptor, (_, _, size, _) = open_regular(path)
    with open(descriptor, "rb") as file:
        head = file.read(16)
        zipped = head.startswith(b"PK\x03\x04")
        if zipped:
            for begin, end in _pickles_of_zip(path, file, size):
                _insist_on_tensors(path, pickle_scan.scan(file, begin, end))
        else:
            _refuse_other_content(path, file, head, size)
            _insist_on_tensors(path, pickle_scan.scan(file, 0, size))
    loaded, notes, beside = _inner(_load(path, zipped))
    return _flatten(path, loaded, size), {}, notes, not notes, beside


def _insist_on_tensors(path: str, found: pickle_scan.Scan) -> None:
    """Refuse a pickle that does more than making tensors, that breaks off, or that asks for too much."""
    if found.does:
        raise UnsafePickle(
            f"{path}: refused: it holds more than tensors, and loading it would {found.does}. Save the plain state dict, "
            "best as .safetensors"
        )
    if found.bomb:
        raise UnreadableFile(
            f"{path}: refused as a bomb: its pickle cannot be an adapter's: {found.bomb}", fault="bomb"
        )
    if found.damage:
        raise UnreadableFile(
            f"{path}: not a file of torch.save, or damaged: {found.damage}; download it again", fault="cut-short"
        )


def _refuse_other_content(path: str, file: IO[bytes], head: bytes, size: int) -> None:
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8:
        raise UnreadableFile(
            f"{path}: is a safetensors file, and is called as a pickle; rename it to .safetensors", fault="wrong-suffix"
        )
    file.seek(257)  # where tar archives have their mark
    if file.read(5) == b"ustar":
        raise UnreadableFile(
            f"{path}: is a tar archive, perhaps of a torch.save before version 0.2; load and save it again with a torch "
            "of those days"
        )


def _load(path: str, zipped: bool) -> object:
    """What `torch.load(weights_only=True)` makes of the file; a zip is mapped into memory, not read."""
    import pickle

    import torch

    try:
        with warnings.catch_warnings(), _short_messages():
            # About the pickle protocol and torch's own storages: nothing that the user could act on.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        unsafe = _UNSAFE.search(_reason(error))
        if unsafe:
            raise UnsafePickle(
                f"{path}: refused: it holds more than tensors ({unsafe[1][:160]}), and loading that could run code. "
                "Save the plain state dict, best as .safetensors"
            ) from error
        raise UnreadableFile(
            f"{path}: not a file of torch.save, or damaged: {_first_line(error)}; download it again",
            fault="cut-short",
        ) from error
    except OSError as error:
        raise UnreadableFile(
            f"{path}: cut short or damaged: {error.strerror or error}; download it again", fault="cut-short"
        ) from error
    # Whatever bytes a stranger wrote decide what is raised here: KeyError, struct.error, OverflowError, MemoryError …
    except Exception as error:
        raise UnreadableFile(
            f"{path}: torch.load cannot read it: {_first_line(error)}; download it again", fault="cut-short"
        ) from error


@contextlib.contextmanager
def _short_messages() -> Iterator[None]:
    """Cut what torch's unpickler says of a file.

    torch 2.13 searches it for patterns that take the square of its length, and a file can make it as long as itself.
    """
    from torch import _weights_only_unpickler as unpickler

    original = getattr(unpickler, "UnpicklingError", None)
    if original is None:  # another version keeps it elsewhere: long messages are slow there, nothing else
        yield
        return

    class Short(original):  # type: ignore[misc, valid-type]
        def __init__(self, *arguments: object) -> None:
            super().__init__(*(str(argument)[:1000] for argument in arguments))

    unpickler.UnpicklingError = Short  # type: ignore[attr-defined]
    try:
        yield
    finally:
        unpickler.UnpicklingError = original  # type: ignore[attr-defined]


def _first_line(error: Exception) -> str:
    """What torch says, without its advice (to load the file unsafely, among others)."""
    lines = _reason(error).strip().splitlines() or [type(error).__name__]
    said = re.split(r"\. (?:In PyTorch|This is|Please)", lines[0])[0][:160]
    # It may quote the file's own bytes, and a terminal would obey them.
    return "".join(c if c.isprintable() else "?" for c in said)


def _reason(error: Exception) -> str:
    """The part of torch's message that is about the file: after its advice about `weights_only`."""
    text = str(error)
    return text.partition("WeightsUnpickler error:")[2] or text.partition("from a trusted source.")[2] or text


def _pickles_of_zip(path: str, file: IO[bytes], size: int) -> list[tuple[int, int]]:
    """Where the pickles of a zip stand.  Raises `UnreadableFile` for a zip that torch.save cannot have written."""
    entries, end = entries_of(path, file, size, "a file of torch.save")
    names = [entry.filename for entry in entries]
    if any("/code/" in name for name in names) and any(name.endswith("/constants.pkl") for name in names):
        raise UnsafePickle(
            f"{path}: refused: it is a TorchScript program; save the plain state dict", fault="torchscript"
        )
    if names and all(name.endswith(".npy") for name in names):
        raise UnreadableFile(
            f"{path}: is a numpy archive, not a file of torch.save; rename it to .npz", fault="wrong-suffix"
        )
    for entry in entries:
        # torch stores its tensors as they are; memory mapping relies on it, and an entry that expands may be a bomb.
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise UnreadableFile(
                f"{path}: entry {entry.filename[:200]!r} is compressed ({entry.compress_size} bytes that claim to be "
                f"{entry.file_size}), which torch.save never does; load it where it came from and save it again, best as "
                ".safetensors",
                fault="compressed",
            )
    pickles = [entry for entry in entries if entry.filename.endswith("data.pkl")]
    if not pickles:
        raise UnreadableFile(f"{path}: a zip, but not one of torch.save (it has no data.pkl); download it again")
    begins = [begin_of(path, file, entry, end) for entry in pickles]
    return [(begin, begin + entry.file_size) for begin, entry in zip(begins, pickles, strict=True)]


_TRAINING = re.compile(
    r"(optim|optimizer|optimizers|scheduler|schedulers|lr_scheduler|lr_schedulers|scaler|grad_scaler|rng|random|callbacks|loops)"
    r"(_state|_states|_dict|_state_dict)?"
)
"""The entries of a checkpoint that hold the trainer's own state."""
_MANY, _DEEP = 1_000, 8
"""Mappings of a state dict, and entries of settings; and levels of mappings: more than that are no adapter's."""
_SHOWN = 6
"""Of what a checkpoint holds beside its state dict."""


def _inner(loaded: object) -> tuple[object, tuple[str, ...], dict[str, Any]]:
    """The state dict of a checkpoint that has just one, a note on what stands beside it, and what of that is plain data.

    Trainers put it under names of their own, beside the epoch, their settings and the optimizer's state: Lightning and mmengine
    (xtuner) call it state_dict, Fabric (litgpt) model, DeepSpeed module, tutorials model_state_dict or lora.  Its own entries
    may be mappings again (CLIP-LoRA's weights): the names are put together with dots.
    """
    if not isinstance(loaded, Mapping) or not all(isinstance(name, str) for name in loaded):
        return loaded, (), {}
    states = {name: _state(value) for name, value in loaded.items() if not _TRAINING.fullmatch(name)}
    # One tensor among other things is an embedding, if anything.
    inside = {name: state for name, state in states.items() if state and (len(loaded) == 1 or len(state) > 1)}
    rest = {name: value for name, value in loaded.items() if name not in inside}
    if len(inside) != 1 or any(_has_tensors(v) for name, v in rest.items() if not _TRAINING.fullmatch(name)):
        return loaded, (), {}
    ((name, state),) = inside.items()
    names = {other: "".join(c if c.isprintable() else "?" for c in other[:40]) for other in rest}
    said = [f"{names[other]} {value!r:.40}" if _is_short(value) else names[other] for other, value in rest.items()]
    more = f" and {len(said) - _SHOWN} more" if len(said) > _SHOWN else ""
    note = (
        f"is a checkpoint: {name!r} is read, and of what stands beside it a format's own settings at most: "
        f"{', '.join(said[:_SHOWN])}{more}"
    )
    return state, (note,) if said else (), {other: value for other, value in rest.items() if _is_plain(value)}


def _state(value: object, depth: int = 0, seen: set[int] | None = None) -> dict[str, torch.Tensor]:
    """The tensors of a state dict, those of mappings inside it by dotted names; none where it holds anything else.

    A mapping that stands in several places is none of a state dict's: a small file could make any number of names so.
    """
    import torch

    seen = set() if seen is None else seen
    if not isinstance(value, Mapping) or id(value) in seen or len(seen) > _MANY or depth > _DEEP:
        return {}
    seen.add(id(value))
    out: dict[str, torch.Tensor] = {}
    for key, entry in value.items():
        if not isinstance(key, str):
            return {}
        found = {"": entry} if isinstance(entry, torch.Tensor) else _state(entry, depth + 1, seen)
        own = {f"{key}.{name}" if name else key: tensor for name, tensor in found.items()}
        if not own or not own.keys().isdisjoint(out):
            return {}
        out |= own
    return out


def _is_short(value: object) -> bool:
    return isinstance(value, (int, float, str)) and len(str(value)) <= 40


def _is_plain(value: object) -> bool:
    """Whether it is what JSON could hold, and not much of it."""
    waiting, count = [value], 0
    while waiting:
        entry, count = waiting.pop(), count + 1
        if count > _MANY or not (entry is None or isinstance(entry, (bool, int, float, str, list, tuple, Mapping))):
            return False
        if isinstance(entry, Mapping) and not all(isinstance(key, str) for key in entry):
            return False
        waiting += _inside(entry)
    return True


def _has_tensors(value: object) -> bool:
    import torch

    waiting, seen = [value], set[int]()
    while waiting:
        entry = waiting.pop()
        if isinstance(entry, torch.Tensor):
            return True
        if id(entry) not in seen:  # a small file may name one list any number of times
            seen.add(id(entry))
            waiting += _inside(entry)
    return False


def _inside(value: object) -> Collection[object]:
    return value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple, set)) else ()


def _flatten(path: str, loaded: object, size: int) -> dict[str, LazyTensor]:
    import torch

    if isinstance(loaded, torch.Tensor):
        loaded = {NAMELESS: loaded}
    elif isinstance(loaded, (list, tuple)) and loaded and all(isinstance(value, torch.Tensor) for value in loaded):
        loaded = {numbered(position): value for position, value in enumerate(loaded)}
    if not isinstance(loaded, Mapping):
        raise NotAnAdapter(
            f"{path}: holds a bare {type(loaded).__name__}, not a state dict (names to tensors): "
            "perhaps a soft prompt or an embedding"
        )
    tensors: dict[str, LazyTensor] = {}
    for key, value in loaded.items():
        if not isinstance(key, str):
            raise NotAnAdapter(f"{path}: entry {str(key)[:80]!r}: its name is a {type(key).__name__}, not a string")
        if not isinstance(value, torch.Tensor):
            raise NotAnAdapter(
                f"{path}: entry {key[:80]!r} is a {type(value).__name__}, not a tensor: "
                "a training checkpoint or optimizer state rather than an adapter's state dict"
            )
        insist_on_unicode(path, [key])
        if key == "__metadata__":
            raise UnreadableFile(
                f"{path}: a tensor is named {key!r}, which safetensors reserves; rename it", fault="reserved-name"
            )
        name = _DTYPES.get(str(value.dtype).removeprefix("torch."))
        if name is None or value.layout != torch.strided or value.device.type != "cpu":
            raise UnreadableFile(
                f"{path}: tensor {key[:80]!r} has dtype {value.dtype}, layout {value.layout}, device {value.device}: "
                "only plain tensors can be used; save it as one",
                fault="odd-tensor",
                keys=(key,),
            )
        tensors[key] = LazyTensor(key, name, tuple(value.shape), TensorSource(path, value), 0)
    # A view may repeat one number without end, and many keys may name one tensor: a small file, a huge output.
    total = sum(tensor.nbytes for tensor in tensors.values())
    if total > _MAX_RATIO * max(size, 1 << 20):
        raise UnreadableFile(
            f"{path}: its tensors claim {total} bytes, but the file has {size}; refused as a bomb", fault="bomb"
        )
    return tensors
