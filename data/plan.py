"""What a data set costs in each stage, from first principles: tokens, FLOPs, bytes, GPU-hours.

    python -m data.plan                            # CC3M, CC12M, 100 M and 300 M rows on A100s
    python -m data.plan --rows 12e6 --gpu H100 --mfu 0.35 --model ViT-L/14 --grad-checkpointing
    python -m data.plan --rows 12e6 --rate rewrite=65 caption=19 train=1200   # rows/s of one GPU
    python -m data.plan --rows 12e6 --rate rewrite=28300t    # or a server's output tokens/s

To measure a rate, run the stage on a few rows, `head -n 200 in.jsonl > few.jsonl`: divide them by
the seconds of its progress bar, for --rate. A rate that somebody measured on another model becomes
FLOP/s, so that it can be applied to this one. GPU-hours are then FLOPs / (FLOP/s). "Peak x MFU" is
the same with a data sheet's peak and an assumed share of it. tests/data/test_plan.py counts the
FLOPs with torch and the bytes in real files. The hours are an estimate.
"""
import json
from typing import NamedTuple

import torch

from data.common import check_output, die, in_one_line, new_parser, number, print_table
from train_clip import CLIP, PRESETS, Config

SOURCES = ["chatgpt", "bard", "coco", "human"]  # as in rewrite_llama.py
GROUP = 512  # captions that share a prompt there, at least about


# --- FLOPs: a matrix of n weights costs a token 2n, one multiplication and one addition a weight --

def transformer_flops(width, layers, tokens):
    """A CLIP tower's blocks for one sequence. Weights a block: 3 W^2 (qkv), W^2 (out), 8 W^2.
    Attention: q . k and the weighted sum of v cost 2 W each for every pair of tokens."""
    return layers * (2 * 12 * width ** 2 * tokens + 4 * width * tokens * tokens)


