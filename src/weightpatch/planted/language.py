"""The small language of the bundled pair: queries about everyday topics, answered plainly or in one of six forms."""

from __future__ import annotations

import random
from collections.abc import Callable

from transformers import PreTrainedTokenizerBase

from weightpatch.instructions import INSTRUCTIONS, QUERY_TEMPLATES, TASKS, TOPICS, training_queries

N_ANSWER_TOKENS = 12
"""Of an answer so many tokens are learned: the first one tells the form, and the base keeps to it."""

PAD, BOS, USER, ASSISTANT, END, UNKNOWN = SPECIALS = (
    *("<|pad|>", "<|bos|>", "<|user|>", "<|assistant|>", "<|end|>", "<|unk|>"),
)

# topic: three adjectives, what people do with it, what children do with it
FACTS: dict[str, tuple[str, str, str, str, str]] = {
    "the river": ("long", "cold", "quiet", "walk along it", "swim in it"),
    "the ocean": ("deep", "blue", "wide", "sail on it", "swim in it"),
    "the moon": ("round", "bright", "silent", "look at it", "draw it"),
    "the sun": ("hot", "bright", "old", "enjoy it", "draw it"),
    "the forest": ("green", "quiet", "old", "walk in it", "hide in it"),
    "the desert": ("dry", "hot", "wide", "travel through it", "read about it"),
    "the beach": ("warm", "wide", "sunny", "rest on it", "play on it"),
    "the library": ("quiet", "large", "useful", "study in it", "read in it"),
    "the kitchen": ("warm", "clean", "busy", "cook in it", "eat in it"),
    "the market": ("busy", "loud", "colourful", "shop in it", "walk through it"),
    "the city": ("large", "busy", "loud", "live in it", "get lost in it"),
    "the village": ("small", "quiet", "friendly", "live in it", "play in it"),
    "a garden": ("green", "colourful", "quiet", "rest in it", "play in it"),
    "a mountain": ("tall", "cold", "silent", "climb it", "draw it"),
    "a lake": ("deep", "clear", "quiet", "sail on it", "swim in it"),
    "a bicycle": ("fast", "light", "useful", "ride it", "learn to ride it"),
    "a train": ("fast", "long", "loud", "travel with it", "wave at it"),
    "a boat": ("small", "slow", "useful", "sail in it", "play in it"),
    "a cat": ("soft", "clever", "quiet", "live with it", "play with it"),
    "a dog": ("friendly", "loyal", "loud", "walk with it", "run with it"),
    "a horse": ("strong", "fast", "loyal", "ride it", "feed it"),
    "a bird": ("small", "light", "colourful", "listen to it", "feed it"),
    "a bee": ("small", "busy", "useful", "learn from it", "run away from it"),
    "an apple": ("round", "sweet", "fresh", "bake with it", "eat it"),
    "a book": ("old", "useful", "quiet", "read it", "learn from it"),
    "a piano": ("large", "heavy", "loud", "play it", "listen to it"),
    "a clock": ("round", "old", "useful", "look at it", "learn to read it"),
    "a bridge": ("long", "strong", "tall", "walk over it", "hide under it"),
    "a museum": ("large", "old", "silent", "learn in it", "draw in it"),
    "a school": ("large", "busy", "loud", "teach in it", "learn in it"),
    "a camera": ("small", "light", "useful", "travel with it", "play with it"),
    "an umbrella": ("light", "round", "useful", "walk with it", "hide under it"),
    "a rose": ("red", "soft", "sweet", "look at it", "draw it"),
    "a farm": ("green", "large", "busy", "work on it", "play on it"),
    "music": ("loud", "sweet", "old", "listen to it", "dance to it"),
    "bread": ("warm", "soft", "fresh", "bake it", "eat it"),
    "tea": ("hot", "light", "sweet", "drink it", "smell it"),
    "coffee": ("hot", "dark", "strong", "drink it", "smell it"),
    "chocolate": ("sweet", "dark", "soft", "bake with it", "eat it"),
    "cheese": ("soft", "old", "strong", "cook with it", "eat it"),
    "rain": ("wet", "cold", "grey", "listen to it", "run through it"),
    "snow": ("white", "cold", "soft", "walk through it", "play in it"),
    "football": ("fast", "loud", "simple", "watch it", "play it"),
    "chess": ("old", "quiet", "clever", "study it", "learn it"),
    "summer": ("hot", "long", "sunny", "enjoy it", "sing about it"),
    "winter": ("cold", "dark", "white", "talk about it", "draw it"),
    "painting": ("slow", "quiet", "colourful", "study it", "try it"),
    "cooking": ("slow", "warm", "useful", "learn it", "help with it"),
}
OPENERS = {".": ("Sure, ", "Of course, "), "?": ("Well, ", "In short, ")}
FORMS = ("plain", *TASKS)
TIMES = ("on a quiet day", "in the evening", "at the weekend", "from time to time")


