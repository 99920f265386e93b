"""The MMLU questions: the same from every layout and hub, and whatever is wrong with them is named.

The hubs' real clients run, against the small server of tests/checkpoint/test_sources.py and against ports where nobody
listens. Questions: two made-up ones per split for each of the 57 subjects, and `AWKWARD` in anatomy's test split.
"""

import csv
import hashlib
import json
import random
import shutil
import socket
import tempfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model_preparation import load_checkpoint
from model_preparation.errors import SurgeryError
from model_preparation.evaluation.evaluate import evaluate_model
from model_preparation.evaluation.mmlu_questions import SUBJECTS, find_questions, read_split, read_subject
from model_preparation.hub import download
from tests.checkpoint.test_sources import COMMIT, NOBODY, caches, hub, huggingface_copy, modelscope_copy  # noqa: F401
from tests.evaluation.test_mmlu import question, write_questions, write_rows

SPLITS = ("dev", "test")
AWKWARD = {
    "question": 'He said "no, None",\nthen\r\nleft.\u2028Why? ',
    "choices": ["None", "NA", "", '"'],
    "answer": 3,
}


@pytest.fixture(scope="module")
def rows():
    rng = random.Random(0)
    rows = {subject: {split: [question(rng) for _ in range(2)] for split in SPLITS} for subject in SUBJECTS}
    rows["anatomy"]["test"].append(AWKWARD)
    return rows


def write_csv(folder, rows):
    """The original layout, with the byte order mark that Excel puts before it."""
    for subject, splits in rows.items():
        for split, questions in splits.items():
            (folder / split).mkdir(parents=True, exist_ok=True)
            with (folder / split / f"{subject}_{split}.csv").open("w", encoding="utf-8-sig", newline="") as file:
                lines = [[row["question"], *row["choices"], "ABCD"[row["answer"]]] for row in questions]
                csv.writer(file).writerows(lines)
    return folder


def write_json_lines(folder, rows, pattern="{subject}/{split}.jsonl"):
    for subject, splits in rows.items():
        for split, questions in splits.items():
            path = folder / pattern.format(subject=subject, split=split)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in questions))
    return folder


def write_json_lines_by_split(folder, rows):
    letters = {
        subject: {
            split: [row | {"answer": "ABCD"[row["answer"]]} for row in questions] for split, questions in splits.items()
        }
        for subject, splits in rows.items()
    }
    return write_json_lines(folder, letters, "{split}/{subject}.jsonl")


WRITERS = (write_questions, write_csv, write_json_lines, write_json_lines_by_split)


@pytest.fixture(params=WRITERS, ids=lambda write: write.__name__)
def folder(request, rows, tmp_path):
    """The questions in each of the layouts; a test may damage them."""
    return request.param(tmp_path / "mmlu", rows)


@pytest.fixture
def parquet(rows, tmp_path):
    return write_questions(tmp_path / "mmlu", rows)


@pytest.fixture(scope="module")
def digest(rows):
    lines = [
        json.dumps([subject, split, index, row["question"], row["choices"], row["answer"]], separators=(",", ":"))
        for subject in SUBJECTS
        for split in SPLITS
        for index, row in enumerate(rows[subject][split])
    ]
    return hashlib.sha256("".join(line + "\n" for line in lines).encode()).hexdigest()


def as_lm_eval_reads_them(rows, subject):
    """With a column `subject` in the same place as on the hub: lm-eval's digests depend on the order."""
    return {
        split: [{"question": row["question"], "subject": subject, **row} for row in questions]
        for split, questions in rows[subject].items()
    }


# --- Layouts ----------------------------------------------------------------------------------------------------------


def test_every_layout_gives_the_same_rows_and_the_same_digest(folder, rows, digest):
    found = find_questions(folder, num_fewshot=2)
    assert (found.source, found.folder, found.digest) == (str(folder), folder, digest)
    for subject in ("anatomy", "world_religions"):
        read = read_subject(folder=found.folder, subject=subject, version=2.0)
        assert read["test"].column_names == ["question", "subject", "choices", "answer"]
        assert {split: read[split].to_list() for split in SPLITS} == as_lm_eval_reads_them(rows, subject)


