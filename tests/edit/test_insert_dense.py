"""One more layer at the end of a dense block: found from the graph, exact, and able to learn."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models
from typer.testing import CliRunner

import surgery
from surgery.cli import app
from tests.zoo import traced_of

EXACT = 1e-10


def layer(read: int, written: int) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(read), nn.ReLU(inplace=True), nn.Conv2d(read, written, 3, padding=1))


class Running(nn.Module):
    """A growing concatenation in one ``forward``; its layers are containers."""

    def __init__(self, first: bool = False) -> None:
        super().__init__()
        self.first = first
        self.layers = nn.ModuleList([layer(6, 4), layer(10, 5)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for each in self.layers:
            x = torch.cat([each(x), x] if self.first else [x, each(x)], dim=-3)
        return x


class Growing(nn.Module):
    """A layer that concatenates by itself."""

    def __init__(self, read: int, written: int) -> None:
        super().__init__()
        self.body = layer(read, written)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.concat((x, F.dropout(self.body(x), 0.0, self.training)), axis=1)


class Stage(nn.Module):
    def __init__(self, stage: nn.Module, tail: nn.Module | None = None, channels: int = 15) -> None:
        super().__init__()
        self.stem, self.stage = nn.Conv2d(3, 6, 3, padding=1), stage
        self.tail = nn.Identity() if tail is None else tail
        self.head = nn.Linear(channels, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.tail(self.stage(self.stem(x))).mean((2, 3)))


class Bare(nn.Module):
    """A stage whose layers have no containers, and read a flag and a parameter of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(6, 4, 3, padding=1), nn.BatchNorm2d(10), nn.Conv2d(10, 5, 1)
        self.gain = nn.Parameter(torch.rand(5, 1, 1) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([x, self.a(torch.relu(x))], 1)
        return torch.cat([x, self.gain * F.dropout(self.b(self.norm(x)), 0.0, self.training)], 1)


class Modal(Stage):
    """A graph for each mode."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stage(self.stem(x))
        return self.head((torch.sin(x) if self.training else x).mean((2, 3)))


def densenet() -> nn.Module:
    return models.DenseNet(4, (2, 3), 8, num_classes=5, drop_rate=0.0)


BLOCKS: dict[str, tuple[Callable[[], nn.Module], str, str, str, str]] = {
    "densenet": (
        densenet,
        "features.denseblock1",
        *(f"features.denseblock1.denselayer{k}" for k in (2, 3)),
        "features.transition1.conv.weight",
    ),
    "the last of a densenet": (
        densenet,
        "features.denseblock2",
        *(f"features.denseblock2.denselayer{k}" for k in (3, 4)),
        "classifier.weight",
    ),
    "one layer": (
        lambda: models.DenseNet(4, (1, 1), 8, num_classes=5),
        "features.denseblock1",
        *(f"features.denseblock1.denselayer{k}" for k in (1, 2)),
        "features.transition1.conv.weight",
    ),
    "running": (
        lambda: Stage(Running(), nn.Conv2d(15, 15, 3, groups=15)),
        *("stage", "stage.layers.1", "stage.layers.2", "head.weight"),
    ),
    "layers that concatenate": (
        lambda: Stage(nn.Sequential(Growing(6, 4), Growing(10, 5))),
        *("stage", "stage.1", "stage.2", "head.weight"),
    ),
    "no containers": (lambda: Stage(Bare()), "stage", "", "stage.layer0", "head.weight"),
    "two graphs": (
        lambda: Modal(nn.Sequential(Growing(6, 4), Growing(10, 5))),
        *("stage", "stage.1", "stage.2", "head.weight"),
    ),
    "the new channels first": (
        lambda: Stage(Running(first=True), nn.Conv2d(15, 15, 3, groups=15)),
        *("stage", "stage.layers.1", "stage.layers.2", "head.weight"),
    ),
    "more new channels than there are": (
        lambda: Stage(nn.Sequential(Growing(6, 16)), channels=22),
        *("stage", "stage.0", "stage.1", "head.weight"),
    ),
}
"""A model, a place in it, the container that is its last layer, the new one's name, and a weight that reads it."""


@pytest.fixture(scope="module", params=[pytest.param(n, marks=pytest.mark.xdist_group(n)) for n in BLOCKS])
def case(request: pytest.FixtureRequest) -> tuple[Any, ...]:
    make, *rest = BLOCKS[request.param]
    traced, x = traced_of(make, 2, 3, 32, 32)
    return traced, x, *rest, surgery.deepen(traced, {rest[0]: 1})


def awake(module: nn.Module) -> nn.Module:
    """The module with random numbers where something reads new channels with 0."""
    module = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        drawn = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) / 4
        parameter.data = torch.where(parameter == 0, drawn, parameter)
    return module


