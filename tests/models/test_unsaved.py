"""What changes a function without being a step is saved right, or refused; it is never lost silently."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import fx, nn
from torch.nn.utils import parametrizations, prune
from torchvision.ops import MultiScaleRoIAlign

import surgery


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.act, self.norm = nn.Linear(6, 8), nn.ReLU(), nn.LayerNorm(8)
        self.drop, self.b = nn.Dropout(0.25), nn.Linear(8, 4)

    def forward(self, x):
        return self.b(self.drop(self.norm(self.act(self.a(x)))))


class Branching(Net):
    def forward(self, x):
        if self.training:
            return super().forward(x) * 2
        return super().forward(x)


def build(cls=Net):
    torch.manual_seed(0)
    model = cls().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.rand_like(parameter) - 0.4)
    return model


X = torch.linspace(-1, 1, 18, dtype=torch.float64).reshape(3, 6)


@pytest.fixture
def traced():
    return surgery.trace(build(), X)


def hook(module, args, output):
    return output - output.cumsum(-1)


def forward_hook(module):
    module.a.register_forward_hook(hook)


def pre_hook(module):
    module.b.register_forward_pre_hook(lambda layer, args: (args[0] * 2,))


def hook_on_the_whole(module):
    module.register_forward_hook(hook)


def parametrization(module):
    parametrizations.weight_norm(module.a)
    module.a.parametrizations.weight.original0.data *= 2


def spectral_norm(module):
    parametrizations.spectral_norm(module.a)


def pruning(module):
    prune.l1_unstructured(module.a, "weight", 0.5)


def other_activation(module):
    module.act = nn.Tanh()


def other_layer(module):
    module.b = nn.Linear(8, 4, bias=False).double()


def other_settings(module):
    module.norm.eps = 0.5


def other_dropout(module):
    module.drop.p = 0.9


def other_forward(module):
    module.act.forward = torch.tanh


def edited_graph(module):
    (call,) = (node for node in module.graph.nodes if node.target == "act")
    with module.graph.inserting_after(call):
        new = module.graph.call_function(torch.softmax, (call, -1))
    call.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    module.recompile()


def untied(module):
    module.b.weight = module.a.weight


CHANGES = [
    (forward_hook, r"'a' has the forward hooks .*hook, and had none"),
    (pre_hook, r"'b' has the forward hooks .*<lambda>, and had none"),
    (hook_on_the_whole, r"the model has the forward hooks .*hook, and had none"),
    (parametrization, r"'a' is .*ParametrizedLinear, and was torch\.nn\.modules\.linear\.Linear"),
    (spectral_norm, r"'a' is .*ParametrizedLinear"),
    (pruning, r"the tensor 'a\.weight' came or went"),
    (other_activation, r"'act' is .*Tanh, and was .*ReLU"),
    (other_layer, "the tensor 'b.bias' came or went"),
    (other_settings, r"the settings of 'norm' were .*eps=1e-05.*, and are .*eps=0\.5"),
    (other_dropout, r"the settings of 'drop' were .*p=0\.25"),
    (other_forward, "the forward of 'act' was replaced"),
    (edited_graph, "the graph of the model was changed"),
    (untied, r"the tensor 'b\.weight' changed its shape or is tied differently"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES, ids=[c.__name__ for c, _ in CHANGES])
def test_what_would_be_lost_is_refused(traced, tmp_path, change, message):
    change(traced)
    with pytest.raises(surgery.UsageError, match=message) as refused:
        surgery.save(traced, tmp_path / "net")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "net").exists()


@pytest.mark.parametrize("change", [forward_hook, other_settings, edited_graph])
@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda m: surgery.reindex(m, {}), lambda m: surgery.apply(m, surgery.SwitchOff({}))]
)
def test_what_would_be_lost_is_refused_after_copies_and_further_steps(traced, tmp_path, change, how):
    change(traced)
    with pytest.raises(surgery.UsageError, match="is not in its recipe and would be lost"):
        surgery.save(how(traced), tmp_path / "net")


def test_an_edit_of_the_training_graph_is_refused(tmp_path):
    traced = surgery.trace(build(Branching), X)
    graph: fx.Graph = traced.train_graph
    (double,) = (node for node in graph.nodes if node.args[1:] == (2,))
    double.args = (double.args[0], 3)
    traced.recompile()
    with pytest.raises(surgery.UsageError, match="the graph of the model was changed"):
        surgery.save(traced, tmp_path / "net")


def test_what_is_undone_is_saved(traced, tmp_path):
    handle = traced.a.register_forward_hook(hook)
    wide = surgery.apply(traced, surgery.SwitchOff({}))
    handle.remove()
    surgery.save(traced, tmp_path / "net")
    with pytest.raises(surgery.UsageError, match="forward hooks"):
        surgery.save(wide, tmp_path / "wide")
    wide.a._forward_hooks.clear()
    surgery.save(wide, tmp_path / "wide")


def test_what_was_there_before_tracing_is_saved_and_asked_for(tmp_path):
    def hooked():
        model = build()
        model.a.register_forward_hook(hook)
        return model

    traced = surgery.trace(hooked(), X)
    surgery.save(traced, tmp_path / "net")
    assert torch.equal(surgery.load(tmp_path / "net", model=hooked())(X), traced(X))
    with pytest.raises(surgery.SurgeryError, match=r"the saved model has the forward hooks \{'a': .*pass model= with"):
        surgery.load(tmp_path / "net", model=build())


def test_a_part_of_a_traced_module_has_no_recipe(traced, tmp_path):
    pair = surgery.attach_hint(traced, surgery.trace(build(), X), guided="a", hint="a")
    parts = [m for m in pair.modules() if isinstance(m, fx.GraphModule)]
    for part in parts:
        with pytest.raises(surgery.UsageError, match=r"has no recipe of its own|is not a traced module"):
            surgery.save(part, tmp_path / "net")


@pytest.mark.parametrize("change", [lambda m: m.double(), lambda m: m.float(), lambda m: m.train(), copy.deepcopy,
                                    lambda m: pickle.loads(pickle.dumps(m))])  # fmt: skip
def test_what_is_saved_with_the_weights_is_no_change(traced, tmp_path, change):
    changed = change(traced)
    surgery.save(changed, tmp_path / "net")
    loaded = surgery.load(tmp_path / "net", model=build())
    x = X.to(changed.get_parameter("a.weight").dtype)
    assert loaded.training == changed.training
    assert torch.equal(loaded.eval()(x), changed.eval()(x))


def test_buffers_outside_the_state_dict_are_saved(tmp_path):
    class Scaled(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.ones(6), persistent=False)

        def forward(self, x):
            return super().forward(x * self.scale)

    traced = surgery.trace(build(Scaled), X)
    traced.get_buffer("scale").mul_(3)
    wide = surgery.widen(traced, 2.0)
    for name, module in (("net", traced), ("wide", wide)):
        surgery.save(module, tmp_path / name)
        loaded = surgery.load(tmp_path / name, model=build(Scaled))
        assert torch.equal(loaded(X), module(X))
        assert loaded.state_dict().keys() == module.state_dict().keys()


def test_held_masks_are_in_the_weights(traced, tmp_path):
    masks = surgery.magnitude_masks(traced, 0.5)
    hold = surgery.hold_masked(traced, masks)
    hold()
    surgery.save(traced, tmp_path / "net")
    assert torch.equal(surgery.load(tmp_path / "net", model=build())(X), traced(X))


class Pooled(nn.Module):
    """Its pooling works out the scales of its maps when it is first called, and keeps them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.pool = nn.Conv2d(3, 4, 1), MultiScaleRoIAlign(["0"], 2, 2)

    def forward(self, x):
        if x.min() < -1:  # decided by numbers, as in a detector: the layers are called from Python
            return x
        boxes = [image.new_tensor([[0.0, 0.0, 4.0, 4.0]]) for image in x]
        return self.pool({"0": self.a(x)}, boxes, [(8, 8)] * len(x)).flatten(1)


def test_what_a_layer_works_out_in_a_call_is_no_change(tmp_path):
    torch.manual_seed(0)
    image = torch.rand(2, 3, 8, 8)
    traced = surgery.slim(surgery.trace(Pooled().eval(), image, check=False), 0.5)
    (pool,) = (part for part in traced.modules() if isinstance(part, MultiScaleRoIAlign))
    pool.scales = pool.map_levels = None
    expected = traced(image)
    assert pool.scales is not None
    surgery.save(traced, tmp_path / "net")
    assert torch.equal(surgery.load(tmp_path / "net", model=Pooled())(image), expected)
