"""Encoder-decoder, autoregressive end to end: the decoder starts from the output of its own causal
encoder and attends to it.

Asks: does a decoder do better if half of its layers become an encoder that the other half reads?
Published validation loss after 9,000 steps on Wikipedia, of the best variant (encdec_mse_pos.py):
3.378 nats at 15.76M parameters, against 3.424 of decoder.py at 16.04M. This file is the plain one;
its variants change a line or two. Parameters: 15,762,900 (positions not counted).

What differs from those runs, besides what decoder.py says: matrices that write into the decoder's
stream start at 0.02/sqrt(39), by the number of those matrices, where it was 0.02/sqrt(26). Variants
that were published as harmful are left out: another order of the attentions, the next position
added to the decoder's input, norms in other places, other detachments.
"""
from config.decoder import *

arch = 'encoder_decoder'
n_layer = 13  # and as many in the decoder
n_embd = 150
n_head = 5
cross_n_head = 10
del causal  # both stacks are
