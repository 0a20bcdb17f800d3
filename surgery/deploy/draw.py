"""A drawing of a model's dimension groups: layers from top to bottom, and one line for each group.

A box is a layer: a parameter of two or more axes, in the colour of the group that it writes. The line of a group runs
past all layers that write it (a dot) or read it (a ring). Parts that cannot be edited are grey and hatched. Boxes and
lines show their figures under the pointer. The picture is one self-contained SVG file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from xml.sax.saxutils import escape

from torch import nn

from surgery.axes.groups import DimensionGroup, Member
from surgery.counting.group_cost import GroupCost
from surgery.units import counted, quantity

_ROW, _LANE, _TOP, _LEFT = 24, 13, 92, 16
_BOX = 17
"""Height of a box. Above: of a row, between lines, of the margins. All in pixels."""

_HUES = "0b6bcb c2410c 15803d a21caf b91c1c 0e7490 a16207 4f46e5 be185d 4d7c0f 7c3aed 0f766e 9a3412 1d4ed8"
_COLOURS = tuple(f"#{hue}" for hue in _HUES.split())
_GREY = "#8a8f98"

_STYLE = """
text { font: 11px ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace; fill: #1f2328; }
text.title { font: bold 17px system-ui, 'DejaVu Sans', sans-serif; }
text.said { font: 12px system-ui, 'DejaVu Sans', sans-serif; fill: #57606a; }
.frozen text { paint-order: stroke; stroke: #ffffff; stroke-width: 4px; stroke-linejoin: round; }
tspan.where { fill: #6e7781; }
text.shape { fill: #57606a; text-anchor: end; }
.line { fill: none; stroke-width: 3; stroke-linecap: round; }
.tie { fill: none; stroke-width: 1; opacity: 0.55; }
.group:hover .line { stroke-width: 6; }
.group:hover .tie { stroke-width: 2.5; opacity: 1; }
.group:hover text { font-weight: bold; }
"""


def draw_groups(
    module: nn.Module,
    groups: Sequence[DimensionGroup],
    costs: Mapping[str, GroupCost],
    macs: Mapping[str, int],
    *,
    title: str,
    subtitle: str = "",
) -> str:
    """Draw the dimension groups of a traced module as an SVG file.

    Args:
        module: the traced module.
        groups: its groups, of `surgery.dimension_groups`.
        costs: their costs, of `surgery.group_costs`.
        macs: MACs by parameter in the order of the forward pass, of `surgery.weight_macs`.
        title: the line on top.
        subtitle: the line below it.

    Returns:
        The text of the file.

    Example:
        >>> groups = surgery.dimension_groups(traced)
        >>> costs = surgery.group_costs(traced, groups)
        >>> svg = surgery.draw_groups(traced, groups, costs, surgery.weight_macs(traced), title="ResNet-18")
    """
    rows = _rows(module, groups, macs)
    return _Picture(rows, _tracks(groups, rows), costs).svg(title, subtitle)


@dataclass
class _Row:
    """A layer: a parameter of two or more axes, and its place in the picture."""

    name: str
    layer: str
    shape: str
    macs: int
    params: int
    place: int
    reads: list[_Track] = field(default_factory=list)
    writes: list[_Track] = field(default_factory=list)


@dataclass
class _Track:
    """A dimension group, its roles by row, and the column of its line."""

    group: DimensionGroup
    stations: dict[int, set[str]]
    colour: str = _GREY
    column: int = 0

    @property
    def first(self) -> int:
        return min(self.stations)

    @property
    def last(self) -> int:
        return max(self.stations)


def _rows(module: nn.Module, groups: Sequence[DimensionGroup], macs: Mapping[str, int]) -> dict[str, _Row]:
    """A row for each parameter, by name, in the order of the forward pass where it is known."""
    held = {member.name for group in groups for member in group.members}
    called = {name: place for place, name in enumerate(name for name in macs if name)}
    order: list[tuple[tuple[int, int], str, nn.Parameter]] = []
    behind = -1
    for number, (name, parameter) in enumerate(module.named_parameters()):
        if parameter.ndim < 2 or name not in held:
            continue
        behind = called.get(name, behind)  # a parameter that is not called follows the one registered before it
        order.append(((behind, number), name, parameter))
    order.sort(key=lambda item: item[0])
    rows = {}
    for place, (_, name, parameter) in enumerate(order):
        layer = Member(name, 0, "").layer
        shape = _shape(module, name, parameter)
        rows[name] = _Row(name, layer, shape, macs.get(name, 0), parameter.numel(), place)
    return rows


def _shape(module: nn.Module, name: str, parameter: nn.Parameter) -> str:
    """``3x3  64 → 128`` for a convolution, else the sizes of the axes."""
    sizes = list(parameter.shape)
    path, _, kind = name.rpartition(".")
    layer = module.get_submodule(path)
    if kind != "weight" or isinstance(layer, nn.Embedding):
        return " x ".join(map(str, sizes))
    groups = getattr(layer, "groups", 1)
    groups = groups if isinstance(groups, int) else 1
    transposed = bool(getattr(layer, "transposed", False))
    read, written = (sizes[0], sizes[1] * groups) if transposed else (sizes[1] * groups, sizes[0])
    kernel = "x".join(map(str, sizes[2:]))
    return "  ".join(filter(None, (kernel, f"/{groups}" if groups > 1 else "", f"{read} → {written}")))


def _tracks(groups: Sequence[DimensionGroup], rows: Mapping[str, _Row]) -> list[_Track]:
    """A track for each group that touches a row; short ones are closest to the boxes."""
    tracks: list[_Track] = []
    for group in groups:
        stations: dict[int, set[str]] = {}
        for member in group.members:
            if member.name in rows:
                stations.setdefault(rows[member.name].place, set()).add(member.role)
        if stations:
            tracks.append(_Track(group, stations))
    _colour(tracks)
    taken: list[list[_Track]] = []
    for track in sorted(tracks, key=lambda t: (t.last - t.first, t.first)):
        free = (
            k for k, column in enumerate(taken) if all(t.last < track.first or track.last < t.first for t in column)
        )
        track.column = next(free, len(taken))
        if track.column == len(taken):
            taken.append([])
        taken[track.column].append(track)
    by_place = {row.place: row for row in rows.values()}
    for track in tracks:
        for place, roles in track.stations.items():
            (by_place[place].reads if roles == {"consumer"} else by_place[place].writes).append(track)
    return tracks


def _colour(tracks: Sequence[_Track]) -> None:
    """Give each editable group a colour that differs from its neighbours'."""
    done: list[_Track] = []
    for number, track in enumerate(sorted(tracks, key=lambda t: (t.first, t.last))):
        if not track.group.editable:
            continue
        near = {t.colour for t in done if t.first - 3 <= track.last and track.first - 3 <= t.last}
        choice = [_COLOURS[(number + k) % len(_COLOURS)] for k in range(len(_COLOURS))]
        track.colour = next((colour for colour in choice if colour not in near), choice[0])
        done.append(track)


class _Picture:
    def __init__(self, rows: Mapping[str, _Row], tracks: Sequence[_Track], costs: Mapping[str, GroupCost]) -> None:
        self.rows = list(rows.values())
        self.tracks = tracks
        self.costs = costs
        longest = max((len(row.layer) + len(row.shape) for row in self.rows), default=20)
        self.box_width = 7 * longest + 40
        self.lanes = _LEFT + self.box_width + 18
        self.labels = self.lanes + _LANE * (1 + max((track.column for track in tracks), default=0)) + 14

    def svg(self, title: str, subtitle: str) -> str:
        labelled = self._labels()
        longest = max((len(text) for text, _ in labelled.values()), default=0)
        width = max(self.labels + 7 * longest + 20, 640)
        height = _TOP + _ROW * len(self.rows) + 24
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}">',
            f"<style>{_STYLE}</style>",
            '<defs><pattern id="frozen" width="6" height="6" patternUnits="userSpaceOnUse" '
            'patternTransform="rotate(45)"><rect width="6" height="6" fill="#f0f1f3"/>'
            f'<line x1="0" y1="0" x2="0" y2="6" stroke="{_GREY}" stroke-width="2"/></pattern></defs>',
            f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
            f'<text class="title" x="{_LEFT}" y="26">{escape(title)}</text>',
            f'<text class="said" x="{_LEFT}" y="46">{escape(subtitle)}</text>',
            self._legend(),
            *(self._bands(width)),
            *(self._box(row) for row in self.rows),
            *(self._track(track, labelled.get(id(track))) for track in sorted(self.tracks, key=lambda t: -t.column)),
            "</svg>",
        ]
        return "\n".join(parts) + "\n"

    def _legend(self) -> str:
        x, y = _LEFT, 68
        colour = _COLOURS[0]
        return (
            f'<g><circle cx="{x + 5}" cy="{y - 4}" r="4.5" fill="{colour}"/>'
            f'<text class="said" x="{x + 16}" y="{y}">writes the group</text>'
            f'<circle cx="{x + 129}" cy="{y - 4}" r="4" fill="#ffffff" stroke="{colour}" stroke-width="2"/>'
            f'<text class="said" x="{x + 140}" y="{y}">reads it</text>'
            f'<rect x="{x + 206}" y="{y - 12}" width="22" height="14" fill="url(#frozen)" stroke="{_GREY}"/>'
            f'<text class="said" x="{x + 236}" y="{y}">cannot be edited</text></g>'
        )

    def _bands(self, width: int) -> list[str]:
        """A faint band behind every second block of layers; a block shares its container."""
        bands: list[str] = []
        dark, previous = False, None
        for row in self.rows:
            container = _container(row.layer)
            dark = dark if container == previous else not dark
            previous = container
            if dark:
                y = _TOP + _ROW * row.place
                bands.append(f'<rect x="0" y="{y}" width="{width}" height="{_ROW}" fill="#f6f8fa"/>')
        return bands

    def _box(self, row: _Row) -> str:
        written = next(iter(row.writes), None)
        frozen = written is not None and not written.group.editable
        colour = written.colour if written else _GREY
        fill = "url(#frozen)" if frozen else colour
        opacity = 1 if frozen else 0.14
        frame = ' class="frozen"' if frozen else ""
        y = self._y(row.place) - _BOX / 2
        head, _, tail = row.layer.rpartition(".")
        where = f'<tspan class="where">{escape(head)}.</tspan>' if head else ""
        told = [
            f"{row.name}: {row.shape}",
            f"{quantity(row.params)} parameters, {quantity(row.macs)} MACs",
            *(f"reads {track.group.name} ({track.group.size})" for track in row.reads),
            *(f"writes {track.group.name} ({track.group.size})" for track in row.writes),
        ]
        return (
            f'<g{frame}><title>{escape(chr(10).join(told))}</title><rect x="{_LEFT}" y="{y}" width="{self.box_width}" '
            f'height="{_BOX}" rx="3" fill="{fill}" fill-opacity="{opacity}" stroke="{colour}" stroke-opacity="0.7"/>'
            f'<rect x="{_LEFT}" y="{y}" width="5" height="{_BOX}" rx="2" fill="{colour}"/>'
            f'<text x="{_LEFT + 12}" y="{y + 12.5}">{where}{escape(tail)}</text>'
            f'<text class="shape" x="{_LEFT + self.box_width - 8}" y="{y + 12.5}">{escape(row.shape)}</text></g>'
        )

    def _track(self, track: _Track, label: tuple[str, int] | None) -> str:
        x = self.lanes + _LANE * track.column
        edge = _LEFT + self.box_width
        top, bottom = self._y(track.first), self._y(track.last)
        dashes = "" if track.group.editable else ' stroke-dasharray="4 3"'
        marks = [
            f'<line class="line" x1="{x}" y1="{top}" x2="{x}" y2="{bottom}" stroke="{track.colour}"{dashes}/>',
        ]
        for place, roles in track.stations.items():
            y = self._y(place) + (3 if roles == {"consumer"} else -3)
            marks.append(f'<path class="tie" d="M{edge} {y}H{x}" stroke="{track.colour}"/>')
            if roles == {"consumer"}:
                marks.append(
                    f'<circle cx="{x}" cy="{y}" r="3.5" fill="#ffffff" stroke="{track.colour}" stroke-width="2"/>'
                )
            else:
                marks.append(f'<circle cx="{x}" cy="{y}" r="4" fill="{track.colour}"/>')
        if label is not None:
            text, place = label
            y = self._y(place)
            marks.append(f'<path class="tie" d="M{x} {y - 3}H{self.labels - 4}" stroke="{track.colour}"/>')
            marks.append(f'<text x="{self.labels}" y="{y + 1}" style="fill: {track.colour}">{escape(text)}</text>')
        return f'<g class="group"><title>{escape(self._describe_group(track.group))}</title>{"".join(marks)}</g>'

    def _labels(self) -> dict[int, tuple[str, int]]:
        """The label of each track, by its id, and the first free row for it."""
        taken: set[int] = set()
        labels = {}
        for track in sorted(self.tracks, key=lambda t: (t.first, t.group.name not in {r.layer for r in self.rows})):
            place = next((place for place in sorted(track.stations) if place not in taken), None)
            if place is None:
                continue
            taken.add(place)
            group, cost = track.group, self.costs[track.group.name]
            units = "" if group.units == group.size else f" in {counted(group.units, 'unit')}"
            figures = f"{quantity(cost.params)} parameters, {quantity(cost.macs)} MACs"
            labels[id(track)] = (f"{group.name}: {group.size}{units} · {figures}", place)
        return labels

    def _describe_group(self, group: DimensionGroup) -> str:
        cost = self.costs[group.name]
        shown = [f"  {member.role}: {member}" for member in group.members[:12]]
        more = len(group.members) - len(shown)
        return "\n".join(
            [
                f"{group.name}: {counted(group.size, 'channel')} in {counted(group.units, 'unit')}",
                f"{quantity(cost.params)} parameters, {quantity(cost.macs)} MACs",
                f"editable{f', but in part: {group.reason}' if group.reason else ''}"
                if group.editable
                else f"cannot be edited: {group.reason}",
                counted(len(group.members), "member"),
                *shown,
                *([f"  and {more} more"] if more else []),
            ]
        )

    @staticmethod
    def _y(place: int) -> float:
        return _TOP + _ROW * place + _ROW / 2


def _container(layer: str) -> str:
    """The block of a layer: its path up to the last number, or its first name."""
    parts = layer.split(".")[:-1]
    while len(parts) > 1 and not parts[-1].isdigit() and not any(c.isdigit() for c in parts[-1]):
        parts.pop()
    return ".".join(parts)
