"""How much of their rank do attention weights use? Singular values of a run of train.py, or of a
checkpoint in the layout of transformers (DeepSeek-V3, Kimi-K2, Llama; sharded safetensors, fp8
too), of which one layer is in memory at a time.

    python svd.py out/decoder_mla_o --align=True
    python svd.py path/to/DeepSeek-V3 --layers=0,30,60 --stacked=False

For each layer Q, K, V, O and the fused QK (what a head compares) and VO (what it copies): of each
head, and stacked over heads, each head divided by its largest singular value. Gains of the norms
before a matrix are folded in. Rotated dimensions stand apart: q_rope, k_rope, and qk_rope, their
product at distance zero. The effective rank is the least k that leaves at most 1%, or 0.1%, of the
energy, the sum of squares, beyond the first k (--discarded=0.05: at most 5%); beside it stands that
of matrices of the same shapes filled with Gaussian noise.

Writes svd.json with all singular values, layers.png and heads.png, with --plot_heads=True a plot
of each layer too; and svd.jsonl, layer by layer: after a kill, or with other layers, shares or
plots, the same command goes on from what is there.
"""

import collections
import contextlib
import itertools
import json
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F

import config
from config import UserError
from deepseek import Checkpoint, read_attention
from model import (Attention, Block, ChannelBlock, CountOrZero, CrossBlock, PoolBlock, Range,
                   attentions_of)
from run import Seed, best_checkpoint, load_run, pyplot, save_figure, save_text

# products of two parts; the first is the side on which heads are stacked
FUSED = dict(qk=('q', 'k'), vo=('o', 'v'), qk_rope=('q_rope', 'k_rope'))
KINDS = 'q', 'k', 'qk', 'v', 'o', 'vo', 'q_rope', 'k_rope', 'qk_rope'
PANELS = ('q', 'k', 'qk', 'q_rope', 'k_rope', 'qk_rope'), ('v', 'o', 'vo')  # of a plot
PUBLISHED = 0.01, 0.001  # shares of the energy, whose ranks are always in svd.json
Share = Annotated[float, Range(above=0, below=1)]
CLEARLY_BELOW = 0.9  # share of the rank of noise


@dataclass
class SvdOptions:
    """Options"""

    layers: tuple[CountOrZero, ...] | None = None  # only these, 0,30,60 for instance; None = all
    heads_of: CountOrZero | None = None  # layer of the head-wise plot; None = the middle one
    stacked: bool = True  # also stack the heads: minutes a layer at DeepSeek-V3's width
    align: bool = False  # also angles between what heads write, and between that and what is read
    discarded: tuple[Share, ...] = PUBLISHED  # shares of the energy to leave out
    plot_heads: bool = False  # also spectra-0.png and so on for each layer, a curve for each head
    device: str = 'cpu'  # torch device for the linear algebra, which is in float64
    out_dir: str | None = None  # results; None = the run's folder, for a checkpoint out/svd-NAME
    seed: Seed = 1337  # of the noise


# --------------------------------------------------------------------------------------------------
# reading: the parts of a layer are what Attention.matrices returns, {part: (heads, basis or None)}


def whole(heads, basis):
    """The matrices of the heads of a part, (H, d, D)."""
    if basis is None:
        return heads
    basis = basis.view(-1, *basis.shape[-2:])  # (groups of heads, or 1, n, D)
    return (heads.unflatten(0, (len(basis), -1)) @ basis[:, None]).flatten(0, 1)


