"""model.py against reference outputs, against plain formulas and against its closed formulas."""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import layers
import model as m
from fused import split_fused
from model import Attention, ConfigError, make_model
from run import set_precision

GOLDEN = Path(__file__).parent / 'golden'
TINY = dict(vocab_size=61, block_size=16, n_layer=2, n_head=4, n_embd=32)
ROPE = dict(learned_positions=False, rope_dims=4, norm='rms')
MLA = dict(ROPE, attention='mla', q_latent=12, kv_latent=8)
VARIANTS = {
    'gpt2': {},
    'gqa': dict(ROPE, n_kv_head=2),
    'qk_norm': dict(ROPE, qk_norm=True),
    'bias': dict(bias=True, mlp_bias=True),
    'relu2': dict(mlp='relu2'),
    'untied': dict(tie_embeddings=False),
    'no_positions': dict(learned_positions=False),
    'mla': MLA,
    'mla_no_q_latent': dict(MLA, q_latent=None),
    'mla_shared': dict(MLA, rope_key='shared'),
    'mla_narrow_v': dict(MLA, rope_key='shared', v_head_dim=6),
    'mla_wide_v': dict(MLA, v_head_dim=10),
    'mla_o': dict(MLA, o_latent=12),
    'mla_o_sum': dict(MLA, o_latent=12, o_norm='sum', rope_key='shared'),
    'mla_o_head': dict(MLA, o_latent=12, o_norm='head'),
    'subspaces': dict(MLA, o_latent=12, mlp='swiglu', mlp_bias=True, mlp_rank=10, vocab_rank=14,
                      n_dense=1),
    'gla': dict(MLA, rope_key='shared', kv_groups=2, sink=True),
    'mlra': dict(MLA, kv_branches=3, kv_groups=2, v_head_dim=6, gate=True),
    'gta': dict(ROPE, attention='gta', n_kv_head=2, head_dim=7, sink=True),
    'gta_no_rope': dict(attention='gta', n_kv_head=1),
    'mfa': dict(ROPE, n_kv_head=1, q_latent=12, head_dim=10, gate=True, bias=True),
    'tpa': dict(ROPE, attention='tpa', q_rank=3, kv_rank=2, head_dim=7, sink=True),
    'tpa_no_rope': dict(attention='tpa', kv_rank=1, o_latent=12),
    'gqa_o_groups': dict(ROPE, n_kv_head=2, gate=True, sink=True, bias=True, o_latent=6,
                         o_groups=2),
    'mla_o_groups': dict(MLA, o_latent=6, o_groups=2, o_norm='head', sink=True),
    'experts': dict(MLA, rope_key='shared', mlp='moe', n_routed_experts=6, n_experts_per_tok=2,
                    n_group=3, topk_group=2, expert_hidden=10, routed_scaling=1.7),
    'experts_alone': dict(mlp='moe', n_routed_experts=4, n_experts_per_tok=3, expert_hidden=6,
                          n_shared_experts=0, first_k_dense=1, mlp_hidden=24),
}


RELATIVES = ('gla', 'mlra', 'gta', 'gta_no_rope', 'mfa', 'tpa', 'tpa_no_rope', 'gqa_o_groups',
             'mla_o_groups')
ENCDEC_VARIANTS = {
    'encdec': {},
    'encdec_subtract': dict(subtract_next_position=True, embedding_loss='mse'),
    'encdec_unequal': dict(n_layer=1, n_decoder_layer=3, cross_n_head=4, bias=True),
    'encdec_gqa': dict(ROPE, n_kv_head=2, n_dense=1),
    'encdec_mla': dict(MLA, n_decoder_layer=1),
    'encdec_mla_o_shared': dict(MLA, o_latent=12, o_norm='sum', rope_key='shared', rope_dims=2,
                                n_dense=1),
    'encdec_mlra': dict(MLA, rope_key='shared', rope_dims=2, kv_branches=2, kv_groups=2, gate=True,
                        sink=True, o_latent=6, o_groups=2, o_norm='sum', n_layer=1),
    'encdec_gta': dict(ROPE, attention='gta', n_kv_head=2, n_layer=1),
    'encdec_tpa': dict(ROPE, attention='tpa', q_rank=3, kv_rank=2, sink=True, n_layer=1),
}
V4 = dict(ROPE, attention='v4', q_latent=12, window=3, head_dim=10)
CAUSAL_VARIANTS = {
    'subtract': dict(subtract_next_position=True),
    'window': dict(ROPE, window=5, n_kv_head=2, sink=True),
    'window_mla': dict(MLA, window=5, rope_key='shared', kv_groups=2),
    'window_per_head': dict(MLA, window=5, sink=True),
    'shared_key_alone': dict(MLA, rope_key='shared', rope_dims=8, kv_groups=2, kv_branches=2),
    'v4': dict(V4, layer_kinds='csa hca', csa_group=2, hca_group=5, o_latent=6, o_groups=2,
               sink=True),
    'v4_indexed': dict(V4, layer_kinds='window csa', csa_group=2, index_topk=2, index_n_head=3,
                       index_head_dim=6, gate=True),
    'v4_no_rope': dict(attention='v4', q_latent=12, window=1, layer_kinds='hca csa', hca_group=3),
}
TESTED = {options.get('attention', 'mha') for options in (VARIANTS | CAUSAL_VARIANTS).values()}
OWN = {kind: dict(MLA if issubclass(m.ATTENTIONS[kind], m.MLA) else ROPE, attention=kind)
       for kind in m.ATTENTIONS if kind not in TESTED}  # attentions of your own
CAUSAL_VARIANTS |= OWN
ENCDEC_VARIANTS |= {f'encdec_{kind}': options for kind, options in OWN.items()}
ENCDEC_VARIANTS['encdec_window'] = dict(ROPE, window=5)
ENCDEC_VARIANTS['encdec_experts'] = dict(VARIANTS['experts'], n_layer=1, rope_dims=2)
ENCDEC_VARIANTS['encdec_v4'] = dict(
    V4, layer_kinds='hca csa', csa_group=2, hca_group=5, index_topk=3, index_head_dim=6, sink=True,
    n_layer=2, n_dense=1)
EVERY = {name: dict(options, arch='encoder_decoder' if name in ENCDEC_VARIANTS else 'transformer')
         for name, options in (VARIANTS | CAUSAL_VARIANTS | ENCDEC_VARIANTS).items()}


def tiny(seed=0, dtype=torch.float64, arch='transformer', **options):
    """A small model whose every weight is random, gains and biases too, so that none can hide."""
    torch.manual_seed(seed)
    model = make_model(arch, **{**TINY, **options}).to(dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.3)
    return model


def tokens(*shape, seed=1, vocab=61):
    return torch.randint(vocab, shape, generator=torch.Generator().manual_seed(seed))


