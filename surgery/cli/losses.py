"""The losses that a student can learn, by their names on the command line, with weights and settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import surgery
from surgery.errors import UsageError, unknown_name
from surgery.settings import option

if TYPE_CHECKING:
    from surgery import Hint, Objective

LABELS = "labels"
"""What the labels' own loss is called among weights."""


@dataclass(frozen=True)
class _Loss:
    """An objective, the settings that differ from its defaults, and those that do with standardised logits."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    standardised: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> type[Objective]:
        """The class, which the package exports under this name."""
        found: type[Objective] = getattr(surgery, self.name)
        return found

    def takes(self, setting: str) -> bool:
        return hasattr(self.kind, setting)


LOSSES: Mapping[str, _Loss] = {
    "kd": _Loss("KD"),
    "kd-divergence": _Loss(
        "KD",
        {"form": "divergence", "temperature": 4.0, "weight": 0.9, "final_weight": 0.9},
        {"temperature": 2.0, "weight": 9.0, "final_weight": 9.0},
    ),
    "dkd": _Loss("DKD"),
    "at": _Loss("AttentionTransfer"),
    "rkd": _Loss("RKD"),
    "review": _Loss("ReviewKD"),
}
"""By name: FitNets' KD (Romero et al., 2015); KD as Hinton et al. (2015) have it, with RepDistiller's settings, or with
those of Sun et al. (2024) for standardised logits; and the others with those of their papers."""


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """What is learned in stage 2, as options."""

    loss: list[str] | None = option(
        None,
        f"What is learned besides labels: {', '.join(LOSSES)} or none; several times. [default: kd]",
        metavar="LOSS",
    )
    weight: list[str] | None = option(
        None, "Weight of a loss, of labels or hint; kd=4,1 decays. [default: the papers']", metavar="LOSS=W"
    )
    temperature: float | None = option(None, "Of kd, kd-divergence and dkd.")
    standardise: bool = option(False, "Standardise the logits of kd.")
    warmup_epochs: float | None = option(None, "Epochs in which the weights of dkd and review rise. [default: 20]")
    tap: list[str] | None = option(
        None, "Layers that at and review compare. [default: the stages' ends]", metavar="GUIDED=HINT"
    )


def objectives(options: LossOptions, hint: Hint | None = None) -> tuple[tuple[Objective, ...], float | None]:
    """Make the objectives that `surgery.distill` takes, and find the weight of the labels if one is given.

    Args:
        options: ``loss`` of `LOSSES`, each once; ``none`` alone leaves the labels' loss only. ``weight`` is
            ``LOSS=WEIGHT``, or ``LOSS=FROM,TO`` if the weight decays; also for ``labels`` and ``hint``. Each setting
            applies to the losses that have it.
        hint: hints to learn in the same stage.

    Raises:
        UsageError: an unknown loss, an invalid number, or a setting that none of the losses has.
    """
    names: tuple[str, ...] = tuple(options.loss or ["kd"])
    if "none" in names and len(names) > 1:
        raise UsageError("--loss none is for a student that learns labels alone: leave out the other losses, or it")
    names = () if names == ("none",) else names
    for name in names:
        if name not in LOSSES:
            raise unknown_name("loss", name, [*LOSSES, "none"])
        if names.count(name) > 1:
            raise UsageError(f"--loss {name} is given more than once")
    weighed = _weights(options.weight or (), [*names, *(["hint"] if hint else []), LABELS])
    given = {"temperature": options.temperature, "warmup_epochs": options.warmup_epochs}
    settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if options.standardise:
        settings["standardise"] = True
    if options.tap:
        settings["guided"] = _taps(options.tap)
    for setting in settings:
        having = [name for name, loss in LOSSES.items() if loss.takes(setting)]
        if not set(having) & set(names):
            option = "tap" if setting == "guided" else setting.replace("_", "-")
            raise UsageError(f"--{option} is for {', '.join(having)}: choose one of them with --loss")
    found = [_objective(LOSSES[name], settings, weighed.get(name)) for name in names]
    if hint is not None:
        found.append(_objective(_Loss("Hint", vars(hint)), {}, weighed.get("hint")))
    return tuple(found), weighed.get(LABELS, (None,))[0]


def _objective(loss: _Loss, settings: Mapping[str, Any], weights: tuple[float, ...] | None) -> Objective:
    own = {name: value for name, value in settings.items() if loss.takes(name)}
    given = {**loss.settings, **(loss.standardised if own.get("standardise") else {}), **own}
    if weights is not None:
        given["weight"] = weights[0]
        if loss.takes("final_weight"):
            given["final_weight"] = weights[-1]
        elif len(weights) > 1:
            raise UsageError(f"the weight of {loss.name} does not decay: give it one number")
    return loss.kind(**given)


def _weights(items: Sequence[str], known: Sequence[str]) -> dict[str, tuple[float, ...]]:
    result = {}
    for item in items:
        name, _, text = item.rpartition("=")
        try:
            numbers = tuple(float(part) for part in text.split(","))
        except ValueError:
            numbers = ()
        if not name or len(numbers) not in (1, 2) or (name == LABELS and len(numbers) > 1):
            raise UsageError(f"--weight {item!r} is not of the form LOSS=NUMBER, or kd=FROM,TO")
        if name not in known:
            raise UsageError(f"--weight {item!r}: what is learned is {', '.join(known)}")
        result[name] = numbers
    return result


def _taps(items: Sequence[str]) -> dict[str, str]:
    pairs = [item.partition("=") for item in items]
    for item, (guided, _, hint) in zip(items, pairs, strict=True):
        if not guided or not hint:
            raise UsageError(f"--tap {item!r} is not of the form GUIDED=HINT, a layer of the student and the teacher's")
    return {guided: hint for guided, _, hint in pairs}
