"""finetune_sst2.py: what is read where, what is held out, what is written, and what it refuses."""

import json
import math
import os
import random
import re
import shutil
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch

import finetune_sst2
import prepare
from config import UserError
from conftest import shell, train_runs
from finetune_sst2 import (FinetuneOptions, bag_of_words, batches_by_length, make_classifier,
                           read_sst2, score, take, tokenize)
from run import Device, load_run, mean_and_interval, save_checkpoint

SMALL = ['--dataset=text', '--source=corpus.csv', '--tokenizer=byte', '--block_size=64',
         '--n_layer=2', '--n_head=2', '--n_embd=32', '--rope_dims=8', '--learned_positions=False',
         '--batch_size=8', '--max_iters=2', '--eval_iters=1', '--device=cpu', '--dtype=float32']
QUICK = ['--device=cpu', '--dtype=float32', '--data_dir=sst2', '--learning_rate=3e-3', '--epochs=2',
         '--log_interval=5']


def write_sst2(folder, rows=(300, 60)):
    """Sentences of several lengths whose label hangs on one word."""
    rng = random.Random(0)
    folder.mkdir(exist_ok=True)
    for name, n in zip(('train', 'dev'), rows):
        lines = ['sentence\tlabel']
        for _ in range(n):
            label = rng.randrange(2)
            words = rng.choices(['a', 'film', 'of', '"quotes', 'it', 'null'], k=rng.randrange(5))
            words.append('good' if label else 'bad')
            lines.append(f'{" ".join(words)} \t{label}')
        (folder / f'{name}.tsv').write_text('\n'.join(lines) + '\n')


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """A folder with an encoder, a causal model (run, causal) and sentences (sst2)."""
    folder = tmp_path_factory.mktemp('runs')
    write_sst2(folder / 'sst2')
    (folder / 'answers.csv').write_text('text\n' + 'a positive\na negative\n' * 800)
    words = ['--causal=True', '--source=answers.csv', '--tokenizer=bpe', '--vocab_size=272',
             '--block_size=128']
    return train_runs(folder, SMALL, dict(run=['--causal=False'], causal=['--causal=True'],
                                          words=words))


@pytest.fixture
def folder(runs, workspace):
    shutil.copytree(runs, workspace, dirs_exist_ok=True)
    return workspace


def read_lines(*path):
    return Path(*path).read_text().splitlines()


@pytest.mark.parametrize('run', ['run', 'causal'])
def test_learns_and_writes_what_it_says(folder, script, capsys, run):
    script(finetune_sst2, *QUICK, f'--out_dir={run}', '--seeds=2', '--seed=5', '--epochs=4')
    out = json.loads(Path(run, 'sst2.json').read_text())
    assert out['seeds'] == [5, 6] and min(out['test_accuracy']) > 0.9
    assert len(out['validation_accuracy']) == 2
    assert out['mean'] == statistics.mean(out['test_accuracy'])
    assert out['std'] == statistics.stdev(out['test_accuracy'])
    assert out['ci95'] == pytest.approx(12.706 * out['std'] / math.sqrt(2))
    assert out['binomial_se'] == pytest.approx(math.sqrt(out['mean'] * (1 - out['mean']) / 60))
    assert out['bag_of_words'] == dict(validation_accuracy=1.0, test_accuracy=1.0)
    assert 'a bag of words scores 100.00% on the same test' in capsys.readouterr().out

    saved = torch.load(f'{run}/sst2.pt', weights_only=True)
    assert saved['provenance']['tokenizer'] == load_run(run)[1].digest()

    # the predictions are those of the seed that is best on the held-out tenth, and give its
    # accuracy
    lines = [line.split('\t') for line in read_lines(run, 'sst2_predictions.tsv')]
    assert lines[0] == ['text', 'label', 'probability'] and len(lines) == 61
    sentences = [line.split('\t')[0].strip() for line in read_lines('sst2/dev.tsv')]
    assert [line[0] for line in lines[1:4]] == sentences[1:4]
    chosen = int(np.argmax(out['validation_accuracy']))
    right = [(float(p) > 0.5) == (label == '1') for _, label, p in lines[1:]]
    assert statistics.mean(right) == pytest.approx(out['test_accuracy'][chosen])

    metrics = [json.loads(line) for line in read_lines(run, 'sst2_metrics.jsonl')]
    names = {'seed', 'step', 'seconds', 'train_loss', 'lr', 'sentences_per_second'}
    assert names <= metrics[0].keys()
    accuracies = [line['val_accuracy'] for line in metrics if 'val_accuracy' in line]
    assert accuracies.count(out['validation_accuracy'][0]) >= 1

    script(finetune_sst2, f'--out_dir={run}', '--device=cpu', f'--predict={lines[1][0]}')
    last_line = capsys.readouterr().out.splitlines()[-1]
    shown = re.search(r'probability of positive ([\d.]+)', last_line)[1]
    assert float(shown) == pytest.approx(float(lines[1][2]), abs=1e-3)


