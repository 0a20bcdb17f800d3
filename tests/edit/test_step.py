"""A step is one class: what it does, how it is stored, what it says of its result. Nothing else knows of it."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

import surgery
from surgery.edit.switch_off import mask_text, parse_mask


@dataclass(frozen=True)
class Exchange(surgery.Step):
    """Move a factor from one layer to the next one, and put their units in another order: exact where units are
    independent and positively homogeneous."""

    layer: str
    reader: str
    order: tuple[int, ...]
    factor: float = 2.0
    notes: dict[str, str] = field(default_factory=dict)

    def apply(self, module: nn.Module) -> nn.Module:
        result = copy.deepcopy(module)
        order = torch.tensor(self.order)
        with torch.no_grad():
            for name, tensor in result.get_submodule(self.layer).named_parameters():
                tensor.copy_(tensor[order] * (self.factor if name in ("weight", "bias") else 1.0))
            reader = result.get_parameter(f"{self.reader}.weight")
            reader.copy_(reader[:, order] / self.factor)
        return result

    def origins(self, module: nn.Module) -> dict[str, surgery.Origin]:
        moved = surgery.AxisOrigin(torch.tensor(self.order), torch.zeros(len(self.order), dtype=torch.bool))
        return {
            f"{self.layer}.weight": surgery.Origin(f"{self.layer}.weight", (moved, None)),
            f"{self.layer}.bias": surgery.Origin(f"{self.layer}.bias", (moved,)),
            f"{self.reader}.weight": surgery.Origin(f"{self.reader}.weight", (None, moved)),
        }

    def describe(self) -> str:
        return f"Exchange: {self.layer} times {self.factor:g}, {self.reader} by it"


def net(width: int = 6) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 5), nn.ReLU(), nn.Linear(5, 3))
    return layers.double().eval()


X = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4)
STEP = Exchange("0", "2", (5, 0, 1, 2, 3, 4), notes={"why": "a test"})


@pytest.fixture
def traced():
    return surgery.trace(net(), X)


def test_a_step_of_ones_own_is_applied_and_recorded(traced):
    edited = surgery.apply(surgery.widen(traced, {"2": 7}), STEP)
    assert [type(s).__name__ for s in surgery.recipe(edited).steps] == ["Reindex", "Exchange"]
    assert surgery.recipe(traced).steps == ()
    assert surgery.verify(edited, traced, X).max_rel <= 1e-12
    assert torch.equal(edited.get_parameter("0.bias"), 2 * traced.get_parameter("0.bias")[list(STEP.order)])


def test_a_step_of_ones_own_survives_json_and_prints(traced):
    recipe = surgery.recipe(surgery.apply(surgery.slim(traced, {"2": 0.5}), STEP))
    assert surgery.Recipe.from_json(recipe.to_json()) == recipe
    assert json.loads(recipe.to_json())["steps"][1]["order"] == [5, "0:5"]
    assert str(recipe).splitlines() == [
        "source: None",
        "Reindex: 2 to 3",
        "Exchange: 0 times 2, 2 by it",
    ]


def test_a_step_of_ones_own_is_saved_and_loaded(traced, tmp_path):
    edited = surgery.apply(traced, STEP)
    surgery.save(edited, tmp_path / "edited")
    loaded = surgery.load(tmp_path / "edited", model=net())
    assert torch.equal(loaded(X), edited(X))
    assert surgery.recipe(loaded) == surgery.recipe(edited)


def test_states_follow_the_account_of_a_step_of_ones_own(traced):
    wide = surgery.reindex(traced, {"0": [0, 1, 2, 3, 4, 5, 2]})
    edited = surgery.reindex(surgery.apply(wide, Exchange("0", "2", (6, 5, 4, 3, 2, 1, 0))), {"0": [0, 1, 2]})
    found = surgery.origins(traced, edited)
    assert found["0.weight"].axes[0].old.tolist() == [2, 5, 4]
    assert found["0.weight"].axes[0].new.tolist() == [True, False, False]
    assert found["2.weight"].axes[1].old.tolist() == [2, 5, 4]
    assert found["4.weight"].axes == (None, None)
    optimizer = torch.optim.SGD(traced.parameters(), lr=0.1, momentum=0.9)
    traced(X).square().sum().backward()
    optimizer.step()
    moved = surgery.transfer_optimizer(optimizer, traced, edited)
    momentum = optimizer.state[traced.get_parameter("0.weight")]["momentum_buffer"]
    assert torch.equal(moved.state[edited.get_parameter("0.weight")]["momentum_buffer"], momentum[[2, 5, 4]])


def test_what_a_step_does_shows_in_the_changes(traced):
    found = surgery.changes(traced, surgery.apply(traced, STEP))
    assert found.steps == ("Exchange: 0 times 2, 2 by it",)
    assert "Exchange: 0 times 2, 2 by it" in str(found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": "Nothing"}, "unknown step 'Nothing': import the module that defines it first"),
        ({"extra": 1}, "step Exchange has no field 'extra': its fields are layer, reader, order, factor, notes"),
        ({"layer": None}, "'layer' of step Exchange: expected 'str', got 'null'"),
        ({"order": ["0-3"]}, r"'order' of step Exchange cannot hold '0-3': a run is written 'first:last\+1'"),
        ({"order": [0.5]}, r"'order' of step Exchange: '\[0\]': expected 'int', got 'float'"),
        ({"order": [2**63]}, "'order' of step Exchange holds a number beyond 64 bits"),
        ({"order": ["0:1000000000"]}, "'steps' of the recipe hold 1000000001 numbers, more than the 4194304 that are"),
        ({"factor": True}, "'factor' of step Exchange: expected 'float', got 'bool'"),
        ({"notes": {"why": 3}}, "'why' in 'notes' of step Exchange: expected 'str', got 'int'"),
    ],
)
def test_what_is_no_step_is_refused_with_its_field(change: dict[str, Any], message: str):
    data = {"schema": 2, "source": None, "steps": [{**STEP.to_dict(), **change}]}
    with pytest.raises(surgery.CheckpointError, match=message):
        surgery.Recipe.from_dict(data)


def test_a_missing_field_is_named():
    data = STEP.to_dict()
    del data["reader"]
    with pytest.raises(surgery.UsageError, match="step Exchange lacks the field 'reader'"):
        surgery.Step.from_dict(data)


def test_two_steps_of_one_name_are_refused():
    with pytest.raises(surgery.UsageError, match=r"a step 'Reindex' is defined in surgery\.edit\.reindex too"):
        type("Reindex", (surgery.Step,), {"apply": lambda self, module: module})


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (torch.ones(3, 2, dtype=torch.bool), ": x :"),
        (torch.zeros(3, 2, dtype=torch.bool), "0:0 x 0:0"),
        (torch.tensor([True, True, False, True]), "0:2,3"),
        (torch.tensor(True), "0:1"),
        (torch.tensor([[True, False], [False, False]]), "0 x 0"),
    ],
)
def test_masks_of_whole_channels_are_short_text(mask, text):
    assert mask_text(mask) == text
    assert torch.equal(parse_mask(text, mask.shape, "w"), mask)


def test_any_other_mask_is_its_bits():
    mask = torch.rand(5, 3, 7) > 0.5
    text = mask_text(mask)
    assert text.startswith("bits ")
    assert torch.equal(parse_mask(text, mask.shape, "w"), mask)
    for wrong in (text[:-8], "bits ?", "0:9 x 0 x 0", "0 x 0", "a x 0 x 0"):
        with pytest.raises(surgery.UsageError, match=r"the mask of 'w' is not one for its shape \(5, 3, 7\)"):
            parse_mask(wrong, mask.shape, "w")
