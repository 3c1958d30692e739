"""The loss of a large vocabulary: the numbers are torch's, and the memory is counted."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.nn.functional import cross_entropy

from weightsurgery import sliced_loss
from weightsurgery.sliced_loss import token_losses

WORDS, TOKENS = 1 << 15, 1 << 10
COPY = 4 * WORDS * TOKENS / 2**20  # MiB of one float32 copy of the logits of one text
SCRIPT = """
import resource, sys, torch, transformers
from tests import tiny_models
from weightsurgery.curvature.fisher import fisher
from weightsurgery.datasets.batches import Encoded
from weightsurgery.evaluation.predictions import predict

what, words, tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
config = transformers.LlamaConfig(
    vocab_size=words, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
    num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=tokens,
)
model = tiny_models.in_memory(transformers.LlamaForCausalLM(config), "causal")

def run(length, count):
    ids = tuple(range(length))
    examples = [Encoded(ids, (), (-100, *ids[1:]))] * count
    fisher(model, examples) if what == "fisher" else predict(model, examples)

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
run(8, 2)
before = peak()
run(tokens, 1)
print(peak() - before)
"""


@pytest.mark.parametrize("at_once", [1, 40, 1 << 22])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_torchs_to_the_second_derivative(
    at_once: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sliced_loss, "_AT_ONCE", at_once)
    torch.manual_seed(0)
    logits = torch.randn(3, 5, 11).to(dtype).requires_grad_()
    labels = torch.randint(0, 11, (3, 5))
    labels[0, :3] = labels[2, -1] = -100
    weights = torch.randn(3, 4)

    def torchs() -> torch.Tensor:
        return cross_entropy(
            logits[:, :-1].float().transpose(1, 2), labels[:, 1:], reduction="none"
        )

    losses, truth = token_losses(logits, labels), torchs()
    assert torch.equal(losses[:, -1], torch.zeros(3))
    torch.testing.assert_close(losses[:, :-1], truth)
    firsts = [
        torch.autograd.grad((one * weights).sum(), logits, create_graph=True)[0]
        for one in (losses[:, :-1], truth)
    ]
    torch.testing.assert_close(*firsts)
    vector = torch.randn(3, 5, 11).to(dtype)
    seconds = [torch.autograd.grad((one * vector).sum(), logits)[0] for one in firsts]
    if dtype == torch.float32:
        torch.testing.assert_close(*seconds)


@pytest.mark.parametrize(("what", "copies"), [("fisher", 3), ("predict", 1)])
def test_a_long_text_takes_few_copies_of_its_logits(what: str, copies: int) -> None:
    """The bound on batches allows four; torch's own cross-entropy takes `predict` to three."""
    command = [sys.executable, "-c", SCRIPT, what, str(WORDS), str(TOKENS)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    grown = float(finished.stdout.split()[-1])
    assert grown < (copies + 0.5) * COPY
