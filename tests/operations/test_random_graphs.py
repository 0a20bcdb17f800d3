"""Random networks: every edit is exact or refused, and most of what could be edited is.

``SURGERY_EXAMPLES=1000 pytest -m slow tests/operations/test_random_graphs.py`` tries more of them, and
``python -m benchmarks.random_graphs`` counts what comes of 2,000.
"""

from __future__ import annotations

import os
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import surgery
from tests.random_graphs import KINDS, PLAIN, build, draw
from tests.random_graphs.check import ENDS, check
from tests.random_graphs.python import OUTPUTS
from tests.random_graphs.tokens import ATTENTIONS

EXAMPLES = int(os.environ.get("SURGERY_EXAMPLES", "60"))
STEPS = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 69), st.integers(0, 69)), min_size=2, max_size=9)


FAST = [19, 24, 81, 38, 317, 225, 35, 15, 0]
"""Networks of the fast suite."""


def test_the_fast_networks_have_every_kind_of_step():
    assert {kind for n in FAST for kind, _, _ in draw(n)[0]} == set(KINDS)


@pytest.mark.parametrize("number", FAST)
def test_every_edit_of_a_random_network_is_exact_or_refused(number):
    outcome = check(*draw(number))
    assert outcome.traced, outcome.refused
    assert outcome.edits >= 5
    assert len(outcome.vacuous) < 2


@settings(
    max_examples=EXAMPLES,
    derandomize=EXAMPLES == 60,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
)
@given(STEPS, st.sampled_from(sorted(OUTPUTS)))
def test_every_edit_of_many_random_networks_is_exact_or_refused(steps, output):
    check(steps, output)


def test_random_networks_are_mostly_editable():
    """Refusing everything would pass the tests above."""
    editable = total = 0
    for seed in range(12):
        drawn = random.Random(seed)
        net, inputs = build([(drawn.choice(PLAIN), drawn.randrange(70), drawn.randrange(70)) for _ in range(6)])
        for group in surgery.dimension_groups(surgery.trace(net, inputs)):
            if not any(end in group.reason for end in ENDS):
                total += 1
                editable += group.editable
    assert editable > 0.85 * total > 0


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_step_alone_can_be_edited(kind):
    net, inputs = build([("conv", 1, 48), (kind, 0, 41), ("conv", 0, 20)])
    traced = surgery.trace(net, inputs)
    assert any(g.editable for g in surgery.dimension_groups(traced))
    wide = surgery.widen(traced, 2.0)
    assert sum(p.numel() for p in wide.parameters()) > sum(p.numel() for p in traced.parameters())
    assert surgery.verify(wide, net, inputs).ok


@pytest.mark.parametrize("form", ATTENTIONS)
def test_attention_is_edited_by_whole_heads(form):
    """Freezing it would pass the tests above."""
    m, n = ATTENTIONS.index(form), 1 + 3  # two heads of two channels
    net, inputs = build([("conv", 1, 7 * 3), ("attention", 7 * (m + 6 - 1), 7 * (n - 1)), ("conv", 0, 7 * 3)])
    traced = surgery.trace(net, inputs)
    name = "step1_layer.in_proj_weight" if form == "layer" else "step1_qkv"
    groups = surgery.dimension_groups(traced)
    (group,) = (g for g in groups if any(name in (m.layer, m.name) and m.role == "producer" for m in g.members))
    assert group.editable, group.reason
    assert (group.units, group.size) == (2, 12)
    wide, slim = surgery.widen(traced, {group.name: 2.0}), surgery.slim(traced, {group.name: 0.5})
    assert surgery.verify(wide, net, inputs).ok
    packed = group.members[0].name
    assert [len(edited.get_parameter(packed)) for edited in (wide, slim)] == [24, 6]
