"""Weights on the command line and in files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from adapterops.architectures import load
from adapterops.errors import UnreadableFile, UsageError
from adapterops.merging import document, weights
from adapterops.merging.weights import WeightRule

SD1_ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"  # IN01
SD1_IN03 = "down_blocks.0.downsamplers.0.conv"
TEXT = ("text_encoder", "text_model.encoder.layers.0.self_attn.q_proj")


def rule(data: Any) -> WeightRule:
    return weights.entry(data, "w.yaml: entry 1")


def written(folder: Path, text: str, name: str = "weights.yaml") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def test_numbers_are_one_an_adapter() -> None:
    rules = weights.parse("1,0.5, -0.2,0,1e-3", 5)
    assert [r.weight("unet", "any", None) for r in rules] == [1.0, 0.5, -0.2, 0.0, 1e-3]


def test_one_number_is_for_one_adapter_even_where_a_file_is_called_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path, "- 7", "1")
    monkeypatch.chdir(tmp_path)
    assert weights.parse("1", 1) == (WeightRule(1.0),)


@pytest.mark.parametrize("name", ["weights.yaml", "weights.YML", "weights.json", "weights.txt"])
def test_a_file_has_an_entry_an_adapter(tmp_path: Path, name: str) -> None:
    path = written(tmp_path, '[1, {"default": 0.5, "patterns": {"*.attn2.*": -0.25}}]', name)
    first, second = weights.parse(path, 2)
    assert (first.weight("unet", "a.attn2.b", None), first.weight("unet", "b", None)) == (1.0, 1.0)
    assert (second.weight("unet", "a.attn2.b", None), second.weight("unet", "b", None)) == (-0.25, 0.5)


def test_the_last_pattern_that_fits_wins_by_component_or_by_name() -> None:
    told = rule({"patterns": {"*": 0.1, "unet.*": 0.2, "down.*": 0.3, "mid": 0.4, "text_encoder*": 0.5}})
    names = [("prior", "x"), ("unet", "up"), ("unet", "down.1"), ("unet", "mid"), ("text_encoder_2", "mid")]
    assert [told.weight(*name, None) for name in names] == [0.1, 0.2, 0.3, 0.4, 0.5]
    turned = rule({"patterns": {"text_encoder*": 0.5, "mid": 0.4, "down.*": 0.3, "unet.*": 0.2, "*": 0.1}})
    assert {turned.weight(*name, None) for name in names} == {0.1}


def test_patterns_go_before_blocks_and_blocks_before_the_default() -> None:
    sd1 = load("sd1")
    told = rule({"default": 9, "blocks": list(range(17)), "patterns": {"*.attn1.*": -1}})
    assert told.weight("unet", SD1_ATTENTION, sd1) == -1
    assert told.weight("unet", SD1_ATTENTION.replace("attn1", "attn2"), sd1) == 1  # IN01 is the second value
    assert told.weight(*TEXT, sd1) == 0  # BASE is the first
    assert told.weight("unet", "mid_block.resnets.0.conv1", sd1) == 7
    assert told.weight("unet", "up_blocks.3.attentions.2.proj_in", sd1) == 16
    assert told.weight("unet", SD1_IN03, sd1) == 9
    assert told.weight("unet", "conv_out", sd1) == 9


def test_a_block_without_a_value_keeps_the_whole_weight_as_in_sd_scripts() -> None:
    assert rule({"blocks": [0.0] * 17}).weight("unet", SD1_IN03, load("sd1")) == 1.0
    assert rule({"blocks": [0.0] * 26}).weight("unet", SD1_IN03, load("sd1")) == 0.0


def test_flux_has_weights_for_two_kinds_of_blocks_and_a_base() -> None:
    flux = load("flux")
    told = rule({"default": 9, "double": [n / 10 for n in range(19)], "single": 0.5, "base": -1})
    assert told.weight("transformer", "transformer_blocks.18.attn.to_q", flux) == 1.8
    assert told.weight("transformer", "transformer_blocks.18.attn.to_qkv", flux) == 1.8
    assert told.weight("transformer", "single_transformer_blocks.37.attn.to_qkv_mlp", flux) == 0.5
    assert told.weight("transformer", "proj_out", flux) == -1
    assert told.weight("transformer", "norm_out.linear", flux) == -1
    assert told.weight(*TEXT, flux) == -1
    some = rule({"default": 9, "double": 2})
    assert some.weight("transformer", "single_transformer_blocks.0.proj_out", flux) == 9
    assert some.weight("transformer", "proj_out", flux) == 9


def test_base_alone_is_for_the_text_encoders() -> None:
    told = rule({"base": 0})
    assert (told.weight(*TEXT, load("sdxl")), told.weight("unet", "conv_in", load("sdxl"))) == (0, 1)


@pytest.mark.parametrize(
    "data",
    [
        0.5,
        1,
        {"default": 0.25},
        {"blocks": [1] * 12},
        {"default": 2, "base": 0, "double": [1] * 19, "single": 0.5},
        {"patterns": {"z*": 1, "a*": 0}},
    ],
)
def test_a_rule_as_data_is_the_rule(data: Any) -> None:
    told = rule(data)
    assert rule(json.loads(json.dumps(told.data(), sort_keys=True))) == told
    assert weights.entry(told.data(), "elsewhere") == told


def test_a_checked_rule_fits_its_adapter() -> None:
    modules = [("unet", SD1_ATTENTION), TEXT]
    rule({"blocks": [1] * 17, "patterns": {"*.attn1.*": 0}}).check(modules, load("sd1"))
    rule({"double": [1] * 19, "single": [1] * 38}).check([("transformer", "proj_out")], load("flux"))
    rule(1).check([], None)


@pytest.mark.parametrize(
    ("data", "arch", "message"),
    [
        (
            {"patterns": {"*.atn1.*": 0}},
            "sd1",
            r"entry 1: patterns: the pattern '\*\.atn1\.\*' fits no module; .*attn1",
        ),
        ({"blocks": [1] * 12}, "sd1", r"entry 1: blocks: 12 values fit no list.*17 values.*26 values"),
        ({"double": 1}, "sd1", "entry 1: sd1/sd2 has no double blocks; it takes blocks with 17 values"),
        ({"blocks": [1] * 17}, None, "entry 1: .*--arch NAME or --base CONFIG"),
        ({"base": 1}, "sd3", "entry 1: no blocks are known for sd3"),
    ],
)
def test_a_rule_that_does_not_fit_is_refused(data: Any, arch: str | None, message: str) -> None:
    with pytest.raises(UsageError, match=r"w\.yaml: " + message):
        rule(data).check([("unet", SD1_ATTENTION)], load(arch) if arch else None)


@pytest.mark.parametrize("count", [18, 20])
def test_as_many_weights_as_blocks(count: int) -> None:
    flux = load("flux")
    told = rule({"double": [1] * count})
    with pytest.raises(UsageError, match=f"entry 1: double has {count} values and the base model 19 such blocks"):
        told.check([("transformer", "proj_out")], flux)
    if count < 19:
        with pytest.raises(UsageError, match="double has 18 values"):
            told.weight("transformer", "transformer_blocks.18.attn.to_q", flux)


def test_blocks_on_flux_name_what_works() -> None:
    with pytest.raises(UsageError, match="20 values fit no list of blocks of flux; it takes double, single and base"):
        rule({"blocks": [1] * 20}).check([("transformer", "proj_out")], load("flux"))


def test_an_unknown_module_has_no_block() -> None:
    with pytest.raises(UsageError, match=r"w\.yaml: entry 1: unet has no module 'nowhere'"):
        rule({"blocks": [1] * 17}).check([("unet", "nowhere")], load("sd1"))


@pytest.mark.parametrize(
    ("value", "count", "message"),
    [
        ("1,2", 3, "--weights 1,2: 2 weights for 3 adapters; give one for each"),
        ("1", 2, "--weights 1: one weight for 2 adapters"),
        ("1,nan", 2, "--weights 1,nan: nan is no finite number"),
        ("inf,1", 2, "--weights inf,1: inf is no finite number"),
        ("1,,2", 3, "--weights 1,,2: '' is no number; give one number an adapter"),
        ("1,x", 2, "--weights 1,x: 'x' is no number"),
        ("heavy", 2, "--weights heavy: is no number, nor a file that is there"),
        ("", 1, "--weights : is no number, nor a file"),
    ],
)
def test_text_that_is_no_weights_is_refused(value: str, count: int, message: str) -> None:
    with pytest.raises(UsageError, match=f"^{message}"):
        weights.parse(value, count)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1", ": one entry for 2 adapters"),
        ("{a: 1}", ": must be a list with one entry an adapter"),
        ("", ": must be a list"),
        ("[1, .nan]", ": entry 2: nan is no finite number"),
        ("[1, -.inf]", ": entry 2: -inf is no finite number"),
        ("[1, 1" + "0" * 400 + "]", ": entry 2: 1000.* is no finite number"),
        ("[1, true]", ": entry 2: True is no number"),
        ("[1, null]", ": entry 2: None is no number"),
        ("[1, '0.5']", ": entry 2: '0.5' is no number; write it without quotes"),
        ("[1, a.safetensors]", ": entry 2: 'a.safetensors' is no number"),
        ("[1, {}]", ": entry 2: says nothing; give a number, or some of default, blocks"),
        ("[1, {defaults: 1}]", ": entry 2: unknown key 'defaults'; did you mean default?"),
        ("[1, {zzz: 1}]", ": entry 2: unknown key 'zzz'; known: default, blocks, base, double, single, patterns"),
        ("[1, {default: x}]", ": entry 2: default: 'x' is no number"),
        ("[1, {base: []}]", r": entry 2: base: \[\] is no number"),
        ("[1, {blocks: 1}]", ": entry 2: blocks: must be a list of numbers, one a block"),
        ("[1, {blocks: []}]", ": entry 2: blocks: must be a list"),
        ("[1, {blocks: [1, x]}]", ": entry 2: blocks: value 2: 'x' is no number"),
        ("[1, {double: [1, .inf]}]", ": entry 2: double: value 2: inf is no finite number"),
        ("[1, {single: x}]", ": entry 2: single: 'x' is no number"),
        ("[1, {blocks: [1], base: 1}]", ": entry 2: has both blocks and base.*; keep one of them"),
        ("[1, {patterns: 1}]", ": entry 2: patterns: must be a mapping of patterns"),
        ("[1, {patterns: {'a*': x}}]", r": entry 2: patterns: 'a\*': 'x' is no number"),
        ("[1, {patterns: [1]}]", ": entry 2: patterns: a list here must hold pairs"),
        ("[1, {patterns: [[a, 1], [a, 2]]}]", ": entry 2: patterns: the key 'a' stands twice"),
        ("[1, {patterns: [['', 1]]}]", ": entry 2: patterns: is empty"),
    ],
)
def test_a_wrong_file_is_refused_by_its_entry(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=rf"weights\.yaml{message}"):
        weights.parse(written(tmp_path, text), 2)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(UnreadableFile, match=r"lost\.yaml: No such file"):
        weights.parse("lost.yaml", 2)


# What documents may hold.


@pytest.mark.parametrize(
    ("text", "data"),
    [
        ("a: 1e-3\nb: 1.5E3\nc: -2\nd: .5\ne: +1e+2", {"a": 1e-3, "b": 1500.0, "c": -2, "d": 0.5, "e": 100.0}),
        ("a: true\nb: False\nc: ~\nd:", {"a": True, "b": False, "c": None, "d": None}),
        ("a: '010'\nb: \"yes\"\nc: hf://owner/repo@main\nd: *".replace("*", "'*'"), {
            "a": "010", "b": "yes", "c": "hf://owner/repo@main", "d": "*"
        }),
        ("# nothing", None),
        ("&name a: [1, {b: c}]", {"a": [1, {"b": "c"}]}),
    ],
)  # fmt: skip
def test_yaml_is_plain_data(text: str, data: Any) -> None:
    assert document.parse_yaml(text, "f") == data


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &x [1]\nb: *x", r"f: line 1: an alias \(\*name\) stands for this elsewhere, .*; write it out there"),
        ("a: 1\na: 2", "f: line 2: the key 'a' stands twice"),
        ("1: 2", "f: line 1: the key 1 is no text; put it in quotes"),
        ("a: on", "f: line 1: 'on' is read as bool by some readers .*; write true or false, or put it in quotes"),
        ("a: 010", "f: line 1: '010' is read as int by some readers"),
        ("a: 1:30", "f: line 1: '1:30' is read as int by some readers"),
        ("a: 1_000", "f: line 1: '1_000' is read as int by some readers"),
        (
            "a: 2024-01-01",
            "f: line 1: '2024-01-01' is read as timestamp by some readers .*; put it in quotes if it is text",
        ),
        ("a: !!python/object/apply:os.system [ls]", "f: line 1: the tag .*os.system is not taken here"),
        ("a: !!set {b}", "f: line 1: the tag .*set is not taken here"),
        ("a: !!binary aGk=", "f: line 1: the tag .*binary is not taken here"),
        ("<<: {a: 1}", "f: line 1: '<<' is read as merge by some readers"),
        ("a: [1", "f: is no YAML: .*line 1"),
        ("--- 1\n--- 2", "f: is no YAML: expected a single document"),
        ("a: \0", "f: is no YAML: unacceptable character"),
        ("[" * 40 + "]" * 40, "f: line 1: nested too deeply"),
        ("[" * 5000 + "]" * 5000, "f: is no YAML: maximum recursion"),
        ("a: 1" + "0" * 5000, r"f: line 1: 1000\d*… has too many digits"),
    ],
)
def test_yaml_that_is_more_than_plain_data_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        document.parse_yaml(text, "f")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', "f: the key 'a' stands twice"),
        ("{", "f: is no JSON: .*line 1"),
        ("[" * 100_000, "f: is no JSON: "),
    ],
)
def test_json_that_is_no_sound_data_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        document.parse_json(text, "f")


@pytest.mark.parametrize(
    "data",
    [
        {"path": "1e-3", "b": "yes", "c": "010", "d": "2024-01-01", "e": "null", "f": "", "g": "*.a", "h": "a: b # c"},
        {"x": 1e-06, "y": 5e-324, "z": 1e300, "i": -7, "t": True, "n": None, "u": "\u0085 \u2028 \U0001f600 ä"},
        [[1.0, 1.0], [1.0, 1.0]],
    ],
)
def test_what_is_written_as_yaml_reads_as_the_same(data: Any) -> None:
    assert document.parse_yaml(document.to_yaml(data), "f") == data


def test_yaml_is_written_without_aliases() -> None:
    shared = [1]
    assert document.parse_yaml(document.to_yaml({"a": shared, "b": shared}), "f") == {"a": [1], "b": [1]}


def test_a_text_file_is_small_and_utf8(tmp_path: Path) -> None:
    long = tmp_path / "long.yaml"
    long.write_bytes(b"#" * (document.MAX_BYTES + 1))
    with pytest.raises(UsageError, match=r"long\.yaml: has 1,000,001 bytes; a text of at most 1,000,000"):
        document.read(str(long))
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"a: \xff")
    with pytest.raises(UsageError, match=r"binary\.yaml: is no UTF-8 text \(byte 3\)"):
        document.read(str(binary))
    marked = tmp_path / "marked.yaml"
    marked.write_bytes(b"\xef\xbb\xbf- 1")
    assert document.read(str(marked)) == [1]
    with pytest.raises(UnreadableFile, match="is a folder"):
        document.read(str(tmp_path))


def test_nothing_heavy_is_imported() -> None:
    program = (
        "import sys, adapterops.merging.weights, adapterops.merging.recipe as r; "
        "print(sorted({'torch', 'numpy', 'yaml', 'huggingface_hub'} & set(sys.modules)))"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("weights:\n- 1\n- 2\n", "take the line weights: away"),
        ("- {single: {'0-18': 0}}\n- 1\n", "entry 1: single: must be a number for all of these blocks, or a list"),
        ("- 1\n", "one entry for 2 adapters"),
    ],
)
def test_what_a_weights_file_is_not(content: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "w.yaml"
    path.write_text(content)
    with pytest.raises(UsageError) as caught:
        weights.parse(str(path), 2)
    assert words in str(caught.value)
    assert str(caught.value).startswith(str(path))
