import functools
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import get_model, get_model_weights

from surgery import models as catalogue
from surgery.counting.cost import cost
from surgery.errors import UsageError
from surgery.graph.tracing import trace


@pytest.mark.parametrize(
    "name",
    ["alexnet", "resnet18", "densenet121", "efficientnet_b0", "mobilenet_v2", "vit_b_16", "swin_t"],
)
def test_macs_and_parameters_are_those_that_torchvision_publishes(name):
    published = get_model_weights(name)["IMAGENET1K_V1"].meta
    with torch.device("meta"):
        model = get_model(name, weights=None)
    found = cost(model, torch.empty(1, 3, 224, 224, device="meta"))
    assert found.macs / 1e9 == pytest.approx(published["_ops"], abs=0.0006)
    assert found.params == published["num_params"]


@pytest.mark.parametrize(
    "name", ["r3d_18", "mvit_v2_s", "lraspp_mobilenet_v3_large", "retinanet_resnet50_fpn", "maskrcnn_resnet50_fpn_v2"]
)
def test_macs_of_videos_maps_and_detections_are_those_that_torchvision_publishes(name):
    published = get_model_weights(name)["DEFAULT"].meta
    model = catalogue.build(catalogue.canonical(name, weights="DEFAULT"))
    found = cost(model, catalogue.example_inputs(name, batch_size=1))
    assert found.macs / 1e9 == pytest.approx(published["_ops"], abs=0.0006)
    assert found.params == published["num_params"]


def test_a_detection_model_is_counted_on_one_image_as_its_transform_resizes_it():
    model = catalogue.build("ssdlite320_mobilenet_v3_large")
    flags = {name: module.training for name, module in model.named_modules()}
    small, large = (cost(model, ([torch.rand(3, side, side)] * count,)) for side, count in ((64, 1), (500, 3)))
    assert small == large
    assert {name: module.training for name, module in model.named_modules()} == flags


def test_a_box_head_is_counted_on_a_thousand_regions():
    model = catalogue.build("fasterrcnn_mobilenet_v3_large_320_fpn?min_size=64")
    images = ([torch.rand(3, 64, 64)],)
    before = cost(model, images).macs
    model.roi_heads.box_predictor.cls_score = nn.Linear(1024, 191)
    assert cost(model, images).macs - before == 1000 * 1024 * 100


def test_both_images_of_a_pair_are_counted():
    model = catalogue.build("raft_small")
    first, second = catalogue.example_inputs("raft_small", image_size=128)
    encoder = cost(model.feature_encoder, first).macs
    with_encoder = cost(model, (first, second)).macs
    model.feature_encoder.layer1 = nn.Identity()
    assert with_encoder - cost(model, (first, second)).macs == 2 * (encoder - cost(model.feature_encoder, first).macs)


@pytest.mark.parametrize("name", ["vit_b_32", "swin_t"])
def test_attention_built_of_plain_functions_costs_what_the_layer_costs(name):
    with torch.device("meta"):
        model = get_model(name, weights=None)
    image = torch.empty(1, 3, 224, 224, device="meta")
    expected = cost(model, image)
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.forward = functools.partial(attention_of_plain_functions, module)
    assert cost(model, image) == expected


