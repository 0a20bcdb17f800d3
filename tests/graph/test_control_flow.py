"""Tracing through Python that branches, counts and loops on sizes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import get_model
from torchvision.models.optical_flow import raft

import surgery


class Careful(nn.Module):
    """Checks its input, pads what is odd, and loops as often as a size says."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        b, c, h, w = x.shape
        if (c, h) != (3, 8) or not (h % 2 == 0 and w % 2 == 0):
            raise ValueError("unexpected size")
        y = self.conv(x)
        for size in y.shape[-2:]:
            if size > 6:
                y = F.avg_pool2d(y, 2)
        for _ in range(y.size(2)):
            y = F.relu(y) + 1
        if int(y.shape[3]) < 100 and len(y) > 0:
            y = y * float(y.shape[3])
        return self.head(y.view(b, 8, -1).mean(-1))


class Lists(nn.Module):
    """Inputs of any nesting, iterated over by Python."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, xs, named):
        ys = [F.relu(self.a(x)) for x in xs]
        for key, value in named.items():
            if key != "skip":
                ys.append(F.relu(self.a(value)))
        return {"sum": self.b(sum(ys)), **{k: v + 1 for k, v in named.items()}}


def inputs(batch, width=8):
    return torch.randn(batch, 3, 8, width, dtype=torch.float64, generator=torch.Generator().manual_seed(batch))


@pytest.fixture
def careful():
    torch.manual_seed(0)
    model = Careful().double()
    return model, surgery.trace(model, inputs(2))


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_branches_on_sizes_are_followed_and_the_batch_stays_free(careful, batch):
    model, traced = careful
    if batch != 2:  # Python asked for the length of the batch
        with pytest.raises(surgery.UsageError, match="the value is"):
            traced(inputs(batch))
        return
    assert torch.equal(traced(inputs(batch)), model(inputs(batch)))


def test_a_size_that_takes_the_same_way_needs_no_new_trace():
    class Halves(nn.Module):
        def forward(self, x):
            return x * 2 if x.shape[-1] > 4 else x

    traced = surgery.trace(Halves(), inputs(2))
    for batch, width in ((1, 8), (3, 5), (2, 64)):
        assert torch.equal(traced(inputs(batch, width)), inputs(batch, width) * 2)


def test_an_input_that_would_take_another_way_is_refused_with_the_line(careful):
    model, traced = careful
    with pytest.raises(surgery.UsageError, match=r"test_control_flow\.py:\d+: the condition is False here and"):
        traced(torch.randn(2, 3, 10, 8, dtype=torch.float64))
    assert torch.equal(traced(inputs(2, 16)), model(inputs(2, 16)))  # Python makes numbers of this size, no more


def test_guards_survive_copies_pickles_edits_and_dead_code_elimination(careful):
    model, traced = careful
    wide = surgery.widen(traced, 2.0)
    for twin in (copy.deepcopy(traced), pickle.loads(pickle.dumps(traced)), wide, surgery.deepen(traced, ["conv"])):
        twin.graph.eliminate_dead_code()
        twin.recompile()
        torch.testing.assert_close(twin(inputs(2)), model(inputs(2)), atol=1e-12, rtol=1e-12)
        with pytest.raises(surgery.UsageError, match="another way"):
            twin(torch.randn(2, 3, 10, 8, dtype=torch.float64))


def test_a_guarded_graph_can_be_exported(careful):
    model, traced = careful
    exported = torch.export.export(traced, (inputs(2),)).module()
    torch.testing.assert_close(exported(inputs(2)), model(inputs(2)))


def test_lists_and_dicts_of_tensors_are_iterated_over():
    torch.manual_seed(0)
    model = Lists().double()
    xs = [torch.randn(2, 4, dtype=torch.float64) for _ in range(3)]
    named = {"skip": torch.randn(2, dtype=torch.float64), "one": torch.randn(2, 4, dtype=torch.float64)}
    traced = surgery.trace(model, (xs, named))
    expected, found = model(xs, named), traced(xs, named)
    assert list(found) == list(expected)
    assert all(torch.equal(found[k], expected[k]) for k in expected)
    with pytest.raises(surgery.UsageError, match="the length is 2 here and was 3"):
        traced(xs[:2], named)
    with pytest.raises(surgery.UsageError, match="the set of keys"):
        traced(xs, {"one": named["one"]})
    permuted = surgery.reindex(traced, {"a": [5, 4, 3, 2, 1, 0]})
    assert surgery.verify(permuted, traced, (xs, named)).max_rel <= 1e-12


def test_a_constant_argument_keeps_its_name_and_refuses_another_value():
    class Repeated(nn.Module):
        def forward(self, x, times: int = 2, scale=(1.0, 2.0)):
            for _ in range(times):
                x = x * scale[1] + scale[0]
            return x

    traced = surgery.trace(Repeated(), inputs(2), kwargs={"times": 3})
    assert torch.equal(traced(inputs(1), times=3), Repeated()(inputs(1), times=3))
    with pytest.raises(surgery.UsageError, match="argument 'times' of Repeated: the value is 2 here and was 3"):
        traced(inputs(1))


def test_a_submodule_that_branches_on_its_mode_and_on_sizes_is_traced():
    class Noise(nn.Module):
        def forward(self, x):
            if self.training and x.shape[0] > 1:
                return x * 2
            return x + 1 if x.shape[-1] == 8 else x

    model = nn.Sequential(nn.Conv2d(3, 4, 1), Noise()).double()
    traced = surgery.trace(model, inputs(2))
    for train in (False, True):
        assert surgery.verify(traced, model, inputs(2), train=train).max_abs == 0.0


def test_sizes_that_torch_takes_as_numbers_are_not_guarded():
    class Ones(nn.Module):
        def forward(self, x):
            return torch.ones(1, 1).expand((x.size(0), x.size(1))) + torch.tensor(x.size(1)) + torch.ones(3).sum()

    traced = surgery.trace(Ones(), torch.zeros(2, 3))
    assert torch.equal(traced(torch.zeros(5, 7)), Ones()(torch.zeros(5, 7)))


def flow(batch=1, size=(128, 128), dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(batch, 3, *size, generator=generator, dtype=dtype) for _ in range(2))


@pytest.mark.parametrize("train", [False, True])
def test_raft_is_traced_whole_bit_for_bit_also_at_other_sizes(train):
    torch.manual_seed(0)
    model = get_model("raft_small", weights=None)
    traced = surgery.trace(model, flow())
    assert isinstance(traced, torch.fx.GraphModule)
    for images in (flow(), flow(2, (128, 136))):
        assert surgery.verify(traced, model, images, train=train).max_abs == 0.0
    with pytest.raises(surgery.UsageError, match=r"raft\.py:\d+: the condition"):
        traced(*flow(1, (128, 130)))


def test_raft_shrinks_and_grows(monkeypatch):
    grid = raft.make_coords_grid  # float32, whatever the model's dtype
    monkeypatch.setattr(raft, "make_coords_grid", lambda *args: grid(*args).double())
    torch.manual_seed(0)
    model = get_model("raft_small", weights=None).double().eval()
    images, kwargs = flow(2, dtype=torch.float64), {"num_flow_updates": 2}
    traced = surgery.trace(model, images, kwargs=kwargs)
    groups = [g for g in surgery.dimension_groups(traced) if g.editable]
    names = {m.layer for g in groups for m in g.members if m.role == "producer"}
    assert {"context_encoder.conv", "update_block.recurrent_block.convgru1.convz"} <= names
    permuted = surgery.reindex(traced, {g.name: g.permutation(1) for g in groups})
    assert surgery.verify(permuted, traced, images, kwargs=kwargs).max_rel <= 1e-10
    wide = surgery.widen(traced, 2.0)
    assert surgery.verify(wide, traced, images, kwargs=kwargs).max_rel <= 1e-10
    slim, masked = surgery.slim(traced, 0.5), surgery.masked(traced, surgery.split_masks(traced, 0.5))
    assert surgery.verify(slim, masked, images, kwargs=kwargs).max_rel <= 1e-10


def test_python_that_asks_for_the_device_gets_that_of_the_model():
    class ByDevice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 4)

        def forward(self, x):
            x = self.a(x)
            if x.device.type != "meta" and not x.is_meta and x.device == self.b.weight.device:
                x = x.relu() + torch.arange(8, device=x.device)
            return self.b(x.cuda() if x.is_cuda else x)

    model, x = ByDevice().double(), torch.randn(2, 3, dtype=torch.float64)
    traced = surgery.trace(model, x)
    assert torch.equal(traced(x), model(x))
    wide = surgery.widen(traced, 2.0)
    torch.testing.assert_close(wide(x), model(x))


def test_a_model_that_sets_an_attribute_of_a_tensor_stays_python():
    class Sets(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 4)

        def forward(self, x):
            y = self.a(x).detach()
            y.requires_grad = True
            return self.b(y), y

    model, x = Sets().double(), torch.randn(2, 3, dtype=torch.float64)
    traced = surgery.trace(model, x)
    for module in (traced, model):
        out, y = module(x)
        out.sum().backward()
        assert y.grad is not None
    assert not isinstance(traced, torch.fx.GraphModule)


def test_python_that_asks_whether_something_is_a_tensor_is_followed():
    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x, scale=2.0):
            x = self.a(x)
            x = x * scale.mean() if isinstance(scale, torch.Tensor) else x * scale
            x = (x.relu() if torch.is_tensor(x) else x[0],)
            return self.b(x[0] if isinstance(x, (list, tuple)) else x)

    net, x = Asks().double(), torch.randn(2, 4, dtype=torch.float64)
    for args in ((x,), (x, x.abs())):
        traced = surgery.trace(net, args)
        assert isinstance(traced, torch.fx.GraphModule)
        assert surgery.verify(surgery.widen(traced, 2.0), net, args, train=True).ok
    assert isinstance.__module__ == "builtins"


class AsksForTypes(nn.Module):
    """Each way in which Python asks whether something is a tensor; what C++ is given is not asked."""

    def __init__(self, way):
        super().__init__()
        self.way, self.layer = way, nn.Linear(4, 4)

    def forward(self, x):
        y = self.layer(x)
        match self.way:
            case "isinstance":
                found = isinstance(y, torch.Tensor)
            case "of several":
                found = all(isinstance(one, (torch.Tensor, int)) for one in (y, 3))
            case "in a call":
                found = bool(max(isinstance(y, torch.Tensor), 0))
            case "class":
                found = y.__class__ is torch.Tensor
            case "is_tensor":
                found = torch.is_tensor(y)
            case _:
                match y:
                    case torch.Tensor():
                        found = True
                    case _:
                        found = False
        return y * 2 if found else y


@pytest.mark.parametrize("way", ["isinstance", "of several", "in a call", "class", "is_tensor", "pattern"])
def test_python_that_asks_for_the_type_of_a_tensor_is_answered(way):
    model = AsksForTypes(way)
    x = torch.randn(2, 4)
    assert torch.equal(surgery.trace(model, x)(x), model(x))
