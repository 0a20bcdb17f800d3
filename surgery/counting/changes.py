"""Compare two versions of a model: the steps between them, layers and their shapes, and costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from surgery.axes.frozen import Unedited
from surgery.axes.groups import Member
from surgery.counting.cost import Cost, cost
from surgery.counting.unedited import unedited
from surgery.edit.kept_outputs import Output, outputs
from surgery.edit.recipe import recipe
from surgery.graph.traced import info
from surgery.units import mebibytes, quantity

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layer:
    """A layer that has parameters, or a parameter outside any layer."""

    name: str
    """Qualified name."""
    kind: str
    """Name of its class."""
    shapes: Mapping[str, Shape]
    """Shapes of its parameters, by their names in the layer."""
    in_channels: int | None
    out_channels: int | None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data."""
        return {**vars(self), "shapes": {name: list(shape) for name, shape in self.shapes.items()}}


@dataclass(frozen=True)
class Changes:
    """The difference between two versions of a model; ``str()`` gives a summary, the steps, and a table of layers."""

    header: ClassVar = ("layer", "class", "in", "out", "shape")
    """The names of the cells of `rows`."""

    cost: tuple[Cost, Cost]
    """What one sample costs, before and after."""
    changed: tuple[tuple[Layer, Layer], ...]
    """Layers whose parameters have other shapes, before and after."""
    added: tuple[Layer, ...]
    removed: tuple[Layer, ...]
    steps: tuple[str, ...] = ()
    """The steps from one to the other, each in one line; empty where one was not made from the other."""
    unedited: Unedited | None = None
    """What of the first cannot be edited (`surgery.unedited`)."""
    outputs: tuple[Output, ...] = ()
    """The outputs of the second whose channels are others than those of the first."""

    def rows(self) -> list[tuple[str, ...]]:
        """Return for each layer the cells that `header` names; the shape is of the first parameter that differs."""
        return [
            *(_row(before, after) for before, after in self.changed),
            *(_row(None, layer) for layer in self.added),
            *(_row(layer, None) for layer in self.removed),
        ]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON data."""
        before, after = (c.to_dict() for c in self.cost)
        return {
            "before": before,
            "after": after,
            "changed": [{"before": old.to_dict(), "after": new.to_dict()} for old, new in self.changed],
            "added": [layer.to_dict() for layer in self.added],
            "removed": [layer.to_dict() for layer in self.removed],
            "steps": list(self.steps),
            "unedited": None if self.unedited is None else self.unedited.to_dict(),
            "outputs": [output.to_dict() for output in self.outputs],
        }

    def summary(self) -> str:
        """Write the numbers of layers and the costs in one line."""
        before, after = self.cost
        return (
            f"layers: {len(self.changed)} changed, {len(self.added)} added, {len(self.removed)} removed; "
            f"parameters {quantity(before.params)} -> {quantity(after.params)}, "
            f"MACs an input {quantity(before.macs)} -> {quantity(after.macs)}, "
            f"size {mebibytes(before.bytes)} -> {mebibytes(after.bytes)}"
        )

    def __str__(self) -> str:
        rows = [self.header, *self.rows()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)
        changed = (f"output {output}" for output in self.outputs)
        return "\n".join([self.summary(), *self.steps, *changed, *(line.rstrip() for line in lines if self.rows())])


def changes(before: nn.Module, after: nn.Module) -> Changes:
    """Compare two versions of a traced module by their shapes; nothing is run.

    Args:
        before: a traced module.
        after: what an operation made of it.

    Returns:
        what differs, and the steps that lead from one to the other.

    Raises:
        UsageError: one of them is not traced.

    Example:
        >>> print(surgery.changes(traced, surgery.widen(traced, 1.5)))  # a dry run
    """
    old, new = layers(before), layers(after)
    first, steps = recipe(before).steps, recipe(after).steps
    same = info(before).kept == info(after).kept
    return Changes(
        cost=(cost(before), cost(after)),
        changed=tuple((old[n], new[n]) for n in new if n in old and old[n].shapes != new[n].shapes),
        added=tuple(layer for name, layer in new.items() if name not in old),
        removed=tuple(layer for name, layer in old.items() if name not in new),
        steps=tuple(map(str, steps[len(first) :])) if steps[: len(first)] == first else (),
        unedited=unedited(before),
        outputs=() if same else tuple(output for output in outputs(after) if output not in outputs(before)),
    )


def layers(module: nn.Module) -> dict[str, Layer]:
    """Find the layers of a module that have parameters, by qualified name."""
    shapes: dict[str, dict[str, Shape]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        layer = Member(name, 0, "").layer
        shapes.setdefault(layer, {})[name.removeprefix(f"{layer}.") if name != layer else ""] = tuple(parameter.shape)
    modules = dict(module.named_modules(remove_duplicate=False))
    return {name: _layer(name, modules.get(name), held) for name, held in shapes.items()}


def _layer(name: str, module: nn.Module | None, shapes: Mapping[str, Shape]) -> Layer:
    read, written = (
        next((size for name in names if isinstance(size := getattr(module, name, None), int)), None)
        for names in (("in_channels", "in_features"), ("out_channels", "out_features"))
    )
    return Layer(name, "Parameter" if module is None else type(module).__name__, shapes, read, written)


def _row(before: Layer | None, after: Layer | None) -> tuple[str, ...]:
    both = before, after
    named = next(layer for layer in both if layer is not None)
    shapes = [{} if layer is None else layer.shapes for layer in both]
    first = next(name for name in named.shapes if shapes[0].get(name) != shapes[1].get(name))
    return (
        named.name,
        named.kind,
        _cell([layer and layer.in_channels for layer in both]),
        _cell([layer and layer.out_channels for layer in both]),
        _cell([layer and "x".join(map(str, layer.shapes.get(first, ()))) for layer in both], ("added", "removed")),
    )


def _cell(values: Sequence[object], alone: tuple[str, str] = ("", "")) -> str:
    """Write ``"64 -> 96"``; one value if both are equal or one layer is missing."""
    before, after = values
    if before is None:
        return "" if after is None else f"{after} {alone[0]}".strip()
    if after is None:
        return f"{before} {alone[1]}".strip()
    return str(after) if before == after else f"{before} -> {after}"
