"""The header check, case by case and against the reference reader's verdict."""

from __future__ import annotations

import json
import random
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import safetensors
import storage_files as files
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapterops.errors import AdapterOpsError, CannotRepresent, InvalidHeader, UnreadableFile
from adapterops.storage import LazyTensor, open_source
from adapterops.storage import safetensors as container
from adapterops.storage.tensor import MemorySource

ONE = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


def one(**fields: Any) -> str:
    return json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **fields}})


REFUSED = {
    "number in metadata": (f'{{"__metadata__":{{"k":1}},"a":{ONE}}}', "strings to strings"),
    "list as metadata": (f'{{"__metadata__":[],"a":{ONE}}}', "strings to strings"),
    "metadata twice": (f'{{"__metadata__":{{}},"__metadata__":{{}},"a":{ONE}}}', "twice"),
    "field twice": ('{"a":{"dtype":"F32","dtype":"F32","shape":[1],"data_offsets":[0,4]}}', "twice"),
    "missing field": ('{"a":{"dtype":"F32","shape":[1]}}', "exactly dtype"),
    "NaN as size": ('{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', "no JSON value"),
    "Infinity as size": ('{"a":{"dtype":"F32","shape":[-Infinity],"data_offsets":[0,4]}}', "no JSON value"),
    "fraction as size": (one(shape=[1.0]), "list of sizes"),
    "boolean as size": (one(shape=[True]), "list of sizes"),
    "negative sizes": (one(shape=[-1, -1]), "list of sizes"),
    "minus zero": ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[-0,4]}}', "pair of positions"),
    "minus zero behind white space": (
        '{"a":{"dtype":"F32","shape":[1],"data_offsets":[\t -0,4]}}',
        "pair of positions",
    ),
    "minus zero beside dates": (
        '{"__metadata__":{"day":"2026-01-02"},"a":{"dtype":"F32","shape":[1],"data_offsets":[-0,4]}}',
        "pair of positions",
    ),
    "5,000 digits": ('{"a":{"dtype":"F32","shape":[%s],"data_offsets":[0,4]}}' % ("9" * 5000), "list of sizes"),
    "product wraps to the size": (one(shape=[2**32, 2**32]), "64 bits"),
    "product overflows before a zero": (one(shape=[2**53, 2**53, 0], data_offsets=[0, 0]), "64 bits"),
    "shape too large": (one(shape=[2]), "takes 8 bytes"),
    "one position": (one(data_offsets=[4]), "pair of positions"),
    "positions reversed": (one(shape=[0], data_offsets=[4, 0]), "before they begin"),
    "position beyond the file": (one(shape=[2], data_offsets=[0, 8]), "cut short"),
    "unknown dtype": (one(dtype="F128"), "unknown dtype"),
    "dtype in small letters": (one(dtype="f32"), "unknown dtype"),
    "dtype null": (one(dtype=None), "unknown dtype"),
    "odd count of F4": (one(dtype="F4", shape=[9]), "takes 4.5 bytes"),
    "F6 not filling bytes": (one(dtype="F6_E2M3", shape=[5]), "takes 3.75 bytes"),
    "overlap": (f'{{"a":{ONE},"b":{ONE}}}', "overlap"),
    "gap": (one(shape=[0], data_offsets=[4, 4]), "gap"),
    "trailing bytes": (one(dtype="U8", shape=[1], data_offsets=[0, 1]), "accounts for 1"),
    "junk after the JSON": (f'{{"a":{ONE}}}x', "not JSON"),
    "trailing comma": (f'{{"a":{ONE},}}', "not JSON"),
    "raw control character": (f'{{"a\n":{ONE}}}', "not JSON"),
    "byte order mark": (b'\xef\xbb\xbf{"a":%s}' % ONE.encode(), "start with"),
    "invalid UTF-8": (b'{"a\xff":%s}' % ONE.encode(), "not JSON"),
    "surrogate as UTF-8": (b'{"a\xed\xa0\x80":%s}' % ONE.encode(), "not JSON"),
    "lone surrogate in a name": (f'{{"a\\ud800":{ONE}}}', "not valid Unicode"),
    "lone surrogate in metadata": (f'{{"__metadata__":{{"k":"\\udfff"}},"a":{ONE}}}', "not valid Unicode"),
    "a list": ("[]", "start with"),
    "empty": ("", "start with"),
    "nested 100,000 deep": ('{{"__metadata__":{}{}}}'.format("[" * 100_000, "]" * 100_000), "deep"),
    "entry nested 200 deep": ('{{"a":{}{}}}'.format("[" * 200, "]" * 200), "exactly dtype"),
}
STRICTER = {
    "name twice": (f'{{"a":{ONE},"a":{ONE}}}', "twice"),
    "name twice, once escaped": (f'{{"a":{ONE},"\\u0061":{ONE}}}', "twice"),
    "name twice, white space before a colon": (f'{{"a":{ONE},"a" :{ONE}}}', "twice"),
    "name twice, a colon escaped elsewhere": (
        f'{{"__metadata__":{{"k":"\\u003a\\u003A::"}},"a":{ONE},"a":{ONE}}}',
        "twice",
    ),
    "name with colons twice": (f'{{"a:b":{ONE},"a:b":{ONE}}}', "twice"),
    "metadata key twice, once escaped": (
        f'{{"__metadata__":{{"k:":"1:2","k\\u003a":"2"}},"a":{ONE}}}',
        "twice",
    ),
    "metadata key twice": (f'{{"__metadata__":{{"k":"1","k":"2"}},"a":{ONE}}}', "twice"),
    "unknown field": (one(more=1), "exactly dtype"),
    "entry as a list": ('{"a":["F32",[1],[0,4]]}', "exactly dtype"),
    "dtype as an object": (one(dtype={"F32": None}), "unknown dtype"),
    "white space first": (f' {{"a":{ONE}}}', "start with"),
    "65 dimensions": (one(shape=[1] * 65), "list of sizes"),
}
ACCEPTED = {
    "plain": f'{{"a":{ONE}}}',
    "metadata null (MLX)": f'{{"__metadata__":null,"a":{ONE}}}',
    "metadata": f'{{"__metadata__":{{"k":"v"}},"a":{ONE}}}',
    "colons, dates and constants in metadata": (
        f'{{"__metadata__":{{"a:b":"{{\\"x\\": -0, \\"y\\": NaN}}","day":"2026-01-02","c":"\\u003a"}},"a:b":{ONE}}}'
    ),
    "white space after": f'{{"a":{ONE}}} \n\t',
    "scalar": one(shape=[]),
    "paired surrogates": f'{{"\\ud83d\\ude00":{ONE}}}',
    "name with NUL": f'{{"a\\u0000":{ONE}}}',
    "empty name": f'{{"":{ONE}}}',
    "empty tensors at both ends": json.dumps(
        {"x": files.entry("F32", [0], 0), "a": files.entry("F32", [1], 0), "y": files.entry("F32", [3, 0], 4)}
    ),
    "two F4 in a byte": one(dtype="F4", shape=[8]),
    "unaligned": json.dumps(
        {"x": files.entry("U8", [1], 0), "y": files.entry("I16", [1], 1), "z": files.entry("U8", [1], 3)}
    ),
}


