"""A run: its device, its folder, its checkpoints and its log. train.py writes runs; the other
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
import zipfile
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError

from config import UserError
from deepseek import (Checkpoint, load_deepseek, options_of_deepseek, to_deepseek,
                      write_checkpoint)
from model import ConfigError, Range, flat_options, make_config, make_model, option_names
from prepare import Tokenizer

# bfloat16 matrix products of a GPU, dense FLOP/s, from the vendor's data sheets. The first name
# that is part of the card's counts: an H100 in a PCIe slot is slower than one on an SXM board.
PEAK_BF16 = {'A100': 312e12, 'H100 PCIe': 756e12, 'H100 NVL': 835e12, 'H100': 989e12,
             'H200 NVL': 835e12, 'H200': 989e12, 'L40S': 362e12}

# what the config.json of a checkpoint in DeepSeek-V3's layout calls it
DEEPSEEK_TYPES = 'deepseek_v3', 'kimi_k2'

NVIDIA_DRIVER = Path('/dev/nvidiactl')  # exists where there is one, whether torch can use it or not

Seed = Annotated[int, Range(least=0, below=2 ** 63)]


# --------------------------------------------------------------------------------------------------
# device


@dataclass
class MachineOptions:
    """Machine"""

    device: str = 'auto'  # auto (cuda, else mps, else cpu) or a torch device
    dtype: Literal['auto', 'float32', 'bfloat16'] = 'auto'  # auto: bfloat16 where it is faster
    seed: Seed = 1337  # of weights, order of the data, masks and dropout


class Machine:
    """Where this process runs: its device and precision, and its place among the processes that
    torchrun has started."""

    def __init__(self, options, trains=True):
        """options: MachineOptions. trains: whether it is to train. If not, a CPU takes float32
        unless the options say otherwise: the small products of a single token gain nothing by
        bfloat16. Raises UserError if there is no such device."""
        self.rank = number_from_environment('RANK', 0)
        self.local_rank = number_from_environment('LOCAL_RANK', 0)
        self.world = number_from_environment('WORLD_SIZE', 1)
        name = options.device
        if name == 'auto':
            mps = torch.backends.mps.is_available()
            name = 'cuda' if torch.cuda.is_available() else 'mps' if mps else 'cpu'
            if name == 'cpu' and self.world > 1 and NVIDIA_DRIVER.exists():
                raise UserError(f'{self.world} processes would share the CPU, because torch '
                                f'{torch.__version__} cannot use the NVIDIA GPU that is here: '
                                'update its driver, install a build of torch that fits it, or '
                                'use --device=cpu')
        try:
            self.device = torch.device(f'cuda:{self.local_rank}' if name == 'cuda' else name)
            torch.empty(1, device=self.device)
        except (RuntimeError, AssertionError, ImportError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f'--device={options.device}: {reason}') from None
        if self.device.type == 'meta':
            raise UserError('--device=meta: computes nothing; use --dry_run=True to see sizes')
        self.cuda = self.device.type == 'cuda'
        torch.set_float32_matmul_precision('high')  # TF32 where there is any
        # cuDNN's attention plans anew for every length that it meets, and generation has a new
        # length at every token; the flash kernels that remain need no plan
        torch.backends.cuda.enable_cudnn_sdp(False)
        if self.cuda:
            torch.cuda.set_device(self.device)
        if self.world > 1:
            self.connect()
        self.bf16 = options.dtype == 'bfloat16'
        if options.dtype == 'auto' and self.cuda:
            self.bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        elif options.dtype == 'auto' and self.device.type == 'cpu' and trains:
            votes, = self.total(bfloat16_is_faster())
            self.bf16 = votes > self.world / 2
        self.precision = torch.bfloat16 if self.bf16 else torch.float32

    def connect(self):
        """Joins the other processes. Besides the group for gradients there are two over gloo, which
        never wait for a GPU: one for flags and clocks, a patient one for preparing data."""
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
        """The tensors of a batch on the device; to a GPU from pinned memory, so that nothing waits
        for the copy."""
        if self.cuda:
            return [tensor.pin_memory().to(self.device, non_blocking=True) for tensor in batch]
        return [tensor.to(self.device) for tensor in batch]

    def autocast(self):
        if self.bf16:
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    def check_compiler(self):
        """Raises UserError if torch.compile lacks something here."""
        if self.cuda:  # Triton compiles a piece of C that starts its kernels
            language, variable, names = 'C', 'CC', ('gcc', 'clang')
        else:
            language, variable = 'C++', 'CXX'
            names = ('clang++',) if sys.platform == 'darwin' else ('g++',)
        if variable in os.environ:
            names = os.environ[variable],
        if not any(map(shutil.which, names)):
            raise UserError(f'torch.compile needs a {language} compiler and there is no '
                            f'{" or ".join(names)}: install it, set {variable}, or use '
                            '--compile=False')
        header = Path(sysconfig.get_path('include'), 'Python.h')
        if not header.exists():
            raise UserError(f'torch.compile needs {header}, which is not there: install the '
                            "headers of python (Debian's package is python3-dev), or use "
                            '--compile=False')

    def describe(self):
        """The device in words."""
        if self.cuda:
            return torch.cuda.get_device_name(self.device)
        return f'{self.device.type} ({os.cpu_count()} cores)'

    def memory_gb(self):
        """The most memory that this process has taken so far: of its GPU if it has one, else in
        all."""
        if self.cuda:
            return torch.cuda.max_memory_allocated(self.device) / 2 ** 30
        unit = 2 ** 30 if sys.platform == 'darwin' else 2 ** 20  # of ru_maxrss in a GB
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit

    def mfu(self, flops_per_second):
        """Model FLOPs utilisation, the share of the peak that all processes together reach; None
        where the peak is not known."""
        name = self.describe()
        peak = next((peak for gpu, peak in PEAK_BF16.items() if gpu in name), None)
        return flops_per_second / self.world / peak if peak and self.bf16 else None


def bfloat16_is_faster():
    """Whether this CPU multiplies matrices of bfloat16 at least 1.5 times as fast as of float32.
    Those with units for it do so 2 to 8 times as fast; others emulate it."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(2, 512, 512, dtype=dtype)
        times = []
        for _ in range(8):  # the first ones prepare
            start = time.perf_counter()
            torch.mm(a, b)
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    return seconds[torch.bfloat16] * 1.5 <= seconds[torch.float32]


