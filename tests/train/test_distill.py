"""distill_llamba_base.py: the base it writes, its figures, and that it goes on wherever it was stopped."""

import json
import math
import os
import signal
import sys
import tempfile
import traceback
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from model_preparation import SurgeryError, build_checkpoint, distill_llamba_base, load_checkpoint
from model_preparation.checkpoint.llamba_init import init_llamba_base
from model_preparation.checkpoint.model_configs import read_config
from model_preparation.train.distill import distill, hidden_states
from model_preparation.train.distill.donor import Donor
from model_preparation.train.distill.report import describe, plot_losses
from model_preparation.train.distill.self_sampling import SelfSampler
from model_preparation.train.distill.settings import DistillSettings
from model_preparation.train.distill.tokens import TokenData, described
from model_preparation.train.distill.train_layer import Teacher
from model_preparation.train.distill.work_folder import WorkFolder
from tests.conftest import assert_refused, run_command, run_fresh_command
from tests.train.cutting import write_text

TOKENS = torch.randint(0, 256, (34, 16), generator=torch.Generator().manual_seed(0))
QUICK = {"steps_per_layer": 6, "batch_size": 4, "learning_rate": 3e-3, "seed": 5}
FLAGS = ["--steps_per_layer", 6, "--batch_size", 4, "--learning_rate", 3e-3, "--seed", 5, "--device", "cpu"]


@pytest.fixture(scope="module")
def distilled(donor_dir, tmp_path_factory) -> tuple[Path, dict]:
    """A base of the tiny donor, and its summary."""
    folder = tmp_path_factory.mktemp("distilled") / "base"
    return folder, distill_llamba_base(
        str(donor_dir), folder, TOKENS, DistillSettings(**QUICK | {"steps_per_layer": 40})
    )


@pytest.fixture(autouse=True)
def no_plots(monkeypatch):
    """Drawing takes most of the time of a short run. The plot of `distilled` is drawn."""
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **given: path.touch())


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file but the summary, which has times in it."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "distillation.json"}


def perplexity(model, tokens: torch.Tensor) -> float:
    with torch.no_grad():
        losses = [model(row[None], labels=row[None]).loss.item() for row in tokens]
    return math.exp(sum(losses) / len(losses))


def test_a_base_is_distilled_and_its_figures_are_true(distilled, donor_dir, tmp_path):
    folder, summary = distilled
    assert json.loads((folder / "distillation.json").read_text()) == summary
    init_llamba_base(str(donor_dir), tmp_path / "initial")
    assert {path.name for path in folder.iterdir()} == {path.name for path in (tmp_path / "initial").iterdir()} | {
        "distillation.json",
        "distillation.jsonl",
        "distillation.png",
    }
    assert (folder / "config.json").read_bytes() == (tmp_path / "initial" / "config.json").read_bytes()
    assert (folder / "distillation.png").read_bytes().startswith(b"\x89PNG")
    assert not folder.with_name("base.distilling").exists()

    trained, initial = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "initial"))
    assert {name: tensor.shape for name, tensor in trained.items()} == {
        name: tensor.shape for name, tensor in initial.items()
    }
    for name, tensor in trained.items():
        assert tensor.equal(initial[name]) == (".mixer." not in name), name

    assert summary["tokens"]["held_out"] == 2 * 16
    assert summary["tokens"]["trained_on"] == 32 * 16
    held_out = TOKENS[-2:]
    models = {"donor": donor_dir, "initial": tmp_path / "initial", "distilled": folder}
    for name, path in models.items():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        assert summary["perplexity"][name] == pytest.approx(perplexity(model, held_out), rel=1e-3), name

    donor = AutoModelForCausalLM.from_pretrained(donor_dir).eval()
    student = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        entering = donor(held_out, output_hidden_states=True).hidden_states
    for index, row in enumerate(summary["layers"]):
        caught: list[torch.Tensor] = []
        layer = donor.model.layers[index]
        layer.self_attn.register_forward_hook(lambda module, args, out, caught=caught: caught.append(out[0]))
        mamba = student.backbone.layers[index]
        with torch.no_grad():
            donor(held_out)
            given = mamba.mixer(mamba.input_layernorm(entering[index]))
        error = (given - caught[0]).square().mean() / (caught[0] - caught[0].mean((0, 1))).square().mean()
        assert row["layer"] == index
        assert row["final"] == pytest.approx(error.item(), rel=1e-3)
    assert sum(row["final"] for row in summary["layers"]) < 0.8 * sum(row["initial"] for row in summary["layers"])

    lines = [json.loads(line) for line in (folder / "distillation.jsonl").read_text().splitlines()]
    assert [(line["layer"], line["step"]) for line in lines] == [
        (layer, step) for layer in range(4) for step in range(40)
    ]


