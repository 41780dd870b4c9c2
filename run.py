"""A run: its device, its folder, its checkpoints and its log. train.py writes runs, and the other
scripts start from one."""

import contextlib
import itertools
import json
import math
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import sysconfig
import time
import timeit
import zipfile
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError

import config
from config import UserError
from deepseek import (Checkpoint, load_deepseek, options_of_deepseek, to_deepseek,
                      write_checkpoint)
from model import ConfigError, Range, make_config, make_model, option_names
from prepare import Tokenizer

FORMAT = 2  # of checkpoints and run.json; raise it when older ones can no longer be read

# dense bfloat16 FLOP/s of GPUs, from the vendor's data sheets. The first name that is part of the
# GPU's name counts, because an H100 in a PCIe slot is slower than one on an SXM board.
PEAK_BF16 = {'A100': 312e12, 'H100 PCIe': 756e12, 'H100 NVL': 835e12, 'H100': 989e12,
             'H200 NVL': 835e12, 'H200': 989e12, 'L40S': 362e12}

NVIDIA_DRIVER = Path('/dev/nvidiactl')  # exists with a GPU, whether torch can use it or not

Seed = Annotated[int, Range(least=0, below=2 ** 63)]


# --------------------------------------------------------------------------------------------------
# device


@dataclass
class DeviceOptions:
    """Device"""

    device: str = 'auto'  # auto (cuda, else mps, else cpu) or a torch device
    dtype: Literal['auto', 'float32', 'bfloat16'] = 'auto'  # auto: bfloat16 where it is faster


