"""A run: its device, its folder, its checkpoints and its log. train.py writes runs, and the other
scripts start from one."""

import fcntl
import json
import math
import os
import platform
import re
import resource
import shutil
import statistics
import subprocess
import sys
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from safetensors import SafetensorError
from torch.overrides import TorchFunctionMode

import config
from config import UserError
from deepseek import (Checkpoint, config_for_deepseek, is_finite, load_deepseek,
                      options_of_deepseek, to_deepseek, write_checkpoint)
from model import (ARCHITECTURES, ConfigError, CountOrZero, MoE, NotNegative, Range, make_config,
                   make_model, option_names)
from prepare import Tokenizer, partial_folder

ANOTHER = 'use another run'  # the remedy for a damaged one
FORMAT = 2  # of checkpoints and run.json; raise it when older ones can no longer be read

# dense bfloat16 FLOP/s, from data sheets; the first name that is part of a GPU's name counts
PEAK_BF16 = {'A100': 312e12, 'H100 PCIe': 756e12, 'H100 NVL': 835e12, 'H100': 989e12,
             'H200': 989e12}
Seed = Annotated[int, Range(least=0, below=2 ** 63)]
# types of what every checkpoint holds, what one to resume from also holds, and metrics.jsonl
CHECKPOINT = dict(model=dict | OrderedDict, options=dict, step=CountOrZero, provenance=dict)
RESUMABLE = dict(seconds=NotNegative, best=NotNegative | Literal[math.inf], optimizers=list)
METRICS = dict(step=CountOrZero, tokens=CountOrZero, seconds=NotNegative) | dict.fromkeys(
    ('tokens_per_second', 'memory_gb', 'train_loss', 'train_cross_entropy', 'train_eval_loss',
     'val_loss', 'val_masked_accuracy', 'val_bits_per_byte'), float | None)
# what a run, or another script in its folder, has written
OWN = re.compile(r'(ckpt(_best)?\.pt|(config|run|tokenizer|svd)\.json|(metrics|svd)\.jsonl|wandb|'
                 r'(loss|experts|layers|heads|spectra-\d+)\.png|sst2[-_.].*)(\.partial)?')


# --------------------------------------------------------------------------------------------------
# device


@dataclass
class DeviceOptions:
    """Device"""

    device: str = 'auto'  # auto (cuda, else mps, else cpu) or a torch device
    dtype: Literal['auto', 'float32', 'bfloat16'] = 'auto'  # auto: bfloat16 where it is faster


@dataclass
class WeightOptions(DeviceOptions):
    """Weights"""

    weights: Literal['float32', 'bfloat16'] = 'float32'  # stored precision of what is not trained

    def __post_init__(self):
        if self.weights == 'bfloat16':
            if self.dtype == 'float32':
                raise UserError('weights=bfloat16: computes in bfloat16 too, leave out --dtype')
            self.dtype = 'bfloat16'


