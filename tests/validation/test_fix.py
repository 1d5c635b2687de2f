"""`--fix`: what is changed, what is refused, and that nothing else moves.  The findings are made by hand."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from sound import Tensors, diffusers_file, edit, kohya_file, load, peft_folder, set_config

import adapterops as ao
from adapterops.storage import open_source, output
from adapterops.validation import fix
from adapterops.validation.fix import Mended, mend
from adapterops.validation.fix_plan import combined, composed
from adapterops.validation.fix_text import MAX_DIFF, edited
from adapterops.validation.report import Checked
from adapterops.validation.rule import REMOVE, Change, Finding, Rule, Severity

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
RULE = Rule("T999", "made-for-a-test", Severity.WARNING, "", "", "", "", fixable=True)


def finding(change: Change | None = None, file: str = "", **fields: Any) -> Finding:
    return RULE.found(file, "something", change=change or Change("do it", **fields))


def fixed(path: Path, *findings: Finding, dry_run: bool = False) -> Mended:
    mended = mend(Checked(str(path), findings=findings), dry_run)
    folder = path if path.is_dir() else path.parent
    assert not [name for name in os.listdir(folder) if name.startswith(".adapterops")]
    return mended


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()
    }


def body(path: Path) -> bytes:
    """What stands behind the header."""
    raw = path.read_bytes()
    return raw[8 + int.from_bytes(raw[:8], "little") :]


def deltas(path: Path) -> dict[str, torch.Tensor]:
    """What each module adds to its weight, computed here, from what the file says."""
    out = {}
    for update in ao.load(path, arch="sd1" if path.is_file() else None):
        down, up = (update.tensors[role].torch().float() for role in ("A", "B"))
        assert update.alpha is not None
        out[update.name] = up @ down * float(update.alpha.value or 0) / down.shape[0]
    return out


def same_deltas(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def named(tensors: Tensors, old: str, new: str) -> Tensors:
    return {key.replace(old, new): tensor for key, tensor in tensors.items()}


def with_default(folder: Path) -> dict[str, str]:
    """Leave the adapter's name in the keys of a folder; returns what mends it."""
    edit(folder, lambda tensors: named(tensors, ".weight", ".default.weight"))
    return {key: key.replace(".default", "") for key in load(folder / WEIGHTS)[0]}


def test_keys_are_renamed_and_nothing_else_moves(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path)
    before = deltas(folder)
    keys = with_default(folder)
    os.chmod(folder / WEIGHTS, 0o640)
    data, others = body(folder / WEIGHTS), snapshot(folder)
    tensors, metadata = load(folder / WEIGHTS)
    mended = fixed(folder, finding(Change("strip the adapter's name from 8 keys", keys=keys)))
    assert mended == Mended(str(folder), ("strip the adapter's name from 8 keys (T999)",), mended.diff)
    now, strings = load(folder / WEIGHTS)
    assert now.keys() == set(keys.values())
    assert all(torch.equal(tensor, now[keys[key]]) for key, tensor in tensors.items())
    assert strings == metadata
    assert body(folder / WEIGHTS) == data
    assert stat.S_IMODE((folder / WEIGHTS).stat().st_mode) == 0o640
    assert {k: v for k, v in snapshot(folder).items() if k != WEIGHTS} == {
        k: v for k, v in others.items() if k != WEIGHTS
    }
    assert same_deltas(deltas(folder), before)
    assert not ao.validate(folder).findings
    assert f"+++ {folder}/{WEIGHTS}\n" in mended.diff
    assert "-base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight F32 [4, 64]\n" in mended.diff


def test_a_wrapper_before_every_key(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path)
    before = deltas(folder)
    edit(folder, lambda tensors: {f"module.{key}": tensor for key, tensor in tensors.items()})
    keys = {key: key.removeprefix("module.") for key in load(folder / WEIGHTS)[0]}
    assert fixed(folder, finding(keys=keys)).done
    assert same_deltas(deltas(folder), before)


