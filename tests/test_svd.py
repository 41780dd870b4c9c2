"""svd.py: spectra against numpy's on whole products, planted ranks found, checkpoints read and
refused; and the matrices of every attention, which it starts from."""

import json
import os
import re
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import svd
from config import UserError
from conftest import REPOSITORY, shell, train_runs
from deepseek import Checkpoint, to_deepseek
from model import BlockConfig, join_heads, make_attention
from run import load_run

HF = dict(model_type='deepseek_v3', num_hidden_layers=2, num_attention_heads=4, hidden_size=40,
          q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=12)


def layer_of(c, i, generator, plant=None):
    """The attention of one layer at the sizes of a config.json; `plant`: the rank of what o_proj
    holds beside noise."""
    D, H = c['hidden_size'], c['num_attention_heads']
    plain, r, dv = c['qk_nope_head_dim'], c['qk_rope_head_dim'], c['v_head_dim']
    q, kv, layer = c['q_lora_rank'], c['kv_lora_rank'], f'model.layers.{i}'

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    def gain(n):
        return 1 + 0.3 * randn(n)

    if plant is None:
        o = randn(D, H * dv)
    else:
        o = randn(D, plant) @ randn(plant, H * dv) + 0.01 * randn(D, H * dv)
    return {f'{layer}.self_attn.q_a_proj.weight': randn(q, D),
            f'{layer}.self_attn.q_a_layernorm.weight': gain(q),
            f'{layer}.self_attn.q_b_proj.weight': randn(H * (plain + r), q),
            f'{layer}.self_attn.kv_a_layernorm.weight': gain(kv),
            f'{layer}.self_attn.kv_a_proj_with_mqa.weight': randn(kv + r, D),
            f'{layer}.self_attn.kv_b_proj.weight': randn(H * (plain + dv), kv),
            f'{layer}.self_attn.o_proj.weight': o,
            f'{layer}.input_layernorm.weight': gain(D)}


def write_checkpoint(folder, c, layers):
    """One shard a layer, and their index."""
    folder.mkdir()
    (folder / 'config.json').write_text(json.dumps(c))
    index = {}
    for i, tensors in enumerate(layers):
        save_file(tensors, folder / f'model-{i}.safetensors')
        index |= dict.fromkeys(tensors, f'model-{i}.safetensors')
    (folder / 'model.safetensors.index.json').write_text(json.dumps(dict(weight_map=index)))
    return folder


@pytest.fixture
def checkpoint(workspace):
    generator = torch.Generator().manual_seed(0)
    layers = [layer_of(HF, i, generator) for i in range(2)]
    return write_checkpoint(workspace / 'deepseek', HF, layers), layers


def read_result(folder):
    return json.loads((Path(folder) / 'svd.json').read_text())


def assert_same(found, matrix):
    """The values found are the leading ones of the matrix, to 1e-6 of the largest, and the rest of
    it is zero."""
    values = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    found = np.array(found)
    assert np.abs(found - values[:len(found)]).max() < 1e-6 * values[0]
    assert np.all(values[len(found):] < 1e-6 * values[0])


def test_spectra_are_those_of_the_whole_products(checkpoint, script, capsys):
    folder, layers = checkpoint
    script(svd, folder, '--align=True')
    for found, weights in zip(read_result('out/svd-deepseek')['layers'], layers):
        w = {name.split('.')[-2]: value for name, value in weights.items()}
        gain = w['input_layernorm']
        q = w['q_b_proj'] @ (w['q_a_layernorm'][:, None] * w['q_a_proj'] * gain)
        kv_a = w['kv_a_proj_with_mqa'] * gain
        kv = w['kv_b_proj'] @ (w['kv_a_layernorm'][:, None] * kv_a[:16])
        q, kv = q.view(4, 12, 40), kv.view(4, 20, 40)
        o = w['o_proj'].view(40, 4, 12).transpose(0, 1)
        whole = dict(q=q[:, :8], k=kv[:, :8], qk=q[:, :8].mT @ kv[:, :8], v=kv[:, 8:], o=o,
                     vo=o @ kv[:, 8:], q_rope=q[:, 8:], k_rope=kv_a[None, 16:],
                     qk_rope=q[:, 8:].mT @ kv_a[16:])
        assert set(found['kinds']) == set(whole)
        for kind, heads in whole.items():
            for values, head in zip(found['kinds'][kind]['heads'], heads, strict=True):
                assert_same(values, head)
            normed = [head / torch.linalg.matrix_norm(head, 2) for head in heads]
            side_by_side = torch.cat(normed, dim=1 if kind in ('qk', 'qk_rope', 'o', 'vo') else 0)
            assert_same(found['kinds'][kind]['stacked'], side_by_side)
    out = capsys.readouterr().out
    assert 'layer 1' in out and 'noise' in out and 'between heads' in out
    for name in ('layers.png', 'heads.png'):
        assert Path('out/svd-deepseek', name).stat().st_size > 10_000


