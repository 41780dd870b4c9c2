"""Transformers with latent attention, in one file that reads from top to bottom.

    pieces           norms, matrices, rotary positions, softmax attention
    attention        what an attention has to provide; MHA; MLA; their relatives; DeepSeek-V4's; the
                     output latent
    block            feed-forward, mixture of experts, residual block, block with cross-attention
    options          every option of a model, with its range
    language model   what all architectures share, and where weights get their first values
    architectures    Transformer, EncoderDecoder, GroupedLatent
    loss, generation, counting

Symbols, here and in every shape comment:

    B  sequences                       T  new tokens, those that ask     S  tokens attended to
    D  n_embd, width of the stream     V  vocab_size                     H  n_head (Hkv: n_kv_head)
    d  head_dim (dv: of a value head)  r  rope_dims                      L  kv_latent
    R  rank: of an output latent, of the vocabulary, of a feed-forward, of factors in TPA
    W  window, in tokens
    m  tokens of an entry in V4        n  entries, and other numbers that stand beside
    E  experts                         k  those that a token meets
    M  predicted positions a sequence in masked-language modelling
    N  rows that meet the vocabulary: B*T, or B*M

In grouped latents also:

    g  group_size, tokens a group      K  slots a group on a level, K' on the level above it
    G  groups of a call                k  new slots of a group, k' on the level above
    C  n_channels

Papers: MHA, Vaswani et al. 2017; RoPE, Su et al. 2021 (arXiv 2104.09864); grouped queries, Ainslie
et al. 2023 (2305.13245); MLA, DeepSeek-V2 (2405.04434, section 2.1) and DeepSeek-V3 (2412.19437,
section 2.1.1). Those of its relatives stand with their classes.
"""

import math
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Annotated, Literal, NamedTuple, get_args

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


class ConfigError(ValueError):
    """Options that contradict each other, or that an architecture does not have. The message says
    what to change."""


# --------------------------------------------------------------------------------------------------
# pieces: norms, matrices, rotary positions, softmax attention


class RMSNorm(nn.RMSNorm):
    """RMSNorm with eps 1e-6. The result has the precision of the input, and so does the gain while
    it is applied: the fused kernel wants one precision, and under autocast latents are bfloat16.
    latent_of: if it norms a latent, the width that the latent replaces; see init_weights.
    n_parts: x is so many vectors of this width side by side, and each is normed by itself."""

    def __init__(self, width, latent_of=None, n_parts=1):
        super().__init__(width, eps=1e-6)
        self.latent_of, self.n_parts = latent_of, n_parts
        self.weight = nn.Parameter(torch.ones(n_parts * width))

    def forward(self, x):
        gain = self.weight.to(x.dtype)
        if self.n_parts == 1:
            return F.rms_norm(x, self.normalized_shape, gain, self.eps).type_as(x)
        parts = x.unflatten(-1, (self.n_parts, -1))  # (..., n_parts, width)
        parts = F.rms_norm(parts, self.normalized_shape, eps=self.eps).flatten(-2)
        return (parts * gain).type_as(x)


def make_norm(kind, width):
    return RMSNorm(width) if kind == 'rms' else nn.LayerNorm(width, eps=1e-5, bias=False)


def dropout(x, p):
    """F.dropout. On a CPU, which draws one number after the other, one draw of 64 bits serves four
    elements: 16 bits of its own decide whether an element is kept, so 1-p is rounded to 2^-16."""
    if x.device.type != 'cpu' or torch.compiler.is_compiling():
        return F.dropout(x, p)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-2 ** 63, None)
    bits = bits.view(torch.int16)[:x.numel()].view(x.shape)  # from -2^15 to 2^15 - 1
    n_kept = max(1, round(2 ** 16 * (1 - p)))  # of 2^16
    return x * (bits <= n_kept - 1 - 2 ** 15).to(x.dtype) * (2 ** 16 / n_kept)


class Dropout(nn.Dropout):
    """nn.Dropout by the function above."""

    def forward(self, x):
        return dropout(x, self.p) if self.training else x


def identity(x):
    """Stands where there is no norm or dropout. As a module it would cost a small model 3% of its
    time in generation, and a Dropout of 0 more."""
    return x


def make_dropout(p):
    return Dropout(p) if p else identity


class Linear(nn.Linear):
    """A matrix that says what it serves, for what has to treat matrices differently.

    writes: its output is added to the residual stream, so it starts smaller (see init_weights).
    on_source: it is applied to the tokens that are attended to, to make keys or values. In
    cross-attention those are other tokens than those that ask, and so its FLOPs count for others.
    fan: its products with the numbers of another matrix stand for one matrix, with no norm between;
    starting with variance 1/fan makes them as large as the numbers of the other. If it reads a rank
    that the other made, that is the rank.
    n_groups: see grouped_linear.
    """

    def __init__(self, n_in, n_out, bias=False, writes=False, on_source=False, fan=None,
                 n_groups=1):
        super().__init__(n_in // n_groups, n_out, bias=bias)
        self.writes, self.on_source, self.fan = writes, on_source, fan
        self.n_groups = n_groups

    def forward(self, x):
        if self.n_groups == 1:
            return super().forward(x)
        return grouped_linear(x, self.weight, self.n_groups)


def grouped_linear(x, weight, n_groups):
    """A block-diagonal product: each of the n_groups parts of x (..., n_in) meets its own part of
    the rows of weight (n_out, n_in/n_groups) and gives its own part of the result (..., n_out)."""
    if n_groups == 1:
        return F.linear(x, weight)
    x, weight = x.unflatten(-1, (n_groups, -1)), weight.unflatten(0, (n_groups, -1))
    return torch.einsum('...gi,goi->...go', x, weight).flatten(-2)


class ChannelLinear(nn.Module):
    """A Linear for each of C channels as one batched product, (C*B, T, n_in) -> (C*B, T, n_out)."""

    def __init__(self, layer, n_channels):
        super().__init__()
        self.n_channels = n_channels
        self.writes = getattr(layer, 'writes', False)
        self.on_source = getattr(layer, 'on_source', False)
        self.fan, self.n_groups = getattr(layer, 'fan', None), getattr(layer, 'n_groups', 1)
        self.weight = nn.Parameter(torch.empty(n_channels, *layer.weight.shape))
        self.bias = None
        if layer.bias is not None:
            self.bias = nn.Parameter(torch.empty(n_channels, 1, layer.out_features))

    def forward(self, x):
        T, C, n_groups = x.size(1), self.n_channels, self.n_groups
        x = x.reshape(C, -1, n_groups, x.size(-1) // n_groups).transpose(1, 2)  # (C, ., B*T, .)
        y = x @ self.weight.unflatten(1, (n_groups, -1)).mT  # (C, n_groups, B*T, n_out/n_groups)
        y = y.transpose(1, 2).flatten(2)  # (C, B*T, n_out)
        y = y if self.bias is None else y + self.bias
        return y.view(-1, T, y.size(-1))


class ExpertLinear(ChannelLinear):
    """A Linear for each of E experts as one grouped product. share: how many of the experts a row
    meets, of all."""

    def __init__(self, layer, n_experts, share):
        super().__init__(layer, n_experts)
        self.share = share

    def forward(self, x, ends):
        """x (n, n_in), sorted by expert; ends (E,): where the rows of each end -> (n, n_out)."""
        weight, device = self.weight, x.device.type
        if torch.is_autocast_enabled(device):
            x, weight = (y.to(torch.get_autocast_dtype(device)) for y in (x, weight))
        # grouped products take rows of 16 bytes, no float64, and compiled nothing but bfloat16
        bfloat16_alone = torch.compiler.is_compiling()
        takes = {torch.bfloat16} if bfloat16_alone else {torch.bfloat16, torch.float32}
        if x.dtype in takes and not any(width % 8 for width in weight.shape[1:]):
            return F.grouped_mm(x, weight.mT, offs=ends)
        rows = x.split(ends.diff(prepend=ends.new_zeros(1)).tolist())
        return torch.cat([F.linear(row, matrix) for row, matrix in zip(rows, weight)])


def make_linear(n_in, n_out, bias, rank=None, inner_norm=False, writes=False):
    """A matrix; with a rank, two matrices of that rank, with an RMSNorm between them if inner_norm.
    The bias belongs to the last one, and so does writing into the residual stream."""
    if rank is None:
        return Linear(n_in, n_out, bias, writes=writes)
    norm = [RMSNorm(rank, latent_of=n_in)] if inner_norm else []
    second = Linear(rank, n_out, bias, writes=writes, fan=None if inner_norm else rank)
    return nn.Sequential(Linear(n_in, rank), *norm, second)


def rope_table(length, rope_dims, theta, factor=1.0, trained_length=None):
    """Cosine and sine, (2, length, rope_dims/2), of position times theta^(-2i/rope_dims); None if
    rope_dims is 0. RoFormer, section 3.2.2.

    factor: angles are divided by it, so that positions beyond those of training stay within their
    range. trained_length: only those of pairs that turn less than once in so many positions; of
    pairs that turn 32 times and more none, and in between a share (YaRN, arXiv 2309.00071, section
    3.2).
    """
    if not rope_dims:
        return None
    frequency = theta ** (-torch.arange(0, rope_dims, 2, dtype=torch.float64) / rope_dims)
    share = 1.0  # of a pair that is divided
    if trained_length:
        first, last = (math.log(trained_length / (turns * 2 * math.pi)) * rope_dims
                       / (2 * math.log(theta)) for turns in (32, 1))  # pairs that turn so often
        first, last = max(math.floor(first), 0), min(math.ceil(last), rope_dims - 1)
        pair = torch.arange(rope_dims // 2, dtype=torch.float64)
        share = ((pair - first) / max(last - first, 0.001)).clamp(0, 1)
    frequency = frequency * (1 - share + share / factor)
    angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
    return torch.stack((angle.cos(), angle.sin())).float()


def rope_until(table, end):
    """The rotary table up to position end - 1; None if there is none. In a static step, where end
    is a tensor, only the row of that position."""
    if table is None:
        return None
    return table.index_select(1, end - 1) if isinstance(end, torch.Tensor) else table[:, :end]


def rows_until(weight, end, T):
    """The rows of the T positions up to end - 1; T is 1 in a static step, where end is a tensor."""
    if isinstance(end, torch.Tensor):
        return weight.index_select(0, end - 1)
    return weight[end - T:end]


def rotate(x, table):
    """Rotates the first rope_dims dimensions of x (..., T, d), whose positions are the last T of
    the table. Dimension i forms a pair with i + rope_dims/2."""
    # the table is float32 even under autocast: in bfloat16 neighbours would share an angle
    cos, sin = table[:, table.size(1) - x.size(-2):].unbind()
    half = cos.size(-1)
    a, b, rest = x.split((half, half, x.size(-1) - 2 * half), dim=-1)
    a, b = a * cos - b * sin, b * cos + a * sin
    return torch.cat((a.type_as(x), b.type_as(x), rest), dim=-1)


def split_heads(x, n_head):
    return x.unflatten(-1, (n_head, -1)).transpose(1, 2)  # (B, T, H*d) -> (B, H, T, d)


def join_heads(y):
    return y.transpose(1, 2).flatten(2)  # (B, H, T, dv) -> (B, T, H*dv)


def attend(q, k, v, causal=False, key_mask=None, dropout_p=0.0, window=None, sink=None,
           scale=None):
    """Softmax attention with scale 1/sqrt(d), or another:
    q (B, H, T, d), k (B, Hkv, S, d), v (B, Hkv, S, dv) -> (B, T, H*dv).

    key_mask: (B, S) bool, True = may be attended to, or a mask that broadcasts to (B, H, T, S).
    causal: the T queries stand at the last T of the S positions and see nothing later; with a
    window they see only the last `window` keys, their own included.
    sink: (H,) or None, see softmax_attention.
    """
    T, S, d, dv = q.size(2), k.size(2), q.size(-1), v.size(-1)
    scale = d ** -0.5 if scale is None else scale
    # Flash kernels want heads of one width. Padding with zeros changes no product, and it costs
    # less than the unfused path.
    if d < dv:
        q, k = F.pad(q, (0, dv - d)), F.pad(k, (0, dv - d))
    elif dv < d:
        v = F.pad(v, (0, d - dv))

    windowed = window is not None and window < S
    if windowed and T == S:
        y = attend_in_windows(q, k, v, window, sink, dropout_p=dropout_p, scale=scale)
        return join_heads(y[..., :dv])
    if windowed:
        S = min(S, T + window - 1)  # the first query sees no key before these
        k, v = k[:, :, -S:], v[:, :, -S:]

    mask = key_mask
    if mask is not None and mask.dim() == 2:
        mask = mask[:, None, None, :]  # (B, S) -> (B, 1, 1, S)
    if causal and T > 1 and (T < S or windowed):
        # is_causal would take the queries for the first T positions
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
        if windowed:
            mask = mask.triu(S - T - window + 1)
    y = softmax_attention(q, k, v, sink, mask, is_causal=causal and mask is None and T > 1,
                          dropout_p=dropout_p, scale=scale)
    return join_heads(y[..., :dv])


def softmax_attention(q, k, v, sink, mask, is_causal=False, *, scale, dropout_p):
    """F.scaled_dot_product_attention. sink (H,) or None: a logit of each head that counts in the
    denominator of the softmax and takes no value (gpt-oss, arXiv 2508.10925).

    The sink is a key before all others, whose value is zero. In a further dimension it is 1, and
    queries are the logit; so the fused kernels do it, which have no sink of their own.
    """
    if sink is not None:
        logit = (sink / scale).to(q.dtype)[:, None, None].expand(*q.shape[:1], -1, q.size(2), 1)
        q = F.pad(torch.cat((q, logit), dim=-1), (0, 0, int(is_causal), 0))
        k, v = F.pad(k, (0, 1, 1, 0)), F.pad(v, (0, 1, 1, 0))
        k[:, :, 0, -1].fill_(1.0)
        mask = None if mask is None else F.pad(mask, (1, 0), value=True)
    # A CPU has no kernel with dropout, and the backward pass of the one for bfloat16 is slow
    few = q.dtype == torch.bfloat16 and k.size(2) <= 512 and torch.is_grad_enabled()
    if (dropout_p or few) and q.device.type == 'cpu' and not torch.compiler.is_compiling():
        y = attention_in_steps(q, k, v, mask, is_causal, scale, dropout_p)
    else:
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale,
            enable_gqa=q.size(1) != k.size(1))
    # is_causal lets query i see key i and those before: a query in front keeps the two in step
    return y if sink is None else y[:, :, int(is_causal):, :-1]


def attention_in_steps(q, k, v, mask, is_causal, scale, dropout_p):
    """F.scaled_dot_product_attention, for a CPU on which that is slower."""
    if q.size(1) != k.size(1):
        k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
    if is_causal:
        mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool).tril()
    scores = q @ (k * scale).transpose(-2, -1)  # (B, H, T, S)
    if mask is not None:
        # in place, and with no pass of its own on the way back, as masked_fill has
        scores.add_(torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, -math.inf))
    weights = scores.softmax(dim=-1)
    return (dropout(weights, dropout_p) if dropout_p else weights) @ v


def attend_in_windows(q, k, v, window, sink, **options):
    """Causal attention in which a query sees the last `window` keys, (B, H, T, d) -> (B, H, T, dv).

    The sequence is cut into n = T/W blocks, which are folded into the batch. A block meets its own
    keys and those of the block before it: T * 2W products instead of T * T.
    """
    B, T = q.size(0), q.size(2)
    q, k, v = (F.pad(x, (0, 0, 0, -T % window)).unflatten(2, (-1, window)) for x in (q, k, v))
    n = q.size(2)  # q, k, v: (B, H, n, W, d)

    def with_block_before(x):
        return torch.cat((F.pad(x, (0, 0, 0, 0, 1, 0))[:, :, :-1], x), dim=3)  # (B, H, n, 2W, d)

    k, v = with_block_before(k), with_block_before(v)
    mask = torch.ones(window, 2 * window, dtype=torch.bool, device=q.device).tril(window).triu(1)
    mask = mask.repeat(n, 1, 1)  # (n, W, 2W)
    mask[0, :, :window] = False  # there is no block before the first
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # (B*n, H, ., d)
    y = softmax_attention(q, k, v, sink, mask.repeat(B, 1, 1)[:, None], **options)
    return y.unflatten(0, (B, n)).transpose(1, 2).flatten(2, 3)[:, :, :T]


# --------------------------------------------------------------------------------------------------
# attention


