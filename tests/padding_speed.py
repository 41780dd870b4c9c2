"""Sentences a second in fine-tuning on SST-2: batches of like length, random batches padded to their longest sentence,
and random batches padded to the run's whole block_size. The three take turns, so that a busy machine slows all alike.

    python tests/padding_speed.py out/mla_o DATA_DIR
"""

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch.nn.functional as F

import finetune_sst2 as f
from train import TrainOptions, make_optimizers, open_machine

STEPS, ROUNDS, BATCH = 20, 5, 16


def main(folder, data_dir):
    options = f.FinetuneOptions(out_dir=folder, data_dir=data_dir, train_examples=20_000)
    machine = open_machine(options)
    run = f.load_run(folder)
    tokenizer, classifier = run[1], f.make_classifier(run, options, seed=0).to(machine.device).train()
    optimizer, = make_optimizers(classifier, TrainOptions(learning_rate=2e-5))
    examples = f.tokenize(f.read_sst2(options)['train'], tokenizer, classifier.config.block_size)
    lengths = np.array([len(ids) for ids, _ in examples])
    rng = np.random.default_rng(0)
    print(f'{lengths.mean():.1f} tokens a phrase, {BATCH} phrases a step, median of {ROUNDS} rounds of {STEPS} steps')

    ways = {'like lengths': (lengths, 0), 'random, padded to the longest': (np.zeros_like(lengths), 0),
            f'random, padded to {classifier.config.block_size}': (np.zeros_like(lengths), classifier.config.block_size)}
    rates = {way: [] for way in ways}
    for round in range(ROUNDS + 1):
        for way, (keys, width) in ways.items():
            batches = [batch for batch in f.like_lengths(keys, BATCH, rng) if len(batch) == BATCH][:STEPS]
            batches = [f.collate([examples[i] for i in batch], tokenizer.eot) for batch in batches]
            batches = [(F.pad(idx, (0, max(0, width - idx.size(1)))), *rest) for idx, *rest in batches]
            start = time.perf_counter()
            for batch in batches:
                loss, _ = f.train_step(classifier, optimizer, batch, machine)
                loss.item()
            if round:  # the first one warms up
                rates[way].append(STEPS * BATCH / (time.perf_counter() - start))
    for way, rate in rates.items():
        print(f'{statistics.median(rate):8.0f} sentences/s  {way}')


if __name__ == '__main__':
    main(*sys.argv[1:])
