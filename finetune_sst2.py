"""Fine-tunes and tests a run of train.py on SST-2: is a sentence of a film review positive?

    python finetune_sst2.py --out_dir=out/mla_o --seeds=5              # as published, for encoders
    python finetune_sst2.py --out_dir=out/mla_o --from_scratch=True    # without its pre-training
    python finetune_sst2.py --out_dir=out/mla_o --predict="a gorgeous , witty , seductive movie"
    python finetune_sst2.py --out_dir=out/deepseek_tiny --as_text=True --epochs=6 \\
        --batch_size=256 --learning_rate=5e-5 --weight_decay=0.05  # published for decoders

Writes into the run folder: sst2.json (accuracies of all seeds, and of a bag of words),
sst2_predictions.tsv (text, label, probability that it is positive), sst2_metrics.jsonl and sst2.pt
(weights of the seed that is best on the held-out tenth). With as_text or from_scratch their names
say so, as in sst2_as_text.json. Earlier ones are renamed, with their date, when the first seed is
done.

SST-2's training split gives training and validation, 90/10 at random. It consists of sentences and
of phrases from them, so the held-out tenth is easier than the test. The labels of SST-2's own test
are not public: its validation split ('dev') is the test here.
"""

import copy
import dataclasses
import json
import math
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import config  # before torch: from here on Ctrl-C is one line

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import prepare
from config import UserError
from model import Count, NotNegative, Positive, Share
from run import (Device, DeviceOptions, Seed, build, build_empty, claim, date_of, load_checkpoint,
                 load_run, load_tokenizer, load_weights, mean_and_interval, model_options_of,
                 open_wandb, ranks, save_checkpoint, save_text)
from train import TrainOptions, make_optimizers, stop_if_not_finite

SPLIT_SEED = 0  # of the held-out tenth and of train_examples: the same for every run
EVAL_BATCH = 64
PENALTIES = 10.0, 1.0, 0.1  # L2 penalties that are tried for the bag of words
# as_text: what a causal model reads before and after a sentence, and what it should go on with
BEFORE = 'a warm , clever film - positive\na long and lifeless film - negative\n'
AFTER, ANSWERS = ' -', (' negative', ' positive')


@dataclass
class FinetuneOptions(DeviceOptions):
    """Options"""

    out_dir: str | None = None  # a run of train.py, causal or not; takes the results, too
    data_dir: str | None = None  # folder with GLUE's train.tsv and dev.tsv; None = SST-2 of the hub
    seeds: Count = 1  # repetitions, with seed, seed + 1, ...
    seed: Seed = 1337  # of the classifier's first weights, the order of phrases, and dropout
    from_scratch: bool = False  # new weights instead of the run's: did pre-training help?
    as_text: bool = False  # no classifier: a causal model writes " positive" or " negative"
    train_examples: Count | None = None  # train on a fixed subset of so many phrases; None = all
    epochs: Count = 3  # passes over the phrases; the best one on the held-out tenth is tested
    batch_size: Count = 16  # phrases per step
    learning_rate: Positive = 2e-5  # highest learning rate, falling linearly to zero
    classifier_dropout: Share = 0.1  # before the classifier
    weight_decay: NotNegative = 0.0  # on matrices and embeddings
    log_interval: Count = 100  # steps between lines
    wandb: bool = False  # log to Weights & Biases too, project encoder-pretrain-sst2
    predict: str = None  # classify this sentence with the fine-tuned run, then exit

    def __post_init__(self):
        if self.out_dir is None:
            raise UserError('which run? --out_dir=RUN names a run folder of train.py')
        if ranks()[2] > 1:
            raise UserError('this takes minutes on one device: start it with python, not torchrun')

    def file(self, ending):
        """A file of results in the run folder."""
        kind = '_as_text' * self.as_text + '_from_scratch' * self.from_scratch
        return Path(self.out_dir, f'sst2{kind}{ending}')


# --------------------------------------------------------------------------------------------------
# data and baseline


def read_split(file, split):
    """[(sentence, label)] of a tsv file, or if that is None of a split of SST-2 on the hub."""
    examples = []
    for i, row in enumerate(prepare.rows('sst2', file, split, '--data_dir=FOLDER'), 1):
        sentence, label = row.get('sentence'), row.get('label')
        # a byte order mark is no word
        text = ' '.join(str(sentence or '').replace('\ufeff', ' ').split())
        if not text or str(label) not in ('0', '1'):
            raise UserError(f'{file or "stanfordnlp/sst2"}, row {i}: column sentence must hold '
                            'text and column label 0 (negative) or 1 (positive), not '
                            f'{sentence!r} and {label!r}')
        examples.append((text, int(label)))
    return examples


