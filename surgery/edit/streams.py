"""Runs of a network that stop at a layer, wait while others run, and go on from there.

A run goes through the graphs node by node and keeps the values that are still needed, no others. So many runs, one for
each batch, can be brought to the same layer, and nothing is computed twice. Values are set aside while a run waits
(`surgery.edit.shelf`).

What is no graph, Python between the graphs or within a layer, cannot be left in the middle. It is called again instead,
and what it called before (layers that read, graphs) gives what it gave before, without being computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from surgery.edit.calibration import Inputs
from surgery.edit.read_rows import Layer
from surgery.edit.shelf import Kept, Shelf
from surgery.edit.watch import Book, Read, find_read
from surgery.graph.rule_table import has_module_rule
from surgery.graph.traced import TracedModule


@dataclass(frozen=True, eq=False)
class Seen:
    """A call of a layer: which of all calls of its weight, what it is given and, where it ran, what it gives."""

    number: int
    layer: Layer
    weight: Tensor
    bias: Tensor | None
    x: Tensor
    y: Tensor | None


class Runner:
    """What the runs of one network share.

    Args:
        module: the network, in ``eval()``. Its graphs run node by node from now on, so it is to be a copy.
        book: its tensors.
    """

    def __init__(self, module: nn.Module, book: Book) -> None:
        self.module, self.book = module, book
        self.device = next((t.device for _, t in book.tensors), torch.device("cpu"))
        self._plans: dict[TracedModule, _Plan] = {}
        self.run: Run | None = None
        for part in module.modules():
            if isinstance(part, TracedModule):
                part.forward = _Entry(self, part)

    def plan(self, part: TracedModule) -> _Plan:
        """The graph of a traced module, ready to run."""
        if part not in self._plans:
            self._plans[part] = _Plan(part)
        return self._plans[part]


class _Entry:
    """Stands for the ``forward`` of a traced module."""

    def __init__(self, runner: Runner, part: TracedModule) -> None:
        self.runner, self.part = runner, part

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.runner.run is None:
            return type(self.part).forward(self.part, *args, **kwargs)
        return self.runner.run.enter(self.part, args, kwargs)


class _Plan:
    """The nodes of a graph, what each calls, and which values are not needed after it."""

    def __init__(self, part: TracedModule) -> None:
        self.part = part
        self.nodes: list[fx.Node] = list(part.graph.nodes)
        self.called = [_called(part, node) for node in self.nodes]
        last: dict[fx.Node, int] = {}
        for number, node in enumerate(self.nodes):
            last |= dict.fromkeys((node, *node.all_input_nodes), number)
        self.frees: list[list[fx.Node]] = [[] for _ in self.nodes]
        for node, number in last.items():
            self.frees[number].append(node)

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The values of the placeholders, by their targets."""
        left, named = list(args), dict(kwargs)
        values: dict[str, Any] = {}
        for node in self.nodes:
            if node.op != "placeholder":
                continue
            name = str(node.target)
            if name.startswith("**"):
                values[name], named = named, {}
            elif name.startswith("*"):
                values[name], left = tuple(left), []
            elif left:
                values[name] = left.pop(0)
            else:
                values[name] = named.pop(name) if name in named else node.args[0]
        return values


def _called(part: TracedModule, node: fx.Node) -> Any:
    """The module or function of a node that calls one."""
    return part.get_submodule(str(node.target)) if node.op == "call_module" else node.target


@dataclass(eq=False)
class _Frame:
    """A graph in the middle of a run; without a plan, the call of the whole network."""

    plan: _Plan | None
    arguments: Any
    """Of the call; for a graph, by the names of its placeholders."""
    at: int = 0
    """The node that is next."""
    values: dict[fx.Node, Any] = field(default_factory=dict)
    records: list[Any] = field(default_factory=list)
    """What the layers and graphs gave that the node has called so far."""
    random: Any = None
    """The state of the random numbers before the node."""


class _Stopped(BaseException):
    """Ends a call early. Python of the model that catches every `Exception` does not catch it."""


class _Entered(BaseException):
    """A graph is called."""

    def __init__(self, part: TracedModule, args: Any, kwargs: Any) -> None:
        self.part, self.args, self.kwargs = part, args, kwargs


