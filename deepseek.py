"""Other people's checkpoints: DeepSeek-V3's layout, in and out, and output latents for models that
were trained without.

    weights, hf_config = to_deepseek(model)             # a Transformer with MLA -> their layout
    model = from_deepseek(weights, hf_config)           # and back; same logits
    write_checkpoint(folder, weights, hf_config)        # a folder that transformers loads
    add_output_latent(model, rank=64)                   # ours, or one of transformers
    attention, gain = read_attention(Checkpoint(folder), 30)

What their tensors are called, and which rows of ours they hold, is written down once, in mla_layout
and deepseek_layout: both directions read it, and so does read_attention, which svd.py asks for one
layer at a time of a checkpoint of any size (DeepSeek-V3, Kimi-K2, Llama, Qwen3).
"""

import contextlib
import json
import math
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from config import UserError
from model import (ARCHITECTURES, MLA, BlockConfig, ConfigError, LanguageModel, OutputLatent,
                   Transformer, flat_options, make_attention, make_model)

# options that a model has to have for its weights to fit DeepSeek-V3's layout
DEEPSEEK = dict(causal=True, attention='mla', rope_key='shared', norm='rms', final_norm=True,
                bias=False, learned_positions=False, mlp_bias=False, mlp_rank=None,
                vocab_rank=None, n_dense=0, kv_groups=1, kv_branches=1, gate=False, sink=False,
                o_groups=1)
FP8_BLOCK = 128  # DeepSeek-V3's fp8 weights have a scale for each 128 x 128 block
SHARD_BYTES = 5 * 10 ** 9  # of a file of weights, as transformers cuts them


# --------------------------------------------------------------------------------------------------
# layouts


def mla_layout(block, interleaved=True):
    """The tensors of DeepSeek-V3's attention: {their name: (our names, order)}. Theirs holds the
    rows of ours, stacked, in this order: theirs = torch.cat(ours)[order]; None keeps the order.

    A query head is [plain | rotated] there and [rotated | plain] here. The two dimensions of a
    rotated pair are neighbours there if interleaved, and here half of rope_dims apart. kv_b_proj
    holds key and value of one head after the other.
    """
    H, d, r, L = block.n_head, block.head_dim, block.rope_dims, block.kv_latent
    rotated = torch.arange(r).view(2, -1).t().flatten() if interleaved else torch.arange(r)
    head = torch.cat((torch.arange(r, d), rotated))
    heads = (torch.arange(H)[:, None] * d + head).flatten()
    k_b = torch.arange(H * (d - r)).view(H, -1)
    v_b = H * (d - r) + torch.arange(H * (block.v_head_dim or d)).view(H, -1)
    layout = {
        'kv_a_layernorm.weight': (['kv_a_norm.weight'], None),
        'kv_a_proj_with_mqa.weight': (['kv_a_proj.weight', 'k_rope_proj.weight'],
                                      torch.cat((torch.arange(L), L + rotated))),
        'kv_b_proj.weight': (['k_b_proj.weight', 'v_b_proj.weight'],
                             torch.cat((k_b, v_b), dim=1).flatten())}
    if block.q_latent:
        layout |= {'q_a_proj.weight': (['q_a_proj.weight'], None),
                   'q_a_layernorm.weight': (['q_a_norm.weight'], None),
                   'q_b_proj.weight': (['q_b_proj.weight'], heads)}
    else:
        layout['q_proj.weight'] = ['q_proj.weight'], heads
    output = ['o_proj.weight']
    if block.o_latent:  # not DeepSeek's: what add_output_latent makes of its o_proj
        output = ['o_proj.o_a_proj.weight', 'o_proj.o_b_proj.weight']
        output += {'none': [], 'sum': ['o_proj.o_norm.weight'],
                   'head': ['o_proj.gain']}[block.o_norm]
    return layout | {name: ([name], None) for name in output}


def with_prefix(layout, theirs, ours=''):
    """The same layout with `theirs` before each of their names, and `ours` before each of ours."""
    return {theirs + name: ([ours + part for part in names], order)
            for name, (names, order) in layout.items()}


SWIGLU = {'gate_proj.weight': (['in_proj.weight'], None),
          'up_proj.weight': (['gate_proj.weight'], None),
          'down_proj.weight': (['out_proj.weight'], None)}


