"""What a model is: its traced graph, the rules of its ops, and its dimension groups."""

from surgery.graph import movement, norms, oprules  # fill the rule table

__all__ = ["movement", "norms", "oprules"]
