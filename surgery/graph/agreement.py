"""A first look at what `trace` made: it can be called, and gives what the model gives."""

from __future__ import annotations

import copy
import operator
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from surgery.errors import TraceError, UsageError
from surgery.graph.batches import batch_of, with_batch
from surgery.graph.fused import warning_of_padding
from surgery.graph.outputs import tensors_in
from surgery.graph.seeding import seed_generators
from surgery.graph.traced import TracedModule, traced_parts

_FEW = 3e10
"""Up to which product of parameters and input numbers gradients are compared too."""

_MANY = 3e12
"""And up to which a second batch size is: a second or so."""

_TOLERANCE = {torch.float64: 1e-8, torch.complex128: 1e-8, torch.float32: 1e-3, torch.complex64: 1e-3}
"""Relative; the same ops run on both sides, so all but their order agrees. Lower precisions: 5e-2."""


def check_agreement(
    traced: nn.Module,
    copied: Callable[[], nn.Module],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    padding: frozenset[str] = frozenset(),
) -> bool:
    """Run a copy of ``traced`` and the model that ``copied`` gives on the example inputs, and compare the results.

    Evaluation is compared always, training where the graph depends on the mode. Models that are not
    large are compared at a second batch size too, and small ones in both modes and in gradients, where the model itself
    runs like that. Guards may refuse that batch
    size. Models on the meta device cannot be run and are not checked.

    Args:
        padding: paths of encoders that zero padded positions in some modes: a call with padding warns.

    Returns:
        whether they were compared at a second batch size.

    Raises:
        UsageError: the model itself does not run on them.
        TraceError: they differ, or only the model runs.
    """
    if any(t.is_meta for _, t in (*tensors_in((args, kwargs)), *_named_tensors(traced))):
        return False
    model = copied()
    name, runs = type(model).__name__, _plan(traced, args, kwargs)
    with warning_of_padding(model, padding):
        expected = _observe(model, runs)
    del model  # at most one copy in addition to the result
    if expected[0].error is not None and runs[0].gradients:  # autograd may forbid what the model does in place
        runs = [replace(run, gradients=False) for run in runs]
        expected = _observe(copied(), runs)
    if expected[0].error is not None and all(seen.error for seen in expected):
        why = _first_line(expected[0].error)
        raise UsageError(f"the example inputs do not fit: {name} cannot take them ({why})")
    found = _observe(copy.deepcopy(traced), [run for run, seen in zip(runs, expected, strict=True) if not seen.error])
    expected = [seen for seen in expected if not seen.error]
    wrong = _first_difference(expected, found)
    if wrong and not _first_difference(expected, _observe(copied(), [seen.run for seen in expected])):
        raise TraceError(f"{name} cannot be traced faithfully: {wrong}")
    return any(seen.run.other_batch and seen.error is None for seen in found)


@dataclass(frozen=True)
class _Run:
    """One call to compare."""

    what: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    training: bool = False
    gradients: bool = False
    other_batch: bool = False


@dataclass
class _Seen:
    """What a call gave."""

    run: _Run
    kind: type | None = None
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    gradients: dict[str, torch.Tensor] | None = field(default_factory=dict)
    """None where autograd refuses."""
    error: Exception | None = None

    def says(self) -> str:
        """Class and tensors of the result."""
        return f"{getattr(self.kind, '__name__', '')} with tensors at {', '.join(self.tensors) or 'none'}"


