"""The counts of the random networks, and what makes a wrong one smaller."""

from __future__ import annotations

import pytest

from benchmarks.random_graphs import __main__ as random_graphs
from benchmarks.random_graphs.report import markdown
from tests.random_graphs import check as checks
from tests.random_graphs.check import Outcome, WrongError, shrink


@pytest.fixture
def document():
    new = {"graphs": 0, "seconds": 0.0, "worst": 0.0, "counts": {}, "kinds": {}, "refused": {}, "wrong": []}
    return {"runs": [{"environment": {"versions": {"torch": "2.14"}}}], **new}


def give(monkeypatch, outcomes):
    """Let the networks come out so, one after the other."""

    def check(steps, output):
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(random_graphs, "check", check)


def test_what_comes_of_each_network_is_counted(monkeypatch, document):
    outcomes = [
        Outcome(traced=True, edits=7, worst=2e-13, groups=3, editable=2),
        Outcome(traced=True, edits=3, refused={"widen": "step3.conv cannot grow to 17"}),
        WrongError("slim, in training at batch 3: off by 0.5"),
        Outcome(refused={"trace": "odd.py:12: the value is 3"}),
    ]

    give(monkeypatch, outcomes)
    for number in range(4):
        random_graphs.add(document, number)
    assert document["wrong"] == [{"network": 2, "problem": "slim, in training at batch 3: off by 0.5"}]
    assert document["refused"] == {"widen: … cannot grow to n": 1, "trace: …: the value is n": 1}
    page = markdown(document)
    assert "4 networks drawn, 2 traced and edited, 1 wrong." in page
    assert "10 such comparisons, the worst off by 2.0e-13" in page
    assert "Of 3 inner groups of channels 2 could be edited. 2 networks were refused something." in page
    assert "- network 2: slim, in training at batch 3: off by 0.5" in page


def test_what_was_wrong_is_tried_again_and_kept_as_mended(monkeypatch, document):
    document.update(graphs=9, wrong=[{"network": 2, "problem": "off by 0.5"}, {"network": 5, "problem": "off by 1"}])
    outcomes = [Outcome(traced=True, edits=7), WrongError("slim: off by 2")]

    give(monkeypatch, outcomes)
    random_graphs.try_again(document)
    assert (document["graphs"], document["kinds"], document["counts"]["traced"]) == (9, {}, 1)
    assert document["mended"] == [{"network": 2, "problem": "off by 0.5"}]
    assert document["wrong"] == [{"network": 5, "problem": "slim: off by 2"}]
    page = markdown(document)
    assert "9 networks drawn, 1 traced and edited, 1 wrong." in page
    assert page.index("- network 5: slim: off by 2") < page.index("mended") < page.index("- network 2: off by 0.5")


def test_a_wrong_network_is_made_smaller_while_it_is_wrong(monkeypatch):
    def check(steps, output):
        if any(kind == "glu" and b >= 7 for kind, _, b in steps):
            raise WrongError(f"{len(steps)} steps")

    monkeypatch.setattr(checks, "check", check)
    steps = [("conv", 30, 12), ("glu", 15, 29), ("norm", 1, 1)]
    assert shrink(steps, "dataclass") == ([("glu", 0, 28)], "tuple", "1 steps")
