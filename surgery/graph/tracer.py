"""fx's tracer, taught to follow Python's control flow on sizes and to keep mode flags and buffers in the graph."""

from __future__ import annotations

import dis
import functools
import inspect
import operator
import sys
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Any, cast

import numpy as np
import torch
from torch import fx, nn

from surgery.errors import TraceError
from surgery.graph.arguments import Arguments
from surgery.graph.finite import expect_finite, where_finite
from surgery.graph.gradients import Modes, mark_modes
from surgery.graph.guards import Values, expect, model_line, user_line
from surgery.graph.hooks import Owner, own_hooks
from surgery.graph.items import may_hold, set_items
from surgery.graph.outputs import taken_apart
from surgery.graph.rule_table import has_module_rule

_KEYS, _VALUES, _ITEMS = (
    type(view) for view in (dict[Any, Any]().keys(), dict[Any, Any]().values(), dict[Any, Any]().items())
)


_OWN = (
    "surgery.",
    "torch.fx",
    "torch.utils.",
    "torch.overrides",
    "torch.nn.parameter",
    "torch.nn.modules.module",
    "torch._",
)
"""Python that tells proxies from tensors."""


@functools.lru_cache(maxsize=4096)
def _asks_for_type(code: CodeType, at: int) -> bool:
    """Whether the instruction at an offset is a call of ``isinstance``, a class pattern, or reads ``__class__``.

    A call has the place in the source at which its function is loaded.
    """
    instructions = list(dis.get_instructions(code))
    now = next((i for i in instructions if i.offset == at), None)
    if now is None or now.opname.startswith("MATCH_CLASS") or now.argval == "__class__":
        return now is not None
    place = now.positions and (now.positions.lineno, now.positions.col_offset)
    return any(
        i.argval == "isinstance" and i.positions and (i.positions.lineno, i.positions.col_offset) == place
        for i in instructions
        if i.opname.startswith("LOAD_")
    )


class SizeProxy(fx.Proxy):
    """A proxy that Python can branch on, count with and iterate over, where its value follows from shapes."""

    @property  # type: ignore[misc]
    def __class__(self) -> type[Any]:
        """`torch.Tensor` to a model's Python that asks for the type of a tensor (``isinstance``).

        Not to C++ that is called from there: it would read the proxy's memory as a tensor's.
        """
        frame, tracer = sys._getframe(1), cast(Tracer, self.tracer)
        asking = str(frame.f_globals.get("__name__", ""))
        if asking.startswith(_OWN) or not _asks_for_type(frame.f_code, frame.f_lasti):
            return type(self)
        if not tracer.values.busy and tracer.is_tensor(self):
            return torch.Tensor
        return type(self)

    def __getattr__(self, name: str) -> Any:
        return self.tracer.attribute(self, name)  # type: ignore[attr-defined]

    def __getitem__(self, key: Any) -> Any:
        return self.tracer.item(self, key)  # type: ignore[attr-defined]

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.set_item(self, key, value)  # type: ignore[attr-defined]

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("node", "tracer", "root", "attr", "_node"):
            raise TraceError(f"an attribute {name!r} of a tensor is set ({user_line()})")
        super().__setattr__(name, value)

    def __len__(self) -> int:
        return int(self.tracer.length(self))  # type: ignore[attr-defined]

    def __int__(self) -> int:
        return int(cast(Tracer, self.tracer).plain(self, sys._getframe(1)))

    def __float__(self) -> float:
        return float(cast(Tracer, self.tracer).plain(self, sys._getframe(1)))

    def __round__(self, ndigits: int | None = None) -> Any:
        return round(cast(Tracer, self.tracer).plain(self, sys._getframe(1)), ndigits)

    def __index__(self) -> int:
        return operator.index(self.tracer.number(self, sys._getframe(1)))  # type: ignore[attr-defined]


