"""Synonyms for data/baselines.py, from WordNet's own dictionary files."""
import os
import re
from functools import cache

from data.common import die
from data.filter_captions import STOP_WORDS


class WordNet:
    """Synonyms from WordNet's own files (wndb(5WN)); inflected words by its rules (morphy(7WN))."""

    ENDINGS = {  # part of speech: what an inflected word ends in, and its base form
        "noun": [("s", ""), ("ses", "s"), ("xes", "x"), ("zes", "z"), ("ches", "ch"),
                 ("shes", "sh"), ("men", "man"), ("ies", "y")],
        "verb": [("s", ""), ("ies", "y"), ("es", "e"), ("es", ""), ("ed", "e"), ("ed", ""),
                 ("ing", "e"), ("ing", "")],
        "adj": [("er", ""), ("est", ""), ("er", "e"), ("est", "e")], "adv": []}

    def __init__(self, folder):
        self.folder, self.index, self.data, self.irregular = folder, {}, {}, {}
        for pos in self.ENDINGS:
            try:
                for name in ("index", "data", "exc"):
                    path = os.path.join(folder, f"{pos}.exc" if name == "exc" else f"{name}.{pos}")
                    with open(path, "rb") as f:
                        content = f.read()
                    if name == "data":
                        self.data[pos] = content
                        continue
                    lines = [line.split() for line in content.decode().splitlines()
                             if line[:1].strip()]  # the licence is indented
                    if name == "exc":  # inflected base base ...
                        self.irregular[pos] = {word: bases for word, *bases in lines}
                    else:  # word pos synset_cnt p_cnt ... synset_offset synset_offset ...
                        self.index[pos] = {line[0]: [*map(int, line[-int(line[2]):])]
                                           for line in lines}
            except OSError as e:
                die(f"--wordnet {folder}: {path}: {e.strerror}; expected data.noun, index.noun, "
                    "noun.exc, ..., of Debian's package wordnet-base in /usr/share/wordnet")
            except (ValueError, LookupError) as e:
                die(f"--wordnet {folder}: {path} is not in WordNet's format: {e}")

    def synonyms(self, word):
        """The synonyms of a word, in lower case; none of a stop word."""
        return self._synonyms(re.sub(r"^\W+|\W+$", "", word.lower()))

    @cache
    def _synonyms(self, word):
        bases = {(base, pos) for pos in self.ENDINGS for base in self.bases(word, pos)}
        found = {synonym for base, pos in bases for offset in self.index[pos][base]
                 for synonym in self.synset(pos, offset)}
        found -= {word} | {base for base, _ in bases}
        return () if word in STOP_WORDS else tuple(sorted(found))

    def bases(self, word, pos):
        """The word and its base forms, as far as WordNet has them: dogs -> dog, geese -> goose"""
        regular = [word.removesuffix(end) + base for end, base in self.ENDINGS[pos]
                   if word.endswith(end)]
        bases = (word, *self.irregular[pos].get(word, regular))
        return [base for base in bases if base in self.index[pos]]

    def synset(self, pos, offset):
        """The words of the line at `offset`: offset lex_filenum ss_type w_cnt word lex_id ..."""
        try:
            line = self.data[pos][offset:self.data[pos].index(b"\n", offset)].decode().split()
            if line[0] != f"{offset:08d}":
                raise ValueError
            words = line[4:4 + 2 * int(line[3], 16):2]
        except (ValueError, LookupError):
            die(f"--wordnet {self.folder}: index.{pos} expects a synset in data.{pos} at {offset}")
        words = [re.sub(r"\(\w+\)$", "", word) for word in words]  # galore(ip)
        return [word.replace("_", " ").lower() for word in words]
