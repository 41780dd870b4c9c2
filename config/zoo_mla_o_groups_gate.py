"""MLA-o, 2 groups, gate: zoo_mla_o_groups.py with a gate on the outputs of the heads."""
from config.zoo_mla_o_groups import *

gate = True
mlp_hidden = 837
