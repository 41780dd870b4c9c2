"""sweep.py: grids of runs, tables of groups of runs, and loss against cache."""

import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.text import Text

import bench
import finetune_sst2
import sweep
import train
from config import UserError
from conftest import REPOSITORY, train_runs, write_corpus
from results import published
from run import FORMAT, load_checkpoint

QUICK, DECODER = REPOSITORY / 'config/quick.py', REPOSITORY / 'config/decoder.py'
SMALL = dict(dataset='text', source='corpus.csv', tokenizer='byte', vocab_size=None, block_size=32,
             n_layer=1, n_head=2, batch_size=4, max_iters=4, eval_interval=2, eval_iters=1,
             log_interval=1, device='cpu')


@pytest.fixture
def two_configs(workspace):
    """Two configs of small models, a.py and the wider b.py, and a corpus."""
    write_corpus(workspace, 100)
    for name, width in dict(a=16, b=32).items():
        options = SMALL | dict(n_embd=width)
        title = '"""MHA, wider: and more."""\n' if name == 'b' else ''
        Path(f'{name}.py').write_text(title + ''.join(f'{key} = {options[key]!r}\n'
                                                      for key in options))
    return workspace


@pytest.fixture
def in_process(monkeypatch, script):
    """Runs are trained in this process, which need not start python anew: a list of the runs."""
    done, scripts = [], {'train.py': train, 'finetune_sst2.py': finetune_sst2}

    def start(command, environment, log):
        name, *arguments = command
        done.append((name, arguments[-1].removeprefix('--out_dir=')))
        script(scripts[name], *arguments)
        return SimpleNamespace(poll=lambda: 0, returncode=0)

    monkeypatch.setattr(sweep, 'start', start)
    monkeypatch.setattr('run.plot_losses', lambda folder, lines: None)
    return done


def groups(script, capfd, *runs):
    """What `sweep.py compare` knows of each group: {name: line}."""
    capfd.readouterr()
    script(sweep, 'compare', *runs, '--json=True')
    return {line['name']: line for line in json.loads(capfd.readouterr().out)}


# -- sweep -----------------------------------------------------------------------------------------


def test_sweep_and_compare(two_configs, in_process, script, capfd):
    grid = ['sweep', 'a.py', '--learning_rate=1e-3,3e-3', '--seed=1,2']
    script(sweep, *grid)
    folders = [f'out/sweep-a/learning_rate={rate},seed={seed}'
               for rate in ('1e-3', '3e-3') for seed in (1, 2)]
    assert in_process == [('train.py', folder) for folder in folders]
    out = capfd.readouterr().out
    assert f'\npython sweep.py compare {" ".join(folders)}\n' in out
    assert f'4 of 4: {folders[3]} is done' in out

    # a second time only the missing run is trained
    shutil.rmtree(folders[3])
    script(sweep, *grid)
    assert in_process[4:] == [('train.py', folders[3])]
    assert capfd.readouterr().out.count(' training\n') == 1

    table = groups(script, capfd, *folders)
    assert {name: line['seeds'] for name, line in table.items()} == {
        'a learning_rate=0.001': [1, 2], 'a learning_rate=0.003': [1, 2]}
    lines = [json.loads(line) for folder in folders[:2]
             for line in Path(folder, 'metrics.jsonl').read_text().splitlines()]
    losses = [line['val_loss'] for line in lines if line['step'] == 4 and 'val_loss' in line]
    first = table['a learning_rate=0.001']
    assert first['val_loss']['values'] == losses
    assert first['val_loss_at_equal_tokens']['mean'] == pytest.approx(np.mean(losses))
    assert Path('out/bench/compare.png').stat().st_size > 10_000

    # a config that was changed is another experiment
    with open('a.py', 'a') as file:
        file.write('n_layer = 2\n')
    with pytest.raises(UserError, match=f'{folders[0]}: holds a run with n_layer=1, and the config '
                                        'now says 2: rename'):
        script(sweep, *grid)

    # other initial weights are no other seed; other data do not compare
    more = [f'--{name}={value}' for name, value in SMALL.items()] + ['--n_embd=16']
    train_runs(Path(), more, dict(two=[f'--init_from={folders[0]}'], other=[
        '--lowercase=True', '--tokenizer=bpe', '--vocab_size=300']))
    assert set(groups(script, capfd, folders[0], 'two')) == {'a', 'two'}
    with pytest.raises(UserError, match='differ in their data or tokenizer'):
        script(sweep, 'compare', 'two', 'other')


