"""Fine-tunes and tests a run of train.py on SST-2: is a sentence of a film review positive?

    python finetune_sst2.py --out_dir=out/mla_o --seeds=5              # the published protocol
    python finetune_sst2.py --out_dir=out/mla_o --from_scratch=True    # without its pre-training
    python finetune_sst2.py --out_dir=out/mla_o --predict="a gorgeous , witty , seductive movie"

Writes into the run folder: sst2.json (accuracies of all seeds, and of a bag of words),
sst2_predictions.tsv (text, label, probability that it is positive), sst2_metrics.jsonl and sst2.pt.
With from_scratch their names begin with sst2_from_scratch.
"""

import copy
import dataclasses
import functools
import json
import math
import os
import statistics
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import config
import prepare
from config import UserError
from model import Count, NotNegative, Positive, Share
from run import (Machine, MachineOptions, best_checkpoint, build, date_of, describe,
                 load_checkpoint, load_run, load_tokenizer, load_weights, log_line,
                 mean_and_interval, model_options_of, open_wandb, read_facts, save_checkpoint,
                 save_text)
from train import TrainOptions, learning_rate, make_optimizers, stop_if_not_finite

SPLIT_SEED = 0  # of the held-out tenth and of subsets to train on: the same for every run
EVAL_BATCH = 64
PENALTIES = 10.0, 1.0, 0.1  # on half the squared weights of a bag of words, over all its phrases
REMEDY = "--data_dir=FOLDER, which holds GLUE's train.tsv and dev.tsv"


@dataclass
class FinetuneOptions(MachineOptions):
    """Options"""

    out_dir: str | None = None  # what train.py takes as init_from; results are written into it
    data_dir: str | None = None  # folder with GLUE's train.tsv and dev.tsv; None = SST-2 of the hub
    seeds: Count = 1  # repetitions, with seed, seed + 1, ...
    from_scratch: bool = False  # new weights instead of the run's: did pre-training help?
    train_examples: Count | None = None  # train on a fixed subset of so many phrases; None = all
    epochs: Count = 3  # passes over the phrases; the best one on the held-out tenth is tested
    batch_size: Count = 16  # sentences a step
    learning_rate: Positive = 2e-5  # highest learning rate, falling linearly to zero
    classifier_dropout: Share = 0.1  # before the classifier
    weight_decay: NotNegative = 0.0  # on matrices and embeddings
    log_interval: Count = 100  # steps between lines
    wandb: bool = False  # log to Weights & Biases too, project encoder-pretrain-sst2
    predict: str = ''  # classify this sentence with the fine-tuned run, and end

    def __post_init__(self):
        if self.out_dir is None:
            raise UserError('which run? --out_dir=RUN names a run folder of train.py, out/mla_o '
                            'for instance')
        if os.environ.get('WORLD_SIZE', '1') != '1':
            raise UserError('fine-tuning takes minutes on one device: start it with python, '
                            'not torchrun')

    def file(self, ending):
        kind = 'sst2_from_scratch' if self.from_scratch else 'sst2'
        return Path(self.out_dir) / f'{kind}{ending}'


# --------------------------------------------------------------------------------------------------
# data


def read_split(file, split):
    """[(sentence, label)] of one split: of a tsv file, or if that is None of the hub."""
    examples, where = [], file or f'stanfordnlp/sst2 ({split})'
    for batch in prepare.batches('sst2', file and [str(file)], split, REMEDY):
        for column in ('sentence', 'label'):
            if column not in batch:
                raise UserError(f'{where}: no column {column!r} among {", ".join(batch)}: takes '
                                'sentence and label')
        for sentence, label in zip(batch['sentence'], batch['label']):
            row, text = len(examples) + 1, '' if sentence is None else str(sentence)
            sentence = ' '.join(text.replace('\ufeff', ' ').split())  # a byte order mark is no word
            if not sentence:
                raise UserError(f'{where}, row {row}: the sentence is empty: take the row out')
            if str(label) not in ('0', '1'):
                raise UserError(f'{where}, row {row}: label {label!r}: takes 0 (negative) or '
                                '1 (positive)')
            examples.append((sentence, int(label)))
    return examples


