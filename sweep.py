"""Grids of training runs, their tables and their pictures.

    python sweep.py sweep config/mha.py config/mla.py --seed=1,2,3 --jobs=2
    python sweep.py sweep config/quick.py --learning_rate=3e-3,6e-3 --finetune="--seeds=3"
    python sweep.py compare out/sweep-mha/* out/sweep-mla/*
    python sweep.py frontier config/zoo.py config/zoo_mla.py --learning_rate=4e-3,8e-3 --seed=1,2,3

sweep: one run of train.py per config and combination of the values, which commas separate. A run's
folder is out/sweep-CONFIG/OPTIONS. Finished runs are skipped, and interrupted ones go on. Runs side
by side (--jobs) slow each other down: compare their losses at equal tokens, not at equal seconds.
--finetune also tests each run on SST-2: it takes options of finetune_sst2.py, in quotes.

compare: runs that differ only in their seed form a group. The tables show the mean over the seeds
and half its 95% interval, or the values if there are fewer than three. For two groups with three
seeds in common there is also the difference between runs with the same seed. compare.csv has all
figures, compare.png the curves.

frontier: loss against the size of the cache and the speed, for causal configs. It takes what sweep
takes. The first seed chooses between several learning rates, separately for each config; the other
seeds use its choice. When all runs are trained, the configs are timed in turns, as by bench.py.
Writes frontier.csv and frontier.png.
"""

import concurrent.futures
import contextlib
import dataclasses
import difflib
import hashlib
import itertools
import json
import math
import os
import queue
import re
import shlex
import signal
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch

import bench
import config
import train
from config import UserError
from finetune_sst2 import FinetuneOptions, read_sst2
from model import Count, make_config
from run import build, mean_and_interval, pyplot, save_figure, save_text

# options that do not change the result of a run
INCIDENTAL = ('out_dir', 'wandb', 'device', 'log_interval', 'dry_run', 'eval_only', 'export',
              'init_from')
FEWEST = 3  # values that make an interval: that of two is 13 times their standard error


@dataclass
class SweepOptions:
    """Options of sweep and frontier, which also take those of train.py"""

    jobs: Count = 1  # runs at a time; they share the CPU cores, and each takes one of several GPUs
    finetune: str | None = None  # fine-tune each run, with these options of finetune_sst2.py


@dataclass
class TableOptions:
    """Options of compare and frontier"""

    results: str = 'out/bench'  # folder for the csv file and the picture
    json: bool = False  # print a list of dicts instead of the tables


@dataclass
class FrontierOptions(SweepOptions, TableOptions):
    pass


# --------------------------------------------------------------------------------------------------
# sweep: a grid of runs


class SweepRun(NamedTuple):
    path: str  # of its config
    options: dict  # {name: value, as written on the command line}
    folder: Path


def read_grid(command, arguments, cls):
    """(an object of cls, paths of configs, {option: its values}) of a command line."""
    own = [argument for argument in arguments
           if argument.partition('=')[0] in [f'--{option.name}' for option in fields(cls)]]
    paths = [argument for argument in arguments if not argument.startswith('--')]
    if not paths:
        raise UserError(f'which config? python sweep.py {command} CONFIG --key=a,b,c')
    if len({Path(path).stem for path in paths}) < len(paths):
        raise UserError(f'{" ".join(paths)}: two configs with the same name would share folders')
    grid = {}
    for argument in arguments:
        name, _, text = argument.removeprefix('--').partition('=')
        if name in ('out_dir', 'init_from', 'dry_run', 'eval_only', 'export'):
            raise UserError(f'{name} is not for {command}, which trains each run in a folder of '
                            'its own: leave it out')
        if argument not in own + paths:  # commas inside brackets belong to a value
            grid[name] = list(dict.fromkeys(re.split(r',(?![^([]*[)\]])', text)))
    values, _ = config.load(own, cls, takes_config=False)
    return cls(**values), paths, grid


def flags(options):
    return [f'--{name}={value}' for name, value in options.items()]


