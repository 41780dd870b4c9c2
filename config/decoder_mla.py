"""Decoder with DeepSeek-V3's attention at a small size: latents for queries and for keys and
values, and one rotated key that all heads share.

The baseline of decoder_mla_o.py, and a model that `to_deepseek` can export as a DeepSeek-V3.
Published for decoders of these widths on WikiText-103, also at length 1,024: perplexity 28.89 with
MLA and 29.33 with MLA-o, after 12,500 steps of 1,024 sequences at a rate of 5e-4. Those decoders
rotate all 32 dimensions of a head instead of 16, and every layer but the first has 4 experts of 128
(two per token) and a shared one instead of a SwiGLU of 1,024.
"""

# data: GPT-2's vocabulary; a causal model needs no mask token and no padding token
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

# recipe: GPT-2's; 4,000 steps are 18 epochs of the 118 million tokens of WikiText-103
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
