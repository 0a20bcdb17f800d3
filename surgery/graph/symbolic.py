"""What stands in for Python's own functions while a model is traced, so that they leave nodes in its graph."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from surgery.graph.hooks import packages_of
from surgery.graph.rule_table import ruled_functions
from surgery.graph.tracer import LEAF, SizeProxy, Tracer

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


class _NumberType(type):
    """The type of what stands in for ``int`` and ``float``: a class, for Python also asks ``isinstance(x, int)``."""

    original: type
    tracer: Tracer

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and isinstance(args[0], SizeProxy) and not cls.tracer.values.busy:
            return cls.tracer.converted(cls.original, args[0])
        return cls.original(*args, **kwargs)

    def __instancecheck__(cls, value: Any) -> bool:
        if isinstance(value, SizeProxy):
            return cls.tracer.is_number(value, cls.original)
        return isinstance(value, cls.original)

    def __subclasscheck__(cls, other: type) -> bool:
        return issubclass(other, cls.original)

    def __eq__(cls, other: object) -> bool:
        return other is cls.original or other is cls

    def __hash__(cls) -> int:
        return hash(cls.original)

    def __getattr__(cls, name: str) -> Any:
        return getattr(cls.original, name)


@contextmanager
def symbolic_conversions(modules: Iterable[dict[str, Any]], tracer: Tracer) -> Iterator[None]:
    """While tracing, ``int(size / 2)`` is a node of the graph, and not the number that it is for the example.

    Args:
        modules: the names of the Python modules where ``int``, ``float`` and ``round`` are to do that.
    """

    def rounded(number: Any, ndigits: Any = None) -> Any:
        if isinstance(number, SizeProxy) and not tracer.values.busy:
            return tracer.converted(round, number, *(() if ndigits is None else (ndigits,)))
        return round(number, ndigits)

    stand_ins: dict[str, Any] = {
        cls.__name__: _NumberType(cls.__name__, (), {"original": cls, "tracer": tracer}) for cls in (int, float)
    }
    stand_ins["round"] = rounded
    own = [(names, {name: names[name] for name in stand_ins if name in names}) for names in modules]
    try:
        for names, kept in own:
            names.update({name: value for name, value in stand_ins.items() if name not in kept})
        yield
    finally:
        for names, kept in own:
            for name in stand_ins.keys() - kept.keys():
                del names[name]


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