def folder_of(path, options):
    """The folder of a run. It is named after the options that change the result, in alphabetical
    order, so that any command that asks for the same run finds it."""
    name = ','.join(f'{key}={value}' for key, value in sorted(options.items())
                    if key not in INCIDENTAL).replace('/', '%2F')
    if len(name.encode()) > 200:  # file systems allow 255 bytes
        name = f'{name[:60]},{hashlib.sha256(name.encode()).hexdigest()[:8]}'
    return Path('out') / f'sweep-{Path(path).stem}' / (name or 'run')


def full_options(path, options):
    """All options of a run, as its config.json will hold them. Raises UserError on options that
    train.py would refuse."""
    recipe, model_options, _ = train.read_options([path, *flags(options)])
    model_config = build(recipe.arch, model_options, make_config)
    return json.loads(json.dumps(dataclasses.asdict(recipe) | model_config.options()))


def plan_runs(options, paths, grid):
    """The SweepRuns of a grid. All are checked before the first one starts."""
    runs = {}
    for path, values in itertools.product(paths, itertools.product(*grid.values())):
        chosen = dict(zip(grid, values))
        folder = folder_of(path, chosen)
        try:
            asked = full_options(path, chosen)
        except UserError as error:
            raise UserError(f'{folder}: {error}') from None
        if (folder / 'config.json').exists():
            saved = config.read_json(folder / 'config.json', 'remove that folder')
            for name, value in asked.items():
                if name not in INCIDENTAL and saved.get(name, value) != value:
                    raise UserError(f'{folder}: holds a run with {name}={saved[name]}, and the '
                                    f'config now says {value}: rename that folder or the config')
        runs[folder] = SweepRun(path, chosen, folder)
    if options.finetune is not None:
        read_sst2(finetune_options(options.finetune, folder))
    return list(runs.values())


def finetune_options(text, folder):
    """The FinetuneOptions of a run. text: the value of --finetune."""
    try:
        values, _ = config.load(shlex.split(text), FinetuneOptions, takes_config=False)
        for name in {'out_dir', 'predict'} & set(values):
            raise UserError(f'{name} is not for sweep: leave it out')
        return FinetuneOptions(**values | dict(out_dir=str(folder)))
    except (UserError, ValueError) as error:
        raise UserError(f'--finetune={text}: {error}') from None


def remaining(run, finetune):
    """[(what is left to do for a SweepRun, the command that does it)]"""
    here, stages = Path(__file__).parent, []
    if not (run.folder / 'ckpt.pt').exists() or not TrainedRun(run.folder).is_finished:
        stages.append(('training', [str(here / 'train.py'), run.path, '--init_from=auto',
                                    f'--out_dir={run.folder}', *flags(run.options)]))
    if finetune is not None:
        asked = finetune_options(finetune, run.folder)
        path = asked.file('.json')
        done = config.read_json(path, 'remove it') if path.exists() else dict(options={}, seeds=[])
        if len(done['seeds']) < asked.seeds or any(
                done['options'].get(name) != value for name, value in vars(asked).items()
                if name not in INCIDENTAL):
            stages.append(('fine-tuning', [str(here / 'finetune_sst2.py'),
                                           f'--out_dir={run.folder}', *shlex.split(finetune)]))
    return stages


