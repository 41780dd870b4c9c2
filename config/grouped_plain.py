"""The baseline of grouped.py: a plain decoder as wide and as deep as its trunk. 13 times the arithmetic a byte."""
from config.grouped import *

del group_size, latents, widths  # what a transformer does not have
arch = 'transformer'
n_layer = 16
n_head = 8
n_embd = 256
learned_positions = False
