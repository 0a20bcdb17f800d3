import gc
import json

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from surgery.deploy import benchmark as benchmark_file
from surgery.deploy import memory as memory_file
from surgery.deploy import runners
from surgery.deploy.benchmark import benchmark, compare
from surgery.deploy.cost import cost
from surgery.deploy.environment import environment
from surgery.deploy.export import export_onnx
from surgery.deploy.runners import RUNTIMES, Runner
from surgery.errors import UsageError
from surgery.graph.tracing import trace

QUICK = {"warmup": 0.0, "min_runs": 5, "min_seconds": 0.0, "memory": False, "threads": 1}


def small():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5))


def small_input(batch=1):
    return torch.randn(batch, 3, 6, 6)


@pytest.fixture(scope="module")
def small_onnx(tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "small.onnx"
    export_onnx(small(), path, example_inputs=small_input())
    return path


class SimulatedMachine:
    """A clock that only queries move, so that tests of what is made of time measure none."""

    def __init__(self, monkeypatch):
        self.now_ms = 0.0
        self.asked = []
        self.latencies = {}
        monkeypatch.setattr(benchmark_file.time, "perf_counter_ns", lambda: round(self.now_ms * 1e6))
        monkeypatch.setattr(benchmark_file.time, "perf_counter", lambda: self.now_ms / 1e3)
        monkeypatch.setitem(RUNTIMES, "simulated", lambda job, stack: self.runner(job.candidate))

    def runner(self, name):
        def run():
            self.asked.append(name)
            self.now_ms += self.latencies[name](len(self.asked))

        return Runner(run, lambda: 0, ((1, 3),), None, None, None)

    def compare(self, latencies, **options):
        self.latencies = latencies
        return compare({name: name for name in latencies}, runtime="simulated", **{**QUICK, **options})

    def benchmark(self, latency, **options):
        self.latencies = {"a": latency}
        return benchmark("a", runtime="simulated", **{**QUICK, **options})


@pytest.fixture
def machine(monkeypatch):
    return SimulatedMachine(monkeypatch)


@pytest.mark.parametrize("runtime", ["onnxruntime", "torch"])
def test_every_figure_follows_from_the_samples_that_are_kept(runtime):
    result = benchmark(small(), runtime=runtime, example_inputs=small_input(), batch_size=2, **QUICK)
    times = np.array(result.samples_ms)
    assert len(times) == 5
    assert (times > 0).all()
    assert (result.runtime, result.device, result.threads, result.batch_size) == (runtime, "cpu", 1, 2)
    assert result.input_shapes == ((2, 3, 6, 6),)
    assert (result.p50_ms, result.min_ms) == (np.median(times), times.min())
    assert [result.p90_ms, result.p95_ms, result.p99_ms] == np.percentile(times, [90, 95, 99]).tolist()
    assert result.iqr_ms == pytest.approx(np.percentile(times, 75) - np.percentile(times, 25))
    assert result.mean_ms == pytest.approx(times.mean())
    assert result.throughput == pytest.approx(5 * 2 / (times.sum() / 1e3))


@pytest.mark.parametrize("runtime", ["onnxruntime", "torch"])
def test_what_is_derived_is_what_cost_counts(runtime):
    result = benchmark(small(), runtime=runtime, example_inputs=small_input(), batch_size=3, **QUICK)
    counted = cost(small(), small_input())
    assert (result.macs, result.params) == (counted.macs, counted.params)


def test_the_result_is_plain_json_data_with_its_environment():
    result = benchmark(trace(small(), small_input()), **QUICK)
    data = json.loads(json.dumps(result.to_dict()))
    assert data["p99_ms"] == result.p99_ms
    assert data["samples_ms"] == list(result.samples_ms)
    assert data["environment"]["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert data["environment"]["cpu_cores_usable"] >= 1


def test_a_traced_module_brings_its_own_inputs():
    result = benchmark(trace(small(), small_input(4)), runtime="torch", batch_size=2, **QUICK)
    assert result.input_shapes == ((2, 3, 6, 6),)


def test_an_onnx_file_brings_its_own_inputs_size_macs_and_parameters(small_onnx):
    result = benchmark(small_onnx, batch_size=3, **QUICK)
    assert result.input_shapes == ((3, 3, 6, 6),)
    assert result.file_bytes == small_onnx.stat().st_size
    assert result.macs == cost(small(), small_input()).macs
    assert result.params == sum(p.numel() for p in small().parameters())


def onnx_file(path, shape, element=onnx.TensorProto.FLOAT):
    """A file of other make: y = x * w, with 6 weights and a constant that is none."""
    weights = onnx.numpy_helper.from_array(np.ones((2, 3), np.float32), "w")
    constant = onnx.numpy_helper.from_array(np.zeros(7, np.int64), "c")
    cast = onnx.helper.make_node("Cast", ["x"], ["f"], to=onnx.TensorProto.FLOAT)
    product = onnx.helper.make_node("MatMul", ["f", "w"], ["y"])
    graph = onnx.helper.make_graph(
        [cast, product],
        "other",
        [onnx.helper.make_tensor_value_info("x", element, shape)],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [weights, constant],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, path)
    return path


def test_of_an_onnx_file_of_other_make_the_macs_are_unknown_and_the_weights_are_counted(tmp_path):
    result = benchmark(onnx_file(tmp_path / "other.onnx", ["n", 2]), batch_size=4, **QUICK)
    assert (result.macs, result.params) == (None, 6)
    assert result.input_shapes == ((4, 2),)


def test_integer_inputs_of_an_onnx_file_are_made_up_too(tmp_path):
    path = onnx_file(tmp_path / "other.onnx", ["n", 2], onnx.TensorProto.INT64)
    assert benchmark(path, **QUICK).input_shapes == ((1, 2),)


def test_an_onnx_file_with_open_sizes_says_that_it_needs_example_inputs(tmp_path):
    path = onnx_file(tmp_path / "other.onnx", ["n", "tokens", 2])
    with pytest.raises(UsageError, match=r"input 'x' has open sizes, \['n', 'tokens', 2\]: example_inputs"):
        benchmark(path, **QUICK)
    result = benchmark(path, example_inputs=torch.randn(1, 7, 2), batch_size=2, **QUICK)
    assert result.input_shapes == ((2, 7, 2),)


def test_an_onnx_file_of_a_fixed_batch_is_not_measured_at_another(tmp_path):
    path = onnx_file(tmp_path / "other.onnx", [2, 2])
    with pytest.raises(UsageError, match="fixed at batch 2; 1 was asked for"):
        benchmark(path, **QUICK)


def test_external_weights_count_towards_the_file_size(tmp_path):
    path = onnx_file(tmp_path / "other.onnx", ["n", 2])
    model = onnx.load(path)
    onnx.save(model, path, save_as_external_data=True, location="other.data", size_threshold=0)
    assert benchmark(path, **QUICK).file_bytes == path.stat().st_size + (tmp_path / "other.data").stat().st_size


@pytest.mark.parametrize("runtime", ["onnxruntime", "torch"])
def test_neither_the_module_nor_the_process_is_changed(runtime):
    model, x = small().train(), small_input(2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    threads = torch.get_num_threads()
    benchmark(model, runtime=runtime, example_inputs=x, **{**QUICK, "threads": threads + 1})
    assert torch.get_num_threads() == threads
    assert gc.isenabled()
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


class Noisy(nn.Module):
    def forward(self, x):
        return x + torch.rand(3)


@pytest.mark.parametrize("runtime", ["onnxruntime", "torch"])
def test_a_module_that_draws_random_numbers_draws_none_of_the_callers(runtime):
    x = torch.randn(2, 3)
    before = torch.get_rng_state()
    benchmark(Noisy(), runtime=runtime, example_inputs=x, **QUICK)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("runtime", ["onnxruntime", "torch"])
def test_peak_memory_covers_the_weights(runtime):
    model = nn.Sequential(nn.Linear(2048, 4096), nn.Linear(4096, 1024))  # 48 MiB
    options = {**QUICK, "memory": True}
    result = benchmark(model, runtime=runtime, example_inputs=torch.randn(1, 2048), **options)
    assert 48 * 2**20 <= result.peak_memory_bytes < 6 * 48 * 2**20


def test_peak_memory_that_cannot_be_measured_is_none_with_the_reason():
    model = nn.Sequential(nn.Linear(3, 3))
    model.register_forward_hook(lambda module, args, output: None)  # a lambda cannot be pickled
    result = benchmark(model, runtime="torch", example_inputs=torch.randn(1, 3), **{**QUICK, "memory": True})
    assert result.peak_memory_bytes is None
    assert "the module cannot be sent there" in " ".join(result.notes)


def test_peak_memory_is_reported_missing_where_the_system_keeps_no_high_water_mark(small_onnx, tmp_path, monkeypatch):
    monkeypatch.setattr(memory_file, "_STATUS", tmp_path / "no-such-file")
    result = benchmark(small_onnx, **{**QUICK, "memory": True})
    assert result.peak_memory_bytes is None
    assert "high-water mark" in " ".join(result.notes)


def test_all_usable_cores_are_the_default_and_are_reported(small_onnx):
    options = {name: value for name, value in QUICK.items() if name != "threads"}
    assert benchmark(small_onnx, **options).threads == environment().cpu_cores_usable


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("runtime", ["onnxruntime", "torch"])
def test_without_a_gpu_nothing_is_measured_on_one(runtime):
    with pytest.raises(UsageError, match="no GPU"):
        benchmark(small(), runtime=runtime, example_inputs=small_input(), device="cuda", **QUICK)


def test_without_the_cuda_provider_nothing_is_measured_in_its_place(small_onnx, monkeypatch):
    monkeypatch.setattr(runners.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(runners.torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(runners.onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(UsageError, match="no CUDAExecutionProvider: the installed onnxruntime has only CPUExec"):
        benchmark(small_onnx, device="cuda", **QUICK)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runtime": "onnxruntimes"}, "unknown runtime 'onnxruntimes'; did you mean 'onnxruntime'"),
        ({"device": "cudas"}, "unknown device 'cudas'; did you mean 'cuda'"),
        ({"batch_size": 0}, "batch_size must be at least 1, not 0"),
        ({"threads": 0}, "threads must be at least 1, not 0"),
        ({"min_runs": 0}, "min_runs must be at least 1, not 0"),
        ({"example_inputs": torch.randn(1, 3, 9, 9)}, r"cannot be run on these inputs \(\(1, 3, 9, 9\)\)"),
        ({"example_inputs": torch.randn(1, 3, 9, 9), "runtime": "torch"}, "cannot be run on these inputs"),
    ],
)
def test_bad_options_are_refused_in_one_line(options, message):
    with pytest.raises(UsageError, match=message) as caught:
        benchmark(small(), **{**QUICK, "example_inputs": small_input(), **options})
    assert "\n" not in str(caught.value)


def test_files_that_are_no_models_are_refused(tmp_path, small_onnx):
    text = tmp_path / "text.onnx"
    text.write_text("not a model")
    with pytest.raises(UsageError, match="cannot read"):
        benchmark(tmp_path / "missing.onnx", **QUICK)
    with pytest.raises(UsageError, match="is not an ONNX model"):
        benchmark(text, **QUICK)
    with pytest.raises(UsageError, match="the torch runtime takes a module"):
        benchmark(small_onnx, runtime="torch", **QUICK)
    with pytest.raises(UsageError, match=r"inputs \(\(1, 3, 9, 9\),\)"):
        benchmark(small_onnx, example_inputs=torch.randn(1, 3, 9, 9), **QUICK)
    with pytest.raises(UsageError, match="has 1 inputs, but 2 tensors"):
        benchmark(small_onnx, example_inputs=(small_input(), small_input()), **QUICK)


def test_nothing_is_left_in_the_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(runners.tempfile, "tempdir", str(tmp_path))
    benchmark(small(), example_inputs=small_input(), **{**QUICK, "memory": True})
    assert list(tmp_path.iterdir()) == []


def test_measuring_goes_on_until_both_the_runs_and_the_seconds_are_reached(machine):
    assert len(machine.benchmark(lambda n: 10.0, min_runs=5, min_seconds=0.2).samples_ms) == 20
    assert len(machine.benchmark(lambda n: 10.0, min_runs=30, min_seconds=0.2).samples_ms) == 30


def test_warming_up_ends_when_two_windows_agree_and_its_runs_are_not_counted(machine):
    result = machine.benchmark(lambda n: 100.0 if n <= 5 else 50.0 if n <= 10 else 10.0, warmup=60.0)
    assert (result.warmup_runs, result.warmup_settled) == (20, True)
    assert set(result.samples_ms) == {10.0}
    assert result.notes == ()


def test_a_warm_up_that_never_settles_ends_in_time_and_is_noted(machine):
    result = machine.benchmark(lambda n: 1.1**n, warmup=1.0)
    assert not result.warmup_settled
    assert sum(1.1**n for n in range(1, result.warmup_runs)) < 1000
    assert "still settling" in result.notes[0]


def test_a_wide_spread_is_noted(machine):
    result = machine.benchmark(lambda n: 10.0 if n % 2 else 12.0, warmup=60.0, min_runs=50)
    assert "noisy: the interquartile range is 18% of the median" in result.notes


def test_candidates_take_turns_in_an_order_that_changes(machine):
    machine.compare({"a": lambda n: 1.0, "b": lambda n: 2.0, "c": lambda n: 3.0}, min_runs=40)
    rounds = [tuple(machine.asked[i : i + 3]) for i in range(0, len(machine.asked), 3)]
    assert len(rounds) == 40
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len(set(rounds)) == 6


def test_the_ratio_is_that_of_the_medians_to_the_first(machine):
    noise = np.random.default_rng(3)
    found = machine.compare(
        {"dense": lambda n: 4.0 + noise.exponential(), "slim": lambda n: 2.0 + noise.exponential()}, min_runs=200
    )
    assert found.baseline == "dense"
    assert list(found.ratios) == ["slim"]
    ratio = found.ratios["slim"]
    assert ratio.value == found.results["slim"].p50_ms / found.results["dense"].p50_ms
    assert 0.5 < ratio.low < ratio.value < ratio.high < 0.7
    assert ratio.confidence == 0.95
    assert json.loads(json.dumps(found.to_dict()))["ratios"]["slim"]["low"] == ratio.low


def test_a_model_against_itself_has_a_ratio_interval_that_contains_1(machine):
    """Also on a machine that slows down for a while, again and again: 9 times in 10 at least, as 95% would have it."""
    noise = np.random.default_rng(4)

    def latency(n):
        return (10.0 if n // 40 % 2 else 13.0) + noise.gamma(2.0)

    ratios = [machine.compare({"a": latency, "b": latency}, min_runs=200, seed=seed).ratios["b"] for seed in range(20)]
    assert sum(ratio.low <= 1 <= ratio.high for ratio in ratios) >= 18


def test_the_interval_is_wider_where_disturbances_last(machine):
    noise = np.random.default_rng(6)
    walk = np.zeros(400)
    for index in range(1, len(walk)):
        walk[index] = 0.9 * walk[index - 1] + noise.normal()
    lasting, fleeting = (
        machine.compare({"a": lambda n: 10.0, "b": lambda n, t=iter(times): 10.0 + next(t) / 10}, min_runs=400)
        for times in (walk, noise.permutation(walk))
    )
    width = [found.ratios["b"].high - found.ratios["b"].low for found in (lasting, fleeting)]
    assert width[0] > 1.5 * width[1]


def test_an_interval_of_more_confidence_is_wider(machine):
    noise = np.random.default_rng(5)
    latencies = {"a": lambda n: 1 + noise.exponential(), "b": lambda n: 1 + noise.exponential()}
    sure, surer = (machine.compare(latencies, min_runs=100, confidence=c).ratios["b"] for c in (0.5, 0.99))
    assert surer.high - surer.low > sure.high - sure.low


def test_files_and_modules_can_be_compared_in_one_run(small_onnx):
    found = compare({"file": small_onnx, "module": small()}, example_inputs=small_input(), **QUICK)
    assert list(found.results) == ["file", "module"]
    assert len(found.results["file"].samples_ms) == len(found.results["module"].samples_ms)


def test_comparing_nothing_or_with_no_confidence_is_refused(small_onnx):
    with pytest.raises(UsageError, match="nothing to measure"):
        compare({})
    with pytest.raises(UsageError, match="confidence must lie between 0 and 1, not 95"):
        compare({"a": small_onnx}, confidence=95)


def test_what_one_candidate_opened_is_closed_when_another_fails(monkeypatch):
    closed = []

    def prepare(job, stack):
        if job.candidate == "b":
            raise UsageError("b is broken")
        stack.callback(closed.append, "a")
        return Runner(lambda: None, lambda: 0, (), None, None, None)

    monkeypatch.setitem(RUNTIMES, "simulated", prepare)
    with pytest.raises(UsageError, match="b is broken"):
        compare({"a": "a", "b": "b"}, runtime="simulated", **QUICK)
    assert closed == ["a"]
