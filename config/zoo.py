"""MHA: the base of the zoo, a small decoder, 4 layers of 256, with plain multi-head attention. It
caches 512 elements per token and layer. Each zoo_*.py has another attention, and an mlp_hidden that
gives all of them the same number of parameters, within 0.1%. Their first lines say what they cache
per token and layer; up to the colon, they are the names that sweep.py draws.

Asks: which attention for which cache? results/attention_zoo.md has the protocol and the answer.
Sizes and recipe are ours; the publications of these attentions measured them at other sizes.
"""

# data
dataset = 'wikitext103'
tokenizer = 'bpe'
vocab_size = 8192  # at this size GPT-2's vocabulary would be most of the model
block_size = 256

# model: all of the zoo rotates half of the 32 dimensions of a head
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

# recipe: 0.8 million tokens, four minutes on one core with bfloat16 units. After half of them the
# loss of zoo_mla.py is 0.38 nats lower with Muon than with AdamW: see RESULTS.md.
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
