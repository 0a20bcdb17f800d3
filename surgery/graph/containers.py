"""The parts of a traced module that its graph has replaced: what is left of the model's own classes."""

from __future__ import annotations

import warnings
from inspect import isfunction
from typing import Any, NoReturn

from torch import nn

from surgery.errors import UsageError

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Container(nn.Module):
    """A module that a graph goes through: names, attributes and methods stay, but no graph calls it."""

    shell: type[nn.Module]
    """The class that it had."""
    callable: bool

    def __reduce__(self) -> Any:
        return _empty, (self.shell, self.callable), self.__dict__

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> Any:
        self._warn()
        return super().register_forward_hook(*args, **kwargs)

    def register_forward_pre_hook(self, *args: Any, **kwargs: Any) -> Any:
        self._warn()
        return super().register_forward_pre_hook(*args, **kwargs)

    def register_full_backward_hook(self, *args: Any, **kwargs: Any) -> Any:
        self._warn()
        return super().register_full_backward_hook(*args, **kwargs)

    def register_full_backward_pre_hook(self, *args: Any, **kwargs: Any) -> Any:
        self._warn()
        return super().register_full_backward_pre_hook(*args, **kwargs)

    def _warn(self) -> None:
        warnings.warn(
            f"this hook will not fire: the graph of the traced module calls the layers in this {self.shell.__name__}, "
            "not itself; set it on a layer, on the traced module, or on the model before trace",
            stacklevel=3,
        )


def turn_into_container(module: nn.Module, *, keep_forward: bool) -> None:
    """Make ``module``, whose ``forward`` is in a graph, a `Container` of the same class.

    Args:
        keep_forward: whether Python may still call it.
    """
    if isinstance(module, Container):
        return
    module.__class__ = _container_class(type(module), keep_forward)
    if not keep_forward:
        module.__dict__.pop("forward", None)


def _refuse(self: Container, *args: Any, **kwargs: Any) -> NoReturn:
    raise UsageError(
        f"{self.shell.__name__} is a part of a traced module and cannot be called on its own: the graph of the traced "
        "module has what it computes; trace the part itself"
    )


_CLASSES: dict[tuple[Any, bool], Any] = {}


def _container_class(shell: type[nn.Module], callable: bool) -> Any:
    if (shell, callable) not in _CLASSES:
        namespace: dict[str, Any] = {name: value for name, value in vars(Container).items() if isfunction(value)}
        namespace |= {"shell": shell, "callable": callable, "__module__": shell.__module__}
        if not callable:
            namespace["forward"] = _refuse
        # The first base decides the layout of instances, which has to stay for one to change its class.
        meta: Any = type(shell)
        _CLASSES[shell, callable] = meta(shell.__name__, (shell, Container), namespace)
    return _CLASSES[shell, callable]


def _empty(shell: type[nn.Module], callable: bool) -> nn.Module:
    cls = _container_class(shell, callable)
    return cls.__new__(cls)  # type: ignore[no-any-return]
