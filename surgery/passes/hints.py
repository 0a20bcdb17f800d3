"""Hints: a student's layer learns to predict a teacher's (FitNets, Romero et al., ICLR 2015)."""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from surgery.errors import EditError, TraceError, UsageError
from surgery.graph.dims import Dimensions, dimensions
from surgery.graph.guards import Values
from surgery.graph.labels import Labelled
from surgery.graph.maxout import Maxout
from surgery.graph.traced import TracedModule, example_inputs, info, named_tensors
from surgery.graph.whole import bound_arguments
from surgery.passes.blocks import Flow
from surgery.passes.middle import middle
from surgery.passes.regressors import Layout, make_regressor, match
from surgery.passes.sites import Site, activation_of, output_sites
from surgery.passes.truncate import truncate

Names = str | Sequence[str]


def attach_hint(
    student: nn.Module,
    teacher: nn.Module,
    guided: Names | Mapping[str, str] | None = None,
    hint: Names | None = None,
    *,
    regressor: str = "auto",
    seed: int = 0,
) -> HintPair:
    """What stage 1 of FitNets trains: the student as far as its guided layer, and a regressor from there to the hint,
    the output of a layer of the teacher (section 2.2).

    Both networks are cut off behind these layers, so that only the two prefixes are computed. A layer's output is taken
    behind the normalisation and activation that follow it alone, that of a container where it leaves it.

    ``regressor`` says what leads from the guided layer to the hint:

    - ``"auto"``: one convolution from size N_g to N_h: with stride where N_g is a multiple of N_h, transposed where N_h
      is one of N_g, else the paper's with a valid kernel of N_g - N_h + 1; a 1 x 1 convolution where they are equal.
      Where that is no way, or takes a kernel above 8, maps are brought to the hint's size before (average pooling, or
      linear interpolation where one grows) and the kernel is 1 x 1. Vectors and tokens of equal number have a linear
      layer. Tokens beside a map, or beside another number of tokens, are laid out as a grid; a class token is left
      out, of the hint too. Tokens that are no such grid are interpolated along the sequence.
    - ``"conv"``: the paper's valid convolution, of any size; ``"fc"``: the paper's fully connected layer.
    - ``"none"``: no regressor, for outputs of equal shape, as the authors' code has it. The paper's equation 3, and so
      ``"auto"``, has one there too.

    It ends in the non-linearity that the hint is the output of, as the paper asks: with as many pieces where that is a
    `Maxout`, without any where the hint is linear.

    Args:
        student, teacher: traced modules that take the same inputs. Neither is changed, and nothing is shared with them.
        guided: a layer or container of the student, several, or a mapping from guided layers to hints.
        hint: a layer or container of the teacher, or as many as are guided. By default the layer in the middle: of the
            values that everything passes through the one nearest to half of the depth, which is counted in layers with
            weights; of two as near the student's later and the teacher's earlier one, as in the paper.
        regressor: ``"auto"``, ``"conv"``, ``"fc"`` or ``"none"``.
        seed: of the regressor's initial weights.

    Raises:
        UsageError: an unknown layer or regressor, a module that is traced in parts, networks that cannot be called on
            the same inputs.
        EditError: a layer without one output, in training and in evaluation, or a regressor that cannot be.
    """
    ours, theirs = _Network(student, "student"), _Network(teacher, "teacher")
    names = _pairs(ours, theirs, guided, hint)
    taps = [(ours.tap(g), theirs.tap(h, training=False)) for g, h in names]
    truncated = (ours.truncated([tap for tap, _ in taps]), theirs.truncated([tap for _, tap in taps]))
    shapes = _output_shapes(truncated, ours, theirs, [(g.value.shape, h.value.shape) for g, h in taps])
    regressors, skipped = [], []
    for k, ((g, h), (guided_shape, hint_shape)) in enumerate(zip(taps, shapes, strict=True)):
        found = match(g.layout(ours.dims, guided_shape), h.layout(theirs.dims, hint_shape), regressor)
        regressors.append(make_regressor(found, regressor, h.nonlinearity(), seed + k))
        skipped.append(found.skipped)
    return HintPair(*truncated, regressors, skipped, names, student)


