"""How fast configurations are on this machine. Weights are random: speed does not depend on what they have learned.

    python bench.py                                         # every causal configuration
    python bench.py config/decoder.py config/encdec.py      # these
    python bench.py config/decoder.py --context=100 --json=True

Decoding: milliseconds for one token of one sequence at `context` tokens, with the cache and without, beside the time
to read the weights once in this process, which no decoder of one sequence can beat. Medians of rounds that take turns.
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
    weights = torch.cat([p.flatten() for p in model.parameters()])
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
    return dict(decode_ms_per_token=statistics.median(times['cached']),
                decode_ms_per_token_uncached=statistics.median(times['uncached']),
                weights_read_ms=statistics.median(times['read']), cache_bytes_per_token=model.cache_bytes_per_token(),
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
        training, model_options = split_options({k: v for k, v in flat.items() if k in ('seed', 'device', 'dtype') or k not in own})
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
        print(f'{"":18}{"parameters":>12}{"cached":>10}{"uncached":>10}{"weights":>10}{"ratio":>7}{"cache bytes a token":>21}\n'
              f'{"":18}{"":>12}{"ms/token":>10}{"ms/token":>10}{"read, ms":>10}{"":>7}{"formula / counted":>21}')
    line = lines[-1]
    ratio = line['decode_ms_per_token'] / line['weights_read_ms']
    print(f'{line["config"]:18}{line["params"]:12,}{line["decode_ms_per_token"]:10.2f}'
          f'{line["decode_ms_per_token_uncached"]:10.2f}{line["weights_read_ms"]:10.2f}{ratio:7.1f}'
          f'{line["cache_bytes_per_token"]:11,} / {line["cache_bytes_per_token_counted"]:,.0f}', flush=True)


if __name__ == '__main__':
    config.run(main)
