"""bench.py on models small enough to time in a test: what it reports, not how fast it is."""

import csv
import functools
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

import matplotlib.image
import numpy as np
import pytest
import torch

import bench
from config import UserError
from conftest import REPOSITORY, train_runs, write_corpus
from model import make_model
from run import Machine, MachineOptions, load_checkpoint, pyplot, read_metrics
from train import TrainOptions, compiled

SMALL = ['--n_layer=1', '--vocab_size=300', '--rounds=1', '--context=40', '--micro_batch_size=2',
         '--device=cpu']
TINY = ['--n_embd=20', '--n_head=5']
QUICK = REPOSITORY / 'config/quick.py'
DECODER = REPOSITORY / 'config/decoder.py'


def paths(*names):
    return [REPOSITORY / f'config/{name}.py' for name in names]


@pytest.fixture
def no_memory(monkeypatch):
    """Peak memory is not measured: a process of its own takes seconds to start."""
    monkeypatch.setattr(bench, 'memory_of', lambda path, overrides: 0)


@pytest.mark.slow
def test_reports_training_and_decoding(workspace, script, capsys):
    script(bench, *paths('decoder', 'encdec_mse_pos'), *SMALL, *TINY, '--json=True')
    lines = json.loads(capsys.readouterr().out)
    assert [line['config'] for line in lines] == ['decoder', 'encdec_mse_pos']
    for line in lines:
        assert line['cache_bytes_per_token'] == line['cache_bytes_per_token_counted']
        assert line['context'] == 40
        assert 0 < line['decode_ms_per_token'] <= line['decode_ms_per_token_worst'] < 1000
        assert line['decode_tokens_per_s'] == pytest.approx(1e3 / line['decode_ms_per_token'])
        assert line['decode_together'] == 16 and line['decode_tokens_per_s_together'] > 0
        assert 0 < line['weights_read_ms'] < line['decode_ms_per_token_uncached']
        assert 50e6 < line['peak_memory_bytes'] < 2e9
        assert line['matmul_peak_flops_per_s'] > 1e9
    plain = make_model('transformer', n_layer=1, n_embd=20, n_head=5, vocab_size=300,
                       block_size=200, bias=False)
    flops = lines[0]['train_tokens_per_s'] * plain.flops_per_token(200)
    share = flops / lines[0]['matmul_peak_flops_per_s']
    assert lines[0]['train_matmul_share'] == pytest.approx(share)


@pytest.mark.slow
def test_an_encoder_is_trained_on_masked_positions_and_not_decoded(workspace, script, capsys,
                                                                   no_memory):
    script(bench, *paths('mla_o'), *SMALL, '--json=True')
    line, = json.loads(capsys.readouterr().out)
    assert 'context' not in line and line['sequences'] == 2
    encoder = make_model('transformer', n_layer=1, n_embd=256, n_head=8, vocab_size=300,
                         block_size=128, causal=False, attention='mla', q_latent=64, kv_latent=32,
                         o_latent=64, rope_dims=32, mlp='swiglu')
    # 15% of the positions meet the vocabulary
    flops = line['train_tokens_per_s'] * encoder.flops_per_token(128, 19 / 128)
    share = flops / line['matmul_peak_flops_per_s']
    assert line['train_matmul_share'] == pytest.approx(share)
    script(bench, *paths('mla_o', 'grouped'), *SMALL, '--block_size=96')
    training, decoding = capsys.readouterr().out.split('decoding')
    assert 'mla_o' in training and 'mla_o' not in decoding and 'grouped' in decoding


@pytest.mark.slow
def test_a_profile_is_written(workspace, script, no_memory):
    script(bench, *paths('decoder'), *SMALL, *TINY, '--profile=trace.json', '--json=True')
    events = json.loads(Path('trace.json').read_text())['traceEvents']
    assert any(event.get('name') == 'aten::mm' for event in events)


