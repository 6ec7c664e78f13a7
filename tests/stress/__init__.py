"""The long versions of what docs/reliability.md promises: `bash run.sh stress`.

Each module breaks one thing on purpose, again and again. Its functions take a folder and how much to do, raise
AssertionError where a promise is broken, and return the figure that the docs quote. The normal tests
(tests/test_stress.py) call the same functions with less to do.
"""