def test_config_and_header_and_keys_at_once(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path)
    before, keys = deltas(folder), with_default(folder)
    text = (folder / CONFIG).read_text()
    mended = fixed(
        folder,
        finding(Change("strip names", keys=keys)),
        finding(Change("publish", config={"inference_mode": False, "lora_bias": REMOVE})),
        finding(Change("say who made it", metadata={"maker": "me", "format": "pt", "none": REMOVE})),
    )
    assert mended.done == ("strip names (T999)", "publish (T999)", "say who made it (T999)")
    assert load(folder / WEIGHTS)[1] == {"format": "pt", "maker": "me"}
    assert (folder / CONFIG).read_text() == text.replace('mode": true', 'mode": false').replace(
        '  "lora_bias": false,\n', ""
    )
    assert same_deltas(deltas(folder), before)
    for word in ('-  "inference_mode": true,\n', '+  "inference_mode": false,\n', '+metadata.maker = "me"\n'):
        assert word in mended.diff


def test_a_hash_follows_the_bytes(tmp_path: Path) -> None:
    path = kohya_file(tmp_path)
    edit(path, lambda tensors: {**tensors, "stray": torch.ones(3)})
    edit(path, metadata={"sshs_legacy_hash": "abcdef01"})
    assert load(path)[1]["sshs_model_hash"] == hashlib.sha256(body(path)).hexdigest()
    before = deltas_of_kohya(path)
    mended = fixed(path, finding(Change("drop it", drop=("stray",))))
    assert mended.done == ("drop it (T999)", "leave sshs_legacy_hash out, which no longer holds")
    tensors, metadata = load(path)
    assert "stray" not in tensors
    assert metadata["sshs_model_hash"] == hashlib.sha256(body(path)).hexdigest()
    assert "sshs_legacy_hash" not in metadata
    assert deltas_of_kohya(path) == before
    # One that was asked for is that of the new bytes, whatever they were when it was asked for.
    save_file({**tensors, "stray": torch.ones(3)}, path, metadata | {"sshs_model_hash": "0" * 64})
    fixed(path, finding(drop=("stray",)), finding(metadata={"sshs_model_hash": "1" * 64}))
    assert load(path)[1]["sshs_model_hash"] == hashlib.sha256(body(path)).hexdigest()
    # A wrong one that nobody asked about stays.
    edit(path, metadata={"sshs_model_hash": "2" * 64, "x": "y"}, hashes=False)
    fixed(path, finding(metadata={"x": REMOVE}))
    assert load(path)[1]["sshs_model_hash"] == "2" * 64


def deltas_of_kohya(path: Path) -> dict[str, bytes]:
    return {u.name: b"".join(bytes(t.read()) for t in u.tensors.values()) for u in ao.load(path, allow_drop=True)}