def mlp_layout(block):
    """The tensors of a feed-forward. A * stands for the number of an expert: ours are one tensor,
    (E, n_out, n_in)."""
    if block.mlp != 'moe':
        return SWIGLU
    shared = with_prefix(SWIGLU, 'shared_experts.', 'shared.') if block.n_shared_experts else {}
    return {'gate.weight': (['router.weight'], None),
            'gate.e_score_correction_bias': (['router_bias'], None),
            **with_prefix(SWIGLU, 'experts.*.'), **shared}


def deepseek_layout(config, interleaved=True):
    """The tensors of a whole DeepSeek-V3, as mla_layout describes those of an attention. config: a
    TransformerConfig."""
    norms = {'input_layernorm.weight': (['attn_norm.weight'], None),
             'post_attention_layernorm.weight': (['mlp_norm.weight'], None)}
    attention = with_prefix(mla_layout(config.block, interleaved), 'self_attn.', 'attn.')
    layout = {'model.embed_tokens.weight': (['tok_emb.weight'], None),
              'model.norm.weight': (['norm.weight'], None)}
    if not config.tie_embeddings:
        layout['lm_head.weight'] = ['lm_head.weight'], None
    for i in range(config.n_layer):
        mlp = with_prefix(mlp_layout(config.block_of(i)), 'mlp.', 'mlp.')
        layout |= with_prefix(norms | attention | mlp, f'model.layers.{i}.', f'blocks.{i}.')
    return layout


def of_each_expert(name, n_experts):
    """The names that a name with a * stands for; of another, itself."""
    return [name.replace('*', str(i)) for i in range(n_experts)] if '*' in name else [name]


def our_weights(module, layout, tensors):
    """Yields (name, tensor) of `module`, of tensors {their name: tensor} in this layout, one of
    theirs after the other. Raises ConfigError if one is missing, or has another shape than the
    module asks for."""
    shapes = {name: weight.shape for name, weight in module.state_dict().items()}
    for theirs, (names, order) in layout.items():
        n_rows = [shapes[name][0] for name in names]
        parts = of_each_expert(theirs, n_rows[0])
        if missing := [part for part in parts if part not in tensors]:
            raise ConfigError(f'{missing[0]}: missing from the checkpoint')
        tensor = torch.stack([tensors[part] for part in parts]) if '*' in theirs else \
            tensors[theirs]
        shape = sum(n_rows), *shapes[names[0]][1:]
        if tensor.shape != shape:
            raise ConfigError(f'{theirs}: has the shape {tuple(tensor.shape)}, '
                              f'hf_config asks for {shape}')
        if order is not None:
            tensor = tensor[order.argsort()]
        yield from zip(names, tensor.split(n_rows))


def sizes_in(hf_config, names, optional=()):
    """The sizes of these names in a config.json: a list, with None for an optional one that is not
    there. Raises KeyError, or ConfigError if one is no positive int."""
    sizes = [hf_config.get(name) if name in optional else hf_config[name] for name in names]
    for name, value in zip(names, sizes):
        if not (type(value) is int and value > 0 or value is None and name in optional):
            raise ConfigError(f'{name}={value!r}: takes an int from 1')
    return sizes


def mla_options(hf_config):
    """What a config.json of DeepSeek-V3 says about its attention, as options of a BlockConfig.
    Raises KeyError and ConfigError."""
    n_head, n_kv_head, width, plain, rotated, v_head_dim, q_latent, kv_latent, o_latent = sizes_in(
        hf_config, ['num_attention_heads', 'num_key_value_heads', 'hidden_size', 'qk_nope_head_dim',
                    'qk_rope_head_dim', 'v_head_dim', 'q_lora_rank', 'kv_lora_rank', 'o_latent'],
        optional=['num_key_value_heads', 'q_lora_rank', 'o_latent'])
    if n_kv_head not in (None, n_head):
        raise ConfigError(f'num_key_value_heads={n_kv_head}: latent attention has as many as '
                          f'num_attention_heads={n_head}')
    return dict(attention='mla', rope_key='shared', n_head=n_head, n_embd=width,
                head_dim=plain + rotated, rope_dims=rotated, v_head_dim=v_head_dim,
                q_latent=q_latent, kv_latent=kv_latent, o_latent=o_latent,
                o_norm=hf_config.get('o_norm', 'none'))


