"""`GRPOTrainer` with token weights: scores once per rollout batch, weights, weighted advantages."""

import inspect
import logging
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from tokenweights import RolloutBatch
from tokenweights._errors import invalid
from tokenweights.recipes import require_version
from tokenweights.report.records import append_log
from tokenweights.report.rollouts import RolloutRecords
from torch import Tensor
from transformers import TrainerCallback
from trl.trainer.grpo_trainer import GRPOTrainer

from tokenweights_trl.config import TokenWeightsGRPOConfig
from tokenweights_trl.probe import GradientProbeMixin
from tokenweights_trl.scores import (
    forward_scores,
    generation_scores,
    require_own_tokens,
    require_positions,
)

logger = logging.getLogger(__name__)

# The private methods of TRL that are overridden here, with the parameters relied upon.
CONTRACT = {
    "_generate_and_score_completions": ["inputs"],
    "_generate_single_turn": ["prompt_ids"],
    "_get_per_token_logps_and_entropies": [
        *("model", "input_ids", "attention_mask", "logits_to_keep"),
        *("batch_size", "compute_entropy", "compute_aux_loss"),
    ],
    "_compute_loss": ["model", "inputs"],
}

SOURCES = {
    "none": "the recipe reads nothing that takes a pass",
    "old_log_prob_pass": "scores come from TRL's own pass for the old log-probabilities",
    "generation": "scores come from the generation itself",
    "scoring_pass": "scores cost one more forward pass per rollout batch. It is not needed where "
    "TRL makes a pass for the old log-probabilities (steps_per_generation > "
    "gradient_accumulation_steps), nor for the attention entropy of the deciding row where "
    "transformers generates over a dynamic cache",
}

# The columns of a rollout batch that a forward pass gives.
OF_A_PASS = ("log_probs", "predictive_entropy", "attention")

# Caches of transformers that hold every key and grow with it; `generate` takes "hybrid" for None.
GROWING_CACHES = (None, "dynamic", "offloaded", "hybrid")


@dataclass
class Rollout:
    """What is known of a rollout batch while TRL makes it.

    Attributes:
        source: Where its columns are to come from, or came from: a key of `SOURCES`.
        columns: The columns of `OF_A_PASS` that a pass or the generation gave.
    """

    source: str
    columns: dict[str, Any] = field(default_factory=dict)


# What a mixin calls belongs to the trainer after it; TRL's own types are too loose to check it.
_Base: Any = object


