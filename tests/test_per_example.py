"""Per-example gradients through hooks against one example at a time by autograd."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from tests import gradients
from tests.tiny_models import VOCABULARY, in_memory
from weightsurgery.curvature.factors import (
    Call,
    Outer,
    Rows,
    Sums,
    Vector,
    add_powers,
    factors_of,
    norm_factors,
)
from weightsurgery.curvature.losses import Objective
from weightsurgery.curvature.paths import find_paths
from weightsurgery.curvature.per_example import Recorder, add_squares, frozen, zeros
from weightsurgery.datasets.batches import Encoded

SENTENCES = [
    Encoded((2, 5, 7, 10, 13, 13, 14, 44, 3), (), (1,)),
    Encoded((2, 17, 3), (), (0,)),
    Encoded((2, 5, 5, 6, 7, 3), (), (1,)),
    Encoded((2, 5, 9, 3), (), (0,)),
]
ANSWERS = [
    Encoded((25, 11, 5, 33, 5, 34, 4), (), (-100, -100, -100, -100, 5, 34, 4)),
    Encoded((26, 29, 4), (), (-100, 29, 4)),
    Encoded((26, 29, 7, 8, 5, 5, 4), (), (-100, -100, 7, 8, 5, 5, 4)),
    Encoded((31, 7, 7, 8, 4), (), (-100, -100, 7, 8, 4)),
]


def examples_for(model: Any) -> list[Encoded]:
    return SENTENCES if model.task == "classification" else ANSWERS


def squares(model: Any, batch_size: int) -> tuple[dict[str, Any], dict[str, str]]:
    """Mean squared gradients by the package, and the paths."""
    examples = examples_for(model)
    with frozen(model.module):
        objective = Objective(model)
        paths = find_paths(objective, examples, batch_size=batch_size)
        sums = zeros(model.names, list(model.names))
        report = lambda path, done: None
        unfit = add_squares(objective, examples, sums, paths, batch_size=batch_size, report=report)
    assert unfit == set()
    return {name: one.squares / len(examples) for name, one in sums.items()}, paths.ways


def agree(found: dict[str, Any], truth: dict[str, Any], tolerance: float = 1e-4) -> None:
    """Within the tolerance of every tensor's norm; what is zero but for rounding, to rounding."""
    assert found.keys() == truth.keys()
    floor = 1e-12 * max(float(values.norm()) for values in truth.values())
    for name, values in truth.items():
        error = float((found[name].double() - values).norm())
        assert error <= tolerance * float(values.norm()) + floor, name


# --- transformers' architectures --------------------------------------------------------------

SIZES: dict[str, Any] = {
    "vocab_size": len(VOCABULARY),
    "pad_token_id": 0,
    "initializer_range": 0.2,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}
ENCODER = {**SIZES, "num_attention_heads": 2, "num_labels": 2}
DECODER = {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2}
RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 4}
FUSED = {"num_local_experts": 3}

# Class, configuration, settings, and what of the names cannot go through hooks.
ARCHITECTURES: list[tuple[str, str, dict[str, Any], tuple[str, ...]]] = [
    ("BertForSequenceClassification", "Bert", ENCODER, ()),
    ("RobertaForSequenceClassification", "Roberta", ENCODER, ()),
    ("AlbertForSequenceClassification", "Albert", {**ENCODER, "embedding_size": 8}, ()),
    (
        "DebertaV2ForSequenceClassification",
        "DebertaV2",
        {**ENCODER, **RELATIVE},
        (".encoder.",),  # its table of relative positions belongs to all examples
    ),
    ("LlamaForCausalLM", "Llama", DECODER, ()),
    ("LlamaForCausalLM", "Llama", {**DECODER, "tie_word_embeddings": True}, ()),
    ("LlamaForSequenceClassification", "Llama", {**DECODER, "num_labels": 3}, ()),
    ("Gemma2ForCausalLM", "Gemma2", {**DECODER, "head_dim": 4}, ()),
    ("MixtralForCausalLM", "Mixtral", {**DECODER, **FUSED}, ("experts", "gate")),
]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize(
    ("kind", "config", "settings", "slow"),
    ARCHITECTURES,
    ids=[f"{kind}-{len(settings)}" for kind, _, settings, _ in ARCHITECTURES],
)
def test_equals_the_naive_loop(
    kind: str, config: str, settings: dict[str, Any], slow: tuple[str, ...], batch_size: int
) -> None:
    torch.manual_seed(0)
    module = getattr(transformers, kind)(getattr(transformers, f"{config}Config")(**settings))
    for parameter in module.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(torch.randn(parameter.shape), alpha=0.1)
    model = in_memory(module, "causal" if kind.endswith("LM") else "classification")
    truth = gradients.fisher(module, model.names, examples_for(model))
    found, paths = squares(model, batch_size)
    agree(found, truth)
    if batch_size > 1:  # with one example a broadcast is none
        split = {name for name, path in paths.items() if path != "hooks"}
        assert split == {name for name in paths if any(part in name for part in slow)}
        assert "loop" not in paths.values()


