"""How fast configurations are on this machine. Weights and tokens are random: speed does not depend on what is learned.

    python bench.py config/mla.py config/mla_o.py --micro_batch_size=32     # these, against each other
    python bench.py config/encdec.py --context=100 --json=True
    python bench.py                                                         # all of them: on a CPU it takes long

Training: steps of train.py on micro_batch_size sequences (batch_size, where there is none): tokens/s, the share of the
machine's matmul peak that their useful arithmetic is, and the peak memory of a process that does nothing else. Decoding
(causal models): milliseconds for one token of one sequence at `context` tokens (or block_size, if that is less), with
the cache and without, beside the time to read once the weights that a token needs; the worst token, where tokens cost
unlike amounts. Medians of rounds in which all take turns.
"""

import json
import multiprocessing
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace

import torch

import config
import prepare
from config import UserError
from model import ARCHITECTURES, ModelConfig
from train import (MachineOptions, TrainOptions, build, compiled, make_optimizers, memory_gb, open_machine,
                   predicted_share, split_options, train_step)

CACHED_TOKENS = 16  # decoded in a round, up to the context; with grouped latents a whole group


@dataclass
class BenchOptions(MachineOptions):
    """Options"""

    context: int = 200  # tokens of context when decoding, at most block_size
    rounds: int = 5  # of which the median is reported
    json: bool = False  # print a list of dicts instead of the tables

    def __post_init__(self):
        self.check_numbers('seed')
        if self.context < 2:
            raise UserError(f'context={self.context}: takes two tokens or more, one to go on from and one to decode')


KNOWN = (BenchOptions, TrainOptions, ModelConfig, *(config_class for _, config_class in ARCHITECTURES.values()))


def read_options(arguments):
    """BenchOptions of the command line; options of training and models are checked by name, and left to the configs."""
    values, _ = config.load(arguments, *KNOWN, doc=__doc__, takes_config=False)
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
        training, model_options = split_options({k: v for k, v in flat.items() if k not in own})
        self.recipe, self.machine = TrainOptions(**training, vocab_size=flat.get('vocab_size')), machine
        model_options['vocab_size'] = flat.get('vocab_size') or prepare.vocab_size_of(self.recipe)
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


def measure(paths, overrides):
    """The lines of the report, after `rounds` rounds and one to warm up."""
    options = read_options(overrides)
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


def main():
    paths = [argument for argument in sys.argv[1:] if not argument.startswith('--')]
    overrides = [argument for argument in sys.argv[1:] if argument.startswith('--')]
    lines = measure(paths or sorted(Path(__file__).parent.glob('config/[!_]*.py')), overrides)
    if read_options(overrides).json:
        print(json.dumps(lines, indent=2))
    else:
        show(lines)


if __name__ == '__main__':
    config.run(main)
