"""How fast configs are on this machine, and which of several runs is better.

    python bench.py config/mla.py config/mla_o.py
    python bench.py                              # all configs; on a CPU this takes long
    python bench.py attention                    # one layer: from which width on do latents pay?
    python bench.py attention --layer_widths=512,1024 --lengths=4096 --head_dims=64
    python bench.py sweep config/mha.py config/mla.py --seed=1,2,3 --jobs=2
    python bench.py sweep config/quick.py --learning_rate=3e-3,6e-3 --finetune="--seeds=3"
    python bench.py compare out/sweep-mha/* out/sweep-mla/*
    python bench.py frontier config/zoo.py config/zoo_mla.py --learning_rate=4e-3,8e-3 --seed=1,2,3

With configs it measures training and decoding, in turns, and reports the median of several rounds.
Weights and tokens are random.

Training: steps of train.py on as many sequences as it takes at a time (micro_batch_size). It
reports tokens/s; the useful FLOPs as a share of the FLOP/s that a large matrix product reaches on
this machine; and the peak memory of a process that does nothing else.

Decoding, for causal models: milliseconds for one token of one sequence at `context` tokens, or
block_size if that is less, with the cache and without. Where tokens cost unlike amounts, the worst
one is reported too. Beside them stands the time to read once the weights that a token needs, and
the tokens/s of one sequence and of 16 at once. What sample.py does beside that, drawing a token
from the logits, is not in these figures.

attention: one layer of MHA, of grouped-query attention (GQA) that caches about as much as MLA, of
MLA, of MLA-o and of their relatives. It compares their times, forward and backward (compiled on
CUDA) and in decoding, and their FLOPs, over widths, heads, latents and lengths. attention.csv has
every size as soon as it is measured.

sweep: one run of train.py for each config and each combination of the values, which are separated
by commas. A run goes to out/sweep-CONFIG, into a folder that is named after the options on the
command line. What is done is skipped, what was cut off goes on. --finetune tests each run on SST-2
afterwards: it takes the options of finetune_sst2.py, in quotes. Runs side by side (--jobs) slow
each other down: compare their losses at equal tokens, not at equal seconds.

compare: runs that differ in their seed alone form a group. The tables have a line for each group:
mean and 95% interval over the seeds where there are three or more, else the values themselves. For
two groups with three seeds in common it also prints the difference between runs of the same seed.
compare.csv has all the numbers, compare.png the curves.

frontier: the loss of causal configs beside what a cache takes. Takes what sweep takes. Of several
values of learning_rate the first seed chooses one for each config, which the other seeds use too.
What is not trained yet is trained; then all configs are timed in turns, as with configs alone. A
line for each config: mean and interval of its loss, its difference from the first config between
runs of one seed, the bytes of a cache of block_size tokens, and speed. frontier.csv, frontier.png.
"""

import collections
import concurrent.futures
import contextlib
import csv
import dataclasses
import difflib
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import queue
import shlex
import signal
import statistics
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import torch.nn as nn

import config
import train
from config import UserError
from finetune_sst2 import FinetuneOptions, read_sst2
from model import (ARCHITECTURES, BlockConfig, Cache, Count, ModelConfig, Range, block_flops,
                   flat_options, make_attention, rope_table)
from run import (Machine, MachineOptions, best_checkpoint, build, load_checkpoint,
                 mean_and_interval, pyplot, save_figure, save_text)
from train import (TrainOptions, accumulation, compiled, current_options, make_optimizers,
                   predicted_share, split_options, train_step)

CACHED_TOKENS = 16  # decoded in a round, fewer if the context is short; grouped latents: a group
DECODED_TOGETHER = 16  # sequences
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


@dataclass
class AttentionOptions:
    """Options of attention"""

    layer_widths: tuple[Count, ...] = (128, 256, 512, 1024, 2048)  # of the layers that are timed
    more_widths: tuple[Count, ...] = (4096, 8192)  # of layers whose FLOPs alone are counted
    lengths: tuple[Count, ...] = (128, 512, 2048)  # of a sequence, tokens
    head_dims: tuple[Count, ...] = (32, 64)  # widths of a head
    tokens: Count | None = None  # timed at once, or one sequence; None = 1,024, on CUDA 65,536
    compile: bool | None = None  # torch.compile; None = on CUDA only

    def __post_init__(self):
        for head_dim in self.head_dims:
            if head_dim % 4:
                raise UserError(f'head_dims={self.head_dims}: half of a head is rotary, in pairs: '
                                'takes multiples of 4')
            for width in self.layer_widths + self.more_widths:
                if width % (2 * head_dim):  # two kinds have two groups of heads
                    raise UserError(f'head_dims={self.head_dims}: a layer {width} wide does not '
                                    f'divide into an even number of heads of {head_dim}')


@dataclass
class SweepOptions:
    """Options of sweep and frontier, which take those of training as well"""

    jobs: Count = 1  # runs at a time; they share the cores, and of several GPUs each has its own
    finetune: str | None = None  # fine-tune each run, with these options of finetune_sst2.py


TRAINING = (TrainOptions, BlockConfig, ModelConfig,
            *(config_class for _, config_class in ARCHITECTURES.values()))
KNOWN = BenchOptions, *TRAINING


def read_options(arguments, *known, kind=BenchOptions):
    """The BenchOptions of a command line, or its options of another kind. Options of training and
    of models are checked by name: they are for the configs."""
    values, _ = config.load(arguments, *(known or KNOWN), doc=__doc__, takes_config=False)
    names = {option.name for option in fields(kind)}
    return kind(**{name: value for name, value in values.items() if name in names})


def clock(device, work, *arguments, repeat=1, **keywords):
    """Seconds until the device has done work(*arguments, **keywords), `repeat` times."""
    wait(device)
    start = time.perf_counter()
    for _ in range(repeat):
        work(*arguments, **keywords)
    wait(device)
    return time.perf_counter() - start


def wait(device):
    """Waits until a GPU has done all that it was given; a CPU always has."""
    if device.type != 'cpu':
        torch.accelerator.synchronize(device)


