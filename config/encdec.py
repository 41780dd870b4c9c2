"""Encoder-decoder that is autoregressive end to end: the decoder starts from the output of its own
causal encoder and attends to it.

Asks: does a decoder improve if half of its layers become an encoder that the other half reads?
Published validation loss of the best variant (encdec_mse_pos.py) after 9,000 steps on Wikipedia:
3.378 nats with 15.76M parameters, against 3.424 for decoder.py with 16.04M. This file is the plain
version; its variants change a line or two. Parameters: 15,762,900 (without positions).

What differs from those runs, apart from what decoder.py says: the projections into the decoder's
residual stream start at 0.02/sqrt(39), because there are 39 of them, where it was 0.02/sqrt(26).
Variants that the publication found harmful are left out: attentions in another order, the next
position added to the decoder's input, norms in other places, other detachments.
"""
from config.decoder import *

arch = 'encoder_decoder'
n_layer = 13  # and as many in the decoder
n_embd = 150
n_head = 5
cross_n_head = 10
del causal  # both stacks are
