"""A run as a process: what was asked for, where it lives, how it ends."""
