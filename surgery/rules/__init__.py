"""The rows of the rule table, one for each op, by subject. Importing this fills `surgery.graph.rule_table`."""

from surgery.rules import (
    attention,
    constants,
    contraction,
    conv_and_linear,
    elementwise,
    movement,
    norms,
    recurrent,
    reductions,
    vision,
)

__all__ = [
    "attention",
    "constants",
    "contraction",
    "conv_and_linear",
    "elementwise",
    "movement",
    "norms",
    "recurrent",
    "reductions",
    "vision",
]
