"""JSONL: what is read, and that every broken line is named."""

import json

import pytest

from distillspec_jax.data.examples import Example, locate
from distillspec_jax.data.jsonl import JsonlExamples
from distillspec_jax.errors import UserError


def write(path, *lines):
    path.write_bytes(b"\n".join(x if isinstance(x, bytes) else x.encode() for x in lines))
    return path


def test_reads_pairs_in_order_with_prefix(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"q": "x", "a": "1", "more": 5}', '{"a": "2", "q": "ß"}')
    examples = JsonlExamples(path, input_field="q", target_field="a", prefix="say: ")
    assert list(examples) == [Example("say: x", "1"), Example("say: ß", "2")]
    assert examples[-1].target == "2"
    assert list(examples[1:]) == [Example("say: ß", "2")]
    assert locate(examples[1:], 0) == f"{path}:2"


def test_blank_lines_are_skipped_but_counted(tmp_path):
    path = write(tmp_path / "a.jsonl", "", '{"input": "x", "target": "1"}\r', "  ", "", "")
    examples = JsonlExamples(path)
    assert list(examples) == [("x", "1")]
    assert locate(examples, 0) == f"{path}:2"


def test_a_byte_order_mark_is_not_content(tmp_path):
    path = write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"input": "x", "target": "1"}')
    assert JsonlExamples(path)[0] == ("x", "1")


def test_a_line_separator_inside_a_text_is_not_a_line_end(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"input": "x\u2028y", "target": "1"}, ensure_ascii=False), "utf-8")
    assert JsonlExamples(path)[0].input == "x\u2028y"


def test_prompts_need_no_target(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"input": "x"}')
    assert list(JsonlExamples(path, target_field="")) == [("x", "")]


GOOD = '{"input": "x", "target": "1"}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"input": "x", "target": ', "not valid JSON"),
        ("[1, 2]", "not a JSON object but a list"),
        ('{"input": "x"}', r"no field 'target'; the line has 'input'"),
        ('{"input": "x", "target": 5}', "field 'target' must be a string, not int"),
        ('{"input": null, "target": "1"}', "field 'input' must be a string, not NoneType"),
        ('{"input": " ", "target": "1"}', "field 'input' is empty"),
        ('{"input": "x", "target": ""}', "field 'target' is empty"),
        ('{"input": "\\ud800", "target": "1"}', "field 'input' holds half of a surrogate pair"),
        (b'{"input": "\xff", "target": "1"}', "not valid UTF-8"),
        ("[" * 100_000, r"not valid JSON \(nested too deeply"),
        ('{"n": ' + "1" * 5_000 + "}", r"not valid JSON \(a number is too long"),
    ],
)
def test_broken_lines_are_named(tmp_path, line, message):
    path = write(tmp_path / "bad.jsonl", GOOD, "", line, GOOD)
    with pytest.raises(UserError, match=rf"bad\.jsonl:3: {message}"):
        JsonlExamples(path)


def test_paths_stay_what_the_user_gave(tmp_path, monkeypatch):
    write(tmp_path / "bad.jsonl", "{")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^bad\.jsonl:1: "):
        JsonlExamples("bad.jsonl")


def test_missing_and_empty_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        JsonlExamples(tmp_path / "gone.jsonl")
    with pytest.raises(UserError, match="cannot read"):
        JsonlExamples(tmp_path)
    with pytest.raises(UserError, match="holds no examples"):
        JsonlExamples(write(tmp_path / "empty.jsonl", "", " "))
