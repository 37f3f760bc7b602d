"""LaCLIP's baselines (arXiv 2305.20088), other text augmentations: EDA and back-translation.

    python -m data.baselines eda IN.jsonl OUT.jsonl --wordnet /usr/share/wordnet
    python -m data.baselines back-translation IN.jsonl OUT.jsonl \\
        --there Helsinki-NLP/opus-mt-en-de --back Helsinki-NLP/opus-mt-de-en
    python train_clip.py --captions OUT.jsonl --text alt rewrite_eda_1 rewrite_eda_2 ...

Row in:  {"image": "photos/1.jpg", "alt": "a red bike by the wall"}
Row out: the same and "rewrite_eda_1": "a red wheel by the wall", ... "rewrite_eda_4": ...;
         or "rewrite_backtranslation_1": ..., ...
A list gives lists, entry by entry. What could not be made is null, with the reason in "error". So
is a text that would be the original again: train_clip.py --text alt ... draws the original already.

The same command resumes after any interruption, and its output is then identical byte for byte.

Read eda and its four operations, then back_translate.
"""
import hashlib
import os
import random
import re
from collections import Counter
from importlib.util import find_spec
from itertools import islice

import torch

from data.common import (check_output, die, in_one_line, new_parser, number, pick_device, progress,
                         reason)
from data.rows import continued, open_rows, parse_row, to_line
from data.texts import NO_BLANKS, one_line, words_of
from data.wordnet import WordNet
from train_clip import resolve_precision

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

BLOCK = 256  # rows that are written, and resumed, as a whole
DRAWS = 10  # of an operation that changes nothing, before another one is tried; ours
MAX_INPUT_TOKENS = 256  # a longer text is no caption: it is not translated, nor rewritten


# --- EDA (Wei & Zou 2019, arXiv 1901.11196, section 2) --------------------------------------------
#
# Paper: the four operations, n = alpha * l words of a text of l words, deletion with p = alpha, one
# operation at random for each new text. Release: n is rounded down and at least 1; synonyms come
# from all senses of a word in all parts of speech, and from the base form of an inflected word.
# Ours: words keep their case and punctuation; a text that would be the original is drawn again (the
# release keeps it); the stop words are data/filter_captions.py's. Assumed: LaCLIP used alpha = 0.1.

def replace_synonyms(words, n, alpha, synonyms, rng):
    """Replace n random words that are no stop words by one of their synonyms."""
    words, places = list(words), [i for i, word in enumerate(words) if synonyms(word)]
    for i in rng.sample(places, min(n, len(places))):
        before, after = re.match(r"\W*", words[i])[0], re.search(r"\W*$", words[i])[0]
        words[i] = before + rng.choice(synonyms(words[i])) + after  # punctuation stays
    return words


def insert_synonyms(words, n, alpha, synonyms, rng):
    """n times: a synonym of a random word that is no stop word goes to a random place."""
    known, words = [word for word in words if synonyms(word)], list(words)
    for word in rng.choices(known, k=n) if known else ():
        words.insert(rng.randrange(len(words) + 1), rng.choice(synonyms(word)))
    return words


def swap(words, n, alpha, synonyms, rng):
    """n times: two random words change places."""
    words = list(words)
    for _ in range(n if len(words) > 1 else 0):
        i, j = rng.sample(range(len(words)), 2)
        words[i], words[j] = words[j], words[i]
    return words


def delete(words, n, alpha, synonyms, rng):
    """Every word goes with probability alpha."""
    return [word for word in words if rng.random() >= alpha]


OPERATIONS = [replace_synonyms, insert_synonyms, swap, delete]


def eda(text, number, alpha, synonyms, rng):
    """`number` new texts, each by one operation. -> [(text or None, reason or None)]

    synonyms: a function, word -> tuple of words"""
    words = words_of(one_line(text)) if isinstance(text, str) else []
    if not words or NO_BLANKS.search(text):
        return [(None, "no blanks between words" if words else "empty input")] * number
    n, results = max(1, int(alpha * len(words))), []
    for _ in range(number):
        draws = (operation(words, n, alpha, synonyms, rng)
                 for operation in rng.sample(OPERATIONS, 4) for _ in range(DRAWS))
        new = next((new for new in draws if new and new != words), None)
        results.append((" ".join(new), None) if new else (None, "no operation changes it"))
    return results


def make_eda(args):
    """-> a function that makes a block's texts: [(byte offset, the row's texts)] -> for each row,
    for each of its texts, [(text or None, reason or None)]"""
    wordnet = WordNet(args.wordnet)

    def make(block):
        for offset, texts in block:
            rng = random.Random(f"{args.seed} {args.source} {offset}")  # a row's own
            yield [eda(text, args.n, args.alpha, wordnet.synonyms, rng) for text in texts]
    return make


