"""What counting alone reaches on the masked positions on which train.py evaluates an encoder.

    python tests/count_table.py data/wiki10k-bpe4096 [BLOCK_SIZE]

For each masked position the table guesses the token that stood most often between the same two
neighbours in the training file. Where that pair of neighbours never occurred, it goes by the left
one alone; where that one never occurred, by the right one; and where neither did, it guesses the
most frequent token. It reads the corrupted text that a model reads, so a neighbour may itself be
masked. Printed too: the loss of the training file's token frequencies (plus one each) on all
held-out tokens.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np

from prepare import Tokenizer, read_tokens
from train import Loader


def most_frequent(keys, values):
    """{key: its most frequent value}, as sorted keys and their values."""
    n = values.max() + 1
    pairs, counts = np.unique(keys * n + values, return_counts=True)
    order = np.lexsort((-counts, pairs // n))
    unique, first = np.unique(pairs[order] // n, return_index=True)
    return unique, pairs[order][first] % n


def look_up(table, keys):
    """(found, value) of each key."""
    at = np.minimum(np.searchsorted(table[0], keys), len(table[0]) - 1)
    return table[0][at] == keys, table[1][at]


def count_table_accuracy(folder, block_size):
    """(accuracy of the table, accuracy of the most frequent token, number of positions)."""
    tokenizer = Tokenizer.load(Path(folder) / 'tokenizer.json')
    train, V = read_tokens(folder, 'train').astype(np.int64), tokenizer.vocab_size
    loader = Loader(read_tokens(folder, 'val'), block_size, V, tokenizer, causal=False, fixed=0)
    batch = loader.batch(np.arange(loader.fixed))
    idx, targets, positions = (tensor.numpy() for tensor in batch)
    targets = targets.ravel()
    # beyond the window there is no neighbour: V stands for that
    padded = np.pad(idx, ((0, 0), (1, 1)), constant_values=V)
    left = np.take_along_axis(padded, positions, axis=1).ravel()
    right = np.take_along_axis(padded, positions + 2, axis=1).ravel()

    guess = np.full(targets.shape, np.bincount(train).argmax())
    most_common = (guess == targets).mean()
    before, middle, after = train[:-2], train[1:-1], train[2:]
    # the later a table, the more it knows: where it has an answer, it overrules those before it
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
