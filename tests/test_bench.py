"""bench.py on models small enough to time in a test: what it reports, not how fast it is."""

import functools
import json
from pathlib import Path

import pandas as pd
import pytest
import torch

import bench
from config import UserError
from conftest import REPOSITORY, shell
from model import make_model, training_flops
from run import Device, DeviceOptions
from train import TrainOptions, compiled, read_options

DECODER, ENCODER = REPOSITORY / 'config/decoder.py', REPOSITORY / 'config/mla_o.py'


@pytest.mark.slow
def test_training_and_decoding_are_reported(workspace, script, capsys):
    small = ['--n_layer=1', '--vocab_size=300', '--n_embd=64', '--n_head=2', '--device=cpu']
    script(bench, DECODER, ENCODER, *small, '--rounds=1', '--context=40', '--micro_batch_size=2',
           '--profile=trace.json', '--json=True')
    decoder, encoder = lines = json.loads(capsys.readouterr().out)
    assert [line['config'] for line in lines] == ['decoder', 'mla_o']
    # 15% of an encoder's positions meet the vocabulary
    for line, path, T, predicted in zip(lines, (DECODER, ENCODER), (200, 128), (1, 19 / 128)):
        recipe, options, _ = read_options([str(path), *small])
        model = make_model(recipe.arch, **options)
        flops = line['train_tokens_per_s'] * training_flops(model, T, predicted)
        share = flops / line['matmul_peak_flops_per_s']
        assert line['train_matmul_share'] == pytest.approx(share)
        assert line['params'] == model.n_params() and line['block_size'] == T
        assert line['sequences'] == 2 and line['dtype'] == 'float32'
        assert 50e6 < line['peak_memory_bytes'] < 2e9 and line['matmul_peak_flops_per_s'] > 1e9
    assert decoder['cache_bytes_per_token'] == 2 * 64 * 4  # keys and values of one layer
    assert decoder['context'] == 40 and 'context' not in encoder
    assert 0 < decoder['decode_ms_per_token'] < 1000
    assert decoder['decode_tokens_per_s'] == pytest.approx(1e3 / decoder['decode_ms_per_token'])
    assert decoder['decode_tokens_per_s_together'] > 0
    events = json.loads(Path('trace.json').read_text())['traceEvents']
    assert any(event.get('name') == 'aten::mm' for event in events)
    bench.print_table(pd.DataFrame(lines).set_index('config').T)
    out = capsys.readouterr().out
    assert f'{encoder["params"]:,}' in out and f'{decoder["decode_ms_per_token"]:.4f}' in out


@pytest.fixture
def few_kinds(monkeypatch):
    """Only these kinds of attention are measured: a list, to which a test can add."""
    every, kinds = bench.layer_options, ['MHA', 'GQA', 'MLA', 'MLA-o']
    monkeypatch.setattr(bench, 'layer_options', lambda *size: {
        kind: options for kind, options in every(*size).items() if kind in kinds})
    return kinds


def test_attention_layers(workspace, script, capsys, monkeypatch, few_kinds):
    few_kinds += ['V4, CSA', 'V4, HCA']
    written, save_text = [], bench.save_text
    monkeypatch.setattr(bench, 'save_text', lambda path, text: (
        written.append(text.count('\n') - 1), save_text(path, text)))
    script(bench, 'attention', '--rounds=1', '--results=here', '--layer_widths=64,128',
           '--lengths=16,32', '--head_dims=32', '--tokens=64')
    assert written == [6, 12, 18, 24]  # kinds of each size, as soon as it is measured
    out, frame = capsys.readouterr().out, pd.read_csv('here/attention.csv')
    assert Path('here/attention.png').stat().st_size > 10_000
    assert (frame[list(bench.TIMES)] > 0).all(axis=None)
    assert 'heads of 32, 16 tokens: costs by width, MHA = 1' in out
    size = frame[(frame.width == 128) & (frame['T'] == 16)]
    mflop, cached = (size.set_index('attention')[name] for name in (
        'mflop_per_token', 'cache_elements_per_token'))
    assert mflop['MHA'] == pytest.approx(3 * (2 * 4 * 128 ** 2 + 4 * 128 * 8.5) / 1e6)
    q, kv, r = 24, 8, 16  # 3/14 and 1/14 of 128, as multiples of 8; half of a head
    weights = 128 * (q + kv + r) + q * 128 + kv * (128 - 4 * r + 128) + 128 * 128
    assert mflop['MLA'] == pytest.approx(3 * (2 * weights + 4 * 128 * 8.5) / 1e6)
    assert cached['MHA'] == 2 * 128 and cached['MLA'] == kv + r


