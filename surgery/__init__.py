"""Model surgery on torch.fx graphs: widen, deepen, slim, export and measure, exactly."""

from surgery.axes.groups import DimensionGroup, Member, dimension_groups
from surgery.counting.changes import Changes, changes
from surgery.counting.cost import Cost, cost
from surgery.deploy.budget.budget import Budgeted, slim_to_budget
from surgery.deploy.budget.sensitivity import Sensitivity, sensitivity, write_sensitivity
from surgery.deploy.classifiers import classifier, data_for
from surgery.deploy.curve.points import DataSummary, Point, Tradeoff
from surgery.deploy.curve.tradeoff import tradeoff
from surgery.deploy.generations import draw_generations
from surgery.deploy.measure.benchmark import BenchmarkResult, Comparison, Ratio, benchmark, compare, sweep
from surgery.deploy.measure.environment import environment
from surgery.deploy.onnx.export import Export, export_onnx
from surgery.edit.apply import apply, reindex
from surgery.edit.origins import Origin, origins
from surgery.edit.recipe import InsertBlock, InsertDense, InsertIdentity, Noise, Recipe, Reindex, recipe
from surgery.errors import EditError, ExportError, SurgeryError, TraceError, UsageError, VerificationError
from surgery.graph.table import oprule
from surgery.graph.tracing import example_inputs, trace
from surgery.models.checkpoint import load, save
from surgery.operations.check_rule import RuleCheck, check_rule
from surgery.operations.deepen import deepen
from surgery.operations.reset import reset_hypothesis
from surgery.operations.slim import masked, slim, split_masks
from surgery.operations.tickets import hold_masked, magnitude_masks, rewind
from surgery.operations.verify import Verification, verify
from surgery.operations.widen import unwidened, widen
from surgery.settings import (
    BudgetSettings,
    DistillSettings,
    EvolveSettings,
    LotterySettings,
    TimingSettings,
    TradeoffSettings,
    TrainSettings,
)
from surgery.taps.hints import HintPair, attach_hint
from surgery.training.data.cache import cache_bytes
from surgery.training.data.data import Data, load_data
from surgery.training.distilling.distill import Distillation, distill
from surgery.training.distilling.objectives import DKD, KD, RKD, AttentionTransfer, Hint, Objective, ReviewKD
from surgery.training.distilling.observed import observe
from surgery.training.engine import Engine
from surgery.training.evaluation import evaluate
from surgery.training.evolve import Evolution, Generation, evolve
from surgery.training.growth import Growth
from surgery.training.history import History, Score
from surgery.training.loop import train
from surgery.training.lottery import Lottery, Ticket, lottery
from surgery.training.optimizer import transfer_optimizer
from surgery.version import __version__

__all__ = [
    "DKD",
    "KD",
    "RKD",
    "AttentionTransfer",
    "BenchmarkResult",
    "BudgetSettings",
    "Budgeted",
    "Changes",
    "Comparison",
    "Cost",
    "Data",
    "DataSummary",
    "DimensionGroup",
    "DistillSettings",
    "Distillation",
    "EditError",
    "Engine",
    "Evolution",
    "EvolveSettings",
    "Export",
    "ExportError",
    "Generation",
    "Growth",
    "Hint",
    "HintPair",
    "History",
    "InsertBlock",
    "InsertDense",
    "InsertIdentity",
    "Lottery",
    "LotterySettings",
    "Member",
    "Noise",
    "Objective",
    "Origin",
    "Point",
    "Ratio",
    "Recipe",
    "Reindex",
    "ReviewKD",
    "RuleCheck",
    "Score",
    "Sensitivity",
    "SurgeryError",
    "Ticket",
    "TimingSettings",
    "TraceError",
    "Tradeoff",
    "TradeoffSettings",
    "TrainSettings",
    "UsageError",
    "Verification",
    "VerificationError",
    "__version__",
    "apply",
    "attach_hint",
    "benchmark",
    "cache_bytes",
    "changes",
    "check_rule",
    "classifier",
    "compare",
    "cost",
    "data_for",
    "deepen",
    "dimension_groups",
    "distill",
    "draw_generations",
    "environment",
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
    "write_sensitivity",
]
