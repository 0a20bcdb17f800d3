"""Verbs that look and change nothing: models, inspect, verify."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from surgery import models as catalogue
from surgery.axes.analysis import dimension_groups
from surgery.axes.groups import DimensionGroup
from surgery.cli.options import (
    EXACT,
    AsJson,
    InputShape,
    Model,
    Seed,
    Trust,
    Weights,
    open_model,
    open_pair,
    refuse_if_taken,
)
from surgery.cli.output import emit, table
from surgery.counting.cost import cost, weight_macs
from surgery.counting.group_cost import GroupCost, group_costs
from surgery.deploy.draw import draw
from surgery.edit.recipe import recipe
from surgery.errors import UsageError, unknown_name
from surgery.graph.tracing import example_inputs, info
from surgery.models.detectors import comparable
from surgery.operations.verify import verify as verify_modules
from surgery.units import counted, mebibytes, quantity


def register(app: typer.Typer) -> None:
    """Add the verbs of this file to ``app``."""
    app.command(epilog="Example: surgery models 'resnet*'")(models)
    app.command(epilog="Example: surgery inspect resnet50 --svg resnet50.svg")(inspect)
    app.command(epilog="Example: surgery verify resnet18 wide/")(verify)


def models(
    pattern: Annotated[str, typer.Argument(metavar="[PATTERN]", help="A glob over names, such as 'vgg*'.")] = "*",
    family: Annotated[
        str | None, typer.Option(metavar="FAMILY", help="Only one family, or a glob over families: 'swin*'.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the models known by name, what they are called with, and what is published of them."""
    known = {**catalogue.CATALOGUE, **catalogue.FITNETS}
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
    listing = table(counted(len(rows), "model"), header, cells, text=["family", "notes"], left=["input"])
    emit({"models": rows}, as_json, listing)


def _published(entry: catalogue.Entry) -> dict[str, Any]:
    if entry.name in catalogue.FITNETS:
        params, macs = catalogue.fitnet_cost(entry.name)
        meta: Mapping[str, Any] = {"num_params": params, "_ops": macs / 1e9, "_metrics": {}}
    else:
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
    why: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="A B", help="Show the ops that tie two layers, or parameters' axes: fc.weight[1]."),
    ] = None,
    svg: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the groups into an SVG file.")] = None,
    input_shape: InputShape = None,
    weights: Weights = "none",
    seed: Seed = 0,
    trust: Trust = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the SVG file if it exists.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what a model costs, which of its axes must change together, and what each such group carries.

    A group carries the parameters, and their MACs, that lie at its channels along any axis. A weight lies between two
    groups and counts for both.
    """
    if svg is not None:
        refuse_if_taken(svg, force)
    traced = open_model(model, input_shape=input_shape, weights=weights, seed=seed, trust=trust)
    groups = dimension_groups(traced)
    if why is not None:
        _show_path(groups, *why, as_json)
        return
    figures, macs = cost(traced), weight_macs(traced)
    costs = group_costs(traced, groups, macs)
    if group is not None:
        found = _find(groups, group)
        _show_members(found, costs[found.name], as_json)
        return
    editable = sum(g.editable for g in groups)
    said = (
        f"{quantity(figures.params)} parameters, {quantity(figures.macs)} MACs an input, {mebibytes(figures.bytes)}; "
        f"{editable} of {counted(len(groups), 'group')} editable"
    )
    source = info(traced).source
    if svg is not None:
        _write(svg, draw(traced, groups, costs, macs, title=f"Dimension groups of {source or model}", subtitle=said))
    result = {
        "source": source,
        **figures.to_dict(),
        "steps": len(recipe(traced).steps),
        "macs_of_no_weight": macs.get("", 0),
        "svg": None if svg is None else str(svg),
        "groups": [_group(g, costs[g.name]) for g in groups],
    }
    header = ["group", "size", "units", "members", "parameters", "MACs", "editable"]
    rows = [
        [g.name, g.size, g.units, len(g.members), *_quantities(costs[g.name]), "yes" if g.editable else "no"]
        for g in groups
    ]
    frozen = [[g.name, _briefly(g.reason)] for g in groups if not g.editable]
    reasons = [table("", ["not editable", "because"], frozen, text=["because"])] if frozen else []
    drawn = "" if svg is None else f"\ndrawn to {svg}"
    emit(result, as_json, table("", header, rows, left=["editable"]), *reasons, note=said + drawn)


def _group(group: DimensionGroup, carried: GroupCost) -> dict[str, Any]:
    return {
        "name": group.name,
        "size": group.size,
        "units": group.units,
        "params": carried.params,
        "macs": carried.macs,
        "editable": group.editable,
        "reason": group.reason,
        "members": [{"name": m.name, "axis": m.axis, "role": m.role} for m in group.members],
    }


def _briefly(reason: str) -> str:
    """Of clauses that say the same of several layers, the first ``LAYER says so``, and how many more there are."""
    clauses = reason.split("; ")
    kinds: dict[str, str] = {}
    for clause in clauses:
        kinds.setdefault(clause.partition(" ")[2], clause)
    more = len(clauses) - len(kinds)
    return "; ".join([*kinds.values(), *([f"and {more} more"] if more else [])])


def _quantities(carried: GroupCost) -> tuple[str, str]:
    return quantity(carried.params), quantity(carried.macs)


def _write(file: Path, text: str) -> None:
    if not file.absolute().parent.is_dir():
        raise UsageError(f"cannot write {file}: there is no folder {file.absolute().parent}")
    file.write_text(text, encoding="utf-8")


def _find(groups: list[DimensionGroup], layer: str) -> DimensionGroup:
    """The group named after ``layer``, or else the one it produces for."""
    named = {m.layer: g for g in groups for m in g.members if m.role == "producer"} | {g.name: g for g in groups}
    if layer not in named:
        raise unknown_name("group", layer, named)
    return named[layer]


def _show_members(group: DimensionGroup, carried: GroupCost, as_json: bool) -> None:
    rows = [[m.name, m.axis, m.role] for m in group.members]
    params, macs = _quantities(carried)
    size = f"{counted(group.size, 'channel')}, {counted(group.units, 'unit')}"
    title = f"{group.name}: {size}, {params} parameters, {macs} MACs"
    emit(
        _group(group, carried),
        as_json,
        table(title, ["member", "axis", "role"], rows, left=["role"]),
        note=group.reason,
    )


def _show_path(groups: list[DimensionGroup], a: str, b: str, as_json: bool) -> None:
    """The ops between two members of one group; a `UsageError` where no group has both."""
    holds = {name: [g for g in groups if name in _names(g)] for name in (a, b)}
    for name, found in holds.items():
        if not found:
            raise unknown_name("layer", name, {n for g in groups for n in _names(g)})
    both = [g for g in holds[a] if g in holds[b]]
    if not both:
        of_a, of_b = (", ".join(g.name for g in holds[name]) for name in (a, b))
        raise UsageError(f"nothing ties {a} to {b}: the first is in {of_a}, the second in {of_b}")
    paths = {g.name: g.why(a, b) for g in both}
    tables = [
        table(f"{a} and {b} share {name}", ["path"], [[step] for step in path], text=["path"])
        for name, path in paths.items()
    ]
    emit({"a": a, "b": b, "paths": paths}, as_json, *tables)


def _names(group: DimensionGroup) -> set[str]:
    return {name for m in group.members for name in (str(m), m.name, m.layer)}


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
    both = (comparable(first), comparable(second))
    check = verify_modules(*both, args, kwargs=kwargs, dtype=torch.float64, tolerance=tolerance)
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
