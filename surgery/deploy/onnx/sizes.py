"""Compute the sizes to which images are resized in float64, as Python does.

Python multiplies a height by a quotient in float64 and takes the floor. TorchScript's record of torchvision's detection
models does so in float32, with the reciprocal instead of the quotient: an image of 800 pixels becomes 319 pixels high
instead of 320, and the detections differ.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

_ARITHMETIC = frozenset({"Div", "Floor", "Max", "Min", "Mul", "Reciprocal"})
_SHAPING = frozenset({"Concat", "Identity", "Squeeze", "Unsqueeze"})
_SIZES_INPUT = 3
"""Of the inputs of a Resize, the one that has the sizes."""


def sizes_in_float64(model: ir.Model) -> None:
    """Compute the floors in the sizes of each Resize in float64, with quotients, in place."""
    changed = False
    for resize in [node for node in model.graph if node.op_type == "Resize"]:
        if len(resize.inputs) > _SIZES_INPUT and (sizes := resize.inputs[_SIZES_INPUT]) is not None:
            for cast in list(_casts_to_integers(sizes)):
                nodes = _computing(cast)
                if nodes is not None and any(node.op_type == "Floor" for node in nodes):
                    _recompute(model.graph, nodes)
                    changed = True
    if changed:
        RemoveUnusedNodesPass()(model)  # ONNX Runtime prints a warning for each


def _casts_to_integers(sizes: ir.Value) -> Iterator[ir.Node]:
    """Yield the casts to integers that ``sizes`` is built from."""
    node = sizes.producer()
    if node is None:
        return
    if node.op_type == "Cast" and _cast_to(node) in (ir.DataType.INT64, ir.DataType.INT32):
        yield node
    elif node.op_type in _SHAPING:
        for value in node.inputs:
            if value is not None:
                yield from _casts_to_integers(value)


def _computing(cast: ir.Node) -> list[ir.Node] | None:
    """Find the nodes that compute, in float32 from integers and constants, what ``cast`` turns into integers.

    None if they compute it from anything else, or if another node reads their results.
    """
    found: dict[ir.Node, None] = {}
    stack = [cast.inputs[0]]
    while stack:
        value = stack.pop()
        node = value.producer() if value is not None else None
        if node is None:
            return None
        if node in found or node.op_type == "Constant":
            continue
        found[node] = None
        if node.op_type in _ARITHMETIC | _SHAPING:
            stack += node.inputs
        elif node.op_type != "Cast" or _cast_to(node) != ir.DataType.FLOAT:
            return None
        elif (made := node.inputs[0].producer() if node.inputs[0] else None) and made.op_type in _ARITHMETIC:
            stack += node.inputs
    readers, made_of = {cast, *found}, [value for node in found for value in node.outputs]
    if any(v.is_graph_output() or any(reader not in readers for reader, _ in v.uses()) for v in made_of):
        return None
    return list(found)


def _recompute(graph: ir.Graph, nodes: list[ir.Node]) -> None:
    for node in nodes:
        if node.op_type == "Cast":
            node.attributes["to"] = ir.AttrInt64("to", ir.DataType.DOUBLE)
        for place, value in enumerate(node.inputs):
            constant = _float32(value)
            if constant is not None:
                made = ir.node("Constant", [], {"value": ir.tensor(constant.astype(np.float64))})
                graph.insert_before(node, made)
                node.replace_input_with(place, made.outputs[0])
        for value in node.outputs:
            value.dtype = ir.DataType.DOUBLE
    for node in nodes:
        for place, value in enumerate(node.inputs if node.op_type == "Mul" else ()):
            inverse = value.producer() if value is not None else None
            if inverse is not None and inverse.op_type == "Reciprocal":
                quotient = ir.node("Div", [node.inputs[1 - place], inverse.inputs[0]])
                graph.insert_before(node, quotient)
                node.outputs[0].replace_all_uses_with(quotient.outputs[0])
                break


def _cast_to(node: ir.Node) -> int:
    return node.attributes["to"].as_int()


def _float32(value: ir.Value | None) -> np.ndarray | None:
    """Return the numbers of a float32 constant, else None."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "Constant" or "value" not in node.attributes:
        return None
    tensor = node.attributes["value"].as_tensor()
    return tensor.numpy() if tensor.dtype == ir.DataType.FLOAT else None
