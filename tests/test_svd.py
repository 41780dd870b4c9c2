"""svd.py: its matrices are what each attention computes, its spectra are numpy's of whole products,
planted ranks are found, and checkpoints are read or refused."""

import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import conftest
import model
import svd
from config import UserError
from deepseek import Checkpoint, to_deepseek, write_checkpoint
from model import ARCHITECTURES, BlockConfig, ChannelBlock, make_attention, make_model
from run import save_checkpoint

HF = dict(model_type='deepseek_v3', num_hidden_layers=2, num_attention_heads=4, hidden_size=40,
          q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=12)
LLAMA = dict(model_type='llama', num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
             hidden_size=32)
draw = svd.plot


@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    """{file: curves} of the plots, which are not drawn: that takes half a second each."""
    drawn = {}
    monkeypatch.setattr(svd, 'plot', lambda path, title, curves, **settings: drawn.update(
        {path.name: curves}))
    return drawn


def mla_layer(c, i, generator, plant=None):
    """Tensors of one layer with the sizes of a config.json. plant: the rank of o_proj, under noise
    of a hundredth of its size."""
    D, H = c['hidden_size'], c['num_attention_heads']
    plain, r, dv = c['qk_nope_head_dim'], c['qk_rope_head_dim'], c['v_head_dim']
    q, kv, layer = c['q_lora_rank'], c['kv_lora_rank'], f'model.layers.{i}'

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    def gain(n):
        return 1 + 0.3 * randn(n)

    o = randn(D, H * dv)
    if plant:
        o = randn(D, plant) @ randn(plant, H * dv) + 0.01 * o
    return {f'{layer}.self_attn.q_a_proj.weight': randn(q, D),
            f'{layer}.self_attn.q_a_layernorm.weight': gain(q),
            f'{layer}.self_attn.q_b_proj.weight': randn(H * (plain + r), q),
            f'{layer}.self_attn.kv_a_layernorm.weight': gain(kv),
            f'{layer}.self_attn.kv_a_proj_with_mqa.weight': randn(kv + r, D),
            f'{layer}.self_attn.kv_b_proj.weight': randn(H * (plain + dv), kv),
            f'{layer}.self_attn.o_proj.weight': o,
            f'{layer}.input_layernorm.weight': gain(D)}


def llama_layer():
    attn = 'model.layers.0.self_attn'
    return {f'{attn}.q_proj.weight': torch.randn(32, 32),
            f'{attn}.k_proj.weight': torch.randn(16, 32),
            f'{attn}.v_proj.weight': torch.randn(16, 32),
            f'{attn}.o_proj.weight': torch.randn(32, 32),
            'model.layers.0.input_layernorm.weight': torch.ones(32)}


def write_shards(folder, c, layers):
    """A shard per layer, and their index."""
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
    layers = [mla_layer(HF, i, generator) for i in range(2)]
    return write_shards(workspace / 'deepseek', HF, layers), layers


@pytest.fixture
def as_run(workspace):
    """Makes a model look like a run of train.py, in a folder that it returns."""
    def call(model, name='run'):
        for weight in model.requires_grad_(False).parameters():
            torch.nn.init.normal_(weight, mean=1.0 if weight.dim() == 1 else 0.0, std=0.3)
        (workspace / name).mkdir()
        arch, = (arch for arch, (kind, _) in ARCHITECTURES.items() if type(model) is kind)
        save_checkpoint(workspace / name / 'ckpt.pt', dict(
            model=model.state_dict(), step=1, provenance={},
            options=model.config.options() | dict(arch=arch, batch_size=1)))
        return name
    return call


def read_result(folder):
    return json.loads((Path(folder) / 'svd.json').read_text())


# --------------------------------------------------------------------------------------------------
# matrices and spectra


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
    'mfa': dict(n_kv_head=1, q_latent=10, head_dim=12),
    'v4': dict(attention='v4', q_latent=10, window=8, layer_kinds='window', o_latent=9),
}


