"""mla_o.py with 16 dimensions of a head rotated, as in mla.py.

With mla.py it is the other matched pair: they differ only in the output latent. Parameters:
13,090,368.
"""
from config.mla_o import *

rope_dims = 16