def llama_options(hf_config, qk_norm):
    """What a config.json of Llama says about its attention, as options of a BlockConfig. Raises
    KeyError and ConfigError."""
    n_head, n_kv_head, width, head_dim = sizes_in(
        hf_config, ['num_attention_heads', 'num_key_value_heads', 'hidden_size', 'head_dim'],
        optional=['num_key_value_heads', 'head_dim'])
    if head_dim is None and width % n_head:
        raise ConfigError(f'hidden_size={width} is not divisible by num_attention_heads={n_head}')
    head_dim = head_dim or width // n_head
    return dict(attention='mha', n_head=n_head, n_embd=width, head_dim=head_dim,
                rope_dims=head_dim, n_kv_head=n_kv_head, qk_norm=qk_norm)


# --------------------------------------------------------------------------------------------------
# a whole model


def options_of_deepseek(hf_config):
    """The options of a Transformer that computes what a config.json of DeepSeek-V3 describes.
    Raises ConfigError on what no option can say."""
    c = dict(first_k_dense_replace=3, rms_norm_eps=1e-6, attention_bias=False, hidden_act='silu',
             tie_word_embeddings=False) | hf_config
    if c.get('quantization_config'):
        raise ConfigError('quantised weights: convert the checkpoint to bfloat16 first; svd.py '
                          'reads it as it is')
    for name, wanted in (('rms_norm_eps', 1e-6), ('attention_bias', False), ('hidden_act', 'silu')):
        if c[name] != wanted:
            raise ConfigError(f'{name}={c[name]}: only {wanted} can be loaded')
    try:
        return DEEPSEEK | mla_options(c) | rope_options(c) | expert_options(c) | dict(
            vocab_size=c['vocab_size'], block_size=c['max_position_embeddings'],
            n_layer=c['num_hidden_layers'], mlp_hidden=c['intermediate_size'],
            tie_embeddings=c['tie_word_embeddings'])
    except KeyError as error:
        raise ConfigError(f'hf_config has no {error.args[0]}: is it the config.json of a '
                          'DeepSeek-V3?') from None


def expert_options(c):
    """What a config.json of DeepSeek-V3 says about its feed-forwards. Raises KeyError and
    ConfigError."""
    first = c['first_k_dense_replace']
    if not c.get('n_routed_experts') or first >= c['num_hidden_layers']:
        return dict(mlp='swiglu')
    for name, wanted in (('norm_topk_prob', True), ('scoring_func', 'sigmoid'),
                         ('topk_method', 'noaux_tc'), ('moe_layer_freq', 1)):
        if c.get(name, wanted) != wanted:
            raise ConfigError(f'{name}={c[name]}: only {wanted} can be loaded')
    names = ('n_routed_experts', 'num_experts_per_tok', 'moe_intermediate_size', 'n_group',
             'topk_group')
    E, k, hidden, n_group, topk_group = sizes_in(c, names, optional=('n_group', 'topk_group'))
    return dict(mlp='moe', n_routed_experts=E, n_experts_per_tok=k, expert_hidden=hidden,
                n_shared_experts=c.get('n_shared_experts') or 0, n_group=n_group or 1,
                topk_group=topk_group or 1, first_k_dense=first,
                routed_scaling=float(c.get('routed_scaling_factor', 1.0)))


