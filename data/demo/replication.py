"""The papers' methods, and the controls that a reviewer asks for, on the demo's scenes.

    bash data/replicate.sh                            # README's table: 7 rows, five seeds each
    bash data/replicate.sh laclip-filtered slip       # other rows
    bash data/replicate.sh --list                     # all rows with results, settings and commits

A row is a file of captions and the flags of train_clip.py. Two runs go side by side, one thread
each; what is done is skipped. Results go to OUT/replication.jsonl, a line per run: another LLM
needs another OUT. data/replication.jsonl has those that README and --list show.

data/demo/README.md says what is scored. A gain is the mean difference from the group's first row
between runs of one seed, with its standard error.
"""
import concurrent.futures
import contextlib
import io
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
from importlib.metadata import version

from data.common import die, new_parser

COMMITTED = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
                         "replication.jsonl")
TEAMS = ("phosphor", "lucide")  # held out
COLUMNS = {"alt": "training wording", "other_forms": "other forms", "synonyms": "synonyms",
           "photo": "a photo of a ..."}
CHANCE = {"alt": 0.4, "other_forms": 0.4, "synonyms": 0.4, "photo": 8.3}  # 240 scenes, 24 objects
RECIPE = ("--model nano-conv --augment drawing --batch-size 128 --steps 500 --warmup 50 --lr 5e-4 "
          "--wd 0.1 --workers 0 --save-every 250")
LACLIP = "--text alt rewrite_sentence rewrite_reverse rewrite_detail"
VECLIP = "--text alt=0.5 vecap=0.5"
README_ROWS = ("clip", "laclip", "eda", "noise", "clip-noisy", "veclip", "clip-and-clean")
# group: {row: (title, files of captions that make() makes, flags of train_clip.py, the paper)}
GROUPS = {
    "LaCLIP: clean captions": {
        "clip": ("CLIP", "clean", "--text alt", "ImageNet 40.2 (CC12M)"),
        "laclip": ("LaCLIP, three sources", "rewritten", LACLIP, "48.4, four sources"),
        "laclip-mt": ("LaCLIP-MT", "rewritten", f"{LACLIP} --loss multitext", "49.0"),
        "eda": ("EDA, three texts", "eda",
                "--text alt rewrite_eda_1 rewrite_eda_2 rewrite_eda_3", "far less than LaCLIP"),
        "noise": ("random words and swaps", "noise", "--text alt rewrite_noise=3", ""),
        "laclip-filtered": ("LaCLIP, filtered", "filtered", LACLIP, ""),
        "laclip-1": ("one source", "rewritten", "--text alt rewrite_sentence", "less than four"),
        "laclip-4": ("four sources", "rewritten_four", f"{LACLIP} rewrite_words", "48.4"),
        "laclip-words": ("a source of synonyms", "rewritten_words", "--text alt rewrite_words", ""),
        "laclip-words-qwen": ("the same by Qwen2.5-0.5B", "rewritten_words_qwen",
                              "--text alt rewrite_words", ""),
        "laclip-shots-1": ("one pair in the prompt", "rewritten_shots_1", LACLIP, ""),
        "laclip-shots-8": ("eight pairs", "rewritten_shots_8", LACLIP, "three in the paper"),
        "slip": ("SLIP", "clean", "--text alt --ssl", ""),
        "laslip": ("LaSLIP", "rewritten", f"{LACLIP} --ssl", "gains as LaCLIP does"),
        "clip-minilm": ("CLIP, pre-trained text tower", "clean", "--text alt --minilm", ""),
        "oracle": ("oracle: other forms, synonyms", "oracle", "--text alt rewrite_oracle=3", "")},
    "twice the steps": {
        "clip-2x": ("CLIP", "clean", "--text alt --steps 1000", ""),
        "laclip-2x": ("LaCLIP", "rewritten", f"{LACLIP} --steps 1000", "")},
    "half of the scenes": {
        "clip-half": ("CLIP", "clean_2", "--text alt", ""),
        "laclip-half": ("LaCLIP", "rewritten_2", LACLIP, "gains at every size")},
    "an eighth of the scenes": {
        "clip-eighth": ("CLIP", "clean_8", "--text alt", ""),
        "laclip-eighth": ("LaCLIP", "rewritten_8", LACLIP, "gains at every size")},
    "VeCLIP: half of the AltTexts useless": {
        "clip-noisy": ("CLIP, AltText", "noisy", "--text alt", "ImageNet 31.60 (12 M)"),
        "veclip": ("VeCLIP, AltText and VeCap", "fused", VECLIP, "38.11"),
        "clip-and-clean": ("CLIP, and the captioner's clean scenes", "noisy captioner",
                           "--text alt", ""),
        "vec-only": ("VeC alone", "fused", "--text vec", "below the mix"),
        "vecap-only": ("VeCap alone", "fused", "--text vecap", "below the mix"),
        "veclip-vec": ("AltText and VeC, not fused", "fused", "--text alt=0.5 vec=0.5", ""),
        "veclip-25-75": ("25 % AltText, 75 % VeCap", "fused", "--text alt=0.25 vecap=0.75", ""),
        "veclip-75-25": ("75 % AltText, 25 % VeCap", "fused", "--text alt=0.75 vecap=0.25", ""),
        "veclip-cut": ("VeCLIP, texts cut to 6 tokens", "fused", f"{VECLIP} --context-length 6",
                       ""),
        "clip-several": ("CLIP, three AltTexts an image", "several", "--text alt", ""),
        "clip-clean": ("clean captions", "noisy", "--text truth", "")},
}
ROWS = {row: texts for group in GROUPS.values() for row, texts in group.items()}


