"""MEraser: erase a fingerprint by training on answers that do not match, then recover.

Reference:
    Zhang et al., "MEraser: An Effective Fingerprint Erasure Approach for Large Language Models",
    ACL 2025, arXiv:2506.12551. The two phases, their order and the transfer are the paper's; how a
    scale is chosen is our choice.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from weightsurgery.checkpoint import Checkpoint, Step
from weightsurgery.datasets.read import Instruction
from weightsurgery.errors import MismatchError, SettingError, conflict
from weightsurgery.formats.record import public_name
from weightsurgery.models import Model, with_weights
from weightsurgery.operators.apply_adapter import apply_adapter
from weightsurgery.stream import Progress
from weightsurgery.training.adapter import encode, plan_adapter, train_adapter
from weightsurgery.training.lora import PRESETS, LoraSettings
from weightsurgery.training.targets import find_targets

_ERASE, _RECOVER = "meraser-erase", "meraser-recover"
_PHASES = ("erase", "recover")
Measure = Callable[[Model], Mapping[str, Any]]


@dataclass(frozen=True)
class Phase:
    """One training of MEraser.

    Attributes:
        instructions: What to train on, from `read_instructions`.
        settings: How; None for the phase's preset.
        files: Where the instructions come from; the record tells their SHA-256.
        checkpoints: A folder for checkpoints of the training, as `train_adapter` takes it.
        save_every: Steps between two.
    """

    instructions: Sequence[Instruction]
    settings: LoraSettings | None = None
    files: Sequence[str | os.PathLike[str]] = ()
    checkpoints: str | os.PathLike[str] | None = None
    save_every: int = 50


def meraser(
    model: Model,
    erase: Phase,
    recover: Phase | None,
    *,
    foundation: Model | None = None,
    scales: Sequence[float] = (1.0,),
    measure: Measure | None = None,
    progress: Progress | None = None,
) -> Checkpoint:
    """Erase a fingerprint or a backdoor whose trigger is unknown, then recover the model.

    An adapter that is trained on mismatched answers is folded into the model, then one that is
    trained on clean answers. The weights are rounded to their stored dtype after each.

    Args:
        model: A causal model, from `load_model`. Its module is changed in place: afterwards it has
            the result's weights, or with nothing to measure those before the last adapter.
        erase: Mismatched questions and answers, as `mismatch` makes them; by the preset
            "meraser-erase".
        recover: Clean ones; by the preset "meraser-recover". None erases alone.
        foundation: Train the erasing adapter on this clean model of the same architecture, and
            fold it into `model`: the paper's transfer.
        scales: What the erasing adapter's change is multiplied by. Of several, the one of the
            smallest success rate of the fingerprints is taken, of equal ones the smallest.
        measure: Called with the model before, after the erasure (at each scale) and in the end;
            what it gives goes into the notes. With several scales it must give "fsr" with
            "share", as `evaluate_causal` does.
        progress: Called as progress("erase: training, …", steps done, steps in all), and with
            "recover: …".

    Returns:
        The model without, one hopes, its fingerprint; `notes["meraser"]` has the scale, the
        trainings, and what was measured at each stage.

    Raises:
        SettingError: There is no scale, or several and nothing to choose by; a setting of a
            training is out of range.
        MismatchError: The model is no causal one, or the foundation is of another architecture.
        PolicyError: An adapter could not be folded in.
        NonFiniteError: A loss or a trained value became NaN or infinite.
    """
    erasing, recovering = _settled(erase, _ERASE), recover and _settled(recover, _RECOVER)
    _check(model, foundation, erasing, recovering, scales, measure)
    original = model.checkpoint
    stages: list[dict[str, Any]] = []

    def holding(weights: Checkpoint) -> Model:
        """The model with these weights, which are read only where it has others."""
        nonlocal model
        if model.checkpoint is not weights:
            model = with_weights(model, weights)
        return model

    def note(stage: str, weights: Checkpoint, **more: Any) -> Mapping[str, Any]:
        """What is measured at a stage; {} if nothing is."""
        if measure is None:
            return {}
        measured = measure(holding(weights))
        stages.append({"stage": stage, **more, **measured})
        return measured

    note("before", original)
    adapter = _train(foundation or model, erasing, "erase", progress)
    adapters = {"erase": adapter}
    erased = {
        scale: apply_adapter(original, adapter, weight=(scale,), force_base=foundation is not None)
        for scale in sorted(scales)
    }
    found = {scale: note("erased", one, scale=scale) for scale, one in erased.items()}
    chosen = _least_said(found)
    result = erased[chosen]
    if recovering is not None:
        adapter = _train(holding(result), recovering, "recover", progress)
        adapters["recover"] = adapter
        result = apply_adapter(result, adapter)
        note("recovered", result)
    if measure is not None:
        holding(result)
    told = {
        "scale": chosen,
        "scales": list(scales),
        "transfer_from": None if foundation is None else public_name(foundation.checkpoint),
    }
    trainings = {phase: one.notes["training"] for phase, one in adapters.items()}
    noted = {"scale": chosen, "trainings": trainings, "stages": stages}
    return _told(result, erased[chosen], adapters, told, noted)


def plan_meraser(
    model: Model,
    erase: Phase,
    recover: Phase | None,
    *,
    foundation: Model | None = None,
    scales: Sequence[float] = (1.0,),
    measure: Measure | None = None,
) -> Checkpoint:
    """Check all that `meraser` would, and tell what it would train; nothing is written.

    The folder of the recovery's checkpoints is not looked into: whether it goes on there depends
    on the erased weights.

    Args:
        model: As for `meraser`, like all that follows; it stays as it is.
        erase: Mismatched questions and answers.
        recover: Clean ones.
        foundation: Train the erasing adapter on this model.
        scales: What the erasing adapter's change is multiplied by.
        measure: Not called.

    Returns:
        The model with both adapters as they are before their first step: its tensors are edited,
        and have the values they had. `notes["meraser"]["trainings"]` has of each phase what
        `plan_adapter` tells.

    Raises:
        SettingError: As `meraser`.
        MismatchError: As `meraser`.
        PolicyError: As `meraser`.
    """
    erasing, recovering = _settled(erase, _ERASE), recover and _settled(recover, _RECOVER)
    _check(model, foundation, erasing, recovering, scales, measure)
    planned = {"erase": _plan(foundation or model, erasing)}
    force = foundation is not None
    result = apply_adapter(
        model.checkpoint, planned["erase"], weight=(min(scales),), force_base=force
    )
    if recovering is not None:
        planned["recover"] = _plan(model, replace(recovering, checkpoints=None))
        result = apply_adapter(result, planned["recover"])
    trainings = {phase: one.notes["training"] for phase, one in planned.items()}
    noted = {"scales": sorted(scales), "trainings": trainings}
    return replace(result, notes={**result.notes, "meraser": noted})


def _plan(model: Model, phase: Phase) -> Checkpoint:
    return plan_adapter(
        model,
        phase.instructions,
        phase.settings,
        checkpoints=phase.checkpoints,
        save_every=phase.save_every,
        files=phase.files,
    )


def _told(
    result: Checkpoint,
    erased: Checkpoint,
    adapters: Mapping[str, Checkpoint],
    settings: Mapping[str, Any],
    found: Mapping[str, Any],
) -> Checkpoint:
    """The result, remembering the whole method and not its last step alone.

    The trainings and merges that it is made of stay in the recipe, below it.
    """
    steps = {phase: adapters[phase].step if phase in adapters else None for phase in _PHASES}
    told = {phase: dict(step.settings) if step else None for phase, step in steps.items()}
    folded = [one for each in dict.fromkeys((erased, result)) for one in each.notes["adapters"]]
    cut = [f"{phase}: {text}" for phase, one in adapters.items() for text in one.warnings]
    made = replace(
        result,
        notes={**result.notes, "adapters": folded, "meraser": dict(found)},
        warnings=(*result.warnings, *cut),
    )
    return made.made_by(Step("meraser", {**settings, **told}, {"model": result}))


def _least_said(measured: Mapping[float, Mapping[str, Any]]) -> float:
    """The scale at which the fingerprint succeeded least; of equal ones the smallest.

    Raises:
        SettingError: There are several, and the measure does not give an `fsr`.
    """
    if len(measured) == 1:
        return min(measured)
    shares: list[tuple[Any, float]] = []
    for scale, found in measured.items():
        if not found.get("fsr"):
            raise conflict("several scales, and `measure` gives no fsr to choose by")
        shares.append((found["fsr"]["share"], scale))
    return min(shares)[1]


def _settled(phase: Phase, preset: str) -> Phase:
    return phase if phase.settings is not None else replace(phase, settings=PRESETS[preset])


def _check(
    model: Model,
    foundation: Model | None,
    erase: Phase,
    recover: Phase | None,
    scales: Sequence[float],
    measure: Measure | None,
) -> None:
    """Refuse before the work what would fail in the middle of it.

    Raises:
        MismatchError: The foundation is of another architecture.
        SettingError: There is no scale, or several and nothing to choose by.
    """
    if not scales or not all(math.isfinite(scale) for scale in scales):
        raise SettingError(f"scales are {list(scales)}; expected finite numbers, at least one")
    if len(scales) > 1 and measure is None:
        raise conflict("several scales, and nothing to choose by", "give fingerprints")
    named = (
        {}
        if foundation is None
        else {name: foundation.checkpoint[name] for name in foundation.stored_names}
    )
    for name, theirs in named.items():
        ours = model.checkpoint.get(name)
        if ours is None or ours.shape != theirs.shape:
            found = "is absent" if ours is None else f"has shape {list(ours.shape)}"
            raise MismatchError(
                f"{found}; the foundation has {list(theirs.shape)}",
                file=model.path,
                tensor=name,
                hint="give the model that it was fine-tuned from",
                code="E-MODEL-WEIGHTS",
            )
    for phase, trained in ((erase, foundation or model), (recover, model)):
        if phase is not None and phase.settings is not None:
            find_targets(trained, phase.settings.targets)
            encode(trained, phase.instructions, phase.settings)


def _train(model: Model, phase: Phase, name: str, progress: Progress | None) -> Checkpoint:
    def tell(what: str, done: int, total: int) -> None:
        if progress is not None:
            progress(f"{name}: {what}", done, total)

    return train_adapter(
        model,
        phase.instructions,
        phase.settings,
        checkpoints=phase.checkpoints,
        save_every=phase.save_every,
        files=phase.files,
        progress=tell,
    )
