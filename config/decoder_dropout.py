"""decoder.py with dropout 0.2: 16,036,800 parameters.

Asks: is the plain decoder held back by overfitting? At 9,000 steps on Wikipedia it should not be: expect a higher
training loss and no gain in validation.
"""
from config.decoder import *

dropout = 0.2
