"""decoder.py with dropout 0.2: 16,036,800 parameters (positions not counted).

Asks: is the plain decoder held back by overfitting? Published: 3.406 nats against 3.424, but with
dropout of the attention weights also on in evaluation. Here evaluation is without dropout.
After 0.6 million tokens it costs 0.13 nats: see RESULTS.md.
"""
from config.decoder import *

dropout = 0.2