def test_a_bag_of_words_knows_pairs_and_no_order_beyond():
    """The label hangs on a pair; each word is as frequent with either label. Words that no training
    phrase has, or that a sentence has twice, change nothing."""
    texts = dict(train=[('not good', 0), ('good', 1), ('not bad', 1), ('bad', 0)] * 20,
                 validation=[('a film that is Not good', 0), ('bad film', 0)],
                 test=[('it is not bad', 1), ('good good', 1), ('bad it is', 0)])
    scores = bag_of_words(texts)
    assert scores == dict(validation_accuracy=1.0, test_accuracy=1.0)


def test_the_held_out_tenth_chooses_the_penalty(monkeypatch):
    """Of labels of which 30% are wrong, the lower the penalty the more is learned by heart."""
    rng = random.Random(0)

    def sentences(n, noise):
        for _ in range(n):
            label = rng.randrange(2)
            words = [f'w{rng.randrange(60)}' for _ in range(3)] + [('bad', 'good')[label]]
            yield ' '.join(words), label if rng.random() > noise else 1 - label

    texts = {split: list(sentences(200, noise))
             for split, noise in dict(train=0.3, validation=0.0, test=0.0).items()}
    scores = {}
    for penalties in ((10.0,), (0.1,), (10.0, 0.1), (0.1, 10.0)):
        monkeypatch.setattr(finetune_sst2, 'PENALTIES', penalties)
        scores[penalties] = bag_of_words(texts)['validation_accuracy']
    assert scores[10.0, 0.1] == scores[10.0,] > scores[0.1,] + 0.1
    assert scores[0.1, 10.0] == pytest.approx(scores[10.0,], abs=0.01)


def test_from_scratch_takes_nothing_from_the_run_but_its_shape(folder, script):
    run = load_run('run')
    tuning = FinetuneOptions(out_dir='run')
    anew = FinetuneOptions(out_dir='run', from_scratch=True)
    pretrained = run[0].state_dict()
    tuned = make_classifier(run, tuning, 1).model.state_dict()
    scratch = make_classifier(run, anew, 1).model.state_dict()
    matrices = [name for name in pretrained if pretrained[name].dim() > 1]
    assert all(torch.equal(tuned[name], pretrained[name]) for name in pretrained)
    assert not any(torch.equal(scratch[name], pretrained[name]) for name in matrices)
    script(finetune_sst2, *QUICK, '--out_dir=run', '--from_scratch=True', '--epochs=1')
    endings = '.json', '.pt', '_metrics.jsonl', '_predictions.tsv'
    assert {path.name for path in Path('run').glob('sst2*')} == {
        f'sst2_from_scratch{ending}' for ending in endings}


