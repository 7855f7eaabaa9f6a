"""Trains the embedded policy with TRL under a token-weight recipe and writes a report.

python integrations/trl/examples/demo.py --steps 50 --recipe low2high --output runs/demo
"""

import argparse
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenweights import TokenWeightsError, boxed_match_reward, recipe
from tokenweights.recipes.rules import EndpointWeights
from tokenweights.report import (
    TokenRecord,
    append_metrics,
    dynamics_figure,
    inspected_records,
    learning_figure,
    read_metrics,
    run_report_html,
    weights_figure,
    write_run_json,
)
from tokenweights.report.rollouts import RolloutRecords
from tokenweights_lab import (
    MAX_COMPLETION_TOKENS,
    accuracy,
    load_policy,
    load_tokenizer,
    problems,
)
from tqdm import tqdm
from transformers import PrinterCallback, TrainerCallback
from transformers.utils.logging import disable_progress_bar

from tokenweights_trl import TokenWeightsGRPOConfig, TokenWeightsGRPOTrainer

PROMPTS, SAMPLES = 16, 8
RECORDED_PROMPTS = 4
LOCAL_WINDOW = 16  # tokens; responses have about sixty
FILES = ("metrics.jsonl", "evaluations.jsonl", "tokens.jsonl", "gradient.jsonl", "run.json")
FIGURES = {"learning": learning_figure, "dynamics": dynamics_figure, "weights": weights_figure}


class DemoTrainer(TokenWeightsGRPOTrainer):
    """Records several prompts, and what every recorded token attended to."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._seen: dict[Any, TokenRecord] = {}
        self._records = RolloutRecords(
            self.args.token_records,
            every=self.args.token_records_steps,
            prompts=RECORDED_PROMPTS,
            enriched=self._inspected,
        )

    def _inspected(self, record: TokenRecord) -> TokenRecord:
        """The record with the policy's attention; of a response that occurs twice, once read."""
        key = (record.step, record.prompt, record.token_ids)
        if key not in self._seen:
            model, tokenizer = self.accelerator.unwrap_model(self.model), self.processing_class
            prompt = tokenizer(record.prompt)["input_ids"]
            training = model.training
            ids = torch.tensor([*prompt, *record.token_ids], device=model.device)
            (found,) = inspected_records(
                model.eval(),
                ids,
                prompt_length=len(prompt),
                decode=tokenizer.decode,
                layers=self.recipe.layers,
                entropy_kind=record.entropy_kind,
                alignment=record.alignment,
                local_window=LOCAL_WINDOW,
            )
            model.train(training)
            self._seen[key] = found
        found = self._seen[key]
        return replace(
            record,
            columns=found.columns,
            prompt_tokens=found.prompt_tokens,
            attended=found.attended,
            attended_weights=found.attended_weights,
        )


class Progress(TrainerCallback):
    """A progress bar with reward, length and weights."""

    def __init__(self, steps: int):
        self.bar = tqdm(total=steps, desc="training", unit="step")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Show what TRL logged for a step."""
        if not logs or "reward" not in logs:
            return
        shown = {
            "reward": logs["reward"],
            "length": logs["completions/mean_length"],
            "mean weight": logs.get("token_weights/weight_mean", 1.0),
        }
        self.bar.set_postfix({name: f"{value:.2f}" for name, value in shown.items()})
        self.bar.update(state.global_step - self.bar.n)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Close the bar."""
        self.bar.close()


