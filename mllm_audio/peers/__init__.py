"""Other text-to-audio systems on the same captions: sounds to score, and how long they took."""
