"""The ground floor. It imports no other package of this project.

errors       the base class of errors that end a command, and all exit codes
encodings    the text of UTF-8 bytes, and a clear line for others
files        files that are whole or absent, and checksums
recipe       YAML recipes and `key=value` overrides become checked dataclasses
key_types    what the type of a recipe's key says about a value
remote_files files and URLs of every kind, opened and retried
run_files    state.json and log.jsonl of a run: read and written here alone
gpus         a worker that was promised a GPU does not compute on a CPU
processes    stop signals, and what happens to a process whose parent dies
import_path  where Python finds the packages of this project
quiet        hides messages of libraries
inference_tokenizer  corrects a tokenizer so that it gives what a training row holds
progress     a progress bar on a terminal
counter_rng  random numbers as a pure function of a key and a counter
"""
