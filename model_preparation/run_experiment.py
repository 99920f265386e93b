"""Command: run a whole experiment from one YAML file: extract, search, build, heal, evaluate and compare.

Each step is one of our commands in a separate process, so its memory is free afterwards. OUTPUT_DIR/experiment.json
records the settings of each step. A step whose result was made with the same settings is not run again.
"""

import argparse
import importlib
import json
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from model_preparation.command_line import CommandParser, default_folder, heads_by_layer, heads_text, run
from model_preparation.errors import SurgeryError
from model_preparation.flags_file import Entry, nearest, read_entries
from model_preparation.hub.sources import source_here
from model_preparation.io.complete_file import make_folder, write_file
from model_preparation.io.result_inputs import differences, digest_of
from model_preparation.io.text import read_text
from model_preparation.io.untrusted.untrusted_files import check_fields, parse_json
from model_preparation.jobs.process import CommandProcess, Launch, failure
from model_preparation.jobs.table import table
from model_preparation.terminal import escaped

DESCRIPTION = """\
Run an experiment that one YAML file describes: extract the donor's layers, search for the best ones or take the given
ones, build the checkpoint, heal it if the file says so, evaluate all models, and compare them. The command prints the
plan first. If it is stopped, run it again: it keeps finished steps. If the file has changed, the plan lists the steps
to run again.
"""

EPILOG = """\
an experiment:
  output_dir: experiments/tiny      # default: experiments/NAME, for NAME.yaml
  base: tiny_llamba
  donor: tiny_llama
  search: {task: [embedded_recall], limit: 100, method: greedy}   # or, for example, layers: [4, 10]
  evaluate: {tasks: [embedded_recall], limit: 200}

The steps are extract, search, build, heal, evaluate and compare. Each step takes the flags of its command as keys:
search_layers.py --help lists the keys of search, and test_checkpoint.py --help lists the keys of evaluate. Write gpu,
device and source outside the steps: all steps that have these flags use them. heal needs the key data, the text to
train on. evaluate also has the key models: a list of base, donor, grafted, healed (default: all). Without evaluate,
nothing is compared. Paths are relative to the current folder.

examples:
  python run_experiment.py experiment.yaml --dry_run
  python run_experiment.py experiment.yaml
"""

RECORD = "experiment.json"
# {step: (its command, flags of the command that the file must not give)}
_COMMANDS = {
    "extract": ("extract_layers", {"model_name", "output_dir", "verify", "from_legacy"}),
    "search": ("search_layers", {"base", "start", "donor", "llama_layers_dir", "output_dir"}),
    "build": ("create_replaced_model_checkpoint", {"base", "layers", "llama_layers_dir", "output_dir", "from_info"}),
    "heal": ("heal_checkpoint", {"checkpoint", "output_dir", "resume", "resume_dir", "merge_adapter"}),
    "evaluate": ("test_checkpoint", {"checkpoint", "full_eval", "skip_generation", "results_dir", "result_json"}),
    "compare": ("compare_checkpoints", {"output_dir", "baseline"}),
}
_RUN_FLAGS = {"overwrite", "dry_run"}  # flags that the file must not give in any step
_FOR_ALL = ("gpu", "device", "source")
_PLAIN_KEYS = ("output_dir", "base", "donor", "layers", *_FOR_ALL)
_MODELS = ("base", "donor", "grafted", "healed")
_LONGEST_NAME = 150  # of a checkpoint's folder; file systems allow 255 bytes, and "_healed.partial-HOST-PID" may follow

Flags = Mapping[str, Any]  # {flag's name: text, list of texts, or True}


@dataclass(frozen=True)
class Experiment:
    """The checked contents of an experiment's file. `steps` has the flags of each step to run."""

    folder: Path
    base: str
    donor: str
    layers: list[str] | None  # None: the search finds them
    steps: dict[str, Flags]
    models: list[str]  # which of _MODELS to evaluate


@dataclass(frozen=True)
class Step:
    """One run of a command.

    The file `result` exists once the run has succeeded. The run needs the results of the steps in `after`. `own` are
    flags that do not change the result, such as paths. `shown` is the path in the printed plan.
    """

    kind: str
    name: str
    flags: Flags
    own: Flags
    folders: tuple[Path, ...]  # positional arguments of compare
    shown: Path
    result: Path
    after: tuple[str, ...] = ()

    @property
    def can_replace(self) -> bool:
        """Whether only --redo replaces an earlier result. The step's command then gets --overwrite."""
        return self.kind in ("extract", "search", "build", "heal")