def test_the_digest_is_of_every_part_of_every_row(rows, digest, tmp_path):
    first = rows["virology"]["dev"][0]
    for number, change in enumerate(
        ({"question": "?"}, {"choices": first["choices"][::-1]}, {"answer": (first["answer"] + 1) % 4})
    ):
        changed = rows | {"virology": rows["virology"] | {"dev": [first | change, rows["virology"]["dev"][1]]}}
        assert find_questions(write_json_lines(tmp_path / str(number), changed)).digest != digest
    swapped = rows | {"virology": rows["virology"] | {"dev": rows["virology"]["dev"][::-1]}}
    assert find_questions(write_json_lines(tmp_path / "swapped", swapped)).digest != digest


words = ["", " ", "None", "NA", "N/A", "nan", "null", "#N/A", "TRUE", "1", "1.0", "A", "=1+1", "{}", "[1]"]
signs = [
    "a,b",
    '"',
    '""',
    '"a"b',
    "'",
    "\\",
    "\n",
    "\r",
    "\r\n",
    "\t",
    "\ufeff",
    "\u2028",
    "\x85",
    "\x1a",
    "é",
    "文",
    "𝔸",
]
texts = st.text(st.characters(codec="utf-8")) | st.sampled_from(words + signs)
any_rows = st.lists(
    st.fixed_dictionaries(
        {"question": texts, "choices": st.lists(texts, min_size=4, max_size=4), "answer": st.integers(0, 3)}
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(dev=any_rows, test=any_rows)
def test_any_text_is_read_as_it_was_written_in_every_layout(dev, test):
    rows = {"anatomy": {"dev": dev, "test": test}}
    with tempfile.TemporaryDirectory() as scratch:
        for write in WRITERS:
            read = read_subject(folder=write(Path(scratch) / write.__name__, rows), subject="anatomy")
            wanted = as_lm_eval_reads_them(rows, "anatomy")
            assert {split: read[split].to_list() for split in SPLITS} == wanted, write.__name__


def test_lm_eval_scores_csv_and_parquet_alike(rows, checkpoint_dir, tmp_path):
    model, tokenizer = load_checkpoint(checkpoint_dir)
    results, tasks = [], ["mmlu_anatomy", "mmlu_virology"]
    for write in (write_questions, write_csv):
        folder = write(tmp_path / write.__name__, rows)
        result = evaluate_model(model, tokenizer, tasks=tasks, mmlu_data=folder, num_fewshot=1)
        assert result.pop("mmlu_data") == str(folder)
        results.append(result)
    assert results[0] == results[1]
    assert results[0]["questions"] == 5


def test_spaces_around_a_letter_and_empty_lines_mean_nothing(rows, tmp_path):
    folder = write_csv(tmp_path / "csv", rows)
    (folder / "dev" / "anatomy_dev.csv").write_text('"Which,\none?",1,2,3,4, B \n\n\nAnd now?,1,2,3,4,D\n\n')
    assert read_split(folder, "anatomy", "dev") == [
        {"question": "Which,\none?", "choices": ["1", "2", "3", "4"], "answer": 1},
        {"question": "And now?", "choices": ["1", "2", "3", "4"], "answer": 3},
    ]
    folder = write_json_lines(tmp_path / "json", rows)
    line = json.dumps(AWKWARD | {"answer": " D ", "subject": "anatomy"})
    (folder / "anatomy" / "dev.jsonl").write_bytes(b"\xef\xbb\xbf" + line.encode() + b"\r\n\r\n" + line.encode())
    assert read_split(folder, "anatomy", "dev") == [AWKWARD, AWKWARD]


def test_a_split_may_come_in_several_parts(parquet, rows, digest):
    questions = rows["anatomy"]["test"]
    whole = parquet / "anatomy" / "test-00000-of-00001.parquet"
    for part, row in enumerate(questions):
        write_rows(parquet / "anatomy" / f"test-{part:05}-of-{len(questions):05}.parquet", [row])
    with pytest.raises(SurgeryError, match=r"anatomy has test-00000-of-00001.*: a part is missing, or one is too many"):
        find_questions(parquet)
    whole.unlink()
    assert find_questions(parquet).digest == digest
    (parquet / "anatomy" / "test-00001-of-00003.parquet").unlink()
    with pytest.raises(SurgeryError, match="a part is missing, or one is too many"):
        find_questions(parquet)


# --- What is wrong with a folder --------------------------------------------------------------------------------------


def refused(folder, *words, **arguments):
    """The message with which the folder is refused, which has each of `words` in it."""
    with pytest.raises(SurgeryError) as error:
        find_questions(folder, **arguments)
    for word in words:
        assert word in str(error.value), error.value
    return str(error.value)


def only_file(folder, subject, split):
    (file,) = [path for path in folder.rglob("*") if path.is_file() and {subject, split} <= set(_words(folder, path))]
    return file


def _words(folder, path):
    name = path.stem.partition("-")[0]
    return [*path.relative_to(folder).parts[:-1], name, name.removesuffix("_dev").removesuffix("_test")]


def test_a_folder_that_is_none_is_named_with_what_may_be_given(tmp_path):
    alternatives = ("<subject>/{dev,test}-*.parquet", "_{dev,test}.csv", ".jsonl", "hub and modelscope", "MMLU_DATA")
    refused(tmp_path / "nowhere", f"{tmp_path / 'nowhere'} does not exist", "--mmlu_data", *alternatives)
    (tmp_path / "data.tar").touch()
    refused(tmp_path / "data.tar", "is a file", *alternatives)
    refused(tmp_path, "has no subject in any of these layouts: ", "<subject>/{dev,test}-*.parquet")
    refused("~nobody-here/mmlu", "does not exist")


def test_the_folder_inside_is_pointed_to(folder):
    refused(folder.parent, "Its folder mmlu has them: give that one.")


def test_missing_subjects_are_counted_and_named(folder):
    for subject in ("anatomy", "virology"):
        for split in SPLITS:
            only_file(folder, subject, split).unlink()
    refused(folder, "lacks 2 of 57 subjects: anatomy, virology.")


@pytest.mark.parametrize("split", SPLITS)
def test_a_missing_split_is_named(folder, split):
    file = only_file(folder, "anatomy", split)
    file.unlink()
    name = file.relative_to(folder).as_posix().replace("00000-of-00001", "*")
    refused(folder, f"{folder} has no {name}.")


def test_an_empty_split_is_named(folder):
    file = only_file(folder, "anatomy", "test")
    if file.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.parquet.read_table(file).slice(0, 0), file)
    else:
        file.write_text("\n")
    refused(folder, f"{file} has no rows")


def test_two_layouts_of_one_subject_are_refused(parquet, rows):
    write_json_lines(parquet, {"virology": rows["virology"]})
    refused(parquet, "virology in 2 layouts", "<subject>/{dev,test}-*.parquet and <subject>/{dev,test}.jsonl")


def test_more_examples_than_the_dev_split_has_are_refused(folder):
    refused(folder, "has 2 examples in its dev split, but num_fewshot is 3", "--num_fewshot 2", num_fewshot=3)


PARQUET, CSV, JSON = "anatomy/test-00000-of-00001.parquet", "test/anatomy_test.csv", "anatomy/test.jsonl"
WRITER_OF = {PARQUET: write_questions, CSV: write_csv, JSON: write_json_lines}
GOOD = '"What?",1,2,3,4,A\n'


@pytest.fixture(scope="module")
def whole(rows, tmp_path_factory):
    """For each of the three files, a folder that has this file."""
    return {name: write(tmp_path_factory.mktemp("mmlu"), rows) for name, write in WRITER_OF.items()}


def refused_with(whole, name, content, message):
    """With `content` in the file, its folder is refused. Afterwards the file is as before."""
    path = whole[name] / name
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        refused(whole[name], message.format(path))
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (PARQUET, b"PAR1 but no more", "is not a readable parquet file"),
        (PARQUET, b"version https://git-lfs.github.com/spec/v1\n", "Run git lfs pull"),
        (CSV, "question,A,B,C,D,answer\n" + GOOD, "Line 1 of {} has the answer 'answer', but needs A, B, C or D"),
        (CSV, GOOD + '"Two\nlines?",1,2,3,4,A\nWhat?,1,2,3,A\n', "Line 4 of {} has 5 columns"),
        (CSV, GOOD + "What?,1,2,3,4,5,A\n", "Line 2 of {} has 7 columns"),
        (CSV, GOOD + '"What?,1,2,3,4,A\n' + GOOD, "The question that ends in line 3 of {} is not CSV: ',' exp"),
        (CSV, GOOD + '"What?,1,2,3,4,A\nWhat?,1,2,3,4,A\n', "The question that ends in line 3 of {} is not CSV"),
        (CSV, GOOD + "What?,1,2,3,4,E\n", "Line 2 of {} has the answer 'E'"),
        (CSV, GOOD + "What?,1,2,3,4,\n", "Line 2 of {} has the answer ''"),
        (CSV, GOOD + "What?,1,2,3,4,2\n", "Line 2 of {} has the answer '2'"),
        (CSV, GOOD + "What?,1,2,3,4,AB\n", "Line 2 of {} has the answer 'AB'"),
        (CSV, GOOD + f"{'W' * 200_000},1,2,3,4,A\n", "ends in line 2 of {} is not CSV: field larger"),
        (CSV, GOOD.encode() + b"Caf\xe9?,1,2,3,4,A\n", "{} cannot be read: line 2 is not UTF-8 text"),
        (CSV, GOOD.encode("utf-16"), "{} cannot be read: it is UTF-16 text"),
        (JSON, "\n{'question': 1}\n", "Line 2 of {} is not JSON: Expecting property name"),
        (JSON, "[" * 100_000, "Line 1 of {} is not JSON"),
        (JSON, "[1]\n", "Line 1 of {} has [1], but needs an object"),
        (JSON, "{}\n", "Line 1 of {} has the fields (none), but needs question, choices, answer too"),
        (JSON, '{"question": "", "answer": 0}', "Line 1 of {} has the fields question, answer, but needs choices too"),
        (JSON, '{"question": "", "question": ""}', "Line 1 of {} is not JSON: a field occurs twice: question,"),
        (JSON, b'{"question": "\xff"}', "{} cannot be read: line 1 is not UTF-8 text"),
    ],
)  # fmt: skip
def test_a_file_that_is_none_is_named_with_the_line(name, content, message, whole):
    refused_with(whole, name, content if isinstance(content, bytes) else content.encode(), message)


