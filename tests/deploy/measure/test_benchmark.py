import gc
import json
import math
import os

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from surgery.counting.cost import cost
from surgery.deploy.measure import environment as environment_file
from surgery.deploy.measure import memory as memory_file
from surgery.deploy.measure import onnx_runtimes
from surgery.deploy.measure import timing as timing_file
from surgery.deploy.measure.benchmark import Comparison, Ratio, benchmark, compare, sweep
from surgery.deploy.measure.environment import environment
from surgery.deploy.measure.jobs import Runner
from surgery.deploy.measure.memory import Peak
from surgery.deploy.measure.runners import RUNTIMES
from surgery.deploy.onnx.export import export_onnx
from surgery.errors import UsageError
from surgery.graph.tracing import trace

QUICK = {"warmup": 0.0, "min_runs": 5, "min_seconds": 0.0, "sessions": 1, "memory": False, "threads": 1}


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
    """A clock that only queries move, so that tests of what is made of time measure none.

    A latency is a function of how many queries there were, in ms. What is set up is noted with a star.
    """

    def __init__(self, monkeypatch):
        self.now_ms = 0.0
        self.count = 0
        self.asked = []
        self.latencies = {}
        self.setup_effect = lambda: 1.0
        monkeypatch.setattr(timing_file.time, "perf_counter_ns", lambda: round(self.now_ms * 1e6))
        monkeypatch.setattr(timing_file.time, "perf_counter", lambda: self.now_ms / 1e3)
        monkeypatch.setitem(RUNTIMES, "torch", lambda job, stack: self.runner(job.candidate))

    @property
    def queries(self):
        return [name for name in self.asked if not name.startswith("*")]

    def runner(self, name):
        def start():
            self.asked.append(f"*{name}")
            effect = self.setup_effect()

            def run():
                self.asked.append(name)
                self.count += 1
                self.now_ms += effect * self.latencies[name](self.count)

            return run

        return Runner(start, lambda: Peak(0), ((1, 3),), None, None, None)

    def compare(self, latencies, **options):
        self.latencies = latencies
        names = {name: name for name in latencies}
        return compare(names, runtime="torch", **{**QUICK, "check": False, **options})

    def benchmark(self, latency, **options):
        self.latencies = {"a": latency}
        return benchmark("a", runtime="torch", **{**QUICK, **options})


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
@pytest.mark.parametrize("runtime", list(RUNTIMES))
def test_without_a_gpu_nothing_is_measured_on_one(runtime):
    with pytest.raises(UsageError, match="no GPU"):
        benchmark(small(), runtime=runtime, example_inputs=small_input(), device="cuda", **QUICK)