def _plan(traced: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[_Run]:
    numbers = sum(t.numel() for _, t in tensors_in((args, kwargs)))
    work = _weights(traced) * numbers
    cheap = work <= _FEW
    runs = [_Run("in evaluation", args, kwargs, gradients=cheap)]
    if cheap or _depends_on_mode(traced):
        runs.append(_Run("in training", args, kwargs, training=True, gradients=cheap))
    if cheap:
        batch = batch_of(args, kwargs)
        if batch:
            other = with_batch(args, kwargs, 1 if batch > 1 else 2)
            runs.append(_Run("at another batch size", other[0], other[1], other_batch=True))
    return runs


def _weights(traced: nn.Module) -> int:
    """How many parameters a call reads, each as often as it is read."""
    if not isinstance(traced, TracedModule):
        return sum(p.numel() for p in traced.parameters())
    called = (traced.get_submodule(str(n.target)) for n in traced.graph.nodes if n.op == "call_module")
    read = (n.target for n in traced.graph.nodes if n.op == "get_attr")
    own = (operator.attrgetter(str(name))(traced) for name in read)
    return sum(_weights(leaf) for leaf in called) + sum(t.numel() for t in own if isinstance(t, torch.Tensor))


def _depends_on_mode(traced: nn.Module) -> bool:
    return not isinstance(traced, TracedModule) or any(
        part.train_graph is not None or any("training_flag_of" in n.meta for n in part.graph.nodes)
        for _, part in traced_parts(traced)
    )


def _observe(module: nn.Module, runs: list[_Run]) -> list[_Seen]:
    """Make the calls, one after the other, of a module that may change."""
    return [_call(module, run) for run in runs]


def _call(module: nn.Module, run: _Run) -> _Seen:
    seen = _Seen(run)
    module.train(run.training)
    for p in module.parameters():
        p.grad = None

    def prepare(t: torch.Tensor) -> torch.Tensor:
        return t.detach().clone().requires_grad_(run.gradients and t.is_floating_point())

    args, kwargs = pytree.tree_map_only(torch.Tensor, prepare, (run.args, run.kwargs))
    with _repeatable(module), torch.inference_mode(False), torch.set_grad_enabled(run.gradients):
        try:
            result = module(*args, **kwargs)
        except Exception as error:  # the model's own Python, which may raise anything
            seen.error = error
            return seen
        seen.kind = type(result)
        seen.tensors = {path: t.detach() for path, t in tensors_in(result)}
        if run.gradients:
            leaves = {f"input{path}": t for path, t in tensors_in((args, kwargs))} | dict(module.named_parameters())
            seen.gradients = _gradients([t for _, t in tensors_in(result)], leaves)
    return seen


def _gradients(outputs: list[torch.Tensor], leaves: dict[str, torch.Tensor]) -> dict[str, torch.Tensor] | None:
    """Gradients of a random combination of the outputs; None where autograd refuses."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.rand(t.shape, generator=generator).to(t.device, t.real.dtype) for t in outputs]
    terms = [(t.real * w).sum() for t, w in zip(outputs, weights, strict=True) if t.requires_grad]
    if not terms:
        return {}
    try:
        torch.stack([term.double() for term in terms]).sum().backward()  # type: ignore[no-untyped-call]
    except RuntimeError:
        return None
    return {name: t.grad for name, t in leaves.items() if t.grad is not None}


def _first_difference(expected: list[_Seen], found: list[_Seen]) -> str:
    """What is different, for a message; empty where nothing is."""
    for theirs, ours in zip(expected, found, strict=True):
        if ours.error is not None:
            if theirs.run.other_batch and isinstance(ours.error, UsageError):
                return ""  # a guard
            return f"{theirs.run.what}, its graph raises {type(ours.error).__name__}: {_first_line(ours.error)}"
        if ours.kind is not theirs.kind or ours.tensors.keys() != theirs.tensors.keys():
            return f"{theirs.run.what}, it returns {ours.says()} and the model returns {theirs.says()}"
        wrong = _different(ours.tensors, theirs.tensors)
        if wrong is not None:
            return f"{theirs.run.what}, the output{wrong} is another"
        if theirs.gradients is None:  # a graph adds where the model adds in place, which autograd may refuse
            continue
        if ours.gradients is None:
            return f"{theirs.run.what}, its graph cannot be differentiated"
        if ours.gradients.keys() != theirs.gradients.keys():
            return f"{theirs.run.what}, gradients reach other parameters or inputs: " + ", ".join(
                sorted(ours.gradients.keys() ^ theirs.gradients.keys())
            )
        wrong = _different(ours.gradients, theirs.gradients)
        if wrong is not None:
            return f"{theirs.run.what}, the gradient of {wrong} is another"
    return ""


def _different(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> str | None:
    for name, a in ours.items():
        b = theirs[name]
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            return name
        if not (a.is_floating_point() or a.is_complex()):
            same = bool(torch.equal(a, b))
        else:
            scale = float(b.nan_to_num(0.0, 0.0, 0.0).abs().max()) if b.numel() else 0.0
            limit = _TOLERANCE.get(b.dtype, 5e-2) * scale
            same = torch.allclose(a, b, rtol=0.0, atol=limit, equal_nan=True)
        if not same:
            return name
    return None


@contextmanager
def _repeatable(module: nn.Module) -> Iterator[None]:
    """The same random numbers in every run, without warnings; generators are left as they were."""
    devices = {t.device.index or 0 for _, t in _named_tensors(module) if t.device.type == "cuda"}
    python, arrays = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            random.seed(0)
            np.random.seed(0)
            seed_generators(0)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)


def _named_tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