class Attention(nn.Module):
    """What an attention has to provide. To add one, subclass this class or one below it:

    options      names of the fields of BlockConfig that this attention has and others may not have
    check        raises ConfigError on options that contradict each other
    __init__     builds the projections; `make_queries` and `make_output` build those of the queries
                 and `o_proj`. A Linear that writes into the residual stream says writes=True, one
                 for keys or values says on_source=True
    heads        what the heads have read. It gives queries, keys and values to self.attend; if it
                 computes attention in another way, it has to obey causal, window and n_channels
    cache_width  how many numbers `heads` gives to the cache for each token; cache_fixed, how many
                 it keeps whatever the length
    matrices     what each head does to a token; only svd.py asks for it
    static_step  True, if with a cache it needs no more than `heads` of one new token, their rows of
                 the rotary table and a key_mask of all rows of the cache; for sample.py --compile

    and name it in ATTENTIONS. make_attention checks what it can. Everything else follows: every
    architecture, FLOPs, cache bytes, initial weights, optimizer groups, checkpoints.

    Every attention can have an output latent (MLA-o, see OutputLatent) and

    gate=True    what the heads have read passes a gate, the sigmoid of a projection of the layer's
                 input, (B, T, D) -> (B, T, H*dv), element by element (arXiv 2505.06708)
    sink=True    each head has one learned logit more in the denominator of its softmax, so that it
                 can read little; see softmax_attention (gpt-oss, arXiv 2508.10925)

    Neither caches anything.
    """

    options = ()
    static_step = False  # whether `heads` gives, with a StaticCache, what it gives with a Cache
    window = None  # keys that a query sees at most; GroupedLatent sets it, and V4
    n_channels = 1  # parallel copies that are folded into the batch; ChannelBlock sets it

    def __init__(self, config, source_width=None):
        """config: a BlockConfig. source_width: width of the sequence that is attended to, if that
        is another than the one that asks."""
        super().__init__()
        self.source_width = source_width or config.n_embd
        self.n_head, self.head_dim = config.n_head, config.head_dim
        self.v_head_dim, self.rope_dims = config.v_head_dim or config.head_dim, config.rope_dims
        self.n_softmax = config.n_head * config.kv_branches  # each head has one, but for MLRA
        self.causal, self.dropout = config.causal, config.attention_dropout
        self.scale = config.softmax_factor * config.head_dim ** -0.5
        self.terms = {}  # what it reports of a call in training, as terms of LanguageModel.body
        v_width = self.n_head * self.v_head_dim
        self.gate_proj = Linear(config.n_embd, v_width) if config.gate else None
        self.sink = nn.Parameter(torch.zeros(self.n_softmax)) if config.sink else None

    def make_queries(self, config, bias=False):
        """The matrices that `queries` applies: one, or two with a normed latent in between."""
        width, self.q_latent = self.n_head * self.head_dim, config.q_latent
        if self.q_latent:
            self.q_a_proj = Linear(config.n_embd, self.q_latent)
            self.q_a_norm = RMSNorm(self.q_latent, latent_of=config.n_embd)
            self.q_b_proj = Linear(self.q_latent, width, bias)
        else:
            self.q_proj = Linear(config.n_embd, width, bias)

    def queries(self, x):
        """Those of all heads, (B, T, D) -> (B, H, T, d)."""
        q = self.q_b_proj(self.q_a_norm(self.q_a_proj(x))) if self.q_latent else self.q_proj(x)
        return split_heads(q, self.n_head)

    def make_output(self, config, bias=False):
        """The matrix o_proj, or with o_latent the two of an output latent."""
        v_width = self.n_head * self.v_head_dim
        if config.o_latent:
            self.o_proj = OutputLatent(self.n_head, v_width, config.o_latent, config.n_embd,
                                       config.o_norm, bias, config.o_groups)
        else:
            self.o_proj = Linear(v_width, config.n_embd, bias, writes=True)

    @classmethod
    def check(cls, config):
        """Raises ConfigError if options of this attention contradict each other."""

    def heads(self, x, source, *, rope=None, source_rope=None, key_mask=None, cache=None):
        """What the heads have read, side by side: x (B, T, D) -> (B, T, H*dv).

        source: the tokens to attend to, (B, S, width), often x itself. rope: the rotary table up to
        the last position of x, or None; source_rope: that of the source. key_mask: see `attend`.
        cache: x and source hold the new tokens alone; cache.extend(self, ...) stores what they add,
        rotated or not, and returns it behind what came before.
        """
        raise NotImplementedError

    def cache_width(self):
        """Numbers that generation keeps for a token in this attention."""
        raise NotImplementedError(f'{type(self).__name__} has no cache_width')

    def cache_fixed(self):
        """Numbers that generation keeps beside, at most, whatever the length."""
        return 0

    def matrices(self):
        """What each head does to a normed token: {part: (heads (H, d, n), basis (n, D) or None)}.
        The matrix of a head is heads[h] @ basis; where basis is None, n is D. If groups of heads
        have a basis each, it is (groups, n, D).

        Parts: q, k, v, o, and q_rope and k_rope for the rotated dimensions, which stand apart; a
        part without dimensions is left out. For o it is the transpose of what a head writes. Gains
        of the attention's norms are folded in; a gate is not, as it is another for each token.
        """
        raise NotImplementedError(f'{type(self).__name__} has no matrices')

    def query_matrices(self):
        """(heads, basis) of `queries`, as in `matrices`."""
        if not self.q_latent:
            return self.q_proj.weight.unflatten(0, (self.n_head, -1)), None  # (H, d, D)
        basis = self.q_a_norm.weight[:, None] * self.q_a_proj.weight  # (q_latent, D)
        return self.q_b_proj.weight.unflatten(0, (self.n_head, -1)), basis

    def output_matrices(self):
        """The part o of `matrices`."""
        if isinstance(self.o_proj, OutputLatent):
            return self.o_proj.matrices()
        return self.o_proj.weight.t().unflatten(0, (self.n_head, -1)), None  # (H, dv, D)

    def forward(self, x, *, source=None, rope=None, source_rope=None, **context):
        """`heads`, the gate and o_proj. Without a source x attends to itself, without a source_rope
        the source stands at the positions of x."""
        source = x if source is None else source
        source_rope = rope if source_rope is None else source_rope
        if isinstance(context.get('cache'), StaticCache):
            context['key_mask'] = context['cache'].filled
        y = self.heads(x, source, rope=rope, source_rope=source_rope, **context)
        if self.gate_proj is not None:
            y = y * torch.sigmoid(self.gate_proj(x))
        return self.o_proj(y)

    def attend(self, q, k, v, key_mask=None):
        dropout_p = self.dropout if self.training else 0.0
        return attend(q, k, v, self.causal, key_mask, dropout_p, self.window, self.sink,
                      self.scale)

    # An attention that need not make keys and values of what it caches has a second way to read,
    # for the one new token of a step of generation; these are the parts of it. H/n heads share one
    # of the n tensors that they compare with and read.

    def one_step(self, x, cache):
        return cache is not None and x.size(1) == 1 and self.causal

    def in_window(self, *cached):
        """What one query may see of cached tensors (B, ..., S, width)."""
        if self.window is None:
            return cached
        return [x[..., -self.window:, :] for x in cached]

    def products(self, q, cached):
        """One query of each head, q (B, H, w), times what is cached, (B, n, S, w): (B, H, S)."""
        return (q.unflatten(1, (cached.size(1), -1)) @ cached.mT).flatten(1, 2)

    def read(self, scores, cached, key_mask):
        """Means of what is cached, (B, n, S, w), with the softmax of scores (B, H, S): (B, H, w).
        """
        weights = self.weights(scores, key_mask)
        weights = weights.unflatten(1, (cached.size(1), -1))  # (B, H, S) -> (B, n, H/n, S)
        return (weights @ cached).flatten(1, 2)

    def weights(self, scores, key_mask):
        """The softmax of products q.k, of one query (B, H, S) or of many (B, H, T, S) -> the same.
        key_mask: a mask that broadcasts to (B, H, T, S), or None."""
        scores = scores * self.scale
        if key_mask is not None:
            key_mask = key_mask[:, :, 0] if scores.dim() == 3 else key_mask
            scores = scores.masked_fill(~key_mask, -math.inf)
        if self.sink is None:
            return scores.softmax(dim=-1)
        sink = self.sink.to(scores.dtype).view(-1, *[1] * (scores.dim() - 2))  # (H, ..., 1)
        sink = sink.expand(*scores.shape[:-1], 1)
        return torch.cat((sink, scores), dim=-1).softmax(dim=-1)[..., 1:]

    def score_flops(self, n_keys):
        """Forward FLOPs of a query over n_keys keys: q.k, and the weighted sum of v."""
        return 2 * self.n_channels * self.n_softmax * (self.head_dim + self.v_head_dim) * n_keys

    def product_flops(self, queries, sources):
        """Forward FLOPs, for so many rows, of products of what the matrices make."""
        return 0


class MHA(Attention):
    """Multi-head attention; with n_kv_head < n_head, grouped-query attention. The cache holds
    2 Hkv d numbers a token."""

    options = ('n_kv_head', 'qk_norm', 'bias')
    static_step = True

    def __init__(self, config, source_width=None, n_kv_head=None):
        super().__init__(config, source_width)
        self.n_kv_head = n_kv_head or config.n_kv_head or config.n_head
        kv_width = self.n_kv_head * self.head_dim
        self.make_queries(config, config.bias)
        self.k_proj = Linear(self.source_width, kv_width, config.bias, on_source=True)
        self.v_proj = Linear(self.source_width, kv_width, config.bias, on_source=True)
        self.q_norm = RMSNorm(self.head_dim) if config.qk_norm else identity
        self.k_norm = RMSNorm(self.head_dim) if config.qk_norm else identity
        self.make_output(config, config.bias)

    @classmethod
    def check(cls, config):
        if config.n_kv_head and config.n_head % config.n_kv_head:
            raise ConfigError(f'n_head={config.n_head} is not divisible by '
                              f'n_kv_head={config.n_kv_head}')

    def heads(self, x, source, *, rope=None, source_rope=None, key_mask=None, cache=None):
        q = self.q_norm(self.queries(x))  # (B, H, T, d)
        k = self.k_norm(split_heads(self.k_proj(source), self.n_kv_head))  # (B, Hkv, S, d)
        v = split_heads(self.v_proj(source), self.n_kv_head)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, source_rope)
        if cache is not None:
            k, v = cache.extend(self, k, v)
        if self.sink is not None and self.one_step(x, cache):
            k, v = self.in_window(k, v)  # softmax_attention would copy all of them
            y = self.read(self.products(q[:, :, 0], k), v, key_mask)
            return y.flatten(1)[:, None]  # (B, H, d) -> (B, 1, H*d)
        return self.attend(q, k, v, key_mask)

    def cache_width(self):
        return 2 * self.n_kv_head * self.head_dim

    def matrices(self):
        r, (q, q_basis) = self.rope_dims, self.query_matrices()
        k = self.k_proj.weight.unflatten(0, (self.n_kv_head, -1))  # (Hkv, d, D)
        v = self.v_proj.weight.unflatten(0, (self.n_kv_head, -1))
        if isinstance(self.q_norm, RMSNorm):
            q, k = q * self.q_norm.weight[:, None], k * self.k_norm.weight[:, None]
        parts = dict(v=(v, None), o=self.output_matrices(), q=(q[:, r:], q_basis),
                     q_rope=(q[:, :r], q_basis), k=(k[:, r:], None), k_rope=(k[:, :r], None))
        return {name: part for name, part in parts.items() if part[0].size(1)}


class MFA(MHA):
    """Multi-matrix factorization attention (arXiv 2412.19255): queries go through a normed latent
    of q_latent numbers, so that there can be many heads, and wide ones (head_dim may exceed
    n_embd / n_head). They share one key and one value head. The cache holds 2 d numbers a token.
    """

    options = ('q_latent', 'qk_norm', 'bias')

    def __init__(self, config, source_width=None):
        super().__init__(config, source_width, n_kv_head=1)

    @classmethod
    def check(cls, config):
        if not config.q_latent:
            raise ConfigError("attention='mfa' needs q_latent, the width of its query latent")


class MLA(Attention):
    """Multi-head latent attention (DeepSeek-V2, section 2.1). The keys and values of all heads come
    from one latent of kv_latent numbers a token, queries from one of q_latent (None: straight from
    x). With o_latent, MLA-o, the heads also write through a latent that they share.

        x -- q_a_proj -> norm -> q_b_proj ---------------> q of each head
        x -- kv_a_proj -> norm -> latent (cached) -+- k_b_proj -> k
                                                   +- v_b_proj -> v
        x -- k_rope_proj -> rotate (cached) -----------> the rotated part of k, rope_key='shared'

    Inside a head the rotated dimensions come first. rope_key='per_head': the first rope_dims key
    dimensions of each head are rotated. 'shared' (DeepSeek): all heads share one rotated key of
    rope_dims, which is neither normed nor scaled, and have head_dim - rope_dims of their own.

    kv_groups=g, GLA (arXiv 2505.21487): there are g latents, each with a norm of its own, and the
    i-th is read by the i-th H/g heads. kv_branches=n, MLRA (2603.02188): each head reads n latents
    by n attentions with the same query, and what they have read is added and divided by sqrt(n).
    That is GLA with n times the heads, until the sum. With both there are n*g latents, and a head
    reads n of them.

    The cache holds the n g latents and the shared key, n g L + r numbers, nothing a head. But with
    'per_head', generation has to make the rotated keys of all cached tokens again at each step,
    S*H*r*L multiply-adds a layer. At 8 heads of 32 and a latent of 32 the scores and weighted sums
    of a token then take about 17 times the arithmetic of MHA if 32 dimensions rotate (9 times if 16
    do), where with a shared key of 16 they take 1.25 times.
    """

    options = ('q_latent', 'kv_latent', 'kv_groups', 'kv_branches', 'rope_key', 'v_head_dim')

    def __init__(self, config, source_width=None):
        super().__init__(config, source_width)
        self.shared_key, self.kv_latent = config.rope_key == 'shared', config.kv_latent
        # keys of each head that are rotated again need the angles of all positions, not of the last
        self.static_step = self.shared_key or not self.rope_dims
        self.n_branches = config.kv_branches
        self.n_latents = n = config.kv_groups * config.kv_branches
        k_head_dim = self.head_dim - self.rope_dims if self.shared_key else self.head_dim
        self.make_queries(config)
        self.kv_a_proj = Linear(self.source_width, n * self.kv_latent, on_source=True)
        self.kv_a_norm = RMSNorm(self.kv_latent, latent_of=self.source_width, n_parts=n)
        self.k_b_proj = Linear(n * self.kv_latent, self.n_softmax * k_head_dim, on_source=True,
                               n_groups=n)
        self.v_b_proj = Linear(n * self.kv_latent, self.n_softmax * self.v_head_dim, on_source=True,
                               n_groups=n)
        if self.shared_key:
            self.k_rope_proj = Linear(self.source_width, self.rope_dims, on_source=True)
        self.make_output(config)

    @classmethod
    def check(cls, config):
        if not config.kv_latent:
            raise ConfigError(f'attention={config.attention!r} needs kv_latent, the width of its '
                              'key-value latent')
        if config.n_head % config.kv_groups:
            raise ConfigError(f'n_head={config.n_head} is not divisible by '
                              f'kv_groups={config.kv_groups}')
        if config.rope_key == 'shared' and not 0 < config.rope_dims < config.head_dim:
            raise ConfigError("rope_key='shared' needs rope_dims between 2 and "
                              f'head_dim-1={config.head_dim - 1}: the other dimensions of a key '
                              'belong to its head')

    def heads(self, x, source, *, rope=None, source_rope=None, key_mask=None, cache=None):
        q = self.queries(x)  # (B, H, T, d)
        q = q if rope is None else rotate(q, rope)
        if self.n_branches > 1:
            q = q.repeat(1, self.n_branches, 1, 1)  # (B, n*H, T, d), branch by branch
        latent = self.kv_a_norm(self.kv_a_proj(source))  # (B, S, n*g*L)
        k_rope = latent[..., :0]  # (B, S, r or 0)
        if self.shared_key:
            k_rope = rotate(self.k_rope_proj(source), source_rope)
        if cache is not None:
            latent, k_rope = cache.extend(self, latent, k_rope)
        if self.one_step(x, cache) and self.n_channels == 1:
            latent, k_rope = self.in_window(latent, k_rope)
            y = self.absorbed(q[:, :, 0], latent, k_rope, source_rope, key_mask)
        else:
            k = split_heads(self.k_b_proj(latent), self.n_softmax)  # (B, n*H, S, d or d-r)
            v = split_heads(self.v_b_proj(latent), self.n_softmax)
            if self.shared_key:
                k = torch.cat((k_rope[:, None].expand(-1, self.n_softmax, -1, -1), k), dim=-1)
            elif source_rope is not None:
                k = rotate(k, source_rope)
            y = self.attend(q, k, v, key_mask)
        if self.n_branches > 1:
            # (B, T, n*H*dv) -> (B, T, H*dv)
            y = y.unflatten(-1, (self.n_branches, -1)).sum(dim=-2) * self.n_branches ** -0.5
        return y

    def absorbed(self, q, latent, k_rope, source_rope, key_mask):
        """`heads` for one token of generation, without the sum over branches: q (B, n*H, d), latent
        (B, S, n*g*L), k_rope (B, S, r), key_mask (1, 1, 1, S) or None -> (B, 1, n*H*dv). k_b_proj
        is applied to the query, and v_b_proj to the weighted sum of the latents, instead of both to
        S latents (DeepSeek-V2, section 2.1.2)."""
        to_k = self.k_b_proj.weight.unflatten(0, (self.n_softmax, -1))  # (n*H, d or d-r, L)
        to_v = self.v_b_proj.weight.unflatten(0, (self.n_softmax, -1))  # (n*H, dv, L)
        q_rotated, q_plain = q.split((self.rope_dims, self.head_dim - self.rope_dims), dim=-1)
        scores = 0.0  # (B, n*H, S)
        if self.shared_key:
            scores = q_rotated @ k_rope.transpose(1, 2)
        elif self.rope_dims:
            to_rotated, to_k = to_k.split(q_rotated.shape[-1:] + q_plain.shape[-1:], dim=1)
            k_rotated = grouped_linear(latent, to_rotated.flatten(0, 1), self.n_latents)
            k_rotated = rotate(split_heads(k_rotated, self.n_softmax), source_rope)
            scores = (k_rotated @ q_rotated[..., None])[..., 0]  # of (B, n*H, S, r)
        # heads first: a matrix of a head is read once for all sequences
        q_absorbed = (q_plain.transpose(0, 1) @ to_k).transpose(0, 1)  # (n*H, B, L) -> (B, n*H, L)
        latent = split_heads(latent, self.n_latents)  # (B, n*g, S, L)
        scores = scores + self.products(q_absorbed, latent)
        read = self.read(scores, latent, key_mask).transpose(0, 1)  # (B, n*H, L) -> (n*H, B, L)
        y = read @ to_v.transpose(1, 2)  # (n*H, B, dv)
        return y.transpose(0, 1).flatten(1)[:, None]  # -> (B, 1, n*H*dv)

    def cache_width(self):
        return self.n_latents * self.kv_latent + self.rope_dims * self.shared_key

    def matrices(self):
        """With branches, each head stands there once for each."""
        r, n, (q, q_basis) = self.rope_dims, self.n_branches, self.query_matrices()
        o, o_basis = self.output_matrices()
        basis = self.kv_a_norm.weight[:, None] * self.kv_a_proj.weight  # (n*g*L, D)
        if self.n_latents > 1:
            basis = basis.unflatten(0, (self.n_latents, -1))  # (n*g, L, D)
        k, v = (layer.weight.unflatten(0, (self.n_softmax, -1))  # (n*H, ., L)
                for layer in (self.k_b_proj, self.v_b_proj))
        if self.shared_key:
            k, k_rope = (k, basis), (self.k_rope_proj.weight[None], None)
        else:
            k, k_rope = (k[:, r:], basis), (k[:, :r], basis)
        if n > 1:
            q, o = q.repeat(n, 1, 1), o.repeat(n, 1, 1) * n ** -0.5
        if o_basis is not None and o_basis.dim() == 3:
            o_basis = o_basis.repeat(n, 1, 1)
        parts = dict(v=(v, basis), o=(o, o_basis), q=(q[:, r:], q_basis),
                     q_rope=(q[:, :r], q_basis), k=k, k_rope=k_rope)
        return {name: part for name, part in parts.items() if part[0].size(1)}


