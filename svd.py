"""How much of their rank do attention weights use? Singular values of a run of train.py, or of a checkpoint in the layout of
transformers (DeepSeek-V3, Kimi-K2, Llama; sharded safetensors, fp8 too), of which one layer is in memory at a time.

    python svd.py out/decoder_mla_o --align=True
    python svd.py path/to/DeepSeek-V3 --layers=0,30,60 --stacked=False

For each layer Q, K, V, O and the fused QK (what a head compares) and VO (what it copies): of each head, and stacked over
heads, each head divided by its largest singular value. Gains of the norms before a matrix are folded in. Rotated
dimensions stand apart: q_rope, k_rope, and qk_rope, their product at distance zero. The effective rank is the least k
that leaves at most 1% (or 0.1%) of the energy, the sum of squares, beyond the first k; beside it stands that of matrices
of the same shapes filled with Gaussian noise. Writes svd.json with all singular values, layers.png and heads.png.
"""

import itertools
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

import config
from config import UserError
from model import MHA, Block, ChannelBlock, CrossBlock, OutputLatent
from train import load_run, pyplot, save_text

FUSED = dict(qk=('q', 'k'), vo=('o', 'v'), qk_rope=('q_rope', 'k_rope'))  # the first is the side on which heads are stacked
KINDS = 'q', 'k', 'qk', 'v', 'o', 'vo', 'q_rope', 'k_rope', 'qk_rope'
DISCARDED = 0.01, 0.001  # shares of the energy
FP8_BLOCK = 128  # DeepSeek-V3's fp8 weights have a scale for each 128 x 128 block


@dataclass
class SvdOptions:
    """Options"""

    layers: tuple[int, ...] | None = None  # only these, 0,30,60 for instance; None = all
    heads_of: int | None = None  # layer of the head-wise plot; None = the middle one
    stacked: bool = True  # also stack the heads: minutes a layer at DeepSeek-V3's width, where heads alone take seconds
    align: bool = False  # also principal angles between heads, and between what a layer writes and what is read
    out_dir: str | None = None  # folder for the results; None = the run's own, for a checkpoint out/svd-NAME
    seed: int = 1337  # of the noise

    def __post_init__(self):
        config.check_numbers(self, 'seed', 'heads_of')


# ----------------------------------------------------------------------------------------------------------------
# reading: a layer is {part: (heads (H, d, n), basis (n, D) or None)}; what a head does to a normed token is their product,
# and for o, transposed, what it writes. Where basis is None, n is D.


def parts_of(q, k, v, o, k_shared, rotated):
    """Sets the rotated rows of q, and of k unless one key is shared, apart; rotated: a slice of the rows of a head."""
    def split(part):
        heads, basis = part
        keep = torch.ones(heads.size(1), dtype=torch.bool)
        keep[rotated] = False
        return (heads[:, keep], basis), (heads[:, ~keep], basis)

    parts = dict(v=v, o=o)
    parts['q'], parts['q_rope'] = split(q)
    parts['k'], parts['k_rope'] = (k, k_shared) if k_shared else split(k)
    return {name: part for name, part in parts.items() if part[0].size(1)}


def heads_of(weight, n_head):
    return weight.float().unflatten(0, (n_head, -1))  # (H*d, n) -> (H, d, n)


def read_run(folder):
    """Yields the name of each attention of one of our runs, and a function that reads its parts (of upsampling by
    attention, none)."""
    model, _, _ = load_run(folder)
    if any(isinstance(module, ChannelBlock) for module in model.modules()):
        raise UserError(f'{folder}: has parallel channels, which svd.py cannot read')
    for name, block in model.requires_grad_(False).named_modules():
        if isinstance(block, Block):
            source_norm = getattr(block, 'source_norm', None) if not isinstance(block, CrossBlock) else None
            gains = block.attn_norm.weight, (source_norm or block.attn_norm).weight
            yield name, lambda attn=block.attn, gains=gains: read_attention(attn, *gains, model.config)
            if isinstance(block, CrossBlock):
                gains = block.cross_norm.weight, block.source_norm.weight
                yield f'{name}.cross', lambda attn=block.cross, gains=gains: read_attention(attn, *gains, model.config.cross())


