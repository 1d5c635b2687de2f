"""Recipes: read from what people write, written to where machines read them."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from adapterops.errors import NotAnAdapter, UnreadableFile, UsageError
from adapterops.merging import document, recipe
from adapterops.merging.recipe import HEADER_ENTRY, Recipe, Step
from adapterops.merging.registry import METHODS, Space

EXAMPLE = """\
adapterops: 1
steps:
  - name: style
    method: dare_ties
    sources:
      - path: a.safetensors
        weight: 1.0
      - path: b.safetensors
        weight: {default: 0.5, blocks: [1, 0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1], patterns: {"z*": 0, "a*": 1}}
        from: kohya
        arch: sdxl
        alpha: 8
        set: {task_type: CAUSAL_LM, r: 4}
        rename: ["^x=y"]
        allow_drop: true
        hash: sha256:00ff
    density: 0.5
    seed: 7
    patterns:
      "text_encoder*": {method: svd, rank: 32}
      "*.attn2.*": {density: 0.8}
  - method: svd
    rank: 16
    svd: exact
    svd_tolerance: 1e-6
    split: b
    saved: mean
    allow_disjoint: true
    sources: [{step: style, weight: 0.7}, c.safetensors]
output: {to: peft, path: merged, dtype: bfloat16}
"""


def read(text: str, where: str = "r.yaml") -> Recipe:
    return recipe.build(document.parse_yaml(text, where), where)


def one(**keys: Any) -> Step:
    """A recipe's lone step."""
    (step,) = recipe.build({"method": "svd", "sources": ["a", "b"], **keys}, "r.yaml").steps
    return step


def test_a_recipe_says_what_it_says() -> None:
    found = read(EXAMPLE)
    style, last = found.steps
    assert (style.name, style.method, style.space) == ("style", "dare_ties", None)
    assert style.parameters == {"density": 0.5}
    assert style.options == {"seed": 7}
    assert [source.path for source in style.sources] == ["a.safetensors", "b.safetensors"]
    second = style.sources[1]
    assert second.hash == "sha256:00ff"
    assert second.arguments == {
        "format": "kohya", "arch": "sdxl", "alpha": 8.0, "fields": {"task_type": "CAUSAL_LM", "r": 4},
        "rename": ["^x=y"], "allow_drop": True,
    }  # fmt: skip
    assert second.rule.weight("unet", "zebra", None) == 0
    assert second.rule.blocks[1] == 0.5
    assert [(s.path, s.step, s.weight) for s in last.sources] == [("", "style", 0.7), ("c.safetensors", "", 1.0)]
    assert last.options == {
        "rank": 16, "svd": "exact", "svd_tolerance": 1e-6, "split": "b", "saved": "mean", "allow_disjoint": True,
    }  # fmt: skip
    assert found.output == {"to": "peft", "path": "merged", "dtype": "bfloat16"}


def test_a_lone_step_may_stand_at_the_top() -> None:
    short = read("method: ties\nsources: [a, {path: b, weight: -1}]\ndensity: 0.2\noutput: {path: m}")
    assert short == read(
        "adapterops: 1\nsteps: [{method: ties, density: 0.2, sources: [{path: a}, {path: b, weight: -1}]}]\n"
        "output: {path: m}"
    )


@pytest.mark.parametrize("text", [EXAMPLE, "method: ties_svd\ndensity: 1\nspace: delta\nsources: [hf://o/r, a]"])
def test_dumped_and_loaded_it_is_the_same(text: str) -> None:
    found = read(text)
    assert recipe.build(found.dump(), "elsewhere") == found
    assert recipe.build(json.loads(found.to_header()), "elsewhere") == found
    assert read(found.to_yaml()) == found
    assert recipe.build(found.dump(), "elsewhere").to_header() == found.to_header()


def test_the_dump_is_the_same_however_the_keys_are_ordered() -> None:
    turned = recipe.build(_reversed(document.parse_yaml(EXAMPLE, "r.yaml")), "r.yaml")
    assert turned.to_header() == read(EXAMPLE).to_header()
    assert list(turned.dump()) == ["adapterops", "output", "steps"]


