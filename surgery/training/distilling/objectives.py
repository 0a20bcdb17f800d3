"""Objectives: what a student learns from a teacher besides the labels.

An objective says which values of the two networks it compares and what that costs;
`surgery.training.distilling.observed` takes the values out of both, all at once.
A new objective is one subclass of `Objective`.
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

"""Layers or containers of the student; or a mapping from them to those of the teacher."""


@dataclass(frozen=True)
class Compared:
    """The values that an objective compares.

    Attributes:
        pairs: of a value of the student and one of the teacher.
        head: is trained with the student. It takes its values, as many arguments as there are pairs, and gives a tuple
            of as many tensors. None: they are compared as they are.
    """

    pairs: tuple[tuple[Tap, Tap], ...]
    head: nn.Module | None = None


class Objective(ABC):
    """What a student learns from a teacher: the values to compare, and a loss."""

    @abstractmethod
    def compared(self, student: TappedNetwork, teacher: TappedNetwork, seed: int) -> Compared:
        """What is compared. ``seed`` is that of a head's initial weights."""

    @abstractmethod
    def loss(
        self, ours: Sequence[Tensor], theirs: Sequence[Tensor], labels: Tensor, epoch: float, epochs: int
    ) -> Tensor:
        """The weighted loss, a scalar: the mean over the batch.

        Args:
            ours: the student's values of each pair, or what the head gives for them.
            theirs: the teacher's.
            labels: class indices (N,).
            epoch: how many epochs are done, a fraction within one.
            epochs: how many there are in all.
        """

    def __repr__(self) -> str:
        """With its settings: a checkpoint knows objectives by it."""
        return f"{type(self).__qualname__}({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"


@dataclass(frozen=True)
class KD(Objective):
    """The teacher's softened distribution, as in FitNets (Romero et al., ICLR 2015, equation 2): temperature 3, and a
    weight lambda that decays linearly from 4 to 1, over all epochs or ``decay_epochs``.

    Attributes:
        temperature: tau, which the logits of both are divided by.
        weight, final_weight: lambda at first and in the end.
        decay_epochs: in how many epochs it decays; the paper has 500, and 150 on MNIST.
        form: ``"cross-entropy"``, the paper's, or ``"divergence"``, tau^2 KL (Hinton et al., 2015).
        standardise: whether logits are standardised before (Sun et al., CVPR 2024; with the divergence, a temperature
            of 2 and a weight of 9).
    """

    temperature: float = 3.0
    weight: float = 4.0
    final_weight: float = 1.0
    decay_epochs: int | None = None
    form: str = "cross-entropy"
    standardise: bool = False

    def __post_init__(self) -> None:
        _check(self, "temperature", above=True)
        _check(self, "weight", "final_weight")
        if self.decay_epochs is not None:
            whole_number("decay_epochs of KD", self.decay_epochs, 1)
        if self.form not in _FORMS:
            raise unknown_name("form of KD", self.form, _FORMS)

    def compared(self, student: TappedNetwork, teacher: TappedNetwork, seed: int) -> Compared:
        return _compared_logits(student, teacher)

    def loss(
        self, ours: Sequence[Tensor], theirs: Sequence[Tensor], labels: Tensor, epoch: float, epochs: int
    ) -> Tensor:
        lambda_ = losses.linear_decay(self.weight, self.final_weight, self.decay_epochs or epochs)
        form = _FORMS[self.form]
        return lambda_(epoch) * form(ours[0], theirs[0], self.temperature, standardise=self.standardise)


_FORMS = {"cross-entropy": losses.kd_cross_entropy, "divergence": losses.kd_divergence}


@dataclass(frozen=True)
class DKD(Objective):
    """Decoupled distillation (Zhao et al., CVPR 2022): see `losses.dkd`. The defaults are the authors'.

    Attributes:
        alpha, beta: the weights of the label's class against all others, and of the others among each other.
        temperature: tau, which the logits of both are divided by.
        weight: of the loss, which it reaches linearly from 0 in ``warmup_epochs``.
    """

    alpha: float = 1.0
    beta: float = 8.0
    temperature: float = 4.0
    weight: float = 1.0
    warmup_epochs: float = 20

    def __post_init__(self) -> None:
        _check(self, "temperature", above=True)
        _check(self, "alpha", "beta", "weight", "warmup_epochs")

    def compared(self, student: TappedNetwork, teacher: TappedNetwork, seed: int) -> Compared:
        return _compared_logits(student, teacher)

    def loss(
        self, ours: Sequence[Tensor], theirs: Sequence[Tensor], labels: Tensor, epoch: float, epochs: int
    ) -> Tensor:
        weight = self.weight * _warm(epoch, self.warmup_epochs)
        settings = {"alpha": self.alpha, "beta": self.beta, "temperature": self.temperature}
        return weight * losses.dkd(ours[0], theirs[0], labels, **settings)


