"""MLA-o: zoo_mla.py whose heads share an output latent of 96."""
from config.zoo_mla import *

o_latent = 96
mlp_hidden = 922
