"""Rules for what is asked of weightsurgery, and for data, models and estimates that it is given.

`error_codes` joins them with those for files, pairs of models, adapters and outputs.
"""

from __future__ import annotations

from collections.abc import Mapping

from weightsurgery.errors import (
    FormatError,
    MismatchError,
    PolicyError,
    SettingError,
    StorageError,
    SurgeryError,
)

Rows = Mapping[str, tuple[type[SurgeryError], str, str]]
"""Code to the exception that has it, what is wrong, and what to do."""

_LINE = "fix the line that the message names"
_AGAIN = "download the file again"
_MERGE = "merge the adapter with the library that made it"
_CONFIG = "fetch the adapter again; its configuration may be another's"
_OWN_BASE = "give the model that it was trained on"
_OTHER_MODEL = "give a model that was trained for this task"
_MODEL_FILES = "check config.json, and that your transformers knows the model type"
_MORE = "give more, or other, data"

SETTINGS: Rows = {
    "E-SETTING-UNKNOWN": (
        SettingError,
        "no command, setting or preset has this name",
        "the message names those that there are, or one that is like it",
    ),
    "E-SETTING-CONFLICT": (
        SettingError,
        "settings exclude each other, or one needs another",
        "leave one out, or give what it needs",
    ),
    "E-SETTINGS-FILE": (
        SettingError,
        "a value in wsurg.toml is of a wrong kind",
        "write what the message expects",
    ),
    "E-FREEZE-PART": (
        SettingError,
        "a freeze glob matches a part of what transformers loads as one parameter",
        "match all of its stored tensors, or none",
    ),
    "E-NO-MATCH": (
        SettingError,
        "a glob, a prefix or a name stands for nothing that may be changed",
        "`wsurg inspect` shows the names",
    ),
    "E-NAME-MAP": (
        SettingError,
        "the name map gives something that is no name",
        "give a name of BASE's for each of TUNED's",
    ),
    "E-EMBEDDING-NAME": (
        SettingError,
        "which tensor is the word embedding is not known, or it is no matrix",
        "name it with `--embedding`",
    ),
    "E-NOTHING-TO-DO": (
        SettingError,
        "nothing is given, or nothing is left, to work on",
        "give something, or leave less out",
    ),
    "E-GATE-CONDITION": (
        SettingError,
        "a condition that cannot be read, or with a metric that is none",
        "write, for example, `--fail-if 'relative_l2 > 0.1'`",
    ),
    "E-KEYWORDS": (SettingError, "no table of types and their words", "see `wsurg mismatch`"),
    "E-MEMORY-LIMIT": (
        SettingError,
        "one worker needs more memory than the limit",
        "raise `--max-memory`",
    ),
    "E-WEIGHTS-NAME": (
        SettingError,
        "`--weights` names no file of the model directory",
        "name one that is in it",
    ),
    "E-MODEL-FOLDER": (
        SettingError,
        "a single file where a model directory belongs",
        "give its folder, with config.json and the tokenizer",
    ),
    "E-OUTPUT-NAME": (
        SettingError,
        "the output's name does not fit what will be written",
        "give the ending that the message names, or a directory",
    ),
    "E-DEVICE": (SettingError, "the device is not available", "`--device cpu`"),
    "E-NOT-INSTALLED": (
        SettingError,
        "a package that this needs is not installed",
        "install it as the message says",
    ),
}
DATA: Rows = {
    "E-FILE-ENDING": (FormatError, "a file of another ending than is read here", "rename it"),
    "E-FILE-EMPTY": (FormatError, "no rows, no text or no counts", "is it the right file?"),
    "E-FILE-UTF8": (FormatError, "rows, counts or a text that are not UTF-8", "save it as UTF-8"),
    "E-TOML": (FormatError, "the file is not TOML", _LINE),
    "E-ROWS-COLUMNS": (
        FormatError,
        "a column, or a field of a line, is missing",
        "name the columns as the message says",
    ),
    "E-ROWS-LINE": (FormatError, "a line is not as its format wants it", _LINE),
    "E-ROWS-LABEL": (
        MismatchError,
        "the model has no such label",
        "write the model's numbers or names",
    ),
    "E-ROWS-LABEL-KIND": (
        MismatchError,
        "labels that are numbers may be label ids or label names",
        "choose one with `--label-kind`",
    ),
    "E-DATASET": (
        FormatError,
        "an unreadable Parquet file or Hugging Face dataset, or a dataset with several splits",
        "save it again, or give the directory of one split",
    ),
    "E-ROWS-ANSWER": (
        MismatchError,
        "an example has no token of an answer, so there is no loss",
        "shorten the prompt, or raise `--max-length`",
    ),
    "E-ROWS-FEW": (
        SettingError,
        "too few rows, or none of the kind that is needed",
        _MORE,
    ),
    "E-ROWS-ORIGIN": (
        MismatchError,
        "no row tells whose answer it has",
        "give the data that it was made from too",
    ),
    "E-ROWS-SWAPPED": (
        MismatchError,
        "every row belongs to the other of the two files",
        "are the files to erase and to recover with swapped?",
    ),
    "E-TEXT-LONG": (
        SettingError,
        "a prompt, or a trigger, is longer than the model or `--max-length` takes",
        "shorten it, or raise the limit",
    ),
    "E-COUNTS": (FormatError, "a token's count is no number, 0 or more", _LINE),
    "E-VOCABULARY": (
        MismatchError,
        "TUNED has no vocabulary, or none of its tokens has a count",
        "count the tokens as its tokenizer stores them",
    ),
    "E-DEMO-DATA": (
        StorageError,
        "the demo's data cannot be had, or are not the expected ones",
        "put the file there yourself",
    ),
}
MODELS: Rows = {
    "E-MODEL-TASK": (MismatchError, "a model of another task than is needed", _OTHER_MODEL),
    "E-MODEL-LOAD": (MismatchError, "transformers cannot load the model", _MODEL_FILES),
    "E-MODEL-WEIGHTS": (
        MismatchError,
        "a weight that the model needs is missing, of another shape, or changed in memory",
        _OTHER_MODEL,
    ),
    "E-TOKENIZER": (
        MismatchError,
        "no tokenizer beside the model that can be loaded",
        "put tokenizer.json and tokenizer_config.json there, or install sentencepiece and protobuf",
    ),
    "E-TOKENIZER-FILE": (FormatError, "tokenizer.json is none", "fetch it again"),
    "E-TOKENIZER-PADDING": (
        MismatchError,
        "no padding token, so that texts cannot share a batch",
        "put a pad_token_id into config.json",
    ),
    "E-CHAT-TEMPLATE": (
        MismatchError,
        "no chat template, or one that refuses the messages",
        "`--prompt-format raw`",
    ),
    "E-EMBEDDING": (
        MismatchError,
        "the word embedding cannot be edited",
        "give the base that TUNED was made from",
    ),
    "E-FISHER": (
        MismatchError,
        "no fisher, or one of another model",
        "make it from TUNED with `wsurg fisher`",
    ),
    "E-FISHER-VALUES": (
        MismatchError,
        "the fisher is zero everywhere, or negative, NaN or infinite somewhere",
        "make it again with `wsurg fisher`",
    ),
    "E-MASK": (MismatchError, "not a mask, or one of another model", "give a mask of this model"),
    "E-CHECKPOINT-FOLDER": (
        PolicyError,
        "the folder for checkpoints is another training's, or no training's",
        "give an empty folder",
    ),
    "E-CHECKPOINT-STORAGE": (
        StorageError,
        "a checkpoint of a training cannot be read or written",
        "check the disk",
    ),
    "E-DEMO-FOLDER": (
        PolicyError,
        "the folder holds the demo of another plan",
        "give another folder with `--out`, or remove this one",
    ),
}
ADAPTERS: Rows = {
    "E-ADAPTER-KIND": (PolicyError, "an adapter of another type than LORA", _MERGE),
    "E-ADAPTER-CONFIG": (FormatError, "a value in its configuration is of a wrong kind", _CONFIG),
    "E-ADAPTER-FIELD": (PolicyError, "a setting that is not supported here is set", _MERGE),
    "E-ADAPTER-PATTERN": (PolicyError, "a regular expression", "write out the modules' names"),
    "E-ADAPTER-RANK": (FormatError, "a rank below 1, or not that of the tensors", _CONFIG),
    "E-ADAPTER-ALPHA": (FormatError, "alpha is missing, or no finite number", _CONFIG),
    "E-ADAPTER-CONTRADICTION": (FormatError, "tensors deny what the configuration says", _CONFIG),
    "E-ADAPTER-FACTOR": (FormatError, "lora_A without lora_B, or lora_B without lora_A", _AGAIN),
    "E-ADAPTER-TENSOR": (FormatError, "a tensor that stands for nothing, or twice", _MERGE),
    "E-ADAPTER-DTYPE": (PolicyError, "a tensor that is not floating", _MERGE),
    "E-ADAPTER-EMPTY": (FormatError, "an adapter without tensors", _AGAIN),
    "E-ADAPTER-TARGET": (MismatchError, "BASE has nothing that it adapts, or not all", _OWN_BASE),
    "E-ADAPTER-SHAPE": (MismatchError, "BASE has what it adapts in another shape", _OWN_BASE),
    "E-ADAPTER-VOCABULARY": (
        MismatchError,
        "its vocabulary is larger than BASE's, and not all tensors of it are in the adapter",
        "give the resized base model as BASE",
    ),
    "E-ADAPTER-UNCLEAR": (PolicyError, "it is not clear which tensor it adapts", _MERGE),
    "E-ADAPTER-BASE": (
        PolicyError,
        "it names another base than BASE",
        "`--force-base`, if you know that they are one model",
    ),
    "E-ADAPTER-MODEL": (
        MismatchError,
        "a model where an adapter belongs",
        "give a folder with adapter_config.json and adapter_model.safetensors",
    ),
    "E-ADAPTER-PREFIX": (
        MismatchError,
        "its names fit BASE's by two prefixes alike",
        "give its tensors the names of BASE's",
    ),
    "E-ADAPTER-WEIGHT": (
        PolicyError,
        "it replaces or rescales a tensor, which cannot be weighed or taken back",
        "apply it with weight 1",
    ),
    "E-ADAPTER-DORA": (MismatchError, "a line of the matrix is zero: it has no direction", _MERGE),
    "E-EXTRACT-NOTHING": (
        MismatchError,
        "nothing moved from BASE to TUNED that an adapter could hold",
        "are BASE and TUNED the right way round, and two?",
    ),
    "E-TIED-HEAD": (
        PolicyError,
        "the word embedding or the output head would change alone, and BASE ties the two",
        "`--untie` stores the head on its own",
    ),
    "E-TIED-UNCLEAR": (
        PolicyError,
        "it is not clear which tensors BASE ties, or where its head would be stored",
        "say in config.json if they are not tied: `tie_word_embeddings` false",
    ),
    "E-TIED-TOKENS": (
        PolicyError,
        "trained tokens of a tied embedding, beside another change of it or of the head",
        _MERGE,
    ),
    "E-TIED-SHARED": (
        PolicyError,
        "the adapter changes one of several modules that use one tensor",
        "keep using it unmerged, or leave the module out of the adapter",
    ),
    "E-TIED-NONE": (MismatchError, "there is nothing to untie", "leave out `--untie`"),
}
