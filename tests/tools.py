"""How the tests run a tool of data/, and what several of them need."""
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from conftest import run


def run_tool(name, *arguments, **more):
    """`python -m data.NAME ...` from the root. -> CompletedProcess"""
    return run(f"data/{name.replace('.', '/')}.py", *arguments, **more)


def works(name, *arguments, **more):
    """A run of a tool that must succeed. -> CompletedProcess"""
    done = run_tool(name, *arguments, **more)
    assert done.returncode == 0, done.stderr
    return done


def fill(folder, files):
    """Write {name: bytes or text} below a folder. -> the folder"""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def word_tokenizer(words, *ends):
    """Ids are places in `words`. A text gets the tokens `ends` around it, the last behind it."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join([*ends[:-1], "$A", ends[-1]]),
        special_tokens=[(end, words.index(end)) for end in ends])
    return tokenizer