def _reversed(data: Any) -> Any:
    if isinstance(data, dict):
        turned = {key: _reversed(value) for key, value in reversed(data.items())}
        if "patterns" in data:  # in which order counts
            turned["patterns"] = data["patterns"]
        return turned
    return [_reversed(item) for item in data] if isinstance(data, list) else data


def test_the_order_of_patterns_survives_sorted_keys() -> None:
    found = read(EXAMPLE)
    sorted_by_others = json.loads(json.dumps(found.dump(), sort_keys=True))
    assert [p.glob for p in recipe.build(sorted_by_others, "r").steps[0].patterns] == ["text_encoder*", "*.attn2.*"]
    weight = recipe.build(sorted_by_others, "r").steps[0].sources[1].rule
    assert [glob for glob, _ in weight.patterns] == ["z*", "a*"]


def test_yaml_is_written_for_people() -> None:
    text = read(EXAMPLE).to_yaml()
    assert text.startswith(
        "adapterops: 1\nsteps:\n- name: style\n  method: dare_ties\n  sources:\n  - path: a.safetensors"
    )
    assert "    text_encoder*:\n      method: svd\n      rank: 32\n" in text


def test_what_is_not_given_is_not_written() -> None:
    assert recipe.build({"method": "svd", "sources": ["a"]}, "r").dump() == {
        "adapterops": 1, "steps": [{"method": "svd", "sources": [{"path": "a"}]}],
    }  # fmt: skip


# From files and headers.


@pytest.mark.parametrize("name", ["r.yaml", "r.yml", "r.txt"])
def test_a_recipe_is_read_from_text(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(EXAMPLE)
    assert recipe.load(tmp_path / name) == read(EXAMPLE)


def test_a_recipe_is_read_from_json(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps(read(EXAMPLE).dump()))
    assert recipe.load(tmp_path / "r.json") == read(EXAMPLE)


def merged(path: Path, header: dict[str, str]) -> Path:
    path.parent.mkdir(exist_ok=True)
    save_file({"a": torch.zeros(1)}, path, metadata=header)
    return path


def pathless() -> Recipe:
    """The example as a header gives it: where to write is not a stranger's to say."""
    example = read(EXAMPLE)
    assert example.output["path"] == "merged"
    return replace(example, output={"to": "peft", "dtype": "bfloat16"})


def test_a_recipe_is_read_from_the_header_of_a_merge(tmp_path: Path) -> None:
    path = merged(tmp_path / "m.safetensors", {HEADER_ENTRY: read(EXAMPLE).to_header(), "format": "pt"})
    assert recipe.load(path) == pathless()


def test_a_recipe_is_read_from_a_folder(tmp_path: Path) -> None:
    header = {HEADER_ENTRY: read(EXAMPLE).to_header()}
    merged(tmp_path / "peft" / "adapter_model.safetensors", header)
    assert recipe.load(tmp_path / "peft") == pathless()
    assert recipe.load(tmp_path / "peft").folder == str(tmp_path / "peft")


def test_a_recipe_is_read_from_a_folder_of_components(tmp_path: Path) -> None:
    for part in ("unet", "text_encoder"):
        merged(tmp_path / part / "adapter_model.safetensors", {HEADER_ENTRY: read(EXAMPLE).to_header()})
    assert recipe.load(tmp_path) == pathless()
    merged(
        tmp_path / "unet" / "adapter_model.safetensors", {HEADER_ENTRY: read("method: svd\nsources: [a]").to_header()}
    )
    with pytest.raises(UsageError, match="its subfolders hold different recipes; name one of them"):
        recipe.load(tmp_path)


def test_files_that_hold_no_recipe_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"m\.safetensors: its header has no adapterops_recipe.*; name a recipe"):
        recipe.load(merged(tmp_path / "m.safetensors", {"format": "pt"}))
    with pytest.raises(UsageError, match=r"n\.safetensors: header entry adapterops_recipe: is no JSON"):
        recipe.load(merged(tmp_path / "n.safetensors", {HEADER_ENTRY: "{"}))
    with pytest.raises(UsageError, match=r"o\.safetensors: header entry adapterops_recipe: step 1: method: unknown"):
        recipe.load(merged(tmp_path / "o.safetensors", {HEADER_ENTRY: '{"method": "none", "sources": ["a"]}'}))
    for lost in ("lost.yaml", "lost.safetensors"):
        with pytest.raises(UnreadableFile, match=rf"lost\.{lost[5:]}: [Nn]o such file"):
            recipe.load(tmp_path / lost)
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotAnAdapter, match="holds no weights"):
        recipe.load(tmp_path / "empty")
    (tmp_path / "a.bin").write_bytes(b"\x80\x02")
    with pytest.raises(UsageError, match=r"a\.bin: is no UTF-8 text"):
        recipe.load(tmp_path / "a.bin")
    (tmp_path / "r.yaml").write_text("method: svd\nsources: &all [a]\npatterns: *all")
    with pytest.raises(UsageError, match=r"r\.yaml: line 2: an alias"):
        recipe.load(tmp_path / "r.yaml")


