"""A student and a teacher that hand out what objectives compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from surgery.errors import UsageError, whole_number
from surgery.graph.traced import TracedModule, named_tensors
from surgery.taps.network import Tap, TappedNetwork
from surgery.taps.pairing import counterparts, restore_tensors
from surgery.taps.tapped_modules import freeze_to, observe_taps
from surgery.training.distilling.objectives import Objective


@dataclass(frozen=True)
class Observed:
    """A student and a teacher that hand out what the objectives compare. Made by `observe`.

    Attributes:
        student: the module to train, a copy of the student with the objectives' heads in it. In training mode it
            returns ``(output, values)``: what the student returns, auxiliary outputs included, and for each objective a
            tuple of tensors. In evaluation mode it returns what the student returns.
        teacher: frozen, in evaluation mode: from the same inputs to a tuple of tensors, each wanted one once. It
            computes nothing behind them.
        objectives: what the student learns.
        epochs: over how many epochs.
        names: for each objective the pairs of values that it compares, the student's first.
    """

    student: TracedModule
    teacher: TracedModule
    objectives: tuple[Objective, ...]
    epochs: int
    names: tuple[tuple[tuple[str, str], ...], ...]
    reads: tuple[tuple[int, ...], ...]
    """For each objective which of the teacher's tensors it reads."""
    trained: tuple[str, ...]
    """The tensors of the student, by name."""

    def loss(
        self, values: Sequence[Sequence[Tensor]], targets: Sequence[Tensor], labels: Tensor, epoch: float
    ) -> Tensor:
        """The sum of the objectives' weighted losses, a scalar; the labels' own loss is not among them.

        Args:
            values: the second of what ``student`` returns in training mode.
            targets: what ``teacher`` returns for the same inputs.
            labels: class indices (N,).
            epoch: how many epochs are done, a fraction within one.
        """
        terms = [
            objective.loss(ours, [targets[k] for k in reads], labels, epoch, self.epochs)
            for objective, ours, reads in zip(self.objectives, values, self.reads, strict=True)
        ]
        return torch.stack(terms).sum()

    def take(self, student: nn.Module) -> None:
        """Give the observed student the tensors of another one, such as one that has learned from hints.

        Raises:
            UsageError: one of them is missing, or has another shape.
        """
        with torch.no_grad():
            for own, given in counterparts(self.student, student, self.trained, *_NAMED):
                own.copy_(given)

    def restore(self, student: nn.Module) -> nn.Module:
        """A copy of the student with what was trained here: parameters, and statistics of norms.

        It has no head and no tap, keeps the names and the recipe, and shares nothing with this.

        Args:
            student: the module that is observed, or one like it.

        Raises:
            UsageError: a tensor has no counterpart of its shape in ``student``.
        """
        return restore_tensors(self.student, student, self.trained, *_NAMED)


_NAMED = "the observed student", "the student that is observed"


def observe(
    student: nn.Module, teacher: nn.Module, objectives: Objective | Sequence[Objective], *, epochs: int, seed: int = 0
) -> Observed:
    """Take out of a student and a teacher what the objectives compare.

    Args:
        student, teacher: traced modules that take the same inputs. Neither is changed, and nothing is shared with them.
        objectives: one or several; their losses are added.
        epochs: how many the student is trained for, by which weights decay.
        seed: of the initial weights of heads, such as a hint's regressor.

    Raises:
        UsageError: no objective, an unknown layer, a module that is traced in parts, networks that cannot be called on
            the same inputs, or logits of unequal numbers of classes.
        EditError: a layer without one output, or values that an objective cannot compare.
    """
    objectives = (objectives,) if isinstance(objectives, Objective) else tuple(objectives)
    whole_number("epochs", epochs, 1)
    for objective in objectives:
        if not isinstance(objective, Objective):
            raise UsageError(f"{objective!r} is no objective: pass one such as surgery.KD()")
    if not objectives:
        raise UsageError("no objectives: the student has nothing to learn from the teacher")
    ours = TappedNetwork(student, "student", mode="training")
    theirs = TappedNetwork(teacher, "teacher", mode="evaluation", like=student)
    found = [objective.compared(ours, theirs, seed + 1000 * k) for k, objective in enumerate(objectives)]
    wanted: list[Tap] = []
    for compared in found:
        wanted += [hint for _, hint in compared.pairs if hint not in wanted]
    return Observed(
        observe_taps(ours, [[tap for tap, _ in compared.pairs] for compared in found], [c.head for c in found]),
        freeze_to(theirs, wanted),
        objectives,
        epochs,
        tuple(tuple((g.name, h.name) for g, h in compared.pairs) for compared in found),
        tuple(tuple(wanted.index(h) for _, h in compared.pairs) for compared in found),
        tuple(named_tensors(student)),
    )