class TokenWeightsMixin(_Base):
    r"""Token weights for `GRPOTrainer` or a subclass of it; name it first among the bases.

    Once per rollout batch, before TRL shuffles and splits it, what the recipe reads of the
    rollout-time policy becomes weights, and advantages of shape `batch` become weighted ones of
    shape `batch token`, which TRL carries through every micro-batch and iteration. Extrema and
    counts span all ranks. The schedule's step is `state.global_step` at rollout time. Evaluation
    stays TRL's own.

    Attributes:
        homogeneous_loss: Whether a subclass that overrides the loss keeps what weighted advantages
            rest on: for $w \ge 0$ the loss of the advantage $wA$ is $w$ times the loss of $A$. If
            not, such a class is refused.
        recipe: The recipe, with its layers numbered for the model.
        score_source: Where the last rollout batch's scores came from: a key of `SOURCES`, or None
            before the first.

    Raises:
        TokenWeightsError: If `args` is no `TokenWeightsGRPOConfig`, the model has no attention
            layer that can be read, or the installed TRL is not one this adapter fits.
    """

    homogeneous_loss: bool = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._check_contract()
        model = self.accelerator.unwrap_model(self.model)
        self.recipe = self.args.token_recipe.on_model(model)
        if self.recipe.attention is not None:
            require_own_tokens(model)
        self.score_source: str | None = None
        self._rollout: Rollout | None = None  # only while TRL makes a rollout batch
        self._rollout_place = (-1, 0)  # optimizer step of the last rollout, and place within it
        self._records = RolloutRecords(self.args.token_records, every=self.args.token_records_steps)
        if self.args.metrics_file is not None:
            self.add_callback(_MetricsFile(self.args.metrics_file))

    def _check_contract(self) -> None:
        require_version("trl", "1.16", "1.17")
        name, version = type(self).__name__, "tokenweights-trl is made for trl>=1.16,<1.17."
        if not isinstance(self.args, TokenWeightsGRPOConfig):
            got, hint = type(self.args).__name__, "Pass `TokenWeightsGRPOConfig(recipe=...)`."
            raise invalid(name, "args", "a TokenWeightsGRPOConfig", got, hint)
        for method, needed in CONTRACT.items():
            found = _parameters(getattr(super(), method, None))
            if not set(needed) <= set(found):
                condition = f"with {method}({', '.join(needed)})"
                raise invalid(name, "trl", condition, f"({', '.join(found)})", version)
        classes = type(self).__mro__
        for owner in {*classes[: classes.index(GRPOTrainer)]} - {TokenWeightsMixin}:
            if not self.homogeneous_loss and {"compute_loss", "_compute_loss"} & vars(owner).keys():
                hint = (
                    "Set `homogeneous_loss = True` if w >= 0 times A gives w times the loss of A."
                )
                raise invalid(name, "compute_loss", "TRL's own", f"that of {owner.__name__}", hint)
        if self.args.use_liger_kernel and hasattr(self, "compute_liger_loss"):
            condition = "False where TRL then computes the loss elsewhere"
            raise invalid(name, "use_liger_kernel", condition, True, version)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not self.model.training:
            return super()._generate_and_score_completions(inputs)
        self._rollout = rollout = Rollout(self._planned_source())
        try:
            output = super()._generate_and_score_completions(inputs)
            columns = self._columns(rollout, output)
        finally:
            self._rollout = None
        if rollout.source != self.score_source and self.accelerator.is_main_process:
            level = logging.WARNING if rollout.source == "scoring_pass" else logging.INFO
            logger.log(level, "Token weights: %s.", SOURCES[rollout.source])
        self.score_source = rollout.source
        return self._weighted(output, columns)

    def _planned_source(self) -> str:
        read = set(OF_A_PASS) & set(self.recipe.columns)
        if not read:
            return "none"
        generate_every = self.args.steps_per_generation * self.num_iterations
        if self.args.gradient_accumulation_steps % generate_every != 0 or (
            self.use_vllm and self.vllm_importance_sampling_correction
        ):
            return "old_log_prob_pass"
        attention = self.recipe.attention if read == {"attention"} else None
        # A generation that once gave no scores is not tried again.
        readable = self.score_source != "scoring_pass" and not self.tools and not self._is_vlm
        elsewhere = self.use_vllm or self.use_transformers_continuous_batching or self.rollout_func
        if attention is None or attention.alignment != "deciding" or elsewhere or not readable:
            return "scoring_pass"
        defaults = self.accelerator.unwrap_model(self.model).generation_config
        cache = self.generation_config.cache_implementation or defaults.cache_implementation
        return "generation" if cache in GROWING_CACHES else "scoring_pass"

    def _generate_single_turn(self, prompt_ids: list[list[int]], *args: Any, **kwargs: Any) -> Any:
        rollout = self._rollout
        if rollout is None or rollout.source != "generation":
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        lengths = torch.tensor([len(ids) for ids in prompt_ids], device=self.accelerator.device)
        multiple = self.pad_to_multiple_of or 1
        with generation_scores(
            self.accelerator.unwrap_model(self.model),
            lengths,
            attention=self.recipe.attention,
            prompt_width=-(-int(lengths.max()) // multiple) * multiple,
        ) as scores:
            completions = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        rollout.columns["attention"] = scores
        return completions

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        rollout = self._rollout if model is self.model else None
        if rollout is None or rollout.source != "old_log_prob_pass" or rollout.columns:
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        outputs, rollout.columns = self._pass_with_columns(model, *args, **kwargs)
        return outputs

    def _pass_with_columns(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Any, dict[str, Any]]:
        """What TRL's pass returns, and the columns of `OF_A_PASS` that it gives."""
        forward, attention = super()._get_per_token_logps_and_entropies, self.recipe.attention
        policy, real = self.accelerator.unwrap_model(model), attention_mask.bool()
        require_positions(policy, real)
        scores = nullcontext()
        if attention is not None:
            options = {"attention": attention, "response_length": logits_to_keep}
            scores = forward_scores(policy, real, **options)
        if "predictive_entropy" in self.recipe.columns:
            kwargs["compute_entropy"] = True
        with scores as layers:
            outputs = forward(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
        found = (outputs[0], outputs[1], layers)
        return outputs, dict(zip(OF_A_PASS, found, strict=True))

    def _columns(self, rollout: Rollout, output: dict[str, Any]) -> dict[str, Any]:
        """The columns of `OF_A_PASS`, from where that was planned or from one more pass."""
        columns, width = rollout.columns, output["completion_ids"].shape[1]
        if rollout.source == "none":
            return {}
        if rollout.source == "generation":
            layers = columns["attention"]
            multiple = self.pad_to_multiple_of or 1
            missing = width - next((scores.shape[1] for scores in layers.values()), -multiple)
            # All ranks must agree: a scoring pass of a sharded model is collective.
            ranks = torch.tensor([missing], device=self.accelerator.device)
            most = int(self.accelerator.gather(ranks).max())
            complete = most < multiple
            padded = torch.nn.functional.pad
            columns = {"attention": {n: padded(layers[n], (0, missing)) for n in layers}}
        else:
            # With an adapter the reference pass runs the policy's modules; this tells them apart.
            log_probs = columns.get("log_probs")
            complete = log_probs is not None and output.get("old_per_token_logps") is log_probs
        if complete:
            return columns
        rollout.source = "scoring_pass"
        vision = _parameters(super()._get_per_token_logps_and_entropies)
        vision = vision[len(CONTRACT["_get_per_token_logps_and_entropies"]) :]
        options = {name: output[name] for name in vision if name in output}
        options["batch_size"] = self.args.per_device_train_batch_size
        return self._one_more_pass(output, self._pass_with_columns, **options)[1]

    def _one_more_pass(
        self, output: dict[str, Any], forward: Any, rows: Any = slice(None), **options: Any
    ) -> Any:
        """A pass of the policy over rows of a rollout batch, on every rank: it is collective."""
        ids, real = (
            torch.cat([output[f"{part}_{name}"][rows] for part in ("prompt", "completion")], dim=1)
            for name in ("ids", "mask")
        )
        with torch.no_grad():
            return forward(self.model, ids, real, output["completion_ids"].shape[1], **options)

    def _batch(self, output: dict[str, Any], columns: dict[str, Any]) -> RolloutBatch:
        """This rank's rows of the rollout batch, with the columns that the recipe reads."""
        mask, advantages = _response_mask(output), output["advantages"]
        sample_ids = self._sample_ids(len(mask), mask.device)
        sampler = output.get("sampling_per_token_logps")
        if sampler is not None and "log_probs" in columns:
            # Where vLLM gives none, TRL takes the policy's own, and so does this.
            sampler = torch.where(sampler.isnan(), columns["log_probs"], sampler)
        given = columns | {
            "sampler_log_probs": sampler,
            "reference_log_probs": output.get("ref_per_token_logps"),
        }
        return RolloutBatch(
            mask=mask,
            sample_ids=sample_ids,
            prompt_ids=sample_ids // self.num_generations,
            token_ids=output["completion_ids"],
            advantages=advantages if advantages.dim() == 2 else advantages[:, None],
            rewards=self._rewards(len(mask), mask.device),
            group=torch.distributed.group.WORLD if torch.distributed.is_initialized() else None,
            **{name: given.get(name) for name in given if name in self.recipe.columns},
        )

    def _rewards(self, rows: int, device: torch.device) -> Tensor | None:
        """What the reward functions gave this rank's rows, weighed; token records show it."""
        # TRL keeps the rewards of the last rollout batch, of all ranks one after another, by the
        # function's name: of two with one name only the last one's.
        names, ranks = self.reward_func_names, self.accelerator.num_processes
        parts = [list(self._logs["rewards"][name]) for name in names]
        if len({*names}) < len(names) or any(len(part) < rows * ranks for part in parts):
            return None
        start = -(ranks - self.accelerator.process_index) * rows
        mine = [part[start : start + rows or None] for part in parts]
        values = torch.tensor(mine, dtype=torch.float32, device=device)
        return (values * self.reward_weights.to(device)[:, None]).nansum(0)

    def _weighted(self, output: dict[str, Any], columns: dict[str, Any]) -> dict[str, Any]:
        step, batch = self.state.global_step, self._batch(output, columns)
        rollout = self.recipe.weighted(batch, step=step)
        prompts, real = output["prompt_ids"], output["prompt_mask"].bool()
        self._records.append(
            self.recipe,
            batch,
            rollout,
            step=step,
            prompt=lambda row: self._tokenizer.decode(prompts[row][real[row]]),
            decode=self._tokenizer.decode,
            detailed=lambda shown, rows: self._detailed(output, shown, rows),
            write=self.accelerator.is_main_process,
        )
        for name, value in rollout.metrics.items():
            self._metrics["train"][f"token_weights/{name}"].append(value)
        output = {**output, "advantages": batch.advantages * rollout.weights}
        if self.recipe.denominator != "all_tokens" and self.args.loss_type == "bnpo":
            output["token_weights"] = rollout.weights  # see `_compute_loss`
        else:
            output["advantages"] *= rollout.scale
        return output

    def _detailed(
        self, output: dict[str, Any], shown: RolloutBatch, rows: list[int]
    ) -> RolloutBatch:
        """Some rows with log-probabilities and entropies, which a token record holds too."""
        forward = super()._get_per_token_logps_and_entropies
        log_probs, entropies, *_ = self._one_more_pass(output, forward, rows, compute_entropy=True)
        return replace(shown, log_probs=log_probs, predictive_entropy=entropies)

    def _sample_ids(self, rows: int, device: torch.device) -> Tensor:
        """Row numbers of a rollout batch that no other of the run has, over all ranks.

        They follow from the optimizer step, so a resumed run goes on with them. An optimizer step
        sees at most ceil(window / batches) rollouts; they are counted, since the last step of an
        epoch may be a short one and shift the next ones against `_step`.
        """
        window, batches = self.args.gradient_accumulation_steps, self.args.steps_per_generation
        step, (last, place) = self.state.global_step, self._rollout_place
        self._rollout_place = step, place + 1 if step == last else 0
        rollout = step * -(-window // batches)
        rollout += self._rollout_place[1]
        first = (rollout * self.accelerator.num_processes + self.accelerator.process_index) * rows
        return torch.arange(first, first + rows, device=device)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if "token_weights" in inputs:
            # TRL divides by the tokens of this micro-batch on this rank, and so does the exchange.
            # Later iterations use the buffered dict again: it stays as it is.
            scale = self.recipe.denominator_scale(inputs["token_weights"], _response_mask(inputs))
            inputs = {**inputs, "advantages": inputs["advantages"] * scale}
        return super()._compute_loss(model, inputs)


class TokenWeightsGRPOTrainer(TokenWeightsMixin, GradientProbeMixin, GRPOTrainer):
    """`trl.GRPOTrainer` with token weights and a gradient probe; see the mixins."""

    gradient_probe_steps = None


class _MetricsFile(TrainerCallback):
    """Appends what TRL logs to a file, as a report reads it."""

    def __init__(self, path: str):
        self._path = path

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            append_log(self._path, logs, step=state.global_step)


def _response_mask(batch: dict[str, Any]) -> Tensor:
    """The tokens TRL counts: those of the response, less what tools wrote."""
    return (batch["completion_mask"] * batch.get("tool_mask", 1)).bool()


def _parameters(method: Any) -> list[str]:
    return list(inspect.signature(method).parameters) if method is not None else []
