"""Transformers with latent attention, in one file that reads from top to bottom.

    I    a complete language model: pieces, attention (MHA, MLA, the output latent), block, options,
         Transformer, cache and generation. You can stop there.
    II   relatives of MLA (GTA, TPA, DeepSeek-V4's attention), and mixture of experts
    III  two other architectures: encoder-decoder, grouped latents
    IV   initial weights, counting of FLOPs and cache, kernels that are faster than torch's, checks
         of options, and the tables in which you name an attention or an architecture of your own

Names that Part I uses and does not define are in Part IV; MoE and index_losses are in Part II.

Symbols in shape comments:

    B  sequences                T  new tokens (queries)      S  tokens attended to (keys and values)
    D  n_embd                   V  vocab_size                L  kv_latent, width of a latent
    H  n_head, Hkv n_kv_head    d  head_dim, dv of values    r  rope_dims
    R  rank of an output latent, or of another factorised matrix
    n  kv_branches, latents that a head reads              g  kv_groups of heads with own latents
    N  rows multiplied by the vocabulary matrix, M of them per sequence in masked-language modelling

Papers: MHA, Vaswani et al. 2017; RoPE, Su et al. 2021 (arXiv 2104.09864); grouped queries, Ainslie
et al. 2023 (2305.13245); MLA, DeepSeek-V2 (2405.04434, section 2.1) and DeepSeek-V3 (2412.19437,
section 2.1.1). Each relative of MLA names its own paper.
"""

import math
import re
import sys
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import chain
from types import UnionType
from typing import Annotated, Literal, NamedTuple, Union, get_args, get_origin

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

# ==================================================================================================
# Part I: a complete language model
# --------------------------------------------------------------------------------------------------
# pieces: norms, matrices, rotary positions, softmax attention


class RMSNorm(nn.RMSNorm):
    """RMSNorm. The result has the precision of the input.

    latent_of: the width that a latent replaces, if this norm is for a latent (see init_weights).
    n_parts: the input is this many vectors of `width` side by side, each normed separately.
    """

    def __init__(self, width, eps=1e-6, latent_of=None, n_parts=1):
        super().__init__(width, eps)
        self.latent_of, self.n_parts = latent_of, n_parts
        self.weight = nn.Parameter(torch.ones(n_parts * width))

    def forward(self, x):
        gain = self.weight.to(x.dtype)  # the fused kernel wants one precision
        if self.n_parts == 1:
            return F.rms_norm(x, self.normalized_shape, gain, self.eps).type_as(x)
        parts = x.unflatten(-1, (self.n_parts, -1))  # (..., n_parts, width)
        parts = F.rms_norm(parts, self.normalized_shape, eps=self.eps).flatten(-2)
        return (parts * gain).type_as(x)


def make_norm(config, width):
    if config.norm == 'rms':
        return RMSNorm(width, config.norm_eps)
    return nn.LayerNorm(width, eps=1e-5, bias=False)


class Dropout(nn.Dropout):
    def forward(self, x):
        return dropout(x, self.p) if self.training else x


def identity(x):
    """Stands where there is no norm or dropout; as a module it would slow decoding down."""
    return x


def make_dropout(p):
    return Dropout(p) if p else identity


class Linear(nn.Linear):
    """nn.Linear, with what init_weights needs to know about it.

    residual_out: its output is added to the residual stream, so it starts smaller.
    init_fan_in: it is the second of two factors of a matrix, with no norm in between. With
      scale_latents it starts with variance 1/init_fan_in, so the product is as large as the first.
    n_groups: block-diagonal. Each group of inputs has its own outputs.
    """

    def __init__(self, n_in, n_out, bias=False, residual_out=False, init_fan_in=None, n_groups=1):
        super().__init__(n_in // n_groups, n_out, bias=bias)
        self.residual_out, self.init_fan_in, self.n_groups = residual_out, init_fan_in, n_groups

    def reset_parameters(self):
        if self.weight.numel():  # torch warns of a matrix without elements, which MLA may have
            super().reset_parameters()

    def forward(self, x):
        if self.n_groups == 1:
            return super().forward(x)
        return grouped_linear(x, self.weight, self.n_groups)


def grouped_linear(x, weight, n_groups):
    """x (..., n_in), weight (n_out, n_in / n_groups) -> (..., n_out), a block-diagonal product."""
    x, weight = x.unflatten(-1, (n_groups, -1)), weight.unflatten(0, (n_groups, -1))
    return torch.einsum('...gi,goi->...go', x, weight).flatten(-2)


def rope_table(length, rope_dims, theta, factor=1.0, trained_length=None, turns=(32, 1)):
    """Cosines and sines, (2, length, rope_dims/2): at each position, pair i is rotated by the angle
    position * theta^(-2i/rope_dims) (RoFormer, section 3.2.2). None if rope_dims is 0. factor
    divides the angles, so that longer sequences stay within the angles seen in training. With
    trained_length (YaRN) it divides only those of slowly rotating pairs, which yarn_share (Part IV)
    chooses by `turns`."""
    if not rope_dims:
        return None
    frequency = theta ** (-torch.arange(0, rope_dims, 2, dtype=torch.float64) / rope_dims)
    share = yarn_share(rope_dims, theta, trained_length, turns) if trained_length else 1.0
    frequency = frequency * (1 - share + share / factor)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    return torch.stack((angle.cos(), angle.sin())).float()


def rotate(x, table):
    """Rotates the first rope_dims dimensions of x (..., T, d) by the last T rows of a rotary table.
    Dimension i forms a pair with i + rope_dims/2."""
    # the table is float32 even under autocast: in bfloat16 neighbours would share an angle
    cos, sin = table[:, table.size(1) - x.size(-2):].unbind()
    half = cos.size(-1)
    a, b, rest = x.split((half, half, x.size(-1) - 2 * half), dim=-1)
    a, b = a * cos - b * sin, b * cos + a * sin
    return torch.cat((a.type_as(x), b.type_as(x), rest), dim=-1)


def split_heads(x, n_head):
    d = x.size(-1) // n_head  # 0 if all of a key is rotated and shared
    return x.unflatten(-1, (n_head, d)).transpose(1, 2)  # (B, T, H*d) -> (B, H, T, d)


def join_heads(y):
    return y.transpose(1, 2).flatten(2)  # (B, H, T, dv) -> (B, T, H*dv)


def attend(q, k, v, causal=False, mask=None, window=None, **options):
    """Softmax attention: q (B, H, T, d), k (B, Hkv, S, d), v (B, Hkv, S, dv) -> (B, T, H*dv).

    causal: the T queries are the last T of the S positions, and see nothing later.
    window: a causal query sees only the last `window` keys, its own included; None = all.
    mask: (B, S) bool, True = visible; or 4-D, broadcast to (B, H, T, S), bool or, if T = 1 or not
      causal, additive.
    options: scale, dropout_p and sink of softmax_attention (Part IV), which is
      F.scaled_dot_product_attention, or what is faster on a CPU.
    """
    T, S = q.size(2), k.size(2)
    if window is not None and T + window - 1 < S:  # no query sees the keys before these
        S = T + window - 1
        k, v, mask = k[:, :, -S:], v[:, :, -S:], mask if mask is None else mask[..., -S:]
    if mask is not None and mask.dim() == 2:
        mask = mask[:, None, None, :]  # (B, S) -> (B, 1, 1, S)
    windowed = window is not None and window < S
    is_causal = causal and T > 1
    if is_causal and (T < S or windowed or mask is not None):
        # is_causal would take the queries for the first T positions
        visible = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
        visible = visible.triu(S - T - window + 1) if windowed else visible
        is_causal, mask = False, visible if mask is None else visible & mask
    return join_heads(softmax_attention(q, k, v, mask, is_causal, **options))


# --------------------------------------------------------------------------------------------------
# attention


class Attention(nn.Module):
    """Base class of all attentions: queries, the softmax, the gate and the output projection.

    To add an attention, subclass this class or one below it and enter it in ATTENTIONS (Part IV):

    options   names of the BlockConfig fields that not every attention has, but this one does. One
              that DeepSeek-V3 lacks also goes into OURS of deepseek.py; one that differs between
              layers is set in `block_of`
    check     raises ConfigError on options that contradict each other
    __init__  builds the projections; `make_queries` and `make_output` build the first and the last
    forward   computes q, k and v, stores in the cache what it needs of them, and returns
              self.output(self.attend(q, k, v, key_mask), x)

    Everything else then works: every architecture, FLOPs, cache bytes, initial weights, optimizer
    groups, checkpoints. All attentions have these options:

    o_latent  an output latent (MLA-o), see OutputLatent
    window    a causal query sees only the last `window` tokens; only V4's cache forgets the others
    gate      the output of the heads is multiplied by sigmoid(gate_proj(x)), element by element
              (arXiv 2505.06708)
    sink      one learned logit per head in the denominator of the softmax (gpt-oss, 2508.10925)
    """

    options = ()

    def __init__(self, config, kv_width=None):
        """config: a BlockConfig, see "options" below. kv_width: width of x_kv, if it differs from
        that of x."""
        super().__init__()
        self.kv_width = kv_width or config.n_embd
        self.n_head, self.head_dim = config.n_head, config.head_dim
        self.v_head_dim, self.rope_dims = config.v_head_dim or config.head_dim, config.rope_dims
        self.n_softmax = config.n_head * config.kv_branches  # attention maps; n per head in MLRA
        self.causal, self.window = config.causal, config.window
        self.dropout = config.attention_dropout
        self.scale = config.softmax_factor * config.head_dim ** -0.5
        v_width = self.n_head * self.v_head_dim
        self.gate_proj = Linear(config.n_embd, v_width) if config.gate else None
        self.sink = nn.Parameter(torch.zeros(self.n_softmax)) if config.sink else None

    @classmethod
    def check(cls, config):
        pass

    def make_queries(self, config, bias=False):
        """The query projection: one matrix, or two with a normed latent in between."""
        width, self.q_latent = self.n_head * self.head_dim, config.q_latent
        if self.q_latent:
            self.q_a_proj = Linear(config.n_embd, self.q_latent)
            self.q_a_norm = RMSNorm(self.q_latent, latent_of=config.n_embd)
            self.q_b_proj = Linear(self.q_latent, width, bias)
        else:
            self.q_proj = Linear(config.n_embd, width, bias)

    def queries(self, x):
        """x (B, T, D) -> queries of all heads (B, H, T, d)."""
        q = self.q_b_proj(self.q_a_norm(self.q_a_proj(x))) if self.q_latent else self.q_proj(x)
        return split_heads(q, self.n_head)

    def make_output(self, config, bias=False):
        v_width = self.n_head * self.v_head_dim
        if config.o_latent:
            self.o_proj = OutputLatent(self.n_head, v_width, config.o_latent, config.n_embd,
                                       config.o_norm, bias, config.o_groups)
        else:
            self.o_proj = Linear(v_width, config.n_embd, bias, residual_out=True)

    def output(self, y, x):
        """y (B, T, H*dv), the heads' outputs, and x (B, T, D), the layer's input -> (B, T, D)."""
        if self.gate_proj is not None:
            y = y * torch.sigmoid(self.gate_proj(x))
        return self.o_proj(y)

    def attend(self, q, k, v, mask=None):
        """q (B, H, T, d), k (B, Hkv, S, d), v (B, Hkv, S, dv) -> (B, T, H*dv)."""
        return attend(q, k, v, self.causal, mask, self.window, scale=self.scale, sink=self.sink,
                      dropout_p=self.dropout if self.training else 0.0)

    def forward(self, x, x_kv=None, rope=None, rope_kv=None, key_mask=None, cache=None,
                scratch=None):
        """x (B, T, D), the queries' tokens -> (B, T, D).

        x_kv: the tokens of keys and values (B, S, kv_width), if they are not x.
        rope: the rotary table up to the last position of x, or None; rope_kv: that of x_kv, if its
          positions differ.
        key_mask: (B, S) bool, True = a real token.
        cache: if given, x and x_kv hold the new tokens alone. cache.extend(self, ...) appends
          what is computed from them and returns that of all tokens so far.
        scratch: a dict that the layers of one forward pass share. A layer may leave something for
          later layers there, or an auxiliary loss (see V4). Both stacks of an encoder-decoder and
          its cross-attentions share one dict, and so do all levels of grouped latents: use a key
          that tells them apart.
        """
        raise NotImplementedError


class MHA(Attention):
    """Multi-head attention. With n_kv_head < n_head, grouped-query attention; with n_kv_head=1,
    multi-query attention. With q_latent and n_kv_head=1, multi-matrix factorisation attention (MFA,
    arXiv 2412.19255), whose heads can be many and wide because queries go through a latent.

    The cache holds 2 Hkv d elements per token.
    """

    options = ('n_kv_head', 'q_latent', 'qk_norm', 'bias')

    def __init__(self, config, kv_width=None):
        super().__init__(config, kv_width)
        self.n_kv_head = config.n_kv_head or config.n_head
        self.make_queries(config, config.bias)
        self.k_proj = Linear(self.kv_width, self.n_kv_head * self.head_dim, config.bias)
        self.v_proj = Linear(self.kv_width, self.n_kv_head * self.head_dim, config.bias)
        self.q_norm = RMSNorm(self.head_dim) if config.qk_norm else identity
        self.k_norm = RMSNorm(self.head_dim) if config.qk_norm else identity
        self.make_output(config, config.bias)

    @classmethod
    def check(cls, config):
        require_divisible(config, 'n_head', 'n_kv_head')

    def forward(self, x, x_kv=None, rope=None, rope_kv=None, key_mask=None, cache=None,
                scratch=None):
        x_kv = x if x_kv is None else x_kv
        q = self.q_norm(self.queries(x))  # (B, H, T, d)
        k = self.k_norm(split_heads(self.k_proj(x_kv), self.n_kv_head))  # (B, Hkv, S, d)
        v = split_heads(self.v_proj(x_kv), self.n_kv_head)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope if rope_kv is None else rope_kv)
        if cache is not None:
            k, v = cache.extend(self, k, v)
        return self.output(self.attend(q, k, v, key_mask), x)