@dataclass(frozen=True)
class State:
    """The state of a step, and its reason.

    `word` is "done", "to do", or "again" if the result's settings differ or are not recorded.
    """

    word: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.word} ({self.reason})" if self.reason else self.word


def main() -> None:
    parser = CommandParser(description=DESCRIPTION, epilog=EPILOG)
    parser.add_argument("experiment", type=Path, metavar="FILE", help="the YAML file that describes the experiment")
    parser.add_argument("--dry_run", action="store_true", help="print the plan, run nothing")
    parser.add_argument(
        "--redo", action="store_true", help="if the file has changed, replace results that have other settings"
    )
    args = parser.parse_args()
    experiment = read_experiment(args.experiment.expanduser())
    record = _read_record(experiment.folder)
    steps = plan(experiment)
    states = _states(steps, record)
    _print_plan(steps, states)
    _check_inputs(experiment, [step for step in steps if states[step.name].word != "done"])
    if args.dry_run:
        print(f"Nothing was run (--dry_run). The results would be in {experiment.folder}")
        return
    if (
        changed := [step.name for step in steps if step.can_replace and states[step.name].word == "again"]
    ) and not args.redo:
        raise SurgeryError(
            f"{experiment.folder} has results of {', '.join(changed)} with other settings than this file. "
            "Add --redo to replace these results, or name another output_dir."
        )
    make_folder(experiment.folder)
    write_file(experiment.folder / "experiment.yaml", read_text(args.experiment.expanduser()))
    for number, name in enumerate(states, start=1):
        steps = plan(experiment)  # again: the search may have found the layers by now
        step = next(step for step in steps if step.name == name)
        if states[name].word != "done":
            print(f"\n[{number}/{len(steps)}] {name}", flush=True)
            asked = _asked(step, {each.name: each for each in steps})
            _run_step(step, asked, experiment.folder, record)
        elif step.kind == "compare":
            print("\n" + read_text(step.result))
    print(f"Results are in {experiment.folder}")


def read_experiment(path: Path) -> Experiment:
    """Read and check an experiment.

    Raises:
        SurgeryError: for a key or value that cannot be used. The message names the file and the line.
    """
    entries = read_entries(path)
    for key, entry in entries.items():
        known = [*_PLAIN_KEYS, *_COMMANDS]
        if key not in known:
            raise SurgeryError(f"{entry.place}: there is no key {key!r}.{nearest(key, known)}")
        if key in _COMMANDS and not isinstance(entry.value, dict):
            hint = "Give it keys, such as {limit: 100}, or {} for none."
            raise SurgeryError(f"{entry.place}: {key} is {entry.value!r}. {hint}")
    for key in ("base", "donor"):
        if key not in entries:
            raise SurgeryError(f"{path} has no key {key}. Add a line `{key}: NAME`, with a model's name or folder.")
    if ("layers" in entries) == ("search" in entries):
        raise SurgeryError(f"{path} needs either layers or search. Give layers: [...] or search: {{...}}.")
    if "compare" in entries and "evaluate" not in entries:
        raise SurgeryError(f"{entries['compare'].place}: compare needs an evaluation. Add evaluate: {{...}}.")
    parsers = {kind: _parser_of(kind) for kind in _COMMANDS}
    if "gpu" in entries and "device" in entries:
        raise SurgeryError(f"{entries['device'].place}: device cannot be used with gpu. Remove one of them.")
    own_keys = {key: entries[key] for key in entries if key not in _COMMANDS}
    for key, entry in own_keys.items():
        parsers["search" if key == "donor" else "build"].check_entry(key, entry, argparse.Namespace())
    wanted = {"extract", "build"} | (entries.keys() & _COMMANDS.keys())
    wanted |= {"compare"} if "evaluate" in wanted else set()
    steps, models = {}, list(_MODELS if "heal" in wanted else _MODELS[:3])
    for kind in (kind for kind in _COMMANDS if kind in wanted):
        given = dict(entries[kind].value) if kind in entries else {}  # type: ignore[arg-type]
        if kind == "evaluate" and "models" in given:
            models = _models(given.pop("models"), models)
        for key in (key for key in _FOR_ALL if key in own_keys and parsers[kind].flag_named(key)):
            if key == "source" or not given.keys() & {"gpu", "device"}:
                given.setdefault(key, own_keys[key])
        steps[kind] = _checked_flags(kind, given, parsers[kind])
    if "heal" in steps and "data" not in steps["heal"]:
        raise SurgeryError(f"{entries['heal'].place}: heal has no key data. Add the text to train on: data: FILE.")
    output = entries["output_dir"].value if "output_dir" in entries else default_folder("experiments") / path.stem
    layers = entries["layers"].value if "layers" in entries else None
    return Experiment(
        folder=Path(str(output)).expanduser(),
        base=str(entries["base"].value),
        donor=str(entries["donor"].value),
        layers=[layers] if isinstance(layers, str) else layers,  # type: ignore[arg-type]
        steps=steps,
        models=models,
    )


