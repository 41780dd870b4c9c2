"""The base of the zoo: a small decoder, 4 layers of 256, with plain multi-head attention, which
caches 512 numbers a token and layer. Each zoo_*.py has another attention, and mlp_hidden such that
all have as many parameters, within 0.1%. Their first lines say what they cache, of a token and
layer too.

Asks: which attention for which cache? The protocol and the answer stand in RESULTS.md.
Sizes and recipe are ours; what is published of each attention was measured at other sizes.
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

# recipe: 0.8 million tokens, four minutes on one core with units for bfloat16. After half of that
# zoo_mla.py is 0.38 nats ahead of what AdamW makes of it: see RESULTS.md.
optimizer = 'muon'
batch_size = 8
max_iters = 400
learning_rate = 8e-3
schedule = 'cosine'
min_lr = 0.0
warmup_iters = 20
weight_decay = 0.1
eval_interval = 200
eval_iters = 20
log_interval = 10
