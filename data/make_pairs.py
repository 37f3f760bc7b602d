"""LaCLIP's first step (arXiv 2305.20088, section 3.1): the input => output pairs that rewrite_llama.py imitates.

    python data/make_pairs.py chatbot --captions cc3m.jsonl --model FOLDER --source chatgpt --output chatgpt.jsonl
    python data/make_pairs.py coco captions_train2014.json --output coco.jsonl
    python data/make_pairs.py human --captions cc3m.jsonl --output to_fill.jsonl    # fill in every "output", then
    python data/make_pairs.py human --filled to_fill.jsonl --output human.jsonl

A chatbot or people rewrite captions drawn from the rows; coco is what several people wrote for one image, of which
rewrite_llama.py draws two. Read what comes, then `cat` the files into one for its --pairs.
"""
import argparse
import json
import os
import random
import sys
from collections import Counter, defaultdict

import torch
from tqdm import tqdm

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
from fuse_vicuna import unquote  # noqa: E402
from rewrite_llama import DTYPES, clean, die, load, number, pick_device, special_markers  # noqa: E402
from train_clip import BadRow, open_rows, parse_row, words_of  # noqa: E402

SENTENCE = "Rewrite this caption of an image vividly, and keep it less than thirty words:"  # paper
MAX_WORDS = 30  # of a caption and of its rewrite: the sentence's
MAX_NEW_TOKENS = 77  # as in rewrite_llama.py; thirty words are some forty
UNUSABLE = (ValueError, RecursionError, LookupError, TypeError, AttributeError)  # no JSON, or other things in it


def draw_captions(args, number):
    """Up to `number` different captions of 2 to 30 words. One pass with a reservoir: all rows have the same chance."""
    drawn, seen, rng = [], 0, random.Random(args.seed)
    with open_rows(args.captions) as f:
        for line in tqdm(f, unit=" rows", unit_scale=True, disable=None, delay=2):
            try:
                text = clean(rng.choice(value) if isinstance(value := parse_row(line)[args.field], list) else value)
            except (BadRow, *UNUSABLE):
                continue
            if 2 <= len(words_of(text)) <= MAX_WORDS and text not in drawn:
                seen += 1
                place = len(drawn) if len(drawn) < number else rng.randrange(seen)
                drawn[place:place + 1] = [text] if place < number else []
    rng.shuffle(drawn)
    return drawn or die(f"{args.captions}: no row has a caption of 2 to {MAX_WORDS} words in {args.field!r}")


def fault(source, input, output, ended=True):
    """Why this makes no pair, or None."""
    same, long = input.lower().strip(" .") == output.lower().strip(" ."), len(words_of(output)) > MAX_WORDS
    return "empty" if not output else "identical" if same else "too long" if long or not ended else None


def chatbot(args):
    """The model's answers to the paper's sentence, on one line and without the quotation marks that chatbots like."""
    captions = draw_captions(args, 8 * args.number)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device, tokenizer = pick_device(args), load(AutoTokenizer, args.model)
    model = load(AutoModelForCausalLM, args.model, dtype=DTYPES[args.dtype], device_map=device).eval()
    tokenizer.chat_template or die(f"--model {args.model} has no chat template: expected an instruct model")
    torch.manual_seed(args.seed)
    pairs, faults, markers = [], Counter(), special_markers(tokenizer)  # which only the template may contain
    for caption in (caption for caption in captions if not markers.search(caption)):
        ids = tokenizer.apply_chat_template([{"role": "user", "content": f"{SENTENCE} {caption}"}], return_dict=True,
                                            add_generation_prompt=True, return_tensors="pt").to(model.device)
        for _ in range(2 if args.temperature else 1):  # greedy would say the same again
            out = model.generate(**ids, do_sample=args.temperature > 0, temperature=args.temperature or None,
                                 max_new_tokens=MAX_NEW_TOKENS, pad_token_id=tokenizer.eos_token_id)
            answer = tokenizer.decode(out[0, ids["input_ids"].shape[1]:], skip_special_tokens=True)
            pair = {"source": args.source, "input": caption, "output": unquote(clean(answer))}
            if not (why := fault(**pair, ended=out.shape[1] < ids["input_ids"].shape[1] + MAX_NEW_TOKENS)):
                pairs.append(pair)
                break
            faults[why] += 1
        if len(pairs) == args.number:
            return pairs
    die(f"{len(captions)} captions gave {len(pairs)} pairs, --number is {args.number}; not used: {dict(faults)}")


