"""Dimension groups: what is tied, what may be chosen, and what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import surgery

EXACT = 1e-10


def net(forward, *shapes, **children):
    """A traced float64 network of one function, and inputs for it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = type("Net", (nn.Module,), {"forward": forward})()
        for name, child in children.items():
            setattr(module, name, child)
        inputs = tuple(torch.randn(shape, dtype=torch.float64) for shape in shapes or ((2, 3, 4, 4),))
    return surgery.trace(module.double().eval(), inputs), inputs


def groups(traced):
    return {g.name: g for g in surgery.dimension_groups(traced)}


def changed(edited, traced, inputs):
    return surgery.verify(edited, traced, inputs).max_rel


def chain(**children):
    def forward(self, x):
        for name in children:
            x = getattr(self, name)(x)
        return x.mean((2, 3))

    return net(forward, **children)


def test_a_group_lists_producers_carriers_and_consumers():
    traced, _ = chain(a=nn.Conv2d(3, 4, 1), n=nn.BatchNorm2d(4), b=nn.Conv2d(4, 2, 1))
    group = groups(traced)["a"]
    assert [(str(m), m.role) for m in group.members] == [
        ("a.weight[0]", "producer"),
        ("a.bias[0]", "producer"),
        ("n.weight[0]", "per-channel"),
        ("n.bias[0]", "per-channel"),
        ("n.running_mean[0]", "per-channel"),
        ("n.running_var[0]", "per-channel"),
        ("b.weight[1]", "consumer"),
    ]
    assert (group.size, group.units, group.editable, group.reason) == (4, 4, True, "")


def test_why_names_the_ops_between_two_members():
    def forward(self, x):
        return self.c(torch.relu(self.a(x)) + self.b(x)).mean((2, 3))

    traced, _ = net(forward, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(3, 4, 1), c=nn.Conv2d(4, 2, 1))
    path = groups(traced)["a"].why("a", "b")
    assert path[0] == "a.weight[0]"
    assert path[-1] == "b.weight[0]"
    assert "add" in path
    with pytest.raises(surgery.UsageError, match="unknown member"):
        groups(traced)["a"].why("a", "nothing")


def test_an_addition_ties_what_a_concatenation_keeps_apart():
    def apart(self, x):
        return self.d(torch.cat([self.a(x), self.b(x)], 1)).mean((2, 3))

    def tied(self, x):
        return self.d(torch.cat([self.a(x), self.b(x)], 1) + self.c(x)).mean((2, 3))

    layers = {n: nn.Conv2d(3, w, 1) for n, w in (("a", 4), ("b", 2), ("c", 6))} | {"d": nn.Conv2d(6, 2, 1)}
    traced, _ = net(apart, **layers)
    assert (groups(traced)["a"].units, groups(traced)["b"].units) == (4, 2)
    traced, _ = net(tied, **layers)
    group = groups(traced)["a"]
    assert group.units == 6
    assert list(group.classes) == [0] * 4 + [1] * 2


def test_a_grouped_convolution_chooses_alike_in_every_group():
    traced, _ = chain(a=nn.Conv2d(3, 6, 1), b=nn.Conv2d(6, 8, 1, groups=2), c=nn.Conv2d(8, 2, 1))
    assert (groups(traced)["a"].size, groups(traced)["a"].units) == (6, 3)
    assert (groups(traced)["b"].size, groups(traced)["b"].units) == (8, 4)
    slim = surgery.reindex(traced, {"a": [2, 0], "b": [1]})
    assert torch.equal(slim.a.weight, traced.a.weight[[2, 0, 5, 3]])
    assert (slim.b.in_channels, slim.b.out_channels, slim.b.groups) == (4, 2, 2)


def test_channels_that_alternate_between_readers_keep_their_share_each():
    def forward(self, x):
        y = self.a(x)
        return (self.b(y[:, ::2]) + self.c(y[:, 1::2])).mean((2, 3))

    traced, inputs = net(forward, a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(4, 2, 1), c=nn.Conv2d(4, 2, 1))
    slim = surgery.slim(traced, 0.5)
    assert (slim.a.out_channels, slim.b.in_channels, slim.c.in_channels) == (4, 2, 2)
    assert changed(slim, surgery.masked(traced, surgery.split_masks(traced, 0.5)), inputs) <= EXACT


