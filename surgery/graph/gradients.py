"""What a model's Python says about gradients and precision, kept in its graph.

fx follows Python into everything that it calls, and so drops the modes that it sets (`torch.no_grad`,
`torch.inference_mode`, `torch.autocast`) and the ``backward`` of an `torch.autograd.Function`. Here each node remembers
the modes in which it was traced, the generated code sets them again, and a call of a `Function` is one node.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import fx
from torch.autograd import Function
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointFunction

from surgery.errors import TraceError
from surgery.graph.guards import Values, user_line

_MODES = "modes"
_COUNTER = re.compile(r"# COUNTER: (\d+)")
"""How fx marks, in the code that it generates, which node comes next."""


@dataclass(frozen=True)
class Modes:
    """Modes that differ from those in which a traced module is called; None and empty where none was set."""

    inference: bool | None = None
    grad: bool | None = None
    autocast: tuple[tuple[str, torch.dtype, bool, bool], ...] = ()
    """Device type, dtype, whether enabled, and whether weights are cached: outermost first."""

    def header(self) -> str:
        """The ``with`` line that sets them; empty where there is nothing to set."""
        managers = [] if self.inference is None else [f"torch.inference_mode({self.inference})"]
        if self.grad is not None:  # behind inference_mode, which sets it too
            managers.append("torch.enable_grad()" if self.grad else "torch.no_grad()")
        managers += [f"torch.autocast({device!r}, {', '.join(map(str, rest))})" for device, *rest in self.autocast]
        return f"with {', '.join(managers)}:" if managers else ""


class Tracer(Protocol):
    """What is asked of the tracer that makes the nodes."""

    modes: Modes
    values: Values

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any: ...


@dataclass(frozen=True)
class AutogradCall:
    """The target of a node that calls a `torch.autograd.Function`: forward and backward are its own."""

    function: Any

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function.apply(*args, **kwargs)

    @property
    def __name__(self) -> str:
        return str(self.function.__name__)


def mark_modes(node: fx.Node, modes: Modes) -> None:
    """Remember the modes in which ``node`` runs. An unmarked node runs in those of the node before it."""
    node.meta[_MODES] = modes


def mode_mark(node: fx.Node) -> Modes | None:
    """The modes that ``node`` is marked with, if it is."""
    mark: Modes | None = node.meta.get(_MODES)
    return mark


def unmark_plain(graph: fx.Graph) -> None:
    """Forget the marks of a graph whose modes never change."""
    if all(node.meta.get(_MODES) == Modes() for node in graph.nodes):
        for node in graph.nodes:
            del node.meta[_MODES]


def generating_modes(graph: fx.Graph) -> AbstractContextManager[None]:
    """While this is entered, code generated from ``graph`` sets the modes of its nodes."""
    modes: list[Modes] = []
    for node in graph.nodes:
        before = modes[-1] if modes else Modes()
        modes.append(Modes() if node.op == "output" else node.meta.get(_MODES, before))

    def transform(body: list[str]) -> list[str]:
        lines: list[str] = []
        current = Modes()
        for line in "".join(body).split("\n"):
            counter = _COUNTER.search(line)
            wanted = modes[int(counter.group(1))] if counter else current
            if wanted != current and wanted.header():
                lines.append(wanted.header())
            current = wanted
            lines.append(f"    {line}" if current.header() and line and not counter else line)
        return ["\n".join(lines)]

    return graph.on_generate_code(lambda _: transform)


@contextmanager
def symbolic_gradients(tracer: Tracer) -> Iterator[None]:
    """While tracing, setting a mode marks the nodes that follow, and a call of a `Function` is a node of the graph.

    Raises:
        TraceError: the model leaves gradients switched in another way than it found them.
    """
    ambient = torch.is_grad_enabled()
    patches = [*_grad_patches(tracer, ambient), *_mode_patches(tracer), *_function_patches(tracer)]
    original = [(cls, name, cls.__dict__.get(name)) for cls, name, _ in patches]
    try:
        for cls, name, value in patches:
            setattr(cls, name, value)
        yield
        if tracer.modes.grad not in (None, ambient):
            raise TraceError("it switches gradients and does not switch them back")
    finally:
        for cls, name, value in original:
            delattr(cls, name) if value is None else setattr(cls, name, value)
        torch.set_grad_enabled(ambient)


_Patch = tuple[Any, str, Any]


def _mode_patches(tracer: Tracer) -> list[_Patch]:
    """For each context manager that sets a mode, what stands in for entering and leaving it."""
    changes: dict[Any, Callable[[Any, Modes], Modes]] = {
        torch.no_grad: lambda _, modes: replace(modes, grad=False),
        torch.enable_grad: lambda _, modes: replace(modes, grad=True),
        torch.set_grad_enabled: lambda manager, modes: replace(modes, grad=manager.mode),
        torch.inference_mode: lambda manager, modes: replace(modes, inference=bool(manager.mode), grad=None),
        torch.autocast: lambda m, modes: replace(
            modes, autocast=(*modes.autocast, (m.device, m.fast_dtype, m._enabled, m._cache_enabled))
        ),
    }
    regions = [patch for cls, change in changes.items() for patch in _region(tracer, cls, change)]
    return [*regions, (torch.autocast, "__init__", _autocast)]


def _autocast(
    self: torch.autocast,
    device_type: str,
    dtype: torch.dtype | None = None,
    enabled: bool = True,
    cache_enabled: bool | None = None,
) -> None:
    """As `torch.autocast`, where ``enabled`` may be a proxy, such as a mode flag, which is guarded."""
    given = (device_type, dtype, cache_enabled)
    if any(isinstance(value, fx.Proxy) for value in given):
        raise TraceError(f"autocast is given a device or dtype that only a call knows ({user_line()})")
    _START(self, device_type, dtype, bool(enabled), cache_enabled)


_START = torch.autocast.__init__


def _region(tracer: Tracer, cls: Any, change: Callable[[Any, Modes], Modes]) -> tuple[_Patch, _Patch]:
    enter, leave = cls.__enter__, cls.__exit__
    real = cls is not torch.inference_mode  # what is made in it could not be changed outside
    before: dict[int, list[Modes]] = {}

    def entering(self: Any) -> Any:
        modes = getattr(self, "modes", tracer.modes)  # set_grad_enabled returns to those in which it was made
        result = enter(self) if real or tracer.values.busy else self
        if not tracer.values.busy:
            before.setdefault(id(self), []).append(modes)
            tracer.modes = change(self, modes)
        return result

    def leaving(self: Any, *error: Any) -> Any:
        result = leave(self, *error) if real or tracer.values.busy else None
        if not tracer.values.busy:
            tracer.modes = before[id(self)].pop()
        return result

    return (cls, "__enter__", entering), (cls, "__exit__", leaving)


def _grad_patches(tracer: Tracer, ambient: bool) -> list[_Patch]:
    """`torch.set_grad_enabled` as a function, which switches at once, and as a decorator, which switches back."""
    start = torch.set_grad_enabled.__init__
    decorate = torch.set_grad_enabled.__call__

    def switch(self: Any, mode: Any) -> None:
        mode = bool(mode)  # of a proxy: guarded
        start(self, mode)
        if not tracer.values.busy:
            self.modes = tracer.modes
            tracer.modes = replace(tracer.modes, grad=None if mode == ambient else mode)

    def wrap(self: Any, function: Any) -> Any:
        tracer.modes = getattr(self, "modes", tracer.modes)
        return decorate(self, function)

    return [(torch.set_grad_enabled, "__init__", switch), (torch.set_grad_enabled, "__call__", wrap)]


def _function_patches(tracer: Tracer) -> list[_Patch]:
    """For the ``forward`` and ``setup_context`` of each `Function`: what ``apply`` is called by cannot be patched."""
    patches: list[_Patch] = []
    more = list(Function.__subclasses__())
    while more:
        cls = more.pop()
        more += cls.__subclasses__()
        patches.append((cls, "forward", staticmethod(_forward(tracer, cls, cls.forward))))
        if cls.setup_context is not Function.setup_context:
            patches.append((cls, "setup_context", staticmethod(_setup_context(cls.setup_context))))
    return patches


def _forward(tracer: Tracer, cls: type[Function], original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def forward(*args: Any) -> Any:
        given = args[1:] if args and isinstance(args[0], torch._C._FunctionBase) else args
        direct = len(given) == len(args) and torch.is_grad_enabled()  # which apply switches off
        if direct or tracer.values.busy or not _holds_proxies(given):
            return original(*args)
        if cls is CheckpointFunction:  # which changes when things are computed, not what
            return given[0](*given[2:])
        try:
            return tracer.create_proxy("call_function", AutogradCall(cls), given, {})
        except NotImplementedError as error:
            raise TraceError(f"{cls.__name__}.apply takes what no graph can hold ({user_line()}): {error}") from error

    return forward


def _setup_context(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def setup_context(ctx: Any, inputs: Any, output: Any) -> Any:
        return None if _holds_proxies((inputs, output)) else original(ctx, inputs, output)

    return setup_context


def _holds_proxies(tree: Any) -> bool:
    return any(isinstance(v, fx.Proxy) for v in pytree.tree_leaves(tree))
