"""V4, indexer: zoo_v4.py whose queries read 16 entries of each layer with groups of 4 tokens, where
a sequence has up to 64. The keys of the indexer add 4 cached elements to the 9, on average.
"""
from config.zoo_v4 import *

index_topk = 16
mlp_hidden = 822
