"""Layers of a slim network take over what the removed channels gave: exactly where that is possible."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import surgery
from surgery.edit.compensate import Compensate
from surgery.errors import EditError, UsageError
from tests.zoo import traced_of

EXACT = 1e-8


def conv(ins, outs, size=3, **options):
    return nn.Conv2d(ins, outs, size, padding=size // 2, **options)


class Residual(nn.Module):
    """A stream that three layers write, one of them behind a norm, one through a resampling."""

    def __init__(self):
        super().__init__()
        self.stem, self.first = conv(3, 6, bias=False), nn.BatchNorm2d(6)
        self.a, self.b, self.norm = conv(6, 5), conv(5, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.c, self.d, self.skip = conv(6, 4, stride=2), conv(4, 7), nn.Conv2d(6, 7, 1, stride=2, bias=False)
        self.head = nn.Linear(7, 4)

    def forward(self, x):
        x = self.first(self.stem(x)).relu()
        x = (x + self.norm(self.b(self.a(x).relu()))).relu()
        x = self.d(self.c(x).relu()) + self.skip(x)
        return self.head(x.relu().mean((2, 3)))


class Concatenation(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = conv(3, 5), conv(3, 4, 1)
        self.norm, self.c, self.head = nn.BatchNorm2d(9), conv(9, 5, bias=False), nn.Linear(14 * 4, 4)

    def forward(self, x):
        x = torch.cat([self.a(x).relu(), self.b(x)], 1)
        x = torch.cat([self.c(self.norm(x).relu()), x], 1)
        return self.head(F.adaptive_avg_pool2d(x, 2).flatten(1))


class Depthwise(nn.Module):
    """An inverted bottleneck with a gate."""

    def __init__(self):
        super().__init__()
        self.up, self.norm = nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.depth, self.second = conv(8, 8, groups=8, bias=False), nn.BatchNorm2d(8)
        self.squeeze, self.excite = nn.Conv2d(8, 3, 1), nn.Conv2d(3, 8, 1)
        self.down, self.head = nn.Conv2d(8, 5, 1), nn.Linear(5, 4)

    def forward(self, x):
        x = F.silu(self.second(self.depth(F.silu(self.norm(self.up(x))))))
        x = x * self.excite(self.squeeze(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return self.head(self.down(x).relu().mean((2, 3)))


class Functions(nn.Module):
    """Weights of the network's own, and a transposed convolution."""

    def __init__(self):
        super().__init__()
        self.a = nn.ConvTranspose2d(3, 6, 3, stride=2, bias=False)
        self.b = nn.ConvTranspose2d(6, 5, 2, bias=False)
        self.kernel, self.bias = nn.Parameter(torch.randn(4, 5, 3, 3)), nn.Parameter(torch.randn(4))
        self.matrix = nn.Parameter(torch.randn(3, 4))

    def forward(self, x):
        x = F.conv2d(self.b(self.a(x).relu()).relu(), self.kernel, self.bias, stride=2)
        return F.linear(x.relu().mean((2, 3)), self.matrix)


class Attention(nn.Module):
    """Both of torch, with separate and with packed projections."""

    def __init__(self):
        super().__init__()
        self.embed, self.other = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 6)
        self.own = nn.MultiheadAttention(8, 4, batch_first=True)
        self.cross = nn.MultiheadAttention(8, 2, kdim=6, vdim=6, batch_first=True)
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        y = self.norm(x)
        x = x + self.own(y, y, y, need_weights=False)[0]
        other = self.other(x).tanh()
        x = x + self.cross(x, other, other)[0]
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return self.head(x.mean(1))


class Island(nn.Module):
    """Python that decides by values, and calls layers."""

    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = conv(3, 6), conv(6, 6)

        def forward(self, x):
            return self.b(self.a(x).relu()).relu()

    def __init__(self):
        super().__init__()
        self.part, self.c, self.head = self.Part(), conv(6, 5), nn.Linear(5, 4)

    def forward(self, x):
        x = self.part(x)
        if float(x.detach().sum()) > 1e9:
            x = x * 2
        return self.head(self.c(x).relu().mean((2, 3)))


def linear():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(3 * 36, 9, bias=False), nn.ReLU(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 4)
    )


def plain():
    return nn.Sequential(
        *(conv(3, 6, padding_mode="reflect"), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, 2, 2, dilation=2)),
        *(nn.GELU(), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 1, 4)),
    )


NETS = {
    "linear": linear,
    "convolutions": plain,
    "residual": Residual,
    "concatenation": Concatenation,
    "depthwise": Depthwise,
    "functions": Functions,
    "attention": Attention,
    "island": Island,
}