def test_attention_layers(workspace, script, capsys, monkeypatch):
    written, write_csv = [], bench.write_csv
    monkeypatch.setattr(bench, 'write_csv', lambda path, lines: (
        written.append(sum('decode_us' in line for line in lines)), write_csv(path, lines)))
    script(bench, 'attention', '--rounds=1', '--results=here', '--layer_widths=64,128',
           '--more_widths=256', '--lengths=16,32', '--head_dims=32', '--tokens=64')
    n = len(bench.KINDS)
    assert written == list(range(n, 8 * n + 1, n))  # each size as soon as it is measured
    out, lines = capsys.readouterr().out, list(csv.DictReader(open('here/attention.csv')))
    assert len(lines) == 2 * 2 * 3 * len(bench.KINDS)  # latents, lengths, widths, kinds
    assert Path('here/attention.png').stat().st_size > 10_000
    assert all((line['train_us_a_token'] == '') == (line['width'] == '256') for line in lines)
    assert ('MLA-o against MLA, FLOPs: cheaper from width (T 16 / 32) DeepSeek-V3, '
            'heads of 32: ') in out
    mflop = {line['attention']: float(line['mflop_a_token']) for line in lines
             if (line['latents'], line['width'], line['T']) == ('DeepSeek-V3', '128', '16')}
    assert mflop['MHA'] == pytest.approx(3 * (2 * 4 * 128 ** 2 + 4 * 128 * 8.5) / 1e6)
    q, kv, r = 24, 8, 16  # 3/14 and 1/14 of 128, as multiples of 8; half of a head
    weights = 128 * (q + kv + r) + q * 128 + kv * (128 - 4 * r + 128) + 128 * 128
    assert mflop['MLA'] == pytest.approx(3 * (2 * weights + 4 * 128 * 8.5) / 1e6)


def test_the_clock_waits_for_every_kind_of_gpu(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.accelerator, 'synchronize', waited.append)
    for kind in ('cpu', 'cuda', 'mps'):
        bench.clock(torch.device(kind), lambda: None)
    assert [device.type for device in waited] == ['cuda', 'cuda', 'mps', 'mps']


@pytest.mark.parametrize('name, peak', [
    ('NVIDIA A100-SXM4-80GB', 312e12), ('NVIDIA H100 80GB HBM3', 989e12),
    ('NVIDIA H100 PCIe', 756e12), ('NVIDIA H100 NVL', 835e12), ('NVIDIA H200', 989e12),
    ('NVIDIA GeForce RTX 4090', None)])
def test_the_peak_of_a_gpu(monkeypatch, name, peak):
    machine = Machine(MachineOptions(device='cpu', dtype='bfloat16'))
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    monkeypatch.setattr(machine, 'describe', lambda: name)
    assert machine.mfu(1e12) == (peak and 1e12 / peak)


def test_more_than_eight_models_are_compiled_in_one_process(monkeypatch):
    compile, counters = torch.compile, torch._dynamo.utils.counters
    monkeypatch.setattr(torch, 'compile', functools.partial(compile, backend='eager'))
    monkeypatch.setattr(torch, 'use_deterministic_algorithms', lambda *_, **__: None)
    counters.clear()
    machine, idx = Machine(MachineOptions(device='cpu')), torch.zeros(1, 8, dtype=torch.long)
    models = [make_model('transformer', vocab_size=50, block_size=8, n_layer=1, n_head=2,
                         n_embd=16 + 2 * i) for i in range(10)]
    runners = [compiled(TrainOptions(compile=True), model, machine) for model in models]
    for runner in runners * 2:  # the second time nothing is compiled
        runner(idx, idx)
    assert counters['stats']['unique_graphs'] == 10 and not counters['recompile_limit']


@pytest.mark.slow
def test_attention_layers_are_compiled(workspace, script, capsys, monkeypatch):
    monkeypatch.setattr(bench, 'KINDS', bench.KINDS[:4])
    torch._dynamo.utils.counters.clear()
    script(bench, 'attention', '--rounds=1', '--layer_widths=64', '--more_widths=128',
           '--lengths=16', '--head_dims=32', '--tokens=16', '--compile=True', '--device=cpu')
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] == 2 * 4  # latents, kinds
    assert not torch._dynamo.utils.counters['graph_break']


def test_grouped_query_attention_caches_no_less_than_mla():
    for width in (128, 512, 1024, 2048):
        lines = bench.formulas(width, 128, 64, 'DeepSeek-V3')
        numbers = [lines[kind]['cache_numbers'] for kind in ('MLA', 'GQA', 'MHA')]
        assert numbers == sorted(numbers)


# -- sweep -----------------------------------------------------------------------------------------

SWEEP = ['--dataset=text', '--source=corpus.csv', '--tokenizer=byte', '--block_size=32',
         '--n_layer=1', '--n_head=2', '--n_embd=32', '--batch_size=4', '--max_iters=4',
         '--eval_interval=2', '--eval_iters=1', '--device=cpu', '--vocab_size=None']
GRID = [QUICK, *SWEEP, '--attention=mha', '--q_latent=None', '--kv_latent=None',
        '--o_latent=None', '--max_seconds=None', '--rope_dims=16', '--learning_rate=1e-3,3e-3',
        '--seed=1,2']


def groups(script, capfd, *runs):
    """What `bench.py compare` knows of each group: {options: line}."""
    capfd.readouterr()
    script(bench, 'compare', *runs, '--json=True')
    return {line['options']: line for line in json.loads(capfd.readouterr().out)}


