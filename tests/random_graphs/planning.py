"""How a random network is planned: maps, their numbers of channels, and the calls that make them."""

from __future__ import annotations

from torch import Tensor, nn

SIZE = 4
"""Every map of a random network is this high and wide."""


class Planning(nn.Module):
    """Keeps the plan. A step is planned once and run in each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.widths = [3, 2]  # channels of each map
        self.calls: list[tuple[str, list[int], object]] = []

    def pick(self, number: int) -> int:
        """A map, the latest most likely: 0 is the last one."""
        return max(len(self.widths) - 1 - number % 5, 0)

    def call(self, kind: str, name: str, operands: list[int], widths: list[int], extra: object = None) -> int:
        self.calls.append((f"{kind}@{name}", operands, extra))
        self.widths.extend(widths)
        return len(self.widths) - 1

    def layer(self, name: str, module: nn.Module, operand: int, width: int) -> int:
        self.add_module(name, module)
        return self.call("layer", name, [operand], [width])

    def of_width(self, name: str, operand: int, width: int) -> int:
        """A map of that many channels: the operand, or a pointwise convolution of it."""
        if self.widths[operand] == width:
            return operand
        return self.layer(name, nn.Conv2d(self.widths[operand], width, 1), operand, width)

    def multiple(self, name: str, operand: int, of: int) -> int:
        return self.of_width(f"{name}_to", operand, of * max(self.widths[operand] // of, 1))


def as_tokens(x: Tensor) -> Tensor:
    """A map (batch, channels, SIZE, SIZE) as (batch, positions, channels)."""
    return x.flatten(2).transpose(1, 2)


def as_map(tokens: Tensor) -> Tensor:
    """The inverse of `as_tokens`."""
    return tokens.transpose(1, 2).unflatten(2, (SIZE, SIZE))
