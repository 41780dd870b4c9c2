"""Writes text with any causal run of train.py.

    python sample.py --out_dir=out/decoder --start="The history of the city"
    python sample.py --out_dir=out/decoder --start=FILE:prompt.txt --num_samples=3 --temperature=0.7
"""

import codecs
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import config
from config import UserError
from train import MachineOptions, load_run, open_machine


@dataclass
class SampleOptions(MachineOptions):
    """Options"""

    out_dir: str | None = None  # run folder of train.py
    start: str = ''  # text to go on from, or FILE:PATH (but for the file's last newline); '' = the start of a document
    num_samples: int = 1  # continuations of the same start, all drawn at once; the first is shown as it comes
    max_new_tokens: int = 300  # tokens to write, fewer where the document ends
    temperature: float = 0.8  # divides the logits; 0 = always the likeliest token
    top_k: int | None = 200  # draw from the k likeliest tokens only; None = all
    top_p: float | None = None  # draw from the fewest tokens whose probabilities reach p; None = all

    def __post_init__(self):
        config.check_numbers(self, 'seed', 'temperature')
        if self.top_p is not None and self.top_p > 1:
            raise UserError(f'top_p={self.top_p}: takes a probability, up to 1')
        if self.out_dir is None:
            raise UserError('which run? --out_dir=RUN names a run folder of train.py')


def read_start(start):
    """The prompt, from the command line or from the file that it names."""
    if not start.startswith('FILE:'):
        return start
    try:
        return Path(start.removeprefix('FILE:')).read_text(encoding='utf-8').removesuffix('\n')  # its last line's end
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'--start={start}: cannot be read as text ({error})') from None


def show(tokenizer, ids):
    """Prints tokens as they come. A character may be cut into several: its bytes wait until it is whole."""
    text = codecs.getincrementaldecoder('utf-8')('replace')
    for token in ids:
        if token != tokenizer.eot:  # a sample that has ended repeats it, until all have
            print(text.decode(tokenizer.encoding.decode_bytes([token])), end='', flush=True)
    print(text.decode(b'', final=True))


def main():
    values, _ = config.load(sys.argv[1:], SampleOptions, doc=__doc__, takes_config=False)
    options = SampleOptions(**values)
    machine = open_machine(options)
    model, tokenizer, _ = load_run(options.out_dir, machine.device)
    if not model.config.causal:
        raise UserError(f'{options.out_dir}: an encoder, which fills gaps and writes no text: take a causal run')
    start = read_start(options.start)
    prompt, size = [tokenizer.eot, *tokenizer.encode(start)], model.config.block_size  # every document starts so
    if len(prompt) > size:
        print(f'the start has {len(prompt):,} tokens, the model sees {size:,}: the first {len(prompt) - size:,} are '
              'dropped', file=sys.stderr)
    idx = torch.tensor(prompt, device=machine.device).expand(options.num_samples, -1)
    drawn, since = [], time.perf_counter()

    def first():
        """The first sample's tokens; drawn keeps everybody's."""
        with machine.autocast():
            for tokens in model.stream(idx, options.max_new_tokens, options.temperature, options.top_k, options.top_p,
                                       options.seed, stop=tokenizer.eot, n_ids=tokenizer.eot + 1):
                drawn.append(tokens.tolist())
                yield drawn[-1][0]

    print(start, end='', flush=True)
    show(tokenizer, first())
    seconds = time.perf_counter() - since
    for ids in list(zip(*drawn))[1:]:
        print(f'\n---\n{start}', end='')
        show(tokenizer, ids)
    n = sum(token != tokenizer.eot for tokens in drawn for token in tokens)
    print(f'\n{n:,} tokens, {n / seconds:,.0f} tokens/s', file=sys.stderr)


if __name__ == '__main__':
    config.run(main)
