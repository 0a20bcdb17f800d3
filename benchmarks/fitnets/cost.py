"""Part `cost` of `fitnets.py`: what the paper's networks cost on paper, and how long they take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

import surgery
from benchmarks.fitnets.counting import paper_cost
from benchmarks.results_io import comparison_record
from surgery import models as catalogue
from surgery.errors import UsageError


@dataclass(frozen=True)
class Published:
    """A network, and the figures there are for it.

    ``weights`` and ``multiplications`` were worked out from the layers that the paper gives, without this package;
    ``paper`` is what the paper prints for them, ``speedup`` and ``compression`` what it prints beside these (table 5).
    """

    label: str
    group: str
    weights: str
    multiplications: str
    paper: tuple[str, str] = ("", "")
    speedup: float | None = None
    compression: float | None = None


PUBLISHED = {
    "fitnet_cifar_teacher": Published(
        "CIFAR-10 teacher", "CIFAR-10", "9,044,360", "725,090,696", ("~9M", "~725M"), 1, 1
    ),
    "fitnet1": Published("FitNet 1", "CIFAR-10", "249,576", "30,150,024", ("~250K", "~30M"), 13.36, 36),
    "fitnet2": Published("FitNet 2", "CIFAR-10", "861,928", "107,775,880", ("~862K", "~108M"), 4.64, 10.44),
    "fitnet3": Published("FitNet 3", "CIFAR-10", "1,503,304", "323,946,376", ("~1.6M", "~392M"), 1.37, 5.62),
    "fitnet4": Published("FitNet 4", "CIFAR-10", "2,544,712", "381,749,128", ("~2.5M", "~382M"), 1.52, 3.60),
    "fitnet_30m_5": Published("30M, 5 layers", "CIFAR-10", "219,912", "27.20M", ("", "30M")),
    "fitnet_30m_7": Published("30M, 7 layers", "CIFAR-10", "208,104", "29.27M", ("", "30M")),
    "fitnet_30m_9": Published("30M, 9 layers", "CIFAR-10", "217,320", "29.86M", ("", "30M")),
    "fitnet_30m_11": Published("30M, 11 layers", "CIFAR-10", "249,576", "30.15M", ("", "30M")),
    "fitnet_107m_5": Published("107M, 5 layers", "CIFAR-10", "729,736", "101.58M", ("", "107M")),
    "fitnet_107m_7": Published("107M, 7 layers", "CIFAR-10", "563,272", "104.53M", ("", "107M")),
    "fitnet_107m_9": Published("107M, 9 layers", "CIFAR-10", "756,808", "106.30M", ("", "107M")),
    "fitnet_107m_11": Published("107M, 11 layers", "CIFAR-10", "861,928", "107.78M", ("", "107M")),
    "fitnet_svhn_teacher": Published("SVHN teacher", "SVHN", "4,928,800", "", ("~4.9M", "")),
    "fitnet_svhn": Published("SVHN student", "SVHN", "1,503,304", "", ("~1.5M", "")),
    "fitnet_mnist_teacher": Published("MNIST teacher", "MNIST", "360,816", "", ("~361K", "")),
    "fitnet_mnist": Published("MNIST student", "MNIST", "29,944", "", ("~30K", "")),
}
"""The first of each group is the teacher of the others."""

RUNTIMES = (("onnxruntime", "cpu"), ("onnxruntime", "cuda"), ("torch", "cuda"))

_KEPT = ("p50_ms", "iqr_ms", "p99_ms", "throughput", "warmup_settled", "notes", "samples_ms")


def measure(batch_sizes: Sequence[int], *, min_runs: int, min_seconds: float, threads: int | None) -> dict[str, Any]:
    """The counts of every network, and the timings of each group in each runtime and at each batch size.

    All networks of a group take turns in one run; the two of 11 layers, which are FitNets 1 and 2 by another name, are
    not measured twice. Where a runtime is not here, its timing says why.
    """
    nets = {name: _traced(name) for name in PUBLISHED}
    timings = []
    for runtime, device in RUNTIMES:
        for batch_size in batch_sizes:
            for group, names in _timed().items():
                candidates = {name: nets[name] for name in names}
                record = {"group": group, "runtime": runtime, "device": device, "batch_size": batch_size}
                try:
                    compared = surgery.compare(
                        candidates,
                        runtime=runtime,
                        device=device,
                        batch_size=batch_size,
                        min_runs=min_runs,
                        min_seconds=min_seconds,
                        threads=threads,
                        memory=False,
                    )
                except UsageError as reason:
                    timings.append({**record, "missing": str(reason)})
                    continue
                timings.append({**record, **comparison_record(compared, _KEPT)})
                print(f"{group}, {runtime} on {device}, batch {batch_size}: measured", flush=True)
    return {"counts": [count(name, net) for name, net in nets.items()], "timings": timings}


def count(name: str, net: torch.nn.Module) -> dict[str, Any]:
    """The costs of a network by the paper's counting, and whether they are the ones that are known for it."""
    found, known = paper_cost(net), PUBLISHED[name]
    equal = printed(found.weights, known.weights) == known.weights
    if known.multiplications:
        equal = equal and printed(found.multiplications, known.multiplications) == known.multiplications
    return {"net": name, "weights": found.weights, "multiplications": found.multiplications, "as_derived": equal}


def printed(value: int, like: str) -> str:
    """A count in the digits that another one is given in: all of them, or millions with two decimals."""
    return f"{value / 1e6:.2f}M" if like.endswith("M") else f"{value:,}"


def _timed() -> dict[str, list[str]]:
    """The networks of each group that are timed, its teacher first."""
    groups: dict[str, list[str]] = {}
    for name, known in PUBLISHED.items():
        if known.label not in ("30M, 11 layers", "107M, 11 layers"):
            groups.setdefault(known.group, []).append(name)
    return groups


def _traced(name: str) -> torch.nn.Module:
    source = catalogue.canonical(name)
    return surgery.trace(catalogue.build(source, seed=0), catalogue.example_inputs(source), source=source)
