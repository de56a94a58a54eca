"""Programs that nobody has read, run where they can do no harm: no network, no files of others, no further processes.

A program and the tests that judge it are two processes, both confined. Only plain values pass between them, so a
program can neither read its tests nor change what they compare.

`running.py` is the outside; the other modules run inside, in an interpreter without site-packages, and use nothing but
the standard library.
"""