def test_the_last_layer_is_found_and_copied_under_the_next_name(case):
    traced, _, place, like, name, _, deep = case
    assert surgery.recipe(deep).steps == (surgery.InsertDense(place, name, like),)
    ours, theirs = ({n: p for n, p in m.named_parameters() if n.startswith(f"{stem}.")}
                    for m, stem in ((deep, name), (traced, like or "stage")))  # fmt: skip
    if like:
        assert [n.removeprefix(name) for n in ours] == [n.removeprefix(like) for n in theirs]
        last = theirs[list(theirs)[-1]], ours[list(ours)[-1]]
        assert torch.equal(*last)
        assert last[0].untyped_storage().data_ptr() != last[1].untyped_storage().data_ptr()
    else:
        assert set(ours) == {f"{name}.{n}" for n in ("stage_norm.weight", "stage_norm.bias", "stage_b.weight",
                                                     "stage_b.bias", "stage_gain")}  # fmt: skip


@pytest.mark.parametrize("train", [False, True])
def test_dense_layers_are_exact_in_both_modes_however_often(case, train):
    traced, x, place, _, _, reader, deep = case
    more = surgery.deepen(surgery.deepen(deep, [place], form="block"), {place: 2})
    steps = surgery.recipe(more).steps
    assert {type(s) for s in steps} == {surgery.InsertDense}
    assert len({s.name for s in steps}) == 4
    assert surgery.verify(deep, traced, x, train=train).max_rel <= EXACT
    assert surgery.verify(more, traced, x, train=train).max_rel <= EXACT
    width = (deep.get_parameter(reader).shape[1] - traced.get_parameter(reader).shape[1]) * 4
    assert more.get_parameter(reader).shape[1] == traced.get_parameter(reader).shape[1] + width


def test_the_last_layer_is_as_it_was_and_readers_read_the_new_channels_with_zeros(case):
    traced, _, _, like, _, reader, deep = case
    known = surgery.origins(traced, deep)
    changed = {n for n, p in traced.named_parameters() if deep.get_parameter(n).shape != p.shape}
    assert reader in changed
    assert not any(n.startswith(f"{like}.") for n in changed if like)
    (axis,) = [a for a in known[reader].axes if a is not None]
    new = deep.get_parameter(reader)[:, axis.new]
    assert axis.new.any()
    assert not new.any()
    assert torch.equal(deep.get_parameter(reader)[:, ~axis.new], traced.get_parameter(reader))
    assert {n for n, origin in known.items() if origin is not None} == set(traced.state_dict())


@pytest.mark.parametrize("train", [False, True])
def test_the_new_layer_is_read_and_reads_what_the_last_layer_writes(case, train):
    traced, x, _, _, _, reader, deep = case
    woken = awake(deep).train(train)
    assert not torch.allclose(woken(x), copy.deepcopy(traced).train(train)(x))
    (axis,) = [a for a in surgery.origins(traced, deep)[reader].axes if a is not None]
    last = axis.old[axis.new].unique()  # the columns for what the last layer writes
    weight = woken.get_parameter(reader)
    weight.data[:, [k for k in range(weight.shape[1]) if not axis.new[k]]] = 0  # so that only the new layer is read
    assert len(last) == axis.new.sum()
    known = set(traced.state_dict())
    woken(x).square().sum().backward()
    columns = next(p for n, p in woken.named_parameters() if n not in known and p.ndim == 4 and p.shape[1] > len(last))
    assert columns.grad[:, -len(last) :].any()


