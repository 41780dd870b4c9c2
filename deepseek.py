"""Checkpoints of other people: the format of DeepSeek-V3 and V2, in and out, and output latents for
models that were trained without one.

    weights, hf_config = to_deepseek(model)             # a Transformer with MLA in their format
    model = from_deepseek(weights, hf_config)           # and back, with the same logits
    write_checkpoint(folder, weights, hf_config)        # a folder that transformers loads
    add_output_latent(model, rank=64)                   # one of ours, or one of transformers
    attention, gain = read_attention(Checkpoint(folder), 'model.layers.30.self_attn')

RENAMED has the names of their tensors, row_orders the order of their rows, and FAMILIES the models
that can be loaded. Both directions use them, and so does read_attention, with which svd.py reads a
checkpoint of any size layer by layer (all of FAMILIES, Llama, Qwen3).
"""

import contextlib
import json
import math
import re
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open

from config import UserError, read_json
from model import (BlockConfig, ConfigError, LanguageModel, OutputLatent, TransformerConfig,
                   make_attention, make_model)

FP8_BLOCK = 128  # DeepSeek-V3's fp8 weights have one scale per block of 128 x 128
GAIN_FROM_1 = 'gemma', 'gemma2', 'gemma3', 'gemma3_text', 'nemotron'  # a gain of w means 1 + w
SHARD_BYTES = 5 * 10 ** 9  # largest file of weights, as in transformers


# --------------------------------------------------------------------------------------------------
# tensors

# {a part of our names: the same part of theirs}; parts that are not here are the same
RENAMED = {
    'tok_emb': 'model.embed_tokens', 'norm': 'model.norm', 'blocks': 'model.layers',
    'attn_norm': 'input_layernorm', 'mlp_norm': 'post_attention_layernorm', 'attn': 'self_attn',
    'q_a_norm': 'q_a_layernorm', 'kv_a_norm': 'kv_a_layernorm',
    'kv_a_proj': 'kv_a_proj_with_mqa', 'k_rope_proj': 'kv_a_proj_with_mqa',  # one tensor there
    'k_b_proj': 'kv_b_proj', 'v_b_proj': 'kv_b_proj',
    'in_proj': 'gate_proj', 'out_proj': 'down_proj',
    'router': 'gate', 'router_bias': 'gate.e_score_correction_bias', 'shared': 'shared_experts'}


def layout_of(module, orders, o_parts={}):
    """{their name: ([our tensors], order)} for a module with the tensor names of a Transformer.
    Their tensor is torch.cat(ours)[order], or torch.cat(ours) if order is None. Our tensors share
    memory with the module. orders: what row_orders returns, or {}. o_parts: names of the parts of
    an output latent, see sequential_latent."""
    layout, renamed = {}, RENAMED | o_parts
    for name, weight in module.state_dict().items():
        theirs = '.'.join(renamed.get(part, part) for part in name.split('.'))
        if weight.dim() == 3:  # all experts, each of which is a tensor there
            layout |= {theirs.replace('.mlp.', f'.mlp.experts.{i}.') + '.weight': ([expert], None)
                       for i, expert in enumerate(weight)}
        else:
            order = orders.get(theirs.split('self_attn.')[-1])
            layout.setdefault(theirs, ([], order))[0].append(weight)
    return layout


def row_orders(block, interleaved=True):
    """{their name in an attention: order} for the tensors of an MLA with another order of rows.

    Query heads are [plain | rotated] there and [rotated | plain] here. The two dimensions of a
    rotated pair are neighbours there if interleaved; here they are rope_dims / 2 apart. kv_b_proj
    has the keys and values of one head after the other.
    """
    H, d, r, L = block.n_head, block.head_dim, block.rope_dims, block.kv_latent
    rotated = torch.arange(r).view(2, -1).t().flatten() if interleaved else torch.arange(r)
    head = torch.cat((torch.arange(r, d), rotated))
    heads = (torch.arange(H)[:, None] * d + head).flatten()
    k_b = torch.arange(H * (d - r)).view(H, d - r)
    v_b = H * (d - r) + torch.arange(H * (block.v_head_dim or d)).view(H, -1)
    return {'q_proj.weight': heads, 'q_b_proj.weight': heads,
            'kv_a_proj_with_mqa.weight': torch.cat((torch.arange(L), L + rotated)),
            'kv_b_proj.weight': torch.cat((k_b, v_b), dim=1).flatten()}


