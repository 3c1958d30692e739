"""What makes Fine-purifying work: one thing changed at a time, on one poisoned model.

Works in the folder of `reproduce_classification.py`, on its model of one attack and seed, which is
planted if it is not there. Each variant resets half of the ranked dimensions, if not told
otherwise, fine-tunes on the 64 clean sentences, and is measured on the first 1,200 test sentences.
`exploration.csv` has a row for each; what is there already is not done again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from classification_attacks import ATTACKS, LENGTH, encode
from classification_defences import Case
from experiment import append_row, read_rows
from reproduce_classification import (
    FULL,
    OUT,
    TRAINING,
    WORKERS,
    Cell,
    make_model,
    make_start,
    measure,
    model_folder,
    read_data,
    spread,
)

from weightsurgery import (
    evaluate,
    finetune,
    fisher,
    load_model,
    mix,
    open_checkpoint,
    purify,
    read_counts,
)
from weightsurgery.models import with_weights

COLUMNS = ("attack", "seed", "variant", "held_out_accuracy", "accuracy", "asr", "floor")
TEST = 1200
LONGER = {**TRAINING, "epochs": 20}

# Name to (settings of `purify` or, with "select", of `mix`; settings of the fine-tuning).
VARIANTS: Mapping[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Fine-purifying, ratio 0.5": ({}, LONGER),
    **{f"ratio {ratio}": ({"ratio": ratio}, LONGER) for ratio in (0.2, 0.3, 0.4, 0.7)},
    **{
        f"Fine-mixing, ratio {ratio}": ({"ratio": ratio, "select": "random"}, LONGER)
        for ratio in (0.3, 0.5, 0.7)
    },
    "score: drift": ({"score": "drift"}, LONGER),
    "score: inverse Fisher": ({"score": "inverse-fisher"}, LONGER),
    "score: random": ({"score": "random"}, LONGER),
    "4 points": ({"points": 4}, LONGER),
    "sampled labels": ({"labels": "sampled"}, LONGER),
    "epsilon 1e-3": ({"epsilon": 1e-3}, LONGER),
    "epsilon 1": ({"epsilon": 1.0}, LONGER),
    "scope: tensor": ({"scope": "tensor"}, LONGER),
    "embeddings: pool": ({"embeddings": "pool"}, LONGER),
    "embeddings: reset": ({"embeddings": "reset"}, LONGER),
    "embeddings: epur": ({"embeddings": "epur"}, LONGER),
    "position embeddings kept": ({"exclude": ["*position_embeddings*"]}, LONGER),
    "10 epochs": ({}, TRAINING),
    "40 epochs": ({}, {**TRAINING, "epochs": 40}),
    "10 epochs at 1e-4": ({}, {**TRAINING, "learning_rate": 1e-4}),
    "word embedding trained too": ({}, {**LONGER, "freeze": []}),
    "word embedding trained too, 1e-4": ({}, {**LONGER, "freeze": [], "learning_rate": 1e-4}),
    "word embedding trained too, 2e-4": ({}, {**LONGER, "freeze": [], "learning_rate": 2e-4}),
}


def run_variant(out: Path, folder: Path, attack: str, seed: int, variant: str) -> dict[str, Any]:
    """Reset, fine-tune and measure.

    Args:
        out: Folder of the experiment.
        folder: Folder of the data.
        attack: Name, of `ATTACKS`.
        seed: Of the model.
        variant: Name, of `VARIANTS`.

    Returns:
        The row of `exploration.csv`.
    """
    data = read_data(folder, FULL, seed)
    model = load_model(model_folder(out, attack, seed))
    counts = read_counts(folder / "bert_wordpiece_freqs.json")
    base = open_checkpoint(out / "base")
    case = Case(base, model, encode(model, data.clean), counts, seed)
    editing, training = VARIANTS[variant]
    edited = with_weights(model, edit(case, {"ratio": 0.5, **editing}))
    finetune(edited, case.examples, seed=seed, **training)
    held_out = evaluate(edited, data.held_out, max_length=LENGTH)["accuracy"]["share"]
    found = measure(edited, data.test[:TEST], Cell(attack, seed, variant, False))
    row = {"attack": attack, "seed": seed, "variant": variant, "held_out_accuracy": held_out}
    return {**row, **{name: found[name] for name in ("accuracy", "asr", "floor")}}


def edit(case: Case, settings: Mapping[str, Any]) -> Any:
    """The edited checkpoint of a variant.

    Args:
        case: The suspicious model and what its defender has.
        settings: Of `purify` and of the Fisher, or of `mix`.
    """
    if "select" in settings:
        return mix(case.base, case.tuned, seed=case.seed, **settings)
    of_fisher = {name: settings[name] for name in ("points", "labels") if name in settings}
    rest = {name: value for name, value in settings.items() if name not in of_fisher}
    if rest.get("embeddings") == "epur":
        rest["counts"] = case.counts
    curvature = fisher(case.model, case.examples, base=case.base, **of_fisher)
    return purify(case.base, case.tuned, fisher=curvature, **rest)


@click.command(context_settings={"show_default": True})
@click.option(
    "--data",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    required=True,
    help="As for reproduce_classification.py.",
)
@OUT
@click.option("--attack", type=click.Choice(list(ATTACKS)), default="BadWord", help="Which model.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Which model.")
@click.option(
    "--variant",
    multiple=True,
    metavar="NAME",
    type=click.Choice(list(VARIANTS)),
    help="Only these.",
)
@WORKERS
def main(
    data: Path, out: Path, attack: str, seed: int, variant: tuple[str, ...], workers: int
) -> None:
    """Change one thing of Fine-purifying at a time, and measure: OUT/exploration.csv."""
    path = out / "exploration.csv"
    done = {(row["attack"], row["seed"], row["variant"]) for row in read_rows(path)}
    todo = [one for one in variant or VARIANTS if (attack, str(seed), one) not in done]
    make_start(out, [seed])
    for needed in ["clean", attack] if ATTACKS[attack].embedding_only else [attack]:
        for what in spread(make_model, [(out, data, FULL, needed, seed)], 1):
            print(what, flush=True)
    jobs = [(out, data, attack, seed, one) for one in todo]
    for row in spread(run_variant, jobs, workers):
        append_row(path, COLUMNS, row)
        rates = f"ACC {row['accuracy']:.3f}, ASR {row['asr']:.3f} (floor {row['floor']:.3f})"
        print(f"{row['variant']}: {rates}", flush=True)


if __name__ == "__main__":
    main()
