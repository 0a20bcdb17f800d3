"""Random chains of edits, saves, loads and exports, each compared with what it must compute."""

from __future__ import annotations

import copy
import operator
import random
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

import surgery

EXPORTED = 25
"""The last network of every so many chains is exported: an export takes as long as twenty chains."""


class Block(nn.Module):
    """A branch that is added to what came in."""

    def __init__(self, wide: int, inner: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(wide, inner, 1), nn.Conv2d(inner, wide, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.up(self.down(x).relu())


class Body(nn.Module):
    """Convolutions with a residual sum, a concatenation and two linear layers."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        wide, inner = draw.choice((4, 6, 8)), draw.choice((3, 5))
        self.stem = nn.Sequential(nn.Conv2d(3, wide, 3, padding=1), nn.BatchNorm2d(wide), nn.ReLU())
        self.block = Block(wide, inner)
        self.side = nn.Conv2d(wide, 4, 3, padding=1)
        self.first, self.last = nn.Linear(wide + 4, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = self.block(x)
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
        name = draw.choice(("widen", "slim", "deepen", "shorten", "save", "save"))
        done.append(name)
        expected = module
        try:
            if name == "widen":
                module = surgery.widen(module, draw.choice((1.25, 1.5, 2.0)), seed=seed + number)
            elif name == "deepen":
                there = dict(module.named_modules())
                place = draw.choice([name for name in ("stem.0", "first", "side", "block") if name in there])
                module = surgery.deepen(module, [place], seed=seed)
            elif name == "shorten":
                blocks = [n for n, part in module.named_modules() if n.startswith("block") and hasattr(part, "up")]
                if not blocks:
                    continue
                module = surgery.shorten(module, [draw.choice(blocks)])
                expected = copy.deepcopy(expected)
                for zero in surgery.recipe(module).steps[-1].zeros:
                    operator.attrgetter(zero)(expected).data.zero_()
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
    return "" if seed % EXPORTED else _compare_export(module.float(), batches, folder / "last.onnx", done)


def _compare_export(module: nn.Module, batches: list[Tensor], file: Path, done: list[str]) -> str:
    surgery.export_onnx(module, file, force=True)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for batch in batches:
        with torch.no_grad():
            wanted = module(batch.float()).numpy()
        (found,) = session.run(None, {session.get_inputs()[0].name: batch.float().numpy()})
        if not np.allclose(found, wanted, rtol=1e-3, atol=1e-4 * max(1.0, float(np.abs(wanted).max()))):
            return f"{' > '.join(done)} > export: off by {float(np.abs(found - wanted).max()):.1e}"
    return ""
