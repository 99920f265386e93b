"""Callbacks of the training: lines on the console, and a state when the user stops the run."""

import signal
import sys
from collections.abc import Mapping

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

_SHOWN = {
    "loss": "loss {:.4f}",
    "learning_rate": "lr {:.2e}",
    "grad_norm": "grad {:.2f}",
    "eval_loss": "held-out loss {:.4f}",
}


class Console(ProgressCallback):
    """Shows transformers' progress bar if stderr is a terminal; prints loss and learning rate as lines on stdout."""

    def on_train_begin(self, args, state, control, **kwargs):
        if sys.stderr.isatty():
            super().on_train_begin(args, state, control, **kwargs)

    def on_step_end(self, args, state, control, **kwargs):
        if self.training_bar is not None:
            super().on_step_end(args, state, control, **kwargs)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if sys.stderr.isatty():
            super().on_prediction_step(args, state, control, eval_dataloader, **kwargs)

    def on_log(self, args, state, control, logs: Mapping[str, float] | None = None, **kwargs):
        parts = [form.format(logs[name]) for name, form in _SHOWN.items() if logs and name in logs]
        if not state.is_world_process_zero or not parts:
            return
        line = f"step {state.global_step:>{len(str(state.max_steps))}} of {state.max_steps}   {'   '.join(parts)}"
        if self.training_bar is not None:
            self.training_bar.clear()
        print(line, flush=True)

    def on_train_end(self, args, state, control, **kwargs):
        if self.training_bar is not None:
            super().on_train_end(args, state, control, **kwargs)


class SaveWhenStopped(TrainerCallback):
    """The first Ctrl-C or SIGTERM saves a state after this step and stops the training. The second stops it at once.

    Attributes:
        received: the signal's number, or None.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous_handlers: dict[int, object] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous_handlers[number] = signal.signal(number, self._on_signal)

    def on_step_end(self, args, state, control, **kwargs):
        if args.world_size > 1:  # all processes must stop after the same step
            stop_signal = torch.tensor([self.received or 0], device=args.device)
            torch.distributed.all_reduce(stop_signal, torch.distributed.ReduceOp.MAX)
            self.received = int(stop_signal) or None
        if self.received is not None:
            control.should_save = True
            control.should_training_stop = True

    def restore_handlers(self) -> None:
        """Give Ctrl-C and SIGTERM the effects that they had before the training."""
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, frame) -> None:
        if self.received is not None:
            self.restore_handlers()
            signal.raise_signal(number)
        self.received = number
