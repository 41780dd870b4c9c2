"""How fast configs are on this machine, and which of several runs is better.

    python bench.py config/mla.py config/mla_o.py --micro_batch_size=32
    python bench.py                              # all configs; on a CPU this takes long
    python bench.py attention                    # one layer: from which width on do latents pay?
    python bench.py sweep config/quick.py --learning_rate=3e-3,6e-3 --seed=1,2,3
    python bench.py compare out/sweep-quick/*

With configs it measures training and decoding, in turns, and reports the median of several rounds.
Weights and tokens are random.

Training: steps of train.py on micro_batch_size sequences, or batch_size if that is not set. It
reports tokens/s; the useful FLOPs as a share of the FLOP/s that a large matrix product reaches on
this machine; and the peak memory of a process that does nothing else.

Decoding, for causal models: milliseconds for one token of one sequence at `context` tokens, or
block_size if that is less, with the cache and without. Where tokens cost unlike amounts, the worst
one is reported too. Beside them stands the time to read once the weights that a token needs.

attention: one layer of MHA, of grouped-query attention (GQA) that caches about as much as MLA, of
MLA and of MLA-o. It compares their times, forward and backward and in decoding, and their FLOPs,
over widths, heads, latents and lengths.

sweep: one run of train.py for each combination of the values, which are separated by commas. Runs
that are done are skipped.

compare: runs that differ in their seed alone form a group. For each group it prints mean and 95%
interval of the validation loss at the end, after equally many tokens and after equally many
seconds, and of the tokens and seconds until the loss that all runs reach.
"""

import csv
import difflib
import itertools
import json
import multiprocessing
import statistics
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import torch.nn as nn

import config
import train
from config import UserError
from model import (ARCHITECTURES, BlockConfig, Cache, Count, ModelConfig, Range, block_flops,
                   make_attention, make_rope, rope_table)
from run import (Machine, MachineOptions, best_checkpoint, build, load_checkpoint,
                 mean_and_interval, pyplot, read_metrics)
from train import (TrainOptions, compiled, current_options, make_optimizers, predicted_share,
                   split_options, train_step)

CACHED_TOKENS = 16  # decoded in a round, fewer if the context is short; grouped latents: a group
Context = Annotated[int, Range(least=2)]  # a token to go on from, and one to decode


@dataclass
class BenchOptions(MachineOptions):
    """Options"""

    context: Context = 200  # tokens of context when decoding, at most block_size
    rounds: Count = 5  # of which the median is reported
    json: bool = False  # print a list of dicts instead of the tables
    profile: str | None = None  # file for a profiler trace of one more round, for Perfetto
    results: str = 'out/bench'  # folder for the files that attention and compare write

    def __post_init__(self):
        if self.profile:
            path = Path(self.profile)
            if path.is_dir() or not path.parent.is_dir():
                raise UserError(f'profile={self.profile}: takes the name of a file in a folder '
                                'that exists')


KNOWN = (BenchOptions, TrainOptions, BlockConfig, ModelConfig,
         *(config_class for _, config_class in ARCHITECTURES.values()))


def read_options(arguments, *known):
    """The BenchOptions of a command line. Options of training and of models are checked by name:
    they are for the configs."""
    values, _ = config.load(arguments, *(known or KNOWN), doc=__doc__, takes_config=False)
    names = {option.name for option in fields(BenchOptions)}
    return BenchOptions(**{name: value for name, value in values.items() if name in names})


