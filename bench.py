"""How fast configurations are on this machine, and which of several runs is better.

    python bench.py config/mla.py config/mla_o.py --micro_batch_size=32      # training and decoding, against each other
    python bench.py                                                         # all configs: on a CPU it takes long
    python bench.py attention                                               # one layer: from where on do latents pay?
    python bench.py sweep config/quick.py --learning_rate=3e-3,6e-3 --seed=1,2,3
    python bench.py compare out/sweep-quick/*

Speed: weights and tokens are random. Training: steps of train.py on micro_batch_size sequences (batch_size, where there is
none): tokens/s, the share of the machine's matmul peak that their useful arithmetic is, and the peak memory of a process
that does nothing else. Decoding (causal models): milliseconds for one token of one sequence at `context` tokens (or
block_size, if that is less), with the cache and without, beside the time to read once the weights that a token needs; the
worst token, where tokens cost unlike amounts. Medians of rounds in which all take turns.

attention: one layer of MHA, of grouped-query MHA with MLA's cache, of MLA and of MLA-o, forward and backward, and decoding,
over widths, heads, latents and lengths. sweep: one run of train.py for each combination of the values, separated by
commas, skipping what is done. compare: runs that differ in their seed alone are one group; mean and 95% interval of the
validation loss at the end, at equal tokens and at equal seconds.
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
from types import SimpleNamespace

import numpy as np
import torch

import config
import train
from config import UserError
from model import ARCHITECTURES, ATTENTIONS, Cache, ModelConfig, TransformerConfig, block_flops, rope_table
from train import (MachineOptions, TrainOptions, best_checkpoint, build, compiled, load_checkpoint, make_optimizers,
                   mean_and_interval, memory_gb, open_machine, predicted_share, pyplot, read_metrics, recipe_of, train_step)

CACHED_TOKENS = 16  # decoded in a round, up to the context; with grouped latents a whole group


@dataclass
class BenchOptions(MachineOptions):
    """Options"""

    context: int = 200  # tokens of context when decoding, at most block_size
    rounds: int = 5  # of which the median is reported
    json: bool = False  # print a list of dicts instead of the tables
    profile: str | None = None  # file for a profiler trace of one more round, for chrome://tracing or Perfetto
    results: str = 'out/bench'  # folder for the table and plot of attention, and the plot of compare

    def __post_init__(self):
        config.check_numbers(self, 'seed')
        if self.context < 2:
            raise UserError(f'context={self.context}: takes two tokens or more, one to go on from and one to decode')
        if self.profile and (Path(self.profile).is_dir() or not Path(self.profile).parent.is_dir()):
            raise UserError(f'profile={self.profile}: takes the name of a file in a folder that exists')


KNOWN = (BenchOptions, TrainOptions, ModelConfig, *(config_class for _, config_class in ARCHITECTURES.values()))


def read_options(arguments, *known):
    """BenchOptions of the command line; options of training and models are checked by name, and left to the configs."""
    values, _ = config.load(arguments, *(known or KNOWN), doc=__doc__, takes_config=False)
    return BenchOptions(**{field.name: values[field.name] for field in fields(BenchOptions) if field.name in values})


def clock(device, work):
    """Seconds that work() takes, until the device is done."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def matmul_peak(machine):
    """FLOP/s of a square matrix product that is large for the device, in the precision in which it trains."""
    n = 8192 if machine.device.type == 'cuda' else 2048
    a, b, out = torch.randn(3, n, n, device=machine.device).to(machine.precision)
    return 2 * n ** 3 / min(clock(machine.device, lambda: torch.mm(a, b, out=out)) for _ in range(3))