# --- back-translation (Sennrich et al. 2016; as an augmentation Xie et al. 2020, arXiv 1904.12848) 
#
# Assumed, since LaCLIP does not say how it translates: one other language, and sampling at
# temperature 0.9 in both directions without top-k or nucleus. Several texts of a caption have to
# differ; beam search gives one.

class Translator:
    """A Marian model of one direction."""

    def __init__(self, flag, name, args, device):
        from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer
        try:
            AutoConfig.from_pretrained(name)  # whose message is the clearest if this is no model
            self.tokenizer = AutoTokenizer.from_pretrained(name)
            self.model = AutoModelForSeq2SeqLM.from_pretrained(name, dtype=DTYPES[args.dtype],
                                                               device_map=device).eval()
            special = {*self.tokenizer.get_added_vocab(), *self.tokenizer.all_special_tokens}
            # ">>fra<<" names a multilingual model's target
            self.markers = re.compile("|".join([r">>\w+<<", *map(re.escape, special)]))
        except Exception as e:  # transformers raises nearly everything for a folder without a model
            lacking = "sentencepiece" in str(e).lower() and find_spec("sentencepiece") is None
            why = "its tokenizer needs: pip install sentencepiece" if lacking else reason(e)
            die(f"{flag} {name}: expected a Marian folder or hub name: {why}")
        sampling = {}
        if args.temperature:
            sampling = {"temperature": args.temperature, "top_k": 0, "top_p": 1.0}
        self.model.generation_config.update(  # a forced end would hide that a text was cut
            do_sample=args.temperature > 0, **sampling, num_beams=1, max_length=None,
            max_new_tokens=args.max_new_tokens, forced_eos_token_id=None)
        self.batch_size = args.batch_size

    def translate(self, texts):
        """[(text or None, reason or None)] -> the same, translated; one without a text stays"""
        results, end = list(texts), self.model.generation_config.eos_token_id
        ids = {i: self.tokenizer(one_line(self.markers.sub(" ", text))).input_ids
               for i, (text, _) in enumerate(texts) if text}
        for i in [i for i in ids if len(ids[i]) > MAX_INPUT_TOKENS]:
            del ids[i]
            results[i] = None, f"over {MAX_INPUT_TOKENS} tokens"
        by_length = sorted(ids, key=lambda i: (len(ids[i]), i))
        for places in batched(by_length, self.batch_size):
            inputs = {"input_ids": [ids[i] for i in places]}
            inputs = self.tokenizer.pad(inputs, return_tensors="pt").to(self.model.device)
            for i, new in zip(places, self.model.generate(**inputs).tolist()):
                text = one_line(self.tokenizer.decode(new, skip_special_tokens=True))
                fault = None if text else "empty"
                if end not in new[1:]:
                    fault = "no end within --max-new-tokens"
                results[i] = None if fault else text, fault
        return results


def batched(items, size):
    return [items[at:at + size] for at in range(0, len(items), size)]


def back_translate(texts, there, back):
    """[(text or None, reason or None)] in the captions' language -> the same, there and back"""
    results = back.translate(there.translate(texts))
    return [(None, "identical") if new and new.lower() == one_line(old).lower() else (new, why)
            for (old, _), (new, why) in zip(texts, results)]


def make_back_translation(args):
    """As make_eda"""
    if args.n > 1 and not args.temperature:
        die(f"--temperature 0 gives the same text every time: expected --n 1, not {args.n}")
    device = pick_device(args.device)
    args.dtype = resolve_precision(args.dtype, device)
    there = Translator("--there", args.there, args, device)
    back = Translator("--back", args.back, args, device)

    def make(block):
        if not block:
            return []
        seed = hashlib.sha256(f"{args.seed} {args.source} {block[0][0]}".encode()).digest()[:8]
        torch.manual_seed(int.from_bytes(seed))  # a block's texts depend on nothing before it
        texts = [(text, None) if isinstance(text, str) and text.strip() else (None, "empty input")
                 for _, entries in block for text in entries for _ in range(args.n)]
        results = iter(batched(back_translate(texts, there, back), args.n))
        return [[next(results) for _ in entries] for _, entries in block]
    return make


# --- the command ----------------------------------------------------------------------------------

