"""Pre-training: masked-language modelling for encoders, next-token prediction for causal models.

    python train.py config/quick.py                                  # five minutes on a laptop
    python train.py config/mla_o.py --batch_size=32 --max_iters=300  # any option, after the config
    torchrun --nproc_per_node=8 train.py config/mla_o.py             # one process a GPU
    python train.py config/grouped.py --help                         # its options and their values
"""

import concurrent.futures
import contextlib
import dataclasses
import math
import os
import signal
import sys
import time
from dataclasses import dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

import config
import prepare
from config import UserError
from deepseek import add_output_latent
from model import (ARCHITECTURES, BlockConfig, ChannelLinear, ConfigError, Count, CountOrZero, MoE,
                   ModelConfig, NotNegative, Positive, Range, Share, flat_options, make_config)
from prepare import DataOptions, Tokenizer
from run import (Machine, MachineOptions, Run, best_checkpoint, build, describe, export,
                 load_checkpoint, load_tokenizer, load_weights, model_options_of, provenance)

EVAL_MASK_PROB = 0.15  # whatever a run masks in training, so that masked accuracies compare
MASKS = 'splitmix64'  # how they are drawn, in every checkpoint: with other ones no run goes on
# That a device takes at a time if micro_batch_size does not say. Fresh memory costs a CPU more than
# the arithmetic (RESULTS.md, "Speed"); a GPU would wait for the launches of small kernels
# (unmeasured).
TOKENS_AT_A_TIME = dict(cpu=2 ** 12, mps=2 ** 14, cuda=2 ** 15)
WSD_DECAY = 0.4  # the last part of a wsd schedule, in which the learning rate falls
OpenShare = Annotated[float, Range(above=0, below=1)]
REFUSED = {
    'gradient_accumulation_steps': 'batch_size counts all sequences of a step; set '
                                   'micro_batch_size to what fits a device, accumulation follows',
    'wandb_log': 'use --wandb=True',
    'wandb_project': 'the project is encoder-pretrain, use --wandb=True',
    'decay_lr': 'use schedule, and min_lr=learning_rate for a constant rate',
    'always_save_checkpoint': 'ckpt.pt is always the latest and ckpt_best.pt the best',
    'backend': 'it follows from the device',
}


@dataclass
class TrainOptions(MachineOptions, DataOptions):
    """Training"""

    arch: str = 'transformer'  # architecture, a key of model.ARCHITECTURES
    batch_size: Count = 32  # sequences a step, over all processes and accumulation
    micro_batch_size: Count | None = None  # sequences a device takes at a time; None = what fits it
    max_iters: Count = 5000  # optimizer steps
    max_seconds: Positive | None = None  # stop after this training time; the schedule follows it
    learning_rate: Positive = 1e-3  # highest learning rate
    min_lr: NotNegative = 0.0  # where the schedule ends
    warmup_iters: CountOrZero | None = None  # steps of linear warmup; None = a tenth of max_iters
    lr_decay_iters: Count | None = None  # step at which the schedule ends; None = max_iters
    schedule: Literal['cosine', 'linear', 'wsd'] = 'cosine'  # decay; wsd: only in the last 40%
    optimizer: Literal['adamw', 'muon'] = 'adamw'  # muon: on hidden matrices, adamw on the rest
    weight_decay: NotNegative = 0.1  # on matrices and embeddings
    beta1: Share = 0.9  # adamw
    beta2: Share = 0.95  # adamw
    grad_clip: NotNegative = 1.0  # largest norm of the gradient; 0 = off
    mask_prob: OpenShare = 0.15  # share of positions masked in training; evaluation is at 0.15
    eval_interval: Count = 500  # steps between evaluations, each followed by a checkpoint
    eval_iters: CountOrZero = 20  # batches of batch_size in an evaluation; 0 = all validation data
    log_interval: Count = 10  # steps between lines
    out_dir: str | None = None  # run folder; None = out/CONFIG_NAME
    o_latent_init: Literal['svd', 'xavier'] = 'svd'  # of an o_latent that a run did not have
    init_from: str = 'scratch'  # scratch, resume, auto (resume if it can), or a folder: see README
    eval_only: bool = False  # score the model of init_from and end
    export: str | None = None  # folder to write the model of init_from for transformers, and end
    dry_run: bool = False  # print parameters, FLOPs and cache bytes and end; needs no data
    compile: bool | None = None  # torch.compile; None = on CUDA only
    wandb: bool = False  # log to Weights & Biases too (WANDB_MODE=offline works)

    def __post_init__(self):
        if self.eval_only and self.init_from == 'scratch':
            raise UserError('eval_only scores a trained model: say which with --init_from=RUN, '
                            'or =resume')
        if self.export and self.init_from == 'scratch':
            raise UserError('export writes a trained model: say which with --init_from=RUN, or '
                            '=resume')


# --------------------------------------------------------------------------------------------------
# options and model


