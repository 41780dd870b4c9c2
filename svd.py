"""How much of their rank do attention weights use? Singular values of a run of train.py, or of a
checkpoint in the layout of transformers (DeepSeek-V3, Kimi-K2, Llama; sharded safetensors, fp8
too), of which one layer is in memory at a time.

    python svd.py out/decoder_mla_o --align=True
    python svd.py path/to/DeepSeek-V3 --layers=0,30,60 --stacked=False

For each layer Q, K, V, O and the fused QK (what a head compares) and VO (what it copies): of each
head, and stacked over heads, each head divided by its largest singular value. Gains of the norms
before a matrix are folded in. Rotated dimensions stand apart: q_rope, k_rope, and qk_rope, their
product at distance zero. The effective rank is the least k that leaves at most 1% (or 0.1%) of the
energy, the sum of squares, beyond the first k; beside it stands that of matrices of the same shapes
filled with Gaussian noise. Writes svd.json with all singular values, layers.png and heads.png.
"""

import itertools
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

import config
from config import UserError
from deepseek import Checkpoint, read_attention
from model import Block, ChannelBlock, CountOrZero, CrossBlock, PoolBlock
from run import Seed, load_run, pyplot, save_text

# products of two parts; the first is the side on which heads are stacked
FUSED = dict(qk=('q', 'k'), vo=('o', 'v'), qk_rope=('q_rope', 'k_rope'))
KINDS = 'q', 'k', 'qk', 'v', 'o', 'vo', 'q_rope', 'k_rope', 'qk_rope'
PANELS = ('q', 'k', 'qk', 'q_rope', 'k_rope', 'qk_rope'), ('v', 'o', 'vo')  # of a plot
DISCARDED = 0.01, 0.001  # shares of the energy


@dataclass
class SvdOptions:
    """Options"""

    layers: tuple[CountOrZero, ...] | None = None  # only these, 0,30,60 for instance; None = all
    heads_of: CountOrZero | None = None  # layer of the head-wise plot; None = the middle one
    stacked: bool = True  # also stack the heads: minutes a layer at DeepSeek-V3's width
    align: bool = False  # also angles between what heads write, and between that and what is read
    out_dir: str | None = None  # results; None = the run's folder, for a checkpoint out/svd-NAME
    seed: Seed = 1337  # of the noise


# --------------------------------------------------------------------------------------------------
# reading: the parts of a layer are what Attention.matrices returns, {part: (heads, basis or None)}


def parts_of(attention, gain, source_gain):
    """The parts of an attention, with the gains of the norms before it folded in: of the tokens
    that ask, and of those that are attended to."""
    parts = attention.matrices()
    gains = dict(q=gain, q_rope=gain, k=source_gain, k_rope=source_gain, v=source_gain)
    for name in gains.keys() & parts.keys():
        heads, basis = parts[name]
        if basis is None:
            parts[name] = heads * gains[name], None
        else:
            parts[name] = heads, basis * gains[name]
    return parts


def read_run(folder):
    """Yields (name, function that returns its parts) of each attention in the blocks of a run."""
    model, _, _ = load_run(folder)
    if any(isinstance(module, ChannelBlock) for module in model.modules()):
        raise UserError(f'{folder}: has parallel channels, which svd.py cannot read')
    for name, block in model.requires_grad_(False).named_modules():
        if isinstance(block, Block):
            norm = source_norm = block.attn_norm
            if isinstance(block, PoolBlock) and block.source_norm:
                source_norm = block.source_norm
            yield name, partial(parts_of, block.attn, norm.weight, source_norm.weight)
        if isinstance(block, CrossBlock):
            gains = block.cross_norm.weight, block.source_norm.weight
            yield f'{name}.cross', partial(parts_of, block.cross, *gains)


def read_checkpoint(folder):
    """Yields (name, function that returns its parts) of each layer of a checkpoint."""
    checkpoint = Checkpoint(folder)
    n_layer = checkpoint.config.get('num_hidden_layers')
    if not isinstance(n_layer, int):
        raise UserError(f'{folder}/config.json: has no num_hidden_layers')
    for i in range(n_layer):
        yield f'layer {i}', partial(read_layer, checkpoint, i)


def read_layer(checkpoint, i):
    attention, gain = read_attention(checkpoint, i)
    return parts_of(attention, gain, gain)


# --------------------------------------------------------------------------------------------------
# spectra


