"""Speed and memory of configs on this machine, or of single attention layers.

    python bench.py config/mla.py config/mla_o.py
    python bench.py config/mla.py --micro_batch_size=4 --dtype=bfloat16
    python bench.py                              # all configs; takes long on a CPU
    python bench.py attention                    # one layer: from which width on do latents pay?
    python bench.py attention --layer_widths=512,1024 --lengths=4096 --head_dims=64

Configs take turns; figures are medians over several rounds. Weights and tokens are random. Options
of train.py override those of the configs: `python train.py CONFIG --help` lists them.

Training: optimizer steps of train.py on one micro-batch. Reports tokens/s; useful FLOP/s as a share
of what a large matrix product reaches here; and the peak memory of a process that does only this.

Decoding, for causal models: milliseconds per token of one sequence at `context` tokens (at most
block_size), with the cache and without; of the slowest token, where they take unequal times; the
time to read the weights once; tokens/s of one sequence and of 16 together; and the bytes of the
cache per token. Sampling from the logits is not included.

attention: one layer of MHA, of grouped-query attention that caches about as much as MLA, of MLA, of
MLA-o and of their relatives, over widths, heads and lengths: time forward and backward (compiled on
CUDA), time to decode one token, and FLOPs. Writes attention.csv and attention.png into `results`.
"""

import concurrent.futures
import contextlib
import copy
import functools
import itertools
import json
import multiprocessing
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import numpy as np
import pandas as pd
import torch
import torch.nn as nn

import config
from config import UserError
from model import (ARCHITECTURES, BlockConfig, Cache, Count, ModelConfig, Range, count_flops,
                   make_attention, rope_table, training_flops)
from run import Device, DeviceOptions, build, pyplot, save_figure, save_text
from train import (TrainOptions, accumulation, compiled, make_optimizers, predicted_share,
                   split_options, train_step)

CACHED_TOKENS = 16  # decoded per round, fewer if the context is short; grouped latents: one group
DECODED_TOGETHER = 16  # sequences
Context = Annotated[int, Range(least=2)]  # one token to go on from, and one to decode


@dataclass
class BenchOptions:
    """Options"""

    context: Context = 200  # tokens of context when decoding, at most block_size
    rounds: Count = 5  # a figure is the median over these
    json: bool = False  # print a list of dicts instead of the tables
    profile: str | None = None  # file for a profiler trace of one more round, for Perfetto


@dataclass
class AttentionOptions:
    """Options of attention"""

    layer_widths: tuple[Count, ...] = (128, 256, 512, 1024, 2048)  # of the layers that are timed
    more_widths: tuple[Count, ...] = (4096, 8192)  # of layers whose FLOPs alone are counted
    lengths: tuple[Count, ...] = (128, 512, 2048)  # tokens per sequence
    head_dims: tuple[Count, ...] = (32, 64)  # width of a head
    tokens: Count | None = None  # tokens per batch, at least a sequence; None: 1024, CUDA 65536
    rounds: Count = 5  # a figure is the median over these; with 1, decoding is mostly noise
    compile: bool | None = None  # torch.compile; None = on CUDA only
    results: str = 'out/bench'  # folder for attention.csv and attention.png

    def __post_init__(self):
        for head_dim, width in itertools.product(self.head_dims, self.layer_widths
                                                 + self.more_widths):
            if head_dim % 4 or width % (2 * head_dim):
                raise UserError(f'head_dims={self.head_dims}: must be multiples of 4 that divide '
                                f'each width into an even number of heads, and not {width} into '
                                f'heads of {head_dim}')


KNOWN = (BenchOptions, TrainOptions, BlockConfig, ModelConfig,
         *(config_class for _, config_class in ARCHITECTURES.values()))


def read_options(overrides, *known):
    """The options of the first of the dataclasses `known`. --help prints these and the device."""
    values, _ = config.load(overrides, *known, doc=__doc__, takes_config=False,
                            shown=lambda values: (known[0], DeviceOptions))
    return known[0](**{option.name: values[option.name] for option in fields(known[0])
                       if option.name in values})


