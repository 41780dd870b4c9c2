"""Prints how many masked tokens can be guessed by counting, where train.py evaluates an encoder.

    python tests/count_table.py data/wiki10k-bpe4096 [BLOCK_SIZE]

For each masked position, a table guesses the token that the training file most often has between
the same two neighbours. If this pair never occurs there, it uses the left neighbour alone; if that
one never occurs, the right one; otherwise it guesses the most frequent token. It reads the same
corrupted text as a model, so a neighbour may itself be masked. The script also prints the loss of
the training file's token frequencies (plus one each) on all held-out tokens.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np

from prepare import Tokenizer, read_tokens
from train import Loader


def most_frequent(keys, values):
    """(sorted keys, the most frequent value of each)."""
    n = values.max() + 1
    pairs, counts = np.unique(keys * n + values, return_counts=True)
    order = np.lexsort((-counts, pairs // n))
    unique, first = np.unique(pairs[order] // n, return_index=True)
    return unique, pairs[order][first] % n


def look_up(table, keys):
    """(whether it is in the table, its value there) for each key."""
    at = np.minimum(np.searchsorted(table[0], keys), len(table[0]) - 1)
    return table[0][at] == keys, table[1][at]


def count_table_accuracy(folder, block_size):
    """(accuracy of the table, accuracy of the most frequent token, number of positions)."""
    tokenizer = Tokenizer.load(Path(folder) / 'tokenizer.json')
    train, V = read_tokens(folder, 'train').astype(np.int64), tokenizer.vocab_size
    loader = Loader(read_tokens(folder, 'val'), block_size, tokenizer, causal=False, fixed=0)
    batch = loader.batch(np.arange(loader.fixed))
    idx, targets, positions = (tensor.numpy() for tensor in batch)
    targets = targets.ravel()
    # V stands for a missing neighbour at the ends of a window
    padded = np.pad(idx, ((0, 0), (1, 1)), constant_values=V)
    left = np.take_along_axis(padded, positions, axis=1).ravel()
    right = np.take_along_axis(padded, positions + 2, axis=1).ravel()

    guess = np.full(targets.shape, np.bincount(train).argmax())
    most_common = (guess == targets).mean()
    before, middle, after = train[:-2], train[1:-1], train[2:]
    # later tables know more, so their answers replace earlier ones
    for keys, queries in ((after, right), (before, left),
                          (before * (V + 1) + after, left * (V + 1) + right)):
        found, value = look_up(most_frequent(keys, middle), queries)
        guess = np.where(found, value, guess)
    return (guess == targets).mean(), most_common, len(targets)


def unigram_loss(folder, vocab_size):
    counts = np.bincount(read_tokens(folder, 'train'), minlength=vocab_size) + 1.0
    return float(-np.log(counts / counts.sum())[read_tokens(folder, 'val')].mean())


def main(folder, block_size=128):
    accuracy, most_common, n = count_table_accuracy(folder, int(block_size))
    loss = unigram_loss(folder, Tokenizer.load(Path(folder) / 'tokenizer.json').vocab_size)
    print(f'masked accuracy on {n:,} positions: {accuracy:.3f} by neighbour counts, '
          f'{most_common:.3f} by the most frequent token; held-out unigram loss {loss:.3f} nats')


if __name__ == '__main__':
    main(*sys.argv[1:])
