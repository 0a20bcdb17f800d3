"""The losses of distillation: against figures worked out by hand or in NumPy, and by what must not change them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from surgery.errors import UsageError
from surgery.taps import hints
from surgery.training.distilling import losses

LABELS = torch.tensor([0, 3, 4, 1])
LOGITS, MAPS, VECTORS = (4, 5), (2, 3, 6, 5), (4, 3)

LOSSES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...]]] = {
    "kd_cross_entropy": (lambda s, t: losses.kd_cross_entropy(s, t, 3.0), LOGITS),
    "kd_cross_entropy, standardised": (lambda s, t: losses.kd_cross_entropy(s, t, 2.0, standardise=True), LOGITS),
    "kd_divergence": (lambda s, t: losses.kd_divergence(s, t, 3.0), LOGITS),
    "kd_divergence, standardised": (lambda s, t: losses.kd_divergence(s, t, 2.0, standardise=True), LOGITS),
    "dkd": (lambda s, t: losses.dkd(s, t, LABELS), LOGITS),
    "attention_transfer": (losses.attention_transfer, MAPS),
    "hierarchical_context": (losses.hierarchical_context, MAPS),
    "rkd": (losses.rkd, VECTORS),
}
every_loss = pytest.mark.parametrize(("loss", "shape"), LOSSES.values(), ids=LOSSES)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pair(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """A student's tensor that has a gradient, and a teacher's that has one to be left alone."""
    student, teacher = (randn(*shape, seed=seed, dtype=dtype) for seed in (1, 2))
    return student.requires_grad_(), teacher.requires_grad_()


def softmax(logits: Tensor) -> np.ndarray:
    powers = np.exp(logits.detach().numpy())
    return powers / powers.sum(1, keepdims=True)


@every_loss
def test_gradients_equal_finite_differences(loss, shape):
    student, teacher = pair(shape)
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher.detach()), student)


@every_loss
def test_gradients_reach_the_student_alone_and_inputs_stay_unchanged(loss, shape):
    student, teacher = pair(shape)
    before = student.detach().clone(), teacher.detach().clone()
    loss(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert student.grad.abs().sum() > 0
    assert torch.equal(student, before[0])
    assert torch.equal(teacher, before[1])


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_compared_in_float32(loss, shape, dtype):
    student, teacher = pair(shape, dtype)
    found = loss(student, teacher)
    assert found.dtype is torch.float32
    assert found.ndim == 0
    torch.testing.assert_close(found.double(), loss(student.double(), teacher.double()), rtol=1e-5, atol=1e-6)
    assert loss(student.double(), teacher).dtype is torch.float64


@pytest.mark.parametrize("loss", [losses.attention_transfer, losses.hierarchical_context])
def test_squares_of_maps_beyond_half_precision_are_finite(loss):
    student, teacher = (1000 * t.detach() for t in pair(MAPS, torch.float16))
    torch.testing.assert_close(loss(student, teacher).double(), loss(student.double(), teacher.double()), rtol=1e-5,
                               atol=0)  # fmt: skip


@every_loss
def test_autocast_changes_nothing(loss, shape):
    student, teacher = pair(shape, torch.float32)
    expected = loss(student, teacher)
    (gradient,) = torch.autograd.grad(expected, student)
    with torch.autocast("cpu", torch.bfloat16):
        found = loss(student, teacher)
    assert torch.equal(found, expected)
    assert torch.equal(torch.autograd.grad(found, student)[0], gradient)


@every_loss
def test_a_student_equal_to_the_teacher_has_nothing_to_learn(loss, shape):
    student, _ = pair(shape)
    least = loss(student, student)
    assert torch.autograd.grad(least, student)[0].abs().max() < 1e-12
    assert loss(student + 0.1 * randn(*shape, seed=3), student) > least


def test_hint_loss_equals_the_loss_of_hint_pairs():
    assert losses.hint_loss is hints.hint_loss


def test_cross_entropy_has_the_temperature_in_both_and_no_factor():
    student = torch.tensor([[2 * np.log(3), 0.0]])  # at temperature 2: 3/4 and 1/4
    teacher = torch.tensor([[0.0, 2 * np.log(4)]])  # 1/5 and 4/5
    found = losses.kd_cross_entropy(student, teacher, 2.0)
    assert found.item() == pytest.approx(-(0.2 * np.log(0.75) + 0.8 * np.log(0.25)), rel=1e-6)


def test_divergence_has_the_square_of_the_temperature():
    student = torch.tensor([[2 * np.log(3), 0.0]])
    teacher = torch.tensor([[0.0, 2 * np.log(4)]])
    found = losses.kd_divergence(student, teacher, 2.0)
    assert found.item() == pytest.approx(4 * (0.2 * np.log(0.2 / 0.75) + 0.8 * np.log(0.8 / 0.25)), rel=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_two_forms_differ_by_the_teachers_entropy(temperature):
    student, teacher = pair(LOGITS)
    p = softmax(teacher / temperature)
    entropy = -(p * np.log(p)).sum(1).mean()
    difference = (
        losses.kd_cross_entropy(student, teacher, temperature)
        - losses.kd_divergence(student, teacher, temperature) / temperature**2
    )
    assert difference.item() == pytest.approx(entropy, rel=1e-12)
    assert losses.kd_cross_entropy(teacher, teacher, temperature).item() == pytest.approx(entropy, rel=1e-12)
    assert losses.kd_divergence(teacher, teacher, temperature).item() == 0


def test_at_a_high_temperature_divergence_matches_centred_logits():
    student, teacher = (t.detach() for t in pair(LOGITS))
    centred = (student - student.mean(1, keepdim=True)) - (teacher - teacher.mean(1, keepdim=True))
    expected = (centred.square().sum(1) / (2 * LOGITS[1])).mean()  # Hinton et al., section 2.1
    assert losses.kd_divergence(student, teacher, 1e4).item() == pytest.approx(expected.item(), rel=1e-3)


@pytest.mark.parametrize("name", ["kd_cross_entropy", "kd_divergence", "dkd", "hierarchical_context"])
def test_losses_are_the_mean_over_the_batch(name):
    loss, shape = LOSSES[name]
    student, teacher = (t.detach() for t in pair(shape))
    samples = [student.split(1), teacher.split(1), *([LABELS.split(1)] if name == "dkd" else [])]
    single = losses.dkd if name == "dkd" else loss
    singles = [single(*sample) for sample in zip(*samples, strict=True)]
    assert loss(student, teacher).item() == pytest.approx(torch.stack(singles).mean().item(), rel=1e-12)


def test_confident_logits_stay_finite():
    student, teacher = torch.tensor([[0.0, 2000.0, 0.0]]).requires_grad_(), torch.tensor([[3000.0, 0.0, 10.0]])
    label = torch.tensor([0])
    for found in (
        losses.kd_cross_entropy(student, teacher, 1.0),
        losses.kd_divergence(student, teacher, 1.0),
        losses.dkd(student, teacher, label, temperature=1.0),
    ):
        assert found.isfinite()
        assert torch.autograd.grad(found, student)[0].isfinite().all()


@pytest.mark.parametrize("loss", [losses.kd_cross_entropy, losses.kd_divergence])
def test_standardised_logits_are_z_scores(loss):
    student, teacher = (t.detach() for t in pair(LOGITS))

    def z(logits: Tensor) -> Tensor:
        array = logits.numpy()
        return torch.from_numpy((array - array.mean(1, keepdims=True)) / array.std(1, ddof=1, keepdims=True))

    found = loss(student, teacher, 2.0, standardise=True)
    assert found.item() == pytest.approx(loss(z(student), z(teacher), 2.0).item(), rel=1e-12)
    scale, shift = torch.rand(4, 1).double() + 0.5, randn(4, 1, seed=5)
    moved = loss(student * scale + shift, teacher * 7 - 3, 2.0, standardise=True)
    assert moved.item() == pytest.approx(found.item(), rel=1e-12)


@pytest.mark.parametrize("constant", [0.0, 0.1, -1e4])
def test_a_constant_row_is_standardised_to_zeros_and_can_learn(constant):
    student = torch.full((4, 10), constant).requires_grad_()
    teacher = randn(4, 10, dtype=torch.float32)
    found = losses.kd_divergence(student, teacher, 2.0, standardise=True)
    uniform = losses.kd_divergence(torch.zeros(4, 10), teacher, 2.0, standardise=True)
    torch.testing.assert_close(found, uniform, rtol=2e-2, atol=0)  # the mean of -1e4 is rounded
    (gradient,) = torch.autograd.grad(found, student)
    assert 0 < gradient.abs().max() < 1


def test_the_weight_decays_linearly_and_stays():
    weight = losses.linear_decay(4.0, 1.0, 6)
    assert [weight(epoch) for epoch in (0, 1, 2, 3, 4, 5, 6, 7, 100)] == [4.0, 3.5, 3.0, 2.5, 2.0, 1.5, 1.0, 1.0, 1.0]
    assert losses.linear_decay(0.0, 2.0, 1)(0) == 0.0


def test_decoupled_parts_are_those_of_the_probabilities():
    student, teacher = (t.detach() for t in pair(LOGITS))
    target, others = [], []
    for p, q, label in zip(softmax(teacher / 4), softmax(student / 4), LABELS.tolist(), strict=True):
        target.append(p[label] * np.log(p[label] / q[label]) + (1 - p[label]) * np.log((1 - p[label]) / (1 - q[label])))
        rest = [(p[c] / (1 - p[label]), q[c] / (1 - q[label])) for c in range(5) if c != label]
        others.append(sum(a * np.log(a / b) for a, b in rest))
    expected = 16 * (np.mean(target) + 8 * np.mean(others))
    assert losses.dkd(student, teacher, LABELS).item() == pytest.approx(expected, rel=1e-10)
    only = losses.dkd(student, teacher, LABELS, alpha=0.0, beta=1.0)
    assert only.item() == pytest.approx(16 * np.mean(others), rel=1e-10)


@pytest.mark.parametrize("row", range(4))
def test_the_decoupled_parts_make_up_the_divergence(row):
    student, teacher = (t.detach()[row : row + 1] for t in pair(LOGITS))
    label = LABELS[row : row + 1]
    others = 1 - softmax(teacher / 3)[0, label.item()]
    found = losses.dkd(student, teacher, label, alpha=1.0, beta=others, temperature=3.0)
    assert found.item() == pytest.approx(losses.kd_divergence(student, teacher, 3.0).item(), rel=1e-12)


def test_attention_is_the_normalised_mean_of_squares():
    student = torch.tensor([[[[3.0, 1.0]], [[1.0, 2.0]]]])  # squares: mean 5 and 2.5, of norm 5.59
    teacher = torch.tensor([[[[0.0, 2.0]]]])  # 0 and 1, once normalised
    expected = ((2 / np.sqrt(5)) ** 2 + (1 / np.sqrt(5) - 1) ** 2) / 2
    assert losses.attention_transfer(student, teacher).item() == pytest.approx(expected, rel=1e-6)


def test_attention_ignores_scale_sign_and_order_of_channels():
    student, teacher = (t.detach() for t in pair(MAPS))
    expected = losses.attention_transfer(student, teacher).item()
    scale = torch.tensor([0.3, 40.0]).double().view(2, 1, 1, 1)
    moved = losses.attention_transfer(-student[:, [2, 0, 1]] * scale, torch.cat([teacher, teacher], 1))
    assert moved.item() == pytest.approx(expected, rel=1e-12)


def test_the_larger_map_is_averaged_to_the_size_of_the_smaller():
    large, small = randn(2, 3, 8, 6, seed=1), randn(2, 5, 4, 2, seed=2)
    averaged = large.reshape(2, 3, 4, 2, 2, 3).mean((3, 5))
    expected = losses.attention_transfer(averaged, small).item()
    assert losses.attention_transfer(large, small).item() == pytest.approx(expected, rel=1e-12)
    assert losses.attention_transfer(small, large).item() == pytest.approx(expected, rel=1e-12)
    wide = randn(2, 3, 4, 6, seed=3)
    expected = losses.attention_transfer(large.reshape(2, 3, 4, 2, 6).mean(3), wide).item()
    assert losses.attention_transfer(large, wide).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("loss", [losses.attention_transfer, losses.hierarchical_context])
def test_taps_add_up(loss):
    (student, teacher), (second, other) = pair(MAPS), (randn(2, 4, 3, 3, seed=s) for s in (3, 4))
    expected = loss(student, teacher) + loss(second, other)
    assert loss([student, second], (teacher, other)).item() == pytest.approx(expected.item(), rel=1e-12)


def test_a_map_without_activity_gives_finite_gradients():
    student = torch.zeros(MAPS).requires_grad_()
    found = losses.attention_transfer(student, randn(*MAPS, dtype=torch.float32))
    assert found > 0
    assert torch.autograd.grad(found, student)[0].isfinite().all()


def test_context_is_compared_on_four_grids():
    difference = randn(2, 3, 8, 8, seed=1)
    teacher = randn(2, 3, 8, 8, seed=2)
    array = difference.numpy()
    errors = [(array.reshape(2, 3, g, 8 // g, g, 8 // g).mean((3, 5)) ** 2).mean() for g in (8, 4, 2, 1)]
    expected = (errors[0] + errors[1] / 2 + errors[2] / 4 + errors[3] / 8) / 1.875
    assert losses.hierarchical_context(teacher + difference, teacher).item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("size", "grids"), [((1, 1), []), ((2, 2), [1]), ((4, 4), [2, 1]), ((8, 2), [1])], ids=str)
def test_only_grids_smaller_than_the_map_count(size, grids):
    difference, teacher = randn(2, 3, *size, seed=1), randn(2, 3, *size, seed=2)
    h, w = size
    total, weights = (difference.numpy() ** 2).mean(), 1.0
    for k, g in enumerate(grids, 1):
        total += (difference.numpy().reshape(2, 3, g, h // g, g, w // g).mean((3, 5)) ** 2).mean() / 2**k
        weights += 1 / 2**k
    found = losses.hierarchical_context(teacher + difference, teacher)
    assert found.item() == pytest.approx(total / weights, rel=1e-10)


def test_a_constant_difference_counts_fully_whatever_the_size():
    teacher = randn(2, 3, 9, 7)
    assert losses.hierarchical_context(teacher + 3, teacher).item() == pytest.approx(9.0, rel=1e-12)


def huber(x: float) -> float:
    return 0.5 * x * x if abs(x) < 1 else abs(x) - 0.5


def relations(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distances in units of their mean, and the cosine of the angle at b between a and c, one by one."""
    n = len(points)
    distances = np.array([[np.linalg.norm(a - b) for b in points] for a in points])
    cosines = np.zeros((n, n, n))
    for a in range(n):
        for b in range(n):
            for c in range(n):
                if b not in (a, c):
                    first, second = points[a] - points[b], points[c] - points[b]
                    cosines[a, b, c] = first @ second / np.linalg.norm(first) / np.linalg.norm(second)
    return distances / (distances.sum() / (n * (n - 1))), cosines


