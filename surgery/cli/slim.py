"""The verb that makes a model slimmer: slim, at given rates or to a budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import surgery
from surgery.cli.fields import completion, takes_fields
from surgery.cli.options import Model, Opening, OutputNames, name_outputs, parse_one_or_per_layer
from surgery.cli.output import Bars
from surgery.cli.writing import Writing, compare_exactly, finish
from surgery.errors import UsageError, unknown_name
from surgery.settings import IMPORTANCE, KEEPS, BudgetSettings, Settings, option
from surgery.units import LIMITS, counted, mebibytes, parse_amount, quantity

if TYPE_CHECKING:
    from torch import nn

    from surgery import Budgeted, Figure

_MOST_RATES = 8
"""Groups of which the terminal shows the rates, at the most; --json lists all."""


@dataclass(frozen=True, kw_only=True)
class BudgetOptions(Settings):
    """The budget to slim to, one of four, and what the search looks at."""

    macs: str | None = option(
        None, "Slim to so many MACs an input, as in 300M, or to a share of the model's own, as in 0.5.", metavar="N"
    )
    params: str | None = option(None, "Slim to so many parameters, or to a share.", metavar="N")
    bytes: str | None = option(
        None, "Slim to so many bytes of parameters and buffers, as in 12MB, or to a share.", metavar="N"
    )
    latency: str | None = option(
        None, "Slim to this median latency of one query, as in 5ms, measured on this machine.", metavar="TIME"
    )
    dataset: str | None = option(
        None,
        "For a budget: measure the damage to each part by the loss on images of this data set. [default: by the "
        "weights that go, which needs no data]",
        metavar="DATA",
    )
    data_root: Path | None = option(None, "Where torchvision's data sets are kept.", metavar="DIR")

    def find(self) -> tuple[str, str] | None:
        """Return the one budget that is given and its text; None if there is none."""
        given = {what: text for what in ("macs", "params", "bytes", "latency") if (text := getattr(self, what))}
        if len(given) > 1:
            raise UsageError(
                f"{' and '.join(f'--{what}' for what in given)} are budgets of different kinds: give the one that "
                "counts, then see what the slim model takes of the others"
            )
        return next(iter(given.items()), None)


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
    round_to: Annotated[
        int | None,
        typer.Option(
            help="Round numbers of channels up to a multiple of this. [default: 1; with --latency 1, 8, 16 or 32, "
            "what is measured to be faster]"
        ),
    ] = None,
    outputs: OutputNames = None,
    opening: Opening,
    settings: BudgetSettings,
    writing: Writing,
) -> None:
    """Carve a slim model out of a dense one, at a rate (KELS) or to a budget.

    At a rate, every layer keeps the same part of its channels. To a budget, each part gets its own rate: channels go
    where most is saved for the least damage. Give one: --rate, --macs, --params, --bytes or --latency.

    The result is compared with the dense model whose other channels are switched off.
    """
    wanted = budget.find()
    if (wanted is None) == (not rate):
        both = f"--rate says how wide layers are, --{wanted[0]} looks for it" if wanted else ""
        raise UsageError(f"{both}: give one of them" if both else _NEITHER)
    if importance not in IMPORTANCE:
        raise unknown_name("importance", importance, IMPORTANCE)
    writing.refuse()
    if rate:
        if budget.dataset is not None:
            raise UsageError("--dataset is for a budget: a rate needs no data")
        wish = parse_one_or_per_layer("--rate", rate, float, float)
        before = opening.open(model)
        free = name_outputs(outputs)
        after = surgery.slim(before, wish, round_to=round_to or 1, importance=importance, outputs=free)
        finish(before, after, writing, _switched_off(before, after, wish, round_to or 1, importance, free))
        return
    if outputs:
        raise UsageError("--outputs goes with --rate: to a budget, what the model returns stays as it is")
    assert wanted is not None
    parse_amount(*wanted)
    _to_budget(opening.open(model), *wanted, budget, importance, round_to, settings, writing)


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
    round_to: int | None,
    settings: BudgetSettings,
    writing: Writing,
) -> None:
    """Search for the model that keeps to a budget, and write it."""
    images = None
    if budget.dataset is not None:
        images = surgery.data_for({"the model": before}, budget.dataset, data_root=budget.data_root)
        before = surgery.classifier(before, images)
    limit: dict[str, Any] = {LIMITS[what]: text}
    with Bars() as bars:
        if what == "latency":
            bars.say(f"timing the model, by {settings.runtime} on {settings.device} …")
        found = surgery.slim_to_budget(
            before,
            **limit,
            data=images,
            importance=importance,
            round_to=round_to,
            settings=settings,
            progress=bars,
            on_figure=lambda figure: bars.say(_tell(figure)),
        )
    compare = _switched_off(before, found.module, found.rates, found.round_to, importance)
    finish(before, found.module, writing, compare, more={"budget": found.to_dict()}, said=_describe(found))


def _switched_off(
    before: nn.Module,
    after: nn.Module,
    wish: float | Mapping[str, float],
    round_to: int,
    importance: str,
    outputs: str | Sequence[str] | None = None,
) -> Callable[[], surgery.Verification]:
    """Make a function that compares the slim model with the dense one whose other channels are switched off."""

    def compare() -> surgery.Verification:
        masks = surgery.split_masks(before, wish, round_to=round_to, importance=importance, outputs=outputs)
        return compare_exactly(after, surgery.masked(before, masks))

    return compare


def _tell(figure: Figure) -> str:
    """A figure of the search as a line."""
    measured, limit = (_amount(value, figure.kind) for value in (figure.measured, figure.limit))
    if figure.predicted is not None:
        kept = "keeps to" if figure.measured <= figure.limit else "exceeds"
        return f"tried: predicted {_amount(figure.predicted, figure.kind)}, is {measured}, which {kept} {limit}"
    names = {"dense": "as it is", "smallest": "as slim as allowed", "probe": f"to learn from, {figure.name}"}
    return f"{names[figure.what]}: {measured}"


def _describe(found: Budgeted) -> list[str]:
    """What was found, as lines."""
    before, measured, limit = (_amount(value, found.kind) for value in (found.before, found.measured, found.limit))
    if not found.rates:
        return [f"nothing to do: the model takes {before}, which keeps to the budget of {limit}"]
    rates = [f"{name} {rate:g}" for name, rate in found.rates.items()]
    more = [f"{len(rates) - _MOST_RATES} more (--json lists all)"] if len(rates) > _MOST_RATES else []
    return [
        f"{before} before, {measured} now, of a budget of {limit}; {counted(len(found.trials), 'model')} tried",
        f"rates: {', '.join([*rates[:_MOST_RATES], *more])}",
    ]


def _amount(value: float, kind: str) -> str:
    """A figure with the unit of its budget."""
    if kind == "latency_ms":
        return f"{value:.3g} ms" if value < 100 else f"{value:.0f} ms"
    return mebibytes(value) if kind == "bytes" else f"{quantity(value)} {'MACs' if kind == 'macs' else 'parameters'}"
