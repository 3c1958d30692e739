"""Models in torch: opened from a checkpoint's directory for gradients, training and evaluation.

The one place where transformers builds a model. Code beside the weights is never run.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from weightsurgery.batching import SIDES, keep_attention_mode, padding_sides
from weightsurgery.checkpoint import Checkpoint, TensorView
from weightsurgery.errors import MismatchError, PolicyError, SettingError, first_few, shown
from weightsurgery.formats import open_checkpoint
from weightsurgery.formats.code_keys import names_kernel
from weightsurgery.kernels import to_float
from weightsurgery.quantised import KEY, require_unquantised
from weightsurgery.storage import Storage, find_storage
from weightsurgery.tasks import CAUSAL, CLASSIFICATION, task_of
from weightsurgery.tokenizer import load_tokenizer

if TYPE_CHECKING:
    import torch

_ATTENTION = ("eager", "sdpa")  # what torch has, on all devices
_EXPERTS = ("eager", "batched_mm", "grouped_mm")
_GENERATION = "generation_config.json"


@dataclass(frozen=True)
class Model:
    """A model ready to compute: float32, in evaluation mode, on one device.

    Attributes:
        module: The transformers model.
        tokenizer: Its tokenizer.
        checkpoint: What it was loaded from.
        task: "classification" or "causal".
        names: Every trainable parameter under its name on disk, or under its name in memory if
            transformers makes it of several stored tensors or of a part of one. A tensor that
            several names stand for (tied weights) is here once, under its first name on disk.
        path: The directory as the user gave it, for messages.
        storage: Where the parameters lie in the stored tensors; None for a module that was never
            loaded.
        sides: Sides on which padding leaves answers unchanged; () if texts must be run alone.
        template_args: Variables for the tokenizer's chat template, such as enable_thinking.
    """

    module: Any
    tokenizer: Any
    checkpoint: Checkpoint
    task: str
    names: Mapping[str, torch.nn.Parameter]
    path: str
    storage: Storage | None = None
    sides: tuple[str, ...] = SIDES
    template_args: Mapping[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        found: torch.device = next(iter(self.module.parameters())).device
        return found

    def stored_in(self, name: str) -> tuple[str, ...]:
        """The stored tensors that one of `names` is loaded from; of tied copies the first."""
        return self.storage.stored_in(name) if self.storage is not None else (name,)

    @property
    def stored_names(self) -> list[str]:
        """The stored tensors that hold the trainable parameters; tied weights once."""
        return list(dict.fromkeys(one for name in self.names for one in self.stored_in(name)))

    @property
    def labels(self) -> dict[int, str]:
        """Number to name of a classifier's labels."""
        return {int(i): str(name) for i, name in self.module.config.id2label.items()}


def pick_device(device: str) -> torch.device:
    """Find a torch device; `auto` is the first accelerator, or else the CPU.

    Raises:
        SettingError: torch does not know the device, or it is not available.
    """
    import torch

    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    reason = "it holds no numbers"
    try:
        found = torch.empty(0, device=device).device
        if found.type != "meta":
            return found
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
    raise SettingError(
        f"device '{shown(device)}' is not available: {shown(reason)}",
        hint="use cpu or auto",
        code="E-DEVICE",
    )


def load_model(
    source: str | os.PathLike[str] | Checkpoint, *, task: str = "auto", device: str = "auto"
) -> Model:
    """Load a model directory in float32 with its tokenizer.

    The weights are read by the strict reader, never by transformers. Weights that the directory
    lacks are an error: a head of random numbers would give random answers. Attention is computed
    by torch alone, as the configuration says if it says eager or sdpa.

    Args:
        source: A model directory, or the checkpoint that `open_checkpoint` made of one.
        task: "classification", "causal", or "auto" to go by the configuration's architecture.
        device: Where to compute; "auto" takes an accelerator if there is one.

    Returns:
        The model, its tokenizer, and the checkpoint they come from.

    Raises:
        SettingError: It is a single file, the task is unknown, or the device is not available.
        MismatchError: There is no tokenizer, the architecture is of another task, weights are
            missing, or a classifier has no padding token.
        PolicyError: The model needs code of its own or from a repository, or is quantized.
        FormatError: A file of the directory is malformed.
    """
    if task not in ("auto", CLASSIFICATION, CAUSAL):
        raise SettingError(f"task is '{shown(task)}'; expected auto, {CLASSIFICATION} or {CAUSAL}")
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    require_directory(checkpoint)
    own = _own_part(checkpoint)
    _refuse_kernels(own.config, own)
    require_unquantised(own)
    task = task_of(own) if task == "auto" else task
    target = pick_device(device)
    with Quiet():
        tokenizer = load_tokenizer(own)
        module = _load_module(own, task)
    if task == CLASSIFICATION:
        _settle_padding(module.config, tokenizer, own)
    module.to(target).eval()
    storage = find_storage(module, own)
    names = storage.parameters
    keep_attention_mode(module)
    with Quiet():
        sides = padding_sides(module, tokenizer, task)
    return Model(module, tokenizer, checkpoint, task, names, checkpoint.label, storage, sides)