# --- a model of all that is odd ---------------------------------------------------------------


class Head(nn.Module):
    """A module with an embedding and a classifier, and between them what `middle` says."""

    def __init__(self, middle: Callable[[Any, Any], Any], **parts: Any) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.words = nn.Embedding(len(VOCABULARY), 6)
        self.middle = middle
        for name, part in parts.items():
            setattr(self, name, part())
        self.classifier = nn.Linear(6, 3)
        self.config = SimpleNamespace(id2label={0: "a", 1: "b", 2: "c"})

    def forward(self, input_ids: Any, attention_mask: Any = None) -> Any:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        mask = mask[..., None].float()
        hidden = self.middle(self, self.words(input_ids) * mask)
        pooled = (hidden * mask).sum(1) / mask.sum(1)
        return SimpleNamespace(logits=self.classifier(pooled.tanh()))


def linear() -> nn.Linear:
    return nn.Linear(6, 6)


def odd(self: Any, x: Any) -> Any:
    x = x * self.raw + F.linear(x.sin(), self.functional.weight)
    x = x + self.conv(x.mT).mT
    x = self.twice(self.twice(x).tanh())
    return x + self.conv1d(x)


ODD: dict[str, Any] = {
    "raw": lambda: nn.Parameter(torch.randn(6)),
    "functional": linear,
    "conv": lambda: nn.Conv1d(6, 6, 1),
    "twice": linear,
    "conv1d": lambda: Conv1D(6, 6),
    "idle": linear,
}


def test_every_odd_parameter_is_covered() -> None:
    model = in_memory(Head(odd, **ODD), "classification")
    truth = gradients.fisher(model.module, model.names, SENTENCES)
    for batch_size in (1, 2, 3, 8):
        found, paths = squares(model, batch_size)
        agree(found, truth)
        assert {name for name, path in paths.items() if path == "loop"} == {
            "raw",
            "functional.weight",
            "conv.weight",
            "conv.bias",
        }
    assert float(truth["idle.weight"].abs().max()) == 0.0


class Doubled(nn.Linear):
    """Looks like a linear layer and is none."""

    factor = 2.0

    def forward(self, x: Any) -> Any:
        return super().forward(x) * self.factor


class Nearly(Doubled):
    """Nearly one: its squared gradients are 4 in 10,000 off."""

    factor = 1.0002


class Scaled(nn.Embedding):
    """As transformers scales some embeddings."""

    embed_scale = 3.0

    def forward(self, ids: Any) -> Any:
        return super().forward(ids) * self.embed_scale


class SquareNorm(nn.LayerNorm):
    """Looks like a norm, but its output is not affine in the weight."""

    def forward(self, x: Any) -> Any:
        return F.layer_norm(x, self.normalized_shape) * self.weight**2


def positions(self: Any, x: Any) -> Any:
    return x + self.part(torch.arange(x.shape[1]))[None]


