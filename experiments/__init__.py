"""Training comparisons of plain (BP) and decorrelated backpropagation (DBP).

Run ``python -m experiments train --preset demo``. The library itself never imports this package.
"""