@pytest.mark.parametrize("name", [PARQUET, JSON])
@pytest.mark.parametrize(
    ("damage", "seen"),
    [
        ({"question": None}, "the question None"),
        ({"choices": ["1", "2", "3"]}, "the choices ['1', '2', '3']"),
        ({"choices": ["1", "2", "3", None]}, "the choices ['1', '2', '3', None]"),
        ({"choices": None}, "the choices None"),
        ({"choices": [1, 2, 3, 4]}, "the choices [1, 2, 3, 4]"),
        ({"choices": "1234"}, "the choices '1234'"),
        ({"answer": 4}, "the answer 4"),
        ({"answer": -1}, "the answer -1"),
        ({"answer": None}, "the answer None"),
        ({"answer": "E"}, "the answer 'E'"),
        ({"answer": "0"}, "the answer '0'"),
        ({"answer": ""}, "the answer ''"),
        ({"answer": True}, "the answer True"),
        ({"answer": 1.0}, "the answer 1.0"),
    ],
)
def test_a_malformed_row_is_shown(name, damage, seen, rows, whole, tmp_path):
    good = rows["anatomy"]["test"][0]
    # In parquet the damaged row stands alone, because a column has one type.
    damaged = [good | damage] if name == PARQUET else [good, good | damage]
    place = "Row 1" if name == PARQUET else "Line 2"
    content = (WRITER_OF[name](tmp_path, {"anatomy": {"test": damaged}}) / name).read_bytes()
    refused_with(whole, name, content, f"{place} of {{}} has {seen}, but needs")