def test_paths_lead_from_here_or_from_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beside, here = tmp_path / "recipes", tmp_path / "here"
    for folder in (beside, here):
        folder.mkdir()
    (beside / "r.yaml").write_text("method: svd\nsources: [a.safetensors, b.safetensors]")
    (beside / "a.safetensors").touch()
    monkeypatch.chdir(here)
    found = recipe.load(os.path.join("..", "recipes", "r.yaml"))
    assert found.steps[0].sources[0].path == "a.safetensors"
    assert os.path.samefile(found.located("a.safetensors"), beside / "a.safetensors")
    assert found.located("lost.safetensors") == "lost.safetensors"
    assert found.located("hf://owner/repo") == "hf://owner/repo"
    assert found.located(str(beside / "a.safetensors")) == str(beside / "a.safetensors")
    (here / "a.safetensors").touch()
    assert found.located("a.safetensors") == "a.safetensors"


# What holds for a module.


def test_patterns_change_what_a_step_does_to_a_module() -> None:
    style = read(EXAMPLE).steps[0]
    plain, attention = style.for_module("unet", "a.ff.b"), style.for_module("unet", "a.attn2.to_q")
    assert (plain.method, plain.space, plain.rank) == ("dare_ties", Space.FACTORS, None)
    assert plain.parameters == METHODS["dare_ties"].settle({"density": 0.5})
    assert attention == plain._replace(parameters=plain.parameters | {"density": 0.8})
    assert style.for_module("text_encoder_2", "a.attn2.b") == ("svd", Space.DELTA, {}, 32)


def test_the_last_pattern_that_has_a_key_wins_for_it() -> None:
    step = one(
        method="dare_ties", density=0.1, rank=4,
        patterns={"*": {"density": 0.2, "rank": 8}, "b*": {"density": 0.3}, "bc": {"majority_sign": "frequency"}},
    )  # fmt: skip
    found = [step.for_module("unet", name) for name in ("a", "b", "bc")]
    assert [setting.parameters["density"] for setting in found] == [0.2, 0.3, 0.3]
    assert [setting.rank for setting in found] == [8, 8, 8]
    assert [setting.parameters["majority_sign"] for setting in found] == ["total", "total", "frequency"]


def test_a_space_holds_for_the_methods_that_can_act_in_it() -> None:
    step = one(
        method="ties", density=1, space="delta",
        patterns={"a*": {"method": "dare_ties"}, "b*": {"method": "linear"}, "c*": {"space": "factors"},
                  "d*": {"method": "dare_ties", "space": "factors"}, "e*": {"method": "dare_ties_svd"}},
    )  # fmt: skip
    found = {name: step.for_module("unet", name)[:2] for name in "abcdez"}
    assert found == {
        "a": ("dare_ties", Space.DELTA), "b": ("linear", Space.FACTORS), "c": ("ties", Space.FACTORS),
        "d": ("dare_ties", Space.FACTORS), "e": ("dare_ties", Space.DELTA), "z": ("ties", Space.DELTA),
    }  # fmt: skip