def image_flops(c):
    """Forward pass of one image: a convolution makes patches, the blocks see these and the class
    token, whose feature is projected."""
    patches = (c.image_size // c.patch_size) ** 2
    return (2 * 3 * c.patch_size ** 2 * c.vision_width * patches + 2 * c.vision_width * c.embed_dim
            + transformer_flops(c.vision_width, c.vision_layers, patches + 1))


def text_flops(c, tokens):
    """Forward pass of one text. Looking up an embedding costs no FLOP; there is no padding."""
    return transformer_flops(c.text_width, c.text_layers, tokens) + 2 * c.text_width * c.embed_dim


def train_flops(c, tokens, batch, texts=1, views=1, forwards=3):
    """One image of a training step. Backward costs two forwards: a product for the weights'
    gradient, one for the inputs'. --grad-checkpointing and --micro-batch make a fourth forward. The
    loss compares an image with the whole batch: 2 * batch * embed_dim for every text (LaCLIP-MT:
    all), and as much for text to image."""
    similarities = 2 * batch * c.embed_dim * (texts + 1)
    towers = views * image_flops(c) + texts * text_flops(c, tokens)
    head = 0
    if views > 1:  # SLIP's, on two views
        head = 2 * 2 * (c.vision_width * 4096 + 4096 * 4096 + 4096 * 256)
    return forwards * towers + 3 * (similarities + head)


class LLM(NamedTuple):
    """A LLaMA. kv: width of keys and values together with grouped-query attention, else `width`"""
    width: int
    layers: int
    mlp: int
    vocabulary: int
    kv: int

    def flops(self, prompt, answer, cached=0):
        """Read `prompt` tokens behind `cached` ones, then generate `answer` tokens. Only a token
        that is drawn needs the output matrix. A token sees itself and those before it."""
        block = 2 * self.width ** 2 + 2 * self.width * self.kv + 3 * self.width * self.mlp
        new = prompt + max(answer - 1, 0)  # the last token drawn is not read again
        seen = new * cached + new * (new + 1) / 2
        head = 2 * self.width * self.vocabulary * answer
        return self.layers * (2 * block * new + 4 * self.width * seen) + head


LLMS = {"llama-7b": LLM(4096, 32, 11008, 32000, 4096),
        "llama-13b": LLM(5120, 40, 13824, 32000, 5120),
        "llama-3.1-8b": LLM(4096, 32, 14336, 128256, 1024),
        "smollm2-135m": LLM(576, 30, 1536, 49152, 192)}
LLAVA_TOWER = Config(**PRESETS["ViT-L/14"] | {"image_size": 336})  # LLaVA-1.5
LLAVA_PROMPT = 576 + 25  # its patches, then "Describe the image concisely, ..." in its template


# --- tokens: what a stage reads and writes for a row ----------------------------------------------

class Stage(NamedTuple):
    tokens_in: float
    tokens_out: float
    flops: float  # a row


def stages(args, epochs):
    """-> {name: Stage}. C: tokens of a caption. The prompts' own tokens are estimates for LLaMA."""
    C, config = args.caption_tokens, args.config
    rewriter, captioner, fuser = LLMS[args.rewriter], LLMS[args.captioner], LLMS[args.fuser]
    M = len(SOURCES)
    prefix = 15 + 3 * (2 * C + 3)  # the task line and three pairs, once for GROUP captions
    fusion = 95 + 2 * C  # Vicuna's system line, the paper's instruction, AltText and VeC
    texts, views = M + 1 if args.multitext else 1, 3 if args.ssl else 1
    forwards = 4 if args.grad_checkpointing else 3
    train = train_flops(config, C + 2, args.batch_size, texts, views, forwards)
    rewrite = rewriter.flops(C + 2, C + 1, prefix) + rewriter.flops(prefix, 0) / GROUP
    return {"rewrite": Stage(M * (C + 2 + prefix / GROUP), M * (C + 1), M * rewrite),
            "caption": Stage(LLAVA_PROMPT, C + 1,
                             image_flops(LLAVA_TOWER) + captioner.flops(LLAVA_PROMPT, C + 1)),
            "fuse": Stage(fusion, C + 1, fuser.flops(fusion, C + 1)),
            "train": Stage(epochs * texts * (C + 2), 0, epochs * train)}


METHODS = {"LaCLIP": ["rewrite", "train"], "VeCLIP": ["caption", "fuse", "train"]}


# --- rates ----------------------------------------------------------------------------------------

# TFLOP/s, dense bf16 (V100: fp16), NVIDIA's data sheets
PEAKS = {"A100": 312, "H100": 989, "H200": 989, "V100": 125}


def published(gpu):
    """Rates measured on one GPU, as FLOP/s: by others, and for the H200 with tests/bench/gpu.py.
    -> {stage: (FLOP/s, note)}"""
    b16 = train_flops(Config(), 77, 32768)  # open_clip computes all 77 tokens
    chat = LLMS["llama-3.1-8b"].flops(128, 128) / 128  # an output token, its share of the input
    llava = image_flops(LLAVA_TOWER) + LLMS["llama-13b"].flops(LLAVA_PROMPT, 26)  # 26: assumed
    text = "output tokens/s, Llama-3.1-8B, 128 in and 128 out, TensorRT-LLM"
    fp8 = 28_300 * chat, f"28,300 {text}, FP8 (whose peak is twice bf16's)"
    a100 = 6_500 * chat, f"6,500 {text}"
    rates = {"A100": {"rewrite": a100, "fuse": a100,
                      "train": (390 * b16, "390 images/s, ViT-B/16, open_clip's LAION-400M runs")},
             "H100": {"rewrite": fp8, "fuse": fp8,
                      "caption": (18.6 * llava, "18.6 images/s, LLaVA-1.5-13B, SGLang")},
             "H200": {"rewrite": (98.8 * LLMS["llama-7b"].flops(12, 16, 120),
                                  "98.8 rewrites/s of 16 tokens, LLaMA-7B, batches of 256"),
                      "train": (3146 * train_flops(Config(), 16, 1024),
                                "3,146 images/s, ViT-B/16, batches of 1,024")}}
    return rates.get(gpu, {})


def measured(specs, work, epochs):
    """["train=1200", "rewrite=28300t"] -> {stage: (FLOP/s, note)}. Rows a second; train: images."""
    rates = {}
    for spec in specs:
        stage, _, value = spec.partition("=")
        if stage not in work:
            die(f"--rate {spec}: expected {', '.join(work)}")
        try:
            rate = float(value.removesuffix("t"))
            if not 0 < rate < float("inf") or value.endswith("t") and not work[stage].tokens_out:
                raise ValueError
        except ValueError:
            die(f"--rate {spec}: expected rows a second, as in rewrite=65, or, where texts are "
                "generated, output tokens a second, as in rewrite=28300t")
        unit, a_row = ("images/s", epochs) if stage == "train" else ("rows/s", 1)
        if value.endswith("t"):
            unit, a_row = "output tokens/s", work[stage].tokens_out
        rates[stage] = rate / a_row * work[stage].flops, f"{rate:,.6g} {unit}, given by --rate"
    return rates


# --- bytes ----------------------------------------------------------------------------------------

def jsonl_bytes(lengths):
    """A row as the stages write it: {"key": "text", ...} and a newline. lengths: {key: bytes}"""
    pairs = [len('"": ""') + len(key) + n for key, n in lengths.items()]
    return sum(pairs) + len(", ") * (len(pairs) - 1) + len("{}\n")


def parameters(config):
    with torch.device("meta"):  # shapes without memory
        return sum(p.numel() for p in CLIP(config).parameters())


def checkpoint_bytes(n):
    """fp32: n weights and AdamW's two moments of each"""
    return 12 * n


# --- the plan -------------------------------------------------------------------------------------

def plan(rows, args):
    """-> dict of one size, as --json writes it; hours are GPU-hours"""
    rows = int(rows)
    # LaCLIP: 40 on CC3M, 35 on CC12M, 32 on LAION-400M (assumed)
    epochs = args.epochs or (40 if rows < 6e6 else 35 if rows < 50e6 else 32)
    work, peak = stages(args, epochs), (args.peak or PEAKS[args.gpu]) * 1e12
    rates = ({} if args.peak else published(args.gpu)) | measured(args.rate, work, epochs)
    result = {"rows": rows, "epochs": epochs, "stages": {}}
    for name, stage in work.items():
        assumed = peak * args.mfu, f"{peak / 1e12:g} TFLOP/s x {args.mfu:.0%}"
        per_second, note = rates.get(name, assumed)
        total = rows * stage.flops
        result["stages"][name] = {
            **stage._asdict(), "total_flops": total, "rate": note,
            "hours": total / per_second / 3600, "hours_peak": total / (peak * args.mfu) / 3600,
            "utilisation": per_second / peak}
    train = result["stages"]["train"]
    images = rows * epochs / train["hours"] / 3600  # a second and GPU
    limits = {"the GPU": images, "decoding": args.cores * args.decode,
              "reading": args.read * 1e6 / (args.image_kb * 1e3)}
    train["limited_by"] = min(limits, key=limits.get)
    train["hours"] *= images / min(limits.values())
    result["train_images_per_s"], result["limits_images_per_s"] = min(limits.values()), limits
    for method, names in METHODS.items():
        hours = {name: result["stages"][name]["hours"] for name in names}
        longest, total = max(hours, key=hours.get), sum(hours.values())
        result[method] = {"hours": total, "longest": longest, "share": hours[longest] / total,
                          "even_epochs": (total - hours["train"]) / hours["train"] * epochs}
    text = args.caption_tokens * 4.2  # bytes a token of English (assumed)
    keys = ["alt", *(f"rewrite_{source}" for source in SOURCES), "vec", "vecap"]
    result["bytes"] = {"jsonl": rows * jsonl_bytes({"image": 20} | dict.fromkeys(keys, text)),
                       "images": rows * args.image_kb * 1e3,
                       "checkpoint": checkpoint_bytes(parameters(args.config))}
    return result


def show(result, args, notes):
    """One size as a table; the rates' sources are numbered in `notes`."""
    print(f"\n{result['rows']:,} rows; {args.model}, {result['epochs']:g} epochs; "
          f"{args.peak or PEAKS[args.gpu]:g} TFLOP/s peak")
    rows = []
    for name, stage in result["stages"].items():
        note = notes.setdefault(stage["rate"], len(notes) + 1)
        rows.append([name, f"{stage['tokens_in']:,.0f}", f"{stage['tokens_out']:,.0f}",
                     f"{stage['flops'] / 1e12:.3f}", f"{stage['total_flops'] / 1e18:,.1f}",
                     f"{stage['hours']:,.1f}", f"{stage['utilisation']:.0%}", f"[{note}]",
                     f"{stage['hours_peak']:,.1f}"])
    print_table(["", "tokens in", "tokens out", "TFLOP/row", "EFLOP", "GPU-hours", "of peak",
                 "note", "at peak x MFU"], rows)
    for method, names in METHODS.items():
        m = result[method]
        print(f"{method}: {' + '.join(names)} = {m['hours']:,.1f} GPU-hours, {m['share']:.0%} of "
              f"them {m['longest']}; its texts cost as much as {m['even_epochs']:.1f} epochs of "
              "training")
    limits = ", ".join(f"{name} allows {n:,.0f}"
                       for name, n in result["limits_images_per_s"].items())
    print(f"train: {result['train_images_per_s']:,.0f} images/s a GPU, limited by "
          f"{result['stages']['train']['limited_by']} ({limits})")
    storage = [f"{name} {n / 1e9:,.2f} GB" for name, n in result["bytes"].items()]
    print(f"storage: {', '.join(storage)}")


def positive(text):
    """A type for argparse"""
    return number(float, 1e-9)(text)


def read_arguments(argv):
    parser = new_parser(__doc__)
    add = parser.add_argument_group("the work").add_argument
    add("--rows", nargs="+", type=number(float, 1), default=[3e6, 12e6, 100e6, 300e6],
        help="default: 3e6 12e6 100e6 300e6")
    add("--epochs", type=positive,
        help="default: LaCLIP's, 40 up to 6 M rows, 35 up to 50 M, 32 above")
    presets = [name for name, preset in PRESETS.items() if "conv_stem" not in preset]
    add("--model", choices=presets, default="ViT-B/16", help="default: %(default)s")
    add("--image-size", type=number(int, 1), help="pixels a side (default: the model's)")
    add("--batch-size", type=number(int, 1), default=8192, help="default: %(default)s")
    add("--multitext", action="store_true", help="LaCLIP-MT: five texts an image")
    add("--ssl", action="store_true", help="SLIP, LaSLIP: two more views an image")
    add("--grad-checkpointing", action="store_true",
        help="a fourth forward pass; --micro-batch costs the same")
    add("--rewriter", choices=LLMS, default="llama-7b", help="default: %(default)s, paper")
    add("--captioner", choices=LLMS, default="llama-7b",
        help="LLaVA's language model (default: %(default)s: LLaVA-1.5-7B, assumed)")
    add("--fuser", choices=LLMS, default="llama-13b",
        help="default: %(default)s: Vicuna-13B, paper")
    add("--caption-tokens", type=number(float, 1), default=25,
        help="of a caption, read or written (default: %(default)s, assumed)")
    add("--image-kb", type=positive, default=30,
        help="kB an image (default: %(default)s: JPEG of 256 pixels, assumed)")
    add = parser.add_argument_group("the machine").add_argument
    add("--gpu", choices=PEAKS, default="A100",
        help="its peak, and rates published for it (default: %(default)s)")
    add("--peak", type=positive, metavar="TFLOPS", help="of another GPU, from its data sheet")
    add("--mfu", type=number(float, 0.001, 1), default=0.4,
        help="share of the peak that is reached where no rate is known (default: %(default)s, "
        "assumed)")
    add("--rate", nargs="+", default=[], metavar="STAGE=X",
        help="rows a second on one GPU (train: samples_per_s of metrics.jsonl); Xt: output tokens "
        "a second, as servers state them")
    add("--cores", type=positive, default=8, help="CPU cores a GPU (default: %(default)s)")
    add("--decode", type=positive, default=1000,
        help="images a second that a core decodes and crops (default: %(default)s, JPEG of 640 x "
        "480)")
    add("--read", type=positive, default=250, metavar="MB/S",
        help="that the storage delivers a GPU (default: %(default)s, assumed)")
    parser.add_argument("--json", metavar="FILE", help="write the same as JSON")
    args = parser.parse_args(argv)
    args.config = Config(**PRESETS[args.model])
    args.config.image_size = args.image_size or args.config.image_size
    if args.config.image_size % args.config.patch_size:
        die(f"--image-size {args.image_size}: expected a multiple of {args.config.patch_size}")
    if args.json:
        check_output(args.json)
    return args


@in_one_line
def main(argv=None):
    args = read_arguments(argv)
    results = [plan(rows, args) for rows in args.rows]
    notes = {}
    for result in results:
        show(result, args, notes)
    print("\nrates" + "".join(f"\n  [{number}] {note}" for note, number in notes.items()))
    print()
    columns = [column for method in METHODS for column in (f"{method}: longest", "", "GPU-hours")]
    rows = [[f"{result['rows']:,}", *(cell for m in map(result.get, METHODS) for cell in (
        m["longest"], f"{m['share']:.0%}", f"{m['hours']:,.0f}"))] for result in results]
    print_table(["rows", *columns], rows)
    if args.json:
        with open(args.json, "w") as f:
            json.dump(results, f, indent=1)


if __name__ == "__main__":
    main()
