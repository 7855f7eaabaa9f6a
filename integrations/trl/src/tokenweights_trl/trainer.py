"""`GRPOTrainer` with token weights: scores once per rollout batch, weights, weighted advantages."""

import inspect
import logging
from dataclasses import dataclass
from typing import Any

import torch
from tokenweights._errors import invalid
from tokenweights.recipes import weighted_rollout
from tokenweights.report.records import append_token_records, token_records
from torch import Tensor
from trl.trainer.grpo_trainer import GRPOTrainer

from tokenweights_trl.config import TokenWeightsGRPOConfig
from tokenweights_trl.scores import forward_scores, generation_scores, require_positions

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
    "none": "the recipe needs no scores",
    "old_log_prob_pass": "scores come from TRL's own pass for the old log-probabilities",
    "generation": "scores come from the generation itself",
    "scoring_pass": "scores cost one more forward pass per rollout batch. It is not needed where "
    "TRL makes a pass for the old log-probabilities (steps_per_generation > "
    "gradient_accumulation_steps), nor for the attention entropy of the deciding row where "
    "transformers generates over a dynamic cache",
}

# Caches of transformers that hold every key and grow with it; `generate` takes "hybrid" for None.
GROWING_CACHES = (None, "dynamic", "offloaded", "hybrid")


@dataclass
class Rollout:
    """What is known of a rollout batch while TRL makes it.

    Attributes:
        source: Where its scores are to come from, or came from: a key of `SOURCES`.
        scores: Scores of each layer, `batch token`; None until a pass or the generation gave them.
        log_probs: Log-probabilities of the pass that gave the scores.
    """

    source: str
    scores: list[Tensor] | None = None
    log_probs: Tensor | None = None


# What a mixin calls belongs to the trainer after it; TRL's own types are too loose to check it.
_Base: Any = object


