"""Folders of runs that are not over."""

from __future__ import annotations

import json

import pytest

from surgery.errors import UsageError
from surgery.folders import SETTINGS, unfinished, unfinished_folder

ASKED = {"epochs": 3, "layers": ("a", "b"), "lr": None}


def cut_off(out, settings, file="weights.pt", error=KeyboardInterrupt):
    def run():
        with unfinished_folder(out, settings) as folder:
            if file:
                (folder / file).write_text("half of the work")
            raise error

    with pytest.raises(error):
        run()


def test_what_was_left_is_found_by_a_run_with_the_same_settings_and_removed_when_it_is_over(tmp_path):
    out = tmp_path / "new" / "demo"
    cut_off(out, ASKED)
    assert [file.name for file in out.parent.iterdir()] == ["demo.unfinished"]
    with unfinished_folder(out, ASKED) as folder:
        assert folder == unfinished(out)
        assert (folder / "weights.pt").read_text() == "half of the work"
        assert json.loads((folder / SETTINGS).read_text()) == {"epochs": 3, "layers": ["a", "b"], "lr": None}
        assert folder.stat().st_mode & 0o777 == 0o755
    assert not any(out.parent.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {**ASKED, "epochs": 4},
            "demo.unfinished is of a run that is not over, with epochs 3 and not 4: use the",
        ),
        ({**ASKED, "seed": 0}, "with seed None and not 0: use the settings of then to go on with it, or begin anew wi"),
        ({"epochs": 3, "lr": None}, r"with other settings: use the settings of then .* with force=True \(--force\)"),
    ],
)
def test_a_run_with_other_settings_is_refused_unless_it_is_to_begin_anew(tmp_path, settings, message):
    cut_off(tmp_path / "demo", ASKED)
    with pytest.raises(UsageError, match=message), unfinished_folder(tmp_path / "demo", settings):
        pytest.fail("the run began")
    assert (unfinished(tmp_path / "demo") / "weights.pt").exists()
    with unfinished_folder(tmp_path / "demo", settings, force=True) as folder:
        assert [file.name for file in folder.iterdir()] == [SETTINGS]


def test_force_goes_on_with_a_run_of_the_same_settings(tmp_path):
    cut_off(tmp_path / "demo", ASKED)
    with unfinished_folder(tmp_path / "demo", ASKED, force=True) as folder:
        assert (folder / "weights.pt").exists()


def test_a_run_that_was_refused_leaves_nothing(tmp_path):
    cut_off(tmp_path / "new" / "demo", ASKED, file=None, error=UsageError)
    assert not any(tmp_path.iterdir())


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


def test_the_folder_lies_beside_a_relative_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(unfinished("runs/demo")) == "runs/demo.unfinished"
    assert unfinished(".") == tmp_path.with_name(f"{tmp_path.name}.unfinished")
