"""deepseek.py against transformers: DeepSeek-V3's checkpoints in and out, single attentions of
checkpoints, and output latents for models that were trained without one."""

import math

import pytest
import torch
import transformers

from deepseek import (Checkpoint, add_output_latent, from_deepseek, read_attention, to_deepseek,
                      unstacked, write_checkpoint)
from model import ConfigError, MoE, OutputLatent, make_model, rope_table
from test_model import tokens

BASE = dict(vocab_size=61, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=40,
            tie_word_embeddings=False, pad_token_id=None, bos_token_id=None, eos_token_id=None)
DEEPSEEK = dict(q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=24, qk_rope_head_dim=8,
                v_head_dim=24, first_k_dense_replace=2)
MOE = dict(first_k_dense_replace=1, n_routed_experts=8, n_group=2, topk_group=1,
           num_experts_per_tok=2, moe_intermediate_size=32)
YARN = dict(rope_type='yarn', rope_theta=1e4, factor=40.0, mscale=0.7, mscale_all_dim=0.7,
            beta_fast=32, beta_slow=1, original_max_position_embeddings=16)
V2 = dict(family='DeepseekV2', first_k_dense_replace=1, n_routed_experts=8, num_experts_per_tok=2,
          moe_intermediate_size=32, routed_scaling_factor=1.7, rope_parameters=YARN)
SHAPES = {
    'base': {},
    'narrow_values': dict(qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=8),
    'all_rotated': MOE | dict(qk_nope_head_dim=0, n_group=1, tie_word_embeddings=True),
    'wide_values': dict(v_head_dim=40, rope_interleave=False),
    'tied': dict(tie_word_embeddings=True, rope_parameters=dict(rope_type='default',
                                                                rope_theta=500.0)),
    'yarn': dict(rope_parameters=YARN),
    'yarn_without_mscale': dict(rope_parameters=YARN | dict(
        mscale=None, mscale_all_dim=0, attention_factor=1.0, factor=2.5)),
    'linear': dict(rope_parameters=dict(rope_type='linear', rope_theta=1e4, factor=4.0)),
    'experts': MOE,
    'experts_in_one_group': MOE | dict(n_group=1, topk_group=1, num_experts_per_tok=3,
                                       first_k_dense_replace=0, n_shared_experts=2),
    'experts_scaled': MOE | dict(n_group=4, topk_group=2, routed_scaling_factor=2.5,
                                 q_lora_rank=None, rope_parameters=YARN),
    'moonlight': MOE | dict(rms_norm_eps=0.02, q_lora_rank=None, n_group=1),
    'kimi_k2': dict(rope_parameters=YARN | dict(
        beta_fast=1, beta_slow=1, original_max_position_embeddings=4000)),
    'glm4_moe_lite': dict(MOE, family='Glm4MoeLite', first_k_dense_replace=2, n_group=1),
    'glm4_moe_lite_dense': dict(family='Glm4MoeLite', mlp_layer_types=['dense', 'dense']),
    'youtu': dict(family='Youtu', tie_word_embeddings=True),
    'v2': V2 | dict(n_group=2, topk_group=1),
    'v2_groups': V2 | dict(n_group=4, topk_group=2, topk_method='group_limited_greedy',
                           num_experts_per_tok=3, q_lora_rank=None, n_shared_experts=1),
}


DENSE = 'Llama', 'Qwen3', 'Gemma', 'StableLm'


def theirs(family='DeepseekV3', **options):
    """A model of transformers with every weight random, gains too."""
    torch.manual_seed(0)
    options = BASE | ({} if family in DENSE else DEEPSEEK) | options
    config = getattr(transformers, f'{family}Config')(**options, attn_implementation='eager')
    model = getattr(transformers, f'{family}ForCausalLM')(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.2)
    for name, buffer in model.named_buffers():
        if name.endswith('e_score_correction_bias'):
            torch.nn.init.normal_(buffer, std=0.2)
    return model