class TokenWeightsMixin(_Base):
    """Token weights for `GRPOTrainer` or a subclass of it; name it first among the bases.

    Once per rollout batch, before TRL shuffles and splits it, the scores of the rollout-time policy
    become weights, and advantages of shape `batch` become weighted ones of shape `batch token`,
    which TRL carries through every micro-batch and iteration. Extrema and counts span all ranks.
    The schedule's step is `state.global_step` at rollout time. Evaluation stays TRL's own.

    Attributes:
        recipe: The recipe.
        probe_layers: Layers the attention entropy is read from; empty for other signals.
        score_source: Where the last rollout batch's scores came from: a key of `SOURCES`, or None
            before the first.

    Raises:
        TokenWeightsError: If `args` is no `TokenWeightsGRPOConfig`, the model has no attention
            layer that can be read, or the installed TRL is not one this adapter fits.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._check_contract()
        self.recipe = self.args.token_recipe
        self.score_source: str | None = None
        self._rollout: Rollout | None = None  # only while TRL makes a rollout batch
        self._rollout_place = (-1, 0)  # optimizer step of the last rollout, and place within it
        self._next_record_step = 0
        model = self.accelerator.unwrap_model(self.model)
        self.probe_layers = self.recipe.model_layers(model)

    def _check_contract(self) -> None:
        name, version = type(self).__name__, "tokenweights-trl is made for trl>=1.16,<1.17."
        if not isinstance(self.args, TokenWeightsGRPOConfig):
            got, hint = type(self.args).__name__, "Pass `TokenWeightsGRPOConfig(recipe=...)`."
            raise invalid(name, "args", "a TokenWeightsGRPOConfig", got, hint)
        for method, needed in CONTRACT.items():
            found = _parameters(getattr(super(), method, None))
            if not set(needed) <= set(found):
                condition = f"with {method}({', '.join(needed)})"
                raise invalid(name, "trl", condition, f"({', '.join(found)})", version)
        if self.args.use_liger_kernel and hasattr(self, "compute_liger_loss"):
            condition = "False where TRL then computes the loss elsewhere"
            raise invalid(name, "use_liger_kernel", condition, True, version)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not self.model.training:
            return super()._generate_and_score_completions(inputs)
        self._rollout = rollout = Rollout(self._planned_source())
        try:
            output = super()._generate_and_score_completions(inputs)
            scores = self._scores(rollout, output)
        finally:
            self._rollout = None
        if rollout.source != self.score_source and self.accelerator.is_main_process:
            level = logging.WARNING if rollout.source == "scoring_pass" else logging.INFO
            logger.log(level, "Token weights: %s.", SOURCES[rollout.source])
        self.score_source = rollout.source
        return self._weighted(output, scores)

    def _planned_source(self) -> str:
        if self.recipe.signal == "none":
            return "none"
        generate_every = self.args.steps_per_generation * self.num_iterations
        if self.args.gradient_accumulation_steps % generate_every != 0 or (
            self.use_vllm and self.vllm_importance_sampling_correction
        ):
            return "old_log_prob_pass"
        # A generation that once gave no scores is not tried again.
        readable = self.score_source != "scoring_pass" and self.recipe.alignment == "deciding"
        elsewhere = self.use_vllm or self.use_transformers_continuous_batching or self.rollout_func
        if not self.probe_layers or not readable or elsewhere or self.tools or self._is_vlm:
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
            recipe=self.recipe,
            layers=self.probe_layers,
            prompt_width=-(-int(lengths.max()) // multiple) * multiple,
        ) as scores:
            completions = super()._generate_single_turn(prompt_ids, *args, **kwargs)
        rollout.scores = scores
        return completions

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        arguments = (model, input_ids, attention_mask, logits_to_keep, *args)
        rollout = self._rollout
        if (
            rollout is None
            or rollout.source != "old_log_prob_pass"
            or rollout.scores is not None
            or model is not self.model
        ):
            return super()._get_per_token_logps_and_entropies(*arguments, **kwargs)
        outputs, rollout.scores = self._pass_with_scores(*arguments, **kwargs)
        rollout.log_probs = outputs[0]
        return outputs

    def _pass_with_scores(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Any, list[Tensor]]:
        """What TRL's pass returns, and the scores of each layer."""
        forward = super()._get_per_token_logps_and_entropies
        arguments = (model, input_ids, attention_mask, logits_to_keep, *args)
        require_positions(self.accelerator.unwrap_model(model), attention_mask.bool())
        if not self.probe_layers:
            outputs = forward(*arguments, **{**kwargs, "compute_entropy": True})
            return outputs, [outputs[1]]
        with forward_scores(
            self.accelerator.unwrap_model(model),
            attention_mask.bool(),
            recipe=self.recipe,
            layers=self.probe_layers,
            response_length=logits_to_keep,
        ) as scores:
            outputs = forward(*arguments, **kwargs)
        return outputs, scores

    def _scores(self, rollout: Rollout, output: dict[str, Any]) -> Tensor | None:
        if rollout.source == "none":
            return None
        scores = rollout.scores or []
        if rollout.source == "generation":
            missing = output["completion_ids"].shape[1] - (scores[0].shape[1] if scores else 0)
            # All ranks must agree: a scoring pass of a sharded model is collective.
            ranks = torch.tensor([missing], device=self.accelerator.device)
            most = int(self.accelerator.gather(ranks).max())
            complete = most < (self.pad_to_multiple_of or 1)
            scores = [torch.nn.functional.pad(layer, (0, missing)) for layer in scores]
        else:
            # With an adapter the reference pass runs the policy's modules; this tells them apart.
            log_probs = rollout.log_probs
            complete = log_probs is not None and output.get("old_per_token_logps") is log_probs
        if not complete:
            rollout.source, scores = "scoring_pass", self._scores_of_one_more_pass(output)
        return self.recipe.merged_layers(scores, _response_mask(output))

    def _scores_of_one_more_pass(self, output: dict[str, Any]) -> list[Tensor]:
        vision = _parameters(super()._get_per_token_logps_and_entropies)
        vision = vision[len(CONTRACT["_get_per_token_logps_and_entropies"]) :]
        with torch.no_grad():
            _, scores = self._pass_with_scores(
                self.model,
                torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1),
                torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1),
                output["completion_ids"].shape[1],
                batch_size=self.args.per_device_train_batch_size,
                **{name: output[name] for name in vision if name in output},
            )
        return scores

    def _weighted(self, output: dict[str, Any], scores: Tensor | None) -> dict[str, Any]:
        step, mask = self.state.global_step, _response_mask(output)
        group = torch.distributed.group.WORLD if torch.distributed.is_initialized() else None
        sample_ids = self._sample_ids(len(mask), mask.device)
        rollout = weighted_rollout(
            self.recipe,
            scores,
            mask,
            step=step,
            sample_ids=sample_ids,
            token_groups=output["completion_ids"],
            group=group,
        )
        if rollout.metrics:
            self._append_records(output, scores, rollout.weights, sample_ids)
        for name, value in rollout.metrics.items():
            self._metrics["train"][f"token_weights/{name}"].append(value)
        advantages = output["advantages"]
        advantages = advantages if advantages.dim() == 2 else advantages[:, None]
        output = {**output, "advantages": advantages * rollout.weights}
        if self.recipe.denominator != "all_tokens" and self.args.loss_type == "bnpo":
            output["token_weights"] = rollout.weights  # see `_compute_loss`
        else:
            output["advantages"] *= rollout.scale
        return output

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

    def _append_records(
        self, output: dict[str, Any], scores: Tensor | None, weights: Tensor, sample_ids: Tensor
    ) -> None:
        """Token records of the first prompt's responses, every `token_records_steps` steps."""
        step, path = self.state.global_step, self.args.token_records
        if path is None or scores is None or step < self._next_record_step:
            return
        self._next_record_step = step + self.args.token_records_steps
        rows = slice(0, self.num_generations)
        ids, mask = output["completion_ids"][rows], output["completion_mask"][rows]
        prompts, prompt_mask = output["prompt_ids"][rows], output["prompt_mask"][rows].bool()
        with torch.no_grad():  # on every rank: the forward pass of a sharded model is collective
            log_probs, entropies, *_ = super()._get_per_token_logps_and_entropies(
                self.model,
                torch.cat([prompts, ids], dim=1),
                torch.cat([prompt_mask, mask], dim=1),
                ids.shape[1],
                compute_entropy=True,
            )
        if not self.accelerator.is_main_process:
            return
        decode = self._tokenizer.decode
        advantages = output["advantages"][rows]
        records = token_records(
            scores[rows],
            mask.bool(),
            step=step,
            sample_ids=sample_ids[rows],
            prompts=[decode(row[real]) for row, real in zip(prompts, prompt_mask, strict=True)],
            token_ids=ids,
            decode=decode,
            weights=weights[rows],
            advantages=advantages if advantages.dim() == 2 else advantages[:, None],
            layer=self.probe_layers,
            entropy_kind=self.recipe.entropy_kind,
            alignment=self.recipe.alignment,
            predictive_entropy=entropies,
            log_probs=log_probs,
        )
        append_token_records(path, records)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if "token_weights" in inputs:
            # TRL divides by the tokens of this micro-batch on this rank, and so does the exchange.
            # Later iterations use the buffered dict again: it stays as it is.
            scale = self.recipe.denominator_scale(inputs["token_weights"], _response_mask(inputs))
            inputs = {**inputs, "advantages": inputs["advantages"] * scale}
        return super()._compute_loss(model, inputs)


class TokenWeightsGRPOTrainer(TokenWeightsMixin, GRPOTrainer):
    """`trl.GRPOTrainer` with the token weights of `args.recipe`; see `TokenWeightsMixin`."""


def _response_mask(batch: dict[str, Any]) -> Tensor:
    """The tokens TRL counts: those of the response, less what tools wrote."""
    return (batch["completion_mask"] * batch.get("tool_mask", 1)).bool()


def _parameters(method: Any) -> list[str]:
    return list(inspect.signature(method).parameters) if method is not None else []