class HintPair(nn.Module):
    """A truncated student that ends in a regressor, and the truncated teacher whose output it learns to predict.

    Called, it gives the hint loss, so it can be wrapped like any model. The teacher is frozen, stays in ``eval()``, and
    gives outputs without gradients.

    Attributes:
        student: traced, from the student's inputs to the prediction of the hint; a tuple of them for several pairs.
        teacher: traced, from the same inputs to the hint, or hints.
        regressor: the part of ``student`` that `restore` leaves out; a list for several pairs.
        names: for each pair the names of the guided layer and of the hint's.
    """

    student: TracedModule
    teacher: TracedModule

    def __init__(
        self,
        student: TracedModule,
        teacher: TracedModule,
        regressors: Sequence[nn.Sequential],
        skipped: Sequence[tuple[int, int]],
        names: Sequence[tuple[str, str]],
        whole: nn.Module,
    ) -> None:
        super().__init__()
        self.names = tuple(names)
        self._prefix = tuple(named_tensors(student))
        like = next((p for p in student.parameters() if p.is_floating_point()), torch.empty(0))
        held: nn.Module = regressors[0] if len(names) == 1 else nn.ModuleList(regressors)
        at = next(n for n in ("regressor", *(f"regressor_{k}" for k in range(len(whole._modules) + 1)))
                  if not hasattr(whole, n))  # fmt: skip
        student.add_module(at, held.to(like.device, like.dtype).train(student.training))
        self._regressor_at = at
        for graph in student.graphs:
            _extend(graph, regressors, [s for s, _ in skipped], at)
        _extend(teacher.graph, [], [t for _, t in skipped], "")
        for module in (student, teacher):
            module.recompile()
        self.student, self.teacher = student, teacher.requires_grad_(False).eval()
        self.training = student.training

    @property
    def regressor(self) -> nn.Module:
        """From the guided layer's output to the hint's shape."""
        return self.student.get_submodule(self._regressor_at)

    def loss(self, *args: Any, **kwargs: Any) -> Tensor:
        """The hint loss (equation 3) on a batch, called like the networks: see `hint_loss`."""
        return hint_loss(self.student(*args, **kwargs), self.teacher(*args, **kwargs))

    forward = loss

    def train(self, mode: bool = True) -> HintPair:
        """Set the student's mode; the teacher stays in ``eval()``."""
        super().train(mode)
        self.teacher.eval()
        return self

    def restore(self, student: nn.Module) -> nn.Module:
        """A copy of the whole student with what was trained here: parameters, and statistics of norms.

        It has no regressor, no tap and no hook, keeps the names and the recipe, and shares nothing with this pair.

        Args:
            student: the module that the hint was attached to, or one like it.

        Raises:
            UsageError: a tensor of the prefix has no counterpart of its shape in ``student``.
        """
        own, result = named_tensors(self.student), copy.deepcopy(student)
        known = named_tensors(result)
        for name in self._prefix:
            if name not in known or known[name].shape != own[name].shape:
                found = f"has it as {tuple(known[name].shape)}" if name in known else "has none"
                raise UsageError(
                    f"{name!r} of the guided prefix is {tuple(own[name].shape)}, and this student {found}: pass the "
                    "student that the hint was attached to"
                )
        with torch.no_grad():
            for name in self._prefix:
                known[name].copy_(own[name])
        return result


