"""encdec.py that subtracts the embedding of the next position from its last hidden state, before
the head.

Asks: does a hidden state predict better if it need not carry its position? Parameters: 15,762,900
(without positions).
"""
from config.encdec import *

subtract_next_position = True