def test_new_parameters_and_the_columns_that_read_them_learn_within_two_steps(case):
    traced, x, *_, reader, deep = case
    (axis,) = [a for a in surgery.origins(traced, deep)[reader].axes if a is not None]
    module = copy.deepcopy(deep).train()
    old = {n for n, _ in traced.named_parameters()}
    left = {n for n, _ in module.named_parameters() if n not in old}
    assert left
    optimiser = torch.optim.SGD(module.parameters(), lr=0.01)
    target = torch.randn(module(x).shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1))
    for step in range(2):
        optimiser.zero_grad()
        (module(x) - target).square().sum().backward()
        if step == 0:
            columns = module.get_parameter(reader).grad[:, axis.new]
            assert (columns.abs().transpose(0, 1).flatten(1).sum(1) > 0).all()
        left -= {n for n, p in module.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
        optimiser.step()
    assert left == set()


def test_new_layers_belong_to_dimension_groups(case):
    _, x, _, _, name, _, deep = case
    groups = [g for g in surgery.dimension_groups(deep) if g.editable]
    assert {m.layer.startswith(f"{name}.") for g in groups for m in g.members} == {True, False}
    woken = awake(deep)
    permuted = surgery.reindex(woken, {g.name: g.permutation(1) for g in groups})
    assert surgery.verify(permuted, woken, x).max_rel <= EXACT
    wide = surgery.widen(woken, 1.5)
    assert surgery.verify(wide, woken, x).max_rel <= EXACT
    slim = surgery.slim(woken, 0.5)
    assert surgery.verify(slim, surgery.masked(woken, surgery.split_masks(woken, 0.5)), x).max_rel <= EXACT


@pytest.mark.parametrize("train", [False, True])
def test_an_edited_block_gets_layers_too(case, train):
    traced, x, place, *_ = case
    permuted = surgery.reindex(traced, {g.name: g.permutation(1) for g in surgery.dimension_groups(traced)})
    for edited in (surgery.widen(traced, 1.5), surgery.slim(traced, 0.5), permuted):
        deep = surgery.deepen(edited, {place: 2})
        assert type(surgery.recipe(deep).steps[-1]) is surgery.InsertDense
        assert surgery.verify(deep, edited, x, train=train).max_rel <= EXACT


def test_the_last_layer_and_the_new_one_are_places_themselves(case):
    _, x, _, like, name, _, deep = case
    deeper = surgery.deepen(deep, [name, *([like] if like else [])])
    assert surgery.verify(deeper, deep, x).max_rel <= EXACT


def test_dense_layers_are_replayed_from_json(case):
    traced, _, place, *_ = case
    deep = surgery.deepen(traced, {place: 2})
    again = surgery.apply(traced, surgery.Recipe.from_json(surgery.recipe(deep).to_json()))
    ours, theirs = deep.state_dict(), again.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_inputs_are_untouched_and_nothing_is_shared(case):
    traced, _, place, *_ = case
    before, code = copy.deepcopy(traced.state_dict()), traced.code
    deep = surgery.deepen(traced, {place: 2})
    assert traced.code == code
    assert all(torch.equal(before[n], t) for n, t in traced.state_dict().items())
    held = {t.untyped_storage().data_ptr() for t in traced.state_dict().values()}
    assert not any(t.untyped_storage().data_ptr() in held for t in deep.state_dict().values())
    assert len({t.untyped_storage().data_ptr() for t in deep.state_dict().values()}) == len(deep.state_dict())


def test_the_state_of_an_optimiser_follows(case):
    traced, x, place, like, _, reader, _ = case
    module = copy.deepcopy(traced).train()
    optimiser = torch.optim.AdamW(module.parameters(), lr=0.01)
    module(x).square().sum().backward()
    optimiser.step()
    deep = surgery.deepen(module, {place: 2})
    moved = surgery.transfer_optimizer(optimiser, module, deep, new="zero")
    (axis,) = [a for a in surgery.origins(module, deep)[reader].axes if a is not None]
    ours = moved.state[deep.get_parameter(reader)]["exp_avg"]
    theirs = optimiser.state[module.get_parameter(reader)]["exp_avg"]
    assert torch.equal(ours[:, ~axis.new], theirs)
    assert not ours[:, axis.new].any()
    for name, parameter in module.named_parameters():
        if like and name.startswith(f"{like}."):
            state = moved.state[deep.get_parameter(name)]["exp_avg"]
            assert torch.equal(state, optimiser.state[parameter]["exp_avg"])
    assert {id(p) for g in moved.param_groups for p in g["params"]} == {id(p) for p in deep.parameters()}
    deep.train()(x).square().sum().backward()
    moved.step()


def test_origins_are_composed_with_what_comes_before_and_behind():
    traced, _ = traced_of(densenet, 2, 3, 32, 32)
    wide = surgery.widen(traced, {"features.denseblock1.denselayer2.conv2": 6})
    edited = surgery.widen(surgery.deepen(wide, {"features.denseblock1": 2}), 2.0, mapping="balanced")
    known, tensors = surgery.origins(traced, edited), dict(edited.named_parameters())
    for name in ("features.transition1.norm.weight", "features.denseblock1.denselayer2.norm1.bias"):
        (axis,) = known[name].axes
        assert torch.equal(tensors[name], traced.get_parameter(name)[axis.old])
    assert known["features.denseblock1.denselayer4.conv1.weight"] is None


def test_deepened_densenets_are_saved_and_loaded(tmp_path):
    traced = surgery.trace(densenet(), torch.zeros(2, 3, 32, 32))
    deep = surgery.deepen(traced, {"features.denseblock1": 1, "features.denseblock2": 2})
    assert [s.name.rpartition(".")[2] for s in surgery.recipe(deep).steps] == [f"denselayer{k}" for k in (3, 4, 5)]
    again = surgery.load(surgery.save(deep, tmp_path / "deep"), densenet())
    assert surgery.verify(again, deep, torch.randn(2, 3, 32, 32)).max_abs == 0


def test_a_dry_run_prints_what_reads_the_new_layer():
    source = f"{__name__}:densenet"
    options = ["--trust", "--at", "features.denseblock1", "--input-shape", "1,3,32,32", "--dry-run", "--json"]
    result = CliRunner().invoke(app, ["deepen", source, *options])
    assert result.exit_code == 0, result.output
    changes = json.loads(result.stdout)
    assert [pair["after"]["name"] for pair in changes["changed"]] == [
        f"features.transition1.{n}" for n in ("norm", "conv")
    ]
    assert {each["name"].rpartition(".")[0] for each in changes["added"]} == {"features.denseblock1.denselayer3"}


# ---------------------------------------------------------------------------------------------------------------------
# What cannot have a further layer


class Behind(nn.Module):
    """Something is done to the concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.a = layer(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, self.a(x)], 1) + 1


class Tapped(nn.Module):
    """The last layer's output is read besides the concatenation, if only to no effect."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = layer(6, 4), layer(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        self.b(y)
        return torch.cat([x, y], 1)


class Sum(nn.Module):
    """What is concatenated is added to what it is computed from."""

    def __init__(self) -> None:
        super().__init__()
        self.a = layer(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.a(x)
        return torch.cat([x, y], 1)


class Summed(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :6] + x[:, 6:]


class Shared(nn.Module):
    """One of the last layer's layers runs before as well."""

    def __init__(self) -> None:
        super().__init__()
        self.a = layer(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.a[0](x))
        return torch.cat([x, self.a(x)], 1)


class First(nn.Module):
    """The dense block reads the images."""

    def __init__(self) -> None:
        super().__init__()
        self.stage, self.head = nn.Sequential(Growing(3, 4)), nn.Linear(7, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.stage(x).mean((2, 3)))


class Last(nn.Module):
    """The dense block's output is the model's."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stage = nn.Conv2d(3, 6, 3), nn.Sequential(Growing(6, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.stage(self.stem(x))


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "group norm": (
        lambda: Stage(nn.Sequential(Growing(6, 4)), nn.GroupNorm(1, 10), 10),
        "what reads the dense block at the end of 'stage' cannot ignore further channels: tail normalises over them",
    ),
    "output": (
        Last,
        "what reads the dense block at the end of 'stage' cannot ignore further channels: ",
    ),
    "images": (First, "the last layer of the dense block at the end of 'stage' cannot read further channels: "),
    "tied": (
        lambda: Stage(Sum(), Summed(), 6),
        "the dense block at the end of 'stage' has layers whose channels are tied to each other",
    ),
    "shared": (
        lambda: Stage(Shared(), channels=12),
        "the dense block at the end of 'stage' shares weights of its last layer with others",
    ),
    "something behind": (lambda: Stage(Behind(), channels=10), "'stage' has no block at its end that could be copied"),
    "read elsewhere": (lambda: Stage(Tapped(), channels=10), "'stage' has no block at its end that could be copied"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_have_a_further_layer_is_refused_and_gets_other_layers_by_default(kind):
    make, message = REFUSED[kind]
    traced, x = traced_of(make, 2, 3, 8, 8)
    with pytest.raises(surgery.EditError, match=message):
        surgery.deepen(traced, ["stage"], form="block")
    deep = surgery.deepen(traced, ["stage"])
    assert [type(s).__name__ for s in surgery.recipe(deep).steps] == ["InsertIdentity"]
    assert surgery.verify(deep, traced, x).max_rel <= EXACT


def test_a_step_for_another_block_is_refused():
    traced, _ = traced_of(densenet, 2, 3, 32, 32)
    for after, like in (("features.denseblock1", "features.denseblock1.denselayer1"), ("features.transition1", "")):
        with pytest.raises(
            surgery.EditError, match=f"'{after}' does not end in a dense block whose last layer is '{like}'"
        ):
            surgery.apply(traced, surgery.InsertDense(after, "features.denseblock1.more", like))


def test_a_name_that_is_taken_is_refused():
    traced, _ = traced_of(densenet, 2, 3, 32, 32)
    step = surgery.InsertDense(
        "features.denseblock1", "features.denseblock1.denselayer1", "features.denseblock1.denselayer2"
    )
    with pytest.raises(surgery.EditError, match=r"'features\.denseblock1\.denselayer1' is taken"):
        surgery.apply(traced, step)


def test_a_kernel_or_a_form_asks_for_other_layers():
    traced, x = traced_of(densenet, 2, 3, 32, 32)
    for options in ({"kernel": 3}, {"form": "residual"}):
        deep = surgery.deepen(traced, ["features.denseblock1"], **options)
        assert type(surgery.recipe(deep).steps[0]) is surgery.InsertIdentity
        assert surgery.verify(deep, traced, x).max_rel <= EXACT


def test_a_further_layer_of_a_frozen_model_learns():
    model = models.densenet.DenseNet(4, (2, 2), 8, num_classes=10).requires_grad_(False)
    traced = surgery.trace(model, torch.randn(2, 3, 32, 32))
    deep = surgery.deepen(traced, ["features.denseblock1"])
    learns = {name for name, p in deep.named_parameters() if p.requires_grad}
    assert learns == {name for name, _ in deep.named_parameters() if "denseblock1.denselayer3." in name} != set()
