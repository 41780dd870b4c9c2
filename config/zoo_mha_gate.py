"""zoo.py with a gate on what the heads have read."""
from config.zoo import *

gate = True
mlp_hidden = 683