@pytest.mark.slow
def test_sweep_and_compare(workspace, script, capfd):
    train_runs(workspace, SWEEP, dict(one=[]))  # leaves the corpus and its data behind
    script(bench, 'sweep', *GRID)
    runs = sorted(Path('out/sweep-quick').iterdir())
    varied, _ = zip(*(run.name.rsplit(',', 1) for run in runs))
    assert list(varied) == [
        f'learning_rate={lr},seed={seed}' for lr in ('1e-3', '3e-3') for seed in (1, 2)]
    assert not list(Path().rglob('sweep.log'))

    # a second time only the run that is missing is trained
    shutil.rmtree(runs[3])
    capfd.readouterr()
    script(bench, 'sweep', *GRID)
    out = capfd.readouterr().out
    assert out.count('is done') == 3 and 'step 4' in out

    table = groups(script, capfd, *runs)
    assert [(options, line['runs']) for options, line in sorted(table.items())] == [
        ('learning_rate=0.001', 2), ('learning_rate=0.003', 2)]
    lines = [json.loads(line) for run in runs[:2]
             for line in (run / 'metrics.jsonl').read_text().splitlines()]
    losses = [line['val_loss'] for line in lines if line['step'] == 4 and 'val_loss' in line]
    first = table['learning_rate=0.001']
    assert first['val_loss']['values'] == losses
    mean = first['val_loss_at_equal_tokens']['mean']
    assert mean == pytest.approx(sum(losses) / 2) == pytest.approx(first['val_loss']['mean'])
    for line in table.values():
        assert 0 < line['tokens_to_common_loss']['mean'] <= 4 * 4 * 32
        assert 0 < line['seconds_to_common_loss']['mean']
    script(bench, 'compare', *runs)
    assert 'learning_rate=0.003' in capfd.readouterr().out
    assert Path('out/bench/compare.png').stat().st_size > 10_000

    table = groups(script, capfd, *runs[:2])
    assert [(options, line['runs']) for options, line in table.items()] == [
        ('all options the same', 2)]

    # other initial weights are no second seed
    train_runs(workspace, SWEEP, dict(two=['--init_from=one']))
    assert set(groups(script, capfd, 'one', 'two')) == {'init_from=scratch', 'init_from=one'}

    other = ['--lowercase=True', '--tokenizer=bpe', '--vocab_size=300']
    train_runs(workspace, SWEEP, dict(other=other))
    with pytest.raises(UserError, match='different data, with different tokenizers'):
        script(bench, 'compare', 'one', 'other')


@pytest.fixture
def two_configs(workspace):
    """Two configs of small models, and a corpus."""
    write_corpus(workspace, 100)
    options = dict(argument.removeprefix('--').split('=') for argument in SWEEP)
    options |= dict(log_interval='1')
    for name, width in dict(a='16', b='32').items():
        literals = {key: value if value.isdecimal() or value == 'None' else repr(value)
                    for key, value in (options | dict(n_embd=width)).items()}
        Path(f'{name}.py').write_text(''.join(f'{k} = {v}\n' for k, v in literals.items()))
    return workspace


def test_a_run_that_fails_is_reported_and_the_others_go_on(two_configs, script, capfd):
    with open('b.py', 'a') as file:
        file.write('block_size = 100_000\n')  # it turns out when the data is read
    with pytest.raises(UserError, match='1 of 2 runs failed; the same command goes on from here'):
        script(bench, 'sweep', 'a.py', 'b.py', '--max_iters=2', '--jobs=2')
    out, err = capfd.readouterr()
    good, bad = Path('out/sweep-a/max_iters=2'), Path('out/sweep-b/max_iters=2')
    reason = r'train.py: block_size=100000: longer than the data \([\d,]+ tokens\)'
    assert re.search(f'^2 of 2: {bad} failed: {reason}', out, re.MULTILINE)
    assert re.fullmatch(f'{bad} failed: {reason}\n', err)  # the rest went to the log
    assert re.search(f'^1 of 2: {good} training, log in its sweep.log$', out, re.MULTILINE)
    assert re.search(f'^1 of 2: {good} finished after 0:00:', out, re.MULTILINE)
    assert 'step 2: loss' in (good / 'sweep.log').read_text() and 'step 2' not in out
    assert re.search(reason, (bad / 'sweep.log').read_text())