def test_a_rank_holds_for_the_methods_that_can_choose_it() -> None:
    step = one(
        method="iso_c", rank=4,
        patterns={"a*": {"method": "cat"}, "b*": {"method": "linear"}, "c*": {"method": "tsv"},
                  "d*": {"method": "cat", "rank": 8}, "e*": {"method": "ties", "density": 1, "space": "delta"}},
    )  # fmt: skip
    found = {name: step.for_module("unet", name).rank for name in "abcdez"}
    assert found == {"a": None, "b": None, "c": 4, "d": 8, "e": 4, "z": 4}
    assert one(method="cat", rank=4).for_module("unet", "a").rank == 4  # which is refused, as it is said of cat


def test_an_alias_says_the_space() -> None:
    assert one(method="ties_svd", density=1).for_module("unet", "a")[:2] == ("ties", Space.DELTA)
    assert one(method="ties", density=1).for_module("unet", "a")[:2] == ("ties", Space.FACTORS)


def test_parameters_of_another_pattern_count() -> None:
    step = one(patterns={"*": {"density": 0.5}, "a": {"method": "ties"}})
    assert step.for_module("unet", "b") == ("svd", Space.DELTA, {}, None)
    assert step.for_module("unet", "a").parameters["density"] == 0.5


def test_what_only_shows_at_a_module_is_refused_there() -> None:
    step = one(patterns={"b": {"density": 0.5}, "a": {"method": "ties"}})
    with pytest.raises(UsageError, match=r"r\.yaml: step 1: unet\.a: .*ties needs --density"):
        step.for_module("unet", "a")
    turned = one(method="ties", density=1, patterns={"*": {"method": "svd"}, "a": {"space": "factors"}})
    with pytest.raises(UsageError, match=r"r\.yaml: step 1: unet\.a: .*svd acts on delta only"):
        turned.for_module("unet", "a")


def test_a_pattern_that_fits_nothing_is_refused() -> None:
    step = one(patterns={"*.attn1.*": {"rank": 1}, "*.atn2.*": {"rank": 2}})
    with pytest.raises(
        UsageError, match=r"r\.yaml: step 1: patterns: the pattern '\*\.atn2\.\*' fits no module; .*attn1"
    ):
        step.check([("unet", "a.attn1.to_q"), ("unet", "a.attn2.to_q")])
    one(patterns={"*.attn1.*": {"rank": 1}}).check([("unet", "a.attn1.to_q")])


# What is refused.

