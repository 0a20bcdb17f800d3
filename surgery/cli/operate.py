"""Verbs that make a new model from a model: widen, deepen, slim (in `surgery.cli.slim`)."""

from __future__ import annotations

import copy
from typing import Annotated

import typer

import surgery
from surgery.cli.fields import takes_fields
from surgery.cli.options import (
    Model,
    Opening,
    OutputNames,
    name_outputs,
    parse_kernel,
    parse_number,
    parse_one_or_per_layer,
    parse_per_layer,
)
from surgery.cli.slim import slim
from surgery.cli.writing import Writing, compare_exactly, finish

RoundTo = Annotated[int, typer.Option(help="Round numbers of channels up to a multiple of this.")]


def register(app: typer.Typer) -> None:
    """Add the verbs of this file to ``app``."""
    app.command(epilog="Example: surgery widen resnet18 --width 1.5 --out wide")(widen)
    app.command(epilog="Example: surgery deepen resnet18 --at layer3=2 --at layer1.0.conv1 --out deep")(deepen)
    app.command(epilog="Example: surgery slim resnet18 --macs 0.5 --importance magnitude --out slim")(slim)


@takes_fields()
def widen(
    model: Model,
    width: Annotated[
        list[str],
        typer.Option(
            metavar="WIDTH",
            help="A factor for the whole model (1.5); or, as often as you like, LAYER=FACTOR (layer3=2.0) or "
            "LAYER=CHANNELS (layer1.0.conv1=96).",
        ),
    ],
    mapping: Annotated[
        str, typer.Option(help="Which channels are copied: random (as in the paper) or balanced (all equally often).")
    ] = "random",
    break_symmetry: Annotated[
        str | None,
        typer.Option(
            metavar="WAY",
            help="How copies come to learn different things. Exact: uneven (shares of the weights that read them) or "
            "zero-sum (noise on those weights). Not exact: noise (on the copies' own weights, as in the paper). "
            "[default: they do not]",
        ),
    ] = None,
    noise: Annotated[float, typer.Option(help="Standard deviation of the noise, in those of each weight.")] = 0.05,
    round_to: RoundTo = 1,
    outputs: OutputNames = None,
    *,
    opening: Opening,
    writing: Writing,
) -> None:
    """Make a model wider without changing what it computes (Net2Net)."""
    writing.refuse()
    wish = parse_one_or_per_layer("--width", width, float, parse_number)
    before = opening.open(model)
    free = name_outputs(outputs)
    after = surgery.widen(
        before,
        wish,
        mapping=mapping,
        break_symmetry=break_symmetry,
        noise=noise,
        seed=opening.seed,
        round_to=round_to,
        outputs=free,
    )
    left = surgery.unwidened(before, wish, round_to=round_to, outputs=free)

    def compare() -> surgery.Verification:
        """Compare in float64 throughout: means of channels are rounded to the dtype of the weights."""
        exact = copy.deepcopy(before).double()
        new_steps = surgery.recipe(after).steps[len(surgery.recipe(before).steps) :]
        return compare_exactly(surgery.apply(exact, new_steps), exact)

    finish(before, after, writing, compare, left=left, inexact=break_symmetry == "noise")


@takes_fields()
def deepen(
    model: Model,
    at: Annotated[
        list[str],
        typer.Option(metavar="PLACE", help="Where to insert layers: LAYER or LAYER=COUNT, as often as you like."),
    ],
    form: Annotated[
        str | None,
        typer.Option(
            help="What to insert: layer (an identity layer), residual (a block whose last layer is zero) or block (a "
            "copy of the block at the end of a stage, its last layers zero). [default: what fits]"
        ),
    ] = None,
    kernel: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Of identity convolutions, odd: 3, or one for each direction as in 1,7."),
    ] = None,
    *,
    opening: Opening,
    writing: Writing,
) -> None:
    """Make a model deeper without changing what it computes (Net2Net)."""
    writing.refuse()
    places = parse_per_layer("--at", [item if "=" in item else f"{item}=1" for item in at], int)
    before = opening.open(model)
    after = surgery.deepen(before, places, form=form, kernel=parse_kernel(kernel), seed=opening.seed)
    finish(before, after, writing, lambda: compare_exactly(after, before))
