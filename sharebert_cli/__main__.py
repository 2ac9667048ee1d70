"""`python -m sharebert_cli`: the `sharebert` command."""

import sys

from sharebert_cli import main
from sharebert_common.import_path import leave_working_directory

if __name__ == "__main__":
    leave_working_directory()
    sys.exit(main())
