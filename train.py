"""Pre-training: masked-language modelling for encoders, next-token prediction for causal models.

    python train.py config/quick.py                                  # five minutes on a laptop
    python train.py config/mla_o.py --batch_size=32 --max_iters=300  # any option, after the config file
    torchrun --nproc_per_node=8 train.py config/mla_o.py             # one process a GPU
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import platform
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

import config
import prepare
from config import UserError
from model import ARCHITECTURES, ChannelLinear, ConfigError, ModelConfig, add_output_latent, make_model
from prepare import DataOptions, Tokenizer

EVAL_MASK_PROB = 0.15  # whatever a run masks in training, so that masked accuracies can be compared
WSD_DECAY = 0.4  # the last part of a wsd schedule, in which the learning rate falls
PEAK_BF16 = {'A100': 312e12, 'H100': 989e12, 'H200': 989e12, 'L40S': 362e12}  # dense FLOP/s, the vendor's figures
REFUSED = {
    'gradient_accumulation_steps': 'batch_size counts all sequences of a step, set micro_batch_size for what fits a '
                                   'device: accumulation follows',
    'wandb_log': 'use --wandb=True', 'wandb_project': 'the project is encoder-pretrain, use --wandb=True',
    'decay_lr': 'use schedule, and min_lr=learning_rate for a constant rate',
    'always_save_checkpoint': 'ckpt.pt is always the latest and ckpt_best.pt the best', 'backend': 'follows the device',
}


@dataclass
class MachineOptions:
    """Machine"""

    device: str = 'auto'  # auto (cuda, else mps, else cpu) or a torch device
    dtype: Literal['auto', 'float32', 'bfloat16'] = 'auto'  # auto: bfloat16 on a GPU that has it
    seed: int = 1337  # of weights, order of the data, masks and dropout


@dataclass
class TrainOptions(MachineOptions, DataOptions):
    """Training"""

    arch: str = 'transformer'  # architecture, a key of model.ARCHITECTURES
    batch_size: int = 32  # sequences a step, over all processes and accumulation
    micro_batch_size: int | None = None  # sequences a device takes at a time; None = its whole share of the batch
    max_iters: int = 5000  # optimizer steps
    max_seconds: float | None = None  # stop after so much training time, and let the schedule follow it
    learning_rate: float = 1e-3  # highest learning rate
    min_lr: float = 0.0  # where the schedule ends
    warmup_iters: int | None = None  # steps of linear warmup; None = a tenth of max_iters
    lr_decay_iters: int | None = None  # step at which the schedule ends; None = max_iters
    schedule: Literal['cosine', 'linear', 'wsd'] = 'cosine'  # decay; wsd is constant until the last 40%
    optimizer: Literal['adamw', 'muon'] = 'adamw'  # muon: on hidden matrices, adamw on the rest
    weight_decay: float = 0.1  # on matrices and embeddings
    beta1: float = 0.9  # adamw
    beta2: float = 0.95  # adamw
    grad_clip: float = 1.0  # largest norm of the gradient; 0 = off
    mask_prob: float = 0.15  # share of positions that an encoder predicts in training; evaluation is at 0.15
    eval_interval: int = 500  # steps between evaluations, each followed by a checkpoint
    eval_iters: int = 20  # batches of batch_size in an evaluation; 0 = the whole validation file
    log_interval: int = 10  # steps between lines
    out_dir: str | None = None  # run folder; None = out/CONFIG_NAME
    init_from: str = 'scratch'  # scratch, resume, auto (resume if there is a run), or another run's folder
    eval_only: bool = False  # score the model of init_from and end
    dry_run: bool = False  # print parameters, FLOPs and cache bytes and end; needs no data
    compile: bool | None = None  # torch.compile; None = on CUDA only
    wandb: bool = False  # log to Weights & Biases too (WANDB_MODE=offline works)

    def __post_init__(self):
        config.check_numbers(self, 'min_lr', 'warmup_iters', 'weight_decay', 'beta1', 'beta2', 'grad_clip', 'eval_iters', 'seed')
        for name in ('beta1', 'beta2', 'mask_prob'):
            if getattr(self, name) >= 1:
                raise UserError(f'{name}={getattr(self, name)}: takes a number below 1')
        if self.eval_only and self.init_from == 'scratch':
            raise UserError('eval_only scores a trained model: say which with --init_from=RUN, or =resume')


# ----------------------------------------------------------------------------------------------------------------
# data: every sequence, and every mask, is a function of the seed and of its number alone


class Loader:
    """Windows of a token file by sequence number, masked for an encoder.

    Number k of epoch e is a function of (seed, e, k): each epoch shifts the grid of windows and takes each once in a
    new order. With fixed=n there is no seed: n windows spread evenly over the file, masks of their own: a test set.
    """

    def __init__(self, tokens, block_size, vocab_size, tokenizer, causal, seed=0, mask_prob=EVAL_MASK_PROB, fixed=None):
        self.tokens, self.block_size, self.vocab_size, self.tokenizer = tokens, block_size, vocab_size, tokenizer
        self.causal, self.seed, self.fixed = causal, seed, fixed
        self.width = block_size + causal  # a causal model is shifted by one against its targets
        self.n_masked = max(1, round(mask_prob * block_size))
        if len(tokens) < self.width:
            raise UserError(f'block_size={block_size}: longer than the data ({len(tokens):,} tokens)')
        n_spare = (len(tokens) - self.width) // block_size
        if fixed is None:
            self.n_windows = max(1, n_spare)  # one window less than would fit leaves room for the shift
        else:
            self.n_windows = n_spare + 1
            self.fixed = min(fixed or self.n_windows, self.n_windows)
        self.epoch = None

    def starts(self, numbers):
        """First token of each numbered sequence."""
        if self.fixed is not None:
            return np.linspace(0, self.n_windows - 1, self.fixed).astype(np.int64)[numbers] * self.block_size
        return np.array([self.start(*divmod(number, self.n_windows)) for number in numbers])

    def start(self, epoch, k):
        if epoch != self.epoch:
            rng = np.random.default_rng((self.seed, epoch))
            room = len(self.tokens) - self.width - (self.n_windows - 1) * self.block_size
            self.shift = int(rng.integers(min(room + 1, self.block_size)))
            self.order, self.epoch = rng.permutation(self.n_windows), epoch
        return self.shift + int(self.order[k]) * self.block_size

    def batch(self, numbers):
        """The arguments of a model for these sequences: (idx, targets), or (idx, targets, positions) for an encoder."""
        starts = self.starts(numbers)
        windows = np.stack([self.tokens[start:start + self.width] for start in starts]).astype(np.int64)
        if windows.max() >= self.vocab_size:
            raise UserError(f'token id {windows.max()} is past vocab_size={self.vocab_size}: prepare the data again')
        if self.causal:
            return torch.from_numpy(windows[:, :-1]), torch.from_numpy(windows[:, 1:].copy())
        masked = windows.copy()
        # a test window has its mask, however many others are scored with it
        keys = numbers if self.fixed is None else starts
        positions = np.stack([self.mask(window, int(key)) for window, key in zip(masked, keys)])
        targets = np.take_along_axis(windows, positions, axis=1)
        return tuple(map(torch.from_numpy, (masked, targets, positions)))

    def mask(self, window, key):
        """Picks n_masked positions and corrupts them in place: 80% become <|mask|>, 10% a random token, 10% stay."""
        rng = np.random.default_rng((self.seed, key, 1))
        positions = np.sort(rng.permutation(self.block_size)[:self.n_masked])
        draw = rng.random(self.n_masked)
        noise = rng.integers(len(self.tokenizer.ranks), size=self.n_masked)
        window[positions] = np.where(draw < 0.8, self.tokenizer.mask, np.where(draw < 0.9, noise, window[positions]))
        return positions

    def share_with_border(self):
        """Share of windows in which attention crosses from one document to another."""
        starts = np.linspace(0, len(self.tokens) - self.width, 10_000).astype(np.int64)  # a sample is enough
        return np.mean([(self.tokens[start + 1:start + self.block_size] == self.tokenizer.eot).any() for start in starts])


def ids_needed(tokenizer, causal):
    """Smallest vocab_size of a model for this tokenizer: a causal one never sees <|mask|> and <|pad|>."""
    return tokenizer.eot + 1 if causal else tokenizer.vocab_size


def open_data(options, model_config, machine, run_tokenizer=None):
    """meta, tokenizer and the loaders train and val; prepares the data set first if it is absent. Where the model comes
    from a run, the data has to be in that run's tokens: another corpus is prepared with them."""
    folder = prepare.folder_of(options)
    if run_tokenizer and not (folder.exists() and options.source in (None, prepare.read_meta(folder)['source'])
                              and Tokenizer.load(folder / 'tokenizer.json').digest() == run_tokenizer.digest()):
        folder = prepare.folder_of(options, run_tokenizer)
    if not folder.exists() and machine.local_rank == 0:
        print(f'{folder} is absent: preparing it', flush=True)
        fields = {f.name: getattr(options, f.name) for f in dataclasses.fields(DataOptions)}
        fields |= {} if options.tokenizer == 'bpe' else {'vocab_size': None}
        prepare.prepare(prepare.PrepareOptions(**fields), run_tokenizer)
    machine.wait()
    meta, tokenizer = prepare.read_meta(folder), Tokenizer.load(folder / 'tokenizer.json')
    if options.source and meta['source'] != options.source:
        prepare.local_files(options.source)
        raise UserError(f'{folder} was prepared from {meta["source"]}, not {options.source}: remove that folder, or run '
                        'prepare.py with this source, which replaces it')
    vocab_size, causal = model_config.vocab_size, model_config.causal
    if vocab_size < (needed := ids_needed(tokenizer, causal)):
        raise UserError(f'vocab_size={vocab_size}: the tokenizer of {folder} needs {needed}')
    if vocab_size > 2 * tokenizer.vocab_size and machine.rank == 0:
        print(f'vocab_size={vocab_size}, but {folder} has {tokenizer.vocab_size} ids: --vocab_size=None takes just those')
    shared = model_config.block_size, vocab_size, tokenizer, causal
    train = Loader(prepare.read_tokens(folder, 'train'), *shared, seed=options.seed, mask_prob=options.mask_prob)
    val = Loader(prepare.read_tokens(folder, 'val'), *shared, fixed=options.eval_iters * options.batch_size)
    return SimpleNamespace(folder=folder, meta=meta, tokenizer=tokenizer, train=train, val=val)


