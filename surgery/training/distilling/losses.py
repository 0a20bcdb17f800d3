"""The losses of distillation, on a teacher's logits, features and attention.

Each takes the student's tensors first and the teacher's second, returns a scalar, the mean over the batch, and passes
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
"""Feature maps (N, C, H, W) of one layer or several."""


def kd_cross_entropy(student: Tensor, teacher: Tensor, temperature: float, *, standardise: bool = False) -> Tensor:
    """Cross-entropy of the student's softened distribution under the teacher's, H(P_T, P_S), without a factor tau^2:
    the second term of FitNets' equation 2 (Romero et al., ICLR 2015), there with a temperature of 3.

    Args:
        student, teacher: logits (N, classes).
        temperature: tau, the divisor of both.
        standardise: standardise each row first, as in `kd_divergence`.

    Raises:
        UsageError: other shapes, or a temperature that is not positive.
    """
    student, teacher = _soften(student, teacher, temperature, standardise)
    return -(teacher.softmax(1) * student.log_softmax(1)).sum(1).mean()


def kd_divergence(student: Tensor, teacher: Tensor, temperature: float, *, standardise: bool = False) -> Tensor:
    """Divergence of the student's softened distribution from the teacher's, tau^2 KL(P_T || P_S): its gradient keeps
    its size when tau changes (Hinton et al., 2015, section 2; so in RepDistiller, with tau 4 and a weight of 0.9).

    Args:
        student, teacher: logits (N, classes).
        temperature: tau, the divisor of both.
        standardise: standardise each row first, to mean 0 and standard deviation 1 (with the divisor classes - 1, as
            in the authors' code), so that only relations between logits are learned (Sun et al., CVPR 2024, algorithm
            1; there with tau 2 and a weight of 9). A constant row becomes zeros.

    Raises:
        UsageError: other shapes, or a temperature that is not positive.
    """
    return temperature**2 * _kl(*_soften(student, teacher, temperature, standardise))


def linear_decay(start: float, end: float, epochs: int) -> Callable[[float], float]:
    """KD's weight lambda by epoch, from 0: it decays from ``start`` to ``end`` in ``epochs`` and stays there.

    In FitNets it decays from 4 to 1 in 500 epochs, or 150 on MNIST (Romero et al., ICLR 2015).

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

    TCKD compares the probability of the label's class against all others, NCKD the distribution among the others.
    `kd_divergence` is the sum of both, with NCKD weighted by the teacher's probability of the others. The authors
    increase the weight of the loss linearly over the first 20 epochs.

    Args:
        student, teacher: logits (N, classes).
        labels: class indices (N,).
        alpha, beta: the weights of TCKD and NCKD.
        temperature: tau, the divisor of logits.

    Raises:
        UsageError: other shapes, labels that are not classes, fewer than 2 classes, or a temperature that is not
            positive.
    """
    student, teacher = _soften(student, teacher, temperature, standardise=False)
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

    The attention map of a sample is the mean of the squares over channels, divided by its L2 norm. Adaptive average
    pooling first brings the larger map to the size of the smaller one.

    Args:
        student, teacher: maps (N, C, H, W) of one tap, or of several; only N must agree.

    Raises:
        UsageError: no maps, other shapes, or unequal numbers of maps.
    """

    def loss(ours: Tensor, theirs: Tensor) -> Tensor:
        size = min(ours.shape[2], theirs.shape[2]), min(ours.shape[3], theirs.shape[3])
        return functional.mse_loss(attention(ours, size), attention(theirs, size))

    def attention(maps: Tensor, size: tuple[int, int]) -> Tensor:
        return functional.normalize(functional.adaptive_avg_pool2d(maps, size).square().mean(1).flatten(1))

    return torch.stack([loss(*pair) for pair in _pair_maps(student, teacher, 1)]).sum()