@dataclass(frozen=True)
class Hint(Objective):
    """FitNets' hints in one stage with all else, as RepDistiller has them: the mean squared error, per number, of what
    a regressor makes of the guided layer's output, weighted by 100; summed over pairs.

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
        _check(self, "weight")
        if self.regressor not in REGRESSORS:
            raise unknown_name("regressor", self.regressor, REGRESSORS)

    def compared(self, student: TappedNetwork, teacher: TappedNetwork, seed: int) -> Compared:
        pairs = hint_taps(student, teacher, self.guided, self.hint)
        found = [regressor_between(student, teacher, pair, self.regressor, seed + k) for k, pair in enumerate(pairs)]
        return Compared(tuple(pair for _, pair in found), Each([regressor for regressor, _ in found]))

    def loss(
        self, ours: Sequence[Tensor], theirs: Sequence[Tensor], labels: Tensor, epoch: float, epochs: int
    ) -> Tensor:
        return self.weight * losses.mean_squared_error(ours, theirs)


class Each(nn.ModuleList):
    """Modules side by side: each takes the tensor at its place."""

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(module(tensor) for module, tensor in zip(self, tensors, strict=True))


@dataclass(frozen=True)
class AttentionTransfer(Objective):
    """Where the networks look (Zagoruyko and Komodakis, ICLR 2017): see `losses.attention_transfer`. Nothing is trained
    for it but the student; RepDistiller weights it by 1000.

    Attributes:
        guided: layers or containers of the student, or a mapping from them to the teacher's; by default the ends of
            the stages of both networks, of as many as both have. Tokens are laid out as maps.
        hint: as many layers or containers of the teacher.
        weight: of the loss.
    """

    guided: Guided = None
    hint: Where | None = None
    weight: float = 1000.0

    def __post_init__(self) -> None:
        _check(self, "weight")

    def compared(self, student: TappedNetwork, teacher: TappedNetwork, seed: int) -> Compared:
        pairs = stage_pairs(student, teacher, self.guided, self.hint)
        return Compared(tuple(as_maps(student, teacher, pair) for pair in pairs))

    def loss(
        self, ours: Sequence[Tensor], theirs: Sequence[Tensor], labels: Tensor, epoch: float, epochs: int
    ) -> Tensor:
        return self.weight * losses.attention_transfer(ours, theirs)


@dataclass(frozen=True)
class ReviewKD(Objective):
    """The teacher's stages, each learned from the student's own and all deeper ones (Chen et al., CVPR 2021): `Review`
    fuses these, and `losses.hierarchical_context` compares. Weight and warm-up are the authors'.

    Attributes:
        guided: layers or containers of the student, or a mapping from them to the teacher's; by default the ends of
            the stages of both networks, of as many as both have, and what the classifiers read.
        hint: as many layers or containers of the teacher.
        weight: of the loss, which it reaches linearly from 0 in ``warmup_epochs``.
    """

    guided: Guided = None
    hint: Where | None = None
    weight: float = 5.0
    warmup_epochs: float = 20

    def __post_init__(self) -> None:
        _check(self, "weight", "warmup_epochs")

    def compared(self, student: TappedNetwork, teacher: TappedNetwork, seed: int) -> Compared:
        pairs = stage_pairs(student, teacher, self.guided, self.hint)
        pairs = [as_maps(student, teacher, pair) for pair in sorted(pairs, key=lambda pair: student.order(pair[0]))]
        if self.guided is self.hint is None:
            pairs.append((student.embedding().as_pixel(), teacher.embedding().as_pixel()))
        shapes = [teacher.shape(h) for _, h in pairs]
        review = Review([student.shape(g)[1] for g, _ in pairs], [(c, h, w) for _, c, h, w in shapes], seed)
        return Compared(tuple(pairs), review)

    def loss(
        self, ours: Sequence[Tensor], theirs: Sequence[Tensor], labels: Tensor, epoch: float, epochs: int
    ) -> Tensor:
        return self.weight * _warm(epoch, self.warmup_epochs) * losses.hierarchical_context(ours, theirs)


@dataclass(frozen=True)
class RKD(Objective):
    """How the samples of a batch lie to each other, by what the classifiers read (Park et al., CVPR 2019): see
    `losses.rkd`. The weights of the parts are the authors'.

    Attributes:
        weight: of the loss.
        distance_weight, angle_weight: of its two parts.
    """

    weight: float = 1.0
    distance_weight: float = 25.0
    angle_weight: float = 50.0

    def __post_init__(self) -> None:
        _check(self, "weight", "distance_weight", "angle_weight")

    def compared(self, student: TappedNetwork, teacher: TappedNetwork, seed: int) -> Compared:
        return Compared(((student.embedding(), teacher.embedding()),))

    def loss(
        self, ours: Sequence[Tensor], theirs: Sequence[Tensor], labels: Tensor, epoch: float, epochs: int
    ) -> Tensor:
        weights = {"distance_weight": self.distance_weight, "angle_weight": self.angle_weight}
        return self.weight * losses.rkd(ours[0], theirs[0], **weights)


def _compared_logits(student: TappedNetwork, teacher: TappedNetwork) -> Compared:
    pair = student.logits(), teacher.logits()
    ours, theirs = student.shape(pair[0])[1], teacher.shape(pair[1])[1]
    if ours != theirs:
        raise UsageError(
            f"the student tells {ours} classes apart and the teacher {theirs}: logits have to be of the same"
        )
    return Compared((pair,))


def _check(objective: Objective, *names: str, above: bool = False) -> None:
    """Numbers have to be finite, and at least, or ``above``, 0."""
    for name in names:
        value: Any = getattr(objective, name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not number or value < 0 or (above and value == 0):
            least = "above 0" if above else "of at least 0"
            raise UsageError(f"{name} of {type(objective).__name__} must be a number {least}, not {value!r}")


def _warm(epoch: float, epochs: float) -> float:
    """A weight's fraction that rises from 0 to 1 in the first epochs."""
    return min(1.0, epoch / epochs) if epochs else 1.0