def sequential_latent(tensors):
    """(our options, {our part: theirs}) of output latents that are an nn.Sequential there, as in
    deepseek-tiny-mla-o: a matrix, a norm if there are three parts, and a matrix. ({}, {}) if the
    tensors have none."""
    first = next((name for name in tensors if name.endswith('.self_attn.o_proj.0.weight')), None)
    if first is None:
        return {}, {}
    has_norm = first.replace('.0.weight', '.2.weight') in tensors
    return (dict(o_latent=len(tensors[first]), o_norm='sum' if has_norm else 'none'),
            dict(o_a_proj='0', o_norm='1', o_b_proj='2' if has_norm else '1'))


def load_tensors(layout, tensors):
    """Copies {their name: tensor} into the tensors of a layout, one of theirs at a time. Raises
    ConfigError if one is missing or has another shape."""
    for name, (ours, order) in layout.items():
        if name not in tensors:
            packed = [other for other in tensors if other.startswith(name.removesuffix('weight'))]
            raise ConfigError(f'{packed[0]} instead of {name}: quantised weights must be converted '
                              'to bfloat16 first' if packed else f'{name}: missing from the '
                              'checkpoint')
        theirs, n_rows = tensors[name], [len(part) for part in ours]
        shape = sum(n_rows), *ours[0].shape[1:]
        if theirs.shape != shape:
            raise ConfigError(f'{name}: has the shape {tuple(theirs.shape)}, but config.json asks '
                              f'for {shape}')
        rows = theirs if order is None else theirs[order.argsort()]
        for part, part_of_theirs in zip(ours, rows.split(n_rows)):
            part.copy_(part_of_theirs)


# --------------------------------------------------------------------------------------------------
# config.json

# {their name: our option} for widths and numbers of things
MODEL_SIZES = dict(vocab_size='vocab_size', max_position_embeddings='block_size',
                   num_hidden_layers='n_layer', intermediate_size='mlp_hidden')
MLA_SIZES = dict(hidden_size='n_embd', num_attention_heads='n_head', qk_nope_head_dim='head_dim',
                 qk_rope_head_dim='rope_dims', v_head_dim='v_head_dim', q_lora_rank='q_latent',
                 kv_lora_rank='kv_latent')
MOE_SIZES = dict(n_routed_experts='n_routed_experts', num_experts_per_tok='n_experts_per_tok',
                 n_shared_experts='n_shared_experts', moe_intermediate_size='expert_hidden',
                 n_group='n_group', topk_group='topk_group')
OPTIONAL = {'q_lora_rank', 'o_latent', 'n_shared_experts', 'n_group', 'topk_group',
            'num_key_value_heads', 'head_dim'}  # null or missing means the default of our option

# options of ours that no value there stands for: only these can be exported
OURS = dict(causal=True, attention='mla', rope_key='shared', norm='rms', final_norm=True,
            bias=False, learned_positions=False, mlp_bias=False, mlp_rank=None, vocab_rank=None,
            n_dense=0, kv_groups=1, kv_branches=1, gate=False, sink=False, o_groups=1, window=None)


class Family(NamedTuple):
    """What transformers makes of a config.json with one model_type."""

    defaults: dict  # what it takes for values that are left out
    fixed: dict  # values that no option of ours stands for: only these can be loaded
    ignored: dict = {}  # what it computes whatever config.json says


FIXED = dict(attention_bias=False, hidden_act='silu')
ROUTER = dict(scoring_func='sigmoid', topk_method='noaux_tc', moe_layer_freq=1)
V3 = Family(dict(rms_norm_eps=1e-6, rope_interleave=True, tie_word_embeddings=False, n_group=8,
                 topk_group=4, first_k_dense_replace=3, routed_scaling_factor=2.5),
            FIXED | dict(norm_topk_prob=True), ROUTER)
