"""decoder.py with dropout 0.2: 16,036,800 parameters (without positions).

Asks: does overfitting hold the plain decoder back? Published: 3.406 nats against 3.424, but with
dropout of the attention weights in evaluation too. Here evaluation has no dropout. After 0.6
million tokens dropout costs 0.13 nats: see RESULTS.md.
"""
from config.decoder import *

dropout = 0.2