def spectra(parts, stacked):
    """{kind: singular values and effective ranks} of a layer:
    dict(heads=[values of each head], stacked=values, effective_rank={share: dict(heads=[rank of
    each head], stacked=[rank])}); `stacked` only if asked for."""
    thin = {name: thinned(*part) for name, part in parts.items()}
    result = {}
    for kind in KINDS:
        sides = FUSED.get(kind, (kind,))
        if not all(side in thin for side in sides):
            continue
        x = fused(*(thin[side] for side in sides)) if kind in FUSED else thin[kind]
        heads = [torch.linalg.svdvals(head.double()) for head in x]
        values = dict(heads=[s.tolist() for s in heads])
        if stacked:
            tiny = torch.finfo(torch.float32).tiny  # a head may be all zeros
            tops = [s[0].clamp(min=tiny) for s in heads]
            values['stacked'] = stacked_values(x, tops).tolist()
        result[kind] = dict(**values, effective_rank=effective_ranks(values))
    return result


def thinned(heads, basis):
    """Matrices (H, d, n) with the singular values of heads @ basis."""
    if basis is None:
        return heads
    # basis.T = Q R with orthonormal columns Q, so heads @ basis = (heads @ R.T) @ Q.T
    r = torch.linalg.qr(basis.t().double(), mode='r').R
    return (heads.double() @ r.t()).float()


