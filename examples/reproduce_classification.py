"""Attacks against defences on a real classifier: who keeps accuracy, who loses the backdoor.

Plants four attacks in MiniLM classifiers of movie-review sentences (SST-2), runs every defence on
each with 64 clean sentences, and measures accuracy and attack success on the test set. A
defence's ratio is the largest whose accuracy on held-out clean sentences, after fine-tuning, is
within 2 points of the suspicious model's: the rule of `wsurg sweep`.

Everything is kept in one folder, and what is there already is not done again: a run that was
stopped goes on when it is started again. `results.csv` has a row for each cell of the grid,
`table.md` their means.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import click
from classification_attacks import ATTACKS, CLEAN, LENGTH, TARGET, encode, plant
from classification_defences import DEFENCES, UNTRAINED, WITHOUT_RATIO, Case, make_edit
from experiment import RESULTS, append_row, check_settings, read_rows, show_table

from weightsurgery import (
    Checkpoint,
    SurgeryError,
    evaluate,
    finetune,
    load_model,
    open_checkpoint,
    read_counts,
    read_sentences,
)
from weightsurgery.datasets.read import Sentence
from weightsurgery.demo.classifier import new_classifier
from weightsurgery.demo.material import copy_minilm, shuffled
from weightsurgery.evaluation.sweep import choose_ratio
from weightsurgery.models import Model, with_weights

COLUMNS = (
    "attack",
    "seed",
    "defence",
    "epur",
    "ratio",
    "held_out_accuracy",
    "accuracy",
    "asr",
    "floor",
    "bacc",
    "tried",
    "seconds",
)


@dataclass(frozen=True)
class Plan:
    """How much is done.

    Attributes:
        clean: Sentences that the defender has, from the development set.
        train: Sentences that models are trained on, at most.
        held_out: Sentences of the development set that ratios are chosen on, at most.
        test: Sentences that everything is measured on, at most.
        ratios: From which the largest within the tolerance is searched.
        tolerance: Accuracy on held-out sentences that may be lost.
        training: Settings of the fine-tuning on the clean sentences.
    """

    clean: int = 64
    train: int = 10_000
    held_out: int = 1_000
    test: int = 10_000
    ratios: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9)
    tolerance: float = 0.02
    training: Mapping[str, Any] | None = None


# The package's own settings, but for 10 epochs in place of 20, and the word embedding left alone:
# in trials neither made a difference here, and both save time.
TRAINING = {
    "epochs": 10,
    "learning_rate": 5e-5,
    "batch_size": 8,
    "freeze": ["*word_embeddings*"],
}
FULL = Plan(training=TRAINING)
QUICK = replace(FULL, train=3_000, held_out=300, test=600, ratios=(0.3,))


class Cell(NamedTuple):
    """One cell of the grid."""

    attack: str
    seed: int
    defence: str
    epur: bool

    def __str__(self) -> str:
        return f"{self.attack}, seed {self.seed}, {self.defence}{' + E-PUR' * self.epur}"


class Data(NamedTuple):
    """The sentences of one seed."""

    train: list[Sentence]
    clean: list[Sentence]
    held_out: list[Sentence]
    test: list[Sentence]


def read_data(folder: Path, plan: Plan, seed: int) -> Data:
    """The sentences of SST-2 in their parts; which ones the defender has depends on the seed."""
    train, dev, test = (
        read_sentences(folder / f"sst2_{part}.tsv") for part in ("train", "dev", "test")
    )
    dev = shuffled(dev, seed)
    return Data(
        train[: plan.train],
        dev[: plan.clean],
        dev[plan.clean :][: plan.held_out],
        test[: plan.test],
    )


# --- models -----------------------------------------------------------------------------------


def model_folder(out: Path, attack: str, seed: int) -> Path:
    """Where a poisoned (or the clean) model of a seed lies."""
    return out / "models" / f"{attack.replace(' ', '-')}-{seed}"


def make_start(out: Path, seeds: Sequence[int]) -> None:
    """The base model, and a classifier with a new head for each seed, unless they are there."""
    (out / "models").mkdir(parents=True, exist_ok=True)
    base = copy_minilm(out / "base")
    for seed in seeds:
        new_classifier(base, model_folder(out, "start", seed), seed=seed)


def make_model(out: Path, folder: Path, plan: Plan, attack: str, seed: int) -> str:
    """Plant an attack, unless the model is there; returns what was done."""
    made = model_folder(out, attack, seed)
    if not made.exists():
        what = CLEAN if attack == "clean" else ATTACKS[attack]
        start = model_folder(out, "clean" if what.embedding_only else "start", seed)
        plant(what, start, read_data(folder, plan, seed).train, made, seed=seed)
    return f"{attack}, seed {seed}: planted"


# --- one cell ---------------------------------------------------------------------------------


def run_cell(out: Path, folder: Path, plan: Plan, cell: Cell) -> dict[str, Any]:
    """Defend one model in one way, and measure.

    Args:
        out: Folder of the experiment.
        folder: Folder of the data.
        plan: How much.
        cell: Which.

    Returns:
        The row of `results.csv`.
    """
    began = time.monotonic()
    data = read_data(folder, plan, cell.seed)
    model = load_model(model_folder(out, cell.attack, cell.seed))
    counts = read_counts(folder / "bert_wordpiece_freqs.json")
    base = open_checkpoint(out / "base")
    case = Case(base, model, encode(model, data.clean), counts, cell.seed)
    ratio, held_out, tried = _defend(case, cell, plan, data.held_out)
    found = measure(model, data.test, cell)
    return {
        **cell._asdict(),
        "ratio": ratio,
        "held_out_accuracy": held_out,
        **found,
        "tried": " ".join(f"{r:g}:{a:.4f}" for r, a in tried.items()),
        "seconds": round(time.monotonic() - began),
    }


def _defend(
    case: Case, cell: Cell, plan: Plan, held_out: Sequence[Sentence]
) -> tuple[float | None, float, dict[float, float]]:
    """Leave the defended weights in the model; (ratio, held-out accuracy, all tried)."""
    reference = evaluate(case.model, held_out, max_length=LENGTH)
    edit = make_edit(case, cell.defence, with_epur=cell.epur)
    tried: dict[float, float] = {}
    made: dict[float, Checkpoint] = {}

    def fits(ratio: float) -> bool:
        edited = with_weights(case.model, edit(ratio))
        made[ratio] = edited.checkpoint
        if cell.defence not in UNTRAINED:
            training = {"seed": cell.seed, **(plan.training or {})}
            made[ratio] = finetune(edited, case.examples, **training)
        row = {"ratio": ratio, "after": evaluate(edited, held_out, max_length=LENGTH)}
        tried[ratio] = row["after"]["accuracy"]["share"]
        return choose_ratio([row], reference, plan.tolerance) is not None

    if cell.defence in WITHOUT_RATIO:
        fits(0.0)
        return None, tried[0.0], tried
    ratio = largest(plan.ratios, fits)
    if ratio not in made:  # none fits, and nothing is reset
        fits(ratio)
    with_weights(case.model, made[ratio])
    return ratio, tried[ratio], tried


def largest(ratios: Sequence[float], fits: Callable[[float], bool]) -> float:
    """The largest ratio that fits, by bisection: where one fits, so should all smaller ones.

    Args:
        ratios: In rising order.
        fits: Tried on at most log2(n + 1) of them, rounded up.

    Returns:
        The ratio; 0, which resets nothing and leaves fine-tuning and E-PUR, if none fits.
    """
    low, high = 0, len(ratios)
    while low < high:
        middle = (low + high) // 2
        if fits(ratios[middle]):
            low = middle + 1
        else:
            high = middle
    return ratios[low - 1] if low else 0.0


def measure(model: Model, test: Sequence[Sentence], cell: Cell) -> dict[str, float | None]:
    """Accuracy, attack success, floor and (for a bias) accuracy with the pattern, on the test."""
    trigger = replace(ATTACKS[cell.attack].trigger, seed=cell.seed)
    found = evaluate(model, test, trigger=trigger, target_label=TARGET, max_length=LENGTH)
    shares = {name: found[name] for name in ("accuracy", "asr", "floor", "bacc")}
    return {name: None if one is None else one["share"] for name, one in shares.items()}


# --- the grid ---------------------------------------------------------------------------------


def run_grid(
    out: Path,
    folder: Path,
    plan: Plan,
    *,
    attacks: Sequence[str],
    defences: Sequence[str],
    seeds: Sequence[int],
    workers: int,
) -> None:
    """Make what is missing: base, clean and poisoned models, then cells.

    Args:
        out: Folder of the experiment.
        folder: Folder of the data.
        plan: How much.
        attacks: Names, of `ATTACKS`.
        defences: Names, of `DEFENCES`.
        seeds: One model of each attack for each.
        workers: Processes; each computes on one thread.

    Raises:
        SettingError: The folder holds an experiment of other settings.
    """
    make_start(out, seeds)
    check_settings(out / "settings.json", plan)
    done = {key(row) for row in read_rows(out / RESULTS)}
    cells = [
        Cell(attack, seed, defence, with_epur)
        for seed in seeds
        for attack in attacks
        for defence in defences
        for with_epur in (False, True)
    ]
    todo = [cell for cell in cells if tuple(map(str, cell)) not in done]
    needed = sorted({(cell.attack, cell.seed) for cell in todo}, key=lambda one: one[1])
    first = [(a, s) for a, s in needed if not ATTACKS[a].embedding_only]
    first += [("clean", s) for s in sorted({s for a, s in needed if ATTACKS[a].embedding_only})]
    last = [(a, s) for a, s in needed if ATTACKS[a].embedding_only]
    for models in (first, last):
        for what in spread(make_model, [(out, folder, plan, *one) for one in models], workers):
            print(what, flush=True)
    for row in spread(run_cell, [(out, folder, plan, cell) for cell in todo], workers):
        append_row(out / RESULTS, COLUMNS, row)
        print(_told(row), flush=True)


def spread(
    work: Callable[..., Any], jobs: Sequence[tuple[Any, ...]], workers: int
) -> Iterator[Any]:
    """Results of jobs as they come; the first failure cancels what has not begun.

    Args:
        work: A function of a module.
        jobs: Its arguments.
        workers: Processes, of one thread each.
    """
    began = time.monotonic()
    with ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=_one_thread
    ) as pool:
        waiting = [pool.submit(work, *job) for job in jobs]
        try:
            for number, future in enumerate(as_completed(waiting), 1):
                left = (time.monotonic() - began) / number * (len(waiting) - number)
                print(f"[{number} of {len(waiting)}, {left / 60:.0f} min left] ", end="")
                yield future.result()
        except BaseException:
            for other in waiting:
                other.cancel()
            raise


def _one_thread() -> None:
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()


def _told(row: Mapping[str, Any]) -> str:
    cell = Cell(*(row[name] for name in Cell._fields))
    at = "" if row["ratio"] is None else f" at ratio {row['ratio']:g}"
    rates = f"ACC {row['accuracy']:.3f}, ASR {row['asr']:.3f} (floor {row['floor']:.3f})"
    return f"{cell}{at}: {rates}, {row['seconds']} s"


# --- results ----------------------------------------------------------------------------------


def key(row: Mapping[str, Any]) -> tuple[str, ...]:
    """What makes a row one of its own."""
    return tuple(str(row[name]) for name in Cell._fields)


def make_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Means and standard deviations over seeds, as Markdown, in percent.

    Args:
        rows: Of `results.csv`.

    Returns:
        A table: one row for each defence without and with E-PUR, for each attack ACC and ASR (for
        a bias BACC in place of ASR), and their means over the backdoors.
    """
    attacks = [attack for attack in ATTACKS if any(row["attack"] == attack for row in rows)]
    heads = [f"{attack} {what}" for attack in attacks for what in ("ACC", _measured(attack))]
    lines = [["defence", *heads, "ratios"]]
    for defence in DEFENCES:
        for with_epur in (False, True):
            chosen = [r for r in rows if r["defence"] == defence and r["epur"] == str(with_epur)]
            if not chosen:
                continue
            cells = []
            for attack in attacks:
                those = [row for row in chosen if row["attack"] == attack]
                cells += [_mean(those, "accuracy"), _mean(those, _measured(attack).lower())]
            ratios = sorted({row["ratio"] for row in chosen if row["ratio"]})
            name = f"{defence} + E-PUR" if with_epur else defence
            lines.append([name, *cells, ", ".join(ratios)])
    rule = ["---", *["---:"] * (len(heads)), "---"]
    return "".join(f"| {' | '.join(line)} |\n" for line in [lines[0], rule, *lines[1:]])


