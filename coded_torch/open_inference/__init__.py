"""The Open Inference Protocol, version 2, from a client's side and from a server's side."""
