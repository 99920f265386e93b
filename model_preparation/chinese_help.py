"""Shows --help in Chinese if the environment's language is Chinese. help.zh.yaml has the texts."""

import argparse
import os
import re
import unicodedata
from pathlib import Path

CATALOGUE = Path(__file__).with_name("help.zh.yaml")


def is_wanted() -> bool:
    """Whether the environment asks for messages in Chinese."""
    names = ("LC_ALL", "LC_MESSAGES", "LANG")
    return next((os.environ[name] for name in names if os.environ.get(name)), "").startswith("zh")


def translate(parser: argparse.ArgumentParser, command: str) -> None:
    """Replace the texts of a command's parser by Chinese texts, if the catalogue has this command."""
    import yaml

    catalogue = yaml.safe_load(CATALOGUE.read_text(encoding="utf-8"))
    if command not in catalogue:
        return
    texts = {**catalogue["shared"], **catalogue[command]}
    examples = iter(re.findall(r"(?:^  .*\n?)+", parser.epilog or "", re.MULTILINE))
    parser.description = texts["description"]
    parser.epilog = re.sub(r"\{\}", lambda _: next(examples, "").rstrip(), texts["epilog"])
    for action in parser._actions:
        action.help = next((texts[flag] for flag in action.option_strings if flag in texts), action.help)
    parser._optionals.title = "参数"
    parser.formatter_class = _ChineseFormatter


class _ChineseFormatter(argparse.RawDescriptionHelpFormatter):
    """Breaks lines between Chinese characters (two columns wide), but not before punctuation marks.

    Drops the spaces between Chinese characters, which YAML's folding put there.
    """

    def _format_usage(self, usage, actions, groups, prefix):
        return super()._format_usage(usage, actions, groups, prefix or "用法：")

    def _split_lines(self, text, width):
        lines, columns = [""], 0
        for word in re.findall(r"[\x21-\x7e]+|.", re.sub(r"(?<=[^\x00-\x7f]) (?=[^\x00-\x7f])", "", text)):
            word_columns = sum(1 + (unicodedata.east_asian_width(each) in "WF") for each in word)
            if columns + word_columns > width and word not in "，。；：、）":
                lines, columns = [*lines, ""], 0
            lines[-1] += word
            columns += word_columns
        return [line.strip() for line in lines]
