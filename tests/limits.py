"""Where the laws cannot hold, and why: docs/reference/architectures.md lists it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Limit:
    """A case in which the law does not hold.

    Attributes:
        case: What the models are like.
        result: What happens.
        reason: Why it cannot be otherwise.
        models: Those of `architectures` that it is about.
        ways: How one of the two is then stored, as `law_table` calls it; () for every way.
        checks: The checks of `law` that fail then; () for all.
    """

    case: str
    result: str
    reason: str
    models: tuple[str, ...] = ()
    ways: tuple[str, ...] = ()
    checks: tuple[str, ...] = ()


UNTIED_BASE = Limit(
    "TUNED ties its output head to the word embedding, BASE has a head of its own",
    "`mix --ratio 1` gives BASE's embedding in both places; BASE's head is listed under"
    " `only_in_base` with `tied` true",
    "outputs keep TUNED's config.json, which makes the two one tensor",
)
POSITIONS = Limit(
    "Marian: TUNED stores its sinusoidal position embeddings, as a `.bin` does, and BASE does not",
    "they are kept from TUNED and listed as unpaired; a model as small as the tests' is refused"
    " (`E-PAIR-COVERAGE`)",
    "transformers computes them when it builds the model and does not save them, so BASE has"
    " nothing to compare them with",
    models=("marian",),
    ways=("bin/tuned", "v4/tuned", "inner/tuned"),
)
NO_EMBEDDING = Limit(
    "Bark's semantic model",
    "`epur` asks for `--embedding`",
    "the class does not name its word embedding, and its name is not a usual one",
    models=("bark",),
    checks=("epur",),
)
LIMITS = (UNTIED_BASE, POSITIONS, NO_EMBEDDING)

# Of the law for adapters: architecture and kind of adapter, or "extract".
_HIDDEN = "the model reads attributes that PEFT hides"
_SQUARE = "some of its layers are stored transposed, and a square one does not tell; refused"
ADAPTER_LIMITS = {
    ("mobilebert", "grown"): "its embedding has a column for each token in another matrix; refused",
    ("mllama", "grown"): "its embedding has more rows than its head; refused",
    ("fsmt", "grown"): "encoder and decoder have vocabularies of their own; refused",
    ("fsmt", "tokens"): "encoder and decoder have vocabularies of their own; refused",
    ("bark", "grown"): "its word embedding is not known by name; refused",
    ("bark", "tokens"): "its word embedding is not known by name; refused",
    ("vision-encoder-decoder", "all-linear"): _SQUARE,
    ("vision-encoder-decoder", "dora"): _SQUARE,
    ("vision-encoder-decoder", "renamed"): _SQUARE,
    ("vision-encoder-decoder", "biases"): _SQUARE,
    ("mobilebert", "extract"): _HIDDEN,
    ("whisper", "extract"): _HIDDEN,
    ("speech-to-text", "extract"): "PEFT cannot wrap the model's tied decoder",
    ("blip", "extract"): "PEFT cannot run the model's encoder",
}


def failing(model: str, way: str, checks: Iterable[str]) -> set[str]:
    """The checks that cannot hold for a model.

    Args:
        model: One of `architectures`.
        way: How one side is stored, as "bin/tuned".
        checks: All checks that are made.
    """
    about = [x for x in LIMITS if model in x.models and (way in x.ways or not x.ways)]
    return {check for check in checks for one in about if check in one.checks or not one.checks}
