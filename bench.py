"""How fast configurations are on this machine. Weights are random: speed does not depend on what they have learned.

    python bench.py                                         # every causal configuration
    python bench.py config/decoder.py config/encdec.py      # these
    python bench.py config/decoder.py --context=100 --json=True

Decoding: milliseconds for one token of one sequence at `context` tokens (or block_size, if that is less), with the
cache and without, beside the time to read once, in this process, the weights that a token needs. Medians of rounds
that take turns.
"""

import json
import statistics
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path

import torch

import config
import prepare
from config import UserError
from model import ARCHITECTURES, ModelConfig
from train import MachineOptions, TrainOptions, build, open_machine, split_options

CACHED_TOKENS = 16  # decoded in a round, up to the context


@dataclass
class BenchOptions(MachineOptions):
    """Options"""

    context: int = 200  # tokens of context, at most block_size
    rounds: int = 5  # of which the median is reported
    json: bool = False  # print a list of dicts instead of the table

    def __post_init__(self):
        self.check_numbers('seed')
        if self.context < 2:
            raise UserError(f'context={self.context}: takes two tokens or more, one to go on from and one to decode')


def clock(device, work):
    """Seconds that work() takes, until the device is done."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


@torch.no_grad()
def decode(model, options, machine):
    """Speed and memory of generation, as a dict of bench.py's json."""
    size = min(options.context, model.config.block_size)
    n = min(CACHED_TOKENS, size - 1)
    idx = torch.randint(model.config.vocab_size, (1, size), device=machine.device)
    last = torch.full((1, 1), size - 1, device=machine.device)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)} - {id(model.head_weight())}
    weights = torch.cat([p.flatten() for p in model.parameters() if id(p) not in tables])  # of a table a token reads a row
    dtype = torch.bfloat16 if machine.bf16 else weights.dtype
    weights = weights.to(dtype)
    cache = model.init_cache(1, size)

    def cached():
        for t in range(size - n, size):
            model(idx[:, t:t + 1], cache=cache)

    times = dict(cached=[], uncached=[], read=[])
    with machine.autocast():
        for round in range(options.rounds + 1):
            cache.n_tokens = 0
            model(idx[:, :size - n], cache=cache)
            seconds = dict(cached=clock(machine.device, cached) / n, read=clock(machine.device, weights.sum),
                           uncached=clock(machine.device, lambda: model(idx, positions=last)))
            if round:  # the first one warms up
                for name, value in seconds.items():
                    times[name].append(1e3 * value)
    return dict(context=size, decode_ms_per_token=statistics.median(times['cached']),
                decode_ms_per_token_uncached=statistics.median(times['uncached']),
                weights_read_ms=statistics.median(times['read']), cache_bytes_per_token=model.cache_bytes_per_token(dtype),
                cache_bytes_per_token_counted=cache.n_bytes() / size)


def main():
    paths = [argument for argument in sys.argv[1:] if not argument.startswith('--')]
    own = {field.name for field in fields(BenchOptions)}
    classes = [config_class for _, config_class in ARCHITECTURES.values()]
    overrides = [argument for argument in sys.argv[1:] if argument.startswith('--')]
    known = (BenchOptions, TrainOptions, ModelConfig, *classes)
    values, _ = config.load(overrides, *known, doc=__doc__, takes_config=False)
    options = BenchOptions(**{name: value for name, value in values.items() if name in own})
    machine = open_machine(options)
    lines = []
    for path in paths or sorted(Path(__file__).parent.glob('config/[!_]*.py')):
        flat, name = config.load([str(path), *overrides], *known)
        training, model_options = split_options({k: v for k, v in flat.items() if k not in own})
        recipe = TrainOptions(**training, vocab_size=flat.get('vocab_size'))
        model_options['vocab_size'] = flat.get('vocab_size') or prepare.vocab_size_of(recipe)
        torch.manual_seed(options.seed)
        model = build(recipe.arch, model_options).to(machine.device).eval()
        if not model.config.causal:
            if paths:
                raise UserError(f'{path}: an encoder generates nothing: there is no decoding to measure')
            continue
        lines.append(dict(config=name, params=model.n_params(), **decode(model, options, machine)))
        if not options.json:
            show(lines)
    if options.json:
        print(json.dumps(lines, indent=2))


def show(lines):
    """Prints the last line of the table, under its heading if it is the first."""
    if len(lines) == 1:
        for words in (('parameters', 'context', 'cached', 'uncached', 'weights', 'ratio', 'cache bytes a token'),
                      ('', 'tokens', 'ms/token', 'ms/token', 'read, ms', '', 'formula / counted')):
            print(' ' * 18 + ''.join(word.rjust(n) for word, n in zip(words, (12, 9, 10, 10, 10, 7, 21))))
    line = lines[-1]
    ratio = line['decode_ms_per_token'] / line['weights_read_ms']
    print(f'{line["config"]:18}{line["params"]:12,}{line["context"]:9,}{line["decode_ms_per_token"]:10.2f}'
          f'{line["decode_ms_per_token_uncached"]:10.2f}{line["weights_read_ms"]:10.2f}{ratio:7.1f}'
          f'{line["cache_bytes_per_token"]:11,} / {line["cache_bytes_per_token_counted"]:,.0f}', flush=True)


if __name__ == '__main__':
    config.run(main)
