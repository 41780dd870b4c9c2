"""Grouped latents: causal at every length, exact caches, costs by closed formulas, and the parts
against plain formulas."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import model as m
from model import ConfigError, make_model
from test_model import OWN, same_in_bfloat16, tokens
from train import Muon, TrainOptions, make_optimizers, parameter_groups

# 2 does not divide 5 - 2, nor 5 divide 7 - 5
TINY = dict(vocab_size=61, block_size=40, n_layer=2, group_size=7, latents=(5, 2),
            widths=(16, 32, 32), head_dim=8, norm='rms')
MLA = dict(attention='mla', kv_latent=8, rope_dims=4)
GROUPED = {
    'base': {},
    'perceiver': dict(compress='perceiver'),
    'attention': dict(upsample='attention'),
    'serial': dict(skip='learned', n_mix=2, interleave=False, n_compress=2, slot_emb_up=True),
    'rope': dict(rope_dims=4),
    'rope_attention': dict(rope_dims=4, upsample='attention', compress='perceiver',
                           slot_emb_up=True),
    'dense_former': dict(dense_former=True, latent_loss=True, n_layer=3),
    'channels': dict(n_channels=2, n_shared_mlp=1, channels_every=2, mlp_bias=True),
    'mla_o': dict(MLA, q_latent=12, o_latent=12),
    'mla_shared': dict(MLA, rope_key='shared', upsample='attention', compress='perceiver',
                       n_channels=3, merge='max'),
    'gqa': dict(n_kv_head=2, n_channels=2, merge='mean', channel_mlp_mult=0.5),
    'window': dict(global_window=6),
    'window_mla': dict(MLA, global_window=3),
    'gla': dict(MLA, rope_key='shared', kv_groups=2, sink=True, gate=True, o_latent=6, o_groups=2,
                n_channels=2, upsample='attention'),
    'mlra': dict(MLA, kv_branches=2, compress='perceiver', global_window=3),
    'gta': dict(rope_dims=4, attention='gta', n_kv_head=2, sink=True, global_window=6),
    'mfa': dict(n_kv_head=1, q_latent=12, n_channels=2),
    'tpa': dict(rope_dims=4, attention='tpa', q_rank=3, kv_rank=2, n_channels=2,
                upsample='attention', compress='perceiver', global_window=3),
    'experts': dict(rope_dims=4, mlp='moe', n_routed_experts=4, expert_hidden=6),
    'three_levels': dict(latents=(5, 3, 1), widths=(16, 16, 24, 32)),
}


GROUPED |= {kind: dict(rope_dims=4, attention=kind) for kind in OWN}
# the others are marked slow: pytest -m slow
FAST = (*OWN, 'base', 'rope_attention', 'dense_former', 'channels', 'mla_o', 'window', 'gla',
        'experts')
VARIANTS = [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in GROUPED]


def tiny(name, seed=0, **options):
    """Every weight random, gains and biases too, in float64."""
    torch.manual_seed(seed)
    model = make_model('grouped_latent', **{**TINY, **GROUPED[name], **options}).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.3)
    return model


@pytest.mark.parametrize('name', GROUPED)
def test_weights_in_bfloat16_compute_what_their_values_do_in_float32(name):
    same_in_bfloat16(tiny(name).float().eval(), tokens(2, 14))


def assert_causal(model, T):
    """In row t of a batch the tokens from t on are replaced: no logit before t may change, and the
    logits at t must. The same by gradient: the logits at t depend on the tokens up to t, and on no
    others."""
    idx = tokens(1, T)
    later = torch.arange(T) >= torch.arange(T)[:, None]  # (T rows, T)
    changed = model(torch.where(later, (idx + 7) % 61, idx)) - model(idx)
    assert changed[~later].abs().max() < 1e-11 if T > 1 else True, f'{T} tokens: a leak'
    assert changed.diagonal().abs().amax(0).min() > 1e-4
    embedded = []
    hook = model.tok_emb.register_forward_hook(
        lambda module, args, out: embedded.append(out) or out.retain_grad())
    model(idx.repeat(T, 1)).diagonal().square().sum().backward()  # of row t, logit t
    hook.remove()
    reached = embedded[0].grad.abs().sum(-1) > 0
    assert torch.equal(reached, ~later | torch.eye(T, dtype=torch.bool)), f'{T} tokens, by gradient'


@pytest.mark.parametrize('train', [True, False])
@pytest.mark.parametrize('name', VARIANTS)
def test_causal_at_every_position_and_length(name, train):
    model = tiny(name).train(train)
    for T in (1, 6, 7, 8, 17):
        assert_causal(model, T)


def leak_by_one_slot(model):
    reads = model.up[0].reads
    model.up[0].reads = reads + 1 - (reads == reads.max()).long()


def leak_in_the_pool(model):
    model.down[0].pool.attn.causal = False


def leak_over_latents(model):
    model.blocks[0].attn.causal = False


@pytest.mark.parametrize('plant', [leak_by_one_slot, leak_in_the_pool, leak_over_latents])
def test_planted_leaks_are_found(plant):
    model = tiny('base').eval()
    plant(model)
    with pytest.raises(AssertionError, match='a leak'):
        assert_causal(model, 17)


@pytest.mark.parametrize('name', VARIANTS)
def test_a_prefix_does_not_depend_on_what_follows(name):
    model, idx = tiny(name).eval(), tokens(2, 40)
    whole = model(idx)
    for T in (1, 6, 7, 8, 13, 14, 15, 33, 39):
        assert (model(idx[:, :T]) - whole[:, :T]).abs().max() < 1e-11


@pytest.mark.parametrize('name', VARIANTS)
def test_cached_logits_are_the_uncached_ones(name):
    model, idx = tiny(name).eval(), tokens(2, 40)
    cuts = (40,), (1,) * 40, (5, 1, 1, 14, 1, 3, 9, 6), (7, 7, 26), (39, 1), (3, 30, 7)
    with torch.no_grad():
        whole = model(idx)
        for pieces in cuts:
            cache, parts, start = model.init_cache(2, 40), [], 0
            for n in pieces:
                parts.append(model(idx[:, start:start + n], cache=cache))
                start += n
            assert (torch.cat(parts, dim=1) - whole).abs().max() < 1e-9, pieces


def test_the_cache_is_as_large_as_it_says():
    """Keys and values of the slots that global blocks and the trunk have per token."""
    model = tiny('base').eval()
    per_token, fixed = m.cache_bytes(model)
    # up to tokens: 16 wide; up to and down to level 1, and down to level 2: 32 wide; the trunk
    assert per_token == pytest.approx(8 * (2 * 16 + 2 * 2 * 32 * 5 / 7 + (1 + 2) * 2 * 32 * 2 / 7))
    # open tokens, and the projected latents that Up reads of the group before
    assert fixed == 8 * (6 * 16 + 5 * 16 + 2 * 32)
    for name in ('gla', 'mla_o', 'channels'):
        model = tiny(name).eval()
        cache = model.init_cache(3, 35)
        with torch.no_grad():
            model(tokens(3, 35), cache=cache)
        per_token, fixed = m.cache_bytes(model)
        open_tokens = 8 * 6 * 16
        assert cache.n_bytes() == pytest.approx(3 * (35 * per_token + fixed - open_tokens))


@pytest.mark.slow
def test_generation_past_the_window():
    model, idx = tiny('rope').eval(), tokens(2, 30)
    expected = idx
    with torch.no_grad():
        for _ in range(20):
            token = model(expected[:, -40:])[:, -1].argmax(-1, keepdim=True)
            expected = torch.cat((expected, token), dim=1)
    assert torch.equal(model.generate(idx, 20, temperature=0), expected)


@pytest.mark.parametrize('window', [1, 3, 6, 40])
def test_windows_are_their_mask(window):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 17, 8), torch.randn(2, 2, 17, 8), torch.randn(2, 2, 17, 6)
    seen = torch.ones(17, 17, dtype=torch.bool).tril().triu(1 - window)
    plain = m.attend(q, k, v, mask=seen[None, None], scale=0.3)
    windowed = m.attend(q, k, v, causal=True, window=window, scale=0.3)
    assert torch.allclose(windowed, plain, atol=1e-6)
    for T in (1, 5):
        part = m.attend(q[:, :, -T:], k, v, causal=True, window=window, scale=0.3)
        assert torch.allclose(part, plain[:, -T:], atol=1e-6)


def test_repeat_reads_the_slots_it_says():
    """With 7 slots and 5 latents a group, slots 0 and 1 read latents 3 and 4 of the group before,
    which are -2 and -1 modulo 5; the other slots read the latents of their own group."""
    up = tiny('base').up[0]
    assert up.reads.tolist() == [3, 4, 5, 6, 7, 8, 9]
    # 5 slots, 2 latents: slots 0 to 2 read -3, -2 and -1 modulo 2
    assert tiny('base').up[1].reads.tolist() == [1, 0, 1, 2, 3]


def test_slot_embeddings_are_added_on_the_way_up_too():
    plain, model, idx = tiny('base'), tiny('base', slot_emb_up=True), tokens(2, 20)
    assert not torch.allclose(plain(idx), model(idx))
    for either in (plain, model):
        for table in either.slot_emb:
            torch.nn.init.zeros_(table.weight)
    assert torch.equal(plain(idx), model(idx))


def test_pooling_is_a_plain_block_of_which_the_last_slots_are_kept():
    from model import Block
    down, x = tiny('rope').down[0], torch.randn(3, 7, 32, dtype=torch.float64)
    rope = m.rope_table(7, 4, 10000.0)
    plain = Block(tiny('rope').config.block_at(1)).double()
    plain.load_state_dict(down.pool.state_dict())
    pooled = down.pool(x[:, -5:], x, rope=rope)
    assert torch.allclose(pooled, plain(x, rope=rope)[:, -5:], rtol=1e-9)


def test_channels_are_their_formula():
    model = tiny('channels')
    block, x = model.blocks[1], torch.randn(1, 9, 32, dtype=torch.float64)
    norm = lambda x, layer: x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.weight
    zs = []
    for c in range(2):
        normed = norm(x, block.attn_norm)
        attn, mlp = block.attn[c], block.mlp[c]
        q, k, v = (normed @ getattr(attn, f'{part}_proj').weight.T for part in 'qkv')
        split = lambda y: y.unflatten(-1, (4, 8)).transpose(1, 2)
        heads = F.scaled_dot_product_attention(split(q), split(k), split(v), is_causal=True)
        y = heads.transpose(1, 2).flatten(2)
        h = x + y @ attn.o_proj.weight.T
        y = norm(h, block.mlp_norm)
        inner = F.gelu(y @ mlp.in_proj.weight.T + mlp.in_proj.bias)
        own = inner @ mlp.out_proj.weight.T
        zs.append(h + own + mlp.out_proj.bias + block.shared[0](y))
    z = torch.stack(zs)
    assert torch.allclose(block(x), (z.softmax(0) * z).sum(0), rtol=1e-9)
    assert block.mlp[0].in_proj.weight.shape == (64, 32)  # 4 * 32 / 2 wide


def test_dense_former_begins_as_no_dense_former():
    torch.manual_seed(0)
    plain = make_model('grouped_latent', **TINY, dense_former=False)
    other = make_model('grouped_latent', **TINY, dense_former=True)
    other.load_state_dict(plain.state_dict(), strict=False)
    idx = tokens(2, 20)
    assert torch.equal(plain(idx), other(idx))
    other.depth_weights[0].data[0] = 0.5
    assert not torch.equal(plain(idx), other(idx))


def test_latent_loss_sees_real_latents_only():
    model, idx = tiny('dense_former').train(), tokens(1, 17)
    seen = {}
    model.blocks[-1].register_forward_hook(lambda module, args, out: seen.update(out=out))
    model.blocks[0].register_forward_hook(lambda module, args, out: seen.update(into=args[0]))
    out = model(idx, idx)
    n = 2 * 2  # of 17 tokens two groups are whole, and the third has not come to its latents
    predicted = model.latent_head(seen['out'][0, :n - 1])
    cos = F.cosine_similarity(predicted, seen['into'][0, 1:n], dim=-1)
    assert torch.allclose(out['latent_loss'], (1 - cos).mean())
    assert torch.allclose(out['loss'], out['cross_entropy'] + out['latent_loss'])
    for T in (3, 6):  # no latent, and one: nothing to predict, but a gradient all the same
        model.zero_grad(set_to_none=True)
        out = model(idx[:, :T], idx[:, :T])
        out['loss'].backward()
        assert out['latent_loss'] == 0 and not model.latent_head.weight.grad.any()
    assert set(model.eval()(idx, idx)) == {'loss'}


def test_flops_of_attention():
    """By hand for one head geometry: 35 tokens in 5 groups; a causal query meets (n + 1)/2 keys."""
    model = make_model('grouped_latent', **TINY)
    with torch.no_grad(), m.FusedFlops() as fused:
        m.on_meta(model, torch.zeros(1, 35, dtype=torch.long, device='meta'))
    pairs = lambda n: n * (n + 1) / 2
    trunk = 2 * 4 * 32 * pairs(10)
    level_0 = 4 * 16 * (5 * pairs(7) + pairs(35))  # on the way up
    # on both ways, and in the pool, whose mask is executed
    level_1 = 2 * 4 * 32 * (5 * pairs(5) + pairs(25)) + 4 * 32 * 5 * 5 * 7
    level_2 = 4 * 32 * (5 * pairs(2) + pairs(10)) + 4 * 32 * 5 * 2 * 5
    assert fused.flops == pytest.approx(trunk + level_0 + level_1 + level_2)


@pytest.mark.parametrize('name', VARIANTS)
def test_flops_counted_on_meta_are_those_of_a_real_pass(name):
    """All but those of attention."""
    model, counts = make_model('grouped_latent', **{**TINY, **GROUPED[name]}), []
    if name == 'experts':
        return
    for run in (lambda: model.eval()(tokens(1, 35)),
                lambda: m.on_meta(model, torch.zeros(1, 35, dtype=torch.long, device='meta'))):
        with FlopCounterMode(display=False) as counter, torch.no_grad(), m.FusedFlops():
            run()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


@pytest.mark.parametrize('name', VARIANTS)
def test_every_parameter_is_stepped_once(name):
    """Also by Muon, which takes a channel at a time; and one batch is learned by heart."""
    torch.manual_seed(0)
    model = make_model('grouped_latent', **{**TINY, **GROUPED[name]})
    parameter_groups(model)  # asserts it
    optimizers = make_optimizers(model, TrainOptions(optimizer='muon', learning_rate=1e-2))
    assert isinstance(optimizers[0], Muon)
    before, idx = copy.deepcopy(dict(model.named_parameters())), tokens(2, 20)
    for _ in range(3):
        loss = model(idx, idx)['loss']
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
    assert model(idx, idx)['loss'] < loss
    unmoved = [key for key, value in model.named_parameters() if torch.equal(value, before[key])]
    assert not unmoved


def test_initialisation():
    torch.manual_seed(0)
    options = dict(TINY, widths=(128, 256, 256), head_dim=32, vocab_size=500)
    model = make_model('grouped_latent', **options)
    for name, p in model.named_parameters():
        if p.dim() > 1 and p.numel() > 3000:
            small = any(part in name for part in ('o_proj', 'out_proj', 'up_proj'))
            wanted = p.size(-1) ** -0.5 * (0.1 if small else 1.0)
            assert math.isclose(p.std().item(), wanted, rel_tol=0.1), name
    assert math.isclose(model.slot_emb[0].weight.std().item(), 0.5 * 128 ** -0.5, rel_tol=0.15)
    model.eval()
    assert abs(model(tokens(4, 40), tokens(4, 40, seed=2))['loss'].item() - math.log(500)) < 1.0


@pytest.mark.slow
def test_compiled_without_graph_breaks_and_equal():
    model = make_model('grouped_latent', **dict(TINY, n_layer=1, latents=(2,), widths=(16, 32)))
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    idx = tokens(2, 17)  # the last group is open
    assert math.isclose(model(idx, idx)['loss'].item(), compiled(idx, idx)['loss'].item(),
                        rel_tol=1e-5)


@pytest.mark.parametrize('options, message', [
    (dict(latents=(5, 5)), 'each level must have fewer than the one before it'),
    (dict(group_size=5), 'each level must have fewer than the one before it'),
    (dict(widths=(16, 32)), 'must be 3 numbers'),
    (dict(head_dim=12), 'widths=.*16 is not divisible by head_dim=12'),
    (dict(block_size=6), 'group_size=7 is more than block_size=6'),
    (dict(latents=(5, 0)), 'an integer >= 1'),
    (dict(n_shared_mlp=1), 'n_shared_mlp=1 belongs to n_channels'),
    (dict(merge='max'), "merge='max' belongs to n_channels"),
    (dict(latent_loss_coeff=0.5), 'latent_loss_coeff=0.5 belongs to latent_loss'),
    (dict(head_dim=None), 'head_dim=None: must be an integer >= 1'),
    (dict(compress='perceiver', n_compress=2), 'n_compress=2 belongs to compress=transformer'),
    (dict(n_channels=2, channels_every=3), 'channels_every=3 is more than n_layer=2'),
    (dict(n_channels=1), 'an integer >= 2'),
    (dict(n_embd=32), 'has no n_embd: leave it out'),
    (dict(n_head=3), 'has no n_head: leave it out'),
    (dict(learned_positions=True), 'has no learned_positions'),
    (dict(n_dense=1), 'has no n_dense'),
    (dict(subtract_next_position=True), 'has no subtract_next_position'),
    (dict(global_window=0), '>= 1'),
    (dict(n_mix=0), '>= 1'),
    (dict(n_kv_head=3), 'not divisible by n_kv_head'),
    (dict(causal=True), 'has no causal'),
    (dict(window=6), 'set global_window'),
])
def test_refusals(options, message):
    with pytest.raises(ConfigError, match=message):
        make_model('grouped_latent', **{**TINY, **options})
