"""Benchmarks of dbp_kernels, run from a clone: ``python -m bench`` (see ``--help``).

core/ is what every measurement uses: registry.py and networks.py list the cases, bars.py the promises
they are held to, report.py says what came of it. rivals/ is what we are compared with. A file of
suites/ owns what a suite runs, its table and its plot; suites/__init__.py lists them. device/ is the
check of a machine with a GPU; results/ holds committed runs.
"""
