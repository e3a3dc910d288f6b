"""Integers and seconds, no tensors: what is to be computed by which algorithm, and why."""