def test_grouped_query_attention_caches_no_less_than_mla():
    device, options = Device(DeviceOptions(device='cpu')), bench.AttentionOptions(tokens=1)
    for width in (128, 512, 1024, 2048):
        kinds = bench.layer_options(64, width)
        mla, gqa, mha = (bench.Layer(kinds[name], 128, options, device).count()[
            'cache_elements_per_token'] for name in ('MLA', 'GQA', 'MHA'))
        assert mla <= gqa <= mha


@pytest.mark.slow
def test_attention_layers_are_compiled(workspace, script, few_kinds):
    torch._dynamo.utils.counters.clear()
    script(bench, 'attention', '--rounds=1', '--layer_widths=64', '--lengths=16',
           '--head_dims=32', '--tokens=16', '--compile=True', '--device=cpu')
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] == 4
    assert not torch._dynamo.utils.counters['graph_break']


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
    device = Device(DeviceOptions(device='cpu', dtype='bfloat16'))
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    monkeypatch.setattr(device, 'describe', lambda: name)
    assert device.mfu(1e12) == (peak and 1e12 / peak)


def test_more_than_eight_models_are_compiled_in_one_process(monkeypatch):
    compile, counters = torch.compile, torch._dynamo.utils.counters
    monkeypatch.setattr(torch, 'compile', functools.partial(compile, backend='eager'))
    monkeypatch.setattr(torch, 'use_deterministic_algorithms', lambda *_, **__: None)
    counters.clear()
    device, idx = Device(DeviceOptions(device='cpu')), torch.zeros(1, 8, dtype=torch.long)
    models = [make_model('transformer', vocab_size=50, block_size=8, n_layer=1, n_head=2,
                         n_embd=16 + 2 * i) for i in range(10)]
    runners = [compiled(TrainOptions(compile=True), model, device) for model in models]
    for runner in runners * 2:  # the second time nothing is compiled
        runner(idx, idx)
    assert counters['stats']['unique_graphs'] == 10 and not counters['recompile_limit']


@pytest.mark.parametrize('command, options', [([], ('context', 'rounds')),
                                              (['attention'], ('layer_widths', 'dtype'))])
def test_help_is_one_screen_of_its_own_options(script, capsys, command, options):
    with pytest.raises(SystemExit):
        script(bench, *command, '--help')
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 50
    assert all(any(f'--{name}=' in line for line in lines) for name in options)


@pytest.mark.parametrize('arguments, message', [
    (['attention', '--n_layer=3'], 'n_layer: there is no such option'),
    (['attention', '--layer_widths=100', '--head_dims=32'], 'n_head=3 is not divisible'),
    (['attention', '--head_dims=6'], 'rope_dims=3'),
    ([DECODER, '--jobs=2'], 'jobs: there is no such option'),
    (['--context=1'], 'context=1'),
    (['--rounds=0'], 'rounds=0'),
    (['nowhere.py'], 'nowhere.py: there is no such config file'),
    (['--contxt=10'], 'contxt: there is no such option'),
])
def test_refusals(workspace, script, arguments, message):
    with pytest.raises(UserError) as error:
        script(bench, *arguments)
    assert message in str(error.value)


def test_a_profile_that_cannot_be_written_is_one_line(workspace):
    run = shell(REPOSITORY / 'bench.py', '--profile=nowhere/trace.json')
    assert run.returncode == 2 and run.stdout == ''
    assert run.stderr == 'bench.py: nowhere/trace.json: No such file or directory\n'
