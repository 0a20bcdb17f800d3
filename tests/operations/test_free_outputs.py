"""Outputs that are let go: their channels change as any do, and what is left of them is compared."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery.axes.analysis import analyse
from tests.switched_off import find_sources, run_switched_off

EXACT = 1e-10
X = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def prepared(model: nn.Module) -> nn.Module:
    """The model in float64, with weights and statistics that are nowhere zero or constant."""
    generator = torch.Generator().manual_seed(1)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = torch.rand(tensor.shape, generator=generator) * 0.8 + 0.2
            tensor.data[tensor.data > 0.6] *= -1 if isinstance(tensor, nn.Parameter) else 1
    return model.double().eval()


class Classifier(nn.Module):
    """A classifier of six classes, and what is made of its scores."""

    def __init__(self, last: Any = lambda y: y) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 6)
        self.last = last

    def forward(self, x: Tensor) -> Any:
        return self.last(self.fc(self.norm(self.conv(x)).relu().mean((2, 3))))


class Tokens(nn.Module):
    """A Vision Transformer that returns its last stream, and that of its class token normalised."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(torch.zeros(1, 5, width))
        settings: Any = {"batch_first": True, "norm_first": True, "activation": "gelu", "dropout": 0.0}
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(width, 4, 2 * width, **settings) for _ in range(2))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.places
        for layer in self.layers:
            x = layer(x)
        return {"last_hidden_state": x, "pooled": self.norm(x[:, 0])}


