"""decode from prompts to texts: file, flags and terminal, origins and colours, bad input."""

import io
import json
import os

import jax
import numpy as np
import pytest
import sentencepiece
from rich.text import Text

from distillspec_jax import zoo
from distillspec_jax.data.vocabulary import load_vocabulary
from distillspec_jax.decoding.state import ACCEPTED, BONUS, CORRECTED
from distillspec_jax.errors import UserError
from experiments import decode, door
from experiments.decoder import STYLES, Answer, DecodeConfig, coloured, given_prompts

PROMPTS = ("Tom has 3 apples .", "Anna has 7 pens and buys 2 more .", "Ben has 4 pears .")


@pytest.fixture
def run(enter, models, tmp_path):
    """Decodes with the tiny models: (exit code, stdout, stderr, workdir)."""

    def run(*flags, workdir="run", **changes):
        values = {
            "target": str(models / "target"),
            "draft": str(models / "draft"),
            "gamma": 2,
            "max_new_tokens": 5,
            "batch_size": 2,
            "temperature": 1.0,
            **changes,
        }
        path = tmp_path / "decode.py"
        path.write_text(
            "from ml_collections import ConfigDict\n"
            f"def get_config():\n    return ConfigDict({values!r})\n"
        )
        folder = tmp_path / workdir
        main = decode.main_with_flags
        out = enter(main, DecodeConfig, f"--config={path}", f"--workdir={folder}", *flags)
        return *out, folder

    return run


def outputs(folder):
    return [json.loads(line) for line in (folder / "outputs.jsonl").read_text().splitlines()]


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture(scope="module")
def vocabulary():
    return load_vocabulary("arithmetic_stories")


def test_prompts_of_a_file(run, tmp_path, vocabulary):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"input": prompt}) + "\n" for prompt in PROMPTS))
    code, out, _, folder = run(f"--prompts={path}")
    assert code is None
    rows = outputs(folder)
    assert [row["prompt"] for row in rows] == list(PROMPTS)
    for row in rows:
        assert row["output"] == vocabulary.decode(row["tokens"])
        assert len(row["origins"]) == len(row["tokens"]) <= 5
        assert set(row["origins"]) <= {"accepted", "corrected", "bonus"}
        assert row["output"] in out
        assert row["lossless"] is True
    figures = summary(folder)
    assert figures["block_efficiency"] == pytest.approx(
        sum(row["emitted"] for row in rows) / sum(row["calls"] for row in rows)
    )
    assert figures["num_prompts"] == 3
    low, high = figures["block_efficiency_ci95"]
    assert f"[{low:.3g}, {high:.3g}]\n" in out
    assert figures["lossless"] is True
    assert figures["tokens_per_second_speculative"] > 0
    assert figures["gamma"] == 2
    batches = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    done = [batch["done"] for batch in batches]
    assert done == sorted(done)
    assert done[-1] == 3
    assert ["warm_up_seconds" in batch for batch in batches] == [True] + [False] * (len(done) - 1)


def test_blocks_that_stop_early_and_several_drafts(run):
    """Certain drafts alone go past their first token; of these models none is certain."""
    flags = [f"--prompt={prompt}" for prompt in PROMPTS]
    changed = {
        "usual": {},
        "short": {"block_length": {"min_confidence": 1.0}},
        "two": {"num_drafts": 2},
    }
    rows = {}
    for name, changes in changed.items():
        code, _, err, folder = run(*flags, workdir=name, gamma=4, **changes)
        assert code is None, err
        rows[name] = outputs(folder)
    drafted = {name: sum(row["tested"] for row in found) for name, found in rows.items()}
    assert all(row["tested"] <= row["calls"] for row in rows["short"])
    assert drafted["short"] < drafted["usual"]
    assert rows["two"] != rows["usual"]


def test_lines_flags_and_terminal_give_the_same_texts(run, tmp_path, monkeypatch):
    """A row depends on its id and prompt, not on the batch: one by one is as all at once."""
    path = tmp_path / "prompts.txt"
    path.write_text(f"{PROMPTS[0]}\n\n{PROMPTS[1]}\n{PROMPTS[2]}\n")
    expected = outputs(run(f"--prompts={path}", workdir="lines")[3])
    assert len(expected) == 3
    flags = [f"--prompt={prompt}" for prompt in PROMPTS]
    assert outputs(run(*flags, workdir="flags")[3]) == expected
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(PROMPTS) + "\n\n"))
    assert outputs(run(workdir="terminal")[3]) == expected