@functools.cache
def device_for(device, dtype, trains=True):
    """A Device, always the same one: whether dtype=auto finds bfloat16 faster is a measurement."""
    return Device(DeviceOptions(device=device, dtype=dtype), trains)


def clock(device, work, *arguments, **keywords):
    """Seconds until the device has done work(*arguments, **keywords)."""
    wait = torch.accelerator.synchronize if device.type != 'cpu' else lambda device: None
    wait(device)
    start = time.perf_counter()
    work(*arguments, **keywords)
    wait(device)
    return time.perf_counter() - start


# --------------------------------------------------------------------------------------------------
# configs: training and decoding


class Benchmark:
    """A config under measurement."""

    def __init__(self, path, overrides, context=BenchOptions.context):
        flat, self.name = config.load([str(path), *overrides], *KNOWN)
        for option in fields(BenchOptions):
            flat.pop(option.name, None)
        self.recipe, model_options = split_options(flat)
        device = self.device = device_for(self.recipe.device, self.recipe.dtype)
        self.decoder = device_for(self.recipe.device, self.recipe.dtype, trains=False)
        torch.manual_seed(self.recipe.seed)
        self.model = build(self.recipe.arch, model_options).to(device.torch_device)
        self.runner = compiled(self.recipe, self.model, device)
        self.optimizers = make_optimizers(self.model, self.recipe)
        c, self.rounds = self.model.config, []
        self.causal, self.context = c.causal, min(context, c.block_size)
        if self.context < 2:
            raise UserError(f'block_size={c.block_size}: must be at least 2, to decode a token '
                            'after another')
        self.n_sequences, _ = accumulation(self.recipe, c.block_size, device)
        self.share = predicted_share(self.recipe, c)
        self.flops = training_flops(self.model, c.block_size, self.share)  # per token
        batch = self.random_batch()
        self.data = SimpleNamespace(batch=lambda numbers: batch)  # stands in for a Loader

    def random_batch(self):
        """What a Loader of train.py returns, with random tokens and random masked positions."""
        c = self.model.config
        idx = torch.randint(c.vocab_size, (self.n_sequences, c.block_size))  # (B, T)
        if self.causal:
            return idx, idx
        order = torch.rand(idx.shape).argsort(dim=1)
        positions = order[:, :round(self.share * c.block_size)]  # (B, M)
        return idx, idx.gather(1, positions), positions

    def train_step(self):
        train_step(self.runner.train(), self.optimizers, self.data, 0, self.recipe, self.device,
                   self.n_sequences, 1)

    def decode_cached(self, idx):
        """(seconds for each of the last tokens of idx (B, T), the cache that they filled)."""
        n = min(getattr(self.model.config, 'group_size', CACHED_TOKENS), self.context - 1)
        cache = self.model.init_cache(len(idx), self.context)
        self.model(idx[:, :-n], cache=cache)
        return [clock(self.device.torch_device, self.model, token, cache=cache)
                for token in idx[:, -n:].split(1, dim=1)], cache

    @torch.inference_mode()
    def decode(self):
        """Seconds to decode tokens of one sequence and of many; one token without the cache; and to
        read the weights that a token needs. And the cache's bytes per token."""
        model, device = self.model.eval(), self.device.torch_device
        idx = torch.randint(model.config.vocab_size, (DECODED_TOGETHER, self.context),
                            device=device)
        last = torch.full((1, 1), self.context - 1, device=device)
        # of an embedding a token reads one row, unless it is the output head too
        head = model.tok_emb if model.config.tie_embeddings else model.lm_head
        embeddings = {id(module.weight) for module in model.modules()
                      if isinstance(module, nn.Embedding) and module is not head}
        weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()
                             if id(parameter) not in embeddings]).to(self.decoder.precision)
        with self.decoder.autocast():
            cached, cache = self.decode_cached(idx[:1])
            many, _ = self.decode_cached(idx)
            uncached = clock(device, model, idx[:1], positions=last)
        return dict(cached=cached, many=many, uncached=uncached, read=clock(device, weights.sum),
                    cache_bytes=cache.n_bytes() / self.context)

    def measure(self):
        measured = dict(peak=matmul_peak(self.device),
                        step=clock(self.device.torch_device, self.train_step))
        return measured | self.decode() if self.causal else measured

    def report(self, memory):
        """The dict that --json=True prints. memory: bytes."""
        median = {name: np.median([measured[name] for measured in self.rounds], axis=0)
                  for name in self.rounds[0]}  # of `cached` and `many`, one per decoded token
        T, peak = self.model.config.block_size, max(measured['peak'] for measured in self.rounds)
        rate = self.n_sequences * T / median['step']
        line = dict(
            config=self.name, dtype=str(self.device.precision).removeprefix('torch.'),
            params=self.model.n_params(), sequences=self.n_sequences, block_size=T,
            train_tokens_per_s=rate,
            train_matmul_share=rate * self.flops / peak,
            matmul_peak_flops_per_s=peak, peak_memory_bytes=memory)
        if not self.causal:
            return line
        mean = median['cached'].mean()
        return line | dict(
            context=self.context, decode_ms_per_token=1e3 * mean,
            decode_ms_per_token_worst=1e3 * median['cached'].max(),
            decode_ms_per_token_uncached=1e3 * median['uncached'],
            weights_read_ms=1e3 * median['read'], decode_tokens_per_s=1 / mean,
            decode_together=DECODED_TOGETHER,
            decode_tokens_per_s_together=DECODED_TOGETHER / median['many'].mean(),
            cache_bytes_per_token=median['cache_bytes'])