class _SizeAttribute(fx.proxy.Attribute, SizeProxy):
    """``x.shape``, and anything else that is read from a proxy."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = super().__call__(*args, **kwargs)
        return self.tracer.found(result) if self.attr == "get" else result  # type: ignore[attr-defined]


class GuardingTracer(fx.Tracer):
    """Resolves control flow on sizes, and records a guard for each decision."""

    values: Values

    def __init__(self) -> None:
        super().__init__(param_shapes_constant=True)
        self.modes = Modes()
        self.converting: dict[int, dict[str, Any]] = {}
        """The names of the Python modules that made plain numbers of proxies, by their id."""
        self._guarded: set[tuple[fx.Node, str]] = set()
        self._probed: list[tuple[fx.Node, Any, FrameType, int, str]] = []

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return SizeProxy(node, self)

    def attribute(self, obj: fx.Proxy, name: str) -> Any:
        """What ``obj.name`` gives: an object has no attribute that it lacks, and None is None."""
        if not name.startswith("__") and not self.values.busy and may_hold(obj.node):
            value = self._known(obj)
            if value is not None and not isinstance(value, torch.Tensor):
                if not hasattr(value, name):
                    raise AttributeError(f"{type(value).__name__!r} object has no attribute {name!r}")
                if getattr(value, name) is None:
                    return self._none(getattr, obj, name)
        return _SizeAttribute(obj, name)

    def item(self, obj: fx.Proxy, key: Any) -> Any:
        """What ``obj[key]`` gives: None where a container holds None there, so that Python can tell."""
        if isinstance(key, (int, str)) and not self.values.busy and may_hold(obj.node):
            value = self._known(obj)
            try:
                absent = not isinstance(value, (torch.Tensor, type(None))) and value[key] is None
            except (KeyError, IndexError, TypeError):
                absent = False  # which the node says
            if absent:
                return self._none(operator.getitem, obj, key)
        return self.create_proxy("call_function", operator.getitem, (obj, key), {})

    def found(self, got: fx.Proxy) -> Any:
        """What ``get`` gives: None where a mapping has nothing."""
        if self.values.busy or not may_hold(got.node):
            return got
        try:
            absent = self.values.of(got.node) is None
        except TraceError:
            return got
        if absent:
            self.guard(got.node, "the value", None)
        return None if absent else got

    def set_item(self, obj: fx.Proxy, key: Any, value: Any) -> None:
        """``obj[key] = value``: the name stands for what the node gives from now on."""
        changed = self.create_proxy("call_function", set_items, (obj, key, value), {})
        name = "_node" if isinstance(obj, _SizeAttribute) else "node"
        object.__setattr__(obj, name, changed.node)

    def _known(self, obj: fx.Proxy) -> Any:
        try:
            return self.values.of(obj.node)
        except TraceError:
            return None

    def _none(self, read: Any, obj: fx.Proxy, key: Any) -> None:
        node = self.create_proxy("call_function", read, (obj, key), {}).node
        self.guard(node, "the value", None)

    def to_bool(self, obj: fx.Proxy) -> bool:
        checked = where_finite(obj.node)
        if checked is not None:
            result, sources = checked
            for source in sources:
                self.create_node("call_function", expect_finite, (source, user_line()), {})
            return result
        value = self._value(obj, "a condition")
        if isinstance(value, torch.Tensor):
            raise TraceError(f"a condition depends on the values of a tensor ({user_line()})")
        self.guard(obj.node, "the condition", bool(value))
        return bool(value)

    def number(self, obj: fx.Proxy, frame: FrameType | None = None) -> Any:
        """The number that a proxy stands for. ``frame``: whose instruction asks, where it may be no more than a probe
        by a function of torch that goes on to take the proxy itself."""
        value = self._value(obj, "a number")
        if not isinstance(value, (bool, int, float)):
            raise TypeError(f"{obj.node.name} is no number ({user_line()})")
        if frame is None:
            self.guard(obj.node, "the value", value)
        elif (obj.node, "the value") not in self._guarded:
            self._probed.append((obj.node, value, frame, frame.f_lasti, user_line()))
        return value

    def plain(self, obj: fx.Proxy, frame: FrameType) -> Any:
        """What ``int``, ``float`` or ``round``, called in ``frame``, makes its number of."""
        self.converting[id(frame.f_globals)] = frame.f_globals
        return self.number(obj)

    def converted(self, function: Any, obj: fx.Proxy, *rest: Any) -> fx.Proxy:
        """``function(obj)``, such as ``int(obj)``, as a node of the graph."""
        if not self.is_number(obj, (int, float)):
            self.number(obj)  # says why
        return self.create_proxy("call_function", function, (obj, *rest), {})

    def is_number(self, obj: fx.Proxy, kind: type | tuple[type, ...]) -> bool:
        """Whether a proxy is known to stand for an ``int``, say."""
        return isinstance(self._known(obj), kind)

    def length(self, obj: fx.Proxy) -> int:
        value = self._value(obj, "a length")
        if isinstance(value, torch.Tensor):
            return int(self.number(obj.size(0)))
        self.guard(obj.node, "the length", len(value))
        return len(value)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        value = self._value(obj, "what is iterated over")
        if isinstance(value, (_KEYS, _VALUES, _ITEMS)):  # of a dict
            source = obj.node.args[0]
            assert isinstance(source, fx.Node)
            whole = SizeProxy(source, self)
            keys = self._keys(whole)
            if isinstance(value, _KEYS):
                return iter(keys)
            return iter([whole[k] if isinstance(value, _VALUES) else (k, whole[k]) for k in keys])
        if isinstance(value, dict):
            return iter(self._keys(obj))
        return iter([obj[k] for k in range(self.length(obj))])  # type: ignore[index]

    def keys(self, obj: fx.Proxy) -> Any:
        return self._keys(obj)

    def _keys(self, obj: fx.Proxy) -> list[Any]:
        keys = tuple(self._value(obj, "the keys"))
        self.guard(obj.node, "the set of keys", keys)
        return list(keys)

    def is_tensor(self, obj: fx.Proxy) -> bool:
        """Whether a proxy is known to stand for a tensor."""
        try:
            return isinstance(self.values.of(obj.node), torch.Tensor)
        except TraceError:
            return False

    def _value(self, obj: fx.Proxy, what: str) -> Any:
        try:
            return self.values.of(obj.node)
        except TraceError as error:
            raise TraceError(f"{what} is not known ({user_line()}): {error}") from error

    def guard(self, node: fx.Node, aspect: str, expected: Any, where: str | None = None) -> None:
        """Record that Python looked at ``node`` and what it found."""
        if (node, aspect) not in self._guarded:
            self._guarded.add((node, aspect))
            self.create_node("call_function", expect, (node, aspect, expected, where or user_line()), {})

    def create_node(self, kind: str, target: Any, *rest: Any, **named: Any) -> fx.Node:
        self._settle()
        node = super().create_node(kind, getattr(target, LEAF, target), *rest, **named)
        mark_modes(node, self.modes)
        node.meta["line"] = model_line()
        return node

    def create_arg(self, a: Any) -> Any:
        """An object that holds proxies is made by a node, so that it keeps its class. A number of numpy is Python's:
        generated code knows no numpy."""
        if isinstance(a, np.generic):
            return a.item()
        made = taken_apart(a)
        if made is None:
            return super().create_arg(a)
        rebuild, values = made
        return self.create_node("call_function", rebuild, (super().create_arg(values),), {})

    def _settle(self) -> None:
        """Guard the numbers that Python took, other than in the instruction whose result this node will be."""
        probed, self._probed = self._probed, []
        for node, value, frame, instruction, where in probed:
            asking: FrameType | None = sys._getframe(1)
            while asking is not None and asking is not frame:
                asking = asking.f_back
            if asking is None or frame.f_lasti != instruction:
                self.guard(node, "the value", value, where)


class ModeBranchError(Exception):
    """The submodule at ``path`` is to be traced on its own: its Python branches on its training flag, say."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path


