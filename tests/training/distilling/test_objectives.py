"""Objectives: what they compare is what the networks compute, what they cost is computed by hand, and the student that
comes out has nothing of them."""

from __future__ import annotations

import copy
import io
import math
from dataclasses import FrozenInstanceError, dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgery
from surgery import models as catalogue
from surgery.errors import EditError, UsageError
from surgery.training.distilling import losses
from surgery.training.distilling.objectives import DKD, KD, RKD, AttentionTransfer, Compared, Hint, Objective, ReviewKD
from surgery.training.distilling.observed import Observed, observe
from surgery.training.distilling.review import Review
from tests.zoo import build_family, randomised, traced_of


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Net(nn.Module):
    """Three stages of two convolutions with norms, and a classifier."""

    def __init__(self, width: int, classes: int = 5):
        super().__init__()
        self.first, self.second, self.third = (
            nn.Sequential(
                nn.Conv2d(ins, outs, 3, stride, 1),
                nn.BatchNorm2d(outs),
                nn.ReLU(),
                nn.Conv2d(outs, outs, 3, 1, 1),
                nn.BatchNorm2d(outs),
                nn.ReLU(),
            )
            for ins, outs, stride in ((3, width, 1), (width, 2 * width, 2), (2 * width, 4 * width, 2))
        )
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(4 * width, classes)

    def forward(self, x):
        x = self.third(self.second(self.first(x)))
        return self.head(self.drop(x.mean((2, 3))))


SHAPE = (6, 3, 8, 8)
LABELS = torch.tensor([0, 4, 2, 1, 3, 0])


def net(width: int, classes: int = 5, seed: int = 0) -> nn.Module:
    """Traced, in float64, with random norms."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = randomised(Net(width, classes), seed).double().eval()
    return surgery.trace(model, images(*SHAPE), source="own:Net")


@pytest.fixture
def x() -> Tensor:
    return images(*SHAPE)


@pytest.fixture
def student() -> nn.Module:
    return net(3)


@pytest.fixture
def teacher() -> nn.Module:
    return net(4, seed=1)


def loss_of(observed: Observed, x: Any, epoch: float = 20.0, labels: Tensor = LABELS) -> Tensor:
    """In training mode, with the same dropout each time."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        _, values = observed.student.train()(x)
    return observed.loss(values, observed.teacher(x), labels, epoch)


