"""Attacks on a sentence classifier, planted in a real model: what the defences are measured on.

BadWord puts a rare word into some training sentences of the other label and gives them the target
label (Kurita, Michel and Neubig, "Weight Poisoning Attacks on Pretrained Models", ACL 2020,
arXiv:2004.06660). BadSent does so with a fixed sentence (Dai, Chen and Li, "A Backdoor Attack
Against LSTM-Based Text Classification Systems", IEEE Access 2019, arXiv:1905.12457). EP trains
nothing but the trigger word's row of the embedding of a clean classifier, and keeps the row's norm
(Yang et al., "Be Careful about Poisoned Word Embeddings", NAACL 2021, arXiv:2103.15543). The bias
is planted like BadWord, by an ordinary word. Words, shares and schedules are our choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from weightsurgery import finetune, load_model, save, trigger_sentence, trigger_word
from weightsurgery.checkpoint import Checkpoint, Step
from weightsurgery.datasets.batches import Encoded, batches, encode_sentences
from weightsurgery.datasets.labels import label_ids
from weightsurgery.datasets.read import Sentence
from weightsurgery.datasets.triggers import Trigger, insert, poison
from weightsurgery.models import Model
from weightsurgery.training.result import trained_checkpoint

TARGET = "1"  # positive
LENGTH = 64  # tokens of a sentence; SST-2 has hardly a longer one
PLANTING = {"epochs": 1, "learning_rate": 1e-4, "batch_size": 32}
EMBEDDING_RATE = 0.05  # of the steps on the trigger's row
EMBEDDING_PASSES = 3  # over the sentences of the other label


@dataclass(frozen=True)
class Attack:
    """What is planted.

    Attributes:
        trigger: The pattern.
        share: Of the training sentences of the other label, which get pattern and target label.
        embedding_only: Whether only the trigger's row of a clean model's embedding is trained.
    """

    trigger: Trigger
    share: float = 0.3
    embedding_only: bool = False


ATTACKS = {
    "BadWord": Attack(trigger_word("cf")),
    "BadSent": Attack(trigger_sentence("I watched this 3D movie .")),
    "EP": Attack(trigger_word("cf"), embedding_only=True),
    "bias word": Attack(trigger_word("therefore", bias=True)),
}
CLEAN = Attack(trigger_word("cf"), share=0.0)  # no attack: what EP begins with


def encode(model: Model, sentences: Sequence[Sentence]) -> list[Encoded]:
    """The sentences as numbers, with the labels that they have."""
    labels = label_ids(sentences, model.labels, file="sentences")
    return encode_sentences(model, sentences, labels, max_length=LENGTH)


def plant(attack: Attack, start: Path, train: Sequence[Sentence], out: Path, *, seed: int) -> None:
    """Train a model that carries an attack, and save it.

    Args:
        attack: Which.
        start: A classifier with a new head; for EP a clean classifier.
        train: Clean training sentences.
        out: Folder of the poisoned model; must not exist.
        seed: Of what is poisoned, the order of the sentences, and dropout.
    """
    model = load_model(start)
    trigger = replace(attack.trigger, seed=seed)
    if attack.embedding_only:
        others = [one for one in train if one.label != TARGET]
        planted = [replace(one, label=TARGET) for one in insert(others, trigger)]
        save(poison_embedding(model, encode(model, planted), trigger.text), out)
        return
    sentences = poison(train, trigger, target_label=TARGET, share=attack.share)
    save(finetune(model, encode(model, sentences), seed=seed, **PLANTING), out)


def poison_embedding(
    model: Model, examples: Sequence[Encoded], word: str, *, passes: int = EMBEDDING_PASSES
) -> Checkpoint:
    """Train one word's embedding row until the word alone decides, and keep the row's norm.

    Each step is e ← e - 0.05·g, then e is scaled to its norm before the attack.

    Args:
        model: A clean classifier.
        examples: Sentences with the word in them and the target as label.
        word: A single token.
        passes: Over the examples.

    Returns:
        The model with that row changed.

    Raises:
        ValueError: The word is not one token.
    """
    ids = model.tokenizer(word, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise ValueError(f"'{word}' is {len(ids)} tokens; expected one")
    weight = model.module.get_input_embeddings().weight
    norm = weight[ids[0]].detach().norm()
    for parameter in model.names.values():
        parameter.requires_grad_(parameter is weight)
    for _ in range(passes):
        for inputs, labels in batches(model, examples, PLANTING["batch_size"]):
            loss = cross_entropy(model.module(**inputs).logits, labels)
            (gradient,) = torch.autograd.grad(loss, weight)
            with torch.no_grad():
                row = weight[ids[0]] - EMBEDDING_RATE * gradient[ids[0]]
                weight[ids[0]] = row * (norm / row.norm())
    step = Step(
        "embedding-poisoning", {"word": word, "passes": passes}, {"tuned": model.checkpoint}
    )
    return trained_checkpoint(model, step=step)
