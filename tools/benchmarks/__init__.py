"""The measurements behind the figures: ours and a reference, in turns in one run, as ratios."""
