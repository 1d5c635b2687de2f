"""How names begin, told by the lines of the files, against the files parsed."""

from __future__ import annotations

import pytest

from adapterops.architectures import beginnings_of, load, names, parts_of
from adapterops.architectures.beginnings import ANYTHING, beginnings, lines, parts

COMPONENTS = [(name, component) for name in names() for component in load(name).components]


@pytest.mark.parametrize(("name", "component"), COMPONENTS)
@pytest.mark.parametrize("column", ["canonical", "original"])
def test_lines_tell_what_the_parsed_file_tells(name: str, component: str, column: str) -> None:
    architecture = load(name)
    told = beginnings_of(architecture, component, column)
    parsed = architecture.components[component]
    assert told == (ANYTHING if parsed.optional_prefix else parsed.stems[column])
    every = [*parsed.modules.values(), *parsed.fused.values(), *parsed.parameters.values()]
    spelled = [spec.name if column == "canonical" else spec.original for spec in every]
    assert all(name.startswith(tuple(told)) for name in spelled if name)
    between = {part for name in spelled for part in name.split(".") if part and not part.isdigit()}
    # Some rows are for other numbers than the config's.
    assert between <= (parts_of(architecture, component, column) or between)


def test_what_stands_between_dots_is_told_of_most() -> None:
    """Few take a word from a list of the config's."""
    columns = ("canonical", "original")
    untold = {
        n for n, c in COMPONENTS if c == "transformer" for column in columns if parts_of(load(n), c, column) is None
    }
    assert untold == {"anima", "chroma", "cosmos_predict2_14b"}


def test_a_files_lines() -> None:
    text = """
include = ["one", "two"]
[templates]
# canonical names without quotes are none
block = [
  { for = { p = ["q", "k"] }, canonical = "to_{p}", original = "", linear = [1, 1] },
  { canonical = "", original = "mid.x", use = "inner", with = { in = 2 } },
]
inner = [
  { canonical = "proj.0", linear = [1, 1] },
]

[components.unet]
class = "some.Class"
rows = [{ canonical = "", use = "block" }, { canonical = "end.norm", norm = [1] }]

[components.unet.config]
size = 1

[components.text_encoder]
of = "other"

[components.text_encoder_2]
optional_prefix = "text_model."
rows = [
  { canonical = "first", use = "inner" },
]
"""
    found = lines(text)
    assert found.include == ("one", "two")
    assert dict(found.of) == {"text_encoder": "other"}
    assert found.prefixed == {"text_encoder_2"}
    rows = found.components["unet"]
    assert beginnings(rows, found.templates.__getitem__, False) == {"to_", "proj", "end"}
    assert beginnings(rows, found.templates.__getitem__, True) == {"mid", "end"}
    assert beginnings(found.components["text_encoder_2"], found.templates.__getitem__, True) == {"first"}
    assert parts(rows, found.templates.__getitem__, False) == {"to_q", "to_k", "proj", "end", "norm"}
    assert parts(rows, found.templates.__getitem__, True) == {"mid", "x", "proj", "end", "norm"}


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ('{ for = { i = "layers", p = ["a.0", "b"] }, canonical = "x.{i}.{p}.{i+1}" }', {"x", "a", "b"}),
        ('{ for = { n = [1, 2] }, canonical = "norm{n}" }', {"norm1", "norm2"}),
        ('{ for = { i = "layers" }, canonical = "norm{i}" }', None),
    ],
)
def test_what_loops_make_of_a_name(row: str, told: set[str] | None) -> None:
    found = lines(f"[components.unet]\nrows = [\n  {row},\n]\n")
    assert parts(found.components["unet"], found.templates.__getitem__, False) == told