LEAF = "_surgery_leaf"
"""Where what stands in for a function while tracing has the function (`surgery.graph.symbolic`)."""


class Tracer(GuardingTracer):
    """Leaves are layers that have a rule and modules of torch.nn; buffers and mode flags are read in the graph."""

    def __init__(self, modal: set[str], training: bool, root: nn.Module, given: Arguments, owner: Owner) -> None:
        super().__init__()
        self.given = given
        self.values = Values(root, given.values)
        self.modal = modal
        self.mode = training
        self.branched = False
        self.stack: list[str] = []
        self._buffers: dict[int, str] = {}
        self._parts: set[nn.Module] = set()
        self.owner = owner

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name in self.modal or has_module_rule(m):
            return True
        if any(has_module_rule(part) for part in m.modules()):
            return False  # such as a layer of a Transformer, made of other layers
        return type(m).forward.__module__.startswith("torch.nn.") and super().is_leaf_module(m, module_qualified_name)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Buffers become nodes, as parameters do: what is computed from them follows when they change."""
        if self.values.busy:
            return attr_val
        if isinstance(attr_val, torch.Tensor) and not isinstance(attr_val, nn.Parameter):
            name = self.buffers().get(id(attr_val))
            if name is not None:
                if name not in parameter_proxy_cache:
                    parameter_proxy_cache[name] = self.create_proxy("get_attr", name, (), {})
                return parameter_proxy_cache[name]
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def buffers(self) -> dict[int, str]:
        if not self._buffers:
            self._buffers = {id(b): n for n, b in reversed(list(self.root.named_buffers()))}
        return self._buffers

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.values.busy:
            return forward(*args, **kwargs)
        if m not in self._installed():
            if any(True for _ in (*m.parameters(), *m.buffers())):
                raise TraceError(
                    f"{type(m).__name__}, which is made in forward, has tensors of its own ({user_line()})"
                )
            return forward(*args, **kwargs)
        self.stack.append(self.path_of_module(m))
        if (m._backward_hooks or m._backward_pre_hooks) and not self.is_leaf_module(m, self.stack[-1]):
            raise ModeBranchError(self.stack[-1])  # they fire where a module is called
        result = super().call_module(m, forward, args, kwargs)
        if self.is_leaf_module(m, self.stack[-1]):
            result = self._fire_hooks(m, args, kwargs, result)
        self.stack.pop()
        return result

    def _installed(self) -> set[nn.Module]:
        if not self._parts:
            self._parts = set(self.root.modules())
        return self._parts

    def _fire_hooks(self, leaf: nn.Module, args: Any, kwargs: Any, result: Any) -> Any:
        """Run the hooks that the model itself has set on a leaf: `drop_own_hooks` takes them off."""
        for key, hook in own_hooks(leaf, self.owner):
            given = (leaf, args, kwargs, result) if key in leaf._forward_hooks_with_kwargs else (leaf, args, result)
            other = hook(*given)
            result = result if other is None else other
        return result

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """Placeholders by the names that ``forward`` shows, whatever decorates it, and what calls it on them."""
        proxies = {name: self._placeholder(name, value) for name, value in self.given.values.items()}

        def call(root: nn.Module) -> Any:
            args, kwargs = self.given.call(proxies)
            return root.forward(*args, **kwargs)

        call.__annotations__.clear()  # else those of the graph
        return call, [self.root]

    def _placeholder(self, name: str, value: Any) -> Any:
        """A constant keeps its parameter, which refuses any other value."""
        default = self.given.signature.parameters[name.lstrip("*")].default
        proxy = self.create_proxy("placeholder", name, () if default is inspect.Parameter.empty else (default,), {})
        if name not in self.given.constants:
            return proxy
        self.guard(proxy.node, "the value", value, f"argument {name!r} of {type(self.root).__name__}")
        return value

    def training_flag(self, module: nn.Module) -> Any:
        if self.values.busy or module not in self._installed():
            return module.__dict__["training"]
        path = "" if module is self.root else self.path_of_module(module)
        name = f"{path}.training" if path else "training"
        proxy = self.create_proxy("get_attr", name, (), {})
        proxy.node.meta["training_flag_of"] = path
        return proxy

    def to_bool(self, obj: fx.Proxy) -> bool:
        path = obj.node.meta.get("training_flag_of")
        if path is None:
            return super().to_bool(obj)
        if path:
            raise ModeBranchError(path)
        self.branched = True
        return self.mode

    def where(self) -> str:
        return f" (in {self.stack[-1]!r})" if self.stack else ""