@pytest.mark.slow
def test_ctrl_c_stops_all_runs_and_they_go_on_later(two_configs):
    command = [sys.executable, REPOSITORY / 'bench.py', 'sweep', 'a.py', 'b.py', '--jobs=2',
               '--max_iters=100000', '--eval_interval=100000', '--seed=1,2']
    # two at a time: of a.py, with both seeds
    runs = [Path(f'out/sweep-a/seed={seed},max_iters=100000,eval_interval=100000')
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
        assert process.returncode == 130 and err == 'bench.py: interrupted\n'
        assert out.count('training, log in') == out.count('is stopped') == 2
        for run in runs:
            saved = load_checkpoint(run / 'ckpt.pt')['step']
            last = json.loads((run / 'metrics.jsonl').read_text().splitlines()[-1])
            assert saved == last['step'] > 0
            assert 'stopped by a signal' in (run / 'sweep.log').read_text().splitlines()[-1]


def n_lines(run):
    path = run / 'metrics.jsonl'
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.slow
def test_runs_are_fine_tuned_and_what_is_done_is_not_done_again(two_configs, script, capfd):
    Path('sst2').mkdir()
    for name, n in (('train', 60), ('dev', 20)):
        rows = ''.join(f'the river runs {i}\t{i % 2}\n' for i in range(n))
        Path(f'sst2/{name}.tsv').write_text('sentence\tlabel\n' + rows)
    command = ['sweep', 'a.py', '--seed=1,2', '--max_iters=2']
    runs = [Path(f'out/sweep-a/seed={seed},max_iters=2') for seed in (1, 2)]
    tested = '--finetune=--data_dir=sst2 --epochs=1 --device=cpu --seeds='
    script(bench, *command, f'{tested}1')
    out = capfd.readouterr().out
    assert out.count('max_iters=2 training') == out.count('max_iters=2 fine-tuning') == 2
    assert 'seed 1337: test accuracy' in out
    assert f'\npython bench.py compare {runs[0]} {runs[1]}\n' in out
    script(bench, *command, f'{tested}1')
    assert capfd.readouterr().out.count('is done') == 2
    table = groups(script, capfd, *runs)['all options the same']
    means = [json.loads((run / 'sst2.json').read_text())['mean'] for run in runs]
    assert table['sst2_accuracy']['values'] == means
    script(bench, *command, f'{tested}2', '--seed=1')
    out = capfd.readouterr().out
    assert 'seed=1,max_iters=2 fine-tuning again, sst2.json has seeds=1, not 2' in out
    assert len(json.loads((runs[0] / 'sst2.json').read_text())['seeds']) == 2


def test_names_of_folders():
    def name(varied, **options):
        return bench.folder_name(options, varied)

    assert name(['lr', 'seed'], lr='1e-3', seed='1') == 'lr=1e-3,seed=1'
    assert name([]) == 'run'
    assert name(['seed'], max_iters='300', seed='1') == 'seed=1,max_iters=300'
    assert name([], max_iters='300') == 'max_iters=300'
    # a digest for what is no name, or too long for one
    long = dict(source='x' * 300)
    names = [name(['seed'], seed='1', **options) for options in (
        long, long | dict(n_layer='2'), dict(source='a/b.txt'), dict(source='a_b.txt'))]
    assert len(set(names)) == 4 and all(re.match('seed=1,', text) for text in names)
    assert all(len(text) < 25 and '/' not in text for text in names)
    assert len(name(['source'], **long)) == 8


def hold(folder, *arguments):
    """Makes a run folder that has the options of a command line and nothing else."""
    options = {key: value for key, (value,) in map(bench.values_of, arguments)}
    options = bench.options_asked_for('a.py', options, folder)
    Path(folder).mkdir(parents=True)
    (Path(folder) / 'config.json').write_text(json.dumps(options))


def test_a_run_is_found_by_its_options(two_configs, capsys):
    def choose(varied, **options):
        return str(bench.choose_folder('a.py', options, varied)).removeprefix('out/sweep-a/')

    assert choose(['seed'], seed='1', n_layer='2') == 'seed=1,n_layer=2'
    hold('out/sweep-a/seed=1', '--seed=1', '--n_layer=2')  # a name of an earlier version
    assert choose(['seed'], seed='1', n_layer='2') == 'seed=1'
    assert choose(['n_layer'], n_layer='2', seed='1') == 'seed=1'
    assert choose(['seed'], seed='1', n_layer='3') == 'seed=1,n_layer=3'
    assert choose(['seed'], seed='2', n_layer='2') == 'seed=2,n_layer=2'
    # an option that does not change the result
    assert choose(['seed'], seed='1', n_layer='2', log_interval='7') == 'seed=1'
    assert choose(['device'], seed='1', n_layer='2', device='mps') == (
        'device=mps,seed=1,n_layer=2')
    assert not capsys.readouterr().out
    # a folder that is taken: it is said what differs
    other = choose(['seed'], seed='1')
    assert re.fullmatch('seed=1,[0-9a-f]{8}', other)
    assert capsys.readouterr().out == ('out/sweep-a/seed=1 holds a run with n_layer=2, not 1: this '
                                       f'one goes to out/sweep-a/{other}\n')


def test_environments_of_the_jobs(monkeypatch):
    monkeypatch.setattr(bench.os, 'cpu_count', lambda: 7)
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    assert bench.environments(1) == [{}]
    assert [job['OMP_NUM_THREADS'] for job in bench.environments(3)] == ['2'] * 3
    assert bench.environments(20)[0]['OMP_NUM_THREADS'] == '1'
    assert 'CUDA_VISIBLE_DEVICES' not in bench.environments(2)[0]
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    assert [job['CUDA_VISIBLE_DEVICES'] for job in bench.environments(3)] == ['0', '1', '0']
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '3,5')
    assert [job['CUDA_VISIBLE_DEVICES'] for job in bench.environments(2)] == ['3', '5']


