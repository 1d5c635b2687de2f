"""`adapterops merge` and `adapterops methods --merge` on sound input: what they print, and where the output stands."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from outcome import Outcome
from small_adapters import DOTTED, Q, added, close, deltas, file, lora, pair, peft, weights_of

import adapterops.merging.methods  # noqa: F401  (fills the table)
from adapterops.merging.registry import ALIASES, METHODS

Command = Callable[..., Outcome]
AB = ("a.safetensors", "b.safetensors")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with two Kohya files and two PEFT folders in it."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("ab"):
        file(tmp_path / f"{name}.safetensors", lora(seed))
        peft(tmp_path / name, {**pair(seed), **pair(seed + 10, "l.1.q")}, 3)
    return tmp_path


def done(command: Command, *arguments: object) -> Outcome:
    outcome = command("merge", *arguments)
    assert outcome.code == 0, outcome
    assert outcome.err == ""
    return outcome


def test_help_has_examples_every_method_and_parameter(command: Command) -> None:
    outcome = command("merge", "--help")
    assert outcome.code == 0
    text = " ".join(outcome.out.split())
    for name in (*METHODS, *ALIASES):
        assert re.search(rf"\b{name}\b", text), name
    for parameter in {p.option for method in METHODS.values() for p in method.parameters}:
        assert f"{parameter} " in text, parameter
    assert text.count("adapterops merge ") >= 4
    assert "which is not" in text  # the weighted sum: of linear


def test_the_examples_of_the_help_are_commands(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every example parses: it fails on its files, if at all, and not on its options."""
    monkeypatch.chdir(tmp_path)
    lines = re.findall(r"^\s+adapterops (merge .*)$", command("merge", "--help").out, re.MULTILINE)
    assert len(lines) >= 4
    for line in lines:
        outcome = command(*line.split())
        assert outcome.code == 2
        assert re.search(r"no such file|--device cuda", outcome.err, re.IGNORECASE), (line, outcome.err)
        assert "Usage:" not in outcome.err


def test_what_is_printed(command: Command, here: Path) -> None:
    text = done(command, *AB, "--method", "svd", "--weights", "0.7,0.3", "--rank", 8, "-o", "out.safetensors").out
    assert text.startswith("out.safetensors: svd, kohya (sd1), 1 module, 3 tensors, ")
    assert re.search(r"× 0.7 +a.safetensors\n +× 0.3 +b.safetensors\n", text)
    assert "proved: read back, it holds what was computed, bit for bit" in text
    assert "exact up to rounding" in text
    assert "weights are 1 each" not in text


def test_what_a_low_rank_loses_is_said(command: Command, here: Path) -> None:
    text = done(command, *AB, "--method", "svd", "--rank", 2).out
    assert "a larger --rank keeps more; --method cat keeps all, at rank 8" in text
    lost = re.search(r"(\S+)% in the worst\s+\(unet: (\S+), rank 2, .* = (\S+)\)", text)
    assert lost
    assert lost[2] == DOTTED[Q]
    wanted = deltas(here / "a.safetensors")[Q] + deltas(here / "b.safetensors")[Q]
    missing = wanted - deltas(here / "merged.safetensors")[Q]
    error = float(((missing**2).sum() / (wanted**2).sum()) ** 0.5)
    assert float(lost[3]) == pytest.approx(error, abs=0.006)  # two digits are printed
    assert float(lost[1]) / 100 == pytest.approx(1 - error**2, abs=1e-3)


def test_cat_is_not_advised_where_it_cannot_be(command: Command, here: Path) -> None:
    """Of what TIES makes no stacking of factors is the whole."""
    text = done(command, *AB, "--method", "ties_svd", "--density", 0.5, "--rank", 2).out
    assert "a larger --rank keeps more" in text
    assert "--method cat" not in text


def test_every_step_tells_what_it_loses(command: Command, here: Path) -> None:
    (here / "r.yaml").write_text(
        "steps: [{name: first, method: ties_svd, density: 0.3, rank: 1, sources: [a.safetensors, b.safetensors]}, "
        "{method: svd, rank: 8, sources: [{step: first}]}]"
    )
    text = done(command, "--recipe", "r.yaml").out
    assert re.search(r"step first: lossy: .*\n", text)
    assert "\n  exact up to rounding" in text
    found = json.loads(done(command, "--recipe", "r.yaml", "-o", "again.safetensors", "--json").out)
    ((step,),) = [[s for s in found["steps"] if s["name"] == "first"]]
    assert step["modules"][0]["error"] > 0.1


def test_a_recipe_is_printed(command: Command, here: Path) -> None:
    done(command, *AB, "--method", "svd", "--weights", "0.7,0.3", "-o", "out.safetensors")
    text = done(command, "--recipe", "out.safetensors", "--print-recipe").out
    (here / "r.yaml").write_text(text)
    done(command, "--recipe", "r.yaml", "-o", "again.safetensors")
    assert (here / "again.safetensors").read_bytes() == (here / "out.safetensors").read_bytes()


