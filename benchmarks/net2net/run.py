"""One seed of `net2net.py`: a teacher, and the nets that are grown from it or trained beside it."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import surgery
from benchmarks.net2net.small_inception import PLACES, SmallInception
from surgery import models as catalogue
from surgery.training.data.data import Data
from surgery.training.loop import classification_loss
from surgery.training.run import Batch, LossFn

GROWTHS = ("wider", "deeper")
ARMS = ("net2net", "padding", "scratch")
"""How a net gets its weights."""


@dataclass(frozen=True)
class Settings:
    """What `net2net.py` is called with."""

    dataset: str
    data_root: str | None
    model: str
    deepen: Mapping[str, int]
    teacher_rate: float
    teacher_epochs: int
    epochs: int
    budget: float
    lr: float
    schedule: str
    break_symmetry: str | None
    noise: float

    @property
    def arms(self) -> tuple[tuple[str, int], ...]:
        """How the nets of each growth get their weights, and how many epochs they are given."""
        short = max(1, round(self.budget * self.epochs))
        full = () if short == self.epochs else (("net2net", self.epochs), ("scratch", self.epochs))
        return (*((arm, short) for arm in ARMS), *full)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "data_root": None}  # where the files lie is nobody's business


def run_seed(settings: Settings, seed: int) -> list[dict[str, Any]]:
    """All runs of a seed, as plain data."""
    torch.set_num_threads(1)
    data = surgery.load_data(settings.dataset, data_root=settings.data_root)
    student = architecture(settings, data, seed)
    teacher = surgery.slim(student, settings.teacher_rate)
    initialise(teacher, seed)
    runs = [run(settings, data, teacher, seed, growth="", arm="teacher", epochs=settings.teacher_epochs)]
    batch = torch.stack([data.test[k][0] for k in range(64)])
    for growth in GROWTHS:
        net = grown(settings, growth, teacher, student, seed)
        error = surgery.verify(net, teacher, batch, dtype=torch.float64).max_rel
        for arm, epochs in settings.arms:
            start = {"net2net": copy.deepcopy, "padding": padded(teacher, seed), "scratch": fresh(seed)}[arm](net)
            record = run(settings, data, start, seed, growth=growth, arm=arm, epochs=epochs)
            if arm == "net2net":
                record["float64_error"] = error
                teacher_score = runs[0]["accuracy"][-1]
                assert record["accuracy"][0] == teacher_score, (record["accuracy"][0], teacher_score)
            runs.append(record)
    return runs


def architecture(settings: Settings, data: Data, seed: int) -> nn.Module:
    """The student's, traced; its weights are not used."""
    classes, x = len(data.classes), torch.zeros(2, data.channels, data.image_size, data.image_size)
    if settings.model == "inception":
        return surgery.trace(SmallInception(classes), x)
    return surgery.trace(catalogue.build(f"{settings.model}?num_classes={classes}", seed=seed), x)


def grown(settings: Settings, growth: str, teacher: nn.Module, student: nn.Module, seed: int) -> nn.Module:
    if growth == "deeper":
        return surgery.deepen(teacher, settings.deepen or PLACES, seed=seed)
    sizes = {g.name: g.size for g in surgery.dimension_groups(student) if g.editable}
    return surgery.widen(teacher, sizes, seed=seed, break_symmetry=settings.break_symmetry, noise=settings.noise)


def initialise(net: nn.Module, seed: int) -> None:
    """Every layer as `torch.nn` makes it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in net.modules():
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()


def fresh(seed: int) -> Any:
    def start(net: nn.Module) -> nn.Module:
        result = copy.deepcopy(net)
        initialise(result, seed + 1000)
        return result

    return start


def padded(teacher: nn.Module, seed: int) -> Any:
    """A net with the teacher's weights where it has some, and as `fresh` gives it everywhere else."""

    def start(net: nn.Module) -> nn.Module:
        known = surgery.origins(teacher, net)
        result = fresh(seed)(net)
        own = {**dict(teacher.named_parameters()), **dict(teacher.named_buffers())}
        with torch.no_grad():
            for name, tensor in (*result.named_parameters(), *result.named_buffers()):
                origin = known[name]
                if origin is None:
                    continue
                source, places = own[origin.name], []
                for dim, axis in enumerate(origin.axes):
                    old = torch.ones(tensor.shape[dim], dtype=torch.bool) if axis is None else ~axis.new
                    places.append(old.nonzero().squeeze(1))
                    if axis is not None:
                        source = source.index_select(dim, axis.old[old])
                if places:
                    tensor[torch.meshgrid(*places, indexing="ij")] = source
                else:
                    tensor.copy_(source)
        return result

    return start


def run(
    settings: Settings, data: Data, net: nn.Module, seed: int, *, growth: str, arm: str, epochs: int
) -> dict[str, Any]:
    """Train ``net`` in place; its accuracy at step 0 and after each epoch."""
    started = time.perf_counter()
    first = surgery.evaluate(net, data.test)
    history = surgery.train(
        net,
        data,
        epochs=epochs,
        lr=settings.lr,
        schedule=settings.schedule,
        seed=seed,
        loss_fn=augmented(classification_loss()),
        test_each_epoch=True,
    )
    net.load_state_dict(history.module.state_dict())
    scores = [first.accuracy, *(epoch.score.accuracy for epoch in history.epochs if epoch.score)]
    cost = surgery.cost(net)
    print(
        f"seed {seed} {growth or 'teacher':7} {arm:8} {epochs:3} epochs: step 0 {scores[0]:.1%}, then "
        + " ".join(f"{100 * score:.1f}" for score in scores[1:]),
        flush=True,
    )
    return {
        "seed": seed,
        "growth": growth,
        "arm": arm,
        "epochs": epochs,
        "params": cost.params,
        "macs": cost.macs,
        "accuracy": scores,
        "loss": [epoch.loss for epoch in history.epochs],
        "seconds": round(time.perf_counter() - started, 1),
    }


def augmented(loss: LossFn) -> LossFn:
    """``loss`` on images turned by up to 15 degrees, shifted by a 14th, scaled and sheared by up to 15 %."""

    def loss_fn(model: nn.Module, batch: Batch, epoch: float) -> Tensor:
        images, *others = batch
        return loss(model, (distorted(images), *others), epoch)

    return loss_fn


def distorted(images: Tensor) -> Tensor:
    def draw(limit: float) -> Tensor:
        return (2 * torch.rand(len(images)) - 1) * limit

    angle, scale, shear = draw(math.radians(15)), 1 + draw(0.15), draw(0.15)
    rows = (
        torch.stack([angle.cos() / scale, shear - angle.sin() / scale, draw(1 / 7)], -1),
        torch.stack([angle.sin() / scale, angle.cos() / scale, draw(1 / 7)], -1),
    )
    grid = F.affine_grid(torch.stack(rows, 1).to(images.device), list(images.shape), align_corners=False)
    dark = images.amin()
    return F.grid_sample(images - dark, grid, align_corners=False) + dark
