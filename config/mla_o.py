"""Encoder with MLA-o: mla.py whose heads share an output latent of 64. As published, all 32
dimensions of a head are rotated, where mla.py rotates 16: the two configs differ in both.

Asks: does the output matrix W^O have a rank low enough to share a latent, as keys and values do?
Published on SST-2: 84.63%, against 84.75% for mla.py. Parameters: 13,090,368. What is published and
what is ours: see mla.py.
"""
from config.mla import *

o_latent = 64
rope_dims = 32
