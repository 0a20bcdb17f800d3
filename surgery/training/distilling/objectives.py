"""Objectives: what a student learns from a teacher next to the labels.

An objective says which values of the two networks it compares, and computes a loss from them.
`surgery.training.distilling.observed` taps these values of all objectives at once. A new objective is one subclass of
`Objective`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from surgery.errors import UsageError
from surgery.selectors import Where
from surgery.settings import check_fields, option
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

    A subclass that is a frozen dataclass can have checked settings (`surgery.settings.option`).

    Attributes:
        takes_mixed: whether ``loss`` can be given labels as probabilities (N, classes), as ``mixup`` and ``cutmix`` do.

    Example:
        >>> class Logits(surgery.Objective):
        ...     def compare(self, student, teacher, seed):
        ...         return Compared(((student.logits(), teacher.logits()),))
        ...     def loss(self, ours, theirs, labels, epoch, epochs):
        ...         return torch.nn.functional.mse_loss(ours[0], theirs[0])
    """

    takes_mixed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self, f" of {type(self).__name__}")

    @abstractmethod
    def compare(self, student: TappedNetwork, teacher: TappedNetwork, seed: int) -> Compared:
        """Choose the values to compare. ``seed`` draws the initial weights of a head."""

    @abstractmethod
    def loss(self, ours: Values, theirs: Values, labels: Tensor, epoch: float, epochs: int) -> Tensor:
        """Compute the weighted loss, a scalar, the mean over the batch.

        Args:
            ours: the student's values of each pair, or the head's outputs for them.
            theirs: the teacher's values.
            labels: class indices (N,); probabilities (N, classes) where a training mixes images.
            epoch: number of epochs done, a fraction within an epoch.
            epochs: number of all epochs.
        """

    def __repr__(self) -> str:
        """The class and its settings, by which a checkpoint recognises an objective."""
        return f"{type(self).__qualname__}({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"


_FORMS = {"cross-entropy": losses.kd_cross_entropy, "divergence": losses.kd_divergence}


@dataclass(frozen=True)
class KD(Objective):
    """The teacher's softened distribution, as in FitNets (Romero et al., ICLR 2015, equation 2): temperature 3, and a
    weight lambda that decays linearly from 4 to 1, over all epochs or ``decay_epochs``.
    """

    temperature: float = option(3.0, "Tau, the divisor of both logits.", above=0)
    weight: float = option(4.0, "Lambda at the beginning.", least=0)
    final_weight: float = option(1.0, "Lambda at the end.", least=0)
    decay_epochs: int | None = option(None, "Epochs in which lambda decays; 500 in the paper, 150 on MNIST.", least=1)
    form: str = option(
        "cross-entropy", "cross-entropy, the paper's, or divergence, tau^2 KL (Hinton et al., 2015).", choices=_FORMS
    )
    standardise: bool = option(
        False, "Standardise logits first (Sun et al., CVPR 2024; with divergence, a temperature of 2, a weight of 9)."
    )

    def compare(self, student: TappedNetwork, teacher: TappedNetwork, seed: int) -> Compared:
        return _compare_logits(student, teacher)

    def loss(self, ours: Values, theirs: Values, labels: Tensor, epoch: float, epochs: int) -> Tensor:
        lambda_ = losses.linear_decay(self.weight, self.final_weight, self.decay_epochs or epochs)
        form = _FORMS[self.form]
        return lambda_(epoch) * form(ours[0], theirs[0], self.temperature, standardise=self.standardise)


@dataclass(frozen=True)
class DKD(Objective):
    """Decoupled distillation (Zhao et al., CVPR 2022): see `losses.dkd`. The defaults are the authors'."""

    takes_mixed: ClassVar[bool] = False
    alpha: float = option(1.0, "Weight of the label's class against all others.", least=0)
    beta: float = option(8.0, "Weight of the others among each other.", least=0)
    temperature: float = option(4.0, "Tau, the divisor of both logits.", above=0)
    weight: float = option(1.0, "Of the loss. It rises linearly from 0 in warmup_epochs.", least=0)
    warmup_epochs: float = option(20.0, "Epochs until the weight is reached.", least=0)

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
    """

    guided: Guided = None
    hint: Where | None = None
    weight: float = option(100.0, "Of the loss.", least=0)
    regressor: str = option("auto", f"From guided layer to hint: {', '.join(REGRESSORS)}.", choices=REGRESSORS)

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
    """

    guided: Guided = None
    hint: Where | None = None
    weight: float = option(1000.0, "Of the loss.", least=0)

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
    """

    guided: Guided = None
    hint: Where | None = None
    weight: float = option(5.0, "Of the loss. It rises linearly from 0 in warmup_epochs.", least=0)
    warmup_epochs: float = option(20.0, "Epochs until the weight is reached.", least=0)

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
    """

    weight: float = option(1.0, "Of the loss.", least=0)
    distance_weight: float = option(25.0, "Of distances.", least=0)
    angle_weight: float = option(50.0, "Of angles.", least=0)

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


def _warm_up(epoch: float, epochs: float) -> float:
    """The fraction of a weight, which rises from 0 to 1 in the first epochs."""
    return min(1.0, epoch / epochs) if epochs else 1.0
