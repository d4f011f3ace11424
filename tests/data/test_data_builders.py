"""Builders: what they make of the files, and what they refuse."""

import errno
import fcntl
import json
import multiprocessing
import os
import re
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest

from distillspec_jax.data import jsonl as data_jsonl
from distillspec_jax.data.builders import base, gsm8k, summaries
from distillspec_jax.data.builders.arithmetic_stories import ArithmeticStories
from distillspec_jax.data.builders.bbh import Bbh
from distillspec_jax.data.builders.gsm8k import Gsm8k
from distillspec_jax.data.builders.lm1b import Lm1b
from distillspec_jax.data.builders.specbench import Specbench
from distillspec_jax.data.builders.summaries import CnnDailymail, Xsum
from distillspec_jax.data.builders.wmt14_ende import Wmt14Ende, detokenizer
from distillspec_jax.data.examples import BuiltExamples
from distillspec_jax.data.stories import story
from distillspec_jax.errors import UserError


def read(builder_class, folder, split):
    builder = base.prepare(builder_class, str(folder))
    return [tuple(x) for x in BuiltExamples(builder.as_data_source(split), "it")]


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def test_gsm8k_loses_the_calculator(tmp_path):
    answer = "Janet sells 16 - 3 = <<16-3=13>>13 eggs.\n#### 13"
    jsonl(tmp_path / "train.jsonl", {"question": "Janet’s ducks", "answer": answer})
    assert read(Gsm8k, tmp_path, "train") == [
        ("Janet’s ducks", "Janet sells 16 - 3 = 13 eggs.\n#### 13")
    ]


WMT_ENGLISH = (
    "The Member States &apos; gas , ( and ) &quot; supply &quot; aren &apos;t 1 &amp; 2 .\n"
)
WMT_GERMAN = "Er sagte : &quot; Guten Tag , Welt ! &quot;\n„ Ja “ , 5 % .\n"


def test_wmt_is_detokenised(tmp_path):
    (tmp_path / "src-train.txt").write_text(f"{WMT_ENGLISH}Yes .\n")
    (tmp_path / "tgt-train.txt").write_text(WMT_GERMAN)
    assert read(Wmt14Ende, tmp_path, "train") == [
        ("The Member States' gas, (and) \"supply\" aren't 1 & 2.", 'Er sagte: "Guten Tag, Welt!"'),
        ("Yes.", "„Ja“, 5%."),
    ]


def test_wmt_test_set_may_lack_references(tmp_path):
    (tmp_path / "src-test.txt").write_text("Yes .\n")
    assert read(Wmt14Ende, tmp_path, "test") == [("Yes.", "")]
    (tmp_path / "tgt-test.txt").write_text("Ja .\n")
    assert read(Wmt14Ende, tmp_path, "test") == [("Yes.", "Ja.")]


def test_wmt_must_be_aligned(tmp_path):
    (tmp_path / "src-val.txt").write_text("a\nb\n")
    (tmp_path / "tgt-val.txt").write_text("a\n")
    with pytest.raises(UserError, match=r"has 2 lines and .*tgt-val.txt' has 1; they must be"):
        base.prepare(Wmt14Ende, str(tmp_path))


def test_only_a_line_feed_ends_a_line_of_wmt(tmp_path):
    (tmp_path / "src-train.txt").write_bytes(b"\xef\xbb\xbfone\rtwo\r\nthree\n\xe2\x80\xa8four\n")
    (tmp_path / "tgt-train.txt").write_bytes(b"eins\nzwei\ndrei\rvier")
    assert read(Wmt14Ende, tmp_path, "train") == [
        ("one two", "eins"),
        ("three", "zwei"),
        ("four", "drei vier"),
    ]
    (tmp_path / "tgt-train.txt").write_bytes(b"eins\n\xe9\n")
    with pytest.raises(UserError, match=r"tgt-train\.txt:2: not valid UTF-8"):
        base.prepare(Wmt14Ende, str(tmp_path))


def test_bbh_has_all_tasks_and_each(tmp_path):
    for name in ("snarks", "navigate"):
        task = {"canary": "x", "examples": [{"input": f"{name}?", "target": "(A)"}] * 2}
        (tmp_path / f"{name}.json").write_text(json.dumps(task))
    assert [x for x, _ in read(Bbh, tmp_path, "test")] == ["navigate?"] * 2 + ["snarks?"] * 2
    assert read(Bbh, tmp_path, "snarks") == [("snarks?", "(A)")] * 2


def test_bbh_refuses_other_json(tmp_path):
    for content in ('{"rows": []}', "[" * 100_000):
        (tmp_path / "other.json").write_text(content)
        with pytest.raises(UserError, match=r"other.json' is not a BBH task"):
            base.prepare(Bbh, str(tmp_path))


def test_specbench_takes_first_turns_by_category(tmp_path):
    jsonl(
        tmp_path / "question.jsonl",
        {"category": "qa", "turns": ["Who?"], "reference": ["Me", "You"]},
        {"category": "writing", "turns": ["Write.", "Again."]},
    )
    assert read(Specbench, tmp_path, "test") == [("Who?", "Me"), ("Write.", "")]
    assert read(Specbench, tmp_path, "writing") == [("Write.", "")]


