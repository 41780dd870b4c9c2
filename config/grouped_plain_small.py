"""The baseline of grouped.py with as much arithmetic a byte: a plain decoder of 4 layers, 128 wide."""
from config.grouped_plain import *

n_layer = 4
n_head = 4
n_embd = 128