# ----------------------------------------------------------------------------------------------------------------
# device, optimizer, schedule


def open_machine(options):
    """Where this process runs: device, autocast, rank, local_rank, world, and what the processes agree through."""
    rank, local_rank, world = (int(os.environ.get(name, default)) for name, default in
                               (('RANK', 0), ('LOCAL_RANK', 0), ('WORLD_SIZE', 1)))
    device = options.device
    if device == 'auto':
        device = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    try:
        device = torch.device(f'cuda:{local_rank}' if device == 'cuda' else device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f'--device={options.device}: {str(error).splitlines()[0]}') from None
    bf16 = options.dtype == 'bfloat16' or (options.dtype == 'auto' and device.type == 'cuda'
                                           and torch.cuda.is_bf16_supported(including_emulation=False))
    torch.set_float32_matmul_precision('high')  # TF32 where there is any
    control = None
    if device.type == 'cuda':
        torch.cuda.set_device(device)
    if world > 1:
        patience = timedelta(minutes=10)
        store, _, _ = next(dist.rendezvous('env://', timeout=patience))
        if os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True':  # it outlives a restart, with the addresses of the dead in it
            store = dist.PrefixStore(os.environ['TORCHELASTIC_RESTART_COUNT'], store)
        dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo', store=store, rank=rank, world_size=world,
                                timeout=patience)
        preparing = dist.new_group(backend='gloo', timeout=timedelta(days=2))
        control = dist.new_group(backend='gloo', timeout=patience)  # flags and clocks travel here and never wait for a GPU

    def total(*values):
        """Each number summed over the processes."""
        tensor = torch.tensor(values, dtype=torch.float64)
        if world > 1:
            dist.all_reduce(tensor, group=control)
        return tensor.tolist()

    def put(batch):
        """The tensors of a batch on the device; to a GPU from pinned memory, so that nothing waits for the copy."""
        if device.type == 'cuda':
            return [tensor.pin_memory().to(device, non_blocking=True) for tensor in batch]
        return [tensor.to(device) for tensor in batch]

    return SimpleNamespace(
        device=device, rank=rank, local_rank=local_rank, world=world, total=total, put=put,
        bf16=bf16, precision=torch.bfloat16 if bf16 else torch.float32,
        wait=lambda: dist.barrier(group=preparing) if world > 1 else None,
        autocast=lambda: torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext())