class Run(TorchFunctionMode):
    """A run of a network on a batch."""

    def __init__(self, runner: Runner, inputs: Inputs) -> None:
        super().__init__()
        self.runner = runner
        self.frames: list[_Frame] = []
        self.counts: dict[str, int] = {}
        """How many calls of each weight have run."""
        self._aside: list[_Frame] = []
        self._seen: list[Seen] = []
        self._position = 0
        self._opaque = False
        self._restart(inputs)

    def look(self, name: str, numbers: Sequence[int], again: Callable[[], Inputs], *, after: bool) -> list[Seen]:
        """Go on to calls of a weight.

        Args:
            name: of the weight.
            numbers: which of all its calls, ascending.
            again: gives the inputs, should the run have to begin again.
            after: whether the calls run too. Of a single one, the run waits behind it, otherwise in front of it; of
                several always in front of the first.

        Returns:
            the calls, as far as there are any. What they hold may be written to when the run goes on.
        """
        first, *others = numbers
        if self.counts.get(name, 0) > first:
            self._restart(again())
        if not others:
            return self._go(name, numbers, after)
        if not self._go(name, [first], after=False):
            return []
        start, counts = self._state(_copy), dict(self.counts)
        seen = self._go(name, numbers, after)
        self._resume(start)
        self.counts = counts
        return seen

    def set_aside(self, shelf: Shelf, name: str) -> None:
        """Set all values aside."""
        self._aside = self._state(lambda tensor: shelf.put(name, tensor))
        self.frames = []

    def take_up(self) -> None:
        """Take the values up again."""
        if self._aside:
            self._resume(self._aside)
            self._aside = []

    def enter(self, part: TracedModule, args: Any, kwargs: Any) -> Any:
        """A graph is called by Python: what it gave, or it is to run now."""
        known, value = self._known()
        if known:
            return value
        raise _Entered(part, args, kwargs)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = find_read(self.runner.book, func, args, kwargs)
        if found is None:
            return func(*args, **kwargs)
        known, value = self._known()
        if known:
            return value
        name = found.part.name
        number = self.counts.get(name, 0)
        wanted = name == self._wanted and number in self._numbers
        last = wanted and number == self._numbers[-1]
        if last and not self._after:
            self._see(number, found, None)
            raise _Stopped
        result = func(*args, **kwargs)
        self.counts[name] = number + 1
        self.frames[-1].records.append(_copies(result) if self._opaque else result)
        if wanted:
            self._see(number, found, result, copy=not last)
        if last:
            raise _Stopped
        return result

    def _see(self, number: int, found: Read, y: Tensor | None, *, copy: bool = False) -> None:
        x = found.x
        if copy:  # others may write to them
            x, y = x.clone(), None if y is None else y.clone()
        self._seen.append(Seen(number, found.layer, found.weight, found.bias, x, y))

    def _known(self) -> tuple[bool, Any]:
        """Whether the next layer or graph that the node calls has run, and what it gave."""
        records, self._position = self.frames[-1].records, self._position + 1
        if self._position > len(records):
            return False, None
        value = records[self._position - 1]
        return True, _copies(value) if self._opaque else value

    def _restart(self, inputs: Inputs) -> None:
        self.counts = {}
        part = self.runner.module
        if isinstance(part, TracedModule) and not _has_hooks(part):
            plan = self.runner.plan(part)
            self.frames = [_Frame(plan, plan.bind(*_copies(inputs)))]
        else:
            self.frames = [_Frame(None, _copies(inputs))]
        torch.manual_seed(0)
        self.frames[0].random = _random_state(self.runner.device)

    def _go(self, name: str, numbers: Sequence[int], after: bool) -> list[Seen]:
        """Run until the last of these calls, or to the end."""
        self._wanted, self._numbers, self._after = name, numbers, after
        self._seen = []
        self.runner.run = self
        try:
            with self:
                while self.frames:
                    self._step()
        except _Stopped:
            pass
        finally:
            self.runner.run = None
        seen, self._seen = self._seen, []
        return seen

    def _step(self) -> None:
        """Run the next node, or begin the graph that it calls."""
        frame = self.frames[-1]
        if frame.random is None:
            frame.random = _random_state(self.runner.device)
        else:
            _set_random_state(frame.random, self.runner.device)
        self._position = 0
        try:
            value = self._call_network(frame) if frame.plan is None else self._call(frame, frame.plan)
        except _Entered as entered:
            plan = self.runner.plan(entered.part)
            self.frames.append(_Frame(plan, plan.bind(entered.args, entered.kwargs)))
            return
        self._finish(frame, value)

    def _call_network(self, frame: _Frame) -> Any:
        self._opaque = True
        args, kwargs = _copies(frame.arguments)
        return self.runner.module(*args, **kwargs)

    def _call(self, frame: _Frame, plan: _Plan) -> Any:
        node, called = plan.nodes[frame.at], plan.called[frame.at]
        self._opaque = False
        if node.op == "placeholder":
            return frame.arguments.pop(str(node.target))
        if node.op == "get_attr":
            return _attribute(plan.part, str(node.target))
        args: Any = fx.map_arg(node.args, frame.values.__getitem__)
        if node.op == "output":
            return args[0]
        kwargs: Any = fx.map_arg(node.kwargs, frame.values.__getitem__)
        if node.op == "call_method":
            return getattr(args[0], called)(*args[1:], **kwargs)
        if isinstance(called, nn.Module):
            if isinstance(called, TracedModule):
                if not frame.records and not _has_hooks(called):
                    raise _Entered(called, args, kwargs)
                if not _has_hooks(called):
                    return frame.records[0]
            elif not has_module_rule(called):  # Python, which may write to what it is given
                self._opaque = True
                args, kwargs = _copies((args, kwargs))
        return called(*args, **kwargs)

    def _finish(self, frame: _Frame, value: Any) -> None:
        """Go on behind a node, or behind the graph."""
        if frame.plan is None or frame.plan.nodes[frame.at].op == "output":
            self.frames.pop()
            if self.frames:
                self.frames[-1].records.append(value)
            return
        frame.values[frame.plan.nodes[frame.at]] = value
        for node in frame.plan.frees[frame.at]:
            del frame.values[node]
        frame.at += 1
        frame.records, frame.random = [], None

    def _state(self, keep: Callable[[Tensor], Kept]) -> list[_Frame]:
        """The frames, with what gives the value back in the place of each tensor that is not the network's own."""
        storages: dict[int, Kept] = {}
        book = self.runner.book

        def put(tensor: Tensor) -> Any:
            if not _can_be_kept(tensor) or book.holder(tensor) is not None:
                return tensor
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in storages:
                whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
                storages[storage.data_ptr()] = keep(whole)
            return _View(storages[storage.data_ptr()], tensor)

        return [_map(frame, Tensor, put) for frame in self.frames]

    def _resume(self, frames: list[_Frame]) -> None:
        """The inverse of `_state`."""
        storages: dict[Kept, Tensor] = {}

        def get(view: _View) -> Tensor:
            if view.kept not in storages:
                storages[view.kept] = view.kept()
            return view.of(storages[view.kept])

        self.frames = [_map(frame, _View, get) for frame in frames]