def read_attention(attn, gain, source_gain, c):
    """The parts of one of our attentions; the gains of the norms before it, and before the sequence it reads."""
    H, k_shared = attn.n_head, None
    if isinstance(attn, MHA):
        q, k, v = (attn.qkv_proj.weight.split(attn.qkv_proj.splits) if hasattr(attn, 'qkv_proj') else
                   (attn.q_proj.weight, *attn.kv_proj.weight.split(attn.kv_proj.splits)))
        q, k, v = heads_of(q * gain, H), heads_of(k * source_gain, attn.n_kv_head), heads_of(v * source_gain, attn.n_kv_head)
        if c.qk_norm:
            q, k = q * attn.q_norm.weight[:, None], k * attn.k_norm.weight[:, None]
        q, k, v = (q, None), (k, None), (v, None)
    else:
        q_a, latent, shared = (attn.qkv_a_proj.weight.split(attn.qkv_a_proj.splits) if hasattr(attn, 'qkv_a_proj') else
                               (attn.q_a_proj.weight, *attn.kv_a_proj.weight.split(attn.kv_a_proj.splits)))
        q = (heads_of(attn.q_b_proj.weight, H), attn.q_a_norm.weight[:, None] * q_a * gain) if c.q_latent else (
            heads_of(q_a * gain, H), None)
        basis = attn.kv_a_norm.weight[:, None] * latent * source_gain
        k, v = ((heads_of(rows, H), basis) for rows in attn.kv_b_proj.weight.split(attn.kv_b_proj.splits))
        k_shared = ((shared * source_gain)[None], None) if attn.shared_dims else None
    if isinstance(attn.o_proj, OutputLatent):
        o, basis = heads_of(attn.o_proj.o_a_proj.weight.t(), H), attn.o_proj.o_b_proj.weight.t()
        if attn.o_proj.norm == 'head':
            o = o * attn.o_proj.gain[:, None]
        elif attn.o_proj.norm == 'sum':
            basis = attn.o_proj.o_norm.weight[:, None] * basis
        o = o, basis
    else:
        o = heads_of(attn.o_proj.weight.t(), H), None
    return parts_of(q, k, v, o, k_shared, slice(0, c.rope_dims))


