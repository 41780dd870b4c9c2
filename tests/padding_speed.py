"""Sentences a second in fine-tuning on SST-2, for three ways of making batches.

    python tests/padding_speed.py RUN DATA_DIR

RUN is a run folder of train.py, DATA_DIR holds GLUE's train.tsv and dev.tsv. The batches consist of
sentences of like length; of random sentences padded to the longest; or of random sentences padded
to the whole block_size of the run. The three take turns, so that whatever else the machine does
slows all of them alike.
"""

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch.nn.functional as F

from finetune_sst2 import (FinetuneOptions, collate, like_lengths, make_classifier, read_sst2,
                           tokenize, train_step)
from run import Machine, load_run
from train import TrainOptions, make_optimizers

STEPS, ROUNDS, BATCH = 20, 5, 16


def make_batches(examples, keys, width, pad, rng):
    """STEPS batches of sentences with like keys, padded to at least `width` tokens."""
    chosen = [batch for batch in like_lengths(keys, BATCH, rng) if len(batch) == BATCH]
    batches = []
    for batch in chosen[:STEPS]:
        idx, lengths, labels = collate([examples[i] for i in batch], pad)
        idx = F.pad(idx, (0, max(0, width - idx.size(1))))
        batches.append((idx, lengths, labels))
    return batches


def main(folder, data_dir):
    options = FinetuneOptions(out_dir=folder, data_dir=data_dir, train_examples=20_000)
    machine, run = Machine(options), load_run(folder)
    tokenizer = run[1]
    classifier = make_classifier(run, options, seed=0).to(machine.device).train()
    optimizer, = make_optimizers(classifier, TrainOptions(learning_rate=2e-5))
    block_size = classifier.config.block_size
    examples = tokenize(read_sst2(options)['train'], tokenizer, block_size)
    lengths = np.array([len(ids) for ids, _ in examples])
    rng = np.random.default_rng(0)
    print(f'{lengths.mean():.1f} tokens a phrase, {BATCH} phrases a step, median of {ROUNDS} '
          f'rounds of {STEPS} steps')

    nothing = np.zeros_like(lengths)  # with equal keys the batches are random
    ways = {'like lengths': (lengths, 0), 'random, padded to the longest': (nothing, 0),
            f'random, padded to {block_size}': (nothing, block_size)}
    rates = {way: [] for way in ways}
    for i in range(ROUNDS + 1):
        for way, (keys, width) in ways.items():
            batches = make_batches(examples, keys, width, tokenizer.eot, rng)
            start = time.perf_counter()
            for batch in batches:
                loss, _ = train_step(classifier, optimizer, batch, machine)
                loss.item()  # waits for the device
            if i > 0:  # the first round warms up
                rates[way].append(STEPS * BATCH / (time.perf_counter() - start))
    for way, rate in rates.items():
        print(f'{statistics.median(rate):8.0f} sentences/s  {way}')


if __name__ == '__main__':
    main(*sys.argv[1:])
