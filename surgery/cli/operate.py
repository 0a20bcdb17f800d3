"""Verbs that make a new model out of a model: widen, deepen, slim."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import nn

from surgery.cli.options import (
    EXACT,
    AsJson,
    Force,
    InputShape,
    Model,
    Seed,
    Trust,
    Weights,
    int_or_float,
    one_or_per_layer,
    open_model,
    per_layer,
)
from surgery.cli.output import emit, table
from surgery.deploy.checkpoint import RECIPE, save
from surgery.deploy.cost import cost
from surgery.deploy.detectors import comparable
from surgery.deploy.outputs import refuse_folder
from surgery.deploy.units import mebibytes, quantity
from surgery.graph.tracing import example_inputs
from surgery.passes.apply import apply
from surgery.passes.deepen import deepen as deepen_module
from surgery.passes.recipe import recipe
from surgery.passes.slim import masked, split_masks
from surgery.passes.slim import slim as slim_module
from surgery.passes.verify import Verification, verify
from surgery.passes.widen import unwidened
from surgery.passes.widen import widen as widen_module

Out = Annotated[Path, typer.Option(metavar="DIR", help="The folder to write: recipe.json and weights.safetensors.")]
Check = Annotated[bool, typer.Option("--verify/--no-verify", help="Run both models and compare them before writing.")]
RoundTo = Annotated[int, typer.Option(help="Round numbers of channels up to a multiple of this.")]


def register(app: typer.Typer) -> None:
    """Add the verbs of this file to ``app``."""
    app.command(epilog="Example: surgery widen resnet18 --width 1.5 --out wide")(widen)
    app.command(epilog="Example: surgery deepen resnet18 --at layer3=2 --at layer1.0.conv1 --out deep")(deepen)
    app.command(epilog="Example: surgery slim resnet18 --rate 0.5 --out slim")(slim)


def widen(
    model: Model,
    out: Out,
    width: Annotated[
        list[str],
        typer.Option(
            metavar="WIDTH",
            help="A factor for the whole model (1.5); or, as often as you like, LAYER=FACTOR (layer3=2.0) or "
            "LAYER=CHANNELS (layer1.0.conv1=96).",
        ),
    ],
    round_to: RoundTo = 1,
    input_shape: InputShape = None,
    weights: Weights = "none",
    seed: Seed = 0,
    trust: Trust = False,
    check: Check = True,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Make a model wider without changing what it computes (Net2Net)."""
    refuse_folder(out, marker=RECIPE, force=force)
    wish = one_or_per_layer("--width", width, float, int_or_float)
    before = open_model(model, input_shape=input_shape, weights=weights, seed=seed, trust=trust)
    after = widen_module(before, wish, seed=seed, round_to=round_to)
    verified = None
    if check:  # in float64 all through: the means of a stream's channels are rounded to the weights' dtype
        exact = copy.deepcopy(before).double()
        verified = _compare(apply(exact, recipe(after).steps[len(recipe(before).steps) :]), exact)
    left = unwidened(before, wish, round_to=round_to)
    _finish(before, after, out, verified=verified, as_json=as_json, left=left)


def deepen(
    model: Model,
    out: Out,
    at: Annotated[
        list[str],
        typer.Option(metavar="PLACE", help="LAYER, or LAYER=COUNT, as often as you like: where to insert layers."),
    ],
    input_shape: InputShape = None,
    weights: Weights = "none",
    seed: Seed = 0,
    trust: Trust = False,
    check: Check = True,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Make a model deeper without changing what it computes (Net2Net)."""
    refuse_folder(out, marker=RECIPE, force=force)
    places = per_layer("--at", [item if "=" in item else f"{item}=1" for item in at], int)
    before = open_model(model, input_shape=input_shape, weights=weights, seed=seed, trust=trust)
    after = deepen_module(before, places, seed=seed)
    _finish(before, after, out, verified=_compare(after, before) if check else None, as_json=as_json)


def slim(
    model: Model,
    out: Out,
    rate: Annotated[
        list[str],
        typer.Option(
            metavar="RATE",
            help="The split rate, in (0, 1]: what is kept of every layer; or, as often as you like, LAYER=RATE.",
        ),
    ],
    round_to: RoundTo = 1,
    input_shape: InputShape = None,
    weights: Weights = "none",
    seed: Seed = 0,
    trust: Trust = False,
    check: Check = True,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Carve a slim model out of a dense one (KELS): the first channels of every layer.

    It is compared with the dense model whose other channels are switched off.
    """
    refuse_folder(out, marker=RECIPE, force=force)
    wish = one_or_per_layer("--rate", rate, float, float)
    before = open_model(model, input_shape=input_shape, weights=weights, seed=seed, trust=trust)
    after = slim_module(before, wish, round_to=round_to)
    verified = None
    if check:
        verified = _compare(after, masked(before, split_masks(before, wish, round_to=round_to)))
    _finish(before, after, out, verified=verified, as_json=as_json)


def _compare(after: nn.Module, expected: nn.Module) -> Verification:
    args, kwargs = example_inputs(after)
    both = (comparable(after), comparable(expected))
    check = verify(*both, args, kwargs=kwargs, dtype=torch.float64, tolerance=EXACT)
    return check.raise_if_different()


def _finish(
    before: nn.Module,
    after: nn.Module,
    out: Path,
    *,
    verified: Verification | None,
    as_json: bool,
    left: Mapping[str, str] | None = None,
) -> None:
    """Save what was made and say what it costs."""
    figures = {"before": cost(before), "after": cost(after)}
    save(after, out, force=True)  # what was there has been looked at before
    rows = [[name, quantity(c.params), quantity(c.macs), mebibytes(c.bytes)] for name, c in figures.items()]
    equal = f"verified in {verified.dtype}: relative difference {verified.max_rel:.1e}" if verified else "not verified"
    emit(
        {
            "out": str(out),
            **{name: c.to_dict() for name, c in figures.items()},
            "verification": verified.to_dict() if verified else None,
            **({} if left is None else {"left_alone": dict(left)}),
        },
        as_json,
        table("", ["", "parameters", "MACs an input", "size"], rows),
        note="\n".join([equal, *(f"left alone: {reason}" for reason in (left or {}).values()), f"saved to {out}"]),
    )
