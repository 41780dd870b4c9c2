"""Decoder with DeepSeek-V3's attention at a small size: latent queries, keys and values, and one
rotated key for all heads.

The baseline of decoder_mla_o.py, and a model that `to_deepseek` writes in DeepSeek-V3's layout.
Nothing is published at this size.
"""

# data: GPT-2's vocabulary, of which a causal model needs no mask and no padding token
dataset = 'wikitext103'
tokenizer = 'gpt2'
vocab_size = 50257
block_size = 1024

# model: DeepSeek-V3's block, dense
arch = 'transformer'
causal = True
attention = 'mla'
n_layer = 6
n_embd = 256
n_head = 8
q_latent = 96
kv_latent = 64
rope_key = 'shared'
rope_dims = 16
learned_positions = False
norm = 'rms'
mlp = 'swiglu'

# recipe: GPT-2's; 4,000 steps are 18 epochs of WikiText-103, which has 118 million tokens
batch_size = 512
max_iters = 4_000
learning_rate = 1e-3
schedule = 'cosine'
min_lr = 1e-4
warmup_iters = 200
weight_decay = 0.1
eval_interval = 250
eval_iters = 1
log_interval = 10
