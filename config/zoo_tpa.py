"""TPA: zoo.py with tensor product attention, queries of rank 6, keys and values of rank 2; 160
cached elements.
"""
from config.zoo import *

attention = 'tpa'
q_rank = 6
kv_rank = 2
mlp_hidden = 891
