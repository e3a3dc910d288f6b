"""Benchmarks of dbp_kernels, run from a clone: ``python -m bench`` (see ``--help``).

registry.py and networks.py list the cases, rivals.py, more_rivals.py and published.py what they are
compared with, suites.py what each suite measures, bars.py the promises it is held to; device/ is the
check of a machine with a GPU; results/ holds committed runs.
"""
