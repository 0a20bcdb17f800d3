"""The verb that trains a model in generations, in which a slim one grows up: evolve."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

import surgery
from surgery.cli.config import write_config
from surgery.cli.fields import settings_of, takes_fields
from surgery.cli.options import (
    DataOptions,
    Model,
    RunOptions,
    Weights,
    load_if_saved,
    parse_device,
    parse_one_or_per_layer,
)
from surgery.cli.output import emit, table
from surgery.cli.runs import one_after_the_other, under_way
from surgery.errors import UsageError, unknown_name
from surgery.settings import EvolveSettings, Settings, option
from surgery.storage.folders import refuse_folder, staged_folder
from surgery.units import counted, mebibytes, quantity

if TYPE_CHECKING:
    from torch import nn

    from surgery import Cost, Data, Evolution, History, Lottery, Score

MARKER = "evolve.json"
"""The file that marks a folder as a result of ``evolve``."""

_KEPT = ("biases", "norms", "statistics")
"""What may be kept while the rest is drawn again."""


def register(app: typer.Typer) -> None:
    """Add the verb of this file to ``app``."""
    app.command(
        epilog="Example: surgery evolve resnet18 --dataset mnist5k --limit 1000 --epochs 10 --long --out runs/evolved"
    )(evolve)


@dataclass(frozen=True, kw_only=True)
class EvolveOptions(Settings):
    """How the model evolves, and what it is compared with."""

    split_rate: list[str] | None = option(
        None, "Share of each layer that is kept: one, or one a layer. [default: 0.5]", metavar="RATE|LAYER=RATE"
    )
    generations: int = option(5, "How many.", least=1)
    lottery: float | None = option(
        None,
        "Also train a lottery ticket, pruned so far in as many trainings, for comparison.",
        metavar="SPARSITY",
    )
    keep: list[str] | None = option(
        None, f"What is not drawn again: {', '.join(_KEPT)}; several times. [default: nothing]", metavar="WHAT"
    )
    initialiser: str = option("own", "Of what is drawn again: own (the model's), or authors.")
    weights: Weights = "none"


@takes_fields()
def evolve(
    context: typer.Context,
    model: Model,
    data: DataOptions,
    options: EvolveOptions,
    settings: EvolveSettings,
    run: RunOptions,
) -> None:
    """Train a model in generations, in which a slim one grows up (Knowledge Evolution).

    Each generation keeps a part of every layer and draws the rest again. Writes the model, the slim one inside of it,
    evolve.json, history.csv, and a picture. An interrupted run resumes when the same command is given again. Runs in
    several processes as well: accelerate launch -m surgery evolve ...
    """
    generations = options.generations
    rate = parse_one_or_per_layer("--split-rate", options.split_rate or ["0.5"], float, float)
    for name in options.keep or ():
        if name not in _KEPT:
            raise unknown_name("part to keep", name, _KEPT)
    if options.lottery is not None and generations == 1:
        raise UsageError("--lottery prunes after each training but the last: it needs --generations 2 or more")
    refuse_folder(run.out, marker=MARKER, force=run.force)
    engine = surgery.Engine(parse_device(run.device), settings.precision)
    opened = load_if_saved(model, run)
    with one_after_the_other(engine):  # the first may have to fetch what the others then read
        images = surgery.data_for({"the model": opened}, **vars(data))
        network = surgery.classifier(opened, images, weights=options.weights, trust=run.trust, seed=settings.seed)
    reset: dict[str, Any] = {
        **dict.fromkeys(options.keep or (), False), "initialiser": options.initialiser, "trust": run.trust
    }  # fmt: skip
    if options.lottery is not None:
        surgery.magnitude_masks(network, options.lottery)  # refused before the generations, and not after them
    shares = _shares(generations, long=settings.long, tickets=options.lottery is not None)
    with under_way(engine, run.out, settings_of(context), shares, settings, force=run.force) as (folder, progress):
        network.to(engine.device)
        common: dict[str, Any] = {"checkpoint": folder, "progress": progress}
        found = surgery.evolve(network, images, rate, generations, settings, reset=reset, **common)
        tickets = None
        if options.lottery is not None:
            training = settings.training()
            tickets = surgery.lottery(network, images, options.lottery, generations - 1, training, **common)
        if not engine.main:
            return
        written = {"dense": found.module, **({} if found.slim is None else {"slim": found.slim})}
        costs = {name: surgery.cost(module) for name, module in written.items()}
        content = {
            "schema": 1,
            "command": shlex.join(["surgery", *context.obj]),
            "model": {
                "source": surgery.recipe(network).source or model, **{name: c.to_dict() for name, c in costs.items()}
            },
            "data": asdict(surgery.DataSummary.of(images)),
            "settings": {**settings_of(context), "lr": settings.peak_lr, "weight_decay": settings.decay},
            **found.to_dict(),
            "lottery": tickets and tickets.to_dict()["tickets"],
            "environment": surgery.environment().to_dict(),
        }  # fmt: skip
        title = (
            f"{model} on {data.dataset}: {counted(generations, 'generation')} of {counted(settings.epochs, 'epoch')}"
        )
        with staged_folder(run.out, marker=MARKER, force=run.force) as staging:
            for name, module in written.items():
                surgery.save(module, staging / name)
            surgery.draw_generations(found, tickets, staging / "generations.png", title=title)
            (staging / MARKER).write_text(json.dumps(content, indent=1) + "\n")
            surgery.write_history(_histories(found, tickets), staging)
            write_config(context, staging)
    emit(
        {**content, "out": str(run.out)},
        run.as_json,
        _scores(title, found, tickets),
        _costs(costs),
        note=_notes(found, tickets, images, run.out, written),
    )


def _shares(generations: int, *, long: bool, tickets: bool) -> dict[str, float]:
    """Estimate the share of the time that each task takes."""
    names = [f"generation-{number + 1}" for number in range(generations)]
    shares = dict.fromkeys(names, 1.0)
    if long:
        shares["long"] = float(generations)
    if tickets:
        shares |= dict.fromkeys(["dense", *(f"ticket-{number}" for number in range(1, generations))], 1.0)
    return shares


def _histories(found: Evolution, tickets: Lottery | None) -> dict[str, History]:
    """The record of each training, by its task."""
    histories = {f"generation-{number}": one.history for number, one in enumerate(found.generations, 1)}
    if found.long is not None:
        histories["long"] = found.long.history
    for number, ticket in enumerate(tickets.tickets if tickets else ()):
        histories[f"ticket-{number}" if number else "dense"] = ticket.history
    return histories


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
    files = ", ".join([*(f"{name}/" for name in written), "generations.png", "history.csv"])
    return "\n".join([*lines, f"{seconds:.0f} s; written to {out}: {files} and {MARKER}"])
