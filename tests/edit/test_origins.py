"""Where the tensors of an edited module come from."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import surgery
from surgery.edit.origins import origins
from surgery.edit.step import MEAN
from tests.zoo import build_family


def gathered(tensor, origin):
    for axis, moved in enumerate(origin.axes):
        if moved is not None:
            tensor = tensor.index_select(axis, moved.old)
    return tensor


def tensors(module):
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def some(groups, pick, seed=0):
    """Permuted groups, every other one of which loses units where it may."""
    indices = {}
    for k, group in enumerate(groups):
        if group.editable and pick(k):
            index = np.array(group.permutation(seed))
            keep = group.frozen[index] | (np.arange(len(index)) % 4 != 3) | (len(index) < 4) | bool(group.mixed)
            indices[group.name] = index[keep].tolist()
    return indices


@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "googlenet", "vision transformer", "swin v2", "maxvit"])
def test_every_tensor_is_the_gathered_old_one(name):
    """Through one edit that copies nothing, and through two."""
    family = build_family(name)
    permuted = surgery.reindex(family.traced, some(surgery.dimension_groups(family.traced), lambda k: True))
    twice = surgery.reindex(permuted, some(surgery.dimension_groups(permuted), lambda k: k % 2, seed=1))
    old = tensors(family.traced)
    for edited in (permuted, twice):
        found = origins(family.traced, edited)
        assert found.keys() == tensors(edited).keys()
        moved = 0
        for name, tensor in tensors(edited).items():
            if name not in old:
                assert found[name] is None
                continue
            origin = found[name]
            assert origin.name == name
            assert torch.equal(gathered(old[name], origin), tensor), name
            moved += any(axis is not None for axis in origin.axes)
        assert moved > 4


def conv_net(width=8):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, width, 3, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 6, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 4, 5),
    )
    return surgery.trace(net.double().eval(), torch.zeros(2, 3, 6, 6, dtype=torch.float64))


def test_further_copies_are_new_and_first_ones_are_not():
    net = conv_net()
    found = origins(net, surgery.reindex(net, {"0": [3, 1, 1, 0, 3], "3": [0, 1, 2, 3, 4, 5, 2]}))
    for name, axis in (("0.weight", 0), ("1.weight", 0), ("1.running_var", 0), ("3.weight", 1)):
        moved = found[name].axes[axis]
        assert moved.old.tolist() == [3, 1, 1, 0, 3]
        assert moved.new.tolist() == [False, False, True, False, True]
    assert found["0.weight"].axes[1:] == (None, None, None)
    flat = found["6.weight"].axes[1]
    assert flat.old.tolist() == [*range(24), *range(8, 12)]
    assert flat.new.tolist() == [False] * 24 + [True] * 4
    assert found["6.bias"].axes == (None,)


def test_edits_are_composed_through_layers_inserted_in_between():
    net = conv_net()
    wide = surgery.reindex(net, {"0": [*range(8), 2, 5]})
    deep = surgery.deepen(wide, {"0": 1})
    last = surgery.reindex(deep, {"0": [9, 8, 2, 2, 0]})
    found = origins(net, last)
    (inserted,) = {name.rpartition(".")[0].rpartition(".")[0] for name in tensors(last).keys() - tensors(net).keys()}
    assert {name for name, origin in found.items() if origin is None} == {
        name for name in tensors(last) if name.startswith(f"{inserted}.")
    }
    moved = found["0.weight"].axes[0]
    assert moved.old.tolist() == [5, 2, 2, 2, 0]
    assert moved.new.tolist() == [True, True, False, True, False]
    assert origins(deep, last)["0.weight"].axes[0].old.tolist() == [9, 8, 2, 2, 0]
    assert all(origin.axes == (None,) * len(origin.axes) for origin in origins(last, last).values())


def test_means_are_marked_and_new():
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    net = surgery.trace(block.double(), torch.zeros(2, 4, dtype=torch.float64))
    wide = surgery.reindex(surgery.widen(net, {"0": 15}), {})
    moved = origins(net, wide)["0.weight"].axes[0]
    assert moved.old.tolist() == [*range(6), *range(6), MEAN, MEAN, MEAN]
    assert moved.new.tolist() == [False] * 6 + [True] * 9


def test_tied_parameters_have_one_origin_under_each_name():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight
            self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            h = self.first(x)
            return self.last(h + torch.relu(self.b(torch.relu(self.a(h)))))

    net = surgery.trace(Tied().double(), torch.zeros(2, 3, dtype=torch.float64))
    (group,) = (g for g in surgery.dimension_groups(net) if g.name == "first")
    found = origins(net, surgery.reindex(net, {"first": group.permutation()}))
    assert found["a.weight"].axes[0].old.tolist() == found["b.weight"].axes[0].old.tolist() == group.permutation()
    assert (found["a.weight"].name, found["b.weight"].name) == ("a.weight", "b.weight")


def test_inputs_are_untouched():
    net = conv_net()
    wide = surgery.reindex(net, {"0": [*range(8), 1]})
    wider = surgery.reindex(wide, {"3": [*range(6), 1]})
    kept = [copy.deepcopy(m.state_dict()) for m in (net, wider)]
    origins(net, wider)
    for module, state in zip((net, wider), kept, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


def test_modules_that_were_not_made_from_another_are_refused():
    net = conv_net()
    wide = surgery.widen(net, 1.5)
    with pytest.raises(surgery.UsageError, match="was not made from the other one: its recipe does not begin with"):
        origins(wide, net)
    with pytest.raises(
        surgery.UsageError,
        match=r"0.weight has the shape \(8, 3, 3, 3\), where the recipe makes \(10, 3, 3, 3\) of the other module's",
    ):
        origins(conv_net(10), surgery.widen(net, {"3": 9}))
    with pytest.raises(surgery.UsageError, match="is not a traced module"):
        origins(nn.Linear(2, 2), wide)
