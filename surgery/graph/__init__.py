"""What a model is: its traced graph, the rules of its ops, and its dimension groups."""

from surgery.graph import attention, contraction, movement, norms, oprules, visionrules  # fill the rule table

__all__ = ["attention", "contraction", "movement", "norms", "oprules", "visionrules"]
