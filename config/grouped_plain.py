"""The baseline of grouped.py: a plain decoder as wide and as deep as its trunk, with 13 times the
arithmetic per byte.
"""
from config.grouped import *

del group_size, latents, widths  # a transformer has none
arch = 'transformer'
n_layer = 16
n_head = 8
n_embd = 256
learned_positions = False
batch_size = 1
learning_rate = 1e-3
warmup_iters = 20
