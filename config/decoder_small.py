"""decoder.py a little narrower: 156 wide with 12 heads, 15,441,192 parameters (positions not
counted).

Asks: is the encoder-decoder, at 15.76M parameters, also ahead of a decoder smaller than itself?
"""
from config.decoder import *

n_embd = 156
n_head = 12