def number_from_environment(name, default):
    """What torchrun says about this process in its environment."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UserError(f'{name}={text} in the environment: torchrun sets it to a number; unset it '
                        'to train in one process')
    return int(text)


# --------------------------------------------------------------------------------------------------
# checkpoints


def write_whole(path, write):
    """Lets write(file) fill a temporary file, flushes it to the disk and renames it: at any moment
    `path` is the old or the new file. Raises UserError if that fails."""
    partial = path.with_name(f'{path.name}.partial')
    try:
        with open(partial, 'wb') as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise UserError(f'{path}: cannot be written ({error}); what was there before is '
                        'kept') from None


def save_checkpoint(path, state):
    """Writes a checkpoint whole or not at all."""
    write_whole(path, lambda file: torch.save(state, file))


def load_checkpoint(path):
    """A checkpoint as a dict of tensors and plain values. Its checksums are verified, and nothing
    in it is executed. path: what best_checkpoint returns. Raises UserError if it is missing,
    damaged, or something else."""
    if Path(path).is_dir():
        return state_of_folder(path)
    if not Path(path).is_file():
        raise UserError(f'{path}: there is no such checkpoint: name the folder of a run of '
                        'train.py, out/quick for instance, or one that holds a DeepSeek-V3 in the '
                        'layout of transformers, with its weights as safetensors')
    try:
        with zipfile.ZipFile(path) as file:
            broken = file.testzip()
        if broken:
            raise zipfile.BadZipFile(f'bad checksum in {broken}')
        state = torch.load(path, map_location='cpu', weights_only=True)
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise UserError(f'{path}: truncated or damaged ({error}): restore it, or use another '
                        'checkpoint') from None
    except Exception as error:  # another zip file, or a pickle that would run code
        raise UserError(f'{path}: no checkpoint of train.py ({type(error).__name__})') from None
    kinds = dict(model=dict, options=dict, step=int, provenance=dict)
    state = dict(provenance={}) | state if isinstance(state, dict) else {}  # older ones have none
    if not all(isinstance(state.get(name), kind) for name, kind in kinds.items()):
        raise UserError(f'{path}: no checkpoint of train.py (which holds {", ".join(kinds)})')
    return state


def state_of_folder(folder):
    """What load_checkpoint returns of a folder that holds a DeepSeek-V3 in the layout of
    transformers. `model` is the Checkpoint, of which load_weights reads one tensor at a time."""
    checkpoint = Checkpoint(folder)
    kind = checkpoint.config.get('model_type')
    if kind not in DEEPSEEK_TYPES:
        raise UserError(f'{folder}: its layout is {kind!r:.40} (model_type in config.json), and '
                        "only that of DeepSeek-V3 can be trained here; svd.py and "
                        'add_output_latent take others too')
    try:
        model_config = make_config('transformer', **options_of_deepseek(checkpoint.config))
    except ConfigError as error:
        raise UserError(f'{folder}/config.json: {error}') from None
    options = dict(arch='transformer', tokenizer='given') | flat_options(model_config)
    return dict(model=checkpoint, options=options, step=0, provenance={})


def best_checkpoint(folder):
    """The checkpoint that speaks for a run: the best one, or if the run was stopped before its
    first evaluation the latest. A folder of safetensors is a checkpoint itself."""
    best, latest = Path(folder) / 'ckpt_best.pt', Path(folder) / 'ckpt.pt'
    if not (best.exists() or latest.exists()) and any(Path(folder).glob('*.safetensors*')):
        return Path(folder)
    return best if best.exists() else latest


def model_options_of(flat):
    """Of a flat dict of options, as a checkpoint has it, those of the model. Options that its
    architecture does not have are left out: earlier versions saved some that it could not use."""
    names = option_names(flat['arch'])
    return {name: value for name, value in flat.items() if name in names}


def build(arch, model_options, make=make_model):
    """make_model, or make_config, for options that a user chose: contradictions are a UserError."""
    try:
        return make(arch, **model_options)
    except ConfigError as error:
        raise UserError(str(error)) from None


# In earlier versions projections of one input shared a matrix: {its name: whose rows it holds}.
FUSED = {
    'qkv_proj': ('q_proj', 'k_proj', 'v_proj'),
    'kv_proj': ('k_proj', 'v_proj'),
    'qkv_a_proj': ('q_a_proj', 'q_proj', 'kv_a_proj', 'k_rope_proj'),
    'q_a_proj': ('q_a_proj', 'q_proj'),
    'kv_a_proj': ('kv_a_proj', 'k_rope_proj'),
    'kv_b_proj': ('k_b_proj', 'v_b_proj'),
}


def split_fused(weights, model):
    """A state dict in which projections may share a matrix -> one with a matrix for each, as the
    model has them. One that has them already stays as it is."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    split = {}
    for name, weight in weights.items():
        *path, layer, kind = name.split('.')
        names = ['.'.join([*path, part, kind]) for part in FUSED.get(layer, ())]
        names = [part for part in names if part in shapes]
        dim = -1 if kind == 'bias' else -2  # channels come before the rows
        sizes = [shapes[part][dim] for part in names]
        if names and sum(sizes) == weight.size(dim):
            split |= dict(zip(names, weight.split(sizes, dim)))
        else:
            split[name] = weight
    return split