def test_without_the_cuda_provider_nothing_is_measured_in_its_place(small_onnx, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(onnx_runtimes.onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(UsageError, match="no CUDAExecutionProvider: the installed onnxruntime has only CPUExec"):
        benchmark(small_onnx, device="cuda", **QUICK)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runtime": "onnxruntimes"}, "unknown runtime 'onnxruntimes'; did you mean 'onnxruntime'"),
        ({"device": "cudas"}, "unknown device 'cudas'; did you mean 'cuda'"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, not 0"),
        ({"threads": 0}, "threads must be a whole number of at least 1, not 0"),
        ({"min_runs": 0}, "min_runs must be a whole number of at least 1, not 0"),
        ({"sessions": 0}, "sessions must be a whole number of at least 1, not 0"),
        ({"min_seconds": -1.0}, "min_seconds must be a number of at least 0, not -1.0"),
        ({"min_seconds": math.nan}, "min_seconds must be a number of at least 0, not nan"),
        ({"min_seconds": math.inf}, "min_seconds must be a number of at least 0, not inf"),
        ({"runtime": "torch-cuda-graphs"}, "the torch-cuda-graphs runtime needs a GPU: give it device 'cuda'"),
        ({"runtime": "onnxruntime-cuda-graphs"}, "the onnxruntime-cuda-graphs runtime needs a GPU"),
        ({"runtime": "onnxruntime-tensorrt"}, "the onnxruntime-tensorrt runtime needs a GPU"),
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
    with pytest.raises(UsageError, match="the torch runtimes take a module"):
        benchmark(small_onnx, runtime="torch", **QUICK)
    with pytest.raises(UsageError, match=r"inputs \(\(1, 3, 9, 9\),\)"):
        benchmark(small_onnx, example_inputs=torch.randn(1, 3, 9, 9), **QUICK)
    with pytest.raises(UsageError, match="has 1 inputs, but 2 tensors"):
        benchmark(small_onnx, example_inputs=(small_input(), small_input()), **QUICK)


def test_nothing_is_left_in_the_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_runtimes.tempfile, "tempdir", str(tmp_path))
    benchmark(small(), example_inputs=small_input(), **{**QUICK, "memory": True})
    assert list(tmp_path.iterdir()) == []


def test_measuring_goes_on_until_both_the_runs_and_the_seconds_are_reached(machine):
    assert len(machine.benchmark(lambda n: 10.0, min_runs=5, min_seconds=0.2).samples_ms) == 20
    assert len(machine.benchmark(lambda n: 10.0, min_runs=30, min_seconds=0.2).samples_ms) == 30


def test_warming_up_ends_when_two_windows_agree_and_its_runs_are_not_counted(machine):
    result = machine.benchmark(lambda n: 400.0 if n <= 5 else 200.0 if n <= 10 else 100.0, warmup=60.0)
    assert (result.warmup_runs, result.warmup_settled) == (20, True)
    assert set(result.samples_ms) == {100.0}
    assert result.notes == ()


def test_a_warm_up_that_never_settles_ends_in_time_and_is_noted(machine):
    result = machine.benchmark(lambda n: 1.1**n, warmup=1.0)
    assert not result.warmup_settled
    assert sum(1.1**n for n in range(1, result.warmup_runs)) < 1000
    assert "still settling" in result.notes[0]


def test_a_wide_spread_is_noted(machine):
    result = machine.benchmark(lambda n: 100.0 if n % 2 else 120.0, warmup=60.0, min_runs=50)
    assert "noisy: the interquartile range is 18% of the median" in result.notes


def test_candidates_take_turns_in_an_order_that_changes(machine):
    machine.compare({"a": lambda n: 100.0, "b": lambda n: 200.0, "c": lambda n: 300.0}, min_runs=40)
    asked = machine.queries[3:]  # after one run each to warm up
    rounds = [tuple(asked[i : i + 3]) for i in range(0, len(asked), 3)]
    assert len(rounds) == 40
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len(set(rounds)) == 6


@pytest.mark.parametrize(("fastest", "turn"), [(1.0, 5), (20.0, 3), (50.0, 1)])
def test_a_turn_of_fast_models_is_several_queries_after_one_that_does_not_count(machine, fastest, turn):
    found = machine.compare({"a": lambda n: fastest, "b": lambda n: 60.0}, min_runs=30)
    uncounted = 1 if turn > 1 else 0
    assert [result.turn for result in found.results.values()] == [turn, turn]
    assert len(found.results["a"].samples_ms) == 30
    asked = machine.queries[2:]
    assert len(asked) == 2 * 30 // turn * (turn + uncounted)
    turns = [set(asked[i : i + turn + uncounted]) for i in range(0, len(asked), turn + uncounted)]
    assert all(len(of_turn) == 1 for of_turn in turns)


def test_each_session_sets_every_model_up_afresh_in_an_order_that_changes_and_warms_it_up(machine):
    found = machine.compare({"a": lambda n: 100.0, "b": lambda n: 100.0}, sessions=12, min_runs=36)
    text = "".join(machine.asked)
    assert len(found.results["a"].samples_ms) == 36
    assert found.results["a"].session_runs == (3,) * 12
    orders = {text[i : i + 4] for i in range(len(text) - 3) if text[i] == "*" and text[i + 2] == "*"}
    assert orders == {"*a*b", "*b*a"}
    assert (text.count("*a"), text.count("*b")) == (12, 12)
    assert len(machine.queries) == 2 * (1 + 11 * 3 + 36)


def test_sessions_share_the_runs_and_the_seconds(machine):
    result = machine.benchmark(lambda n: 100.0, sessions=10, min_runs=25, min_seconds=6.0)
    assert result.session_runs == (6,) * 10
    assert machine.benchmark(lambda n: 100.0, sessions=10, min_runs=25).session_runs == (3,) * 10


def test_the_ratio_is_that_of_typical_latencies_to_the_first(machine):
    noise = np.random.default_rng(3)
    found = machine.compare(
        {"dense": lambda n: 400 + 100 * noise.exponential(), "slim": lambda n: 200 + 100 * noise.exponential()},
        min_runs=200,
    )
    assert found.baseline == "dense"
    assert list(found.ratios) == ["slim"]
    ratio = found.ratios["slim"]
    assert ratio.value == pytest.approx(found.results["slim"].p50_ms / found.results["dense"].p50_ms, rel=0.05)
    assert 0.5 < ratio.low < ratio.value < ratio.high < 0.7
    assert (ratio.confidence, ratio.sessions) == (0.95, 1)
    assert json.loads(json.dumps(found.to_dict()))["ratios"]["slim"]["low"] == ratio.low


def test_the_interval_is_wider_where_disturbances_last(machine):
    noise = np.random.default_rng(6)
    walk = np.zeros(401)
    for index in range(1, len(walk)):
        walk[index] = 0.9 * walk[index - 1] + noise.normal()
    lasting, fleeting = (
        machine.compare({"a": lambda n: 100.0, "b": lambda n, t=iter(times): 100.0 + next(t)}, min_runs=400)
        for times in (walk, noise.permutation(walk))
    )
    width = [found.ratios["b"].high - found.ratios["b"].low for found in (lasting, fleeting)]
    assert width[0] > 1.5 * width[1]


def test_an_interval_of_more_confidence_is_wider(machine):
    noise = np.random.default_rng(5)
    latencies = {"a": lambda n: 100 + noise.exponential(), "b": lambda n: 100 + noise.exponential()}
    sure, surer = (machine.compare(latencies, min_runs=100, confidence=c).ratios["b"] for c in (0.5, 0.99))
    assert surer.high - surer.low > sure.high - sure.low


def test_the_first_is_measured_against_itself_too(machine):
    latencies = {"dense": lambda n: 100.0, "slim": lambda n: 50.0}
    quiet = machine.compare(latencies, check=True, sessions=8, min_runs=16)
    assert (quiet.check.value, quiet.too_noisy) == (1.0, "")
    assert len(quiet.check_samples_ms) == 16
    assert json.loads(json.dumps(quiet.to_dict()))["check"]["low"] == 1.0
    assert quiet.to_dict()["too_noisy"] is None


def test_a_noisy_run_says_which_differences_cannot_be_told_apart():
    check = Ratio(1.034, 1.012, 1.057, 0.95, 10)
    said = (
        "differences below ±5.7 % cannot be told apart in this run: measured against itself, dense took 1.01 to 1.06 "
        "times as long"
    )
    assert Comparison("dense", {}, {}, check).too_noisy == said
    ratios = {name: Ratio(value, 0.9 * value, 1.1 * value, 0.95) for name, value in
              {"tenth": 0.1, "alike": 0.95, "slower": 1.056, "slow": 1.06}.items()}  # fmt: skip
    assert Comparison("dense", {}, ratios, check).too_noisy == f"{said}; that holds for alike, slower"
    assert Comparison("dense", {}, {"tenth": ratios["tenth"]}, check).too_noisy == f"{said}; all others differ by more"
    assert Comparison("dense", {}, {}, Ratio(1.03, 0.99, 1.06, 0.95, 10)).too_noisy == ""


def test_a_machine_that_can_tell_little_says_so_though_its_interval_holds_1():
    assert Comparison("dense", {}, {}, Ratio(1.1, 0.71, 1.77, 0.95, 10)).too_noisy.startswith(
        "differences below ±77 % cannot be told apart in this run: measured against itself, dense took 0.71 to 1.77 "
    )
    assert Comparison("dense", {}, {}, Ratio(1.0, 0.9, 1.1, 0.95, 10)).too_noisy == ""
    assert Comparison("dense", {}, {}, Ratio(1.0, 0.5, 3.57, 0.95, 10)).too_noisy.startswith(
        "differences below a factor of 3.6 cannot be told apart in this run: "
    )


def test_sessions_too_few_for_the_confidence_are_refused(small_onnx):
    message = "5 sessions cannot bound a ratio with 95% confidence: take 6 or more, or 1, whose interval covers"
    with pytest.raises(UsageError, match=message):
        compare({"a": small_onnx, "b": small_onnx}, **{**QUICK, "sessions": 5})
    assert len(benchmark(small_onnx, **{**QUICK, "sessions": 5}).session_runs) == 5


def test_several_batch_sizes_can_be_measured_in_one_call(small_onnx):
    found = sweep({"a": small_onnx}, [1, 4], **QUICK)
    assert [result.results["a"].input_shapes for result in found.values()] == [((1, 3, 6, 6),), ((4, 3, 6, 6),)]
    assert list(found) == [1, 4]


def test_estimates_are_none_where_queries_are_too_few(machine):
    result = machine.benchmark(lambda n: 100.0, min_runs=100)
    assert result.early_stopping_ms == {"p90": 100.0, "p95": None, "p99": None}


def test_the_process_keeps_to_as_many_cores_as_threads_while_it_is_measured(machine):
    before = os.sched_getaffinity(0)
    seen = []

    def latency(n):
        seen.append(os.sched_getaffinity(0))
        return 100.0

    result = machine.benchmark(latency, threads=1)
    assert all(cores == set(result.cores) and len(cores) == 1 for cores in seen)
    assert os.sched_getaffinity(0) == before


def test_a_compiled_module_is_measured_and_its_memory_is_reported_missing(monkeypatch):
    compile_module = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, **options: compile_module(module, backend="eager", **options))
    result = benchmark(
        nn.Linear(3, 2), runtime="torch-compile", example_inputs=torch.randn(1, 3), **{**QUICK, "memory": True}
    )
    assert (len(result.samples_ms), result.peak_memory_bytes, result.params) == (5, None, 8)
    assert result.notes[0] == "peak memory is not measured of compiled or captured modules"


def test_without_a_compiler_compiling_is_refused(monkeypatch):
    def broken(module, **options):
        def run(*args):
            raise RuntimeError("no working C++ compiler")

        return run

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(UsageError, match=r"torch.compile does not work on this module here: no working C\+\+ compiler"):
        benchmark(nn.Linear(3, 2), runtime="torch-compile", example_inputs=torch.randn(1, 3), **QUICK)


def test_the_environment_says_what_the_system_tells_of_turbo(tmp_path, monkeypatch):
    files = {}
    monkeypatch.setattr(environment_file, "_first_line", lambda path: files.get(path.name))
    assert environment().cpu_turbo is None
    for name, text, turbo in [("no_turbo", "1", False), ("no_turbo", "0", True), ("boost", "0", False)]:
        files[name] = text
        assert environment().cpu_turbo is turbo
    assert "CPUExecutionProvider" in environment().providers


def test_files_and_modules_can_be_compared_in_one_run(small_onnx):
    found = compare({"file": small_onnx, "module": small()}, example_inputs=small_input(), **QUICK)
    assert list(found.results) == ["file", "module"]
    assert len(found.results["file"].samples_ms) == len(found.results["module"].samples_ms)


def test_comparing_nothing_or_with_no_confidence_is_refused(small_onnx):
    with pytest.raises(UsageError, match="nothing to measure"):
        compare({})
    with pytest.raises(UsageError, match="confidence must be a number above 0 and below 1, not 95"):
        compare({"a": small_onnx}, confidence=95)
    with pytest.raises(UsageError, match="seed must be a whole number of at least 0, not -1"):
        compare({"a": small_onnx}, seed=-1)


def test_what_one_candidate_opened_is_closed_when_another_fails(monkeypatch):
    closed = []

    def prepare(job, stack):
        if job.candidate == "b":
            raise UsageError("b is broken")
        stack.callback(closed.append, "a")
        return Runner(lambda: lambda: None, lambda: Peak(0), (), None, None, None)

    monkeypatch.setitem(RUNTIMES, "torch", prepare)
    with pytest.raises(UsageError, match="b is broken"):
        compare({"a": "a", "b": "b"}, runtime="torch", **QUICK)
    assert closed == ["a"]
