"""Train a small BPE tokenizer on the captions of a JSONL file, for vocabularies far from the web's 49,408 words.

    python data/make_tokenizer.py captions.jsonl tokenizer.json --text alt rewrite_chatgpt --vocab-size 4096

Byte-level BPE over lower-cased text, as OpenAI CLIP's; <|startoftext|> and <|endoftext|> are added around every text by
the tokenizer itself and have the two largest ids, so that tools which pool at the largest id find the end.
"""
import argparse
import json
import os
import sys

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

START, END = "<|startoftext|>", "<|endoftext|>"


def die(message):
    print(f"make_tokenizer.py: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def read_texts(path, fields):
    """Every text of the fields, one after the other; lines that are no JSON object have none."""
    with open(path, "rb") as f:
        for line in f:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            for field in fields if isinstance(row, dict) else []:
                value = row.get(field)
                for text in value if isinstance(value, list) else [value]:
                    if isinstance(text, str):
                        yield text.encode("utf-8", "replace").decode()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = die
    parser.add_argument("captions", help="JSONL")
    parser.add_argument("output", help="tokenizer.json")
    parser.add_argument("--text", nargs="+", default=["alt"], metavar="FIELD", help="caption fields (default: alt)")
    parser.add_argument("--vocab-size", type=int, default=4096, help="start and end tokens included (default: 4096)")
    args = parser.parse_args(argv)
    if not os.path.isfile(args.captions):
        die(f"{args.captions}: no such file")
    if next(read_texts(args.captions, args.text), None) is None:
        die(f"{args.captions} has no text in {' '.join(args.text)}")

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([
        normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(read_texts(args.captions, args.text), trainers.BpeTrainer(
        vocab_size=args.vocab_size - 2, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tokenizer.add_special_tokens([START, END])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(t, tokenizer.token_to_id(t)) for t in (START, END)])
    tokenizer.save(args.output + ".tmp")
    os.replace(args.output + ".tmp", args.output)
    print(f"{args.output}: {tokenizer.get_vocab_size()} tokens")


if __name__ == "__main__":
    main()
