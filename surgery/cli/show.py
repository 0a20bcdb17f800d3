"""Verbs that look and change nothing: models, inspect, verify."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

import surgery
from surgery.cli.fields import takes_fields
from surgery.cli.options import EXACT, AsJson, Model, Opening, complete_model, refuse_if_taken
from surgery.cli.output import emit, table
from surgery.cli.tables import Table
from surgery.errors import UsageError, unknown_name
from surgery.units import counted, mebibytes, quantity


def register(app: typer.Typer) -> None:
    """Add the verbs of this file to ``app``."""
    app.command(epilog="Example: surgery models 'resnet*'")(models)
    app.command(epilog="Example: surgery inspect resnet50 --svg resnet50.svg")(inspect)
    app.command(epilog="Example: surgery verify resnet18 wide/")(verify)


def models(
    pattern: Annotated[str, typer.Argument(metavar="PATTERN", help="A glob over names, such as 'vgg*'.")] = "*",
    family: Annotated[
        str | None, typer.Option(metavar="FAMILY", help="Only one family, or a glob over families: 'swin*'.")
    ] = None,
    library: Annotated[
        str | None, typer.Option(metavar="NAME", help="The models of another library: hf (transformers) or timm.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the models known by name, with their inputs and their published figures."""
    known = surgery.models.list_models(pattern, family, library)
    notes: dict[str, list[str]] = {}
    for one in known:
        if one.entry.notes:
            notes.setdefault(one.entry.notes, []).append(one.entry.name)
    said = "\n".join(f"{text}: {', '.join(names)}" for text, names in notes.items())
    emit({"models": [one.to_dict() for one in known]}, as_json, *_listing(known), note=said)


def _listing(known: Sequence[surgery.models.KnownModel]) -> Iterator[Table]:
    """Yield a table for each kind of input, in which the models of a family stand below its name."""
    for kind in dict.fromkeys(one.entry.kind for one in known):
        rows: list[list[str]] = []
        family = ""
        for one in (one for one in known if one.entry.kind == kind):
            if one.entry.family != family:
                family = one.entry.family
                rows.append([f"{family}:", "", "", "", ""])
            size = "x".join(map(str, one.entry.input_size[1:] or one.entry.input_size))
            params = "" if one.params is None else quantity(one.params)
            macs = "" if one.gmacs is None else quantity(1e9 * one.gmacs)
            rows.append([one.entry.name, size, params, macs, one.score])
        title = f"{counted(sum(one.entry.kind == kind for one in known), 'model')}, input: {kind}"
        yield table(title, ["name", "size", "params", "MACs", "published"], rows)


