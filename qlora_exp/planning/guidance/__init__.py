"""Turn plans into advice: which method to take for which goal, and what a run that ran out of memory would fit with."""