# -- reference outputs -----------------------------------------------------------------------------

OUR_NAMES = [
    ('encoder_model.', ''), ('vocab_embed', 'tok_emb'), ('layers.', 'blocks.'),
    ('attn_input_norm', 'attn_norm'), ('self_attn', 'attn'), ('ffn_input_norm', 'mlp_norm'),
    ('ffn.', 'mlp.'),
    ('transformer_blocks.', 'blocks.'), ('token_embedding', 'tok_emb'),
    ('positional_embedding', 'pos_emb'),
    ('multi_attn_head.batch_attn_weights', 'attn.qkv_proj'),
    ('multi_attn_head.residual_proj', 'attn.o_proj'),
    ('feed_forward.linear', 'mlp.in_proj'), ('feed_forward.residual_proj', 'mlp.out_proj'),
    ('ln1', 'attn_norm'), ('ln2', 'mlp_norm'),
    ('attn.o_a_proj', 'attn.o_proj.o_a_proj'), ('attn.o_b_proj', 'attn.o_proj.o_b_proj'),
    ('W_in_shared_norm', 'in_proj.1'), ('W_in_shared', 'in_proj.0'),
    ('W_gate_shared_norm', 'up_proj.1'), ('W_gate_shared', 'up_proj.0'),
    ('W_out_shared', 'out_proj.1'),
]


def our_name(name, parameters):
    for theirs, ours in OUR_NAMES:
        name = name.replace(theirs, ours)
    if name.startswith('ln.'):
        name = name.replace('ln.', 'norm.')
    for theirs, part in (('in', 'in'), ('gate', 'up'), ('out', 'out')):
        # in a decomposed matrix their W_in is the second factor, their W_out the first
        factor = f'{part}_proj.{0 if part == "out" else 2}'
        plain = name.replace(f'W_{theirs}.', f'{part}_proj.')
        name = plain if plain in parameters else name.replace(f'W_{theirs}.', f'{factor}.')
    return name


def load_golden(name):
    arrays = dict(np.load(GOLDEN / f'{name}.npz'))
    c = json.loads(str(arrays['config']))
    if name == 'decoder_baseline':
        options = c
    else:
        options = dict(vocab_size=c['vocab_size'], n_embd=c['hidden_size'],
                       n_layer=c['num_hidden_layers'], mlp_hidden=c['intermediate_size'],
                       block_size=c['max_position_embeddings'], n_head=c['num_attention_heads'],
                       head_dim=c['head_dim'], rope_dims=c['rope_dims'],
                       causal=False, mlp='swiglu', mlp_bias=True, norm='rms', final_norm=False,
                       learned_positions=False,
                       n_dense=c['num_dense_layers'], mlp_rank=c['ffn_rank'],
                       vocab_rank=c['vocab_rank'] if c['vocab_subspace'] else None)
        if c['num_dense_layers'] < c['num_hidden_layers']:
            options |= dict(attention='mla',
                            q_latent=c['q_latent_dim'], kv_latent=c['kv_latent_dim'],
                            o_latent=c['o_latent_dim'] if c['output_subspace'] else None)
    model = make_model('transformer', **options)
    parameters = dict(model.named_parameters())
    theirs = {our_name(k[6:], parameters): v for k, v in arrays.items() if k.startswith('param:')}
    model.load_state_dict(split_fused(as_tensors(theirs), model))
    grads = {our_name(k[5:], parameters): v for k, v in arrays.items() if k.startswith('grad:')}
    return model, arrays, split_fused(as_tensors(grads), model)


def as_tensors(arrays):
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def close(ours, golden):
    golden = np.asarray(golden)
    error, largest = np.abs(ours.detach().numpy() - golden).max(), np.abs(golden).max()
    assert error <= 1e-5 * largest, f'differs by {error / largest:.1e} of the largest entry'


@pytest.mark.parametrize('name', [
    'encoder_mha', 'encoder_mla', 'encoder_mla_o', 'encoder_mla_o_subspaces', 'decoder_baseline'])
def test_reference_outputs(name):
    model, arrays, grads = load_golden(name)
    idx = torch.from_numpy(arrays['input_ids'])
    if name == 'decoder_baseline':
        key_mask, targets, loss = None, torch.from_numpy(arrays['targets']), arrays['train_loss']
    else:
        key_mask, loss = torch.from_numpy(arrays['attention_mask']).bool(), arrays['loss']
        labels = torch.from_numpy(arrays['labels'])
        targets = labels.masked_fill(labels == -100, -1)
    close(model(idx, key_mask=key_mask), arrays['logits'])
    ours = model(idx, targets, key_mask=key_mask)['loss']
    close(ours, loss)
    ours.backward()
    assert len(grads) >= 9
    for parameter, grad in grads.items():
        close(model.get_parameter(parameter).grad, grad)


ENCDEC_NAMES = [
    ('encoder_transformer_blocks.', 'encoder.'), ('decoder_transformer_blocks.', 'decoder.'),
    ('decoder_multi_attn_head.', 'attn.'),
    ('cross_multi_attn_head.residual_proj', 'cross.o_proj'),
    ('cross_multi_attn_head.q_weights', 'cross.q_proj'),
    ('cross_multi_attn_head.k_v_weights', 'cross.kv_proj'),
    ('multi_attn_head.', 'attn.'), ('batch_attn_weights', 'qkv_proj'),
    ('attn.residual_proj', 'attn.o_proj'),
    ('decoder_feed_forward.weight', 'decoder_proj.weight'),
    ('decoder_feed_forward', 'feed_forward'),
    ('feed_forward.linear', 'mlp.in_proj'), ('feed_forward.residual_proj', 'mlp.out_proj'),
    ('encoder_cross_ln', 'kv_norm'), ('decoder_cross_ln', 'cross_norm'), ('decoder_ln', 'ln'),
    ('ln1', 'attn_norm'), ('ln2', 'mlp_norm'),
    ('encoder_out_ln', 'encoder_loss_norm'), ('embeddings_ln', 'embedding_loss_norm'),
    ('token_embedding', 'tok_emb'), ('positional_embedding', 'pos_emb'),
]


def our_encdec_arrays(arrays, kind):
    """The arrays `param:*` or `grad:*` under our names."""
    ours = {}
    for name, array in arrays.items():
        if not name.startswith(kind):
            continue
        name = name.split(':')[1]
        for their, our in ENCDEC_NAMES:
            name = name.replace(their, our)
        ours[name.replace('ln.', 'norm.', 1) if name.startswith('ln.') else name] = array
    return ours


