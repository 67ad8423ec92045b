"""The command ``coded-torch``."""
