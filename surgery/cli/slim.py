"""The verb that makes a model slimmer: slim, at given rates or to a budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import surgery
from surgery.cli.fields import completion, takes_fields
from surgery.cli.options import Model, Opening, OutputNames, find_budget, name_outputs, parse_one_or_per_layer
from surgery.cli.output import Bars
from surgery.cli.writing import Writing, compare_exactly, finish
from surgery.errors import UsageError, unknown_name
from surgery.settings import COMPARES, IMPORTANCE, KEEPS, RANKINGS, BudgetSettings, Settings, option
from surgery.units import LIMITS, amount_text, counted, parse_amount

if TYPE_CHECKING:
    from torch import nn

    from surgery import Budgeted, Figure

_TEST = 64
"""Test images on which a fitted model is compared with the dense one, at the most."""
_MOST_RATES = 8
"""Groups of which the terminal shows the rates, at the most; --json lists all."""


@dataclass(frozen=True, kw_only=True)
class BudgetOptions(Settings):
    """The budget to slim to, one of four, and the data that are looked at."""

    macs: str | None = option(
        None, "Slim to so many MACs an input, as in 300M, or to a share of the model's own, as in 0.5.", metavar="N"
    )
    params: str | None = option(None, "Slim to so many parameters, or to a share.", metavar="N")
    bytes: str | None = option(
        None, "Slim to so many bytes of parameters and buffers, as in 12MB, or to a share.", metavar="N"
    )
    latency: str | None = option(
        None, "Slim to this median latency of one query, as in 5ms or 50%, measured on this machine.", metavar="TIME"
    )
    dataset: str | None = option(
        None,
        "For a budget: measure the damage to each part by the loss on images of this data set. [default: by the "
        "weights that go, which needs no data]",
        metavar="DATA",
    )
    calibrate: str | None = option(
        None,
        "Fit the layers that read removed channels to what the dense model gives on 512 training images of this data "
        "set, so that the kept channels take over.",
        metavar="DATA",
    )
    rank_on: str | None = option(
        None,
        "The data set on whose training images --importance looks, where it looks at data: taylor, variance, "
        "reconstruction.",
        metavar="DATA",
    )
    image_size: int | None = option(None, "Side in pixels of the data's images. [default: the model's]", least=1)
    data_root: Path | None = option(None, "Where torchvision's data sets are kept.", metavar="DIR")
    limit: int | None = option(None, "Use so many training and test images at most.")
    skip_bad: bool = option(False, "Leave out images that cannot be read.")

    def load(self, model: nn.Module, dataset: str | None) -> surgery.Data | None:
        """Load a data set for the model; None where there is none."""
        if dataset is None:
            return None
        options: dict[str, Any] = {one: getattr(self, one) for one in ("image_size", "data_root", "limit", "skip_bad")}
        return surgery.data_for({"the model": model}, dataset, **options)

    def find(self) -> tuple[str, str] | None:
        """Return the one budget that is given and its text; None if there is none."""
        return find_budget(self)


@takes_fields("memory", "confidence", "warmup", "min_runs", "min_seconds", "sessions")
def slim(
    model: Model,
    *,
    rate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RATE",
            help="The split rate, in (0, 1]: the part of every layer to keep; or, as often as you like, LAYER=RATE.",
        ),
    ] = None,
    budget: BudgetOptions,
    importance: Annotated[
        str, typer.Option(metavar="WHICH", help=KEEPS, autocompletion=completion(IMPORTANCE))
    ] = "prefix",
    ranking: Annotated[str, typer.Option(metavar="HOW", help=COMPARES, autocompletion=completion(RANKINGS))] = "local",
    outputs: OutputNames = None,
    opening: Opening,
    settings: BudgetSettings,
    writing: Writing,
) -> None:
    """Carve a slim model out of a dense one, at a rate (KELS) or to a budget.

    At a rate, every layer keeps the same part of its channels. To a budget, each part gets its own rate: channels go
    where most is saved for the least damage. Give one: --rate, --macs, --params, --bytes or --latency.

    The result is compared with the dense model whose other channels are switched off. With --calibrate, this is said of
    the model as carved; then its layers are fitted, and the difference to the dense model on test images is shown.
    """
    wanted = budget.find()
    if (wanted is None) == (not rate):
        both = f"--rate says how wide layers are, --{wanted[0]} looks for it" if wanted else ""
        raise UsageError(f"{both}: give one of them" if both else _NEITHER)
    for kind, name, known in (("importance", importance, IMPORTANCE), ("ranking", ranking, RANKINGS)):
        if name not in known:
            raise unknown_name(kind, name, known)
    writing.refuse()
    if rate:
        if budget.dataset is not None:
            raise UsageError("--dataset is for a budget: a rate needs no data")
        wish = parse_one_or_per_layer("--rate", rate, float, float)
        before = opening.open(model)
        images = budget.load(before, budget.calibrate)
        free = name_outputs(outputs)
        scores = _score(before, importance, budget, outputs=free)
        how: dict[str, Any] = {"round_to": settings.round_to or 1, "importance": scores, "ranking": ranking}
        how["outputs"] = free
        carved = after = surgery.slim(before, wish, **how)
        compare = _switched_off(before, carved, wish, **how)
        if images is not None:
            after = surgery.slim(before, wish, **how, calibration=images)
        finish(before, after, writing, compare, **_tell_fit(before, carved, after, images, budget.calibrate))
        return
    if outputs:
        raise UsageError("--outputs goes with --rate: to a budget, what the model returns stays as it is")
    if ranking != "local":
        raise UsageError("--ranking goes with --rate: to a budget, each part has its own rate")
    assert wanted is not None
    parse_amount(*wanted)
    _to_budget(opening.open(model), *wanted, budget, importance, settings, writing)


_NEITHER = (
    "Missing option '--rate': say how slim, by a rate (--rate 0.5) or by a budget (--macs 0.5, --params 3M, "
    "--bytes 12MB, --latency 5ms)"
)


def _to_budget(
    before: nn.Module,
    what: str,
    text: str,
    budget: BudgetOptions,
    importance: str,
    settings: BudgetSettings,
    writing: Writing,
) -> None:
    """Search for the model that keeps to a budget, and write it."""
    images, calibration = budget.load(before, budget.dataset), budget.load(before, budget.calibrate)
    if images is not None:
        before = surgery.classifier(before, images)
    scores = _score(before, importance, budget, images)
    limit: dict[str, Any] = {LIMITS[what]: text}
    with Bars() as bars:
        if what == "latency":
            bars.say(f"timing the model, by {settings.runtime} on {settings.device} …")
        found = surgery.slim_to_budget(
            before,
            **limit,
            data=images,
            importance=scores,
            calibration=calibration,
            settings=settings,
            progress=bars,
            on_figure=lambda figure: bars.say(_tell(figure)),
        )
    carved = found.module
    if calibration is not None:
        carved = surgery.slim(before, found.rates, round_to=found.round_to, importance=scores)
    fit = _tell_fit(before, carved, found.module, calibration, budget.calibrate)
    said = [*_describe(found), *fit.get("said", ())]
    compare = _switched_off(before, carved, found.rates, round_to=found.round_to, importance=scores)
    finish(before, found.module, writing, compare, more={"budget": found.to_dict(), **fit.get("more", {})}, said=said)


def _score(
    before: nn.Module,
    importance: str,
    budget: BudgetOptions,
    images: surgery.Data | None = None,
    outputs: str | Sequence[str] | None = None,
) -> surgery.UnitScores:
    """Score the channels once, on the data of --rank-on or else on ``images``."""
    data = images if budget.rank_on is None else budget.load(before, budget.rank_on)
    scores = surgery.unit_scores(before, surgery.Importance(importance, data), outputs=outputs)
    if budget.rank_on is not None and not scores.on_data:
        raise UsageError(f"--rank-on is for an importance that looks at data: {importance} looks at weights alone")
    return scores


def _tell_fit(
    before: nn.Module, carved: nn.Module, after: nn.Module, images: surgery.Data | None, name: str | None
) -> dict[str, Any]:
    """What a fit to images did, for `finish`: as JSON and as lines."""
    import torch

    fits = [step for step in surgery.recipe(after).steps if isinstance(step, surgery.Compensate)]
    if images is None or not fits:
        return {}
    count = images.counts[1]
    batch = torch.stack([images.test[k * count // min(count, _TEST)][0] for k in range(min(count, _TEST))])
    apart = {kind: surgery.verify(one, before, batch).max_rel for kind, one in (("carved", carved), ("fitted", after))}
    said = [
        f"then fitted to {name}: on {counted(len(batch), 'test image')} outputs differ from the dense model's by "
        f"{apart['fitted']:.2g} of their largest, as carved by {apart['carved']:.2g}",
        *(f"left as carved: {layer}, {why}" for layer, why in fits[-1].left.items()),
    ]
    return {"more": {"fit": {"dataset": name, "difference": apart, **fits[-1].to_dict()}}, "said": said}


def _switched_off(
    before: nn.Module,
    after: nn.Module,
    wish: float | Mapping[str, float],
    **how: Any,
) -> Callable[[], surgery.Verification]:
    """Make a function that compares the slim model with the dense one whose other channels are switched off."""

    def compare() -> surgery.Verification:
        masks = surgery.split_masks(before, wish, **how)
        return compare_exactly(after, surgery.masked(before, masks))

    return compare


def _tell(figure: Figure) -> str:
    """A figure of the search as a line."""
    measured, limit = (amount_text(value, figure.kind) for value in (figure.measured, figure.limit))
    if figure.predicted is not None:
        kept = "keeps to" if figure.measured <= figure.limit else "exceeds"
        return f"tried: predicted {amount_text(figure.predicted, figure.kind)}, is {measured}, which {kept} {limit}"
    names = {"dense": "as it is", "smallest": "as slim as allowed", "probe": f"to learn from, {figure.name}"}
    return f"{names[figure.what]}: {measured}"


def _describe(found: Budgeted) -> list[str]:
    """What was found, as lines."""
    before, measured, limit = (amount_text(value, found.kind) for value in (found.before, found.measured, found.limit))
    if not found.rates:
        return [f"nothing to do: the model takes {before}, which keeps to the budget of {limit}"]
    rates = [f"{name} {rate:g}" for name, rate in found.rates.items()]
    more = [f"{len(rates) - _MOST_RATES} more (--json lists all)"] if len(rates) > _MOST_RATES else []
    return [
        f"{before} before, {measured} now, of a budget of {limit}; {counted(len(found.trials), 'model')} tried",
        f"rates: {', '.join([*rates[:_MOST_RATES], *more])}",
    ]