class _View:
    """A tensor without its values."""

    def __init__(self, kept: Kept, tensor: Tensor) -> None:
        self.kept, self.dtype = kept, tensor.dtype
        self.place = tensor.storage_offset(), tensor.shape, tensor.stride()

    def of(self, whole: Tensor) -> Tensor:
        return torch.empty(0, dtype=self.dtype, device=whole.device).set_(whole.untyped_storage(), *self.place)


def _copy(tensor: Tensor) -> Kept:
    copied = tensor.clone()
    return lambda *, own=False: copied


def _copies(tree: Any) -> Any:
    return pytree.tree_map_only(Tensor, torch.clone, tree)


def _map(frame: _Frame, kind: type, change: Callable[[Any], Any]) -> _Frame:
    values = {node: pytree.tree_map_only(kind, change, value) for node, value in frame.values.items()}
    arguments, records = (pytree.tree_map_only(kind, change, tree) for tree in (frame.arguments, frame.records))
    return replace(frame, arguments=arguments, values=values, records=records)


def _can_be_kept(tensor: Tensor) -> bool:
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided and not tensor.is_quantized
    return plain and tensor.numel() > 0 and not tensor.is_conj() and not tensor.is_neg()


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _attribute(module: nn.Module, path: str) -> Any:
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name)
    return found


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
