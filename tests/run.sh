#!/usr/bin/env bash
# Set up .venv and run the tests: bash tests/run.sh [pytest arguments]. Can be run again at any time.
# Two files of tests run at a time; with -n 0, one test after another in one process.
# bash tests/run.sh --lowest [pytest arguments]: the same with the oldest versions that requirements.txt allows, in .venv-lowest.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=.venv bounds=s/x/x/
if [ "${1:-}" = --lowest ]; then shift; venv=.venv-lowest bounds='s/>=/==/'; fi
python=${PYTHON:-python3}
[ -x $venv/bin/python ] || "$python" -m venv $venv
$venv/bin/python -m pip install --quiet -r <(sed "$bounds" requirements.txt) -r data/requirements.txt -r tests/requirements.txt
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec $venv/bin/python -m pytest tests -q -n 2 --dist loadfile "$@"