def images(count, seed=1):
    return torch.randn(count, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def nets():
    return {name: traced_of(make, 2, 3, 6, 6)[0] for name, make in NETS.items()}


def widened(net, factor=1.5):
    """The net with copies of channels, which their readers share unevenly."""
    (step,) = surgery.recipe(surgery.widen(net, factor, seed=3)).steps
    generator = torch.Generator().manual_seed(5)
    shares = {}
    for name, index in step.indices.items():
        drawn = torch.rand(len(index), generator=generator, dtype=torch.float64) + 0.2
        old = torch.tensor(index)
        total = torch.zeros(int(old.max()) + 1, dtype=torch.float64).index_add_(0, old, drawn)
        shares[name] = (drawn / total[old]).tolist()
    return surgery.reindex(net, step.indices, shares), step.indices


def firsts(index):
    """Where the first copy of each unit is."""
    return [index.index(unit) for unit in range(max(index) + 1)]


def error(net, reference, x):
    with torch.no_grad():
        one, other = net(x), reference(x)
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("name", [name for name in NETS if name != "attention"])
def test_copies_that_are_removed_are_made_up_for_exactly(nets, name):
    wide, indices = widened(nets[name])
    kept = {where: firsts(index) for where, index in indices.items()}
    back = surgery.reindex(wide, kept, calibration=images(200))
    for count in (1, 5):
        assert error(surgery.reindex(wide, kept), nets[name], images(count)) > 1e-3
        assert error(back, nets[name], images(count)) < EXACT
    assert {n: t.shape for n, t in nets[name].named_parameters()}.items() <= {
        n: t.shape for n, t in back.named_parameters()
    }.items()


def test_an_attentions_copied_heads_and_hidden_channels_are_made_up_for_exactly(nets):
    net = nets["attention"]
    where = [g.name for g in surgery.dimension_groups(net) if g.editable and not g.mixed]
    indices = {g.name: [*range(g.units), 0, 1, 0] for g in surgery.dimension_groups(net) if g.name in where}
    shares = {name: [0.2, 0.7, *[1.0] * (len(index) - 5), 0.5, 0.3, 0.3] for name, index in indices.items()}
    wide = surgery.reindex(net, indices, shares)
    kept = {name: firsts(index) for name, index in indices.items()}
    back = surgery.reindex(wide, kept, calibration=images(200))
    assert error(surgery.reindex(wide, kept), net, images(5)) > 1e-3
    assert error(back, net, images(5)) < EXACT


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", NETS)
def test_a_compensated_network_is_nearer_to_the_dense_one_than_a_carved_one(name, seed):
    torch.manual_seed(seed)
    net = surgery.trace(NETS[name]().double().eval(), images(2))
    carved = surgery.slim(net, 0.5)
    found = surgery.slim(net, 0.5, calibration=images(256, seed + 10))
    test = images(64, seed + 100)
    assert error(found, net, test) < error(carved, net, test)


FORMS = {
    "tensor": lambda x: x,
    "inputs": lambda x: (x,),
    "batches": lambda x: list(x.split(32)),
    "batches with labels": lambda x: [[part, torch.zeros(len(part))] for part in x.split(32)],
    "an iterator": lambda x: iter(x.split(32)),
    "a data set": lambda x: TensorDataset(x, torch.zeros(len(x), dtype=torch.long)),
    "a shuffling loader": lambda x: DataLoader(TensorDataset(x, torch.zeros(len(x))), 7, shuffle=True),
    "parts": lambda x: {"train": TensorDataset(x, torch.zeros(len(x))), "test": None},
    "a pair of data sets": lambda x: (TensorDataset(x, torch.zeros(len(x))), None),
    "data": lambda x: surgery.as_data(TensorDataset(x.float(), torch.zeros(len(x), dtype=torch.long))),
    "single precision": lambda x: x.float(),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_calibration_gives_the_same(nets, form):
    x = images(128).float().double()
    found = surgery.slim(nets["residual"], 0.5, calibration=FORMS[form](x))
    expected = surgery.slim(nets["residual"], 0.5, calibration=x)
    assert error(found, expected, images(5)) < 1e-12


def test_named_inputs_are_a_mapping():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x, *, scale):
            return self.b((self.a(x) * scale).relu())

    x, scale = torch.randn(2, 64, 4, dtype=torch.float64)
    net = surgery.trace(Net().double().eval(), x[:2], kwargs={"scale": scale[:2, :1]})
    found = surgery.slim(net, 0.5, calibration={"x": x, "scale": scale[:, :1]})
    assert len(surgery.recipe(found).steps) == 2


def test_inputs_and_random_numbers_stay_as_they_were(nets):
    net = copy.deepcopy(nets["depthwise"]).train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    state, x = torch.get_rng_state(), images(40)
    kept = x.clone()
    found = surgery.slim(net, 0.5, calibration=x)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, kept)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert net.training
    assert found.training
    assert all(part.training for part in found.modules())
    tensors = [{t.data_ptr() for t in (*one.parameters(), *one.buffers())} for one in (net, found)]
    assert not tensors[0] & tensors[1]