def pickled(folder: Path, wrap: bool = False) -> Path:
    """The same folder with its weights in a pickle."""
    tensors, _ = load(folder / WEIGHTS)
    torch.save({"state_dict": tensors} if wrap else tensors, folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
    return folder


@pytest.mark.parametrize("wrap", [False, True])
def test_a_pickle_becomes_safetensors(wrap: bool, tmp_path: Path) -> None:
    folder = peft_folder(tmp_path)
    keys, tensors = with_default(folder), load(folder / WEIGHTS)[0]
    pickled(folder, wrap)
    mended = fixed(folder, finding(Change("convert it", rewrite=True)), finding(Change("strip", keys=keys)))
    assert mended.done == ("convert it (T999)", "strip (T999)")
    assert mended.path == str(folder)
    assert not (folder / "adapter_model.bin").exists()
    now, metadata = load(folder / WEIGHTS)
    assert metadata == {"format": "pt"}
    assert all(torch.equal(tensor, now[keys[key]]) for key, tensor in tensors.items())
    assert f"--- {folder}/adapter_model.bin\n+++ {folder}/{WEIGHTS}\n" in mended.diff
    assert not ao.validate(folder).findings


def test_a_single_pickle_gets_another_name(tmp_path: Path) -> None:
    path = diffusers_file(tmp_path, "style.safetensors")
    tensors, _ = load(path)
    path.unlink()
    torch.save({**tensors, "tied": next(iter(tensors.values()))}, tmp_path / "style.pt")
    mended = fixed(tmp_path / "style.pt", finding(rewrite=True, drop=("tied",)))
    assert mended.path == str(path)
    assert os.listdir(tmp_path) == ["style.safetensors"]
    assert load(path)[0].keys() == tensors.keys()
    # Where that name is taken nothing is done.
    torch.save(tensors, tmp_path / "style.pt")
    before = snapshot(tmp_path)
    mended = fixed(tmp_path / "style.pt", finding(rewrite=True))
    assert mended.done == ()
    assert "exists already" in mended.why[0]
    assert snapshot(tmp_path) == before


def test_keys_in_a_pickle_wait_for_its_conversion(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path)
    keys = with_default(folder)
    pickled(folder)
    before = snapshot(folder)
    mended = fixed(
        folder, finding(keys=keys), finding(Change("publish", config={"inference_mode": False})), dry_run=True
    )
    assert mended.done == ("publish (T999)",)
    assert "no safetensors file" in mended.why[0]
    assert snapshot(folder) == before


def test_a_file_is_renamed(tmp_path: Path) -> None:
    path = diffusers_file(tmp_path, "odd.safetensors")
    data = path.read_bytes()
    mended = fixed(path, finding(Change("rename it", rename="pytorch_lora_weights.safetensors"), file=str(path)))
    assert mended.path == str(tmp_path / "pytorch_lora_weights.safetensors")
    assert os.listdir(tmp_path) == ["pytorch_lora_weights.safetensors"]
    assert Path(mended.path).read_bytes() == data
    assert mended.diff == f"--- {path}\n+++ {mended.path}\n"
    folder = peft_folder(tmp_path)
    os.rename(folder / WEIGHTS, folder / "model.safetensors")
    change = Change("rename it", rename=WEIGHTS, metadata={"x": "y"})
    assert fixed(folder, finding(change, file=str(folder / "model.safetensors"))).path == str(folder)
    assert sorted(os.listdir(folder)) == ["README.md", CONFIG, WEIGHTS]
    assert load(folder / WEIGHTS)[1] == {"format": "pt", "x": "y"}
    for name in ("../x.safetensors", "/x", "README.md"):
        before = snapshot(tmp_path)
        assert fixed(folder, finding(rename=name, file=str(folder / WEIGHTS))).done == ()
        assert snapshot(tmp_path) == before


def test_a_header_is_written_anew(tmp_path: Path) -> None:
    path = diffusers_file(tmp_path)
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")]) | {"__metadata__": None}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body(path))
    data = body(path)
    assert fixed(path, finding(rewrite=True)).done
    assert body(path) == data
    assert load(path)[1] == {}
    assert b"__metadata__" not in path.read_bytes()


def test_a_dry_run_changes_nothing(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path)
    keys = with_default(folder)
    before = snapshot(folder)
    findings = finding(keys=keys), finding(Change("publish", config={"inference_mode": False}))
    shown = fixed(folder, *findings, dry_run=True)
    assert snapshot(folder) == before
    assert shown == fixed(folder, *findings)


def test_a_second_time_nothing_is_done(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path)
    findings = (
        finding(keys=with_default(folder)),
        finding(config={"inference_mode": False}),
        finding(metadata={"x": "y"}),
    )
    fixed(folder, *findings)
    before = snapshot(folder)
    mended = fixed(folder, *findings)
    assert mended.done == ()
    assert mended.diff == ""
    assert "not in the file any more" in mended.why[0]
    assert snapshot(folder) == before
    assert mend(Checked(str(folder), findings=(RULE.found("x", "not fixable"),))) == Mended(str(folder))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"config": {"lora_alpha": 16}}, "would compute something else"),
        ({"config": {"use_rslora": True}}, "would compute something else"),
        ({"drop": ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",)}, "was to go"),
        (
            {
                "keys": {
                    f"base_model.model.model.layers.{a}.self_attn.q_proj.lora_{x}.weight": f"base_model.model.model."
                    f"layers.{b}.self_attn.q_proj.lora_{y}.weight"
                    for a, b, x, y in ((0, 1, "A", "A"), (1, 0, "A", "A"))
                }
            },
            "would compute something else",
        ),
    ],
)
def test_what_changes_a_delta_is_not_done(fields: dict[str, Any], words: str, tmp_path: Path) -> None:
    folder = peft_folder(tmp_path)
    before = snapshot(folder)
    mended = fixed(folder, finding(metadata={"x": "y"}), finding(**fields))
    assert mended.done == ()
    assert words in mended.why[0], mended.why
    assert len(mended.left) == len(mended.why) == 2
    assert snapshot(folder) == before