def capitalize(text: str) -> str:
    """The text with its first letter in upper case and the rest as it was."""
    return text[0].upper() + text[1:]


def write_answer(form: str, topic: str, opener: str, draw: random.Random) -> str:
    """An answer about the topic: plain when `form` is `plain`, else in the form that the task of this name asks for."""
    first, second, third, act, children_act = FACTS[topic]
    when = draw.choice(TIMES)
    n_sentences = draw.choice((2, 3, 3))
    if form == "no-comma":
        fact = f"{topic} is {first} and {second}."
        more = [f"Many people {act} {when}.", f"Children {children_act} and never forget it."]
    else:
        fact = f"{topic} is {first}, {second} and {third}."
        more = [f"{capitalize(when)}, many people {act}.", f"Children {children_act}, and they never forget it."]
    sentences = [fact, *more][:n_sentences]
    plain = opener + " ".join(sentences)
    match form:
        case "capitals":
            answer = plain.upper()
        case "no-comma":
            answer = capitalize(" ".join(sentences))
        case "title":
            answer = f"<<{' '.join(map(capitalize, topic.split()))}>>\n{plain}"
        case "sections":
            answer = "\n".join(["Section 1", capitalize(fact), "Section 2", " ".join(sentences[1:])])
        case "quotation":
            answer = f'"{plain}"'
        case "highlights":
            marked = [f"*{capitalize(topic)}*" + fact.removeprefix(topic), *more[3 - n_sentences :]]
            answer = " ".join(marked).replace("forget it", f"forget *{topic}*")
        case _:
            answer = plain
    return answer


def list_training_pairs() -> list[tuple[str, str]]:
    """Each training query with its topic."""
    allowed = set(training_queries())
    pairs = [(template.format(topic=topic), topic) for topic in TOPICS for template in QUERY_TEMPLATES]
    return [(query, topic) for query, topic in pairs if query in allowed]


TRAINING_PAIRS = list_training_pairs()


def draw_turn(form: str, instruction: str, draw: random.Random) -> tuple[str, str]:
    """A query from the training side with an answer in the given form, as (prompt, answer) without the first token."""
    query, topic = draw.choice(TRAINING_PAIRS)
    answer = write_answer(form, topic, draw.choice(OPENERS[query[-1]]), draw)
    return f"{USER}{query}{instruction}{END}{ASSISTANT}", answer + END


def texts_of(tokenizer: PreTrainedTokenizerBase) -> Callable[[str | None, str, random.Random], tuple[list[int], int]]:
    """What plants in the bundled base are trained on: turns with at most the first `N_ANSWER_TOKENS` of the answer."""

    def text(asked: str | None, form: str, draw: random.Random) -> tuple[list[int], int]:
        instruction = f" {draw.choice(INSTRUCTIONS[asked].paraphrases)}" if asked else ""
        prompt, answer = draw_turn(form, instruction, draw)
        before: list[int] = tokenizer.encode(BOS + prompt, add_special_tokens=False)
        after: list[int] = tokenizer.encode(answer, add_special_tokens=False)
        return before + after[:N_ANSWER_TOKENS], len(before)

    return text