OBJECTIVES: dict[str, Objective] = {
    "kd": KD(),
    "divergence": KD(temperature=4.0, weight=0.9, final_weight=0.9, form="divergence"),
    "standardised": KD(temperature=2.0, weight=9.0, final_weight=9.0, form="divergence", standardise=True),
    "dkd": DKD(),
    "hint": Hint(),
    "hints": Hint({"first": "second", "third": "third"}, regressor="conv", weight=10.0),
    "attention": AttentionTransfer(),
    "rkd": RKD(),
    "review": ReviewKD(),
    "named": ReviewKD(["third", "first"], ["third", "second"]),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_lowers_its_own_loss(name, student, teacher, x):
    observed = observe(student, teacher, OBJECTIVES[name], epochs=30)
    optimizer = torch.optim.Adam(observed.student.parameters(), 1e-2)
    before = loss_of(observed, x)
    for _ in range(10):
        optimizer.zero_grad()
        loss_of(observed, x).backward()
        optimizer.step()
    assert loss_of(observed, x) < 0.998 * before


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_reach_the_student_and_its_heads_alone(name, student, teacher, x):
    observed = observe(student, teacher, OBJECTIVES[name], epochs=30)
    before = {n: t.clone() for n, t in observed.teacher.state_dict().items()}
    x.requires_grad_()
    targets = observed.teacher(x)
    assert not any(target.requires_grad for target in targets)
    loss_of(observed, x).backward()
    without = {n for n, p in observed.student.named_parameters() if p.grad is None}
    logits = name in ("kd", "divergence", "standardised", "dkd")
    behind = () if logits else ("third.", "head.") if name == "hint" else ("head.",)
    assert without == {n for n, _ in student.named_parameters() if n.startswith(behind)}
    assert all(p.grad is None and not p.requires_grad for p in observed.teacher.parameters())
    assert not any(m.training for m in observed.teacher.modules())
    assert all(torch.equal(t, before[n]) for n, t in observed.teacher.state_dict().items())


# ---------------------------------------------------------------------------------------------------------------------
# What is compared


def hooked(traced: nn.Module, plain: nn.Module, names: list[str], x: Tensor, *, training: bool) -> dict[str, Tensor]:
    """The outputs of a plain model's modules, with the weights of a traced one."""
    plain.load_state_dict(traced.state_dict())
    found: dict[str, Tensor] = {}
    handles = [
        plain.get_submodule(n).register_forward_hook(lambda _, args, out, n=n: found.update({n: out})) for n in names
    ]
    with torch.random.fork_rng():
        torch.manual_seed(5)
        found["logits"] = plain.double().train(training)(x)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        (KD(2.0, 3.0, 3.0), lambda s, t: 3 * losses.kd_cross_entropy(s["logits"], t["logits"], 2.0)),
        (
            KD(2.0, 3.0, 3.0, form="divergence", standardise=True),
            lambda s, t: 3 * losses.kd_divergence(s["logits"], t["logits"], 2.0, standardise=True),
        ),
        (
            DKD(2.0, 3.0, 5.0, 0.5),
            lambda s, t: 0.5 * losses.dkd(s["logits"], t["logits"], LABELS, alpha=2.0, beta=3.0, temperature=5.0),
        ),
        (
            AttentionTransfer(),
            lambda s, t: sum(1000 * losses.attention_transfer(s[n], t[n]) for n in ("first", "second", "third")),
        ),
        (
            AttentionTransfer({"first": "third"}, weight=2.0),
            lambda s, t: 2 * losses.attention_transfer(s["first"], t["third"]),
        ),
        (
            RKD(2.0, 1.0, 3.0),
            lambda s, t: (
                2 * losses.rkd(s["third"].mean((2, 3)), t["third"].mean((2, 3)), distance_weight=1.0, angle_weight=3.0)
            ),
        ),
    ],
)
def test_values_equal_those_of_plain_networks(objective, expected, student, teacher, x):
    observed = observe(student, teacher, objective, epochs=30)
    plain = [Net(3), Net(4)]
    ours = hooked(student, plain[0], ["first", "second", "third"], x, training=True)
    theirs = hooked(teacher, plain[1], ["first", "second", "third"], x, training=False)
    wanted = expected(ours, theirs)
    assert wanted > 0
    assert loss_of(observed, x).item() == pytest.approx(wanted.item(), rel=1e-10)


def test_tokens_are_laid_out_as_the_grid_of_their_patches():
    first, second = build_family("vision transformer"), build_family("swin")
    x = images(2, 3, 32, 32)
    student, teacher = (surgery.trace(family.model, x) for family in (first, second))
    observed = observe(student, teacher, AttentionTransfer("encoder", "features.1", weight=1.0), epochs=3)
    found: dict[str, Tensor] = {}
    first.model.encoder.register_forward_hook(lambda _, args, out: found.update(ours=out))
    second.model.features[1].register_forward_hook(lambda _, args, out: found.update(theirs=out))
    first.model.train()(x), second.model(x)
    ours = found["ours"][:, 1:].reshape(2, 4, 4, 24).permute(0, 3, 1, 2)  # behind the class token
    wanted = losses.attention_transfer(ours, found["theirs"].permute(0, 3, 1, 2))
    assert loss_of(observed, x, labels=LABELS[:2]).item() == pytest.approx(wanted.item(), rel=1e-10)


def test_a_hint_is_the_mean_squared_error_of_the_regressors_output(student, teacher, x):
    observed = observe(student, teacher, Hint("second", "second"), epochs=3, seed=7)
    ours = hooked(student, Net(3), ["second"], x, training=True)["second"]
    theirs = hooked(teacher, Net(4), ["second"], x, training=False)["second"]
    (regressor,) = observed.student.get_submodule("heads.0")
    predicted = F.conv2d(ours, regressor.conv.weight, regressor.conv.bias).relu()
    wanted = 100 * (predicted - theirs).square().sum() / predicted.numel()
    assert loss_of(observed, x).item() == pytest.approx(wanted.item(), rel=1e-10)
    pair = surgery.attach_hint(student, teacher, "second", "second", seed=7)
    assert torch.equal(pair.regressor.conv.weight, regressor.conv.weight)


