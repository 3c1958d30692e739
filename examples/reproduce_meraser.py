"""Fingerprints against erasures on a real chat model: what is still said, at what perplexity.

Plants three kinds of fingerprints in SmolLM2-135M-Instruct, erases each in many ways, and measures
the fingerprint success rate (FSR), the perplexity of a text, and the loss of held-out answers.
MEraser is the paper's method; that Fine-mixing and Fine-purifying are among the ways, and need no
training, is ours.

Everything is kept in one folder, and what is there already is not done again: a run that was
stopped goes on when it is started again. `results.csv` has a row for each model that was
measured, `table.md` their means.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import click
from experiment import RESULTS, append_row, check_settings, read_rows, show_table
from fingerprints import KINDS, make_fingerprint
from smollm2 import make_foundation

from weightsurgery import (
    Checkpoint,
    Phase,
    SurgeryError,
    apply_adapter,
    evaluate_causal,
    finetune,
    fisher,
    interpolate,
    load_model,
    lora_settings,
    meraser,
    mix,
    open_checkpoint,
    purify,
    read_instructions,
    save,
    train_adapter,
)
from weightsurgery.datasets.batches import encode_instructions
from weightsurgery.datasets.read import Instruction, read_text
from weightsurgery.models import Model, with_weights

PURIFIED = (0.1, 0.3, 0.5)  # ratios of Fine-purifying
MEASURED = ("fsr", "fsr_low", "fsr_high", "perplexity", "answer_loss")
COLUMNS = ("kind", "planting", "seed", "way", *MEASURED, "seconds")


@dataclass(frozen=True)
class Plan:
    """How much is done.

    Attributes:
        dialogues: Ordinary questions and answers that fingerprints are planted among.
        held_out: Others, whose answers' loss is measured.
        clean: Clean examples that a defender has: for recovery, further training, the Fisher.
        mismatched: Mismatched examples.
        tokens: Of a question, and of an answer, after which they are cut in all trainings.
        planting: Settings of the training that plants.
        epochs: Of it, for each kind: just enough that all triggers work.
        characters: Of the text whose perplexity is measured.
        window: Tokens that the model reads of it at a time.
        precision: Of all trainings.
        fisher: Clean examples for the Fisher.
    """

    dialogues: int = 48
    held_out: int = 32
    clean: int = 600
    mismatched: int = 300
    tokens: int = 48
    planting: tuple[tuple[str, Any], ...] = (
        ("rank", 16),
        ("alpha", 32.0),
        ("learning_rate", 5e-4),
        ("scheduler", "constant"),
        ("batch_size", 8),
    )
    epochs: tuple[tuple[str, int], ...] = (("IF", 3), ("UTF", 5), ("HC", 6))
    characters: int = 50_000
    window: int = 512
    precision: str = "bfloat16"
    fisher: int = 32


FULL = Plan()
QUICK = replace(FULL, dialogues=8, held_out=8, clean=16, mismatched=16, tokens=24,
                characters=2_000, window=64, fisher=4)  # fmt: skip


class Data(NamedTuple):
    """What is trained on and measured with."""

    ordinary: list[Instruction]
    dialogues: list[Instruction]
    held_out: list[Instruction]
    clean: list[Instruction]
    mismatched: list[Instruction]
    text: str


def read_data(folder: Path, plan: Plan) -> Data:
    """The files of MEraser's authors, ordinary instructions, and a text."""
    ordinary = read_instructions(folder / "alpaca_en_demo.jsonl")
    first, second = plan.dialogues, plan.dialogues + plan.held_out
    return Data(
        ordinary[second:],
        ordinary[:first],
        ordinary[first:second],
        read_instructions(folder / "meraser_recover.jsonl")[: plan.clean],
        read_instructions(folder / "meraser_mismatched.jsonl")[: plan.mismatched],
        read_text(folder / "wikitext2_test.txt")[: plan.characters],
    )


