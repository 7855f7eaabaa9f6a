"""Gradient geometry during training: every N steps, on a probe batch that stays the same."""

from collections.abc import Callable
from typing import Any

import tokenweights as tw
import torch
from tokenweights._errors import invalid
from tokenweights.gradients.preserved import preserved
from tokenweights.recipes import Recipe, recipe
from tokenweights.report.records import append_log
from torch import Tensor
from transformers import TrainerCallback

from tokenweights_trl.scores import forward_scores, require_own_tokens

OPTIONS = ("gradient_probe_steps", "gradient_probe_file", "gradient_probe_tolerance")
# What accelerate's names for a precision stand for.
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
# What the probe reads of a rollout batch.
KEYS = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages")

# What a mixin calls belongs to the trainer after it; TRL's own types are too loose to check it.
_Base: Any = object


class GradientProbeMixin(_Base):
    r"""Gradient geometry for `GRPOTrainer` or a subclass of it; name it last of the mixins.

    The probe batch is the first rollout batch with a non-zero advantage, before any weights: there
    the adapter's recipes and plain GRPO are looked at alike. After optimizer steps 1, 1 + N,
    1 + 2N, ... its tokens are sorted anew by the policy's attention entropy, and the gradient of
    $-A_t \pi(t) / \pi_{probe}(t)$, at ratio 1, is taken apart into the `gradient/*` metrics that
    `tokenweights.GradientSeries` lists.

    Parameters, optimizer state, gradients and random state stay as they are, so that training with
    and without the probe is the same. A probe costs five forward and backward passes over the probe
    batch and three forward passes, in bfloat16 fifteen and one, and one copy of the parameters. A
    resumed run takes a new probe batch and starts the dispersion anew.

    The options are those of `TokenWeightsGRPOConfig`, or attributes of a subclass, for a plain
    `trl.GRPOConfig`.

    Attributes:
        gradient_probe_steps: Optimizer steps $N$ between two probes, >= 1; None probes never.
        gradient_probe_file: JSONL file to which each probe appends a line; None writes none.
        gradient_probe_tolerance: Largest distance of the sum of the projection ratios from one;
            beyond it the probe raises. None follows from the precision; see
            `tokenweights.GradientSeries.metrics`.

    Raises:
        TokenWeightsError: If the model sees images or is sharded in a way the probe cannot move.
    """

    gradient_probe_steps: int | None = 50
    gradient_probe_file: str | None = None
    gradient_probe_tolerance: float | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        name = type(self).__name__
        for option in OPTIONS:
            if (asked := getattr(self.args, option, None)) is not None:
                setattr(self, option, asked)
        self._probe_batch: dict[str, Tensor] | None = None
        if self.gradient_probe_steps is None:
            return
        if self.gradient_probe_steps < 1:
            hint = "It is a number of optimizer steps."
            raise invalid(name, "gradient_probe_steps", ">= 1", self.gradient_probe_steps, hint)
        if self._is_vlm:
            raise invalid(name, "model", "a text model", "one with images", "Leave out the probe.")
        require_own_tokens(self.accelerator.unwrap_model(self.model))
        fsdp1 = self.is_fsdp_enabled and not getattr(self.accelerator, "is_fsdp2", False)
        if self.is_deepspeed_enabled or fsdp1:
            hint = "Use DDP or FSDP2, or leave out the probe."
            raise invalid(name, "model", "with parameters of its own", "an engine's shards", hint)
        self._series = tw.GradientSeries()
        self.add_callback(_AfterStep(self._after_step))

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        wanted = self.gradient_probe_steps is not None and self._probe_batch is None
        if wanted and self.model.training:
            # All ranks must agree: the probe of a sharded model is collective.
            moves = self.accelerator.gather(output["advantages"].abs().max()[None])
            if float(moves.max()) > 0:
                batch = {key: output[key].clone() for key in KEYS}
                batch["completion_mask"] *= output.get("tool_mask", 1)
                self._probe_batch = batch
        return output

    def _after_step(self, step: int) -> None:
        every = self.gradient_probe_steps
        if self._probe_batch is None or every is None or (step - 1) % every != 0:
            return
        metrics = self._probed(self._probe_batch)
        for name, value in metrics.items():
            self._metrics["train"][name].append(value)
        if self.gradient_probe_file and self.accelerator.is_main_process:
            append_log(self.gradient_probe_file, metrics, step=step)

    def _probed(self, batch: dict[str, Tensor]) -> dict[str, float]:
        # The wrapped model, for its wrapper is what reduces gradients over the ranks.
        model, mask = self.model_wrapped, batch["completion_mask"].bool()
        group = torch.distributed.group.WORLD if self.accelerator.num_processes > 1 else None
        with preserved("GradientProbeMixin", model):
            scores, old_log_probs = self._scored(batch)
        first = self.accelerator.process_index * len(mask)
        return self._series.metrics(
            tw.GradientProbe(model, group=group),
            self._token_losses(model, batch, old_log_probs),
            scores=scores,
            mask=mask,
            sample_ids=torch.arange(first, first + len(mask), device=mask.device),
            tolerance=self.gradient_probe_tolerance,
            autocast=AUTOCAST.get(self.accelerator.mixed_precision),
        )

    def _log_probs(self, model: Any, batch: dict[str, Tensor], rows: slice) -> Tensor:
        ids, mask = (
            torch.cat([batch[f"prompt_{name}"][rows], batch[f"completion_{name}"][rows]], dim=1)
            for name in ("ids", "mask")
        )
        length = batch["completion_ids"].shape[1]
        return self._get_per_token_logps_and_entropies(model, ids, mask, length)[0]

    def _rows(self, batch: dict[str, Tensor]) -> list[slice]:
        size = self.args.per_device_train_batch_size
        return [slice(start, start + size) for start in range(0, len(batch["advantages"]), size)]

    def _scored(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Attention entropies and log-probabilities under the present policy."""
        own = getattr(self, "recipe", None)
        rule = own if isinstance(own, Recipe) and own.entropy else recipe("low2high")
        model = self.accelerator.unwrap_model(self.model_wrapped)
        attention, mask = rule.on_model(model).entropy, batch["completion_mask"].bool()
        assert attention is not None
        with (
            torch.no_grad(),
            forward_scores(
                model,
                torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1).bool(),
                attention=attention,
                response_length=mask.shape[1],
            ) as scores,
        ):
            parts = [self._log_probs(self.model_wrapped, batch, rows) for rows in self._rows(batch)]
        return attention(tw.RolloutBatch(mask=mask, attention={**scores})), torch.cat(parts)

    def _token_losses(
        self, model: Any, batch: dict[str, Tensor], old_log_probs: Tensor
    ) -> list[Callable[[], Tensor]]:
        return tw.unclipped_losses(
            lambda rows: self._log_probs(model, batch, rows),
            old_log_probs,
            batch["advantages"],
            batch["completion_mask"].bool(),
            micro_batch_size=self.args.per_device_train_batch_size,
        )


class _AfterStep(TrainerCallback):
    """Calls a function with the number of optimizer steps done, after each."""

    def __init__(self, function: Callable[[int], None]):
        self._function = function

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._function(state.global_step)
