"""Which parts are asked for, when, and when a call ends."""