def read_options(argv):
    """(TrainOptions, options of the model, the checkpoint to start from or None) of a command line.
    """
    config_classes = [config_class for _, config_class in ARCHITECTURES.values()]
    values, name = config.load(argv, TrainOptions, BlockConfig, ModelConfig, *config_classes,
                               doc=__doc__, refused=REFUSED, shown=option_classes)
    out_dir = values.get('out_dir') or f'out/{name or "default"}'
    init_from, latest = values.get('init_from', 'scratch'), Path(out_dir) / 'ckpt.pt'
    if init_from == 'auto':
        init_from = 'resume' if latest.exists() else 'scratch'
    state, saved = None, {}
    if init_from == 'resume':
        state = load_checkpoint(latest)
        saved = current_options(state['options'])
        report_changes(saved, values, latest)
    elif init_from != 'scratch':
        state = load_checkpoint(best_checkpoint(init_from))
        saved = inherited_options(state['options'], values.get('eval_only', False))
    flat = saved | values | dict(out_dir=out_dir, init_from=init_from)
    return *split_options(flat), state


def option_classes(values):
    """The dataclasses of the options that a run has if its options are these."""
    arch = values.get('arch', TrainOptions.arch)
    _, config_class = ARCHITECTURES.get(arch, ARCHITECTURES[TrainOptions.arch])
    return TrainOptions, BlockConfig, config_class


def split_options(flat):
    """A flat dict of options -> (TrainOptions, options of the model)."""
    training = {option.name for option in fields(TrainOptions)}
    options = TrainOptions(**{name: value for name, value in flat.items() if name in training})
    model_options = {name: value for name, value in flat.items() if name not in training}
    return options, model_options | dict(
        vocab_size=options.vocab_size or prepare.vocab_size_of(options))


def current_options(saved):
    """Of a checkpoint's options, those that there are today."""
    training = {option.name for option in fields(TrainOptions)}
    return {name: value for name, value in saved.items()
            if name in training} | model_options_of(saved)


def inherited_options(saved, eval_only):
    """What a run takes from the run that it starts from: what the model is and what it reads. The
    recipe, dropout included, is its own; but eval_only scores as many windows as the evaluations of
    that run."""
    names = {option.name for option in fields(DataOptions)} | {'arch'}
    names |= {'batch_size', 'eval_iters'} if eval_only else set()
    names |= model_options_of(saved).keys() - {'dropout', 'attention_dropout'}
    return {name: value for name, value in saved.items() if name in names}


def report_changes(saved, values, path):
    """Says which options of a resumed run have changed. Raises UserError if with them it would not
    be the same run."""
    free = 'init_from', 'out_dir', 'eval_only', 'export', 'dry_run', 'wandb'
    for name, value in values.items():
        if name in free or name not in saved or value in (saved[name], None):
            continue
        if name in ('batch_size', 'seed', 'optimizer', 'mask_prob', 'tokenizer', 'lowercase'):
            raise UserError(f'{path}: cannot go on with {name}={value}, it was {saved[name]}; use '
                            '--init_from=RUN --out_dir=NEW to start anew from its weights')
        if os.environ.get('RANK', '0') == '0':
            print(f'{path}: {name} was {saved[name]}, is now {value}')


def start_model(options, model_options, state):
    """The model at the first step: new, or from the checkpoint `state`. If only the options have
    an o_latent, each W^O of the checkpoint becomes its best product of that rank (o_latent_init:
    or a new one)."""
    if state is None:
        return build(options.arch, model_options)
    rank, norm = model_options.get('o_latent'), model_options.get('o_norm', 'none')
    n_groups = model_options.get('o_groups', 1)
    cut = rank and options.init_from != 'resume' and not state['options'].get('o_latent')
    if cut:
        model_options = model_options | dict(o_latent=None, o_norm='none', o_groups=1)
    model = build(options.arch, model_options)
    load_weights(model, state, origin_of(options))
    try:
        if cut:
            add_output_latent(model, rank, options.o_latent_init, norm, n_groups)
        return model
    except ConfigError as error:
        raise UserError(str(error)) from None


def origin_of(options):
    """The folder of the run that this one starts from."""
    return Path(options.out_dir if options.init_from == 'resume' else options.init_from)


def predicted_share(options, model_config):
    """Share of the tokens whose logits a training step needs."""
    if model_config.block.causal:
        return 1.0
    T = model_config.block_size
    return max(1, round(options.mask_prob * T)) / T


def facts_of(options, model):
    """What a run's options do not say about its model, for run.json."""
    c = model.config
    return dict(parameters=model.n_params(),
                parameters_without_positions=model.n_params(positions=False),
                active_parameters=model.n_active_params(),
                train_flops_per_token=model.flops_per_token(c.block_size,
                                                            predicted_share(options, c)),
                cache_bytes_per_token=model.cache_bytes_per_token() if c.block.causal else None,
                cache_fixed_bytes=model.cache_fixed_bytes() if c.block.causal else None)


def print_facts(options, facts):
    flops, cache = facts['train_flops_per_token'], facts['cache_bytes_per_token']
    fixed, active = facts['cache_fixed_bytes'], facts['active_parameters']
    of_a_token = f', {active:,} active' if active < facts['parameters'] else ''
    cached = '' if cache is None else f', {cache:,.0f} cache bytes a token'
    cached += f' and {fixed:,} at most beside' if fixed else ''
    print(f'{options.arch}: {facts["parameters"]:,} parameters '
          f'({facts["parameters_without_positions"]:,} without positions{of_a_token}), '
          f'{flops / 1e6:.1f} MFLOP a token in training{cached}')


