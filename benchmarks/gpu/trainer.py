"""Ten steps of TRL's trainer with the embedded policy, where what TRL needs was carried."""

import importlib.util
import itertools
import math
import statistics
import tempfile
import time

import torch
from step import Missing, Parts, Run

NEEDED = (
    "trl",
    "accelerate",
    "datasets",
    "pyarrow",
    "pandas",
    "tokenweights_lab",
    "tokenweights_trl",
)
PROMPTS, SAMPLES = 16, 8


def parts(run: Run) -> Parts:
    """Seconds of a step, generation, scores and update, and how many there were."""
    return {"ten steps": lambda: steps(run)}


def steps(run: Run) -> dict[str, float]:
    """Medians of all steps but the first, with every step's weights found to be finite."""
    absent = [name for name in NEEDED if not importlib.util.find_spec(name)]
    if absent:
        hint = "`make gpu-trainer-wheels` fills build/gpu/trainer-wheels, to be carried as well"
        raise Missing(f"not here: {', '.join(absent)}; {hint}")
    from datasets import Dataset
    from tokenweights_lab import load_policy, load_tokenizer, problems
    from tokenweights_trl import TokenWeightsGRPOConfig, TokenWeightsGRPOTrainer
    from transformers import TrainerCallback

    from tokenweights import boxed_match_reward

    ends = [time.perf_counter()]

    class Clock(TrainerCallback):
        def on_step_end(self, *arguments, **state) -> None:
            if run.device.type == "cuda":
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    def rewards(completions, answer, **_):
        return [boxed_match_reward(t, a) for t, a in zip(completions, answer, strict=True)]

    count, prompts, samples = (2, 2, 4) if run.toy else (10, PROMPTS, SAMPLES)
    drawn = problems("train", prompts * count, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        settings = TokenWeightsGRPOConfig(
            output_dir=folder,
            recipe="low2high",
            per_device_train_batch_size=prompts * samples,
            num_generations=samples,
            max_completion_length=16 if run.toy else 96,
            max_steps=count,
            use_cpu=run.device.type == "cpu",
            bf16=False,
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = TokenWeightsGRPOTrainer(
            model=load_policy(),
            processing_class=load_tokenizer(),
            reward_funcs=rewards,
            args=settings,
            train_dataset=Dataset.from_list(
                [{"prompt": one.prompt, "answer": one.answer} for one in drawn]
            ),
            callbacks=[Clock()],
        )
        ends[0] = time.perf_counter()
        trainer.train()
    means = [log["token_weights/weight_mean"] for log in trainer.state.log_history if "loss" in log]
    assert len(means) == count and all(map(math.isfinite, means)), means
    spent = [stop - start for start, stop in itertools.pairwise(ends)]
    return {"steps": count, "first": spent[0], "median": statistics.median(spent[1:])}
