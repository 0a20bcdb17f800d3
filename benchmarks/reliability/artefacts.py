"""Everything that the package writes and reads again, in small: how it is made, and how it is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import surgery
from surgery.deploy.curve.store import RECORD, Store
from surgery.models.saving import RECIPE, WEIGHTS
from surgery.storage.folders import SETTINGS, unfinished_folder
from surgery.training.data.cache import MARKER, cache_outputs, write_cache
from surgery.training.history import Epoch, History, Score


@dataclass(frozen=True)
class Artefact:
    """A folder that is written by ``make``, and files in it; ``read`` returns what the package makes of it."""

    name: str
    files: tuple[str, ...]
    make: Callable[[Path], Any]
    read: Callable[[Path], Any]


class Net(nn.Module):
    """Branches that are concatenated and cut: an index that is wrong by one fits, and computes another thing."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 6, 3), nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1)
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        first, second = torch.cat([self.norm(self.a(x)), self.b(x)[:, :, 1:-1, 1:-1]], 1).chunk(2, 1)
        return self.c(first * second).mean((2, 3))


@cache
def traced() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        wide = surgery.widen(surgery.trace(Net(), torch.randn(2, 3, 8, 8)), 1.5, seed=0)
        return surgery.slim(wide, 0.7)


def _images() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(16, 3, 8, 8, generator=generator), torch.arange(16) % 4)


def _read_model(folder: Path) -> list[Tensor]:
    module = surgery.load(folder / "saved", model=Net())
    flags = torch.tensor([float(p.requires_grad) for p in module.parameters()] + [float(module.training)])
    return [flags, module.eval()(_images().tensors[0]).detach()]


def _make_named(folder: Path) -> None:
    module = surgery.trace(surgery.models.build("fitnet1", seed=0), torch.randn(1, 3, 32, 32), source="fitnet1")
    surgery.save(surgery.slim(module, 0.25), folder / "saved")


def _read_named(folder: Path) -> list[Tensor]:
    return list(surgery.load(folder / "saved").parameters())


def _data() -> surgery.Data:
    return surgery.load_data("digits", limit=32)


def _train(folder: Path) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.ReLU(), nn.Linear(8, 10))
    return surgery.train(model, _data(), epochs=1, batch_size=16, checkpoint=folder / "training.pt")


def _read_training(folder: Path) -> list[Tensor]:
    return list(_train(folder).module.parameters())


def _make_cache(folder: Path) -> None:
    write_cache(traced().eval(), _images(), folder / "cache")


def _read_cache(folder: Path) -> list[Tensor]:
    outputs = cache_outputs(traced().eval(), _images(), where=folder / "cache")
    return [torch.stack([outputs[k][2] for k in range(16)])]


_HISTORY = History((Epoch(8, 0.5, 0.1, Score(3, 4), 1.5),), 2)


def _make_store(folder: Path) -> None:
    store = Store(folder)
    surgery.save(traced(), store.place("a"))
    store.keep("a", {"train": _HISTORY}, Score(3, 4), {"seed": 0})


def _read_store(folder: Path) -> list[Tensor]:
    kept = Store(folder).find("a")
    if kept is None:
        _make_store(folder)
        kept = Store(folder).find("a")
    assert kept is not None
    same = (dict(kept.training), kept.score) == ({"train": _HISTORY}, Score(3, 4))
    return [torch.tensor(same), *kept.into(traced()).parameters()]


def _make_run(folder: Path) -> None:
    try:
        with unfinished_folder(folder / "demo", {"epochs": 3}) as place:
            (place / "work").write_text("half")
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass


def _read_run(folder: Path) -> list[Tensor]:
    _make_run(folder)
    return [torch.tensor((folder / "demo.unfinished" / "work").read_text() == "half")]


ARTEFACTS = (
    Artefact("saved model", (f"saved/{RECIPE}", f"saved/{WEIGHTS}"), lambda f: surgery.save(traced(), f / "saved"),
             _read_model),
    Artefact("saved model with a source", (f"saved/{RECIPE}",), _make_named, _read_named),
    Artefact("checkpoint", ("training.pt",), _train, _read_training),
    Artefact("teacher's outputs", (f"cache/{MARKER}", "cache/output-*.npy"), _make_cache, _read_cache),
    Artefact("stored run", (f"a/{RECORD}", f"a/{RECIPE}", f"a/{WEIGHTS}"), _make_store, _read_store),
    Artefact("unfinished run", (f"demo.unfinished/{SETTINGS}",), _make_run, _read_run),
)  # fmt: skip
