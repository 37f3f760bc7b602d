"""Train a small BPE tokenizer on the captions of a JSONL file.

    python -m data.make_tokenizer captions.jsonl tokenizer.json --text alt rewrite_chatgpt \\
        --vocab-size 4096

For a small data set, or a vocabulary of its own. Byte-level BPE over lower-cased text, like OpenAI
CLIP's. The tokenizer itself adds <|startoftext|> and <|endoftext|> around every text. They have the
two largest ids, so a tool that pools at the largest id finds the end.
"""
from tokenizers import (Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors,
                        trainers)

from data.common import check_output, die, in_one_line, new_parser, number
from data.rows import new_file, read_rows
from data.texts import texts_of

START, END = "<|startoftext|>", "<|endoftext|>"


def read_texts(path, fields):
    """Yield every text of the fields."""
    for _, row in read_rows(path):
        for field in fields:
            for text in texts_of(row.get(field)):
                yield text.encode("utf-8", "replace").decode()


@in_one_line
def main(argv=None):
    parser = new_parser(__doc__)
    parser.add_argument("captions", help="JSONL")
    parser.add_argument("output", help="tokenizer.json")
    parser.add_argument("--text", nargs="+", default=["alt"], metavar="FIELD", help="default: alt")
    parser.add_argument("--vocab-size", type=number(int, 259), default=4096,
                        help="with the start and end tokens (default: 4096)")
    args = parser.parse_args(argv)
    check_output(args.output, args.captions)
    if next(read_texts(args.captions, args.text), None) is None:
        die(f"{args.captions} has no text in {' '.join(args.text)}")

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([
        normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip(),
        normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(read_texts(args.captions, args.text), trainers.BpeTrainer(
        vocab_size=args.vocab_size - 2, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    tokenizer.add_special_tokens([START, END])
    ids = [(token, tokenizer.token_to_id(token)) for token in (START, END)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{START} $A {END}",
                                                             special_tokens=ids)
    with new_file(args.output) as f:
        f.write(tokenizer.to_str(pretty=True).encode())
    print(f"{args.output}: {tokenizer.get_vocab_size()} tokens")


if __name__ == "__main__":
    main()
