"""Mixtures of experts: against their formula, their bias, what they cost. test_deepseek.py has them
against transformers."""

import math

import pytest
import torch
import torch.nn.functional as F

import model as m
from model import BlockConfig, ConfigError, MoE, make_model
from test_model import TINY, tiny, tokens

EXPERTS = dict(mlp='moe', n_routed_experts=6, n_experts_per_tok=2, expert_hidden=10)


def mixture(dtype=torch.float64, **options):
    """A mixture with random weights and a random bias."""
    torch.manual_seed(0)
    moe = MoE(BlockConfig(n_embd=32, n_head=4, **EXPERTS | options)).to(dtype)
    for tensor in (*moe.parameters(), moe.router_bias):
        torch.nn.init.normal_(tensor, std=0.3)
    return moe


def plain(moe, x, n_group=1, topk_group=1, scaling=1.0):
    """One token x (D,) after the other, in loops."""
    scores = [1 / (1 + math.exp(-(row @ x).item())) for row in moe.router.weight]
    choice = [score + bias.item() for score, bias in zip(scores, moe.router_bias)]
    size = len(scores) // n_group
    if n_group > 1:
        best = sorted(range(n_group), reverse=True,
                      key=lambda g: sum(sorted(choice[g * size:(g + 1) * size])[-2:]))[:topk_group]
    else:
        best = [0]
    allowed = [e for e in range(len(scores)) if e // size in best]
    chosen = sorted(allowed, key=lambda e: choice[e], reverse=True)[:moe.n_chosen]
    y = 0.0
    for e in chosen:
        h = F.silu(moe.in_proj[e] @ x) * (moe.up_proj[e] @ x)
        y = y + scaling * scores[e] / sum(scores[e] for e in chosen) * (moe.out_proj[e] @ h)
    return y if moe.shared is None else y + moe.shared(x[None, None])[0, 0]


@pytest.mark.parametrize('options', [
    {}, dict(n_group=3, topk_group=1), dict(n_group=2, topk_group=2, n_experts_per_tok=5),
    dict(n_shared_experts=0, routed_scaling=2.5), dict(n_experts_per_tok=6),
    dict(n_shared_experts=3, n_experts_per_tok=1)])
def test_it_is_its_formula(options):
    moe, x = mixture(**options), torch.randn(2, 7, 32, dtype=torch.float64)
    keys = {name: options[name] for name in ('n_group', 'topk_group') if name in options}
    wanted = torch.stack([plain(moe, token, scaling=options.get('routed_scaling', 1.0), **keys)
                          for token in x.flatten(0, 1)]).view_as(x)
    assert torch.allclose(moe(x), wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('hidden', [8, 10])  # 8: in one grouped product
def test_grouped_products_are_those_of_each_expert(hidden):
    """Outputs and gradients, with experts that no token has chosen among them."""
    moe = mixture(torch.float32, expert_hidden=hidden)
    moe.router_bias[2:4] = -9.0
    other = mixture(torch.float64, expert_hidden=hidden)
    other.load_state_dict(moe.state_dict())
    x = torch.randn(2, 7, 32)
    moe(x).square().sum().backward()
    other(x.double()).square().sum().backward()
    for (name, a), b in zip(moe.named_parameters(), other.parameters()):
        assert torch.allclose(a.grad, b.grad.float(), rtol=1e-4, atol=1e-5), name
    assert moe.out_proj.grad[2:4].abs().max() == 0


def test_no_tokens_at_all():
    for moe in (mixture(), mixture(torch.float32, expert_hidden=8)):
        assert moe(torch.zeros(3, 0, 32, dtype=moe.router.weight.dtype)).shape == (3, 0, 32)


def test_the_bias_moves_against_the_load():
    moe = mixture(balance_rate=0.25)
    bias, x = moe.router_bias.clone(), torch.randn(2, 7, 32, dtype=torch.float64)
    moe(x), moe(x)
    _, experts = moe.route(x.flatten(0, 1))
    counts = 2 * experts.flatten().bincount(minlength=6)
    assert torch.equal(moe.load, counts.double()) and counts.sum() == 2 * 14 * 2
    moe.balance()
    wanted = bias + 0.25 * torch.sign(counts.sum() / 6 - counts)
    assert torch.allclose(moe.router_bias, wanted)
    assert moe.load.sum() == 0 and torch.equal(moe.last_load, counts.double())
    moe.eval()(x)
    assert moe.load.sum() == 0  # an evaluation does not count
    assert not moe.router_bias.requires_grad and 'router_bias' in moe.state_dict()
    assert 'load' not in moe.state_dict()


def test_a_frozen_router_keeps_its_bias():
    moe = mixture(balance_rate=0.25)
    bias = moe.router_bias.clone()
    moe.router.requires_grad_(False)
    moe(torch.randn(2, 7, 32, dtype=torch.float64))
    moe.balance()
    assert torch.equal(moe.router_bias, bias) and moe.last_load.sum() > 0 == moe.load.sum()


def test_balancing_balances():
    """From a bias that sends all tokens to two experts of six."""
    moe = mixture(balance_rate=0.02)
    moe.router_bias[:] = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    busiest = []
    for i in range(150):
        moe(torch.randn(8, 32, 32, dtype=torch.float64, generator=torch.manual_seed(i)))
        busiest.append((moe.load.max() / moe.load.mean()).item())
        moe.balance()
    assert busiest[0] > 2.5 and busiest[-1] < 1.3


def test_router_is_exact_under_autocast():
    moe = mixture(torch.float32)
    x = torch.randn(64, 32).bfloat16()
    weights, experts = moe.route(x.float())
    with torch.autocast('cpu', torch.bfloat16):
        low_weights, low_experts = moe.route(x)
        y = moe(x)
    assert torch.equal(experts, low_experts) and torch.equal(weights, low_weights)
    assert y.dtype == torch.bfloat16


def test_parameters_and_flops_of_one_token():
    dense = make_model('transformer', **TINY, mlp='swiglu', mlp_hidden=24)
    options = dict(mlp='moe', n_routed_experts=8, n_experts_per_tok=2, expert_hidden=8)
    experts = make_model('transformer', **TINY, **options)  # a token meets 3 x 8 = 24 hidden units
    router = 2 * 8 * 32  # layers
    assert m.n_active_params(experts) == dense.n_params() + router
    assert experts.n_params() == m.n_active_params(experts) + 2 * 6 * 3 * 8 * 32
    assert m.training_flops(experts, 16) == m.training_flops(dense, 16) + 3 * 2 * router
    assert m.n_active_params(dense) == dense.n_params()


def test_first_layers_are_dense():
    model = tiny(**EXPERTS, first_k_dense=1, mlp_hidden=20, attention='mla', kv_latent=8)
    first, second = model.blocks
    assert isinstance(first.mlp, m.MLP) and first.mlp.in_proj.out_features == 20
    assert isinstance(second.mlp, MoE) and isinstance(first.attn, m.MLA)
    model = tiny(**EXPERTS, n_dense=1, attention='mla', kv_latent=8)
    assert type(model.blocks[0].attn) is m.MHA and isinstance(model.blocks[0].mlp, m.MLP)


def test_matrices_start_as_others_do():
    torch.manual_seed(0)
    options = {**TINY, **EXPERTS, 'n_embd': 256, 'expert_hidden': 64}
    for zero in (True, False):
        moe = make_model('transformer', **options, zero_init_residual=zero).blocks[1].mlp
        for name, weight in moe.named_parameters():
            wanted = 0.02
            if 'out_proj' in name:  # three writers a block: attention, experts, shared expert
                wanted = 0.0 if zero else 0.02 / math.sqrt(6)
            assert math.isclose(weight.std().item(), wanted, rel_tol=0.05), name


@pytest.mark.parametrize('options, message', [
    (dict(n_routed_experts=None), "mlp='moe' needs n_routed_experts"),
    (dict(expert_hidden=None), 'needs expert_hidden'),
    (dict(mlp='swiglu'), 'n_routed_experts=6 belongs to mlp=moe'),
    (dict(n_experts_per_tok=7), 'n_experts_per_tok=7 is more than the 6'),
    (dict(n_group=4), 'n_group=4'),
    (dict(n_group=6), 'at least two experts'),
    (dict(n_group=2, topk_group=3), 'topk_group=3'),
    (dict(n_group=3, topk_group=1, n_experts_per_tok=3), 'more than the 2 experts to choose'),
    (dict(mlp_bias=True), 'no mlp_bias'),
    (dict(mlp='gelu', n_routed_experts=None, expert_hidden=None, first_k_dense=1),
     'first_k_dense=1 belongs to mlp=moe'),
])
def test_contradictions(options, message):
    with pytest.raises(ConfigError, match=message):
        make_model('transformer', **{**TINY, **EXPERTS, **options})


def test_channels_have_their_own():
    with pytest.raises(ConfigError, match="not with mlp='moe'"):
        make_model('grouped_latent', n_channels=2, **EXPERTS)


@pytest.mark.slow
def test_compiled_without_graph_breaks():
    """In bfloat16, of which alone torch can compile grouped products."""
    model = tiny(dtype=torch.float32, **EXPERTS | dict(expert_hidden=8))
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    idx, targets = tokens(2, 16), tokens(2, 16, seed=2)
    with torch.autocast('cpu', torch.bfloat16):
        loss = compiled(idx, targets)['loss']
        assert math.isclose(loss, model(idx, targets)['loss'], rel_tol=1e-2)
    loss.backward()
    assert model.blocks[0].mlp.load.sum() == 2 * (2 * 32)  # two calls, two experts a token
    assert all(p.grad is not None for p in model.parameters())
