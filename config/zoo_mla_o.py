"""zoo_mla.py with MLA-o: the heads share an output latent of 96."""
from config.zoo_mla import *

o_latent = 96
mlp_hidden = 922
