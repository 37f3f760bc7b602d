#!/usr/bin/env bash
# Compare the papers' methods in miniature, on the demo's icons, with several seeds. data/demo.sh comes first.
#
#   bash data/replicate.sh --list                       print all rows, with the results so far
#   bash data/replicate.sh clip laclip                  run two rows, with all their seeds
#   bash data/replicate.sh --model FOLDER --seeds 0     run all rows with another LLM, one seed each
#
# A row is a file of captions and the flags of train_clip.py. Its models are evaluated on the held-out teams.
# All rows train for the same number of steps with the same batch size. Two runs go side by side, one thread
# each. Another launch skips what is done and continues the rest: give another LLM another folder (OUT=DIR,
# default: out/replicate). The results go to data/replication.jsonl; `python -m data.demo.replication` prints
# their table and writes the page.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-out/replicate} model=Qwen/Qwen2.5-0.5B-Instruct steps=1200

die() {
  echo "replicate.sh: error: $1" >&2
  exit 2
}

# --- the rows -----------------------------------------------------------------------------------------------
laclip="--text alt=2 rewrite_wording rewrite_scene"
veclip="--text alt=0.5 vecap=0.5"
wide="--model ViT-S/16 --image-size 64"
rows="clip laclip laclip-mt laclip-unfiltered laclip-1 laclip-scene
  laclip-shots-0 laclip-shots-1 laclip-shots-3 laclip-small-llm
  oracle oracle-alone slip laslip eda clip-2x laclip-2x clip-4x laclip-4x clip-wide laclip-wide
  clip-noisy laclip-noisy vec-only vecap-only veclip veclip-vec
  veclip-25-75 veclip-75-25 veclip-cut veclip-join alt-random alt-first alt-best
  clip-quarter veclip-quarter clip-half laclip-half clip-eighth laclip-eighth"
row() { # row NAME: sets $captions, $seeds and $flags (of train_clip.py)
  seeds="0 1 2"
  case $1 in
    # LaCLIP: AltText = the clean name. A training step samples the name or a rewrite of it
    clip)              captions=clean seeds="0 1 2 3 4" flags="--text alt" ;;
    laclip)            captions=filtered seeds="0 1 2 3 4" flags=$laclip ;;
    laclip-mt)         captions=filtered seeds="0 1 2 3 4" flags="$laclip --loss multitext" ;;
    laclip-unfiltered) captions=rewritten flags=$laclip ;;                             # as in the paper
    laclip-1)          captions=filtered flags="--text alt rewrite_wording" ;;         # one rewrite
    laclip-scene)      captions=filtered flags="--text alt rewrite_scene" ;;           # the other source
    laclip-shots-?)    captions=filtered_shots_${1#laclip-shots-} flags=$laclip ;;     # the others: 8 shots
    laclip-small-llm)  captions=filtered_small flags=$laclip ;;                        # the demo's SmolLM2
    oracle)            captions=oracle flags="--text alt rewrite_alias" ;;             # perfect rewrites
    oracle-alone)      captions=oracle flags="--text alt=0 rewrite_alias" ;;
    slip)              captions=clean flags="--text alt --ssl" ;;
    laslip)            captions=filtered flags="$laclip --ssl" ;;
    eda)               captions=eda flags="--text alt rewrite_eda_1 rewrite_eda_2" ;;  # WORDNET=its folder
    clip-?x)           captions=clean flags="--text alt --steps $((${1:5:1} * steps))" ;;
    laclip-?x)         captions=filtered flags="$laclip --steps $((${1:7:1} * steps))" ;;
    clip-wide)         captions=clean flags="--text alt $wide" ;;                      # 21 M, not 1 M
    laclip-wide)       captions=filtered flags="$laclip $wide" ;;
    # VeCLIP: AltText as the web has it, about half of it useless
    clip-noisy)        captions=noisy seeds="0 1 2 3 4" flags="--text alt" ;;
    laclip-noisy)      captions=noisy_rewritten flags="--text alt rewrite_wording" ;;
    vec-only)          captions=fused flags="--text vec" ;;
    vecap-only)        captions=fused flags="--text vecap" ;;
    veclip)            captions=fused seeds="0 1 2 3 4" flags=$veclip ;;
    veclip-vec)        captions=fused flags="--text alt=0.5 vec=0.5" ;;                # not fused
    veclip-25-75)      captions=fused flags="--text alt=0.25 vecap=0.75" ;;
    veclip-75-25)      captions=fused flags="--text alt=0.75 vecap=0.25" ;;
    veclip-cut)        captions=fused flags="$veclip --context-length 6" ;;            # about four words
    veclip-join)       captions="fused captioner" flags=$veclip ;;                     # like VeCap + DFN
    # three AltTexts each
    alt-random)        captions=several_scored flags="--text alt" ;;
    alt-first)         captions=several_scored flags="--text alt_first" ;;
    alt-best)          captions=several_scored flags="--text alt_best" ;;
    clip-quarter)      captions=noisy_quarter flags="--text alt" ;;                    # a quarter useless
    veclip-quarter)    captions=fused_quarter flags=$veclip ;;
    # less data
    clip-half|clip-eighth)     captions=clean_${1#clip-} flags="--text alt" ;;
    laclip-half|laclip-eighth) captions=filtered_${1#laclip-} flags=$laclip ;;
    *) die "$1: no such row; --list lists them" ;;
  esac
}