def device_name(device):
    return torch.cuda.get_device_name(device) if device.type == 'cuda' else f'{device.type} ({os.cpu_count()} cores)'


def memory_gb(device):
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 30 if sys.platform == 'darwin' else 2 ** 20)


def parameter_groups(model):
    """(hidden matrices as modules, embeddings, gains and biases): every parameter in exactly one of the three."""
    matrices, embeddings, vectors = [], [], []
    for name, module in model.named_modules():
        linear = isinstance(module, (nn.Linear, ChannelLinear))
        if linear and name != 'lm_head':
            matrices.append(module)
        for part, parameter in module.named_parameters(recurse=False):
            if isinstance(module, nn.Embedding) or name == 'lm_head':
                embeddings.append(parameter)
            elif not (linear and part == 'weight'):
                assert parameter.dim() == 1 or part in ('gain', 'bias'), f'{name}.{part}: say which group it belongs to'
                vectors.append(parameter)
    grouped = [module.weight for module in matrices] + embeddings + vectors
    assert sorted(map(id, grouped)) == sorted(map(id, model.parameters()))
    return matrices, embeddings, vectors


class Muon(torch.optim.Muon):
    """torch.optim.Muon for linear layers; of a fused one it orthogonalises each projection by itself, and of parallel
    channels each one's."""

    def __init__(self, layers, **options):
        self.views = []  # (weight, rows, a parameter that shares their memory)
        for layer in layers:
            splits = getattr(layer, 'splits', None) or (layer.out_features,)
            starts = [sum(splits[:i]) for i in range(len(splits))]
            for rows in (slice(start, start + n) for start, n in zip(starts, splits) if n):
                places = [rows] if layer.weight.dim() == 2 else [(c, rows) for c in range(layer.n_channels)]
                self.views += [(layer.weight, place, nn.Parameter(layer.weight.data[place])) for place in places]
        super().__init__([view for _, _, view in self.views], **options)

    def step(self, closure=None):
        for weight, rows, view in self.views:
            view.grad = weight.grad[rows]
        super().step(closure)
        for _, _, view in self.views:
            view.grad = None


