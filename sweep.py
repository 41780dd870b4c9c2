"""Grids of training runs, their tables and their pictures. The first word is the command.

    python sweep.py sweep config/mha.py config/mla.py --seed=1,2,3 --jobs=2
    python sweep.py sweep config/quick.py --learning_rate=3e-3,6e-3 --finetune="--seeds=3"
    python sweep.py compare out/sweep-mha/* out/sweep-mla/*
    python sweep.py frontier config/zoo.py config/zoo_mla.py --learning_rate=4e-3,8e-3 --seed=1,2,3

sweep: one run of train.py per config and combination of the values, which commas separate. A run's
folder is out/sweep-CONFIG/OPTIONS. Finished runs are skipped, and interrupted ones are resumed.
Runs side by side (--jobs) slow each other down: compare their losses at equal tokens, not at equal
seconds. --finetune also tests each run on SST-2: it takes options of finetune_sst2.py, in quotes.

compare: runs that differ only in their seed form a group. The table shows the mean over the seeds
and half its 95% interval, or the values if there are fewer than three; the losses at equal tokens
are those at the end of the shortest run. For two groups with three seeds in common there is also
the difference between runs with the same seed. Writes compare.csv, and compare.png with the curves.

frontier: loss against the size of the cache and the speed, for causal configs. It takes what sweep
takes. The first seed chooses between several learning rates, separately for each config; the other
seeds use its choice. When all runs are trained, the configs are timed in turns, as by bench.py.
Writes frontier.csv and frontier.png.

A sweep of W&B needs nothing from here:

    method: random
    parameters:
      learning_rate: {distribution: log_uniform_values, min: 2.0e-3, max: 2.0e-2}
      wandb: {value: true}
    command: [sh, -c, 'python train.py config/quick.py --out_dir=out/$WANDB_RUN_ID "$@"', sh,
              "${args}"]
"""

import ast
import contextlib
import dataclasses
import itertools
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import config  # before torch: from here on Ctrl-C is one line

import numpy as np
import pandas as pd
import torch

import bench
import train
from bench import print_table, split_arguments, subplots, text
from config import UserError
from finetune_sst2 import FinetuneOptions, read_sst2
from model import Count, make_config
from run import METRICS, build, check_format, mean_and_interval, save_figure, save_text

# options that do not change the result of a run
INCIDENTAL = ('out_dir', 'wandb', 'device', 'log_interval', 'dry_run', 'eval_only', 'export',
              'init_from')
FEWEST = 3  # values that get an interval; with two, half of it would be 13 standard errors


@dataclass
class SweepOptions:
    """Options; sweep and frontier also take those of train.py"""

    jobs: Count = 1  # parallel runs; they share the CPU cores, and each takes one of several GPUs
    finetune: str | None = None  # fine-tune each run, with these options of finetune_sst2.py
    results: str = 'out/bench'  # compare, frontier: folder for the csv file and the picture
    json: bool = False  # compare, frontier: print a list of dicts instead of the table


# --------------------------------------------------------------------------------------------------
# sweep: a grid of runs


class SweepRun(NamedTuple):
    path: str  # of its config
    options: dict  # {name: value, as written on the command line}
    folder: Path


def read_grid(command, arguments):
    """(SweepOptions, paths of configs, {option: its values}) of a command line."""
    options, paths, others = split_arguments(arguments, SweepOptions)
    if not paths:
        raise UserError(f'which config? python sweep.py {command} CONFIG --key=a,b,c')
    if len({Path(path).stem for path in paths}) < len(paths):
        raise UserError(f'{" ".join(paths)}: two configs with the same name would share folders')
    # commas inside brackets belong to a value
    grid = {name: list(dict.fromkeys(re.split(r',(?![^([]*[)\]])', text)))
            for name, _, text in (argument[2:].partition('=') for argument in others)}
    for name in {'out_dir', 'init_from', 'dry_run', 'eval_only', 'export'} & {*grid}:
        raise UserError(f'{name}: {command} trains each run in a folder of its own: leave it out')
    if options.finetune is not None:  # what is wrong with it should not show after the training
        asked = finetune_options(options.finetune, '.')
        if asked.data_dir:
            read_sst2(asked)
    return options, paths, grid


def finetune_options(arguments, folder):
    """The FinetuneOptions for the run in a folder. arguments: the value of --finetune."""
    values, _ = config.load([*shlex.split(arguments), f'--out_dir={folder}'], FinetuneOptions,
                            takes_config=False)
    return FinetuneOptions(**values)


