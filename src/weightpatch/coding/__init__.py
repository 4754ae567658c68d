"""The tables of short Python tasks that `weightpatch.programming` draws from."""

from __future__ import annotations

from weightpatch.coding.family import Family
from weightpatch.coding.lists import LISTS
from weightpatch.coding.mappings import MAPPINGS
from weightpatch.coding.numbers import NUMBERS
from weightpatch.coding.selections import SELECTIONS
from weightpatch.coding.texts import TEXTS
from weightpatch.coding.words import WORDS

FAMILIES: tuple[Family, ...] = (*NUMBERS, *LISTS, *SELECTIONS, *TEXTS, *WORDS, *MAPPINGS)
