"""Five annotators who write up the same arithmetic each in their own way.

Which one wrote an answer can be guessed from how the question is asked, but not always; and each
has several wordings for everything. So a good model of the answers still has a choice of words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from distillspec_jax.data.problems import Draw, Problem, Step

# The chance that a question is asked in the way its annotator likes; else any way will do.
FAITHFULNESS = 0.6

_ASKING = (
    "How many {unit} {ask}?",
    "Find how many {unit} {statement}.",
    "Tell me how many {unit} {statement}.",
    "Can you say how many {unit} {statement}?",
    "Work out how many {unit} {statement}.",
)


def _sum(step: Step) -> str:
    return f"{step.left} {step.op} {step.right} = {step.result}"


def _plain(draw: Draw, step: Step, first: bool, last: bool) -> str:
    """12 + 5 = 17 pens."""
    opener = "" if first else draw.pick(("", "Then ", "So ", "Now "))
    unit = draw.pick(("", f" {step.unit}"))
    return f"{opener}{_sum(step)}{unit}."


def _narrator(draw: Draw, step: Step, first: bool, last: bool) -> str:
    """She buys 5 more, so she has 12 + 5 = 17 pens."""
    event = step.event[0].upper() + step.event[1:]
    link = draw.pick((", so", ", and", ", which means"))
    return f"{event}{link} {step.holder} {_sum(step)} {step.unit}."


def _labeller(draw: Draw, step: Step, first: bool, last: bool) -> str:
    """The new total: 12 + 5 = 17."""
    return f"{draw.pick(step.labels)}: {_sum(step)}."


def _instructor(draw: Draw, step: Step, first: bool, last: bool) -> str:
    """First, add 5 to 12 to get 17."""
    if first:
        openers = ("First", "To start")
    else:
        openers = ("Finally", "At last") if last else ("Next", "Then")
    left, right = step.left, step.right
    match step.op:
        case "+":
            command = f"add {right} to {left}"
        case "-":
            command = f"{draw.pick(('take', 'subtract'))} {right} from {left}"
        case "*":
            command = f"multiply {left} by {right}"
        case _:
            command = f"divide {left} by {right}"
    opener, link = draw.pick(openers), draw.pick(("to get", "for", "which is"))
    return f"{opener}, {command} {link} {step.result}."


def _reasoner(draw: Draw, step: Step, first: bool, last: bool) -> str:
    """Now she has 17 pens because 12 + 5 = 17."""
    opener = draw.pick(("", "Here ") if first else ("", "Then ", "Now "))
    holder = step.holder if opener else step.holder[0].upper() + step.holder[1:]
    why = draw.pick(("because", "since", "as"))
    return f"{opener}{holder} {step.result} {step.unit} {why} {_sum(step)}."


_STYLES: Sequence[Callable[[Draw, Step, bool, bool], str]] = (
    _plain,
    _narrator,
    _labeller,
    _instructor,
    _reasoner,
)
# How often each annotator closes with a sentence.
_CLOSING = (0.2, 0.1, 0.5, 0.3, 0.1)


def ask(draw: Draw, problem: Problem) -> tuple[str, int]:
    """The question in words, and the number of the annotator who will answer it."""
    annotator = draw.between(0, len(_STYLES) - 1)
    way = annotator if draw.chance(FAITHFULNESS) else draw.between(0, len(_ASKING) - 1)
    asking = _ASKING[way].format(unit=problem.unit, ask=problem.ask, statement=problem.statement)
    return " ".join((*problem.sentences, asking)), annotator


def answer(draw: Draw, problem: Problem, annotator: int) -> str:
    """The worked answer in the annotator's words; it ends in `#### N`."""
    write, last = _STYLES[annotator], len(problem.steps) - 1
    lines = [
        write(draw, step, index == 0, index == last) for index, step in enumerate(problem.steps)
    ]
    result = problem.steps[-1].result
    if draw.chance(_CLOSING[annotator]):
        lines.append(draw.pick(("The answer is {}.", "So the answer is {}.")).format(result))
    return " ".join((*lines, f"#### {result}"))
