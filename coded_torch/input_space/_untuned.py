"""The constants of this package that were chosen once and not tuned."""

NOTHING = 1e-6  # directions that hold less of the variance are rounding
FLOOR = 1e-4  # the least eigenvalue of gradients, over the largest: all directions count a little
LEAST_ROWS = 8  # from which outputs are predicted by gradients
FAR = 8  # root mean squares from the centre: farther rows, whose results may be large, tell nothing
COLUMNS = 64  # outputs that judge estimates: their variance and trust are as exact as from all
# The variances of numbers that inputs do not explain, over the kernel's, that compete.
NOISES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
MEAN = 30.0  # the variance of the unknown mean, over the kernel's: large
CENTRES = 1024  # rows with a kernel of their own, as the time of the regression grows with the cube
TIGHTEST = 8  # calls by which the probability of a false alarm is least conservative
NOISE = 1e-3  # the variance of outputs that rows do not explain, over the kernel's