def attention_of_plain_functions(layer, x, *_, **__):
    """Self-attention (N, S, E) by `F.linear` and matrix products, as rewritten graphs have it."""
    q, k, v = F.linear(x, layer.in_proj_weight, layer.in_proj_bias).chunk(3, -1)
    q, k, v = (t.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    weights = torch.softmax(q @ k.transpose(-1, -2), -1)
    return layer.out_proj((weights @ v).transpose(1, 2).flatten(2)), None


def test_a_grouped_convolution_costs_its_weights_once_per_output_position():
    conv = nn.Conv2d(8, 12, (3, 5), stride=2, padding=(1, 2), groups=4)
    assert cost(conv, torch.randn(1, 8, 10, 14)).macs == conv.weight.numel() * 5 * 7


def test_macs_are_of_one_sample_whatever_the_batch():
    layer = nn.Linear(6, 4)
    assert cost(layer, torch.randn(7, 6)) == cost(layer, torch.randn(1, 6))
    assert cost(layer, torch.randn(7, 6)).macs == 24


def test_attention_is_counted_also_where_torch_would_take_its_fused_kernel():
    attention = nn.MultiheadAttention(8, 2, batch_first=True).requires_grad_(False)
    x = torch.randn(1, 5, 8)
    projections, products = 4 * 5 * 8 * 8, 2 * 5 * 5 * 8
    assert cost(attention, (x, x, x), kwargs={"need_weights": False}).macs == projections + products
    assert torch.backends.mha.get_fastpath_enabled()


class HeadWhileTraining(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten())
        self.head = nn.LazyLinear(5)
        self.aux = nn.LazyLinear(500)

    def forward(self, x):
        x = self.body(x)
        return (self.head(x), self.aux(x)) if self.training else self.head(x)


def test_what_runs_in_training_only_costs_no_macs_but_has_parameters():
    model = HeadWhileTraining()
    model(torch.randn(2, 3, 6, 6))
    found = cost(model, torch.randn(2, 3, 6, 6))
    assert found.macs == 4 * 27 * 16 + 64 * 5
    assert found.params == sum(p.numel() for p in model.parameters())


def test_a_module_is_not_touched_by_counting():
    model = HeadWhileTraining()
    model(torch.randn(2, 3, 6, 6))
    model.train()
    model.aux.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    identities = {name: id(value) for name, value in [*model.named_parameters(), *model.named_buffers()]}
    random_state = torch.get_rng_state()
    cost(model, torch.randn(2, 3, 6, 6, generator=torch.Generator()))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [m.training for m in model.modules()].count(False) == 1
    assert not model.aux.training
    assert identities == {name: id(value) for name, value in [*model.named_parameters(), *model.named_buffers()]}
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


class CountsItsCalls(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.scale = torch.ones(3)

    def forward(self, x):
        self.calls += 1
        self.scale = self.scale * 2
        return x * self.scale


def test_tensors_that_forward_writes_to_stay_as_they_were():
    model = CountsItsCalls()
    cost(model, torch.randn(1, 3))
    assert model.calls.item() == 0
    assert torch.equal(model.scale, torch.ones(3))


def test_buffers_count_as_bytes_and_not_as_parameters():
    found = cost(nn.BatchNorm2d(10), torch.randn(1, 10, 2, 2))
    assert found.params == 20
    assert found.bytes == 4 * 40 + 8  # two vectors of weights, two of statistics, and the number of batches


def test_shared_weights_count_once():
    tied = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    tied[1].weight = tied[0].weight
    aliased = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    aliased[1].weight = nn.Parameter(aliased[0].weight.detach().t())
    for model in (tied, aliased):
        found = cost(model, torch.randn(1, 4))
        assert (found.macs, found.params, found.bytes) == (32, 16, 64)


def test_a_slice_of_a_larger_storage_counts_only_itself():
    layer = nn.Linear(4, 2, bias=False)
    layer.weight = nn.Parameter(torch.zeros(100, 4)[:2])
    assert cost(layer, torch.randn(1, 4)).bytes == 32


def test_a_traced_module_needs_no_inputs():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    assert cost(trace(model, torch.randn(2, 3, 8, 8))) == cost(model, torch.randn(1, 3, 8, 8))


def test_named_inputs_are_passed_by_name():
    bilinear = nn.Bilinear(3, 4, 5)
    found = cost(bilinear, kwargs={"input1": torch.randn(2, 3), "input2": torch.randn(2, 4)})
    assert found.params == 65


def test_an_untraced_module_without_inputs_is_refused():
    with pytest.raises(UsageError, match="Linear is not a traced module"):
        cost(nn.Linear(3, 3))


def test_inputs_of_a_wrong_shape_are_refused_in_one_line_with_the_shape():
    with pytest.raises(UsageError, match=r"cannot be run on these inputs \(\(1, 5\)\)") as caught:
        cost(nn.Linear(3, 3), torch.randn(2, 5))
    assert "\n" not in str(caught.value)


def test_inputs_without_a_batch_axis_are_refused():
    with pytest.raises(UsageError, match="no batch axis"):
        cost(nn.ReLU(), torch.tensor(1.0))


class KeepsPositives(nn.Module):
    def forward(self, x):
        return x[x > 0] * 2


def test_shapes_that_depend_on_values_are_refused():
    with pytest.raises(UsageError, match="cannot be run on these inputs"):
        cost(KeepsPositives(), torch.randn(2, 3))


def test_cost_is_plain_json_data():
    found = cost(nn.Linear(3, 2), torch.randn(1, 3))
    assert json.loads(json.dumps(found.to_dict())) == {"macs": 6, "params": 8, "bytes": 32}


@functools.lru_cache(maxsize=4)
def _numbered(count: int) -> torch.Tensor:
    return torch.arange(float(count))


class ReadsTables(nn.Module):
    """Gives a layer a view of a parameter, and adds what a function has kept since an earlier call."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Parameter(torch.randn(5, 4)), nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x) + self.layer(self.table.unsqueeze(0)).sum(1) + _numbered(4)


def test_views_of_parameters_and_tensors_that_were_cached_are_counted():
    net, x = ReadsTables(), torch.randn(2, 4)
    before = net(x)
    assert cost(net, x).macs == 4 * 4 + 5 * 4 * 4
    assert torch.equal(net(x), before)
    assert net.table.requires_grad