def make_optimizers(model, options):
    """A list of optimizers that together step every parameter once. The learning rate is set at each step."""
    matrices, embeddings, vectors = parameter_groups(model)
    shared = dict(lr=options.learning_rate, weight_decay=options.weight_decay)
    muon = options.optimizer == 'muon'
    decayed = embeddings if muon else [layer.weight for layer in matrices] + embeddings
    adamw = torch.optim.AdamW([dict(params=decayed), dict(params=vectors, weight_decay=0.0)],
                              betas=(options.beta1, options.beta2), fused=True, **shared)
    # scaled to the size of AdamW's updates, so that both take the same learning rates
    return [Muon(matrices, adjust_lr_fn='match_rms_adamw', **shared), adamw] if muon else [adamw]


def learning_rate(options, step, seconds):
    """Linear warmup over steps, then the decay: over steps to lr_decay_iters, or over time if there is max_seconds."""
    warmup = options.max_iters // 10 if options.warmup_iters is None else options.warmup_iters
    if options.max_seconds:
        progress = seconds / options.max_seconds
    else:
        end = options.lr_decay_iters or options.max_iters
        progress = (step - warmup) / max(1, end - warmup)
    progress = min(1.0, max(0.0, progress))
    if options.schedule == 'cosine':
        factor = 0.5 * (1 + math.cos(math.pi * progress))
    elif options.schedule == 'linear':
        factor = 1 - progress
    else:
        factor = min(1.0, (1 - progress) / WSD_DECAY)
    lr = options.min_lr + factor * (options.learning_rate - options.min_lr)
    return lr * min(1.0, (step + 1) / max(1, warmup))


# ----------------------------------------------------------------------------------------------------------------
# checkpoints and run folders


def save_checkpoint(path, state):
    """Writes a temporary file, flushes it to the disk and renames it: at any moment `path` is the old or the new state."""
    partial = path.with_name(f'{path.name}.partial')
    try:
        with open(partial, 'wb') as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise UserError(f'{path}: cannot be written ({error}); the checkpoint before it stands') from None


def save_text(path, text):
    """Writes a small file whole or not at all."""
    partial = path.with_name(f'{path.name}.partial')
    try:
        partial.write_text(text)
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise UserError(f'{path}: cannot be written ({error})') from None


def load_checkpoint(path):
    """A checkpoint as a dict of tensors and plain values; its own checksums are verified, nothing in it is executed."""
    if not Path(path).is_file():
        raise UserError(f'{path}: there is no such checkpoint: name the folder of a run of train.py, out/quick for instance')
    try:
        with zipfile.ZipFile(path) as file:
            broken = file.testzip()
        if broken:
            raise zipfile.BadZipFile(f'bad checksum in {broken}')
        state = torch.load(path, map_location='cpu', weights_only=True)
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise UserError(f'{path}: truncated or damaged ({error}): restore it, or use another checkpoint') from None
    except Exception as error:  # another zip file, or a pickle that would run code: torch.load names it in many ways
        raise UserError(f'{path}: no checkpoint of train.py ({type(error).__name__})') from None
    if not isinstance(state, dict) or not {'model', 'options', 'step'} <= state.keys():
        raise UserError(f'{path}: no checkpoint of train.py (no model, options and step in it)')
    return state


def split_options(flat):
    """A flat dict of options -> (those of training, those of the model)."""
    training = {field.name for field in dataclasses.fields(TrainOptions)} - {'vocab_size'}
    return {k: v for k, v in flat.items() if k in training}, {k: v for k, v in flat.items() if k not in training}


def recipe_of(flat):
    """A flat dict of options -> (TrainOptions, those of the model, vocab_size included)."""
    training, model_options = split_options(flat)
    options = TrainOptions(**training, vocab_size=flat.get('vocab_size'))
    return options, model_options | dict(vocab_size=options.vocab_size or prepare.vocab_size_of(options))


def build(arch, model_options):
    try:
        return make_model(arch, **model_options)
    except ConfigError as error:
        raise UserError(str(error)) from None


def compiled(options, model, machine):
    """The model, or on CUDA or by --compile its compiled form."""
    if not (machine.device.type == 'cuda' if options.compile is None else options.compile):
        return model
    compiler = os.environ.get('CXX', 'clang++' if sys.platform == 'darwin' else 'g++')
    if not shutil.which(compiler):
        raise UserError(f'torch.compile needs a C++ compiler and there is no {compiler}: install it, set CXX, or use --compile=False')
    if machine.device.type == 'cpu':  # its threads would add up an embedding's gradient in whatever order they finish
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    return torch.compile(model, dynamic=False)  # static shapes


def load_weights(model, state, path):
    """The weights of a checkpoint into a model. Another architecture is a UserError that names what differs; dropout
    may differ, and block_size where no weight depends on it."""
    saved = split_options(state['options'])[1]
    for name, value in dataclasses.asdict(model.config).items():
        if name in saved and saved[name] != value and name not in ('dropout', 'attention_dropout', 'block_size'):
            raise UserError(f'{path}: another architecture: it was trained with {name}={saved[name]}, not {value}')
    try:
        model.load_state_dict(state['model'])
    except RuntimeError as error:
        raise UserError(f'{path}: another architecture: {str(error).splitlines()[-1].strip()}') from None


