"""Models whose Python decides by what tensors hold: traced in parts, coupled across the Python between them."""

from __future__ import annotations

import copy
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import get_model
from torchvision.ops.misc import FrozenBatchNorm2d

import surgery
from surgery.errors import UsageError
from surgery.graph.traced import TracedModule, info, is_traced
from tests.zoo import randomised

EXACT = 1e-10
X = torch.randn(3, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def block(ins, outs):
    return nn.Sequential(nn.Conv2d(ins, outs, 3, padding=1), nn.BatchNorm2d(outs), nn.ReLU())


def groups_of(traced):
    return {g.name: g for g in surgery.dimension_groups(traced)}


def prepared(model, *inputs, **kwargs):
    model = randomised(model).double().eval()
    return model, surgery.trace(model, inputs, **kwargs)


def holds_the_oracle(traced, inputs, train=(False,)):
    """Permute everything editable, grow, shrink; what is computed stays what it was."""
    index = {g.name: g.permutation(1) for g in groups_of(traced).values() if g.editable}
    slim, masked = surgery.slim(traced, 0.5), surgery.masked(traced, surgery.split_masks(traced, 0.5))
    for mode in train:
        for edited, like in ((surgery.reindex(traced, index), traced), (surgery.widen(traced, 2.0), traced),
                             (slim, masked)):  # fmt: skip
            assert surgery.verify(edited, like, inputs, train=mode, seed=1).max_rel <= EXACT
    return slim


class Gate(nn.Module):
    """Takes another way when the input sums up to something negative."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.other = block(4, 8), block(8, 6), block(8, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        y = self.first(x)
        z = self.second(y) if x.sum() > -1e9 else -self.other(y)
        return self.head(z.mean((2, 3)))


def test_the_parent_stays_what_it_is_and_its_parts_become_graphs():
    model, traced = prepared(Gate(), X)
    assert type(traced) is Gate
    assert {n for n, m in traced.named_modules() if isinstance(m, TracedModule)} == {"first", "second"}
    assert "test_islands.py" in info(traced).untraced
    assert list(traced.state_dict()) == list(model.state_dict())
    for train in (False, True):
        assert surgery.verify(traced, model, (X,), train=train).max_abs == 0.0


def test_parts_are_coupled_across_python():
    _, traced = prepared(Gate(), X)
    group = groups_of(traced)["first.0"]
    assert {m.layer for m in group.members} == {"first.0", "first.1", "second.0"}
    assert any("second.0" in op for op in group.why("first.0.weight[0]", "second.0.weight[1]"))
    assert groups_of(traced)["head"].reason == "network output"
    assert groups_of(traced)["input of first.0"].reason == "network input"


def test_what_the_recorded_run_did_not_pass_is_in_no_group():
    _, traced = prepared(Gate(), X)
    members = {m.name for g in groups_of(traced).values() for m in g.members}
    assert not any(name.startswith("other.") for name in members)


class Linked(nn.Module):
    """As `Gate`, both ways through the same parts."""

    def __init__(self):
        super().__init__()
        self.first, self.second = block(4, 8), block(8, 6)
        self.norm, self.head = nn.BatchNorm2d(6), nn.Linear(6 * 9, 5)
        self.scale = nn.Parameter(torch.rand(6, 1, 1))

    def between(self, y):
        return F.interpolate(F.relu(y) + y.detach(), scale_factor=0.5)

    def forward(self, x):
        y = self.first(x)
        y = self.between(y) if x.sum() > -1e9 else y
        z = self.norm(self.second(y)) * self.scale
        z += z.clone()
        return self.head(torch.flatten(z, 1))


def test_a_network_of_parts_holds_the_oracle_in_both_modes():
    model, traced = prepared(Linked(), X)
    editable = {n for n, g in groups_of(traced).items() if g.editable}
    assert editable == {"first.0", "second.0"}
    slim = holds_the_oracle(traced, (X,), train=(False, True))
    assert (slim.norm.num_features, slim.head.in_features, slim.scale.shape[0]) == (3, 27, 3)
    again = surgery.widen(slim, 3.0)
    assert surgery.verify(again, slim, (X,)).max_rel <= EXACT
    deep = surgery.deepen(traced, ["first", "second.0"])
    assert surgery.verify(deep, model, (X,)).max_rel <= EXACT
    assert {"first.3", "second.0_identity0"} <= {n for n, _ in deep.named_modules()}


def test_copies_are_their_own_and_do_not_carry_the_analysis():
    _, traced = prepared(Linked(), X)
    surgery.dimension_groups(traced)
    twin = copy.deepcopy(traced)
    assert twin.__dict__["_analysis"] is None
    assert info(twin) == info(traced)
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in traced.parameters()}
    assert [g.name for g in surgery.dimension_groups(twin)] == list(groups_of(traced))
    slim = surgery.slim(twin, 0.5).train()
    slim(X).sum().backward()
    assert all(p.grad is not None for p in slim.parameters())


def test_tracing_and_analysing_leave_model_buffers_and_random_state_alone():
    model = randomised(Linked()).double().train()
    model.first[1].eval()
    state, rng = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    traced = surgery.trace(model, X)
    surgery.slim(traced, 0.5)
    assert torch.equal(torch.random.get_rng_state(), rng)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(v, state[k]) for k, v in traced.state_dict().items())
    assert [m.training for _, m in traced.named_modules()] == [m.training for _, m in model.named_modules()]


class Images(nn.Module):
    """A list of images of different sizes, as detection models take it."""

    def __init__(self):
        super().__init__()
        self.body, self.head = block(4, 8), nn.Conv2d(8, 2, 1)

    def forward(self, images, targets=None):
        batch = images[0].new_zeros((len(images), 4, max(i.shape[1] for i in images), 8))
        for k, image in enumerate(images):
            batch[k, :, : image.shape[1], : image.shape[2]].copy_(image)
        y = self.head(self.body(batch))
        if self.training:
            if targets is None:
                raise ValueError("no targets")
            kept = [i for i, t in enumerate(targets) if t["labels"].sum() > 0]
            return {"loss": sum(y[k].square().mean() * targets[k]["labels"].sum() for k in kept)}
        return [{"scores": row[row > 0]} for row in y]


def test_lists_of_images_and_dicts_of_targets_are_taken_in_both_modes(tmp_path):
    images = [X[0], X[1, :, :4]]
    targets = [{"labels": torch.tensor([1, 0])}, {"labels": torch.tensor([2, 1])}]
    model, traced = prepared(Images(), images, targets)
    for train in (False, True):
        assert surgery.verify(traced, model, (images, targets), train=train).max_abs == 0.0
    slim = holds_the_oracle(traced, (images, targets), train=(True,))
    assert slim.body[0].out_channels == 4
    again = surgery.load(surgery.save(slim, tmp_path / "slim"), Images())
    assert info(again) == info(slim)
    for train in (False, True):
        assert surgery.verify(again, slim, (images, targets), train=train).max_abs == 0.0
    with pytest.raises(ValueError, match="no targets"):
        traced.train()(images)


class Python(nn.Module):
    """``between`` is what Python does between two layers."""

    def __init__(self, between, ins=8):
        super().__init__()
        self.first, self.last = nn.Conv2d(4, 8, 1), nn.Linear(ins, 3)
        self.between = between

    def forward(self, x):
        y = self.first(x)
        return self.last(self.between(y) if x.sum() < 1e9 else y)


@torch.jit.script
def scripted(x):
    return x.mean([2, 3])


def grown(y):
    result = torch.zeros(len(y), y.shape[1], dtype=y.dtype)
    rows = torch.arange(len(y) - 1)
    result[rows] = y.mean((2, 3))[rows]
    return result


FOLLOWS = {
    "reduction": lambda y: y.mean((2, 3)),
    "a view as large as it comes": lambda y: y.view(len(y), -1, 36).mean(-1),
    "a view of a size that is read": lambda y: y.view(len(y), y.shape[1], 36).mean(-1),
    "moved axes": lambda y: y.permute(0, 2, 3, 1)[:, 0].transpose(1, 2).amax(2),
    "rows picked and written": grown,
    "cut boxes": lambda y: torch.ops.torchvision.roi_align(
        y, torch.tensor([[0.0, 0, 0, 3, 3]] * 3, dtype=y.dtype), 1.0, 1, 1, -1, False
    ).flatten(1),
    "in place": lambda y: y.mean((2, 3)).add_(1).relu_(),
    "squares by hand": lambda y: (y.mean((2, 3)) * 2 - 1).clamp(min=0) / 3,
    "no channels at all": lambda y: y.mean((2, 3)) if y.shape[1] > 0 and y.numel() != 0 else y,
}
STAYS = {
    "a view of a constant": (lambda y: y.view(len(y), 8, 36).mean(-1), "view"),
    "half of it": (lambda y: torch.cat([y[:, :4], y[:, 4:]], 1).mean((2, 3)), "getitem"),
    "two halves": (lambda y: torch.cat(y.mean((2, 3)).chunk(2, 1)[::-1], 1), "chunk"),
    "another order": (lambda y: y.mean((2, 3)).flip(1), "flip"),
    "its size as a number": (lambda y: y.mean((2, 3)) / y.shape[1], "(div)"),
    "its size compared": (lambda y: y.mean((2, 3)) * (2 if y.shape[1] == 8 else 1), "size in eq"),
    "its numbers": (lambda y: torch.tensor(y.mean((2, 3)).tolist(), dtype=y.dtype), "tolist"),
    "an op without a rule": (lambda y: torch.cummax(y.mean((2, 3)), 1)[0], "cummax"),
    "a write of part of it": (lambda y: written(y.mean((2, 3))), "setitem"),
    "rows among random numbers": (lambda y: mixed(y.mean((2, 3))), "setitem"),
    "a script": (lambda y: scripted(y), "aten.mean"),
    "a constant for each channel": (lambda y: y.mean((2, 3)) * torch.arange(8.0, dtype=y.dtype), "no channels"),
    "a changed view": (lambda y: viewed(y.mean((2, 3))), "add_|getitem"),
}


def written(y):
    y[:, 3] = 0.0
    return y


def mixed(y):
    result = torch.arange(24.0, dtype=y.dtype).view(3, 8)
    result[:1] = y[:1]
    return result


def viewed(y):
    y[0].add_(torch.arange(8.0, dtype=y.dtype))
    return y


@pytest.mark.parametrize("what", FOLLOWS)
def test_what_python_does_to_whole_channels_follows(what):
    _, traced = prepared(Python(FOLLOWS[what]), X)
    assert groups_of(traced)["first"].editable
    assert holds_the_oracle(traced, (X,)).last.in_features == 4


@pytest.mark.parametrize("what", STAYS)
def test_what_python_does_with_numbers_of_its_own_stays(what):
    between, reason = STAYS[what]
    model, traced = prepared(Python(between), X)
    group = groups_of(traced)["first"]
    assert not group.editable
    assert any(part in group.reason for part in reason.split("|")), group.reason
    assert surgery.verify(surgery.slim(traced, 0.5), model, (X,)).max_abs == 0.0


class Twice(nn.Module):
    """Calls one child twice, at two sizes; another, through a method."""

    def __init__(self):
        super().__init__()
        self.stem, self.tower, self.head = block(4, 8), block(8, 8), Head()

    def forward(self, x):
        y = self.stem(x)
        scores = [self.head(self.tower(y)), self.head(self.tower(F.avg_pool2d(y, 2)))]
        return self.head.best(scores) if scores[0].sum() < 1e9 else scores[0]


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.classes = 5
        self.fc = nn.Linear(8, self.classes)

    def forward(self, x):
        return self.fc(x.mean((2, 3)))

    def best(self, scores):
        return torch.stack(scores).amax(0)[:, : self.classes]


def test_a_part_called_twice_and_by_its_methods_is_one_part():
    model, traced = prepared(Twice(), X)
    assert isinstance(traced.head, TracedModule)
    assert isinstance(traced.head, Head)
    assert {n for n, g in groups_of(traced).items() if g.editable} == {"stem.0", "tower.0"}
    slim = holds_the_oracle(traced, (X,), train=(False, True))
    assert copy.deepcopy(slim).head.classes == 5
    assert surgery.verify(surgery.deepen(traced, ["tower"]), model, (X,)).max_rel <= EXACT


def test_what_runs_in_training_alone_follows_too():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head, self.aux = block(4, 8), nn.Conv2d(8, 3, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x):
            y = self.body(x) if x.sum() < 1e9 else x
            return (self.head(y), self.aux(y)) if self.training else self.head(y)

    _, traced = prepared(Auxiliary(), X)
    assert holds_the_oracle(traced, (X,), train=(False, True)).aux.in_channels == 4


def test_hooks_on_parts_are_kept():
    model = Gate().double()
    seen = []
    model.first.register_forward_hook(lambda m, i, o: seen.append(o.shape))
    traced = surgery.trace(model, X)
    seen.clear()
    traced(X)
    assert len(seen) == 1
    assert groups_of(traced)["first.0"].reason == "first has hooks"


def test_a_part_whose_way_depends_on_sizes_is_looked_into():
    class Sized(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 1)

        def forward(self, x):
            return F.relu(self.conv(x)) if x.shape[-1] > 3 else self.conv(x) - 1

    class Pyramid(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.sized, self.head = nn.Conv2d(4, 8, 1), Sized(), nn.Linear(8, 2)

        def forward(self, x):
            y = self.stem(x)
            levels = [self.sized(y), self.sized(F.max_pool2d(y, 2))]
            return self.head(sum(v.mean((2, 3)) for v in levels)) if x.max() < 1e9 else y

    _, traced = prepared(Pyramid(), X)
    assert not isinstance(traced.sized, TracedModule)
    assert {n for n, g in groups_of(traced).items() if g.editable} == {"stem", "sized.conv"}
    assert holds_the_oracle(traced, (X,)).sized.conv.in_channels == 4


def test_a_model_that_no_longer_runs_is_named():
    class Picky(Gate):
        def forward(self, x):
            if x.sum() != X.sum():
                raise ValueError("not my input")
            return super().forward(x)

    assert surgery.dimension_groups(surgery.trace(Picky().double(), X))  # the values of small inputs are remembered
    big = torch.zeros(40, 4, 6, 6, dtype=torch.float64)
    big[:3] = X
    traced = surgery.trace(Picky().double(), big)
    with pytest.raises(surgery.TraceError, match=r"Picky does not run in evaluation on inputs like .*not my input"):
        surgery.dimension_groups(traced)
    with pytest.raises(surgery.TraceError, match=r"Picky cannot be traced.*nor does it run .*not my input"):
        surgery.trace(Picky().double(), big * 2)


# ---------------------------------------------------------------------------------------------------------------------
# Detection

SMALL = {"weights": None, "weights_backbone": None, "num_classes": 4}
DETECTORS = {
    "maskrcnn_resnet50_fpn": {
        **{"min_size": 64, "max_size": 96, "box_score_thresh": 0.0, "box_detections_per_img": 3},
        **{"rpn_post_nms_top_n_train": 10, "rpn_post_nms_top_n_test": 10, "box_batch_size_per_image": 8},
    },
    "fcos_resnet50_fpn": {"min_size": 64, "max_size": 96, "score_thresh": 0.0, "detections_per_img": 3},
    "retinanet_resnet50_fpn": {"min_size": 64, "max_size": 96, "score_thresh": 0.0, "detections_per_img": 3},
    "ssdlite320_mobilenet_v3_large": {"score_thresh": 0.0, "detections_per_img": 3},
}
ENDS = {
    "maskrcnn_resnet50_fpn": {
        *("rpn.head.cls_logits", "rpn.head.bbox_pred", "roi_heads.box_predictor.cls_score"),
        *("roi_heads.box_predictor.bbox_pred", "roi_heads.mask_predictor.mask_fcn_logits"),
    },
    "fcos_resnet50_fpn": {
        *("head.classification_head.cls_logits", "head.regression_head.bbox_reg"),
        "head.regression_head.bbox_ctrness",
    },
    "retinanet_resnet50_fpn": {"head.classification_head.cls_logits", "head.regression_head.bbox_reg"},
    "ssdlite320_mobilenet_v3_large": {
        f"head.{kind}_head.module_list.{k}.1" for kind in ("classification", "regression") for k in range(6)
    },
}
PLACES = {
    "maskrcnn_resnet50_fpn": ["backbone.body.layer3", "roi_heads.box_head"],
    "fcos_resnet50_fpn": ["backbone.body.layer2", "backbone.fpn.layer_blocks.0.0"],
    "retinanet_resnet50_fpn": ["backbone.body.layer2"],
    "ssdlite320_mobilenet_v3_large": ["backbone.features.0"],
}


@pytest.fixture(scope="module", params=[pytest.param(n, marks=pytest.mark.xdist_group(n)) for n in DETECTORS])
def detector(request):
    generator = torch.Generator().manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = randomised(get_model(request.param, **SMALL, **DETECTORS[request.param]))
    for name, module in model.named_modules():
        if name.endswith("bbox_pred"):
            module.weight.data.mul_(0.01)  # boxes grow with the exponential of what it gives
        if isinstance(module, FrozenBatchNorm2d):
            for buffer in module.buffers():
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    images = [torch.rand(3, 60, 70, generator=generator).double(), torch.rand(3, 64, 64, generator=generator).double()]
    targets = [
        {
            "boxes": torch.tensor([[4.0, 6, 40, 50], [20, 10, 60, 55]]).double(),
            "labels": torch.tensor([1, 3]),
            "masks": torch.randint(0, 2, (2, *image.shape[1:]), generator=generator, dtype=torch.uint8),
        }
        for image in images
    ]
    model = model.double().eval()
    return request.param, model, surgery.trace(model, (images, targets)), (images, targets)


def raw(module, inputs):
    """What the heads give: detections may change order where scores are equal."""
    module = copy.deepcopy(module).eval()
    outputs = []
    for name, part in module.named_modules():
        if name in ("head", "rpn.head", "roi_heads.box_predictor", "roi_heads.mask_predictor"):
            part.register_forward_hook(lambda m, i, o: outputs.extend(torch.utils._pytree.tree_leaves(o)))
    with torch.no_grad():
        module(*copy.deepcopy(inputs))
    return outputs


def agree(a, b, inputs):
    pairs = list(zip(raw(a, inputs), raw(b, inputs), strict=True))
    assert all(len(y) > 0 for _, y in pairs)
    assert all((x - y).abs().max() <= EXACT * y.abs().max() for x, y in pairs)
    assert surgery.verify(a, b, inputs, train=True, seed=2).max_rel <= EXACT


def test_a_traced_detector_detects_and_loses_what_the_model_does(detector):
    _, model, traced, inputs = detector
    assert list(traced.state_dict()) == list(model.state_dict())
    for train in (False, True):
        assert surgery.verify(traced, model, inputs, train=train, seed=2).max_abs == 0.0
    torch.manual_seed(0)
    losses = copy.deepcopy(traced).train()(*copy.deepcopy(inputs))
    sum(losses.values()).backward()


def test_only_a_detectors_ends_are_left_alone(detector):
    name, _, traced, _ = detector
    left = [g for g in surgery.dimension_groups(traced) if g.reason]
    assert {m.layer for g in left for m in g.members if m.role == "producer"} == ENDS[name]
    assert len([g for g in left if g.name.startswith("input of")]) == 1
    members = {m.name for g in surgery.dimension_groups(traced) for m in g.members}
    assert {n for n, _ in traced.named_parameters()} <= members


def test_a_detector_holds_the_oracle_in_both_modes(detector):
    _, _, traced, inputs = detector
    index = {g.name: g.permutation(1) for g in surgery.dimension_groups(traced) if g.editable}
    agree(surgery.reindex(traced, index), traced, inputs)
    wide = surgery.widen(traced, dict.fromkeys(list(index)[::3], 2.0))
    agree(wide, traced, inputs)
    slim = surgery.slim(traced, 0.5)
    agree(slim, surgery.masked(traced, surgery.split_masks(traced, 0.5)), inputs)
    assert sum(p.numel() for p in slim.parameters()) < 0.4 * sum(p.numel() for p in traced.parameters())


def test_a_detector_is_deepened_inside_its_parts(detector):
    name, _, traced, inputs = detector
    deep = surgery.deepen(traced, PLACES[name])
    assert len(list(deep.modules())) >= len(list(traced.modules())) + 2 * len(PLACES[name])
    pairs = zip(raw(deep, inputs), raw(traced, inputs), strict=True)
    assert all((x - y).abs().max() <= EXACT * y.abs().max() for x, y in pairs)


def test_a_detector_is_saved_and_rebuilt(tmp_path):
    source = "torchvision:ssdlite320_mobilenet_v3_large?num_classes=4"
    model = surgery.models.build(source, seed=0).eval()
    images = [torch.rand(3, 50, 60), torch.rand(3, 64, 64)]
    slim = surgery.slim(surgery.trace(model, images, source=source), 0.5)
    again = surgery.load(surgery.save(slim, tmp_path / "slim"))
    assert surgery.verify(again, slim, images).max_abs == 0.0


def test_outputs_that_are_empty_prove_nothing():
    model = get_model("ssdlite320_mobilenet_v3_large", weights=None, weights_backbone=None, score_thresh=1.0).eval()
    check = surgery.verify(model, model, ([torch.rand(3, 64, 64)],))
    assert not check.ok
    with pytest.raises(surgery.VerificationError, match="the outputs are empty"):
        check.raise_if_different()


def test_a_model_with_parts_counts_as_traced_and_asking_changes_nothing():
    model = Linked()
    before = dict(model.__dict__)
    assert not is_traced(model)
    with pytest.raises(UsageError, match=r"Linked is not a traced module: pass it through surgery.trace first"):
        surgery.recipe(model)
    assert model.__dict__ == before
    assert is_traced(surgery.trace(model.double(), X))


class _Moves(nn.Module):
    """Python that looks at values, and moves what it is given."""

    def __init__(self, move):
        super().__init__()
        self.write, self.read, self.move = nn.Conv2d(4, 6, 1), nn.Conv2d(6, 3, 1), move

    def forward(self, x):
        y = self.write(x)
        return self.read(self.move(y + 1 if x.abs().max() > 1e9 else y))


WHOLE_AT_SIX_CHANNELS = {
    "shuffle": lambda y: nn.functional.channel_shuffle(y, 6),
    "shuffle by a layer": nn.ChannelShuffle(6),
    "roll": lambda y: y.roll(6, 1),
    "roll back": lambda y: torch.roll(y, (-12,), (1,)),
    "first": lambda y: y[:, :6],
    "more than there are": lambda y: y[:, :8],
    "last": lambda y: y[:, -6:],
    "more than there are from the end": lambda y: y[:, -7:],
    "size of another axis": lambda y: y[:, : y.shape[2]],
    "narrow": lambda y: y.narrow(1, 0, 6),
    "split": lambda y: y.split(6, 1)[0],
    "split in sizes": lambda y: y.split([6], 1)[0],
    "split at": lambda y: y.tensor_split([6], 1)[0],
}
WHOLE_AT_ANY_SIZE = {
    "roll of positions": lambda y: y.roll(6, -1),
    "its own size": lambda y: y[:, : y.shape[1]],
    "positions": lambda y: y[:, :, :3],
    "all there are": lambda y: y[:, : sys.maxsize],
    "one chunk": lambda y: y.chunk(1, 1)[0],
    "transposed twice": lambda y: y.permute(0, 2, 3, 1).transpose(1, 3).transpose(2, 3),
    "shuffle of one group": lambda y: nn.functional.channel_shuffle(y, 1),
}


@pytest.mark.filterwarnings("ignore::surgery.errors.NothingChangedWarning")
@pytest.mark.parametrize("name", [*WHOLE_AT_SIX_CHANNELS, *WHOLE_AT_ANY_SIZE])
def test_what_changes_nothing_at_this_size_alone_is_left_alone(name):
    net = _Moves({**WHOLE_AT_SIX_CHANNELS, **WHOLE_AT_ANY_SIZE}[name]).double()
    traced = surgery.trace(net, X)
    assert groups_of(traced)["write"].editable is (name in WHOLE_AT_ANY_SIZE)
    slim, masked = surgery.slim(traced, 0.5), surgery.masked(traced, surgery.split_masks(traced, 0.5))
    pairs = [(slim, masked), *((surgery.widen(traced, factor), traced) for factor in (1.5, 2.0))]
    for edited, reference in pairs:
        assert surgery.verify(edited, reference, X, train=True).max_rel <= EXACT


NEXT_TO_ONE = {
    "stack": lambda one, y: torch.stack([one, y], 2).sum(2),
    "stack in front": lambda one, y: torch.stack([one, y], 1).sum(1),
    "cat of positions": lambda one, y: torch.cat([one, y], 2),
    "cat of images": lambda one, y: torch.cat([one, y], 0).mean(0, keepdim=True),
    "rows": lambda one, y: torch.vstack([one, y]).mean(0, keepdim=True),
    "columns": lambda one, y: torch.cat([one.flatten(2), y.flatten(2)], -1)[..., None],
}
SPREADS = {
    "sum": lambda one, y: one + y,
    "choice": lambda one, y: torch.where(one > 0, y, 2 * y),
}


class _NextToOne(nn.Module):
    """A single channel that was written, and one axis of size 1 that holds no channels."""

    def __init__(self, join, traced):
        super().__init__()
        self.join, self.traced = join, traced
        self.write, self.read = nn.Conv2d(6, 1, 1), nn.Conv2d(1, 2, 1)

    def forward(self, x):
        y, one = self.write(x), x.mean(1, keepdim=True)
        if not self.traced and x.abs().max() > 1e9:
            y = y + 1
        return self.read(self.join(one, y))


@pytest.mark.filterwarnings("ignore::surgery.errors.NothingChangedWarning")
@pytest.mark.parametrize("traced", [True, False])
@pytest.mark.parametrize("name", [*NEXT_TO_ONE, *SPREADS])
def test_a_channel_next_to_one_number_stays_one_unless_that_is_spread(name, traced):
    net = _NextToOne({**NEXT_TO_ONE, **SPREADS}[name], traced).double()
    x = torch.randn(2, 6, 4, 4, dtype=torch.float64)
    module = surgery.trace(net, x)
    wide = surgery.widen(module, 2.0)
    assert wide.write.out_channels == (2 if name in SPREADS else 1)
    assert surgery.verify(wide, net, x, train=True).max_rel <= EXACT