class Subject:
    """A config under measurement: its model, a batch to train on, a context to decode from."""

    def __init__(self, path, overrides, machine):
        flat, self.name = config.load([str(path), *overrides], *KNOWN)
        own = {field.name for field in fields(BenchOptions)} - {field.name for field in fields(MachineOptions)}
        self.recipe, model_options = recipe_of({k: v for k, v in flat.items() if k not in own})
        self.machine = machine
        torch.manual_seed(self.recipe.seed)
        self.model = build(self.recipe.arch, model_options).to(machine.device)
        self.runner = compiled(self.recipe, self.model, machine)
        self.optimizers = make_optimizers(self.model, self.recipe)
        self.ms = []  # of each round: a dict

        c, self.n = self.model.config, self.recipe.micro_batch_size or self.recipe.batch_size
        idx = torch.randint(c.vocab_size, (self.n, c.block_size))
        share = predicted_share(self.recipe, c)
        self.batch = idx, idx
        if not c.causal:
            positions = torch.rand(self.n, c.block_size).argsort(dim=1)[:, :round(share * c.block_size)]
            self.batch = idx, idx.gather(1, positions), positions
        self.tokens = idx.numel()
        self.flops = self.tokens * self.model.flops_per_token(c.block_size, share)  # useful ones

    def step(self):
        data = SimpleNamespace(batch=lambda numbers: self.batch)
        train_step(self.runner.train(), self.optimizers, data, 0, self.recipe, self.machine, self.n, 1)

    def open_decoding(self, context):
        c = self.model.config
        self.size = min(context, c.block_size)
        if self.size < 2:
            raise UserError(f'block_size={c.block_size}: decoding takes two tokens, one to go on from and one to decode')
        self.n_cached = min(getattr(c, 'group_size', CACHED_TOKENS), self.size - 1)
        self.idx = torch.randint(c.vocab_size, (1, self.size), device=self.machine.device)
        tables = {id(m.weight) for m in self.model.modules() if isinstance(m, torch.nn.Embedding)}
        tables -= {id(self.model.head_weight())}
        weights = [p.detach().flatten() for p in self.model.parameters() if id(p) not in tables]
        self.weights = torch.cat(weights).to(self.machine.precision)
        self.cache = self.model.init_cache(1, self.size)

    @torch.no_grad()
    def decode(self):
        """Milliseconds: of the last tokens with the cache, of the very last without it, of reading the weights."""
        model, first = self.model.eval(), self.size - self.n_cached
        last = torch.full((1, 1), self.size - 1, device=self.machine.device)
        milliseconds = lambda work: 1e3 * clock(self.machine.device, work)
        with self.machine.autocast():
            self.cache.n_tokens = 0
            model(self.idx[:, :first], cache=self.cache)
            cached = [milliseconds(lambda: model(self.idx[:, t:t + 1], cache=self.cache)) for t in range(first, self.size)]
            return dict(cached=cached, uncached=milliseconds(lambda: model(self.idx, positions=last)),
                        read=milliseconds(self.weights.sum))

    def report(self, peak, memory):
        """What --json=True prints of it. peak: FLOP/s of matrix products; memory: bytes."""
        median = lambda name: statistics.median(ms[name] for ms in self.ms)
        seconds = median('step') / 1e3
        line = dict(config=self.name, params=self.model.n_params(), sequences=self.n, block_size=self.batch[0].size(1),
                    train_tokens_per_s=self.tokens / seconds, train_matmul_share=self.flops / seconds / peak,
                    matmul_peak_flops_per_s=peak, peak_memory_bytes=memory)
        if not self.model.config.causal:
            return line
        cached = [statistics.median(token) for token in zip(*(ms['cached'] for ms in self.ms))]  # of each token
        return line | dict(
            context=self.size, decode_ms_per_token=statistics.mean(cached), decode_ms_per_token_worst=max(cached),
            decode_ms_per_token_uncached=median('uncached'), weights_read_ms=median('read'),
            cache_bytes_per_token=self.model.cache_bytes_per_token(self.machine.precision),
            cache_bytes_per_token_counted=self.cache.n_bytes() / self.size)


def memory_of(path, overrides):
    """Bytes that a process of its own takes at most, in all or on its GPU, to train a config."""
    with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as fresh:
        return fresh.submit(peak_memory, path, overrides).result()


def peak_memory(path, overrides):
    machine = open_machine(read_options(overrides))
    subject = Subject(path, overrides, machine)
    subject.step()
    subject.step()  # has gradients beside the optimizer's state
    return round(memory_gb(machine.device) * 2 ** 30)