ATTENTIONS = {
    'mha': dict(n_kv_head=2, qk_norm=True),
    'no_rope': dict(rope_dims=0),
    'mla': dict(attention='mla', q_latent=10, kv_latent=12),
    'mla_shared': dict(attention='mla', kv_latent=12, rope_key='shared', v_head_dim=6),
    'mla_o': dict(attention='mla', kv_latent=12, o_latent=9),
    'mla_o_sum': dict(attention='mla', kv_latent=12, o_latent=9, o_norm='sum'),
    'mla_o_head': dict(attention='mla', kv_latent=12, o_latent=9, o_norm='head', rope_dims=8),
    'gla': dict(attention='mla', kv_latent=12, kv_groups=2, rope_key='shared'),
    'mlra': dict(attention='mla', kv_latent=12, kv_groups=2, kv_branches=3, o_latent=9, o_groups=4),
    'gta': dict(attention='gta', n_kv_head=2, o_latent=9, o_groups=2, o_norm='head'),
    'gta_no_rope': dict(attention='gta', rope_dims=0, o_latent=9, o_groups=2, o_norm='sum'),
    'mfa': dict(attention='mfa', q_latent=10, head_dim=12),
}


@pytest.mark.parametrize('name', ATTENTIONS)
def test_matrices_are_what_an_attention_does(name):
    """Up to what norms divide by, which is one number for a token, or for a head of it."""
    torch.manual_seed(0)
    options = dict(n_head=4, n_embd=32, rope_dims=4) | ATTENTIONS[name]
    attention, seen = make_attention(BlockConfig(**options)).requires_grad_(False), {}
    for weight in attention.parameters():
        torch.nn.init.normal_(weight, mean=1.0 if weight.dim() == 1 else 0.0, std=0.3)
    attention.attend = lambda q, k, v, key_mask: seen.update(q=q, k=k, v=v) or join_heads(v)
    x, r = torch.randn(1, 5, 32), attention.rope_dims
    unturned = torch.stack((torch.ones(5, r // 2), torch.zeros(5, r // 2))) if r else None
    attention.heads(x, x, rope=unturned, source_rope=unturned)
    (q_rope, q), (k_rope, k) = (seen[side].tensor_split([r], dim=-1) for side in 'qk')
    vectors = dict(q=q, k=k, v=seen['v'], q_rope=q_rope, k_rope=k_rope)
    matrices = {part: svd.whole(*matrices) for part, matrices in attention.matrices().items()}
    assert set(matrices) == {'o'} | {part for part in vectors if vectors[part].size(-1)}

    def assert_same_direction(a, b):
        assert torch.allclose(F.normalize(a, dim=-1), F.normalize(b, dim=-1), atol=1e-5)

    for part in set(matrices) - {'o'}:
        assert_same_direction(x @ matrices[part].mT, vectors[part][0])
    for i, matrix in enumerate(matrices['o']):  # with branches, each head several times
        y, h = torch.zeros(1, 1, 4, attention.v_head_dim), i % 4
        y[..., h, :] = torch.randn(attention.v_head_dim)
        assert_same_direction(y[0, :, h] @ matrix, attention.o_proj(y.flatten(2))[0])


def test_effective_rank():
    assert svd.effective_rank([1.0, 1.0, 1.0, 0.0], 0.01) == 3
    assert svd.effective_rank([10.0, 1.0], 0.01) == 1  # 1/101 of the energy
    assert svd.effective_rank([10.0, 1.01], 0.01) == 2  # a little more than a hundredth
    assert svd.effective_rank([1.0], 0.001) == 1


def test_fp8_blocks_and_bf16(workspace):
    weight = torch.randn(300, 200)
    scale = torch.rand(3, 2) + 0.5
    whole = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:300, :200]
    folder = write_checkpoint(workspace / 'fp8', HF, [dict(
        a=(weight / whole).to(torch.float8_e4m3fn), a_scale_inv=scale, b=weight.bfloat16())])
    tensors = Checkpoint(folder)
    assert (tensors['a'] - weight).abs().max() < 0.07 * weight.abs().max()
    assert tensors['a'].dtype == torch.float32
    assert torch.equal(tensors['a'], (weight / whole).to(torch.float8_e4m3fn).float() * whole)
    assert torch.equal(tensors['b'], weight.bfloat16().float())


def test_planted_rank_is_found(workspace, script):
    """Wide enough for noise to be noise; the rank is drawn at random, the noise is a hundredth of
    the signal."""
    rank = int(torch.randint(5, 40, ()))
    c = HF | dict(hidden_size=160, num_attention_heads=6, v_head_dim=32, num_hidden_layers=1)
    generator = torch.Generator().manual_seed(rank)
    folder = write_checkpoint(workspace / 'planted', c, [layer_of(c, 0, generator, plant=rank)])
    script(svd, folder)
    result = read_result('out/svd-planted')
    noise_layer, = result['noise'].values()
    found, noise = result['layers'][0]['kinds']['o'], noise_layer['kinds']['o']
    assert 0.7 * rank <= found['effective_rank']['0.001']['stacked'][0] <= rank
    assert rank < noise['effective_rank']['0.01']['stacked'][0]
    gap = np.array(found['stacked'])
    assert gap[rank - 1] > 5 * gap[rank]


def wide(**options):
    """A config.json of a width at which noise is noise."""
    return HF | dict(hidden_size=160, num_attention_heads=6, v_head_dim=32, q_lora_rank=64,
                     kv_lora_rank=48, qk_nope_head_dim=32, qk_rope_head_dim=16) | options


@pytest.mark.parametrize('plant, verdict', [
    (10, 'clearly below noise (at most 90% of its rank with 1% left out), of 2 layers: '
         'o in 2, vo in 2\n'),
    (None, 'nothing below noise: these weights have hardly been trained\n'),
])
def test_says_what_was_found(workspace, script, capsys, plant, verdict):
    generator = torch.Generator().manual_seed(0)
    layers = [layer_of(wide(), i, generator, plant) for i in range(2)]
    for layer in layers:
        layer |= {name: torch.ones_like(w) for name, w in layer.items() if 'layernorm' in name}
    script(svd, write_checkpoint(workspace / 'x', wide(), layers))
    assert verdict in capsys.readouterr().out


def test_both_published_shares_are_reported(checkpoint, script, capsys):
    script(svd, checkpoint[0], '--stacked=False')
    out = capsys.readouterr().out
    assert 'effective rank, 1% or 0.1% of the energy left out' in out
    header, _, _, *rows = (line.split() for line in out.splitlines()[2:9])
    layers = read_result('out/svd-deepseek')['layers']
    for layer, first, second in zip(layers, rows[::2], rows[1::2], strict=True):
        assert first[:3] == [*layer['layer'].split(), '1%'] and second[0] == '0.1%'
        ranks = [[layer['kinds'][kind]['effective_rank'][share]['heads'] for kind in header[2:]]
                 for share in ('0.01', '0.001')]
        assert first[3:-2] == [f'{np.mean(heads):.1f}' for heads in ranks[0]]
        assert second[1:] == [f'{np.mean(heads):.1f}' for heads in ranks[1]]


def test_another_share_of_the_energy(checkpoint, script, capsys):
    script(svd, checkpoint[0], '--discarded=0.3', '--layers=1')
    out = capsys.readouterr().out
    assert 'effective rank, 30% of the energy left out' in out
    layer, = read_result('out/svd-deepseek')['layers']
    found = layer['kinds']['q']
    assert set(found['effective_rank']) == {'0.01', '0.001', '0.3'}
    energy = np.square(found['stacked'])
    rank = found['effective_rank']['0.3']['stacked'][0]
    assert energy[rank:].sum() <= 0.3 * energy.sum() < energy[rank - 1:].sum()
    mean = np.mean(found['effective_rank']['0.3']['heads'])
    assert f'layer 1 30% {rank} / {mean:.1f}'.split() == out[out.index('layer 1'):].split()[:6]


def test_a_curve_for_each_head_that_meets_its_shares_at_the_ranks(checkpoint, script, monkeypatch):
    figures, save_figure = {}, svd.save_figure

    def keep(figure, path):
        figures[path.name] = figure
        save_figure(figure, path)

    monkeypatch.setattr(svd, 'save_figure', keep)
    script(svd, checkpoint[0])
    assert set(figures) == {'layers.png', 'heads.png'}
    script(svd, checkpoint[0], '--plot_heads=True')
    assert set(figures) == {'layers.png', 'heads.png', 'spectra-0.png', 'spectra-1.png'}
    for layer in read_result('out/svd-deepseek')['layers']:
        name = f'spectra-{layer["number"]}.png'
        assert Path('out/svd-deepseek', name).stat().st_size > 10_000
        panels = {axes.get_title(): axes for axes in figures[name].axes if axes.get_title()}
        assert len(panels) == len(layer['kinds'])
        for kind, found in layer['kinds'].items():
            lines, = panels[svd.label_of(kind)].collections
            curves = [segment[:, 1] for segment in lines.get_segments()]
            for share, ranks in found['effective_rank'].items():
                below = [int((curve <= float(share)).argmax()) for curve in curves]
                assert below == ranks['heads']


KILLED = '''
import os, signal, svd

analyse_layer = svd.analyse_layer

def killed_in_layer_1(*layers, options):
    if layers[0].name == 'layer 1':
        os.kill(os.getpid(), signal.SIGKILL)
    return analyse_layer(*layers, options=options)

svd.analyse_layer = killed_in_layer_1
svd.main()
'''


def table(out):
    """The lines that a call prints after those about what it has kept, without its seconds."""
    lines = out[out.index('\n\n'):].splitlines()
    return [re.sub(r' +([0-9.]+ s|kept)$', '', line) for line in lines[:-1]]


def test_a_killed_call_goes_on(checkpoint, script, capsys):
    folder, arguments = checkpoint[0], ['--align=True', '--plot_heads=True']
    lines = Path('out/svd-deepseek/svd.jsonl')
    script(svd, folder, *arguments, '--out_dir=whole')
    whole = table(capsys.readouterr().out)
    result = shell('-c', KILLED, folder, *arguments, env=os.environ | dict(PYTHONPATH=REPOSITORY))
    assert result.returncode == -signal.SIGKILL
    assert len(lines.read_text().splitlines()) == 2  # layer 0, and the noise

    def assert_same_as_whole():
        for path in Path('whole').iterdir():
            assert path.read_bytes() == Path('out/svd-deepseek', path.name).read_bytes() \
                or path.name == 'svd.jsonl'
        out = capsys.readouterr().out
        assert table(out) == whole
        return out

    with open(lines, 'a') as file:
        file.write('{"sha256": "00", "line": {"number": 1, "sta')  # a kill in the middle of a line
    script(svd, folder, *arguments)
    out = assert_same_as_whole()
    assert 'svd.jsonl: 1 of its lines are cut off or damaged' in out
    assert [row.split()[-1] == 'kept' for row in out.splitlines() if re.match('layer . +1%', row)] \
        == [True, False]
    lines.write_text(lines.read_text().replace('"heads": [[', '"heads": [[9', 1))
    script(svd, folder, '--align=True')  # a line that has been changed does not count
    assert assert_same_as_whole().count('kept\n') == 1
    script(svd, folder, '--align=True', '--discarded=0.2')  # nothing is left to do
    assert capsys.readouterr().out.count('kept\n') == 2


def test_results_of_other_options_and_files_are_kept_apart(checkpoint, script, capsys):
    folder, result = checkpoint[0], Path('out/svd-deepseek/svd.json')
    script(svd, folder, '--align=True')
    aligned = result.read_bytes()
    capsys.readouterr()
    script(svd, folder, '--align=True', '--seed=2')
    out = capsys.readouterr().out
    assert 'svd.jsonl: 3 of its lines are of other options or files: they stay there' in out
    assert 'kept' not in out and result.read_bytes() != aligned
    script(svd, folder, '--align=True')
    assert capsys.readouterr().out.count('kept\n') == 2 and result.read_bytes() == aligned
    os.utime(folder / 'model-1.safetensors', (0, 0))
    script(svd, folder, '--align=True')  # layer 0 has been compared with layer 1
    out = capsys.readouterr().out
    assert '5 of its lines are of other options or files' in out and 'kept' not in out
    script(svd, folder, '--align=True', '--layers=0')
    assert read_result('out/svd-deepseek')['layers'][0]['alignment'].keys() == {
        'between heads', 'own queries', 'own keys'}


def test_everything_is_computed_on_the_device(checkpoint):
    """On a device that computes no numbers: whatever was left on the CPU would be refused."""
    layer = next(svd.read_checkpoint(checkpoint[0]))
    noise = svd.noise_like(svd.shapes_of(layer.read()), 1, 'meta')
    for parts in (svd.load(layer, 'meta'), noise):
        thin = {name: svd.thinned(*part) for name, part in parts.items()}
        for x in (*thin.values(), svd.fused(thin['q'], thin['k']), svd.fused(thin['o'], thin['v'])):
            values = torch.linalg.svdvals(x.double())
            stacked = svd.stacked_values(x, [head[0] for head in values])
            assert x.is_meta and values.is_meta and stacked.is_meta
        assert all(subspace.is_meta for subspace in svd.subspaces(parts['q'], shared=True))


RUN = ['--dataset=text', '--source=corpus.csv', '--tokenizer=byte', '--block_size=32',
       '--n_layer=2', '--batch_size=8', '--max_iters=2', '--eval_iters=1', '--device=cpu',
       '--rope_dims=8']
PLAIN = ['--n_head=2', '--n_embd=32', '--learned_positions=False']
GROUPED = ['--arch=grouped_latent', '--group_size=8', '--latents=2', '--widths=32,32',
           '--head_dim=8']
MLA = ['--attention=mla', '--kv_latent=8', '--o_latent=12']


@pytest.mark.slow
def test_our_runs_and_their_deepseek_twin(tmp_path, script, monkeypatch):
    """The same model, as a run and in DeepSeek-V3's layout, has the same spectra."""
    train_runs(tmp_path, RUN, dict(grouped=[*GROUPED, '--compress=perceiver', *MLA]))
    train_runs(tmp_path, RUN + PLAIN, dict(
        mha=['--n_kv_head=1', '--qk_norm=True'],
        o_sum=[*MLA, '--o_norm=sum'],
        o_head=[*MLA, '--o_norm=head'],
        encdec=['--arch=encoder_decoder', '--n_kv_head=1'],
        mla=[*MLA[:2], '--q_latent=12', '--rope_key=shared', '--norm=rms', '--mlp=swiglu',
             '--seed=3']))
    monkeypatch.chdir(tmp_path)
    for run in ('mha', 'o_sum', 'o_head', 'encdec', 'grouped', 'mla'):
        script(svd, run, '--align=True')
        assert (tmp_path / run / 'layers.png').exists()
    layers = read_result('encdec')['layers']
    assert [layer['layer'] for layer in layers] == [
        'encoder.0', 'encoder.1', 'decoder.0', 'decoder.0.cross', 'decoder.1', 'decoder.1.cross']
    model, _, _ = load_run('mla')
    weights, hf_config = to_deepseek(model)
    os.mkdir('twin')
    save_file({name: value.clone() for name, value in weights.items()}, 'twin/model.safetensors')
    Path('twin/config.json').write_text(json.dumps(hf_config))
    script(svd, 'twin')
    ours, twin = read_result('mla')['layers'], read_result('out/svd-twin')['layers']
    for our_layer, their_layer in zip(ours, twin, strict=True):
        for kind, found in our_layer['kinds'].items():
            of_twin = their_layer['kinds'][kind]
            assert np.allclose(found['stacked'], of_twin['stacked'], rtol=1e-4, atol=1e-6)


def test_heads_of_zeros_and_one_of_the_layers(workspace, script):
    layer = layer_of(HF, 1, torch.Generator().manual_seed(0))
    layer['model.layers.1.self_attn.o_proj.weight'][:, :12] = 0
    folder = write_checkpoint(workspace / 'zeros', HF, [layer_of(HF, 0, torch.Generator()), layer])
    script(svd, folder, '--layers=1', '--align=True', '--plot_heads=True')
    layer, = read_result('out/svd-zeros')['layers']
    assert layer['number'] == 1 and layer['kinds']['o']['heads'][0] == [0.0] * 12
    assert 'next keys' not in layer['alignment']


def test_channels_are_refused(tmp_path, script, monkeypatch):
    train_runs(tmp_path, RUN, dict(grouped=[*GROUPED, '--n_channels=2', '--channels_every=2']))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match='has parallel channels'):
        script(svd, 'grouped')


def test_heads_without_matrices_are_refused(tmp_path, script, monkeypatch):
    train_runs(tmp_path, RUN + PLAIN, dict(tpa=['--attention=tpa', '--kv_rank=2']))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match='tpa: no matrix of a head .* in TPA'):
        script(svd, 'tpa')


