"""Transformers with multi-head latent attention (MLA) and a shared output latent (MLA-o), in one file.

Symbols, here and in every shape comment:

    B  batch            T  new tokens (queries)      S  tokens that are attended to (keys)
    D  n_embd           V  vocab_size                H  n_head            d  head_dim (dv: of the values)
    M  predicted positions a sequence in masked-language modelling
    N  rows that meet the vocabulary: B*T, or B*M

Papers: MHA, Vaswani et al. 2017; RoPE, Su et al. 2021 (arXiv 2104.09864); grouped queries, Ainslie et al. 2023
(2305.13245); MLA, DeepSeek-V2 (2405.04434, section 2.1) and DeepSeek-V3 (2412.19437, section 2.1.1).
"""

import math
from dataclasses import dataclass, fields
from typing import Literal, get_args

import torch
import torch.nn as nn
import torch.nn.functional as F


class ConfigError(ValueError):
    """Options that contradict each other, or that an architecture does not have. The message says how to mend it."""


# ----------------------------------------------------------------------------------------------------------------
# norm, linear, rope, attend


class RMSNorm(nn.RMSNorm):
    """RMSNorm, eps 1e-6. The gain takes the input's precision: under autocast latents are bfloat16 and gains float32,
    and the fused kernel wants one of the two."""

    def __init__(self, width):
        super().__init__(width, eps=1e-6)

    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps).type_as(x)  # latents are cached


def make_norm(kind, width):
    return RMSNorm(width) if kind == 'rms' else nn.LayerNorm(width, eps=1e-5, bias=False)


def linear(n_in, n_out, bias, rank=None, inner_norm=False):
    """A dense matrix, or two of rank `rank` with an RMSNorm between them; the bias belongs to the last one."""
    if rank is None:
        return nn.Linear(n_in, n_out, bias=bias)
    norm = [RMSNorm(rank)] if inner_norm else []
    return nn.Sequential(nn.Linear(n_in, rank, bias=False), *norm, nn.Linear(rank, n_out, bias=bias))


def fused_linear(n_in, *n_outs, bias=False):
    """One matrix for several projections of the same input. `splits` says which rows are whose: split_fused splits the
    output by it, and Muon, which orthogonalises one projection at a time, the weight."""
    layer = nn.Linear(n_in, sum(n_outs), bias=bias)
    layer.splits = n_outs
    return layer


def make_dropout(p):
    return nn.Dropout(p) if p else nn.Identity()  # a Dropout of 0 takes its time too, at every token


def split_fused(layer, x):
    return layer(x).split(layer.splits, dim=-1)


def rope_table(length, rope_dims, theta):
    """cos and sin, each (length, rope_dims/2), of position times theta^(-2i/rope_dims). RoFormer, section 3.2.2."""
    frequency = theta ** (-torch.arange(0, rope_dims, 2, dtype=torch.float64) / rope_dims)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    return angle.cos().float(), angle.sin().float()


def rotate(x, rope):
    """Rotates the first rope_dims dimensions of x (..., T, d), which holds the last T positions of the table: pairs are
    i and i + rope_dims/2."""
    cos, sin = (table[table.size(0) - x.size(-2):] for table in rope)  # float32: in bfloat16 neighbours would share an angle
    half = cos.size(-1)
    a, b, rest = x.split((half, half, x.size(-1) - 2 * half), dim=-1)
    return torch.cat(((a * cos - b * sin).type_as(x), (b * cos + a * sin).type_as(x), rest), dim=-1)


def split_heads(x, n_head):
    return x.unflatten(-1, (n_head, -1)).transpose(1, 2)  # (B, T, H*d) -> (B, H, T, d)


def attend(q, k, v, causal=False, key_mask=None, dropout=0.0, window=None):
    """Softmax attention, (B, H, T, d), (B, Hkv, S, d), (B, Hkv, S, dv) -> (B, T, H*dv).

    key_mask (B, S) bool, True = may be attended to; or any mask that broadcasts to (B, H, T, S). causal: the queries are
    the last T of the S positions, and with a window see only the last `window` keys. Scale 1/sqrt(d). The flash kernels
    want heads of one width: the narrower of d and dv is padded with zeros, which changes no product and is cheaper than
    the unfused path.
    """
    T, S = q.size(2), k.size(2)
    d, dv = q.size(-1), v.size(-1)
    if d < dv:
        q, k = F.pad(q, (0, dv - d)), F.pad(k, (0, dv - d))
    elif dv < d:
        v = F.pad(v, (0, d - dv))
    narrow = window is not None and S > window
    if narrow:
        if T == S:
            return attend_in_windows(q, k, v, window, dropout, d ** -0.5)[..., :dv].transpose(1, 2).flatten(2)
        k, v, S = k[:, :, -(T + window - 1):], v[:, :, -(T + window - 1):], min(S, T + window - 1)
    mask = key_mask if key_mask is None or key_mask.dim() == 4 else key_mask[:, None, None, :]  # (B, 1, 1, S)
    if causal and T > 1 and (T < S or narrow):  # is_causal would take the queries for the first T positions
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
        if narrow:
            mask = mask.triu(S - T - window + 1)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=d ** -0.5,
                                       is_causal=causal and mask is None and T > 1, enable_gqa=q.size(1) != k.size(1))
    return y[..., :dv].transpose(1, 2).flatten(2)  # (B, H, T, dv) -> (B, T, H*dv)


def attend_in_windows(q, k, v, window, dropout, scale):
    """Causal attention in which a query sees the last `window` keys, (B, H, T, d) -> (B, H, T, dv): windows are folded
    into the batch and each meets its own keys and those of the one before, T * 2 * window products instead of T * T."""
    B, T = q.size(0), q.size(2)
    q, k, v = (F.pad(x, (0, 0, 0, -T % window)).unflatten(2, (-1, window)) for x in (q, k, v))  # (B, H, n, W, d)
    k, v = (torch.cat((F.pad(x, (0, 0, 0, 0, 1, 0))[:, :, :-1], x), dim=3) for x in (k, v))  # (B, H, n, 2W, d)
    n = q.size(2)
    mask = torch.ones(window, 2 * window, dtype=torch.bool, device=q.device).tril(window).triu(1)
    mask = mask.repeat(n, 1, 1)
    mask[0, :, :window] = False  # nothing stands before the first
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # (B*n, H, ., d)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.repeat(B, 1, 1)[:, None], dropout_p=dropout,
                                       scale=scale, enable_gqa=q.size(1) != k.size(1))
    return y.unflatten(0, (B, n)).transpose(1, 2).flatten(2, 3)[:, :, :T]


# ----------------------------------------------------------------------------------------------------------------
# attention


class Attention(nn.Module):
    """What every attention shares. A subclass builds its projections, `o_proj` among them, and says in `qkv` how
    queries, keys and values come about, or in `heads` what it makes of them; `options` names the options that it alone
    understands.

    Keys and values come from x, or in cross-attention, built with source_width, from `source`, another sequence of
    that width at the same positions. With a cache, x and source hold the new tokens alone, and the keys and values of
    those before come from it.
    """

    options = ()

    def __init__(self, config, source_width=None):
        super().__init__()
        self.n_head, self.head_dim, self.v_head_dim = config.n_head, config.head_dim, config.head_dim
        self.causal, self.dropout = config.causal, config.attention_dropout
        self.window, self.n_channels = None, 1  # set by GroupedLatent, where it has them

    def qkv(self, x, rope, source, cache):
        """x (B, T, D) -> q (B, H, T, d), k (B, Hkv, S, d), v (B, Hkv, S, dv), rotated where the options say so. rope: cos
        and sin up to the last position; where keys have other positions than queries, four tables, theirs last."""
        raise NotImplementedError

    def heads(self, x, rope=None, key_mask=None, source=None, cache=None):
        """What the heads have read, side by side: (B, T, D) -> (B, T, H*dv)."""
        q, k, v = self.qkv(x, rope, source, cache)
        return attend(q, k, v, self.causal, key_mask, self.dropout if self.training else 0.0, self.window)

    def forward(self, x, *context):
        return self.o_proj(self.heads(x, *context))

    def score_flops(self, keys):
        """Forward FLOPs a query of q.k and of the weighted sum of v, over so many keys."""
        return 2 * self.n_channels * self.n_head * (self.head_dim + self.v_head_dim) * keys

    def cache_width(self):
        """Numbers that generation has to keep for a token in this layer."""
        raise NotImplementedError


class MHA(Attention):
    """Multi-head attention; with n_kv_head < n_head, grouped-query attention."""

    options = ('n_kv_head', 'qk_norm', 'bias')

    def __init__(self, config, source_width=None):
        super().__init__(config)
        self.n_kv_head = config.n_kv_head or config.n_head
        q_width, kv_width = self.n_head * self.head_dim, self.n_kv_head * self.head_dim
        if source_width is None:
            self.qkv_proj = fused_linear(config.n_embd, q_width, kv_width, kv_width, bias=config.bias)
        else:
            self.q_proj = nn.Linear(config.n_embd, q_width, bias=config.bias)
            self.kv_proj = fused_linear(source_width, kv_width, kv_width, bias=config.bias)
        self.q_norm = RMSNorm(self.head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim) if config.qk_norm else nn.Identity()
        self.o_proj = nn.Linear(q_width, config.n_embd, bias=config.bias)

    def qkv(self, x, rope, source, cache):
        if source is None:
            q, k, v = split_fused(self.qkv_proj, x)
        else:
            q, (k, v) = self.q_proj(x), split_fused(self.kv_proj, source)
        q = self.q_norm(split_heads(q, self.n_head))
        k = self.k_norm(split_heads(k, self.n_kv_head))
        v = split_heads(v, self.n_kv_head)
        if rope is not None:
            q, k = rotate(q, rope[:2]), rotate(k, rope[-2:])
        return (q, k, v) if cache is None else (q, *cache.extend(self, k, v))

    def cache_width(self):
        return 2 * self.n_kv_head * self.head_dim