def clock(device, work, *arguments, repeat=1, **keywords):
    """Seconds until the device has done work(*arguments, **keywords), `repeat` times."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(repeat):
        work(*arguments, **keywords)
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


# --------------------------------------------------------------------------------------------------
# configs: training and decoding


class RandomBatch:
    """Stands in for a Loader of train.py: a batch of random tokens, the same at every step."""

    def __init__(self, n_sequences, model_config, share):
        """share: how much of the tokens is predicted; in an encoder those positions are random."""
        c = model_config
        idx = torch.randint(c.vocab_size, (n_sequences, c.block_size))  # (B, T)
        self.n_sequences, self.n_tokens = n_sequences, idx.numel()
        self.tensors = idx, idx
        if not c.block.causal:
            order = torch.rand(n_sequences, c.block_size).argsort(dim=1)
            positions = order[:, :round(share * c.block_size)]  # (B, M)
            self.tensors = idx, idx.gather(1, positions), positions

    def batch(self, numbers):
        return self.tensors


class Subject:
    """A config under measurement: its model, a batch to train on, a context to decode from."""

    def __init__(self, path, overrides, machine):
        flat, self.name = config.load([str(path), *overrides], *KNOWN)
        own = {option.name for option in fields(BenchOptions)}
        own -= {option.name for option in fields(MachineOptions)}
        flat = {name: value for name, value in flat.items() if name not in own}
        self.recipe, model_options = split_options(flat)
        self.machine = machine
        torch.manual_seed(self.recipe.seed)
        self.model = build(self.recipe.arch, model_options).to(machine.device)
        self.runner = compiled(self.recipe, self.model, machine)
        self.optimizers = make_optimizers(self.model, self.recipe)
        c, share = self.model.config, predicted_share(self.recipe, self.model.config)
        self.causal = c.block.causal
        self.data = RandomBatch(self.recipe.micro_batch_size or self.recipe.batch_size, c, share)
        self.flops = self.data.n_tokens * self.model.flops_per_token(c.block_size, share)
        self.milliseconds = []  # a dict for each round

    def step(self):
        """A step of training."""
        train_step(self.runner.train(), self.optimizers, self.data, 0, self.recipe, self.machine,
                   self.data.n_sequences, 1)

    def prepare_decoding(self, context):
        """Makes what `decode` needs: a sequence, a cache, and the weights that a token needs."""
        c, model, device = self.model.config, self.model, self.machine.device
        self.context = min(context, c.block_size)
        if self.context < 2:
            raise UserError(f'block_size={c.block_size}: decoding takes two tokens, one to go on '
                            'from and one to decode')
        self.n_cached = min(getattr(c, 'group_size', CACHED_TOKENS), self.context - 1)
        self.idx = torch.randint(c.vocab_size, (1, self.context), device=device)
        self.cache = model.init_cache(1, self.context)
        # of an embedding a token needs one row, unless it is the head too
        embeddings = {id(module.weight) for module in model.modules()
                      if isinstance(module, nn.Embedding)} - {id(model.head_weight())}
        needed = [parameter.detach().flatten() for parameter in model.parameters()
                  if id(parameter) not in embeddings]
        self.weights = torch.cat(needed).to(self.machine.precision)

    @torch.no_grad()
    def decode(self):
        """Milliseconds: of each of the last tokens with the cache, of the very last one without it,
        and of reading the weights."""
        device, model = self.machine.device, self.model.eval()
        first = self.context - self.n_cached
        last = torch.full((1, 1), self.context - 1, device=device)
        cached = []
        with self.machine.autocast():
            self.cache.n_tokens = 0
            model(self.idx[:, :first], cache=self.cache)
            for t in range(first, self.context):
                token = self.idx[:, t:t + 1]
                cached.append(1e3 * clock(device, model, token, cache=self.cache))
            uncached = 1e3 * clock(device, model, self.idx, positions=last)
            read = 1e3 * clock(device, self.weights.sum)
        return dict(cached=cached, uncached=uncached, read=read)

    def measure(self):
        """Milliseconds of a step, and of decoding for a causal model."""
        measured = dict(step=1e3 * clock(self.machine.device, self.step))
        return measured | self.decode() if self.causal else measured

    def median(self, name):
        return statistics.median(measured[name] for measured in self.milliseconds)

    def report(self, peak, memory):
        """What --json=True prints of it. peak: FLOP/s of matrix products; memory: bytes."""
        seconds = self.median('step') / 1e3
        line = dict(
            config=self.name, params=self.model.n_params(), sequences=self.data.n_sequences,
            block_size=self.model.config.block_size,
            train_tokens_per_s=self.data.n_tokens / seconds,
            train_matmul_share=self.flops / seconds / peak, matmul_peak_flops_per_s=peak,
            peak_memory_bytes=memory)
        if not self.causal:
            return line
        rounds = zip(*(measured['cached'] for measured in self.milliseconds))
        cached = [statistics.median(token) for token in rounds]  # of each token
        return line | dict(
            context=self.context, decode_ms_per_token=statistics.mean(cached),
            decode_ms_per_token_worst=max(cached),
            decode_ms_per_token_uncached=self.median('uncached'),
            weights_read_ms=self.median('read'),
            cache_bytes_per_token=self.model.cache_bytes_per_token(self.machine.precision),
            cache_bytes_per_token_counted=self.cache.n_bytes() / self.context)


def matmul_peak(machine):
    """FLOP/s of a square matrix product that is large for the device, in the precision in which it
    trains."""
    n = 8192 if machine.cuda else 2048
    a, b, out = torch.randn(3, n, n, device=machine.device).to(machine.precision)
    return 2 * n ** 3 / min(clock(machine.device, torch.mm, a, b, out=out) for _ in range(3))


def memory_of(path, overrides):
    """Peak memory in bytes, of its GPU if it has one, else in all, of a process of its own that
    trains a config."""
    with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as fresh:
        return fresh.submit(peak_memory, path, overrides).result()


def peak_memory(path, overrides):
    machine = Machine(read_options(overrides))
    subject = Subject(path, overrides, machine)
    subject.step()
    subject.step()  # only now are there activations and gradients beside the optimizer's state
    return round(machine.memory_gb() * 2 ** 30)


def measure_configs(paths, overrides, options):
    """The lines of the report, after a round to warm up and `rounds` rounds that count."""
    machine = Machine(options)
    subjects = [Subject(path, overrides, machine) for path in paths]
    memory = [memory_of(path, overrides) for path in paths]
    for subject in subjects:
        if subject.causal:
            subject.prepare_decoding(options.context)
    peaks = []
    for i in range(options.rounds + 1):
        end = '\n' if i == options.rounds else ''
        print(f'\rround {i} of {options.rounds}', end=end, file=sys.stderr, flush=True)
        peaks.append(matmul_peak(machine))
        for subject in subjects:
            measured = subject.measure()
            if i > 0:
                subject.milliseconds.append(measured)
    if options.profile:
        with torch.profiler.profile() as trace:
            for subject in subjects:
                subject.measure()
        trace.export_chrome_trace(options.profile)
    return [subject.report(max(peaks), n_bytes) for subject, n_bytes in zip(subjects, memory)]


def show(lines):
    """Prints a table of training, and one of decoding."""
    peak = lines[0]['matmul_peak_flops_per_s'] / 1e9
    print(f'training: matrix products reach {peak:,.0f} GFLOP/s here\n')
    print(f'{"":22}{"parameters":>12}{"sequences":>16}{"tokens/s":>11}{"of the peak":>13}'
          f'{"memory, GB":>12}')
    for line in lines:
        print(f'{line["config"]:22}{line["params"]:12,}'
              f'{line["sequences"]:9} x{line["block_size"]:5}'
              f'{line["train_tokens_per_s"]:11,.0f}{line["train_matmul_share"]:13.1%}'
              f'{line["peak_memory_bytes"] / 2 ** 30:12.2f}')
    decoding = [line for line in lines if 'context' in line]
    if not decoding:
        return
    print('\ndecoding, ms a token\n')
    print(f'{"":22}{"context":>9}{"cached":>9}{"worst":>9}{"uncached":>10}{"weights":>9}'
          f'{"ratio":>7}{"cache bytes a token":>23}')
    print(f'{"":58}{"read":>10}{"formula / counted":>31}')
    for line in decoding:
        ms, read = line['decode_ms_per_token'], line['weights_read_ms']
        print(f'{line["config"]:22}{line["context"]:9,}{ms:9.2f}'
              f'{line["decode_ms_per_token_worst"]:9.2f}'
              f'{line["decode_ms_per_token_uncached"]:10.2f}{read:9.2f}{ms / read:7.1f}'
              f'{line["cache_bytes_per_token"]:13,.0f} / '
              f'{line["cache_bytes_per_token_counted"]:,.0f}')


# --------------------------------------------------------------------------------------------------
# attention: one layer


WIDTHS, LENGTHS, HEADS = (128, 256, 512, 1024, 2048), (128, 512, 2048), (32, 64)
MORE_WIDTHS = 4096, 8192  # nothing is timed at these, FLOPs alone are counted
# widths of the query, key-value and output latents, as shares of the width of the layer
LATENTS = {'DeepSeek-V3': (3 / 14, 1 / 14, 3 / 14), 'half of it': (3 / 28, 1 / 28, 3 / 28)}
KINDS = 'MHA', 'GQA', 'MLA', 'MLA-o'
PAIRS = ('MLA', 'MHA'), ('MLA', 'GQA'), ('MLA-o', 'MLA')  # the first is compared to the second
MEASURED = dict(train_us_a_token='forward and backward', decode_us='decoding')
COSTS = MEASURED | dict(mflop_a_token='FLOPs')


def make_layer(kind, width, head_dim, latents):
    """One attention. Half of the dimensions of a head are rotary; MLA has them on a key that all
    heads share. GQA has the fewest key heads with which it caches at least as much as MLA."""
    n_head = width // head_dim
    q, kv, o = (max(8, round(width * share / 8) * 8) for share in LATENTS[latents])
    options = dict(n_embd=width, n_head=n_head, rope_dims=head_dim // 2)
    if kind == 'GQA':
        mla_caches = kv + head_dim // 2
        possible = [n for n in range(1, n_head + 1) if n_head % n == 0]
        enough = [n for n in possible if 2 * n * head_dim >= mla_caches]
        options['n_kv_head'] = enough[0] if enough else n_head
    elif kind != 'MHA':
        options |= dict(attention='mla', q_latent=q, kv_latent=kv, rope_key='shared',
                        o_latent=o if kind == 'MLA-o' else None)
    return make_attention(BlockConfig(**options))


def layer_flops(layer, T):
    """Forward and backward FLOPs a token."""
    return 3 * block_flops(layer, 1, 1, (T + 1) / 2)


def formulas(width, T, head_dim, latents):
    """{kind: what is known without measuring} of the four attentions at one size."""
    lines = {}
    for kind in KINDS:
        with torch.device('meta'):
            layer = make_layer(kind, width, head_dim, latents)
        lines[kind] = dict(
            attention=kind, width=width, head_dim=head_dim, latents=latents, T=T,
            params=sum(parameter.numel() for parameter in layer.parameters()),
            cache_numbers=layer.cache_width(), mflop_a_token=layer_flops(layer, T) / 1e6)
    return lines


class Layer:
    """An attention under measurement, with a cache that has all tokens of x but the last one."""

    def __init__(self, attention, x, machine):
        """x: (B, T, width), input and target of the gradient."""
        self.attention, self.x, self.machine = attention.to(machine.device), x, machine
        table = rope_table(x.size(1), attention.rope_dims, ModelConfig.rope_theta)
        self.rope = make_rope(table.to(machine.device))
        self.cache = Cache(1, x.size(1))
        self.decode(x[:1])
        self.cache.n_tokens = x.size(1) - 1
        self.train_seconds, self.decode_seconds = [], []  # of each round

    def forward_backward(self):
        with self.machine.autocast():
            y = self.attention(self.x, rope=self.rope)
        y.backward(y.detach())
        self.attention.zero_grad()
        self.x.grad = None

    @torch.no_grad()
    def decode(self, new):
        with self.machine.autocast():
            self.attention(new, rope=self.rope, cache=self.cache)


def measure_layers(width, T, head_dim, latents, rounds, machine):
    """{kind: a line of the csv} of the four attentions at one size, on T tokens or 1,024, if that
    is more."""
    x = torch.randn(max(1, 1024 // T), T, width, device=machine.device, requires_grad=True)
    layers = {kind: Layer(make_layer(kind, width, head_dim, latents), x, machine)
              for kind in KINDS}
    for i in range(rounds + 1):
        for layer in layers.values():
            train_seconds = repeated(machine.device, layer.forward_backward)
            decode_seconds = repeated(machine.device, layer.decode, x[:1, :1])
            if i > 0:  # the first round warms up
                layer.train_seconds.append(train_seconds)
                layer.decode_seconds.append(decode_seconds)
    lines, n_tokens = formulas(width, T, head_dim, latents), x.size(0) * T
    for kind, layer in layers.items():
        lines[kind] |= dict(
            train_us_a_token=1e6 * statistics.median(layer.train_seconds) / n_tokens,
            decode_us=1e6 * statistics.median(layer.decode_seconds))
    return lines


def repeated(device, work, *arguments):
    """Seconds of work(*arguments), which is repeated until the clock has something to measure."""
    n = 1
    while (seconds := clock(device, work, *arguments, repeat=n)) < 0.01:
        n *= 4
    return seconds / n


def cost_ratio(lines, a, b, cost):
    """What attention `a` costs, over what `b` costs. lines: from formulas or measure_layers."""
    return lines[a][cost] / lines[b][cost]


def attention(overrides):
    """Measures single layers: a csv, a table of ratios, a plot, and from which width on one
    attention is cheaper than another."""
    options = read_options(overrides, BenchOptions)
    machine, folder = Machine(options), config.make_folder(options.results, 'results')
    table = {}  # (head_dim, latents, T, width): {kind: line}
    for head_dim, latents, T, width in itertools.product(HEADS, LATENTS, LENGTHS, MORE_WIDTHS):
        table[head_dim, latents, T, width] = formulas(width, T, head_dim, latents)
    pairs = ', '.join(f'{a} / {b}' for a, b in PAIRS)
    print(f'{"":40}time of {pairs}: {" | ".join(COSTS.values())}')
    for head_dim, latents, T, width in itertools.product(HEADS, LATENTS, LENGTHS, WIDTHS):
        lines = measure_layers(width, T, head_dim, latents, options.rounds, machine)
        table[head_dim, latents, T, width] = lines
        shown = ' | '.join(' '.join(f'{cost_ratio(lines, a, b, cost):5.2f}' for a, b in PAIRS)
                           for cost in COSTS)
        print(f'latents {latents:12} heads of {head_dim} T {T:5,} width {width:5,}: {shown}',
              flush=True)
    write_csv(folder / 'attention.csv', table)
    print()
    for (a, b), (cost, what) in itertools.product(PAIRS, COSTS.items()):
        print(f'{a} against {b}, {what}: {crossover(table, a, b, cost)}')
    plot_attention(folder / 'attention.png', table)
    print(f'\n{folder}: attention.csv, attention.png')


def write_csv(path, table):
    """A line for each attention at each size. What is not measured stays empty."""
    lines = [line for size in sorted(table) for line in table[size].values()]
    with open(path, 'w', newline='') as file:
        writer = csv.DictWriter(file, max(lines, key=len))  # the columns of a line with all of them
        writer.writeheader()
        writer.writerows(lines)


def crossover(table, a, b, cost):
    """Where `a` is cheaper than `b`, in words: for latents, heads and lengths the least width from
    which on it always is."""
    words, widths = [], WIDTHS if cost in MEASURED else WIDTHS + MORE_WIDTHS
    for latents, head_dim in itertools.product(LATENTS, HEADS):
        least = []  # for each length
        for T in LENGTHS:
            dearer = [width for width in widths
                      if cost_ratio(table[head_dim, latents, T, width], a, b, cost) >= 1]
            cheaper = [width for width in widths if width > max(dearer, default=0)]
            least.append(f'{cheaper[0]:,}' if cheaper else 'never')
        words.append(f'{latents}, heads of {head_dim}: {" / ".join(least)}')
    return f'cheaper from width (T {" / ".join(map(str, LENGTHS))}) ' + '; '.join(words)


def plot_attention(path, table):
    """Ratios of time over width, a line for each length: the first LATENTS, the widest heads."""
    plt = pyplot()
    figure, panels = plt.subplots(2, len(PAIRS), figsize=(12, 7), sharey='row',
                                  layout='constrained')
    latents, head_dim = next(iter(LATENTS)), HEADS[-1]
    for row, (cost, what) in zip(panels, MEASURED.items()):
        for axes, (a, b) in zip(row, PAIRS):
            for i, T in enumerate(LENGTHS):
                sizes = [table[head_dim, latents, T, width] for width in WIDTHS]
                times = [cost_ratio(lines, a, b, cost) for lines in sizes]
                axes.plot(WIDTHS, times, marker='o', color=f'C{i}', label=f'T {T:,}')
                if cost == 'train_us_a_token':
                    flops = [cost_ratio(lines, a, b, 'mflop_a_token') for lines in sizes]
                    axes.plot(WIDTHS, flops, linestyle=':', color=f'C{i}')
            axes.axhline(1, color='black', linewidth=0.8)
            axes.set(title=f'{a} / {b}, {what}', xscale='log', xticks=WIDTHS, xticklabels=WIDTHS,
                     xlabel='width', ylim=(0, None))
            axes.minorticks_off()
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)
        row[0].set_ylabel('ratio of times, 1 = equal')
    figure.suptitle(f'one layer, heads of {head_dim}, latents at the ratios of {latents}; '
                    'dotted: FLOPs')
    figure.savefig(path, dpi=120)
    plt.close(figure)


# --------------------------------------------------------------------------------------------------
# sweep: a grid of runs


def values_of(argument):
    """'--key=a,b' -> ('key', ['a', 'b']). Commas inside brackets belong to a value."""
    key, _, text = argument.removeprefix('--').partition('=')
    values, depth = [''], 0
    for character in text:
        depth += (character in '([') - (character in ')]')
        if character == ',' and depth == 0:
            values.append('')
        else:
            values[-1] += character
    return key, values


def read_grid(arguments):
    """(path of the config, {option: its values}) of a sweep's command line."""
    paths = [argument for argument in arguments if not argument.startswith('--')]
    if len(paths) != 1:
        raise UserError('which config? python bench.py sweep CONFIG --key=a,b,c')
    grid = dict(values_of(argument) for argument in arguments if argument.startswith('--'))
    for key, values in grid.items():
        if len(set(values)) < len(values):
            raise UserError(f'{key}={",".join(values)}: names a value twice')
    for key in ('out_dir', 'init_from', 'dry_run', 'eval_only'):
        if key in grid:
            raise UserError(f'{key} is not for sweep, which trains each run in a folder of its '
                            'own: leave it out')
    return paths[0], grid


