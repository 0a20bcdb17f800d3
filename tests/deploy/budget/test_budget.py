"""Slimming to a budget: it is kept, by what the whole model takes, and what is spared does least damage."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import nn

import surgery
from surgery.deploy.budget.clock import Clock
from surgery.deploy.budget.parts import find_parts
from surgery.deploy.measure.benchmark import compare
from surgery.errors import EditError, UsageError
from surgery.training.data.data import load_data


@pytest.fixture(scope="module")
def net():
    return staged()


def staged() -> nn.Module:
    """Five stages of a convolution each, and a classifier."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        widths = [3, 64, 64, 128, 128, 256]
        stages = {
            f"layer{k}": nn.Sequential(nn.Conv2d(widths[k - 1], widths[k], 3, stride=1 + k % 2, padding=1), nn.ReLU())
            for k in range(1, 6)
        }
        model = nn.Sequential(
            OrderedDict(**stages, pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), head=nn.Linear(256, 10))
        )
    return surgery.trace(model.eval(), torch.zeros(2, 3, 32, 32))


class Device:
    """A machine with a clock of its own: time goes with MACs, but layer4 and each query cost extra; odd widths, too."""

    def __init__(self, odd: float = 1.0) -> None:
        self.odd, self.asked = odd, 0

    def ms(self, module: nn.Module) -> float:
        slow = surgery.cost(module).macs / 2e6 + sum(p.numel() for p in module.layer4.parameters()) / 5e4
        widths = [p.shape[0] for p in module.parameters() if p.ndim == 4]
        return 0.5 + slow * (self.odd if any(width % 8 for width in widths) else 1.0)

    def __call__(self, modules):
        self.asked += 1
        return {name: self.ms(module) for name, module in modules.items()}


@pytest.mark.parametrize("share", [0.7, 0.4, 0.2])
@pytest.mark.parametrize("kind", ["macs", "params", "bytes"])
def test_counts_keep_to_their_budget_and_nearly_use_it(net, kind, share):
    limit = share * getattr(surgery.cost(net), kind)
    found = surgery.slim_to_budget(net, **{kind: limit})
    assert 0.93 * limit <= getattr(surgery.cost(found.module), kind) == found.measured <= limit
    assert found.before == getattr(surgery.cost(net), kind)
    assert found.predicted == pytest.approx(found.measured, rel=0.03)
    assert found.rates
    remade = surgery.slim(net, found.rates)
    assert all(torch.equal(v, remade.state_dict()[k]) for k, v in found.module.state_dict().items())


@pytest.mark.parametrize("share", [0.6, 0.3])
def test_latency_is_measured_on_whole_models_by_the_given_timer(net, share):
    device = Device()
    limit = share * device.ms(net)
    found = surgery.slim_to_budget(net, latency_ms=limit, timer=device, by="stage")
    assert 0.9 * limit <= found.measured <= limit
    assert device.ms(found.module) == pytest.approx(found.measured)
    assert found.predicted == pytest.approx(found.measured, rel=0.1)
    assert found.measured in [trial.measured for trial in found.trials]
    assert device.asked <= 3 + 2 * len(found.trials)


def test_a_budget_is_kept_even_if_latency_is_unpredictable(net):
    def erratic(modules):
        return {name: 10 * (surgery.cost(m).params / surgery.cost(net).params) ** 0.3 for name, m in modules.items()}

    found = surgery.slim_to_budget(net, latency_ms=7.0, timer=erratic, by="stage")
    assert found.measured <= 7.0
    assert erratic({"found": found.module})["found"] == pytest.approx(found.measured)


def test_a_slow_phase_of_the_machine_does_not_cost_channels(net):
    class Busy(Device):
        """Every other time twice as slow, or a little less, for all models alike."""

        def __call__(self, modules):
            slower = 1 + (self.asked % 2) * (0.8 + 0.05 * (self.asked % 5))
            return {name: slower * ms for name, ms in super().__call__(modules).items()}

    device = Busy()
    limit = 0.5 * device.ms(net)
    found = surgery.slim_to_budget(net, latency_ms=limit, timer=device, by="stage")
    assert found.before == device.ms(net)
    assert 0.9 * limit <= device.ms(found.module) <= 1.001 * limit
    assert found.measured == pytest.approx(device.ms(found.module))


