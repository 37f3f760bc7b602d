"""Make input => output pairs for rewrite_llama.py, LaCLIP's first step (arXiv 2305.20088, 3.1).

    python -m data.make_pairs chatbot --captions cc3m.jsonl --model FOLDER --output chatgpt.jsonl
    python -m data.make_pairs coco captions_train2014.json --output coco.jsonl
    python -m data.make_pairs human --captions cc3m.jsonl --output to_fill.jsonl  # fill it in, then
    python -m data.make_pairs human --filled to_fill.jsonl --output human.jsonl

chatbot and human: captions are drawn from the rows, and an instruct model or people rewrite them.
coco: the captions that several people wrote for one image; rewrite_llama.py draws two of them. Read
the pairs, then join the files with `cat` for rewrite_llama.py --pairs.
"""
import json
import random
import re
from collections import Counter, defaultdict

import torch

from data.common import check_output, die, in_one_line, new_parser, number, pick_device, reason
from data.rows import new_file, open_rows, parse_row, read_rows, to_line
from data.texts import one_line, texts_of, words_of
from train_clip import resolve_precision

SENTENCE = "Rewrite this caption of an image vividly, and keep it less than thirty words:"  # paper
MAX_WORDS = 30  # of a caption and of its rewrite, as the sentence says
MAX_NEW_TOKENS = 77  # as in rewrite_llama.py; thirty words are about forty tokens
# What JSON raises that is broken or of another form
UNUSABLE = (ValueError, RecursionError, LookupError, TypeError, AttributeError)


def clean(text):
    """The text as one line without the arrow that stands between input and output"""
    return one_line(text.replace("=>", " "))


def draw_captions(args, number):
    """Up to `number` different captions of 2 to 30 words. A reservoir in one pass gives all rows
    the same chance."""
    drawn, seen, rng = [], 0, random.Random(args.seed)
    for _, row in read_rows(args.captions):
        texts = texts_of(row.get(args.field))
        text = clean(rng.choice(texts)) if texts else ""
        if 2 <= len(words_of(text)) <= MAX_WORDS and text not in drawn:
            seen += 1
            place = len(drawn) if len(drawn) < number else rng.randrange(seen)
            drawn[place:place + 1] = [text] if place < number else []
    if not drawn:
        die(f"{args.captions}: no row has a caption of 2 to {MAX_WORDS} words in {args.field!r}")
    rng.shuffle(drawn)
    return drawn


def fault(input, output):
    """Why these two are no pair, or None"""
    if not output:
        return "empty"
    if input.lower().strip(" .") == output.lower().strip(" ."):
        return "identical"
    return "too long" if len(words_of(output)) > MAX_WORDS else None


def answer_line(answer):
    """The caption in a model's answer -> (caption, None), or (None, why there is none). A thought,
    an introduction that ends in a colon, and quotation marks around the caption are cut off."""
    answer = answer.rpartition("</think>")[2]
    lines = [clean(line) for line in answer.splitlines() if any(map(str.isalnum, line))]
    if lines and lines[0].rstrip("*_ ").endswith((":", "\uff1a")):
        del lines[0]
    if "<think>" in answer or not lines:
        return None, "a thought without end" if "<think>" in answer else "empty"
    return re.sub("^[\"'“„«]([^\"“”„«»]+)[\"'”“»]$", r"\1", lines[0]).strip(), None


def load_chat_model(args):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    device = pick_device(args.device)
    bf16 = resolve_precision("auto", device) == "bf16"
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        model = AutoModelForCausalLM.from_pretrained(
            args.model, dtype=torch.bfloat16 if bf16 else torch.float32, device_map=device)
    except Exception as e:  # transformers raises nearly everything for a folder without a model
        die(f"--model {args.model} cannot be loaded: {reason(e)}")
    if not tokenizer.chat_template:
        die(f"--model {args.model} has no chat template: expected an instruct model")
    return model.eval(), tokenizer


