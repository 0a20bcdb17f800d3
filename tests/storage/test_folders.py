"""Folders of runs that are not over."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from surgery.cli.options import refuse_if_taken
from surgery.errors import UsageError
from surgery.storage import folders
from surgery.storage.folders import LOCK, SETTINGS, staged_folder, unfinished, unfinished_folder

ASKED = {"epochs": 3, "layers": ("a", "b"), "lr": None}


def cut_off(out, settings, file="weights.pt", error=KeyboardInterrupt):
    def run():
        with unfinished_folder(out, settings) as folder:
            if file:
                (folder / file).parent.mkdir(exist_ok=True)
                (folder / file).write_text("half of the work")
            raise error

    with pytest.raises(error):
        run()


def settings_in(folder):
    content = json.loads((folder / SETTINGS).read_text())
    assert content.pop("sha256")
    return content


def test_what_was_left_is_found_by_a_run_with_the_same_settings_and_removed_when_it_is_over(tmp_path):
    out = tmp_path / "new" / "demo"
    cut_off(out, ASKED)
    assert [file.name for file in out.parent.iterdir()] == ["demo.unfinished"]
    with unfinished_folder(out, ASKED) as folder:
        assert folder == unfinished(out)
        assert (folder / "weights.pt").read_text() == "half of the work"
        assert settings_in(folder) == {"epochs": 3, "layers": ["a", "b"], "lr": None}
        assert folder.stat().st_mode & 0o777 == 0o755
    assert not any(out.parent.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {**ASKED, "epochs": 4},
            "demo.unfinished belongs to an unfinished run with epochs 3 and not 4: use its",
        ),
        ({**ASKED, "seed": 0}, "with seed None and not 0: use its settings to resume it, or start again with force=T"),
        ({"epochs": 3, "lr": None}, r"with other settings: use its settings .* with force=True \(--force\)"),
    ],
)
def test_a_run_with_other_settings_is_refused_unless_it_is_to_begin_anew(tmp_path, settings, message):
    cut_off(tmp_path / "demo", ASKED)
    cut_off(tmp_path / "demo", ASKED, file="stage/weights.pt")
    with pytest.raises(UsageError, match=message), unfinished_folder(tmp_path / "demo", settings):
        pytest.fail("the run began")
    assert (unfinished(tmp_path / "demo") / "weights.pt").exists()
    with unfinished_folder(tmp_path / "demo", settings, force=True) as folder:
        assert {file.name for file in folder.iterdir()} == {SETTINGS, LOCK}
        assert settings_in(folder) == json.loads(json.dumps(settings))


def test_force_goes_on_with_a_run_of_the_same_settings(tmp_path):
    cut_off(tmp_path / "demo", ASKED)
    with unfinished_folder(tmp_path / "demo", ASKED, force=True) as folder:
        assert (folder / "weights.pt").exists()


def test_a_run_that_was_refused_leaves_nothing(tmp_path):
    cut_off(tmp_path / "new" / "demo", ASKED, file=None, error=UsageError)
    assert not any(tmp_path.iterdir())


def test_a_run_that_was_cut_off_before_it_had_anything_to_keep_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt) as caught, unfinished_folder(tmp_path / "demo", ASKED) as folder:  # noqa: PT012
        (folder / "stage").mkdir()
        raise KeyboardInterrupt
    assert not hasattr(caught.value, "__notes__")
    assert not any(tmp_path.iterdir())


def test_an_error_is_noted_what_is_kept(tmp_path):
    with pytest.raises(ValueError, match="no") as caught, unfinished_folder(tmp_path / "demo", ASKED) as folder:  # noqa: PT012
        (folder / "weights.pt").touch()
        raise ValueError("no")
    assert caught.value.__notes__ == [f"what is done is kept in {folder}"]


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("settings", [ASKED, {"epochs": 4}], ids=["same", "other"])
def test_two_runs_at_once_are_refused(tmp_path, settings, force):
    out = tmp_path / "demo"
    with unfinished_folder(out, ASKED) as folder:
        (folder / "weights.pt").write_text("of the first")
        with pytest.raises(UsageError) as caught, unfinished_folder(out, settings, force=force):
            pytest.fail("the second run began")
        assert str(caught.value) == (
            f"another run is writing to {folder}: wait until it is over, or choose another folder"
        )
        assert not hasattr(caught.value, "__notes__")
        assert (folder / "weights.pt").read_text() == "of the first"
    assert not any(tmp_path.iterdir())


def test_a_killed_run_keeps_no_one_from_going_on(tmp_path):
    code = """
        import os, sys
        from surgery.storage.folders import unfinished_folder

        with unfinished_folder(sys.argv[1], {"epochs": 3}) as folder:
            (folder / "weights.pt").touch()
            print("begun", flush=True)
            sys.stdin.read()
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "demo")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "begun\n"
        with pytest.raises(UsageError, match="another run is writing to"):
            cut_off(tmp_path / "demo", {"epochs": 3}, file=None)
        other.kill()
    with unfinished_folder(tmp_path / "demo", {"epochs": 3}) as folder:
        assert {file.name for file in folder.iterdir()} == {SETTINGS, LOCK, "weights.pt"}
    assert not any(tmp_path.iterdir())


def test_of_two_runs_that_begin_at_the_same_moment_one_makes_the_folder(tmp_path, monkeypatch):
    rename = Path.rename

    def beaten(staging, folder):
        folder.mkdir()
        (folder / SETTINGS).write_text(json.dumps({"epochs": 3}))
        monkeypatch.undo()
        rename(staging, folder)

    monkeypatch.setattr(Path, "rename", beaten)
    with unfinished_folder(tmp_path / "demo", {"epochs": 3}) as folder:
        assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("content", [None, "{"])
