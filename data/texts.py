"""Texts of any script: their words, their lines."""
import re

# Han and hiragana; katakana, one word a run; Thai, Lao, Burmese, Khmer: scripts without blanks
TWOS = "\u3005-\u3007\u3040-\u309f\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
NO_BLANKS = re.compile(f"([{TWOS}]{{1,2}}|[\u30a0-\u30ff\uff66-\uff9f]+"
                       "|[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]{1,4})")
# Controls, marks of direction, lone surrogates, hidden tags; not the joiners of emoji and Persian
CONTROLS = re.compile("[\0-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
                      "\ud800-\udfff\ufeff\U000e0000-\U000e007f]")


def words_of(text):
    """The words of a text: what stands between blanks and holds a letter or a digit. In a script
    without blanks two characters count as a word, and four in Thai and its like."""
    return [word for word in NO_BLANKS.sub(r" \1 ", text).split() if any(map(str.isalnum, word))]


def texts_of(value):
    """The usable texts of a caption field: a text, a list of texts and nulls, or absent."""
    entries = value if isinstance(value, list) else [value]
    return [text for text in entries if isinstance(text, str) and text.strip()]


def one_line(text):
    """The text without control characters, all white space as single blanks"""
    return " ".join(CONTROLS.sub(" ", text).split())