class GTA(Attention):
    """Grouped-tied attention (arXiv 2505.21487). A group of heads has one vector of d numbers: it
    is their value, and its first d - r are also their key, behind one rotated key of rope_dims = r
    that all heads share. As published, r is d/2. Without rotary positions keys are values.

        x -- q_proj -> rotate -----------------> q of each head
        x -- k_rope_proj -> rotate (cached) ---> the first r dimensions of k, the same in all groups
        x -- kv_proj (cached) -----------------> v of each group; its first d - r: the others of k

    The cache holds Hkv d + r numbers a token.
    """

    options = ('n_kv_head',)
    static_step = True
    check = MHA.check

    def __init__(self, config, source_width=None):
        super().__init__(config, source_width)
        self.n_kv_head = config.n_kv_head or config.n_head
        self.make_queries(config)
        self.kv_proj = Linear(self.source_width, self.n_kv_head * self.head_dim, on_source=True)
        if self.rope_dims:
            self.k_rope_proj = Linear(self.source_width, self.rope_dims, on_source=True)
        self.make_output(config)

    def heads(self, x, source, *, rope=None, source_rope=None, key_mask=None, cache=None):
        q = self.queries(x)  # (B, H, T, d)
        v = split_heads(self.kv_proj(source), self.n_kv_head)  # (B, Hkv, S, d)
        k_rope = source[..., :0]  # (B, S, r or 0)
        if self.rope_dims:
            q, k_rope = rotate(q, rope), rotate(self.k_rope_proj(source), source_rope)
        if cache is not None:
            v, k_rope = cache.extend(self, v, k_rope)
        if self.one_step(x, cache):
            return self.tied(q[:, :, 0], *self.in_window(v, k_rope), key_mask)
        plain = v[..., :self.head_dim - self.rope_dims]
        k = torch.cat((k_rope[:, None].expand(-1, self.n_kv_head, -1, -1), plain), dim=-1)
        return self.attend(q, k, v, key_mask)

    def tied(self, q, v, k_rope, key_mask):
        """`heads` for one token of generation, which copies no keys: q (B, H, d), v (B, Hkv, S, d),
        k_rope (B, S, r) -> (B, 1, H*d)."""
        r, d = self.rope_dims, self.head_dim
        scores = self.products(q[..., r:], v[..., :d - r]) + q[..., :r] @ k_rope.transpose(1, 2)
        return self.read(scores, v, key_mask).flatten(1)[:, None]  # (B, H, d) -> (B, 1, H*d)

    def cache_width(self):
        return self.n_kv_head * self.head_dim + self.rope_dims

    def matrices(self):
        r, (q, _) = self.rope_dims, self.query_matrices()
        v = self.kv_proj.weight.unflatten(0, (self.n_kv_head, -1))  # (Hkv, d, D)
        parts = dict(v=(v, None), o=self.output_matrices(), q=(q[:, r:], None),
                     q_rope=(q[:, :r], None), k=(v[:, :self.head_dim - r], None))
        if r:
            parts['k_rope'] = self.k_rope_proj.weight[None], None
        return {name: part for name, part in parts.items() if part[0].size(1)}


class TPA(Attention):
    """Tensor product attention (arXiv 2501.06425). The queries of all heads, a matrix H x d for
    each token, are the mean of q_rank products of a vector over the heads and one over the
    channels, and both are linear in the token. So are keys and values, with kv_rank. q_rank=None:
    queries straight from x.

        q[h, c] = 1/R sum_i a[i, h] b[i, c]     a = q_head_proj(x) (R, H), b = q_channel_proj(x)

    Rotating the vectors over the channels rotates their products. The cache holds the vectors,
    2 R (H + d) numbers a token. As no matrix of a head makes its key of a token, there are no
    `matrices`.
    """

    options = ('q_rank', 'kv_rank')
    static_step = True

    def __init__(self, config, source_width=None):
        super().__init__(config, source_width)
        self.q_rank, self.kv_rank = config.q_rank, config.kv_rank
        if self.q_rank:
            self.q_head_proj, self.q_channel_proj = self.factors(config.n_embd, self.q_rank)
        else:
            self.make_queries(config)
        self.k_head_proj, self.k_channel_proj = self.factors(self.source_width, self.kv_rank, True)
        self.v_head_proj, self.v_channel_proj = self.factors(self.source_width, self.kv_rank, True)
        self.make_output(config)

    def factors(self, width, rank, on_source=False):
        """The matrices of vectors over the heads and over the channels. The former start so large,
        sqrt(rank), that the mean of the products is as large as a product of width terms."""
        return (Linear(width, rank * self.n_head, on_source=on_source, fan=width / rank),
                Linear(width, rank * self.head_dim, on_source=on_source))

    @classmethod
    def check(cls, config):
        if not config.kv_rank:
            raise ConfigError("attention='tpa' needs kv_rank, of its keys and of its values")

    def heads(self, x, source, *, rope=None, source_rope=None, key_mask=None, cache=None):
        if self.q_rank:
            q_head = split_heads(self.q_head_proj(x), self.q_rank)  # (B, R, T, H)
            q = split_heads(self.q_channel_proj(x), self.q_rank)  # (B, R, T, d)
        else:
            q = self.queries(x)  # (B, H, T, d)
        k_head, k, v_head, v = (
            split_heads(layer(source), self.kv_rank)  # (B, R, S, H or d)
            for layer in (self.k_head_proj, self.k_channel_proj,
                          self.v_head_proj, self.v_channel_proj))
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, source_rope)
        if self.q_rank:
            q = mean_of_products(q_head, q)
        if cache is not None:
            k_head, k, v_head, v = cache.extend(self, k_head, k, v_head, v)
        if self.one_step(x, cache):
            return self.factored(q, *self.in_window(k_head, k, v_head, v), key_mask)
        return self.attend(q, mean_of_products(k_head, k), mean_of_products(v_head, v), key_mask)

    def factored(self, q, k_head, k, v_head, v, key_mask):
        """`heads` for one token of generation, which makes no keys and values of the heads:
        q (B, H, 1, d), k_head and v_head (B, R, S, H), k and v (B, R, S, d) -> (B, 1, H*d)."""
        q = q.transpose(1, 2)  # (B, 1, H, d)
        scores = (q @ k.transpose(2, 3) * k_head.transpose(2, 3)).mean(dim=1)  # (B, H, S)
        weights = self.weights(scores, key_mask)[:, None] * v_head.transpose(2, 3)  # (B, R, H, S)
        return (weights @ v).mean(dim=1).flatten(1)[:, None]

    def cache_width(self):
        return 2 * self.kv_rank * (self.n_head + self.head_dim)

    def product_flops(self, queries, sources):
        products = queries * (self.q_rank or 0) + sources * 2 * self.kv_rank
        return 2 * self.n_channels * self.n_head * self.head_dim * products


def mean_of_products(head, channel):
    """(B, R, T, H), (B, R, T, d) -> (B, H, T, d), the mean over R of the outer products."""
    head = head.permute(0, 2, 3, 1) / head.size(1)  # (B, T, H, R)
    return (head @ channel.transpose(1, 2)).transpose(1, 2)


