"""Verbs that make a new model from a model: widen, deepen, shorten, slim (in `surgery.cli.slim`)."""

from __future__ import annotations

import copy
import operator
from typing import TYPE_CHECKING, Annotated

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

if TYPE_CHECKING:
    from torch import nn

RoundTo = Annotated[int, typer.Option(help="Round numbers of channels up to a multiple of this.")]


def register(app: typer.Typer) -> None:
    """Add the verbs of this file to ``app``."""
    app.command(epilog="Example: surgery widen resnet18 --width 1.5 --out wide")(widen)
    app.command(epilog="Example: surgery deepen resnet18 --at layer3=2 --at layer1.0.conv1 --out deep")(deepen)
    app.command(epilog="Example: surgery shorten resnet50 --at layer3=2 --at layer4.2 --out short")(shorten)
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


@takes_fields()
def shorten(
    model: Model,
    at: Annotated[
        list[str],
        typer.Option(
            metavar="PLACE",
            help="What to remove: BLOCK, or STAGE=COUNT for the last blocks of a stage, as often as you like.",
        ),
    ],
    *,
    opening: Opening,
    writing: Writing,
) -> None:
    """Remove residual blocks or layers of a Transformer: the model whose last layers of them are 0."""
    writing.refuse()
    counts = parse_per_layer("--at", [item for item in at if "=" in item], int)
    before = after = opening.open(model)
    for places in ([item for item in at if "=" not in item], counts):
        after = surgery.shorten(after, places) if places else after
    finish(before, after, writing, lambda: compare_exactly(after, _silenced(before, after)))


def _silenced(before: nn.Module, after: nn.Module) -> nn.Module:
    """The model before, with 0 in the last layers of the blocks that were removed."""
    silenced = copy.deepcopy(before)
    known = len(surgery.recipe(before).steps)
    for step in surgery.recipe(after).steps[known:]:
        for name in getattr(step, "zeros", ()):
            operator.attrgetter(name)(silenced).data.zero_()
    return silenced
