#!/usr/bin/env bash
# Both papers' comparisons in miniature, on the icons of the demo: bash data/replicate.sh [--model NAME_OR_FOLDER] [--seeds "0 1"] [ROW ...]
#
#   bash data/replicate.sh --list                       the rows, what each costs, and which have results
#   bash data/replicate.sh clip laclip                  two rows, with all their seeds
#   bash data/replicate.sh --model FOLDER --seeds 0     every row that can run here, one seed, with another language model
#
# A row is: captions + flags of train_clip.py + the evaluations on the held-out teams. Every row takes the same steps of the same
# batch. Two runs go side by side, one thread each. Run it again and it goes on where it was; what is done is skipped. Results are
# appended to data/replication.jsonl; `python -m data.demo.replication` prints the table and writes the page.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-out/replicate} model=Qwen/Qwen2.5-0.5B-Instruct steps=1200

# --- the rows: NAME) captions, number of seeds, flags of train_clip.py -------------------------------------------------------------
laclip="--text alt=2 rewrite_wording rewrite_scene"
rows="clip laclip laclip-mt laclip-unfiltered laclip-1 laclip-scene laclip-shots-0 laclip-shots-1 laclip-shots-3 laclip-small-llm
  oracle oracle-alone slip laslip eda clip-2x laclip-2x clip-wide laclip-wide
  clip-noisy laclip-noisy vec-only vecap-only veclip veclip-vec veclip-25-75 veclip-75-25 veclip-cut veclip-join
  alt-random alt-first alt-best clip-quarter veclip-quarter clip-half laclip-half clip-eighth laclip-eighth"
row() { # row NAME: sets $captions, $seeds and $flags
  seeds="0 1 2"
  case $1 in
    # LaCLIP: AltText = the clean name; drawn text = the name or a rewrite of it
    clip)              captions=clean seeds="0 1 2 3 4" flags="--text alt" ;;
    laclip)            captions=filtered seeds="0 1 2 3 4" flags=$laclip ;;
    laclip-mt)         captions=filtered seeds="0 1 2 3 4" flags="$laclip --loss multitext" ;;
    laclip-unfiltered) captions=rewritten flags=$laclip ;;                                      # as the paper: no filter
    laclip-1)          captions=filtered flags="--text alt rewrite_wording" ;;                  # one rewrite
    laclip-scene)      captions=filtered flags="--text alt rewrite_scene" ;;                    # the other source alone
    laclip-shots-?)    captions=filtered_shots_${1#laclip-shots-} flags=$laclip ;;              # eight in the others
    laclip-small-llm)  captions=filtered_small flags=$laclip ;;                                 # SmolLM2-135M, the demo's
    oracle)            captions=oracle flags="--text alt rewrite_alias" ;;                      # what perfect rewriting would give
    oracle-alone)      captions=oracle flags="--text alt=0 rewrite_alias" ;;
    slip)              captions=clean flags="--text alt --ssl" ;;
    laslip)            captions=filtered flags="$laclip --ssl" ;;
    eda)               captions=eda flags="--text alt rewrite_eda_1 rewrite_eda_2" ;;           # needs a WordNet folder: WORDNET=DIR
    clip-2x)           captions=clean flags="--text alt --steps $((2 * steps))" ;;
    laclip-2x)         captions=filtered flags="$laclip --steps $((2 * steps))" ;;
    clip-wide)         captions=clean flags="--text alt --model ViT-S/16 --image-size 64" ;;    # 21 M instead of 1
    laclip-wide)       captions=filtered flags="$laclip --model ViT-S/16 --image-size 64" ;;
    # VeCLIP: AltText as the web has it, about half of it useless
    clip-noisy)        captions=noisy seeds="0 1 2 3 4" flags="--text alt" ;;
    laclip-noisy)      captions=noisy_rewritten flags="--text alt rewrite_wording" ;;
    vec-only)          captions=fused flags="--text vec" ;;
    vecap-only)        captions=fused flags="--text vecap" ;;
    veclip)            captions=fused seeds="0 1 2 3 4" flags="--text alt=0.5 vecap=0.5" ;;
    veclip-vec)        captions=fused flags="--text alt=0.5 vec=0.5" ;;                         # not fused
    veclip-25-75)      captions=fused flags="--text alt=0.25 vecap=0.75" ;;
    veclip-75-25)      captions=fused flags="--text alt=0.75 vecap=0.25" ;;
    veclip-cut)        captions=fused flags="--text alt=0.5 vecap=0.5 --context-length 6" ;;    # long texts cut to four words or so
    veclip-join)       captions="fused captioner" flags="--text alt=0.5 vecap=0.5" ;;           # VeCap + DFN: a clean set joined
    alt-random|alt-first|alt-best) captions=several_scored flags="--text alt --alt-choice ${1#alt-}" ;;   # three AltTexts an image
    clip-quarter)      captions=noisy_quarter flags="--text alt" ;;                             # a quarter useless
    veclip-quarter)    captions=fused_quarter flags="--text alt=0.5 vecap=0.5" ;;
    # less data
    clip-half|clip-eighth)     captions=clean_${1#clip-} flags="--text alt" ;;
    laclip-half|laclip-eighth) captions=filtered_${1#laclip-} flags=$laclip ;;
    *) echo "replicate.sh: error: $1: no such row; --list lists them" >&2; exit 2 ;;
  esac
}

