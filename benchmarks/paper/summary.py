"""What the tables say, in a few lines: which claims hold where, and why."""

from collections.abc import Iterable

from paper.claims import CLAIMS, verdicts
from paper.data import WARM_STARTS, Data, hard
from paper.rules import BETTER, WORSE, Judged, judged
from paper.tables import head, number, row
from paper.training import task_of

HOLDS, FAILS, OPEN = "holds here", "does not hold here", "not resolved"


def summary(data: Data) -> list[str]:
    """A list of the claims by what became of them, of the rules, and a table that explains it."""
    columns = {name: verdicts(data, name) for name in WARM_STARTS}
    rules = {name: judged(data, name) for name in WARM_STARTS}
    lists: dict[str, list[str]] = {
        "Hold on every warm start that tested them": [],
        "Hold on some, and are not resolved on the others": [],
        "Hold on some, and do not on others": [],
        "Do not hold where they are resolved": [],
        "Resolved nowhere": [],
    }
    every, some, mixed, failed, nowhere = lists.values()
    for place, claim in enumerate(CLAIMS):
        kinds = {name: column[place].kind for name, column in columns.items()}
        holds, fails, unclear = (
            [name for name, kind in kinds.items() if kind == each] for each in (HOLDS, FAILS, OPEN)
        )
        said = f"*{claim.name}*"
        if holds and fails:
            mixed.append(f"{said} ({', '.join(holds)}; not {', '.join(fails)})")
        elif holds:
            (some if unclear else every).append(f"{said} ({', '.join(holds)})")
        elif fails:
            failed.append(f"{said} ({', '.join(fails)})")
        else:
            nowhere.append(said)
    return [
        *(_line(title, claims) for title, claims in lists.items()),
        _line("Rules better than uniform weights at equal mass", _with(BETTER, rules)),
        _line("Rules worse than uniform weights", _with(WORSE, rules)),
        "",
        "Why: which fifth trains is decided by where the decisive tokens fall, and that differs "
        "from task to task.",
        "",
        *_why(data),
    ]


def _line(title: str, parts: Iterable[str]) -> str:
    return f"- **{title}**: {'; '.join(parts) or 'none'}."


def _why(data: Data) -> list[str]:
    """Shares of decisive tokens by group beside what training on the group gives."""
    arms = ("full", "anchor20", "explorer20", "low2high")
    lines = head(
        "warm start", "decisive among all", "among anchors", "among explorers",
        *(f"hard: {arm}" for arm in arms),
    )  # fmt: skip
    for name in WARM_STARTS:
        tables = [record["first"]["table"] for record in data.first.get(name, {}).values()]
        if not tables:
            continue
        shares = [
            sum(table.get(role, {}).get(group) or 0.0 for table in tables
                for role in task_of(name).decisive) / len(tables)
            for group in ("tokens", "anchors", "explorers")
        ]  # fmt: skip
        values = [list(data.values(name, arm, hard).values()) for arm in arms]
        means = [sum(each) / len(each) if each else None for each in values]
        cells = [number(share, 2) for share in shares] + [number(mean) for mean in means]
        lines.append(row(name, *cells))
    return lines


def _with(words: str, rules: dict[str, list[Judged]]) -> list[str]:
    """The rules with a verdict, by warm start, among all that were compared."""
    said = []
    for name, every in rules.items():
        chosen = [f"`{each.rule}`" for each in every if each.words == words]
        if chosen:
            said.append(f"{name}, {len(chosen)} of {len(every)}: {', '.join(chosen)}")
    return said
