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

Decoding, for causal models, at the end of `context` tokens (at most block_size): milliseconds per
token of one sequence; tokens/s of one sequence and of 16 together; and the bytes of the cache per
token. Sampling from the logits is not included.

attention: one layer of MHA, of grouped-query attention that caches about as much as MLA, of MLA, of
MLA-o and of their relatives, over widths, heads and lengths: time forward and backward (compiled on
CUDA), time to decode one token, and FLOPs. Writes attention.csv and attention.png into `results`.
"""

import concurrent.futures
import itertools
import json
import multiprocessing
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import config  # before torch: from here on Ctrl-C is one line

import pandas as pd
import torch

from model import (Cache, Count, Range, count_flops, make_attention, make_config, on_meta,
                   rope_table, training_flops)
from run import Device, DeviceOptions, build, pyplot, save_figure, save_text
from train import (accumulation, compiled, make_optimizers, predicted_share, read_options,
                   start_model, train_step)

DECODED_TOKENS = 16  # per round, fewer if the context is short; with grouped latents one group
DECODED_TOGETHER = 16  # sequences


@dataclass
class BenchOptions:
    """Options"""

    context: Annotated[int, Range(least=2)] = 200  # tokens of context when decoding
    rounds: Count = 5  # a figure is the median over these
    json: bool = False  # print a list of dicts instead of the tables
    profile: str | None = None  # file for a profiler trace of one more round, for Perfetto


@dataclass
class AttentionOptions(DeviceOptions):
    """Options of attention"""

    layer_widths: tuple[Count, ...] = (128, 256, 512, 1024, 2048)  # widths of the layer
    lengths: tuple[Count, ...] = (128, 512, 2048)  # tokens per sequence
    head_dims: tuple[Count, ...] = (32, 64)  # widths of a head
    tokens: Count | None = None  # tokens per batch, at least a sequence; None: 1024, CUDA 65536
    rounds: Count = 5  # a figure is the median over these
    compile: bool | None = None  # torch.compile; None = on CUDA only
    results: str = 'out/bench'  # folder for attention.csv and attention.png


def split_arguments(arguments, cls):
    """(an object of the dataclass cls, paths, the options that cls does not have)."""
    paths = [argument for argument in arguments if not argument.startswith('-')]
    own = [argument for argument in arguments
           if argument.removeprefix('--').partition('=')[0] in config.options_of(cls)]
    values, _ = config.load(own, cls, takes_config=False)
    return cls(**values), paths, [argument for argument in arguments if argument not in paths + own]


def clock(device, work):
    """Seconds until the torch device has done work()."""
    wait = torch.accelerator.synchronize if device.type != 'cpu' else lambda device: None
    wait(device)
    start = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - start


def medians(measures, rounds):
    """A dict of figures for each of the functions `measures`, which return such dicts and take
    turns: medians over so many rounds, after one to warm up."""
    results = []
    for i in range(rounds + 1):
        print(f'\rround {i} of {rounds}', end='', file=sys.stderr, flush=True)
        results.append([measure() for measure in measures])
    print(file=sys.stderr)
    return [pd.DataFrame(figures).median().to_dict() for figures in zip(*results[1:])]


def text(value):
    """A number or a word as a cell of a table."""
    if isinstance(value, str):
        return value
    if abs(value) >= 100 or value == round(value):
        return f'{value:,.0f}'
    return f'{value:.4f}' if abs(value) >= 0.001 else f'{value:.2g}'


def print_table(frame):
    """Prints a frame, in blocks of columns if it is too wide for one."""
    cells = frame.map(text, na_action='ignore').rename_axis(None).rename_axis(None, axis=1)
    print(cells.to_string(na_rep='', line_width=120))


def subplots(rows, columns, **keywords):
    """(figure, array of axes), in the style of all pictures."""
    plt = pyplot()
    plt.rcParams.update({'axes.grid': True, 'grid.alpha': 0.3})
    return plt.subplots(rows, columns, figsize=(6 * columns, 5 * rows), layout='constrained',
                        **keywords)


# --------------------------------------------------------------------------------------------------
# configs: training and decoding


class Benchmark:
    """A config under measurement."""

    def __init__(self, path, overrides, context=BenchOptions.context):
        self.recipe, model_options, _ = read_options([str(path), *overrides])
        self.device = Device(self.recipe)
        torch.manual_seed(self.recipe.seed)
        model_config = build(self.recipe.arch, model_options, make_config)
        self.model = start_model(self.recipe, model_config, None, None, self.device, None)
        self.model.to(self.device.torch_device)
        self.runner = compiled(self.recipe, self.model, self.device)
        self.optimizers, c = make_optimizers(self.model, self.recipe), self.model.config
        share, self.context = predicted_share(self.recipe, c), min(context, c.block_size)
        self.flops = training_flops(self.model, c.block_size, share)  # per token
        self.n_sequences, _ = accumulation(self.recipe, c.block_size, self.device)
        idx = torch.randint(c.vocab_size, (self.n_sequences, c.block_size))  # (B, T)
        masked = torch.arange(round(share * c.block_size)).repeat(self.n_sequences, 1)
        batch = (idx, idx) if c.causal else (idx, idx.gather(1, masked), masked)
        self.data = SimpleNamespace(batch=lambda numbers: batch)  # stands in for a Loader
        self.known = dict(
            config=Path(path).stem, dtype=str(self.device.precision).removeprefix('torch.'),
            params=self.model.n_params(), sequences=self.n_sequences, block_size=c.block_size)

    def train_step(self):
        train_step(self.runner.train(), self.optimizers, self.data, 0, self.recipe, self.device,
                   self.n_sequences, 1)

    @torch.inference_mode()
    def decode(self, n_sequences):
        """(seconds per token, bytes of the cache per token) at the end of the context."""
        c, device = self.model.config, self.device.torch_device
        n = min(getattr(c, 'group_size', DECODED_TOKENS), self.context - 1)
        idx = torch.randint(c.vocab_size, (n_sequences, self.context), device=device)
        cache = self.model.eval().init_cache(n_sequences, self.context)
        with Device(self.recipe, trains=False).autocast():
            self.model(idx[:, :-n], cache=cache)
            seconds = clock(device, lambda: [self.model(token, cache=cache)
                                             for token in idx[:, -n:].split(1, dim=1)])
        return seconds / n, cache.n_bytes() / idx.numel()

    def measure(self):
        """One round, as a dict. Without decoding if the model is an encoder."""
        c, device = self.model.config, self.device.torch_device
        peak = matmul_peak(self.device)
        rate = self.n_sequences * c.block_size / clock(device, self.train_step)
        figures = dict(train_tokens_per_s=rate, train_matmul_share=rate * self.flops / peak,
                       matmul_peak_flops_per_s=peak)
        if not c.causal:
            return figures
        alone, cache_bytes = self.decode(1)
        together, _ = self.decode(DECODED_TOGETHER)
        return figures | dict(
            context=self.context, decode_ms_per_token=1e3 * alone, decode_tokens_per_s=1 / alone,
            decode_tokens_per_s_together=DECODED_TOGETHER / together,
            cache_bytes_per_token=cache_bytes)


def matmul_peak(device):
    """FLOP/s of a matrix product that is large for the device, in the precision of training."""
    n = 8192 if device.cuda else 2048
    a, b, out = torch.randn(3, n, n, device=device.torch_device).to(device.precision)
    return 2 * n ** 3 / min(clock(device.torch_device, lambda: torch.mm(a, b, out=out))
                            for _ in range(3))


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


def measure_configs(paths, overrides, options):
    """What --json=True prints: a dict per config."""
    benchmarks = [Benchmark(path, overrides, options.context) for path in paths]
    memory = [dict(peak_memory_bytes=memory_of(path, overrides)) for path in paths]
    figures = medians([benchmark.measure for benchmark in benchmarks], options.rounds)
    if options.profile:
        with torch.profiler.profile() as trace:
            for benchmark in benchmarks:
                benchmark.measure()
        trace.export_chrome_trace(options.profile)
    return [benchmark.known | more | measured
            for benchmark, more, measured in zip(benchmarks, memory, figures)]


# --------------------------------------------------------------------------------------------------
# attention: one layer


PAIRS = ('MLA', 'MHA'), ('MLA', 'GQA'), ('MLA-o', 'MLA')  # the first is compared to the second
TIMES = dict(train_us_per_token='forward and backward', decode_us='decoding')
COSTS = TIMES | dict(mflop_per_token='FLOPs')


def layer_options(head_dim, width):
    """{kind of attention: its options}. Latents have DeepSeek-V3's ratios to the width. Half of a
    head is rotary; MLA and its relatives rotate a key that all heads share. GQA has the fewest key
    heads with which it caches at least as much as MLA, and GTA as many."""
    n_head = width // head_dim
    q, kv, o = (max(8, round(width * share / 8) * 8) for share in (3 / 14, 1 / 14, 3 / 14))
    few = dict(n_kv_head=next((n for n in range(1, n_head) if n_head % n == 0
                               and 2 * n * head_dim >= kv + head_dim // 2), n_head))
    mla = dict(attention='mla', q_latent=q, kv_latent=kv, rope_key='shared')
    v4 = dict(attention='v4', q_latent=q, window=128, o_latent=o // 2, o_groups=2, sink=True)
    kinds = {
        'MHA': {}, 'GQA': few, 'MLA': mla, 'MLA-o': mla | dict(o_latent=o),
        'MLA-o, 2 groups': mla | dict(o_latent=o // 2, o_groups=2),
        'GLA': mla | dict(kv_latent=kv // 2, kv_groups=2),
        'MLRA': mla | dict(kv_latent=kv // 2, kv_branches=2), 'GTA': few | dict(attention='gta'),
        'MFA': dict(n_kv_head=1, q_latent=q), 'TPA': dict(attention='tpa', q_rank=6, kv_rank=2),
        'MHA, gate': dict(gate=True), 'MLA, gate': mla | dict(gate=True),
        'MHA, sink': dict(sink=True), 'MLA, sink': mla | dict(sink=True), 'V4, window': v4,
        'V4, CSA': v4 | dict(layer_kinds='csa'), 'V4, HCA': v4 | dict(layer_kinds='hca')}
    shared = dict(n_embd=width, n_head=n_head, head_dim=head_dim, rope_dims=head_dim // 2)
    return {kind: shared | options for kind, options in kinds.items()}


class Layer:
    """An attention with random inputs."""

    def __init__(self, kind, T, options, device):
        c = build('transformer', kind, make_config)
        n_sequences = max(1, (options.tokens or (65_536 if device.cuda else 1024)) // T)
        with device.torch_device:
            self.attention = make_attention(c)
            self.x = torch.randn(n_sequences, T, c.n_embd, requires_grad=True)
            self.rope = rope_table(T, c.rope_dims, c.rope_theta)
        self.runner, self.device = compiled(options, self.attention, device), device

    def forward_backward(self):
        with self.device.autocast():
            y = self.runner(self.x, rope=self.rope)
        inputs = self.x, *self.attention.parameters()
        torch.autograd.grad(y, inputs, y.detach(), allow_unused=True)

    @torch.no_grad()
    def extend(self, cache, n):
        """Adds the next n tokens of the first sequence to a cache."""
        start, end = cache.n_tokens, cache.n_tokens + n
        with self.device.autocast():
            self.attention(self.x[:1, start:end], rope=self.rope[:, :end], cache=cache)
        cache.n_tokens = end

    def measure(self):
        """One round, as a dict."""
        n_sequences, T, _ = self.x.shape
        cache, n, device = Cache(1, T), min(DECODED_TOKENS, T - 1), self.device.torch_device
        train = clock(device, self.forward_backward)
        self.extend(cache, T - n)
        decode = clock(device, lambda: [self.extend(cache, 1) for _ in range(n)])
        return dict(train_us_per_token=1e6 * train / n_sequences / T, decode_us=1e6 * decode / n)

    def count(self):
        """Megaflops of forward and backward, and elements of the cache, per token."""
        x, rope, T = self.x[:1].to('meta'), self.rope.to('meta'), self.x.size(1)
        cache, flops = Cache(1, T), count_flops(lambda: on_meta(self.attention, x, rope=rope))
        on_meta(self.attention, x, rope=rope, cache=cache)
        return dict(mflop_per_token=3e-6 * flops / T,
                    cache_elements_per_token=cache.n_bytes() / x.element_size() / T)


def attention(arguments):
    """Measures single layers. Prints a table per width of head and length; writes a csv, which has
    every size as soon as it is measured, and a plot."""
    values, _ = config.load(arguments, AttentionOptions, doc=__doc__, takes_config=False)
    options, lines = AttentionOptions(**values), []
    device, folder = Device(options), Path(options.results)
    folder.mkdir(parents=True, exist_ok=True)
    for head_dim, T in itertools.product(options.head_dims, options.lengths):
        for width in options.layer_widths:
            kinds = layer_options(head_dim, width)
            layers = [Layer(kind, T, options, device) for kind in kinds.values()]
            times = medians([layer.measure for layer in layers], options.rounds)
            torch.compiler.reset()  # the layers of this size are not needed any more
            lines += [dict(head_dim=head_dim, T=T, width=width, attention=name) | layer.count()
                      | measured for name, layer, measured in zip(kinds, layers, times)]
            frame = pd.DataFrame(lines)
            save_text(folder / 'attention.csv', frame.to_csv(index=False))
        costs = frame[(frame.head_dim == head_dim) & (frame['T'] == T)].pivot(
            index='attention', columns='width', values=list(COSTS)).rename(columns=COSTS)
        print(f'\nheads of {head_dim}, {T:,} tokens: costs by width, MHA = 1')
        print((costs / costs.loc['MHA']).loc[list(kinds)].to_string(float_format='%.2f'))
    plot_attention(folder / 'attention.png', frame[frame.head_dim == head_dim])
    print(f'\n{folder}: attention.csv, attention.png (heads of {head_dim})')


def plot_attention(path, frame):
    """Ratios of times over the width, one line per length."""
    figure, panels = subplots(len(TIMES), len(PAIRS), sharey='row')
    for row, (name, what) in zip(panels, TIMES.items()):
        times = frame.pivot(index='width', columns=['attention', 'T'], values=name)
        times.index = times.index.map('{:,}'.format)  # evenly spaced
        for axes, (a, b) in zip(row, PAIRS):
            (times[a] / times[b]).plot(ax=axes, marker='o', ylim=(0, None),
                                       title=f'{a} / {b}, {what}', ylabel='ratio of times')
            axes.axhline(1, color='black', linewidth=0.8)
    save_figure(figure, path)


def main():
    arguments = sys.argv[1:]
    if arguments[:1] == ['attention']:
        return attention(arguments[1:])
    if {'--help', '-h'} & set(arguments):
        config.load(['--help'], BenchOptions, doc=__doc__)
    options, paths, overrides = split_arguments(arguments, BenchOptions)
    if options.profile:
        open(options.profile, 'a').close()  # fails now if it cannot be written
    paths = paths or sorted(Path(__file__).parent.glob('config/[!_]*.py'))
    lines = measure_configs(paths, overrides, options)
    if options.json:
        print(json.dumps(lines, indent=2))
    else:
        print_table(pd.DataFrame(lines).set_index('config').T)


if __name__ == '__main__':
    config.run(main)
