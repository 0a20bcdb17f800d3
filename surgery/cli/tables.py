"""Tables that fit a terminal: prose folds, and a figure is never wrapped and never cut."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich.text import Text

_GAP = "  "
_INDENT = "    "
_WORD = 24
"""A column of prose is no narrower than its longest word; words longer than this are broken."""
_LINES = 4
"""Into about so many lines the longest cell of a column of prose may be folded."""
_TURNED_PROSE = 36
"""How wide prose makes a column of a turned table."""


@dataclass(frozen=True)
class Table:
    """Cells, and what the columns hold: names in the first, prose in those of ``text``, figures in the others.

    Prose, names, and what the columns of ``left`` hold are set left, figures right. Only prose may be folded.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text: frozenset[str] = frozenset()
    left: frozenset[str] = frozenset()

    def lines(self, width: int, rule: str = "─") -> Iterator[Text]:
        """The lines to print on a terminal of so many columns, in the first of these forms that fits it.

        One line for each row, prose folded; turned, with a column for each row; prose on lines of its own below each
        row; names and prose on lines above the figures; turned, in several blocks. Titles, and what is wider than the
        terminal by itself, are left for the terminal to wrap.
        """
        turned = _turned(self, width)
        blocks = (
            _flat(self, width)
            or (turned if len(turned) == 1 else [])
            or _prose_below(self, width)
            or _figures_below(self, width)
            or turned
        )
        if self.title:
            yield Text(self.title, style="bold")
        for head, body in blocks:
            yield from (Text(line, style="bold") for line in head)
            yield Text(rule * max(map(len, [*head, *body])))
            yield from map(Text, body)
            yield Text()

    @property
    def prose(self) -> list[int]:
        """The columns that may be folded."""
        return [k for k, name in enumerate(self.header) if name in self.text]

    @property
    def figures(self) -> list[int]:
        """The other columns, but the first."""
        return [k for k, name in enumerate(self.header) if k and name not in self.text]


_Block = tuple[list[str], list[str]]
"""Lines of a header, and of what is below it."""


def _flat(table: Table, width: int) -> list[_Block]:
    columns = list(range(len(table.header)))
    widths = _widths(table, columns, width)
    if widths is None:
        return []
    grid = _Grid(table, columns, widths)
    return [(grid.head(), [line for row in table.rows for line in grid.row(row)])]


def _prose_below(table: Table, width: int) -> list[_Block]:
    prose = [k for k in table.prose if k]
    columns = [0, *table.figures]
    widths = _widths(table, columns, width)
    if widths is None or not prose:
        return []
    grid = _Grid(table, columns, widths)

    def below(row: Sequence[str]) -> list[str]:
        return _paragraph((row[k] for k in prose), width, _INDENT)

    return [
        ([*grid.head(), *below(table.header)], [line for row in table.rows for line in (*grid.row(row), *below(row))])
    ]


def _figures_below(table: Table, width: int) -> list[_Block]:
    widths = _widths(table, table.figures, width - len(_INDENT))
    if not widths:
        return []
    grid = _Grid(table, table.figures, widths)
    lead = [0, *(k for k in table.prose if k)]

    def row_lines(row: Sequence[str], figures: list[str]) -> list[str]:
        return [*_paragraph((row[k] for k in lead), width, ""), *(f"{_INDENT}{line}" for line in figures)]

    body = [line for row in table.rows for line in row_lines(row, grid.row(row))]
    return [(row_lines(table.header, grid.head()), body)]


def _turned(table: Table, width: int) -> list[_Block]:
    """In blocks of as many rows as fit next to each other; at least one block, at least one row in each."""
    label = max(map(len, table.header))
    room = max(width - label - len(_GAP), _WORD)
    wide = [_turned_width(table, row, room) for row in table.rows]
    blocks: list[list[int]] = [[]]
    taken = label
    for k, column in enumerate(wide):
        if blocks[-1] and taken + len(_GAP) + column > width:
            blocks.append([])
            taken = label
        blocks[-1].append(k)
        taken += len(_GAP) + column
    return [_turned_block(table, rows, [label, *(wide[k] for k in rows)]) for rows in blocks]


def _turned_width(table: Table, row: Sequence[str], room: int) -> int:
    prose = max((len(row[k]) for k in table.prose), default=0)
    figures = max((len(row[k]) for k in table.figures), default=0)
    return max(min(len(row[0]), room), min(prose, _TURNED_PROSE, room), figures)


def _turned_block(table: Table, rows: Sequence[int], widths: Sequence[int]) -> _Block:
    lines = []
    for k, name in enumerate(table.header):
        left = [True, *[k in table.prose] * len(rows)]
        lines.append(_line([name, *(table.rows[row][k] for row in rows)], widths, left))
    return lines[0], [line for part in lines[1:] for line in part]


@dataclass(frozen=True)
class _Grid:
    """Some columns of a table, at their widths."""

    table: Table
    columns: Sequence[int]
    widths: Sequence[int]

    def head(self) -> list[str]:
        return _line([self.table.header[k] for k in self.columns], self.widths, self._left(), last=True)

    def row(self, row: Sequence[str]) -> list[str]:
        return _line([row[k] for k in self.columns], self.widths, self._left())

    def _left(self) -> list[bool]:
        return [k == 0 or self.table.header[k] in self.table.text | self.table.left for k in self.columns]


def _widths(table: Table, columns: Sequence[int], width: int) -> list[int] | None:
    """How wide the columns are where they have so much room, if they fit at all; headers may be folded for it."""
    natural, least = [], []
    for k in columns:
        cells = [row[k] for row in table.rows]
        longest = max(map(len, cells), default=0)
        if k in table.prose:
            longest = max(min(_longest_word(cells), _WORD), math.ceil(longest / _LINES))
        least.append(max(longest, _longest_word([table.header[k]])))
        natural.append(max(len(cell) for cell in (table.header[k], *cells)))
    spare = width - sum(least) - len(_GAP) * (len(columns) - 1)
    if spare < 0:
        return None
    for at in sorted(range(len(columns)), key=lambda at: natural[at] - least[at]):
        more = min(natural[at] - least[at], spare)
        least[at] += more
        spare -= more
    return least


def _longest_word(texts: Iterable[str]) -> int:
    return max((len(word) for text in texts for word in text.split()), default=0)


def _line(cells: Sequence[str], widths: Sequence[int], left: Sequence[bool], *, last: bool = False) -> list[str]:
    """One row of cells, each folded to its width; ``last``: the shorter ones stand at the bottom."""
    folded = [
        textwrap.wrap(cell, width, break_on_hyphens=False) if len(cell) > width else [cell]
        for cell, width in zip(cells, widths, strict=True)
    ]
    height = max(map(len, folded))
    padded = [[""] * (height - len(c)) + c if last else c + [""] * (height - len(c)) for c in folded]
    return [
        _GAP.join(
            part.ljust(width) if to_left else part.rjust(width)
            for part, width, to_left in zip(parts, widths, left, strict=True)
        ).rstrip()
        for parts in zip(*padded, strict=True)
    ]


def _paragraph(texts: Iterable[str], width: int, indent: str) -> list[str]:
    """What there is of ``texts``, folded and indented; no word is broken."""
    return textwrap.wrap(
        " · ".join(filter(None, texts)),
        width,
        initial_indent=indent,
        subsequent_indent=_INDENT,
        break_long_words=False,
        break_on_hyphens=False,
    )