def test_a_size_read_from_an_edited_axis_stays_the_number_it_was():
    def forward(self, x):
        y = self.a(x)
        scale = y.shape[1] ** -0.5 / y[0].numel()
        return self.b(y * scale).mean((2, 3)) / y.size(1)

    traced, inputs = net(forward, a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 2, 1))
    for edited in (surgery.widen(traced, 2.0), surgery.widen(surgery.widen(traced, 1.5), 1.5)):
        assert changed(edited, traced, inputs) <= EXACT
    larger = torch.randn(5, 3, 6, 8, dtype=torch.float64)
    assert changed(surgery.widen(traced, 2.0), traced, larger) <= EXACT


def test_a_single_channel_that_is_repeated_can_be_widened():
    def forward(self, x):
        y = self.a(x)
        y = torch.cat([y, y.repeat(1, 2, 1, 1)], 1)
        return self.f(y.permute(0, 2, 3, 1).flatten(1))

    traced, inputs = net(forward, a=nn.Conv2d(3, 1, 1), f=nn.Linear(48, 2))
    wide = surgery.widen(traced, 3.0)
    assert wide.a.out_channels == 3
    assert changed(wide, traced, inputs) <= EXACT


def test_a_squeeze_that_would_remove_a_slim_axis_still_removes_what_it_did():
    def forward(self, x):
        return self.f(F.adaptive_avg_pool2d(self.a(x), 1).squeeze())

    traced, inputs = net(forward, a=nn.Conv2d(3, 2, 1), f=nn.Linear(2, 5))
    slim = surgery.slim(traced, 0.5)
    assert slim(*inputs).shape == (2, 5)
    assert changed(slim, surgery.masked(traced, surgery.split_masks(traced, 0.5)), inputs) <= EXACT


def test_statistics_over_a_channel_axis_freeze_it():
    def forward(self, x):
        return self.b(self.n(self.a(x).transpose(1, 2)).transpose(1, 2)).mean(2)

    for norm in (nn.InstanceNorm1d(4, affine=True), nn.BatchNorm1d(4)):
        traced, _ = net(forward, (2, 3, 4), a=nn.Conv1d(3, 4, 1), n=norm, b=nn.Conv1d(4, 2, 1))
        assert not groups(traced)["a"].editable
        assert "n computes statistics over it" in groups(traced)["a"].reason


def test_a_layer_normalised_group_takes_whole_factors_only():
    traced, inputs = chain(a=nn.Conv2d(3, 8, 1), n=nn.GroupNorm(2, 8), b=nn.Conv2d(8, 2, 1))
    assert (groups(traced)["a"].units, groups(traced)["a"].mixed) == (4, ("n",))
    assert surgery.widen(traced, 1.5).a.out_channels == 8
    wide = surgery.widen(traced, 3.0)
    assert (wide.a.out_channels, wide.n.num_channels, wide.n.num_groups) == (24, 24, 2)
    assert changed(wide, traced, inputs) <= EXACT
    with pytest.raises(surgery.EditError, match="n normalises over 'a': every unit needs the same number of copies"):
        surgery.reindex(traced, {"a": [0, 1, 2, 3, 3]})


def test_groups_that_one_layer_normalises_over_are_widened_by_the_same_factor_or_not_at_all():
    def forward(self, x, y):
        return self.d(self.n(torch.cat([self.a(x), self.b(y)], 1)))

    layers = {"a": nn.Linear(3, 4), "b": nn.Linear(3, 4), "n": nn.LayerNorm(8), "d": nn.Linear(8, 2)}
    traced, inputs = net(forward, (2, 3), (2, 3), **layers)
    wide = surgery.widen(traced, 2.0)
    assert (wide.a.out_features, wide.b.out_features, wide.n.normalized_shape) == (8, 8, (16,))
    assert changed(wide, traced, inputs) <= EXACT
    with pytest.raises(surgery.EditError, match="normalises over 'a' and 'b'"):
        surgery.widen(traced, {"a": 2.0})

    def with_input(self, x, y):
        return self.d(self.n(torch.cat([self.a(x), y], 1)))

    traced, inputs = net(with_input, (2, 3), (2, 4), **{k: v for k, v in layers.items() if k != "b"})
    wide = surgery.widen(traced, 2.0)
    assert wide.a.out_features == 4
    assert changed(wide, traced, inputs) <= EXACT