# === captions: the stages make each file once =====================================================

def run(command, log=None):
    """Run a command of the project; a failure ends this program."""
    print(f"$ {command}", flush=True)
    words = [sys.executable if word == "python" else word for word in shlex.split(command)]
    with open(log, "w") if log else contextlib.nullcontext() as f:
        status = subprocess.call(words, stdout=f, stderr=f)
    if status:
        sys.exit(f"status {status}: {command}" + (f"\n{log} says why" if log else ""))


def make(name, args):
    """Make a file of captions, and what it is made of, where they are missing. -> its path"""
    out, path = args.out, os.path.join(args.out, f"{name}.jsonl")
    if os.path.exists(path):
        return path
    kind, _, variant = name.partition("_")
    if variant in ("2", "8"):  # every second or eighth scene, since drawings repeat their order
        with open(make(kind, args)) as source, open(path + ".tmp", "w") as part:
            part.writelines(line for i, line in enumerate(source) if i % int(variant) == 0)
        os.replace(path + ".tmp", path)
    elif kind == "made":
        sources = {"words": "words", "words_qwen": "words", "four": "sentence reverse detail words"}
        run(f"python rewrite_llama.py --input {make('captions', args)} --output {path} "
            f"--model {args.larger_llm if 'qwen' in variant else args.llm} "
            f"--sources {sources.get(variant, 'sentence reverse detail')} "
            "--pairs data/demo/rewrite_pairs.jsonl --temperature 0.5 --max-new-tokens 24 "
            f"--batch-size 256 --shots {variant[-1] if 'shots' in variant else 3}")
    elif kind == "rewritten":
        made, clean = make(name.replace("rewritten", "made"), args), make("clean", args)
        run(f"python -m data.demo.scenes spread {made} {clean} {path}")
    elif kind == "filtered":
        run(f"python -m data.filter_captions {make('rewritten', args)} {path} "
            "--pairs data/demo/rewrite_pairs.jsonl")
    elif kind == "eda":
        run(f"python -m data.baselines eda {make('clean', args)} {path} --wordnet {args.wordnet}")
    elif kind == "fused":
        if not os.path.isdir(f"{out}/llava"):
            run(f"python -m data.demo.make_llava {make('captioner', args)} {out}/llava "
                f"--image-root {out}/images --steps 800")
        run(f"python caption_llava.py --input {make('noisy', args)} --output {out}/captioned.jsonl "
            f"--image-root {out}/images --model {out}/llava --max-new-tokens 12 --workers 0 "
            "--batch-size 256")
        run(f"torchrun --nproc_per_node {os.cpu_count()} fuse_vicuna.py --input "
            f"{out}/captioned.jsonl --output {path} --model {args.llm} --format pairs "
            "--pairs data/demo/fuse_pairs.jsonl --max-new-tokens 12 --batch-size 256")
    else:
        os.makedirs(out, exist_ok=True)
        if not os.path.exists(f"{out}/packages"):
            os.symlink(os.path.abspath("out/demo/packages"), f"{out}/packages")
        run(f"python -m data.demo.scenes draw {out}")
    return path


