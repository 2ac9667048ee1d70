#!/usr/bin/env bash
# What both images install, on any Debian or Ubuntu with python3 and its venv:
#   docker/install.sh SOURCE TARGET      the project in SOURCE, with what constraints.txt pins, into a venv at TARGET
set -euo pipefail
source=$1 target=$2
python3 -m venv "$target"
pip=("$target/bin/python" -m pip install --no-cache-dir --constraint "$source/constraints.txt")
"${pip[@]}" torch
"${pip[@]}" "$source[hf]"
"$target/bin/sharebert" --help > /dev/null
