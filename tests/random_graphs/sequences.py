"""Steps of random networks with shared keys, packed keys and values, other norms, patch merging and recurrence."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.random_graphs.planning import SIZE, Planning, as_map, as_tokens

RMS = ["layer", "function", "bare function", "written out", "tokens"]
SHARED_KEYS = ["expand", "repeat", "fused", "flatten", "broadcast"]
PACKED = ["chunk", "unbind", "split", "fused"]
MERGINGS = ["slices", "unshuffle", "windows", "norm"]
RECURRENT = [nn.RNN, nn.GRU, nn.LSTM]


class SequenceSteps(Planning):
    """What `RandomNet` can do with tokens besides plain attention."""

    def plan_rms(self, name, a, b, m, n):
        """A norm by the mean square, in a residual branch or alone."""
        width, form = self.widths[a], RMS[m % len(RMS)]
        if form in ("layer", "tokens"):
            self.add_module(name, nn.RMSNorm(width, eps=1e-6 if n % 2 else None, elementwise_affine=n % 3 != 0))
        elif form != "bare function":
            self.register_parameter(name, nn.Parameter(torch.ones(width)))
        self.call("rms", name, [a], [width], (form, n % 2))

    def plan_shared_keys(self, name, a, b, m, n):
        """Grouped-query attention: fewer heads of keys and values than of queries."""
        groups, share, size = 1 + n % 2, 2 + n // 2 % 2, 1 + n // 4 % 3
        self.add_module(f"{name}_q", nn.Linear(self.widths[a], groups * share * size))
        self.add_module(f"{name}_k", nn.Linear(self.widths[a], groups * size))
        self.add_module(f"{name}_v", nn.Linear(self.widths[a], groups * size, bias=m % 2 == 0))
        self.add_module(f"{name}_out", nn.Linear(groups * share * size, self.widths[a]))
        self.call("shared_keys", name, [a], [self.widths[a]], (SHARED_KEYS[m % len(SHARED_KEYS)], groups, share, size))

    def plan_packed_pair(self, name, a, b, m, n):
        """Attention of one map to another, keys and values made by one layer."""
        heads, size = 1 + n % 3, 1 + n // 3 % 3
        self.add_module(f"{name}_q", nn.Linear(self.widths[a], heads * size, bias=m % 2 == 0))
        self.add_module(f"{name}_kv", nn.Linear(self.widths[b], 2 * heads * size))
        self.add_module(f"{name}_out", nn.Linear(heads * size, self.widths[a]))
        self.call("packed_pair", name, [a, b], [self.widths[a]], (PACKED[m % len(PACKED)], heads, size))

    def plan_merging(self, name, a, b, m, n):
        """Positions are added, then each channel is read from four places."""
        width, out = self.widths[a], 1 + n % 6
        shape = [(1, SIZE, SIZE, width), (SIZE, SIZE, width), (1, SIZE, SIZE, 1)][n % 3]
        self.register_parameter(f"{name}_places", nn.Parameter(torch.randn(shape)))
        form = MERGINGS[m % len(MERGINGS)]
        if form == "norm":
            self.add_module(f"{name}_norm", nn.LayerNorm(4 * width))
        self.add_module(name, nn.Linear(4 * width, out, bias=m % 3 == 0))
        self.call("merging", name, [a], [out], form)

    def plan_recurrent(self, name, a, b, m, n):
        """An RNN, GRU or LSTM along the positions: its outputs, or its last state as a gate of them."""
        width, both, layers = 1 + n % 4, m // 3 % 2 == 1, 1 + n // 4 % 2
        cell = RECURRENT[m % 3](self.widths[a], width, layers, batch_first=True, bidirectional=both, bias=n % 3 != 0)
        self.add_module(name, cell)
        self.call("recurrent", name, [a], [width * (1 + both)], not both and n % 2 == 0)

    # ---- running

    def run_rms(self, name, maps, how):
        (form, residual), x = how, maps[0].permute(0, 2, 3, 1)
        if form == "layer":
            y = self.get_submodule(name)(x)
        elif form == "tokens":
            y = as_map(self.get_submodule(name)(as_tokens(maps[0]))).permute(0, 2, 3, 1)
        elif form == "function":
            y = F.rms_norm(x, (x.shape[-1],), getattr(self, name), 1e-5)
        elif form == "bare function":
            y = F.rms_norm(x, x.shape[-1:])
        else:
            y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * getattr(self, name)
        return (x + y.tanh() if residual else y).permute(0, 3, 1, 2)

    def run_shared_keys(self, name, maps, how):
        (form, groups, share, size), x = how, as_tokens(maps[0])
        n, tokens, _ = x.shape
        q = self.get_submodule(f"{name}_q")(x).view(n, tokens, groups * share, size).transpose(1, 2)
        k, v = (self.get_submodule(f"{name}_{k}")(x).view(n, tokens, groups, size).transpose(1, 2) for k in "kv")
        y = attend_shared(form, q, k, v, share)
        y = self.get_submodule(f"{name}_out")(y.transpose(1, 2).reshape(n, tokens, -1))
        return as_map(x + y)

    def run_packed_pair(self, name, maps, how):
        (form, heads, size), x = how, as_tokens(maps[0])
        q = self.get_submodule(f"{name}_q")(x).unflatten(-1, (heads, size)).transpose(1, 2)
        pair = self.get_submodule(f"{name}_kv")(as_tokens(maps[1]))
        if form == "unbind":
            k, v = pair.reshape(pair.shape[0], -1, 2, heads, size).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            parts = pair.split(heads * size, -1) if form == "split" else pair.chunk(2, -1)
            k, v = (t.reshape(t.shape[0], t.shape[1], heads, size).transpose(1, 2) for t in parts)
        if form == "fused":
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = ((q @ k.transpose(-2, -1)) * size**-0.5).softmax(-1) @ v
        return as_map(x + self.get_submodule(f"{name}_out")(y.transpose(1, 2).flatten(2)))

    def run_merging(self, name, maps, form):
        x = maps[0].permute(0, 2, 3, 1) + getattr(self, f"{name}_places")
        n, h, w, c = x.shape
        if form == "unshuffle":
            y = F.pixel_unshuffle(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
        elif form == "windows":
            y = x.reshape(n, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5).reshape(n, h // 2, w // 2, 4 * c)
        else:
            y = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], -1)
        if form == "norm":
            y = self.get_submodule(f"{name}_norm")(y)
        y = self.get_submodule(name)(y).permute(0, 3, 1, 2)
        return F.interpolate(y, scale_factor=2)

    def run_recurrent(self, name, maps, gated):
        y, state = self.get_submodule(name)(as_tokens(maps[0]))
        if gated:
            last = state[0] if isinstance(self.get_submodule(name), nn.LSTM) else state
            y = y * last[-1].unsqueeze(1).sigmoid()
        return as_map(y)


def attend_shared(form: str, q: Tensor, k: Tensor, v: Tensor, share: int) -> Tensor:
    """Attention of queries (batch, groups * share, tokens, size) to keys and values (batch, groups, tokens, size)."""
    n, groups, tokens, size = k.shape
    if form == "fused":
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    if form == "broadcast":
        q = q.reshape(n, groups, share, tokens, size)
        weights = (q @ k.unsqueeze(2).transpose(-2, -1) * size**-0.5).softmax(-1)
        return (weights @ v.unsqueeze(2)).flatten(1, 2)
    if form == "expand":
        k, v = (
            t[:, :, None].expand(n, groups, share, tokens, size).reshape(n, groups * share, tokens, size)
            for t in (k, v)
        )
    elif form == "flatten":
        k, v = (t.unsqueeze(2).expand(-1, -1, share, -1, -1).flatten(1, 2) for t in (k, v))
    else:
        k, v = (t.repeat_interleave(share, dim=1) for t in (k, v))
    return (q @ k.transpose(-2, -1) * size**-0.5).softmax(-1) @ v
