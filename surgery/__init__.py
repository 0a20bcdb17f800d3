"""Model surgery on torch.fx graphs: widen, deepen, slim, export and measure, exactly."""

from surgery.graph.dims import DimensionGroup, Member, dimension_groups
from surgery.graph.oprules import oprule
from surgery.graph.tracing import trace
from surgery.passes.apply import apply, reindex
from surgery.passes.recipe import InsertIdentity, Recipe, Reindex, recipe
from surgery.passes.slim import masked, slim, split_masks
from surgery.passes.verify import Verification, verify
from surgery.passes.widen import widen
