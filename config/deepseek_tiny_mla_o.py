"""deepseek_tiny.py with MLA-o, as published under the name deepseek-tiny-mla-o-v0.1: the outputs of
all heads pass a shared latent of 96, which has a norm. Parameters: 16,955,392.

Asks: what does it cost? Published: perplexity 29.33 at length 1,024 and 40.94 at 128 (MLA 28.89 and
39.21); on SST-2 86.24% and 85.78% (MLA 87.96 and 87.04).
"""
from config.deepseek_tiny import *

o_latent = 96
o_norm = 'sum'
