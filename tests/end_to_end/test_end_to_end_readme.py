"""The Python of the README runs as it stands there."""

import re
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def test_what_the_readme_does_in_python(capsys):
    section = README.read_text("utf-8").split("## In Python")[1]
    names = {}
    exec(re.search(r"```python\n(.*?)```", section, re.DOTALL)[1], names)
    out, (state, metrics) = names["out"], (names["state"], names["metrics"])
    assert state.step == 20
    assert metrics["source_draft"] == (1, 1)
    assert out.statistics.finished[0]
    assert out.statistics.emitted[0] == out.lengths[0] > out.statistics.target_calls[0]
    assert "####" in capsys.readouterr().out  # a story's answer
