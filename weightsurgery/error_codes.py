"""The code of every error, what it means and what to do: one list, from which the reference comes.

A code names the rule that was broken. It stays the same while messages get better, so that scripts
can go by it. A setting out of range, what the system says, and errors of operators that others
write have the code of their kind. `error_rules` has the rules for settings, for data, and for
models that are run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from weightsurgery.error_rules import ADAPTERS, DATA, MODELS, SETTINGS, Rows
from weightsurgery.errors import (
    BusyError,
    ChangedError,
    DemoError,
    FormatError,
    GateError,
    MismatchError,
    NonFiniteError,
    PolicyError,
    SettingError,
    StorageError,
    SurgeryError,
)

_AGAIN = "download the file again"
_MADE_ANEW = "write the file anew with the safetensors library"
_RECORD = "give the record that `wsurg` wrote beside the output"
_ELSEWHERE = "choose another output"


@dataclass(frozen=True)
class Code:
    """What a code stands for.

    Attributes:
        kind: The exception that has it; None for what only the command line tells.
        exit_code: What the command line exits with.
        group: What the rule is about.
        means: What is wrong.
        remedy: What to do.
    """

    kind: type[SurgeryError] | None
    exit_code: int
    group: str
    means: str
    remedy: str


_KINDS: Rows = {
    "E-SETTING": (
        SettingError,
        "a setting is out of range, unknown, or contradicts another",
        "give another value; `--help` tells which there are",
    ),
    "E-FORMAT": (FormatError, "an input is malformed", "mend the line that the message names"),
    "E-MISMATCH": (MismatchError, "the inputs do not fit each other", "give those that do"),
    "E-NONFINITE": (
        NonFiniteError,
        "NaN or infinity where arithmetic is asked",
        "`--allow-nonfinite` lets it pass, where a command has it",
    ),
    "E-POLICY": (PolicyError, "refused, though it could be done", "the message names the way"),
    "E-STORAGE": (StorageError, "the disk or the system reports an error", "see the message"),
    "E-CHANGED": (ChangedError, "an input changed, shrank or went while it was read", "run again"),
    "E-BUSY": (BusyError, "another run is writing the same output", "wait for it"),
    "E-GATE": (GateError, "the comparison was made, and its answer is no", "look into it"),
    "E-DEMO-STEP": (DemoError, "a command of the demo failed", "its own message stands above"),
}
_HEADER: Rows = {
    "E-HEADER-SHORT": (FormatError, "the file has fewer than 8 bytes", _AGAIN),
    "E-HEADER-LENGTH": (FormatError, "the header is longer than the file or the limit", _AGAIN),
    "E-HEADER-START": (FormatError, "the header does not begin with `{`", _MADE_ANEW),
    "E-HEADER-METADATA": (FormatError, "`__metadata__` is no map of texts to texts", _MADE_ANEW),
    "E-HEADER-ENTRY": (FormatError, "a tensor's entry has other fields than its three", _MADE_ANEW),
    "E-HEADER-DTYPE": (FormatError, "no such dtype", _MADE_ANEW),
    "E-HEADER-INTEGER": (FormatError, "something else where integers belong", _MADE_ANEW),
    "E-HEADER-RANK": (FormatError, "a tensor has more than 64 dimensions", _MADE_ANEW),
    "E-HEADER-SHAPE": (FormatError, "a dimension is negative, or too large", _MADE_ANEW),
    "E-HEADER-OFFSETS": (FormatError, "offsets are not two, in order", _MADE_ANEW),
    "E-HEADER-SIZE": (FormatError, "shape times dtype is not the number of bytes", _MADE_ANEW),
    "E-DATA-OVERLAP": (FormatError, "two tensors share bytes", _MADE_ANEW),
    "E-DATA-HOLE": (FormatError, "bytes between tensors belong to none", _MADE_ANEW),
    "E-DATA-CUT": (FormatError, "the file ends before its tensors do", _AGAIN),
    "E-DATA-TRAILING": (FormatError, "bytes after the last tensor", _MADE_ANEW),
}
_JSON: Rows = {
    "E-JSON-UTF8": (FormatError, "the text is not UTF-8", "save the file as UTF-8"),
    "E-JSON-SYNTAX": (FormatError, "the text is not JSON", "mend the file, or fetch it again"),
    "E-JSON-TRAILING": (FormatError, "something follows the JSON value", "take it out"),
    "E-JSON-DUPLICATE": (FormatError, "a key occurs twice in an object", "keep one of the two"),
    "E-JSON-NUMBER": (
        FormatError,
        "NaN, infinity, or a number too large, in a header, an index or a record",
        "write a finite number",
    ),
    "E-JSON-NESTED": (FormatError, "more than 128 levels of nesting", "no model needs so many"),
    "E-JSON-COST": (
        FormatError,
        "so many values that parsing them would exhaust memory",
        "do not trust this file; no model needs so many",
    ),
    "E-JSON-SURROGATE": (FormatError, "a text escapes half a surrogate pair", "write UTF-8"),
    "E-JSON-OBJECT": (FormatError, "the outermost value is no object", "give the right file"),
}
_FILES: Rows = {
    "E-FILE-MISSING": (StorageError, "no such file or directory", "check the name"),
    "E-FILE-OPEN": (StorageError, "the system does not open the file", "see the message"),
    "E-FILE-READ": (StorageError, "the system does not read the file", "check the disk"),
    "E-FILE-KIND": (
        FormatError,
        "a pipe, a device or a directory where a file belongs",
        "give a regular file",
    ),
    "E-FILE-LFS": (FormatError, "a Git LFS pointer, not the file itself", "run `git lfs pull`"),
    "E-FILE-HTML": (FormatError, "a web page, not the file itself", _AGAIN),
    "E-FILE-OTHER": (FormatError, "no safetensors file: GGUF, JSON or text", "see the message"),
    "E-FILE-LARGE": (FormatError, "a small file is larger than the limit", "is it the right file?"),
    "E-LINK-DANGLING": (StorageError, "a symbolic link leads to nothing", "mend the link"),
    "E-LINK-LOOP": (StorageError, "symbolic links lead in a circle", "mend the links"),
    "E-LINK-OUT": (
        PolicyError,
        "a symbolic link leads out of the model directory",
        "put the file itself there, or pass `--follow-links` if you trust every link in it",
    ),
    "E-REMOTE-CODE": (PolicyError, "the model needs code that comes with it", "see the message"),
    "E-HUB": (StorageError, "neither on this disk nor on the hub", "check the name"),
}
_PICKLE: Rows = {
    "E-PICKLE": (PolicyError, "a program (TorchScript), not weights", "save its state dict"),
    "E-PICKLE-ARCHIVE": (
        FormatError,
        "not a PyTorch file, or an archive that breaks a rule of its format",
        "download it again, or do not trust it",
    ),
    "E-PICKLE-REFUSED": (
        PolicyError,
        "a PyTorch file needs a class or function that weights do not need",
        "whoever made it can save the state dict alone",
    ),
    "E-PICKLE-UNFIT": (
        PolicyError,
        "a PyTorch file has a tensor that safetensors cannot hold",
        "whoever made it can save it as a plain tensor",
    ),
    "E-PICKLE-LIMIT": (
        PolicyError,
        "reading a PyTorch file would take more memory or disk than weights need",
        "it may be made to exhaust them; if you trust it, save the weights alone, in several files",
    ),
    "E-PICKLE-LOAD": (
        FormatError,
        "a PyTorch file is cut or damaged, or holds no tensors",
        _AGAIN,
    ),
    "E-PICKLE-SEVERAL": (
        PolicyError,
        "a PyTorch file holds several state dicts",
        "choose one with `--key NAME`",
    ),
    "E-KEY-NAME": (
        SettingError,
        "`--key` names a state dict that the file does not have",
        "see the message",
    ),
}
_INDEX: Rows = {
    "E-INDEX-MAP": (FormatError, "the index has no weight_map", "fetch the index again"),
    "E-INDEX-NAME": (
        FormatError,
        "the index names a shard by something else than a plain file name",
        "do not trust this model; fetch the index again",
    ),
    "E-SHARD-MISSING": (FormatError, "a shard is missing", "download the shard"),
    "E-SHARD-DUPLICATE": (FormatError, "a tensor is in two shards", _AGAIN),
    "E-SHARD-PART": (
        PolicyError,
        "`--weights` names one of several shards, which is only a part of the model",
        "leave out `--weights`",
    ),
}
_DIRECTORY: Rows = {
    "E-PARTS": (
        FormatError,
        "`modules.json` or `model_index.json` does not list the parts of a model",
        "download it again",
    ),
    "E-TWO-ANSWERS": (
        PolicyError,
        "two things in a directory claim to be its weights",
        "choose one with `--weights FILE`",
    ),
    "E-NO-WEIGHTS": (FormatError, "a directory has no weights", "is it a model's?"),
}
_PAIR: Rows = {
    "E-PAIR-TYPE": (MismatchError, "the models have other types", "give TUNED's own base"),
    "E-PAIR-SHAPE": (
        MismatchError,
        "a tensor has another shape in BASE",
        "`--keep-mismatched` keeps TUNED's, where a command has it",
    ),
    "E-PAIR-DTYPE": (
        MismatchError,
        "numbers on one side, codes or other integers on the other",
        "`--keep-mismatched` keeps TUNED's",
    ),
    "E-PAIR-COVERAGE": (
        MismatchError,
        "less than 95 % of TUNED's parameters have a counterpart in BASE",
        "pair names with `--map`; `--allow-partial` continues",
    ),
    "E-PAIR-NONE": (MismatchError, "no two tensors belong together", "`--strip-prefix`, `--map`"),
    "E-OVERFLOW": (
        NonFiniteError,
        "BASE has a number that TUNED's dtype cannot hold",
        "leave the tensor out with `--exclude`, or convert a model first",
    ),
    "E-OVERFLOW-DTYPE": (
        NonFiniteError,
        "finite numbers would become infinite in the dtype of `--dtype`",
        "choose a wider one, or pass `--allow-nonfinite`",
    ),
    "E-QUANTISED-CONFIG": (
        PolicyError,
        "config.json says that the weights are quantized, and a tensor may be of such a kind",
        "dequantize the model first",
    ),
    "E-QUANTISED-TENSOR": (
        PolicyError,
        "a tensor stores codes of quantized weights, or their scales",
        "dequantize the model first",
    ),
}
_OUTPUT: Rows = {
    "E-OUTPUT-EXISTS": (PolicyError, "the output exists", "`--overwrite` replaces it"),
    "E-OUTPUT-FOREIGN": (PolicyError, "what is there is no model, and stays", _ELSEWHERE),
    "E-OUTPUT-OVERLAP": (PolicyError, "it is an input or another output, or in one", _ELSEWHERE),
    "E-OUTPUT-FOLDER": (StorageError, "the folder to write to is missing or closed", _ELSEWHERE),
    "E-OUTPUT-OWNER": (PolicyError, "another user's folder is where it would be built", _ELSEWHERE),
    "E-OUTPUT-SPACE": (StorageError, "the disk has no room for the output", "make room"),
}
_PROOF: Rows = {
    "E-RECORD": (FormatError, "a record that wsurg did not write, or that was altered", _RECORD),
    "E-RECORD-MISSING": (StorageError, "there is no record, or it cannot be opened", _RECORD),
    "E-VERIFY": (GateError, "the output is not as its record says", "do not use it"),
    "E-VERIFY-KIND": (
        SettingError,
        "BASE and TUNED cannot prove this output: it was not selected from the two alone",
        "verify it without them, and prove each step by its own means",
    ),
    "E-VERIFY-INPUTS": (
        MismatchError,
        "BASE and TUNED are the other way round, or are others and do not do",
        "give those that the output was made from",
    ),
    "E-VERIFY-MASK": (
        MismatchError,
        "not a mask, or one of another output",
        "give the mask of this output",
    ),
    "E-REPLAY": (
        GateError,
        "other bytes came out than recorded, or the record tells otherwise",
        "`wsurg verify` tells whether the output is as recorded",
    ),
    "E-REPLAY-STEP": (
        PolicyError,
        "a step that cannot be done again, such as a training",
        "run that command itself again, and compare the SHA-256 in the two records",
    ),
    "E-REPLAY-VERSION": (PolicyError, "another version made the record", "install that version"),
    "E-REPLAY-NO-HASH": (
        PolicyError,
        "the record holds no hashes to tell the inputs by",
        "make the output without `--no-hash`",
    ),
    "E-REPLAY-INPUT": (
        SettingError,
        "`--input` names none of the record's inputs, or several",
        "give one by its number",
    ),
    "E-REPLAY-NOWHERE": (
        SettingError,
        "an input is not beside the output",
        "say where it is with `--input`",
    ),
    "E-REPLAY-OTHER": (
        MismatchError,
        "an input is not the one that the record names",
        "give the one that the output was made from",
    ),
    "E-REPLAY-COUNTS": (
        MismatchError,
        "the token counts, or the corpus, are not the recorded ones",
        "give those that the output was made with",
    ),
}
_GROUPS: Mapping[str, Rows] = {
    "Of each kind, where no rule below was broken": _KINDS,
    "safetensors headers": _HEADER,
    "JSON: headers, indexes, configurations": _JSON,
    "Files": _FILES,
    "Pickled checkpoints": _PICKLE,
    "Sharded models": _INDEX,
    "Model directories": _DIRECTORY,
    "Models that do not fit each other, or hold codes": _PAIR,
    "Adapters": ADAPTERS,
    "Data: sentences, questions, texts and counts": DATA,
    "Models to run, and what operators go by": MODELS,
    "Settings": SETTINGS,
    "Outputs": _OUTPUT,
    "Records: verify and replay": _PROOF,
}
_COMMAND_LINE = "The command line's own"

CODES: Mapping[str, Code] = {
    **{
        code: Code(kind, kind.exit_code, group, means, remedy)
        for group, rows in _GROUPS.items()
        for code, (kind, means, remedy) in rows.items()
    },
    "E-USAGE": Code(None, 2, _COMMAND_LINE, "no such command, option or value", "`--help`"),
    "E-INTERRUPTED": Code(
        None, 130, _COMMAND_LINE, "Ctrl-C; only what --resume keeps is left", "run again"
    ),
    "E-TERMINATED": Code(
        None, 143, _COMMAND_LINE, "SIGTERM; only what --resume keeps is left", "run again"
    ),
    "E-BUG": Code(None, 1, _COMMAND_LINE, "a bug of ours", "please report it, with the traceback"),
}
"""Every code there is."""
GENERAL = frozenset(_KINDS)
"""The codes of the kinds themselves."""