def test_contradictions_are_left(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path)
    keys = list(load(folder / WEIGHTS)[0])
    before = snapshot(folder)
    for one, two, words in (
        ({"config": {"revision": "a"}}, {"config": {"revision": "b"}}, "another value for the field 'revision'"),
        ({"metadata": {"x": "a"}}, {"metadata": {"x": REMOVE}}, "another value for the header entry 'x'"),
        ({"keys": {keys[0]: "a"}}, {"keys": {keys[0]: "b"}}, "another name for 'base_model"),
        ({"keys": {keys[0]: "a"}}, {"drop": (keys[0],)}, "one renames what the other leaves out"),
        ({"rename": "a.safetensors"}, {"rename": "b.safetensors"}, "another name for the file"),
        ({"keys": {keys[0]: "a"}}, {"keys": {keys[1]: "a"}}, "would both be called 'a'"),
    ):
        mended = fixed(folder, finding(**one), finding(**two))
        assert mended.done == ()
        assert all(words in why for why in mended.why), mended.why
        assert len(mended.why) == 2
        assert snapshot(folder) == before
    # What has nothing to do with them is done.
    publish = finding(Change("publish", config={"inference_mode": False}))
    mended = fixed(folder, finding(config={"revision": "a"}), finding(config={"revision": "b"}), publish)
    assert mended.done == ("publish (T999)",)


@pytest.mark.parametrize(
    ("key", "one", "two", "both"),
    [
        ("module.a.lora_A.default.weight", "a.lora_A.default.weight", "module.a.lora_A.weight", "a.lora_A.weight"),
        ("m.n.m.n.x.default", "m.n.x.default", "m.n.m.n.x", "m.n.x"),
        ("a.b", "a.b", "a.b", "a.b"),
        ("a.b", "c.b", "c.b", "c.b"),
        ("a.b", "c.b", "b", None),
        ("a.b", "a", "b", None),
    ],
)
def test_two_changes_of_one_name(key: str, one: str, two: str, both: str | None) -> None:
    assert composed(key, one, two) == both
    assert composed(key, two, one) == both


