"""Model surgery on torch.fx graphs: widen, deepen, slim, export and measure, exactly.

``import surgery`` imports nothing else. The first use of a public name imports the module it lives in, so a script that
only slims never loads ONNX, and the command line prints its help without torch.
"""

from typing import TYPE_CHECKING

from surgery.lazy import lazy_names
from surgery.version import __version__ as __version__

_HOMES = {
    "axes.analysis": "dimension_groups",
    "axes.groups": "DimensionGroup Member",
    "axes.labels": "Field Labelled",
    "axes.ops": "Op",
    "counting.changes": "Changes changes",
    "counting.cost": "Cost cost weight_macs",
    "counting.group_cost": "GroupCost group_costs",
    "deploy.budget.budget": "Budgeted slim_to_budget",
    "deploy.budget.sensitivity": "Sensitivity sensitivity write_sensitivity",
    "deploy.classifiers": "classifier data_for",
    "deploy.curve.points": "DataSummary Point Tradeoff",
    "deploy.curve.tradeoff": "tradeoff",
    "deploy.draw": "draw_groups",
    "deploy.generations": "draw_generations",
    "deploy.measure.benchmark": "benchmark BenchmarkResult compare Comparison Ratio sweep",
    "deploy.measure.environment": "environment",
    "deploy.onnx.export": "Export export_onnx",
    "edit.apply": "apply",
    "edit.copies": "Noise",
    "edit.insert_block": "InsertBlock",
    "edit.insert_dense": "InsertDense",
    "edit.insert_identity": "InsertIdentity",
    "edit.origins": "origins",
    "edit.recipe": "Recipe recipe",
    "edit.reindex": "Reindex reindex",
    "edit.step": "AxisOrigin Inserted Origin Step",
    "edit.switch_off": "SwitchOff",
    "errors": "EditError ExportError SurgeryError TraceError UsageError VerificationError WeightsWarning",
    "graph.table": "NodeEdit oprule restore_rules",
    "graph.tracing": "example_inputs trace",
    "models.checkpoint": "load save",
    "models.detectors": "comparable",
    "operations.check_rule": "RuleCheck check_rule",
    "operations.deepen": "deepen",
    "operations.reset": "reset_hypothesis",
    "operations.slim": "masked slim split_masks",
    "operations.tickets": "hold_masked magnitude_masks rewind",
    "operations.verify": "Verification verify",
    "operations.widen": "unwidened widen",
    "selectors": "select",
    "settings": "BudgetSettings DistillSettings EvolveSettings "
    "LotterySettings TimingSettings TradeoffSettings TrainSettings",
    "taps.hints": "HintPair attach_hint",
    "taps.stages": "Stage stages",
    "training.data.cache": "cache_bytes",
    "training.data.data": "Data load_data",
    "training.distilling.distill": "Distillation distill",
    "training.distilling.objectives": "DKD KD RKD AttentionTransfer Hint Objective ReviewKD",
    "training.distilling.observed": "observe",
    "training.engine": "Engine",
    "training.evaluation": "evaluate",
    "training.evolve": "Evolution evolve Generation",
    "training.growth": "Growth",
    "training.history": "History Score",
    "training.loop": "train",
    "training.lottery": "Lottery lottery Ticket",
    "training.optimizer": "transfer_optimizer",
}
"""The module in which each public name lives. `TYPE_CHECKING` below says the same to type checkers and editors."""

_MODULES = ("errors", "folders", "models", "progress", "settings", "units")
"""Modules that are public as a whole, as in ``surgery.models.list_models()``."""