def test_a_causal_model_answers_in_words(folder, script, capsys):
    common = ['--out_dir=words', '--as_text=True']
    script(finetune_sst2, *QUICK, *common, '--epochs=1')
    rows = [line.split('\t') for line in read_lines('words/sst2_as_text_predictions.tsv')[1:]]
    right = [int(label) == (float(p) > 0.5) for _, label, p in rows]
    summary = json.loads(Path('words/sst2_as_text.json').read_text())
    assert summary['mean'] == pytest.approx(np.mean(right))
    # which is the model's own probability of one word next to the other
    tuned = torch.load('words/sst2_as_text.pt')['model']
    model, tokenizer, _ = load_run('words')
    model.load_state_dict({name.removeprefix('model.'): w for name, w in tuned.items()})
    sentence = read_sst2(FinetuneOptions(out_dir='words', data_dir='sst2'))['test'][0][0]
    ids = tokenizer.encode(f'{finetune_sst2.BEFORE}{sentence} -')
    words = tokenizer.encode(' negative positive')
    with torch.no_grad():
        logits = model(torch.tensor([[tokenizer.eot, *ids]]))[0, -1]
    assert len(words) == 2
    assert logits[words].softmax(0)[1].item() == pytest.approx(float(rows[0][2]), 1e-4)
    loss = json.loads(read_lines('words/sst2_as_text_metrics.jsonl')[0])['train_loss']
    assert loss > 2  # of the whole vocabulary at the one position, not of two words
    script(finetune_sst2, *common, f'--predict={"long " * 40}good')  # the end of it is cut off
    out, err = capsys.readouterr()
    assert 'probability of positive' in out and '1 of 1 sentences' in err


@pytest.mark.parametrize('run', ['run', 'causal'])
def test_padding_changes_no_prediction(folder, run, capsys):
    loaded = load_run(run)
    tokenizer, classifier = loaded[1], make_classifier(loaded, FinetuneOptions(out_dir=run), 1)
    device = Device(FinetuneOptions(out_dir=run, device='cpu'))
    classifier.double()
    texts = [('good', 1), ('a film of it', 0), ('a long film of good and bad and it', 1),
             ('bad', 0)]
    together = score(classifier, tokenize(texts, tokenizer, 64), device)[2]
    alone = torch.cat([score(classifier, tokenize([text], tokenizer, 64), device)[2]
                       for text in texts])
    assert (together - alone).abs().max() < 1e-7 and together.std() > 1e-6 and together.dim() == 1
    assert not capsys.readouterr().err


def test_long_sentences_are_cut_off_and_counted(folder, capsys):
    tokenizer = load_run('run')[1]
    idx, lengths, labels = tokenize([('x' * 100, 1), ('ab', 0)], tokenizer, 64, 'train')
    assert idx.shape == (2, 64) and lengths.tolist() == [64, 3] and labels.tolist() == [1, 0]
    assert idx[0].tolist() == [tokenizer.eot] + [ord('x')] * 63
    assert idx[1, :3].tolist() == [tokenizer.eot, ord('a'), ord('b')]
    assert 'train: 1 of 2 sentences are longer' in capsys.readouterr().err
    assert [part.tolist() for part in take((idx, lengths, labels), [1])] == [
        [[tokenizer.eot, ord('a'), ord('b')]], [3], [0]]


def test_what_the_classifier_reads(folder):
    """Of an encoder, the first position, which has the whole sentence in view; of a causal model,
    the last real one."""
    for run, position in (('run', 0), ('causal', 6)):
        loaded = load_run(run)
        classifier = make_classifier(loaded, FinetuneOptions(out_dir=run), 1).eval()
        tokenizer = loaded[1]
        idx = torch.tensor([[tokenizer.eot, *tokenizer.encode('a film')]])
        x = classifier.model.hidden(idx)[0][:, position]
        if run == 'run':
            x = torch.tanh(classifier.pooler[0](x))
        expected = classifier.classifier(x)
        assert torch.allclose(classifier(idx, torch.tensor([7])), expected, atol=1e-6)


def test_batches_of_like_length():
    lengths = torch.randint(1, 50, (1003,), generator=torch.Generator().manual_seed(0))
    batches = batches_by_length(lengths, 16, np.random.default_rng(1))
    assert sorted(np.concatenate(batches)) == list(range(1003)) and max(map(len, batches)) == 16
    padded = sum(lengths[batch].max() * len(batch) for batch in batches)
    assert padded < 1.05 * lengths.sum()
    longest = [int(lengths[batch].max()) for batch in batches]
    assert longest != sorted(longest)
    again = batches_by_length(lengths, 16, np.random.default_rng(1))
    assert all((a == b).all() for a, b in zip(batches, again))
    other = batches_by_length(lengths, 16, np.random.default_rng(2))
    assert not all(set(a) == set(b) for a, b in zip(batches, other))