def test_only_a_line_feed_ends_a_prompt_of_a_text_file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffone\u2028two\r\n\nthree\x0cfour\rfive\n".encode())
    prompts = given_prompts(DecodeConfig(target="t", prompts=str(path)))
    assert [prompt.input for prompt in prompts] == ["one\u2028two", "three\x0cfour\rfive"]
    assert prompts.where(1) == f"{path}:3"
    path.write_bytes(b"one\n\xe9\n")
    with pytest.raises(UserError, match=r"prompts\.txt:2: not valid UTF-8"):
        given_prompts(DecodeConfig(target="t", prompts=str(path)))


def test_a_greedy_draft_of_a_sampling_target(run):
    flags = [f"--prompt={prompt}" for prompt in PROMPTS]
    code, out, err, folder = run(*flags, "--config.draft_temperature=0")
    assert code is None, err
    assert "draft_temperature 0\n" in out
    assert summary(folder)["draft_temperature"] == 0
    rows = outputs(folder)
    assert {row["lossless"] for row in rows} == {True}
    usual = outputs(run(*flags, workdir="usual")[3])
    assert [row["output"] for row in rows] != [row["output"] for row in usual]
    assert "draft_temperature" not in summary(folder.with_name("usual"))


@pytest.mark.parametrize(("temperature", "lossless"), [(1.0, False), (0.0, True)])
def test_every_lossy_text_says_so(run, temperature, lossless):
    """At temperature 0 there is nothing for lenience to change."""
    settings = {"lenience": {"epsilon": 0.3}, "temperature": temperature}
    _, _, _, folder = run(f"--prompt={PROMPTS[0]}", **settings)
    assert [row["lossless"] for row in outputs(folder)] == [lossless]
    assert summary(folder)["lossless"] is lossless


def test_one_prompt_is_told_without_an_interval(run):
    _, out, _, folder = run(f"--prompt={PROMPTS[0]}")
    figures = summary(folder)
    for key in ("block_efficiency", "acceptance_rate"):
        assert f"{key}: {figures[key]:.3g} (n=1)\n" in out
        assert f"{key}_ci95" not in figures


def test_no_more_of_the_prompts_is_read_than_the_longest_needs(run, monkeypatch):
    """Each shape is compiled outside the clock, on a terminal as well."""
    shapes = []
    real = decode.Decoder.__call__

    def call(self, examples, inputs, *rest, **named):
        shapes.append((inputs.shape[1], "on_done" in named))
        return real(self, examples, inputs, *rest, **named)

    monkeypatch.setattr(decode.Decoder, "__call__", call)
    lines = [PROMPTS[0], PROMPTS[2], "and " * 40, PROMPTS[0]]
    run(*(f"--prompt={line}" for line in lines), workdir="flags", input_length=512)
    assert shapes == [(64, False), (64, True)]
    shapes.clear()
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    run(workdir="terminal", input_length=512)
    assert shapes == [*([(32, False)] + [(32, True)] * 2), (64, False), (64, True), (32, True)]


def test_ctrl_c_at_the_terminal_keeps_the_answers(run, monkeypatch):
    class Terminal(io.StringIO):
        def readline(self):
            line = super().readline()
            if not line:
                raise KeyboardInterrupt
            return line

    monkeypatch.setattr("sys.stdin", Terminal(f"{PROMPTS[0]}\n"))
    code, _, _, folder = run()
    assert code is None
    assert [row["prompt"] for row in outputs(folder)] == [PROMPTS[0]]


def test_without_a_draft(run):
    code, _, _, folder = run(f"--prompt={PROMPTS[0]}", draft="")
    assert code is None
    [row] = outputs(folder)
    assert set(row) == {"prompt", "output", "tokens"}
    assert summary(folder)["tokens_per_second_target"] > 0
    assert "block_efficiency" not in summary(folder)


def test_greedy_with_and_without_a_draft_is_the_same_text(run):
    flags = [f"--prompt={prompt}" for prompt in PROMPTS]
    texts = [
        [row["tokens"] for row in outputs(run(*flags, workdir=name, temperature=0.0, draft=d)[3])]
        for name, d in (("alone", ""), ("both", None))
        if d is not None
    ]
    with_draft = outputs(run(*flags, workdir="both", temperature=0.0)[3])
    assert [row["tokens"] for row in with_draft] == texts[0]


def test_a_prompt_of_the_terminal_that_is_too_long_is_left_out(run, monkeypatch):
    lines = [PROMPTS[0], "and " * 60, PROMPTS[1]]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    code, _, err, folder = run()
    assert code is None
    assert [row["prompt"] for row in outputs(folder)] == [PROMPTS[0], PROMPTS[1]]
    assert "error: the prompt:1 is too long" in err


