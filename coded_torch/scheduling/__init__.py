"""The policy that asks for parts, hedges late ones and ends a call, and its simulation."""
