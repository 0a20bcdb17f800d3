"""What a student learns, as the command line says it: losses by name, with their weights and settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from surgery.errors import UsageError, unknown_name
from surgery.training.distilling.objectives import DKD, KD, RKD, AttentionTransfer, Hint, Objective, ReviewKD

LABELS = "labels"
"""What the labels' own loss is called among weights."""


@dataclass(frozen=True)
class _Loss:
    """An objective, the settings that differ from its defaults, and those that do with standardised logits."""

    kind: type[Objective]
    settings: Mapping[str, Any] = field(default_factory=dict)
    standardised: Mapping[str, Any] = field(default_factory=dict)

    def takes(self, setting: str) -> bool:
        return hasattr(self.kind, setting)


LOSSES: Mapping[str, _Loss] = {
    "kd": _Loss(KD),
    "kd-divergence": _Loss(
        KD,
        {"form": "divergence", "temperature": 4.0, "weight": 0.9, "final_weight": 0.9},
        {"temperature": 2.0, "weight": 9.0, "final_weight": 9.0},
    ),
    "dkd": _Loss(DKD),
    "at": _Loss(AttentionTransfer),
    "rkd": _Loss(RKD),
    "review": _Loss(ReviewKD),
}
"""By name: FitNets' KD (Romero et al., 2015); KD as Hinton et al. (2015) have it, with RepDistiller's settings, or with
those of Sun et al. (2024) for standardised logits; and the others with those of their papers."""


def objectives(
    names: Sequence[str],
    *,
    weights: Sequence[str] = (),
    temperature: float | None = None,
    standardise: bool = False,
    warmup_epochs: float | None = None,
    taps: Sequence[str] = (),
    hint: Hint | None = None,
) -> tuple[tuple[Objective, ...], float]:
    """What `surgery.distill` takes: the objectives, and the weight of the labels.

    Args:
        names: of `LOSSES`, each once; ``none`` alone is no loss but the labels'.
        weights: ``LOSS=WEIGHT``, or ``LOSS=FROM,TO`` where the weight decays; also of ``labels`` and ``hint``.
        temperature, standardise, warmup_epochs: for those of the losses that have them.
        taps: ``GUIDED=HINT``, the layers that at and review compare.
        hint: hints that are learned along with the rest.

    Raises:
        UsageError: a name or a number that is none, or a setting that none of the losses has.
    """
    if "none" in names and len(names) > 1:
        raise UsageError("--loss none is for a student that learns labels alone: leave out the other losses, or it")
    names = () if list(names) == ["none"] else tuple(names)
    for name in names:
        if name not in LOSSES:
            raise unknown_name("loss", name, [*LOSSES, "none"])
        if names.count(name) > 1:
            raise UsageError(f"--loss {name} is given more than once")
    weighed = _weights(weights, [*names, *(["hint"] if hint else []), LABELS])
    settings: dict[str, Any] = {}
    if temperature is not None:
        settings["temperature"] = temperature
    if standardise:
        settings["standardise"] = True
    if warmup_epochs is not None:
        settings["warmup_epochs"] = warmup_epochs
    if taps:
        settings["guided"] = _taps(taps)
    for setting in settings:
        having = [name for name, loss in LOSSES.items() if loss.takes(setting)]
        if not set(having) & set(names):
            option = "tap" if setting == "guided" else setting.replace("_", "-")
            raise UsageError(f"--{option} is for {', '.join(having)}: choose one of them with --loss")
    made = [_made(LOSSES[name], settings, weighed.get(name)) for name in names]
    if hint is not None:
        made.append(_made(_Loss(Hint, vars(hint)), {}, weighed.get("hint")))
    return tuple(made), weighed.get(LABELS, (1.0,))[0]


def _made(loss: _Loss, settings: Mapping[str, Any], weights: tuple[float, ...] | None) -> Objective:
    own = {name: value for name, value in settings.items() if loss.takes(name)}
    given = {**loss.settings, **(loss.standardised if own.get("standardise") else {}), **own}
    if weights is not None:
        given["weight"] = weights[0]
        if loss.takes("final_weight"):
            given["final_weight"] = weights[-1]
        elif len(weights) > 1:
            raise UsageError(f"the weight of {loss.kind.__name__} does not decay: give it one number")
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
