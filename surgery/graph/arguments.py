"""The arguments of one call of a module's ``forward``, by name."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from surgery.errors import UsageError

_STARS: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}


@dataclass(frozen=True)
class Arguments:
    """The parameters of a ``forward`` in one call, by name; ``*args`` and ``**kwargs`` with their stars."""

    values: dict[str, Any]
    constants: dict[str, Any]
    """Those that hold no tensor: constants of the graph, guarded by it."""
    signature: inspect.Signature
    passed: frozenset[str]
    """Those that the call names; the others have their defaults."""
    positional: int
    """How many of the first parameters are given by position."""

    @property
    def batch(self) -> int:
        """The batch size: the length of the first tensor; 0 without one."""
        tensors = [v for v in pytree.tree_leaves(self.values) if isinstance(v, torch.Tensor) and v.ndim]
        return tensors[0].shape[0] if tensors else 0

    def with_batch(self, size: int) -> Arguments:
        """The same call on ``size`` samples, in shapes alone."""
        batch = self.batch

        def resize(tensor: torch.Tensor) -> torch.Tensor:
            twin = tensor.detach().to("meta")
            return twin.new_empty(size, *twin.shape[1:]) if twin.ndim and twin.shape[0] == batch else twin

        return replace(self, values=pytree.tree_map_only(torch.Tensor, resize, self.values))

    def call(self, values: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Positional and named arguments of the same call with other values.

        What has its default is not passed: a decorator may look at which arguments there are.
        """
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for place, (name, parameter) in enumerate(self.signature.parameters.items()):
            value = values[_STARS.get(parameter.kind, "") + name]
            if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
                args.extend(value)
            elif parameter.kind is inspect.Parameter.VAR_KEYWORD:
                kwargs.update({key: value[key] for key in value.keys()})  # noqa: SIM118 (of a proxy)
            elif name not in self.passed:
                continue
            elif place < self.positional and parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
                args.append(value)
            else:
                kwargs[name] = value
        return args, kwargs


def bound_arguments(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """The call ``model(*args, **kwargs)`` by the names of the parameters.

    Raises:
        UsageError: ``forward`` does not take these arguments.
    """
    try:
        signature = inspect.signature(model.forward)
        bound = signature.bind(*args, **kwargs)
    except (TypeError, ValueError) as error:
        try:  # a decorator may fill in what the function that it wraps needs
            signature = inspect.signature(model.forward, follow_wrapped=False)
            bound = signature.bind(*args, **kwargs)
        except (TypeError, ValueError):
            raise UsageError(f"example_inputs do not fit {type(model).__name__}.forward: {error}") from error
    passed = frozenset(bound.arguments)
    bound.apply_defaults()
    stars = {name: _STARS.get(p.kind, "") for name, p in signature.parameters.items()}
    constants = {
        name: value
        for name, value in bound.arguments.items()
        if not stars[name]
        and (name not in passed or not any(isinstance(v, torch.Tensor) for v in pytree.tree_leaves(value)))
    }
    values = {stars[name] + name: value for name, value in bound.arguments.items()}
    return Arguments(values, constants, signature, passed, len(args))