def require_directory(checkpoint: Checkpoint) -> None:
    """Refuse a single file: without config.json the model's class is unknown.

    Args:
        checkpoint: What was opened.

    Raises:
        SettingError: It is a file.
    """
    if not checkpoint.is_directory:
        path = checkpoint.label
        folder = os.path.dirname(os.path.abspath(path))
        known = os.path.isfile(os.path.join(folder, "config.json"))
        raise SettingError(
            "a single file; expected a model directory with config.json and tokenizer",
            file=path,
            hint=f"give its folder, '{shown(os.path.dirname(path) or '.')}'"
            if known
            else "put them beside it and give the folder",
            code="E-MODEL-FOLDER",
        )


def _own_part(checkpoint: Checkpoint) -> Checkpoint:
    """Of a model of several parts the one in its own folder; any other model as it is.

    Raises:
        SettingError: It has no such part.
    """
    parts = checkpoint.split()
    if not parts.get("") and checkpoint.parts:
        raise SettingError(
            f"a model of several parts: {first_few([shown(folder) for folder in parts])}",
            file=checkpoint.label,
            hint="give the folder of the one to load",
            code="E-MODEL-FOLDER",
        )
    return parts[""]


def _refuse_kernels(value: Any, checkpoint: Checkpoint) -> None:
    """Refuse a configuration in which code from a repository is to compute, at any depth."""
    if isinstance(value, list):
        for inner in value:
            _refuse_kernels(inner, checkpoint)
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if names_kernel(key, inner):
                raise PolicyError(
                    f"config.json's {shown(key)} names code from a repository: '{shown(inner)}'",
                    file=checkpoint.label,
                    hint="take the key out of config.json",
                    code="E-REMOTE-CODE",
                )
            _refuse_kernels(inner, checkpoint)


def _use_torch_alone(config: Any) -> None:
    """Let no part of the model compute with kernels that transformers would fetch or import.

    Not an argument of from_pretrained: that does not reach what the file calls
    `_attn_implementation`. None leaves the choice among torch's own to transformers.
    """
    for key, known in (("_attn_implementation", _ATTENTION), ("_experts_implementation", _EXPERTS)):
        if hasattr(config, key):  # experts came with transformers 5
            chosen = getattr(config, key)
            setattr(config, key, chosen if chosen in known else None)  # and in all its parts


def _forget_quantization(config: Any) -> None:
    """Drop what config.json says of quantization: the tensors are plain, as was checked."""
    for part in (config, config.get_text_config(decoder=True)):
        if hasattr(part, KEY):
            delattr(part, KEY)


