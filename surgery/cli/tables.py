"""Tables that fit a terminal: prose folds, and figures are never wrapped or cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

_GAP = 2
"""Between two columns; rich draws one of it."""
_WORD = 24
"""A column of prose is as wide as its longest word, up to so many characters: longer words are broken. So are names, in
a table of more rows than can stand side by side."""


@dataclass(frozen=True)
class Table:
    """Cells in columns: names in the first, prose in those of ``text``, figures in the others.

    Names, prose and the columns of ``left`` are set left, figures right.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text: frozenset[str] = frozenset()
    left: frozenset[str] = frozenset()

    def print(self, console: Console) -> None:
        """Print the title, and the rest in the first form that fits.

        The forms are: a line for each row; the same with the words of headers below each other; turned, with a column
        for each row; not turned, with names folded as well; turned, in as many blocks as needed.
        """
        if self.title:
            console.print(Text(self.title, style="bold"), soft_wrap=True)
        for grid in self._fit(console):
            grid.width = least if (least := _least(grid)) > console.width else None
            console.print(grid, crop=False)
            console.print()

    def _fit(self, console: Console) -> Iterator[Grid]:
        def fits(grid: Grid) -> bool:
            return _least(grid) <= console.width

        words, count = [name.replace(" ", "\n") for name in self.header], len(self.rows)
        for grid in (
            self._flat(self.header),
            self._flat(words),
            self._turn(0, count),
            self._flat(words, names_fold=True),
        ):
            if fits(grid):
                yield grid
                return
        start = 0
        while start < count:
            stop = count
            while stop > start + 1 and not fits(self._turn(start, stop)):
                stop -= 1
            yield self._turn(start, stop)
            start = stop

    def _flat(self, header: Sequence[str], *, names_fold: bool = False) -> Grid:
        folds = [*self._folds]
        folds[0] = _WORD if names_fold else folds[0]
        left = [k == 0 or title in self.text | self.left for k, title in enumerate(self.header)]
        return _grid(header, self.rows, left, lambda row, column: folds[column])

    def _turn(self, start: int, stop: int) -> Grid:
        head, *lines = zip(self.header, *self.rows[start:stop], strict=True)
        left = [True, *[False] * (stop - start)]
        return _grid(head, lines, left, lambda row, column: self._folds[row + 1] if column else None)

    @property
    def _folds(self) -> list[int | None]:
        """The number of characters to which each column may be folded; None where it may not."""
        return [_WORD if title in self.text else None for title in self.header]


def _grid(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    left: Sequence[bool],
    fold: Callable[[int, int], int | None],
) -> Grid:
    """Make a grid whose cells may be folded to the width that ``fold`` gives for their row and column, no further."""
    grid = Grid(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, _GAP - 1, 0, 0))
    for column, name in enumerate(header):
        narrow = [_narrowest(row[column], fold(at, column)) for at, row in enumerate(rows)]
        least = max([*map(len, name.split("\n")), *narrow])
        whole = all(fold(at, column) is None for at in range(len(rows)))
        justify: Literal["left", "right"] = "left" if left[column] else "right"
        grid.add_column(Text(name), justify=justify, min_width=least, no_wrap=whole, overflow="fold", vertical="top")
    for at, row in enumerate(rows):
        grid.add_row(*(Text(cell, justify="left" if fold(at, column) else None) for column, cell in enumerate(row)))
    return grid


def _narrowest(cell: str, fold: int | None) -> int:
    return len(cell) if fold is None else min(max(map(len, cell.split()), default=0), fold)


def _least(grid: Grid) -> int:
    """Return the columns of a terminal that a table needs; rich itself asks for the longest word."""
    return sum(column.min_width or 0 for column in grid.columns) + _GAP * (len(grid.columns) - 1)