class MLA(Attention):
    """Multi-head latent attention (DeepSeek-V2, section 2.1). Keys and values of all heads come
    from one normed latent of kv_latent elements per token, queries from one of q_latent (None:
    straight from x). With o_latent it is MLA-o. DeepSeek-V3: head_dim=192, of which rope_dims=64,
    v_head_dim=128, q_latent=1536, kv_latent=512, rope_key='shared'.

        x -- q_a_proj -> norm -> q_b_proj -> rotate ------> q of each head
        x -- kv_a_proj -> norm -> latent (cached) -+- k_b_proj -> k
                                                   +- v_b_proj -> v
        x -- k_rope_proj -> rotate (cached) ------> the rotated part of k, if rope_key='shared'

    The rotated dimensions come first in a head. rope_key='shared' (DeepSeek): all heads share one
    rotated key of rope_dims, which is not normed; each head has head_dim - rope_dims key dimensions
    of its own. 'per_head': the first rope_dims key dimensions of each head are rotated.

    kv_groups=g is GLA (arXiv 2505.21487): g latents, each with its own norm, the i-th for the i-th
    H/g heads. kv_branches=n is MLRA (2603.02188): each head reads n latents by n attentions with
    the same query; their outputs are added and divided by sqrt(n). Combined, there are n*g latents,
    and a head reads n of them.

    The cache holds the latents and the shared key, n g L (+ r) elements per token, and nothing per
    head. A decoding step of one token makes no keys or values from it, see `absorbed`; only with
    'per_head' it makes the rotated key dimensions again for all S tokens, S n H r L multiply-adds.
    So what changes k or v in `forward` must also change `absorbed`.
    """

    options = ('q_latent', 'kv_latent', 'kv_groups', 'kv_branches', 'rope_key', 'v_head_dim')

    def __init__(self, config, kv_width=None):
        super().__init__(config, kv_width)
        self.shared_key, self.kv_latent = config.rope_key == 'shared', config.kv_latent
        self.n_branches = config.kv_branches
        self.n_latents = config.kv_groups * config.kv_branches
        # of each head's own key: none if all dimensions are rotated and shared
        k_head_dim = self.head_dim - self.rope_dims if self.shared_key else self.head_dim
        self.make_queries(config)
        latents = self.n_latents * self.kv_latent  # side by side
        self.kv_a_proj = Linear(self.kv_width, latents)
        self.kv_a_norm = RMSNorm(self.kv_latent, latent_of=self.kv_width, n_parts=self.n_latents)
        self.k_b_proj = Linear(latents, self.n_softmax * k_head_dim, n_groups=self.n_latents)
        self.v_b_proj = Linear(latents, self.n_softmax * self.v_head_dim, n_groups=self.n_latents)
        if self.shared_key:
            self.k_rope_proj = Linear(self.kv_width, self.rope_dims)
        self.make_output(config)

    @classmethod
    def check(cls, config):
        require(config, 'kv_latent', 'the width of its key-value latent')
        require_divisible(config, 'n_head', 'kv_groups')
        if config.rope_key == 'shared' and not config.rope_dims:
            raise ConfigError("rope_key='shared' needs rope_dims from 2 to head_dim = "
                              f'{config.head_dim}: the shared key has as many dimensions')

    def forward(self, x, x_kv=None, rope=None, rope_kv=None, key_mask=None, cache=None,
                scratch=None):
        x_kv = x if x_kv is None else x_kv
        rope_kv = rope if rope_kv is None else rope_kv
        q = self.queries(x)  # (B, H, T, d)
        q = q if rope is None else rotate(q, rope)
        if self.n_branches > 1:  # MLRA: the same query for each branch
            q = q.repeat(1, self.n_branches, 1, 1)  # (B, n*H, T, d), branch by branch
        latent = self.kv_a_norm(self.kv_a_proj(x_kv))  # (B, S, n*g*L)
        k_rope = latent[..., :0]  # (B, S, r or 0)
        if self.shared_key:
            k_rope = rotate(self.k_rope_proj(x_kv), rope_kv)
        if cache is not None:  # one tensor, which `absorbed` uses as its keys
            cached, = cache.extend(self, torch.cat((k_rope, latent), dim=-1))
            k_rope, latent = cached.split((k_rope.size(-1), latent.size(-1)), dim=-1)
        if cache is not None and x.size(1) == 1:
            y = self.absorbed(q, cached, k_rope, latent, rope_kv)
        else:
            k = split_heads(self.k_b_proj(latent), self.n_softmax)  # (B, n*H, S, d or d-r)
            v = split_heads(self.v_b_proj(latent), self.n_softmax)  # (B, n*H, S, dv)
            if self.shared_key:
                k = torch.cat((k_rope[:, None].expand(-1, self.n_softmax, -1, -1), k), dim=-1)
            elif rope is not None:
                k = rotate(k, rope_kv)
            y = self.attend(q, k, v, key_mask)
        if self.n_branches > 1:  # the branches are added up, (B, T, n*H*dv) -> (B, T, H*dv)
            y = y.unflatten(-1, (self.n_branches, -1)).sum(dim=-2) * self.n_branches ** -0.5
        return self.output(y, x)

    def absorbed(self, q, cached, k_rope, latent, rope_kv):
        """One decoding step without keys and values per head: W^UK (k_b_proj) multiplies the query
        and W^UV (v_b_proj) the attention's output, instead of all S latents (DeepSeek-V2, section
        2.1.2).

        What remains is multi-query attention (grouped-query, if there are several latents) of
        queries [q_rope | q W^UK] to keys [k_rope | latent]. The keys also serve as values, and of
        the result only the last kv_latent columns are kept. Causal models take no key_mask.
        q (B, n*H, 1, d), cached (B, S, r + n*g*L) = [k_rope | latent] -> (B, 1, n*H*dv).
        """
        w_uk = self.k_b_proj.weight  # (n*H * d or d-r, L)
        w_uk = w_uk.unflatten(0, (self.n_softmax, len(w_uk) // self.n_softmax))
        w_uv = self.v_b_proj.weight.unflatten(0, (self.n_softmax, -1))  # (n*H, dv, L)
        q_rope, q = q.split((self.rope_dims, self.head_dim - self.rope_dims), dim=-1)
        mask = None
        if self.rope_dims and not self.shared_key:
            # each head has rotated keys of its own, whose scores are added as a mask
            w_rope, w_uk = w_uk.split((q_rope.size(-1), q.size(-1)), dim=1)
            k = grouped_linear(latent, w_rope.flatten(0, 1), self.n_latents)
            k = rotate(split_heads(k, self.n_softmax), rope_kv)  # (B, n*H, S, r)
            mask, q_rope = q_rope @ k.mT * self.scale, q_rope[..., :0]  # (B, n*H, 1, S)
        # heads first: a head's matrix is read once for all sequences, (n*H, B, d) @ (n*H, d, L)
        q = (q[:, :, 0].transpose(0, 1) @ w_uk).transpose(0, 1)[:, :, None]  # (B, n*H, 1, L)
        if self.n_latents == 1:
            keys = cached[:, None]  # (B, 1, S, r + L)
        else:
            keys = split_heads(latent, self.n_latents)  # (B, n*g, S, L)
            k_rope = k_rope[:, None].expand(-1, self.n_latents, -1, -1)
            keys = torch.cat((k_rope, keys), dim=-1)
        y = self.attend(torch.cat((q_rope, q), dim=-1), keys, keys, mask)
        y = y.unflatten(-1, (self.n_softmax, -1))[:, 0, :, -self.kv_latent:]  # (B, n*H, L)
        y = y.transpose(0, 1) @ w_uv.mT  # (n*H, B, dv)
        return y.transpose(0, 1).flatten(1)[:, None]


class OutputLatent(nn.Module):
    """The output projection of MLA-o, (B, T, H*dv) -> (B, T, D): W^O as a product of two matrices,
    from all heads into one latent of `rank` elements, and from that to the residual stream.

    n_groups=G (DeepSeek-V4, arXiv 2606.19348): G groups of heads, each with its own latent; the
    second matrix reads the G latents together.
    norm: 'none'; 'sum', RMSNorm of all latents together; 'head', RMSNorm of each head's
    contribution to its latent, with a gain per head, then their sum divided by the square root of
    their number.
    """

    def __init__(self, n_head, n_in, rank, n_out, norm='none', bias=False, n_groups=1):
        super().__init__()
        self.n_head, self.norm, self.n_groups = n_head, norm, n_groups
        self.o_a_proj = Linear(n_in, n_groups * rank, n_groups=n_groups)
        self.o_b_proj = Linear(n_groups * rank, n_out, bias, residual_out=True,
                               init_fan_in=rank if norm == 'none' else None)
        if norm == 'head':
            self.gain = nn.Parameter(torch.ones(n_head, rank))
        self.o_norm = RMSNorm(n_groups * rank) if norm == 'sum' else identity

    def forward(self, y):
        if self.norm != 'head':
            return self.o_b_proj(self.o_norm(self.o_a_proj(y)))
        G, per_group = self.n_groups, self.n_head // self.n_groups
        y = y.unflatten(-1, (G, per_group, -1))  # (B, T, G, H/G, dv)
        weight = self.o_a_proj.weight.unflatten(1, (per_group, -1)).unflatten(0, (G, -1))
        latent = torch.einsum('btghd,grhd->btghr', y, weight)
        gain = self.gain.unflatten(0, (G, per_group))  # (G, H/G, R)
        latent = F.rms_norm(latent, latent.shape[-1:], eps=1e-6) * gain
        latent = latent.sum(dim=3) / math.sqrt(per_group)  # (B, T, G, H/G, R) -> (B, T, G, R)
        return self.o_b_proj(latent.flatten(2))


# --------------------------------------------------------------------------------------------------
# block


def make_linear(n_in, n_out, bias, rank=None, inner_norm=False, residual_out=False):
    """One matrix; or, with a rank, two of that rank, with an RMSNorm in between if inner_norm."""
    if rank is None:
        return Linear(n_in, n_out, bias, residual_out)
    norm = [RMSNorm(rank, latent_of=n_in)] if inner_norm else []
    second = Linear(rank, n_out, bias, residual_out, init_fan_in=None if inner_norm else rank)
    return nn.Sequential(Linear(n_in, rank), *norm, second)


class MLP(nn.Module):
    """Feed-forward (B, T, D) -> (B, T, D). gelu: out(gelu(in x)); relu2: out(relu(in x)^2); swiglu:
    out(silu(in x) * up x). With mlp_rank each matrix is a product of two, and those that read x
    have an RMSNorm in the middle."""

    def __init__(self, config):
        super().__init__()
        self.kind = config.mlp
        D, hidden, bias, rank = config.n_embd, config.mlp_hidden, config.mlp_bias, config.mlp_rank
        self.in_proj = make_linear(D, hidden, bias, rank, inner_norm=True)
        if self.kind == 'swiglu':
            self.up_proj = make_linear(D, hidden, bias, rank, inner_norm=True)
        self.out_proj = make_linear(hidden, D, bias, rank, residual_out=True)

    def forward(self, x):
        h = self.in_proj(x)  # (B, T, hidden)
        if self.kind == 'gelu':
            h = F.gelu(h)
        elif self.kind == 'relu2':
            h = F.relu(h).square()
        else:
            h = F.silu(h) * self.up_proj(x)
        return self.out_proj(h)


class Block(nn.Module):
    """Pre-norm residual block: x += attention(norm x), x += mlp(norm x)."""

    def __init__(self, config, kv_width=None):
        super().__init__()
        self.attn_norm = make_norm(config, config.n_embd)
        self.attn = make_attention(config, kv_width)
        self.mlp_norm = make_norm(config, config.n_embd)
        self.mlp = MoE(config) if config.mlp == 'moe' else MLP(config)
        self.dropout = make_dropout(config.dropout)

    def forward(self, x, **context):
        """context: rope, key_mask, cache and scratch, as in Attention.forward."""
        x = x + self.dropout(self.attn(self.attn_norm(x), **context))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


# --------------------------------------------------------------------------------------------------
# options: --help shows the comment after a field, and its type says which values it takes


class ConfigError(ValueError):
    """Options with wrong values, or that contradict each other. The message says what to change."""


class Range(NamedTuple):
    """The numbers that an option takes: least <= number, above < number < below."""

    least: float = -math.inf
    above: float = -math.inf
    below: float = math.inf

    def allows(self, number):
        return self.least <= number and self.above < number < self.below

    def __str__(self):
        words = (('>=', self.least), ('>', self.above), ('<', self.below))
        return ' and '.join(f'{word} {limit}' for word, limit in words if math.isfinite(limit))


Count = Annotated[int, Range(least=1)]
CountOrZero = Annotated[int, Range(least=0)]
Positive = Annotated[float, Range(above=0)]
NotNegative = Annotated[float, Range(least=0)]
Share = Annotated[float, Range(least=0, below=1)]
OpenShare = Annotated[float, Range(above=0, below=1)]


@dataclass
class BlockConfig:
    """Options of a block"""

    n_head: Count = 8  # attention heads
    n_embd: Count = 256  # width of the residual stream
    head_dim: Count | None = None  # width of a query and key head; None = n_embd / n_head
    causal: bool = True  # decoder; False = encoder, trained by masked-language modelling
    dropout: Share = 0.0  # on the embeddings and on the output of each branch
    attention_dropout: Share | None = None  # on the attention weights; None = dropout
    bias: bool = False  # mha: biases in its projections
    attention: str = 'mha'  # mha, mla, gta, tpa, v4, or another key of model.ATTENTIONS
    n_kv_head: Count | None = None  # mha, gta: key and value heads (grouped); None = n_head
    qk_norm: bool = False  # mha: RMSNorm on the queries and keys of each head
    q_latent: Count | None = None  # mha, mla, v4: width of the query latent; None = straight from x
    kv_latent: Count | None = None  # mla: width of a key-value latent
    kv_groups: Count = 1  # mla: latents, each for its own n_head / kv_groups heads (GLA)
    kv_branches: Count = 1  # mla: latents per head, each read by an attention of its own (MLRA)
    v_head_dim: Count | None = None  # mla: width of a value head; None = head_dim
    rope_key: Literal['per_head', 'shared'] = 'per_head'  # mla: a rotated key per head, or for all
    q_rank: Count | None = None  # tpa: rank of the queries; None = straight from x
    kv_rank: Count | None = None  # tpa: rank of the keys, and of the values
    window: Count | None = None  # causal: tokens that a query sees, its own included; None = all
    layer_kinds: str = 'window'  # v4: of each layer in turn, as 'window csa hca': see class V4
    csa_group: Count = 4  # v4: tokens per entry in csa layers
    hca_group: Count = 128  # v4: tokens per entry in hca layers
    index_topk: Count | None = None  # v4: entries that a query reads in csa layers; None = all
    index_n_head: Count = 4  # v4: heads of the indexer, which chooses these entries
    index_head_dim: Count = 32  # v4: width of a head of the indexer
    index_loss_coeff: Positive = 1.0  # v4: weight of the indexer's loss
    gate: bool = False  # multiply the heads' outputs by a sigmoid of the layer's input
    sink: bool = False  # a learned logit per head in the denominator of the softmax
    o_latent: Count | None = None  # width of the output latent (MLA-o); None = one output matrix
    o_norm: Literal['none', 'sum', 'head'] = 'none'  # norm of the output latent
    o_groups: Count = 1  # output latents, each for its own n_head / o_groups heads
    softmax_factor: Positive = 1.0  # multiplies the attention scores q.k / sqrt(head_dim)
    rope_dims: CountOrZero = 0  # rotated dimensions per head, its first ones; 0 = none
    norm: Literal['layer', 'rms'] = 'layer'  # LayerNorm without bias, or RMSNorm
    norm_eps: Positive = 1e-6  # rms: added to the mean square, except in norms inside of attentions
    mlp: Literal['gelu', 'swiglu', 'relu2', 'moe'] = 'gelu'  # feed-forward; moe = experts
    mlp_hidden: Count | None = None  # hidden width of the feed-forward; None = 4 n_embd
    mlp_bias: bool = False  # biases in the feed-forward
    mlp_rank: Count | None = None  # each feed-forward matrix as two of this rank; None = dense
    n_routed_experts: Count | None = None  # moe: experts to choose from
    n_experts_per_tok: Count = 2  # moe: experts chosen per token
    n_shared_experts: CountOrZero = 1  # moe: experts for every token
    expert_hidden: Count | None = None  # moe: hidden width of an expert
    n_group: Count = 1  # moe: groups of experts
    topk_group: Count = 1  # moe: groups that the experts of one token may come from
    routed_scaling: Positive = 1.0  # moe: factor on the output of the routed experts
    router: Literal['sigmoid', 'softmax'] = 'sigmoid'  # moe: DeepSeek-V3's, or V2's; see MoE
    balance_rate: NotNegative = 0.001  # moe: step of an expert's bias after each optimizer step

    def __post_init__(self):
        check_options(self)
        if self.head_dim is None:
            require_divisible(self, 'n_embd', 'n_head', 'change one, or set head_dim')
            self.head_dim = self.n_embd // self.n_head
        if self.mlp_hidden is None:
            self.mlp_hidden = 4 * self.n_embd
        if self.attention_dropout is None:
            self.attention_dropout = self.dropout
        if self.rope_dims % 2 or self.rope_dims > self.head_dim:
            raise ConfigError(f'rope_dims={self.rope_dims}: must be an even number <= '
                              f'head_dim={self.head_dim} (n_embd / n_head, unless set)')
        if self.window and not self.causal:
            raise ConfigError(f'window={self.window}: only causal attention has a window; set '
                              'causal=True, or leave window out')
        require_divisible(self, 'n_head', 'o_groups')
        if self.mlp == 'moe':
            MoE.check(self)
        ATTENTIONS[self.attention].check(self)

    def dense_mlp(self):
        """The same block with a SwiGLU of mlp_hidden instead of experts."""
        return self if self.mlp != 'moe' else with_defaults(self, MOE_OPTIONS, mlp='swiglu')

    def dense(self):
        """The same block with plain attention, no window, and undecomposed matrices."""
        names = *foreign_options('mha'), 'q_latent', 'window', 'o_latent', 'o_norm', 'o_groups'
        return with_defaults(self.dense_mlp(), names, attention='mha', mlp_rank=None)


@dataclass
class ModelConfig(BlockConfig):
    """Options of every architecture, on top of those of its blocks"""

    vocab_size: Count = 50257  # rows of the embedding, special tokens included
    block_size: Count = 256  # longest sequence, tokens
    n_layer: Count = 6  # number of blocks
    rope_theta: Positive = 10000.0  # rotary base
    rope_factor: Annotated[float, Range(least=1)] = 1.0  # rotary angles are divided by this
    rope_trained_length: Count | None = None  # YaRN: original block_size; only slow angles divided
    rope_beta_fast: Positive = 32.0  # YaRN: turns in that length from which nothing is divided
    rope_beta_slow: Positive = 1.0  # YaRN: turns up to which all is divided
    final_norm: bool = True  # a norm before the vocabulary
    vocab_rank: Count | None = None  # embedding and head of this rank; None = dense
    tie_embeddings: bool = True  # the head is the transposed embedding
    init_std: Positive = 0.02  # standard deviation of the initial weights
    zero_init_residual: bool = False  # projections into the residual stream start at zero
    scale_latents: bool = False  # what goes through a latent starts as large as without it

    derived = ()  # options that an architecture sets itself
    # not fields: only TransformerConfig has these options, but LanguageModel reads them in all
    learned_positions = subtract_next_position = False

    def __post_init__(self):
        super().__post_init__()
        if self.vocab_rank and not self.tie_embeddings:
            raise ConfigError('vocab_rank shares its matrices with the head: it needs '
                              'tie_embeddings=True')

    def block(self, **changes):
        """A BlockConfig with the options of this config, and changes."""
        return BlockConfig(**{option.name: getattr(self, option.name)
                              for option in fields(BlockConfig)} | changes)

    def options(self):
        """All options as a dict, which make_model takes."""
        return {option.name: getattr(self, option.name) for option in fields(self)
                if option.name not in self.derived}


@dataclass
class TransformerConfig(ModelConfig):
    """One stack of blocks: a decoder (causal) or an encoder"""

    n_dense: CountOrZero = 0  # first layers that keep mha and dense feed-forwards
    first_k_dense: CountOrZero = 0  # moe: first layers with a swiglu of mlp_hidden instead
    learned_positions: bool = True  # a learned embedding of the position
    subtract_next_position: bool = False  # causal: subtract it from the last hidden state

    def __post_init__(self):
        super().__post_init__()
        require_at_most(self, 'n_dense', 'n_layer')
        if self.subtract_next_position and not (self.learned_positions and self.causal):
            raise ConfigError('subtract_next_position subtracts the embedding of the next position '
                              'from the last hidden state: it needs learned_positions=True and '
                              'causal=True')
        n_blocks = max(self.n_layer, getattr(self, 'n_decoder_layer', None) or 0)
        kinds = (self.layer_kinds.split() * n_blocks)[self.n_dense:n_blocks]
        for kind in {'csa', 'hca'} & {*kinds}:
            require_at_most(self, f'{kind}_group', 'block_size')
        if self.index_topk and 'csa' not in kinds:
            raise ConfigError('index_topk chooses entries in csa layers: '
                              f'layer_kinds={self.layer_kinds!r} has none')

    def block_of(self, layer):
        if layer < self.n_dense:
            return self.block().dense()
        kinds = self.layer_kinds.split()
        block = self.block(layer_kinds=kinds[layer % len(kinds)])
        return block.dense_mlp() if layer < self.first_k_dense else block


# --------------------------------------------------------------------------------------------------
# language model


def plain_cross_entropy(x, weight, targets):
    """What linear_cross_entropy (Part IV) computes in training, but holding all N x V logits at
    once: x (N, D), weight (V, D), targets (N,) -> {'loss': mean cross-entropy in nats}. Start from
    this for a loss of your own, and call yours in LanguageModel.forward if self.training:
    validation losses compare as long as evaluation keeps linear_cross_entropy."""
    logits = F.linear(x, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return {'loss': F.cross_entropy(logits, targets, ignore_index=-1)}


class LanguageModel(nn.Module):
    """What every architecture shares: embedding, final norm, head, loss, and generation. A subclass
    builds its blocks, runs them in `body`, and calls init_weights (Part IV): matrices start as
    N(0, init_std), projections into the residual stream divided by the root of their number."""

    def __init__(self, config):
        super().__init__()
        c, D = config, config.n_embd
        self.config = c
        self.tok_emb = nn.Embedding(c.vocab_size, c.vocab_rank or D)
        if c.vocab_rank:
            self.vocab_proj = Linear(c.vocab_rank, D, init_fan_in=c.vocab_rank)
        self.dropout = make_dropout(c.dropout)
        self.norm = make_norm(c, D) if c.final_norm else identity
        if not c.tie_embeddings:
            self.lm_head = Linear(D, c.vocab_size)
        if c.learned_positions:  # one more position, if the next one is to be subtracted
            self.pos_emb = nn.Embedding(c.block_size + c.subtract_next_position, D)

    def add_rope(self, name, rope_dims, length, times=slice(None)):
        """Registers a rotary table of `length` positions, or of those at `times`, as a buffer that
        is not saved; None if rope_dims is 0."""
        c = self.config
        table = rope_table(length, rope_dims, c.rope_theta, c.rope_factor, c.rope_trained_length,
                           (c.rope_beta_fast, c.rope_beta_slow))
        self.register_buffer(name, None if table is None else table[:, times], persistent=False)

    def body(self, x, end, key_mask, cache):
        """Runs the blocks on embedded tokens x (B, T, D), the last of which is at position end - 1.
        Returns (hidden states (B, T, D), aux_losses).

        aux_losses: {name: (scalar, coefficient)} of what is added to the training loss, and logged.
        A coefficient of 0 only logs it. Validation losses are always the cross-entropy alone.
        """
        raise NotImplementedError

    def hidden(self, idx, key_mask=None, cache=None):
        """idx (B, T) int64 -> (final hidden states (B, T, D), aux_losses as in `body`).
        key_mask (B, T) bool, True = a real token; encoders only."""
        start = 0 if cache is None else cache.n_tokens
        end = start + idx.size(1)
        if cache is None and end > self.config.block_size:
            raise ValueError(f'{end} tokens, but block_size is {self.config.block_size}')
        if cache is not None and end > cache.length:
            raise ValueError(f'{end} tokens, but the cache has room for {cache.length}')
        if cache is not None and cache.batch != idx.size(0):
            raise ValueError(f'{idx.size(0)} sequences, but the cache was made for {cache.batch}')
        if key_mask is not None and self.config.causal:
            raise ValueError('a causal model takes no key_mask: give it sequences of one length')
        x = self.tok_emb(idx)
        # the residual stream keeps full precision, under autocast and with weights in bfloat16
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.config.vocab_rank:
            x = self.vocab_proj(x).type_as(x)
        if self.config.learned_positions:
            x = x + self.pos_emb.weight[start:end]
        x, aux_losses = self.body(self.dropout(x), end, key_mask, cache)
        if cache is not None:
            cache.n_tokens = end
        return self.norm(x), aux_losses

    def forward(self, idx, targets=None, positions=None, key_mask=None, cache=None):
        """idx (B, T) int64 -> logits (B, T, V); with targets, a dict of scalars in which `loss` is
        the one to minimise.

        targets: (B, T), -1 = not scored. positions (B, M): only these have logits, (B, M, V), and
        targets, (B, M). Without gradients the dict also has `accuracy`, the share of the scored
        targets that rank first. With a cache, idx holds the tokens that follow those in the cache,
        one or many.
        """
        x, aux_losses = self.hidden(idx, key_mask, cache)
        if self.config.subtract_next_position:
            end = idx.size(1) if cache is None else cache.n_tokens
            x = x - self.pos_emb.weight[end - idx.size(1) + 1:end + 1]
        if positions is not None:
            x = x.gather(1, positions[..., None].expand(-1, -1, x.size(-1)))  # -> (B, M, D)
        head = self.tok_emb.weight if self.config.tie_embeddings else self.lm_head.weight
        if self.config.vocab_rank:
            x = x @ self.vocab_proj.weight  # (B, T, D) -> (B, T, vocab_rank), as is the head
        if targets is None:
            return F.linear(x, head)
        out = linear_cross_entropy(x.flatten(0, 1), head, targets.flatten())
        if aux_losses and self.training:
            out.setdefault('cross_entropy', out['loss'])
            for name, (value, coefficient) in aux_losses.items():
                out[name] = value
                out['loss'] = out['loss'] + coefficient * value
        return out

    def n_params(self, positions=True):
        """Number of parameters; positions=False leaves learned positions out, as papers often do.
        """
        return sum(p.numel() for name, p in self.named_parameters()
                   if positions or name != 'pos_emb.weight')

    def init_cache(self, batch, length):
        """An empty cache for `batch` sequences of up to `length` tokens, at most block_size."""
        check_cache(self, length)
        return Cache(batch, length)

    def generate(self, idx, max_new_tokens, **sampling):
        """idx (B, T) -> (B, T + n), n <= max_new_tokens: the prompt, then what `stream` yields."""
        new = [token[:, None] for token in self.stream(idx, max_new_tokens, **sampling)]
        return torch.cat([idx, *new], dim=1)

    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, seed=None,
               stop=None, n_ids=None):
        """Yields the next token of each of the B sequences idx (B, T >= 1), as (B,) int64, until
        there are max_new_tokens, or until each sequence has had the token `stop`, which it then
        repeats. Call model.eval() first.

        The model sees the last block_size tokens. When the text outgrows them, every position
        changes with every token, and the whole window is computed again.
        temperature, top_k, top_p: see sample_token. n_ids: only ids below it are drawn. seed:
        sequence i draws with seed + i, so its text does not depend on the others; None = torch's
        generator.
        """
        B, T = idx.shape
        size, end = self.config.block_size, T + max_new_tokens
        u = uniform_numbers(B, max_new_tokens, seed).to(idx.device)  # (B, max_new_tokens)
        text = torch.cat((idx, idx.new_empty(B, max_new_tokens)), dim=1)
        done = torch.zeros(B, dtype=torch.bool, device=idx.device)
        cache = self.init_cache(B, min(size, end))
        for t in range(T, end):
            cache = cache if t <= size else None
            new = text[:, max(0, t - size):t] if cache is None else text[:, cache.n_tokens:t]
            last = idx.new_full((B, 1), new.size(1) - 1)  # the only position that needs logits
            with torch.inference_mode():  # `text`, made outside, can be used in training
                logits = self(new, positions=last, cache=cache)[:, 0, :n_ids]  # (B, n_ids)
                token = sample_token(logits, u[:, t - T], temperature, top_k, top_p)
                if stop is not None:
                    token = torch.where(done, stop, token)
                    done |= token == stop
                text[:, t] = token
            yield text[:, t]
            if stop is not None and done.all():
                return


class Transformer(LanguageModel):
    """One stack of blocks: a decoder with causal=True, otherwise an encoder.

        tokens -> embedding (+ position) -> block -> ... -> block -> norm -> head -> logits
    """

    def __init__(self, config):
        super().__init__(config)
        self.add_rope('rope', config.rope_dims, config.block_size)
        self.blocks = nn.ModuleList(Block(config.block_of(i)) for i in range(config.n_layer))
        init_weights(self)

    def body(self, x, end, key_mask, cache):
        rope, scratch = None if self.rope is None else self.rope[:, :end], {}
        for block in self.blocks:
            x = block(x, rope=rope, key_mask=key_mask, cache=cache, scratch=scratch)
        return x, index_losses(self.config, scratch)


# --------------------------------------------------------------------------------------------------
# cache and generation


class Cache:
    """What decoding keeps of earlier tokens: for each layer, buffers with room for `length` tokens,
    made when the layer first stores something. n_tokens: how many it holds, which the model counts
    after each call; set it back to forget the later ones (V4's only to 0, see extend_recent)."""

    def __init__(self, batch, length):
        self.batch, self.length, self.n_tokens = batch, length, 0
        self.buffers = {}  # {layer: its buffers, (B, ..., rows, width)}
        self.every = {}  # {layer: tokens per row}
        self.recent, self.recent_end = {}, {}  # of layers that only need the last tokens

    def extend(self, layer, *new, every=1):
        """Appends what a layer computed for new tokens, tensors (B, ..., T, width). Returns the
        tensors of all tokens so far, (B, ..., S, width). every: tokens per row; `new` then holds a
        row for each group of so many tokens that the new ones complete."""
        if layer not in self.buffers:
            self.every[layer] = every
            self.buffers[layer] = [x.new_empty(*x.shape[:-2], self.length // every, x.size(-1))
                                   for x in new]
        start, T = self.n_tokens // every, new[0].size(-2)
        for buffer, x in zip(self.buffers[layer], new):
            buffer.narrow(-2, start, T).copy_(x.detach())
        return [buffer.narrow(-2, 0, start + T) for buffer in self.buffers[layer]]

    def extend_recent(self, layer, n, *new):
        """The same for a layer that needs no more than the n tokens before the new ones: nothing
        else is kept, and n_tokens can only be set back to 0."""
        end, T = self.n_tokens + new[0].size(-2), new[0].size(-2)
        if self.n_tokens:
            if self.recent_end[layer] != self.n_tokens:
                raise ValueError(f'n_tokens={self.n_tokens}: this cache keeps only recent tokens, '
                                 'so it can be set back to 0 and nowhere else')
            new = [torch.cat(pair, dim=-2) for pair in zip(self.recent[layer], new)]
        self.recent[layer] = [x[..., max(0, x.size(-2) - n):, :].detach().clone() for x in new]
        self.recent_end[layer] = end
        return new

    def elements(self):
        """(elements per token, further elements that do not grow) of the cache of one sequence."""
        growing = sum(buffer.shape[:-2].numel() * buffer.size(-1) / self.every[layer]
                      for layer, buffers in self.buffers.items() for buffer in buffers)
        fixed = sum(x.numel() for tensors in self.recent.values() for x in tensors)
        return growing / self.batch, fixed // self.batch

    def n_bytes(self):
        tensors = chain(*self.buffers.values(), *self.recent.values())
        return sum(tensor.nbytes for tensor in tensors)


def check_cache(model, length):
    if not model.config.causal:
        raise ValueError('an encoder has nothing to cache: every token sees those that follow it')
    if length > model.config.block_size:
        raise ValueError(f'a cache of {length} tokens, but block_size is {model.config.block_size}')


def uniform_numbers(n_rows, n, seed=None):
    """Random numbers from 0 to 1, (n_rows, n). With a seed, row i comes from a generator with
    seed + i, the same on every device; without, from torch's own generator."""
    if seed is None:
        return torch.rand(n_rows, n)
    return torch.stack([torch.rand(n, generator=torch.Generator().manual_seed(seed + i))
                        for i in range(n_rows)])


def sample_token(logits, u, temperature=1.0, top_k=None, top_p=None):
    """logits (B, V), u (B,) in [0, 1) -> a token per row, (B,) int64: the one at which the
    cumulative probability passes u. (torch.multinomial would draw V random numbers per row, which
    costs a CPU more than a small model does.)

    temperature divides the logits; 0 takes the likeliest token. top_k: only the k likeliest tokens.
    top_p: only the likeliest tokens whose probabilities together reach p (nucleus, 1904.09751).
    """
    if temperature < 0 or top_p is not None and top_p > 1:
        raise ValueError(f'temperature={temperature}, top_p={top_p}: must be >= 0 and <= 1')
    if temperature < 1e-6:  # only the likeliest token is left, and float32 would overflow
        return logits.argmax(dim=-1)
    logits, order = logits.float() / temperature, None
    if top_k is not None or top_p is not None:
        k = min(top_k or logits.size(-1), logits.size(-1))
        logits, order = logits.topk(k, dim=-1)  # (B, k), the likeliest first
    sums = logits.softmax(dim=-1).cumsum(dim=-1)
    mass = sums[:, -1:]
    if top_p is not None:  # up to the first token with which the sum reaches top_p
        mass = sums.gather(1, torch.searchsorted(sums, mass * top_p))
    token = torch.searchsorted(sums, mass * u[:, None], right=True)  # (B, 1)
    return (token if order is None else order.gather(1, token))[:, 0]


# ==================================================================================================
# Part II: relatives of MLA, and experts
# --------------------------------------------------------------------------------------------------
# GTA, TPA


class GTA(Attention):
    """Grouped-tied attention (arXiv 2505.21487). Each group of heads has one vector of d elements
    as its value. Its key is r = rope_dims rotated elements, the same for all heads, followed by the
    first d - r elements of that value. As published, r is d/2. Without rotary positions, keys are
    values.

        x -- q_proj -> rotate ----------------> q of each head
        x -- k_rope_proj -> rotate (cached) --> the first r dimensions of k, the same in all groups
        x -- kv_proj (cached) ----------------> v of each group; its first d - r: the rest of k

    The cache holds Hkv d + r elements per token.
    """

    options = ('n_kv_head',)
    check = MHA.check

    def __init__(self, config, kv_width=None):
        super().__init__(config, kv_width)
        self.n_kv_head = config.n_kv_head or config.n_head
        self.make_queries(config)
        self.kv_proj = Linear(self.kv_width, self.n_kv_head * self.head_dim)
        if self.rope_dims:
            self.k_rope_proj = Linear(self.kv_width, self.rope_dims)
        self.make_output(config)

    def forward(self, x, x_kv=None, rope=None, rope_kv=None, key_mask=None, cache=None,
                scratch=None):
        x_kv = x if x_kv is None else x_kv
        rope_kv = rope if rope_kv is None else rope_kv
        q = self.queries(x)  # (B, H, T, d)
        v = split_heads(self.kv_proj(x_kv), self.n_kv_head)  # (B, Hkv, S, d)
        k_rope = x_kv[..., :0]  # (B, S, r or 0)
        if self.rope_dims:
            q, k_rope = rotate(q, rope), rotate(self.k_rope_proj(x_kv), rope_kv)
        if cache is not None:
            v, k_rope = cache.extend(self, v, k_rope)
        tied = v[..., :self.head_dim - self.rope_dims]
        k = torch.cat((k_rope[:, None].expand(-1, self.n_kv_head, -1, -1), tied), dim=-1)
        return self.output(self.attend(q, k, v, key_mask), x)


class TPA(Attention):
    """Tensor product attention (arXiv 2501.06425). The queries of all heads, an H x d matrix per
    token, are the mean of q_rank outer products of a vector over the heads and a vector over the
    dimensions, both linear in the token. So are keys and values, with kv_rank. q_rank=None: queries
    straight from x.

        q[h, c] = 1/R sum_i a[i, h] b[i, c]    a = q_head_proj(x) (R, H), b = q_channel_proj(x)

    Rotating the vectors over the dimensions rotates their products. The cache holds the vectors,
    2 R (H + d) elements per token.
    """

    options = ('q_rank', 'kv_rank')

    def __init__(self, config, kv_width=None):
        super().__init__(config, kv_width)
        self.q_rank, self.kv_rank = config.q_rank, config.kv_rank
        if self.q_rank:
            self.q_head_proj, self.q_channel_proj = self.factors(config.n_embd, self.q_rank)
        else:
            self.make_queries(config)
        self.k_head_proj, self.k_channel_proj = self.factors(self.kv_width, self.kv_rank)
        self.v_head_proj, self.v_channel_proj = self.factors(self.kv_width, self.kv_rank)
        self.make_output(config)

    def factors(self, width, rank):
        """The matrices for the vectors over heads and over dimensions. With scale_latents the first
        has initial variance rank/width, which makes the mean of the products as large as an
        ordinary projection."""
        return (Linear(width, rank * self.n_head, init_fan_in=width / rank),
                Linear(width, rank * self.head_dim))

    @classmethod
    def check(cls, config):
        require(config, 'kv_rank', 'the rank of its keys and values')

    def forward(self, x, x_kv=None, rope=None, rope_kv=None, key_mask=None, cache=None,
                scratch=None):
        x_kv = x if x_kv is None else x_kv
        rope_kv = rope if rope_kv is None else rope_kv
        if self.q_rank:
            q_head = split_heads(self.q_head_proj(x), self.q_rank)  # (B, R, T, H)
            q = split_heads(self.q_channel_proj(x), self.q_rank)  # (B, R, T, d)
        else:
            q = self.queries(x)  # (B, H, T, d)
        k_head, k, v_head, v = (
            split_heads(layer(x_kv), self.kv_rank)  # (B, R, S, H or d)
            for layer in (self.k_head_proj, self.k_channel_proj,
                          self.v_head_proj, self.v_channel_proj))
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope_kv)
        if self.q_rank:
            q = mean_of_products(q_head, q)
        if cache is not None:
            k_head, k, v_head, v = cache.extend(self, k_head, k, v_head, v)
        k, v = mean_of_products(k_head, k), mean_of_products(v_head, v)
        return self.output(self.attend(q, k, v, key_mask), x)


def mean_of_products(head, channel):
    """(B, R, T, H), (B, R, T, d) -> (B, H, T, d), the mean over R of the outer products."""
    head = head.permute(0, 2, 3, 1) / head.size(1)  # (B, T, H, R)
    return (head @ channel.transpose(1, 2)).transpose(1, 2)


# --------------------------------------------------------------------------------------------------
# the attention of DeepSeek-V4


class Compressor(nn.Module):
    """The past of a DeepSeek-V4 layer as entries, one per m tokens (arXiv 2606.19348, section 2.3):
    means of the tokens' vectors, with a weight for each element.

        x -- kv_proj -----------------------------> vectors -+
        x -- gate_proj -> + position_bias -> softmax -> sum -+-> norm -> rotate -> entry (cached)

    overlap (CSA): a token makes two vectors, the first for the entry of the next group and the
    second for that of its own, so an entry is a mean over 2m tokens. An entry exists once its group
    is complete, and is rotated by the position of the group's first token.
    """

    def __init__(self, n_in, width, group_size, overlap):
        super().__init__()
        self.group_size, self.overlap = group_size, overlap
        self.kv_proj = Linear(n_in, width * (1 + overlap))
        self.gate_proj = Linear(n_in, width * (1 + overlap))
        self.position_bias = nn.Parameter(torch.zeros(group_size, width * (1 + overlap)))
        self.kv_norm = RMSNorm(width)

    def forward(self, x, rope, cache):
        """x (B, T, n_in), the new tokens -> the entries of all complete groups, (B, n, width)."""
        m, start = self.group_size, 0 if cache is None else cache.n_tokens
        end, first = start + x.size(1), start // m  # first: the group that is open at `start`
        kv, gate = self.kv_proj(x), self.gate_proj(x)
        if cache is not None:
            kv, gate = cache.extend_recent(self, m - 1 + m * self.overlap, kv, gate)
            # the open group, and with overlap the one before it, have a part in the new entries
            n = end - first * m + m * (self.overlap and first > 0)
            kv, gate = kv[:, kv.size(1) - n:], gate[:, gate.size(1) - n:]
        entries = self.pool(kv, gate)[:, int(self.overlap and first > 0):]
        if rope is not None:
            entries = rotate(entries, rope[:, first * m:end // m * m:m])
        if cache is not None:
            entries, = cache.extend(self, entries, every=m)
        return entries

    def pool(self, kv, gate):
        """kv and gate (B, S, width or 2 width) -> the entry of each complete group, (B, n, width).
        With overlap, the first one has no group before it."""
        m = self.group_size
        kv, gate = (x[:, :x.size(1) // m * m].unflatten(1, (-1, m)) for x in (kv, gate))
        gate = gate + self.position_bias  # (B, n, m, width or 2 width)
        if self.overlap:
            (kv_next, kv), (gate_next, gate) = kv.chunk(2, dim=-1), gate.chunk(2, dim=-1)
            kv_next = F.pad(kv_next, (0, 0, 0, 0, 1, 0))[:, :-1]
            gate_next = F.pad(gate_next, (0, 0, 0, 0, 1, 0), value=-math.inf)[:, :-1]
            kv, gate = torch.cat((kv_next, kv), dim=2), torch.cat((gate_next, gate), dim=2)
        weights = gate.softmax(dim=2, dtype=torch.promote_types(gate.dtype, torch.float32))
        return self.kv_norm((kv * weights.type_as(kv)).sum(dim=2))


class Indexer(nn.Module):
    """Chooses the entries that a query of DeepSeek-V4 reads, by the scores of a few narrow heads:
    sum over heads h of w_h relu(q_h . k). The keys k come from a Compressor of its own.

    The choice has no gradient, so the model's loss does not train the indexer, whose inputs are
    detached. It has a loss of its own, KL(p || softmax of its scores), where p is the attention
    weights of all visible entries, summed over heads and normalised (DeepSeek-V3.2, arXiv
    2512.02556, section 2.1).
    """

    def __init__(self, config, kv_width):
        super().__init__()
        self.n_head, self.head_dim = config.index_n_head, config.index_head_dim
        self.topk = config.index_topk
        self.compressor = Compressor(kv_width, self.head_dim, config.csa_group, overlap=True)
        self.q_b_proj = Linear(config.q_latent, self.n_head * self.head_dim)
        self.weights_proj = Linear(config.n_embd, self.n_head)

    def forward(self, x, q_latent, x_kv, rope, rope_kv, cache):
        """The arguments of `scores`: q (B, h, T, di), w (B, h, T, 1) and k (B, 1, n, di)."""
        k = self.compressor(x_kv.detach(), rope_kv, cache)[:, None]
        q = split_heads(self.q_b_proj(q_latent.detach()), self.n_head)
        w = self.weights_proj(x.detach()).mT[..., None] * (self.n_head * self.head_dim) ** -0.5
        return q if rope is None else rotate(q, rope), w, k

    def scores(self, q, w, k):
        """(B, T, n), in float32 at least."""
        products = F.relu(q @ k.mT)  # (B, h, T, n)
        return (products.to(torch.promote_types(q.dtype, torch.float32)) * w).sum(dim=1)

    def choose(self, scores):
        """scores (B, T, n) -> the indices of the topk largest per query, or of all: (B, T, k)."""
        # relu makes many scores exactly 0; among those the latest entries win
        order = 1e-30 * torch.arange(1, scores.size(-1) + 1, device=scores.device)
        scores = torch.where(scores == 0, order, scores)
        return scores.topk(min(self.topk, scores.size(-1)), dim=-1).indices

    def divergence(self, scores, read):
        """scores and attention weights, both (B, T, n) -> the divergence, summed over queries."""
        read = read / read.sum(dim=-1, keepdim=True).clamp(min=1e-30)
        return F.kl_div(scores.log_softmax(dim=-1), read, reduction='sum')


class V4(Attention):
    """The attention of DeepSeek-V4 (arXiv 2606.19348, section 2.3). One vector of d elements per
    token is the key and the value of all heads. A query reads the last `window` of them, and
    entries that each stand for a complete group of tokens (see Compressor). The kind of a layer, a
    word of layer_kinds, says how many:

        window    none
        csa       one per csa_group tokens, each a mean over two groups. With index_topk a query
                  reads only that many, which an Indexer chooses
        hca       one per hca_group tokens

        x -- q_a_proj -> norm -> q_b_proj -> norm per head, no gain -> rotate -> q
        x -- kv_proj -> norm -> rotate (the last W - 1 are cached) --------+---> k = v
        x -- Compressor (entries and the open group are cached) -----------+

    Values are rotated as keys are, so a head's output is rotated back by the query's position.
    The published layer has a sink and an output latent in groups (sink=True, o_latent, o_groups).
    Its rotary base is 10,000 in window layers and 160,000, stretched by YaRN, in the others; here
    all layers have rope_theta.

    The cache grows by d/m elements per token, with an indexer by (d + index_head_dim)/m.
    """

    options = ('q_latent', 'layer_kinds', 'csa_group', 'hca_group', 'index_topk', 'index_n_head',
               'index_head_dim', 'index_loss_coeff')
    chunk = 256  # queries per chunk; the window, if that is larger

    def __init__(self, config, kv_width=None):
        """config.layer_kinds: the one word for this layer."""
        super().__init__(config, kv_width)
        self.make_queries(config)
        self.kv_proj = Linear(self.kv_width, self.head_dim)
        self.kv_norm = RMSNorm(self.head_dim)
        self.compressor = self.indexer = None
        if config.layer_kinds != 'window':
            sparse = config.layer_kinds == 'csa'
            group_size = config.csa_group if sparse else config.hca_group
            self.compressor = Compressor(self.kv_width, self.head_dim, group_size, overlap=sparse)
            if sparse and config.index_topk:
                self.indexer = Indexer(config, self.kv_width)
        self.make_output(config)

    @classmethod
    def check(cls, config):
        require(config, 'q_latent', 'the width of its query latent')
        require(config, 'window', 'the number of tokens that it reads exactly')
        kinds = config.layer_kinds.split()
        if not kinds or not {*kinds} <= {'window', 'csa', 'hca'}:
            raise ConfigError(f'layer_kinds={config.layer_kinds!r}: must be words out of window, '
                              "csa and hca, such as 'window csa hca csa'")
        if config.index_topk:
            require_at_most(config, 'rope_dims', 'index_head_dim')

    def forward(self, x, x_kv=None, rope=None, rope_kv=None, key_mask=None, cache=None,
                scratch=None):
        x_kv = x if x_kv is None else x_kv
        rope_kv = rope if rope_kv is None else rope_kv
        end = x_kv.size(1) + (0 if cache is None else cache.n_tokens)
        q_latent = self.q_a_norm(self.q_a_proj(x))
        q = split_heads(self.q_b_proj(q_latent), self.n_head)  # (B, H, T, d)
        q = F.rms_norm(q, q.shape[-1:], eps=1e-6)
        kv = self.kv_norm(self.kv_proj(x_kv))[:, None]  # (B, 1, S, d)
        if rope is not None:
            q, kv = rotate(q, rope), rotate(kv, rope_kv)
        if cache is not None:
            kv, = cache.extend_recent(self, self.window - 1, kv)
        entries, index = kv[:, :, :0], None  # (B, 1, n, d)
        if self.compressor is not None:
            entries = self.compressor(x_kv, rope_kv, cache)[:, None]
        if self.indexer is not None:
            index = self.indexer(x, q_latent, x_kv, rope, rope_kv, cache)
        y = self.attend_in_chunks(q, kv, entries, index, end, scratch)
        if rope is not None:
            cos, sin = rope
            y = rotate(y, torch.stack((cos, -sin)))
        return self.output(join_heads(y), x)

    def attend_in_chunks(self, q, kv, entries, index, end, scratch):
        """Attention of T queries, the last at position end - 1: q (B, H, T, d), kv (B, 1, S, d)
        of the last S positions, entries (B, 1, n, d) -> (B, H, T, d).

        A chunk of queries meets the keys of its windows and the entries that exist by its end, so
        no mask or matrix is T x T. With an indexer and several chunks, backward computes each chunk
        again instead of keeping all scores.
        """
        T, size = q.size(2), max(self.window, self.chunk)
        attend_chunk, m = self.attend_chunk, self.compressor.group_size if self.compressor else 1
        if index is not None and T > size and torch.is_grad_enabled():
            attend_chunk = partial(checkpoint, attend_chunk, use_reentrant=False)
        oldest, parts, divergence = end - kv.size(2), [], 0.0  # oldest: the position of kv's first
        for t, chunk in zip(range(end - T, end, size), q.split(size, dim=2)):
            stop = t + chunk.size(2)  # chunk: (B, H, ., d), at positions t to stop - 1
            first, n = max(oldest, t - self.window + 1), min(entries.size(2), stop // m)
            keys = torch.cat((kv[:, :, first - oldest:stop - oldest], entries[:, :, :n]), dim=2)
            chunk_index = None
            if index is not None and n:
                q_index, w, k_index = index
                rows = slice(t - end + T, stop - end + T)
                chunk_index = q_index[:, :, rows], w[:, :, rows], k_index[:, :, :n]
            y, chunk_divergence = attend_chunk(chunk, keys, n, t, first, chunk_index)
            parts.append(y)
            divergence = divergence + chunk_divergence
        if index is not None and self.training and scratch is not None:
            n_queries = q.size(0) * max(1, T - m + 1)  # those that see an entry
            scratch.setdefault('index_losses', []).append(divergence / n_queries)
        return torch.cat(parts, dim=2)

    def attend_chunk(self, q, keys, n, t, first, index):
        """q (B, H, chunk, d), the first at position t; keys (B, 1, ., d): those of the positions
        from `first` on, then n entries -> (B, H, chunk, d), and the divergence of the Indexer."""
        stop, divergence = t + q.size(2), 0.0
        query = torch.arange(t, stop, device=q.device)[:, None]
        key = torch.arange(first, stop, device=q.device)
        mask = (key <= query) & (key > query - self.window)
        if n:
            exists = (query + 1) // self.compressor.group_size
            exists = torch.arange(n, device=q.device) < exists  # (chunk, n)
            mask = torch.cat((mask, exists), dim=1)
        if index is not None:
            scores = self.indexer.scores(*index)
            scores = scores.masked_fill(~exists, -1e30)  # not -inf: some queries see no entry
            if self.training:
                with torch.no_grad():
                    read = self.weights(q @ keys.mT, mask)[..., -n:].sum(dim=1)
                divergence = self.indexer.divergence(scores, read)
            chosen = torch.zeros_like(scores, dtype=torch.bool)
            chosen = chosen.scatter(-1, self.indexer.choose(scores), True) & exists
            mask = mask.repeat(q.size(0), 1, 1)[:, None]  # (B, 1, chunk, .)
            mask[:, 0, :, -n:] = chosen
        y = softmax_attention(q, keys, keys, mask, scale=self.scale, sink=self.sink,
                              dropout_p=self.dropout if self.training else 0.0)
        return y, divergence

    def weights(self, scores, mask):
        """Attention weights: the softmax of products q.k (B, H, T, S), with the sink."""
        scores = (scores * self.scale).masked_fill(~mask, -math.inf)
        if self.sink is None:
            return scores.softmax(dim=-1)
        sink = self.sink.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
        return torch.cat((sink, scores), dim=-1).softmax(dim=-1)[..., 1:]


def index_losses(config, scratch):
    """The aux_losses of a model's indexers, as in LanguageModel.body."""
    losses = scratch.get('index_losses')
    return {'index_loss': (sum(losses) / len(losses), config.index_loss_coeff)} if losses else {}


# --------------------------------------------------------------------------------------------------
# mixture of experts


class MoE(nn.Module):
    """Mixture of experts (DeepSeek-V3, arXiv 2412.19437, section 2.1.2), (B, T, D) -> (B, T, D):
    each token goes through a shared SwiGLU and the n_experts_per_tok best of n_routed_experts.

        scores    sigmoid(router x), one per expert
        choice    the largest scores + bias; with n_group, only from the topk_group groups whose two
                  best have the largest sum
        output    the sum of the chosen experts, weighted by scores / their sum, times
                  routed_scaling

    No gradient reaches the bias: after a step, `balance` raises it by balance_rate for experts with
    fewer tokens than the mean, and lowers it for the others. router='softmax' is DeepSeek-V2's
    (2405.04434, section 2.2.1): scores are softmax(router x), without a bias, so nothing balances
    the experts; weights are the scores times routed_scaling; a group counts as its best expert.
    """

    residual_out = True  # see init_weights

    def __init__(self, config):
        super().__init__()
        c, D, hidden, E = config, config.n_embd, config.expert_hidden, config.n_routed_experts
        self.n_experts, self.n_chosen = E, c.n_experts_per_tok
        self.n_group, self.topk_group = c.n_group, c.topk_group
        self.scaling, self.balance_rate = c.routed_scaling, c.balance_rate
        self.router = Linear(D, E)
        self.softmax = c.router == 'softmax'
        self.register_buffer('router_bias', None if self.softmax else torch.zeros(E))
        self.register_buffer('load', torch.zeros(E), persistent=False)  # tokens since `balance`
        self.register_buffer('last_load', torch.zeros(E), persistent=False)  # and before it
        self.in_proj = nn.Parameter(torch.empty(E, hidden, D))
        self.up_proj = nn.Parameter(torch.empty(E, hidden, D))
        self.out_proj = nn.Parameter(torch.empty(E, D, hidden))
        self.shared = None
        if c.n_shared_experts:
            self.shared = MLP(replace(c.dense_mlp(), mlp_hidden=c.n_shared_experts * hidden))

    @classmethod
    def check(cls, config):
        require(config, 'n_routed_experts', 'the number of experts', 'mlp')
        require(config, 'expert_hidden', 'the width of an expert', 'mlp')
        E, k, groups = config.n_routed_experts, config.n_experts_per_tok, config.n_group
        if config.mlp_bias or config.mlp_rank:
            raise ConfigError("mlp='moe' has no mlp_bias and no mlp_rank: leave them out")
        if E % groups or groups > 1 and E // groups < 2 or config.topk_group > groups:
            raise ConfigError(f'n_group={groups}, topk_group={config.topk_group}: '
                              f'n_routed_experts={E} must divide into n_group groups of at least '
                              'two experts, and topk_group must be at most n_group')
        if k > E // groups * config.topk_group:
            raise ConfigError(f'n_experts_per_tok={k} is more than the '
                              f'{E // groups * config.topk_group} experts to choose from')

    def forward(self, x):
        rows, k = x.flatten(0, -2), self.n_chosen  # (N, D)
        weights, experts = self.route(rows)
        order = experts.flatten().argsort(stable=True)  # of the N*k pairs (row, expert), by expert
        numbers = torch.arange(self.n_experts, device=x.device)
        counts = (experts.flatten()[:, None] == numbers).sum(dim=0)  # (E,)
        if self.training:
            self.load += counts
        pairs = rows[:, None].expand(-1, k, -1).flatten(0, 1)  # (N*k, D)
        h, ends = pairs[order], counts.cumsum(0).int()
        h = F.silu(expert_linear(h, self.in_proj, ends)) * expert_linear(h, self.up_proj, ends)
        h = expert_linear(h, self.out_proj, ends)
        h = h[order.argsort()].unflatten(0, (-1, k))  # (N*k, D), row by row again -> (N, k, D)
        y = (h * weights[..., None]).sum(dim=1).type_as(h).view(x.shape)
        return y if self.shared is None else y + self.shared(x)

    def route(self, rows):
        """rows (N, D) -> weights and experts, both (N, k)."""
        device = 'cpu' if rows.is_meta else rows.device.type
        with torch.autocast(device, enabled=False):  # a choice must not be rounded
            high = torch.promote_types(rows.dtype, torch.float32)
            scores = F.linear(rows.to(high), self.router.weight.to(high))  # (N, E)
            scores = scores.softmax(dim=-1) if self.softmax else scores.sigmoid()
            choice = (scores if self.softmax else scores + self.router_bias).detach()
            if self.n_group > 1:
                groups = choice.unflatten(-1, (self.n_group, -1))  # (N, groups, E/groups)
                best = groups.topk(1 if self.softmax else 2, dim=-1).values.sum(-1)  # (N, groups)
                best = best.topk(self.topk_group, dim=-1).indices
                out = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter(-1, best, False)
                choice = groups.masked_fill(out[..., None], -math.inf).flatten(-2)
            experts = choice.topk(self.n_chosen, dim=-1).indices
            weights = scores.gather(-1, experts)
            if not self.softmax:
                weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
            return weights * self.scaling, experts

    @torch.no_grad()
    def balance(self):
        """Moves the bias by the load since the last call, unless the router is frozen, and forgets
        the load."""
        if not self.softmax and self.router.weight.requires_grad:
            self.router_bias += self.balance_rate * torch.sign(self.load.mean() - self.load)
        self.last_load.copy_(self.load)
        self.load.zero_()


def expert_linear(x, weight, ends):
    """x (n, n_in), sorted by expert; weight (E, n_out, n_in); ends (E,): where the rows of each
    expert end -> (n, n_out)."""
    device = x.device.type
    if device != 'meta' and torch.is_autocast_enabled(device):
        x, weight = (y.to(torch.get_autocast_dtype(device)) for y in (x, weight))
    # grouped_mm needs rows of a multiple of 16 bytes, float32 or bfloat16; compiled, bfloat16
    takes = {torch.bfloat16} if torch.compiler.is_compiling() else {torch.bfloat16, torch.float32}
    if x.is_meta or x.dtype in takes and not any(width % 8 for width in weight.shape[1:]):
        return F.grouped_mm(x, weight.mT, offs=ends)
    rows = x.split(ends.diff(prepend=ends.new_zeros(1)).tolist())
    return torch.cat([F.linear(row, matrix) for row, matrix in zip(rows, weight)])


# ==================================================================================================
# Part III: other architectures
# --------------------------------------------------------------------------------------------------
# the encoder-decoder


@dataclass
class EncoderDecoderConfig(TransformerConfig):
    """Two causal stacks, the second of which reads the first"""

    n_decoder_layer: Count | None = None  # blocks of the decoder; None = n_layer
    cross_n_head: Count | None = None  # heads of the cross-attention; None = 2 n_head
    embedding_loss: Literal['none', 'mse', 'cosine'] = 'none'  # of embeddings and encoder output
    embedding_loss_coeff: Positive = 1.0  # weight of the embedding loss
    embedding_loss_affine: bool = True  # embedding loss: gains and biases in its two LayerNorms

    derived = ('causal',)

    def __post_init__(self):
        super().__post_init__()
        self.n_decoder_layer = self.n_decoder_layer or self.n_layer
        self.cross_n_head = self.cross_n_head or 2 * self.n_head
        require_divisible(self, 'n_embd', 'cross_n_head')
        require_at_most(self, 'n_dense', 'n_decoder_layer')
        self.cross_of(self.n_decoder_layer - 1)  # raises ConfigError now rather than later

    def cross_of(self, layer):
        """The BlockConfig of the cross-attention of a decoder layer. Each head rotates as many
        dimensions as it has, up to rope_dims."""
        width = self.n_embd // self.cross_n_head
        try:
            return replace(self.block_of(layer), n_head=self.cross_n_head, head_dim=width,
                           v_head_dim=None, rope_dims=min(self.rope_dims, width // 2 * 2))
        except ConfigError as error:
            raise ConfigError(f'cross-attention, cross_n_head={self.cross_n_head}: {error}; its '
                              f'heads are {width} wide, those of the stacks '
                              f'{self.head_dim}') from None


class CrossBlock(Block):
    """A block that also reads another sequence, between its attention and its feed-forward.
    cross_config: the BlockConfig of that attention."""

    def __init__(self, config, cross_config):
        super().__init__(config)
        self.cross_norm = make_norm(config, config.n_embd)
        self.kv_norm = make_norm(config, config.n_embd)
        self.cross = make_attention(cross_config)

    def forward(self, x, x_kv, cross_rope, rope, **context):
        x = x + self.dropout(self.attn(self.attn_norm(x), rope=rope, **context))
        x = x + self.dropout(self.cross(self.cross_norm(x), self.kv_norm(x_kv), rope=cross_rope,
                                        **context))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class EncoderDecoder(LanguageModel):
    """Two causal stacks over the same sequence. The decoder starts from the encoder's output and
    attends to it, causally too, in every block.

        tokens -> embedding E -> encoder blocks -> enc -> decoder_proj -> decoder blocks -> head
                                                    |                          ^
                                                    +--- keys and values of ---+
                                                         the cross-attentions

    The embedding loss (training only) pulls the running mean of the embeddings,
    A_t = mean over i <= t of LN_1(E)_i, towards the encoder's output LN_2(enc_t), which gets no
    gradient from it. E and enc are the raw residual streams. With embedding_loss_affine both norms
    learn a gain and a bias, and the loss can fall by shrinking the gains alone; so their mean size
    is logged as `embedding_gain` and `encoder_gain`.
    """

    def __init__(self, config):
        super().__init__(config)
        c, D = config, config.n_embd
        self.add_rope('rope', c.rope_dims, c.block_size)
        self.encoder = nn.ModuleList(Block(c.block_of(i)) for i in range(c.n_layer))
        self.decoder_proj = Linear(D, D)
        self.decoder = nn.ModuleList(CrossBlock(c.block_of(i), c.cross_of(i))
                                     for i in range(c.n_decoder_layer))
        self.add_rope('cross_rope', c.cross_of(0).rope_dims, c.block_size)
        if c.embedding_loss != 'none':
            affine = c.embedding_loss_affine
            self.embedding_loss_norm = nn.LayerNorm(D, eps=1e-5, elementwise_affine=affine)
            self.encoder_loss_norm = nn.LayerNorm(D, eps=1e-5, elementwise_affine=affine)
        init_weights(self)

    def body(self, x, end, key_mask, cache):
        embedded, scratch = x, {}
        rope, cross_rope = (None if table is None else table[:, :end]
                            for table in (self.rope, self.cross_rope))
        for block in self.encoder:
            x = block(x, rope=rope, cache=cache, scratch=scratch)
        encoded, x = x, self.decoder_proj(x).type_as(x)  # the residual stream keeps its precision
        for block in self.decoder:
            x = block(x, encoded, cross_rope=cross_rope, rope=rope, cache=cache, scratch=scratch)
        aux_losses = index_losses(self.config, scratch)
        if self.training and self.config.embedding_loss != 'none':
            aux_losses |= self.embedding_losses(embedded, encoded.detach())
        return x, aux_losses

    def embedding_losses(self, embedded, encoded):
        """The embedding loss of embedded and encoded, both (B, T, D), as aux_losses."""
        c = self.config
        counts = torch.arange(1, embedded.size(1) + 1, device=embedded.device)[:, None]  # (T, 1)
        mean = self.embedding_loss_norm(embedded).cumsum(dim=1) / counts
        target = self.encoder_loss_norm(encoded)
        if c.embedding_loss == 'mse':
            loss = F.mse_loss(mean, target)
        else:
            loss = (1 - (F.cosine_similarity(mean, target, dim=-1) + 1) / 2).mean()
        aux_losses = {'embedding_loss': (loss, c.embedding_loss_coeff)}
        if c.embedding_loss_affine:
            for name in ('embedding', 'encoder'):
                gain = getattr(self, f'{name}_loss_norm').weight.detach().abs().mean()
                aux_losses[f'{name}_gain'] = gain, 0.0
        return aux_losses


# --------------------------------------------------------------------------------------------------
# grouped latents. More symbols:
#
#     g  group_size, tokens per group     K  slots per group on a level, K' on the level above
#     G  groups of a call                 k  slots of each: K, or fewer if the group is open


@dataclass
class GroupedLatentConfig(ModelConfig):
    """Tokens in groups, each compressed to a few latents; n_layer blocks over the latents; back"""

    n_embd: Count | None = None
    n_head: Count | None = None
    n_layer: Count = 16  # blocks of the trunk, at the widest width
    head_dim: Count = 32  # width of a head, on every level
    block_size: Count = 768  # longest sequence, tokens
    init_std: Positive | None = None  # of the initial weights; None = 1/sqrt(fan in)
    group_size: Count = 48  # tokens per group
    latents: tuple[Count, ...] = (16, 2)  # latents per group, level by level
    widths: tuple[Count, ...] = (64, 128, 256)  # of the tokens and of each level of latents
    compress: Literal['transformer', 'perceiver'] = 'transformer'  # how latents read a group
    n_compress: Count = 1  # compress=transformer: blocks per compression
    n_mix: Count = 1  # pairs of a local and a global block, on each level and each way
    interleave: bool = True  # local and global blocks alternate; False = all local ones first
    upsample: Literal['repeat', 'attention'] = 'repeat'  # how slots read latents
    skip: Literal['sum', 'learned'] = 'sum'  # latents + slots, or each times a learned vector
    slot_emb_up: bool = False  # add the embeddings of the slots on the way up too
    global_window: Count | None = None  # tokens that a global block of level 0 sees; None = all
    dense_former: bool = False  # a trunk block reads a learned sum of all outputs before it
    latent_loss: bool = False  # each trunk output predicts the next trunk input
    latent_loss_coeff: Positive = 1.0  # weight of the latent loss
    n_channels: Annotated[int, Range(least=2)] | None = None  # parallel channels; None = none
    channels_every: Count = 1  # channels: 2 = in every second trunk block
    channel_mlp_mult: Positive = 1.0  # channels: hidden width, times 4 width / n_channels
    n_shared_mlp: CountOrZero = 0  # channels: additional feed-forwards that all channels share
    merge: Literal['softmax', 'max', 'mean'] = 'softmax'  # channels: how they become one

    derived = ('n_embd', 'n_head', 'mlp_hidden', 'causal')

    def __post_init__(self):
        check_options(self)
        if any(above >= below for below, above in zip(self.sizes, self.latents)):
            raise ConfigError(f'group_size={self.group_size}, latents={self.latents}: each level '
                              'must have fewer than the one before it')
        if len(self.widths) != len(self.sizes):
            raise ConfigError(f'widths={self.widths}: must be {len(self.sizes)} numbers, one for '
                              f'the tokens and one for each of latents={self.latents}')
        if odd := [width for width in self.widths if width % self.head_dim]:
            raise ConfigError(f'widths={self.widths}: {odd[0]} is not divisible by '
                              f'head_dim={self.head_dim}')
        self.n_embd, self.n_head = self.widths[0], self.widths[0] // self.head_dim
        super().__post_init__()
        require_at_most(self, 'group_size', 'block_size')
        require_at_most(self, 'channels_every', 'n_layer')
        if self.attention == 'v4':
            raise ConfigError("attention='v4' compresses tokens itself and does not work in "
                              'grouped latents: choose another attention')
        if self.window:
            raise ConfigError('grouped latents have no window: set global_window instead')
        if self.n_channels and self.mlp == 'moe':
            raise ConfigError("n_channels have feed-forwards of their own: not with mlp='moe'")

    @property
    def sizes(self):
        """Slots per group on each level, the tokens first."""
        return (self.group_size, *self.latents)

    def block_at(self, level, **changes):
        width = self.widths[level]
        return self.block(n_embd=width, n_head=width // self.head_dim,
                          **{'mlp_hidden': 4 * width} | changes)


class GroupedLatent(LanguageModel):
    """A U-net over time, exactly causal. Tokens come in groups of fixed size g. Each level keeps K
    slots per group, the last K positions of the group, fewer and wider than the level below; the
    trunk, n_layer wide blocks, runs over the fewest.

                     group 0             group 1                          logits
        level 0   t t t t t t t t     t t t t t t t t     g = 8 tokens      ^
             Down | | | | | | | |                         per group         | Up, + skip
        level 1           l l l l             l l l l     K = 4 slots       ^
             Down         | | | |                         per group         | Up, + skip
        level 2               L L                 L L     K = 2  --> trunk -+

    Down: the last slots of a group read the group, and become the slots of the next level. Up: a
    slot reads the latents that exist by its time, those of its own group at or before it and those
    of the group before, and adds the skip, its own state on the way down. After each Down and Up a
    Mixer lets the slots of a level see each other: some of its blocks attend inside each group,
    others across all groups. A slot stands at the time of a token and sees nothing later.

    Positions: a learned embedding, added on the way down (and with slot_emb_up on the way up), says
    where in its group a slot stands; rotary positions are token times on every level. Because the
    group size is fixed, nothing depends on the length or on later tokens; the last group may be
    open, that is, not yet full.

    Decoding caches what blocks across groups keep of closed groups. The tokens of the open group go
    through the model again with each new token.
    """

    def __init__(self, config):
        super().__init__(config)
        c, last = config, len(config.latents)
        self.slot_emb = nn.ModuleList(nn.Embedding(K, D) for K, D in zip(c.sizes, c.widths))
        self.down = nn.ModuleList(Down(c, i) for i in range(last))
        self.blocks = nn.ModuleList(
            ChannelBlock(c) if c.n_channels and (i + 1) % c.channels_every == 0
            else Block(c.block_at(last)) for i in range(c.n_layer))
        self.up = nn.ModuleList(Up(c, i) for i in range(last))
        if c.dense_former:
            # Weights of the sum that block i + 1 reads, over the trunk's input and all outputs so
            # far; at first it is the last output alone.
            self.depth_weights = nn.ParameterList(F.one_hot(torch.tensor(i + 1), i + 2).float()
                                                  for i in range(c.n_layer - 1))
        if c.latent_loss:
            self.latent_head = Linear(c.widths[-1], c.widths[-1])
        g = c.group_size
        n_groups = max(2, -(-c.block_size // g))  # Up looks back by one group
        for i, K in enumerate(c.sizes):
            times = (torch.arange(n_groups)[:, None] * g + g - K + torch.arange(K)).flatten()
            self.add_rope(f'rope_{i}', c.rope_dims, n_groups * g, times)
        init_weights(self)

    def body(self, x, end, key_mask, cache):
        """x (B, T, D_0). Without a cache the last group is filled up, which causality makes exact.
        With one, complete groups are computed and cached, then the open one, which is not."""
        g, T = self.config.group_size, x.size(1)
        if cache is None:
            y, aux_losses = self.groups(F.pad(x, (0, 0, 0, -T % g)), n_tokens=T)
            return y[:, :T], aux_losses
        x = x if cache.open is None else torch.cat((cache.open, x), dim=1)
        n_closed = x.size(1) // g * g
        closed, cache.open, parts = x[:, :n_closed], x[:, n_closed:].detach().clone(), []
        if n_closed:
            parts.append(self.groups(closed, cache)[0])
            cache.close(n_closed // g)
        if n_closed < x.size(1):
            parts.append(self.groups(x[:, n_closed:], cache)[0])
        return torch.cat(parts, dim=1)[:, -T:], {}

    def groups(self, x, cache=None, n_tokens=None):
        """Down, through the trunk, and up, for complete groups or for the tokens of an open one:
        x (B, G*k, D_0) -> (hidden states of the same shape, aux_losses). n_tokens: without a cache,
        how many of the tokens are real."""
        c, B = self.config, x.size(0)
        n = min(x.size(1), c.group_size)  # tokens per group
        levels, scratch = [], {}
        for i, K in enumerate(c.sizes):
            k = max(0, n - (c.group_size - K))  # an open group may have no slots yet on level i
            levels.append(self.level(i, k, x.size(1) // n, cache, scratch))
        n_levels = sum(level.k > 0 for level in levels)
        x = fold(x, levels[0].n_groups) + self.slot_emb[0].weight[:n]
        skips, aux_losses = [x], {}
        for i, down in enumerate(self.down[:n_levels - 1]):
            skips.append(down(skips[-1], self.slot_emb[i + 1].weight, *levels[i:i + 2]))
        if n_levels == len(levels):
            x, aux_losses = self.trunk(skips.pop(), levels[-1], n_tokens)
        else:
            x = x.new_empty(B, 0, c.widths[n_levels])
        for up in reversed(self.up[:len(skips)]):
            i = up.level
            x = up(x, skips.pop(), self.slot_emb[i].weight, *levels[i:i + 2], cache)
        return unfold(x, levels[0].n_groups), aux_losses

    def level(self, i, k, n_groups, cache, scratch):
        """The Level of a call: k slots in each of n_groups groups, after those in the cache."""
        table, across = getattr(self, f'rope_{i}'), None if cache is None else cache.across[i]
        start = 0 if cache is None else across.n_tokens
        # attention sees differences of times alone, so inside each group they count from 0
        inside, until = (None if table is None else table[:, :end]
                         for end in (k, start + n_groups * k))
        return Level(k, n_groups, dict(rope=inside, scratch=scratch),
                     dict(rope=until, cache=across, scratch=scratch), table)

    def trunk(self, x, level, n_tokens):
        """x (B*G, k, D) -> (the same after n_layer blocks over all latents, aux_losses)."""
        inputs = x = unfold(x, level.n_groups)
        outputs = [x]
        for i, block in enumerate(self.blocks):
            x = block(x, **level.across)
            if self.config.dense_former and i + 1 < len(self.blocks):
                outputs.append(x)
                x = sum(weight * output for weight, output in zip(self.depth_weights[i], outputs))
        aux_losses = {}
        if self.config.latent_loss and self.training:
            g, K = self.config.group_size, self.config.sizes[-1]
            n = n_tokens // g * K + max(0, n_tokens % g - (g - K))  # latents of real tokens
            loss = self.latent_loss(x[:, :n], inputs[:, :n].detach())
            aux_losses['latent_loss'] = loss, self.config.latent_loss_coeff
        return fold(x, level.n_groups), aux_losses

    def latent_loss(self, outputs, inputs):
        """1 - cos between latent_head of trunk output j and trunk input j + 1; both (B, n, D)."""
        predicted = self.latent_head(outputs[:, :-1])
        if predicted.size(1) == 0:
            return self.latent_head(outputs).sum() * 0.0  # every parameter still gets a gradient
        return (1 - F.cosine_similarity(predicted, inputs[:, 1:], dim=-1)).mean()

    def init_cache(self, batch, length):
        check_cache(self, length)
        return GroupedCache(self.config, batch, length)


class GroupedCache:
    """The cache of GroupedLatent: per level, `across`, what blocks across groups keep of closed
    groups; per Up, `previous`, the last closed group's latents; and `open`, the embedded tokens of
    the open group. n_tokens can not be set back."""

    def __init__(self, config, batch, length):
        self.config, self.batch, self.length, self.n_tokens = config, batch, length, 0
        n_groups = -(-length // config.group_size)
        self.across = [Cache(batch, n_groups * K) for K in config.sizes]
        self.previous = [None] * len(config.latents)
        self.open = None

    def close(self, n_groups):
        for cache, K in zip(self.across, self.config.sizes):
            cache.n_tokens += n_groups * K

    def elements(self):
        c = self.config
        growing = sum(cache.elements()[0] * K / c.group_size
                      for cache, K in zip(self.across, c.sizes))
        previous = sum(x.numel() for x in self.previous if x is not None) // self.batch
        return growing, previous + (c.group_size - 1) * c.widths[0]

    def n_bytes(self):
        tensors = [x for x in (self.open, *self.previous) if x is not None]
        return sum(x.nbytes for x in tensors) + sum(cache.n_bytes() for cache in self.across)


class Level(NamedTuple):
    """One level of a call of GroupedLatent.groups."""

    k: int  # slots per group
    n_groups: int
    inside: dict  # the context of blocks that attend inside each group
    across: dict  # the context of blocks that attend across all groups
    table: torch.Tensor  # the rotary table of all slots of the level, or None


def fold(x, n_groups):
    return x.unflatten(1, (n_groups, -1)).flatten(0, 1)  # (B, G*k, D) -> (B*G, k, D)


def unfold(x, n_groups):
    return x.unflatten(0, (-1, n_groups)).flatten(1, 2)  # (B*G, k, D) -> (B, G*k, D)


class Down(nn.Module):
    """Level i to level i + 1: the last k' slots of each group read the group,
    (B*G, k, D_i) -> (B*G, k', D_i+1).

    compress='transformer': blocks inside the group at the new width; the last one has queries for
    the last k' slots alone. 'perceiver': one block; its queries are the last k' slots projected to
    the new width, its keys and values come from the group at its own width.
    """

    def __init__(self, config, level):
        super().__init__()
        self.perceiver = config.compress == 'perceiver'
        width, block_above = config.widths[level], config.block_at(level + 1)
        self.in_proj = Linear(width, block_above.n_embd)
        n = 0 if self.perceiver else config.n_compress - 1
        self.blocks = nn.ModuleList(Block(block_above) for _ in range(n))
        self.pool = PoolBlock(block_above, width if self.perceiver else None)
        self.mixer = Mixer(config, level + 1)

    def forward(self, x, slot_emb, here, above):
        y = self.in_proj(x).type_as(x)  # the residual stream keeps its precision
        for block in self.blocks:
            y = block(y, **here.inside)
        latents = self.pool(y[:, here.k - above.k:], x if self.perceiver else y, **here.inside)
        return self.mixer(latents + slot_emb[:above.k], above)


class PoolBlock(Block):
    """A block whose queries are the last slots of a group: x (B*G, k', D), x_kv (B*G, k, kv_width).
    kv_width None: x is a part of x_kv, and they share a norm."""

    def __init__(self, config, kv_width=None):
        super().__init__(config, kv_width)
        self.kv_norm = make_norm(config, kv_width) if kv_width else None

    def forward(self, x, x_kv, **context):
        x_kv = (self.kv_norm or self.attn_norm)(x_kv)
        x = x + self.dropout(self.attn(self.attn_norm(x), x_kv, **context))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class Mixer(nn.Module):
    """n_mix pairs of a local block, which attends inside each group, and a global block, which
    attends across all groups of a level: (B*G, k, D) -> the same."""

    def __init__(self, config, level):
        super().__init__()
        n, window = config.n_mix, config.global_window if level == 0 else None
        self.kinds = ('inside', 'across') * n if config.interleave else (
            ('inside',) * n + ('across',) * n)
        self.blocks = nn.ModuleList(
            Block(config.block_at(level, window=window if kind == 'across' else None))
            for kind in self.kinds)

    def forward(self, x, here):
        for kind, block in zip(self.kinds, self.blocks):
            if kind == 'inside':
                x = block(x, **here.inside)
            else:
                x = fold(block(unfold(x, here.n_groups), **here.across), here.n_groups)
        return x


class Up(nn.Module):
    """Level i + 1 back to level i: each slot reads latents of its own group and of the group
    before, and adds its skip: latents (B*G, k', D_i+1), skip (B*G, k, D_i) -> (B*G, k, D_i). Before
    the first group there are learned latents.

    upsample='repeat': the last K' slots of a group stand at the same tokens as its latents, and
    each takes its own. The slot that stands s slots before the first latent takes the s-th latent
    from the end of the group before; after K' the count starts from the end again.
    'attention': a slot attends to all latents at or before it.
    """

    def __init__(self, config, level):
        super().__init__()
        self.level, self.upsample = level, config.upsample
        width, width_above = config.widths[level:level + 2]
        n_slots, n = config.sizes[level:level + 2]  # per group: slots here, latents above
        self.latent_norm = make_norm(config, width_above)
        self.before_emb = nn.Embedding(n, width_above)
        # which latents a slot reads, of the n of the group before followed by the n of its own
        slot, first = torch.arange(n_slots), n_slots - n  # `first` stands with the first latent
        if self.upsample == 'repeat':
            self.up_proj = Linear(width_above, width, residual_out=True)
            reads = torch.where(slot < first, (slot - first) % n, n + slot - first)
            self.register_buffer('reads', reads, persistent=False)
        else:
            self.query_norm = make_norm(config, width)
            self.up = make_attention(config.block_at(level, causal=False), width_above)
            own = slot[:, None] >= first + torch.arange(n)
            sees = torch.cat((torch.ones(n_slots, n, dtype=torch.bool), own), dim=1)
            self.register_buffer('sees', sees, persistent=False)  # (K, 2n)
        self.slot_emb_up, self.learned_skip = config.slot_emb_up, config.skip == 'learned'
        if self.learned_skip:
            self.skip_a, self.skip_b = (nn.Parameter(torch.ones(width)) for _ in range(2))
        self.mixer = Mixer(config, level)

    def forward(self, latents, skip, slot_emb, here, above, cache):
        latents = self.prepare(latents).unflatten(0, (-1, here.n_groups))  # (B, G, k', .)
        previous = None if cache is None else cache.previous[self.level]  # (B, K', .)
        if previous is None:
            previous = self.prepare(self.before_emb.weight).expand(latents.size(0), -1, -1)
        before = previous[:, None]  # of each group, the latents of the group before
        if here.n_groups > 1:
            before = torch.cat((before, latents[:, :-1]), dim=1)
        if cache is not None and here.k == slot_emb.size(0):  # these groups are complete
            cache.previous[self.level] = latents[:, -1].detach().clone()
        x = self.read(torch.cat((before, latents), dim=2).flatten(0, 1), skip, here, above)
        x = self.skip_a * x + self.skip_b * skip if self.learned_skip else x + skip
        if self.slot_emb_up:
            x = x + slot_emb[:here.k]
        return self.mixer(x, here)

    def prepare(self, latents):
        latents = self.latent_norm(latents)
        return self.up_proj(latents) if self.upsample == 'repeat' else latents

    def read(self, latents, skip, here, above):
        """What each slot reads of the latents (B*G, K' + k', .): (B*G, k, D_i)."""
        if self.upsample == 'repeat':
            return latents[:, self.reads[:here.k]]
        K, n = self.sees.size(0), latents.size(1)
        rope = rope_kv = None
        if here.table is not None:  # times count from the group before, whose latents come first
            rope, rope_kv = here.table[:, K:K + here.k], above.table[:, :n]
        return self.up(self.query_norm(skip), latents, rope=rope, rope_kv=rope_kv,
                       key_mask=self.sees[None, None, :here.k, :n])


class ChannelBlock(nn.Module):
    """A trunk block of C parallel channels, each with its own attention and feed-forward:

        h_c = x + attention_c(norm x);  z_c = h_c + mlp_c(norm h_c) + sum of shared mlps(norm h_c)
        merge='softmax': sum over c of softmax_c(z) * z, element by element; 'max', 'mean'

    The channels share the gains of the norms.
    """

    def __init__(self, config):
        super().__init__()
        c, C = config.block_at(-1), config.n_channels
        narrow = replace(c, mlp_hidden=max(1, round(config.channel_mlp_mult * 4 * c.n_embd / C)))
        self.merge = config.merge
        self.attn_norm, self.mlp_norm = (make_norm(c, c.n_embd) for _ in range(2))
        self.attn = nn.ModuleList(make_attention(c) for _ in range(C))
        self.mlp = nn.ModuleList(MLP(narrow) for _ in range(C))
        self.shared = nn.ModuleList(MLP(narrow) for _ in range(config.n_shared_mlp))
        self.dropout = make_dropout(c.dropout)

    def forward(self, x, **context):
        normed, channels = self.attn_norm(x), []
        for attn, mlp in zip(self.attn, self.mlp):
            h = x + self.dropout(attn(normed, **context))
            y = self.mlp_norm(h)
            channels.append(h + self.dropout(mlp(y) + sum(shared(y) for shared in self.shared)))
        z = torch.stack(channels)  # (C, B, T, D)
        if self.merge == 'softmax':
            return (z.softmax(dim=0) * z).sum(dim=0)
        return z.amax(dim=0) if self.merge == 'max' else z.mean(dim=0)


# ==================================================================================================
# Part IV: initial weights, counting, kernels, checks, tables
# --------------------------------------------------------------------------------------------------
# initial weights


def init_weights(model):
    """Sets the initial weights. What is not listed here keeps the constant that it is built with.

    what                                     init_std=0.02, say      init_std=None
    ---------------------------------------  ----------------------  --------------------
    matrix                                   N(0, init_std)          N(0, 1/sqrt(fan in))
    projection into the residual stream      N(0, init_std/sqrt(n))  a tenth of that
      (residual_out)
    embedding, untied head                   N(0, init_std)          N(0, 1/sqrt(width))
    embedding of a slot in its group         N(0, init_std)          half of that
    bias, sink                               0                       0
    gain of a norm or of a skip              as built: 1             as built: 1

    and with scale_latents, so that what goes through a latent of L elements instead of D starts as
    large as without it:

    gain of the norm of a latent             sqrt(D/L)               1
    factor of a product (init_fan_in)        N(0, init_fan_in^-0.5)  as any other

    n counts the residual projections of one stack of blocks, so that the variance at its end does
    not grow with its depth (GPT-2). With zero_init_residual, which init_std=None ignores, they are
    0, and a block changes nothing at first. init_std=None is for grouped latents: with small
    weights they get stuck at the entropy of token frequencies. A tenth lets skip connections
    dominate at first.

    A normed latent has unit variance, and a matrix of init_std sums over only L of its elements:
    without the gain, keys, values and queries start sqrt(D/L) too small. LongCat-Flash (arXiv
    2509.01322) has the same factor as a constant. What both options are worth depends on the other
    weights: the encoders of config/, with an init_std of 1/sqrt(D), gain a lot by either; small
    decoders with 0.02 gain nothing or lose (results/initialization.md). So neither is the default.
    """
    std, scaled = model.config.init_std, model.config.scale_latents
    zero = std and model.config.zero_init_residual

    def init(weight, residual_out=False, fan_in=None):
        scale = fan_in ** -0.5 if fan_in and std and scaled else std or weight.size(-1) ** -0.5
        if residual_out:
            scale *= 0.0 if zero else n_residual_out ** -0.5 if std else 0.1
        nn.init.normal_(weight, std=scale)

    for name, stack in model.named_children():
        n_residual_out = sum(getattr(module, 'residual_out', False) for module in stack.modules())
        for module in stack.modules():
            if isinstance(module, nn.Embedding):
                slot = 0.5 if name == 'slot_emb' else 1.0
                nn.init.normal_(module.weight, std=std or slot * module.embedding_dim ** -0.5)
            elif isinstance(module, Linear):
                init(module.weight, module.residual_out, module.init_fan_in)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, MoE):
                init(module.in_proj), init(module.up_proj)
                init(module.out_proj, residual_out=True)
            elif isinstance(module, RMSNorm) and module.latent_of and std and scaled:
                L, = module.normalized_shape
                nn.init.constant_(module.weight, (module.latent_of / L) ** 0.5)


def yarn_share(rope_dims, theta, trained_length, turns):
    """The share of each angle that YaRN (arXiv 2309.00071) divides, (rope_dims/2,), turns = (32, 1)
    in the paper: all for pairs that turn less than once in trained_length positions, none for those
    that turn 32 times or more, and in between linear in the number of the pair. YaRN's factor on
    the softmax is the option softmax_factor."""
    first, last = (math.log(trained_length / (n * 2 * math.pi)) * rope_dims
                   / (2 * math.log(theta)) for n in turns)  # the pairs with so many turns
    first, last = max(math.floor(first), 0), min(math.ceil(last), rope_dims - 1)
    pair = torch.arange(rope_dims // 2, dtype=torch.float64)
    return ((pair - first) / max(last - first, 0.001)).clamp(0, 1)


# --------------------------------------------------------------------------------------------------
# counting: a forward pass on the meta device, where tensors have shapes and no numbers


def on_meta(model, *args, **kwargs):
    """model(*args, **kwargs) in evaluation mode, on meta tensors."""
    # of one precision, because without autocast products do not mix them
    tensors = {name: torch.empty_like(tensor, device='meta').float() if tensor.is_floating_point()
               else torch.empty_like(tensor, device='meta')
               for name, tensor in chain(model.named_parameters(), model.named_buffers())}
    training = model.training
    try:
        return torch.func.functional_call(model.eval(), tensors, args, kwargs)
    finally:
        model.train(training)


class FusedFlops(TorchFunctionMode):
    """Counts what FlopCounterMode does not see on the meta device: attention, in which a causal
    query meets (T+1)/2 keys on average, and grouped products. Two FLOPs per multiply-add."""

    flops = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            q, k, v = args
            n_keys = (k.size(-2) + 1) / 2 if kwargs['is_causal'] else k.size(-2)
            self.flops += 2 * q[..., 0].numel() * (q.size(-1) + v.size(-1)) * n_keys
            return q.new_empty(*q.shape[:-1], v.size(-1))
        if function is torch._grouped_mm:  # what F.grouped_mm calls
            x, weight = args
            self.flops += 2 * x.numel() * weight.size(-1)
            return x.new_empty(*x.shape[:-1], weight.size(-1))
        return function(*args, **kwargs or {})


def count_flops(function):
    """FLOPs of matrix products and attention in function(), all of whose tensors are on meta.
    Norms, activations and softmax do not count; scores that a mask hides do, unless is_causal."""
    with torch.no_grad(), FlopCounterMode(display=False) as products, FusedFlops() as fused:
        function()
    return products.get_total_flops() + fused.flops


def training_flops(model, T, predicted=1.0):
    """Training FLOPs per token at length T: three times those of a forward pass, in which a share
    `predicted` of the tokens gets logits."""
    positions = torch.zeros(1, max(1, round(predicted * T)), dtype=torch.int64, device='meta')
    idx = torch.zeros(1, T, dtype=torch.int64, device='meta')
    return 3 * count_flops(lambda: on_meta(model, idx, positions=positions)) / T


def cache_bytes(model, dtype=None):
    """(bytes per token, further bytes that do not grow with the text, at most) of the cache of one
    sequence, in dtype or in the precision of the weights. Counted in a full cache."""
    size = model.config.block_size
    cache, idx = model.init_cache(1, size), torch.zeros(1, size, dtype=torch.int64, device='meta')
    count_flops(lambda: on_meta(model, idx, cache=cache))  # which replaces grouped_mm, see above
    item = (dtype or model.tok_emb.weight.dtype).itemsize
    return tuple(elements * item for elements in cache.elements())


def n_active_params(model):
    """Number of parameters that one token uses: of the routed experts, only its own."""
    unused = sum((1 - layer.n_chosen / layer.n_experts) * weight.numel()
                 for layer in model.modules() if isinstance(layer, MoE)
                 for weight in (layer.in_proj, layer.up_proj, layer.out_proj))
    return model.n_params() - round(unused)


# --------------------------------------------------------------------------------------------------
# kernels: what torch has, but faster, most of it on a CPU


def softmax_attention(q, k, v, mask=None, is_causal=False, *, scale, dropout_p=0.0, sink=None):
    """F.scaled_dot_product_attention of q (B, H, T, d), k (B, Hkv, S, d), v (B, Hkv, S, dv).

    sink (H,): a logit per head that counts in the denominator of the softmax and has no value. It
    is computed as one more key, before all others, with value zero. In an extra dimension that key
    holds 1, the other keys 0, and every query logit / scale, so fused kernels need no sink of their
    own.
    """
    d, dv, Hkv = q.size(-1), v.size(-1), k.size(1)
    if q.size(2) == 1 and q.size(1) != Hkv:
        # a decoding step: the heads of a group become queries of one head, which reads keys once
        if mask is not None and mask.dim() == 4 and mask.size(1) > 1:
            mask = mask.unflatten(1, (Hkv, -1)).flatten(2, 3)  # (B, H, 1, S) -> (B, Hkv, H/Hkv, S)
        q = q.unflatten(1, (Hkv, -1)).flatten(2, 3)  # (B, H, 1, d) -> (B, Hkv, H/Hkv, d)
        y = softmax_attention(q, k, v, mask, scale=scale, dropout_p=dropout_p, sink=sink)
        return y.flatten(1, 2)[:, :, None]
    if q.is_meta:  # padding and sinks are no useful arithmetic, see count_flops
        sink = None
    elif d != dv:  # flash kernels want equal widths; zeros change no product and cost less
        q, k, v = (F.pad(x, (0, max(d, dv) - x.size(-1))) for x in (q, k, v))
    if sink is not None:
        logit = (sink / scale).to(q.dtype).view(q.size(1), -1, 1)  # (H, 1, 1), or heads as queries
        logit = logit.expand(q.size(0), -1, q.size(2), 1)
        # is_causal aligns query i with key i: an extra first key needs an extra first query
        q = F.pad(torch.cat((q, logit), dim=-1), (0, 0, int(is_causal), 0))
        k, v = F.pad(k, (0, 1, 1, 0)), F.pad(v, (0, 1, 1, 0))
        k[:, :, 0, -1].fill_(1.0)
        if mask is not None:
            mask = F.pad(mask, (1, 0), value=mask.dtype == torch.bool)  # True, or nothing to add
    # a CPU has no kernel with dropout, and the backward pass of the one for bfloat16 is slow
    slow_fused = q.dtype == torch.bfloat16 and k.size(2) <= 512 and torch.is_grad_enabled()
    if (dropout_p or slow_fused) and q.device.type == 'cpu' and not torch.compiler.is_compiling():
        y = eager_attention(q, k, v, mask, is_causal, scale, dropout_p)
    else:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p,
                                           is_causal=is_causal, scale=scale,
                                           enable_gqa=q.size(1) != k.size(1))
    return (y if sink is None else y[:, :, int(is_causal):])[..., :dv]


def eager_attention(q, k, v, mask, is_causal, scale, dropout_p):
    """F.scaled_dot_product_attention, where that is slower on a CPU."""
    if q.size(1) != k.size(1):
        k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
    if is_causal:
        mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool).tril()
    scores = q @ (k * scale).transpose(-2, -1)  # (B, H, T, S)
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, -math.inf)
        scores.add_(mask)  # in place, and without a pass of its own in backward, as masked_fill has
    weights = scores.softmax(dim=-1)
    return (dropout(weights, dropout_p) if dropout_p else weights) @ v


def dropout(x, p):
    """F.dropout. A CPU draws random numbers one by one; here one draw of 64 bits serves four
    elements, 16 bits each, so 1-p is rounded to 2^-16."""
    if x.device.type != 'cpu' or torch.compiler.is_compiling():
        return F.dropout(x, p)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-2 ** 63, None)
    bits = bits.view(torch.int16)[:x.numel()].view(x.shape)  # from -2^15 to 2^15 - 1
    n_kept = max(1, round(2 ** 16 * (1 - p)))  # out of 2^16
    return x * (bits <= n_kept - 1 - 2 ** 15).to(x.dtype) * (2 ** 16 / n_kept)


def linear_cross_entropy(x, weight, targets):
    """Mean cross-entropy (nats) of the logits x @ weight.T as {'loss': scalar}, never holding more
    than a chunk of them: x (N, D), weight (V, D), targets (N,), -1 = not scored; 0 if there is no
    target. Without gradients also `accuracy`, the share of the targets that rank first."""
    chunk = 2 ** 27 if x.is_cuda else 2 ** 24  # logits, up to twice as many: 512 MB, CPU 64 MB
    n_chunks = max(1, x.size(0) * weight.size(0) // chunk)
    if torch.compiler.is_compiling():  # the loop unrolls
        n_chunks = min(8, n_chunks)
    size = -(-x.size(0) // n_chunks)
    if torch.is_grad_enabled():
        return {'loss': LinearCrossEntropy.apply(x, weight, targets, size)}
    loss, correct = 0.0, 0
    for row, target in zip(x.split(size), targets.split(size)):
        z = F.linear(row, weight)  # (size, V)
        z, index = z.to(torch.promote_types(z.dtype, torch.float32)), target.clamp(min=0)[:, None]
        own, (best, first) = z.gather(1, index), z.max(dim=-1, keepdim=True)
        z = torch.softmax(z, dim=-1, out=z)
        # -log p(target) = (best - own) - log p(best), because p(target) may underflow, p(best) not
        losses = best - z.gather(1, first).log() - own
        loss = loss + (losses[:, 0] * (target >= 0)).sum()
        correct = correct + (first[:, 0] == target).sum()
    n = (targets >= 0).sum().clamp(min=1)
    return {'loss': loss / n, 'accuracy': correct / n}


class LinearCrossEntropy(torch.autograd.Function):
    """linear_cross_entropy in training: the gradients of a chunk are formed while its logits are at
    hand, d loss / d logits = softmax - one-hot. All chunks use one buffer: fresh memory of this
    size costs a CPU more than the arithmetic. Sums are in float32 or better; matrix products have
    autocast's precision. Gradients are divided by the number of targets once, in backward."""

    @staticmethod
    def forward(ctx, x, weight, targets, size):
        device = x.device.type
        low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        high = torch.promote_types(low, torch.float32)
        rows, matrix, index = x.to(low), weight.to(low), targets.clamp(min=0)[:, None]
        scored = (targets >= 0).to(high)[:, None]  # (N, 1)
        logits, buffer = (torch.empty(size, weight.size(0), dtype=dtype, device=x.device)
                          for dtype in (low, high))  # (size, V)
        dx, trains = torch.empty_like(rows), ctx.needs_input_grad[1]
        dweight = torch.zeros_like(weight, dtype=high) if trains else None
        loss = torch.zeros((), dtype=high, device=x.device)
        for start in range(0, x.size(0), size):
            row, i, s = (tensor[start:start + size] for tensor in (rows, index, scored))
            z = torch.mm(row, matrix.t(), out=logits[:row.size(0)])
            p = z if low == high else buffer[:row.size(0)].copy_(z)
            p = torch.softmax(p, dim=-1, out=p)
            # a probability below 1e-38 counts as 1e-38, 87 nats; the gradient is right all the same
            loss = loss - (p.gather(1, i).clamp(min=torch.finfo(high).tiny).log() * s).sum()
            if torch.compiler.is_compiling():
                # is fused with the softmax, where scatter_add_ would want all of p in `high`
                p = (p - (torch.arange(p.size(1), device=p.device) == i).to(high)).to(low)
            else:
                p = z.copy_(p.scatter_add_(1, i, -torch.ones_like(s)))
            row, s = row * s.to(low), s.to(low)  # zeroes unscored rows without a pass over p
            dx[start:start + size] = p @ matrix * s
            if trains and low == high:
                torch.addmm(dweight, p.t(), row, out=dweight)
            elif trains:
                dweight.add_(p.t() @ row)
        n = scored.sum().clamp(min=1)
        ctx.save_for_backward(dx, dweight, n)
        ctx.dtypes = x.dtype, weight.dtype
        return loss / n

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        dx, dweight, n = ctx.saved_tensors
        scale = grad / n
        dweight = None if dweight is None else (dweight * scale).to(ctx.dtypes[1])
        return (dx * scale).to(ctx.dtypes[0]), dweight, None, None


# --------------------------------------------------------------------------------------------------
# checks of options


NOUNS = {int: 'an integer', float: 'a number', bool: 'True or False', str: 'UTF-8 text'}


def check_value(name, value, kind):
    """Raises ConfigError if the option `name`, whose type is `kind`, does not take this value."""
    if not allows(kind, value):
        raise ConfigError(f'{name}={value!r:.80}: must be {describe(kind)}')


def allows(kind, value):
    """Whether an option of the type `kind` takes this value."""
    origin, members = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(allows(member, value) for member in members)
    if origin is Annotated:
        return allows(members[0], value) and members[1].allows(value)
    if origin is Literal:
        return value in members
    if origin is tuple:
        return type(value) is tuple and value and all(allows(members[0], part) for part in value)
    if kind is float:  # finite, and no integer that is too large for a float
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    if kind is str:  # no file has a NUL in its name, and what was typed may not be UTF-8
        return type(value) is str and not re.search('[\0\ud800-\udfff]', value)
    return type(value) is kind


def describe(kind, brief=False):
    """A type in words: 'an integer >= 1'; brief, for --help: 'int >= 1'."""
    origin, members = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return ' or '.join(describe(member, brief) for member in members)
    if origin is Annotated:
        return f'{describe(members[0], brief)} {members[1]}'
    if origin is Literal:
        return ' | '.join(members) if brief else f'one of {", ".join(members)}'
    if origin is tuple:
        return f'({describe(members[0], brief)}, ...)'
    return 'None' if kind is type(None) else kind.__name__ if brief else NOUNS[kind]


def check_options(config):
    """Raises ConfigError if an option has a value that its type does not allow, or belongs to an
    option that is not set."""
    for option in fields(config):
        check_value(option.name, getattr(config, option.name), option.type)
    if config.attention not in ATTENTIONS:
        raise ConfigError(f'attention={config.attention!r}: must be one of {", ".join(ATTENTIONS)}')
    defaults = {option.name: option.default for option in fields(config)}
    belongs_to = dict(BELONGS_TO)
    for name in {name for attention in ATTENTIONS.values() for name in attention.options}:
        kinds = [kind for kind, attention in ATTENTIONS.items() if name in attention.options]
        belongs_to[name] = 'attention', kinds
    for name, (owner, kinds) in belongs_to.items():
        if name not in defaults or getattr(config, name) == defaults[name]:
            continue
        value = getattr(config, owner)
        if value not in kinds if kinds else value == defaults[owner]:
            wanted = f'{owner}={" or ".join(kinds)}' if kinds else owner
            raise ConfigError(f'{name}={getattr(config, name)!r} belongs to {wanted}: set that, or '
                              f'leave {name} out')


def require(config, name, meaning, owner='attention'):
    if getattr(config, name) is None:
        raise ConfigError(f'{owner}={getattr(config, owner)!r} needs {name}, {meaning}')


def require_divisible(config, name, by, remedy='change one'):
    n, divisor = getattr(config, name), getattr(config, by)
    if divisor and n % divisor:
        raise ConfigError(f'{name}={n} is not divisible by {by}={divisor}: {remedy}')


def require_at_most(config, name, limit):
    if getattr(config, name) > getattr(config, limit):
        raise ConfigError(f'{name}={getattr(config, name)} is more than '
                          f'{limit}={getattr(config, limit)}: change one')


def with_defaults(config, names, **changes):
    """A BlockConfig in which the options of these names have their defaults again."""
    return replace(config, **{name: getattr(BlockConfig, name) for name in names}, **changes)


def foreign_options(attention):
    """Names of the options that other attentions have and this one does not."""
    names = {name for other in ATTENTIONS.values() for name in other.options}
    return sorted(names - {*ATTENTIONS[attention].options})


# --------------------------------------------------------------------------------------------------
# tables: name an attention or an architecture of your own here

ATTENTIONS = {'mha': MHA, 'mla': MLA, 'gta': GTA, 'tpa': TPA, 'v4': V4}
ARCHITECTURES = {'transformer': (Transformer, TransformerConfig),
                 'encoder_decoder': (EncoderDecoder, EncoderDecoderConfig),
                 'grouped_latent': (GroupedLatent, GroupedLatentConfig)}
MOE_OPTIONS = ('n_routed_experts', 'n_experts_per_tok', 'n_shared_experts', 'expert_hidden',
               'n_group', 'topk_group', 'routed_scaling', 'router', 'balance_rate')

# {option: (the option without which it means nothing, the values that one must have; [] = any but
# its default)}. What belongs to an attention is in its class, see Attention.options.
BELONGS_TO = {
    **dict.fromkeys((*MOE_OPTIONS, 'first_k_dense'), ('mlp', ['moe'])),
    **dict.fromkeys(('o_norm', 'o_groups'), ('o_latent', [])),
    'rope_trained_length': ('rope_factor', []),
    **dict.fromkeys(('rope_beta_fast', 'rope_beta_slow'), ('rope_trained_length', [])),
    'norm_eps': ('norm', ['rms']),
    **dict.fromkeys(('embedding_loss_coeff', 'embedding_loss_affine'), ('embedding_loss', [])),
    'n_compress': ('compress', ['transformer']),
    'latent_loss_coeff': ('latent_loss', []),
    **dict.fromkeys(('channels_every', 'channel_mlp_mult', 'n_shared_mlp', 'merge'),
                    ('n_channels', [])),
}


def make_attention(config, kv_width=None):
    attention = ATTENTIONS[config.attention](config, kv_width)
    if not any(getattr(module, 'residual_out', False) for module in attention.modules()):
        raise TypeError(f'{type(attention).__name__}: its last Linear (o_proj, or a part of it) '
                        'needs residual_out=True, so that init_weights starts it small')
    return attention


def option_names(arch):
    _, config_class = ARCHITECTURES[arch]
    return {option.name for option in fields(config_class)} - {*config_class.derived}


def make_config(arch, **options):
    """The config of a model of the architecture `arch`, a key of ARCHITECTURES. Raises ConfigError
    on options that it does not have or that contradict each other."""
    if arch not in ARCHITECTURES:
        raise ConfigError(f'arch={arch!r}: must be one of {", ".join(ARCHITECTURES)}')
    if unknown := sorted(options.keys() - option_names(arch)):
        raise ConfigError(f'arch={arch!r} has no {unknown[0]}: leave it out')
    _, config_class = ARCHITECTURES[arch]
    return config_class(**options)


def make_model(arch, **options):
    """A model with new weights; see make_config."""
    config = make_config(arch, **options)
    model_class, _ = ARCHITECTURES[arch]
    return model_class(config)
