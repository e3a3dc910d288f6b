"""Checks of the kernels on the device they are to run on, where they can do no harm."""