def runs_of(path, grid):
    """{folder: options} of the runs of a sweep. A folder is named after the options that vary."""
    parent, runs = Path('out') / f'sweep-{Path(path).stem}', {}
    varied = [key for key, values in grid.items() if len(values) > 1]
    for values in itertools.product(*grid.values()):
        options = dict(zip(grid, values))
        name = ','.join(f'{key}={options[key]}' for key in varied)
        runs[parent / (name or 'run')] = options
    return runs


def read_run_options(run):
    """The options of a run as its config.json has them, but for those that no longer exist."""
    try:
        saved = json.loads((Path(run) / 'config.json').read_text())
    except (OSError, ValueError) as error:
        raise UserError(f'{run}/config.json: cannot be read ({error}): name the folder of a run '
                        'of train.py') from None
    return current_options(saved)


def is_done(folder):
    """Whether a run has come to its last step, or to the end of its time."""
    scored = [line for line in read_metrics(folder) if 'val_loss' in line]
    if not scored:
        return False
    options, last = read_run_options(folder), scored[-1]
    max_seconds = options['max_seconds'] or float('inf')
    return last['step'] >= options['max_iters'] or last['seconds'] >= max_seconds


def check_run(path, folder, options):
    """Raises UserError on options that train.py would refuse, and on a folder that holds a run with
    others."""
    command = [path, *(f'--{key}={value}' for key, value in options.items())]
    recipe, model_options, _ = train.read_options(command)
    with torch.device('meta'):
        build(recipe.arch, model_options)
    if not (folder / 'config.json').exists():
        return
    saved = read_run_options(folder)
    values, _ = config.load(command, *KNOWN[1:])
    for key, value in values.items():
        follows = value is None  # from other options
        if key in saved and not follows and saved[key] != json.loads(json.dumps(value)):
            raise UserError(f'{folder} holds a run with {key}={saved[key]}, not {value}: move it '
                            'away')