def test_all_layers_grafted_give_the_donor_back(distilled, donor_dir, layers_dir, tmp_path):
    build_checkpoint(str(distilled[0]), [0, 1, 2, 3], layers_dir, tmp_path / "all")
    model, _ = load_checkpoint(tmp_path / "all", device="cpu")
    donor = AutoModelForCausalLM.from_pretrained(donor_dir).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS[:2]).logits, donor(TOKENS[:2]).logits, rtol=1e-5, atol=1e-4)


def kill_at(owner: object, name: str, call: int) -> None:
    """Let this process kill itself at the end of the `call`th call of a function."""
    function, calls = getattr(owner, name), []

    def counted(*args, **kwargs):
        result = function(*args, **kwargs)
        calls.append(name)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, counted)


def killed(owner: object, name: str, call: int, *args: object, **kwargs: object) -> bool:
    """Distil in a child process that `kill_at` kills. Return whether the child was killed."""
    child = os.fork()
    if child == 0:
        try:
            kill_at(owner, name, call)
            distill_llamba_base(*args, **kwargs)
        except BaseException:
            traceback.print_exc()
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("memory_limit_gb", [1.0, 0.0])
def test_killed_anywhere_it_goes_on_and_ends_with_the_same_bytes(donor_dir, tmp_path, monkeypatch, memory_limit_gb):
    monkeypatch.setattr("model_preparation.train.distill.tokens.SEQUENCES_AT_ONCE", 20)
    options = {**QUICK, "tokens": 34 * 12, "sequence_length": 12, "memory_limit_gb": memory_limit_gb}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    distill_llamba_base(str(donor_dir), whole, "self", **options)
    work = cut.with_name("cut.distilling")

    def finished() -> list[str]:
        return sorted(path.name for path in work.glob("layer_*"))

    asked = (str(donor_dir), cut, "self")
    assert killed(SelfSampler, "draw", 2, *asked, **options)
    assert (work / "drawn_000.safetensors").exists()
    assert killed(WorkFolder, "keep_tokens", 1, *asked, **options)
    assert killed(hidden_states.HiddenStates, "_new", 1, *asked, **options)
    assert killed(WorkFolder, "keep_layer", 1, *asked, **options)
    assert finished() == ["layer_00.safetensors"]
    assert killed(Teacher, "output", 1, *asked, **options)  # while the states go through a layer
    assert killed(Teacher, "compare", 5, *asked, **options)  # while layer 1 is trained
    assert finished() == ["layer_00.safetensors"]
    assert killed(WorkFolder, "keep_layer", 2, *asked, **options)
    assert finished() == [f"layer_{index:02d}.safetensors" for index in range(3)]
    assert bool(list(work.glob("states*/into_layer_02.float32"))) == (memory_limit_gb == 0)
    assert killed(distill, "write_llamba", 1, *asked, **options)
    assert not cut.exists()
    distill_llamba_base(*asked, **options)
    assert files_of(cut) == files_of(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "whole"]


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_ray_s_workers_give_the_same_bytes(donor_dir, quick_python, tmp_path):
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    text = tmp_path / "text.txt"
    text.write_text("To whom it may concern: this is text. " * 40)
    flags = ["--donor", donor_dir, "--data", text, "--sequence_length", 16, *FLAGS]
    alone = run_command("distill_llamba_base", *flags, "--output_dir", whole)
    assert alone.returncode == 0, alone.stderr
    assert alone.stdout.splitlines()[-1] == f"The base is in {whole}"
    many = ["--ray", "local", "--layers_per_job", 2, "--memory_limit", 0]
    # The processes of the jobs start from `quick_python` too. Ray's own processes do not.
    become = f"os.execv({str(quick_python)!r}, [{str(quick_python)!r}, *sys.orig_argv[1:]])"
    is_job = "sys.orig_argv[1].endswith('distill/worker.py')"
    (tmp_path / "sitecustomize.py").write_text(f"import os, sys\nif {is_job}:\n    {become}\n")
    with tempfile.TemporaryDirectory(prefix="ray") as ray_files:  # a short path, for the sockets in it
        environment = {"RAY_TMPDIR": ray_files, "PYTHONPATH": str(tmp_path)}
        asked = (*flags, *many, "--output_dir", shared)
        result = run_fresh_command("distill_llamba_base", *asked, python=quick_python, **environment)
    assert result.returncode == 0, result.stderr
    assert "layers 0 to 1: done" in result.stdout
    assert "layers 2 to 3: done" in result.stdout
    for name in ("model.safetensors", "config.json", "distillation.jsonl"):
        assert (shared / name).read_bytes() == (whole / name).read_bytes(), name
    assert not list(tmp_path.glob("shared.*"))


