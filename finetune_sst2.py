"""Fine-tunes and tests a run of train.py on SST-2: is a sentence from a film review positive or negative?

    python finetune_sst2.py --out_dir=out/mla_o --seeds=5            # the published protocol, five times
    python finetune_sst2.py --out_dir=out/mla_o --from_scratch=True  # the same network without its pre-training
    python finetune_sst2.py --out_dir=out/mla_o --predict="a gorgeous , witty , seductive movie"

Writes sst2.json, sst2_predictions.tsv (text, label, probability of a positive one), sst2_metrics.jsonl and sst2.pt into
the run folder; with from_scratch their names begin with sst2_from_scratch.
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
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import config
import prepare
from config import UserError
from prepare import Tokenizer
from train import (MachineOptions, TrainOptions, best_checkpoint, build, date_of, describe, learning_rate, load_checkpoint,
                   load_run, load_weights, log_line, make_optimizers, mean_and_interval, open_machine, open_wandb,
                   save_checkpoint, save_text, split_options, stop_if_not_finite)

SPLIT_SEED = 0  # which tenth is held out, and which examples a subset takes: the same for every run
EVAL_BATCH = 64
REMEDY = "--data_dir=FOLDER, which holds GLUE's train.tsv and dev.tsv"


@dataclass
class FinetuneOptions(MachineOptions):
    """Options"""

    out_dir: str | None = None  # run folder of train.py; the results are written into it
    data_dir: str | None = None  # folder with GLUE's train.tsv and dev.tsv, instead of the hub's stanfordnlp/sst2
    seeds: int = 1  # repetitions, with seed, seed + 1, ...
    from_scratch: bool = False  # new weights instead of the run's: did pre-training help?
    train_examples: int | None = None  # train on so many phrases, a fixed subset (what is held out stays); None = all
    epochs: int = 3  # passes over the training phrases; the best on the held-out tenth is tested
    batch_size: int = 16  # sentences a step
    learning_rate: float = 2e-5  # highest learning rate, falling linearly to zero
    classifier_dropout: float = 0.1  # before the classifier
    weight_decay: float = 0.0  # on matrices and embeddings
    log_interval: int = 100  # steps between lines
    wandb: bool = False  # log to Weights & Biases too, project encoder-pretrain-sst2
    predict: str = ''  # classify this sentence with the fine-tuned run, and end

    def __post_init__(self):
        config.check_numbers(self, 'seed', 'classifier_dropout', 'weight_decay')
        if self.classifier_dropout >= 1:
            raise UserError(f'classifier_dropout={self.classifier_dropout}: takes a number below 1')
        if self.out_dir is None:
            raise UserError('which run? --out_dir=RUN names a run folder of train.py, out/mla_o for instance')
        if int(os.environ.get('WORLD_SIZE', '1')) > 1:
            raise UserError('fine-tuning takes minutes on one device: start it with python, not torchrun')

    def file(self, ending):
        return Path(self.out_dir) / f'sst2{"_from_scratch" if self.from_scratch else ""}{ending}'


# ----------------------------------------------------------------------------------------------------------------
# data


def read_split(file, split):
    """[(sentence, label)] of one split, from a tsv or from the hub if that is None."""
    examples, where = [], file or f'stanfordnlp/sst2 ({split})'
    for batch in prepare.batches('sst2', file and [str(file)], split, REMEDY):
        for column in ('sentence', 'label'):
            if column not in batch:
                raise UserError(f'{where}: no column {column!r} among {", ".join(batch)}: takes sentence and label')
        for sentence, label in zip(batch['sentence'], batch['label']):
            row, sentence = len(examples) + 1, ' '.join(str(sentence or '').split())
            if not sentence:
                raise UserError(f'{where}, row {row}: the sentence is empty: take the row out')
            if str(label) not in ('0', '1'):
                raise UserError(f'{where}, row {row}: label {label!r}: takes 0 (negative) or 1 (positive)')
            examples.append((sentence, int(label)))
    return examples


def read_sst2(options):
    """{train, validation, test}: lists of (sentence, label). The training split gives training and validation, 90/10 at
    random; its own validation split ('dev'), whose labels are public, is the test."""
    files = [Path(options.data_dir) / name for name in ('train.tsv', 'dev.tsv')] if options.data_dir else [None, None]
    for file in files:
        if file and not file.is_file():
            raise UserError(f'--data_dir={options.data_dir}: takes the folder that holds train.tsv and dev.tsv; there is no '
                            f'{file}')
    train, test = read_split(files[0], 'train'), read_split(files[1], 'validation')
    order = np.random.default_rng(SPLIT_SEED).permutation(len(train))
    n_held_out = len(train) // 10
    validation, rest = order[:n_held_out], order[n_held_out:]
    n = options.train_examples or len(rest)
    if not n_held_out or not test:
        raise UserError(f'{len(train)} phrases to train on and {len(test)} to test on: too few to hold a tenth out')
    if n > len(rest):
        raise UserError(f'train_examples={n}: takes up to {len(rest)}, {n_held_out} more are held out')
    return dict(train=[train[i] for i in rest[:n]], validation=[train[i] for i in validation], test=test)


def share_overlapping(examples):
    """Share of held-out phrases that are part of a training phrase: SST-2's training split holds the sub-phrases of its
    sentences, so that the held-out tenth is easier than the test."""
    everything = '\n'.join(f' {text} ' for text, _ in examples['train'])
    return statistics.mean(f' {text} ' in everything for text, _ in examples['validation'])


def like_lengths(lengths, batch_size, rng=None):
    """Arrays of indices into `lengths`: batches of neighbours in length, so that little is padded. rng: shuffles the
    batches, and who of equal length meets whom."""
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


# ----------------------------------------------------------------------------------------------------------------
# model


class Classifier(nn.Module):
    """A model of train.py with two logits on top. Encoders are read at <|endoftext|>, their first token, through a
    tanh pooler (BERT, arXiv 1810.04805); causal models at the last token, the only one that has seen them all."""

    def __init__(self, model, dropout):
        super().__init__()
        self.model, self.config = model, model.config
        width = model.config.n_embd
        self.pooler = nn.Identity() if self.config.causal else nn.Sequential(nn.Linear(width, width), nn.Tanh())
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(width, 2)
        for layer in (self.classifier, *self.pooler.children()):
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, idx, lengths):
        """idx (B, T) int64, padded at the end, lengths (B,) -> logits (B, 2)."""
        if self.config.causal:  # padding comes later than what is read
            x = self.model.hidden(idx)[torch.arange(len(idx), device=idx.device), lengths - 1]
        else:
            key_mask = torch.arange(idx.size(1), device=idx.device) < lengths[:, None]  # (B, T)
            x = self.model.hidden(idx, key_mask)[:, 0]
        return self.classifier(self.dropout(self.pooler(x)))  # x: (B, D)


def make_classifier(run, options, seed):
    """A classifier on the model of `run`, what load_run returned, or from scratch on one of its shape."""
    model, _, run_options = run
    torch.manual_seed(seed)
    if options.from_scratch:
        training, model_options = split_options(run_options)
        model = build(training['arch'], model_options)
    return Classifier(copy.deepcopy(model), options.classifier_dropout)


def tokenize(examples, tokenizer, block_size):
    """[(sentence, label)] -> [(ids, label)], each starting with <|endoftext|>; what is past block_size is cut off."""
    ids = tokenizer.encode_batch([text for text, _ in examples])
    return [([tokenizer.eot, *row][:block_size], label) for row, (_, label) in zip(ids, examples)]


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


# ----------------------------------------------------------------------------------------------------------------
# training


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
    """Trains once; returns validation_accuracy, test_accuracy, the test's probabilities and the weights of the epoch
    that was best on the held-out tenth. run: from load_run. record(**line) takes a line of metrics."""
    tokenizer, classifier = run[1], make_classifier(run, options, seed).to(machine.device).train()
    examples = {split: tokenize(part, tokenizer, classifier.config.block_size) for split, part in texts.items()}
    lengths = np.array([len(ids) for ids, _ in examples['train']])
    steps_an_epoch = math.ceil(len(lengths) / options.batch_size)
    recipe = TrainOptions(max_iters=options.epochs * steps_an_epoch, learning_rate=options.learning_rate,
                          schedule='linear', warmup_iters=0, weight_decay=options.weight_decay, beta2=0.999)
    optimizer, = make_optimizers(classifier, recipe)
    step, seconds, best = 0, 0.0, SimpleNamespace(validation_accuracy=-1.0)
    for epoch in range(options.epochs):
        for batch in like_lengths(lengths, options.batch_size, np.random.default_rng((seed, epoch))):
            start = time.perf_counter()
            for group in optimizer.param_groups:
                group['lr'] = learning_rate(recipe, step, 0.0)
            batch = collate([examples['train'][i] for i in batch], tokenizer.eot)
            loss, norm = train_step(classifier, optimizer, batch, machine)
            step += 1
            if step % options.log_interval == 0 or step == recipe.max_iters:
                stop_if_not_finite(step, loss.item(), norm.item())
            seconds += time.perf_counter() - start
            if step % options.log_interval == 0:
                rate = step * options.batch_size / seconds
                record(seed=seed, step=step, seconds=seconds, train_loss=loss.item(), grad_norm=norm.item(),
                       lr=optimizer.param_groups[0]['lr'], sentences_per_second=rate)
                left = timedelta(seconds=round(seconds / step * (recipe.max_iters - step)))
                print(f'seed {seed}, step {step}/{recipe.max_iters}: loss {loss.item():.4f}, {rate:,.0f} sentences/s, '
                      f'{left} left', flush=True)
        val_loss, val_accuracy, _ = score(classifier, examples['validation'], tokenizer, machine)
        stop_if_not_finite(step, val_loss)
        scores = dict(val_loss=val_loss, val_accuracy=val_accuracy)
        record(seed=seed, step=step, seconds=seconds, **scores)
        print(f'seed {seed}, epoch {epoch + 1}: {describe(scores)} on the held-out tenth', flush=True)
        if val_accuracy > best.validation_accuracy:
            best = SimpleNamespace(validation_accuracy=val_accuracy, epoch=epoch + 1,
                                   model={k: v.cpu().clone() for k, v in classifier.state_dict().items()})
    classifier.load_state_dict(best.model)
    _, best.test_accuracy, best.probabilities = score(classifier, examples['test'], tokenizer, machine)
    print(f'seed {seed}: test accuracy {best.test_accuracy:.2%} after epoch {best.epoch}', flush=True)
    return best


def set_aside(options):
    """Earlier results of the same kind are renamed with their date, once there are new ones."""
    files = [options.file(ending) for ending in ('.json', '_predictions.tsv', '_metrics.jsonl', '.pt')]
    if files := [path for path in files if path.exists()]:
        date = date_of(files[0], lambda date: list(Path(options.out_dir).glob(f'sst2-{date}[._]*')))
        try:
            for path in files:
                path.rename(path.with_name(path.name.replace('sst2', f'sst2-{date}', 1)))
        except OSError as error:
            raise UserError(f'{options.out_dir}: earlier results cannot be renamed ({error})') from None
        print(f'{files[0]} is of an earlier run: renamed to sst2-{date}..., and what belongs to it')


def write_results(options, results, run_options, test):
    """Writes sst2.json of the seeds that are done, and predictions and weights of the one that is best on the held-out
    tenth; returns both."""
    validation = [result.validation_accuracy for result in results]
    accuracies = [result.test_accuracy for result in results]
    mean, interval = mean_and_interval(accuracies)
    best = max(results, key=lambda result: result.validation_accuracy)
    if best is results[-1]:
        save_text(options.file('_predictions.tsv'), 'text\tlabel\tprobability\n' + ''.join(
            f'{text}\t{label}\t{p:.9g}\n' for (text, label), p in zip(test, best.probabilities.tolist())))
        save_checkpoint(options.file('.pt'), dict(model=best.model, options=run_options, step=best.epoch))
    results[-1].model = None  # nobody asks for it again
    summary = dict(
        seeds=[options.seed + i for i in range(len(results))], validation_accuracy=validation, test_accuracy=accuracies,
        mean=mean, std=statistics.stdev(accuracies) if len(results) > 1 else None, ci95=interval,
        binomial_se=math.sqrt(mean * (1 - mean) / len(test)), epochs=[result.epoch for result in results],
        options=dataclasses.asdict(options))
    save_text(options.file('.json'), json.dumps(summary, indent=2) + '\n')
    return summary, best


def show_mistakes(texts, result, n=3):
    """Prints the sentences of which the classifier is surest, and wrong."""
    wrong = sorted((abs(p - label), p, label, text) for (text, label), p in zip(texts, result.probabilities.tolist())
                   if (p > 0.5) != label)
    print('\nsurest mistakes: probability of a positive sentence, its label, the sentence\n')
    for _, p, label, text in wrong[:-n - 1:-1]:
        print(f'  {p:.2f}  {("negative", "positive")[label]}  {text}')


def predict(options, machine):
    """Prints the probability that a sentence is positive."""
    path = options.file('.pt')
    if not path.exists():
        raise UserError(f'{path}: there is no fine-tuned model: run the same command without --predict first')
    if not (text := ' '.join(options.predict.split())):
        raise UserError('--predict: the sentence is empty')
    state, tokenizer = load_checkpoint(path), Tokenizer.load(Path(options.out_dir) / 'tokenizer.json')
    training, model_options = split_options(state['options'])
    classifier = Classifier(build(training['arch'], model_options), options.classifier_dropout)
    load_weights(classifier, state, path)
    example = tokenize([(text, 1)], tokenizer, classifier.config.block_size)
    probability = score(classifier.to(machine.device), example, tokenizer, machine)[2].item()
    print(f'{"positive" if probability > 0.5 else "negative"} (probability of positive {probability:.3f}): {text}')


def main():
    values, _ = config.load(sys.argv[1:], FinetuneOptions, doc=__doc__, takes_config=False)
    options = FinetuneOptions(**values)
    machine = open_machine(options)
    if 'predict' in values:
        return predict(options, machine)
    run = load_run(options.out_dir)
    texts = read_sst2(options)
    training = options.file('_metrics.jsonl.partial')  # until a seed is done, earlier results stay where they are
    training.unlink(missing_ok=True)
    print(f'{best_checkpoint(options.out_dir)}{", weights anew" if options.from_scratch else ""}: {len(texts["train"]):,} '
          f'phrases to train on, {len(texts["validation"]):,} held out to choose the epoch by ({share_overlapping(texts):.0%} '
          f'of them are part of a training phrase), {len(texts["test"]):,} sentences to test on')
    results = []
    for seed in range(options.seed, options.seed + options.seeds):
        wandb_run = open_wandb('encoder-pretrain-sst2', f'{Path(options.out_dir).name}-{seed}', Path(options.out_dir),
                               dataclasses.asdict(options)) if options.wandb else None
        results.append(finetune(options, seed, run, texts, machine, lambda **line: log_line(training, wandb_run, line)))
        if len(results) == 1:
            set_aside(options)
            training = training.rename(options.file('_metrics.jsonl'))
        summary, best = write_results(options, results, run[2], texts['test'])
        if wandb_run:
            wandb_run.log(dict(test_accuracy=results[-1].test_accuracy))
            wandb_run.finish()
    show_mistakes(texts['test'], best)
    spread = (f' (standard deviation {summary["std"]:.2%}, 95% interval of the mean +- {summary["ci95"]:.2%})'
              if options.seeds > 1 else '')
    print(f'\n{options.seeds} seed{"s" if options.seeds > 1 else ""}: test accuracy {summary["mean"]:.2%}{spread}, '
          f'validation {statistics.mean(summary["validation_accuracy"]):.2%}; {len(texts["test"])} sentences have a binomial '
          f'standard error of {summary["binomial_se"]:.2%}\n{options.file(".json")}')


if __name__ == '__main__':
    config.run(main)