def train_run(path, folder, options):
    """Trains a run of a sweep in a process of its own, or goes on with one that was cut off."""
    process = subprocess.Popen([
        sys.executable, str(Path(__file__).with_name('train.py')), path, f'--out_dir={folder}',
        '--init_from=auto', *(f'--{key}={value}' for key, value in options.items())])
    try:
        status = process.wait()
    except KeyboardInterrupt:  # the run has had it too: it finishes its step and saves
        process.wait()
        raise
    if status or not is_done(folder):
        raise UserError(f'{folder}: the run did not finish (status {status}); the same command '
                        'goes on from here')


def sweep(arguments):
    """Runs train.py for every combination of values, one after the other."""
    if '--help' in arguments:
        return read_options(['--help'])
    path, grid = read_grid(arguments)
    runs = runs_of(path, grid)
    for folder, options in runs.items():  # all of them are checked before the first one runs
        check_run(path, folder, options)
    for i, (folder, options) in enumerate(runs.items(), 1):
        done = is_done(folder)
        print(f'{i} of {len(runs)}: {folder}{" is done" if done else ""}', flush=True)
        if not done:
            train_run(path, folder, options)
    print('\npython bench.py compare ' + ' '.join(map(str, runs)))


# --------------------------------------------------------------------------------------------------
# compare: groups of runs


