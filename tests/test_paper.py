"""The paper's experiments at small scale: records, statistics, resuming, and the page they make."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("tokenweights_lab")

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))  # last: its folders have the names of some of ours

from paper import arms, claims, collapse, comparison, data, records, report, rules, running  # noqa: E402
from paper.tasks import TASKS, text_of, token_ids  # noqa: E402
from paper.training import SETTINGS, Weigher, rolled_out, task_of  # noqa: E402
from paper.warm_start import NAMES, warm_started  # noqa: E402

QUICK = replace(SETTINGS["votes"], steps=2, prompts=2, problems=4, attempts=2, evaluated=(1, 2))


def test_the_page_is_what_the_records_say():
    assert report.RESULTS.read_text() == report.results(records.FOLDER)


def test_every_record_carries_what_it_was_made_with():
    for record in records.read():
        assert {"seed", "commit", "versions", "status", "key"} <= set(record)
        if record["status"] == "finished" and record["arm"] != running.FIRST:
            assert {"settings", "recipe", "cpu_seconds", "warm_start_digest"} <= set(record)


def test_no_verdict_of_the_page_goes_beyond_its_words():
    allowed = {"holds here", "does not hold here", "not resolved", claims.NOT_RUN}
    found = data.data_of(records.FOLDER)
    for name in data.WARM_STARTS:
        for verdict in claims.verdicts(found, name):
            assert verdict.kind in allowed
            if verdict.kind != claims.NOT_RUN and not verdict.claim.counted:
                assert verdict.found.count >= claims.PAIRS or "pairs)" in verdict.words


@pytest.fixture
def items():
    return [records.Item("votes-0", arm, 0) for arm in ("full", "anchor20", "random20")]


def run(items, folder):
    return running.run_all(
        items, folder=folder, settings=lambda item: QUICK, locks=folder / "running"
    )


def test_an_interrupted_queue_goes_on(tmp_path, items, monkeypatch):
    real = running.measured

    def interrupted(item, settings):
        if item.arm == "anchor20":
            raise KeyboardInterrupt
        return real(item, settings)

    monkeypatch.setattr(running, "measured", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(items, tmp_path)
    # The record that was being written is cut off.
    path = tmp_path / "votes-0.jsonl"
    path.write_text(path.read_text() + '{"arm": "anchor20", "se')
    monkeypatch.setattr(running, "measured", real)
    assert run(items, tmp_path) == 2
    assert [record["arm"] for record in records.read(tmp_path)] == ["full", "anchor20", "random20"]
    assert run(items, tmp_path) == 0


def test_a_failed_run_is_recorded_and_stops_no_other(tmp_path, items, monkeypatch):
    real = running.measured

    def broken(item, settings):
        if item.arm == "full":
            raise ValueError("no luck")
        return real(item, settings)

    monkeypatch.setattr(running, "measured", broken)
    assert run(items, tmp_path) == 3
    first, *others = records.read(tmp_path)
    assert first["status"] == "failed" and "no luck" in first["error"]
    assert all(record["status"] == "finished" for record in others)
    assert len(data.data_of(tmp_path, every=True).failed) == 1


def test_what_another_process_runs_is_left_to_it(tmp_path, items):
    lock = tmp_path / "running" / running.item_key(items[0], QUICK)
    holder = f"""
import fcntl, pathlib, sys
path = pathlib.Path({str(lock)!r})
path.parent.mkdir()
file = path.open("a")
fcntl.flock(file, fcntl.LOCK_EX)
print("locked", flush=True)
sys.stdin.read()
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", holder], **pipes) as other:
        assert other.stdout.readline() == b"locked\n"
        assert run(items, tmp_path) == 2
        other.kill()  # without a word, as a crash would
    assert run(items, tmp_path) == 1


def test_the_same_seed_gives_the_same_run(tmp_path):
    item = records.Item("votes-0", "low2high", 1)
    first, second = (running.measured(item, QUICK) for _ in range(2))
    first.pop("cpu_seconds"), second.pop("cpu_seconds")
    assert first == second
    json.dumps(first, allow_nan=False)


