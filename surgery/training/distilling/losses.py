"""The losses of distillation: what a student learns from a teacher's logits, features and attention.

Each takes the student's tensors first and the teacher's second, gives a scalar, the mean over the batch, and passes
gradients to the student alone. Half-precision tensors are compared in float32, under autocast too.

SimKD (Chen et al., CVPR 2022) needs no function here: its loss is `torch.nn.functional.mse_loss`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from surgery.errors import UsageError
from surgery.taps.hints import hint_loss

__all__ = [
    "attention_transfer",
    "dkd",
    "hierarchical_context",
    "hint_loss",
    "kd_cross_entropy",
    "kd_divergence",
    "linear_decay",
    "mean_squared_error",
    "rkd",
]

Taps = Tensor | Sequence[Tensor]
"""Feature maps (N, C, H, W) of one layer, or of several."""


def kd_cross_entropy(student: Tensor, teacher: Tensor, temperature: float, *, standardise: bool = False) -> Tensor:
    """Cross-entropy of the student's softened distribution under the teacher's, H(P_T, P_S), without a factor tau^2:
    the second term of FitNets' equation 2 (Romero et al., ICLR 2015), there with a temperature of 3.

    Args:
        student, teacher: logits (N, classes).
        temperature: tau, which both are divided by.
        standardise: whether each row is standardised before, as in `kd_divergence`.

    Raises:
        UsageError: other shapes, or a temperature that is not positive.
    """
    student, teacher = _softened(student, teacher, temperature, standardise)
    return -(teacher.softmax(1) * student.log_softmax(1)).sum(1).mean()


def kd_divergence(student: Tensor, teacher: Tensor, temperature: float, *, standardise: bool = False) -> Tensor:
    """Divergence of the student's softened distribution from the teacher's, tau^2 KL(P_T || P_S): its gradient keeps
    its size when tau changes (Hinton et al., 2015, section 2; so in RepDistiller, with tau 4 and a weight of 0.9).

    Args:
        student, teacher: logits (N, classes).
        temperature: tau, which both are divided by.
        standardise: whether each row is standardised before, to mean 0 and standard deviation 1 (with the divisor
            classes - 1, as the authors' code has it), so that only relations between logits are learned (Sun et al.,
            CVPR 2024, algorithm 1). The authors take tau 2 then, and a weight of 9. A constant row becomes zeros.

    Raises:
        UsageError: other shapes, or a temperature that is not positive.
    """
    return temperature**2 * _kl(*_softened(student, teacher, temperature, standardise))


def linear_decay(start: float, end: float, epochs: int) -> Callable[[float], float]:
    """KD's weight lambda by epoch, counted from 0: it goes from ``start`` to ``end`` in ``epochs`` and stays there.

    In FitNets it is 4 at first, and 1 after 500 epochs, or 150 on MNIST (Romero et al., ICLR 2015).

    Raises:
        UsageError: fewer than 1 epoch.
    """
    if epochs < 1:
        raise UsageError(f"a decay takes at least 1 epoch, not {epochs}")
    return lambda epoch: end if epoch >= epochs else start + (end - start) * epoch / epochs


def dkd(
    student: Tensor, teacher: Tensor, labels: Tensor, *, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0
) -> Tensor:
    """Decoupled distillation, tau^2 (alpha TCKD + beta NCKD) (Zhao et al., CVPR 2022, equation 7).

    TCKD compares how likely the label's class is against all others, NCKD the distribution among the others.
    `kd_divergence` is the sum of both, with NCKD weighted by the likelihood that the teacher gives these others.
    The authors let the loss's weight grow linearly over the first 20 epochs.

    Args:
        student, teacher: logits (N, classes).
        labels: class indices (N,).
        alpha, beta: the weights of TCKD and NCKD.
        temperature: tau, which the logits are divided by.

    Raises:
        UsageError: other shapes, labels that are no classes, fewer than 2 classes, or a temperature that is not
            positive.
    """
    student, teacher = _softened(student, teacher, temperature, standardise=False)
    _check_labels(labels, *student.shape)
    label = labels.long().unsqueeze(1)
    others = torch.arange(student.shape[1] - 1, device=label.device).expand(len(label), -1)
    others = others + (others >= label)

    def decoupled(logits: Tensor) -> tuple[Tensor, Tensor]:
        rest = logits.gather(1, others)
        return torch.cat([logits.gather(1, label), rest.logsumexp(1, keepdim=True)], 1), rest

    (student_target, student_rest), (teacher_target, teacher_rest) = decoupled(student), decoupled(teacher)
    target, rest = _kl(student_target, teacher_target), _kl(student_rest, teacher_rest)
    return temperature**2 * (alpha * target + beta * rest)


def attention_transfer(student: Taps, teacher: Taps) -> Tensor:
    """Mean squared difference of the attention maps, summed over taps (Zagoruyko and Komodakis, ICLR 2017, equation 2,
    with the mean of the authors' code; RepDistiller weights it by 1000).

    The attention map of a sample is the mean of the squares over channels, divided by its L2 norm. The larger map is
    brought to the size of the smaller one before, by adaptive average pooling.

    Args:
        student, teacher: maps (N, C, H, W) of one tap, or of several; only N has to agree.

    Raises:
        UsageError: no maps, other shapes, or unequal numbers of them.
    """

    def loss(ours: Tensor, theirs: Tensor) -> Tensor:
        size = min(ours.shape[2], theirs.shape[2]), min(ours.shape[3], theirs.shape[3])
        return functional.mse_loss(attention(ours, size), attention(theirs, size))

    def attention(maps: Tensor, size: tuple[int, int]) -> Tensor:
        return functional.normalize(functional.adaptive_avg_pool2d(maps, size).square().mean(1).flatten(1))

    return torch.stack([loss(*pair) for pair in _maps(student, teacher, 1)]).sum()


def hierarchical_context(student: Taps, teacher: Taps) -> Tensor:
    """Mean squared error of the maps and of their averages on grids of 4 x 4, 2 x 2 and 1 x 1, weighted 1, 1/2, 1/4 and
    1/8 and divided by the sum of the weights; summed over taps.

    It is the hierarchical context loss of ReviewKD (HCL; Chen et al., CVPR 2021, as in the authors' code), without the
    fusion of the student's stages. Grids that are not smaller than the map in both directions are left out; the
    first of the others has the weight 1/2.

    Args:
        student, teacher: maps (N, C, H, W) of one tap, or of several, of equal shapes.

    Raises:
        UsageError: no maps, other shapes, or unequal numbers of them.
    """

    def loss(ours: Tensor, theirs: Tensor) -> Tensor:
        grids = [grid for grid in (4, 2, 1) if grid < min(ours.shape[2:])]
        pairs = [(functional.adaptive_avg_pool2d(ours, g), functional.adaptive_avg_pool2d(theirs, g)) for g in grids]
        errors = [functional.mse_loss(*pair) / 2**k for k, pair in enumerate([(ours, theirs), *pairs])]
        return torch.stack(errors).sum() / (2 - 0.5 ** len(grids))

    return torch.stack([loss(*pair) for pair in _maps(student, teacher, 4)]).sum()


def mean_squared_error(student: Taps, teacher: Taps) -> Tensor:
    """Mean squared error of features, over all numbers of a tap; summed over taps. RepDistiller weights that of a hint
    by 100.

    Args:
        student, teacher: tensors (N, ...) of one tap, or of several, of equal shapes.

    Raises:
        UsageError: no tensors, other shapes, or unequal numbers of them.
    """
    pairs = _pairs(student, teacher, "features")
    for pair in pairs:
        if pair[0].shape != pair[1].shape:
            raise _unequal("features", *pair, "both must be of equal shape")
    return torch.stack([functional.mse_loss(*pair) for pair in pairs]).sum()


def rkd(student: Tensor, teacher: Tensor, *, distance_weight: float = 25.0, angle_weight: float = 50.0) -> Tensor:
    """Relational distillation: how the samples of a batch lie to each other (Park et al., CVPR 2019, section 3.2).

    Distances between samples, divided by the mean of those that are not zero, and the cosines of the angles at each
    sample between two others are compared by smooth L1, mean over all (N, N) and (N, N, N), as in the authors' code.
    The weights are theirs. It takes memory for N^2 max(N, D) numbers, several times.

    Args:
        student, teacher: embeddings (N, D); D may differ.
        distance_weight, angle_weight: the weights of the two parts.

    Raises:
        UsageError: no matrices, or unequal numbers of samples.
    """
    student, teacher = _full(student, teacher)
    if student.ndim != 2 or teacher.ndim != 2 or len(student) != len(teacher):
        raise _unequal("embeddings", student, teacher, "both must be (N, D), with the same N")
    (distances, cosines), (teacher_distances, teacher_cosines) = _relations(student), _relations(teacher)
    distance = functional.smooth_l1_loss(distances, teacher_distances)
    return distance_weight * distance + angle_weight * functional.smooth_l1_loss(cosines, teacher_cosines)


def _relations(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Distances (N, N), in units of their mean, and cosines (N, N, N), at the first index."""
    differences = embeddings.unsqueeze(0) - embeddings.unsqueeze(1)
    distances = torch.linalg.vector_norm(differences, dim=2)
    apart = distances > 0
    directions = differences / torch.where(apart, distances, 1).unsqueeze(2)
    with torch.autocast(embeddings.device.type, enabled=False):
        cosines = directions @ directions.mT
    return distances * apart.sum() / torch.where(apart.any(), distances.sum(), 1), cosines


def _kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL divergence of the distributions that have these logits (N, classes), mean over the batch."""
    logs = student.log_softmax(1), teacher.log_softmax(1)
    return functional.kl_div(*logs, reduction="batchmean", log_target=True)


def _softened(student: Tensor, teacher: Tensor, temperature: float, standardise: bool) -> tuple[Tensor, Tensor]:
    """The logits, standardised if wanted, over the temperature."""
    if not (temperature > 0 and math.isfinite(temperature)):
        raise UsageError(f"the temperature is {temperature}: it must be above 0")
    student, teacher = _full(student, teacher)
    if student.ndim != 2 or student.shape != teacher.shape:
        raise _unequal("logits", student, teacher, "both must be (N, classes), of equal shape")
    if standardise:
        student, teacher = _standardised(student), _standardised(teacher)
    return student / temperature, teacher / temperature


def _standardised(logits: Tensor) -> Tensor:
    deviation = logits.std(1, keepdim=True)
    # A row that differs by rounding alone counts as constant, as a classifier initialised to zero gives it: dividing
    # by what is left would give noise, and gradients without bound.
    varies = deviation > 1e-6 * logits.detach().abs().amax(1, keepdim=True)
    return (logits - logits.mean(1, keepdim=True)) / torch.where(varies, deviation, 1)


def _full(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both in one precision, float32 at least, and the teacher's without gradient."""
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    return student.to(dtype), teacher.detach().to(dtype)


def _maps(student: Taps, teacher: Taps, equal: int) -> list[tuple[Tensor, Tensor]]:
    """The pairs of maps, whose shapes agree in their first ``equal`` axes."""
    pairs = _pairs(student, teacher, "maps")
    for pair in pairs:
        shapes = [tensor.shape[:equal] for tensor in pair]
        if any(tensor.ndim != 4 for tensor in pair) or shapes[0] != shapes[1]:
            what = "the same N" if equal == 1 else "equal shapes"
            raise _unequal("maps", *pair, f"both must be (N, C, H, W), with {what}")
    return pairs


def _pairs(student: Taps, teacher: Taps, what: str) -> list[tuple[Tensor, Tensor]]:
    """The pairs of tensors, each in one precision."""
    ours = [student] if isinstance(student, Tensor) else list(student)
    theirs = [teacher] if isinstance(teacher, Tensor) else list(teacher)
    if len(ours) != len(theirs) or not ours:
        raise UsageError(
            f"the student has {len(ours)} {what} and the teacher {len(theirs)}: give as many, at least one"
        )
    return [_full(*pair) for pair in zip(ours, theirs, strict=True)]


def _check_labels(labels: Tensor, samples: int, classes: int) -> None:
    if classes < 2:
        raise UsageError("the logits have 1 class: to tell the label's class from the others there must be at least 2")
    if labels.shape != (samples,) or labels.is_floating_point() or labels.dtype is torch.bool:
        raise UsageError(f"the labels are {tuple(labels.shape)} of {labels.dtype}: give {samples} class indices")
    if samples and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise UsageError(
            f"the labels go from {labels.min()} to {labels.max()}: the logits have classes 0 to {classes - 1}"
        )


def _unequal(what: str, student: Tensor, teacher: Tensor, needed: str) -> UsageError:
    shapes = f"the student's {what} are {tuple(student.shape)} and the teacher's {tuple(teacher.shape)}"
    return UsageError(f"{shapes}: {needed}")