class FinishedRun(NamedTuple):
    """A run to compare."""

    options: dict  # those that tell one group from another
    lines: list  # of metrics.jsonl, those with a validation loss
    losses_of: tuple  # what has to be the same if losses are to be compared


def read_run(folder):
    origin = load_checkpoint(best_checkpoint(folder)).get('provenance', {})
    lines = [line for line in read_metrics(folder) if 'val_loss' in line]
    if not lines:
        raise UserError(f'{folder}: metrics.jsonl has no validation loss')
    options = read_run_options(folder) | dict(init_from=origin.get('started_from', 'scratch'))
    losses_of = origin.get('data_sha256'), origin.get('tokenizer'), options.get('causal', True)
    own = 'seed', 'out_dir', 'wandb', 'device', 'log_interval', 'dry_run', 'eval_only'
    shared = {name: value for name, value in options.items() if name not in own}
    return FinishedRun(shared, lines, losses_of)


def group_runs(runs):
    """{label: metrics of the runs}, a group for each combination of options. Its label names the
    options in which the groups differ."""
    names = {name for run in runs for name in run.options}
    differ = sorted(name for name in names
                    if any(run.options.get(name) != runs[0].options.get(name) for run in runs))
    groups = {}
    for run in runs:
        label = ', '.join(f'{name}={run.options.get(name)}' for name in differ)
        groups.setdefault(label or 'all options the same', []).append(run.lines)
    return groups