def reference(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    """What safetensors reads from the file, or None where it refuses."""
    try:
        return {
            name: (info["dtype"], tuple(info["shape"]), bytes(info["data"]))
            for name, info in safetensors.deserialize(path.read_bytes())
        }
    except safetensors.SafetensorError:
        return None


def ours(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    said = ""
    try:
        source = open_source(path)
    except AdapterOpsError as error:
        said = str(error)
    if said:
        assert str(path) in said
        assert len(said) < 1000
        return None
    for text in [*source.tensors, *source.metadata, *source.metadata.values()]:
        text.encode()
    return {key: (t.dtype, t.shape, bytes(t.read())) for key, t in source.tensors.items()}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_as_the_reference_does(case: str, tmp_path: Path) -> None:
    header, said = REFUSED[case]
    path = files.write_raw(tmp_path / "x.safetensors", header, b"abcd")
    assert reference(path) is None
    with pytest.raises(InvalidHeader, match=said):
        open_source(path)


@pytest.mark.parametrize("case", STRICTER)
def test_refused_though_the_reference_accepts(case: str, tmp_path: Path) -> None:
    header, said = STRICTER[case]
    path = files.write_raw(tmp_path / "x.safetensors", header, b"abcd")
    assert reference(path) is not None
    with pytest.raises(InvalidHeader, match=said):
        open_source(path)


@pytest.mark.parametrize("case", ACCEPTED)
def test_accepted_as_the_reference_does(case: str, tmp_path: Path) -> None:
    path = files.write_raw(tmp_path / "x.safetensors", ACCEPTED[case], b"abcd")
    assert ours(path) == reference(path) is not None


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 20, 60, 63])
def test_cut_short_anywhere(length: int, tmp_path: Path) -> None:
    path = files.write_raw(tmp_path / "x.safetensors", ACCEPTED["plain"], b"abcd")
    path.write_bytes(path.read_bytes()[:length])
    assert reference(path) is None
    with pytest.raises(UnreadableFile):
        open_source(path)


