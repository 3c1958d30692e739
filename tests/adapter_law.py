"""The law for adapters: what `apply_adapter` writes, transformers loads as what PEFT computes.

`python -m tests.adapter_law [ARCHITECTURE ...]` prints which architectures it holds for.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.architectures import ARCHITECTURES, VOCABULARY, inputs_of, random_model, seed_of
from tests.law import Verdict
from tests.stored import Unstorable, load, outputs_of, store_otherwise
from weightsurgery import apply_adapter, extract_adapter, open_checkpoint, save, verify_adapter
from weightsurgery.errors import PolicyError
from weightsurgery.models import Quiet

GROWN = VOCABULARY + 3
_ROUNDING = 2e-5
Settings = Mapping[str, Any]


class Unadaptable(Exception):
    """PEFT itself cannot adapt the model so, or computes something else once it loads it again."""


@dataclass(frozen=True)
class _Case:
    model: Any
    base: Path
    scratch: Path
    inputs: Mapping[str, Any]


def judge(name: str, variant: str, scratch: Path) -> Iterator[Verdict]:
    """Whether the law holds for one architecture and one of `EVERY` kind of adapter.

    Args:
        name: The architecture.
        variant: One of `EVERY`.
        scratch: A folder of its own.

    Raises:
        Unadaptable: There is no such adapter.
    """
    if variant == "extract":
        return judge_extraction(name, scratch)
    if variant == "renamed":
        return judge_names(name, scratch)
    return (judge_head if variant in HEADS else judge_merge)(name, variant, scratch)


def judge_merge(name: str, variant: str, scratch: Path) -> Iterator[Verdict]:
    """Whether merges of an adapter of one kind are right, judged by PEFT.

    Args:
        name: The architecture.
        variant: One of `VARIANTS`.
        scratch: A folder of its own.

    Raises:
        Unadaptable: There is no such adapter.
    """
    case = _prepared(name, scratch)
    expected = _adapted(case, VARIANTS[variant])
    try:
        yield from _merged(case, expected, VARIANTS[variant])
    except Unadaptable:
        raise
    except Exception as error:
        yield Verdict("merge", "error", _said(error))


def _merged(case: _Case, expected: Any, make: Callable[[Any], Settings]) -> Iterator[Verdict]:
    import torch

    base, adapter = open_checkpoint(case.base), open_checkpoint(case.scratch / "adapter")
    try:
        merged = apply_adapter(base, adapter, force_base=True)
    except PolicyError as error:
        if error.code == "E-TIED-SHARED":
            raise Unadaptable("refused: one tensor of several modules") from error
        if "--untie" not in str(error):
            raise
        merged = apply_adapter(base, adapter, force_base=True, untie=True)
    save(merged, case.scratch / "merged")
    found = outputs_of(load(case.scratch / "merged", type(case.model)), case.inputs)
    off = float((found - expected).abs().max()) if found.shape == expected.shape else float("inf")
    near = torch.allclose(found, expected, rtol=1e-4, atol=_ROUNDING)
    if not near and _is_as_peft_merges(case, found, make):
        raise Unadaptable("PEFT's own merge computes the same, and something else than unmerged")
    yield Verdict("merge", "pass" if near else "fail", f"off by {off:.2g}", {"off": off})
    report = verify_adapter(base, [adapter], open_checkpoint(case.scratch / "merged"))
    wrong = [one for one in report["tensors"] if one["verdict"] not in ("proved", "untouched")]
    yield Verdict("proof", "pass" if report["proved"] else "fail", str(wrong[:2]))


def _is_as_peft_merges(case: _Case, found: Any, make: Callable[[Any], Settings]) -> bool:
    import peft
    import torch

    try:
        with Quiet():
            model = copy.deepcopy(case.model)
            make(model)  # what is grown is grown again
            model = peft.PeftModel.from_pretrained(model, case.scratch / "adapter")
            merged = outputs_of(model.merge_and_unload().eval(), case.inputs)
    except RuntimeError:
        return False
    return bool(torch.allclose(found, merged, rtol=1e-4, atol=_ROUNDING))


def judge_names(name: str, scratch: Path) -> Iterator[Verdict]:
    """Whether an adapter merges when BASE, the adapter or both have other names than are usual.

    Args:
        name: The architecture.
        scratch: A folder of its own.

    Raises:
        Unadaptable: There are no other names that transformers loads, or no such adapter.
    """
    case = _prepared(name, scratch)
    expected = _adapted(case, _all_linear)
    try:
        names = store_otherwise(case.model, case.base, scratch / "other-base")
    except Unstorable as error:
        raise Unadaptable(str(error)) from error
    _rename(scratch / "adapter", scratch / "other-adapter", names)
    pairs = [("other-base", "adapter"), ("base", "other-adapter"), ("other-base", "other-adapter")]
    for base, adapter in pairs:
        check = f"{adapter} on {base}"
        try:
            given = open_checkpoint(scratch / base), open_checkpoint(scratch / adapter)
            save(apply_adapter(*given, force_base=True), scratch / "out", overwrite=True)
            found = outputs_of(load(scratch / "out", type(case.model)), case.inputs)
        except PolicyError as error:
            if error.code in ("E-TIED-SHARED", "E-TIED-HEAD"):
                raise Unadaptable(f"refused: {error}") from error
            yield Verdict(check, "error", _said(error))
        except Exception as error:
            yield Verdict(check, "error", _said(error))
        else:
            near = _are_near(found, expected) or _is_as_peft_merges(case, found, _all_linear)
            yield Verdict(check, "pass" if near else "fail", "other outputs")


def _rename(adapter: Path, to: Path, names: Mapping[str, str]) -> None:
    """Copy an adapter, with other names of what it adapts."""
    from safetensors.numpy import load_file, save_file

    to.mkdir()
    shutil.copy(adapter / "adapter_config.json", to)
    modules = {n.removesuffix(".weight"): o.removesuffix(".weight") for n, o in names.items()}
    renamed = {}
    for name, array in load_file(adapter / "adapter_model.safetensors").items():
        module, _, rest = name.removeprefix("base_model.model.").partition(".lora_")
        renamed[f"base_model.model.{modules.get(module, module)}.lora_{rest}"] = array
    save_file(renamed, to / "adapter_model.safetensors")


def judge_extraction(name: str, scratch: Path) -> Iterator[Verdict]:
    """Whether PEFT makes TUNED of BASE and the adapter that is extracted from the two.

    Args:
        name: The architecture.
        scratch: A folder of its own.
    """
    import peft
    import torch

    case = _prepared(name, scratch)
    tuned = copy.deepcopy(case.model)
    with torch.random.fork_rng():
        torch.manual_seed(seed_of(name) + 5)
        for parameter in tuned.parameters():
            if parameter.is_floating_point():
                parameter.data.add_(torch.randn(parameter.shape), alpha=0.05)
    with Quiet():
        tuned.save_pretrained(scratch / "tuned")
    tuned = load(scratch / "tuned", type(tuned))
    expected = outputs_of(tuned, case.inputs)
    base, other = open_checkpoint(case.base), open_checkpoint(scratch / "tuned")
    try:
        made = extract_adapter(base, other, rank=4096)
        save(made, scratch / "adapter")
    except Exception as error:
        yield Verdict("extract", "error", _said(error))
        return
    try:
        with Quiet():
            model = peft.PeftModel.from_pretrained(copy.deepcopy(case.model), scratch / "adapter")
        found = outputs_of(model.eval(), case.inputs)
    except Exception as error:
        yield Verdict("extract", "error", f"PEFT: {_said(error)}")
        return
    off = float((found - expected).abs().max())
    near = torch.allclose(found, expected, rtol=1e-3, atol=1e-4)
    if not near:  # PEFT's tied head forgets its bias until it is merged
        found = outputs_of(model.merge_and_unload().eval(), case.inputs)
        near = torch.allclose(found, expected, rtol=1e-3, atol=1e-4)
    left = made.notes["adapter"]["left_out"]
    if not near and left:
        raise Unadaptable(f"listed: {len(left)} tensors that an adapter cannot hold, {left[:2]}")
    yield Verdict("extract", "pass" if near else "fail", f"off by {off:.2g}", {"off": off})


def judge_head(name: str, kind: str, scratch: Path) -> Iterator[Verdict]:
    """Whether a merge with the head of another class than BASE's loads as that class, complete.

    Args:
        name: The architecture.
        kind: One of `HEADS`.
        scratch: A folder of its own.

    Raises:
        Unadaptable: There is no such class, it is BASE's own, or PEFT makes something else of it.
    """
    import torch
    import transformers

    case = _prepared(name, scratch)
    auto = getattr(transformers, HEADS[kind][1])
    expected = _with_head(case, kind, auto)
    base, adapter = open_checkpoint(case.base), open_checkpoint(scratch / "adapter")
    try:
        merged = apply_adapter(base, adapter, force_base=True)
        save(merged, scratch / "merged")
        with Quiet():
            again, info = auto.from_pretrained(
                scratch / "merged", dtype=torch.float32, output_loading_info=True
            )
        found = outputs_of(again.eval(), _plain())
        odd = {key: sorted(names) for key, names in info.items() if names}
        near = _are_near(found, expected)
        yield Verdict("merge", "pass" if near else "fail", f"{found[:4]}, not {expected[:4]}")
        yield Verdict("complete", "fail" if odd else "pass", str(odd))
        report = verify_adapter(base, [adapter], open_checkpoint(scratch / "merged"))
        yield Verdict("proof", "pass" if report["proved"] else "fail", "")
    except PolicyError as error:
        if error.code == "E-TIED-SHARED":
            raise Unadaptable("refused: one tensor of several modules") from error
        yield Verdict("merge", "error", _said(error))
    except Exception as error:
        said = str(error)  # nothing was written
        if "save BASE as that class first" in said or "that class also has" in said:
            raise Unadaptable(f"refused: {error}") from error
        yield Verdict("merge", "error", _said(error))


def _with_head(case: _Case, kind: str, auto: Any) -> Any:
    """Save an adapter with a new head as PEFT does; what the adapted model computes.

    Raises:
        Unadaptable: There is no such class, or what PEFT loads again computes something else.
    """
    import peft
    import torch

    task, _, labels = HEADS[kind]
    if type(case.model.config) not in auto._model_mapping:
        raise Unadaptable("transformers has no such class")
    if not type(case.model).__name__.endswith(_LANGUAGE):
        raise Unadaptable("BASE is not a language model")
    try:
        with Quiet(), torch.random.fork_rng():
            torch.manual_seed(4)
            fresh = auto.from_pretrained(case.base, dtype=torch.float32, num_labels=labels)
            settings = {"target_modules": _layers(fresh), "task_type": task}
            model = peft.get_peft_model(fresh, peft.LoraConfig(r=4, lora_alpha=12, **settings))
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data += 0.05 * torch.randn(parameter.shape)
            expected = outputs_of(model.eval(), _plain())
            model.save_pretrained(case.scratch / "adapter")
            fresh = auto.from_pretrained(case.base, dtype=torch.float32, num_labels=labels)
            again = peft.PeftModel.from_pretrained(fresh, case.scratch / "adapter").eval()
            computed = [outputs_of(again, _plain())]
            computed.append(outputs_of(again.merge_and_unload().eval(), _plain()))
    except Exception as error:
        raise Unadaptable(f"PEFT: {_said(error)}") from error
    if not all(_are_near(one, expected) for one in computed):
        raise Unadaptable("PEFT loads or merges it as something else")
    return expected


def _plain() -> dict[str, Any]:
    """Inputs without tokens that have a meaning of their own."""
    import torch

    return {"input_ids": torch.arange(3, 11)[None]}


def _are_near(found: Any, expected: Any) -> bool:
    import torch

    alike = found.shape == expected.shape
    return alike and torch.allclose(found, expected, rtol=1e-4, atol=_ROUNDING)


def _prepared(name: str, scratch: Path) -> _Case:
    architecture, seed = ARCHITECTURES[name], seed_of(name)
    model = random_model(architecture, seed, base=False)
    with Quiet():
        model.save_pretrained(scratch / "base")
    model = load(scratch / "base", type(model))
    return _Case(model, scratch / "base", scratch, inputs_of(architecture, seed))


def _adapted(case: _Case, make: Callable[[Any], Settings]) -> Any:
    """Save an adapter as PEFT does; what the adapted model computes.

    Raises:
        Unadaptable: PEFT refuses, or what it loads again computes something else.
    """
    import peft
    import torch

    folder = case.scratch / "adapter"
    model = copy.deepcopy(case.model)
    try:
        with Quiet():
            settings = dict(make(model))
            alpha = settings.pop("lora_alpha", 12)
            embeddings = settings.pop("save_embedding_layers", "auto")
            model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=alpha, **settings))
            with torch.random.fork_rng():
                torch.manual_seed(3)
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.data += 0.05 * torch.randn(parameter.shape)
            expected = outputs_of(model.eval(), case.inputs)
            model.save_pretrained(folder, save_embedding_layers=embeddings)
            fresh = load(case.base, type(case.model))
            make(fresh)  # what is grown is grown again
            again = peft.PeftModel.from_pretrained(fresh, folder).eval()
            differs = not torch.allclose(outputs_of(again, case.inputs), expected, atol=_ROUNDING)
    except Exception as error:
        raise Unadaptable(f"PEFT: {_said(error)}") from error
    if differs:
        raise Unadaptable("PEFT loads it as something else")
    return expected


def _all_linear(_: Any) -> Settings:
    return {"target_modules": "all-linear"}


def _dora(_: Any) -> Settings:
    return {"target_modules": "all-linear", "use_dora": True}


def _names(model: Any, kind: str) -> set[str]:
    return {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if type(module).__name__ in (kind, "Conv1D") and "head" not in name.rpartition(".")[2]
    }


def _grown(model: Any) -> Settings:
    """A grown vocabulary, its embedding and head trained and saved whole."""
    _grow(model)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    modules = {id(module): name for name, module in model.named_modules()}
    saved = [modules[id(one)] for one in (embedding, head) if one is not None]
    return {"target_modules": _layers(model), "modules_to_save": saved}


def _tokens(model: Any) -> Settings:
    """A grown vocabulary of which some tokens are trained, old and new, and the rest is saved."""
    _grow(model)
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    rows = [1, *range(VOCABULARY, GROWN)]
    is_tied = model.get_output_embeddings() is not None and model.config.tie_word_embeddings
    return {
        "target_modules": _layers(model),
        "trainable_token_indices": rows if is_tied else {name: rows},
        "save_embedding_layers": True,
    }


def _grow(model: Any) -> None:
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(2)
        model.resize_token_embeddings(GROWN)


def _layers(model: Any) -> list[str]:
    """Full names of the linear layers but the output head."""
    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and module is not head
    ][:6]


def _embeddings(model: Any) -> Settings:
    """Factors of the word embedding, and of some layers."""
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    return {"target_modules": [name, *_layers(model)]}


def _experts(model: Any) -> Settings:
    """Factors of fused experts."""
    import torch

    found = [
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3 and "expert" in name and isinstance(parameter, torch.nn.Parameter)
    ]
    ends = sorted({".".join(name.split(".")[-3:]) for name in found})
    if not ends:
        raise ValueError("it has no fused experts")
    return {"target_modules": [], "target_parameters": ends}


def _biases(_: Any) -> Settings:
    return {"target_modules": "all-linear", "bias": "all", "lora_bias": False, "use_rslora": True}


# Task in PEFT's words, transformers' class, number of labels.
HEADS = {
    "classifier": ("SEQ_CLS", "AutoModelForSequenceClassification", 3),
    "tagger": ("TOKEN_CLS", "AutoModelForTokenClassification", 4),
}
_LANGUAGE = ("CausalLM", "LMHeadModel", "ConditionalGeneration", "MaskedLM")
VARIANTS: dict[str, Callable[[Any], Settings]] = {
    "all-linear": _all_linear,
    "dora": _dora,
    "grown": _grown,
    "tokens": _tokens,
    "embeddings": _embeddings,
    "experts": _experts,
    "biases": _biases,
}
EVERY = (*VARIANTS, *HEADS, "renamed", "extract")


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _cell(verdicts: Sequence[Verdict]) -> str:
    return "".join({"pass": "·", "fail": "X", "error": "E"}[one.status] for one in verdicts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Judge, print, and return 0 if the law holds everywhere."""
    parser = argparse.ArgumentParser(prog="python -m tests.adapter_law", description=__doc__)
    parser.add_argument("architecture", nargs="*", help="Substrings of architecture names.")
    parser.add_argument("--variant", action="append", help=f"Of {', '.join(EVERY)}.")
    parser.add_argument("--json", type=Path, help="Write every verdict to this file.")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    variants = options.variant or EVERY
    names = [n for n in ARCHITECTURES if not options.architecture or _any(n, options.architecture)]
    rows: list[dict[str, Any]] = []
    print(f"{'':24}" + " ".join(f"{variant:>10}" for variant in variants))
    for name in names:
        cells = []
        for variant in variants:
            row = _row(name, variant)
            rows.append(row)
            cells.append(row["cell"])
        print(f"{name:24}" + " ".join(f"{cell:>10}" for cell in cells), flush=True)
    wrong = [row for row in rows if set(row["cell"]) - {"·", "-"}]
    print()
    for row in wrong:
        print(row["architecture"], row["variant"], *row["details"])
    for variant in variants:
        mine = [r for r in rows if r["variant"] == variant and r["cell"] != "-"]
        right = [row for row in mine if set(row["cell"]) == {"·"}]
        print(f"{variant:12} {len(right)} of {len(mine)}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    return 1 if wrong else 0


def _any(name: str, parts: Sequence[str]) -> bool:
    return any(part in name for part in parts)


def _row(name: str, variant: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="adapters-") as scratch:
        try:
            verdicts = list(judge(name, variant, Path(scratch)))
            cell = _cell(verdicts)
        except Unadaptable as error:
            verdicts, cell = [Verdict("adapt", "skip", str(error))], "-"
    details = [f"{one.check}: {one.detail[:300]}" for one in verdicts if one.status != "pass"]
    return {"architecture": name, "variant": variant, "cell": cell, "details": details}


if __name__ == "__main__":
    sys.exit(main())