@pytest.mark.parametrize('name', ATTENTIONS)
def test_matrices_are_what_an_attention_does(name, monkeypatch):
    """Up to what norms divide by, which is one number per token, or per head of it."""
    torch.manual_seed(0)
    options = dict(n_head=4, n_embd=32, rope_dims=4) | ATTENTIONS[name]
    attention, seen = make_attention(BlockConfig(**options)).requires_grad_(False), {}
    for weight in attention.parameters():
        torch.nn.init.normal_(weight, mean=1.0 if weight.dim() == 1 else 0.0, std=0.3)

    def attend(q, k, v, *args, **kwargs):
        seen.update(q=q, k=k, v=v)
        return torch.zeros(1, 5, q.size(1) * v.size(-1))

    monkeypatch.setattr(model, 'attend', attend)
    monkeypatch.setattr(model, 'softmax_attention', lambda q, k, v, *args, **kwargs: attend(
        q, k, v).view(1, 5, 4, -1).transpose(1, 2))
    x, r = torch.randn(1, 5, 32), attention.rope_dims
    unturned = torch.stack((torch.ones(5, r // 2), torch.zeros(5, r // 2))) if r else None
    attention(x, rope=unturned)
    (q_rope, q), (k_rope, k) = (seen[side].tensor_split([r], dim=-1) for side in 'qk')
    vectors = dict(q=q, k=k, v=seen['v'], q_rope=q_rope, k_rope=k_rope)
    matrices = {name: svd.whole(*part) for name, part in svd.matrices(attention).items()}
    assert set(matrices) == {'o'} | {part for part in vectors if vectors[part].size(-1)}

    def assert_same_direction(a, b):
        assert torch.allclose(F.normalize(a, dim=-1), F.normalize(b, dim=-1), atol=1e-5)

    for part in set(matrices) - {'o'}:
        assert_same_direction(x @ matrices[part].mT, vectors[part][0])
    for i, matrix in enumerate(matrices['o']):  # with branches, each head several times
        y, h = torch.zeros(1, 1, 4, attention.v_head_dim), i % 4
        y[..., h, :] = torch.randn(attention.v_head_dim)
        assert_same_direction(y[0, :, h] @ matrix, attention.o_proj(y.flatten(2))[0])


def test_heads_without_matrices_are_refused(script, as_run):
    options = dict(n_head=2, n_embd=16, n_layer=1, vocab_size=9, attention='tpa', kv_rank=2)
    with pytest.raises(UserError, match='^TPA: no matrix per head'):
        script(svd, as_run(make_model('transformer', **options)))


def assert_same(found, matrix):
    """The values found are the leading ones of the matrix, to 1e-6 of the largest, and the rest of
    it is zero."""
    values = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    found = np.array(found)
    assert np.abs(found - values[:len(found)]).max() < 1e-6 * values[0]
    assert np.all(values[len(found):] < 1e-6 * values[0])


def test_spectra_are_those_of_the_whole_products(checkpoint, script):
    folder, layers = checkpoint
    script(svd, folder)
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


def test_llama(workspace, script):
    tensors = llama_layer()
    script(svd, write_shards(workspace / 'llama', LLAMA, [tensors]))
    found = read_result('out/svd-llama')['layers'][0]['kinds']
    assert len(found['vo']['heads']) == 4 and len(found['v']['heads']) == 2 and 'q' not in found
    o, v = (tensors[f'model.layers.0.self_attn.{name}_proj.weight'] for name in 'ov')
    assert_same(found['vo']['heads'][3], o[:, 24:] @ v[8:])


def test_groups_of_heads_have_the_rank_of_their_latent():
    """GLA with grouped output latents: two latents of 3 for four heads; and noise like it."""
    parts = svd.matrices(make_attention(BlockConfig(
        n_head=4, n_embd=32, rope_dims=2, attention='mla', kv_latent=3, kv_groups=2, o_latent=5,
        o_groups=2)).requires_grad_(False))
    shapes = json.dumps({name: [matrix.shape for matrix in part] for name, part in parts.items()})
    for parts in (parts, svd.noise_like(shapes, seed=0)):
        ranks = {kind: sum(value > 1e-6 * max(values['stacked']) for value in values['stacked'])
                 for kind, values in svd.spectra(parts, stacked=True).items()}
        assert (ranks['k'], ranks['v'], ranks['o'], ranks['q']) == (6, 6, 10, 24)


def test_everything_is_computed_on_the_device(checkpoint):
    """On a device without numbers, anything left on the CPU would be refused."""
    layer = svd.layers_of_checkpoint(checkpoint[0])[0]
    parts = layer.load('meta')
    thin = {name: svd.thinned(*part) for name, part in parts.items()}
    for x in (*thin.values(), svd.fused(thin['q'], thin['k']), svd.fused(thin['o'], thin['v'])):
        values = torch.linalg.svdvals(x.double())
        assert x.is_meta and values.is_meta and svd.stacked_values(x, [*values]).is_meta
    assert all(subspace.is_meta for subspace in svd.subspaces(parts['q'], shared=True))


def test_effective_rank():
    assert svd.effective_rank([1.0, 1.0, 1.0, 0.0], 0.01) == [3]
    assert svd.effective_rank([10.0, 1.0], 0.01) == [1]  # 1/101 of the energy
    assert svd.effective_rank([[10.0, 1.01], [0.0, 0.0]], 0.01) == [2, 0]  # a little more; nothing
    assert svd.effective_rank([1.0], 0.001) == [1]


def test_heads_of_zeros_and_one_of_the_layers(workspace, script):
    layer = mla_layer(HF, 1, torch.Generator().manual_seed(0))
    layer['model.layers.1.self_attn.o_proj.weight'][:, :12] = 0
    folder = write_shards(workspace / 'zeros', HF, [mla_layer(HF, 0, torch.Generator()), layer])
    script(svd, folder, '--layers=1', '--align=True', '--plot_heads=True')
    layer, = read_result('out/svd-zeros')['layers']
    assert layer['number'] == 1 and layer['kinds']['o']['heads'][0] == [0.0] * 12
    ranks = [layer['kinds'][kind]['effective_rank']['0.01']['heads'] for kind in ('o', 'vo')]
    assert all(heads[0] == 0 < min(heads[1:]) for heads in ranks)
    assert 'next keys' not in layer['alignment']


def test_alignment_is_that_of_known_subspaces():
    """Three heads in 12 dimensions: the first two write the same plane, the third an orthogonal
    one, which is what the layer reads."""
    axes = torch.eye(12)
    first, second, third = axes[:2], torch.tensor([[1.0, 2.0], [3.0, -1.0]]) @ axes[:2], axes[4:6]
    parts = dict(o=[torch.stack((first, second, third))],
                 q=[torch.randn(3, 2, 2), axes[None, 4:6]],
                 k=[torch.randn(3, 2, 3), axes[None, 3:6]])
    found = svd.alignment(parts, dict(k_rope=[axes[None, :2]], q=[torch.randn(1, 2, 13)]))
    for name in ('between heads', 'own queries', 'own keys'):
        assert found[name]['cos2'] == pytest.approx(1 / 3, abs=1e-5)
    assert found['next keys']['cos2'] == pytest.approx(2 / 3, abs=1e-5)
    assert 'next queries' not in found  # they have another width
    a, b = torch.tensor([[1.0, 0.0]]).t(), torch.tensor([[0.5, 0.75 ** 0.5]]).t()
    assert svd.overlap([(a, b)]) == pytest.approx(dict(cos2=0.25, smallest_angle=60.0), abs=1e-4)


# --------------------------------------------------------------------------------------------------
# the layers of a run


SMALL = dict(n_layer=2, vocab_size=9, block_size=16, rope_dims=4, bias=True)
GROUPED = dict(n_layer=2, vocab_size=9, block_size=16, rope_dims=4, group_size=8, latents=(2,),
               widths=(16, 32), head_dim=8)


def names_of_layers(folder):
    return [layer['layer'] for layer in read_result(folder)['layers']]


def test_a_run_and_its_deepseek_twin(script, as_run):
    """One model as a run and in DeepSeek-V3's layout has the same spectra."""
    model = make_model('transformer', n_layer=2, vocab_size=9, block_size=16, n_head=2, n_embd=32,
                       learned_positions=False, causal=True, attention='mla', kv_latent=8,
                       q_latent=12, rope_key='shared', rope_dims=8, norm='rms', mlp='swiglu')
    script(svd, as_run(model))
    os.mkdir('twin')
    write_checkpoint(Path('twin'), *to_deepseek(model))
    script(svd, 'twin')
    ours, twin = read_result('run')['layers'], read_result('out/svd-twin')['layers']
    for our_layer, their_layer in zip(ours, twin, strict=True):
        for kind, found in our_layer['kinds'].items():
            of_twin = their_layer['kinds'][kind]
            assert np.allclose(found['stacked'], of_twin['stacked'], rtol=1e-4, atol=1e-6)


def test_a_run_is_compared_with_its_own_start(workspace, script, capsys):
    still = [*conftest.SMALL, '--learning_rate=1e-30', '--weight_decay=0',
             '--zero_init_residual=True']
    conftest.train_runs(workspace, still, dict(still=[], moved=['--learning_rate=1e-2']))
    for run in ('still', 'moved'):
        script(svd, run)
        out = capsys.readouterr().out
        assert re.search(r'after \d steps, [\d,]+ tokens: clearly below where it started', out)
        assert 'o, vo: zero before training, so the rank is that of the updates' in out
        for layer in read_result(run)['layers']:
            kinds, before = layer['kinds'], layer['reference']['kinds']
            same = [np.allclose(kinds[kind]['heads'], before[kind]['heads']) for kind in 'qkv']
            assert same == [run == 'still'] * 3
            assert not np.any(before['o']['heads'])


def test_cross_attention_has_the_gains_of_two_norms(script, as_run):
    model = make_model('encoder_decoder', **SMALL, n_head=2, n_embd=16)
    folder, block = as_run(model), model.decoder[0]
    script(svd, folder)
    assert names_of_layers(folder) == ['encoder.0', 'encoder.1', 'decoder.0', 'decoder.0.cross',
                                       'decoder.1', 'decoder.1.cross']
    found, r = read_result(folder)['layers'][3]['kinds'], block.cross.rope_dims
    width = block.cross.head_dim
    assert_same(found['q_rope']['heads'][0],
                block.cross.q_proj.weight[:width][:r] * block.cross_norm.weight)
    assert_same(found['v']['heads'][0],
                block.cross.v_proj.weight[:width] * block.kv_norm.weight)


def test_layers_of_different_widths(script, as_run):
    """Grouped latents: keys and values of another width than the queries, with a norm of their own,
    on the way up too."""
    model = make_model('grouped_latent', **GROUPED, compress='perceiver', upsample='attention')
    folder = as_run(model)
    script(svd, folder, '--align=True')
    found = {layer['layer']: layer for layer in read_result(folder)['layers']}
    attentions = {name: part for name, part in model.named_modules() if hasattr(part, 'o_proj')}
    assert len(found) == len(attentions)
    pool = next(part for name, part in model.named_modules() if name.endswith('pool'))
    layer = found[next(name for name in found if name.endswith('pool'))]
    assert_same(layer['kinds']['v']['heads'][0],
                pool.attn.v_proj.weight[:8] * pool.kv_norm.weight)
    assert 'own queries' in layer['alignment'] and 'own keys' not in layer['alignment']


def test_each_channel_is_a_layer(script, as_run):
    model = make_model('grouped_latent', **GROUPED, n_channels=2, channels_every=2)
    folder = as_run(model)
    script(svd, folder)
    assert [name for name in names_of_layers(folder) if name.startswith('blocks')] == [
        'blocks.0', 'blocks.1.0', 'blocks.1.1']


# --------------------------------------------------------------------------------------------------
# what a call prints, plots and keeps


def wide(**options):
    """A config.json of a width at which noise is noise."""
    return HF | dict(hidden_size=160, num_attention_heads=6, v_head_dim=32, q_lora_rank=64,
                     kv_lora_rank=48, qk_nope_head_dim=32, qk_rope_head_dim=16) | options


@pytest.mark.parametrize('planted', [True, False])
def test_a_planted_rank_is_found(workspace, script, capsys, planted):
    """The rank is drawn at random."""
    plant = int(torch.randint(5, 40, ())) if planted else None
    generator = torch.Generator().manual_seed(plant or 0)
    layers = [mla_layer(wide(), i, generator, plant) for i in range(2)]
    for layer in layers:
        layer |= {name: torch.ones_like(w) for name, w in layer.items() if 'layernorm' in name}
    script(svd, write_shards(workspace / 'planted', wide(), layers))
    below = 'o in 2 of 2 layers, vo in 2 of 2 layers' if planted else 'nothing'
    assert ('clearly below noise (at most 90% of its rank with 1% of the energy left out): '
            f'{below}\n') in capsys.readouterr().out
    if planted:
        result = read_result('out/svd-planted')
        noise, _ = (layer['reference']['kinds']['o'] for layer in result['layers'])
        for layer in result['layers']:
            found = layer['kinds']['o']
            assert 0.7 * plant <= found['effective_rank']['0.001']['stacked'][0] <= plant
            assert plant < noise['effective_rank']['0.01']['stacked'][0]
            assert found['stacked'][plant - 1] > 5 * found['stacked'][plant]


def rows_of(out):
    """{layer and share: cells} of the printed table."""
    rows, layer = {}, ''
    for line in out.splitlines():
        if '%' in line[:28]:
            layer = line[:22].strip() or layer
            rows[layer, line[22:28].strip()] = line[28:].split()
    return rows


def test_shares_of_the_energy(checkpoint, script, capsys):
    """Both published ones without asking; another one from what has been kept."""
    script(svd, checkpoint[0], '--stacked=False')
    out = capsys.readouterr().out
    assert 'effective rank with 1% or 0.1% of the energy left out: mean over heads' in out
    rows = rows_of(out)
    for layer in read_result('out/svd-deepseek')['layers']:
        for share, label in (('0.01', '1%'), ('0.001', '0.1%')):
            means = [f'{np.mean(values["effective_rank"][share]["heads"]):.1f}'
                     for values in layer['kinds'].values()]
            assert rows[layer['layer'], label][:9] == means
    script(svd, checkpoint[0], '--discarded=0.3', '--layers=1')
    rows = rows_of(capsys.readouterr().out)
    layer, = read_result('out/svd-deepseek')['layers']
    found = layer['kinds']['q']
    assert set(found['effective_rank']) == {'0.01', '0.001', '0.3'}
    energy, ranks = np.square(found['stacked']), found['effective_rank']['0.3']
    rank, = ranks['stacked']
    assert energy[rank:].sum() <= 0.3 * energy.sum() < energy[rank - 1:].sum()
    assert rows['layer 1', '30%'][:3] == [f'{rank}', '/', f'{np.mean(ranks["heads"]):.1f}']


def test_curves_of_heads_reach_a_share_at_the_rank(checkpoint, script, drawn):
    script(svd, checkpoint[0])
    assert set(drawn) == {'layers.png', 'heads.png'}
    script(svd, checkpoint[0], '--plot_heads=True')
    assert set(drawn) == {'layers.png', 'heads.png', 'spectra-0.png', 'spectra-1.png'}
    layers = read_result('out/svd-deepseek')['layers']
    for layer in layers:
        curves = drawn[f'spectra-{layer["number"]}.png']
        assert list(curves) == list(layer['kinds'])
        for kind, found in layer['kinds'].items():
            *heads, _ = [y for _, y, _ in curves[kind]]
            for share, ranks in found['effective_rank'].items():
                assert [int((y <= float(share)).int().argmax()) for y in heads] == ranks['heads']
    first, noise, *_ = drawn['layers.png']['vo']  # 1% left out
    assert list(first[0]) == [0, 1] and list(first[1]) == [
        layer['kinds']['vo']['effective_rank']['0.01']['stacked'][0] for layer in layers]
    ranks = layers[1]['kinds']['q']['effective_rank']['0.01']['heads']
    assert list(drawn['heads.png']['q'][0][1]) == ranks


def test_plots_are_drawn(checkpoint, script, monkeypatch):
    monkeypatch.setattr(svd, 'plot', draw)
    script(svd, checkpoint[0], '--layers=0', '--plot_heads=True')
    for name in ('layers.png', 'heads.png', 'spectra-0.png'):
        assert Path('out/svd-deepseek', name).stat().st_size > 10_000


def kept(out):
    """The layers of which a call says that it has kept them."""
    return [layer for (layer, _), cells in rows_of(out).items() if cells[-1] == 'kept']


def test_a_killed_call_goes_on(checkpoint, script, capsys, monkeypatch):
    folder, lines = checkpoint[0], Path('out/svd-deepseek/svd.jsonl')
    script(svd, folder, '--align=True', '--out_dir=whole')
    assert kept(capsys.readouterr().out) == []
    spectra, calls = svd.spectra, []

    def killed_in_layer_1(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return spectra(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(svd, 'spectra', killed_in_layer_1)
        script(svd, folder, '--align=True')
    assert len(lines.read_text().splitlines()) == 2  # layer 0, and the noise
    with open(lines, 'a') as file:
        file.write('{"state": {"stacked": true, "al')  # a kill in the middle of a line
    capsys.readouterr()
    script(svd, folder, '--align=True')
    assert kept(capsys.readouterr().out) == ['layer 0']
    for name in ('svd.json', 'svd.jsonl'):
        assert Path('whole', name).read_bytes() == Path('out/svd-deepseek', name).read_bytes()
    script(svd, folder, '--align=True', '--discarded=0.2')  # nothing is left to do
    assert kept(capsys.readouterr().out) == ['layer 0', 'layer 1']


def test_results_of_other_options_and_files_are_kept_apart(checkpoint, script, capsys):
    folder, result = checkpoint[0], Path('out/svd-deepseek/svd.json')
    script(svd, folder, '--align=True', '--stacked=False')
    aligned = result.read_bytes()
    script(svd, folder, '--align=True', '--stacked=False', '--seed=2')
    assert kept(capsys.readouterr().out) == [] and result.read_bytes() != aligned
    script(svd, folder, '--align=True', '--stacked=False')
    assert kept(capsys.readouterr().out) == ['layer 0', 'layer 1']
    assert result.read_bytes() == aligned
    os.utime(folder / 'model-1.safetensors', (0, 0))
    script(svd, folder, '--align=True', '--stacked=False')  # layer 0 was compared with layer 1
    assert kept(capsys.readouterr().out) == []
    script(svd, folder, '--align=True', '--stacked=False', '--layers=0')
    assert read_result('out/svd-deepseek')['layers'][0]['alignment'].keys() == {
        'between heads', 'own queries', 'own keys'}


# --------------------------------------------------------------------------------------------------
# what is refused


@pytest.mark.parametrize('arguments, message', [
    ([], 'which weights'),
    (['deepseek', '--layers=7'], 'layer 7: deepseek has layers 0 to 1'),
    (['deepseek', '--heads_of=2'], 'layer 2: deepseek has layers 0 to 1'),
    (['nowhere'], 'nowhere'),
    (['deepseek/config.json'], 'deepseek/config.json'),
    (['deepseek', '--out_dir=deepseek/config.json'], 'deepseek/config.json'),
    (['deepseek', '--out_dir=deepseek/config.json/below'], 'deepseek/config.json'),
    (['deepseek', '-align=True'], '-align=True: options are written --key=value'),
    (['deepseek', '--layers=(0,x)'], 'layers='),
    (['deepseek', '--discarded=1.0'], 'discarded=1.0'),
    (['deepseek', '--device=meta'], '--device=meta: no device here'),
    (['deepseek', '--device=gpu'], '--device=gpu: no device here that computes in float64'),
    (['deepseek', '--device=hpu'], '--device=hpu: no device here'),
])
def test_refusals(checkpoint, script, arguments, message):
    with pytest.raises((UserError, OSError), match=message):
        script(svd, *arguments)


@pytest.mark.parametrize('changes, message', [
    (dict(num_attention_heads=0), 'num_attention_heads=0'),
    (dict(num_attention_heads=4.0), 'num_attention_heads=4.0'),
    (dict(num_attention_heads=10 ** 12), 'layers.0.self_attn does not fit config.json'),
    (dict(q_lora_rank=[24]), 'q_lora_rank=.24.'),
    (dict(qk_nope_head_dim=None), 'qk_nope_head_dim'),
    (dict(hidden_size=41), 'layers.0.self_attn does not fit config.json'),
    (dict(num_hidden_layers=True), 'num_hidden_layers=True must be the number of'),
    (dict(num_hidden_layers=0), 'num_hidden_layers=0 must be the number of layers'),
    (dict(num_hidden_layers=10 ** 12), 'layers that its 16 tensors belong to'),
    (dict(num_hidden_layers=3), 'model.layers.2.self_attn'),
])
def test_refuses_a_config_that_contradicts_the_tensors(checkpoint, script, changes, message):
    (checkpoint[0] / 'config.json').write_text(json.dumps(HF | changes))
    with pytest.raises(UserError, match=message):
        script(svd, checkpoint[0], '--stacked=False')


@pytest.mark.parametrize('changes, message', [
    (dict(num_attention_heads=5), 'layers.0.self_attn does not fit config.json'),
    (dict(num_key_value_heads=3), 'n_head=4 is not divisible by n_kv_head=3'),
    (dict(num_key_value_heads=4), r'k_proj.weight: has the shape \(16, 32\)'),
    (dict(head_dim=16), 'q_proj.weight: has the shape'),
    ({'self_attn.q_proj': torch.randn(1024)}, r'q_proj.weight: has the shape \(1024,\)'),
    ({'self_attn.k_proj': torch.randn(0, 32)}, r'k_proj.weight: has the shape \(0, 32\)'),
    ({'self_attn.v_proj': torch.tensor(1.0)}, r'v_proj.weight: has the shape \(\)'),
    ({'input_layernorm': torch.ones(31)}, r'input_layernorm.weight: has the shape \(31,\)'),
    ({'input_layernorm': torch.full((32,), 3e38)}, 'are too large for float32'),
])
def test_refuses_a_llama_that_contradicts_itself(workspace, script, changes, message):
    tensors = {f'model.layers.0.{name}.weight': value for name, value in changes.items()
               if torch.is_tensor(value)}
    c = LLAMA if tensors else LLAMA | changes
    with pytest.raises(UserError, match=message):
        script(svd, write_shards(workspace / 'llama', c, [llama_layer() | tensors]))


O_PROJ = 'model.layers.1.self_attn.o_proj.weight'


def change(folder, **tensors):
    """Changes tensors of the second shard; one that is None is taken out of the index."""
    shard, index = folder / 'model-1.safetensors', folder / 'model.safetensors.index.json'
    there = {name: value.clone() for name, value in load_file(shard).items()}
    there |= {name: value for name, value in tensors.items() if value is not None}
    save_file(there, shard)
    weight_map = json.loads(index.read_text())['weight_map'] | dict.fromkeys(there, shard.name)
    weight_map = {name: file for name, file in weight_map.items()
                  if name not in tensors or tensors[name] is not None}
    index.write_text(json.dumps(dict(weight_map=weight_map)))


DAMAGES = {
    'model-1.safetensors': lambda folder: (folder / 'model-1.safetensors').unlink(),
    'model-1.safetensors.*damaged': lambda folder: os.truncate(folder / 'model-1.safetensors', 999),
    'kv_b_proj.weight': lambda folder: change(folder, **{
        'model.layers.1.self_attn.kv_b_proj.weight': None}),
    'o_proj.weight': lambda folder: change(folder, **{O_PROJ: None}),
    'holds no safetensors': lambda folder: [path.unlink() for path in folder.glob('model*')],
    'config.json': lambda folder: (folder / 'config.json').write_text('{'),
    'config.json.*': lambda folder: (folder / 'config.json').write_text('[]'),
    'o_proj.weight is torch.float8_e4m3fn without': lambda folder: change(folder, **{
        O_PROJ: torch.zeros(40, 48).to(torch.float8_e4m3fn)}),
    'o_proj.qweight instead of .*o_proj.weight: quantised': lambda folder: change(folder, **{
        O_PROJ: None, O_PROJ.replace('.weight', '.qweight'): torch.ones(5, 48).int()}),
    'no layer has an attention like': lambda folder: (folder / 'config.json').write_text(json.dumps(
        dict(num_hidden_layers=2))),
    'not a scale for each block': lambda folder: change(folder, **{
        f'{O_PROJ}_scale_inv': torch.ones(1)}),
    'o_proj.weight holds numbers that are not finite': lambda folder: change(folder, **{
        O_PROJ: torch.full((40, 48), float('nan'))}),
}


@pytest.mark.parametrize('message', DAMAGES)
def test_refuses_damaged_checkpoints(checkpoint, script, message):
    DAMAGES[message](checkpoint[0])
    with pytest.raises((UserError, OSError), match=message):
        script(svd, checkpoint[0], '--stacked=False')
    assert not list(Path().rglob('svd.json'))


def test_fp8_blocks_and_bf16(workspace):
    weight, scale = torch.randn(300, 200), torch.rand(3, 2) + 0.5
    whole = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:300, :200]
    folder = write_shards(workspace / 'fp8', HF, [dict(
        a=(weight / whole).to(torch.float8_e4m3fn), a_scale_inv=scale, b=weight.bfloat16())])
    tensors = Checkpoint(folder)
    assert (tensors['a'] - weight).abs().max() < 0.07 * weight.abs().max()
    assert tensors['a'].dtype == torch.float32
    assert torch.equal(tensors['a'], (weight / whole).to(torch.float8_e4m3fn).float() * whole)
    assert torch.equal(tensors['b'], weight.bfloat16().float())


@pytest.mark.parametrize('weight, scale', [
    (torch.ones(8, 8), torch.full((1, 1), float('inf'))),
    (torch.full((8, 8), float('nan')), torch.ones(1, 1)),
    (torch.ones(8), torch.ones(1))])
def test_refuses_scales_that_are_not_finite(workspace, weight, scale):
    folder = write_shards(workspace / 'fp8', HF, [
        dict(a=weight.to(torch.float8_e4m3fn), a_scale_inv=scale)])
    with pytest.raises(UserError, match='not finite|not a scale for each block'):
        Checkpoint(folder)['a']


def test_names_of_other_families(checkpoint, script, capsys):
    """A language model inside of another, with layers that have another attention; and LongCat's
    layers, which have two attentions each."""
    folder, layers = checkpoint
    script(svd, folder)
    wanted = [layer['kinds'] for layer in read_result('out/svd-deepseek')['layers']]
    inside = {name.replace('model.layers.1', 'model.language_model.layers.2').replace(
        'model.layers.0', 'model.language_model.layers.0'): value
        for layer in layers for name, value in layer.items()}
    inside |= {'model.language_model.layers.1.self_attn.k_proj.weight': torch.ones(2, 40),
               'model.vision.layers.1.self_attn.kv_a_proj_with_mqa.weight': torch.ones(2, 2)}
    write_shards(Path('inside'), dict(text_config=HF | dict(num_hidden_layers=3)), [inside])
    twice = {name.replace(f'layers.{i}.self_attn', f'layers.0.self_attn.{i}').replace(
        f'layers.{i}.input_layernorm', f'layers.0.input_layernorm.{i}'): value
        for i, layer in enumerate(layers) for name, value in layer.items()}
    c = {name: value for name, value in HF.items() if name != 'num_hidden_layers'}
    write_shards(Path('longcat'), c | dict(num_layers=1), [twice])
    for name, labels in (('inside', ['0', '2']), ('longcat', ['0.0', '0.1'])):
        capsys.readouterr()
        script(svd, name)
        found = read_result(f'out/svd-{name}')['layers']
        assert [layer['layer'] for layer in found] == [f'layer {label}' for label in labels]
        assert [layer['kinds'] for layer in found] == wanted
        skipped = 'have another attention: layers 1\n' in capsys.readouterr().out
        assert skipped == (name == 'inside')


@pytest.mark.slow
def test_deepseek_at_true_width(workspace):
    """Two layers take no more memory than one."""
    c = HF | dict(num_attention_heads=128, hidden_size=7168, q_lora_rank=1536, kv_lora_rank=512,
                  qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
    # what is freed goes back to the system, so that the peaks do not depend on where it lay
    environment = os.environ | dict(MALLOC_MMAP_THRESHOLD_='131072')
    rank = int(torch.randint(40, 100, ()))
    layers = (mla_layer(c, i, torch.Generator().manual_seed(i), plant=rank) for i in range(2))
    folder = write_shards(workspace / 'wide', c, layers)
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