def assert_close(a, b):
    assert (a - b).abs().max() <= 1e-5 * b.abs().max()


@pytest.mark.parametrize('name', SHAPES)
def test_logits_and_greedy_text_are_theirs_both_ways(name, tmp_path):
    original = theirs(**SHAPES[name])
    model, idx = from_deepseek(original.state_dict(), original.config), tokens(2, 20)
    with torch.no_grad():
        assert_close(model(idx), original(idx).logits)
        greedy = original.generate(idx, max_new_tokens=15, do_sample=False)
        assert torch.equal(model.generate(idx, 15, temperature=0), greedy)
        weights, hf_config = to_deepseek(model)
        write_checkpoint(tmp_path, weights, hf_config)
        back, info = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, output_loading_info=True, dtype=torch.float32)
        assert not info['unexpected_keys'] and not info['missing_keys']
        assert_close(back.eval()(idx).logits, original(idx).logits)
        again = from_deepseek(Checkpoint(tmp_path), hf_config)
        assert torch.equal(again(idx), model(idx))


@pytest.mark.parametrize('has_norm', [False, True])
def test_deepseek_tiny_and_its_twin_with_an_output_latent(tmp_path, capsys, has_norm):
    """With keys in config.json that V3 of transformers does not read, and o_proj in parts."""
    original, idx = theirs(**SHAPES['all_rotated']), tokens(2, 20)
    for layer in original.model.layers:
        norm = [torch.nn.RMSNorm(12, eps=1e-6)] if has_norm else []
        layer.self_attn.o_proj = o_proj = torch.nn.Sequential(
            torch.nn.Linear(96, 12, bias=False), *norm, torch.nn.Linear(12, 64, bias=False))
        torch.nn.init.normal_(o_proj[1].weight, std=0.2)
    original.save_pretrained(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    model = from_deepseek(checkpoint, checkpoint.config | dict(
        scoring_func='softmax', topk_method='greedy', moe_layer_freq=1))
    assert (model.config.o_latent, model.config.o_norm) == (12, 'sum' if has_norm else 'none')
    line, = [text for text in capsys.readouterr().err.splitlines() if 'config.json' in text]
    assert "{'scoring_func': 'softmax', 'topk_method': 'greedy'} has no effect" in line
    with torch.no_grad():
        assert_close(model(idx), original(idx).logits)
    o_proj = read_attention(checkpoint, 'model.layers.1.self_attn')[0].o_proj
    assert torch.equal(o_proj.o_a_proj.weight, model.blocks[1].attn.o_proj.o_a_proj.weight)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
def test_fp8_in_blocks(tmp_path, dtype):
    original, idx, quantised = theirs(**MOE, hidden_size=160), tokens(2, 20), {}
    weights = unstacked(original.state_dict())
    for name, weight in weights.items():
        if '_proj' in name:  # the matrices of DeepSeek-V3 that are in fp8
            scale = torch.tensor([0.5, 4.0]).repeat(-(-weight.size(0) // 128), 1)
            scale = scale[:, :-(-weight.size(1) // 128)]
            whole = scale.repeat_interleave(128, 1)[0, :weight.size(1)]
            small = (weight / whole).to(torch.float8_e4m3fn)
            quantised |= {name: small, f'{name}_scale_inv': scale.to(dtype, copy=True)}
            weight.copy_(small.float() * whole)
    hf_config = original.config.to_dict() | dict(quantization_config=dict(
        quant_method='fp8', weight_block_size=[128, 128]))
    write_checkpoint(tmp_path, weights | quantised, hf_config)
    with torch.no_grad():
        model = from_deepseek(Checkpoint(tmp_path), hf_config)
        assert_close(model(idx), original(idx).logits)
    assert 'quantization_config' not in to_deepseek(model)[1]


@pytest.mark.parametrize('name', ['experts', 'experts_scaled', 'v2_groups'])
def test_gradients_are_theirs(name):
    original, idx = theirs(**SHAPES[name]), tokens(2, 20)
    model = from_deepseek(original.state_dict(), original.config)
    dy = torch.randn(2, 20, 61)
    (original(idx).logits * dy).sum().backward()
    (model(idx) * dy).sum().backward()
    assert_close(model.tok_emb.weight.grad, original.model.embed_tokens.weight.grad)
    for ours, layer in zip(model.blocks, original.model.layers):
        assert_close(ours.attn.kv_a_norm.weight.grad, layer.self_attn.kv_a_layernorm.weight.grad)
        if isinstance(ours.mlp, MoE):
            assert_close(ours.mlp.router.weight.grad, layer.mlp.gate.weight.grad)
            assert_close(ours.mlp.out_proj.grad, layer.mlp.experts.down_proj.grad)


OURS = dict(vocab_size=61, block_size=40, n_layer=2, n_head=4, n_embd=64, attention='mla',
            q_latent=24, kv_latent=16, rope_key='shared', rope_dims=8, learned_positions=False,
            norm='rms', mlp='swiglu')


def ours(**options):
    torch.manual_seed(0)
    model = make_model('transformer', **OURS | options).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.2)
    return model


@pytest.mark.parametrize('split, norm', [(False, 'none'), (True, 'none'), (True, 'sum'),
                                         (True, 'head')])
def test_an_output_latent_is_merged_or_kept_split(split, norm):
    model, idx = ours(o_latent=12, o_norm=norm), tokens(2, 20)
    weights, hf_config = to_deepseek(model, split)
    original = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**hf_config))
    if split:
        assert torch.equal(from_deepseek(weights, hf_config)(idx), model(idx))
        add_output_latent(original, 12, norm=norm)
    missing, unexpected = original.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {'lm_head.weight'}
    with torch.no_grad():
        assert_close(original.eval()(idx).logits, model(idx))


LLAMA = dict(family='Llama', num_key_value_heads=2)
QWEN3 = dict(family='Qwen3', num_key_value_heads=2, head_dim=24)


GEMMA = dict(family='Gemma', head_dim=24)
STABLELM = dict(family='StableLm', num_key_value_heads=2, partial_rotary_factor=0.5)


@pytest.mark.parametrize('options', [MOE, dict(q_lora_rank=None), LLAMA, QWEN3, GEMMA, STABLELM],
                         ids=['moe', 'no_query_latent', 'llama', 'qwen3', 'gemma', 'stablelm'])
def test_one_attention_of_a_checkpoint_is_theirs(tmp_path, options):
    original, seen = theirs(**options), {}
    original.save_pretrained(tmp_path)
    attention, gain = read_attention(Checkpoint(tmp_path), 'model.layers.1.self_attn')
    their_layer = original.model.layers[1]
    assert torch.equal(gain, their_layer.input_layernorm.weight + (options is GEMMA))
    their_layer.self_attn.register_forward_hook(
        lambda module, args, kwargs, out: seen.update(x=kwargs['hidden_states'], y=out[0]),
        with_kwargs=True)
    with torch.no_grad():
        original(tokens(2, 20))
        rope = rope_table(20, attention.rope_dims, 10000.0)
        assert_close(attention(seen['x'], rope=rope), seen['y'])


@pytest.mark.parametrize('split', [False, True])
def test_one_attention_of_our_own_checkpoint(tmp_path, split):
    model = ours(o_latent=12, o_norm='head' if split else 'none')
    write_checkpoint(tmp_path, *to_deepseek(model, split))
    attention, gain = read_attention(Checkpoint(tmp_path), 'model.layers.1.self_attn')
    block, x = model.blocks[1], torch.randn(2, 20, 64)
    rope = model.rope[:, :20]
    assert torch.equal(gain, block.attn_norm.weight)
    assert_close(attention(x, rope=rope), block.attn(x, rope=rope))


TINY = dict(vocab_size=61, n_layer=1, n_embd=32)


@pytest.mark.parametrize('init', ['svd', 'data'])
@pytest.mark.parametrize('make', [
    lambda: ours(),
    lambda: make_model('transformer', **TINY).eval(),
    lambda: make_model('encoder_decoder', **TINY, n_head=4).eval(),
    lambda: theirs(**MOE),
    lambda: theirs(**LLAMA, attention_bias=True)],
    ids=['mla', 'mha', 'encoder_decoder', 'deepseek', 'llama'])
def test_at_full_rank_nothing_changes(make, init):
    """Even if the data say nothing about most directions."""
    model, idx = make(), tokens(2, 20)
    logits = lambda model: getattr(out := model(idx), 'logits', out)
    with torch.no_grad():
        before = logits(model)
        o_proj = next(m for m in model.modules() if hasattr(m, 'o_proj')).o_proj
        full = min(o_proj.weight.shape)
        add_output_latent(model, full, init, batches=[(tokens(1, 9, seed=2),)])
        assert_close(logits(model), before)
        state = model.state_dict()
        again = add_output_latent(make(), full, init='xavier')  # another start, then reloaded
        assert not torch.allclose(logits(again), before, rtol=1e-2)
        again.load_state_dict(state)
        assert_close(logits(again), before)


def test_svd_is_the_best_product_and_the_config_follows():
    model = ours()
    weight = model.blocks[1].attn.o_proj.weight.detach().clone()
    add_output_latent(model, 10)
    new = model.blocks[1].attn.o_proj
    assert isinstance(new, OutputLatent) and new.o_a_proj.weight.shape == (10, 64)
    rest = torch.linalg.svdvals(weight)[10:].square().sum().sqrt()
    error = (new.o_b_proj.weight @ new.o_a_proj.weight - weight).norm()
    assert error.item() == pytest.approx(rest.item(), rel=1e-4)
    rebuilt = make_model('transformer', **model.config.options()).eval()
    rebuilt.load_state_dict(model.state_dict())
    assert torch.equal(rebuilt(tokens(1, 9)), model(tokens(1, 9)))


def error_on_data(make, rank, init, n_groups):
    """(matrices of the inputs and the outputs of an o_proj in float64, a token per row, the mean
    squared error of its outputs after the cut, and the cut model)."""
    model, batches, seen = make(), [(tokens(4, 30, seed=seed),) for seed in (2, 3)], []
    attention = next(m for m in reversed([*model.modules()]) if hasattr(m, 'o_proj'))
    with torch.no_grad():
        hook = attention.o_proj.register_forward_hook(
            lambda o_proj, inputs, out: seen.append((inputs[0].flatten(0, 1), out.flatten(0, 1))))
        for batch in batches:
            model(*batch)
        hook.remove()
        y, z = (torch.cat(parts).double() for parts in zip(*seen))
        add_output_latent(model.train(), rank, init, n_groups=n_groups, batches=iter(batches))
        assert model.training and not attention.o_proj._forward_pre_hooks
        return y, z, (attention.o_proj.double()(y) - z).square().sum().item(), attention.o_proj


@pytest.mark.parametrize('make', [
    lambda: ours(dropout=0.5, attention_dropout=0.5), lambda: theirs(**MOE),
    lambda: theirs(**LLAMA, attention_dropout=0.5)], ids=['ours', 'deepseek', 'llama'])
@pytest.mark.parametrize('rank, n_groups', [(1, 1), (9, 1), (40, 1), (1, 2), (9, 2), (30, 2)])
def test_data_cut_for_the_closest_outputs(make, rank, n_groups):
    y, z, error, o_proj = error_on_data(make, rank, 'data', n_groups)
    assert error < 0.98 * error_on_data(make, rank, 'svd', n_groups)[2]
    if n_groups == 1:  # no product of this rank is closer (Eckart and Young)
        least = torch.linalg.svdvals(z)[rank:].square().sum().item()
    else:  # from these latents no linear map is
        latent = o_proj.o_a_proj(y)
        least = (latent @ torch.linalg.lstsq(latent, z).solution - z).square().sum().item()
    assert error == pytest.approx(least, rel=1e-5)


@pytest.mark.parametrize('init', ['svd', 'data'])
@pytest.mark.parametrize('arch, options', [
    ('transformer', dict(n_dense=1)),
    ('transformer', dict(n_dense=1, attention='mha', q_latent=None, kv_latent=None,
                         rope_key='per_head', bias=True)),
    ('encoder_decoder', dict(cross_n_head=4))])
def test_groups_are_cut_one_by_one_and_dense_layers_stay(arch, options, init):
    """At full rank nothing changes, and the config rebuilds the model."""
    model, idx = make_model(arch, **OURS | options).eval(), tokens(1, 9)
    before = model(idx)
    add_output_latent(model, 32, init, n_groups=2, batches=[(tokens(1, 9, seed=2),)])
    assert_close(model(idx), before)
    if arch == 'transformer':
        cut = [isinstance(block.attn.o_proj, OutputLatent) for block in model.blocks]
        assert cut == [False, True]
    rebuilt = make_model(arch, **model.config.options()).eval()
    rebuilt.load_state_dict(model.state_dict())
    assert torch.equal(rebuilt(idx), model(idx))


@pytest.mark.parametrize('options, message', [
    (dict(model_type='deepseek_v32'), "model_type='deepseek_v32': only deepseek_v3, deepseek_v2"),
    (dict(model_type=['llama']), 'model_type=.*llama.*: only deepseek_v3, deepseek_v2'),
    (dict(MOE, model_type='kimi_k2', scoring_func='softmax'), 'scoring_func=softmax: only sigmoid'),
    (dict(model_type='deepseek_v2', norm_topk_prob=True), 'norm_topk_prob=True: only False'),
    (dict(model_type='glm4_moe_lite', mlp_layer_types=['sparse', 'dense']), 'only dense layers fi'),
    (dict(MOE, num_experts_per_tok=5), 'n_experts_per_tok=5 is more than the 4 experts'),
    (dict(rope_scaling=dict(type='llama3', factor=8)), "rotary scaling 'llama3'"),
    (dict(rope_scaling=dict(type='linear')), "rotary scaling 'linear' with the factor None"),
    (dict(rope_scaling=dict(type='yarn', factor=40)), 'YaRN that scales rotated dimensions alone'),
    (dict(rope_parameters=YARN | dict(mscale=1.0)), 'YaRN that scales rotated dimensions alone'),
    (dict(rope_parameters=YARN | dict(truncate=False)), 'YaRN that .* has truncate=False'),
    (dict(quantization_config=dict(quant_method='fp8', weight_block_size=[64, 64])),
     'other than fp8 in blocks of 128 x 128: convert'),
    (dict(rms_norm_eps='1e-5'), "norm_eps='1e-5': must be a number > 0"),
    (dict(kv_lora_rank=None), 'kv_lora_rank=None: must be an integer >= 1'),
    (dict(kv_lora_rank=8), r'kv_a_proj_with_mqa.weight: has the shape \(24, 64\), but config.json '
                           r'asks for \(16, 64\)'),
    (MOE, 'model.layers.1.mlp.gate_proj.weight: a tensor that no model'),
    (dict(num_hidden_layers=1), 'model.layers.1.self_attn.q_a_proj.weight: a tensor that no model'),
])
def test_from_deepseek_refuses(options, message):
    original = theirs()
    with pytest.raises(ConfigError, match=message):
        from_deepseek(original.state_dict(), original.config.to_dict() | options)


def test_tensors_that_are_missing_unknown_or_ignored():
    original, idx = theirs(), tokens(1, 9)
    state, layer = original.state_dict(), 'model.layers.2.'
    unused = {f'{layer}eh_proj.weight': torch.ones(1), f'{layer}self_attn.o_proj.weight':
              torch.ones(1), 'model.layers.0.self_attn.rotary_emb.inv_freq': torch.ones(4)}
    model = from_deepseek(state | unused, original.config.to_dict() | dict(model_type='kimi_k2'))
    assert_close(model(idx), original(idx).logits)
    bias = {'model.layers.1.self_attn.o_proj.bias': torch.ones(64)}
    with pytest.raises(ConfigError, match='o_proj.bias: a tensor that no model'):
        from_deepseek(state | bias, original.config)
    del state['model.layers.1.mlp.up_proj.weight']
    with pytest.raises(ConfigError, match='model.layers.1.mlp.up_proj.weight: missing'):
        from_deepseek(state, original.config)


@pytest.mark.parametrize('options, message', [
    (dict(o_latent=12, o_norm='sum'), "o_norm='sum' stands between the two matrices.*split=True"),
    (dict(mlp='gelu'), 'mlp=gelu, .*: DeepSeek-V3 has swiglu or moe'),
    (dict(rope_key='per_head'), 'rope_key=per_head: DeepSeek-V3 has shared'),
    (dict(softmax_factor=2.0), 'softmax_factor=2.0: DeepSeek-V3 needs a rope_factor too'),
    (dict(gate=True), 'gate=True: DeepSeek-V3 has False'),
    (dict(o_latent=12, o_groups=2), 'o_groups=2: DeepSeek-V3 has 1'),
    (dict(n_embd=66, head_dim=24, mlp='moe', router='softmax', n_routed_experts=4,
          expert_hidden=8), 'n_embd=66: DeepSeek-V2.*needs a multiple of n_head=4'),
])
def test_to_deepseek_refuses(options, message):
    with pytest.raises(ConfigError, match=message):
        to_deepseek(ours(**options))
    with pytest.raises(ConfigError, match='EncoderDecoder: only a Transformer'):
        to_deepseek(make_model('encoder_decoder', **TINY, n_head=4))


@pytest.mark.parametrize('arguments, message', [
    (dict(rank=65), 'an output latent of 65: blocks.0.attn.o_proj takes 1 to 64'),
    (dict(rank=0), 'an output latent of 0'),
    (dict(rank=17, n_groups=4), 'an output latent of 17: blocks.0.attn.o_proj takes 1 to 16'),
    (dict(rank=8, n_groups=3), 'blocks.0.attn has 4 heads, not divisible by o_groups=3'),
    (dict(rank=8, init='random'), "init='random'"),
    (dict(rank=8, init='data'), "init='data' needs batches"),
    (dict(rank=8, init='data', batches=[(tokens(1, 9),)]), 'blocks.1.attn.o_proj .*not finite'),
])
def test_add_output_latent_refuses_before_it_changes_anything(arguments, message):
    model = ours()
    torch.nn.init.constant_(model.blocks[1].attn.v_b_proj.weight, math.inf)
    with pytest.raises(ConfigError, match=message):
        add_output_latent(model, **arguments)
    assert not any(isinstance(module, OutputLatent) for module in model.modules())
    assert model.config.o_latent is None
    with pytest.raises(ConfigError, match='no attention of this model has a linear o_proj'):
        add_output_latent(torch.nn.Linear(3, 3), 2)


def test_add_output_latent_refuses_layers_of_other_kinds():
    """Weights that are no matrix of numbers, and layers that are no attention with heads."""
    quantised, kda = theirs(**LLAMA), theirs(**LLAMA)
    o_proj = quantised.model.layers[1].self_attn.o_proj
    o_proj.weight = torch.nn.Parameter(o_proj.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ConfigError, match='layers.1.self_attn.o_proj: is quantised'):
        add_output_latent(quantised, 4)
    del kda.model.layers[1].self_attn.config
    with pytest.raises(ConfigError, match='layers.1.self_attn: has no config whose num_att'):
        add_output_latent(kda, 4)