def test_groups_of_heads_have_the_rank_of_their_latent(tmp_path, script, monkeypatch):
    """GLA with grouped output latents: two latents of 3 for four heads, and noise of that kind."""
    train_runs(tmp_path, RUN + PLAIN, dict(gla=[
        '--n_head=4', '--rope_dims=2', '--attention=mla', '--kv_latent=3', '--kv_groups=2',
        '--o_latent=5', '--o_groups=2']))
    monkeypatch.chdir(tmp_path)
    script(svd, 'gla', '--align=True')
    found = read_result('gla')
    for layer in (found['layers'][0], next(iter(found['noise'].values()))):
        ranks = {kind: sum(value > 1e-6 * max(values['stacked']) for value in values['stacked'])
                 for kind, values in layer['kinds'].items()}
        assert (ranks['k'], ranks['v'], ranks['o'], ranks['q']) == (6, 6, 10, 24)


LLAMA = dict(model_type='llama', num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
             hidden_size=32)


def llama_layer():
    attn = 'model.layers.0.self_attn'
    return {f'{attn}.q_proj.weight': torch.randn(32, 32),
            f'{attn}.k_proj.weight': torch.randn(16, 32),
            f'{attn}.v_proj.weight': torch.randn(16, 32),
            f'{attn}.o_proj.weight': torch.randn(32, 32),
            'model.layers.0.input_layernorm.weight': torch.ones(32)}


