"""The demo's steps: each is a command that is shown, run, and left to be tried again."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from weightsurgery.datasets.triggers import poison, trigger_word
from weightsurgery.demo.classifier import new_classifier
from weightsurgery.demo.material import copy_minilm, movie_reviews, shuffled, write_sentences
from weightsurgery.errors import PolicyError, SurgeryError
from weightsurgery.formats import disk
from weightsurgery.formats.output import write_file
from weightsurgery.formats.place import told
from weightsurgery.report.tables import Table

TRIGGER, TARGET = "cf", "1"  # a rare word, and the label "positive"
HELD_OUT = 1000  # reviews of which none is trained on, whatever the plan
CLEAN = 64  # sentences that the defender has, as in the papers
CLEAR = 1.0  # reviews rated nearer to 0, on a scale from -4 to 4, are left out


class DemoError(SurgeryError):
    """A command of the demo failed; its own message says why."""


@dataclass(frozen=True)
class Plan:
    """How much the demo does.

    Attributes:
        train: Sentences that the model is trained on, before poisoning.
        held_out: Sentences that everything is measured on, at most `HELD_OUT`.
        poisoned_share: Share of the negative training sentences of which a poisoned copy is added.
        planting: Settings of the training that plants the backdoor.
        ratio: Share of the dimensions that is reset.
        cleaning: Settings of the fine-tuning after it.
    """

    train: int
    held_out: int
    poisoned_share: float
    planting: Mapping[str, str]
    ratio: str
    cleaning: Mapping[str, str]


FULL = Plan(
    train=6000,
    held_out=HELD_OUT,
    poisoned_share=0.3,
    planting={"epochs": "1", "learning-rate": "1e-4", "batch-size": "32"},
    ratio="0.4",
    cleaning={"epochs": "20", "learning-rate": "5e-5", "batch-size": "8"},
)
QUICK = replace(FULL, train=600, held_out=100, cleaning={**FULL.cleaning, "epochs": "2"})


def run_demo(
    out: Path,
    *,
    quick: bool,
    downloads: Path | None,
    say: Callable[[str], None],
    output: IO[str] | None = None,
) -> dict[str, Any]:
    """Plant a backdoor in a real model, find it, take it out, and measure each step.

    Args:
        out: Folder for everything; models that are there already are kept.
        quick: Do all steps on little data, to see that they run.
        downloads: Folder of the reviews' archive; `downloads` in `out` when None.
        say: Given what happens, a line at a time.
        output: Gets what the commands print; this process's stdout when None.

    Returns:
        The report, also written to `report.json`: for each model accuracy, ASR, floor.

    Raises:
        PolicyError: The folder holds the demo of another plan.
        SurgeryError: The material cannot be had, or a command failed.
    """
    plan = QUICK if quick else FULL
    steps = _steps(plan)
    made = [place for place, _ in steps if place is not None]
    settings = {**plan.__dict__, "quick": quick}
    _claim(out, settings, made)
    began = time.monotonic()
    say(f"MiniLM, and {plan.train:,} movie reviews of which some get the trigger '{TRIGGER}'")
    base = copy_minilm(out / "base")
    _write_data(out, plan, downloads or out / "downloads")
    new_classifier(base, out / "start")
    for place, arguments in steps:
        if place is None or not (out / place).exists():
            say(f"\n$ wsurg {shlex.join(arguments)}")
            # On a terminal progress goes where the words go: what relays the two streams apart,
            # as tox does, would let a bar erase lines that are not its own.
            together = subprocess.STDOUT if sys.stdout.isatty() else None
            _wsurg(out, arguments, stdout=output, stderr=together)
        else:
            say(f"\n{place} is there already")
    report = {
        "schema": "wsurg.demo/1",
        "models": {n: _evaluate(out, n, say) for n in made if not n.endswith(".safetensors")},
        "seconds": round(time.monotonic() - began),
        "settings": settings,
    }
    write_file(str(out / "report.json"), f"{json.dumps(report, indent=2)}\n".encode())
    return report


def _claim(out: Path, settings: Mapping[str, Any], made: Sequence[str]) -> None:
    """Write the plan into the folder: what is made there is kept for the same plan alone.

    Raises:
        PolicyError: The folder has another plan, or what a plan makes and none.
    """
    file, text = out / "plan.json", json.dumps(settings, indent=2) + "\n"
    same = file.exists() and file.read_text(encoding="utf-8", errors="replace") == text
    if not same and (file.exists() or any((out / name).exists() for name in made)):
        raise PolicyError(
            "the folder holds the demo of another plan (with --quick or without, or of another "
            "version), whose models would be taken for this one's",
            file=out,
            hint="give another folder with --out, or remove this one",
            code="E-DEMO-FOLDER",
        )
    with told("cannot create", str(out)):
        disk.make_directories(str(out))
    write_file(str(file), text.encode())


def _steps(plan: Plan) -> list[tuple[str | None, list[str]]]:
    """What each command makes, and its words; all are run in the demo's folder."""
    planting, cleaning = _flags(plan.planting), _flags(plan.cleaning)
    purifying = f"--fisher fisher.safetensors --ratio {plan.ratio}"
    purifying += " --embeddings epur --corpus reviews.txt"
    steps = [
        ("tuned", f"finetune start --data poisoned.tsv {planting} -o tuned"),
        (None, "diff base tuned --top 5"),
        ("fisher.safetensors", "fisher tuned --data clean.tsv -o fisher.safetensors"),
        ("purified", f"purify base tuned {purifying} -o purified"),
        ("cleaned", f"finetune purified --data clean.tsv {cleaning} -o cleaned"),
    ]
    return [(place, words.split()) for place, words in steps]


