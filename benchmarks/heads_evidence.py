"""Heads or layers? Accuracy against bytes of keys and values, on a pair such as the embedded one.

Candidates are all single heads, larger sets of heads by a beam search, and all sets of up to three layers. If
--beam_width > 1 and there are few pairs of heads, all pairs are candidates. Every set is scored on some of the --choose
questions, and the best sets on all of them. The reported figures are of other questions, made from another
seed. The part "rules" compares rules for which channels of the mixer are switched off in a layer with grafted
heads. It scores the same sets under every rule, and other sets that were chosen under the rule "mixer whole".
Prints tables, and writes every figure into NAME.json. The part "sets" also draws a plot into NAME.png.

    OMP_NUM_THREADS=1 python benchmarks/heads_evidence.py --output benchmarks/heads_evidence
    OMP_NUM_THREADS=1 python benchmarks/heads_evidence.py --donor DIR --base DIR --parts rules --output NAME
"""

import argparse
import functools
import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from transformers import AutoModelForCausalLM

from model_preparation.embedded import recall
from model_preparation.hub.sources import resolve
from model_preparation.jobs.table import table
from model_preparation.llamba import LlambaConfig, LlambaForCausalLM
from model_preparation.llamba.cache_bytes import kv_bytes_per_token
from model_preparation.llamba.donor_kinds import KINDS, picked_heads
from model_preparation.llamba.modeling_llamba import LlambaDecoderLayer

PEOPLE = 16  # number of people in a question's text
CHOOSE_SEED, REPORT_SEED = 7, 8  # the package's own questions have another seed
AT_ONCE = 250  # questions in a forward pass
FEW = 300  # if a size has at most so many sets, a beam above 1 scores all of them
FIRST, BEST = 100, 16  # questions for every set; number of sets that are scored on all questions
MOST_LAYERS = 3
WHOLE = "whole"  # in place of heads: the donor's whole layer

# ((layer, its grafted heads or WHOLE), ...) for each layer that the graft changes.
Graft = tuple[tuple[int, tuple[int, ...] | str], ...]

# {rule: which of the `total` equal shares of the mixer's channels to switch off in a layer with the grafted `heads`}
RULES = {
    "same place off": lambda heads, total: heads,
    "mixer whole": lambda heads, total: [],
    "another place off": lambda heads, total: [head for head in range(total) if head not in heads][: len(heads)],
    "whole mixer off": lambda heads, total: range(total),
}
DEFAULT, KEPT, *_ = RULES