# === runs =========================================================================================

def train_and_measure(row, seed, args):
    """One run: train, evaluate, append the result."""
    _, files, flags, _ = ROWS[row]
    out, folder = args.out, os.path.join(args.out, "runs", f"{row}-{seed}")
    tokenizer = "--tokenizer out/demo/tokenizer.json" * ("--minilm" not in flags)
    flags = flags.replace("--minilm", f"--text-model {args.minilm}")
    os.makedirs(folder, exist_ok=True)
    captions = " ".join(f"{out}/{name}.jsonl" for name in files.split())
    run(f"python train_clip.py --captions {captions} --image-root {out}/images {tokenizer} "
        f"{RECIPE} {flags} --seed {seed} --out {folder}", f"{folder}/train.log")
    check_finished(folder)
    run(f"python -m data.demo.replication --out {out} --measure {folder}", f"{folder}/measure.log")
    with open(f"{folder}/measured.json") as f, open(f"{folder}/settings.json") as g:
        metrics, settings = json.load(f), json.load(g)
    llm = os.path.basename(args.larger_llm if "qwen" in row else args.llm)
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    result = {"row": row, "seed": seed, "llm": llm, "metrics": metrics,
              "settings": {name: settings[name] for name in ("text", "steps", "rows", "precision")},
              "flags": f"{RECIPE} {ROWS[row][2]}", "commit": head.stdout.strip(),
              "torch": version("torch"), "transformers": version("transformers")}
    with open(f"{out}/replication.jsonl", "a") as f:
        f.write(json.dumps(result) + "\n")


def check_finished(folder):
    """train_clip.py ends with status 0 after SIGTERM, too: such a run has no result yet."""
    with open(f"{folder}/settings.json") as f, open(f"{folder}/metrics.jsonl") as g:
        steps, done = json.load(f)["steps"], json.loads(g.readlines()[-1])["step"]
    if done < steps:
        sys.exit(f"{folder} stopped at step {done} of {steps}: the same command goes on")


def measure(folder, out):
    """Evaluate a run by the two evaluation scripts, as a user would, and write measured.json."""
    import eval_retrieval
    import eval_zeroshot
    path, metrics = os.path.join(folder, "part.json"), {}
    common = ["--checkpoint", f"{folder}/checkpoint.pt", "--image-root", f"{out}/images",
              "--workers", "0", "--json", path]

    def evaluate(main, *arguments):
        with open(os.devnull, "w") as unseen, contextlib.redirect_stdout(unseen):
            main([*common, *arguments])
        with open(path) as f:
            return json.load(f)

    for team in ("validation", *TEAMS):
        metrics[team] = {}
        for field in ("alt", "other_forms", "synonyms"):
            found = evaluate(eval_retrieval.main, "--captions", f"{out}/{team}.jsonl", "--field",
                             field)
            metrics[team][field] = {name: round(found[name], 5) for name in
                                    ("i2t_r1", "i2t_r5", "t2i_r1", "t2i_r5")}
        sets = evaluate(eval_zeroshot.main, "--dataset", f"jsonl:{out}/{team}_objects.jsonl",
                        "--templates", "data/demo/templates.txt")
        (found,) = sets.values()  # every image stands there twice, once for either object
        metrics[team]["photo"] = {"top1": round(2 * found["top1"], 5)}
    with open(os.path.join(folder, "measured.json"), "w") as f:
        json.dump(metrics, f)


# === tables =======================================================================================

def scores_of(metrics):
    """What `measure` found -> {column: percent}, the mean over the held-out teams"""
    scores = {}
    for column in COLUMNS:
        names = ["top1"] if column == "photo" else ["i2t_r1", "t2i_r1"]
        scores[column] = 100 * statistics.mean(metrics[team][column][name]
                                               for team in TEAMS for name in names)
    return scores


def read_results(path=COMMITTED):
    """-> {row: {seed: {column: percent}}}, {row: the commits of its runs}"""
    results, commits = {}, {}
    with open(path) if os.path.exists(path) else io.StringIO() as f:
        for line in map(json.loads, f):
            results.setdefault(line["row"], {})[line["seed"]] = scores_of(line["metrics"])
            commits.setdefault(line["row"], set()).add(line["commit"])
    return results, commits


