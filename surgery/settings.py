"""Settings as frozen dataclasses, which the Python API, the command line and the identity of a resumed run share.

Each field states its range and its help text once. A function that takes ``settings`` also takes their fields as
keywords: ``train(model, data, epochs=3)`` equals ``train(model, data, TrainSettings(epochs=3))``.
"""

from __future__ import annotations

import functools
import inspect
import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from numbers import Integral, Real
from typing import Any, Generic, NamedTuple, ParamSpec, Protocol, Self, TypeVar, overload

from surgery.errors import UsageError, unknown_name


class Usual(NamedTuple):
    """The default peak learning rate and weight decay of an optimizer."""

    lr: float
    weight_decay: float


OPTIMIZERS: Mapping[str, Usual] = {
    "sgd": Usual(0.02, 5e-4),
    "adamw": Usual(1e-3, 1e-2),
    "rmsprop": Usual(1e-3, 0.0),
}
"""SGD with Nesterov momentum; AdamW with ``momentum`` as its first beta; RMSProp with ``momentum`` as the decay of the
mean square (the optimizer of the FitNets paper)."""

SCHEDULES = ("one-cycle", "cosine", "warmup-cosine", "constant")
"""Learning rate schedules: see `surgery.training.optimizers.SCHEDULES`."""

PRECISIONS = ("no", "bf16", "fp16")
"""Mixed precision: none, or the dtype of layers where it is safe. Weights and losses stay in float32."""

AUGMENTATIONS: Mapping[str, str] = {
    "none": "nothing",
    "flip": "flips",
    "flip-crop": "crops and flips",
    "randaugment": "RandAugment",
    "trivialaugment": "TrivialAugment",
    "autoaugment": "AutoAugment",
    "augmix": "AugMix",
}
"""Random changes of training images, in words: see `surgery.training.data.augment.AUGMENTATIONS`."""

TRACKERS: Mapping[str, str] = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
"""Where the epochs of a training can be followed, and the package that is needed: see `surgery.training.tracking`."""

DEVICES = ("auto", "cpu", "cuda")
"""Where a command trains; ``auto`` is a GPU where there is one."""

RUNTIMES = (
    "onnxruntime",
    "onnxruntime-tensorrt",
    "onnxruntime-cuda-graphs",
    "torch",
    "torch-compile",
    "torch-cuda-graphs",
)
"""Runtimes that a model can be timed in: see `surgery.deploy.measure.runners`."""

IMPORTANCE: dict[str, str] = {
    "prefix": "the first",
    "magnitude": "those with the largest weights",
    "random": "drawn at random",
    "bn-scale": "those with the largest norm factors",
    "fpgm": "those whose weights are least like the others'",
    "lamp": "those with the largest shares of their layer's squared weights",
    "taylor": "those whose loss would change most, on data",
    "variance": "those that vary most, on data",
    "reconstruction": "those that the others cannot restore, on data",
}
"""Which channels `surgery.slim` keeps, in words. `surgery.importance` adds to them."""

RANKINGS: Mapping[str, str] = {
    "local": "every group keeps its share",
    "global": "the best of all groups together",
    "isomorphic": "the best of groups with the same kinds of layers",
}
"""How channels are compared, in words: see `surgery.operations.importance.ranking`."""

KEEPS = f"Which channels are kept: {', '.join(f'{name} ({words})' for name, words in IMPORTANCE.items())}."

COMPARES = f"How channels are compared: {', '.join(f'{name} ({words})' for name, words in RANKINGS.items())}."

CHANGING = (
    "the images change from one reading to the next (augmentation), so the teacher's outputs cannot be cached: compute "
    "them in each step, or leave out the augmentation"
)
"""Why a teacher's outputs are not kept."""

TEACHERS: Mapping[str, str] = {
    "labels": "on labels",
    "kd": "on labels and the dense model's softened outputs (KD, equation 2 of FitNets)",
    "hints": "on hints from the dense model's middle, then on labels and its softened outputs (FitNets)",
    "evolve": "as the fit-hypothesis of the dense model, which evolves in generations (Knowledge Evolution)",
}
"""What a candidate of a tradeoff learns from. Reports put each text after the word "trained"."""

