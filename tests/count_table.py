"""What counting alone reaches on the masked positions that train.py evaluates an encoder on.

    python tests/count_table.py data/wiki10k-bpe4096 [BLOCK_SIZE]

For each masked position the table guesses the token that stood most often between these two neighbours in the training
file; pairs never seen back off to the left neighbour, then the right one, then the most frequent token. It reads the
corrupted text that a model reads, so a neighbour may itself be masked. Printed too: the loss of the training file's
unigram frequencies (add-one) on all held-out tokens.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
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
    train, tokenizer = read_tokens(folder, 'train').astype(np.int64), Tokenizer.load(Path(folder) / 'tokenizer.json')
    V = tokenizer.vocab_size
    loader = Loader(read_tokens(folder, 'val'), block_size, V, tokenizer, causal=False, fixed=0)
    idx, targets, positions = (tensor.numpy() for tensor in loader.batch(np.arange(loader.fixed)))
    padded = np.pad(idx, ((0, 0), (1, 1)), constant_values=V)  # there is no neighbour beyond the window
    left, right = (np.take_along_axis(padded, positions + shift, axis=1).ravel() for shift in (0, 2))
    targets = targets.ravel()

    guess = np.full(targets.shape, np.bincount(train).argmax())
    most_common = (guess == targets).mean()
    middle = train[1:-1]
    for keys, queries in ((train[2:], right), (train[:-2], left),
                          (train[:-2] * (V + 1) + train[2:], left * (V + 1) + right)):
        found, value = look_up(most_frequent(keys, middle), queries)
        guess = np.where(found, value, guess)  # the more specific table overrules
    return (guess == targets).mean(), most_common, len(targets)


def unigram_loss(folder, vocab_size):
    counts = np.bincount(read_tokens(folder, 'train'), minlength=vocab_size) + 1.0
    return float(-np.log(counts / counts.sum())[read_tokens(folder, 'val')].mean())


if __name__ == '__main__':
    folder, block_size = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 128
    accuracy, most_common, n = count_table_accuracy(folder, block_size)
    print(f'masked accuracy on {n:,} positions: {accuracy:.3f} by neighbour counts, {most_common:.3f} by the most '
          f'frequent token; held-out unigram loss '
          f'{unigram_loss(folder, Tokenizer.load(Path(folder) / "tokenizer.json").vocab_size):.3f} nats')
