"""Ways in which a file can be damaged, or written by someone who means harm."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

HOSTILE: tuple[Any, ...] = (
    None, True, 0, -1, 7, 2**31, 2**63, 10**30, 0.5, float("inf"), float("nan"), "", "x", "float33", "0:1000000000",
    "0:", "resnet18?weights=DEFAULT", "resnet18?num_classes=10000000000", "../../etc/passwd", "/dev/zero", "\ud800",
    "x" * 100_000, [], {}, [[]], [None], ["0:1000000000"], [2**63], {"tensor": [2**40], "dtype": "float32"},
    {"tuple": 3}, {"dict": []},
)  # fmt: skip
"""Values that stand where another one is expected."""


def mutate_bytes(content: bytes, draw: random.Random) -> bytes:
    """Flip a bit, or cut off, repeat, leave out or overwrite a part."""
    start = draw.randrange(len(content) + 1)
    end = min(start + draw.choice((1, 2, 8, 64, 1024)), len(content))
    way = draw.choice(("flip", "cut", "repeat", "drop", "overwrite"))
    if way == "flip" and start < len(content):
        return content[:start] + bytes([content[start] ^ 1 << draw.randrange(8)]) + content[start + 1 :]
    if way == "cut":
        return content[:start]
    if way == "repeat":
        return content[:end] + content[start:end] + content[end:]
    if way == "drop":
        return content[:start] + content[end:]
    return content[:start] + draw.randbytes(end - start) + content[end:]


def mutate_json(content: Any, draw: random.Random) -> Any:
    """Replace, remove or add a value somewhere in plain JSON data; returns a copy."""
    content = json.loads(json.dumps(content))
    holder, key = draw.choice(list(_places(content)))
    way = draw.choice(("replace", "replace", "replace", "remove", "add", "nest"))
    if way == "remove":
        del holder[key]
    elif way == "add" and isinstance(holder, dict):
        holder[draw.choice(("more", "sha256", "step", "tensor", "\ud800"))] = draw.choice(HOSTILE)
    elif way == "nest":
        for _ in range(draw.choice((3, 100, 900))):
            holder[key] = [holder[key]]
    else:
        holder[key] = draw.choice(HOSTILE)
    return content


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Each place in the data, as its container and the key or index there."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from _places(value[key])