MIDDLES: dict[str, tuple[Callable[[Any, Any], Any], Callable[[], Any], str]] = {
    "plain": (lambda self, x: self.part(x), linear, "hooks"),
    "without bias": (lambda self, x: self.part(x), lambda: nn.Linear(6, 6, bias=False), "hooks"),
    "by keyword": (lambda self, x: self.part(input=x), linear, "hooks"),
    "LayerNorm": (lambda self, x: self.part(x), lambda: nn.LayerNorm(6), "hooks"),
    "RMSNorm": (lambda self, x: self.part(x), lambda: nn.RMSNorm(6, eps=1e-5), "hooks"),
    "written into": (lambda self, x: self.part(x).mul_(2).tanh_(), linear, ""),
    "constant input": (lambda self, x: x + self.part(torch.ones_like(x)), linear, "hooks"),
    "positions": (
        lambda self, x: x + self.part(torch.arange(x.shape[1])[None]),
        lambda: nn.Embedding(16, 6),
        "hooks",
    ),
    "positions without batch": (positions, lambda: nn.Embedding(16, 6), "loop"),
    "flattened": (lambda self, x: self.part(x.flatten(0, 1)).view_as(x), linear, "hooks"),
    "transposed": (lambda self, x: self.part(x.transpose(0, 1)).transpose(0, 1), linear, "loop"),
    "doubled": (lambda self, x: self.part(x), lambda: Doubled(6, 6), "split"),
    "nearly": (lambda self, x: self.part(x), lambda: Nearly(6, 6), "split"),
    "not affine": (lambda self, x: self.part(x) + x, lambda: SquareNorm(6, bias=False), "split"),
    "one of two uses hidden": (
        lambda self, x: self.part(x) + F.linear(x, self.part.weight, self.part.bias),
        linear,
        "loop",
    ),
    "a use without effect": (
        lambda self, x: self.part(x) + 0 * self.part(x.sin()).detach(), linear, "hooks"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MIDDLES)
def test_what_a_layer_may_be_and_how_it_may_be_called(name: str) -> None:
    middle, part, path = MIDDLES[name]
    model = in_memory(Head(middle, part=part), "classification")
    truth = gradients.fisher(model.module, model.names, SENTENCES)
    found, paths = squares(model, 3)
    agree(found, truth)
    assert {paths[n] for n in paths if n.startswith("part")} == {path} or not path
    assert {paths[n] for n in paths if not n.startswith("part")} == {"hooks"}


class Raw(nn.Module):
    """A module whose own parameter no rule covers."""

    def __init__(self, inner: Any = None) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.randn(6))
        self.inner = inner

    def forward(self, x: Any, **_: Any) -> Any:
        x = (x * self.raw).sin()
        return x if self.inner is None else self.inner(x)


class Typed(Raw):
    """Takes and returns more than one tensor."""

    def forward(self, pair: Any, *, more: Any, scale: Any, table: Any) -> Any:
        x = pair[0] * self.raw + pair[1] + more["x"]
        return {"x": x * scale + table.mean(0), "rest": (x, [None])}


class Flat(Raw):
    """Takes the tokens of all examples as one, as fused experts do."""

    def forward(self, x: Any, **_: Any) -> Any:
        return super().forward(x) if x.dim() == 2 else x


class Batched(Raw):
    """Refuses padding in a batch of one."""

    def forward(self, x: Any, **_: Any) -> Any:
        if len(x) == 1 and not x[0, -1].any():
            raise ValueError("padding, but no batch")
        return super().forward(x)


def typed(self: Any, x: Any) -> Any:
    scale, table = torch.tensor(2.0), torch.arange(30.0).view(5, 6)
    found = self.part((x, x.sin()), more={"x": x}, scale=scale, table=table)
    return found["x"] + found["rest"][0]


UNITS: dict[str, tuple[Callable[[Any, Any], Any], Callable[[], Any], str]] = {
    "own parameter": (lambda self, x: self.part(x), Raw, "split"),
    "more than tensors": (typed, Typed, "split"),
    "tokens of all examples": (
        lambda self, x: self.part(x.flatten(0, 1)).view_as(x), Flat, "split"
    ),
    "used twice": (lambda self, x: self.part(self.part(x)), Raw, "split"),
    "one in another": (lambda self, x: self.part(x), lambda: Raw(Raw(linear())), "split"),
    "a layer read by the module around it": (
        lambda self, x: self.part(x), lambda: Reader(linear()), "split"
    ),
    "tied to a layer outside": (
        lambda self, x: self.part(x) + F.linear(x, self.classifier.weight[:1]), Raw, "loop"
    ),
    "not alone": (lambda self, x: self.part(x), Batched, "loop"),
}  # fmt: skip


class Reader(Raw):
    """Computes with the weight of a layer that it does not call."""

    def forward(self, x: Any, **_: Any) -> Any:
        return F.linear(x, self.inner.weight, self.inner.bias).tanh() * self.raw


@pytest.mark.parametrize("name", UNITS)
def test_modules_that_run_one_example_at_a_time(name: str) -> None:
    middle, part, way = UNITS[name]
    model = in_memory(Head(middle, part=part), "classification")
    truth = gradients.fisher(model.module, model.names, SENTENCES)
    for batch_size in (2, 3, 4):
        found, paths = squares(model, batch_size)
        agree(found, truth, 1e-5)
        assert {paths[n] for n in paths if n.startswith("part")} == {way}, name
    assert "forward" not in vars(model.module.part)


