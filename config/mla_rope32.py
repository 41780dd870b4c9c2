"""mla.py with all 32 dimensions of a head rotated, as in mha.py and mla_o.py.

One half of a matched pair: with mla_o.py it shows what the output latent costs, where the published
pair, mla.py and mla_o.py, also differs in what is rotated. Parameters: 13,286,976.
"""
from config.mla import *

rope_dims = 32