def rope_options(c):
    """What a config.json says about rotary angles. Raises KeyError and ConfigError."""
    rope = (c.get('rope_parameters') or {}) | (c.get('rope_scaling') or {})
    options = dict(rope_theta=float(rope.get('rope_theta', c.get('rope_theta', 10000.0))))
    kinds = {rope.get('rope_type'), rope.get('type')} - {None, 'default'}  # new name, and old one
    if not kinds:
        return options
    if (kind := kinds.pop()) not in ('linear', 'yarn'):
        raise ConfigError(f'rotary scaling {kind!r}: only linear and yarn can be loaded; '
                          'add_output_latent and svd.py work without')
    factor, all_dims = float(rope['factor']), rope.get('mscale_all_dim') or 0.0
    options |= dict(rope_factor=factor,
                    softmax_factor=(0.1 * all_dims * math.log(factor) + 1.0) ** 2)
    if kind == 'linear':
        return options
    angles = rope.get('attention_factor')
    if angles != 1.0 and (angles or not all_dims or rope.get('mscale') != all_dims):
        raise ConfigError('YaRN that scales rotated dimensions alone (attention_factor, or an '
                          'mscale that is not mscale_all_dim): cannot be loaded')
    for name, wanted in (('beta_fast', 32), ('beta_slow', 1), ('truncate', True)):
        if (rope.get(name) or wanted) != wanted:
            raise ConfigError(f'YaRN with {name}={rope[name]}: only {wanted} can be loaded')
    return options | dict(rope_trained_length=rope['original_max_position_embeddings'])


def rope_in_deepseek(c):
    """The same of a TransformerConfig, for a config.json."""
    rope, softmax = dict(rope_theta=c.rope_theta), c.block.softmax_factor
    if c.rope_factor == 1:
        if softmax != 1:
            raise ConfigError(f'softmax_factor={softmax}: DeepSeek-V3 has one only with a '
                              'rope_factor')
        return rope
    all_dims = (softmax ** 0.5 - 1) / (0.1 * math.log(c.rope_factor))
    scaling = dict(rope_type='linear', factor=c.rope_factor, mscale_all_dim=all_dims)
    if c.rope_trained_length:
        scaling |= dict(rope_type='yarn', beta_fast=32, beta_slow=1, attention_factor=1.0,
                        original_max_position_embeddings=c.rope_trained_length)
    return rope | dict(rope_scaling=scaling)


def from_deepseek(state_dict, hf_config):
    """A DeepSeek-V3 in the layout of transformers as a Transformer with the same logits, in float32
    and in eval mode.

    state_dict: its tensors, in any precision, or a Checkpoint, of which one tensor at a time is in
    memory beside the model. Experts are one tensor each, as in files, or stacked, as in a model of
    transformers. hf_config: the dict of its config.json, or the config itself. Raises ConfigError
    on what a Transformer cannot be, and on tensors that are missing or of another shape.
    """
    hf_config = hf_config if isinstance(hf_config, dict) else hf_config.to_dict()
    model = make_model('transformer', **options_of_deepseek(hf_config))
    if not isinstance(state_dict, Checkpoint):
        state_dict = unstacked(state_dict)
    load_deepseek(model, state_dict, hf_config)
    return model.eval()


def load_deepseek(model, tensors, hf_config):
    """The weights of a DeepSeek-V3 into a Transformer of its sizes, one tensor after the other.
    tensors: {their name: tensor}, or a Checkpoint. Raises ConfigError as from_deepseek does."""
    layout = deepseek_layout(model.config, hf_config.get('rope_interleave', True))
    ours = model.state_dict()
    for name, tensor in our_weights(model, layout, tensors):
        ours[name].copy_(tensor)