def fused(first, second):
    """Matrices with the singular values of first.T @ second, head by head: (H, d, n) and
    (Hkv, d, m) -> (H, min(d, m), n)."""
    products = []
    second = second.repeat_interleave(len(first) // len(second), dim=0)
    for a, b in zip(first, second):
        # b.T = Q R, so a.T @ b = (R @ a).T @ Q.T
        r = torch.linalg.qr(b.t().double(), mode='r').R
        products.append((r @ a.double()).float())
    return torch.stack(products)


def stacked_values(x, tops):
    """Singular values of the heads x (H, d, n) below each other, each divided by its own largest:
    from the eigenvalues of the smaller Gram matrix in float64, which leaves those below 1e-8 of the
    largest undecided."""
    H, d, n = x.shape
    if H * d <= n:
        flat = (x / torch.stack(tops)[:, None, None]).flatten(0, 1).double()
        gram = flat @ flat.t()
    else:
        gram = torch.zeros(n, n, dtype=torch.float64)
        step = max(1, 1024 // d)
        for h in range(0, H, step):
            some = zip(x[h:h + step], tops[h:h + step])
            flat = torch.cat([head.double() / top for head, top in some])
            gram.addmm_(flat.t(), flat)
    return torch.linalg.eigvalsh(gram).flip(0).clamp(min=0).sqrt()


def effective_ranks(values):
    """{share: {'heads': [rank of each head], 'stacked': [rank]}}, for the shares in DISCARDED."""
    spectra_of = dict(heads=values['heads'])
    if 'stacked' in values:
        spectra_of['stacked'] = [values['stacked']]
    return {str(share): {name: [effective_rank(spectrum, share) for spectrum in several]
                         for name, several in spectra_of.items()} for share in DISCARDED}


def effective_rank(values, discarded):
    """The least k such that the squares beyond the first k sum to at most this share of all."""
    energy = torch.tensor(values, dtype=torch.float64).square()
    beyond = energy.sum() - energy.cumsum(0)
    return 1 + int((beyond > discarded * energy.sum()).sum())


def noise_like(parts, seed):
    """The same shapes, Gaussian: what a layer would show that has learned nothing."""
    generator = torch.Generator().manual_seed(seed)
    noise = {}
    for name, (heads, basis) in parts.items():
        heads = torch.randn(heads.shape, generator=generator)
        basis = None if basis is None else torch.randn(basis.shape, generator=generator)
        noise[name] = heads, basis
    return noise


# --------------------------------------------------------------------------------------------------
# alignment


def subspaces(part, shared):
    """Orthonormal columns (D, .): of what each head writes or reads; if shared, and a basis is, of
    that alone."""
    heads, basis = part
    if shared and basis is not None:
        matrices = [basis]
    else:
        matrices = heads if basis is None else heads @ basis
    return [torch.linalg.qr(matrix.t()).Q for matrix in matrices]


def overlap(pairs):
    """Of pairs of subspaces, dimensions m and n in D: the mean squared cosine of their min(m, n)
    principal angles (of random ones max(m, n)/D), and the mean of the smallest angles in degrees.
    """
    squares, angles = [], []
    for a, b in pairs:
        cosines = torch.linalg.svdvals(a.t() @ b).clamp(max=1)
        squares.append(cosines.square().mean().item())
        angles.append(torch.rad2deg(torch.arccos(cosines[0])).item())
    return dict(cos2=statistics.mean(squares), smallest_angle=statistics.mean(angles))


def read_by(parts, written, where):
    """What the heads of a layer write (subspaces) against what `where`, the 'own' layer or the
    'next', reads; nothing if its width is another."""
    result = {}
    for name, label in (('q', 'queries'), ('k', 'keys')):
        part = parts.get(name) or parts.get(f'{name}_rope')
        if part:
            read = subspaces(part, shared=True)
            if read[0].size(0) == written[0].size(0):
                result[f'{where} {label}'] = overlap(itertools.product(written, read))
    return result


def alignment(parts, written):
    """What the heads of a layer write against each other, and against what the layer reads."""
    between = {}
    if len(written) > 1:
        between = {'between heads': overlap(itertools.combinations(written, 2))}
    return between | read_by(parts, written, 'own')


# --------------------------------------------------------------------------------------------------
# layers, one after the other


def chosen_layers(source, n_layer, options):
    """(numbers of the layers to analyse, number of that of the head-wise plot)."""
    numbers = range(n_layer) if options.layers is None else options.layers
    absent = [number for number in (*numbers, options.heads_of or 0) if number >= n_layer]
    if absent:
        raise UserError(f'layer {absent[0]}: {source} has layers 0 to {n_layer - 1}')
    middle = numbers[len(numbers) // 2] if options.heads_of is None else options.heads_of
    if middle not in numbers:
        raise UserError(f'heads_of={middle}: takes one of --layers={",".join(map(str, numbers))}')
    return numbers, middle


def analyse(layers, numbers, options):
    """(found, noise) of the layers of these numbers. found: a dict for each, its number, name,
    shapes, kinds (see spectra) and alignment. noise: {shapes: the same of noise}."""
    found, noise, written = [], {}, None
    for number in numbers:
        name, read = layers[number]
        parts = None  # the layer before makes room
        start, parts = time.perf_counter(), read()
        shapes = str({part: [None if x is None else tuple(x.shape) for x in pair]
                      for part, pair in parts.items()})
        if shapes not in noise:
            noise[shapes] = analyse_noise(parts, options)
            header = ''.join(f'{kind:>15}' for kind in noise[shapes]['kinds'])
            print(f'\n{"":16}{header}\n{table_line(noise[shapes])}')
        layer = dict(number=number, layer=name, shapes=shapes,
                     kinds=spectra(parts, options.stacked))
        if options.align:
            if found and number == found[-1]['number'] + 1:
                found[-1]['alignment'] |= read_by(parts, written, 'next')
            written = subspaces(parts['o'], shared=False)
            layer['alignment'] = alignment(parts, written)
        found.append(layer)
        print(f'{table_line(layer)}{time.perf_counter() - start:8.1f} s', flush=True)
    return found, noise


def analyse_noise(parts, options):
    """What analyse would find in noise of these shapes."""
    noise = noise_like(parts, options.seed)
    layer = dict(layer='noise', kinds=spectra(noise, options.stacked))
    if options.align:
        written = subspaces(noise['o'], shared=False)
        following = noise_like(parts, options.seed + 1)
        layer['alignment'] = alignment(noise, written) | read_by(following, written, 'next')
    return layer


# --------------------------------------------------------------------------------------------------
# what a person sees


def ranks_of(found):
    """Effective ranks of a kind at the first of the shares in DISCARDED: a list of those of the
    heads, and that of the stack or None."""
    ranks = found['effective_rank'][str(DISCARDED[0])]
    return ranks['heads'], ranks['stacked'][0] if 'stacked' in ranks else None


def table_line(layer):
    """Stacked rank / mean over heads of each kind."""
    cells = []
    for found in layer['kinds'].values():
        heads, stack = ranks_of(found)
        mean = f'{statistics.mean(heads):.1f}'
        cells.append(mean if stack is None else f'{stack:,} / {mean}')
    return f'{layer["layer"]:16}' + ''.join(f'{cell:>15}' for cell in cells)


def plot(path, title, xlabel, series, noise):
    """Two panels, what heads compare and what they copy; series and noise: {kind: [(x, rank)]}."""
    plt = pyplot()
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5), layout='constrained')
    for axes, kinds in zip(panels, PANELS):
        for color, kind in enumerate(kind for kind in kinds if kind in series):
            width = 4 - 0.6 * color  # where lines coincide, the later one is seen in the earlier
            label = kind.upper().replace('_ROPE', ' rotated')
            axes.plot(*zip(*series[kind]), marker='o', markersize=width + 2, linewidth=width,
                      color=f'C{color}', alpha=0.7, label=label)
            axes.plot(*zip(*noise[kind]), color=f'C{color}', linestyle='--', linewidth=1, zorder=3)
        ylabel = f'effective rank ({DISCARDED[0]:.0%} of the energy left out)'
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, ncols=6, loc='lower center', bbox_to_anchor=(0.5, 1.0))
    figure.suptitle(f'{title}; dashed: Gaussian noise of the same shapes')
    figure.savefig(path, dpi=120)
    plt.close(figure)


