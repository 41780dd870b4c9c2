"""DeepSeek-V3's checkpoints in and out, against transformers; output latents for models trained without."""

import pytest
import torch
import transformers

from model import ConfigError, OutputLatent, Transformer, add_output_latent, make_model
from test_model import tokens

BASE = dict(vocab_size=61, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4, q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=24, qk_rope_head_dim=8, v_head_dim=24,
            max_position_embeddings=40, first_k_dense_replace=2, tie_word_embeddings=False, pad_token_id=None,
            bos_token_id=None, eos_token_id=None)
SHAPES = {
    'base': {},
    'no_query_latent': dict(q_lora_rank=None),
    'even_split': dict(qk_nope_head_dim=16, qk_rope_head_dim=16),
    'narrow_values': dict(v_head_dim=8),
    'wide_values': dict(v_head_dim=40),
    'tied': dict(tie_word_embeddings=True),
    'not_interleaved': dict(rope_interleave=False),
    'theta': dict(rope_parameters=dict(rope_type='default', rope_theta=500.0)),
}


def theirs(seed=0, config_class='DeepseekV3Config', model_class='DeepseekV3ForCausalLM', **options):
    """A model of transformers with every weight random, gains too."""
    torch.manual_seed(seed)
    config = getattr(transformers, config_class)(**BASE | options, attn_implementation='eager')
    model = getattr(transformers, model_class)(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.2)
    return model


def assert_close(a, b):
    assert (a - b).abs().max() <= 1e-5 * b.abs().max()


@pytest.mark.parametrize('name', SHAPES)
def test_logits_and_greedy_text_are_theirs_both_ways(name):
    original = theirs(**SHAPES[name])
    model, idx = Transformer.from_deepseek(original.state_dict(), original.config), tokens(2, 20)
    with torch.no_grad():
        assert_close(model(idx), original(idx).logits)
        greedy = original.generate(idx, max_new_tokens=15, do_sample=False)
        assert torch.equal(model.generate(idx, 15, temperature=0), greedy)
        weights, hf_config = model.to_deepseek()
        back = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**hf_config)).eval()
        missing, unexpected = back.load_state_dict(weights, strict=False)
        assert not unexpected and set(missing) <= {'lm_head.weight'}  # tied
        assert_close(back(idx).logits, original(idx).logits)


OURS = dict(vocab_size=61, block_size=40, n_layer=2, n_head=4, n_embd=64, attention='mla', q_latent=24, kv_latent=16,
            rope_key='shared', rope_dims=8, learned_positions=False, norm='rms', mlp='swiglu')


def ours(seed=0, **options):
    torch.manual_seed(seed)
    model = make_model('transformer', **OURS | options).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.2)
    return model


def test_an_output_latent_is_merged(tmp_path):
    model, idx = ours(o_latent=12), tokens(2, 20)
    weights, hf_config = model.to_deepseek()
    original = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**hf_config))
    original.load_state_dict(weights, strict=False)
    original.save_pretrained(tmp_path)
    original = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()  # as any tool that reads that format
    with torch.no_grad():
        assert_close(original(idx).logits, model(idx))


@pytest.mark.parametrize('norm', ['none', 'sum', 'head'])
def test_an_output_latent_is_kept_split(norm):
    model, idx = ours(o_latent=12, o_norm=norm), tokens(2, 20)
    weights, hf_config = model.to_deepseek(split=True)
    assert torch.equal(Transformer.from_deepseek(weights, hf_config)(idx), model(idx))
    config = transformers.DeepseekV3Config(**hf_config)
    original = add_output_latent(transformers.DeepseekV3ForCausalLM(config).eval(), 12, norm=norm)
    missing, unexpected = original.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {'lm_head.weight'}
    with torch.no_grad():
        assert_close(original(idx).logits, model(idx))


LLAMA = dict(config_class='LlamaConfig', model_class='LlamaForCausalLM', num_key_value_heads=2, attention_bias=True)
MOE = dict(first_k_dense_replace=1, n_routed_experts=8, n_group=2, topk_group=1, num_experts_per_tok=2, moe_intermediate_size=32)


