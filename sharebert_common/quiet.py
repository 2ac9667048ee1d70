"""Keeps messages of libraries that a user can do nothing about away from the terminal."""

from __future__ import annotations

import logging
import sys
import warnings

NOISY_LOGGERS = ("torchao", "torch.utils._pytree")
"""Loggers that warn when torchao is imported, of extensions for another torch and of its own enums."""


def quiet_libraries() -> None:
    """Hide FutureWarnings and DeprecationWarnings (torch warns of DeepSpeed's collectives), and noisy loggers.

    The `sharebert` command and `python -m pretrain` call this, unless they are given `--debug`. Where the user chose
    warnings, with `python -W` or PYTHONWARNINGS, those choices stay.
    """
    if not sys.warnoptions:
        for category in (FutureWarning, DeprecationWarning, PendingDeprecationWarning):
            warnings.simplefilter("ignore", category)
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
