"""bench.py on models small enough to time in a test: what it reports, not how fast it is."""

import csv
import json
import shutil
from pathlib import Path

import pytest

import bench
from config import UserError
from conftest import REPOSITORY, train_runs
from model import make_model

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
    assert any('addmm' in event.get('name', '') for event in events)


def test_attention_layers(workspace, script, capsys, monkeypatch):
    sizes = dict(WIDTHS=(64, 128), MORE_WIDTHS=(256,), LENGTHS=(16, 32), HEADS=(32,))
    for name, value in sizes.items():
        monkeypatch.setattr(bench, name, value)
    script(bench, 'attention', '--rounds=1', '--results=here')
    out, lines = capsys.readouterr().out, list(csv.DictReader(open('here/attention.csv')))
    assert len(lines) == 2 * 2 * 3 * 4  # latents, lengths, widths, kinds
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


def test_grouped_query_attention_caches_no_less_than_mla():
    for width in (128, 512, 1024, 2048):
        lines = bench.formulas(width, 128, 64, 'DeepSeek-V3')
        numbers = [lines[kind]['cache_numbers'] for kind in ('MLA', 'GQA', 'MHA')]
        assert numbers == sorted(numbers)


SWEEP = ['--dataset=text', '--source=corpus.csv', '--tokenizer=byte', '--block_size=32',
         '--n_layer=1', '--n_head=2', '--n_embd=32', '--batch_size=4', '--max_iters=4',
         '--eval_interval=2', '--eval_iters=1', '--device=cpu', '--vocab_size=None']
GRID = [QUICK, *SWEEP, '--attention=mha', '--q_latent=None', '--kv_latent=None',
        '--o_latent=None', '--max_seconds=None', '--rope_dims=16', '--learning_rate=1e-3,3e-3',
        '--seed=1,2']


def groups(script, capfd, *runs):
    """The table of `bench.py compare`: {options: line}."""
    capfd.readouterr()
    script(bench, 'compare', *runs, '--json=True')
    return {line['options']: line for line in json.loads(capfd.readouterr().out)}


@pytest.mark.slow
def test_sweep_and_compare(workspace, script, capfd):
    train_runs(workspace, SWEEP, dict(one=[]))  # leaves the corpus and its data behind
    script(bench, 'sweep', *GRID)
    runs = sorted(Path('out/sweep-quick').iterdir())
    assert [run.name for run in runs] == [
        f'learning_rate={lr},seed={seed}' for lr in ('1e-3', '3e-3') for seed in (1, 2)]

    # a second time only the run that is missing is trained
    shutil.rmtree(runs[3])
    capfd.readouterr()
    script(bench, 'sweep', *GRID)
    out = capfd.readouterr().out
    assert out.count('is done') == 3 and 'step 4' in out

    table = groups(script, capfd, *runs)
    assert [(options, line['runs']) for options, line in table.items()] == [
        ('learning_rate=0.001', 2), ('learning_rate=0.003', 2)]
    lines = [json.loads(line) for run in runs[:2]
             for line in (run / 'metrics.jsonl').read_text().splitlines()]
    losses = [line['val_loss'] for line in lines if line['step'] == 4 and 'val_loss' in line]
    first = table['learning_rate=0.001']
    assert first['tokens'][0] == pytest.approx(sum(losses) / 2) == pytest.approx(first['end'][0])
    for line in table.values():
        assert 0 < line['tokens_to_loss'][0] <= 4 * 4 * 32 and 0 < line['seconds_to_loss'][0]
    script(bench, 'compare', *runs)
    assert 'learning_rate=0.003' in capfd.readouterr().out
    assert Path('out/bench/compare.png').stat().st_size > 10_000

    with pytest.raises(UserError, match='holds a run with n_layer=1, not 2'):
        script(bench, 'sweep', *GRID, '--n_layer=2')
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


@pytest.mark.slow
def test_runs_of_earlier_versions_are_compared_by_the_options_that_still_exist(workspace, script,
                                                                               capfd):
    train_runs(workspace, SWEEP, dict(one=[], two=['--seed=2']))
    path = Path('two/config.json')
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(abandoned=3)))
    assert set(groups(script, capfd, 'one', 'two')) == {'all options the same'}


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
    (['sweep', QUICK, '--dry_run=True'], 'dry_run is not for sweep'),
    (['sweep', QUICK, '--seed=1,1'], 'seed=1,1: names a value twice'),
    (['attention', '--n_layer=3'], 'n_layer: there is no such option'),
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
def test_refusals(script, arguments, message):
    with pytest.raises(UserError) as error:
        script(bench, *arguments)
    assert message in str(error.value)
