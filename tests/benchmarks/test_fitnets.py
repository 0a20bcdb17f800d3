"""The benchmark of FitNets: what it compares is comparable, and what is finished is not run again."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import surgery
from benchmarks.fitnets import cost as fitnets_cost
from benchmarks.fitnets import step as fitnets_step
from benchmarks.fitnets import train as fitnets_train
from benchmarks.fitnets.tables import train_table
from benchmarks.fitnets.train import LONGER, METHODS, NETS, Task, TrainSettings
from tests.helpers import ImmediateExecutor

SMALL = TrainSettings(
    part="mnist",
    dataset="digits",
    data_root=None,
    limit=40,
    teacher="fitnet_mnist_teacher",
    teacher_rate=0.125,
    teacher_epochs=1,
    teacher_lr=1e-3,
    student_rate=0.25,
    init_range=0.005,
    optimizer="adamw",
    rates=(1e-3, 2e-3),
    batch_size=16,
    hint_epochs=1,
    epochs=1,
)


@pytest.fixture
def run_all(monkeypatch):
    """Runs what a document lacks, without any training, and says what was called."""
    calls = []

    def teach(settings, seed, validation):
        calls.append(("teach", seed, validation))
        return {
            "net": "t",
            "method": "teacher",
            "seed": seed,
            "validation": validation,
        }, f"{seed} {validation}".encode()

    def learn(settings, task, weights):
        assert weights == f"{task.seed} {task.validation}".encode()
        calls.append((task.method, task.seed, task.validation, task.lr))
        return {**task.key, "accuracy": [task.lr]}

    monkeypatch.setattr(fitnets_train, "teach", teach)
    monkeypatch.setattr(fitnets_train, "learn", learn)

    def run(document, seeds):
        calls.clear()
        for record in fitnets_train.all_runs(SMALL, document, seeds, ImmediateExecutor()):
            document["runs"].append(record)
        return list(calls)

    return run


@pytest.mark.parametrize("name", ["fitnet1", "fitnet_30m_9", "fitnet_mnist"])
def test_the_counts_are_compared_with_the_derived_ones_to_their_last_digit(name, monkeypatch):
    net = fitnets_cost._traced(name)
    found = fitnets_cost.count(name, net)
    assert found["as_derived"]
    known = fitnets_cost.PUBLISHED[name]
    other = f"{found['weights'] + 1:,}"
    wrong = fitnets_cost.Published(known.label, known.group, other, known.multiplications)
    monkeypatch.setitem(fitnets_cost.PUBLISHED, name, wrong)
    assert not fitnets_cost.count(name, net)["as_derived"]


def test_a_rounded_count_is_compared_in_the_digits_it_has():
    assert fitnets_cost.printed(29_265_288, "29.27M") == "29.27M"
    assert fitnets_cost.printed(29_265_288, "29,265,288") == "29,265,288"


def test_every_way_to_take_a_step_has_the_same_losses_and_learns():
    settings = fitnets_step.StepSettings(
        student="resnet18", teacher="resnet18", guided="layer1", hint="layer1", batch_size=2, image_size=32,
        device="cpu", rounds=2, warmup=1,
    )  # fmt: skip
    result = fitnets_step.measure(settings)
    assert {way: len(times) for way, times in result["samples_ms"].items()} == dict.fromkeys(fitnets_step.WAYS, 2)
    losses = result["losses"]
    assert losses["hooks"] == pytest.approx(losses["truncated"], rel=1e-5)
    assert losses["hooks"] == pytest.approx(losses["cached"], rel=1e-5)
    assert losses["hooks"][-1] < losses["hooks"][0]
    assert result["macs"]["teacher_prefix"] < result["macs"]["teacher"]


def test_other_losses_are_an_error():
    with pytest.raises(AssertionError, match="do not compute the same loss"):
        fitnets_step.check_equal({"hooks": 1.0, "truncated": 1.001, "cached": 1.0})
    with pytest.raises(AssertionError, match="do not compute the same loss"):
        fitnets_step.check_equal({"hooks": float("nan"), "truncated": 1.0, "cached": 1.0})


def test_every_net_learns_at_each_rate_on_a_part_and_then_by_seeds_at_the_best(run_all):
    calls = run_all({"runs": []}, seeds=2)
    grid = [(method, 0, True, lr) for method in (*METHODS, LONGER) for lr in SMALL.rates]
    finals = [[(method, seed, False, 2e-3) for method in (*METHODS, LONGER)] for seed in (0, 1)]
    assert calls[:9] == [("teach", 0, True), *grid]
    assert sorted(calls[9:]) == sorted([("teach", 0, False), ("teach", 1, False), *finals[0], *finals[1]])


def test_a_killed_run_goes_on_with_what_is_missing(run_all):
    document = {"runs": []}
    run_all(document, seeds=2)
    assert run_all(document, seeds=2) == []

    lost = [r for r in document["runs"] if (r["method"], r["seed"], r["validation"]) == ("hints", 1, False)]
    document["runs"] = [r for r in document["runs"] if r not in lost]
    assert run_all(document, seeds=2) == [("teach", 1, False), ("hints", 1, False, 2e-3)]
    assert document["runs"][-1:] == lost
    assert sum(r["method"] == "teacher" for r in document["runs"]) == 3

    document["runs"] = document["runs"][:4]
    run_all(document, seeds=2)
    assert len(document["runs"]) == 3 + 8 + 8


def test_methods_have_the_same_number_of_epochs_in_all_or_in_stage_2_and_a_task_again_is_the_same():
    task = Task(NETS["mnist"][0], "hints", 1e-3, 0, False)
    small = replace(SMALL, epochs=2)
    _, weights = fitnets_train.teach(small, 0, False)
    hints = fitnets_train.learn(small, task, weights)
    kd = fitnets_train.learn(small, replace(task, method="kd"), weights)
    assert (len(hints["hint_loss"]), len(hints["accuracy"])) == (1, 2)
    assert (len(kd["hint_loss"]), len(kd["accuracy"])) == (0, 3)
    longer = fitnets_train.learn(small, replace(task, method=LONGER), weights)
    assert (len(longer["hint_loss"]), len(longer["accuracy"])) == (1, 3)

    assert fitnets_train.teach(small, 0, False)[1] == weights
    again = fitnets_train.learn(small, task, weights)
    assert {**again, "seconds": 0} == {**hints, "seconds": 0}


def test_the_rate_is_taken_by_the_validation_images_alone_and_the_lower_of_two_as_good():
    def run(lr, accuracy, validation=True, method="kd"):
        return {"net": "a", "method": method, "lr": lr, "validation": validation, "accuracy": [0.9, accuracy]}

    runs = [run(0.004, 0.5), run(0.002, 0.5), run(0.001, 0.4), run(0.1, 0.8, False), run(0.2, 0.8, True, "hints")]
    assert fitnets_train.best_rate({"runs": runs}, "a", "kd") == 0.002


def test_the_validation_images_are_training_images_that_are_not_learned_from():
    def keys(images):
        return {images[k][0].numpy().tobytes() for k in range(len(images))}

    whole, split = (fitnets_train.data_for(replace(SMALL, limit=200), validation) for validation in (False, True))
    train, held_out = keys(split.train), keys(split.test)
    assert train.isdisjoint(held_out)
    assert train | held_out == keys(whole.train)
    assert held_out.isdisjoint(keys(whole.test))


def test_a_training_that_diverges_is_recorded_as_guessing():
    task = Task(NETS["mnist"][0], "backprop", 1e30, 0, False)
    record = fitnets_train.learn(replace(SMALL, optimizer="sgd", init_range=None, epochs=3), task, b"")
    assert record["accuracy"] == [0.1]
    assert "lower lr" in record["diverged"]


def test_the_table_counts_seeds_in_which_the_papers_order_holds():
    def run(method, seed, error, net="fitnet_mnist"):
        return {"net": net, "method": method, "seed": seed, "validation": False, "lr": 1e-3, "accuracy": [1 - error],
                "params": 1}  # fmt: skip

    errors = {"backprop": (0.30, 0.04), "kd": (0.03, 0.05), "hints": (0.03, 0.06)}
    runs = [run(method, seed, error) for method, both in errors.items() for seed, error in enumerate(both)]
    runs += [run("teacher", seed, 0.01, "fitnet_mnist_teacher") for seed in (0, 1)]
    where = {"date": "2026-01-01", "cpu": "c", "gpu": None, "versions": {"torch": "1", "onnxruntime": "1"}}
    text = train_table({"command": "x", "environment": where, "settings": SMALL.to_dict(), "runs": runs})
    assert "hints are at least as good as KD in 1 of 2 seeds, KD is better than backpropagation in 1." in text
    assert "| backpropagation | 0.001 | 17.0% (4.0 to 30.0) | 17.00% | 1 of 2 | 30.0 4.0 |" in text


def test_a_step_with_hooks_leaves_no_gradient_behind_the_guided_layer():
    student, teacher = (nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)) for _ in range(2))
    images = torch.randn(5, 4)
    before = {name: p.clone() for name, p in student.named_parameters()}
    fitnets_step.hooked(student, teacher, "1", "1", nn.Linear(3, 3), images)()
    moved = {name for name, p in student.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"0.weight", "0.bias"}
    assert all(p.grad is None for p in teacher.parameters())


def test_slim_students_keep_the_range_of_their_initial_weights():
    net = fitnets_train.network("fitnet_30m_5", 0.5, 0.005, 0)
    weights = [p.detach() for p in net.parameters() if p.ndim > 1]
    assert 0.0045 < max(float(w.abs().max()) for w in weights) <= 0.005
    assert surgery.cost(net).params < 0.3 * surgery.cost(fitnets_train.network("fitnet_30m_5", 1, None, 0)).params