def hint_loss(guided: Tensor | Sequence[Tensor], hint: Tensor | Sequence[Tensor]) -> Tensor:
    """Half of the squared distance of each sample, mean over the batch (equation 3); summed over pairs.

    Args:
        guided: what the regressor gives, (N, ...), or several.
        hint: the teacher's output of the same shape, or several. Half-precision values are compared in float32.

    Raises:
        UsageError: the shapes differ.
    """
    if not isinstance(guided, Tensor):
        return torch.stack([hint_loss(g, h) for g, h in zip(guided, hint, strict=True)]).sum()
    assert isinstance(hint, Tensor)
    if guided.shape != hint.shape:
        raise UsageError(
            f"the regressor gives {tuple(guided.shape)} and the hint is {tuple(hint.shape)}: attach the hint to "
            "networks that were traced with inputs of this size"
        )
    dtype = torch.promote_types(torch.promote_types(guided.dtype, hint.dtype), torch.float32)
    return (guided.to(dtype) - hint.to(dtype)).square().flatten(1).sum(1).mean() / 2


class _Tap:
    """A value that is taken out of a network, in each of the graphs that compute it."""

    def __init__(self, flows: Sequence[Flow], nodes: Sequence[fx.Node], where: str) -> None:
        self.flows, self.nodes, self.where = flows, nodes, where
        value = flows[0].value(nodes[0])
        if not isinstance(value, Labelled):
            raise EditError(f"{where} is not one tensor")
        self.value: Labelled = value

    def layout(self, dims: Dimensions, shape: tuple[int, ...]) -> Layout:
        """Where the channels are: on the axis that the analysis says; of two the one that can be edited, or is read by
        a layer. Where it knows of none, axis 1 of maps and the last axis of others."""
        if not 2 <= len(shape) <= 5:
            raise EditError(
                f"{self.where} has the shape {shape}: a regressor needs a batch axis, channels, and up to 3 others"
            )
        books = dims.books.axes
        read = np.concatenate(
            [u for at, u in dims.axis_units.items() if "consumer" in books[at].roles] or [np.zeros(0, np.int64)]
        )
        axes = [
            (bool(dims.frozen[units := dims.unit_of[field.ids]].all()), not np.isin(units, read).any(), axis)
            for axis in (1, len(shape) - 1)
            if (field := self.value.at(axis)) is not None and field.dims == (axis,)
        ]
        axis = min(axes)[2] if axes else 1 if len(shape) > 3 else len(shape) - 1
        last = axis == len(shape) - 1
        return Layout(shape[axis], tuple(shape[1:-1] if last else shape[2:]), last)

    def nonlinearity(self) -> nn.Module | None:
        """The activation that the value is the output of; None where it is linear."""
        return _nonlinearity(self.flows[0], self.nodes[0])


class _Network:
    """A traced module to take values out of."""

    def __init__(self, module: nn.Module, what: str) -> None:
        known = info(module)
        if not isinstance(module, TracedModule):
            raise UsageError(
                f"the {what} is traced in parts, so it cannot be cut off: pass the part that holds the layer"
            )
        self.module, self.what, self.known = module, what, known
        self.dims = dimensions(module)
        self.flows = [Flow(self.dims, Site(module, "", graph, graph.output_node())) for graph in module.graphs]

    def tap(self, name: str, training: bool = True) -> _Tap:
        """The output of a layer, in evaluation and, if ``training``, in training too."""
        where = f"the output of {name!r} in the {self.what}"
        found = {id(site.graph): site.node for site in output_sites(self.module, name) if not site.path}
        if not found:
            raise EditError(
                f"{where} is inside of a part that is traced on its own: name a layer or container around it"
            )
        flows = self.flows if training else self.flows[:1]
        if any(id(flow.graph) not in found for flow in flows):
            modes = "training and evaluation" if training else "evaluation"
            raise EditError(f"{where} is not computed in {modes}")
        return _Tap(flows, [found[id(flow.graph)] for flow in flows], where)

    def truncated(self, taps: Sequence[_Tap]) -> TracedModule:
        flows = taps[0].flows
        return truncate(self.module, [(flow, [tap.nodes[k] for tap in taps]) for k, flow in enumerate(flows)])

    def middle(self, *, deeper: bool) -> str:
        return middle(self.module, self.flows[0], deeper=deeper)


