"""Find workers that return wrong results: a few rows are computed twice."""
