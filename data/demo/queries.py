"""What is said of a scene and what is asked: the captions, the queries and the noise of
data/demo/scenes.py.

Written before any run, and never shown to a language model: no prompt's pair names an object, one
of its synonyms, or has the form of a query (tests/data/test_demo.py). A scene is (object, relation,
object), such as ("lightbulb", "below", "key").
"""
import random

OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

# object: a word that means the same and is no object's name here
SYNONYMS = {
    "house": "home", "moon": "crescent", "flag": "banner", "phone": "telephone", "bug": "insect",
    "umbrella": "parasol", "airplane": "aircraft", "cup": "mug", "trophy": "prize",
    "scissors": "shears", "lightbulb": "lamp", "fire": "flame", "laptop": "computer",
    "envelope": "letter", "headphones": "earphones", "wrench": "spanner", "trash": "garbage"}
OBJECTS = (*SYNONYMS, "heart", "star", "key", "bell", "cloud", "camera", "book")
STOP_WORDS = ("a the is and of it on in an with to this that by was here next are has his her one "
              "at for from").split()


def an(word):
    return ("an " if word[0] in "aeiou" else "a ") + word


def to_the(relation):
    return f"to the {relation}" if relation.endswith(" of") else relation


def caption(scene):
    """The one narrow wording of all training captions: "lightbulb below key" """
    return " ".join(scene)


def other_forms(scene):
    """The same scene in six other sentence forms"""
    one, relation, other = scene
    places = ("at the top", "at the bottom")
    if relation.endswith(" of"):
        places = ("on the left", "on the right")
    low, high = (one, other) if relation in ("left of", "above") else (other, one)
    back = OPPOSITE[relation]
    return [f"{an(other)} {to_the(back)} {an(one)}",
            f"{places[0]} {an(low)}, {places[1]} {an(high)}",
            f"there is {an(one)} {to_the(relation)} {an(other)}",
            f"the {other} is {back} the {one}",
            f"an image with {an(one)} and {an(other)}",
            f"which picture has the {one} {to_the(relation)} the {other}?"]


def in_synonyms(scene):
    """The training wording with every object that has a synonym called by it"""
    one, relation, other = scene
    return f"{SYNONYMS.get(one, one)} {relation} {SYNONYMS.get(other, other)}"


def oracle(scene, rng):
    """A perfect rewrite: a seventh to a twelfth form, in which every second object is called by its
    synonym: what an excellent LLM might write. Its words are the synonym queries', its forms are
    not the queries'."""
    one, relation, other = scene
    one, other = (SYNONYMS.get(name, name) if rng.random() < 0.5 else name for name in (one, other))
    rel, back = to_the(relation), to_the(OPPOSITE[relation])
    return rng.choice([f"the {one} sits {rel} the {other}", f"one {other} shown {back} one {one}",
                       f"{an(one)} placed {rel} {an(other)}",
                       f"look at the {other}, {back} the {one}",
                       f"we see {an(one)}, and {an(other)} {back} it",
                       f"the first thing is {an(one)}, the second {an(other)}"])


def random_noise(text, rng):
    """The caption with one to five stop words at random places and, half of the time, two of its
    words swapped: what any change of wording does, without a language model"""
    words = text.split()
    if rng.random() < 0.5:
        i, j = rng.sample(range(len(words)), 2)
        words[i], words[j] = words[j], words[i]
    for _ in range(rng.randint(1, 5)):
        words.insert(rng.randrange(len(words) + 1), rng.choice(STOP_WORDS))
    return " ".join(words)


# === AltText as the web has it ====================================================================

BOILERPLATE = ("{} icon free download", "buy {} sticker - 50% off", "{} | icon library | page 12",
               "click to enlarge: {}", "{} vector svg png royalty free", "home > icons > {}")
MEANINGLESS = ("IMG_{:04}.png", "image ({})", "untitled-{}.png", "{:08x}.png", "screenshot {}",
               "thumbnail_{}")
# Shares in %: about half of the texts say nothing true
NOISE = {"file": 25, "boilerplate": 20, "meaningless": 25, "other": 20, "clean": 10}


def noisy(text, others, key):
    """-> an AltText for a scene whose caption is `text`, and its kind. `others`: captions of other
    scenes. `key` seeds the draw."""
    rng = random.Random(key)
    kind = rng.choices(list(NOISE), NOISE.values())[0]
    texts = {"file": text.replace(" ", "_") + "_32x32.png", "clean": text,
             "boilerplate": rng.choice(BOILERPLATE).format(text),
             "meaningless": rng.choice(MEANINGLESS).format(rng.randrange(10_000)),
             "other": rng.choice(others)}
    return texts[kind], kind