def _parser_of(kind: str) -> CommandParser:
    """The parser of a step's command, caught when the command's `main` begins to parse."""

    class Parsed(Exception):
        pass

    def stop(parser: CommandParser, *_: object) -> None:
        raise Parsed(parser)

    command = importlib.import_module(f"model_preparation.{_COMMANDS[kind][0]}")
    try:
        with patch.object(CommandParser, "parse_args", stop):
            command.main()
    except Parsed as parsed:
        return parsed.args[0]
    raise AssertionError(f"{command.__name__} parses nothing")


def _models(entry: Entry, known: list[str]) -> list[str]:
    models = entry.value if isinstance(entry.value, list) else [str(entry.value)]
    if unknown := [model for model in models if model not in known]:
        hint = f"Choose from {', '.join(known)}."
        raise SurgeryError(f"{entry.place}: models has {unknown[0]!r}.{nearest(unknown[0], known)} {hint}")
    return [model for model in known if model in models]


def _checked_flags(kind: str, given: Mapping[str, Entry], parser: CommandParser) -> Flags:
    """The given keys as flags. Raises SurgeryError if a key is no flag of the command, or if a value is wrong."""
    flags: dict[str, Any] = {}
    for key, entry in given.items():
        if key in _COMMANDS[kind][1] | _RUN_FLAGS:
            raise SurgeryError(f"{entry.place}: an experiment takes no {key} for {kind}. Remove the line.")
        action = parser.check_entry(key, entry, argparse.Namespace())
        if action.nargs == 0:
            flags |= {key: True} if entry.value == "true" else {}
        else:
            is_list = action.nargs is not None or not isinstance(action, argparse._StoreAction)
            flags[key] = [entry.value] if is_list and isinstance(entry.value, str) else entry.value
    return flags


