"""Peak memory of a training step with the loss in chunks, and with all logits at once: python tests/unfused_memory.py
config/encdec_mse_pos.py --micro_batch_size=16. Each in a process of its own."""

import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch.nn.functional as F

import bench
import config
import model


def unfused(x, weight, targets):
    return {'loss': F.cross_entropy(F.linear(x, weight), targets, ignore_index=-1)}


def peak_memory(path, overrides, fused):
    if not fused:
        model.linear_cross_entropy = unfused
    return bench.peak_memory(path, overrides)


def main():
    for fused in (True, False):
        with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as fresh:
            n_bytes = fresh.submit(peak_memory, sys.argv[1], sys.argv[2:], fused).result()
        print(f'{"in chunks" if fused else "all logits"}: {n_bytes / 2 ** 30:.2f} GB')


if __name__ == '__main__':
    config.run(main)