class Device:
    """Where this process computes, in which precision, and its rank among the processes that
    torchrun started."""

    def __init__(self, options, trains=True):
        """options: DeviceOptions. trains: if False, dtype=auto is float32 on a CPU, because
        bfloat16 gains nothing for the small products of generation. Raises UserError if there is
        no such device."""
        self.rank = number_from_environment('RANK', 0)
        self.local_rank = number_from_environment('LOCAL_RANK', 0)
        self.world = number_from_environment('WORLD_SIZE', 1)
        self.torch_device = self.find(options.device)
        self.cuda = self.torch_device.type == 'cuda'
        torch.set_float32_matmul_precision('high')  # TF32 where there is any
        # cuDNN's attention makes a new plan for every length, and each generated token is a new
        # length; the flash kernels that remain need no plan
        torch.backends.cuda.enable_cudnn_sdp(False)
        if self.cuda:
            torch.cuda.set_device(self.torch_device)
        if self.world > 1:
            self.connect()
        self.bf16 = options.dtype == 'bfloat16'
        if options.dtype == 'auto' and self.cuda:
            self.bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        elif options.dtype == 'auto' and self.torch_device.type == 'cpu' and trains:
            votes, = self.total(bfloat16_is_faster())
            self.bf16 = votes > self.world / 2
        self.precision = torch.bfloat16 if self.bf16 else torch.float32

    def find(self, option):
        """The torch device of the option `device`."""
        name = option
        if option == 'auto':
            mps = torch.backends.mps.is_available()
            name = 'cuda' if torch.cuda.is_available() else 'mps' if mps else 'cpu'
            if name == 'cpu' and self.world > 1 and NVIDIA_DRIVER.exists():
                raise UserError(f'{self.world} processes would share the CPU, because torch '
                                f'{torch.__version__} cannot use the NVIDIA GPU that is here: '
                                'update its driver, install a build of torch that fits it, or '
                                'use --device=cpu')
        if name == 'meta':
            raise UserError('--device=meta: computes nothing; use --dry_run=True to see sizes')
        try:
            found = torch.device(f'cuda:{self.local_rank}' if name == 'cuda' else name)
            torch.empty(1, device=found)
        except (RuntimeError, AssertionError, ImportError) as error:
            raise UserError(f'--device={option}: {str(error).splitlines()[0]}') from None
        return found

    def connect(self):
        """Joins the other processes. Besides the group for gradients there are two groups over
        gloo, which never wait for a GPU: `control` for flags and clocks, and `preparing`, which
        waits for as long as preparing data takes."""
        patience = timedelta(minutes=10)
        store, _, _ = next(dist.rendezvous('env://', timeout=patience))
        if os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True':
            # the store outlives a restart, with the addresses of dead processes in it
            store = dist.PrefixStore(os.environ['TORCHELASTIC_RESTART_COUNT'], store)
        backend = 'nccl' if self.cuda else 'gloo'
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.world,
                                timeout=patience)
        self.preparing = dist.new_group(backend='gloo', timeout=timedelta(days=2))
        self.control = dist.new_group(backend='gloo', timeout=patience)

    @property
    def first(self):
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def wait(self):
        """Waits until all processes are here, however long one of them prepares data."""
        if self.world > 1:
            dist.barrier(group=self.preparing)

    def total(self, *values):
        """Each number summed over the processes."""
        tensor = torch.tensor(values, dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(tensor, group=self.control)
        return tensor.tolist()

    def put(self, batch):
        """The tensors of a batch on the device."""
        if self.cuda:  # from pinned memory, so that nothing waits for the copy
            return [tensor.pin_memory().to(self.torch_device, non_blocking=True)
                    for tensor in batch]
        return [tensor.to(self.torch_device) for tensor in batch]

    def autocast(self):
        if self.bf16:
            return torch.autocast(self.torch_device.type, torch.bfloat16)
        return contextlib.nullcontext()

    def check_compiler(self):
        """Raises UserError if something that torch.compile needs is not installed."""
        variable, names = 'CXX', ['clang++' if sys.platform == 'darwin' else 'g++']
        if self.cuda:  # Triton compiles a piece of C that starts its kernels
            variable, names = 'CC', ['gcc', 'clang']
        names = [os.environ[variable]] if variable in os.environ else names
        header = Path(sysconfig.get_path('include'), 'Python.h')
        if not any(map(shutil.which, names)):
            raise UserError(f'torch.compile needs a compiler and there is no {" or ".join(names)}: '
                            f'install it, set {variable}, or use --compile=False')
        if not header.exists():
            raise UserError(f'torch.compile needs {header}, which is not there: install the '
                            "headers of python (Debian's package is python3-dev), or use "
                            '--compile=False')

    def describe(self):
        """The device in words."""
        if self.cuda:
            return torch.cuda.get_device_name(self.torch_device)
        return f'{self.torch_device.type} ({os.cpu_count()} cores)'

    def memory_gb(self):
        """The peak memory of this process in GB: of its GPU if it has one, else of the machine."""
        if self.cuda:
            return torch.cuda.max_memory_allocated(self.torch_device) / 2 ** 30
        units_per_gb = 2 ** 30 if sys.platform == 'darwin' else 2 ** 20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / units_per_gb

    def mfu(self, flops_per_second):
        """Model FLOPs utilisation: the share of peak FLOP/s that all processes together reach, or
        None if the peak is not known."""
        name = self.describe()
        peak = next((peak for gpu, peak in PEAK_BF16.items() if gpu in name), None)
        return flops_per_second / self.world / peak if peak and self.bf16 else None


def bfloat16_is_faster():
    """Whether this CPU multiplies bfloat16 matrices at least 1.5 times as fast as float32 ones.
    CPUs with instructions for it are 2 to 8 times as fast; others emulate it."""
    def seconds(dtype):
        a, b = torch.ones(2, 512, 512, dtype=dtype)
        times = timeit.repeat(lambda: torch.mm(a, b), timer=time.perf_counter, repeat=8, number=1)
        return min(times)  # the first ones warm up

    return 1.5 * seconds(torch.bfloat16) <= seconds(torch.float32)


def number_from_environment(name, default):
    """What torchrun says about this process in its environment."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UserError(f'{name}={text} in the environment: must be the number that torchrun sets; '
                        'unset it to train in one process')
    return int(text)


# --------------------------------------------------------------------------------------------------
# checkpoints


def write_whole(path, write):
    """Lets write(file) fill a temporary file, flushes it to the disk and renames it, so that `path`
    is the old or the new file at any moment. Raises UserError if that fails."""
    partial = path.with_name(f'{path.name}.partial')
    try:
        with open(partial, 'wb') as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of a full disk
        partial.unlink(missing_ok=True)
        raise UserError(f'{path}: cannot be written ({error}); what was there before is '
                        'kept') from None


def save_text(path, text):
    """Writes a text file, as utf-8, whole or not at all."""
    write_whole(path, lambda file: file.write(text.encode()))


def save_checkpoint(path, state):
    """Writes a checkpoint whole or not at all."""
    write_whole(path, lambda file: torch.save(state | dict(format=FORMAT), file))


def load_checkpoint(path):
    """A checkpoint as a dict of tensors and plain values. Its checksums are verified, and nothing
    in it is executed. path: from best_checkpoint. Raises UserError if it is missing, damaged, or
    something else."""
    if Path(path).is_dir():
        return state_of_folder(path)
    if not Path(path).is_file():
        raise UserError(f'{path}: there is no such checkpoint: name the folder of a run of '
                        'train.py, out/quick for instance, or one that holds a DeepSeek-V3 in the '
                        'layout of transformers, with its weights as safetensors')
    try:
        with zipfile.ZipFile(path) as file:
            if broken := file.testzip():
                raise zipfile.BadZipFile(f'bad checksum in {broken}')
        state = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # torch raises many kinds, also for a pickle that would run code
        raise UserError(f'{path}: damaged, or no checkpoint of train.py ({str(error):.60}): use '
                        'another one') from None
    check_format(state, path)
    return state


def check_format(content, path):
    """Raises UserError if a checkpoint, or run.json, is of another version."""
    found = content.get('format') if isinstance(content, dict) else None
    if found != FORMAT:
        raise UserError(f'{path}: was not written by this version (format {found}, not {FORMAT}): '
                        'make it again, or use the version that wrote it')


def state_of_folder(folder):
    """What load_checkpoint returns for a folder with a DeepSeek-V3 in the layout of transformers.
    `model` is a Checkpoint, from which load_weights reads one tensor at a time."""
    checkpoint = Checkpoint(folder)
    try:
        model_config = make_config('transformer', **options_of_deepseek(checkpoint.config))
    except ConfigError as error:
        raise UserError(f'{folder}/config.json: {error}') from None
    options = dict(arch='transformer', tokenizer='given') | model_config.options()
    return dict(model=checkpoint, options=options, step=0, provenance={})


def best_checkpoint(folder):
    """Path of the checkpoint that stands for a run: the best one, or the latest if the run stopped
    before its first evaluation. A folder of safetensors is a checkpoint itself."""
    best, latest = Path(folder) / 'ckpt_best.pt', Path(folder) / 'ckpt.pt'
    if not (best.exists() or latest.exists()) and any(Path(folder).glob('*.safetensors*')):
        return Path(folder)
    return best if best.exists() else latest


def model_options_of(flat):
    """The options of the model among all options of a run, both flat dicts."""
    names = option_names(flat['arch'])
    return {name: value for name, value in flat.items() if name in names}


def build(arch, model_options, make=make_model):
    """make_model, or make_config, for options that a user chose: contradictions are a UserError."""
    try:
        return make(arch, **model_options)
    except ConfigError as error:
        raise UserError(str(error)) from None


def load_weights(model, state, path):
    """Loads the weights of a checkpoint, read from path, into a model. Raises UserError, which
    names the difference, if the model is another. Dropout may differ, and so may block_size if no
    weight depends on it."""
    for name, value in model.config.options().items():
        saved = state['options'].get(name, value)
        if saved != value and name not in ('dropout', 'attention_dropout', 'block_size'):
            raise UserError(f'{path}: another architecture: it was trained with {name}={saved}, '
                            f'not {value}')
    try:
        if isinstance(state['model'], Checkpoint):
            load_deepseek(model, state['model'], state['model'].config)
        else:
            model.load_state_dict(state['model'])
    except ConfigError as error:
        raise UserError(f'{path}: {error}') from None
    except RuntimeError as error:  # torch names each tensor in a line of its own
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f'{path}: another architecture: {reason}') from None
    for name, weight in model.state_dict().items():
        if not weight.isfinite().all():
            raise UserError(f'{path}: {name} holds numbers that are not finite: use another '
                            'checkpoint')


def load_run(folder, device='cpu'):
    """(model, tokenizer, options) of a run folder: its best model in evaluation mode and its
    options as a flat dict. The folder may also hold a DeepSeek-V3 in the layout of transformers.
    Raises UserError if it holds no run, or parts of two."""
    path = best_checkpoint(folder)
    state = load_checkpoint(path)
    model = build(state['options']['arch'], model_options_of(state['options']))
    load_weights(model, state, path)
    tokenizer = load_tokenizer(folder, state, model.config, path, 'copy both from one run')
    return model.to(device).eval(), tokenizer, state['options']


def load_tokenizer(folder, state, model_config, path, remedy):
    """The tokenizer of a run folder. Raises UserError, which ends in the remedy, if the checkpoint
    `state`, read from path, was trained with another one."""
    file = Path(folder) / 'tokenizer.json'
    tokenizer = Tokenizer.load(file)
    digest, needed = tokenizer.digest(), tokenizer.ids_needed(model_config.causal)
    trained_with = state['provenance'].get('tokenizer', digest)  # others' checkpoints do not say
    if trained_with != digest or model_config.vocab_size < needed:
        raise UserError(f'{file}: another tokenizer than {path.name} was trained with: {remedy}')
    return tokenizer


def export(model, tokenizer, folder):
    """Writes a model and its tokenizer into a new folder in the layout of transformers, whole or
    not at all. Raises UserError for what that layout cannot hold."""
    folder = Path(folder).resolve()
    partial = folder.with_name(f'{folder.name}.partial')
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f'{folder}: is there already, and not empty: export into a new folder')
    if partial.exists():
        raise UserError(f'{partial}: another export is writing there, or was cut off: remove it')
    try:
        weights, hf_config = to_deepseek(model)
        eot = dict(bos_token_id=tokenizer.eot, eos_token_id=tokenizer.eot)
        partial.mkdir(parents=True)
        write_checkpoint(partial, weights, hf_config | eot)
        for name, content in tokenizer.library_files(model.config.vocab_size).items():
            (partial / name).write_text(content, 'utf-8')
        partial.rename(folder)
    except ConfigError as error:
        raise UserError(f'cannot be exported: {error}') from None
    except (OSError, SafetensorError) as error:
        raise UserError(f'{folder}: cannot be written ({error})') from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def provenance(device, meta, tokenizer):
    """Where a checkpoint comes from. meta: the content of the data's meta.json."""
    git = shutil.which('git')
    commit = git and subprocess.run([git, 'rev-parse', 'HEAD'], cwd=Path(__file__).parent,
                                    capture_output=True, text=True).stdout.strip()
    return dict(command=' '.join(sys.argv), commit=commit or 'unknown', data_sha256=meta['sha256'],
                tokenizer=tokenizer.digest(), device=device.describe(), processes=device.world,
                python=platform.python_version(), torch=str(torch.__version__),
                numpy=np.__version__)


# --------------------------------------------------------------------------------------------------
# folder and log


class Run:
    """The folder of a training run: options, tokenizer, metrics, checkpoints. Only the first
    process writes."""

    def __init__(self, folder, flat, stats, tokenizer, writes, checkpoint=None, wandb_project=None):
        """flat: all options. stats: sizes of the model and provenance, for run.json and the
        checkpoints. checkpoint: the one to go on from; if None, an earlier run in this folder is
        moved out of the way. wandb_project: None = no Weights & Biases."""
        self.folder, self.flat, self.stats = Path(folder), flat, stats
        self.writes, self.wandb = writes, None
        if not writes:
            return
        self.make_folder(tokenizer, checkpoint)
        if wandb_project:  # a resumed run goes on in its own run there
            run_id = checkpoint and checkpoint['provenance'].get('wandb_id')
            self.wandb = open_wandb(wandb_project, self.folder.name, self.folder, flat | stats,
                                    run_id)
            self.stats = stats | dict(wandb_id=self.wandb.id)
        facts = self.stats | dict(format=FORMAT)
        save_text(self.folder / 'run.json', json.dumps(facts, indent=2) + '\n')

    def make_folder(self, tokenizer, checkpoint):
        folder, latest, lines = self.folder, self.folder / 'ckpt.pt', []
        if best_checkpoint(folder).is_dir():
            raise UserError(f'{folder}: holds a checkpoint in the layout of transformers, and a '
                            'run would replace its config.json: set --out_dir')
        if checkpoint:  # what was logged after the checkpoint will be logged again
            lines = [line for line in config.read_json_lines(folder / 'metrics.jsonl')
                     if line['step'] <= checkpoint['step']]
        elif latest.exists():
            date = date_of(latest, lambda date: Path(f'{folder}-{date}').exists())
            aside = folder.rename(f'{folder}-{date}')
            print(f'{folder} holds an earlier run: renamed to {aside}')
        folder.mkdir(parents=True, exist_ok=True)
        save_text(folder / 'metrics.jsonl', ''.join(json.dumps(line) + '\n' for line in lines))
        save_text(folder / 'config.json', json.dumps(self.flat, indent=2) + '\n')
        tokenizer.save(folder / 'tokenizer.json')

    def log(self, text):
        if self.writes:
            print(text, flush=True)

    def record(self, **line):
        """Adds a line to metrics.jsonl, and to Weights & Biases."""
        if self.writes:
            log_line(self.folder / 'metrics.jsonl', self.wandb, line)

    def save(self, name, state):
        """Saves a checkpoint: the state, the options, and where it comes from."""
        if self.writes:
            save_checkpoint(self.folder / name,
                            state | dict(options=self.flat, provenance=self.stats))

    def close(self):
        if self.writes:
            lines = config.read_json_lines(self.folder / 'metrics.jsonl')
            plot_losses(self.folder, lines)
            plot_expert_shares(self.folder, lines)
        if self.wandb:
            self.wandb.finish()


def date_of(path, taken):
    """The date of a file, to name what is set aside; with a number if taken(date) says that the
    name is in use."""
    date = datetime.fromtimestamp(path.stat().st_mtime).strftime('%Y%m%d-%H%M%S')
    names = itertools.chain([date], (f'{date}-{i}' for i in itertools.count(2)))
    return next(name for name in names if not taken(name))


def open_wandb(project, name, folder, values, run_id=None):
    """A run of Weights & Biases: a new one, or the one with this id, which goes on."""
    import wandb
    try:
        return wandb.init(project=project, name=name, dir=folder, config=values, id=run_id,
                          resume='allow' if run_id else None)
    except wandb.errors.Error as error:
        raise UserError(f'--wandb=True: {error}: log in with `wandb login`, or set '
                        'WANDB_MODE=offline') from None


def log_line(path, wandb_run, line):
    """Appends a dict of numbers to a jsonl file, and sends it to wandb if there is a run."""
    with open(path, 'a') as file:
        file.write(json.dumps(line) + '\n')
    if wandb_run:
        wandb_run.log(line, step=line['step'])


def describe(scores):
    """A dict of scores in a line of text."""
    return ', '.join(f'{name.removeprefix("val_").replace("_", " ")} {value:.4f}'
                     for name, value in scores.items())


# --------------------------------------------------------------------------------------------------
# intervals and plots


def mean_and_interval(values):
    """The mean of a few repetitions and half its 95% interval by Student's t, or None instead of
    the interval if there is one value."""
    n = len(values)
    if n == 1:
        return values[0], None
    # 0.975 quantiles of t for 1, 2, ... degrees of freedom; beyond the table an expansion in 1/df
    # is good to a thousandth
    table = 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228
    df = n - 1
    t = table[df - 1] if df <= len(table) else 1.960 + 2.372 / df + 2.82 / df ** 2
    return statistics.mean(values), t * statistics.stdev(values) / math.sqrt(n)


def pyplot():
    """matplotlib.pyplot for files. Importing it takes a second, so only who plots does."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    plt.rcParams['text.parse_math'] = False  # a $ in the name of a folder is a $
    return plt


def save_figure(figure, path):
    """Writes a figure as png, whole or not at all, and closes it."""
    write_whole(path, lambda file: figure.savefig(file, dpi=120, format='png'))
    pyplot().close(figure)


def plot_losses(folder, lines):
    """Draws training and validation loss over the steps into RUN/loss.png. lines: of
    metrics.jsonl."""
    # if the training loss has further terms, its cross-entropy compares with the validation loss
    terms = any('train_cross_entropy' in line for line in lines)
    train = 'train_cross_entropy' if terms else 'train_loss'
    styles = {train: dict(linewidth=0.8, alpha=0.6), 'val_loss': dict(marker='o', markersize=3),
              'train_eval_loss': dict(marker='o', markersize=2, linewidth=0.8)}
    figure, axes = pyplot().subplots(figsize=(7, 4.5), layout='constrained')
    for key, style in styles.items():
        points = [(line['step'], line[key]) for line in lines if key in line]
        axes.plot(*zip(*points), label=key.replace('_', ' '), **style)
    if sum('val_loss' in line for line in lines) > 4:
        # the first tenth of the steps, many times as high, would flatten the rest
        later = [line[key] for line in lines if line['step'] > lines[-1]['step'] / 10
                 for key in styles if key in line]
        margin = 0.05 * (max(later) - min(later)) + 0.01
        axes.set_ylim(min(later) - margin, max(later) + margin)
    axes.set(xlabel='step', ylabel='loss (nats)', title=folder.name)
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, folder / 'loss.png')


def plot_expert_shares(folder, lines):
    """Draws the load of each expert in each layer over the steps into RUN/experts.png: its share of
    the tokens, divided by the mean share. lines: of metrics.jsonl."""
    lines = [line for line in lines if line.get('expert_shares')]
    if not lines:
        return
    shares = np.array([line['expert_shares'] for line in lines])  # (reports, layers, experts)
    n_layers, n_experts = shares.shape[1:]
    figure, axes = pyplot().subplots(figsize=(7, 1.5 + n_layers), layout='constrained')
    image = axes.imshow(shares.reshape(len(lines), -1).T * n_experts, aspect='auto', cmap='RdBu_r',
                        vmin=0, vmax=2, interpolation='nearest',
                        extent=(lines[0]['step'], lines[-1]['step'], n_layers + 0.5, 0.5))
    axes.hlines(np.arange(1.5, n_layers), *axes.get_xlim(), 'black', linewidth=0.5)
    axes.set(xlabel='step', ylabel='layer with experts, a row per expert', title=folder.name,
             yticks=range(1, n_layers + 1))
    figure.colorbar(image, label='tokens per expert, 1 = the mean')
    save_figure(figure, folder / 'experts.png')
