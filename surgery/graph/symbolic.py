"""What stands in for Python's own functions while a model is traced, so that they leave nodes in its graph."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from surgery.graph.hooks import packages_of
from surgery.graph.rule_table import ruled_functions
from surgery.graph.tracer import LEAF, Tracer

_FACTORIES = (
    "zeros",
    "ones",
    "full",
    "empty",
    "rand",
    "randn",
    "arange",
    "linspace",
    "tensor",
    "as_tensor",
    "finfo",
    "iinfo",
)
"""Functions of torch that take sizes or dtypes rather than tensors: fx does not see them by itself."""


@contextmanager
def symbolic_factories(tracer: Tracer) -> Iterator[None]:
    """While tracing, making a tensor of a size that the graph computes is a node of the graph."""

    original = {name: getattr(torch, name) for name in _FACTORIES}
    try:
        for name, function in original.items():
            setattr(torch, name, _symbolic(function, tracer))
        yield
    finally:
        for name, function in original.items():
            setattr(torch, name, function)


Places = list[tuple[dict[str, Any], str, FunctionType]]
"""Where a function is known by name: the names of a Python module, its own, and the function."""


def find_ruled_functions(root: nn.Module) -> Places:
    """Where Python functions that have a rule are known by name: in modules of their packages or of a layer's. torch's
    own functions need no help."""
    functions = {f for f in ruled_functions() if isinstance(f, FunctionType) and not f.__module__.startswith("torch.")}
    packages = {f.__module__.partition(".")[0] for f in functions} - {"surgery"} | packages_of(root)
    return [
        (module.__dict__, name, value)
        for path, module in list(sys.modules.items())
        if path.partition(".")[0] in packages and hasattr(module, "__dict__")
        for name, value in list(module.__dict__.items())
        if isinstance(value, FunctionType) and value in functions
    ]


@contextmanager
def symbolic_functions(places: Places, tracer: Tracer) -> Iterator[None]:
    """While tracing, calling a Python function that has a rule is a node of the graph, wherever it is known by name."""
    wrapped = {function: _symbolic(function, tracer) for _, _, function in places}
    try:
        for names, name, function in places:
            names[name] = wrapped[function]
        yield
    finally:
        for names, name, function in places:
            names[name] = function


def _symbolic(function: Any, tracer: Tracer) -> Any:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not tracer.values.busy and any(isinstance(v, fx.Proxy) for v in pytree.tree_leaves((args, kwargs))):
            return tracer.create_proxy("call_function", function, args, kwargs)
        return function(*args, **kwargs)

    setattr(call, LEAF, function)
    return call


@contextmanager
def symbolic_modes(root: nn.Module, tracer: Tracer) -> Iterator[None]:
    """While tracing, reading ``training`` of a module that is traced through gives a node of the graph."""
    original: dict[nn.Module, type[nn.Module]] = {}
    flag = property(lambda module: tracer.training_flag(module), _set_flag)
    for name, module in root.named_modules():
        if not name or not tracer.is_leaf_module(module, name):
            original[module] = type(module)
    flags = {module: module.__dict__.pop("training") for module in original}
    patched: dict[type, type] = {}
    try:
        for module, cls in original.items():
            if cls not in patched:
                patched[cls] = type(cls.__name__, (cls,), {"training": flag, "__module__": cls.__module__})
            module.__class__ = patched[cls]
        yield
    finally:
        for module, cls in original.items():
            module.__class__ = cls
            module.__dict__["training"] = flags[module]


def _set_flag(module: nn.Module, training: bool) -> None:
    """For a module that is made while tracing, such as a slice of a `ModuleList`."""
    module.__dict__["training"] = training