# --------------------------------------------------------------------------------------------------
# data: every sequence, and every mask, is a function of the seed and of its number alone


def hashed(*numbers):
    """64 random bits, as uint64, that are a function of these whole numbers, or of arrays of them,
    which broadcast. Each number says which output of the generator splitmix64 (Steele et al. 2014)
    is taken, and that output is the seed for the next number. No draw needs a generator object."""
    bits = np.zeros(1, dtype=np.uint64)
    for number in numbers:
        bits = bits + (np.array(number, dtype=np.uint64, ndmin=1) + 1) * 0x9E3779B97F4A7C15
        bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9
        bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB
        bits = bits ^ (bits >> 31)
    return bits


class Loader:
    """Windows of a token file by sequence number, masked for an encoder.

    Sequence k of epoch e is a function of (seed, e, k): each epoch shifts the grid of windows and
    takes each window once, in a new order. With fixed=n there is no seed: n windows spread evenly
    over the file, each with a mask of its own, are a test set.
    """

    def __init__(self, tokens, block_size, vocab_size, tokenizer, causal, seed=0,
                 mask_prob=EVAL_MASK_PROB, fixed=None):
        self.tokens, self.block_size, self.vocab_size = tokens, block_size, vocab_size
        self.tokenizer, self.causal, self.seed, self.fixed = tokenizer, causal, seed, fixed
        self.width = block_size + causal  # the targets of a causal model are one token later
        self.n_masked = max(1, round(mask_prob * block_size))
        if len(tokens) < self.width:
            raise UserError(f'block_size={block_size}: longer than the data ({len(tokens):,} '
                            'tokens)')
        n_spare = (len(tokens) - self.width) // block_size
        if fixed is None:
            self.n_windows = max(1, n_spare)  # one less than would fit leaves room for the shift
        else:
            self.n_windows = n_spare + 1
            self.fixed = min(fixed or self.n_windows, self.n_windows)
        self.epoch = None

    def starts(self, numbers):
        """First token of each numbered sequence."""
        if self.fixed is not None:
            spread = np.linspace(0, self.n_windows - 1, self.fixed).astype(np.int64)
            return spread[numbers] * self.block_size
        return np.array([self.start(*divmod(number, self.n_windows)) for number in numbers])

    def start(self, epoch, k):
        if epoch != self.epoch:
            rng = np.random.default_rng((self.seed, epoch))
            room = len(self.tokens) - self.width - (self.n_windows - 1) * self.block_size
            self.shift = int(rng.integers(min(room + 1, self.block_size)))
            self.order, self.epoch = rng.permutation(self.n_windows), epoch
        return self.shift + int(self.order[k]) * self.block_size

    def batch(self, numbers):
        """What a model takes for these sequences: (idx, targets), for an encoder (idx, targets,
        positions)."""
        starts = self.starts(numbers)
        windows = self.tokens[starts[:, None] + np.arange(self.width)]  # (B, width)
        windows = windows.astype(np.int64)
        if windows.max() >= self.vocab_size:
            raise UserError(f'token id {windows.max()} is past vocab_size={self.vocab_size}: '
                            'prepare the data again')
        if self.causal:
            # contiguous, because a strided tensor goes to a GPU by a copy that blocks
            return torch.from_numpy(windows[:, :-1].copy()), torch.from_numpy(windows[:, 1:].copy())
        masked = windows.copy()
        # a test window keeps its mask, however many others are scored with it
        positions = self.mask(masked, np.array(numbers) if self.fixed is None else starts)
        targets = np.take_along_axis(windows, positions, axis=1)  # (B, M)
        return tuple(map(torch.from_numpy, (masked, targets, positions)))

    def mask(self, windows, keys):
        """Picks n_masked positions in each of the windows (B, T) and corrupts them in place: 80%
        become <|mask|>, 10% a random token, 10% stay. Returns the positions, (B, M). The windows
        have a key each; what is drawn is a hash of seed, key and position."""
        keys = keys[:, None]  # (B, 1)
        order = hashed(self.seed, keys, np.arange(self.block_size))  # (B, T): the lowest are masked
        positions = np.argpartition(order, self.n_masked - 1, axis=1)[:, :self.n_masked]
        positions.sort(axis=1)
        draw = hashed(self.seed, keys, positions, 1) * 2.0 ** -64  # from 0 to 1, as are those below
        noise = hashed(self.seed, keys, positions, 2) % len(self.tokenizer.ranks)
        kept = np.take_along_axis(windows, positions, axis=1)
        noise = np.where(draw < 0.9, noise.astype(np.int64), kept)
        corrupted = np.where(draw < 0.8, self.tokenizer.mask, noise)
        np.put_along_axis(windows, positions, corrupted, axis=1)
        return positions

    def share_with_border(self):
        """Share of windows in which attention crosses from one document to another."""
        # a sample is enough
        starts = np.linspace(0, len(self.tokens) - self.width, 10_000).astype(np.int64)
        return np.mean([(self.tokens[start + 1:start + self.block_size] == self.tokenizer.eot).any()
                        for start in starts])


