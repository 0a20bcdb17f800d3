"""The verb that trains a model in generations, in which a slim one grows up: evolve."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

from surgery.cli.options import (
    AsJson,
    DataRoot,
    Dataset,
    Device,
    Force,
    ImageSize,
    Limit,
    Model,
    Seed,
    Trust,
    Weights,
    is_saved,
    one_or_per_layer,
    parse_device,
)
from surgery.cli.output import emit, table
from surgery.cli.runs import (
    Augment,
    BatchSize,
    CheckpointEvery,
    LabelSmoothing,
    Optimizer,
    Precision,
    Schedule,
    Workers,
    chosen,
    one_after_the_other,
    under_way,
)
from surgery.counting.cost import Cost, cost
from surgery.deploy.classifiers import classifier, data_for
from surgery.deploy.curve.points import DataSummary
from surgery.deploy.generations import draw
from surgery.deploy.measure.environment import environment
from surgery.errors import UsageError, unknown_name, whole_number
from surgery.folders import refuse_folder, staged_folder
from surgery.graph.traced import info
from surgery.models.checkpoint import load, save
from surgery.operations.tickets import magnitude_masks
from surgery.progress import Progress
from surgery.training.data.data import Data
from surgery.training.descent import check_numbers, check_settings
from surgery.training.engine import Engine
from surgery.training.evolve import PAPER, Evolution
from surgery.training.evolve import evolve as run_evolve
from surgery.training.history import Score
from surgery.training.lottery import Lottery
from surgery.training.lottery import lottery as run_lottery
from surgery.units import counted, mebibytes, quantity

MARKER = "evolve.json"
"""The file by which a folder is known as a result of ``evolve``."""

_KEPT = ("biases", "norms", "statistics")
"""What may be kept where the rest is drawn anew."""


def register(app: typer.Typer) -> None:
    """Add the verb of this file to ``app``."""
    app.command(
        epilog="Example: surgery evolve resnet18 --dataset mnist5k --limit 1000 --epochs 10 --long --out runs/evolved"
    )(evolve)


def evolve(
    context: typer.Context,
    model: Model,
    dataset: Dataset,
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write.")],
    split_rate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RATE|LAYER=RATE", help="Share of each layer that is kept: one, or one a layer. [default: 0.5]"
        ),
    ] = None,
    generations: Annotated[int, typer.Option(help="How many.")] = 5,
    epochs: Annotated[int, typer.Option(help="Passes over the data in each generation.")] = 200,
    kind: Annotated[
        str, typer.Option(help="What is kept: kels, channels, or wels, scattered weights (without a slim model).")
    ] = "kels",
    long: Annotated[bool, typer.Option("--long", help="Also train as many epochs at once, for comparison.")] = False,
    lottery: Annotated[
        float | None,
        typer.Option(
            metavar="SPARSITY", help="Also train a lottery ticket, pruned so far in as many trainings, for comparison."
        ),
    ] = None,
    recalibrate: Annotated[
        bool, typer.Option("--recalibrate", help="Measure the slim model's BatchNorm statistics on training images.")
    ] = False,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WHAT", help=f"What is not drawn anew: {', '.join(_KEPT)}; several times. [default: nothing]"
        ),
    ] = None,
    initialiser: Annotated[str, typer.Option(help="Of what is drawn anew: own (the model's), or authors.")] = "own",
    optimizer: Optimizer = "sgd",
    lr: Annotated[
        float | None, typer.Option(help="Peak learning rate. [default: 0.256 with sgd, else usual with the optimizer]")
    ] = None,
    schedule: Schedule = "warmup-cosine",
    batch_size: BatchSize = 32,
    weight_decay: Annotated[
        float | None, typer.Option(help="Of weights. [default: 0.0001 with sgd, else usual with the optimizer]")
    ] = None,
    label_smoothing: LabelSmoothing = 0.1,
    augment: Augment = "none",
    image_size: ImageSize = None,
    data_root: DataRoot = None,
    limit: Limit = None,
    weights: Weights = "none",
    precision: Precision = None,
    device: Device = "auto",
    workers: Workers = 0,
    checkpoint_every: CheckpointEvery = None,
    seed: Seed = 0,
    trust: Trust = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Train a model in generations, in which a slim one inside of it takes over (Knowledge Evolution).

    Each generation keeps a part of the last one and draws the rest anew. Writes the dense and the slim model,
    evolve.json and generations.png. A run that was cut off goes on when the same command is given again. Runs in
    several processes as well: accelerate launch -m surgery evolve ...
    """
    rate = one_or_per_layer("--split-rate", split_rate or ["0.5"], float, float)
    whole_number("--generations", generations, 1)
    whole_number("--image-size", image_size if image_size is not None else 1, 1)
    check_numbers(0.0, weight_decay, label_smoothing, seed, workers)
    for name in keep or ():
        if name not in _KEPT:
            raise unknown_name("part to keep", name, _KEPT)
    if kind == "wels" and recalibrate:
        raise UsageError("--recalibrate is for the slim model, and --kind wels gives none")
    if lottery is not None and generations == 1:
        raise UsageError("--lottery prunes after each training but the last: it needs --generations 2 or more")
    refuse_folder(out, marker=MARKER, force=force)
    engine = Engine(parse_device(device), precision)
    opened = load(model, trust=trust) if is_saved(model) else model
    with one_after_the_other(engine):  # the first may have to fetch what the others then read
        data = data_for(
            {"the model": opened}, dataset, data_root=data_root, image_size=image_size, limit=limit, augment=augment
        )
        network = classifier(opened, data, weights=weights, trust=trust, seed=seed)
    check_settings(data, epochs, optimizer, lr, batch_size, schedule, checkpoint_every)
    reset: dict[str, Any] = {**dict.fromkeys(keep or (), False), "initialiser": initialiser, "trust": trust}
    if lottery is not None:
        magnitude_masks(network, lottery)  # what is refused is refused before the generations, and not after them
    usual = PAPER.get(optimizer, {})
    common: dict[str, Any] = {
        "optimizer": optimizer,
        "lr": usual.get("lr") if lr is None else lr,
        "schedule": schedule,
        "batch_size": batch_size,
        "weight_decay": usual.get("weight_decay") if weight_decay is None else weight_decay,
        "label_smoothing": label_smoothing,
        "precision": precision,
        "checkpoint_every": checkpoint_every,
        "seed": seed,
        "workers": workers,
    }

    def run(folder: Path, progress: Progress | None) -> tuple[Evolution, Lottery | None]:
        network.to(engine.device)
        options = {**common, "epochs": epochs, "checkpoint": folder, "progress": progress}
        found = run_evolve(
            network, data, rate, generations, kind=kind, reset=reset, recalibrate=recalibrate, long=long, **options
        )
        tickets = None if lottery is None else run_lottery(network, data, lottery, generations - 1, **options)
        return found, tickets

    shares = _shares(generations, long=long, tickets=lottery is not None)
    with under_way(engine, out, chosen(context), shares, force=force) as (folder, progress):
        found, tickets = run(folder, progress)
        if not engine.main:
            return
        written = {"dense": found.model, **({} if found.slim is None else {"slim": found.slim})}
        costs = {name: cost(module) for name, module in written.items()}
        content = {
            "schema": 1,
            "command": shlex.join(["surgery", *context.obj]),
            "model": {"source": info(network).source or model, **{name: c.to_dict() for name, c in costs.items()}},
            "data": asdict(DataSummary.of(data)),
            "settings": {**chosen(context), **{name: common[name] for name in ("lr", "weight_decay")}},
            **found.to_dict(),
            "lottery": tickets and tickets.to_dict()["tickets"],
            "environment": environment().to_dict(),
        }
        title = f"{model} on {dataset}: {counted(generations, 'generation')} of {counted(epochs, 'epoch')}"
        with staged_folder(out, marker=MARKER, force=force) as staging:
            for name, module in written.items():
                save(module, staging / name)
            draw(found, tickets, staging / "generations.png", title=title)
            (staging / MARKER).write_text(json.dumps(content, indent=1) + "\n")
    emit(
        {**content, "out": str(out)},
        as_json,
        _scores(title, found, tickets),
        _costs(costs),
        note=_notes(found, tickets, data, out, written),
    )