class Pair:
    """A base and a donor in memory. Makes any layer of any graft from them."""

    def __init__(self, donor: str, base: str):
        self.donor = AutoModelForCausalLM.from_pretrained(resolve(donor).folder).eval()
        folder = resolve(base).folder
        self.base = LlambaForCausalLM.from_pretrained(folder).eval()
        self.kind = KINDS[self.donor.config.model_type]
        self.layers = self.base.config.n_layer
        self.heads = self.donor.config.num_attention_heads
        grafted = LlambaForCausalLM(self.config(tuple((index, WHOLE) for index in range(self.layers))))
        self.layer = functools.cache(self._layer)
        self.arguments = functools.cache(lambda rows, length: self._arguments(grafted, rows, length))

    def config(self, graft: Graft, rule: str = DEFAULT) -> LlambaConfig:
        fields = self.base.config.file_fields()
        fields["llama_layers"] = [layer for layer, what in graft if what == WHOLE]
        fields["llama_heads"] = {str(layer): list(what) for layer, what in graft if what != WHOLE}
        fields["keep_mixer_heads"] = rule != DEFAULT
        if graft:
            fields |= {"llama_cfg": self.kind.settings(self.donor.config), "donor_type": self.kind.model_type}
        return LlambaConfig.from_dict(fields)

    def kv_bytes(self, graft: Graft) -> int:
        """Bytes that each token adds to the cache."""
        whole = sum(what == WHOLE for _, what in graft)
        return kv_bytes_per_token(self.config(graft), whole, torch.float32) if graft else 0

    def _arguments(self, grafted: LlambaForCausalLM, rows: int, length: int) -> dict:
        return grafted.backbone.layer_arguments(torch.empty(rows, length, self.base.config.d_model))["full_attention"]

    def _layer(self, index: int, what: tuple[int, ...] | str, rule: str) -> torch.nn.Module:
        ours, theirs = self.base.backbone.layers[index], self.donor.model.layers[index]
        if not what:
            return ours
        if what == WHOLE:
            return theirs
        config = self.config(((index, what),), rule)
        made = LlambaDecoderLayer(config, index, config.llama_config()).eval()
        state, whole = dict(ours.state_dict()), theirs.state_dict()
        sizes = (config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        for name, picked in picked_heads(what, *sizes, self.kind).items():
            if picked is None:
                state[f"attention.{name}"] = whole[name]
            else:
                state[f"attention.{name}"] = whole[f"self_attn.{name}"].index_select(picked[0], torch.tensor(picked[1]))
        made.load_state_dict(state)
        if rule not in (DEFAULT, KEPT):
            size = config.d_inner // self.heads
            made.mixer.replaced_channels = [(head * size, (head + 1) * size) for head in RULES[rule](what, self.heads)]
        made.attention.config._attn_implementation = self.base.config._attn_implementation
        return made

    def run(self, index: int, what: tuple[int, ...] | str, rule: str, hidden: Tensor) -> Tensor:
        layer, arguments = self.layer(index, what, rule), self.arguments(*hidden.shape[:2])
        if what == WHOLE:
            return layer(hidden, **arguments)
        return layer(hidden, **({"of_heads": arguments} if what else {}))


class Questions:
    """Questions with one word as the answer, and the answers of the grafts so far."""

    def __init__(self, pair: Pair, asked: Sequence[recall.Question]):
        self.pair, self.asked = pair, asked
        tokenizer = recall.tokenizer()
        self.ids = torch.tensor([tokenizer(question.context)["input_ids"] for question in asked])
        words = [[tokenizer.convert_tokens_to_ids(word) for word in question.choices] for question in asked]
        self.choices = torch.tensor(words)
        self.answers = torch.tensor([question.answer for question in asked])
        self.known: dict[tuple[Graft, str], tuple[np.ndarray, np.ndarray]] = {}

    @torch.inference_mode()
    def ask(self, grafts: Iterable[Graft], rule: str = DEFAULT) -> None:
        """Fill `known`: whether each answer is right, and the log-likelihood of the right word."""
        new = [graft for graft in dict.fromkeys(grafts) if (graft, rule) not in self.known]
        parts: dict[Graft, list[Tensor]] = {graft: [] for graft in new}
        for ids in self.ids.split(AT_ONCE):
            self._walk(new, 0, self.pair.base.backbone.embedding(ids), rule, parts)
        for graft, found in parts.items():
            scores = torch.cat(found)
            right = (scores.gather(1, self.choices).argmax(1) == self.answers).numpy()
            word = self.choices.gather(1, self.answers[:, None])
            self.known[graft, rule] = right, scores.gather(1, word)[:, 0].double().numpy()

    def _walk(self, grafts: list[Graft], index: int, hidden: Tensor, rule: str, parts: Mapping) -> None:
        """Run `grafts` from layer `index` on. All of them have the same layers before this one."""
        if index == self.pair.layers:
            scores = self.pair.base.lm_head(self.pair.base.backbone.final_layernorm(hidden[:, -1])).log_softmax(-1)
            for graft in grafts:
                parts[graft].append(scores)
            return
        alike: dict = {}
        for graft in grafts:
            alike.setdefault(dict(graft).get(index, ()), []).append(graft)
        for what, members in alike.items():
            self._walk(members, index + 1, self.pair.run(index, what, rule, hidden), rule, parts)

    def accuracy(self, graft: Graft, rule: str = DEFAULT) -> float:
        self.ask([graft], rule)
        return float(self.known[graft, rule][0].mean())

    @functools.cached_property
    def first(self) -> "Questions":
        """The first FIRST questions, on which every set is scored."""
        return self if len(self.asked) <= FIRST else Questions(self.pair, self.asked[:FIRST])

    def ranked(self, grafts: Iterable[Graft], rule: str = DEFAULT) -> list[Graft]:
        """The best grafts, sorted: the highest accuracy first, then the highest log-likelihood of the right words."""
        best = list(dict.fromkeys(grafts))
        for questions in (self.first, self):
            questions.ask(best, rule)
            scores = {graft: questions.known[graft, rule] for graft in best}
            best = sorted(best, key=lambda graft: tuple(each.mean() for each in scores[graft]), reverse=True)[:BEST]
        return best

    def difference(self, one: tuple[Graft, str], other: tuple[Graft, str]) -> tuple[float, float]:
        """(accuracy of `one` minus accuracy of `other`, standard error), paired by question. Both are (graft, rule)."""
        for graft, rule in (one, other):
            self.ask([graft], rule)
        each = self.known[one][0].astype(float) - self.known[other][0]
        return float(each.mean()), float(each.std(ddof=1) / math.sqrt(len(each)))


def of_heads(heads: Iterable[tuple[int, int]]) -> Graft:
    """The graft of single heads, each given as (layer, head)."""
    found: dict[int, list[int]] = {}
    for layer, head in sorted(heads):
        found.setdefault(layer, []).append(head)
    return tuple((layer, tuple(of_layer)) for layer, of_layer in found.items())


def heads_in(graft: Graft) -> set[tuple[int, int]]:
    return {(layer, head) for layer, heads in graft for head in heads}  # type: ignore[misc]


def name_of(graft: Graft) -> str:
    """The graft in the form of --layers and --heads, such as "10" or "4:1 10:1"."""
    return " ".join(str(layer) if what == WHOLE else f"{layer}:{','.join(map(str, what))}" for layer, what in graft)


def beam(questions: Questions, width: int, most: int, rule: str = DEFAULT) -> list[Graft]:
    """The best set of heads of each size from 1 to `most`. If `width` > 1 and a size has few sets, all are scored."""
    pair = questions.pair
    every = [(layer, head) for layer in range(pair.layers) for head in range(pair.heads)]
    kept: list[Graft] = [()]
    best = []
    for size in range(1, most + 1):
        if width > 1 and math.comb(len(every), size) <= FEW:
            candidates = [of_heads(heads) for heads in itertools.combinations(every, size)]
        else:
            candidates = [
                of_heads({*heads_in(graft), head}) for graft in kept for head in every if head not in heads_in(graft)
            ]
        kept = questions.ranked(candidates, rule)[:width]
        best.append(kept[0])
        print(
            f"{rule}, width {width}, {size} heads: {name_of(best[-1])} {questions.accuracy(best[-1], rule):.3f}",
            flush=True,
        )
    return best


def best_layers(questions: Questions) -> list[Graft]:
    """The best set of layers of each size. All sets are scored."""
    found = []
    for size in range(1, MOST_LAYERS + 1):
        sets = [
            tuple((layer, WHOLE) for layer in chosen)
            for chosen in itertools.combinations(range(questions.pair.layers), size)
        ]
        found.append(questions.ranked(sets)[0])
        print(f"{size} layers: {name_of(found[-1])} {questions.accuracy(found[-1]):.3f}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--donor", default="tiny_llama", help="a folder or a name")
    parser.add_argument("--base", default="tiny_llamba", help="a folder or a name")
    parser.add_argument("--choose", type=int, default=250, metavar="N", help="questions that sets are chosen on")
    parser.add_argument("--report", type=int, default=1000, metavar="N", help="other questions, for the figures")
    parser.add_argument("--max_heads", type=int, default=6, metavar="N")
    parser.add_argument("--beam_width", type=int, default=2, metavar="N")
    parser.add_argument("--parts", nargs="+", choices=("sets", "rules"), default=["sets", "rules"])
    parser.add_argument(
        "--output", type=Path, required=True, metavar="NAME", help="write NAME.json, and NAME.png for the part sets"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    pair = Pair(args.donor, args.base)

    def questions(count: int, seed: int) -> Questions:
        return Questions(pair, recall.questions(count, PEOPLE, torch.Generator().manual_seed(seed)))

    chosen_on, reported_on = questions(args.choose, CHOOSE_SEED), questions(args.report, REPORT_SEED)
    mixer_heads = pair.base.config.ssm_cfg["n_v_heads"]
    found: dict = {
        "questions": {"chosen on": args.choose, "reported on": args.report},
        "layers": pair.layers,
        "heads in a layer": {"attention": pair.heads, "mixer": mixer_heads},
        "base": reported_on.accuracy(()),
        "donor": reported_on.accuracy(tuple((layer, WHOLE) for layer in range(pair.layers))),
    }
    print(f"{pair.layers} layers, {pair.heads} heads in attention, {mixer_heads} in mixers; ", end="")
    print(f"base {found['base']:.3f}, all layers {found['donor']:.3f}", flush=True)
    if "sets" in args.parts:
        compare_sets(found, chosen_on, reported_on, args)
    if "rules" in args.parts:
        compare_rules(found, chosen_on, reported_on, args.max_heads)
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in found.items())
    args.output.with_suffix(".json").write_text(f"{{\n{lines}\n}}\n")


def compare_sets(found: dict, chosen_on: Questions, reported_on: Questions, args) -> None:
    """Print and note the best sets of heads and of layers, and the differences between them."""
    pair = chosen_on.pair
    by_beam = beam(chosen_on, args.beam_width, args.max_heads) if args.beam_width > 1 else []
    greedy = beam(chosen_on, 1, args.max_heads)
    layers = best_layers(chosen_on)
    rows = []
    for how, grafts in (("layers, all sets", layers), ("heads, greedy", greedy), ("heads, beam", by_beam)):
        reported_on.ask(grafts)
        for graft in grafts:
            accuracy = reported_on.accuracy(graft)
            error = math.sqrt(accuracy * (1 - accuracy) / args.report)
            rows.append({"how": how, "graft": name_of(graft), "kv bytes per token": pair.kv_bytes(graft)})
            rows[-1] |= {"chosen on": chosen_on.accuracy(graft), "reported": accuracy, "standard error": error}
    found["best sets"] = rows
    heads = by_beam or greedy
    found["heads minus layers"] = [
        {"heads": name_of(one), "layers": name_of(other), "difference": difference, "standard error": error}
        for one in heads
        for other in layers[:2]
        for difference, error in [reported_on.difference((one, DEFAULT), (other, DEFAULT))]
    ]
    found["all sets"] = {
        name_of(graft): [pair.kv_bytes(graft), round(float(right.mean()), 4)]
        for (graft, _), (right, _) in chosen_on.first.known.items()
        if any(what == WHOLE for _, what in graft) or len(heads_in(graft)) <= 2
    }
    print_table(rows)
    print_table(found["heads minus layers"])
    draw(found, args.output.with_suffix(".png"))


def compare_rules(found: dict, chosen_on: Questions, reported_on: Questions, most: int) -> None:
    """Print and note the accuracies of one list of sets under each rule, and of sets chosen with the mixer whole."""
    greedy = beam(chosen_on, 1, most)
    own = {DEFAULT: greedy, KEPT: beam(chosen_on, 1, most, KEPT)}
    rows = []
    for size, graft in enumerate(greedy, 1):
        row: dict = {"heads": size, "graft": name_of(graft)}
        row |= {rule: reported_on.accuracy(graft, rule) for rule in RULES}
        row[f"{KEPT}, sets chosen so"] = reported_on.accuracy(own[KEPT][size - 1], KEPT)
        row["off minus whole"], row["standard error"] = reported_on.difference((graft, DEFAULT), (graft, KEPT))
        rows.append(row)
    found["rules"] = rows
    print_table(rows)


def print_table(rows: Sequence[dict]) -> None:
    texts = [tuple(f"{each:.3f}" if isinstance(each, float) else str(each) for each in row.values()) for row in rows]
    print(table(tuple(rows[0]), texts))


def draw(found: dict, path: Path) -> None:
    """Draw a dot for every set in "all sets", and a line through the reported scores of the best sets."""
    figure = Figure(figsize=(7.2, 3.8), layout="constrained")
    axes = figure.subplots()
    colours = {"layers": "#cc6677", "heads": "#4477aa"}
    for kind, colour in colours.items():
        dots = [entry for name, entry in found["all sets"].items() if name and (":" in name) == (kind == "heads")]
        axes.plot(*zip(*dots, strict=True), ".", color=colour, alpha=0.25, markersize=4, label=f"{kind}, every set")
        best = [row for row in found["best sets"] if row["how"].startswith(kind) and "greedy" not in row["how"]]
        best = best or [row for row in found["best sets"] if row["how"].startswith(kind)]
        points = [(row["kv bytes per token"], row["reported"], row["standard error"]) for row in best]
        bytes_, scores, errors = zip(*points, strict=True)
        axes.errorbar(bytes_, scores, errors, color=colour, marker="o", label=f"{kind}, best set")
    axes.axhline(found["base"], color="grey", linestyle=":", label="base")
    axes.set(xlabel="bytes of keys and values per token (float32)", ylabel="accuracy")
    figure.legend(loc="outside upper center", ncols=5, frameon=False, fontsize=8)
    figure.savefig(path, dpi=100, metadata={"Software": None})


if __name__ == "__main__":
    main()