def main() -> int:
    """Evaluate, train, evaluate, and say where the report is."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    disable_progress_bar()
    options = _options()
    folder = Path(options.output)
    _fresh(folder)
    torch.manual_seed(options.seed)
    model, tokenizer = load_policy(), load_tokenizer()
    made = options.recipe

    def evaluate(step: int) -> dict[str, float]:
        scores = {"step": step, "samples": SAMPLES, "prompts": options.held_out}
        for split in ("easy", "hard"):
            held_out = problems(split, options.held_out, seed=1)
            result = accuracy(model, tokenizer, held_out, samples=SAMPLES)
            scores[f"accuracy/{split}"] = result.mean_at_k
        append_metrics(folder / "evaluations.jsonl", scores)
        return scores

    class Evaluations(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            """Evaluate on the way, every 20 steps."""
            if state.global_step % 20 == 0 and state.global_step < options.steps:
                evaluate(state.global_step)

    arguments = _arguments(options, folder)
    write_run_json(
        arguments,
        trainer="trl",
        model=f"lab, a Qwen3 of {sum(p.numel() for p in model.parameters()):,} parameters",
        data="running total",
        seed=options.seed,
        recipe=made.on_model(model),
        settings={
            "loss": "DAPO, clip 0.2 / 0.28, no KL",
            "batch": f"{PROMPTS} prompts x {SAMPLES} responses",
            "steps": options.steps,
        },
    )
    print("evaluating the warm-started policy on held-out prompts")
    before = evaluate(0)
    progress = Progress(options.steps)
    trainer = DemoTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=_rewards,
        args=arguments,
        train_dataset=_prompts(options),
        callbacks=[progress, Evaluations()],
    )
    trainer.remove_callback(PrinterCallback)
    interrupted = False
    try:
        trainer.train()
    except KeyboardInterrupt:
        interrupted = True
        progress.bar.close()
        print("interrupted: reporting what there is")
    step = trainer.state.global_step
    after = evaluate(step)
    _write_report(folder)
    _print_summary(folder, before, after)
    return 130 if interrupted else 0


def _rewards(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    return [
        boxed_match_reward(text, right) for text, right in zip(completions, answer, strict=True)
    ]


def _prompts(options: argparse.Namespace) -> Dataset:
    drawn = problems("train", PROMPTS * options.steps, seed=options.seed)
    return Dataset.from_list([{"prompt": p.prompt, "answer": p.answer} for p in drawn])


def _arguments(options: argparse.Namespace, folder: Path) -> TokenWeightsGRPOConfig:
    return TokenWeightsGRPOConfig(
        output_dir=str(folder / "trainer"),
        recipe=options.recipe.to_dict(),
        metrics_file=str(folder / "metrics.jsonl"),
        token_records=str(folder / "tokens.jsonl") if options.records else None,
        token_records_steps=max(1, (options.steps - 1) // 4),
        gradient_probe_steps=max(1, options.steps // 5) if options.records else None,
        gradient_probe_file=str(folder / "gradient.jsonl") if options.records else None,
        loss_type="dapo",
        per_device_train_batch_size=PROMPTS * SAMPLES,
        num_generations=SAMPLES,
        max_completion_length=MAX_COMPLETION_TOKENS,
        max_steps=options.steps,
        learning_rate=5e-5,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=min(5, options.steps),
        epsilon=0.2,
        epsilon_high=0.28,
        beta=0.0,
        temperature=1.0,
        top_p=0.95,
        top_k=0,
        seed=options.seed,
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        log_level="error",
    )


def _write_report(folder: Path) -> None:
    metrics = read_metrics(folder / "metrics.jsonl")
    evaluations = read_metrics(folder / "evaluations.jsonl")
    for name, draw in FIGURES.items():
        figure = draw(metrics, evaluations) if name == "learning" else draw(metrics)
        figure.savefig(folder / f"{name}.png", dpi=150)
    (folder / "report.html").write_text(run_report_html(folder), encoding="utf-8")


def _print_summary(folder: Path, before: dict[str, float], after: dict[str, float]) -> None:
    print(f"\nheld-out mean@{SAMPLES}     before   after")
    for split in ("easy", "hard"):
        key = f"accuracy/{split}"
        print(f"  {split:<15} {before[key]:8.3f} {after[key]:7.3f}")
    print(f"\nopen   {folder / 'report.html'}")
    written = [name for name in FILES if (folder / name).is_file()]
    print(f"also   {', '.join([*(f'{name}.png' for name in FIGURES), *written])}")


def _fresh(folder: Path) -> None:
    """An output folder without the files of an earlier run, which would be appended to."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*FILES, "report.html", *(f"{name}.png" for name in FIGURES)):
        (folder / name).unlink(missing_ok=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50, help="optimizer steps")
    parser.add_argument("--recipe", default="low2high", help="name of a recipe")
    parser.add_argument("--output", default="runs/demo", help="folder of the run")
    parser.add_argument("--held-out", type=int, default=48, help="held-out prompts of each split")
    parser.add_argument("--seed", type=int, default=0, help="seed of prompts and sampling")
    options = parser.parse_args()
    if options.steps < 1 or options.held_out < 1:
        parser.error("--steps and --held-out must be at least 1")
    try:
        options.recipe = recipe(options.recipe)
        if isinstance(options.recipe.rule, EndpointWeights):
            # The whole schedule fits into the first half of the run.
            half = max(1, options.steps // 2)
            options.recipe = recipe(options.recipe.to_dict() | {"warmup_steps": half})
    except TokenWeightsError as error:
        parser.error(str(error))
    options.records = options.recipe.attention is not None
    return options


if __name__ == "__main__":
    sys.exit(main())
