"""sample.py, on runs of a few steps."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import prepare
import sample
import svd
from config import UserError
from conftest import train_runs
from model import Transformer
from run import load_run

SMALL = ['--dataset=text', '--source=corpus.csv', '--tokenizer=byte', '--block_size=32',
         '--n_layer=1', '--n_head=2', '--n_embd=32', '--batch_size=8', '--max_iters=2',
         '--eval_iters=1', '--log_interval=1', '--device=cpu', '--dtype=float32']
ENCDEC = ['--arch=encoder_decoder', '--embedding_loss=mse', '--subtract_next_position=True']


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """Two causal runs and an encoder: decoder, encdec, encoder."""
    return train_runs(tmp_path_factory.mktemp('runs'), SMALL,
                      dict(decoder=[], encdec=ENCDEC, encoder=['--causal=False']))


@pytest.fixture
def folder(runs, workspace):
    shutil.copytree(runs, workspace, dirs_exist_ok=True)
    return workspace


def test_the_parts_of_the_loss_are_recorded(folder):
    lines = [json.loads(line) for line in Path('encdec/metrics.jsonl').read_text().splitlines()]
    parts = next(line for line in lines if 'train_loss' in line)
    total = parts['train_cross_entropy'] + parts['train_embedding_loss']
    assert parts['train_loss'] == pytest.approx(total, rel=1e-5)
    assert parts['train_embedding_gain'] == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize('run', ['decoder', 'encdec'])
def test_text_is_what_the_model_draws(folder, script, capsys, monkeypatch, run):
    arguments = [f'--out_dir={run}', '--start=the river', '--max_new_tokens=60', '--device=cpu',
                 '--seed=4']
    script(sample, *arguments)
    out = capsys.readouterr()
    model, tokenizer, _ = load_run(run)
    prompt = torch.tensor([[tokenizer.eot, *tokenizer.encode('the river')]])
    ids = model.generate(prompt, 60, temperature=0.8, top_k=200, seed=4, stop=tokenizer.eot,
                         n_ids=257)[0, 1:].tolist()
    ids = ids[:ids.index(tokenizer.eot)] if tokenizer.eot in ids else ids
    assert out.out == tokenizer.decode(ids) + '\n'
    assert 'tokens/s' in out.err
    script(sample, *arguments)
    assert capsys.readouterr().out == out.out
    Path('prompt.txt').write_text('\ufeffthe river\n', encoding='utf-8')
    from_file = [argument.replace('the river', 'FILE:prompt.txt') for argument in arguments]
    script(sample, *from_file, '--num_samples=3')
    several = capsys.readouterr().out
    texts = several.split('\n---\n')
    assert len(texts) == 3 and len(set(texts)) == 3 and texts[0] == out.out
    # one by one, as when the caches of two need more memory than that: each has its own seed
    monkeypatch.setattr(sample, 'CACHE_BYTES', 1)
    script(sample, *arguments, '--num_samples=3')
    assert capsys.readouterr().out == several


def test_a_start_keeps_its_quotes(folder, script, capsys):
    script(sample, '--out_dir=decoder', '--start="Where?"', '--max_new_tokens=1', '--device=cpu')
    assert capsys.readouterr().out.startswith('"Where?"')


def test_characters_are_shown_whole(capsys):
    tokenizer = prepare.make_tokenizer('byte')
    assert sample.show(tokenizer, [*'é漢'.encode(), 0xe6, tokenizer.eot, 97]) == 6
    assert capsys.readouterr().out == 'é漢\ufffd\n'


def test_documents_end_one_by_one(folder, script, capsys, monkeypatch):
    eot = 256
    steps = torch.tensor([[97, 98], [eot, 98], [eot, eot]])
    monkeypatch.setattr(Transformer, 'stream', lambda *arguments, **keywords: iter(steps))
    script(sample, '--out_dir=decoder', '--device=cpu', '--num_samples=2')
    out = capsys.readouterr()
    assert out.out == 'a\n\n---\nbb\n'
    assert out.err.startswith('\n3 tokens, ') and out.err.endswith(', 2 of 2 documents ended\n')


def test_refuses_weights_that_are_not_finite(folder, script):
    for path in Path('decoder').glob('ckpt*.pt'):
        state = torch.load(path, weights_only=True)
        next(iter(state['model'].values()))[0] = float('nan')
        torch.save(state, path)
    calls = {sample: ['--out_dir=decoder', '--temperature=0'], svd: ['decoder']}
    for module, arguments in calls.items():
        with pytest.raises(UserError, match='holds numbers that are not finite'):
            script(module, *arguments)


@pytest.mark.parametrize('arguments', [['--temperature=1e-300'], ['--temperature=1e-37'],
                                       ['--top_p=1e-300'], ['--top_k=1']])
def test_what_is_near_zero_takes_the_likeliest_token(folder, script, capsys, arguments):
    options = ['--out_dir=decoder', '--start=the', '--device=cpu', '--max_new_tokens=20']
    script(sample, *options, '--temperature=0')
    likeliest = capsys.readouterr().out
    script(sample, *options, *arguments)
    assert capsys.readouterr().out == likeliest


def test_a_long_start_says_what_is_dropped(folder, script, capsys):
    script(sample, '--out_dir=decoder', f'--start={"x" * 50}', '--max_new_tokens=3',
           '--device=cpu')
    message = 'the start has 51 tokens, the model sees 32: the first 19 are dropped'
    assert message in capsys.readouterr().err


@pytest.mark.parametrize('arguments, message', [
    (['--out_dir=encoder'], 'encoder: an encoder, which fills gaps and writes no text'),
    (['--out_dir=nowhere'], 'nowhere/ckpt.pt: there is no such checkpoint'),
    ([], 'which run? --out_dir=RUN'),
    (['--out_dir=decoder', '--temperature=-0.5'], 'temperature=-0.5: must be a number >= 0'),
    (['--out_dir=decoder', '--top_p=1.5'], 'top_p=1.5: must be a probability'),
    (['--out_dir=decoder', '--top_k=0'], 'top_k=0: must be an integer >= 1'),
    (['--out_dir=decoder', '--start=FILE:nowhere.txt'], "No such file or directory: 'nowhere.txt'"),
    (['--out_dir=decoder', '--start=FILE:decoder/ckpt.pt'],
     'FILE:decoder/ckpt.pt: not a text file'),
])
def test_refusals(folder, script, arguments, message):
    with pytest.raises((UserError, OSError)) as error:
        script(sample, *arguments, '--device=cpu')
    assert message in str(error.value)


def test_refuses_a_run_without_a_tokenizer(folder, script):
    Path('decoder/tokenizer.json').unlink()
    with pytest.raises(FileNotFoundError, match='decoder/tokenizer.json'):
        script(sample, '--out_dir=decoder')
