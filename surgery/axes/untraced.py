"""Follow channels across Python that is not traced: one real run that looks up each call of torch in the table.

The traced parts and the layers that Python calls are interpreted; between them, the real tensors are labelled. Python's
own constants cannot follow an edit, so an op that would need another constant freezes what it works on.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx, nn
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from surgery.axes.interpret import Interpreter, propagate
from surgery.axes.labels import Field, Ids, Labelled
from surgery.axes.ledger import Called, Findings, Uses, labelled_leaves
from surgery.axes.network_outputs import NetworkOutput, output_name
from surgery.axes.ops import Op
from surgery.axes.untraced_ops import (
    FACTORIES,
    HARMLESS,
    NUMBERS,
    WatchedSize,
    find_pinned,
    find_unfollowed,
    name_call,
    select_fields,
    written_dims,
)
from surgery.axes.visits import Visits
from surgery.errors import TraceError
from surgery.graph.guards import model_line
from surgery.graph.islands import clone_tensors, quietly
from surgery.graph.meta import storage_of
from surgery.graph.outputs import tensors_in
from surgery.graph.rule_table import UNKNOWN, Rule, rule_for
from surgery.graph.seeding import seed_generators
from surgery.graph.traced import TracedModule

_SCOPE = "python"


def collect_findings(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], modes: tuple[bool, ...]
) -> Findings:
    """What the rules say of ``module``.

    Args:
        args, kwargs: inputs; where ``module`` is not a graph as a whole, it is run on them.
        modes: for which modes (``training``) it is run then.

    Raises:
        TraceError: it does not run on these inputs.
    """
    if not isinstance(module, TracedModule):
        return _record(module, args, kwargs, modes)
    return propagate(module, args, kwargs)


def _record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], modes: tuple[bool, ...]) -> Findings:
    """What the rules say of a module with Python between its traced parts."""
    findings = Findings()
    run = _Terse(module, findings)
    twin = copy.deepcopy(module)  # a run may change buffers and caches
    recording = _Recording(run, module, twin)
    for training in modes:
        twin.train(training)
        try:
            with recording.listening(twin), quietly(), torch.random.fork_rng(devices=[]):
                seed_generators(0)
                result = twin(*clone_tensors(args), **clone_tensors(kwargs))
        except (RuntimeError, ValueError, IndexError, KeyError, AssertionError) as error:
            mode = "training" if training else "evaluation"
            raise TraceError(f"{type(module).__name__} does not run in {mode} on inputs like those it was traced with: "
                             f"{str(error).strip().partition(chr(10))[0]}") from error  # fmt: skip
        for path, leaf in tensors_in(result):
            run.returns(path, recording.label(leaf), training)
    recording.visits.freeze_unseen(run, module)
    return findings


class _Terse(Interpreter):
    """Says of each channel once why it is frozen: what Python does with outputs would fill pages."""

    def __init__(self, module: nn.Module, findings: Findings) -> None:
        super().__init__(module, findings)
        self.known: NDArray[np.int8] = np.zeros(0, dtype=np.int8)
        """For each channel, `_RETURNED` or `_FROZEN` if it is."""

    def returns(self, path: str, label: Labelled, training: bool) -> None:
        """The network returns a tensor."""
        fields = [f.ids for f in label.fields]
        said = all(bool((self.mark(ids) == _FROZEN).all()) for ids in fields)
        self.findings.outputs.append(NetworkOutput(output_name(path), label, (training,), said))
        for ids in fields:
            self.known[ids] = np.maximum(self.known[ids], _RETURNED)

    def freeze(self, ids: Ids, reason: str) -> None:
        marks = self.mark(ids)
        if (marks == _FROZEN).all():
            return
        if (marks > 0).all():
            self.findings.behind.append((ids.ravel(), reason))
        else:
            super().freeze(ids, reason)
        self.known[ids] = _FROZEN

    def mark(self, ids: Ids) -> NDArray[np.int8]:
        """What is known of channels."""
        if len(self.known) < self.findings.count:
            more = np.zeros(2 * self.findings.count - len(self.known), dtype=np.int8)
            self.known = np.concatenate((self.known, more))
        return self.known[ids]


_RETURNED, _FROZEN = 1, 2


class _Recording(TorchFunctionMode):
    """Labels the tensors of a real run."""

    def __init__(self, run: Interpreter, module: nn.Module, twin: nn.Module) -> None:
        super().__init__()
        self.run = run
        self.depth = 0
        """Above 0 inside a call that is looked up as one."""
        self.known: dict[int, Labelled] = {}
        """By the id of each tensor of the run."""
        self.kept: list[torch.Tensor] = []
        """Those tensors, so that no id is used again."""
        self.aliases: dict[int, dict[int, None]] = {}
        """Ids of tensors by the storage that they share."""
        self.blank: dict[int, tuple[bool, ...]] = {}
        """Tensors that hold one number everywhere, and which of their sizes were read from an axis."""
        self.sources = {
            id(ours): theirs
            for part in ("named_parameters", "named_buffers")
            for (_, ours), (_, theirs) in zip(getattr(twin, part)(), getattr(module, part)(), strict=True)
        }
        self.begun = False
        """Whether anything with parameters has been called in this run."""
        self.scratch = fx.Graph()
        """Where nodes for the rules to look at are made."""
        self.layers: list[tuple[nn.Module, nn.Module, str, Rule]] = []
        for (path, ours), (_, theirs) in zip(twin.named_modules(), module.named_modules(), strict=True):
            rule = rule_for(self.scratch.call_module("layer"), theirs)
            if isinstance(theirs, TracedModule) or rule is not UNKNOWN:
                self.layers.append((ours, theirs, path, rule))
        self.visits = Visits([(path, ours) for path, ours in twin.named_modules() if path], self.layers)

    @contextmanager
    def listening(self, twin: nn.Module) -> Iterator[None]:
        """While listening, calls of torch, of traced parts and of layers are recorded."""
        self.begun = False
        try:
            for ours, theirs, path, rule in self.layers:
                ours.__dict__["forward"] = self.instead(ours.forward, theirs, path, rule)
            with self.visits.listening(self.known), self, _Unseen(self):
                yield
        finally:
            for ours, *_ in self.layers:
                ours.__dict__.pop("forward", None)

    # ---- traced parts and layers

    def instead(self, forward: Callable[..., Any], module: nn.Module, path: str, rule: Rule) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.depth:
                return forward(*args, **kwargs)
            self.depth += 1
            try:
                return apart(*args, **kwargs)
            finally:
                self.depth -= 1

        def apart(*args: Any, **kwargs: Any) -> Any:
            with torch._C.DisableTorchFunction(), _disable_current_modes():  # they would only pass things on
                self.run.line = model_line()
                given = pytree.tree_map(lambda v: self.argument(v, path), (args, kwargs))
                self.begun = self.begun or any(True for _ in module.parameters())
                result = forward(*args, **kwargs)
                if isinstance(module, TracedModule):
                    out = self.run.part(module, path, path, *given)
                else:
                    out = self.layer(module, path, rule, given, result, (args, kwargs))
                self.attach(result, out)
                self.visits.called(path, (given, out))
                return result

        return call

    def argument(self, value: Any, path: str) -> Any:
        """What a traced part or a layer is given; a tensor that nothing is known of is frozen."""
        if isinstance(value, WatchedSize):
            value.used(path)
            return value.plain()
        if not isinstance(value, torch.Tensor):
            return value
        label = self.label(value)
        if label.fields:
            return label
        fields = tuple(Field((dim,), self.run.fresh(label.shape[dim])) for dim in range(1, label.ndim))
        for f in fields:
            self.run.freeze(f.ids, "comes from Python outside the traced parts" if self.begun else "network input")
        return Labelled(label.value, fields, label.constant)

    def layer(self, module: nn.Module, path: str, rule: Rule, given: Any, result: Any, plain: Any) -> Any:
        out = pytree.tree_map_only(torch.Tensor, lambda t: Labelled(t.detach().to("meta")), result)
        node = self.scratch.call_module("layer")
        op = Op(self.run, node, module, path, (_SCOPE, f"{path}_{node.name}"), out)
        out = self.run.related(op, rule, given[0], given[1], out)
        if rule.movement:
            self.check(op, rule, given, out, partial(type(module).forward, module), plain, vars(module).values())
        elif rule.rewrite is not None:
            self.run.findings.calls.append(Called(path, node, rule.rewrite, given[0], tuple(labelled_leaves(out))))
        return out

    # ---- functions and methods

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.depth:
            return func(*args, **kwargs)
        self.depth += 1
        try:
            with _disable_current_modes():
                return self.called(func, args, kwargs)
        finally:
            self.depth -= 1

    def called(self, func: Any, args: Any, kwargs: Any) -> Any:
        kind, target = name_call(func)
        self.run.line = model_line()
        name = target if isinstance(target, str) else getattr(target, "__name__", str(target))
        given = pytree.tree_map_only(torch.Tensor, self.label, (tuple(args), kwargs))
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        versions = [_count_writes(t) for t in tensors]
        watched = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, WatchedSize)]
        result = func(*args, **kwargs)
        outs = [t for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
        changed = [t for t, version in zip(tensors, versions, strict=True) if _is_changed(t, version, outs)]
        labels = list(labelled_leaves(given))
        if not watched and not any(label.fields for label in labels):
            self.keep(result, name, args, kwargs)
            for t in changed:
                self.blank.pop(id(t), None)
            return result
        if name in NUMBERS:
            return self.number(name, labels[0], result, args, kwargs)
        if name in ("__setitem__", "copy_"):
            self.write(name, args, given)
            return result
        if name in FACTORIES:
            self.keep(result, name, args, kwargs, watched)
            return result
        if not outs:
            if name not in HARMLESS:
                self.refuse(name, labels, watched)
            return result
        out = self.operation(kind, target, given, result, (func, args, kwargs))
        if changed:
            self.changed(name, changed, outs, out, labels)
        self.attach(result, out)
        return result

    def operation(self, kind: str, target: Any, given: Any, result: Any, call: Any) -> Any:
        func, args, kwargs = call
        out = pytree.tree_map_only(torch.Tensor, lambda t: Labelled(t.detach().to("meta")), result)
        node = self.scratch.create_node(kind, target)
        op = Op(self.run, node, None, "", (_SCOPE, node.name), out)
        rule = rule_for(node, None)
        plain = pytree.tree_map_only(WatchedSize, WatchedSize.plain, given)
        picked = select_fields(args[-1], given[0][0], result.ndim) if target is operator.getitem else None
        if picked is not None:
            return self.run.with_fields(op, out, picked)
        try:
            out = self.run.related(op, rule, plain[0], plain[1], out)
        except (TypeError, ValueError, IndexError, KeyError, AttributeError, AssertionError):
            # Python may call an op in ways that no graph has it in.
            return self.run.related(op, UNKNOWN, plain[0], plain[1], out)
        self.check(op, rule, given, out, func, (args, kwargs))
        return out

    def check(
        self,
        op: Op,
        rule: Rule,
        given: Any,
        out: Any,
        call: Callable[..., Any],
        plain: Any,
        numbers: Iterable[Any] = (),
    ) -> None:
        """Freeze what the op would not follow an edit of, Python's constants being as they are.

        Args:
            given, out: labelled arguments and results.
            call, plain: what was called, and its arguments.
            numbers: what a layer keeps.
        """
        for f in find_unfollowed(op, rule, given, out):
            self.run.freeze(f.ids, _reason(op.name))
        if rule.movement and rule.kind != "concatenation" and rule.python != "sizes":
            for f in find_pinned(call, plain, given, out, numbers):
                self.run.freeze(f.ids, _reason(op.name))

    def number(self, name: str, label: Labelled, result: Any, args: Any, kwargs: Any) -> Any:
        """Sizes of labelled axes, watched for what Python does with them."""
        if name == "__len__":
            first = label.at(0)
            if first is not None:
                self.run.freeze(first.ids, _reason("len"))
            return result
        sizes = [n if label.at(d) is None else self.watched(label.at(d), n) for d, n in enumerate(label.shape)]
        if isinstance(result, torch.Size):
            return torch.Size(sizes)
        dim = args[1] if len(args) > 1 else kwargs.get("dim")
        if dim is not None:
            return sizes[dim]
        watched = [s for s in sizes if isinstance(s, WatchedSize)]  # the number of elements
        return WatchedSize.of(result, lambda what: [s.used(what) for s in watched], np.empty(0, np.int64))

    def watched(self, f: Field | None, size: int) -> WatchedSize:
        assert f is not None
        return WatchedSize.of(size, lambda what: self.run.freeze(f.ids, _reason(what)), f.ids)

    def write(self, name: str, args: Any, given: Any) -> None:
        """``t[index] = value`` and ``t.copy_(value)``: the trailing axes of both are the same."""
        target, value = args[0], args[-1]
        old, new = given[0][0], given[0][-1]
        dims = written_dims(target, args[1] if name == "__setitem__" else (), value)
        fields = list(old.fields)
        blank = self.blank.get(id(target))
        for f in new.fields if isinstance(new, Labelled) else ():
            place = dims.get(f.dims[0]) if len(f.dims) == 1 else None
            held = None if place is None else old.at(place)
            if held is not None and held.dims == (place,) and held.ids.shape == f.ids.shape:
                self.run.tie(held, f, name)
            elif place is not None and held is None and blank is not None and blank[place]:
                fields.append(Field((place,), f.ids, f.key))
            else:
                self.refuse(name, [old, new])
        for g in old.fields:  # other numbers in the same places
            if not any(dims.get(f.dims[0]) == g.dims[0] for f in getattr(new, "fields", ())):
                self.freeze(Labelled(old.value, (g,)), _reason(name))
        self.changed(name, [target], [target], Labelled(old.value, tuple(fields)), [old])
        self.known[id(target)] = Labelled(old.value, tuple(fields))

    def changed(self, name: str, changed: list[torch.Tensor], outs: Any, out: Any, before: list[Labelled]) -> None:
        """What is changed in place keeps its labels, or nothing else may read the same storage."""
        after = {id(t): label for t, label in zip(outs, labelled_leaves(out), strict=True)}
        for t in changed:
            old, new = self.known.get(id(t)), after.get(id(t))
            self.blank.pop(id(t), None) if new is None or not new.fields else None
            others = [k for k in self.aliases.get(storage_of(t), ()) if k != id(t)]
            if new is None:
                self.refuse(name, before)
            elif others and not (old is not None and _alike(old, new)):
                self.refuse(name, [*before, new, *(self.known[k] for k in others if k in self.known)])

    def refuse(self, name: str, labels: list[Labelled], watched: Any = ()) -> None:
        for label in labels:
            self.freeze(label, _reason(name))
        for size in watched:
            size.used(name)

    def freeze(self, label: Any, reason: str) -> None:
        for f in label.fields if isinstance(label, Labelled) else ():
            self.run.freeze(f.ids, reason)

    # ---- labels of tensors

    def label(self, tensor: torch.Tensor) -> Labelled:
        if id(tensor) not in self.known:
            if is_functorch_wrapped_tensor(tensor):  # it has other axes than what it wraps
                self.freeze(self.label(get_unwrapped(tensor)), _reason("torch.func"))
                self.remember(tensor, Labelled(torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")))
                return self.known[id(tensor)]
            source = self.sources.get(id(tensor))
            if source is None:
                self.remember(tensor, Labelled(tensor.detach().to("meta")))
            else:
                if 1 in source.shape:
                    self.run.findings.ones.setdefault(self.run.names.get(id(source), ""), Uses()).all += 1
                label = self.run.tensor(source, [d for d, size in enumerate(source.shape) if size > 1])
                assert label is not None
                self.remember(tensor, label)
        return self.known[id(tensor)]

    def remember(self, tensor: torch.Tensor, label: Labelled) -> None:
        self.known[id(tensor)] = label
        self.kept.append(tensor)
        self.aliases.setdefault(storage_of(tensor), {})[id(tensor)] = None

    def keep(self, result: Any, name: str, args: Any, kwargs: Any, watched: Any = ()) -> None:
        """Results that hold no channels."""
        for t in pytree.tree_leaves(result):
            if isinstance(t, torch.Tensor):
                self.remember(t, Labelled(t.detach().to("meta")))
        if name in FACTORIES and isinstance(result, torch.Tensor):
            read = FACTORIES[name](result, args, kwargs)
            self.blank[id(result)] = tuple(isinstance(size, WatchedSize) for size in read)
            for size in watched:
                if not any(size is s for s in read):
                    size.used(name)

    def attach(self, result: Any, out: Any) -> None:
        for (_, t), label in zip(tensors_in(result), labelled_leaves(out), strict=True):
            self.remember(t, label)


class _Unseen(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Freezes what is read by ops that no call of torch in Python stands for: scripts, functions with a gradient."""

    def __init__(self, recording: _Recording) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recording = recording

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.recording.depth:
            labels = [self.recording.known.get(id(t)) for t in pytree.tree_leaves((args, kwargs))]
            self.recording.refuse(str(func), [label for label in labels if label is not None])
        return func(*args, **kwargs)


def _reason(name: str) -> str:
    return f"used by Python outside the traced parts ({name})"


def _count_writes(tensor: torch.Tensor) -> int | None:
    """How often a tensor was changed in place; None where torch does not count."""
    return None if tensor.is_inference() else tensor._version


def _is_changed(tensor: torch.Tensor, version: int | None, outs: list[torch.Tensor]) -> bool:
    """Whether a call changed a tensor in place: what does and is not counted gives it back."""
    return any(t is tensor for t in outs) if version is None else tensor._version != version


def _alike(a: Labelled, b: Labelled) -> bool:
    return len(a.fields) == len(b.fields) and all(
        f.dims == g.dims and np.array_equal(f.ids, g.ids) for f, g in zip(a.fields, b.fields, strict=True)
    )
