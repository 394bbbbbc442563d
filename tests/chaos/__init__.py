"""What clusters do to jobs, done on purpose: every fault is inflicted on real runs of the command line.

``python -m chaos`` (in ``tests/``) inflicts all of them as often as the report says; the quick tests a few.
"""