def plan(experiment: Experiment) -> list[Step]:
    """The steps, in order. Before the search has a result, the flags of build have neither `layers` nor `heads`."""
    folder, steps = experiment.folder, experiment.steps
    own: dict[str, Any]
    after: tuple[str, ...]
    layers_dir, search_dir = folder / "layers", folder / "search"
    flags: dict[str, Any] = {"model_name": experiment.donor, **steps["extract"]}
    planned = [
        Step("extract", "extract", flags, {"output_dir": layers_dir}, (), layers_dir, layers_dir / "metadata.json")
    ]
    grafts: dict[str, Any] | None = None if experiment.layers is None else {"layers": experiment.layers}
    source = ("extract",)
    if grafts is None:
        pair = {"base": experiment.base, "donor": experiment.donor}
        own = {"llama_layers_dir": layers_dir, "output_dir": search_dir}
        result = search_dir / "search_result.json"
        planned.append(Step("search", "search", {**pair, **steps["search"]}, own, (), search_dir, result, source))
        source = ("search",)
        grafts = _found_best(result)
    chosen = [] if grafts is None else grafts.get("heads") or sorted(grafts["layers"], key=int)
    name = "_".join(["grafted", *chosen]).replace(":", "-")
    if len(name) > _LONGEST_NAME:
        name = f"grafted_{len(chosen)}_{digest_of({'units': chosen})[:12]}"
    grafted, healed = folder / "checkpoints" / name, folder / "checkpoints" / f"{name}_healed"
    flags = {"base": experiment.base, **(grafts or {}), **steps["build"]}
    own = {"llama_layers_dir": layers_dir, "output_dir": grafted}
    planned.append(Step("build", "build", flags, own, (), grafted, grafted / "checkpoint_info.json", source))
    if "heal" in steps:
        # Other settings get another folder of training states, so that a stopped run finds its own.
        states = folder / "healing" / digest_of({**flags, **steps["heal"]})[:12]
        own = {"checkpoint": grafted, "output_dir": healed, "resume_dir": states}
        result = healed / "checkpoint_info.json"
        planned.append(Step("heal", "heal", steps["heal"], own, (), healed, result, ("build",)))
    if "evaluate" in steps:
        results = {model: folder / "evaluations" / f"{model}.json" for model in experiment.models}
        for model, result in results.items():
            shown = result.with_suffix("")
            own = {"full_eval": True, "skip_generation": True, "result_json": result, "results_dir": shown}
            if model in ("base", "donor"):
                place, after = {"checkpoint": experiment.base if model == "base" else experiment.donor}, ()
            else:
                own["checkpoint"] = grafted if model == "grafted" else healed
                place, after = {}, ("build" if model == "grafted" else "heal",)
            flags = {**place, **steps["evaluate"]}
            planned.append(Step("evaluate", f"evaluate {model}", flags, own, (), shown, result, after))
        if len(results) > 1:
            folders = tuple(_results_of(result) for result in results.values() if result.is_file())
            own = {"overwrite": True, "output_dir": folder / "comparison"}
            after = tuple(f"evaluate {model}" for model in results)
            result, shown = folder / "comparison.txt", folder / "comparison"
            planned.append(Step("compare", "compare", steps["compare"], own, folders, shown, result, after))
    return planned


def _check_inputs(experiment: Experiment, steps: list[Step]) -> None:
    """Refuse missing models, tasks and texts before hours of work. Nothing is downloaded.

    Raises:
        SurgeryError: if any is missing. The message names everything that is missing, with its key.
    """
    from model_preparation.evaluation.tasks import check_names
    from model_preparation.train.texts import files_of_text

    sources = dict(each.split("=", 1) for each in experiment.steps["build"].get("source", []))
    missing: dict[str, str] = {}  # {error message: key of what is missing}

    def check(key: str, find: Callable[..., object], *given: Any) -> None:
        try:
            find(*given)
        except SurgeryError as error:
            missing.setdefault(str(error), key)

    for step in steps:
        if step.kind in ("search", "build") or step.name == "evaluate base":
            check("base", source_here, experiment.base, sources)
        if step.kind == "extract" or step.name == "evaluate donor":
            check("donor", source_here, experiment.donor, sources)
        for key in ("data", "eval_data") if step.kind == "heal" else ():
            if key in step.flags:
                check(f"{key} of heal", files_of_text, step.flags[key])
        for key in ("task", "tasks"):
            if key in step.flags:
                check(f"{key} of {step.kind}", check_names, step.flags[key])
    if missing:
        raise SurgeryError("; ".join(f"{key}: {reason}" for reason, key in missing.items()))


def _found_best(result: Path) -> dict[str, Any] | None:
    """The flags of build for the best layers or heads in a search's result; None before the search has a result."""
    if not result.is_file():
        return None
    try:
        found = json.loads(result.read_text(encoding="utf-8"))
        best = found["final_results"][0]
        if "heads" in best:
            keeps = {"keep_mixer_heads": True} if found["settings"]["keep_mixer_heads"] else {}
            return {"heads": heads_text(heads_by_layer(best["heads"])).split(), **keeps}
        return {"layers": [str(int(layer)) for layer in best["layers"]]}
    except (ValueError, KeyError, IndexError, TypeError, argparse.ArgumentTypeError) as error:
        raise SurgeryError(f"{result} is no result of a search ({error!r}). Remove it, and run this again.") from error


def _results_of(result: Path) -> Path:
    """The folder with an evaluation's results."""
    try:
        return Path(json.loads(result.read_text(encoding="utf-8"))["results_dir"])
    except (ValueError, KeyError, TypeError) as error:
        raise SurgeryError(
            f"{result} is not a result of this program ({error!r}). Remove it, and run this again."
        ) from error


