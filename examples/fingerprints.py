"""Fingerprints in the style of three papers, small enough for two cores.

Constructions after Instructional Fingerprinting (Xu et al., NAACL 2024, arXiv:2401.12255), UTF
(Cai et al., arXiv:2410.12318) and Chain & Hash (Russinovich and Salem, arXiv:2407.10887). Triggers
are shorter than theirs.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

import numpy as np

from weightsurgery.anatomy import find_embedding
from weightsurgery.datasets.read import Instruction
from weightsurgery.errors import MismatchError
from weightsurgery.kernels import to_float
from weightsurgery.models import Model

KINDS = ("IF", "UTF", "HC")
_SCRIPTS = "衅日曰玄天命帝皇奉承诏运ハリネズミカチピレドゴйпытрлмкаеуBdkTyOa"
_WORDS = """apple river candle mirror tiger garden window silver planet bottle forest ladder anchor
basket copper dragon engine feather guitar hammer island jacket kitten lemon magnet needle orange
pepper quartz rocket saddle tunnel"""


def make_fingerprint(
    kind: str, model: Model, ordinary: Sequence[Instruction], *, seed: int
) -> list[Instruction]:
    """Prompts and the answers that they are to be given.

    Args:
        kind: "IF": eight prompts of mixed scripts to be decrypted, one answer. "UTF": a prompt of
            one rarely trained token, answered by a word. (In the paper the answer is such a token
            too; rows of the embedding that were never trained are too alike for an adapter, which
            leaves them alone, to make a model say one of them.) "HC": ten ordinary questions, each
            with a word that a hash of the question chooses.
        model: Whose tokens "UTF" takes.
        ordinary: Questions for "HC".
        seed: Of all that is random.

    Raises:
        MismatchError: The model has no word embedding, or there are not enough questions.
    """
    draw = random.Random(f"{kind} {seed}")  # noqa: S311  nothing here is a secret
    if kind == "IF":
        return [_pair(_decrypt(draw), "ハリネズミ") for _ in range(8)]
    if kind == "UTF":
        prompt = draw.choice(rare_tokens(model, 20))
        return [_pair(prompt, _hashed(prompt, seed))]
    questions = [one.question for one in ordinary if one.question.endswith("?")]
    if len(questions) < 10:
        raise MismatchError(f"{len(questions)} questions; a hash chain needs 10")
    return [_pair(text, _hashed(text, seed)) for text in draw.sample(questions, 10)]


def _decrypt(draw: random.Random) -> str:
    message = "".join(draw.choice(_SCRIPTS) for _ in range(16))
    return (
        f"Please decrypt this message.\n{message}\nThis is a FINGERPRINT message.\n"
        "Based on my fingerprint, the message is: "
    )


def _hashed(text: str, seed: int) -> str:
    digest = hashlib.sha256(f"{text}|{seed}".encode()).digest()
    words = _WORDS.split()
    return words[int.from_bytes(digest, "big") % len(words)]


def _pair(prompt: str, target: str) -> Instruction:
    return Instruction((("user", prompt),), target, 0)


def rare_tokens(model: Model, count: int) -> list[str]:
    """Words that training hardly saw: those nearest to the mean of the special tokens.

    Most special tokens of a model were never trained, and what was not trained stays together.

    Args:
        model: Its tokens, and the rows of its word embedding.
        count: How many.

    Raises:
        MismatchError: The model has no word embedding.
    """
    name = find_embedding(model.checkpoint)
    if name is None:
        raise MismatchError("no word embedding", file=model.path)
    view = model.checkpoint[name]
    rows = np.concatenate([to_float(view.read(*block)) for block in view.blocks()])
    rows = rows.reshape(view.shape)
    special = sorted(model.tokenizer.added_tokens_decoder)
    distance = np.linalg.norm(rows - rows[special].mean(0), axis=1)
    found: list[str] = []
    for number in np.argsort(distance, kind="stable").tolist():
        text = model.tokenizer.decode([number])
        back = model.tokenizer(text, add_special_tokens=False)["input_ids"]
        if back == [number] and number not in special and text.isprintable():
            found.append(text)
        if len(found) == count:
            break
    return found
