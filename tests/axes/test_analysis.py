"""The analysis of a traced module: when it is made again, and that nothing changes it once it is made."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import surgery
from surgery.axes.analysis import analyse

EXACT = 1e-10
X = torch.rand(3, 6, dtype=torch.float64)


class Net(nn.Module):
    """Two layers with an activation between them; its own Python decides nothing."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), between)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.body(x))


def traced_and_analysed(between=None):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Net(nn.ReLU() if between is None else between).double().eval()
    traced = surgery.trace(model, X)
    assert is_editable(traced)
    return traced


def is_editable(traced):
    """Whether the channels between the two layers can be edited."""
    return any(g.editable for g in surgery.dimension_groups(traced))


def widened_off_by(traced):
    """The relative error after widening. Rows of a batch and their gradients are compared."""
    wide = surgery.widen(traced, 2.0)
    worst = 0.0
    for size in (3, 5):
        ours, theirs = (torch.rand(size, 6, dtype=torch.float64).requires_grad_() for _ in range(2))
        theirs.data.copy_(ours.data)
        got, wanted = wide(ours), traced(theirs)
        got.square().sum().backward()
        wanted.square().sum().backward()
        for a, b in ((got.detach(), wanted.detach()), (ours.grad, theirs.grad)):
            worst = max(worst, float((a - b).abs().max() / b.abs().max()))
    return worst


def running_sum(module, inputs, output):
    return output - output.cumsum(-1)


def test_a_hook_added_after_the_analysis_freezes_what_it_reads():
    traced = traced_and_analysed()
    traced.get_submodule("body.0").register_forward_hook(running_sum)
    assert not is_editable(traced)
    assert widened_off_by(traced) <= EXACT


def test_a_pre_hook_added_after_the_analysis_freezes_what_it_reads():
    traced = traced_and_analysed()
    traced.get_submodule("head").register_forward_pre_hook(lambda module, inputs: (inputs[0].cumsum(-1),))
    assert not is_editable(traced)
    assert widened_off_by(traced) <= EXACT


def test_a_hook_that_is_removed_leaves_no_trace():
    traced = traced_and_analysed()
    handle = traced.get_submodule("body.0").register_forward_hook(running_sum)
    assert not is_editable(traced)
    handle.remove()
    assert is_editable(traced)


def test_another_function_in_the_graph_is_seen():
    traced = traced_and_analysed(nn.Identity())
    node = next(n for n in traced.graph.nodes if n.target == "body.1")
    with traced.graph.inserting_after(node):
        relu = traced.graph.call_function(torch.relu, node.args)
    node.replace_all_uses_with(relu)
    traced.graph.erase_node(node)
    traced.recompile()
    assert is_editable(traced)
    relu.target, relu.args = torch.softmax, (*relu.args, -1)
    traced.recompile()
    assert not is_editable(traced)
    assert widened_off_by(traced) <= EXACT


def test_another_constant_in_the_graph_is_seen():
    traced = traced_and_analysed(nn.Identity())
    node = next(n for n in traced.graph.nodes if n.target == "body.1")
    node.op, node.target, node.args = "call_function", torch.cumsum, (*node.args, 0)
    traced.recompile()
    assert is_editable(traced)
    node.args = (node.args[0], 1)
    traced.recompile()
    assert not is_editable(traced)
    assert widened_off_by(traced) <= EXACT


def doubled(x):
    return 2 * x


def test_a_rule_registered_after_the_analysis_is_seen():
    traced = traced_and_analysed(nn.Identity())
    node = next(n for n in traced.graph.nodes if n.target == "body.1")
    node.op, node.target = "call_function", doubled
    traced.recompile()
    assert not is_editable(traced)

    with surgery.restore_rules():

        @surgery.oprule(doubled)
        def keeps(op, x):
            return x.fields

        assert is_editable(traced)
        assert widened_off_by(traced) <= EXACT
    assert not is_editable(traced)


class Mixing(nn.Module):
    """A weight whose rows depend on those before them."""

    def forward(self, weight):
        return weight.cumsum(0)


def test_a_parametrization_added_after_the_analysis_is_seen():
    traced = traced_and_analysed()
    parametrize.register_parametrization(traced.get_submodule("body.0"), "weight", Mixing())
    assert not is_editable(traced)
    assert widened_off_by(traced) <= EXACT


def test_an_attribute_of_a_layer_changed_after_the_analysis_is_seen():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(4, 8), nn.Conv2d(8, 2, 1)).double().eval()
    traced = surgery.trace(model, torch.rand(2, 3, 4, 4, dtype=torch.float64))
    assert analyse(traced).find("0").units == 2
    traced.get_submodule("1").num_groups = 8
    assert analyse(traced).find("0").units == 8
    x = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    assert float((surgery.widen(traced, 2.0)(x) - traced(x)).abs().max()) <= EXACT