class MLA(Attention):
    """Multi-head latent attention (DeepSeek-V2, section 2.1): keys and values of all heads come from one latent of
    kv_latent numbers a token, queries from one of q_latent (None: straight from x). With o_latent, MLA-o, the heads
    also write through a shared latent: W^O becomes a per-head matrix into it and one shared matrix out of it.

    Inside a head the rotated dimensions come first. rope_key='per_head': each head's first rope_dims key dimensions
    are rotated. 'shared' (DeepSeek): a key is [one rotated key of rope_dims for all heads, straight from x | the
    head's own head_dim - rope_dims]. No biases. Only latents are cached, but for 'per_head' generation has to make the
    rotated keys of all cached tokens again at each step, S*H*rope_dims*kv_latent multiply-adds a layer: at 8 heads of
    32 and a latent of 32 about 17 times the arithmetic of MHA, where the shared key costs 1.25 times.
    """

    options = ('q_latent', 'kv_latent', 'o_latent', 'rope_key', 'v_head_dim', 'o_norm')

    def __init__(self, config, source_width=None):
        super().__init__(config)
        self.v_head_dim = config.v_head_dim or config.head_dim
        self.kv_latent, self.rope_dims = config.kv_latent, config.rope_dims
        self.shared_dims = config.rope_dims if config.rope_key == 'shared' else 0
        q_width, v_width = self.n_head * self.head_dim, self.n_head * self.v_head_dim
        k_width = q_width - self.n_head * self.shared_dims

        q_a_width = config.q_latent or q_width
        if source_width is None:
            self.qkv_a_proj = fused_linear(config.n_embd, q_a_width, self.kv_latent, self.shared_dims)
        else:
            self.q_a_proj = nn.Linear(config.n_embd, q_a_width, bias=False)
            self.kv_a_proj = fused_linear(source_width, self.kv_latent, self.shared_dims)
        self.q_a_norm = RMSNorm(config.q_latent) if config.q_latent else nn.Identity()
        self.q_b_proj = nn.Linear(config.q_latent, q_width, bias=False) if config.q_latent else nn.Identity()
        self.kv_a_norm = RMSNorm(self.kv_latent)
        self.kv_b_proj = fused_linear(self.kv_latent, k_width, v_width)
        if config.o_latent:
            self.o_proj = OutputLatent(self.n_head, v_width, config.o_latent, config.n_embd, config.o_norm)
        else:
            self.o_proj = nn.Linear(v_width, config.n_embd, bias=False)

    def heads(self, x, rope=None, key_mask=None, source=None, cache=None):
        if source is None:
            q, latent, k_shared = split_fused(self.qkv_a_proj, x)
        else:
            q, (latent, k_shared) = self.q_a_proj(x), split_fused(self.kv_a_proj, source)
        q, latent = split_heads(self.q_b_proj(self.q_a_norm(q)), self.n_head), self.kv_a_norm(latent)
        if rope is not None:
            q = rotate(q, rope[:2])
            k_shared = rotate(k_shared, rope[-2:]) if self.shared_dims else k_shared
        if cache is not None:
            latent, k_shared = cache.extend(self, latent, k_shared)
            if self.window is not None and x.size(1) == 1:
                latent, k_shared = latent[:, -self.window:], k_shared[:, -self.window:]
            if x.size(1) == 1 and self.causal and self.n_channels == 1:
                return self.absorbed(q[:, :, 0], latent, k_shared, rope)
        k, v = split_fused(self.kv_b_proj, latent)
        k, v = split_heads(k, self.n_head), split_heads(v, self.n_head)
        if self.shared_dims:
            k_shared = k_shared[:, None].expand(-1, self.n_head, -1, -1)  # (B, S, r) -> (B, H, S, r)
            k = torch.cat((k_shared, k), dim=-1)
        elif rope is not None:
            k = rotate(k, rope[-2:])
        return attend(q, k, v, self.causal, key_mask, self.dropout if self.training else 0.0, self.window)

    def absorbed(self, q, latent, k_shared, rope):
        """`heads` for one token of generation, q (B, H, d), latent (B, S, L), k_shared (B, S, r): kv_b_proj is applied to
        the query and to the weighted sum of latents, not to S keys and values (DeepSeek-V2, section 2.1.2)."""
        to_k, to_v = self.kv_b_proj.weight.split(self.kv_b_proj.splits)
        to_k, to_v = to_k.unflatten(0, (self.n_head, -1)), to_v.unflatten(0, (self.n_head, -1))  # (H, d, L), (H, dv, L)
        q_rotated, q_plain = q.split((self.rope_dims, self.head_dim - self.rope_dims), dim=-1)
        scores = 0.0
        if self.shared_dims:
            scores = q_rotated @ k_shared.transpose(1, 2)  # (B, H, S)
        elif self.rope_dims:
            to_rotated, to_k = to_k.split((self.rope_dims, self.head_dim - self.rope_dims), dim=1)
            k_rotated = rotate(split_heads(F.linear(latent, to_rotated.flatten(0, 1)), self.n_head), rope[-2:])
            scores = (k_rotated @ q_rotated[..., None])[..., 0]  # (B, H, S, r) -> (B, H, S)
        q_latent = (q_plain[:, :, None] @ to_k)[:, :, 0]  # (B, H, L)
        scores = scores + q_latent @ latent.transpose(1, 2)
        weights = (scores * self.head_dim ** -0.5).softmax(dim=-1)
        y = (weights @ latent)[:, :, None] @ to_v.transpose(1, 2)  # (B, H, 1, dv)
        return y.transpose(1, 2).flatten(2)  # (B, 1, H*dv)

    def cache_width(self):
        return self.kv_latent + self.shared_dims


class OutputLatent(nn.Module):
    """MLA-o's output projection, (B, T, H*dv) -> (B, T, D) through a latent of `rank` that all heads share.

    norm: 'none', 'sum' (RMSNorm of the latent) or 'head' (RMSNorm of each head's contribution to it with a gain of
    its own, then their sum over sqrt(H)).
    """

    def __init__(self, n_head, n_in, rank, n_out, norm='none', bias=False):
        super().__init__()
        self.n_head, self.norm = n_head, norm
        self.o_a_proj = nn.Linear(n_in, rank, bias=False)
        self.o_b_proj = nn.Linear(rank, n_out, bias=bias)
        if norm == 'head':
            self.gain = nn.Parameter(torch.ones(n_head, rank))
        self.o_norm = RMSNorm(rank) if norm == 'sum' else nn.Identity()

    def forward(self, y):
        if self.norm == 'head':
            y = y.unflatten(-1, (self.n_head, -1))  # (B, T, H, dv)
            per_head = self.o_a_proj.weight.unflatten(1, (self.n_head, -1))  # (rank, H, dv)
            latent = torch.einsum('bthd,rhd->bthr', y, per_head)
            latent = F.rms_norm(latent, latent.shape[-1:], eps=1e-6) * self.gain
            latent = latent.sum(dim=2) / math.sqrt(self.n_head)  # (B, T, H, rank) -> (B, T, rank)
        else:
            latent = self.o_norm(self.o_a_proj(y))
        return self.o_b_proj(latent)


ATTENTIONS = {'mha': MHA, 'mla': MLA}


# ----------------------------------------------------------------------------------------------------------------
# feed-forward, block


class MLP(nn.Module):
    """Position-wise feed-forward. gelu: out(gelu(in x)); relu2: out(relu(in x)^2); swiglu: out(silu(in x) * gate x).
    With a rank, each of the matrices is two, and the inner ones have an RMSNorm in the middle."""

    def __init__(self, config, rank=None):
        super().__init__()
        self.kind = config.mlp
        width, hidden, bias = config.n_embd, config.mlp_hidden, config.mlp_bias
        self.in_proj = linear(width, hidden, bias, rank, inner_norm=True)
        if self.kind == 'swiglu':
            self.gate_proj = linear(width, hidden, bias, rank, inner_norm=True)
        self.out_proj = linear(hidden, width, bias, rank)

    def forward(self, x):
        h = self.in_proj(x)  # (B, T, hidden)
        if self.kind == 'gelu':
            h = F.gelu(h)
        elif self.kind == 'relu2':
            h = F.relu(h).square()
        else:
            h = F.silu(h) * self.gate_proj(x)
        return self.out_proj(h)


class Block(nn.Module):
    """Pre-norm residual block. The first n_dense layers have plain MHA and undecomposed feed-forwards."""

    def __init__(self, config, layer):
        super().__init__()
        dense = layer < config.n_dense
        self.attn_norm = make_norm(config.norm, config.n_embd)
        self.attn = (MHA if dense else ATTENTIONS[config.attention])(config)
        self.mlp_norm = make_norm(config.norm, config.n_embd)
        self.mlp = MLP(config, rank=None if dense else config.mlp_rank)
        self.dropout = make_dropout(config.dropout)

    def forward(self, x, rope=None, key_mask=None, cache=None):
        x = x + self.dropout(self.attn(self.attn_norm(x), rope, key_mask, None, cache))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class CrossBlock(Block):
    """A block that also reads another sequence, between its attention and its feed-forward."""

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.cross_norm, self.source_norm = (make_norm(config.norm, config.n_embd) for _ in range(2))
        self.cross = (MHA if layer < config.n_dense else ATTENTIONS[config.attention])(config.cross(), config.n_embd)

    def forward(self, x, source, rope=None, cross_rope=None, cache=None):
        x = x + self.dropout(self.attn(self.attn_norm(x), rope, None, None, cache))
        x = x + self.dropout(self.cross(self.cross_norm(x), cross_rope, None, self.source_norm(source), cache))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


# ----------------------------------------------------------------------------------------------------------------
# options: the comment behind a field is its line in --help, and its type is what the command line checks