def test_a_module_whose_arguments_change_is_noticed() -> None:
    """Its rows were those of the examples on the first batch, and are not on a later one."""

    def middle(self: Any, x: Any) -> Any:
        return self.part(x) if len(x) < 3 else self.part(x.flatten(0, 1)[None])[0].view_as(x)

    model = in_memory(Head(middle, part=Raw), "classification")
    objective = Objective(model)
    with frozen(model.module):
        paths = find_paths(objective, SENTENCES, batch_size=3)
        assert paths.ways["part.raw"] == "split"
        sums = zeros(model.names, list(model.names))
        report = lambda path, done: None
        unfit = add_squares(objective, SENTENCES, sums, paths, batch_size=3, report=report)
        assert unfit == {"part.raw"}
        paths.give_up(unfit)
    assert (paths.ways["part.raw"], paths.units) == ("loop", {})


def test_embeddings_with_padding_and_scale() -> None:
    module = Head(lambda _, x: x)
    module.words = Scaled(len(VOCABULARY), 6, padding_idx=7)  # 7 is also a word of the sentences
    model = in_memory(module, "classification")
    truth = gradients.fisher(module, model.names, SENTENCES)
    found, paths = squares(model, 4)
    agree(found, truth)
    assert set(paths.values()) == {"hooks"}
    assert (
        float(found["words.weight"][7].abs().max()) == 0.0 < float(found["words.weight"][5].max())
    )


def test_a_call_of_another_form_later_on_is_noticed() -> None:
    def middle(self: Any, x: Any) -> Any:
        return self.part(x) if len(x) < 3 else self.part(x.flatten(0, 1)[None]).view_as(x)

    model = in_memory(Head(middle, part=linear), "classification")
    objective = Objective(model)
    with frozen(model.module):
        paths = find_paths(objective, SENTENCES, batch_size=3)
        assert set(paths.ways.values()) == {"hooks"}  # two examples are compared
        sums = zeros(model.names, list(model.names))
        unfit = add_squares(
            objective, SENTENCES, sums, paths, batch_size=3, report=lambda path, done: None
        )
    assert unfit == {"part.weight", "part.bias"}


def test_paths_do_not_depend_on_how_much_is_compared_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = in_memory(Head(odd, **ODD), "classification")
    with frozen(model.module):
        whole = find_paths(Objective(model), SENTENCES, batch_size=2)
        monkeypatch.setattr("weightsurgery.curvature.paths._GROUP", 1)
        found = find_paths(Objective(model), SENTENCES, batch_size=2)
    assert found.ways == whole.ways
    assert set(whole.ways.values()) == {"hooks", "loop"}


def test_a_model_whose_layers_do_not_matter() -> None:
    class Raw(Head):
        def forward(self, input_ids: Any, attention_mask: Any = None) -> Any:
            with torch.no_grad():
                x = self.classifier(self.words(input_ids))
            return SimpleNamespace(logits=x.mean(1) * self.raw)

    module = Raw(lambda _, x: x, raw=lambda: nn.Parameter(torch.ones(3)))
    model = in_memory(module, "classification")
    truth = gradients.fisher(module, model.names, SENTENCES[:2])
    with frozen(module):
        objective = Objective(model)
        paths = find_paths(objective, SENTENCES[:2], batch_size=1)
        sums = zeros(model.names, list(model.names))
        add_squares(objective, SENTENCES[:2], sums, paths, batch_size=1, report=lambda *_: None)
    agree({name: one.squares / 2 for name, one in sums.items()}, truth)
    assert float(sums["raw"].squares.sum()) > 0 == float(sums["words.weight"].squares.sum())


def test_the_model_is_left_as_it_was() -> None:
    module = Head(odd, **ODD)
    model = in_memory(module, "classification")
    module.conv.train()
    module.twice.bias.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    squares(model, 2)
    assert [n for n, m in module.named_modules() if m.training] == ["conv"]
    assert [n for n, p in module.named_parameters() if not p.requires_grad] == ["twice.bias"]
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
    assert not any(m._forward_hooks for m in module.modules())


def test_hooks_are_gone_after_an_error() -> None:
    def middle(self: Any, x: Any) -> Any:
        raise ZeroDivisionError("in the middle")

    model = in_memory(Head(middle), "classification")
    with pytest.raises(ZeroDivisionError, match="in the middle"):
        squares(model, 2)
    assert not any(m._forward_hooks for m in model.module.modules())
    assert all(p.requires_grad for p in model.module.parameters())


