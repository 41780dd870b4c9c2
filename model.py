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
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def make_norm(kind, width):
    return RMSNorm(width) if kind == 'rms' else nn.LayerNorm(width, eps=1e-5, bias=False)


def linear(n_in, n_out, bias, rank=None, inner_norm=False):
    """A dense matrix, or two of rank `rank` with an RMSNorm between them; the bias belongs to the last one."""
    if rank is None:
        return nn.Linear(n_in, n_out, bias=bias)
    norm = [RMSNorm(rank)] if inner_norm else []
    return nn.Sequential(nn.Linear(n_in, rank, bias=False), *norm, nn.Linear(rank, n_out, bias=bias))


def fused_linear(n_in, *n_outs, bias=False):
    """One matrix for several projections of the same input. `splits` says which rows are whose: the forward pass
    splits the output by it, and Muon, which orthogonalises one projection at a time, splits the weight."""
    layer = nn.Linear(n_in, sum(n_outs), bias=bias)
    layer.splits = n_outs
    return layer


def rope_table(length, rope_dims, theta):
    """cos and sin, each (length, rope_dims/2), of position times theta^(-2i/rope_dims). RoFormer, section 3.2.2."""
    frequency = theta ** (-torch.arange(0, rope_dims, 2, dtype=torch.float64) / rope_dims)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    return angle.cos().float(), angle.sin().float()


def rotate(x, rope):
    """Rotates the first rope_dims dimensions of x (B, H, T, d): pairs are i and i + rope_dims/2."""
    cos, sin = rope  # float32: in bfloat16 neighbouring positions would share an angle
    half = cos.size(-1)
    a, b, rest = x.split((half, half, x.size(-1) - 2 * half), dim=-1)
    return torch.cat(((a * cos - b * sin).type_as(x), (b * cos + a * sin).type_as(x), rest), dim=-1)


def split_heads(x, n_head):
    return x.unflatten(-1, (n_head, -1)).transpose(1, 2)  # (B, T, H*d) -> (B, H, T, d)


def attend(q, k, v, causal=False, key_mask=None, dropout=0.0):
    """Softmax attention, (B, H, T, d), (B, Hkv, S, d), (B, Hkv, S, dv) -> (B, T, H*dv).

    key_mask (B, S) bool, True = may be attended to. Scale 1/sqrt(d). The flash kernels want heads of one width:
    the narrower of d and dv is padded with zeros, which changes no product and is cheaper than the unfused path.
    """
    d, dv = q.size(-1), v.size(-1)
    if d < dv:
        q, k = F.pad(q, (0, dv - d)), F.pad(k, (0, dv - d))
    elif dv < d:
        v = F.pad(v, (0, d - dv))
    mask = None if key_mask is None else key_mask[:, None, None, :]  # (B, 1, 1, S)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal,
                                       scale=d ** -0.5, enable_gqa=q.size(1) != k.size(1))
    return y[..., :dv].transpose(1, 2).flatten(2)  # (B, H, T, dv) -> (B, T, H*dv)


# ----------------------------------------------------------------------------------------------------------------
# attention


class Attention(nn.Module):
    """What every attention shares. A subclass builds its projections, `o_proj` among them, and says in `qkv` how
    queries, keys and values come from x; `options` names the options that it alone understands."""

    options = ()

    def __init__(self, config):
        super().__init__()
        self.n_head, self.head_dim, self.v_head_dim = config.n_head, config.head_dim, config.head_dim
        self.causal, self.dropout = config.causal, config.attention_dropout

    def qkv(self, x, rope):
        """x (B, T, D) -> q (B, H, T, d), k (B, Hkv, T, d), v (B, Hkv, T, dv), rotated where the options say so."""
        raise NotImplementedError

    def heads(self, x, rope=None, key_mask=None):
        """What the heads have read, side by side: (B, T, D) -> (B, T, H*dv)."""
        q, k, v = self.qkv(x, rope)
        return attend(q, k, v, self.causal, key_mask, self.dropout if self.training else 0.0)

    def forward(self, x, rope=None, key_mask=None):
        return self.o_proj(self.heads(x, rope, key_mask))

    def score_flops(self, T):
        """Forward FLOPs a token of q.k and of the weighted sum of v; a causal query sees (T+1)/2 keys on average."""
        return 2 * self.n_head * (self.head_dim + self.v_head_dim) * ((T + 1) / 2 if self.causal else T)

    def cache_width(self):
        """Numbers that generation has to keep for a token in this layer."""
        raise NotImplementedError