def flags(options):
    return [f'--{name}={value}' for name, value in options.items()]


def folder_of(path, options):
    """The folder of a run. It is named after the options that change the result, in alphabetical
    order, so that any command that asks for the same run finds it."""
    name = ','.join(f'{key}={value}' for key, value in sorted(options.items())
                    if key not in INCIDENTAL).replace('/', '%2F')
    return Path('out') / f'sweep-{Path(path).stem}' / (name or 'run')


def full_options(path, options):
    """All options of a run, as its config.json will hold them."""
    recipe, model_options, _ = train.read_options([path, *flags(options)])
    model_config = build(recipe.arch, model_options, make_config)
    return json.loads(json.dumps(dataclasses.asdict(recipe) | model_config.options()))


def plan_runs(paths, grid):
    """The SweepRuns of a grid. All are checked before the first one starts."""
    runs = []
    for path, values in itertools.product(paths, itertools.product(*grid.values())):
        chosen = dict(zip(grid, values))
        folder = folder_of(path, chosen)
        asked, file = full_options(path, chosen), folder / 'config.json'
        if asked['init_from'] != 'scratch':
            raise UserError(f'{path}: sets init_from={asked["init_from"]}, but each run of a sweep '
                            'starts from scratch')
        saved = config.read_json(file, 'remove that folder') if file.exists() else asked
        for name, value in asked.items():
            if name not in INCIDENTAL and saved.get(name) != value:
                raise UserError(f'{folder}: holds a run with {name}={saved.get(name)}, and the '
                                f'config now says {value}: rename that folder or the config')
        runs.append(SweepRun(path, chosen, folder))
    return runs


def remaining(run, finetune):
    """[(what is left to do for a SweepRun, the command that does it)]"""
    stages, here = [], f'--out_dir={run.folder}'
    if not (run.folder / 'ckpt.pt').exists() or not TrainedRun(run.folder).is_finished:
        stages.append(('training', ['train.py', run.path, *flags(run.options), '--init_from=auto',
                                    here]))
    if finetune is not None:
        asked = finetune_options(finetune, run.folder)
        path = asked.file('.json')
        done = config.read_json(path, 'remove it', seeds=list) if path.exists() else dict(seeds=[])
        if done.get('options') != vars(asked) or len(done['seeds']) < asked.seeds:
            stages.append(('fine-tuning', ['finetune_sst2.py', *shlex.split(finetune), here]))
    return stages


