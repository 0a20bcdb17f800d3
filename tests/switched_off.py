"""A second implementation of "switched off", which shares no code with the package: what is removed is missing.

A slim network equals the dense one in which the removed channels are not there. `surgery.masked` says that with zeros,
and with norms that leave channels out. Here it is said with NaN, which stands for a value that is missing:

* A removed entry of a parameter is NaN. Which ones these are is read off the slim network's own parameters
  (`find_sources`): nothing is asked of the analysis, nor of the recipe.
* Ops that move data, or work position by position, carry NaN along by themselves.
* Ops that add something up (products with weights, attention, sums, statistics of norms) are given here once more:
  they add up what is there. A result of which no summand is there is missing itself.

The dense model runs as it is, traced or not, with torch's functions intercepted. Its outputs hold no NaN, unless a part
of them was removed; an op that adds up and is not known here makes them NaN, which no comparison passes over.
A gradient never passes through a missing value.

Comparisons make numbers of missing values: the models that are judged here compare nothing that is removed.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

NAN = float("nan")


@dataclass(frozen=True)
class Run:
    """What a model computes for one batch: outputs, and gradients of inputs and parameters by name."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor]


@dataclass(frozen=True)
class Source:
    """Where the entries of an edited parameter come from: flat positions in the parameter before, and factors."""

    positions: Tensor
    factors: Tensor


def find_sources(
    module: nn.Module, edit: Callable[[nn.Module], nn.Module], copies: bool = True
) -> tuple[nn.Module, dict[str, Source]]:
    """The edited module, and the source of each of its parameters.

    The edit runs on ``module`` with other numbers in its parameters, which it must not look at: a different one in each
    entry shows the positions. Where there may be ``copies``, ones show the factors before. A parameter with entries
    that mix several has no source.
    """
    edited, sources = edit(module), {}
    with parameters_as(module, lambda p: torch.ones_like(p)):
        factors = dict((edit(module) if copies else edited).named_parameters())
    with parameters_as(module, lambda p: 1 + torch.arange(p.numel(), dtype=p.dtype).view(p.shape)):
        shown = dict(edit(module).named_parameters())
    for name, number in shown.items():
        factor = factors[name].detach() if copies else torch.ones_like(number)
        positions = torch.where(factor == 0, torch.ones_like(factor), number.detach() / factor)
        if (positions - positions.round()).abs().max() < 1e-6:
            sources[name] = Source(positions.round().long() - 1, factor)
    return edited, sources