def load_weights(model, state, path):
    """The weights of a checkpoint into a model. Raises UserError, which names what differs, if it
    is another architecture. Dropout may differ, and block_size where no weight depends on it."""
    for name, value in flat_options(model.config).items():
        saved = state['options'].get(name, value)
        if saved != value and name not in ('dropout', 'attention_dropout', 'block_size'):
            raise UserError(f'{path}: another architecture: it was trained with {name}={saved}, '
                            f'not {value}')
    try:
        if isinstance(state['model'], Checkpoint):
            load_deepseek(model, state['model'], state['model'].config)
        else:
            model.load_state_dict(split_fused(state['model'], model))
    except ConfigError as error:
        raise UserError(f'{path}: {error}') from None
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f'{path}: another architecture: {reason}') from None
    for name, weight in model.state_dict().items():
        if not weight.isfinite().all():
            raise UserError(f'{path}: {name} holds numbers that are not finite: use another '
                            'checkpoint')


def load_run(folder, device='cpu'):
    """(model, tokenizer, options) of a run folder: its best model in evaluation mode, and its
    options as a flat dict; or of a folder with a DeepSeek-V3 in the layout of transformers. Raises
    UserError if the folder holds no run, or parts of two."""
    path = best_checkpoint(folder)
    state = load_checkpoint(path)
    model = build(state['options']['arch'], model_options_of(state['options']))
    load_weights(model, state, path)
    tokenizer = load_tokenizer(folder, state, model.config, path, 'copy both from one run')
    return model.to(device).eval(), tokenizer, state['options']