def test_a_buffer_that_a_model_writes_when_it_runs_is_left_alone():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x):
            self.calls.add_(1)
            return self.b(self.a(x).relu())

    x = torch.randn(40, 4)
    net = surgery.trace(Net().eval(), x[:2])
    before = net.calls.clone()
    found = surgery.slim(net, 0.5, calibration=x)
    assert torch.equal(net.calls, before)
    assert torch.equal(found.calls, before)


def test_frozen_parameters_and_the_layout_of_weights_survive(nets):
    net = copy.deepcopy(nets["convolutions"]).to(memory_format=torch.channels_last)
    net.get_submodule("3").requires_grad_(False)
    found = surgery.slim(net, 0.5, calibration=images(40))
    assert not found.get_submodule("3").weight.requires_grad
    assert found.get_submodule("5").weight.requires_grad
    assert found.get_submodule("3").weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", NETS)
def test_a_compensated_network_is_saved_and_loaded(nets, name, tmp_path):
    found = surgery.slim(nets[name], 0.5, calibration=images(60))
    surgery.save(found, tmp_path / "slim")
    again = surgery.load(tmp_path / "slim", model=NETS[name]().double())
    assert surgery.recipe(again).steps == surgery.recipe(found).steps
    assert torch.equal(again.eval()(images(3)), found.eval()(images(3)))
    replayed = surgery.apply(nets[name], surgery.recipe(found))
    assert {n: t.shape for n, t in replayed.state_dict().items()} == {n: t.shape for n, t in found.state_dict().items()}


def test_a_layer_without_a_bias_gets_one_unless_a_norm_takes_the_constant(nets):
    found = surgery.slim(nets["residual"], 0.5, calibration=images(60))
    step = surgery.recipe(found).steps[-1]
    assert isinstance(step, Compensate)
    assert step.biases == ("skip",)
    assert step.left == {}
    assert set(step.layers) == {f"{name}.weight" for name in ("a", "b", "c", "d", "skip", "head")}
    carved = surgery.slim(nets["residual"], 0.5)
    assert not torch.equal(found.norm.running_mean, carved.norm.running_mean)
    assert torch.equal(found.first.running_mean, carved.first.running_mean)
    assert torch.equal(found.norm.running_var, carved.norm.running_var)
    assert found.skip.bias.requires_grad
    assert carved.skip.bias is None


def test_what_removed_channels_have_beyond_the_kept_ones_goes_to_the_bias():
    net = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3)).double().eval()
    with torch.no_grad():  # channel k + 4 is 2 k + 3
        net[0].weight[4:], net[0].bias[4:] = 2 * net[0].weight[:4], 2 * net[0].bias[:4] + 3
    inputs, unseen = torch.randn(2, 64, 6, dtype=torch.float64)
    slim = surgery.slim(surgery.trace(net, inputs[:2]), {"0": 0.5}, calibration=inputs)
    assert slim.get_submodule("0").out_features == 4
    torch.testing.assert_close(slim(unseen), net(unseen), rtol=EXACT, atol=EXACT)


def test_a_compensated_network_trains_and_is_edited_again(nets):
    found = surgery.slim(nets["residual"], 0.5, calibration=images(60))
    found.train()(images(4)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in found.parameters())
    wide = surgery.widen(found.eval(), 1.5, seed=0)
    assert error(wide, found, images(4)) < 1e-10
    assert surgery.verify(surgery.slim(found, 0.5), surgery.masked(found, surgery.split_masks(found, 0.5))).ok


def test_the_state_of_an_optimizer_follows():
    net = surgery.trace(Residual().double(), images(2))
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    net(images(4)).square().sum().backward()
    optimizer.step()
    found = surgery.slim(net, 0.5, calibration=images(60))
    moved = surgery.transfer_optimizer(optimizer, net, found)
    assert "momentum_buffer" not in moved.state.get(found.skip.bias, {})
    assert moved.state[found.d.weight]["momentum_buffer"].shape == found.d.weight.shape