def with_output_latent(state, config, path):
    """The checkpoint of a model without an output latent as that of one with it: each o_proj becomes the best product of
    rank o_latent."""
    training, model_options = split_options(state['options'])
    model = build(training['arch'], model_options)
    load_weights(model, state, path)
    try:
        add_output_latent(model, config.o_latent, norm=config.o_norm)
    except ConfigError as error:
        raise UserError(str(error)) from None
    options = state['options'] | dict(o_latent=config.o_latent, o_norm=config.o_norm)
    return state | dict(model=model.state_dict(), options=options)


def best_checkpoint(folder):
    """The checkpoint that speaks for a run: the best, or the latest of a run stopped before its first evaluation."""
    best = Path(folder) / 'ckpt_best.pt'
    return best if best.exists() else Path(folder) / 'ckpt.pt'


def load_run(folder, device='cpu'):
    """(model, tokenizer, options) of a run folder: its best model in eval mode, options as a flat dict."""
    path = best_checkpoint(folder)
    state, tokenizer = load_checkpoint(path), Tokenizer.load(Path(folder) / 'tokenizer.json')
    training, model_options = split_options(state['options'])
    model = build(training['arch'], model_options)
    load_weights(model, state, path)
    digest = tokenizer.digest()
    if (state.get('provenance', {}).get('tokenizer', digest) != digest  # runs of old do not say
            or model.config.vocab_size < ids_needed(tokenizer, model.config.causal)):
        raise UserError(f'{folder}/tokenizer.json: another tokenizer than {path.name} was trained with: copy both from one '
                        'run')
    return model.to(device).eval(), tokenizer, state['options']


def provenance(machine, meta, tokenizer):
    """Where a checkpoint comes from."""
    git = shutil.which('git')
    commit = git and subprocess.run([git, 'rev-parse', 'HEAD'], cwd=Path(__file__).parent, capture_output=True,
                                    text=True).stdout.strip()
    return dict(command=' '.join(sys.argv), commit=commit or 'unknown', data_sha256=meta['sha256'],
                tokenizer=tokenizer.digest(), device=device_name(machine.device), processes=machine.world,
                python=platform.python_version(), torch=str(torch.__version__), numpy=np.__version__)


def date_of(path, taken):
    """The date of a file, for the name of what is set aside; numbered where taken(date) says that the name is in use."""
    date = datetime.fromtimestamp(path.stat().st_mtime).strftime('%Y%m%d-%H%M%S')
    return next(name for i in itertools.count(1) if not taken(name := date if i == 1 else f'{date}-{i}'))


def open_run(folder, flat, tokenizer, resumed_step):
    """Makes the run folder ready: moves an earlier run out of the way, or cuts its metrics back to the checkpoint."""
    latest = folder / 'ckpt.pt'
    try:
        if resumed_step is None and latest.exists():
            aside = folder.with_name(f'{folder.name}-{date_of(latest, lambda date: Path(f"{folder}-{date}").exists())}')
            folder.rename(aside)
            print(f'{folder} holds an earlier run: renamed to {aside}')
        folder.mkdir(parents=True, exist_ok=True)
        lines = [] if resumed_step is None else [line for line in read_metrics(folder) if line['step'] <= resumed_step]
        save_text(folder / 'metrics.jsonl', ''.join(json.dumps(line) + '\n' for line in lines))
        (folder / 'config.json').write_text(json.dumps(flat, indent=2) + '\n')
        tokenizer.save(folder / 'tokenizer.json')
    except OSError as error:
        raise UserError(f'{folder}: cannot be used as a run folder ({error})') from None


def read_metrics(folder):
    """The lines of metrics.jsonl as dicts; one that a kill cut off is left out."""
    path, lines = Path(folder) / 'metrics.jsonl', []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines


# ----------------------------------------------------------------------------------------------------------------
# evaluation, and what a person sees


@torch.no_grad()
def evaluate(model, forward, data, batch_size, machine):
    """Mean loss over the fixed windows of data.val, sharded over the processes, and what follows from it.
    forward: the model itself or its compiled form."""
    loader = data.val
    model.eval()
    loss, correct, count = 0.0, 0.0, 0
    mine = np.arange(loader.fixed)[machine.rank::machine.world]
    for start in range(0, len(mine), batch_size):
        numbers = mine[start:start + batch_size]
        n = len(numbers)
        batch = loader.batch(np.resize(numbers, batch_size))  # shapes are static: the last batch is filled up,
        batch[1][n:] = -1  # and what fills it is not scored
        with machine.autocast():
            out = forward(*machine.put(batch))
        loss += out['loss'].item() * n
        correct += out['accuracy'].item() * n
        count += n
    model.train()
    loss, correct, count = machine.total(loss, correct, count)
    loss, accuracy = loss / count, correct / count
    scores = dict(val_loss=loss, val_perplexity=math.exp(min(loss, 700)))
    if loader.causal:
        return scores | dict(val_bits_per_byte=loss / math.log(2) / data.meta['bytes_per_token'])
    return scores | dict(val_masked_accuracy=accuracy)