V2 = Family(V3.defaults | dict(n_group=1, topk_group=1, first_k_dense_replace=0,
                               routed_scaling_factor=1.0, topk_method='greedy'),
            FIXED | dict(norm_topk_prob=False, scoring_func='softmax', moe_layer_freq=1,
                         rope_interleave=True))
FAMILIES = dict(  # by model_type
    deepseek_v3=V3,  # Moonlight and deepseek-tiny too
    deepseek_v2=V2,
    kimi_k2=Family(V3.defaults, V3.fixed | ROUTER),  # not in transformers; its own code reads these
    glm4_moe_lite=Family(V3.defaults | dict(rms_norm_eps=1e-5, n_group=1, topk_group=1,
                                            routed_scaling_factor=1.8),
                         V3.fixed, ROUTER | dict(first_k_dense_replace=1)),  # see mlp_layer_types
    youtu=Family(V3.defaults | dict(tie_word_embeddings=True), V3.fixed,
                 ROUTER | dict(n_routed_experts=None)))


def sizes_in(hf_config, names):
    """The sizes in a config.json as our options. names: {their name: our option}. Raises
    ConfigError if one is not an integer, or too small."""
    sizes = {}
    for theirs, ours in names.items():
        value = hf_config.get(theirs)
        if value is None and theirs in OPTIONAL:
            continue
        least = 0 if theirs == 'qk_nope_head_dim' else 1  # all dimensions may be rotated
        if type(value) is not int or value < least:
            raise ConfigError(f'{theirs}={value!r}: must be an integer >= {least}')
        sizes[ours] = value
    return sizes


def mla_options(hf_config, tensors):
    """The attention of a DeepSeek-V3 as options of a BlockConfig. Raises ConfigError."""
    options = sizes_in(hf_config, MLA_SIZES | dict(o_latent='o_latent'))
    options['head_dim'] += options['rope_dims']
    options |= dict(attention='mla', rope_key='shared', o_norm=hf_config.get('o_norm', 'none'))
    return options | sequential_latent(tensors)[0]


def llama_options(hf_config, qk_norm):
    """The attention of a Llama as options of a BlockConfig. Raises ConfigError."""
    options = sizes_in(hf_config, dict(hidden_size='n_embd', num_attention_heads='n_head',
                                       num_key_value_heads='n_kv_head', head_dim='head_dim'))
    head_dim = options.get('head_dim') or options['n_embd'] // options['n_head']
    c = hf_config | (hf_config.get('rope_parameters') or {})
    return dict(rope_dims=int(head_dim * c.get('partial_rotary_factor', 1)), attention='mha',
                qk_norm=qk_norm) | options


def rope_options(c):
    """The rotary angles of a config.json as our options. Raises ConfigError."""
    rope = (c.get('rope_parameters') or {}) | (c.get('rope_scaling') or {})  # new name, old name
    options = dict(rope_theta=float(rope.get('rope_theta', c.get('rope_theta', 10000.0))))
    kind, factor = rope.get('type') or rope.get('rope_type') or 'default', rope.get('factor')
    if kind == 'default':
        return options
    if kind not in ('linear', 'yarn') or not factor:
        raise ConfigError(f'rotary scaling {kind!r} with the factor {factor}: only linear and yarn '
                          'with a factor can be loaded')
    all_dims = rope.get('mscale_all_dim') or 0.0
    options |= dict(rope_factor=float(factor),
                    softmax_factor=(0.1 * all_dims * math.log(factor) + 1.0) ** 2)
    if kind == 'linear':
        return options
    angles = rope.get('attention_factor')
    if (angles != 1.0 and (angles or not all_dims or rope.get('mscale') != all_dims)
            or not rope.get('truncate', True)):
        raise ConfigError('YaRN that scales rotated dimensions alone (attention_factor, or an '
                          'mscale other than mscale_all_dim), or has truncate=False, cannot be '
                          'loaded')
    options |= sizes_in(rope, dict(original_max_position_embeddings='rope_trained_length'))
    return options | dict(rope_beta_fast=rope.get('beta_fast') or 32,
                          rope_beta_slow=rope.get('beta_slow') or 1)


