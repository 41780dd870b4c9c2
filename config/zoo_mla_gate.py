"""MLA, gate: zoo_mla.py with a gate on the outputs of the heads."""
from config.zoo_mla import *

gate = True
mlp_hidden = 816