def test_a_run_that_fails_is_reported_and_the_others_go_on(two_configs, script, capfd):
    with open('b.py', 'a') as file:
        file.write('block_size = 100_000\n')  # it turns out when the data is read
    with pytest.raises(UserError, match='1 of 2 runs failed; the same command goes on from here'):
        script(sweep, 'sweep', 'a.py', 'b.py', '--max_iters=2', '--jobs=2')
    out, err = capfd.readouterr()
    good, bad = Path('out/sweep-a/max_iters=2'), Path('out/sweep-b/max_iters=2')
    reason = r'train.py: block_size=100000: longer than the data, data/text-byte/train.bin has'
    # the rest went to the log
    assert re.fullmatch(f'2 of 2: {bad} failed: status 2, {reason}.*\n', err)
    assert f'1 of 2: {good} training\n' in out and f'1 of 2: {good} is done\n' in out
    assert 'step 2: loss' in (good / 'sweep.log').read_text() and 'step 2' not in out
    assert re.search(reason, (bad / 'sweep.log').read_text())


@pytest.mark.slow
def test_ctrl_c_stops_all_runs_and_they_go_on_later(two_configs):
    command = [sys.executable, REPOSITORY / 'sweep.py', 'sweep', 'a.py', 'b.py', '--jobs=2',
               '--max_iters=100000', '--eval_interval=100000', '--seed=1,2']
    # two at a time: of a.py, with both seeds
    runs = [Path(f'out/sweep-a/eval_interval=100000,max_iters=100000,seed={seed}')
            for seed in (1, 2)]
    for kind in (signal.SIGINT, signal.SIGTERM):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   text=True)
        steps = [n_lines(run) for run in runs]
        deadline = time.monotonic() + 100
        while any(n_lines(run) < n + 5 for run, n in zip(runs, steps)):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
        process.send_signal(kind)  # to none but the sweep itself
        out, err = process.communicate(timeout=60)
        assert process.returncode == 130 and err == 'sweep.py: interrupted\n'
        assert out.count('training') == 2 and 'is done' not in out
        for run in runs:
            saved = load_checkpoint(run / 'ckpt.pt')['step']
            last = json.loads((run / 'metrics.jsonl').read_text().splitlines()[-1])
            assert saved == last['step'] > 0
            assert 'stopped by a signal' in (run / 'sweep.log').read_text().splitlines()[-1]


def n_lines(run):
    path = run / 'metrics.jsonl'
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_runs_are_fine_tuned_and_what_is_done_is_not_done_again(two_configs, in_process, script,
                                                                capfd):
    Path('sst2').mkdir()
    for name, n in (('train', 60), ('dev', 20)):
        rows = ''.join(f'the river runs {i}\t{i % 2}\n' for i in range(n))
        Path(f'sst2/{name}.tsv').write_text('sentence\tlabel\n' + rows)
    command = ['sweep', 'a.py', '--seed=1,2']
    runs = [Path(f'out/sweep-a/seed={seed}') for seed in (1, 2)]
    tested = '--finetune=--data_dir=sst2 --epochs=1 --device=cpu --seeds='
    script(sweep, *command, f'{tested}1')
    assert in_process == [(name, str(run)) for run in runs
                          for name in ('train.py', 'finetune_sst2.py')]
    script(sweep, *command, f'{tested}1')
    assert len(in_process) == 4
    table = groups(script, capfd, *runs)
    means = [json.loads((run / 'sst2.json').read_text())['mean'] for run in runs]
    assert table['a']['sst2_accuracy']['values'] == means
    script(sweep, *command[:2], '--seed=1', f'{tested}2')
    assert in_process[4:] == [('finetune_sst2.py', str(runs[0]))]
    assert len(json.loads((runs[0] / 'sst2.json').read_text())['seeds']) == 2


def test_names_of_folders():
    def name(**options):
        return str(sweep.folder_of('config/a.py', options)).removeprefix('out/sweep-a/')

    assert name(seed='1', lr='1e-3') == name(lr='1e-3', seed='1') == 'lr=1e-3,seed=1'
    assert name(log_interval='5', seed='1') == 'seed=1'  # changes nothing of the result
    assert name() == 'run' and name(latents='(1, 2)') == 'latents=(1, 2)'
    assert name(source='a/b.txt') == 'source=a%2Fb.txt'