def ask(model, tokenizer, caption, temperature):
    """The model's answer to the paper's sentence -> (caption or None, reason or None)"""
    messages = [{"role": "user", "content": f"{SENTENCE} {caption}"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True,
                                        return_tensors="pt", enable_thinking=False)
    out = model.generate(**ids.to(model.device), do_sample=temperature > 0,
                         temperature=temperature or None, max_new_tokens=MAX_NEW_TOKENS,
                         pad_token_id=tokenizer.eos_token_id)
    new = out[0, ids["input_ids"].shape[1]:]
    answer = tokenizer.decode(new)
    for token in {*tokenizer.all_special_tokens} - {"<think>", "</think>"}:
        answer = answer.replace(token, "")
    text, why = answer_line(answer)
    if len(new) == MAX_NEW_TOKENS:
        why = why or "too long"
    return text, why


def chatbot(args):
    """Pairs of drawn captions and the model's answers"""
    captions = draw_captions(args, 8 * args.number)
    model, tokenizer = load_chat_model(args)
    torch.manual_seed(args.seed)
    pairs, faults = [], Counter()
    special = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
    for caption in captions:
        if any(token in caption for token in special):
            faults["special tokens"] += 1  # they come from the template alone
            continue
        for _ in range(2 if args.temperature else 1):  # greedy decoding gives the same answer again
            text, why = ask(model, tokenizer, caption, args.temperature)
            why = why or fault(caption, text)
            if not why:
                pairs.append({"source": args.source, "input": caption, "output": text})
                break
            faults[why] += 1
        if len(pairs) == args.number:
            return pairs
    die(f"{len(captions)} captions gave {len(pairs)} pairs, --number is {args.number}; not used: "
        f"{dict(faults)}")


def coco(args):
    """COCO's own JSON, or Karpathy's train and restval splits. Retrieval is tested on Karpathy's
    other splits."""
    groups = defaultdict(list)
    try:
        with open(args.json, encoding="utf-8-sig") as f:
            data = json.load(f)
        for annotation in data.get("annotations", []):
            groups[annotation["image_id"]].append(annotation["caption"])
        images = [] if groups else data["images"]
        for i, image in enumerate(images):
            if image["split"] in ("train", "restval"):
                groups[i] = [sentence["raw"] for sentence in image["sentences"]]
        groups = [list(dict.fromkeys(filter(None, map(clean, texts)))) for texts in groups.values()]
    except UNUSABLE as e:
        die(f"{args.json}: neither COCO's captions nor Karpathy's splits: {e!r}")
    groups = [{"source": args.source, "captions": texts} for texts in groups if len(texts) > 1]
    if len(groups) < args.number:
        die(f"{args.json}: {len(groups)} images with two captions, --number is {args.number}")
    return random.Random(args.seed).sample(groups, args.number)


def human(args):
    """The file to fill in, of --captions; or the pairs of --filled"""
    if args.captions:
        captions = draw_captions(args, args.number)
        return [{"source": args.source, "input": text, "output": ""} for text in captions]
    pairs = []
    with open_rows(args.filled) as f:
        for line_number, line in enumerate(f, 1):
            try:
                row, _ = parse_row(line)
                pairs.append({key: clean(row[key]) for key in ("source", "input", "output")})
            except UNUSABLE as e:
                die(f"{args.filled}, line {line_number}: expected an object of source, input, "
                    f"output: {e!r}")
            if why := fault(pairs[-1]["input"], pairs[-1]["output"]):
                die(f"{args.filled}, line {line_number}: the output is {why}")
    if not pairs:
        die(f"{args.filled}: no pair in it")
    return pairs


def read_arguments(argv):
    parser = new_parser(__doc__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for make, source in (chatbot, "chatgpt"), (coco, "coco"), (human, "human"):
        command = commands.add_parser(make.__name__, help=f"pairs of source {source}")
        command.set_defaults(make=make)
        command.error, add = die, command.add_argument
        add("--output", required=True, metavar="OUT.jsonl", help="must not exist yet")
        add("--source", default=source,
            help="the field of the rewrites is rewrite_SOURCE (default: %(default)s)")
        add("--number", type=number(int, 1), default=16, help="pairs (default: 16, paper)")
        add("--seed", type=number(int, 0), default=0, help="of every draw (default: 0)")
        if make is coco:
            add("json", metavar="JSON", help="captions_*.json, or Karpathy's dataset_coco")
            continue
        rows = command.add_mutually_exclusive_group(required=True)
        rows.add_argument("--captions", metavar="ROWS.jsonl", help="rows to draw captions from")
        add("--field", default="alt", help="a text or a list of them (default: %(default)s)")
        if make is human:
            rows.add_argument("--filled", metavar="FILE.jsonl",
                              help="the first run's file with every output filled in")
            continue
        add("--model", required=True, help="instruct model, folder or hub name")
        add("--temperature", type=number(float, 0), default=0.9, help="0: greedy (default: 0.9)")
        add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    return parser.parse_args(argv)


@in_one_line
def main(argv=None):
    args = read_arguments(argv)
    check_output(args.output, new=True)
    pairs = args.make(args)
    with new_file(args.output) as f:
        f.writelines(map(to_line, pairs))
    for pair in pairs:
        if "captions" in pair:
            print(" / ".join(pair["captions"]))
        else:
            print(f"{pair['input']} => {pair['output']}")
    todo = "Read them: every rewrite imitates them, mistakes included."
    if "" in pairs[0].values():
        todo = "Fill in every output, then run with --filled."
    print(f"{len(pairs)} in {args.output}. {todo}")


if __name__ == "__main__":
    main()
