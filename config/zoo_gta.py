"""zoo.py with grouped-tied attention: two groups of heads, each with one vector that is their value
and, with its first half, their key; 80 cached numbers.
"""
from config.zoo import *

attention = 'gta'
n_kv_head = 2
mlp_hidden = 912
