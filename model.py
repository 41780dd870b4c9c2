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
    cos, sin = (table[-x.size(-2):] for table in rope)  # float32: in bfloat16 neighbours would share an angle
    half = cos.size(-1)
    a, b, rest = x.split((half, half, x.size(-1) - 2 * half), dim=-1)
    return torch.cat(((a * cos - b * sin).type_as(x), (b * cos + a * sin).type_as(x), rest), dim=-1)


def split_heads(x, n_head):
    return x.unflatten(-1, (n_head, -1)).transpose(1, 2)  # (B, T, H*d) -> (B, H, T, d)


def attend(q, k, v, causal=False, key_mask=None, dropout=0.0):
    """Softmax attention, (B, H, T, d), (B, Hkv, S, d), (B, Hkv, S, dv) -> (B, T, H*dv).

    key_mask (B, S) bool, True = may be attended to. causal: the queries are the last T of the S positions. Scale
    1/sqrt(d). The flash kernels want heads of one width: the narrower of d and dv is padded with zeros, which changes
    no product and is cheaper than the unfused path.
    """
    T, S = q.size(2), k.size(2)
    d, dv = q.size(-1), v.size(-1)
    if d < dv:
        q, k = F.pad(q, (0, dv - d)), F.pad(k, (0, dv - d))
    elif dv < d:
        v = F.pad(v, (0, d - dv))
    mask = None if key_mask is None else key_mask[:, None, None, :]  # (B, 1, 1, S)
    if causal and 1 < T < S:  # is_causal would take the queries for the first T positions
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal and T == S,
                                       scale=d ** -0.5, enable_gqa=q.size(1) != k.size(1))
    return y[..., :dv].transpose(1, 2).flatten(2)  # (B, H, T, dv) -> (B, T, H*dv)


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

    def qkv(self, x, rope, source, cache):
        """x (B, T, D) -> q (B, H, T, d), k (B, Hkv, S, d), v (B, Hkv, S, dv), rotated where the options say so."""
        raise NotImplementedError

    def heads(self, x, rope=None, key_mask=None, source=None, cache=None):
        """What the heads have read, side by side: (B, T, D) -> (B, T, H*dv)."""
        q, k, v = self.qkv(x, rope, source, cache)
        return attend(q, k, v, self.causal, key_mask, self.dropout if self.training else 0.0)

    def forward(self, x, *context):
        return self.o_proj(self.heads(x, *context))

    def score_flops(self, T):
        """Forward FLOPs a token of q.k and of the weighted sum of v; a causal query sees (T+1)/2 keys on average."""
        return 2 * self.n_head * (self.head_dim + self.v_head_dim) * ((T + 1) / 2 if self.causal else T)

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
            q, k = rotate(q, rope), rotate(k, rope)
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
            q = rotate(q, rope)
            k_shared = rotate(k_shared, rope) if self.shared_dims else k_shared
        if cache is not None:
            latent, k_shared = cache.extend(self, latent, k_shared)
            if x.size(1) == 1:
                return self.absorbed(q[:, :, 0], latent, k_shared, rope)
        k, v = split_fused(self.kv_b_proj, latent)
        k, v = split_heads(k, self.n_head), split_heads(v, self.n_head)
        if self.shared_dims:
            k_shared = k_shared[:, None].expand(-1, self.n_head, -1, -1)  # (B, S, r) -> (B, H, S, r)
            k = torch.cat((k_shared, k), dim=-1)
        elif rope is not None:
            k = rotate(k, rope)
        return attend(q, k, v, self.causal, key_mask, self.dropout if self.training else 0.0)

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
            k_rotated = rotate(split_heads(F.linear(latent, to_rotated.flatten(0, 1)), self.n_head), rope)
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

    def __init__(self, n_head, n_in, rank, n_out, norm='none'):
        super().__init__()
        self.n_head, self.norm = n_head, norm
        self.o_a_proj = nn.Linear(n_in, rank, bias=False)
        self.o_b_proj = nn.Linear(rank, n_out, bias=False)
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
        may_be_zero = ('dropout', 'attention_dropout', 'rope_dims', 'n_dense')
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
    """The one place where weights get their first values: matrices and embeddings normal with init_std, biases 0,
    gains 1. Matrices that write into a residual stream are divided by the root of how many of them write into it,
    GPT-2's rule, so that its variance at the end does not grow with depth."""
    writers = [name for name, _ in model.named_parameters()
               if any(part in name for part in ('o_proj.weight', 'o_b_proj', 'out_proj.weight', 'out_proj.1.weight'))]
    stacks = [name.split('.')[0] for name in writers]
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 and not name.endswith('gain'):  # norms start at 1 and are left there
            n_writers = stacks.count(name.split('.')[0]) if name in writers else 1
            nn.init.normal_(parameter, std=model.config.init_std / math.sqrt(n_writers))
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
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

    def add_rope(self, name, rope_dims):
        """Registers the tables NAME_cos and NAME_sin; `rope` cuts them to a length."""
        if rope_dims:
            tables = rope_table(self.config.block_size, rope_dims, self.config.rope_theta)
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
        outside = (getattr(self, 'vocab_proj', None), getattr(self, 'lm_head', None))
        weights = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear) and m not in outside)
        width = c.vocab_rank or c.n_embd
        projection = c.vocab_rank * c.n_embd if c.vocab_rank else 0  # once for the embedding, once for the head
        head = width * c.vocab_size + projection
        scores = sum(attention.score_flops(T) for attention in self.attentions())
        return 3 * (2 * (weights + projection + predicted * head) + scores)

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