def test_time_left():
    sweep = bench.Sweep([], jobs=2)
    sweep.waiting = {4, 5, 6}
    assert sweep.time_left() == ''
    sweep.durations = [50.0, 70.0]
    assert sweep.time_left() == '; 3 to go, about 0:01:30'  # 3 x 60 / 2
    sweep.started = {3: time.perf_counter() - 20}
    assert sweep.time_left() == '; 4 to go, about 0:01:50'
    sweep.waiting = set()
    assert sweep.time_left() == '; 1 to go, about 0:00:40'
    sweep.started = {3: time.perf_counter() - 500}  # longer than the others
    assert sweep.time_left() == '; 1 to go, about 0:00:00'


# -- compare ---------------------------------------------------------------------------------------


def fake_run(name, seed, losses, facts=True, sst2=None, embedding=False, **options):
    """A run folder, as far as compare reads it: evaluated every 1,000 tokens, which take 10 s."""
    folder, lines = Path(name), []
    folder.mkdir()
    for i, loss in enumerate(losses):
        at = dict(step=10 * i, tokens=1000 * i, seconds=10.0 * i)
        terms = dict(train_embedding_loss=1 / (i + 1), train_cross_entropy=loss + 1)
        lines.append(at | dict(train_loss=loss + 2, lr=1e-3) | (terms if embedding else {}))
        lines.append(at | dict(val_loss=loss, val_perplexity=math.exp(loss)))
        if facts:
            lines[-2] |= dict(tokens_per_second=100.0 + seed + i, memory_gb=0.5 + i)
            lines[-1] |= dict(train_eval_loss=loss - 0.5, val_bits_per_byte=loss / 2)
    (folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    options = dict(arch='transformer', seed=seed, max_iters=10 * (len(losses) - 1)) | options
    (folder / 'config.json').write_text(json.dumps(options))
    origin = dict(data_sha256='of the data', tokenizer='of the tokenizer')
    if facts:
        (folder / 'run.json').write_text(json.dumps(origin | dict(parameters=12_345)))
    else:
        torch.save(dict(model={}, options={}, step=1, provenance=origin), folder / 'ckpt.pt')
    if sst2:
        (folder / 'sst2.json').write_text(json.dumps(dict(test_accuracy=[sst2], mean=sst2)))
    return folder


@pytest.fixture
def no_plot(monkeypatch):
    monkeypatch.setattr(bench, 'plot_groups', lambda path, groups: None)


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
    script(bench, 'compare', *runs)
    out, err = capfd.readouterr()
    lines = [' '.join(line.split()) for line in out.splitlines()]
    assert not err and all(len(line) <= 140 for line in out.splitlines())
    assert '#1 3 runs: learning_rate=0.001' in lines  # the lower loss first
    assert '#2 4 runs: learning_rate=0.0001' in lines
    half = T * 0.152753 / math.sqrt(3)  # standard deviation of FAST
    assert (f'#1 12,345 1.6333 +- {half:.4f} 2.1333 +- {half:.4f} 1.0667 +- {half / 2:.4f} '
            '80.00% +- 0.00%') in lines
    half = T * 0.076376 / math.sqrt(3)  # of the differences 0.2, 0.15, 0.3
    assert f'#2 - #1 3 0.2167 +- {half:.4f}' in lines
    assert 'parameters loss loss per byte accuracy' in lines  # and no masked accuracy
    assert any(line.startswith('2,000 tokens 20 seconds loss 2.6000 loss 2.6000') for line in lines)

    table = groups(script, capfd, *runs)
    fast, slow = table['learning_rate=0.001'], table['learning_rate=0.0001']
    assert fast['seeds'] == [1, 2, 3] and fast['val_loss']['values'] == list(FAST)
    assert fast['tokens_per_second']['values'] == [102.0, 103.0, 104.0]  # medians
    assert fast['memory_gb']['mean'] == 2.5  # the most
    assert fast['tokens_to_common_loss']['values'][0] == 1000 * (1 + 1.4 / 2)
    assert fast['val_masked_accuracy'] == dict(n=0, mean=None, interval=None, values=[])
    rows = list(csv.DictReader(open('out/bench/compare.csv')))
    assert [row['options'] for row in rows] == list(table)
    for row, line in zip(rows, (fast, slow)):
        assert row['val_loss_n'] == str(line['runs']) and row['parameters'] == '12345'
        assert float(row['val_loss_mean']) == line['val_loss']['mean']
        assert float(row['val_loss_interval']) == line['val_loss']['interval']
        assert list(map(float, row['val_loss_values'].split())) == line['val_loss']['values']
        assert row['val_masked_accuracy_mean'] == row['val_masked_accuracy_values'] == ''


def test_fewer_than_three_runs_have_values_and_no_interval(workspace, script, capfd, no_plot):
    runs = two_groups()
    script(bench, 'compare', *runs[:2], runs[3])
    out = capfd.readouterr().out
    assert '+-' not in out.split('\n', 1)[1] and 'difference' not in out
    assert '2.2000, 2.2500' in out and re.search(r'#1 +12,345 +1.5000 +2.0000 +1.0000\n', out)
    line = groups(script, capfd, *runs[:2])['all options the same']
    assert (line['val_loss']['n'], line['val_loss']['interval']) == (2, None)


def test_runs_of_earlier_versions_leave_columns_empty(workspace, script, capfd):
    old = two_groups(facts=False)
    script(bench, 'compare', *old)
    out, err = capfd.readouterr()
    assert not err and 'parameters' not in out and 'training' not in out and 'GB' not in out
    assert '2.1333 +- ' in out and '#2 - #1' in out
    # beside a run of today; an option that is new has its default in the others
    new = fake_run('new', 5, [9.0, 4.0, 2.0], learning_rate=1e-3, schedule=TrainOptions.schedule)
    table = groups(script, capfd, *old, new)
    line = table['learning_rate=0.001']
    assert line['seeds'] == [1, 2, 3, 5] and line['parameters'] == 12_345
    assert line['train_eval_loss']['values'] == [1.5]


@pytest.mark.slow
def test_runs_of_earlier_versions_are_compared_by_the_options_that_still_exist(workspace, script,
                                                                               capfd):
    train_runs(workspace, SWEEP, dict(one=[], two=['--seed=2']))
    path = Path('two/config.json')
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(abandoned=3)))
    assert set(groups(script, capfd, 'one', 'two')) == {'all options the same'}


