"""Benchmarks of dbp_kernels, run from a clone: ``python -m bench`` (see ``--help``).

registry.py lists the cases, rivals.py and published.py what they are compared with, bars.py the
promises they are held to; results/ holds committed runs.
"""