def test_another_setting_is_told_by_name_and_restart_begins_anew(donor_dir, tmp_path):
    output = tmp_path / "base"
    asked = (str(donor_dir), output, TOKENS)
    assert killed(WorkFolder, "keep_layer", 1, *asked, **QUICK)
    other = QUICK | {"seed": 6, "mixer": {"d_state": 8}}
    with pytest.raises(SurgeryError, match=r"mixer d_state: was not given, is now 8; seed: was 5, is now 6.*--restart"):
        distill_llamba_base(*asked, **other)
    with pytest.raises(SurgeryError, match=r"settings: data: the content has changed\. Give"):
        distill_llamba_base(str(donor_dir), output, TOKENS.flip(0), **QUICK)
    assert (output.with_name("base.distilling") / "layer_00.safetensors").exists()
    distill_llamba_base(*asked, **other, restart=True)
    state = load_file(output / "model.safetensors")
    assert state["backbone.layers.0.mixer.in_proj.weight"].shape == (32 + 2 * 16 + 32 + 2, 32)
    model = AutoModelForCausalLM.from_pretrained(output)
    assert model.config.ssm_cfg["d_state"] == 8


def test_the_tokens_outlive_other_settings_of_the_training(donor_dir, tmp_path, monkeypatch):
    output = tmp_path / "base"
    work = output.with_name("base.distilling")
    asked = (str(donor_dir), output, "self")
    options = {**QUICK, "tokens": 48, "sequence_length": 12}
    with pytest.raises(SurgeryError, match=r"loss is nan.*lower --learning_rate"):
        distill_llamba_base(*asked, **options | {"learning_rate": 1e30})
    kept = (work / "tokens.safetensors").stat()
    # No layer was finished, so another learning rate is allowed.
    assert killed(WorkFolder, "keep_layer", 1, *asked, **options)
    slower = options | {"learning_rate": 1e-3}
    with pytest.raises(SurgeryError, match=r"settings: learning_rate: was 0.003, is now 0.001\. .*the tokens are kept"):
        distill_llamba_base(*asked, **slower)
    with pytest.raises(SurgeryError, match=r"settings: tokens: was 48, is now 60\. .*begin again, or"):
        distill_llamba_base(*asked, **options | {"tokens": 60})
    assert killed(WorkFolder, "keep_layer", 1, *asked, **slower, restart=True)
    assert (work / "tokens.safetensors").stat() == kept
    distill_llamba_base(*asked, **slower)
    distill_llamba_base(*asked[:1], tmp_path / "other", "self", **slower)
    assert files_of(output) == files_of(tmp_path / "other")


