"""The machinery of `scripts/bench merge`, with tiny adapters: workloads, checks, both sides' merges, tables.  No timing."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

pytest.importorskip("peft")
sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from benchmarks import (
    merge,
    merge_check,
    merge_jobs,
    merge_modules,
    merge_ours,
    merge_peft,
    merge_workloads,
)
from benchmarks.check import WrongOutput
from benchmarks.merge_jobs import INSIDE, PEER, PEER_INSIDE, Merge, MergeSample, Peaks
from benchmarks.merge_modules import Accuracy, Case
from benchmarks.merge_report import Outcome, estimate, report
from benchmarks.samples import Sample

import adapterops as ao
from adapterops.linalg.trimming import Cut

SHAPE, RANK = (48, 80), 4
FACTORS = ("linear", "cat", "ties", "dare_ties")
METHODS = (*FACTORS, "svd", *merge_check.DENSE)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("merge")


@pytest.fixture(scope="module")
def tiny(place: Path) -> list[Path]:
    return merge_workloads.alike(place, SHAPE, 2, 3, RANK)


def _merge(method: str, sources: list[Path], rank: int | None = None) -> Merge:
    return Merge(method, tuple(sources), tuple(merge_check.modules(sources[0])), rank)


def test_the_adapters_are_llama_3_8b_s_and_the_same_every_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert merge_workloads.LLAMA["mlp.down_proj"] == (4096, 14336)
    assert sum(map(sum, merge_workloads.LLAMA.values())) * 16 == 1_310_720
    few = {name: (rows // 64, columns // 64) for name, (rows, columns) in merge_workloads.LLAMA.items()}
    monkeypatch.setattr(merge_workloads, "LLAMA", few)
    one, two = merge_workloads.llama(tmp_path / "a", 2, 2)
    tensors = load_file(one / "adapter_model.safetensors")
    assert len(tensors) == 2 * 7 * 2
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    assert tensors["base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"].shape == (16, 224)
    again, _ = merge_workloads.llama(tmp_path / "b", 2, 2)
    assert (again / "adapter_model.safetensors").read_bytes() == (one / "adapter_model.safetensors").read_bytes()
    other = load_file(two / "adapter_model.safetensors")
    assert all(not torch.equal(other[key], value) for key, value in tensors.items())


def test_adapters_share_most_of_their_factors() -> None:
    (b0, a0), (b1, a1) = (merge_workloads.factors("x", (4096, 2048), 8, number) for number in (0, 1))
    for one, two in ((a0, a1), (b0[:, 0], b1[:, 0])):
        assert float(torch.nn.functional.cosine_similarity(one.reshape(-1), two.reshape(-1), 0)) == pytest.approx(
            0.6, abs=0.05
        )
    assert float(b0[:, 7].norm() / b0[:, 0].norm()) == pytest.approx(8**-0.7, rel=0.1)


def test_files_of_sdxl_have_its_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = merge_workloads.SDXL.modules()[::200]

    class Few:
        lora = merge_workloads.SDXL.lora

        @staticmethod
        def modules() -> object:
            return few

    monkeypatch.setattr(merge_workloads, "SDXL", Few)
    one, two = merge_workloads.sdxl(tmp_path, 2)
    assert merge_check.modules(one) == sorted(module.key for module in few)
    merges = merge_jobs.sdxl(tmp_path)
    assert [(m.rank, len(m.sources), m.output("out")) for m in merges] == [
        (32, 2, "out.safetensors"),
        (8, 1, "out.safetensors"),
    ]
    assert one.read_bytes() != two.read_bytes()
    for job in merges:
        out = tmp_path / "out.safetensors"
        merge_ours.run(job.task(out, peer=False))
        merge_check.check(job.sources, out, job.method, merge_check.modules(one))


@pytest.mark.parametrize("method", METHODS)
def test_ours_is_what_is_expected_and_anything_else_is_not_timed(method: str, tiny: list[Path], tmp_path: Path) -> None:
    job, out = _merge(method, tiny), tmp_path / "out"
    assert set(merge_ours.run(job.task(out, peer=False))) == {"read", "compute", "write"}
    merge_check.check(tiny, out, method, job.names)
    path = out / "adapter_model.safetensors"
    right = load_file(path)
    for spoil in (_doubled, _turned, _nothing):
        wrong = {key: value.clone() for key, value in right.items()}
        spoil(wrong)
        save_file(wrong, path)
        with pytest.raises(WrongOutput):
            merge_check.check(tiny, out, method, job.names)
    save_file({key: value for key, value in right.items() if "layers.0" in key}, path)
    with pytest.raises(WrongOutput, match="does not adapt the 2 modules"):
        merge_check.check(tiny, out, method, job.names)


def _doubled(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.layers.1.proj.lora_A.weight"] *= 1.1


def _turned(tensors: dict[str, torch.Tensor]) -> None:
    key = "base_model.model.layers.0.proj.lora_B.weight"
    tensors[key] = tensors[key].flip(0)


def _nothing(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.layers.1.proj.lora_B.weight"].fill_(float("nan"))


def test_a_scale_that_comes_twice_is_not_timed(tiny: list[Path], tmp_path: Path) -> None:
    job, out = _merge("linear", tiny), tmp_path / "out"
    merge_ours.run(job.task(out, peer=False))
    config = json.loads((out / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 2 * config["r"]}))
    with pytest.raises(WrongOutput, match="the scale 2"):
        merge_check.check(tiny, out, "linear", job.names)


@pytest.mark.parametrize("method", METHODS)
def test_the_peer_does_the_same(method: str, tiny: list[Path], tmp_path: Path) -> None:
    job = _merge(method, tiny)
    seconds = merge_peft.run(job.task(tmp_path, peer=True))
    assert set(seconds) == {"read", "compute", "write"}
    if "dare" in method:
        # Its masks are its own: what the check is for, with ours, it cannot be held to.
        assert merge_check.modules(tmp_path / "merged") == merge_check.modules(tiny[0])
    merge_check.check(tiny, tmp_path / "merged", method, job.names if "dare" not in method else (), ours=False)


def test_the_peer_s_base_model_holds_nothing(tiny: list[Path]) -> None:
    model = merge_peft.base(str(tiny[0]))
    weights = dict(model.named_parameters())
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == {
        "layers.0.proj.weight": SHAPE,
        "layers.1.proj.weight": SHAPE,
    }
    assert all(weight.untyped_storage().nbytes() == 2 for weight in weights.values())


def test_modules_are_merged_as_often_as_asked(tiny: list[Path]) -> None:
    task = {"method": "svd", "sources": [str(path) for path in tiny], "repeat": 2}
    assert len(merge_ours.run(task)["each"]) == 2
    assert len(merge_peft.run({**task, "full_matrices": False})["each"]) == 2


def test_a_round_is_of_processes_and_of_merges_inside_one(tiny: list[Path], tmp_path: Path) -> None:
    job, told = _merge("svd", tiny), []
    work = tmp_path / "work"
    work.mkdir()
    taken = merge_jobs.run([job], work, 1, told.append)
    assert set(taken) == {job.name, job.name + INSIDE}
    (whole,), (inside,) = taken.values()
    assert whole.peak > 0
    assert isinstance(inside, MergeSample)
    assert inside.wall == sum(part or 0 for part in (inside.read, inside.compute, inside.write))
    assert told == ["round 1 of 1: svd, 3 adapters"]
    assert [path.name for path in work.iterdir()] == ["out"]


def test_the_command_line_says_what_the_task_says(tiny: list[Path]) -> None:
    command = _merge("dare_ties_svd", tiny, 8).command(Path("out"), "--workers", "1")
    assert command[-12:] == ["--method", "dare_ties_svd", "--density", "0.2", "--rank", "8", "-o", "out", "--overwrite",
                             "--json", "--workers", "1"]  # fmt: skip
    assert "--density" not in _merge("linear", tiny).command(Path("out"))


def test_what_a_rank_loses_is_told_exactly() -> None:
    matrix = torch.randn(30, 50, generator=torch.Generator().manual_seed(3))
    values = torch.linalg.svdvals(matrix.double())
    lost = merge_check.lost_at(matrix)
    assert torch.allclose(lost[:30], torch.stack([values[rank:].square().sum() for rank in range(30)]), rtol=1e-9)
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    b, a = u[:, :5] * s[:5], vh[:5]
    assert abs(merge_check.excess_of_dense(matrix, b, a)) < 1e-12
    assert abs(merge_check.excess_of_dense(matrix.T.contiguous(), a.T, b.T)) < 1e-12
    worse = torch.cat([b[:, :4], torch.zeros(30, 1)], dim=1)
    expected = float((lost[4] / lost[5]).sqrt()) - 1
    assert merge_check.excess_of_dense(matrix, worse, a) == pytest.approx(expected, rel=1e-9)


def test_the_same_of_a_sum_of_low_rank() -> None:
    random = torch.Generator().manual_seed(4)
    terms = [(torch.randn(30, 3, generator=random), torch.randn(3, 50, generator=random), 0.5) for _ in range(2)]
    whole = sum(((b * scale).double() @ a.double() for b, a, scale in terms), torch.zeros(30, 50, dtype=torch.float64))
    u, s, vh = torch.linalg.svd(whole, full_matrices=False)
    assert abs(merge_check.excess_of_sum(terms, u[:, :4] * s[:4] / 2, vh[:4], 2.0)) < 1e-12
    # Something beside the sum's own rows and columns, and too little of one direction.
    b, a = u[:, :4] * s[:4] + 0.1, vh[:4] * 0.9 + 0.1
    wanted = float((whole - b @ a).norm() / s[4:].norm()) - 1
    assert merge_check.excess_of_sum(terms, b, a, 1.0) == pytest.approx(wanted, rel=1e-9)
    # At full rank the best has no error, and what is missed is relative to the sum.
    assert merge_check.excess_of_sum(terms, u[:, :6] * s[:6], vh[:6], 1.0) < 1e-12
    assert merge_check.excess_of_sum(terms, u[:, :6] * s[:6] * 1.5, vh[:6], 1.0) == pytest.approx(0.5)


def test_errors_are_measured_of_every_method_and_rank(tmp_path: Path) -> None:
    found = merge_modules.accuracies(tmp_path, [(200, 240)], ranks=(16, 32))
    assert [(one.method, one.rank) for one in found] == [(m, r) for m in ("svd", *merge_check.DENSE) for r in (16, 32)]
    assert all(one.met for one in found), found
    assert all((one.differing is None) == (one.method == "svd") for one in found)


@pytest.mark.parametrize("method", merge_check.DENSE)
def test_a_merged_delta_is_seen_before_it_is_factorised(method: str, place: Path) -> None:
    sources = merge_workloads.alike(place, SHAPE, 1, 3, RANK)
    (name,) = merge_check.modules(sources[0])
    terms = [merge_check.Lora.read(path).factors(name) for path in sources]
    merged = merge_modules.merged_delta([ao.load(path) for path in sources], method)
    assert torch.allclose(merged, merge_check.dense(method, terms, name), atol=1e-6 * float(merged.abs().max()))
    assert 0 < int(merged.count_nonzero()) < merged.numel()


def test_trimming_otherwise_than_peft_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert merge_modules.trimming(4096 * 16)[3] == 0
    right = merge_modules.find_cut
    monkeypatch.setattr(merge_modules, "find_cut", lambda values, keep: right(values, keep - 5))
    assert merge_modules.trimming(4096 * 16)[3] >= 5


def test_a_quick_run_is_small_and_a_full_one_has_the_largest_matrices() -> None:
    quick = merge.planned(4, 5, 2, full=False, quick=True, llama=True, sdxl=True)
    assert (quick.runs, quick.layers, quick.module_runs) == (1, 1, 1)
    assert {case.shape for case in quick.cases} == {(1024, 4096), (1280, 1280)}
    usual, full = (merge.planned(32, 5, 1, full=full, quick=False, llama=True, sdxl=False) for full in (False, True))
    assert usual.layers == 32
    assert {case.shape for case in full.cases} - {case.shape for case in usual.cases} == {(14336, 4096)}
    assert len({case.name for case in full.cases}) == len(full.cases)
    thin = {case.least for case in full.cases if not case.full_matrices and case.method != "svd"}
    assert thin == {12.0}


def _sample(wall: float) -> MergeSample:
    return MergeSample(wall, wall, 300.0, read=wall / 2, compute=wall / 4, write=wall / 4)


def _outcome(tiny: list[Path]) -> Outcome:
    """Two rounds that keep every promise."""
    merges = [*(Merge(m, tuple(tiny), (), peer=True) for m in FACTORS), Merge("svd", tuple(tiny), ())]
    cases = [
        Case("svd", (1024, 4096), least=1000.0),
        Case("ties_svd", (4096, 4096), full_matrices=False, least=12.0),
        Case("svd", (1280, 1280), 2, rank=32, least=0.0),
    ]
    out = Outcome(2, 4, {"llama": merges}, cases=cases, entries=1000)
    for one in merges:
        out.samples[one.name] = out.samples[one.name + INSIDE] = [_sample(1.0)] * 2
    for one in merges[:4]:
        out.samples[one.name + PEER] = out.samples[one.name + PEER_INSIDE] = [_sample(12.0)] * 2
    for case in cases:
        out.samples[case.name] = [Sample(0.001, 0, 0)] * 2
        out.samples[case.name + PEER] = [Sample(2.0, 0, 0)] * 2
    for name, wall in (("trimming", 0.1), ("trimming threshold", 0.05), ("trimming" + PEER, 1.1)):
        out.samples[name] = [Sample(wall, 0, 0)] * 2
    out.accuracies = [Accuracy("svd", (9, 9), 16, 1e-12, 1e-10), Accuracy("ties_svd", (9, 9), 16, 1e-6, 1e-5, 0, 0.0)]
    out.peaks = [Peaks("svd", 1, {4: 300.0, 8: 320.0}), Peaks("svd", 0, {4: 300.0, 8: 250.0})]
    return out


def _slow(out: Outcome, name: str) -> None:
    out.samples[name] = [replace(sample, wall=sample.wall * 3) for sample in out.samples[name]]


@pytest.mark.parametrize(
    ("break_it", "broken"),
    [
        (lambda out: None, []),
        (lambda out: _slow(out, "linear, 3 adapters" + INSIDE), ["linear, 3 adapters"]),
        (lambda out: _slow(out, "ties, 3 adapters" + INSIDE), []),
        (lambda out: _slow(out, "svd 1024×4096 K3"), ["svd 1024×4096 K3"]),
        (lambda out: out.samples.update({"ties_svd 4096×4096 K3 thin": [Sample(0.2, 0, 0)] * 2}), ["ties_svd 4096×4096 K3 thin"]),
        (lambda out: _slow(out, "svd 1280×1280 K2"), []),
        (lambda out: _slow(out, "trimming"), ["trimming"]),
        (lambda out: setattr(out, "wrong", 1), ["trimming"]),
        (lambda out: out.samples.update({"svd, 3 adapters": [_sample(100.0)] * 2}), ["svd, 3 adapters"]),
        (lambda out: out.accuracies.append(Accuracy("svd", (9, 9), 32, 2e-10, 1e-10)), ["svd 9×9 to rank 32"]),
        (lambda out: out.accuracies.append(Accuracy("ties_svd", (9, 9), 64, 0.0, 1e-4, 1, 0.1)), ["ties_svd 9×9 to rank 64"]),
        (lambda out: out.peaks.append(Peaks("linear", 0, {4: 300.0, 32: 361.0})), ["linear, usual workers"]),
        (lambda out: out.peaks.append(Peaks("linear", 1, {4: 300.0, 32: 239.0})), ["linear, 1 worker"]),
    ],
)  # fmt: skip
def test_the_tables_say_what_was_promised_and_what_was_not_met(
    break_it: Callable[[Outcome], None], broken: list[str], tiny: list[Path]
) -> None:
    outcome = _outcome(tiny)
    break_it(outcome)
    assert [target.job for target in outcome.targets if not target.met] == broken
    text = report(outcome)
    assert text.count("**not met**") == len(broken)
    assert text.count("| met") == len(outcome.targets) - len(broken)
    assert "**" not in report(outcome, markdown=False)
    assert json.loads(json.dumps(outcome.document()))["runs"] == 2


def test_what_peft_would_need_is_estimated_from_the_work(tiny: list[Path]) -> None:
    outcome = _outcome(tiny)
    case = outcome.cases[0]
    # Measured: 2 s for 1024×4096.  4096×4096 is 16 times the work.
    assert estimate(outcome, {(1024, 4096): 3, (4096, 4096): 1}, [case]) == pytest.approx(3 * 2 + 2 * 16)
    assert "estimated" in report(outcome)


def test_the_command_measures_the_part_asked_for_and_tells_a_broken_promise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge, "_ENTRIES", 4096 * 64)
    monkeypatch.setattr("os.getloadavg", lambda: (2.5, 0.5, 0.5))
    arguments = ["--part", "trimming", "--runs", "2", "--dir", str(tmp_path), "--json"]
    done = CliRunner().invoke(merge.command, arguments)
    document = json.loads(done.stdout)
    assert "load average 2.5" in done.stderr
    assert {name: len(taken) for name, taken in document["samples"].items()} == {
        "trimming threshold": 2,
        "trimming": 2,
        "trimming" + PEER: 2,
    }
    assert document["trimming"]["wrong"] == 0
    assert done.exit_code == (0 if all(target["met"] for target in document["targets"]) else 1)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(merge_modules, "find_cut", lambda values, keep: Cut(0.0, 0))
    done = CliRunner().invoke(merge.command, ["--part", "trimming", "--runs", "1", "--dir", str(tmp_path)])
    assert done.exit_code == 1
    assert "not met" in done.stdout
