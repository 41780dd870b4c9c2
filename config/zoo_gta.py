"""GTA: zoo.py with grouped-tied attention; 80 cached elements. Each of two groups of heads has one
vector that is their value and whose first half is part of their key.
"""
from config.zoo import *

attention = 'gta'
n_kv_head = 2
mlp_hidden = 912