class Checkpoint:
    """A folder of config.json and safetensors, sharded or not; tensors come one at a time, in float32."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.config, index = read_json(self.folder / 'config.json'), self.folder / 'model.safetensors.index.json'
        if (self.config.get('quantization_config') or {}).get('weight_block_size', [FP8_BLOCK] * 2) != [FP8_BLOCK] * 2:
            raise UserError(f'{folder}: its weights have scales in other blocks than {FP8_BLOCK} x {FP8_BLOCK}: dequantise it first')
        if index.exists():
            self.files = {name: self.folder / file for name, file in read_json(index).get('weight_map', {}).items()}
        else:
            self.files = {}
            for path in sorted(self.folder.glob('*.safetensors')):
                self.files |= dict.fromkeys(self.read(path, lambda file: list(file.keys())), path)
        if not self.files:
            raise UserError(f'{folder}: holds no safetensors and no model.safetensors.index.json: a checkpoint has either')

    @staticmethod
    def read(path, work):
        if not path.is_file():
            raise UserError(f'{path}: this shard is missing: download it again')
        try:
            with safe_open(path, framework='pt') as file:
                return work(file)
        except (SafetensorError, OSError) as error:
            raise UserError(f'{path}: truncated or damaged ({error}): download it again') from None

    def __contains__(self, name):
        return name in self.files

    def __getitem__(self, name):
        if name not in self.files:
            raise UserError(f'{self.folder}: has no tensor {name}')
        weight = self.read(self.files[name], lambda file: file.get_tensor(name))
        if f'{name}_scale_inv' not in self:
            if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                raise UserError(f'{self.folder}: {name} is {weight.dtype} without {name}_scale_inv: dequantise it first')
            weight = weight.float()
            if not weight.isfinite().all():
                raise UserError(f'{self.folder}: {name} holds numbers that are not finite')
            return weight
        scale = self[f'{name}_scale_inv'].repeat_interleave(FP8_BLOCK, 0).repeat_interleave(FP8_BLOCK, 1)
        return weight.float() * scale[:weight.size(0), :weight.size(1)]


def read_json(path):
    try:
        values = json.loads(path.read_text())
        if not isinstance(values, dict):
            raise ValueError('no json object')
        return values
    except (OSError, ValueError) as error:
        raise UserError(f'{path}: cannot be read ({error}): name a run folder of train.py, or a folder with a checkpoint in '
                        "transformers' layout") from None


def read_checkpoint(folder):
    """Yields the name of each layer of a checkpoint, and a function that reads its parts."""
    tensors = Checkpoint(folder)
    n_layer = tensors.config.get('num_hidden_layers')
    if not isinstance(n_layer, int):
        raise UserError(f'{folder}/config.json: has no num_hidden_layers')
    for i in range(n_layer):
        yield f'layer {i}', lambda i=i: read_layer(tensors, i)


def read_layer(tensors, i):
    """The parts of layer i, laid out as in DeepSeek-V3 or in Llama."""
    c, attn = tensors.config, f'model.layers.{i}.self_attn'
    if f'{attn}.o_proj.weight' not in tensors:
        raise UserError(f'{tensors.folder}: has no {attn}.o_proj.weight: svd.py reads attentions laid out as those of '
                        'DeepSeek-V3 or Llama')
    weight = lambda name: tensors[f'{attn}.{name}.weight']
    try:
        H = c['num_attention_heads']
        gain, o = tensors[f'model.layers.{i}.input_layernorm.weight'], (heads_of(weight('o_proj').t(), H), None)
        if 'kv_lora_rank' not in c:
            n_kv = c.get('num_key_value_heads') or H
            q, k, v = (heads_of(weight(name) * gain, n) for name, n in (('q_proj', H), ('k_proj', n_kv), ('v_proj', n_kv)))
            if f'{attn}.q_norm.weight' in tensors:
                q, k = q * weight('q_norm')[:, None], k * weight('k_norm')[:, None]
            return parts_of((q, None), (k, None), (v, None), o, None, slice(None))
        plain, r = c['qk_nope_head_dim'], c['qk_rope_head_dim']
        if c.get('q_lora_rank'):
            q = heads_of(weight('q_b_proj'), H), weight('q_a_layernorm')[:, None] * weight('q_a_proj') * gain
        else:
            q = heads_of(weight('q_proj') * gain, H), None
        latent, shared = (weight('kv_a_proj_with_mqa') * gain).split((c['kv_lora_rank'], r))
        basis, kv = weight('kv_a_layernorm')[:, None] * latent, heads_of(weight('kv_b_proj'), H)
        return parts_of(q, (kv[:, :plain], basis), (kv[:, plain:], basis), o, (shared[None], None), slice(plain, None))
    except KeyError as error:
        raise UserError(f'{tensors.folder}/config.json: has no {error.args[0]}') from None
    except (RuntimeError, TypeError) as error:  # shapes that do not divide into the heads that config.json names
        raise UserError(f'{tensors.folder}: layer {i} does not fit config.json ({str(error).splitlines()[0]})') from None


# ----------------------------------------------------------------------------------------------------------------
# spectra


def spectra(parts, stacked):
    """{kind: dict(heads=[singular values of each head], stacked=[singular values], effective_rank=...)} of a layer."""
    thin = {}
    for name, (heads, basis) in parts.items():
        # basis.T = Q R: with an orthonormal basis Q the singular values are those of heads @ R.T, n wide and not D
        thin[name] = heads if basis is None else (heads.double() @ torch.linalg.qr(basis.t().double(), mode='r').R.t()).float()
    result = {}
    for kind in KINDS:
        first, second = FUSED.get(kind, (kind, None))
        if first not in thin or second and second not in thin:
            continue
        x = thin[first]
        if second:
            # the product first.T @ second, D x D, has the singular values of R @ first, where second.T = Q R
            other = thin[second].repeat_interleave(len(x) // len(thin[second]), dim=0)
            x = torch.stack([(torch.linalg.qr(b.t().double(), mode='r').R @ a.double()).float() for a, b in zip(x, other)])
        heads = [torch.linalg.svdvals(head.double()) for head in x]
        found = result[kind] = dict(heads=[values.tolist() for values in heads])
        rows = dict(found)
        if stacked:
            tops = [values[0].clamp(min=torch.finfo(torch.float32).tiny) for values in heads]  # a head may be all zeros
            found['stacked'] = stacked_values(x, tops).tolist()
            rows['stacked'] = [found['stacked']]
        found['effective_rank'] = {str(share): {name: [effective_rank(values, share) for values in several]
                                                for name, several in rows.items()} for share in DISCARDED}
    return result


def stacked_values(x, tops):
    """Singular values of the heads x (H, d, n) below each other, each divided by its own largest: from the eigenvalues of
    the smaller Gram matrix in float64, which leaves those below 1e-8 of the largest undecided."""
    H, d, n = x.shape
    if H * d <= n:
        flat = (x / torch.stack(tops)[:, None, None]).flatten(0, 1).double()
        gram = flat @ flat.t()
    else:
        gram = torch.zeros(n, n, dtype=torch.float64)
        step = max(1, 1024 // d)
        for h in range(0, H, step):
            flat = torch.cat([head.double() / top for head, top in zip(x[h:h + step], tops[h:h + step])])
            gram.addmm_(flat.t(), flat)
    return torch.linalg.eigvalsh(gram).flip(0).clamp(min=0).sqrt()


def effective_rank(values, discarded):
    """The least k such that the squares beyond the first k sum to at most this share of all."""
    energy = torch.tensor(values, dtype=torch.float64).square()
    beyond = energy.sum() - energy.cumsum(0)
    return 1 + int((beyond > discarded * energy.sum()).sum())


def noise_like(parts, seed):
    """The same shapes, Gaussian: what a layer would show that has learned nothing."""
    generator = torch.Generator().manual_seed(seed)
    randn = lambda x: None if x is None else torch.randn(x.shape, generator=generator)
    return {name: (randn(heads), randn(basis)) for name, (heads, basis) in parts.items()}


# ----------------------------------------------------------------------------------------------------------------
# alignment


def subspaces(part, shared):
    """Orthonormal columns (D, .): of the latent's own space if shared and there is one, else of each head's."""
    heads, basis = part
    matrices = [basis] if shared and basis is not None else heads if basis is None else heads @ basis
    return [torch.linalg.qr(matrix.t()).Q for matrix in matrices]


def overlap(pairs):
    """Of pairs of subspaces, dimensions m and n in D: the mean squared cosine of their min(m, n) principal angles (of
    random ones max(m, n)/D), and the mean of the smallest angles in degrees."""
    squares, angles = [], []
    for a, b in pairs:
        cosines = torch.linalg.svdvals(a.t() @ b).clamp(max=1)
        squares.append(cosines.square().mean().item())
        angles.append(torch.rad2deg(torch.arccos(cosines[0])).item())
    return dict(cos2=statistics.mean(squares), smallest_angle=statistics.mean(angles))


def read_by(layer, written, where):
    """What the heads of a layer write (subspaces) against what `where`, the 'own' layer or the 'next', reads; nothing if its
    width is another."""
    result = {}
    for part, name in (('q', 'queries'), ('k', 'keys')):
        if part in layer or f'{part}_rope' in layer:
            read = subspaces(layer.get(part) or layer[f'{part}_rope'], shared=True)
            if read[0].size(0) == written[0].size(0):
                result[f'{where} {name}'] = overlap(itertools.product(written, read))
    return result


def alignment(parts, written):
    """What the heads of a layer write against each other, and against what the layer reads."""
    between = {'between heads': overlap(itertools.combinations(written, 2))} if len(written) > 1 else {}
    return between | read_by(parts, written, 'own')


# ----------------------------------------------------------------------------------------------------------------
# what a person sees


def summary(kinds):
    """{kind: effective ranks at the first share of DISCARDED: `heads`, a list, and of the stack}."""
    ranks = {kind: found['effective_rank'][str(DISCARDED[0])] for kind, found in kinds.items()}
    return {kind: found | {'stacked': rank for rank in found.get('stacked', ())} for kind, found in ranks.items()}


def table_line(name, ranks):
    """Stacked rank / mean over heads of each kind."""
    cells = (f'{found["stacked"]:,} / ' if 'stacked' in found else '' for found in ranks.values())
    means = (f'{statistics.mean(found["heads"]):.1f}' for found in ranks.values())
    return f'{name:16}' + ''.join(f'{cell + mean:>15}' for cell, mean in zip(cells, means))


def plot(path, title, xlabel, series, noise):
    """Two panels, what heads compare and what they copy; series and noise: {kind: [(x, rank), ...]}."""
    plt = pyplot()
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5), layout='constrained')
    names = {kind: kind.upper().replace('_ROPE', ' rotated') for kind in KINDS}
    for axes, kinds in zip(panels, (('q', 'k', 'qk', 'q_rope', 'k_rope', 'qk_rope'), ('v', 'o', 'vo'))):
        for color, kind in enumerate(kind for kind in kinds if series.get(kind)):
            width = 4 - 0.6 * color  # where lines coincide, the later one is seen inside the earlier
            axes.plot(*zip(*series[kind]), marker='o', markersize=width + 2, linewidth=width, color=f'C{color}', alpha=0.7,
                      label=names[kind])
            axes.plot(*zip(*noise[kind]), color=f'C{color}', linestyle='--', linewidth=1, zorder=3)
        axes.set(xlabel=xlabel, ylabel=f'effective rank ({DISCARDED[0]:.0%} of the energy left out)')
        axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, ncols=6, loc='lower center', bbox_to_anchor=(0.5, 1.0))
    figure.suptitle(f'{title}; dashed: Gaussian noise of the same shapes')
    figure.savefig(path, dpi=120)
    plt.close(figure)


def analyse(read, options):
    """(layers, noise): for each of the chosen layers its number, name, spectra and alignment, and those of noise of its
    shapes, which layers of one shape share."""
    layers, noise, before = [], {}, None
    for number, (name, load) in read:
        parts = None  # the layer before makes room
        start, parts = time.perf_counter(), load()
        shapes = str({part: [None if x is None else tuple(x.shape) for x in both] for part, both in parts.items()})
        if shapes not in noise:
            noise[shapes] = dict(layer='noise', kinds=spectra(noise_like(parts, options.seed), options.stacked))
            if options.align:
                first, second = (noise_like(parts, options.seed + i) for i in range(2))
                written = subspaces(first['o'], shared=False)
                noise[shapes]['alignment'] = alignment(first, written) | read_by(second, written, 'next')
                del first, second
            kinds = summary(noise[shapes]['kinds'])
            print(f'\n{"":16}' + ''.join(f'{kind:>15}' for kind in kinds) + '\n' + table_line('noise', kinds))
        layers.append(dict(number=number, layer=name, shapes=shapes, kinds=spectra(parts, options.stacked)))
        if before and number == layers[-2]['number'] + 1:
            layers[-2]['alignment'] |= read_by(parts, before, 'next')
        if options.align:
            before = subspaces(parts['o'], shared=False)
            layers[-1]['alignment'] = alignment(parts, before)
        print(table_line(name, summary(layers[-1]['kinds'])) + f'{time.perf_counter() - start:8.1f} s', flush=True)
    return layers, noise


def main():
    paths = [argument for argument in sys.argv[1:] if not argument.startswith('-')]
    values, _ = config.load([a for a in sys.argv[1:] if a not in paths], SvdOptions, doc=__doc__, takes_config=False)
    options = SvdOptions(**values)
    if len(paths) != 1:
        raise UserError('which weights? python svd.py RUN_OR_CHECKPOINT, one folder')
    source, ours = Path(paths[0]), (Path(paths[0]) / 'ckpt.pt').exists()
    if source.is_file():
        raise UserError(f'{source}: is a file: name the folder that it is in')
    read = list(enumerate(read_run(source) if ours else read_checkpoint(source)))
    wanted = range(len(read)) if options.layers is None else options.layers
    if absent := [number for number in (*wanted, options.heads_of or 0) if number not in range(len(read))]:
        raise UserError(f'layer {absent[0]}: {source} has layers 0 to {len(read) - 1}')
    middle = wanted[len(wanted) // 2] if options.heads_of is None else options.heads_of
    if middle not in wanted:
        raise UserError(f'heads_of={middle}: takes one of --layers={",".join(map(str, options.layers))}')
    folder = Path(options.out_dir or (source if ours else Path('out') / f'svd-{source.resolve().name}'))
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f'{folder}: cannot be written: set --out_dir')
    print(f'effective rank, {DISCARDED[0]:.0%} of the energy left out: {"stacked heads / " if options.stacked else ""}mean of '
          'the heads')
    layers, noise = analyse([read[number] for number in wanted], options)
    write(folder, source.name, layers, noise, middle, options)


def write(folder, title, layers, noise, middle, options):
    """svd.json, the plots, and the lines about alignment."""
    config.make_folder(folder, 'out_dir')
    save_text(folder / 'svd.json', json.dumps(dict(source=title, noise=noise, layers=layers)) + '\n')
    value = lambda found: found['stacked'] if options.stacked else statistics.mean(found['heads'])
    ranks = {layer['number']: (summary(layer['kinds']), summary(noise[layer['shapes']]['kinds'])) for layer in layers}
    over_layers = [{kind: [(number, value(pair[i][kind])) for number, pair in ranks.items() if kind in pair[i]] for kind in KINDS}
                   for i in range(2)]
    plot(folder / 'layers.png', f'{title}, {"heads stacked" if options.stacked else "mean of the heads"}', 'layer', *over_layers)
    found, random = ranks[middle]
    plot(folder / 'heads.png', f'{title}, layer {middle}, head by head', 'head',
         {kind: list(enumerate(found[kind]['heads'])) for kind in found},
         {kind: list(enumerate(random[kind]['heads'])) for kind in found})
    if options.align:
        names = list(dict.fromkeys(name for layer in (*noise.values(), *layers) for name in layer['alignment']))
        print('\nwhat a head writes, mean squared cosine of the principal angles, 1 where subspaces line up: to what other heads '
              f'write, and\nto what the layer itself and the next one read\n\n{"":16}' + ''.join(f'{name:>15}' for name in names))
        for layer in (*noise.values(), *layers):
            cells = (f'{layer["alignment"][name]["cos2"]:.3f}' if name in layer['alignment'] else '' for name in names)
            print(f'{layer["layer"]:16}' + ''.join(f'{cell:>15}' for cell in cells))
    print(f'\n{folder}: svd.json, layers.png, heads.png')


if __name__ == '__main__':
    config.run(main)
