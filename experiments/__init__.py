"""Training comparisons of plain (BP) and decorrelated backpropagation (DBP).

Run ``python -m experiments queue demo --here``. The library itself never imports this package.
"""