def write_csv(path, lines):
    """lines: dicts. The columns are those of the line that has most."""
    text = io.StringIO()
    writer = csv.DictWriter(text, max(lines, key=len), lineterminator='\n')
    writer.writeheader()
    writer.writerows(lines)
    save_text(path, text.getvalue())


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
        n_sequences, _ = accumulation(self.recipe, c.block_size, machine)
        self.data = RandomBatch(n_sequences, c, share)
        self.flops = self.data.n_tokens * self.model.flops_per_token(c.block_size, share)
        self.milliseconds = []  # a dict for each round

    def step(self):
        """A step of training."""
        train_step(self.runner.train(), self.optimizers, self.data, 0, self.recipe, self.machine,
                   self.data.n_sequences, 1)

    def prepare_decoding(self, context, decoder):
        """Makes what `decode` needs: a sequence, a cache, and the weights that a token needs.
        decoder: the Machine with the precision that sample.py has."""
        c, model, device, self.decoder = self.model.config, self.model, decoder.device, decoder
        self.context = min(context, c.block_size)
        if self.context < 2:
            raise UserError(f'block_size={c.block_size}: decoding takes two tokens, one to go on '
                            'from and one to decode')
        self.n_cached = min(getattr(c, 'group_size', CACHED_TOKENS), self.context - 1)
        self.idx = torch.randint(c.vocab_size, (DECODED_TOGETHER, self.context), device=device)
        with decoder.autocast():
            self.cache = model.init_cache(1, self.context)
            self.cache_of_many = model.init_cache(DECODED_TOGETHER, self.context)
        # of an embedding a token needs one row, unless it is the head too
        embeddings = {id(module.weight) for module in model.modules()
                      if isinstance(module, nn.Embedding)} - {id(model.head_weight())}
        needed = [parameter.detach().flatten() for parameter in model.parameters()
                  if id(parameter) not in embeddings]
        self.weights = torch.cat(needed).to(decoder.precision)

    def decode_cached(self, idx, cache):
        """Milliseconds of each of the last tokens of idx, with the cache."""
        first, milliseconds = self.context - self.n_cached, []
        cache.n_tokens = 0
        self.model(idx[:, :first], cache=cache)
        for t in range(first, self.context):
            token = idx[:, t:t + 1]
            milliseconds.append(1e3 * clock(self.machine.device, self.model, token, cache=cache))
        return milliseconds

    @torch.inference_mode()
    def decode(self):
        """Milliseconds: of each of the last tokens with the cache, of one sequence and of many, of
        the very last one without it, and of reading the weights."""
        device, model, one = self.machine.device, self.model.eval(), self.idx[:1]
        last = torch.full((1, 1), self.context - 1, device=device)
        with self.decoder.autocast():
            cached = self.decode_cached(one, self.cache)
            many = self.decode_cached(self.idx, self.cache_of_many)
            uncached = 1e3 * clock(device, model, one, positions=last)
            read = 1e3 * clock(device, self.weights.sum)
        return dict(cached=cached, many=many, uncached=uncached, read=read)

    def measure(self):
        """Milliseconds of a step, and of decoding for a causal model."""
        measured = dict(step=1e3 * clock(self.machine.device, self.step))
        return measured | self.decode() if self.causal else measured

    def median(self, name):
        return statistics.median(measured[name] for measured in self.milliseconds)

    def median_of_each(self, name):
        """The same, of each token that was decoded."""
        return [statistics.median(token)
                for token in zip(*(measured[name] for measured in self.milliseconds))]

    def report(self, peak, memory):
        """What --json=True prints of it. peak: FLOP/s of matrix products; memory: bytes."""
        seconds = self.median('step') / 1e3
        line = dict(
            config=self.name, dtype=str(self.machine.precision).removeprefix('torch.'),
            params=self.model.n_params(), sequences=self.data.n_sequences,
            block_size=self.model.config.block_size,
            train_tokens_per_s=self.data.n_tokens / seconds,
            train_matmul_share=self.flops / seconds / peak, matmul_peak_flops_per_s=peak,
            peak_memory_bytes=memory)
        if not self.causal:
            return line
        cached, many = self.median_of_each('cached'), self.median_of_each('many')
        return line | dict(
            context=self.context, decode_ms_per_token=statistics.mean(cached),
            decode_ms_per_token_worst=max(cached),
            decode_tokens_per_s=1e3 / statistics.mean(cached),
            decode_together=DECODED_TOGETHER,
            decode_tokens_per_s_together=1e3 * DECODED_TOGETHER / statistics.mean(many),
            decode_ms_per_token_uncached=self.median('uncached'),
            weights_read_ms=self.median('read'),
            cache_bytes_per_token=self.model.cache_bytes_per_token(self.decoder.precision),
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
    spawn = multiprocessing.get_context('spawn')
    with concurrent.futures.ProcessPoolExecutor(1, spawn) as fresh:
        return fresh.submit(peak_memory, path, overrides).result()


def peak_memory(path, overrides):
    machine = Machine(read_options(overrides))
    subject = Subject(path, overrides, machine)
    subject.step()
    subject.step()  # only now are there activations and gradients beside the optimizer's state
    return round(machine.memory_gb() * 2 ** 30)


def show_progress(text, end=''):
    """Prints a short text over the one before, on stderr."""
    print(f'\r{text:<24}', end=end, file=sys.stderr, flush=True)


def measure_configs(paths, overrides, options):
    """The lines of the report, after a round to warm up and `rounds` rounds that count."""
    machine, decoder = Machine(options), Machine(options, trains=False)
    subjects = [Subject(path, overrides, machine) for path in paths]
    memory = []
    for i, path in enumerate(paths, 1):  # on a GPU this compiles
        show_progress(f'memory of {i} of {len(paths)}')
        memory.append(memory_of(path, overrides))
    for subject in subjects:
        if subject.causal:
            subject.prepare_decoding(options.context, decoder)
    peaks = []
    for i in range(options.rounds + 1):
        show_progress(f'round {i} of {options.rounds}', '\n' if i == options.rounds else '')
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
    print(f'training in {lines[0]["dtype"]}: matrix products reach {peak:,.0f} GFLOP/s here\n')
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
    together = f'1 / {DECODED_TOGETHER} at once'
    print(f'{"":20}{"context":>8}{"cached":>8}{"worst":>8}{"uncached":>9}{"weights":>8}{"ratio":>7}'
          f'{"tokens/s":>17}{"cache bytes":>18}')
    print(f'{"":53}{"read":>8}{together:>24}{"formula / counted":>18}')
    for line in decoding:
        ms, read = line['decode_ms_per_token'], line['weights_read_ms']
        rates = f'{line["decode_tokens_per_s"]:,.0f} / {line["decode_tokens_per_s_together"]:,.0f}'
        n_bytes = (f'{line["cache_bytes_per_token"]:,.0f} / '
                   f'{line["cache_bytes_per_token_counted"]:,.0f}')
        print(f'{line["config"]:20}{line["context"]:8,}{ms:8.2f}'
              f'{line["decode_ms_per_token_worst"]:8.2f}'
              f'{line["decode_ms_per_token_uncached"]:9.2f}{read:8.2f}{ms / read:7.1f}'
              f'{rates:>17}{n_bytes:>18}')


# --------------------------------------------------------------------------------------------------
# attention: one layer


# widths of the query, key-value and output latents, as shares of the width of the layer
LATENTS = {'DeepSeek-V3': (3 / 14, 1 / 14, 3 / 14), 'half of it': (3 / 28, 1 / 28, 3 / 28)}
PAIRS = ('MLA', 'MHA'), ('MLA', 'GQA'), ('MLA-o', 'MLA')  # the first is compared to the second
MEASURED = dict(train_us_a_token='forward and backward', decode_us='decoding')
COSTS = MEASURED | dict(mflop_a_token='FLOPs')


def layer_options(width, head_dim, latents):
    """{kind: options of a BlockConfig} of the attentions at one size. Half of the dimensions of a
    head are rotary; MLA and what is like it have them on a key that all heads share. GQA has the
    fewest key heads with which it caches at least as much as MLA, and GTA as many."""
    n_head = width // head_dim
    q, kv, o = (max(8, round(width * share / 8) * 8) for share in LATENTS[latents])
    possible = [n for n in range(1, n_head + 1) if n_head % n == 0]
    enough = [n for n in possible if 2 * n * head_dim >= kv + head_dim // 2]
    few = dict(n_kv_head=enough[0] if enough else n_head)
    mla = dict(attention='mla', q_latent=q, kv_latent=kv, rope_key='shared')
    v4 = dict(attention='v4', q_latent=q, window=128, o_latent=o // 2, o_groups=2, sink=True)
    kinds = {
        'MHA': {}, 'GQA': few, 'MLA': mla, 'MLA-o': mla | dict(o_latent=o),
        'MLA-o, 2 groups': mla | dict(o_latent=o // 2, o_groups=2),
        'GLA': mla | dict(kv_latent=kv // 2, kv_groups=2),
        'MLRA': mla | dict(kv_latent=kv // 2, kv_branches=2), 'GTA': few | dict(attention='gta'),
        'MFA': dict(attention='mfa', q_latent=q), 'TPA': dict(attention='tpa', q_rank=6, kv_rank=2),
        'MHA, gate': dict(gate=True), 'MLA, gate': mla | dict(gate=True),
        'MHA, sink': dict(sink=True), 'MLA, sink': mla | dict(sink=True),
        'V4, window': v4, 'V4, CSA': v4 | dict(layers='csa'), 'V4, HCA': v4 | dict(layers='hca')}
    return {kind: dict(n_embd=width, n_head=n_head, rope_dims=head_dim // 2, **options)
            for kind, options in kinds.items()}


KINDS = tuple(layer_options(256, 32, 'DeepSeek-V3'))


def make_layer(kind, width, head_dim, latents):
    return make_attention(BlockConfig(**layer_options(width, head_dim, latents)[kind]))


def layer_flops(layer, T):
    """Forward and backward FLOPs a token."""
    return 3 * block_flops(layer, 1, 1, (T + 1) / 2)


def formulas(width, T, head_dim, latents):
    """{kind: what is known without measuring} of the attentions at one size."""
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

    def __init__(self, attention, x, sizes, machine):
        """x: (B, T, width), input and target of the gradient. sizes: the AttentionOptions."""
        self.attention, self.x, self.machine = attention.to(machine.device), x, machine
        self.runner = compiled(sizes, self.attention, machine)
        table = rope_table(x.size(1), attention.rope_dims, ModelConfig.rope_theta)
        self.rope = table.to(machine.device)
        self.cache = Cache(1, x.size(1))
        self.decode(x[:1, :-1])
        self.cache.n_tokens = x.size(1) - 1
        self.kept = dict(self.cache.buffers), dict(self.cache.ends)  # before the last token
        self.train_seconds, self.decode_seconds = [], []  # of each round

    def forward_backward(self):
        with self.machine.autocast():
            y = self.runner(self.x, rope=self.rope)
        y.backward(y.detach())
        self.attention.zero_grad()
        self.x.grad = None

    @torch.no_grad()
    def decode(self, new):
        with self.machine.autocast():
            self.attention(new, rope=self.rope, cache=self.cache)

    def decode_last(self):
        self.cache.buffers, self.cache.ends = map(dict, self.kept)
        self.decode(self.x[:1, -1:])


def measure_layers(width, T, head_dim, latents, rounds, sizes, machine):
    """{kind: a line of the csv} of the attentions at one size. sizes: the AttentionOptions."""
    tokens = sizes.tokens or (65_536 if machine.cuda else 1024)
    x = torch.randn(max(1, tokens // T), T, width, device=machine.device, requires_grad=True)
    layers = {kind: Layer(make_layer(kind, width, head_dim, latents), x, sizes, machine)
              for kind in KINDS}
    for i in range(rounds + 1):
        for layer in layers.values():
            train_seconds = repeated(machine.device, layer.forward_backward)
            decode_seconds = repeated(machine.device, layer.decode_last)
            if i > 0:  # the first round warms up
                layer.train_seconds.append(train_seconds)
                layer.decode_seconds.append(decode_seconds)
    torch.compiler.reset()  # the layers of this size are not needed any more
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
    """Measures single layers: a csv, which has each size as soon as it is measured, a table of
    ratios, a plot, and from which width on one attention is cheaper than another."""
    options = read_options(overrides, BenchOptions, AttentionOptions)
    sizes = read_options(overrides, BenchOptions, AttentionOptions, kind=AttentionOptions)
    machine, folder = Machine(options), Path(options.results)
    folder.mkdir(parents=True, exist_ok=True)
    table = {}  # (head_dim, latents, T, width): {kind: line}
    settings = sizes.head_dims, LATENTS, sizes.lengths
    for head_dim, latents, T, width in itertools.product(*settings, sizes.more_widths):
        table[head_dim, latents, T, width] = formulas(width, T, head_dim, latents)
    pairs = ', '.join(f'{a} / {b}' for a, b in PAIRS)
    print(f'{"":40}time of {pairs}: {" | ".join(COSTS.values())}')
    for head_dim, latents, T, width in itertools.product(*settings, sizes.layer_widths):
        lines = measure_layers(width, T, head_dim, latents, options.rounds, sizes, machine)
        table[head_dim, latents, T, width] = lines
        # what is not measured stays empty
        write_csv(folder / 'attention.csv',
                  [line for size in sorted(table) for line in table[size].values()])
        shown = ' | '.join(' '.join(f'{cost_ratio(lines, a, b, cost):5.2f}' for a, b in PAIRS)
                           for cost in COSTS)
        print(f'latents {latents:12} heads of {head_dim} T {T:5,} width {width:5,}: {shown}')
        times = [' '.join(f'{cost_ratio(lines, kind, "MHA", cost):.2f}' for cost in COSTS)
                 for kind in KINDS]
        print('    of MHA: ' + '; '.join(map(' '.join, zip(KINDS[4:], times[4:]))), flush=True)
    print()
    for (a, b), (cost, what) in itertools.product(PAIRS, COSTS.items()):
        print(f'{a} against {b}, {what}: {crossover(table, sizes, a, b, cost)}')
    plot_attention(folder / 'attention.png', table, sizes)
    print(f'\n{folder}: attention.csv, attention.png')


def crossover(table, sizes, a, b, cost):
    """Where `a` is cheaper than `b`, in words: for latents, heads and lengths the least width from
    which on it always is."""
    words, widths = [], sizes.layer_widths + (() if cost in MEASURED else sizes.more_widths)
    for latents, head_dim in itertools.product(LATENTS, sizes.head_dims):
        least = []  # for each length
        for T in sizes.lengths:
            dearer = [width for width in widths
                      if cost_ratio(table[head_dim, latents, T, width], a, b, cost) >= 1]
            cheaper = [width for width in widths if width > max(dearer, default=0)]
            least.append(f'{min(cheaper):,}' if cheaper else 'never')
        words.append(f'{latents}, heads of {head_dim}: {" / ".join(least)}')
    return f'cheaper from width (T {" / ".join(map(str, sizes.lengths))}) ' + '; '.join(words)


def plot_attention(path, table, sizes):
    """Ratios of time over width, a line for each length: the first LATENTS, the widest heads."""
    figure, panels = pyplot().subplots(2, len(PAIRS), figsize=(12, 7), sharey='row',
                                       layout='constrained')
    latents, head_dim, widths = next(iter(LATENTS)), sizes.head_dims[-1], sizes.layer_widths
    for row, (cost, what) in zip(panels, MEASURED.items()):
        for axes, (a, b) in zip(row, PAIRS):
            for i, T in enumerate(sizes.lengths):
                measured = [table[head_dim, latents, T, width] for width in widths]
                times = [cost_ratio(lines, a, b, cost) for lines in measured]
                axes.plot(widths, times, marker='o', color=f'C{i}', label=f'T {T:,}')
                if cost == 'train_us_a_token':
                    flops = [cost_ratio(lines, a, b, 'mflop_a_token') for lines in measured]
                    axes.plot(widths, flops, linestyle=':', color=f'C{i}')
            axes.axhline(1, color='black', linewidth=0.8)
            axes.set(title=f'{a} / {b}, {what}', xscale='log', xticks=widths, xticklabels=widths,
                     xlabel='width', ylim=(0, None))
            axes.minorticks_off()
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)
        row[0].set_ylabel('ratio of times, 1 = equal')
    figure.suptitle(f'one layer, heads of {head_dim}, latents at the ratios of {latents}; '
                    'dotted: FLOPs')
    save_figure(figure, path)


# --------------------------------------------------------------------------------------------------
# run folders: what sweep and compare read of them


# what is read of a line of metrics.jsonl; a line without the first three is none
NUMBERS = ('step', 'tokens', 'seconds', 'val_loss', 'train_eval_loss', 'val_masked_accuracy',
           'val_bits_per_byte', 'train_loss', 'train_cross_entropy', 'train_embedding_loss',
           'tokens_per_second', 'memory_gb')
# options that leave the result of a run as it is
INCIDENTAL = ('out_dir', 'wandb', 'device', 'log_interval', 'dry_run', 'eval_only', 'export',
              'init_from')


def is_number(value):
    return type(value) in (int, float) and abs(value) < sys.float_info.max


def read_json(path):
    """The dict that a json file holds; {} if there is no such file."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f'{path}: cannot be read ({error})') from None
    if not isinstance(content, dict):
        raise UserError(f'{path}: holds {type(content).__name__}, not the names and values that '
                        'train.py writes')
    return content


def read_run_options(folder):
    """The options of a run as its config.json has them, but for those that no longer exist. One
    that did not exist yet has its default value."""
    saved = read_json(folder / 'config.json')
    if saved.get('arch') not in list(ARCHITECTURES):
        raise UserError(f'{folder}/config.json: missing, or without the options of a run: name the '
                        'folder of a run of train.py')
    _, model_class = ARCHITECTURES[saved['arch']]
    known = config.options_of(TrainOptions, model_class, BlockConfig)
    defaults = {name: option.default for name, option in known.items()}
    return current_options(defaults | saved)


def difference(saved, asked, ignored):
    """The first option that is not as asked, in words; '' if there is none. An option that only one
    of the two has is passed over."""
    asked = json.loads(json.dumps(asked))  # has lists for tuples, as `saved` does
    for name, value in asked.items():
        if name not in ignored and saved.get(name, value) != value:
            return f'{name}={saved[name]}, not {value}'
    return ''


def read_lines(folder):
    """(evaluations, reports of training) of a run: lines of metrics.jsonl, of which the NUMBERS.
    Raises UserError if one of them is missing or is no finite number."""
    path = folder / 'metrics.jsonl'
    try:
        texts = path.read_text().splitlines() if path.exists() else []
        lines = [json.loads(text) for text in texts[:-1]]
    except (OSError, ValueError) as error:
        raise UserError(f'{path}: cannot be read ({error})') from None
    with contextlib.suppress(ValueError):  # a kill may have cut off the last line
        lines += [json.loads(text) for text in texts[-1:]]
    for line in lines:
        if not isinstance(line, dict) or not {*NUMBERS[:3]} <= line.keys():
            raise UserError(f'{path}: a line without step, tokens and seconds: {str(line)[:60]}')
        for name in NUMBERS:
            value = line.get(name, 0)
            if not is_number(value):
                raise UserError(f'{path}: {name} is {value!s:.40} at step {line["step"]!s:.40}')
    numbers = [{name: line[name] for name in NUMBERS if name in line} for line in lines]
    return ([line for line in numbers if 'val_loss' in line],
            [line for line in numbers if 'train_loss' in line])


def is_finished(options, evaluations):
    """Whether a run has come to its last step, or to the end of its time."""
    if not evaluations:
        return False
    last, max_seconds = evaluations[-1], options['max_seconds'] or math.inf
    return last['step'] >= options['max_iters'] or last['seconds'] >= max_seconds


# --------------------------------------------------------------------------------------------------
# sweep: a grid of runs


PART_LENGTH = 80  # of the name of a folder: bytes that the varied options take, and the fixed ones


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


def read_sweep(arguments, command='sweep'):
    """(SweepOptions, paths of the configs, {option: its values}) of the command line of sweep or
    frontier."""
    if {'--help', '-h'} & set(arguments):
        config.load(['--help'], SweepOptions, *TRAINING, doc=__doc__)
    names = {f'--{option.name}' for option in fields(SweepOptions)}
    own = [argument for argument in arguments if argument.partition('=')[0] in names]
    values, _ = config.load(own, SweepOptions, takes_config=False)
    paths = [argument for argument in arguments if not argument.startswith('--')]
    if not paths:
        raise UserError(f'which config? python bench.py {command} CONFIG --key=a,b,c')
    if len({Path(path).stem for path in paths}) < len(paths):
        raise UserError(f'{" ".join(paths)}: two configs of one name would share their folders')
    grid = dict(values_of(argument) for argument in arguments
                if argument.startswith('--') and argument not in own)
    for key, chosen in grid.items():
        if len(set(chosen)) < len(chosen):
            raise UserError(f'{key}={",".join(chosen)}: names a value twice')
    for key in ('out_dir', 'init_from', 'dry_run', 'eval_only', 'export'):
        if key in grid:
            raise UserError(f'{key} is not for {command}, which trains each run in a folder of its '
                            'own: leave it out')
    return SweepOptions(**values), paths, grid


def flags(options):
    return [f'--{key}={value}' for key, value in options.items()]


def options_asked_for(path, options, folder):
    """All options that a run with these will have, as config.json will hold them. Raises UserError
    on options that train.py would refuse."""
    recipe, model_options, _ = train.read_options([path, *flags(options)])
    try:
        with torch.device('meta'):
            model = build(recipe.arch, model_options)
    except UserError as error:
        raise UserError(f'{folder}: {error}') from None
    return dataclasses.asdict(recipe) | flat_options(model.config)


def digest_of(text):
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def folder_name(options, varied):
    """The name of a run's folder: its options, first those that vary in the sweep. Instead of what
    is too long, or contains a slash, it has a digest."""
    parts = []
    for keys in (varied, [key for key in options if key not in varied]):
        part = ','.join(f'{key}={options[key]}' for key in keys)
        fits = len(part.encode()) <= PART_LENGTH and '/' not in part
        parts += [part if fits else digest_of(part)] if part else []
    return ','.join(parts) or 'run'


def choose_folder(path, options, varied):
    """The folder of a run: one that holds it already, whatever its name, or a new one."""
    parent = Path('out') / f'sweep-{Path(path).stem}'
    folder = parent / folder_name(options, varied)
    asked, ignored = options_asked_for(path, options, folder), set(INCIDENTAL) - set(varied)
    taken = sorted(file.parent for file in parent.glob('*/config.json'))
    differences = {held: difference(read_run_options(held), asked, ignored) for held in taken}
    agreeing = [held for held in taken if not differences[held]]
    if agreeing:
        return folder if folder in agreeing else agreeing[0]
    if folder in taken:  # by a run of an earlier state of the config, or of this script
        other = folder.with_name(f'{folder.name},{digest_of(json.dumps(asked))}')
        print(f'{folder} holds a run with {differences[folder]}: this one goes to {other}')
        return other
    return folder


def read_finetune(text, folder):
    """The FinetuneOptions for a run. text: what stands behind --finetune=."""
    try:
        values, _ = config.load(shlex.split(text), FinetuneOptions, takes_config=False)
        for name in ('out_dir', 'predict'):
            if name in values:
                raise UserError(f'{name} is not for sweep: leave it out')
        return FinetuneOptions(**values | dict(out_dir=str(folder)))
    except (UserError, ValueError) as error:
        raise UserError(f'--finetune={text}: {error}') from None


class SweepRun(NamedTuple):
    """A run of a sweep."""

    path: str  # of its config
    folder: Path
    options: dict  # {name: value, as it stands on the command line}
    finetune: str | None  # options for finetune_sst2.py

    def stages(self):
        """[(what is still to be done, the command that does it)]"""
        here, stages = Path(__file__).parent, []
        if not self.is_trained():
            stages.append(('training', [
                str(here / 'train.py'), self.path, f'--out_dir={self.folder}', '--init_from=auto',
                *flags(self.options)]))
        if self.finetune is not None:
            reason = self.untested()
            if reason:
                stages.append((reason, [str(here / 'finetune_sst2.py'), f'--out_dir={self.folder}',
                                        *shlex.split(self.finetune)]))
        return stages

    def is_trained(self):
        evaluations, _ = read_lines(self.folder)
        return bool(evaluations) and is_finished(read_run_options(self.folder), evaluations)

    def untested(self):
        """Why the run has to be fine-tuned; '' if it has been, with these options."""
        options = read_finetune(self.finetune, self.folder)
        path = options.file('.json')
        summary = read_json(path)
        if not summary:
            return 'fine-tuning'
        differs = difference(summary['options'], dataclasses.asdict(options), INCIDENTAL)
        if not differs and len(summary['seeds']) < options.seeds:  # it was interrupted
            differs = f'{len(summary["seeds"])} of {options.seeds} seeds'
        return differs and f'fine-tuning again, {path.name} has {differs}'


def plan_runs(options, paths, grid):
    """The SweepRuns of a sweep. All of them are checked before the first one starts."""
    varied = [key for key, values in grid.items() if len(values) > 1]
    runs = {}
    for path, values in itertools.product(paths, itertools.product(*grid.values())):
        chosen = dict(zip(grid, values))
        folder = choose_folder(path, chosen, varied)
        runs[folder] = SweepRun(path, folder, chosen, options.finetune)
    if options.finetune is not None:
        read_sst2(read_finetune(options.finetune, next(iter(runs))))
    return list(runs.values())


def environments(jobs):
    """For each of the jobs what its processes find in their environment: a share of the cores, and
    of several GPUs one."""
    if jobs == 1:
        return [{}]
    # unbuffered: else a log has what went to stderr before what was printed earlier
    shared = dict(OMP_NUM_THREADS=str(max(1, os.cpu_count() // jobs)), PYTHONUNBUFFERED='1')
    visible = os.environ.get('CUDA_VISIBLE_DEVICES')
    gpus = visible.split(',') if visible else list(map(str, range(torch.cuda.device_count())))
    if len(gpus) < 2:
        return [shared] * jobs
    return [shared | dict(CUDA_VISIBLE_DEVICES=gpus[i % len(gpus)]) for i in range(jobs)]


class Sweep:
    """Carries out runs, `jobs` of them at a time, in processes of their own."""

    def __init__(self, runs, jobs):
        self.runs, self.jobs = runs, jobs
        self.lock, self.processes, self.stopped = threading.Lock(), set(), False
        # the runs by number: which wait, and since when the others are under way
        self.waiting = {number for number, run in enumerate(runs, 1) if run.stages()}
        self.started, self.durations = {}, []
        self.places = queue.SimpleQueue()
        for environment in environments(jobs):
            self.places.put(environment)

    def run_all(self):
        """Returns {folder: why its run failed}."""
        with concurrent.futures.ThreadPoolExecutor(self.jobs) as pool:
            futures = {run.folder: pool.submit(self.perform, number, run)
                       for number, run in enumerate(self.runs, 1)}
            try:
                concurrent.futures.wait(futures.values())
            except KeyboardInterrupt:
                self.stop()
                raise
        results = {folder: future.result() for folder, future in futures.items()}
        return {folder: reason for folder, reason in results.items() if reason}

    def stop(self):
        """No more runs start. Those that are being trained finish their step and save."""
        with self.lock:
            self.stopped = True
            for process in self.processes:
                process.terminate()

    def perform(self, number, run):
        """Carries out what is left of a run, when it is its turn. Returns why it failed, or ''."""
        stages = run.stages()
        if not stages:
            self.say(number, run, 'is done')
        if not stages or self.stopped:
            return ''
        environment, start = self.places.get(), time.perf_counter()
        with self.lock:
            self.waiting.remove(number)
            self.started[number] = start
        reason = self.carry_out(number, run, stages, environment)
        seconds = time.perf_counter() - start
        with self.lock:
            del self.started[number]
            self.durations += [] if reason else [seconds]
        self.places.put(environment)
        if not reason:
            self.say(number, run, f'finished after {timedelta(seconds=round(seconds))}')
        else:
            self.say(number, run, 'is stopped' if self.stopped else f'failed: {reason}')
        return reason

    def carry_out(self, number, run, stages, environment):
        """Returns why one of the stages of a run failed, or ''."""
        try:
            for state, command in stages:
                self.say(number, run, state + (', log in its sweep.log' if self.jobs > 1 else ''))
                reason = self.execute(run.folder, command, environment)
                if reason:
                    return reason
            return 'it ended before it was done' if run.stages() else ''
        except (OSError, UserError) as error:  # a folder or a file of the run
            return str(error)

    def execute(self, folder, command, environment):
        """Runs a python process to its end. Returns '', or if it failed the last line that it wrote
        to stderr."""
        with contextlib.ExitStack() as stack:
            log = None  # what is printed goes where this process prints
            if self.jobs > 1:
                folder.mkdir(parents=True, exist_ok=True)
                log = stack.enter_context(open(folder / 'sweep.log', 'a'))
            with self.lock:
                if self.stopped:
                    return 'stopped'
                process = subprocess.Popen([sys.executable, *command], stdout=log,
                                           stderr=subprocess.PIPE, env=os.environ | environment)
                self.processes.add(process)
            # newline='' keeps the \r of a progress bar
            last, errors = '', io.TextIOWrapper(process.stderr, errors='replace', newline='')
            for line in errors:
                print(line, end='', file=log or sys.stderr, flush=True)
                last = line.strip() or last
            status = process.wait()
            with self.lock:
                self.processes.remove(process)
        if status < 0:
            return f'killed by signal {-status}'
        return last or f'status {status}' if status else ''

    def say(self, number, run, state):
        with self.lock:
            print(f'{number} of {len(self.runs)}: {run.folder} {state}{self.time_left()}',
                  flush=True)

    def time_left(self):
        """In words, from the mean of the runs that are finished."""
        n_left = len(self.waiting) + len(self.started)
        if not self.durations or not n_left:
            return ''
        mean, now = statistics.mean(self.durations), time.perf_counter()
        under_way = [max(0.0, mean - (now - start)) for start in self.started.values()]
        seconds = max([(len(self.waiting) * mean + sum(under_way)) / self.jobs, *under_way])
        return f'; {n_left} to go, about {timedelta(seconds=round(seconds))}'


def train_runs(runs, options):
    """Trains, and fine-tunes if asked, what is left of these SweepRuns. Returns the folders of
    those that failed; why stands on stderr."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends a sweep as Ctrl-C does
    failures = Sweep(runs, options.jobs).run_all()
    for folder, reason in failures.items():
        print(f'{folder} failed: {reason}', file=sys.stderr)
    return set(failures)


def stop_at_failures(failures, runs):
    if failures:
        raise UserError(f'{len(failures)} of {len(runs)} runs failed; the same command goes on '
                        'from here')


def sweep(arguments):
    """A run for every config and combination of values."""
    options, paths, grid = read_sweep(arguments)
    runs = plan_runs(options, paths, grid)
    failures = train_runs(runs, options)
    done = [str(run.folder) for run in runs if run.folder not in failures]
    if len(done) > 1:
        print('\n' + shlex.join(['python', 'bench.py', 'compare', *done]))
    stop_at_failures(failures, runs)


# --------------------------------------------------------------------------------------------------
# compare: groups of runs


# {measure: (title of its column, format)}, of the two tables
RESULTS = dict(
    train_eval_loss=('training\nloss', '.4f'),
    val_loss=('validation\nloss', '.4f'),
    val_masked_accuracy=('masked\naccuracy', '.4f'),
    val_bits_per_byte=('bits\nper byte', '.4f'),
    sst2_accuracy=('SST-2\naccuracy', '.2%'))
SPENT = dict(
    val_loss_at_equal_tokens=('validation loss at\n{equal_tokens:,} tokens', '.4f'),
    val_loss_at_equal_seconds=('validation loss at\n{equal_seconds:,.0f} seconds', '.4f'),
    tokens_to_common_loss=('tokens to\nloss {common_loss:.4f}', ',.0f'),
    seconds_to_common_loss=('seconds to\nloss {common_loss:.4f}', ',.0f'),
    tokens_per_second=('tokens/s', ',.0f'),
    memory_gb=('memory,\nGB', '.2f'))
FEWEST = 3  # values that make an interval: of two it is 13 times their standard error


class FinishedRun(NamedTuple):
    """A run to compare."""

    folder: Path
    seed: int
    options: dict  # those that tell one group from another
    evaluations: list  # lines of metrics.jsonl
    reports: list
    parameters: int | None
    sst2: float | None  # accuracy, the mean if it was fine-tuned with several seeds
    losses_of: tuple  # what has to be the same if losses are to be compared


def read_run(folder):
    facts = read_json(folder / 'run.json')
    origin = facts
    if 'data_sha256' not in facts:  # a run of an earlier version
        origin = load_checkpoint(best_checkpoint(folder))['provenance']
    evaluations, reports = read_lines(folder)
    if not evaluations:
        raise UserError(f'{folder}: metrics.jsonl has no validation loss')
    options = read_run_options(folder)
    losses_of = origin.get('data_sha256'), origin.get('tokenizer'), options.get('causal', True)
    own = {name: value for name, value in options.items() if name not in (*INCIDENTAL, 'seed')}
    own['init_from'] = origin.get('started_from', 'scratch')
    parameters, sst2 = facts.get('parameters'), read_json(folder / 'sst2.json').get('mean')
    return FinishedRun(folder, options['seed'], own, evaluations, reports,
                       parameters if is_number(parameters) else None,
                       sst2 if is_number(sst2) else None, losses_of)


def read_runs(folders):
    """The runs that can be compared. What is wrong with one is said on stderr. Raises UserError on
    a name that is no folder, and if fewer than two are left."""
    runs = []
    for folder in map(Path, folders):
        try:
            runs.append(read_run(folder))
        except UserError as error:
            if not folder.is_dir():
                raise
            print(f'{folder} is left out: {error}', file=sys.stderr)
    if len(runs) < 2:
        raise UserError('fewer than two of these runs can be compared')
    for run in runs:
        if run.losses_of != runs[0].losses_of:
            raise UserError(f'{run.folder} and {runs[0].folder} were trained on different data, '
                            'with different tokenizers, or are an encoder and a causal model: '
                            'their losses are not of the same thing')
        if not is_finished(run.options, run.evaluations):
            print(f'{run.folder} is not finished: it was last evaluated at step '
                  f'{run.evaluations[-1]["step"]:,}', file=sys.stderr)
    return runs


def group_runs(runs):
    """{label: runs}, a group for each combination of options, the one with the lowest loss first.
    Its label names the options in which the groups differ."""
    names = {name for run in runs for name in run.options}
    differ = sorted(name for name in names
                    if any(run.options.get(name) != runs[0].options.get(name) for run in runs))
    groups = {}
    for run in sorted(runs, key=lambda run: run.seed):
        label = ', '.join(f'{name}={run.options.get(name)}' for name in differ)
        groups.setdefault(label or 'all options the same', []).append(run)
    return dict(sorted(groups.items(), key=lambda item: statistics.mean(map(final_loss, item[1]))))


def final_loss(run):
    return run.evaluations[-1]['val_loss']


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


def common_ground(runs):
    """The tokens and seconds that every run has spent, and the loss that every run has reached."""
    ends = [run.evaluations[-1] for run in runs]
    lowest = [min(line['val_loss'] for line in run.evaluations) for run in runs]
    return dict(equal_tokens=min(line['tokens'] for line in ends),
                equal_seconds=min(line['seconds'] for line in ends), common_loss=max(lowest))


def measure_run(run, common):
    """{measure: its value} of a run; measures that it lacks are None."""
    lines, last = run.evaluations, run.evaluations[-1]
    rates = [line['tokens_per_second'] for line in run.reports if 'tokens_per_second' in line]
    memory = [line['memory_gb'] for line in run.reports if 'memory_gb' in line]
    loss = common['common_loss']
    return {name: last.get(name) for name in RESULTS} | dict(
        sst2_accuracy=run.sst2,
        val_loss_at_equal_tokens=loss_at(lines, 'tokens', common['equal_tokens']),
        val_loss_at_equal_seconds=loss_at(lines, 'seconds', common['equal_seconds']),
        tokens_to_common_loss=spent_until(lines, 'tokens', loss),
        seconds_to_common_loss=spent_until(lines, 'seconds', loss),
        tokens_per_second=statistics.median(rates) if rates else None,
        memory_gb=max(memory, default=None))


def summarize(values):
    """Mean and half the 95% interval of values that are not None, and the values."""
    values = [value for value in values if value is not None]
    mean, interval = mean_and_interval(values) if values else (None, None)
    return dict(n=len(values), mean=mean, interval=interval if len(values) >= FEWEST else None,
                values=values)


def compare_group(label, group, common):
    """What --json=True prints of a group."""
    measured = [measure_run(run, common) for run in group]
    return dict(options=label, runs=len(group), seeds=[run.seed for run in group],
                parameters=next((run.parameters for run in group if run.parameters), None),
                **common,
                **{name: summarize([values[name] for values in measured])
                   for name in RESULTS | SPENT})


def flat_line(line):
    """A group for the csv: a column for each number, and for each list of numbers."""
    flat = {}
    for name, value in line.items():
        parts = value.items() if isinstance(value, dict) else [('', value)]
        for part, content in parts:
            content = ' '.join(map(str, content)) if isinstance(content, list) else content
            flat[f'{name}_{part}'.rstrip('_')] = content
    return flat


def shown(summary, form):
    """A cell of a table."""
    if summary['interval'] is None:
        return ', '.join(format(value, form) for value in summary['values'])
    return f'{format(summary["mean"], form)} +- {format(summary["interval"], form)}'


def print_table(titles, rows):
    """Prints columns under their titles, which may take several lines. Columns without entries are
    left out."""
    height, columns = max(title.count('\n') for title in titles) + 1, []
    for title, *cells in zip(titles, *rows):
        if any(cells):
            head = title.split('\n')
            column = [''] * (height - len(head)) + head + cells
            width = max(map(len, column))
            columns.append([text.rjust(width) for text in column])
    print()
    for line in zip(*columns):
        print('   '.join(line).rstrip())


def show_groups(table):
    """Prints the groups and the tables of their measures."""
    print(f'mean +- half the 95% interval over seeds, for fewer than {FEWEST} runs their values; '
          'losses in nats\n')
    for i, line in enumerate(table, 1):
        n = line['runs']
        print(textwrap.fill(f'#{i:<3} {n} run{"s" * (n > 1)}: {line["options"]}', 100,
                            subsequent_indent=' ' * 5, break_long_words=False))
    for measures in (RESULTS, SPENT):
        titles = [title.format(**table[0]) for title, _ in measures.values()]
        rows = [[shown(line[name], form) for name, (_, form) in measures.items()]
                for line in table]
        names = [[f'#{i}'] for i in range(1, len(table) + 1)]
        if measures is RESULTS:
            titles = ['parameters', *titles]
            names = [[*name, f'{line["parameters"]:,}' if line['parameters'] else '']
                     for name, line in zip(names, table)]
        print_table(['', *titles], [name + row for name, row in zip(names, rows)])


def show_pairs(groups):
    """Prints how much higher the final validation loss of one group is than that of another, seed
    by seed, for groups with enough seeds in common."""
    losses = [{run.seed: final_loss(run) for run in group} for group in groups]
    rows = []
    for (i, lower), (j, higher) in itertools.combinations(enumerate(losses, 1), 2):
        seeds = lower.keys() & higher.keys()
        if len(seeds) >= FEWEST:
            differences = summarize([higher[seed] - lower[seed] for seed in seeds])
            rows.append([f'#{j} - #{i}', str(len(seeds)), shown(differences, '.4f')])
    if rows:
        print_table(['', 'seeds', 'validation loss, difference\nbetween runs of one seed'], rows)


def plot_groups(path, groups):
    """Losses over tokens and over seconds, a colour for each group and a line for each run; and
    the embedding loss, if there is one."""
    runs = [run for group in groups.values() for run in group]
    embedding = any('train_embedding_loss' in line for run in runs for line in run.reports)
    n = 3 if embedding else 2
    figure, panels = pyplot().subplots(1, n, figsize=(6 * n, 5), layout='constrained')
    for i, (label, group) in enumerate(groups.items()):
        label = '\n'.join(textwrap.wrap(f'#{i + 1}: {label}', 60 * n))
        for k, run in enumerate(group):
            style = dict(color=f'C{i % 10}', alpha=0.8)
            for axes, key in zip(panels, ('tokens', 'seconds')):
                plot_line(axes, run.evaluations, key, 'val_loss', marker='.', markersize=4, **style,
                          label=label if k == 0 else None)
                plot_line(axes, *training_curve(run, key), linewidth=0.6, **style)
            if embedding:
                plot_line(panels[2], run.reports, 'tokens', 'train_embedding_loss', linewidth=0.6,
                          **style)
    for axes, key in zip(panels, ('tokens', 'seconds', 'tokens')):
        axes.set(xlabel=key, xlim=(0, None), ylabel='validation loss (nats), thin: training loss')
        axes.grid(alpha=0.3)
        cut_to_later(axes)
    if embedding:
        panels[2].set_ylabel('embedding loss in training')
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, loc='outside lower center')
    save_figure(figure, path)


def training_curve(run, key):
    """What plot_line takes of a run's loss on its training split: that in evaluation mode, or in a
    run of an earlier version that of the batches."""
    if 'train_eval_loss' in run.evaluations[-1]:
        return run.evaluations, key, 'train_eval_loss'
    terms = any('train_cross_entropy' in line for line in run.reports)
    return run.reports, key, 'train_cross_entropy' if terms else 'train_loss'


def plot_line(axes, lines, x, y, **style):
    points = [(line[x], line[y]) for line in lines if y in line]
    if points:
        axes.plot(*zip(*points), **style)


def cut_to_later(axes):
    """Cuts the axis of losses to what follows the first tenth of training: what comes before is
    many times as high."""
    later = []
    for line in axes.lines:
        x, y = map(np.asarray, line.get_data())
        later += y[x >= x.max() / 10].tolist()
    margin = 0.05 * (max(later) - min(later)) + 0.01
    axes.set_ylim(min(later) - margin, max(later) + margin)


def compare(arguments):
    """Prints tables of groups of runs, and writes them and a plot."""
    folders = [argument for argument in arguments if not argument.startswith('--')]
    overrides = [argument for argument in arguments if argument.startswith('--')]
    options = read_options(overrides, BenchOptions)
    if len(set(folders)) < max(len(folders), 2):
        raise UserError('compares two runs or more, each named once: '
                        'python bench.py compare RUN RUN ...')
    runs = read_runs(folders)
    groups, common = group_runs(runs), common_ground(runs)
    table = [compare_group(label, group, common) for label, group in groups.items()]
    folder = Path(options.results)
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / 'compare.csv', list(map(flat_line, table)))
    plot_groups(folder / 'compare.png', groups)
    if options.json:
        print(json.dumps(table, indent=2))
        return
    show_groups(table)
    show_pairs(groups.values())
    evaluated = {run.options['eval_iters'] * run.options['batch_size'] for run in runs}
    if len(evaluated) > 1:
        print('\nthese runs were evaluated on different numbers of sequences '
              '(eval_iters x batch_size)')
    print(f'\n{folder}: compare.csv, compare.png')


# --------------------------------------------------------------------------------------------------
# frontier: loss beside cache


FRONTIER = dict(
    learning_rate=('learning\nrate', 'g'),
    val_loss=('validation\nloss', '.4f'),
    difference=('difference from\nthe first', '.4f'),
    cache_bytes=('cache, bytes\na token', ',.0f'),
    train_tokens_per_s=('training,\ntokens/s', ',.0f'),
    decode_ms_per_token=('decoding,\nms a token', '.2f'),
    params=('parameters', ','))


def tuned_runs(options, paths, grid):
    """The runs of all seeds at the learning rate that the first seed prefers, {path: SweepRuns}."""
    runs = plan_runs(options, paths, grid)
    trials = [run for run in runs if run.options.get('seed') == grid.get('seed', [None])[0]]
    failures = train_runs(trials, options)
    chosen = {}
    for path in paths:
        losses = {run.options.get('learning_rate'): final_loss(read_run(run.folder))
                  for run in trials if run.path == path and run.folder not in failures}
        if not losses:
            raise UserError(f'{path}: failed at every learning rate, see above')
        rate = min(losses, key=losses.get)
        chosen[path] = [run for run in runs
                        if run.path == path and run.options.get('learning_rate') == rate]
    return chosen


def show_frontier(table):
    rows = []
    for line in table:
        values = [(line[name], form) for name, (_, form) in FRONTIER.items()]
        rows.append([line['config'], *(shown(value, form) if isinstance(value, dict)
                                       else format(value, form) for value, form in values)])
    print('\nmean +- half the 95% interval over the seeds ' + ', '.join(map(str, table[0]['seeds']))
          + f', for fewer than {FEWEST} their values; losses in nats')
    print_table(['', *(title for title, _ in FRONTIER.values())], rows)


def name_points(axes, points):
    """Writes the names {name: (x, y, points aside, color)} beside points, right or left, a little
    lower or higher: where they cover the fewest points, names, and bars, and end inside."""
    def box(artist, pad=0):
        return artist.get_window_extent().padded(pad)

    taken = [box(line, 2) for line, _, _ in axes.containers]
    bars = [box(bar) for _, _, bars in axes.containers for bar in bars]

    def covered(text):
        inside = axes.bbox.x0 < box(text).x0 and box(text).x1 < axes.bbox.x1
        return (sum(map(box(text).overlaps, taken)) + sum(map(box(text).overlaps, bars)) / 4
                + 2 * (not inside))

    for name, (x, y, aside, color) in points.items():
        texts = [axes.annotate(name, (x, y), (aside + side * 6, up), textcoords='offset points',
                               ha='left' if side > 0 else 'right', va='center', fontsize=8,
                               color=color)
                 for up in (0, -5, 5) for side in (1, -1)]
        kept = min(texts, key=covered)
        for text in texts:
            if text is not kept:
                text.remove()
        taken.append(box(kept))


def plot_frontier(path, table):
    """Losses with their intervals, over the cache and over the speed of training."""
    from matplotlib.transforms import offset_copy
    figure, panels = pyplot().subplots(1, 2, figsize=(12, 5), layout='constrained', sharey=True)
    powers = np.log2([line['cache_bytes'] for line in table])
    ticks = 2 ** np.arange(math.floor(powers.min()), math.ceil(powers.max()) + 1)
    panels[0].set_xscale('log', base=2)
    panels[0].set(xticks=ticks, xticklabels=ticks, ylabel='validation loss (nats), 95% interval')
    xlabels = dict(cache_bytes='bytes of a cache of {context:,} tokens, a token',
                   train_tokens_per_s='training, tokens/s')
    named = []
    for axes, (name, xlabel) in zip(panels, xlabels.items()):
        at, points = collections.Counter(), {}
        for i, line in sorted(enumerate(table), key=lambda item: item[1]['val_loss']['mean']):
            loss, x, color = line['val_loss'], line[name], f'C{i % 10}'
            # what stands at the same place is spread a little, to the right and left in turns
            aside = 3 * ((at[x] + 1) // 2) * (-1 if at[x] % 2 else 1)
            at[x] += 1
            axes.errorbar(x, loss['mean'], yerr=loss['interval'], color=color, marker='o',
                          capsize=2, alpha=0.8,
                          transform=offset_copy(axes.transData, figure, aside, units='points'))
            half = loss['interval'] or 0  # the limits do not see what is drawn aside
            axes.update_datalim([(x, loss['mean'] - half), (x, loss['mean'] + half)])
            points[line['config'].removesuffix('.py')] = x, loss['mean'], aside, color
        axes.margins(x=0.15)
        axes.autoscale_view()
        axes.set(xlabel=xlabel.format(**table[0]))
        axes.grid(alpha=0.3)
        named.append(points)
    figure.draw_without_rendering()  # places the axes
    for axes, points in zip(panels, named):
        name_points(axes, points)
    save_figure(figure, path)


def frontier(arguments):
    """Trains configs at the learning rates that suit them, times them, and draws loss beside cache
    and speed."""
    options, paths, grid = read_sweep(arguments, 'frontier')
    fixed = {key: values[0] for key, values in grid.items() if key not in ('learning_rate', 'seed')}
    for key in fixed:
        if len(grid[key]) > 1:
            raise UserError(f'{key}={",".join(grid[key])}: frontier takes several values of '
                            'learning_rate and seed alone; sweep takes all')
    asked = [options_asked_for(path, fixed, path) for path in paths]
    for path, own in zip(paths, asked):
        if not own.get('causal', True):
            raise UserError(f'{path}: an encoder, which has no cache')
    chosen = tuned_runs(options, paths, grid)
    final = [run for runs in chosen.values() for run in runs]
    stop_at_failures(train_runs(final, options), final)
    finished = {run.folder: run for run in read_runs([run.folder for run in final])}
    timing = dataclasses.replace(read_options(flags(fixed)),
                                 context=max(own['block_size'] for own in asked))
    table = []
    for runs, line in zip(chosen.values(), measure_configs(paths, flags(fixed), timing)):
        group = [finished[run.folder] for run in runs]
        losses = {run.seed: final_loss(run) for run in group}
        if not table:
            reference = losses
        table.append(line | dict(
            learning_rate=group[0].options['learning_rate'], seeds=list(losses),
            cache_bytes=line['cache_bytes_per_token_counted'],
            val_loss=summarize(losses.values()),
            difference=summarize([losses[seed] - reference[seed] for seed in losses])))
    folder = Path(timing.results)
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / 'frontier.csv', list(map(flat_line, table)))
    plot_frontier(folder / 'frontier.png', table)
    show_frontier(table)
    print(f'\n{folder}: frontier.csv, frontier.png')


def main():
    commands = dict(attention=attention, sweep=sweep, compare=compare, frontier=frontier)
    arguments = sys.argv[1:]
    if arguments and arguments[0] in commands:
        return commands[arguments[0]](arguments[1:])
    if {'--help', '-h'} & set(arguments):
        config.load(['--help'], BenchOptions, SweepOptions, *TRAINING, AttentionOptions,
                    doc=__doc__)
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
