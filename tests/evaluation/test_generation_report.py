"""Texts side by side: columns in a terminal, lines elsewhere, and where two texts begin to differ."""

import io

import pytest
from rich.console import Console

from model_preparation.evaluation.generation import Generation
from model_preparation.evaluation.generation_report import Column, difference, print_side_by_side

COLUMNS = [
    Column("checkpoint", [["[bold]one"], ["first\nsecond"]]),
    Column("donor", [["two \x1b[31mred"], ["failed: no text"]], [["first differing token: 1"], []]),
]


def written(text, *ids):
    return Generation("prompt", text, 1, ids, 0.1, 0.1)


@pytest.mark.parametrize(
    ("other", "same_tokenizer", "words"),
    [
        (written("ab", 1, 2, 3), True, "the same 3 tokens"),
        (written("ax", 1, 9, 3), True, "first differing token: 2"),
        (written("a", 1, 2), True, "first differing token: 3"),
        (written("ab", 7), False, "other tokenizer; the same text"),
        (written("ax", 1, 2, 3), False, "other tokenizer; first differing character: 2"),
    ],
)
def test_where_two_texts_part(other, same_tokenizer, words):
    assert difference(written("ab", 1, 2, 3), other, same_tokenizer) == words


def shown(**console):
    file = io.StringIO()
    print_side_by_side(["Prompt [1]", "Next"], COLUMNS, Console(file=file, width=60, **console))
    return file.getvalue()


def test_a_terminal_gets_columns():
    lines = shown(force_terminal=True, no_color=True, color_system=None).splitlines()
    assert any("[bold]one" in line and r"two \x1b[31mred" in line for line in lines), lines
    assert any("first" in line and "failed: no text" in line for line in lines), lines
    assert any("checkpoint" in line and "donor" in line for line in lines)
    assert max(map(len, lines)) <= 60


def test_a_pipe_gets_lines():
    assert shown() == (
        "\nPrompt       Prompt [1]\ncheckpoint   [bold]one\ndonor        two \\x1b[31mred\n"
        "             (first differing token: 1)\n"
        "\nPrompt       Next\ncheckpoint   first\n             second\ndonor        failed: no text\n"
    )
