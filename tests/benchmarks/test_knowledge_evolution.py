"""The benchmark of Knowledge Evolution: what it compares is comparable, and what is finished is not run again."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

import surgery
from benchmarks.knowledge_evolution import generations, report, step
from benchmarks.knowledge_evolution.generations import Settings, Task
from tests.helpers import ImmediateExecutor

SMALL = Settings(
    dataset="digits",
    data_root=None,
    image_size=32,
    train_images=64,
    validation_images=40,
    test_images=400,
    model="resnet18",
    width=0.0625,
    split_rate=0.5,
    generations=2,
    epochs=(1, 2),
    rates=(0.01, 0.02),
    batch_size=16,
)


@pytest.fixture
def run_all(monkeypatch):
    """Runs what a document lacks, without any training, and says what was run. The greater rate does better, and for
    the slim network the greater number of epochs."""

    def run(settings, task):
        best = round(1000 * task.lr)
        return {**asdict(task), "total": 100, "dense": [best - task.epochs], "slim": [best + task.epochs]}

    def call(document, seeds):
        before = len(document["runs"])
        for record in generations.all_runs(SMALL, document, seeds, ImmediateExecutor()):
            document["runs"].append(record)
        keys = Task.__dataclass_fields__
        return [tuple(run[key] for key in keys) for run in document["runs"][before:]]

    monkeypatch.setattr(generations, "run", run)
    return call


FINALS = [(arm, 2, 0.02, seed, False) for seed in (0, 1) for arm in generations.ARMS]


def test_settings_are_chosen_on_validation_images_and_then_every_seed_runs(run_all):
    ran = run_all({"runs": []}, 2)
    assert sorted(ran[:4]) == [("evolution", epochs, lr, 0, True) for epochs in (1, 2) for lr in (0.01, 0.02)]
    assert sorted(ran[4:6]) == [("long", 2, 0.01, 0, True), ("long", 2, 0.02, 0, True)]
    assert sorted(ran[6:]) == sorted(FINALS)


def test_a_killed_run_goes_on_with_what_is_missing(run_all):
    document = {"runs": []}
    run_all(document, 2)
    assert run_all(document, 2) == []
    lost = document["runs"].pop(7)
    assert run_all(document, 2) == [tuple(lost[key] for key in Task.__dataclass_fields__)]
    document["runs"] = document["runs"][:5]
    assert len(run_all(document, 2)) == 1 + 4
    assert {run[3] for run in run_all(document, 3)} == {2}


def test_the_choice_is_by_the_slim_network_and_for_long_by_the_dense_one_on_validation_images_alone():
    def tried(arm, lr, dense, slim, epochs=1, validation=True):
        return {"arm": arm, "epochs": epochs, "lr": lr, "validation": validation, "dense": dense, "slim": slim}

    runs = [
        tried("evolution", 0.1, [90, 99], [10, 20]),
        tried("evolution", 0.3, [90, 80], [99, 70], epochs=2),
        tried("evolution", 0.2, [90, 80], [99, 70], epochs=2),
        tried("evolution", 0.4, [90, 80], [99, 70], epochs=3),
        tried("evolution", 0.5, [90, 80], [99, 99], validation=False),
        tried("evolution", 0.6, [], []),
        tried("long", 0.1, [50], [99]),
        tried("long", 0.2, [60], [10]),
    ]
    assert generations.choice({"runs": runs}, "evolution") == (2, 0.2)
    assert generations.choice({"runs": runs}, "long") == (1, 0.2)


def test_no_image_is_both_learned_from_and_tested_on():
    def keys(images):
        return {images[k][0].numpy().tobytes() for k in range(len(images))}

    chosen_by, scored = (generations.data_for(SMALL, validation) for validation in (True, False))
    assert [chosen_by.counts, scored.counts] == [(64, 40), (64, 400)]
    train, held_out, test = keys(scored.train), keys(chosen_by.test), keys(scored.test)
    assert keys(chosen_by.train) == train
    assert train.isdisjoint(held_out)
    assert test.isdisjoint(train | held_out)
    whole = surgery.load_data("digits", image_size=32)
    assert keys(whole.test) < test
    assert len(test & keys(whole.train)) == len(test) - len(keys(whole.test))
    with pytest.raises(SystemExit, match="digits has 1438 training images, and 1400 \\+ 40 are asked for"):
        generations.data_for(replace(SMALL, train_images=1400), False)


def test_networks_begin_at_their_own_widths_and_differ_by_seed():
    data = generations.data_for(SMALL, True)
    half = replace(SMALL, width=0.5)
    first, again, other = (generations.beginning(half, data, seed) for seed in (0, 0, 1))
    weight = first.get_parameter("layer2.0.conv1.weight")
    assert weight.shape == (64, 32, 3, 3)
    assert torch.equal(weight, again.get_parameter("layer2.0.conv1.weight"))
    assert not torch.equal(weight, other.get_parameter("layer2.0.conv1.weight"))
    assert weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.05)  # kaiming normal, fan out


def test_both_arms_begin_alike_and_take_as_many_steps(monkeypatch):
    seen = []
    for name in ("evolve", "train"):
        module = generations if name == "evolve" else surgery
        whole = getattr(module, name)

        def watched(network, data, *args, whole=whole, **settings):
            weights = {key: value.clone() for key, value in network.state_dict().items()}
            found = whole(network, data, *args, **settings)
            steps = [g.history.steps for g in getattr(found, "generations", ())] or [found.steps]
            seen.append((weights, sum(steps), settings.get("weight_decay")))
            return found

        monkeypatch.setattr(module, name, watched)
    evolved = generations.run(SMALL, Task("evolution", 1, 0.01, 0, True))
    long = generations.run(SMALL, Task("long", 1, 0.01, 0, True))
    (first, *rest), (second, *others) = seen
    assert rest == others == [2 * 64 // 16, 1e-4]
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {who: len(evolved[who]) for who in ("dense", "slim", "recalibrated", "loss")} == dict.fromkeys(
        ("dense", "slim", "recalibrated", "loss"), 2
    )
    assert {who: len(long[who]) for who in ("dense", "slim", "recalibrated", "loss")} == dict.fromkeys(
        ("dense", "slim", "recalibrated", "loss"), 1
    )
    assert evolved["total"] == long["total"] == 40
    again = generations.run(SMALL, Task("long", 1, 0.01, 0, True))
    assert {**again, "seconds": 0} == {**long, "seconds": 0}


def test_a_training_that_diverges_is_recorded_while_settings_are_chosen_and_is_an_error_afterwards(monkeypatch):
    def diverges(*args, **settings):
        raise FloatingPointError("lower lr")

    monkeypatch.setattr(generations, "evolve", diverges)
    record = generations.run(SMALL, Task("evolution", 1, 0.01, 0, True))
    assert (record["diverged"], record["dense"], record["slim"]) == ("lower lr", [], [])
    with pytest.raises(FloatingPointError):
        generations.run(SMALL, Task("evolution", 1, 0.01, 0, False))


def document(slim=((10, 90), (20, 92)), recalibrated=((80, 91), (80, 97)), long=(90, 91)):
    def final(arm, seed, **lists):
        key = {"arm": arm, "epochs": 2, "lr": 0.02, "seed": seed, "validation": False, "total": 100}
        return {**key, **lists, "cost": {"params": 1e6, "macs": 2e6}}

    runs = [{**final(arm, 0, dense=[80], slim=[70]), "validation": True} for arm in generations.ARMS]
    for seed, (carved, fresh, baseline) in enumerate(zip(slim, recalibrated, long, strict=True)):
        runs.append(final("evolution", seed, dense=[80, 92 + seed], slim=list(carved), recalibrated=list(fresh)))
        runs.append(final("long", seed, dense=[baseline], slim=[10], recalibrated=[20]))
    where = {"date": "2026-01-01", "cpu": "c", "versions": {"torch": "1"}}
    return {"command": "x", "environment": where, "settings": SMALL.to_dict(), "runs": runs}


def test_differences_are_paired_by_seed():
    found = report.Difference.of([0.90, 0.92, 0.97], [0.90, 0.91, 0.95])
    assert found.mean == pytest.approx(0.01)
    assert found.high - found.mean == pytest.approx(4.3027 * 0.01 / 3**0.5, rel=1e-4)  # t of 2 degrees of freedom
    assert (found.greater, found.count) == (2, 3)
    assert report.Difference.of([0.90, 0.91], [0.80, 0.81]).verdict == "better than"
    assert report.Difference.of([0.80, 0.81], [0.90, 0.91]).verdict == "worse than"
    assert found.verdict.startswith("not told apart")


def test_the_slim_network_has_reached_the_dense_one_where_it_stays_close():
    def behind(*points):
        return [report.Difference(point / 100, 0, 0, 0, 1) for point in points]

    assert report.reached(behind(-80, -0.4, -3, -0.5, 0.2)) == 4
    assert report.reached(behind(0.1, -0.1)) == 1
    assert report.reached(behind(-0.1, -0.6)) is None


def test_the_table_has_what_was_found():
    text = report.generations_table(document())
    assert "| 2 | 92.5% (92.0 to 93.0) | 91.0% (90.0 to 92.0) | 94.0% (91.0 to 97.0) | -1.50 (" in text
    assert "| long | 90.5% (90.0 to 91.0) | 10.0% (10.0 to 10.0) | 20.0% (20.0 to 20.0) | | | |" in text
    assert "The slim network does not come within 0.5 points of the dense one for good." in text
    assert "recalibrated BatchNorm it is within 0.5 points of the dense one, or above it, from generation 1 on" in text
    assert (
        "the dense network is better than `long`: +2.00 (+2.00 to +2.00) points; it is ahead in 2 of 2 seeds." in text
    )
    assert "the slim network is not told apart, by these seeds, from `long`: +0.50" in text
    assert "| evolution | 2 | 0.02 | 80.0% | 70.0% | yes |" in text
    unfinished = document()
    unfinished["runs"] = unfinished["runs"][:3]
    assert "not finished" in report.generations_table(unfinished)


def test_seeds_that_one_arm_lacks_are_left_out():
    whole = document()
    assert report.accuracies({**whole, "runs": whole["runs"][:-1]}, "evolution", "dense").tolist() == [[0.8, 0.92]]
    assert report.accuracies(whole, "evolution", "dense").shape == (2, 2)


def test_the_picture_is_drawn_once_there_is_something_to_draw(tmp_path):
    whole = document()
    report.draw({**whole, "runs": whole["runs"][:2]}, tmp_path / "none.png")
    report.draw({**whole, "runs": whole["runs"][:4]}, tmp_path / "one.png")
    report.draw(whole, tmp_path / "two.png")
    assert {path.name for path in tmp_path.iterdir()} == {"one.png", "two.png"}


def test_steps_are_timed_three_ways_in_as_many_rounds():
    settings = step.StepSettings(
        model="resnet18", image_size=32, batch_size=2, split_rate=0.5, device="cpu", steps=2, rounds=2
    )
    result = step.measure(settings)
    assert {way: np.array(times).shape for way, times in result["samples_ms"].items()} == dict.fromkeys(
        step.WAYS, (2, 2)
    )
    assert set(result["ratios"]) == {"torch", "train"}
    environment = {"date": "2026-01-01", "cpu": "c", "versions": {"torch": "1"}}
    text = report.step_table(
        {"command": "x", "environment": environment, "settings": asdict(settings), "result": result}
    )
    assert "| `surgery.evolve`, second generation |" in text
