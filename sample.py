"""Writes text with any causal run of train.py.

    python sample.py --out_dir=out/decoder --start="The history of the city"
    python sample.py --out_dir=out/decoder --start=FILE:prompt.txt --num_samples=3 --temperature=0.7

FILE:PATH takes the start from a text file, without the newline at the end of its last line.

Several samples are drawn together, which takes little longer than one, as far as their caches fit
into a gigabyte. The first draws with the seed, the second with the seed plus 1, and so on: what
--seed=1338 writes alone is the second of --seed=1337, but for rounding.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import config
from config import UserError
from model import Count, NotNegative, Positive
from run import Machine, MachineOptions, load_run

CACHE_BYTES = 2 ** 30  # of the samples that are drawn together


@dataclass
class SampleOptions(MachineOptions):
    """Options"""

    out_dir: str | None = None  # run folder of train.py, or another that its init_from takes
    start: str = ''  # text to go on from, or FILE:PATH; '' = the start of a document
    num_samples: Count = 1  # continuations; one is shown as it comes, several are drawn together
    max_new_tokens: Count = 300  # tokens to write, fewer where the document ends
    temperature: NotNegative = 0.8  # divides the logits; 0 = always the likeliest token
    top_k: Count | None = 200  # draw from the k likeliest tokens only; None = all
    top_p: Positive | None = None  # draw from the fewest tokens that together reach p; None = all
    compile: bool = False  # takes a minute on a CPU, so it pays for many tokens only

    def __post_init__(self):
        if self.top_p is not None and self.top_p > 1:
            raise UserError(f'top_p={self.top_p}: takes a probability, up to 1')
        if self.out_dir is None:
            raise UserError('which run? --out_dir=RUN names a run folder of train.py')


def read_start(start):
    """The text to go on from: that of the command line, or of the file that it names."""
    if not start.startswith('FILE:'):
        return start
    try:
        text = Path(start.removeprefix('FILE:')).read_text(encoding='utf-8-sig')
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'--start={start}: cannot be read as text ({error})') from None
    return text.removesuffix('\n')


def draw(model, tokenizer, prompt, options, machine, first, n):
    """Yields a list at each step: the next token of each of n samples, the first of which is number
    `first` of all."""
    idx = torch.tensor(prompt, device=machine.device).expand(n, -1)  # (B, T)
    with machine.autocast():
        for tokens in model.stream(
                idx, options.max_new_tokens, temperature=options.temperature, top_k=options.top_k,
                top_p=options.top_p, seed=options.seed + first, stop=tokenizer.eot,
                n_ids=tokenizer.ids_needed(causal=True), compile=options.compile):
            yield tokens.tolist()


def samples_together(model, prompt, options, machine):
    """How many samples are drawn together."""
    length = min(len(prompt) + options.max_new_tokens, model.config.block_size)
    n_bytes = (length * model.cache_bytes_per_token(machine.precision)
               + model.cache_fixed_bytes(machine.precision))
    return max(1, min(options.num_samples, int(CACHE_BYTES / n_bytes)))


def with_progress(steps, options, first, n):
    """The steps that `draw` yields. Says on stderr how far they are."""
    since = time.perf_counter()
    for i, tokens in enumerate(steps, 1):
        rate = i * n / (time.perf_counter() - since)
        print(f'\rsamples {first + 1} to {first + n} of {options.num_samples}: token {i} of '
              f'{options.max_new_tokens}, {rate:,.0f} tokens/s  ', end='', file=sys.stderr,
              flush=True)
        yield tokens
    print(file=sys.stderr)


def show(tokenizer, ids):
    """Prints tokens as they come, and returns a list of them."""
    shown = []

    def written():
        for token in ids:
            shown.append(token)
            if token != tokenizer.eot:  # a sample that has ended repeats it until all have ended
                yield token

    for text in tokenizer.decode_stream(written()):
        print(text, end='', flush=True)
    print()
    return shown


def describe(samples, eot, seconds):
    """What was written, in words: how much, how fast, and which documents ended before the number
    of tokens that was asked for."""
    n = sum(token != eot for sample in samples for token in sample)
    words = f'{n:,} tokens, {n / seconds:,.0f} tokens/s'
    lengths = [sample.index(eot) for sample in samples if eot in sample]
    if lengths:
        ended = ('the document ended' if len(samples) == 1
                 else f'{len(lengths)} of {len(samples)} documents ended,')
        words += f'\n{ended} after {", ".join(map(str, lengths))} tokens'
    return words


def main():
    values, _ = config.load(sys.argv[1:], SampleOptions, doc=__doc__, takes_config=False)
    options = SampleOptions(**values)
    machine = Machine(options, trains=False)
    model, tokenizer, _ = load_run(options.out_dir, machine.device)
    if not model.config.block.causal:
        raise UserError(f'{options.out_dir}: an encoder, which fills gaps and writes no text: '
                        'take a causal run')
    if options.compile and not model.has_static_step():
        raise UserError(f'{options.out_dir}: compiling takes a step whose shapes never change, and '
                        "grouped latents and rope_key='per_head' have none: leave out --compile")
    if options.compile:
        machine.check_compiler()
    start, block_size = read_start(options.start), model.config.block_size
    prompt = [tokenizer.eot, *tokenizer.encode(start)]  # every document starts with <|endoftext|>
    if len(prompt) > block_size:
        print(f'the start has {len(prompt):,} tokens, the model sees {block_size:,}: the first '
              f'{len(prompt) - block_size:,} are dropped', file=sys.stderr)

    samples, since = [], time.perf_counter()
    together = samples_together(model, prompt, options, machine)
    for first in range(0, options.num_samples, together):
        n = min(together, options.num_samples - first)
        steps = draw(model, tokenizer, prompt, options, machine, first, n)
        if options.num_samples == 1:
            drawn = [(tokens[0] for tokens in steps)]  # a step is made when it is to be shown
        else:
            drawn = zip(*with_progress(steps, options, first, n))
        for sample in drawn:
            print(f'\n---\n{start}' if samples else start, end='', flush=True)
            samples.append(show(tokenizer, sample))
    seconds = time.perf_counter() - since
    print(f'\n{describe(samples, tokenizer.eot, seconds)}', file=sys.stderr)


if __name__ == '__main__':
    config.run(main)