@pytest.mark.parametrize(
    "name", ["full", "alignment top20", "adaptive low2high", "preplan_anchor40"]
)
def test_arms_weigh_with_mean_one(name):
    arm = arms.ARMS[name]
    policy, task = warm_started("votes-0"), TASKS["votes"]
    step = rolled_out(policy, task, SETTINGS["votes"], 0, seed=0, layers=range(4), entropy=True)
    weights = Weigher(policy, arm, task.probe, 24)(step)
    assert weights[step.rollout.mask].mean() == pytest.approx(1, abs=1e-3)
    assert not weights[~step.rollout.mask].any()


def test_the_untrained_policy_is_evaluated_and_no_more():
    item = records.Item("votes-0", arms.UNTRAINED.name, 0)
    settings = records.settings_of(item)
    assert settings.steps == 0 and settings.problems == SETTINGS["votes"].problems
    found = running.measured(item, replace(settings, problems=4, attempts=2))
    assert [set(each) for each in found["evaluations"]] == [{"step", "hard", "easy", "hard_whole"}]
    assert not any(found["history"].values()) and not collapse.collapse(found["history"])


def test_alignment_leaves_the_policy_as_it_is():
    policy, task = warm_started("votes-0"), TASKS["votes"]
    before = [weight.detach().clone() for weight in policy.parameters]
    step = rolled_out(policy, task, SETTINGS["votes"], 0, seed=0)
    Weigher(policy, arms.ARMS["alignment top20"], task.probe, 24)(step)
    pairs = zip(policy.parameters, before, strict=True)
    assert all(torch.equal(now, then) for now, then in pairs)


def test_the_design_is_of_its_size():
    items = running.design()
    assert len(set(items)) == len(items) <= 920
    names = {item.arm for item in items} - {running.FIRST}
    assert names <= set(arms.ARMS) and {item.warm_start for item in items} == set(NAMES)
    assert sum(item.arm == "explorer20" and item.warm_start == "totals-0" for item in items) == 8


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("split", ["train", "easy", "hard"])
def test_solutions_are_right_and_every_token_has_a_role(name, split):
    task = TASKS[name]
    for question in task.questions(split, 20, seed=3):
        assert task.reward(question.solution, question.answer) == 1
        assert text_of(token_ids(question.solution)) == question.solution
        roles = task.roles(question.solution)
        assert len(roles) == len(question.solution) + 1 <= task.longest
        assert set(task.decisive) & set(roles)
        assert task.reward("", question.answer) == -2


def test_votes_by_hand():
    (question,) = TASKS["votes"].questions("easy", 1, seed=0)
    signs = question.prompt.partition("?")[2].rstrip(">")
    assert question.answer == max("+-", key=signs.count)
    assert question.solution[-2:] == f"={question.answer}"


def test_tripled_totals_by_hand():
    for question in TASKS["tripled"].questions("train", 20, seed=0):
        terms, start = question.prompt.rstrip(">").split("?")
        total = int(start)
        for term in (terms[at : at + 3] for at in range(0, len(terms), 3)):
            total = (3 * total + int(term[1:])) % 10
        assert question.answer == str(total)


def test_roles_by_hand():
    text = r"a-0=6b-8c+1=9\boxed{69}"
    roles = task_of("totals-0").roles(text)
    assert [roles[at] for at in (0, 1, 2, 3, 4)] == [
        "label",
        "sign",
        "copied digit",
        "choice",
        "total",
    ]
    assert roles[text.index("c")] == "choice"  # the merge
    assert roles[text.index("9")] == "total after merge"
    assert roles[-1] == roles[text.index("\\") + 1] == "box"


def test_differences_by_hand():
    found = comparison.paired([0.1, 0.2, 0.3, 0.2, 0.2])
    assert found.mean == pytest.approx(0.2) and found.count == 5
    # t = 0.2 / (sqrt(0.005) / sqrt(5)) = 6.3246; the distribution's tail at 4 degrees, by its
    # closed form 1 - (3/2 s - 1/2 s^3) with s = t / sqrt(4 + t^2).
    s = 6.324555 / math.sqrt(4 + 40)
    assert found.p == pytest.approx(1 - (1.5 * s - 0.5 * s**3), abs=1e-6)
    assert 0.1 <= found.low < 0.2 < found.high <= 0.3
    assert comparison.paired([0.5]).p == 1.0
    assert comparison.paired([0.5] * 5).p == 0.0 and comparison.paired([0.5] * 5).constant
    assert not found.constant and found.reach == pytest.approx(
        2.7764 * math.sqrt(0.005 / 5), rel=1e-4
    )