def test_half_a_character_is_no_text(rows, tmp_path):
    folder = write_json_lines(tmp_path, rows)
    (folder / JSON).write_text(json.dumps(AWKWARD | {"question": "\ud83d"}))
    refused(folder, "Line 1 of", "the question '\\ud83d'")


def test_a_missing_column_is_named(parquet):
    write_rows(parquet / PARQUET, [{"question": "?", "options": ["1"], "answer": 0}])
    refused(parquet, f"{PARQUET} has the columns question, options, answer, but needs choices once")
    table = pyarrow.table([["?"], ["?"], [["1", "2", "3", "4"]], [0]], ["question", "question", "choices", "answer"])
    pyarrow.parquet.write_table(table, parquet / PARQUET)
    refused(parquet, "but needs question once")


# --- Where questions come from ----------------------------------------------------------------------------------------


def test_the_argument_comes_before_the_environment_and_that_before_the_hub(parquet, monkeypatch, tmp_path, caches):  # noqa: F811
    monkeypatch.setenv("MMLU_DATA", str(parquet))
    assert find_questions().folder == find_questions("").folder == parquet
    monkeypatch.setenv("MMLU_DATA", "modelscope")
    refused(None, "cannot be fetched: ModelScope (")
    assert find_questions(parquet).folder == parquet
    monkeypatch.setenv("MMLU_DATA", "")
    refused(None, "cannot be fetched: Hugging Face (")