@pytest.mark.parametrize(("distance_weight", "angle_weight"), [(25.0, 50.0), (1.0, 0.0), (0.0, 1.0)])
def test_relations_are_distances_and_angles(distance_weight, angle_weight):
    student, teacher = 3 * randn(5, 2, seed=1), randn(5, 7, seed=2)
    (d, a), (e, b) = relations(student.numpy()), relations(teacher.numpy())
    expected = distance_weight * np.mean([huber(x) for x in (d - e).flat])
    expected += angle_weight * np.mean([huber(x) for x in (a - b).flat])
    found = losses.rkd(student, teacher, distance_weight=distance_weight, angle_weight=angle_weight)
    assert found.item() == pytest.approx(expected, rel=1e-10)


def test_relations_ignore_rotation_translation_and_scale():
    student, teacher = (t.detach() for t in pair((6, 4)))
    rotation = torch.linalg.qr(randn(4, 4, seed=3)).Q
    expected = losses.rkd(student, teacher).item()
    moved = losses.rkd(5 * student @ rotation + randn(4, seed=4), 0.1 * teacher @ rotation.mT - 2)
    assert moved.item() == pytest.approx(expected, rel=1e-10)
    assert losses.rkd(teacher @ rotation, teacher).item() == pytest.approx(0, abs=1e-20)
    order = [3, 1, 0, 5, 2, 4]
    assert losses.rkd(student[order], teacher[order]).item() == pytest.approx(expected, rel=1e-12)
    assert losses.rkd(student[order], teacher).item() != pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("alike", [1, 2, 4])