class Device:
    """Where this process computes, in which precision, and its rank among the processes that
    torchrun started."""

    def __init__(self, options, trains=True):
        """options: DeviceOptions. trains: if False, dtype=auto is float32 on a CPU, because
        bfloat16 gains nothing for the small products of generation."""
        self.rank, self.local_rank, self.world = ranks()
        self.first = self.rank == 0  # the process that prints and writes
        name = options.device
        if name == 'auto':
            here = torch.accelerator.is_available()
            name = torch.accelerator.current_accelerator().type if here else 'cpu'
        try:
            self.torch_device = torch.device(f'cuda:{self.local_rank}' if name == 'cuda' else name)
            torch.zeros(1, device=self.torch_device).item()  # which `meta` does not compute
        except (RuntimeError, AssertionError, ImportError) as error:
            raise UserError(f'--device={options.device}: {str(error).splitlines()[0]}') from None
        self.cuda = self.torch_device.type == 'cuda'
        torch.set_float32_matmul_precision('high')  # TF32 where there is any
        # cuDNN's attention makes a new plan for every length, and each generated token is a new
        # length; the flash kernels that remain need no plan
        torch.backends.cuda.enable_cudnn_sdp(False)
        if self.cuda:
            torch.cuda.set_device(self.torch_device)
        if self.world > 1:
            try:
                store, _, _ = next(dist.rendezvous('env://'))
            except (ValueError, RuntimeError) as error:  # no such port, or it is in use
                raise UserError(f'MASTER_ADDR and MASTER_PORT: {error}'.split('\n')[0]) from None
            # torchrun's store outlives a restart, with the addresses of dead processes in it
            store = dist.PrefixStore(os.environ.get('TORCHELASTIC_RESTART_COUNT', '0'), store)
            # gloo, because what `total` adds up must not wait for a GPU
            dist.init_process_group('cpu:gloo,cuda:nccl' if self.cuda else 'gloo', store=store,
                                    rank=self.rank, world_size=self.world)
        self.bf16 = options.dtype == 'bfloat16'
        if options.dtype == 'auto' and self.cuda:
            self.bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        elif options.dtype == 'auto' and self.torch_device.type == 'cpu' and trains:
            self.bf16 = bfloat16_is_faster()
        self.precision = torch.bfloat16 if self.bf16 else torch.float32

    def total(self, *values):
        """Each number summed over the processes."""
        tensor = torch.tensor(values, dtype=torch.float64)
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor.tolist()

    def put(self, batch):
        """The tensors of a batch on the device."""
        if self.cuda:  # from pinned memory, so that nothing waits for the copy
            batch = [tensor.pin_memory() for tensor in batch]
        return [tensor.to(self.torch_device, non_blocking=self.cuda) for tensor in batch]

    def autocast(self):
        return torch.autocast(self.torch_device.type, torch.bfloat16, enabled=self.bf16)

    def describe(self):
        return (torch.cuda.get_device_name(self.torch_device) if self.cuda
                else f'{self.torch_device.type} ({os.cpu_count()} cores)')

    def memory_gb(self):
        """Peak memory of this process in GiB: on its GPU if it has one, otherwise in RAM."""
        if self.cuda:
            return torch.cuda.max_memory_allocated(self.torch_device) / 2 ** 30
        units_per_gb = 2 ** 30 if sys.platform == 'darwin' else 2 ** 20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / units_per_gb

    def mfu(self, flops_per_second):
        """Model FLOPs utilisation: the share of the peak that all processes together reach, or None
        if the peak is not known."""
        name = self.describe()
        peak = next((peak for gpu, peak in PEAK_BF16.items() if gpu in name), None)
        return flops_per_second / self.world / peak if peak and self.bf16 else None


def ranks():
    """(rank, rank on this machine, number of processes) as torchrun sets them. Raises UserError."""
    names = 'RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT'
    found = {name: os.environ[name] for name in names if name in os.environ}
    if found.keys().isdisjoint(names[:3]):
        return 0, 0, 1
    numbers = [int(found[name]) for name in names[:3] if found.get(name, '').isdecimal()]
    if len(found) < 5 or len(numbers) < 3 or not numbers[1] <= numbers[0] < numbers[2]:
        settings = ' '.join(f'{name}={value}' for name, value in found.items())
        raise UserError(f'the environment has {settings}, which is not all that torchrun sets: '
                        f'unset {" ".join(found)}, or start this with torchrun')
    return numbers


def bfloat16_is_faster():
    """Whether this CPU has instructions for bfloat16, with which its products are 2 to 8 times as
    fast as in float32."""
    found = torch.cpu.get_capabilities()
    return found.get('avx512_bf16', False) or found.get('amx_bf16', False)


# --------------------------------------------------------------------------------------------------
# checkpoints


def write_whole(path, write):
    """Lets write(file) fill a temporary file, flushes it to the disk and renames it, so that `path`
    is the old or the new file at any moment."""
    partial = path.with_name(f'{path.name}.partial')
    try:
        with open(partial, 'wb') as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of a full disk
        raise UserError(f'{path}: cannot be written ({error}); what was there before is '
                        'kept') from None
    finally:
        partial.unlink(missing_ok=True)  # what a failure, or Ctrl-C, leaves


def save_text(path, text):
    write_whole(path, lambda file: file.write(text.encode()))


def save_checkpoint(path, state):
    write_whole(path, lambda file: torch.save(state | dict(format=FORMAT), file))


