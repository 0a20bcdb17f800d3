"""The training loop and the evaluation."""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch
from torch import nn
from torch.nn import functional

from surgery.errors import UsageError
from surgery.training.data.data import load_data
from surgery.training.evaluation import evaluate
from surgery.training.history import Score
from surgery.training.loop import classification_loss, train
from surgery.training.optimizers import SCHEDULES


def small_net(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Dropout(0.1),
            nn.Flatten(),
            nn.Linear(256, 10),
        )


def test_training_learns_the_digits(digits):
    model = small_net()
    before = evaluate(model, digits.test).accuracy
    history = train(model, digits, epochs=4, lr=0.1, test_each_epoch=True)
    model = history.module
    assert before < 0.3
    assert evaluate(model, digits.test).accuracy > 0.93
    assert [epoch.score.accuracy for epoch in history.epochs][-1] == evaluate(model, digits.test).accuracy
    assert history.epochs[-1].loss < history.epochs[0].loss
    assert history.steps == 4 * (1438 // 64)


def test_adamw_is_another_row_of_the_table(digits):
    model = small_net()
    history = train(model, digits, epochs=4, optimizer="adamw", lr=0.01)
    model = history.module
    assert evaluate(model, digits.test).accuracy > 0.93
    assert history.epochs[-1].images == 1438


@pytest.mark.parametrize(("optimizer", "lr", "weight_decay"), [("sgd", 0.02, 5e-4), ("adamw", 1e-3, 1e-2)])
def test_each_optimizer_has_its_usual_rate_and_decay(digits, optimizer, lr, weight_decay):
    usual, named = small_net(), small_net()
    usual = train(usual, digits, epochs=1, optimizer=optimizer).module
    named = train(named, digits, epochs=1, optimizer=optimizer, lr=lr, weight_decay=weight_decay).module
    assert torch.equal(usual[0].weight, named[0].weight)


def test_the_same_seed_trains_the_same_weights_and_another_seed_others(digits):
    weights = []
    for seed in (0, 0, 1):
        model = small_net()
        model = train(model, digits, epochs=1, seed=seed).module
        weights.append(model[0].weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_training_leaves_the_global_random_state_and_every_mode_as_they_were(digits):
    model = small_net().eval()
    model[1].train()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    model = train(model, digits, epochs=1, test_each_epoch=True).module
    evaluate(model, digits.test)
    assert torch.equal(torch.rand(2), expected)
    assert [module.training for module in model] == [False, True, False, False, False, False, False]


def test_frozen_parameters_stay(digits):
    model = small_net()
    model[0].weight.requires_grad_(False)
    before = model[0].weight.clone()
    model = train(model, digits, epochs=1).module
    assert torch.equal(model[0].weight, before)


def test_the_loss_is_a_hook(digits):
    """With a loss that is the distance of the first layer's weights from one, they go there, and nothing else moves."""
    model = small_net()
    last = model[6].weight.clone()
    seen = []

    def towards_one(net, batch, epoch):
        images, labels = batch
        seen.append((images.shape[0], labels.shape[0], net.training))
        return (net[0].weight - 1).square().sum()

    history = train(model, digits, epochs=1, lr=0.05, loss_fn=towards_one, weight_decay=0.0)
    model = history.module
    assert history.epochs[-1].loss > 0
    assert (model[0].weight - 1).abs().max() < 0.2
    assert torch.equal(model[6].weight, last)
    assert set(seen) == {(64, 64, True)}


@pytest.mark.parametrize(
    ("auxiliary", "weights"), [((1,), (0.4,)), ((1, 1), (0.3, 0.3)), ((1, None), (0.4,)), ((), ())]
)
def test_auxiliary_classifiers_count_with_the_weights_of_the_papers(auxiliary, weights):
    output = namedtuple("Output", ["logits", *(f"aux{i}" for i in range(len(auxiliary)))])
    logits, other = torch.randn(4, 10), torch.randn(4, 10)
    labels = torch.arange(4)

    class WithHeads(nn.Module):
        def forward(self, _):
            return output(logits, *(None if head is None else other for head in auxiliary))

    loss = classification_loss()(WithHeads(), (torch.zeros(4), labels))
    expected = functional.cross_entropy(logits, labels) + sum(weights) * functional.cross_entropy(other, labels)
    assert loss.item() == pytest.approx(expected.item())


def test_label_smoothing_reaches_the_loss():
    logits, labels = torch.tensor([[9.0, 0.0]]), torch.tensor([0])
    plain, smoothed = (classification_loss(s)(nn.Identity(), (logits, labels)) for s in (0.0, 0.1))
    assert smoothed.item() == pytest.approx(functional.cross_entropy(logits, labels, label_smoothing=0.1).item())
    assert smoothed > plain


def test_progress_is_reported_for_every_step(digits):
    calls = []
    train(small_net(), digits, epochs=2, batch_size=500, progress=lambda *call: calls.append(call), task="fit")
    assert calls == [("fit", step, 4) for step in (1, 2, 3, 4)]


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_peaks_at_the_full_rate_and_ends_at_zero_unless_it_is_constant(name):
    rates = [SCHEDULES[name](step / 1000) for step in range(1001)]
    assert max(rates) == pytest.approx(1)
    assert rates[-1] == pytest.approx(1 if name == "constant" else 0)
    assert min(rates) >= (1 if name == "constant" else 0)


def test_one_cycle_rises_to_the_peak_at_a_quarter():
    rates = [SCHEDULES["one-cycle"](step / 100) for step in range(101)]
    assert rates[0] == pytest.approx(0.04)
    assert rates.index(max(rates)) == 25
    assert rates[:26] == sorted(rates[:26])
    assert rates[25:] == sorted(rates[25:], reverse=True)


def test_the_schedule_of_knowledge_evolution_warms_up_in_five_epochs_of_200():
    rates = [SCHEDULES["warmup-cosine"](step / 1000) for step in range(1001)]
    assert rates[0] == pytest.approx(0.2)
    assert rates.index(max(rates)) == 25
    assert rates[:26] == sorted(rates[:26])
    assert rates[25:] == sorted(rates[25:], reverse=True)


def test_training_images_fewer_than_a_batch_are_one_batch():
    data = load_data("digits", limit=10)
    assert train(small_net(), data, epochs=1).steps == 1


def test_a_function_can_be_evaluated_like_a_module(digits):
    model = small_net().eval()
    module_score = evaluate(model, digits.test, batch_size=100)
    with torch.no_grad():
        assert evaluate(lambda images: model(images), digits.test) == module_score
    assert module_score.total == 359


def test_wilsons_interval_equals_the_textbooks():
    low, high = Score(correct=8, total=10).interval()
    assert (low, high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert Score(10, 10).interval()[1] == pytest.approx(1)
    assert Score(0, 10).interval()[0] == pytest.approx(0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs must be a whole number of at least 1, not 0"),
        ({"lr": 0.0}, r"lr must be a number above 0, not 0\.0"),
        ({"lr": float("nan")}, "lr must be a number above 0, not nan"),
        ({"batch_size": 1}, "batch_size must be a whole number of at least 2, not 1"),
        ({"optimizer": "adam"}, "unknown optimizer 'adam'; did you mean 'adamw'"),
        ({"schedule": "cosin"}, "unknown schedule 'cosin'; did you mean 'cosine'"),
        ({"epochs": 1.5}, r"epochs must be a whole number of at least 1, not 1\.5"),
        ({"batch_size": "64"}, "batch_size must be a whole number of at least 2, not '64'"),
        ({"checkpoint_every": True}, "checkpoint_every must be a whole number of at least 1, not True"),
        ({"first_step": 1.5}, r"first_step must be a whole number of at least 0, not 1\.5"),
        ({"last_step": 2.5}, r"last_step must be a whole number of at least 1, not 2\.5"),
        ({"lr": "0.1"}, "lr must be a number above 0, not '0.1'"),
        ({"momentum": 1.0}, r"momentum must be a number of at least 0 and below 1, not 1\.0"),
        ({"weight_decay": -1.0}, r"weight_decay must be a number of at least 0, not -1\.0"),
        ({"label_smoothing": float("nan")}, "label_smoothing must be a number of at least 0 and at most 1, not nan"),
        ({"seed": 1.5}, r"seed must be a whole number of at least 0, not 1\.5"),
        ({"workers": -1}, "workers must be a whole number of at least 0, not -1"),
    ],
)
def test_settings_out_of_range_are_refused(digits, settings, message):
    with pytest.raises(UsageError, match=message):
        train(small_net(), digits, **{"epochs": 1, **settings})


def test_a_model_with_nothing_to_train_is_refused(digits):
    with pytest.raises(UsageError, match="the model has no parameter that requires a gradient: there is nothing to "):
        train(small_net().requires_grad_(False), digits, epochs=1)


@pytest.mark.parametrize(
    "around",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["no_grad", "inference_mode", "autocast"],
)
def test_gradients_and_precision_do_not_depend_on_the_context_of_the_call(digits, around):
    expected, model = small_net(), small_net()
    expected = train(expected, digits, epochs=1).module
    with around():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
        model = train(model, digits, epochs=1).module
        after = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
    assert torch.equal(model[6].weight, expected[6].weight)
    assert after == before


def test_a_loss_that_is_not_finite_stops_the_training(digits):
    with pytest.raises(FloatingPointError, match=r"the loss of fit is nan after 22 steps: lower lr"):
        train(small_net(), digits, epochs=2, loss_fn=lambda net, *_: net[0].weight.sum() * float("nan"), task="fit")


class Heard(list):
    """Progress that keeps what it is told of epochs."""

    def __call__(self, task, done, total):
        self.done = done

    def epoch(self, task, number, figures):
        self.append((task, number, self.done, figures))


@pytest.mark.parametrize("scored", [False, True])
def test_progress_hears_of_each_epoch_when_it_ends(digits, scored):
    heard = Heard()
    history = train(small_net(), digits, epochs=2, progress=heard, task="mine", test_each_epoch=scored)
    assert [one[:3] for one in heard] == [("mine", 1, 22), ("mine", 2, 44)]
    for (*_, figures), epoch in zip(heard, history.epochs, strict=True):
        told = {"images": 1438, "loss": epoch.loss, "lr": epoch.lr, "seconds": epoch.seconds}
        assert figures == told | ({"accuracy": epoch.score.correct / epoch.score.total} if scored else {})
    assert heard[0][3]["lr"] > heard[1][3]["lr"] == 0  # one cycle


def test_an_epoch_is_told_once_however_often_a_training_is_cut_off(digits, tmp_path):
    class Cut(Heard):
        def __call__(self, task, done, total):
            super().__call__(task, done, total)
            if done == 30:
                raise KeyboardInterrupt

    first, second, third = Cut(), Heard(), Heard()
    common = {"epochs": 3, "checkpoint": tmp_path / "model.pt"}
    with pytest.raises(KeyboardInterrupt):
        train(small_net(), digits, progress=first, **common)
    train(small_net(), digits, progress=second, **common)
    train(small_net(), digits, progress=third, **common)
    assert [[number for _, number, *_ in heard] for heard in (first, second, third)] == [[1], [2, 3], []]
