"""What pools share whose machines may hang and die: processes, and the actors of Ray."""
