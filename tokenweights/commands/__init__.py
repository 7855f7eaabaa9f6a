"""The commands of `python -m tokenweights`, one file each: `inspect`, `report`, `compare`.

A command adds its arguments to a parser and runs with what was parsed. Heavy packages are imported
when a command runs, with a clear message if their extra is not installed.
"""