@pytest.mark.parametrize('file, old, new, message', [
    ('metrics.jsonl', '"val_loss": 4.0', '"val_loss": NaN', 'val_loss is nan at step 10'),
    ('metrics.jsonl', '"val_loss": 4.0', '"val_loss": -Infinity', 'val_loss is -inf at step 10'),
    ('metrics.jsonl', '"val_loss": 4.0', '"val_loss": "4.0"', 'val_loss is 4.0 at step 10'),
    ('metrics.jsonl', '"val_loss": 4.0', '"val_loss": ' + '9' * 400, 'val_loss is 999'),
    ('metrics.jsonl', '"memory_gb": 1.5', '"memory_gb": null', 'memory_gb is None at step 10'),
    ('metrics.jsonl', '"tokens": 0, ', '', 'a line without step, tokens and seconds'),
    ('metrics.jsonl', '{', '7\n{', 'a line without step, tokens and seconds: 7'),
    ('metrics.jsonl', '{', '{"step"\n{', 'cannot be read'),
    ('metrics.jsonl', 'val_loss', 'loss', None),  # one evaluation less
    ('metrics.jsonl', '2.25', '2.25, "x": "\udcff"', 'cannot be read'),  # no UTF-8
    ('run.json', '{', '[', 'cannot be read'),
    ('run.json', '12345', '"many"', None),
    ('config.json', '"arch"', '"architecture"', 'without the options of a run'),
    ('sst2.json', '{', '{]', 'cannot be read'),
    ('sst2.json', '0.8}', 'NaN}', None),
])
def test_a_run_that_cannot_be_read_is_left_out(workspace, script, capfd, no_plot, file, old, new,
                                               message):
    runs = two_groups(sst2=0.8)
    path = runs[1] / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1), errors='surrogateescape')
    script(bench, 'compare', *runs, '--json=True')
    out, err = capfd.readouterr()
    assert json.loads(out)[1]['seeds'] == ([1, 2, 3, 4] if message is None else [1, 3, 4])
    if message is None:
        assert not err
        return
    assert err.startswith('slow2 is left out: ') and message in err and err.count('\n') == 1
    with pytest.raises(UserError, match='fewer than two'):
        script(bench, 'compare', *runs[:2])


