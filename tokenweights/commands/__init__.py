"""The commands of `tokenweights`, one file each, and what they share.

A command adds its arguments to a parser and runs with what was parsed. Heavy packages are imported
when a command runs, with a clear message if their extra is not installed.
"""