def loss_at(lines, key, x):
    """Validation loss at x tokens or seconds, on the straight line between two evaluations."""
    losses = [line['val_loss'] for line in lines]
    return float(np.interp(x, [line[key] for line in lines], losses))


def spent_until(lines, key, loss):
    """Tokens or seconds until a run first has a validation loss, on the straight line between two
    evaluations."""
    later = next(i for i, line in enumerate(lines) if line['val_loss'] <= loss)
    before, after = lines[max(later - 1, 0)], lines[later]
    falling = [-before['val_loss'], -after['val_loss']]  # np.interp wants them in rising order
    return float(np.interp(-loss, falling, [before[key], after[key]]))


def compare(arguments):
    """Prints a table of groups of runs, and plots them."""
    folders = [argument for argument in arguments if not argument.startswith('--')]
    overrides = [argument for argument in arguments if argument.startswith('--')]
    options = read_options(overrides, BenchOptions)
    if len(set(folders)) < max(len(folders), 2):
        raise UserError('compares two runs or more, each named once: '
                        'python bench.py compare RUN RUN ...')
    runs = [read_run(folder) for folder in folders]
    for folder, run in zip(folders, runs):
        if run.losses_of != runs[0].losses_of:
            raise UserError(f'{folder} and {folders[0]} were trained on different data, with '
                            'different tokenizers, or are an encoder and a causal model: their '
                            'losses are not of the same thing')
    groups, all_lines = group_runs(runs), [run.lines for run in runs]
    # what every run has spent, and the loss that every run has reached
    spent = {key: min(lines[-1][key] for lines in all_lines) for key in ('tokens', 'seconds')}
    reached = max(min(line['val_loss'] for line in lines) for lines in all_lines)
    table = [compare_group(label, group, spent, reached) for label, group in groups.items()]
    folder = config.make_folder(options.results, 'results')
    plot_groups(folder / 'compare.png', groups)
    if options.json:
        print(json.dumps(table, indent=2))
        return
    show_groups(table, spent, reached)
    evaluated = {run.options['eval_iters'] * run.options['batch_size'] for run in runs}
    if len(evaluated) > 1:
        print('\nthese runs were evaluated on different numbers of sequences '
              '(eval_iters x batch_size)')
    print(f'\n{folder / "compare.png"}')