def read_sst2(options):
    """{train, validation, test}: lists of (sentence, label). SST-2's training split gives training
    and validation, 90/10 at random. The labels of its own test are not public, so its validation
    split ('dev') is the test here."""
    files = [None, None]
    if options.data_dir:
        files = [Path(options.data_dir) / name for name in ('train.tsv', 'dev.tsv')]
    for file in files:
        if file and not file.is_file():
            raise UserError(f'--data_dir={options.data_dir}: takes the folder that holds train.tsv '
                            f'and dev.tsv; there is no {file}')
    train, test = read_split(files[0], 'train'), read_split(files[1], 'validation')
    order = np.random.default_rng(SPLIT_SEED).permutation(len(train))
    n_held_out = len(train) // 10
    held_out, rest = order[:n_held_out], order[n_held_out:]
    n = options.train_examples or len(rest)
    if not n_held_out or not test:
        raise UserError(f'{len(train)} phrases to train on and {len(test)} to test on: too few to '
                        'hold a tenth out')
    if n > len(rest):
        raise UserError(f'train_examples={n}: takes up to {len(rest)}, {n_held_out} more are held '
                        'out')
    return dict(train=[train[i] for i in rest[:n]], validation=[train[i] for i in held_out],
                test=test)


def share_overlapping(texts):
    """Share of the held-out phrases that are part of a training phrase. SST-2's training split
    consists of sentences and of phrases from them, so the held-out tenth is easier than the test.
    """
    training = '\n'.join(f' {text} ' for text, _ in texts['train'])
    return statistics.mean(f' {text} ' in training for text, _ in texts['validation'])


def like_lengths(lengths, batch_size, rng=None):
    """Batches, as arrays of indices into `lengths`, of sentences of nearly one length, so that
    little is padded. rng shuffles the batches, and the sentences of equal length."""
    order = rng.permutation(len(lengths)) if rng else np.arange(len(lengths))
    order = order[np.argsort(lengths[order], kind='stable')]
    batches = [order[start:start + batch_size] for start in range(0, len(order), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))] if rng else batches


def collate(examples, pad):
    """[(ids, label)] -> idx (B, T), padded to the longest, lengths (B,), labels (B,), int64."""
    lengths = [len(ids) for ids, _ in examples]
    idx = torch.full((len(examples), max(lengths)), pad)
    for row, (ids, _) in zip(idx, examples):
        row[:len(ids)] = torch.tensor(ids)
    return idx, torch.tensor(lengths), torch.tensor([label for _, label in examples])


# --------------------------------------------------------------------------------------------------
# baseline


def words_and_pairs(text):
    """What a bag holds: each word of a sentence, each pair of neighbours, and '', whose weight is
    the bias. None is there twice."""
    words = text.lower().split()
    return list(dict.fromkeys(['', *words, *zip(words, words[1:])]))


def make_bags(texts):
    """{split: (rows, columns, labels)}: the ones in its matrix of sentences and features, and the
    labels. The columns are the features of the training phrases; others are left out."""
    bags, column_of = {}, {}
    for split in ('train', 'validation', 'test'):
        features = [words_and_pairs(text) for text, _ in texts[split]]
        if split == 'train':
            names = dict.fromkeys(name for row in features for name in row)
            column_of = {name: column for column, name in enumerate(names)}
        columns = [[column_of[name] for name in row if name in column_of] for row in features]
        sizes = torch.tensor([len(row) for row in columns])
        bags[split] = (torch.arange(len(columns)).repeat_interleave(sizes),
                       torch.tensor([column for row in columns for column in row]),
                       torch.tensor([float(label) for _, label in texts[split]]))
    return bags


