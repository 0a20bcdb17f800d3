"""Model surgery on torch.fx graphs: widen, deepen, slim, export and measure, exactly."""

from surgery.counting.changes import Changes, changes
from surgery.counting.cost import cost
from surgery.deploy.budget.budget import Budgeted, slim_to_budget
from surgery.deploy.budget.sensitivity import Sensitivity, sensitivity
from surgery.deploy.checkpoint import load, save
from surgery.deploy.curve.tradeoff import tradeoff
from surgery.deploy.measure.benchmark import benchmark, compare, sweep
from surgery.deploy.onnx.export import export_onnx
from surgery.errors import EditError, ExportError, SurgeryError, TraceError, UsageError, VerificationError
from surgery.graph.dims import DimensionGroup, Member, dimension_groups
from surgery.graph.ops import oprule
from surgery.graph.tracing import example_inputs, trace
from surgery.passes.apply import apply, reindex
from surgery.passes.check import RuleCheck, check_rule
from surgery.passes.deepen import deepen
from surgery.passes.hints import HintPair, attach_hint
from surgery.passes.origins import Origin, origins
from surgery.passes.recipe import InsertBlock, InsertDense, InsertIdentity, Noise, Recipe, Reindex, recipe
from surgery.passes.reset import reset_hypothesis
from surgery.passes.slim import masked, slim, split_masks
from surgery.passes.tickets import hold_masked, magnitude_masks, rewind
from surgery.passes.verify import Verification, verify
from surgery.passes.widen import unwidened, widen
from surgery.training.data import load_data
from surgery.training.distill import Distillation, distill
from surgery.training.evaluation import evaluate
from surgery.training.evolve import Evolution, evolve
from surgery.training.growth import Growth
from surgery.training.history import History
from surgery.training.loop import train
from surgery.training.lottery import Lottery, lottery
from surgery.training.objectives import DKD, KD, RKD, AttentionTransfer, Hint, Objective, ReviewKD
from surgery.training.observed import observe
from surgery.training.optimizer import transfer_optimizer
from surgery.version import __version__

__all__ = [
    "DKD",
    "KD",
    "RKD",
    "AttentionTransfer",
    "Budgeted",
    "Changes",
    "DimensionGroup",
    "Distillation",
    "EditError",
    "Evolution",
    "ExportError",
    "Growth",
    "Hint",
    "HintPair",
    "History",
    "InsertBlock",
    "InsertDense",
    "InsertIdentity",
    "Lottery",
    "Member",
    "Noise",
    "Objective",
    "Origin",
    "Recipe",
    "Reindex",
    "ReviewKD",
    "RuleCheck",
    "Sensitivity",
    "SurgeryError",
    "TraceError",
    "UsageError",
    "Verification",
    "VerificationError",
    "__version__",
    "apply",
    "attach_hint",
    "benchmark",
    "changes",
    "check_rule",
    "compare",
    "cost",
    "deepen",
    "dimension_groups",
    "distill",
    "evaluate",
    "evolve",
    "example_inputs",
    "export_onnx",
    "hold_masked",
    "load",
    "load_data",
    "lottery",
    "magnitude_masks",
    "masked",
    "observe",
    "oprule",
    "origins",
    "recipe",
    "reindex",
    "reset_hypothesis",
    "rewind",
    "save",
    "sensitivity",
    "slim",
    "slim_to_budget",
    "split_masks",
    "sweep",
    "trace",
    "tradeoff",
    "train",
    "transfer_optimizer",
    "unwidened",
    "verify",
    "widen",
]
