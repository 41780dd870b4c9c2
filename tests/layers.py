"""Single attention layers against outputs and gradients of other code.

    python tests/layers.py tests/golden/layers/layer_gta.npz ...

A file holds an input x (B, T, D), the output y, dy, the gradients dx and grad:NAME of the loss
sum(y * dy), the weights param:NAME under the other code's names, and `config`, its sizes as json.
Which attention that is, is in the name of the file: layer_KIND.npz, or layer_KIND_something.npz.
LAYOUTS says for each KIND which options and weights of ours those are. All are causal, with rotary
positions of base 10000 or those that the file holds. Exit status 1: something differs by more than
1e-5 of the largest entry.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from model import BlockConfig, make_attention, rope_table

TOLERANCE = 1e-5


# --------------------------------------------------------------------------------------------------
# layouts: KIND(c, theirs) -> (options of a BlockConfig, weights {name: tensor} under our names) of
# their sizes c and their weights {name: tensor}. It only moves and scales weights, so that
# gradients find their way back through it.


def rotated_first(weight, n_head, plain):
    """Rows of query heads [plain | rotated] -> [rotated | plain], as heads are here."""
    heads = weight.unflatten(0, (n_head, -1))  # (H, d, n)
    return torch.cat((heads[:, plain:], heads[:, :plain]), dim=1).flatten(0, 1)


def gqa_gated(c, theirs):
    options = dict(attention='mha', gate=True, head_dim=c['head_dim'], rope_dims=c['head_dim'],
                   n_kv_head=c['n_head'] // c['group_size'])
    return options, {
        'gate_proj': theirs['c_gated.weight'], 'q_proj': theirs['c_q.weight'],
        'k_proj': theirs['c_k.weight'], 'v_proj': theirs['c_v.weight'],
        'o_proj': theirs['c_proj.weight']}


def gta(c, theirs):
    plain = c['head_dim'] // 2
    options = dict(attention='gta', head_dim=c['head_dim'], rope_dims=plain,
                   n_kv_head=c['n_head'] // c['group_size'])
    return options, {
        'q_proj': rotated_first(theirs['c_q.weight'], c['n_head'], plain),
        'kv_proj': theirs['kv_proj.weight'], 'k_rope_proj': theirs['W_rope_k.weight'],
        'o_proj': theirs['c_proj.weight']}


def mfa(c, theirs):
    options = dict(attention='mha', n_kv_head=1, head_dim=c['head_dim'], rope_dims=c['head_dim'],
                   q_latent=c['share_q_dim'])
    return options, {
        'q_a_proj': theirs['c_q.weight'], 'q_a_norm': theirs['q_layernorm.weight'],
        'q_b_proj': theirs['w_q.weight'], 'k_proj': theirs['c_k.weight'],
        'v_proj': theirs['c_v.weight'], 'o_proj': theirs['c_proj.weight']}


def tpa(c, theirs):
    options = dict(attention='tpa', head_dim=c['head_dim'], rope_dims=c['head_dim'],
                   q_rank=c['q_rank'], kv_rank=c['rank'])
    ours = {'o_proj': theirs['c_proj.weight']}
    for part, rank in (('q', c['q_rank']), ('k', c['rank']), ('v', c['rank'])):
        over_heads = theirs[f'c_qkv.W_A_{part}.weight'].unflatten(0, (-1, rank))  # (H, R, D)
        ours[f'{part}_head_proj'] = over_heads.transpose(0, 1).flatten(0, 1)
        ours[f'{part}_channel_proj'] = theirs[f'c_qkv.W_B_{part}.weight']
    return options, ours


def latents(c, theirs, gains, up):
    """What GLA and MLRA have in common. gains: of the norm of each of the n latents. up
    (n, heads, k and v, L): from a latent to keys and values of heads. Normed latents are multiplied
    by sqrt(D/L) there; here the gains are."""
    D, n, total, plain = c['n_embd'], len(gains), c['kv_lora_rank'], c['qk_nope_head_dim']
    down, rotated = theirs['kv_a_proj_with_mqa.weight'], c['qk_rope_head_dim']
    options = dict(attention='mla', rope_key='shared', head_dim=plain + rotated, rope_dims=rotated,
                   v_head_dim=plain, q_latent=c['q_lora_rank'], kv_latent=total // n)
    return options, {
        'q_a_proj': theirs['q_a_proj.weight'],
        'q_a_norm': theirs['q_a_layernorm.weight'] * (D / c['q_lora_rank']) ** 0.5,
        'q_b_proj': rotated_first(theirs['q_b_proj.weight'], c['n_head'], plain),
        'kv_a_proj': down[:total], 'k_rope_proj': down[total:],
        'kv_a_norm': torch.cat(gains) * (D * n / total) ** 0.5,
        'k_b_proj': up[:, :, :plain].flatten(0, 2), 'v_b_proj': up[:, :, plain:].flatten(0, 2),
        'o_proj': theirs['c_proj.weight']}


def gla(c, theirs):
    gains = [weight for name, weight in theirs.items() if name.startswith('kv_a_layernorm_')]
    n = len(gains)
    up = torch.stack([theirs[f'kv_b_proj_{i + 1}.weight'] for i in range(n)])  # (n, rows, L)
    options, ours = latents(c, theirs, gains, up.unflatten(1, (c['n_head'] // n, -1)))
    return options | dict(kv_groups=n), ours


def mlra(c, theirs):
    gains = [weight for name, weight in theirs.items() if name.startswith('kv_a_layernorms.')]
    up = theirs['kv_b_proj'].mT.unflatten(1, (c['n_head'], -1))  # (n, L, rows) -> (n, H, ., L)
    options, ours = latents(c, theirs, gains, up)
    return options | dict(kv_branches=len(gains)), ours


def v4(c, theirs):
    """Inside each head its last qk_rope_head_dim numbers are rotated, in pairs of neighbours."""
    r, kind = c['qk_rope_head_dim'], V4_KINDS[c['layer']]
    options = dict(attention='v4', layer_kinds=kind, n_embd=c['hidden_size'], rope_dims=r,
                   sink=True, n_head=c['num_attention_heads'], head_dim=c['head_dim'],
                   q_latent=c['q_lora_rank'], window=c['sliding_window'], o_groups=c['o_groups'],
                   o_latent=c['o_lora_rank'], index_topk=c['index_topk'] if kind == 'csa' else None,
                   index_n_head=c['index_n_heads'], index_head_dim=c['index_head_dim'],
                   csa_group=c['compress_rates']['compressed_sparse_attention'],
                   hca_group=c['compress_rates']['heavily_compressed_attention'])

    def in_order(weight, width):
        """Rows of heads, or of series of entries, of this width, with ours inside each."""
        rotated = torch.arange(width - r, width)
        order = torch.cat((rotated[0::2], rotated[1::2], torch.arange(width - r)))
        return weight.unflatten(0, (-1, width))[:, order].flatten(0, 1)

    ours = {}
    for name, weight in theirs.items():
        name = name.removesuffix('.weight').replace('compressor.indexer.scorer.', 'indexer.')
        name = name.replace('compressor.indexer.', 'indexer.compressor.')
        name = name.replace('indexer.compressor.q_b_proj', 'indexer.q_b_proj')
        name = {'sinks': 'sink', 'o_a_proj': 'o_proj.o_a_proj',
                'o_b_proj': 'o_proj.o_b_proj'}.get(name, name)
        width = c['index_head_dim'] if name.startswith('indexer.') else c['head_dim']
        if name.endswith(('position_bias', 'o_a_proj')):
            weight = in_order(weight.mT, width).mT
        elif name.endswith(('q_b_proj', 'kv_proj', 'gate_proj', 'kv_norm')):
            weight = in_order(weight, width)
        ours[name] = weight
    return options, ours


V4_KINDS = {'sliding_attention': 'window', 'compressed_sparse_attention': 'csa',
            'heavily_compressed_attention': 'hca'}
LAYOUTS = dict(gla=gla, gqa_gated=gqa_gated, gta=gta, mfa=mfa, mlra=mlra, tpa=tpa, v4=v4)


# --------------------------------------------------------------------------------------------------


def kind_of(path):
    """The key of LAYOUTS that the name of a file begins with."""
    name = Path(path).stem.removeprefix('layer_')
    kinds = [kind for kind in LAYOUTS if name == kind or name.startswith(f'{kind}_')]
    if not kinds:
        sys.exit(f'{path}: takes a name like layer_KIND.npz with one of {", ".join(LAYOUTS)}')
    return max(kinds, key=len)


def differences(path):
    """{name: largest difference, as a share of the largest entry} of the output and of all
    gradients."""
    arrays = {name: torch.from_numpy(array) for name, array in np.load(path).items()
              if array.dtype.kind == 'f'}
    c = json.loads(str(np.load(path)['config']))
    theirs = {name[6:]: array.requires_grad_() for name, array in arrays.items()
              if name.startswith('param:')}
    x = arrays['x'].requires_grad_()
    options, weights = LAYOUTS[kind_of(path)](c, theirs)
    sizes = {name: c[name] for name in ('n_head', 'n_embd') if name in c}
    block = BlockConfig(**sizes, **options)
    attention = make_attention(block)
    shapes = {name: parameter.shape for name, parameter in attention.named_parameters()}
    ours = {name if name in shapes else f'{name}.weight': weight
            for name, weight in weights.items()}
    if {name: weight.shape for name, weight in ours.items()} != shapes:
        sys.exit(f'{path}: its weights have other shapes than its config says')
    rope = rope_table(x.size(1), block.rope_dims, 10000.0)
    if 'rope:main:cos' in arrays:  # V4: angles of its own in layers that read entries
        angles = 'main' if block.layer_kinds == 'window' else 'compress'
        rope = torch.stack([arrays[f'rope:{angles}:{part}'][0] for part in ('cos', 'sin')])
    y = torch.func.functional_call(attention, ours, x, dict(rope=rope))
    (y * arrays['dy']).sum().backward()
    pairs = dict(y=(y, arrays['y']), dx=(x.grad, arrays['dx']))
    pairs |= {f'grad:{name}': (weight.grad, arrays[f'grad:{name}'])
              for name, weight in theirs.items() if f'grad:{name}' in arrays}
    return {name: ((a - b).abs().max() / b.abs().max()).item() for name, (a, b) in pairs.items()}


def main():
    if not sys.argv[1:]:
        sys.exit(__doc__)
    failed = False
    for path in sys.argv[1:]:
        if not Path(path).is_file():
            sys.exit(f'{path}: there is no such file')
        found = differences(path)
        worst = max(found, key=found.get)
        wrong = [name for name, error in found.items() if not error <= TOLERANCE]
        failed |= bool(wrong)
        print(f'{path}: largest difference {found[worst]:.1e} of the largest entry, in {worst}'
              + (f'; too large: {", ".join(wrong)}' if wrong else ''))
    sys.exit(failed)


if __name__ == '__main__':
    main()