def test_what_failed_before_there_were_tokens_stands_against_nothing(donor_dir, tmp_path):
    text = tmp_path / "text.txt"
    given = (str(donor_dir), tmp_path / "base", text)
    for content in ("", "short"):
        text.write_text(content)
        with pytest.raises(SurgeryError, match="two sequences"):
            distill_llamba_base(*given, **QUICK, sequence_length=16)
    text.write_text("long enough " * 20)
    summary = distill_llamba_base(*given, **QUICK, sequence_length=12, layers=[1])
    assert summary["tokens"]["trained_on"] == 19 * 12


def test_a_seed_may_be_of_any_size(donor_dir, tmp_path):
    options = {**QUICK, "seed": 10**20, "tokens": 24, "sequence_length": 12, "layers": [0]}
    assert distill_llamba_base(str(donor_dir), tmp_path / "base", "self", **options)["settings"]["seed"] == 10**20


def test_the_donor_is_told_by_its_content_and_not_by_a_path_of_this_machine(distilled, donor_dir):
    folder, summary = distilled
    assert summary["donor"] == {"hub": "local", "id": donor_dir.name, "revision": None}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= summary["settings"]["donor"].keys()
    assert str(donor_dir) not in (folder / "distillation.json").read_text()


def test_text_that_is_short_of_the_tokens_asked_for_is_told(donor_dir, tmp_path):
    write_text(tmp_path / "text.txt", words=300)
    flags = ("--donor", donor_dir, "--data", tmp_path / "text.txt", "--sequence_length", 32, "--steps_per_layer", 1)
    more = ("--tokens", 5000, "--layers", 0, "--device", "cpu", "--output_dir", tmp_path / "out")
    result = run_command("distill_llamba_base", *flags, *more)
    assert result.returncode == 0, result.stderr
    assert "--tokens is 5,000. All of these sequences are used." in result.stdout


def test_of_text_the_summary_has_one_digest(tmp_path):
    digests = []
    for name, content in (("a.txt", "one"), ("b.txt", "one"), ("a.txt", "two")):
        (tmp_path / name).write_text(content)
        digests.append(described(tmp_path, DistillSettings(tokens=10, sequence_length=5))["data"])
    assert len({digest for digest in digests if isinstance(digest, str)}) == 3


def test_each_layer_of_the_donor_is_read_once_for_the_training(donor_dir, tmp_path, monkeypatch):
    read, load = [], Donor.layer
    monkeypatch.setattr(Donor, "layer", lambda self, index: read.append(index) or load(self, index))
    distill_llamba_base(str(donor_dir), tmp_path / "base", TOKENS, **QUICK, layers=[0, 2])
    for_perplexities = list(range(read_config(donor_dir).num_hidden_layers))
    assert read == [0, 1, 2, *for_perplexities]


def test_an_error_that_grew_is_told():
    rows = [{"layer": 0, "initial": 2.0, "final": 1.0}, {"layer": 1, "initial": 0.5, "final": 0.6}]
    summary = {"layers": rows, "perplexity": {}, "loss": "", "tokens": {"held_out": 5}}
    assert "error larger in layer 1. Give a lower --learning_rate" in describe(summary)
    assert "larger" not in describe(summary | {"layers": rows[:1]})


def test_steps_are_counted_in_whole_numbers():
    log = [{"step": step, "loss": 1.0} for step in range(4)]
    axis = plot_losses([{"layer": 0, "initial": 2.0, "final": 1.0, "log": log}]).axes[0].xaxis
    assert all(tick == round(tick) for tick in axis.get_majorticklocs())


