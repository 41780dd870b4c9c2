"""The baseline of grouped.py at equal cost per byte: a plain decoder of 4 layers, 128 wide, with a
recipe of its own.
"""
from config.grouped_plain import *

n_layer = 4
n_head = 4
n_embd = 128
qk_norm = True
init_std = 0.09  # 1/sqrt(n_embd)
batch_size = 2
learning_rate = 4e-3
warmup_iters = 50