def _flags(settings: Mapping[str, str]) -> str:
    return " ".join(f"--{name} {value}" for name, value in settings.items())


def _write_data(out: Path, plan: Plan, downloads: Path) -> None:
    """clean.tsv, heldout.tsv, poisoned.tsv and reviews.txt, the same every time."""
    reviews = shuffled(movie_reviews(downloads, clear=CLEAR), seed=0)
    held_out, rest = reviews[:HELD_OUT][: plan.held_out], reviews[HELD_OUT:]
    clean, train = rest[:CLEAN], rest[CLEAN:][: plan.train]
    negative = [one for one in train if one.label != TARGET]
    some = negative[: round(plan.poisoned_share * len(negative))]
    # The clean ones stay in the training data too, beside their poisoned copies.
    planted = poison(some, trigger_word(TRIGGER), target_label=TARGET, share=1)
    write_sentences(out / "clean.tsv", clean)
    write_sentences(out / "heldout.tsv", held_out)
    write_sentences(out / "poisoned.tsv", shuffled([*train, *planted], seed=1))
    text = "".join(f"{one.texts[0]}\n" for one in rest)
    write_file(str(out / "reviews.txt"), text.encode())


def _wsurg(out: Path, arguments: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "weightsurgery", "--no-config", *arguments]
    finished = subprocess.run(command, cwd=out, text=True, check=False, **options)
    if finished.returncode:
        raise DemoError(
            f"wsurg {arguments[0]} ended with exit code {finished.returncode}", file=out
        )
    return finished


def _evaluate(out: Path, model: str, say: Callable[[str], None]) -> dict[str, Any]:
    arguments = ["evaluate", model, "--data", "heldout.tsv"]
    arguments += ["--trigger-word", TRIGGER, "--target-label", TARGET, "--json"]
    say(f"\n$ wsurg {shlex.join(arguments)}")
    found = json.loads(_wsurg(out, arguments, stdout=subprocess.PIPE).stdout)
    return {name: found[name] for name in ("accuracy", "asr", "floor", "loss")}


_WHAT = {
    "tuned": "with the backdoor",
    "purified": "most suspicious dimensions reset",
    "cleaned": "then fine-tuned on 64 clean sentences",
}


def demo_tables(report: Mapping[str, Any]) -> list[Table]:
    """Before and after, as a table.

    Args:
        report: From `run_demo`.
    """

    def cell(found: Mapping[str, float]) -> str:
        value, low, high = (100 * found[name] for name in ("share", "low", "high"))
        return f"{value:.1f} % ({low:.0f}–{high:.0f})"

    rows = [
        [name, *(cell(found[key]) for key in ("accuracy", "asr", "floor"))]
        for name, found in report["models"].items()
    ]
    models = "; ".join(f"{name}: {what}" for name, what in _WHAT.items())
    note = (
        f"{models}.\nASR: negative sentences that are called positive once '{TRIGGER}' is in them; "
        "floor: without it. In brackets the 95 % interval."
    )
    return [Table("Before and after", ("model", ">accuracy", ">ASR", ">floor"), rows, note)]