def test_inspect_says_what_it_was_merged_from(command: Command, here: Path) -> None:
    done(command, *AB, "--method", "svd", "--weights", "0.7,0.3", "-o", "out.safetensors")
    text = command("inspect", "out.safetensors").out
    assert "merged        svd of a.safetensors × 0.7, b.safetensors × 0.3 (merge --recipe makes it again)" in text


def test_what_the_target_cannot_hold_is_dropped_only_if_told(command: Command, here: Path) -> None:
    fixtures = Path(__file__).parents[2] / "fixtures" / "lycoris-sd15"
    sources = [fixtures / "kohya-locon-norm.safetensors", fixtures / "kohya-locon.safetensors"]
    options = ["--method", "svd", "--base", fixtures, "--layout", "published", "--to", "peft", "-o", "out"]
    refused = command("merge", *sources, *options)
    assert refused.code == 2
    assert not (here / "out").exists()
    text = done(command, *sources, *options, "--allow-drop").out
    assert "dropped: text_encoder: text_model.final_layer_norm: PEFT has no place for it" in text


def test_one_adapter_twice_is_said(command: Command, here: Path) -> None:
    text = done(command, "a.safetensors", "a.safetensors", "--method", "svd").out
    assert "a.safetensors and a.safetensors hold the same adapter" in text


def test_verbose_lists_every_module(command: Command, here: Path) -> None:
    text = done(command, "a", "b", "--method", "ties_svd", "--density", 0.5, "-v").out
    (head,) = [line for line in text.splitlines() if line.startswith("module ")]
    assert head.split() == ["module", "method", "rank", "energy", "kept", "error"]
    for module in ("l.0.q", "l.1.q"):
        (row,) = [line for line in text.splitlines() if line.startswith(f"model: {module} ")]
        assert re.search(r" ties +4 +\d+\.\d% +\d\.\de-\d\d$", row), row
    assert "model: l.0.q  " not in done(command, "a", "b", "--method", "svd", "-o", "quiet").out


def test_json_is_one_document(command: Command, here: Path) -> None:
    found = json.loads(done(command, *AB, "--method", "dare_ties_svd", "--density", 0.5, "--seed", 3, "--json").out)
    assert found.keys() == {
        "sources", "output", "files", "to", "architecture", "modules", "steps", "tensors", "bytes", "proof", "recipe", "dropped",
        "notes", "seconds",
    }  # fmt: skip
    assert found["sources"] == list(AB)
    assert (found["output"], found["to"], found["architecture"]) == ("merged.safetensors", "kohya", "sd1")
    assert found["bytes"] > 0
    assert found["tensors"] == 3
    (module,) = found["modules"]
    assert module.keys() == {
        "component", "module", "method", "rank", "exact_rank", "kept", "error", "excess", "cancels", "empty",
    }  # fmt: skip
    assert (module["component"], module["module"]) == ("unet", DOTTED[Q])
    assert (module["method"], module["rank"]) == ("dare_ties", 4)
    assert 0 < module["kept"] < 1
    assert module["error"] ** 2 == pytest.approx(1 - module["kept"], rel=1e-3)
    assert found["proof"]["modules"] == 1
    (step,) = found["recipe"]["steps"]
    assert (step["method"], step["density"], step["seed"]) == ("dare_ties_svd", 0.5, 3)


def test_json_of_factors_claims_no_error(command: Command, here: Path) -> None:
    (module,) = json.loads(done(command, *AB, "--method", "linear", "--json").out)["modules"]
    assert module["error"] is None
    assert module["kept"] is None


@pytest.mark.parametrize(
    "method", ["svd", "cat", "linear", "magnitude_prune --density 0.5", "dare_linear --density 0.5"]
)
def test_weights_that_are_one_by_default_are_said(method: str, command: Command, here: Path) -> None:
    for number, (weights, said) in enumerate(
        (([], True), (["--weights", "1,1"], False), (["--weights", "0.5,0.5"], False))
    ):
        text = done(command, *AB, "--method", *method.split(), *weights, "-o", f"{number}.safetensors").out
        assert ("weights are 1 each" in text) is said
        assert ("--weights 0.5,0.5 takes the mean" in text) is said


@pytest.mark.parametrize("method", ["ties --density 0.5", "slerp", "karcher", "subtract"])
def test_where_nothing_adds_up_weights_are_not_spoken_of(method: str, command: Command, here: Path) -> None:
    assert "weights are 1 each" not in done(command, *AB, "--method", *method.split()).out


