"""The effective rank of attention weights, of a run of train.py or of a checkpoint in the layout of
transformers (DeepSeek, Kimi, LongCat, Llama, Qwen3, Gemma, and others with the same two kinds of
attention; sharded and fp8 too), one layer in memory at a time.

    python svd.py out/decoder_mla_o --align=True
    python svd.py path/to/DeepSeek-V3 --layers=0,30,60 --stacked=False

The matrices are Q, K, V, O, QK (how a head compares tokens) and VO (what it copies), per head, and
with all heads stacked, each divided by its largest singular value. Rotated dimensions are separate:
q_rope, k_rope, and qk_rope, their product at distance zero. Gains of norms are multiplied in. The
effective rank is the smallest k for which the singular values after the first k hold at most 1%, or
0.1%, of the energy, the sum of squares.

Next to it is that of the weights from which a run of train.py started, made again from its options
and seed: a matrix that started at zero has no more than the rank of its updates. For other weights
it is that of Gaussian noise of the same shapes.

Writes svd.json with all singular values, layers.png, heads.png, and with --plot_heads=True a plot
per layer. svd.jsonl keeps each layer when it is finished: after a kill, or with other layers,
shares or plots, the same command computes only what is missing.
"""

import collections
import itertools
import json
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import config  # before torch: from here on Ctrl-C is one line

import torch
import torch.nn.functional as F

from config import UserError
from deepseek import Checkpoint, is_finite, read_attention
from model import (GTA, MHA, MLA, V4, Block, ChannelBlock, CountOrZero, CrossBlock, OutputLatent,
                   OpenShare, PoolBlock, Up)
from run import (Seed, best_checkpoint, build, build_empty, load_checkpoint, load_weights,
                 model_options_of, pyplot, save_figure, save_text)

# what has singular values: parts, and products of two, which are stacked on the side of the first
KINDS = dict(q=['q'], k=['k'], qk=['q', 'k'], v=['v'], o=['o'], vo=['o', 'v'],
             q_rope=['q_rope'], k_rope=['k_rope'], qk_rope=['q_rope', 'k_rope'])
PUBLISHED = 0.01, 0.001  # shares of the energy whose ranks are always in svd.json
CLEARLY_BELOW = 0.9  # share of the rank of noise


@dataclass
class SvdOptions:
    """Options"""

    layers: tuple[CountOrZero, ...] | None = None  # only these, such as 0,30,60; None = all
    heads_of: CountOrZero | None = None  # the layer in heads.png; None = the middle one
    stacked: bool = True  # also stack the heads: minutes per layer at DeepSeek-V3's width
    align: bool = False  # also the overlap of the subspaces that heads write to and read from
    discarded: tuple[OpenShare, ...] = PUBLISHED  # shares of the energy to leave out
    plot_heads: bool = False  # also spectra-0.png and so on: per layer a curve for each head
    device: str = 'cpu'  # torch device for the linear algebra, which is in float64
    out_dir: str | None = None  # for results; None = the run's folder, or out/svd-CHECKPOINT
    seed: Seed = 1337  # of the noise


# --------------------------------------------------------------------------------------------------
# what an attention does to a token


