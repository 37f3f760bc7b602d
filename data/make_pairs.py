"""LaCLIP's first step (arXiv 2305.20088, section 3.1): the input => output pairs that rewrite_llama.py
imitates.

    python -m data.make_pairs chatbot --captions cc3m.jsonl --model FOLDER --output chatgpt.jsonl
    python -m data.make_pairs coco captions_train2014.json --output coco.jsonl
    python -m data.make_pairs human --captions cc3m.jsonl --output to_fill.jsonl  # fill in every output, then
    python -m data.make_pairs human --filled to_fill.jsonl --output human.jsonl

chatbot and human: captions are drawn from the rows, and an instruct model or people rewrite them. coco: the
captions that several people wrote for one image; rewrite_llama.py draws two of them. Read the pairs, then
join the files with `cat` for rewrite_llama.py --pairs.
"""
import json
import random
import re
from collections import Counter, defaultdict

import torch

from data.common import (check_output, die, in_one_line, new_file, new_parser, number, one_line, open_rows, parse_row,
                         pick_device, read_rows, reason, texts_of, to_line, words_of)

SENTENCE = "Rewrite this caption of an image vividly, and keep it less than thirty words:"  # paper
MAX_WORDS = 30  # of a caption and of its rewrite, as the sentence says
MAX_NEW_TOKENS = 77  # as in rewrite_llama.py; thirty words are about forty tokens
UNUSABLE = (ValueError, RecursionError, LookupError, TypeError, AttributeError)  # no JSON, or unexpected JSON


def clean(text):
    """The text as one line without the arrow that stands between input and output"""
    return one_line(text.replace("=>", " "))


def draw_captions(args, number):
    """Up to `number` different captions of 2 to 30 words. A reservoir in one pass gives all rows the same
    chance."""
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


def fault(source, input, output, ended=True):
    """Why these two are no pair, or None. ended: whether the model ended the output"""
    if not output:
        return "empty"
    if input.lower().strip(" .") == output.lower().strip(" ."):
        return "identical"
    return "too long" if len(words_of(output)) > MAX_WORDS or not ended else None


def answer_line(text):
    """The line of a model's output that is its answer, or "".

    A thought is not the answer, nor is an introduction that ends in a colon; the first line with a letter or
    a digit is, without the quotation marks around it."""
    if "<think>" in text and "</think>" not in text:
        return ""  # a thought without end
    for line in map(clean, text.split("</think>")[-1].split("\n")):
        if any(map(str.isalnum, line)) and not line.endswith(":"):
            return re.sub(r'^["\u201c]([^"\u201c\u201d]*)["\u201d]$', r"\1", line).strip()
    return ""


def chatbot(args):
    """The model's answers to the paper's sentence, each on one line and without quotation marks around it"""
    captions = draw_captions(args, 8 * args.number)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = pick_device(args.device)
    dtype = torch.bfloat16 if device.startswith("cuda") and torch.cuda.is_bf16_supported() else torch.float32
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, device_map=device).eval()
    except Exception as e:  # transformers raises nearly everything for a folder without a model
        die(f"--model {args.model} cannot be loaded: {reason(e)}")
    if not tokenizer.chat_template:
        die(f"--model {args.model} has no chat template: expected an instruct model")
    torch.manual_seed(args.seed)
    pairs, faults = [], Counter()
    markers = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}  # the template's alone
    for caption in captions:
        if any(marker in caption for marker in markers):
            continue
        messages = [{"role": "user", "content": f"{SENTENCE} {caption}"}]
        ids = tokenizer.apply_chat_template(messages, return_dict=True, add_generation_prompt=True,
                                            enable_thinking=False, return_tensors="pt").to(model.device)
        for _ in range(2 if args.temperature else 1):  # greedy decoding gives the same answer again
            out = model.generate(**ids, do_sample=args.temperature > 0, temperature=args.temperature or None,
                                 max_new_tokens=MAX_NEW_TOKENS, pad_token_id=tokenizer.eos_token_id)
            answer = tokenizer.decode(out[0, ids["input_ids"].shape[1]:], skip_special_tokens=True)
            pair = {"source": args.source, "input": caption, "output": answer_line(answer)}
            if not (why := fault(**pair, ended=out.shape[1] < ids["input_ids"].shape[1] + MAX_NEW_TOKENS)):
                pairs.append(pair)
                break
            faults[why] += 1
        if len(pairs) == args.number:
            return pairs
    die(f"{len(captions)} captions gave {len(pairs)} pairs, --number is {args.number}; not used: "
        f"{dict(faults)}")


def coco(args):
    """COCO's own JSON, or Karpathy's train and restval splits. Retrieval is tested on Karpathy's other
    splits."""
    groups = defaultdict(list)
    try:
        with open(args.json, encoding="utf-8-sig") as f:
            data = json.load(f)
        for annotation in data.get("annotations", []):
            groups[annotation["image_id"]].append(annotation["caption"])
        images = [] if groups else data["images"]
        groups |= {i: [sentence["raw"] for sentence in image["sentences"]] for i, image in enumerate(images)
                   if image["split"] in ("train", "restval")}
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
        for number, line in enumerate(f, 1):
            try:
                row, _ = parse_row(line)
                pairs.append({key: clean(row[key]) for key in ("source", "input", "output")})
            except UNUSABLE as e:
                die(f"{args.filled}, line {number}: expected an object of source, input, output: {e!r}")
            if why := fault(**pairs[-1]):
                die(f"{args.filled}, line {number}: the output is {why}")
    if not pairs:
        die(f"{args.filled}: no pair in it")
    return pairs


@in_one_line
def main(argv=None):
    parser = new_parser(__doc__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for make, source in (chatbot, "chatgpt"), (coco, "coco"), (human, "human"):
        command = commands.add_parser(make.__name__, help=f"pairs of source {source}")
        command.set_defaults(make=make)
        command.add_argument("--output", required=True, metavar="OUT.jsonl", help="must not exist yet")
        command.add_argument("--source", default=source, help="the field of the rewrites is rewrite_SOURCE "
                             "(default: %(default)s)")
        command.add_argument("--number", type=number(int, 1), default=16, help="pairs (default: 16, paper)")
        command.add_argument("--seed", type=number(int, 0), default=0, help="of every draw (default: 0)")
        command.error = die
        if make is coco:
            command.add_argument("json", metavar="JSON", help="captions_*.json, or Karpathy's dataset_coco")
            continue
        rows = command.add_mutually_exclusive_group(required=True)
        rows.add_argument("--captions", metavar="ROWS.jsonl", help="rows to draw captions from")
        command.add_argument("--field", default="alt", help="a text or a list of them (default: %(default)s)")
        if make is human:
            rows.add_argument("--filled", metavar="FILE.jsonl",
                              help="the first run's file with every output filled in")
            continue
        command.add_argument("--model", required=True, help="instruct model, folder or hub name")
        command.add_argument("--temperature", type=number(float, 0), default=0.9,
                             help="0: greedy (default: 0.9)")
        command.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    args = parser.parse_args(argv)
    check_output(args.output, new=True)
    pairs = args.make(args)
    with new_file(args.output) as f:
        f.writelines(map(to_line, pairs))
    for pair in pairs:
        print(" / ".join(pair["captions"]) if "captions" in pair else f"{pair['input']} => {pair['output']}")
    empty = "" in pairs[0].values()
    print(f"{len(pairs)} in {args.output}.", "Fill in every output, then run with --filled." if empty else
          "Read them: every rewrite imitates them, mistakes included.")


if __name__ == "__main__":
    main()