class MHA(Attention):
    """Multi-head attention; with n_kv_head < n_head, grouped-query attention."""

    options = ('n_kv_head', 'qk_norm', 'bias')

    def __init__(self, config):
        super().__init__(config)
        self.n_kv_head = config.n_kv_head or config.n_head
        q_width, kv_width = self.n_head * self.head_dim, self.n_kv_head * self.head_dim
        self.qkv_proj = fused_linear(config.n_embd, q_width, kv_width, kv_width, bias=config.bias)
        self.q_norm = RMSNorm(self.head_dim) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim) if config.qk_norm else nn.Identity()
        self.o_proj = nn.Linear(q_width, config.n_embd, bias=config.bias)

    def qkv(self, x, rope):
        q, k, v = self.qkv_proj(x).split(self.qkv_proj.splits, dim=-1)
        q = self.q_norm(split_heads(q, self.n_head))
        k = self.k_norm(split_heads(k, self.n_kv_head))
        v = split_heads(v, self.n_kv_head)
        return (q, k, v) if rope is None else (rotate(q, rope), rotate(k, rope), v)

    def cache_width(self):
        return 2 * self.n_kv_head * self.head_dim


class MLA(Attention):
    """Multi-head latent attention (DeepSeek-V2, section 2.1): keys and values of all heads come from one latent of
    kv_latent numbers a token, queries from one of q_latent (None: straight from x). With o_latent, MLA-o, the heads
    also write through a shared latent: W^O becomes a per-head matrix into it and one shared matrix out of it.

    Inside a head the rotated dimensions come first. rope_key='per_head': each head's first rope_dims key dimensions
    are rotated. 'shared' (DeepSeek): a key is [one rotated key of rope_dims for all heads, straight from x | the
    head's own head_dim - rope_dims]. No biases. Only latents would be cached, but for 'per_head' generation has to
    make the rotated keys of all cached tokens again at each step, S*H*rope_dims*kv_latent multiply-adds a layer.
    """

    options = ('q_latent', 'kv_latent', 'o_latent', 'rope_key', 'v_head_dim', 'o_norm')

    def __init__(self, config):
        super().__init__(config)
        self.v_head_dim = config.v_head_dim or config.head_dim
        self.kv_latent = config.kv_latent
        self.shared_dims = config.rope_dims if config.rope_key == 'shared' else 0
        q_width, v_width = self.n_head * self.head_dim, self.n_head * self.v_head_dim
        k_width = q_width - self.n_head * self.shared_dims

        self.qkv_a_proj = fused_linear(config.n_embd, config.q_latent or q_width, self.kv_latent, self.shared_dims)
        self.q_a_norm = RMSNorm(config.q_latent) if config.q_latent else nn.Identity()
        self.q_b_proj = nn.Linear(config.q_latent, q_width, bias=False) if config.q_latent else nn.Identity()
        self.kv_a_norm = RMSNorm(self.kv_latent)
        self.kv_b_proj = fused_linear(self.kv_latent, k_width, v_width)
        if config.o_latent:
            self.o_proj = OutputLatent(self.n_head, v_width, config.o_latent, config.n_embd, config.o_norm)
        else:
            self.o_proj = nn.Linear(v_width, config.n_embd, bias=False)

    def qkv(self, x, rope):
        q, kv, k_shared = self.qkv_a_proj(x).split(self.qkv_a_proj.splits, dim=-1)
        q = split_heads(self.q_b_proj(self.q_a_norm(q)), self.n_head)
        k, v = self.kv_b_proj(self.kv_a_norm(kv)).split(self.kv_b_proj.splits, dim=-1)
        k, v = split_heads(k, self.n_head), split_heads(v, self.n_head)
        if self.shared_dims:
            k_shared = k_shared[:, None].expand(-1, self.n_head, -1, -1)  # (B, T, r) -> (B, H, T, r)
            k = torch.cat((k_shared, k), dim=-1)
        return (q, k, v) if rope is None else (rotate(q, rope), rotate(k, rope), v)

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
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, rope=None, key_mask=None):
        x = x + self.dropout(self.attn(self.attn_norm(x), rope, key_mask))
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


# ----------------------------------------------------------------------------------------------------------------
# models


def init_weights(model, config):
    """The one place where weights get their first values: matrices and embeddings normal with init_std, biases 0,
    gains 1. Matrices that write into the residual stream are divided by sqrt(2 n_layer), GPT-2's rule, so that its
    variance at the end does not grow with depth."""
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or name.endswith('gain'):
            continue  # norms start at 1 and are left there
        writes_residual = any(part in name for part in ('o_proj.weight', 'o_b_proj', 'out_proj.weight', 'out_proj.1'))
        nn.init.normal_(parameter, std=config.init_std / (math.sqrt(2 * config.n_layer) if writes_residual else 1))
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


