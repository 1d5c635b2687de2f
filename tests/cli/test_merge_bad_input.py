"""Merges that cannot be: one message (file or module, remedy), exit status 2, no traceback, nothing written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from outcome import Outcome
from small_adapters import OUT, Numbers, Q, Tensors, file, lora, pair, peft

Command = Callable[..., Outcome]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with two adapters for SD 1 (`a`, `b`), a third one (`c`) and a LoHa in it."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate("abc"):
        file(tmp_path / f"{name}.safetensors", lora(seed))
    n = Numbers(9)
    shapes = {"w1_a": (320, 2), "w1_b": (2, 320), "w2_a": (320, 2), "w2_b": (2, 320)}
    file(
        tmp_path / "loha.safetensors",
        {f"{Q}.hada_{r}": n(*s) for r, s in shapes.items()},
        {f"{Q}.alpha": torch.tensor(1.0)},
    )
    return tmp_path


def refused(command: Command, here: Path, arguments: str | list[object], *words: str) -> None:
    """The command fails with one message that holds the words, and leaves the folder as it was."""
    before = tree(here)
    listed = arguments.split() if isinstance(arguments, str) else arguments
    outcome = command("merge", *listed)
    assert outcome.code == 2, outcome
    assert outcome.out == ""
    message = " ".join(outcome.err.replace("\n│", " ").split())
    assert "Traceback" not in message
    assert "fault of adapterops" not in message
    assert message.lower().count("error: ") == 1, message
    for word in words:
        assert word.lower() in message.lower(), (word, message)
    assert tree(here) == before


AB = "a.safetensors b.safetensors"
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "no method": (AB, ("--method", "svd", "adapterops methods --merge")),
    "no sources": ("--method svd", ("name the adapters", "--recipe")),
    "unknown method": (f"{AB} --method dare_tie", ("'dare_tie'", "did you mean dare_ties?")),
    "a method like no other": (f"{AB} --method zzz", ("'zzz'", "known:", "ties")),
    "a method's space": (f"{AB} --method linear --space delta", ("--method linear acts on factors only", "--method svd")),
    "an alias' space": (f"{AB} --method ties_svd --density 0.5 --space factors", ("--method ties_svd", "use --method ties")),
    "one weight": (f"{AB} --method svd --weights 1", ("--weights 1", "one weight for 2 adapters")),
    "three weights": (f"{AB} --method svd --weights 1,2,3", ("3 weights for 2 adapters",)),
    "weight NaN": (f"{AB} --method svd --weights 1,nan", ("--weights 1,nan",)),
    "weight infinite": (f"{AB} --method svd --weights inf,1", ("--weights inf,1",)),
    "weight no number": (f"{AB} --method svd --weights 1,x", ("'x' is no number",)),
    "weights file missing": (f"{AB} --method svd --weights w.yaml", ("w.yaml", "no such file")),
    "density missing": (f"{AB} --method ties", ("--method ties needs --density", "the share of entries to keep")),
    "density 0": (f"{AB} --method ties --density 0", ("--density 0", "above 0 and at most 1")),
    "density 1.5": (f"{AB} --method ties --density 1.5", ("--density 1.5", "above 0 and at most 1")),
    "density -0.5": (f"{AB} --method dare_ties --density -0.5", ("--density -0.5", "above 0 and at most 1")),
    "density NaN": (f"{AB} --method ties --density nan", ("--density", "nan")),
    "parameter of others": (f"{AB} --method svd --density 0.5", ("--method svd has no --density",)),
    "another parameter of others": (f"{AB} --method ties --density 0.5 --gamma 0.1", ("ties has no --gamma", "--density")),
    "density and gamma": (f"{AB} --method breadcrumbs --density 0.9 --gamma 0.2", ("density", "gamma")),
    "rank 0": (f"{AB} --method svd --rank 0", ("--rank 0", "at least 1")),
    "rank -1": (f"{AB} --method svd --rank -1", ("--rank -1", "at least 1")),
    "a rank that linear cannot give": (f"{AB} --method linear --rank 8", ("attn1.to_q", "4, and not 8", "--method svd")),
    "a rank that ties on factors cannot give": (f"{AB} --method ties --density 0.5 --rank 8", ("4, and not 8", "--space delta")),
    "a rank that cat cannot give": (f"{AB} --method cat --rank 4", ("the sum of the ranks, 8", "--method svd --rank 4")),
    "tolerance 0": (f"{AB} --method svd --svd-tolerance 0", ("--svd-tolerance 0", "above 0")),
    "seed -1": (f"{AB} --method dare_ties --density 0.5 --seed -1", ("--seed -1", "at least 0")),
    "slerp of three": (f"{AB} c.safetensors --method slerp", ("slerp", "2 adapters", "3")),
    "factors of a LoHa": ("a.safetensors loha.safetensors --method linear", ("loha.safetensors", "attn1.to_q", "--method svd")),
    "LoHa trimmed": ("a.safetensors loha.safetensors --method ties --density 0.5", ("loha.safetensors", "--space delta")),
    "recipe missing": ("--recipe no.yaml", ("no.yaml", "no such file")),
    "recipe of no merge": ("--recipe a.safetensors", ("a.safetensors", "no adapterops_recipe")),
    "source missing": ("a.safetensors no.safetensors --method svd", ("no.safetensors", "no such file")),
    "base weights missing": (f"{AB} --method svd --base-weights no", ("no", "no such file")),
    "unknown format": (f"{AB} --method svd --to kohja", ("kohja", "kohya")),
    "unknown dtype": (f"{AB} --method svd --dtype float12", ("float12",)),
    "unknown device": (f"{AB} --method svd --device quantum", ("--device 'quantum'", "cpu")),
    "blocks of another base": (f"{AB} --method svd --weights blocks.yaml", ("blocks.yaml: entry 1", "12", "17")),
    "a pattern that fits nothing": (f"{AB} --method svd --weights pattern.yaml", ("pattern.yaml: entry 2", "text_encoder*")),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_refused(case: str, command: Command, here: Path) -> None:
    (here / "blocks.yaml").write_text(f"- {{blocks: {[1] * 12}}}\n- 1\n")
    (here / "pattern.yaml").write_text('- 1\n- {patterns: {"text_encoder*": 0}}\n')
    arguments, words = CASES[case]
    refused(command, here, arguments, *words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:3"])
def test_a_device_that_is_not_there(device: str, command: Command, here: Path) -> None:
    refused(command, here, f"{AB} --method svd --device {device}", f"--device {device}", "--device cpu")


def test_bases_of_two_families(command: Command, here: Path) -> None:
    stem = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    file(
        here / "xl.safetensors",
        lora(1, stem, sizes=(640, 640)),
        lora(2, "lora_te2_text_model_encoder_layers_0_mlp_fc1", sizes=(5120, 1280)),
    )
    refused(
        command, here, "a.safetensors xl.safetensors --method svd", "xl.safetensors", "sdxl", "a.safetensors", "sd1"
    )


def test_shapes_of_two_bases(command: Command, here: Path) -> None:
    """Llama's and another model's q_proj: the same names, other sizes."""
    peft(here / "p", pair(1, "model.layers.0.self_attn.q_proj", sizes=(32, 32)))
    peft(here / "q", pair(2, "model.layers.0.self_attn.q_proj", sizes=(64, 48)))
    refused(
        command,
        here,
        "p q --method svd",
        "model.layers.0.self_attn.q_proj",
        "[64, 48]",
        "[32, 32]",
        "different base models",
    )


def test_modules_that_nobody_shares(command: Command, here: Path) -> None:
    peft(here / "llama", pair(1, "model.layers.0.self_attn.q_proj"))
    peft(here / "gpt2", pair(2, "transformer.h.0.attn.c_attn"))
    refused(command, here, "llama gpt2 --method svd", "llama", "none of its 1 modules", "--allow-disjoint")
    outcome = command("merge", "llama", "gpt2", "--method", "svd", "--allow-disjoint", "-o", "out")
    assert outcome.code == 0, outcome
    assert (here / "out" / "adapter_model.safetensors").is_file()


def poisoned(tensors: Tensors, role: str, value: float = float("nan")) -> Tensors:
    key = next(k for k in tensors if role in k)
    values = tensors[key].clone()
    values.reshape(-1)[1] = value
    return {**tensors, key: values}


LOKR: Tensors = {f"{Q}.lokr_w1": torch.ones(4, 4), f"{Q}.lokr_w2": torch.ones(80, 80), f"{Q}.alpha": torch.tensor(1.0)}
BROKEN: dict[str, Tensors] = {
    "lora": poisoned(lora(5), "lora_up"),
    "lora, infinite": poisoned(lora(5), "lora_down", float("inf")),
    "lokr": poisoned(LOKR, "lokr_w2"),
    "diff": poisoned({f"{Q}.diff": torch.ones(320, 320)}, "diff"),
    "bias": {**lora(5), **poisoned({f"{OUT}.diff_b": torch.ones(320)}, "diff_b")},
    "norm": {**lora(5), **poisoned({f"{Q.replace('attn1_to_q', 'norm1')}.w_norm": torch.ones(320)}, "w_norm")},
    "embedding": {**lora(5), **poisoned({"bundle_emb.cat.emb_params": torch.ones(2, 768)}, "emb_params")},
}


@pytest.mark.parametrize(
    ("case", "method"),
    [
        (case, method)
        for case in BROKEN
        for method in ("svd", "dare_ties_svd --density 0.5", "linear", "cat")
        if case not in ("lokr", "diff") or method not in ("linear", "cat")  # which take no such update at all
    ],
)
def test_numbers_that_are_none(case: str, method: str, command: Command, here: Path) -> None:
    """NaN and infinity in any tensor, before anything is made of them."""
    file(here / "broken.safetensors", BROKEN[case])
    rank = "" if method == "linear" else " --rank 8"
    refused(
        command,
        here,
        f"a.safetensors broken.safetensors --method {method}{rank}",
        "broken.safetensors",
        "NaN or infinity",
    )


def test_a_saved_head_that_is_no_number(command: Command, here: Path) -> None:
    head = torch.ones(3, 12)
    head[0, 0] = float("nan")
    peft(here / "p", {**pair(1), "head.weight": head}, modules_to_save=["head"])
    peft(here / "q", pair(2))
    refused(command, here, "p q --method svd", "head.weight", "NaN or infinity")


def test_alpha_zero(command: Command, here: Path) -> None:
    file(here / "zero.safetensors", lora(5, alpha=0.0))
    refused(
        command,
        here,
        "a.safetensors zero.safetensors --method svd",
        "zero.safetensors",
        "attn1.to_q",
        "scale",
        "0",
        "--alpha",
    )


def test_alpha_that_two_sources_state(command: Command, here: Path) -> None:
    file(here / "two.safetensors", lora(5, alpha=2.0), metadata={"ss_network_alpha": "16.0"})
    refused(
        command, here, "a.safetensors two.safetensors --method svd", "two.safetensors", "two alphas", "--alpha tensors"
    )


def test_alpha_that_nothing_states(command: Command, here: Path) -> None:
    file(here / "bare" / "adapter_model.safetensors", {f"base_model.model.{k}": t for k, t in pair(1).items()})
    peft(here / "p", pair(2))
    refused(command, here, "p bare --method svd", "bare", "alpha", "--alpha X")


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_of_a_changed_base(init: str, command: Command, here: Path) -> None:
    peft(here / "p", pair(1), init_lora_weights=init)
    peft(here / "q", pair(2))
    refused(command, here, "q p --method svd", "p", init, "changed the base weights")


@pytest.mark.parametrize(
    "more",
    ["--method svd", "--weights 1,1", "--density 0.5", "--rank 4", "--space delta", "--allow-disjoint", "--seed 1"],
)
def test_a_recipe_says_it_all(more: str, command: Command, here: Path) -> None:
    (here / "r.yaml").write_text("{method: svd, sources: [a.safetensors, b.safetensors]}")
    refused(
        command,
        here,
        f"--recipe r.yaml {more} -o out.safetensors",
        "--recipe",
        more.split()[0].strip("-").replace("-", "_"),
    )


def test_a_recipe_and_sources(command: Command, here: Path) -> None:
    (here / "r.yaml").write_text("{method: svd, sources: [a.safetensors, b.safetensors]}")
    refused(command, here, "a.safetensors --recipe r.yaml", "--recipe", "sources")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("method: svd\nsources: [", ("is no YAML",)),
        ("method: svd\nsources: [a.safetensors]\nranc: 4", ("ranc", "rank")),
        ("method: ties\nsources: [a.safetensors, b.safetensors]", ("--density",)),
        ("method: svd\nsources: [{path: a.safetensors, weight: x}]", ("source 1", "weight")),
        ("adapterops: 2\nmethod: svd\nsources: [a.safetensors]", ("adapterops", "1")),
    ],
)
def test_a_recipe_that_is_wrong(text: str, words: tuple[str, ...], command: Command, here: Path) -> None:
    (here / "r.yaml").write_text(text)
    refused(command, here, "--recipe r.yaml", "r.yaml", *words)


def test_an_output_that_is_there(command: Command, here: Path) -> None:
    refused(command, here, f"{AB} --method svd -o c.safetensors", "c.safetensors", "--overwrite")
    (here / "merged.safetensors").write_text("mine")
    refused(command, here, f"{AB} --method svd", "merged.safetensors", "--overwrite")


@pytest.mark.parametrize("name", ["b.safetensors", "./b.safetensors", "sub/../b.safetensors", "to-b.safetensors"])
def test_an_output_that_is_a_source(name: str, command: Command, here: Path) -> None:
    """Sources are never modified, whatever name they are called by."""
    (here / "sub").mkdir()
    (here / "to-b.safetensors").symlink_to("b.safetensors")
    arguments = f"a.safetensors {name if name.startswith('to') else 'b.safetensors'} --method svd -o"
    refused(command, here, f"{arguments} {name}", "b.safetensors", "--overwrite")
    refused(
        command, here, f"{arguments} {'b.safetensors' if name.startswith('to') else name} --overwrite", "b.safetensors"
    )


def test_an_output_that_is_a_source_folder(command: Command, here: Path) -> None:
    for seed, name in enumerate("pq"):
        peft(here / name, pair(seed))
    refused(command, here, "p q --method svd -o p --overwrite", "p")
    (here / "r.yaml").write_text("{method: svd, sources: [p, q], output: {path: q}}")
    refused(command, here, "--recipe r.yaml --overwrite", "q")


def test_an_output_inside_of_a_file(command: Command, here: Path) -> None:
    refused(command, here, f"{AB} --method svd -o a.safetensors/x.safetensors", "a.safetensors")


def test_numbers_that_the_output_cannot_hold(command: Command, here: Path) -> None:
    for name in ("p", "q"):
        file(here / f"{name}.safetensors", {k: t * (1 if "alpha" in k else 1e5) for k, t in lora(4).items()})
    for method in ("svd --split b", "linear", "cat --weights 1,0.5"):
        refused(
            command,
            here,
            f"p.safetensors q.safetensors --dtype float16 --method {method}",
            "attn1.to_q",
            "F16",
            "--dtype float32",
        )


def test_numbers_that_float32_cannot_hold(command: Command, here: Path) -> None:
    refused(command, here, "a.safetensors --method svd --weights 1e300", "attn1.to_q", "--dtype float64")


def test_a_saved_head_that_the_output_cannot_hold(command: Command, here: Path) -> None:
    for seed, name in enumerate("pq"):
        peft(here / name, {**pair(seed), "head.weight": torch.full((3, 12), 1e6)}, modules_to_save=["head"])
    refused(command, here, "p q --method svd --dtype float16", "head", "F16", "--dtype float32")


def test_a_bias_that_the_output_cannot_hold(command: Command, here: Path) -> None:
    for name in ("p", "q"):
        file(here / f"{name}.safetensors", lora(4), {f"{OUT}.diff_b": torch.full((320,), 6e4)})
    refused(
        command, here, "p.safetensors q.safetensors --dtype float16 --method svd", "attn1.to_out.0", "--dtype float32"
    )


@pytest.mark.parametrize("length", [0, 5, 100, -20])
def test_a_second_source_that_is_cut_short(length: int, command: Command, here: Path) -> None:
    content = (here / "b.safetensors").read_bytes()
    (here / "short.safetensors").write_bytes(content[:length])
    refused(command, here, "a.safetensors short.safetensors --method svd", "short.safetensors")


def test_a_second_source_that_is_no_adapter(command: Command, here: Path) -> None:
    (here / "text.safetensors").write_text("Not Found")
    refused(command, here, "a.safetensors text.safetensors --method svd", "text.safetensors")


def test_matrices_too_large_to_be_decomposed_side_by_side(
    command: Command, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("p", "q"):
        file(here / f"{name}.safetensors", {f"{Q}.diff": torch.ones(320, 320)})
    monkeypatch.setattr("adapterops.merging.matrices.MOST_DIRECTIONS", 319)
    words = ("p.safetensors", "attn1.to_q", "320 × 320", "to-lora", "tsv")
    refused(command, here, "p.safetensors q.safetensors --method knots --density 0.5", *words)


def test_what_the_target_cannot_hold(command: Command, here: Path) -> None:
    """A norm's difference has no place in a PEFT folder: the writer says so, and nothing is left."""
    stem = Q.replace("attn1_to_q", "norm1")
    for name in ("p", "q"):
        file(here / f"{name}.safetensors", lora(3), {f"{stem}.w_norm": Numbers(3)(320)})
    refused(command, here, "p.safetensors q.safetensors --method svd --to peft -o out", "norm1", "--to kohya")