@pytest.mark.parametrize(("odd", "multiple"), [(1.0, 1), (3.0, 8)])
def test_widths_are_rounded_if_that_is_faster(net, odd, multiple):
    device = Device(odd)
    found = surgery.slim_to_budget(net, latency_ms=0.5 * device.ms(net), timer=device, by="stage")
    assert found.round_to == multiple
    assert device.ms(found.module) <= found.limit


def test_a_part_whose_weights_are_next_to_nothing_goes_first(net):
    idle = staged()
    with torch.no_grad():
        for parameter in (idle.layer3.get_submodule("0").weight, idle.layer4.get_submodule("0").weight[:, 32:]):
            parameter[32:] *= 1e-3
    limit = 0.8 * surgery.cost(net).macs
    rates = [surgery.slim_to_budget(module, macs=limit, round_to=1).rates.get("layer3.0", 1) for module in (net, idle)]
    assert rates[1] < 0.6 < 0.8 < rates[0]


def test_with_data_damage_is_the_increase_of_the_loss_on_training_images():
    data = load_data("digits", limit=64)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
                          nn.Flatten(), nn.Linear(512, 10))  # fmt: skip
    module = surgery.trace(model.eval(), torch.zeros(2, 3, 8, 8))
    with torch.no_grad():
        module.get_submodule("2").weight[4:] = 0  # what half of the second layer writes is nothing
        module.get_submodule("2").bias[4:] = 0
    before = {k: v.clone() for k, v in module.state_dict().items()}
    found = surgery.slim_to_budget(module, params=0.6 * surgery.cost(module).params, data=data)
    assert found.damage["2"][0.5] == pytest.approx(0, abs=1e-6)
    assert abs(found.damage["0"][0.5]) > 1e-6
    assert "0" not in found.rates
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def test_a_model_within_its_budget_is_copied_unchanged(net):
    found = surgery.slim_to_budget(net, macs=10**12)
    assert (found.rates, found.trials) == ({}, ())
    assert found.predicted == found.measured == found.before
    assert found.module is not net
    assert surgery.cost(found.module) == surgery.cost(net)


@pytest.mark.parametrize("kind", ["latency_ms", "macs", "params", "bytes"])
def test_a_budget_that_cannot_be_kept_is_refused_at_once_with_what_the_smallest_takes(net, kind):
    device, told = Device(), []
    smallest = surgery.slim(net, 0.25)
    takes = device.ms(smallest) if kind == "latency_ms" else getattr(surgery.cost(smallest), kind)
    limit = takes // 2 or takes / 2
    with pytest.raises(EditError) as caught:
        surgery.slim_to_budget(
            net, **{kind: limit}, by="stage", least=0.25, timer=device, progress=lambda *task: told.append(task)
        )
    unit = {"latency_ms": "ms", "macs": "MACs", "params": "parameters", "bytes": "bytes"}[kind]
    assert str(caught.value) == (
        f"no model of these widths keeps to {limit:.10g} {unit}: the smallest, 0.25 of every width, takes "
        f"{takes:.10g} {unit}; allow more, or begin with a smaller model"
    )
    assert told == []


def test_a_latency_just_below_the_smallest_models_is_refused_when_it_was_searched_for(net):
    device, told = Device(), []
    limit = 0.9 * device.ms(surgery.slim(net, 0.25))
    with pytest.raises(EditError, match=r"the smallest, 0\.25 of every width, takes [0-9.]+ ms; allow more"):
        surgery.slim_to_budget(
            net, latency_ms=limit, by="stage", least=0.25, timer=device, progress=lambda *task: told.append(task)
        )
    assert ("search", 1, 8) in told


def test_one_slow_measurement_of_the_smallest_model_does_not_refuse_a_budget(net):
    class Disturbed(Device):
        def __call__(self, modules):
            times = super().__call__(modules)
            return {name: 100 * ms for name, ms in times.items()} if self.asked == 2 else times

    device = Disturbed()
    limit = 0.5 * device.ms(net)
    assert surgery.slim_to_budget(net, latency_ms=limit, by="stage", timer=device).measured <= limit