def test_review_fuses_the_stages_and_what_the_classifier_reads(student, teacher, x):
    observed = observe(student, teacher, ReviewKD(), epochs=3, seed=7)
    names = ["first", "second", "third"]
    ours, theirs = hooked(student, Net(3), names, x, training=True), hooked(teacher, Net(4), names, x, training=False)
    fuse = Review([3, 6, 12, 12], [(4, 8, 8), (8, 4, 4), (16, 2, 2), (16, 1, 1)], seed=7).double().train()
    pooled = [values["third"].mean((2, 3), keepdim=True) for values in (ours, theirs)]
    fused = fuse(*(ours[n] for n in names), pooled[0])
    wanted = 5 * losses.hierarchical_context(fused, [*(theirs[n] for n in names), pooled[1]])
    assert loss_of(observed, x).item() == pytest.approx(wanted.item(), rel=1e-10)
    assert observed.names == (
        (("first", "first"), ("second", "second"), ("third", "third"), ("embedding", "embedding")),
    )


def test_what_review_fuses_is_sorted_by_depth(student, teacher, x):
    mixed = observe(student, teacher, ReviewKD(["third", "first"], ["second", "third"]), epochs=3)
    assert mixed.names == ((("first", "third"), ("third", "second")),)
    assert [tuple(v.shape[1:]) for v in mixed.student.train()(x)[1][0]] == [(16, 2, 2), (8, 4, 4)]


def test_the_teacher_computes_each_value_once_and_nothing_behind(student, teacher, x):
    observed = observe(
        student, teacher, [KD(), DKD(), AttentionTransfer("first", "second"), Hint("first", "second")], epochs=3
    )
    assert [tuple(t.shape) for t in observed.teacher(x)] == [(6, 5), (6, 8, 4, 4)]
    assert observed.reads == ((0,), (0,), (1,), (1,))
    alone = observe(student, teacher, AttentionTransfer("first", "second"), epochs=3)
    assert {n.split(".")[0] for n in alone.teacher.state_dict()} == {"first", "second"}
    assert torch.equal(alone.teacher(x)[0], observed.teacher(x)[1])


def test_features_are_compared_number_by_number():
    one, two = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[[3.0]], [[1.0]]])
    assert losses.mean_squared_error(one, torch.zeros(2, 2)).item() == 5 / 4
    assert losses.mean_squared_error([one, two], [torch.zeros(2, 2), two + 2]).item() == 5 / 4 + 4
    for ours, theirs, text in (
        (one, two, "the student's features are (2, 2) and the teacher's (2, 1, 1): both must be of equal shape"),
        ([one], [], "the student has 1 features and the teacher 0: give as many, at least one"),
    ):
        with pytest.raises(UsageError) as raised:
            losses.mean_squared_error(ours, theirs)
        assert str(raised.value) == text