@pytest.mark.parametrize(
    ("t", "freedom", "expected"),
    # From printed tables of the distribution.
    [(12.706, 1, 0.05), (4.303, 2, 0.05), (3.182, 3, 0.05), (2.776, 4, 0.05), (2.365, 7, 0.05),
     (3.355, 8, 0.01)],
)  # fmt: skip
def test_tails_of_t_from_tables(t, freedom, expected):
    assert comparison.t_tail(t, freedom) == pytest.approx(expected, abs=5e-5)


def test_holm_by_hand():
    assert comparison.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert comparison.holm([]) == []


def test_fisher_by_hand():
    # 3 of 3 against 0 of 3: one of the 20 ways.
    assert comparison.fisher_greater(3, 3, 0, 3) == pytest.approx(1 / 20)
    assert comparison.fisher_greater(0, 5, 0, 5) == 1.0


def test_ranks_by_hand():
    assert comparison.rank_correlation([1, 2, 3], [10, 20, 30]) == pytest.approx(1)
    assert comparison.rank_correlation([1, 2, 3], [3, 2, 2]) == pytest.approx(-math.sqrt(3) / 2)


def test_verdicts_by_hand():
    claim = claims.CLAIMS[1]
    up = comparison.paired([0.1, 0.12, 0.11, 0.09, 0.1])
    assert claims.words_of(claim, up, 0.01).startswith("holds here")
    # The mean 0.104 less and more 2.776 times 0.0114 / sqrt(5).
    assert claims.words_of(claim, up, 0.2) == "not resolved (+0.090 to +0.118, p 0.200)"
    down = comparison.paired([-0.1, -0.12, -0.11, -0.09, -0.1])
    assert claims.words_of(claim, down, 0.01).startswith("does not hold here")
    assert claims.words_of(claim, down, 1e-5).endswith("p < 0.001)")
    same = comparison.paired([0.25, 0.2501, 0.25, 0.25, 0.25])
    assert claims.words_of(claim, same, 0.01) == "holds here (+0.250 in all runs)"


def test_claims_with_bounds_by_hand():
    alike = replace(claims.CLAIMS[1], bounds=claims.ALIKE)
    near = comparison.paired([0.01, 0.0, 0.02, 0.01, 0.01])
    far = comparison.paired([0.1, 0.12, 0.11, 0.09, 0.1])
    between = comparison.paired([0.04, 0.06, 0.05, 0.03, 0.05])
    assert claims.words_of(alike, near, 1.0).startswith("holds here")
    assert claims.words_of(alike, far, 1.0).startswith("does not hold here")
    assert claims.words_of(alike, between, 1.0).startswith("not resolved")
    no_gain = replace(alike, bounds=claims.NO_GAIN)
    loss = comparison.paired([-0.1, -0.12, -0.11, -0.09, -0.1])
    assert claims.words_of(no_gain, loss, 1.0).startswith("holds here")
    assert claims.words_of(no_gain, far, 1.0).startswith("does not hold here")


def runs_of(**arms):
    """Runs of one warm start with these hard accuracies, and histories in which none collapses."""
    history = {"length": [9.0] * 8, "reward": [0.0] * 8, "unboxed": [0.0] * 8}
    made = data.Data()
    made.runs["totals-0"] = {
        arm: {
            seed: {"evaluations": [{"hard": value, "easy": 1.0}], "history": dict(history)}
            for seed, value in enumerate(values)
        }
        for arm, values in arms.items()
    }
    return made


def test_only_runs_that_do_not_collapse_survive():
    found = runs_of(explorer20=[0.5, 0.25, 0.75], full=[0.25, 0.25, 0.5])
    measured = claims.Survivors("explorer20", "full")
    assert measured(found, "totals-0") == [0.25, 0.0, 0.25]
    found.runs["totals-0"]["explorer20"][0]["history"]["length"] = [9.0] * 4 + [1.0] * 4
    assert measured(found, "totals-0") == [0.0, 0.25]


def test_a_claim_of_several_arms_by_hand():
    found = runs_of(a=[0.5, 0.25], b=[0.25, 0.25, 0.75], c=[0.0, 0.5])
    measured = claims.Several(("a", "b", "c"), lambda a, b, c: a - max(b, c))
    assert measured(found, "totals-0") == [0.25, -0.25]
    assert measured.arms == {"a", "b", "c"}