def bag_of_words(texts):
    """Accuracies of a logistic regression on words and pairs of words, which a model that knows
    more than words should exceed: dict(validation_accuracy, test_accuracy). The held-out tenth
    chooses the penalty."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # operations as small as these wait longer for cores than they take
    bags = make_bags(texts)
    n_features = int(bags['train'][1].max()) + 1
    weights = torch.zeros(n_features, requires_grad=True)

    def logits(split):
        rows, columns, labels = bags[split]
        return torch.zeros_like(labels).index_add(0, rows, weights.index_select(0, columns))

    def accuracy(split):
        return ((logits(split) > 0) == (bags[split][2] > 0)).double().mean().item()

    results = []
    for penalty in PENALTIES:
        optimizer = torch.optim.LBFGS([weights], max_iter=50, line_search_fn='strong_wolfe')

        def closure():
            optimizer.zero_grad()
            labels = bags['train'][2]
            loss = F.binary_cross_entropy_with_logits(logits('train'), labels)
            loss = loss + penalty / 2 * weights.square().sum() / len(labels)
            loss.backward()
            return loss

        optimizer.step(closure)
        results.append(dict(validation_accuracy=accuracy('validation'),
                            test_accuracy=accuracy('test')))
    torch.set_num_threads(threads)
    return max(results, key=lambda result: result['validation_accuracy'])


# --------------------------------------------------------------------------------------------------
# model


class Classifier(nn.Module):
    """A model of train.py with two logits on top. An encoder is read at <|endoftext|>, its first
    token, through a tanh pooler (BERT, arXiv 1810.04805); a causal model at the last token, the
    only one that has seen all the others."""

    def __init__(self, model, dropout):
        super().__init__()
        self.model, self.config = model, model.config
        width = model.config.block.n_embd
        self.pooler = nn.Identity()
        if not model.config.block.causal:
            self.pooler = nn.Sequential(nn.Linear(width, width), nn.Tanh())
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(width, 2)
        for layer in (self.classifier, *self.pooler.children()):
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, idx, lengths):
        """idx (B, T) int64, padded at the end, lengths (B,) -> logits (B, 2)."""
        if self.config.block.causal:  # the token that is read sees no padding, which comes later
            rows = torch.arange(len(idx), device=idx.device)
            x = self.model.hidden(idx)[rows, lengths - 1]  # (B, D)
        else:
            key_mask = torch.arange(idx.size(1), device=idx.device) < lengths[:, None]  # (B, T)
            x = self.model.hidden(idx, key_mask)[:, 0]  # (B, D)
        return self.classifier(self.dropout(self.pooler(x)))


def make_classifier(run, options, seed):
    """A classifier on the model of a run, or from scratch on a new one of its shape. run: what
    load_run returned."""
    model, _, run_options = run
    torch.manual_seed(seed)
    if options.from_scratch:
        model = build(run_options['arch'], model_options_of(run_options))
    return Classifier(copy.deepcopy(model), options.classifier_dropout)


def tokenize(examples, tokenizer, block_size):
    """[(sentence, label)] -> [(ids, label)]. Each starts with <|endoftext|> and is cut off at
    block_size."""
    ids = tokenizer.encode_batch([text for text, _ in examples])
    return [([tokenizer.eot, *row][:block_size], label)
            for row, (_, label) in zip(ids, examples)]


@torch.no_grad()
def score(classifier, examples, tokenizer, machine):
    """(loss, accuracy, probabilities of a positive label in the order of the examples)."""
    classifier.eval()
    probabilities = torch.zeros(len(examples))
    for batch in like_lengths(np.array([len(ids) for ids, _ in examples]), EVAL_BATCH):
        idx, lengths, _ = machine.put(collate([examples[i] for i in batch], tokenizer.eot))
        with machine.autocast():
            logits = classifier(idx, lengths)
        probabilities[batch] = logits.float().softmax(dim=-1)[:, 1].cpu()
    classifier.train()
    labels = torch.tensor([label for _, label in examples])
    right = torch.where(labels == 1, probabilities, 1 - probabilities)
    accuracy = ((probabilities > 0.5) == (labels == 1)).double().mean().item()
    return -right.clamp(min=1e-30).log().mean().item(), accuracy, probabilities


# --------------------------------------------------------------------------------------------------
# training


@dataclass
class Result:
    """What fine-tuning with one seed gave: the epoch that was best on the held-out tenth, its
    accuracy there and its weights, and then its accuracy and predictions on the test."""

    epoch: int
    validation_accuracy: float
    weights: dict | None
    test_accuracy: float = math.nan
    probabilities: torch.Tensor | None = None


def recipe_of(options, n_examples):
    """The TrainOptions of fine-tuning: AdamW, and a learning rate that falls linearly to zero."""
    steps_an_epoch = math.ceil(n_examples / options.batch_size)
    return TrainOptions(max_iters=options.epochs * steps_an_epoch, schedule='linear',
                        learning_rate=options.learning_rate, warmup_iters=0,
                        weight_decay=options.weight_decay, beta2=0.999)


def train_step(classifier, optimizer, batch, machine):
    idx, lengths, labels = machine.put(batch)
    with machine.autocast():
        loss = F.cross_entropy(classifier(idx, lengths).float(), labels)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(classifier.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach(), norm


def finetune(options, seed, run, texts, machine, record):
    """Trains once and returns the Result. run: what load_run returned. record: a function that
    takes a line of metrics, a dict."""
    tokenizer, classifier = run[1], make_classifier(run, options, seed).to(machine.device).train()
    block_size = classifier.config.block_size
    examples = {split: tokenize(part, tokenizer, block_size) for split, part in texts.items()}
    lengths = np.array([len(ids) for ids, _ in examples['train']])
    recipe = recipe_of(options, len(lengths))
    optimizer, = make_optimizers(classifier, recipe)
    step, seconds, best = 0, 0.0, None
    for epoch in range(options.epochs):
        rng = np.random.default_rng((seed, epoch))
        for chosen in like_lengths(lengths, options.batch_size, rng):
            start = time.perf_counter()
            lr = learning_rate(recipe, step, 0.0)
            for group in optimizer.param_groups:
                group['lr'] = lr
            batch = collate([examples['train'][i] for i in chosen], tokenizer.eot)
            loss, norm = train_step(classifier, optimizer, batch, machine)
            step += 1
            due = step % options.log_interval == 0
            if due or step == recipe.max_iters:
                stop_if_not_finite(step, loss.item(), norm.item())
            seconds += time.perf_counter() - start
            if due:
                rate = step * options.batch_size / seconds
                record(dict(seed=seed, step=step, seconds=seconds, train_loss=loss.item(),
                            grad_norm=norm.item(), lr=lr, sentences_per_second=rate))
                left = timedelta(seconds=round(seconds / step * (recipe.max_iters - step)))
                print(f'seed {seed}, step {step}/{recipe.max_iters}: loss {loss.item():.4f}, '
                      f'{rate:,.0f} sentences/s, {left} left', flush=True)
        val_loss, val_accuracy, _ = score(classifier, examples['validation'], tokenizer, machine)
        stop_if_not_finite(step, val_loss)
        scores = dict(val_loss=val_loss, val_accuracy=val_accuracy)
        record(dict(seed=seed, step=step, seconds=seconds, **scores))
        print(f'seed {seed}, epoch {epoch + 1}: {describe(scores)} on the held-out tenth',
              flush=True)
        if best is None or val_accuracy > best.validation_accuracy:
            weights = {name: w.cpu().clone() for name, w in classifier.state_dict().items()}
            best = Result(epoch + 1, val_accuracy, weights)
    classifier.load_state_dict(best.weights)
    _, best.test_accuracy, best.probabilities = score(classifier, examples['test'], tokenizer,
                                                      machine)
    print(f'seed {seed}: test accuracy {best.test_accuracy:.2%} after epoch {best.epoch}',
          flush=True)
    return best


# --------------------------------------------------------------------------------------------------
# results


def set_aside(options):
    """Renames earlier results of the same kind, with their date. It is called once there are new
    ones."""
    endings = ('.json', '_predictions.tsv', '_metrics.jsonl', '.pt')
    files = [options.file(ending) for ending in endings if options.file(ending).exists()]
    if not files:
        return
    folder = Path(options.out_dir)
    date = date_of(files[0], lambda date: any(folder.glob(f'sst2-{date}[._]*')))
    try:
        for path in files:
            path.rename(path.with_name(path.name.replace('sst2', f'sst2-{date}', 1)))
    except OSError as error:
        raise UserError(f'{folder}: earlier results cannot be renamed ({error})') from None
    print(f'{files[0]} is of an earlier run: renamed to sst2-{date}..., and what belongs to it')


def write_results(options, results, run, baseline, test):
    """Writes sst2.json of the seeds that are done, and of the one that is best on the held-out
    tenth its predictions and weights. Returns what sst2.json holds, and that Result. run: what
    load_run returned. baseline: what bag_of_words returned."""
    accuracies = [result.test_accuracy for result in results]
    mean, interval = mean_and_interval(accuracies)
    best = max(results, key=lambda result: result.validation_accuracy)
    if best is results[-1]:
        lines = [f'{text}\t{label}\t{p:.9g}\n'
                 for (text, label), p in zip(test, best.probabilities.tolist())]
        save_text(options.file('_predictions.tsv'), 'text\tlabel\tprobability\n' + ''.join(lines))
        save_checkpoint(options.file('.pt'),
                        dict(model=best.weights, options=run[2], step=best.epoch,
                             provenance=dict(tokenizer=run[1].digest())))
    results[-1].weights = None  # they are saved or will never be: free the memory
    summary = dict(
        seeds=[options.seed + i for i in range(len(results))],
        validation_accuracy=[result.validation_accuracy for result in results],
        test_accuracy=accuracies, mean=mean,
        std=statistics.stdev(accuracies) if len(results) > 1 else None, ci95=interval,
        binomial_se=math.sqrt(mean * (1 - mean) / len(test)),
        epochs=[result.epoch for result in results], bag_of_words=baseline,
        options=dataclasses.asdict(options))
    save_text(options.file('.json'), json.dumps(summary, indent=2) + '\n')
    return summary, best


def show_mistakes(texts, result, n=3):
    """Prints the sentences of which the classifier is surest, and wrong."""
    wrong = [(abs(p - label), p, label, text)
             for (text, label), p in zip(texts, result.probabilities.tolist())
             if (p > 0.5) != label]
    print('\nsurest mistakes: probability of a positive sentence, its label, the sentence\n')
    for _, p, label, text in sorted(wrong, reverse=True)[:n]:
        print(f'  {p:.2f}  {("negative", "positive")[label]}  {text}')


def show_summary(options, summary, n_test):
    """Prints the accuracies over all seeds."""
    spread = ''
    if options.seeds > 1:
        spread = (f' (standard deviation {summary["std"]:.2%}, 95% interval of the mean '
                  f'+- {summary["ci95"]:.2%})')
    print(f'\n{options.seeds} seed{"s" if options.seeds > 1 else ""}: test accuracy '
          f'{summary["mean"]:.2%}{spread}, validation '
          f'{statistics.mean(summary["validation_accuracy"]):.2%}; {n_test} sentences have a '
          f'binomial standard error of {summary["binomial_se"]:.2%}; a bag of words scores '
          f'{summary["bag_of_words"]["test_accuracy"]:.1%} on the same test\n'
          f'{options.file(".json")}')


def load_tuned(options):
    """(classifier, tokenizer) that an earlier call has fine-tuned. Raises UserError if there is
    none, or if the run folder has another tokenizer by now."""
    path = options.file('.pt')
    if not path.exists():
        raise UserError(f'{path}: there is no fine-tuned model: run the same command without '
                        '--predict first')
    state = load_checkpoint(path)
    model = build(state['options']['arch'], model_options_of(state['options']))
    tokenizer = load_tokenizer(options.out_dir, state, model.config, path, 'fine-tune again')
    classifier = Classifier(model, options.classifier_dropout)
    load_weights(classifier, state, path)
    return classifier, tokenizer


def predict(options, machine):
    """Prints the probability that a sentence is positive."""
    text = ' '.join(options.predict.split())
    if not text:
        raise UserError('--predict: the sentence is empty')
    classifier, tokenizer = load_tuned(options)
    classifier.to(machine.device)
    example = tokenize([(text, 1)], tokenizer, classifier.config.block_size)
    probability = score(classifier, example, tokenizer, machine)[2].item()
    print(f'{"positive" if probability > 0.5 else "negative"} (probability of positive '
          f'{probability:.3f}): {text}')


def main():
    values, _ = config.load(sys.argv[1:], FinetuneOptions, doc=__doc__, takes_config=False)
    options = FinetuneOptions(**values)
    machine = Machine(options)
    if 'predict' in values:
        return predict(options, machine)
    run, texts = load_run(options.out_dir), read_sst2(options)
    # until a seed is done, earlier results stay where they are
    metrics = options.file('_metrics.jsonl.partial')
    save_text(metrics, '')
    print(f'{best_checkpoint(options.out_dir)}{", weights anew" if options.from_scratch else ""}: '
          f'{len(texts["train"]):,} phrases to train on, {len(texts["validation"]):,} held out to '
          f'choose the epoch by ({share_overlapping(texts):.0%} of them are part of a training '
          f'phrase), {len(texts["test"]):,} sentences to test on')
    folder, results, wandb_run = Path(options.out_dir), [], None
    baseline = bag_of_words(texts)
    for seed in range(options.seed, options.seed + options.seeds):
        if options.wandb:
            values = dataclasses.asdict(options) | dict(pretraining=read_facts(folder))
            wandb_run = open_wandb('encoder-pretrain-sst2', f'{folder.name}-{seed}', folder, values)
        record = functools.partial(log_line, metrics, wandb_run)
        results.append(finetune(options, seed, run, texts, machine, record))
        if len(results) == 1:
            set_aside(options)
            metrics = metrics.rename(options.file('_metrics.jsonl'))
        summary, best = write_results(options, results, run, baseline, texts['test'])
        if wandb_run:
            wandb_run.log(dict(test_accuracy=results[-1].test_accuracy))
            wandb_run.finish()
    show_mistakes(texts['test'], best)
    show_summary(options, summary, len(texts['test']))


if __name__ == '__main__':
    config.run(main)