def load_checkpoint(path, **kinds):
    """A checkpoint as a dict of tensors and plain values. Its checksums are verified, and nothing
    in it is executed. path: from best_checkpoint. kinds: types of what it must hold besides
    CHECKPOINT. Raises UserError."""
    if Path(path).is_dir():
        return state_of_folder(path)
    if not Path(path).is_file():
        raise UserError(f'{path}: there is no such checkpoint: name the folder of a run of '
                        'train.py, or of a DeepSeek-V3 in the layout of transformers')
    try:
        with zipfile.ZipFile(path) as file:
            if broken := file.testzip():
                raise zipfile.BadZipFile(f'bad checksum in {broken}')
        state = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # torch raises many kinds, also for a pickle that would run code
        raise UserError(f'{path}: damaged, or no checkpoint of train.py ({str(error):.60}): use '
                        'another one') from None
    check_format(state, path, **CHECKPOINT, **kinds)
    config.check_content(state['options'], dict(arch=Literal[*ARCHITECTURES]), path, ANOTHER)
    return state


def check_format(content, path, **kinds):
    """Raises UserError if a checkpoint, or run.json, is of another version, or is damaged: see
    config.check_content."""
    found = content.get('format') if isinstance(content, dict) else None
    if found != FORMAT:
        raise UserError(f'{path}: was not written by this version (format {found}, not {FORMAT}): '
                        'make it again, or use the version that wrote it')
    config.check_content(content, kinds, path, ANOTHER)


def state_of_folder(folder):
    """What load_checkpoint returns for a folder with a DeepSeek-V3 in the layout of transformers.
    `model` is a Checkpoint, from which load_weights reads one tensor at a time."""
    checkpoint = Checkpoint(folder)
    try:
        model_config = make_config('transformer',
                                   **options_of_deepseek(checkpoint.config, checkpoint))
    except ConfigError as error:
        raise UserError(f'{folder}/config.json: {error}') from None
    options = dict(arch='transformer', tokenizer='given') | model_config.options()
    return dict(model=checkpoint, options=options, step=0, provenance={})


def best_checkpoint(folder):
    """Path of the checkpoint that stands for a run: the best one, or the latest if the run stopped
    before its first evaluation. A folder in the layout of transformers is a checkpoint itself."""
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


