"""
Controls: training that shares something with PROMA and lacks the rest, to learn which of the two matters.

- [`RandomDirectionsTrainer`]: PROMA's projection, along the directions of other sequences than the microbatch's;
- [`MatchedLengthTrainer`]: REINFORCE's direction, with the length of PROMA's parameter updates.
"""

from .matched_length import MatchedLengthTrainer
from .random_directions import RandomDirections, RandomDirectionsTrainer

__all__ = ["MatchedLengthTrainer", "RandomDirections", "RandomDirectionsTrainer"]
