"""`adapterops merge --recipe` and `--print-recipe` beside other options."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from outcome import Outcome
from safetensors.numpy import load_file
from small_adapters import pair, peft

Command = Callable[..., Outcome]
PLAIN = "method: svd\nsources: [a, b]\n"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with two PEFT folders and a recipe in it."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("ab"):
        peft(tmp_path / name, pair(seed))
    (tmp_path / "r.yaml").write_text(PLAIN)
    return tmp_path


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("--alpha 3", "alpha"),
        ("--rename x=y", "rename"),
        ("--allow-drop", "allow_drop"),
        ("--set lora_dropout=0.1", "set"),
        ("--base config.json --layout published", "base, layout"),
        ("--weights 1,2 --seed 3 --from peft", "weights, seed, from"),
    ],
)
def test_a_recipe_says_how_its_sources_are_read(more: str, said: str, command: Command, here: Path) -> None:
    outcome = command("merge", "--recipe", "r.yaml", "-o", "out", *more.split())
    assert outcome.code == 2
    assert f"--recipe says it all; {said} would contradict it" in outcome.err
    assert not Path("out").exists()


def test_a_printed_recipe_makes_what_the_command_makes(command: Command, here: Path) -> None:
    asked = [
        "merge",
        "a",
        "b",
        "--method",
        "cat",
        "--weights",
        "0.5,2",
        "--to",
        "peft",
        "--dtype",
        "float16",
        "--fold-alpha",
    ]
    assert command(*asked, "-o", "out").code == 0
    printed = command(*asked, "-o", "again", "--print-recipe")
    assert printed.code == 0
    assert not Path("again").exists()
    Path("again.yaml").write_text(printed.out)
    assert command("merge", "--recipe", "again.yaml").code == 0
    # The header's recipe is not compared: the printed one has no hashes.
    one, two = (load_file(f"{name}/adapter_model.safetensors") for name in ("out", "again"))
    assert {key: (t.dtype, t.tobytes()) for key, t in one.items()} == {
        k: (t.dtype, t.tobytes()) for k, t in two.items()
    }
    assert Path("out/adapter_config.json").read_text() == Path("again/adapter_config.json").read_text()


def test_what_goes_before_the_output_of_a_recipe_is_printed(command: Command, here: Path) -> None:
    Path("r.yaml").write_text(PLAIN + "output: {dtype: float16, to: peft}\n")
    printed = command("merge", "--recipe", "r.yaml", "--dtype", "float32", "--print-recipe")
    assert "output:\n  to: peft\n  dtype: float32\n" in printed.out
    assert "output" not in command("merge", "a", "b", "--method", "svd", "--print-recipe").out


@pytest.mark.parametrize("where", ["current", "beside"])
def test_of_two_files_of_a_source_s_name_the_one_of_the_recipe_is_taken(
    where: str, command: Command, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recipe names its sources by paths that may lead to another file in the current folder."""
    assert command("merge", "a", "b", "--method", "svd", "-o", "out").code == 0
    other = here / "other"
    for seed, name in enumerate("ab"):
        peft(other / name, pair(seed + 7 * (name == "b")))
    if where == "current":
        monkeypatch.chdir(other)
    recipe = here / "out"
    if where == "beside":
        (here / "out").rename(other / "out")
        recipe = other / "out"
    outcome = command("merge", "--recipe", recipe, "-o", "again")
    assert outcome.code == 0, outcome
    wanted = load_file(recipe / "adapter_model.safetensors")
    for key, tensor in load_file(Path.cwd() / "again" / "adapter_model.safetensors").items():
        assert tensor.tobytes() == wanted[key].tobytes()
    printed = command("merge", "--recipe", "again", "--print-recipe")
    assert command("merge", "--recipe", "again", "-o", "third").code == 0
    assert "path: a\n" in printed.out
    assert ("path: b\n" in printed.out) is (where == "beside")


def test_a_source_that_no_file_of_its_name_is(command: Command, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert command("merge", "a", "b", "--method", "svd", "-o", "out").code == 0
    other = here / "other"
    for seed, name in enumerate("ab"):
        peft(other / name, pair(seed + 7))
        peft(here / name, pair(seed + 9))
    monkeypatch.chdir(other)
    outcome = command("merge", "--recipe", here / "out", "-o", "again")
    assert outcome.code == 2
    assert "a is not what the recipe was run with" in outcome.err
    assert not (other / "again").exists()