class SkipInit(TorchFunctionMode):
    """Inside, no initial weights are drawn: new tensors hold what is in their memory, and a large
    one takes none before it is written to."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, '__module__', None) == 'torch.nn.init':
            return kwargs['tensor']
        return function(*args, **kwargs or {})


def build_empty(arch, model_options, precision=lambda name: torch.float32):
    """A model for load_weights to fill. precision: see set_precision."""
    with SkipInit():
        return set_precision(build(arch, model_options), precision)


def set_precision(model, precision):
    """Stores each matrix, and the embedding of tokens, in the dtype precision(its name); returns
    the model. All else is small and stays in float32: gains, biases, embeddings of positions."""
    for prefix, module in model.named_modules():
        if isinstance(module, (nn.Linear, MoE)) or module is model.tok_emb:
            for name, parameter in module.named_parameters(prefix, recurse=False):
                if parameter.dim() > 1:
                    parameter.data = parameter.data.to(precision(name))
    return model


def load_weights(model, state, path):
    """Loads the weights of a checkpoint, read from path. Raises UserError if the model is another.
    Dropout may differ, and so may block_size if no weight depends on it."""
    for name, value in model.config.options().items():
        saved = state['options'].get(name, value)
        if saved != value and name not in ('dropout', 'attention_dropout', 'block_size'):
            raise UserError(f'{path}: another architecture: it was trained with {name}={saved}, '
                            f'not {value}')
    try:
        if isinstance(state['model'], Checkpoint):
            load_deepseek(model, state['model'], state['model'].config)
            return  # a Checkpoint has only finite numbers
        model.load_state_dict(state['model'])
    except (ConfigError, RuntimeError) as error:  # torch names each tensor in a line of its own
        raise UserError(f'{path}: {str(error).splitlines()[-1].strip()}') from None
    for name, weight in model.state_dict().items():
        if not is_finite(weight):
            raise UserError(f'{path}: {name} holds numbers that are not finite')


def load_run(folder, device='cpu', precision=torch.float32):
    """(model, tokenizer, options) of a run folder: its best model in evaluation mode, with weights
    of this precision (bfloat16 computes under torch.autocast only), and its options as a flat dict.
    The folder may also hold a DeepSeek-V3 in the layout of transformers."""
    path = best_checkpoint(folder)
    state = load_checkpoint(path)
    model = build_empty(state['options']['arch'], model_options_of(state['options']),
                        lambda name: precision)
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


def check_export(model_config, folder):
    """Raises UserError if there is something at the path `folder`, or if the layout of transformers
    cannot hold a model with this config."""
    if os.path.exists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
        raise UserError(f'{folder}: is there already, and not empty: export into a new folder')
    try:
        config_for_deepseek(model_config)
    except ConfigError as error:
        raise UserError(f'cannot be exported: {error}') from None


def export(model, tokenizer, folder):
    """Writes a model and its tokenizer into a folder that check_export has passed, in the layout of
    transformers, whole or not at all. Raises UserError."""
    folder = Path(os.path.realpath(folder))
    try:
        weights, hf_config = to_deepseek(model)
        with partial_folder(folder) as temporary:
            new = Path(temporary, 'new')
            new.mkdir()
            write_checkpoint(new, weights, hf_config | dict(bos_token_id=tokenizer.eot,
                                                            eos_token_id=tokenizer.eot))
            for name, content in tokenizer.library_files(model.config.vocab_size).items():
                (new / name).write_text(content, 'utf-8')
            new.rename(folder)
    except ConfigError as error:
        raise UserError(f'cannot be exported: {error}') from None
    except (OSError, SafetensorError) as error:
        raise UserError(f'{folder}: cannot be written ({error})') from None


def provenance(device, meta, tokenizer):
    """Where a checkpoint comes from. meta: the content of the data's meta.json."""
    git = ['git', '-C', Path(__file__).parent, 'rev-parse', 'HEAD']
    commit = shutil.which('git') and subprocess.run(git, capture_output=True, text=True).stdout
    return dict(command=' '.join(sys.argv), commit=(commit or 'unknown').strip(),
                data_sha256=meta['sha256'], tokenizer=tokenizer.digest(),
                device=device.describe(), processes=device.world, numpy=np.__version__,
                python=platform.python_version(), torch=str(torch.__version__))


# --------------------------------------------------------------------------------------------------
# folder and log


class Run:
    """The folder of a training run: options, tokenizer, metrics, checkpoints. Only the first
    process writes."""

    def __init__(self, folder, flat, stats, tokenizer, writes, checkpoint=None, wandb_project=None):
        """flat: all options. stats: sizes of the model and provenance, for run.json and the
        checkpoints. checkpoint: the one to go on from; if None, an earlier run in this folder is
        moved out of the way. wandb_project: None = no Weights & Biases."""
        # if it is a link, the target is set aside and not the link
        self.folder, self.flat, self.stats = Path(os.path.realpath(folder)), flat, stats
        self.writes, self.wandb = writes, None
        if not writes:
            return
        self.make_folder(tokenizer, checkpoint)
        if wandb_project:  # a resumed run goes on in its own run there
            run_id = checkpoint and checkpoint['provenance'].get('wandb_id')
            self.wandb = open_wandb(
                project=wandb_project, name=self.folder.name, dir=self.folder, id=run_id,
                config=flat | stats, resume='allow' if run_id else None)
            stats['wandb_id'] = self.wandb.id
        facts = stats | dict(format=FORMAT)
        save_text(self.folder / 'run.json', json.dumps(facts, indent=2) + '\n')

    def make_folder(self, tokenizer, checkpoint):
        folder, lines = self.folder, []
        self.lock = claim(folder)
        if checkpoint:  # what was logged after the checkpoint will be logged again
            lines = [line for line in config.read_json_lines(folder / 'metrics.jsonl', **METRICS)
                     if line['step'] <= checkpoint['step']]
        elif names := earlier_run(folder):
            newest = max((folder / name for name in names), key=os.path.getmtime)
            date = date_of(newest, lambda date: Path(f'{folder}-{date}').exists())
            aside = folder.rename(f'{folder}-{date}')
            print(self.flat['out_dir'], 'holds an earlier run: renamed to', os.path.relpath(aside))
            self.lock = claim(folder)
            if (log := aside / 'sweep.log').exists():  # into which this process may print
                log.rename(folder / 'sweep.log')
        save_text(folder / 'metrics.jsonl', ''.join(json.dumps(line) + '\n' for line in lines))
        save_text(folder / 'config.json', json.dumps(self.flat, indent=2) + '\n')
        tokenizer.save(folder / 'tokenizer.json')

    def log(self, text):
        if self.writes:
            print(text, flush=True)

    def record(self, **line):
        """Adds a line to metrics.jsonl, and to Weights & Biases."""
        if self.writes:
            with open(self.folder / 'metrics.jsonl', 'a') as file:
                file.write(json.dumps(line) + '\n')
        if self.wandb:
            self.wandb.log(line, step=line['step'])

    def save(self, name, state):
        """Saves a checkpoint: the state, the options, and where it comes from."""
        if self.writes:
            save_checkpoint(self.folder / name,
                            state | dict(options=self.flat, provenance=self.stats))

    def close(self):
        if not self.writes:
            return
        lines = config.read_json_lines(self.folder / 'metrics.jsonl')
        plot_losses(self.folder, lines)
        plot_expert_shares(self.folder, lines)
        if self.wandb:  # writes into the folder, too
            self.wandb.finish()
        self.lock.close()