class Ahead:
    """A Loader that makes the next batch in a thread while the model works on this one. The numbers
    of the next batch are expected to be larger by `stride`; if others are asked for, they are made
    then."""

    def __init__(self, loader, stride):
        self.loader, self.stride = loader, stride
        self.thread = concurrent.futures.ThreadPoolExecutor(1)  # one, for the order of an epoch
        self.expected, self.prepared = None, None

    def batch(self, numbers):
        """Loader.batch for a range of numbers."""
        if numbers != self.expected:
            self.prepared = self.thread.submit(self.loader.batch, numbers)
        batch = self.prepared.result()
        self.expected = range(numbers.start + self.stride, numbers.stop + self.stride)
        self.prepared = self.thread.submit(self.loader.batch, self.expected)
        return batch


class Data(NamedTuple):
    """A prepared data set: its folder, meta.json, tokenizer, and loaders."""

    folder: Path
    meta: dict
    tokenizer: Tokenizer
    train: Loader  # the sequences to train on
    train_eval: Loader  # as many windows of the training split as val has, for evaluation
    val: Loader


def open_data(options, model_config, machine, run_tokenizer=None):
    """The Data that the options name, prepared first if it is absent. run_tokenizer: of the run
    that the model comes from; the data has to be in its tokens, and is prepared with them."""
    folder = data_folder(options, run_tokenizer)
    if not folder.exists() and machine.local_rank == 0:
        print(f'{folder} is absent: preparing it', flush=True)
        chosen = {option.name: getattr(options, option.name) for option in fields(DataOptions)}
        if options.tokenizer != 'bpe':
            chosen['vocab_size'] = None  # of the model; the tokenizer has its own
        prepare.prepare(prepare.PrepareOptions(**chosen), run_tokenizer)
    machine.wait()
    if machine.first:
        prepare.warn_if_source_changed(folder)
    meta, tokenizer = prepare.read_meta(folder), Tokenizer.load(folder / 'tokenizer.json')
    if options.source and meta['source'] != options.source:
        prepare.local_files(options.source)  # first says so if there are no such files
        raise UserError(f'{folder} was prepared from {meta["source"]}, not {options.source}: '
                        'remove that folder, or run prepare.py with this source, which replaces it')
    vocab_size, causal = model_config.vocab_size, model_config.block.causal
    needed = tokenizer.ids_needed(causal)
    if vocab_size < needed:
        raise UserError(f'vocab_size={vocab_size}: the tokenizer of {folder} needs {needed}')
    if vocab_size > 2 * tokenizer.vocab_size and machine.first:
        print(f'vocab_size={vocab_size}, but {folder} has {tokenizer.vocab_size} ids: '
              '--vocab_size=None takes just those')
    shared = model_config.block_size, vocab_size, tokenizer, causal
    train = Loader(prepare.read_tokens(folder, 'train'), *shared, seed=options.seed,
                   mask_prob=options.mask_prob)
    val = Loader(prepare.read_tokens(folder, 'val'), *shared,
                 fixed=options.eval_iters * options.batch_size)
    train_eval = Loader(train.tokens, *shared, fixed=val.fixed)
    return Data(folder, meta, tokenizer, train, train_eval, val)


def data_folder(options, run_tokenizer):
    """The folder of the data that the options name, or, if that is in other tokens than those of
    run_tokenizer, the folder for the same data in its tokens."""
    folder = prepare.folder_of(options)
    if run_tokenizer is None:
        return folder
    if folder.exists() and options.source in (None, prepare.read_meta(folder)['source']):
        if Tokenizer.load(folder / 'tokenizer.json').digest() == run_tokenizer.digest():
            return folder
    return prepare.folder_of(options, run_tokenizer)


# --------------------------------------------------------------------------------------------------
# optimizer and schedule


def parameter_groups(model):
    """(layers of hidden matrices, embeddings, gains and biases): every parameter is in exactly one
    of the three."""
    layers, embeddings, vectors = [], [], []
    for name, module in model.named_modules():
        linear = isinstance(module, (nn.Linear, ChannelLinear))
        if linear and name != 'lm_head':
            layers.append(module)
        for part, parameter in module.named_parameters(recurse=False):
            if isinstance(module, nn.Embedding) or name == 'lm_head':
                embeddings.append(parameter)
            elif not (linear and part == 'weight'):
                known = parameter.dim() == 1 or part in ('gain', 'bias', 'position_bias')
                assert known, f'{name}.{part}: say which group it belongs to'
                vectors.append(parameter)
    grouped = [layer.weight for layer in layers] + embeddings + vectors
    assert sorted(map(id, grouped)) == sorted(map(id, model.parameters()))
    return layers, embeddings, vectors