class Layer(NamedTuple):
    name: str
    read: Callable  # returns its parts
    files: list  # paths of the files that its weights are in


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
    """Yields a Layer for each attention in the blocks of a run."""
    model, _, _ = load_run(folder)
    if any(isinstance(module, ChannelBlock) for module in model.modules()):
        raise UserError(f'{folder}: has parallel channels, which svd.py cannot read')
    for attention in attentions_of(model):
        if type(attention).matrices is Attention.matrices:
            raise UserError(f'{folder}: no matrix of a head makes its keys and values of a token '
                            f'in {type(attention).__name__}, so that svd.py cannot read it')
    files = [best_checkpoint(folder)]
    for name, block in model.requires_grad_(False).named_modules():
        if isinstance(block, Block):
            norm = source_norm = block.attn_norm
            if isinstance(block, PoolBlock) and block.source_norm:
                source_norm = block.source_norm
            gains = norm.weight, source_norm.weight
            yield Layer(name, partial(parts_of, block.attn, *gains), files)
        if isinstance(block, CrossBlock):
            gains = block.cross_norm.weight, block.source_norm.weight
            yield Layer(f'{name}.cross', partial(parts_of, block.cross, *gains), files)


def read_checkpoint(folder):
    """Yields a Layer for each layer of a checkpoint."""
    checkpoint = Checkpoint(folder)
    n_layer = checkpoint.config.get('num_hidden_layers')
    if type(n_layer) is not int or not 0 < n_layer <= len(checkpoint.files):
        raise UserError(f'{folder}/config.json: num_hidden_layers={n_layer!r:.40}: takes the '
                        f'number of layers that its {len(checkpoint.files)} tensors belong to')
    files = collections.defaultdict(set)
    for name, path in checkpoint.files.items():
        if match := re.match(r'model\.layers\.(\d+)\.(self_attn|input_layernorm)\.', name):
            files[int(match[1])].add(path)
    for i in range(n_layer):
        yield Layer(f'layer {i}', partial(read_layer, checkpoint, i),
                    [Path(folder) / 'config.json', *sorted(files[i])])


def read_layer(checkpoint, i):
    attention, gain = read_attention(checkpoint, i)
    return parts_of(attention, gain, gain)


def load(layer, device):
    """The parts of a Layer, on a device."""
    return {name: [None if matrix is None else matrix.to(device) for matrix in part]
            for name, part in layer.read().items()}


# --------------------------------------------------------------------------------------------------
# spectra


def spectra(parts, stacked):
    """{kind: singular values} of a layer: dict(heads=[values of each head], stacked=values);
    `stacked` only if asked for."""
    thin = {name: thinned(*part) for name, part in parts.items()}
    result = {}
    for kind in KINDS:
        sides = FUSED.get(kind, (kind,))
        if not all(side in thin for side in sides):
            continue
        x = fused(*(thin[side] for side in sides)) if kind in FUSED else thin[kind]
        if not x.isfinite().all():
            raise UserError(f'{kind}: products of its weights are too large for float32: are they '
                            'those of a model?')
        heads = [torch.linalg.svdvals(head.double()) for head in x]
        result[kind] = dict(heads=[values.tolist() for values in heads])
        if stacked:
            tiny = torch.finfo(torch.float32).tiny  # a head may be all zeros
            tops = [values[0].clamp(min=tiny) for values in heads]
            result[kind]['stacked'] = stacked_values(x, tops).tolist()
    return result


