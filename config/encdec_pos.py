"""encdec.py that takes the embedding of the next position off its last state before the vocabulary.

Asks: does a state that need not carry its position predict better? Parameters: 15,762,900 (positions not counted).
"""
from config.encdec import *

subtract_next_position = True