class Unfitted(nn.Module):
    """Weights that are read in other ways too, or that do not run."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.matrix, self.unused = nn.Parameter(torch.randn(6, 6)), nn.Linear(6, 2)
        self.words = nn.Embedding(10, 6)

    def forward(self, x):
        h = self.a(x).relu()
        shared = F.linear(h, self.words.weight).sum(-1, keepdim=True)
        h = self.b(h @ self.matrix).relu() + self.words(torch.zeros_like(x[:, 0]).long())
        out = self.head(h) + shared
        return (out, self.unused(h)) if self.training else out


def test_what_cannot_be_fitted_stays_as_it_was_carved_and_is_said():
    torch.manual_seed(0)
    x = torch.randn(60, 4, dtype=torch.float64)
    net = surgery.trace(Unfitted().double().eval(), x[:2])
    found, carved = surgery.slim(net, 0.5, calibration=x), surgery.slim(net, 0.5)
    step = surgery.recipe(found).steps[-1]
    assert isinstance(step, Compensate)
    assert set(step.layers) == {"b.weight", "head.weight"}
    assert step.left == {
        "matrix": "used by matmul",
        "words.weight": "used by embedding",
        "unused.weight": "does not run in eval() on the calibration inputs",
    }
    assert "matrix as carved: used by matmul" in str(step)
    for name in step.left:
        assert torch.equal(found.get_parameter(name), carved.get_parameter(name))
    assert Compensate.from_dict(json.loads(json.dumps(step.to_dict()))) == step


def test_a_layer_that_runs_several_times_is_fitted_to_all_of_its_calls():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Linear(2, 6), nn.Linear(6, 6), nn.Linear(12, 3)

        def forward(self, x):
            first, second = (self.b(self.a(part).relu_()).relu_() for part in x.chunk(2, 1))
            return self.head(torch.cat([first, second], 1))

    torch.manual_seed(0)
    x = torch.randn(300, 4, dtype=torch.float64)
    net = surgery.trace(Net().double().eval(), x[:2])
    wide, indices = widened(net, 2.0)
    kept = {where: firsts(index) for where, index in indices.items()}
    test = torch.randn(9, 4, dtype=torch.float64)
    assert error(surgery.reindex(wide, kept, calibration=x), net, test) < EXACT


def test_rows_that_a_choice_by_values_reorders_are_not_compared():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            x = self.b(self.a(x).relu()).relu()
            best = x.sum(-1).topk(2, dim=1).indices
            x = x.gather(1, best.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
            return self.head(self.c(x).relu())

    torch.manual_seed(0)
    x = torch.randn(60, 7, 4, dtype=torch.float64)
    net = surgery.trace(Net().double().eval(), x[:2])
    step = surgery.recipe(surgery.slim(net, {"a": 0.25, "c": 0.5}, calibration=x)).steps[-1]
    assert isinstance(step, Compensate)
    assert step.layers == ("b.weight",)
    assert set(step.left) == {"head.weight"}
    assert "topk" in step.left["head.weight"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "calibration has no inputs"),
        (7, "calibration takes inputs, batches of them or a data set, not int"),
        ("digits", "not str"),
        (torch.randn(8, 5, 6, 6), "does not run on the calibration inputs"),
        (torch.full((8, 3, 6, 6), float("nan")), "values that are not finite"),
        (torch.randn(0, 3, 6, 6), "calibration has no inputs"),
    ],
)
def test_calibration_that_cannot_be_used_is_refused_in_one_line(nets, given, said):
    with pytest.raises(UsageError, match=said) as caught:
        surgery.slim(nets["convolutions"], 0.5, calibration=given)
    assert "\n" not in str(caught.value)


def test_one_input_alone_is_enough(nets):
    found = surgery.slim(nets["residual"], 0.5, calibration=images(1))
    assert found(images(2)).isfinite().all()


def test_nothing_is_fitted_where_nothing_is_removed(nets):
    found = surgery.slim(nets["residual"], 1.0, calibration=images(8))
    assert error(found, nets["residual"], images(3)) == 0


@pytest.mark.parametrize("name", ["a", "first", "nothing"])
def test_a_bias_is_added_to_a_layer_that_lacks_one_alone(nets, name):
    with pytest.raises(EditError, match=f"'{name}' is no layer that lacks a bias"):
        surgery.apply(nets["residual"], Compensate((), (name,)))