@torch.no_grad()
def show_guesses(model, loader, device, n_sentences=4, length=40):
    """Prints stretches of held-out text with their masked tokens: [right guess], or [wrong guess|what it was]."""
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
                right = guesses[row, t] == text[t]
                truth = f'[{truth}]' if right else f'[{tokenizer.decode([guesses[row, t]])}|{truth}]'
            parts.append(truth)
        print('  ' + ' '.join(''.join(parts).split()))
    print()


def pyplot():
    """matplotlib.pyplot for files, imported by whoever plots: it takes a second."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    return plt


def plot_losses(folder):
    """RUN/loss.png: training and validation loss over the steps."""
    plt = pyplot()
    lines = read_metrics(folder)
    figure, axes = plt.subplots(figsize=(7, 4.5), layout='constrained')
    # where the training loss has further parts, its cross-entropy is what compares with the validation loss
    train = 'train_cross_entropy' if any('train_cross_entropy' in line for line in lines) else 'train_loss'
    for key, style in ((train, dict(linewidth=0.8, alpha=0.6)), ('val_loss', dict(marker='o', markersize=3))):
        points = [(line['step'], line[key]) for line in lines if key in line]
        if points:
            axes.plot(*zip(*points), label=key.replace('_', ' '), **style)
    axes.set(xlabel='step', ylabel='loss (nats)', title=folder.name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(folder / 'loss.png', dpi=120)
    plt.close(figure)


def open_wandb(project, name, folder, flat):
    import wandb
    try:
        return wandb.init(project=project, name=name, dir=folder, config=flat)
    except wandb.errors.Error as error:
        raise UserError(f'--wandb=True: {error}: log in with `wandb login`, or set WANDB_MODE=offline') from None


def log_line(path, wandb_run, line):
    """Appends a dict of numbers to a jsonl file, and sends it to wandb if there is a run."""
    try:
        with open(path, 'a') as file:
            file.write(json.dumps(line) + '\n')
    except OSError as error:
        raise UserError(f'{path}: cannot be written ({error}); the last checkpoint stands') from None
    if wandb_run:
        wandb_run.log(line, step=line['step'])


def mean_and_interval(values):
    """Mean of a few repetitions and half its 95% interval by Student's t; None where there is but one."""
    n = len(values)
    if n == 1:
        return values[0], None
    # quantiles of t for 1, 2, ... degrees of freedom; beyond the table an expansion in 1/df is good to a thousandth
    table = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
    t = table[n - 2] if n - 2 < len(table) else 1.960 + 2.372 / (n - 1) + 2.82 / (n - 1) ** 2
    return statistics.mean(values), t * statistics.stdev(values) / math.sqrt(n)


def mfu(machine, flops_per_second):
    """', 41% MFU' where the peak is known: bfloat16 matrix products of this kind of GPU."""
    peak = next((peak for name, peak in PEAK_BF16.items() if name in device_name(machine.device)), None)
    return f', {flops_per_second / machine.world / peak:.0%} MFU' if peak and machine.bf16 else ''


def describe(scores):
    return ', '.join(f'{name.removeprefix("val_").replace("_", " ")} {value:.4f}' for name, value in scores.items())


def predicted_share(options, c):
    """Share of the tokens whose logits a training step needs."""
    return 1.0 if c.causal else max(1, round(options.mask_prob * c.block_size)) / c.block_size


def print_model(options, model):
    c = model.config
    print(f'{options.arch}: {model.n_params():,} parameters ({model.n_params(positions=False):,} without positions), '
          f'{model.flops_per_token(c.block_size, predicted_share(options, c)) / 1e6:.1f} MFLOP a token in training'
          + (f', {model.cache_bytes_per_token():,.0f} cache bytes a token' if c.causal else ''))


# ----------------------------------------------------------------------------------------------------------------
# training


def read_options(argv):
    """(options, model options, state of the checkpoint to start from or None) of a command line."""
    model_classes = [config_class for _, config_class in ARCHITECTURES.values()]
    values, name = config.load(argv, TrainOptions, ModelConfig, *model_classes, doc=__doc__, refused=REFUSED)
    out_dir = values.get('out_dir') or f'out/{name or "default"}'
    init_from, state, saved = values.get('init_from', 'scratch'), None, {}
    latest = Path(out_dir) / 'ckpt.pt'
    if init_from == 'auto':
        init_from = 'resume' if latest.exists() else 'scratch'
    if init_from == 'resume':
        state = load_checkpoint(latest)
        saved = state['options']
        changed = {key: value for key, value in values.items()
                   if key in saved and value not in (saved[key], None)
                   and key not in ('init_from', 'out_dir', 'eval_only', 'dry_run', 'wandb')}
        for key, value in changed.items():
            if key in ('batch_size', 'seed', 'optimizer', 'mask_prob'):
                raise UserError(f'{latest}: cannot go on with {key}={value}, it was {saved[key]}; use --init_from=RUN '
                                '--out_dir=NEW to start anew from its weights')
            if os.environ.get('RANK', '0') == '0':
                print(f'{latest}: {key} was {saved[key]}, is now {value}')
    elif init_from != 'scratch':
        state = load_checkpoint(best_checkpoint(init_from))
        training, model_options = split_options(state['options'])
        # of another run, what the model is and what it reads; the recipe, dropout included, is this run's own
        inherited = {field.name for field in dataclasses.fields(DataOptions)} | {'arch'}
        if values.get('eval_only'):
            inherited |= {'batch_size', 'eval_iters'}  # scored on as much as it was in training
        saved = {k: v for k, v in training.items() if k in inherited}
        saved |= {k: v for k, v in model_options.items() if k not in ('dropout', 'attention_dropout')}
    flat = {**saved, **values, 'out_dir': out_dir, 'init_from': init_from}
    return *recipe_of(flat), state