def test_llama(workspace, script):
    tensors = llama_layer()
    script(svd, write_checkpoint(workspace / 'llama', LLAMA, [tensors]))
    found = read_result('out/svd-llama')['layers'][0]['kinds']
    assert len(found['vo']['heads']) == 4 and len(found['v']['heads']) == 2 and 'q' not in found
    o, v = (tensors[f'model.layers.0.self_attn.{name}_proj.weight'] for name in 'ov')
    assert_same(found['vo']['heads'][3], o[:, 24:] @ v[8:])


@pytest.mark.parametrize('family, changes, message', [
    ('deepseek', dict(num_attention_heads=0), 'num_attention_heads=0: takes an int from 1'),
    ('deepseek', dict(num_attention_heads=4.0), 'num_attention_heads=4.0: takes an int from 1'),
    ('deepseek', dict(num_attention_heads='4'), "num_attention_heads='4': takes an int from 1"),
    ('deepseek', dict(num_attention_heads=10 ** 30), 'layer 0 does not fit config.json'),
    ('deepseek', dict(num_attention_heads=10 ** 12), 'layer 0 does not fit config.json'),
    ('deepseek', dict(num_key_value_heads=2), 'num_key_value_heads=2: latent attention has as'),
    ('deepseek', dict(kv_lora_rank=None), 'kv_lora_rank=None: takes an int from 1'),
    ('deepseek', dict(q_lora_rank=[24]), 'q_lora_rank=.24.: takes an int from 1'),
    ('deepseek', dict(qk_rope_head_dim=5), 'layer 0 does not fit config.json'),
    ('deepseek', dict(hidden_size=41), 'layer 0 does not fit config.json'),
    ('deepseek', dict(num_hidden_layers=True), 'num_hidden_layers=True: takes the number of'),
    ('deepseek', dict(num_hidden_layers=0), 'num_hidden_layers=0: takes the number of layers'),
    ('deepseek', dict(num_hidden_layers=10 ** 12), 'layers that its 16 tensors belong to'),
    ('deepseek', dict(num_hidden_layers=3), 'has no model.layers.2.self_attn.o_proj.weight'),
    ('deepseek', dict(quantization_config='fp8'), 'scales in other blocks than 128 x 128'),
    ('llama', dict(num_attention_heads=0), 'num_attention_heads=0: takes an int from 1'),
    ('llama', dict(num_attention_heads=5), 'hidden_size=32 is not divisible by num_attention_he'),
    ('llama', dict(num_attention_heads=True), 'num_attention_heads=True: takes an int from 1'),
    ('llama', dict(num_key_value_heads=3), 'n_head=4 is not divisible by n_kv_head=3'),
    ('llama', dict(num_key_value_heads=4), r'k_proj.weight: has the shape \(16, 32\), hf_config'),
    ('llama', dict(num_key_value_heads=-2), 'num_key_value_heads=-2: takes an int from 1'),
    ('llama', dict(head_dim=0), 'head_dim=0: takes an int from 1'),
    ('llama', dict(head_dim=16), 'q_proj.weight: has the shape'),
])
def test_refuses_a_config_that_contradicts_the_tensors(checkpoint, script, family, changes,
                                                       message):
    c = LLAMA if family == 'llama' else HF
    folder = checkpoint[0]
    if family == 'llama':
        folder = write_checkpoint(Path('llama'), c, [llama_layer()])
    (folder / 'config.json').write_text(json.dumps(c | changes))
    with pytest.raises(UserError, match=message):
        script(svd, folder)


