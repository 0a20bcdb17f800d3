"""Random networks: a list of steps, each of which reads maps made before it and makes new ones.

A step is a kind and two numbers that choose its operands and sizes. Any numbers make a valid network, so that a network
that fails can be made smaller. The files of this folder hold the kinds of steps; `check` says what has to hold.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

from tests.random_graphs.maps import MapSteps
from tests.random_graphs.planning import SIZE
from tests.random_graphs.python import OUTPUTS, PythonSteps
from tests.random_graphs.sequences import SequenceSteps
from tests.random_graphs.tokens import TokenSteps
from tests.zoo import randomised

Steps = list[tuple[str, int, int]]


class RandomNet(MapSteps, TokenSteps, SequenceSteps, PythonSteps):
    """Two inputs, a list of steps, and two heads, returned as one of `OUTPUTS`.

    The first head reads every map that nothing else reads, so that no step is without effect.
    """

    def __init__(self, steps: Steps, output: str = "tuple") -> None:
        super().__init__()
        self.output = output
        for at, (kind, a, b) in enumerate(steps):
            first, second = self.pick(a), self.pick(b)
            getattr(self, f"plan_{kind}")(f"step{at}", first, second, a // 7 + 1, b // 7 + 1)
        read = {operand for _, operands, _ in self.calls for operand in operands}
        self.ends = [k for k in range(len(self.widths)) if k not in read or k == len(self.widths) - 1]
        self.whole = self.pick(steps[-1][2])
        self.heads = nn.ModuleList(nn.Linear(self.widths[end], 3) for end in self.ends)
        self.last = nn.Linear(self.widths[self.whole] * SIZE * SIZE, 3)

    def forward(self, x: Tensor, y: Tensor) -> Any:
        maps = [x, y]
        for name, operands, extra in self.calls:
            kind, _, _ = name.partition("@")
            made = getattr(self, f"run_{kind}")(name.partition("@")[2], [maps[k] for k in operands], extra)
            maps.extend(made if isinstance(made, (list, tuple)) else [made])
        first = sum(head(maps[end].mean((2, 3))) for head, end in zip(self.heads, self.ends, strict=True))
        return OUTPUTS[self.output](first, self.last(maps[self.whole].flatten(1)))


def _kinds(*classes: type) -> list[str]:
    return [name.removeprefix("plan_") for cls in classes for name in vars(cls) if name.startswith("plan_")]


PLAIN = _kinds(MapSteps, TokenSteps)
"""Kinds of which nothing may be refused."""
KINDS = PLAIN + _kinds(SequenceSteps, PythonSteps)


def draw(seed: int, longest: int = 7) -> tuple[Steps, str]:
    """The steps and the output of a random network."""
    drawn = random.Random(seed)
    count = drawn.randint(2, longest)
    steps = [(drawn.choice(KINDS), drawn.randrange(70), drawn.randrange(70)) for _ in range(count)]
    return steps, drawn.choice(list(OUTPUTS)) if drawn.random() < 0.5 else "tuple"


def build(steps: Steps, output: str = "tuple", batch: int = 2) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A network in float64, its weights nowhere zero or constant, and inputs for it."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = randomised(RandomNet(steps, output)).double().eval()
    return net, tuple(torch.randn(batch, c, SIZE, SIZE, generator=generator, dtype=torch.float64) for c in (3, 2))