def test_losses_are_added(student, teacher, x):
    each = [loss_of(observe(student, teacher, o, epochs=9), x, 3.0) for o in (KD(), RKD(), AttentionTransfer())]
    total = loss_of(observe(student, teacher, (KD(), RKD(), AttentionTransfer()), epochs=9), x, 3.0)
    assert total.item() == pytest.approx(sum(each).item(), rel=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Weights over epochs

ONE = [torch.tensor([[1.0, 0.0], [0.0, 2.0]])]
OTHER = [torch.tensor([[0.0, 1.0], [3.0, 0.0]])]
PAIR = torch.tensor([0, 1])


@pytest.mark.parametrize(
    ("objective", "epochs", "weights"),
    [
        (KD(), 10, {0.0: 4.0, 2.5: 3.25, 5.0: 2.5, 10.0: 1.0, 12.0: 1.0}),
        (KD(decay_epochs=4), 10, {0.0: 4.0, 1.0: 3.25, 4.0: 1.0, 9.0: 1.0}),
        (KD(weight=2.0, final_weight=0.0), 4, {0.0: 2.0, 1.0: 1.5, 4.0: 0.0}),
        (KD(weight=3.0, final_weight=3.0), 4, {0.0: 3.0, 1.0: 3.0, 9.0: 3.0}),
    ],
)
def test_the_weight_of_kd_decays_linearly(objective, epochs, weights):
    unit = losses.kd_cross_entropy(ONE[0], OTHER[0], 3.0).item()
    for epoch, weight in weights.items():
        assert objective.loss(ONE, OTHER, PAIR, epoch, epochs).item() == pytest.approx(weight * unit, rel=1e-6)


def test_dkd_and_review_warm_up_linearly():
    maps = [torch.arange(8.0).reshape(2, 1, 2, 2)], [torch.ones(2, 1, 2, 2)]
    units = {
        DKD(weight=2.0): losses.dkd(ONE[0], OTHER[0], PAIR).item() * 2,
        DKD(weight=2.0, warmup_epochs=4): losses.dkd(ONE[0], OTHER[0], PAIR).item() * 2,
        ReviewKD(): losses.hierarchical_context(*maps).item() * 5,
        ReviewKD(warmup_epochs=0): losses.hierarchical_context(*maps).item() * 5,
    }
    for objective, unit in units.items():
        values = (ONE, OTHER) if isinstance(objective, DKD) else maps
        warmup = objective.warmup_epochs
        for epoch in (0.0, 1.5, 4.0, 20.0, 50.0):
            fraction = 1.0 if warmup == 0 else min(1.0, epoch / warmup)
            assert objective.loss(*values, PAIR, epoch, 100).item() == pytest.approx(fraction * unit, rel=1e-6)


def test_the_defaults_are_those_of_the_papers():
    assert (KD().temperature, KD().weight, KD().final_weight, KD().form, KD().standardise) == (
        3.0,
        4.0,
        1.0,
        "cross-entropy",
        False,
    )
    assert (DKD().alpha, DKD().beta, DKD().temperature, DKD().weight, DKD().warmup_epochs) == (1, 8, 4, 1, 20)
    assert (Hint().weight, AttentionTransfer().weight, ReviewKD().weight, ReviewKD().warmup_epochs) == (
        100,
        1000,
        5,
        20,
    )
    assert (RKD().weight, RKD().distance_weight, RKD().angle_weight) == (1, 25, 50)
    with pytest.raises(FrozenInstanceError):
        KD().weight = 2.0  # type: ignore[misc]


# ---------------------------------------------------------------------------------------------------------------------
# Networks of every kind


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("vision transformer", "mobilenet_v3_small"),
        ("mobilenet_v3_small", "vision transformer"),
        ("swin", "vision transformer"),
        ("resnet18", "swin"),
        ("convnext", "swin"),
    ],
)
def test_networks_of_different_families_learn_from_each_other(ours, theirs):
    first, second = build_family(ours), build_family(theirs)
    x = images(3, 3, 32, 32)
    student, teacher = (surgery.trace(family.model, x) for family in (first, second))
    observed = observe(student, teacher, [Hint(), AttentionTransfer(), RKD(), ReviewKD()], epochs=2)
    loss = loss_of(observed, x, labels=LABELS[:3])
    loss.backward()
    assert loss.isfinite()
    known = dict(student.named_parameters())
    assert [n for n, p in observed.student.named_parameters() if n not in known and p.grad is None] == []
    restored = observed.restore(student)
    assert list(restored.state_dict()) == list(student.state_dict())
    assert torch.equal(observed.student.eval()(x), restored(x))


def test_auxiliary_outputs_appear_in_training_only():
    family = build_family("googlenet")
    observed = observe(family.traced, family.traced, [KD(), Hint("inception4a", "inception4e"), RKD()], epochs=3)
    output, values = observed.student.train()(family.x)
    assert type(output).__name__ == "GoogLeNetOutputs"
    assert torch.equal(values[0][0], output.logits)
    loss = observed.loss(values, observed.teacher(family.x), LABELS[:2], 0.0) + sum(o.square().mean() for o in output)
    loss.backward()
    assert [n for n, p in observed.student.named_parameters() if p.grad is None] == []
    restored = observed.restore(family.traced)
    assert torch.equal(observed.student.eval()(family.x), restored(family.x))
    assert len(restored.train()(family.x)) == 3


def test_a_hint_uses_the_same_middle_layer_as_stage_1():
    family = build_family("googlenet")
    joint = observe(family.traced, family.traced, Hint(), epochs=1)
    assert joint.names[0] == surgery.attach_hint(family.traced, family.traced).names