def matmul_peak(device):
    """FLOP/s of a matrix product that is large for the device, in the precision of training."""
    n = 8192 if device.cuda else 2048
    a, b, out = torch.randn(3, n, n, device=device.torch_device).to(device.precision)
    return 2 * n ** 3 / min(clock(device.torch_device, torch.mm, a, b, out=out) for _ in range(3))


def memory_of(path, overrides):
    """What peak_memory returns in a fresh process."""
    spawn = multiprocessing.get_context('spawn')
    with concurrent.futures.ProcessPoolExecutor(1, spawn) as fresh:
        return fresh.submit(peak_memory, path, overrides).result()


def peak_memory(path, overrides):
    """Peak memory of this process, in bytes, after training a config: of its GPU if it has one."""
    benchmark = Benchmark(path, overrides)
    for _ in range(2):  # the first step makes the optimizer's state, the second one adds to it
        benchmark.train_step()
    return round(benchmark.device.memory_gb() * 2 ** 30)


def show_progress(text):
    """Prints a short text over the one before, on stderr."""
    print(f'\r{text:<24}', end='', file=sys.stderr, flush=True)


def measure_configs(paths, overrides, options):
    """A report per config, after one round to warm up and `rounds` rounds that count."""
    memory, benchmarks = [], [Benchmark(path, overrides, options.context) for path in paths]
    for i, path in enumerate(paths, 1):  # on a GPU this compiles
        show_progress(f'memory of {i} of {len(paths)}')
        memory.append(memory_of(path, overrides))
    for i in range(options.rounds + 1):
        show_progress(f'round {i} of {options.rounds}')
        for benchmark in benchmarks:
            measured = benchmark.measure()
            if i > 0:
                benchmark.rounds.append(measured)
    print(file=sys.stderr)
    if options.profile:
        with torch.profiler.profile() as trace:
            for benchmark in benchmarks:
                benchmark.measure()
        trace.export_chrome_trace(options.profile)
    return [benchmark.report(n_bytes) for benchmark, n_bytes in zip(benchmarks, memory)]