def test_specbench_lines_and_references(tmp_path):
    question = {"category": "qa", "turns": ["Who\u2028is\x85it?"]}
    references = ["Paris", ["Rome"], [["Bonn", "Berlin"], ["Ulm"]], [], None]
    rows = [question | {"reference": reference} for reference in references]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path = tmp_path / "question.jsonl"
    path.write_text("\ufeff" + "\r\n\n".join(lines), "utf-8", newline="")
    found = read(Specbench, tmp_path, "test")
    assert [prompt for prompt, _ in found] == ["Who\u2028is\x85it?"] * 5
    assert [target for _, target in found] == ["Paris", "Rome", "Bonn", "", ""]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"category": "qa"}', "not a question"),
        (b'{"category": "qa", "turns": []}', "not a question"),
        (b'{"category": "qa", "turns": "Who?"}', "not a question"),
        (b'{"category": "qa", "turns": ["Who?"], "reference": 5}', "not a question"),
        (b'{"category": "qa", "turns": ["Who?"], "reference": [5]}', "not a question"),
        (b'{"category": "qa", "turns": [""]}', r"field 'turns\[0\]' is empty"),
        (b'{"category": "qa", "turns": [5]}', r"field 'turns\[0\]' must be a string, not int"),
        (b'{"category": 5, "turns": ["Who?"]}', "field 'category' must be a string"),
        (b'{"turns": ["Who?"]}', "no field 'category'"),
        (b'{"category": "qa", "turns": ["\xe9"]}', "not valid UTF-8"),
        (b"[" * 100_000, "not valid JSON"),
        (b"5", "not a JSON object"),
    ],
)
def test_specbench_names_a_broken_line(tmp_path, line, message):
    good = b'{"category": "qa", "turns": ["Who?"]}\n'
    (tmp_path / "question.jsonl").write_bytes(good + line)
    with pytest.raises(UserError, match=rf"question.jsonl:2: {message}"):
        base.prepare(Specbench, str(tmp_path))


@pytest.mark.parametrize(
    ("builder", "fields"),
    [(CnnDailymail, ("article", "highlights")), (Xsum, ("document", "summary"))],
)
def test_summaries(builder, fields, tmp_path):
    for split in ("train", "validation", "test"):
        jsonl(tmp_path / f"{split}.jsonl", dict(zip(fields, (split, "s"), strict=True)))
    for split in ("train", "validation", "test"):
        assert read(builder, tmp_path, split) == [(split, "s")]


def test_lm1b_starts_with_five_words(tmp_path):
    (tmp_path / "train.txt").write_text("one two three four five six seven\nfar too short\n")
    assert read(Lm1b, tmp_path, "train") == [("one two three four five", "six seven")]


def test_only_a_line_feed_ends_a_sentence_of_lm1b(tmp_path):
    (tmp_path / "train.txt").write_bytes(b"one two three\rfour five six seven\r\n")
    assert read(Lm1b, tmp_path, "train") == [("one two three four five", "six seven")]


def test_lm1b_finds_the_published_folders(tmp_path):
    names = {
        "train": "training-monolingual.tokenized.shuffled/news.en-00001-of-00100",
        "test": "heldout-monolingual.tokenized.shuffled/news.en.heldout-00000-of-00050",
        "validation": "heldout-monolingual.tokenized.shuffled/news.en.heldout-00010-of-00050",
    }
    for split, name in names.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"a b c d e {split}")
    for split in names:
        assert read(Lm1b, tmp_path, split) == [("a b c d e", split)]


def test_missing_folders_and_files_are_told(tmp_path):
    with pytest.raises(UserError, match=r"task 'gsm8k' needs source_dir.*train.jsonl; test.jsonl"):
        base.prepare(Gsm8k)
    with pytest.raises(UserError, match=r"'.*gone', is not a folder"):
        base.prepare(Gsm8k, str(tmp_path / "gone"))
    with pytest.raises(UserError, match=r"src-train.txt with tgt-train.txt"):
        base.prepare(Wmt14Ende, str(tmp_path))


