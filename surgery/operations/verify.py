"""Whether two modules compute the same, with figures: outputs at two batch sizes, and gradients in training."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from surgery.errors import SurgeryError, UsageError, VerificationError
from surgery.graph.batches import Args, Kwargs, batch_of, with_batch
from surgery.graph.fused import avoid_fused_paths
from surgery.graph.outputs import tensors_in
from surgery.graph.seeding import seeded
from surgery.graph.traced import example_inputs as remembered_inputs
from surgery.graph.traced import is_traced
from surgery.operations.aligned import Taken, align

_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
_SMALL = 1e-2
"""Gradients below this fraction of the largest gradient are compared on its scale: some are 0 but for rounding."""


@dataclass(frozen=True)
class Verification:
    """How far two modules are apart on the same inputs."""

    max_abs: float
    """Largest absolute difference of any output element."""
    max_rel: float
    """Largest absolute difference within an output, divided by that output's largest magnitude; over all outputs.
    Not a number where there is a ``problem``, so that no bound on it can hold."""
    tolerance: float
    """Bound on ``max_rel`` and ``max_grad``."""
    dtype: str
    outputs: int
    """Number of output tensors compared, at one batch size."""
    batches: int = 1
    """Number of batch sizes compared: 2, or 1 where the reference takes no other."""
    max_grad: float = 0.0
    """As ``max_rel``, of the gradients of parameters and inputs; 0 where none were compared."""
    gradients: int = 0
    """Number of gradients compared, at one batch size."""
    problem: str = ""
    """Why the comparison proves nothing, whatever the differences; empty where it does."""

    @property
    def ok(self) -> bool:
        """Whether the modules agree; never for outputs that are not numbers, or that could not have differed."""
        return not self.problem and self.max_rel <= self.tolerance and self.max_grad <= self.tolerance

    def to_dict(self) -> dict[str, Any]:
        """The fields and ``ok``, for JSON, which has no number that is not one: ``max_rel`` is None then."""
        return {**asdict(self), "max_rel": None if math.isnan(self.max_rel) else self.max_rel, "ok": self.ok}

    def raise_if_different(self) -> Verification:
        """Return self, or raise `VerificationError` with the figures."""
        if self.problem:
            raise VerificationError(self.problem)
        for what, relative, absolute in (
            ("outputs", self.max_rel, f" ({self.max_abs:.2e} absolute)"),
            ("gradients", self.max_grad, ""),
        ):
            if not relative <= self.tolerance:
                raise VerificationError(
                    f"{what} differ by {relative:.2e} of their magnitude{absolute}; "
                    f"{self.tolerance:.0e} is allowed in {self.dtype}"
                )
        return self


@dataclass(frozen=True)
class _Run:
    """What a module gave for one batch."""

    outputs: list[Tensor]
    trains: bool
    """Whether gradients flow from the outputs."""
    gradients: dict[str, Tensor]
    """Of inputs and parameters, by name."""
    parameters: dict[str, Tensor]
    taken: Taken


def verify(
    module: nn.Module,
    reference: nn.Module,
    example_inputs: Any = None,
    *,
    kwargs: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    tolerance: float | None = None,
    train: bool = False,
    seed: int = 0,
) -> Verification:
    """Run two modules on the same inputs and compare what they compute.

    Outputs are compared at the batch size of the inputs and at another one, where the reference takes it. Tensors are
    found in outputs of any kind (`surgery.graph.outputs.tensors_in`). Both modules run as copies: their modes,
    statistics and the global RNG stay as they are.

    A comparison that could not fail is a failure, with a ``problem``: outputs that are all zero, all one number, empty
    or not finite.

    Where edits changed the outputs themselves (``outputs="free"``), the channels that both modules hold are compared,
    copies with what they copy: `surgery.outputs` says which they are.

    Args:
        module: what is checked.
        reference: what it should compute.
        example_inputs: a tensor, or a tuple of the positional inputs. By default random inputs of the shapes that
            ``module``, or else ``reference``, was traced with.
        kwargs: inputs passed by name.
        dtype: compute in this dtype (``torch.float64`` tells rounding from errors); by default in the modules' own.
        tolerance: bound on the relative differences; 1e-10 in float64, 1e-4 in float32 by default.
        train: compare in ``train()`` rather than in ``eval()``, and gradients too: those of the inputs, and those of
            the parameters that both have by the same name, with the same values, in any order. The loss is a random
            linear function of the outputs. Both copies see the same random numbers; where one is narrower, dropout
            draws others for it, and is to be set to 0.
        seed: of these random numbers.

    Returns:
        the differences, and whether they are within the tolerance.

    Raises:
        UsageError: the outputs do not have the same structure and shapes, or each module lacks channels of the other;
            or no inputs, and neither module is traced.

    Example:
        >>> wide = surgery.widen(traced, 1.5)
        >>> surgery.verify(wide, traced, dtype=torch.float64).ok
        True
    """
    if example_inputs is None and kwargs is None:
        args, named = remembered_inputs(module if is_traced(module) else reference)
    else:
        given = () if example_inputs is None else example_inputs
        args, named = given if isinstance(given, tuple) else (given,), dict(kwargs or {})
    ours, theirs = align(module, reference, train)
    first = _run(module, args, named, dtype, train, seed, ours)
    second = _run(reference, args, named, dtype, train, seed, theirs)
    result = _compare(first, second, tolerance)
    other = _other_batch(reference, args, named, dtype, train, seed, theirs)
    if other is None:
        return result
    inputs, expected = other
    try:
        again = _compare(_run(module, *inputs, dtype, train, seed, ours), expected, tolerance)
    except SurgeryError:
        return result  # refused with a reason, as a module may that is good for the traced batch alone
    except Exception as error:
        size = batch_of(*inputs)
        problem = result.problem or f"it cannot be called with a batch of {size}: {error}"
        return replace(result, problem=problem, max_rel=math.nan)
    return _worse(result, again)


def _other_batch(
    reference: nn.Module, args: Args, kwargs: Kwargs, dtype: torch.dtype | None, train: bool, seed: int, taken: Taken
) -> tuple[tuple[Args, Kwargs], _Run] | None:
    """Inputs at another batch size and what the reference gives for them; None where it does not take them."""
    try:
        inputs = with_batch(args, kwargs, 3 if batch_of(args, kwargs) == 2 else 2)
        return inputs, _run(reference, *inputs, dtype, train, seed, taken)
    except Exception:  # whatever a model raises on a batch that it is not made for
        return None


def _worse(a: Verification, b: Verification) -> Verification:
    """Two comparisons as one."""
    return Verification(
        _larger(a.max_abs, b.max_abs),
        _larger(a.max_rel, b.max_rel),
        a.tolerance,
        a.dtype,
        a.outputs,
        a.batches + b.batches,
        _larger(a.max_grad, b.max_grad),
        a.gradients,
        a.problem or b.problem,
    )


def _compare(run: _Run, expected: _Run, tolerance: float | None) -> Verification:
    """The differences for one batch."""
    sides = (("first", run), ("second", expected))
    shapes = [[tuple(t.shape) for t in side.outputs] for _, side in sides]
    if shapes[0] != shapes[1]:
        edited = [f"the {which} should have {run.taken}" for which, run in sides if run.taken.sizes]
        raise UsageError("; ".join([f"outputs have different shapes: {shapes[0]} and {shapes[1]}", *edited]))
    max_abs = max_rel = max_grad = 0.0
    for x, y in zip(run.outputs, expected.outputs, strict=True):
        difference = _magnitude(_wide(x) - _wide(y))
        max_abs = _larger(max_abs, difference)
        max_rel = _larger(max_rel, _ratio(difference, _magnitude(_wide(y))))
    problem = _vacuous(expected.outputs)
    pairs = list(_gradient_pairs(run, expected))
    largest = max((_magnitude(y) for _, y in pairs), default=0.0)
    for x, y in pairs:
        max_grad = _larger(max_grad, _ratio(_magnitude(x - y), max(_magnitude(y), _SMALL * largest)))
    if expected.trains and pairs and not largest and not problem:
        problem = "all gradients are zero on these inputs: there is nothing to compare"
    floating = [t.dtype for t in expected.outputs if t.is_floating_point() or t.is_complex()]
    used = floating[0] if floating else expected.outputs[0].dtype if expected.outputs else torch.float32
    bound = _TOLERANCE.get(used, 1e-4) if tolerance is None else tolerance
    name = str(used).removeprefix("torch.")
    if problem:
        max_rel = math.nan
    return Verification(max_abs, max_rel, bound, name, len(run.outputs), 1, max_grad, len(pairs), problem)


def _vacuous(outputs: list[Tensor]) -> str:
    """Why outputs could not show a difference; empty where they could."""
    values = [_wide(t).flatten() for t in outputs if t.numel()]
    if not values:
        return "the outputs are empty on these inputs: there is nothing to compare"
    if not all(bool(torch.isfinite(v).all()) for v in values):
        return "the outputs of the reference are not finite on these inputs: there is nothing to compare"
    one = values[0][0]
    if any(bool((v != one).any()) for v in values):
        return ""
    if one == 0:
        return "the outputs of the reference are all zero on these inputs: there is nothing to compare"
    if sum(len(v) for v in values) > 1:
        return f"the outputs of the reference are all {one.item():g} on these inputs: there is nothing to compare"
    return ""


def _gradient_pairs(run: _Run, expected: _Run) -> Iterator[tuple[Tensor, Tensor]]:
    """The gradients of both by name, where inputs or parameters hold the same values.

    An edit may move entries, and equal ones cannot be told apart: where values are in other places, both are brought
    into the order of the values, and of the gradients within equal values. Of more than `_MANY` moved entries, those
    with the least values are compared.
    """
    for name, ours in run.gradients.items():
        theirs = expected.gradients.get(name)
        if theirs is None or ours.shape != theirs.shape:
            continue
        if name not in run.parameters or torch.equal(run.parameters[name], expected.parameters[name]):
            yield ours, theirs
            continue
        (a, own), (b, other) = (_sort(r.parameters[name], g) for r, g in ((run, ours), (expected, theirs)))
        if torch.equal(a, b):
            yield own, other


_MANY = 100_000


def _sort(values: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
    flat, gradients = values.flatten(), gradients.flatten()
    if flat.is_complex():
        return flat, gradients
    if len(flat) > _MANY:
        least = flat.topk(_MANY, largest=False, sorted=False).indices
        flat, gradients = flat[least], gradients[least]
    order = gradients.argsort(stable=True)
    order = order[flat[order].argsort(stable=True)]
    return flat[order], gradients[order]


def _run(
    module: nn.Module, args: Args, kwargs: Kwargs, dtype: torch.dtype | None, train: bool, seed: int, taken: Taken
) -> _Run:
    """Call a copy of a module on copies of inputs, and take of its outputs what is compared; with ``train``, and
    differentiate."""
    twin = copy.deepcopy(module).train(train)
    avoid_fused_paths(twin)
    twin = twin if dtype is None else twin.to(dtype)
    leaves: list[Tensor] = []

    def prepared(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.detach().clone()
        value = value.to(dtype) if dtype is not None and value.is_floating_point() else value
        if train and value.is_floating_point():
            leaves.append(value.requires_grad_())
            return value.clone()  # a model may write into its input, and not into a leaf
        return value

    with torch.set_grad_enabled(train), seeded(seed):
        inputs, named = pytree.tree_map(prepared, (args, kwargs))
        outputs = taken.of(tensors_in(twin(*inputs, **named)))
        parameters = {name: p for name, p in twin.named_parameters() if p.requires_grad} if train else {}
        wanted = {**{f"input {k}": leaf for k, leaf in enumerate(leaves)}, **parameters}
        gradients = _gradients(outputs, wanted, seed) if train else {}
    trains = any(output.requires_grad for output in outputs)
    held = {name: p.detach() for name, p in parameters.items()}
    return _Run([t.detach() for t in outputs], trains, gradients, held, taken)


def _gradients(outputs: list[Tensor], wanted: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """The gradients of a random linear function of the outputs, 0 for what it does not depend on."""
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(t.shape, generator=generator).to(t.device) for t in outputs]
    pairs = [(t, w.to(t.dtype)) for t, w in zip(outputs, weights, strict=True) if t.requires_grad]
    found: Sequence[Tensor | None] = [None] * len(wanted)
    ends, factors = [t for t, _ in pairs], [w for _, w in pairs]
    try:
        if pairs and wanted:
            found = torch.autograd.grad(ends, list(wanted.values()), factors, allow_unused=True)
    except RuntimeError as error:
        raise UsageError(f"the outputs cannot be differentiated: {error}") from error
    return {
        name: _wide(torch.zeros_like(at) if gradient is None else gradient.to_dense())
        for (name, at), gradient in zip(wanted.items(), found, strict=True)
    }


def _wide(tensor: Tensor) -> Tensor:
    """In float64, or complex128."""
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _magnitude(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0


def _ratio(difference: float, scale: float) -> float:
    return difference / scale if scale else (math.inf if difference else 0.0)


def _larger(a: float, b: float) -> float:
    return b if math.isnan(b) or b > a else a
