"""Encoder-decoder, autoregressive end to end: the decoder starts from the output of its own causal
encoder and attends to it.

Asks: does a decoder do better if half of its layers become an encoder that the other half reads?
Published validation loss after 9,000 steps on Wikipedia, of the best variant (encdec_mse_pos.py):
3.378 nats at 15.76M parameters, against 3.424 of decoder.py at 16.04M. This file is the plain one;
its variants change a line or two. Parameters: 15,762,900 (positions not counted).
"""
from config.decoder import *

arch = 'encoder_decoder'
n_layer = 13  # and as many in the decoder
n_embd = 150
n_head = 5
cross_n_head = 10
del causal  # both stacks are