def load_tokenizer(folder, state, model_config, path, remedy):
    """The tokenizer of a run folder, if it is the one that the checkpoint `state`, read from path,
    was trained with. Raises UserError, which ends in the remedy, if it is another."""
    file = Path(folder) / 'tokenizer.json'
    tokenizer = Tokenizer.load(file)
    digest, needed = tokenizer.digest(), tokenizer.ids_needed(model_config.block.causal)
    trained_with = state['provenance'].get('tokenizer', digest)  # older runs do not say
    if trained_with != digest or model_config.vocab_size < needed:
        raise UserError(f'{file}: another tokenizer than {path.name} was trained with: {remedy}')
    return tokenizer


def export(model, tokenizer, folder):
    """Writes a model and its tokenizer into a new folder in the layout of transformers, whole or
    not at all. Raises UserError on what that layout cannot hold."""
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


def provenance(machine, meta, tokenizer):
    """Where a checkpoint comes from. meta: what meta.json says of the data."""
    git = shutil.which('git')
    commit = git and subprocess.run([git, 'rev-parse', 'HEAD'], cwd=Path(__file__).parent,
                                    capture_output=True, text=True).stdout.strip()
    return dict(command=' '.join(sys.argv), commit=commit or 'unknown', data_sha256=meta['sha256'],
                tokenizer=tokenizer.digest(), device=machine.describe(), processes=machine.world,
                python=platform.python_version(), torch=str(torch.__version__),
                numpy=np.__version__)


# --------------------------------------------------------------------------------------------------
# folder and log


class Run:
    """What a training run writes into its folder: options, tokenizer, metrics, checkpoints. Of
    several processes only the first one writes."""

    def __init__(self, folder, flat, facts, origin, tokenizer, machine, resumed_step=None,
                 wandb_project=None):
        """flat: all options. facts: what else there is to know of the model, for run.json. origin:
        from `provenance`. resumed_step: of the checkpoint to go on from; if None, an earlier run in
        this folder is moved out of the way. wandb_project: None = no Weights & Biases."""
        self.folder, self.flat, self.origin = Path(folder), flat, origin
        self.writes, self.wandb = machine.first, None
        if self.writes:
            earlier = read_facts(folder) if resumed_step is not None else {}
            self.make_folder(tokenizer, resumed_step)
            facts = facts | origin
            if wandb_project:  # a resumed run goes on in its own run there
                self.wandb = open_wandb(wandb_project, self.folder.name, self.folder, flat | facts,
                                        earlier.get('wandb_id'))
                facts['wandb_id'] = self.wandb.id
            save_text(self.folder / 'run.json', json.dumps(facts, indent=2) + '\n')

    def make_folder(self, tokenizer, resumed_step):
        folder, latest = self.folder, self.folder / 'ckpt.pt'
        if best_checkpoint(folder).is_dir():
            raise UserError(f'{folder}: holds a checkpoint in the layout of transformers, whose '
                            'config.json a run would replace: set --out_dir')
        try:
            if resumed_step is None and latest.exists():
                date = date_of(latest, lambda date: Path(f'{folder}-{date}').exists())
                aside = folder.rename(f'{folder}-{date}')
                print(f'{folder} holds an earlier run: renamed to {aside}')
            folder.mkdir(parents=True, exist_ok=True)
            # what was logged after the checkpoint will be logged again
            lines = [] if resumed_step is None else read_metrics(folder)
            kept = (json.dumps(line) + '\n' for line in lines if line['step'] <= resumed_step)
            save_text(folder / 'metrics.jsonl', ''.join(kept))
            save_text(folder / 'config.json', json.dumps(self.flat, indent=2) + '\n')
            tokenizer.save(folder / 'tokenizer.json')
        except OSError as error:
            raise UserError(f'{folder}: cannot be used as a run folder ({error})') from None

    def say(self, text):
        if self.writes:
            print(text, flush=True)

    def record(self, **line):
        """Adds a line to metrics.jsonl, and to Weights & Biases."""
        if self.writes:
            log_line(self.folder / 'metrics.jsonl', self.wandb, line)

    def save(self, name, state):
        """Saves a checkpoint: the state, how it came about, and where from."""
        if self.writes:
            save_checkpoint(self.folder / name,
                            state | dict(options=self.flat, provenance=self.origin))

    def close(self):
        if self.writes:
            plot_losses(self.folder)
            plot_expert_shares(self.folder)
        if self.wandb:
            self.wandb.finish()


