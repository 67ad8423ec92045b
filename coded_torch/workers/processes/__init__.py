"""Processes as workers, and their supervision, which Ray actors share."""