def _shares(generations: int, *, long: bool, tickets: bool) -> dict[str, float]:
    """The part of the time that each task is likely to take."""
    names = [f"generation-{number + 1}" for number in range(generations)]
    shares = dict.fromkeys(names, 1.0)
    if long:
        shares["long"] = float(generations)
    if tickets:
        shares |= dict.fromkeys(["dense", *(f"ticket-{number}" for number in range(1, generations))], 1.0)
    return shares


def _scores(title: str, found: Evolution, tickets: Lottery | None) -> Any:
    alone = "fit-hypothesis" if found.slim is None else "slim"
    rows = [
        [str(number), _percent(g.dense), _percent(g.slim), f"{g.history.seconds:.1f}"]
        for number, g in enumerate(found.generations, 1)
    ]
    if found.long is not None:
        long = found.long
        rows.append(["long, nothing reset", _percent(long.dense), _percent(long.slim), f"{long.history.seconds:.1f}"])
    if tickets is not None:
        seconds = sum(ticket.history.seconds for ticket in tickets.tickets)
        last = tickets.tickets[-1]
        rows.append([f"lottery, sparsity {last.sparsity:g}", "", _percent(last.score), f"{seconds:.1f}"])
    return table(title, ["generation", "dense", alone, "seconds"], rows)


def _costs(costs: dict[str, Cost]) -> Any:
    rows = [[name, quantity(c.params), quantity(c.macs), mebibytes(c.bytes)] for name, c in costs.items()]
    return table("", ["", "parameters", "MACs", "size"], rows)


def _percent(score: Score) -> str:
    return f"{score.accuracy:.1%}"


def _notes(found: Evolution, tickets: Lottery | None, data: Data, out: Path, written: dict[str, nn.Module]) -> str:
    train, test = data.counts
    lines = [f"{train} training and {test} test images of {data.image_size} x {data.image_size}"]
    if found.slim is None:
        lines.append("scattered weights are no smaller network: there is no slim model")
    elif found.slim_score.interval()[1] < found.score.interval()[0]:
        lines.append("the slim model is not as good as the dense one yet: it needs more generations, or longer ones")
    trained = [one.history for one in (*found.generations, *([found.long] if found.long else []))]
    trained += [ticket.history for ticket in tickets.tickets] if tickets else []
    seconds = sum(history.seconds for history in trained)
    folders = ", ".join(f"{name}/" for name in written)
    return "\n".join([*lines, f"{seconds:.0f} s; written to {out}: {folders}, generations.png and {MARKER}"])
