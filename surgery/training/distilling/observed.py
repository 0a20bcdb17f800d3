"""A student and a teacher that return the values which objectives compare."""

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
    """A student and a teacher that return the values which objectives compare. Made by `observe`.

    Attributes:
        student: the module to train, a copy of the student with the objectives' heads. In training mode it returns
            ``(output, values)``: the student's output, auxiliary ones included, and a tuple of tensors for each
            objective. In evaluation mode it returns the student's output.
        teacher: frozen, in evaluation mode, truncated: from the same inputs to a tuple of the tensors to compare.
        objectives: what the student learns.
        epochs: number of epochs.
        names: for each objective the names of the compared pairs, the student's first.
        reads: for each objective the positions of its tensors among the teacher's.
        trained: names of the student's own tensors.
    """

    student: TracedModule
    teacher: TracedModule
    objectives: tuple[Objective, ...]
    epochs: int
    names: tuple[tuple[tuple[str, str], ...], ...]
    reads: tuple[tuple[int, ...], ...]
    trained: tuple[str, ...]

    def loss(
        self, values: Sequence[Sequence[Tensor]], targets: Sequence[Tensor], labels: Tensor, epoch: float
    ) -> Tensor:
        """Sum the objectives' weighted losses to a scalar, without the loss of labels.

        Args:
            values: the second output of ``student`` in training mode.
            targets: the outputs of ``teacher`` for the same inputs.
            labels: class indices (N,).
            epoch: number of epochs done, a fraction within an epoch.
        """
        terms = [
            objective.loss(ours, [targets[k] for k in reads], labels, epoch, self.epochs)
            for objective, ours, reads in zip(self.objectives, values, self.reads, strict=True)
        ]
        return torch.stack(terms).sum()

    def take(self, student: nn.Module) -> None:
        """Load the tensors of another student, such as one that has learned from hints.

        Raises:
            UsageError: a tensor is missing or has another shape.
        """
        with torch.no_grad():
            for own, given in counterparts(self.student, student, self.trained, *_NAMED):
                own.copy_(given)

    def restore(self, student: nn.Module) -> nn.Module:
        """Copy the student with the parameters, and statistics of norms, that were trained here.

        The copy has no head or tap, keeps names and recipe, and shares no tensor with this object.

        Args:
            student: the observed module, or one like it.

        Raises:
            UsageError: a tensor has no counterpart of its shape in ``student``.
        """
        return restore_tensors(self.student, student, self.trained, *_NAMED)


_NAMED = "the observed student", "the student that is observed"


def observe(
    student: nn.Module, teacher: nn.Module, objectives: Objective | Sequence[Objective], *, epochs: int, seed: int = 0
) -> Observed:
    """Tap the values of a student and a teacher that objectives compare, for a training loop of your own.

    Args:
        student, teacher: traced modules that take the same inputs. Neither is changed; no tensor is shared with them.
        objectives: one or several; their losses are added.
        epochs: number of epochs of the training, over which weights decay.
        seed: seed of the initial weights of heads, such as a hint's regressor.

    Returns:
        The student to train, with heads, the truncated teacher, and their loss.

    Raises:
        UsageError: no objective, an unknown layer, a module that is traced in parts, networks that do not take the same
            inputs, or unequal numbers of classes.
        EditError: a layer without a single output, or values that an objective cannot compare.

    Example:
        >>> observed = surgery.observe(student, teacher, [surgery.KD(), surgery.Hint()], epochs=20)
        >>> output, values = observed.student.train()(images)
        >>> loss = observed.loss(values, observed.teacher(images), labels, epoch=0)
    """
    objectives = (objectives,) if isinstance(objectives, Objective) else tuple(objectives)
    whole_number("epochs", epochs, 1)
    for objective in objectives:
        if not isinstance(objective, Objective):
            raise UsageError(f"{objective!r} is not an objective: pass one such as surgery.KD()")
    if not objectives:
        raise UsageError("no objectives: the student has nothing to learn from the teacher")
    ours = TappedNetwork(student, "student", mode="training")
    theirs = TappedNetwork(teacher, "teacher", mode="evaluation", like=student)
    found = [objective.compare(ours, theirs, seed + 1000 * k) for k, objective in enumerate(objectives)]
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
