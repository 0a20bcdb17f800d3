"""Hints: a student's layer learns to predict a teacher's (FitNets, Romero et al., ICLR 2015)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from surgery.errors import UsageError
from surgery.graph.traced import TracedModule, named_tensors
from surgery.selectors import Where
from surgery.taps.network import Tap, TappedNetwork
from surgery.taps.pairing import Guided, names_of_pair, restore_tensors, tap_pairs
from surgery.taps.regressors import make_regressor, match
from surgery.taps.tapped_modules import attach, freeze_to, truncate_to


def attach_hint(
    student: nn.Module,
    teacher: nn.Module,
    guided: Guided = None,
    hint: Where | None = None,
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
      Where that does not fit, or takes a kernel above 8, maps are resized first to the hint's size (average pooling, or
      linear interpolation where one grows) and the kernel is 1 x 1. Vectors and tokens of equal number have a linear
      layer. Tokens that are compared with a map, or with another number of tokens, are laid out as a grid,
      without a class token, also in the hint. Tokens that do not form a grid are interpolated along the sequence.
    - ``"conv"``: the paper's valid convolution, of any size; ``"fc"``: the paper's fully connected layer.
    - ``"none"``: no regressor, for outputs of equal shape, as the authors' code has it. The paper's equation 3, and so
      ``"auto"``, has one there too.

    It ends in the non-linearity that the hint is the output of, as the paper asks: with as many pieces where that is a
    `Maxout`, without any where the hint is linear.

    Args:
        student, teacher: traced modules that take the same inputs. Neither is changed, and nothing is shared with them.
        guided: layers or containers of the student (`surgery.selectors`), or a mapping from guided layers to hints.
        hint: as many layers or containers of the teacher. By default the layer in the middle: of the
            values that everything passes through the one nearest to half of the depth, which is counted in layers with
            weights; of two as near the student's later and the teacher's earlier one, as in the paper.
        regressor: ``"auto"``, ``"conv"``, ``"fc"`` or ``"none"``.
        seed: of the regressor's initial weights.

    Returns:
        both truncated networks, the regressor, and the loss.

    Raises:
        UsageError: an unknown layer or regressor, a module that is traced in parts, networks that cannot be called on
            the same inputs.
        EditError: a layer without one output, in training and in evaluation, or a regressor that cannot be.

    Example:
        >>> pair = surgery.attach_hint(student, teacher, guided="layer2", hint="layer2")
        >>> pair.loss(images).backward()
    """
    ours = TappedNetwork(student, "student", mode="training and evaluation")
    theirs = TappedNetwork(teacher, "teacher", mode="evaluation", like=student)
    taps = hint_taps(ours, theirs, guided, hint)
    regressors = []
    for k, pair in enumerate(taps):
        made, taps[k] = regressor_between(ours, theirs, pair, regressor, seed + k)
        regressors.append(made)
    names = [(g.name, h.name) for g, h in taps]
    truncated = truncate_to(ours, [g for g, _ in taps]), freeze_to(theirs, [h for _, h in taps])
    return HintPair(*truncated, regressors, names, student)


def hint_taps(
    student: TappedNetwork, teacher: TappedNetwork, guided: Guided, hint: Where | None
) -> list[tuple[Tap, Tap]]:
    """The outputs of the guided layers and of the hints, those in the middle where none are named."""
    ours, theirs = names_of_pair(student, teacher, guided, hint)
    ours = [student.middle(deeper=True)] if ours is None else ours
    theirs = [teacher.middle(deeper=False)] if theirs is None else theirs
    return tap_pairs(student, teacher, ours, theirs)


def regressor_between(
    student: TappedNetwork, teacher: TappedNetwork, pair: tuple[Tap, Tap], kind: str, seed: int
) -> tuple[nn.Sequential, tuple[Tap, Tap]]:
    """What leads from a guided layer's output to the hint; and both, without the tokens that are not compared."""
    guided, hint = pair
    found = match(student.layout(guided), teacher.layout(hint), kind)
    made = make_regressor(found, kind, teacher.nonlinearity(hint), seed)
    return made, (guided.without_first(found.skipped[0]), hint.without_first(found.skipped[1]))


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
        names: Sequence[tuple[str, str]],
        whole: nn.Module,
    ) -> None:
        super().__init__()
        self.names = tuple(names)
        self._prefix = tuple(named_tensors(student))
        held: nn.Module = regressors[0] if len(names) == 1 else nn.ModuleList(regressors)
        self._regressor_at = attach(student, "regressor", held, whole)
        for graph in student.graphs:
            _extend(graph, regressors, self._regressor_at)
        _extend(teacher.graph, [], "")
        for module in (student, teacher):
            module.recompile()
        self.student, self.teacher = student, teacher
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
        source = "the student that the hint was attached to"
        return restore_tensors(self.student, student, self._prefix, "the guided prefix", source)


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


def _extend(graph: fx.Graph, regressors: Sequence[nn.Sequential], at: str) -> None:
    """Let the graph's outputs go through the regressors, if any; a single one is not in a tuple."""
    end = graph.output_node()
    (outputs,) = end.args
    assert isinstance(outputs, tuple)
    results = list(outputs)
    with graph.inserting_before(end):
        for k, regressor in enumerate(regressors):
            path = at if len(outputs) == 1 else f"{at}.{k}"
            for child, _ in regressor.named_children():
                results[k] = graph.call_module(f"{path}.{child}", (results[k],))
                results[k].meta["path"] = path
    end.args = (results[0] if len(results) == 1 else tuple(results),)
    graph.lint()