def test_announced_length_is_not_allocated(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes((2**63).to_bytes(8, "little") + b"{}")
    with pytest.raises(InvalidHeader, match="announce"):
        open_source(path)
    with path.open("wb") as file:
        file.write((container.MAX_HEADER + 1).to_bytes(8, "little") + b"{")
        file.truncate(container.MAX_HEADER + 100)  # sparse: takes no space
    with pytest.raises(InvalidHeader, match="more than 16000000"):
        open_source(path)


def test_a_header_of_millions_of_values_is_not_parsed(tmp_path: Path) -> None:
    path = files.write_raw(tmp_path / "x.safetensors", b'{"a":[' + b"[]," * (container.MAX_VALUES) + b"[]]}")
    with pytest.raises(InvalidHeader, match="values"):
        open_source(path)


def test_a_large_file_may_have_as_many_tensors_as_it_has_room_for(tmp_path: Path) -> None:
    count, size = 89_000, 65_536
    entries = {
        f"m.{n}": {"dtype": "F16", "shape": [8, 4096], "data_offsets": [n * size, (n + 1) * size]} for n in range(count)
    }
    header = json.dumps(entries).encode()
    with (tmp_path / "x.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + count * size)  # sparse: takes no space
    assert len(container.read_header(str(tmp_path / "x.safetensors"))[0]) == count


@pytest.mark.parametrize("field", ["dtype", "shape", "data_offsets"])
def test_messages_hold_no_control_characters(field: str, tmp_path: Path) -> None:
    header = {"a": {**files.entry("F32", [1], 0), field: "\x1b[2J"}}
    with pytest.raises(InvalidHeader, match=field) as caught:
        container.read_header(str(files.write_raw(tmp_path / "a.safetensors", header, bytes(4))))
    assert str(caught.value).isprintable()


def test_long_names_are_shortened_in_messages(tmp_path: Path) -> None:
    path = files.write_raw(tmp_path / "x.safetensors", json.dumps({"n" * 100_000: {}}), b"")
    with pytest.raises(InvalidHeader) as caught:
        open_source(path)
    assert len(str(caught.value)) < 1000


DTYPES = st.sampled_from(["F32", "F16", "BF16", "U8", "F4", "I64", "F8_E4M3", "BOOL", "C64"])


@st.composite
def headers(draw: st.DrawFn) -> tuple[dict[str, Any], bytes]:
    """A sound header with up to four tensors, and its data."""
    header: dict[str, Any] = {}
    position = 0
    for name in draw(st.lists(st.text(max_size=4), max_size=4, unique=True)):
        dtype, shape = draw(DTYPES), draw(st.lists(st.integers(0, 4), max_size=3))
        if dtype == "F4":
            shape = [*shape, 2]
        if name != "__metadata__":
            header[name] = files.entry(dtype, shape, position)
            position = header[name]["data_offsets"][1]
    if draw(st.booleans()):
        header["__metadata__"] = draw(st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=2))
    return header, random.Random(position).randbytes(position)


VALUES = [None, True, 1.0, float("nan"), "F32", "F64", [], [0], [0, 4], [1, 1], {}, {"k": "v"}, "\ud800"]
ODD = st.one_of(
    st.integers(-2, 9), st.integers(2**31 - 1, 2**65), st.sampled_from(VALUES).map(deepcopy)
)  # deepcopy: what is drawn is changed again


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sound=headers(), data=st.data())
def test_same_verdict_and_content_as_the_reference_on_changed_headers(
    sound: tuple[dict[str, Any], bytes], data: st.DataObject, tmp_path: Path
) -> None:
    header, body = sound
    entries = [value for key, value in header.items() if key != "__metadata__"]
    for _ in range(data.draw(st.integers(0, 2), label="changes")):
        if entries:
            fields = data.draw(st.sampled_from(entries))
            name = data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
            if isinstance(fields.get(name), list) and fields[name] and data.draw(st.booleans()):
                fields[name][data.draw(st.integers(0, len(fields[name]) - 1))] = data.draw(ODD)
            else:
                fields[name] = data.draw(ODD)
    text = bytearray(files.dump(header))
    if data.draw(st.booleans(), label="damage the text"):
        at = data.draw(st.integers(0, len(text) - 1))
        text[at : at + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    body += data.draw(st.sampled_from([b"", b"", b"x"]))
    path = files.write_raw(tmp_path / "x.safetensors", bytes(text), body)
    verdict, mine = reference(path), ours(path)
    if mine is None and verdict is not None:
        with pytest.raises(InvalidHeader, match=r"twice|exactly dtype|list of sizes|start with|unknown dtype"):
            open_source(path)
    else:
        assert mine == verdict


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sound=headers())
def test_what_is_written_is_read_alike_by_both(sound: tuple[dict[str, Any], bytes], tmp_path: Path) -> None:
    path = files.write_raw(tmp_path / "x.safetensors", *sound)
    before = open_source(path)
    ordered = container.in_file_order(before.tensors)
    again = tmp_path / "y.safetensors"
    again.write_bytes(container.build_header(ordered, before.metadata) + b"".join(bytes(t.read()) for _, t in ordered))
    assert ours(again) == reference(again) == ours(path)
    assert int.from_bytes(again.read_bytes()[:8], "little") % 8 == 0
    assert dict(open_source(again).metadata) == dict(before.metadata)


def test_the_spelling_of_a_path_does_not_change_the_order() -> None:
    def order(path: str) -> list[str]:
        stored = LazyTensor("w", "F16", (1,), MemorySource(b"ab", path), 0)
        made = LazyTensor("alpha", "F16", (), MemorySource(b"ab"), 0)
        return [key for key, _ in container.in_file_order({"w": stored, "alpha": made})]

    assert order("x.safetensors") == order("/x.safetensors")


@pytest.mark.parametrize(
    ("key", "metadata"), [("\ud800", {}), ("a", {"k": "\ud800"}), ("a", {"\ud800": "v"}), ("__metadata__", {})]
)
def test_no_header_is_built_that_could_not_be_read(key: str, metadata: dict[str, str]) -> None:
    tensor = LazyTensor(key, "U8", (1,), MemorySource(b"a"), 0)
    with pytest.raises(CannotRepresent):
        container.build_header([(key, tensor)], metadata)
