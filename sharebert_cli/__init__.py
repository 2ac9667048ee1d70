"""The `sharebert` command: `parser` parses its arguments, and `verbs` calls one function of a stage for each verb.

Bad input is one line and exit code 2; `--debug` adds the traceback.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence

from sharebert_cli.parser import add_keys_to_help, build_parser
from sharebert_common.errors import BAD_INPUT, FAILED, CommandError
from sharebert_common.quiet import quiet_libraries

__all__ = ["build_parser", "main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb; its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = build_parser()
    if not arguments:
        parser.print_help()
        return BAD_INPUT
    if arguments and {"-h", "--help"} & set(arguments[1:]):
        add_keys_to_help(parser, arguments[0])
    given, later = parser.parse_known_args(arguments)
    if later and (not hasattr(given, "words_are") or any(word.startswith("-") for word in later)):
        parser.error(f"unrecognized arguments: {' '.join(later)}")
    if later:  # argparse takes words only up to the first option
        getattr(given, given.words_are).extend(later)
    if not given.debug:
        quiet_libraries()
    try:
        return int(given.verb(given))
    except Exception as error:
        code = _exit_code(error)
        if given.debug or code == FAILED:
            traceback.print_exc()
        print(f"sharebert: {error}", file=sys.stderr)
        return code


def _exit_code(error: Exception) -> int:
    """The exit code for an error."""
    if isinstance(error, CommandError):
        return error.exit_code
    model = sys.modules.get("sharebert")  # where it was not imported, it raised nothing
    return BAD_INPUT if model is not None and isinstance(error, model.ShareBertError) else FAILED
