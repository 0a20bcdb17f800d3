"""The outputs of a network: their names, and which of them may change.

What a network gives is read by others, so its axes stay as they are, unless the user lets an output go: `FREE` for all
of them, or their names. Then the channels of an output may change like any others; its batch and its positions never
do, for no layer writes them.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from surgery.axes.labels import Labelled
from surgery.errors import UsageError, unknown_name

REASON = "network output"
FREE = "free"
"""What a user writes to let every output go."""

Outputs = str | Iterable[str] | None
"""Which outputs may change: `FREE`, a name, several, or None for none. A name is a path, a path's beginning or a glob:
see `output_name`."""


@dataclass(frozen=True, eq=False)
class NetworkOutput:
    """A tensor that the network returns."""

    name: str
    value: Labelled
    modes: tuple[bool, ...]
    """For which modes (``training``) it is returned."""
    said: bool = False
    """Whether something else was said to hold all of its channels, and that is enough."""


def output_name(path: str) -> str:
    """The name of an output, from the path that leads to it (`surgery.graph.outputs.tensors_in`).

    Example:
        >>> [output_name(path) for path in ("", "['logits']", "['states'][0]", ".features")]
        ['output', 'logits', 'states.0', 'features']
    """
    keys = re.findall(r"""\[(?:'(.*?)'|"(.*?)"|(.*?))\]|\.([^.\[]+)""", path)
    return ".".join("".join(key) for key in keys) or "output"


def parse_outputs(outputs: Outputs) -> tuple[str, ...]:
    """What a user writes, as patterns; ``"*"`` stands for every output.

    Raises:
        UsageError: it is something else.
    """
    if outputs is None:
        return ()
    if outputs == FREE:
        return ("*",)
    names = (outputs,) if isinstance(outputs, str) else tuple(outputs)
    if not all(isinstance(name, str) for name in names):
        raise UsageError(f"outputs is {FREE!r}, or names of outputs, not {outputs!r}")
    return tuple(sorted(set(names)))


def match_outputs(patterns: Sequence[str], known: Iterable[str]) -> frozenset[str]:
    """The names that any of the patterns means.

    Raises:
        UsageError: one of them means none.
    """
    names = list(dict.fromkeys(known))
    found: set[str] = set()
    for pattern in patterns:
        means = [n for n in names if n.startswith(f"{pattern}.") or fnmatch.fnmatchcase(n, pattern)]
        if not means and pattern != "*":
            raise unknown_name("output", pattern, names)
        found.update(means)
    return frozenset(found)