def read_sst2(options):
    """{'train', 'validation', 'test': [(sentence, label), ...]}"""
    folder = options.data_dir
    phrases = read_split(folder and os.path.join(folder, 'train.tsv'), 'train')
    test = read_split(folder and os.path.join(folder, 'dev.tsv'), 'validation')
    n_held_out = len(phrases) // 10
    n_train = options.train_examples or len(phrases) - n_held_out
    if not n_held_out or not test:
        raise UserError(f'{len(phrases)} phrases to train on and {len(test)} sentences to test on '
                        'are too few')
    if n_train > len(phrases) - n_held_out:
        raise UserError(f'train_examples={n_train}: must be <= {len(phrases) - n_held_out}, '
                        f'{n_held_out} more phrases are held out')
    order = np.random.default_rng(SPLIT_SEED).permutation(len(phrases))
    return dict(train=[phrases[i] for i in order[n_held_out:][:n_train]],
                validation=[phrases[i] for i in order[:n_held_out]], test=test)


def tokenize(examples, tokenizer, block_size, name='data', as_text=False):
    """[(sentence, label)] -> idx (N, T), lengths (N,), labels (N,), int64. A row of idx starts with
    <|endoftext|>, is cut off at block_size, and ends in padding. name: of the data, for a line.
    as_text: BEFORE and AFTER surround the sentence, the end of which is cut off instead."""
    before, after = (tokenizer.encode(part) if as_text else [] for part in (BEFORE, AFTER))
    room = block_size - 1 - len(before) - len(after)
    if room < 1:
        raise UserError(f'block_size={block_size}: too short for the examples of as_text')
    rows = tokenizer.encode_batch([text for text, _ in examples])
    if n_cut := sum(len(row) > room for row in rows):
        print(f'{name}: {n_cut} of {len(rows)} sentences are longer than the model can read: they '
              f'are cut off after {room} tokens', file=sys.stderr)
    ids = [torch.tensor([tokenizer.eot, *before, *row[:room], *after]) for row in rows]
    idx = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=tokenizer.eot)
    lengths = torch.tensor([len(row) for row in ids])
    return idx, lengths, torch.tensor([label for _, label in examples])


def batches_by_length(lengths, batch_size, rng=None):
    """Batches, as arrays of indices into `lengths`, of sentences of nearly one length, so that
    little is padded. rng shuffles the batches, and the sentences of equal length."""
    order = rng.permutation(len(lengths)) if rng else np.arange(len(lengths))
    order = order[np.argsort(lengths.numpy()[order], kind='stable')]
    batches = [order[start:start + batch_size] for start in range(0, len(order), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))] if rng else batches


def take(data, chosen):
    """The chosen sentences of what `tokenize` returned, without columns that hold only padding."""
    idx, lengths, labels = (tensor[chosen] for tensor in data)
    return idx[:, :lengths.max()], lengths, labels


def features(text):
    """What a bag of words holds: each word, each pair of neighbours, and '', whose weight is the
    bias. None is there twice."""
    words = text.lower().split()
    return dict.fromkeys(['', *words, *zip(words, words[1:])])