# --- captions: the stages of README make each file once -----------------------------------------------------
make_captions() { # make_captions NAME: makes $out/NAME.jsonl, and first the files that it needs
  local file=$out/$1.jsonl llm=$model shots=8 source
  case $1 in *_shots_?) shots=${1##*_} ;; *_small) llm=out/demo/smollm2 ;; esac
  local rewrite="--sources wording scene --pairs data/demo/rewrite_pairs.jsonl --shots $shots
    --temperature 0.7 --max-new-tokens 20 --batch-size 256 --model $llm"
  [ -f "$file" ] && return
  echo "=== $file"
  case $1 in
    *_half)
      make_captions ${1%_half}
      awk 'NR % 2 == 0' $out/${1%_half}.jsonl > "$file" ;;
    *_eighth)
      make_captions ${1%_eighth}
      awk 'NR % 8 == 0' $out/${1%_eighth}.jsonl > "$file" ;;
    names_made*)
      python rewrite_llama.py --input $out/names.jsonl --output "$file" $rewrite ;;
    rewritten*) # every name is rewritten once, for all its rows
      source=names_made${1#rewritten}
      make_captions $source
      python -m data.demo.icons spread $out/$source.jsonl $out/clean.jsonl "$file" ;;
    filtered*)
      source=rewritten${1#filtered}
      make_captions $source
      python -m data.filter_captions $out/$source.jsonl "$file" --pairs data/demo/rewrite_pairs.jsonl ;;
    noisy_rewritten)
      python rewrite_llama.py --input $out/noisy.jsonl --output "$file" ${rewrite/ scene} ;;
    several_scored)
      make_captioner
      python -m data.clip_scores --checkpoint $out/tower/checkpoint.pt --captions $out/several.jsonl \
        --image-root $out/images --output "$file" --best-field alt_best --workers 0 ;;
    eda)
      python -m data.baselines eda $out/clean.jsonl "$file" --n 2 \
        --wordnet "${WORDNET:-/usr/share/wordnet}" ;;
    vec|vec_quarter)
      make_captioner
      python caption_llava.py --input $out/noisy${1#vec}.jsonl --output "$file" --image-root $out/images \
        --model $out/llava --max-new-tokens 12 --workers 1 --batch-size 256
      python -m data.demo.collect share "$file" ;;
    fused|fused_quarter)
      source=vec${1#fused}
      make_captions $source
      python fuse_vicuna.py --input $out/$source.jsonl --output "$file" --model "$model" --format pairs \
        --pairs data/demo/fuse_pairs.jsonl --max-new-tokens 20 --batch-size 256 ;;
  esac
}
make_captioner() { # a LLaVA that learns from other teams' icons and clean names
  [ -d $out/llava ] && return
  python -m data.make_tokenizer $out/captioner.jsonl $out/captioner_tokenizer.json
  $train --tokenizer $out/captioner_tokenizer.json --captions $out/captioner.jsonl --text alt --out $out/tower
  python -m data.demo.make_llava $out/tower/checkpoint.pt $out/captioner.jsonl $out/llava \
    --image-root $out/images --steps 2000
}

