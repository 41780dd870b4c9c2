"""The attention of DeepSeek-V4: against transformers' layers, in chunks and pieces, and what it
keeps and costs."""

import copy
import math

import pytest
import torch

import layers
import model as m
from model import BlockConfig, ConfigError, make_attention, make_model
from test_model import EVERY, TINY, V4, tiny, tokens

NAMES = [name for name in EVERY if 'v4' in name]
BLOCK = {name: value for name, value in V4.items() if name != 'learned_positions'}
BLOCK |= dict(n_head=4, n_embd=32, index_n_head=3, index_head_dim=6)
SIZES = [  # of transformers' layers: others than those of tests/golden/layers
    dict(hidden_size=20, num_attention_heads=6, head_dim=10, qk_rope_head_dim=6, q_lora_rank=7,
         o_groups=3, o_lora_rank=5, sliding_window=4, csa=2, hca=3, index_topk=2, index_n_heads=3,
         index_head_dim=8),
    dict(hidden_size=16, num_attention_heads=2, head_dim=8, qk_rope_head_dim=8, q_lora_rank=12,
         o_groups=1, o_lora_rank=6, sliding_window=40, csa=5, hca=7, index_topk=50,
         index_n_heads=1, index_head_dim=8),
]


def their_layer(kind, sizes):
    """A layer of transformers with random weights, the config that tests/layers.py takes, and the
    rotary tables of T positions that it applies, for any T."""
    v4 = pytest.importorskip('transformers.models.deepseek_v4.modeling_deepseek_v4')
    from transformers import DeepseekV4Config
    sizes = dict(sizes)
    r, rates = sizes.pop('qk_rope_head_dim'), dict(
        compressed_sparse_attention=sizes.pop('csa'), heavily_compressed_attention=sizes.pop('hca'))
    config = DeepseekV4Config(**sizes, compress_rates=rates, layer_types=[kind] * 2, vocab_size=9,
                              partial_rotary_factor=r / sizes['head_dim'], num_hidden_layers=2,
                              max_position_embeddings=64, attn_implementation='eager')
    torch.manual_seed(0)
    layer = v4.DeepseekV4Attention(config, 0).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    rotary = v4.DeepseekV4RotaryEmbedding(config)

    def tables(T):
        at = torch.arange(T)[None]
        return {name: rotary(torch.zeros(1, dtype=torch.double), at, layer_type=name)
                for name in ('main', 'compress')}
    return layer, dict(sizes, qk_rope_head_dim=r, compress_rates=rates, layer=kind), tables


@pytest.mark.parametrize('sizes', SIZES)
@pytest.mark.parametrize('kind', layers.V4_KINDS)
@pytest.mark.parametrize('T', [1, 6, 29])
def test_layer_is_that_of_transformers(kind, sizes, T, monkeypatch):
    monkeypatch.setattr(m.Indexer, 'choose', lambda self, scores: scores.topk(  # ties as there
        min(self.topk, scores.size(-1)), dim=-1).indices)
    layer, c, tables = their_layer(kind, sizes)
    x = torch.randn(2, T, c['hidden_size'], dtype=torch.double, requires_grad=True)
    distance = torch.arange(T)[:, None] - torch.arange(T)
    hidden = (distance < 0) | (distance >= c['sliding_window'])
    mask = torch.zeros(T, T, dtype=torch.double).masked_fill(hidden, -math.inf)[None, None]
    theirs, _ = layer(x, tables(T), torch.arange(T)[None].expand(2, -1), mask.expand(2, 1, -1, -1))

    options, weights = layers.v4(c, dict(layer.named_parameters()))
    attention = make_attention(BlockConfig(**options)).double()
    names = {name.removesuffix('.weight'): name for name in attention.state_dict()}
    attention.load_state_dict({names[name]: weight.detach() for name, weight in weights.items()})
    cos, sin = tables(T)['main' if options['layers'] == 'window' else 'compress']
    rope = torch.stack((cos[0], sin[0]))
    y = attention(x, rope=rope)
    assert (y - theirs).abs().max() < 1e-6 * theirs.abs().max()  # theirs rotates in float32
    dx, = torch.autograd.grad(theirs.square().sum(), x)
    ours, = torch.autograd.grad(y.square().sum(), x)
    assert (ours - dx).abs().max() < 1e-5 * dx.abs().max()


@pytest.mark.parametrize('chunk', [3, 4, 7])
@pytest.mark.parametrize('name', NAMES)
def test_in_chunks(name, chunk, monkeypatch):
    """However many queries are read for at once, loss, terms and gradients are the same."""
    idx, targets, found = tokens(3, 16), tokens(3, 16, seed=2), []
    for size in (256, chunk):
        monkeypatch.setattr(m.V4, 'chunk', size)
        model = tiny(**EVERY[name])
        out = model(idx, targets)
        out['loss'].backward()
        found.append((*out.values(), *(p.grad for p in model.parameters())))
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(*found))


