"""Quality: final numbers, and ROUGE and BLEU against T5's golden figures and sacrebleu itself."""

import json

import pytest
import sacrebleu

from distillspec_jax.errors import UserError
from distillspec_jax.evaluation.quality import final_number, has_references, pooled_quality, quality


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 + 4 = 7\n#### 7", 7),
        ("####18", 18),
        ("#### 1,234.50", 1234.5),
        ("#### -3", -3),
        ("#### $ 70,000 a year", 70000),
        ("#### 5 no, #### 6", 6),
        ("#### 12.", 12),
        ("the answer is 7", None),
        ("#### none", None),
        ("", None),
    ],
)
def test_final_number(text, number):
    assert final_number(text) == number


def test_exact_match_counts_numbers_not_texts():
    references = ["a #### 1,000", "b #### 2", "c #### 3", "d #### 4"]
    predictions = ["x #### 1000.0", "b #### 20", "c 3", "#### 4"]
    measured = quality("exact_match_number", predictions, references)
    assert measured.value == 50
    assert 0 < measured.low < 50 < measured.high < 100
    assert measured.n == 4


@pytest.mark.parametrize(
    ("kind", "mean"), [("rouge1", 38.5525), ("rouge2", 22.1449), ("rougeLsum", 38.3265)]
)
def test_rouge_agrees_with_t5(shared_data, kind, mean):
    folder = shared_data / "t5_metrics_golden"
    predictions, references = (
        (folder / name).read_text().splitlines()
        for name in ("prediction_large.txt", "target_large.txt")
    )
    measured = quality(kind, predictions, references)
    assert measured.value == pytest.approx(mean, abs=1e-3)
    golden = json.loads((folder / "expected_bootstrap_results.json").read_text())
    assert measured.low < golden[kind] < measured.high
    assert measured.n == 1000


@pytest.mark.parametrize("metric", ["bleu", "rouge2", "exact_match_number"])
def test_texts_without_references_have_no_quality(metric):
    """Which is not a quality of 0."""
    assert quality(metric, ["a", "b"], ["", " "]) is None
    with pytest.raises(UserError, match=r"2 of 3 references are empty, the first is reference 1;"):
        quality(metric, ["a", "b", "c"], ["#### 1", "", ""])


def test_a_reference_that_cannot_be_read_is_told_by_its_place():
    def where(row):
        return f"own.jsonl:{row + 1}"

    with pytest.raises(UserError, match=r"own.jsonl:2 has no final number '#### N'.*: 'b'"):
        has_references("exact_match_number", ["#### 1", "b"], where)
    with pytest.raises(UserError, match=r"the first is own.jsonl:2;"):
        has_references("bleu", ["a", ""], where)


def test_all_right_in_every_seed_is_as_sure_as_in_one():
    one = quality("exact_match_number", ["#### 1"] * 10, ["#### 1"] * 10)
    three = pooled_quality("exact_match_number", [["#### 1"] * 10] * 3, ["#### 1"] * 10)
    assert (one.value, one.low, one.high) == (three.value, three.low, three.high)
    assert one.low == pytest.approx(69.15, abs=0.01)


def test_percents_end_at_a_hundred():
    """Student's interval of three seeds would go on."""
    texts = [["#### 1"] * 10, ["#### 1"] * 10, ["#### 1"] * 9 + ["#### 2"]]
    measured = pooled_quality("exact_match_number", texts, ["#### 1"] * 10)
    assert measured.value == pytest.approx(290 / 3)
    assert measured.low < 96 < measured.high == 100


def test_rouge_two_by_hand():
    # bigrams: the cat, cat sat | the cat, cat ran: one of two on either side
    assert quality("rouge2", ["the cat sat"], ["the cat ran"]).value == pytest.approx(50)


def test_bleu_is_the_corpus_score_of_sacrebleu():
    predictions = ["a quick brown fox jumps.", "two dogs sleep all day long", "It rains in Spain"]
    references = ["a quick brown fox jumped.", "two dogs sleep all the day", "it rains in Spain"]
    expected = sacrebleu.corpus_bleu(predictions, [references], tokenize="intl").score
    measured = quality("bleu", predictions, references)
    assert measured.value == pytest.approx(expected, abs=1e-9)
    assert measured.low < measured.value < measured.high
    assert quality("bleu", references, references).low == pytest.approx(100)


def test_bleu_splits_the_signs_of_all_languages():
    """What `13a` would leave at its word: quotes of other languages, and symbols of money."""
    predictions, references = ["Er sagte „ja“ zu 5€ am Tag"], ["Er sagte „nein“ zu 5€ am Tag"]
    scores = {
        name: sacrebleu.corpus_bleu(predictions, [references], tokenize=name).score
        for name in ("intl", "13a")
    }
    assert scores["intl"] > scores["13a"] + 5
    assert quality("bleu", predictions, references).value == pytest.approx(scores["intl"])


def test_quality_by_the_name_of_a_task():
    assert quality("none", ["a"], ["b"]) is None
    assert quality("exact_match_number", ["#### 1"], ["#### 1"]).value == 100
    assert quality("rouge2", ["a b"], ["a b"]).value == 100
    assert quality("bleu", ["a b c d"], ["a b c d"]).value == pytest.approx(100)


def test_seeds_are_pooled_over_their_common_prompts():
    references = ["#### 1", "#### 2", "#### 3", "#### 4", "#### 5"]
    right, wrong = references, ["#### 9"] * 5
    measured = pooled_quality("exact_match_number", [right, wrong, wrong], references)
    assert measured.value == pytest.approx(100 / 3)
    # which seeds are drawn is all that varies, from only wrong ones to only right ones
    assert (measured.low, measured.high) == pytest.approx((0, 100))
    assert measured.n == 5


def test_refusals():
    with pytest.raises(UserError, match="did you mean 'bleu'"):
        quality("blue", ["a"], ["a"])
    with pytest.raises(UserError, match="got 1 and 2"):
        quality("bleu", ["a"], ["a", "b"])
    with pytest.raises(UserError, match="got 0 and 0"):
        quality("rouge2", [], [])
    with pytest.raises(UserError, match=r"reference 1 has no final number.*'seven'"):
        quality("exact_match_number", ["#### 1", "#### 7"], ["#### 1", "seven"])
