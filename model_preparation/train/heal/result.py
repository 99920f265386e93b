"""What a healed checkpoint keeps of its run: scores, texts before and after, the log and its plot."""

import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from model_preparation.checkpoint.checkpoint_folder import LOSS_CURVE, TRAINING_LOG
from model_preparation.evaluation.generation import generate_text
from model_preparation.llamba import LlambaForCausalLM
from model_preparation.llamba.configuration_llamba import LlambaConfig
from model_preparation.train.heal.heal_trainer import HealTrainer
from model_preparation.train.heal.run import Run
from model_preparation.train.heal.settings import described
from model_preparation.train.heal.trained_layers import trained_layers

_NEW_TOKENS = 40  # the length of the texts before and after
_LOGGED = ("loss", "grad_norm", "learning_rate", "eval_loss", "epoch", "step")  # no times: they differ in every run


def healing_record(
    trainer: HealTrainer, run: Run, parent_info: Mapping[str, Any], texts_after: Sequence[str]
) -> dict[str, Any]:
    """The field `healing` of checkpoint_info.json. It keeps only the last part of each path."""
    settings, identity = run.settings, run.identity
    measured = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    is_best = settings.load_best and trainer.state.best_model_checkpoint is not None
    after = trainer.state.best_metric if is_best else measured[-1] if measured else None
    mmlu_before = parent_info["mmlu_score"] if settings.init_from == "checkpoint" else None
    earlier = {}
    if settings.stage is not None:
        before = dict(parent_info.get("healing", {}))
        others = before.pop("earlier_stages", [])
        earlier = {"earlier_stages": [*others, before] if before.get("settings", {}).get("stage") else []}
    return {
        "method": settings.method,
        "objective": "distillation" if settings.has_teacher else "language modelling",
        "data": identity["data"],
        "settings": described(settings),
        "layers": trained_layers(LlambaConfig.from_dict(parent_info["config"]), settings.method),
        "trained_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "steps": trainer.state.global_step,
        "best_step": trainer.state.best_global_step if is_best else None,
        "sequences_seen": trainer.sequences_seen,
        "passes": trainer.passes,
        "world_size": trainer.args.world_size,
        "scores": {"before": scores(measured[0] if measured else None, mmlu_before), "after": scores(after, None)},
        "texts": [
            {"prompt": text["prompt"], "before": text["text"], "after": after}
            for text, after in zip(identity["texts"], texts_after, strict=True)
        ],
        **earlier,
    }


def scores(eval_loss: float | None, mmlu_score: float | None) -> dict[str, float | None]:
    """Held-out loss in nats per token, its exponential, and the MMLU score. Unknown values are None."""
    perplexity = None if eval_loss is None or eval_loss > 700 else math.exp(eval_loss)
    return {"eval_loss": eval_loss, "perplexity": perplexity, "mmlu_score": mmlu_score}


def texts_of(model: LlambaForCausalLM, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[str]:
    """The model's greedy text after each prompt."""
    return [generate_text(model, tokenizer, prompt, max_new_tokens=_NEW_TOKENS).text for prompt in prompts]


def log_files(trainer: HealTrainer) -> dict[str, Any]:
    """{file name: function that writes this file to a path}, for the log and its plot."""
    log = [{name: entry[name] for name in _LOGGED if name in entry} for entry in trainer.state.log_history]
    log = [entry for entry in log if "loss" in entry or "eval_loss" in entry]
    return {TRAINING_LOG: partial(_write_lines, log), LOSS_CURVE: partial(_plot_losses, log)}


def _write_lines(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _plot_losses(log: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw losses above and the learning rate below, over the steps, into a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # takes half a second, and is needed only at the end
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for axes, name, label in (
        (losses, "loss", "training loss"),
        (losses, "eval_loss", "held-out loss"),
        (rates, "learning_rate", "learning rate"),
    ):
        points = [(entry["step"], entry[name]) for entry in log if name in entry]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o" if name == "eval_loss" else None, label=label)
            axes.legend()
    losses.set_ylabel("loss, nats per token")
    rates.set_ylabel("learning rate")
    rates.set_xlabel("step")
    figure.savefig(path, format="png", metadata={"Software": None})
