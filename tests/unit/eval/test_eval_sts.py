"""Reading SentEval's STS files and scoring them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dalr_scale.errors import UserError
from dalr_scale.eval.sts import (
    MAIN_TASKS,
    SUBSETS,
    TASKS,
    average_ranks,
    load_sts,
    pair_cosines,
    score_sts,
    score_tasks,
    spearman,
)

# Word counts as "embeddings": similar sentences share words.
WORDS = ["a", "dog", "cat", "runs", "sleeps", "man", "eats", "big"]


def encode(sentences):
    return torch.tensor([[float(s.split().count(w)) for w in WORDS] for s in sentences])


PAIRS = [
    ("a dog runs", "a dog runs", 5.0),
    ("a dog runs", "a dog sleeps", 3.5),
    ("a dog runs", "a cat sleeps", 2.0),
    ("man eats", "big cat", 0.0),
]


def write_year(root: Path, task: str, *, blanks: bool = True) -> None:
    directory = root / "STS" / f"{task}-en-test"
    directory.mkdir(parents=True)
    for name in SUBSETS[task]:
        rows = [(a, b, str(score)) for a, b, score in PAIRS]
        if blanks:
            rows.insert(1, ("not", "scored", ""))
        (directory / f"STS.input.{name}.txt").write_text("".join(f"{a}\t{b}\n" for a, b, _ in rows))
        (directory / f"STS.gs.{name}.txt").write_text("".join(f"{score}\n" for *_, score in rows))


def write_tables(root: Path) -> None:
    (root / "STS" / "STSBenchmark").mkdir(parents=True, exist_ok=True)
    (root / "SICK").mkdir()
    for split in ("dev", "test"):
        lines = [f"g\tf\ty\t1\t{s}\t{a}\t{b}" for a, b, s in PAIRS]
        lines[0] += "\textra\tfields"
        path = root / "STS" / "STSBenchmark" / f"sts-{split}.csv"
        path.write_text("\n".join(lines) + "\n")
    head = "pair_ID\tsentence_A\tsentence_B\trelatedness_score\tentailment_judgment"
    rows = [f"{i}\t{a}\t{b}\t{s}\tNEUTRAL" for i, (a, b, s) in enumerate(PAIRS)]
    (root / "SICK" / "SICK_trial.txt").write_text("\n".join([head, *rows]) + "\n")
    # The published test file has Windows line ends, the others do not.
    (root / "SICK" / "SICK_test_annotated.txt").write_text("\r\n".join([head, *rows]) + "\r\n")


@pytest.fixture
def root(tmp_path):
    for task in SUBSETS:
        write_year(tmp_path, task)
    write_tables(tmp_path)
    return tmp_path


@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_read_and_unscored_lines_are_left_out(task, root):
    loaded = load_sts(root, task)
    copies = len(SUBSETS.get(task, ("one",)))
    assert loaded.pairs == [(a, b) for a, b, _ in PAIRS] * copies
    assert loaded.scores.tolist() == [score for *_, score in PAIRS] * copies


def test_the_directory_above_senteval_will_do(root):
    (root / "data").mkdir()
    (root / "data" / "senteval").symlink_to(root)
    assert load_sts(root / "data", "STS13").pairs == load_sts(root, "STS13").pairs


def test_all_setting_is_one_correlation_over_the_concatenated_subsets(root):
    # Shift the scores of one subset: each subset alone still ranks perfectly, the whole does not.
    gold = root / "STS" / "STS13-en-test" / "STS.gs.FNWN.txt"
    gold.write_text("50\n\n35\n20\n10\n")
    task = load_sts(root, "STS13")
    cosines = pair_cosines(encode, task.pairs)
    parts = [spearman(cosines[i : i + 4], task.scores[i : i + 4]) for i in (0, 4, 8)]
    assert np.allclose(parts, 1.0)
    assert score_sts(encode, task) < 0.9


def test_score_follows_the_pairing_of_lines(root):
    assert score_sts(encode, load_sts(root, "STS12")) == pytest.approx(1.0)
    for name in SUBSETS["STS12"]:
        gold = root / "STS" / "STS12-en-test" / f"STS.gs.{name}.txt"
        gold.write_text("\n".join(reversed(gold.read_text().split())) + "\n\n")
    with pytest.raises(UserError, match="between"):
        # The blank moved to the end, so another line is scored now; break its tab to prove it.
        source = root / "STS" / "STS12-en-test" / "STS.input.MSRpar.txt"
        source.write_text(source.read_text().replace("not\tscored", "not scored"))
        load_sts(root, "STS12")
    source.write_text(source.read_text().replace("not scored", "not\tscored"))
    assert score_sts(encode, load_sts(root, "STS12")) < 0


def test_sentences_are_whitespace_tokens_joined_by_one_space(root):
    path = root / "STS" / "STSBenchmark" / "sts-dev.csv"
    path.write_text('g\tf\ty\t1\t2.5\t Two  words \t"A quote\u2028inside\n' * 2, encoding="utf-8")
    assert load_sts(root, "STS-B-dev").pairs == [("Two words", '"A quote inside')] * 2


def test_missing_and_broken_files_are_named(root):
    with pytest.raises(UserError, match="unknown task 'STS99'"):
        load_sts(root, "STS99")
    directory = root / "STS" / "STS16-en-test"
    (directory / "STS.gs.headlines.txt").write_text("1.0\n")
    with pytest.raises(UserError, match=r"STS\.input\.headlines\.txt has 5 lines"):
        load_sts(root, "STS16")
    (directory / "STS.gs.headlines.txt").write_text("1.0\nhigh\n2\n3\n4\n")
    with pytest.raises(UserError, match=r"STS\.gs\.headlines\.txt, line 2: 'high' is not a score"):
        load_sts(root, "STS16")
    (directory / "STS.gs.headlines.txt").write_text("1.0\nnan\n2\n3\n4\n")
    with pytest.raises(UserError, match="line 2: 'nan'"):
        load_sts(root, "STS16")
    (directory / "STS.input.headlines.txt").unlink()
    with pytest.raises(UserError, match=r"STS\.input\.headlines\.txt is missing"):
        load_sts(root, "STS16")
    (root / "SICK" / "SICK_trial.txt").write_text("pair_ID\n1\ta dog\n")
    with pytest.raises(UserError, match=r"SICK_trial\.txt, line 2: 2 tab-separated fields"):
        load_sts(root, "SICK-R-dev")


def test_average_needs_all_seven_tasks_and_uses_rounded_scores(root):
    table = score_tasks(encode, root, [*MAIN_TASKS, "STS-B-dev"])
    assert table["Avg"] == round(sum(table[name] for name in MAIN_TASKS) / 7, 2)
    assert "Avg" not in score_tasks(encode, root, MAIN_TASKS[:6])
    assert all(value == round(value, 2) for value in table.values())


def test_spearman_against_known_values():
    # Textbook example (IQ and hours of television): rho = -29/165.
    iq = np.array([106, 100, 86, 101, 99, 103, 97, 113, 112, 110])
    hours = np.array([7, 27, 2, 50, 28, 29, 20, 12, 6, 17])
    assert spearman(iq, hours) == pytest.approx(-29 / 165, abs=1e-12)
    # With ties, by hand: ranks 1, 2.5, 2.5, 4 against 1, 3, 2, 4.
    tied = spearman(np.array([1, 2, 2, 3]), np.array([1, 3, 2, 4]))
    assert tied == pytest.approx(4.5 / np.sqrt(4.5 * 5.0), abs=1e-12)
    # Negative control: ranks in order of appearance would give 0.8 or 1.0.
    assert tied not in (pytest.approx(0.8), pytest.approx(1.0))
    assert average_ranks(np.array([30.0, 10.0, 30.0, 20.0])).tolist() == [3.5, 1.0, 3.5, 2.0]


def test_spearman_depends_on_ranks_only_and_has_defined_edges():
    x = np.random.default_rng(0).normal(size=50)
    assert spearman(x, np.exp(x)) == pytest.approx(1.0)
    assert spearman(x, -(x**3)) == pytest.approx(-1.0)
    assert spearman(x, np.ones(50)) == 0.0
    for bad in ([x, x[:-1]], [x[:1], x[:1]], [x, np.full(50, np.nan)]):
        with pytest.raises(ValueError, match=r"equally long|NaN"):
            spearman(*bad)


def test_undefined_cosine_counts_as_zero():
    pairs = [("unknown words", "a dog"), ("a dog", "a dog"), ("nothing", "here")]
    assert pair_cosines(encode, pairs).tolist() == pytest.approx([0.0, 1.0, 0.0])


def test_each_sentence_is_encoded_once(root):
    seen = []

    def counting(sentences):
        seen.extend(sentences)
        return encode(sentences)

    score_sts(counting, load_sts(root, "STS14"))
    assert len(seen) == len(set(seen)) == 5
