"""Counts passed, failed and skipped tests over the reports of all suites.

Fails if a test failed, if a suite left no report or ran no test.
"""

import sys
from pathlib import Path
from xml.etree import ElementTree


def main(folder: str, *suites: str) -> int:
    """Print the reasons of skips and the totals; return the exit status."""
    passed = failed = skipped = 0
    for suite in suites:
        report = Path(folder, f"{suite}.xml")
        cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
        if not cases:
            print(f"{suite}: no test ran")
            failed += 1
        for case in cases:
            skip = case.find("skipped")
            if case.find("failure") is not None or case.find("error") is not None:
                failed += 1
            elif skip is not None:
                skipped += 1
                print(f"skipped {case.get('classname')}.{case.get('name')}: {skip.get('message')}")
            else:
                passed += 1
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
