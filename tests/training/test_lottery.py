"""The lottery ticket: what is pruned stays pruned, and tickets begin where they are rewound to."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

import surgery
from surgery.training import lottery as lotteries
from surgery.training.evaluation import evaluate
from surgery.training.history import Score
from surgery.training.loop import train
from surgery.training.lottery import lottery
from tests.helpers import assert_same, killed_after

DIGITS = 200

QUICK = {"epochs": 3, "batch_size": 50, "lr": 0.05}


def kept(module, masks):
    weights = [masks[name] for name, value in module.named_parameters() if value.ndim > 1]
    return sum(int(mask.sum()) for mask in weights) / sum(mask.numel() for mask in weights)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_each_round_prunes_the_same_fraction_of_what_is_left(digits, model, scope):
    before = copy.deepcopy(model.state_dict())
    found = lottery(model, digits, 0.75, 2, scope=scope, **QUICK)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [ticket.sparsity for ticket in found.tickets] == [0.0, pytest.approx(0.5), pytest.approx(0.75)]
    assert kept(model, found.masks) == pytest.approx(0.25, abs=0.01)
    for name, value in found.module.named_parameters():
        assert bool((value[~found.masks[name]] == 0).all())
        assert bool((value[found.masks[name]] != 0).all())
    assert found.tickets[-1].score == evaluate(found.module, digits.test)
    assert found.to_dict()["tickets"][1]["sparsity"] == pytest.approx(0.5)


def test_nothing_pruned_is_the_dense_training_again(digits, model):
    for step in (0, 5):
        found = lottery(model, digits, 0.0, 1, rewind_to=step, momentum=0.0, **QUICK)
        dense = copy.deepcopy(model)
        dense = train(dense, digits, momentum=0.0, **QUICK).module
        assert_same(found.module, dense)
        assert found.tickets[1].history.steps == 12 - step


def test_a_ticket_begins_with_the_weights_of_the_step_and_the_images_and_rates_from_there_on(
    digits, model, monkeypatch
):
    starts = {}

    def watched(network, *args, **settings):
        starts[settings["task"]] = copy.deepcopy(network.state_dict())
        return train(network, *args, **settings)

    monkeypatch.setattr(lotteries, "train", watched)
    found = lottery(model, digits, 0.5, 1, rewind_to=5, **QUICK)
    early = copy.deepcopy(model)
    early = train(early, digits, last_step=5, **QUICK).module
    for name, value in early.state_dict().items():
        expected = value * found.masks[name] if name in found.masks else value
        assert torch.equal(starts["ticket-1"][name], expected)
    assert not torch.equal(early.state_dict()["0.weight"], model.state_dict()["0.weight"])
    dense, ticket = (ticket.history for ticket in found.tickets)
    assert [epoch.lr for epoch in ticket.epochs] == [epoch.lr for epoch in dense.epochs[1:]]


def test_a_killed_run_ends_with_the_same_weights(digits, model, tmp_path):
    settings = {**QUICK, "rewind_to": 3}
    whole = lottery(model, digits, 0.5, 2, **settings)
    for task, step in [("early", 2), ("dense", 5), ("ticket-1", 7), ("ticket-2", 12)]:

        def killed(name, done, total, task=task, step=step):
            if name == task:
                killed_after(step)(name, done, total)

        with pytest.raises(KeyboardInterrupt):
            lottery(model, digits, 0.5, 2, checkpoint=tmp_path, checkpoint_every=2, progress=killed, **settings)
    found = lottery(model, digits, 0.5, 2, checkpoint=tmp_path, checkpoint_every=2, **settings)
    assert_same(found.module, whole.module)
    assert [ticket.score for ticket in found.tickets] == [ticket.score for ticket in whole.tickets]
    assert [t.history.epochs[0].loss for t in found.tickets] == [t.history.epochs[0].loss for t in whole.tickets]


def test_steps_out_of_range_are_refused(digits, model):
    with pytest.raises(surgery.UsageError, match="rewind_to is 12: it must be below 12, the steps of this training"):
        lottery(model, digits, 0.5, 1, rewind_to=12, **QUICK)
    with pytest.raises(surgery.UsageError, match="steps 0 to 13 are outside of the 12 steps"):
        model = train(model, digits, last_step=13, **QUICK).module
    grow = {1: surgery.Growth(images=1.0)}
    with pytest.raises(surgery.UsageError, match="a training that grows takes all of its steps"):
        model = train(model, digits, last_step=3, grow=grow, **QUICK).module
    with pytest.raises(surgery.UsageError, match="rounds must be a whole number"):
        lottery(model, digits, 0.5, 0, **QUICK)
    with pytest.raises(surgery.UsageError, match="rewind_to must be a whole number of at least 0, not None"):
        lottery(model, digits, 0.5, 1, rewind_to=None, **QUICK)


@pytest.mark.parametrize("setting", ["grow", "first_step", "last_step", "after_step", "task"])
def test_arguments_that_the_lottery_sets_itself_are_refused(digits, model, setting):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{setting}'"):
        lottery(model, digits, 0.5, 1, **{setting: None}, **QUICK)


def test_a_ticket_is_scored_by_the_given_function(digits, model):
    untested = replace(digits, test=[])
    found = lottery(model, untested, 0.5, 1, score=lambda network: Score(1, 2), **QUICK)
    assert [ticket.score for ticket in found.tickets] == [Score(1, 2)] * 2
    with pytest.raises(surgery.UsageError, match="has no test images: pass score="):
        lottery(model, untested, 0.5, 1, **QUICK)


def test_a_ticket_of_other_settings_is_refused_in_words(digits, model, tmp_path):
    lottery(model, digits, 0.5, 1, checkpoint=tmp_path, **QUICK)
    with pytest.raises(surgery.UsageError, match="scope layer and not global"):
        lottery(model, digits, 0.5, 1, scope="global", checkpoint=tmp_path, **QUICK)


def test_weights_held_at_zero_stay_so_in_the_module_that_a_training_returns(digits, model):
    masks = surgery.magnitude_masks(model, 0.5)
    ticket = surgery.rewind(model, model, masks)
    before = copy.deepcopy(ticket)
    trained = train(ticket, digits, after_step=surgery.hold_masked(ticket, masks), **QUICK).module
    assert_same(ticket, before)
    for name, parameter in trained.named_parameters():
        assert not parameter[~masks[name]].any()
        assert not torch.equal(parameter, before.get_parameter(name))


def test_the_modes_of_the_caller_do_not_matter(digits, model):
    usual = lottery(model, digits, 0.5, 1, **QUICK)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert_same(lottery(model, digits, 0.5, 1, **QUICK).module, usual.module)