# {name in a report: (title of its column, format)}
TRAINING = dict(
    params=('parameters', '{:,}'), sequences=('sequences', '{}'), block_size=('of tokens', '{:,}'),
    dtype=('dtype', '{}'), train_tokens_per_s=('tokens/s', '{:,.0f}'),
    train_matmul_share=('of the peak', '{:.1%}'), peak_memory_gb=('memory, GB', '{:.2f}'))
DECODING = dict(
    context=('context', '{:,.0f}'), decode_ms_per_token=('ms', '{:.2f}'),
    decode_ms_per_token_worst=('slowest', '{:.2f}'),
    decode_ms_per_token_uncached=('uncached', '{:.2f}'),
    weights_read_ms=('weights read', '{:.2f}'), decode_tokens_per_s=('tokens/s', '{:,.0f}'),
    decode_tokens_per_s_together=('together', '{:,.0f}'),
    cache_bytes_per_token=('cache bytes', '{:,.0f}'))


def show(lines):
    """Prints a table of training, and one of decoding."""
    frame = pd.DataFrame(lines).set_index('config').rename_axis(None)
    frame['peak_memory_gb'] = frame.peak_memory_bytes / 2 ** 30
    peaks = frame.groupby('dtype').matmul_peak_flops_per_s.max() / 1e9
    tables = {'training; matrix products reach ' + ', '.join(
        f'{peak:,.0f} GFLOP/s in {dtype}' for dtype, peak in peaks.items()): (frame, TRAINING)}
    if 'context' in frame:
        tables[f'decoding: ms per token of one sequence; tokens/s of one and of {DECODED_TOGETHER} '
               'sequences; bytes per token'] = frame[frame.context.notna()], DECODING
    for heading, (rows, columns) in tables.items():
        cells = {title: rows[name].map(form.format) for name, (title, form) in columns.items()}
        print(f'{heading}\n\n{pd.DataFrame(cells).to_string()}\n')


# --------------------------------------------------------------------------------------------------
# attention: one layer


# widths of the query, key-value and output latents, as shares of the width of the layer
LATENTS = {'DeepSeek-V3': (3 / 14, 1 / 14, 3 / 14), 'half of it': (3 / 28, 1 / 28, 3 / 28)}
PAIRS = ('MLA', 'MHA'), ('MLA', 'GQA'), ('MLA-o', 'MLA')  # the first is compared to the second
MEASURED = dict(train_us_per_token='forward and backward', decode_us='decoding')
COSTS = MEASURED | dict(mflop_per_token='FLOPs')


