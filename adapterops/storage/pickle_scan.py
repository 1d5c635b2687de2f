"""What a pickle would do, read from its instructions; nothing in it is imported, called or built.

A pickle is a program for a small stack machine (Python's `pickletools` describes each instruction).  Here the machine runs
over names in place of objects: whatever the program would import and call is told, and nothing else happens.

Time and memory are bounded: there is a limit to the instructions, long strings are skipped and not read, and only short
texts are kept.  Where a name was not kept, the call is told without it; nothing that is called goes untold.

`SAFE` is what `torch.load(weights_only=True)` lets a file name (torch 2.13, `_weights_only_unpickler.py`).
"""

from __future__ import annotations

import io
import re
import struct
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, Final, NamedTuple

MAX_INSTRUCTIONS: Final = 600_000
"""A tensor takes about 35."""
MAX_CALLS: Final = 60_000
"""A tensor takes two.  What is called makes an object of several hundred bytes when the file is loaded."""
MAX_MEMO: Final = 300_000
"""Values that are kept to be named again; a tensor takes about eight."""
MAX_PICKLES: Final = 5
"""torch.save before 1.6 wrote five pickles in a row, and the tensors' bytes behind them."""
MAX_EXPANDED: Final = 1_000_000
"""Values in a tuple, those in its tuples counted as often as they stand there: whatever hashes it visits all of them."""
MAX_DEPTH: Final = 500
"""Tuples within tuples, which are hashed by a recursion that nothing stops."""
_LEGACY: Final = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""The first of those five."""
_LONGEST_TEXT = 160
"""Bytes of a string that is kept; names of modules and functions are shorter."""
_KEPT_TEXT = 16 << 20
"""Bytes of strings that are kept in all."""
_LONGEST_NESTED = 1 << 20
_KEPT_NESTED = 4 << 20
"""Bytes of byte strings, which may be pickles themselves."""
_DEPTH = 3
_TOLD = 12
_LINE = 1 << 16

SAFE: Final = re.compile(
    r"""torch\.(?:cuda\.)?(?:sparse\.)?\w*(?:Storage|Tensor)
    |torch\.storage\.(?:Typed|Untyped)Storage
    |torch\.(?:q?u?int\d+(?:x\d+)?|float\d\w*|bfloat16|bool|complex\d+|bits\w+|per_(?:tensor|channel)_\w+)
    |torch\._utils\._rebuild_\w+
    |torch\._tensor\._rebuild_from_type_v2
    |torch\.(?:Size|device|serialization\._get_layout|nn\.parameter\.Parameter)
    |collections\.(?:OrderedDict|Counter)
    |_codecs\.encode
    |builtins\.(?:bytearray|complex|set)""",
    re.VERBOSE,
)
"""Names that a file of tensors may have."""


@dataclass(frozen=True, slots=True)
class Scan:
    """What a pickle would do.

    `imports` are the names that are not `SAFE`, `calls` what it would call of them, with the arguments as far as they are
    plain.  `damage` says why it cannot be read to its end, `bomb` why it was not; "" where it could be.
    """

    imports: tuple[str, ...] = ()
    calls: tuple[str, ...] = ()
    damage: str = ""
    bomb: str = ""
    pickles: int = 0

    @property
    def does(self) -> str:
        """What loading it would do that is more than making tensors; "" where it is nothing."""
        told = [f"call {call}" for call in self.calls] or [f"import {name}" for name in self.imports]
        shown = "; ".join(told[:3])
        return shown + (f" and {len(told) - 3} more" if len(told) > 3 else "")


class _Damaged(Exception):
    """The pickle breaks off or is none."""


class _Bomb(Exception):
    """More instructions than any adapter has, or one that asks for memory."""


class _Name(NamedTuple):
    """Something imported."""

    name: str


class _Made(NamedTuple):
    """What a call gave."""

    call: str


class _Bytes(NamedTuple):
    """A byte string; `data` is empty where it was not kept."""

    length: int
    data: bytes


class _Tuple(NamedTuple):
    """A tuple: the first of its values, how many it has in all, and how deep its tuples go."""

    values: tuple[Any, ...]
    size: int
    depth: int


class _Mark:
    """Where the items of a list, tuple or dict begin."""


_MARK: Final = _Mark()


class _Other(NamedTuple):
    """Anything whose value does not matter here."""

    what: str = "…"


_OTHER: Final = _Other()
_LIST: Final = _Other("[…]")
_DICT: Final = _Other("{…}")


def scan_bytes(data: bytes, depth: int = 0, reads: re.Pattern[str] | None = None) -> Scan:
    """Scan a pickle in memory."""
    return scan(io.BytesIO(data), 0, len(data), depth, reads)


def scan(file: IO[bytes], begin: int, end: int, depth: int = 0, reads: re.Pattern[str] | None = None) -> Scan:
    """Scan the pickle, or the pickles in a row, in the bytes `begin` to `end` of a file.

    `reads` are names that need not be told besides those that are `SAFE`: what the file's own kind must have.
    """
    machine = _Machine(file, end, depth, reads)
    file.seek(begin)
    legacy = file.read(len(_LEGACY)) == _LEGACY
    file.seek(begin)
    pickles, damage, bomb = 0, "", ""
    try:
        while pickles < MAX_PICKLES:
            machine.run()
            pickles += 1
            here = file.tell()
            following = file.read(1) if here < end else b""
            if following != b"\x80" and not (legacy and following in _TABLE):
                break
            file.seek(here)
    except _Damaged as error:
        # Behind a whole pickle anything may follow; what it is, is for its loader to say.
        damage = str(error) if not pickles else ""
    except _Bomb as error:
        bomb = str(error)
    return Scan(tuple(machine.imports), tuple(machine.calls), damage, bomb, pickles)


@dataclass(slots=True)
class _Machine:
    file: IO[bytes]
    end: int
    depth: int
    reads: re.Pattern[str] | None
    stack: list[Any] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)
    imports: dict[str, None] = field(default_factory=dict)
    calls: dict[str, None] = field(default_factory=dict)
    steps: int = 0
    called: int = 0
    texts: int = 0
    nested: int = 0

    def run(self) -> None:
        """Go to the end of one pickle."""
        self.stack, self.memo = [], {}
        file, table, steps = self.file, _TABLE, self.steps
        while True:
            code = file.read(1)
            if not code:
                raise _Damaged("it ends before its last instruction: cut short")
            steps += 1
            if steps > MAX_INSTRUCTIONS:
                raise _Bomb(f"it has more than {MAX_INSTRUCTIONS} instructions; no adapter has so many")
            if code == b".":
                self.steps = steps
                return
            act = table.get(code)
            if act is None:
                raise _Damaged(f"byte {file.tell() - 1} ({code[0]:#04x}) is no instruction of a pickle")
            try:
                act(self)
            except (IndexError, struct.error) as error:
                raise _Damaged(f"the instruction at byte {file.tell() - 1} finds nothing to work on") from error

    # -- reading

    def take(self, count: int) -> bytes:
        """The next few bytes."""
        data = self.file.read(count)
        if len(data) != count:
            raise _Damaged("it ends inside an instruction: cut short")
        return data

    def number(self, form: str) -> int:
        return int(struct.unpack(form, self.take(struct.calcsize(form)))[0])

    def line(self) -> str:
        """The rest of the line; "" where it is too long to be kept."""
        line, short = self.file.readline(_LINE), True
        while line and not line.endswith(b"\n"):
            line, short = self.file.readline(_LINE), False
        if not line:
            raise _Damaged("it ends inside an instruction: cut short")
        return line[:-1].decode("utf-8", "replace") if short else ""

    def skip(self, count: int) -> None:
        here = self.file.tell()
        if not 0 <= count <= self.end - here:
            raise _Damaged(f"byte {here}: a string of {count} bytes, but only {self.end - here} follow: cut short")
        self.file.seek(here + count)

    def text(self, count: int) -> None:
        if 0 <= count <= _LONGEST_TEXT and self.texts < _KEPT_TEXT:
            self.texts += count
            self.stack.append(self.take(count).decode("utf-8", "replace"))
        else:
            self.skip(count)
            self.stack.append(_Other("a long string"))

    def data(self, count: int) -> None:
        if 0 <= count <= _LONGEST_NESTED and self.nested + count <= _KEPT_NESTED and self.depth < _DEPTH:
            self.nested += count
            self.stack.append(_Bytes(count, self.take(count)))
        else:
            self.skip(count)
            self.stack.append(_Bytes(count, b""))

    # -- the stack

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise IndexError
        return value

    def items(self) -> list[Any]:
        """What stands above the last mark, which goes with it."""
        stack = self.stack
        at = len(stack) - 1
        while stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise IndexError
        found = stack[at + 1 :]
        del stack[at:]
        return found

    def tuple(self, values: Sequence[Any]) -> None:
        inner = [value for value in values if isinstance(value, _Tuple)]
        size = 1 + len(values) + sum(value.size for value in inner)
        depth = 1 + max((value.depth for value in inner), default=0)
        if size > MAX_EXPANDED or depth > MAX_DEPTH:
            raise _Bomb("its tuples hold each other so often that nothing could go through them")
        self.stack.append(_Tuple((*values[:8], *([_OTHER] if len(values) > 8 else ())), size, depth))

    # -- what matters

    def expected(self, name: str) -> bool:
        return bool(SAFE.fullmatch(name) or (self.reads is not None and self.reads.fullmatch(name)))

    def name(self, module: object, name: object) -> None:
        """Something is imported."""
        if not isinstance(module, str) or not isinstance(name, str) or not module or not name:
            full = "something whose name is put together while loading"
        else:
            # Python reads the names of Python 2 as today's.
            module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
            module = "os" if module in ("posix", "nt") else module
            full = f"{module}.{name}"[:_LONGEST_TEXT]
        if not self.expected(full) and len(self.imports) < 100:
            self.imports[full] = None
        self.stack.append(_Name(full))

    def call(self, what: Any, arguments: Any) -> None:
        """Something is called."""
        self.called += 1
        if self.called > MAX_CALLS:
            raise _Bomb(f"it makes more than {MAX_CALLS} objects; no adapter has so many")
        name = what.name if isinstance(what, _Name) else what.call if isinstance(what, _Made) else ""
        if isinstance(what, _Name) and self.expected(name):
            values = arguments.values if isinstance(arguments, _Tuple) else ()
            if name == "builtins.bytearray" and values and not isinstance(values[0], _Bytes):
                raise _Bomb("it asks for a byte array of any size")
            text = values[0] if name == "_codecs.encode" and values else ""
            # How byte strings are spelt in the protocols of Python 2.
            kept = text.encode("latin-1", "replace") if isinstance(text, str) else b""
            self.stack.append(_Bytes(len(kept), kept) if name == "_codecs.encode" else _OTHER)
            if not SAFE.fullmatch(name):
                for inner in _byte_strings(arguments):
                    self.look_inside(inner)
            return
        told = f"{name or 'what it made before'}{_shown(arguments, 0)}"[:240]
        if len(self.calls) < _TOLD:
            self.calls[told] = None
            for inner in _byte_strings(arguments):
                self.look_inside(inner)
        self.stack.append(_Made(f"{name[:100]}(…)"))

    def look_inside(self, data: bytes) -> None:
        """A byte string that is handed to a call may be a pickle."""
        if data[:1] == b"\x80":
            inner = scan_bytes(data, self.depth + 1, self.reads)
            for told in inner.calls or inner.imports:
                if len(self.calls) < _TOLD:
                    self.calls[f"{told} (in a pickle within the pickle)"] = None


def _byte_strings(arguments: Any) -> list[bytes]:
    values = arguments.values if isinstance(arguments, _Tuple) else ()
    return [value.data for value in values if isinstance(value, _Bytes) and value.data]


def _shown(value: Any, depth: int) -> str:
    """A value in a message.  Tuples may hold each other many times over: only the outer ones are shown."""
    if isinstance(value, _Name):
        return value.name
    if isinstance(value, _Made):
        return value.call
    if isinstance(value, _Bytes):
        return f"<{value.length} bytes>"
    if isinstance(value, _Other):
        return value.what
    if isinstance(value, _Tuple):
        if depth > 2:
            return "(…)"
        shown = value.values[:4]
        return f"({', '.join(_shown(v, depth + 1) for v in shown)}{', …' if len(value.values) > 4 else ''})"
    return repr(value)[:100]


_Act = Callable[[_Machine], None]


def _put(value: Any) -> _Act:
    return lambda m: m.stack.append(value)


def _sized(form: str, what: str) -> _Act:
    def act(m: _Machine) -> None:
        count = m.number(form)
        if what == "text":
            m.text(count)
        elif what == "data":
            m.data(count)
        else:
            m.skip(count)
            m.stack.append(_OTHER)

    return act


def _fixed(form: str) -> _Act:
    return lambda m: m.stack.append(m.number(form))


def _float(m: _Machine) -> None:
    m.take(8)
    m.stack.append(_OTHER)


def _ignored(count: int) -> _Act:
    def act(m: _Machine) -> None:
        m.take(count)

    return act


def _line_value(m: _Machine) -> None:
    m.line()
    m.stack.append(_OTHER)


def _line_text(m: _Machine) -> None:
    text = m.line()
    kept = len(text) <= _LONGEST_TEXT + 2 and m.texts < _KEPT_TEXT
    m.texts += len(text) if kept else 0
    quoted = text[:1] in ("'", '"') and text[-1:] == text[:1] and len(text) > 1
    m.stack.append((text[1:-1] if quoted else text) if kept and text else _Other("a long string"))


def _drop(count: int) -> _Act:
    def act(m: _Machine) -> None:
        for _ in range(count):
            m.pop()
        m.stack[-1]  # what it is added to must be there

    return act


def _drop_items(m: _Machine) -> None:
    m.items()
    m.stack[-1]


def _few(count: int) -> _Act:
    def act(m: _Machine) -> None:
        m.tuple([m.pop() for _ in range(count)][::-1])

    return act


def _pop(m: _Machine) -> None:
    m.stack.pop()  # a mark too


def _dup(m: _Machine) -> None:
    m.stack.append(m.stack[-1])


def _keep(m: _Machine, at: int) -> None:
    m.memo[at] = m.stack[-1]
    if len(m.memo) > MAX_MEMO:
        raise _Bomb(f"it keeps more than {MAX_MEMO} values; no adapter has so many")


def _memoize(m: _Machine) -> None:
    _keep(m, len(m.memo))


def _memo_put(form: str) -> _Act:
    def act(m: _Machine) -> None:
        _keep(m, m.number(form))

    return act


def _memo_get(form: str) -> _Act:
    def act(m: _Machine) -> None:
        _recall(m, m.number(form))

    return act


def _recall(m: _Machine, at: int) -> None:
    if at not in m.memo:
        raise _Damaged(f"it recalls a value ({at}) that it never kept")
    m.stack.append(m.memo[at])


def _index(m: _Machine) -> int:
    line = m.line()
    if not line.isdecimal() or len(line) > 12:
        raise _Damaged("an index in it is no number")
    return int(line)


def _line_put(m: _Machine) -> None:
    _keep(m, _index(m))


def _line_get(m: _Machine) -> None:
    _recall(m, _index(m))


def _global(m: _Machine) -> None:
    m.name(m.line(), m.line())


def _stack_global(m: _Machine) -> None:
    name, module = m.pop(), m.pop()
    m.name(module, name)


def _extension(form: str) -> _Act:
    return lambda m: m.name("copyreg", f"extension_{m.number(form)}")


def _reduce(m: _Machine) -> None:
    arguments, what = m.pop(), m.pop()
    m.call(what, arguments)


def _new_with_names(m: _Machine) -> None:
    m.pop()  # the named arguments
    _reduce(m)


def _inst(m: _Machine) -> None:
    module, name = m.line(), m.line()
    arguments = m.items()
    m.name(module, name)
    m.call(m.pop(), _Tuple(tuple(arguments[:8]), 1, 1))


def _obj(m: _Machine) -> None:
    what, *arguments = m.items() or [_OTHER]
    m.call(what, _Tuple(tuple(arguments[:8]), 1, 1))


def _by_mark(value: _Other) -> _Act:
    def act(m: _Machine) -> None:
        m.items()
        m.stack.append(value)

    return act


def _tuple(m: _Machine) -> None:
    m.tuple(m.items())


def _persistent(m: _Machine) -> None:
    # torch.save before 1.6 keeps a module's class, and its source, so; storages are told by their name.
    said = m.pop()
    values = said.values if isinstance(said, _Tuple) else ()
    m.stack.append(values[1] if values[:1] == ("module",) and len(values) > 1 else _OTHER)


_TABLE: Final[dict[bytes, _Act]] = {
    b"\x80": _ignored(1),  # PROTO
    b"\x95": _ignored(8),  # FRAME: only says how much may be read at once
    b"(": _put(_MARK),
    b"0": _pop,
    b"1": _drop_items,  # POP_MARK
    b"2": _dup,
    b"N": _put(None),
    b"\x88": _put(True),
    b"\x89": _put(False),
    b"F": _line_value,
    b"I": _line_value,
    b"L": _line_value,
    b"P": _line_value,  # PERSID
    b"S": _line_text,
    b"V": _line_text,
    b"G": _float,
    b"J": _fixed("<i"),
    b"K": _fixed("<B"),
    b"M": _fixed("<H"),
    b"\x8a": _sized("<B", "other"),  # LONG1
    b"\x8b": _sized("<i", "other"),  # LONG4
    b"T": _sized("<i", "text"),  # BINSTRING
    b"U": _sized("<B", "text"),
    b"X": _sized("<I", "text"),  # BINUNICODE
    b"\x8c": _sized("<B", "text"),
    b"\x8d": _sized("<Q", "text"),
    b"B": _sized("<I", "data"),  # BINBYTES
    b"C": _sized("<B", "data"),
    b"\x8e": _sized("<Q", "data"),
    b"\x96": _sized("<Q", "data"),  # BYTEARRAY8
    b"\x97": _put(_OTHER),  # NEXT_BUFFER
    b"\x98": lambda m: None,  # READONLY_BUFFER
    b"]": _put(_LIST),
    b"}": _put(_DICT),
    b")": _put(_Tuple((), 1, 1)),
    b"\x8f": _put(_Other("{…}")),  # EMPTY_SET
    b"l": _by_mark(_LIST),
    b"d": _by_mark(_DICT),
    b"\x91": _by_mark(_OTHER),  # FROZENSET
    b"t": _tuple,
    b"\x85": _few(1),
    b"\x86": _few(2),
    b"\x87": _few(3),
    b"a": _drop(1),  # APPEND
    b"e": _drop_items,  # APPENDS
    b"s": _drop(2),  # SETITEM
    b"u": _drop_items,  # SETITEMS
    b"\x90": _drop_items,  # ADDITEMS
    b"g": _line_get,
    b"h": _memo_get("<B"),
    b"j": _memo_get("<I"),
    b"p": _line_put,
    b"q": _memo_put("<B"),
    b"r": _memo_put("<I"),
    b"\x94": _memoize,
    b"Q": _persistent,
    b"c": _global,
    b"\x93": _stack_global,
    b"\x82": _extension("<B"),
    b"\x83": _extension("<H"),
    b"\x84": _extension("<i"),
    b"R": _reduce,
    b"\x81": _reduce,  # NEWOBJ
    b"\x92": _new_with_names,
    b"i": _inst,
    b"o": _obj,
    b"b": _drop(1),  # BUILD
}