@pytest.mark.parametrize(
    ("method", "options", "notes"),
    [
        ("linear", "--split b --svd exact", ["--svd, --split change nothing: linear keeps the factors"]),
        (
            "cat",
            "--svd-tolerance 0.1 --seed 1",
            ["--svd-tolerance changes nothing: cat", "--seed changes nothing: cat"],
        ),
        (
            "ties --density 0.5 --space delta --rank 2",
            "--split b --svd exact --seed 0",
            ["--seed changes nothing: ties"],
        ),
        ("knots --density 0.5 --inner dare_ties", "--split b --seed 1", []),
        ("knots --density 0.5", "--seed 1", ["--seed changes nothing: knots"]),
        ("dare_linear --density 0.5", "--seed 1", []),
    ],
)
def test_options_that_change_nothing_are_told_of(
    method: str, options: str, notes: list[str], command: Command, here: Path
) -> None:
    text = done(command, *AB, "--method", *method.split(), *options.split()).out
    assert text.count("nothing: ") == len(notes)
    for note in notes:
        assert note in text


def test_an_empty_name_says_which(command: Command, here: Path) -> None:
    outcome = command("merge", "a", "", "--method", "svd")
    assert outcome.code == 2
    assert "adapter 2 of 2 has an empty name" in outcome.err


def test_linear_says_what_it_is_not(command: Command, here: Path) -> None:
    text = done(command, *AB, "--method", "linear").out
    assert "not the sum of the adapters' effects" in text
    assert "svd and cat" in text
    one, two = (deltas(here / name)[Q] for name in AB)
    assert not close(deltas(here / "merged.safetensors")[Q], one + two, 0.1)


def test_default_outputs(command: Command, here: Path) -> None:
    done(command, *AB, "--method", "svd")
    assert (here / "merged.safetensors").is_file()
    done(command, "a", "b", "--method", "svd")
    assert {p.name for p in (here / "merged").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    done(command, *AB, "--method", "svd", "-o", "sub/new")
    assert len(list((here / "sub" / "new").glob("*.safetensors"))) == 1


def test_another_format(command: Command, here: Path) -> None:
    done(command, *AB, "--method", "cat", "--to", "peft")
    wanted = added(deltas(here / name)[Q] for name in AB)
    assert close(deltas(here / "merged")[DOTTED[Q]], wanted)
    done(command, *AB, "--method", "cat", "--to", "diffusers", "-o", "d.safetensors")
    assert close(deltas(here / "d.safetensors")[f"unet.{DOTTED[Q]}"], wanted)
    done(command, *AB, "--method", "cat", "--to", "kohya", "--fold-alpha", "-o", "f.safetensors")
    assert close(deltas(here / "f.safetensors")[Q], wanted)


def test_a_recipe_on_the_command_line(command: Command, here: Path) -> None:
    (here / "r.yaml").write_text("{method: cat, sources: [{path: a, weight: 0.5}, b], output: {path: made}}")
    assert done(command, "--recipe", "r.yaml").out.startswith("made: cat, peft")
    assert (here / "made" / "adapter_config.json").is_file()
    done(command, "--recipe", "made", "-o", "again")
    assert weights_of(here / "again").read_bytes() == weights_of(here / "made").read_bytes()


def test_overwrite_and_no_verify(command: Command, here: Path) -> None:
    (here / "out.safetensors").write_text("old")
    text = done(command, *AB, "--method", "svd", "-o", "out.safetensors", "--overwrite", "--no-verify").out
    assert "not proved" in text
    assert Q in deltas(here / "out.safetensors")


def test_adapters_that_cancel_are_told(command: Command, here: Path) -> None:
    file(here / "b.safetensors", lora(0))
    text = done(command, *AB, "--method", "subtract", "--rank", 4).out
    assert "cancels" in text


def test_methods_are_explained(command: Command) -> None:
    outcome = command("methods", "--merge")
    assert outcome.code == 0
    for method in METHODS.values():
        assert method.summary in outcome.out
        assert method.source in outcome.out
        for parameter in method.parameters:
            assert parameter.help in outcome.out
    found = {entry["method"]: entry for entry in json.loads(command("methods", "--merge", "--json").out)}
    assert found.keys() == METHODS.keys()
    assert found["ties"]["aliases"] == ["ties_svd"]
    assert found["ties"]["spaces"] == ["factors", "delta"]
    assert found["slerp"]["adapters"] == 2
    (density,) = [p for p in found["dare_ties"]["parameters"] if p["name"] == "density"]
    assert density["default"] is None
    assert density["range"] == "above 0 and at most 1"


def test_the_methods_of_adaptation_are_another_list(command: Command) -> None:
    names = {name for entry in json.loads(command("methods", "--json").out) for name in entry["methods"]}
    assert "lora" in names
    assert not names & METHODS.keys()