def environments(jobs):
    """What the processes of each job find in their environment: a share of the cores and, of
    several GPUs, one."""
    if jobs == 1:
        return [{}]
    # unbuffered: else errors would stand in the log before what was printed earlier
    shared = dict(OMP_NUM_THREADS=str(max(1, os.cpu_count() // jobs)), PYTHONUNBUFFERED='1')
    visible = os.environ.get('CUDA_VISIBLE_DEVICES')
    gpus = visible.split(',') if visible else map(str, range(torch.cuda.device_count()))
    gpu = itertools.cycle([dict(CUDA_VISIBLE_DEVICES=name) for name in gpus] or [{}])
    return [shared | next(gpu) for _ in range(jobs)]


def train_runs(runs, options, tolerant=False):
    """Trains, and fine-tunes if asked, what is left of SweepRuns, `jobs` at a time. Returns the
    folders of those that failed, for which it raises UserError unless it is tolerant."""
    waiting, failed = iter(enumerate(runs, 1)), set()
    caught = train.catch_signals()  # a KeyboardInterrupt could lose a process while it starts
    jobs = {job: next(job, None) for job in [work(waiting, len(runs), options, environment, failed)
                                             for environment in environments(options.jobs)]}
    while any(jobs.values()) and not caught:
        for job, process in jobs.items():
            if process and process.poll() is not None:
                jobs[job] = next(job, None)
        time.sleep(0.02)
    running = [process for process in jobs.values() if process]
    for process in running:  # after a signal
        process.terminate()
    for process in running:
        process.wait()
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, signal.default_int_handler)
    if caught:
        raise KeyboardInterrupt
    if failed and not tolerant:
        raise UserError(f'{len(failed)} of {len(runs)} runs failed; the same command goes on '
                        'from here')
    return failed


def work(waiting, n_runs, options, environment, failed):
    """Takes one SweepRun after another from the iterator `waiting`. Yields each process that it
    starts, and goes on when that has ended."""
    for number, run in waiting:
        title, before = f'{number} of {n_runs}: {run.folder}', None
        log = run.folder / 'sweep.log' if options.jobs > 1 else None
        try:
            while stages := remaining(run, options.finetune):
                if stages == before:
                    raise UserError('it ended before it was done')
                (stage, command), before = stages[0], stages
                print(f'{title} {stage}')
                yield (process := start(command, environment, log))
                if process.returncode:  # the last line says why
                    reason = log.read_text().rstrip().rpartition('\n')[2] if log else 'see above'
                    raise UserError(f'status {process.returncode}, {reason}')
            print(f'{title} is done')
        except (UserError, OSError, ValueError) as error:  # shlex raises ValueError
            print(f'{title} failed: {error}', file=sys.stderr)
            failed.add(run.folder)


def start(command, environment, log):
    """A script in a process of its own, which prints into the file `log`, or here if it is None."""
    script, *arguments = command
    if log:
        log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, 'a') if log else contextlib.nullcontext() as file:
        return subprocess.Popen([sys.executable, Path(__file__).with_name(script), *arguments],
                                stdout=file, stderr=file, env=os.environ | environment)


def sweep(arguments):
    """Trains one run per config and combination of values."""
    options, paths, grid = read_grid('sweep', arguments)
    runs = plan_runs(paths, grid)
    train_runs(runs, options)
    print('\n' + shlex.join(['python', 'sweep.py', 'compare', *(str(run.folder) for run in runs)]))


# --------------------------------------------------------------------------------------------------
# compare: groups of runs


# what is compared of metrics.jsonl
SCORES = ['train_eval_loss', 'val_loss', 'val_masked_accuracy', 'val_bits_per_byte']


class TrainedRun:
    """What compare reads of the folder of a run. Raises UserError or OSError if it cannot."""

    def __init__(self, folder):
        stats = config.read_json(folder / 'run.json', 'restore it')
        check_format(stats, folder / 'run.json', parameters=int, data_sha256=str, tokenizer=str,
                     started_from=str)
        options = config.read_json(folder / 'config.json', 'restore it', seed=int, max_iters=int,
                                   max_seconds=float | None)
        lines = config.read_json_lines(folder / 'metrics.jsonl', **METRICS)
        metrics = pd.DataFrame(lines, columns=list(METRICS))
        self.curve = metrics.dropna(subset='val_loss')
        end, max_seconds = self.curve.iloc[-1:], options.get('max_seconds') or math.inf
        self.is_finished = any((end.step >= options['max_iters']) | (end.seconds >= max_seconds))
        self.folder, sst2, path = folder, folder / 'sst2.json', folder.resolve()
        in_grid = path.parent.name.startswith('sweep-')  # and the config's name
        self.name = path.parent.name.removeprefix('sweep-') if in_grid else path.name
        self.seed, self.parameters = options['seed'], stats['parameters']
        self.loss = float(end.val_loss.max())
        results = config.read_json(sst2, 'remove it', mean=float) if sst2.exists() else {}
        self.measured = end[SCORES].max().to_dict() | dict(
            sst2_accuracy=results.get('mean'),
            tokens_per_second=metrics.tokens_per_second.median(),
            memory_gb=metrics.memory_gb.max())
        # losses compare only between runs for which this is the same
        self.scored_on = stats['data_sha256'], stats['tokenizer'], options.get('causal', True)
        # other initial weights are no other seed
        self.options = {name: value for name, value in options.items()
                        if name not in (*INCIDENTAL, 'seed')} | dict(start=stats['started_from'])


def read_runs(folders):
    """The TrainedRuns that can be compared, by seed; the others are named on stderr."""
    runs = []
    for folder in folders:
        try:
            runs.append(TrainedRun(Path(folder)))
            if not runs[-1].is_finished:
                print(f'{folder} is not finished', file=sys.stderr)
        except (UserError, OSError) as error:
            print(f'{folder} is left out: {error}', file=sys.stderr)
    runs = sorted((run for run in runs if len(run.curve)), key=lambda run: run.seed)
    if len(runs) < 2:
        raise UserError('compares two runs or more: python sweep.py compare RUN RUN ...')
    for run in runs:
        if run.scored_on != runs[0].scored_on:
            raise UserError(f'{run.folder} and {runs[0].folder} differ in their data or tokenizer, '
                            'or are an encoder and a causal model: their losses do not compare')
    return runs


def group_runs(runs):
    """{name: runs that differ only in their seed}, the lowest loss first. A name is that of the
    config, or what the names of the folders begin with, followed by the options in which groups
    with that name differ."""
    options, groups = pd.DataFrame([run.options for run in runs], dtype=object).map(str), {}
    alike = options.groupby(list(options)).ngroup()
    names = pd.Series([run.name for run in runs]).groupby(alike).transform(
        lambda names: os.path.commonprefix(list(names)).rstrip('-_.') or names.iloc[0])
    for name, rows in options.groupby(names):
        differ = sorted(rows.columns[rows.nunique() > 1])
        for i, row in rows[differ].iterrows():
            label = ' '.join([name, *(f'{key}={value}' for key, value in row.items())])
            groups.setdefault(label, []).append(runs[i])
    return dict(sorted(groups.items(), key=lambda item: np.mean([run.loss for run in item[1]])))


def summarize(values):
    """Mean and half the 95% interval of the values that are there, and these values."""
    values = [float(value) for value in values if not pd.isna(value)]
    mean, interval = mean_and_interval(values) if values else (None, None)
    return dict(n=len(values), mean=mean, interval=interval if len(values) >= FEWEST else None,
                values=values)


def shown(value):
    """A number, or what `summarize` returned, as a cell of a table."""
    if not isinstance(value, dict):
        return text(value)
    if value['interval'] is None:
        return ', '.join(map(text, value['values']))
    return f'{text(value["mean"])} +- {text(value["interval"])}'


def compare_groups(groups):
    """What --json=True prints: a dict per group."""
    tokens = float(min(run.curve.tokens.iloc[-1] for group in groups.values() for run in group))
    table = []
    for name, group in groups.items():
        measured = pd.DataFrame([run.measured for run in group])
        measured['val_loss_at_equal_tokens'] = [
            np.interp(tokens, run.curve.tokens, run.curve.val_loss) for run in group]
        table.append(dict(
            name=name, runs=len(group), seeds=[run.seed for run in group],
            parameters=group[0].parameters, equal_tokens=tokens,
            **{measure: summarize(measured[measure]) for measure in measured}))
    return table


def publish(name, table, figure, options):
    """Writes a csv and a picture. Prints the table, with a row per measure and a column per group,
    and differences in loss, seed by seed, between groups with enough seeds in common."""
    folder = Path(options.results)
    folder.mkdir(parents=True, exist_ok=True)
    save_text(folder / f'{name}.csv', pd.json_normalize(table, sep='_').to_csv(index=False))
    save_figure(figure, folder / f'{name}.png')
    if options.json:
        return print(json.dumps(table, indent=2))
    print(f'mean +- half the 95% interval, or the values of fewer than {FEWEST} runs\n')
    cells = pd.DataFrame(table).set_index('name').drop(columns='seeds').map(shown).T
    print_table(cells[(cells != '').any(axis=1)])
    print()
    losses = pd.DataFrame({line['name']: dict(zip(line['seeds'], line['val_loss']['values']))
                           for line in table})
    for a, b in itertools.permutations(losses, 2):
        differences = (losses[b] - losses[a]).dropna()
        if len(differences) >= FEWEST and differences.sum() > 0:
            print(f"{a}'s loss is {shown(summarize(differences))} lower than {b}'s "
                  f'({len(differences)} seeds)')
    print(f'\n{folder}: {name}.csv, {name}.png')


def plot_groups(groups):
    """Validation loss over tokens and over seconds: a group's mean, and a band from its lowest to
    its highest run. The first quarter, where losses are much higher, is left out."""
    figure, panels = subplots(1, 2, sharey=True)
    for axes, x in zip(panels, ('tokens', 'seconds')):
        for i, (name, group) in enumerate(groups.items()):
            curves = pd.concat([run.curve.set_index(x).val_loss for run in group], axis=1)
            curves = curves.sort_index().interpolate('index', limit_area='inside').dropna()
            curves = curves[curves.index >= curves.index.max() / 4]
            axes.plot(curves.mean(axis=1), '.-', color=f'C{i % 10}', label=name)
            axes.fill_between(curves.index, curves.min(axis=1), curves.max(axis=1), alpha=0.2,
                              color=f'C{i % 10}', linewidth=0)
        axes.set(xlabel=x, ylabel='validation loss (nats)')
    figure.legend(*axes.get_legend_handles_labels(), ncols=3, loc='outside lower center')
    figure.suptitle('mean over seeds; band: from the lowest to the highest', fontsize=10)
    return figure


def compare(arguments):
    """Compares groups of runs."""
    options, folders, others = split_arguments(arguments, SweepOptions)
    if others:
        raise UserError(f'{others[0]}: compare has no such option')
    groups = group_runs(read_runs({os.path.realpath(path): path for path in folders}.values()))
    publish('compare', compare_groups(groups), plot_groups(groups), options)


# --------------------------------------------------------------------------------------------------
# frontier: loss against cache


def tuned_runs(options, paths, grid):
    """{path: SweepRuns with all seeds, at the learning rate that the first seed prefers}."""
    runs = plan_runs(paths, grid)
    trials = [run for run in runs if run.options.get('seed') == grid.get('seed', [None])[0]]
    failed, chosen = train_runs(trials, options, tolerant=True), {}
    for path in paths:
        losses = {run.options.get('learning_rate'): TrainedRun(run.folder).loss
                  for run in trials if run.path == path and run.folder not in failed}
        if not losses:
            raise UserError(f'{path}: failed at every learning rate, see above')
        rate = min(losses, key=losses.get)
        chosen[path] = [run for run in runs
                        if run.path == path and run.options.get('learning_rate') == rate]
    return chosen


def titles(paths):
    """A name for each config: what stands before the colon in the first line of its docstring, or
    the name of the file if that is longer than 24 characters or not unique."""
    docs = [ast.get_docstring(ast.parse(Path(path).read_text('utf-8'))) or '' for path in paths]
    names = [doc.split('\n')[0].partition(':')[0] for doc in docs]
    return [name if name and len(name) < 25 and names.count(name) == 1 else Path(path).stem
            for name, path in zip(names, paths)]


def frontier(arguments):
    """Trains configs at the learning rates that suit them, times them, and plots loss against cache
    and speed."""
    options, paths, grid = read_grid('frontier', arguments)
    fixed = {name: values[0] for name, values in grid.items()
             if name not in ('learning_rate', 'seed')}
    if any(len(grid[name]) > 1 for name in fixed):
        raise UserError('frontier takes several values only of learning_rate and seed')
    if not all(full_options(path, fixed).get('causal', True) for path in paths):
        raise UserError('frontier is for causal configs: an encoder has no cache')
    Path(options.results).mkdir(parents=True, exist_ok=True)
    chosen = tuned_runs(options, paths, grid)
    runs = [run for runs in chosen.values() for run in runs]
    train_runs(runs, options)
    groups = {name: [TrainedRun(run.folder) for run in runs]
              for name, runs in zip(titles(paths), chosen.values())}
    timing = bench.BenchOptions(context=10 ** 9)  # all of block_size
    speeds = bench.measure_configs(paths, flags(fixed), timing)
    table = [line | dict(learning_rate=groups[line['name']][0].options['learning_rate']) | speed
             for line, speed in zip(compare_groups(groups), speeds)]
    publish('frontier', table, plot_frontier(table), options)


def plot_frontier(table):
    """Losses with their intervals, over the bytes of the cache and over the speed of training."""
    figure, panels = subplots(1, 2, sharey=True)
    xlabels = dict(cache_bytes_per_token='cache, bytes per token',
                   train_tokens_per_s='training, tokens/s')
    for axes, (key, xlabel) in zip(panels, xlabels.items()):
        points = []
        for i, line in enumerate(table):
            at, color = (line[key], line['val_loss']['mean']), f'C{i % 10}'
            axes.errorbar(*at, yerr=line['val_loss']['interval'], color=color, marker='o',
                          capsize=2, alpha=0.8)
            points.append((line['name'], at, color))
        axes.margins(x=0.2, y=0.1)
        axes.set(xlabel=xlabel, ylabel='validation loss (nats), 95% interval')
        if key.startswith('cache'):
            axes.set_xscale('log', base=2)
        axes.xaxis.set_major_formatter('{x:,.0f}')
        figure.draw_without_rendering()  # places the axes
        name_points(axes, points)
    return figure


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
        config.load(['--help'], SweepOptions, doc=__doc__)
    if not arguments or arguments[0] not in commands:
        raise UserError('which command? python sweep.py sweep, compare or frontier')
    commands[arguments[0]](arguments[1:])


if __name__ == '__main__':
    config.run(main)