def test_nothing_refutes_a_claim_of_collapses_by_staying_whole():
    found = runs_of(explorer20=[0.5] * 8, full=[0.5] * 5)
    words = claims.counted_words(found, "totals-0", ("explorer20", "full"))
    # 0.05 = (1 - rate) ** 8
    assert words == "not resolved (0 of 8 against 0 of 5; rates above 0.31 are excluded)"


def test_the_gain_that_is_kept_by_hand():
    found = runs_of(random20=[0.3, 0.5], full=[0.4, 0.6], untrained=[0.2, 0.4])
    assert report.gain_kept(found, "totals-0", "random20") == pytest.approx(0.5)
    assert report.gain_kept(found, "totals-0", "untrained") is None


def test_a_rule_that_never_acts_is_no_test():
    names = [arm.name for arm in arms.FIELD[:2]]
    acts = [0.3, 0.2, 0.4, 0.3, 0.3]
    found = runs_of(full=[0.5] * 5, **{names[0]: [0.5] * 5, names[1]: acts})
    idle, other = rules.judged(found, "totals-0")
    assert idle.words == "never acted here" and idle.p is None
    assert other.words == rules.WORSE
    assert other.p == other.found.p  # the only test of the family


def test_the_time_that_runs_took_by_hand():
    spans = [("10:00", 3600), ("10:30", 3600), ("10:10", 60), ("13:00", 1800)]
    found = [{"started": f"2026-01-01T{at}:00+00:00", "wall_seconds": s} for at, s in spans]
    shown = report.wall([*found, {"wall_seconds": 5.0}])
    assert shown == "Runs were under way for 2.00 hours (4 of 5 records say when)."


def test_collapses_by_hand():
    steady = {"length": [10.0] * 8, "reward": [0.0] * 8, "unboxed": [0.0] * 8}
    assert collapse.collapse(steady) == ""
    assert collapse.collapse({**steady, "length": [10.0] * 4 + [5.0] * 4}) == "short responses"
    assert collapse.collapse({**steady, "length": [10.0] * 4 + [17.0] * 4}) == "long responses"
    assert collapse.collapse({**steady, "unboxed": [0.0] * 4 + [0.6] * 4}) == "no answers"
    assert collapse.collapse({**steady, "reward": [0.0] * 4 + [-0.4] * 4}) == "reward fell"


def through(arm="low2high", seed=1, **changes):
    return records.Item("votes-0", arm, seed, engine="trl", **changes)


def test_a_run_through_trl_has_the_record_of_the_same_run(tmp_path):
    pytest.importorskip("tokenweights_trl")
    item = records.Item("votes-0", "low2high", 1)
    assert run([item, through()], tmp_path) == 2
    assert run([item, through()], tmp_path) == 0
    own, its = records.read(tmp_path)
    if own.get("engine") == "trl":
        own, its = its, own
    assert its["engine"] == "trl" and "engine" not in own and its["key"] != own["key"]
    assert own["status"] == its["status"] == "finished"
    assert set(own) - {"roles"} == set(its) - {"engine"}
    for name in ("settings", "recipe", "seed", "warm_start_digest"):
        assert own[name] == its[name]
    assert [set(each) for each in own["evaluations"]] == [set(each) for each in its["evaluations"]]
    for name, values in own["history"].items():
        assert len(its["history"][name]) == len(values) == QUICK.steps
    assert "trl" in its["versions"] and (tmp_path / "trl.jsonl").exists()


@pytest.mark.filterwarnings("ignore::FutureWarning")  # `train` leaves them out itself
def test_trl_asks_what_the_engine_asks_and_warms_up_alike(tmp_path):
    pytest.importorskip("tokenweights_trl")
    from paper import through_trl
    from tokenweights_lab import load_policy, load_tokenizer

    policy, task = warm_started("votes-0"), TASKS["votes"]
    made = (load_policy(), task, arms.ARMS["full"], 3, QUICK, str(tmp_path))
    trainer, notes = through_trl.trainer_of(*made)
    wanted = [
        [question.prompt for question in step.asked for _ in range(QUICK.samples)]
        for step in (rolled_out(policy, task, QUICK, n, seed=3) for n in range(QUICK.steps))
    ]
    batches = [[row["prompt"] for row in batch] for batch in trainer.get_train_dataloader()]
    assert batches == wanted
    first = wanted[0]
    assert load_tokenizer()(first).input_ids == [token_ids(prompt) for prompt in first]
    rates = []
    for _ in range(4):
        rates += trainer.lr_scheduler.get_last_lr()
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert rates == pytest.approx([QUICK.rate * part for part in (1 / 3, 2 / 3, 1, 1)])
    with pytest.raises(ValueError, match="other prompts"):
        notes.rewards(prompts=wanted[1], completion_ids=[[1]] * len(first))