class Transformer(nn.Module):
    """Embedding, blocks, head: a decoder with causal=True, an encoder otherwise."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.tok_emb = nn.Embedding(config.vocab_size, config.vocab_rank or config.n_embd)
        if config.vocab_rank:
            self.vocab_proj = nn.Linear(config.vocab_rank, config.n_embd, bias=False)
        if config.learned_positions:
            self.pos_emb = nn.Embedding(config.block_size, config.n_embd)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = make_norm(config.norm, config.n_embd) if config.final_norm else nn.Identity()
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.rope_dims:
            cos, sin = rope_table(config.block_size, config.rope_dims, config.rope_theta)
            self.register_buffer('rope_cos', cos, persistent=False)
            self.register_buffer('rope_sin', sin, persistent=False)
        init_weights(self, config)

    def hidden(self, idx, key_mask=None):
        """idx (B, T) int64 -> final hidden states (B, T, D). key_mask (B, T) bool, True = a real token; encoders only."""
        T = idx.size(1)
        if T > self.config.block_size:
            raise ValueError(f'{T} tokens, but block_size is {self.config.block_size}')
        if key_mask is not None and self.config.causal:
            raise ValueError('a causal model takes no key_mask: give it sequences of one length')
        x = self.tok_emb(idx)
        if self.config.vocab_rank:
            x = self.vocab_proj(x)
        if self.config.learned_positions:
            x = x + self.pos_emb.weight[:T]
        x = self.dropout(x)
        rope = (self.rope_cos[:T], self.rope_sin[:T]) if self.config.rope_dims else None
        for block in self.blocks:
            x = block(x, rope, key_mask)
        return self.norm(x)

    def to_vocab(self, x):
        """Hidden states (..., D) and the (V, R) matrix whose products with them are the logits."""
        if not self.config.tie_embeddings:
            return x, self.lm_head.weight
        if self.config.vocab_rank:
            x = x @ self.vocab_proj.weight  # (..., D) -> (..., R): the embedding's second matrix, transposed
        return x, self.tok_emb.weight

    def forward(self, idx, targets=None, positions=None, key_mask=None):
        """idx (B, T) int64 -> logits (B, T, V); with targets, a dict of scalars of which `loss` is the one to minimise.

        targets: (B, T), -1 = not scored. With positions (B, M), targets are (B, M) too and only those rows meet the
        vocabulary. Without gradients the dict also has `accuracy`, the share of scored targets that rank first.
        """
        x = self.hidden(idx, key_mask)
        if targets is None:
            x, weight = self.to_vocab(x)
            return F.linear(x, weight)
        if positions is not None:
            x = x.gather(1, positions[..., None].expand(-1, -1, x.size(-1)))  # (B, T, D) -> (B, M, D)
        x, weight = self.to_vocab(x)
        return linear_cross_entropy(x.flatten(0, 1), weight, targets.flatten())

    def n_params(self, positions=True):
        """Number of parameters; positions=False leaves the learned position embedding out, as papers often do."""
        total = sum(p.numel() for p in self.parameters())
        return total if positions or not self.config.learned_positions else total - self.pos_emb.weight.numel()

    def flops_per_token(self, T, predicted=1.0):
        """Training FLOPs a token at length T: matrix products forward (2 a multiply-add) and backward (twice that).
        Only useful work counts: a causal query meets (T+1)/2 keys, and logits are made for a share `predicted` of
        the tokens. Norms, activations and softmax are left out."""
        c = self.config
        weights = sum(m.weight.numel() for m in self.blocks.modules() if isinstance(m, nn.Linear))
        width = c.vocab_rank or c.n_embd
        projection = c.vocab_rank * c.n_embd if c.vocab_rank else 0  # once for the embedding, once for the head
        head = width * c.vocab_size + projection
        scores = sum(block.attn.score_flops(T) for block in self.blocks)
        return 3 * (2 * (weights + projection + predicted * head) + scores)

    def cache_bytes_per_token(self):
        """Bytes that generation keeps for each token, at the precision of the weights."""
        return sum(block.attn.cache_width() for block in self.blocks) * self.tok_emb.weight.element_size()


ARCHITECTURES = {'transformer': (Transformer, TransformerConfig)}


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