def earlier_run(folder):
    """Names of what an earlier run left in a folder. Raises UserError if no run may write there."""
    folder = Path(folder)
    names = {*os.listdir(folder)} - {'.lock', 'sweep.log'} if folder.is_dir() else set()
    foreign = {name for name in names if not OWN.fullmatch(name)}
    if foreign or names and not names & {'ckpt.pt', 'ckpt_best.pt', 'run.json', 'metrics.jsonl'}:
        raise UserError(f'{folder}: holds {min(foreign or names)}, which no run wrote: move it, or '
                        'set --out_dir to a folder of its own')
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise UserError(f'{folder}: cannot be made or written in: set --out_dir')
    return names


def claim(folder):
    """Makes a folder, and lets no other process claim it until the file that this returns is closed
    or this process ends, however it ends. Raises UserError and OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / '.lock', 'a')
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f'{folder}: another process works there: wait for its end, or set another '
                        '--out_dir') from None
    except OSError:  # a disk without locks
        pass
    return lock


def date_of(path, taken):
    """The date of a file, to name what is set aside: a second later while that is taken(date)."""
    date = datetime.fromtimestamp(path.stat().st_mtime)
    while taken(name := f'{date:%Y%m%d-%H%M%S}'):
        date += timedelta(seconds=1)
    return name


def open_wandb(**options):
    """A run of Weights & Biases; without options only the login, which can be refused before
    anything is written. Raises UserError."""
    try:
        import wandb
        return wandb.init(**options) if options else wandb.login()
    except Exception as error:  # its own kinds, and those of what it uses
        raise UserError(f'--wandb=True: {error}: log in with `wandb login`, or set '
                        'WANDB_MODE=offline') from None


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
    """matplotlib.pyplot for files, imported only when something is plotted: it takes a second."""
    os.environ['MPLBACKEND'] = 'agg'  # whatever else it names
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
        # the first tenth of the steps, many times as high, would flatten the rest
        points = [(line['step'], line[key]) for line in lines
                  if key in line and line['step'] >= lines[-1]['step'] / 10]
        axes.plot(*zip(*points), label=key.replace('_', ' '), **style)
    axes.set(xlabel='step', ylabel='loss (nats)', title=folder.name)
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, folder / 'loss.png')


def plot_expert_shares(folder, lines):
    """Draws the share of the tokens that each expert takes into RUN/experts.png."""
    lines = [line for line in lines if 'expert_shares' in line]
    if not lines:
        return
    shares = np.array([np.concatenate(line['expert_shares']) for line in lines])
    figure, axes = pyplot().subplots(layout='constrained')
    image = axes.imshow(shares.T, aspect='auto', interpolation='nearest',
                        extent=(0, lines[-1]['step'], shares.shape[1], 0))
    axes.set(xlabel='step', ylabel='expert, layer by layer', title=folder.name)
    figure.colorbar(image, label="share of a layer's tokens")
    save_figure(figure, folder / 'experts.png')