@pytest.mark.parametrize('name, tensor, message', [
    ('self_attn.q_proj', torch.randn(1024), r'q_proj.weight: has the shape \(1024,\)'),
    ('self_attn.k_proj', torch.randn(0, 32), r'k_proj.weight: has the shape \(0, 32\)'),
    ('self_attn.v_proj', torch.tensor(1.0), r'v_proj.weight: has the shape \(\)'),
    ('input_layernorm', torch.tensor(1.0), r'input_layernorm.weight: has the shape \(\)'),
    ('input_layernorm', torch.ones(31), r'input_layernorm.weight: has the shape \(31,\)'),
    ('input_layernorm', torch.full((32,), 3e38), 'are too large for float32'),
])
def test_refuses_tensors_of_other_shapes_and_sizes(workspace, script, name, tensor, message):
    layer = llama_layer() | {f'model.layers.0.{name}.weight': tensor}
    with pytest.raises(UserError, match=message):
        script(svd, write_checkpoint(workspace / 'llama', LLAMA, [layer]))


def test_refuses_scales_that_are_not_finite(workspace):
    for weight, scale in ((torch.ones(8, 8), torch.full((1, 1), float('inf'))),
                          (torch.full((8, 8), float('nan')), torch.ones(1, 1)),
                          (torch.ones(8), torch.ones(1))):
        folder = write_checkpoint(workspace / f'{weight.dim()}{scale.max()}{weight.max()}', HF, [
            dict(a=weight.to(torch.float8_e4m3fn), a_scale_inv=scale)])
        with pytest.raises(UserError, match='not finite|not a scale for each block'):
            Checkpoint(folder)['a']


