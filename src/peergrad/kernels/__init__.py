"""Log probability and entropy of given tokens, forward and backward, as few passes as it takes."""