def unstacked(state_dict):
    """The tensors of a model of transformers, with those of experts by themselves, as in files."""
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
    """(state_dict, hf_config) of a Transformer in the layout of DeepseekV3ForCausalLM; same logits.

    The two matrices of an output latent are merged, or with split=True stay apart, for a model that
    has been through add_output_latent. Raises ConfigError on what the layout cannot hold.
    """
    if type(model) is not Transformer:
        raise ConfigError(f'{type(model).__name__}: only a Transformer can have the layout of '
                          'DeepSeek-V3')
    c, block, options = model.config, model.config.block, flat_options(model.config)
    if wrong := [name for name, wanted in DEEPSEEK.items() if options[name] != wanted]:
        raise ConfigError(f'{wrong[0]}={options[wrong[0]]}: DeepSeek-V3 has {DEEPSEEK[wrong[0]]}')
    if block.o_norm != 'none' and not split:
        raise ConfigError(f'o_norm={block.o_norm!r} stands between the two matrices, which cannot '
                          'be merged: use split=True, and add_output_latent with the same norm on '
                          'the model that is to load them')
    if block.mlp not in ('swiglu', 'moe'):
        raise ConfigError(f"mlp={block.mlp!r}: DeepSeek-V3 has swiglu or moe")
    if block.mlp == 'moe' and not block.n_shared_experts:
        raise ConfigError('n_shared_experts=0: DeepSeek-V3 has at least one')
    rope = rope_in_deepseek(c)
    ours, theirs = model.state_dict(), {}
    for name, (names, order) in deepseek_layout(c).items():
        rows = torch.cat([ours[part] for part in names])
        rows = rows if order is None else rows[order]
        parts = rows if '*' in name else [rows]
        theirs |= zip(of_each_expert(name, len(rows)), parts)
    if block.o_latent and not split:
        for i in range(c.n_layer):
            o_proj = f'model.layers.{i}.self_attn.o_proj'
            a, b = (theirs.pop(f'{o_proj}.{part}.weight') for part in ('o_a_proj', 'o_b_proj'))
            theirs[f'{o_proj}.weight'] = b @ a
    hf_config = dict(
        architectures=['DeepseekV3ForCausalLM'], model_type='deepseek_v3', vocab_size=c.vocab_size,
        hidden_size=block.n_embd, intermediate_size=block.mlp_hidden, num_hidden_layers=c.n_layer,
        num_attention_heads=block.n_head, num_key_value_heads=block.n_head,
        q_lora_rank=block.q_latent, kv_lora_rank=block.kv_latent,
        qk_nope_head_dim=block.head_dim - block.rope_dims, qk_rope_head_dim=block.rope_dims,
        v_head_dim=block.v_head_dim or block.head_dim, max_position_embeddings=c.block_size,
        rope_interleave=True, rms_norm_eps=1e-6, hidden_act='silu',
        attention_bias=False, tie_word_embeddings=c.tie_embeddings,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,  # the tokenizer's own
        first_k_dense_replace=c.n_layer, **rope)  # no mixtures of experts
    if block.mlp == 'moe':
        hf_config |= dict(
            first_k_dense_replace=c.first_k_dense, n_routed_experts=block.n_routed_experts,
            num_experts_per_tok=block.n_experts_per_tok, n_shared_experts=block.n_shared_experts,
            moe_intermediate_size=block.expert_hidden, n_group=block.n_group,
            topk_group=block.topk_group, routed_scaling_factor=block.routed_scaling,
            norm_topk_prob=True)
    if block.o_latent and split:
        hf_config |= dict(o_latent=block.o_latent, o_norm=block.o_norm)
    return theirs, hf_config


def write_checkpoint(folder, weights, hf_config):
    """Writes what to_deepseek returns into a folder, as Checkpoint and transformers read it: more
    than SHARD_BYTES of weights become several files, and an index says which tensor is in which.
    """
    shards, n_bytes = [{}], 0
    for name, weight in weights.items():
        n_bytes += weight.nbytes
        if n_bytes > SHARD_BYTES and shards[-1]:
            shards.append({})
            n_bytes = weight.nbytes
        shards[-1][name] = weight.contiguous()
    files = ['model.safetensors']
    if len(shards) > 1:
        files = [f'model-{i:05}-of-{len(shards):05}.safetensors'
                 for i in range(1, len(shards) + 1)]
        index = dict(metadata=dict(total_size=sum(weight.nbytes for weight in weights.values())),
                     weight_map={name: file for file, shard in zip(files, shards)
                                 for name in shard})
        (folder / 'model.safetensors.index.json').write_text(json.dumps(index, indent=2) + '\n')
    for file, shard in zip(files, shards):
        save_file(shard, folder / file, metadata=dict(format='pt'))
    (folder / 'config.json').write_text(json.dumps(hf_config, indent=2) + '\n')


# --------------------------------------------------------------------------------------------------
# output latents