def matrices(attention, gain=1.0, kv_gain=None):
    """The matrices of the heads: {part: [heads (H, d, n), basis (groups, n, D)]}. The matrix of a
    head is heads[h] @ the basis of its group; a part may also be [heads (H, d, D)] alone.

    Parts: q, k, v, o, and q_rope and k_rope for rotated dimensions; a part without dimensions is
    left out. For o it is the transpose of what a head writes. Gains of norms are multiplied in:
    gain (D,), of the norm before the attention; kv_gain, of the one before its keys and values if
    that is another; and the attention's own. A gate is not, as it differs per token. Raises
    UserError for an attention that has no such matrices.
    """
    if not isinstance(attention, (MHA, MLA, GTA, V4)):
        raise UserError(f'{type(attention).__name__}: no matrix per head makes its keys and '
                        'values: svd.py needs a run with another attention')
    a, r, basis, q_basis, (o, *o_basis) = attention, attention.rope_dims, [], [], output(attention)
    q = in_heads(a.q_b_proj if a.q_latent else a.q_proj, a.n_head)
    if a.q_latent:
        q_basis = [with_gain(a.q_a_norm, a.q_a_proj.weight)[None]]
    if isinstance(a, MHA):
        k, v = in_heads(a.k_proj, a.n_kv_head), in_heads(a.v_proj, a.n_kv_head)
        q, k = with_gain(a.q_norm, q), with_gain(a.k_norm, k)
    elif isinstance(a, MLA):
        basis = [with_gain(a.kv_a_norm, a.kv_a_proj.weight).unflatten(0, (a.n_latents, -1))]
        k, v = in_heads(a.k_b_proj, a.n_softmax), in_heads(a.v_b_proj, a.n_softmax)
        if (n := a.n_branches) > 1:  # every head is there once per branch
            q, o = q.repeat(n, 1, 1), o.repeat(n, 1, 1) * n ** -0.5
            o_basis = [part.repeat(n, 1, 1) if len(part) > 1 else part for part in o_basis]
    elif isinstance(a, GTA):
        v = in_heads(a.kv_proj, a.n_kv_head)
        k = v[:, :a.head_dim - r]
    else:
        k = v = with_gain(a.kv_norm, a.kv_proj.weight)[None]
    if (k_rope_proj := getattr(a, 'k_rope_proj', None)) is None:
        k, k_rope = [k[:, r:], *basis], [k[:, :r], *basis]
    else:  # one for all heads
        k, k_rope = [k, *basis], [k_rope_proj.weight[None]]
    parts = dict(v=[v, *basis], o=[o, *o_basis], q=[q[:, r:], *q_basis],
                 q_rope=[q[:, :r], *q_basis], k=k, k_rope=k_rope)
    kv_gain = gain if kv_gain is None else kv_gain
    for name in parts.keys() - {'o'}:
        parts[name][-1] = parts[name][-1] * (gain if name.startswith('q') else kv_gain)
    return {name: part for name, part in parts.items() if part[0].size(1)}