def _pairs(
    student: _Network, teacher: _Network, guided: Names | Mapping[str, str] | None, hint: Names | None
) -> list[tuple[str, str]]:
    if isinstance(guided, Mapping):
        if hint is not None:
            raise UsageError("a mapping from guided layers to hints names both: leave out hint=")
        hint, guided = list(guided.values()), list(guided)
    guided = student.middle(deeper=True) if guided is None else guided
    hint = teacher.middle(deeper=False) if hint is None else hint
    ours, theirs = ([names] if isinstance(names, str) else list(names) for names in (guided, hint))
    if not ours or len(ours) != len(theirs):
        raise UsageError(f"{len(ours)} guided layers for {len(theirs)} hints: each pair needs one of both")
    return list(zip(ours, theirs, strict=True))


def _output_shapes(
    truncated: tuple[TracedModule, TracedModule],
    student: _Network,
    teacher: _Network,
    known: list[tuple[tuple[int, ...], tuple[int, ...]]],
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The shapes of both networks' outputs on the student's example inputs."""
    if (student.known.args, student.known.kwargs) == (teacher.known.args, teacher.known.kwargs):
        return known
    args, kwargs = example_inputs(student.module)
    found = []
    for network, module in zip((student, teacher), truncated, strict=True):
        try:
            values = Values(module, bound_arguments(module, args, kwargs).values)
            computed = {node: values.of(node) for node in module.graph.nodes if node.op != "output"}
        except (TraceError, UsageError) as error:
            shapes = [tuple(t.shape) for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            raise UsageError(
                f"the {network.what} cannot be called on the student's example inputs {shapes}, so there is nothing to "
                f"compare: trace both with the same inputs ({error})"
            ) from error
        outputs: Any = module.graph.output_node().args[0]
        found.append([tuple(computed[node].shape) for node in outputs])
    return list(zip(*found, strict=True))


def _extend(graph: fx.Graph, regressors: Sequence[nn.Sequential], skipped: Sequence[int], at: str) -> None:
    """Let the graph's outputs go through the regressors, or be detached where there are none."""
    end = graph.output_node()
    (outputs,) = end.args
    assert isinstance(outputs, (list, tuple))
    results = []
    with graph.inserting_before(end):
        for k, (value, skip) in enumerate(zip(outputs, skipped, strict=True)):
            if skip:
                value = graph.call_function(operator.getitem, (value, (slice(None), slice(skip, None))))
            if not regressors:
                value = graph.call_method("detach", (value,))
            path = at if len(outputs) == 1 else f"{at}.{k}"
            for child, _ in regressors[k].named_children() if regressors else ():
                value = graph.call_module(f"{path}.{child}", (value,))
                value.meta["path"] = path
            results.append(value)
    end.args = (results[0] if len(results) == 1 else tuple(results),)
    graph.lint()


def _nonlinearity(flow: Flow, node: fx.Node) -> nn.Module | None:
    """The activation behind a value, also through ops that move data or pool it, and dropout."""
    name = activation_of(flow.owner, node)
    if name:
        return _instance(name, flow.leaf(node), node)
    rule = flow.rule(node)
    if rule is None or not (rule.movement or rule.within or rule.linear == "first"):
        return None
    before = [_nonlinearity(flow, n) for n in flow.tensors(node)]
    alike = before and all(b is not None and repr(b) == repr(before[0]) for b in before)
    return before[0] if alike else None


def _instance(name: str, layer: nn.Module | None, node: fx.Node) -> nn.Module:
    """A layer of its own that does what an activation node does."""
    if isinstance(layer, Maxout):
        return Maxout(layer.pieces, layer.dim)
    if layer is not None:
        made: Any = copy.deepcopy(layer)
    else:
        cls = getattr(nn, name)
        known = inspect.signature(cls).parameters
        args = () if isinstance(node.target, str) else node.args[1:]
        made = cls(*args, **{k: v for k, v in node.kwargs.items() if k in known})
    if getattr(made, "inplace", False):
        made.inplace = False
    assert isinstance(made, nn.Module)
    return made
