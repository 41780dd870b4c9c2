"""zoo_mla.py with MLA-o: the heads write through a latent of 96 that they share."""
from config.zoo_mla import *

o_latent = 96
mlp_hidden = 922
