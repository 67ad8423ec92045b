"""Decoders: from what is known of a batch and who answered, to the weights of the results."""