def test_magnitudes_that_a_config_cannot_say(command: Command, here: Path) -> None:
    """peft's use_dora is for all modules: --to kohya holds them by module, --base-weights folds them."""
    peft(here / "p", {**pair(1), "l.0.q.lora_magnitude_vector": torch.ones(12)}, use_dora=True)
    peft(here / "q", pair(2, "l.1.q"))
    refused(command, here, "p q --method svd --allow-disjoint", "l.0.q", "use_dora", "--base-weights")


def test_a_kernel_of_another_size(command: Command, here: Path) -> None:
    for name, kernel in (("p", 3), ("q", 1)):
        n = Numbers(kernel)
        peft(here / name, {"conv.lora_A.weight": n(4, 6, kernel, kernel), "conv.lora_B.weight": n(8, 4, 1, 1)})
    refused(command, here, "p q --method svd", "conv", "[8, 6, 1, 1]", "[8, 6, 3, 3]")


def test_errors_are_json_where_that_is_asked(command: Command, here: Path) -> None:
    before = tree(here)
    for arguments, kind in (
        (f"{AB} --method ties --json", "UsageError"),
        (f"{AB} --method svd --rank x --json", "UsageError"),
        ("a.safetensors no.safetensors --method svd --json", "UnreadableFile"),
        ("a.safetensors loha.safetensors --method linear --json", "UsageError"),
    ):
        outcome = command("merge", *arguments.split())
        assert outcome.code == 2
        error = json.loads(outcome.out)["error"]
        assert error["kind"] == kind
        assert error["message"] in " ".join(outcome.err.split()) or kind == "UsageError"
    assert tree(here) == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX signals")
@pytest.mark.parametrize(
    ("moment", "output"), [("computing", "out.safetensors"), ("writing", "new/folder/out.safetensors")]
)
def test_interrupted_midway_nothing_is_left(moment: str, output: str, here: Path) -> None:
    """SIGINT while modules are merged, and while the output is being written."""
    code = f"""
        import time, sys
        import adapterops.merging.run as run
        from adapterops.storage import output
        def stop(*a, **k):
            print("ready", flush=True)
            time.sleep(60)
        if {moment!r} == "computing":
            compute = run._compute
            def first(*a):
                compute(*a)
                print("ready", flush=True)
                time.sleep(0.5)
            run._compute = first
        else:
            output.Staged.commit = stop
        from adapterops.cli.main import run as cli
        cli({["merge", *AB.split(), "--method", "svd", "-o", output]!r})
    """
    before = tree(here)
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=30)
    assert child.returncode == 130, errors
    assert "nothing was written" in errors
    assert "Traceback" not in errors
    assert tree(here) == before
    assert sorted(p.name for p in here.iterdir()) == sorted(Path(name).name for name in before)