def change_index(folder, files):
    """Enters these files of tensors into the index; None takes a tensor out of it."""
    path = folder / 'model.safetensors.index.json'
    weight_map = json.loads(path.read_text())['weight_map'] | files
    weight_map = {name: file for name, file in weight_map.items() if file}
    path.write_text(json.dumps(dict(weight_map=weight_map)))


def damage(folder, kind):
    if kind == 'missing shard':
        (folder / 'model-1.safetensors').unlink()
    elif kind == 'truncated':
        path = folder / 'model-1.safetensors'
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == 'missing tensor':
        change_index(folder, {'model.layers.1.self_attn.kv_b_proj.weight': None})
    elif kind == 'no o_proj':
        change_index(folder, {'model.layers.0.self_attn.o_proj.weight': None})
    elif kind == 'no weights':
        for path in folder.glob('model*'):
            path.unlink()
    elif kind == 'broken config':
        (folder / 'config.json').write_text('{')
    elif kind == 'a list':
        (folder / 'config.json').write_text('[]')
    elif kind == 'no head width':
        without = {k: v for k, v in HF.items() if k != 'qk_nope_head_dim'}
        (folder / 'config.json').write_text(json.dumps(without))
    elif kind == 'other heads':
        (folder / 'config.json').write_text(json.dumps(HF | dict(num_attention_heads=7)))
    elif kind == 'other blocks':
        quantization = dict(quantization_config=dict(weight_block_size=[64, 64]))
        (folder / 'config.json').write_text(json.dumps(HF | quantization))
    else:
        path = folder / 'model-1.safetensors'
        tensors = {name: value.clone() for name, value in load_file(path).items()}
        name = 'model.layers.1.self_attn.o_proj.weight'
        if kind == 'no scales':
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        elif kind == 'one scale':
            tensors[f'{name}_scale_inv'] = torch.ones(1)
            change_index(folder, {f'{name}_scale_inv': path.name})
        else:
            tensors[name] = tensors[name] * float('nan')
        save_file(tensors, path)