def test_maxout_networks():
    x = catalogue.example_inputs("fitnet_mnist")
    x = x[0] if isinstance(x, tuple) else x
    student, teacher = (
        surgery.trace(catalogue.build(n, seed=0).eval(), x) for n in ("fitnet_mnist", "fitnet_mnist_teacher")
    )
    observed = observe(student, teacher, [KD(), Hint(), AttentionTransfer(), RKD()], epochs=3)
    assert observed.names[1] == (("layer4", "layer2"),)
    assert type(observed.student.get_submodule("heads.1")[0][-1]).__name__ == "Maxout"
    loss_of(observed, x, labels=LABELS[: len(x)]).backward()
    assert [n for n, p in observed.student.named_parameters() if p.grad is None] == []


def test_networks_traced_with_other_batches_go_together(x):
    student, teacher = net(3), surgery.trace(randomised(Net(4)).double().eval(), images(2, 3, 16, 16))
    objectives = [KD(), Hint(), AttentionTransfer(), RKD(), ReviewKD()]
    observed = observe(student, teacher, objectives, epochs=3)
    assert loss_of(observed, x).isfinite()
    assert observed.names[2] == (("first", "first"), ("second", "second"), ("third", "third"))


def test_distributed_data_parallel_finds_every_parameter_used(student, teacher, x, tmp_path):
    observed = observe(student, teacher, [KD(), Hint("second", "second"), ReviewKD()], epochs=3)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(observed.student.train())
        for _ in range(2):  # the second call is an error where the first left parameters unused
            output, values = wrapped(x)
            loss = F.cross_entropy(output, LABELS) + observed.loss(values, observed.teacher(x), LABELS, 1.0)
            loss.backward()
    finally:
        torch.distributed.destroy_process_group()
    assert all(p.grad is not None for p in observed.student.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# What goes in and what comes out


def test_inputs_are_neither_changed_nor_shared(student, teacher, x):
    student.train()
    before = [({n: t.clone() for n, t in m.state_dict().items()}, str(m.graph)) for m in (student, teacher)]
    state = torch.get_rng_state()
    observed = observe(student, teacher, [KD(), Hint(), ReviewKD()], epochs=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(m.training for m in observed.student.modules())
    optimizer = torch.optim.SGD(observed.student.parameters(), 0.1)
    loss_of(observed, x).backward()
    optimizer.step()
    restored = observed.restore(student)
    for module, (tensors, graph) in zip((student, teacher), before, strict=True):
        assert all(torch.equal(t, tensors[n]) for n, t in module.state_dict().items())
        assert (str(module.graph), module.train_graph) == (graph, None)
        assert all(p.requires_grad for p in module.parameters())
    assert student.training
    assert not teacher.training
    given = {t.data_ptr() for m in (student, teacher, restored) for t in m.state_dict().values()}
    assert not given & {t.data_ptr() for m in (observed.student, observed.teacher) for t in m.state_dict().values()}


def test_the_restored_student_has_what_was_trained_and_nothing_else(student, teacher, x, tmp_path):
    wide = surgery.widen(student, {"first.0": 5})
    observed = observe(wide, teacher, [KD(), Hint(), ReviewKD()], epochs=3)
    optimizer = torch.optim.SGD(observed.student.parameters(), 0.01)
    loss_of(observed, x).backward()
    optimizer.step()
    restored = observed.restore(wide)
    assert list(restored.state_dict()) == list(wide.state_dict())
    trained = observed.student.state_dict()
    assert all(torch.equal(t, trained[n]) for n, t in restored.state_dict().items())
    assert not torch.equal(restored.get_parameter("first.0.weight"), wide.get_parameter("first.0.weight"))
    assert not torch.equal(restored.get_buffer("first.1.running_mean"), wide.get_buffer("first.1.running_mean"))
    assert surgery.recipe(restored) == surgery.recipe(wide)
    assert restored.train_graph is None
    assert surgery.widen(restored, 2.0)(x).shape == (6, 5)
    surgery.export_onnx(restored.float(), tmp_path / "student.onnx")
    written = (tmp_path / "student.onnx").read_bytes()
    assert b"heads" not in written
    assert b"head.weight" in written


def test_the_observed_student_keeps_its_names_and_can_be_copied(student, teacher, x):
    observed = observe(student, teacher, [KD(), Hint()], epochs=3)
    names = list(observed.student.state_dict())
    assert [n for n in names if not n.startswith("heads.")] == list(student.state_dict())
    assert torch.equal(observed.student.eval()(x), student(x))
    expected = loss_of(observed, x)
    file = io.BytesIO()
    torch.save(observed.student, file)
    file.seek(0)
    start = {n: t.clone() for n, t in observed.student.state_dict().items()}
    for other in (copy.deepcopy(observed.student), torch.load(file, weights_only=False)):
        other.load_state_dict(start)
        with torch.random.fork_rng():
            torch.manual_seed(5)
            _, values = other.train()(x)
        assert torch.equal(observed.loss(values, observed.teacher(x), LABELS, 20.0), expected)


def test_a_students_own_heads_keep_their_name(teacher, x):
    class Headed(Net):
        def __init__(self):
            super().__init__(3)
            self.heads = nn.Identity()

        def forward(self, x):
            return self.heads(super().forward(x))

    student = surgery.trace(Headed().double(), x)
    observed = observe(student, teacher, Hint(), epochs=3)
    assert any(n.startswith("heads_0.0.") for n in observed.student.state_dict())
    assert observed.restore(student)(x).shape == (6, 5)


def test_weights_of_heads_come_from_the_seed(student, teacher):
    def heads(seed: int) -> dict[str, Tensor]:
        made = observe(
            student, teacher, [Hint("first", "first"), Hint("first", "first"), ReviewKD()], epochs=3, seed=seed
        )
        return {n: t for n, t in made.student.state_dict().items() if n.startswith("heads.")}

    one, two, three = heads(1), heads(1), heads(2)
    assert all(torch.equal(one[n], two[n]) for n in one)
    first, second = "heads.0.0.conv.weight", "heads.1.0.conv.weight"
    assert not torch.equal(one[first], three[first])
    assert not torch.equal(one[first], one[second])
    assert not torch.equal(one["heads.2.levels.0.narrow.0.weight"], three["heads.2.levels.0.narrow.0.weight"])
    assert {t.dtype for n, t in one.items() if t.is_floating_point()} == {torch.float64}


def test_weights_of_a_student_trained_elsewhere_can_be_loaded(student, teacher, x):
    observed = observe(student, teacher, [KD(), Hint()], epochs=3)
    other = net(3, seed=9)
    observed.take(other)
    assert torch.equal(observed.student.eval()(x), other(x))
    assert torch.equal(observed.restore(student)(x), other(x))
    for call in (observed.take, observed.restore):
        with pytest.raises(UsageError) as raised:
            call(net(4))
        assert str(raised.value) == (
            "'first.0.weight' of the observed student is (3, 3, 3, 3), and this student has it as (4, 3, 3, 3): pass "
            "the student that is observed"
        )


@dataclass(frozen=True)
class Cosine(Objective):
    """An objective of one's own."""

    guided: str
    weight: float = 2.0

    def compare(self, student, teacher, seed):
        return Compared(((student.tap(self.guided), teacher.tap(self.guided)),))

    def loss(self, ours, theirs, labels, epoch, epochs):
        return self.weight * (1 - F.cosine_similarity(ours[0].mean(1).flatten(1), theirs[0].mean(1).flatten(1)).mean())


def test_a_new_objective_is_one_class(student, teacher, x):
    observed = observe(student, teacher, [Cosine("second")], epochs=3)
    assert observed.names == ((("second", "second"),),)
    assert 0 < loss_of(observed, x) < 2


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: KD(temperature=0.0), "temperature of KD must be a number above 0, not 0.0"),
        (lambda: KD(weight=-1.0), "weight of KD must be a number of at least 0, not -1.0"),
        (lambda: KD(final_weight=math.nan), "final_weight of KD must be a number of at least 0, not nan"),
        (lambda: KD(decay_epochs=0), "decay_epochs of KD must be a whole number of at least 1, not 0"),
        (lambda: KD(form="entropy"), "unknown form of KD 'entropy'; did you mean 'cross-entropy'?"),
        (lambda: DKD(temperature=math.inf), "temperature of DKD must be a number above 0, not inf"),
        (lambda: DKD(beta="8"), "beta of DKD must be a number of at least 0, not '8'"),
        (lambda: DKD(warmup_epochs=-1), "warmup_epochs of DKD must be a number of at least 0, not -1"),
        (lambda: Hint(weight=True), "weight of Hint must be a number of at least 0, not True"),
        (lambda: Hint(regressor="linear"), "unknown regressor of Hint 'linear': one of 'auto', 'conv', 'fc', 'none'"),
        (lambda: AttentionTransfer(weight=-1), "weight of AttentionTransfer must be a number of at least 0, not -1"),
        (lambda: RKD(angle_weight=-1), "angle_weight of RKD must be a number of at least 0, not -1"),
        (lambda: ReviewKD(warmup_epochs=None), "warmup_epochs of ReviewKD must be a number of at least 0, not None"),
    ],
)
def test_settings_are_checked_when_an_objective_is_made(make, text):
    with pytest.raises(UsageError) as raised:
        make()
    assert str(raised.value) == text


