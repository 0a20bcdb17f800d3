"""Part `cost` of `knowledge_evolution.py`: what slim networks cost by the authors' counting, and how long they take."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import vgg11_bn

import surgery
from benchmarks.knowledge_evolution.counting import ke_cost
from benchmarks.results_io import comparison_record
from surgery import models as catalogue

RATES = (1.0, 0.8, 0.5, 0.25)
IMAGE = (2, 3, 224, 224)
TIMED = {"1": (1.0, 1), "0.8": (0.8, 1), "0.8 in eights": (0.8, 8), "0.5": (0.5, 1), "0.25": (0.25, 1)}
"""Split rates, and what widths are rounded up to a multiple of: kernels work in blocks of channels, which a rate of 0.8
leaves partly empty."""


class VGG11GAP(nn.Module):
    """VGG-11 with batch normalisation, global average pooling and one linear layer."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.features = vgg11_bn().features
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(512, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.classifier(self.pool(self.features(x)).flatten(1))
        return result


@dataclass(frozen=True)
class Published:
    """A network of the paper, and its figures by the authors' counting, worked out without this package.

    ``figures``: at each split rate billions of operations, billions of MACs and millions of parameters, as printed.
    ``leaks``: at some rates, for layers whose slim form in the authors' code has another width than their mask keeps,
    the rate that gives that width.
    """

    label: str
    build: Callable[[], nn.Module]
    figures: Mapping[float, tuple[str, str, str]]
    leaks: Mapping[float, Mapping[str, float]]


def _figures(*rows: str) -> dict[float, tuple[str, str, str]]:
    found = {}
    for rate, row in zip(RATES, rows, strict=True):
        operations, macs, params = row.split(" / ")
        found[rate] = (operations, macs, params)
    return found


def _published(
    label: str, source: str, *rows: str, leaks: Mapping[float, Mapping[str, float]] | None = None
) -> Published:
    return Published(label, lambda: catalogue.build(source, seed=0), _figures(*rows), leaks or {})


_DENSENET_LEAK = {0.8: {"features": 0.8, "*.denselayer*.conv1": 104 / 128}}
"""Their slim network has bottlenecks of ``bn_size * ceil(g * s)`` = 104 channels, their mask keeps
``ceil(bn_size * g * s)`` = 103."""

PUBLISHED = {
    "resnet18-102": _published(
        "ResNet-18, 102 classes", "resnet18?num_classes=102",
        "3.6324 / 1.8136 / 11.2288", "2.3945 / 1.1951 / 7.2196", "0.9684 / 0.4829 / 2.8251", "0.2723 / 0.1355 / 0.7153",
    ),
    "resnet18": _published(
        "ResNet-18", "resnet18?num_classes=200",
        "3.6325 / 1.8137 / 11.2791", "2.3945 / 1.1952 / 7.2599", "0.9685 / 0.4829 / 2.8503", "0.2723 / 0.1355 / 0.7279",
    ),
    "resnet34": _published(
        "ResNet-34", "resnet34?num_classes=200",
        "7.3344 / 3.6634 / 21.3873", "4.7833 / 2.3885 / 13.7481", "1.8946 / 0.9454 / 5.3792",
        "0.5041 / 0.2511 / 1.3610",
    ),
    "resnet50": _published(
        "ResNet-50", "resnet50?num_classes=200",
        "8.1962 / 4.0875 / 23.9178", "5.3276 / 2.6553 / 15.4181", "2.1135 / 1.0515 / 6.0976",
        "0.5606 / 0.2777 / 1.5836",
    ),
    "densenet121": _published(
        "DenseNet-121", "densenet121?num_classes=200",
        "5.7075 / 2.8333 / 7.1589", "3.7981 / 1.8825 / 4.7432", "1.4962 / 0.7379 / 1.8643", "0.4087 / 0.1992 / 0.5035",
        leaks=_DENSENET_LEAK,
    ),
    "densenet169": _published(
        "DenseNet-169", "densenet169?num_classes=200",
        "6.7675 / 3.3585 / 12.8175", "4.4953 / 2.2272 / 8.4861", "1.7637 / 0.8692 / 3.3297", "0.4768 / 0.2321 / 0.8951",
        leaks=_DENSENET_LEAK,
    ),
    "googlenet": _published(
        "GoogLeNet without auxiliary heads", "googlenet?num_classes=200&aux_logits=false",
        "3.0011 / 1.4976 / 5.8049", "1.9837 / 0.9894 / 3.7805", "0.8109 / 0.4039 / 1.5086", "0.2330 / 0.1158 / 0.4059",
    ),
    "vgg11_bn-gap": Published(
        "VGG-11-BN, pooling and one linear layer", lambda: VGG11GAP(200),
        _figures("14.9949 / 7.4856 / 9.3286", "9.6782 / 4.8295 / 6.0018", "3.7981 / 1.8931 / 2.3604",
                 "0.9742 / 0.4841 / 0.6043"), {},
    ),
    "vgg11_bn": _published(
        "VGG-11-BN, three linear layers", "vgg11_bn?num_classes=200",
        "15.2354 / 7.6058 / 129.5912", "9.8325 / 4.9066 / 83.1554", "3.8586 / 1.9233 / 32.6073",
        "0.9895 / 0.4918 / 8.2566",
    ),
}  # fmt: skip
"""200 classes where not said otherwise, as CUB-200 has."""


def counts(name: str) -> list[dict[str, Any]]:
    """What a network costs at each split rate, and whether that is what is published, digit by digit."""
    dense, known = _traced(name), PUBLISHED[name]
    return [_count(name, dense, rate, known) for rate in RATES]


def timings(name: str, *, min_runs: int, min_seconds: float, threads: int | None) -> dict[str, Any]:
    """The dense network and its slim ones on ONNX Runtime on the CPU, one image at a time, in turns."""
    dense = _traced(name)
    networks = {key: surgery.slim(dense, rate, round_to=multiple) for key, (rate, multiple) in TIMED.items()}
    compared = surgery.compare(
        networks,
        min_runs=min_runs,
        min_seconds=min_seconds,
        threads=threads,
        memory=False,
    )
    return {
        "net": name,
        "operations": {key: ke_cost(network).operations for key, network in networks.items()},
        **comparison_record(compared, ("p50_ms", "iqr_ms", "p99_ms", "warmup_settled", "notes", "samples_ms")),
    }


def markdown(document: Mapping[str, Any]) -> str:
    """The two tables."""
    return "\n".join([*_count_table(document), *_time_table(document)])


def _traced(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return surgery.trace(PUBLISHED[name].build().eval(), torch.zeros(IMAGE))


def _count(name: str, dense: nn.Module, rate: float, known: Published) -> dict[str, Any]:
    found = _figures_of(surgery.slim(dense, rate))
    record = {"net": name, "rate": rate, **found, "published": list(known.figures[rate])}
    record["equal"] = _printed(found) == list(known.figures[rate])
    if rate in known.leaks:
        leaking = _figures_of(surgery.slim(dense, known.leaks[rate]))
        record["leaking"] = {**leaking, "equal": _printed(leaking) == list(known.figures[rate])}
    return record


def _figures_of(module: nn.Module) -> dict[str, int]:
    counted = ke_cost(module)
    return {"operations": counted.operations, "macs": surgery.cost(module).macs, "params": counted.params}


def _printed(found: Mapping[str, int]) -> list[str]:
    units = {"operations": 1e9, "macs": 1e9, "params": 1e6}
    return [f"{found[key] / unit:.4f}" for key, unit in units.items()]


def _count_table(document: Mapping[str, Any]) -> Iterator[str]:
    rows = document["counts"]
    equal = sum(row["equal"] for row in rows)
    yield from (
        "# Knowledge Evolution: what slim networks cost",
        "",
        f"`{document['command']}`. Operations are counted as the authors' code does "
        "(`benchmarks.knowledge_evolution.counting`), for one image of 224 x 224 pixels and 200 "
        "classes where not said otherwise; parameters are those of the network, "
        f"without the masks that their log adds. {equal} of {len(rows)} rows equal the figures that were worked out "
        "from the authors' code, to the printed digits of all three.",
        "",
        "| network | split rate | operations, G | GMAC | parameters, M | operations cut | the authors' |",
        "|---|---|---|---|---|---|---|",
    )
    dense = {row["net"]: row for row in rows if row["rate"] == 1}
    for row in rows:
        cut = 1 - row["operations"] / dense[row["net"]]["operations"]
        theirs = "equal" if row["equal"] else " / ".join(row["published"])
        cells = [PUBLISHED[row["net"]].label, f"{row['rate']:g}", *_printed(row), f"{cut:.2%}" if cut else "", theirs]
        yield "| " + " | ".join(cells) + " |"
    if any("leaking" in row for row in rows):
        met = all(row["leaking"]["equal"] for row in rows if "leaking" in row)
        yield from (
            "",
            "The DenseNets differ at 0.8: the authors' slim network has bottlenecks of `bn_size * ceil(g * s)` = "
            "4 * 26 = 104 channels, but their mask keeps the first `ceil(bn_size * g * s)` = 103, so that in each "
            "bottleneck a channel of the reset-hypothesis leaks into the slim network. Ours have the 103 of the mask. "
            + ("With 104 their figures are met, all three." if met else "With 104 their figures are not met either."),
        )
    if any(row["net"] == "vgg11_bn" for row in rows):
        yield from (
            "",
            "VGG with three linear layers is equal because the count goes by the slim network: at 0.8 it reads "
            "`ceil(C * s) * HW` = 410 * 49 = 20,090 of the flattened channels in their code and in ours. Their mask of "
            "that layer keeps the first `ceil(C * HW * s)` = 20,071; ours keeps what the slim network reads.",
        )


def _time_table(document: Mapping[str, Any]) -> Iterator[str]:
    runs = sorted(document["timings"], key=lambda run: list(PUBLISHED).index(run["net"]))
    if not runs:
        return
    where = runs[0]["environment"]
    slim = list(TIMED)[1:]
    yield from (
        "",
        "## What that buys",
        "",
        f"Median latency of one image on ONNX Runtime {where['versions']['onnxruntime']}, {where['cpu']}, "
        f"{runs[0]['threads']} threads, {where['date'][:10]}. The dense network and its slim ones take turns; how many "
        f"times as fast the slim ones are, with the {runs[0]['speedups'][slim[0]]['confidence']:.0%} interval, and in "
        "brackets what the operations promise. In eights: widths rounded up to a multiple of 8 (`round_to=8`), since "
        "kernels work in blocks of channels. Scatter: the largest interquartile range of a row's networks, of the "
        "median. The samples are in the JSON file.",
        "",
        "| network | dense, ms | " + " | ".join(f"at {key}" for key in slim) + " | scatter |",
        "|---|---|" + "---|" * (len(slim) + 1),
    )
    for run in runs:
        cells = []
        for key in slim:
            s, promised = run["speedups"][key], run["operations"]["1"] / run["operations"][key]
            cells.append(f"{s['value']:.2f} ({s['low']:.2f} to {s['high']:.2f}) [{promised:.2f}]")
        scatter = max(result["iqr_ms"] / result["p50_ms"] for result in run["results"].values())
        first = f"{run['results']['1']['p50_ms']:.2f}"
        yield "| " + " | ".join([PUBLISHED[run["net"]].label, first, *cells, f"{scatter:.0%}"]) + " |"
    yield ""