class TwoHeads(nn.Module):
    """Two outputs with channels of their own; one is returned in training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.boxes, self.classes = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 1), nn.Conv2d(6, 5, 1)

    def forward(self, x: Tensor) -> Any:
        x = self.body(x).relu()
        if self.training:
            return {"boxes": self.boxes(x), "all": [self.classes(x)]}
        return {"all": [self.classes(x)]}


def traced_and_dense(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    dense = prepared(model)
    return surgery.trace(dense, X), dense


def assert_agree(module: nn.Module, reference: nn.Module) -> None:
    for train in (False, True):
        check = surgery.verify(module, reference, X, train=train).raise_if_different()
        assert check.batches == 2
        assert check.max_rel <= EXACT
        assert check.gradients > 0 or not train


def test_classes_are_dropped_by_index_in_one_line() -> None:
    traced, dense = traced_and_dense(Classifier())
    small = surgery.reindex(traced, {"fc": [0, 5, 2]}, outputs="free")
    for batch in (1, 2, 3):
        x = X[:1].expand(batch, -1, -1, -1) * torch.arange(1, batch + 1).view(-1, 1, 1, 1)
        assert torch.allclose(small(x), dense(x)[:, [0, 5, 2]], rtol=0, atol=1e-12)
    assert small.fc.out_features == 3
    found = surgery.outputs(small)
    assert (found[0].name, found[0].channels, found[0].kept) == ("output", {1: 3}, {1: (0, 5, 2)})
    assert json.loads(json.dumps(found[0].to_dict()))["kept"] == {"1": [0, 5, 2]}
    assert str(surgery.outputs(traced)[0]) == "output: 6 along axis 1"
    for reference in (traced, dense):
        assert_agree(small, reference)
        assert_agree(reference, small)


def test_without_being_let_go_an_output_stays() -> None:
    traced, _ = traced_and_dense(Classifier())
    with pytest.raises(surgery.EditError, match="group 'fc' cannot be edited: network output"):
        surgery.reindex(traced, {"fc": [0, 2]})
    assert [g.name for g in surgery.dimension_groups(traced) if not g.editable] == ["fc", "input of conv"]
    assert [g.name for g in surgery.dimension_groups(traced, outputs="free") if not g.editable] == ["input of conv"]
    assert not analyse(traced).find("fc").editable  # whatever was analysed before


def test_a_comparison_finds_a_wrong_class() -> None:
    traced, dense = traced_and_dense(Classifier())
    small = surgery.reindex(traced, {"fc": [0, 5, 2]}, outputs="free")
    with torch.no_grad():
        small.fc.weight[:] = small.fc.weight[[0, 2, 1]]
    assert not surgery.verify(small, dense, X).ok
    assert not surgery.verify(dense, small, X).ok


def test_copies_of_an_output_are_compared_one_by_one() -> None:
    traced, dense = traced_and_dense(Classifier())
    wide = surgery.widen(traced, {"fc": 9}, outputs="free", seed=1)
    kept = surgery.outputs(wide)[0].kept[1]
    assert kept[:6] == (0, 1, 2, 3, 4, 5)
    assert torch.allclose(wide(X), dense(X)[:, kept], rtol=0, atol=1e-12)
    assert_agree(wide, dense)
    assert_agree(traced, wide)
    other = surgery.widen(traced, {"fc": 9}, outputs="free", seed=2)
    assert surgery.outputs(other)[0].kept[1] != kept
    assert_agree(other, wide)
    with torch.no_grad():
        wide.fc.bias[8] += 1
    assert not surgery.verify(wide, dense, X).ok
    assert not surgery.verify(traced, wide, X).ok


def test_modules_that_lack_channels_of_each_other_are_not_compared() -> None:
    traced, _ = traced_and_dense(Classifier())
    first, second = (surgery.reindex(traced, {"fc": index}, outputs="free") for index in ([0, 2], [0, 3]))
    with pytest.raises(surgery.UsageError, match=r"each module lacks channels of the other, such as 2 and 3 of"):
        surgery.verify(first, second, X)
    narrow = prepared(Classifier())
    narrow.fc = prepared(nn.Linear(8, 5))
    with pytest.raises(surgery.UsageError, match=r"different shapes: \[\(2, 2\)\] and \[\(2, 5\)\]; the first should"):
        surgery.verify(first, narrow, X)
    others = surgery.reindex(surgery.trace(narrow, X), {"fc": [0, 2]}, outputs="free")
    with pytest.raises(surgery.UsageError, match=r"had 6 channels along axis 1 in the model .* 5 in that of"):
        surgery.verify(first, others, X)


def test_what_was_let_go_is_saved_copied_and_edited_further(tmp_path) -> None:
    traced, dense = traced_and_dense(Classifier())
    small = surgery.reindex(traced, {"fc": [4, 1, 5, 0]}, outputs="free")
    again = surgery.Recipe.from_json(surgery.recipe(small).to_json())
    assert again.steps[0].outputs == ("*",)
    assert again == surgery.recipe(small)
    loaded = surgery.load(surgery.save(small, tmp_path / "small"), model=Classifier().double())
    for module in (copy.deepcopy(small), loaded, surgery.apply(traced, again)):
        assert surgery.outputs(module) == surgery.outputs(small)
        assert torch.equal(module(X), small(X))
        assert_agree(module, dense)
    slim = surgery.slim(small, 0.5)  # the output stays now
    assert surgery.outputs(slim) == surgery.outputs(small)
    assert_agree(slim, surgery.masked(small, surgery.split_masks(small, 0.5)))
    fewer = surgery.widen(surgery.reindex(slim, {"fc": [3, 1]}, outputs=["output"]), {"conv": 2.0})
    assert surgery.outputs(fewer)[0].kept == {1: (0, 1)}
    assert_agree(fewer, slim)
    assert_agree(surgery.reindex(small, {"fc": [1, 3]}, outputs="free"), dense)


def test_an_order_that_comes_back_is_no_change() -> None:
    traced, dense = traced_and_dense(Classifier())
    turned = surgery.reindex(traced, {"fc": [5, 4, 3, 2, 1, 0]}, outputs="free")
    assert_agree(turned, dense)
    assert surgery.outputs(surgery.reindex(turned, {"fc": [5, 4, 3, 2, 1, 0]}, outputs="free"))[0].kept == {}


def test_a_last_stream_is_carved_and_grows_with_the_rest() -> None:
    traced, dense = traced_and_dense(Tokens())
    slim, kept = find_sources(traced, lambda m: surgery.slim(m, 0.5, outputs="free"), copies=False)
    macs = [surgery.cost(m).macs for m in (surgery.slim(traced, 0.5), slim, traced)]
    assert macs[1] <= 0.32 * macs[2] < 0.5 * macs[2] < macs[0]
    assert [(o.name, o.channels) for o in surgery.outputs(slim)] == [("last_hidden_state", {2: 8}), ("pooled", {1: 8})]
    first = list(range(8))
    assert [o.kept for o in surgery.outputs(slim)] == [{2: tuple(first)}, {1: tuple(first)}]
    off = run_switched_off(dense, kept, (X,), False).outputs
    for ours, theirs in zip(slim(X).values(), off, strict=True):
        assert torch.allclose(ours, theirs[..., first], rtol=0, atol=1e-10)
    assert_agree(slim, surgery.masked(traced, surgery.split_masks(traced, 0.5, outputs="free")))
    wide = surgery.widen(traced, 2.0, outputs="free")
    assert surgery.outputs(wide)[0].channels == {2: 32}
    assert_agree(wide, dense)


def test_no_output_holds_means_of_its_channels() -> None:
    traced, _ = traced_and_dense(Tokens())
    left = surgery.unwidened(traced, 1.5, outputs="free")
    assert "an output of the network would hold means of its channels" in left["patch"]
    assert surgery.outputs(surgery.widen(traced, 1.5, outputs="free"))[0].kept == {}
    with pytest.raises(surgery.EditError, match="output 'last_hidden_state' would hold means of its channels"):
        surgery.reindex(traced, {"patch": [*range(16), -1]}, outputs="free")


def test_positions_and_the_batch_stay_whatever_is_let_go() -> None:
    traced, _ = traced_and_dense(Tokens())
    for group in surgery.dimension_groups(traced, outputs="free"):
        held = [m for m in group.members if (m.name, m.axis) == ("places", 1)]
        assert not (held and group.editable)

    class Queries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.queries, self.layer = nn.Parameter(torch.zeros(7, 4)), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.queries * x.mean((1, 2, 3))[:, None, None])

    traced, dense = traced_and_dense(Queries())
    reasons = {g.name: g.reason for g in surgery.dimension_groups(traced, outputs="free") if not g.editable}
    assert list(reasons) == ["queries"]
    assert "network output" in reasons["queries"]
    assert [o.channels for o in surgery.outputs(traced)] == [{2: 5}]
    assert_agree(surgery.reindex(traced, {"layer": [4, 0]}, outputs="free"), dense)


def test_channels_that_are_returned_along_the_batch_stay() -> None:
    traced, dense = traced_and_dense(Classifier(lambda y: (y, y.view(y.shape[0] * y.shape[1], 1))))
    with pytest.raises(surgery.EditError, match=r"group 'fc' cannot be edited: .*network output"):
        surgery.reindex(traced, {"fc": [1, 0, 2, 3, 4, 5]}, outputs="free")
    assert_agree(surgery.widen(traced, 2.0, outputs="free"), dense)


def test_one_output_is_let_go_and_another_stays() -> None:
    traced, dense = traced_and_dense(TwoHeads())
    names = {(o.name, o.modes) for o in surgery.outputs(traced)}
    assert names == {("all.0", (False, True)), ("boxes", (True,))}
    for wish in ("all", "all.0", ["all*"]):
        slim = surgery.slim(traced, 0.5, outputs=wish)
        assert {o.name: (o.channels, o.kept) for o in surgery.outputs(slim)} == {
            "all.0": ({1: 3}, {1: (0, 1, 2)}),
            "boxes": ({1: 4}, {}),
        }
        assert_agree(slim, surgery.masked(traced, surgery.split_masks(traced, 0.5, outputs=wish)))
    with pytest.raises(surgery.EditError, match="group 'boxes' cannot be edited: network output"):
        surgery.reindex(traced, {"boxes": [0]}, outputs="all")
    assert_agree(surgery.reindex(traced, {"boxes": [2, 0], "classes": [1, 1, 4]}, outputs="free"), dense)
    with pytest.raises(surgery.UsageError, match=r"unknown output 'box'; did you mean 'boxes'"):
        surgery.slim(traced, 0.5, outputs="box")
    with pytest.raises(surgery.UsageError, match="outputs is 'free', or names of outputs, not"):
        surgery.slim(traced, 0.5, outputs=[1])  # type: ignore[list-item]


def test_channels_that_another_output_holds_too_stay() -> None:
    traced, _ = traced_and_dense(Tokens())
    for name in ("last_hidden_state", "pooled"):
        assert all(o.kept == {} for o in surgery.outputs(surgery.slim(traced, 0.5, outputs=name)))


def test_an_output_over_which_something_is_normalised_stays() -> None:
    traced, _ = traced_and_dense(Classifier(lambda y: y.softmax(-1)))
    with pytest.raises(surgery.EditError, match="group 'fc' cannot be edited: softmax works along it"):
        surgery.reindex(traced, {"fc": [0, 2, 5]}, outputs="free")


def test_outputs_in_parts_and_in_heads_keep_what_is_chosen() -> None:
    traced, dense = traced_and_dense(Classifier(lambda y: tuple(y.chunk(2, 1))))
    assert_agree(surgery.reindex(traced, {"fc": [2, 0, 4, 3]}, outputs="free"), dense)
    uneven = surgery.reindex(traced, {"fc": [0, 1, 2, 5]}, outputs="free")
    assert [o.kept for o in surgery.outputs(uneven)] == [{}, {1: (2,)}]
    assert_agree(uneven, dense)
    traced, dense = traced_and_dense(Classifier(lambda y: y.split([2, 4], 1)))
    for index in ([1, 0, 4, 3, 3], [0, 2], [1, 3, 4, 5]):
        assert_agree(surgery.reindex(traced, {"fc": index}, outputs="free"), dense)
    traced, dense = traced_and_dense(Classifier(lambda y: y.view(-1, 3, 2).transpose(1, 2)))
    parts = surgery.slim(traced, 0.5, outputs="free")
    assert_agree(parts, surgery.masked(traced, surgery.split_masks(traced, 0.5, outputs="free")))
    assert surgery.outputs(parts)[0].kept == {2: (0, 1)}


def test_outputs_of_python_are_let_go_where_it_does_not_hold_them() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.fc = Classifier(), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.body(x)
            return self.fc(x * 2 if x.sum() > 1e9 else x)

    traced, dense = traced_and_dense(Gate())
    small = surgery.reindex(traced, {"fc": [3, 1]}, outputs="free")
    assert torch.allclose(small(X), dense(X)[:, [3, 1]], rtol=0, atol=1e-12)
    assert surgery.verify(small, dense, X).raise_if_different().batches == 2


def test_a_classifier_of_fewer_classes_is_exported(tmp_path) -> None:
    traced, dense = traced_and_dense(Classifier())
    small = surgery.reindex(traced, {"fc": [0, 5, 2]}, outputs="free").float()
    export = surgery.export_onnx(small, tmp_path / "small.onnx", example_inputs=X.float())
    assert export.max_rel is not None
    assert export.max_rel < 1e-4
    import onnxruntime

    session = onnxruntime.InferenceSession(str(tmp_path / "small.onnx"))
    (scores,) = session.run(None, {session.get_inputs()[0].name: X.float().numpy()})
    assert torch.allclose(torch.from_numpy(scores).double(), dense(X)[:, [0, 5, 2]], atol=1e-4)


def test_scattered_weights_know_no_outputs() -> None:
    traced, _ = traced_and_dense(Classifier())
    with pytest.raises(surgery.UsageError, match="outputs are of channels: leave them out for WELS"):
        surgery.split_masks(traced, 0.5, kind="wels", outputs="free")


def test_positions_of_channels_that_are_returned_keep_the_order() -> None:
    class Greatest(Classifier):
        def forward(self, x: Tensor) -> Any:
            x = self.norm(self.conv(x))
            return self.fc(x.mean((2, 3))), x.max(1)

    traced, _ = traced_and_dense(Greatest())
    with pytest.raises(surgery.EditError, match="group 'conv' cannot be edited: max"):
        surgery.reindex(traced, {"conv": [1, 0, *range(2, 8)]}, outputs="free")
