"""Random chains of edits, saves, loads and exports, each compared with what it must compute."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from torch import Tensor, nn

import surgery


class Body(nn.Module):
    """Convolutions with a residual sum, a concatenation and two linear layers."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        wide, inner = draw.choice((4, 6, 8)), draw.choice((3, 5))
        self.stem = nn.Sequential(nn.Conv2d(3, wide, 3, padding=1), nn.BatchNorm2d(wide), nn.ReLU())
        self.down, self.up = nn.Conv2d(wide, inner, 1), nn.Conv2d(inner, wide, 1)
        self.side = nn.Conv2d(wide, 4, 3, padding=1)
        self.first, self.last = nn.Linear(wide + 4, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.up(self.down(x).relu())
        x = torch.cat([x, self.side(x).relu()], 1)
        return self.last(self.first(x.mean((2, 3))).relu())


def run_chain(seed: int, folder: Path, length: int = 5) -> str:
    """Edit a random model ``length`` times; compare each result at two batch sizes.

    Returns:
        what went wrong; empty if nothing did.
    """
    draw = random.Random(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        original = Body(draw).double().eval()
        for parameter in original.parameters():
            nn.init.normal_(parameter, std=0.5)
        original.stem[1].running_mean.normal_()
        original.stem[1].running_var.uniform_(0.5, 2)
        batches = [torch.randn(n, 3, 6, 6, dtype=torch.float64) for n in (2, 3)]
    module = surgery.trace(original, batches[0])
    done = []
    for number in range(length):
        name = draw.choice(("widen", "slim", "deepen", "save", "save"))
        done.append(name)
        expected = module
        try:
            if name == "widen":
                module = surgery.widen(module, draw.choice((1.25, 1.5, 2.0)), seed=seed + number)
            elif name == "deepen":
                module = surgery.deepen(module, draw.choice((["stem.0"], ["first"], ["side"])), seed=seed)
            elif name == "slim":
                module = surgery.slim(module, 0.75)
                masks = surgery.split_masks(expected, 0.75)
                expected = surgery.masked(expected, masks)
            else:
                surgery.save(module, folder / str(number), force=True)
                module = surgery.load(folder / str(number), model=Body(random.Random(seed)))
        except surgery.EditError:
            done[-1] += " (refused)"
            continue
        for batch in batches:
            with torch.no_grad():
                found, wanted = module.eval()(batch), expected.eval()(batch)
            if not torch.allclose(found, wanted, rtol=1e-9, atol=1e-11):
                return f"seed {seed}: {' > '.join(done)}: off by {float((found - wanted).abs().max()):.1e}"
    return ""
