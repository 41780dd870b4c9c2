"""Encoder with MLA-o: mla.py whose heads also write through a latent that they share, of 64
dimensions. As published, all 32 dimensions of a head are rotated, 16 in mla.py: the two differ in
both.

Asks: is the output matrix W^O low-rank enough to share, as the key-value latent is? Published on
SST-2: 84.63%, against 84.75% for mla.py. Parameters: 13,090,368. What is published and what is
ours: see mla.py.
"""
from config.mla import *

o_latent = 64
rope_dims = 32