def in_full(hf_config):
    """A config.json with what it leaves out, and what transformers takes instead of what it says.
    Raises ConfigError if no options of a Transformer compute the same."""
    kind = str(hf_config.get('model_type'))
    if kind not in FAMILIES:
        raise ConfigError(f'model_type={kind!r:.40}: only {", ".join(FAMILIES)} can be loaded, '
                          'other models compute something else')
    family = FAMILIES[kind]
    c = family.fixed | family.defaults | hf_config | family.ignored
    for name, wanted in family.fixed.items():
        if c[name] != wanted:
            raise ConfigError(f'{name}={c[name]}: only {wanted} can be loaded')
    wanted = dict(quant_method='fp8', weight_block_size=[FP8_BLOCK, FP8_BLOCK])
    if (found := c.get('quantization_config')) and found != found | wanted:
        raise ConfigError(f'quantised weights other than fp8 in blocks of {FP8_BLOCK} x {FP8_BLOCK}'
                          ': convert the checkpoint to bfloat16 first')
    if c['topk_method'] == 'greedy':
        c |= dict(n_group=1, topk_group=1)
    if kind == 'glm4_moe_lite' and (kinds := c.get('mlp_layer_types')):
        c['first_k_dense_replace'] = n = kinds.count('dense')
        if 'dense' in kinds[n:]:
            raise ConfigError('mlp_layer_types: only dense layers first can be loaded')
    return c


def options_of_deepseek(hf_config, tensors):
    """The options of a Transformer that computes what a config.json describes, with the tensors of
    from_deepseek. Raises ConfigError if no options do."""
    c = in_full(hf_config)
    if unread := {name: hf_config[name] for name, value in FAMILIES[c['model_type']].ignored.items()
                  if hf_config.get(name, value) != value}:
        print(f'config.json: {unread} has no effect: transformers ignores it', file=sys.stderr)
    options = OURS | sizes_in(c, MODEL_SIZES) | mla_options(c, tensors) | rope_options(c) | dict(
        mlp='swiglu', tie_embeddings=c['tie_word_embeddings'], norm_eps=c['rms_norm_eps'])
    first_k_dense = c['first_k_dense_replace']
    if c.get('n_routed_experts') and first_k_dense < options['n_layer']:
        options |= sizes_in(c, MOE_SIZES) | dict(
            mlp='moe', router=c['scoring_func'], first_k_dense=first_k_dense,
            routed_scaling=c['routed_scaling_factor'])
    return options


def config_for_deepseek(config, split=False):
    """The dict of a config.json that options_of_deepseek reads as this config of a Transformer,
    without its output latent. Raises ConfigError if there is none. split: see to_deepseek."""
    if type(config) is not TransformerConfig:
        kind = type(config).__name__.removesuffix('Config')
        raise ConfigError(f'{kind}: only a Transformer can become a DeepSeek-V3')
    options = config.options()
    if wrong := [name for name, wanted in OURS.items() if options[name] != wanted]:
        raise ConfigError(f'{wrong[0]}={options[wrong[0]]}: DeepSeek-V3 has {OURS[wrong[0]]}')
    has_experts = options['mlp'] == 'moe'
    if not has_experts and options['mlp'] != 'swiglu' or not options['n_shared_experts']:
        raise ConfigError('mlp={mlp}, n_shared_experts={n_shared_experts}: DeepSeek-V3 has swiglu '
                          'or moe, with a shared expert'.format(**options))
    factor, softmax_factor = options['rope_factor'], options['softmax_factor']
    if factor == 1 and softmax_factor != 1:
        raise ConfigError(f'softmax_factor={softmax_factor}: DeepSeek-V3 needs a rope_factor too')
    if options['o_norm'] != 'none' and not split:
        raise ConfigError('o_norm={o_norm!r} stands between the two matrices: use split=True, and '
                          'add_output_latent with the same norm to load it'.format(**options))
    sizes = MODEL_SIZES | MLA_SIZES | (MOE_SIZES if has_experts else {})
    kind = 'deepseek_v2' if options['router'] == 'softmax' else 'deepseek_v3'
    defaults, fixed, ignored = FAMILIES[kind]
    sizes = {theirs: options[ours] for theirs, ours in sizes.items()}
    hf_config = defaults | fixed | ignored | sizes | dict(
        architectures=[f'DeepseekV{kind[-1]}ForCausalLM'], model_type=kind,
        num_key_value_heads=options['n_head'], rope_theta=options['rope_theta'],
        qk_nope_head_dim=options['head_dim'] - options['rope_dims'],
        v_head_dim=options['v_head_dim'] or options['head_dim'],
        first_k_dense_replace=options['first_k_dense' if has_experts else 'n_layer'],
        routed_scaling_factor=options['routed_scaling'],
        tie_word_embeddings=options['tie_embeddings'], rms_norm_eps=options['norm_eps'],
        bos_token_id=None, eos_token_id=None, pad_token_id=None)  # the tokenizer's own
    if kind == 'deepseek_v2':
        hf_config['topk_method'] = 'group_limited_greedy' if options['n_group'] > 1 else 'greedy'
        if options['n_embd'] % options['n_head']:
            raise ConfigError('n_embd={n_embd}: DeepSeek-V2, the family with a softmax router, '
                              'needs a multiple of n_head={n_head}'.format(**options))
    if factor != 1:
        hf_config['rope_scaling'] = scaling = dict(
            rope_type='linear', factor=factor,
            mscale_all_dim=(softmax_factor ** 0.5 - 1) / (0.1 * math.log(factor)))
        if options['rope_trained_length']:
            scaling |= dict(rope_type='yarn', attention_factor=1.0,
                            beta_fast=options['rope_beta_fast'],
                            beta_slow=options['rope_beta_slow'],
                            original_max_position_embeddings=options['rope_trained_length'])
    return hf_config


