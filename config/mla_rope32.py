"""mla.py with all 32 dimensions of a head rotated, as in mha.py and mla_o.py.

With mla_o.py it is a matched pair that shows what the output latent costs. The published pair,
mla.py and mla_o.py, also differs in the rotated dimensions. Parameters: 13,286,976.
"""
from config.mla import *

rope_dims = 32