def compare_group(label, group, spent, reached):
    """A line of the table: each entry is the mean over the runs and half its 95% interval."""
    values = {'end': [lines[-1]['val_loss'] for lines in group]}
    for key, x in spent.items():
        values[key] = [loss_at(lines, key, x) for lines in group]
    for key in spent:
        values[f'{key}_to_loss'] = [spent_until(lines, key, reached) for lines in group]
    means = {key: mean_and_interval(of_runs) for key, of_runs in values.items()}
    return dict(options=label, runs=len(group), **means)


def show_groups(table, spent, reached):
    """Prints the table, the group with the lowest loss at the end first."""
    columns = (('end', 'at the end', '.4f'),
               ('tokens', f'at {spent["tokens"]:,} tokens', '.4f'),
               ('seconds', f'at {spent["seconds"]:,.0f} seconds', '.4f'),
               ('tokens_to_loss', f'tokens to {reached:.4f}', ',.0f'),
               ('seconds_to_loss', f'seconds to {reached:.4f}', ',.0f'))
    print('validation loss, nats, and what it takes to reach the one that all do; mean and 95% '
          'interval over seeds\n')
    print(' runs' + ''.join(title.rjust(24) for _, title, _ in columns))
    for line in sorted(table, key=lambda line: line['end'][0]):
        cells = []
        for key, _, form in columns:
            mean, interval = line[key]
            cell = format(mean, form)
            cells.append(cell if interval is None else f'{cell} +- {format(interval, form)}')
        print(f'{line["runs"]:5}' + ''.join(cell.rjust(24) for cell in cells)
              + f'   {line["options"]}')


