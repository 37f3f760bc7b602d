#!/usr/bin/env bash
# The papers' methods and their controls in miniature, with seeds: bash data/replicate.sh [--list] [ROW ...]
# `bash data/replicate.sh --help` tells all. data/demo.sh comes first: it installs, fetches the icons and converts SmolLM2.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] || { echo "replicate.sh: error: run data/demo.sh first" >&2; exit 2; }
. .venv/bin/activate
export OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false
exec python -m data.demo.replication "$@"
