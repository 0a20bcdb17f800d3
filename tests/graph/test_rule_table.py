"""The rule table as a whole: when it is filled, what changes it, and how a change is undone."""

from __future__ import annotations

import subprocess
import sys

from torch import nn

from surgery.graph import rule_table


class Squash(nn.Module):
    def forward(self, x):
        return x / (1 + x.abs())


def test_a_registration_changes_the_version_and_is_undone_on_request():
    before = rule_table.version()
    with rule_table.restore_rules():
        rule_table.oprule(Squash)(lambda op, x: op.elementwise(x))
        assert rule_table.has_module_rule(Squash())
        assert rule_table.version() > before
        inside = rule_table.version()
    assert not rule_table.has_module_rule(Squash())
    assert rule_table.version() > inside


def test_the_decorator_returns_what_it_decorates():
    def relate(op, x):
        return x.fields

    with rule_table.restore_rules():
        assert rule_table.oprule(Squash)(relate) is relate


def test_the_table_is_full_without_an_import_of_the_rules():
    lines = (
        "from torch import nn",
        "from surgery.graph import rule_table",
        "rule_table.oprule(nn.Linear)(lambda op, x: ())",
        "assert rule_table.has_module_rule(nn.Conv2d(1, 1, 1))",
        "assert rule_table._MODULES[nn.Linear].relate.__name__ == '<lambda>'",
    )
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True)
