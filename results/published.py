"""The published tables, trained anew: run this in the repository, on one GPU.

    python -m results.published
    python -m results.published --max_iters=2000 --source='wikitext/*.txt' --finetune=--seeds=2
    python -m results.published config/deepseek_tiny.py config/deepseek_tiny_mla_o.py \\
        --finetune="--as_text=True --seeds=5 --epochs=6 --batch_size=256 --learning_rate=5e-5"

The first line trains config/mha.py, mla.py and mla_o.py for 50,000 steps each, and fine-tunes each
on SST-2 with five seeds. The second line is shorter. Other configs can be named, and options of
sweep.py and train.py; what is finished is skipped, and what was interrupted goes on. Writes
published.md, pretraining.png and sst2.png into out/published: ours next to what is published.

A published step has 256 sequences of 128 tokens, cut off and padded; here they are packed, with
another tokenizer. A loss belongs to its schedule: only runs of the published length compare.
"""

import sys
from pathlib import Path

import numpy as np

import config
import sweep
from bench import subplots
from run import save_figure, save_text

ENCODERS = ['config/mha.py', 'config/mla.py', 'config/mla_o.py']
FINETUNE = '--finetune=--seeds=5'
# of mha.py: {step: (masked loss in nats, masked accuracy)}
CURVE = {2_000: (4.954, .314), 4_000: (4.081, .382), 6_000: (3.587, .435), 10_000: (3.143, .476),
         20_000: (2.720, .519), 30_000: (2.526, .548), 50_000: (2.331, .572)}
TOKENS_PER_STEP = 256 * 128
# {config: (perplexity, accuracy on SST-2 in percent)}
FIGURES = {'mha': (np.exp(2.331), 85.67), 'mla': (None, 84.75), 'mla_o': (None, 84.63),
           'deepseek_tiny': (28.89, 87.96), 'deepseek_tiny_mla_o': (29.33, 86.24)}


def number(value, digits=2):
    return '' if value is None else f'{value:.{digits}f}'


def accuracy_of(result):
    """(mean over seeds, half its 95% interval or None, number of seeds), in percent, of the content
    of an sst2.json."""
    scores = sweep.summarize([100 * accuracy for accuracy in result['test_accuracy']])
    return scores['mean'], scores['interval'], scores['n']


def table(runs, results):
    """Lines of markdown: a row per TrainedRun, and the curve of mha.py."""
    lines = ['| config | parameters | tokens | loss | perplexity | published | SST-2, % | standard '
             'error of the test | published |', '|---' * 9 + '|']
    for run in runs:
        perplexity, accuracy = FIGURES.get(run.name, (None, None))
        mean, interval, n = accuracy_of(results[run.name])
        spread = '' if interval is None else f' ± {number(interval)}'
        cells = (f'`{run.name}.py`', f'{run.parameters:,}', f'{run.curve.tokens.iloc[-1]:,.0f}',
                 number(run.loss, 3), number(np.exp(run.loss)), number(perplexity),
                 f'{number(mean)}{spread} ({n} seeds)',
                 number(100 * results[run.name]['binomial_se'], 1), number(accuracy))
        lines.append(f'| {" | ".join(cells)} |')
    names = ' | '.join(f'`{run.name}.py`' for run in runs)
    lines += ['', f'| tokens | published `mha.py`: loss, masked accuracy | {names} |',
              '|---' * (len(runs) + 2) + '|']
    for step, (loss, accuracy) in CURVE.items():
        tokens, cells = step * TOKENS_PER_STEP, []
        for run in runs:
            known = [np.interp(tokens, run.curve.tokens, run.curve[name], right=np.nan)
                     for name in ('val_loss', 'val_masked_accuracy')]
            cells.append(', '.join(number(value, 3) for value in known if value == value))
        lines.append(f'| {tokens:,} | {loss}, {accuracy} | {" | ".join(cells)} |')
    return lines


def plot_pretraining(runs):
    """Validation loss and masked accuracy by millions of tokens."""
    figure, panels = subplots(1, 2)
    names = dict(val_loss='validation loss, nats', val_masked_accuracy='masked accuracy')
    for axes, (i, (name, label)) in zip(panels, enumerate(names.items())):
        for run in runs:
            axes.plot(run.curve.tokens / 1e6, run.curve[name], '.-', label=run.name)
        axes.plot([step * TOKENS_PER_STEP / 1e6 for step in CURVE],
                  [point[i] for point in CURVE.values()], 'k--', label='mha, published')
        axes.set(xlabel='million tokens', ylabel=label)
        axes.legend()
    return figure


def plot_sst2(runs, results):
    """Accuracy on SST-2: our mean with its 95% interval over seeds, and the published figure."""
    figure, axes = subplots(1, 1)
    for i, run in enumerate(runs):
        mean, interval, _ = accuracy_of(results[run.name])
        axes.errorbar(i, mean, interval, fmt='o', capsize=3)
        if run.name in FIGURES:
            axes.plot(i, FIGURES[run.name][1], 'k_', markersize=20)
    bag_of_words = results[run.name]['bag_of_words']['test_accuracy']
    axes.axhline(100 * bag_of_words, ls=':', c='gray')
    axes.set(xticks=range(len(runs)), xticklabels=[run.name for run in runs],
             ylabel='test accuracy on SST-2, %',
             title='point: ours, 95% interval; bar: published; dots: bag of words')
    return figure


def main():
    arguments = sys.argv[1:]
    if {'--help', '-h'} & {*arguments}:
        config.load(['--help'], sweep.SweepOptions, doc=__doc__)
    if all(argument.startswith('-') for argument in arguments):
        arguments = ENCODERS + arguments
    options, paths, grid = sweep.read_grid('published', [FINETUNE, *arguments])
    planned = sweep.plan_runs(paths, grid)
    sweep.train_runs(planned, options)
    runs = [sweep.TrainedRun(run.folder) for run in planned]
    files = {run.name: sweep.finetune_options(options.finetune, run.folder).file('.json')
             for run in runs}
    results = {name: config.read_json(file, 'remove it') for name, file in files.items()}
    folder, lines = Path('out/published'), table(runs, results)
    folder.mkdir(parents=True, exist_ok=True)
    save_text(folder / 'published.md', '\n'.join(lines) + '\n')
    save_figure(plot_pretraining(runs), folder / 'pretraining.png')
    save_figure(plot_sst2(runs, results), folder / 'sst2.png')
    print('\n'.join(['', *lines, '', f'{folder}: published.md, pretraining.png, sst2.png']))


if __name__ == '__main__':
    config.run(main)