def bag_of_words(texts):
    """Accuracies of a logistic regression on words and pairs of words, which a model that knows
    more than words should exceed: dict(validation_accuracy, test_accuracy). The held-out tenth
    chooses the penalty."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # operations this small only wait for each other
    # what occurs in no training phrase has no weight
    known = dict.fromkeys(name for text, _ in texts['train'] for name in features(text))
    column_of, bags, labels, results = {name: i for i, name in enumerate(known)}, {}, {}, []
    for split, examples in texts.items():
        bags[split] = torch.tensor([
            (row, column_of[name]) for row, (text, _) in enumerate(examples)
            for name in features(text) if name in column_of]).T
        labels[split] = torch.tensor([float(label) for _, label in examples])
    weights = torch.zeros(len(column_of), requires_grad=True)

    def logits(split):
        rows, columns = bags[split]
        return torch.zeros_like(labels[split]).index_add(0, rows, weights.index_select(0, columns))

    def closure():
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(logits('train'), labels['train'])
        loss = loss + penalty / 2 * weights.square().sum() / len(texts['train'])
        loss.backward()
        return loss

    for penalty in PENALTIES:
        optimizer = torch.optim.LBFGS([weights], max_iter=50, line_search_fn='strong_wolfe')
        optimizer.step(closure)
        results.append({f'{split}_accuracy': ((logits(split) > 0) == labels[split]).double().mean()
                        .item() for split in ('validation', 'test')})
    torch.set_num_threads(threads)
    return max(results, key=lambda result: result['validation_accuracy'])


# --------------------------------------------------------------------------------------------------
# model


class Classifier(nn.Module):
    """A model of train.py with two logits on top. An encoder is read at <|endoftext|>, its first
    token, through a tanh pooler (BERT, arXiv 1810.04805); a causal model at the last token, the
    only one that has seen all the others."""

    answers = 0, 1  # the indices, among the logits, of a negative and a positive label

    def __init__(self, model, dropout):
        super().__init__()
        self.model, self.config = model, model.config
        self.causal, width = model.config.causal, model.config.n_embd
        pooler = [] if self.causal else [nn.Linear(width, width), nn.Tanh()]
        self.pooler = nn.Sequential(*pooler)
        self.dropout, self.classifier = nn.Dropout(dropout), nn.Linear(width, 2)
        for layer in (self.classifier, *self.pooler[:1]):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, idx, lengths):
        """idx (B, T) int64, padded at the end, lengths (B,) -> logits (B, 2)."""
        if self.causal:  # the token that is read sees no padding, which comes later
            rows = torch.arange(len(idx), device=idx.device)
            hidden, _ = self.model.hidden(idx)  # (B, T, D)
            x = hidden[rows, lengths - 1]  # (B, D)
        else:
            key_mask = torch.arange(idx.size(1), device=idx.device) < lengths[:, None]  # (B, T)
            hidden, _ = self.model.hidden(idx, key_mask)
            x = hidden[:, 0]  # (B, D)
        return self.classifier(self.dropout(self.pooler(x)))


class TextClassifier(nn.Module):
    """A causal model that answers in words: its logits are those of the token after AFTER."""

    def __init__(self, model, tokenizer):
        super().__init__()
        words = [tokenizer.encode(word) for word in ANSWERS]
        if not model.config.causal or any(len(word) > 1 for word in words):
            raise UserError('as_text: needs a causal model, and a tokenizer in which '
                            f'{ANSWERS[0]!r} and {ANSWERS[1]!r} are one token each, such as gpt2')
        self.model, self.config, self.answers = model, model.config, sum(words, [])

    def forward(self, idx, lengths):
        """idx (B, T) int64, padded at the end, lengths (B,) -> logits (B, vocab_size)."""
        return self.model(idx, positions=lengths[:, None] - 1)[:, 0]


def make_classifier(run, options, seed):
    """A classifier on the model of a run, or from scratch on a new one of its shape. run: what
    load_run returned."""
    model, tokenizer, run_options = run
    torch.manual_seed(seed)
    if options.from_scratch:
        model = build(run_options['arch'], model_options_of(run_options))
    model = copy.deepcopy(model)
    if options.as_text:
        return TextClassifier(model, tokenizer)
    return Classifier(model, options.classifier_dropout)


@torch.no_grad()
def score(classifier, data, device):
    """(loss, accuracy, probability of a positive label per sentence). data: see `tokenize`."""
    classifier.eval()
    _, lengths, labels = data
    logits, answers = torch.zeros(len(labels), 2), list(classifier.answers)
    for chosen in batches_by_length(lengths, EVAL_BATCH):
        batch, batch_lengths, _ = device.put(take(data, chosen))
        with device.autocast():
            logits[chosen] = classifier(batch, batch_lengths)[:, answers].float().cpu()
    classifier.train()
    probabilities = logits.softmax(dim=-1)[:, 1]
    accuracy = ((probabilities > 0.5) == labels).double().mean().item()
    return F.cross_entropy(logits, labels).item(), accuracy, probabilities


def train_step(classifier, optimizer, batch, device):
    idx, lengths, labels = device.put(batch)
    negative, positive = classifier.answers
    with device.autocast():
        loss = F.cross_entropy(classifier(idx, lengths).float(),
                               torch.where(labels == 1, positive, negative))
    loss.backward()
    norm = nn.utils.clip_grad_norm_(classifier.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach(), norm


def finetune(options, seed, run, data, device, record):
    """Trains once. Returns a dict: epoch, validation_accuracy and weights of the best epoch on the
    held-out tenth, and its test_accuracy and probabilities on the test. run: what load_run
    returned. data: {split: what `tokenize` returned}. record: takes metrics by name."""
    classifier = make_classifier(run, options, seed).to(device.torch_device).train()
    _, lengths, _ = data['train']
    n_steps = options.epochs * math.ceil(len(lengths) / options.batch_size)
    optimizer, = make_optimizers(classifier, TrainOptions(
        learning_rate=options.learning_rate, weight_decay=options.weight_decay, beta2=0.999))
    step, best, start = 0, dict(validation_accuracy=-1.0), time.perf_counter()
    for epoch in range(options.epochs):
        rng = np.random.default_rng((seed, epoch))
        for chosen in batches_by_length(lengths, options.batch_size, rng):
            lr = (1 - step / n_steps) * options.learning_rate
            for group in optimizer.param_groups:
                group['lr'] = lr
            loss, norm = train_step(classifier, optimizer, take(data['train'], chosen), device)
            step += 1
            if step % options.log_interval == 0 or step == n_steps:
                loss, norm = loss.item(), norm.item()  # which wait for the device
                stop_if_not_finite(step, loss, norm)
                seconds = time.perf_counter() - start
                rate = step * options.batch_size / seconds
                record(seed=seed, step=step, seconds=seconds, train_loss=loss, grad_norm=norm,
                       lr=lr, sentences_per_second=rate)
                print(f'seed {seed}, step {step}/{n_steps}: loss {loss:.4f}, {rate:,.0f} '
                      'sentences/s', flush=True)
        val_loss, val_accuracy, _ = score(classifier, data['validation'], device)
        stop_if_not_finite(step, val_loss)
        record(seed=seed, step=step, seconds=time.perf_counter() - start, val_loss=val_loss,
               val_accuracy=val_accuracy)
        print(f'seed {seed}, epoch {epoch + 1}: loss {val_loss:.4f}, accuracy {val_accuracy:.4f} '
              'on the held-out tenth', flush=True)
        if val_accuracy > best['validation_accuracy']:
            weights = {name: w.cpu().clone() for name, w in classifier.state_dict().items()}
            best = dict(epoch=epoch + 1, validation_accuracy=val_accuracy, weights=weights)
    classifier.load_state_dict(best['weights'])
    _, accuracy, probabilities = score(classifier, data['test'], device)
    print(f'seed {seed}: test accuracy {accuracy:.2%} after epoch {best["epoch"]}', flush=True)
    return best | dict(test_accuracy=accuracy, probabilities=probabilities.tolist())


# --------------------------------------------------------------------------------------------------
# results


def set_aside(options):
    """Renames earlier results of the same kind, with their date."""
    endings = '.json', '_predictions.tsv', '_metrics.jsonl', '.pt'
    files = [options.file(ending) for ending in endings if options.file(ending).exists()]
    if files:
        folder = Path(options.out_dir)
        date = date_of(files[0], lambda date: any(folder.glob(f'sst2-{date}[._]*')))
        for file in files:
            file.rename(file.with_name(file.name.replace('sst2', f'sst2-{date}', 1)))
        print(f'{files[0]} is of an earlier run: renamed to sst2-{date}..., and what belongs to it')


def save_results(options, results, lines, run, test, baseline):
    """Writes the results of the seeds that are done; predictions and weights are those of the seed
    that is best on the held-out tenth. Returns what sst2.json holds. results: what `finetune`
    returned, from which the weights are removed. lines: metrics. baseline: of bag_of_words."""
    best = max(results, key=lambda result: result['validation_accuracy'])
    if best is results[-1]:
        rows = zip(test, best['probabilities'])
        table = [f'{text}\t{label}\t{p:.9g}\n' for (text, label), p in rows]
        save_text(options.file('_predictions.tsv'), 'text\tlabel\tprobability\n' + ''.join(table))
        save_checkpoint(options.file('.pt'),
                        dict(model=best['weights'], options=run[2], step=best['epoch'],
                             provenance=dict(tokenizer=run[1].digest())))
    del results[-1]['weights']
    save_text(options.file('_metrics.jsonl'), ''.join(json.dumps(line) + '\n' for line in lines))
    accuracies = [result['test_accuracy'] for result in results]
    mean, interval = mean_and_interval(accuracies)
    summary = dict(
        seeds=[options.seed + i for i in range(len(results))],
        validation_accuracy=[result['validation_accuracy'] for result in results],
        test_accuracy=accuracies, mean=mean,
        std=statistics.stdev(accuracies) if len(results) > 1 else None, ci95=interval,
        binomial_se=math.sqrt(mean * (1 - mean) / len(test)),
        epochs=[result['epoch'] for result in results], bag_of_words=baseline,
        options=dataclasses.asdict(options))
    save_text(options.file('.json'), json.dumps(summary, indent=2) + '\n')
    return summary


def predict(options, device):
    """Prints the probability that a sentence is positive, by an earlier fine-tuning."""
    text, path = ' '.join(options.predict.split()), options.file('.pt')
    if not text:
        raise UserError('--predict: the sentence is empty')
    if not path.exists():
        raise UserError(f'{path}: there is no fine-tuned model: run the same command without '
                        '--predict first')
    state = load_checkpoint(path)
    model = build_empty(state['options']['arch'], model_options_of(state['options']))
    tokenizer = load_tokenizer(options.out_dir, state, model.config, path, 'fine-tune again')
    classifier = make_classifier((model, tokenizer, state['options']), options, seed=0)
    load_weights(classifier, state, path)
    data, (_, around, _) = (
        tokenize([(shown, 1)], tokenizer, model.config.block_size, '--predict', options.as_text)
        for shown in (text, ''))  # around a sentence stands what is around none
    ids, n_read = tokenizer.encode(text), data[1] - around
    if n_read < len(ids):
        text = f'{tokenizer.decode(ids[:n_read])} [cut]'
    p = score(classifier.to(device.torch_device), data, device)[2].item()
    print(f'{"positive" if p > 0.5 else "negative"} (probability of positive {p:.3f}): {text}')


def main():
    values, _ = config.load(sys.argv[1:], FinetuneOptions, doc=__doc__, takes_config=False)
    options = FinetuneOptions(**values)
    device = Device(options)
    if options.predict is not None:
        return predict(options, device)
    folder = Path(os.path.realpath(options.out_dir))
    if options.wandb:
        pretraining = config.read_json(folder / 'run.json', 'restore it')
        open_wandb()
    run, texts = load_run(options.out_dir), read_sst2(options)
    lock = claim(folder)  # held until this returns
    print(f'{options.out_dir}{", with new weights" if options.from_scratch else ""}: '
          f'{len(texts["train"]):,} phrases to train on, {len(texts["validation"]):,} held out to '
          f'choose the epoch by, {len(texts["test"]):,} sentences to test on')
    data = {split: tokenize(part, run[1], run[0].config.block_size, split, options.as_text)
            for split, part in texts.items()}
    baseline, results, lines, wandb_run = bag_of_words(texts), [], [], None

    def record(**line):
        lines.append(line)
        if wandb_run:
            wandb_run.log(line, step=line['step'])

    for seed in range(options.seed, options.seed + options.seeds):
        if options.wandb:
            wandb_run = open_wandb(
                project='encoder-pretrain-sst2', name=f'{folder.name}-{seed}', dir=folder,
                config=dataclasses.asdict(options) | dict(pretraining=pretraining))
        results.append(finetune(options, seed, run, data, device, record))
        if wandb_run:
            wandb_run.log(dict(test_accuracy=results[-1]['test_accuracy']))
            wandb_run.finish()
        if len(results) == 1:
            set_aside(options)
        summary = save_results(options, results, lines, run, texts['test'], baseline)
    interval = f' +- {summary["ci95"]:.2%}' if options.seeds > 1 else ''
    print(f'\ntest accuracy {summary["mean"]:.2%}{interval} (seeds: {options.seeds}), validation '
          f'{statistics.mean(summary["validation_accuracy"]):.2%}\na bag of words scores '
          f'{baseline["test_accuracy"]:.2%} on the same test; the binomial standard error of '
          f'{len(texts["test"])} sentences is {summary["binomial_se"]:.2%}\n'
          f'{options.file(".json")}')


if __name__ == '__main__':
    config.run(main)