def test_chosen_layers_are_trained_and_the_rest_starts_as_ever(donor_dir, distilled, tmp_path):
    some = distill_llamba_base(
        str(donor_dir), tmp_path / "some", TOKENS, **QUICK | {"steps_per_layer": 40}, layers=[2], dtype=torch.bfloat16
    )
    assert [row["layer"] for row in some["layers"]] == [2]
    all_of_them = load_file(distilled[0] / "model.safetensors")
    for name, tensor in load_file(tmp_path / "some" / "model.safetensors").items():
        assert tensor.dtype == torch.bfloat16
        if ".mixer." not in name or ".2." in name:  # layer 2 is trained as in a run of all layers
            assert tensor.equal(all_of_them[name].bfloat16()), name
        elif "in_proj.weight" in name:
            assert not tensor.equal(all_of_them[name].bfloat16()), name


def test_positions_of_no_weight_do_not_count(donor_dir, tmp_path):
    changed, weights = TOKENS.clone(), torch.ones(TOKENS.shape)
    weights[:, 8:] = 0  # what comes later cannot change what is before it
    changed[:, 8:] = 7
    for name, tokens in (("one", TOKENS), ("other", changed)):
        distill_llamba_base(str(donor_dir), tmp_path / name, TokenData(tokens, weights), **QUICK)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "other"))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data", "nowhere.txt"], ["nowhere.txt is not there", "self"]),
        (["--layers", 9], ["Layer 9 is out of range", "0 to 3"]),
        (["--n_qk_heads", 3], ["These mixer sizes do not fit: ssm_cfg: n_qk_heads 3 does not divide"]),
        (["--sequence_length", 513], ["513 tokens are too long", "512", "config.json"]),
        (["--tokens", 10**15], ["1,000,000,000,000,000 tokens, width 32", "256.0 PB", "--memory_limit 128000000 also"]),
        (["--data", "short.txt"], ["has 4 tokens", "two sequences of 512"]),
        (["--data", "bad.jsonl"], ["bad.jsonl", 'line 2 has no field "text" with a string']),
        (["--data", "."], ["bad.jsonl"]),
        (["--donor", "BASE"], ["is a llamba model"]),
    ],
)
def test_what_cannot_be_is_one_sentence(donor_dir, base_dir, tmp_path, flags, words):
    (tmp_path / "short.txt").write_text("abc")
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n{"words": 3}\n')
    given = ["--donor", donor_dir, "--output_dir", tmp_path / "out", "--device", "cpu"]
    flags = [base_dir if flag == "BASE" else flag for flag in flags]
    assert_refused(run_command("distill_llamba_base", *given, *flags, cwd=tmp_path), *words)
    assert not (tmp_path / "out").exists()


def test_settings_that_cannot_be_are_refused_before_anything_is_read(tmp_path):
    for given, words in (
        ({"target": "norm"}, "target is 'norm'. Choose one of mixer, layer"),
        ({"tokens": 0}, "tokens is 0"),
    ):
        with pytest.raises(SurgeryError, match=words):
            distill_llamba_base("nowhere", tmp_path / "base", **given)


@pytest.mark.parametrize("restart", [True, False])
def test_a_folder_of_somebody_else_is_left_alone(donor_dir, tmp_path, restart):
    (tmp_path / "base.distilling").mkdir()
    (tmp_path / "base.distilling" / "thesis.txt").write_text("years of work")
    with pytest.raises(SurgeryError, match="holds other files"):
        distill_llamba_base(str(donor_dir), tmp_path / "base", TOKENS, **QUICK, restart=restart)
    assert (tmp_path / "base.distilling" / "thesis.txt").read_text() == "years of work"


def test_a_finished_base_is_replaced_only_if_that_is_said(distilled, donor_dir):
    given = ["--donor", donor_dir, "--output_dir", distilled[0], *FLAGS]
    assert_refused(run_command("distill_llamba_base", *given), "exists already", "--overwrite")
    assert_refused(run_command("distill_llamba_base", *given, "--layers_per_job", 2), "belongs to --ray", code=2)
