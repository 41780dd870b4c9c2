"""grouped.py whose trunk blocks read a learned sum of all earlier outputs (DenseFormer, arXiv
2402.02622).
"""
from config.grouped import *

dense_former = True