@in_one_line
def main(argv=None):
    parser = new_parser(__doc__)
    commands = parser.add_subparsers(metavar="eda|back-translation", required=True, dest="command")
    for command, source, make in (("eda", "eda", make_eda),
                                  ("back-translation", "backtranslation", make_back_translation)):
        add = (sub := commands.add_parser(command)).add_argument
        sub.error = die
        sub.set_defaults(make=make)
        add("input", metavar="IN.jsonl")
        add("output", metavar="OUT.jsonl")
        add("--field", default="alt", help="the caption field to augment (default: %(default)s)")
        add("--n", type=number(int, 1), default=4,
            help="texts a caption (default: %(default)s, as many as LaCLIP's rewrites)")
        add("--source", default=source, help="makes rewrite_SOURCE_1 ... (default: %(default)s)")
        add("--seed", type=number(int, 0), default=0)
        if make is make_eda:
            add("--wordnet", required=True, metavar="DIR", help="WordNet's dictionary files "
                "(data.noun, index.noun, ...), as Debian's package wordnet-base has them in "
                "/usr/share/wordnet")
            add("--alpha", type=number(float, 0, 0.99), default=0.1,
                help="share of the words (default: %(default)s)")
            continue
        add("--there", required=True, metavar="MODEL",
            help="Marian folder or hub name, from the captions' language to another")
        add("--back", required=True, metavar="MODEL", help="the other direction")
        add("--temperature", type=number(float, 0), default=0.9,
            help="0 is greedy (default: %(default)s, assumed)")
        add("--batch-size", type=number(int, 1), default=64,
            help="texts a batch (default: %(default)s)")
        add("--max-new-tokens", type=number(int, 1), default=128,
            help="longest translation (default: %(default)s)")
        add("--dtype", default="auto", choices=["auto", *DTYPES],
            help="auto: bf16 where the hardware computes in it, else fp32")
        add("--device", default="auto", choices=["auto", "cpu", "cuda", "mps"])
    args = parser.parse_args(argv)
    check_output(args.output, args.input)
    fields = [f"rewrite_{args.source}_{i + 1}" for i in range(args.n)]
    with open_rows(args.input) as f:
        check_fields(args, [row for _, row in read_block(islice(f, 1000), 0)[1]], fields)
    write_rows(args, args.make(args), fields)


# --- rows -----------------------------------------------------------------------------------------

def as_list(value):
    """A list's entries, or the one text; an empty list counts as one missing text."""
    return value if value and isinstance(value, list) else [value or None]


def put_texts(row, field, like, results):
    """Write the texts of results, [(text or None, reason or None)], into row[field], the reasons
    into row["error"][field]. Both are lists if `like`, which the texts were made from, is one."""
    if row.get(field) is not None:  # check_fields reads only the first 1,000 rows
        like, results = None, [(row[field], "was there before, kept")]
    texts, reasons = map(list, zip(*results))
    is_list = like and isinstance(like, list)
    row[field], why = (texts, reasons) if is_list else (texts[0], reasons[0])
    error = row.get("error")
    if any(reasons):
        if not isinstance(error, dict):
            error = {} if error is None else {"row": error}  # the user's own
        row["error"] = {**error, field: why}
    elif isinstance(error, dict) and error.pop(field, None) and not error:
        del row["error"]  # an earlier run's, no longer true


def read_block(lines, offset):
    """-> rows, and [(byte offset, row)] of those that are JSON objects"""
    rows, good = [], []
    for line in lines:
        row, why = parse_row(line)
        rows.append(row)
        if why is None:
            good.append((offset, row))
        offset += len(line)
    return rows, good


def write_rows(args, make, fields):
    """Write every row of IN with `fields` to OUT, a block of rows at a time."""
    status = os.stat(args.input)
    settings = {name: value for name, value in vars(args).items()
                if name not in ("make", "input", "output", "device")}
    settings |= {"input_size": status.st_size, "input_mtime_ns": status.st_mtime_ns}
    outcomes, rows_written = Counter(), 0
    with continued(args.output, settings, BLOCK) as out:
        if out.finished:
            return print(f"{args.output} is finished")
        with open_rows(args.input) as f, progress(initial=out.done) as bar:
            offset = sum(map(len, islice(f, out.done)))
            while lines := list(islice(f, BLOCK)):
                rows, good = read_block(lines, offset)
                results = make([(at, as_list(row.get(args.field))) for at, row in good])
                for (_, row), entries in zip(good, results):  # entries: for each text its n results
                    outcomes.update(why or "made" for entry in entries for _, why in entry)
                    for field, version in zip(fields, zip(*entries)):
                        put_texts(row, field, row.get(args.field), list(version))
                out.append(map(to_line, rows))
                rows_written, offset = rows_written + len(rows), offset + sum(map(len, lines))
                outcomes["not a JSON object, kept as text"] += len(rows) - len(good)
                bar.update(len(rows))
        out.finish()
    print(f"{rows_written} rows" + (f" after {out.done} of an earlier launch" if out.done else ""))
    for outcome, count in (+outcomes).most_common():
        print(f"{count:9d}  {outcome}")


def check_fields(args, rows, fields):
    """The first 1,000 rows must have the field to read, and none of those to make."""
    there = {key for row in rows for key, value in row.items() if value is not None}
    if rows and args.field not in there:
        die(f"none of the first {len(rows)} rows of {args.input} has {args.field}, only "
            f"{', '.join(sorted(there))}")
    if already := ", ".join(sorted(there & set(fields))):
        die(f"{args.input} has {already} already: --source gives the new ones another name")


if __name__ == "__main__":
    main()