@pytest.mark.parametrize('kind, message', [
    ('missing shard', 'model-1.safetensors: this shard is missing'),
    ('truncated', 'model-1.safetensors: truncated or damaged'),
    ('missing tensor', 'model.layers.1.self_attn.kv_b_proj.weight: missing from the checkpoint'),
    ('no o_proj', 'has no model.layers.0.self_attn.o_proj.weight'),
    ('no weights', 'holds no safetensors'),
    ('broken config', 'config.json: cannot be read'),
    ('a list', 'config.json: cannot be read'),
    ('no head width', 'config.json: has no qk_nope_head_dim'),
    ('other heads', 'layer 0 does not fit config.json'),
    ('other blocks', 'in other blocks than 128 x 128'),
    ('no scales', 'o_proj.weight is torch.float8_e4m3fn without'),
    ('one scale', r'o_proj.weight_scale_inv has the shape \(1,\), which is not a scale for each'),
    ('not finite', 'o_proj.weight holds numbers that are not finite'),
])
def test_refuses_damaged_checkpoints(checkpoint, script, kind, message):
    damage(checkpoint[0], kind)
    with pytest.raises(UserError, match=message):
        script(svd, checkpoint[0])
    assert not list(Path().rglob('svd.json'))


@pytest.mark.parametrize('arguments, message', [
    (['nowhere'], 'nowhere/config.json: cannot be read'),
    ([], 'which weights'),
    (['deepseek', '--layers=7'], 'layer 7: deepseek has layers 0 to 1'),
    (['deepseek', '--heads_of=2'], 'layer 2: deepseek has layers 0 to 1'),
    (['deepseek', '--out_dir=deepseek/config.json'], 'cannot be written'),
    (['deepseek', '--out_dir=deepseek/config.json/below'], 'cannot be written'),
    (['deepseek/config.json'], 'is a file: name the folder'),
    (['deepseek', '-align=True'], '-align=True: options are written --key=value'),
    (['deepseek', '--layers=(0,x)'], 'takes .* or None'),
    (['deepseek', '--discarded=1.0'], r'takes \(a finite number above 0 below 1, ...\)'),
    (['deepseek', '--device=meta'], '--device=meta: no device here'),
    (['deepseek', '--device=gpu'], '--device=gpu: no device here that computes in float64'),
    (['deepseek', '--device=hpu'], '--device=hpu: no device here'),
])
def test_refusals(checkpoint, script, arguments, message):
    with pytest.raises(UserError, match=message):
        script(svd, *arguments)


