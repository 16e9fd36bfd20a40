"""The objective: terms as objects, one registry, and their weighted sum.

One file per term, named as the term is in the logs (``con.py`` is L_con). ``registry`` lists them,
``total`` adds them up, ``term`` says what a term consists of. Nothing here talks to other ranks: a
term sees this rank's rows and the gathered columns, and what it merges over ranks comes in as an
object (``ranks``). The formulas are in ``dalr_kernels``; DALR, arXiv 2506.21096.
"""
