"""What a run shows of itself: numbers, progress, the curve."""