class Compressor(nn.Module):
    """The history of DeepSeek-V4 in entries, one of every m tokens (arXiv 2606.19348, section 2.3):
    a mean of their vectors, with weights of its own for each number.

        x -- kv_proj ------------------------------> vectors -+
        x -- gate_proj -> + position_bias -> softmax -> sum <-+
                                                         +-> norm -> rotate (cached) -> entry

    overlap, CSA: a token makes two vectors, the first for the entry of the group that follows and
    the second for that of its own, so that an entry is a mean over 2m tokens. An entry exists once
    its group is complete, and is rotated by the position of the first token of that group.
    """

    def __init__(self, n_in, width, group_size, overlap):
        super().__init__()
        self.group_size, self.overlap = group_size, overlap
        self.kv_proj = Linear(n_in, width * (1 + overlap), on_source=True)
        self.gate_proj = Linear(n_in, width * (1 + overlap), on_source=True)
        self.position_bias = nn.Parameter(torch.zeros(group_size, width * (1 + overlap)))
        self.kv_norm = RMSNorm(width)

    def forward(self, source, rope, cache):
        """source (B, S, n_in), the new tokens -> the entries of all groups until now, (B, n, width)
        """
        m, start = self.group_size, 0 if cache is None else cache.n_tokens
        end, first = start + source.size(1), start // m  # first: the group that is open at `start`
        kv, gate = self.kv_proj(source), self.gate_proj(source)
        if cache is not None:  # behind the tokens of the open group, and with overlap of the last
            kv, gate = cache.last((self, 'open'), self.n_open(end), kv, gate)
        entries = self.pool(kv, gate)[:, int(self.overlap and first > 0):]
        if rope is not None:
            entries = rotate(entries, rope[:, first * m:end // m * m:m])
        if cache is not None:
            entries, = cache.extend(self, entries, every=m)
        return entries

    def n_open(self, end):
        """How many tokens, of `end`, have a part in entries that do not exist yet."""
        m = self.group_size
        return end % m + m * (self.overlap and end >= m)

    def pool(self, kv, gate):
        """The entry of each complete group of (B, S, .): (B, n, width). With overlap, the first one
        has no group before it."""
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
    """Chooses the entries that a query of DeepSeek-V4 reads, by the scores of a few narrow heads,
    the sum over h of w_h relu(q_h . k). Its keys k come from a Compressor of its own.

    The choice has no gradient, so the loss does not train it, and x, queries' latents and source
    are taken as given. Its own loss is the Kullback-Leibler divergence of the softmax of its scores
    from what the attention reads of all entries that a query may see, heads added up and divided by
    their sum (DeepSeek-V3.2, arXiv 2512.02556, section 2.1).
    """

    def __init__(self, config, source_width):
        super().__init__()
        self.n_head, self.head_dim = config.index_n_head, config.index_head_dim
        self.topk = config.index_topk
        self.compressor = Compressor(source_width, self.head_dim, config.csa_group, overlap=True)
        self.q_b_proj = Linear(config.q_latent, self.n_head * self.head_dim)
        self.weights_proj = Linear(config.n_embd, self.n_head)

    def forward(self, x, q_latent, source, rope, source_rope, cache):
        """q (B, h, T, di), w (B, h, T, 1) and k (B, 1, n, di) of `scores`."""
        k = self.compressor(source.detach(), source_rope, cache)[:, None]
        q = split_heads(self.q_b_proj(q_latent.detach()), self.n_head)
        w = self.weights_proj(x.detach()).mT[..., None] * (self.n_head * self.head_dim) ** -0.5
        return q if rope is None else rotate(q, rope), w, k

    def scores(self, q, w, k):
        """(B, T, n), in float32 at least."""
        products = F.relu(q @ k.mT)  # (B, h, T, n)
        return (products.to(torch.promote_types(q.dtype, torch.float32)) * w).sum(dim=1)

    def choose(self, scores):
        """The indices of the topk largest scores (B, T, n) of each query, or of all: (B, T, k)."""
        # relu makes many scores exactly 0: of those the latest entries go first
        order = 1e-30 * torch.arange(1, scores.size(-1) + 1, device=scores.device)
        scores = torch.where(scores == 0, order, scores)
        return scores.topk(min(self.topk, scores.size(-1)), dim=-1).indices

    def divergence(self, scores, read):
        """The sum over all queries: scores (B, T, n), read (B, T, n), not yet divided by its sum.
        """
        read = read / read.sum(dim=-1, keepdim=True).clamp(min=1e-30)
        return F.kl_div(scores.log_softmax(dim=-1), read, reduction='sum')


class V4(Attention):
    """The attention of DeepSeek-V4 (arXiv 2606.19348, section 2.3). One vector of d numbers a token
    is the key and the value of all heads. A query reads the last `window` of them, and what lies
    before through entries, each of which stands for a group of tokens (see Compressor). How many
    depends on the kind of the layer, a word of `layers`:

        window    none
        csa       one of every csa_group tokens, each of them a mean over two groups. With
                  index_topk a query reads only so many, which an Indexer chooses
        hca       one of every hca_group tokens

        x -- q_a_proj -> norm -> q_b_proj -> norm of each head, no gain -> rotate -> q
        x -- kv_proj -> norm -> rotate (the last W - 1 cached) ------------+-------> k = v
        x -- Compressor (entries and open group cached) -------------------+

    Values are rotated as keys are, so what a head has read is rotated back by the position of the
    query. The published layer has a sink and an output latent in groups: sink=True, o_latent,
    o_groups. There the base of the rotary angles is 10,000 in window layers and 160,000, stretched
    by YaRN, in the others; here all have rope_theta.

    The cache grows by d/m numbers a token, with an indexer by (d + index_head_dim)/m; see
    cache_fixed for the rest.
    """

    options = ('q_latent', 'window', 'layers', 'csa_group', 'hca_group', 'index_topk',
               'index_n_head', 'index_head_dim', 'index_loss_coeff')
    chunk = 256  # queries that are read for at once, or as many as the window has

    def __init__(self, config, source_width=None):
        """config.layers: the one word of this layer."""
        super().__init__(config, source_width)
        self.window, self.index_loss_coeff = config.window, config.index_loss_coeff
        self.make_queries(config)
        self.kv_proj = Linear(self.source_width, self.head_dim, on_source=True)
        self.kv_norm = RMSNorm(self.head_dim)
        self.compressor = self.indexer = None
        if config.layers != 'window':
            sparse = config.layers == 'csa'
            self.compressor = Compressor(self.source_width, self.head_dim,
                                         config.csa_group if sparse else config.hca_group, sparse)
            if sparse and config.index_topk:
                self.indexer = Indexer(config, self.source_width)
        self.make_output(config)

    @classmethod
    def check(cls, config):
        if not (config.q_latent and config.window):
            raise ConfigError("attention='v4' needs q_latent, the width of its query latent, and "
                              'window, the tokens that it reads exactly')
        if not config.causal:
            raise ConfigError("attention='v4' compresses the past: it needs causal=True")
        kinds = config.layers.split()
        if not kinds or not {*kinds} <= {'window', 'csa', 'hca'}:
            raise ConfigError(f"layers={config.layers!r}: takes words out of window, csa and hca, "
                              "such as 'window csa hca csa'")
        if config.index_topk and config.rope_dims > config.index_head_dim:
            raise ConfigError(f'rope_dims={config.rope_dims} is more than '
                              f'index_head_dim={config.index_head_dim}: change one')

    def heads(self, x, source, *, rope=None, source_rope=None, key_mask=None, cache=None):
        end = source.size(1) + (0 if cache is None else cache.n_tokens)
        q_latent = self.q_a_norm(self.q_a_proj(x))
        q = split_heads(self.q_b_proj(q_latent), self.n_head)  # (B, H, T, d)
        q = F.rms_norm(q, q.shape[-1:], eps=1e-6)
        kv = self.kv_norm(self.kv_proj(source))[:, None]  # (B, 1, S, d)
        if rope is not None:
            q, kv = rotate(q, rope), rotate(kv, source_rope)
        if cache is not None:
            kv, = cache.last(self, min(end, self.window - 1), kv)
        entries, index = kv[:, :, :0], None  # (B, 1, n, d)
        if self.compressor is not None:
            entries = self.compressor(source, source_rope, cache)[:, None]
        if self.indexer is not None:
            index = self.indexer(x, q_latent, source, rope, source_rope, cache)
        if self.one_step(x, cache):
            y = self.step(q[:, :, 0], kv, entries, index)[:, :, None]  # (B, H, 1, d)
        else:
            y = self.in_chunks(q, kv, entries, index, end)
        if rope is not None:
            cos, sin = rope
            y = rotate(y, torch.stack((cos, -sin)))
        return join_heads(y)

    def step(self, q, kv, entries, index):
        """What one token of generation reads: q (B, H, d) -> (B, H, d)."""
        if index is not None:
            chosen = self.indexer.choose(self.indexer.scores(*index))[:, 0]  # (B, k)
            entries = entries.gather(2, chosen[:, None, :, None].expand(-1, -1, -1, q.size(-1)))
        k = torch.cat((kv, entries), dim=2)
        return self.read(self.products(q, k), k, None)

    def in_chunks(self, q, kv, entries, index, end):
        """What T queries read, the last of which is at position end - 1: (B, H, T, d) -> the same.

        A chunk of them meets the keys of its windows and the entries that exist by its end, so that
        no mask or matrix is T x T. kv: (B, 1, S, d), of the last S positions. With an indexer and
        several chunks, backward computes each anew instead of keeping all of their scores.
        """
        T, size = q.size(2), max(self.window, self.chunk)
        read, m = self.read_chunk, self.compressor.group_size if self.compressor else 1
        if index is not None and T > size and torch.is_grad_enabled():
            read = partial(checkpoint, read, use_reentrant=False)
        oldest, parts, divergence = end - kv.size(2), [], 0.0  # oldest: the position of kv's first
        for t, q in zip(range(end - T, end, size), q.split(size, dim=2)):
            stop = t + q.size(2)  # q: (B, H, chunk, d), at positions t to stop - 1
            first, n = max(oldest, t - self.window + 1), min(entries.size(2), stop // m)
            keys = torch.cat((kv[:, :, first - oldest:stop - oldest], entries[:, :, :n]), dim=2)
            here = None
            if index is not None and n:
                q_index, w, k_index = index
                rows = slice(t - end + T, stop - end + T)
                here = q_index[:, :, rows], w[:, :, rows], k_index[:, :, :n]
            y, apart = read(q, keys, n, t, first, here)
            parts.append(y)
            divergence = divergence + apart
        if index is not None and self.training:
            n_queries = q.size(0) * max(1, T - m + 1)  # those that see an entry
            self.terms['index_loss'] = divergence / n_queries, self.index_loss_coeff
        return torch.cat(parts, dim=2)

    def read_chunk(self, q, keys, n, t, first, index):
        """q (B, H, chunk, d), whose first is at position t, keys (B, 1, ., d): those of the
        positions from `first` on, then n entries -> (B, H, chunk, d), the Indexer's divergence."""
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
            scores = scores.masked_fill(~exists, -1e30)  # not -inf: some see no entry at all
            if self.training:
                with torch.no_grad():
                    read = self.weights(q @ keys.mT, mask)[..., -n:].sum(dim=1)
                divergence = self.indexer.divergence(scores, read)
            chosen = torch.zeros_like(scores, dtype=torch.bool)
            chosen = chosen.scatter(-1, self.indexer.choose(scores), True) & exists
            mask = mask.repeat(q.size(0), 1, 1)[:, None]  # (B, 1, chunk, .)
            mask[:, 0, :, -n:] = chosen
        y = softmax_attention(q, keys, keys, self.sink, mask, scale=self.scale,
                              dropout_p=self.dropout if self.training else 0.0)
        return y, divergence

    def cache_width(self):
        if self.compressor is None:
            return 0
        index = self.indexer.head_dim if self.indexer else 0
        return (self.head_dim + index) / self.compressor.group_size

    def cache_fixed(self):
        """Numbers that the cache holds beside, at most: the window, and what the tokens of open
        groups give to entries that do not exist yet."""
        total = (self.window - 1) * self.head_dim
        for part in self.modules():
            if isinstance(part, Compressor):
                m = part.group_size
                total += 2 * part.position_bias.size(1) * part.n_open(2 * m - 1)
        return total

    def matrices(self):
        r, (q, q_basis) = self.rope_dims, self.query_matrices()
        kv = (self.kv_norm.weight[:, None] * self.kv_proj.weight)[None]  # (1, d, D)
        parts = dict(v=(kv, None), o=self.output_matrices(), q=(q[:, r:], q_basis),
                     q_rope=(q[:, :r], q_basis), k=(kv[:, r:], None), k_rope=(kv[:, :r], None))
        return {name: part for name, part in parts.items() if part[0].size(1)}

    def score_flops(self, n_keys):
        """n_keys: of a causal query without a window, on average."""
        T = round(2 * n_keys - 1)  # (T + 1)/2 is what it was
        n_complete = sum_of_least(T, self.compressor.group_size) if self.compressor else 0
        n_read = sum_of_least(T, 1, self.window)
        if self.indexer:
            n_read += sum_of_least(T, self.compressor.group_size, self.indexer.topk)
            index = 2 * self.indexer.n_head * (self.indexer.head_dim + 1) * n_complete
        else:
            n_read, index = n_read + n_complete, 0
        return (4 * self.n_head * self.head_dim * n_read + index) / T


def sum_of_least(T, m, most=math.inf):
    """The sum over t = 1 .. T of min(t // m, most)."""
    n = min(T // m, most)  # reached at t = n m, and kept
    return m * n * (n - 1) // 2 + n * (T - n * m + 1)


class OutputLatent(nn.Module):
    """The output projection of MLA-o, (B, T, H*dv) -> (B, T, D), through a latent of `rank` numbers
    that all heads share: each head has a matrix into it, and one shared matrix leads out of it.

    n_groups=G (DeepSeek-V4, arXiv 2606.19348): the heads stand in G groups with a latent of `rank`
    numbers each, and the one matrix leads out of all G of them.
    norm: 'none'; 'sum', RMSNorm of the latents; 'head', RMSNorm of each head's contribution to its
    latent with a gain of its own, then their sum over the square root of their number.
    """

    def __init__(self, n_head, n_in, rank, n_out, norm='none', bias=False, n_groups=1):
        super().__init__()
        self.n_head, self.norm, self.n_groups = n_head, norm, n_groups
        self.o_a_proj = Linear(n_in, n_groups * rank, n_groups=n_groups)
        self.o_b_proj = Linear(n_groups * rank, n_out, bias, writes=True,
                               fan=rank if norm == 'none' else None)
        if norm == 'head':
            self.gain = nn.Parameter(torch.ones(n_head, rank))
        self.o_norm = RMSNorm(n_groups * rank) if norm == 'sum' else identity

    def forward(self, y):
        if self.norm != 'head':
            return self.o_b_proj(self.o_norm(self.o_a_proj(y)))
        G, H = self.n_groups, self.n_head // self.n_groups
        y = y.unflatten(-1, (G, H, -1))  # (B, T, G, H/G, dv)
        per_head = self.o_a_proj.weight.unflatten(1, (H, -1)).unflatten(0, (G, -1))
        latent = torch.einsum('btghd,grhd->btghr', y, per_head)
        latent = F.rms_norm(latent, latent.shape[-1:], eps=1e-6) * self.gain.unflatten(0, (G, H))
        latent = latent.sum(dim=3) / math.sqrt(H)  # (B, T, G, H/G, R) -> (B, T, G, R)
        return self.o_b_proj(latent.flatten(2))

    def matrices(self):
        """The part o of Attention.matrices: heads (H, dv, R) and basis (R, D), or (G, R, D)."""
        G, H = self.n_groups, self.n_head // self.n_groups
        heads = self.o_a_proj.weight.unflatten(0, (G, -1)).unflatten(2, (H, -1))  # (G, R, H/G, dv)
        heads = heads.permute(0, 2, 3, 1).flatten(0, 1)  # (H, dv, R)
        basis = self.o_b_proj.weight.t()
        if self.norm == 'head':
            heads = heads * self.gain[:, None]
        elif self.norm == 'sum':
            basis = self.o_norm.weight[:, None] * basis
        return heads, basis if G == 1 else basis.unflatten(0, (G, -1))


ATTENTIONS = {'mha': MHA, 'mla': MLA, 'gta': GTA, 'mfa': MFA, 'tpa': TPA, 'v4': V4}


def make_attention(config, source_width=None):
    """The attention that config names. If its projections forgot to say what they serve, initial
    weights and FLOPs would be wrong and nobody would notice, so this asks for it."""
    attention = ATTENTIONS[config.attention](config, source_width)
    for mark, meaning in (('writes', 'adds to the residual stream (o_proj or a part of it)'),
                          ('on_source', 'is applied to the tokens that are attended to')):
        if not any(getattr(module, mark, False) for module in attention.modules()):
            raise TypeError(f'{type(attention).__name__}: no Linear says {mark}=True: the one that '
                            f'{meaning} has to')
    attention.cache_width()  # raises NotImplementedError
    return attention


# --------------------------------------------------------------------------------------------------
# block


class MLP(nn.Module):
    """Position-wise feed-forward. gelu: out(gelu(in x)); relu2: out(relu(in x)^2); swiglu:
    out(silu(in x) * gate x). With mlp_rank each of the matrices is two, and those that read x have
    an RMSNorm in the middle."""

    def __init__(self, config):
        super().__init__()
        self.kind = config.mlp
        D, hidden, bias, rank = config.n_embd, config.mlp_hidden, config.mlp_bias, config.mlp_rank
        self.in_proj = make_linear(D, hidden, bias, rank, inner_norm=True)
        if self.kind == 'swiglu':
            self.gate_proj = make_linear(D, hidden, bias, rank, inner_norm=True)
        self.out_proj = make_linear(hidden, D, bias, rank, writes=True)

    def forward(self, x):
        h = self.in_proj(x)  # (B, T, hidden)
        if self.kind == 'gelu':
            h = F.gelu(h)
        elif self.kind == 'relu2':
            h = F.relu(h).square()
        else:
            h = F.silu(h) * self.gate_proj(x)
        return self.out_proj(h)


class MoE(nn.Module):
    """Mixture of experts (DeepSeek-V3, arXiv 2412.19437, section 2.1.2): beside a shared SwiGLU, a
    token goes through the n_experts_per_tok best of n_routed_experts.

        scores    sigmoid(router x), one for each expert
        choice    the largest scores + bias; with n_group, only out of the topk_group groups whose
                  two best have the largest sum
        output    the sum of the chosen experts, with weights scores / sum of theirs,
                  times routed_scaling

    No gradient reaches the bias: after a step, `balance` raises it by balance_rate for experts that
    had less than the mean of the tokens, and lowers it for the others.
    """

    def __init__(self, config):
        super().__init__()
        c, D, hidden, E = config, config.n_embd, config.expert_hidden, config.n_routed_experts
        self.n_experts, self.n_chosen = E, c.n_experts_per_tok
        self.n_group, self.topk_group = c.n_group, c.topk_group
        self.scaling, self.balance_rate = c.routed_scaling, c.balance_rate
        share = self.n_chosen / E
        self.router = Linear(D, E)
        self.register_buffer('router_bias', torch.zeros(E))
        self.register_buffer('load', torch.zeros(E), persistent=False)  # tokens since `balance`
        self.register_buffer('last_load', torch.zeros(E), persistent=False)  # and before it
        self.in_proj = ExpertLinear(Linear(D, hidden), E, share)
        self.gate_proj = ExpertLinear(Linear(D, hidden), E, share)
        self.out_proj = ExpertLinear(Linear(hidden, D, writes=True), E, share)
        self.shared = None
        if c.n_shared_experts:
            self.shared = MLP(replace(c.dense_mlp(), mlp_hidden=c.n_shared_experts * hidden))

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
        h = self.out_proj(F.silu(self.in_proj(h, ends)) * self.gate_proj(h, ends), ends)
        h = h[order.argsort()].unflatten(0, (-1, k))  # (N*k, D), row by row again -> (N, k, D)
        y = (h * weights[..., None]).sum(dim=1).type_as(h).view(x.shape)
        return y if self.shared is None else y + self.shared(x)

    def route(self, rows):
        """rows (N, D) -> weights and experts, both (N, k)."""
        with torch.autocast(rows.device.type, enabled=False):  # a choice is not to be rounded
            high = torch.promote_types(rows.dtype, torch.float32)
            scores = F.linear(rows.to(high), self.router.weight.to(high)).sigmoid()  # (N, E)
            choice = (scores + self.router_bias).detach()
            if self.n_group > 1:
                groups = choice.unflatten(-1, (self.n_group, -1))  # (N, groups, E/groups)
                best = groups.topk(2, dim=-1).values.sum(-1).topk(self.topk_group, dim=-1).indices
                out = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter(-1, best, False)
                choice = groups.masked_fill(out[..., None], -math.inf).flatten(-2)
            experts = choice.topk(self.n_chosen, dim=-1).indices
            weights = scores.gather(-1, experts)
            return weights / (weights.sum(dim=-1, keepdim=True) + 1e-20) * self.scaling, experts

    @torch.no_grad()
    def balance(self):
        """Moves the bias by the tokens that each expert has had, and forgets them."""
        self.router_bias += self.balance_rate * torch.sign(self.load.mean() - self.load)
        self.last_load.copy_(self.load)
        self.load.zero_()


def make_mlp(config):
    return MoE(config) if config.mlp == 'moe' else MLP(config)


class Block(nn.Module):
    """Pre-norm residual block: x += attention(norm x), x += mlp(norm x)."""

    def __init__(self, config, source_width=None):
        super().__init__()
        self.attn_norm = make_norm(config.norm, config.n_embd)
        self.attn = make_attention(config, source_width)
        self.mlp_norm = make_norm(config.norm, config.n_embd)
        self.mlp = make_mlp(config)
        self.dropout = make_dropout(config.dropout)

    def forward(self, x, **context):
        """context: rope, key_mask and cache, as in Attention.forward."""
        x = x + self.dropout(self.attn(self.attn_norm(x), **context))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class CrossBlock(Block):
    """A block that also reads another sequence, between its attention and its feed-forward.
    cross_config: the BlockConfig of that attention."""

    def __init__(self, config, cross_config):
        super().__init__(config)
        self.cross_norm = make_norm(config.norm, config.n_embd)
        self.source_norm = make_norm(config.norm, config.n_embd)
        self.cross = make_attention(cross_config)

    def forward(self, x, source, *, rope, cross_rope, cache):
        x = x + self.dropout(self.attn(self.attn_norm(x), rope=rope, cache=cache))
        x = x + self.dropout(self.cross(self.cross_norm(x), source=self.source_norm(source),
                                        rope=cross_rope, cache=cache))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


# --------------------------------------------------------------------------------------------------
# options: the comment behind a field is its line in --help, its type says which values it takes


class Range(NamedTuple):
    """Which numbers an option takes: least <= number, above < number < below."""

    least: float = -math.inf
    above: float = -math.inf
    below: float = math.inf

    def allows(self, number):
        return number is not None and self.least <= number and self.above < number < self.below

    def __str__(self):
        words = (('from', self.least), ('above', self.above), ('below', self.below))
        return ' '.join(f'{word} {limit}' for word, limit in words if math.isfinite(limit))


Count = Annotated[int, Range(least=1)]
CountOrZero = Annotated[int, Range(least=0)]
Positive = Annotated[float, Range(above=0)]
NotNegative = Annotated[float, Range(least=0)]
Share = Annotated[float, Range(least=0, below=1)]


def check_ranges(options):
    """Raises ConfigError if a field of a dataclass holds what its type does not allow."""
    for option in fields(options):
        name, value, members = option.name, getattr(options, option.name), get_args(option.type)
        words = [member for member in members if isinstance(member, str)]
        choices = list(ATTENTIONS) if name == 'attention' else words
        free = option.type is str and not choices  # text of which the attention knows more
        if isinstance(value, str) and value not in choices and not free:
            takes = f'one of {", ".join(choices)}' if choices else 'no text'
            raise ConfigError(f'{name}={value!r}: takes {takes}')
        if value is None and type(None) in members:
            continue
        for kind in (option.type, *members):  # the type, and what it is a union or a tuple of
            for limits in getattr(kind, '__metadata__', ()):
                numbers = value if isinstance(value, tuple) else (value,)
                if not all(limits.allows(number) for number in numbers):
                    raise ConfigError(f'{name}={value}: takes a finite number {limits}')


@dataclass
class BlockConfig:
    """Options of a block. Every architecture is made of blocks."""

    n_head: Count = 8  # attention heads
    n_embd: Count = 256  # width of the residual stream
    head_dim: Count | None = None  # width of a query and key head; None = n_embd / n_head
    causal: bool = True  # decoder; False = encoder, trained by masked-language modelling
    dropout: Share = 0.0  # on the embeddings and on what each branch adds
    attention_dropout: Share | None = None  # on the attention weights; None = dropout
    bias: bool = False  # biases in the attention projections
    attention: str = 'mha'  # mha, mla, gta, mfa, tpa, v4, or another key of model.ATTENTIONS
    n_kv_head: Count | None = None  # mha, gta: key and value heads (grouped); None = n_head
    qk_norm: bool = False  # mha, mfa: RMSNorm on the queries and keys of a head
    q_latent: Count | None = None  # mla, mfa, v4: width of the query latent; None = straight from x
    kv_latent: Count | None = None  # mla: width of a key-value latent
    kv_groups: Count = 1  # mla: latents; each is read by its own n_head / kv_groups heads (GLA)
    kv_branches: Count = 1  # mla: latents that a head reads, each by an attention (MLRA)
    v_head_dim: Count | None = None  # mla: width of a value head; None = head_dim
    rope_key: Literal['per_head', 'shared'] = 'per_head'  # mla: who has the rotated key
    q_rank: Count | None = None  # tpa: rank of the queries; None = straight from x
    kv_rank: Count | None = None  # tpa: rank of the keys, and of the values
    window: Count | None = None  # v4: tokens that a query reads exactly, its own included
    layers: str = 'window'  # v4: kind of each layer, window, csa or hca; repeated from the start
    csa_group: Count = 4  # v4: tokens an entry in csa layers
    hca_group: Count = 128  # v4: tokens an entry in hca layers
    index_topk: Count | None = None  # v4: entries that a query reads in csa layers; None = all
    index_n_head: Count = 4  # v4: heads of the indexer, which chooses them
    index_head_dim: Count = 32  # v4: width of its heads
    index_loss_coeff: Positive = 1.0  # v4: weight of its loss beside the cross-entropy
    gate: bool = False  # what the heads have read passes a sigmoid of the layer's input
    sink: bool = False  # a learned logit a head in the denominator of the softmax
    o_latent: Count | None = None  # width of the output latent (MLA-o); None = dense output
    o_norm: Literal['none', 'sum', 'head'] = 'none'  # norm of the output latent
    o_groups: Count = 1  # output latents; n_head / o_groups heads write into each
    softmax_factor: Positive = 1.0  # the softmax is of q.k / sqrt(head_dim) times this
    rope_dims: CountOrZero = 0  # rotary dimensions of a head, its first ones; 0 = none
    norm: Literal['layer', 'rms'] = 'layer'  # LayerNorm without bias, or RMSNorm
    mlp: Literal['gelu', 'swiglu', 'relu2', 'moe'] = 'gelu'  # feed-forward; moe: of experts
    mlp_hidden: Count | None = None  # hidden width of the feed-forward; None = 4 n_embd
    mlp_bias: bool = False  # biases in the feed-forward
    mlp_rank: Count | None = None  # each feed-forward matrix as two of this rank; None = dense
    n_routed_experts: Count | None = None  # moe: experts, of which a token meets a few
    n_experts_per_tok: Count = 2  # moe: so many
    n_shared_experts: CountOrZero = 1  # moe: experts that every token meets
    expert_hidden: Count | None = None  # moe: hidden width of an expert
    n_group: Count = 1  # moe: groups of experts
    topk_group: Count = 1  # moe: of which a token's experts are in so many
    routed_scaling: Positive = 1.0  # moe: what the routed experts give, times this
    balance_rate: NotNegative = 0.001  # moe: how far the bias of an expert moves in a step

    def __post_init__(self):
        check_ranges(self)
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
            raise ConfigError(f'rope_dims={self.rope_dims}: takes an even number up to '
                              f'head_dim={self.head_dim} (n_embd / n_head, unless set)')
        for name in self.foreign_options(self.attention):
            default = getattr(BlockConfig, name)
            if getattr(self, name) != default:
                raise ConfigError(f'attention={self.attention!r} has no {name}: '
                                  f'leave it at {default}')
        if not self.o_latent and (self.o_norm, self.o_groups) != ('none', 1):
            raise ConfigError(f'o_norm={self.o_norm!r}, o_groups={self.o_groups}: belong to an '
                              'output latent: set o_latent')
        if self.n_head % self.o_groups:
            raise ConfigError(f'n_head={self.n_head} is not divisible by o_groups={self.o_groups}')
        self.check_experts()
        ATTENTIONS[self.attention].check(self)

    def check_experts(self):
        """Raises ConfigError on options of a mixture of experts that contradict each other."""
        if self.mlp != 'moe':
            for name in MOE_OPTIONS:
                if getattr(self, name) != getattr(BlockConfig, name):
                    raise ConfigError(f"{name} belongs to mlp='moe': set that too")
            return
        E, k, groups = self.n_routed_experts, self.n_experts_per_tok, self.n_group
        if not (E and self.expert_hidden):
            raise ConfigError("mlp='moe' needs n_routed_experts and expert_hidden, their width")
        if self.mlp_bias or self.mlp_rank:
            raise ConfigError("mlp='moe' has no mlp_bias and no mlp_rank: leave them out")
        if E % groups or groups > 1 and E // groups < 2 or self.topk_group > groups:
            raise ConfigError(f'n_group={groups}, topk_group={self.topk_group}: of '
                              f'n_routed_experts={E}, takes groups of equal size, of two experts '
                              'at least, and at most n_group of them')
        if k > E // groups * self.topk_group:
            raise ConfigError(f'n_experts_per_tok={k} is more than the '
                              f'{E // groups * self.topk_group} experts to choose from')

    def dense_mlp(self):
        """The same block with a SwiGLU of mlp_hidden instead of experts."""
        if self.mlp != 'moe':
            return self
        return replace(self, mlp='swiglu',
                       **{name: getattr(BlockConfig, name) for name in MOE_OPTIONS})

    @staticmethod
    def foreign_options(attention):
        """Names of the options that other attentions have and this one has not."""
        own = ATTENTIONS[attention].options
        names = dict.fromkeys(name for other in ATTENTIONS.values() for name in other.options)
        return [name for name in names if name not in own]

    def dense(self):
        """The same block with plain attention and undecomposed matrices."""
        names = *self.foreign_options('mha'), 'o_latent', 'o_norm', 'o_groups'
        defaults = {name: getattr(BlockConfig, name) for name in names}
        return replace(self.dense_mlp(), attention='mha', mlp_rank=None, **defaults)


MOE_OPTIONS = ('n_routed_experts', 'n_experts_per_tok', 'n_shared_experts', 'expert_hidden',
               'n_group', 'topk_group', 'routed_scaling', 'balance_rate')


@dataclass
class ModelConfig:
    """Options of every architecture, beside those of its blocks."""

    block_options: dict = field(default_factory=dict)  # of which __post_init__ makes self.block
    vocab_size: Count = 50257  # rows of the embedding, the tokenizer's special tokens included
    block_size: Count = 256  # longest sequence, tokens
    n_layer: Count = 6  # number of blocks
    rope_theta: Positive = 10000.0  # rotary base
    rope_factor: Annotated[float, Range(least=1)] = 1.0  # rotary angles are divided by it
    rope_trained_length: Count | None = None  # YaRN: only slow angles of so many tokens; None = all
    final_norm: bool = True  # a norm before the vocabulary
    vocab_rank: Count | None = None  # embedding and head through this rank; None = dense
    tie_embeddings: bool = True  # the head is the embedding, transposed
    init_std: Positive = 0.02  # standard deviation of the initial weights
    zero_writers: bool = False  # matrices that write into the residual stream start at 0
    scale_latents: bool = False  # what goes through a latent starts as large as without it

    derived = ()  # options of a block that the architecture sets itself

    def __post_init__(self):
        check_ranges(self)
        self.block = self.make_block(self.block_options)  # a BlockConfig
        if self.rope_trained_length and self.rope_factor == 1:
            raise ConfigError('rope_trained_length says which rotary angles rope_factor divides: '
                              'set that too')
        if self.vocab_rank and not self.tie_embeddings:
            raise ConfigError('vocab_rank shares its matrices with the head: it needs '
                              'tie_embeddings=True')

    def make_block(self, options):
        return BlockConfig(**options)


@dataclass
class TransformerConfig(ModelConfig):
    """One stack of blocks: a decoder (causal) or an encoder."""

    n_dense: CountOrZero = 0  # first layers that keep mha and dense feed-forwards
    first_k_dense: CountOrZero = 0  # moe: first layers that have a swiglu of mlp_hidden instead
    learned_positions: bool = True  # a learned embedding of the position
    subtract_next_position: bool = False  # causal: before the head

    def __post_init__(self):
        super().__post_init__()
        if self.n_dense > self.n_layer:
            raise ConfigError(f'n_dense={self.n_dense} is more than n_layer={self.n_layer}')
        groups = dict(csa=self.block.csa_group, hca=self.block.hca_group)
        kinds = self.block.layers.split()[:self.n_layer]
        for kind in kinds:
            if groups.get(kind, 0) > self.block_size:
                raise ConfigError(f'{kind}_group={groups[kind]} is more than block_size='
                                  f'{self.block_size}: there would never be an entry')
        if self.first_k_dense and self.block.mlp != 'moe':
            raise ConfigError("first_k_dense belongs to mlp='moe': set that too")
        if self.block.index_topk and 'csa' not in kinds:
            raise ConfigError(f"index_topk chooses entries in csa layers: "
                              f"layers={self.block.layers!r} has none")
        if self.subtract_next_position and not (self.learned_positions and self.block.causal):
            raise ConfigError('subtract_next_position takes the embedding of the next position off '
                              'the last state of a causal model: it needs learned_positions=True '
                              'and causal=True')

    def block_of(self, layer):
        if layer < self.n_dense:
            return self.block.dense()
        kinds = self.block.layers.split()
        block = replace(self.block, layers=kinds[layer % len(kinds)])
        return block.dense_mlp() if layer < self.first_k_dense else block


@dataclass
class EncoderDecoderConfig(TransformerConfig):
    """Two causal stacks, the second of which reads the first."""

    n_decoder_layer: Count | None = None  # blocks of the decoder; None = n_layer
    cross_n_head: Count | None = None  # heads of the cross-attention; None = 2 n_head
    embedding_loss: Literal['none', 'mse', 'cosine'] = 'none'  # embeddings to encoder output
    embedding_loss_coeff: Positive = 1.0  # its weight beside the cross-entropy
    embedding_loss_affine: bool = True  # gains and biases in its two LayerNorms

    derived = ('causal',)

    def __post_init__(self):
        super().__post_init__()
        self.n_decoder_layer = self.n_decoder_layer or self.n_layer
        self.cross_n_head = self.cross_n_head or 2 * self.block.n_head
        if self.block.n_embd % self.cross_n_head:
            raise ConfigError(f'n_embd={self.block.n_embd} is not divisible by '
                              f'cross_n_head={self.cross_n_head}: change one')
        if self.n_dense > self.n_decoder_layer:
            raise ConfigError(f'n_dense={self.n_dense} is more than '
                              f'n_decoder_layer={self.n_decoder_layer}')
        changed = (self.embedding_loss_coeff, self.embedding_loss_affine) != (1.0, True)
        if self.embedding_loss == 'none' and changed:
            raise ConfigError('embedding_loss_coeff and embedding_loss_affine belong to an '
                              "embedding_loss: it is 'none'")
        self.cross_of(self.n_decoder_layer)  # contradictions show now

    def cross_of(self, layer):
        """The BlockConfig of the cross-attention of a decoder layer. Its heads rotate as many
        dimensions as they have, up to rope_dims."""
        width = self.block.n_embd // self.cross_n_head
        try:
            return replace(self.block_of(layer), n_head=self.cross_n_head, head_dim=width,
                           v_head_dim=None, rope_dims=min(self.block.rope_dims, width // 2 * 2))
        except ConfigError as error:
            raise ConfigError(f'cross-attention, cross_n_head={self.cross_n_head}: {error}; its '
                              f'heads are {width} wide, those of the stacks '
                              f'{self.block.head_dim}') from None


@dataclass
class GroupedLatentConfig(ModelConfig):
    """Tokens in groups, each compressed to a few latents; n_layer blocks over the latents; back."""

    n_layer: Count = 16  # blocks of the trunk, at the widest width
    head_dim: Count = 32  # width of a head, on every level
    block_size: Count = 768  # longest sequence, tokens
    init_std: Positive | None = None  # of the initial weights; None = 1/sqrt(fan in)
    group_size: Count = 48  # tokens a group
    latents: tuple[Count, ...] = (16, 2)  # latents a group, level by level
    widths: tuple[Count, ...] = (64, 128, 256)  # of the tokens and of each level of latents
    compress: Literal['transformer', 'perceiver'] = 'transformer'  # how latents read a group
    n_compress: Count = 1  # transformer: blocks that do so
    n_mix: Count = 1  # pairs of a local and a global block, on each level and each way
    interleave: bool = True  # local and global in turn; False = all local first
    upsample: Literal['repeat', 'attention'] = 'repeat'  # how slots read latents
    skip: Literal['sum', 'learned'] = 'sum'  # latents + slots, or with a learned vector before each
    slot_emb_up: bool = False  # add the embeddings of the slots on the way up too
    global_window: Count | None = None  # tokens that a global block of level 0 sees; None = all
    dense_former: bool = False  # a trunk block reads a learned sum of all outputs before it
    latent_loss: bool = False  # each trunk output predicts the next trunk input
    latent_loss_coeff: Positive = 1.0  # its weight beside the cross-entropy
    n_channels: Annotated[int, Range(least=2)] | None = None  # parallel channels; None = none
    channels_every: Count = 1  # channels: 2 = in every second trunk block
    channel_mlp_mult: Positive = 1.0  # channels: hidden width, times 4 width / n_channels
    n_shared_mlp: CountOrZero = 0  # channels: further feed-forwards that all channels share
    merge: Literal['softmax', 'max', 'mean'] = 'softmax'  # channels: how they become one

    derived = ('n_embd', 'n_head', 'head_dim', 'mlp_hidden', 'causal')

    def __post_init__(self):
        super().__post_init__()
        if self.block_size < self.group_size:
            raise ConfigError(f'block_size={self.block_size}: takes at least one group, '
                              f'group_size={self.group_size}')
        if self.block.attention == 'v4':
            raise ConfigError("attention='v4' has groups of its own, which grouped latents have no "
                              'place for: take another')
        if self.compress == 'perceiver' and self.n_compress != type(self).n_compress:
            raise ConfigError("n_compress belongs to compress='transformer'")
        belongs_to = dict(latent_loss_coeff='latent_loss') | dict.fromkeys(
            ('channels_every', 'channel_mlp_mult', 'n_shared_mlp', 'merge'), 'n_channels')
        for name, owner in belongs_to.items():
            if not getattr(self, owner) and getattr(self, name) != getattr(type(self), name):
                raise ConfigError(f'{name} belongs to {owner}: set that too')
        if self.channels_every > self.n_layer:
            raise ConfigError(f'channels_every={self.channels_every}: of {self.n_layer} blocks '
                              'none would have channels')
        if self.n_channels and self.block.mlp == 'moe':
            raise ConfigError("n_channels have feed-forwards of their own: not with mlp='moe'")
        if self.n_channels and self.block.o_norm == 'head':
            raise ConfigError("n_channels cannot be combined with o_norm='head'")

    @property
    def sizes(self):
        """Slots a group on each level, the tokens first."""
        return (self.group_size, *self.latents)

    def make_block(self, options):
        """The BlockConfig of the token level; `block_at` makes the others of it."""
        if any(above >= below for below, above in zip(self.sizes, self.latents)):
            raise ConfigError(f'group_size={self.group_size}, latents={self.latents}: each level '
                              'has fewer than the one before it')
        if len(self.widths) != len(self.sizes):
            raise ConfigError(f'widths={self.widths}: takes {len(self.sizes)}, of the tokens and '
                              f'of each of latents={self.latents}')
        if odd := [width for width in self.widths if width % self.head_dim]:
            raise ConfigError(f'widths={self.widths}: {odd[0]} is not divisible by '
                              f'head_dim={self.head_dim}')
        width = self.widths[0]
        return BlockConfig(n_embd=width, n_head=width // self.head_dim, head_dim=self.head_dim,
                           **options)

    def block_at(self, level):
        """The BlockConfig of a level."""
        width = self.widths[level]
        return replace(self.block, n_embd=width, n_head=width // self.head_dim,
                       mlp_hidden=4 * width)


def option_names(arch):
    """Names of all options of an architecture, those of its blocks included."""
    config_class = ARCHITECTURES[arch][1]
    own = {option.name for option in fields(config_class)} - {'block_options'}
    return own | {option.name for option in fields(BlockConfig)} - set(config_class.derived)


def flat_options(config):
    """The options of a model's config as one dict, which make_model takes."""
    flat = {name: value for name, value in vars(config).items()
            if name not in ('block', 'block_options')}
    for name, value in vars(config.block).items():
        if name not in config.derived:
            flat[name] = value
    return flat


def make_config(arch, **options):
    """The config of a model of the architecture `arch`, a key of ARCHITECTURES. Raises ConfigError
    on options that it does not have or that contradict each other."""
    if arch not in ARCHITECTURES:
        raise ConfigError(f'arch={arch!r}: takes one of {", ".join(ARCHITECTURES)}')
    if unknown := sorted(set(options) - option_names(arch)):
        raise ConfigError(f'arch={arch!r} has no {unknown[0]}: leave it out')
    _, config_class = ARCHITECTURES[arch]
    own = {option.name for option in fields(config_class)} & set(options)
    block = {name: options[name] for name in options if name not in own}
    return config_class(block, **{name: options[name] for name in own})


def make_model(arch, **options):
    """A model with new weights; see make_config."""
    config = make_config(arch, **options)
    model_class, _ = ARCHITECTURES[arch]
    return model_class(config)


# --------------------------------------------------------------------------------------------------
# language model: what all architectures share


def init_weights(model):
    """The one place where weights get their first values.

    what                                     init_std=0.02, say      init_std=None
    ---------------------------------------  ----------------------  --------------------
    matrix                                   N(0, init_std)          N(0, 1/sqrt(fan in))
    matrix that writes into the residual     N(0, init_std/sqrt(n))  a tenth of that
      stream (Linear.writes)
    embedding, untied head                   N(0, init_std)          N(0, 1/sqrt(width))
    embedding of a slot in its group         N(0, init_std)          half of that
    bias, sink                               0                       0
    gain of a norm, skip or depth            as built: 1             as built: 1

    and with scale_latents, so that what goes through a latent of L numbers instead of D starts as
    large as without it:

    gain of the norm of a latent             sqrt(D/L)               1
    one of two matrices that stand for       N(0, 1/sqrt(fan))       as any other
      one (Linear.fan)                         if it writes: /sqrt(n)

    n counts the matrices that write into one stack of blocks, so that the variance at its end does
    not grow with its depth (GPT-2). With zero_writers they are 0, and a block changes nothing at
    first. None is for grouped latents: if everything starts small, they stay at the entropy of
    token frequencies. A tenth lets the skip connections dominate at first.

    A normed latent has unit variance, and a matrix of init_std sums over L of its numbers alone:
    without the gain keys, values and queries start sqrt(D/L) too small. LongCat-Flash (arXiv
    2509.01322) has the same factor as a constant. What both options are worth depends on the other
    weights: the encoders of config/, with an init_std of 1/sqrt(D), gain a lot by either, small
    decoders with 0.02 gain nothing or lose (RESULTS.md), and so neither is the default.
    """
    std, scaled = model.config.init_std, model.config.scale_latents
    zero = std and model.config.zero_writers
    for name, stack in model.named_children():
        n_writers = sum(getattr(module, 'writes', False) for module in stack.modules())
        for module in stack.modules():
            if isinstance(module, nn.Embedding):
                slot = 0.5 if name == 'slot_emb' else 1.0
                nn.init.normal_(module.weight, std=std or slot * module.embedding_dim ** -0.5)
            elif isinstance(module, (nn.Linear, ChannelLinear)):
                fan = getattr(module, 'fan', None) if std and scaled else None
                scale = fan ** -0.5 if fan else std or module.weight.size(-1) ** -0.5
                if getattr(module, 'writes', False):
                    scale *= 0.0 if zero else n_writers ** -0.5 if std else 0.1
                nn.init.normal_(module.weight, std=scale)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, RMSNorm) and module.latent_of and std and scaled:
                L, = module.normalized_shape
                nn.init.constant_(module.weight, (module.latent_of / L) ** 0.5)


class LanguageModel(nn.Module):
    """What every architecture shares: embedding, final norm, head, and the sum of the losses. A
    subclass builds its blocks, says in `body` what they do, and calls init_weights."""

    def __init__(self, config):
        super().__init__()
        c, D = config, config.block.n_embd
        self.config = c
        self.tok_emb = nn.Embedding(c.vocab_size, c.vocab_rank or D)
        if c.vocab_rank:
            self.vocab_proj = Linear(c.vocab_rank, D, fan=c.vocab_rank)
        self.dropout = make_dropout(c.block.dropout)
        self.norm = make_norm(c.block.norm, D) if c.final_norm else identity
        if not c.tie_embeddings:
            self.lm_head = Linear(D, c.vocab_size)

    def add_rope(self, name, rope_dims, length, times=slice(None)):
        """Registers the rotary table of these positions, all of them or `times`, as a buffer that
        no checkpoint holds; None where rope_dims is 0."""
        c = self.config
        table = rope_table(length, rope_dims, c.rope_theta, c.rope_factor, c.rope_trained_length)
        self.register_buffer(name, None if table is None else table[:, times], persistent=False)

    def body(self, x, end, key_mask, cache):
        """What the blocks do with embedded tokens x (B, T, D), the last of which is at position
        end - 1. Returns (states (B, T, D) before the final norm, terms).

        terms: {name: (scalar, coefficient)} of what else the model reports in training. The scalar
        times the coefficient is added to the loss; a coefficient of 0 only reports it. A validation
        loss is always the cross-entropy alone.
        """
        raise NotImplementedError

    def embed(self, idx, end):
        """Tokens idx (B, T), the last of which is at position end - 1 -> (B, T, D)."""
        x = self.tok_emb(idx)
        # the residual stream has the precision of the embedding, under autocast too
        return self.vocab_proj(x).type_as(x) if self.config.vocab_rank else x

    def states(self, idx, key_mask=None, cache=None):
        """idx (B, T) -> (final hidden states (B, T, D), terms as in `body`)."""
        end = idx.size(1) + (0 if cache is None else cache.n_tokens)
        if not isinstance(cache, StaticCache):
            self.check_call(idx, end, key_mask, cache)
        x, terms = self.body(self.dropout(self.embed(idx, end)), end, key_mask, cache)
        if cache is not None:
            cache.n_tokens = end
        return self.norm(x), terms | self.layer_terms() if self.training else terms

    def layer_terms(self):
        """What layers report of this call, means over those that do, as terms of `body`."""
        found = {}
        for attention in attentions_of(self):
            for name, term in attention.terms.items():
                found.setdefault(name, []).append(term)
            attention.terms.clear()
        return {name: (sum(value for value, _ in terms) / len(terms), terms[0][1])
                for name, terms in found.items()}

    def check_call(self, idx, end, key_mask, cache):
        """Raises ValueError if a call of `states`, up to position end - 1, contradicts itself."""
        if cache is None and end > self.config.block_size:
            raise ValueError(f'{end} tokens, but block_size is {self.config.block_size}')
        if cache is not None and end > cache.length:
            raise ValueError(f'{end} tokens, but the cache has room for {cache.length}')
        if cache is not None and cache.batch != idx.size(0):
            raise ValueError(f'{idx.size(0)} sequences, but the cache was made for {cache.batch}')
        if key_mask is not None and self.config.block.causal:
            raise ValueError('a causal model takes no key_mask: give it sequences of one length')

    def hidden(self, idx, key_mask=None, cache=None):
        """idx (B, T) int64 -> final hidden states (B, T, D).
        key_mask (B, T) bool, True = a real token; encoders only."""
        return self.states(idx, key_mask, cache)[0]

    def head_weight(self):
        """(V, R or D): the logits are the products of its rows with what to_vocab returns."""
        return self.tok_emb.weight if self.config.tie_embeddings else self.lm_head.weight

    def before_head(self, x, end):
        """What is done to hidden states (B, T, D), the last at position end - 1, before the head.
        """
        return x

    def to_vocab(self, x):
        """(..., D) -> what meets head_weight: the same, or with vocab_rank (..., R), by the second
        matrix of the embedding transposed."""
        return x @ self.vocab_proj.weight if self.config.vocab_rank else x

    def forward(self, idx, targets=None, positions=None, key_mask=None, cache=None):
        """idx (B, T) int64 -> logits (B, T, V); with targets, a dict of scalars of which `loss` is
        the one to minimise.

        targets: (B, T), -1 = not scored. positions (B, M): only those rows meet the vocabulary, the
        logits are (B, M, V) and targets (B, M). Without gradients the dict also has `accuracy`, the
        share of the scored targets that rank first. With a cache, idx holds the tokens that follow
        those that the cache has seen, one or many.
        """
        x, terms = self.states(idx, key_mask, cache)
        x = self.before_head(x, idx.size(1) if cache is None else cache.n_tokens)
        if positions is not None:
            x = x.gather(1, positions[..., None].expand(-1, -1, x.size(-1)))  # -> (B, M, D)
        x = self.to_vocab(x)
        if targets is None:
            if cache is not None and cache.head is not None and x.size(0) * x.size(1) == 1:
                return x @ cache.head
            return F.linear(x, self.head_weight())
        out = linear_cross_entropy(x.flatten(0, 1), self.head_weight(), targets.flatten())
        terms = terms if self.training else {}
        if terms:
            out['cross_entropy'] = out['loss']
        for name, (value, coefficient) in terms.items():
            out[name] = value
            out['loss'] = out['loss'] + coefficient * value
        return out

    # generation and counting have sections of their own, at the end of the file

    def init_cache(self, batch, length):
        """An empty cache for `batch` sequences of up to `length` tokens, at most block_size."""
        check_cache(self, length)
        return Cache(batch, length, head_of_cache(self, batch))

    def has_static_step(self):
        """Whether a step of generation can have shapes that never change, as compiling it takes."""
        return all(attention.static_step for attention in attentions_of(self))

    def generate(self, idx, max_new_tokens, **sampling):
        """idx (B, T) -> (B, T + n), n <= max_new_tokens: the prompt, then what `stream` yields."""
        new = [token[:, None] for token in self.stream(idx, max_new_tokens, **sampling)]
        return torch.cat([idx, *new], dim=1)

    def stream(self, idx, max_new_tokens, **sampling):
        """Yields the next token of each sequence, (B,); see `stream` below."""
        return stream(self, idx, max_new_tokens, **sampling)

    def n_params(self, positions=True):
        """Number of parameters; positions=False leaves learned positions out, as papers often do.
        """
        return sum(p.numel() for name, p in self.named_parameters()
                   if positions or name != 'pos_emb.weight')

    def n_active_params(self):
        """Number of parameters that one token meets: of the routed experts, its own."""
        return self.n_params() - round(sum(
            (1 - layer.share) * layer.weight.numel() for layer in self.modules()
            if isinstance(layer, ExpertLinear)))

    def flops_per_token(self, T, predicted=1.0):
        """Training FLOPs a token at length T; see training_flops."""
        return training_flops(self, T, predicted)

    def cache_bytes_per_token(self, dtype=None):
        """Bytes by which the cache of generation grows with a token, in dtype, or in the precision
        of the weights."""
        return self.cache_numbers_per_token() * (dtype or self.tok_emb.weight.dtype).itemsize

    def cache_numbers_per_token(self):
        return sum(attention.cache_width() for attention in attentions_of(self))

    def cache_fixed_bytes(self, dtype=None):
        """Bytes that the cache of a sequence takes beside, at most, whatever its length."""
        numbers = sum(attention.cache_fixed() for attention in attentions_of(self))
        return numbers * (dtype or self.tok_emb.weight.dtype).itemsize

    def body_flops(self, T):
        """Forward FLOPs a token of everything between embedding and head."""
        keys = (T + 1) / 2 if self.config.block.causal else T  # that a query meets, on average
        return sum(block_flops(child, 1, 1, keys) for name, child in self.named_children()
                   if name not in ('vocab_proj', 'lm_head'))


# --------------------------------------------------------------------------------------------------
# the transformer


class Transformer(LanguageModel):
    """One stack of blocks: a decoder with causal=True, an encoder otherwise.

        tokens -> embedding (+ position) -> block -> ... -> block -> norm -> head -> logits
    """

    def __init__(self, config):
        super().__init__(config)
        if config.learned_positions:  # one position more, if the next one is to be subtracted
            n_positions = config.block_size + config.subtract_next_position
            self.pos_emb = nn.Embedding(n_positions, config.block.n_embd)
        self.add_rope('rope', config.block.rope_dims, config.block_size)
        self.make_blocks(config)
        init_weights(self)

    def make_blocks(self, c):
        self.blocks = nn.ModuleList(Block(c.block_of(i)) for i in range(c.n_layer))

    def embed(self, idx, end):
        x = super().embed(idx, end)
        if self.config.learned_positions:
            x = x + rows_until(self.pos_emb.weight, end, idx.size(1))
        return x

    def body(self, x, end, key_mask, cache):
        rope = rope_until(self.rope, end)
        for block in self.blocks:
            x = block(x, rope=rope, key_mask=key_mask, cache=cache)
        return x, {}

    def before_head(self, x, end):
        if self.config.subtract_next_position:
            x = x - rows_until(self.pos_emb.weight, end + 1, x.size(1))
        return x


# --------------------------------------------------------------------------------------------------
# the encoder-decoder


class EncoderDecoder(Transformer):
    """Two causal stacks over the same sequence. The decoder starts from the encoder's output and
    attends to it, causally too, in every block.

        tokens -> embedding E -> encoder blocks -> enc -> decoder_proj -> decoder blocks -> head
                                                    |                          ^
                                                    +--- keys and values of ---+
                                                         the cross-attentions

    Generation extends three caches by one token a step: of the encoder, of the decoder, and of the
    cross-attention.

    The embedding loss (training only) pulls the running mean of the embeddings,
    A_t = mean over i <= t of LN_1(E)_i, to the encoder's output LN_2(enc_t), which gets no gradient
    from it. E and enc are the raw residual streams. With embedding_loss_affine both norms learn a
    gain and a bias, and the loss can fall by shrinking the gains alone: their mean size is reported
    as `embedding_gain` and `encoder_gain`.
    """

    def make_blocks(self, c):
        D = c.block.n_embd
        self.encoder = nn.ModuleList(Block(c.block_of(i)) for i in range(c.n_layer))
        self.decoder_proj = Linear(D, D)
        self.decoder = nn.ModuleList(CrossBlock(c.block_of(i), c.cross_of(i))
                                     for i in range(c.n_decoder_layer))
        self.add_rope('cross_rope', c.cross_of(c.n_decoder_layer).rope_dims, c.block_size)
        if c.embedding_loss != 'none':
            affine = c.embedding_loss_affine
            self.embedding_loss_norm = nn.LayerNorm(D, eps=1e-5, elementwise_affine=affine)
            self.encoder_loss_norm = nn.LayerNorm(D, eps=1e-5, elementwise_affine=affine)

    def body(self, x, end, key_mask, cache):
        rope, cross_rope = rope_until(self.rope, end), rope_until(self.cross_rope, end)
        embedded = x
        for block in self.encoder:
            x = block(x, rope=rope, cache=cache)
        encoded, x = x, self.decoder_proj(x).type_as(x)  # a residual stream of full precision
        for block in self.decoder:
            x = block(x, encoded, rope=rope, cross_rope=cross_rope, cache=cache)
        return x, self.embedding_terms(embedded, encoded.detach()) if self.training else {}

    def embedding_terms(self, embedded, encoded):
        """The embedding loss of embedded and encoded, (B, T, D), as terms of `body`."""
        c = self.config
        if c.embedding_loss == 'none':
            return {}
        counts = torch.arange(1, embedded.size(1) + 1, device=embedded.device)[:, None]  # (T, 1)
        mean = self.embedding_loss_norm(embedded).cumsum(dim=1) / counts
        target = self.encoder_loss_norm(encoded)
        if c.embedding_loss == 'mse':
            loss = F.mse_loss(mean, target)
        else:
            loss = (1 - (F.cosine_similarity(mean, target, dim=-1) + 1) / 2).mean()
        terms = {'embedding_loss': (loss, c.embedding_loss_coeff)}
        if c.embedding_loss_affine:
            for name in ('embedding', 'encoder'):
                gain = getattr(self, f'{name}_loss_norm').weight.detach().abs().mean()
                terms[f'{name}_gain'] = gain, 0.0
        return terms


# --------------------------------------------------------------------------------------------------
# grouped latents


class GroupedLatent(LanguageModel):
    """A U-net over time, exactly causal. Tokens come in groups of fixed size g. Each level keeps K
    slots a group, the last K positions of the group, and has fewer and wider ones than the level
    below; the trunk, n_layer wide blocks, runs over the fewest.

                     group 0             group 1                          logits
        level 0   t t t t t t t t     t t t t t t t t     g = 8 tokens      ^
             Down | | | | | | | |                         a group           | Up, + skip
        level 1           l l l l             l l l l     K = 4 slots       ^
             Down         | | | |                         a group           | Up, + skip
        level 2               L L                 L L     K = 2  --> trunk -+

    Down: the last slots of a group read the group, and become the slots of the next level. Up: a
    slot reads the latents that exist by its time, those of its own group that stand at or before it
    and those of the previous group, and adds the skip, what stood there on the way down. After each
    Down and Up a Mixer lets the slots of a level see each other: some of its blocks attend inside
    each group, others across all groups. Causality follows: a slot stands at the time of a token
    and sees nothing later.

    Positions: a learned embedding, added on the way down (and with slot_emb_up on the way up), says
    where in its group a slot stands; rotary positions are token times on every level. As a group
    has a fixed size, nothing before a token depends on what follows or on the length; the last
    group may be open, that is, not yet full.
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
        n_groups = max(2, -(-c.block_size // g))  # rounded up; `plan` needs the times of two groups
        for i, K in enumerate(c.sizes):
            times = (torch.arange(n_groups)[:, None] * g + g - K + torch.arange(K)).flatten()
            self.add_rope(f'rope_{i}', c.block.rope_dims, n_groups * g, times)
        init_weights(self)

    def body(self, x, end, key_mask, cache):
        """x: (B, T, D_0). Cuts it into calls of `groups`, each for whole groups or inside one."""
        g, T = self.config.group_size, x.size(1)
        if cache is None:
            x = F.pad(x, (0, 0, 0, -T % g))  # causality makes filling up the last group exact
            y, terms = self.groups(x, self.plan(0, x.size(1), None), n_tokens=T)
            return y[:, :T], terms
        parts, start = [], end - T
        while start < end:
            if start % g or end - start < g:
                stop = min(end, (start // g + 1) * g)  # up to the end of the open group
            else:
                stop = end // g * g  # all the whole groups
            part = x[:, start - end + T:stop - end + T]
            parts.append(self.groups(part, self.plan(start, stop, cache))[0])
            cache.n_tokens = start = stop
        return torch.cat(parts, dim=1), {}

    def plan(self, start, stop, cache):
        """The Plan of a call for the tokens start..stop: whole groups, or tokens inside a group."""
        c, g = self.config, self.config.group_size
        whole = (stop - start) % g == 0
        at = []
        for i, K in enumerate(c.sizes):
            first, last = new_slots(c, i, start, stop)
            # attention sees differences of times alone, so inside each group they count from 0
            inside = dict(rope=self.rope_at(i, 0, last))
            across = dict(rope=self.rope_at(i, 0, slots_until(c, i, stop)))
            if cache is not None:
                inside['cache'] = None if whole else cache.open_group[i]
                across['cache'] = cache.across[i]
            up = {}
            if c.upsample == 'attention' and i < len(self.up):
                # the latents of the group before are read first, so times count from that group
                _, last_latent = new_slots(c, i + 1, start, stop)
                up = dict(rope=self.rope_at(i, K + first, K + last),
                          source_rope=self.rope_at(i + 1, 0, c.sizes[i + 1] + last_latent))
            at.append(LevelPlan(first, last, inside, across, up))
        n_groups = (stop - start) // g if whole else 1
        return Plan(at, n_groups, whole, start < g, stop % g == 0, cache)

    def rope_at(self, level, first, last):
        """The rotary table of the slots first..last of a level, or None."""
        table = getattr(self, f'rope_{level}')
        return None if table is None else table[:, first:last]

    def groups(self, x, plan, n_tokens=None):
        """Down, through the trunk, and up: x (B, T, D_0) -> (states (B, T, D_0), terms of `body`).
        n_tokens: without a cache, how many of the tokens are not there to fill the last group."""
        x = fold(x, plan.n_groups) + self.slot_emb[0].weight[plan.at[0].first:plan.at[0].last]
        # The first n_levels levels have new slots. Tokens inside a group may give none to those
        # above; then a Down runs once more, into the first such level, for what it caches.
        n_levels = sum(level.last > level.first for level in plan.at)
        skips, terms = [], {}
        for i, down in enumerate(self.down[:n_levels]):
            skips.append(x)
            x = down(x, self.slot_emb[i + 1], plan)
        if n_levels == len(plan.at):
            x, terms = self.trunk(x, plan, n_tokens)
        for up in reversed(self.up[:n_levels]):
            x = up(x, skips.pop(), self.slot_emb[up.level], plan)
        return unfold(x, plan.n_groups), terms

    def trunk(self, x, plan, n_tokens):
        """x (B*G, k, D) -> (the same after n_layer blocks over all latents, terms of `body`)."""
        inputs = x = unfold(x, plan.n_groups)
        outputs = [x]
        for i, block in enumerate(self.blocks):
            x = block(x, **plan.at[-1].across)
            if self.config.dense_former and i + 1 < len(self.blocks):
                outputs.append(x)
                x = sum(weight * output for weight, output in zip(self.depth_weights[i], outputs))
        terms = {}
        if self.config.latent_loss and self.training:
            n = slots_until(self.config, len(self.down), n_tokens)
            loss = self.latent_loss(x[:, :n], inputs[:, :n].detach())
            terms['latent_loss'] = loss, self.config.latent_loss_coeff
        return fold(x, plan.n_groups), terms

    def latent_loss(self, outputs, inputs):
        """1 - cos between what latent_head makes of trunk output j and trunk input j + 1; both
        (B, n, D), of n latents."""
        predicted = self.latent_head(outputs[:, :-1])
        if predicted.size(1) == 0:
            return self.latent_head(outputs).sum() * 0.0  # every parameter still gets a gradient
        return (1 - F.cosine_similarity(predicted, inputs[:, 1:], dim=-1)).mean()

    def init_cache(self, batch, length):
        check_cache(self, length)
        return GroupedCache(self.config, batch, length, head_of_cache(self, batch))

    def has_static_step(self):
        return False  # how many slots are new changes from token to token

    def cache_numbers_per_token(self):
        return grouped_cache_numbers(self)

    def body_flops(self, T):
        return sum(grouped_flops(self, T).values())


def slots_until(config, level, t):
    """How many slots a level has after t tokens: the slots of a group are its last K tokens."""
    g, K = config.group_size, config.sizes[level]
    return t // g * K + max(0, t % g - (g - K))


def new_slots(config, level, start, stop):
    """First and last + 1 of the slots that the tokens start..stop add to a group: whole groups add
    all K, tokens inside one group some of them."""
    g, K = config.group_size, config.sizes[level]
    if (stop - start) % g == 0:
        return 0, K
    earlier = start // g * K
    return slots_until(config, level, start) - earlier, slots_until(config, level, stop) - earlier


def fold(x, n_groups):
    return x.unflatten(1, (n_groups, -1)).flatten(0, 1)  # (B, G*k, D) -> (B*G, k, D)


def unfold(x, n_groups):
    return x.unflatten(0, (-1, n_groups)).flatten(1, 2)  # (B*G, k, D) -> (B, G*k, D)


class LevelPlan(NamedTuple):
    """What a call of GroupedLatent.groups does on one level."""

    first: int  # the new slots of each group are first..last - 1
    last: int
    inside: dict  # rope and cache of blocks that attend inside a group
    across: dict  # rope and cache of blocks that attend across all groups
    up: dict  # rope and source_rope of slots that read latents by attention on the way up


class Plan(NamedTuple):
    """What a call of GroupedLatent.groups does."""

    at: list[LevelPlan]  # each level
    n_groups: int
    whole: bool  # whole groups; False: tokens inside one group, the open one
    from_start: bool  # the first group is that of the sequence
    closes: bool  # after the call no group is open
    cache: object


class Down(nn.Module):
    """Level i to level i + 1: the last K' slots of each group read the group,
    (B*G, k, D_i) -> (B*G, k', D_i+1).

    compress='transformer': blocks inside the group at the new width, of which the last computes its
    queries for the last K' slots alone. 'perceiver': one block, whose queries are the last K' slots
    projected to the new width, and whose keys and values come from the group at its own width.
    """

    def __init__(self, config, level):
        super().__init__()
        self.level, self.perceiver = level, config.compress == 'perceiver'
        width, block_above = config.widths[level], config.block_at(level + 1)
        self.in_proj = Linear(width, block_above.n_embd)
        n = 0 if self.perceiver else config.n_compress - 1
        self.blocks = nn.ModuleList(Block(block_above) for _ in range(n))
        self.pool = PoolBlock(block_above, width if self.perceiver else None)
        self.mixer = Mixer(config, level + 1)

    def forward(self, x, slot_emb, plan):
        here, above = plan.at[self.level:self.level + 2]
        y = self.in_proj(x).type_as(x)  # a residual stream of full precision
        for block in self.blocks:
            y = block(y, **here.inside)
        n_new = above.last - above.first  # so many of the new slots become slots of the level above
        # pool also caches keys and values, so it runs even if the level above gets no slot yet
        latents = self.pool(y[:, y.size(1) - n_new:], x if self.perceiver else y, **here.inside)
        if n_new == 0:
            return latents
        latents = latents + slot_emb.weight[above.first:above.last]
        return self.mixer(latents, above, plan.n_groups)


class PoolBlock(Block):
    """A block whose queries are the last slots of a group: q (B*G, k', D), source (B*G, k, width).
    source_width None: q is a part of the source, and they share a norm."""

    def __init__(self, config, source_width=None):
        super().__init__(config, source_width)
        self.source_norm = make_norm(config.norm, source_width) if source_width else None

    def forward(self, q, source, **context):
        source = (self.source_norm or self.attn_norm)(source)
        q = q + self.dropout(self.attn(self.attn_norm(q), source=source, **context))
        return q + self.dropout(self.mlp(self.mlp_norm(q)))


class Mixer(nn.Module):
    """n_mix pairs of a local block, which attends inside each group, and a global block, which
    attends across all groups of a level: (B*G, k, D) -> the same."""

    def __init__(self, config, level):
        super().__init__()
        n = config.n_mix
        self.order = ('inside', 'across') * n if config.interleave else (
            ('inside',) * n + ('across',) * n)
        self.blocks = nn.ModuleList(Block(config.block_at(level)) for _ in self.order)
        if level == 0:
            for block in self.of_kind('across'):
                block.attn.window = config.global_window

    def of_kind(self, kind):
        return [block for name, block in zip(self.order, self.blocks) if name == kind]

    def forward(self, x, here, n_groups):
        """here: the LevelPlan of this level."""
        for kind, block in zip(self.order, self.blocks):
            if kind == 'inside':
                x = block(x, **here.inside)
            else:
                x = fold(block(unfold(x, n_groups), **here.across), n_groups)
        return x


class Up(nn.Module):
    """Level i + 1 back to level i: each slot reads latents of its own group and of the group before
    and adds its skip: latents (B*G, k', D_i+1), skip (B*G, k, D_i) -> (B*G, k, D_i). Before the
    first group stand learned latents.

    upsample='repeat': the last K' slots of a group stand at the same tokens as its latents, and
    each takes its own. The slot that stands s slots before the first latent takes from the group
    before it the latent that is s-th from the end, and counts on from the end again after K'.
    'attention': a slot attends to all latents that stand at or before it.
    """

    def __init__(self, config, level):
        super().__init__()
        self.level, self.upsample = level, config.upsample
        width, width_above = config.widths[level:level + 2]
        n_slots, n = config.sizes[level:level + 2]  # of a group: slots here, latents above
        self.latent_norm = make_norm(config.block.norm, width_above)
        self.before_emb = nn.Embedding(n, width_above)
        # Which latents a slot reads, of the n of the group before followed by the n of its own.
        slot, first = torch.arange(n_slots), n_slots - n  # `first` stands with the first latent
        if self.upsample == 'repeat':
            self.up_proj = Linear(width_above, width, writes=True)
            reads = torch.where(slot < first, (slot - first) % n, n + slot - first)
            self.register_buffer('reads', reads, persistent=False)
        else:
            self.query_norm = make_norm(config.block.norm, width)
            block = replace(config.block_at(level), causal=False)
            self.up = make_attention(block, width_above)
            own = slot[:, None] >= first + torch.arange(n)
            sees = torch.cat((torch.ones(n_slots, n, dtype=torch.bool), own), dim=1)
            self.register_buffer('sees', sees, persistent=False)  # (K, 2n)
        self.slot_emb_up, self.learned_skip = config.slot_emb_up, config.skip == 'learned'
        if self.learned_skip:
            self.skip_a, self.skip_b = (nn.Parameter(torch.ones(width)) for _ in range(2))
        self.mixer = Mixer(config, level)

    def forward(self, latents, skip, slot_emb, plan):
        latents, here = self.prepare(latents), plan.at[self.level]
        if plan.from_start:
            batch = skip.size(0) // plan.n_groups
            previous = self.prepare(self.before_emb.weight).expand(batch, -1, -1)
        else:
            previous = plan.cache.previous[self.level]  # (B, K', .)
        if plan.whole:
            latents = self.of_whole_groups(latents, previous, plan)
        else:
            latents = self.of_open_group(latents, previous, plan)
        x = self.read(latents, skip, here)
        x = self.skip_a * x + self.skip_b * skip if self.learned_skip else x + skip
        if self.slot_emb_up:
            x = x + slot_emb.weight[here.first:here.last]
        return self.mixer(x, here, plan.n_groups)

    def prepare(self, latents):
        latents = self.latent_norm(latents)
        return self.up_proj(latents) if self.upsample == 'repeat' else latents

    def of_whole_groups(self, latents, previous, plan):
        """latents (B*G, K', .), previous (B, K', .) -> what each group may read, (B*G, 2K', .)."""
        latents = latents.unflatten(0, (previous.size(0), -1))  # (B, G, K', .)
        before = torch.cat((previous[:, None], latents[:, :-1]), dim=1)
        if plan.cache is not None:
            plan.cache.previous[self.level] = latents[:, -1].clone()
        return torch.cat((before, latents), dim=2).flatten(0, 1)

    def of_open_group(self, latents, previous, plan):
        """latents (B, k', .), the new ones, previous (B, K', .) -> what the open group may read,
        the previous group's latents and its own until now: (B, K' + last, .)."""
        own, = plan.cache.open_group[self.level + 1].extend(self, latents)
        if plan.closes:
            plan.cache.previous[self.level] = own.clone()
        return torch.cat((previous, own), dim=1)

    def read(self, latents, skip, here):
        """What each new slot reads of the latents (B*G, ., .): (B*G, k, D_i)."""
        if self.upsample == 'repeat':
            return latents[:, self.reads[here.first:here.last]]
        mask = self.sees[None, None, here.first:here.last, :latents.size(1)]
        return self.up(self.query_norm(skip), source=latents, key_mask=mask, **here.up)


def make_channels(module, n_channels):
    """Gives every channel its own copy of the module's linear layers."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, ChannelLinear(child, n_channels))
        else:
            make_channels(child, n_channels)
    return module


class ChannelBlock(nn.Module):
    """A trunk block of C parallel channels, each with its own attention and feed-forward:

        h_c = x + attention_c(norm x);  z_c = h_c + mlp_c(norm h_c) + sum of shared mlps(norm h_c)
        merge='softmax': sum over c of softmax_c(z) * z, element by element; 'max', 'mean'

    The channels are folded into the batch; they share the gains of the norms.
    """

    def __init__(self, config):
        super().__init__()
        c, C = config.block_at(-1), config.n_channels
        narrow = replace(c, mlp_hidden=max(1, round(config.channel_mlp_mult * 4 * c.n_embd / C)))
        self.n_channels, self.merge = C, config.merge
        self.attn_norm, self.mlp_norm = (make_norm(c.norm, c.n_embd) for _ in range(2))
        self.attn = make_channels(make_attention(c), C)
        self.attn.n_channels = C
        self.mlp = make_channels(MLP(narrow), C)
        self.shared = nn.ModuleList(MLP(narrow) for _ in range(config.n_shared_mlp))
        self.dropout = make_dropout(c.dropout)

    def forward(self, x, **context):
        x = x.repeat(self.n_channels, 1, 1)  # (C*B, T, D), channel by channel
        x = x + self.dropout(self.attn(self.attn_norm(x), **context))
        h = self.mlp_norm(x)
        x = x + self.dropout(self.mlp(h) + sum(mlp(h) for mlp in self.shared))
        z = x.unflatten(0, (self.n_channels, -1))  # (C, B, T, D)
        if self.merge == 'softmax':
            return (z.softmax(dim=0) * z).sum(dim=0)
        return z.amax(dim=0) if self.merge == 'max' else z.mean(dim=0)


ARCHITECTURES = {'transformer': (Transformer, TransformerConfig),
                 'encoder_decoder': (EncoderDecoder, EncoderDecoderConfig),
                 'grouped_latent': (GroupedLatent, GroupedLatentConfig)}


# --------------------------------------------------------------------------------------------------
# loss


def plain_cross_entropy(x, weight, targets):
    """What linear_cross_entropy computes, in the open; it holds all N x V logits at once. To train
    on another loss, write one like this and call it in LanguageModel.forward if self.training;
    evaluation keeps linear_cross_entropy, so that validation losses compare."""
    logits = F.linear(x, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    n = (targets >= 0).sum().clamp(min=1)
    loss = F.cross_entropy(logits, targets, ignore_index=-1, reduction='sum') / n
    if torch.is_grad_enabled():
        return {'loss': loss}
    return {'loss': loss, 'accuracy': (logits.argmax(dim=-1) == targets).sum() / n}


def linear_cross_entropy(x, weight, targets):
    """Mean cross-entropy (nats) of the logits x @ weight.T as {'loss': scalar}, never holding more
    than a chunk of them: x (N, D), weight (V, D), targets (N,), -1 = not scored; 0 if there is no
    target. Without gradients also `accuracy`, the share of the targets that rank first."""
    chunk = 2 ** 27 if x.is_cuda else 2 ** 24  # logits: 512 MB in float32, 64 MB on a CPU
    n_chunks = max(1, x.size(0) * weight.size(0) // chunk)
    if torch.compiler.is_compiling():  # the loop unrolls
        n_chunks = min(8, n_chunks)
    if torch.is_grad_enabled():
        return {'loss': LinearCrossEntropy.apply(x, weight, targets, n_chunks)}
    loss, correct, n = chunked_cross_entropy(x, weight, targets, n_chunks)
    return {'loss': loss / n, 'accuracy': correct / n}


def loss_precisions(x):
    """Data types of the loss: of matrix products, autocast's if there is one, and of sums."""
    device = x.device.type
    low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    return low, torch.promote_types(low, torch.float32)


def chunked_cross_entropy(x, weight, targets, n_chunks, dx=None, dweight=None):
    """(the loss of linear_cross_entropy as a sum, how many targets rank first, how many there are).
    All chunks use one buffer: fresh memory of this size costs a CPU more than the arithmetic.

    dx, dweight: filled with the gradients of the sum, if given, and then nothing is ranked. They
    are formed while the logits of a chunk are at hand: d loss / d logits = softmax - one-hot.
    """
    low, high = loss_precisions(x)
    rows, matrix = x.to(low), weight.to(low)
    scored = (targets >= 0).to(high)[:, None]  # (N, 1)
    index = targets.clamp(min=0)[:, None]
    size = -(-x.size(0) // n_chunks)
    logits, buffer = (torch.empty(size, weight.size(0), dtype=dtype, device=x.device)
                      for dtype in (low, high))  # (chunk, V)
    loss, correct = torch.zeros((), dtype=high, device=x.device), 0
    for start in range(0, x.size(0), size):
        row, i, s = (tensor[start:start + size] for tensor in (rows, index, scored))
        z = torch.mm(row, matrix.t(), out=logits[:row.size(0)])
        p = z if low == high else buffer[:row.size(0)].copy_(z)
        if dx is None:
            own, (best, first) = p.gather(1, i), p.max(dim=-1, keepdim=True)
            p = torch.softmax(p, dim=-1, out=p)
            # log of the sum of all exp(logits), by the likeliest, which is never too small for it
            loss = loss + ((best - p.gather(1, first).log() - own) * s).sum()
            correct = correct + ((first == i) * s).sum()
            continue
        p = torch.softmax(p, dim=-1, out=p)
        # a probability below 1e-38 counts as 1e-38, 87 nats; the gradient is right all the same
        loss = loss - (p.gather(1, i).clamp(min=torch.finfo(high).tiny).log() * s).sum()
        if torch.compiler.is_compiling():
            # is fused with the softmax, where scatter_add_ would want all of p in `high`
            p = (p - (torch.arange(p.size(1), device=p.device) == i).to(high)).to(low)
        else:
            p = z.copy_(p.scatter_add_(1, i, -torch.ones_like(s)))
        row, s = row * s.to(low), s.to(low)  # instead of a pass over p for what is not scored
        dx[start:start + size] = p @ matrix * s
        if low == high:
            torch.addmm(dweight, p.t(), row, out=dweight)
        else:
            dweight.add_(p.t() @ row)
    return loss, correct, scored.sum().clamp(min=1)


class LinearCrossEntropy(torch.autograd.Function):
    """The training half of linear_cross_entropy. Gradients are divided by the number of targets in
    the backward pass, because 1/N would underflow in bfloat16."""

    @staticmethod
    def forward(ctx, x, weight, targets, n_chunks):
        low, high = loss_precisions(x)
        dx, dweight = torch.empty_like(x, dtype=low), torch.zeros_like(weight, dtype=high)
        loss, _, n = chunked_cross_entropy(x, weight, targets, n_chunks, dx, dweight)
        ctx.save_for_backward(dx, dweight, n)
        ctx.dtypes = x.dtype, weight.dtype
        return loss / n

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        dx, dweight, n = ctx.saved_tensors
        scale = grad / n
        return (dx * scale).to(ctx.dtypes[0]), (dweight * scale).to(ctx.dtypes[1]), None, None


# --------------------------------------------------------------------------------------------------
# generation


class Cache:
    """What generation keeps of the tokens so far: for each attention, static buffers of `length`
    rows, which it makes when it first stores something.

    n_tokens: how many rows are filled; setting it back forgets the later ones. head: (R or D, V), a
    transposed copy of the vocabulary's weights, or None: see head_of_cache.
    """

    def __init__(self, batch, length, head=None):
        self.batch, self.length, self.head = batch, length, head
        self.n_tokens, self.buffers = 0, {}
        self.ends = {}  # of what `last` keeps: at which token it ends

    def extend(self, owner, *new, every=1):
        """Stores what `owner` computed for T new tokens, tensors (B, ..., T, width). Returns each
        behind what was stored before, (B, ..., S, width). every: there is one row for so many
        tokens, and `new` are the rows of those that are now complete."""
        if owner not in self.buffers:
            n_rows = self.length // every
            self.buffers[owner] = [x.new_empty(*x.shape[:-2], n_rows, x.size(-1)) for x in new]
        start, T = self.n_tokens // every, new[0].size(-2)
        for buffer, x in zip(self.buffers[owner], new):
            buffer.narrow(-2, start, T).copy_(x.detach())
        return [buffer.narrow(-2, 0, start + T) for buffer in self.buffers[owner]]

    def last(self, owner, n, *new):
        """As `extend`, for what nobody reads any more when it is old: returns each behind what was
        kept, and keeps the last n rows. n_tokens can only be set back to 0."""
        end = self.n_tokens + new[0].size(-2)
        if self.n_tokens:
            if self.ends[owner] != self.n_tokens:
                raise ValueError(f'n_tokens={self.n_tokens}: this cache keeps the last tokens '
                                 'alone, so that it can be set back to 0 and nowhere else')
            new = [torch.cat(pair, dim=-2) for pair in zip(self.buffers[owner], new)]
        self.buffers[owner] = [x[..., x.size(-2) - n:, :].detach().clone() for x in new]
        self.ends[owner] = end
        return new

    def n_bytes(self):
        return sum(buffer.nbytes for buffers in self.buffers.values() for buffer in buffers)


class StaticCache:
    """The Cache of a model for steps of one token whose shapes never change, so that a step can be
    compiled. n_tokens is a tensor; `extend` returns the buffers whole, and attention masks the rows
    that are not yet `filled`. Where nothing is compiled, Cache reads less."""

    def __init__(self, cache):
        """Takes over the buffers of a Cache that has seen the prompt."""
        self.batch, self.length, self.head = cache.batch, cache.length, cache.head
        self.buffers = cache.buffers
        buffers = [buffer for buffers in self.buffers.values() for buffer in buffers]
        for buffer in buffers:  # what is masked counts zero times, which is not enough for a NaN
            buffer.narrow(-2, cache.n_tokens, self.length - cache.n_tokens).zero_()
        self.n_tokens = torch.tensor([cache.n_tokens], device=buffers[0].device)
        self.rows = torch.arange(self.length, device=buffers[0].device)

    def extend(self, owner, *new):
        for buffer, x in zip(self.buffers[owner], new):
            buffer.index_copy_(-2, self.n_tokens, x.detach())
        return self.buffers[owner]

    @property
    def filled(self):
        """The key_mask of the step: rows that earlier tokens have filled, and that of the new one.
        """
        return (self.rows <= self.n_tokens)[None, None, None]  # (1, 1, 1, length)


class GroupedCache:
    """The cache of GroupedLatent: on every level, `across`, the keys and values of all slots, for
    blocks that attend across all groups; `open_group`, those of the open group, for blocks that
    attend inside it, and its latents, for the way up; `previous`, the latents of the group before.
    """

    def __init__(self, config, batch, length, head):
        self.config, self.batch, self.length, self.head = config, batch, length, head
        self.across = [Cache(batch, slots_until(config, i, length))
                       for i in range(len(config.sizes))]
        self.open_group = [Cache(batch, K) for K in config.sizes]
        self.previous = [None] * len(config.latents)
        self._n_tokens = 0

    @property
    def n_tokens(self):
        return self._n_tokens

    @n_tokens.setter
    def n_tokens(self, t):
        """Going back is possible to the beginning, or inside the open group: the latents of earlier
        groups are gone."""
        g = self.config.group_size
        if 0 < t < self._n_tokens // g * g:
            raise ValueError(f'n_tokens={t}: of {self._n_tokens} tokens, those of the last group '
                             'can be taken back, or all')
        self._n_tokens = t
        for level, K in enumerate(self.config.sizes):
            self.across[level].n_tokens = slots_until(self.config, level, t)
            self.open_group[level].n_tokens = max(0, t % g - (g - K))

    def n_bytes(self):
        previous = sum(latents.nbytes for latents in self.previous if latents is not None)
        return previous + sum(cache.n_bytes() for cache in (*self.across, *self.open_group))


def check_cache(model, length):
    if not model.config.block.causal:
        raise ValueError('an encoder has nothing to cache: every token sees those that follow it')
    if length > model.config.block_size:
        raise ValueError(f'a cache of {length} tokens, but block_size is {model.config.block_size}')


def head_of_cache(model, batch):
    """A transposed copy of the head's weights, in the precision of products: a CPU multiplies a
    single row by it faster."""
    weight = model.head_weight().detach()
    if batch > 1 or weight.device.type != 'cpu':
        return None
    if torch.is_autocast_enabled('cpu'):
        weight = weight.to(torch.get_autocast_dtype('cpu'))
    return weight.t().contiguous()


def stream(model, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, seed=None,
           stop=None, n_ids=None, compile=False):
    """Yields the next token of each of the B sequences idx (B, T >= 1), as (B,) int64, until there
    are max_new_tokens or each sequence has had the token `stop`, after which it only repeats it.

    The model sees the last block_size tokens. When they outgrow it, every position changes and the
    whole window is computed anew for each token. temperature, top_k, top_p: see sample_token. seed:
    of the draws; None goes on with torch's own generator. Sequence i draws with seed + i, so beside
    others it becomes what it is alone, but for rounding. n_ids: only ids below it are drawn, as a
    vocabulary may have rows without a meaning. compile: the step of one token; see static_step.
    """
    B, T = idx.shape
    size, end = model.config.block_size, T + max_new_tokens
    u = uniform_numbers(B, max_new_tokens, seed).to(idx.device)  # (B, max_new_tokens)
    text = torch.cat((idx, idx.new_empty(B, max_new_tokens)), dim=1)
    done = torch.zeros(B, dtype=torch.bool, device=idx.device)
    cache, first = model.init_cache(B, min(size, end)), max(0, T - size)
    static, step = None, torch.compile(static_step, dynamic=False) if compile else None
    for t in range(T, end):
        if t - first > size:
            cache.n_tokens, first = 0, t - size
        new = text[:, first + cache.n_tokens:t]
        with torch.inference_mode():  # `text` is made and yielded outside: it may be trained on
            if compile and cache.n_tokens and new.size(1) == 1:
                static = static or StaticCache(cache)
                logits = step(model, new, static)
                cache.n_tokens += 1
            else:  # of many positions the last one meets the vocabulary
                last = None if new.size(1) == 1 else idx.new_full((B, 1), new.size(1) - 1)
                logits = model(new, positions=last, cache=cache)
            logits = logits[:, 0, :n_ids]  # (B, 1, V) -> (B, n_ids)
            token = sample_token(logits, u[:, t - T], temperature, top_k, top_p)
            if stop is not None:
                token = torch.where(done, stop, token)
                done |= token == stop
            text[:, t] = token
        yield text[:, t]
        if stop is not None and done.all():
            return


def static_step(model, token, cache):
    """token (B, 1) -> logits (B, 1, V). With a StaticCache no shape changes from token to token,
    and it compiles once; see has_static_step."""
    return model(token, cache=cache)


def uniform_numbers(n_rows, n, seed=None):
    """Random numbers from 0 to 1 exclusive, (n_rows, n). With a seed, row i are those of a
    generator with seed + i, on every device; without, they are torch's own generator's."""
    if seed is None:
        return torch.rand(n_rows, n)
    return torch.stack([torch.rand(n, generator=torch.Generator().manual_seed(seed + i))
                        for i in range(n_rows)])


def sample_token(logits, u, temperature=1.0, top_k=None, top_p=None):
    """logits (B, V) -> a token of each row, (B,) int64: the one at which the probabilities, added
    up, pass u, (B,) numbers from 0 to 1 exclusive. One number a row is all the chance that this
    takes, where torch.multinomial draws V of them, which costs a CPU more than a small model.

    temperature divides the logits; 0 takes the largest. top_k: only the k likeliest tokens. top_p:
    only the likeliest tokens whose probabilities together reach p (nucleus, arXiv 1904.09751).
    """
    if temperature < 0:
        raise ValueError(f'temperature={temperature}: takes zero (the likeliest token) or more')
    if temperature < 1e-6:  # nothing but the likeliest is left, and float32 would overflow
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


# --------------------------------------------------------------------------------------------------
# counting: FLOPs and cached numbers by closed formulas. Matrix products and attention scores count,
# two FLOPs a multiply-add; norms, activations and softmax do not.


def attentions_of(model):
    return [module for module in model.modules() if isinstance(module, Attention)]


def training_flops(model, T, predicted=1.0):
    """Training FLOPs a token at length T, forward and backward (twice the forward ones). Only
    useful work counts: a causal query meets (T+1)/2 keys on average, and logits are made for a
    share `predicted` of the tokens."""
    c, D = model.config, model.config.block.n_embd
    projection = c.vocab_rank * D if c.vocab_rank else 0  # for the embedding, and for the head
    head = (c.vocab_rank or D) * c.vocab_size + projection
    return 3 * (2 * (projection + predicted * head) + model.body_flops(T))


def block_flops(module, queries, sources, keys):
    """Forward FLOPs of a block, or of any part of a model, for `queries` rows, which attend to
    `sources` rows; each query meets `keys` of them."""
    total = 0.0
    for part in module.modules():
        if isinstance(part, (nn.Linear, ChannelLinear)):
            rows = sources if getattr(part, 'on_source', False) else queries
            total += 2 * part.weight.numel() * rows * getattr(part, 'share', 1)
        elif isinstance(part, Attention):
            total += part.score_flops(keys) * queries + part.product_flops(queries, sources)
        elif isinstance(part, ChannelBlock):  # each channel goes through the shared feed-forwards
            total += (part.n_channels - 1) * block_flops(part.shared, queries, sources, keys)
    return total


def grouped_flops(model, T):
    """Forward FLOPs a token of GroupedLatent: of the trunk, and of the levels (the rest)."""
    c = model.config
    n = [slots_until(c, i, T) / T for i in range(len(c.sizes))]  # slots a token
    seen = [(slots * T + 1) / 2 for slots in n]  # by a query that sees all before it
    if c.global_window and c.global_window < T:
        seen[0] = c.global_window - c.global_window * (c.global_window - 1) / 2 / T
    trunk, levels = block_flops(model.blocks, n[-1], n[-1], seen[-1]), 0.0
    for i, (down, up) in enumerate(zip(model.down, model.up)):
        K, K2 = c.sizes[i:i + 2]
        levels += block_flops(down.in_proj, n[i], n[i], 0)
        levels += block_flops(down.blocks, n[i], n[i], (K + 1) / 2)
        levels += block_flops(down.pool, n[i + 1], n[i], (2 * K - K2 + 1) / 2)
        levels += mixer_flops(down.mixer, n[i + 1], (K2 + 1) / 2, seen[i + 1])
        levels += mixer_flops(up.mixer, n[i], (K + 1) / 2, seen[i])
        if up.upsample == 'repeat':
            levels += block_flops(up.up_proj, n[i + 1], n[i + 1], 0)
        else:
            levels += block_flops(up.up, n[i], n[i + 1], K2 + K2 * (K2 + 1) / 2 / K)
    return dict(levels=levels, trunk=trunk)


def mixer_flops(mixer, slots, keys_inside, keys_across):
    keys = dict(inside=keys_inside, across=keys_across)
    return sum(block_flops(block, slots, slots, keys[kind])
               for kind, block in zip(mixer.order, mixer.blocks))


def grouped_cache_numbers(model):
    """Numbers by which the cache of GroupedLatent grows with each token. What it keeps of the open
    group and of the one before has a fixed size."""
    c, top = model.config, len(model.config.latents)
    blocks = {i: model.up[i].mixer.of_kind('across') for i in range(top)}  # on each level
    blocks[top] = list(model.blocks)
    for down in model.down:
        blocks[down.level + 1] += down.mixer.of_kind('across')
    return sum(block.attn.cache_width() * block.attn.n_channels * c.sizes[i] / c.group_size
               for i in blocks for block in blocks[i])