ARCHITECTURES = {'transformer': (Transformer, TransformerConfig),
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
    n_chunks = max(1, x.size(0) * weight.size(0) // 2 ** 23)  # a chunk small enough to stay near the caches,
    if torch.compiler.is_compiling():  # but compiled, the loop unrolls
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
    that the backward pass has only to scale them: unnormalised until then, lest 1/N underflows in bfloat16."""

    @staticmethod
    def forward(ctx, x, weight, targets, n_chunks):
        device = x.device.type
        low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        high = torch.promote_types(low, torch.float32)
        rows, matrix = x.to(low), weight.to(low)
        scored = (targets >= 0).to(high)[:, None]  # (N, 1)
        index = targets.clamp(min=0)[:, None]
        loss, dx, dweight = torch.zeros((), dtype=high, device=x.device), [], None
        for r, i, s in zip(rows.chunk(n_chunks), index.chunk(n_chunks), scored.chunk(n_chunks)):
            log_p = torch.log_softmax((r @ matrix.t()).to(high), dim=-1)  # (chunk, V)
            loss = loss - (log_p.gather(1, i) * s).sum()
            dlogits = log_p.exp_().scatter_add_(1, i, -torch.ones_like(s)).mul_(s).to(low)
            dx.append(dlogits @ matrix)
            product = (dlogits.t() @ r).to(high)
            dweight = product if dweight is None else dweight.add_(product)
        n = scored.sum().clamp(min=1)
        ctx.save_for_backward(torch.cat(dx), dweight, n)
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
        if new[0].size(0) != self.batch:
            raise ValueError(f'{new[0].size(0)} sequences, but the cache was made for {self.batch}')
        if owner not in self.buffers:
            self.buffers[owner] = [x.new_empty(*x.shape[:-2], self.length, x.size(-1)) for x in new]
        end = self.n_tokens + new[0].size(-2)
        for buffer, x in zip(self.buffers[owner], new):
            buffer[..., self.n_tokens:end, :] = x
        return [buffer[..., :end, :] for buffer in self.buffers[owner]]

    def n_bytes(self):
        return sum(buffer.nbytes for buffers in self.buffers.values() for buffer in buffers)


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