# --- captions: each file is made once, by the stages of README -------------------------------------------------------------------
make_captions() { # make_captions NAME: out/replicate/NAME.jsonl
  local file=$out/$1.jsonl llm=$model shots=8
  case $1 in *_shots_?) shots=${1##*_} ;; *_small) llm=out/demo/smollm2 ;; esac
  local rewrite="--sources wording scene --pairs data/demo/rewrite_pairs.jsonl --shots $shots --temperature 0.7
    --max-new-tokens 20 --batch-size 256 --model $llm"
  [ -f "$file" ] && return
  echo "=== $file"
  case $1 in
    *_half)          make_captions ${1%_half}; awk 'NR % 2 == 0' $out/${1%_half}.jsonl > "$file" ;;
    *_eighth)        make_captions ${1%_eighth}; awk 'NR % 8 == 0' $out/${1%_eighth}.jsonl > "$file" ;;
    names_made*)     python rewrite_llama.py --input $out/names.jsonl --output "$file" $rewrite ;;   # every name once,
    rewritten*)      make_captions names_made${1#rewritten}                                               # then to all its rows
                     python -m data.demo.icons spread $out/names_made${1#rewritten}.jsonl $out/clean.jsonl "$file" ;;
    filtered*)       make_captions rewritten${1#filtered}; python -m data.filter_captions $out/rewritten${1#filtered}.jsonl "$file" ;;
    noisy_rewritten) python rewrite_llama.py --input $out/noisy.jsonl --output "$file" ${rewrite/ scene} ;;
    several_scored)  make_captioner; python -m data.clip_scores --checkpoint $out/tower/checkpoint.pt --captions $out/several.jsonl \
                       --image-root $out/images --output "$file" --workers 0 ;;
    eda)             python -m data.baselines eda $out/clean.jsonl "$file" --n 2 --wordnet "${WORDNET:-/usr/share/wordnet}" ;;
    vec|vec_quarter) make_captioner; python caption_llava.py --input $out/noisy${1#vec}.jsonl --output "$file" --image-root $out/images \
                       --model $out/llava --max-new-tokens 12 --workers 1 --batch-size 256
                     python -m data.demo.collect share "$file" ;;
    fused|fused_quarter) make_captions vec${1#fused}; python fuse_vicuna.py --input $out/vec${1#fused}.jsonl --output "$file" \
                       --model "$model" --format pairs --pairs data/demo/fuse_pairs.jsonl --max-new-tokens 20 --batch-size 256 ;;
  esac
}
make_captioner() { # a LLaVA that learned to speak from other teams' clean names
  [ -d $out/llava ] && return
  python -m data.make_tokenizer $out/captioner.jsonl $out/captioner_tokenizer.json
  $train --tokenizer $out/captioner_tokenizer.json --captions $out/captioner.jsonl --text alt --out $out/tower
  python -m data.demo.make_llava $out/tower/checkpoint.pt $out/captioner.jsonl $out/llava --image-root $out/images --steps 2000
}

# --- one run: train, evaluate, note ----------------------------------------------------------------------------------------------
run() { # run ROW SEED
  row "$1"
  local run=$out/runs/$1-$2
  [ -f "$run/eval.json" ] && return
  $train --tokenizer $out/tokenizer.json $flags --captions $(printf "$out/%s.jsonl " $captions) --seed "$2" --out "$run"
  python -m data.demo.replication finished "$run"
  python eval_zeroshot.py --checkpoint "$run/checkpoint.pt" --image-root $out/images --label label --templates data/demo/templates.txt \
    --dataset jsonl:$out/heldout.jsonl jsonl:$out/heldout_never.jsonl jsonl:$out/heldout_alias.jsonl jsonl:$out/validation.jsonl \
    --workers 0 --json "$run/eval.json"
  python -m data.demo.replication add "$1" "$run" --llm "$(basename "$model")"  # once: eval.json is there now
}

one= list= only=
while [[ ${1:-} == --* ]]; do
  case $1 in
    --model) model=$2; shift 2 ;;
    --seeds) only=$2; shift 2 ;;
    --list)  list=1; shift ;;
    --one)   one=1; shift ;;
    *) echo "replicate.sh: error: $1: expected --model NAME_OR_FOLDER, --seeds \"0 1\" or --list, and rows" >&2; exit 2 ;;
  esac
done
[ -x .venv/bin/python ] || { echo "replicate.sh: error: bash data/demo.sh comes first: it installs and fetches the icons" >&2; exit 2; }
. .venv/bin/activate
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false
train="python train_clip.py --image-root $out/images --model nano --augment drawing --batch-size 256 --steps $steps --warmup 50
  --lr 7e-4 --wd 0.1 --workers 0 --save-every 400 --resume auto"
[ -z "$one" ] || { run "$@"; exit; }
for name in "${@:-}"; do [ -z "$name" ] || row "$name"; done
[ -z "$list" ] || { python -m data.demo.replication; exit; }

jobs=$(for name in ${@:-$rows}; do row "$name"; for seed in ${only:-$seeds}; do [ -f $out/runs/$name-$seed/eval.json ] || echo "$name $seed"; done; done)
runs=$(echo "$jobs" | grep -c . || true)
echo "$runs runs of $steps steps, two at a time: about $((runs * 5 / 2 + 1)) minutes on two quiet cores, and the captions before them:" \
  "about 20 minutes for a language model of 0.5 B and 20 for the captioner, once"
mkdir -p $out/runs
[ -e $out/packages ] || ln -s "$PWD/out/demo/packages" $out/packages
[ -f $out/heldout.jsonl ] || python -m data.demo.icons draw $out
[ -f $out/tokenizer.json ] || python -m data.make_tokenizer $out/clean.jsonl $out/tokenizer.json
OMP_NUM_THREADS=$(nproc)
for name in ${@:-$rows}; do row "$name"; for file in $captions; do make_captions "$file"; done; done
OMP_NUM_THREADS=1
[ -z "$jobs" ] || echo "$jobs" | xargs -P 2 -L 1 bash data/replicate.sh --model "$model" --one
python -m data.demo.replication
