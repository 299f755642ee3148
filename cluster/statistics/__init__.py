"""Statistics of rollouts: pure functions of counts, with NumPy and SciPy. They have no state and read nothing.

All tests are anytime-valid: their error rate holds although the counts are looked at every second. `plan` divides the
errors, `judge` gives the verdict, and the other modules have one test each. `docs/statistics.md` has the measured error
rates and power.
"""