def _load_module(checkpoint: Checkpoint, task: str) -> Any:
    import torch
    import transformers

    kinds = {
        CLASSIFICATION: transformers.AutoModelForSequenceClassification,
        CAUSAL: transformers.AutoModelForCausalLM,
    }
    own = next(file for file in checkpoint.files if "/" not in file.name)  # none of a part's
    folder = os.path.dirname(own.path)
    try:
        config = transformers.AutoConfig.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
        _use_torch_alone(config)
        _forget_quantization(config)
        with torch.device("meta"):  # only to know the class, which takes tensors
            kind = type(kinds[task].from_config(config, trust_remote_code=False))
        module, info = kind.from_pretrained(
            None,
            config=config,
            state_dict=_in_float32(checkpoint),
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below, with names
        )
        module.config.name_or_path = module.name_or_path = folder
        if any(file.name == _GENERATION for file in checkpoint.side_files):
            module.generation_config = transformers.GenerationConfig.from_pretrained(
                folder, local_files_only=True
            )
    except Exception as error:  # a malformed directory gives errors of all kinds
        if "trust_remote_code" in str(error):
            reason = "needs code that lies beside the weights"
            raise PolicyError(reason, file=checkpoint.label, code="E-REMOTE-CODE") from None
        reason = shown(" ".join(str(error).split()))
        raise MismatchError(
            f"transformers cannot load it: {reason}", file=checkpoint.label, code="E-MODEL-LOAD"
        ) from None
    for name, stored, expected in sorted(info["mismatched_keys"]):
        raise MismatchError(
            f"has shape {list(stored)}; config.json makes it {list(expected)}",
            file=checkpoint.label,
            tensor=name,
            code="E-MODEL-WEIGHTS",
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise MismatchError(
            f"lacks {len(missing)} of the weights that a {type(module).__name__} has",
            file=checkpoint.label,
            tensor=missing[0],
            hint="give a model that was trained for this task",
            code="E-MODEL-WEIGHTS",
        )
    return module


def _in_float32(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """All tensors as transformers takes them: floats widened, others as they are stored."""
    import torch

    found = {}
    for name, view in checkpoint.items():
        if view.dtype.arithmetic:
            found[name] = torch.empty(view.shape, dtype=torch.float32)
            _fill(found[name], view)
        else:
            stored = view.read(0, view.size).reshape(view.shape)
            found[name] = torch.tensor(stored)
            if view.dtype.name == "BOOL":
                found[name] = found[name] != 0
    return found


def _fill(tensor: torch.Tensor, view: TensorView) -> None:
    """Put a tensor's elements into another, block by block, in float32."""
    import torch

    values = tensor.view(-1)
    for start, stop in view.blocks():
        block = to_float(view.read(start, stop)).astype("f4", copy=False)
        values[start:stop] = torch.from_numpy(block).to(values.device)


def _settle_padding(config: Any, tokenizer: Any, checkpoint: Checkpoint) -> None:
    """Let the model's configuration name the token that batches are padded with.

    A classifier that judges by a text's last token, as GPT-2's does, finds that token as the last
    that is not the configuration's padding.
    """
    inner = config.get_text_config()  # of a model for texts and images; else `config` itself
    words = getattr(inner, "vocab_size", None) or math.inf
    for pad in (inner.pad_token_id, tokenizer.pad_token_id):
        if pad is not None and 0 <= pad < words:
            config.pad_token_id = inner.pad_token_id = pad
            return
    raise MismatchError(
        "no padding token; texts of several lengths cannot share a batch",
        file=checkpoint.label,
        hint="put the number of a token that no text has into config.json, as pad_token_id",
        code="E-TOKENIZER-PADDING",
    )


class Quiet:
    """transformers without its progress bars and advice, whose words are not ours."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self._logging: Any = logging
        self._before = logging.get_verbosity(), logging.is_progress_bar_enabled()
        self._logging.set_verbosity_error()
        self._logging.disable_progress_bar()

    def __exit__(self, *_: object) -> None:
        self._logging.set_verbosity(self._before[0])
        if self._before[1]:
            self._logging.enable_progress_bar()


def with_weights(model: Model, checkpoint: Checkpoint) -> Model:
    """The same model with another checkpoint's weights, put into its module in place.

    Args:
        model: From `load_model`.
        checkpoint: Of the same names and shapes, such as an operator's result; its weights are
            computed here, block by block, and widened to float32.

    Raises:
        MismatchError: A parameter has no tensor of its shape in the checkpoint.
    """
    set_weights(model, checkpoint)
    return replace(model, checkpoint=checkpoint)


def set_weights(model: Model, checkpoint: Checkpoint) -> None:
    """Put a checkpoint's weights into a model's module, as transformers would load them.

    Args:
        model: From `load_model`.
        checkpoint: Of the same names and shapes.

    Raises:
        MismatchError: A parameter has no tensor of its shape in the checkpoint.
    """
    if model.storage is None:
        raise ValueError("the model was not loaded from a checkpoint")
    for name, view in model.storage.as_loaded(checkpoint):
        _fill(model.names[name].data, view)
