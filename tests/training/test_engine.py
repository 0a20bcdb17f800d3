"""Mixed precision, and several processes that train as one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

import surgery
from surgery.training.data.data import load_data
from surgery.training.engine import Engine, is_main_process
from surgery.training.evaluation import evaluate
from surgery.training.growth import Growth
from surgery.training.loop import train
from surgery.training.modes import mixed_seed

SCRIPT = """
import json, sys
import torch
from torch import nn
import surgery
from surgery.training.engine import is_main_process
from surgery.training.data.data import load_data
from surgery.training.loop import train

torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10)).double()
data = load_data("digits", limit=203)
images = [(image.double(), label) for image, label in data.train]
tests = [(image.double(), label) for image, label in data.test]
data = surgery.training.data.data.Data("own", images, tests, data.classes, 8, data.normalisation)
settings = dict(epochs=3, batch_size=64, optimizer="adamw", test_each_epoch=True)
settings.update(json.loads(sys.argv[2]))
seen = []
history = train(model, data, progress=lambda *step: seen.append(step), **settings)
model = history.module
with open(sys.argv[1] + str(torch.distributed.get_rank() if torch.distributed.is_initialized() else 0), "w") as file:
    json.dump({
        "losses": [epoch.loss for epoch in history.epochs],
        "correct": [[epoch.score.correct, epoch.score.total] for epoch in history.epochs],
        "weights": model[3].weight.flatten().tolist(), "steps": len(seen), "main": is_main_process(),
    }, file)
"""


def run(tmp_path: Path, name: str, processes: int, program: str, **settings: object) -> list[dict]:
    """What each process of a training found."""
    script = tmp_path / "script.py"
    script.write_text(program)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launch if processes > 1 else []), str(script), str(tmp_path / name)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "1",
        "PYTHONPATH": str(Path(surgery.__file__).parents[1]),
    }
    done = subprocess.run(
        [*command, json.dumps(settings)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return [json.loads((tmp_path / f"{name}{rank}").read_text()) for rank in range(processes)]


def test_two_processes_train_as_one_does(tmp_path):
    (one,) = run(tmp_path, "one", 1, SCRIPT)
    two = run(tmp_path, "two", 2, SCRIPT)
    for process in two:
        assert process["losses"] == pytest.approx(one["losses"], rel=1e-12)
        assert process["weights"] == pytest.approx(one["weights"], rel=1e-9)
        assert process["correct"] == one["correct"]
        assert process["correct"][0][1] == 203
    assert [process["steps"] for process in two] == [9, 0]  # the first alone tells of its steps
    assert [process["main"] for process in two] == [True, False]


def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))


def test_a_training_collects_no_garbage_and_each_growth_frees_what_was_prepared_before(monkeypatch):
    data, freed = load_data("digits", limit=40), []
    monkeypatch.setattr(Accelerator, "free_memory", lambda self, *objects: freed.append(len(self._models)))
    model = surgery.trace(net(), torch.zeros(2, 3, 8, 8))
    train(model, data, epochs=1)
    assert freed == []
    train(model, data, epochs=2, grow={1: Growth(widen={"0": 1.5})})
    assert freed == [1]


def test_mixed_precision_computes_in_bfloat16_and_keeps_float32_weights():
    data = load_data("digits", limit=400)
    model, seen = net(), set()
    handle = model[0].register_forward_hook(lambda *args: seen.add(args[2].dtype))
    model = train(model, data, epochs=6, precision="bf16", lr=0.05).module
    handle.remove()
    assert seen == {torch.bfloat16}
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float32}
    assert evaluate(model, data.test).accuracy > 0.8
    assert set(vars(model)) == set(vars(net()))  # nothing is left of what wrapped it
    plain = net()
    plain = train(plain, data, epochs=6, lr=0.05).module
    assert not torch.equal(plain[0].weight, model[0].weight)


@pytest.mark.parametrize("enabled", [True, False])
def test_mixed_precision_is_the_same_in_the_callers_autocast(enabled):
    data = load_data("digits", limit=130)
    expected, model = net(), net()
    expected = train(expected, data, epochs=2, precision="bf16").module
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        model = train(model, data, epochs=2, precision="bf16").module
    assert torch.equal(model[4].weight, expected[4].weight)
    assert not torch.equal(model[4].weight, net()[4].weight)


def test_unknown_and_unsupported_precisions_are_refused():
    with pytest.raises(surgery.UsageError, match="unknown precision 'bf15'; did you mean 'bf16'"):
        Engine(torch.device("cpu"), "bf15")
    with pytest.raises(surgery.UsageError, match="the precision fp16 needs a GPU: on a CPU use bf16"):
        Engine(torch.device("cpu"), "fp16")


def test_a_launch_that_shards_the_model_is_refused(monkeypatch):
    from accelerate.state import DistributedType, PartialState

    Engine(torch.device("cpu"))
    monkeypatch.setitem(PartialState._shared_state, "distributed_type", DistributedType.MEGATRON_LM)
    with pytest.raises(
        surgery.UsageError, match="accelerate launch is set to MEGATRON_LM: only plain data parallelism"
    ):
        Engine(torch.device("cpu"))


def test_processes_that_would_each_train_alone_are_refused(monkeypatch):
    Engine(torch.device("cpu"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(surgery.UsageError, match=r"2 processes were launched, .*PartialState\(cpu=True\)"):
        Engine(torch.device("cpu"))


def test_a_plain_process_is_the_main_one():
    assert is_main_process()
    assert Engine(torch.device("cpu")).main


def test_seeds_are_mixed_from_all_numbers():
    seeds = {mixed_seed(a, b) for a in range(20) for b in range(20)}
    assert len(seeds) == 400
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert mixed_seed(-1) == mixed_seed(1)