def environments(jobs):
    """What the processes of each job find in their environment: a share of the cores and, of
    several GPUs, one."""
    if jobs == 1:
        return [{}]
    # unbuffered: else errors would stand in the log before what was printed earlier
    shared = dict(OMP_NUM_THREADS=str(max(1, os.cpu_count() // jobs)), PYTHONUNBUFFERED='1')
    visible = os.environ.get('CUDA_VISIBLE_DEVICES')
    gpus = visible.split(',') if visible else list(map(str, range(torch.cuda.device_count())))
    if len(gpus) < 2:
        return [shared] * jobs
    return [shared | dict(CUDA_VISIBLE_DEVICES=gpus[i % len(gpus)]) for i in range(jobs)]


class Sweep:
    """Carries out what is left of SweepRuns, several at a time, in processes of their own."""

    def __init__(self, runs, options):
        self.runs, self.options, self.lock = runs, options, threading.Lock()
        self.processes, self.stopped, self.free = set(), False, queue.SimpleQueue()
        for environment in environments(options.jobs):
            self.free.put(environment)

    def run_all(self):
        """Returns {folder: why its run failed}."""
        with concurrent.futures.ThreadPoolExecutor(self.options.jobs) as pool:
            results = {run.folder: pool.submit(self.perform, number, run)
                       for number, run in enumerate(self.runs, 1)}
            try:
                concurrent.futures.wait(results.values())
            except KeyboardInterrupt:  # no run starts any more; the others finish a step and save
                with self.lock:
                    self.stopped = True
                    for process in self.processes:
                        process.terminate()
                raise
        return {folder: result.result() for folder, result in results.items() if result.result()}

    def perform(self, number, run):
        """Carries out what is left of a run. Returns why it failed, or ''."""
        if self.stopped:
            return ''
        environment, start = self.free.get(), time.perf_counter()
        try:
            stages = remaining(run, self.options.finetune)
            for stage, command in stages:
                where = ', log in its sweep.log' if self.options.jobs > 1 else ''
                self.log(number, run, f'{stage}{where}')
                self.execute(run.folder, command, environment)
            if remaining(run, self.options.finetune):
                raise UserError('it ended before it was done')
        except (OSError, UserError) as error:
            self.log(number, run, 'is stopped' if self.stopped else f'failed: {error}')
            return str(error)
        finally:
            self.free.put(environment)
        duration = timedelta(seconds=round(time.perf_counter() - start))
        self.log(number, run, f'finished after {duration}' if stages else 'is done')
        return ''

    def execute(self, folder, command, environment):
        """Runs a script to its end. Raises UserError if it fails."""
        log = None  # it prints where this process prints
        if self.options.jobs > 1:
            folder.mkdir(parents=True, exist_ok=True)
            log = open(folder / 'sweep.log', 'a+')
        with log or contextlib.nullcontext():
            with self.lock:
                if self.stopped:
                    raise UserError('stopped')
                process = subprocess.Popen([sys.executable, *command], stdout=log, stderr=log,
                                           env=os.environ | environment)
                self.processes.add(process)
            status = process.wait()
            self.processes.remove(process)
            if status < 0:
                raise UserError(f'killed by signal {-status}')
            if status and log:  # the last line says why
                log.seek(0)
                raise UserError(log.read().rstrip().rpartition('\n')[2])
        if status:
            raise UserError(f'status {status}, see above')

    def log(self, number, run, text):
        print(f'{number} of {len(self.runs)}: {run.folder} {text}', flush=True)


def train_runs(runs, options):
    """Trains, and fine-tunes if asked, what is left of SweepRuns. Returns the folders of those that
    failed; the reasons are on stderr."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # does what Ctrl-C does
    failures = Sweep(runs, options).run_all()
    for folder, reason in failures.items():
        print(f'{folder} failed: {reason}', file=sys.stderr)
    return set(failures)


def stop_at_failures(failures, runs):
    if failures:
        raise UserError(f'{len(failures)} of {len(runs)} runs failed; the same command goes on '
                        'from here')


def sweep(arguments):
    """Trains one run per config and combination of values."""
    options, paths, grid = read_grid('sweep', arguments, SweepOptions)
    runs = plan_runs(options, paths, grid)
    failures = train_runs(runs, options)
    done = [str(run.folder) for run in runs if run.folder not in failures]
    if len(done) > 1:
        print('\n' + shlex.join(['python', 'sweep.py', 'compare', *done]))
    stop_at_failures(failures, runs)


# --------------------------------------------------------------------------------------------------
# compare: groups of runs


# {measure: (title of its column, format)}, of the two tables
SCORES = dict(
    train_eval_loss=('training loss', '.4f'), val_loss=('validation loss', '.4f'),
    val_masked_accuracy=('masked accuracy', '.4f'), val_bits_per_byte=('bits per byte', '.4f'),
    sst2_accuracy=('SST-2', '.2%'))
SPENT = dict(
    val_loss_at_equal_tokens=('at equal tokens', '.4f'),
    val_loss_at_equal_seconds=('at equal seconds', '.4f'),
    tokens_to_common_loss=('tokens', ',.0f'), seconds_to_common_loss=('seconds', ',.0f'),
    tokens_per_second=('tokens/s', ',.0f'), memory_gb=('memory, GB', '.2f'))
# what is read of metrics.jsonl
NUMBERS = ('step', 'tokens', 'seconds', 'val_loss', 'train_eval_loss', 'val_masked_accuracy',
           'val_bits_per_byte', 'tokens_per_second', 'memory_gb', 'train_embedding_loss')


class TrainedRun:
    """What compare reads of the folder of a run. Raises UserError or OSError if it cannot."""

    def __init__(self, folder):
        options = config.read_json(folder / 'config.json', 'restore it')
        stats = config.read_json(folder / 'run.json', 'restore it')
        lines = pd.DataFrame(config.read_json_lines(folder / 'metrics.jsonl'))
        self.metrics = lines.reindex(columns=NUMBERS).apply(pd.to_numeric, errors='coerce')
        self.evaluations = self.metrics.dropna(subset='val_loss')
        if not len(lines) or np.isinf(self.metrics).any(axis=None) or (
                self.metrics[['step', 'tokens', 'seconds']].isna().any(axis=None)):
            raise UserError(f'{folder}: metrics.jsonl is empty or damaged')
        if not len(self.evaluations):
            raise UserError(f'{folder}: metrics.jsonl has no validation loss')
        path, sst2, self.folder = folder.resolve(), folder / 'sst2.json', folder
        grid = path.parent.name.startswith('sweep-')  # and the config's name
        self.name = path.parent.name.removeprefix('sweep-') if grid else path.name
        try:
            # the mean if it was fine-tuned with several seeds
            self.sst2 = config.read_json(sst2, 'remove it')['mean'] if sst2.exists() else None
            self.seed, self.parameters = options['seed'], stats['parameters']
            # losses compare only between runs for which this is the same
            self.scored_on = stats['data_sha256'], stats['tokenizer'], options.get('causal', True)
            self.is_finished = (
                self.evaluations.step.iloc[-1] >= options['max_iters']
                or self.evaluations.seconds.iloc[-1] >= (options['max_seconds'] or math.inf))
            # other initial weights are no other seed
            self.options = {name: value for name, value in options.items()
                            if name not in (*INCIDENTAL, 'seed')}
            self.options['init_from'] = stats['started_from']
        except KeyError as error:
            raise UserError(f'{folder}: its files lack {error}, which train.py writes') from None

    @property
    def loss(self):
        return float(self.evaluations.val_loss.iloc[-1])

    def spent_until(self, loss, key):
        """Tokens or seconds until this validation loss was first reached, on the straight line
        between two evaluations."""
        first = int(np.argmax(self.evaluations.val_loss <= loss))
        line = self.evaluations.iloc[[max(first - 1, 0), first]]
        return np.interp(-loss, -line.val_loss, line[key])  # np.interp wants rising numbers

    def measure(self, tokens, seconds, loss):
        """{measure: value, nan or None}. tokens, seconds, loss: what all runs reached."""
        losses = self.evaluations
        return losses.iloc[-1].reindex(SCORES).to_dict() | dict(
            sst2_accuracy=self.sst2,
            val_loss_at_equal_tokens=np.interp(tokens, losses.tokens, losses.val_loss),
            val_loss_at_equal_seconds=np.interp(seconds, losses.seconds, losses.val_loss),
            tokens_to_common_loss=self.spent_until(loss, 'tokens'),
            seconds_to_common_loss=self.spent_until(loss, 'seconds'),
            tokens_per_second=self.metrics.tokens_per_second.median(),
            memory_gb=self.metrics.memory_gb.max())


def read_runs(folders):
    """The TrainedRuns that can be compared; what is wrong with others is said on stderr."""
    runs = []
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise UserError(f'{folder}: there is no such folder')
        try:
            runs.append(TrainedRun(folder))
        except (UserError, OSError) as error:
            print(f'{folder} is left out: {error}', file=sys.stderr)
    if len(runs) < 2:
        raise UserError('fewer than two of these runs can be compared')
    for run in runs:
        if run.scored_on != runs[0].scored_on:
            raise UserError(f'{run.folder} and {runs[0].folder} differ in their data or tokenizer, '
                            'or are an encoder and a causal model: their losses do not compare')
        if not run.is_finished:
            print(f'{run.folder} is not finished: it was last evaluated at step '
                  f'{run.evaluations.step.iloc[-1]:,}', file=sys.stderr)
    return runs


def group_runs(runs):
    """{name: runs that differ only in their seed}, the lowest loss first. A name is that of the
    config, or what the names of the folders begin with, followed by the options in which groups
    with that name differ."""
    named = {}
    options = pd.DataFrame([run.options for run in runs], dtype=object).map(str)
    for numbers in options.groupby(list(options)).indices.values():
        group = sorted((runs[i] for i in numbers), key=lambda run: run.seed)
        name = os.path.commonprefix([run.name for run in group])
        name = name if name == group[0].name else name.rstrip('-_.') or group[0].name
        named.setdefault(name, []).append((options.iloc[numbers[0]], group))
    groups = {}
    for name, alike in named.items():
        table = pd.DataFrame([row for row, _ in alike])
        differ = sorted(table.columns[table.nunique() > 1])
        groups |= {' '.join([name, *(f'{key}={row[key]}' for key in differ)]): group
                   for row, group in alike}
    return dict(sorted(groups.items(), key=lambda item: statistics.mean(
        run.loss for run in item[1])))


def summarize(values):
    """Mean and half the 95% interval of the values that are there, and these values."""
    values = [float(value) for value in values if not pd.isna(value)]
    mean, interval = mean_and_interval(values) if values else (None, None)
    return dict(n=len(values), mean=mean, interval=interval if len(values) >= FEWEST else None,
                values=values)


def shown(summary, form):
    """A cell of a table."""
    if summary['interval'] is None:
        return ', '.join(format(value, form) for value in summary['values'])
    return f'{format(summary["mean"], form)} +- {format(summary["interval"], form)}'


def compare_groups(groups):
    """What --json=True prints: a dict per group."""
    runs, table = [run for group in groups.values() for run in group], []
    ends = pd.DataFrame([run.evaluations.iloc[-1] for run in runs])
    common = dict(tokens=float(ends.tokens.min()), seconds=float(ends.seconds.min()),
                  loss=float(max(run.evaluations.val_loss.min() for run in runs)))
    for name, group in groups.items():
        measured = pd.DataFrame([run.measure(**common) for run in group])
        table.append(dict(
            name=name, runs=len(group), seeds=[run.seed for run in group],
            parameters=group[0].parameters, equal_tokens=common['tokens'],
            equal_seconds=common['seconds'], common_loss=common['loss'],
            **{measure: summarize(measured[measure]) for measure in measured}))
    return table


def print_table(heading, rows):
    """Prints a heading, and rows {name: {title: text}} without columns that are empty."""
    frame = pd.DataFrame.from_dict(rows, orient='index')
    print(f'\n{heading}\n\n{frame.loc[:, (frame != "").any()].to_string()}')


def cells(line, measures):
    return {title: shown(line[name], form) for name, (title, form) in measures.items()}


def show_groups(table):
    print_table(f'mean +- half the 95% interval, or the values of fewer than {FEWEST} runs; losses '
                'in nats',
                {line['name']: dict(runs=str(line['runs']), parameters=f'{line["parameters"]:,}')
                 | cells(line, SCORES) for line in table})
    print_table('loss at {equal_tokens:,.0f} tokens and {equal_seconds:,.0f} seconds; tokens and '
                'seconds to the loss that all runs reached, {common_loss:.4f}'.format(**table[0]),
                {line['name']: cells(line, SPENT) for line in table})


def show_pairs(groups):
    """Prints differences in loss, seed by seed, between groups with enough seeds in common."""
    print()
    losses = {name: {run.seed: run.loss for run in group} for name, group in groups.items()}
    for a, b in itertools.combinations(losses, 2):
        differences = [losses[b][seed] - losses[a][seed] for seed in losses[a].keys() & losses[b]]
        if len(differences) >= FEWEST:
            if sum(differences) < 0:  # the groups are ordered by all of their seeds
                a, b, differences = b, a, [-difference for difference in differences]
            print(f"{a}'s loss is {shown(summarize(differences), '.4f')} lower than {b}'s "
                  f'({len(differences)} seeds)')


def plot_groups(path, groups):
    """Validation loss over tokens and over seconds, and the embedding loss if there is one: a
    group's mean, and a band from its lowest to its highest run. The first quarter, where losses are
    much higher, is left out."""
    label = 'validation loss (nats)'
    panels = [('tokens', 'val_loss', label), ('seconds', 'val_loss', label)]
    if any(run.metrics.train_embedding_loss.any() for runs in groups.values() for run in runs):
        panels.append(('tokens', 'train_embedding_loss', 'embedding loss in training'))
    figure, axes_of_panels = pyplot().subplots(1, len(panels), figsize=(6 * len(panels), 5),
                                               layout='constrained')
    for axes, (x, y, label) in zip(axes_of_panels, panels):
        for i, (name, group) in enumerate(groups.items()):
            curves = [run.metrics.dropna(subset=y)[[x, y]].to_numpy().T for run in group]
            curves = [curve for curve in curves if curve.size]
            if curves:
                end = min(curve[0, -1] for curve in curves)
                points = np.unique(np.hstack(curves)[0])
                points = points[(points >= end / 4) & (points <= end)]
                losses = np.array([np.interp(points, *curve) for curve in curves])
                axes.plot(points, losses.mean(axis=0), '.-', color=f'C{i % 10}', label=name)
                axes.fill_between(points, losses.min(axis=0), losses.max(axis=0), alpha=0.2,
                                  color=f'C{i % 10}', linewidth=0)
        axes.set(xlabel=x, ylabel=label)
        axes.grid(alpha=0.3)
    figure.legend(*axes_of_panels[0].get_legend_handles_labels(), ncols=3,
                  loc='outside lower center')
    figure.suptitle('mean over seeds; band: from the lowest to the highest', fontsize=10)
    save_figure(figure, path)


def write_table(folder, name, table):
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_text(Path(folder) / name, pd.json_normalize(table, sep='_').to_csv(index=False))


def compare(arguments):
    """Prints tables of groups of runs, and writes them and a plot."""
    folders = [argument for argument in arguments if not argument.startswith('--')]
    values, _ = config.load([argument for argument in arguments if argument not in folders],
                            TableOptions, takes_config=False)
    options = TableOptions(**values)
    if len(set(folders)) < max(len(folders), 2):
        raise UserError('compares two runs or more, each named once: '
                        'python sweep.py compare RUN RUN ...')
    runs = read_runs(folders)
    groups = group_runs(runs)
    table = compare_groups(groups)
    write_table(options.results, 'compare.csv', table)
    plot_groups(Path(options.results) / 'compare.png', groups)
    if options.json:
        return print(json.dumps(table, indent=2))
    show_groups(table)
    show_pairs(groups)
    if len({run.options['eval_iters'] * run.options['batch_size'] for run in runs}) > 1:
        print('these runs were evaluated on different numbers of sequences '
              '(eval_iters x batch_size)')
    print(f'\n{options.results}: compare.csv, compare.png')


# --------------------------------------------------------------------------------------------------
# frontier: loss against cache


def tuned_runs(options, paths, grid):
    """{path: SweepRuns with all seeds, at the learning rate that the first seed prefers}."""
    runs = plan_runs(options, paths, grid)
    trials = [run for run in runs if run.options.get('seed') == grid.get('seed', [None])[0]]
    failures, chosen = train_runs(trials, options), {}
    for path in paths:
        losses = {run.options.get('learning_rate'): TrainedRun(run.folder).loss
                  for run in trials if run.path == path and run.folder not in failures}
        if not losses:
            raise UserError(f'{path}: failed at every learning rate, see above')
        rate = min(losses, key=losses.get)
        chosen[path] = [run for run in runs
                        if run.path == path and run.options.get('learning_rate') == rate]
    return chosen


def frontier(arguments):
    """Trains configs at the learning rates that suit them, times them, and plots loss against cache
    and speed."""
    options, paths, grid = read_grid('frontier', arguments, FrontierOptions)
    fixed = {name: values[0] for name, values in grid.items()
             if name not in ('learning_rate', 'seed')}
    for name in fixed:
        if len(grid[name]) > 1:
            raise UserError(f'{name}={",".join(grid[name])}: frontier takes several values only of '
                            'learning_rate and seed; sweep takes them of all options')
    asked = [full_options(path, fixed) for path in paths]
    for path, own in zip(paths, asked):
        if not own.get('causal', True):
            raise UserError(f'{path}: an encoder, which has no cache')
    chosen = tuned_runs(options, paths, grid)
    runs = [run for runs in chosen.values() for run in runs]
    stop_at_failures(train_runs(runs, options), runs)
    timing = bench.read_options(flags(fixed), *bench.KNOWN)
    timing.context = max(own['block_size'] for own in asked)
    table, reference = bench.measure_configs(paths, flags(fixed), timing), None
    for line, runs in zip(table, chosen.values()):
        group = [TrainedRun(run.folder) for run in runs]
        losses = {run.seed: run.loss for run in group}
        reference = reference or losses
        line |= dict(
            learning_rate=group[0].options['learning_rate'], seeds=list(losses),
            val_loss=summarize(losses.values()),
            difference=summarize([losses[seed] - reference[seed] for seed in losses]))
    write_table(options.results, 'frontier.csv', table)
    plot_frontier(Path(options.results) / 'frontier.png', table)
    if options.json:
        return print(json.dumps(table, indent=2))
    print_table(f'mean +- half the 95% interval, or the values of fewer than {FEWEST} runs; seeds '
                f'{", ".join(map(str, reference))}; losses in nats', {line['config']: {
                    'learning rate': f'{line["learning_rate"]:g}',
                    'validation loss': shown(line['val_loss'], '.4f'),
                    'minus the first': shown(line['difference'], '.4f'),
                    'cache bytes per token': f'{line["cache_bytes_per_token"]:,.0f}',
                    'training tokens/s': f'{line["train_tokens_per_s"]:,.0f}',
                    'decoding ms per token': f'{line["decode_ms_per_token"]:.2f}',
                    'parameters': f'{line["params"]:,}'} for line in table})
    print(f'\n{options.results}: frontier.csv, frontier.png')


def plot_frontier(path, table):
    """Losses with their intervals, over the bytes of the cache and over the speed of training."""
    figure, panels = pyplot().subplots(1, 2, figsize=(13, 6), layout='constrained', sharey=True)
    xlabels = dict(cache_bytes_per_token=f'bytes per token of a cache of {table[0]["context"]:,} '
                                         'tokens', train_tokens_per_s='training, tokens/s')
    for axes, (key, xlabel) in zip(panels, xlabels.items()):
        for i, line in enumerate(table):
            axes.errorbar(line[key], line['val_loss']['mean'], yerr=line['val_loss']['interval'],
                          color=f'C{i % 10}', marker='o', capsize=2, alpha=0.8)
        axes.set(xlabel=xlabel)
        axes.margins(x=0.2, y=0.1)
        axes.grid(alpha=0.3)
    panels[0].set_xscale('log', base=2)
    for axes in panels:
        axes.xaxis.set_major_formatter('{x:,.0f}')
    panels[0].set_ylabel('validation loss (nats), 95% interval')
    figure.draw_without_rendering()  # places the axes
    for axes, key in zip(panels, xlabels):
        name_points(axes, [(line['config'], (line[key], line['val_loss']['mean']), f'C{i % 10}')
                           for i, line in enumerate(table)])
    save_figure(figure, path)


def name_points(axes, points):
    """Writes names to the right of points [(name, (x, y), color)]. One that would cover the name of
    a lower point moves up, and a line joins it to its own."""
    placed, height, width = [], 11, 80  # of a name, with what surrounds it, in points
    for name, at, color in sorted(points, key=lambda point: point[1][1]):
        x, y = axes.transData.transform(at) * 72 / axes.figure.dpi
        up = max([y, *(other + height for left, other in placed if abs(left - x) < width)])
        placed.append((x, up))
        axes.annotate(name, at, (8, up - y), textcoords='offset points', fontsize=8, color=color,
                      va='center', arrowprops=dict(arrowstyle='-', color=color, linewidth=0.5))


def main():
    commands, arguments = dict(sweep=sweep, compare=compare, frontier=frontier), sys.argv[1:]
    if {'--help', '-h'} & set(arguments):
        config.load(['--help'], SweepOptions, TableOptions, doc=__doc__)
    command = arguments[0] if arguments else ''
    if command not in commands:
        near = difflib.get_close_matches(command, commands, 1)
        raise UserError(f'{command}: there is no such command; did you mean {near[0]}?' if near else
                        'which command? python sweep.py sweep, compare or frontier')
    commands[command](arguments[1:])


if __name__ == '__main__':
    config.run(main)