def test_commas_inside_brackets_do_not_separate_values():
    options, paths, grid = sweep.read_grid('sweep', ['a.py', '--widths=(1,2),(3,4)', '--jobs=2',
                                                     '--seed=1,2,2'])
    assert options.jobs == 2 and paths == ['a.py']
    assert grid == dict(widths=['(1,2)', '(3,4)'], seed=['1', '2'])


def test_environments_of_the_jobs(monkeypatch):
    monkeypatch.setattr(sweep.os, 'cpu_count', lambda: 7)
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 0)
    assert sweep.environments(1) == [{}]
    assert [job['OMP_NUM_THREADS'] for job in sweep.environments(3)] == ['2'] * 3
    assert sweep.environments(20)[0]['OMP_NUM_THREADS'] == '1'
    assert 'CUDA_VISIBLE_DEVICES' not in sweep.environments(2)[0]
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    assert [job['CUDA_VISIBLE_DEVICES'] for job in sweep.environments(3)] == ['0', '1', '0']
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '3,5')
    assert [job['CUDA_VISIBLE_DEVICES'] for job in sweep.environments(2)] == ['3', '5']


# -- compare ---------------------------------------------------------------------------------------


def fake_run(name, seed, losses, sst2=None, **options):
    """A run folder, as far as compare reads it: evaluated every 1,000 tokens, which take 10 s."""
    folder, lines = Path(name), []
    folder.mkdir(parents=True)
    for i, loss in enumerate(losses):
        at = dict(step=10 * i, tokens=1000 * i, seconds=10.0 * i)
        lines.append(at | dict(train_loss=loss + 2, tokens_per_second=100.0 + seed + i,
                               memory_gb=0.5 + i))
        lines.append(at | dict(val_loss=loss, train_eval_loss=loss - 0.5,
                               val_bits_per_byte=loss / 2, val_perplexity=math.exp(loss)))
    (folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    (folder / 'config.json').write_text(json.dumps(
        dict(seed=seed, max_iters=10 * (len(losses) - 1), max_seconds=None) | options))
    (folder / 'run.json').write_text(json.dumps(dict(
        format=FORMAT, data_sha256='of the data', tokenizer='of the tokenizer', parameters=12_345,
        started_from='scratch')))
    if sst2:
        (folder / 'sst2.json').write_text(json.dumps(dict(mean=sst2)))
    return folder


@pytest.fixture
def no_plot(monkeypatch):
    monkeypatch.setattr(sweep, 'plot_groups', lambda groups: None)
    monkeypatch.setattr(sweep, 'save_figure', lambda figure, path: None)


FAST, SLOW = (2.0, 2.1, 2.3), (2.2, 2.25, 2.6)  # final losses with seeds 1, 2, 3
T = 4.3027  # 0.975 quantile of Student's t with 2 degrees of freedom


def two_groups(**keywords):
    """Runs of two groups with three seeds in common, and a fourth of one of them."""
    runs = [fake_run(f'{name}{seed}', seed, [9.0, 4.0, loss], learning_rate=rate, **keywords)
            for name, rate, losses in (('slow', 1e-4, SLOW), ('fast', 1e-3, FAST))
            for seed, loss in enumerate(losses, 1)]
    return [*runs, fake_run('slow4', 4, [9.0, 4.0, 2.4], learning_rate=1e-4, **keywords)]


def test_the_tables(workspace, script, capfd, no_plot):
    runs = two_groups(sst2=0.8)
    script(sweep, 'compare', *runs)
    out, err = capfd.readouterr()
    lines = [' '.join(line.split()) for line in out.splitlines()]
    assert not err and all(len(line) <= 120 for line in out.splitlines())
    fast, slow = T * np.std(FAST, ddof=1) / math.sqrt(3), 3.182 * np.std([*SLOW, 2.4], ddof=1) / 2
    assert 'fast slow' in lines and 'runs 3 4' in lines  # the lower loss first
    assert 'parameters 12,345 12,345' in lines and 'equal_tokens 2,000 2,000' in lines
    assert f'val_loss 2.1333 +- {fast:.4f} 2.3625 +- {slow:.4f}' in lines
    assert 'sst2_accuracy 0.8000 +- 0 0.8000 +- 0' in lines
    assert 'val_masked_accuracy' not in out
    half = T * 0.076376 / math.sqrt(3)  # of the differences 0.2, 0.15, 0.3
    assert f"fast's loss is 0.2167 +- {half:.4f} lower than slow's (3 seeds)" in lines

    table = groups(script, capfd, *runs)
    fast, slow = table['fast'], table['slow']
    assert fast['seeds'] == [1, 2, 3] and fast['val_loss']['values'] == list(FAST)
    assert fast['tokens_per_second']['values'] == [102.0, 103.0, 104.0]  # medians
    assert fast['memory_gb']['mean'] == 2.5  # the most
    assert fast['val_masked_accuracy'] == dict(n=0, mean=None, interval=None, values=[])
    frame = pd.read_csv('out/bench/compare.csv')
    assert list(frame.name) == ['fast', 'slow'] and set(frame.parameters) == {12_345}
    assert list(frame.val_loss_mean) == [line['val_loss']['mean'] for line in (fast, slow)]
    assert list(frame.val_loss_interval) == [line['val_loss']['interval'] for line in (fast, slow)]
    assert json.loads(frame.val_loss_values[0]) == fast['val_loss']['values']

    # fewer than three runs have values and no interval
    script(sweep, 'compare', *runs[:2], runs[3])
    out = capfd.readouterr().out
    assert '+-' not in out.split('\n', 2)[2] and ' lower than ' not in out
    assert '2.2000, 2.2500' in out


def test_groups_are_named_after_their_configs(workspace, script, capfd, no_plot):
    mla = [fake_run(f'out/sweep-mla/lr={lr},seed={seed}', seed, [9.0, loss], attention='mla', lr=lr)
           for seed in (1, 2) for lr, loss in ((1, 3.0), (2, 2.0))]
    mha = [fake_run('out/sweep-mha/seed=1', 1, [9.0, 4.0], attention='mha', lr=1),
           fake_run('out/mine', 1, [9.0, 5.0], attention='mha', lr=2)]
    table = groups(script, capfd, *mha, *mla)
    assert {name: line['runs'] for name, line in table.items()} == {
        'mla lr=2': 2, 'mla lr=1': 2, 'mha': 1, 'mine': 1}


def test_a_lower_loss_is_lower_by_common_seeds(workspace, script, capfd, no_plot):
    """The group with the lower mean over all seeds can have the higher one over common seeds."""
    for name, losses in dict(a=[3.0, 3.0, 3.0, 1.0], b=[2.9, 2.8, 2.7]).items():
        for seed, loss in enumerate(losses):
            fake_run(f'{name}{seed}', seed, [9.0, loss], width=name)
    script(sweep, 'compare', *(f'a{i}' for i in range(4)), *(f'b{i}' for i in range(3)))
    out = capfd.readouterr().out
    assert re.search(r"^b's loss is 0.2000 \+- 0.\d{4} lower than a's \(3 seeds\)$", out, re.M)


@pytest.mark.parametrize('file, old, new, message', [
    ('metrics.jsonl', '{', '{"step"\n{', 'damaged in line 1'),
    ('metrics.jsonl', 'val_loss', 'loss', None),  # one evaluation less
    ('run.json', '{', '[', 'damaged'),
    ('run.json', '"format": 2', '"format": 1', 'was not written by this version'),
    ('sst2.json', '{', '{]', 'damaged'),
])
def test_a_run_that_cannot_be_read_is_left_out(workspace, script, capfd, no_plot, file, old, new,
                                               message):
    runs = two_groups(sst2=0.8)
    path = runs[1] / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    script(sweep, 'compare', *runs, '--json=True')
    out, err = capfd.readouterr()
    assert json.loads(out)[1]['seeds'] == ([1, 2, 3, 4] if message is None else [1, 3, 4])
    if message is None:
        assert not err
        return
    assert err.startswith('slow2 is left out: ') and message in err and err.count('\n') == 1
    with pytest.raises(UserError, match='two runs or more'):
        script(sweep, 'compare', *runs[:2])


def test_runs_that_are_not_finished_are_named(workspace, script, capfd, no_plot):
    runs = two_groups()
    early = fake_run('early', 5, [9.0, 5.0], learning_rate=1e-3, max_iters=20)
    script(sweep, 'compare', *runs, early)
    assert capfd.readouterr().err == 'early is not finished\n'
    path = early / 'metrics.jsonl'
    path.write_text(path.read_text()[:-30])  # a kill has cut off the last line
    assert len(sweep.TrainedRun(early).curve) == 1


def test_losses_at_equal_tokens(workspace):
    runs = [sweep.TrainedRun(fake_run(name, 1, losses)) for name, losses in dict(
        a=[4.0, 2.0, 3.0, 1.0], b=[5.0, 3.0]).items()]
    table = sweep.compare_groups(dict(a=runs[:1], b=runs[1:]))
    assert [line['val_loss_at_equal_tokens']['values'] for line in table] == [[2.0], [3.0]]
    assert {line['equal_tokens'] for line in table} == {1000}


def test_the_curves(workspace):
    """A mean over seeds, and a band from the lowest to the highest run."""
    two_groups()
    figure = sweep.plot_groups(sweep.group_runs(sweep.read_runs(['fast1', 'fast2', 'fast3'])))
    tokens, seconds = figure.axes
    line, = tokens.lines
    assert line.get_xydata().tolist() == [[1000, 4.0], [2000, pytest.approx(np.mean(FAST))]]
    assert line.get_label() == 'fast' and seconds.lines[0].get_xdata().tolist() == [10, 20]
    band = tokens.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == min(FAST) and set(band[band[:, 0] == 2000][:, 1]) == {2.0, 2.3}
    sweep.save_figure(figure, Path('curves.png'))


# -- frontier --------------------------------------------------------------------------------------


def test_frontier_tunes_with_the_first_seed_alone(two_configs, in_process, script, capfd,
                                                  monkeypatch):
    monkeypatch.setattr(bench, 'memory_of', lambda path, overrides: 0)
    script(sweep, 'frontier', 'a.py', 'b.py', '--causal=True', '--learning_rate=1e-30,1e-3',
           '--seed=3,1,2')
    names = [f'causal=True,learning_rate={rate},seed={seed}' for rate, seed in (
        ('1e-3', 1), ('1e-3', 2), ('1e-3', 3), ('1e-30', 3))]
    for name in 'ab':
        assert sorted(path.name for path in Path(f'out/sweep-{name}').iterdir()) == names
    losses = {name: np.array([sweep.TrainedRun(Path(f'out/sweep-{name}') / names[i]).loss
                              for i in (2, 0, 1)]) for name in 'ab'}
    frame = pd.read_csv('out/bench/frontier.csv')
    assert dict(zip(frame.config, frame.name)) == dict(a='a', b='MHA, wider')
    assert set(frame.learning_rate) == {1e-3}
    assert set(frame.seeds) == {'[3, 1, 2]'} and set(frame.context) == {32}
    assert list(frame.val_loss_mean) == pytest.approx([losses[name].mean() for name in 'ab'])
    # one layer, keys and values, float32
    assert list(frame.cache_bytes_per_token) == [2 * 16 * 4, 2 * 32 * 4]
    assert (frame.train_tokens_per_s > 0).all()
    assert Path('out/bench/frontier.png').stat().st_size > 10_000
    out = capfd.readouterr().out
    assert f'{losses["a"].mean():.4f} +- ' in out
    difference = abs(losses['b'] - losses['a']).mean()
    assert re.search(f"'s loss is {difference:.4f} [+]- .* lower than .*'s [(]3 seeds[)]", out)


def test_a_rate_at_which_training_fails_is_not_chosen(two_configs, monkeypatch):
    losses = {'1e-3': 2.0, '2e-3': 1.0, '4e-3': 3.0}
    monkeypatch.setattr(sweep, 'train_runs', lambda runs, options, tolerant: {
        run.folder for run in runs if run.options['learning_rate'] == '2e-3'})
    monkeypatch.setattr(sweep, 'TrainedRun', lambda folder: SimpleNamespace(
        loss=losses[re.search('learning_rate=(.+),', folder.name)[1]]))
    grid = sweep.read_grid('frontier', ['a.py', '--seed=1,2', '--learning_rate=1e-3,2e-3,4e-3'])
    assert [run.options for run in sweep.tuned_runs(*grid)['a.py']] == [
        dict(seed=seed, learning_rate='1e-3') for seed in '12']
    monkeypatch.setattr(sweep, 'train_runs', lambda runs, *_, **__: {
        run.folder for run in runs})
    with pytest.raises(UserError, match='a.py: failed at every learning rate, see above'):
        sweep.tuned_runs(*grid)


def test_names_in_the_picture_do_not_cover_each_other(tmp_path):
    figure, axes = sweep.subplots(1, 1)
    axes.set(xlim=(0, 10), ylim=(0, 10))
    sweep.name_points(axes, [('c', (1, 1.1), 'C0'), ('a', (1, 1), 'C1'), ('far', (9, 1), 'C2')])
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in axes.texts]  # without the lines
    assert [text.get_text() for text in axes.texts] == ['a', 'far', 'c']
    assert not any(a.overlaps(b) for a, b in zip(boxes, boxes[1:] + boxes[:1]))
    assert axes.texts[1].xyann[1] == 0 < axes.texts[2].xyann[1]
    sweep.save_figure(figure, tmp_path / 'names.png')