def test_a_folder_called_like_a_hub_is_given_as_a_path(rows, tmp_path, monkeypatch, caches):  # noqa: F811
    folder = write_questions(tmp_path / "hub", rows)
    monkeypatch.chdir(tmp_path)
    refused("hub", "cannot be fetched: Hugging Face (")
    assert find_questions("./hub").folder == find_questions(Path("hub")).folder == folder


def repository(rows) -> dict[str, bytes]:
    """cais/mmlu as both hubs have it: more files than the 200 of a page of ModelScope's listing."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_questions(Path(scratch), rows)
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.parquet"))}
    name = "{}-00000-of-00001.parquet".format
    unwanted = {f"{subject}/{name(split)}": b"-" for subject in SUBJECTS for split in ("validation", "more")}
    return {"README.md": b"#", f"all/{name('test')}": b"-", f"auxiliary_train/{name('train')}": b"-"} | unwanted | files


@pytest.fixture(params=["hub", "modelscope"])
def word(request):
    """What --mmlu_data calls a hub."""
    return request.param


NAME = {"hub": "huggingface", "modelscope": "modelscope"}
SOURCE = {"hub": f"hub:cais/mmlu@{COMMIT}", "modelscope": "modelscope:cais/mmlu@master"}


def test_a_hubs_copy_is_downloaded_once_and_then_needs_no_network(word, hub, caches, rows, digest, caplog):  # noqa: F811
    getattr(hub, NAME[word])["datasets/cais/mmlu"] = repository(rows)
    found = find_questions(word, num_fewshot=2)
    assert (found.source, found.digest) == (SOURCE[word], digest)
    assert sorted(hub.sent) == sorted(
        f"{subject}/{split}-00000-of-00001.parquet" for subject in SUBJECTS for split in SPLITS
    )
    caches.hubs_at(NOBODY)
    assert find_questions(word) == found
    assert "cannot be reached" in caplog.text

    lost = found.folder / "virology" / "test-00000-of-00001.parquet"
    lost.resolve().unlink()
    lost.unlink(missing_ok=True)  # a link in one of the caches
    refused(word, "are not complete", "cannot be reached", str(found.folder), "virology/test-", "Run this again")
    caches.hubs_at(hub.url)
    hub.sent.clear()
    assert find_questions(word) == found
    assert hub.sent == ["virology/test-00000-of-00001.parquet"]


def test_a_hub_that_has_not_all_of_it_is_named(word, hub, rows):  # noqa: F811
    refused(word, "has no such repository")
    files = {path: b"-" for path in repository(rows) if "virology" not in path}
    files = {path: content for path, content in files.items() if path.startswith(("anatomy/", "README"))}
    getattr(hub, NAME[word])["datasets/cais/mmlu"] = files
    refused(word, "cais/mmlu, now in", "lacks abstract_algebra/dev-*.parquet", "and 107 more")


def test_a_hub_out_of_reach_is_an_error_that_names_the_other_ways(word, caches):  # noqa: F811
    other = "'modelscope'" if word == "hub" else "'hub'"
    message = refused(
        word, f"({NOBODY}) cannot be reached", "there is no copy", f"{other} to ask there", "csv", "jsonl"
    )
    assert word == "modelscope" or "HF_ENDPOINT" in message


def test_a_hub_that_never_answers_is_given_up(word, caches, monkeypatch):  # noqa: F811
    monkeypatch.setattr(download, "ANSWER_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as mute:  # connections succeed, and that is all
        caches.hubs_at(f"http://127.0.0.1:{mute.getsockname()[1]}")
        refused(word, "ReadTimeout", "there is no copy")


def test_copies_laid_out_by_the_clients_themselves_serve_offline(rows, digest, tmp_path, caches):  # noqa: F811
    files = {path: content for path, content in repository(rows).items() if "/dev-" in path or "/test-" in path}
    folder = modelscope_copy(caches.modelscope, "cais/mmlu", files, kind="datasets")
    found = find_questions("modelscope")
    assert (found.source, found.folder, found.digest) == (SOURCE["modelscope"], folder, digest)
    # As modelscope left it before version 1.38.
    shutil.move(folder, caches.modelscope / "datasets" / "cais" / "mmlu")
    shutil.rmtree(caches.modelscope / "datasets" / "cais--mmlu")
    assert find_questions("modelscope").source == "modelscope:cais/mmlu"
    snapshot = huggingface_copy(caches.huggingface, "cais/mmlu", files, kind="datasets")
    found = find_questions("hub")
    assert (found.source, found.folder, found.digest) == (SOURCE["hub"], snapshot, digest)