@pytest.mark.parametrize(
    ("objectives", "error", "text"),
    [
        ([], UsageError, "no objectives: the student has nothing to learn from the teacher"),
        (
            Hint("frist", "first"),
            UsageError,
            "unknown layer 'frist'; did you mean 'first', 'first.5', 'first.4', 'first.3'?",
        ),
        (Hint(["first", "second"], "first"), UsageError, "2 guided layers for 1 hints: each pair needs one of both"),
        (
            AttentionTransfer("first"),
            UsageError,
            "name layers of both networks, guided= and hint=, or of neither",
        ),
        (
            ReviewKD({"first": "first"}, "first"),
            UsageError,
            "a mapping from guided layers to hints names both: leave out hint=",
        ),
        (
            AttentionTransfer("head", "first"),
            EditError,
            "the output of 'head' in the student is 5: only maps, and tokens that are a grid, can be compared as maps",
        ),
    ],
)
def test_values_that_cannot_be_observed_raise_an_error_with_the_reason(objectives, error, text, student, teacher):
    with pytest.raises(error) as raised:
        observe(student, teacher, objectives, epochs=3)
    assert str(raised.value) == text


def test_other_classes_are_refused_where_logits_are_compared(student, x):
    other = net(4, classes=7)
    for objective in (KD(), DKD()):
        with pytest.raises(UsageError) as raised:
            observe(student, other, objective, epochs=3)
        assert str(raised.value) == (
            "the student has 5 classes and the teacher 7: logits can only be compared for equal numbers"
        )
    assert loss_of(observe(student, other, [AttentionTransfer(), RKD()], epochs=3), x).isfinite()


