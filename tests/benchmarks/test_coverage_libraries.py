"""The models of libraries: a row is measured step by step, and the page shows what was found."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.coverage.libraries import PAGE, line, measure, page_table, run
from benchmarks.coverage.library_models import CASES, Case, images
from benchmarks.results_io import RESULTS, read_document


class Summed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x):
        return {"scores": self.last(self.first(x).relu().mean((2, 3)))}


def take_scores(output):
    return output["scores"]


def case(library: str = "torch") -> Case:
    return Case(library, "Summed", Summed, images(8), take_scores, target=0.6)


@pytest.mark.parametrize("form", ["unedited", "wrapped"])
def test_a_row_holds_the_errors_of_each_step(form):
    rows = [dict(row) for row in measure(case(), form)]
    steps = ("trace", "permute", "slim", *(("widen", "load") if form == "unedited" else ()))
    assert rows[0]["step"] == "build"
    assert rows[-1]["failures"] == {}
    assert all(rows[-1][f"{step} error"] <= 1e-10 for step in steps)
    assert ("export error" in rows[-1]) == (form == "unedited")
    assert 0.4 < rows[-1]["slim_macs"] < 0.6  # the first layer reads three channels


def test_a_model_whose_trace_is_wrong_is_a_failure(monkeypatch):
    class Wrong(nn.Module):
        def forward(self, x):
            return {"scores": x.sum((1, 2, 3)) + 1}

    monkeypatch.setattr("surgery.trace", lambda *args, **named: Wrong())
    row = list(measure(case(), "wrapped"))[-1]
    assert "trace" in row["failures"]


def test_a_library_that_is_not_installed_has_a_row_that_says_so():
    row = run(case("no_such_library"), "unedited", seconds=10)
    assert row["missing"] == "no_such_library is not installed"
    assert "no_such_library is not installed" in line(row)


def test_the_cases_have_names_of_their_own():
    assert len({(c.library, c.name) for c in CASES}) == len(CASES)
    assert torch.is_tensor(CASES[0].inputs(2, torch.Generator())[0][0])


def test_the_page_shows_the_results():
    assert PAGE.read_text().endswith("\n" + page_table(read_document(RESULTS / "coverage-libraries.json")))
