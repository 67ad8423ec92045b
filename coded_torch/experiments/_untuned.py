"""The constants of this package that were chosen once and not tuned."""

# The policies that are tried, in steps of a factor of two or four.
PARTS = (1, 2, 4, 8)  # the numbers of parts of a request
BUDGETS = (0.05, 0.25, 1.0)  # hedging budgets: scarce, the default, and a whole call
SHARES = (0.5, 0.7, 0.9)  # shares of the deadline after which missing rows are estimated
