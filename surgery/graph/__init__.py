"""What a model is: its traced graph, the rules of its ops, and its dimension groups."""

from surgery.graph import oprules  # fills the rule table

__all__ = ["oprules"]