def test_a_prompt_of_the_terminal_that_is_not_utf8_is_left_out(run, monkeypatch):
    lines = [PROMPTS[0], b"\xff\xfeabc".decode("utf-8", "surrogateescape"), PROMPTS[1]]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    code, _, err, folder = run()
    assert code is None
    assert [row["prompt"] for row in outputs(folder)] == [PROMPTS[0], PROMPTS[1]]
    assert "error: the prompt:1 is not UTF-8\n" in err


def test_a_prompt_may_begin_like_a_path(run):
    _, _, _, folder = run("--prompt=~/3 apples and ~")
    assert [row["prompt"] for row in outputs(folder)] == ["~/3 apples and ~"]


def test_bytes_that_are_not_utf8_reach_the_check_in_every_locale(run, monkeypatch):
    """Where a locale is set Python reads standard input strictly."""
    content = PROMPTS[0].encode() + b"\nTom has \xff apples .\n"
    stdin = io.TextIOWrapper(io.BytesIO(content), encoding="ascii", errors="strict")
    monkeypatch.setattr("sys.stdin", stdin)
    code, _, err, folder = run()
    assert code is None
    assert [row["prompt"] for row in outputs(folder)] == [PROMPTS[0]]
    assert "error: the prompt:1 is not UTF-8\n" in err


def test_texts_of_another_law_are_said_to_be(run):
    flags = [f"--prompt={prompt}" for prompt in PROMPTS]
    lenience = {"kind": "linear", "epsilon": 0.5, "relaxed_residual": True}
    _, out, _, folder = run(*flags, temperature=1.0, lenience=lenience, num_drafts=1)
    assert "lenience 0.5: the texts are not of the target's law\n" in out
    found = summary(folder)
    assert (found["lossless"], found["lenience"]) == (False, 0.5)
    assert (found["lenience_kind"], found["relaxed_residual"]) == ("linear", True)
    exact = {"exact": {"temperature": 1.0}, "greedy": {"temperature": 0.0, "lenience": lenience}}
    for name, changes in exact.items():
        _, out, _, folder = run(*flags, workdir=name, **changes)
        assert "lenience" not in out
        assert "lenience" not in summary(folder)
        assert summary(folder)["lossless"] is True


def test_a_seed_that_is_none_is_refused(run):
    code, _, err, folder = run(f"--prompt={PROMPTS[0]}", seed=-1)
    assert code == 2
    assert err.startswith("error: config.seed is -1, must be within 0 and 2**32 - 1")
    assert not folder.exists()


def test_colours_are_those_of_the_origins(vocabulary):
    tokens = vocabulary.encode("Tom has 3 apples")
    origins = [ACCEPTED, CORRECTED, BONUS, ACCEPTED][: len(tokens)]
    assert len(tokens) == 4
    text = coloured(Answer("", "Tom has 3 apples", tokens, origins), vocabulary)
    assert text.plain == "Tom has 3 apples"
    shown = [(text.plain[span.start : span.end].strip(), span.style) for span in text.spans]
    assert shown == [
        (word, STYLES[origin])
        for word, origin in zip(["Tom", "has", "3", "apples"], origins, strict=True)
    ]
    assert len(set(STYLES.values())) == 3
    assert coloured(Answer("", "plain", tokens), vocabulary) == Text("plain")


def test_a_character_of_several_bytes_is_shown_when_it_is_whole(tmp_path):
    proto = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a pen and a pear"] * 20),
        model_writer=proto,
        vocab_size=275,
        byte_fallback=True,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    path = tmp_path / "bytes.model"
    path.write_bytes(proto.getvalue())
    vocabulary = load_vocabulary(path)
    tokens = vocabulary.encode("a \u20ac pen")  # three bytes
    assert sum(vocabulary.pieces[token].startswith("<0x") for token in tokens) == 3

    def shown(tokens):
        origins = [ACCEPTED] * (len(tokens) - 1) + [BONUS]
        return coloured(Answer("", "", tokens, origins), vocabulary).plain

    assert shown(tokens) == "a \u20ac pen"
    cut = 1 + [vocabulary.pieces[token] for token in tokens].index("<0x82>")
    assert shown(tokens[:cut]) == vocabulary.decode(tokens[:cut])
    assert shown(tokens[:cut]).endswith("\ufffd")