def test_runs_through_trl_are_skipped_where_it_is_not_installed(tmp_path, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "paper.through_trl", raising=False)
    monkeypatch.setitem(sys.modules, "tokenweights_trl", None)
    assert run([through(), records.Item("votes-0", "full", 1)], tmp_path) == 1
    assert [record["arm"] for record in records.read(tmp_path)] == ["full"]
    said = capsys.readouterr().err
    assert "skipped: low2high 1 through TRL" in said and "tokenweights_trl" in said


def written(folder, arm, seed, hard, **more):
    """A record that was not measured, of a run that took two steps."""
    item = records.Item("totals-0", arm, seed, **more)
    history = {"reward": [0.0, 2 * hard], "length": [40.0, 50.0]}
    record = {**item.values(), "key": f"{arm} {seed} {more}", "status": "finished"}
    record |= {"history": history, "evaluations": [{"hard": hard}]}
    records.append(record, folder / item.file)


def test_runs_through_trl_enter_no_comparison_of_arms(tmp_path):
    written(tmp_path, "full", 0, 0.5)
    written(tmp_path, "full", 0, 0.9, engine="trl")
    written(tmp_path, "anchor20", 0, 0.75)
    written(tmp_path, "anchor20", 1, 0.9, engine="trl")
    found = data.data_of(tmp_path, every=True)
    assert found.values("totals-0", "full", data.hard) == {0: 0.5}
    assert found.differences("totals-0", "anchor20", "full", data.hard) == [0.25]
    assert found.trl["totals-0"]["anchor20"].keys() == {1}


def test_the_table_of_both_engines_by_hand(tmp_path):
    for seed, hard in enumerate([0.4, 0.5, 0.5, 0.5, 0.6]):
        written(tmp_path, "full", seed, hard)
        written(tmp_path, "anchor20", seed, hard)
        if seed < 3:
            written(tmp_path, "full", seed, hard + 0.1, engine="trl")
            written(tmp_path, "anchor20", seed, hard + 0.4, engine="trl")
    lines = report.engines_table(data.data_of(tmp_path, every=True))
    # Means 0.5667 and 0.5; variances of the means 0.01/9 and 0.005/5; degrees of freedom
    # 0.002111^2 / (0.001111^2/2 + 0.001^2/4) = 5.14, so t = 2.571 and the reach is 0.1181.
    assert "| full | hard at the end | 0.567 ± 0.058 | 0.500 ± 0.071 |" in lines[2]
    assert lines[2].endswith("| +0.067 (-0.051 to +0.185) | agrees | +0.100, +0.100, +0.100 |")
    assert "| +0.067 (-0.051 to +0.185) | agrees |" in lines[3]
    assert "| 45.000 ± 0.000 | 45.000 ± 0.000 | +0.000 (+0.000 to +0.000) | agrees |" in lines[4]
    assert "| +0.367 (+0.249 to +0.485) | differs |" in lines[5]
    missing = "not compared yet (0 of 3 runs through TRL, 0 of 5 runs of the engine)"
    assert f"| low2high | hard at the end | - | - | - | {missing} | - |" in lines


def test_notes_figures_and_the_quick_form_are_of_tables_that_there_are():
    assert {*report.NOTES, *report.FIGURES, *report.QUICK} <= set(report.TABLES)


def test_the_quick_form_runs_and_says_that_it_is_one():
    before = {path: path.read_bytes() for path in records.FOLDER.glob("*")}
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks/paper", "run", "--quick"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    page = done.stdout
    assert "Smoke only, no verdicts." in page and "15 of " in page and "0 of them failed" in page
    assert "holds here" not in page and "not resolved" not in page
    assert {path: path.read_bytes() for path in records.FOLDER.glob("*")} == before