def hierarchical_context(student: Taps, teacher: Taps) -> Tensor:
    """Mean squared error of the maps and of their averages on grids of 4 x 4, 2 x 2 and 1 x 1, weighted 1, 1/2, 1/4 and
    1/8 and divided by the sum of the weights; summed over taps.

    This is the hierarchical context loss of ReviewKD (HCL; Chen et al., CVPR 2021, as in the authors' code), without
    the fusion of the student's stages. Grids that are not smaller than the map in both directions are skipped; the
    first of the others has weight 1/2.

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

    return torch.stack([loss(*pair) for pair in _pair_maps(student, teacher, 4)]).sum()


def mean_squared_error(student: Taps, teacher: Taps) -> Tensor:
    """Mean squared error of features, over all numbers of a tap; summed over taps. RepDistiller weights a hint by 100.

    Args:
        student, teacher: tensors (N, ...) of one tap, or of several, of equal shapes.

    Raises:
        UsageError: no tensors, other shapes, or unequal numbers of them.
    """
    pairs = _pair_tensors(student, teacher, "features")
    for pair in pairs:
        if pair[0].shape != pair[1].shape:
            raise _shape_error("features", *pair, "both must be of equal shape")
    return torch.stack([functional.mse_loss(*pair) for pair in pairs]).sum()


def rkd(student: Tensor, teacher: Tensor, *, distance_weight: float = 25.0, angle_weight: float = 50.0) -> Tensor:
    """Relational distillation: relations between the samples of a batch (Park et al., CVPR 2019, section 3.2).

    Smooth L1 compares distances between samples, divided by the mean of the nonzero ones, and cosines of the angles at
    each sample between two others; the means are over all (N, N) and (N, N, N), as in the authors' code, which has
    these weights. It takes memory for several times N^2 max(N, D) numbers.

    Args:
        student, teacher: embeddings (N, D); D may differ.
        distance_weight, angle_weight: the weights of the two parts.

    Raises:
        UsageError: tensors that are not matrices, or unequal numbers of samples.
    """
    student, teacher = _promote(student, teacher)
    if student.ndim != 2 or teacher.ndim != 2 or len(student) != len(teacher):
        raise _shape_error("embeddings", student, teacher, "both must be (N, D), with the same N")
    (distances, cosines), (teacher_distances, teacher_cosines) = _relate(student), _relate(teacher)
    distance = functional.smooth_l1_loss(distances, teacher_distances)
    return distance_weight * distance + angle_weight * functional.smooth_l1_loss(cosines, teacher_cosines)


def _relate(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Compute distances (N, N), in units of their mean, and cosines (N, N, N) of the angles at the first index."""
    differences = embeddings.unsqueeze(0) - embeddings.unsqueeze(1)
    distances = torch.linalg.vector_norm(differences, dim=2)
    apart = distances > 0
    directions = differences / torch.where(apart, distances, 1).unsqueeze(2)
    with torch.autocast(embeddings.device.type, enabled=False):
        cosines = directions @ directions.mT
    return distances * apart.sum() / torch.where(apart.any(), distances.sum(), 1), cosines


def _kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL divergence of the distributions with these logits (N, classes), mean over the batch."""
    logs = student.log_softmax(1), teacher.log_softmax(1)
    return functional.kl_div(*logs, reduction="batchmean", log_target=True)


def _soften(student: Tensor, teacher: Tensor, temperature: float, standardise: bool) -> tuple[Tensor, Tensor]:
    """Divide the logits, standardised if wanted, by the temperature."""
    if not (temperature > 0 and math.isfinite(temperature)):
        raise UsageError(f"the temperature is {temperature}: it must be above 0")
    student, teacher = _promote(student, teacher)
    if student.ndim != 2 or student.shape != teacher.shape:
        raise _shape_error("logits", student, teacher, "both must be (N, classes), of equal shape")
    if standardise:
        student, teacher = _standardise(student), _standardise(teacher)
    return student / temperature, teacher / temperature


def _standardise(logits: Tensor) -> Tensor:
    deviation = logits.std(1, keepdim=True)
    # A row that varies by rounding alone, as of a classifier initialised to zero, counts as constant: its standard
    # deviation would give noise and unbounded gradients.
    varies = deviation > 1e-6 * logits.detach().abs().amax(1, keepdim=True)
    return (logits - logits.mean(1, keepdim=True)) / torch.where(varies, deviation, 1)


def _promote(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Convert both to one precision, float32 at least, and detach the teacher's."""
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    return student.to(dtype), teacher.detach().to(dtype)


def _pair_maps(student: Taps, teacher: Taps, equal: int) -> list[tuple[Tensor, Tensor]]:
    """Pair the maps; their shapes must agree in the first ``equal`` axes."""
    pairs = _pair_tensors(student, teacher, "maps")
    for pair in pairs:
        shapes = [tensor.shape[:equal] for tensor in pair]
        if any(tensor.ndim != 4 for tensor in pair) or shapes[0] != shapes[1]:
            what = "the same N" if equal == 1 else "equal shapes"
            raise _shape_error("maps", *pair, f"both must be (N, C, H, W), with {what}")
    return pairs


def _pair_tensors(student: Taps, teacher: Taps, what: str) -> list[tuple[Tensor, Tensor]]:
    """Pair the tensors, each pair in one precision."""
    ours = [student] if isinstance(student, Tensor) else list(student)
    theirs = [teacher] if isinstance(teacher, Tensor) else list(teacher)
    if len(ours) != len(theirs) or not ours:
        raise UsageError(
            f"the student has {len(ours)} {what} and the teacher {len(theirs)}: give as many, at least one"
        )
    return [_promote(*pair) for pair in zip(ours, theirs, strict=True)]


def _check_labels(labels: Tensor, samples: int, classes: int) -> None:
    if classes < 2:
        raise UsageError("the logits have 1 class: to tell the label's class from the others there must be at least 2")
    if labels.shape != (samples,) or labels.is_floating_point() or labels.dtype is torch.bool:
        raise UsageError(f"the labels are {tuple(labels.shape)} of {labels.dtype}: give {samples} class indices")
    if samples and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise UsageError(
            f"the labels go from {labels.min()} to {labels.max()}: the logits have classes 0 to {classes - 1}"
        )


def _shape_error(what: str, student: Tensor, teacher: Tensor, needed: str) -> UsageError:
    shapes = f"the student's {what} are {tuple(student.shape)} and the teacher's {tuple(teacher.shape)}"
    return UsageError(f"{shapes}: {needed}")