def coco(args):
    """COCO's own JSON, or Karpathy's splits, of which only train and restval: retrieval is tested on the others."""
    groups = defaultdict(list)
    try:
        with open(args.json, encoding="utf-8-sig") as f:
            data = json.load(f)
        for annotation in data.get("annotations", []):
            groups[annotation["image_id"]].append(annotation["caption"])
        groups |= {number: [sentence["raw"] for sentence in image["sentences"]] for number, image in enumerate(
            [] if groups else data["images"]) if image["split"] in ("train", "restval")}
        groups = [list(dict.fromkeys(filter(None, map(clean, texts)))) for texts in groups.values()]
    except UNUSABLE as e:
        die(f"{args.json}: neither COCO's captions nor Karpathy's splits: {e!r}")
    groups = [{"source": args.source, "captions": texts} for texts in groups if len(texts) > 1]
    len(groups) < args.number and die(f"{args.json}: {len(groups)} images with two captions, --number is {args.number}")
    return random.Random(args.seed).sample(groups, args.number)


def human(args):
    if args.captions:
        return [{"source": args.source, "input": text, "output": ""} for text in draw_captions(args, args.number)]
    pairs = []
    with open_rows(args.filled) as f:
        for number, line in enumerate(f, 1):
            try:
                pairs.append({key: clean(parse_row(line)[key]) for key in ("source", "input", "output")})
            except (BadRow, *UNUSABLE) as e:
                die(f"{args.filled}, line {number}: expected an object of source, input, output: {e!r}")
            if why := fault(**pairs[-1]):
                die(f"{args.filled}, line {number}: the output is {why}")
    return pairs or die(f"{args.filled}: no pair in it")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for make, source in (chatbot, "chatgpt"), (coco, "coco"), (human, "human"):
        command = commands.add_parser(make.__name__, help=f"pairs of source {source}")
        command.set_defaults(make=make)
        command.add_argument("--output", required=True, metavar="OUT.jsonl", help="must not exist yet")
        command.add_argument("--source", default=source, help="makes rewrite_SOURCE later (default: %(default)s)")
        command.add_argument("--number", type=number(int, 1), default=16, help="of pairs (default: %(default)s, paper)")
        command.add_argument("--seed", type=number(int, 0), default=0, help="of every draw (default: %(default)s)")
        command.error = die
        if make is coco:
            command.add_argument("json", metavar="JSON", help="captions_*.json, or Karpathy's dataset_coco.json")
            continue
        rows = command.add_mutually_exclusive_group(required=True)
        rows.add_argument("--captions", metavar="ROWS.jsonl", help="rows to draw captions from (data/README.md)")
        command.add_argument("--field", default="alt", help="a text or a list of them (default: %(default)s)")
        if make is human:
            rows.add_argument("--filled", metavar="FILE.jsonl", help="what the first run wrote, every output filled in")
            continue
        command.add_argument("--model", required=True, help="instruct model, folder or hub name")
        command.add_argument("--temperature", type=number(float, 0), default=0.9, help="0 is greedy (default: 0.9)")
        command.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
        command.set_defaults(server=None, dtype="auto")
    parser.error = die
    sys.stdout.reconfigure(errors="backslashreplace")
    args = parser.parse_args(argv)
    if os.path.lexists(args.output) or not os.path.isdir(os.path.dirname(args.output) or "."):
        die(f"--output {args.output}: expected a new file in a folder that is there")
    try:
        pairs = args.make(args)
        with open(args.output, "x", encoding="utf-8") as f:
            f.writelines(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
    except OSError as e:
        die(f"{e.filename or args.output}: {e.strerror}")
    for pair in pairs:
        print(" / ".join(pair["captions"]) if "captions" in pair else f"{pair['input']} => {pair['output']}")
    print(f"{len(pairs)} in {args.output}.", "Fill in every output, then run with --filled." if "" in pairs[0].values()
          else "Read them: every rewrite imitates them, their mistakes too.")


if __name__ == "__main__":
    main()
