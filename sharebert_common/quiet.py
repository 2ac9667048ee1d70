"""Keeps messages of libraries that a user can do nothing about away from the terminal."""

from __future__ import annotations

import logging
import os
import sys
import warnings

NOISY_LOGGERS = ("torchao", "torch.utils._pytree")
"""Loggers that warn when torchao is imported, of extensions for another torch and of its own enums."""

TRANSFORMERS = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
"""Variables that transformers reads when it is imported: no report of unused weights, no bar for a local file."""


def quiet_libraries() -> None:
    """Hide FutureWarnings and DeprecationWarnings (torch warns of DeepSpeed's collectives), and noisy libraries.

    The `sharebert` command and `python -m pretrain` call this, unless they are given `--debug`. Where the user chose
    warnings, with `python -W`, PYTHONWARNINGS or the variables of transformers, those choices stay.
    """
    if not sys.warnoptions:
        for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
            warnings.simplefilter("ignore", category)
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    for variable, value in TRANSFORMERS.items():
        os.environ.setdefault(variable, value)