def test_a_layer_put_in_the_place_of_another_is_seen():
    traced = traced_and_analysed()
    traced.get_submodule("body")[1] = nn.Softmax(-1)
    assert not is_editable(traced)
    assert widened_off_by(traced) <= EXACT


def test_parameters_tied_after_the_analysis_are_seen():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)).double().eval()
    traced = surgery.trace(model, X)
    assert sum(g.editable for g in surgery.dimension_groups(traced)) == 2
    traced.get_submodule("2").bias = traced.get_submodule("0").bias
    assert sum(g.editable for g in surgery.dimension_groups(traced)) == 1
    assert widened_off_by(traced) <= EXACT


class Picks(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(6, 8), nn.Linear(4, 2)
        self.register_buffer("places", torch.tensor([0, 2, 4, 6]))

    def forward(self, x):
        return self.head(torch.relu(self.first(x).index_select(1, self.places)))


def test_positions_written_into_a_buffer_after_the_analysis_are_seen():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        traced = surgery.trace(Picks().double().eval(), X)
    surgery.dimension_groups(traced)
    traced.places.copy_(torch.tensor([1, 1, 3, 7]))
    index = surgery.dimension_groups(traced)[0]
    slim = surgery.reindex(traced, {index.name: index.permutation(1)})
    assert surgery.verify(slim, traced, (X,)).max_rel <= EXACT


class Branches(nn.Module):
    """Python that cannot be traced stands between the layers, and reads an attribute."""

    def __init__(self):
        super().__init__()
        self.first, self.head, self.mixes = nn.Linear(6, 8), nn.Linear(8, 2), False

    def forward(self, x):
        y = self.first(x)
        y = torch.relu(y) if x.sum() > -1e9 else y
        return self.head(y.softmax(-1) if self.mixes else y)


def test_an_attribute_that_python_reads_between_traced_parts_is_seen():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        traced = surgery.trace(Branches().double().eval(), X)
    assert any(g.editable for g in surgery.dimension_groups(traced))
    traced.mixes = True
    assert not any(g.editable for g in surgery.dimension_groups(traced))
    assert widened_off_by(traced) <= EXACT


@pytest.mark.parametrize("carried", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
@pytest.mark.parametrize("model", [lambda: Net(nn.ReLU()), Branches], ids=["graph", "parts"])
def test_copies_do_not_carry_the_analysis(model, carried):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        traced = surgery.trace(model().double().eval(), X)
    first = analyse(traced)
    twin = carried(traced)
    assert analyse(traced) is first
    assert analyse(twin) is not first
    assert [g.name for g in analyse(twin).groups] == [g.name for g in first.groups]
    twin.get_submodule("head").register_forward_pre_hook(lambda module, inputs: (inputs[0].cumsum(-1),))
    assert not any(g.editable for g in surgery.dimension_groups(twin))
    assert any(g.editable for g in surgery.dimension_groups(traced))


def test_training_and_forward_passes_leave_the_analysis_as_it_is():
    traced = traced_and_analysed(nn.BatchNorm1d(8))
    found = analyse(traced)
    optimizer = torch.optim.SGD(traced.parameters(), 0.1)
    traced.train()(X).sum().backward()
    optimizer.step()
    traced.eval()(X)
    assert analyse(traced) is found


def test_an_analysis_cannot_be_changed():
    found = analyse(traced_and_analysed())
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.count = 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.groups[0].name = "other"
    for array in (found.frozen, found.unit_of, found.fence, *found.axis_units.values(), found.groups[0].frozen):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0
    for held in (found.axis_units, found.values, found.graphs, found.roles):
        with pytest.raises(TypeError):
            held["new"] = None


def test_groups_are_read_without_networkx():
    code = (
        "import sys, torch, surgery; from torch import nn;"
        "t = surgery.trace(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.rand(2, 3));"
        "group = surgery.dimension_groups(t)[0]; surgery.widen(t, 2.0); before = 'networkx' in sys.modules;"
        "group.why('0.weight[0]', '1.weight[1]'); print(before, 'networkx' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


def test_all_arrays_of_the_findings_are_closed():
    found = analyse(traced_and_analysed())
    ids = [f.ids for value in found.values.values() for f in getattr(value, "fields", ())]
    assert ids
    assert not any(array.flags.writeable for array in ids)
    assert np.concatenate([found.unit_of[i] for i in ids]).max() < found.count


def test_looking_computes_no_parametrised_weight():
    """Spectral norm writes to its buffers when its weight is read in training."""
    layer = torch.nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3))
    module = surgery.trace(nn.Sequential(layer, nn.Conv2d(4, 2, 1)).train(), torch.randn(2, 3, 6, 6))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    surgery.dimension_groups(module)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