def thinned(heads, basis):
    """Matrices (H, d, n) with the singular values of heads @ basis."""
    if basis is None or basis.dim() == 3:  # coordinates in bases of their own cannot be stacked
        return whole(heads, basis)
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
        gram = torch.zeros(n, n, dtype=torch.float64, device=x.device)
        step = max(1, 1024 // d)
        for h in range(0, H, step):
            some = zip(x[h:h + step], tops[h:h + step])
            flat = torch.cat([head.double() / top for head, top in some])
            gram.addmm_(flat.t(), flat)
    return torch.linalg.eigvalsh(gram).flip(0).clamp(min=0).sqrt()


def energy_beyond(values):
    """The share of the energy beyond the first 1, 2, ... singular values, as a tensor; nan where
    all are zero. Of a list of spectra one line each."""
    kept = torch.tensor(values, dtype=torch.float64).square().cumsum(dim=-1)
    return 1 - kept / kept[..., -1:]


def effective_rank(values, discarded):
    """The least k such that the squares beyond the first k sum to at most this share of all. Of a
    list of spectra a list."""
    return (1 + (energy_beyond(values) > discarded).sum(dim=-1)).tolist()


def ranks_of(values, discarded):
    """Effective ranks of a kind: a list of those of the heads, and that of the stack or None."""
    stack = effective_rank(values['stacked'], discarded) if 'stacked' in values else None
    return effective_rank(values['heads'], discarded), stack


def effective_ranks(values, shares):
    """What svd.json says of a kind: {share: {'heads': [rank of each head], 'stacked': [rank]}}."""
    result = {}
    for share in shares:
        heads, stack = ranks_of(values, share)
        result[str(share)] = dict(heads=heads) | ({} if stack is None else dict(stacked=[stack]))
    return result


def shapes_of(parts):
    """The shapes of parts, as a string that noise_like reads."""
    return json.dumps({name: [None if matrix is None else list(matrix.shape) for matrix in part]
                       for name, part in parts.items()})


def noise_like(shapes, seed, device):
    """Parts of these shapes, Gaussian: what a layer would show that has learned nothing."""
    generator = torch.Generator().manual_seed(seed)
    return {name: [None if shape is None else torch.randn(shape, generator=generator).to(device)
                   for shape in part] for name, part in json.loads(shapes).items()}


# --------------------------------------------------------------------------------------------------
# alignment


def subspaces(part, shared):
    """Orthonormal columns (D, .): of what each head writes or reads; if shared, and a basis is, of
    that alone."""
    heads, basis = part
    if shared and basis is not None:
        matrices = basis.view(-1, *basis.shape[-2:])
    else:
        matrices = whole(heads, basis)
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
# layers, one after the other; svd.jsonl has a line for each that is finished, and for their noise


def chosen_layers(source, n_layer, options):
    """(numbers of the layers to analyse, number of that of the head-wise plot)."""
    numbers = range(n_layer) if options.layers is None else sorted(set(options.layers))
    absent = [number for number in (*numbers, options.heads_of or 0) if number >= n_layer]
    if absent:
        raise UserError(f'layer {absent[0]}: {source} has layers 0 to {n_layer - 1}')
    middle = numbers[len(numbers) // 2] if options.heads_of is None else options.heads_of
    if middle not in numbers:
        raise UserError(f'heads_of={middle}: takes one of --layers={",".join(map(str, numbers))}')
    return numbers, middle


def state_of(layer):
    """Names, sizes and times of the files of a Layer."""
    stats = {}
    for path in layer.files:
        if not path.is_file():
            raise UserError(f'{path}: this shard is missing: download it again')
        stats[path.name] = [path.stat().st_size, path.stat().st_mtime_ns]
    return stats


def to_text(line):
    """A line of svd.jsonl, with a checksum."""
    return json.dumps(dict(sha256=sha256(json.dumps(line).encode()).hexdigest(), line=line)) + '\n'


def from_text(text):
    """What to_text was given; None if a kill has cut the text off, or somebody has changed it."""
    try:
        line = json.loads(text)['line']
    except (ValueError, TypeError, KeyError):
        return None
    return line if to_text(line) == text else None


def read_finished(path, states, settings):
    """What an earlier call has finished: {number: line} of the layers in svd.jsonl, and {shapes:
    line} of the noise. Lines of another state stay in the file, for they may have taken hours;
    damaged ones are taken out of it.

    states: {number: state} of the layers to analyse. settings: the state of noise.
    """
    try:
        texts = path.read_text('utf-8', errors='replace').splitlines(True) if path.exists() else []
    except OSError as error:
        raise UserError(f'{path}: cannot be read ({error.strerror}): move it away') from None
    whole = [(text, line) for text in texts if (line := from_text(text))]
    if len(whole) < len(texts):
        print(f'{path}: {len(texts) - len(whole)} of its lines are cut off or damaged, and are '
              'made anew')
        save_text(path, ''.join(text for text, _ in whole))
    lines, others = {}, 0
    for _, line in whole:
        if 'number' in line:
            key, wanted = line['number'], states.get(line['number'], line['state'])
        else:
            key, wanted = line['shapes'], settings
        if line['state'] == wanted:
            lines[key] = line
        else:
            others += 1
    if others:
        print(f'{path}: {others} of its lines are of other options or files: they stay there, and '
              'do not count')
    return lines


def finish(path, **line):
    """Appends a line to svd.jsonl, and returns it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, 'a', encoding='utf-8') as file:
            file.write(to_text(line))
    except OSError as error:
        raise UserError(f'{path}: cannot be written ({error.strerror})') from None
    return line


def analyse(layers, numbers, path, options):
    """(found, noise) of the layers of these numbers. found: a dict for each, its number, name,
    shapes, kinds (see spectra) and alignment. noise: {shapes: the same of noise}. path: of
    svd.jsonl."""
    # a call may go on elsewhere: the device changes results by no more than rounding
    settings = dict(stacked=options.stacked, align=options.align, seed=options.seed)
    read, states = {}, {}
    for number in numbers:
        with_next = options.align and number + 1 in numbers  # whose queries and keys are compared
        read[number] = layers[number:number + 2 if with_next else number + 1]
        states[number] = settings | dict(files=[state_of(layer) for layer in read[number]])
    lines, noise = read_finished(path, states, settings), {}
    for number in numbers:
        start, kept = time.perf_counter(), number in lines
        if not kept:
            line = analyse_layer(*read[number], options=options)
            lines[number] = finish(path, number=number, state=states[number], **line)
        took = 'kept' if kept else f'{time.perf_counter() - start:.1f} s'
        shapes = lines[number]['shapes']
        if shapes not in noise:
            noise[shapes] = lines.get(shapes) or finish(path, state=settings,
                                                        **analyse_noise(shapes, options))
            header = ''.join(f'{kind:>15}' for kind in noise[shapes]['kinds'])
            print(f'\n{"left out":>22}{header}\n{table_rows(noise[shapes], options.discarded)}')
        print(table_rows(lines[number], options.discarded, took), flush=True)
    return [lines[number] for number in numbers], noise


def analyse_layer(layer, following=None, *, options):
    """What analyse finds in a Layer. following: the one after it, if that is analysed too."""
    parts = load(layer, options.device)
    found = dict(layer=layer.name, shapes=shapes_of(parts), kinds=spectra(parts, options.stacked))
    if options.align:
        written = subspaces(parts['o'], shared=False)
        found['alignment'] = alignment(parts, written)
        parts = None  # makes room for those of the next
        if following:
            found['alignment'] |= read_by(load(following, options.device), written, 'next')
    return found


def analyse_noise(shapes, options):
    """What analyse would find in noise of these shapes."""
    noise = noise_like(shapes, options.seed, options.device)
    found = dict(layer='noise', shapes=shapes, kinds=spectra(noise, options.stacked))
    if options.align:
        written = subspaces(noise['o'], shared=False)
        following = noise_like(shapes, options.seed + 1, options.device)
        found['alignment'] = alignment(noise, written) | read_by(following, written, 'next')
    return found


# --------------------------------------------------------------------------------------------------
# what a person sees


def percent(share):
    return f'{100 * share:g}%'


def table_rows(layer, shares, took=''):
    """A row for each share: stacked rank / mean over heads of each kind."""
    rows = []
    for share in shares:
        row = f'{"" if rows else layer["layer"]:16}{percent(share):>6}'
        for values in layer['kinds'].values():
            heads, stack = ranks_of(values, share)
            mean = f'{statistics.mean(heads):.1f}'
            cell = mean if stack is None else f'{stack:,} / {mean}'
            row += f'{cell:>15}'
        rows.append(row)
    rows[0] += f'{took:>10}'
    return '\n'.join(row.rstrip() for row in rows)


def verdict(found, noise, discarded):
    """What the ranks say, in one line: of how many layers which kinds lie clearly below noise, by
    the stack or by the mean of the heads."""
    below = collections.Counter()
    for layer in found:
        for kind, values in layer['kinds'].items():
            random = ranks_of(noise[layer['shapes']]['kinds'][kind], discarded)
            heads, stack = ranks_of(values, discarded)
            below[kind] += (statistics.mean(heads) <= CLEARLY_BELOW * statistics.mean(random[0])
                            or stack is not None and stack <= CLEARLY_BELOW * random[1])
    if not below.total():
        return 'nothing below noise: these weights have hardly been trained'
    counts = ', '.join(f'{kind} in {n}' for kind, n in below.items() if n)
    return (f'clearly below noise (at most {CLEARLY_BELOW:.0%} of its rank with '
            f'{percent(discarded)} left out), of {len(found)} '
            f'layer{"s" if len(found) > 1 else ""}: {counts}')


def plot(path, title, xlabel, ranks):
    """For each share two panels, what heads compare and what they copy. ranks: {share: (series,
    that of noise)}, each {kind: [(x, rank)]}."""
    figure, rows = pyplot().subplots(len(ranks), 2, figsize=(11, 0.3 + 4.2 * len(ranks)),
                                     layout='constrained', squeeze=False)
    panels = [(axes, kinds, share) for row, share in zip(rows, ranks)
              for axes, kinds in zip(row, PANELS)]
    for axes, kinds, share in panels:
        series, noise = ranks[share]
        for color, kind in enumerate(kind for kind in kinds if kind in series):
            width = 4 - 0.6 * color  # where lines coincide, the later one is seen in the earlier
            axes.plot(*zip(*series[kind]), marker='o', markersize=width + 2, linewidth=width,
                      color=f'C{color}', alpha=0.7, label=label_of(kind))
            axes.plot(*zip(*noise[kind]), color=f'C{color}', linestyle='--', linewidth=1, zorder=3)
        axes.set(xlabel=xlabel, ylabel=f'effective rank ({percent(share)} of the energy left out)')
        axes.set_ylim(0, 1.05 * axes.get_ylim()[1])
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, ncols=6, loc='lower center', bbox_to_anchor=(0.5, 1.0))
    figure.suptitle(f'{title}; dashed: Gaussian noise of the same shapes')
    save_figure(figure, path)


def label_of(kind):
    return kind.upper().replace('_ROPE', ' rotated')


def plot_spectra(path, title, layer, noise, shares):
    """A panel for each kind with a curve for each head, the energy that the first k singular values
    leave out: at its effective rank it is on the line of a share, or for the first time below."""
    from matplotlib.collections import LineCollection
    kinds = [kind for panel in PANELS for kind in panel if kind in layer['kinds']]
    floor = min(shares) / 10  # all of the singular values leave out nothing, which has no logarithm
    n_rows = math.ceil(len(kinds) / 3)
    figure, panels = pyplot().subplots(n_rows, 3, figsize=(13, 0.5 + 3.2 * n_rows),
                                       layout='constrained', squeeze=False)
    for axes, kind in zip(panels.flat, kinds):
        # (heads, n + 1): without any singular value all of the energy is left out
        heads, random = (F.pad(energy_beyond(found['kinds'][kind]['heads']), (1, 0), value=1.0)
                         for found in (layer, noise))
        k = torch.arange(heads.size(1))
        curves = torch.stack((k.expand_as(heads), heads.clamp(min=floor)), dim=-1)
        lines = LineCollection(curves.numpy(), array=range(len(heads)), linewidths=1, alpha=0.7)
        axes.add_collection(lines)
        if len(heads) > 1:
            bar = figure.colorbar(lines, ax=axes, label='head')
            bar.ax.yaxis.get_major_locator().set_params(integer=True)
        axes.plot(k, random.mean(dim=0).clamp(min=floor), color='black', linestyle='--',
                  linewidth=1)
        axes.set(title=label_of(kind), xlabel='singular values kept', ylabel='energy left out',
                 yscale='log', xlim=(0, len(k) - 1), ylim=(floor, 1))
        axes.set_yticks([1, *shares], map(percent, [1, *shares]))
        axes.minorticks_off()
        axes.grid(axis='y', color='gray')
    figure.suptitle(f'{title}, each head; dashed: mean of the heads of Gaussian noise')
    save_figure(figure, path)


def over_layers(layers, numbers, discarded):
    """{kind: [(number of a layer, rank)]}: the rank of the stack, or where heads were not stacked
    the mean over heads. layers: what analyse found in those, or in noise of their shapes."""
    series = {}
    for number, layer in zip(numbers, layers):
        for kind, values in layer['kinds'].items():
            heads, stack = ranks_of(values, discarded)
            rank = statistics.mean(heads) if stack is None else stack
            series.setdefault(kind, []).append((number, rank))
    return series


def over_heads(layer, discarded):
    """{kind: [(number of a head, rank)]}."""
    return {kind: list(enumerate(ranks_of(values, discarded)[0]))
            for kind, values in layer['kinds'].items()}


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
    numbers, shares = [layer['number'] for layer in found], options.discarded
    random = [noise[layer['shapes']] for layer in found]
    what = 'heads stacked' if options.stacked else 'mean of the heads'
    plot(folder / 'layers.png', f'{title}, {what}', 'layer', {
        share: [over_layers(layers, numbers, share) for layers in (found, random)]
        for share in shares})
    i = numbers.index(middle)
    plot(folder / 'heads.png', f'{title}, layer {middle}, head by head', 'head', {
        share: [over_heads(layer, share) for layer in (found[i], random[i])] for share in shares})
    if options.plot_heads:
        for number, layer, like_it in zip(numbers, found, random):
            plot_spectra(folder / f'spectra-{number}.png', f'{title}, layer {number}', layer,
                         like_it, shares)
    if options.align:
        print_alignment([*noise.values(), *found])
    print(f'\n{verdict(found, noise, shares[0])}')
    for layer in (*noise.values(), *found):
        for values in layer['kinds'].values():
            values['effective_rank'] = effective_ranks(values, (*PUBLISHED, *shares))
    results = dict(source=title, noise=noise, layers=found)
    save_text(folder / 'svd.json', json.dumps(results) + '\n')
    print(f'{folder}: svd.json, layers.png, heads.png'
          f'{", a spectra-N.png for each layer" if options.plot_heads else ""}')


def check_device(name):
    try:
        torch.zeros(1, dtype=torch.float64, device=name).item()
    except (RuntimeError, AssertionError, TypeError, ImportError) as error:
        reason = str(error).splitlines()[0].split('. ')[0]
        raise UserError(f'--device={name}: no device here that computes in float64 ({reason}): '
                        'use cpu, or cuda where torch has it') from None


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
    check_device(options.device)
    ours, name = best_checkpoint(source).is_file(), source.resolve().name
    layers = list(read_run(source) if ours else read_checkpoint(source))
    numbers, middle = chosen_layers(source, len(layers), options)
    folder = Path(options.out_dir or (source if ours else Path('out') / f'svd-{name}'))
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f'{folder}: cannot be written: set --out_dir')
    print(f'effective rank, {" or ".join(map(percent, options.discarded))} of the energy left out: '
          f'{"stacked heads / " if options.stacked else ""}mean of the heads')
    found, noise = analyse(layers, numbers, folder / 'svd.jsonl', options)
    write(folder, name, found, noise, middle, options)


if __name__ == '__main__':
    config.run(main)