def test_the_split_is_90_10_and_the_same_for_every_subset(folder):
    """Here each row has a sentence of its own. Every phrase is used once, and none both to train
    and to choose the epoch."""
    for name, n in (('train', 200), ('dev', 20)):
        rows = ''.join(f'{name} phrase {i}\t{i % 2}\n' for i in range(n))
        Path(f'sst2/{name}.tsv').write_text('sentence\tlabel\n' + rows)
    texts = read_sst2(FinetuneOptions(out_dir='run', data_dir='sst2'))
    sizes = {split: len(part) for split, part in texts.items()}
    assert sizes == dict(train=180, validation=20, test=20)
    phrases = {(f'train phrase {i}', i % 2) for i in range(200)}
    assert {*texts['train'], *texts['validation']} == phrases
    assert texts['test'] == [(f'dev phrase {i}', i % 2) for i in range(20)]
    few = read_sst2(FinetuneOptions(out_dir='run', data_dir='sst2', train_examples=50, seed=9))
    assert few['train'] == texts['train'][:50] and few['validation'] == texts['validation']


def test_a_byte_order_mark_is_no_word(folder):
    rows = ''.join(f'\ufeffgood film {i}\t1\n' for i in range(20)) + '0\t1\n'
    Path('sst2/train.tsv').write_text('\ufeffsentence\tlabel\n' + rows, encoding='utf-8')
    texts = read_sst2(FinetuneOptions(out_dir='run', data_dir='sst2'))
    phrases = {text for text, _ in (*texts['train'], *texts['validation'])}
    assert phrases == {'0', *(f'good film {i}' for i in range(20))}


def test_the_best_epoch_on_the_held_out_tenth_is_tested(folder, monkeypatch):
    """Not the last one, and the test has no say: its accuracy is asked for once."""
    run, texts = load_run('run'), read_sst2(FinetuneOptions(out_dir='run', data_dir='sst2'))
    data = {split: tokenize(part, run[1], 64) for split, part in texts.items()}
    answers, asked = iter([(1.0, 0.6), (1.0, 0.9), (1.0, 0.7)]), []

    def fake(classifier, data, device):
        asked.append((len(data[0]), classifier.classifier.weight.detach().clone()))
        if len(data[0]) == 60:  # the test
            return 0.0, 0.5, torch.zeros(60)
        return *next(answers), torch.zeros(30)

    monkeypatch.setattr(finetune_sst2, 'score', fake)
    options = FinetuneOptions(out_dir='run', device='cpu', epochs=3, learning_rate=1e-2)
    best = finetune_sst2.finetune(options, 1, run, data, Device(options),
                                  record=lambda **line: None)
    assert (best['epoch'], best['validation_accuracy'], best['test_accuracy']) == (2, 0.9, 0.5)
    assert [n for n, _ in asked] == [30, 30, 30, 60]
    assert torch.equal(asked[3][1], asked[1][1]) and not torch.equal(asked[3][1], asked[2][1])


def test_the_hub_is_asked_for_sst2(folder, monkeypatch):
    import datasets
    asked = []

    def load_dataset(path, name=None, split=None, streaming=None):
        asked.append((path, split))
        columns = dict(idx=range(20), sentence=[f'{split} {i} ' for i in range(20)],
                       label=[0, 1] * 10)
        return datasets.Dataset.from_dict(columns).to_iterable_dataset()

    monkeypatch.setattr(datasets, 'load_dataset', load_dataset)
    texts = read_sst2(FinetuneOptions(out_dir='run'))
    assert asked == [('stanfordnlp/sst2', 'train'), ('stanfordnlp/sst2', 'validation')]
    assert len(texts['train']) == 18 and texts['test'][1] == ('validation 1', 1)