def test_a_cache_on_a_file_system_without_locks_is_told(tmp_path, data_cache, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    jsonl(tmp_path / "train.jsonl", {"question": "a", "answer": "b"})
    with pytest.raises(UserError, match=r"has no locks \(No locks available\); name a folder"):
        base.prepare(Gsm8k, str(tmp_path))


def test_a_failed_preparation_leaves_nothing_behind(tmp_path, data_cache):
    (tmp_path / "train.jsonl").write_text('{"question": "a", "answer": "b"}\n{broken\n')
    for _ in range(2):
        with pytest.raises(UserError, match=r"train.jsonl:2: not valid JSON"):
            base.prepare(Gsm8k, str(tmp_path))
    jsonl(tmp_path / "train.jsonl", {"question": "a", "answer": "b"})
    assert read(Gsm8k, tmp_path, "train") == [("a", "b")]


def test_changed_files_are_read_anew(tmp_path):
    jsonl(tmp_path / "train.jsonl", {"question": "a", "answer": "b"})
    assert read(Gsm8k, tmp_path, "train") == [("a", "b")]
    jsonl(tmp_path / "train.jsonl", {"question": "a", "answer": "c"})
    assert read(Gsm8k, tmp_path, "train") == [("a", "c")]


def test_other_code_makes_other_data(tmp_path, monkeypatch):
    jsonl(tmp_path / "train.jsonl", {"question": "q", "answer": "a <<1+1=2>>2"})
    assert read(Gsm8k, tmp_path, "train") == [("q", "a 2")]
    changed = tmp_path / "gsm8k.py"
    changed.write_text(Path(gsm8k.__file__).read_text() + "# another version\n")
    monkeypatch.setattr(gsm8k, "__file__", str(changed))
    monkeypatch.setattr(gsm8k, "_CALCULATOR_NOTE", re.compile("nothing"))
    assert read(Gsm8k, tmp_path, "train") == [("q", "a <<1+1=2>>2")]


@pytest.mark.parametrize("module", [summaries, data_jsonl])
def test_code_of_parents_and_of_the_reader_counts(tmp_path, monkeypatch, module):
    before = Xsum.code()
    (tmp_path / "other.py").write_text("")
    monkeypatch.setattr(module, "__file__", str(tmp_path / "other.py"))
    assert Xsum.code() != before


def test_another_detokeniser_makes_other_data(monkeypatch):
    before = Wmt14Ende.code()
    assert before == Wmt14Ende.code()
    monkeypatch.setattr(metadata, "version", lambda name: f"{name} of tomorrow")
    assert Wmt14Ende.code() != before


def test_big_files_are_known_by_size_and_time(tmp_path, monkeypatch):
    monkeypatch.setattr(base, "_HASHED_BYTES", 3)
    jsonl(tmp_path / "train.jsonl", {"question": "a", "answer": "b"})
    assert read(Gsm8k, tmp_path, "train") == [("a", "b")]
    jsonl(tmp_path / "train.jsonl", {"question": "a", "answer": "long"})
    assert read(Gsm8k, tmp_path, "train") == [("a", "long")]


def test_prepared_data_are_used_again(tmp_path, monkeypatch):
    jsonl(tmp_path / "train.jsonl", {"question": "a", "answer": "b"})
    read(Gsm8k, tmp_path, "train")
    monkeypatch.setattr(Gsm8k, "pairs", None)  # would fail if it were asked again
    assert read(Gsm8k, tmp_path, "train") == [("a", "b")]


class Slow(Gsm8k):
    """Takes its time and leaves a mark for each preparation."""

    def pairs(self, split):
        with open(f"{self.source_dir}/marks", "a") as marks:
            marks.write(split)
        time.sleep(2)
        return super().pairs(split)


def _prepare_slowly(folder):
    os.environ["DISTILLSPEC_DATA"] = f"{folder}/prepared"
    return len(base.prepare(Slow, folder).as_data_source("train"))


def test_two_processes_may_prepare_at_once(tmp_path):
    jsonl(tmp_path / "train.jsonl", {"question": "a", "answer": "b"})
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert pool.map(_prepare_slowly, [str(tmp_path)] * 2, chunksize=1) == [1, 1]
    assert (tmp_path / "marks").read_text() == "train"


def test_stories_are_read_as_generated():
    builder = base.prepare(ArithmeticStories)
    examples = BuiltExamples(builder.as_data_source("validation"), "stories/validation")
    assert len(examples) == 500
    assert [tuple(examples[n]) for n in (0, 7, 499)] == [
        story("validation", n) for n in (0, 7, 499)
    ]
    assert tuple(examples[-1]) == story("validation", 499)
    assert examples.take([7, 0, 7])[2] == story("validation", 7)
    with pytest.raises(IndexError):
        examples[500]


def test_no_tensorflow_at_run_time(data_cache):
    code = (
        "import sys\n"
        "from distillspec_jax.data.tasks import TaskConfig, load_task\n"
        "task = load_task(TaskConfig())\n"
        "next(task.batches('train', batch_size=3, seed=0))\n"
        "sys.exit('tensorflow' in sys.modules or 'torch' in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_detokenizer_on_real_lines(shared_data):
    lines = (shared_data / "wmt14_ende/tgt-val.txt").read_text("utf-8").splitlines()
    clean = [detokenizer("de")(line) for line in lines]
    for sign in (" .", " ,", " ?", " !", "&quot;", "&apos;", "&amp;"):
        before, after = (sum(sign in line for line in text) for text in (lines, clean))
        assert after <= 0.01 * len(lines), (sign, before, after)


def test_gsm8k_as_published(shared_data):
    pairs = read(Gsm8k, shared_data / "gsm8k", "train")
    assert not any("<<" in answer or ">>" in answer for _, answer in pairs)
    assert all(re.search(r"\n#### -?[\d,.]+$", answer) for _, answer in pairs)
