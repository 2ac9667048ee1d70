#!/usr/bin/env bash
# Both images use this, on any Debian or Ubuntu with python3 and python3-venv:
#   docker/install.sh SOURCE TARGET      install the project in SOURCE, with the versions of constraints.txt, into a
#                                        virtual environment at TARGET
set -euo pipefail
source=$1 target=$2
python3 -m venv "$target"
pip=("$target/bin/python" -m pip install --no-cache-dir --constraint "$source/constraints.txt")
"${pip[@]}" torch
"${pip[@]}" "$source[hf]"
"$target/bin/sharebert" --help > /dev/null