@takes_fields()
def inspect(
    model: Model,
    group: Annotated[str | None, typer.Option(metavar="LAYER", help="Show one group, member by member.")] = None,
    why: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="A B", help="Show the ops that tie two layers, or parameters' axes: fc.weight[1]."),
    ] = None,
    svg: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the groups into an SVG file.")] = None,
    *,
    opening: Opening,
    force: Annotated[bool, typer.Option("--force", help="Replace the SVG file if it exists.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show a model's cost, its dimension groups, and the cost that each group carries.

    The axes of a group must change together. A group carries the parameters at its channels, along any axis, and their
    MACs. A weight lies between two groups and counts for both.
    """
    if svg is not None:
        refuse_if_taken(svg, force)
    traced = opening.open(model)
    groups = surgery.dimension_groups(traced)
    if why is not None:
        _show_path(groups, *why, as_json)
        return
    figures, macs = surgery.cost(traced), surgery.weight_macs(traced)
    costs = surgery.group_costs(traced, groups, macs)
    if group is not None:
        found = _find(groups, group)
        _show_members(found, costs[found.name], as_json)
        return
    editable, held = sum(g.editable for g in groups), surgery.held_back(traced)
    said = (
        f"{quantity(figures.params)} parameters, {quantity(figures.macs)} MACs an input, {mebibytes(figures.bytes)}; "
        f"{editable} of {counted(len(groups), 'group')} editable"
    )
    source = surgery.recipe(traced).source
    if svg is not None:
        _write(
            svg,
            surgery.draw_groups(
                traced, groups, costs, macs, title=f"Dimension groups of {source or model}", subtitle=said
            ),
        )
    result = {
        "source": source,
        **figures.to_dict(),
        "steps": len(surgery.recipe(traced).steps),
        "macs_of_no_weight": macs.get("", 0),
        "svg": None if svg is None else str(svg),
        "groups": [_group(g, costs[g.name]) for g in groups],
        "held_back": [one.to_dict() for one in held],
    }
    header = ["group", "size", "units", "members", "parameters", "MACs", "editable"]
    rows = [
        [g.name, g.size, g.units, len(g.members), *_quantities(costs[g.name]), "yes" if g.editable else "no"]
        for g in groups
    ]
    frozen = [[g.name, _briefly(g.reason)] for g in groups if not g.editable]
    reasons = [table("", ["not editable", "because"], frozen, text=["because"])] if frozen else []
    reasons = [*_why_held(held), *reasons]
    drawn = "" if svg is None else f"\ndrawn to {svg}"
    emit(result, as_json, table("", header, rows, left=["editable"]), *reasons, note=said + drawn)


def _group(group: surgery.DimensionGroup, carried: surgery.GroupCost) -> dict[str, Any]:
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


def _why_held(held: Sequence[surgery.HeldBack]) -> Iterator[Table]:
    """Yield a table of what cannot be edited, by reason, the largest part of the work first."""
    rows = [
        [f"{one.macs:.1%}", f"{one.reason}{f', and {one.more} more' if one.more else ''}", one.channels, one.line]
        for one in held
    ]
    total = sum(one.macs for one in held)
    if rows:
        header = ["MACs", "held back because", "channels", "line"]
        yield table(f"{total:.1%} of the MACs lie at channels that cannot be edited", header, rows, text=header[1::2])


def _briefly(reason: str) -> str:
    """Shorten a reason: of clauses that say the same of several layers, keep the first and count the others."""
    clauses = reason.split("; ")
    kinds: dict[str, str] = {}
    for clause in clauses:
        kinds.setdefault(clause.partition(" ")[2], clause)
    more = len(clauses) - len(kinds)
    return "; ".join([*kinds.values(), *([f"and {more} more"] if more else [])])


def _quantities(carried: surgery.GroupCost) -> tuple[str, str]:
    return quantity(carried.params), quantity(carried.macs)


def _write(file: Path, text: str) -> None:
    if not file.absolute().parent.is_dir():
        raise UsageError(f"cannot write {file}: there is no folder {file.absolute().parent}")
    file.write_text(text, encoding="utf-8")


def _find(groups: list[surgery.DimensionGroup], layer: str) -> surgery.DimensionGroup:
    """Find the group named after ``layer``, or else the one that it produces for."""
    named = {m.layer: g for g in groups for m in g.members if m.role == "producer"} | {g.name: g for g in groups}
    if layer not in named:
        raise unknown_name("group", layer, named)
    return named[layer]


def _show_members(group: surgery.DimensionGroup, carried: surgery.GroupCost, as_json: bool) -> None:
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


def _show_path(groups: list[surgery.DimensionGroup], a: str, b: str, as_json: bool) -> None:
    """Print the ops between two members of one group; raise `UsageError` where no group has both."""
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


def _names(group: surgery.DimensionGroup) -> set[str]:
    return {name for m in group.members for name in (str(m), m.name, m.layer)}


@takes_fields()
def verify(
    model: Model,
    reference: Annotated[
        str, typer.Argument(metavar="REFERENCE", help="The model to compare MODEL with.", autocompletion=complete_model)
    ],
    tolerance: Annotated[float, typer.Option(help="Largest relative difference that passes, in float64.")] = EXACT,
    *,
    opening: Opening,
    as_json: AsJson = False,
) -> None:
    """Check that two models compute the same; exit with 1 if they do not."""
    first, second = opening.open_pair(model, reference)
    import torch

    args, kwargs = surgery.example_inputs(first)
    both = (surgery.comparable(first), surgery.comparable(second))
    check = surgery.verify(*both, args, kwargs=kwargs, dtype=torch.float64, tolerance=tolerance)
    rows = [[check.dtype, f"{check.max_abs:.2e}", f"{check.max_rel:.2e}", f"{check.tolerance:.0e}"]]
    said = "the same" if check.ok else "not shown to be the same" if check.problem else "different"
    emit(
        check.to_dict(),
        as_json,
        table("", ["in", "largest difference", "relative", "allowed"], rows),
        note=f"{model} and {reference} are {said}",
    )
    if not check.ok:
        check.raise_if_different()