def output(attention):
    """The part o of `matrices`."""
    o_proj, H = attention.o_proj, attention.n_head
    if not isinstance(o_proj, OutputLatent):
        return [o_proj.weight.t().unflatten(0, (H, -1))]  # (H, dv, D)
    G = o_proj.n_groups
    heads = o_proj.o_a_proj.weight.unflatten(0, (G, -1)).unflatten(2, (H // G, -1))
    heads = heads.permute(0, 2, 3, 1).flatten(0, 1)  # (G, R, H/G, dv) -> (H, dv, R)
    if o_proj.norm == 'head':
        heads = heads * o_proj.gain[:, None]
    return [heads, with_gain(o_proj.o_norm, o_proj.o_b_proj.weight.t()).unflatten(0, (G, -1))]


def in_heads(layer, n_head):
    return layer.weight.unflatten(0, (n_head, -1))  # (H, d, n)


def with_gain(norm, matrix):
    """A matrix (..., d, n) with its rows multiplied by the gain (d,) of a norm, if that has one."""
    gain = getattr(norm, 'weight', None)
    return matrix if gain is None else gain[:, None] * matrix


def whole(heads, basis=None):
    """The matrices of the heads of a part, (H, d, D)."""
    if basis is None:
        return heads
    return (heads.unflatten(0, (len(basis), -1)) @ basis[:, None]).flatten(0, 1)


# --------------------------------------------------------------------------------------------------
# layers: an attention with the gains of the norms before it, or noise


class Layer(NamedTuple):
    name: str
    read: Callable  # returns its parts, as `matrices` does
    files: list = []  # paths of the files with its weights
    start: Callable | None = None  # like read, before training; None = not known

    def load(self, device):
        return {name: [matrix.to(device) for matrix in part] for name, part in self.read().items()}


def layers_of_run(folder):
    """(a Layer per attention of a run, a line on its training)."""
    path, starts = best_checkpoint(folder), {}
    state = load_checkpoint(path)
    options = state['options']
    model = build_empty(options['arch'], model_options_of(options))
    load_weights(model, state, path)
    tokens = state['step'] * options['batch_size'] * options['block_size']
    trained = f'after {state["step"]:,} steps, {tokens:,} tokens'
    if state['provenance'].get('started_from') == 'scratch':
        torch.manual_seed(options['seed'])  # as train.py does
        starts = attentions(build(options['arch'], model_options_of(options)))
    return [Layer(name, read, [path], starts.get(name))
            for name, read in attentions(model).items()], trained


def attentions(model):
    """{name: function that returns the parts, as `matrices` does} of the attentions of a model."""
    found = {}

    def add(name, attention, norm, kv_norm):
        found[name] = partial(matrices, attention, norm.weight, kv_norm.weight)

    for name, block in model.requires_grad_(False).named_modules():
        if isinstance(block, ChannelBlock):
            for i, attention in enumerate(block.attn):
                add(f'{name}.{i}', attention, block.attn_norm, block.attn_norm)
        if isinstance(block, Block):
            kv_norm = isinstance(block, PoolBlock) and block.kv_norm or block.attn_norm
            add(name, block.attn, block.attn_norm, kv_norm)
        if isinstance(block, CrossBlock):
            add(f'{name}.cross', block.cross, block.cross_norm, block.kv_norm)
        if isinstance(block, Up) and block.upsample == 'attention':
            add(f'{name}.up', block.up, block.query_norm, block.latent_norm)
    return found


def layers_of_checkpoint(folder):
    """A Layer per attention of a checkpoint in transformers' layout. Prints which of its layers
    have none that can be read."""
    checkpoint, layers, names_of = Checkpoint(folder), [], collections.defaultdict(set)
    c, n_tensors = checkpoint.language, len(checkpoint.files)
    n_layer = c.get('num_hidden_layers', c.get('num_layers'))
    if type(n_layer) is not int or not 0 < n_layer <= n_tensors:
        raise UserError(f'{folder}/config.json: num_hidden_layers={n_layer!r:.40} must be the '
                        f'number of layers that its {n_tensors} tensors belong to')
    key = 'kv_a_proj_with_mqa' if 'kv_lora_rank' in c else 'k_proj'
    part = rf'(?:(?:model|language_model)\.)*layers\.(\d+)\.(self_attn(\.\d+)?(?=\.{key}\.))?'
    for name in checkpoint:
        if found := re.match(part, name):
            names_of[int(found[1])] |= {found[0]} if found[2] else set()
    for i in range(n_layer):
        if i not in names_of:
            raise UserError(f'{folder}: model.layers.{i}.self_attn is missing')
        for name in sorted(names_of[i]):
            norm = name.replace('self_attn', 'input_layernorm')
            files = {path for tensor, path in checkpoint.files.items()
                     if tensor.startswith((f'{name}.', f'{norm}.'))}
            layers.append(Layer(f'layer {i}{name.partition("self_attn")[2]}',
                                lambda name=name: matrices(*read_attention(checkpoint, name)),
                                [Path(folder) / 'config.json', *sorted(files)]))
    if not layers:
        raise UserError(f"{folder}: no layer has an attention like DeepSeek-V3's or Llama's")
    if others := [str(i) for i in range(n_layer) if not names_of[i]]:
        print('left out, and not counted in --layers, because they have another attention: '
              f'layers {", ".join(others)}')
    return layers


def noise_like(shapes, seed):
    """Gaussian parts of these shapes: what a layer that has learned nothing would show."""
    generator = torch.Generator().manual_seed(seed)
    return {name: [torch.randn(shape, generator=generator) for shape in part]
            for name, part in json.loads(shapes).items()}


# --------------------------------------------------------------------------------------------------
# spectra


def spectra(parts, stacked):
    """{kind: {'heads': [singular values of each head], 'stacked': singular values}}; 'stacked' only
    if asked for."""
    thin = {name: thinned(*part) for name, part in parts.items()}
    result = {}
    for kind, names in KINDS.items():
        if not thin.keys() >= {*names}:
            continue
        x = fused(*(thin[name] for name in names)) if len(names) > 1 else thin[kind]
        if not is_finite(x):
            raise UserError(f'{kind}: products of its weights are too large for float32: name a '
                            'checkpoint of a trained model')
        heads = [torch.linalg.svdvals(head.double()) for head in x]
        result[kind] = dict(heads=[values.tolist() for values in heads])
        if stacked:
            result[kind]['stacked'] = stacked_values(x, heads).tolist()
    return result


def triangle(matrix):
    """R of matrix.T = Q R in float64. The columns of Q are orthonormal, so x @ matrix has the
    singular values of x @ R.T, which is smaller."""
    return torch.linalg.qr(matrix.t().double(), mode='r').R


def thinned(heads, *basis):
    """Matrices (H, d, n) with the singular values of the heads of a part, single and stacked."""
    if not basis or len(basis[0]) > 1:  # coordinates in different bases cannot be stacked
        return whole(heads, *basis)
    return (heads.double() @ triangle(basis[0][0]).t()).float()


def fused(first, second):
    """Matrices with the singular values of first.T @ second, head by head: (H, d, n) and
    (Hkv, d, m) -> (H, min(d, m), n)."""
    second = second.repeat_interleave(len(first) // len(second), dim=0)
    return torch.stack([(triangle(b) @ a.double()).float() for a, b in zip(first, second)])


def stacked_values(x, heads):
    """Singular values of the heads x (H, d, n) on top of each other, each divided by its largest:
    roots of the eigenvalues of the smaller Gram matrix in float64, so that values below 1e-8 of the
    largest are rounding errors. heads: the singular values of each head."""
    H, d, n = x.shape
    tops = torch.stack([values[0] for values in heads])[:, None, None]
    tops = tops.clamp(min=torch.finfo(torch.float32).tiny)  # a head may be all zeros
    if H * d <= n:
        flat = (x / tops).flatten(0, 1)
        gram = flat @ flat.t()
    else:
        gram = torch.zeros(n, n, dtype=torch.float64, device=x.device)
        size = max(1, 1024 // d)  # all heads at once would take too much memory in float64
        for some, top in zip(x.split(size), tops.split(size)):
            flat = (some / top).flatten(0, 1)
            gram.addmm_(flat.t(), flat)
    return torch.linalg.eigvalsh(gram).flip(0).clamp(min=0).sqrt()


def energy_left(values):
    """The share of the energy after the first 0, 1, ... n singular values, (..., n) -> a tensor
    (..., n + 1); all 0 if all values are 0."""
    energy = F.pad(torch.tensor(values, dtype=torch.float64).square().cumsum(dim=-1), (1, 0))
    return (1 - energy / energy[..., -1:]).nan_to_num(0.0)


def effective_rank(values, share):
    """For each of one or more spectra the smallest k for which the values after the first k hold at
    most this share of the energy, as a list."""
    return (energy_left(values) > share).sum(dim=-1).reshape(-1).tolist()


# --------------------------------------------------------------------------------------------------
# alignment


def subspaces(part, shared=False):
    """Orthonormal columns (D, .) of what each head writes or reads; if shared, of each basis, where
    the part has them."""
    spanned = part[1] if shared and len(part) > 1 else whole(*part)
    return [torch.linalg.qr(matrix.t()).Q for matrix in spanned]


def overlap(pairs):
    """For pairs of subspaces of m and n dimensions in D: the mean squared cosine of their min(m, n)
    principal angles (max(m, n)/D for random ones), and their mean smallest angle in degrees."""
    squares, angles = [], []
    for a, b in pairs:
        cosines = torch.linalg.svdvals(a.t() @ b).clamp(max=1)
        squares.append(cosines.square().mean().item())
        angles.append(torch.rad2deg(torch.arccos(cosines[0])).item())
    return dict(cos2=statistics.mean(squares), smallest_angle=statistics.mean(angles))


def alignment(parts, next_parts):
    """The overlap of what the heads of a layer write with each other, and with what this layer and
    the next one read if their widths agree."""
    written, found = subspaces(parts['o']), {}
    if len(written) > 1:
        found['between heads'] = overlap(itertools.combinations(written, 2))
    for where, reading in (('own', parts), ('next', next_parts)):
        for name, label in (('q', 'queries'), ('k', 'keys')):
            if part := reading.get(name) or reading.get(f'{name}_rope'):
                read = subspaces(part, shared=True)
                if read[0].size(0) == written[0].size(0):
                    found[f'{where} {label}'] = overlap(itertools.product(written, read))
    return found


# --------------------------------------------------------------------------------------------------
# the analysis, layer by layer


class Analysis:
    """Analyses layers and caches the results in svd.jsonl: a line per layer, whose `state` holds
    everything that they depend on. Lines with another state are kept: they may have taken hours.
    """

    def __init__(self, path, options):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.options, lines = path, options, config.read_json_lines(path)
        # a kill may have cut off the last line, and the next one must not be appended to its rest
        save_text(path, ''.join(json.dumps(line) + '\n' for line in lines))
        self.lines = {json.dumps(line['state']): line for line in lines
                      if line.keys() >= {'state', 'layer', 'shapes', 'kinds'}}

    def of(self, layer, following=None, **state):
        """(what is found in a Layer, how long it took). A dict: its name, the shapes of its parts,
        its kinds (see spectra) with effective ranks, and its alignment. following: the next Layer,
        to be aligned with."""
        options, start, took = self.options, time.perf_counter(), 'kept'
        # the device is no part of the state: it changes no more than the rounding
        state |= dict(stacked=options.stacked, align=options.align, seed=options.seed)
        line = self.lines.get(json.dumps(state))
        if line is None:
            parts = layer.load(options.device)
            shapes = {name: [list(matrix.shape) for matrix in part] for name, part in parts.items()}
            line = dict(state=state, layer=layer.name, shapes=json.dumps(shapes),
                        kinds=spectra(parts, options.stacked))
            if options.align:
                next_parts = following.load(options.device) if following else {}
                line['alignment'] = alignment(parts, next_parts)
            self.lines[json.dumps(state)] = line
            with open(self.path, 'a') as file:
                file.write(json.dumps(line) + '\n')
            took = f'{time.perf_counter() - start:.1f} s'
        kinds = {kind: values | dict(effective_rank={
            str(share): {name: effective_rank(found, share) for name, found in values.items()}
            for share in (*PUBLISHED, *options.discarded)})
                 for kind, values in line['kinds'].items()}
        return line | dict(kinds=kinds), took


def analyse_layers(layers, numbers, path, options):
    """What is found in the layers of these numbers: a list of dicts, whose `reference` is what is
    found in the weights before training or, where these are not known, in noise of the same shapes.
    Prints it. path: of svd.jsonl."""
    analysis, found, shown = Analysis(path, options), [], set()
    for number in numbers:
        with_next = options.align and number + 1 in numbers
        pair = layers[number:number + 1 + with_next]
        files = {file.name: [file.stat().st_size, file.stat().st_mtime_ns]
                 for layer in pair for file in layer.files}
        state = dict(number=number, with_next=with_next, files=files)
        line, took = analysis.of(*pair, **state)
        shapes, start = line['shapes'], layers[number].start
        if start:
            pair = [Layer(f'{layer.name}, start', layer.start) for layer in pair]
            reference, _ = analysis.of(*pair, **state, start=True)
        else:
            pair = [Layer('noise', partial(noise_like, shapes, options.seed + i)) for i in (0, 1)]
            reference, _ = analysis.of(*pair, shapes=shapes)
        if shapes not in shown:
            print(f'\n{"left out":>28}' + ''.join(f'{kind:>15}' for kind in line['kinds']))
        if start or shapes not in shown:
            print(table_rows(reference, options.discarded))
        shown.add(shapes)
        print(table_rows(line, options.discarded, took), flush=True)
        found.append(dict(number=number, reference=reference) | line)
    return found


# --------------------------------------------------------------------------------------------------
# the table and the plots


def percent(share):
    return f'{100 * share:g}%'


def ranks_of(values, share):
    """[rank of the stacked heads, unless they were not stacked; mean rank of the heads]."""
    ranks = values['effective_rank'][str(share)]
    return [*ranks.get('stacked', []), statistics.mean(ranks['heads'])]


def table_rows(layer, shares, took=''):
    """A row per share, rank of the stacked heads / mean rank of the heads of each kind, and one of
    the alignment."""
    rows, name = [], layer['layer']
    for share in shares:
        row = f'{name:22}{percent(share):>6}'
        for values in layer['kinds'].values():
            *stacked, mean = ranks_of(values, share)
            row += f'{"".join(f"{rank:,} / " for rank in stacked)}{mean:.1f}'.rjust(15)
        rows.append(f'{row}{took:>10}'.rstrip())
        name = took = ''
    if found := layer.get('alignment'):
        cells = ', '.join(f'{what} {values["cos2"]:.3f}' for what, values in found.items())
        rows.append(f'{"aligned":>28}   {cells}')
    return '\n'.join(rows)


def plot(path, title, curves, **settings):
    """A figure with a panel per kind. curves: {kind: [(x, y, style)]}. settings: of the axes."""
    n_rows = -(-len(curves) // 3)
    figure, panels = pyplot().subplots(n_rows, 3, figsize=(13, 0.5 + 3.2 * n_rows),
                                       layout='constrained', squeeze=False)
    for axes, (kind, lines) in zip(panels.flat, curves.items()):
        for x, y, style in lines:
            axes.plot(x, y, **style)
        axes.set(title=kind.upper().replace('_ROPE', ' rotated'), **settings)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0, 0].legend(fontsize=8)
    figure.suptitle(title)
    save_figure(figure, path)


def plot_ranks(path, title, xlabel, points):
    """points: {(kind, share): [(x, rank, rank of noise)]}."""
    curves = collections.defaultdict(list)
    for (kind, share), found in points.items():
        x, ranks, of_noise = zip(*found)
        color, label = f'C{len(curves[kind]) // 2}', f'{percent(share)} of the energy left out'
        curves[kind] += [(x, ranks, dict(color=color, label=label, marker='o', clip_on=False)),
                         (x, of_noise, dict(color=color, linestyle='--'))]
    plot(path, f'{title}; dashed: before training, or noise of the same shapes', curves,
         xlabel=xlabel, ylabel='effective rank', ylim=(0, None))


def plot_spectra(path, title, layer, shares):
    """A curve per head: the energy that the first k singular values leave out, which falls to a
    share at the effective rank."""
    floor = min(shares) / 10  # all singular values leave out nothing, which has no logarithm
    ticks, curves, color = [1, *shares], {}, pyplot().cm.viridis
    for kind in layer['kinds']:
        heads, before = (energy_left(found['kinds'][kind]['heads']).clamp(min=floor)
                         for found in (layer, layer['reference']))
        k, mean = range(heads.size(1)), before.mean(dim=0)
        curves[kind] = [(k, y, dict(color=color(h / len(heads)))) for h, y in enumerate(heads)]
        curves[kind].append((k, mean, dict(color='black', linestyle='--',
                                           label='mean before training, or of noise')))
    plot(path, f'{title}, from the first head (dark) to the last', curves, ylim=(floor, 1),
         xlabel='singular values kept', ylabel='energy left out', yscale='log', yticks=ticks,
         yticklabels=[percent(share) for share in ticks])


def report(folder, title, trained, found, middle, options):
    """Writes svd.json and the plots, and prints in how many layers each kind is clearly below its
    reference, stacked or in the mean over heads. trained: for how long. middle: the layer in
    heads.png."""
    over_layers, over_heads, below = collections.defaultdict(list), {}, collections.Counter()
    from_zero = set()
    for layer in found:
        number, reference = layer['number'], layer['reference']
        for kind, share in itertools.product(layer['kinds'], options.discarded):
            both = [one['kinds'][kind] for one in (layer, reference)]
            ranks, others = (ranks_of(values, share) for values in both)
            over_layers[kind, share].append((number, ranks[0], others[0]))
            if not any(others):
                from_zero.add(kind)
            if share == options.discarded[0]:
                below[kind] += any(a <= CLEARLY_BELOW * b for a, b in zip(ranks, others))
            if number == middle:
                heads = [values['effective_rank'][str(share)]['heads'] for values in both]
                over_heads[kind, share] = zip(itertools.count(), *heads)
        if options.plot_heads:
            plot_spectra(folder / f'spectra-{number}.png', f'{title}, {layer["layer"]}', layer,
                         options.discarded)
    what = 'heads stacked' if options.stacked else 'mean over heads'
    plot_ranks(folder / 'layers.png', f'{title}, {what}', 'layer', over_layers)
    plot_ranks(folder / 'heads.png', f'{title}, layer {middle}', 'head', over_heads)
    results = dict(source=title, trained=trained, layers=found)
    save_text(folder / 'svd.json', json.dumps(results) + '\n')
    counts = ', '.join(f'{kind} in {n} of {len(found)} layers' for kind, n in below.items() if n)
    other = 'noise' if found[0]['reference']['layer'] == 'noise' else 'where it started'
    print(f'\n{trained}: clearly below {other} (at most {CLEARLY_BELOW:.0%} of its rank with '
          f'{percent(options.discarded[0])} of the energy left out): {counts or "nothing"}')
    if from_zero:
        print(f'{", ".join(sorted(from_zero))}: zero before training, so the rank is that of the '
              'updates')
    print(f'{folder}: svd.json, layers.png, heads.png'
          f'{", a spectra-N.png per layer" if options.plot_heads else ""}')


# --------------------------------------------------------------------------------------------------
# the command


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
    check_device(options.device)
    source = Path(paths[0])
    is_run, title = best_checkpoint(source).is_file(), source.resolve().name
    layers, trained = (layers_of_run(source) if is_run else
                       (layers_of_checkpoint(source), 'trained elsewhere'))
    numbers = sorted(options.layers or range(len(layers)))
    middle = numbers[len(numbers) // 2] if options.heads_of is None else options.heads_of
    numbers = sorted({*numbers, middle})
    if numbers[-1] >= len(layers):
        raise UserError(f'layer {numbers[-1]}: {source} has layers 0 to {len(layers) - 1}')
    folder = Path(options.out_dir or (source if is_run else Path('out') / f'svd-{title}'))
    print(f'effective rank with {" or ".join(map(percent, options.discarded))} of the energy left '
          f'out: {"stacked heads / " if options.stacked else ""}mean over heads')
    if options.align:
        print('aligned: mean squared cosine of the principal angles (1: the same subspace) between '
              'what a head writes\nand what other heads write, its layer reads or the next reads')
    found = analyse_layers(layers, numbers, folder / 'svd.jsonl', options)
    report(folder, title, trained, found, middle, options)


if __name__ == '__main__':
    config.run(main)