@contextlib.contextmanager
def parameters_as(module: nn.Module, values: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Other values in the parameters, for a while."""
    parameters = list(module.parameters())
    before = [p.detach().clone() for p in parameters]
    try:
        with torch.no_grad():
            for p in parameters:
                p.copy_(values(p))
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(parameters, before, strict=True):
                p.copy_(value)


def run_switched_off(
    dense: nn.Module, kept: Mapping[str, Source], inputs: tuple[Tensor, ...], train: bool, seed: int = 0
) -> Run:
    """The dense model without the entries that are not ``kept``."""
    names = {id(p): name for name, p in dense.named_parameters()}

    def without(parameter: Tensor) -> Tensor:
        values, places = torch.full_like(parameter, NAN).flatten(), kept[names[id(parameter)]].positions.flatten()
        values[places] = parameter.flatten()[places]
        return values.view(parameter.shape)

    with parameters_as(dense, without):
        return run(dense, inputs, train, seed, mode=Missing())


def run(
    module: nn.Module, inputs: tuple[Tensor, ...], train: bool, seed: int = 0, mode: TorchFunctionMode | None = None
) -> Run:
    """Call a module, and in training differentiate a random linear function of its outputs. It stays as it is."""
    state = {name: value.clone() for name, value in module.named_buffers()}
    was = module.training
    leaves = [x.detach().clone().requires_grad_(train) for x in inputs]
    try:
        with torch.set_grad_enabled(train):
            with mode or contextlib.nullcontext():
                outputs = list(tensors_of(module.train(train)(*leaves)))
            wanted = {f"input {k}": x for k, x in enumerate(leaves)} | dict(module.named_parameters())
            gradients = _gradients(outputs, wanted, seed) if train else {}
    finally:
        module.train(was)
        with torch.no_grad():
            for name, value in module.named_buffers():
                value.copy_(state[name])
    return Run([t.detach() for t in outputs], gradients)


def _gradients(outputs: list[Tensor], wanted: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in outputs]
    ends = [(t, w) for t, w in zip(outputs, weights, strict=True) if t.requires_grad]
    found = torch.autograd.grad([t for t, _ in ends], list(wanted.values()), [w for _, w in ends], allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(wanted.items(), found, strict=True)}


def narrowed(run: Run, kept: Mapping[str, Source]) -> Run:
    """A run with the gradients of the entries that are kept, as the slim model has them."""
    return Run(run.outputs, {
        name: gradient.flatten()[kept[name].positions] if name in kept else gradient
        for name, gradient in run.gradients.items()
    })  # fmt: skip


def pulled_back(run: Run, dense: Run, sources: Mapping[str, Source]) -> Run:
    """The run of an edited model with the gradients of the parameters before the edit, by the chain rule.

    Parameters that have no source are left out.
    """
    gradients = {}
    for name, before in dense.gradients.items():
        gradient = run.gradients[name]
        if name in sources:
            source, total = sources[name], torch.zeros_like(before).flatten()
            total.index_add_(0, source.positions.flatten(), (gradient * source.factors).flatten())
            gradients[name] = total.view(before.shape)
        elif name.startswith("input "):
            gradients[name] = gradient
    return Run(run.outputs, gradients)


def worst_difference(run: Run, expected: Run) -> float:
    """The largest difference, relative to the magnitude of each output, and of the gradients of each tensor.

    Raises:
        AssertionError: the comparison could not fail: outputs that are not finite, or all the same number.
    """
    values = torch.cat([t.flatten() for t in expected.outputs])
    assert values.isfinite().all(), "the expected outputs are not finite"
    assert (values != values[0]).any(), f"the expected outputs are all {values[0]}"
    assert len(run.outputs) == len(expected.outputs), "not as many outputs"
    assert run.gradients.keys() <= expected.gradients.keys(), "not the same parameters"
    largest = max((g.abs().max().item() for g in expected.gradients.values() if g.numel()), default=0.0)
    assert largest > 0 or not expected.gradients, "all expected gradients are zero"
    pairs = [(x, y, 0.0) for x, y in zip(run.outputs, expected.outputs, strict=True)]
    pairs += [(x, expected.gradients[name], 1e-2 * largest) for name, x in run.gradients.items()]
    worst = 0.0
    for x, y, least in pairs:
        assert x.shape == y.shape, f"shapes differ: {tuple(x.shape)} and {tuple(y.shape)}"
        difference = (x - y).abs().max().item() if x.numel() else 0.0
        scale = max(y.abs().max().item() if y.numel() else 0.0, least)
        ratio = 0.0 if difference == 0 else difference / scale if scale else float("inf")
        worst = ratio if ratio != ratio or ratio > worst else worst
        if worst != worst:
            break
    return worst


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Every tensor in tuples, lists, dicts and objects with attributes, in their order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors_of(part)
    elif isinstance(value, dict):
        for part in value.values():
            yield from tensors_of(part)
    for part in vars(value).values() if hasattr(value, "__dict__") and not isinstance(value, Tensor) else ():
        yield from tensors_of(part)


# ---------------------------------------------------------------------------------------------------------------------
# Functions on values of which some are missing


class Missing(TorchFunctionMode):
    """Runs torch's functions on tensors in which NaN stands for what is missing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in SUMS:
            return SUMS[name](*args, **kwargs)
        given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.is_floating_point()]
        in_place = kwargs.get("inplace") or (name.endswith("_") and not name.endswith("__"))
        if in_place or name in ("__get__", "__setitem__") or not any(map(_some, given)):
            return func(*args, **kwargs)
        with torch.no_grad():
            carried = func(*args, **kwargs)
        found = func(*pytree.tree_map(_fill, args), **pytree.tree_map(_fill, kwargs))
        return pytree.tree_map(_mark, found, carried)


def _some(t: Tensor) -> bool:
    return bool(t.detach().isnan().any())


def _fill(value: Any) -> Any:
    """A number that no function minds, where a value is missing."""
    if not (isinstance(value, Tensor) and value.is_floating_point()):
        return value
    return torch.where(value.detach().isnan(), torch.ones_like(value), value)


def _mark(value: Any, carried: Any) -> Any:
    """``value``, missing where ``carried`` is."""
    if not (isinstance(value, Tensor) and value.is_floating_point()):
        return value
    return _without(value, carried.isnan())