# --------------------------------------------------------------------------------------------------
# a whole model


def from_deepseek(state_dict, hf_config):
    """A Transformer with the logits of one of FAMILIES, in float32 and in eval mode.

    state_dict: its tensors in any precision, with experts apart, as in files, or stacked, as in a
    model of transformers; or a Checkpoint, which is read one tensor at a time. hf_config: its
    config, or the dict of its config.json. Raises ConfigError on what a Transformer cannot compute,
    and on tensors that are missing, unknown or of another shape.
    """
    hf_config = hf_config if isinstance(hf_config, dict) else hf_config.to_dict()
    if not isinstance(state_dict, Checkpoint):
        state_dict = unstacked(state_dict)
    model = make_model('transformer', **options_of_deepseek(hf_config, state_dict))
    load_deepseek(model, state_dict, hf_config)
    return model.eval()


def load_deepseek(model, tensors, hf_config):
    """Copies the weights of one of FAMILIES into a Transformer of its sizes, one tensor at a time.
    tensors: {their name: tensor}, or a Checkpoint. Raises ConfigError as from_deepseek does."""
    orders = row_orders(model.config, in_full(hf_config)['rope_interleave'])
    layout = layout_of(model, orders, sequential_latent(tensors)[1])
    for name in tensors:
        layer = re.match(r'model\.layers\.\d+\.', name)
        ignored = (name.endswith('rotary_emb.inv_freq')
                   or name == 'lm_head.weight' and model.config.tie_embeddings
                   or layer and f'{layer[0]}eh_proj.weight' in tensors)  # predicts a second token
        if name not in layout and not ignored:
            raise ConfigError(f'{name}: a tensor that no model with this config.json has')
    load_tensors(layout, tensors)


def unstacked(state_dict):
    """The tensors of a model of transformers, with experts apart, as in files."""
    tensors = dict(state_dict)
    for name in [name for name in tensors if name.endswith('.experts.gate_up_proj')]:
        prefix = name.removesuffix('gate_up_proj')
        gates_and_ups, downs = tensors.pop(name), tensors.pop(f'{prefix}down_proj')
        for i, (gate_up, down) in enumerate(zip(gates_and_ups, downs)):
            gate, up = gate_up.chunk(2)
            tensors |= {f'{prefix}{i}.gate_proj.weight': gate, f'{prefix}{i}.up_proj.weight': up,
                        f'{prefix}{i}.down_proj.weight': down}
    return tensors


