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
    cos, sin = tables(T)['main' if options['layer_kinds'] == 'window' else 'compress']
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


@pytest.mark.parametrize('name, per_token, fixed', [
    # entries of 10 from 2 and 5 tokens; two windows of 2 and what open groups give, of 3 and of 4
    ('v4', 10 / 2 + 10 / 5, 2 * 2 * 10 + 3 * 2 * 20 + 4 * 2 * 10),
    # an entry of the attention and one of its indexer; 3 tokens of open groups of either
    ('v4_indexed', (10 + 6) / 2, 2 * 2 * 10 + 3 * 2 * (20 + 12)),
    ('v4_no_rope', 8 / 3 + 8 / 4, 2 * 2 * 8 + 7 * 2 * 16)])
def test_what_the_cache_holds(name, per_token, fixed):
    """Entries of complete groups grow with the text, and everything else is bounded."""
    model = tiny(**EVERY[name]).eval()
    assert m.cache_bytes(model) == pytest.approx((8 * per_token, 8 * fixed))
    cache = model.init_cache(2, 16)
    for t in range(16):
        with torch.no_grad():
            model(tokens(2, 1, seed=t), cache=cache)
        growing = sum(x.nbytes for buffers in cache.buffers.values() for x in buffers)
        assert cache.n_bytes() - growing <= 2 * 8 * fixed
    assert cache.n_bytes() - growing == 2 * 8 * fixed


def test_a_cache_that_forgets_cannot_go_back():
    model = tiny(**EVERY['v4']).eval()
    cache = model.init_cache(1, 16)
    with torch.no_grad():
        model(tokens(1, 9), cache=cache)
        cache.n_tokens = 5
        with pytest.raises(ValueError, match='set back to 0'):
            model(tokens(1, 1), cache=cache)


def test_an_indexer_that_takes_all_changes_nothing():
    options = {**TINY, **V4, 'layer_kinds': 'csa', 'csa_group': 2, 'index_head_dim': 6}
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
    options = dict(layer_kinds='csa', csa_group=2, index_topk=2, index_head_dim=8, init_std=0.3)
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
    indexer = make_attention(BlockConfig(**BLOCK, layer_kinds='csa', index_topk=3)).indexer
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
    (dict(window=None), 'needs'),
    (dict(q_latent=None), 'needs'),
    (dict(causal=False), 'only causal attention has a window'),
    (dict(layer_kinds='csa dense'), "layer_kinds='csa dense': must be words out of window, csa"),
    (dict(layer_kinds=''), "layer_kinds='': must be words"),
    (dict(layer_kinds='hca', hca_group=4, index_topk=4), "layer_kinds='hca' has none"),
    (dict(layer_kinds='csa', index_topk=4, index_head_dim=2), 'more than index_head_dim=2'),
    (dict(layer_kinds='csa hca', hca_group=17), 'hca_group=17 is more than block_size=16'),
    (dict(kv_latent=8), 'kv_latent=8 belongs to attention=mla'),
    (dict(csa_group=5, attention='mha'), 'csa_group=5 belongs to attention=v4'),
    (dict(window=0), 'window=0'),
])
def test_contradictions(options, message):
    with pytest.raises(ConfigError, match=message):
        make_model('transformer', **{**TINY, **V4, **options})


def test_grouped_latents_have_groups_of_their_own():
    with pytest.raises(ConfigError, match='does not work in grouped latents'):
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