def plot_groups(path, groups):
    """Validation loss over tokens and over seconds, a colour for each group and a line for each
    run."""
    plt = pyplot()
    figure, panels = plt.subplots(1, 2, figsize=(12, 4.5), sharey=True, layout='constrained')
    for axes, key in zip(panels, ('tokens', 'seconds')):
        for i, (label, group) in enumerate(groups.items()):
            for n, lines in enumerate(group):
                axes.plot([line[key] for line in lines], [line['val_loss'] for line in lines],
                          color=f'C{i % 10}', alpha=0.7, marker='.', label=None if n else label)
        axes.set(xlabel=key, ylabel='validation loss (nats)')
        axes.grid(alpha=0.3)
    labels = ['\n'.join(textwrap.wrap(label, 140)) for label in groups]
    handles, _ = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=7, loc='outside lower center')
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main():
    commands = dict(attention=attention, sweep=sweep, compare=compare)
    arguments = sys.argv[1:]
    if arguments and arguments[0] in commands:
        return commands[arguments[0]](arguments[1:])
    paths = [argument for argument in arguments if not argument.startswith('--')]
    overrides = [argument for argument in arguments if argument.startswith('--')]
    options = read_options(overrides)
    for path in paths:
        near = difflib.get_close_matches(path, commands, 1)
        if near and not Path(path).exists():
            raise UserError(f'{path}: there is no such config file; did you mean bench.py '
                            f'{near[0]}?')
    paths = paths or sorted(Path(__file__).parent.glob('config/[!_]*.py'))
    lines = measure_configs(paths, overrides, options)
    if options.json:
        print(json.dumps(lines, indent=2))
    else:
        show(lines)


if __name__ == '__main__':
    config.run(main)
