"""Budgets as people write them: numbers with units, and shares of what the model takes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import surgery
from surgery.errors import UsageError
from surgery.units import LIMITS, parse_amount


@pytest.mark.parametrize(
    ("what", "text", "number", "share"),
    [
        ("latency", "5ms", 5.0, False),
        ("latency", "0.5", 0.5, False),
        ("latency", "50%", 0.5, True),
        ("macs", "300M", 3e8, False),
        ("macs", "2", 2.0, False),
        ("macs", "0.5M", 5e5, False),
        ("macs", "0.5", 0.5, True),
        ("macs", "1", 1.0, True),
        ("params", "40%", 0.4, True),
        ("params", "2.5 %", 0.025, True),
        ("bytes", "12MB", 12e6, False),
        ("bytes", "100%", 1.0, True),
    ],
)
def test_a_count_of_at_most_1_and_a_percentage_are_shares(what, text, number, share):
    found = parse_amount(what, text)
    assert (found.number, found.share) == (pytest.approx(number), share)


@pytest.mark.parametrize("what", ["macs", "params", "bytes"])
def test_a_share_is_of_what_the_model_takes(what):
    model = surgery.trace(nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 5)).eval(), torch.zeros(2, 6))
    counts = {"macs": 16 * 6 + 5 * 16, "params": 16 * 7 + 5 * 17, "bytes": 4 * (16 * 7 + 5 * 17)}
    for written in (0.5, "0.5", "50%"):
        found = surgery.slim_to_budget(model, **{what: written})
        assert (found.before, found.limit) == (counts[what], pytest.approx(0.5 * counts[what]))
    assert surgery.slim_to_budget(model, **{what: "20k"}).limit == 20_000


@pytest.mark.parametrize(
    ("what", "text", "allowed"),
    [
        ("latency", "150%", "(ms, s, us), or a share of the model's own, up to 100%, not '150%'"),
        ("latency", "fast", "up to 100%, not 'fast'"),
        ("macs", "101%", "(k, M, G), or a share of the model's own, up to 1 or 100%, not '101%'"),
        ("macs", "3ms", "not '3ms'"),
        ("params", "0%", "not '0%'"),
        ("params", "1.2.3", "not '1.2.3'"),
        ("bytes", "", "not ''"),
    ],
)
def test_what_is_no_amount_is_refused_with_what_is(what, text, allowed):
    assert what in LIMITS
    with pytest.raises(UsageError) as caught:
        parse_amount(what, text)
    assert str(caught.value).startswith(f"a budget of {what} is a number above 0 with an optional unit (")
    assert str(caught.value).endswith(allowed)