@pytest.mark.parametrize('make', [lambda: ours(), lambda: make_model('transformer', vocab_size=61, n_layer=1, n_embd=32).eval(),
                                  lambda: make_model('encoder_decoder', vocab_size=61, n_layer=1, n_embd=32, n_head=4).eval(),
                                  lambda: theirs(), lambda: theirs(**MOE), lambda: theirs(**LLAMA)],
                         ids=['mla', 'mha', 'encoder_decoder', 'deepseek', 'moe', 'llama'])
def test_at_full_rank_nothing_changes(make):
    model, idx = make(), tokens(2, 20)
    logits = lambda model: getattr(out := model(idx), 'logits', out)
    with torch.no_grad():
        before = logits(model)
        o_proj = next(m for m in model.modules() if hasattr(m, 'o_proj')).o_proj
        full = min(o_proj.weight.shape)
        assert_close(logits(add_output_latent(model, full)), before)
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
    assert (new.o_b_proj.weight @ new.o_a_proj.weight - weight).norm().item() == pytest.approx(rest.item(), rel=1e-4)
    rebuilt = make_model('transformer', **OURS | dict(o_latent=model.config.o_latent, o_norm=model.config.o_norm)).eval()
    rebuilt.load_state_dict(model.state_dict())
    assert torch.equal(rebuilt(tokens(1, 9)), model(tokens(1, 9)))


def test_dense_first_layers_stay():
    model = add_output_latent(ours(n_dense=1), 10)
    assert [isinstance(block.attn.o_proj, OutputLatent) for block in model.blocks] == [False, True]


@pytest.mark.parametrize('options, message', [
    (dict(first_k_dense_replace=1), 'layers from 1 on are mixtures of experts.*transformers, where add_output_latent'),
    (dict(rope_scaling=dict(type='yarn', factor=40)), "rotary scaling 'yarn'"),
    (dict(rope_parameters=dict(rope_type='yarn', factor=40)), "rotary scaling 'yarn'"),
    (dict(quantization_config=dict(quant_method='fp8')), 'convert the checkpoint to bfloat16'),
    (dict(attention_bias=True), 'attention_bias=True: only False'),
    (dict(rms_norm_eps=1e-5), 'rms_norm_eps=1e-05: only 1e-06'),
    (dict(kv_lora_rank=8), r'model.layers.0.self_attn.kv_a_layernorm.weight: has the shape \(16,\), hf_config asks for \(8,\)'),
])
def test_from_deepseek_refuses(options, message):
    original = theirs()
    with pytest.raises(ConfigError, match=message):
        Transformer.from_deepseek(original.state_dict(), original.config.to_dict() | options)


def test_from_deepseek_names_what_is_missing():
    original = theirs()
    state, hf_config = original.state_dict(), original.config.to_dict()
    with pytest.raises(ConfigError, match='hf_config has no kv_lora_rank'):
        Transformer.from_deepseek(state, {k: v for k, v in hf_config.items() if k != 'kv_lora_rank'})
    del state['model.layers.1.mlp.up_proj.weight']
    with pytest.raises(ConfigError, match='model.layers.1.mlp.up_proj.weight: missing'):
        Transformer.from_deepseek(state, hf_config)


@pytest.mark.parametrize('options, message', [
    (dict(o_latent=12, o_norm='sum'), "o_norm='sum' stands between the two matrices.*split=True"),
    (dict(mlp='gelu'), 'mlp=gelu: DeepSeek-V3 has swiglu'),
    (dict(rope_key='per_head'), 'rope_key=per_head: DeepSeek-V3 has shared'),
    (dict(n_dense=1), 'n_dense=1: DeepSeek-V3 has 0'),
])
def test_to_deepseek_refuses(options, message):
    with pytest.raises(ConfigError, match=message):
        ours(**options).to_deepseek()


@pytest.mark.parametrize('arguments, message', [
    (dict(rank=65), 'an output latent of 65: blocks.0.attn.o_proj takes 1 to 64'),
    (dict(rank=0), 'an output latent of 0'),
    (dict(rank=8, init='random'), "init='random'"),
])
def test_add_output_latent_refuses_before_it_changes_anything(arguments, message):
    model = ours()
    with pytest.raises(ConfigError, match=message):
        add_output_latent(model, **arguments)
    assert not any(isinstance(module, OutputLatent) for module in model.modules())
    with pytest.raises(ConfigError, match='no attention of this model has a linear o_proj'):
        add_output_latent(torch.nn.Linear(3, 3), 2)
