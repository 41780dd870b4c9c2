"""bench.py on models small enough to time in a test: what it reports, not how fast it is."""

import json

import pytest

import bench
from config import UserError
from conftest import REPOSITORY
from model import make_model

SMALL = ['--n_layer=1', '--vocab_size=300', '--rounds=1', '--context=40', '--micro_batch_size=2', '--device=cpu']
TINY = ['--n_embd=20', '--n_head=5']


def paths(*names):
    return [REPOSITORY / f'config/{name}.py' for name in names]


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


@pytest.mark.parametrize('arguments, message', [
    (['--context=1'], 'context=1: takes two tokens or more'),
    (['--rounds=0'], 'rounds=0: takes a finite number above zero'),
    (['nowhere.py'], 'nowhere.py: there is no such config file'),
    (['--contxt=10'], 'there is no such option; did you mean context'),
])
def test_refusals(script, arguments, message):
    with pytest.raises(UserError) as error:
        script(bench, *arguments)
    assert message in str(error.value)