def measure(paths, overrides, options):
    """The lines of the report, after `rounds` rounds and one to warm up."""
    machine = open_machine(options)
    subjects = [Subject(path, overrides, machine) for path in paths]
    memory = [memory_of(path, overrides) for path in paths]
    causal = [subject for subject in subjects if subject.model.config.causal]
    for subject in causal:
        subject.open_decoding(options.context)
    peaks = []
    for i in range(options.rounds + 1):
        print(f'\rround {i} of {options.rounds}', end='\n' if i == options.rounds else '', file=sys.stderr, flush=True)
        peaks.append(matmul_peak(machine))
        for subject in subjects:
            ms = dict(step=1e3 * clock(machine.device, subject.step))
            ms |= subject.decode() if subject in causal else {}
            if i:
                subject.ms.append(ms)
    if options.profile:
        with torch.profiler.profile() as trace:
            for subject in subjects:
                subject.step()
                if subject in causal:
                    subject.decode()
        trace.export_chrome_trace(options.profile)
    return [subject.report(max(peaks), n_bytes) for subject, n_bytes in zip(subjects, memory)]


def show(lines):
    """A table of training, and one of decoding."""
    print(f'training: matrix products reach {lines[0]["matmul_peak_flops_per_s"] / 1e9:,.0f} GFLOP/s here\n')
    print(f'{"":22}{"parameters":>12}{"sequences":>16}{"tokens/s":>11}{"of the peak":>13}{"memory, GB":>12}')
    for line in lines:
        print(f'{line["config"]:22}{line["params"]:12,}{line["sequences"]:9} x{line["block_size"]:5}'
              f'{line["train_tokens_per_s"]:11,.0f}{line["train_matmul_share"]:13.1%}{line["peak_memory_bytes"] / 2 ** 30:12.2f}')
    decoding = [line for line in lines if 'context' in line]
    if not decoding:
        return
    print(f'\ndecoding, ms a token\n\n{"":22}{"context":>9}{"cached":>9}{"worst":>9}{"uncached":>10}{"weights":>9}{"ratio":>7}'
          f'{"cache bytes a token":>23}\n{"":58}{"read":>10}{"formula / counted":>31}')
    for line in decoding:
        print(f'{line["config"]:22}{line["context"]:9,}{line["decode_ms_per_token"]:9.2f}{line["decode_ms_per_token_worst"]:9.2f}'
              f'{line["decode_ms_per_token_uncached"]:10.2f}{line["weights_read_ms"]:9.2f}'
              f'{line["decode_ms_per_token"] / line["weights_read_ms"]:7.1f}'
              f'{line["cache_bytes_per_token"]:13,.0f} / {line["cache_bytes_per_token_counted"]:,.0f}')


# ----------------------------------------------------------------------------------------------------------------
# attention: one layer


WIDTHS, LENGTHS, HEADS = (128, 256, 512, 1024, 2048), (128, 512, 2048), (32, 64)
MORE_WIDTHS = 4096, 8192  # by formula alone
RATIOS = {'DeepSeek-V3': (3 / 14, 1 / 14, 3 / 14), 'half of it': (3 / 28, 1 / 28, 3 / 28)}  # query, key-value, output latent
KINDS = 'MHA', 'GQA', 'MLA', 'MLA-o'
A100 = dict(flops=312e12, bandwidth=1.555e12)  # bfloat16 and HBM2, the vendor's figures