STEP = "{method: svd, sources: [a]}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", ": is no recipe, which is a mapping with steps"),
        ("", ": is no recipe"),
        ("output: {to: peft}", ": holds no steps, nor the method"),
        ("adapterops: 2\nsteps: []", ": adapterops: 2 is no version of recipes that is known here, only 1 is"),
        ("adapterops: true\nsteps: []", ": adapterops: True is no version"),
        ("steps: []", ": steps: must be a list of at least one step"),
        ("steps: {a: b}", ": steps: must be a list"),
        (f"steps: [{STEP}]\nrank: 1", ": unknown key 'rank'; known: adapterops, steps, output"),
        (f"steps: [{STEP}]\noutputs: {{}}", ": unknown key 'outputs'; did you mean output?"),
        ("steps: [1]", ": step 1: must be a mapping with method and sources"),
        (f"steps: [{STEP}, {STEP}]", ": step 1: has no name, so no later step can use its result; give it one"),
        (
            f"steps: [{{name: x, method: svd, sources: [a]}}, {STEP}]",
            r": step 1 \(x\): no later step uses its result; refer to it \(step: x\), or remove it",
        ),
        (
            "steps: [{name: x, method: svd, sources: [a]}, {name: x, method: svd, sources: [{step: x}]}]",
            r": step 2 \(x\): name: an earlier step has the same",
        ),
        (
            "steps: [{name: x, method: svd, sources: [{step: x}]}]",
            "source 1: step: 'x' is no earlier step; none before",
        ),
        (
            "steps: [{name: x, method: svd, sources: [a]}, {method: svd, sources: [a, {step: y}]}]",
            ": step 2: source 2: step: 'y' is no earlier step; those are: x",
        ),
        (f"{{name: ' ', {STEP[1:]}", ": step 1: name: is empty"),
        (f"{{name: 5, {STEP[1:]}", ": step 1: name: 5 is no text; put it in quotes"),
        (f"output: 1\nsteps: [{STEP}]", ": output: must be a mapping of to, path, dtype"),
        (f"output: {{too: x}}\nsteps: [{STEP}]", ": output: unknown key 'too'; did you mean to?"),
        (f"output: {{path: 1}}\nsteps: [{STEP}]", ": output: path: 1 is no text"),
    ],
)
def test_a_recipe_that_is_none_is_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=r"^r\.yaml.*" + message):
        read(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sources: [a]", ": method is missing"),
        ("metod: svd\nsources: [a]", ": method is missing; is 'metod' meant to be it?"),
        ("method: svd", ": sources is missing"),
        ("method: 5\nsources: [a]", ": method: 5 is no text"),
        ("method: svdd\nsources: [a]", ": method: unknown merge method 'svdd'; did you mean svd?"),
        ("method: svd\nspace: factors\nsources: [a]", ": method, space: --method svd acts on delta only"),
        ("method: svd\nspace: spaces\nsources: [a]", ": method, space: .*'spaces' is neither factors nor delta"),
        ("method: svd\nsources: a", ": sources: must be a list of at least one"),
        ("method: svd\nsources: []", ": sources: must be a list of at least one"),
        ("method: svd\nsources: [a]\nrnak: 3", ": unknown key 'rnak'; did you mean rank?"),
        ("method: svd\nsources: [a]\ndensty: 3", ": unknown key 'densty'; did you mean density?"),
        ("method: svd\nsources: [a]\nqqq: 3", ": unknown key 'qqq'; known: name, method, space, sources, rank"),
        ("method: svd\nsources: [a]\ndensity: 1", ": density: the method svd has no such parameter"),
        ("method: ties\nsources: [a]\ndensity: 2", ": density: --density 2.*: must be above 0 and at most 1"),
        ("method: ties\nsources: [a]\ndensity: .nan", ": density: nan is no finite number"),
        ("method: ties\nsources: [a]\ndensity: '1'", ": density: '1' is no number; write it without quotes"),
        (
            "method: ties\nsources: [a]\ndensity: 1\nmajority_sign: all",
            ": majority_sign: .*'all' is none of total, freq",
        ),
        ("method: ties\nsources: [a]", ": --method ties needs --density"),
        ("method: svd\nsources: [a]\nrank: 0", ": rank: --rank 0: must be at least 1"),
        ("method: svd\nsources: [a]\nrank: 1.5", ": rank: --rank 1.5 is no whole number"),
        ("method: svd\nsources: [a]\nrank: true", ": rank: True is no number"),
        ("method: svd\nsources: [a]\nseed: -1", ": seed: --seed -1: must be at least 0"),
        ("method: svd\nsources: [a]\nsvd: fast", ": svd: --svd 'fast' is none of auto, exact"),
        ("method: svd\nsources: [a]\nsvd_tolerance: 0", ": svd_tolerance: .* must be above 0 and at most 1"),
        ("method: svd\nsources: [a]\nsplit: c", ": split: --split 'c' is none of even, b, a"),
        ("method: svd\nsources: [a]\nsaved: [x]", r": saved: --saved \['x'\] is none of refuse, mean, first"),
        ("method: svd\nsources: [a]\nallow_disjoint: 1", ": allow_disjoint: 1 is neither true nor false"),
    ],
)
def test_a_wrong_step_is_refused_by_its_key(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=r"^r\.yaml: step 1" + message):
        read(text)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("1", ": must be a path, or a mapping with path or step"),
        ("{}", ": needs either path or step"),
        ("{path: a, step: b}", ": needs either path or step, not both"),
        ("''", ": path: is empty"),
        ("{path: 5}", ": path: 5 is no text"),
        ('{path: "a\\0"}', ": path: .* has a NUL in it"),
        ("{path: a, wieght: 1}", ": unknown key 'wieght'; did you mean weight?"),
        ("{path: a, weight: x}", ": weight: 'x' is no number"),
        ("{path: a, weight: .inf}", ": weight: inf is no finite number"),
        ("{path: a, weight: {block: []}}", ": weight: unknown key 'block'; did you mean blocks?"),
        ("{path: a, alpha: x}", ": alpha: 'x' is neither a number nor one of tensors, header, config, trained"),
        ("{path: a, alpha: .nan}", ": alpha: nan is no finite number"),
        ("{path: a, from: 1}", ": from: 1 is no text"),
        ("{path: a, set: x}", ": set: must be a mapping of fields"),
        ("{path: a, set: {x: .nan}}", ": set: x: nan is no finite number"),
        ("{path: a, rename: x=y}", ": rename: must be a list of texts, each a PATTERN=REPLACEMENT"),
        ("{path: a, rename: [1]}", ": rename: 1 is no text"),
        ("{path: a, allow_drop: 1}", ": allow_drop: 1 is neither true nor false"),
        ("{path: a, hash: 12}", ": hash: 12 is no text"),
    ],
)
def test_a_wrong_source_is_refused_by_its_key(source: str, message: str) -> None:
    with pytest.raises(UsageError, match=r"^r\.yaml: step 1: source 2" + message):
        read(f"method: svd\nsources: [a, {source}]")


