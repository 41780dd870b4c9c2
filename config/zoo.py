"""The base of the zoo: a small decoder, 4 layers of 256, with plain multi-head attention, which
caches 512 numbers a token and layer. Each zoo_*.py has another attention, and mlp_hidden such that
all have as many parameters, within 0.1%. Their first lines say what they cache, of a token and
layer too.

Asks: which attention for which cache? The best learning rate may differ: tune it for each
(bench.py sweep). Sizes and recipe are ours; what is published of each attention was measured at
other sizes.
"""

# data
dataset = 'wikitext103'
tokenizer = 'bpe'
vocab_size = 8192  # at this size GPT-2's vocabulary would be most of the model
block_size = 256

# model: half of the 32 dimensions of a head are rotated, in all of the zoo
arch = 'transformer'
causal = True
n_layer = 4
n_embd = 256
n_head = 8
rope_dims = 16
learned_positions = False
norm = 'rms'
mlp = 'swiglu'
mlp_hidden = 768

# recipe: 8 million tokens, one or two hours on one core
batch_size = 16
max_iters = 2_000
learning_rate = 2e-3
schedule = 'cosine'
min_lr = 2e-4
warmup_iters = 100
weight_decay = 0.1
eval_interval = 250
eval_iters = 20
log_interval = 10
