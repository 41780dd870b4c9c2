"""bench.py on models small enough to time in a test: what it reports, not how fast it is."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch

import bench
from config import UserError
from conftest import REPOSITORY, train_runs
from model import make_model

SMALL = ['--n_layer=1', '--vocab_size=300', '--rounds=1', '--context=40', '--micro_batch_size=2', '--device=cpu']
TINY = ['--n_embd=20', '--n_head=5']


def paths(*names):
    return [REPOSITORY / f'config/{name}.py' for name in names]


@pytest.mark.slow
def test_reports_training_and_decoding(workspace, script, capsys):
    script(bench, *paths('decoder', 'encdec_mse_pos'), *SMALL, *TINY, '--json=True')
    lines = json.loads(capsys.readouterr().out)
    assert [line['config'] for line in lines] == ['decoder', 'encdec_mse_pos']
    for line in lines:
        assert line['cache_bytes_per_token'] == line['cache_bytes_per_token_counted']
        assert line['context'] == 40 and 0 < line['decode_ms_per_token'] <= line['decode_ms_per_token_worst'] < 1000
        assert 0 < line['weights_read_ms'] < line['decode_ms_per_token_uncached']
        assert 50e6 < line['peak_memory_bytes'] < 2e9 and line['matmul_peak_flops_per_s'] > 1e9
    plain = make_model('transformer', n_layer=1, n_embd=20, n_head=5, vocab_size=300, block_size=200, bias=False)
    flops = lines[0]['train_tokens_per_s'] * plain.flops_per_token(200)
    assert lines[0]['train_matmul_share'] == pytest.approx(flops / lines[0]['matmul_peak_flops_per_s'])


@pytest.mark.slow
def test_an_encoder_is_trained_on_masked_positions_and_not_decoded(workspace, script, capsys, monkeypatch):
    monkeypatch.setattr(bench, 'memory_of', lambda path, overrides: 0)  # a process of its own takes seconds to start
    script(bench, *paths('mla_o'), *SMALL, '--json=True')
    line, = json.loads(capsys.readouterr().out)
    assert 'context' not in line and line['sequences'] == 2
    encoder = make_model('transformer', n_layer=1, n_embd=256, n_head=8, vocab_size=300, block_size=128, causal=False,
                         attention='mla', q_latent=64, kv_latent=32, o_latent=64, rope_dims=32, mlp='swiglu')
    flops = line['train_tokens_per_s'] * encoder.flops_per_token(128, 19 / 128)  # 15% of the positions meet the vocabulary
    assert line['train_matmul_share'] == pytest.approx(flops / line['matmul_peak_flops_per_s'])
    script(bench, *paths('mla_o', 'grouped'), *SMALL, '--block_size=96')
    out = capsys.readouterr().out
    assert 'mla_o' in out.split('decoding')[0] and 'mla_o' not in out.split('decoding')[1] and 'grouped' in out.split('decoding')[1]


@pytest.mark.slow
def test_a_profile_is_written(workspace, script, monkeypatch):
    monkeypatch.setattr(bench, 'memory_of', lambda path, overrides: 0)
    script(bench, *paths('decoder'), *SMALL, *TINY, '--profile=trace.json', '--json=True')
    assert any('addmm' in event.get('name', '') for event in json.loads(Path('trace.json').read_text())['traceEvents'])


def test_attention_layers(workspace, script, capsys, monkeypatch):
    for name, value in dict(WIDTHS=(64, 128), MORE_WIDTHS=(256,), LENGTHS=(16, 32), HEADS=(32,)).items():
        monkeypatch.setattr(bench, name, value)
    script(bench, 'attention', '--rounds=1', '--results=here')
    out, lines = capsys.readouterr().out, list(csv.DictReader(open('here/attention.csv')))
    assert len(lines) == 2 * 2 * 3 * 4 and Path('here/attention.png').stat().st_size > 10_000  # latents, T, widths, kinds
    assert all((line['train_us_a_token'] == '') == (line['width'] == '256') for line in lines)
    assert 'MLA-o against MLA, FLOPs: cheaper from width (T 16 / 32) DeepSeek-V3, heads of 32: ' in out
    mha = next(line for line in lines if line['attention'] == 'MHA' and line['width'] == '128' and line['T'] == '16')
    assert float(mha['mflop_a_token']) == pytest.approx(3 * (2 * 4 * 128 ** 2 + 4 * 128 * 8.5) / 1e6)
    mla = next(line for line in lines if line['attention'] == 'MLA' and line['width'] == '128' and line['T'] == '16')
    q, kv, r = 24, 8, 16  # 3/14 and 1/14 of 128, to eights; half of a head
    weights = 128 * (q + kv + r) + q * 128 + kv * (128 - 4 * r + 128) + 128 * 128
    assert float(mla['mflop_a_token']) == pytest.approx(3 * (2 * weights + 4 * 128 * 8.5) / 1e6)


def test_grouped_query_attention_caches_no_less_than_mla():
    for width in (128, 512, 1024, 2048):
        lines = bench.formulas(width, 128, 64, 'DeepSeek-V3')
        assert lines['MLA']['cache_numbers'] <= lines['GQA']['cache_numbers'] <= lines['MHA']['cache_numbers']


def test_roofline_by_hand():
    layer = make_model('transformer', n_layer=1, n_embd=64, n_head=2, vocab_size=5).blocks[0].attn  # qkv 64 x 192, o 64 x 64
    slow_memory = bench.roofline(layer, 10, 4, flops=1e30, bandwidth=100.0)
    assert slow_memory == pytest.approx(3 * 2 * (10 * 256 + 64 * 192 + 10 * 128 + 64 * 64) / 100)
    slow_chip = bench.roofline(layer, 10, 4, flops=100.0, bandwidth=1e30)
    assert slow_chip == pytest.approx(10 * bench.layer_flops(layer, 4) / 100)


SWEEP = ['--dataset=text', '--source=corpus.csv', '--tokenizer=byte', '--block_size=32', '--n_layer=1', '--n_head=2',
         '--n_embd=32', '--batch_size=4', '--max_iters=4', '--eval_interval=2', '--eval_iters=1', '--device=cpu', '--vocab_size=None']


@pytest.mark.slow
def test_sweep_and_compare(workspace, script, capfd):
    train_runs(workspace, SWEEP, dict(one=[]))  # leaves the corpus and its data behind
    grid = [REPOSITORY / 'config/quick.py', *SWEEP, '--attention=mha', '--q_latent=None', '--kv_latent=None', '--o_latent=None',
            '--max_seconds=None', '--rope_dims=16', '--learning_rate=1e-3,3e-3', '--seed=1,2']
    script(bench, 'sweep', *grid)
    runs = sorted(Path('out/sweep-quick').iterdir())
    assert [run.name for run in runs] == [f'learning_rate={lr},seed={seed}' for lr in ('1e-3', '3e-3') for seed in (1, 2)]
    shutil.rmtree(runs[3])
    capfd.readouterr()
    script(bench, 'sweep', *grid)
    out = capfd.readouterr().out
    assert out.count('is done') == 3 and 'step 4' in out
    script(bench, 'compare', *runs, '--json=True')
    table = json.loads(capfd.readouterr().out)
    assert [(line['options'], line['runs']) for line in table] == [('learning_rate=0.001', 2), ('learning_rate=0.003', 2)]
    losses = [json.loads(line)['val_loss'] for run in runs[:2] for line in (run / 'metrics.jsonl').read_text().splitlines()
              if json.loads(line).get('step') == 4 and 'val_loss' in line]
    assert table[0]['tokens'][0] == pytest.approx(sum(losses) / 2) == pytest.approx(table[0]['end'][0])
    assert all(0 < line['tokens_to_loss'][0] <= 4 * 4 * 32 and 0 < line['seconds_to_loss'][0] for line in table)
    script(bench, 'compare', *runs)
    assert 'learning_rate=0.003' in capfd.readouterr().out and Path('out/bench/compare.png').stat().st_size > 10_000
    with pytest.raises(UserError, match='holds a run with n_layer=1, not 2'):
        script(bench, 'sweep', *grid, '--n_layer=2')
    script(bench, 'compare', *runs[:2], '--json=True')
    assert [(line['options'], line['runs']) for line in json.loads(capfd.readouterr().out)] == [('all options the same', 2)]
    train_runs(workspace, SWEEP, dict(two=['--init_from=one']))
    capfd.readouterr()
    script(bench, 'compare', 'one', 'two', '--json=True')  # other initial weights are no second seed
    assert {line['options'] for line in json.loads(capfd.readouterr().out)} == {'init_from=scratch', 'init_from=one'}
    train_runs(workspace, SWEEP, {'other': ['--lowercase=True', '--tokenizer=bpe', '--vocab_size=300']})
    with pytest.raises(UserError, match='different data, with different tokenizers'):
        script(bench, 'compare', 'one', 'other')


def test_loss_between_two_evaluations():
    lines = [dict(tokens=0, val_loss=4.0), dict(tokens=100, val_loss=2.0)]
    assert bench.loss_at(lines, 'tokens', 25) == 3.5
    assert bench.spent_until(lines, 'tokens', 3.5) == 25 and bench.spent_until(lines, 'tokens', 4.5) == 0
    lines += [dict(tokens=200, val_loss=3.0), dict(tokens=300, val_loss=1.0)]
    assert bench.spent_until(lines, 'tokens', 2.5) == 75 and bench.spent_until(lines, 'tokens', 1.5) == 275  # the first time


@pytest.mark.parametrize('arguments, message', [
    (['sweep'], 'which config'),
    (['sweep', REPOSITORY / 'config/quick.py', '--lerning_rate=1,2'], 'did you mean learning_rate'),
    (['sweep', REPOSITORY / 'config/quick.py', '--learning_rate=1e-3,fast'], 'learning_rate=fast: takes a float'),
    (['sweep', REPOSITORY / 'config/quick.py', '--out_dir=x'], 'out_dir is not for sweep'),
    (['sweep', REPOSITORY / 'config/quick.py', '--n_head=4,3'], 'not divisible'),
    (['sweep', REPOSITORY / 'config/quick.py', '--dry_run=True'], 'dry_run is not for sweep'),
    (['attention', '--n_layer=3'], 'n_layer: there is no such option'),
    ([REPOSITORY / 'config/decoder.py', '--profile=nowhere/trace.json'], 'profile=nowhere/trace.json: takes the name of a file'),
    ([REPOSITORY / 'config/decoder.py', f'--profile={REPOSITORY}'], 'takes the name of a file in a folder that exists'),
    (['comapre', 'one', 'other'], 'did you mean bench.py compare'),
    (['sweep', REPOSITORY / 'config/quick.py', '--seed=1,1'], 'seed=1,1: names a value twice'),
    (['compare', 'one', 'one'], 'each named once'),
    (['compare', 'one'], 'compares two runs or more'),
    (['compare', 'nowhere', 'elsewhere'], 'nowhere/ckpt.pt: there is no such checkpoint'),
    (['--context=1'], 'context=1: takes two tokens or more'),
    (['--rounds=0'], 'rounds=0: takes a finite number above zero'),
    (['nowhere.py'], 'nowhere.py: there is no such config file'),
    (['--contxt=10'], 'there is no such option; did you mean context'),
])
def test_refusals(script, arguments, message):
    with pytest.raises(UserError) as error:
        script(bench, *arguments)
    assert message in str(error.value)