def _read_record(folder: Path) -> dict[str, Any]:
    path = folder / RECORD
    if not path.is_file():
        return {}
    try:
        record = parse_json(path.read_bytes())
        check_fields(record, {"*": {"asked": dict, "replaces": bool}})
        return record
    except ValueError as error:
        raise SurgeryError(
            f"{path} is damaged ({error}). Remove it, and run this again with --redo: all results are then made again."
        ) from error


def _asked(step: Step, steps: Mapping[str, Step]) -> dict[str, Any]:
    """The inputs of a step's result: its flags, and a digest of the inputs of each step that it needs."""
    return {**step.flags, **{name: digest_of(_asked(steps[name], steps)) for name in step.after}}


def _states(steps: list[Step], record: Mapping[str, Any]) -> dict[str, State]:
    """{step: state}. If a result was removed, but everything made from it is done, its step counts as done."""
    by_name = {step.name: step for step in steps}
    states: dict[str, State] = {}
    for step in steps:
        entry = record.get(step.name)
        changed = [] if entry is None else differences(entry["asked"], _asked(step, by_name))
        again = [name for name in step.after if states[name].word == "again"]
        if not step.result.is_file():
            states[step.name] = State("to do")
        elif entry is None:
            states[step.name] = State("again", "its settings are not recorded")
        elif changed or again:
            flags = [each for each in changed if each.partition(":")[0] not in step.after]
            states[step.name] = State("again", "; ".join(flags or [f"{name} changed" for name in again or step.after]))
        else:
            states[step.name] = State("to do", "it was stopped") if entry["replaces"] else State("done")
    for step in reversed(steps):
        later = [states[each.name].word for each in steps if step.name in each.after]
        if step.name in record and states[step.name].word == "to do" and later and set(later) == {"done"}:
            states[step.name] = State("done", "removed since")
    return states


def _print_plan(steps: list[Step], states: Mapping[str, State]) -> None:
    rows = []
    for number, step in enumerate(steps, start=1):
        flags = [f"{key} {' '.join(value) if isinstance(value, list) else value}" for key, value in step.flags.items()]
        found = step.flags.keys() & {"layers", "heads"}
        flags += ["layers: the search's best"] if step.kind == "build" and not found else []
        rows.append((f"{number} {step.name}", str(states[step.name]), str(step.shown), ", ".join(flags)))
    print(escaped(table(("step", "state", "folder", "settings"), rows), kept="\n"), flush=True)


def _run_step(step: Step, asked: dict[str, Any], folder: Path, record: dict[str, Any]) -> None:
    """Run a step, and record it.

    Raises:
        SurgeryError: if it fails.
    """
    replaces = step.result.is_file()
    record[step.name] = {"asked": asked, "replaces": replaces}
    write_file(folder / RECORD, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    flags = {**step.flags, **step.own, **({"overwrite": True} if replaces and step.can_replace else {})}
    script = Path(__file__).resolve().with_name(f"{_COMMANDS[step.kind][0]}.py")
    columns = str(shutil.get_terminal_size().columns)
    launch = Launch(str(script), (*map(str, step.folders), *_words(flags)), variables={"COLUMNS": columns})
    print("+ " + shlex.join([sys.executable, launch.script, *launch.arguments]), flush=True)
    is_shown_again = step.kind == "compare"  # what it prints is kept in a file
    stream = sys.stdout if is_shown_again else sys.stderr
    with CommandProcess(launch, merge=is_shown_again) as process:
        for text in process.printed():
            stream.write(text)
            stream.flush()
    assert process.code is not None
    reason = failure(process.code, process.output)
    if not reason and is_shown_again:
        write_file(step.result, process.output)
    if reason or not step.result.is_file():
        raise SurgeryError(
            f"{step.name} failed: {reason.rstrip('.') or f'it ended without {step.result}'}. "
            "Solve this problem, and run the same command again: finished steps are kept."
        )
    record[step.name]["replaces"] = False
    write_file(folder / RECORD, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def _words(flags: Flags) -> list[str]:
    """The flags as words of a command line."""
    words: list[str] = []
    for key, value in flags.items():
        if value is True:
            words.append(f"--{key}")
        elif isinstance(value, list) and key != "source":
            words += [f"--{key}", *value]
        else:
            words += [f"--{key}={each}" for each in (value if isinstance(value, list) else [value])]
    return words


if __name__ == "__main__":
    run(main)