def to_deepseek(model, split=False):
    """(state_dict, dict of the config.json) of a DeepSeek-V3, or V2, with a Transformer's logits.

    The two matrices of an output latent are merged. With split=True they stay apart, for a model
    that add_output_latent has changed. Raises ConfigError on what DeepSeek-V3 cannot compute.
    """
    block, hf_config = model.config, config_for_deepseek(model.config, split)
    theirs = {}
    for name, (ours, order) in layout_of(model, row_orders(block)).items():
        rows = torch.cat(ours)
        theirs[name] = rows if order is None else rows[order]
    if block.o_latent and split:
        hf_config |= dict(o_latent=block.o_latent, o_norm=block.o_norm)
    elif block.o_latent:
        for i in range(model.config.n_layer):
            o_proj = f'model.layers.{i}.self_attn.o_proj'
            a, b = (theirs.pop(f'{o_proj}.{part}.weight') for part in ('o_a_proj', 'o_b_proj'))
            theirs[f'{o_proj}.weight'] = b @ a
    return theirs, hf_config


def write_checkpoint(folder, weights, hf_config):
    """Writes what to_deepseek returns into a folder, as Checkpoint and transformers read it."""
    save_torch_state_dict(weights, folder, max_shard_size=SHARD_BYTES)
    (folder / 'config.json').write_text(json.dumps(hf_config, indent=2) + '\n')


# --------------------------------------------------------------------------------------------------
# output latents


def add_output_latent(model, rank, init='svd', norm='none', n_groups=1, batches=()):
    """Replaces each linear o_proj of a model's attentions by an OutputLatent of this rank, in
    place; returns the model.

    model: one of ours, or one of transformers whose attentions have an o_proj, for example
    DeepseekV3ForCausalLM or LlamaForCausalLM. init: 'svd', the product of this rank with the
    closest weights; 'data', with the closest outputs on `batches`, tuples of arguments of the model
    (at full rank neither changes anything); or 'xavier', new weights. norm, n_groups: see
    OutputLatent; a norm other than 'none' changes the outputs at any rank. To reload what was
    saved, do the same to a new model, with any init, and load the weights. Raises ConfigError
    before anything is changed.
    """
    if init not in ('svd', 'data', 'xavier') or norm not in ('none', 'sum', 'head'):
        raise ConfigError(f"init={init!r}, norm={norm!r}: must be 'svd', 'data' or 'xavier', and "
                          "'none', 'sum' or 'head'")
    found = {name: module for name, module in model.named_modules()
             if isinstance(getattr(module, 'o_proj', None), nn.Linear)}
    if not found:
        raise ConfigError('no attention of this model has a linear o_proj')
    heads = {name: n_heads_of(name, module, rank, n_groups) for name, module in found.items()}
    moments = second_moments(model, found, batches) if init == 'data' else {}
    if isinstance(model, LanguageModel):  # its first n_dense layers stay as they are
        options = model.config.options() | dict(o_latent=rank, o_norm=norm, o_groups=n_groups)
        with torch.device('meta'):
            wanted = type(model)(type(model.config)(**options))
        found = {name: module for name, module in found.items()
                 if isinstance(wanted.get_submodule(name).o_proj, OutputLatent)}
        model.config = wanted.config
    for name, module in found.items():
        old = module.o_proj
        new = OutputLatent(heads[name], old.in_features, rank, old.out_features, norm,
                           old.bias is not None, n_groups).to(old.weight)
        if init == 'xavier':
            nn.init.xavier_uniform_(new.o_a_proj.weight)
            nn.init.xavier_uniform_(new.o_b_proj.weight)
        else:
            a, b = best_product(old.weight.detach(), rank, n_groups, moments.get(name))
            new.load_state_dict({'o_a_proj.weight': a, 'o_b_proj.weight': b}, strict=False)
        if old.bias is not None:
            new.o_b_proj.bias = old.bias
        module.o_proj = new
    return model


