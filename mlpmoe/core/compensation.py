"""Compensation: how the kept branches make up for the dropped ones."""

from math import sqrt

# name -> α of every kept branch, from B (branches) and K (kept)
COMPENSATIONS = {
    # MLPMoE, section 3.3: preserves the variance of the sum of branches if their outputs are
    # uncorrelated with zero mean
    "sqrt": lambda branches, keep: sqrt(branches / keep),
    "none": lambda branches, keep: 1.0,
}
