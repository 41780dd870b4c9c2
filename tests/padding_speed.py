"""Sentences per second in fine-tuning on SST-2, for three ways of making batches.

    python tests/padding_speed.py RUN DATA_DIR

RUN is a run folder of train.py, DATA_DIR holds GLUE's train.tsv and dev.tsv. The batches consist of
sentences of similar length; of random sentences padded to the longest; or of random sentences
padded to the whole block_size of the run. The three take turns, so that other work on the machine
slows all of them alike.
"""

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
import torch.nn.functional as F

from finetune_sst2 import (FinetuneOptions, batches_by_length, make_classifier, read_sst2, take,
                           tokenize, train_step)
from run import Device, load_run
from train import TrainOptions, make_optimizers

STEPS, ROUNDS, BATCH = 20, 5, 16


def main(folder, data_dir):
    options = FinetuneOptions(out_dir=folder, data_dir=data_dir, train_examples=20_000)
    device, run = Device(options), load_run(folder)
    classifier = make_classifier(run, options, seed=0).to(device.torch_device).train()
    optimizer, = make_optimizers(classifier, TrainOptions(learning_rate=2e-5))
    block_size, eot = classifier.config.block_size, run[1].eot
    data = tokenize(read_sst2(options)['train'], run[1], block_size)
    lengths, rng = data[1], np.random.default_rng(0)
    print(f'{lengths.double().mean():.1f} tokens per phrase, {BATCH} phrases per step, median of '
          f'{ROUNDS} rounds of {STEPS} steps')

    equal = torch.zeros_like(lengths)  # of equal lengths the batches are random
    ways = {'similar lengths': (lengths, 0), 'random, padded to the longest': (equal, 0),
            f'random, padded to {block_size}': (equal, block_size)}
    rates = {way: [] for way in ways}
    for i in range(ROUNDS + 1):
        for way, (keys, width) in ways.items():
            batches = batches_by_length(keys, BATCH, rng)[:STEPS]
            start = time.perf_counter()
            for chosen in batches:
                idx, *rest = take(data, chosen)
                idx = F.pad(idx, (0, max(0, width - idx.size(1))), value=eot)
                loss, _ = train_step(classifier, optimizer, (idx, *rest), device)
                loss.item()  # waits for the device
            if i > 0:  # the first round warms up
                rates[way].append(STEPS * BATCH / (time.perf_counter() - start))
    for way, rate in rates.items():
        print(f'{statistics.median(rate):8.0f} sentences/s  {way}')


if __name__ == '__main__':
    main(*sys.argv[1:])