def test_the_published_tables(workspace, in_process, script, capfd):
    write_corpus(workspace, 100)
    (workspace / 'sst2').mkdir()
    for name, n in (('train', 60), ('dev', 20)):
        rows = ''.join(f'the river runs {i}\t{i % 2}\n' for i in range(n))
        (workspace / f'sst2/{name}.tsv').write_text('sentence\tlabel\n' + rows)
    small = SMALL | dict(n_embd=32, n_head=4, rope_dims=4, tokenizer='bpe', vocab_size=300)
    command = [*map(str, (REPOSITORY / path for path in published.ENCODERS)),
               *sweep.flags(small), '--finetune=--seeds=3 --data_dir=sst2 --epochs=1']
    script(published, *command)
    out = capfd.readouterr().out
    row, = re.findall(r'^[|] `mla_o.py` [|].*', out, re.MULTILINE)
    means = json.loads(next(Path('out/sweep-mla_o').glob('*/sst2.json')).read_text())['mean']
    assert f'{100 * means:.2f} ± ' in row and '(3 seeds)' in row and row.endswith('| 84.63 |')
    assert '| 65,536,000 | 4.954, 0.314 |' in out
    for name in ('published.md', 'pretraining.png', 'sst2.png'):
        assert Path('out/published', name).stat().st_size > 500
    n_done = len(in_process)
    assert n_done == 6
    script(published, *command)  # nothing is left to do
    assert len(in_process) == n_done


