"""Grade-school problems: the sentences of a question and the arithmetic that answers it.

Every number stays within 1..MAX_NUMBER and every division is exact, so that each number can be one
piece of the vocabulary. How the arithmetic is written up is said in annotators.py.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

MAX_NUMBER = 120

PEOPLE = (
    *((name, "she") for name in ("Anna", "Clara", "Ella", "Grace", "Ivy", "Julia")),
    *((name, "she") for name in ("Lucy", "Mia", "Nora", "Ruth", "Sara", "Zoe")),
    *((name, "he") for name in ("Adam", "Ben", "Carl", "David", "Felix", "Hugo")),
    *((name, "he") for name in ("Jack", "Leo", "Max", "Noah", "Paul", "Tom")),
)
THINGS = (
    *("apples", "balloons", "beads", "books", "buttons", "candles", "cards", "coins", "cookies"),
    *("cups", "eggs", "flowers", "marbles", "nuts", "pears", "pens", "photos", "plums", "shells"),
    *("stamps", "stickers", "stones", "tickets", "toys"),
)
CONTAINERS = (("bags", "bag"), ("boxes", "box"), ("jars", "jar"), ("packs", "pack"))

_T = TypeVar("_T")


class Draw:
    """Random choices that use only `random.Random.random`, whose sequence Python guarantees."""

    def __init__(self, seed: int):
        self._next = random.Random(seed).random

    def pick(self, options: Sequence[_T]) -> _T:
        return options[int(self._next() * len(options))]

    def between(self, low: int, high: int) -> int:
        """A whole number in [low, high]."""
        return low + int(self._next() * (high - low + 1))

    def chance(self, probability: float) -> bool:
        return self._next() < probability

    def two(self, options: Sequence[_T]) -> tuple[_T, _T]:
        """Two different options."""
        first = int(self._next() * len(options))
        second = (first + 1 + int(self._next() * (len(options) - 1))) % len(options)
        return options[first], options[second]

    def swap(self, pair: tuple[_T, _T]) -> tuple[_T, _T]:
        """The pair in either order."""
        return (pair[1], pair[0]) if self._next() < 0.5 else pair


@dataclass(frozen=True, slots=True)
class Step:
    """One line of arithmetic: what happens, who then holds how many of what, and a label."""

    left: int
    op: str
    right: int
    unit: str
    event: str
    holder: str
    labels: tuple[str, ...]

    @property
    def result(self) -> int:
        match self.op:
            case "+":
                return self.left + self.right
            case "-":
                return self.left - self.right
            case "*":
                return self.left * self.right
        return self.left // self.right


@dataclass(frozen=True, slots=True)
class Problem:
    """The sentences of a question, what it asks for (`ask` after the unit), and the solution."""

    sentences: tuple[str, ...]
    unit: str
    ask: str
    statement: str
    steps: tuple[Step, ...]


_GAIN = ("With the new ones", "The new total", "Now")
_LOSE = ("What is left", "The rest", "Still there")
_TWICE = ("Twice as many", "The double")
_HALF = ("Half of them", "One half")
_GROUPS = ("In the groups", "All of these")
_TOTAL = ("Together", "In total", "The sum")
_EACH = ("For each", "One share")


def _change(draw: Draw, value: int, pronoun: str, unit: str) -> tuple[str, Step]:
    """One thing that happens to `value` things: (the event as a clause, the step)."""
    kind = draw.between(0, 19)
    holder = f"{pronoun} has"
    if kind < 3 and value <= MAX_NUMBER // 2:
        event = draw.pick(("doubles them", "gets as many again"))
        return event, Step(value, "*", 2, unit, f"{pronoun} {event}", holder, _TWICE)
    if kind < 6 and value % 2 == 0 and value >= 4:
        friend = draw.pick(PEOPLE)[0]
        event = draw.pick((f"gives half of them to {friend}", "loses half of them"))
        return event, Step(value, "/", 2, unit, f"{pronoun} {event}", holder, _HALF)
    if (kind < 13 or value < 5) and value <= MAX_NUMBER - 15:
        amount = draw.between(2, 15)
        verb = draw.pick(("buys", "finds", "gets", "wins"))
        event = f"{verb} {amount} more"
        return event, Step(value, "+", amount, unit, f"{pronoun} {event}", holder, _GAIN)
    amount = draw.between(2, min(15, value - 1))
    friend = draw.pick(PEOPLE)[0]
    event = draw.pick(
        (f"gives {amount} to {friend}", f"loses {amount}", f"sells {amount}", f"uses {amount}")
    )
    return event, Step(value, "-", amount, unit, f"{pronoun} {event}", holder, _LOSE)


def _sentence(draw: Draw, pronoun: str, event: str) -> str:
    opener = draw.pick(("", "Then ", "Later ", "After that "))
    return f"{opener}{pronoun if opener else pronoun.capitalize()} {event}."


def _joined(draw: Draw, first: Step, second: Step) -> tuple[Step, ...]:
    """Two gains (or two losses) one after the other, or, as often, added up first."""
    if first.op != second.op or first.op not in "+-" or draw.chance(0.5):
        return first, second
    amounts = (first.right, second.right)
    labels = ("All the new ones",) if first.op == "+" else ("All that are gone",)
    event = "we add both changes"
    both = Step(amounts[0], "+", amounts[1], first.unit, event, "that is", labels)
    total = Step(
        first.left, first.op, sum(amounts), first.unit, second.event, second.holder, second.labels
    )
    return both, total


def _chain(draw: Draw) -> Problem:
    """Somebody has some things, and two or three things happen to them."""
    name, pronoun = draw.pick(PEOPLE)
    unit = draw.pick(THINGS)
    value = draw.between(4, 40)
    sentences = [f"{name} {draw.pick(('has', 'owns', 'starts with'))} {value} {unit}."]
    steps: list[Step] = []
    for _ in range(draw.between(2, 3)):
        event, step = _change(draw, value, pronoun, unit)
        sentences.append(_sentence(draw, pronoun, event))
        steps.append(step)
        value = step.result
    steps[:2] = _joined(draw, steps[0], steps[1])
    ask = draw.pick((f"does {name} have now", "are there now"))
    statement = f"{name} has now" if ask.startswith("does") else "there are now"
    return Problem(tuple(sentences), unit, ask, statement, tuple(steps))


def _packs(draw: Draw) -> Problem:
    """Boxes of equal content, beside some loose things."""
    name, pronoun = draw.pick(PEOPLE)
    unit = draw.pick(THINGS)
    many, one = draw.pick(CONTAINERS)
    boxes, content, loose = draw.between(2, 9), draw.between(2, 10), draw.between(3, 20)
    buys = f"buys {boxes} {many} with {content} {unit} in each {one}"
    first, second = draw.swap((f"{buys}.", f"has {loose} {unit}."))
    also = "also " if draw.chance(0.5) else ""
    sentences = [f"{name} {first}", f"{pronoun.capitalize()} {also}{second}"]
    event = f"{boxes} {many} hold {content} each"
    steps = [Step(boxes, "*", content, unit, event, "there are", _GROUPS)]
    left, right = draw.swap((boxes * content, loose))
    steps.append(
        Step(left, "+", right, unit, f"{pronoun} also has {loose}", f"{pronoun} has", _TOTAL)
    )
    if draw.chance(0.5):
        event, step = _change(draw, steps[-1].result, pronoun, unit)
        sentences.append(_sentence(draw, pronoun, event))
        steps.append(step)
    return Problem(tuple(sentences), unit, f"does {name} have now", f"{name} has now", tuple(steps))


def _relation(draw: Draw, value: int, other: str, unit: str, name: str) -> tuple[str, Step]:
    """How many `name` has, told by what `other` has: (the sentence, the step)."""
    holder = f"{name} has"
    kind = draw.between(0, 9)
    if kind < 3 and value <= 30:
        event = f"{name} has twice as many as {other}"
        return event, Step(value, "*", 2, unit, event, holder, (f"For {name}", holder))
    if kind < 7 or value < 5:
        amount = draw.between(2, 12)
        event = f"{name} has {amount} more than {other}"
        return event, Step(value, "+", amount, unit, event, holder, (f"For {name}", holder))
    amount = draw.between(2, min(12, value - 1))
    event = f"{name} has {amount} fewer than {other}"
    return event, Step(value, "-", amount, unit, event, holder, (f"For {name}", holder))


def _compare(draw: Draw) -> Problem:
    """Two or three people, each told by the one before; how many have they together?"""
    unit = draw.pick(THINGS)
    first, second = (name for name, _ in draw.two(PEOPLE))
    value = draw.between(4, 30)
    event, step = _relation(draw, value, first, unit, second)
    given = f"{first} has {value} {unit}."
    sentences = list(draw.swap((given, f"{event}.")))
    steps = [step]
    counts = [value, step.result]
    if draw.chance(0.25):
        third = draw.pick([name for name, _ in PEOPLE if name not in (first, second)])
        event, step = _relation(draw, counts[1], second, unit, third)
        sentences.append(f"{event}.")
        steps.append(step)
        counts.append(step.result)
    if draw.chance(0.5):
        counts.reverse()
    total = counts[0]
    for count in counts[1:]:
        event = draw.pick(("we add them", "they put them together"))
        steps.append(Step(total, "+", count, unit, event, "they have", _TOTAL))
        total += count
    return Problem(
        tuple(sentences), unit, "do they have together", "they have together", tuple(steps)
    )


def _money(draw: Draw) -> Problem:
    """Some things at one price and one more thing; what does it cost, or what comes back?"""
    name, pronoun = draw.pick(PEOPLE)
    unit = draw.pick(THINGS)
    extra = draw.pick(("ball", "cake", "doll", "hat", "lamp"))
    count, price, cost = draw.between(2, 8), draw.between(2, 8), draw.between(3, 20)
    items = (f"{count} {unit} for {price} dollars each", f"a {extra} for {cost} dollars")
    sentences = [f"{name} buys {' and '.join(draw.swap(items))}."]
    event = f"{pronoun} buys {count} {unit}"
    labels = ("The cost", f"For the {unit}")
    steps = [Step(count, "*", price, "dollars", event, f"{pronoun} pays", labels)]
    left, right = draw.swap((count * price, cost))
    event = f"{pronoun} also buys a {extra}"
    steps.append(Step(left, "+", right, "dollars", event, f"{pronoun} pays", _TOTAL))
    if draw.chance(0.4):
        return Problem(
            tuple(sentences), "dollars", f"does {name} pay", f"{name} pays", tuple(steps)
        )
    bill = draw.pick([bill for bill in (20, 30, 50, 80, 100) if bill > steps[-1].result])
    verb = draw.pick(("pays with", "gives"))
    sentences.append(f"{pronoun.capitalize()} {verb} {bill} dollars.")
    event = f"{pronoun} {verb} {bill} dollars"
    labels = ("The change", "Money back")
    step = Step(bill, "-", steps[-1].result, "dollars", event, f"{pronoun} gets", labels)
    return Problem(
        tuple(sentences), "dollars", f"does {name} get back", f"{name} gets back", (*steps, step)
    )


def _share(draw: Draw) -> Problem:
    """Things are gathered and shared out equally, and perhaps some of one share is used."""
    name, pronoun = draw.pick(PEOPLE)
    unit = draw.pick(THINGS)
    friends, each = draw.between(2, 6), draw.between(3, 12)
    total = friends * each
    more = draw.between(2, min(15, total - 2))
    verb = draw.pick(("buys", "finds", "gets", "wins"))
    shares = f"{draw.pick(('shares', 'divides'))} them equally among {friends} friends"
    sentences = [
        f"{name} has {total - more} {unit} and {verb} {more} more.",
        f"{pronoun.capitalize()} {shares}.",
    ]
    left, right = draw.swap((total - more, more))
    event = f"{friends} friends share them"
    steps = [
        Step(left, "+", right, unit, f"{pronoun} {verb} {more} more", f"{pronoun} has", _GAIN),
        Step(total, "/", friends, unit, event, "each friend gets", _EACH),
    ]
    if draw.chance(0.35):
        used = draw.between(1, each - 1)
        verb = draw.pick(("loses", "uses", "sells"))
        sentences.append(f"Each friend {verb} {used}.")
        event = f"each friend {verb} {used}"
        steps.append(Step(each, "-", used, unit, event, "each friend has", _LOSE))
        return Problem(
            tuple(sentences), unit, "does each friend have", "each friend has", tuple(steps)
        )
    return Problem(tuple(sentences), unit, "does each friend get", "each friend gets", tuple(steps))


def _work(draw: Draw) -> Problem:
    """Some things a day for some days, then one or two changes."""
    name, pronoun = draw.pick(PEOPLE)
    unit = draw.pick(THINGS)
    rate, days = draw.between(2, 10), draw.between(2, 8)
    verb = draw.pick(("collects", "makes", "packs", "paints"))
    daily = f"{name} {verb} {rate} {unit} a day"
    sentences = [draw.swap((f"{daily} for {days} days.", f"For {days} days {daily}."))[0]]
    left, right = draw.swap((rate, days))
    event = f"{pronoun} {verb} {rate} a day"
    steps = [Step(left, "*", right, unit, event, f"{pronoun} has", _GROUPS)]
    for _ in range(draw.pick((1, 2))):
        event, step = _change(draw, steps[-1].result, pronoun, unit)
        sentences.append(_sentence(draw, pronoun, event))
        steps.append(step)
    if len(steps) == 3:
        steps[1:] = _joined(draw, steps[1], steps[2])
    return Problem(tuple(sentences), unit, f"does {name} have now", f"{name} has now", tuple(steps))


def _reading(draw: Draw) -> Problem:
    """A book is read for some days, and perhaps a little more; how much is left?"""
    name, pronoun = draw.pick(PEOPLE)
    rate, days = draw.between(2, 10), draw.between(2, 8)
    read = rate * days
    more = draw.between(2, 12) if draw.chance(0.5) else 0
    pages = draw.between(read + more + 1, min(MAX_NUMBER, read + more + 30))
    book = f"{name} has a book of {pages} pages."
    sentences = [book, f"{pronoun.capitalize()} reads {rate} pages a day for {days} days."]
    left, right = draw.swap((rate, days))
    holder, remain = f"{pronoun} reads", ("there are", "The pages left", "What is left")
    event = f"{pronoun} reads for {days} days"
    steps = [Step(left, "*", right, "pages", event, holder, ("Pages read", "All of these"))]
    if more:
        sentences.append(_sentence(draw, pronoun, f"reads {more} more"))
    event = f"the book has {pages}"
    again = f"{pronoun} reads {more} more"
    if more and draw.chance(0.5):
        steps.append(Step(read, "+", more, "pages", again, holder, _TOTAL))
        steps.append(Step(pages, "-", read + more, "pages", event, remain[0], remain[1:]))
    else:
        steps.append(Step(pages, "-", read, "pages", event, remain[0], remain[1:]))
        if more:
            steps.append(Step(pages - read, "-", more, "pages", again, remain[0], remain[1:]))
    return Problem(tuple(sentences), "pages", "are left", "are left", tuple(steps))


_PROBLEMS = (_chain, _chain, _packs, _compare, _compare, _money, _share, _work, _reading)


def problem(draw: Draw) -> Problem:
    """A problem of any of the kinds above."""
    return draw.pick(_PROBLEMS)(draw)
