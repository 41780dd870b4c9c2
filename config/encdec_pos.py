"""encdec.py that subtracts the embedding of the next position from its last state, before the head.

Asks: does a state predict better if it need not carry its position? Parameters: 15,762,900
(positions not counted).
"""
from config.encdec import *

subtract_next_position = True
