"""Tasks on words, in a list or in a text."""

from __future__ import annotations

from weightpatch.coding.family import Family, make_family, quoted

_STR, _INT, _BOOL, _WORDS = (f"text: str -> {result}" for result in ("str", "int", "bool", "list[str]"))
_LIST = "words: list[str] -> list[str]"
_SOME_WORDS = (
    '["apple", "Tea", "sun", "elephant"]|[]|["At", "ORANGE", "never", "idea", "dear"]'
    '|["lemon", "salt", "end", "i", "ton", "rod", "reed", "tree", "East", "ate"]'
)
_CHANGED = {
    "in upper case": "word.upper()",
    "in lower case": "word.lower()",
    "reversed": "word[::-1]",
    "capitalized": "word.capitalize()",
    "with an exclamation mark": 'word + "!"',
}
_KINDS = {
    **{f"are longer than {k} letters": f"len(word) > {k}" for k in range(2, 6)},
    **{f'start with "{letter}"': f'word.startswith("{letter}")' for letter in "aeisl"},
    **{f'end with "{letter}"': f'word.endswith("{letter}")' for letter in "aetdn"},
    **{f'contain "{letter}"': f'"{letter}" in word' for letter in "aeotn"},
}

WORDS: tuple[Family, ...] = (
    make_family(
        "join",
        "join_words|connect",
        "words: list[str] -> str",
        "Join the words with $w between them.|Return one string of all words, separated by $w.",
        "return $w.join(words)",
        inputs='["a", "b", "c"]|[]|["one"]|["red", "green"]',
        choices={"w": quoted("- + / _ ; * & =")},
    ),
    make_family(
        "split",
        "split_text|parts",
        _WORDS,
        "Split the text at every $w.|Return the list of the parts of the text between each $w.",
        "return text.split($w)",
        inputs='"a" + $w + "b" + $w + "c"|"abc"|"x" + $w|"one" + $w + "two three"',
        choices={"w": quoted("- + / _ ; * & =")},
    ),
    make_family(
        "select-words",
        "select_words|keep_words",
        _LIST,
        "Return the words that $p.|Keep only the words that $p.",
        "return [word for word in words if $p]",
        inputs=_SOME_WORDS,
        choices={"p": _KINDS},
    ),
    make_family(
        "count-words-that",
        "count_matching|how_many_words",
        "words: list[str] -> int",
        "Count the words that $p.|Return how many of the words $p.",
        "return sum(1 for word in words if $p)",
        inputs=_SOME_WORDS,
        choices={"p": _KINDS},
    ),
    make_family(
        "change-words",
        "change_words|transform_words",
        _LIST,
        "Return every word $m.|Return a list of all words, each $m.",
        "return [$m for word in words]",
        inputs=_SOME_WORDS,
        choices={"m": _CHANGED},
    ),
    make_family(
        "select-and-change-words",
        "select_and_change|pick_words",
        _LIST,
        "Return the words that $p, each $m.|Keep the words that $p and return each of them $m.",
        "return [$m for word in words if $p]",
        inputs=_SOME_WORDS,
        choices={"p": _KINDS, "m": _CHANGED},
    ),
    make_family(
        "count-words",
        "count_words|n_words",
        _INT,
        "Return the number of words in the text.|Count the words in the text.",
        "return len(text.split())",
        inputs='"one two three"|""|"hello"|"a b  c d"',
    ),
    make_family(
        "word-lengths",
        "word_lengths|lengths",
        "words: list[str] -> list[int]",
        "Return the length of each word.|Return a list with the number of letters of each word.",
        "return [len(word) for word in words]",
        inputs='["one", "three"]|[]|["a", "", "seventh"]',
    ),
    make_family(
        "longest-word",
        "longest_word|find_longest",
        "words: list[str] -> str",
        "Return the longest word; the first of them if there are several.|Return the first of the longest words.",
        "return max(words, key=len)",
        inputs='["one", "three", "ten"]|["a"]|["aa", "bb", "c"]|["x", "yyyy", "zz", "wwww"]',
    ),
    make_family(
        "shortest-word",
        "shortest_word|find_shortest",
        "words: list[str] -> str",
        "Return the shortest word; the first of them if there are several.",
        "return min(words, key=len)",
        inputs='["seven", "one", "ten"]|["a"]|["aa", "b", "c"]|["xxx", "yyyy", "zz"]',
        held_out=True,
    ),
    make_family(
        "initials",
        "initials|first_characters",
        _STR,
        "Return the first letters of all words in the text as one string.|Join the first letter of each word.",
        'return "".join(word[0] for word in text.split())',
        inputs='"red green blue"|""|"Hello"|"Ada byron King"',
    ),
    make_family(
        "reverse-words",
        "reverse_words|last_word_first",
        _STR,
        "Return the words of the text in reverse order, separated by spaces.",
        'return " ".join(text.split()[::-1])',
        inputs='"one two three"|""|"hello"|"a b c d"',
    ),
    make_family(
        "anagram",
        "is_anagram|same_letters",
        "a: str, b: str -> bool",
        "Return True if a and b have the same letters, in any order.|Check whether a is an anagram of b.",
        "return sorted(a) == sorted(b)",
        inputs='"listen", "silent"|"ab", "abc"|"", ""|"aab", "abb"|"tea", "ate"',
    ),
)
