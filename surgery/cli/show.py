"""Verbs that look and change nothing: models, inspect, verify."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Annotated, Any

import torch
import typer

from surgery import catalogue
from surgery.cli.options import EXACT, AsJson, InputShape, Model, Seed, Trust, Weights, open_model, open_pair
from surgery.cli.output import emit, table
from surgery.deploy.cost import cost
from surgery.deploy.units import mebibytes, quantity
from surgery.errors import unknown_name
from surgery.graph.dims import DimensionGroup, dimension_groups
from surgery.graph.tracing import example_inputs, info
from surgery.passes.recipe import recipe
from surgery.passes.verify import verify as verify_modules


def register(app: typer.Typer) -> None:
    """Add the verbs of this file to ``app``."""
    app.command(epilog="Example: surgery models 'resnet*'")(models)
    app.command(epilog="Example: surgery inspect resnet50 --group layer3.0.conv1")(inspect)
    app.command(epilog="Example: surgery verify resnet18 wide/")(verify)


def models(
    pattern: Annotated[str, typer.Argument(metavar="[PATTERN]", help="A glob over names, such as 'vgg*'.")] = "*",
    family: Annotated[
        str | None, typer.Option(metavar="FAMILY", help="Only one family, or a glob over families: 'swin*'.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the models known by name, what they are called with, and what torchvision publishes of them."""
    known = catalogue.CATALOGUE
    if family is not None:
        families = {entry.family for entry in known.values()}
        known = {n: e for n, e in known.items() if fnmatchcase(e.family.lower(), family.lower())}
        if not known:
            raise unknown_name("family", family, families)
    entries = [entry for entry in known.values() if fnmatchcase(entry.name, pattern)]
    if not entries:
        raise unknown_name("model", pattern, known)
    rows = [_published(entry) for entry in entries]
    cells = [
        [r["name"], r["family"], r["input"], quantity(r["params"]), quantity(1e9 * r["gmacs"]), r["score"], r["notes"]]
        for r in rows
    ]
    header = ["name", "family", "input", "parameters", "MACs", "published", "notes"]
    listing = table(f"{len(rows)} models", header, cells, text=["family", "input", "notes"])
    emit({"models": rows}, as_json, listing)


def _published(entry: catalogue.Entry) -> dict[str, Any]:
    meta = catalogue.published(entry.name)["DEFAULT"].meta
    return {
        "name": entry.name,
        "family": entry.family,
        "kind": entry.kind,
        "input": f"{entry.kind} {'x'.join(map(str, entry.input_size))}",
        "input_size": list(entry.input_size),
        "params": meta["num_params"],
        "gmacs": meta["_ops"],
        "metrics": meta["_metrics"],
        "score": _score(meta["_metrics"]),
        "notes": entry.notes,
    }


_SCORES = {"acc@1": "{:.1f}% top-1", "miou": "{:.1f} mIoU", "box_map": "{:.1f} box mAP", "epe": "{:.2f} px"}
"""The metrics of torchvision that a table shows, the first of them that there is."""


def _score(metrics: Mapping[str, Mapping[str, float]]) -> str:
    figures = {name: value for of_data in reversed(list(metrics.values())) for name, value in of_data.items()}
    return next((form.format(figures[name]) for name, form in _SCORES.items() if name in figures), "")


def inspect(
    model: Model,
    group: Annotated[str | None, typer.Option(metavar="LAYER", help="Show one group, member by member.")] = None,
    input_shape: InputShape = None,
    weights: Weights = "none",
    seed: Seed = 0,
    trust: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Show what a model costs and which of its axes must change together."""
    traced = open_model(model, input_shape=input_shape, weights=weights, seed=seed, trust=trust)
    figures = cost(traced)
    groups = dimension_groups(traced)
    result = {
        "source": info(traced).source,
        **figures.to_dict(),
        "steps": len(recipe(traced).steps),
        "groups": [_group(g) for g in groups],
    }
    if group is not None:
        _show_members(_find(groups, group), as_json)
        return
    rows = [[g.name, g.size, g.units, len(g.members), "yes" if g.editable else "no", g.reason] for g in groups]
    editable = sum(g.editable for g in groups)
    emit(
        result,
        as_json,
        table("", ["group", "size", "units", "members", "editable", "reason"], rows, text=["editable", "reason"]),
        note=f"{quantity(figures.params)} parameters, {quantity(figures.macs)} MACs an input, "
        f"{mebibytes(figures.bytes)}; {editable} of {len(groups)} groups editable",
    )


def _group(group: DimensionGroup) -> dict[str, Any]:
    return {
        "name": group.name,
        "size": group.size,
        "units": group.units,
        "editable": group.editable,
        "reason": group.reason,
        "members": [{"name": m.name, "axis": m.axis, "role": m.role} for m in group.members],
    }


def _find(groups: list[DimensionGroup], layer: str) -> DimensionGroup:
    """The group named after ``layer``, or else the one it produces for."""
    named = {m.layer: g for g in groups for m in g.members if m.role == "producer"} | {g.name: g for g in groups}
    if layer not in named:
        raise unknown_name("group", layer, named)
    return named[layer]


def _show_members(group: DimensionGroup, as_json: bool) -> None:
    rows = [[m.name, m.axis, m.role] for m in group.members]
    title = f"{group.name}: {group.size} channels, {group.units} units"
    emit(_group(group), as_json, table(title, ["member", "axis", "role"], rows, text=["role"]), note=group.reason)


def verify(
    model: Model,
    reference: Annotated[str, typer.Argument(metavar="REFERENCE", help="What MODEL is compared with.")],
    tolerance: Annotated[float, typer.Option(help="Largest relative difference that passes, in float64.")] = EXACT,
    input_shape: InputShape = None,
    weights: Weights = "none",
    seed: Seed = 0,
    trust: Trust = False,
    as_json: AsJson = False,
) -> None:
    """Check that two models compute the same; exit with 1 if they do not."""
    first, second = open_pair(model, reference, input_shape=input_shape, weights=weights, seed=seed, trust=trust)
    args, kwargs = example_inputs(first)
    check = verify_modules(first, second, args, kwargs=kwargs, dtype=torch.float64, tolerance=tolerance)
    rows = [[check.dtype, f"{check.max_abs:.2e}", f"{check.max_rel:.2e}", f"{check.tolerance:.0e}"]]
    said = "the same" if check.ok else "different"
    emit(
        check.to_dict(),
        as_json,
        table("", ["in", "largest difference", "relative", "allowed"], rows),
        note=f"{model} and {reference} are {said}",
    )
    if not check.ok:
        check.raise_if_different()