@dataclass
class ModelConfig:
    """Options of every architecture. Contradictions raise ConfigError."""

    vocab_size: int = 50257  # rows of the embedding, the tokenizer's special tokens included
    block_size: int = 256  # longest sequence, tokens
    n_layer: int = 6  # number of blocks
    n_head: int = 8  # attention heads
    n_embd: int = 256  # width of the residual stream
    head_dim: int | None = None  # width of a query and key head; None = n_embd / n_head
    dropout: float = 0.0  # on the embeddings and on what each branch adds
    attention_dropout: float | None = None  # on the attention weights; None = dropout
    bias: bool = False  # biases in the attention projections
    attention: str = 'mha'  # mha, mla, or another key of model.ATTENTIONS
    n_kv_head: int | None = None  # mha: key and value heads (grouped queries); None = n_head
    qk_norm: bool = False  # mha: RMSNorm on the queries and keys of a head
    q_latent: int | None = None  # mla: width of the query latent; None = queries straight from x
    kv_latent: int | None = None  # mla: width of the key-value latent
    o_latent: int | None = None  # mla: width of the shared output latent (MLA-o); None = dense output
    o_norm: Literal['none', 'sum', 'head'] = 'none'  # mla: RMSNorm in the output latent: of the sum, or of each head's part
    v_head_dim: int | None = None  # mla: width of a value head; None = head_dim
    rope_key: Literal['per_head', 'shared'] = 'per_head'  # mla: rotated key dimensions, each head's own or one key for all
    rope_dims: int = 0  # rotary dimensions of a head, its first ones; 0 = none
    rope_theta: float = 10000.0  # rotary base
    learned_positions: bool = True  # a learned embedding of the position
    norm: Literal['layer', 'rms'] = 'layer'  # LayerNorm without bias, or RMSNorm
    final_norm: bool = True  # a norm before the vocabulary
    mlp: Literal['gelu', 'swiglu', 'relu2'] = 'gelu'  # feed-forward
    mlp_hidden: int | None = None  # hidden width of the feed-forward; None = 4 n_embd
    mlp_bias: bool = False  # biases in the feed-forward
    mlp_rank: int | None = None  # each feed-forward matrix as two of this rank; None = dense
    vocab_rank: int | None = None  # embedding and head through this rank; None = dense
    n_dense: int = 0  # first layers that keep mha and dense feed-forwards
    tie_embeddings: bool = True  # the head is the embedding, transposed
    init_std: float = 0.02  # standard deviation of the initial weights
    subtract_next_position: bool = False  # causal: take the next position's embedding off before the vocabulary

    def __post_init__(self):
        self.check_ranges()
        if self.head_dim is None:
            if self.n_embd % self.n_head:
                raise ConfigError(f'n_embd={self.n_embd} is not divisible by n_head={self.n_head}: '
                                  'change one, or set head_dim')
            self.head_dim = self.n_embd // self.n_head
        if self.mlp_hidden is None:
            self.mlp_hidden = 4 * self.n_embd
        if self.attention_dropout is None:
            self.attention_dropout = self.dropout
        if self.rope_dims % 2 or self.rope_dims > self.head_dim:
            raise ConfigError(f'rope_dims={self.rope_dims}: takes an even number up to head_dim={self.head_dim} '
                              '(n_embd / n_head, unless set)')
        if self.vocab_rank and not self.tie_embeddings:
            raise ConfigError('vocab_rank shares its matrices with the head: it needs tie_embeddings=True')
        if self.n_dense > self.n_layer:
            raise ConfigError(f'n_dense={self.n_dense} is more than n_layer={self.n_layer}')
        if self.subtract_next_position and not (self.learned_positions and self.causal):
            raise ConfigError('subtract_next_position takes the embedding of the next position off the last state of a '
                              'causal model: it needs learned_positions=True and causal=True')
        self.check_attention()

    def check_ranges(self):
        may_be_zero = ('dropout', 'attention_dropout', 'rope_dims', 'n_dense', 'n_shared_mlp')
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            choices = ATTENTIONS if name == 'attention' else get_args(field.type) if isinstance(value, str) else ()
            if choices and value not in choices:
                raise ConfigError(f'{name}={value!r}: takes one of {", ".join(map(str, choices))}')
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                if not 0 <= value < math.inf or value == 0 and name not in may_be_zero:
                    raise ConfigError(f'{name}={value}: takes a finite number above zero'
                                      + (', or zero' if name in may_be_zero else ''))
            if name.endswith('dropout') and value is not None and value >= 1:
                raise ConfigError(f'{name}={value}: takes a probability below 1')

    def check_attention(self):
        defaults = {field.name: field.default for field in fields(self)}
        for name in (name for other in ATTENTIONS.values() for name in other.options):
            if name not in ATTENTIONS[self.attention].options and getattr(self, name) != defaults[name]:
                raise ConfigError(f'attention={self.attention!r} has no {name}: leave it at {defaults[name]}')
        if self.n_kv_head and self.n_head % self.n_kv_head:
            raise ConfigError(f'n_head={self.n_head} is not divisible by n_kv_head={self.n_kv_head}')
        if self.attention != 'mla':
            return
        if not self.kv_latent:
            raise ConfigError("attention='mla' needs kv_latent, the width of its key-value latent")
        if self.o_norm != 'none' and not self.o_latent:
            raise ConfigError(f'o_norm={self.o_norm!r} normalises the output latent: set o_latent')
        if self.rope_key == 'shared' and not 0 < self.rope_dims < self.head_dim:
            raise ConfigError(f"rope_key='shared' needs rope_dims between 2 and head_dim-1={self.head_dim - 1}: "
                              'the other dimensions are the heads\' own')


@dataclass
class TransformerConfig(ModelConfig):
    """One stack of blocks: a decoder (causal) or an encoder."""

    causal: bool = True  # decoder; False = encoder, trained by masked-language modelling