METHODS: Mapping[str, str] = {
    "finetune": "trained as --teach says",
    "compress": "fitted to the dense model and recovered from it, as surgery compress does",
}
"""How a candidate of a tradeoff goes on from what was carved, in words."""


def option(default: Any, help: str, *, result: bool = True, **rule: Any) -> Any:
    """A field of `Settings`.

    Args:
        help: one sentence, for the command line and the documentation.
        result: whether the result depends on it. Other fields may change when a run is resumed.
        rule: ``least``, ``above``, ``most``, ``below`` or ``choices``; ``joined``, the text that joins several choices;
            ``added`` for a field that identities leave out at its default, so that runs from before it resume;
            ``metavar`` for the command line.
    """
    return field(default=default, metadata={"help": help, "result": result, **rule})


class Settings:
    """Base of all settings. Each field is checked when an instance is made."""

    def __post_init__(self) -> None:
        check_fields(self)

    @classmethod
    def of(cls, settings: Settings | None, changes: Mapping[str, Any]) -> Self:
        """``settings``, or the defaults, with ``changes``. Settings of a base class fill the fields that they have."""
        if settings is None:
            return cls(**changes)
        if isinstance(settings, cls):
            return replace(settings, **changes) if changes else settings  # type: ignore[type-var]
        if not (isinstance(settings, Settings) and issubclass(cls, type(settings))):
            raise UsageError(f"settings must be a surgery.{cls.__name__}, not {settings!r}")
        return cls(**{**{one.name: getattr(settings, one.name) for one in _fields(settings)}, **changes})

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON data."""
        values = {one.name: getattr(self, one.name) for one in _fields(self)}
        return {name: os.fspath(value) if isinstance(value, os.PathLike) else value for name, value in values.items()}

    def identity(self) -> dict[str, Any]:
        """The fields that the result depends on, as plain JSON data. A resumed run must have the same."""
        values = self.to_dict()
        kept = [
            one.name
            for one in _fields(self)
            if one.metadata["result"] and not (one.metadata.get("added") and values[one.name] == one.default)
        ]
        return {name: values[name] for name in kept}


@dataclass(frozen=True, kw_only=True)
class TrainSettings(Settings):
    """How a model is trained. The fields are the keywords of `surgery.train` and options of the command line.

    Example:
        >>> surgery.train(model, data, TrainSettings(epochs=3, optimizer="adamw", lr=1e-3))
    """

    epochs: int = option(10, "Passes over the training images.", least=1)
    optimizer: str = option("sgd", f"{', '.join(OPTIMIZERS)}.", choices=OPTIMIZERS)
    lr: float | None = option(None, "Peak learning rate. [default: usual with the optimizer]", above=0)
    batch_size: int = option(64, "Images of one training step, all processes together.", least=2)
    momentum: float = option(0.9, "Momentum of SGD; first beta of adamw; decay of rmsprop.", least=0, below=1)
    weight_decay: float | None = option(
        None, "Decay of weights; biases and norms have none. [default: usual with the optimizer]", least=0
    )
    label_smoothing: float = option(0.0, "Smoothing of the labels, from 0 to 1.", least=0, most=1)
    schedule: str = option("one-cycle", f"{', '.join(SCHEDULES)}.", choices=SCHEDULES)
    augment: str = option(
        "none", f"Training images: {', '.join(AUGMENTATIONS)}; several joined by +.", choices=AUGMENTATIONS, joined="+",
        what="augmentation", added=True,
    )  # fmt: skip
    erase: float = option(
        0.0, "Probability that a part of a training image is erased (RandomErasing).", least=0, most=1, added=True
    )
    mixup: float = option(
        0.0, "Alpha of MixUp, which mixes training images and labels; 0.2 is usual, 0: none.", least=0, added=True
    )
    cutmix: float = option(
        0.0, "Alpha of CutMix; with --mixup too, each batch takes one of both. 1 is usual, 0: none.", least=0,
        added=True,
    )  # fmt: skip
    seed: int = option(0, "Seed of everything random.", least=0)
    precision: str | None = option(
        None, "no, bf16 or fp16. [default: no, or what accelerate launch says]", choices=PRECISIONS
    )
    compile: bool = option(
        False,
        "Train and score under torch.compile: faster steps after a while; other rounding and dropout.",
        added=True,
    )
    workers: int = option(0, "Processes that read images; 0 reads them in this one.", result=False, least=0)
    evaluation_batch: int = option(250, "Images of one call that scores.", result=False, least=1)
    test_each_epoch: bool = option(False, "Score on the test images after each epoch.", result=False)
    checkpoint_every: int | None = option(
        None, "Steps between checkpoints; there is one after each epoch too.", result=False, least=1, metavar="STEPS"
    )
    tracker: str | None = option(
        None,
        f"Log epochs to {', '.join(TRACKERS)}; with a folder (tensorboard), project or experiment: tensorboard:DIR.",
        result=False,
        metavar="NAME[:WHERE]",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        name = None if self.tracker is None else self.tracker.partition(":")[0]
        if name is not None and name not in TRACKERS:
            raise unknown_name("tracker", name, TRACKERS)

    @property
    def peak_lr(self) -> float:
        """The peak learning rate: ``lr``, or the default of the optimizer."""
        return OPTIMIZERS[self.optimizer].lr if self.lr is None else self.lr

    @property
    def decay(self) -> float:
        """The weight decay: ``weight_decay``, or the default of the optimizer."""
        return OPTIMIZERS[self.optimizer].weight_decay if self.weight_decay is None else self.weight_decay

    @property
    def mixes(self) -> bool:
        """Whether images are mixed, so that a label is a probability for each class."""
        return bool(self.mixup or self.cutmix)

    @property
    def augments(self) -> bool:
        """Whether training images are changed at random."""
        return bool(self.augment != "none" or self.erase or self.mixes)

    @property
    def augmented(self) -> str:
        """What training images are changed by, in words; empty for nothing."""
        named = [AUGMENTATIONS[name] for name in self.augment.split("+") if name != "none"]
        values = {"RandomErasing": self.erase, "MixUp": self.mixup, "CutMix": self.cutmix}
        return ", ".join([*named, *(f"{name} {value:g}" for name, value in values.items() if value)])

    @property
    def scoring(self) -> dict[str, Any]:
        """How images are read that score a model: keywords of `surgery.evaluate`."""
        return {"batch_size": self.evaluation_batch, "workers": self.workers}

    def identity(self) -> dict[str, Any]:
        """The fields that the weights depend on, with the effective learning rate and weight decay."""
        return {**super().identity(), "lr": self.peak_lr, "weight_decay": self.decay}

    def training(self, **changes: Any) -> TrainSettings:
        """Return the fields of `TrainSettings` alone, with ``changes``, for `surgery.train`."""
        return TrainSettings(**{**{one.name: getattr(self, one.name) for one in fields(TrainSettings)}, **changes})


@dataclass(frozen=True, kw_only=True)
class DistillSettings(TrainSettings):
    """How a student is taught in the two stages of FitNets. `TrainSettings` apply to both.

    The default optimizer is AdamW: a hint's loss grows with the size of its layer, and Adam's steps do not.
    """

    epochs: int = option(10, "Passes over the data in stage 2, labels and losses; 0 skips it.", least=0)
    optimizer: str = option("adamw", f"{', '.join(OPTIMIZERS)}.", choices=OPTIMIZERS)
    hint_epochs: int = option(5, "Passes over the data in stage 1, hints; 0 skips it.", least=0)
    hint_lr: float | None = option(None, "Peak learning rate in stage 1. [default: --lr]", above=0)
    regressor: str = option(
        "auto", "From guided layer to hint: auto, conv, fc or none.", choices=("auto", "conv", "fc", "none")
    )
    label_weight: float = option(1.0, "Weight of the labels' cross-entropy in stage 2.", least=0)
    cache: str | os.PathLike[str] = option(
        "auto", "Keep the teacher's outputs: auto, memory, none or a folder.", result=False, metavar="WHERE"
    )
    channels_last: bool = option(False, "Keep channels innermost in memory: often faster for convolutions.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.epochs and not self.hint_epochs:
            raise UsageError("hint_epochs and epochs are 0: there is nothing to train")
        if self.augments and self.cache not in ("auto", "none"):
            raise UsageError(CHANGING)

    def refuse_mixed(self, objectives: Iterable[Any]) -> None:
        """Raise `UsageError` for an objective that needs the class of each image, where images are mixed."""
        hard = [type(one).__name__ for one in objectives if not getattr(one, "takes_mixed", True)]
        if self.mixes and self.epochs and hard:
            raise UsageError(f"{hard[0]} needs one class for each image: leave out mixup and cutmix")


@dataclass(frozen=True, kw_only=True)
class EvolveSettings(TrainSettings):
    """How a network evolves. `TrainSettings` apply to each generation."""

    epochs: int = option(10, "Passes over the data in each generation.", least=1)
    kind: str = option(
        "kels",
        "Fit-hypothesis: kels (channels) or wels (scattered weights, no slim model).",
        choices=("kels", "wels"),
    )
    recalibrate: bool = option(False, "Measure the slim model's BatchNorm statistics on training images.")
    long: bool = option(False, "Also train for all epochs in one go, for comparison.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind == "wels" and self.recalibrate:
            raise UsageError("recalibrate is for the slim network, and WELS gives none")


@dataclass(frozen=True, kw_only=True)
class LotterySettings(TrainSettings):
    """How lottery tickets are trained. `TrainSettings` apply to each."""

    rewind_to: int = option(0, "Training step whose weights the ticket takes; 0 is the initialisation.", least=0)
    scope: str = option("layer", "Where weights are compared: layer or global.", choices=("layer", "global"))
    vectors: bool = option(False, "Prune biases and norms as well.")


@dataclass(frozen=True, kw_only=True)
class TimingSettings(Settings):
    """How models are timed. The fields are the keywords of `surgery.benchmark` and options of the command line.

    Warm-up ends when the median of five runs is within 5% of the median of the five before.
    """

    runtime: str = option("onnxruntime", f"{', '.join(RUNTIMES)}.", choices=RUNTIMES)
    batch_size: int = option(1, "Samples of one query, axis 0 of the inputs.", least=1)
    threads: int | None = option(None, "Threads of one query. [default: all usable cores]", least=1)
    device: str = option("cpu", "cpu or cuda.", choices=("cpu", "cuda"))
    warmup: float = option(5.0, "Seconds of warm-up, at most.", least=0)
    min_runs: int = option(100, "Queries of each model, at least.", least=1)
    min_seconds: float = option(1.0, "Seconds spent on each model, at least.", least=0)
    sessions: int = option(10, "Times that each model is set up: 1, or at least 6 to compare over them.", least=1)
    confidence: float = option(0.95, "Confidence of the intervals of ratios.", above=0, below=1)
    memory: bool = option(True, "Measure peak memory too, in a separate process (some seconds).")
    seed: int = option(0, "Seed of the orders and the resamples.", least=0)

    def timing(self, **changes: Any) -> TimingSettings:
        """Return the fields of `TimingSettings` alone, with ``changes``, for `surgery.benchmark`."""
        return TimingSettings(**{**{one.name: getattr(self, one.name) for one in fields(TimingSettings)}, **changes})


@dataclass(frozen=True, kw_only=True)
class BudgetSettings(TimingSettings):
    """How to search for a model that keeps to a budget. `TimingSettings` say how models are timed.

    With ``by="stage"`` a rate is for all groups of a stage (`surgery.deploy.budget.parts.find_parts`).
    """

    by: str = option("group", "What gets its own rate: group or stage.")
    least: float = option(0.125, "Lowest rate at which a part is slimmed.", above=0, most=1)
    tolerance: float = option(0.05, "Stop at a model that takes at least 1 - tolerance of the budget.", above=0, most=1)
    rounds: int = option(8, "Models to make and measure on the way, at most.", least=1)
    round_to: int | None = option(
        None,
        "Round numbers of channels up to a multiple of this. [default: 1; with --latency 1, 8, 16 or 32, what is "
        "measured to be faster]",
        least=1,
    )


@dataclass(frozen=True, kw_only=True)
class TradeoffSettings(TrainSettings):
    """How the models of a speed/accuracy curve are made, trained and timed. `TrainSettings` apply to each training."""

    round_to: int = option(1, "Round widths up to a multiple of this.", least=1)
    importance: str = option("prefix", KEEPS, choices=IMPORTANCE)
    epochs: int = option(5, "Passes over the data for the dense model; 0 takes it as is.", least=0)
    finetune_epochs: int = option(3, "Passes over the data for each candidate.", least=0)
    teach: str = option(
        "labels", f"What candidates learn from: {', '.join(TEACHERS)}; the dense model teaches.", choices=TEACHERS
    )
    method: str = option(
        "finetune",
        f"How candidates go on: {', '.join(f'{name} ({words})' for name, words in METHODS.items())}.",
        choices=METHODS,
    )
    hint_epochs: int = option(1, "For hints: passes over the data for stage 1.", least=1)
    seeds: int = option(
        1,
        "Train each candidate with so many seeds, from --seed on: accuracies are means, with intervals over seeds.",
        least=1,
    )
    generations: int = option(3, "For evolve: number of generations, of --finetune-epochs each.", least=1)
    control: str = option(
        "none",
        "Beside each candidate: none, or scratch, a model of its sizes with new weights, trained on labels for as many "
        "epochs as the dense model and the candidate together.",
        choices=("none", "scratch"),
    )
    device: str = option(
        "auto", "To train on: auto (a GPU where there is one), cpu or cuda.", choices=DEVICES, result=False
    )
    image_size: int | None = option(None, "Side in pixels. [default: the data's own]", least=1)
    weights: str | None = option(
        None,
        "torchvision's weights, none, DEFAULT or one by name, or a .safetensors or .pth file.",
        metavar="NAME|FILE",
    )
    data_root: str | os.PathLike[str] | None = option(
        None, "Folder of torchvision's data sets.", result=False, metavar="DIR"
    )
    limit: int | None = option(None, "Largest number of training, and of test, images.", least=1)
    skip_bad: bool = option(False, "Leave out images that cannot be read.", result=False)
    strict: bool = option(False, "Identify data by the content of every file, not by size and date.", result=False)
    threads: int | None = option(None, "Threads of one query. [default: all usable cores]", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seeds > 1 and not self.finetune_epochs:
            raise UsageError(f"seeds is {self.seeds}, and finetune_epochs 0: without training all seeds give the same")
        if self.method == "compress" and self.teach != "labels":
            raise UsageError(f"method is compress, where the dense model teaches: leave out teach, {self.teach}")

    @property
    def every_seed(self) -> range:
        """The seeds that each candidate is trained with."""
        return range(self.seed, self.seed + self.seeds)

    def compressing(self) -> CompressSettings:
        """For the method ``compress``: how a candidate is recovered; at most ``finetune_epochs``."""
        own = {"epochs": self.finetune_epochs, "importance": self.importance}
        return CompressSettings.of(self.training(epochs=max(1, self.finetune_epochs)), own)


@dataclass(frozen=True, kw_only=True)
class CompressSettings(TrainSettings):
    """How a model is compressed: carved in steps, compensated, and recovered by distillation.

    `TrainSettings` apply to each recovery, with ``lr`` the base of the rate rule
    (`surgery.deploy.compress.recovery.recovery_rate`).
    """

    steps: int = option(1, "Times to carve and recover, each to a smaller budget; they shrink geometrically.", least=1)
    epochs: int = option(
        10, "Passes over the data after the last carving, at most; 0 leaves the student as it was compensated.", least=0
    )
    between_epochs: int | None = option(
        None, "The same after each earlier carving. [default: a third of --epochs, rounded up]", least=0
    )
    optimizer: str = option("adamw", f"{', '.join(OPTIMIZERS)}.", choices=OPTIMIZERS)
    schedule: str = option("cosine", f"{', '.join(SCHEDULES)}.", choices=SCHEDULES)
    lr: float | None = option(
        None,
        "Peak learning rate where all accuracy is lost; less damage takes less. [default: 5 times the usual with the "
        "optimizer]",
        above=0,
    )
    lr_least: float = option(0.2, "Least share of --lr, where little accuracy is lost.", above=0, most=1)
    lr_most: float = option(1.0, "Largest share of --lr.", above=0, most=1)
    patience: int = option(
        5, "Stop after so many epochs without a rise of the validation score beyond its interval.", least=1
    )
    validation: float = option(
        0.1, "Part of each class of the training images that decides and is not trained on.", above=0, below=1
    )
    hint_weight: float = option(
        0.0, "Weight of hints, the dense model's values at the ends of its stages; 0 learns outputs alone.", least=0
    )
    label_weight: float = option(1.0, "Weight of the labels' cross-entropy.", least=0)
    importance: str = option("magnitude", KEEPS, choices=IMPORTANCE)
    by: str = option("group", "What gets its own rate: group or stage.", choices=("group", "stage"))
    least: float = option(0.125, "Lowest rate at which one carving slims a part.", above=0, most=1)
    round_to: int | None = option(
        None,
        "Round numbers of channels up to a multiple of this. [default: 1; with --latency 1, 8, 16 or 32, what is "
        "measured to be faster]",
        least=1,
    )
    runtime: str = option("onnxruntime", f"For a latency: {', '.join(RUNTIMES)}.", choices=RUNTIMES)
    threads: int | None = option(None, "Threads of one query. [default: all usable cores]", least=1)
    onnx: bool = option(False, "Export both models to ONNX, and time the files.", result=False)
    cache: str | os.PathLike[str] = option(
        "auto", "Keep the teacher's outputs: auto, memory, none or a folder.", result=False, metavar="WHERE"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lr_least > self.lr_most:
            raise UsageError(f"lr_least is {self.lr_least:g}: it must be at most lr_most, {self.lr_most:g}")

    @property
    def peak_lr(self) -> float:
        """The base of the rate rule: ``lr``, or 5 times the default of the optimizer."""
        return 5 * OPTIMIZERS[self.optimizer].lr if self.lr is None else self.lr

    def epochs_of(self, step: int) -> int:
        """The most epochs of the recovery after the carving of that number, from 1."""
        if step == self.steps:
            return self.epochs
        return -(-self.epochs // 3) if self.between_epochs is None else self.between_epochs

    def budget(self) -> BudgetSettings:
        """The settings of each search for widths."""
        shared = ("by", "least", "round_to", "runtime", "threads", "seed")
        return BudgetSettings(**{name: getattr(self, name) for name in shared})

    def recovery(self, step: int, lr: float) -> DistillSettings:
        """The settings of the recovery after the carving of that number, at a peak rate of ``lr``."""
        own = {"hint_epochs": 0, "label_weight": self.label_weight, "cache": self.cache}
        return DistillSettings.of(self.training(epochs=self.epochs_of(step), lr=lr), own)


P = ParamSpec("P")
R = TypeVar("R", covariant=True)


class _Accepts(Protocol, Generic[P, R]):
    """A function that also takes the fields of its settings as keywords."""

    @overload
    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R: ...
    @overload
    def __call__(self, *args: Any, **kwargs: Any) -> R: ...


def accepts(kind: type[Settings], **renamed: str) -> Callable[[Callable[P, R]], _Accepts[P, R]]:
    """Let a function take the fields of its ``settings`` as keywords.

    The function always receives ``settings`` of this ``kind``: the defaults where none are given.

    Args:
        renamed: current keyword by old name; the old name still works, with a `DeprecationWarning`.
    """
    names = {one.name for one in fields(kind)}  # type: ignore[arg-type]

    def decorate(function: Callable[P, R]) -> _Accepts[P, R]:
        signature = inspect.signature(function)
        own = names - signature.parameters.keys()

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> R:
            for old in renamed.keys() & kwargs.keys():
                new = renamed[old]
                warnings.warn(f"{function.__name__}: {old}= is now {new}=", DeprecationWarning, stacklevel=2)
                if new in kwargs:
                    raise UsageError(f"{function.__name__} was given both {new}= and its old name {old}=")
                kwargs[new] = kwargs.pop(old)
            changes = {name: kwargs.pop(name) for name in own & kwargs.keys()}
            bound = signature.bind(*args, **kwargs)
            bound.arguments["settings"] = kind.of(bound.arguments.get("settings"), changes)
            return function(*bound.args, **bound.kwargs)

        return call

    return decorate


def renamed(name: str, old: str) -> Any:
    """A property under the ``old`` name of the attribute ``name``; reading it warns."""

    def read(self: Any) -> Any:
        warnings.warn(f"{type(self).__name__}.{old} is now .{name}", DeprecationWarning, stacklevel=2)
        return getattr(self, name)

    return property(read, doc=f"The old name of ``{name}``.")


def check_fields(instance: Any, of: str = "") -> None:
    """Check the fields of a new frozen dataclass against their `option`, and store them as plain Python.

    Args:
        of: follows the name of a field in messages, such as ``" of KD"``.

    Raises:
        UsageError: says what the field may be.
    """
    for one in (one for one in fields(instance) if one.metadata):
        object.__setattr__(instance, one.name, _check_field(one, one.name + of, getattr(instance, one.name)))


def _fields(settings: Settings) -> Sequence[Field[Any]]:
    return fields(settings)  # type: ignore[arg-type]


def _check_field(one: Field[Any], name: str, value: Any) -> Any:
    kind, *others = str(one.type).split(" | ")
    if value is None and "None" in others:
        return None
    if "choices" in one.metadata:
        parts = value.split(one.metadata["joined"]) if "joined" in one.metadata and isinstance(value, str) else [value]
        for part in (part for part in parts if part not in one.metadata["choices"]):
            raise unknown_name(one.metadata.get("what", name.replace("_", " ")), part, one.metadata["choices"])
    if kind == "bool" and not isinstance(value, bool):
        raise UsageError(f"{name} must be True or False, not {value!r}")
    if kind == "str" and not (isinstance(value, (str, os.PathLike)) and os.fspath(value)):
        raise UsageError(f"{name} must be a text that is not empty, not {value!r}")
    return _check_number(one, name, kind, value) if kind in ("int", "float") else value


def _check_number(one: Field[Any], name: str, kind: str, value: Any) -> int | float:
    wanted = Integral if kind == "int" else Real
    rule = one.metadata
    fits = isinstance(value, wanted) and not isinstance(value, bool) and math.isfinite(value)
    fits = fits and value >= rule.get("least", -math.inf) and value <= rule.get("most", math.inf)
    if not (fits and value > rule.get("above", -math.inf) and value < rule.get("below", math.inf)):
        said = {"least": "of at least", "above": "above", "most": "at most", "below": "below"}
        bounds = " and ".join(f"{words} {rule[key]}" for key, words in said.items() if key in rule)
        what = "a whole number" if kind == "int" else "a number"
        raise UsageError(f"{name} must be {what} {bounds or 'that is finite'}, not {value!r}")
    return int(value) if kind == "int" else float(value)