@pytest.mark.parametrize('name', ['encdec_plain', 'encdec_mse_pos_sub', 'encdec_cosine'])
def test_reference_outputs_of_the_encoder_decoder(name):
    arrays = dict(np.load(GOLDEN / f'{name}.npz'))
    options = {k: v for k, v in json.loads(str(arrays['config'])).items() if v is not None}
    model = make_model('encoder_decoder', **options)
    model.load_state_dict(split_fused(as_tensors(our_encdec_arrays(arrays, 'param')), model))
    idx, targets = torch.from_numpy(arrays['input_ids']), torch.from_numpy(arrays['targets'])
    close(model(idx), arrays['logits'])
    out = model(idx, targets)
    close(out['loss'], arrays['train_loss'])
    if 'embedding_loss' in arrays:
        close(out['embedding_loss'], arrays['embedding_loss'])
        loss = out['cross_entropy'] + options['embedding_loss_coeff'] * out['embedding_loss']
        close(loss, arrays['train_loss'])
    out['loss'].backward()
    grads = split_fused(as_tensors(our_encdec_arrays(arrays, 'grad')), model)
    assert len(grads) >= 19
    for parameter, grad in grads.items():
        close(model.get_parameter(parameter).grad, grad)
    model.eval()
    assert set(model(idx, targets)) == {'loss'}
    close(model(idx, targets)['loss'], arrays['eval_loss'])


# -- parameter counts of the published configurations ----------------------------------------------

ENCODER = dict(vocab_size=30522, block_size=128, n_layer=6, n_head=8, n_embd=256, causal=False,
               mlp='swiglu', mlp_hidden=1024, mlp_bias=True, norm='rms', final_norm=False,
               learned_positions=False, rope_dims=32)


ENCDEC = dict(vocab_size=50257, block_size=200, n_layer=13, n_head=5, n_embd=150, cross_n_head=10)


@pytest.mark.parametrize('options, count', [
    (ENCODER, 14_121_984),
    (dict(ENCODER, attention='mla', q_latent=64, kv_latent=32, rope_dims=16), 13_286_976),
    (dict(ENCODER, attention='mla', q_latent=64, kv_latent=32, o_latent=64), 13_090_368),
    (dict(vocab_size=50257, block_size=200, n_layer=26, n_head=10, n_embd=160), 16_036_800),
    (dict(vocab_size=50257, block_size=200, n_layer=26, n_head=12, n_embd=156), 15_441_192),
])
def test_parameter_counts(options, count):
    with torch.device('meta'):
        assert make_model('transformer', **options).n_params(positions=False) == count


@pytest.mark.parametrize('options, count', [
    (ENCDEC, 15_762_900),
    (dict(ENCDEC, subtract_next_position=True), 15_762_900),
    (dict(ENCDEC, embedding_loss='mse'), 15_763_500),
    (dict(ENCDEC, embedding_loss='cosine', embedding_loss_affine=False), 15_762_900),
])
def test_parameter_counts_of_the_encoder_decoder(options, count):
    with torch.device('meta'):
        model = make_model('encoder_decoder', **options)
    assert model.n_params(positions=False) == count
    assert model.n_params() - count == (201 if 'subtract_next_position' in options else 200) * 150


def test_layers_of_other_code():
    """And a layer of other weights is found out."""
    files = sorted((GOLDEN / 'layers').glob('*.npz'))
    assert {layers.kind_of(path) for path in files} == set(layers.LAYOUTS)
    for path in files:
        found = layers.differences(path)
        assert len(found) >= 6 and max(found.values()) <= layers.TOLERANCE, path.stem


def test_a_layer_that_differs_is_found(tmp_path, script, capsys):
    arrays = dict(np.load(GOLDEN / 'layers/layer_gta.npz'))
    arrays['grad:W_rope_k.weight'][0, 0] += 1e-4 * np.abs(arrays['grad:W_rope_k.weight']).max()
    np.savez(tmp_path / 'layer_gta.npz', **arrays)
    with pytest.raises(SystemExit) as end:
        script(layers, tmp_path / 'layer_gta.npz')
    assert end.value.code == 1
    assert capsys.readouterr().out.endswith('too large: grad:W_rope_k.weight\n')


# -- plain formulas, written out head by head ------------------------------------------------------


def rms(x, gain=1.0):
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * gain