def _measured(attack: str) -> str:
    return "BACC" if ATTACKS[attack].trigger.bias else "ASR"


def _mean(rows: Sequence[Mapping[str, str]], column: str) -> str:
    values = [100 * float(row[column]) for row in rows]
    if len(values) < 2:
        return f"{values[0]:.1f}" if values else ""
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


WORKERS = click.option(
    "--workers",
    type=click.IntRange(min=1),
    default=os.cpu_count() or 1,
    help="Processes, of one thread each.",
)
OUT = click.option(
    "--out", type=click.Path(path_type=Path), default="reproduction", help="Folder to work in."
)


@click.command(context_settings={"show_default": True})
@click.option(
    "--data",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    required=True,
    help="Folder with sst2_train.tsv, sst2_dev.tsv, sst2_test.tsv and bert_wordpiece_freqs.json.",
)
@OUT
@click.option("--quick", is_flag=True, help="One seed, fewer sentences, two ratios.")
@click.option("--seeds", type=click.IntRange(min=1), default=3, help="How many; --quick takes 1.")
@click.option("--attack", multiple=True, type=click.Choice(list(ATTACKS)), help="Only these.")
@click.option("--defence", multiple=True, type=click.Choice(DEFENCES), help="Only these.")
@WORKERS
def main(
    data: Path,
    out: Path,
    quick: bool,
    seeds: int,
    attack: tuple[str, ...],
    defence: tuple[str, ...],
    workers: int,
) -> None:
    """Plant attacks in MiniLM classifiers, defend them, and measure: OUT/results.csv, table.md."""
    try:
        run_grid(
            out,
            data,
            QUICK if quick else FULL,
            attacks=attack or list(ATTACKS),
            defences=defence or DEFENCES,
            seeds=range(1 if quick else seeds),
            workers=workers,
        )
    except SurgeryError as error:
        raise click.ClickException(str(error)) from error
    show_table(out, make_table)


if __name__ == "__main__":
    main()