def test_runs_that_are_not_finished_are_named(workspace, script, capfd, no_plot):
    runs = two_groups()
    early = fake_run('early', 5, [9.0, 5.0], learning_rate=1e-3, max_iters=20)
    script(bench, 'compare', *runs, early)
    assert capfd.readouterr().err == (
        'early is not finished: it was last evaluated at step 10\n')
    path = early / 'metrics.jsonl'
    path.write_text(path.read_text()[:-30])  # a kill has cut off the last line
    script(bench, 'compare', *runs, early)
    assert 'at step 0' in capfd.readouterr().err


def test_the_plot_has_a_panel_for_the_embedding_loss(workspace, script):
    runs = two_groups()
    script(bench, 'compare', *runs)
    plain = matplotlib.image.imread('out/bench/compare.png').shape[1]
    script(bench, 'compare', *runs, fake_run('encdec', 5, [9.0, 4.0, 2.0], embedding=True))
    assert matplotlib.image.imread('out/bench/compare.png').shape[1] == 1.5 * plain


def test_the_axis_of_losses_is_cut_to_what_follows_the_first_tenth():
    figure, axes = pyplot().subplots()
    axes.plot([0, 9, 10, 50, 100], [9.0, 8.0, 4.0, 3.0, 2.0])
    axes.plot([0, 500, 1000], [9.0, 3.0, 1.0])
    bench.cut_to_later(axes)
    low, high = axes.get_ylim()
    assert 0.7 < low < 1 and 4 < high < 4.3
    pyplot().close(figure)


@pytest.mark.slow
def test_frontier_tunes_with_the_first_seed_alone(two_configs, script, capfd):
    command = ['frontier', 'a.py', 'b.py', '--causal=True', '--max_iters=4', '--jobs=2',
               '--learning_rate=1e-30,1e-3', '--seed=3,1,2']
    script(bench, *command)
    names = [f'learning_rate={rate},seed={seed},causal=True,max_iters=4' for rate, seed in
             (('1e-3', 1), ('1e-3', 2), ('1e-3', 3), ('1e-30', 3))]
    for name in 'ab':
        assert sorted(path.name for path in Path(f'out/sweep-{name}').iterdir()) == names
    losses = {name: np.array([read_metrics(Path(f'out/sweep-{name}') / run)[-1]['val_loss']
                              for run in (names[2], names[0], names[1])]) for name in 'ab'}
    with open('out/bench/frontier.csv') as file:
        first, second = csv.DictReader(file)
    for name, line in (('a', first), ('b', second)):
        assert line['config'] == name and line['seeds'] == '3 1 2'
        assert float(line['learning_rate']) == 1e-3
        assert float(line['val_loss_mean']) == pytest.approx(losses[name].mean())
        width = dict(a=16, b=32)[name]
        assert float(line['cache_bytes']) == 2 * width * 4  # one layer, keys and values, float32
        assert float(line['train_tokens_per_s']) > 0 and line['context'] == '32'
    difference = losses['b'] - losses['a']
    assert float(first['difference_mean']) == 0
    assert float(second['difference_mean']) == pytest.approx(difference.mean())
    assert float(second['difference_interval']) == pytest.approx(
        4.3027 * difference.std(ddof=1) / 3 ** 0.5, rel=1e-4)
    assert Path('out/bench/frontier.png').stat().st_size > 10_000
    out = capfd.readouterr().out
    assert f'{losses["a"].mean():.4f} +- ' in out and f'{difference.mean():.4f} +- ' in out


def test_a_rate_at_which_training_fails_is_not_chosen(two_configs, script, monkeypatch):
    losses = {'1e-3': 2.0, '2e-3': 1.0, '4e-3': 3.0}
    bad = '2e-3'
    monkeypatch.setattr(bench, 'train_runs', lambda runs, options: {
        run.folder for run in runs if run.options['learning_rate'] == bad})
    monkeypatch.setattr(bench, 'read_run', lambda folder: SimpleNamespace(evaluations=[dict(
        val_loss=losses[folder.name.rpartition('=')[2]])]))
    arguments = ['a.py', '--seed=1,2', '--learning_rate=1e-3,2e-3,4e-3']
    options, paths, grid = bench.read_sweep(arguments)
    runs = bench.tuned_runs(options, paths, grid)['a.py']
    assert [run.options for run in runs] == [
        dict(seed=seed, learning_rate='1e-3') for seed in '12']
    monkeypatch.setattr(bench, 'train_runs', lambda runs, options: {run.folder for run in runs})
    with pytest.raises(UserError, match='a.py: failed at every learning rate, see above'):
        bench.tuned_runs(options, paths, grid)


