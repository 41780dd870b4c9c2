"""mla_o.py with 16 dimensions of a head rotated, as in mla.py.

The other matched pair: mla.py and this one differ in the output latent alone. Parameters:
13,090,368.
"""
from config.mla_o import *

rope_dims = 16