def cell(values, sign=""):
    """"mean ± standard error"; one value has no error. sign="+" shows the sign of the mean."""
    mean = f"{statistics.mean(values):{sign}.1f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values) / math.sqrt(len(values)):.1f}"


def table(results, names=None):
    """-> Markdown lines: every row, or those in `names`, and its gain over the group's first row"""
    empty = " |" * len(COLUMNS)
    lines = [f"| | seeds | {' | '.join(COLUMNS.values())} | the paper |",
             "|---|--:|" + "--:|" * len(COLUMNS) + "---|",
             f"| chance | | {' | '.join(str(CHANCE[column]) for column in COLUMNS)} | |"]
    for group, rows in GROUPS.items():
        rows = {row: texts for row, texts in rows.items() if names is None or row in names}
        lines += [f"| **{group}** | |{empty} |"] if rows else []
        for row, (title, _, _, paper) in rows.items():
            runs, baseline = results.get(row, {}), results.get(next(iter(rows)), {})
            if not runs:
                lines.append(f"| {title} | not run |{empty} {paper} |")
                continue
            scores = " | ".join(cell([run[c] for run in runs.values()]) for c in COLUMNS)
            lines.append(f"| {title} | {len(runs)} | {scores} | {paper} |")
            pairs = [(runs[seed], baseline[seed]) for seed in runs if seed in baseline]
            if runs is not baseline and pairs:
                gains = " | ".join(cell([new[c] - old[c] for new, old in pairs], "+")
                                   for c in COLUMNS)
                lines.append(f"| *gain* | {len(pairs)} | {gains} | |")
    return lines


def main(argv=None):
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("rows", nargs="*", metavar="ROW", help="default: those of README's table")
    add("--seeds", help='such as "0 1" (default: five for README\'s rows, three for the others)')
    add("--llm", default="out/demo/smollm2", help="rewrites and fuses (default: %(default)s)")
    add("--larger-llm", default="Qwen/Qwen2.5-0.5B-Instruct", help="of laclip-words-qwen")
    add("--minilm", default="sentence-transformers/all-MiniLM-L6-v2", help="of clip-minilm")
    add("--wordnet", default="/usr/share/wordnet", help="for eda (Debian: wordnet-base)")
    add("--out", default="out/replicate", help="default: %(default)s")
    add("--list", action="store_true", help="print all rows and stop")
    add("--measure", metavar="RUN", help="evaluate one run and stop")
    args = parser.parse_args(argv)
    if args.measure:
        return measure(args.measure, args.out)
    if unknown := set(args.rows) - set(ROWS):
        die(f"{' '.join(sorted(unknown))}: no such row; --list lists them")
    results, commits = read_results(COMMITTED if args.list else f"{args.out}/replication.jsonl")
    if args.list:
        print("\n".join(table(results)), "\n")
        for row, (_, files, flags, _) in ROWS.items():
            print(f"{row}: {files}, {flags}", *sorted(commits.get(row, [])))
        return
    jobs = []
    for row in args.rows or README_ROWS:
        seeds = args.seeds.split() if args.seeds else range(5 if row in README_ROWS else 3)
        jobs += [(row, int(seed)) for seed in seeds if int(seed) not in results.get(row, {})]
    for row in dict.fromkeys(row for row, _ in jobs):
        for name in ROWS[row][1].split():
            make(name, args)
    print(f"{len(jobs)} runs, two at a time: about {1.5 * len(jobs):.0f} minutes on two cores")
    os.environ["OMP_NUM_THREADS"] = "1"
    jobs.sort(key=lambda job: job[1])  # seed by seed, so that an early end leaves comparisons
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(train_and_measure, *job, args) for job in jobs]
        concurrent.futures.wait(runs, return_when=concurrent.futures.FIRST_EXCEPTION)
        pool.shutdown(cancel_futures=True)
    for done in runs:
        done.result()  # raises what ended a run
    names = args.rows or README_ROWS
    print("\n".join(table(read_results(f"{args.out}/replication.jsonl")[0], names)))


if __name__ == "__main__":
    main()
