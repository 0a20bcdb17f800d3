"""What a model is: its traced graph, the rules of its ops, and its dimension groups."""

from surgery.graph import (  # fill the rule table
    attention,
    contraction,
    embedding,
    maxout,
    movement,
    norms,
    oprules,
    visionrules,
)

__all__ = ["attention", "contraction", "embedding", "maxout", "movement", "norms", "oprules", "visionrules"]