class Muon(torch.optim.Optimizer):
    """Muon for linear layers (Jordan et al. 2024, kellerjordan.github.io/posts/muon): each matrix
    takes a step along its momentum, orthogonalised. It computes what torch.optim.Muon does, but
    matrices of one shape together: to a GPU a single one is 25 small kernels. Of parallel channels
    it orthogonalises each matrix by itself. Its parameters share the memory of the weights, which
    have to be changed in place."""

    momentum = 0.95

    def __init__(self, layers, lr, weight_decay):
        self.views = []  # (weight, index of a matrix in it, a parameter that shares its memory)
        for layer in layers:
            channels = isinstance(layer, ChannelLinear)
            for index in range(layer.n_channels) if channels else [...]:
                view = nn.Parameter(layer.weight.data[index])
                self.views.append((layer.weight, index, view))
        super().__init__([view for _, _, view in self.views],
                         dict(lr=lr, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        by_shape, group = {}, self.param_groups[0]
        for weight, index, view in self.views:
            state = self.state[view]
            if not state:
                state['momentum_buffer'] = torch.zeros_like(view)
            alike = by_shape.setdefault(view.shape, ([], [], []))
            for parts, part in zip(alike, (view, weight.grad[index], state['momentum_buffer'])):
                parts.append(part)
        for shape, (matrices, grads, momenta) in by_shape.items():
            torch._foreach_lerp_(momenta, grads, 1 - self.momentum)
            updates = torch.stack(torch._foreach_lerp(grads, momenta, self.momentum))  # Nesterov's
            updates = orthogonalized(updates).type_as(updates)  # (n, *shape)
            # this scale makes them as large as AdamW's, so that both take the same learning rates
            scale = 0.2 * math.sqrt(max(shape))
            torch._foreach_mul_(matrices, 1 - group['lr'] * group['weight_decay'])
            torch._foreach_add_(matrices, list(updates), alpha=-group['lr'] * scale)


def orthogonalized(x):
    """Matrices x (n, a, b) with their singular values brought to between 0.5 and 1.5, in bfloat16:
    five Newton-Schulz iterations of the polynomial that is steepest at zero."""
    wide = x.size(1) <= x.size(2)
    x = (x if wide else x.mT).bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)  # singular values up to one
    for _ in range(5):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return x if wide else x.mT


def make_optimizers(model, options):
    """A list of optimizers that together step every parameter once. The learning rate is set at
    each step."""
    layers, embeddings, vectors = parameter_groups(model)
    shared = dict(lr=options.learning_rate, weight_decay=options.weight_decay)
    muon = options.optimizer == 'muon'
    decayed = embeddings if muon else [layer.weight for layer in layers] + embeddings
    adamw = torch.optim.AdamW(
        [dict(params=decayed), dict(params=vectors, weight_decay=0.0)],
        betas=(options.beta1, options.beta2), fused=True, **shared)
    return [Muon(layers, **shared), adamw] if muon else [adamw]


def learning_rate(options, step, seconds):
    """Linear warmup, then the decay up to lr_decay_iters. With max_seconds the decay follows the
    clock from the first step on, and the warmup too, over its first tenth, unless warmup_iters says
    how many steps it takes."""
    warmup = options.warmup_iters
    if options.max_seconds:
        progress = min(1.0, seconds / options.max_seconds)
        warm = progress / 0.1 if warmup is None else (step + 1) / max(1, warmup)
    else:
        warmup = options.max_iters // 10 if warmup is None else warmup
        end = options.lr_decay_iters or options.max_iters
        progress = min(1.0, max(0.0, (step - warmup) / max(1, end - warmup)))
        warm = (step + 1) / max(1, warmup)
    if options.schedule == 'cosine':
        factor = 0.5 * (1 + math.cos(math.pi * progress))
    elif options.schedule == 'linear':
        factor = 1 - progress
    else:
        factor = min(1.0, (1 - progress) / WSD_DECAY)
    lr = options.min_lr + factor * (options.learning_rate - options.min_lr)
    return lr * min(1.0, warm)


# --------------------------------------------------------------------------------------------------
# evaluation


def evaluate(model, forward, data, batch_size, machine):
    """The loss on data.val and what follows from it, and the loss on as many windows of the
    training split, as a dict. forward: the model itself or its compiled form."""
    loss, accuracy = mean_scores(model, forward, data.val, batch_size, machine)
    train_loss, _ = mean_scores(model, forward, data.train_eval, batch_size, machine)
    scores = dict(val_loss=loss, val_perplexity=math.exp(min(loss, 700)))
    if data.val.causal:
        bits = loss / math.log(2)
        scores |= dict(val_accuracy=accuracy,
                       val_bits_per_byte=bits / data.meta['bytes_per_token'])
    else:
        scores |= dict(val_masked_accuracy=accuracy)
    return scores | dict(train_eval_loss=train_loss)


@torch.no_grad()
def mean_scores(model, forward, loader, batch_size, machine):
    """The mean loss and accuracy over the fixed windows of a loader, which the processes share,
    without dropout."""
    model.eval()
    loss, correct, count = 0.0, 0.0, 0
    mine = np.arange(loader.fixed)[machine.rank::machine.world]
    for start in range(0, len(mine), batch_size):
        numbers = mine[start:start + batch_size]
        n = len(numbers)
        # shapes are static: the last batch is filled up, and what fills it is not scored
        batch = loader.batch(np.resize(numbers, batch_size))
        batch[1][n:] = -1
        with machine.autocast():
            out = forward(*machine.put(batch))
        loss += out['loss'].item() * n
        correct += out['accuracy'].item() * n
        count += n
    model.train()
    loss, correct, count = machine.total(loss, correct, count)
    return loss / count, correct / count


@torch.no_grad()
def show_guesses(model, loader, device, n_sentences=4, length=40):
    """Prints stretches of held-out text with their masked tokens: [right guess], or
    [wrong guess|what it was]."""
    tokenizer = loader.tokenizer
    numbers = np.linspace(0, loader.fixed - 1, min(n_sentences, loader.fixed)).astype(int)
    idx, targets, positions = loader.batch(numbers)
    guesses = model.eval()(idx.to(device)).argmax(dim=-1).cpu()
    print('\nheld-out text, 15% of it masked: [right guess] or [wrong guess|what it was]\n')
    for row in range(len(idx)):
        text = idx[row].clone().scatter_(0, positions[row], targets[row])
        parts = []
        for t in range(min(length, idx.size(1))):
            truth = tokenizer.decode([text[t]])
            if t in positions[row]:
                guess = tokenizer.decode([guesses[row, t]])
                truth = f'[{truth}]' if guesses[row, t] == text[t] else f'[{guess}|{truth}]'
            parts.append(truth)
        print('  ' + ' '.join(''.join(parts).split()))
    print()


# --------------------------------------------------------------------------------------------------
# training


def compiled(options, model, machine):
    """The model's compiled form, on CUDA or with --compile=True; else the model itself."""
    if not (machine.cuda if options.compile is None else options.compile):
        return model
    machine.check_compiler()
    if machine.device.type == 'cpu':
        # else threads add up an embedding's gradient in whatever order they finish
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    # after eight models in one process, as in bench.py, torch would run the next ones uncompiled
    # and say nothing
    torch._dynamo.config.recompile_limit = 256
    return torch.compile(model, dynamic=False)  # static shapes


def accumulation(options, block_size, machine):
    """(sequences that a device takes at a time, how often it does so in a step). If the options do
    not say, it is as many as TOKENS_AT_A_TIME allow, or one."""
    share, rest = divmod(options.batch_size, machine.world)
    if options.micro_batch_size is None:
        most = TOKENS_AT_A_TIME.get(machine.device.type, 2 ** 12) // block_size
        micro = next((n for n in range(min(most, share), 0, -1) if share % n == 0), 1)
    else:
        micro = min(options.micro_batch_size, max(1, share))
    if rest or share % micro:
        raise UserError(f'batch_size={options.batch_size} does not divide into {machine.world} '
                        f'processes x micro_batch_size={micro}: change one of them')
    return micro, share // micro


def numbers_of(step, k, options, machine, micro):
    """Numbers of the sequences that this process takes in micro-batch k of a step: its part of the
    one global order."""
    first = step * options.batch_size + (k * machine.world + machine.rank) * micro
    return range(first, first + micro)


def train_step(runner, optimizers, data, step, options, machine, micro, n_accumulation):
    """One optimizer step on the step's own sequences. Returns the means of what the model reports,
    `loss` and its terms, and the norm of the gradient, as tensors."""
    # dropout is a function of (seed, step, rank); they are hashed, because the CPU's generator
    # keeps 32 bits of a seed
    entropy = np.random.SeedSequence((options.seed, step, machine.rank)).generate_state(1)
    torch.manual_seed(int(entropy[0]))
    means = {}
    for k in range(n_accumulation):
        batch = machine.put(data.batch(numbers_of(step, k, options, machine, micro)))
        last = k == n_accumulation - 1  # only then do the processes exchange gradients
        with contextlib.nullcontext() if last or machine.world == 1 else runner.no_sync():
            with machine.autocast():
                out = runner(*batch)
            (out['loss'] / n_accumulation).backward()
        for name, value in out.items():
            means[name] = means.get(name, 0.0) + value.detach() / n_accumulation
    norm = nn.utils.clip_grad_norm_(runner.parameters(), options.grad_clip or math.inf)
    for optimizer in optimizers:
        optimizer.step()
    runner.zero_grad(set_to_none=True)
    for layer in mixtures(runner):
        if machine.world > 1:
            dist.all_reduce(layer.load)
        layer.balance() if optimizers else layer.load.zero_()
    return means, norm


def mixtures(model):
    return [module for module in model.modules() if isinstance(module, MoE)]


def stop_if_not_finite(step, *values):
    if not all(map(math.isfinite, values)):
        print(f'step {step}: the loss or its gradient is not finite, the run stops; what was saved '
              'before stands. A lower learning_rate, or in train.py a longer warmup, usually helps',
              file=sys.stderr)
        sys.exit(1)


class Stopwatch:
    """Training time in seconds. What happens inside `paused` is left out."""

    def __init__(self, seconds):
        self.since = time.perf_counter() - seconds

    def read(self):
        return time.perf_counter() - self.since

    @contextlib.contextmanager
    def paused(self):
        start = time.perf_counter()
        yield
        self.since += time.perf_counter() - start


def catch_signals():
    """A list that grows by a number with each SIGTERM or SIGINT: the step in hand is finished."""
    caught = []
    for kind in (signal.SIGTERM, signal.SIGINT):
        signal.signal(kind, lambda number, frame: caught.append(number))
    return caught


def open_run(options, model, checkpoint, machine, data):
    """The Run that train writes to, after it has printed what is going to be trained."""
    flat = dataclasses.asdict(options) | flat_options(model.config)
    origin = provenance(machine, data.meta, data.tokenizer)
    before, resumed_step = options.init_from, None
    if checkpoint:
        before = checkpoint['provenance'].get('started_from', 'scratch')
        resumed_step = checkpoint['step']
    facts = facts_of(options, model)
    project = 'causal-pretrain' if model.config.block.causal else 'encoder-pretrain'
    origin |= dict(started_from=before, masks=MASKS)
    run = Run(options.out_dir, flat, facts, origin, data.tokenizer, machine, resumed_step,
              project if options.wandb else None)
    if machine.first:
        print_facts(options, facts)
    return run


def restore(optimizers, checkpoint):
    """The optimizers' state of a checkpoint. The moments are those of the run; weight decay and the
    like are what the options now say. Raises UserError if it is the state of other optimizers."""
    for optimizer, saved in zip(optimizers, checkpoint['optimizers'], strict=True):
        groups = optimizer.state_dict()['param_groups']
        shapes = dict(enumerate(p.shape for g in optimizer.param_groups for p in g['params']))
        fits = all(value.shape in (shapes.get(i), ()) for i, moments in saved['state'].items()
                   for value in moments.values() if isinstance(value, torch.Tensor))
        if not fits or not saved['state'] and checkpoint['step'] > 0:
            raise UserError('the checkpoint holds the state of another optimizer: use '
                            '--init_from=RUN --out_dir=NEW to go on from its weights')
        optimizer.load_state_dict(saved | dict(param_groups=groups))


def report(run, options, machine, step, now, lr, means, grad_norm, seconds_a_step, model):
    """Logs and prints the training loss of a step, `now` seconds into the run."""
    sums = machine.total(*(value.item() for value in means.values()))
    terms = {name: total / machine.world for name, total in zip(means, sums)}
    stop_if_not_finite(step, terms['loss'], grad_norm)
    T = model.config.block_size
    rate = options.batch_size * T / seconds_a_step
    flops = rate * model.flops_per_token(T, predicted_share(options, model.config))
    mfu, memory, load = machine.mfu(flops), machine.memory_gb(), expert_load(model)
    run.record(step=step, tokens=step * options.batch_size * T, seconds=now, lr=lr,
               grad_norm=grad_norm, tokens_per_second=rate, memory_gb=memory,
               **{f'train_{name}': value for name, value in terms.items()},
               **(dict(mfu=mfu) if mfu else {}), **load)
    left = min((options.max_iters - step) * seconds_a_step,
               (options.max_seconds or math.inf) - now)
    busiest = f'busiest expert {load["busiest_expert"]:.2f}, ' if load else ''
    run.say(f'step {step}{"" if options.max_seconds else f"/{options.max_iters}"}: '
            f'{describe(terms)}, {busiest}lr {lr:.1e}, norm {grad_norm:.2f}, {rate:,.0f} tokens/s'
            f'{f", {mfu:.0%} MFU" if mfu else ""}, {memory:.1f} GB, '
            f'{timedelta(seconds=max(0, round(left)))} left')


def expert_load(model):
    """What metrics.jsonl says of the tokens that the last step has routed: of each layer with
    experts the share of each, and how many times the mean the busiest expert of all has had. {}
    without experts."""
    shares = [layer.last_load / layer.last_load.sum() for layer in mixtures(model)]
    if not shares:
        return {}
    busiest = max((share.max() * len(share)).item() for share in shares)
    return dict(expert_shares=[[round(x, 5) for x in share.tolist()] for share in shares],
                busiest_expert=busiest)


def train(options, model, forward, checkpoint, machine, data):
    """Trains to the end, or until a signal. forward: the model or its compiled form. checkpoint:
    the one to go on from, or None."""
    micro, n_accumulation = accumulation(options, model.config.block_size, machine)
    optimizers = make_optimizers(model, options)
    step, seconds, best = 0, 0.0, math.inf
    if checkpoint:
        step, seconds, best = checkpoint['step'], checkpoint['seconds'], checkpoint['best']
        restore(optimizers, checkpoint)
    if machine.total(step)[0] != step * machine.world:
        raise UserError(f'the processes found checkpoints of different steps in {options.out_dir}: '
                        'it has to be on a disk that all of them share')
    runner = forward
    if machine.world > 1:
        runner = DistributedDataParallel(forward, forward_sync_buffers=False,
                                         device_ids=[machine.device] if machine.cuda else None)
    run, T = open_run(options, model, checkpoint, machine, data), model.config.block_size
    tokens_a_step = options.batch_size * T
    over = f', {machine.world} processes over {dist.get_backend()}' if machine.world > 1 else ''
    run.say(f'{machine.describe()}{over}, {"bfloat16" if machine.bf16 else "float32"}'
            f'{"" if forward is model else ", compiled"}; a step is {options.batch_size} sequences '
            f'of {T} tokens (processes x accumulation x micro-batch: {machine.world} x '
            f'{n_accumulation} x {micro}), of which {data.train.share_with_border():.0%} cross a '
            f'document border; run folder {run.folder}')
    signals, batches = catch_signals(), Ahead(data.train, stride=micro * machine.world)
    if forward is not model:
        # A step without an optimizer changes nothing, but now the model is compiled: minutes that
        # would count as training time. (An evaluation compiles its own form while the clock rests.)
        train_step(runner, [], batches, step, options, machine, micro, n_accumulation)
    watch, first_step, reported = Stopwatch(seconds), step, (step, seconds)

    while True:
        # the processes decide alike: one signal stops all of them, and the first one's clock counts
        stop, seconds = machine.total(len(signals), watch.read() if machine.first else 0.0)
        done = step >= options.max_iters or seconds >= (options.max_seconds or math.inf)
        new = step > first_step  # weights that were just loaded have been scored and saved
        due = (new or step == 0) and (done or step % options.eval_interval == 0)

        # evaluate and save, when due
        if due or stop:
            with watch.paused():
                if new:
                    stop_if_not_finite(step, means['loss'].item(), norm.item())
                improved = False
                if due:
                    scores = evaluate(model, forward, data, micro, machine)
                    stop_if_not_finite(step, scores['val_loss'])
                    run.record(step=step, tokens=step * tokens_a_step, seconds=seconds, **scores)
                    run.say(f'step {step}: {describe(scores)}')
                    improved = new and scores['val_loss'] < best
                if improved:
                    best = scores['val_loss']
                state = dict(model=model.state_dict(), step=step, seconds=seconds, best=best,
                             optimizers=[optimizer.state_dict() for optimizer in optimizers])
                if new or stop:
                    run.save('ckpt.pt', state)
                if improved:
                    run.save('ckpt_best.pt', state)
        if done or stop:
            break

        # step
        lr = learning_rate(options, step, seconds)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group['lr'] = lr
        means, norm = train_step(runner, optimizers, batches, step, options, machine, micro,
                                 n_accumulation)
        step += 1

        # report, when due
        if step % options.log_interval == 0:
            now = watch.read()
            seconds_a_step = (now - reported[1]) / (step - reported[0])
            report(run, options, machine, step, now, lr, means, norm.item(), seconds_a_step, model)
            reported = step, now

    if not done:
        run.say(f'stopped by a signal at step {step}, saved; --init_from=resume goes on')
    elif step == first_step:
        run.say(f'nothing left to do: the run is at step {step} after {seconds:.0f} s; raise '
                'max_iters or max_seconds to go on')
    if machine.first and done and not model.config.block.causal:
        show_guesses(model, data.val, machine.device)
    run.close()


def main():
    options, model_options, state = read_options(sys.argv[1:])
    torch.manual_seed(options.seed)
    if options.dry_run:
        with torch.device('meta'):
            model = build(options.arch, model_options)
        return print_facts(options, facts_of(options, model))
    if options.export:
        return export_model(options, model_options, state)
    machine, origin = Machine(options), origin_of(options)
    tokenizer = Tokenizer.load(origin / 'tokenizer.json') if state else None
    # before the model is built: a block_size beyond the data could take all memory
    model_config = build(options.arch, model_options, make_config)
    data = open_data(options, model_config, machine, tokenizer)
    model = start_model(options, model_options, state)
    resuming = options.init_from == 'resume' and not options.eval_only
    if resuming:
        check_resumable(state, model, data, origin)
    model.to(machine.device)
    forward = compiled(options, model, machine)
    if options.eval_only:
        micro, _ = accumulation(options, model.config.block_size, machine)
        scores = evaluate(model, forward, data, micro, machine)
        if machine.first:
            print(f'step {state["step"]} of {origin} on {data.val.fixed:,} validation sequences of '
                  f'{data.folder}: {describe(scores)}')
    else:
        train(options, model, forward, state if resuming else None, machine, data)
    if machine.world > 1:
        dist.destroy_process_group()


def export_model(options, model_options, state):
    """Writes the model that a run would start from into the folder `export`."""
    model, origin = start_model(options, model_options, state), origin_of(options)
    tokenizer = load_tokenizer(origin, state, model.config, origin, 'copy both from one run')
    if os.environ.get('RANK', '0') == '0':
        export(model, tokenizer, options.export)
        print(f'{options.export}: step {state["step"]} of {origin}, {model.n_params():,} '
              'parameters, in the layout of DeepSeek-V3 for transformers')


def check_resumable(state, model, data, folder):
    """Raises UserError if going on from a checkpoint would not be the same run."""
    new = '--init_from=RUN --out_dir=NEW to go on from its weights'
    if state['provenance']['data_sha256'] != data.meta['sha256']:
        raise UserError(f'{folder}: was trained on other data than {data.folder} holds; use {new}')
    if state['model'].keys() != model.state_dict().keys():
        raise UserError(f'{folder}: was made by an earlier version, whose matrices were laid out '
                        f'differently, and with them the state of the optimizer; use {new}')
    if not model.config.block.causal and state['provenance'].get('masks') != MASKS:
        raise UserError(f'{folder}: was made by an earlier version, which drew other masks; use '
                        f'{new}')


if __name__ == '__main__':
    config.run(main)