@dataclass
class GroupedLatentConfig(ModelConfig):
    """Tokens in groups, each compressed to a few latents; n_layer blocks over the latents, and back to the tokens."""

    causal = True  # not an option
    n_layer: int = 16  # blocks of the trunk, at the widest width
    n_embd: int | None = None  # the first of widths
    n_head: int | None = None  # follows from widths and head_dim
    head_dim: int = 32  # width of a head, on every level
    block_size: int = 768  # longest sequence, tokens
    learned_positions: bool = False  # only where in its group a slot stands is learned
    init_std: float | None = None  # of the initial weights; None = 1/sqrt(fan in), a tenth of it into the residual stream
    group_size: int = 48  # tokens a group
    latents: tuple[int, ...] = (16, 2)  # latents a group, level by level
    widths: tuple[int, ...] = (64, 128, 256)  # of the tokens and of each level of latents
    compress: Literal['transformer', 'perceiver'] = 'transformer'  # how a level's last slots read the group
    n_compress: int = 1  # transformer: blocks that do so
    n_mix: int = 1  # pairs of a local and a global block, on each level and each way
    interleave: bool = True  # local and global in turn; False = all local first
    upsample: Literal['repeat', 'attention'] = 'repeat'  # how a level's slots get at the latents above
    skip: Literal['sum', 'learned'] = 'sum'  # latents + slots, or with a learned vector before each
    global_window: int | None = None  # tokens that a global block on the token level sees; None = all
    dense_former: bool = False  # a trunk block reads a learned sum of all outputs before it
    latent_loss: bool = False  # each trunk output predicts the next trunk input
    latent_loss_coeff: float = 1.0  # its weight beside the cross-entropy
    n_channels: int | None = None  # parallel attentions and feed-forwards in trunk blocks; None = plain blocks
    channels_every: int = 1  # channels: in every so many-th trunk block
    channel_mlp_mult: float = 1.0  # channels: hidden width of a channel, times 4 n_embd / n_channels
    n_shared_mlp: int = 0  # channels: further feed-forwards that all channels share
    merge: Literal['softmax', 'max', 'mean'] = 'softmax'  # channels: how they become one again, element by element

    def __post_init__(self):
        sizes = (self.group_size, *self.latents)
        if self.head_dim is None:
            raise ConfigError('head_dim: grouped latents need a number, the same on every level')
        if any(k <= next_k for k, next_k in zip(sizes, self.latents)):
            raise ConfigError(f'group_size={self.group_size}, latents={self.latents}: each level has fewer than the last')
        if len(self.widths) != len(sizes):
            raise ConfigError(f'widths={self.widths}: takes {len(sizes)}, of the tokens and of each of latents={self.latents}')
        if min(*sizes, *self.widths, self.head_dim) < 1:
            raise ConfigError('group_size, latents, widths and head_dim are above zero')
        if odd := [width for width in self.widths if width % self.head_dim]:
            raise ConfigError(f'widths={self.widths}: {odd[0]} is not divisible by head_dim={self.head_dim}')
        if self.block_size < self.group_size:
            raise ConfigError(f'block_size={self.block_size}: takes at least one group, group_size={self.group_size}')
        for name, value in (('n_embd', self.widths[0]), ('n_head', self.widths[0] // self.head_dim),
                            ('mlp_hidden', 4 * self.widths[0]), ('n_dense', 0), ('learned_positions', False)):
            if getattr(self, name) not in (None, value):
                raise ConfigError(f'{name}={getattr(self, name)}: leave it out, widths and group_size decide here')
            setattr(self, name, value)
        needed = dict.fromkeys(('channels_every', 'channel_mlp_mult', 'n_shared_mlp', 'merge'), 'n_channels')
        for name, needs in (needed | dict(latent_loss_coeff='latent_loss')).items():
            if not getattr(self, needs) and getattr(self, name) != getattr(type(self), name):
                raise ConfigError(f'{name} belongs to {needs}: set that too')
        if self.compress == 'perceiver' and self.n_compress != type(self).n_compress:
            raise ConfigError("n_compress belongs to compress='transformer'")
        if self.channels_every > self.n_layer:
            raise ConfigError(f'channels_every={self.channels_every}: of {self.n_layer} blocks none would have channels')
        if self.n_channels is not None and (self.o_norm == 'head' or self.n_channels < 2):
            raise ConfigError(f"n_channels={self.n_channels}: takes two or more, and no o_norm='head'")
        super().__post_init__()

    def level(self, i, **changes):
        """The options of a block on level i."""
        width = self.widths[i]
        options = {field.name: getattr(self, field.name) for field in fields(ModelConfig)}
        options |= dict(n_embd=width, n_head=width // self.head_dim, mlp_hidden=4 * width, init_std=1.0)
        return TransformerConfig(**options | changes)


@dataclass
class EncoderDecoderConfig(ModelConfig):
    """Two causal stacks, the second of which reads the first."""

    causal = True  # not an option
    n_decoder_layer: int | None = None  # blocks of the decoder; None = n_layer, those of the encoder
    cross_n_head: int | None = None  # heads of the cross-attention, n_embd / cross_n_head wide; None = 2 n_head
    embedding_loss: Literal['none', 'mse', 'cosine', 'log_cosine'] = 'none'  # between mean embeddings and encoder output
    embedding_loss_coeff: float = 1.0  # its weight beside the cross-entropy
    embedding_loss_affine: bool = True  # gains and biases in its two LayerNorms: with them it can shrink itself

    def __post_init__(self):
        super().__post_init__()
        self.n_decoder_layer = self.n_decoder_layer or self.n_layer
        self.cross_n_head = self.cross_n_head or 2 * self.n_head
        if self.n_embd % self.cross_n_head:
            raise ConfigError(f'n_embd={self.n_embd} is not divisible by cross_n_head={self.cross_n_head}: change one')
        if self.n_dense > self.n_decoder_layer:
            raise ConfigError(f'n_dense={self.n_dense} is more than n_decoder_layer={self.n_decoder_layer}')
        if self.embedding_loss == 'none' and (self.embedding_loss_coeff, self.embedding_loss_affine) != (1.0, True):
            raise ConfigError("embedding_loss_coeff and embedding_loss_affine belong to an embedding_loss: it is 'none'")
        try:
            self.cross()
        except ConfigError as error:
            raise ConfigError(f'cross-attention, cross_n_head={self.cross_n_head}: {error}') from None

    def cross(self):
        """The options of the cross-attention. Its heads rotate as many dimensions as they have, up to rope_dims."""
        width = self.n_embd // self.cross_n_head
        options = {field.name: getattr(self, field.name) for field in fields(ModelConfig)}
        options |= dict(n_head=self.cross_n_head, head_dim=width, v_head_dim=None,
                        rope_dims=min(self.rope_dims, width // 2 * 2))
        return TransformerConfig(**options)


# ----------------------------------------------------------------------------------------------------------------
# models


def init_weights(model):
    """The one place where weights get their first values. Biases 0, gains 1, matrices and embeddings normal with init_std;
    matrices that write into a residual stream are divided by the root of how many of them write into it, GPT-2's rule,
    so that its variance at the end does not grow with depth. With init_std=None (grouped latents, which stay at the
    entropy of token frequencies if all begins small) it is 1/sqrt(fan in), embeddings 1/sqrt(width), slot embeddings
    half of that, and a tenth for what writes into the residual stream or goes up a level: at the start the skips rule."""
    std = model.config.init_std
    parts = 'o_proj.weight', 'o_b_proj', 'out_proj.weight', 'out_proj.1.weight', 'up_proj'
    writers = [name for name, _ in model.named_parameters() if any(part in name for part in parts)]
    stacks = [name.split('.')[0] for name in writers]
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or name.endswith('gain'):
            continue  # norms start at 1 and are left there
        if std is not None:
            scale = std / math.sqrt(stacks.count(name.split('.')[0]) if name in writers else 1)
        else:
            scale = parameter.size(-1) ** -0.5 * (0.1 if name in writers else 0.5 if 'slot_emb' in name else 1.0)
        nn.init.normal_(parameter, std=scale)
    for module in model.modules():
        if isinstance(module, (nn.Linear, ChannelLinear)) and module.bias is not None:
            nn.init.zeros_(module.bias)


class LanguageModel(nn.Module):
    """What every architecture shares: embedding, final norm, head, loss, generation. A subclass builds its blocks and
    says in `trunk` what they do with the embedded tokens."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.tok_emb = nn.Embedding(config.vocab_size, config.vocab_rank or config.n_embd)
        if config.vocab_rank:
            self.vocab_proj = nn.Linear(config.vocab_rank, config.n_embd, bias=False)
        if config.learned_positions:
            self.pos_emb = nn.Embedding(config.block_size + config.subtract_next_position, config.n_embd)
        self.dropout = make_dropout(config.dropout)
        self.norm = make_norm(config.norm, config.n_embd) if config.final_norm else nn.Identity()
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def add_rope(self, name, rope_dims, length=None):
        """Registers the tables NAME_cos and NAME_sin of block_size positions or more; `rope` cuts them to a length."""
        if rope_dims:
            tables = rope_table(length or self.config.block_size, rope_dims, self.config.rope_theta)
            for part, table in zip(('cos', 'sin'), tables):
                self.register_buffer(f'{name}_{part}', table, persistent=False)

    def rope(self, name, end):
        tables = [getattr(self, f'{name}_{part}', None) for part in ('cos', 'sin')]
        return None if tables[0] is None else [table[:end] for table in tables]

    def trunk(self, x, end, key_mask, cache):
        """Embedded tokens x (B, T, D), the last of which has position end - 1 -> (states (B, T, D) before the final norm,
        further scalars by name: those with an option NAME_coeff are added to the loss, others are only reported)."""
        raise NotImplementedError

    def states(self, idx, key_mask=None, cache=None):
        """idx (B, T) -> (final hidden states (B, T, D), further scalars as `trunk` gives them)."""
        start = 0 if cache is None else cache.n_tokens
        end = start + idx.size(1)
        if end > (self.config.block_size if cache is None else cache.length):
            raise ValueError(f'{end} tokens, but block_size is {self.config.block_size}' if cache is None else
                             f'{end} tokens, but the cache has room for {cache.length}')
        if cache is not None and cache.batch != idx.size(0):
            raise ValueError(f'{idx.size(0)} sequences, but the cache was made for {cache.batch}')
        if key_mask is not None and self.config.causal:
            raise ValueError('a causal model takes no key_mask: give it sequences of one length')
        x = self.tok_emb(idx)
        if self.config.vocab_rank:
            x = self.vocab_proj(x)
        if self.config.learned_positions:
            x = x + self.pos_emb.weight[start:end]
        x, extra = self.trunk(self.dropout(x), end, key_mask, cache)
        if cache is not None:
            cache.n_tokens = end
        return self.norm(x), extra

    def hidden(self, idx, key_mask=None, cache=None):
        """idx (B, T) int64 -> final hidden states (B, T, D). key_mask (B, T) bool, True = a real token; encoders only."""
        return self.states(idx, key_mask, cache)[0]

    def head_weight(self):
        """(V, R): the logits are the products of its rows with what to_vocab returns."""
        return self.tok_emb.weight if self.config.tie_embeddings else self.lm_head.weight

    def to_vocab(self, x):
        """Hidden states (..., D) -> (..., R), which is D unless there is a vocab_rank."""
        return x @ self.vocab_proj.weight if self.config.vocab_rank else x  # the embedding's second matrix, transposed

    def forward(self, idx, targets=None, positions=None, key_mask=None, cache=None):
        """idx (B, T) int64 -> logits (B, T, V); with targets, a dict of scalars of which `loss` is the one to minimise.

        targets: (B, T), -1 = not scored. positions (B, M): only those rows meet the vocabulary, logits are (B, M, V)
        and targets (B, M). Without gradients the dict also has `accuracy`, the share of scored targets that rank
        first. With a cache, idx holds the tokens that come after those that the cache has seen, one or many.
        """
        x, extra = self.states(idx, key_mask, cache)
        if self.config.subtract_next_position:
            end = idx.size(1) if cache is None else cache.n_tokens
            x = x - self.pos_emb.weight[end - idx.size(1) + 1:end + 1]
        if positions is not None:
            x = x.gather(1, positions[..., None].expand(-1, -1, x.size(-1)))  # (B, T, D) -> (B, M, D)
        x = self.to_vocab(x)
        if targets is None:
            one_row = cache is not None and cache.head is not None and x.size(0) * x.size(1) == 1
            return x @ cache.head if one_row else F.linear(x, self.head_weight())
        out = linear_cross_entropy(x.flatten(0, 1), self.head_weight(), targets.flatten())
        if extra:
            losses = [getattr(self.config, f'{name}_coeff', 0.0) * value for name, value in extra.items()]
            out |= dict(cross_entropy=out['loss'], **extra, loss=out['loss'] + sum(losses))
        return out

    def n_params(self, positions=True):
        """Number of parameters; positions=False leaves the learned position embedding out, as papers often do."""
        total = sum(p.numel() for p in self.parameters())
        return total if positions or not self.config.learned_positions else total - self.pos_emb.weight.numel()

    def attentions(self):
        return [module for module in self.modules() if isinstance(module, Attention)]

    def flops_per_token(self, T, predicted=1.0):
        """Training FLOPs a token at length T: matrix products forward (2 a multiply-add) and backward (twice that).
        Only useful work counts: a causal query meets (T+1)/2 keys, and logits are made for a share `predicted` of
        the tokens. Norms, activations and softmax are left out."""
        c = self.config
        projection = c.vocab_rank * c.n_embd if c.vocab_rank else 0  # once for the embedding, once for the head
        head = (c.vocab_rank or c.n_embd) * c.vocab_size + projection
        return 3 * (2 * (projection + predicted * head) + self.trunk_flops(T))

    def trunk_flops(self, T):
        """Forward FLOPs a token of everything between embedding and head."""
        outside = (getattr(self, 'vocab_proj', None), getattr(self, 'lm_head', None))
        weights = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear) and m not in outside)
        keys = (T + 1) / 2 if self.config.causal else T  # that a query meets, on average
        return 2 * weights + sum(attention.score_flops(keys) for attention in self.attentions())

    def cache_bytes_per_token(self, dtype=None):
        """Bytes that generation keeps for each token, in dtype, or in the precision of the weights."""
        width = sum(attention.cache_width() for attention in self.attentions())
        return width * (dtype or self.tok_emb.weight.dtype).itemsize

    def init_cache(self, batch, length):
        """An empty Cache for `batch` sequences of up to `length` tokens, at most block_size."""
        if not self.config.causal:
            raise ValueError('an encoder has nothing to cache: every token sees those that follow it')
        if length > self.config.block_size:
            raise ValueError(f'a cache of {length} tokens, but block_size is {self.config.block_size}')
        weight = self.head_weight().detach()
        return Cache(batch, length, weight.t().contiguous() if batch == 1 and weight.device.type == 'cpu' else None)

    def generate(self, idx, max_new_tokens, **sampling):
        """idx (B, T) -> (B, T + n), n <= max_new_tokens: `stream` with the prompt in front."""
        return torch.cat([idx, *(token[:, None] for token in self.stream(idx, max_new_tokens, **sampling))], dim=1)

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, seed=None, stop=None, n_ids=None,
               use_cache=True):
        """Yields the next token of each of the B sequences idx (B, T >= 1), as (B,) int64, max_new_tokens times, or until
        each has had the token `stop`, after which it only repeats it. The model sees the last block_size tokens.

        temperature: 0 takes the likeliest token. top_k, top_p: see sample_token. seed: of the draws; None goes on with
        torch's own generator. n_ids: only ids below it are drawn (a vocabulary may have rows without a meaning).
        Without the cache the window is computed anew for every token, with the same result.
        """
        size = self.config.block_size
        generator = None if seed is None else torch.Generator(idx.device).manual_seed(seed)
        window = new = idx[:, -size:]
        cache = self.init_cache(idx.size(0), size) if use_cache else None
        done = torch.zeros(idx.size(0), dtype=torch.bool, device=idx.device)
        for _ in range(max_new_tokens):
            if not use_cache:
                new = window
            elif cache.n_tokens + new.size(1) > size:  # the window slides: every position is another
                cache.n_tokens, new = 0, window
            last = torch.full((idx.size(0), 1), new.size(1) - 1, device=idx.device)
            logits = self(new, positions=last, cache=cache)[:, 0, :n_ids]
            token = sample_token(logits, temperature, top_k, top_p, generator)
            if stop is not None:
                token = torch.where(done, stop, token)
                done |= token == stop
            yield token
            if done.all():
                return
            new = token[:, None]
            window = torch.cat((window, new), dim=1)[:, -size:]


class Transformer(LanguageModel):
    """Embedding, blocks, head: a decoder with causal=True, an encoder otherwise."""

    def __init__(self, config):
        super().__init__(config)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.add_rope('rope', config.rope_dims)
        init_weights(self)

    def trunk(self, x, end, key_mask, cache):
        rope = self.rope('rope', end)
        for block in self.blocks:
            x = block(x, rope, key_mask, cache)
        return x, {}

    @classmethod
    def from_deepseek(cls, state_dict, hf_config):
        """A dense DeepSeek-V3 in the layout of transformers: state_dict (any precision, becomes float32), hf_config the dict
        of its config.json, or the config itself. Same logits. Raises ConfigError on mixtures of experts, rotary scaling, quantised weights,
        tensors that are missing or of another shape."""
        hf_config = hf_config if isinstance(hf_config, dict) else hf_config.to_dict()
        model = make_model('transformer', **options_of_deepseek(hf_config))
        weights = model.state_dict()
        for theirs, (ours, rows) in deepseek_layout(model.config, hf_config.get('rope_interleave', True)).items():
            shape = (weights[ours].size(0) if rows is None else len(rows), *weights[ours].shape[1:])
            if theirs not in state_dict:
                raise ConfigError(f'{theirs}: missing from the checkpoint')
            if state_dict[theirs].shape != shape:
                raise ConfigError(f'{theirs}: has the shape {tuple(state_dict[theirs].shape)}, hf_config asks for {shape}')
            weights[ours][slice(None) if rows is None else rows] = state_dict[theirs].to(weights[ours])
        model.load_state_dict(weights)
        return model.eval()

    def to_deepseek(self, split=False):
        """(state_dict, hf_config) in the layout of DeepseekV3ForCausalLM; same logits. The two matrices of an output latent
        are merged, or with split=True stay apart, for a model that has been through add_output_latent. Raises ConfigError
        on what the layout cannot hold."""
        c = self.config
        if wrong := [name for name, wanted in DEEPSEEK.items() if getattr(c, name) != wanted]:
            raise ConfigError(f'{wrong[0]}={getattr(c, wrong[0])}: DeepSeek-V3 has {DEEPSEEK[wrong[0]]}')
        if c.o_norm != 'none' and not split:
            raise ConfigError(f'o_norm={c.o_norm!r} stands between the two matrices, which cannot be merged: use split=True, '
                              'and add_output_latent with the same norm on the model that is to load them')
        weights = self.state_dict()
        ours = {theirs: weights[name] if rows is None else weights[name][rows]
                for theirs, (name, rows) in deepseek_layout(c).items()}
        if c.o_latent and not split:
            for i in range(c.n_layer):
                a, b = (ours.pop(f'model.layers.{i}.self_attn.o_proj.o_{part}_proj.weight') for part in 'ab')
                ours[f'model.layers.{i}.self_attn.o_proj.weight'] = b @ a
        hf_config = dict(
            architectures=['DeepseekV3ForCausalLM'], model_type='deepseek_v3', vocab_size=c.vocab_size,
            hidden_size=c.n_embd, intermediate_size=c.mlp_hidden, num_hidden_layers=c.n_layer,
            num_attention_heads=c.n_head, num_key_value_heads=c.n_head, q_lora_rank=c.q_latent, kv_lora_rank=c.kv_latent,
            qk_nope_head_dim=c.head_dim - c.rope_dims, qk_rope_head_dim=c.rope_dims, v_head_dim=c.v_head_dim or c.head_dim,
            max_position_embeddings=c.block_size, rope_theta=c.rope_theta, rope_interleave=True, rms_norm_eps=1e-6,
            hidden_act='silu', attention_bias=False, tie_word_embeddings=c.tie_embeddings,
            bos_token_id=None, eos_token_id=None, pad_token_id=None,  # the tokenizer's own
            first_k_dense_replace=c.n_layer)  # no mixtures of experts
        return ours, hf_config | (dict(o_latent=c.o_latent, o_norm=c.o_norm) if split and c.o_latent else {})


class EncoderDecoder(LanguageModel):
    """Autoregressive end to end: a causal encoder of the sequence, and a decoder that starts from the encoder's output
    and attends to it, causally too, in every block. Generation extends all three caches, the encoder's, the decoder's
    and the cross-attention's, by one token a step.

    The embedding loss (training only) pulls the running mean of the embeddings, A_t = mean over i <= t of LN_1(E)_i,
    to the encoder's output LN_2(enc_t), which it takes as given; E and enc are the raw residual streams. With
    embedding_loss_affine both norms learn a gain and a bias, and the loss can fall by shrinking the gains alone: their
    mean size is reported as `embedding_gain` and `encoder_gain`.
    """

    def __init__(self, config):
        super().__init__(config)
        self.encoder = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.decoder_proj = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.decoder = nn.ModuleList(CrossBlock(config, layer) for layer in range(config.n_decoder_layer))
        if config.embedding_loss != 'none':
            self.embedding_loss_norm, self.encoder_loss_norm = (
                nn.LayerNorm(config.n_embd, eps=1e-5, elementwise_affine=config.embedding_loss_affine) for _ in range(2))
        self.add_rope('rope', config.rope_dims)
        self.add_rope('cross_rope', config.cross().rope_dims)
        init_weights(self)

    def trunk(self, x, end, key_mask, cache):
        embedded, rope, cross_rope = x, self.rope('rope', end), self.rope('cross_rope', end)
        for block in self.encoder:
            x = block(x, rope, None, cache)
        encoded, x = x, self.decoder_proj(x)
        for block in self.decoder:
            x = block(x, encoded, rope, cross_rope, cache)
        if not self.training or self.config.embedding_loss == 'none':
            return x, {}
        extra = {'embedding_loss': self.embedding_loss(embedded, encoded.detach())}
        if self.config.embedding_loss_affine:
            extra['embedding_gain'] = self.embedding_loss_norm.weight.detach().abs().mean()
            extra['encoder_gain'] = self.encoder_loss_norm.weight.detach().abs().mean()
        return x, extra

    def embedding_loss(self, embedded, encoded):
        """embedded and encoded (B, T, D) -> scalar: mean squared error, 1 - (cos+1)/2, or -log((cos+1)/2)."""
        counts = torch.arange(1, embedded.size(1) + 1, device=embedded.device)[:, None]  # (T, 1)
        mean = self.embedding_loss_norm(embedded).cumsum(dim=1) / counts
        target = self.encoder_loss_norm(encoded)
        if self.config.embedding_loss == 'mse':
            return F.mse_loss(mean, target)
        closeness = (F.cosine_similarity(mean, target, dim=-1) + 1) / 2  # (B, T), from 0 to 1
        if self.config.embedding_loss == 'cosine':
            return (1 - closeness).mean()
        return -closeness.clamp(min=1e-6).log().mean()


# -- grouped latents: `level` 0 are the tokens, and on level i a group of group_size tokens has latents[i-1] slots


def slots_until(config, level, t):
    """How many slots level i has after t tokens: slot j of a group of K stands for its token group_size - K + j."""
    g, K = config.group_size, (config.group_size, *config.latents)[level]
    return t // g * K + max(0, t % g - (g - K))


class Span:
    """The tokens start..stop of a call, as the blocks of GroupedLatent see them: whole groups from a group's beginning,
    folded into the batch where attention is local, or with a cache some tokens of one group."""

    def __init__(self, model, start, stop, cache):
        c = self.config = model.config
        self.model, self.start, self.stop, self.cache = model, start, stop, cache
        self.sizes = (c.group_size, *c.latents)
        self.whole = start % c.group_size == 0 == stop % c.group_size

    def slots(self, level):
        """First and last + 1 of the new slots of a group on this level."""
        if self.whole:
            return 0, self.sizes[level]
        first = max(0, self.start % self.config.group_size - (self.config.group_size - self.sizes[level]))
        return first, first + slots_until(self.config, level, self.stop) - slots_until(self.config, level, self.start)

    def fold(self, x, size):
        return x.unflatten(1, (-1, size)).flatten(0, 1) if self.whole else x  # (B, n*K, D) -> (B*n, K, D)

    def unfold(self, x, batch):
        return x.unflatten(0, (batch, -1)).flatten(1, 2) if self.whole else x  # (B*n, K, D) -> (B, n*K, D)

    def rope(self, times):
        cos, sin = self.model.rope_cos, self.model.rope_sin
        return cos[times], sin[times]

    def inside(self, level):
        """(rope, cache) of a block inside the groups of this level."""
        first = self.config.group_size - self.sizes[level]
        rope = self.rope(slice(first, first + self.slots(level)[1])) if self.config.rope_dims else None
        return rope, None if self.whole or self.cache is None else self.cache.open_group[level]

    def across(self, level):
        """(rope, cache) of a block over all slots of this level."""
        n = slots_until(self.config, level, self.stop)
        rope = self.rope(getattr(self.model, f'times_{level}')[:n]) if self.config.rope_dims else None
        return rope, None if self.cache is None else self.cache.levels[level]


def block_flops(module, queries, sources, keys):
    """Forward FLOPs of blocks for `queries` rows, whose keys and values are made of `sources` rows; each meets `keys`."""
    total = 0.0
    for name, part in module.named_modules():
        if isinstance(part, (nn.Linear, ChannelLinear)):
            rows = sources if name.split('.')[-1].startswith('kv_') else queries
            total += 2 * part.weight.numel() * rows
        elif isinstance(part, Attention):
            total += part.score_flops(keys) * queries
        elif isinstance(part, ChannelBlock):  # each channel goes through the shared feed-forwards
            total += (part.n_channels - 1) * block_flops(part.shared, queries, sources, keys)
    return total


class PoolBlock(Block):
    """A block whose queries are the last slots of a group alone: q (B, K', D), source (B, K, source_width). With
    source_width None the source is what the queries are the last of, and the norm is one."""

    def __init__(self, config, source_width=None):
        super().__init__(config, 0)
        self.attn = ATTENTIONS[config.attention](config, source_width or config.n_embd)
        self.source_norm = make_norm(config.norm, source_width) if source_width else None

    def forward(self, q, source, rope, cache):
        source = (self.source_norm or self.attn_norm)(source)
        q = q + self.dropout(self.attn(self.attn_norm(q), rope, None, source, cache))
        return q + self.dropout(self.mlp(self.mlp_norm(q)))


class Mixer(nn.Module):
    """n_mix pairs of a block inside the groups and a block over all slots of a level."""

    def __init__(self, config, level):
        super().__init__()
        self.level = level
        n = config.n_mix
        self.order = ('local', 'across') * n if config.interleave else ('local',) * n + ('across',) * n
        self.blocks = nn.ModuleList(Block(config.level(level), 0) for _ in self.order)
        for kind, block in zip(self.order, self.blocks):
            block.attn.window = config.global_window if kind == 'across' and level == 0 else None

    def flops(self, rows, keys_inside, keys_across):
        keys = dict(local=keys_inside, across=keys_across)
        return sum(block_flops(block, rows, rows, keys[kind]) for kind, block in zip(self.order, self.blocks))

    def forward(self, x, span):
        for kind, block in zip(self.order, self.blocks):
            if kind == 'local':
                rope, cache = span.inside(self.level)
                x = span.unfold(block(span.fold(x, span.sizes[self.level]), rope, None, cache), x.size(0))
            else:
                rope, cache = span.across(self.level)
                x = block(x, rope, None, cache)
        return x


class Down(nn.Module):
    """Level i to level i + 1: the last slots of each group read the group, (B, m, D_i) -> (B, m', D_i+1)."""

    def __init__(self, config, level):
        super().__init__()
        self.level, self.n_keep = level, config.latents[level]
        width, source_width = config.widths[level + 1], config.widths[level]
        self.in_proj = nn.Linear(source_width, width, bias=False)
        n = config.n_compress - 1 if config.compress == 'transformer' else 0
        self.blocks = nn.ModuleList(Block(config.level(level + 1), 0) for _ in range(n))
        self.pool = PoolBlock(config.level(level + 1), source_width if config.compress == 'perceiver' else None)
        self.mixer = Mixer(config, level + 1)

    def forward(self, x, slot_emb, span):
        batch, K = x.size(0), span.sizes[self.level]
        rope, cache = span.inside(self.level)
        x = span.fold(x, K)
        y = self.in_proj(x)
        for block in self.blocks:
            y = block(y, rope, None, cache)
        first, last = span.slots(self.level)
        n_new = max(0, last - max(first, K - self.n_keep))  # slots among these that the next level keeps
        source = y if self.pool.source_norm is None else x
        y = self.pool(y[:, y.size(1) - n_new:], source, rope, cache)
        if n_new == 0:
            return y  # the group has not come so far
        y = span.unfold(y + slot_emb.weight[slice(*span.slots(self.level + 1))], batch)
        return self.mixer(y, span)


class Up(nn.Module):
    """Level i + 1 back to level i: slots read the latents of their group that are there by then and those of the group
    before; before the first group stand learned ones. (B, m', D_i+1), (B, m, D_i) -> (B, m, D_i)."""

    def __init__(self, config, level):
        super().__init__()
        self.level, self.upsample = level, config.upsample
        width, above = config.widths[level:level + 2]
        K, n = (config.group_size, *config.latents)[level:level + 2]
        self.latent_norm = make_norm(config.norm, above)
        self.before_emb = nn.Embedding(n, above)  # the latents before the first group
        slot, late = torch.arange(K), K - n  # slots from `late` on are the latents' own
        if self.upsample == 'repeat':
            self.up_proj = nn.Linear(above, width, bias=False)
            self.register_buffer('reads', torch.where(slot < late, (slot - late) % n, n + slot - late), persistent=False)
        else:
            self.query_norm = make_norm(config.norm, width)
            self.up = ATTENTIONS[config.attention](config.level(level, causal=False), above)
            own = slot[:, None] >= late + torch.arange(n)  # (K, n)
            self.register_buffer('sees', torch.cat((torch.ones(K, n, dtype=torch.bool), own), dim=1), persistent=False)
        if config.skip == 'learned':
            self.skip_a, self.skip_b = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))
        self.learned_skip = config.skip == 'learned'
        self.mixer = Mixer(config, level)

    def forward(self, latents, x, span):
        u = self.read(self.with_previous(self.prepare(latents), span), x, span)
        x = self.skip_a * u + self.skip_b * x if self.learned_skip else u + x
        return self.mixer(x, span)

    def prepare(self, latents):
        latents = self.latent_norm(latents)
        return self.up_proj(latents) if self.upsample == 'repeat' else latents

    def with_previous(self, latents, span):
        """(B, n*K', W) -> (B*n, 2K', W): the latents of the group before and the group's own. Open group: (B, K'+b, W)."""
        batch, n = latents.size(0), span.sizes[self.level + 1]
        if span.start < span.config.group_size:
            previous = self.prepare(self.before_emb.weight).expand(batch, -1, -1)
        else:
            previous = span.cache.latents[self.level][:, :n]
        if span.whole:
            groups = torch.cat((previous, latents), dim=1).unflatten(1, (-1, n))  # (B, 1+n, K', W)
            if span.cache is not None:
                span.cache.keep(self.level, groups[:, -1], 0)
            return torch.cat((groups[:, :-1], groups[:, 1:]), dim=2).flatten(0, 1)
        first, last = span.slots(self.level + 1)
        span.cache.keep(self.level, latents, n + first)
        both = torch.cat((previous, span.cache.latents[self.level][:, n:n + last]), dim=1)
        if span.stop % span.config.group_size == 0:
            span.cache.keep(self.level, both[:, n:], 0)
        return both

    def read(self, latents, x, span):
        """latents (B*n, 2K', W) -> what each slot reads of them, (B, m, D_i)."""
        first, last = span.slots(self.level)
        if self.upsample == 'repeat':
            return span.unfold(latents[:, self.reads[first:last]], x.size(0))
        q = span.fold(self.query_norm(x), span.sizes[self.level])
        mask = self.sees[None, None, first:last, :latents.size(1)]
        y = self.up(q, self.rope(latents.size(1), first, last, span), mask, latents)
        return span.unfold(y, x.size(0))

    def rope(self, n_latents, first, last, span):
        """Tables of the slots and of the latents, whose times count from the beginning of the group before."""
        if not span.config.rope_dims:
            return None
        g, K, n = span.config.group_size, span.sizes[self.level], span.sizes[self.level + 1]
        times = torch.cat((torch.arange(g - n, g), torch.arange(2 * g - n, 2 * g)))[:n_latents]
        return *span.rope(slice(2 * g - K + first, 2 * g - K + last)), *span.rope(times)


class ChannelLinear(nn.Module):
    """n_channels linear layers as one batched product, (n_channels*B, T, n_in) -> (n_channels*B, T, n_out)."""

    def __init__(self, layer, n_channels):
        super().__init__()
        self.n_channels, self.splits = n_channels, getattr(layer, 'splits', (layer.out_features,))
        self.weight = nn.Parameter(torch.empty(n_channels, *layer.weight.shape))
        self.bias = None if layer.bias is None else nn.Parameter(torch.empty(n_channels, 1, layer.out_features))

    def forward(self, x):
        y = x.unflatten(0, (self.n_channels, -1)).flatten(1, 2) @ self.weight.transpose(1, 2)  # (s, B*T, n_out)
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], -1)


def make_channels(module, n_channels):
    """Gives every channel its own copy of the module's linear layers."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, ChannelLinear(child, n_channels))
        else:
            make_channels(child, n_channels)
    return module


class ChannelBlock(nn.Module):
    """A trunk block of s parallel channels: h_c = x + attention_c(x), z_c = h_c + feed-forward_c(h_c) + shared ones, merged
    element by element, sum_c softmax_c(z) z. Channels are folded into the batch; gains of norms are shared."""

    def __init__(self, config, level_config):
        super().__init__()
        c, s = level_config, config.n_channels
        hidden = max(1, round(config.channel_mlp_mult * 4 * c.n_embd / s))
        narrow = config.level(-1, mlp_hidden=hidden)
        self.n_channels, self.merge = s, config.merge
        self.attn_norm, self.mlp_norm = (make_norm(c.norm, c.n_embd) for _ in range(2))
        self.attn = make_channels(ATTENTIONS[c.attention](c), s)
        self.attn.n_channels = s
        self.mlp = make_channels(MLP(narrow, c.mlp_rank), s)
        self.shared = nn.ModuleList(MLP(narrow, c.mlp_rank) for _ in range(config.n_shared_mlp))
        self.dropout = make_dropout(c.dropout)

    def forward(self, x, rope=None, key_mask=None, cache=None):
        x = x.repeat(self.n_channels, 1, 1)  # (s*B, T, D), channel by channel
        x = x + self.dropout(self.attn(self.attn_norm(x), rope, None, None, cache))
        h = self.mlp_norm(x)
        x = x + self.dropout(self.mlp(h) + sum(mlp(h) for mlp in self.shared))
        z = x.unflatten(0, (self.n_channels, -1))  # (s, B, T, D)
        if self.merge == 'softmax':
            return (z.softmax(dim=0) * z).sum(dim=0)
        return z.amax(dim=0) if self.merge == 'max' else z.mean(dim=0)


class GroupedLatent(LanguageModel):
    """A U-net over time, exactly causal. Tokens come in groups of group_size; each level keeps the last few slots of a
    group, which have read it; the trunk, n_layer wide blocks, runs over the fewest; on the way back every slot reads the
    latents that were there by its time, its own group's and the previous group's, and adds the skip.

    A group has a fixed size, so that nothing before a token depends on what follows or on how long the sequence is; the
    last group may be open. Positions: where in its group a slot stands is learned, and rotary ones are token times."""

    def __init__(self, config):
        super().__init__(config)
        self.sizes = (config.group_size, *config.latents)
        self.slot_emb = nn.ModuleList(nn.Embedding(K, D) for K, D in zip(self.sizes, config.widths))
        self.down = nn.ModuleList(Down(config, i) for i in range(len(config.latents)))
        last = config.level(len(config.latents))
        self.blocks = nn.ModuleList(
            ChannelBlock(config, last) if config.n_channels and (k + 1) % config.channels_every == 0 else Block(last, 0)
            for k in range(config.n_layer))
        self.up = nn.ModuleList(Up(config, i) for i in range(len(config.latents)))
        if config.dense_former:
            # before block k + 1: weights of the trunk's input and of the k + 1 outputs so far, at first the last alone
            self.depth_weights = nn.ParameterList(F.one_hot(torch.tensor(k + 1), k + 2).float()
                                                  for k in range(config.n_layer - 1))
        if config.latent_loss:
            self.latent_head = nn.Linear(last.n_embd, last.n_embd, bias=False)
        g = config.group_size
        length = -(-max(config.block_size, 2 * g) // g) * g
        self.add_rope('rope', config.rope_dims, length)
        for i, K in enumerate(self.sizes):
            times = (torch.arange(length // g)[:, None] * g + g - K + torch.arange(K)).flatten()
            self.register_buffer(f'times_{i}', times, persistent=False)
        init_weights(self)

    def trunk(self, x, end, key_mask, cache):
        g, T = self.config.group_size, x.size(1)
        if cache is None:
            # a last part of a group is filled up: what comes later changes nothing
            y, extra = self.span(F.pad(x, (0, 0, 0, -T % g)), Span(self, 0, T + -T % g, None), T)
            return y[:, :T], extra
        parts, start = [], end - T
        while start < end:  # the rest of the open group, whole groups, the beginning of the next
            stop = min(end, (start // g + 1) * g) if start % g or end - start < g else end // g * g
            parts.append(self.span(x[:, start - end + T:stop - end + T], Span(self, start, stop, cache), None)[0])
            cache.n_tokens = start = stop
        return torch.cat(parts, dim=1), {}

    def span(self, x, span, n_real):
        """The tokens of a Span down, through the trunk, and up; n_real: those that are no filling, for the latent loss."""
        n_groups = x.size(1) // self.config.group_size if span.whole else 1
        x = x + self.slot_emb[0].weight[slice(*span.slots(0))].repeat(n_groups, 1)
        skips = []
        for level, down in enumerate(self.down):
            skips.append(x)
            if x.size(1):
                x = down(x, self.slot_emb[level + 1], span)
            else:
                x = x.new_empty(x.size(0), 0, self.config.widths[level + 1])
        latents = x
        if x.size(1):
            x = self.over_latents(x, span)
        extra = {}
        if self.training and self.config.latent_loss and n_real is not None:
            extra['latent_loss'] = self.latent_loss(x, latents.detach(), slots_until(self.config, len(self.down), n_real))
        for up, skip in zip(reversed(self.up), reversed(skips)):
            x = up(x, skip, span) if skip.size(1) else skip
        return x, extra

    def over_latents(self, x, span):
        rope, cache = span.across(len(self.down))
        outputs = [x]
        for k, block in enumerate(self.blocks):
            x = block(x, rope, None, cache)
            if self.config.dense_former and k + 1 < len(self.blocks):
                outputs.append(x)
                x = sum(weight * output for weight, output in zip(self.depth_weights[k], outputs))
        return x

    def latent_loss(self, outputs, inputs, n):
        """1 - cos between what the head makes of trunk output j and trunk input j + 1, over the first n latents."""
        if n < 2:
            return outputs.sum() * 0.0
        return (1 - F.cosine_similarity(self.latent_head(outputs[:, :n - 1]), inputs[:, 1:n], dim=-1)).mean()

    def flops_by_part(self, T):
        """Forward FLOPs a token of the levels (all that compresses, mixes and goes up) and of the trunk."""
        n = [slots_until(self.config, level, T) / T for level in range(len(self.sizes))]  # slots a token
        seen = [(rate * T + 1) / 2 for rate in n]  # by a query that sees all before it
        if (window := self.config.global_window) and window < T:
            seen[0] = window - window * (window - 1) / 2 / T
        parts = dict(levels=0.0, trunk=block_flops(self.blocks, n[-1], n[-1], seen[-1]))
        for level, (down, up) in enumerate(zip(self.down, self.up)):
            K, k = self.sizes[level:level + 2]
            inside = (K + 1) / 2
            parts['levels'] += (2 * down.in_proj.weight.numel() * n[level]
                                + block_flops(down.blocks, n[level], n[level], inside)
                                + block_flops(down.pool, n[level + 1], n[level], (2 * K - k + 1) / 2)
                                + down.mixer.flops(n[level + 1], (k + 1) / 2, seen[level + 1])
                                + up.mixer.flops(n[level], inside, seen[level]))
            if up.upsample == 'repeat':
                parts['levels'] += 2 * up.up_proj.weight.numel() * n[level + 1]
            else:
                parts['levels'] += block_flops(up.up, n[level], n[level + 1], k + k * (k + 1) / 2 / K)
        return parts

    def trunk_flops(self, T):
        return sum(self.flops_by_part(T).values())

    def cache_bytes_per_token(self, dtype=None):
        """Bytes by which the cache grows with each token; what it keeps of the open group has a fixed size."""
        width = 0.0
        for level, K in enumerate(self.sizes):
            blocks = [block for part in (*self.down, *self.up) if part.mixer.level == level
                      for kind, block in zip(part.mixer.order, part.mixer.blocks) if kind == 'across']
            blocks += self.blocks if level == len(self.down) else []
            width += sum(block.attn.cache_width() * block.attn.n_channels for block in blocks) * K / self.config.group_size
        return width * (dtype or self.tok_emb.weight.dtype).itemsize

    def init_cache(self, batch, length):
        return GroupedCache(self.config, batch, length, super().init_cache(batch, length).head)


ARCHITECTURES = {'transformer': (Transformer, TransformerConfig), 'grouped_latent': (GroupedLatent, GroupedLatentConfig),
                 'encoder_decoder': (EncoderDecoder, EncoderDecoderConfig)}


def make_model(arch, **options):
    """A model of the architecture `arch` (a key of ARCHITECTURES). Raises ConfigError on options that it does not
    have or that contradict each other."""
    if arch not in ARCHITECTURES:
        raise ConfigError(f'arch={arch!r}: takes one of {", ".join(ARCHITECTURES)}')
    model_class, config_class = ARCHITECTURES[arch]
    unknown = sorted(set(options) - {field.name for field in fields(config_class)})
    if unknown:
        raise ConfigError(f'arch={arch!r} has no {unknown[0]}: leave it out')
    return model_class(config_class(**options))


# ----------------------------------------------------------------------------------------------------------------
# loss


def linear_cross_entropy(x, weight, targets):
    """Mean cross-entropy (nats) of the logits x @ weight.T, never holding more than a chunk of them.

    x (N, D), weight (V, D), targets (N,) int64, -1 = not scored; no target at all gives 0. Returns the dict that
    models return: `loss`, and without gradients also `accuracy`.
    """
    n_chunks = max(1, x.size(0) * weight.size(0) // 2 ** 24)  # of 64 MB in float32
    if torch.compiler.is_compiling():  # the loop unrolls
        n_chunks = min(8, n_chunks)
    if torch.is_grad_enabled():
        return {'loss': LinearCrossEntropy.apply(x, weight, targets, n_chunks)}
    loss, correct = 0.0, 0
    for rows, target in zip(x.chunk(n_chunks), targets.chunk(n_chunks)):
        logits = F.linear(rows, weight)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = loss + F.cross_entropy(logits, target, ignore_index=-1, reduction='sum')
        correct = correct + (logits.argmax(dim=-1) == target).sum()
    n = (targets >= 0).sum().clamp(min=1)
    return {'loss': loss / n, 'accuracy': correct / n}


class LinearCrossEntropy(torch.autograd.Function):
    """The training half of linear_cross_entropy. A chunk's gradients are formed while its logits are at hand, so
    that the backward pass has only to scale them: unnormalised until then, lest 1/N underflows in bfloat16. All chunks
    use one buffer: fresh memory of this size costs a CPU more than the arithmetic."""

    @staticmethod
    def forward(ctx, x, weight, targets, n_chunks):
        device = x.device.type
        low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        high = torch.promote_types(low, torch.float32)
        rows, matrix = x.to(low), weight.to(low)
        scored = (targets >= 0).to(high)[:, None]  # (N, 1)
        index = targets.clamp(min=0)[:, None]
        size = -(-x.size(0) // n_chunks)
        buffer = torch.empty(size, weight.size(0), dtype=high, device=x.device)  # (chunk, V)
        loss = torch.zeros((), dtype=high, device=x.device)
        dx, dweight = torch.empty_like(rows), torch.zeros_like(weight, dtype=high)
        for r, i, s, d in zip(rows.split(size), index.split(size), scored.split(size), dx.split(size)):
            p = buffer[:r.size(0)]
            p = torch.mm(r, matrix.t(), out=p) if low == high else p.copy_(r @ matrix.t())
            p = torch.softmax(p, dim=-1, out=p)
            # float32 ends at 87 nats; the gradient below does not mind
            loss = loss - (p.gather(1, i).clamp(min=torch.finfo(high).tiny).log() * s).sum()
            p = p.scatter_add_(1, i, -torch.ones_like(s)).mul_(s).to(low)
            d.copy_(p @ matrix)
            if low == high:
                torch.addmm(dweight, p.t(), r, out=dweight)
            else:
                dweight.add_(p.t() @ r)
        n = scored.sum().clamp(min=1)
        ctx.save_for_backward(dx, dweight, n)
        ctx.dtypes = x.dtype, weight.dtype
        return loss / n

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        dx, dweight, n = ctx.saved_tensors
        scale = grad / n
        return (dx * scale).to(ctx.dtypes[0]), (dweight * scale).to(ctx.dtypes[1]), None, None


# ----------------------------------------------------------------------------------------------------------------
# generation


class Cache:
    """What generation keeps of the tokens so far: for each attention static buffers of `length` rows, made when it first
    stores something. n_tokens: how many rows are filled; setting it back forgets the later ones. head (R, V): a
    transposed copy of the vocabulary's weights, in which a CPU multiplies a single row faster."""

    def __init__(self, batch, length, head=None):
        self.batch, self.length, self.head, self.n_tokens, self.buffers = batch, length, head, 0, {}

    @torch.no_grad()
    def extend(self, owner, *new):
        """Stores what an attention computed for T new tokens, tensors (B, ..., T, width); returns each with what was
        stored before in front of it, (B, ..., S, width)."""
        if owner not in self.buffers:
            self.buffers[owner] = [x.new_empty(*x.shape[:-2], self.length, x.size(-1)) for x in new]
        end = self.n_tokens + new[0].size(-2)
        for buffer, x in zip(self.buffers[owner], new):
            buffer[..., self.n_tokens:end, :] = x
        return [buffer[..., :end, :] for buffer in self.buffers[owner]]

    def n_bytes(self):
        return sum(buffer.nbytes for buffers in self.buffers.values() for buffer in buffers)


class GroupedCache:
    """The cache of GroupedLatent: on every level the keys and values of all slots for what sees all of them, those of
    the open group for what stays inside it, and the latents of the previous and the open group for the way up."""

    def __init__(self, config, batch, length, head):
        self.config, self.batch, self.length, self.head = config, batch, length, head
        self.sizes = (config.group_size, *config.latents)
        self.levels = [Cache(batch, slots_until(config, i, length)) for i in range(len(self.sizes))]
        self.open_group = [Cache(batch, K) for K in self.sizes]
        self.latents = [None] * len(config.latents)
        self._n_tokens = 0

    @property
    def n_tokens(self):
        return self._n_tokens

    @n_tokens.setter
    def n_tokens(self, t):
        """Going back is possible to the beginning, or inside the open group: of earlier ones the latents are gone."""
        g = self.config.group_size
        if 0 < t < self._n_tokens // g * g:
            raise ValueError(f'n_tokens={t}: of {self._n_tokens} tokens, those of the last group can be taken back, or all')
        self._n_tokens = t
        for level, K in enumerate(self.sizes):
            self.levels[level].n_tokens = slots_until(self.config, level, t)
            self.open_group[level].n_tokens = max(0, t % g - (g - K))

    def keep(self, level, latents, row):
        """Stores latents (B, k, W) for Up on `level`: rows 0..K'-1 are the previous group's, the next K' the open one's."""
        if self.latents[level] is None:
            self.latents[level] = latents.new_empty(latents.size(0), 2 * self.config.latents[level], latents.size(2))
        self.latents[level][:, row:row + latents.size(1)] = latents

    def n_bytes(self):
        return sum(cache.n_bytes() for cache in (*self.levels, *self.open_group)) + sum(
            x.nbytes for x in self.latents if x is not None)


def sample_token(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """logits (B, V) -> a token of each row, (B,) int64. temperature divides the logits, 0 takes the largest. top_k: only
    the k likeliest; top_p: only the fewest likeliest whose probabilities reach p (nucleus, arXiv 1904.09751)."""
    if temperature < 0:
        raise ValueError(f'temperature={temperature}: takes zero (the likeliest token) or more')
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.size(-1)), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p is not None:
        p, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        p = p.masked_fill(p.cumsum(dim=-1) - p >= top_p, 0.0)  # what stands before it reaches p already
        return order.gather(1, p.multinomial(1, generator=generator))[:, 0]
    return logits.softmax(dim=-1).multinomial(1, generator=generator)[:, 0]


# ----------------------------------------------------------------------------------------------------------------
# other people's models: DeepSeek-V3's checkpoints, and output latents for what was trained without

DEEPSEEK = dict(causal=True, attention='mla', rope_key='shared', norm='rms', mlp='swiglu', final_norm=True, bias=False,
                learned_positions=False, mlp_bias=False, mlp_rank=None, vocab_rank=None, n_dense=0)  # all that its layout holds


def options_of_deepseek(hf_config):
    """config.json of a DeepSeek-V3 as a dict of our options. Raises ConfigError on what none of ours can say."""
    c = dict(first_k_dense_replace=3, rms_norm_eps=1e-6, attention_bias=False, hidden_act='silu',
             tie_word_embeddings=False) | hf_config
    rope = (c.get('rope_parameters') or {}) | (c.get('rope_scaling') or {})
    if c.get('n_routed_experts') and c['first_k_dense_replace'] < c.get('num_hidden_layers', 0):
        raise ConfigError(f'layers from {c["first_k_dense_replace"]} on are mixtures of experts, which a Transformer here does '
                          'not have: load it in transformers, where add_output_latent works too, or look at it with svd.py')
    if scaling := {rope.get('rope_type'), rope.get('type')} - {None, 'default'}:
        raise ConfigError(f'rotary scaling {scaling.pop()!r}: only plain rotary positions can be loaded; transformers runs it, and '
                          'add_output_latent and svd.py work without')
    if c.get('quantization_config'):
        raise ConfigError('quantised weights: convert the checkpoint to bfloat16 first; svd.py reads it as it is')
    for name, wanted in (('rms_norm_eps', 1e-6), ('attention_bias', False), ('hidden_act', 'silu')):
        if c[name] != wanted:
            raise ConfigError(f'{name}={c[name]}: only {wanted} can be loaded')
    try:
        return DEEPSEEK | dict(
            vocab_size=c['vocab_size'], block_size=c['max_position_embeddings'], n_layer=c['num_hidden_layers'],
            n_head=c['num_attention_heads'], n_embd=c['hidden_size'], mlp_hidden=c['intermediate_size'],
            head_dim=c['qk_nope_head_dim'] + c['qk_rope_head_dim'], rope_dims=c['qk_rope_head_dim'],
            v_head_dim=c['v_head_dim'], q_latent=c['q_lora_rank'], kv_latent=c['kv_lora_rank'],
            rope_theta=float(rope.get('rope_theta', c.get('rope_theta', 10000.0))), tie_embeddings=c['tie_word_embeddings'],
            o_latent=c.get('o_latent'), o_norm=c.get('o_norm', 'none'))
    except KeyError as error:
        raise ConfigError(f'hf_config has no {error.args[0]}: is it the config.json of a DeepSeek-V3?') from None


def deepseek_layout(c, interleaved=True):
    """{name in DeepSeek-V3's layout: (our name, which of its rows, in their order)}; None: all of them as they are.

    A query head is [plain | rotated] there, its rotated pairs neighbours if interleaved, and [rotated | plain] here, its
    pairs half a width apart; kv_b_proj goes head by head there, and here all keys stand before all values.
    """
    H, d, r, L, dv = c.n_head, c.head_dim, c.rope_dims, c.kv_latent, c.v_head_dim or c.head_dim
    rotated = torch.arange(r).view(2, -1).t().flatten() if interleaved else torch.arange(r)
    head = torch.cat((torch.arange(r, d), rotated))
    q_rows = (torch.arange(H)[:, None] * d + head).flatten()
    kv_rows = torch.cat((torch.arange(H * (d - r)).view(H, -1), H * (d - r) + torch.arange(H * dv).view(H, -1)), dim=1)
    q_a_width = c.q_latent or H * d
    latent_rows = q_a_width + torch.cat((torch.arange(L), L + rotated))
    layer = {'input_layernorm': ('attn_norm', None), 'post_attention_layernorm': ('mlp_norm', None),
             'mlp.gate_proj': ('mlp.in_proj', None), 'mlp.up_proj': ('mlp.gate_proj', None),
             'mlp.down_proj': ('mlp.out_proj', None), 'self_attn.kv_a_layernorm': ('attn.kv_a_norm', None),
             'self_attn.kv_a_proj_with_mqa': ('attn.qkv_a_proj', latent_rows),
             'self_attn.kv_b_proj': ('attn.kv_b_proj', kv_rows.flatten())}
    if c.q_latent:
        layer |= {'self_attn.q_a_proj': ('attn.qkv_a_proj', torch.arange(q_a_width)),
                  'self_attn.q_a_layernorm': ('attn.q_a_norm', None), 'self_attn.q_b_proj': ('attn.q_b_proj', q_rows)}
    else:
        layer['self_attn.q_proj'] = 'attn.qkv_a_proj', q_rows
    output = [''] if not c.o_latent else ['.o_a_proj', '.o_b_proj'] + (['.o_norm'] if c.o_norm == 'sum' else [])
    layer |= {f'self_attn.o_proj{part}': (f'attn.o_proj{part}', None) for part in output}
    layout = {'model.embed_tokens.weight': ('tok_emb.weight', None), 'model.norm.weight': ('norm.weight', None)}
    if not c.tie_embeddings:
        layout['lm_head.weight'] = 'lm_head.weight', None
    for i in range(c.n_layer):
        layout |= {f'model.layers.{i}.{theirs}.weight': (f'blocks.{i}.{ours}.weight', rows)
                   for theirs, (ours, rows) in layer.items()}
        if c.o_norm == 'head':
            layout[f'model.layers.{i}.self_attn.o_proj.gain'] = f'blocks.{i}.attn.o_proj.gain', None
    return layout


def add_output_latent(model, rank, init='svd', norm='none'):
    """Replaces every linear o_proj of a model's attentions by an OutputLatent of this rank, in place; returns the model.

    For our models and for those of transformers whose attentions have an o_proj (DeepseekV3ForCausalLM, LlamaForCausalLM).
    init: 'svd', the best product of this rank (at full rank nothing changes), or 'xavier', new weights. norm: see
    OutputLatent; other than 'none' it changes the outputs at any rank. To reload what was saved, do the same to a new
    model and load the weights. Raises ConfigError, before anything is changed.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(getattr(module, 'o_proj', None), nn.Linear)}
    ours = isinstance(model, LanguageModel)
    if ours and model.config.attention == 'mla':  # its first n_dense layers stay as they are
        found = {name: module for name, module in found.items() if isinstance(module, MLA)}
    if not found:
        raise ConfigError('no attention of this model has a linear o_proj')
    for name, module in found.items():
        full = min(module.o_proj.weight.shape)
        if not 0 < rank <= full:
            raise ConfigError(f'an output latent of {rank}: {name}.o_proj takes 1 to {full}')
    if init not in ('svd', 'xavier') or norm not in ('none', 'sum', 'head'):
        raise ConfigError(f"init={init!r}, norm={norm!r}: takes 'svd' or 'xavier', and 'none', 'sum' or 'head'")
    for module in found.values():
        old = module.o_proj
        n_head = module.n_head if ours else module.config.num_attention_heads
        new = OutputLatent(n_head, old.in_features, rank, old.out_features, norm, bias=old.bias is not None)
        new = new.to(old.weight)
        if init == 'svd':
            u, s, v = torch.linalg.svd(old.weight.detach().to(torch.promote_types(old.weight.dtype, torch.float32)),
                                       full_matrices=False)
            a, b = s[:rank, None].sqrt() * v[:rank], u[:, :rank] * s[:rank].sqrt()
            new.load_state_dict({'o_a_proj.weight': a, 'o_b_proj.weight': b}, strict=False)
        else:
            nn.init.xavier_uniform_(new.o_a_proj.weight)
            nn.init.xavier_uniform_(new.o_b_proj.weight)
        if old.bias is not None:
            new.o_b_proj.bias = old.bias
        module.o_proj = new
    if ours and model.config.attention == 'mla':
        model.config.o_latent, model.config.o_norm = rank, norm
    return model
