"""A resumed run continues the schedule, and its steps are those of an uninterrupted run."""

import tiny
import torch

from tokenweights_trl import TokenWeightsGRPOConfig, TokenWeightsGRPOTrainer

RECIPE = {"name": "low2high", "warmup_steps": 4}


def run(folder, resume=None, **changes):
    trainer = tiny.trainer(
        TokenWeightsGRPOTrainer,
        TokenWeightsGRPOConfig,
        folder,
        recipe=RECIPE,
        save_strategy="steps",
        save_steps=2,
        **changes,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_a_resumed_run_continues_the_schedule(tmp_path):
    whole = run(tmp_path / "whole", max_steps=4)
    resumed = run(
        tmp_path / "resumed", max_steps=4, resume=str(tmp_path / "whole" / "checkpoint-2")
    )
    steps = [entry for entry in whole.state.log_history if "loss" in entry]
    again = [entry for entry in resumed.state.log_history if "loss" in entry]
    assert [float(e["token_weights/endpoint_high"]) for e in steps] == [0.0, 0.25, 0.5, 0.75]
    timed = {"step_time"}
    for entry, other in zip(steps, again, strict=True):
        assert entry.keys() == other.keys()
        assert all(entry[name] == other[name] for name in entry.keys() - timed)
    pairs = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