def accumulation(options, world):
    """(sequences a device takes at a time, how often it does so in a step)."""
    share, rest = divmod(options.batch_size, world)
    micro = min(options.micro_batch_size or share, share)
    if rest or share % micro:
        raise UserError(f'batch_size={options.batch_size} does not divide into {world} processes x micro_batch_size='
                        f'{micro}: change one of them')
    return micro, share // micro


def numbers_of(step, k, options, machine, micro):
    """Numbers of the sequences that this process takes in micro-batch k of a step: its part of the one global order."""
    first = step * options.batch_size + (k * machine.world + machine.rank) * micro
    return range(first, first + micro)


def train_step(runner, optimizers, data, step, options, machine, micro, n_accumulation):
    """One optimizer step on the step's own sequences; returns the means of what the model reports (`loss` and its parts)
    and the gradient norm, as tensors."""
    # dropout: a function of seed, step and rank (the CPU's generator keeps 32 bits of a seed, so they are hashed)
    torch.manual_seed(int(np.random.SeedSequence((options.seed, step, machine.rank)).generate_state(1)[0]))
    means = {}
    for k in range(n_accumulation):
        numbers = numbers_of(step, k, options, machine, micro)
        batch = machine.put(data.batch(numbers))
        last = k == n_accumulation - 1
        with contextlib.nullcontext() if last or machine.world == 1 else runner.no_sync():
            with machine.autocast():
                out = runner(*batch)
            (out['loss'] / n_accumulation).backward()
        means = {name: means.get(name, 0.0) + value.detach() / n_accumulation for name, value in out.items()}
    norm = nn.utils.clip_grad_norm_(runner.parameters(), options.grad_clip or math.inf)
    for optimizer in optimizers:
        optimizer.step()
    runner.zero_grad(set_to_none=True)
    return means, norm


def stop_if_not_finite(step, *values):
    if not all(map(math.isfinite, values)):
        print(f'step {step}: the loss or its gradient is not finite, the run stops; what was saved before stands. A lower '
              'learning_rate, or in train.py a longer warmup, usually helps', file=sys.stderr)
        sys.exit(1)


class Stopwatch:
    """Training time in seconds; what happens inside `paused` is left out."""

    def __init__(self, seconds):
        self.since = time.perf_counter() - seconds

    def read(self):
        return time.perf_counter() - self.since

    @contextlib.contextmanager
    def paused(self):
        start = time.perf_counter()
        yield
        self.since += time.perf_counter() - start