def test_a_group_norm_with_a_channel_to_each_group_gets_more_groups():
    traced, inputs = chain(a=nn.Conv2d(3, 4, 1), n=nn.GroupNorm(4, 4), b=nn.Conv2d(4, 2, 1))
    wide = surgery.widen(traced, 1.5)
    assert (wide.n.num_groups, wide.n.num_channels) == (6, 6)
    assert changed(wide, traced, inputs) <= EXACT


def test_a_weight_that_is_read_and_used_in_another_way_holds_no_copies():
    def forward(self, x):
        y = self.a(x)
        return self.c(self.b(y)) + self.d(y * self.b.weight[0])

    layers = {"a": nn.Linear(3, 4), "b": nn.Linear(4, 2), "c": nn.Linear(2, 2), "d": nn.Linear(4, 2)}
    traced, inputs = net(forward, (2, 3), **layers)
    assert changed(surgery.widen(traced, 2.0), traced, inputs) <= EXACT
    with pytest.raises(surgery.EditError, match=r"b\.weight is contracted over and used in another way"):
        surgery.widen(traced, {"a": 2.0})


def test_a_layer_that_overrides_what_it_computes_is_not_taken_for_its_base_class():
    class Standardised(nn.Conv2d):
        def _conv_forward(self, x, weight, bias):
            return super()._conv_forward(x, weight / weight.std((1, 2, 3), keepdim=True), bias)

    traced, inputs = chain(a=nn.Conv2d(3, 4, 1), b=Standardised(4, 4, 1), c=nn.Conv2d(4, 2, 1))
    assert groups(traced)["a"].mixed == ("std",)
    assert groups(traced)["a"].single == ("conv2d contracts a computed weight",)
    assert changed(surgery.widen(traced, 2.0), traced, inputs) <= EXACT


def test_a_layer_with_hooks_is_left_alone_and_its_hooks_do_not_see_the_analysis():
    seen = []
    layer = nn.Conv2d(3, 4, 1)
    layer.register_forward_hook(lambda module, args, output: seen.append(output.device.type))
    traced, _ = chain(z=nn.Conv2d(3, 3, 1), a=layer, b=nn.Conv2d(4, 2, 1))
    assert "a has hooks" in groups(traced)["z"].reason
    assert "meta" not in seen


def test_what_is_changed_in_place_through_a_view_is_frozen():
    def forward(self, x):
        y = self.a(x)
        y[:, ::2].relu_()
        return self.b(y).mean((2, 3))

    traced, inputs = net(forward, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 2, 1))
    assert groups(traced)["a"].reason == "relu_ changes it in place through a view"
    assert not groups(traced)["a"].editable
    assert changed(surgery.widen(traced, 2.0), traced, inputs) <= EXACT


def test_an_in_place_activation_of_a_whole_map_freezes_nothing():
    def forward(self, x):
        y = self.a(x)
        z = F.relu(y, inplace=True)
        z += y
        return self.b(z).mean((2, 3))

    traced, _ = net(forward, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 2, 1))
    assert groups(traced)["a"].reason == ""


def test_arguments_that_a_rule_does_not_know_freeze():
    def forward(self, x):
        y = self.a(x)
        return self.b(torch.cat([y, y], 1, out=None)).mean((2, 3))

    traced, _ = net(forward, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(8, 2, 1))
    assert groups(traced)["a"].reason == "cat has no rule for these arguments"