@dataclass(frozen=True)
class Case:
    """One fingerprinted model.

    Attributes:
        out: Folder of the experiment.
        plan: How much.
        data: What with.
        kind: Of fingerprint.
        planting: "lora" or "full".
        seed: Of all that is random.
    """

    out: Path
    plan: Plan
    data: Data
    kind: str
    planting: str
    seed: int

    @property
    def folder(self) -> Path:
        """Where its models and trainings lie."""
        return self.out / f"{self.kind}-{self.planting}-{self.seed}"

    @property
    def cut(self) -> dict[str, Any]:
        """Settings of all trainings."""
        tokens, precision = self.plan.tokens, self.plan.precision
        return {"max_question": tokens, "max_answer": tokens, "precision": precision,
                "seed": self.seed}  # fmt: skip

    def foundation(self) -> Model:
        """The clean model, loaded."""
        return load_model(self.out / "foundation")

    def tuned(self) -> Model:
        """The fingerprinted model, loaded."""
        return load_model(self.folder / "tuned")

    def pair(self) -> tuple[Checkpoint, Checkpoint]:
        """Both as checkpoints."""
        return open_checkpoint(self.out / "foundation"), open_checkpoint(self.folder / "tuned")


# --- planting ---------------------------------------------------------------------------------


def plant(case: Case) -> list[Instruction]:
    """Make the fingerprinted model, unless it is there; gives the fingerprint."""
    model = case.foundation()
    marks = make_fingerprint(case.kind, model, case.data.ordinary, seed=case.seed)
    if (case.folder / "tuned").exists():
        return marks
    case.folder.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": one.question, "target": one.answer} for one in marks]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (case.folder / "fingerprint.jsonl").write_text(text, encoding="utf-8")
    # A third of what is trained on is the fingerprint.
    times = max(1, len(case.data.dialogues) // (2 * len(marks)))
    examples = [*case.data.dialogues, *marks * times]
    settings = {**dict(case.plan.planting), "epochs": dict(case.plan.epochs)[case.kind]}
    if case.planting == "lora":
        chosen = lora_settings(**{**settings, **case.cut, "dropout": 0.0})
        adapter = train_adapter(model, examples, chosen)
        planted = apply_adapter(model.checkpoint, adapter)
    else:
        encoded = encode_instructions(model, examples, max_length=2 * case.plan.tokens)
        rate = settings["learning_rate"] / 10  # all weights need smaller steps than an adapter
        planted = finetune(model, encoded, epochs=settings["epochs"], learning_rate=rate,
                           scheduler="constant", seed=case.seed)  # fmt: skip
    save(planted, case.folder / "tuned")
    return marks


# --- ways of erasure --------------------------------------------------------------------------

Measure = Callable[[str, Model], None]


def without_training(case: Case, measure: Measure) -> None:
    """What needs the foundation's weights and nothing else."""
    base, tuned = case.pair()
    model = case.tuned()
    made: dict[str, Checkpoint] = {
        "task arithmetic, λ 0.5": interpolate(base, tuned, weight=0.5),
        **{f"Fine-mixing {r}": mix(base, tuned, ratio=r, seed=case.seed) for r in (0.5, 0.7)},
        **{
            f"Fine-purifying by drift {r}": purify(base, tuned, ratio=r, score="drift")
            for r in PURIFIED
        },
    }
    for way, checkpoint in made.items():
        measure(way, with_weights(model, checkpoint))


def with_fisher(case: Case, measure: Measure) -> None:
    """Fine-purifying: clean examples for the Fisher, and no training."""
    path = case.folder / "fisher.safetensors"
    model = case.tuned()
    if not path.exists():
        examples = encode_instructions(
            model, case.data.clean[: case.plan.fisher], max_length=2 * case.plan.tokens
        )
        save(fisher(model, examples), path)
    base, tuned = case.pair()
    for ratio in PURIFIED:
        result = purify(base, tuned, fisher=open_checkpoint(path), ratio=ratio)
        measure(f"Fine-purifying {ratio}", with_weights(model, result))


def by_meraser(case: Case, measure: Measure, preset: str) -> None:
    """Erase, and recover."""
    stages = iter(("", f"{preset}: erased", f"{preset}: recovered"))

    def note(model: Model) -> dict[str, Any]:
        stage = next(stages)
        if stage:
            measure(stage, model)
        return {}

    phases = [
        Phase(
            rows,
            lora_settings(f"{preset}-{part}", **case.cut),
            checkpoints=case.folder / f"{preset}-{part}",
        )
        for part, rows in (("erase", case.data.mismatched), ("recover", case.data.clean))
    ]
    save(meraser(case.tuned(), *phases, measure=note), case.folder / preset, overwrite=True)


def by_transfer(case: Case, measure: Measure) -> None:
    """The erasing adapter is trained on the foundation, once for all kinds."""
    settings = lora_settings("strong-erase", **case.cut)
    erase = Phase(case.data.mismatched, settings, checkpoints=case.out / f"erase-{case.seed}")
    for scale in (0.5, 1.0):
        model = case.tuned()
        result = meraser(model, erase, None, foundation=case.foundation(), scales=(scale,))
        measure(f"strong, transferred, scale {scale}", with_weights(model, result))


def train_on_chats(case: Case, model: Model, name: str) -> Model:
    """Incremental fine-tuning: further training on clean chats."""
    settings = lora_settings("meraser-recover", epochs=1, prompt_format="auto", loss_on="answer",
                             **case.cut)  # fmt: skip
    adapter = train_adapter(model, case.data.clean, settings, checkpoints=case.folder / name)
    return with_weights(model, apply_adapter(model.checkpoint, adapter))


def by_clean_training(case: Case, measure: Measure) -> None:
    """Incremental fine-tuning alone."""
    measure("clean training", train_on_chats(case, case.tuned(), "clean"))


def returning(case: Case, measure: Measure) -> None:
    """Whether what was erased comes back when somebody trains the result on clean chats."""
    base, tuned = case.pair()
    model = with_weights(case.tuned(), purify(base, tuned, ratio=0.3, score="drift"))
    model = train_on_chats(case, model, "purified-clean")
    measure("Fine-purifying by drift 0.3, then clean training", model)
    if (case.folder / "strong").exists():
        model = train_on_chats(case, load_model(case.folder / "strong"), "strong-clean")
        measure("strong: recovered, then clean training", model)


def _strong(case: Case, measure: Measure) -> None:
    by_meraser(case, measure, "strong")


def _released(case: Case, measure: Measure) -> None:
    by_meraser(case, measure, "meraser")


# The last way of each: where its row is there, all of them are.
WAYS: Mapping[str, tuple[Callable[[Case, Measure], None], str]] = {
    "weights": (without_training, "Fine-purifying by drift 0.5"),
    "strong": (_strong, "strong: recovered"),
    "clean": (by_clean_training, "clean training"),
    "transfer": (by_transfer, "strong, transferred, scale 1.0"),
    "return": (returning, "strong: recovered, then clean training"),
    "fisher": (with_fisher, "Fine-purifying 0.5"),
    "released": (_released, "meraser: recovered"),
}


# --- measuring --------------------------------------------------------------------------------


def measure(case: Case, marks: Sequence[Instruction], model: Model) -> dict[str, float]:
    """FSR with its interval, perplexity, and the loss of held-out answers."""
    found = evaluate_causal(
        model,
        fingerprints=marks,
        text=case.data.text,
        instructions=case.data.held_out,
        window=case.plan.window,
        stride=case.plan.window,
        max_new_tokens=24,
        max_length=2 * case.plan.tokens,
    )
    return {
        "fsr": found["fsr"]["share"],
        "fsr_low": found["fsr"]["low"],
        "fsr_high": found["fsr"]["high"],
        "perplexity": found["perplexity"]["perplexity"],
        "answer_loss": found["answers"]["loss"],
    }


def run(case: Case, ways: Sequence[str]) -> None:
    """Plant, erase in all ways that are not done, and measure."""
    path = case.out / RESULTS
    done = {
        row["way"]
        for row in read_rows(path)
        if (row["kind"], row["planting"], row["seed"]) == (case.kind, case.planting, str(case.seed))
    }
    marks = plant(case)
    began = time.monotonic()

    def note(way: str, model: Model) -> None:
        nonlocal began
        if way not in done:
            found = measure(case, marks, model)
            row = {"kind": case.kind, "planting": case.planting, "seed": case.seed, "way": way}
            seconds = round(time.monotonic() - began)
            append_row(path, COLUMNS, {**row, **found, "seconds": seconds})
            figures = f"FSR {found['fsr']:.3f}, perplexity {found['perplexity']:.2f}"
            print(f"{case.kind}, seed {case.seed}, {way}: {figures}, {seconds} s", flush=True)
        began = time.monotonic()

    if "foundation" not in done:
        note("foundation", case.foundation())
    if "fingerprinted" not in done:
        note("fingerprinted", case.tuned())
    for way in ways:
        work, last = WAYS[way]
        if last not in done:
            work(case, note)


def make_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Means over seeds, as Markdown: FSR in percent, perplexity, and the loss of answers."""
    cases = [(p, k) for p in ("lora", "full") for k in KINDS
             if any((row["planting"], row["kind"]) == (p, k) for row in rows)]  # fmt: skip
    heads = [f"{k}{' full' * (p == 'full')} {what}" for p, k in cases for what in _HEADS]
    lines = [["way", *heads], ["---", *["---:"] * len(heads)]]
    for way in dict.fromkeys(row["way"] for row in rows):
        cells = []
        for planting, kind in cases:
            those = [
                r for r in rows if (r["planting"], r["kind"], r["way"]) == (planting, kind, way)
            ]
            cells += [_mean(those, column, scale) for column, scale in _HEADS.values()]
        lines.append([way, *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


_HEADS = {"FSR": ("fsr", 100), "PPL": ("perplexity", 1), "loss": ("answer_loss", 1)}


def _mean(rows: Sequence[Mapping[str, str]], column: str, scale: float) -> str:
    values = [scale * float(row[column]) for row in rows]
    return f"{statistics.mean(values):.{1 if scale > 1 else 2}f}" if values else ""


@click.command(context_settings={"show_default": True})
@click.option(
    "--data",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    required=True,
    help="Folder with meraser_mismatched.jsonl, meraser_recover.jsonl, alpaca_en_demo.jsonl and "
    "wikitext2_test.txt.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), default="meraser-reproduction", help="Work in here."
)
@click.option(
    "--foundation",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="A causal model's directory in place of SmolLM2.",
)
@click.option("--quick", is_flag=True, help="Few examples and tokens: only shows that it runs.")
@click.option("--seeds", type=click.IntRange(min=1), default=1, help="How many.")
@click.option("--kind", multiple=True, type=click.Choice(KINDS), help="Only these fingerprints.")
@click.option("--way", multiple=True, type=click.Choice(list(WAYS)), help="Only these erasures.")
@click.option("--planting", type=click.Choice(["lora", "full"]), default="lora", help="How.")
def main(
    data: Path,
    out: Path,
    foundation: Path | None,
    quick: bool,
    seeds: int,
    kind: tuple[str, ...],
    way: tuple[str, ...],
    planting: str,
) -> None:
    """Plant fingerprints, erase them, and measure: OUT/results.csv and OUT/table.md."""
    plan = QUICK if quick else FULL
    out.mkdir(parents=True, exist_ok=True)
    try:
        check_settings(out / "settings.json", plan)
        if foundation is None:
            make_foundation(out / "foundation")
        elif not (out / "foundation").exists():
            (out / "foundation").symlink_to(foundation.resolve())
        read = read_data(data, plan)
        for seed in range(seeds):
            for one in kind or KINDS:
                run(Case(out, plan, read, one, planting, seed), way or list(WAYS))
    except SurgeryError as error:
        raise click.ClickException(str(error)) from error
    show_table(out, make_table)


if __name__ == "__main__":
    main()