if TYPE_CHECKING:
    from surgery import errors as errors
    from surgery import folders as folders
    from surgery import models as models
    from surgery import progress as progress
    from surgery import settings as settings
    from surgery import units as units
    from surgery.axes.analysis import dimension_groups as dimension_groups
    from surgery.axes.groups import DimensionGroup as DimensionGroup
    from surgery.axes.groups import Member as Member
    from surgery.axes.labels import Field as Field
    from surgery.axes.labels import Labelled as Labelled
    from surgery.axes.ops import Op as Op
    from surgery.counting.changes import Changes as Changes
    from surgery.counting.changes import changes as changes
    from surgery.counting.cost import Cost as Cost
    from surgery.counting.cost import cost as cost
    from surgery.counting.cost import weight_macs as weight_macs
    from surgery.counting.group_cost import GroupCost as GroupCost
    from surgery.counting.group_cost import group_costs as group_costs
    from surgery.deploy.budget.budget import Budgeted as Budgeted
    from surgery.deploy.budget.budget import slim_to_budget as slim_to_budget
    from surgery.deploy.budget.sensitivity import Sensitivity as Sensitivity
    from surgery.deploy.budget.sensitivity import sensitivity as sensitivity
    from surgery.deploy.budget.sensitivity import write_sensitivity as write_sensitivity
    from surgery.deploy.classifiers import classifier as classifier
    from surgery.deploy.classifiers import data_for as data_for
    from surgery.deploy.curve.points import DataSummary as DataSummary
    from surgery.deploy.curve.points import Point as Point
    from surgery.deploy.curve.points import Tradeoff as Tradeoff
    from surgery.deploy.curve.tradeoff import tradeoff as tradeoff
    from surgery.deploy.draw import draw_groups as draw_groups
    from surgery.deploy.generations import draw_generations as draw_generations
    from surgery.deploy.measure.benchmark import BenchmarkResult as BenchmarkResult
    from surgery.deploy.measure.benchmark import Comparison as Comparison
    from surgery.deploy.measure.benchmark import Ratio as Ratio
    from surgery.deploy.measure.benchmark import benchmark as benchmark
    from surgery.deploy.measure.benchmark import compare as compare
    from surgery.deploy.measure.benchmark import sweep as sweep
    from surgery.deploy.measure.environment import environment as environment
    from surgery.deploy.onnx.export import Export as Export
    from surgery.deploy.onnx.export import export_onnx as export_onnx
    from surgery.edit.apply import apply as apply
    from surgery.edit.copies import Noise as Noise
    from surgery.edit.insert_block import InsertBlock as InsertBlock
    from surgery.edit.insert_dense import InsertDense as InsertDense
    from surgery.edit.insert_identity import InsertIdentity as InsertIdentity
    from surgery.edit.origins import origins as origins
    from surgery.edit.recipe import Recipe as Recipe
    from surgery.edit.recipe import recipe as recipe
    from surgery.edit.reindex import Reindex as Reindex
    from surgery.edit.reindex import reindex as reindex
    from surgery.edit.step import AxisOrigin as AxisOrigin
    from surgery.edit.step import Inserted as Inserted
    from surgery.edit.step import Origin as Origin
    from surgery.edit.step import Step as Step
    from surgery.edit.switch_off import SwitchOff as SwitchOff
    from surgery.errors import EditError as EditError
    from surgery.errors import ExportError as ExportError
    from surgery.errors import SurgeryError as SurgeryError
    from surgery.errors import TraceError as TraceError
    from surgery.errors import UsageError as UsageError
    from surgery.errors import VerificationError as VerificationError
    from surgery.errors import WeightsWarning as WeightsWarning
    from surgery.graph.table import NodeEdit as NodeEdit
    from surgery.graph.table import oprule as oprule
    from surgery.graph.table import restore_rules as restore_rules
    from surgery.graph.tracing import example_inputs as example_inputs
    from surgery.graph.tracing import trace as trace
    from surgery.models.checkpoint import load as load
    from surgery.models.checkpoint import save as save
    from surgery.models.detectors import comparable as comparable
    from surgery.operations.check_rule import RuleCheck as RuleCheck
    from surgery.operations.check_rule import check_rule as check_rule
    from surgery.operations.deepen import deepen as deepen
    from surgery.operations.reset import reset_hypothesis as reset_hypothesis
    from surgery.operations.slim import masked as masked
    from surgery.operations.slim import slim as slim
    from surgery.operations.slim import split_masks as split_masks
    from surgery.operations.tickets import hold_masked as hold_masked
    from surgery.operations.tickets import magnitude_masks as magnitude_masks
    from surgery.operations.tickets import rewind as rewind
    from surgery.operations.verify import Verification as Verification
    from surgery.operations.verify import verify as verify
    from surgery.operations.widen import unwidened as unwidened
    from surgery.operations.widen import widen as widen
    from surgery.selectors import select as select
    from surgery.settings import BudgetSettings as BudgetSettings
    from surgery.settings import DistillSettings as DistillSettings
    from surgery.settings import EvolveSettings as EvolveSettings
    from surgery.settings import LotterySettings as LotterySettings
    from surgery.settings import TimingSettings as TimingSettings
    from surgery.settings import TradeoffSettings as TradeoffSettings
    from surgery.settings import TrainSettings as TrainSettings
    from surgery.taps.hints import HintPair as HintPair
    from surgery.taps.hints import attach_hint as attach_hint
    from surgery.taps.stages import Stage as Stage
    from surgery.taps.stages import stages as stages
    from surgery.training.data.cache import cache_bytes as cache_bytes
    from surgery.training.data.data import Data as Data
    from surgery.training.data.data import load_data as load_data
    from surgery.training.distilling.distill import Distillation as Distillation
    from surgery.training.distilling.distill import distill as distill
    from surgery.training.distilling.objectives import DKD as DKD
    from surgery.training.distilling.objectives import KD as KD
    from surgery.training.distilling.objectives import RKD as RKD
    from surgery.training.distilling.objectives import AttentionTransfer as AttentionTransfer
    from surgery.training.distilling.objectives import Hint as Hint
    from surgery.training.distilling.objectives import Objective as Objective
    from surgery.training.distilling.objectives import ReviewKD as ReviewKD
    from surgery.training.distilling.observed import observe as observe
    from surgery.training.engine import Engine as Engine
    from surgery.training.evaluation import evaluate as evaluate
    from surgery.training.evolve import Evolution as Evolution
    from surgery.training.evolve import Generation as Generation
    from surgery.training.evolve import evolve as evolve
    from surgery.training.growth import Growth as Growth
    from surgery.training.history import History as History
    from surgery.training.history import Score as Score
    from surgery.training.loop import train as train
    from surgery.training.lottery import Lottery as Lottery
    from surgery.training.lottery import Ticket as Ticket
    from surgery.training.lottery import lottery as lottery
    from surgery.training.optimizer import transfer_optimizer as transfer_optimizer
else:  # a type checker that saw this would take any name for one of the package
    __getattr__, _HOME = lazy_names(__name__, _HOMES)
    __all__ = ["__version__", *_MODULES, *sorted(_HOME)]

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
