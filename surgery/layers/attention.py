"""Attention whose number of heads does not follow from the width of its input.

`torch.nn.MultiheadAttention` and torchvision's windowed attention divide the width by the number of heads to know the
size of a head. An edited network keeps the size of a head and changes both others on their own, so it computes with
these instead, which take it as an argument.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class HeadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` with ``num_heads * head_dim`` inner channels, whatever ``embed_dim`` is.

    Made from an edited one (`fit_heads`), never by itself. It has the same parameters under the same names, takes the
    same arguments and returns the same values.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Shapes as in `torch.nn.MultiheadAttention`."""
        batched = query.dim() == 3
        if not batched:
            query, key, value = (t.unsqueeze(0 if self.batch_first else 1) for t in (query, key, value))
        if not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        q, k, v = self._projected(query, key, value)
        k, v = self._with_bias(k, self.bias_k), self._with_bias(v, self.bias_v)
        q, k, v = (self._split(t) for t in (q, k, v))
        further = k.shape[2] - key.shape[1]
        attn_mask, key_padding_mask = (
            None if m is None else F.pad(m, (0, further)) for m in (attn_mask, key_padding_mask)
        )
        mask = _merge_masks(attn_mask, key_padding_mask, q, k)
        scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)
        if mask is not None:
            scores = scores + mask
        weights = F.dropout(torch.softmax(scores, -1), self.dropout, self.training)
        mixed = (weights @ v).transpose(1, 2).flatten(2)
        result = F.linear(mixed, self.out_proj.weight, self.out_proj.bias)
        if not self.batch_first:
            result = result.transpose(0, 1)
        shown = (weights.mean(1) if average_attn_weights else weights) if need_weights else None
        if not batched:
            result = result.squeeze(0 if self.batch_first else 1)
            shown = None if shown is None else shown.squeeze(0)
        return result, shown

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weights: Sequence[Tensor] = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (F.linear(t, w, b) for t, w, b in zip((query, key, value), weights, biases, strict=True))
        return q, k, v

    def _with_bias(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Keys or values, and those behind them that no token has: a learned one, zeros."""
        if bias is not None:
            x = torch.cat([x, bias.expand(x.shape[0], 1, -1)], 1)
        return torch.cat([x, torch.zeros_like(x[:, :1])], 1) if self.add_zero_attn else x

    def _split(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:-1], -1, self.head_dim).transpose(1, 2)


def fit_heads(module: nn.MultiheadAttention, head_dim: int) -> None:
    """Let the attributes of an attention follow its parameters; a plain module where that can express them."""
    inner, module.embed_dim = module.out_proj.weight.shape[1], module.out_proj.weight.shape[0]
    module.num_heads, module.head_dim = inner // head_dim, head_dim
    if module.in_proj_weight is not None:
        read = module.kdim = module.vdim = module.in_proj_weight.shape[1]
    else:
        read = module.q_proj_weight.shape[1]
        module.kdim, module.vdim = module.k_proj_weight.shape[1], module.v_proj_weight.shape[1]
    module.out_proj.out_features, module.out_proj.in_features = module.out_proj.weight.shape
    module.__class__ = nn.MultiheadAttention if inner == module.embed_dim == read else HeadAttention


def _merge_masks(mask: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """Both masks as numbers to add to scores of shape (batch, heads, queries, keys)."""
    merged = None
    for given in (mask, padding):
        if given is None:
            continue
        number = given
        if given.dtype == torch.bool:
            number = torch.zeros_like(given, dtype=q.dtype).masked_fill(given, -math.inf)
        if given is padding:
            number = number.view(-1, 1, 1, k.shape[2])
        elif given.dim() == 3:
            number = number.view(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        merged = number if merged is None else merged + number
    return merged


def windowed_attention(
    input: Tensor,
    qkv_weight: Tensor,
    proj_weight: Tensor,
    relative_position_bias: Tensor,
    window_size: Sequence[int],
    num_heads: int,
    shift_size: Sequence[int],
    attention_dropout: float = 0.0,
    dropout: float = 0.0,
    qkv_bias: Tensor | None = None,
    proj_bias: Tensor | None = None,
    logit_scale: Tensor | None = None,
    training: bool = True,
    *,
    head_dim: int,
) -> Tensor:
    """Attention within shifted windows (Liu et al. 2021, sections 3.2; version 2: 2022, section 3.3), in 2-D or 3-D.

    Args:
        input: (batch, *size, channels), with one or more spatial sizes.
        qkv_weight: (3 * num_heads * head_dim, channels).
        proj_weight: (channels out, num_heads * head_dim).
        relative_position_bias: (1, num_heads, tokens, tokens), with the tokens of one window.
        window_size: of each spatial dim; the input is padded with zeros to whole windows.
        shift_size: how far windows are shifted along each dim; not where one window covers the dim (2-D only).
        logit_scale: (num_heads, 1, 1), for cosine attention, whose keys have no bias.
    """
    rank = len(window_size)
    size = input.shape[1:-1]
    padding = [(w - s % w) % w for s, w in zip(size, window_size, strict=True)]
    x = F.pad(input, (0, 0, *(p for pad in reversed(padding) for p in (0, pad))))
    padded = x.shape[1:-1]
    shift = [0 if rank == 2 and w >= s else d for s, w, d in zip(padded, window_size, shift_size, strict=True)]
    dims = tuple(range(1, rank + 1))
    if any(shift):
        x = torch.roll(x, [-d for d in shift], dims)
    windows = [s // w for s, w in zip(padded, window_size, strict=True)]
    tokens = math.prod(window_size)
    x = _partition(x, windows, window_size).reshape(-1, tokens, x.shape[-1])

    if logit_scale is not None and qkv_bias is not None:
        third = qkv_bias.shape[0] // 3
        qkv_bias = torch.cat([qkv_bias[:third], torch.zeros_like(qkv_bias[:third]), qkv_bias[2 * third :]])
    qkv = F.linear(x, qkv_weight, qkv_bias).reshape(*x.shape[:-1], 3, num_heads, head_dim).permute(2, 0, 3, 1, 4)
    q, k, v = qkv[0], qkv[1], qkv[2]
    if logit_scale is not None:
        scale = torch.clamp(logit_scale, max=math.log(100.0)).exp()
        scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * scale
    else:
        scores = (q * head_dim**-0.5) @ k.transpose(-2, -1)
    scores = scores + relative_position_bias
    if any(shift):
        mask = _shift_mask(scores, padded, window_size, shift)
        scores = (scores.reshape(-1, len(mask), *scores.shape[1:]) + mask[:, None]).flatten(0, 1)
    weights = F.dropout(torch.softmax(scores, -1), attention_dropout, training)
    x = F.linear((weights @ v).transpose(1, 2).flatten(2), proj_weight, proj_bias)
    x = F.dropout(x, dropout, training)

    x = _join(x.reshape(input.shape[0], *windows, *window_size, x.shape[-1]), rank)
    if any(shift):
        x = torch.roll(x, shift, dims)
    return x[(slice(None), *(slice(0, s) for s in size))].contiguous()


def _partition(x: Tensor, windows: Sequence[int], window_size: Sequence[int]) -> Tensor:
    """(batch, *size, ...) as (batch, *windows, *window_size, ...)."""
    rank = len(windows)
    sizes = [s for pair in zip(windows, window_size, strict=True) for s in pair]
    x = x.reshape(x.shape[0], *sizes, *x.shape[rank + 1 :])
    order = (0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2), *range(2 * rank + 1, x.dim()))
    return x.permute(order)


def _join(x: Tensor, rank: int) -> Tensor:
    """The inverse of `_partition`."""
    order = [0]
    for k in range(1, rank + 1):
        order += [k, k + rank]
    sizes = [x.shape[k] * x.shape[k + rank] for k in range(1, rank + 1)]
    return x.permute(*order, 2 * rank + 1).reshape(x.shape[0], *sizes, x.shape[-1])


def _shift_mask(like: Tensor, size: Sequence[int], window_size: Sequence[int], shift: Sequence[int]) -> Tensor:
    """-100 between tokens that only the cyclic shift brought into one window: (windows, tokens, tokens)."""
    region = like.new_zeros(tuple(size))
    for dim, (s, w, d) in enumerate(zip(size, window_size, shift, strict=True)):
        at = torch.arange(s, device=like.device)
        number = (at >= s - w).to(like.dtype) + (at >= s - d).to(like.dtype)
        region = region * 3 + number.view([-1 if k == dim else 1 for k in range(len(size))])
    windows = [s // w for s, w in zip(size, window_size, strict=True)]
    region = _partition(region[None], windows, window_size).reshape(-1, math.prod(window_size))
    apart = region[:, None] != region[:, :, None]
    return torch.zeros_like(apart, dtype=like.dtype).masked_fill(apart, -100.0)