def test_which_training_loss_is_drawn(workspace):
    new, old = fake_run('new', 1, [3.0, 2.0]), fake_run('old', 1, [3.0, 2.0], facts=False)
    terms = fake_run('terms', 1, [3.0, 2.0], facts=False, embedding=True)
    keys = [bench.training_curve(bench.read_run(run), 'tokens')[2] for run in (new, old, terms)]
    assert keys == ['train_eval_loss', 'train_loss', 'train_cross_entropy']


def test_loss_between_two_evaluations():
    lines = [dict(tokens=0, val_loss=4.0), dict(tokens=100, val_loss=2.0)]
    assert bench.loss_at(lines, 'tokens', 25) == 3.5
    assert bench.spent_until(lines, 'tokens', 3.5) == 25
    assert bench.spent_until(lines, 'tokens', 4.5) == 0
    lines += [dict(tokens=200, val_loss=3.0), dict(tokens=300, val_loss=1.0)]
    assert bench.spent_until(lines, 'tokens', 2.5) == 75  # the first time
    assert bench.spent_until(lines, 'tokens', 1.5) == 275


@pytest.mark.parametrize('arguments, message', [
    (['sweep'], 'which config'),
    (['sweep', QUICK, '--lerning_rate=1,2'], 'did you mean learning_rate'),
    (['sweep', QUICK, '--learning_rate=1e-3,fast'],
     'learning_rate=fast: takes a finite number above 0'),
    (['sweep', QUICK, '--out_dir=x'], 'out_dir is not for sweep'),
    (['sweep', QUICK, '--n_head=4,3'], 'not divisible'),
    (['sweep', QUICK, '--n_head=4,3'], 'out/sweep-quick/n_head=3: '),
    (['sweep', QUICK, '--jobs=0'], 'jobs=0: takes an int from 1'),
    (['sweep', QUICK, QUICK], 'two configs of one name'),
    (['sweep', QUICK, '--finetune=--epoch=3'], 'did you mean epochs'),
    (['sweep', QUICK, '--finetune=--out_dir=x'], 'out_dir is not for sweep'),
    (['sweep', QUICK, '--finetune="--seeds=3'], 'No closing quotation'),
    (['sweep', QUICK, '--finetune=--data_dir=nowhere'], 'takes the folder that holds train.tsv'),
    ([QUICK, '--jobs=2'], 'jobs: there is no such option'),
    (['sweep', QUICK, '--dry_run=True'], 'dry_run is not for sweep'),
    (['sweep', QUICK, '--seed=1,1'], 'seed=1,1: names a value twice'),
    (['frontier'], 'which config? python bench.py frontier'),
    (['frontier', QUICK], 'quick.py: an encoder, which has no cache'),
    (['frontier', DECODER, '--n_layer=1,2'], 'n_layer=1,2: frontier takes several values of'),
    (['attention', '--n_layer=3'], 'n_layer: there is no such option'),
    (['attention', '--layer_widths=128,100'], 'a layer 100 wide does not divide into an even '
     'number of heads of 32'),
    (['attention', '--head_dims=6'], 'half of a head is rotary'),
    ([DECODER, '--profile=nowhere/trace.json'],
     'profile=nowhere/trace.json: takes the name of a file'),
    ([DECODER, f'--profile={REPOSITORY}'], 'takes the name of a file in a folder that exists'),
    (['comapre', 'one', 'other'], 'did you mean bench.py compare'),
    (['compare', 'one', 'one'], 'each named once'),
    (['compare', 'one'], 'compares two runs or more'),
    (['compare', 'nowhere', 'elsewhere'], 'nowhere/ckpt.pt: there is no such checkpoint'),
    (['--context=1'], 'context=1: takes an int from 2'),
    (['--rounds=0'], 'rounds=0: takes an int from 1'),
    (['nowhere.py'], 'nowhere.py: there is no such config file'),
    (['--contxt=10'], 'there is no such option; did you mean context'),
])
def test_refusals(workspace, script, arguments, message):
    with pytest.raises(UserError) as error:
        script(bench, *arguments)
    assert message in str(error.value)
