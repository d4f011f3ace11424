"""The notebook runs from its first cell to its last, and shows what it says."""

import json
import re
from pathlib import Path

NOTEBOOK = Path(__file__).parents[2] / "experiments" / "notebooks" / "pieces.ipynb"


def test_the_pieces_in_your_hands(capsys):
    cells = [
        c for c in json.loads(NOTEBOOK.read_text("utf-8"))["cells"] if c["cell_type"] == "code"
    ]
    assert all(cell["outputs"] == [] for cell in cells), "figures come from commands"
    code = "\n".join("".join(cell["source"]) for cell in cells)
    assert code.count("STEPS = 200") == 1
    names = {"__name__": "notebook"}
    exec(code.replace("STEPS = 200", "STEPS = 12"), names)

    out, shown = capsys.readouterr().out, names["overlap"]
    assert 0 <= shown.min() < shown.max() <= 1 + 1e-6
    assert names["state"].step == len(names["agreement"]) == 12
    assert "64 of 64 greedy texts equal" in out
    assert len(re.findall(r"T = [01], (?:before|after): tau [\d.]+ \[[\d.]+, [\d.]+\]", out)) == 4
    green, red, blue = (f"\x1b[{code}m" for code in ("32", "1;31", "34"))
    assert all(colour in out for colour in (green, red, blue))
    plain = re.sub(r"\x1b\[[\d;]*m|\n", "", out)
    text = names["vocabulary"].decode(names["sampled"].tokens[0].tolist())
    assert text in plain
    [line] = names["axes"].get_lines()
    assert line.get_ydata().tolist() == names["agreement"]
