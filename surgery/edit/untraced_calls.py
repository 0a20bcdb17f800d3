"""Layers that Python outside the graphs calls: their attributes follow an edit as if a node called them."""

from __future__ import annotations

from torch import nn

from surgery.axes.analysis import Analysis
from surgery.axes.labels import Labelled
from surgery.edit.layout import Layouts
from surgery.graph.rule_table import NodeEdit


def follow_untraced_calls(module: nn.Module, analysis: Analysis, layouts: Layouts) -> None:
    """Let the attributes of the layers that Python outside the graphs calls follow their new tensors."""
    for call in {call.path: call for call in analysis.calls}.values():
        layer = module.get_submodule(call.path)
        held = [
            analysis.axis_units.get((f"{call.path}.{name}".lstrip("."), axis))
            for name, tensor in layer.named_parameters(remove_duplicate=False)
            for axis in range(tensor.ndim)
        ]
        held += [analysis.unit_of[f.ids] for label in call.labels for f in label.fields]
        if all(units is None or layouts.of(units) is None for units in held):
            continue
        call.rewrite(
            NodeEdit(
                node=call.node,
                module=layer,
                shapes=tuple(layouts.shape(out) for out in call.outs),
                changed=frozenset(),
                inputs=tuple(layouts.shape(v) if isinstance(v, Labelled) else None for v in call.args),
                computed={},
                copies={},
                tensors={},
                read={},
                sources={},
                old=tuple(out.shape for out in call.outs),
            )
        )