@pytest.mark.parametrize(
    ("flags", "changes", "words"),
    [
        (["--prompts=nowhere.txt"], {}, "there is no file of prompts 'nowhere.txt'"),
        (["--prompts=nowhere.jsonl"], {}, "the file 'nowhere.jsonl' does not exist"),
        (["--prompts=a.txt", "--prompt=b"], {}, "give --prompts or --prompt"),
        (["--prompt=   "], {}, "--prompt holds no prompt"),
        (["--prompt=" + "and " * 60], {}, "--prompt:1 is too long: 60 input"),
        (["--prompt=\u200b"], {}, "--prompt:1: the input has no piece of the vocabulary"),
        (["--prompt=a", "--prompt=a\udcff b"], {}, "--prompt:2 is not UTF-8"),
        (["--prompt=a", "--config.prefix=\udcff"], {}, "config.prefix is not UTF-8"),
        ([], {"prompt": ("a\udcff",)}, "--prompt:1 is not UTF-8"),
        ([], {"gamma": 0}, "config.gamma is 0, must be at least 1"),
        ([], {"verification": "blok"}, "unknown verification rule 'blok'"),
        ([], {"verification": "blok", "draft": ""}, "unknown verification rule 'blok'"),
        ([], {"verification": "greedy"}, "greedy verification needs temperature 0"),
        (["--prompt=a"], {"num_drafts": 2, "verification": "block"}, "several drafts need token"),
        ([], {"draft_temperature": -1.0}, "config.draft_temperature is -1.0; it must be 0"),
        ([], {"draft_top_p": 1.5}, "config.draft_top_p is 1.5; it must be in (0, 1]"),
        (
            ["--config.draft=", "--config.num_drafts=2"],
            {},
            "config.num_drafts would change nothing",
        ),
        ([], {"draft": "", "block_length": {"max_entropy": 0.6}}, "config.block_length would"),
        ([], {"draft": "", "verification": "block"}, "config.verification would change nothing"),
        (
            [],
            {"draft": "", "lenience": {"epsilon": 0.5}, "draft_top_k": 0, "draft_top_p": 0.9},
            "config.lenience, config.draft_top_k, config.draft_top_p would change nothing, for "
            "config.draft is empty; name a draft or leave that out",
        ),
        ([], {"draft": "stories-draf"}, "did you mean 'stories-draft'"),
        ([], {"temprature": 0.5}, "did you mean 'config.temperature'"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(run, flags, changes, words):
    code, _, err, folder = run(*flags, **changes)
    assert code == 2
    assert err.startswith("error: ")
    assert words in err
    assert err.count("\n") == 1
    assert not folder.exists()


def test_broken_lines_are_named(run, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"input": "a"}\n{"input": \n')
    code, _, err, folder = run(f"--prompts={path}")
    assert code == 2
    assert "prompts.jsonl:2: not valid JSON" in err
    assert not folder.exists()


@pytest.mark.parametrize("lines", ["\n\n", "and " * 60])
def test_a_terminal_without_a_prompt_says_so_and_leaves_nothing(run, monkeypatch, lines):
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    code, _, err, folder = run()
    assert code == 2
    assert "there was no prompt" in err
    assert not folder.exists()


def test_texts_are_on_the_disk_before_they_are_shown(run, monkeypatch):
    """Whoever reads along may stop reading."""

    def closed(*_):
        raise BrokenPipeError

    monkeypatch.setattr(decode, "_show", closed)
    monkeypatch.setattr(os, "dup2", lambda *_: None)  # this process talks on
    code, _, _, folder = run(*(f"--prompt={prompt}" for prompt in PROMPTS))
    assert code == door.UNREAD
    assert [row["prompt"] for row in outputs(folder)] == list(PROMPTS)
    assert summary(folder)["num_prompts"] == 3


def test_fresh_weights_are_said_to_be(run):
    code, out, _, _ = run("--prompt=Tom has 3", target="cpu_draft", draft="")
    assert code is None
    assert out.splitlines()[0].startswith("target: cpu_draft (a preset: fresh weights, never tr")
    assert "a preset" not in run("--prompt=Tom has 3", workdir="other")[1]


def test_a_model_that_gives_nan_ends_the_terminal_too(run, models, tmp_path, monkeypatch):
    model, params = zoo.load(models / "target")
    broken = jax.tree.map(lambda leaf: leaf * np.nan, params)
    pieces = zoo.describe(models / "target")["vocabulary_fingerprint"]
    zoo.save_native(model, broken, tmp_path / "broken", {"vocabulary_fingerprint": pieces})
    monkeypatch.setattr("sys.stdin", io.StringIO("a\nb\n"))
    code, _, err, folder = run(target=str(tmp_path / "broken"), draft="")
    assert code == 2
    assert err.count("gave NaN logits") == 1
    assert "no prompt" not in err
    assert not folder.exists()


def test_a_terminal_without_a_prompt_keeps_what_a_run_before_it_left(run, monkeypatch):
    for line in (PROMPTS[0], ""):
        monkeypatch.setattr("sys.stdin", io.StringIO(line))
        code, _, err, folder = run()
        assert ("there was no prompt" in err) is not bool(line)
        assert code == (None if line else 2)
        assert len(outputs(folder)) == summary(folder)["num_prompts"] == 1
    assert (folder / "config.json").is_file()