# --- one run: train, evaluate, store the result -------------------------------------------------------------
run() { # run ROW SEED
  row "$1"
  local run=$out/runs/$1-$2
  [ -f "$run/eval.json" ] && return
  $train --tokenizer $out/tokenizer.json $flags --captions $(printf "$out/%s.jsonl " $captions) \
    --seed "$2" --out "$run"
  python -m data.demo.replication finished "$run"
  python eval_zeroshot.py --checkpoint "$run/checkpoint.pt" --image-root $out/images --label label \
    --templates data/demo/templates.txt --dataset jsonl:$out/heldout.jsonl jsonl:$out/heldout_never.jsonl \
    jsonl:$out/heldout_alias.jsonl jsonl:$out/validation.jsonl --workers 0 --json "$run/eval.json"
  python -m data.demo.replication add "$1" "$run" --llm "$(basename "$model")"  # a run with eval.json is done
}

# --- the command line ---------------------------------------------------------------------------------------
one= list= only_seeds=
while [[ ${1:-} == --* ]]; do
  case $1 in
    --model) model=$2; shift 2 ;;
    --seeds) only_seeds=$2; shift 2 ;;
    --list)  list=1; shift ;;
    --one)   one=1; shift ;;
    *) die "$1: expected --model NAME_OR_FOLDER, --seeds \"0 1\" or --list, and rows" ;;
  esac
done
[ -x .venv/bin/python ] || die "run data/demo.sh first: it installs the packages and fetches the icons"
. .venv/bin/activate
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false
train="python train_clip.py --image-root $out/images --model nano --augment drawing --batch-size 256
  --steps $steps --warmup 50 --lr 7e-4 --wd 0.1 --workers 0 --save-every 400"
[ -z "$one" ] || { run "$@"; exit; }
for name in "${@:-}"; do [ -z "$name" ] || row "$name"; done
[ -z "$list" ] || { python -m data.demo.replication; exit; }

jobs=$(for name in ${@:-$rows}; do
  row "$name"
  for seed in ${only_seeds:-$seeds}; do
    [ -f $out/runs/$name-$seed/eval.json ] || echo "$name $seed"
  done
done)
runs=$(echo "$jobs" | grep -c . || true)
echo "$runs runs of $steps steps, two at a time: about $((runs * 5 / 2 + 1)) minutes on two quiet cores." \
  "The captions come first, once: about 20 minutes for an LLM of 0.5 B and 20 for the captioner."
mkdir -p $out/runs
[ -e $out/packages ] || ln -s "$PWD/out/demo/packages" $out/packages
[ -f $out/heldout.jsonl ] || python -m data.demo.icons draw $out
[ -f $out/tokenizer.json ] || python -m data.make_tokenizer $out/clean.jsonl $out/tokenizer.json
OMP_NUM_THREADS=$(nproc)  # captions are made by one process at a time, runs go two at a time
for name in ${@:-$rows}; do
  row "$name"
  for file in $captions; do make_captions "$file"; done
done
OMP_NUM_THREADS=1
[ -z "$jobs" ] || echo "$jobs" | xargs -P 2 -L 1 bash data/replicate.sh --model "$model" --one
python -m data.demo.replication
