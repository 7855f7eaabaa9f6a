"""What the command line does while it trains: it stops in order, and doubts dead rewards."""

import functools
import inspect
import logging
import math
import signal
import sys
from collections.abc import Sequence
from typing import Any

import torch
from transformers import TrainerCallback

from tokenweights_trl.rewards import MATCHES, RewardFunction, compared, text_of

logger = logging.getLogger(__name__)

# Steps after which rewards that never differed are a mistake, not bad luck.
DOUBTED_STEPS = 3
_TAIL = 80  # characters of a response that a warning shows


class Interruption(TrainerCallback):
    """Ends training after the step at hand, with a checkpoint, when Ctrl-C or SIGTERM asks for it.

    All ranks end at the same step. The second signal acts at once.

    Attributes:
        asked: Whether training ended because it was asked to.
    """

    def __init__(self) -> None:
        self.asked = False
        self._signal = False
        self._before: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take the signals over."""
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop if a rank was asked to."""
        asked = torch.tensor([self._signal], dtype=torch.int32, device=args.device)
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
        if bool(asked):
            self.asked = control.should_save = control.should_training_stop = True
            control.should_evaluate = args.eval_strategy != "no"

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Give the signals back."""
        self._restore()

    def _note(self, number: int, frame: Any) -> None:
        self._signal = True
        self._restore()
        print("\ninterrupted: ending after this step; once more ends at once", file=sys.stderr)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


class RewardWatch(TrainerCallback):
    """Warns once if no prompt of the first steps had responses of different rewards.

    Their advantages are all 0: nothing is learned, and no error says so.

    Args:
        functions: Reward functions; the watch reads along in `functions` of its own.
    """

    def __init__(self, functions: Sequence[RewardFunction], *, column: str | None) -> None:
        self._column = column
        self._last: dict[str, tuple[str, Any, Any]] = {}
        self._flat: list[bool] = []
        self._done = False
        self.functions = [self._watched(function) for function in functions]

    def _watched(self, function: RewardFunction) -> RewardFunction:
        if inspect.iscoroutinefunction(function):
            return function
        name = getattr(function, "__name__", type(function).__name__)

        @functools.wraps(function)
        def watched(**given: Any) -> list[float | None]:
            rewards = function(**given)
            if given["completions"] and len(rewards):
                answers = given.get(self._column) if self._column else None
                answer = answers[-1] if answers else None
                self._last[name] = (text_of(given["completions"][-1]), rewards[-1], answer)
            return rewards

        watched.__name__ = name
        return watched

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Note whether all groups of the logged steps were without variance."""
        share = (logs or {}).get("frac_reward_zero_std")
        if share is not None:
            self._flat.append(math.isclose(share, 1.0))
            if state.global_step >= DOUBTED_STEPS:
                self._judge(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Judge a run that was shorter."""
        self._judge(state)

    def _judge(self, state: Any) -> None:
        if self._done or not self._flat:
            return
        self._done = True
        if all(self._flat) and state.is_world_process_zero:
            lines = [self._said(name, *last) for name, last in self._last.items()]
            logger.warning(
                "Token weights: up to step %d all responses to a prompt got the same reward, so "
                "all advantages are 0 and nothing is learned. %s Look at the answers "
                "(--answer_column), at the reward (--reward_funcs), and at "
                "--max_completion_length.",
                state.global_step,
                " ".join(lines),
            )

    def _said(self, name: str, text: str, reward: Any, answer: Any) -> str:
        what = f", comparing {compared(name, text, answer)}" if name in MATCHES else ""
        return f"{name} gave {reward} to a response that ends in {text[-_TAIL:]!r}{what}."