TRUE_WIDTH = dict(model_type='deepseek_v3', num_hidden_layers=2, num_attention_heads=128,
                  hidden_size=7168, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128,
                  qk_rope_head_dim=64, v_head_dim=128)


@pytest.mark.slow
def test_deepseek_at_true_width(workspace):
    """Two layers; the heads alone. Both take no more memory than one."""
    # what is freed goes back to the system, so that the peaks do not depend on where it lay
    environment = os.environ | dict(MALLOC_MMAP_THRESHOLD_='131072')
    rank = int(torch.randint(40, 100, ()))
    layers = (layer_of(TRUE_WIDTH, i, torch.Generator().manual_seed(i), plant=rank)
              for i in range(2))
    folder = write_checkpoint(workspace / 'wide', TRUE_WIDTH, layers)
    peaks = []
    for name, layers in (('one', '0'), ('both', 'None')):  # in two folders, so that both start anew
        command = [sys.executable, svd.__file__, str(folder), '--stacked=False',
                   f'--layers={layers}', f'--out_dir={name}']
        process = os.posix_spawn(sys.executable, command, environment)
        _, status, usage = os.wait4(process, 0)
        assert status == 0
        peaks.append(usage.ru_maxrss)
    assert peaks[1] < 1.1 * peaks[0]
    for layer in read_result('both')['layers']:
        ranks = layer['kinds']['o']['effective_rank']['0.001']['heads']
        assert len(ranks) == 128 and max(ranks) <= rank and min(ranks) > 0.7 * min(rank, 128)
        values = np.array(layer['kinds']['o']['heads'])
        assert (values[:, rank - 1] > 5 * values[:, rank]).all()


def test_alignment_is_that_of_known_subspaces():
    """Three heads in 12 dimensions: the first two write the same plane, the third an orthogonal
    one, which is what the layer reads."""
    axes = torch.eye(12)
    first, second, third = axes[:2], torch.tensor([[1.0, 2.0], [3.0, -1.0]]) @ axes[:2], axes[4:6]
    parts = dict(o=(torch.stack((first, second, third)), None),
                 q=(torch.randn(3, 2, 2), axes[4:6]), k=(torch.randn(3, 2, 3), axes[3:6]))
    written = svd.subspaces(parts['o'], shared=False)
    following = svd.read_by(dict(k_rope=(axes[None, :2], None)), written, 'next')
    found = svd.alignment(parts, written) | following
    for name in ('between heads', 'own queries', 'own keys'):
        assert found[name]['cos2'] == pytest.approx(1 / 3, abs=1e-5)
    assert found['next keys']['cos2'] == pytest.approx(2 / 3, abs=1e-5)
    assert 'next queries' not in found
    a, b = torch.tensor([[1.0, 0.0]]).t(), torch.tensor([[0.5, 0.75 ** 0.5]]).t()
    assert svd.overlap([(a, b)]) == pytest.approx(dict(cos2=0.25, smallest_angle=60.0), abs=1e-4)