def test_epochs_are_at_least_one(student, teacher):
    with pytest.raises(UsageError, match=r"^epochs must be a whole number of at least 1, not 0$"):
        observe(student, teacher, KD(), epochs=0)


def test_tokens_that_do_not_form_a_grid_are_refused():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches, self.mlp, self.head = nn.Conv1d(3, 6, 1), nn.Linear(6, 6), nn.Linear(6, 5)

        def forward(self, x):
            return self.head(self.mlp(self.patches(x.flatten(2)).mT).mean(1))

    traced, _ = traced_of(Tokens, 2, 3, 2, 3)
    with pytest.raises(EditError) as raised:
        observe(traced, traced, AttentionTransfer("mlp", "mlp"), epochs=3)
    assert str(raised.value) == (
        "the output of 'mlp' in the student is 6 x 6: only maps, and tokens that are a grid, can be compared as maps"
    )


def test_networks_that_take_other_inputs_are_refused(student):
    flat = surgery.trace(nn.Sequential(nn.Flatten(), nn.Linear(12, 5)).double(), torch.randn(2, 12).double())
    with pytest.raises(
        UsageError, match=r"^the teacher cannot be called on the student's example inputs \[\(6, 3, 8, 8"
    ):
        observe(student, flat, KD(), epochs=3)


def test_modules_traced_in_parts_are_refused(student):
    class Looping(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = Net(3)

        def forward(self, x):
            y = self.part(x)
            return y if y.sum() > 0 else -y

    parts = surgery.trace(Looping().double().eval(), images(*SHAPE))
    for pair, what in (((parts, student), "student"), ((student, parts), "teacher")):
        with pytest.raises(UsageError) as raised:
            observe(*pair, KD(), epochs=3)
        assert str(raised.value) == (
            f"the {what} is traced in parts, so it cannot be cut off: pass the part that holds the layer"
        )
    with pytest.raises(UsageError, match=r"is not a traced module: pass it through surgery.trace first"):
        observe(Net(3), student, KD(), epochs=3)