def test_splits_along_other_axes_keep_their_sizes():
    def forward(self, x):
        left, right = self.a(x).chunk(2, 3)
        first, _ = torch.cat([left, right]).chunk(2, 0)
        return self.b(first).mean((2, 3))

    traced, _ = net(forward, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 2, 1))
    wide = surgery.widen(traced, 2.0)
    assert changed(wide, traced, torch.randn(5, 3, 2, 8, dtype=torch.float64)) <= EXACT


def test_norms_with_positional_arguments_are_not_misread():
    def positional(self, x):
        y = self.a(x)
        return self.b(y / y.norm(2, 1).unsqueeze(1)).mean(2)

    def normalized(self, x):
        return self.b(F.normalize(self.a(x), 2, 1)).mean(2)

    for forward in (positional, normalized):
        traced, _ = net(forward, (2, 3, 4), a=nn.Conv1d(3, 4, 1), b=nn.Conv1d(4, 2, 1))
        assert groups(traced)["a"].mixed


def test_channels_that_cannot_be_told_apart_are_frozen():
    """Adding a shuffle of itself ties all channels, of which a grouped convolution then reads two parts."""

    def forward(self, x):
        y = self.a(x)
        return self.c(self.b(y + F.channel_shuffle(y, 2))).mean((2, 3))

    layers = {"a": nn.Conv2d(3, 4, 1), "b": nn.Conv2d(4, 4, 1, groups=2), "c": nn.Conv2d(4, 2, 1)}
    traced, inputs = net(forward, **layers)
    assert "b reads parts of it that cannot be told apart" in groups(traced)["a"].reason
    assert changed(surgery.widen(traced, 2.0), traced, inputs) <= EXACT


def test_a_grouped_transposed_convolution_with_one_output_to_a_group_is_left_as_it_is():
    traced, inputs = chain(a=nn.Conv2d(3, 4, 1), b=nn.ConvTranspose2d(4, 2, 1, groups=2), c=nn.Conv2d(2, 2, 1))
    assert not groups(traced)["b"].editable
    assert changed(surgery.widen(traced, 2.0), traced, inputs) <= EXACT


def test_a_shared_module_that_branches_on_its_mode_serves_several_widths():
    class Halving(nn.Module):
        def forward(self, x):
            return x * 0.5 if self.training else x

    def forward(self, x):
        return self.p(self.b(self.p(self.a(self.p(x))))).mean((2, 3))

    traced, inputs = net(forward, p=Halving(), a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 2, 1))
    assert groups(traced)["a"].editable
    wide = surgery.widen(traced, 2.0)
    for train in (False, True):
        assert surgery.verify(wide, traced, inputs, train=train).max_rel <= EXACT


@pytest.mark.parametrize("index", [[], [0, 9], [-1, 0]])
def test_an_index_out_of_range_is_refused(index):
    traced, _ = chain(a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 2, 1))
    with pytest.raises(surgery.UsageError, match="the index of group 'a' of 4 units"):
        surgery.reindex(traced, {"a": index})


def test_frozen_channels_are_refused_with_the_reason():
    traced, _ = chain(a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 2, 1))
    with pytest.raises(surgery.EditError, match="group 'b' cannot be edited: network output"):
        surgery.reindex(traced, {"b": [1, 0]})


def test_uneven_shares_keep_the_function():
    traced, inputs = chain(a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 2, 1))
    wide = surgery.reindex(traced, {"a": [0, 1, 2, 3, 1]}, shares={"a": [1, 0.3, 1, 1, 0.7]})
    assert changed(wide, traced, inputs) <= EXACT
    with pytest.raises(surgery.UsageError, match="must sum to 1"):
        surgery.reindex(traced, {"a": [0, 1, 1]}, shares={"a": [1, 0.5, 0.4]})


@pytest.mark.parametrize("shape", [(2, 1, 16, 16), (2, 3, 16), (2, 3, 2, 2)])
def test_example_inputs_that_do_not_fit_are_refused_in_one_line(shape):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 14 * 14, 2))
    with pytest.raises(surgery.UsageError, match=r"the example inputs do not fit: .* cannot take") as refused:
        surgery.slim(surgery.trace(model, torch.zeros(shape)), 0.5)
    assert "\n" not in str(refused.value)