def layer_options(width, head_dim, latents):
    """{kind of attention: options of a BlockConfig} at one size. Half of a head is rotary; MLA and
    its relatives rotate a key that all heads share. GQA has the fewest key heads with which it
    caches at least as much as MLA, and GTA as many."""
    n_head = width // head_dim
    q, kv, o = (max(8, round(width * share / 8) * 8) for share in LATENTS[latents])
    few = dict(n_kv_head=next(n for n in range(1, n_head + 1) if n_head % n == 0 and (
        n == n_head or 2 * n * head_dim >= kv + head_dim // 2)))
    mla = dict(attention='mla', q_latent=q, kv_latent=kv, rope_key='shared')
    v4 = dict(attention='v4', q_latent=q, window=128, o_latent=o // 2, o_groups=2, sink=True)
    kinds = {
        'MHA': {}, 'GQA': few, 'MLA': mla, 'MLA-o': mla | dict(o_latent=o),
        'MLA-o, 2 groups': mla | dict(o_latent=o // 2, o_groups=2),
        'GLA': mla | dict(kv_latent=kv // 2, kv_groups=2),
        'MLRA': mla | dict(kv_latent=kv // 2, kv_branches=2), 'GTA': few | dict(attention='gta'),
        'MFA': dict(n_kv_head=1, q_latent=q), 'TPA': dict(attention='tpa', q_rank=6, kv_rank=2),
        'MHA, gate': dict(gate=True), 'MLA, gate': mla | dict(gate=True),
        'MHA, sink': dict(sink=True), 'MLA, sink': mla | dict(sink=True),
        'V4, window': v4, 'V4, CSA': v4 | dict(layer_kinds='csa'),
        'V4, HCA': v4 | dict(layer_kinds='hca')}
    return {kind: dict(n_embd=width, n_head=n_head, rope_dims=head_dim // 2, **options)
            for kind, options in kinds.items()}


KINDS = tuple(layer_options(256, 32, 'DeepSeek-V3'))


class Layer:
    """An attention with T inputs, and a cache that holds all of them but the last."""

    def __init__(self, kind, size, n_sequences, device, autocast=contextlib.nullcontext()):
        """size: dict(latents, head_dim, T, width)."""
        self.autocast = autocast
        latents, head_dim, T, width = size.values()
        options = layer_options(width, head_dim, latents)[kind]
        with torch.device(device):
            self.attention = self.runner = make_attention(BlockConfig(**options))
            self.x = torch.randn(n_sequences, T, width, requires_grad=True)
            self.rope = rope_table(T, self.attention.rope_dims, ModelConfig.rope_theta)
        self.cache, self.seconds = Cache(1, T), []  # (forward and backward, decoding) per round
        with torch.no_grad(), autocast:
            self.attention(self.x[:1, :-1], rope=self.rope, cache=self.cache)
        self.cache.n_tokens = T - 1

    def forward_backward(self):
        with self.autocast:
            y = self.runner(self.x, rope=self.rope)
        y.backward(y.detach())
        self.attention.zero_grad()
        self.x.grad = None

    @torch.no_grad()
    def decode(self):
        """Decodes the last token. Returns its cache, a copy that shares the tensors."""
        cache = copy.copy(self.cache)
        vars(cache).update({name: copy.copy(value) for name, value in vars(cache).items()})
        with self.autocast:
            self.attention(self.x[:1, -1:], rope=self.rope, cache=cache)
        return cache


def count_layer(kind, size):
    """What is known of an attention without timing it, for attention.csv."""
    layer = Layer(kind, size, 1, 'meta')
    flops = 3 * count_flops(lambda: layer.runner(layer.x, rope=layer.rope)) / size['T']
    return size | dict(
        attention=kind, params=sum(weight.numel() for weight in layer.attention.parameters()),
        cache_elements_per_token=layer.decode().n_bytes() / layer.x.element_size() / size['T'],
        mflop_per_token=flops / 1e6)


def time_layers(size, options, device):
    """A dict(train_us_per_token, decode_us) per attention, which take turns."""
    n_sequences = max(1, (options.tokens or (65_536 if device.cuda else 1024)) // size['T'])
    layers = [Layer(kind, size, n_sequences, device.torch_device, device.autocast())
              for kind in KINDS]
    for layer in layers:
        layer.runner = compiled(options, layer.attention, device)
    for _, layer in itertools.product(range(options.rounds + 1), layers):
        layer.seconds.append([repeated(device.torch_device, work)
                              for work in (layer.forward_backward, layer.decode)])
    torch.compiler.reset()  # the layers of this size are not needed any more
    microseconds = [1e6 * np.median(layer.seconds[1:], axis=0) for layer in layers]
    return [dict(train_us_per_token=train / n_sequences / size['T'], decode_us=decode)
            for train, decode in microseconds]


def repeated(device, work):
    """Seconds of work(), which is repeated until the clock has something to measure."""
    n = 1
    while (seconds := clock(device, lambda: [work() for _ in range(n)])) < 0.01:
        n *= 4
    return seconds / n


def crossover(ratios):
    """The smallest width from which on ratios, a Series by width, stay below 1; or 'never'."""
    widths = ratios.index
    cheaper = widths[widths > max(widths[ratios >= 1], default=0)]
    return f'{cheaper.min():,}' if len(cheaper) else 'never'


def attention(overrides):
    """Measures single layers. Prints a table per setting, and from which width on an attention is
    cheaper than another; writes a csv, which has every size as soon as it is measured, and a plot.
    """
    options, lines, tables = read_options(overrides, AttentionOptions, DeviceOptions), [], {}
    device = Device(read_options(overrides, DeviceOptions, AttentionOptions))
    folder = Path(options.results)
    folder.mkdir(parents=True, exist_ok=True)
    for setting in itertools.product(LATENTS, options.head_dims, options.lengths):
        first = len(lines)
        for width in sorted({*options.layer_widths, *options.more_widths}):
            size = dict(zip(('latents', 'head_dim', 'T', 'width'), (*setting, width)))
            known = [count_layer(kind, size) for kind in KINDS]
            timed = width in options.layer_widths
            times = time_layers(size, options, device) if timed else [{}] * len(KINDS)
            lines += [line | more for line, more in zip(known, times)]
            save_text(folder / 'attention.csv', pd.DataFrame(lines).to_csv(index=False))
        costs = pd.DataFrame(lines[first:]).pivot(index='attention', columns='width',
                                                  values=list(COSTS)).rename(columns=COSTS)
        costs = (costs / costs.loc['MHA']).loc[list(KINDS)].dropna(axis=1).rename_axis(None)
        print('\nlatents of {}, heads of {}, {:,} tokens: costs by width, MHA = 1'.format(*setting))
        print(costs.to_string(float_format='%.2f'), flush=True)
        tables[setting] = costs
    cheaper = pd.DataFrame({setting: {
        (f'{a} than {b}', what): crossover(costs.loc[a, what] / costs.loc[b, what])
        for a, b in PAIRS for what in COSTS.values()} for setting, costs in tables.items()}).T
    cheaper = cheaper.rename_axis(['latents', 'head_dim', 'tokens'])
    print(f'\ncheaper from width\n{cheaper.to_string()}')
    plot_attention(folder / 'attention.png', tables)
    print(f'\n{folder}: attention.csv, attention.png')


def plot_attention(path, tables):
    """Ratios of times over width, one line per length, for the first LATENTS and the last
    head_dim."""
    figure, panels = pyplot().subplots(2, len(PAIRS), figsize=(12, 7), sharey='row',
                                       layout='constrained')
    latents, head_dim, _ = next(iter(tables))[0], *list(tables)[-1][1:]
    for row, what in zip(panels, MEASURED.values()):
        for axes, (a, b) in zip(row, PAIRS):
            for (*setting, T), costs in tables.items():
                if setting == [latents, head_dim]:
                    ratios = costs.loc[a] / costs.loc[b]
                    line, = axes.plot(ratios[what], marker='o', label=f'{T:,} tokens')
                    if what == 'forward and backward':
                        axes.plot(ratios['FLOPs'][ratios[what].index], ':', color=line.get_color())
            widths = ratios[what].index
            axes.axhline(1, color='black', linewidth=0.8)
            axes.set(title=f'{a} / {b}, {what}', xscale='log', xticks=widths, xticklabels=widths,
                     xlabel='width')
            axes.minorticks_off()
            axes.grid(alpha=0.3)
        row[0].set(ylabel='ratio of times, 1 = equal', ylim=(0, None))
    panels[0, 0].legend()
    figure.suptitle(f'one layer, heads of {head_dim}, latents of {latents}; dotted: FLOPs')
    save_figure(figure, path)


def main():
    arguments = sys.argv[1:]
    if arguments[:1] == ['attention']:
        return attention(arguments[1:])
    overrides = [argument for argument in arguments if argument.startswith('-')]
    paths = [argument for argument in arguments if argument not in overrides]
    options = read_options(overrides, *KNOWN)
    if options.profile:
        open(options.profile, 'w').close()  # fails now if it cannot be written
    paths = paths or sorted(Path(__file__).parent.glob('config/[!_]*.py'))
    lines = measure_configs(paths, overrides, options)
    if options.json:
        print(json.dumps(lines, indent=2))
    else:
        show(lines)


if __name__ == '__main__':
    config.run(main)