def test_a_folder_of_something_else_is_in_the_way(tmp_path, content):
    folder = unfinished(tmp_path / "demo")
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    if content:
        (folder / SETTINGS).write_text(content)
    message = f"demo.unfinished is in the way: it has no {SETTINGS} that can be read"
    with pytest.raises(UsageError, match=message), unfinished_folder(tmp_path / "demo", ASKED, force=True):
        pytest.fail("the run began")
    assert (folder / "thesis.txt").exists()
    assert not (folder / LOCK).exists()


def test_the_folder_lies_beside_a_relative_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(unfinished("runs/demo")) == "runs/demo.unfinished"
    assert unfinished(".") == tmp_path.with_name(f"{tmp_path.name}.unfinished")


def write(out, text="new", *, force=False, meanwhile=lambda: None):
    with staged_folder(out, marker="made.json", force=force) as folder:
        (folder / "made.json").write_text(text)
        meanwhile()


def test_a_folder_that_appears_meanwhile_is_kept(tmp_path):
    out = tmp_path / "out"

    def appear():
        out.mkdir()
        (out / "thesis.txt").write_text("years of work")

    with pytest.raises(UsageError, match="out exists"):
        write(out, meanwhile=appear)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "thesis.txt"]


@pytest.mark.parametrize("exchanged", [True, False])
def test_what_appears_at_the_last_moment_is_kept(tmp_path, monkeypatch, exchanged):
    out = tmp_path / "out"
    out.mkdir()
    swap = folders.exchange

    def late(one, other):
        if not (other / "thesis.txt").exists():
            (other / "thesis.txt").write_text("years of work")
        return swap(one, other) if exchanged else False

    monkeypatch.setattr(folders, "exchange", late)
    with pytest.raises(UsageError, match="out is not replaced: something else was written there meanwhile"):
        write(out, force=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "thesis.txt"]


def test_a_name_that_is_taken_at_the_last_moment_is_refused(tmp_path, monkeypatch):
    rename = folders.rename_new

    def late(source, target):
        target.mkdir()
        rename(source, target)

    monkeypatch.setattr(folders, "rename_new", late)
    with pytest.raises(UsageError, match="out has appeared meanwhile: choose another folder"):
        write(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_interruption_between_two_renames_puts_the_earlier_results_back(tmp_path, monkeypatch):
    out = tmp_path / "out"
    write(out, "old")
    monkeypatch.setattr(folders, "exchange", lambda one, other: False)
    monkeypatch.setattr(folders, "rename_new", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(out, force=True)
    assert (out / "made.json").read_text() == "old"
    assert list(tmp_path.iterdir()) == [out]


def interrupt(*_):
    raise KeyboardInterrupt


def test_two_writers_of_one_folder_are_refused_and_leave_no_lock(tmp_path):
    def second():
        with pytest.raises(UsageError, match=r"another run is writing to .*out: wait until it is over"):
            write(tmp_path / "out", force=True)

    write(tmp_path / "out", meanwhile=second)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_killed_runs_left_is_removed_and_nothing_else(tmp_path):
    for name in (".out-abc.surgery-writing", ".other-abc.surgery-writing", ".out-mine", "out-notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    write(tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {".other-abc.surgery-writing", ".out-mine", "out-notes", "out"}


def test_what_a_killed_run_left_beside_its_whole_result_is_removed_when_that_is_found(tmp_path):
    out, file = tmp_path / "out", tmp_path / "m.onnx"
    for name in (".out-abc.surgery-writing", ".m.onnx-abc.surgery-writing", ".other-abc.surgery-writing", "out"):
        (tmp_path / name).mkdir()
    for name in (".out.surgery-lock", ".m.onnx.surgery-lock", "m.onnx"):
        (tmp_path / name).write_text("")
    with folders.hold(file), pytest.raises(UsageError, match="exists"):  # someone writes: nothing is removed
        refuse_if_taken(file, False)
    (tmp_path / ".m.onnx-abc.surgery-writing").mkdir(exist_ok=True)
    with pytest.raises(UsageError, match="exists"):
        refuse_if_taken(file, False)
    with pytest.raises(UsageError, match="exists"):
        folders.refuse_folder(out, marker="m", force=False)
    assert {p.name for p in tmp_path.iterdir()} == {".other-abc.surgery-writing", "out", "m.onnx"}


def test_results_behind_a_link_are_replaced_and_the_link_stays(tmp_path):
    write(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link", "newer", force=True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "made.json").read_text() == "newer"


def test_a_name_of_any_length_that_the_system_takes_is_written(tmp_path):
    write(tmp_path / ("x" * 255))
    assert [path.name for path in tmp_path.iterdir()] == ["x" * 255]


def begin(out):
    with unfinished_folder(out, ASKED):
        pytest.fail("the run began")


@pytest.mark.parametrize(
    ("out", "reason"),
    [
        ("x" * 256, "its name is too long"),
        ("/proc/out", "its folder cannot hold files"),
        ("/proc/new/out", "its folder cannot hold files"),
        ("/dev/null/out", "(/dev/null|a part of its path) is a file"),
    ],
)
@pytest.mark.parametrize("make", [write, begin], ids=["staged", "run"])
def test_what_cannot_be_written_is_refused_in_one_line(tmp_path, monkeypatch, out, reason, make):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=f"^cannot write .*: {reason}$"):
        make(Path(out))
    assert not any(tmp_path.iterdir())


def test_damaged_settings_are_named(tmp_path):
    cut_off(tmp_path / "demo", ASKED)
    file = unfinished(tmp_path / "demo") / SETTINGS
    file.write_text(file.read_text().replace("3", "4"))
    with pytest.raises(UsageError, match=r"settings\.json was damaged or edited .*; remove .*unfinished to start"):
        cut_off(tmp_path / "demo", ASKED)
