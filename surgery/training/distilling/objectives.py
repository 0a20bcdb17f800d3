"""Objectives: what a student learns from a teacher next to the labels.

An objective says which values of the two networks it compares, and computes a loss from them.
`surgery.training.distilling.observed` taps these values of all objectives at once. A new objective is one subclass of
`Objective`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from surgery.errors import UsageError, unknown_name, whole_number
from surgery.selectors import Where
from surgery.taps.hints import hint_taps, regressor_between
from surgery.taps.network import Tap, TappedNetwork
from surgery.taps.pairing import Guided, as_maps, stage_pairs
from surgery.taps.regressors import REGRESSORS
from surgery.training.distilling import losses
from surgery.training.distilling.review import Review

Values = Sequence[Tensor]
"""Values of one network, one for each pair that an objective compares."""


@dataclass(frozen=True)
class Compared:
    """The values that an objective compares.

    Attributes:
        pairs: pairs of a value of the student and one of the teacher.
        head: a module that is trained with the student. It takes the student's values, one argument for each pair, and
            returns a tuple of as many tensors. None: values are compared as they are.
    """

    pairs: tuple[tuple[Tap, Tap], ...]
    head: nn.Module | None = None


class Objective(ABC):
    """What a student learns from a teacher: the values to compare, and a loss.

    Example:
        >>> class Logits(surgery.Objective):
        ...     def compare(self, student, teacher, seed):
        ...         return Compared(((student.logits(), teacher.logits()),))
        ...     def loss(self, ours, theirs, labels, epoch, epochs):
        ...         return torch.nn.functional.mse_loss(ours[0], theirs[0])
    """

    @abstractmethod
    def compare(self, student: TappedNetwork, teacher: TappedNetwork, seed: int) -> Compared:
        """Choose the values to compare. ``seed`` draws the initial weights of a head."""

    @abstractmethod
    def loss(self, ours: Values, theirs: Values, labels: Tensor, epoch: float, epochs: int) -> Tensor:
        """Compute the weighted loss, a scalar, the mean over the batch.

        Args:
            ours: the student's values of each pair, or the head's outputs for them.
            theirs: the teacher's values.
            labels: class indices (N,).
            epoch: number of epochs done, a fraction within an epoch.
            epochs: number of all epochs.
        """

    def __repr__(self) -> str:
        """The class and its settings, by which a checkpoint recognises an objective."""
        return f"{type(self).__qualname__}({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"


@dataclass(frozen=True)
class KD(Objective):
    """The teacher's softened distribution, as in FitNets (Romero et al., ICLR 2015, equation 2): temperature 3, and a
    weight lambda that decays linearly from 4 to 1, over all epochs or ``decay_epochs``.

    Attributes:
        temperature: tau, the divisor of both logits.
        weight, final_weight: lambda at the beginning and at the end.
        decay_epochs: epochs in which lambda decays; 500 in the paper, and 150 on MNIST.
        form: ``"cross-entropy"``, the paper's, or ``"divergence"``, tau^2 KL (Hinton et al., 2015).
        standardise: standardise logits first (Sun et al., CVPR 2024; with the divergence, a temperature of 2 and a
            weight of 9).
    """

    temperature: float = 3.0
    weight: float = 4.0
    final_weight: float = 1.0
    decay_epochs: int | None = None
    form: str = "cross-entropy"
    standardise: bool = False

    def __post_init__(self) -> None:
        _check_numbers(self, "temperature", above=True)
        _check_numbers(self, "weight", "final_weight")
        if self.decay_epochs is not None:
            whole_number("decay_epochs of KD", self.decay_epochs, 1)
        if self.form not in _FORMS:
            raise unknown_name("form of KD", self.form, _FORMS)

    def compare(self, student: TappedNetwork, teacher: TappedNetwork, seed: int) -> Compared:
        return _compare_logits(student, teacher)

    def loss(self, ours: Values, theirs: Values, labels: Tensor, epoch: float, epochs: int) -> Tensor:
        lambda_ = losses.linear_decay(self.weight, self.final_weight, self.decay_epochs or epochs)
        form = _FORMS[self.form]
        return lambda_(epoch) * form(ours[0], theirs[0], self.temperature, standardise=self.standardise)


_FORMS = {"cross-entropy": losses.kd_cross_entropy, "divergence": losses.kd_divergence}


@dataclass(frozen=True)
class DKD(Objective):
    """Decoupled distillation (Zhao et al., CVPR 2022): see `losses.dkd`. The defaults are the authors'.

    Attributes:
        alpha, beta: the weights of the label's class against all others, and of the others among each other.
        temperature: tau, the divisor of both logits.
        weight: of the loss. It rises linearly from 0 in ``warmup_epochs``.
    """

    alpha: float = 1.0
    beta: float = 8.0
    temperature: float = 4.0
    weight: float = 1.0
    warmup_epochs: float = 20

    def __post_init__(self) -> None:
        _check_numbers(self, "temperature", above=True)
        _check_numbers(self, "alpha", "beta", "weight", "warmup_epochs")

    def compare(self, student: TappedNetwork, teacher: TappedNetwork, seed: int) -> Compared:
        return _compare_logits(student, teacher)

    def loss(self, ours: Values, theirs: Values, labels: Tensor, epoch: float, epochs: int) -> Tensor:
        weight = self.weight * _warm_up(epoch, self.warmup_epochs)
        settings = {"alpha": self.alpha, "beta": self.beta, "temperature": self.temperature}
        return weight * losses.dkd(ours[0], theirs[0], labels, **settings)


@dataclass(frozen=True)
class Hint(Objective):
    """FitNets' hints in the same stage as the labels, as in RepDistiller: the mean squared error of a regressor behind
    the guided layer, per number, weighted by 100; summed over pairs.

    The two-stage original is `surgery.attach_hint`; the regressors, and the layers by default, are the same.

    Attributes:
        guided: a layer or container of the student, several, or a mapping from guided layers to hints; by default the
            layer in the middle.
        hint: as many layers or containers of the teacher; by default the layer in the middle.
        weight: of the loss.
        regressor: ``"auto"``, ``"conv"``, ``"fc"`` or ``"none"``.
    """

    guided: Guided = None
    hint: Where | None = None
    weight: float = 100.0
    regressor: str = "auto"

    def __post_init__(self) -> None:
        _check_numbers(self, "weight")
        if self.regressor not in REGRESSORS:
            raise unknown_name("regressor", self.regressor, REGRESSORS)

    def compare(self, student: TappedNetwork, teacher: TappedNetwork, seed: int) -> Compared:
        pairs = hint_taps(student, teacher, self.guided, self.hint)
        found = [regressor_between(student, teacher, pair, self.regressor, seed + k) for k, pair in enumerate(pairs)]
        return Compared(tuple(pair for _, pair in found), Each([regressor for regressor, _ in found]))

    def loss(self, ours: Values, theirs: Values, labels: Tensor, epoch: float, epochs: int) -> Tensor:
        return self.weight * losses.mean_squared_error(ours, theirs)


class Each(nn.ModuleList):
    """Modules side by side: each takes the tensor at its place."""

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(module(tensor) for module, tensor in zip(self, tensors, strict=True))


@dataclass(frozen=True)
class AttentionTransfer(Objective):
    """Attention maps of the networks (Zagoruyko and Komodakis, ICLR 2017): see `losses.attention_transfer`. Only the
    student is trained; RepDistiller weights it by 1000.

    Attributes:
        guided: layers or containers of the student, or a mapping from them to the teacher's; by default the ends of
            the common number of stages of both networks. Tokens are laid out as maps.
        hint: as many layers or containers of the teacher.
        weight: of the loss.
    """

    guided: Guided = None
    hint: Where | None = None
    weight: float = 1000.0

    def __post_init__(self) -> None:
        _check_numbers(self, "weight")

    def compare(self, student: TappedNetwork, teacher: TappedNetwork, seed: int) -> Compared:
        pairs = stage_pairs(student, teacher, self.guided, self.hint)
        return Compared(tuple(as_maps(student, teacher, pair) for pair in pairs))

    def loss(self, ours: Values, theirs: Values, labels: Tensor, epoch: float, epochs: int) -> Tensor:
        return self.weight * losses.attention_transfer(ours, theirs)


@dataclass(frozen=True)
class ReviewKD(Objective):
    """The teacher's stages, each learned from the student's stage and all deeper ones (Chen et al., CVPR 2021):
    `Review` fuses these, and `losses.hierarchical_context` compares. Weight and warm-up are the authors'.

    Attributes:
        guided: layers or containers of the student, or a mapping from them to the teacher's; by default the ends of
            the common number of stages of both networks, and the inputs of the classifiers.
        hint: as many layers or containers of the teacher.
        weight: of the loss. It rises linearly from 0 in ``warmup_epochs``.
    """

    guided: Guided = None
    hint: Where | None = None
    weight: float = 5.0
    warmup_epochs: float = 20

    def __post_init__(self) -> None:
        _check_numbers(self, "weight", "warmup_epochs")

    def compare(self, student: TappedNetwork, teacher: TappedNetwork, seed: int) -> Compared:
        pairs = stage_pairs(student, teacher, self.guided, self.hint)
        pairs = [as_maps(student, teacher, pair) for pair in sorted(pairs, key=lambda pair: student.order(pair[0]))]
        if self.guided is self.hint is None:
            pairs.append((student.embedding().as_pixel(), teacher.embedding().as_pixel()))
        shapes = [teacher.shape(h) for _, h in pairs]
        review = Review([student.shape(g)[1] for g, _ in pairs], [(c, h, w) for _, c, h, w in shapes], seed)
        return Compared(tuple(pairs), review)

    def loss(self, ours: Values, theirs: Values, labels: Tensor, epoch: float, epochs: int) -> Tensor:
        return self.weight * _warm_up(epoch, self.warmup_epochs) * losses.hierarchical_context(ours, theirs)


@dataclass(frozen=True)
class RKD(Objective):
    """Relations between the samples of a batch, by the inputs of the classifiers (Park et al., CVPR 2019): see
    `losses.rkd`. The weights of the parts are the authors'.

    Attributes:
        weight: of the loss.
        distance_weight, angle_weight: of its two parts.
    """

    weight: float = 1.0
    distance_weight: float = 25.0
    angle_weight: float = 50.0

    def __post_init__(self) -> None:
        _check_numbers(self, "weight", "distance_weight", "angle_weight")

    def compare(self, student: TappedNetwork, teacher: TappedNetwork, seed: int) -> Compared:
        return Compared(((student.embedding(), teacher.embedding()),))

    def loss(self, ours: Values, theirs: Values, labels: Tensor, epoch: float, epochs: int) -> Tensor:
        weights = {"distance_weight": self.distance_weight, "angle_weight": self.angle_weight}
        return self.weight * losses.rkd(ours[0], theirs[0], **weights)


def _compare_logits(student: TappedNetwork, teacher: TappedNetwork) -> Compared:
    pair = student.logits(), teacher.logits()
    ours, theirs = student.shape(pair[0])[1], teacher.shape(pair[1])[1]
    if ours != theirs:
        raise UsageError(
            f"the student has {ours} classes and the teacher {theirs}: logits can only be compared for equal numbers"
        )
    return Compared((pair,))


def _check_numbers(objective: Objective, *names: str, above: bool = False) -> None:
    """Check that settings are finite numbers of at least 0, or ``above`` 0."""
    for name in names:
        value: Any = getattr(objective, name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not number or value < 0 or (above and value == 0):
            least = "above 0" if above else "of at least 0"
            raise UsageError(f"{name} of {type(objective).__name__} must be a number {least}, not {value!r}")


def _warm_up(epoch: float, epochs: float) -> float:
    """The fraction of a weight, which rises from 0 to 1 in the first epochs."""
    return min(1.0, epoch / epochs) if epochs else 1.0
