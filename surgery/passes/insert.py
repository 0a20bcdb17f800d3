"""Inserts identity layers and blocks behind existing layers."""

from __future__ import annotations

from torch import nn

from surgery.graph.tracing import TracedModule
from surgery.passes.recipe import InsertIdentity


def insert_identity(module: nn.Module, step: InsertIdentity) -> TracedModule:
    raise AssertionError