def test_help_is_one_screen(script, capsys):
    for command in ([], ['compare']):
        with pytest.raises(SystemExit):
            script(sweep, *command, '--help')
        out = capsys.readouterr().out
        assert len(out.splitlines()) <= 45 and '--jobs=1' in out and '--results=out/bench' in out


@pytest.mark.parametrize('arguments, message', [
    ([], 'which command? python sweep.py sweep, compare or frontier'),
    (['comapre', 'one', 'other'], 'which command? python sweep.py sweep, compare or frontier'),
    (['sweep'], 'which config? python sweep.py sweep'),
    (['sweep', QUICK, '--lerning_rate=1,2'], 'did you mean learning_rate'),
    (['sweep', QUICK, '--learning_rate=1e-3,fast'], "learning_rate='fast': must be a number"),
    (['sweep', QUICK, '--out_dir=x'], 'out_dir: sweep trains each run in a folder of its own'),
    (['sweep', QUICK, '--n_head=4,3'], 'not divisible'),
    (['sweep', QUICK, '--jobs=0'], 'jobs=0'),
    (['sweep', QUICK, '--dry_run=True'], 'dry_run: sweep trains each run in a folder of its own'),
    (['sweep', QUICK, '--finetune=--epochs=0'], 'epochs=0'),
    (['compare', 'one', './one', 'one/'], 'compares two runs or more'),
    (['sweep', QUICK, QUICK], 'two configs with the same name'),
    (['frontier'], 'which config? python sweep.py frontier'),
    (['frontier', QUICK], 'an encoder has no cache'),
    (['frontier', DECODER, '--n_layer=1,2'], 'frontier takes several values only of'),
    (['compare', 'one', 'one'], 'compares two runs or more'),
    (['compare', 'nowhere', 'elsewhere'], 'compares two runs or more'),
    (['compare', 'one', 'other', '--n_layer=2'], '--n_layer=2: compare has no such option'),
])
def test_refusals(workspace, script, arguments, message):
    with pytest.raises(UserError) as error:
        script(sweep, *arguments)
    assert message in str(error.value)


def test_runs_of_a_sweep_start_from_scratch(runs, script):
    Path('further.py').write_text("init_from = 'decoder'\n")
    with pytest.raises(UserError, match='further.py: sets init_from=decoder, but each run'):
        script(sweep, 'sweep', 'further.py', '--seed=1')