def test_wandb_gets_a_run_of_its_own_for_each_seed(folder, script, monkeypatch):
    import wandb
    started, logged = [], []

    class Run:
        log = staticmethod(lambda line, step=None: logged.append(line))
        finish = staticmethod(lambda: None)

    def init(**options):
        started.append((options['project'], options['name']))
        return Run

    monkeypatch.setattr(wandb, 'init', init)
    script(finetune_sst2, *QUICK, '--out_dir=run', '--seeds=2', '--wandb=True', '--epochs=1')
    assert started == [('encoder-pretrain-sst2', 'run-1337'), ('encoder-pretrain-sst2', 'run-1338')]
    assert sum('test_accuracy' in line for line in logged) == 2
    assert any('train_loss' in line for line in logged)


def test_earlier_results_stay_until_there_are_new_ones(folder, script, monkeypatch):
    script(finetune_sst2, *QUICK, '--out_dir=run', '--epochs=1')
    before, summary = results_of('run'), json.loads(Path('run/sst2.json').read_text())
    assert summary['std'] is None and summary['ci95'] is None

    def interrupt(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(finetune_sst2, 'score', interrupt)
        script(finetune_sst2, *QUICK, '--out_dir=run', '--epochs=1')
    assert results_of('run') == before
    script(finetune_sst2, *QUICK, '--out_dir=run', '--epochs=1', '--seeds=2')
    # all are those of two seeds, and the same seed has given the same accuracy
    steps = [json.loads(line)['step'] for line in read_lines('run/sst2_metrics.jsonl')]
    assert steps.count(5) == 2
    # all earlier results are renamed
    aside = {path.name for path in Path('run').glob('sst2-*')}
    assert len(aside) == 4 and {name.split('-', 1)[1][15:] for name in aside} == {
        name.removeprefix('sst2') for name in before}
    again = json.loads(Path('run/sst2.json').read_text())
    assert again['test_accuracy'][0] == summary['test_accuracy'][0]


def results_of(run):
    """{name: content} of the files with results in a run folder."""
    return {path.name: path.read_bytes() for path in Path(run).glob('sst2*')}


def test_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    for n in (2, 3, 5, 20):
        hits = 0
        for _ in range(1500):
            mean, half = mean_and_interval(rng.normal(3.0, 2.0, n).tolist())
            hits += abs(mean - 3.0) <= half
        assert abs(hits / 1500 - 0.95) < 0.02
    assert mean_and_interval([0.5]) == (0.5, None)


GOOD = 'good\t1\n' * 20
DAMAGED = {  # what train.tsv may hold
    'columns': 'text\tlabel\ngood\t1\n',
    'label': f'sentence\tlabel\n{GOOD}bad\t2\n',
    'late label': f'sentence\tlabel\n{GOOD * 600}bad\tnegative\n',
    'no label': f'sentence\tlabel\n{GOOD}bad\t\n',
    'empty': f'sentence\tlabel\n{GOOD}  \t0\n',
    'tabs': f'sentence\tlabel\n{GOOD}a\tb\tc\t0\n',
    'few': 'sentence\tlabel\ngood\t1\n',
}


def damage(what):
    """Breaks the working directory in one way."""
    if what in DAMAGED:
        Path('sst2/train.tsv').write_text(DAMAGED[what])
    elif what == 'no dev':
        Path('sst2/dev.tsv').unlink()
    elif what == 'checkpoint':
        for path in Path('run').glob('*.pt'):
            path.unlink()
    elif what == 'tokenizer':
        prepare.make_tokenizer('byte', lowercase=True).save('run/tokenizer.json')


@pytest.mark.parametrize('what, arguments, message', [
    ('checkpoint', [], 'run/ckpt.pt: there is no such checkpoint'),
    ('tokenizer', [], 'run/tokenizer.json: another tokenizer than ckpt_best.pt was trained with'),
    ('columns', [], 'sst2/train.tsv, row 1: column sentence must hold text and column label 0 '
                    "(negative) or 1 (positive), not None and '1'"),
    ('label', [], "sst2/train.tsv, row 21: column sentence must hold text and column label 0"),
    ('late label', [], "sst2/train.tsv, row 12001: column sentence"),
    ('no label', [], "not 'bad' and ''"),
    ('empty', [], 'sst2/train.tsv, row 21: column sentence must hold text'),
    ('tabs', [], 'sst2/train.tsv cannot be read'),
    ('few', [], '1 phrases to train on and 60 sentences to test on are too few'),
    ('no dev', [], 'sst2/dev.tsv'),
    (None, ['--data_dir=elsewhere'], 'elsewhere/train.tsv'),
    (None, ['--data_dir=None'], 'or give local files with --data_dir=FOLDER'),
    (None, ['--train_examples=1000'], 'train_examples=1000: must be <= 270, 30 more phrases are'),
    (None, ['--train_examples=0'], 'train_examples=0: must be an integer >= 1'),
    (None, ['--out_dir=None'], 'which run? --out_dir=RUN'),
    (None, ['--classifier_dropout=1.0'], 'must be a number >= 0 and < 1'),
    (None, ['--seed=-1'], 'seed=-1: must be an integer >= 0'),
    (None, ['--predict=good'], 'run/sst2.pt: there is no fine-tuned model'),
    (None, ['config/mla.py'], 'options are written --key=value'),
])
def test_refusals(folder, script, what, arguments, message):
    damage(what)
    with pytest.raises((UserError, OSError)) as error:
        script(finetune_sst2, *QUICK, '--out_dir=run', *arguments)
    assert message in str(error.value) and not list(Path('run').glob('sst2*'))


@pytest.mark.slow
def test_an_ascii_locale_writes_utf8(folder):
    rows = ''.join(f'a film by René {i}\t{i % 2}\n' for i in range(40))
    Path('sst2/dev.tsv').write_text('sentence\tlabel\n' + rows, encoding='utf-8')
    ascii = dict(os.environ, LC_ALL='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0')
    result = shell(finetune_sst2.__file__, *QUICK, '--out_dir=run', '--epochs=1', env=ascii)
    assert result.returncode == 0 and not result.stderr
    predictions = Path('run/sst2_predictions.tsv').read_text(encoding='utf-8')
    assert 'a film by René 39\t1\t' in predictions


def test_predict_refuses_what_is_not_of_one_run(folder, script, capsys):
    run, tokenizer = load_run('run'), Path('run/tokenizer.json')
    state = dict(model=make_classifier(run, FinetuneOptions(out_dir='run'), 1).state_dict(),
                 options=run[2], step=1, provenance=dict(tokenizer=run[1].digest()))
    predict = ['--out_dir=run', '--device=cpu', '--predict=good']
    own = tokenizer.read_text()
    message = 'run/tokenizer.json: another tokenizer than sst2.pt was trained with'
    prepare.make_tokenizer('bpe', False, ['good ' * 9], 262).save(tokenizer)
    save_checkpoint(Path('run/sst2.pt'), state)
    with pytest.raises(UserError, match=message):
        script(finetune_sst2, *predict)
    tokenizer.write_text(own)
    for text, shown in (('None', 'None'), ('"q"', '"q"'), ('x' * 99, 'x' * 63 + ' [cut]')):
        script(finetune_sst2, *predict[:2], f'--predict={text}')
        assert capsys.readouterr().out.endswith(f'): {shown}\n')
    state['model']['classifier.bias'][0] = float('nan')
    save_checkpoint(Path('run/sst2.pt'), state)
    with pytest.raises(UserError, match='holds numbers that are not finite'):
        script(finetune_sst2, *predict)


def test_refuses_an_empty_sentence_and_torchrun(folder, script, monkeypatch):
    script(finetune_sst2, *QUICK, '--out_dir=run', '--epochs=1')
    with pytest.raises(UserError, match='the sentence is empty'):
        script(finetune_sst2, '--out_dir=run', '--predict= ')
    torchrun = dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=2, MASTER_ADDR='localhost', MASTER_PORT=1)
    for name, value in torchrun.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match='start it with python'):
        script(finetune_sst2, *QUICK, '--out_dir=run')