@pytest.mark.parametrize('name', NAMES)
def test_dropout_is_the_same_when_a_chunk_is_computed_anew(name, monkeypatch):
    """Gradients of a loss with dropout are those of its differences."""
    monkeypatch.setattr(m.V4, 'chunk', 4)
    model = tiny(**EVERY[name], dropout=0.3)
    idx, targets = tokens(2, 16), tokens(2, 16, seed=2)
    weight = model.tok_emb.weight
    direction = torch.randn_like(weight)

    def loss():
        torch.manual_seed(5)
        out = model(idx, targets)
        return out.get('cross_entropy', out['loss'])  # the indexer's loss takes much as given

    gradient, = torch.autograd.grad(loss(), weight)
    with torch.no_grad():
        weight += 1e-6 * direction
        more = loss()
        weight -= 2e-6 * direction
        assert math.isclose((more - loss()) / 2e-6, (gradient * direction).sum(), rel_tol=1e-4)


@pytest.mark.parametrize('T', range(1, 17))
@pytest.mark.parametrize('name', ['v4', 'v4_indexed', 'v4_no_rope'])
def test_what_the_cache_holds(name, T):
    """Entries of complete groups grow with the text, and everything else is bounded."""
    model = tiny(**EVERY[name]).eval()
    cache = model.init_cache(2, 16)
    with torch.no_grad():
        model(tokens(2, T), cache=cache)
    held, most = 0, 0
    for attention in m.attentions_of(model):
        window = min(T, attention.window - 1) * attention.head_dim
        rows, = cache.buffers[attention]
        assert rows.numel() == 2 * window
        held, most = held + window, most + attention.cache_fixed()
        for part in attention.modules():
            if isinstance(part, m.Compressor):
                g, width = part.group_size, part.kv_norm.weight.numel()
                entries, = cache.buffers[part]
                assert entries.shape == (2, 16 // g, width)
                open_tokens = T % g + g * (part.overlap and T >= g)
                held += 16 // g * width + open_tokens * 2 * part.position_bias.size(1)
    assert cache.n_bytes() == 2 * 8 * held  # two sequences in float64
    growing = sum(16 // part.group_size * part.kv_norm.weight.numel() for part in model.modules()
                  if isinstance(part, m.Compressor))
    assert held - growing <= most
    by_formula = sum(part.kv_norm.weight.numel() / part.group_size for part in model.modules()
                     if isinstance(part, m.Compressor))
    assert math.isclose(model.cache_bytes_per_token(), 8 * by_formula)


def test_the_most_that_is_kept_is_reached():
    model = tiny(**EVERY['v4_indexed']).eval()
    cache, fixed = model.init_cache(1, 16), sum(a.cache_fixed() for a in m.attentions_of(model))
    with torch.no_grad():
        model(tokens(1, 15), cache=cache)
    entries = 16 * model.cache_bytes_per_token()
    assert cache.n_bytes() == 8 * fixed + entries


def test_a_cache_that_forgets_cannot_go_back():
    model = tiny(**EVERY['v4']).eval()
    cache = model.init_cache(1, 16)
    with torch.no_grad():
        model(tokens(1, 9), cache=cache)
        cache.n_tokens = 5
        with pytest.raises(ValueError, match='set back to 0'):
            model(tokens(1, 1), cache=cache)


def read_keys(options, T):
    """By brute force: how many keys and entries the queries of T tokens read, and how many the
    indexer compares with."""
    m_, read, compared = {'csa': options['csa_group'], 'hca': options['hca_group']}.get(
        options['layers']), 0, 0
    for t in range(T):
        n = sum(1 for j in range(T) if m_ and (j + 1) * m_ - 1 <= t)
        read += sum(1 for j in range(T) if t - options['window'] < j <= t)
        read += min(n, options['index_topk'] or n)
        compared += n if options['index_topk'] else 0
    return read, compared


@pytest.mark.parametrize('T', [1, 7, 16, 45])
@pytest.mark.parametrize('kind, topk', [('window', None), ('csa', None), ('csa', 3), ('hca', None)])
def test_score_flops(kind, topk, T):
    options = dict(layers=kind, csa_group=3, hca_group=5, window=4, index_topk=topk)
    attention = make_attention(BlockConfig(**BLOCK | options))
    read, compared = read_keys(options, T)
    expected = 2 * 2 * 4 * 10 * read + 2 * 3 * (6 + 1) * compared
    assert math.isclose(T * attention.score_flops((T + 1) / 2), expected)


def test_an_indexer_that_takes_all_changes_nothing():
    options = {**TINY, **V4, 'layers': 'csa', 'csa_group': 2, 'index_head_dim': 6}
    plain, indexed = (make_model('transformer', **options, index_topk=k).double()
                      for k in (None, 8))
    indexed.load_state_dict(plain.state_dict(), strict=False)
    idx = tokens(2, 16)
    assert torch.allclose(plain(idx), indexed(idx), atol=1e-12)


def test_only_its_own_loss_trains_the_indexer():
    model = tiny(**EVERY['v4_indexed'])
    own = [p for name, p in model.named_parameters() if '.indexer.' in name]
    others = [p for name, p in model.named_parameters() if '.indexer.' not in name]
    out = model(tokens(3, 16), tokens(3, 16, seed=2))
    assert math.isclose(out['loss'], out['cross_entropy'] + out['index_loss'], rel_tol=1e-12)
    own_of_loss = torch.autograd.grad(out['cross_entropy'], own, retain_graph=True,
                                      allow_unused=True)
    assert not any(g is not None and g.abs().max() > 0 for g in own_of_loss)
    grads = torch.autograd.grad(out['index_loss'], own + others, allow_unused=True)
    assert all(g is not None and g.abs().max() > 0 for g in grads[:len(own)])
    assert all(g is None for g in grads[len(own):])
    copy.deepcopy(model)  # no layer holds on to its terms


def test_the_indexer_learns_what_is_read():
    """On fixed tokens its loss falls to a fraction, and what it chooses is what is read most."""
    torch.manual_seed(0)
    options = dict(layers='csa', csa_group=2, index_topk=2, index_head_dim=8, init_std=0.3)
    model = make_model('transformer', **{**TINY, **V4, **options, 'n_layer': 1})
    own = [p for name, p in model.named_parameters() if '.indexer.' in name]
    optimizer, idx, losses = torch.optim.Adam(own, lr=0.01), tokens(8, 16), []
    for _ in range(200):
        out = model(idx, idx)
        optimizer.zero_grad()
        out['index_loss'].backward()
        optimizer.step()
        losses.append(out['index_loss'].item())
    assert losses[-1] < 0.3 * losses[0]


def test_scores_of_zero_go_to_the_latest():
    indexer = make_attention(BlockConfig(**BLOCK, layers='csa', index_topk=3)).indexer
    scores = torch.tensor([[[0.0, 0.5, 0.0, 0.0, -1.0, 0.0]]])
    assert set(indexer.choose(scores)[0, 0].tolist()) == {1, 3, 5}


@pytest.mark.parametrize('name', NAMES)
def test_under_autocast(name):
    model = tiny(dtype=torch.float32, **EVERY[name])
    idx, targets = tokens(4, 16), tokens(4, 16, seed=2)
    plain = model(idx, targets)['loss']
    with torch.autocast('cpu', torch.bfloat16):
        loss = model(idx, targets)['loss']
    loss.backward()
    assert abs(loss.item() - plain.item()) < 0.02 * plain.item()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize('options, message', [
    (dict(window=None), 'needs q_latent'),
    (dict(q_latent=None), 'needs q_latent'),
    (dict(causal=False), 'causal=True'),
    (dict(layers='csa dense'), "layers='csa dense': takes words out of window, csa and hca"),
    (dict(layers=''), "layers='': takes words"),
    (dict(layers='hca', hca_group=4, index_topk=4), "layers='hca' has none"),
    (dict(layers='csa', index_topk=4, index_head_dim=2), 'more than index_head_dim=2'),
    (dict(layers='csa hca', hca_group=17), 'hca_group=17 is more than block_size=16'),
    (dict(kv_latent=8), "attention='v4' has no kv_latent"),
    (dict(attention='mha', q_latent=None), "attention='mha' has no window"),
    (dict(window=0), 'window=0'),
])
def test_contradictions(options, message):
    with pytest.raises(ConfigError, match=message):
        make_model('transformer', **{**TINY, **V4, **options})


def test_grouped_latents_have_groups_of_their_own():
    with pytest.raises(ConfigError, match='groups of its own'):
        make_model('grouped_latent', attention='v4', q_latent=8, window=4)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['v4', 'v4_indexed'])
@pytest.mark.parametrize('chunk', [256, 8])
def test_compiled_without_graph_breaks_and_equal(name, chunk, monkeypatch):
    monkeypatch.setattr(m.V4, 'chunk', chunk)
    model = tiny(dtype=torch.float32, **EVERY[name])
    other = copy.deepcopy(model)
    torch.compiler.reset()
    compiled = torch.compile(other, fullgraph=True, backend='aot_eager')
    idx, targets = tokens(2, 16), tokens(2, 16, seed=2)
    a, b = model(idx, targets)['loss'], compiled(idx, targets)['loss']
    a.backward()
    b.backward()
    assert math.isclose(a.item(), b.item(), rel_tol=1e-5)
    for p, q in zip(model.parameters(), other.parameters()):
        assert torch.allclose(p.grad, q.grad, rtol=1e-3, atol=1e-5 * p.grad.abs().max().item())
    n_graphs = torch._dynamo.utils.counters['stats']['unique_graphs']
    compiled(idx, targets)
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] == n_graphs