def test_a_share_of_a_latency_is_of_the_dense_models(net):
    device = Device()
    found = surgery.slim_to_budget(net, latency_ms="60%", by="stage", timer=device)
    assert found.limit == pytest.approx(0.6 * device.ms(net)) == pytest.approx(0.6 * found.before)
    assert device.ms(found.module) <= found.limit


def test_a_budget_that_only_the_smallest_model_keeps_to_is_warned_of(net):
    class Noisy(Device):
        """All but the dense and the smallest model take longer than they should."""

        def __call__(self, modules):
            smallest = surgery.cost(surgery.slim(net, 0.25)).params
            usual = {surgery.cost(net).params, smallest}
            times = super().__call__(modules)
            return {name: ms * (1 if surgery.cost(modules[name]).params in usual else 3) for name, ms in times.items()}

    device = Noisy()
    limit = 0.6 * device.ms(net)
    with pytest.warns(surgery.BudgetWarning, match=r"only the smallest model allowed .* models? before it, .* took"):
        found = surgery.slim_to_budget(net, latency_ms=limit, by="stage", least=0.25, timer=device)
    assert surgery.cost(found.module).params == surgery.cost(surgery.slim(net, 0.25)).params


def test_progress_of_each_stage_reaches_its_end(net):
    told: dict[str, list[float]] = {}

    def progress(task, done, total):
        told.setdefault(task, []).append(done / total)

    data = load_data("digits", limit=16, image_size=32)
    device = Device()
    surgery.slim_to_budget(net, latency_ms=0.5 * device.ms(net), by="stage", data=data, timer=device, progress=progress)
    assert list(told) == ["probe", "damage", "search"]
    assert len(told["damage"]) == 15
    assert all(shares == sorted(shares) and shares[-1] == 1 for shares in told.values())


def test_every_figure_is_told_as_soon_as_it_is_known(net):
    device, told = Device(), []

    def timer(modules):
        told.append(len(told))  # a measurement: figures come after the one that they are of
        return device(modules)

    dense = device.ms(net)
    found = surgery.slim_to_budget(net, latency_ms=0.5 * dense, by="stage", timer=timer, on_figure=told.append)
    figures = [one for one in told if not isinstance(one, int)]
    assert [one.what for one in figures[:2]] == ["dense", "smallest"]
    assert (figures[0].measured, figures[0].predicted) == (dense, None)
    assert {(one.kind, one.limit) for one in figures} == {("latency_ms", 0.5 * dense)}
    assert figures[1].measured == device.ms(surgery.slim(net, 0.125))
    assert told[:4] == [0, figures[0], 2, figures[1]]
    probes = [one for one in figures if one.what == "probe"]
    assert {"stage layer3", "rate 0.5", "round 8"} <= {one.name for one in probes}
    assert {one.name: one.measured for one in probes}["rate 0.5"] == pytest.approx(device.ms(surgery.slim(net, 0.5)))
    trials = [one for one in figures if one.what == "trial"]
    assert [(one.predicted, one.measured) for one in trials] == [(t.predicted, t.measured) for t in found.trials]
    assert figures == [*figures[:2], *probes, *trials]


def test_a_model_that_is_timed_again_is_exported_once(monkeypatch):
    exported = []

    def export(module, path, **options):
        exported.append(module)
        return surgery.export_onnx(module, path, **options)

    monkeypatch.setattr("surgery.deploy.measure.onnx_runtimes.export_onnx", export)
    brief = {"min_seconds": 0, "warmup": 0.01, "min_runs": 5}
    monkeypatch.setattr("surgery.deploy.budget.clock.compare", lambda models, **o: compare(models, **{**o, **brief}))
    wide, thin = (surgery.trace(nn.Linear(4, n).eval(), torch.zeros(2, 4)) for n in (64, 2))
    clock = Clock(surgery.TimingSettings(threads=1))
    with clock.ready(wide) as kept:
        for _ in range(2):
            assert set(clock.times({"wide": kept, "thin": thin})) == {"wide", "thin"}
    assert exported == [wide, thin, thin]


