"""Peak memory of training with the loss in chunks of logits, and with all logits at once.

    python tests/unfused_memory.py config/encdec_mse_pos.py --micro_batch_size=16

Each is measured in a process of its own.
"""

import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import bench
import config
import model


def peak_memory(path, overrides, in_chunks):
    if not in_chunks:
        model.linear_cross_entropy = model.plain_cross_entropy
    return bench.peak_memory(path, overrides)


def main():
    for in_chunks in (True, False):
        with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as fresh:
            result = fresh.submit(peak_memory, sys.argv[1], sys.argv[2:], in_chunks)
        gigabytes = result.result() / 2 ** 30
        print(f'{"in chunks" if in_chunks else "all logits"}: {gigabytes:.2f} GB')


if __name__ == '__main__':
    config.run(main)
