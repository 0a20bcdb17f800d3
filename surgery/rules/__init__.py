"""The rows of the rule table, one for each op, by subject. Importing this fills `surgery.graph.rule_table`."""

from surgery.rules import (
    attention,
    constants,
    contraction,
    elementwise,
    movement,
    norms,
    recurrent,
    reductions,
    vision,
    weights,
)

__all__ = [
    "attention",
    "constants",
    "contraction",
    "elementwise",
    "movement",
    "norms",
    "recurrent",
    "reductions",
    "vision",
    "weights",
]