def test_setting_models_up_counts_for_progress(monkeypatch):
    brief = {"min_seconds": 0, "warmup": 0.01, "memory": False, "min_runs": 5}
    monkeypatch.setattr(
        "surgery.deploy.budget.clock.compare", lambda files, **given: compare(files, **{**given, **brief})
    )
    small = surgery.trace(nn.Linear(4, 2).eval(), torch.zeros(2, 4))
    told = []
    times = Clock(surgery.TimingSettings(runtime="torch", threads=1)).times(
        {str(k): small for k in range(8)}, lambda _, done, total: told.append((done, total))
    )
    assert set(times) == set(map(str, range(8)))
    assert told == [
        (done, 11) for done in range(1, 12)
    ]  # seven models and the timing; the first again, one, the timing


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one budget, of latency_ms, macs, params, bytes, not 0"),
        ({"macs": 1e6, "params": 1e6}, "give one budget, of latency_ms, macs, params, bytes, not 2"),
        ({"macs": 0}, "macs is 0: it must be above 0"),
        ({"macs": 1e6, "least": 1.5}, "least must be a number above 0 and at most 1, not 1.5"),
        ({"macs": 1e6, "tolerance": 0.0}, "tolerance must be a number above 0 and at most 1, not 0.0"),
        ({"macs": 1e6, "rounds": 0}, "rounds must be a whole number of at least 1, not 0"),
        ({"macs": 1e6, "by": "layer"}, "unknown kind of part 'layer'"),
        ({"macs": 1e6, "importance": "size"}, "unknown importance 'size'"),
    ],
)
def test_settings_out_of_range_are_refused(net, options, message):
    with pytest.raises(UsageError) as caught:
        surgery.slim_to_budget(net, **options)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("resnet18", ["conv1", "layer1", "layer2", "layer3", "layer4"]),
        ("squeezenet1_1", ["features.0", *(f"features.{k}" for k in (3, 4, 6, 7, 9, 10, 11, 12))]),
        ("vgg11", ["features.0", *(f"features.{k}" for k in (3, 6, 8, 11, 13, 16, 18)), "classifier"]),
    ],
)
def test_stages_are_the_outermost_level_with_several_containers(source, expected):
    with torch.device("meta"):
        model = surgery.models.build(source)
    module = surgery.trace(model.eval(), torch.zeros(2, 3, 224, 224, device="meta"))
    found = find_parts(module, "stage")
    assert list(found) == expected
    assert sum(map(len, found.values())) == len(find_parts(module, "group"))


def test_a_model_without_channels_to_choose_is_refused():
    module = surgery.trace(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), torch.zeros(2, 3, 2, 2))
    with pytest.raises(EditError, match="no dimension group of the model can be edited"):
        surgery.slim_to_budget(module, macs=1)


@pytest.mark.parametrize("kind", ["params", "macs"])
def test_a_fitted_model_keeps_to_its_budget_with_the_biases_that_it_gets(kind):
    torch.manual_seed(0)
    sizes = [(3, 12), (12, 12), (12, 12)]
    layers = [layer for i, o in sizes for layer in (nn.Conv2d(i, o, 3, padding=1, bias=False), nn.ReLU())]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4))
    net = surgery.trace(model.double().eval(), torch.zeros(2, 3, 8, 8, dtype=torch.float64))
    images = torch.randn(80, 3, 8, 8, dtype=torch.float64)
    limit = 0.5 * getattr(surgery.cost(net), kind)
    carved = surgery.slim_to_budget(net, **{kind: limit}, tolerance=0.01)
    fitted = surgery.slim_to_budget(net, **{kind: limit}, tolerance=0.01, calibration=images[:64])
    step = surgery.recipe(fitted.module).steps[-1]
    assert isinstance(step, surgery.Compensate)
    assert step.biases
    assert getattr(surgery.cost(fitted.module), kind) == fitted.measured <= limit
    test = images[64:]
    apart = [float((found.module(test) - net(test)).detach().norm()) for found in (carved, fitted)]
    assert apart[1] < 0.5 * apart[0]
