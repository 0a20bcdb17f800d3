"""Steps of random networks on maps of channels: convolutions, norms, joins, splits and shuffles."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.random_graphs.planning import Planning


class MapSteps(Planning):
    """What `RandomNet` can do with maps (batch, channels, SIZE, SIZE)."""

    def plan_conv(self, name, a, b, m, n):
        width = 1 + n % 8
        block = nn.Sequential(nn.Conv2d(self.widths[a], width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.layer(name, block, a, width)

    def plan_grouped(self, name, a, b, m, n):
        groups = 2 + m % 2
        a = self.multiple(name, a, groups)
        width = groups * (1 + n % 4)
        self.layer(name, nn.Conv2d(self.widths[a], width, 1, groups=groups), a, width)

    def plan_depthwise(self, name, a, b, m, n):
        width = self.widths[a] * (1 + n % 2)
        self.layer(name, nn.Conv2d(self.widths[a], width, 3, padding=1, groups=self.widths[a]), a, width)

    def plan_transposed(self, name, a, b, m, n):
        groups = 1 + m % 2
        a = self.multiple(name, a, groups)
        width = groups * (1 + n % 4)
        self.layer(name, nn.ConvTranspose2d(self.widths[a], width, 3, padding=1, groups=groups), a, width)

    def plan_norm(self, name, a, b, m, n):
        self.add_module(name, nn.BatchNorm2d(self.widths[a]))
        self.call("norm", name, [a], [self.widths[a]])

    def plan_activation(self, name, a, b, m, n):
        self.layer(name, [nn.SiLU(), nn.Sigmoid(), nn.PReLU(self.widths[a])][m % 3], a, self.widths[a])

    def plan_again(self, name, a, b, m, n):
        """A layer that runs twice."""
        layer = nn.Conv2d(self.widths[a], self.widths[a], 1)
        once = self.layer(name, layer, a, self.widths[a])
        self.call("layer", name, [once], [self.widths[a]])

    def plan_add(self, name, a, b, m, n):
        b = self.of_width(f"{name}_to", b, self.widths[a])
        self.call("add", name, [a, b], [self.widths[a]], m % 2)

    def plan_cat(self, name, a, b, m, n):
        if self.widths[a] + self.widths[b] <= 24:
            self.call("cat", name, [a, b], [self.widths[a] + self.widths[b]])

    def plan_split(self, name, a, b, m, n):
        width = self.widths[a]
        if width > 1:
            cut = 1 + n % (width - 1)
            self.call("split", name, [a], [cut, width - cut], (m % 3, cut))

    def plan_shuffle(self, name, a, b, m, n):
        groups = 2 + n % 2
        a = self.multiple(name, a, groups)
        self.call("shuffle", name, [a], [self.widths[a]], (m % 2, groups))

    def plan_gate(self, name, a, b, m, n):
        width, hidden = self.widths[a], 1 + n % 3
        self.add_module(name, nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width)))
        self.call("gate", name, [a], [width], m % 2)

    def plan_scale(self, name, a, b, m, n):
        self.register_parameter(name, nn.Parameter(torch.randn(self.widths[a], 1, 1)))
        self.call("scale", name, [a], [self.widths[a]])

    def plan_glu(self, name, a, b, m, n):
        a = self.multiple(name, a, 2)
        self.call("glu", name, [a], [self.widths[a] // 2], m % 2)

    def plan_pixels(self, name, a, b, m, n):
        a = self.multiple(name, a, 4)
        self.call("pixels", name, [a], [self.widths[a]], m % 2)

    def plan_reverse(self, name, a, b, m, n):
        self.call("reverse", name, [a], [self.widths[a]], m % 3)

    def plan_every_other(self, name, a, b, m, n):
        if self.widths[a] > 1:
            self.call("every_other", name, [a], [-(-self.widths[a] // 2), self.widths[a] // 2])

    def plan_stack(self, name, a, b, m, n):
        b = self.of_width(f"{name}_to", b, self.widths[a])
        self.call("stack", name, [a, b], [self.widths[a] * (1 + m % 2)], m % 2)

    def plan_group_norm(self, name, a, b, m, n):
        a = self.multiple(name, a, 2)
        norm = nn.GroupNorm([1, 2, self.widths[a]][m % 3], self.widths[a])
        for parameter in norm.parameters():
            parameter.data.uniform_(0.5, 1.5)
        self.layer(name, norm, a, self.widths[a])

    # ---- running

    def run_layer(self, name, maps, extra):
        return self.get_submodule(name)(maps[0])

    def run_norm(self, name, maps, extra):
        """Of maps in the usual order: in torch 2.14.1 the gradients of a batch norm are wrong on a CPU where its one
        image has its channels innermost and the gradient that comes back has not."""
        return self.get_submodule(name)(maps[0].contiguous())

    def run_add(self, name, maps, multiply):
        return maps[0] * maps[1] if multiply else maps[0] + maps[1]

    def run_cat(self, name, maps, extra):
        return torch.cat(maps, 1)

    def run_split(self, name, maps, how):
        (form, cut), x = how, maps[0]
        if form == 0:
            front, back = torch.split(x, [cut, x.shape[1] - cut], 1)
            return [front, back]
        return [x[:, :cut], x[:, cut:]] if form == 1 else [x.narrow(1, 0, cut), x[:, cut - x.shape[1] :]]

    def run_shuffle(self, name, maps, how):
        (form, groups), x = how, maps[0]
        if form:
            return F.channel_shuffle(x, groups)
        n, c, h, w = x.shape
        return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, -1, h, w)

    def run_gate(self, name, maps, form):
        x = maps[0]
        gate = torch.sigmoid(self.get_submodule(name)(x.mean((2, 3))))
        return x * (gate[:, :, None, None] if form else gate.view(x.size(0), x.size(1), 1, 1).expand_as(x))

    def run_scale(self, name, maps, extra):
        return maps[0] * getattr(self, name) * maps[0].shape[1] ** -0.5

    def run_glu(self, name, maps, form):
        if form:
            return F.glu(maps[0], 1)
        a, b = maps[0].chunk(2, 1)
        return a * torch.tanh(b)

    def run_pixels(self, name, maps, form):
        if form:
            return F.pixel_unshuffle(F.pixel_shuffle(maps[0], 2), 2)
        return F.max_pool2d(F.interpolate(maps[0], scale_factor=2), 2)

    def run_reverse(self, name, maps, form):
        return maps[0].flip(1) if form == 0 else maps[0].roll(1, 1) if form == 1 else maps[0].flip(-1)

    def run_every_other(self, name, maps, extra):
        return [maps[0][:, ::2], maps[0][:, 1::2]]

    def run_stack(self, name, maps, flat):
        both = torch.stack(maps, 1)
        return both.flatten(1, 2) if flat else both.mean(1)
