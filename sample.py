"""Writes text with any causal run of train.py.

    python sample.py --out_dir=out/decoder --start="The history of the city"
    python sample.py --out_dir=out/decoder --start=FILE:prompt.txt --num_samples=3 --temperature=0.7

FILE:PATH reads the start from a text file, without the newline at its end. Several samples are
drawn together, which takes little longer than one.
"""

import itertools
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import config  # before torch: from here on Ctrl-C is one line

import torch

from config import UserError
from model import Count, NotNegative, Positive, cache_bytes
from run import Device, Seed, WeightOptions, load_run

CACHE_BYTES = 2 ** 30  # of the samples that are drawn together


@dataclass
class SampleOptions(WeightOptions):
    """Options"""

    out_dir: str | None = None  # run folder of train.py, or folder of a DeepSeek-V3
    start: str = ''  # text to go on from, or FILE:PATH; '' = the start of a document
    num_samples: Count = 1  # how many continuations to write
    max_new_tokens: Count = 300  # tokens to write, fewer where the document ends
    temperature: NotNegative = 0.8  # divides the logits; 0 = always the likeliest token
    top_k: Count | None = 200  # draw from the k likeliest tokens only; None = all
    top_p: Positive | None = None  # draw from the fewest tokens that together reach p; None = all
    seed: Seed = 1337  # sample i is drawn with seed + i

    def __post_init__(self):
        super().__post_init__()
        if self.top_p is not None and self.top_p > 1:
            raise UserError(f'top_p={self.top_p}: must be a probability, at most 1')
        if self.out_dir is None:
            raise UserError('which run? --out_dir=RUN names a run folder of train.py')


def read_start(start):
    """The text to go on from: that of the command line, or of the file that it names."""
    if not start.startswith('FILE:'):
        return start
    try:
        text = Path(start.removeprefix('FILE:')).expanduser().read_text(encoding='utf-8-sig')
    except UnicodeDecodeError as error:
        raise UserError(f'--start={start}: not a text file ({error})') from None
    return text.removesuffix('\n')


def show(tokenizer, tokens):
    """Prints tokens as they come, up to the end of the document. Returns how many."""
    shown = []

    def document():
        for token in tokens:
            if token == tokenizer.eot:
                return
            shown.append(token)
            yield token

    for text in tokenizer.decode_stream(document()):
        print(text, end='', flush=True)
    print()
    return len(shown)


def main():
    values, _ = config.load(sys.argv[1:], SampleOptions, doc=__doc__, takes_config=False)
    options = SampleOptions(**values)
    device = Device(options, trains=False)
    model, tokenizer, _ = load_run(options.out_dir, device.torch_device,
                                   getattr(torch, options.weights))
    if not model.config.causal:
        raise UserError(f'{options.out_dir}: an encoder, which fills gaps and writes no text: '
                        'name a causal run')
    start, block_size = read_start(options.start), model.config.block_size
    prompt = [tokenizer.eot, *tokenizer.encode(start)]  # every document starts with <|endoftext|>
    if len(prompt) > block_size:
        print(f'the start has {len(prompt):,} tokens, the model sees {block_size:,}: the first '
              f'{len(prompt) - block_size:,} are dropped', file=sys.stderr)

    length = min(len(prompt) + options.max_new_tokens, block_size)
    per_token, fixed = cache_bytes(model, device.precision)
    together = max(1, int(CACHE_BYTES / (length * per_token + fixed)))
    lengths, since = [], time.perf_counter()
    for first in range(0, options.num_samples, together):
        n = min(together, options.num_samples - first)
        idx = torch.tensor(prompt, device=device.torch_device).expand(n, -1)  # (B, T)
        with device.autocast():
            steps = model.stream(
                idx, options.max_new_tokens, temperature=options.temperature, top_k=options.top_k,
                top_p=options.top_p, seed=options.seed + first, stop=tokenizer.eot,
                n_ids=tokenizer.ids_needed(causal=True))
            # the first sample is printed while all are drawn; tee keeps the others for later
            for i, copy in enumerate(itertools.tee((step.tolist() for step in steps), n)):
                print(f'\n---\n{start}' if lengths else start, end='', flush=True)
                lengths.append(show(tokenizer, (step[i] for step in copy)))
    n_tokens, seconds = sum(lengths), time.perf_counter() - since
    n_ended = sum(length < options.max_new_tokens for length in lengths)
    print(f'\n{n_tokens:,} tokens, {n_tokens / seconds:,.0f} tokens/s, {n_ended} of {len(lengths)} '
          'documents ended', file=sys.stderr)


if __name__ == '__main__':
    config.run(main)
