"""Folders in the format of transformers as runs: exported by train.py and loaded by transformers,
written by transformers and trained, sampled and fine-tuned here."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import torch.nn.functional as F
import transformers

import deepseek
import finetune_sst2
import prepare
import sample
import svd
import train
from config import UserError
from conftest import corpus, train_runs
from model import OutputLatent
from prepare import Tokenizer
from run import load_checkpoint, load_run
from test_deepseek import LLAMA, MOE, assert_close, theirs

DATA = ['--dataset=text', '--source=corpus.csv', '--device=cpu', '--dtype=float32']
SMALL = [*DATA, '--vocab_size=300', '--block_size=32', '--n_layer=2', '--n_head=2', '--n_embd=32',
         '--norm=rms', '--mlp=swiglu', '--attention=mla', '--q_latent=12', '--kv_latent=8',
         '--rope_key=shared', '--rope_dims=4', '--learned_positions=False', '--batch_size=8',
         '--max_iters=2', '--eval_iters=1', '--log_interval=1']
FEW = ['--eval_iters=1', '--batch_size=8']
ODD = ['The river, 1234 BRIDGES\n\n\t and  two ',
       'ünïcödé 漢字 \U0001f469\u200d\U0001f467 x\u0301',
       "don't DON'T '", '\r\n\u00a0\u2028', 'aaaaaaa aaaaa', 'ΣΑΣ ΟΔΟΣ, Σ', '']


@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """Runs of two steps, bpe, byte and sum, and `hub`, which transformers has written: a
    DeepSeek-V3 with experts and random weights, and with a tokenizer that is not ours."""
    folder = train_runs(tmp_path_factory.mktemp('made'), SMALL, dict(
        bpe=['--o_latent=12'], byte=['--tokenizer=byte', '--vocab_size=257', '--lowercase=True'],
        sum=['--o_latent=12', '--o_norm=sum']))
    theirs(**MOE, vocab_size=330).save_pretrained(folder / 'hub')
    library = tokenizers.ByteLevelBPETokenizer(lowercase=True)
    library.train_from_iterator(corpus(100), 290, special_tokens=['<s>', '</s>'])
    library.add_tokens(['<think>'])
    library.enable_truncation(8)  # what a file says of this is for fine-tuning
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single='<s> $A', special_tokens=[('<s>', 0)])
    library.save(str(folder / 'hub/tokenizer.json'))
    (folder / 'hub/tokenizer_config.json').write_text('{"eos_token": {"content": "</s>"}}')
    return folder


@pytest.fixture
def folder(made, workspace):
    shutil.copytree(made, workspace, dirs_exist_ok=True)
    return workspace


def edit(path, **values):
    path = Path(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize('run, shard_bytes', [('bpe', 20_000), ('byte', 5 * 10 ** 9)])
def test_what_is_exported_is_the_run_for_transformers_and_for_us(
        folder, script, capsys, monkeypatch, run, shard_bytes):
    monkeypatch.setattr(deepseek, 'SHARD_BYTES', shard_bytes)
    script(train, f'--init_from={run}', '--export=new/out')
    assert [path.name for path in Path('new').iterdir()] == ['out']
    shards = sorted(Path('new/out').glob('*.safetensors'))
    assert {path.suffix for path in Path('new/out').iterdir()} == {'.json', '.safetensors'}
    if shard_bytes > 20_000:
        assert [path.name for path in shards] == ['model.safetensors']
    else:
        assert len(shards) > 3 and shards[0].name == f'model-00001-of-{len(shards):05}.safetensors'
    model, tokenizer, _ = load_run(run)
    again, library, _ = load_run('new/out')
    original = transformers.AutoModelForCausalLM.from_pretrained('new/out', dtype=torch.float32)
    auto = transformers.AutoTokenizer.from_pretrained('new/out')
    idx = torch.randint(257, (2, 20))
    with torch.no_grad():
        logits = model(idx)
        assert logits.std() > 0.1
        assert_close(original.eval()(idx).logits, logits)
        assert_close(again(idx), logits)
    for text in corpus(20) + ODD:
        ids = tokenizer.encode(text)
        assert auto(text)['input_ids'] == ids == library.encode(text)
        assert auto.decode(ids) == tokenizer.decode(ids) == library.decode(ids)
    assert auto.eos_token_id == original.config.eos_token_id == tokenizer.eot == library.eot

    def validation_loss(source):
        capsys.readouterr()
        script(train, f'--init_from={source}', '--eval_only=True', *DATA, *FEW)
        return re.search(r'loss \d+\.\d+', capsys.readouterr().out)[0]

    assert validation_loss('new/out') == validation_loss(run)
    script(train, '--init_from=new/out', '--export=again')  # and out of there once more
    assert_close(load_run('again')[0](idx), logits)
    assert load_run('again')[1].digest() == library.digest()


def test_a_folder_of_transformers_is_trained_cut_sampled_and_fine_tuned(
        folder, script, capsys):
    script(train, '--init_from=hub', '--out_dir=on', '--max_iters=2', '--block_size=24',
           *DATA, *FEW)
    model, tokenizer, options = load_run('on')
    assert model.config.block_size == 24 and options['tokenizer'] == 'given'
    assert tokenizer.digest() == load_run('hub')[1].digest()

    # the loss before the first step is that of transformers
    data, = Path('data').glob('text-given-*')
    tokens = np.array(prepare.read_tokens(data, 'val')).astype(int)
    starts = np.linspace(0, (len(tokens) - 25) // 24, 8).astype(int) * 24
    windows = torch.tensor(np.array([tokens[start:start + 25] for start in starts]))
    original = transformers.AutoModelForCausalLM.from_pretrained('hub', dtype=torch.float32)
    with torch.no_grad():
        logits = original.eval()(windows[:, :-1]).logits.flatten(0, 1)
    wanted = F.cross_entropy(logits, windows[:, 1:].flatten()).item()
    first = json.loads(Path('on/metrics.jsonl').read_text().splitlines()[0])
    assert first['val_loss'] == pytest.approx(wanted, rel=1e-4)
    assert tokens[0] == tokenizer.eot == 1

    script(train, '--init_from=resume', '--out_dir=on', '--max_iters=3')
    assert load_checkpoint('on/ckpt.pt')['step'] == 3
    script(train, '--init_from=hub', '--o_latent=8', '--out_dir=cut', '--max_iters=1', *DATA, *FEW)
    assert isinstance(load_run('cut')[0].blocks[1].attn.o_proj, OutputLatent)
    script(train, '--init_from=hub', '--o_latent=8', '--eval_only=True', *DATA, *FEW)
    script(train, '--init_from=cut', '--export=cut-out')
    assert load_run('cut-out')[1].digest() == tokenizer.digest()
    script(train, '--init_from=hub', '--o_latent=8', '--o_latent_init=data', '--export=data-out',
           *DATA, *FEW)
    ranks = [torch.linalg.matrix_rank(load_run(name)[0].blocks[1].attn.o_proj.weight, rtol=1e-5)
             for name in ('hub', 'data-out')]
    assert ranks == [64, 8]

    capsys.readouterr()
    script(sample, '--out_dir=hub', '--start=The river', '--max_new_tokens=20', '--device=cpu')
    text = capsys.readouterr().out
    model, tokenizer, _ = load_run('hub')
    prompt = torch.tensor([[1, *tokenizer.encode('The river')]])
    ids = model.generate(prompt, 20, temperature=0.8, top_k=200, seed=1337, stop=1,
                         n_ids=tokenizer.vocab_size)[0, prompt.size(1):].tolist()
    ids = ids[:ids.index(1)] if 1 in ids else ids
    assert text == 'The river' + tokenizer.decode(ids) + '\n'

    Path('sst2').mkdir()
    for name, n in (('train', 40), ('dev', 10)):
        rows = ''.join(f'the river runs {i}\t{i % 2}\n' for i in range(n))
        Path(f'sst2/{name}.tsv').write_text('sentence\tlabel\n' + rows)
    script(finetune_sst2, '--out_dir=hub', '--data_dir=sst2', '--epochs=1', '--device=cpu')
    assert 'hub: 36 phrases to train on' in capsys.readouterr().out
    script(finetune_sst2, '--out_dir=hub', '--predict=the river', '--device=cpu')
    assert 'probability of positive' in capsys.readouterr().out
    script(svd, 'hub', '--layers=0', '--out_dir=svd')
    assert load_run('hub')[1].digest() == tokenizer.digest()  # and it is still what it was


def test_a_tokenizer_that_is_not_ours(folder):
    tokenizer = Tokenizer.load('hub/tokenizer.json')
    library = tokenizers.Tokenizer.from_file('hub/tokenizer.json')
    library.no_truncation()
    assert (tokenizer.eot, tokenizer.mask, tokenizer.pad) == (1, None, None)
    assert tokenizer.vocab_size == 291 == tokenizer.ids_needed(causal=True)
    for text in corpus(5) + ODD:
        ids = tokenizer.encode(text)
        assert ids == library.encode(text, add_special_tokens=False).ids
        lower = text.lower().replace('ς', 'σ')  # the library does not know it
        assert ''.join(tokenizer.decode_stream(ids)) == tokenizer.decode(ids) == lower
    written_out = tokenizer.encode('</s>')
    assert 1 not in written_out and tokenizer.decode(written_out) == '</s>'
    stream = list(tokenizer.decode_stream(tokenizer.encode('é') + tokenizer.encode('漢')[:2]))
    assert stream == ['é', '\ufffd']  # a character comes whole; at the end bytes are left
    tokenizer.save('elsewhere.json')
    again = Tokenizer.load('elsewhere.json')
    assert (again.eot, again.digest()) == (1, tokenizer.digest())
    for values in (dict(eos_token_id=0), dict(eos_token_id=[0, 5])):
        edit('hub/config.json', **values)
        assert Tokenizer.load('hub/tokenizer.json').eot == 0


def weights():
    return Path('hub/model.safetensors')


@pytest.mark.parametrize('change, message', [
    (lambda: theirs(**LLAMA).save_pretrained('hub'), "hub.*'llama'"),
    (lambda: weights().write_bytes(weights().read_bytes()[:-100]), 'missing or damaged'),
    (lambda: Path('hub/tokenizer.json').unlink(), 'hub/tokenizer.json'),
    (lambda: Path('hub/tokenizer.json').write_text('{"model": 3}'), 'not a file of the library'),
    (lambda: Path('hub/tokenizer.json').write_text('{"mod'), 'hub/tokenizer.json: damaged'),
    (lambda: Path('hub/tokenizer_config.json').unlink(), 'for the end of a sequence'),
    (lambda: edit('hub/config.json', eos_token_id=999), 'for the end of a sequence'),
    (lambda: edit('hub/config.json', hidden_act='gelu'), 'hub/config.json: hidden_act=gelu'),
    (lambda: edit('hub/config.json', vocab_size=340),
     'hub: model.embed_tokens.weight: has the shape'),
    (lambda: theirs(vocab_size=280).save_pretrained('hub'),
     'tokenizer of .* needs 291|another tokenizer than hub'),
])
def test_a_folder_that_cannot_be_used(folder, script, change, message):
    change()
    with pytest.raises((UserError, OSError), match=message):
        load_run('hub')
    with pytest.raises((UserError, OSError), match=message):
        script(train, '--init_from=hub', '--eval_only=True', *DATA, *FEW)


@pytest.mark.parametrize('arguments, message', [
    (['--init_from=hub', '--out_dir=hub', *DATA, *FEW], 'hub: holds .*, which no run wrote'),
    (['--init_from=hub', '--gate=True', '--eval_only=True', *DATA, *FEW],
     'trained with gate=False'),
    (['--export=new'], '--init_from=RUN'),
    (['--init_from=bpe', '--export=hub'], 'hub: is there already, and not empty'),
    (['--init_from=bpe', '--export=bpe/ckpt.pt'], 'ckpt.pt: is there already'),
    (['--init_from=bpe', '--export=corpus.csv/new'], 'new: cannot be written'),
    (['--init_from=sum', '--export=new'], "cannot be exported: o_norm='sum'"),
    (['--tokenizer=given', *DATA], 'tokenizer=given'),
])
def test_what_train_refuses(folder, script, arguments, message):
    shutil.rmtree('data')
    before = {path.relative_to(folder) for path in folder.rglob('*')}
    with pytest.raises(UserError, match=message):
        script(train, *arguments)
    left = {path.relative_to(folder) for path in folder.rglob('*')} - before
    assert {path.parts[0] for path in left} <= {'data'}


@pytest.mark.skipif(not Path('/proc/self/clear_refs').exists(), reason='needs a Linux')
def test_loading_takes_no_second_copy_of_the_weights(folder):
    """As float32 a second copy would make it at least 2; next to the model there is one tensor."""
    model = theirs(vocab_size=330, hidden_size=512, intermediate_size=4096, num_hidden_layers=4,
                   first_k_dense_replace=4)
    model.save_pretrained('hub', max_shard_size='20MB')
    weights().unlink()

    def peak():
        return int(re.search(r'VmHWM:\s+(\d+) kB', Path('/proc/self/status').read_text())[1]) * 1024

    Path('/proc/self/clear_refs').write_text('5')  # the peak so far is forgotten
    before = peak()
    loaded, _, _ = load_run('hub')
    assert (peak() - before) / sum(p.nbytes for p in loaded.parameters()) < 1.5
