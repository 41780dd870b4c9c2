"""zoo_mla.py with a gate on what the heads have read."""
from config.zoo_mla import *

gate = True
mlp_hidden = 816
