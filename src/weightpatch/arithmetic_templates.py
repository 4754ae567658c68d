"""The table of word problem templates: questions, numbers, steps and the sentences that work them out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

Step = tuple[str, str, str]
"""Left operand, operation, right operand; operands are letters of `numbers`, or `r`, the result of the first step."""

NAMES: tuple[str, ...] = (
    *("Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Henry", "Ida", "Jack", "Kate", "Leo", "Maria"),
    *("Noah", "Olivia", "Paul", "Rosa", "Sam", "Tara", "Victor", "Wendy", "Yusuf", "Zoe", "Amir", "Bianca", "Chen"),
    *("Dora", "Elias", "Fatima", "George", "Hanna", "Ivan", "Jade", "Kofi", "Lena", "Milo", "Nina", "Omar", "Priya"),
)
THINGS: tuple[str, ...] = (
    *("apples", "pencils", "marbles", "stickers", "cookies", "books", "oranges", "shells", "buttons", "stamps"),
    *("flowers", "balloons", "cards", "coins", "beads", "candles", "cups", "lemons", "muffins", "stones", "photos"),
    *("postcards", "peaches", "bottles", "walnuts", "crayons", "toy cars", "keys", "plums", "eggs"),
)
_PACKED = ("pencils", "cookies", "eggs", "muffins", "candles", "crayons", "cups", "bottles", "plums", "beads")
_MADE = ("cookies", "muffins", "candles", "cards", "pancakes", "paper stars", "necklaces", "sandwiches", "bowls")
_SOLD = ("tickets", "notebooks", "cakes", "lamps", "scarves", "plants", "hats", "posters", "baskets", "umbrellas")
_GROWN = ("tomato plants", "rose bushes", "apple trees", "sunflowers", "tulips", "cabbages", "young trees", "pumpkins")

_SMALL, _MEDIUM, _LARGE = (2, 12), (5, 60), (20, 95)


@dataclass(frozen=True, kw_only=True)
class Template:
    """One kind of problem.

    Attributes:
        name: Unique.
        question: Text with `{name}`, `{friend}`, `{things}` and the letters of `numbers`.
        numbers: Smallest and largest value of each letter.
        steps: One or two operations.
        sentences: One for each step; `{step}` is its equation, `{r}` and `{s}` the results.
        things: What `{things}` may be; none: any of `THINGS`.
        largest: No result lies above it.
        held_out: Never used for training.
    """

    name: str
    question: str
    numbers: Mapping[str, tuple[int, int]] = field(default_factory=lambda: MappingProxyType({}))
    steps: tuple[Step, ...]
    sentences: tuple[str, ...]
    things: tuple[str, ...] = ()
    largest: int = 200
    held_out: bool = False


_USUAL: Mapping[str, Mapping[str, tuple[int, int]]] = MappingProxyType(
    {
        "+": {"a": _MEDIUM, "b": _MEDIUM},
        "-": {"a": _LARGE, "b": _MEDIUM},
        "*": {"a": _SMALL, "b": _SMALL},
        "/": {"a": (6, 120), "b": _SMALL},
    }
)


def _template(
    name: str,
    question: str,
    *steps: tuple[str, str],
    numbers: Mapping[str, tuple[int, int]] | None = None,
    things: tuple[str, ...] = (),
    held_out: bool = False,
) -> Template:
    """A template of steps, each an operation as `a + b` and its sentence; usual numbers go with the first of them."""
    operations = [operation.split() for operation, _ in steps]
    return Template(
        name=name,
        question=question,
        numbers=_USUAL[operations[0][1]] if numbers is None else numbers,
        steps=tuple((left, operation, right) for left, operation, right in operations),
        sentences=tuple(sentence for _, sentence in steps),
        things=things,
        held_out=held_out,
    )


TEMPLATES: tuple[Template, ...] = (
    _template(
        "gift",
        "{name} has {a} {things}. {friend} gives {name} {b} more. How many {things} does {name} have now?",
        ("a + b", "{name} has {step} {things} now."),
    ),
    _template(
        "together",
        "{name} has {a} {things} and {friend} has {b} {things}. How many {things} do they have together?",
        ("a + b", "Together they have {step} {things}."),
    ),
    _template(
        "more-than",
        "{name} found {a} {things}. {friend} found {b} more than {name}. How many did {friend} find?",
        ("a + b", "{friend} found {step} {things}."),
        numbers={"a": _MEDIUM, "b": _SMALL},
    ),
    _template(
        "two-days",
        "{name} sold {a} {things} on Monday and {b} on Tuesday. How many {things} is that in total?",
        ("a + b", "In total that is {step} {things}."),
        things=_SOLD,
    ),
    _template(
        "give-away",
        "{name} has {a} {things} and gives {b} of them to {friend}. How many {things} are left?",
        ("a - b", "{step} {things} are left."),
    ),
    _template(
        "lost",
        "There were {a} {things} in a box. {name} took out {b}. How many {things} are still in the box?",
        ("a - b", "There are {step} {things} still in the box."),
    ),
    _template(
        "difference",
        "{name} has {a} {things}. {friend} has {b}. How many more {things} does {name} have?",
        ("a - b", "{name} has {step} more {things}."),
    ),
    _template(
        "missing",
        "{name} wants to collect {a} {things} and already has {b}. How many {things} are missing?",
        ("a - b", "{step} {things} are missing."),
    ),
    _template(
        "boxes",
        "{name} packs {b} {things} into each of {a} boxes. How many {things} does {name} pack?",
        ("a * b", "{name} packs {step} {things}."),
        things=_PACKED,
    ),
    _template(
        "price",
        "One of the {things} costs {b} dollars. {name} buys {a} of them. How many dollars does {name} pay?",
        ("a * b", "{name} pays {step} dollars."),
        things=_SOLD,
    ),
    _template(
        "rows",
        "{name} plants {a} rows of {things} with {b} in each row. How many {things} does {name} plant?",
        ("a * b", "{name} plants {step} {things}."),
        things=_GROWN,
    ),
    _template(
        "per-day",
        "{name} makes {b} {things} every day. How many {things} does {name} make in {a} days?",
        ("a * b", "In {a} days {name} makes {step} {things}."),
        things=_MADE,
    ),
    _template(
        "share",
        "{name} shares {a} {things} equally among {b} friends. How many {things} does each friend get?",
        ("a / b", "Each friend gets {step} {things}."),
    ),
    _template(
        "bags",
        "{name} puts {a} {things} into bags of {b}. How many bags does {name} fill?",
        ("a / b", "{name} fills {step} bags."),
    ),
    _template(
        "unit-price",
        "{name} pays {a} dollars for {b} {things} of the same price. How many dollars does each cost?",
        ("a / b", "Each costs {step} dollars."),
        things=_SOLD,
    ),
    _template(
        "pages",
        "A book has {a} pages. {name} has read {b} of them. How many pages are left to read?",
        ("a - b", "{step} pages are left to read."),
        held_out=True,
    ),
    _template(
        "cars",
        "There are {a} cars and {b} people sit in each of them. How many people sit in the cars?",
        ("a * b", "{step} people sit in the cars."),
        numbers={"a": _SMALL, "b": (2, 7)},
        held_out=True,
    ),
    _template(
        "gain-lose",
        "{name} has {a} {things}, buys {b} more and then loses {c}. How many {things} does {name} have?",
        ("a + b", "{name} first has {step} {things}."),
        ("r - c", "After losing {c} there are {step} {things}."),
        numbers={"a": _MEDIUM, "b": _MEDIUM, "c": _SMALL},
    ),
    _template(
        "lose-gain",
        "{name} had {a} {things}. {name} gave {b} to {friend} and later got {c} more. How many now?",
        ("a - b", "After giving {b} away {name} had {step} {things}."),
        ("r + c", "Now there are {step} {things}."),
        numbers={"a": _LARGE, "b": _MEDIUM, "c": _SMALL},
    ),
    _template(
        "three-people",
        "{name} brings {a} {things}, {friend} brings {b} and a neighbour brings {c}. How many is that?",
        ("a + b", "{name} and {friend} bring {step} {things}."),
        ("r + c", "With the neighbour that is {step}."),
        numbers={"a": _MEDIUM, "b": _MEDIUM, "c": _SMALL},
    ),
    _template(
        "lose-twice",
        "A shop had {a} {things}. It sold {b} in the morning and {c} later. How many {things} are left?",
        ("a - b", "After the morning there were {step} {things}."),
        ("r - c", "In the end {step} {things} are left."),
        numbers={"a": _LARGE, "b": _MEDIUM, "c": _SMALL},
        things=_SOLD,
    ),
    _template(
        "boxes-plus",
        "{name} has {a} boxes with {b} {things} each and {c} loose {things}. How many {things} is that?",
        ("a * b", "The boxes hold {step} {things}."),
        ("r + c", "With the loose ones that is {step} {things}."),
        numbers={"a": _SMALL, "b": _SMALL, "c": _SMALL},
        things=_PACKED,
    ),
    _template(
        "boxes-minus",
        "{name} buys {a} packs of {b} {things}. {c} of the {things} are used. How many are left?",
        ("a * b", "{name} buys {step} {things}."),
        ("r - c", "{step} {things} are left."),
        numbers={"a": _SMALL, "b": _SMALL, "c": _SMALL},
        things=_PACKED,
    ),
    _template(
        "change",
        "{name} has {a} dollars and buys {b} {things} for {c} dollars each. How many dollars are left?",
        ("b * c", "The {things} cost {step} dollars."),
        ("a - r", "{step} dollars are left."),
        numbers={"a": (30, 160), "b": _SMALL, "c": _SMALL},
        things=_SOLD,
    ),
    _template(
        "fee",
        "{name} buys {a} {things} for {b} dollars each and pays {c} dollars for delivery. What is the total?",
        ("a * b", "The {things} cost {step} dollars."),
        ("r + c", "With delivery that is {step} dollars."),
        numbers={"a": _SMALL, "b": _SMALL, "c": _SMALL},
        things=_SOLD,
    ),
    _template(
        "pool-share",
        "{name} has {a} {things} and {friend} has {b}. They put them in {c} equal piles. How big is each?",
        ("a + b", "Together they have {step} {things}."),
        ("r / c", "Each pile has {step} {things}."),
        numbers={"a": _MEDIUM, "b": _MEDIUM, "c": _SMALL},
    ),
    _template(
        "keep-share",
        "{name} has {a} {things}, keeps {b} and shares the rest among {c} friends. How many does each get?",
        ("a - b", "There are {step} {things} to share."),
        ("r / c", "Each friend gets {step} {things}."),
        numbers={"a": _LARGE, "b": _SMALL, "c": _SMALL},
    ),
    _template(
        "sum-times",
        "Each day {name} makes {a} {things} and {friend} makes {b}. How many do they make in {c} days?",
        ("a + b", "Each day they make {step} {things}."),
        ("r * c", "In {c} days they make {step} {things}."),
        numbers={"a": _SMALL, "b": _SMALL, "c": (2, 9)},
        things=_MADE,
    ),
    _template(
        "rows-die",
        "{name} plants {a} rows of {b} {things}, but {c} of them do not grow. How many {things} grow?",
        ("a * b", "{name} plants {step} {things}."),
        ("r - c", "{step} {things} grow."),
        numbers={"a": _SMALL, "b": _SMALL, "c": _SMALL},
        things=_GROWN,
    ),
    _template(
        "share-plus",
        "{name} shares {a} {things} equally among {b} boxes, then adds {c} to each. How many in each box?",
        ("a / b", "Each box first holds {step} {things}."),
        ("r + c", "Then each box holds {step} {things}."),
        numbers={"a": (6, 120), "b": _SMALL, "c": _SMALL},
    ),
    _template(
        "share-eat",
        "{a} {things} are shared equally by {b} people. {friend} then loses {c}. How many does {friend} have left?",
        ("a / b", "The share of {friend} is {step} {things}."),
        ("r - c", "{step} {things} are left."),
        numbers={"a": (12, 140), "b": _SMALL, "c": _SMALL},
    ),
    _template(
        "weeks",
        "{name} saves {a} dollars a week for {b} weeks and already had {c} dollars. How many dollars is that?",
        ("a * b", "{name} saves {step} dollars."),
        ("r + c", "With the first {c} dollars that is {step} dollars."),
        numbers={"a": _SMALL, "b": _SMALL, "c": _MEDIUM},
    ),
    _template(
        "times-times",
        "A shelf has {a} boards. On each stand {b} boxes with {c} {things} each. How many {things} is that?",
        ("a * b", "There are {step} boxes."),
        ("r * c", "They hold {step} {things}."),
        numbers={"a": (2, 6), "b": (2, 5), "c": (2, 6)},
    ),
    _template(
        "bus",
        "{a} people are on a bus. {b} get off and {c} get on. How many people are on the bus now?",
        ("a - b", "After {b} got off there are {step} people."),
        ("r + c", "Now there are {step} people."),
        numbers={"a": _MEDIUM, "b": _SMALL, "c": _SMALL},
        held_out=True,
    ),
    _template(
        "tables",
        "A room has {a} tables with {b} chairs each. {name} takes {c} chairs away. How many chairs are left?",
        ("a * b", "The room has {step} chairs."),
        ("r - c", "{step} chairs are left."),
        numbers={"a": _SMALL, "b": _SMALL, "c": _SMALL},
        held_out=True,
    ),
    _template(
        "bake-share",
        "{name} bakes {a} rolls and {friend} bakes {b}. {c} guests share them. How many does each get?",
        ("a + b", "Together they bake {step} rolls."),
        ("r / c", "Each guest gets {step} rolls."),
        numbers={"a": _MEDIUM, "b": _MEDIUM, "c": _SMALL},
        held_out=True,
    ),
)