def _without(value: Tensor, missing: Tensor) -> Tensor:
    return torch.where(missing, torch.full_like(value, NAN), value)


def _there(x: Tensor) -> tuple[Tensor, Tensor]:
    """The values, 0 where they are missing, and 1 where they are there."""
    missing = x.detach().isnan()
    return torch.where(missing, torch.zeros_like(x), x), (~missing).to(x.dtype)


def _product(function: Callable[..., Tensor], *operands: Tensor) -> Tensor:
    """A function that sums products of its operands' entries."""
    values, flags = zip(*map(_there, operands), strict=True)
    with torch.no_grad():
        count = function(*flags)
    return _without(function(*values), count == 0)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y = _product(F.linear, input, weight)
    return y if bias is None else _plus(y, bias)


def _plus(y: Tensor, bias: Tensor) -> Tensor:
    return _without(_there(y)[0] + _there(bias)[0], y.detach().isnan() | bias.detach().isnan())


def _convolution(function: Callable[..., Tensor], transposed: bool) -> Callable[..., Tensor]:
    """A row of the weight that is wholly missing, or whose inputs are, gives a channel that is."""

    def run(input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        (x, x_there), (w, w_there) = _there(input), _there(weight)
        groups = args[3] if len(args) > 3 else kwargs.get("groups", 1)
        y = function(x, w, None, *args, **kwargs)
        channels = x_there.flatten(2).amax(2).view(len(x), groups, -1)
        rows = w_there.flatten(2).amax(2).view(groups, w.shape[0] // groups, w.shape[1])
        count = torch.einsum("bgi,gio->bgo" if transposed else "bgi,goi->bgo", channels, rows)
        missing = (count.flatten(1) == 0).view(*count.flatten(1).shape, *([1] * (y.ndim - 2)))
        y = _without(y, missing.expand_as(y))
        return y if bias is None else _plus(y, bias.view(-1, *([1] * (y.ndim - 2))))

    return run


def _einsum(equation: str, *operands: Any) -> Tensor:
    tensors = operands[0] if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else operands
    return _product(functools.partial(torch.einsum, equation), *tensors)


def _softmax(input: Tensor, dim: int, *args: Any, **kwargs: Any) -> Tensor:
    missing = input.detach().isnan()
    none = missing.all(dim, keepdim=True)
    scores = torch.where(missing, torch.full_like(input, -float("inf")), input)
    return _without(torch.where(none, torch.zeros_like(input), scores).softmax(dim), missing)


def _total(mean: bool) -> Callable[..., Tensor]:
    def run(input: Tensor, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Tensor:
        dims = tuple(range(input.ndim)) if dim is None else dim
        x, there = _there(input)
        count = there.sum(dims, keepdim=keepdim)
        y = x.sum(dims, keepdim=keepdim) / count.clamp(min=1) if mean else x.sum(dims, keepdim=keepdim)
        return _without(y, count == 0)

    return run


def _standardise(x: Tensor, dims: Any, eps: float, centre: bool = True) -> Tensor:
    """By statistics over what is there of ``dims``."""
    values, there = _there(x)
    count = there.sum(dims, keepdim=True).clamp(min=1)
    if centre:
        values = values - values.sum(dims, keepdim=True) / count
    spread = ((values * there).square().sum(dims, keepdim=True) / count + eps).sqrt()
    return _without(values / spread, there == 0)


def _affine(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None:
        y = _without(_there(y)[0] * _there(weight)[0], y.detach().isnan() | weight.detach().isnan())
    return y if bias is None else _plus(y, bias)


def _layer_norm(
    input: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *_: Any
) -> Tensor:
    return _affine(_standardise(input, tuple(range(-len(shape), 0)), eps), weight, bias)


def _rms_norm(input: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    return _affine(_standardise(input, tuple(range(-len(shape), 0)), eps, centre=False), weight, None)


def _group_norm(
    input: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5, *_: Any
) -> Tensor:
    y = _standardise(input.reshape(len(input), groups, -1), -1, eps).view(input.shape)
    shape = (-1, *([1] * (input.ndim - 2)))
    return _affine(y, *(None if v is None else v.view(shape) for v in (weight, bias)))


def _batch_norm(
    input: Tensor, mean: Any, variance: Any, weight: Any = None, bias: Any = None, training: bool = False, *rest: Any,
    **named: Any,
) -> Tensor:  # fmt: skip
    """Each channel on its own: one that is missing is missing afterwards."""
    y = F.batch_norm(_fill(input), mean, variance, _fill(weight), _fill(bias), training, *rest, **named)
    missing = input.detach().isnan()
    for vector in (weight, bias):
        if vector is not None:
            missing = missing | vector.detach().isnan().view(-1, *([1] * (input.ndim - 2)))
    return _without(y, missing)


def _normalize(input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: None = None) -> Tensor:
    x, there = _there(input)
    return _without(F.normalize(x, p, dim, eps), there == 0)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
    scores = _product(torch.matmul, query, key.transpose(-2, -1))
    scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        scores = scores.masked_fill(~allowed, -float("inf"))
    if attn_mask is not None:
        hidden = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -float("inf")) if hidden else _plus(scores, attn_mask)
    return _product(torch.matmul, _softmax(scores, -1), value)


def _multi_head(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    given = inspect.signature(F.multi_head_attention_forward).bind(*args, **kwargs)
    given.apply_defaults()
    a = given.arguments
    assert a["key_padding_mask"] is a["bias_k"] is None
    single = a["query"].ndim == 2
    inputs = [a[k].unsqueeze(1) if single else a[k] for k in ("query", "key", "value")]  # (tokens, batch, channels)
    separate = a["use_separate_proj_weight"]
    weights = [a[f"{k}_proj_weight"] for k in "qkv"] if separate else a["in_proj_weight"].chunk(3)
    biases = [None] * 3 if a["in_proj_bias"] is None else a["in_proj_bias"].chunk(3)
    heads, (tokens, batch, _) = a["num_heads"], inputs[0].shape
    q, k, v = (
        _linear(x, w, b).reshape(len(x), batch, heads, -1).permute(1, 2, 0, 3)
        for x, w, b in zip(inputs, weights, biases, strict=True)
    )
    mask = a["attn_mask"]
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(mask, -float("inf"))
    scores = _product(torch.matmul, q, k.transpose(-2, -1)) * q.shape[-1] ** -0.5
    shares = _softmax(scores if mask is None else _plus(scores, mask), -1)
    y = _product(torch.matmul, shares, v).permute(2, 0, 1, 3).reshape(tokens, batch, -1)
    y = _linear(y, a["out_proj_weight"], a["out_proj_bias"])
    shown = None
    if a["need_weights"]:
        shown = _total(mean=True)(shares, 1) if a["average_attn_weights"] else shares
    if single:
        y, shown = y.squeeze(1), None if shown is None else shown.squeeze(0)
    return y, shown


def _recurrent(name: str) -> Callable[..., Any]:
    """A unit whose rows are 0 stays 0 from a state of 0: it is computed so, and missing afterwards."""
    function = getattr(torch, name)

    def run(input: Tensor, states: Any, weights: Any, biased: bool, layers: int, *rest: Any) -> Any:
        both = rest[2]
        found = function(
            _there(input)[0],
            pytree.tree_map(lambda t: _there(t)[0], states),
            [_there(w)[0] for w in weights],
            *(biased, layers, *rest),
        )
        step = len(weights) // (layers * (1 + both))
        hidden = [w[: w.shape[1]].detach().isnan().all(1) for w in weights[1::step]]  # by layer and direction
        last = torch.cat(hidden[-2:] if both else hidden[-1:])
        states_missing = torch.stack(hidden)[:, None]
        return (_without(found[0], last), *(_without(state, states_missing) for state in found[1:]))

    return run


SUMS: dict[str, Callable[..., Any]] = {
    "linear": _linear,
    "matmul": lambda a, b: _product(torch.matmul, a, b),
    "einsum": _einsum,
    "softmax": _softmax,
    "mean": _total(mean=True),
    "sum": _total(mean=False),
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "group_norm": _group_norm,
    "batch_norm": _batch_norm,
    "normalize": _normalize,
    "scaled_dot_product_attention": _attention,
    "multi_head_attention_forward": _multi_head,
    **{name: lambda a, b: _product(torch.matmul, a, b) for name in ("mm", "bmm", "__matmul__")},
    **{f"conv{n}d": _convolution(getattr(F, f"conv{n}d"), False) for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": _convolution(getattr(F, f"conv_transpose{n}d"), True) for n in (1, 2, 3)},
    **{name: _recurrent(name) for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")},
}
"""Functions and methods that add something up, by name."""