@pytest.mark.parametrize(
    ("value", "one", "two", "both"),
    [
        (["q", "q", "v", "x"], ["q", "v", "x"], ["q", "q", "v"], ["q", "v"]),
        (["q", "v"], ["q"], ["v"], []),
        (["q"], ["q", "k"], ["q"], None),
        (["q"], ["q"], "q", None),
        ({"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 2}, {"b": 2, "c": 3}, {"b": 2}),
        ({"a": 1}, {"a": 2}, {}, None),
        (4, 8, 8, 8),
        (4, 8, 8.5, None),
        (1, True, 1, None),
    ],
)
def test_two_changes_of_one_field(value: Any, one: Any, two: Any, both: Any) -> None:
    expected = None if both is None else (both,)
    assert combined(value, one, two) == combined(value, two, one) == expected


def test_entries_that_two_findings_take_out_are_both_gone(tmp_path: Path) -> None:
    folder = set_config(peft_folder(tmp_path), target_modules=["q_proj", "v_proj", "dead", "v_proj"])
    one, two = ["q_proj", "v_proj", "v_proj"], ["q_proj", "v_proj", "dead"]
    assert (
        len(fixed(folder, finding(config={"target_modules": one}), finding(config={"target_modules": two})).done) == 1
    )
    assert json.loads((folder / CONFIG).read_text())["target_modules"] == ["q_proj", "v_proj"]


def test_weights_that_cannot_be_read_do_not_keep_the_config_from_being_mended(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path)
    (folder / WEIGHTS).write_bytes(b"\xff" * 40)
    mended = fixed(folder, finding(Change("publish", config={"inference_mode": False})), finding(metadata={"x": "y"}))
    assert mended.done == ("publish (T999)",)
    assert mended.why == ("the weights cannot be read",)
    assert json.loads((folder / CONFIG).read_text())["inference_mode"] is False


def test_shards_are_left(tmp_path: Path) -> None:
    folder = peft_folder(tmp_path)
    tensors, _ = load(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    index = {}
    for n, key in enumerate(tensors):
        index[key] = f"adapter_model-0000{n % 2 + 1}-of-00002.safetensors"
    for name in set(index.values()):
        save_file({k: tensors[k] for k in index if index[k] == name}, folder / name)
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": index}))
    mended = fixed(folder, finding(metadata={"x": "y"}), finding(config={"inference_mode": False}))
    assert mended.why == ("the weights are spread over several files; save them as one first",)
    assert json.loads((folder / CONFIG).read_text())["inference_mode"] is False


def test_nothing_is_written_through_links(tmp_path: Path) -> None:
    """The Hub's cache keeps its files as links into a store that other revisions use too."""
    folder = peft_folder(tmp_path)
    keys = with_default(folder)
    (tmp_path / "blobs").mkdir()
    for name in (WEIGHTS, CONFIG):
        os.rename(folder / name, tmp_path / "blobs" / name)
        os.symlink(os.path.join("..", "blobs", name), folder / name)
    before = snapshot(tmp_path)
    for change in ({"keys": keys}, {"config": {"inference_mode": False}}, {"rename": "x.safetensors"}):
        mended = fixed(folder, finding(**change))
        assert mended.done == ()
        assert "is a link (to ../blobs/adapter_" in mended.why[0]
        assert "cp -rL" in mended.why[0]
    assert snapshot(tmp_path) == before
    assert (folder / WEIGHTS).is_symlink()


def test_nothing_is_changed_on_the_hub() -> None:
    mended = mend(Checked("hf://me/style", findings=(finding(metadata={"x": "y"}),)))
    assert mended.done == ()
    assert "on the Hub" in mended.why[0]


def test_a_folder_without_config_or_file(tmp_path: Path) -> None:
    path = diffusers_file(tmp_path)
    assert "there is no adapter_config.json" in fixed(path, finding(config={"r": 4})).why[0]
    path.unlink()
    assert fixed(path, finding(metadata={"x": "y"})).done == ()


def test_an_error_in_the_middle_puts_everything_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pickled(peft_folder(tmp_path))
    before = snapshot(folder)
    rename, calls = os.rename, list[str]()

    def fail(one: str, two: str) -> None:
        calls.append(str(two))
        if len(calls) == 4:
            raise OSError(28, "No space left on device")
        rename(one, two)

    findings = finding(rewrite=True), finding(config={"inference_mode": False})
    with monkeypatch.context() as patch:
        patch.setattr(output.os, "rename", fail)
        mended = fixed(folder, *findings)
    assert len(calls) >= 4
    assert "No space left" in mended.why[0]
    assert snapshot(folder) == before
    assert fixed(folder, *findings).done


def test_an_interruption_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = peft_folder(tmp_path)
    keys, before = with_default(folder), snapshot(folder)

    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fix, "prove_same", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fixed(folder, finding(keys=keys))
    assert snapshot(folder) == before
    assert sorted(os.listdir(folder)) == ["README.md", CONFIG, WEIGHTS]


def test_a_file_that_changes_meanwhile_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = peft_folder(tmp_path)
    keys, prove = with_default(folder), fix.prove_same

    def slow(*arguments: Any) -> None:
        prove(*arguments)
        edit(folder, metadata={"another": "writer"})

    monkeypatch.setattr(fix, "prove_same", slow)
    assert "was changed meanwhile" in fixed(folder, finding(keys=keys)).why[0]
    assert load(folder / WEIGHTS)[1]["another"] == "writer"


def test_a_wrong_copy_does_not_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = peft_folder(tmp_path)
    keys, before, write = with_default(folder), snapshot(folder), output.Staged.write_tensors

    def flipped(self: output.Staged, name: str, *arguments: Any, **options: Any) -> None:
        write(self, name, *arguments, **options)
        with open(os.path.join(self.folder, name), "r+b") as file:
            file.seek(-1, os.SEEK_END)
            last = file.read(1)
            file.seek(-1, os.SEEK_END)
            file.write(bytes([last[0] ^ 1]))

    monkeypatch.setattr(output.Staged, "write_tensors", flipped)
    assert "other contents" in fixed(folder, finding(keys=keys)).why[0]
    assert snapshot(folder) == before


def test_differences_are_bounded(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({f"module.{n}.lora_A.weight": torch.ones(1) for n in range(2000)}, path, {"long": "é\x1b" * 10_000})
    keys = {key: key.removeprefix("module.") for key in open_source(path).tensors}
    diff = fixed(path, finding(keys=keys, metadata={"long": REMOVE}), dry_run=True).diff
    assert diff.count("\n") == MAX_DIFF + 1
    assert diff.endswith("more lines\n")
    assert max(map(len, diff.splitlines())) < 300
    assert "\x1b" not in diff


TEXTS = {
    '{\n  "a": 1,\n  "c": [\n    1\n  ]\n}\n': {
        "a": '{\n  "a": {\n    "x": [\n      2\n    ]\n  },\n  "c": [\n    1\n  ]\n}\n',
        "b": '{\n  "a": 1,\n  "b": {\n    "x": [\n      2\n    ]\n  },\n  "c": [\n    1\n  ]\n}\n',
        "d": '{\n  "a": 1,\n  "c": [\n    1\n  ],\n  "d": {\n    "x": [\n      2\n    ]\n  }\n}\n',
        "-a": '{\n  "c": [\n    1\n  ]\n}\n',
        "-c": '{\n  "a": 1\n}\n',
        "-z": '{\n  "a": 1,\n  "c": [\n    1\n  ]\n}\n',
    },
    '{"c":1e-4,"a":[1,2]}': {
        "c": '{"c":{"x":[2]},"a":[1,2]}',
        "b": '{"c":1e-4,"a":[1,2],"b":{"x":[2]}}',
        "-c": '{"a":[1,2]}',
        "-a": '{"c":1e-4}',
    },
    '{\r\n\t"a" : "\\u00e9",\r\n\t"b": {"y": 1}\r\n}': {
        "b": '{\r\n\t"a" : "\\u00e9",\r\n\t"b": {"x": [2]}\r\n}',
        "a": '{\r\n\t"a" : {\r\n\t\t"x": [\r\n\t\t\t2\r\n\t\t]\r\n\t},\r\n\t"b": {"y": 1}\r\n}',
    },
    "{}": {"a": '{"a": {"x": [2]}}', "-a": "{}"},
    '{ "a": 1 }\n': {"a": '{ "a": {"x": [2]} }\n', "b": '{ "a": 1, "b": {"x": [2]} }\n', "-a": "{  }\n"},
}


@pytest.mark.parametrize(("text", "name"), [(text, name) for text, cases in TEXTS.items() for name in cases])
def test_a_config_is_edited_where_it_stands(text: str, name: str) -> None:
    field, value = name.removeprefix("-"), REMOVE if name.startswith("-") else {"x": [2]}
    out = edited(text, {field: value})
    expected = json.loads(text) | ({} if value is REMOVE else {field: value})
    if value is REMOVE:
        expected.pop(field, None)
    assert json.loads(out) == expected
    if name != "b" or not text.startswith('{ "a"'):
        assert out == TEXTS[text][name]


def test_null_is_a_value() -> None:
    assert edited('{"a": 1}', {"a": None}) == '{"a": null}'


def test_letters_stay_as_they_are_written() -> None:
    assert edited('{"a": "é", "b": 1}', {"b": "ü"}) == '{"a": "é", "b": "ü"}'
    assert edited('{"a": "e", "b": 1}', {"b": "ü"}) == '{"a": "e", "b": "\\u00fc"}'