def make_layer(kind, width, head_dim, ratio):
    """One attention: rotary dimensions are half of a head, MLA's on a shared key. GQA caches as much as MLA, or as little
    over that as whole heads allow."""
    q, kv, o = (max(8, round(width * share / 8) * 8) for share in RATIOS[ratio])
    options = dict(n_embd=width, n_head=width // head_dim, rope_dims=head_dim // 2, vocab_size=1)
    if kind == 'GQA':
        heads = [n for n in range(1, width // head_dim + 1) if width // head_dim % n == 0]
        options['n_kv_head'] = next((n for n in heads if 2 * n * head_dim >= kv + head_dim // 2), heads[-1])
    elif kind != 'MHA':
        options |= dict(attention='mla', q_latent=q, kv_latent=kv, rope_key='shared', o_latent=o if kind == 'MLA-o' else None)
    c = TransformerConfig(**options)
    return ATTENTIONS[c.attention](c), rope_table(max(LENGTHS), c.rope_dims, c.rope_theta)


def layer_flops(layer, T):
    """Forward and backward FLOPs a token."""
    return 3 * block_flops(layer, 1, 1, (T + 1) / 2)


def roofline(layer, tokens, T, flops, bandwidth):
    """Seconds, forward and backward, of a device on which each matrix product takes the longer of its arithmetic and of
    moving its operands in two bytes a number; scores never leave the chip."""
    seconds = 3 * tokens * layer.score_flops((T + 1) / 2) / flops
    for m in layer.modules():
        if isinstance(m, torch.nn.Linear):
            n_out, n_in = m.weight.shape
            moved = 2 * (tokens * (n_in + n_out) + n_in * n_out)
            seconds += 3 * max(2 * tokens * n_in * n_out / flops, moved / bandwidth)
    return seconds


def formulas(width, T, head_dim, ratio):
    """{kind: what is known without measuring} of the four attentions at one size; the A100 has 16,384 tokens to do."""
    with torch.device('meta'):
        layers = {kind: make_layer(kind, width, head_dim, ratio)[0] for kind in KINDS}
    return {kind: dict(attention=kind, width=width, head_dim=head_dim, latents=ratio, T=T,
                       params=sum(p.numel() for p in layer.parameters()), cache_numbers=layer.cache_width(),
                       mflop_a_token=layer_flops(layer, T) / 1e6,
                       a100_us_a_token=1e6 * roofline(layer, 16384, T, **A100) / 16384) for kind, layer in layers.items()}


def measure_layers(width, T, head_dim, ratio, rounds, machine):
    """{kind: a line of the csv} of the four attentions at one size, on T tokens or 1,024, if that is more."""
    batch = max(1, 1024 // T)
    x = torch.randn(batch, T, width, device=machine.device, requires_grad=True)
    cases = {}
    for kind in KINDS:
        layer, rope = make_layer(kind, width, head_dim, ratio)
        cases[kind] = SimpleNamespace(layer=layer.to(machine.device), rope=[t[:T].to(machine.device) for t in rope],
                                      cache=Cache(1, T), train=[], decode=[])

    def forward_backward(case):
        with machine.autocast():
            y = case.layer(x, case.rope)
        y.backward(y.detach())
        case.layer.zero_grad()
        x.grad = None

    @torch.no_grad()
    def decode(case, n):
        with machine.autocast():
            case.layer(x[:1, :n], case.rope, None, None, case.cache)

    for case in cases.values():
        decode(case, T)
        case.cache.n_tokens = T - 1
    for i in range(rounds + 1):
        for case in cases.values():
            times = (repeated(machine.device, lambda: forward_backward(case)), repeated(machine.device, lambda: decode(case, 1)))
            if i:
                case.train.append(times[0])
                case.decode.append(times[1])
    return {kind: line | dict(train_us_a_token=1e6 * statistics.median(cases[kind].train) / (batch * T),
                              decode_us=1e6 * statistics.median(cases[kind].decode))
            for kind, line in formulas(width, T, head_dim, ratio).items()}


def repeated(device, work):
    """Seconds of work(), which is repeated until the clock has something to measure."""
    n = 1
    while (seconds := clock(device, lambda: [work() for _ in range(n)])) < 0.01:
        n *= 4
    return seconds / n


def attention(overrides):
    """The isolated layers: a csv, a table of ratios, a plot, and from which width on the one is cheaper than the other."""
    options = read_options(overrides, BenchOptions)
    machine, folder = open_machine(options), config.make_folder(options.results, 'results')
    grid = HEADS, RATIOS, LENGTHS
    table = {(*sizes, width): formulas(width, sizes[2], *sizes[:2]) for sizes in itertools.product(*grid) for width in MORE_WIDTHS}
    print(f'{"":40}time of MLA / MHA, MLA / GQA, MLA-o / MLA: forward and backward | decoding | FLOPs | A100 by formula')
    for head_dim, ratio, T, width in itertools.product(*grid, WIDTHS):
        lines = table[head_dim, ratio, T, width] = measure_layers(width, T, head_dim, ratio, options.rounds, machine)
        shown = ' | '.join(' '.join(f'{lines[a][key] / lines[b][key]:5.2f}' for a, b in PAIRS) for key in COSTS)
        print(f'latents {ratio:12} heads of {head_dim} T {T:5,} width {width:5,}: {shown}', flush=True)
    with open(folder / 'attention.csv', 'w', newline='') as file:
        lines = [line for size in sorted(table) for line in table[size].values()]
        writer = csv.DictWriter(file, max(lines, key=len))  # what is known by formula alone leaves the measured columns empty
        writer.writeheader()
        writer.writerows(lines)
    print()
    for (a, b), (key, what) in itertools.product(PAIRS, COSTS.items()):
        print(f'{a} against {b}, {what}: {crossover(table, a, b, key)}')
    plot_attention(folder / 'attention.png', table)
    print(f'\n{folder}: attention.csv, attention.png')


PAIRS = ('MLA', 'MHA'), ('MLA', 'GQA'), ('MLA-o', 'MLA')
MEASURED = 'train_us_a_token', 'decode_us'
COSTS = dict(train_us_a_token='forward and backward', decode_us='decoding', mflop_a_token='FLOPs',
             a100_us_a_token='A100 by formula')


def crossover(table, a, b, key):
    """Where `a` is cheaper, in words: for each latent ratio and length the least width from which on it always is."""
    words, widths = [], WIDTHS + (() if key in MEASURED else MORE_WIDTHS)
    for ratio, head_dim in itertools.product(RATIOS, HEADS):
        from_width = []
        for T in LENGTHS:
            dearer = [w for w in widths if table[head_dim, ratio, T, w][a][key] >= table[head_dim, ratio, T, w][b][key]]
            cheaper = [w for w in widths if w > max(dearer, default=0)]
            from_width.append(f'{cheaper[0]:,}' if cheaper else 'never')
        words.append(f'{ratio}, heads of {head_dim}: {" / ".join(from_width)}')
    return f'cheaper from width (T {" / ".join(map(str, LENGTHS))}) ' + '; '.join(words)


def plot_attention(path, table):
    """Ratios of time over width, a line for each length; DeepSeek's ratios, the wider heads."""
    plt = pyplot()
    figure, panels = plt.subplots(2, len(PAIRS), figsize=(12, 7), sharey='row', layout='constrained')
    ratio, head_dim = next(iter(RATIOS)), HEADS[-1]
    for row, key in zip(panels, MEASURED):
        for axes, (a, b) in zip(row, PAIRS):
            for i, T in enumerate(LENGTHS):
                cost = lambda key: [table[head_dim, ratio, T, w][a][key] / table[head_dim, ratio, T, w][b][key] for w in WIDTHS]
                axes.plot(WIDTHS, cost(key), marker='o', color=f'C{i}', label=f'T {T:,}')
                if key == 'train_us_a_token':
                    axes.plot(WIDTHS, cost('mflop_a_token'), linestyle=':', color=f'C{i}')
            axes.axhline(1, color='black', linewidth=0.8)
            axes.set(title=f'{a} / {b}, {COSTS[key]}', xscale='log', xticks=WIDTHS, xticklabels=WIDTHS, xlabel='width', ylim=(0, None))
            axes.minorticks_off()
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)
        row[0].set_ylabel('ratio of times, 1 = equal')
    figure.suptitle(f'one layer, heads of {head_dim}, latents at the ratios of {ratio}; dotted: FLOPs')
    figure.savefig(path, dpi=120)
    plt.close(figure)


# ----------------------------------------------------------------------------------------------------------------
# sweep and compare: many runs


def values_of(argument):
    """'--key=a,b' -> ('key', ['a', 'b']); commas inside brackets belong to a value."""
    key, _, text = argument.removeprefix('--').partition('=')
    values, depth = [''], 0
    for character in text:
        depth += (character in '([') - (character in ')]')
        if character == ',' and depth == 0:
            values.append('')
        else:
            values[-1] += character
    return key, values


def is_done(folder):
    """Whether a run has come to its last step, or to the end of its time."""
    scored = [line for line in read_metrics(folder) if 'val_loss' in line]
    if not scored:
        return False
    options = read_run_options(folder)
    return scored[-1]['step'] >= options['max_iters'] or scored[-1]['seconds'] >= (options['max_seconds'] or float('inf'))


def read_run_options(run):
    try:
        return json.loads((Path(run) / 'config.json').read_text())
    except (OSError, ValueError) as error:
        raise UserError(f'{run}/config.json: cannot be read ({error}): name the folder of a run of train.py') from None


def check_combination(config_path, folder, options):
    """Refuses what train.py would refuse, and a folder whose run had other options."""
    command = [config_path, *(f'--{key}={value}' for key, value in options.items())]
    recipe, model_options, _ = train.read_options(command)
    with torch.device('meta'):
        build(recipe.arch, model_options)
    if (folder / 'config.json').exists():
        saved = read_run_options(folder)
        for key, value in config.load(command, *KNOWN[1:])[0].items():
            if value is not None and saved.get(key) != json.loads(json.dumps(value)):  # None: it follows from others
                raise UserError(f'{folder} holds a run with {key}={saved.get(key)}, not {value}: move it away')


def sweep(arguments):
    """Runs train.py for every combination, one after the other; a run that was cut off goes on."""
    if '--help' in arguments:
        return read_options(['--help'])
    paths = [argument for argument in arguments if not argument.startswith('--')]
    if len(paths) != 1:
        raise UserError('which config? python bench.py sweep CONFIG --key=a,b,c')
    grid = dict(values_of(argument) for argument in arguments if argument.startswith('--'))
    for key, values in grid.items():
        if len(set(values)) < len(values):
            raise UserError(f'{key}={",".join(values)}: names a value twice')
    for key in ('out_dir', 'init_from', 'dry_run', 'eval_only'):
        if key in grid:
            raise UserError(f'{key} is not for sweep, which trains each run in a folder of its own: leave it out')
    varied = [key for key, values in grid.items() if len(values) > 1]
    combinations = [dict(zip(grid, values)) for values in itertools.product(*grid.values())]
    parent = Path('out') / f'sweep-{Path(paths[0]).stem}'
    runs = {parent / (','.join(f'{key}={options[key]}' for key in varied) or 'run'): options for options in combinations}
    for folder, options in runs.items():  # all of them are checked before the first one runs
        check_combination(paths[0], folder, options)
    for i, (folder, options) in enumerate(runs.items(), 1):
        if is_done(folder):
            print(f'{i} of {len(combinations)}: {folder} is done', flush=True)
            continue
        print(f'{i} of {len(combinations)}: {folder}', flush=True)
        command = [sys.executable, str(Path(__file__).with_name('train.py')), paths[0], f'--out_dir={folder}', '--init_from=auto']
        process = subprocess.Popen([*command, *(f'--{key}={value}' for key, value in options.items())])
        try:
            status = process.wait()
        except KeyboardInterrupt:  # the run has had it too: it finishes its step and saves
            process.wait()
            raise
        if status or not is_done(folder):
            raise UserError(f'{folder}: the run did not finish (status {status}); the same command goes on from here')
    print('\npython bench.py compare ' + ' '.join(map(str, runs)))


def read_group_of(run):
    """(options that are not the run's own, its scored lines, what its losses are losses of)."""
    origin = load_checkpoint(best_checkpoint(run)).get('provenance', {})
    lines = [line for line in read_metrics(run) if 'val_loss' in line]
    if not lines:
        raise UserError(f'{run}: metrics.jsonl has no validation loss')
    own = 'seed', 'out_dir', 'wandb', 'device', 'log_interval', 'dry_run', 'eval_only'
    options = read_run_options(run) | dict(init_from=origin.get('started_from', 'scratch'))
    what = origin.get('data_sha256'), origin.get('tokenizer'), options.get('causal', True)
    return {key: value for key, value in options.items() if key not in own}, lines, what


def loss_at(lines, key, x):
    """Validation loss at x tokens or seconds, on the straight line between two evaluations."""
    return float(np.interp(x, [line[key] for line in lines], [line['val_loss'] for line in lines]))


def spent_until(lines, key, loss):
    """Tokens or seconds until a run first has a validation loss, on the straight line between two evaluations."""
    later = next(i for i, line in enumerate(lines) if line['val_loss'] <= loss)
    before, after = lines[max(later - 1, 0)], lines[later]
    return float(np.interp(-loss, [-before['val_loss'], -after['val_loss']], [before[key], after[key]]))


def compare(arguments):
    """A table and a plot of groups of runs."""
    runs = [argument for argument in arguments if not argument.startswith('--')]
    options = read_options([argument for argument in arguments if argument.startswith('--')], BenchOptions)
    if len(set(runs)) < max(len(runs), 2):
        raise UserError('compares two runs or more, each named once: python bench.py compare RUN RUN ...')
    read = {run: read_group_of(run) for run in runs}
    for run, (_, _, data) in read.items():
        if data != read[runs[0]][2]:
            raise UserError(f'{run} and {runs[0]} were trained on different data, with different tokenizers, or are an encoder '
                            'and a causal model: their losses are not of the same thing')
    differ = {key for o, _, _ in read.values() for key in o if any(other.get(key) != o[key] for other, _, _ in read.values())}
    groups = {}
    for run, (o, lines, _) in read.items():
        label = ', '.join(f'{key}={o.get(key)}' for key in sorted(differ)) or 'all options the same'
        groups.setdefault(label, []).append(lines)
    all_lines = [lines for _, lines, _ in read.values()]
    ends = {key: min(lines[-1][key] for lines in all_lines) for key in ('tokens', 'seconds')}
    reached = max(min(line['val_loss'] for line in lines) for lines in all_lines)  # by every run
    table = []
    for label, group in groups.items():
        values = {'end': [lines[-1]['val_loss'] for lines in group]}
        values |= {key: [loss_at(lines, key, end) for lines in group] for key, end in ends.items()}
        values |= {f'{key}_to_loss': [spent_until(lines, key, reached) for lines in group] for key in ends}
        table.append(dict(options=label, runs=len(group), **{key: mean_and_interval(v) for key, v in values.items()}))
    folder = config.make_folder(options.results, 'results')
    plot_groups(folder / 'compare.png', groups)
    if options.json:
        return print(json.dumps(table, indent=2))
    heads = (('end', 'at the end', '.4f'), ('tokens', f'at {ends["tokens"]:,} tokens', '.4f'),
             ('seconds', f'at {ends["seconds"]:,.0f} seconds', '.4f'), ('tokens_to_loss', f'tokens to {reached:.4f}', ',.0f'),
             ('seconds_to_loss', f'seconds to {reached:.4f}', ',.0f'))
    print('validation loss, nats, and what it takes to reach the one that all do; mean and 95% interval over seeds\n')
    print(' runs' + ''.join(title.rjust(24) for _, title, _ in heads))
    for line in sorted(table, key=lambda line: line['end'][0]):
        cells = (format(line[key][0], form) + ('' if line[key][1] is None else f' +- {format(line[key][1], form)}')
                 for key, _, form in heads)
        print(f'{line["runs"]:5}' + ''.join(cell.rjust(24) for cell in cells) + f'   {line["options"]}')
    if len({options['eval_iters'] * options['batch_size'] for options, _, _ in read.values()}) > 1:
        print('\nthese runs were evaluated on different numbers of sequences (eval_iters x batch_size)')
    print(f'\n{folder / "compare.png"}')


def plot_groups(path, groups):
    """Validation loss over tokens and over seconds, a colour for each group and a line for each run."""
    plt = pyplot()
    figure, panels = plt.subplots(1, 2, figsize=(12, 4.5), sharey=True, layout='constrained')
    for axes, key in zip(panels, ('tokens', 'seconds')):
        for i, (label, group) in enumerate(groups.items()):
            for n, lines in enumerate(group):
                axes.plot([line[key] for line in lines], [line['val_loss'] for line in lines], color=f'C{i % 10}', alpha=0.7,
                          marker='.', label=None if n else label)
        axes.set(xlabel=key, ylabel='validation loss (nats)')
        axes.grid(alpha=0.3)
    labels = ['\n'.join(textwrap.wrap(label, 140)) for label in groups]
    figure.legend(panels[0].get_legend_handles_labels()[0], labels, fontsize=7, loc='outside lower center')
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main():
    commands = dict(attention=attention, sweep=sweep, compare=compare)
    if len(sys.argv) > 1 and sys.argv[1] in commands:
        return commands[sys.argv[1]](sys.argv[2:])
    paths = [argument for argument in sys.argv[1:] if not argument.startswith('--')]
    overrides = [argument for argument in sys.argv[1:] if argument.startswith('--')]
    options = read_options(overrides)
    for path in paths:
        if not Path(path).exists() and (near := difflib.get_close_matches(path, commands, 1)):
            raise UserError(f'{path}: there is no such config file; did you mean bench.py {near[0]}?')
    lines = measure(paths or sorted(Path(__file__).parent.glob('config/[!_]*.py')), overrides, options)
    if options.json:
        print(json.dumps(lines, indent=2))
    else:
        show(lines)


if __name__ == '__main__':
    config.run(main)