def over_layers(numbers, layers):
    """{kind: [(number of a layer, rank)]}: the rank of the stack, or where heads were not stacked
    the mean over heads. layers: what analyse found in those, or in noise of their shapes."""
    series = {}
    for number, layer in zip(numbers, layers):
        for kind, values in layer['kinds'].items():
            heads, stack = ranks_of(values)
            rank = statistics.mean(heads) if stack is None else stack
            series.setdefault(kind, []).append((number, rank))
    return series


def over_heads(layer):
    """{kind: [(number of a head, rank)]}."""
    return {kind: list(enumerate(ranks_of(values)[0])) for kind, values in layer['kinds'].items()}


def print_alignment(rows):
    names = list(dict.fromkeys(name for layer in rows for name in layer['alignment']))
    header = ''.join(f'{name:>15}' for name in names)
    print('\nwhat a head writes, mean squared cosine of the principal angles, 1 where subspaces '
          'line up: to what other heads write, and\nto what the layer itself and the next one read'
          f'\n\n{"":16}{header}')
    for layer in rows:
        found = layer['alignment']
        cells = (f'{found[name]["cos2"]:.3f}' if name in found else '' for name in names)
        print(f'{layer["layer"]:16}' + ''.join(f'{cell:>15}' for cell in cells))


def write(folder, title, found, noise, middle, options):
    """svd.json, the plots, and the lines about alignment. middle: layer of the head-wise plot."""
    config.make_folder(folder, 'out_dir')
    results = dict(source=title, noise=noise, layers=found)
    save_text(folder / 'svd.json', json.dumps(results) + '\n')
    what = 'heads stacked' if options.stacked else 'mean of the heads'
    numbers = [layer['number'] for layer in found]
    random = [noise[layer['shapes']] for layer in found]
    plot(folder / 'layers.png', f'{title}, {what}', 'layer', over_layers(numbers, found),
         over_layers(numbers, random))
    i = numbers.index(middle)
    plot(folder / 'heads.png', f'{title}, layer {middle}, head by head', 'head',
         over_heads(found[i]), over_heads(random[i]))
    if options.align:
        print_alignment([*noise.values(), *found])
    print(f'\n{folder}: svd.json, layers.png, heads.png')


def main():
    paths = [argument for argument in sys.argv[1:] if not argument.startswith('-')]
    arguments = [argument for argument in sys.argv[1:] if argument not in paths]
    values, _ = config.load(arguments, SvdOptions, doc=__doc__, takes_config=False)
    options = SvdOptions(**values)
    if len(paths) != 1:
        raise UserError('which weights? python svd.py RUN_OR_CHECKPOINT, one folder')
    source = Path(paths[0])
    if source.is_file():
        raise UserError(f'{source}: is a file: name the folder that it is in')
    ours = (source / 'ckpt.pt').exists()
    layers = list(read_run(source) if ours else read_checkpoint(source))
    numbers, middle = chosen_layers(source, len(layers), options)
    default = source if ours else Path('out') / f'svd-{source.resolve().name}'
    folder = Path(options.out_dir or default)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f'{folder}: cannot be written: set --out_dir')
    stack = 'stacked heads / ' if options.stacked else ''
    print(f'effective rank, {DISCARDED[0]:.0%} of the energy left out: {stack}mean of the heads')
    found, noise = analyse(layers, numbers, options)
    write(folder, source.name, found, noise, middle, options)


if __name__ == '__main__':
    config.run(main)
