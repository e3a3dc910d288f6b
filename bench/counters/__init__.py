"""``python -m bench counters``: what a profiler would count of every kernel, by simulation."""