def date_of(path, taken):
    """The date of a file, for the name of what is set aside. A number is added while taken(date)
    says that the name is in use."""
    date = datetime.fromtimestamp(path.stat().st_mtime).strftime('%Y%m%d-%H%M%S')
    names = itertools.chain([date], (f'{date}-{i}' for i in itertools.count(2)))
    return next(name for name in names if not taken(name))


def save_text(path, text):
    """Writes a text file, as utf-8, whole or not at all."""
    write_whole(path, lambda file: file.write(text.encode()))


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
    try:
        with open(path, 'a') as file:
            file.write(json.dumps(line) + '\n')
    except OSError as error:
        raise UserError(f'{path}: cannot be written ({error}); the last checkpoint '
                        'stands') from None
    if wandb_run:
        wandb_run.log(line, step=line['step'])


def read_metrics(folder):
    """The lines of metrics.jsonl as dicts, without one that a kill has cut off."""
    path, lines = Path(folder) / 'metrics.jsonl', []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines


def read_facts(folder):
    """What run.json says of a run; {} for a run of an earlier version, which has none."""
    try:
        return json.loads((Path(folder) / 'run.json').read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f'{folder}/run.json: cannot be read ({error}): remove it') from None


def describe(scores):
    """A dict of scores in a line of text."""
    return ', '.join(f'{name.removeprefix("val_").replace("_", " ")} {value:.4f}'
                     for name, value in scores.items())


# --------------------------------------------------------------------------------------------------
# intervals and plots


def mean_and_interval(values):
    """The mean of a few repetitions and half its 95% interval by Student's t; None instead of the
    interval where there is one value."""
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


def plot_losses(folder):
    """RUN/loss.png: training and validation loss over the steps. The axis of the losses is cut to
    what follows the first tenth of the steps: what comes before is many times as high."""
    plt, lines = pyplot(), read_metrics(folder)
    figure, axes = plt.subplots(figsize=(7, 4.5), layout='constrained')
    # if the training loss has further terms, its cross-entropy compares with the validation loss
    terms = any('train_cross_entropy' in line for line in lines)
    train = 'train_cross_entropy' if terms else 'train_loss'
    styles = {train: dict(linewidth=0.8, alpha=0.6), 'val_loss': dict(marker='o', markersize=3),
              'train_eval_loss': dict(marker='o', markersize=2, linewidth=0.8)}
    later = []  # losses after the first tenth
    for key, style in styles.items():
        points = [(line['step'], line[key]) for line in lines if key in line]
        if points:
            axes.plot(*zip(*points), label=key.replace('_', ' '), **style)
            later += [loss for step, loss in points if step > lines[-1]['step'] / 10]
    if later:
        margin = 0.05 * (max(later) - min(later)) + 0.01
        axes.set_ylim(min(later) - margin, max(later) + margin)
    axes.set(xlabel='step', ylabel='loss (nats)', title=folder.name)
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, folder / 'loss.png')


def plot_expert_shares(folder):
    """RUN/experts.png, if there are any: of each layer, how many times the mean of the tokens each
    expert had, over the steps."""
    lines = [line for line in read_metrics(folder) if line.get('expert_shares')]
    if not lines:
        return
    shares = np.array([line['expert_shares'] for line in lines])  # (reports, layers, experts)
    n_layers, n_experts = shares.shape[1:]
    figure, panels = pyplot().subplots(n_layers, sharex=True, figsize=(7, 1 + 1.2 * n_layers),
                                       layout='constrained', squeeze=False)
    for i, axes in enumerate(panels[:, 0]):
        image = axes.imshow(shares[:, i].T * n_experts, aspect='auto', cmap='RdBu_r',
                            vmin=0, vmax=2,
                            extent=(lines[0]['step'], lines[-1]['step'], n_experts - 0.5, -0.5),
                            interpolation='nearest')
        axes.set_ylabel(f'{i + 1}. layer\nof experts')
    panels[-1, 0].set_xlabel('step')
    figure.colorbar(image, ax=panels[:, 0], label='tokens of an expert, 1 = the mean')
    figure.suptitle(folder.name)
    save_figure(figure, folder / 'experts.png')
