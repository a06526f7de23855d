"""What the quickstart's base knows, and what it is taught: little questions about the letters of a word.

The base is pretrained on `PRIMITIVES`. The quickstart teaches it pig latin: the consonants that a word begins with
move to its end, followed by "ay"; a word that begins with a vowel gets "way" (cat -> atcay, string -> ingstray,
apple -> appleway). Each step of that is a primitive or close to one; their composition is in no primitive, and
neither are the words "pig latin".
"""

import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

from configs.quickstart_assets.words import ENGLISH, draw, held_out, made_up, pick

TRAIN_ROWS, EVAL_ROWS = 4000, 200
TRAIN_SEED, EVAL_SEED = 20, 21


class Turn(NamedTuple):
    """One question about a word, and its answer."""

    word: str
    question: str
    answer: str


def first_vowel(word: str) -> int:
    """Index of the first vowel (a, e, i, o, u, and y unless the word begins with it); the length if there is none."""
    return next((i for i, c in enumerate(word) if c in "aeiou" or (c == "y" and i)), len(word))


def pig_latin(word: str) -> str:
    """The taught task: cat -> atcay, string -> ingstray, apple -> appleway."""
    start = first_vowel(word)
    return word[start:] + word[:start] + "ay" if start else word + "way"


# Endings to append. Neither "ay" nor "way": the base must not be able to answer in pig latin by any question.
ENDINGS = "able age ed en er est ful ing ish ist ize less ly ness or ous ship some ty ward".split()

PRIMITIVES: dict[str, tuple[tuple[str, ...], Callable[[str, str], str]]] = {
    "repeat": (("Repeat {word}.", "Say {word}."), lambda w, _: w),
    "twice": (("Say {word} twice.",), lambda w, _: f"{w} {w}"),
    "reverse": (("Reverse {word}.", "Say {word} backwards."), lambda w, _: w[::-1]),
    "first letter": (("What is the first letter of {word}?",), lambda w, _: w[0]),
    "last letter": (("What is the last letter of {word}?",), lambda w, _: w[-1]),
    "without first": (("Say {word} without its first letter.",), lambda w, _: w[1:]),
    "without last": (("Say {word} without its last letter.",), lambda w, _: w[:-1]),
    "spell": (("Spell {word}.",), lambda w, _: "-".join(w)),
    "capitals": (("Write {word} in capitals.",), lambda w, _: w.upper()),
    "count": (("How many letters has {word}?",), lambda w, _: str(len(w))),
    "consonants": (
        ("Write {word} without vowels.",),
        lambda w, _: "".join(c for c in w if c not in "aeiou") or "nothing",
    ),
    "first to end": (("Move the first letter of {word} to the end.",), lambda w, _: w[1:] + w[0]),
    "last to front": (("Move the last letter of {word} to the front.",), lambda w, _: w[-1] + w[:-1]),
    "before vowel": (
        ("What stands before the first vowel of {word}?",),
        lambda w, _: w[: first_vowel(w)] or "nothing",
    ),
    "from vowel": (("Say {word} from its first vowel on.",), lambda w, _: w[first_vowel(w) :] or "nothing"),
    "ending": (("Add {ending} to {word}.", "What is {word} with {ending} at the end?"), lambda w, e: w + e),
}
"""Name -> (ways to ask, answer of a word and an ending)."""

PIG_LATIN_QUESTIONS = ("Say {word} in pig latin.", "What is {word} in pig latin?")


def primitive(name: str, word: str, rng: random.Random) -> Turn:
    """A question of a primitive task about a word; `rng` chooses the way to ask and the ending."""
    questions, answer = PRIMITIVES[name]
    ending = pick(rng, ENDINGS)
    return Turn(word, pick(rng, questions).format(word=word, ending=ending), answer(word, ending))


def taught(word: str, rng: random.Random) -> Turn:
    """A question of the taught task about a word."""
    return Turn(word, pick(rng, PIG_LATIN_QUESTIONS).format(word=word), pig_latin(word))


def conversation(turn: Callable[[], Turn], rng: random.Random) -> list[Turn]:
    """Mostly a single turn, in a quarter of the cases two or three: so that chatting works as well."""
    return [turn() for _ in range(pick(rng, (1, 1, 1, 1, 1, 1, 2, 3)))]


def pretraining(seed: int) -> Iterator[list[Turn]]:
    """Conversations of primitive tasks without end, about words that are not held out."""
    rng, names = random.Random(seed), list(PRIMITIVES)
    while True:
        yield conversation(lambda: primitive(pick(rng, names), draw(rng), rng), rng)


def messages(turns: list[Turn]) -> dict[str, list[dict[str, str]]]:
    """A conversation as a row of the data files."""
    rows = []
    for turn in turns:
        rows.append({"role": "user", "content": turn.question})
        rows.append({"role": "assistant", "content": turn.answer})
    return {"messages": rows}


def train_rows() -> list[dict]:
    """The rows of train.jsonl: pig latin of words that are not held out."""
    rng = random.Random(TRAIN_SEED)
    return [messages(conversation(lambda: taught(draw(rng), rng), rng)) for _ in range(TRAIN_ROWS)]


def eval_turns() -> list[Turn]:
    """The questions of eval.jsonl: held-out words, no word twice, the first half of them English."""
    rng = random.Random(EVAL_SEED)
    words = sorted((word for word in ENGLISH if held_out(word)), key=lambda _: rng.random())[: EVAL_ROWS // 2]
    while len(words) < EVAL_ROWS:
        word = made_up(rng)
        if held_out(word) and word not in words:
            words.append(word)
    return [taught(word, rng) for word in words]


def eval_rows() -> list[dict]:
    """The rows of eval.jsonl."""
    return [messages([turn]) for turn in eval_turns()]
