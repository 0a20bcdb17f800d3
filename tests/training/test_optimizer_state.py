"""The state of an optimiser follows the weights."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn, optim

import surgery
from surgery.training.optimizer_state import transfer_optimizer

OPTIMIZERS = {
    "sgd": (optim.SGD, {"lr": 0.05}),
    "momentum": (optim.SGD, {"lr": 0.05, "momentum": 0.9, "dampening": 0.1, "weight_decay": 1e-3, "foreach": False}),
    "nesterov": (optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True, "foreach": True}),
    "fused sgd": (optim.SGD, {"lr": 0.05, "momentum": 0.9, "fused": True}),
    "adam": (optim.Adam, {"lr": 0.01}),
    "amsgrad": (optim.AdamW, {"lr": 0.01, "amsgrad": True, "foreach": True}),
    "adamw": (optim.AdamW, {"lr": torch.tensor(0.01), "betas": (0.8, 0.99), "foreach": False}),
    "fused adamw": (optim.AdamW, {"lr": 0.01, "fused": True}),
    "rmsprop": (optim.RMSprop, {"lr": 0.001, "momentum": 0.9, "centered": True}),
    "adagrad": (optim.Adagrad, {"lr": 0.01, "initial_accumulator_value": 0.1}),
    "nadam": (optim.NAdam, {"lr": 0.01}),
    "adadelta": (optim.Adadelta, {"lr": 1.0}),
}


class Residual(nn.Module):
    """A stem, a residual block and a linear layer behind a flatten."""

    def __init__(self, width=6):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv1, self.norm1 = nn.Conv2d(width, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5)
        self.conv2, self.norm2 = nn.Conv2d(5, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.pool = nn.MaxPool2d(2)
        self.fc = nn.Linear(width * 4, 4)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x))))))
        return self.fc(self.pool(x).flatten(1))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return surgery.trace(Residual().double(), torch.zeros(2, 3, 4, 4, dtype=torch.float64))


def steps(model, optimizer, count, first=0):
    """Train on batches that are the same for the same number."""
    for number in range(first, first + count):
        generator = torch.Generator().manual_seed(number)
        images = torch.randn(8, 3, 4, 4, generator=generator, dtype=torch.float64)
        loss = nn.functional.cross_entropy(model(images), torch.arange(8) % 4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def permuted(net, seed=0):
    """The network with the channels of every group in another order."""
    groups = [group for group in surgery.dimension_groups(net) if group.editable]
    assert len(groups) == 2
    return surgery.reindex(net, {group.name: group.permutation(seed) for group in groups})


def in_two_groups(net, kind, options):
    matrices = [p for p in net.parameters() if p.ndim > 1]
    vectors = [p for p in net.parameters() if p.ndim <= 1]
    return kind([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], **options)


@pytest.mark.parametrize("which", OPTIMIZERS)
def test_training_commutes_with_the_order_of_the_channels(net, which):
    kind, options = OPTIMIZERS[which]
    twin = copy.deepcopy(net)
    steps(net, one := in_two_groups(net, kind, options), 4)
    other_order = permuted(net)
    carried = transfer_optimizer(one, net, other_order)
    steps(other_order, carried, 4, first=4)

    steps(twin, whole := in_two_groups(twin, kind, options), 8)
    expected = permuted(twin)
    for (name, value), reference in zip(other_order.named_parameters(), expected.parameters(), strict=True):
        assert (value - reference).abs().max() <= 1e-12, name
    state, reference = (s.state_dict()["state"] for s in (carried, transfer_optimizer(whole, twin, expected)))
    assert state.keys() == reference.keys()
    for number in state:
        for key, value in state[number].items():
            assert value is None or torch.allclose(torch.as_tensor(value), torch.as_tensor(reference[number][key]))


def test_a_kept_channel_keeps_its_state_and_copies_have_that_of_theirs(net):
    optimizer = optim.AdamW(net.parameters(), amsgrad=True)
    steps(net, optimizer, 3)
    index = [*range(6), 4, 2, 4]
    wide = surgery.reindex(net, {"stem": index})
    carried = transfer_optimizer(optimizer, net, wide)
    for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        old = {name: optimizer.state[p][key] for name, p in net.named_parameters()}
        new = {name: carried.state[p][key] for name, p in wide.named_parameters()}
        assert torch.equal(new["stem.weight"], old["stem.weight"][index])
        assert torch.equal(new["conv1.weight"], old["conv1.weight"][:, index])
        assert torch.equal(new["norm2.bias"], old["norm2.bias"][index])
        flat = old["fc.weight"].unflatten(1, (6, 4))[:, index].flatten(1)
        assert torch.equal(new["fc.weight"], flat)
        assert torch.equal(new["norm1.weight"], old["norm1.weight"])
    assert {state["step"].item() for state in carried.state.values()} == {3}


def test_further_copies_can_begin_without_state(net):
    optimizer = optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    steps(net, optimizer, 3)
    wide = surgery.reindex(net, {"stem": [1, 0, 0, 2, 3, 4, 5], "conv1": [0, 1, 2, 3, 4, 4]})
    carried = transfer_optimizer(optimizer, net, wide, new="zero")
    momentum = {name: carried.state[p]["momentum_buffer"] for name, p in wide.named_parameters()}
    old = optimizer.state[net.conv1.weight]["momentum_buffer"]
    expected = torch.zeros(6, 7, 3, 3, dtype=torch.float64)
    expected[:5, [0, 1, 3, 4, 5, 6]] = old[:, [1, 0, 2, 3, 4, 5]]
    assert torch.equal(momentum["conv1.weight"], expected)
    assert momentum["stem.weight"][2].count_nonzero() == 0
    assert momentum["norm1.bias"][5] == 0
    assert momentum["norm1.bias"][:5].count_nonzero() == 5


def test_a_mean_has_the_mean_of_the_state():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)).double()
    net = surgery.trace(model, torch.zeros(2, 4, dtype=torch.float64))
    optimizer = optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    net(torch.randn(5, 4, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    wide = surgery.widen(net, {"0": 14})
    old = optimizer.state[net.get_parameter("0.weight")]["momentum_buffer"]
    for new, mean in (("copied", old.mean(0)), ("zero", torch.zeros(4, dtype=torch.float64))):
        carried = transfer_optimizer(optimizer, net, wide, new=new)
        momentum = carried.state[wide.get_parameter("0.weight")]["momentum_buffer"]
        assert torch.equal(momentum[:6], old)
        assert torch.allclose(momentum[12:], mean.expand(2, 4))
        assert torch.equal(momentum[6:12], old if new == "copied" else torch.zeros_like(old))


def test_inserted_parameters_join_the_group_of_those_most_like_them_nearby():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
        nn.Flatten(),
        nn.Linear(16, 3),
    )
    net = surgery.trace(model, torch.zeros(2, 3, 6, 6))
    first, second, head = net.get_submodule("0"), net.get_submodule("1"), net.get_submodule("3")
    optimizer = optim.SGD(
        [
            {"params": [first.get_submodule("0").weight], "lr": 0.1},
            {"params": [second.get_submodule("0").weight], "lr": 0.2, "momentum": 0.5},
            {"params": [*first.get_submodule("1").parameters(), *head.parameters()], "lr": 0.3, "initial_lr": 0.6},
        ],
        lr=1.0,
    )
    deep = surgery.deepen(surgery.deepen(net, {"0.0": 1, "1": 1}), ["3"])
    carried = transfer_optimizer(optimizer, net, deep)
    names = {parameter: name for name, parameter in deep.named_parameters()}
    groups = [[names[p] for p in group["params"]] for group in carried.param_groups]
    inserted = {name for name in names.values() if name not in dict(net.named_parameters())}
    where = {name: number for number, group in enumerate(groups) for name in group if name in inserted}
    assert where.keys() == inserted
    assert groups[0][0] == "0.0.weight"
    for name, number in where.items():
        parameter = deep.get_parameter(name)
        expected = {4: 1 if name.startswith("1.") else 0, 2: 2, 1: 2}[parameter.ndim]
        assert number == expected, name
    assert [group["lr"] for group in carried.param_groups] == [0.1, 0.2, 0.3]
    assert [group["momentum"] for group in carried.param_groups] == [0, 0.5, 0]
    assert carried.param_groups[2]["initial_lr"] == 0.6
    assert not carried.state


def test_without_parameters_of_as_many_dims_inserted_ones_join_the_largest_group():
    net = surgery.trace(nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2)), torch.zeros(2, 3))
    optimizer = optim.SGD([{"params": [net.get_parameter("0.weight"), net.get_parameter("2.weight")]}], lr=0.1)
    deep = surgery.deepen(net, ["0"])
    carried = transfer_optimizer(optimizer, net, deep)
    assert len(carried.param_groups[0]["params"]) == 4
    assert not any(p is deep.get_parameter("2.bias") for p in carried.param_groups[0]["params"])


def test_the_new_optimizer_trains_inserted_layers_and_skips_parameters_that_the_old_one_skipped(net):
    optimizer = optim.AdamW([p for name, p in net.named_parameters() if not name.startswith("fc")])
    steps(net, optimizer, 1)
    deep = surgery.deepen(surgery.widen(net, 1.5), ["norm1"])
    before = copy.deepcopy(deep.state_dict())
    steps(deep, transfer_optimizer(optimizer, net, deep), 2)
    moved = {name for name, p in deep.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, _ in deep.named_parameters() if not name.startswith("fc")}
    assert any("identity" in name for name in moved)


def test_frozen_and_tied_parameters_stay_so():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight
            self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
            self.first.weight.requires_grad_(False)

        def forward(self, x):
            h = self.first(x)
            return self.last(h + torch.relu(self.b(torch.relu(self.a(h)))))

    net = surgery.trace(Tied(), torch.zeros(2, 3))
    optimizer = optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    (group,) = (g for g in surgery.dimension_groups(net) if g.name == "first")
    index = group.permutation()
    other = surgery.reindex(net, {"first": index})
    carried = transfer_optimizer(optimizer, net, other)
    assert len(carried.param_groups[0]["params"]) == len(list(net.parameters())) == 5
    assert other.b.weight is other.a.weight
    old = optimizer.state[net.a.weight]["momentum_buffer"]
    assert torch.equal(carried.state[other.a.weight]["momentum_buffer"], old[index][:, index])
    assert other.first.weight not in carried.state
    assert any(p is other.first.weight for p in carried.param_groups[0]["params"])
    assert not other.first.weight.requires_grad


def test_the_schedule_goes_on_from_where_it_was(net):
    optimizer = optim.SGD(net.parameters(), lr=0.5, momentum=0.9)
    schedule = optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    for number in range(3):
        steps(net, optimizer, 1, number)
        schedule.step()
    wide = surgery.widen(net, 1.5)
    carried = transfer_optimizer(optimizer, net, wide)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        goes_on = optim.lr_scheduler.LambdaLR(carried, lambda step: 1 / (step + 1), last_epoch=schedule.last_epoch - 1)
        assert carried.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] == 0.125
        steps(wide, carried, 1)
        goes_on.step()
    assert carried.param_groups[0]["lr"] == pytest.approx(0.1)


def test_names_of_parameters_in_the_groups_survive(net):
    optimizer = optim.SGD(net.named_parameters(), lr=0.1)
    deep = surgery.deepen(net, ["norm1"])
    carried = transfer_optimizer(optimizer, net, deep)
    names = carried.param_groups[0]["param_names"]
    assert names[:3] == ["stem.weight", "norm.weight", "norm.bias"]
    assert set(names) == {name for name, _ in deep.named_parameters()}
    assert all(deep.get_parameter(n) is p for n, p in zip(names, carried.param_groups[0]["params"], strict=True))


def test_state_is_laid_out_in_memory_as_the_weights_are(net):
    net = net.to(memory_format=torch.channels_last)
    optimizer = optim.Adam(net.parameters())
    steps(net, optimizer, 1)
    wide = surgery.widen(net, 1.5)
    state = transfer_optimizer(optimizer, net, wide).state[wide.conv1.weight]
    assert wide.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert state["exp_avg"].stride() == wide.conv1.weight.stride()


def test_nothing_given_is_changed_and_nothing_is_shared(net):
    optimizer = optim.AdamW(net.parameters(), lr=torch.tensor(0.01))
    steps(net, optimizer, 2)
    same = surgery.reindex(net, {})
    kept = copy.deepcopy((optimizer.state_dict(), net.state_dict(), same.state_dict()))
    carried = transfer_optimizer(optimizer, net, same)
    storages = {
        value.untyped_storage().data_ptr()
        for state in optimizer.state.values()
        for value in (*state.values(), optimizer.param_groups[0]["lr"])
    }
    for state in carried.state.values():
        for value in (*state.values(), carried.param_groups[0]["lr"], carried.defaults["lr"]):
            assert value.untyped_storage().data_ptr() not in storages
    steps(same, carried, 1)
    for value in carried.state.values():
        value["exp_avg"].zero_()
    old, weights, _ = kept
    assert str(optimizer.state_dict()) == str(old)
    assert all(torch.equal(value, weights[name]) for name, value in net.state_dict().items())


def test_an_optimizer_that_has_not_stepped_has_no_state(net):
    wide = surgery.widen(net, 1.5)
    carried = transfer_optimizer(optim.AdamW(net.parameters()), net, wide)
    assert type(carried) is optim.AdamW
    assert not carried.state
    assert [p.shape for p in carried.param_groups[0]["params"]] == [p.shape for p in wide.parameters()]


def test_state_that_cannot_follow_is_refused(net):
    wide = surgery.widen(net, 1.5)
    with pytest.raises(surgery.UsageError, match=r"group 0 of the optimizer holds a parameter of shape \(9, 3, 3, 3\)"):
        transfer_optimizer(optim.SGD(wide.parameters()), net, wide)
    with pytest.raises(surgery.UsageError, match="was not made from the other one"):
        transfer_optimizer(optim.SGD(wide.parameters()), wide, net)
    other = surgery.trace(nn.Sequential(nn.Linear(3, 4)), torch.randn(2, 3))
    with pytest.raises(surgery.UsageError, match=r"stem.weight is not in the edited module: it was not made from"):
        transfer_optimizer(optim.SGD(net.parameters()), net, other)
    with pytest.raises(surgery.UsageError, match="unknown state of new channels 'zeros'; did you mean 'zero'"):
        transfer_optimizer(optim.SGD(net.parameters()), net, wide, new="zeros")
    factored = optim.Adafactor(net.parameters())
    steps(net, factored, 1)
    with pytest.raises(
        surgery.UsageError, match=r"the state '\w+' of stem.weight has the shape .*: it cannot follow it"
    ):
        transfer_optimizer(factored, net, wide)
    history = optim.LBFGS(net.parameters(), max_iter=2)
    history.step(lambda: (lambda loss: (loss.backward(), loss)[1])(net(torch.ones(2, 3, 4, 4).double()).square().sum()))
    with pytest.raises(surgery.UsageError, match=r"the state '\w+' of stem.weight (is a list|has the shape)"):
        transfer_optimizer(history, net, wide)
