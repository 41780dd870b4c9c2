"""decoder.py, slightly narrower: 156 wide with 12 heads, 15,441,192 parameters (without positions).

Asks: does the encoder-decoder of 15.76M parameters also beat a decoder that is smaller than itself?
"""
from config.decoder import *

n_embd = 156
n_head = 12