def rope_plain(x, rope_dims, theta=10000.0):
    """Rotates the first rope_dims dimensions of x (T, d): in row t the pair (i, i + rope_dims/2) by
    the angle t * theta^(-2i/rope_dims)."""
    y = x.clone()
    for t in range(x.size(0)):
        for i in range(rope_dims // 2):
            angle = t * theta ** (-2 * i / rope_dims)
            c, s = math.cos(angle), math.sin(angle)
            a, b = x[t, i], x[t, i + rope_dims // 2]
            y[t, i], y[t, i + rope_dims // 2] = a * c - b * s, b * c + a * s
    return y


def softmax_attention(q, k, v, causal, sink=None):
    scores = q @ k.T / math.sqrt(q.size(-1))
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
    denominator = scores.exp().sum(-1, keepdim=True)
    return scores.exp() / (denominator if sink is None else denominator + sink.exp()) @ v


def apply(layer, x):
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def queries_plain(attn, x, c):
    """Those of all heads, side by side; in TPA a list."""
    if c.attention == 'tpa' and c.q_rank:
        return products_plain(attn.q_head_proj, attn.q_channel_proj, x, c, c.q_rank, c.rope_dims)
    if c.q_latent:
        q = apply(attn.q_b_proj, rms(apply(attn.q_a_proj, x), attn.q_a_norm.weight))
    else:
        q = apply(attn.q_proj, x)
    q = [rms(part, attn.q_norm.weight) if c.qk_norm else part for part in q.split(c.head_dim, -1)]
    return [rope_plain(part, c.rope_dims) for part in q]


def products_plain(over_heads, over_channels, x, c, rank, rope_dims):
    """TPA: for each head, the mean over the ranks of a number times a rotated vector."""
    a = apply(over_heads, x).unflatten(-1, (rank, c.n_head))
    b = [rope_plain(part, rope_dims) for part in apply(over_channels, x).split(c.head_dim, -1)]
    return [sum(a[:, i, h, None] * b[i] for i in range(rank)) / rank for h in range(c.n_head)]


def keys_and_values_plain(attn, x, c):
    """For each head a list of (k, v), one for each of its attentions."""
    H, d, r = c.n_head, c.head_dim, c.rope_dims
    if c.attention == 'tpa':
        k = products_plain(attn.k_head_proj, attn.k_channel_proj, x, c, c.kv_rank, r)
        v = products_plain(attn.v_head_proj, attn.v_channel_proj, x, c, c.kv_rank, 0)
        return [[pair] for pair in zip(k, v)]
    if c.attention == 'gta':
        n = c.n_kv_head
        shared = rope_plain(apply(attn.k_rope_proj, x), r) if r else x[:, :0]
        v = [apply(attn.kv_proj, x)[:, g * d:(g + 1) * d] for g in range(n)]
        return [[(torch.cat([shared, v[h // (H // n)][:, :d - r]], -1), v[h // (H // n)])]
                for h in range(H)]
    if c.attention == 'mha':
        n = c.n_kv_head or H
        k, v = apply(attn.k_proj, x).split(d, -1), apply(attn.v_proj, x).split(d, -1)
        k = [rope_plain(rms(part, attn.k_norm.weight) if c.qk_norm else part, r) for part in k]
        return [[(k[h // (H // n)], v[h // (H // n)])] for h in range(H)]
    dv, L, shared = c.v_head_dim or d, c.kv_latent, c.rope_key == 'shared'
    own = d - r if shared else d  # dimensions of a key that come from its latent
    k_shared = apply(attn.k_rope_proj, x) if shared else x[:, :0]
    pairs = []
    for h in range(H):
        pairs.append([])
        for branch in range(c.kv_branches):
            i = branch * c.kv_groups + h // (H // c.kv_groups)
            latent = rms(apply(attn.kv_a_proj, x)[:, i * L:(i + 1) * L],
                         attn.kv_a_norm.weight[i * L:(i + 1) * L])
            row = branch * H + h
            k = latent @ attn.k_b_proj.weight[row * own:(row + 1) * own].T
            v = latent @ attn.v_b_proj.weight[row * dv:(row + 1) * dv].T
            pairs[h].append((rope_plain(torch.cat([k_shared, k], -1), r), v))
    return pairs


def attention_plain(attn, x, c):
    """One sequence x (T, D) through an attention module, from its weights alone."""
    H, heads, dv = c.n_head, [], c.v_head_dim or c.head_dim
    for h, (q, pairs) in enumerate(zip(queries_plain(attn, x, c),
                                       keys_and_values_plain(attn, x, c))):
        read = 0
        for branch, (k, v) in enumerate(pairs):
            sink = attn.sink[branch * H + h] if c.sink else None
            read = read + softmax_attention(q, k, v, c.causal, sink) / math.sqrt(c.kv_branches)
        if c.gate:
            gate = x @ attn.gate_proj.weight[h * dv:(h + 1) * dv].T
            read = read / (1 + torch.exp(-gate))
        heads.append(read)
    if not c.o_latent:
        return apply(attn.o_proj, torch.cat(heads, -1))
    R, size = c.o_latent, H // c.o_groups  # heads that write into a latent
    latents = [0] * c.o_groups
    for h, head in enumerate(heads):
        g, i = h // size, h % size
        part = head @ attn.o_proj.o_a_proj.weight[g * R:(g + 1) * R, i * dv:(i + 1) * dv].T
        if c.o_norm == 'head':
            part = rms(part, attn.o_proj.gain[h]) / math.sqrt(size)
        latents[g] = latents[g] + part
    latent = torch.cat(latents, -1)
    latent = rms(latent, attn.o_proj.o_norm.weight) if c.o_norm == 'sum' else latent
    return apply(attn.o_proj.o_b_proj, latent)


@pytest.mark.parametrize('causal', [True, False])
@pytest.mark.parametrize('name', [name for name in VARIANTS if name != 'subspaces'])
def test_attention_is_its_formula(name, causal):
    model = tiny(**VARIANTS[name], causal=causal)
    c, attn = model.config, model.blocks[0].attn
    x = torch.randn(2, 7, c.n_embd, dtype=torch.float64)
    rope = None if model.rope is None else model.rope[:, :7]
    for sequence, out in zip(x, attn(x, rope=rope)):
        # the tables of cos and sin are float32, whatever the precision of the weights
        assert torch.allclose(out, attention_plain(attn, sequence, c), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('kind', ['gelu', 'swiglu', 'relu2'])
@pytest.mark.parametrize('rank', [None, 5])
def test_feed_forward_is_its_formula(kind, rank):
    model = tiny(mlp=kind, mlp_bias=True, mlp_rank=rank)
    mlp = model.blocks[1].mlp
    x = torch.randn(3, model.config.n_embd, dtype=torch.float64)

    def inner(layer):
        if rank is None:
            return x @ layer.weight.T + layer.bias
        return rms(x @ layer[0].weight.T, layer[1].weight) @ layer[2].weight.T + layer[2].bias

    h = inner(mlp.in_proj)
    if kind == 'gelu':
        h = h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
    elif kind == 'relu2':
        h = h.clamp(min=0) ** 2
    else:
        h = h * torch.sigmoid(h) * inner(mlp.up_proj)
    out = h @ mlp.out_proj.weight.T + mlp.out_proj.bias if rank is None else \
        h @ mlp.out_proj[0].weight.T @ mlp.out_proj[1].weight.T + mlp.out_proj[1].bias
    assert torch.allclose(mlp(x), out, rtol=1e-12)
    plain = torch.autograd.grad(out.square().sum(), list(mlp.parameters()))
    ours = torch.autograd.grad(mlp(x).square().sum(), list(mlp.parameters()))
    assert all(torch.allclose(a, b, rtol=1e-9) for a, b in zip(ours, plain))


def test_norms_have_their_eps():
    layer_model, rms_model = tiny(norm='layer'), tiny(**VARIANTS['subspaces'])
    assert {n.eps for n in layer_model.modules() if isinstance(n, torch.nn.LayerNorm)} == {1e-5}
    assert {n.eps for n in rms_model.modules() if isinstance(n, torch.nn.RMSNorm)} == {1e-6}


@pytest.mark.parametrize('name', EVERY)
def test_initial_loss_is_that_of_guessing(name):
    torch.manual_seed(0)
    model = make_model(**{**TINY, **EVERY[name]}).eval()
    idx, targets = tokens(8, 16), tokens(8, 16, seed=2)
    assert abs(model(idx, targets)['loss'].item() - math.log(61)) < 0.05


@pytest.mark.parametrize('name', EVERY)
def test_weights_in_bfloat16_compute_what_their_values_do_in_float32(name):
    same_in_bfloat16(tiny(**EVERY[name], dtype=torch.float32).eval(), tokens(2, 14))


def same_in_bfloat16(low, idx):
    """Rounds a model's matrices to bfloat16, stored as such and in float32: under autocast both
    give the same digits."""
    set_precision(low, lambda name: torch.bfloat16)
    high = set_precision(copy.deepcopy(low), lambda name: torch.float32)
    assert low.tok_emb.weight.dtype == torch.bfloat16 != high.tok_emb.weight.dtype
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(low(idx), high(idx))
        assert low(idx, idx)['loss'] == high(idx, idx)['loss']
    assert m.training_flops(low, 8) == m.training_flops(high, 8)
    if low.config.causal:
        assert m.cache_bytes(low, torch.bfloat16) == m.cache_bytes(high, torch.bfloat16)
        with torch.autocast('cpu', torch.bfloat16):
            texts = (model.generate(idx[:, :4], 6, seed=1) for model in (low, high))
            assert torch.equal(*texts)


# -- causality and masks ---------------------------------------------------------------------------


@pytest.mark.parametrize('train', [True, False])
@pytest.mark.parametrize('name', EVERY)
def test_causal(name, train):
    """When the tokens from t on are replaced, no logit before t may change, and those at t must."""
    model = tiny(**EVERY[name]).train(train)
    idx = tokens(1, 11)
    logits = model(idx)
    for t in range(1, 11):
        other = idx.clone()
        other[:, t:] = (other[:, t:] + 7) % 61
        changed = model(other)
        assert torch.allclose(changed[:, :t], logits[:, :t], atol=1e-12)
        assert not torch.allclose(changed[:, t], logits[:, t], atol=1e-3)
    embedded = []
    model.tok_emb.register_forward_hook(
        lambda module, args, out: embedded.append(out) or out.retain_grad())
    model(idx)[0, 5].sum().backward()
    reached = embedded[0].grad[0].abs().sum(-1) > 0
    assert reached.tolist() == [True] * 6 + [False] * 5


@pytest.mark.parametrize('name', ['mla', 'subtract', 'encdec_subtract', 'encdec_mla'])
def test_a_prefix_does_not_depend_on_what_follows(name):
    model = tiny(**EVERY[name])
    idx = tokens(2, 16)
    assert torch.allclose(model(idx)[:, :6], model(idx[:, :6]), atol=1e-12)


def test_key_mask_hides_keys_only():
    model = tiny(**MLA, causal=False)
    idx, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.bool)
    mask[:, 6:] = False
    logits = model(idx, key_mask=mask)
    assert torch.allclose(logits[:, :6], model(idx[:, :6]), atol=1e-12)
    assert logits[:, 6:].isfinite().all()
    with pytest.raises(ValueError, match='causal'):
        tiny(**MLA)(idx, key_mask=mask)


@pytest.mark.parametrize('name', ['gpt2', 'gqa', 'mla_narrow_v', 'mla_wide_v', *RELATIVES])
def test_attention_never_takes_the_unfused_path(name):
    model = tiny(dtype=torch.float32, **VARIANTS[name])
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CPU]) as run:
        model(tokens(2, 16))
    kernels = {event.key for event in run.key_averages() if 'attention' in event.key}
    assert 'aten::_scaled_dot_product_flash_attention_for_cpu' in kernels
    assert not any('math' in kernel for kernel in kernels)


@pytest.mark.parametrize('p', [0.1, 0.5, 0.99])
def test_dropout_keeps_the_share_and_the_mean(p):
    """Of each of the four elements that one draw serves, and not the same ones of two."""
    x = m.dropout(torch.ones(250_001), p)[:250_000].view(-1, 4)
    kept = (x != 0).double()
    error = (p * (1 - p) / len(kept)) ** 0.5
    assert ((kept.mean(dim=0) - (1 - p)).abs() < 5 * error).all()
    assert (kept.T.corrcoef() - torch.eye(4)).abs().max() < 5 / len(kept) ** 0.5
    scaled = x[x != 0]
    torch.testing.assert_close(scaled, torch.full_like(scaled, 1 / (1 - p)), rtol=2e-3, atol=0)


@pytest.mark.parametrize('kind', ['none', 'causal', 'keys', 'grouped', 'window', 'longer'])
def test_eager_attention_is_the_fused_one(kind):
    """With a dropout that drops nothing, which takes the steps, and in bfloat16."""
    q, k, v = (torch.randn(2, 4, 9, 6, dtype=torch.double, requires_grad=True) for _ in range(3))
    if kind == 'grouped':
        k, v = (x[:, :2] for x in (k, v))
    options = dict(causal=kind != 'none', window=4 if kind == 'window' else None, scale=0.4)
    if kind == 'keys':
        options |= dict(mask=torch.rand(2, 9) < 0.7, causal=False)
        options['mask'][:, 0] = True
    asking = q[:, :, -4:] if kind == 'longer' else q
    fused = m.attend(asking, k, v, **options)
    stepwise = m.attend(asking, k, v, **options, dropout_p=1e-9)
    torch.testing.assert_close(stepwise, fused, rtol=1e-12, atol=1e-12)
    dy = torch.randn_like(fused)
    for found, expected in zip(torch.autograd.grad(stepwise, (q, k, v), dy, retain_graph=True),
                               torch.autograd.grad(fused, (q, k, v), dy)):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    low = m.attend(*(x.bfloat16() for x in (asking, k, v)), **options)
    torch.testing.assert_close(low.double(), fused, rtol=0.05, atol=0.05)


def test_dropout_is_for_training_only():
    model = tiny(**MLA, dropout=0.3)
    idx = tokens(2, 9)
    assert not torch.equal(model(idx), model(idx))
    model.eval()
    assert torch.equal(model(idx), model(idx))
    attention_only = tiny(**MLA, dropout=0.0, attention_dropout=0.3)
    assert not torch.equal(attention_only(idx), attention_only(idx))


# -- loss ------------------------------------------------------------------------------------------


@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-12), (torch.float32, 5e-6)])
@pytest.mark.parametrize('n, vocab', [(40, 61), (700, 40000)])  # one chunk; several
def test_loss_and_gradients_equal_the_plain_ones(n, vocab, dtype, tolerance):
    torch.manual_seed(0)
    x, weight = torch.randn(n, 12, dtype=dtype), torch.randn(vocab, 12, dtype=dtype) * 0.3
    targets = tokens(n, vocab=vocab)
    targets[::3] = -1
    ours, plain = [[x.clone().requires_grad_(), weight.clone().requires_grad_()] for _ in range(2)]
    loss = m.linear_cross_entropy(*ours, targets)['loss']
    wanted = F.cross_entropy(plain[0] @ plain[1].T, targets, ignore_index=-1)
    plain_loss = m.plain_cross_entropy(*plain, targets)['loss']
    assert math.isclose(plain_loss.item(), wanted.item(), rel_tol=1e-6)
    assert math.isclose(loss.item(), wanted.item(), rel_tol=1e-6)
    (loss * 3).backward()
    (wanted * 3).backward()
    for a, b in zip(ours, plain):
        assert (a.grad - b.grad).abs().max() <= tolerance * b.grad.abs().max()
    with torch.no_grad():
        scored = m.linear_cross_entropy(*ours, targets)
    assert math.isclose(scored['loss'].item(), wanted.item(), rel_tol=1e-6)
    frozen = ours[1].detach().clone()  # has no gradient, and that of x is the same
    loss = m.linear_cross_entropy(ours[0], frozen, targets)['loss']
    assert torch.equal(torch.autograd.grad(loss * 3, ours[0])[0], ours[0].grad)
    accuracy = ((x @ weight.T).argmax(-1) == targets)[targets >= 0].double().mean()
    assert math.isclose(scored['accuracy'].item(), accuracy.item(), rel_tol=1e-6)


def test_loss_gradient_by_finite_differences():
    torch.manual_seed(0)
    x, weight = torch.randn(6, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    targets = torch.tensor([1, 8, -1, 0, 3, -1])
    torch.autograd.gradcheck(lambda a, b: m.linear_cross_entropy(a, b, targets)['loss'],
                             (x.requires_grad_(), weight.requires_grad_()))


def test_loss_without_any_target_is_zero():
    model = tiny()
    loss = model(tokens(2, 5), torch.full((2, 5), -1))['loss']
    loss.backward()
    assert loss.item() == 0 and model.tok_emb.weight.grad.abs().max() == 0


@pytest.mark.parametrize('name', ['mla', *RELATIVES])
def test_loss_under_autocast_keeps_float32_gradients(name):
    model, plain = tiny(dtype=torch.float32, **VARIANTS[name]), None
    idx, targets = tokens(4, 16), tokens(4, 16, seed=2)
    with torch.autocast('cpu', torch.bfloat16):
        loss = model(idx, targets)['loss']
        plain = F.cross_entropy(model(idx).flatten(0, 1).float(), targets.flatten())
    loss.backward()
    assert abs(loss.item() - plain.item()) < 1e-3 * plain.item()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize('name', ['gpt2', 'subspaces', 'untied'])
def test_masked_rows_only(name):
    """The loss of (B, M) positions is the loss of full-length targets that are -1 elsewhere."""
    model = tiny(**VARIANTS[name], causal=False)
    idx, positions = tokens(3, 10), torch.tensor([[0, 4], [9, 2], [5, 6]])
    targets = tokens(3, 2, seed=3)
    full = torch.full((3, 10), -1).scatter(1, positions, targets)
    loss = model(idx, targets, positions)['loss']
    assert torch.allclose(loss, model(idx, full)['loss'], rtol=1e-9)
    plain = F.cross_entropy(model(idx).flatten(0, 1), full.flatten(), ignore_index=-1)
    assert torch.allclose(model(idx, full)['loss'], plain, rtol=1e-9)


# -- the encoder-decoder ---------------------------------------------------------------------------


def test_encoder_decoder_is_its_formula():
    """out = ln(decoder(linear(enc), enc)): self-attention is attention_plain, cross-attention and
    the rest are written out here."""
    model = tiny(**EVERY['encdec_subtract'], mlp='relu2')
    c, idx = model.config, tokens(1, 9)
    norm = lambda x, layer: F.layer_norm(x, x.shape[-1:], layer.weight, eps=1e-5)
    mlp = lambda x, block: ((norm(x, block.mlp_norm) @ block.mlp.in_proj.weight.T).relu() ** 2
                            @ block.mlp.out_proj.weight.T)
    x = model.tok_emb.weight[idx[0]] + model.pos_emb.weight[:9]
    for block in model.encoder:
        x = x + attention_plain(block.attn, norm(x, block.attn_norm), c)
        x = x + mlp(x, block)
    enc, x = x, x @ model.decoder_proj.weight.T
    for block in model.decoder:
        x = x + attention_plain(block.attn, norm(x, block.attn_norm), c)
        source, d = norm(enc, block.kv_norm), c.n_embd // c.cross_n_head
        q = norm(x, block.cross_norm) @ block.cross.q_proj.weight.T
        k, v = source @ block.cross.k_proj.weight.T, source @ block.cross.v_proj.weight.T
        heads = [softmax_attention(*(part[:, h * d:(h + 1) * d] for part in (q, k, v)), True)
                 for h in range(c.cross_n_head)]
        x = x + torch.cat(heads, -1) @ block.cross.o_proj.weight.T
        x = x + mlp(x, block)
    x = norm(x, model.norm)
    assert torch.allclose(model.hidden(idx)[0][0], x, rtol=1e-9)
    logits = (x - model.pos_emb.weight[1:10]) @ model.tok_emb.weight.T
    assert torch.allclose(model(idx)[0], logits, rtol=1e-9)


@pytest.mark.parametrize('kind', ['mse', 'cosine'])
@pytest.mark.parametrize('affine', [True, False])
def test_embedding_loss_is_its_formula(kind, affine):
    options = dict(embedding_loss=kind, embedding_loss_affine=affine, embedding_loss_coeff=3.0)
    model = tiny(**EVERY['encdec'] | options)
    idx, targets = tokens(2, 9), tokens(2, 9, seed=2)
    embedded, encoded = model.tok_emb.weight[idx] + model.pos_emb.weight[:9], None
    encoded = embedded
    for block in model.encoder:
        encoded = block(encoded)

    def norm(x, layer):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        return x * layer.weight + layer.bias if affine else x

    losses = []
    for b in range(2):
        for t in range(9):
            mean = norm(embedded[b, :t + 1], model.embedding_loss_norm).mean(0)
            target = norm(encoded[b, t], model.encoder_loss_norm)
            cos = mean @ target / mean.norm() / target.norm()
            losses.append((mean - target).square().mean() if kind == 'mse' else 1 - (cos + 1) / 2)
    out = model(idx, targets)
    plain = sum(losses) / len(losses)
    assert torch.allclose(out['embedding_loss'], plain, rtol=1e-9)
    assert torch.allclose(out['loss'], out['cross_entropy'] + 3 * plain, rtol=1e-9)
    assert ('encoder_gain' in out) == affine
    # the encoder's output is taken as given: no gradient goes through it
    last = model.encoder[-1].mlp.out_proj.weight
    assert torch.autograd.grad(out['embedding_loss'], last, allow_unused=True)[0] is None


# -- closed formulas -------------------------------------------------------------------------------


FLOPS = {  # products per token of two blocks 32 wide, over the key and value widths and scores
    'gpt2': 2 * (4 * 32 * 32 + 2 * 32 * 128),
    'mla': 2 * (32 * 12 + 12 * 32 + 32 * 8 + 2 * 8 * 32 + 32 * 32 + 2 * 32 * 128),
    'mla_o': 2 * (32 * 12 + 12 * 32 + 32 * 8 + 2 * 8 * 32 + 2 * 32 * 12 + 2 * 32 * 128),
    # the factors, then q_rank + 2 kv_rank outer products per head
    'tpa': 2 * (32 * 7 * (4 + 7) + 7 * 4 * 7 + 28 * 32 + 2 * 32 * 128),
    # the router, two chosen experts and a shared one
    'experts': 2 * (32 * 12 + 12 * 32 + 32 * 8 + 32 * 4 + 8 * 16 + 8 * 32 + 32 * 32
                    + 32 * 6 + 3 * 3 * 32 * 10),
}


@pytest.mark.parametrize('name', FLOPS)
@pytest.mark.parametrize('causal', [True, False])
def test_flops_are_those_of_the_formula(name, causal):
    """Twice the products, and 2 (d + dv) per head and visible key; three times for training."""
    model, T, share = tiny(**VARIANTS[name], causal=causal), 16, 0.25
    c = model.config
    scores = 2 * c.n_head * 2 * c.head_dim * ((T + 1) / 2 if causal else T)
    wanted = 3 * 2 * (FLOPS[name] + scores + share * 61 * 32)
    assert m.training_flops(model, T, share) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize('name', EVERY)
def test_flops_counted_on_meta_are_those_of_a_real_pass(name):
    """But for attention, of which a real pass forms hidden scores, and for products of experts."""
    model, T = tiny(dtype=torch.float32, **EVERY[name]), 16
    if 'v4' in name or 'experts' in name:
        return
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model.eval()(tokens(1, T))
    counted = counter.get_total_flops()
    with torch.no_grad(), FlopCounterMode(display=False) as counter, m.FusedFlops() as fused:
        m.on_meta(model, torch.zeros(1, T, dtype=torch.long, device='meta'))
    formed = 0
    for attention in [module for module in model.modules() if isinstance(module, Attention)]:
        d, dv, extra = attention.head_dim, attention.v_head_dim, attention.sink is not None
        n_queries = T + extra * (attention.window is None)  # see softmax_attention
        formed += 4 * attention.n_softmax * (max(d, dv) + extra) * n_queries * (T + extra)
    assert counter.get_total_flops() == counted - formed
    assert 0.4 * formed < fused.flops <= formed


@pytest.mark.parametrize('name, numbers', [
    ('gpt2', 2 * 32),  # keys and values
    ('gqa', 2 * 16),
    ('mla', 8),  # the latent alone
    ('mla_shared', 8 + 4),  # and the shared rotated key
    ('gla', 2 * 8 + 4),
    ('mlra', 3 * 2 * 8),
    ('gta', 2 * 7 + 4),
    ('gta_no_rope', 8),
    ('mfa', 2 * 10),
    ('tpa', (2 + 2) * (4 + 7)),
])
def test_cache_formula(name, numbers):
    model = tiny(**VARIANTS[name])
    assert m.cache_bytes(model) == (2 * numbers * 8, 0)  # layers, float64
    assert m.cache_bytes(model, torch.bfloat16) == (2 * numbers * 2, 0)


# -- initialisation, options -----------------------------------------------------------------------


@pytest.mark.parametrize('scaled, zero', [(True, True), (True, False), (False, False)])
def test_initialisation(scaled, zero):
    torch.manual_seed(0)
    options = {**TINY, **VARIANTS['subspaces'], 'n_embd': 256, 'n_layer': 8}
    model = make_model('transformer', **options, scale_latents=scaled, zero_init_residual=zero)
    latent_norms = 'q_a_norm.weight', 'kv_a_norm.weight', 'in_proj.1.weight', 'up_proj.1.weight'
    seconds = 'o_b_proj.weight', 'out_proj.1.weight', 'vocab_proj.weight'
    for name, p in model.named_parameters():
        if p.dim() == 1:
            wanted = 0.0 if name.endswith('bias') else 1.0
            if scaled and name.endswith(latent_norms):
                wanted = math.sqrt(256 / p.numel())
            assert torch.allclose(p, torch.tensor(wanted)), name
        else:
            wanted = p.size(-1) ** -0.5 if scaled and name.endswith(seconds) else 0.02
            out = name.endswith(
                ('o_proj.weight', 'o_b_proj.weight', 'out_proj.1.weight', 'out_proj.weight'))
            if out:
                wanted = 0.0 if zero else wanted / 4
            assert math.isclose(p.std().item(), wanted, rel_tol=0.1), name


def test_what_goes_through_a_latent_starts_as_large_as_without_it():
    x = torch.randn(4, 64, 256)
    sizes = dict(n_embd=256, n_head=8, n_layer=1, vocab_size=50, init_std=0.05, scale_latents=True)
    latents = dict(attention='mla', q_latent=64, kv_latent=32, o_latent=64)
    plain, scaled, unscaled = (
        make_model('transformer', **{**sizes, **options}).blocks[0].attn
        for options in ({}, latents, dict(latents, scale_latents=False)))

    def sizes_of(attn):
        q = attn.q_b_proj(attn.q_a_norm(attn.q_a_proj(x)))
        latent = attn.kv_a_norm(attn.kv_a_proj(x))
        return [y.std().item() for y in (q, attn.k_b_proj(latent), attn.v_b_proj(latent),
                                         attn.o_proj(x))]

    wanted = [layer(x).std().item() for layer in (plain.q_proj, plain.k_proj, plain.v_proj,
                                                  plain.o_proj)]
    assert sizes_of(scaled) == pytest.approx(wanted, rel=0.15)
    too_small = [a / b for a, b in zip(wanted, sizes_of(unscaled))]
    assert too_small[:3] == pytest.approx([2, math.sqrt(8), math.sqrt(8)], rel=0.15)


@pytest.mark.parametrize('options', [
    dict(attention='mla', kv_latent=32, kv_groups=4, o_latent=32, o_groups=2),
    dict(attention='mla', kv_latent=16, kv_branches=3),
    dict(attention='gta', n_kv_head=2),
    dict(n_kv_head=1, q_latent=64, head_dim=64),
    dict(attention='tpa', q_rank=6, kv_rank=2, o_latent=16, o_groups=8),
])
def test_the_relatives_start_as_large_as_plain_attention(options):
    torch.manual_seed(0)
    sizes = dict(n_embd=256, n_head=8, n_layer=1, vocab_size=50, init_std=0.05, scale_latents=True)
    seen = {}
    attn = make_model('transformer', **sizes | options).blocks[0].attn
    attend = attn.attend
    attn.attend = lambda *qkv: seen.update(zip('qkv', qkv)) or attend(*qkv)
    attn(torch.randn(8, 64, 256))
    for part in 'qkv':
        assert seen[part].std().item() == pytest.approx(0.05 * math.sqrt(256), rel=0.15), part
    y = torch.randn(8, 64, attn.n_head * attn.v_head_dim)
    wanted = 0.05 * math.sqrt(y.size(-1) / 2)  # two matrices write into the stream
    assert attn.o_proj(y).std().item() == pytest.approx(wanted, rel=0.15)


@pytest.mark.parametrize('options, message', [
    (dict(n_embd=30), 'n_embd=30 is not divisible by n_head=4: change one, or set head_dim'),
    (dict(rope_dims=5), 'even number <= head_dim=8'),
    (dict(rope_dims=10), 'even number <= head_dim=8'),
    (dict(attention='mlx'), 'must be one of mha, mla, gta, tpa, v4'),
    (dict(attention='mla'), "attention='mla' needs kv_latent"),
    (dict(kv_latent=8), 'kv_latent=8 belongs to attention=mla: set that, or leave kv_latent out'),
    (dict(MLA, qk_norm=True), 'qk_norm=True belongs to attention=mha'),
    (dict(MLA, n_kv_head=2), 'n_kv_head=2 belongs to attention=mha or gta'),
    (dict(MLA, bias=True), 'bias=True belongs to attention=mha'),
    (dict(MLA, o_norm='sum'), "o_norm='sum' belongs to o_latent: set that"),
    (dict(MLA, rope_key='shared', rope_dims=0), "rope_key='shared' needs rope_dims"),
    (dict(n_kv_head=3), 'n_head=4 is not divisible by n_kv_head=3'),
    (dict(attention='gta', n_kv_head=3), 'not divisible by n_kv_head'),
    (dict(attention='tpa'), 'needs kv_rank'),
    (dict(attention='tpa', kv_rank=2, q_latent=8), 'belongs to attention=mha or mla or v4'),
    (dict(kv_groups=2), 'kv_groups=2 belongs to attention=mla'),
    (dict(MLA, kv_groups=3), 'n_head=4 is not divisible by kv_groups=3'),
    (dict(MLA, o_groups=2), 'o_groups=2 belongs to o_latent'),
    (dict(MLA, o_latent=8, o_groups=3), 'n_head=4 is not divisible by o_groups=3'),
    (dict(vocab_rank=8, tie_embeddings=False), 'tie_embeddings=True'),
    (dict(n_dense=3), 'n_dense=3 is more than n_layer=2'),
    (dict(dropout=1.0), 'dropout=1.0: must be a number >= 0 and < 1'),
    (dict(n_layer=0), 'n_layer=0: must be an integer >= 1'),
    (dict(n_layer=True), 'n_layer=True: must be an integer >= 1'),
    (dict(n_head='4'), "n_head='4': must be an integer >= 1"),
    (dict(init_std=math.nan), 'must be a number > 0'),
    (dict(mlp='glu'), "mlp='glu': must be one of gelu, swiglu, relu2, moe"),
    (dict(n_decoder_layer=3), 'has no n_decoder_layer'),
    (dict(rope_trained_length=9), 'rope_trained_length=9 belongs to rope_factor: set that'),
    (dict(subtract_next_position=True, learned_positions=False), 'needs learned_positions=True'),
    (dict(subtract_next_position=True, causal=False), 'and causal=True'),
    (dict(window=3, causal=False), 'only causal attention has a window'),
])
def test_contradictions_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        make_model('transformer', **{**TINY, **options})


@pytest.mark.parametrize('options, message', [
    (dict(cross_n_head=5), 'not divisible by cross_n_head=5'),
    (dict(n_layer=2, causal=True), 'has no causal'),
    (dict(embedding_loss='l1'), 'must be one of none, mse, cosine'),
    (dict(embedding_loss_coeff=0.0), 'must be a number > 0'),
    (dict(embedding_loss_coeff=8.0), 'belongs to embedding_loss: set that'),
    (dict(embedding_loss_affine=False), 'belongs to embedding_loss: set that'),
    (dict(n_dense=2, n_decoder_layer=1), 'n_dense=2 is more than n_decoder_layer=1'),
    (dict(MLA, rope_key='shared', rope_dims=4, cross_n_head=32),
     "cross-attention, cross_n_head=32: rope_key='shared' needs rope_dims"),
    (dict(subtract_next_position=True, learned_positions=False), 'needs learned_positions=True'),
])
def test_contradictions_of_the_encoder_decoder_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        make_model('encoder_decoder', **{**TINY, **options})


def test_unknown_architecture():
    with pytest.raises(ConfigError, match='must be one of transformer'):
        make_model('rnn')


def test_too_long_a_sequence():
    with pytest.raises(ValueError, match='block_size is 16'):
        tiny()(tokens(1, 17))


@pytest.mark.parametrize('name', ['gpt2', 'subspaces', 'encdec_subtract'])
def test_one_batch_can_be_learned_by_heart(name):
    torch.manual_seed(0)
    model = make_model(**{**TINY, **EVERY[name]})
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    idx, targets = tokens(4, 16), tokens(4, 16, seed=2)
    for _ in range(200):
        optimizer.zero_grad()
        model(idx, targets)['loss'].backward()
        optimizer.step()
    assert model.eval()(idx, targets)['loss'].item() < 0.1  # in evaluation the cross-entropy alone


def test_compiled_loss_has_the_same_gradients():
    """Compiled, the one-hot targets are made by a comparison instead of scatter_add_."""
    torch.manual_seed(0)
    x, weight = (torch.randn(n, 8, dtype=torch.float64, requires_grad=True) for n in (7, 11))
    targets = torch.tensor([3, -1, 10, 0, 3, -1, 5])
    compiled = torch.compile(m.linear_cross_entropy, backend='eager', fullgraph=True)
    results = []
    for function in (m.linear_cross_entropy, compiled):
        loss = function(x, weight, targets)['loss']
        results.append((loss, *torch.autograd.grad(loss, (x, weight))))
    assert all(torch.allclose(a, b) for a, b in zip(*results))


@pytest.mark.slow
@pytest.mark.parametrize('name, backend', [('mla_o', 'inductor'), ('gqa_o_groups', 'inductor')]
                         + [(name, 'aot_eager') for name in RELATIVES])
def test_compiled_without_graph_breaks_and_equal(name, backend):
    model = tiny(dtype=torch.float32, **VARIANTS[name], n_layer=1, causal=False)
    other = copy.deepcopy(model)
    torch.compiler.reset()  # there is a limit to how often one function is compiled
    compiled = torch.compile(other, fullgraph=True, backend=backend)
    idx, targets = tokens(2, 16), tokens(2, 3, seed=2)
    positions = torch.tensor([[0, 4, 5], [9, 2, 15]])
    a, b = model(idx, targets, positions)['loss'], compiled(idx, targets, positions)['loss']
    a.backward()
    b.backward()
    assert math.isclose(a.item(), b.item(), rel_tol=1e-5)
    for p, q in zip(model.parameters(), other.parameters()):
        assert torch.allclose(p.grad, q.grad, rtol=1e-3, atol=1e-5 * p.grad.abs().max().item())