def n_heads_of(name, attention, rank, n_groups):
    """The number of heads of an attention, ours or of transformers. Raises ConfigError if no
    OutputLatent of this rank can take the place of its o_proj."""
    o_proj, config = attention.o_proj, getattr(attention, 'config', None)
    weight, n_out, n_in = o_proj.weight, o_proj.out_features, o_proj.in_features
    if weight.shape != (n_out, n_in) or not weight.is_floating_point() or weight.itemsize < 2:
        raise ConfigError(f'{name}.o_proj: is quantised ({weight.dtype}): load the model in '
                          'bfloat16 or float32')
    n_head = getattr(attention, 'n_head', None) or getattr(config, 'num_attention_heads', None)
    if not n_head or n_in % n_head:
        raise ConfigError(f'{name}: has no config whose num_attention_heads divides the {n_in} '
                          'inputs of its o_proj: models with such layers cannot be cut')
    if n_head % n_groups:
        raise ConfigError(f'{name} has {n_head} heads, not divisible by o_groups={n_groups}')
    full = min(n_out, n_in // n_groups)
    if not 0 < rank <= full:
        raise ConfigError(f'an output latent of {rank}: {name}.o_proj takes 1 to {full}')
    return n_head


@torch.no_grad()
def second_moments(model, attentions, batches):
    """{name: sum of y y^T} over the inputs y of the o_proj of each attention, in evaluation mode.
    In float64 on the CPU: a GPU may multiply float32 in TF32, and some devices have no float64.
    Raises ConfigError."""
    sums = {}

    def add(name, o_proj, inputs):
        y = inputs[0].flatten(0, -2).cpu().double()
        sums[name] = sums.get(name, 0.0) + y.t() @ y

    with contextlib.ExitStack() as stack:
        stack.callback(model.train, model.training)
        for name, attention in attentions.items():
            stack.enter_context(attention.o_proj.register_forward_pre_hook(partial(add, name)))
        for batch in batches:
            model.eval()(*batch)
    if not sums:
        raise ConfigError("init='data' needs batches, tuples of arguments of the model")
    for name, total in sums.items():
        if not is_finite(total):
            raise ConfigError(f'on these data the inputs of {name}.o_proj are not finite')
    return sums


def best_product(weight, rank, n_groups, moments=None):
    """(a, b) with the smallest |b a - weight|: weight (D, H*dv), a (G*R, H*dv/G), b (D, G*R). Each
    of the G groups of heads has an a and a b of its own.

    With moments, the sum of y y^T over vectors y, it is the smallest sum of |b a y - weight y|^2.
    For G > 1 only nearly: each a is the best for its group alone, b the best with these."""
    weight = (weight.to(torch.promote_types(weight.dtype, torch.float32)) if moments is None
              else weight.to(moments.device, moments.dtype))
    groups = weight.unflatten(1, (n_groups, -1)).transpose(0, 1)  # (G, D, H*dv/G)
    if moments is None:
        u, s, v = torch.linalg.svd(groups, full_matrices=False)
        a = s[:, :, None] * v
    else:
        values, vectors = torch.linalg.eigh(moments)
        # never 0, not even where no y is, so that at full rank b a is the weight
        root = vectors * values.clamp(min=1e-6 * values.mean()).sqrt()  # root root^T = moments
        u = torch.linalg.svd(groups @ root.unflatten(0, (n_groups, -1)), full_matrices=False)[0]
        a = u.mT @ groups
    a, u = a[:, :rank], u[:, :, :rank]  # (G, R, H*dv/G), (G, D, R)
    size = a.norm(dim=2, keepdim=True).clamp(min=1e-30).sqrt()  # goes to a and b alike
    a, b = a / size, (u * size.mT).transpose(0, 1).flatten(1)
    if moments is not None and n_groups > 1:
        b = weight @ root @ torch.linalg.pinv(torch.block_diag(*a) @ root)
    return a.flatten(0, 1), b


# --------------------------------------------------------------------------------------------------
# one attention of a checkpoint


class Checkpoint:
    """A folder of config.json and safetensors, sharded or not. checkpoint[name] is a tensor in
    float32, read when it is asked for. Raises UserError on what is missing or damaged.

    config: the dict of config.json; language: its part for the language model. files: {name of a
    tensor: path of the file with it}.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.config = read_json(self.folder / 'config.json', 'download it again')
        self.language = self.config.get('text_config', self.config)
        self.files = {}
        if (index := self.folder / 'model.safetensors.index.json').exists():
            weight_map = read_json(index, 'download it again').get('weight_map')
            if not isinstance(weight_map, dict) or {*map(type, weight_map.values())} - {str}:
                raise UserError(f'{index}: has no weight_map, which names the file of each tensor: '
                                'download it again')
            self.files = {name: self.folder / file for name, file in weight_map.items()}
        else:
            for path in sorted(self.folder.glob('*.safetensors')):
                with open_shard(path) as shard:
                    self.files |= dict.fromkeys(shard.keys(), path)
        if not self.files:
            raise UserError(f'{folder}: holds no safetensors and no model.safetensors.index.json: '
                            'a checkpoint has either')

    def __iter__(self):
        return (name for name in self.files if not name.endswith('_scale_inv'))

    def __contains__(self, name):
        return name in self.files

    def __getitem__(self, name):
        with open_shard(self.files[name]) as shard:
            weight = shard.get_tensor(name)
        if f'{name}_scale_inv' in self:
            with open_shard(self.files[f'{name}_scale_inv']) as shard:
                scale = shard.get_tensor(f'{name}_scale_inv').float()
            if weight.dim() != 2 or list(scale.shape) != [-(-n // FP8_BLOCK) for n in weight.shape]:
                raise UserError(f'{self.folder}: {name}_scale_inv has the shape '
                                f'{tuple(scale.shape)}, which is not a scale for each block of '
                                f'{FP8_BLOCK} x {FP8_BLOCK}: dequantise it first')
            scale = scale.repeat_interleave(FP8_BLOCK, 0).repeat_interleave(FP8_BLOCK, 1)
            weight = weight.float() * scale[:weight.size(0), :weight.size(1)]
        if not weight.is_floating_point() or weight.itemsize < 2:
            raise UserError(f'{self.folder}: {name} is {weight.dtype} without {name}_scale_inv: '
                            'dequantise it first')
        if not is_finite(weight):
            raise UserError(f'{self.folder}: {name} holds numbers that are not finite')
        return weight.float()


def is_finite(x):
    """Whether all numbers of a tensor are finite, in a ninth of the time of x.isfinite().all()."""
    return not x.numel() or all(bound.isfinite() for bound in x.aminmax())


@contextlib.contextmanager
def open_shard(path):
    try:
        with safe_open(path, framework='pt') as shard:
            yield shard
    except (SafetensorError, OSError) as error:
        raise UserError(f'{path}: missing or damaged ({error}): download it again') from None


def read_attention(checkpoint, name):
    """(attention, gain): the attention of this name in a Checkpoint, an MLA if its config.json
    looks like DeepSeek's and an MHA if it looks like Llama's, and the gain (D,) of the norm before
    it. Raises UserError.

    Llama's includes grouped queries, and Qwen3's norms of queries and keys. Unlike from_deepseek
    this reads any model with such attentions, in fp8 too: rotary scaling, experts and whatever else
    the model has do not matter. Biases of the projections are left out.
    """
    c, norm = checkpoint.language, name.replace('self_attn', 'input_layernorm')
    is_mla, qk_norm = 'kv_lora_rank' in c, f'{name}.q_norm.weight' in checkpoint
    try:
        config = BlockConfig(**(mla_options(c, checkpoint) if is_mla
                                else llama_options(c, qk_norm)))
        with torch.device('meta'):  # shapes only: no time is spent on initial weights
            block = nn.ModuleDict(dict(attn=make_attention(config),
                                       attn_norm=nn.RMSNorm(config.n_embd)))
        block = block.to_empty(device='cpu').requires_grad_(False)
        orders = row_orders(config, c.get('rope_interleave', True)) if is_mla else {}
        layout = layout_of(block, orders, sequential_latent(checkpoint)[1])
        load_tensors({theirs.replace('self_attn', name).replace('input_layernorm', norm): ours
                      for theirs, ours in layout.items()}, checkpoint)
    except (ConfigError, RuntimeError, TypeError) as error:  # torch's: sizes beyond its reach
        raise UserError(f'{checkpoint.folder}: {name} does not fit config.json, or is another '
                        f'attention than those of DeepSeek-V3 and Llama ({error})') from None
    if c.get('model_type') in GAIN_FROM_1:
        for gain in (weight for weight in block.parameters() if weight.dim() == 1):
            gain += 1
    return block['attn'], block['attn_norm'].weight