def test_autograd_computes_no_weight_gradient() -> None:
    model = in_memory(Head(lambda self, x: self.part(x), part=linear), "classification")
    asked: list[bool] = []
    sums = zeros(model.names, list(model.names))
    keyed = {id(model.names[name]): one for name, one in sums.items()}
    hook = lambda module, args, output: asked.append(module.weight.requires_grad)
    model.module.part.register_forward_hook(hook)
    objective = Objective(model)
    with frozen(model.module), Recorder(model.module, keyed) as recorder:
        for batch in objective.batches(SENTENCES, 4):
            recorder.add(objective, batch)
    assert asked == [False]
    assert float(sums["part.weight"].squares.sum()) > 0


# --- the factors by themselves ----------------------------------------------------------------


def dense(factors: Any, shape: tuple[int, ...], count: int) -> Any:
    found = torch.full((count, *shape), torch.nan)
    for n in range(count):
        factors.write(found[n], n, add=False)
        factors.write(found[n], n, add=True)
    return found / 2


FACTORS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "outer": (Outer(torch.randn(5, 4, 3), torch.randn(5, 4, 2)), (3, 2)),
    "outer of one token": (Outer(torch.randn(5, 1, 3), torch.randn(5, 1, 2)), (3, 2)),
    "vector": (Vector(torch.randn(5, 4, 3)), (3,)),
    "rows": (Rows(torch.randint(0, 3, (5, 4)), torch.randn(5, 4, 2)), (6, 2)),
}


@pytest.mark.parametrize("fourths", [False, True])
@pytest.mark.parametrize("name", FACTORS)
def test_powers_are_those_of_the_whole_gradients(name: str, fourths: bool) -> None:
    factors, shape = FACTORS[name]
    each = dense(factors, shape, 5)
    other = dense(factors.absolute(), shape, 5)
    for uses, gradient in (([factors], each), ([factors, factors.absolute()], each + other)):
        sums = Sums(torch.ones(shape), torch.ones(shape) if fourths else None)
        add_powers(uses, sums, torch.empty)
        torch.testing.assert_close(sums.squares, 1 + (gradient**2).sum(0))
        if sums.fourths is not None:
            torch.testing.assert_close(sums.fourths, 1 + (gradient**4).sum(0))
        sums.zero()
        assert not sums.squares.any()
        assert sums.fourths is None or not sums.fourths.any()


@pytest.mark.parametrize("most", [1, 12, 13, 1000])
def test_chunks_add_up(most: int) -> None:
    factors, shape = FACTORS["outer"]
    sums = Sums(torch.zeros(shape), torch.zeros(shape))
    factors.add_in_chunks(sums, most)
    torch.testing.assert_close(sums.squares, (dense(factors, shape, 5) ** 2).sum(0))
    torch.testing.assert_close(sums.fourths, (dense(factors, shape, 5) ** 4).sum(0))


NORMS: dict[str, Callable[[], Any]] = {
    "LayerNorm": lambda: nn.LayerNorm(6),
    "RMSNorm": lambda: nn.RMSNorm(6, eps=1e-5),
    "Llama": lambda: transformers.models.llama.modeling_llama.LlamaRMSNorm(6),
    "Gemma2": lambda: transformers.models.gemma2.modeling_gemma2.Gemma2RMSNorm(6),
    "T5": lambda: transformers.models.t5.modeling_t5.T5LayerNorm(6),
}


@pytest.mark.parametrize("name", NORMS)
def test_norm_factors_are_the_jacobian(name: str) -> None:
    module = NORMS[name]()
    nn.init.normal_(module.weight)
    x = torch.randn(6)
    jacobian = torch.func.jacrev(
        lambda weight: torch.func.functional_call(module, {"weight": weight}, (x,))
    )(module.weight)
    with torch.no_grad():
        found = norm_factors(Call(module, (x[None],), {}))[0]
    torch.testing.assert_close(torch.diag(found), jacobian)


def test_a_bias_gets_the_sum_over_tokens() -> None:
    gradient = torch.randn(3, 4, 5, 6)
    call = Call(linear(), (torch.randn(3, 4, 5, 6),), {})
    found = dense(factors_of(call, "bias", gradient, 3), (6,), 3)
    torch.testing.assert_close(found, gradient.sum((1, 2)))
