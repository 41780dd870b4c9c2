"""decoder.py a little narrower, 156 wide with 12 heads: 15,441,192 parameters, fewer than the encoder-decoder's 15.76M.

Asks: does the encoder-decoder also lead a decoder that is smaller than itself, or only fill its parameters better?
"""
from config.decoder import *

n_embd = 156
n_head = 12
