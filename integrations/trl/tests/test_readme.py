"""The Python of the README runs."""

import re
from pathlib import Path

import tiny

README = Path(__file__).parent.parent / "README.md"


def test_the_first_example_trains(tmp_path, monkeypatch):
    (source,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    tiny.policy().save_pretrained("my/model")
    tiny.tokenizer().save_pretrained("my/model")
    settings = "use_cpu=True, bf16=False, max_steps=1, max_completion_length=6, report_to='none'"
    names: dict = {}
    exec(source.replace('recipe="low2high"', f'recipe="low2high", {settings}'), names)
    assert names["trainer"].state.global_step == 1
    assert names["trainer"].score_source == "generation"