def test_samples_that_coincide_give_finite_losses_and_gradients(alike):
    student, teacher = randn(4, 3, dtype=torch.float32), randn(4, 3, seed=1, dtype=torch.float32)
    student[:alike] = 0.0
    student.requires_grad_()
    found = losses.rkd(student, teacher)
    (gradient,) = torch.autograd.grad(found, student)
    assert found.isfinite()
    assert gradient.abs().max() < 1e3
    assert losses.rkd(teacher, student.detach()).isfinite()
    assert losses.rkd(student[:1], teacher[:1]).item() == 0


MAP, ROWS, ROW = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3), torch.zeros(3)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: losses.kd_cross_entropy(ROWS, torch.zeros(2, 4), 1.0),
            "the student's logits are (2, 3) and the teacher's (2, 4): both must be (N, classes), of equal shape",
        ),
        (
            lambda: losses.kd_divergence(ROW, ROW, 1.0),
            "the student's logits are (3,) and the teacher's (3,): both must be (N, classes), of equal shape",
        ),
        (
            lambda: losses.dkd(torch.zeros(1, 3), ROWS, LABELS[:1]),
            "the student's logits are (1, 3) and the teacher's (2, 3): both must be (N, classes), of equal shape",
        ),
        (lambda: losses.kd_cross_entropy(ROWS, ROWS, 0.0), "the temperature is 0.0: it must be above 0"),
        (lambda: losses.kd_divergence(ROWS, ROWS, -1), "the temperature is -1: it must be above 0"),
        (
            lambda: losses.dkd(ROWS, ROWS, LABELS[:2], temperature=float("nan")),
            "the temperature is nan: it must be above 0",
        ),
        (
            lambda: losses.dkd(ROWS, ROWS, torch.tensor([0, 3])),
            "the labels go from 0 to 3: the logits have classes 0 to 2",
        ),
        (
            lambda: losses.dkd(ROWS, ROWS, torch.tensor([-1, 2])),
            "the labels go from -1 to 2: the logits have classes 0 to 2",
        ),
        (lambda: losses.dkd(ROWS, ROWS, LABELS), "the labels are (4,) of torch.int64: give 2 class indices"),
        (lambda: losses.dkd(ROWS, ROWS, ROWS), "the labels are (2, 3) of torch.float32: give 2 class indices"),
        (
            lambda: losses.dkd(ROWS, ROWS, torch.tensor([True, False])),
            "the labels are (2,) of torch.bool: give 2 class indices",
        ),
        (
            lambda: losses.dkd(ROWS[:, :1], ROWS[:, :1], torch.tensor([0, 0])),
            "the logits have 1 class: to tell the label's class from the others there must be at least 2",
        ),
        (
            lambda: losses.linear_decay(4.0, 1.0, 0),
            "a decay takes at least 1 epoch, not 0",
        ),
        (
            lambda: losses.attention_transfer(MAP, ROWS),
            "the student's maps are (2, 3, 4, 4) and the teacher's (2, 3): both must be (N, C, H, W), with the same N",
        ),
        (
            lambda: losses.attention_transfer(MAP, MAP[:1]),
            "the student's maps are (2, 3, 4, 4) and the teacher's (1, 3, 4, 4): "
            "both must be (N, C, H, W), with the same N",
        ),
        (
            lambda: losses.hierarchical_context([MAP], [MAP[:, :2]]),
            "the student's maps are (2, 3, 4, 4) and the teacher's (2, 2, 4, 4): "
            "both must be (N, C, H, W), with equal shapes",
        ),
        (
            lambda: losses.attention_transfer([MAP, MAP], MAP),
            "the student has 2 maps and the teacher 1: give as many, at least one",
        ),
        (
            lambda: losses.hierarchical_context([], []),
            "the student has 0 maps and the teacher 0: give as many, at least one",
        ),
        (
            lambda: losses.rkd(ROWS, MAP),
            "the student's embeddings are (2, 3) and the teacher's (2, 3, 4, 4): both must be (N, D), with the same N",
        ),
        (
            lambda: losses.rkd(ROWS, ROWS[:1]),
            "the student's embeddings are (2, 3) and the teacher's (1, 3): both must be (N, D), with the same N",
        ),
    ],
)
def test_tensors_that_cannot_be_compared_are_refused(call, text):
    with pytest.raises(UsageError) as raised:
        call()
    assert str(raised.value) == text


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32], ids=str)
def test_labels_may_be_of_any_integers(dtype):
    student, teacher = pair(LOGITS)
    assert torch.equal(losses.dkd(student, teacher, LABELS.to(dtype)), losses.dkd(student, teacher, LABELS))