def test_the_result_of_a_step_takes_a_weight_only() -> None:
    text = "steps: [{name: x, method: svd, sources: [a]}, {method: svd, sources: [{step: x, arch: sd1}]}]"
    with pytest.raises(UsageError, match=r"^r\.yaml: step 2: source 1: arch is for files"):
        read(text)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        ("1", ": must be a mapping of patterns"),
        ("{'a*': 1}", r": 'a\*': must be a mapping of what differs there"),
        ("{'a*': {}}", r": 'a\*': must be a mapping of what differs there"),
        ("{'a*': {seed: 1}}", r": 'a\*': seed is for the whole step; a pattern sets method, space, rank, parameters"),
        ("{'a*': {sources: [a]}}", r": 'a\*': sources is for the whole step"),
        ("{'a*': {densty: 1}}", r": 'a\*': unknown key 'densty'; did you mean density?"),
        ("{'a*': {density: 7}}", r": 'a\*': density: --density 7.*: must be above 0"),
        ("{'a*': {rank: 0}}", r": 'a\*': rank: --rank 0: must be at least 1"),
        ("{'a*': {method: tis}}", r": 'a\*': method: unknown merge method 'tis'; did you mean ties"),
        ("{'a*': {method: [x]}}", r": 'a\*': method: \['x'\] is no text"),
        ("{'a*': {method: svd, density: 1}}", r": 'a\*': density: the method svd has no such parameter, nor any other"),
        ("{'a*': {method: svd, space: factors}}", r": 'a\*': method, space: --method svd acts on delta only"),
        ("{'a*': {space: nowhere}}", r": 'a\*': method, space: --space 'nowhere' is neither"),
        ("[[a, {rank: 1}], [a, {rank: 2}]]", ": the key 'a' stands twice"),
    ],
)
def test_a_wrong_pattern_is_refused(patterns: str, message: str) -> None:
    with pytest.raises(UsageError, match=r"^r\.yaml: step 1: patterns" + message):
        read(f"method: ties\ndensity: 1\nsources: [a]\npatterns: {patterns}")


def test_a_method_of_a_pattern_needs_its_parameters_and_its_number_of_sources() -> None:
    with pytest.raises(UsageError, match=r"^r\.yaml: step 1: --method ties needs --density"):
        one(patterns={"a": {"method": "ties"}})
    with pytest.raises(
        UsageError, match=r"^r\.yaml: step 1: sources: the method slerp takes 2 adapters, and here are 3"
    ):
        one(sources=["a", "b", "c"], patterns={"a": {"method": "slerp"}})
    assert one(patterns={"a": {"method": "slerp"}}).for_module("unet", "a").method == "slerp"


@pytest.mark.parametrize("seed", [0, 2**31 + 1, 2**53 - 1])
def test_a_seed_is_kept_to_the_last_digit(seed: int) -> None:
    found = read(f"method: svd\nsources: [a]\nseed: {seed}")
    assert found.steps[0].options["seed"] == seed
    assert f'"seed":{seed},' in found.to_header()


def test_data_that_no_json_can_hold_is_refused() -> None:
    with pytest.raises(UsageError, match=r"r: step 1: source 1: set: x: .* is no number"):
        recipe.build({"method": "svd", "sources": [{"path": "a", "set": {"x": object()}}]}, "r")