def add_output_latent(model, rank, init='svd', norm='none', n_groups=1):
    """Replaces every linear o_proj of a model's attentions by an OutputLatent of this rank, in
    place; returns the model.

    model: one of ours, or one of transformers whose attentions have an o_proj, such as
    DeepseekV3ForCausalLM or LlamaForCausalLM. init: 'svd', the best product of this rank (at full
    rank nothing changes), or 'xavier', new weights. norm, n_groups: see OutputLatent; a norm other
    than 'none' changes the outputs at any rank. To reload what was saved, do the same to a new
    model and load the weights. Raises ConfigError, before anything is changed.
    """
    found = {name: module for name, module in model.named_modules()
             if isinstance(getattr(module, 'o_proj', None), nn.Linear)}
    ours = isinstance(model, LanguageModel)
    if not found:
        raise ConfigError('no attention of this model has a linear o_proj')
    for name, module in found.items():
        n_head = module.n_head if ours else module.config.num_attention_heads
        if n_head % n_groups:
            raise ConfigError(f'{name} has {n_head} heads, which are not divisible by '
                              f'o_groups={n_groups}')
        full = min(module.o_proj.out_features, module.o_proj.in_features // n_groups)
        if not 0 < rank <= full:
            raise ConfigError(f'an output latent of {rank}: {name}.o_proj takes 1 to {full}')
    if init not in ('svd', 'xavier') or norm not in ('none', 'sum', 'head'):
        raise ConfigError(f"init={init!r}, norm={norm!r}: takes 'svd' or 'xavier', and 'none', "
                          "'sum' or 'head'")
    if ours:  # its first n_dense layers stay as they are
        arch = next(name for name, (kind, _) in ARCHITECTURES.items() if type(model) is kind)
        options = flat_options(model.config) | dict(o_latent=rank, o_norm=norm, o_groups=n_groups)
        with torch.device('meta'):
            wanted = make_model(arch, **options)
        found = {name: module for name, module in found.items()
                 if isinstance(wanted.get_submodule(name).o_proj, OutputLatent)}
        model.config = wanted.config
    for module in found.values():
        old = module.o_proj
        n_head = module.n_head if ours else module.config.num_attention_heads
        new = OutputLatent(n_head, old.in_features, rank, old.out_features, norm,
                           old.bias is not None, n_groups).to(old.weight)
        if init == 'svd':
            weight = old.weight.detach()
            weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
            weight = weight.unflatten(1, (n_groups, -1)).transpose(0, 1)  # (G, D, H*dv/G)
            u, s, v = torch.linalg.svd(weight, full_matrices=False)
            s = s[:, None, :rank].sqrt()
            a = (s.mT * v[:, :rank]).flatten(0, 1)  # (G*R, H*dv/G)
            b = (u[:, :, :rank] * s).transpose(0, 1).flatten(1)  # (D, G*R)
            new.load_state_dict({'o_a_proj.weight': a, 'o_b_proj.weight': b}, strict=False)
        else:
            nn.init.xavier_uniform_(new.o_a_proj.weight)
            nn.init.xavier_uniform_(new.o_b_proj.weight)
        if old.bias is not None:
            new.o_b_proj.bias = old.bias
        module.o_proj = new
    return model


# --------------------------------------------------------------------------------------------------
# one attention of a checkpoint


class Checkpoint:
    """A folder of config.json and safetensors, sharded or not: checkpoint[name] is a tensor, read
    when it is asked for, in float32. Raises UserError on what is missing or damaged.

    config: the dict of config.json. files: {name of a tensor: path of the file that it is in}.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.config = read_json(self.folder / 'config.json')
        index, block = self.folder / 'model.safetensors.index.json', [FP8_BLOCK, FP8_BLOCK]
        scaled = self.config.get('quantization_config') or {}
        if not isinstance(scaled, dict) or scaled.get('weight_block_size', block) != block:
            raise UserError(f'{folder}: its weights have scales in other blocks than {FP8_BLOCK} x '
                            f'{FP8_BLOCK}: dequantise it first')
        self.files = {}
        if index.exists():
            weight_map = read_json(index).get('weight_map')
            if not isinstance(weight_map, dict) or {*map(type, weight_map.values())} - {str}:
                raise UserError(f'{index}: says in no weight_map which file holds which tensor: '
                                'download it again')
            self.files = {name: self.folder / file for name, file in weight_map.items()}
        else:
            for path in sorted(self.folder.glob('*.safetensors')):
                with open_shard(path) as shard:
                    self.files |= dict.fromkeys(shard.keys(), path)
        if not self.files:
            raise UserError(f'{folder}: holds no safetensors and no model.safetensors.index.json: '
                            'a checkpoint has either')

    def __contains__(self, name):
        return name in self.files

    def __getitem__(self, name):
        if name not in self:
            raise UserError(f'{self.folder}: has no tensor {name}')
        with open_shard(self.files[name]) as shard:
            weight = shard.get_tensor(name)
        if f'{name}_scale_inv' in self:
            scale = self[f'{name}_scale_inv']
            blocks = [-(-n // FP8_BLOCK) for n in weight.shape]
            if weight.dim() != 2 or list(scale.shape) != blocks:
                raise UserError(f'{self.folder}: {name}_scale_inv has the shape '
                                f'{tuple(scale.shape)}, which is not a scale for each block of '
                                f'{FP8_BLOCK} x {FP8_BLOCK}: dequantise it first')
            scale = scale.repeat_interleave(FP8_BLOCK, 0).repeat_interleave(FP8_BLOCK, 1)
            weight = weight.float() * scale[:weight.size(0), :weight.size(1)]
        if not weight.is_floating_point() or weight.element_size() < 2:
            raise UserError(f'{self.folder}: {name} is {weight.dtype} without {name}_scale_inv: '
                            'dequantise it first')
        weight = weight.float()
        if not weight.isfinite().all():
            raise UserError(f'{self.folder}: {name} holds numbers that are not finite')
        return weight


@contextlib.contextmanager
def open_shard(path):
    if not path.is_file():
        raise UserError(f'{path}: this shard is missing: download it again')
    try:
        with safe_open(path, framework='pt') as shard:
            yield shard
    except (SafetensorError, OSError) as error:
        raise UserError(f'{path}: truncated or damaged ({error}): download it again') from None


def read_json(path):
    """The object in a json file, as a dict. Raises UserError."""
    try:
        values = json.loads(path.read_text('utf-8'))
        if not isinstance(values, dict):
            raise ValueError('no json object')
        return values
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f'{path}: cannot be read ({error}): name a run folder of train.py, or a '
                        "folder with a checkpoint in transformers' layout") from None


def read_attention(checkpoint, i):
    """(attention, gain): the attention of layer i of a Checkpoint, an MLA if its layout is that of
    DeepSeek-V3, an MHA if it is that of Llama, without biases; and the gain (D,) of the norm before
    it. Raises UserError.

    Llama's layout includes grouped queries, and norms of queries and keys as in Qwen3. Experts,
    rotary scaling and fp8 do not stand in the way, as they do for from_deepseek.
    """
    c, folder, attn = checkpoint.config, checkpoint.folder, f'model.layers.{i}.self_attn.'
    if f'{attn}o_proj.weight' not in checkpoint and not c.get('o_latent'):
        raise UserError(f'{folder}: has no {attn}o_proj.weight: svd.py reads attentions laid out '
                        'as those of DeepSeek-V3 or Llama')
    qk_norm = f'{attn}q_norm.weight' in checkpoint
    try:
        options = mla_options(c) if 'kv_lora_rank' in c else llama_options(c, qk_norm)
        block = BlockConfig(**options)
        with torch.device('meta'):  # shapes only: the checkpoint's tensors become the weights
            attention = make_attention(block)
        if isinstance(attention, MLA):
            layout = mla_layout(block, c.get('rope_interleave', True))
        else:  # Llama's names and rows are those of our MHA
            layout = {name: ([name], None) for name in attention.state_dict()}
        weights = dict(our_weights(attention, with_prefix(layout, attn), checkpoint))
        gain = checkpoint[f'model.layers.{i}.input_layernorm.weight']
        if gain.shape != (block.n_embd,):
            raise ConfigError(f'input_layernorm.weight: has the shape {tuple(gain.shape)}, '
                              f'hidden_size={block.n_embd} asks for ({block.n_embd},)')
    except KeyError as error:
        raise UserError(f'{folder}/config.json: has no {error.args[0]}') from None
    except (ConfigError, RuntimeError, TypeError) as error:  # of torch: sizes beyond its reach
        raise UserError(f'{folder}: layer {i} does not fit config.json ({error})') from None
    attention.load_state_dict(weights, assign=True)
    return attention.requires_grad_(False), gain