def train(options, model, forward, state, machine, data):
    """Trains to the end, or until a signal. forward: the model or its compiled form; state: a checkpoint to go on from."""
    c, master = model.config, machine.rank == 0
    say = functools.partial(print, flush=True) if master else lambda *words: None
    micro, n_accumulation = accumulation(options, machine.world)
    optimizers = make_optimizers(model, options)
    step, seconds, best = (state['step'], state['seconds'], state['best']) if state else (0, 0.0, math.inf)
    for optimizer, saved in zip(optimizers, state['optimizers'] if state else ()):
        # the moments are the run's, weight decay and the like are as the options now say
        optimizer.load_state_dict(saved | {'param_groups': optimizer.state_dict()['param_groups']})
    if machine.total(step)[0] != step * machine.world:
        raise UserError(f'the processes found checkpoints of different steps in {options.out_dir}: it has to be on a disk '
                        'that all of them share')
    runner = forward if machine.world == 1 else DistributedDataParallel(
        forward, forward_sync_buffers=False, device_ids=[machine.device] if machine.device.type == 'cuda' else None)

    flat, origin = dataclasses.asdict(options) | dataclasses.asdict(c), provenance(machine, data.meta, data.tokenizer)
    origin['started_from'] = state['provenance'].get('started_from', 'scratch') if state else options.init_from
    folder, wandb_run = Path(options.out_dir), None
    if master:
        open_run(folder, flat, data.tokenizer, step if state else None)
        wandb_run = open_wandb('encoder-pretrain', folder.name, folder, flat) if options.wandb else None
        print_model(options, model)
    say(f'{origin["device"]}, {"bfloat16" if machine.bf16 else "float32"}{"" if forward is model else ", compiled"}; a step '
        f'is {options.batch_size} sequences of {c.block_size} tokens (processes x accumulation x micro-batch: '
        f'{machine.world} x {n_accumulation} x {micro}), of which {data.train.share_with_border():.0%} cross a document '
        f'border; run folder {folder}')

    def record(**line):
        if master:
            log_line(folder / 'metrics.jsonl', wandb_run, line)

    def save(name):
        if master:
            save_checkpoint(folder / name, dict(
                model=model.state_dict(), optimizers=[optimizer.state_dict() for optimizer in optimizers], options=flat,
                step=step, seconds=seconds, best=best, provenance=origin))

    signals = []  # the step in hand is finished and saved, then the run ends with status 0
    for kind in (signal.SIGTERM, signal.SIGINT):
        signal.signal(kind, lambda number, frame: signals.append(number))
    first_step, tokens_a_step = step, options.batch_size * c.block_size
    flops_per_token = model.flops_per_token(c.block_size, predicted_share(options, c))
    watch, last = Stopwatch(seconds), SimpleNamespace(step=step, seconds=seconds)  # last: the line printed before this one
    while True:
        # the processes decide alike: one signal stops all of them, and the clock is the first one's
        stop, seconds = machine.total(len(signals), watch.read() if master else 0.0)
        done = step >= options.max_iters or (options.max_seconds is not None and seconds >= options.max_seconds)
        stepped = step > first_step
        if stepped and (stop or done or step % options.eval_interval == 0):
            stop_if_not_finite(step, means['loss'].item(), norm.item())  # before anything is saved
        if (stepped or step == 0) and (done or step % options.eval_interval == 0):
            with watch.paused():
                scores = evaluate(model, forward, data, micro, machine)
                stop_if_not_finite(step, scores['val_loss'])
                record(step=step, tokens=step * tokens_a_step, seconds=seconds, **scores)
                say(f'step {step}: {describe(scores)}')
                improved = stepped and scores['val_loss'] < best  # untrained weights are nobody's best
                best = scores['val_loss'] if improved else best
                if stepped or stop:
                    save('ckpt.pt')
                if improved:
                    save('ckpt_best.pt')
        elif stop:
            save('ckpt.pt')
        if done or stop:
            break

        lr = learning_rate(options, step, seconds)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group['lr'] = lr
        means, norm = train_step(runner, optimizers, data.train, step, options, machine, micro, n_accumulation)
        step += 1

        if step % options.log_interval == 0:
            sums = machine.total(*(value.item() for value in means.values()))
            parts, grad_norm = {name: total / machine.world for name, total in zip(means, sums)}, norm.item()
            stop_if_not_finite(step, train_loss := parts.pop('loss'), grad_norm)
            now = watch.read()
            step_seconds = (now - last.seconds) / (step - last.step)
            last = SimpleNamespace(step=step, seconds=now)
            rate = tokens_a_step / step_seconds
            record(step=step, tokens=step * tokens_a_step, seconds=now, train_loss=train_loss, lr=lr, grad_norm=grad_norm,
                   tokens_per_second=rate, **{f'train_{name}': value for name, value in parts.items()})
            left = min((options.max_iters - step) * step_seconds, (options.max_seconds or math.inf) - now)
            total = '' if options.max_seconds else f'/{options.max_iters}'
            shown = describe({'loss': train_loss} | parts)
            say(f'step {step}{total}: {shown}, lr {lr:.1e}, norm {grad_norm:.2f}, '
                f'{rate:,.0f} tokens/s{mfu(machine, rate * flops_per_token)}, {memory_gb(machine.device):.1f} GB, '
                f'{timedelta(seconds=max(0, round(left)))} left')

    if not done:
        say(f'stopped by a signal at step {step}, saved; --init_from=resume goes on')
    elif step == first_step:
        say(f'nothing left to do: the run is at step {step} after {seconds:.0f} s; raise max_iters or max_seconds to go on')
    if master:
        plot_losses(folder)
        if done and not c.causal:
            show_guesses(model, data.val, machine.device)
    if wandb_run:
        wandb_run.finish()


def main():
    options, model_options, state = read_options(sys.argv[1:])
    torch.manual_seed(options.seed)
    with torch.device('meta') if options.dry_run else contextlib.nullcontext():
        model = build(options.arch, model_options)
    if options.dry_run:
        return print_model(options, model)
    machine = open_machine(options)
    resuming = options.init_from == 'resume'
    origin = Path(options.out_dir if resuming else options.init_from)
    if state and not resuming and model.config.o_latent and not state['options'].get('o_latent'):
        state = with_output_latent(state, model.config, origin)
    if state:
        load_weights(model, state, origin)
    data = open_data(options, model.config, machine, Tokenizer.load(origin / 'tokenizer.json') if state else None)
    if resuming and not options.eval_only and state['provenance']['data_sha256'] != data.meta['sha256']:
        raise UserError(f'{options.out_dir}: was trained on other data than {data.folder} holds; use '
                        '--init_from=RUN --out_dir=NEW to go on from its weights')
    model.to(machine.device)
    forward = compiled(options, model, machine)
    if options.eval_only:
        micro, _ = accumulation(options, machine.world)
        scores = evaluate(model, forward, data, micro, machine)
        if machine.rank == 0:
            print(f'step {state["step"]} of {origin} on {data.val.fixed:,} validation sequences of {data.folder}: {describe(scores)}')
    else:
        train(options, model, forward, state if resuming else None, machine, data)
    if machine.world > 1:
        dist.destroy_process_group()


if __name__ == '__main__':
    config.run(main)
